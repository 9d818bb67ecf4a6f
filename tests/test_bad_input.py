"""Bad input of every kind: each is answered by one clear line that names the place, or is read as it should be."""

import json
import os
import re
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import LARGE, SMALL, write_rows
from PIL import Image
from safetensors.torch import load_file, save_file
from test_examples import BOXES_TO_1000, COLDSTART, GROUNDING, SPATIAL, change, data, message  # noqa: F401
from test_pictures import write_mp4
from test_scripts import SCRIPTS

import common
import eval as evaluation
import stage0_data
import stage1_localize
import stage2_understand
import stage3_grpo
from support import files, runs

KINDS = {SPATIAL: "spatial", GROUNDING: "locate", COLDSTART: "coldstart"}
ONE, TWO = f"{SMALL}/20.jpg", f"{SMALL}/40.jpg"  # pictures of the folder
MODULES = (stage0_data, stage1_localize, stage2_understand, stage3_grpo, evaluation)


def named(data, name, row, said, *words):  # noqa: F811
    """Whether the message names file, row and every word."""
    assert "\n" not in said
    assert said.startswith(f"{data / name} row {row} ") and all(str(word) in said for word in words), said


# ------------------------------------------------------------------------------------------------
# Files of rows
# ------------------------------------------------------------------------------------------------


def test_rows_with_the_same_or_without_a_question_id_are_examples_of_their_own(data):  # noqa: F811
    before = common.read_examples(data, "spatial")
    change(data, SPATIAL, 2, question_id=1)
    change(data, SPATIAL, 3, question_id=1)
    change(data, SPATIAL, 4, question_id=None)
    after = common.read_examples(data, "spatial")
    assert [example.id for example in after] == [example.id for example in before]
    assert len({example.id for example in after}) == 14


@pytest.mark.parametrize("line", [b'{"a": "\xff"}', b"\xff\xfe{\x00}\x00"], ids=["a byte", "utf-16"])
def test_a_line_that_is_not_utf_8_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    said = message(common.read_jsonl, tmp_path / "x.jsonl")
    assert f"{tmp_path / 'x.jsonl'} line 2 is not" in said and "\n" not in said


