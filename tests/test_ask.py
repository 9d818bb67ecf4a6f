"""eval.py --ask: what is printed, the boxes that an answer names, and bad input."""

import sys

import numpy as np
import pytest
from PIL import Image
from test_pictures import write_mp4

import common
import eval as evaluation
from support import report

QUESTION = 'Which is closer to the chair, the table or the lamp? "A. table" or "B. lamp"?'


def box(label, *sides):
    return f'{{"label":"{label}","bbox_2d":[{", ".join(map(str, sides))}]}}'


NAMED = {  # a completion -> the boxes that it names, if the model saw three pictures
    "no box, just 3 chairs": [],
    f"[{box('a', 1, 2, 3, 4)}]": [("answer", 0, "a", [1, 2, 3, 4])],
    f"<think> {box('a', 1, 2, 3, 4)} size 7 </think><answer>7</answer>": [("thought", 0, "a", [1, 2, 3, 4])],
    f"{box('a', 1, 2, 3, 4)} worked <answer>7</answer>": [("thought", 0, "a", [1, 2, 3, 4])],
    f"<think>{box('a', 1, 2, 3, 4)}": [("thought", 0, "a", [1, 2, 3, 4])],  # cut
    f"<think>x</think><answer>```json [{box('a', 1, 2, 3.5, 4)}]```</answer>": [("answer", 0, "a", [1, 2, 3.5, 4])],
    f"<think>In picture 2 {box('a', 1, 2, 3, 4)}, {box('b', 1, 2, 3, 4)}; Frame #3: {box('c', 1, 2, 3, 4)}</think>": [
        ("thought", 1, "a", [1, 2, 3, 4]), ("thought", 1, "b", [1, 2, 3, 4]), ("thought", 2, "c", [1, 2, 3, 4])],
    '[{"image": 3, "bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2, 3, 4], "label": "b", "image": 2}]': [
        ("answer", 2, "", [1, 2, 3, 4]), ("answer", 1, "b", [1, 2, 3, 4])],
    '<think> [{"label":"a","picture":2,"bbox_2d":[1,2,3,4]}] picture 2: 0,1; a 1,0; [{"label":"b","picture":3,'
    '"bbox_2d":[1,2,3,4]}] x: a </think>': [
        ("thought", 1, "a", [1, 2, 3, 4]), ("thought", 2, "b", [1, 2, 3, 4])],  # a thought of the toy
    f"[{box('a', 1, 2, 3, 4)}] picture 2: [{box('b', 1, 2, 3, 4)}]": [
        ("answer", 0, "a", [1, 2, 3, 4]), ("answer", 1, "b", [1, 2, 3, 4])],
    f"picture 9, picture 0, picture 1024, a picture {box('picture', 12, 2, 30, 4)}": [("answer", 0, "picture", [12, 2, 30, 4])],
    f"{box('a', 3, 2, 1, 4)} {{1}} {{'bbox_2d': 1}} {{\"bbox_2d\": [1, 2, 3]}} {{\"bbox_2d\": null}} {{": [],  # no boxes
}  # fmt: skip


@pytest.mark.parametrize("text", NAMED)
def test_the_boxes_of_a_completion_are_found_with_their_part_and_picture(text):
    assert report.named_boxes(text, 3) == NAMED[text]


def test_a_text_without_end_is_searched_in_no_time():
    for text in ("{" * 500_000, '{"bbox_2d": [1, 2' * 50_000, "picture " * 100_000 + "9" * 100_000):
        assert report.named_boxes(text, 3) == []


def test_the_pictures_shown_are_some_at_equal_steps_and_all_with_boxes():
    assert report.shown_pictures(1, []) == [0] and report.shown_pictures(3, []) == [0, 1, 2]
    assert report.shown_pictures(16, []) == [0, 5, 10, 15]
    assert report.shown_pictures(16, [("answer", 7, "", None), ("answer", 5, "", None)]) == [0, 5, 7, 10, 15]


def asked(backbone, images, kind, *questions):
    """(the prefix, prompts) of questions about pictures."""
    scene = common.Scene(tuple(map(str, images)), kind, [])
    texts = [f"{question}\n{common.INSTRUCTIONS['think']}{common.BRANCH_END}" for question in questions]
    return common.encode_scenes(backbone, [scene])[0], [list(common.encode_text(backbone.tokenizer, text)) for text in texts]


