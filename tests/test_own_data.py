"""Your own photos: one JSONL file through stages 2 and 3 and eval.py; the wording of prompts; mp4 files on every system."""

import json
import os
import re
import shlex
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_rows
from PIL import Image

import common
import eval as evaluation
import stage1_localize
import stage2_understand
import stage3_grpo
from support import benchmarks, files, runs

SCRIPTS = {"stage2_understand.py": stage2_understand, "stage3_grpo.py": stage3_grpo, "eval.py": evaluation}
BOX = [{"bbox_2d": [5, 5, 40, 50], "label": "lamp"}]
ROWS = [
    {"image": "kitchen.jpg", "question": "Which is closer to the lamp?", "options": ["bed", "chair"], "answer": "chair"},
    {"image": "hall/1.jpg", "question": "How many doors?", "answer": 3, "boxes": BOX},
    {"image": ["hall/1.jpg", "hall/2.jpg"], "question": "What colour is the wall?", "answer": "Dark Red",
     "question_type": "colour"},
    {"image": ["kitchen.jpg"], "question": "Is it left?", "options": ["A. yes", "B. no"], "answer": "B"},
]


@pytest.fixture
def photos(tmp_path, photo):
    """A folder of three pictures and one JSONL file."""
    folder = tmp_path / "photos"
    (folder / "hall").mkdir(parents=True)
    for number, name in enumerate(("kitchen.jpg", "hall/1.jpg", "hall/2.jpg")):
        photo(120, 90, number).save(folder / name)
    write_rows(folder / "mine.jsonl", ROWS)
    return folder


@pytest.fixture
def ours():
    """Put the wording of prompts back after the test."""
    yield common.INSTRUCTIONS
    common.use_instructions("none")


def message(read, *args):
    with pytest.raises(SystemExit) as stopped:
        read(*args)
    return str(stopped.value)


# Own rows


def test_own_rows_become_examples(photos):
    found = common.read_examples(photos, "spatial")
    assert [(e.data_type, e.question_type, e.options, e.answer) for e in found] == [
        ("single_image", "choice", ["A. bed", "B. chair"], "B"),
        ("single_image", "number", None, "3"),
        ("multi_view", "colour", None, "Dark Red"),
        ("single_image", "choice", ["A. yes", "B. no"], "B"),
    ]
    assert found[1].images == (str((photos / "hall" / "1.jpg").resolve()),)
    (located,) = common.read_examples(photos, "locate")
    assert located.answer == BOX and located.question == "How many doors?" and located.question_type == "locate"


def test_pictures_may_lie_in_images_and_an_mp4_is_a_video(photos):
    (photos / "images").mkdir()
    for name in ("kitchen.jpg", "hall"):
        (photos / name).rename(photos / "images" / name)
    (photos / "walk.MP4").write_bytes(b"")
    write_rows(photos / "mine.jsonl", [*ROWS, {"image": "walk.MP4", "question": "How many rooms?", "answer": 2}])
    *_, last = found = common.read_examples(photos, "spatial")
    assert last.data_type == "video" and {Path(path).parents[-1] for e in found for path in e.images}
    assert all("images" in path for e in found[:-1] for path in e.images)


@pytest.mark.parametrize("change,words", [
    ({"answer": "sofa"}, "row 1 .*'sofa'"), ({"answer": None}, "'answer' is missing"), ({"image": "no.jpg"}, "no.jpg does not"),
    ({"image": "../secret.jpg"}, "outside"), ({"image": ["kitchen.jpg", "hall/1.jpg"], "boxes": BOX}, "boxes need .* one picture"),
    ({"options": ["bed", "bed"], "answer": "bed"}, "'bed'"), ({"image": 3}, "not a list of file names"),
    ({"question_type": "room size", "options": None, "answer": "large"}, "'large' is not a number"),
])  # fmt: skip
def test_a_wrong_own_row_is_named(photos, change, words):
    (photos.parent / "secret.jpg").write_bytes((photos / "kitchen.jpg").read_bytes())
    write_rows(photos / "mine.jsonl", [ROWS[0] | change])
    said = message(common.read_examples, photos, "spatial")
    assert re.search(words, said) and str(photos / "mine.jsonl") in said


