"""GRPO against its equations, written out slowly; rewards against cases written by hand; and the loop's promises."""

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import stage3_grpo
from common import Example
from support import runs

LOSSES = ("sequence", "token", "constant")
CHOICES = ["A. left", "B. right", "C. front", "D. back"]


def settings_of(**changes):
    """Stage 3's settings for a tiny run."""
    small = {"load": "fp32", "train_batch": 2, "group_size": 3, "max_new_tokens": 12, "steps": 1, "show_every": 1, "lr": 1e-2}
    return stage3_grpo.GRPOSettings(**(small | changes))


# The loss


def slow_loss(logps, old, ref, advantages, lengths, settings):
    """The paper's objective, one group, one completion, one token at a time. logps: groups of rows of floats.

    Returns the loss, the number of tokens whose clip is active, and the sum of the KL, over all tokens.
    """
    whole, clipped_tokens, kl_sum, tokens, sequences = 0.0, 0, 0.0, 0, 0
    for b, group in enumerate(logps):
        for i, row in enumerate(group):
            inner = 0.0
            for t in range(lengths[b][i]):
                ratio, advantage = math.exp(row[t] - old[b][i][t]), advantages[b][i]
                bounded = min(max(ratio, 1 - settings.epsilon_low), 1 + settings.epsilon_high)
                gain = min(ratio * advantage, bounded * advantage)
                clipped_tokens += gain != ratio * advantage
                if ref is not None:
                    pi_ref_over_pi = math.exp(ref[b][i][t] - row[t])
                    kl = pi_ref_over_pi - math.log(pi_ref_over_pi) - 1
                    gain -= settings.beta * kl
                    kl_sum += kl
                inner += gain
            tokens += lengths[b][i]
            sequences += 1
            whole += inner / lengths[b][i] if settings.loss_average == "sequence" else inner
    scale = {"sequence": sequences, "token": tokens, "constant": sequences * settings.max_new_tokens}[settings.loss_average]
    return -whole / scale, clipped_tokens, kl_sum


def random_case(seed, groups=2, size=3, longest=5):
    """Log-probabilities far enough apart that both clips bind, advantages of both signs, unequal lengths."""
    rng = random.Random(seed)

    def table(spread):
        return [[[-1 + rng.gauss(0, spread) for _ in range(longest)] for _ in range(size)] for _ in range(groups)]

    lengths = [[rng.randint(1, longest) for _ in range(size)] for _ in range(groups)]
    advantages = [[rng.gauss(0, 1) for _ in range(size)] for _ in range(groups)]
    return table(0.4), table(0.4), table(0.4), advantages, lengths


def tensors(case):
    """The same case as grpo_loss takes it: (N, C) tensors in float64 and a mask."""
    logps, old, ref, advantages, lengths = (torch.tensor(part, dtype=torch.float64) for part in case)
    mask = torch.arange(logps.shape[-1]) < lengths.view(-1, 1)
    return *(part.flatten(0, 1) for part in (logps, old, ref)), advantages.flatten(), mask


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("loss_average", LOSSES)
def test_loss_equals_the_equations_token_by_token(loss_average, with_reference):
    settings, clips, signs = settings_of(loss_average=loss_average, epsilon_low=0.2, epsilon_high=0.35, beta=0.3), 0, set()
    for seed in range(20):
        case = random_case(seed)
        logps, old, ref, advantages, mask = tensors(case)
        loss, stats = stage3_grpo.grpo_loss(
            logps, old, ref if with_reference else None, advantages, mask, settings, len(mask), int(mask.sum())
        )
        logp, before, reference, gains, lengths = case
        wanted, clipped, kl = slow_loss(logp, before, reference if with_reference else None, gains, lengths, settings)
        assert math.isclose(loss.item(), wanted, rel_tol=1e-9, abs_tol=1e-12)
        assert stats["clip"] == clipped and math.isclose(stats["kl"], kl, rel_tol=1e-9, abs_tol=1e-12)
        clips += clipped
        signs |= {value > 0 for value in advantages.tolist()}
    assert clips > 20 and signs == {True, False}


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("loss_average", LOSSES)
def test_gradient_equals_finite_differences_of_the_equations(loss_average, with_reference):
    settings = settings_of(loss_average=loss_average, epsilon_low=0.2, epsilon_high=0.35, beta=0.3)
    case = random_case(7)
    logps, old, ref, advantages, mask = tensors(case)
    logps.requires_grad_(True)
    reference = ref if with_reference else None
    stage3_grpo.grpo_loss(logps, old, reference, advantages, mask, settings, len(mask), int(mask.sum()))[0].backward()
    table, before, base, gains, lengths = case
    rest = before, base if with_reference else None, gains, lengths, settings
    for b in range(len(table)):
        for i in range(len(table[b])):
            for t in range(len(table[b][i])):
                sides = []
                for nudge in (1e-6, -1e-6):
                    table[b][i][t] += nudge
                    sides.append(slow_loss(table, *rest)[0])
                    table[b][i][t] -= nudge
                wanted = (sides[0] - sides[1]) / 2e-6
                assert math.isclose(logps.grad[b * len(table[b]) + i, t].item(), wanted, rel_tol=1e-5, abs_tol=1e-8)