def test_streamed_answers_grow_by_a_token_and_end_as_branch_generate_ends(backbone, photo, tmp_path):
    photo(120, 90).save(tmp_path / "a.png")
    prefix, prompts = asked(backbone, [tmp_path / "a.png"], "single_image", "How many chairs are there?", "x", QUESTION)
    whole = common.branch_generate(backbone, [prefix], [prompts], 40)[0]
    backbone.stop = [*backbone.stop, whole[1][9]]  # a common token: the rows end at different times
    whole = common.branch_generate(backbone, [prefix], [prompts], 40)[0]
    assert len({len(ids) for ids in whole}) > 1
    seen = [[list(ids) for ids in completions] for completions in evaluation.stream_answers(backbone, prefix, prompts, 40)]
    assert seen[-1] == whole and len(seen) == max(map(len, whole))
    for count, completions in enumerate(seen, 1):
        assert completions == [ids[:count] for ids in whole]


@pytest.fixture
def run_ask(tiny_model, monkeypatch, tmp_path, capsys):
    """run_ask(images, *flags, says=[...]) -> the lines printed. The model writes the texts `says`, or what it likes."""

    def run(images, *flags, says=(), model=tiny_model):
        def stream(backbone, prefix, prompts, limit):
            ids = [[*common.encode_text(backbone.tokenizer, text), backbone.stop[0]] for text in says]
            assert len(prompts) == len(ids)
            for count in range(1, max(map(len, ids)) + 1):
                yield [some[:count] for some in ids]

        if says:
            monkeypatch.setattr(evaluation, "stream_answers", stream)
        command = ["eval.py", "--out", str(tmp_path / "out"), "--images", *map(str, images), *map(str, flags)]
        monkeypatch.setattr(sys, "argv", command + ["--model", str(model)] * bool(model))
        evaluation.main()
        return capsys.readouterr().out.removesuffix("\n").split("\n")

    return run


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    kept, save = [], report.save_figure
    monkeypatch.setattr(report, "save_figure", lambda figure, path: kept.append(figure) or save(figure, path))
    return kept


def test_boxes_are_printed_and_drawn_in_pixels_of_the_original_picture(run_ask, photo, figures, tmp_path):
    """The tiny model sees 640 x 480 as 112 x 84: a box is 40 / 7 times as large in the file."""
    photo(640, 480).save(tmp_path / "room.jpg")
    says = [f"<think> {box('chair', 28, 21, 56, 42)}</think><answer>B</answer>", f"[{box('lamp', 7, 14, 105, 84)}]"]
    out = run_ask([tmp_path / "room.jpg"], "--ask", QUESTION, "--ask", "Locate the lamp.", "--mode", "locate", says=says)
    assert out == [
        "", QUESTION, says[0], "answer: B", f"box in the thought: chair [160, 120, 320, 240] in {tmp_path / 'room.jpg'}",
        "", "Locate the lamp.", says[1], f"answer: {says[1]}",
        f"box in the answer: lamp [40, 80, 600, 480] in {tmp_path / 'room.jpg'}", "", f"wrote {tmp_path / 'out' / 'ask.png'}",
    ]  # fmt: skip
    first, second = figures[0].axes
    assert [patch.get_bbox().extents.tolist() for patch in first.patches] == [[160, 120, 320, 240]]
    assert [patch.get_bbox().extents.tolist() for patch in second.patches] == [[40, 80, 600, 480]]
    assert first.patches[0].get_edgecolor() != second.patches[0].get_edgecolor()  # a thought's and an answer's
    assert np.allclose(first.images[0].get_extent(), (0, 640, 480, 0)) and "lamp" in [text.get_text() for text in second.texts]
    with Image.open(tmp_path / "out" / "ask.png") as image:
        assert image.size == (880, round((8 * 0.75 + 0.7) * 2 * 110))


def test_boxes_are_drawn_on_the_picture_that_they_belong_to(run_ask, photo, figures, tmp_path):
    names = [tmp_path / f"{number}.png" for number in range(3)]
    for number, name in enumerate(names):
        photo(640, 480, seed=number).save(name)
    says = [f"<think>Picture 1 {box('a', 28, 21, 56, 42)}, picture 3 {box('$b_$', 0, 0, 112, 84)}</think><answer>2</answer>"]
    out = run_ask(names, "--ask", "How many?", says=says)
    assert [line for line in out if line.startswith("box")] == [
        f"box in the thought: a [160, 120, 320, 240] in {names[0]}", f"box in the thought: $b_$ [0, 0, 640, 480] in {names[2]}",
    ]  # fmt: skip
    assert [len(axis.patches) for axis in figures[0].axes] == [1, 0, 1]


def test_an_answer_is_written_while_it_grows_and_a_second_one_after_it(run_ask, monkeypatch, photo, tmp_path):
    photo(64, 48).save(tmp_path / "a.png")
    pieces, write = [], sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: pieces.append(text) or write(text))
    run_ask([tmp_path / "a.png"], "--ask", "one?", "two?", says=["first answer here", "B"])
    assert "first answer here" not in pieces and "first answer here" in "".join(pieces)
    assert "".join(pieces).index("answer: first answer here") < "".join(pieces).index("two?")


