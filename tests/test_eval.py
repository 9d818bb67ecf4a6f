"""eval.py: scorers, averages, adapters, whole runs that stop and go on, analyses, and the report."""

import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from test_memory import Peak
from test_pictures import write_mp4
from transformers import Qwen2_5_VLForConditionalGeneration

import common
import eval as evaluation
from common import Example
from support import benchmarks, files, memory, report, runs, toy_world
from support.benchmarks import Item, columns, score_prediction

ROOT = Path(evaluation.__file__).parent
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "ViewSpatial-Bench.json"
SMALL = ("--max_new_tokens", "6", "--eval_batch", "4", "--frames", "4", "--min_picture_tokens", 4, "--max_picture_tokens", 9,
         "--load", "fp32", "--mode", "direct")  # fmt: skip
ALL = ("vsi", "spbench-si", "spbench-mv", "cvbench", "spar", "viewspatial")
SIDES = ["A. left", "B. right", "C. front", "D. back"]

# Scorers


def letter(truth="B"):
    return "vsi", {"question_type": "object_rel_direction_easy", "options": ["A. left", "B. right"], "ground_truth": truth}


def number(truth):
    return "spbench", {"question_type": "object_abs_distance", "options": None, "ground_truth": str(truth)}


def cv(truth):
    return "cvbench", {"task": "Count", "choices": list("012345"), "answer": truth, "source": "COCO"}


VIEW = "viewspatial", {"question_type": "Camera", "choices": "A. right\nB. front-up", "answer": "A. right"}


def spar(truth, task="obj_spatial_relation_oo"):
    return "spar", {"task": task, "question": "Where is it?\n" + "\n".join(SIDES), "answer": truth}


def moved(truth):
    return spar(truth, "view_change_infer")