@pytest.mark.parametrize(
    "ratio, advantage, gain, slope",
    [
        (1.5, 1.0, 1.35, 0.0),  # up far enough already: no more push
        (1.5, -1.0, -1.5, -1.5),  # made a bad token likelier: pushed back without a bound
        (0.5, 1.0, 0.5, 0.5),  # made a good token rarer: pushed back without a bound
        (0.5, -1.0, -0.8, 0.0),  # down far enough already
        (1.3, 1.0, 1.3, 1.3),  # between 1 + epsilon_low and 1 + epsilon_high: not clipped
    ],
)
def test_min_and_clip_by_hand_for_both_signs(ratio, advantage, gain, slope):
    settings = settings_of(loss_average="token", epsilon_low=0.2, epsilon_high=0.35)
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    mask, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.float64)
    loss, _ = stage3_grpo.grpo_loss(logps, zero, None, torch.tensor([advantage]).double(), mask, settings, 1, 1)
    loss.backward()
    assert math.isclose(-loss.item(), gain) and math.isclose(-logps.grad.item(), slope)


@pytest.mark.parametrize("loss_average", LOSSES)
def test_parts_of_a_step_add_up_to_the_whole(loss_average):
    settings = settings_of(loss_average=loss_average, beta=0.3)
    logps, old, ref, advantages, mask = tensors(random_case(3))
    count = len(mask), int(mask.sum())
    whole, stats = stage3_grpo.grpo_loss(logps, old, ref, advantages, mask, settings, *count)
    rows = [slice(0, 2), slice(2, None)]
    parts = [
        stage3_grpo.grpo_loss(logps[r], old[r], ref[r], advantages[r], mask[r], settings, *count) for r in rows
    ]
    assert torch.isclose(sum(loss for loss, _ in parts), whole, rtol=1e-12)
    assert math.isclose(sum(part["kl"] for _, part in parts), stats["kl"])
    assert sum(part["clip"] for _, part in parts) == stats["clip"]


@pytest.mark.parametrize("loss_average", LOSSES)
def test_tokens_outside_the_mask_change_nothing(loss_average):
    settings = settings_of(loss_average=loss_average, beta=0.3)
    logps, old, ref, advantages, mask = tensors(random_case(5))
    wanted = stage3_grpo.grpo_loss(logps, old, ref, advantages, mask, settings, len(mask), int(mask.sum()))
    noise = torch.randn(logps.shape, dtype=torch.float64) * ~mask
    other = [part + scale * noise for part, scale in ((logps, 1), (old, 2), (ref, 3))]
    assert (~mask).any()
    found = stage3_grpo.grpo_loss(*other, advantages, mask, settings, len(mask), int(mask.sum()))
    assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]


