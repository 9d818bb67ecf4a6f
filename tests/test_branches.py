"""The contract of the branch functions: equal to separate rows through the model's own forward and generate.

The other side of each comparison builds its row by hand and calls the Hugging Face model with token ids and pixels,
with eager attention: none of the packing, masks, positions or caches of common.py take part in it.
"""

import contextlib

import pytest
import torch

import common
from support import runs

COMPLETIONS = [
    "B",
    "<think>The chair is at 12.</think><answer>A</answer>",
    "12 34",
    '[{"bbox_2d":[1,22,56,78],"label":"bed"}]',
]
QUESTIONS = [
    "From the camera's perspective, is the chair to the table's left, right, front, or back? The letter only.",
    "How many chairs are in this room? What is the size of this room (in square meters)? First think, then answer.",
    "Measuring from the closest point of each object, which is closer to the lamp: the chair or the table? Think.",
    "What is the length of the longest dimension of the chair, measured in centimeters? Answer with the number only.",
]


@pytest.fixture(scope="module", params=common.FAMILIES)
def tiny_model(request, tiny_models):
    """Everything here is asked of a tiny model of each family."""
    return tiny_models(request.param)


@pytest.fixture
def backbone(tiny_model):
    """The tiny model, loaded anew for each test; a video's frames are 0.8 seconds apart."""
    backbone = common.load_backbone(tiny_model, "fp32")
    backbone.fps = 1.25
    return backbone


@pytest.fixture(scope="session")
def scene(photo, tmp_path_factory):
    """scene(kind, sizes) -> Scene with one picture of each size."""
    folder = tmp_path_factory.mktemp("pictures")

    def make(kind, sizes):
        paths = []
        for number, (width, height) in enumerate(sizes):
            paths.append(str(folder / f"{len(list(folder.iterdir()))}_{number}.png"))
            photo(width, height, seed=len(paths) + width).save(paths[-1])
        return common.Scene(tuple(paths), kind, [])

    return make


@pytest.fixture
def scenes(scene):
    """One image, several images of unlike sizes, an even and an odd video."""
    return [
        scene("single_image", [(112, 84)]),
        scene("multi_view", [(84, 112), (112, 112), (56, 140)]),
        scene("video", [(84, 112)] * 6),
        scene("video", [(112, 56)] * 3),
    ]


def encode(backbone, text):
    return list(common.encode_text(backbone.tokenizer, text))


