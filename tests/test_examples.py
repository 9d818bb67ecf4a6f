"""Rows of the released schema -> examples; and what is said about a row that is wrong."""

import json
import random
import shlex
import shutil
import zipfile
from collections import Counter
from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import common

SPATIAL = "spld_spatial_data.jsonl"
GROUNDING = "spld_grounding_data.jsonl"
COLDSTART = "spld_coldstart_data.jsonl"
SEVEN = {"relative direction", "relative distance", "appearance order", "absolute distance", "object size", "object count",
         "room size"}  # fmt: skip


BOXES_TO_1000 = SimpleNamespace(family=common.FAMILIES["qwen3_vl"])  # what reading needs of a backbone


@pytest.fixture
def data(ladder_data, tmp_path):
    """A copy of the released folder whose files a test may spoil; its pictures are links to those of the original."""
    shutil.copytree(ladder_data, tmp_path / "data", copy_function=lambda old, new: None)
    for path in ladder_data.rglob("*.jpg"):
        (tmp_path / "data" / path.relative_to(ladder_data)).hardlink_to(path)
    for path in ladder_data.glob("*.jsonl"):
        shutil.copy(path, tmp_path / "data")
    return tmp_path / "data"


def change(data, name, row, **fields):
    """Change fields of one row (counted from 1); a value of None takes the field away."""
    rows = [json.loads(line) for line in (data / name).read_text().splitlines()]
    rows[row - 1] = {key: value for key, value in (rows[row - 1] | fields).items() if value is not None}
    (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def message(read, *args):
    """What the user reads when this fails."""
    with pytest.raises(SystemExit) as stopped:
        read(*args)
    return str(stopped.value)


# ------------------------------------------------------------------------------------------------
# Right files
# ------------------------------------------------------------------------------------------------


def test_all_rows_of_the_released_files_are_read(ladder_data):
    spatial = common.read_examples(ladder_data, "spatial")
    located, worked = common.read_examples(ladder_data, "locate"), common.read_examples(ladder_data, "coldstart")
    assert (len(spatial), len(located), len(worked)) == (14, 6, 4)
    assert {example.question_type for example in spatial} == SEVEN
    assert {example.question_type for example in located + worked} == {"locate", "coldstart"}
    assert {(example.data_type, len(example.images)) for example in spatial} == {
        ("single_image", 1), ("multi_view", 8), ("video", 16)
    }  # fmt: skip
    assert len({example.id for example in spatial + located + worked}) == 24


def test_a_spatial_row_is_read_field_by_field(ladder_data):
    example = common.read_examples(ladder_data, "spatial")[1]
    picture = (ladder_data / "images" / "scene0011_00" / "20.jpg").resolve()
    assert example.question.startswith("Measuring from the closest point")
    assert (example.images, example.options, example.answer) == ((str(picture),), ["A. chair", "B. lamp"], "A")
    assert (example.question_type, example.data_type, example.solution) == ("relative distance", "single_image", "")


def test_a_grounding_row_keeps_its_boxes_and_a_coldstart_row_its_solution(ladder_data):
    located, worked = common.read_examples(ladder_data, "locate"), common.read_examples(ladder_data, "coldstart")
    boxes = [{"bbox_2d": [64, 48, 320, 240], "label": "chair"}, {"bbox_2d": [300, 200, 620, 470], "label": "table"}]
    assert (located[0].answer, located[1].answer) == (boxes[:1], boxes)
    assert common.boxes_text(located[0].answer) == '[{"bbox_2d":[64,48,320,240],"label":"chair"}]'
    assert worked[0].solution == "<think>The chair is at 64, the table at 300.</think><answer>A</answer>"
    assert worked[0].question.endswith(common.INSTRUCTIONS["think"]) and "B. right" in worked[0].question


def test_the_mark_of_a_picture_is_stripped_from_questions(ladder_data):
    raw = (ladder_data / SPATIAL).read_text() + (ladder_data / COLDSTART).read_text()
    assert raw.count("<image>") >= 5
    for kind in ("spatial", "locate", "coldstart"):
        for example in common.read_examples(ladder_data, kind):
            assert "<image>" not in example.question
            assert example.question == example.question.strip() != ""


def test_marks_of_pictures_and_videos_are_stripped_wherever_they_stand(data):
    change(data, SPATIAL, 1, question="<video>\n<image> Where <image>is it?<video>")
    assert common.read_examples(data, "spatial")[0].question == "Where is it?"


def test_what_was_read_is_printed_once(data, capsys):
    for _ in range(2):
        common.load_scenes(data, ["spatial", "locate"], BOXES_TO_1000)
    spatial, grounding = capsys.readouterr().err.splitlines()
    rows = [json.loads(line) for line in (data / SPATIAL).read_text().splitlines()]
    counts = sorted(Counter(row["question_type"] for row in rows).items())
    assert spatial == f"read {data / SPATIAL}: 14 rows ({', '.join(f'{kind} {count}' for kind, count in counts)})"
    assert grounding == f"read {data / GROUNDING}: 6 rows"


def test_other_processes_print_no_counts(data, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    common.load_scenes(data, ["locate"], BOXES_TO_1000)
    assert capsys.readouterr().err == ""


def test_video_frames_are_put_in_the_order_of_their_numbers(ladder_data):
    released = [json.loads(line) for line in (ladder_data / SPATIAL).read_text().splitlines()]
    stems = [name.split("/")[1] for row in released if row["data_type"] == "video" for name in row["image"]]
    assert stems[:4] == ["0.jpg", "100.jpg", "1040.jpg", "120.jpg"]  # as strings
    videos = [e for kind in ("spatial", "coldstart") for e in common.read_examples(ladder_data,
    kind) if e.data_type == "video"]
    assert len(videos) == 5
    for example in videos:
        assert [name.rsplit("/", 1)[1] for name in example.images] == [f"{n}.jpg" for n in (*range(0, 300, 20), 1040)]


def test_views_keep_the_order_of_the_row(data):
    names = [f"scene0011_00/{n}.jpg" for n in (40, 0, 20)]
    change(data, SPATIAL, 7, image=names)
    images = common.read_examples(data, "spatial")[6].images
    assert [image.rsplit("/", 1)[1] for image in images] == ["40.jpg", "0.jpg", "20.jpg"]


def test_padded_frame_numbers_are_sorted_as_numbers(data):
    names = []
    for stem in ("frame-000100", "frame-000020", "frame-001040"):
        names.append(f"scene0022_01/{stem}.jpg")
        shutil.copy(data / "images" / "scene0022_01" / "0.jpg", data / "images" / names[-1])
    change(data, SPATIAL, 11, image=names)
    images = common.read_examples(data, "spatial")[10].images
    assert [image[-10:] for image in images] == ["000020.jpg", "000100.jpg", "001040.jpg"]


def test_one_picture_may_be_named_without_a_list(data):
    change(data, SPATIAL, 1, image="scene0011_00/20.jpg")
    first, second, *_ = common.read_examples(data, "spatial")
    assert first.images == second.images


def test_blank_lines_are_skipped(data):
    text = (data / SPATIAL).read_text()
    (data / SPATIAL).write_text("\n" + text.replace("\n", "\n\n  \n"))
    assert len(common.read_examples(data, "spatial")) == 14


def test_questions_about_the_same_pictures_share_a_scene(ladder_data):
    examples = common.read_examples(ladder_data, "locate") + common.read_examples(ladder_data, "spatial")
    scenes = common.group_scenes(examples)
    assert [(scene.data_type, len(scene.images), len(scene.examples)) for scene in scenes] == [
        ("single_image", 1, 8), ("single_image", 1, 4), ("multi_view", 8, 4), ("video", 16, 4)
    ]  # fmt: skip
    assert sorted(e.id for scene in scenes for e in scene.examples) == sorted(e.id for e in examples)
    for scene in scenes:
        assert {(example.images, example.data_type) for example in scene.examples} == {(scene.images, scene.data_type)}


def test_the_same_pictures_as_views_and_as_a_video_are_two_scenes(ladder_data):
    views = [e for e in common.read_examples(ladder_data, "spatial") if e.data_type == "multi_view"]
    views[0].data_type = "video"
    assert len(common.group_scenes(views)) == 2


def test_a_prompt_holds_question_options_and_instruction(ladder_data):
    choice, number = (common.read_examples(ladder_data, "spatial")[n] for n in (1, 3))
    assert common.prompt_text(choice, "direct") == (
        f"{choice.question}\nOptions:\nA. chair\nB. lamp\nAnswer with the letter or number only."
    )
    assert common.prompt_text(number, "think") == f"{number.question}\n{common.INSTRUCTIONS['think']}"


QWEN = (  # how Qwen's tokenizer cuts a text before its merges
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACES = [" ", "\n", "\r\n", "\t", "\u00a0", "\u2003", ""]


@pytest.fixture(scope="module")
def merging():
    """A tokenizer that merges line ends, as Qwen's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(["assistant\n\n<think> \n\n so\n \n</think>\n\n\n\n<answer>\n", "\n\n\n"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_pieces_of_a_conversation_encode_as_the_whole_whatever_spaces_are_around_them(merging, data):
    """Rows as they are read from files; system prompt, picture, question and solution meet where a text is cut."""
    assert len(merging("\n\n", add_special_tokens=False)["input_ids"]) == 1
    rng = random.Random(0)

    def spaced(*texts):
        return "".join("".join(rng.choices(SPACES, k=rng.randint(0, 3))) + text for text in (*texts, ""))

    rows = [json.loads(line) for line in (data / COLDSTART).read_text().splitlines()]
    cold = [rows[n % 4] | {"prompt": spaced("<image>", "Where", "is it?"), "solution": spaced("<think>", "so\n\n", "</think>B")}
            for n in range(300)]  # fmt: skip
    rows = [json.loads(line) for line in (data / SPATIAL).read_text().splitlines()]
    asked = [rows[2] | {"question": spaced("How", "far?"), "answer": spaced("0.7")} for _ in range(100)]
    changed = 0
    for name, kind, rows in ((COLDSTART, "coldstart", cold), (SPATIAL, "spatial", asked)):
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row, example in zip(rows, common.read_examples(data, kind)):
            prompt, completion = common.training_pair(example)
            start = f"{common.PREFIX_START}<|vision_start|><|image_pad|><|vision_end|>"
            pieces = [token for text in (start, prompt, completion) for token in common.encode_text(merging, text)]
            assert pieces == merging(start + prompt + completion, add_special_tokens=False)["input_ids"]
            assert completion == (row["solution"] if kind == "coldstart" else row["answer"]).strip() + "<|im_end|>"
            changed += (row["solution"] if kind == "coldstart" else row["answer"]) + "<|im_end|>" != completion
    assert changed > 200


# ------------------------------------------------------------------------------------------------
# Wrong files: each message names the file and the place
# ------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path):
    said = message(common.read_examples, tmp_path, "spatial")
    assert str(tmp_path / SPATIAL) in said and "missing" in said


@pytest.mark.parametrize("text", ["", "\n \n"], ids=["nothing", "blank lines"])
def test_an_empty_file_is_named(tmp_path, text):
    (tmp_path / SPATIAL).write_text(text)
    said = message(common.read_examples, tmp_path, "spatial")
    assert str(tmp_path / SPATIAL) in said and "no rows" in said


@pytest.mark.parametrize("line", ['{"a": 1', "{'a': 1}", "word", '{"a": 1} {"b": 2}'])
def test_a_line_that_is_not_json_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n' + line + '\n{"a": 1}\n')
    said = message(common.read_jsonl, tmp_path / "x.jsonl")
    assert str(tmp_path / "x.jsonl") in said and "line 3" in said


@pytest.mark.parametrize("line", ["[1, 2]", "3", '"word"', "null"])
def test_a_line_that_is_not_an_object_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n' + line + "\n")
    said = message(common.read_jsonl, tmp_path / "x.jsonl")
    assert str(tmp_path / "x.jsonl") in said and "line 2" in said and line in said


@pytest.mark.parametrize(
    "name,field",
    [(SPATIAL, field) for field in ("question", "question_type", "answer", "image", "data_type")]
    + [(GROUNDING, field) for field in ("question", "image", "data_type")]
    + [(COLDSTART, field) for field in ("prompt", "solution", "image", "data_type")],
)
@pytest.mark.parametrize("value", [None, ""], ids=["missing", "empty"])
def test_a_field_that_is_missing_or_empty_is_named(data, name, field, value):
    change(data, name, 3, **{field: value})
    kind = {SPATIAL: "spatial", GROUNDING: "locate", COLDSTART: "coldstart"}[name]
    said = message(common.read_examples, data, kind)
    assert str(data / name) in said and "row 3" in said and repr(field) in said


KINDS = {SPATIAL: "spatial", GROUNDING: "locate", COLDSTART: "coldstart"}


@pytest.mark.parametrize(
    "name,field,value",
    [(SPATIAL, "question", " \n"), (GROUNDING, "question", "<image>"), (COLDSTART, "prompt", "<video> <image>\n"),
     (COLDSTART, "solution", "\n\n"), (SPATIAL, "answer", " ")],
)  # fmt: skip
def test_a_text_of_spaces_and_marks_alone_is_named(data, name, field, value):
    change(data, name, 2, **{field: value})
    said = message(common.read_examples, data, KINDS[name])
    assert f"{data / name} row 2 " in said and (repr(field) in said or "the question has no text" in said)


@pytest.mark.parametrize(
    "name,field",
    [(SPATIAL, "question"), (SPATIAL, "options"), (GROUNDING, "question"), (GROUNDING, "label"), (COLDSTART, "prompt"),
     (COLDSTART, "solution")],
)  # fmt: skip
def test_a_special_token_in_a_text_is_named(data, name, field):
    for token in ("<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|box_start|>", "<|endoftext|>"):
        text = f"Is it {token}here?"
        value = {"options": ["A. left", f"B. {text}", "C. x", "D. y"], "label": [{"bbox_2d": [1, 2, 30, 40], "label": text}]}
        change(data, name, 2, **{"answer" if field == "label" else field: value.get(field, text)})
        said = message(common.read_examples, data, KINDS[name])
        assert str(data / name) in said and "row 2" in said and token in said


def test_a_special_token_that_stripping_makes_is_named(data):
    change(data, SPATIAL, 2, question="Is it <|im_<image>end|> here?")
    assert "<|im_end|>" in message(common.read_examples, data, "spatial")


def test_every_special_token_of_the_tokenizer_is_named_and_ordinary_brackets_are_not(data, tiny_model):
    added = json.loads((tiny_model / "tokenizer.json").read_text())["added_tokens"]
    special = [token["content"] for token in added if token["special"]]
    assert len(special) == 7
    for token in special:
        change(data, SPATIAL, 1, question=f"a{token}b")
        assert token in message(common.read_examples, data, "spatial")
    for text in ("Is a < b | c > d?", "<think> is a word", "|im_end|", "<| x |>", "a <|> b"):
        change(data, SPATIAL, 1, question=text)
        assert common.read_examples(data, "spatial")[0].question == text


def test_an_answer_of_zero_is_an_answer(data):
    change(data, SPATIAL, 3, answer="0")
    assert common.read_examples(data, "spatial")[2].answer == "0"


def test_a_picture_that_does_not_exist_is_named(data):
    change(data, SPATIAL, 4, image=["scene0011_00/20.jpg", "scene0011_00/7.jpg"])
    said = message(common.read_examples, data, "spatial")
    assert str(data / SPATIAL) in said and "row 4" in said and "7.jpg" in said and "does not exist" in said


def packed(data, inside):
    """The pictures of the folder in images.zip, under `inside`, as after a download: not unpacked."""
    with zipfile.ZipFile(data / "images.zip", "w") as archive:
        for path in sorted((data / "images").rglob("*.jpg")):
            archive.write(path, inside + path.relative_to(data / "images").as_posix())
    shutil.rmtree(data / "images")


@pytest.mark.parametrize("inside", ["", "images/", "data/images/"])
@pytest.mark.parametrize("place", ["", "images"])
def test_pictures_in_a_zip_are_named_with_the_command_that_unpacks_them(data, inside, place):
    packed(data, inside)
    (data / place).mkdir(exist_ok=True)
    archive = (data / "images.zip").rename(data / place / "images.zip")
    said = message(common.read_examples, data, "spatial")
    assert f"{data / SPATIAL} row 1 " in said and "does not exist" in said
    command = shlex.split(said.split(": ")[-1])
    assert command[:4] == ["unzip", "-q", str(archive), "-d"]
    zipfile.ZipFile(archive).extractall(command[4])
    assert len(common.read_examples(data, "spatial")) == 14


def test_a_zip_with_other_folders_or_cut_is_named(data):
    packed(data, "elsewhere/")
    said = message(common.read_examples, data, "spatial")
    assert f"{data / 'images.zip'} has it as elsewhere/scene0011_00/20.jpg" in said
    (data / "images.zip").write_bytes((data / "images.zip").read_bytes()[:-100])
    said = message(common.read_examples, data, "spatial")
    assert f"{data / 'images.zip'} is not a whole zip file" in said and "20.jpg does not exist" in said


def test_a_folder_is_not_a_picture(data):
    change(data, SPATIAL, 4, image=["scene0011_00"])
    said = message(common.read_examples, data, "spatial")
    assert str(data / SPATIAL) in said and "row 4" in said and "scene0011_00" in said


@pytest.mark.parametrize("climb",
["../secret.jpg", "scene0011_00/../../secret.jpg", "../images2/secret.jpg", "absolute"])
def test_a_picture_outside_of_the_folder_is_refused_though_it_exists(data, climb):
    (data / "images2").mkdir()
    for place in (data / "secret.jpg", data / "images2" / "secret.jpg"):
        shutil.copy(data / "images" / "scene0011_00" / "20.jpg", place)
    name = str(data / "secret.jpg") if climb == "absolute" else climb
    change(data, SPATIAL, 2, image=["scene0011_00/20.jpg", name])
    said = message(common.read_examples, data, "spatial")
    assert str(data / SPATIAL) in said and "row 2" in said and name in said and "outside" in said


def test_a_new_question_type_needs_no_constant(data):
    """With options it is a choice, without it is a number."""
    change(data, SPATIAL, 5, question_type="colour")
    change(data, SPATIAL, 6, question_type="weight")
    choice, number = common.read_examples(data, "spatial")[4:6]
    assert (choice.question_type, number.question_type) == ("colour", "weight")
    scores, legal = common.score_answers([f"({choice.answer})", "203"], [choice, number])
    assert scores.tolist() == [1.0, 1.0] and legal.all()


@pytest.mark.parametrize("answer,options",
[("E", ["A. left", "B. right"]), ("left", ["A. left"]), ("A", None), ("A", [])])
def test_an_answer_that_is_no_letter_of_the_options_is_named(data, answer, options):
    change(data, SPATIAL, 1, answer=answer, options=options)
    said = message(common.read_examples, data, "spatial")
    assert str(data / SPATIAL) in said and "row 1 " in said and repr(answer) in said


@pytest.mark.parametrize("answer", ["many", "2 or 3", "nan", "inf", "1e400", "A"])
def test_an_answer_of_a_numeric_question_that_is_no_number_is_named(data, answer):
    change(data, SPATIAL, 3, answer=answer)
    said = message(common.read_examples, data, "spatial")
    assert str(data / SPATIAL) in said and "row 3" in said and repr(answer) in said


GOOD = {"bbox_2d": [1, 2, 30, 40], "label": "chair"}


@pytest.mark.parametrize(
    "answer",
    [
        [],
        "chair",
        GOOD,
        [GOOD, {"label": "chair"}],
        [GOOD, {"bbox_2d": [1, 2, 30, 40]}],
        [GOOD, {"bbox_2d": [1, 2, 30], "label": "chair"}],
        [GOOD, {"bbox_2d": [30, 2, 1, 40], "label": "chair"}],  # reversed
        [GOOD, {"bbox_2d": [1, 40, 30, 2], "label": "chair"}],
        [GOOD, {"bbox_2d": [1, 2, 1, 40], "label": "chair"}],  # empty
        [GOOD, {"bbox_2d": [1, 2, float("nan"), 40], "label": "chair"}],
        [GOOD, {"bbox_2d": [1, 2, float("inf"), 40], "label": "chair"}],
        [GOOD, {"bbox_2d": [1, 2, 10**400, 40], "label": "chair"}],
        [GOOD, {"bbox_2d": ["1", "2", "30", "40"], "label": "chair"}],
        [GOOD, [1, 2, 30, 40]],
        [GOOD, GOOD | {"picture": 2}],  # the row has one
        [GOOD, GOOD | {"picture": 1.0}],
        None,
    ],
    ids=["no box", "text", "no list", "no corners", "no label", "three corners", "x reversed", "y reversed",
    "empty box", "nan", "inf", "huge", "strings", "bare corners", "second picture", "picture as fraction", "missing"],
)  # fmt: skip
def test_a_wrong_box_is_named(data, answer):
    change(data, GROUNDING, 2, answer=answer)
    said = message(common.read_examples, data, "locate")
    assert str(data / GROUNDING) in said and "row 2" in said and "bbox_2d" in said
    if isinstance(answer, list) and len(answer) == 2 and isinstance(answer[1], dict):
        assert str(answer[1]) in said  # the wrong one, not the good one before it


def test_check_answer_begins_with_the_place_and_lets_right_answers_pass(ladder_data):
    examples = [e for kind in ("spatial", "locate", "coldstart") for e in common.read_examples(ladder_data, kind)]
    for example in examples:
        common.check_answer(example, "here")
    examples[0].answer = "Z"
    assert message(common.check_answer, examples[0], "some.jsonl row 9").startswith("some.jsonl row 9")