def test_questions_of_one_call_share_the_pictures_and_are_answered_as_alone(run_ask, monkeypatch, photo, tmp_path):
    """Pictures, an mp4, a folder of frames: every answer is that of eval's own batches, from one run of the vision tower."""
    frames = [photo(64, 48, seed=number) for number in range(4)]
    (tmp_path / "frames").mkdir()
    for number, frame in zip((0, 20, 100, 3), frames):  # by number: 0, 3, 20, 100
        frame.save(tmp_path / "frames" / f"{number}.jpg")
    write_mp4(tmp_path / "room.mp4", frames)
    folder = [tmp_path / "frames" / f"{number}.jpg" for number in (0, 3, 20, 100)]
    towers, real = [], common.encode_scenes
    monkeypatch.setattr(common, "encode_scenes", lambda *args, **how: towers.append(args) or real(*args, **how))
    for given, images, kind in (
        (folder[:1], folder[:1], "single_image"), (folder[1:], folder[1:], "multi_view"),
        ([tmp_path / "room.mp4"],) * 2 + ("video",), ([tmp_path / "frames"], folder, "video"),
    ):  # fmt: skip
        towers.clear()
        out = run_ask(given, "--max_new_tokens", 12, "--ask", "How many chairs are there?", "--ask", QUESTION)
        assert len(towers) == 1 and len(towers[0][1]) == 1
        backbone = towers[0][0]
        backbone.frames = 32
        prefix, prompts = asked(backbone, images, kind, "How many chairs are there?", QUESTION)
        text = "\n".join(out)
        answers = [common.decode(backbone, ids) for ids in common.branch_generate(backbone, [prefix], [prompts], 12)[0]]
        assert any(answers) and all(report.safe_text(answer) in text for answer in answers)
        assert text.count("answer: ") == 2 and (tmp_path / "out" / "ask.png").is_file()


def test_control_characters_do_not_reach_the_terminal(run_ask, photo, tmp_path):
    photo(64, 48).save(tmp_path / "a.png")
    out = run_ask([tmp_path / "a.png"], "--ask", "How many?", says=["a\x0bb"])
    assert out[2:4] == ["a\\u000bb", "answer: a\\u000bb"]


def test_weights_in_four_bits_answer_too(run_ask, photo, tmp_path):
    photo(64, 48).save(tmp_path / "a.png")
    out = run_ask([tmp_path / "a.png"], "--load", "4bit", "--max_new_tokens", 3, "--mode", "direct", "--ask", "How many?")
    assert out[1] == "How many?" and out[-1].endswith("ask.png") and any(line.startswith("answer: ") for line in out)


def test_results_lie_beside_the_model():
    assert evaluation.EvalSettings(model="runs/x/stage3/model", ask=["y"]).out == "runs/x/stage3/eval"


@pytest.mark.parametrize("images, flags, words", [
    (["nothing.jpg"], ["--ask", "How many?"], "--images nothing.jpg: there is no such file."),
    (["text.jpg"], ["--ask", "How many?"], "text.jpg cannot be read as a picture"),
    (["a.png", "room.mp4"], ["--ask", "How many?"], "--images room.mp4: give one mp4 alone, or pictures."),
    (["empty"], ["--ask", "How many?"], "--images empty: the folder has no .jpg or .png files."),
    (["a.png"], ["--ask", " "], "--ask: the question has no text."),
    (["a.png"], ["--ask", "<|image_pad|>"], "--ask: its text holds the special token <|image_pad|>"),
    (["a.png"], [], "--ask needs --model (a folder or hub id) and --images"),
    (["a.png"], ["--ask", "How many?", "--model", "runs/none"], "runs/none has no model"),
])  # fmt: skip
def test_bad_input_is_named_in_one_line(images, flags, words, run_ask, photo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    photo(64, 48).save("a.png")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "room.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as error:
        run_ask(images, *flags, model=None if "--model" in flags else "runs/tiny")
    assert words in str(error.value) and len(str(error.value).strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_ask_without_a_model_or_pictures_is_refused(monkeypatch):
    for flags in (["--ask", "x"], ["--ask", "x", "--model", "m"], ["--images", "a.png"]):
        monkeypatch.setattr(sys, "argv", ["eval.py", *flags])
        with pytest.raises(SystemExit, match="--ask needs --model"):
            evaluation.main()


def test_benchmarks_have_no_boxes_to_locate(monkeypatch, tiny_model, tmp_path):
    command = ["eval.py", "--benchmarks", "vsi", "--model", str(tiny_model), "--mode", "locate", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--mode locate is for --ask"):
        evaluation.main()