def test_an_unknown_average_is_named(capsys):
    with pytest.raises(SystemExit):
        runs.parse_settings(stage3_grpo.GRPOSettings, stage3_grpo.PRESETS, "stage3", argv=["--loss_average", "ppo"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--loss_average" in last and "ppo" in last and all(name in last for name in LOSSES)


# Advantages


def test_advantages_by_hand():
    reward = torch.tensor([[2.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
    found = stage3_grpo.group_advantages(reward)
    spread = math.sqrt(2 / 3) + 1e-4  # deviations 1, 0, -1, 0 over three degrees of freedom
    assert torch.allclose(found[0], torch.tensor([1, 0, -1, 0], dtype=torch.float64) / spread)
    assert torch.equal(found[1], torch.zeros(4, dtype=torch.float64))  # all equal: nothing to learn
    assert torch.allclose(found[2], torch.tensor([-0.5, -0.5, -0.5, 1.5], dtype=torch.float64) / (1 + 1e-4))


def test_advantages_that_are_not_scaled_are_not_divided():
    reward = torch.tensor([[2.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    found = stage3_grpo.group_advantages(reward, scale=False)
    assert torch.equal(found, torch.tensor([[1.0, 0, -1, 0], [0, 0, 0, 0]]))


def test_a_group_is_compared_with_itself_only():
    first, second = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[7.0, 5.0, 5.5]])
    both = stage3_grpo.group_advantages(torch.cat([first, second]))
    assert torch.equal(both, torch.cat([stage3_grpo.group_advantages(part) for part in (first, second)]))


# Rewards


def ask(kind, answer, options=None):
    return Example("", (), "single_image", kind, "Where?", options, answer)


CHOICE, NUMBER = ask("relative direction", "B", CHOICES), ask("absolute distance", "2.0")
BOXES = [{"bbox_2d": [10, 10, 20, 20], "label": "red cube"}, {"bbox_2d": [30, 30, 50, 40], "label": "blue ball"}]
PICTURES = [box | {"picture": number} for number, box in enumerate(BOXES, 1)]
LOCATE = ask("locate", BOXES)
FAR = "9" * 400  # no float holds it

CASES = [  # completion, example, (format, accuracy) when format needs a legal answer, format when it does not
    ("<think> x </think><answer>B</answer>", CHOICE, (1, 1), 1),
    (" <think>x\ny</think>\n<answer> (B) </answer> ", CHOICE, (1, 1), 1),
    ("<think>x</think><answer>right</answer>", CHOICE, (1, 1), 1),
    ("<think>x</think><answer>A</answer>", CHOICE, (1, 0), 1),
    ("B", CHOICE, (0, 0), 0),  # right, but not where answers belong
    ("The answer is B", CHOICE, (0, 0), 0),
    ("<answer>B</answer>", CHOICE, (0, 1), 0),  # no thought
    ("<think>x</think>B", CHOICE, (0, 0), 0),
    ("<think>x</think><answer>B", CHOICE, (0, 0), 0),  # not closed
    ("<think>x</think><answer>B</answer> and so", CHOICE, (0, 1), 0),
    ("so <think>x</think><answer>B</answer>", CHOICE, (0, 1), 0),
    ("<answer>B</answer><think>x</think>", CHOICE, (0, 1), 0),
    ("<think>x</think><answer></answer>", CHOICE, (0, 0), 1),
    ("<think>x</think><answer>  </answer>", NUMBER, (0, 0), 1),
    ("<think>x</think><answer>A or B</answer>", CHOICE, (0, 0), 1),
    ("<think>x</think><answer>ABCD</answer>", CHOICE, (0, 0), 1),
    ("<think>x</think><answer>B. left</answer>", CHOICE, (0, 0), 1),  # letter and words disagree
    ("<think>x</think><answer>E</answer>", CHOICE, (0, 0), 1),
    ("<think>x</think><answer>2</answer>", CHOICE, (0, 0), 1),  # a number to a choice
    ("<think>x</think><answer>A</answer><answer>B</answer>", CHOICE, (0, 1), 0),  # the last one counts
    ("<think>x</think><answer>B</answer><answer>A</answer>", CHOICE, (0, 0), 0),
    ("<think>x</think><think>y</think><answer>B</answer>", CHOICE, (0, 1), 0),
    ("<think><answer>B</answer></think><answer>A</answer>", CHOICE, (0, 0), 0),
    ("", CHOICE, (0, 0), 0),
    ("<think>x</think><answer>2</answer>", NUMBER, (1, 1), 1),
    ("<think>x</think><answer>two</answer>", NUMBER, (1, 1), 1),
    ("<think>x</think><answer>about 2.0 meters.</answer>", NUMBER, (1, 1), 1),
    ("<think>x</think><answer>1.5</answer>", NUMBER, (1, 0.6), 1),  # off by .25: .50 to .75 are met
    ("<think>x</think><answer>9,000,000</answer>", NUMBER, (1, 0), 1),
    (f"<think>x</think><answer>{FAR}</answer>", NUMBER, (0, 0), 1),
    ("<think>x</think><answer>inf</answer>", NUMBER, (0, 0), 1),
    ("<think>x</think><answer>nan</answer>", NUMBER, (0, 0), 1),
    ("<think>x</think><answer>1 2 3</answer>", NUMBER, (0, 0), 1),
    ("<think>x</think><answer>1.9 or 2.0</answer>", NUMBER, (0, 0), 1),
    ("<think>x</think><answer>B</answer>", NUMBER, (0, 0), 1),  # a letter to a number
    ("2.0", NUMBER, (0, 0), 0),
    (common.boxes_text(BOXES), LOCATE, (1, 1), 1),
    (common.boxes_text(BOXES[::-1]), LOCATE, (1, 1), 1),  # the order is free
    (common.boxes_text(BOXES[:1]), LOCATE, (1, 0.5), 1),
    (common.boxes_text(PICTURES), LOCATE, (1, 0.5), 1),  # the second box is in another picture
    (common.boxes_text(PICTURES), replace(LOCATE, answer=PICTURES), (1, 1), 1),
    (common.boxes_text(PICTURES[::-1]), replace(LOCATE, answer=PICTURES), (1, 1), 1),
    (common.boxes_text(BOXES), replace(LOCATE, answer=PICTURES), (1, 0.5), 1),
    (common.boxes_text(BOXES + BOXES), LOCATE, (1, 0.5), 1),  # every box too many is a miss
    (common.boxes_text([BOXES[0], BOXES[1] | {"label": "ball"}]), LOCATE, (1, 0.5), 1),
    (common.boxes_text([BOXES[0] | {"bbox_2d": [10, 10, 20, 15]}, BOXES[1]]), LOCATE, (1, 0.75), 1),
    ("[]", LOCATE, (1, 0), 1),
    ("a red cube", LOCATE, (0, 0), 0),
    ('[{"label":"red cube","bbox_2d":[20,20,10,10]}]', LOCATE, (0, 0), 0),  # reversed
    (common.boxes_text(BOXES)[:-1], LOCATE, (0, 0), 0),
]


def test_rewards_of_cases_written_by_hand():
    texts, examples, wanted, _ = zip(*CASES)
    form, accuracy = stage3_grpo.rewards(texts, examples, settings_of()).values()
    for text, got, case in zip(texts, zip(form, accuracy), wanted):
        assert np.allclose(got, case), f"{text}: {got}, not {case}"


def test_without_legal_format_the_tags_alone_are_paid():
    texts, examples, wanted, tags = zip(*CASES)
    form, accuracy = stage3_grpo.rewards(texts, examples, settings_of(legal_format=False)).values()
    for text, got, case in zip(texts, form, tags):
        assert got == case, f"{text}: {got}, not {case}"
    assert np.allclose(accuracy, [case[1] for case in wanted])


def test_special_tokens_in_a_completion_cost_the_format(backbone):
    """Decoding used to drop them, so that a completion full of them had the right format."""
    ids = backbone.tokenizer.convert_tokens_to_ids

    def encode(text):
        return list(common.encode_text(backbone.tokenizer, text))

    thought, answer, stop = encode("<think>x</think>"), encode("<answer>A</answer>"), [backbone.stop[0]]
    choice = Example("c", (), "single_image", "relative direction", "q", CHOICES, "A")
    for between, paid in (([], 1), ([ids("<|im_start|>")] * 20, 0), ([ids("<|image_pad|>")], 0), ([backbone.stop[1]], 0)):
        text = common.decode(backbone, thought + between + answer + stop)
        assert stage3_grpo.rewards([text], [choice], settings_of())["format"] == paid, text
    assert common.decode(backbone, answer + stop) == "<answer>A</answer>" == common.decode(backbone, answer)
    with torch.no_grad():
        prefix = common.Prefix(torch.arange(20, 30), torch.arange(10).expand(3, -1), None, 10)
        logps = common.branch_logprobs(backbone, [prefix], [[([], [ids("<|im_start|>")])]], temperature=1.0)[0]
    assert logps.item() == -math.inf  # as in the sampler


# Rewards for the boxes of a thought

TWO = replace(CHOICE, boxes=BOXES)
VIEWS = replace(CHOICE, boxes=PICTURES)
SAME = replace(NUMBER, boxes=[BOXES[0], {"bbox_2d": [60, 60, 80, 80], "label": "red cube"}])
HALF = [BOXES[0] | {"bbox_2d": [10, 10, 20, 15]}, BOXES[1]]  # the first box cut in half
THOUGHTS = [  # what is before the answer, example, mean IoU
    (common.boxes_text(BOXES), TWO, 1),
    (f"<think> {common.boxes_text(BOXES)} red cube 0.1,2.0; right 0.9: right </think>", TWO, 1),
    (f"<think> {common.boxes_text(PICTURES[:1])} picture 1: 0,2; {common.boxes_text(PICTURES[1:])} so </think>", VIEWS, 1),
    (f"<think> {common.boxes_text(PICTURES[:1])} {common.boxes_text(HALF[:1])} </think>", VIEWS, 0.5),
    (f"<think> {common.boxes_text(BOXES)} </think>", VIEWS, 0.5),  # a box without a number is in picture 1
    (f"<think> {common.boxes_text([box | {'picture': 2} for box in BOXES])} </think>", VIEWS, 0.5),
    (f"<think>{common.boxes_text(BOXES[::-1])}</think>", TWO, 1),  # paired by label
    (f"<think>{common.boxes_text(BOXES[:1])} left of {common.boxes_text(BOXES[1:])}</think>", TWO, 1),  # one list each
    (f"<think>{common.boxes_text(BOXES[:1])}</think>", TWO, 0.5),
    (f"<think>{common.boxes_text(HALF)}</think>", TWO, 0.75),
    (f"<think>{common.boxes_text([BOXES[0] | {'label': 'red ball'}])}</think>", TWO, 0),
    (f"<think>{common.boxes_text([BOXES[0] | {'label': 'red ball'}, BOXES[1]])}</think>", TWO, 0.5),
    (f"<think>{common.boxes_text(SAME.boxes)}</think>", SAME, 1),  # two objects of one name, in the order of the row
    (f"<think>{common.boxes_text(BOXES[:1] * 2)}</think>", SAME, 0.5),
    ("<think>no boxes</think>", TWO, 0),
    ("", TWO, 0),
    (f"<think>{common.boxes_text(BOXES)[:-2]}</think>", TWO, 0),  # not JSON
    (f"<think>x</think><answer>{common.boxes_text(BOXES)}</answer>", TWO, 0),  # not in the thought
    (f"<think>{common.boxes_text(BOXES)}</think>", CHOICE, 0),  # an example without boxes
    (common.boxes_text(BOXES), LOCATE, 0),
]


def test_boxes_of_a_thought_are_paid_by_their_mean_iou():
    texts, examples, wanted = zip(*THOUGHTS)
    for text, found, want in zip(texts, stage3_grpo.thought_iou(texts, examples), wanted):
        assert found == pytest.approx(want), text


def test_the_third_reward_is_the_weight_times_the_iou_and_0_without_it():
    texts, examples = [text for text, *_ in THOUGHTS], [example for _, example, _ in THOUGHTS]
    plain, paid = (stage3_grpo.rewards(texts, examples, settings_of(locate_reward=weight)) for weight in (0.0, 0.3))
    assert list(plain) == ["format", "accuracy"] and list(paid) == ["format", "accuracy", "boxes"]
    assert all(np.array_equal(paid[name], plain[name]) for name in plain)
    assert np.allclose(paid["boxes"], [0.3 * want for *_, want in THOUGHTS])


def test_the_boxes_that_are_paid_are_in_pixels_that_the_model_sees(tiny_model, tmp_path, monkeypatch):
    """Pictures of 224 x 224 and 448 x 224 pixels, of which the model sees 112 x 112 and 140 x 56."""
    sizes = {"scene0001_00/0.png": (224, 224), "scene0001_00/20.png": (448, 224)}
    (tmp_path / "images" / "scene0001_00").mkdir(parents=True)
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / "images" / name)
    boxes = [{"label": "red cube", "bbox_2d": [224, 112, 448, 224], "picture": 2},
             {"label": "blue ball", "bbox_2d": [40, 60, 100, 121], "picture": 1}]  # fmt: skip
    row = {"question_id": 0, "question": "Where?", "options": CHOICES, "answer": "A", "image": list(sizes),
           "question_type": "relative direction", "data_type": "multi_view"}  # fmt: skip
    lines = [json.dumps(row | {"boxes": boxes}), json.dumps(row), json.dumps(row | {"boxes": [boxes[1]], "image": [*sizes][:1]})]
    (tmp_path / common.FILES["spatial"]).write_text("\n".join(lines))
    seen = []
    monkeypatch.setattr(stage3_grpo, "cold_start", lambda settings: tiny_model)
    monkeypatch.setattr(stage3_grpo, "grpo", lambda backbone, prompts, *_: seen.append([example for _, example in prompts]))
    monkeypatch.setattr(runs.Run, "finish", lambda *_: None)
    for weight in (0.5, 0.0):
        more = {"data": str(tmp_path), "eval_scenes": 0, "min_picture_tokens": 4, "max_picture_tokens": 16, "locate_reward": weight}
        stage3_grpo.work(settings_of(model=str(tiny_model), out=str(tmp_path / f"run{weight}" / "stage3"), **more))
    both, none, one = ([box["bbox_2d"] for box in example.boxes or []] for example in seen[0])
    assert both == [[70, 28, 140, 56], [20, 30, 50, 60]] and none == [] and one == both[1:]
    assert [box["label"] for box in seen[0][0].boxes] == ["red cube", "blue ball"]
    right = [{"label": "blue ball", "bbox_2d": [20, 30, 50, 60]}]
    assert stage3_grpo.thought_iou([common.boxes_text(right)] * 2, [seen[0][2], seen[0][0]]).tolist() == [1, 0.5]
    assert seen[1][0].boxes == boxes  # without the reward they stay as they are
    (tmp_path / common.FILES["spatial"]).write_text(json.dumps(row))
    with pytest.raises(SystemExit, match=r"--locate_reward: no row of .* has boxes\. Make the data with stage0_data\.py, or use 0"):
        stage3_grpo.work(settings_of(model=str(tiny_model), out=str(tmp_path / "none" / "stage3"), **more | {"locate_reward": 0.5}))


# The loop, on a tiny model


def scene_prompts(backbone, data, count=2):
    """[(Scene, Example)] of the first questions of a data folder."""
    scenes = common.load_scenes(data, ["spatial"], backbone)
    return [(scene, example) for scene in scenes for example in scene.examples][:count]


def with_adapter(backbone, settings, moved=False):
    """The backbone with LoRA; moved: no longer the starting policy."""
    torch.manual_seed(0)
    common.adapt(backbone, settings)
    if moved:
        for name, parameter in backbone.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return backbone


def trained_state(backbone):
    return {name: p.detach().clone() for name, p in backbone.model.named_parameters() if p.requires_grad}


def spy(monkeypatch, module, name):
    """Record the arguments and results of a function while it goes on doing its work."""
    calls, original = [], getattr(module, name)

    def watched(*args, **kwargs):
        out = original(*args, **kwargs)
        calls.append(SimpleNamespace(args=args, out=out))
        return out

    monkeypatch.setattr(module, name, watched)
    return calls


def run_loop(backbone, prompts, settings, folder):
    """One run of stage 3's loop without held-out scores. Returns its metrics."""
    settings.out = str(folder)
    stage3_grpo.grpo(backbone, prompts, [], [], settings, runs.Run(settings, {}))
    return common.read_jsonl(folder / "metrics.jsonl")


def paid(*groups):
    """A stand-in for stage3_grpo.rewards that pays these accuracies, group by group."""
    flat = np.array([value for group in groups for value in group], float)
    return lambda texts, examples, settings: {"accuracy": flat}


def test_adapter_on_equals_adapter_off_at_step_0_and_the_kl_is_exactly_0(backbone, ladder_data):
    settings = settings_of(beta=0.5)
    with_adapter(backbone, settings)
    prefixes, groups = stage3_grpo.rollout(backbone, scene_prompts(backbone, ladder_data), settings)
    branches = [[([], ids) for ids in group] for group in groups]
    backbone.model.train()
    with torch.no_grad(), backbone.model.disable_adapter():
        reference = common.branch_logprobs(backbone, prefixes, branches, temperature=1.0)[0]
    logps, _, mask = common.branch_logprobs(backbone, prefixes, branches, temperature=1.0)
    assert logps.requires_grad and torch.equal(logps, reference) and (logps < 0).any()
    zero, count = torch.zeros(len(mask)), (len(mask), int(mask.sum()))
    loss, stats = stage3_grpo.grpo_loss(logps, logps.detach(), reference, zero, mask, settings, *count)
    assert stats["kl"] == 0.0 and loss.item() == 0.0


def test_shared_prefixes_are_compared_with_separate_rows(backbone, ladder_data, monkeypatch, capsys):
    settings = settings_of()
    with_adapter(backbone, settings, moved=True)
    prefixes, groups = stage3_grpo.rollout(backbone, scene_prompts(backbone, ladder_data), settings)
    gaps = []
    for shift in (0.0, 0.25):  # the second as if a kernel were wrong
        rows = common.row_logprobs
        monkeypatch.setattr(common, "row_logprobs", lambda *args, rows=rows, shift=shift: rows(*args) + shift)
        stage3_grpo.compare_with_rows(backbone, prefixes[0], groups[0])
        gaps.append(float(capsys.readouterr().err.split("at most ")[1]))
    assert gaps[0] < 1e-4 and gaps[1] == pytest.approx(0.25, abs=1e-3)


def test_not_a_number_in_a_rollout_names_step_and_question_and_keeps_the_checkpoint(backbone, ladder_data, monkeypatch, tmp_path):
    settings = settings_of(save_every=1, steps=3, processes=1)
    with_adapter(backbone, settings)
    prompts = scene_prompts(backbone, ladder_data, 4)
    sampled, steps = common.branch_generate, []

    def broken(backbone, *args):
        steps.append(1)
        if len(steps) == 2:
            backbone.model.base_model.model.model.language_model.norm.weight.data.fill_(torch.nan)
        return sampled(backbone, *args)

    monkeypatch.setattr(stage3_grpo.common, "branch_generate", broken)
    with pytest.raises(SystemExit, match="step 2: .*not finite.*spld_spatial_data:.*--lr"):
        run_loop(backbone, prompts, settings, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 1 and all(weight.isfinite().all() for weight in state["weights"].values())


def test_every_process_starts_from_the_same_adapter(tiny_model):
    # The processes have drawn different numbers by then, at the latest when the cold start has run before.
    adapters = []
    for drawn in (1, 2):
        backbone = common.load_backbone(tiny_model, "fp32")
        torch.manual_seed(drawn)
        common.adapt(backbone, settings_of())
        adapters.append(trained_state(backbone))
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())


def test_the_reference_stays_the_starting_policy(backbone, tiny_model, ladder_data, monkeypatch, tmp_path):
    settings = settings_of(temperature=0.7)
    with_adapter(backbone, settings, moved=True)
    monkeypatch.setattr(stage3_grpo, "rewards", paid([1, 0, 0], [0, 1, 0]))
    scored = spy(monkeypatch, stage3_grpo.common, "branch_logprobs")
    losses = spy(monkeypatch, stage3_grpo, "grpo_loss")
    metrics = run_loop(backbone, scene_prompts(backbone, ladder_data), settings, tmp_path / "run")
    plain = common.load_backbone(tiny_model, "fp32")
    for call in losses:
        logps, old, reference, _, mask = call.args[:5]
        assert torch.equal(logps, old) and not torch.allclose(logps, reference)
        _, prefixes, branches, _ = next(c for c in scored if c.out[0] is logps or torch.equal(c.out[0], logps)).args
        with torch.no_grad():
            assert torch.allclose(common.branch_logprobs(plain, prefixes, branches, temperature=0.7)[0], reference, atol=1e-5)
    assert metrics[0]["kl"] > 0


def test_rollout_gives_a_group_of_sampled_ids_for_each_question(backbone, ladder_data):
    settings = settings_of(group_size=4, max_new_tokens=9)
    prompts = scene_prompts(backbone, ladder_data, 3)
    torch.manual_seed(0)
    prefixes, groups = stage3_grpo.rollout(backbone, prompts, settings)
    assert len(prefixes) == len(groups) == 3 and all(len(group) == 4 for group in groups)
    for (_, example), prefix, group in zip(prompts, prefixes, groups):
        words = common.prompt_text(example, "think") + common.BRANCH_END
        question = list(common.encode_text(backbone.tokenizer, words))
        assert prefix.ids[-len(question) :].tolist() == question and len(prefix.ids) > len(question)
        assert prefix.positions.shape == (3, len(prefix.ids))
        for ids in group:
            assert all(type(token) is int and 0 <= token < len(backbone.tokenizer) for token in ids)
            assert 1 <= len(ids) <= 9 and not backbone.forbidden[ids].any()
            assert not set(ids[:-1]) & set(backbone.stop)  # nothing after the end token
            assert len(ids) == 9 or ids[-1] in backbone.stop
    assert len({tuple(ids) for ids in groups[0]}) > 1


def test_completions_are_trained_on_as_sampled(backbone, ladder_data, monkeypatch, tmp_path):
    settings = settings_of()
    with_adapter(backbone, settings)
    # Ids whose text is encoded otherwise: "t", "h", "e" one by one, where the tokenizer would join them.
    alone = [backbone.tokenizer.convert_tokens_to_ids(letter) for letter in "the"]
    assert backbone.tokenizer("the", add_special_tokens=False)["input_ids"] != alone
    sampled = [[alone + [i, backbone.stop[0]] for i in range(100, 103)] for _ in range(2)]
    monkeypatch.setattr(stage3_grpo.common, "branch_generate", lambda *args: sampled)
    monkeypatch.setattr(stage3_grpo, "rewards", paid([1, 0, 0], [0, 1, 0]))
    scored = spy(monkeypatch, stage3_grpo.common, "branch_logprobs")
    run_loop(backbone, scene_prompts(backbone, ladder_data), settings, tmp_path / "run")
    learnt = [group for call in scored if call.out[0].requires_grad for group in call.args[2]]
    assert learnt == [[([], ids) for ids in group] for group in sampled]


def test_a_step_raises_what_beat_its_siblings(backbone, ladder_data, monkeypatch, tmp_path):
    settings = settings_of(beta=0.0, lr=1e-3, warmup=0.0)
    with_adapter(backbone, settings)
    monkeypatch.setattr(stage3_grpo, "rewards", paid([1, 0, 0], [0, 1, 0]))
    losses = spy(monkeypatch, stage3_grpo, "grpo_loss")
    scored = spy(monkeypatch, stage3_grpo.common, "branch_logprobs")
    run_loop(backbone, scene_prompts(backbone, ladder_data), settings, tmp_path / "run")
    prefixes, branches = ([x for call in scored for x in call.args[k]] for k in (1, 2))
    advantages = torch.cat([call.args[3] for call in losses])
    before = torch.cat([call.args[0].detach().sum(1) for call in losses])
    with torch.no_grad():
        after = common.branch_logprobs(backbone, prefixes, branches, temperature=1.0)[0].sum(1)
    assert sorted(advantages.sign().view(2, 3).tolist()) == [[-1, 1, -1], [1, -1, -1]]  # short prefixes are scored first
    assert ((after - before) * advantages).sum() > 0


def test_dead_groups_give_no_gradient_and_are_counted(backbone, ladder_data, monkeypatch, tmp_path):
    settings = settings_of(beta=0.1)
    with_adapter(backbone, settings, moved=True)
    before = trained_state(backbone)
    monkeypatch.setattr(stage3_grpo, "rewards", paid([1, 1, 1], [0, 0, 0]))
    scored = spy(monkeypatch, stage3_grpo.common, "branch_logprobs")
    row = run_loop(backbone, scene_prompts(backbone, ladder_data), settings, tmp_path / "run")[0]
    assert not scored and row["dead_groups"] == 1.0 and row["grad_norm"] == 0.0 and row["reward_std"] == 0.0
    assert all(torch.equal(value, before[name]) for name, value in trained_state(backbone).items())


def test_only_the_living_group_is_scored_when_one_is_dead(backbone, ladder_data, monkeypatch, tmp_path):
    settings = settings_of(beta=0.0)
    with_adapter(backbone, settings)
    before = trained_state(backbone)
    monkeypatch.setattr(stage3_grpo, "rewards", paid([1, 1, 1], [0, 0.5, 0]))
    sampled = spy(monkeypatch, stage3_grpo.common, "branch_generate")
    scored = spy(monkeypatch, stage3_grpo.common, "branch_logprobs")
    losses = spy(monkeypatch, stage3_grpo, "grpo_loss")
    row = run_loop(backbone, scene_prompts(backbone, ladder_data), settings, tmp_path / "run")[0]
    assert [call.args[2] for call in scored] == [[[([], ids) for ids in sampled[0].out[1]]]]
    assert row["dead_groups"] == 0.5
    # The dead group still counts in the mean: a step with fewer living groups is a smaller step.
    assert losses[0].args[6] == 6 and losses[0].args[7] == sum(len(ids) for group in sampled[0].out for ids in group)
    assert any(not torch.equal(value, before[name]) for name, value in trained_state(backbone).items())


def test_small_and_large_parts_give_the_same_update(tiny_model, ladder_data, monkeypatch, tmp_path):
    norms, logged = [], []
    for micro in (1, 8):
        settings = settings_of(micro_batch=micro, loss_average="token", train_batch=3, group_size=2, beta=0.1)
        backbone = with_adapter(common.load_backbone(tiny_model, "fp32"), settings, moved=True)
        monkeypatch.setattr(stage3_grpo, "rewards", paid([1, 0], [0, 1], [0.5, 0]))
        calls = spy(monkeypatch, stage3_grpo, "grpo_loss")
        prompts = scene_prompts(backbone, ladder_data, 3)
        row = run_loop(backbone, prompts, settings, tmp_path / f"run{micro}")[0]
        norms.append(row["grad_norm"])
        logged.append([row[name] for name in ("kl", "entropy", "clip", "reward", "completion_tokens")])
        assert len(calls) == {1: 3, 8: 1}[micro]
    assert norms[0] > 0 and math.isclose(*norms, rel_tol=1e-4)
    assert np.allclose(*logged, rtol=1e-4)


def test_a_second_update_keeps_the_old_policy_and_reuses_the_rollout(backbone, ladder_data, monkeypatch, tmp_path):
    settings = settings_of(mu=2, micro_batch=4, warmup=0.0)
    with_adapter(backbone, settings)
    monkeypatch.setattr(stage3_grpo, "rewards", paid([1, 0, 0], [0, 1, 0]))
    sampled = spy(monkeypatch, stage3_grpo.common, "branch_generate")
    losses = spy(monkeypatch, stage3_grpo, "grpo_loss")
    run_loop(backbone, scene_prompts(backbone, ladder_data), settings, tmp_path / "run")
    assert len(sampled) == 1
    first, second = (call.args for call in losses)
    assert torch.equal(first[0], first[1]) and torch.equal(second[1], first[1]) and torch.equal(second[2], first[2])
    assert not torch.equal(second[0], second[1])


def test_overlong_completions_leave_the_loss_when_asked(backbone, ladder_data, monkeypatch, tmp_path):
    settings = settings_of(mask_overlong=True, max_new_tokens=4, loss_average="token")
    with_adapter(backbone, settings)
    stop = backbone.stop[0]
    sampled = [[[50, 51, 52, 53], [50, 51, stop], [60, stop]], [[50, 51, 52, 53]] * 3]
    monkeypatch.setattr(stage3_grpo.common, "branch_generate", lambda *args: sampled)
    monkeypatch.setattr(stage3_grpo, "rewards", paid([1, 0, 0], [0, 1, 0]))
    losses = spy(monkeypatch, stage3_grpo, "grpo_loss")
    row = run_loop(backbone, scene_prompts(backbone, ladder_data), settings, tmp_path / "run")[0]
    assert len(losses) == 1  # of the second group nothing is left
    mask, sequences, tokens = losses[0].args[4], losses[0].args[6], losses[0].args[7]
    assert mask.sum(1).tolist() == [0, 3, 2] and (sequences, tokens) == (2, 5)
    assert math.isclose(row["cut"], 4 / 6) and math.isclose(row["completion_tokens"], (4 + 3 + 2 + 12) / 6)


def test_sampling_runs_in_eval_mode_and_the_update_in_train_mode(backbone, ladder_data, monkeypatch, tmp_path):
    settings = settings_of(checkpointing=True)
    with_adapter(backbone, settings)
    modes = []

    def note(module, args, out):
        modes.append((backbone.model.training, torch.is_grad_enabled()))

    common.unwrap(backbone.model).lm_head.register_forward_hook(note)
    monkeypatch.setattr(stage3_grpo, "rewards", paid([1, 0, 0], [0, 1, 0]))
    run_loop(backbone, scene_prompts(backbone, ladder_data), settings, tmp_path / "run")
    sampling = modes.count((False, False))
    assert sampling > 0 and modes[:sampling] == [(False, False)] * sampling
    assert set(modes[sampling:]) == {(True, False), (True, True)}  # the reference, then the policy


def test_one_completion_a_question_has_nothing_to_compare_with():
    with pytest.raises(SystemExit, match="--group_size 1"):
        stage3_grpo.check(settings_of(group_size=1))


def test_full_tuning_has_no_reference_to_switch_to():
    with pytest.raises(SystemExit, match="--tune full"):
        stage3_grpo.check(settings_of(tune="full", beta=0.1))


def test_a_third_reward_term_is_added_and_logged_by_its_name(backbone, ladder_data, monkeypatch, tmp_path):
    """Its weight decides: the shortest completion of each group wins."""
    settings = settings_of(beta=0.0)
    with_adapter(backbone, settings)
    original = stage3_grpo.rewards

    def shorter(texts, examples, settings):
        return original(texts, examples, settings) | {"length": np.array([-float(len(text)) for text in texts])}

    monkeypatch.setattr(stage3_grpo, "rewards", shorter)
    losses = spy(monkeypatch, stage3_grpo, "grpo_loss")
    row = run_loop(backbone, scene_prompts(backbone, ladder_data), settings, tmp_path / "run")[0]
    assert math.isclose(row["reward"], row["format"] + row["accuracy"] + row["length"], rel_tol=1e-5) and row["length"] < 0
    sample = common.read_jsonl(tmp_path / "run" / "samples.jsonl")[0]
    assert sample["length"] == -float(len(sample["text"])) and {"format", "accuracy", "advantage"} <= set(sample)
    assert losses and (tmp_path / "run" / "curves.png").is_file()


def test_types_restrict_grpo_and_not_the_cold_start(tiny_model, ladder_data, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(stage3_grpo, "cold_packs", lambda settings, backbone: seen.append(settings.types) or [])
    settings = settings_of(model=str(tiny_model), data=str(ladder_data), out=str(tmp_path / "stage3"), types=["object size"])
    with pytest.raises(SystemExit, match="nothing to learn"):
        stage3_grpo.cold_start(settings)
    assert seen == [[]]


def test_types_all_overrides_the_types_of_the_preset():
    def types(*argv):
        return runs.parse_settings(stage3_grpo.GRPOSettings, stage3_grpo.PRESETS, "stage3", "stage2", argv=list(argv)).types

    assert types() == ["relative direction", "relative distance"] and types("--types", "all") == []
    assert types("--preset", "3b") == [] and types("--types", "object size") == ["object size"]