def test_two_own_files_are_refused_and_a_released_file_comes_first(photos, ladder_data):
    write_rows(photos / "more.jsonl", ROWS)
    assert "mine.jsonl, more.jsonl" in message(common.read_examples, photos, "spatial")
    (photos / common.FILES["spatial"]).write_bytes((ladder_data / common.FILES["spatial"]).read_bytes())
    assert common.data_file(photos, "spatial").name == common.FILES["spatial"]
    assert common.data_file(photos, "locate").name == common.FILES["locate"]


def test_a_text_is_compared_without_case_and_marks(photos):
    colour = common.read_examples(photos, "spatial")[2]
    texts = ["dark red", "<answer> DARK red. </answer>", "**Dark Red**", "The answer is: dark red", "red", "", "dark red or blue"]
    scores, legal = common.score_answers(texts, [colour] * len(texts))
    assert scores.tolist() == [1, 1, 1, 1, 0, 0, 0] and legal.tolist() == [True] * 5 + [False, True]


def test_photos_of_a_folder_are_one_room_and_others_one_each(photos, backbone):
    settings = runs.TrainSettings(data=str(photos))
    assert {runs.room_of(path, photos) for e in common.read_examples(photos, "spatial") for path in e.images} == {"kitchen", "hall"}
    (room,) = runs.held_out_rooms(settings)
    trained = runs.training_scenes(settings, ["spatial"], backbone)
    scored = runs.held_out_scenes(settings, ["spatial"], backbone)
    rooms = [{runs.room_of(p, photos) for scene in some for p in scene.images} for some in (trained, scored)]
    assert rooms == [{"kitchen", "hall"} - {room}, {room}]


def test_the_best_constant_text_is_the_most_frequent_one(photos):
    examples = [common.read_examples(photos, "spatial")[2] for _ in range(4)]
    for example, answer in zip(examples, ("red", "Red", "blue", "green")):
        example.answer = answer
    assert benchmarks.guess_scores([benchmarks.Item("stage0", {}, e) for e in examples]).tolist() == [1, 1, 0, 0]


def test_the_boxes_of_own_rows_are_drawn_as_hints(photos, tmp_path):
    assert [item.boxes for item in benchmarks.read_stage0(photos, "", tmp_path)] == [{}, {"lamp": [5, 5, 40, 50]}, {}, {}]
    (item,) = benchmarks.read_stage0(photos, "box", tmp_path / "drawn")
    assert Image.open(item.example.images[0]).size == (120, 90)


