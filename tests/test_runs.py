"""Order of the data, schedule, label masks, what is trained and saved, checkpoints."""

import json
import math
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

import common
import stage1_localize
import stage2_understand
import stage3_grpo
from support import files, runs
from support.runs import TrainSettings

QUESTION, ANSWER = "Is the chair left or right?", "<think>The chair is at 12, 34.</think><answer>B</answer>"


def make_settings(tmp_path, **changed):
    return TrainSettings(**{"model": "m", "data": "d", "out": str(tmp_path / "run"), "load": "fp32"} | changed)


@pytest.fixture
def scenes(ladder_data):
    """A picture with its questions, and a video with its questions."""
    groups = common.group_scenes(common.read_examples(ladder_data, "spatial"))
    return [groups[0], groups[-1]]


def pairs(backbone, count):
    """`count` branches for each of two scenes."""
    encode = lambda text: list(common.encode_text(backbone.tokenizer, text))  # noqa: E731
    words = encode(QUESTION + common.BRANCH_END)
    return [[(words, encode(f"{n} {ANSWER}{common.STOP}")) for n in range(count)] for _ in range(2)]


def loss_of(backbone, scenes, branches):
    logps, _, mask = common.branch_logprobs(backbone, common.encode_scenes(backbone, scenes), branches)
    return -logps.sum() / mask.sum()


@torch.no_grad()
def scores_of(backbone, scenes, branches):
    return common.branch_logprobs(backbone, common.encode_scenes(backbone, scenes), branches)[0]


def train_a_little(backbone, scenes, settings, steps=2, optimizers=None):
    """A few optimiser steps; returns the optimizers."""
    optimizers = optimizers or runs.make_optimizers(backbone.model, settings)
    for step in range(steps):
        loss_of(backbone, scenes, pairs(backbone, 2)[: len(scenes)]).backward()
        runs.optimizer_step(backbone.model, optimizers, settings, step, 10)
    return optimizers


# ------------------------------------------------------------------------------------------------
# Order and schedule
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items,count", [(10, 5), (10, 3), (7, 16), (1, 4)])
def test_every_item_comes_once_in_each_pass(items, count):
    """Also where a pass ends in the middle of a step, and where a step is longer than a pass."""
    passes = 6
    stream = []
    for step in range(math.ceil(passes * items / count)):
        batch = common.batch_at(list(range(items)), step, count, seed=3)
        assert len(batch) == count
        stream += batch
    for start in range(0, passes * items, items):
        assert sorted(stream[start : start + items]) == list(range(items))


def test_the_order_differs_between_seeds_and_passes_and_repeats_for_the_same():
    def order(seed, step):
        return common.batch_at(list(range(50)), step, 50, seed)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, step)) for seed in range(3) for step in range(3)}) == 9


def test_packs_hold_every_pair_once_and_at_most_so_many_branches(backbone, scenes):
    packs = common.make_packs(backbone.tokenizer, scenes, 3, seed=0)
    assert max(len(pack.pairs) for pack in packs) == 3
    found = Counter((id(pack.scene), tuple(map(tuple, pair))) for pack in packs for pair in pack.pairs)
    pairs = [(scene, common.training_pair(example)) for scene in scenes for example in scene.examples]
    assert found == Counter((id(s), tuple(common.encode_text(backbone.tokenizer, text) for text in pair)) for s, pair in pairs)