def test_a_file_with_a_mark_at_its_start_and_line_ends_of_windows_is_read(tmp_path):
    rows = [{"a": "é"}, {"a": "\u2028"}, {"a": 3}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\r\n"
    (tmp_path / "x.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert common.read_jsonl(tmp_path / "x.jsonl") == rows


def test_a_very_long_line_is_read_and_a_very_deep_one_is_named(tmp_path):
    row = {"a": "x" * 5_000_000}
    write_rows(tmp_path / "x.jsonl", [row])
    assert common.read_jsonl(tmp_path / "x.jsonl") == [row]
    (tmp_path / "x.jsonl").write_text("[" * 100_000 + "\n")
    assert "line 1 is not JSON" in message(common.read_jsonl, tmp_path / "x.jsonl")


# ------------------------------------------------------------------------------------------------
# Fields of a row
# ------------------------------------------------------------------------------------------------


def put(data, name, row, field, value):  # noqa: F811
    """Set a field, to None also; and read the file."""
    rows = [json.loads(line) for line in (data / name).read_text().splitlines()]
    rows[row - 1][field] = value
    write_rows(data / name, rows)
    return message(common.read_examples, data, KINDS[name])


@pytest.mark.parametrize("name,field", [(SPATIAL, "question"), (SPATIAL, "question_type"), (GROUNDING, "question"),
                                        (COLDSTART, "prompt"), (COLDSTART, "solution"), (SPATIAL, "data_type")])  # fmt: skip
@pytest.mark.parametrize("value", [None, 5, ["a"], {"a": 1}, True], ids=repr)
def test_a_field_that_is_not_text_is_named(data, name, field, value):  # noqa: F811
    named(data, name, 3, put(data, name, 3, field, value), field)


@pytest.mark.parametrize("value", [None, [], "", 5, True, {"a": 1}, [5], [None], [ONE, ""], [[ONE]]], ids=repr)
def test_an_image_that_is_no_name_of_a_file_is_named(data, value):  # noqa: F811
    named(data, SPATIAL, 3, put(data, SPATIAL, 3, "image", value), "image")


def test_an_unknown_data_type_is_named_with_the_known_ones(data):  # noqa: F811
    named(data, SPATIAL, 3, put(data, SPATIAL, 3, "data_type", "vidoe"), "'vidoe'", "single_image", "multi_view", "video")


@pytest.mark.parametrize("row,value", [(1, ["B"]), (1, {"B": 1}), (1, "b"), (1, 1), (3, [0.7]), (3, {"a": 1}), (3, True)], ids=repr)
def test_an_answer_of_another_kind_is_named(data, row, value):  # noqa: F811
    named(data, SPATIAL, row, put(data, SPATIAL, row, "answer", value), repr(value))


@pytest.mark.parametrize("value", [0, 0.0, 3, 1.5, "0"], ids=repr)
def test_an_answer_may_be_a_number_of_json(data, value):  # noqa: F811
    change(data, SPATIAL, 3, answer=value)
    example = common.read_examples(data, "spatial")[2]
    assert common.score_answers([str(value)], [example])[0].tolist() == [1.0]
    assert common.training_pair(example)[1] == f"{value}{common.STOP}"


@pytest.mark.parametrize(
    "options",
    ["A. left B. right", ["A. left", 2], ["A. left", ""], ["A. left", None], ["A. left", "A. right"], {"A": "left"},
     ["a. left", "b. right"], ["Armchair", "Bed"], 7],
    ids=repr,
)  # fmt: skip
def test_options_without_letters_of_their_own_are_named(data, options):  # noqa: F811
    change(data, SPATIAL, 1, answer=options[0][0] if isinstance(options, list) and options else "A")
    named(data, SPATIAL, 1, put(data, SPATIAL, 1, "options", options), "options")


@pytest.mark.parametrize("options", [None, []], ids=repr)
def test_a_letter_without_options_is_named(data, options):  # noqa: F811
    change(data, SPATIAL, 1, answer="A")
    named(data, SPATIAL, 1, put(data, SPATIAL, 1, "options", options), "'A'", "options")


def test_options_of_a_numeric_question_are_named(data):  # noqa: F811
    """A number would be scored as a letter: always wrong."""
    named(data, SPATIAL, 3, put(data, SPATIAL, 3, "options", ["A. 0.7", "B. 1.5"]), "options")


# ------------------------------------------------------------------------------------------------
# Boxes
# ------------------------------------------------------------------------------------------------


def located(data, *boxes):  # noqa: F811
    """The first grounding row, of a picture of 640 x 480, with these boxes."""
    change(data, GROUNDING, 1, answer=[{"bbox_2d": box, "label": "chair"} for box in boxes])
    return common.read_examples(data, "locate")[0]


@pytest.mark.parametrize("box", [[640, 10, 700, 20], [10, 480, 20, 500], [-50, 10, 0, 20], [10, -50, 20, 0]], ids=str)
def test_a_box_outside_of_its_picture_is_named(backbone, data, box):  # noqa: F811
    example = located(data, [10, 10, 20, 20], box)
    said = message(common.boxes_for_model, backbone, example)
    assert example.id in said and str(box) in said and "640 x 480" in said


def test_a_box_partly_outside_is_clipped_and_a_thin_one_keeps_a_pixel(backbone, data):  # noqa: F811
    """The model sees 112 x 84 pixels of 640 x 480: six to one."""
    example = located(data, [600, 400, 700, 500], [100, 100, 102, 102], [638, 478, 640, 480], [0, 0, 1, 1])
    boxes = [box["bbox_2d"] for box in common.boxes_for_model(backbone, example)]
    assert boxes == [[105, 70, 112, 84], [18, 18, 19, 19], [111, 83, 112, 84], [0, 0, 1, 1]]
    example.answer = common.boxes_for_model(backbone, example)
    assert common.score_answers([common.boxes_text(example.answer)], [example])[0].tolist() == [1.0]


# ------------------------------------------------------------------------------------------------
# Pictures and links
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/etc/passwd", "beside", "folder beside", "itself", "nowhere"])
def test_a_link_out_of_the_images_folder_is_refused(data, target):  # noqa: F811
    beside = data / "beside"
    beside.mkdir()
    shutil.copy(data / "images" / ONE, beside / "a.jpg")
    name, goal = {
        "/etc/passwd": ("link.jpg", "/etc/passwd"), "itself": ("link.jpg", "link.jpg"), "folder beside": ("link/a.jpg", beside),
        "beside": ("link.jpg", beside / "a.jpg"), "nowhere": ("link.jpg", beside / "b.jpg"),
    }[target]  # fmt: skip
    (data / "images" / name.split("/")[0]).symlink_to(goal)
    change(data, SPATIAL, 2, image=[name])
    said = message(common.read_examples, data, "spatial")
    named(data, SPATIAL, 2, said, "link", "does not exist" if target == "itself" else "outside")


def test_links_inside_the_images_folder_and_a_folder_that_is_a_link_work(data, tmp_path):  # noqa: F811
    (data / "images").rename(tmp_path / "other disk")
    (data / "images").symlink_to(tmp_path / "other disk")
    (data / "images" / "link.jpg").symlink_to(tmp_path / "other disk" / ONE)
    (data / "images" / "again").symlink_to(LARGE)
    change(data, SPATIAL, 1, image=["link.jpg"])
    change(data, SPATIAL, 2, image=["again/40.jpg"])
    first, second, third, *_ = common.read_examples(data, "spatial")
    assert first.images == third.images == (str(tmp_path / "other disk" / ONE),)
    assert second.images == (str(tmp_path / "other disk" / LARGE / "40.jpg"),)


def pictures(count):
    """Pictures of noise."""
    return [Image.fromarray(np.random.default_rng(n).integers(0, 256, (48, 64, 3), dtype=np.uint8)) for n in range(count)]


def encoded(backbone, path, data_type):
    scene = common.Scene((str(path),), data_type, [])
    return common.encode_scenes(backbone, [scene])[0].features


def test_a_picture_of_one_pixel_is_seen(backbone, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    assert encoded(backbone, tmp_path / "dot.png", "single_image").isfinite().all()


def test_of_a_moving_png_the_first_picture_is_read(tmp_path):
    first, second = pictures(2)
    first.save(tmp_path / "a.png", save_all=True, append_images=[second])
    assert Image.open(tmp_path / "a.png").n_frames == 2
    assert np.array_equal(common.load_image(tmp_path / "a.png"), first)


def test_a_video_of_one_frame_is_a_video(backbone, tmp_path):
    pytest.importorskip("decord")
    write_mp4(tmp_path / "a.mp4", pictures(1))
    assert len(common.read_video(tmp_path / "a.mp4", 16)) == 1
    for data_type in ("video", "single_image"):
        assert encoded(backbone, tmp_path / "a.mp4", data_type).isfinite().all()


def test_a_video_without_frames_is_named(tmp_path):
    pytest.importorskip("decord")
    write_mp4(tmp_path / "a.mp4", pictures(1))
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    for table, place in ((b"stts", 8), (b"stsc", 8), (b"stco", 8), (b"stsz", 12)):
        start = content.rfind(table) + place
        content[start : start + 4] = bytes(4)  # its count of entries
    (tmp_path / "a.mp4").write_bytes(content)
    assert "a.mp4 cannot be read as a video" in message(common.read_video, tmp_path / "a.mp4", 4)


@pytest.mark.parametrize("part", [0.001, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("index", ["last", "first"])
def test_a_video_that_was_cut_is_named(tmp_path, part, index):
    """Its index stands behind the frames (then it is gone) or before them (then frames are missing)."""
    pytest.importorskip("decord")
    write_mp4(tmp_path / "a.mp4", pictures(12))
    content = (tmp_path / "a.mp4").read_bytes()
    if index == "first":
        head, moov = content.find(b"mdat") - 4, content.rfind(b"moov") - 4
        table, place = bytearray(content[moov:]), content.rfind(b"stco") + 12 - moov
        table[place : place + 4] = (head + 8 + len(table)).to_bytes(4, "big")  # where the frames are now
        content = content[:head] + bytes(table) + content[head:moov]
        (tmp_path / "a.mp4").write_bytes(content)
        assert len(common.read_video(tmp_path / "a.mp4", 4)) == 4
    (tmp_path / "a.mp4").write_bytes(content[: int(part * len(content))])
    assert "a.mp4 cannot be read as a video" in message(common.read_video, tmp_path / "a.mp4", 4)


def test_a_video_at_whose_end_decord_gives_up_is_named(tmp_path, monkeypatch):
    decord = pytest.importorskip("decord")

    def give_up(path):
        raise decord.DECORDLimitReachedError("too many retries")

    monkeypatch.setattr(decord, "VideoReader", give_up)
    assert "a.mp4 cannot be read as a video (too many retries)" in message(common.read_video, tmp_path / "a.mp4", 4)


# ------------------------------------------------------------------------------------------------
# Model folders
# ------------------------------------------------------------------------------------------------

WEIGHT = "model.layers.2.mlp.down_proj.weight"


def reshape(folder, change):
    """Change the weights of a model folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def configured(kind):
    return lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["X"]}))


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_tokenizer_of_another(folder):
    words = json.loads((folder / "tokenizer.json").read_text())
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] != "<|image_pad|>"]
    (folder / "tokenizer.json").write_text(json.dumps(words).replace("<|image_pad|>", "<|other|>"))


def changed(name, change):
    """Change a JSON file of a model folder."""

    def spoil(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return spoil


with_patches_of_16 = changed("preprocessor_config.json", lambda values: values.update(patch_size=16))
with_windows = changed("config.json", lambda values: values["text_config"].update(layer_types=["sliding_attention"] * 4))


def cut_weights(size):
    return lambda folder: os.truncate(folder / "model.safetensors", size)


FOLDERS = {  # what is wrong: how it is made, words of the message
    "no tokenizer": (without_tokenizer, ["tokenizer"]),
    "tokenizer of another": (with_tokenizer_of_another, ["tokenizer"]),
    "no processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), ["image processor"]),
    "pickle": (as_pickle, ["safetensors"]),
    "bert": (configured("bert"), ["bert"]),
    "qwen2": (configured("qwen2"), ["qwen2"]),
    "qwen3_vl_moe": (configured("qwen3_vl_moe"), ["qwen3_vl_moe", "choose from qwen2_vl, qwen2_5_vl, qwen3_vl"]),
    "hybrid": (configured("qwen3_5"), ["qwen3_5", "linear_attention", "leak from branch to branch"]),
    "text hybrid": (configured("qwen3_next"), ["qwen3_next", "linear_attention", "leak from branch to branch"]),
    "sliding windows": (with_windows, ["sliding_attention"]),
    "processor of another": (with_patches_of_16, ["patches of 16 pixels, not 14"]),
    "unknown": (configured("nonsense"), ["nonsense"]),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), ["JSON"]),
    "cut": (cut_weights(1_000_000), ["safetensors", "broken"]),
    "empty": (cut_weights(0), ["safetensors", "broken"]),
    "lacking a weight": (lambda folder: reshape(folder, lambda weights: weights.pop(WEIGHT)), ["missing", "2.mlp.down_proj"]),
    "other shapes": (lambda folder: reshape(folder, lambda w: w.update({WEIGHT: w[WEIGHT][:50].contiguous()})), ["shape"]),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), ["adapter", "model/"]),
}


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model's folder."""
    return shutil.copytree(tiny_model, tmp_path / "m")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_folder_that_is_not_whole_is_named(folder, name, monkeypatch):
    if name in ("bert", "qwen2", "qwen3_vl_moe", "hybrid", "text hybrid", "unknown"):  # it would build 7 billion weights
        monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", pytest.fail)
    spoil, words = FOLDERS[name]
    spoil(folder)
    said = message(common.load_backbone, folder, "fp32")
    assert str(folder) in said and all(word in said for word in words), said


def test_frames_without_numbers_are_named_before_training(data, tmp_path):  # noqa: F811
    """Only where a model reads their times."""
    (data / "images" / LARGE / "first.jpg").write_bytes((data / "images" / LARGE / "0.jpg").read_bytes())
    change(data, SPATIAL, 12, image=[f"{LARGE}/first.jpg", f"{LARGE}/40.jpg"])
    common.load_scenes(data, ["spatial"], SimpleNamespace(family=common.FAMILIES["qwen2_5_vl"]))
    said = message(common.load_scenes, data, ["spatial"], BOXES_TO_1000)
    assert "first.jpg" in said and "no rising numbers" in said


@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "gptq"])
@pytest.mark.parametrize("load", ["bf16", "4bit"])
def test_a_model_that_is_stored_quantised_is_refused_before_it_is_loaded(folder, load, method, monkeypatch):
    """Training it would work for hours, and then no adapter could be merged into it."""
    monkeypatch.setattr(transformers.Qwen2_5_VLForConditionalGeneration, "from_pretrained", pytest.fail)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    said = message(common.load_backbone, folder, load)
    assert all(word in said for word in (str(folder), f"quantised ({method})", "original model", "--load 4bit")), said


def test_weights_are_checked_in_4bit_too(folder):
    spoil, words = FOLDERS["lacking a weight"]
    spoil(folder)
    said = message(common.load_backbone, folder, "4bit")
    assert str(folder) in said and all(word in said for word in words), said


def test_an_adapter_folder_is_called_by_its_name(tiny_model, tmp_path):
    backbone = common.load_backbone(tiny_model, "fp32")
    common.adapt(backbone, runs.TrainSettings())
    files.save_model(backbone, tmp_path)
    said = message(common.load_backbone, tmp_path / "adapter", "fp32")
    assert f"{tmp_path / 'adapter'} is a LoRA adapter" in said and "model/" in said


def test_another_way_to_load_is_refused(tiny_model):
    said = message(common.load_backbone, tiny_model, "fp16")
    assert "--load fp16" in said and all(way in said for way in ("fp32", "bf16", "4bit"))


def test_a_prompt_longer_than_the_context_names_its_rows(backbone, ladder_data):
    scene = common.group_scenes(common.read_examples(ladder_data, "spatial"))[0]
    (prefix,) = common.encode_scenes(backbone, [scene])
    words = list(common.encode_text(backbone.tokenizer, "Where is it?"))
    context = len(prefix.ids) + len(words) + 3

    def ask(spare):
        backbone.model.config.text_config.max_position_embeddings = context + spare
        for prefixes in ([prefix], [common.extend_prefix(prefix, words[:1])]):
            inside = words if prefixes[0] is prefix else words[1:]
            yield lambda: common.branch_generate(backbone, prefixes, [[inside, inside[:1]]], 3)  # noqa: B023
            yield lambda: common.branch_logprobs(backbone, prefixes, [[(inside, words[:3]), (inside, words[:1])]])  # noqa: B023

    for call in ask(0):
        call()
    for call in ask(-1):
        said = message(call)
        assert all(example.id in said for example in scene.examples) and f"{context:,} tokens" in said
        assert "--max_picture_tokens" in said


# ------------------------------------------------------------------------------------------------
# Checkpoints and runs
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(backbone, tmp_path):
    """(backbone, its optimizers, run with a checkpoint of both, settings)."""
    settings = stage1_localize.LocalizeSettings(model="m", data="d", out=str(tmp_path / "run"), lora_rank=2)
    common.adapt(backbone, settings)
    optimizers = runs.make_optimizers(backbone.model, settings)
    run = runs.Run(settings, {})
    run.save(3, backbone, optimizers)
    return backbone, optimizers, run, settings


class Trap:
    def __reduce__(self):
        return print, ("it runs",)


def change_checkpoint(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def reshape_first(state):
    name = next(iter(state["weights"]))
    state["weights"][name] = state["weights"][name][:1].contiguous()


CHECKPOINTS = {  # what is wrong: how it is made from the checkpoint's path
    "code": lambda path: torch.save({"step": 3, "config": {}, "weights": Trap()}, path),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "no zip": lambda path: path.write_text("{"),
    "a list": lambda path: torch.save([3], path),
    "no config": lambda path: torch.save({"step": 3}, path),
    "no number": lambda path: torch.save({"step": "x", "config": {}}, path),
    "other optimizers": lambda path: change_checkpoint(path, lambda s: s.update(optimizers=[{"state": {}, "param_groups": []}])),
    "no optimizers": lambda path: change_checkpoint(path, lambda s: s.update(optimizers=[])),
    "no weights": lambda path: change_checkpoint(path, lambda s: s.pop("weights")),
    "other shapes": lambda path: change_checkpoint(path, reshape_first),
    "other weights": lambda path: change_checkpoint(path, lambda s: s["weights"].update(more=torch.zeros(2))),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_is_broken_or_of_another_model_is_named(saved, name, capsys):
    backbone, optimizers, run, settings = saved
    CHECKPOINTS[name](run.checkpoint)
    content = run.checkpoint.read_bytes()
    said = message(lambda: runs.Run(settings, {}).restore(backbone, optimizers))
    assert str(run.checkpoint) in said and "--resume never" in said and "\n" not in said
    assert "it runs" not in capsys.readouterr().out
    assert run.checkpoint.read_bytes() == content  # nothing is lost


def test_a_checkpoint_of_another_stage_or_version_is_refused_by_the_setting(saved):
    _, _, run, settings = saved
    said = message(runs.Run, stage2_understand.UnderstandSettings(**vars(settings)), {})
    assert str(run.folder) in said and "no --direct" in said and "--direct 1.0" in said
    change_checkpoint(run.checkpoint, lambda state: state["config"].update(flavour="sweet"))
    said = message(runs.Run, settings, {})
    assert "--flavour sweet" in said and "no --flavour" in said


@pytest.mark.parametrize("name,value", [("preset", "3b"), ("model", "other")])
def test_a_run_of_another_preset_or_model_is_refused(saved, name, value):
    _, _, run, settings = saved
    said = message(runs.Run, replace(settings, lr=0.5, **{name: value}), {})
    assert f"--{name} {getattr(settings, name)}, not --{name} {value}" in said  # before all else
    assert runs.Run(settings, {}).first == 3


def test_a_finished_cold_start_from_another_model_or_other_data_is_refused(folder, tiny_model, ladder_data, tmp_path):
    settings = stage3_grpo.GRPOSettings(model=str(folder), data=str(tmp_path / "d"), out=str(tmp_path / "stage3"), load="fp32")
    shutil.copytree(ladder_data, tmp_path / "d")
    for name, more in (("coldstart", ()), ("stage3", {"cold start": runs.model_files(tiny_model)})):  # as both leave them
        shutil.copytree(tiny_model, tmp_path / name / "model")
        (tmp_path / name / "config.json").write_text(json.dumps(runs.run_config(settings, more)))
    assert stage3_grpo.cold_start(settings) == f"{tmp_path / 'coldstart'}/model"
    stage3_grpo.work(settings)  # finished

    rows = (tmp_path / "d" / COLDSTART).read_text()
    (tmp_path / "d" / COLDSTART).write_text(rows.replace("chair", "stool", 1))
    for call, name in ((stage3_grpo.cold_start, "coldstart"), (stage3_grpo.work, "stage3")):
        assert f"{tmp_path / name} was made before the data in {tmp_path / 'd'} changed" in message(call, settings)
    (tmp_path / "d" / COLDSTART).write_text(rows)
    stage3_grpo.work(settings)
    reshape(tmp_path / "coldstart" / "model", lambda weights: weights[WEIGHT].add_(0.1))
    assert f"{tmp_path / 'stage3'} was made before the cold start changed" in message(stage3_grpo.work, settings)
    shutil.rmtree(tmp_path / "stage3")
    reshape(folder, lambda weights: weights[WEIGHT].add_(0.1))
    said = message(stage3_grpo.work, settings)
    assert f"{tmp_path / 'coldstart'} was made before the model in {folder} changed" in said and "--resume never" in said


def test_a_finished_cold_start_of_other_settings_is_refused(tmp_path):
    settings = stage3_grpo.GRPOSettings(model=str(tmp_path / "stage2/model"), data="d", out=str(tmp_path / "stage3"))
    cold = tmp_path / "coldstart"
    (cold / "model").mkdir(parents=True)
    (cold / "model" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="stage2/model has no model"):  # killed while it was written or removed: it is trained
        stage3_grpo.cold_start(settings)
    (cold / "model").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (cold / "model" / name).write_text("{}")
    (cold / "config.json").unlink()
    assert stage3_grpo.cold_start(settings) == f"{cold}/model"  # the folder alone, as it was copied
    (cold / "config.json").write_text(json.dumps(vars(settings)))
    assert stage3_grpo.cold_start(replace(settings, beta=0.5, group_size=4, micro_batch=3)) == f"{cold}/model"
    others = {"model": "other/model", "data": "e", "cold_mix": 0.5, "cold_steps": 7, "seed": 3, "min_picture_tokens": 1,
              "lora_rank": 5}  # fmt: skip
    for name, value in others.items():
        said = message(stage3_grpo.cold_start, replace(settings, **{name: value}))
        assert str(cold) in said and f"--{name} {value}" in said and "--resume never" in said


# ------------------------------------------------------------------------------------------------
# Nothing to learn; steps larger than the data
# ------------------------------------------------------------------------------------------------


def test_no_rows_left_are_told(backbone, ladder_data, tmp_path):
    settings = stage2_understand.UnderstandSettings(data=str(ladder_data), direct=0.0, worked=0.0, replay=0.0)
    scenes = common.load_scenes(ladder_data, ["spatial"], backbone)
    packs = common.make_packs(backbone.tokenizer, stage2_understand.mix(scenes, settings), 8, 0)
    said = message(stage2_understand.train, backbone, packs, [], [], settings, None)
    assert packs == [] and str(ladder_data) in said and "nothing to learn" in said


def test_held_out_files_without_rows_are_named(backbone, data):  # noqa: F811
    (data / "heldout").mkdir()
    (data / "heldout" / SPATIAL).write_text("\n")
    settings = runs.TrainSettings(data=str(data))
    said = message(runs.held_out_scenes, settings, ["spatial"], backbone)
    assert str(data / "heldout" / SPATIAL) in said and "no rows" in said


def test_a_step_larger_than_the_data_is_one_step(backbone, data, tmp_path):  # noqa: F811
    settings = stage1_localize.LocalizeSettings(
        data=str(data), out=str(tmp_path / "run"), train_batch=40, branches=1, micro_batch=40, keep_features=True
    )
    scenes = common.load_scenes(data, ["locate"], backbone)[:1]
    packs = common.make_packs(backbone.tokenizer, scenes, settings.branches, 0)[:3]
    common.adapt(backbone, settings)
    run = runs.Run(settings, {"loss": ["loss"]})
    stage1_localize.train(backbone, packs, [], settings, run)
    assert [row["step"] for row in common.read_jsonl(run.folder / "metrics.jsonl")] == [1]


@pytest.fixture
def asked(backbone, ladder_data, tmp_path):
    """(backbone, prompts, settings, run) of a GRPO of two questions."""
    scene = common.group_scenes(common.read_examples(ladder_data, "spatial"))[0]
    settings = stage3_grpo.GRPOSettings(
        out=str(tmp_path / "run"), data="d", train_batch=3, group_size=2, max_new_tokens=2, steps=0, locate=0.0, micro_batch=8,
        lora_rank=2,
    )
    common.adapt(backbone, settings)
    return backbone, [(scene, example) for example in scene.examples[:2]], settings, runs.Run(settings, {})


def test_more_prompts_than_questions_are_one_step(asked):
    backbone, prompts, settings, run = asked
    stage3_grpo.grpo(backbone, prompts, [], [], settings, run)
    assert [row["step"] for row in common.read_jsonl(run.folder / "metrics.jsonl")] == [1]


def test_prompts_without_spatial_questions_are_told(asked):
    backbone, prompts, settings, run = asked
    only = [(scene, replace(example, question_type="locate")) for scene, example in prompts]
    for prompts in ([], only):
        said = message(stage3_grpo.grpo, backbone, prompts, [], [], settings, run)
        assert str(settings.data) in said and "no spatial questions" in said


def test_fewer_prompts_than_processes_are_told(asked, monkeypatch):
    monkeypatch.setattr(runs, "world_size", lambda: 4)
    said = message(stage3_grpo.check, asked[2])
    assert "--train_batch 3" in said and "4" in said


# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------


def parsed(module, *argv):
    cls = SCRIPTS[module.__name__]
    return runs.parse_settings(cls, module.PRESETS, "x", argv=[str(word) for word in argv])


def complaint(capsys, module, *argv):
    """The last line that the parser writes."""
    with pytest.raises(SystemExit) as stopped:
        parsed(module, *argv)
    assert stopped.value.code not in (0, None)
    return capsys.readouterr().err.strip().splitlines()[-1]


TOO_SMALL = [(stage1_localize, name, value) for name, value in (
    ("train_batch", 0), ("branches", 0), ("micro_batch", 0), ("save_every", 0), ("eval_every", 0), ("eval_scenes", -1),
    ("lora_rank", 0),
    ("steps", -1), ("max_steps", -1), ("processes", 0), ("clip", 0), ("lr", -1e-4), ("lr", "nan"), ("lr", "inf"), ("warmup", -0.1),
    ("max_picture_tokens", -1), ("seed", -1),
)] + [(stage3_grpo, name, value) for name, value in (
    ("train_batch", 0), ("group_size", 0), ("mu", 0), ("max_new_tokens", 0), ("temperature", 0), ("temperature", -1),
    ("cold_train_batch", 0),
    ("cold_eval_every", 0), ("show_every", 0), ("beta", -1), ("locate", -0.5), ("cold_steps", -1),
)] + [
    (stage2_understand, "direct", -1), (evaluation, "eval_batch", -1), (evaluation, "frames", 0), (stage0_data, "rooms", 0),
]  # fmt: skip


@pytest.mark.parametrize("module,name,value", TOO_SMALL, ids=[f"{name} {value}" for _, name, value in TOO_SMALL])
def test_a_number_that_cannot_work_is_refused(capsys, module, name, value):
    line = complaint(capsys, module, f"--{name}={value}")
    assert f"--{name}" in line and str(float(value)).removesuffix(".0") in line and "give" in line


def test_zero_is_allowed_where_the_comment_says_what_it_means(capsys):
    for module in MODULES:
        for field in fields(SCRIPTS[module.__name__]):
            if field.type in (int, float):
                if field.default == 0 or re.search(r"\b0:", field.metadata["help"]):
                    assert getattr(parsed(module, f"--{field.name}", 0), field.name) == 0
                else:
                    assert f"--{field.name} 0" in complaint(capsys, module, f"--{field.name}", 0)


@pytest.mark.parametrize("module", MODULES)
def test_every_preset_passes(module):
    for preset in module.PRESETS:
        assert parsed(module, "--preset", preset).preset == preset


@pytest.mark.parametrize("module,name", [(stage1_localize, "load"), (stage1_localize, "tune"), (stage1_localize, "optimizer"),
                                         (stage3_grpo, "cold_tune"), (stage3_grpo, "cold_optimizer"), (stage3_grpo, "loss_average"),
                                         (evaluation, "resume"), (stage0_data, "resume")])  # fmt: skip
def test_a_word_that_is_no_choice_is_refused(capsys, module, name):
    line = complaint(capsys, module, f"--{name}", "other")
    default = getattr(SCRIPTS[module.__name__](), name)
    assert f"--{name}" in line and "other" in line and default in line


def test_muon_is_refused_for_adapters(backbone):
    settings = runs.TrainSettings(optimizer="muon", tune="lora")
    assert "--optimizer muon" in message(runs.make_optimizers, backbone.model, settings)


def test_a_share_of_boxes_that_leaves_no_question_is_refused():
    said = message(stage3_grpo.check, stage3_grpo.GRPOSettings(locate=0.98, train_batch=16))
    assert "--locate 0.98" in said