README_SECTION = re.search(r"## Your own photos\n(.*?)(?=\n## |\Z)", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.skipif(not README_SECTION, reason="README.md has no section '## Your own photos'")
def test_the_commands_of_the_readme_train_and_score_own_photos(photos, tiny_model, tmp_path, monkeypatch, ours, capsys):
    """Its rows and its commands as they are, with a tiny model and short runs."""
    _, rows, _, commands, *_ = README_SECTION[1].split("```")
    rows = rows.removeprefix("json\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "draw_curves", lambda *args: None)
    monkeypatch.setattr(stage2_understand, "NEW_TOKENS", 4)
    for row in map(json.loads, rows.splitlines()):
        for name in [row["image"]] if isinstance(row["image"], str) else row["image"]:
            if not (photos / name).exists():
                (photos / name).parent.mkdir(parents=True, exist_ok=True)
                Image.open(photos / "kitchen.jpg").save(photos / name)
    (photos / "mine.jsonl").write_text(rows, encoding="utf-8")
    short = "--load fp32 --processes 1 --min_picture_tokens 4 --max_picture_tokens 4 --max_new_tokens 3"
    train = "--max_steps 1 --eval_batch 4 --group_size 2 --train_batch 2"
    lines = [line for line in commands.splitlines() if line.startswith("python ")]
    assert {shlex.split(line)[1] for line in lines} == set(SCRIPTS)
    for line in lines:
        _, script, *flags = shlex.split(line.replace("Qwen/Qwen2.5-VL-3B-Instruct", str(tiny_model)))
        more = short if script == "eval.py" else f"{short} {train}"
        if script == "stage2_understand.py":
            more = re.sub(r"--(group_size|max_new_tokens) \d+", "", more)
        monkeypatch.setattr(sys, "argv", [script, *flags, *more.split()])
        SCRIPTS[script].main()
    said = capsys.readouterr()
    assert "no cold start: GRPO starts from" in said.err and "best constant guess" in said.out
    scores = json.loads((tmp_path / "runs/photos/stage3/eval/scores.json").read_text())
    assert scores["benchmarks"]["stage0"]["questions"] == len(rows.splitlines())


def test_without_traces_stage_3_says_how_to_go_on(photos):
    assert "--cold_start false" in message(common.read_examples, photos, "coldstart")


# The wording of prompts


def test_instructions_come_from_text_file_or_model(tmp_path, photos, ours, capsys):
    (tmp_path / "w.txt").write_text("Question: {question}\nThink.\n")
    argv = ["--instruction", f"think=@{tmp_path / 'w.txt'}", "direct=Just say it.", "--instruction", "think-number=A number = n."]
    settings = runs.parse_settings(stage1_localize.LocalizeSettings, {"toy": {}}, "stage1", argv=argv)
    chosen = {"think": "Question: {question}\nThink.", "direct": "Just say it.", "think-number": "A number = n."}
    assert settings.instruction == chosen
    choice, number, text, _ = common.read_examples(photos, "spatial")
    assert common.prompt_text(text, "direct") == f"{text.question}\n{common.OTHER_WORDING['direct-text']}"
    assert common.use_instructions("none", settings.instruction) == common.OUR_INSTRUCTIONS | chosen
    assert common.prompt_text(choice, "think") == f"Question: {choice.question}\nOptions:\nA. bed\nB. chair\nThink."
    assert common.prompt_text(number, "think") == f"{number.question}\nA number = n."
    assert common.prompt_text(choice, "locate").endswith(common.OUR_INSTRUCTIONS["locate"])
    assert capsys.readouterr().err == ""
    (tmp_path / common.WORDING_FILE).write_text(json.dumps({"think": "Ponder.", "direct": common.OUR_INSTRUCTIONS["direct"]}))
    assert common.use_instructions(tmp_path)["think"] == "Ponder."
    assert "instructions.json: this model was trained with its own wording for think\n" in capsys.readouterr().err
    assert common.use_instructions(tmp_path, {"think": "Mine."})["think"] == "Mine."  # a flag comes first


@pytest.mark.parametrize("word", ["think", "think=", "thnik=x", "think=@none.txt", "think=a <|im_end|>", "think-word=x"])
def test_an_instruction_that_cannot_be_used_is_named(word):
    assert f"--instruction {word}" in message(common.read_instructions, [word])


def test_a_broken_file_of_instructions_is_named(tmp_path):
    for content in ("{", "3", '{"think": 3}', '{"ponder": "x"}'):
        (tmp_path / common.WORDING_FILE).write_text(content)
        assert str(tmp_path / common.WORDING_FILE) in message(common.instructions_of, tmp_path)


def test_training_writes_its_wording_and_eval_asks_in_it(tiny_model, photos, tmp_path, monkeypatch, ours):
    chosen = {"direct": "Say the letter, or the number."}
    monkeypatch.setattr(runs, "draw_curves", lambda *args: None)
    settings = stage2_understand.UnderstandSettings(
        model=str(tiny_model), data=str(photos), out=str(tmp_path / "stage2"), load="fp32", max_steps=1, eval_scenes=0,
        train_batch=1, processes=1, instruction=chosen, max_picture_tokens=4,
    )  # fmt: skip
    stage2_understand.work(settings)
    assert json.loads((tmp_path / "stage2/model" / common.WORDING_FILE).read_text()) == common.OUR_INSTRUCTIONS | chosen
    asked, answer = [], common.branch_generate

    def ask(backbone, prefixes, branches, *rest):
        asked.extend(backbone.tokenizer.decode(ids) for group in branches for ids in group)
        return answer(backbone, prefixes, branches, 1)

    monkeypatch.setattr(common, "branch_generate", ask)
    flags = f"--benchmarks stage0 --data {photos} --processes 1 --mode direct --min_picture_tokens 4 --max_picture_tokens 4"
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(tmp_path / "stage2/model"), *flags.split()])
    evaluation.main()
    assert len(asked) == 4 and sum(chosen["direct"] in text for text in asked) == 3  # the fourth asks for a text
    head = json.loads((tmp_path / "stage2/eval/predictions.jsonl").read_text().splitlines()[0])
    assert head["settings"]["prompts"] == common.OUR_INSTRUCTIONS | chosen
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--instruction", "direct=Other words."])
    assert "was made with prompts" in message(evaluation.main)