def rates(settings, steps):
    """The rate of each step, seen also in how far plain SGD moves a lone weight."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
    out = []
    for step in range(steps):
        before = model.weight.item()
        model.weight.grad = torch.full((1, 1), 0.5)
        runs.optimizer_step(model, [optimizer], settings, step, steps)
        assert before - model.weight.item() == pytest.approx(0.5 * optimizer.param_groups[0]["lr"], rel=1e-4)
        assert model.weight.grad is None
        out.append(optimizer.param_groups[0]["lr"])
    return out


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine(tmp_path):
    """Ten steps, four of them rising: quarters, then the cosine from one over six steps towards zero."""
    half = math.sqrt(3) / 2
    wanted = [0.25, 0.5, 0.75, 1, 1, (1 + half) / 2, 0.75, 0.5, 0.25, (1 - half) / 2]
    assert rates(make_settings(tmp_path, lr=0.2, warmup=0.4), 10) == pytest.approx([0.2 * x for x in wanted])


def test_without_warmup_the_first_step_has_the_whole_rate(tmp_path):
    assert rates(make_settings(tmp_path, lr=1.0, warmup=0.0), 4) == pytest.approx([1, 1, 0.75, 0.25])


def test_a_single_step_has_the_whole_rate(tmp_path):
    assert rates(make_settings(tmp_path, lr=1.0), 1) == [1.0]


def test_gradients_are_clipped_to_the_norm_of_the_settings(tmp_path):
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[30.0, 40.0]])
    norm = runs.optimizer_step(model, [optimizer], make_settings(tmp_path, lr=1.0, warmup=0, clip=2.0), 0, 10)
    assert norm == pytest.approx(50)  # as it was
    torch.testing.assert_close(before - model.weight.detach(), torch.tensor([[1.2, 1.6]]))


def test_muon_takes_the_matrices_of_the_layers_at_its_own_rate(backbone, scenes, tmp_path):
    settings = make_settings(tmp_path, tune="full", optimizer="muon", lr=1e-3, muon_lr=0.02, warmup=0.0)
    common.adapt(backbone, settings)
    muon, adamw = train_a_little(backbone, scenes, settings, steps=1)
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.02, 1e-3)
    names = {id(p): name for name, p in backbone.model.named_parameters()}
    matrices = [names[id(p)] for p in muon.param_groups[0]["params"]]
    rest = [names[id(p)] for p in adamw.param_groups[0]["params"]]
    assert len(matrices) == 4 * 7 and all("language_model.layers" in name for name in matrices)
    assert sorted(matrices + rest) == sorted(name for name, p in backbone.model.named_parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------
# Held-out scenes
# ------------------------------------------------------------------------------------------------

KINDS = ["spatial", "locate", "coldstart"]


def split_data(root, ladder_data, rooms):
    """A data folder whose files have one row a room and kind, each with a picture of its own."""
    for kind in KINDS:
        (row, *_) = common.read_jsonl(ladder_data / common.FILES[kind])
        with (root / common.FILES[kind]).open("w") as file:
            for room in rooms:
                (root / "images" / room).mkdir(parents=True, exist_ok=True)
                shutil.copy(ladder_data / "images" / row["image"][0], root / "images" / room / f"{kind}.jpg")
                file.write(json.dumps(row | {"image": [f"{room}/{kind}.jpg"]}) + "\n")


def rooms_of(scenes):
    return {Path(path).parent.name for scene in scenes for path in scene.images}


@pytest.mark.parametrize("seed", range(2))
def test_no_room_is_trained_on_and_scored(backbone, ladder_data, tmp_path, seed, capsys):
    """60 scans of 50 rooms: ten rooms were scanned twice. In every kind of rows the same room is held out, with both scans."""
    scans = [f"scene{n:04d}_00" for n in range(50)] + [f"scene{n:04d}_01" for n in range(10)]
    split_data(tmp_path, ladder_data, scans)
    settings = make_settings(tmp_path, data=str(tmp_path), seed=seed)
    held_out = [rooms_of(runs.held_out_scenes(settings, [kind], backbone)) for kind in KINDS]
    assert held_out[0] == held_out[1] == held_out[2] and len({scan[:9] for scan in held_out[0]}) == 1
    for kinds in ([kind] for kind in KINDS):
        trained = rooms_of(runs.training_scenes(settings, kinds, backbone))
        assert not {scan[:9] for scan in trained} & {scan[:9] for scan in held_out[0]}
        assert trained | held_out[0] == set(scans)
    text = f"{60 - len(held_out[0])} training scenes; left out: {len(held_out[0])} scenes of 1 held-out rooms"
    assert text in capsys.readouterr().err


def test_every_seed_holds_out_the_same_rooms(ladder_data, tmp_path):
    """Otherwise stage 3 with another seed would be scored on rooms that stage 2 was trained on."""
    split_data(tmp_path, ladder_data, [f"scene{n:04d}_00" for n in range(100)])
    chosen = [runs.held_out_rooms(make_settings(tmp_path, data=str(tmp_path), seed=seed)) for seed in range(5)]
    assert len(chosen[0]) == 2 and all(rooms == chosen[0] for rooms in chosen)


@pytest.mark.parametrize("folder", [False, True], ids=["drawn", "heldout folder"])
def test_what_any_stage_scores_is_in_no_pack_of_any_stage(tiny_model, ladder_data, tmp_path, monkeypatch, folder):
    """The stages' own work, with the training replaced: what they would learn from and score. With a heldout/ folder one of its
    rooms is among the training rows, too."""
    scans = [f"scene{n:04d}_0{n % 2}" for n in range(12)]
    split_data(tmp_path, ladder_data, scans)
    if folder:
        (tmp_path / "heldout").mkdir()
        split_data(tmp_path / "heldout", ladder_data, ["scene0003_00", "scene0100_00"])
        (tmp_path / "heldout" / common.FILES["coldstart"]).write_text("")  # as the toy has it: traces are not scored
    learnt, scored = set(), set()

    def note(backbone, packs, *held_out):  # and settings and run; stage 3 has pairs (scene, example) for packs
        learnt.update(rooms_of(pack[0] if isinstance(pack, tuple) else pack.scene for pack in packs))
        scored.update(*map(rooms_of, held_out[:-2]))

    def cold(backbone, packs, probe, *_):  # its probe has training scenes
        learnt.update(rooms_of(pack.scene for pack in packs) | rooms_of(probe))

    monkeypatch.setattr(stage1_localize, "train", note)
    monkeypatch.setattr(stage2_understand, "train", note)
    monkeypatch.setattr(stage3_grpo, "train_cold_start", cold)
    monkeypatch.setattr(stage3_grpo, "grpo", note)
    monkeypatch.setattr(runs.Run, "finish", lambda *_: None)
    load = common.load_backbone
    monkeypatch.setattr(common, "load_backbone", lambda path, *args: load(tiny_model, *args))
    same = {"data": str(tmp_path), "model": str(tiny_model), "load": "fp32"}
    for seed, (module, cls, more) in enumerate((
        (stage1_localize, stage1_localize.LocalizeSettings, {}),
        (stage2_understand, stage2_understand.UnderstandSettings, {"replay": 1.0}),
        (stage3_grpo, stage3_grpo.GRPOSettings, {"locate": 0.25, "cold_mix": 2.0}),
    )):  # fmt: skip
        module.work(cls(**same, **more, seed=seed, out=str(tmp_path / f"run{seed}" / "stage")))
    assert len(learnt) > 6 and scored and not {scan[:9] for scan in learnt} & {scan[:9] for scan in scored}
    assert not folder or scored == {"scene0003_00", "scene0100_00"}


@pytest.fixture
def typed(ladder_data, tmp_path):
    """ladder_data with a question_type in its cold-start rows, as the toy has them."""
    shutil.copytree(ladder_data, tmp_path, dirs_exist_ok=True)
    path = tmp_path / common.FILES["coldstart"]
    rows = common.read_jsonl(path)
    lines = [json.dumps(row | {"question_type": kind}) for row, kind in zip(rows, ["object size", "room size"] * 2)]
    path.write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("kinds", [["spatial", "locate", "coldstart"], ["locate", "coldstart", "spatial"]])
def test_with_types_only_those_are_trained_on_beside_localisation(backbone, typed, kinds):
    found = Counter()
    for types in ([], ["room size", "object size"]):
        settings = stage2_understand.UnderstandSettings(data=str(typed), eval_scenes=0, types=types)
        scenes = runs.training_scenes(settings, kinds, backbone)
        found[bool(types)] = Counter(example.question_type for scene in scenes for example in scene.examples)
    assert found[True] == {"object size": 2, "room size": 1, "locate": 6, "coldstart": 4}
    assert found[False]["relative direction"] == 3 and found[False].total() == 24
    settings.types = ["object size"]
    scenes = runs.training_scenes(settings, ["coldstart"], backbone)
    assert sum(len(scene.examples) for scene in scenes) == 2


def test_types_need_a_question_type_and_rows(typed):
    path = typed / common.FILES["coldstart"]
    with pytest.raises(SystemExit, match=r"spld_spatial_data.jsonl has no rows of --types obj size. It has absolute distance,"):
        common.read_examples(typed, "spatial", ["obj size", "room size"])
    assert len(common.read_examples(typed, "coldstart", ["object count", "room size"])) == 2  # not all types have traces
    with pytest.raises(SystemExit, match=r"spld_coldstart_data.jsonl has no rows of --types object count. It has object size,"):
        common.read_examples(typed, "coldstart", ["object count"])
    for wrong in (None, ["room size"]):
        rows = common.read_jsonl(path)
        rows[2]["question_type"] = wrong
        path.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(SystemExit, match=r"spld_coldstart_data.jsonl row 3 \(question_id 2\): it has no question_type"):
            common.read_examples(typed, "coldstart", ["room size"])
        assert len(common.read_examples(typed, "coldstart")) == 4


def test_a_data_folder_may_be_called_heldout(backbone, ladder_data, tmp_path):
    (tmp_path / "heldout").mkdir()
    split_data(tmp_path / "heldout", ladder_data, [f"scene{n:04d}_00" for n in range(9)])
    settings = make_settings(tmp_path, data=str(tmp_path / "heldout"))
    assert len(runs.held_out_rooms(settings)) == 1
    assert len(rooms_of(runs.training_scenes(settings, ["spatial"], backbone))) == 8


def test_with_eval_scenes_0_all_is_trained_on_and_nothing_scored(backbone, ladder_data, tmp_path):
    settings = make_settings(tmp_path, data=str(ladder_data), eval_scenes=0)
    assert runs.held_out_scenes(settings, ["spatial"], backbone) == []
    assert len(runs.training_scenes(settings, ["spatial"], backbone)) == 4


def test_a_heldout_folder_is_scored_and_all_other_rooms_are_trained_on(backbone, ladder_data, tmp_path):
    scans = [f"scene{n:04d}_00" for n in range(9)]
    split_data(tmp_path, ladder_data, scans)
    (tmp_path / "heldout").mkdir()
    split_data(tmp_path / "heldout", ladder_data, ["scene0100_00", "scene0101_00"])
    settings = make_settings(tmp_path, data=str(tmp_path), eval_scenes=5)
    assert rooms_of(runs.training_scenes(settings, KINDS, backbone)) == set(scans)
    assert rooms_of(runs.held_out_scenes(settings, ["locate"], backbone)) == {"scene0100_00", "scene0101_00"}
    assert len(runs.held_out_scenes(make_settings(tmp_path, data=str(tmp_path), eval_scenes=1), KINDS, backbone)) == 1


def test_one_room_alone_is_trained_on(backbone, ladder_data, tmp_path):
    split_data(tmp_path, ladder_data, ["scene0001_00", "scene0001_01"])
    settings = make_settings(tmp_path, data=str(tmp_path))
    assert runs.held_out_scenes(settings, KINDS, backbone) == []
    assert len(rooms_of(runs.training_scenes(settings, KINDS, backbone))) == 2


@pytest.mark.parametrize("path,room", [
    ("a/images/scene0011_00/20.jpg", "scene0011"), ("a/images/kitchen/20.jpg", "kitchen"), ("a/images/20.jpg", "20"),
    ("a/images/scene0011_01.mp4", "scene0011"),
])  # fmt: skip
def test_the_room_of_a_picture(path, room):
    assert runs.room_of(path) == room


# ------------------------------------------------------------------------------------------------
# Label mask
# ------------------------------------------------------------------------------------------------


def test_only_completion_tokens_are_counted_and_padding_is_zero(backbone, scenes):
    encode = lambda text: list(common.encode_text(backbone.tokenizer, text))  # noqa: E731
    branches = [
        [(encode(QUESTION), encode("B" + common.STOP)), (encode("Why?"), encode(ANSWER + common.STOP))],
        [(encode(QUESTION * 3), encode("12" + common.STOP))],
    ]
    logps, _, mask = common.branch_logprobs(backbone, common.encode_scenes(backbone, scenes), branches)
    lengths = [len(completion) for group in branches for _, completion in group]
    assert mask.sum(1).tolist() == lengths == [2, len(encode(ANSWER)) + 1, 3]
    assert logps.shape == mask.shape == (3, max(lengths))
    assert (logps[mask] < 0).all() and (logps[~mask] == 0).all()


def test_the_head_sees_completion_tokens_only(backbone, scenes):
    rows = []
    backbone.model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    branches = pairs(backbone, 3)
    loss_of(backbone, scenes, branches)
    assert sum(rows) == sum(len(completion) for group in branches for _, completion in group)


def test_loss_and_gradients_equal_those_of_the_model_with_masked_labels(backbone, scenes):
    """Labels of -100 over system words, pictures, question and the opening of the answer: transformers' own loss."""
    scene, ((prompt, completion),) = scenes[0], pairs(backbone, 1)[0]
    loss = loss_of(backbone, [scene], [[(prompt, completion)]])
    loss.backward()
    got = {name: p.grad.clone() for name, p in backbone.model.named_parameters()}
    (prefix,) = common.encode_scenes(backbone, [scene])
    pixels, grids = common.picture_patches(backbone.processor, [common.load_image(path) for path in scene.images])
    ids = torch.tensor([prefix.ids.tolist() + prompt + completion])
    labels = ids.clone()
    labels[0, : -len(completion)] = -100
    backbone.model.zero_grad()
    backbone.model.set_attn_implementation("eager")
    wanted = backbone.model(
        input_ids=ids, labels=labels, pixel_values=pixels, image_grid_thw=grids,
        mm_token_type_ids=(ids == backbone.model.config.image_token_id).int(),
    ).loss  # fmt: skip
    wanted.backward()
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=0)
    for name, parameter in backbone.model.named_parameters():
        assert (got[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


def test_pieces_of_a_conversation_encode_as_the_whole(backbone, scenes):
    tokenizer = backbone.tokenizer
    completions = ["B", "0.7", "116", ANSWER, '[{"bbox_2d":[1,2,33,44],"label":"chair"}]',
    '[{"label":"a","bbox_2d":[1,2,3,4]}]']
    for scene in scenes:
        (prefix,) = common.encode_scenes(backbone, [scene])
        pixels, grids = common.picture_patches(
            backbone.processor, [common.load_image(path) for path in scene.images], scene.data_type == "video"
        )
        pad = {"single_image": "<|image_pad|>", "video": "<|video_pad|>"}[scene.data_type] * (len(pixels) // 4)
        for example, completion in zip(scene.examples * 2, completions):
            for mode in common.INSTRUCTIONS:
                question = common.prompt_text(example, mode)
                pieces = [*prefix.ids.tolist()]
                pieces += common.encode_text(tokenizer, question + common.BRANCH_END)
                pieces += common.encode_text(tokenizer, completion + common.STOP)
                whole = (
                    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                    f"<|im_start|>user\n<|vision_start|>{pad}<|vision_end|>{question}<|im_end|>\n"
                    f"<|im_start|>assistant\n{completion}<|im_end|>"
                )
                assert pieces == tokenizer(whole, add_special_tokens=False)["input_ids"]
                assert tokenizer.decode(pieces) == whole


# ------------------------------------------------------------------------------------------------
# What is trained, and what is saved
# ------------------------------------------------------------------------------------------------


def test_lora_adapts_the_language_model_only_and_says_how_much(backbone, tmp_path, capsys):
    common.adapt(backbone, make_settings(tmp_path, lora_rank=4))
    adapted = [name for name, module in backbone.model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 4 * 7  # layers, projections
    assert all("language_model.layers" in name and "visual" not in name for name in adapted)
    trained = {name: p.numel() for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    sizes = [(128, 128), (128, 64), (128, 64), (128, 128), (128, 384), (128, 384), (384, 128)]  # q k v o gate up down
    assert sum(trained.values()) == 4 * 4 * sum(a + b for a, b in sizes)
    said = capsys.readouterr().err
    assert "28 LoRA modules" in said and f"{sum(trained.values()):,}" in said


def test_full_tuning_leaves_the_vision_tower_frozen(backbone, scenes, tmp_path, capsys):
    common.adapt(backbone, make_settings(tmp_path, tune="full"))
    frozen = {name for name, p in backbone.model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in backbone.model.named_parameters() if "visual" in name} != set()
    assert "LoRA" not in capsys.readouterr().err
    backbone.model.train()
    assert all(not prefix.features.requires_grad for prefix in common.encode_scenes(backbone, scenes))
    loss_of(backbone, scenes, pairs(backbone, 1)).backward()
    for name, parameter in backbone.model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name


def test_the_vision_tower_learns_where_asked_to(backbone, scenes, tmp_path):
    common.adapt(backbone, make_settings(tmp_path, tune="full", train_vision=True))
    assert all(prefix.features.requires_grad for prefix in common.encode_scenes(backbone, scenes))
    loss_of(backbone, scenes, pairs(backbone, 1)).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in backbone.model.model.visual.parameters())


def test_kept_features_are_computed_once_and_are_the_same(backbone, scenes, tmp_path):
    common.adapt(backbone, make_settings(tmp_path))
    fresh = common.encode_scenes(backbone, scenes)
    kept = common.encode_scenes(backbone, scenes, keep=True)
    backbone.model.get_base_model().model.visual.forward = None  # must not be called again
    again = common.encode_scenes(backbone, scenes)
    for one, two, three in zip(fresh, kept, again):
        assert torch.equal(one.features, two.features) and two is three
    for scene in scenes:
        scene.encoded = None


def fill_lora(backbone):
    """An adapter that does something: lora_B starts at zero."""
    torch.manual_seed(1)
    for name, parameter in backbone.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def test_a_saved_model_gives_the_log_probabilities_of_its_adapter(backbone, scenes, tiny_model, tmp_path):
    branches = pairs(backbone, 2)
    base = scores_of(backbone, scenes, branches)
    common.adapt(backbone, make_settings(tmp_path, lora_rank=4))
    assert torch.equal(scores_of(backbone, scenes, branches), base)  # a new adapter changes nothing
    fill_lora(backbone)
    adapted = scores_of(backbone, scenes, branches)
    assert (adapted - base).abs().max() > 0.1
    files.save_model(backbone, tmp_path)
    saved = common.load_backbone(tmp_path / "model", "fp32")
    torch.testing.assert_close(scores_of(saved, scenes, branches), adapted, atol=1e-5, rtol=0)
    assert not any("lora" in name for name, _ in saved.model.named_parameters())

    plain, ids = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "model"), torch.arange(10, 30)[None]
    saved.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(plain(input_ids=ids).logits, saved.model(input_ids=ids).logits, atol=1e-5, rtol=0)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert common.encode_text(saved.tokenizer, ANSWER) == common.encode_text(backbone.tokenizer, ANSWER)
    assert saved.processor.size == backbone.processor.size


def test_a_fully_tuned_model_is_saved_as_it_is(backbone, scenes, tmp_path):
    settings = make_settings(tmp_path, tune="full", lr=1e-2)
    base = scores_of(backbone, scenes, pairs(backbone, 2))
    common.adapt(backbone, settings)
    train_a_little(backbone, scenes, settings)
    trained = scores_of(backbone, scenes, pairs(backbone, 2))
    assert (trained - base).abs().max() > 0.1
    files.save_model(backbone, tmp_path)
    saved = common.load_backbone(tmp_path / "model", "fp32")
    torch.testing.assert_close(scores_of(saved, scenes, pairs(saved, 2)), trained, atol=1e-5, rtol=0)


def test_pixel_limits_of_a_run_are_saved_with_its_model(tiny_model, tmp_path):
    files.save_model(common.load_backbone(tiny_model, "fp32", min_picture_tokens=1, max_picture_tokens=9), tmp_path)
    saved = common.load_backbone(tmp_path / "model", "fp32")
    assert common.resized_size(saved.processor, 1000, 1000) == (84, 84)
    assert common.resized_size(saved.processor, 28, 28) == (28, 28)


def test_a_folder_without_a_model_is_named(tmp_path, tiny_model):
    with pytest.raises(SystemExit, match="nowhere"):
        common.load_backbone(tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    with pytest.raises(SystemExit, match="half"):
        common.load_backbone(tmp_path / "half")


# ------------------------------------------------------------------------------------------------
# 4-bit
# ------------------------------------------------------------------------------------------------


def test_a_4bit_model_still_learns_after_a_rollout(tiny_model, scenes, tmp_path):
    """An eval forward may repack the 4-bit weights of a CPU, after which gradients vanish without an error."""
    backbone = common.load_backbone(tiny_model, "4bit")
    common.adapt(backbone, make_settings(tmp_path, load="4bit", lora_rank=4))
    layer = common.unwrap(backbone.model).model.language_model.layers[0]
    assert type(layer.self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    assert {p.dtype for p in common.unwrap(backbone.model).model.visual.parameters()} == {torch.bfloat16}
    fill_lora(backbone)  # so that lora_A has gradients too
    branches = pairs(backbone, 2)
    with torch.no_grad():
        prefixes = common.encode_scenes(backbone, scenes)
    backbone.model.train()
    common.branch_generate(backbone, prefixes, [[prompt for prompt, _ in group] for group in branches], 4, 1.0)
    loss_of(backbone, scenes, branches).backward()
    trained = {name: p.grad for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 28
    for name, grad in trained.items():
        assert grad is not None and grad.isfinite().all() and grad.norm() > 0, name


def test_a_4bit_model_is_merged_into_bf16_weights(tiny_model, scenes, tmp_path):
    """Equal to the same adapter merged into the bf16 model, and not into what 4 bits left of it."""
    backbone = common.load_backbone(tiny_model, "4bit")
    common.adapt(backbone, make_settings(tmp_path, load="4bit", lora_rank=4))
    fill_lora(backbone)
    delta = {}
    for name, module in backbone.model.named_modules():
        if hasattr(module, "lora_A"):
            key = name.removeprefix("base_model.model.") + ".weight"
            low, high = module.lora_A["default"].weight, module.lora_B["default"].weight
            delta[key] = (high @ low).detach() * (32 / 4)  # alpha / rank
    files.save_model(backbone, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    for path in (tmp_path / "model").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    saved, plain = common.load_backbone(tmp_path / "model", "bf16"), common.load_backbone(tiny_model, "bf16")
    weights = dict(plain.model.named_parameters())
    for name, parameter in saved.model.named_parameters():
        wanted = weights[name].float() + delta.get(name, 0)
        torch.testing.assert_close(parameter.float(), wanted, atol=2e-3, rtol=1e-2)
    assert len(delta) == 28 and all(value.abs().max() > 0.05 for value in delta.values())
    assert scores_of(saved, scenes, pairs(saved, 1)).isfinite().all()


@pytest.mark.parametrize("shard", [10**9, 400_000])
def test_a_4bit_models_merge_gives_the_logits_of_its_adapter_on_the_stored_model(tiny_model, tmp_path, monkeypatch, shard):
    """peft's own forward pass in float32 on the stored bf16 weights; the base, too, is in several files."""
    base = common.load_backbone(tiny_model, "bf16")
    for part in (base.model, base.tokenizer, base.processor):
        part.save_pretrained(tmp_path / "base", **{"max_shard_size": "1MB"} if part is base.model else {})
    monkeypatch.setattr(files, "SHARD", shard)
    backbone = common.load_backbone(tmp_path / "base", "4bit")
    common.adapt(backbone, make_settings(tmp_path, load="4bit", lora_rank=4))
    fill_lora(backbone)
    files.save_model(backbone, tmp_path)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (shard < 10**9)

    def logits(folder, adapter=None):
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapter) if adapter else model
        return model(input_ids=torch.arange(40)[None]).logits.detach()

    plain, wanted, found = logits(tmp_path / "base"), logits(tmp_path / "base", tmp_path / "adapter"), logits(tmp_path / "model")
    assert (found - wanted).norm() < 0.01 * (wanted - plain).norm()
    told = json.loads((tmp_path / "model" / "config.json").read_text())
    stored = json.loads((tmp_path / "base" / "config.json").read_text())
    older = [told["text_config"].pop(name) for name in ("rope_theta", "rope_scaling")]  # for transformers 4.57, see files.py
    rope = stored["text_config"]["rope_parameters"]
    assert told == stored and {"rope_theta": older[0]} | older[1] == rope


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [
    {"lora_rank": 4}, {"tune": "full"}, {"tune": "full", "optimizer": "muon"}, {"tune": "full", "load": "bf16", "lr": 1e-5},
    {"tune": "full", "load": "bf16", "optimizer": "muon", "muon_lr": 1e-5},
], ids=str)  # fmt: skip
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tiny_model, scenes, tmp_path, changed):
    settings = make_settings(tmp_path, **changed)
    run = runs.Run(settings, {})
    assert run.first == 0
    scenes = scenes[:1] if settings.load == "bf16" else scenes  # slow without bf16 instructions
    torch.manual_seed(0)
    first = common.load_backbone(tiny_model, settings.load)
    common.adapt(first, settings)
    optimizers = train_a_little(first, scenes, settings)
    run.save(2, first, optimizers)
    train_a_little(first, scenes, settings, optimizers=optimizers)

    torch.manual_seed(1)  # another adapter before loading
    second = common.load_backbone(tiny_model, settings.load)
    common.adapt(second, settings)
    optimizers = runs.make_optimizers(second.model, settings)
    run = runs.Run(settings, {})
    assert run.first == 2
    run.restore(second, optimizers)
    assert all(optimizer.state_dict()["state"] for optimizer in optimizers)
    train_a_little(second, scenes, settings, optimizers=optimizers)
    for (name, wanted), (_, got) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(wanted, got) and torch.equal(runs.master(wanted), runs.master(got)), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_full_tuning_in_bf16_moves_every_weight_that_has_a_gradient(tiny_model, scenes, tmp_path, optimizer):
    """At the paper's rate an update is far below bf16's precision: only 16 % of the weights moved in 60 steps. What is learnt is
    what the same optimizer makes of float32 weights and the same gradients."""
    settings = make_settings(
        tmp_path, tune="full", load="bf16", optimizer=optimizer, lr=1e-5, muon_lr=1e-5, warmup=0.0, clip=1e9
    )
    backbone = common.load_backbone(tiny_model, "bf16")
    common.adapt(backbone, settings)
    trained = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    weights = {name: torch.nn.Parameter(p.detach().float()) for name, p in trained.items()}
    optimizers, plain = runs.make_optimizers(backbone.model, settings), runs.OPTIMIZERS[optimizer](weights.items(), settings)
    start = {name: p.detach().clone() for name, p in weights.items()}
    loss_of(backbone, scenes[:1], pairs(backbone, 1)[:1]).backward()
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    for step in range(12):
        for name in trained:
            trained[name].grad, weights[name].grad = gradients[name].clone(), gradients[name].float()
        runs.optimizer_step(backbone.model, optimizers, settings, step, 1000)
        for one, other in zip(optimizers, plain):
            other.param_groups[0]["lr"] = one.param_groups[0]["lr"]
            other.step()
    for name, p in trained.items():
        torch.testing.assert_close(runs.master(p), weights[name].data, atol=1e-8, rtol=0)
        assert torch.equal(p, weights[name].bfloat16())  # what the model computes with
    moved = torch.cat([(runs.master(p) != start[name])[gradients[name] != 0] for name, p in trained.items()])
    assert moved.float().mean() > 0.99


@pytest.mark.parametrize("load", ["bf16", "4bit"])
def test_adapters_are_float32_and_need_no_copies(tiny_model, tmp_path, load):
    backbone = common.load_backbone(tiny_model, load)
    common.adapt(backbone, make_settings(tmp_path, load=load, lora_rank=2))
    runs.make_optimizers(backbone.model, make_settings(tmp_path))
    assert {p.dtype for p in backbone.model.parameters() if p.requires_grad} == {torch.float32}
    assert not any(hasattr(p, "master") for p in backbone.model.parameters())


def small_checkpoint(settings, step=3):
    """A run with a checkpoint of a model of one weight, `step`; and its backbone."""
    run = runs.Run(settings, {})
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, step)
    backbone = SimpleNamespace(model=model, device=torch.device("cpu"))
    run.save(step, backbone, [torch.optim.AdamW(model.parameters())])
    return run, backbone


def check_resumes(settings, step):
    """A new start of the run finds the checkpoint of `step`, with its weight."""
    run = runs.Run(settings, {})
    backbone = SimpleNamespace(model=torch.nn.Linear(1, 1, bias=False), device=torch.device("cpu"))
    assert run.first == step
    run.restore(backbone, [torch.optim.AdamW(backbone.model.parameters())])
    assert backbone.model.weight.item() == step
    return run


def test_a_new_checkpoint_takes_the_place_of_the_old_one(tmp_path):
    settings = make_settings(tmp_path)
    small_checkpoint(settings, 3)
    run, _ = small_checkpoint(settings, 6)
    assert sorted(path.name for path in run.folder.glob("checkpoint*")) == ["checkpoint.pt"]
    check_resumes(settings, 6)


@pytest.mark.parametrize("moment", ["save", "replace"])
def test_a_stop_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, moment):
    settings = make_settings(tmp_path)
    run, backbone = small_checkpoint(settings, 3)

    def stopping(*args):
        if moment == "save":
            Path(args[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(*(torch, "save") if moment == "save" else (Path, "replace"), stopping)
    with pytest.raises(KeyboardInterrupt):
        run.save(6, backbone, [torch.optim.AdamW(backbone.model.parameters())])
    monkeypatch.undo()
    check_resumes(settings, 3)
    small_checkpoint(settings, 4)  # what was left of the save is in nobody's way
    check_resumes(settings, 4)


@pytest.mark.parametrize("name,value",
[("lr", 0.5), ("seed", 7), ("tune", "full"), ("data", "elsewhere"), ("steps", 99)])
def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path, name, value):
    settings = make_settings(tmp_path)
    small_checkpoint(settings)
    with pytest.raises(SystemExit) as stopped:
        runs.Run(make_settings(tmp_path, **{name: value}), {})
    assert f"--{name} {getattr(settings, name)}" in str(stopped.value) and str(value) in str(stopped.value)
    check_resumes(settings, 3)  # and nothing was lost


def test_more_steps_may_be_asked_of_a_checkpoint(tmp_path):
    small_checkpoint(make_settings(tmp_path, max_steps=3))
    assert runs.Run(make_settings(tmp_path, max_steps=8, processes=1), {}).first == 3


def test_resume_never_starts_again_and_other_words_are_refused(tmp_path):
    run, _ = small_checkpoint(make_settings(tmp_path))
    assert runs.Run(make_settings(tmp_path, resume="never", lr=0.5), {}).first == 0
    assert not run.checkpoint.exists()
    with pytest.raises(SystemExit, match="sometimes"):
        runs.Run(make_settings(tmp_path, resume="sometimes"), {})


def test_another_runs_checkpoint_is_copied_and_continued(tmp_path):
    there, _ = small_checkpoint(make_settings(tmp_path / "one"))
    there.append("metrics.jsonl", {"step": 1, "loss": 0.5})
    settings = make_settings(tmp_path / "two", resume=str(there.folder))
    run = runs.Run(settings, {})
    assert run.folder != there.folder and run.first > 0 and there.checkpoint.is_file()
    assert [row["step"] for row in common.read_jsonl(run.folder / "metrics.jsonl")] == [1]
    assert run.checkpoint.read_bytes() == there.checkpoint.read_bytes()
    _, backbone = small_checkpoint(make_settings(tmp_path / "other"))
    run.save(run.first + 5, backbone, [])
    assert runs.Run(settings, {}).first == run.first + 5  # the same command again resumes from its own
    with pytest.raises(SystemExit, match="--lr"):
        runs.Run(make_settings(tmp_path / "three", resume=str(there.folder), lr=0.5), {})


def test_lines_logged_after_the_checkpoint_are_dropped(tmp_path):
    settings = make_settings(tmp_path)
    run, _ = small_checkpoint(settings, step=2)
    for step in (1, 2, 3, 4):
        run.append("metrics.jsonl", {"step": step})
    runs.Run(settings, {})
    assert [row["step"] for row in common.read_jsonl(run.folder / "metrics.jsonl")] == [1, 2]


def test_a_checkpoint_of_another_model_is_refused(backbone, tmp_path):
    run, _ = small_checkpoint(make_settings(tmp_path))
    with pytest.raises(SystemExit, match="another model"):
        runs.Run(make_settings(tmp_path), {}).restore(backbone, [])


def test_every_step_draws_its_own_numbers_and_again_the_same(tmp_path):
    def draw(seed, step):
        runs.seed_step(make_settings(tmp_path, seed=seed), step)
        return torch.rand(1).item()

    assert draw(0, 5) == draw(0, 5)
    assert len({draw(seed, step) for seed in range(4) for step in range(4)}) == 16


# ------------------------------------------------------------------------------------------------
# The loop of a run
# ------------------------------------------------------------------------------------------------


def walk(settings, planned, last=None):
    """Go through the steps of a run with a model of one weight, ending it at `last`. Returns the run and the steps done."""
    run, done = runs.Run(settings, {"loss": ["loss"]}), []
    backbone = SimpleNamespace(model=torch.nn.Linear(1, 1, bias=False), device=torch.device("cpu"))
    for step in run.steps(planned, backbone, [torch.optim.AdamW(backbone.model.parameters())]):
        done.append(step)
        run.log({"loss": 1.0 / (step + 1), "grad_norm": 1.0})
        if step == last:
            run.end()
    return run, done


def test_a_run_goes_through_all_its_steps_and_resumes_behind_the_last_checkpoint(tmp_path):
    assert walk(make_settings(tmp_path, max_steps=3, save_every=2), 5)[1] == [0, 1, 2]
    run, done = walk(make_settings(tmp_path, save_every=2), 5)
    assert done == [3, 4] and [row["step"] for row in common.read_jsonl(run.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_run_that_has_ended_itself_has_no_steps_left(tmp_path):
    assert walk(make_settings(tmp_path), 9, last=3)[1] == [0, 1, 2, 3]
    assert walk(make_settings(tmp_path), 9)[1] == []


def test_scores_are_asked_for_every_so_many_steps_and_at_the_end(tmp_path):
    run = runs.Run(make_settings(tmp_path, eval_every=3), {})
    run.last = 8
    found = []
    for run.step in range(8):
        found += [run.step] * run.is_eval_step()
    assert found == [2, 5, 7]


def test_a_finished_run_is_known_by_its_model_and_its_settings(tmp_path):
    settings = make_settings(tmp_path)
    run, _ = small_checkpoint(settings)
    assert not runs.is_finished(settings)
    (run.folder / "model").mkdir()
    (run.folder / "model" / "config.json").write_text("{}")
    assert not runs.is_finished(settings)  # without weights it is none
    (run.folder / "model" / "model.safetensors").write_bytes(b"")
    assert runs.is_finished(settings) and runs.is_finished(make_settings(tmp_path, processes=7))
    assert not runs.is_finished(make_settings(tmp_path, max_steps=9))  # it may have further steps to do
    assert not runs.is_finished(make_settings(tmp_path, resume="never"))
    with pytest.raises(SystemExit, match="was made with --lr 0.0001, not --lr 0.5"):
        runs.is_finished(make_settings(tmp_path, lr=0.5))  # also where its checkpoint was deleted to save space
    runs.Run(make_settings(tmp_path, max_steps=9), {})
    assert not (run.folder / "model").exists()  # no model is there while it trains


@pytest.fixture
def begun(tiny_model, ladder_data, tmp_path):
    """(settings, run) of a finished run from real files: a model and data of its own, under relative names."""
    shutil.copytree(tiny_model, tmp_path / "before")
    shutil.copytree(ladder_data, tmp_path / "data")
    settings = make_settings(tmp_path, model=str(tmp_path / "before"), data=str(tmp_path / "data"))
    run, _ = small_checkpoint(settings)
    shutil.copytree(tiny_model, run.folder / "model")
    assert runs.is_finished(settings)
    return settings, run


def append_row(folder):
    path = folder / "data" / common.FILES["spatial"]
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")


def change_letter(folder):
    path = folder / "data" / common.FILES["locate"]
    path.write_text(path.read_text().replace("chair", "stool", 1))


def change_weight(folder):
    weights = load_file(folder / "before" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] += 0.5
    save_file(weights, folder / "before" / "model.safetensors", {"format": "pt"})


CHANGES = {  # what is named: how it changes
    "a row more": (append_row, "data"), "another word of a row": (change_letter, "data"), "a weight": (change_weight, "before"),
    "a picture less": (lambda folder: next((folder / "data").glob("images/*/*.jpg")).unlink(), "data"),
    "a picture": (lambda folder: Image.new("RGB", (9, 9)).save(next((folder / "data").glob("images/*/*.jpg"))), "data"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_neither_finished_nor_resumed_when_what_it_started_from_has_changed(begun, tmp_path, name):
    settings, run = begun
    change, named = CHANGES[name]
    change(tmp_path)
    for call in (lambda: runs.is_finished(settings), lambda: runs.Run(settings, {})):
        with pytest.raises(SystemExit) as stopped:
            call()
        assert f"{tmp_path / named} changed" in str(stopped.value) and "--resume never" in str(stopped.value)
        assert str(run.folder) in str(stopped.value) and run.checkpoint.is_file() and common.has_model(run.folder / "model")
    again = replace(settings, resume="never")
    assert not runs.is_finished(again) and runs.Run(again, {}).first == 0


def test_folders_may_move_and_be_deleted(begun, tmp_path):
    settings, run = begun
    for name, other in (("before", "elsewhere"), ("data", "other data"), ("run", "runs 2")):
        shutil.move(tmp_path / name, tmp_path / other)
    moved = replace(settings, model=str(tmp_path / "elsewhere"), data=str(tmp_path / "other data"), out=str(tmp_path / "runs 2"))
    assert runs.is_finished(moved)
    shutil.rmtree(tmp_path / "elsewhere")  # the model of the stage before, for space: nothing says that it has changed
    assert runs.is_finished(replace(moved, model=settings.model))
    shutil.copytree(run.folder.with_name("runs 2") / "model", tmp_path / "elsewhere")
    check_resumes(moved, 3)


def test_of_a_large_file_pieces_are_compared_and_of_a_small_one_all(tmp_path):
    for size, places in ((200_000, (0, 99_999, 199_999)), (2**28, (0, 2**28 // 1000 * 500))):
        with (tmp_path / "x").open("wb") as file:
            file.truncate(size)
        found = {runs.digest([tmp_path / "x"])}
        for place in places:
            with (tmp_path / "x").open("r+b") as file:
                file.seek(place)
                file.write(b"a")
            found.add(runs.digest([tmp_path / "x"]))
        assert len(found) == 1 + len(places)
    assert runs.digest([tmp_path / "none"]) == ""


WRITES = [
    (PeftModel, "save_pretrained"), (Qwen2_5_VLForConditionalGeneration, "save_pretrained"),
    (Qwen2VLImageProcessorPil, "save_pretrained"), (Path, "replace"), (shutil, "rmtree"),
]  # fmt: skip


@pytest.mark.parametrize("owner, name", WRITES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_model_folder_is_whole_or_not_there_at_every_moment_of_its_writing(tiny_model, tmp_path, monkeypatch, owner, name):
    """Killed at every single call of what writes, renames or removes, with half of it done. There is an old model already."""
    settings = make_settings(tmp_path, model=str(tiny_model), lora_rank=2)
    backbone = common.load_backbone(tiny_model, "fp32")
    common.adapt(backbone, settings)
    run = runs.Run(settings, {})
    files.save_model(backbone, run.folder)
    fill_lora(backbone)
    real, calls = getattr(owner, name), []

    def killed(target, *args, **kwargs):
        calls.append(target)
        if len(calls) < moment:
            return real(target, *args, **kwargs)
        if name == "save_pretrained":  # some of its files
            Path(args[0]).mkdir(exist_ok=True)
            (Path(args[0]) / "config.json").write_text("{}")
            (Path(args[0]) / "adapter_config.json").write_text("{}")
        elif name == "rmtree" and Path(target).is_dir():
            for path in list(Path(target).glob("*"))[::2]:
                path.unlink()
        raise KeyboardInterrupt

    for moment in range(1, 12):  # noqa: B007 (read in killed)
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            try:
                files.save_model(backbone, run.folder)
                break
            except KeyboardInterrupt:
                pass
        if (run.folder / "model").exists():
            common.load_backbone(run.folder / "model", "fp32")
            assert runs.is_finished(settings)
        if (run.folder / "adapter").exists():
            assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()
            assert json.loads((run.folder / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert moment > 1
    files.save_model(backbone, run.folder)  # the same again goes on: what was left is in nobody's way
    saved = common.load_backbone(run.folder / "model", "fp32")
    ids = torch.arange(9)[None]
    torch.testing.assert_close(saved.model(input_ids=ids).logits, backbone.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert sorted(path.name for path in run.folder.iterdir() if path.is_dir()) == ["adapter", "model"]


def test_a_gradient_of_zeros_moves_nothing_though_there_is_momentum(tmp_path):
    model = torch.nn.Linear(3, 1, bias=False)
    settings = make_settings(tmp_path, lr=1e-2, warmup=0.0)
    optimizers = runs.make_optimizers(model, settings)
    model.weight.grad = torch.ones(1, 3)
    runs.optimizer_step(model, optimizers, settings, 0, 10)
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros(1, 3)  # all groups dead, in several processes: all_reduce_gradients makes zeros
    assert runs.optimizer_step(model, optimizers, settings, 1, 10) == 0
    assert torch.equal(model.weight, before) and model.weight.grad is None


def test_metrics_go_to_tensorboard_too(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    walk(make_settings(tmp_path, track="tensorboard"), 3)
    events = event_accumulator.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [round(point.value, 3) for point in events.Scalars("loss")] == [1.0, 0.5, 0.333]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="--track wandb: .* pip install wandb"):
        runs.Run(make_settings(tmp_path, track="wandb"), {})


# ------------------------------------------------------------------------------------------------
# Muon
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_muon_makes_the_updates_of_torchs_muon(shape):
    """torch's runs in bfloat16, ours in float32: they agree to bfloat16's eight bits, over several steps."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    mine, torchs = runs.Muon([ours], lr=0.1, weight_decay=0.0), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)
    for _ in range(4):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        torchs.step()
    assert (ours - theirs).norm() < 0.02 * theirs.norm() and theirs.norm() > 0.5


def test_orthogonalize_keeps_the_directions_and_evens_the_lengths():
    torch.manual_seed(0)
    matrix = torch.randn(20, 50)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ runs.orthogonalize(matrix) @ v.T  # diagonal if the singular vectors are the same
    lengths = inner.diagonal()
    assert (inner - lengths.diag()).abs().max() < 1e-3 and 0.6 < lengths.min() and lengths.max() < 1.3


def test_the_processes_share_the_matrices_and_their_parts_add_up_to_the_whole_update(monkeypatch):
    torch.manual_seed(2)
    shapes = [(6, 4), (4, 4), (3, 8)]
    start, gradients = ([torch.randn(shape) for shape in shapes] for _ in range(2))

    def updates(rank, world_size):
        parameters = [torch.nn.Parameter(x.clone()) for x in start]
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.clone()
        parts = []
        monkeypatch.setattr(runs, "rank", lambda: rank)
        monkeypatch.setattr(runs, "world_size", lambda: world_size)
        monkeypatch.setattr(runs, "all_reduce_tensors", lambda tensors: parts.extend(tensors) or tensors)
        runs.Muon(parameters, lr=0.1, weight_decay=0.0).step()
        return parts

    whole, first, second = updates(0, 1), updates(0, 2), updates(1, 2)
    assert [bool(part.any()) for part in first + second] == [True, False, True, False, True, False]
    for together, a, b in zip(whole, first, second):
        assert torch.equal(together, a + b)