def inputs(backbone, scene, text):
    """What a Hugging Face processor would hand to the model for this scene and this text after its pictures."""
    tokenizer, processor = backbone.tokenizer, backbone.processor
    video = scene.data_type == "video"
    pixels, grids = common.picture_patches(processor, [common.load_image(path) for path in scene.images], video)
    pad = "<|video_pad|>" if video else "<|image_pad|>"
    timed = video and backbone.model.config.model_type == "qwen3_vl"
    if timed:  # <0.4 seconds> before the first pair of frames, whose middle is between 0 and 0.8 seconds
        ((t, h, w),) = grids.tolist()
        last = len(scene.images) - 1
        times = [(2 * n + min(2 * n + 1, last)) * 0.8 / 2 for n in range(t)]
        pictures = [f"<{time:.1f} seconds><|vision_start|>" + pad * (h // 2 * w // 2) + "<|vision_end|>" for time in times]
    else:
        pictures = ["<|vision_start|>" + pad * int(t * (h // 2) * (w // 2)) + "<|vision_end|>" for t, h, w in grids]
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + "".join(pictures)
    ids = torch.tensor([tokenizer(head)["input_ids"] + list(text)])
    kinds = (ids == tokenizer.convert_tokens_to_ids(pad)).int() * (2 if video else 1)
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    rate = {"qwen2_vl": 1, "qwen2_5_vl": 4, "qwen3_vl": 0}[backbone.model.config.model_type]
    spans = [[1, h, w]] * t if timed else grids.tolist()
    positions = torch.tensor(naive_positions(kinds[0].tolist(), spans, 1.0, rate))[:, None]  # (3, 1, T)
    return {"input_ids": ids, "mm_token_type_ids": kinds, "position_ids": positions} | dict(zip(names, (pixels, grids)))


def naive_positions(kinds, grids, seconds=1.0, tokens_per_second=2):
    """Qwen's rule, token by token: pictures count time, row and column; all else goes on from the largest number so far + 1."""
    rows, largest, pictures = [], -1, iter(grids)
    while len(rows) < len(kinds):
        if not kinds[len(rows)]:
            rows.append([largest + 1] * 3)
        else:
            start, (times, height, width) = largest + 1, next(pictures)
            for t in range(times):
                for y in range(height // 2):
                    for x in range(width // 2):
                        rows.append([start + int(t * seconds * tokens_per_second), start + y, start + x])
        largest = max(largest, *(max(row) for row in rows))
    return [list(column) for column in zip(*rows)]


@contextlib.contextmanager
def plain(model):
    """The model as Hugging Face runs it: eager attention, nothing remembered from an earlier call."""
    model.set_attn_implementation("eager")
    model.model.rope_deltas = None
    yield model
    model.model.rope_deltas = None
    model.set_attn_implementation({"": "sdpa", "text_config": "branches"})


def row_logprobs(backbone, scene, prompt, completion, temperature=None, **changed):
    """(log-probabilities, entropies) of one completion, from one unpadded row of one full forward. temperature: only among tokens
    that may be sampled, with this temperature."""
    with plain(backbone.model) as model:
        logits = model(**inputs(backbone, scene, prompt + completion) | changed).logits[0, -len(completion) - 1 : -1]
    allowed = [token for token in range(logits.shape[-1]) if not (temperature and backbone.forbidden[token])]
    logits = (logits[:, allowed] / (temperature or 1.0)).log_softmax(-1)  # (C, allowed)
    picked = torch.stack([logits[place, allowed.index(token)] for place, token in enumerate(completion)])
    return picked, -(logits.exp() * logits).sum(-1)


def make_branches(backbone, counts, shift=0):
    """Unlike questions with unlike completions: a list for each scene."""
    out = []
    for scene, count in enumerate(counts):
        out.append([])
        for branch in range(count):
            n = (scene + branch + shift) % 4
            texts = QUESTIONS[n] + common.BRANCH_END, COMPLETIONS[n] + common.STOP
            out[-1].append(tuple(encode(backbone, text) for text in texts))
    return out


def check_against_rows(backbone, scenes, prefixes, branches, before=()):
    """Values, entropy and mask of branch_logprobs against separate rows; `before`: text that the prefixes end with."""
    for temperature in (None, 1.0, 0.7):
        check_distribution(backbone, scenes, prefixes, branches, before, temperature)


def check_distribution(backbone, scenes, prefixes, branches, before, temperature):
    logps, entropy, mask = common.branch_logprobs(backbone, prefixes, branches, temperature)
    row = 0
    for scene, group, words in zip(scenes, branches, before or [[]] * len(scenes)):
        for prompt, completion in group:
            wanted, wanted_entropy = row_logprobs(backbone, scene, words + prompt, completion, temperature)
            count = len(completion)
            assert mask[row].tolist() == [True] * count + [False] * (mask.shape[1] - count)
            torch.testing.assert_close(logps[row, :count], wanted, atol=1e-4, rtol=0)
            torch.testing.assert_close(entropy[row, :count], wanted_entropy * bool(temperature), atol=1e-4, rtol=0)
            assert logps[row, count:].abs().sum() == 0 and entropy[row, count:].abs().sum() == 0
            row += 1
    assert row == len(logps)


# ------------------------------------------------------------------------------------------------
# Log-probabilities and gradients
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(4), ids=["one image", "several images", "even video", "odd video"])
@torch.no_grad()
def test_logprobs_of_one_scene_equal_separate_rows(backbone, scenes, which):
    some = scenes[which : which + 1]
    check_against_rows(backbone, some, common.encode_scenes(backbone, some), make_branches(backbone, [4]))


@torch.no_grad()
def test_logprobs_of_unlike_scenes_with_unequal_branch_counts_equal_separate_rows(backbone, scenes):
    check_against_rows(backbone, scenes, common.encode_scenes(backbone, scenes), make_branches(backbone, [1, 4, 2, 3]))


@torch.no_grad()
def test_logprobs_of_a_long_video_equal_separate_rows(backbone, scene):
    """16 frames: their time positions run past those of the words behind them; the last position is not the largest."""
    some = [scene("video", [(112, 84)] * 16), scene("single_image", [(112, 84)])]
    check_against_rows(backbone, some, common.encode_scenes(backbone, some), make_branches(backbone, [2, 2]))


@torch.no_grad()
def test_logprobs_of_a_rollout_equal_separate_rows(backbone, scenes):
    """GRPO's form: the question belongs to the prefix, the branches are completions without a prompt."""
    words = [encode(backbone, question + common.BRANCH_END) for question in QUESTIONS]
    prefixes = [common.extend_prefix(p, ids) for p, ids in zip(common.encode_scenes(backbone, scenes), words)]
    branches = [[([], completion) for _, completion in group] for group in make_branches(backbone, [4, 1, 3, 2])]
    check_against_rows(backbone, scenes, prefixes, branches, words)


@torch.no_grad()
def test_every_extra_feature_of_the_tower_counts(backbone, scenes):
    """Qwen3-VL: without one of the deepstack features the log-probabilities differ; kept features and extended prefixes hold
    them."""
    deep = len(getattr(backbone.model.config.vision_config, "deepstack_visual_indexes", ()))
    assert deep == (2 if backbone.family.name == "Qwen3-VL" else 0)
    branches = make_branches(backbone, [1, 1, 1, 1])
    prefixes = common.encode_scenes(backbone, scenes, keep=True)
    assert [len(prefix.deepstack) for prefix in prefixes] == [deep] * 4
    assert common.extend_prefix(prefixes[0], [8, 9]).deepstack is prefixes[0].deepstack
    right = common.branch_logprobs(backbone, prefixes, branches)[0]
    assert torch.equal(right, common.branch_logprobs(backbone, common.encode_scenes(backbone, scenes), branches)[0])
    for gone in range(deep):
        for prefix in prefixes:
            whole, prefix.deepstack = prefix.deepstack, tuple(f * (n != gone) for n, f in enumerate(prefix.deepstack))
            wrong = common.branch_logprobs(backbone, prefixes, branches)[0]
            prefix.deepstack = whole
            assert (right - wrong).abs().max() > 1e-2


@torch.no_grad()
def test_text_and_pictures_may_be_mixed_in_a_row(backbone, scenes):
    """A prefix without pictures between two with pictures: features go to their own prefix."""
    branches = make_branches(backbone, [2, 1, 2])
    one, other = common.encode_scenes(backbone, scenes[1:3])
    text = common.Prefix(torch.arange(20, 30), torch.arange(10).expand(3, -1), None, 10)
    logps, _, mask = common.branch_logprobs(backbone, [one, text, other], branches)
    rows = [common.branch_logprobs(backbone, [prefix], [group]) for prefix, group in zip((one, text, other), branches)]
    alone = torch.cat([row[0][row[2]] for row in rows])
    torch.testing.assert_close(logps[mask], alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_branches_with_and_without_a_prompt_may_be_mixed(backbone, scenes):
    (with_prompt, (_, completion)), *_ = make_branches(backbone, [2])
    some = scenes[:1]
    check_against_rows(backbone, some, common.encode_scenes(backbone, some), [[with_prompt, ([], completion)]])


def gradients(backbone, loss):
    backbone.model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in backbone.model.named_parameters() if p.grad is not None}


def assert_gradients_equal(got, wanted, tolerance):
    """Every parameter, by the norm of the difference relative to its own norm."""
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert wanted[name].norm() > 0, name
        assert (got[name] - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


def uneven(shape):
    """Weights of the tokens' log-probabilities: a plain sum could hide tokens that were swapped."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.4


@pytest.mark.parametrize("rollout", [False, True], ids=["prompts", "empty prompts"])
def test_gradients_equal_those_of_separate_rows(backbone, scenes, rollout):
    """Of every parameter: nothing is frozen here, so that the pictures' features carry gradients as well."""
    words = [encode(backbone, QUESTIONS[0] + common.BRANCH_END) if rollout else [] for _ in scenes]
    branches = make_branches(backbone, [1, 4, 2, 1])
    if rollout:
        branches = [[([], completion) for _, completion in group] for group in branches]
    prefixes = [common.extend_prefix(p, ids) for p, ids in zip(common.encode_scenes(backbone, scenes), words)]
    logps, _, mask = common.branch_logprobs(backbone, prefixes, branches)
    weights = uneven(mask.shape)
    got = gradients(backbone, (logps * weights).sum())

    rows = [(s, w + prompt, completion) for s, w, group in zip(scenes, words, branches) for prompt, completion in group]
    loss = 0
    for row, (scene, prompt, completion) in enumerate(rows):
        loss = loss + (row_logprobs(backbone, scene, prompt, completion)[0] * weights[row, : len(completion)]).sum()
    assert any("visual" in name for name in got) and any("language_model" in name for name in got)
    assert_gradients_equal(got, gradients(backbone, loss), 1e-4)


def test_entropy_carries_no_gradient(backbone, scenes):
    logps, entropy, _ = common.branch_logprobs(
        backbone, common.encode_scenes(backbone, scenes), make_branches(backbone, [1, 1, 1, 1]), temperature=1.0
    )
    assert logps.requires_grad and not entropy.requires_grad and entropy.any()


def test_logits_in_chunks_give_the_same_values_and_gradients(backbone, scenes):
    branches = make_branches(backbone, [1, 2, 1, 1])
    results, calls = [], []
    backbone.model.lm_head.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for chunk in (10_000, 3):
        calls.clear()
        prefixes = common.encode_scenes(backbone, scenes)
        logps, entropy, mask = common.branch_logprobs(backbone, prefixes, branches, temperature=1.0, chunk=chunk)
        results.append((logps.detach(), entropy, gradients(backbone, (logps * uneven(mask.shape)).sum())))
    assert mask.sum() > 30 and max(calls) == 3 and min(calls) < 3  # many chunks, the last of them not full
    assert sum(calls) == 2 * mask.sum()  # made again in the backward pass, not kept for it
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=0)
    assert_gradients_equal(results[0][2], results[1][2], 1e-5)


def test_gradient_checkpointing_changes_no_gradient(backbone, scenes):
    branches = make_branches(backbone, [1, 2, 1, 1])
    backbone.model.train()
    results = []
    for on in (False, True):
        if on:
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        logps, _, mask = common.branch_logprobs(backbone, common.encode_scenes(backbone, scenes), branches)
        results.append(gradients(backbone, (logps * uneven(mask.shape)).sum()))
    assert_gradients_equal(results[1], results[0], 1e-5)


# ------------------------------------------------------------------------------------------------
# Positions
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind,sizes",
    [
        ("single_image", [(112, 84)]),
        ("multi_view", [(84, 112), (112, 112), (56, 140)]),
        ("video", [(112, 84)] * 3),
        ("video", [(112, 84)] * 16),  # time positions up to 4 * 7 past the first, the picture is only 4 tokens wide
    ],
    ids=["one image", "several images", "short video", "long video"],
)
def test_an_extended_prefix_has_the_positions_of_the_whole(backbone, scene, kind, sizes):
    some = scene(kind, sizes)
    words = encode(backbone, QUESTIONS[0] + common.BRANCH_END)
    prefix = common.extend_prefix(common.encode_scenes(backbone, [some])[0], words)
    whole = inputs(backbone, some, words)
    assert prefix.ids.tolist() == whole["input_ids"][0].tolist()
    assert prefix.positions.tolist() == whole["position_ids"][:, 0].tolist()
    assert prefix.next_position == prefix.positions.max() + 1


# Where Qwen's own code and transformers 4.49 and 4.57 put the closing token and the first word of the question: 15 tokens
# before the first picture token, pictures of rows x columns tokens.
QWEN = [
    ("image", [(1, 16, 22)], 1.0, 37, 38),  # the width: 15 + 21 + 1
    ("eight images", [(1, 8, 11)] * 8, 1.0, 15 + 8 * 11 + 7 * 2, 15 + 8 * 11 + 7 * 2 + 1),  # two words between two pictures
    ("2 frames", [(1, 8, 11)], 1.0, 26, 27),
    ("16 frames, 128 tokens", [(8, 9, 12)], 1.0, 30, 31),
    ("32 frames, 128 tokens", [(16, 9, 12)], 1.0, 46, 47),
    ("32 frames, 512 tokens", [(16, 19, 25)], 1.0, 46, 47),
    ("half a second a step", [(16, 9, 12)], 0.5, 31, 32),  # times 0 .. 15
    ("a guess of 0.083 s", [(16, 9, 12)], 1 / 12, 27, 28),  # times 0 .. 2: the width decides
    ("4 seconds a step", [(4, 9, 12)], 4.0, 40, 41),  # times 0, 8, 16, 24
]


@pytest.mark.parametrize("name,grids,seconds,closing,question", QWEN, ids=[row[0] for row in QWEN])
def test_positions_are_those_of_qwens_own_code(name, grids, seconds, closing, question):
    kinds = [0] * 15
    for number, (t, h, w) in enumerate(grids):
        kinds += [0, 0] * (number > 0) + [1] * (t * h * w)
    kinds += [0, 0, 0]
    patches = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in grids])
    got = common.mrope_positions(torch.tensor(kinds) > 0, patches, 2, 2 * seconds)
    assert got[:, -3].tolist() == [closing] * 3 and got[:, -2].tolist() == [question] * 3
    assert got.tolist() == naive_positions(kinds, patches.tolist(), seconds)
    assert got[:, 15].tolist() == [15, 15, 15] and got[1:, 15 + grids[0][2]].tolist() == [16, 15]  # the second row of tokens


def test_times_of_a_video_by_hand():
    """Two frames a step, 5 steps of 1.5 seconds, 2 positions a second: 3 positions a step."""
    got = common.mrope_positions(torch.tensor([False] + [True] * 10 + [False]), torch.tensor([[5, 2, 4]]), 2, 3.0)
    assert got[0].tolist() == [0, 1, 1, 4, 4, 7, 7, 10, 10, 13, 13, 14]
    assert got[1].tolist() == [0] + [1] * 10 + [14]
    assert got[2].tolist() == [0, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 14]


@torch.no_grad()
def test_a_row_without_token_types_differs_so_much_that_these_tests_notice(backbone, scenes):
    """Without mm_token_type_ids Qwen2.5-VL raises nothing and silently takes the positions of plain text."""
    for scene in scenes:
        ((prompt, completion),) = make_branches(backbone, [1], shift=1)[0]
        right, _ = row_logprobs(backbone, scene, prompt, completion)
        text_only = torch.arange(inputs(backbone, scene, prompt + completion)["input_ids"].shape[1]).expand(3, 1, -1)
        wrong, _ = row_logprobs(backbone, scene, prompt, completion, mm_token_type_ids=None, position_ids=text_only)
        ours, _, _ = common.branch_logprobs(backbone, common.encode_scenes(backbone, [scene]), [[(prompt, completion)]])
        assert (right - wrong).abs().max() > 1e-3
        torch.testing.assert_close(ours[0], right, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------
# Generation
# ------------------------------------------------------------------------------------------------


def greedy(backbone, scene, prompt, count):
    """transformers' own greedy decoding of one row."""
    whole = inputs(backbone, scene, prompt)
    with plain(backbone.model) as model:
        out = model.generate(
            **whole, attention_mask=torch.ones_like(whole["input_ids"]), max_new_tokens=count, do_sample=False,
            repetition_penalty=1.0, top_k=None, top_p=None, temperature=None, eos_token_id=backbone.stop, pad_token_id=0,
            suppress_tokens=backbone.forbidden.nonzero()[:, 0].tolist(),
        )  # fmt: skip
    return out[0, whole["input_ids"].shape[1] :].tolist()


def prompts_for(backbone, counts):
    return [[prompt for prompt, _ in group] for group in make_branches(backbone, counts)]


def lively(backbone, bonus=0.0, spread=0.3):
    """A head of its own, `bonus` for the end token: with a tied one, random weights repeat the last word forever."""
    generator = torch.Generator().manual_seed(0)
    head = backbone.model.lm_head = torch.nn.Linear(128, len(backbone.tokenizer))
    with torch.no_grad():
        head.weight.normal_(std=spread, generator=generator)
        head.bias.zero_()
        head.bias[backbone.stop[0]] = bonus


def stop_unevenly(backbone, groups):
    """Make the token an end token that these texts hold at the most unlike places."""
    texts = [text for group in groups for text in group]

    def places(token):
        return {text.index(token) if token in text else None for text in texts}

    backbone.stop = [max(sorted({token for text in texts for token in text}), key=lambda token: len(places(token)))]


def test_greedy_text_equals_generate_and_batches_of_one(backbone, scenes):
    lively(backbone)
    prefixes, prompts = common.encode_scenes(backbone, scenes), prompts_for(backbone, [1, 4, 3, 2])
    assert len({len(prefix.ids) for prefix in prefixes}) > 2  # so some are padded on the left
    stop_unevenly(backbone, common.branch_generate(backbone, prefixes, prompts, 14))
    together = common.branch_generate(backbone, prefixes, prompts, 14)
    assert [len(group) for group in together] == [1, 4, 3, 2]
    for scene, prefix, group, texts in zip(scenes, prefixes, prompts, together):
        for prompt, text in zip(group, texts):
            assert text == greedy(backbone, scene, prompt, 14)
            assert [[text]] == common.branch_generate(backbone, [prefix], [[prompt]], 14)
    assert len({len(text) for group in together for text in group}) > 2  # so rows were dropped on the way


def test_greedy_rollout_equals_generate(backbone, scenes):
    lively(backbone)
    words = [encode(backbone, question + common.BRANCH_END) for question in QUESTIONS]
    prefixes = [common.extend_prefix(p, ids) for p, ids in zip(common.encode_scenes(backbone, scenes), words)]
    together = common.branch_generate(backbone, prefixes, [[[]] * count for count in (2, 1, 4, 1)], 12)
    for scene, prompt, texts, count in zip(scenes, words, together, (2, 1, 4, 1)):
        assert texts == [greedy(backbone, scene, prompt, 12)] * count


def test_greedy_text_about_a_long_video_equals_full_forwards(backbone, scene):
    """Against one full forward for each token, since generate() counts on from the largest position of its prompt."""
    lively(backbone)
    some = scene("video", [(112, 84)] * 16)
    prompt = encode(backbone, "How many?" + common.BRANCH_END)
    (((text,)),) = common.branch_generate(backbone, common.encode_scenes(backbone, [some]), [[prompt]], 8)
    for step, token in enumerate(text):
        with plain(backbone.model) as model, torch.no_grad():
            logits = model(**inputs(backbone, some, prompt + text[:step])).logits[0, -1]
        logits[backbone.forbidden] = -torch.inf
        assert token == logits.argmax()


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_completion_ends_with_the_end_token_and_nothing_follows(backbone, scenes, temperature):
    prefixes, prompts = common.encode_scenes(backbone, scenes), prompts_for(backbone, [4, 4, 4, 4])
    torch.manual_seed(0)
    if temperature:
        lively(backbone, bonus=4.5, spread=0.1)  # the end token has about one chance in ten
    else:
        lively(backbone)
        stop_unevenly(backbone, common.branch_generate(backbone, prefixes, prompts, 12))
    groups = common.branch_generate(backbone, prefixes, prompts, 12, temperature)
    texts = [text for group in groups for text in group]
    for text in texts:
        assert not set(text[:-1]) & set(backbone.stop)
        assert text[-1] in backbone.stop or len(text) == 12
    assert len({len(text) for text in texts}) > 2


def test_forbidden_tokens_are_never_sampled(backbone, scenes):
    """Special tokens that do not end a completion, and ids above the tokenizer's."""
    size = len(backbone.tokenizer)
    head = torch.nn.Linear(128, size + 8)
    backbone.model.lm_head = head
    backbone.forbidden = common.forbidden_tokens(backbone.tokenizer, backbone.model, backbone.stop)
    special = {number for token, number in backbone.tokenizer.get_vocab().items() if token[:2] == "<|" and token[-2:] == "|>"}
    assert set(backbone.forbidden.nonzero()[:, 0].tolist()) == (special | set(range(size, size + 8))) - set(backbone.stop)
    with torch.no_grad():
        head.bias[backbone.forbidden] = 30.0  # nearly all of the probability
    prefixes, prompts = common.encode_scenes(backbone, scenes), prompts_for(backbone, [2, 2, 2, 2])
    forbidden = set(backbone.forbidden.nonzero()[:, 0].tolist())
    for temperature in (0.0, 1.0):
        for group in common.branch_generate(backbone, prefixes, prompts, 10, temperature):
            assert not forbidden & {token for text in group for token in text}
    backbone.forbidden = torch.zeros_like(backbone.forbidden)  # and this is what it was up against
    (((text,)),) = common.branch_generate(backbone, prefixes[:1], [prompts[0][:1]], 1, 1.0)
    assert text[0] in forbidden


def test_generation_runs_in_eval_mode_and_restores_the_mode(backbone, scenes):
    seen = []
    layer = backbone.model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    prefixes, prompts = common.encode_scenes(backbone, scenes[:1]), prompts_for(backbone, [1])
    for training in (True, False):
        backbone.model.train(training)
        common.branch_generate(backbone, prefixes, prompts, 3)
        assert backbone.model.training == training
        assert layer.training == training
    assert seen and not any(seen)


def test_train_mode_with_checkpointing_does_not_change_generation(backbone, scenes):
    """In train mode checkpointing drops the cache, with only a warning, and every later token is wrong."""
    lively(backbone)
    prefixes, prompts = common.encode_scenes(backbone, scenes), prompts_for(backbone, [2, 1, 1, 2])
    wanted = common.branch_generate(backbone, prefixes, prompts, 12)
    backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    backbone.model.train()
    assert common.branch_generate(backbone, prefixes, prompts, 12) == wanted


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_scorer_sees_the_distribution_of_the_sampler(backbone, scenes, monkeypatch, temperature):
    """The log-probability that each token was drawn with equals the one that branch_logprobs gives it."""
    backbone.stop = [-1]  # so that no row is dropped and rows of the sampler are rows of the scorer
    drawn, sample = [], common.sample_tokens

    def draw(backbone, state, hidden):
        sample(backbone, state, hidden)
        logits = backbone.model.lm_head(hidden)
        logits[:, backbone.forbidden] = -torch.inf
        drawn.append((logits / temperature).log_softmax(-1).gather(-1, state.token[:, None])[:, 0])

    monkeypatch.setattr(common, "sample_tokens", draw)
    torch.manual_seed(0)
    words = [encode(backbone, question + common.BRANCH_END) for question in QUESTIONS]
    prefixes = [common.extend_prefix(p, ids) for p, ids in zip(common.encode_scenes(backbone, scenes), words)]
    groups = common.branch_generate(backbone, prefixes, [[[]] * count for count in (3, 1, 2, 2)], 9, temperature)
    assert len({tuple(text) for text in groups[0]}) == 3  # sampled, not greedy
    with torch.no_grad():
        branches = [[([], text) for text in group] for group in groups]
        logps = common.branch_logprobs(backbone, prefixes, branches, temperature)[0]
        whole = [row_logprobs(backbone, s, w, text, temperature)[0] for s, w, group in zip(scenes, words, groups) for text in group]
    torch.testing.assert_close(logps, torch.stack(drawn, dim=1), atol=1e-4, rtol=0)
    torch.testing.assert_close(logps, torch.stack(whole), atol=1e-4, rtol=0)


def test_a_rollout_leaves_nothing_behind_that_changes_the_next_scene(backbone, scenes):
    branches = make_branches(backbone, [1, 2, 1, 1])
    with torch.no_grad():
        before, _, _ = common.branch_logprobs(backbone, common.encode_scenes(backbone, scenes), branches)
        prefixes = common.encode_scenes(backbone, scenes[::-1][:2])
        common.branch_generate(backbone, prefixes, prompts_for(backbone, [2, 1]), 5, 1.0)
        after, _, _ = common.branch_logprobs(backbone, common.encode_scenes(backbone, scenes), branches)
    assert torch.equal(before, after)


def test_sampled_frequencies_are_the_softmax(backbone, scenes):
    """4,000 branches of one prompt: the share of each first token, within four standard deviations of its probability."""
    count, temperature = 4000, 1.8
    lively(backbone, spread=0.35)
    prompt = encode(backbone, QUESTIONS[0] + common.BRANCH_END)
    with plain(backbone.model) as model, torch.no_grad():
        logits = model(**inputs(backbone, scenes[1], prompt)).logits[0, -1]
    logits[backbone.forbidden] = -torch.inf
    wanted = (logits / temperature).softmax(-1)
    prefix = common.extend_prefix(common.encode_scenes(backbone, scenes[1:2])[0], prompt)
    torch.manual_seed(0)
    texts = common.branch_generate(backbone, [prefix], [[[]] * count], 1, temperature)[0]
    got = torch.bincount(torch.tensor(texts)[:, 0], minlength=len(wanted)) / count
    often = wanted * count >= 10  # the rare tokens together: their counts are not normally distributed
    got, expected = (torch.cat([part[often], part[~often].sum()[None]]) for part in (got, wanted))
    assert ((got - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()
    assert (wanted > 0.01).sum() > 5 and wanted.max() < 0.5  # many tokens are likely


def test_branches_with_and_without_a_prompt_may_be_mixed_in_generation(backbone, scenes):
    lively(backbone)
    prefixes, long = common.encode_scenes(backbone, scenes[:2]), encode(backbone, QUESTIONS[1] + common.BRANCH_END)
    groups = common.branch_generate(backbone, prefixes, [[[], long], [long[:3]]], 9)
    for prefix, prompts, texts in zip(prefixes, [[[], long], [long[:3]]], groups):
        for prompt, text in zip(prompts, texts):
            assert [[text]] == common.branch_generate(backbone, [common.extend_prefix(prefix, prompt)], [[[]]], 9)
    assert groups[0][0] == greedy(backbone, scenes[0], [], 9)


def test_a_prefix_is_stored_once_for_all_its_branches(backbone, scenes):
    """Keys and values: one copy of each prefix, and slots for the prompt and the new tokens of each branch."""
    prefixes = common.encode_scenes(backbone, scenes)
    state = common.start_decoding(backbone, prefixes, [[[8, 9]] * 8] * 4, 100, 1.0)
    config, longest = backbone.model.config.text_config, max(len(prefix.ids) for prefix in prefixes)
    size = config.num_key_value_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    assert [part.numel() for part in state.cache[0]] == [4 * longest * size] * 2 + [32 * 102 * size] * 2
    assert len(state.cache) == config.num_hidden_layers


@torch.no_grad()
def test_row_logprobs_equal_the_models_own(backbone, scenes):
    for scene, prefix in zip(scenes, common.encode_scenes(backbone, scenes)):
        ((prompt, completion),) = make_branches(backbone, [1], shift=1)[0]
        got = common.row_logprobs(backbone, common.extend_prefix(prefix, prompt), completion)
        wanted, _ = row_logprobs(backbone, scene, prompt, completion, temperature=1.0)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("load,mean,most", [("fp32", 1e-6, 2e-5), ("bf16", 0.02, 0.5), ("4bit", 0.02, 0.5)])
def test_the_sampler_with_merged_layers_stays_near_the_scorer(tiny_model, scenes, monkeypatch, load, mean, most):
    """In float32 equal; in bf16 as far apart as rounding the weights brings them (in nats a token)."""
    backbone = common.load_backbone(tiny_model, load)
    common.adapt(backbone, runs.TrainSettings(lora_rank=8, lora_alpha=16))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in backbone.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.03, generator=generator)
    plain_path = common.unwrap(backbone.model).model.language_model.layers[0].mlp.up_proj
    drawn, sample, merged = [], common.sample_tokens, []

    def draw(backbone, state, hidden):
        sample(backbone, state, hidden)
        logits = common.unwrap(backbone.model).lm_head(hidden).float()
        logits[:, backbone.forbidden] = -torch.inf
        drawn.append(logits.log_softmax(-1).gather(-1, state.token[:, None])[:, 0])
        merged.append("forward" in vars(plain_path))

    monkeypatch.setattr(common, "sample_tokens", draw)
    backbone.stop = [-1]
    prefixes = common.encode_scenes(backbone, scenes)
    torch.manual_seed(0)
    groups = common.branch_generate(backbone, prefixes, [[[]] * 4] * 4, 16, 1.0)
    with torch.no_grad():
        logps = common.branch_logprobs(backbone, prefixes, [[([], text) for text in group] for group in groups], 1.0)[0]
    gap = (torch.stack(drawn, dim=1) - logps).abs()
    assert gap.mean() < mean and gap.max() < most
    assert all(merged) and "forward" not in vars(plain_path)  # the copies are gone
    with torch.no_grad(), backbone.model.disable_adapter():
        without = common.branch_logprobs(backbone, prefixes, [[([], text) for text in group] for group in groups], 1.0)[0]
    assert (logps - without).abs().mean() > 3 * gap.mean()  # and the adapter was in them


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_not_a_number_stops_generation_and_names_the_scene(backbone, scenes, temperature):
    """torch.multinomial would say "probability tensor contains inf, nan" on a CPU, and argmax would return token 0."""
    prefixes, prompts = common.encode_scenes(backbone, scenes), prompts_for(backbone, [2, 2, 2, 2])
    prefixes[2].features = prefixes[2].features * torch.nan
    prefixes[2].name = "spld_spatial_data:7"
    with pytest.raises(FloatingPointError, match="not finite.*spld_spatial_data:7"):
        common.branch_generate(backbone, prefixes, prompts, 6, temperature)


def test_not_a_number_late_in_a_completion_is_noticed(backbone, scenes):
    """In one row, after some tokens, and not in rows that have ended (their tokens are ignored)."""
    prefixes = common.encode_scenes(backbone, scenes[:1])
    table = backbone.model.get_input_embeddings().weight
    lively(backbone)
    texts = common.branch_generate(backbone, prefixes, [[[word] for word in range(8, 200)]], 12)[0]
    first, late, text = next((n, t, text) for n, text in enumerate(texts, 8) for t in text if 3 <= text.index(t) <= 9)
    with torch.no_grad():
        table[late] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        common.branch_generate(backbone, prefixes, [[[first]]], 12)
    backbone.stop = [late]
    assert common.branch_generate(backbone, prefixes, [[[first], [first]]], 12)[0] == [text[: text.index(late) + 1]] * 2