def test_traces_in_other_words_are_pointed_out(ladder_data, backbone, ours, capsys):
    common.load_scenes(ladder_data, ["coldstart"], backbone)
    assert "--instruction" not in capsys.readouterr().err
    common.use_instructions("none", {"think": "Ponder: {question} Slowly."})
    common.load_scenes(ladder_data, ["coldstart"], backbone)
    assert "do not ask as --instruction think does" in capsys.readouterr().err


# A model folder for older readers


def test_the_written_folder_has_the_names_of_transformers_4(tiny_model, tmp_path):
    """Of a base with the configuration of Qwen's own repository: all in one level, lists of special tokens. Its
    head is tied, which transformers 5 writes at the top level alone."""
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_model.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    text, rope = config.pop("text_config"), None
    rope = text.pop("rope_parameters")
    for name in ("layer_types", "model_type", "dtype"):
        text.pop(name, None)
    config |= text | {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"additional_special_tokens": ["<|image_pad|>"]}))
    backbone = common.load_backbone(base, "fp32", 4, 8)
    files.save_model(backbone, tmp_path)
    written, text = (config := json.loads((tmp_path / "model/config.json").read_text())), config["text_config"]
    assert written["tie_word_embeddings"] is text["tie_word_embeddings"] is True
    assert text["rope_theta"] == rope["rope_theta"]
    assert text["rope_scaling"] == {"mrope_section": rope["mrope_section"], "rope_type": "default"}
    pictures = json.loads((tmp_path / "model/preprocessor_config.json").read_text())
    assert (pictures["min_pixels"], pictures["max_pixels"]) == (3136, 6272)
    assert pictures["size"] == {"shortest_edge": 3136, "longest_edge": 6272}
    words = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    assert words["additional_special_tokens"] == ["<|image_pad|>"] and "extra_special_tokens" not in words
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = common.load_backbone(tmp_path / "model", "fp32")
    assert (again.processor.size["shortest_edge"], again.processor.size["longest_edge"]) == (3136, 6272)
    assert again.model.config.text_config.rope_parameters["mrope_section"] == rope["mrope_section"]
    assert again.tokenizer.get_vocab() == backbone.tokenizer.get_vocab()
    for (name, one), (_, other) in zip(backbone.model.named_parameters(), again.model.named_parameters()):
        assert one.equal(other), name


# Videos: decord, or av where it has no wheels