FAULTS = [  # (benchmark and row, prediction, strict, paper)
    *[(letter(), text, 1, 1) for text in ("B", "B.", "B. right", "b", "Answer: B", "<think>A</think><answer>B</answer>")],
    *[(letter(), text, 1, 0) for text in ("(B)", "B)", "B:", "B.\nright", "right", "Right.", "The answer is B")],
    *[(letter(), text, 0, 0) for text in ("A or B", "", "C", "nan", "A", "<answer>B", "B. left or so, I think"[::-1])],
    (letter("A"), "A or B", 0, 1), (letter("A"), "A. right", 0, 1),
    (letter(), "<answer>B</answer> no, <answer>A</answer>", 0, 1), (letter(), "<answer>A</answer><answer>B</answer>", 1, 0),
    *[(VIEW, text, 1, 1) for text in ("A", "A.", "A. right")],
    *[(VIEW, text, 1, 0) for text in ("(A)", "A)", "A:", "A.\nright", "right", "a", "The answer is A")],
    (VIEW, "A or B", 0, 1), (VIEW, "", 0, 0),
    *[(cv("(C)"), text, 1, 1) for text in ("(C)", "C", "C.", "c", "C. 2")], (cv("(C)"), "2", 1, 0),
    (cv("(E)"), "E", 1, 0), (cv("(E)"), "E. 4", 1, 0), (cv("(F)"), "F", 1, 0), (cv("(F)"), "(F)", 1, 1), (cv("(F)"), "E", 0, 0),
    *[(number(2.5), text, 1, 1) for text in ("2.5", "2.5 meters", "about 2.5 meters")],
    *[(number(2.5), text, 0, 0) for text in ("", "nan", "inf", "-inf", "about a meter, 2.5", "no idea")],
    (number(1), "about a meter, 2.5", 0, 1), (number(1), "twenty-one", 0, 1), (number(21), "twenty-one", 1, 0),
    (number(20), "A. 20", 0, 0), (number(1), "A. 20", 0, 1), (number(1200), "1,200", 1, 0), (number(1), "1,200", 0, 1),
    (number(3), "-3", 0, 1), (number(2), "2 or 3", 0, 1), (number(2), "<answer>3</answer><answer>2</answer>", 1, 0.1),
    (number(2), "1", 0.1, 0.1), (number(4), "3", 0.6, 0.6), (number(100), "95", 1, 1), (number(100), "150", 0.1, 0.1),
    (number(0), "0", 1, ZeroDivisionError), (number(0), "1", 0, ZeroDivisionError), (number(0), "no idea", 0, 0),
    (spar("C"), "C", 1, 1), (spar("C"), "c", 1, 1), (spar("C"), "C. front", 1, 1), (spar("C"), "A", 0, 0),
    (spar("C"), "", 0, 1), (spar("C"), "<answer></answer>", 0, 1), (spar("C"), "Cannot determine", 0, 1), (spar("C"), "(C)", 1, 0),
    (spar("C"), "front", 1, 0), (spar("C. front"), "ron", 0, 1), (spar("C. front"), ".", 0, 1), (spar("C. front"), "C", 1, 1),
    (spar("2.0", "depth_prediction_oc"), "2", 1, 1), (spar("2", "depth_prediction_oc"), "2 or 5", 0, 1),
    (spar("2", "depth_prediction_oo_mv"), "2 or 5", 0, 0), (spar("5", "depth_prediction_oo_mv"), "2 or 5", 0, 1),
    (spar("2", "distance_prediction_oo"), "-2", 0, 1), (spar("2", "distance_prediction_oo"), "", 0, 0),
    (spar("0", "distance_prediction_oo"), "0", 1, 1), (spar("0", "distance_prediction_oo"), "0.25", 0, 0.6),
    (moved("move_right:2,rotate_up:10"), "move_right:2,rotate_up:10", 1, 1), (moved("move_left:2"), "move_right:-2", 1, 1),
    (moved("move_right:2,rotate_up:10"), "move_right:3,rotate_up:10", 0.82, 0.88),  # prediction and truth swapped
    (moved("move_right:2,rotate_up:10"), "move_right: 2, rotate_up: 10", 1, 0.8),  # keys not stripped
    (moved("move_right:2,rotate_up:10"), "move_right:2,rotate_up:10,and so on", 1, 0),  # one part broken
    (moved("move_right:2,rotate_up:10"), "move_right:2,rotate_up:ten degrees", 1, 0),  # no float() reads it
    (moved("move_right:2,rotate_up:10"), "move_right:2,rotate_up:ten or so", 0.8, 0),
    (moved("move_right:2,rotate_up:10"), "**move_right: 2 m, rotate_up: 10**", 1, 0),
    (letter(), "The answer is: **B**", 1, 0), (letter(), "\\boxed{\\text{B}}", 1, 0), (cv("(E)"), "**E**", 1, 0),
    (spar("C"), "\\boxed{C. front}", 1, 0), (VIEW, "$\\boxed{A}$", 1, 0), (number(4), "4 chairs", 1, 1),
    (number(4), "**4**", 1, 1), (number(2.5), "2.5 m^2", 1, 1), (number(2.5), "\\boxed{2.5\\text{ m}}", 1, 1),
    (number(4), "4 chairs or 5", 0, 1), (number(2), "between 2 and 3", 0, 1), (letter("A"), "\\boxed{A} or \\boxed{B}", 0, 0),
    (moved("move_right:0,rotate_up:10"), "move_right:0.05,rotate_up:10", 1, 0.8),  # a truth of 0
    (moved("move_right:2"), "", 0, 0), (moved("move_right:2"), "I cannot tell", 0, 0), (moved("move_right:2"), "nan", 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("asked, text, strict, paper", FAULTS)
def test_faults(asked, text, strict, paper):
    assert score_prediction(*asked, text) == pytest.approx(strict)
    if paper is ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            score_prediction(*asked, text, "paper")
    else:
        assert score_prediction(*asked, text, "paper") == pytest.approx(paper)


def mra(said, true):
    """A loop as plain as the formula."""
    hits = 0
    for theta in np.linspace(0.5, 0.95, 10):
        hits += abs(said - true) / (abs(true) or 1) <= 1 - theta  # SPAR: for a truth of 0 the error is absolute
    return hits / 10


def test_strict_numbers_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(1500):
        true = round(float(rng.choice([rng.integers(1, 300), rng.uniform(0.1, 9)])), 1)
        said = float(rng.choice([true * rng.choice([*np.arange(0.5, 1.5, 0.05)]), rng.uniform(0, 3) * true]))
        assert score_prediction(*number(true), f"<answer>{said:.12f} meters</answer>") == mra(float(f"{said:.12f}"), true)


def second_opinion(benchmark, row, text):
    """The published scorers, written again from the list of their faults."""
    if "<answer>" in text:
        text = re.split("</answer>", text.split("<answer>", 1)[1], maxsplit=1)
        text = text[0].strip() if len(text) == 2 else "None"
    word = (text.replace("Answer:", "") if benchmark in ("vsi", "spbench") else text).split(" ")[0].strip()
    whole = (text.replace("Answer:", "") if benchmark in ("vsi", "spbench") else text).strip()
    if benchmark == "viewspatial":
        return float((word[:1] if word in [x + dot for x in "ABCD" for dot in ("", ".")] else whole) == row["answer"][:1])
    if benchmark == "cvbench":
        bare = word.upper()[:-1] if word.endswith(".") else word.upper()
        bare = bare[1:] if bare[:1] in list("([{") else bare
        bare = bare[:-1] if bare[-1:] in list(")]}") else bare
        truth = row["answer"] if row["answer"][1] in "EF" else row["answer"][1]
        return float((bare if bare in list("ABCD") else whole) == truth)
    if benchmark in ("vsi", "spbench") and row.get("options"):
        found = word[:1] if word in [x + dot for x in "ABCD" for dot in ("", ".")] else whole
        return float(found.lower() == row["ground_truth"].lower())
    if benchmark in ("vsi", "spbench"):
        order = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        order = (order + "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety zero a an").split()
        values = list(range(1, 20)) + [20, 30, 40, 50, 60, 70, 80, 90, 0, 1, 1]
        words = re.split(r"\W+", text.lower())
        said = [value for word, value in zip(order, values) if word in words][:1] or re.findall(r"\d+(?:\.\d+)?", text)[:1]
        if not said:
            return 0.0
        if float(row["ground_truth"]) == 0:
            raise ZeroDivisionError
        return mra(float(said[0]), float(row["ground_truth"]))
    if row["task"] in benchmarks.SPAR_LOW:
        said = re.findall(r"\d+\.\d+|\d+", re.sub(r"\^\d", "^", text))  # no powers
        if not said:
            return 0.0
        return mra(float(said[-1 if "mv" in row["task"] else 0]), float(row["answer"]))
    if row["task"] == "view_change_infer":
        plus = "move_right move_up move_forward rotate_right rotate_up".split()
        minus = "move_left move_down move_backward rotate_left rotate_down".split()
        sums = []
        for part in (text, row["answer"]):
            try:  # the last of equal keys counts
                motion = {key: float(value) for key, value in (piece.split(":") for piece in part.split(","))}
            except ValueError:
                return 0.0
            sums.append([motion.get(p, 0) - motion.get(m, 0) for p, m in zip(plus, minus)])
        return sum(mra(true, said) for said, true in zip(*sums)) / 5  # swapped
    text, truth = text.lower(), row["answer"].lower()
    return float(text in truth or text[0] == truth)


def random_answers(count, seed=0):
    """Letters, words, numbers, motions and junk, alone and joined, inside tags and outside."""
    rng = random.Random(seed)
    words = "a an one ten nineteen twenty-one zero left right front-up Cannot or None meters".split()
    numbers = "0 1 2 3.5 1,200 -3 2^3 2^34 .5 nan inf 1e3 007 12. 4.9 20".split()
    marks = [*" .():\n", "[A]", "{b}", ", ", "Answer:", "Answer: ", "é", "½", "\u202e", "<answer>", "</answer>"]
    keys = ["move_right", "move_left", " move_up", "rotate_up", "rotate_down ", "jump", "MOVE_UP"]
    motion = [f"{key}:{value}" for key in keys for value in ("1", "-2", "0.5", " 3", "x", "0")]
    letters = [before + x + after for x in "ABCDEFabe" for before in ("", "(", "[") for after in ("", ".", ")", "]", ").")]
    out = ["", " ", "<answer></answer>"]
    for _ in range(count):
        kind = rng.choice([letters, numbers, words, motion, letters + numbers + words + marks])
        text = rng.choice(["", " ", ",", ". ", "\n"]).join(rng.choice(kind) for _ in range(rng.randint(1, 4)))
        out.append(rng.choice([text, text, f"<think>{rng.choice(words)}</think><answer>{text}</answer>",
                               f"<answer>{rng.choice(letters)}</answer> {text}", f"<answer>{text}"]))  # fmt: skip
    return out


def test_paper_scorers_equal_a_second_writing():
    def outcome(score, *asked):
        try:
            return round(score(*asked), 9)
        except ZeroDivisionError:
            return "zero"

    rows = [letter("A"), letter("B"), VIEW, cv("(A)"), cv("(E)"), number(2), number(0), number(21), spar("C"), spar("C. front"),
            *[spar(truth, task) for truth in ("2", "0") for task in ("depth_prediction_oc", "distance_prediction_oo_mv")],
            moved("move_right:1,rotate_up:2"), moved("move_left:2,move_up:1")]  # fmt: skip
    seen = set()
    for text in random_answers(3000):
        for asked in rows:
            ours = outcome(lambda *a: score_prediction(*a, "paper"), *asked, text)
            assert ours == outcome(second_opinion, *asked, text), (asked, text)
            seen.add((asked[0], ours))
            assert 0 <= score_prediction(*asked, text) <= 1
    assert {("vsi", 1.0), ("spbench", "zero"), ("spbench", 0.1), ("cvbench", 1.0), ("viewspatial", 1.0)} <= seen


def test_a_right_motion_is_a_legal_answer():
    item = Item(*moved("move_right:2,rotate_up:10"), Example("spar:1", (), "multi_view", "view_change_infer", "?", None, ""))
    assert benchmarks.score_completion(item, "move_right:2,rotate_up:10")["legal"]
    assert not benchmarks.score_completion(item, "I cannot tell")["legal"]


# Averages


def averaged(benchmark, groups, how, field="question_type", **more):
    """columns() of {type: scores}. more: {field: {type: value}} of other fields."""
    pairs = [({field: kind} | {k: v[kind] for k, v in more.items()}, score) for kind, some in groups.items() for score in some]
    random.Random(0).shuffle(pairs)
    found = columns(benchmark, *zip(*pairs), how)
    assert found["by_type"] == {kind: pytest.approx(np.mean(some)) for kind, some in groups.items()}
    return found["columns"]


VSI = {"object_counting": [1, 0.5], "object_rel_direction_easy": [1, 0], "object_rel_direction_medium": [1],
       "object_rel_direction_hard": [0, 0, 0, 1], "route_planning": [1]}  # fmt: skip


@pytest.mark.parametrize("how", ["official", "paper"])
def test_vsi_is_the_mean_of_tasks_and_direction_that_of_levels(how):
    assert averaged("vsi", VSI, how) == pytest.approx({"NQ": 0.75, "MCQ": (7 / 12 + 1) / 2, "avg": (0.75 + 7 / 12 + 1) / 3})
    two = {"object_counting": [1, 0.5], "object_size_estimation": [0], "object_rel_direction": [1, 0]}
    assert averaged("spbench", two, how) == pytest.approx({"NQ": 0.375, "MCQ": 0.5, "avg": 1.25 / 3})
    # Without any direction the published script still counts the task, as 0.
    assert averaged("spbench", {"object_counting": [1]}, how)["MCQ"] == {"official": None, "paper": 0.0}[how]


def test_a_missing_level_of_directions_is_left_out_or_zeroes_the_task():
    some = {kind: scores for kind, scores in VSI.items() if "medium" not in kind}
    assert averaged("vsi", some, "official") == pytest.approx({"NQ": 0.75, "MCQ": 0.6875, "avg": 2.125 / 3})
    # The published script: the task is 0, and the level behind the missing one stays a task of its own (0.25).
    assert averaged("vsi", some, "paper") == pytest.approx({"NQ": 0.75, "MCQ": 1.25 / 3, "avg": 2 / 4})


@pytest.mark.parametrize("how", ["official", "paper"])
def test_cvbench_and_viewspatial_averages(how):
    source = {"Count": "ADE20K", "Relation": "COCO", "Depth": "Omni3D"}
    groups = {"Count": [1, 0], "Relation": [1, 1, 1, 0], "Depth": [0, 0, 1]}
    assert averaged("cvbench", groups, how, "task", source=source) == pytest.approx({"2D": 0.625, "3D": 1 / 3, "avg": 23 / 48})
    only = averaged("cvbench", {"Depth": [0, 1]}, how, "task", source=source)
    assert only == {"2D": None, "3D": 0.5, "avg": 0.5}
    groups = {"Camera perspective - x": [1, 0], "Camera perspective - y": [0], "Person perspective - x": [1]}
    assert averaged("viewspatial", groups, how) == pytest.approx({"camera": 1 / 3, "person": 1, "avg": 0.5})


def test_spar_is_the_mean_of_tasks_or_of_questions():
    groups = {"depth_prediction_oc": [1, 1, 1, 0], "distance_prediction_oo": [0], "view_change_infer": [0.5],
              "spatial_imagination_oo": [1, 0]}  # fmt: skip
    wanted = {"low": 0.375, "medium": 0.5, "high": 0.5, "avg": 0.4375}
    assert averaged("spar", groups, "official", "task") == pytest.approx(wanted)
    assert averaged("spar", groups, "paper", "task") == pytest.approx(wanted | {"low": 0.6, "avg": 0.5625})
    assert averaged("spar", {"depth_prediction_oc": [1]}, "official", "task")["medium"] is None


def test_the_guess_equals_a_search_over_all_answers():
    def items(asked, truths, field):
        return [Item(asked("1")[0], asked("1")[1] | {field: str(t)}, Example(f"x:{n}", (), "", "kind", "", None, ""))
                for n, t in enumerate(truths)]  # fmt: skip

    for truths in ([1, 2, 2.2, 2.4, 8], [3, 3, 0.5], [0, 0, 4], [7]):
        some = items(number, truths, "ground_truth")
        tries = [[score_prediction("spbench", item.row, str(v)) for item in some] for v in sorted(set(truths))]
        assert benchmarks.guess_scores(some).tolist() == pytest.approx(max(tries, key=sum))
    some = items(cv, ["(C)", "(A)", "(C)", "(F)"], "answer")
    assert benchmarks.guess_scores(some).tolist() == [1, 0, 1, 0]
    some[0].row["choices"] = list("012")  # another number of options: another constant
    assert benchmarks.guess_scores(some).tolist() in ([1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1])
    still = Item(*moved("move_right:2"), Example("x", (), "", "view_change_infer", "", None, ""))
    assert benchmarks.guess_scores([still]).tolist() == pytest.approx([0.8])


# Adapters


def as_bytes(picture):
    data = io.BytesIO()
    picture.save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def write_table(path, rows, **features):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    for name, feature in features.items():
        table = table.cast_column(name, feature)
    table.to_parquet(str(path))


def write_downloads(root, photo, feature=True):
    """All six benchmarks, a few rows each, as they lie on disk after a download. feature: pictures as datasets.Image()."""
    chair = "How many chair(s) are in this room?"
    vsi = [("scannet", "scene1", "object_counting", chair, "2", None),
           ("scannet", "scene1", "object_rel_direction_easy", "<image>Which side?", "B", SIDES),
           ("arkitscenes", "4100", "obj_appearance_order", "Which order?", "A", ["A. bed, lamp", "B. lamp, bed"]),
           ("arkitscenes", "4100", "room_size_estimation", "How large?", "0", None)]  # fmt: skip
    names = ("dataset", "scene_name", "question_type", "question", "ground_truth", "options")
    vsi = [{"id": n} | dict(zip(names, row)) for n, row in enumerate(vsi)]
    for name, rows in {"-00000-of-00001": vsi, "_debiased": vsi[1:3], "_pruned": vsi[3:]}.items():
        write_table(root / "VSI-Bench" / f"test{name}.parquet", rows)
    for n, row in enumerate(vsi[1:3]):
        (root / "VSI-Bench" / row["dataset"]).mkdir()
        write_mp4(root / "VSI-Bench" / row["dataset"] / f"{row['scene_name']}.mp4", [photo(64, 48, 9 * n + f) for f in range(6)])

    spbench = [vsi[0] | {"id": f"s{n}", "images": [f"scene{n}/0.jpg"]} for n in range(3)]
    spbench[1] |= {"question_type": "object_rel_direction", "ground_truth": "D", "options": SIDES}
    views = spbench[1] | {"id": "m", "images": [f"scene9/{n}.jpg" for n in range(8)]}
    places = dict.fromkeys(["scene0/0.jpg", *views["images"]], "") | {"scene1/0.jpg": "images", "scene2/0.jpg": "SPBench-SI-images"}
    for name, place in places.items():
        (root / "SPBench" / place / name).parent.mkdir(parents=True, exist_ok=True)
        photo(64, 48, len(name)).save(root / "SPBench" / place / name)
    write_table(root / "SPBench" / "SPBench-SI.parquet", spbench)
    write_table(root / "SPBench" / "SPBench-MV.parquet", [views])

    kind = {"image": datasets.Image()} if feature else {}
    for dim, task, source in (("2D", "Count", "ADE20K"), ("3D", "Depth", "Omni3D")):
        rows = [{"idx": n, "type": dim, "task": task, "image": as_bytes(photo(64, 48, n)), "question": f"{task}?", "source": source,
                 "choices": ["0", "1", "2", "3", "4", "5"][: 2 + 4 * n], "answer": "(B)(F)"[3 * n : 3 * n + 3], "prompt": "x"}
                for n in range(2)]  # fmt: skip
        write_table(root / "CV-Bench" / f"test_{dim.lower()}.parquet", rows, **kind)

    kind = {"image": datasets.List(datasets.Image())} if feature else {}
    tasks = [("obj_spatial_relation_oo", spar("x")[1]["question"], "C", 1), ("depth_prediction_oc", "How deep?", "1.5", 1),
             ("view_change_infer", "How did it move?", "move_right:0.3,rotate_up:12", 2),
             ("position_matching", "Which?\n(A) [1, 2]\n(B) [3, 4]", "B", 2)]  # fmt: skip
    rows = [{"id": f"{task}/{n}", "image": [as_bytes(photo(64, 48, 10 * n + i)) for i in range(count)], "question": question,
             "answer": answer, "task": task, "img_type": "x", "format_type": "x", "source": "x"}
            for n, (task, question, answer, count) in enumerate(tasks)]  # fmt: skip
    write_table(root / "SPAR-Bench" / "data" / "test-00000-of-00002.parquet", rows[:2], **kind)
    write_table(root / "SPAR-Bench" / "data" / "test-00001-of-00002.parquet", rows[2:], **kind)

    (root / "ViewSpatial-Bench" / "val").mkdir(parents=True)
    paths = [f"ViewSpatial-Bench/val/{n}.jpg" for n in range(2)]
    for n, path in enumerate(paths):
        photo(64, 48, n).save(root / path)
    rows = [{"question_type": f"{side} perspective - Relative Direction", "image_path": paths[: n + 1], "question": "Where?",
             "answer": "B. right", "choices": "A. left\nB. right"} for n, side in enumerate(("Camera", "Person"))]  # fmt: skip
    (root / "ViewSpatial-Bench" / "ViewSpatial-Bench.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Tables are cached in a folder of this test, and nothing asks the network."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def downloads(tmp_path_factory, photo):
    pytest.importorskip("decord")
    return write_downloads(tmp_path_factory.mktemp("downloads"), photo)


def settings_for(*flags):
    return runs.parse_settings(evaluation.EvalSettings, evaluation.PRESETS, "eval", argv=[str(flag) for flag in flags])


def read(name, data, folder, *flags):
    return benchmarks.read_items(name, settings_for("--data", data, *flags), folder)


WANTED = {  # (id, type, kind of pictures, pictures, options asked, answer)
    "vsi": [("0", "object_counting", "video", 1, None, "2"), ("1", "object_rel_direction_easy", "video", 1, SIDES, "B"),
            ("2", "obj_appearance_order", "video", 1, ["A. bed, lamp", "B. lamp, bed"], "A"),
            ("3", "room_size_estimation", "video", 1, None, "0")],
    "spbench-si": [("s0", "object_counting", "single_image", 1, None, "2"),
                   ("s1", "object_rel_direction", "single_image", 1, SIDES, "D"),
                   ("s2", "object_counting", "single_image", 1, None, "2")],
    "spbench-mv": [("m", "object_rel_direction", "multi_view", 8, SIDES, "D")],
    "cvbench": [(f"{dim}-{n}", task, "single_image", 1, options, answer) for dim, task in (("2D", "Count"), ("3D", "Depth"))
                for n, options, answer in ((0, ["A. 0", "B. 1"], "B"), (1, ["A. 0", "B. 1", "C. 2", "D. 3", "E. 4", "F. 5"], "F"))],
    "spar": [("obj_spatial_relation_oo/0", "obj_spatial_relation_oo", "single_image", 1, None, "C"),
             ("depth_prediction_oc/1", "depth_prediction_oc", "single_image", 1, None, "1.5"),
             ("view_change_infer/2", "view_change_infer", "multi_view", 2, None, "move_right:0.3,rotate_up:12"),
             ("position_matching/3", "position_matching", "multi_view", 2, None, "B")],
    "viewspatial": [("0", "Camera perspective - Relative Direction", "single_image", 1, ["A. left", "B. right"], "B"),
                    ("1", "Person perspective - Relative Direction", "multi_view", 2, ["A. left", "B. right"], "B")],
}  # fmt: skip


def check_items(name, items):
    found = [(e.id, e.question_type, e.data_type, len(e.images), e.options, e.answer) for e in (item.example for item in items)]
    assert found == [(f"{name}:{key}", *rest) for key, *rest in WANTED[name]]
    for item in items:
        assert "<image>" not in item.example.question and item.benchmark == name.split("-")[0]
        truth = item.row.get("ground_truth", item.row.get("answer"))
        assert score_prediction(item.benchmark, item.row, str(truth)) == 1
        for path in item.example.images:
            assert path.endswith(".mp4") or common.load_image(path).size == (64, 48)


@pytest.mark.parametrize("name", ALL)
def test_adapters_read_what_was_downloaded(name, downloads, tmp_path):
    items, missing = read(name, downloads, tmp_path)
    check_items(name, items)
    assert missing == 0 and (name != "spar" or "0-1000" in items[3].example.question)


@pytest.mark.parametrize("name", ["cvbench", "spar"])
def test_embedded_pictures_may_be_plain_bytes(name, tmp_path, photo):
    write_downloads(tmp_path / "plain", photo, feature=False)
    items, _ = read(name, tmp_path / "plain", tmp_path)
    check_items(name, items)
    number = 10 * 3 + 1 if name == "spar" else 1
    assert np.array_equal(common.load_image(items[-1].example.images[-1]), photo(64, 48, number))


def rewrite(path, change, **features):
    """Change the rows of a table."""
    rows = [dict(row) for row in datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache")).with_format(None)]
    path.unlink()
    write_table(path, change(rows), **features)


def as_plain(rows):
    """Pictures as bytes in place of {"bytes": ...}."""
    for row in rows:
        many = isinstance(row["image"], list)
        row["image"] = [picture["bytes"] for picture in row["image"]] if many else row["image"]["bytes"]
    return rows


@pytest.mark.parametrize("name", ["cvbench", "spar"])
def test_pictures_may_be_bytes_without_a_struct(name, tmp_path, photo):
    write_downloads(tmp_path / "plain", photo, feature=False)
    for path in (*(tmp_path / "plain" / "CV-Bench").glob("*.parquet"), *(tmp_path / "plain").glob("SPAR-Bench/data/*.parquet")):
        rewrite(path, as_plain)
    items, _ = read(name, tmp_path / "plain", tmp_path)
    check_items(name, items)
    number = 10 * 3 + 1 if name == "spar" else 1
    assert np.array_equal(common.load_image(items[-1].example.images[-1]), photo(64, 48, number))


def test_rows_with_the_same_id_are_questions_of_their_own(tmp_path, photo):
    write_downloads(tmp_path / "data", photo, feature=False)

    def same(**fields):
        return lambda rows: [row | fields for row in rows]

    for path in (tmp_path / "data").glob("SPAR-Bench/data/*.parquet"):
        rewrite(path, same(id=7))
    rewrite(tmp_path / "data" / "CV-Bench" / "test_2d.parquet", same(idx=3))
    rewrite(tmp_path / "data" / "SPBench" / "SPBench-SI.parquet", same(id="s"))
    rewrite(tmp_path / "data" / "VSI-Bench" / "test-00000-of-00001.parquet", same(id=0))
    wanted = {"spar": ["7", "7#1", "7#2", "7#3"], "cvbench": ["2D-3", "2D-3#1", "3D-0", "3D-1"],
              "vsi": ["0", "0#1", "0#2", "0#3"], "spbench-si": ["s", "s#1", "s#2"]}  # fmt: skip
    for name, keys in wanted.items():
        items, _ = read(name, tmp_path / "data", tmp_path)
        assert [item.example.id for item in items] == [f"{name}:{key}" for key in keys]
        check = [(kind, pictures, answer) for _, kind, _, pictures, _, answer in WANTED[name]]
        assert [(e.question_type, len(e.images), e.answer) for e in (item.example for item in items)] == check
    for n, item in enumerate(read("spar", tmp_path / "data", tmp_path)[0]):
        assert np.array_equal(common.load_image(item.example.images[0]), photo(64, 48, 10 * n))  # its own picture


def test_copies_of_a_table_are_read_once_and_other_versions_are_refused(downloads, tmp_path, capsys):
    whole = shutil.copytree(downloads / "SPAR-Bench", tmp_path / "data" / "SPAR-Bench")
    shutil.copytree(whole / "data", whole / "snapshots" / "a" / "data")
    shutil.copy(whole / "data" / "test-00000-of-00002.parquet", whole / "data" / "test-00000-of-00002 (1).parquet")
    (whole / "snapshots" / "test.parquet").symlink_to(whole / "data" / "test-00001-of-00002.parquet")
    check_items("spar", read("spar", tmp_path / "data", tmp_path)[0])
    assert capsys.readouterr().err.count("is a copy of") == 4
    rewrite(whole / "snapshots" / "a" / "data" / "test-00001-of-00002.parquet", lambda rows: rows[:1])
    benchmarks.file_digest.cache_clear()  # files do not change during a run
    with pytest.raises(SystemExit) as stopped:
        read("spar", tmp_path / "data", tmp_path)
    assert f"{whole / 'data'}, {whole / 'snapshots' / 'a' / 'data'}" in str(stopped.value)


@pytest.mark.parametrize("text", [
    "Where is it? Options: A. left B. right C. front D. back", "A. left B. right C. front D. back",
    "Where?\n(A) left (B) right (C) front (D) back", "Where?\nA. left, B. right, C. front, D. back",
    "Is A. or B. nearer to point A: it? A. left B. right\nC. front D. back\nThink.",
    "Where?\nA. left B. right\nC. front D. back", "Where?\nA: left\nB: right\nC: front\nD: back",
])  # fmt: skip
def test_spar_options_may_stand_on_one_line(text):
    row = {"task": "obj_spatial_relation_oo", "question": text, "answer": "C"}
    assert benchmarks.question_of("spar", row) == (SIDES, "C")
    assert [score_prediction("spar", row, said) for said in ("front", "C. front", "back", "C. back")] == [1, 1, 0, 0]


@pytest.mark.parametrize("text", ["Where is it?", "Where is point A. on the map?", "Where is A. and B. in it?"])
def test_spar_options_that_are_not_found_are_letters(text):
    row = {"task": "obj_spatial_relation_oo", "question": text, "answer": "C"}
    assert [score_prediction("spar", row, said) for said in ("C", "(C)", "A", "")] == [1, 1, 0, 0]


ZIPS = {  # benchmark: (folder of the zip, what is packed into it, how the names in it begin)
    "vsi": [("VSI-Bench", "VSI-Bench/scannet", "scannet/"), ("VSI-Bench", "VSI-Bench/arkitscenes", "arkitscenes/")],
    "viewspatial": [("ViewSpatial-Bench", "ViewSpatial-Bench/val", "val/")],
    "spbench-mv": [("SPBench", "SPBench/scene9", "scene9/")],
}


@pytest.mark.parametrize("name, top", [
    ("vsi", ""), ("viewspatial", ""), ("viewspatial", "ViewSpatial-Bench/"), ("spbench-mv", ""),
    ("spbench-mv", "SPBench-MV-images/"), ("spbench-mv", "elsewhere/"),
])  # fmt: skip
def test_a_benchmark_in_zips_is_read_after_the_commands_that_are_told(name, top, downloads, tmp_path):
    root = shutil.copytree(downloads, tmp_path / "my data")
    for folder, packed, begin in ZIPS[name]:
        with zipfile.ZipFile(root / folder / f"{Path(packed).name}.zip", "w") as archive:
            for path in (root / packed).iterdir():
                archive.write(path, top + begin + path.name)
        shutil.rmtree(root / packed)
    for _ in ZIPS[name]:
        with pytest.raises(SystemExit) as stopped:
            read(name, root, tmp_path)
        assert f"{name}, question " in str(stopped.value) and "does not exist" in str(stopped.value)
        if top == "elsewhere/":
            assert "scene9.zip has it as elsewhere/scene9/0.jpg" in str(stopped.value)
            return
        unzip, quiet, archive, into, target = shlex.split(str(stopped.value).split(": ")[-1])
        assert (unzip, quiet, into) == ("unzip", "-q", "-d")
        zipfile.ZipFile(archive).extractall(target)
    check_items(name, read(name, root, tmp_path)[0])


@pytest.mark.parametrize("field, value", [("question", "<video>Where? <|im_end|>"), ("choices", "A. left\nB. <|im_end|>"),
                                          ("question", "<|im_<image>end|>Where?")])  # fmt: skip
def test_a_special_token_in_a_benchmark_is_named(field, value, downloads, tmp_path):
    root = shutil.copytree(downloads / "ViewSpatial-Bench", tmp_path / "ViewSpatial-Bench")
    path = root / "ViewSpatial-Bench.json"
    rows = json.loads(path.read_text())
    rows[1][field] = "<video>Where?" if field == "question" else rows[1][field]
    path.write_text(json.dumps(rows))
    assert read("viewspatial", tmp_path, tmp_path)[0][1].example.question == "Where?"
    rows[1][field] = value
    path.write_text(json.dumps(rows))
    with pytest.raises(SystemExit) as stopped:
        read("viewspatial", tmp_path, tmp_path)
    assert "viewspatial, question 1:" in str(stopped.value) and "<|im_end|>" in str(stopped.value)


def test_published_rows_are_labelled_as_those_of_the_full_set(downloads, tmp_path):
    items, missing = read("vsi", downloads, tmp_path, "--vsi", "debiased")
    rows = [benchmarks.score_completion(item, "B") for item in items]
    head, *cells = benchmarks.benchmark_table("vsi", benchmarks.benchmark_scores("vsi", items, rows, missing), "stage3")
    assert head[0] == "vsi (2 questions)"
    assert [row[0] for row in cells if "stage3" not in row[0] and "guess" not in row[0]] == [
        f"{model} (paper, full set)" for model in benchmarks.PUBLISHED["vsi"]
    ]


def test_versions_and_formats_of_vsi(downloads, tmp_path):
    for version, ids in (("debiased", ["vsi:1", "vsi:2"]), ("pruned", ["vsi:3"])):
        assert [item.example.id for item in read("vsi", downloads, tmp_path, "--vsi", version)[0]] == ids
    (tmp_path / "VSI-Bench").mkdir()
    rows = datasets.Dataset.from_parquet(str(downloads / "VSI-Bench" / "test-00000-of-00001.parquet"), cache_dir=str(tmp_path))
    (tmp_path / "VSI-Bench" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place in ("scannet", "arkitscenes"):
        (tmp_path / "VSI-Bench" / place).symlink_to(downloads / "VSI-Bench" / place)
    check_items("vsi", read("vsi", tmp_path, tmp_path)[0])


def unpack_many(folder):
    for n in range(400):
        benchmarks.unpack([{"bytes": b"x" * 20_000}], folder, n)


@pytest.mark.skipif(sys.platform == "win32", reason="it forks")
def test_two_processes_may_unpack_at_once(tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(unpack_many, [tmp_path] * 2, chunksize=1)  # raises what a process raises
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [20_000] * 400


def test_a_sample_is_drawn_by_seed(downloads, tmp_path):
    def ids(seed):
        return [item.example.id for item in read("cvbench", downloads, tmp_path, "--questions", 2, "--seed", seed)[0]]

    assert ids(0) == ids(0) and len(ids(0)) == 2 and len({tuple(ids(seed)) for seed in range(9)}) > 1


BROKEN = {  # benchmark, the file or folder that is spoilt, what stands there then (None: nothing), words of the message
    "a missing video": ("vsi", "VSI-Bench/scannet/scene1.mp4", None, ["question 0", "scene1.mp4"]),
    "a missing picture": ("viewspatial", "ViewSpatial-Bench/val/1.jpg", None, ["question 1", "val/1.jpg"]),
    "a broken table": ("spbench-si", "SPBench/SPBench-SI.parquet", b"PAR1 no", ["SPBench-SI.parquet", "cannot be read"]),
    "broken JSON": ("viewspatial", "ViewSpatial-Bench/ViewSpatial-Bench.json", b'[{"question": ', ["Bench.json", "not JSON"]),
    "a missing table": ("cvbench", "CV-Bench/test_2d.parquet", None, ["test_2d.parquet is missing"]),
    "no folder": ("spar", "SPAR-Bench", None, ["SPAR-Bench", "missing"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_before_any_model_is_loaded(name, downloads, tmp_path):
    benchmark, path, content, words = BROKEN[name]
    shutil.copytree(downloads, tmp_path / "data")
    (tmp_path / "data" / path).rename(tmp_path / "away")
    if content:
        (tmp_path / "data" / path).write_bytes(content)
    flags = ("--benchmarks", benchmark, "--data", tmp_path / "data", "--model", "runs/none", "--out", tmp_path)
    with pytest.raises(SystemExit) as error:
        evaluation.score_models(settings_for(*flags))
    assert all(word in str(error.value) for word in words), error.value
    assert "no model" not in str(error.value) and not (tmp_path / "predictions.jsonl").exists()


@pytest.mark.parametrize("flag, value, words", [
    ("benchmarks", "vsibench", ["viewspatial", "stage0"]), ("mode", "fast", ["think", "direct"]), ("load", "8bit", ["fp32"]),
    ("vsi", "half", ["full", "debiased", "pruned"]), ("hint", "line", ["box", "box+line"]),
])  # fmt: skip
def test_an_unknown_word_is_refused_with_the_known_ones(flag, value, words, capsys):
    with pytest.raises(SystemExit):
        settings_for(f"--{flag}", value)
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert f"--{flag}" in complaint and all(repr(word) in complaint for word in (value, *words)), complaint


@pytest.mark.skipif(not REAL.is_file(), reason="the real questions are not here")
def test_the_real_viewspatial(tmp_path, monkeypatch):
    (tmp_path / "ViewSpatial-Bench").mkdir()
    shutil.copy(REAL, tmp_path / "ViewSpatial-Bench")
    exists = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: path.suffix == ".jpg" or exists(path))
    items, missing = read("viewspatial", tmp_path, tmp_path)
    rows = [item.row for item in items]
    counts = [sum(kind == row["question_type"] for row in rows) for kind in (
        "Camera perspective - Relative Direction", "Person perspective - Scene Simulation Relative Direction",
        "Camera perspective - Object View Orientation", "Person perspective - Object View Orientation",
        "Person perspective - Relative Direction")]  # fmt: skip
    assert missing == 0 and len(items) == 5712 and counts == [1773, 1105, 996, 996, 842]
    a = {"avg": sum(row["answer"][0] == "A" for row in rows) / 5712}
    for side in ("camera", "person"):
        a[side] = np.mean([row["answer"][0] == "A" for row in json.loads(REAL.read_text()) if side in row["question_type"].lower()])
    for scorer, how in (("strict", "official"), ("strict", "paper"), ("paper", "official"), ("paper", "paper")):
        perfect = [score_prediction("viewspatial", row, f"<answer>{row['answer']}</answer>", scorer) for row in rows]
        constant = [score_prediction("viewspatial", row, "A", scorer) for row in rows]
        assert set(columns("viewspatial", rows, perfect, how)["columns"].values()) == {1.0}
        assert columns("viewspatial", rows, constant, how)["columns"] == pytest.approx(a)
    found = benchmarks.benchmark_scores("viewspatial", items, [{"score": 1.0, "paper": 1.0, "format": 1, "legal": 1}] * 5712, 0)
    assert ["x, strict", "100.0", "100.0", "100.0"] in benchmarks.benchmark_table("viewspatial", found, "x")


# Asking


def test_batches_are_asked_once_and_pictures_read_once(ladder_data, downloads, backbone, monkeypatch):
    backbone.processor.size = {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}
    examples = [e for e in common.read_examples(ladder_data, "spatial") if "scene0011" in e.images[0]]  # one picture, and eight
    video = (str(downloads / "VSI-Bench" / "scannet" / "scene1.mp4"),)
    examples += [Example(f"v{n}", video, "video", "object count", f"How many, {n}?", None, "2") for n in range(2)]
    scenes, reads = common.group_scenes(examples[::2] + examples[1::2]), []
    for name in ("load_image", "read_video"):
        real = getattr(common, name)
        monkeypatch.setattr(common, name, lambda path, *rest, real=real: reads.append(path) or real(path, *rest))

    def ask(scenes, **kwargs):
        reads.clear()
        pairs = [(scene, some) for part, texts in runs.answer_batches(backbone, scenes, "direct", 6, **kwargs)
                 for scene, some in zip(part, texts)]  # fmt: skip
        return {e.id: text for scene, some in pairs for e, text in zip(scene.examples, some)}, [scene for scene, _ in pairs]

    for batch in (1, 5, 100):
        asked = []
        texts, seen = ask(scenes, eval_batch=batch, skip=asked.append)
        assert [id(scene) for scene in seen] == [id(scene) for scene in scenes] == [id(s) for part in asked for s in part]
        assert sorted(reads) == sorted(path for scene in scenes for path in scene.images)
        assert all(len(part) == 1 or sum(len(scene.examples) for scene in part) <= batch for part in asked)
    alone = {}
    for scene in scenes:
        for e in scene.examples:
            alone |= ask([common.Scene(scene.images, scene.data_type, [e])])[0]
    assert alone == texts and len(set(texts.values())) > 1

    sampled, _ = ask(scenes, eval_batch=4, temperature=1.0, seed="7")
    rest, seen = ask(scenes, eval_batch=4, temperature=1.0, seed="7", skip=lambda part: scenes[0] in part)
    first = {e.id for e in scenes[0].examples}
    assert rest == {key: text for key, text in sampled.items() if key not in first}  # each batch has its own seed
    assert sorted(reads) == sorted(path for scene in scenes[1:] for path in scene.images) and len(seen) == len(scenes) - 1
    assert ask(scenes, skip=lambda part: True) == ({}, []) and not reads
    assert ask(scenes, eval_batch=4, temperature=1.0, seed="8")[0] != sampled


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_bar_ends_exactly_at_its_total(size, ladder_data, backbone, tmp_path, monkeypatch):
    """Also with several processes whose shares are unequal, and when a stopped run is resumed."""
    settings = settings_for("--benchmarks", "stage0", "--data", ladder_data, "--out", tmp_path, *SMALL)
    backbone.processor.size = {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}
    items, _ = benchmarks.read_items("stage0", settings, tmp_path)
    items, bars = items[:9], []  # three scenes, of four, two and three questions

    class Watched(evaluation.Progress):
        def __init__(self, *args):
            super().__init__(*args)
            self.values, self.hidden = [self.n], self.disable  # a bar that is closed is disabled, too
            bars.append(self)

        def update(self, count=1):
            super().update(count)
            self.values.append(self.n)

    monkeypatch.setattr(evaluation, "Progress", Watched)
    monkeypatch.setattr(runs, "world_size", lambda: size)
    for rank in range(size):
        monkeypatch.setattr(runs, "rank", lambda: rank)  # noqa: B023
        done = {}
        evaluation.answer_items(backbone, items, "model", "direct", 0.0, 0, settings, done)
        assert len(done) == len([e for scene in runs.share(sorted_scenes(items)) for e in scene.examples])
        for kept in range(len(done) + 1):  # a run that was stopped there
            some = dict(list(done.items())[:kept])
            evaluation.answer_items(backbone, items, "model", "direct", 0.0, 0, settings, some)
            assert some == done
    assert len({bar.share for bar in bars}) == size and sum({bar.share for bar in bars}) == 9
    assert sum(not bar.hidden for bar in bars) >= 5
    for bar in bars:
        assert bar.total == 9 and bar.values[-1] == (0 if bar.hidden else 9)
        assert bar.values == sorted(bar.values) and bar.values[0] == 0


def sorted_scenes(items):
    return sorted(common.group_scenes([item.example for item in items]), key=lambda scene: (scene.data_type, len(scene.images)))


# The toy's ladder


@pytest.mark.parametrize("count, least", [(12, 3), (11, 3), (4, 1), (0, 10), (99, 10)])
def test_the_toy_asks_as_many_questions_of_every_kind_as_they_reach(count, least, tmp_path):
    """Ten, six, two and five rows of four kinds, two of which share a type, in a random order."""
    kinds = {10: ("single_image", "size"), 6: ("video", "size"), 2: ("video", "area"), 5: ("multi_view", "count")}
    rows = []
    for n, (data_type, kind) in kinds.items():
        row = {"options": None, "answer": "2", "image": ["a.png"], "question_type": kind, "data_type": data_type}
        rows += [row | {"question": f"{n} {place}?"} for place in range(n)]
    random.Random(0).shuffle(rows)
    (tmp_path / "heldout" / "images").mkdir(parents=True)
    Image.new("RGB", (56, 56)).save(tmp_path / "heldout" / "images" / "a.png")
    write_lines(tmp_path / "heldout" / "spld_spatial_data.jsonl", rows)
    chosen = [[item.example.question for item in evaluation.toy_items(tmp_path, "spatial", count, seed)] for seed in (0, 0, 1)]
    for some in chosen:
        found = Counter(int(question.split()[0]) for question in some)
        assert found.total() == min(count or 23, 23)
        more = [n for n in kinds if found[n] != min(n, least)]  # where the count ends, some have one more
        assert all(found[n] == least + 1 for n in more) and len(more) == found.total() - sum(min(n, least) for n in kinds)
        places = [[row["question"] for row in rows].index(question) for question in some]
        assert places == sorted(set(places))  # in the order of the file, none twice
    assert chosen[0] == chosen[1] and (chosen[0] != chosen[2]) == (len(chosen[0]) < 23)


GUESS = {"single_image: size": 0.5, "multi_view: count": 0.25, "multi_view: size": 0.5, "video: area": 1.0}
ANSWERS = [  # mode, temperature, kind, score, well formed
    ("direct", 0, "single_image: size", 1.0, True), ("direct", 0, "single_image: size", 0.5, True),
    ("direct", 0, "multi_view: count", 1.0, True), ("direct", 0, "multi_view: size", 0.0, False),
    ("direct", 0, "video: area", 0.4, True),
    ("direct", 1, "video: area", 0.2, False), ("direct", 1, "multi_view: size", 0.6, True),
    *(("think", 0, kind, 0.0, False) for kind in GUESS), ("think", 1, "video: area", 0.0, False),
]  # fmt: skip


def test_the_tables_of_the_ladder_by_hand():
    boxes = [{"label": "red cube", "bbox_2d": [0, 0, 10, 10]}, {"label": "blue ball", "bbox_2d": [0, 0, 10, 10]}]
    texts = [("single_image", boxes[:1], boxes),
             ("multi_view", [box | {"picture": 2} for box in boxes], [boxes[0] | {"picture": 2}]),
             ("video", boxes[:1], [boxes[0] | {"picture": 3}])]  # fmt: skip
    rows = [{"mode": "locate", "temperature": 0, "text": json.dumps(said), "answer": wanted, "data_type": data_type}
            for data_type, said, wanted in texts]  # fmt: skip
    for mode, temperature, kind, score, formed in ANSWERS:
        data_type, question_type = kind.split(": ")
        form = {"legal": formed, "format": not formed} if mode == "direct" else {"legal": not formed, "format": formed}
        row = {"mode": mode, "temperature": temperature, "data_type": data_type, "question_type": question_type, "score": score}
        rows.append(row | form)
    model = evaluation.summarise(rows, GUESS)
    assert model["mode"] == "think" and model["direct"]["by_pictures"] == {"single_image": 0.75, "multi_view": 0.5, "video": 0.4}
    # Pairs of a type and a kind of pictures count the same: .25 / .5, .75 / .75, -.5 / .5; what the guess solves does not count.
    assert model["direct"]["skill"] == pytest.approx((0.5 + 1 - 1) / 3)
    scores = {"guess": GUESS, "guess_accuracy": 0.51, "models": {"m": model}, "questions": 5,
              "counts": {"single_image: size": 2, "multi_view: count": 1, "multi_view: size": 1, "video: area": 1}}  # fmt: skip
    assert evaluation.ladder_table(scores) == [
        ["", "answers", "IoU", "acc@0.5", "IoU several", "single image", "multi view", "video", "skill",
         "format", "greedy", "sampled", "given format"],
        ["best constant guess", "", "", "", "", "0.500", "0.375", "1.000", "0.000", "", "0.510", "", ""],
        ["m", "direct", "0.500", "0.500", "0.500", "0.750", "0.500", "0.400", "0.167", "0.800", "0.580", "0.400", "0.600"],
        ["", "think", "", "", "", "0.000", "0.000", "0.000", "-0.778", "0.000", "0.000", "0.000", "-"],
    ]  # fmt: skip
    assert evaluation.types_table(scores) == [
        ["greedy", "questions", "guess", "m direct", "m think"],
        ["single image: size", "2", "0.500", "0.750", "0.000"],
        ["multi view: count", "1", "0.250", "1.000", "0.000"],
        ["multi view: size", "1", "0.500", "0.000", "0.000"],
        ["video: area", "1", "1.000", "0.400", "0.000"],
    ]


def test_the_ladder_is_drawn_with_one_axis_for_boxes_and_one_for_each_kind_of_pictures(tmp_path, monkeypatch):
    part = {"by_type": {kind: 0.3 for kind in GUESS}, "skill": 0.1, "localize": {"iou": 0.7, "iou_several": 0.6}, "mode": "direct"}
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    report.draw_ladder({"guess": GUESS, "questions": 5, "models": {"a": part, "b": part | {"skill": 0.2}}}, tmp_path / "x.png")
    (figure,) = figures
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["boxes and skill", "single image", "multi view", "video"]
    heights = [[round(bar.get_height(), 3) for bar in axis.patches] for axis in figure.axes]
    assert heights == [[0.7, 0.6, 0.1, 0.7, 0.6, 0.2], [0.3] * 2, [0.3] * 4, [0.3] * 2]
    lines = [line.get_segments()[0][0][1] for axis in figure.axes for line in axis.collections]
    assert lines == list(GUESS.values())  # the best constant guess of each


# Whole runs


@pytest.fixture(scope="module")
def whole(downloads, tiny_model, tmp_path_factory):
    """The folder of a run over all six, in two processes, as a user starts it."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ("--model", tiny_model, "--data", downloads, "--out", folder / "out", *SMALL, "--benchmarks", *ALL)
    command = [sys.executable, str(ROOT / "eval.py"), *map(str, flags)]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "out" / "table.txt").read_text().strip() in done.stdout
    return folder / "out"


def read_run(folder):
    """(settings, rows, scores) of a run."""
    head, *rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().split("\n") if line]
    return head["settings"], rows, json.loads((folder / "scores.json").read_text())


def test_a_run_writes_all_it_promises(whole, tiny_model):
    settings, rows, scores = read_run(whole)
    assert settings["model"] == str(tiny_model) and settings["prompts"] == common.INSTRUCTIONS and settings["frames"] == 4
    assert (settings["min_picture_tokens"], settings["max_picture_tokens"], settings["decoding"]) == (4, 9, "greedy")
    assert re.fullmatch("[0-9a-f]{16}", settings["revision"]) and settings["revision"] == evaluation.fingerprint(tiny_model)
    assert [row["id"] for row in rows] == [f"{name}:{key}" for name in ALL for key, *_ in WANTED[name]]  # in order, none twice
    assert {path.name for path in whole.iterdir()} == {"pictures", "predictions.jsonl", "report.html", "scores.json", "table.txt"}
    assert list(scores["benchmarks"]) == list(ALL)
    for name, found in scores["benchmarks"].items():
        mine = [row for row in rows if row["id"].startswith(name + ":")]
        assert found["questions"] == len(WANTED[name]) and found["missing"] == 0
        assert {"strict", "strict_paper_average", "paper", "guess", "format", "legal"} <= set(found)
        for kind, score in found["strict"]["by_type"].items():
            assert score == pytest.approx(np.mean([row["score"] for row in mine if row["question_type"] == kind]))
    table = (whole / "table.txt").read_text()
    assert all(f"{name} ({len(WANTED[name])} questions)" in table for name in ALL) and "without pictures" not in table
    for words in ("published scorer", "strict", "best constant guess", "SpatialLadder-3B"):
        assert table.count(words) == len(ALL)
    assert len(page(whole / "report.html")[1]["answers"]) == len(rows)


TWO = ("--benchmarks", "cvbench", "vsi")


def go(folder, model, data, *flags):
    settings = settings_for("--model", model, "--data", data, "--out", folder, *SMALL, *TWO, *flags)
    evaluation.score_models(settings)


@pytest.fixture(scope="module")
def sampled(downloads, tiny_model, tmp_path_factory):
    """A run in this process, with two sampled answers a question."""
    folder = tmp_path_factory.mktemp("sampled")
    go(folder, tiny_model, downloads, "--samples", 2)
    return folder


def test_processes_and_samples_do_not_change_greedy_answers(whole, sampled):
    texts = [{row["id"]: row["text"] for row in read_run(folder)[1] if not row["temperature"]} for folder in (whole, sampled)]
    assert texts[1] == {key: texts[0][key] for key in texts[1]} and len(texts[1]) == 8
    strict = [read_run(folder)[2]["benchmarks"]["vsi"]["strict"] for folder in (whole, sampled)]
    assert strict[0] == strict[1]
    _, rows, scores = read_run(sampled)
    assert [sum(row["sample"] == n for row in rows) for n in range(3)] == [8, 8, 8]
    for name in ("cvbench", "vsi"):
        entropy = scores["benchmarks"][name]["semantic_entropy"]
        assert entropy["samples"] == 2 and 0 <= entropy["mean"] <= math.log(2) + 1e-9
        assert Image.open(sampled / f"entropy-{name}.png").width > 100


@pytest.mark.parametrize("kept, cut", [(3, 0), (5, 40), (12, 7), (0, 30)])  # whole lines, and letters of the next one
def test_a_stopped_run_goes_on_to_the_same_end(kept, cut, sampled, downloads, tiny_model, tmp_path, monkeypatch):
    lines = (sampled / "predictions.jsonl").read_bytes().split(b"\n")
    (tmp_path / "predictions.jsonl").write_bytes(b"".join(line + b"\n" for line in lines[:kept]) + lines[kept][:cut])
    made = []
    real = common.branch_generate
    monkeypatch.setattr(common, "branch_generate", lambda *a: made.append(sum(map(len, a[2]))) or real(*a))
    go(tmp_path, tiny_model, downloads, "--samples", 2)
    for name in ("predictions.jsonl", "scores.json", "table.txt"):
        assert (tmp_path / name).read_text().replace(str(tmp_path), str(sampled)) == (sampled / name).read_text(), name
    assert sum(made) <= 24 - 4 * ((kept - 1) // 4)  # batches of four: whole ones are not asked again
    made.clear()
    go(tmp_path, tiny_model, downloads, "--samples", 2)
    assert not made  # nothing is left to ask


@pytest.mark.parametrize("text", ["\x0b\x1c\x85line\u2029line\u2028", "naïve é"], ids=["line ends", "cut in a letter"])
def test_answers_may_hold_any_letter(text, tmp_path):
    row = {"model": "model", "mode": "direct", "temperature": 0.0, "sample": 0, "text": text}
    evaluation.save_predictions(tmp_path, {"seed": 0}, [row | {"id": "1"}, row | {"id": "2"}])
    done = evaluation.open_predictions(tmp_path, {"seed": 0})
    assert [row["text"] for row in done.values()] == [text, text]
    data = (tmp_path / "predictions.jsonl").read_bytes()
    (tmp_path / "predictions.jsonl").write_bytes(data[: data.rindex(text[-1].encode()) + 1])  # stopped inside a letter
    assert [key[-1] for key in evaluation.open_predictions(tmp_path, {"seed": 0})] == ["1"]


OTHERS = {"seed": 1, "frames": 2, "max_picture_tokens": 4, "mode": "think", "questions": 3, "vsi": "pruned", "hint": "box"}


@pytest.mark.parametrize("name, value", OTHERS.items())
def test_other_settings_are_refused_by_name(name, value, sampled, downloads, tiny_model, tmp_path):
    shutil.copy(sampled / "predictions.jsonl", tmp_path)
    with pytest.raises(SystemExit, match=f"{name}.*--resume never"):
        go(tmp_path, tiny_model, downloads, f"--{name}", value)
    assert (tmp_path / "predictions.jsonl").read_bytes() == (sampled / "predictions.jsonl").read_bytes()


def test_another_model_is_refused_and_never_starts_anew(sampled, downloads, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other" / "model")
    out = tmp_path / "out"
    out.mkdir()
    lines = (sampled / "predictions.jsonl").read_text().split("\n")
    rows = [json.loads(line) | {"text": "A", "score": 1.0} for line in lines[1:-1]]  # answers that no model gave
    (out / "predictions.jsonl").write_text("\n".join([lines[0], *map(json.dumps, rows), ""]))
    with pytest.raises(SystemExit, match="made with model"):
        go(out, other, downloads)
    go(out, other, downloads, "--resume", "never")
    wanted = [row["text"] for row in read_run(sampled)[1] if not row["temperature"]]
    assert [row["text"] for row in read_run(out)[1]] == wanted and "other, strict" in (out / "table.txt").read_text()


def test_a_mistyped_model_does_not_lock_the_folder(downloads, tiny_model, tmp_path):
    with pytest.raises(SystemExit, match="has no model"):
        go(tmp_path, "runs/none", downloads)
    go(tmp_path, tiny_model, downloads)


def test_missing_pictures_are_skipped_and_counted_when_allowed(downloads, tiny_model, tmp_path):
    shutil.copytree(downloads, tmp_path / "data")
    (tmp_path / "data" / "VSI-Bench" / "scannet" / "scene1.mp4").unlink()
    go(tmp_path / "out", tiny_model, tmp_path / "data", "--allow_missing", "true")
    _, rows, scores = read_run(tmp_path / "out")
    assert scores["benchmarks"]["vsi"]["missing"] == 2 and scores["benchmarks"]["vsi"]["questions"] == 2 and len(rows) == 6
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "vsi (2 questions, 2 without pictures skipped)" in table and "cvbench (4 questions)" in table


def test_the_answers_of_a_slow_process_are_waited_for(tmp_path, monkeypatch):
    """The first process is done; the second writes its last answer and only then comes to the barrier."""
    row = {"model": "model", "mode": "direct", "temperature": 0.0, "sample": 0, "text": "A"}
    rows = [row | {"id": str(n)} for n in range(2)]
    evaluation.save_predictions(tmp_path, {"seed": 0}, rows[:1])
    late = tmp_path / "predictions.1.jsonl"
    arrive = [lambda: late.write_text(json.dumps(rows[1]) + "\n")]
    monkeypatch.setattr(runs, "barrier", lambda: arrive and arrive.pop()())
    found = evaluation.collect(tmp_path, {"seed": 0}, [evaluation.key_of(row) for row in rows])
    assert found == rows


# Other data under the same names


def write_folder(root, photo, order=(0, 1, 2, 3), seed=0):
    """A folder in stage 0's schema: four questions about three pictures, two about the first; the boxes of the third."""
    (root / "images" / "room").mkdir(parents=True, exist_ok=True)
    for n in range(3):
        photo(84, 56, seed + n).save(root / "images" / "room" / f"{n}.png")
    rows = [{"question_id": n, "question": f"Question {n}?", "options": SIDES if n % 2 else None, "answer": "C" if n % 2 else "2.5",
             "image": [f"room/{max(0, n - 1)}.png"], "question_type": f"type {n // 2}", "data_type": "single_image"}
            for n in range(4)]  # fmt: skip
    write_lines(root / "spld_spatial_data.jsonl", [rows[n] for n in order])
    boxes = {"answer": [{"bbox_2d": [5, 5, 60, 40], "label": "chair"}]}
    write_lines(root / "spld_grounding_data.jsonl", [{k: rows[3][k] for k in ("question", "image", "data_type")} | boxes])
    return root


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ask_stage0(out, model, data, *flags):
    evaluation.score_models(settings_for("--benchmarks", "stage0", "--model", model, "--data", data, "--out", out, *SMALL, *flags))
    return [{k: v for k, v in row.items() if k != "images"} for row in read_run(out)[1]]


@pytest.mark.parametrize("change, anew", [({"order": (0, 2, 1, 3)}, 2), ({"seed": 50}, 4), ({}, 0)],
                         ids=["two rows swapped", "other pictures of the same names", "the same again"])  # fmt: skip
def test_answers_to_other_data_are_asked_anew(change, anew, photo, tiny_model, tmp_path, capsys):
    data = write_folder(tmp_path / "data", photo)
    before = ask_stage0(tmp_path / "out", tiny_model, data)
    write_folder(data, photo, **change)
    capsys.readouterr()
    after = ask_stage0(tmp_path / "out", tiny_model, data)
    assert after == ask_stage0(tmp_path / "fresh", tiny_model, data) and (after == before) == (not anew) and len(after) == 4
    said = [line for line in capsys.readouterr().err.splitlines() if "asked anew" in line]
    assert len(said) == bool(anew) and all(f" {anew} answers" in line for line in said)


def write_spar(root, photo, seed, truths):
    rows = [{"id": f"q/{n}", "image": [as_bytes(photo(64, 48, seed + n))], "question": "Where is it?\n" + "\n".join(SIDES),
             "answer": truth, "task": "obj_spatial_relation_oo"} for n, truth in enumerate(truths)]  # fmt: skip
    write_table(root / "SPAR-Bench" / "test.parquet", rows, image=datasets.List(datasets.Image()))


def test_a_table_that_was_replaced_is_asked_with_its_own_pictures(photo, tiny_model, tmp_path, capsys):
    asked = ("--benchmarks", "spar")
    write_spar(tmp_path, photo, 0, "ABC")
    go(tmp_path / "out", tiny_model, tmp_path, *asked)
    write_spar(tmp_path, photo, 70, "BBD")
    for folder, resume in (("fresh", "auto"), ("out", "auto"), ("out", "never")):
        go(tmp_path / folder, tiny_model, tmp_path, *asked, "--resume", resume)
        _, rows, scores = read_run(tmp_path / folder)
        assert [row["answer"] for row in rows] == ["B", "B", "D"]
        for n, row in enumerate(rows):
            assert np.array_equal(common.load_image(row["images"][0]), photo(64, 48, 70 + n))
        if folder == "fresh":
            wanted = [row["text"] for row in rows], scores
        assert ([row["text"] for row in rows], scores) == wanted
    assert capsys.readouterr().err.count(" 3 answers are to other questions") == 1


@pytest.mark.parametrize("name, value", [("question", "Other?"), ("options", ["A. up"]), ("answer", "B"), ("data_type", "video"),
                                         ("question_type", "y"), ("images", ("b.png", "a.png"))])  # fmt: skip
def test_an_answer_belongs_to_its_question_its_truth_and_its_pictures(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a.png", "b.png"):
        Path(path).write_text(path)
    example = {"id": "x:1", "images": ("a.png", "b.png"), "data_type": "multi_view", "question_type": "x", "question": "Which?",
               "options": None, "answer": "A"}  # fmt: skip
    first, other = (Item("toy", {}, Example(**some)) for some in (example, example | {name: value}))
    assert evaluation.row_digest(first) != evaluation.row_digest(other)
    assert evaluation.row_digest(first) == evaluation.row_digest(Item("toy", {}, Example(**example)))
    row = {"model": "m", "mode": "direct", "temperature": 0.0, "sample": 0, "id": "x:1", "digest": evaluation.row_digest(first)}
    kept = row | {"id": "vsi:7", "digest": "of another benchmark"}
    evaluation.save_predictions(tmp_path, {}, [row, kept])
    assert len(evaluation.open_predictions(tmp_path, {}, items=[first])) == 2
    assert list(evaluation.open_predictions(tmp_path, {}, items=[other]).values()) == [kept]
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 2  # the header and that one


def test_hints_and_embedded_pictures_are_named_by_their_content(photo, tmp_path):
    drawn = []
    for seed in (0, 60):
        data = write_folder(tmp_path / "data", photo, seed=seed)
        benchmarks.file_digest.cache_clear()
        drawn.append(read("stage0", data, tmp_path, "--hint", "box")[0][0].example.images[0])
    first, second = (np.asarray(common.load_image(path)) for path in drawn)
    for found, seed in ((first, 0), (second, 60)):
        assert np.array_equal(found[45:], np.asarray(photo(84, 56, seed + 2))[45:])  # below the box
    one, two = (benchmarks.unpack([{"bytes": text}], tmp_path / "p", "q/1") for text in (b"one", b"two"))
    assert [Path(path).read_bytes() for path in one + two] == [b"one", b"two"]


# Memory


def wide_model(folder, family="qwen2_5_vl", **config):
    """A model of the 3B model's proportions, an eighth as wide; or a Qwen3-VL."""
    tokenizer = toy_world.build_tokenizer(["How many chairs are in this room? 0123456789", *common.INSTRUCTIONS.values()] * 3)
    model = toy_world.build_model(tokenizer, 0, family)
    made, processor = model.config, toy_world.build_processor(model)
    common.limit_pictures(processor, 1, 1024)
    made.text_config.update({"hidden_size": 256, "intermediate_size": 1376, "num_attention_heads": 2, "num_key_value_heads": 1,
                             "vocab_size": 4096} | config.get("text", {}))  # fmt: skip
    made.text_config.rope_parameters["mrope_section"] = [6, 5, 5] if family == "qwen3_vl" else [16, 24, 24]  # 32 or 128 a head
    made.vision_config.update({"depth": 2, "fullatt_block_indexes": [1], "hidden_size": 160, "intermediate_size": 428,
                               "num_heads": 4, "out_hidden_size": 256} | config.get("vision", {}))  # fmt: skip
    if family == "qwen2_vl":  # other names: embed_dim is the tower's width
        made.vision_config.update({"hidden_size": 256, "embed_dim": 160})
    for part in (tokenizer, made, processor):
        part.save_pretrained(folder)
    return made


def announced(capsys):
    """{part: MB, "peak", "available"} of the memory line."""
    line = re.findall("memory in MB: .*", capsys.readouterr().err)[-1]
    found = {name: float(size.replace(",", "")) for name, size in re.findall(r"([a-z]+) ([\d,]+)(?=[,; ])", line)}
    return found | dict(zip(("peak", "available"), (float(x.replace(",", "")) for x in re.findall("[\\d,]+", line)[-2:])))


def picture_scenes(folder, photo, count, questions=1):
    """`count` pictures of 448 x 448 pixels, 256 tokens each, with `questions` questions each."""
    examples = []
    for n in range(count):
        photo(448, 448, n).save(folder / f"{n}.bmp")
        examples += [Example(f"{n}:{q}", (str(folder / f"{n}.bmp"),), "single_image", "x", f"How many? {q}", None, "2")
                     for q in range(questions)]  # fmt: skip
    return common.group_scenes(examples)


@pytest.mark.parametrize("family, load, new_tokens", [
    ("qwen2_5_vl", "fp32", 12), ("qwen2_5_vl", "bf16", 2), ("qwen2_5_vl", "4bit", 2), ("qwen3_vl", "fp32", 12),
    ("qwen2_vl", "fp32", 12),
])  # fmt: skip
def test_the_memory_announced_for_answers_covers_the_measured_peak(family, load, new_tokens, tmp_path, photo, capsys, monkeypatch):
    common.FAMILIES[family].model(wide_model(tmp_path, family)).save_pretrained(tmp_path)
    scenes, settings = picture_scenes(tmp_path, photo, 4), SimpleNamespace(eval_batch=4, frames=4)
    with monkeypatch.context() as patch:
        patch.setattr(common, "load_backbone", None)  # weights are not loaded
        patch.setattr(memory, "device_memory", lambda device: 1e12)
        memory.check_answers(tmp_path, load, scenes, "think", settings, new_tokens)
    found = announced(capsys)
    backbone = common.load_backbone(tmp_path, load)
    backbone.stop = [-1]
    weights = list(backbone.model.parameters())
    for weight in backbone.model.parameters():
        if state := getattr(weight, "quant_state", None):
            weights += [state.absmax, state.code, state.state2.absmax, state.state2.code]
    assert found["weights"] == pytest.approx(sum(weight.numel() * weight.element_size() for weight in weights) / 1e6, abs=1.01)
    prompts = [common.prompt_text(scene.examples[0], "think") + common.BRANCH_END for scene in scenes]
    with torch.no_grad(), Peak([*weights, *backbone.model.buffers()]) as counted:
        patches, ahead = ([common.scene_patches(backbone, scene) for scene in scenes] for _ in range(2))  # of this batch, the next
        prefixes = common.encode_scenes(backbone, scenes, patches=patches)
        prompts = [[list(common.encode_text(backbone.tokenizer, prompt))] for prompt in prompts]
        common.branch_generate(backbone, prefixes, prompts, new_tokens)
    assert len(ahead) == 4 and counted.peak / 1e6 <= found["peak"] + 0.5 <= 1.3 * counted.peak / 1e6 + 1


def test_the_true_shape_is_refused_before_anything_is_loaded(tmp_path, photo, capsys, monkeypatch):
    """The file of its weights is empty: it is not looked at. Sums by hand for 3,754,622,976 weights, the published number."""
    text = {"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "layer_types": ["full_attention"] * 36}  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    wide_model(tmp_path, text=text, vision=vision)
    (tmp_path / "model.safetensors").touch()
    scenes, settings = picture_scenes(tmp_path, photo, 12, questions=2), SimpleNamespace(eval_batch=0, frames=4)
    monkeypatch.setattr(memory, "device_memory", lambda device: 24e9)
    memory.check_answers(tmp_path, "bf16", scenes, "think", settings, 1024)
    found = announced(capsys)
    prompt = common.prompt_text(scenes[0].examples[0], "think") + common.BRANCH_END
    prompt = len(common.AutoTokenizer.from_pretrained(tmp_path)(prompt)["input_ids"])
    tokens = 8 * 256 + 16 * (prompt + 1024)  # sixteen questions about eight pictures
    assert settings.eval_batch == 16 and found["weights"] == pytest.approx(3_754_622_976 * 2 / 1e6, abs=1)
    assert found["cache"] == pytest.approx(tokens * 36 * 2 * 2 * 128 * 2 / 1e6, rel=0.02) and found["available"] == 24_000
    assert found["logits"] == pytest.approx(16 * 151_936 * 12 / 1e6, abs=1)
    for load, free, batch, new_tokens, named in (("fp32", 14e9, 16, 64, "--load"), ("4bit", 3e9, 256, 4096, "--max_new_tokens"),
                                                 ("bf16", 8e9, 256, 4096, "--load")):  # fmt: skip
        monkeypatch.setattr(memory, "device_memory", lambda device: free)  # noqa: B023
        settings.eval_batch = batch
        with pytest.raises(SystemExit, match=f"This needs .* GB of {free / 1e9:.1f} GB.*{named}"):
            memory.check_answers(tmp_path, load, scenes, "think", settings, new_tokens)


def test_too_little_memory_ends_eval_before_the_weights(photo, tiny_model, tmp_path, monkeypatch):
    data = write_folder(tmp_path / "data", photo)
    monkeypatch.setattr(memory, "device_memory", lambda device: 1e6)
    monkeypatch.setattr(common, "load_backbone", None)
    with pytest.raises(SystemExit, match="This needs"):
        ask_stage0(tmp_path / "out", tiny_model, data)
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


@pytest.mark.parametrize("flag, loaded", [("auto", "fp32"), ("bf16", "bf16")])
def test_on_a_cpu_the_header_says_what_is_loaded(flag, loaded, photo, tiny_model, tmp_path, monkeypatch):
    seen, real = [], common.load_backbone
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common, "load_backbone", lambda *a: seen.append(real(*a)) or seen[-1])
    ask_stage0(tmp_path / "out", tiny_model, write_folder(tmp_path / "data", photo), "--load", flag)
    header = read_run(tmp_path / "out")[0]
    assert header["load"] == loaded and seen[0].model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[loaded]


def test_settings_follow_from_the_model():
    for flags, out in (
        (("--benchmarks", "vsi", "--model", "runs/3b/stage3/model"), "runs/3b/stage3/eval"),
        (("--benchmarks", "vsi", "--model", "runs/3b/stage3/model/"), "runs/3b/stage3/eval"),
        (("--benchmarks", "vsi", "--model", "Qwen/Qwen2.5-VL-3B-Instruct"), "runs/eval/Qwen2.5-VL-3B-Instruct"),
        (("--benchmarks", "vsi", "--model", "runs/3b/stage3/model", "--out", "runs/toy/eval"), "runs/toy/eval"),
        ((), "runs/toy/eval"), (("--model", "runs/3b/stage3/model"), "runs/toy/eval"),
    ):  # fmt: skip
        assert settings_for(*flags).out == out, flags


# Traces


def test_traces_are_the_right_answers_that_stage_3_reads(photo, tiny_model, tmp_path, monkeypatch):
    """Texts by hand: [greedy, sample 1, sample 2] of each question; only some are right, well formed, and have a thought."""
    data = write_folder(tmp_path / "data", photo)
    texts = {  # questions 0 and 2 have 2.5 as their answer, 1 and 3 the letter C
        "Question 0?": ["2.5", "<think>a</think><answer>9</answer>", "<think>b</think><answer>2.5</answer>"],
        "Question 1?": ["<think>c</think><answer>front</answer>", "<think>d</think><answer>C</answer>", "C"],
        "Question 2?": ["<think> </think><answer>2.5</answer>", "<think>e</think><answer>2.1</answer>", "<answer>2.5</answer>"],
        "Question 3?": ["<think>f</think><answer>B</answer>", "<think>g</think><answer>C</answer>", "x<think>C</think>"],
    }
    asked = []

    def answers(backbone, scenes, mode, limit, temperature, batch, keep, seed, skip):
        for scene in scenes:
            if not skip([scene]):
                asked.append(scene)
                yield [scene], [[texts[e.question][int(seed.split()[1])] for e in scene.examples]]

    monkeypatch.setattr(memory, "check_answers", lambda *_: None)
    monkeypatch.setattr(runs, "answer_batches", answers)
    flags = ("--samples", 2, "--mode", "think", "--traces", data / "spld_coldstart_data.jsonl")
    wanted = {"Question 0?": "b", "Question 1?": "c", "Question 3?": "g"}
    for limit, count in ((0, 3), (1, 2)):  # types: questions 0 and 1, 2 and 3
        ask_stage0(tmp_path / "out", tiny_model, data, *flags, "--traces_per_type", limit)
        examples = common.read_examples(data, "coldstart")
        thoughts = {e.question.split("\n")[0]: e.solution.partition("<think>")[2].partition("</think>")[0] for e in examples}
        assert thoughts.items() <= wanted.items() and len(examples) == len(thoughts) == count and "Question 3?" in thoughts
    assert len(asked) == 9  # three scenes, greedy and twice sampled: the second run asks nothing
    spatial = {e.question: e for e in common.read_examples(data, "spatial")}
    for e in examples:
        source = spatial[e.question.split("\n")[0]]
        prompt, completion = common.training_pair(e)
        assert prompt == common.prompt_text(source, "think") + common.BRANCH_END and e.images == source.images
        assert common.score_answers([completion.removesuffix(common.STOP)], [source])[0][0] == 1
    items, rows = read("stage0", data, tmp_path)[0], read_run(tmp_path / "out")[1]  # 2.1 of 2.5 is near
    evaluation.write_traces(settings_for(*flags, "--trace_score", 0.1), items, rows)
    assert len(common.read_examples(data, "coldstart")) == 4


@pytest.mark.parametrize("flags", [(), ("--benchmarks", "stage0", "vsi"), ("--benchmarks", "stage0", "--mode", "direct"),
                                   ("--benchmarks", "stage0", "--hint", "box")])  # fmt: skip
def test_traces_of_anything_else_are_refused(flags, tmp_path):
    with pytest.raises(SystemExit, match="--traces needs"):
        evaluation.score_models(settings_for("--traces", tmp_path / "x.jsonl", "--out", tmp_path, "--model", "x", *flags))


def test_without_a_right_answer_no_traces_are_written(tmp_path):
    settings = settings_for("--traces", tmp_path / "x.jsonl")
    item = Item("stage0", {"image": "a"}, Example("s:1", ("a",), "single_image", "x", "?", None, "2"))
    with pytest.raises(SystemExit, match="not written"):
        evaluation.write_traces(settings, [item], [{"id": "s:1", "format": 0.0, "score": 1.0, "text": "2"}])
    assert not (tmp_path / "x.jsonl").exists()


# Analyses


@pytest.mark.parametrize("texts, options, shares", [
    (["A", "(A)", "<think>B</think><answer>A. left</answer>", "right"], SIDES, [3, 1]),
    (["A", "B", "C", "D"], SIDES, [1, 1, 1, 1]), (["A"] * 5, SIDES, [5]),
    (["2", "two", "2.0 m", "3"], None, [3, 1]), (["2", "no", "no", "2 or 3"], None, [1, 2, 1]), (["A or B", "A"], SIDES, [1, 1]),
])  # fmt: skip
def test_semantic_entropy_by_hand(texts, options, shares):
    wanted = -sum(n / len(texts) * math.log(n / len(texts)) for n in shares)
    assert benchmarks.semantic_entropy(texts, options) == pytest.approx(wanted)


@pytest.mark.parametrize("hint", ["box", "box+line"])
def test_a_hint_is_drawn_on_a_copy(hint, tmp_path):
    Image.new("RGB", (200, 120), "gray").save(tmp_path / "a.png")
    boxes = {"chair": [10, 20, 50, 80], "bed": [120, 40, 190, 100]}
    item = Item("stage0", {}, Example("x:1", (str(tmp_path / "a.png"),), "single_image", "", "", None, ""), boxes)
    benchmarks.draw_hint(item, hint, tmp_path / "deep" / "b.png")
    grey, drawn = (common.load_image(tmp_path / name) for name in ("a.png", "deep/b.png"))
    assert grey.getcolors() == [(200 * 120, (128, 128, 128))]
    for (x1, y1, x2, y2), colour in zip(boxes.values(), ((255, 0, 0), (0, 255, 0))):
        corners = [(x1, y1), (x2 - 1, y1), (x1, y2 - 1), (x2 - 1, y2 - 1)]
        assert [drawn.getpixel(xy) for xy in corners] == [colour] * 4
        assert [drawn.getpixel((x1 - 1, y1)), drawn.getpixel((x2, y2 - 1)), drawn.getpixel((x2 - 3, y2 - 3))] == [(128,) * 3] * 3
    line = drawn.getpixel(((30 + 155) // 2, (50 + 70) // 2))  # half way from middle to middle
    assert line == ((255, 255, 0) if hint == "box+line" else (128, 128, 128))


def test_cells_are_in_a_box_by_their_middle():
    found = benchmarks.inside_boxes([[0, 0, 20, 10]], (40, 20), (2, 4))
    assert found.tolist() == [[True, True, False, False], [False] * 4]
    found = benchmarks.inside_boxes([[25, 15, 36, 16], [0, 0, 6, 6]], (40, 20), (2, 4))  # a middle on the edge counts once
    assert found.tolist() == [[True, False, False, False], [False, False, True, True]]
    assert not benchmarks.inside_boxes([[6, 6, 14, 14]], (40, 20), (2, 4)).any()


@pytest.mark.parametrize("thought, rest", [("", "B"), ("<think>x, y</think><answer>", "B</answer>")], ids=["direct", "think"])
def test_attention_equals_that_of_a_plain_forward(thought, rest, backbone, tiny_model, photo, tmp_path, monkeypatch):
    photo(112, 84).save(tmp_path / "a.png")
    example = Example("x:1", (str(tmp_path / "a.png"),), "single_image", "relative direction", "Which side?", SIDES, "B")
    ids = [list(common.encode_text(backbone.tokenizer, text)) if text else [] for text in (thought, rest)]
    monkeypatch.setattr(common, "branch_generate", lambda *a: [[ids[0] + ids[1] + backbone.stop[:1]]])
    weights, text = benchmarks.answer_attention(backbone, Item("stage0", {}, example), "think", 16)
    assert text == thought + rest and backbone.model.model.language_model.config._attn_implementation == "branches"
    assert weights.sum((1, 2)) == pytest.approx(1) and weights.shape == (len(backbone.model.model.language_model.layers), 3, 4)

    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()
    pixels, grids = common.picture_patches(backbone.processor, [common.load_image(tmp_path / "a.png")])
    words = f"<|im_start|>system\n{common.SYSTEM}<|im_end|>\n<|im_start|>user\n" + common.picture_text(grids, 2, False)
    words += common.prompt_text(example, "think") + common.BRANCH_END
    words = torch.tensor([backbone.tokenizer(words)["input_ids"] + ids[0]])
    picture = words == plain.config.image_token_id
    inputs = {"input_ids": words, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": picture.int()}
    with torch.no_grad():
        out = plain(**inputs, output_attentions=True)
    wanted = np.stack([layer[0, :, -1, picture[0]].mean(0).reshape(3, 4).numpy() for layer in out.attentions])
    assert np.allclose(weights, wanted / wanted.sum((1, 2), keepdims=True), atol=1e-5)


def test_hints_and_attention_on_a_folder_of_stage_0(ladder_data, tiny_model, tmp_path):
    settings = settings_for("--benchmarks", "stage0", "--data", ladder_data, "--model", tiny_model, "--out", tmp_path, *SMALL,
                            "--hint", "box+line", "--attention", 1)  # fmt: skip
    items, _ = benchmarks.read_items("stage0", settings, tmp_path)
    assert len(items) == 6 and all(item.example.data_type == "single_image" and item.boxes for item in items)
    assert items[1].boxes == {"chair": [64, 48, 320, 240], "table": [300, 200, 620, 470]}
    assert all(Path(item.example.images[0]).is_relative_to(tmp_path) for item in items)
    evaluation.score_models(settings)
    found = read_run(tmp_path)[2]["benchmarks"]["stage0"]
    assert found["questions"] == 6 and "paper" not in found and found["attention"]["questions"] == 1
    assert all(0 <= share <= 1 for share in found["attention"]["share"]) and 0 < found["attention"]["area"] < 1
    assert Image.open(tmp_path / "attention.png").width > 100


def test_curves_are_drawn_without_a_model(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{"step": n, "reward": n / 9, "reward_std": 0.1} | ({"think": 0.5} if n % 3 == 0 else {}) for n in range(9)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--curves", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags])
    evaluation.main()
    assert Image.open(tmp_path / "out" / "dynamics.png").width > 100
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(SystemExit, match="logged none"):
        report.draw_dynamics([tmp_path / "a"], tmp_path / "x.png")


# The report

HOSTILE = ["</script><script>document.title='hacked'</script>", "<img src=x onerror=\"document.title='hacked'\">", "<!--<script>",
           "\"'`${document.title='hacked'}", "\u202eright to left\u2028\u2029\u0085\x00", "]]></style><h1>",
           "x" * 1_000_000]  # fmt: skip


class Page(HTMLParser):
    """The elements of a page, and the text in its scripts."""

    def __init__(self):
        super().__init__()
        self.tags, self.scripts, self.names = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.names += [name for name, _ in attributes]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


def page(path):
    """(tags, JSON) of a report, checked to hold the page's own two scripts and nothing that could run."""
    found = Page()
    found.feed(path.read_text(encoding="utf-8"))
    assert found.tags.count("script") == 2 and not [name for name in found.names if name.startswith("on")]
    assert not {"img", "iframe", "object", "svg", "h3"} & set(found.tags) and found.tags.count("h1") == 1
    assert "const rows" in found.scripts[1]
    return found.tags, json.loads(found.scripts[0])


def write_page(path, answers, pictures, heading, table, kind):
    """A report with one section, a table and one bar."""
    sections = [{"heading": heading, "table": table, "by_type": {kind: 0.5}, "guess": {kind: 0.2}}]
    path.write_text(report.report_page(sections, answers, pictures), encoding="utf-8")


def write_hostile(folder):
    Image.new("RGB", (300, 200), "navy").save(folder / "a.png")
    items, rows, shown = {}, [], {}
    for n, text in enumerate(HOSTILE):
        pictures, options = (str(folder / "a.png"),), [f"A. {text[:999]}"]
        example = Example(f"{text[:200]}:{n}", pictures, "single_image", text[:99], text, options, text)
        items[example.id] = Item("vsi", {}, example)
        rows.append({"model": f"m{text[:50]}", "mode": "think", "temperature": 0.0, "id": example.id, "score": n / 6,
                     "question_type": text[:99], "images": list(example.images), "question": text, "options": example.options,
                     "answer": text, "text": f"<think>{text}</think><answer>{text}</answer>"})  # fmt: skip
    answers = report.report_answers(rows, items, {}, None, shown)
    write_page(folder / "report.html", answers, shown, HOSTILE[0], [["", HOSTILE[0]], HOSTILE[1:3]], HOSTILE[1])
    return rows


def test_hostile_text_stays_text(tmp_path):
    wanted = write_hostile(tmp_path)
    tags, data = page(tmp_path / "report.html")
    rows = data["answers"]
    assert tags.count("h2") == 2 and [row["verdict"] for row in rows] == ["wrong"] * 3 + ["right"] * 4
    assert (tmp_path / "report.html").stat().st_size < 300_000
    by_id = {row["id"]: row for row in rows}
    for row in wanted:
        found = by_id[report.safe_text(row["id"])]
        for name, text in (("question", row["question"]), ("answer", row["answer"]), ("said", row["answer"].strip())):
            assert found[name] == report.safe_text(text) and len(found[name]) < 4100
        assert found["options"] == [report.safe_text(option) for option in row["options"]]
        assert found["thought"].startswith("<think>" + report.safe_text(row["question"])[:3000])
        assert found["pictures"] == [[0, []]]  # one picture, without boxes
    [[address, width, height]] = data["pictures"]
    assert address.startswith("data:image/jpeg;base64,") and (width, height) == (300, 200)


def test_words_of_the_template_may_stand_in_headings_and_answers(tmp_path):
    text = "{{ answers }} {% endfor %} {# no"
    sample = dict.fromkeys(("benchmark", "kind", "type", "id", "thought", "said", "question", "answer"), text)
    sample |= {"options": [text], "score": 1.0, "verdict": "right", "pictures": []}
    write_page(tmp_path / "report.html", [sample], {}, text, [[text], [text]], text)
    assert page(tmp_path / "report.html")[1]["answers"] == [sample]
    assert (tmp_path / "report.html").read_text().count(text) == 4 + 9  # heading, two cells, bar; the answer


def test_bars_and_rows_of_a_page(tmp_path):
    table = [["x strict", "a"], ["best constant guess", "1"], ["x, strict", "2"], ["other", "3"]]
    sections = [{"heading": "h", "table": table, "by_type": {"near": 0.5, "far": 0.125}, "guess": {"near": 0.25}},
                {"heading": "bars only", "table": [], "by_type": {"near": 1.0}, "guess": {}}]  # fmt: skip
    text = re.sub(r"\n", "", report.report_page(sections, [], {}))
    assert '<tr class=""><th>x strict</th><th>a</th></tr>' in text and '<tr class=""><td>other</td><td>3</td></tr>' in text
    assert '<tr class="guess"><td>best constant' in text and '<tr class="ours"><td>x, strict' in text
    assert 'width:50.0%"></i><b style="left:25.0%"></b></span><span>50.0</span>' in text
    assert 'width:12.5%"></i></span><span>12.5</span>' in text
    assert text.count("<table>") == text.count("</table>") == 1 and text.count('class="bar"') == 3


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


@pytest.mark.skipif(not BROWSER, reason="no browser")
def test_a_browser_fills_the_list_and_runs_nothing_else(tmp_path):
    write_hostile(tmp_path)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"]
    command = [BROWSER, *flags, "--dump-dom", (tmp_path / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=tmp_path, env=os.environ)
    found = Page()
    found.feed(done.stdout)
    assert "<title>Evaluation</title>" in done.stdout and "7 answers, wrong ones first" in done.stdout
    assert found.tags.count("article") == 7 and found.tags.count("image") == 7 and found.tags.count("script") == 2
    assert found.tags.count("select") == 4 and found.tags.count("option") == 3 + 2 * (7 + 1) + 2
    assert not [name for name in found.names if name.startswith("on")] and "h3" not in found.tags


def test_a_model_in_which_one_middle_layer_learnt_has_another_fingerprint(tiny_model, tmp_path):
    backbone = common.load_backbone(tiny_model, "fp32")
    for name in ("one", "same"):
        files.save_model(backbone, tmp_path / name)
    before = evaluation.fingerprint(tmp_path / "one" / "model")
    assert evaluation.fingerprint(tmp_path / "same" / "model") == before
    with torch.no_grad():
        backbone.model.model.language_model.layers[2].self_attn.q_proj.weight += 1e-3
    files.save_model(backbone, tmp_path / "other")
    assert evaluation.fingerprint(tmp_path / "other" / "model") != before
    assert evaluation.fingerprint("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_another_tokenizer_or_processor_is_another_model(name, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "copy")
    assert evaluation.fingerprint(tmp_path / "copy") == evaluation.fingerprint(tiny_model)
    path = tmp_path / "copy" / name
    path.write_text(path.read_text().replace("1", "2", 1))
    assert evaluation.fingerprint(tmp_path / "copy") != evaluation.fingerprint(tiny_model)


def test_a_hub_id_is_known_by_its_commit(tmp_path, monkeypatch):
    folder, commit = tmp_path / "models--some--model", "0123456789abcdef0123456789abcdef01234567"
    for path, text in (("refs/main", commit), (f"snapshots/{commit}/config.json", "{}")):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
    real = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(evaluation, "try_to_load_from_cache", lambda *a: real(*a, cache_dir=tmp_path))
    assert evaluation.fingerprint("some/model") == commit and evaluation.fingerprint("some/other") == "some/other"