def write_h264(path, pictures, rotation=0):
    """An mp4 as a phone writes it, with frames that depend on those before and behind them; rotation: degrees in its header."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30, options={"g": "12", "bf": "2", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = *pictures[0].size, "yuv420p"
        for picture in [*map(av.VideoFrame.from_image, pictures), None]:
            file.mux(stream.encode(picture))
    content, (width, height) = bytearray(path.read_bytes()), pictures[0].size
    one, matrix = 65536, {
        90: (0, 65536, 0, -65536, 0, 0, height << 16, 0), 180: (-65536, 0, 0, 0, -65536, 0, width << 16, height << 16)
    }  # fmt: skip
    if rotation:
        start = content.find(b"tkhd") + 44
        assert struct.unpack(">i", content[start : start + 4]) == (one,)
        content[start : start + 36] = struct.pack(">9i", *matrix[rotation], 1 << 30)
        path.write_bytes(content)


@pytest.mark.parametrize("rotation", [0, 90, 180])
def test_both_readers_of_videos_give_the_same_frames(tmp_path, rotation):
    pytest.importorskip("decord")
    y, x = np.mgrid[0:96, 0:128]
    made = [Image.fromarray(np.stack([2 * x, 2 * y, 0 * x + 6 * n], -1).astype(np.uint8)) for n in range(40)]
    write_h264(tmp_path / "a.mp4", made, rotation)
    for frames in (16, 99):
        one, other = (common.read_video(tmp_path / "a.mp4", frames, name) for name in ("decord", "av"))
        assert len(one) == len(other) == min(frames, 40)
        assert all(a.size == b.size and np.abs(np.int16(a) - np.int16(b)).max() <= 2 for a, b in zip(one, other))
    if not rotation:
        picks = np.linspace(0, 39, 16).round().astype(int)
        read = common.read_video(tmp_path / "a.mp4", 16, "av")
        assert [round(float(np.asarray(picture)[..., 2].mean()) / 6) for picture in read] == picks.tolist()


@pytest.mark.parametrize("part", [0.001, 0.3, 0.9])
def test_av_names_a_video_that_was_cut(tmp_path, part):
    av = pytest.importorskip("av")
    write_h264(tmp_path / "a.mp4", [Image.new("RGB", (64, 48), (9 * n,) * 3) for n in range(24)])
    with av.open(str(tmp_path / "a.mp4")) as old, av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    assert len(common.read_video(tmp_path / "b.mp4", 4, "av")) == 4
    for name in ("a.mp4", "b.mp4"):  # its index behind or before the frames
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(part * len(content))])
        assert f"{name} cannot be read as a video" in message(common.read_video, tmp_path / name, 4, "av")


def test_av_reads_videos_where_decord_is_missing(tmp_path, monkeypatch):
    write_h264(tmp_path / "a.mp4", [Image.new("RGB", (64, 48), (200, 0, 0))] * 3)
    find = common.importlib.util.find_spec
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None if name == "decord" else find(name))
    monkeypatch.setitem(sys.modules, "decord", None)  # an import would fail
    assert [picture.size for picture in common.read_video(tmp_path / "a.mp4", 8)] == [(64, 48)] * 3


# Other systems


class Waiting:
    """Processes whose first wait is interrupted, as by a Ctrl-C that is handled on Windows."""

    waits = 0

    def join(self):
        self.waits += 1
        if self.waits == 1:
            raise InterruptedError(4, "Interrupted system call")
        return self.waits > 2


def test_a_handled_ctrl_c_does_not_end_the_wait_for_processes(monkeypatch, tmp_path):
    processes = Waiting()
    monkeypatch.setattr(runs.torch.multiprocessing, "start_processes", lambda *args, **kwargs: processes)
    monkeypatch.setattr(runs.torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    runs.launch(print, runs.TrainSettings(processes=2))
    assert processes.waits == 3


def test_a_checkpoint_is_not_mapped_on_windows(monkeypatch, tmp_path):
    """A file that is mapped cannot be replaced there."""
    seen = []
    monkeypatch.setattr(runs.torch, "load", lambda *args, mmap, **more: seen.append(mmap) or {"step": 1, "config": {}})
    monkeypatch.setattr(runs, "refuse_others", lambda *args: None)
    run = object.__new__(runs.Run)
    run.folder, run.checkpoint, run.config = tmp_path, tmp_path / "checkpoint.pt", {}
    for system in ("win32", "linux"):
        monkeypatch.setattr(runs.sys, "platform", system)
        run.read_checkpoint()
    assert seen == [False, True]


def test_a_network_that_gloo_cannot_use_is_explained():
    said = runs.error_text(RuntimeError("makeDeviceForHostname(): unsupported gloo device"), runs.TrainSettings())
    assert said.endswith("Use --processes 1.")


def test_files_are_replaced_never_renamed():
    for path in [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")]:
        assert not re.search(r"\.rename\(|os\.setsid|killpg|import resource|getppid", path.read_text(encoding="utf-8")), path


PLATFORMS = {
    "x86_64-manylinux_2_28": True, "aarch64-manylinux_2_28": False, "aarch64-apple-darwin": False, "x86_64-pc-windows-msvc": True
}  # fmt: skip


@pytest.mark.skipif("RESOLVE" not in os.environ, reason="asks PyPI; to run it: pip install uv, then set RESOLVE=1")
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("platform,decord", PLATFORMS.items())
def test_every_requirement_has_a_wheel(platform, decord, version, tmp_path):
    """For macOS 14 and glibc 2.28, the oldest that torch supports. decord: whether it has a wheel there."""
    command = ["uv", "pip", "compile", "requirements.txt", "--python-platform", platform, "--python-version", version, "-q",
               "--only-binary", ":all:", "--no-header", "--format", "pylock.toml", "-o", str(tmp_path / "pylock.toml")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packages = {part["name"]: part for part in tomllib.loads((tmp_path / "pylock.toml").read_text())["packages"]}
    assert ("decord" in packages) == decord and all("wheels" in part for part in packages.values())
