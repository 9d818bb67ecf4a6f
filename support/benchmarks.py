"""The paper's six benchmarks (arXiv 2510.08531, section 5), their scorers and averages, and the paper's analyses.

1 adapters   a benchmark's folder, as it is downloaded from the hub -> Items. The network is never used
2 scorers    strict (right) and paper (the published scorers, faults included)
3 tables     the averages that the papers print, the published numbers, the best constant guess, skill
4 analyses   semantic entropy of sampled answers; attention of the answer on the objects in the question; hints
"""

import hashlib
import json
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import common
from common import Example

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise reading a local file is reported to the hub

# ------------------------------------------------------------------------------------------------
# 1. Adapters: one function a benchmark, rows in, items out
# ------------------------------------------------------------------------------------------------


@dataclass
class Item:
    """A question of a benchmark: the row as published, and the Example that the model answers (its answer is a letter, a
    number, or what the row holds)."""

    benchmark: str  # vsi, spbench, cvbench, spar, viewspatial; or stage0, toy
    row: dict
    example: Example
    boxes: dict = field(default_factory=dict)  # stage0, one picture: label -> box of the objects in the question
    digest: str = ""  # of the row and the contents of its pictures, see eval.py


SPAR_LOW = {f"{what}_prediction_{pair}" for what in ("depth", "distance") for pair in ("oc", "oo", "oc_mv", "oo_mv")}
SPAR_MIDDLE = {"view_change_infer", "position_matching", "camera_motion_infer"}
SPAR_BOXES = "The values are bounding boxes normalised to 0-1000, with the origin at the top-left corner of the picture."


def question_of(benchmark, row):
    """(options or None, right answer) of a benchmark's row: ["A. left", ...] and a letter, or None and a number as text.

    SPAR writes its options into the question, one a line or all on one; they are read from there. Its view_change_infer is
    None and the text.
    """
    if benchmark in ("vsi", "spbench"):
        options = row.get("options")
        return (None if options is None or len(options) == 0 else list(options)), str(row["ground_truth"]).strip()
    if benchmark == "cvbench":
        return [f"{letter}. {choice}" for letter, choice in zip("ABCDEFGH", row["choices"])], row["answer"].strip("() ")
    if benchmark == "viewspatial":
        return row["choices"].split("\n"), row["answer"].strip()[:1]
    if benchmark == "spar":
        if row["task"] in SPAR_LOW or row["task"] == "view_change_infer":
            return None, str(row["answer"]).strip()
        written = dict(re.findall(r"^[^\S\n]*\(?([A-F])[.):][^\S\n]*(.*)$", row["question"], re.MULTILINE))
        if "".join(written) not in ("AB", "ABC", "ABCD", "ABCDE", "ABCDEF"):
            written = options_of_line(row["question"])
        truth = str(row["answer"]).strip()[:1]
        return [f"{letter}. {written.get(letter, '')}" for letter in (written if truth in written else "ABCD")], truth
    raise ValueError(f"benchmark {benchmark!r}: choose vsi, spbench, cvbench, spar or viewspatial")


def options_of_line(text):
    """{letter: option} of "... A. left B. right ...": marks that follow each other as A, B, C, ..., from the last A on."""
    marks = []
    for mark in re.finditer(r"(?<!\S)\(?([A-F])[.):]\s*", text):
        marks = [] if mark[1] == "A" else marks
        marks += [mark] * (mark[1] == "ABCDEF"[len(marks) : len(marks) + 1])
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return {mark[1]: text[mark.end() : end].split("\n")[0].strip(" ,;") for mark, end in zip(marks, ends)}


def options_and_answer(item):
    """question_of an Item; rows of stage 0 and the toy are Examples already."""
    if item.benchmark in ("stage0", "toy"):
        return item.example.options, item.example.answer
    return question_of(item.benchmark, item.row)


def type_of(row):
    """The question type of a benchmark's row."""
    return row.get("task") or row["question_type"]


def require_file(path):
    """Raise SystemExit if a benchmark's file is missing."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing. Download the benchmark's folder from the hub into --data first.")


def table_rows(paths):
    """Rows of parquet or JSON(-lines) files, pictures as {"bytes": ...}, also where the file has plain bytes. Raises SystemExit
    naming a file that cannot be read."""
    for path in paths:
        require_file(path)
    kind = "parquet" if paths[0].suffix == ".parquet" else "json"
    try:
        rows = datasets.load_dataset(kind, data_files=[str(path) for path in paths], split="train")
    except Exception as error:  # whatever a broken file makes the readers raise
        raise SystemExit(f"{', '.join(map(str, paths))} cannot be read: {error.__cause__ or error}") from None
    for name, feature in rows.features.items():
        inner = getattr(feature, "feature", None)  # of a list
        if is_picture(feature):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif is_picture(inner):
            rows = rows.cast_column(name, type(feature)(datasets.Image(decode=False)))
    return rows


def is_picture(feature):
    """Whether a column of a table holds pictures: an Image, or plain bytes."""
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def with_ids(rows, *fields):
    """(id, row) of each row, the id made of `fields`. Where an id repeats, the row's number follows it."""
    seen = set()
    for number, row in enumerate(rows):
        key = "-".join(str(row[name]) for name in fields)
        key = f"{key}#{number}" if key in seen else key
        seen.add(key)
        yield key, row


def without_copies(paths):
    """The files of different content; of copies only the first. Raises SystemExit if they lie in several folders: these are
    versions of one table."""
    first = {}
    for path in paths:
        require_file(path)
        known = first.setdefault(file_digest(path), path)
        if known != path:
            common.print0(f"{path} is a copy of {known}: read once")
    folders = sorted({str(path.parent) for path in first.values()})
    if len(folders) > 1:
        raise SystemExit(f"There are different tables in {', '.join(folders)}. Keep one of these folders.")
    return list(first.values())


@lru_cache(None)
def file_digest(path):
    """SHA-256 of a whole file, 64 hex digits; videos, too (about a second a GB). Each file is read once a run."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(pictures, folder, name):
    """Write embedded pictures ({"bytes": ...}) to `folder`, once. A file is named by its question and its content, so that
    another picture never takes its place. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for picture in pictures:
        digest = hashlib.sha256(picture["bytes"]).hexdigest()[:16]
        path = folder / f"{re.sub(r'[^A-Za-z0-9_-]', '_', str(name))}-{digest}.img"
        if not path.is_file():
            new = path.with_suffix(f".{os.getpid()}")  # several processes may write it at the same time
            new.write_bytes(picture["bytes"])
            new.replace(path)
        paths.append(str(path))
    return tuple(paths)


def read_vsi(root, settings, folder):
    """VSI-Bench: questions about videos, <dataset>/<scene_name>.mp4. Adapters yield (id, row, picture files, question)."""
    root = root / "VSI-Bench"
    path = root / f"test_{settings.vsi}.parquet"
    if settings.vsi == "full":
        path = root / "test-00000-of-00001.parquet"
        path = path if path.is_file() else root / "test.jsonl"
    for key, row in with_ids(table_rows([path]), "id"):
        yield key, row, (str(root / row["dataset"] / f"{row['scene_name']}.mp4"),), row["question"]


def read_spbench(root, settings, folder, part="SI"):
    """SPBench: one picture (SI) or eight (MV)."""
    root = root / "SPBench"
    for key, row in with_ids(table_rows([root / f"SPBench-{part}.parquet"]), "id"):
        names = [row["images"]] if isinstance(row["images"], str) else list(row["images"])
        folders = (root, root / "images", root / f"SPBench-{part}-images")
        places = [[place / name for place in folders] + [place / row["scene_name"] / name for place in folders] for name in names]
        yield key, row, tuple(str(next(filter(Path.is_file, some), some[2])) for some in places), row["question"]


def read_spbench_mv(root, settings, folder):
    """SPBench-MV: as SPBench-SI, with eight pictures."""
    return read_spbench(root, settings, folder, "MV")


def read_cvbench(root, settings, folder):
    """CV-Bench: one embedded picture."""
    root = root / "CV-Bench"
    for key, row in with_ids(table_rows([root / "test_2d.parquet", root / "test_3d.parquet"]), "type", "idx"):
        yield key, row, unpack([row["image"]], folder / "pictures" / "cvbench", key), row["question"]


def read_spar(root, settings, folder):
    """SPAR-Bench: one to three embedded pictures; the options are part of the question."""
    root = root / "SPAR-Bench"
    paths = without_copies(sorted(root.glob("**/*.parquet"))) or [root / "test.parquet"]
    for key, row in with_ids(table_rows(paths), "id"):
        text = row["question"] + (f"\n{SPAR_BOXES}" if row["task"] in ("position_matching", "camera_motion_infer") else "")
        yield key, row, unpack(row["image"], folder / "pictures" / "spar", key), text


def read_viewspatial(root, settings, folder):
    """ViewSpatial-Bench: one or several pictures, paths that begin with the folder's own name."""
    path = root / "ViewSpatial-Bench" / "ViewSpatial-Bench.json"
    require_file(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON: {error}") from None
    for number, row in enumerate(rows):
        yield number, row, tuple(str(root / name) for name in row["image_path"]), row["question"]


ADAPTERS = {"vsi": read_vsi, "spbench-si": read_spbench, "spbench-mv": read_spbench_mv, "cvbench": read_cvbench,
            "spar": read_spar, "viewspatial": read_viewspatial}  # fmt: skip
BENCHMARKS = (*ADAPTERS, "stage0")
VSI_VERSIONS, HINTS = ("full", "debiased", "pruned"), ("", "box", "box+line")


def read_items(name, settings, folder):
    """The Items of a benchmark, and how many were left out because pictures are missing. Embedded pictures and hints are
    written below `folder`.

    Raises SystemExit naming the file, the id and the path of what is missing, before any model is loaded.
    """
    items, missing, scorer = [], 0, name.split("-")[0]
    if name == "stage0":
        items = read_stage0(Path(settings.data), settings.hint, folder)
    else:
        for key, row, images, text in ADAPTERS[name](Path(settings.data), settings, folder):
            lost = [path for path in images if not Path(path).is_file()]
            if lost and not settings.allow_missing:
                told = common.missing_file(lost[0], settings.data)
                raise SystemExit(f"{name}, question {key} (--allow_missing skips such questions): {told}")
            missing += bool(lost)
            if lost:
                continue
            options, answer = question_of(scorer, row)
            options = None if scorer == "spar" else options  # SPAR's question lists them already
            data_type = "video" if scorer == "vsi" else "single_image" if len(images) == 1 else "multi_view"
            text = common.clean_question(text)
            example = Example(f"{name}:{key}", images, data_type, type_of(row), text, options, answer)
            common.check_text(example, f"{name}, question {key}")
            items.append(Item(scorer, {key: value for key, value in row.items() if key != "image"}, example))
    if not items:
        raise SystemExit(f"{name}: no question is left ({missing} lack their pictures).")
    if settings.questions and settings.questions < len(items):
        items = random.Random(settings.seed).sample(items, settings.questions)
    return items, missing


def read_stage0(data, hint, folder):
    """Spatial rows of a folder in stage 0's schema, or of your own photos, with the boxes of the objects in the question, if the
    folder has them. With a hint, those boxes are drawn on the picture, and questions without boxes are left out (the paper's
    perception gap)."""
    boxes = {}
    for example in common.read_examples(data, "locate") if common.data_file(data, "locate").is_file() else []:
        boxes.setdefault((example.images[0], example.question), example.answer)
    rows, items = common.read_jsonl(common.data_file(data, "spatial")), []
    objects = common.read_jsonl(data / "objects.jsonl") if (data / "objects.jsonl").is_file() else []  # the toy's
    by_picture = {row["image"][0]: row["objects"] for row in objects}
    for row, example in zip(rows, common.read_examples(data, "spatial")):
        text, found = " ".join([example.question, *(example.options or [])]), []
        if example.data_type == "single_image":
            picture = row["image"] if isinstance(row["image"], str) else row["image"][0]
            found = boxes.get((example.images[0], example.question)) or [
                o for o in by_picture.get(picture, []) if re.search(rf"\b{re.escape(o['label'])}\b", text)
            ]
        items.append(Item("stage0", row, example, {box["label"]: box["bbox_2d"] for box in found}))
    if hint:
        items = [item for item in items if item.boxes]
        for item in items:
            drawn = f"{file_digest(item.example.images[0])} {json.dumps(item.boxes)}"  # what the picture depends on
            path = folder / "pictures" / hint / f"{hashlib.sha256(drawn.encode()).hexdigest()[:16]}.png"
            draw_hint(item, hint, path)
            item.example = replace(item.example, images=(str(path),))
    return items


def draw_hint(item, hint, path):
    """Draw the boxes of an item on a copy of its picture; box+line: also a line through their centres."""
    image = common.load_image(item.example.images[0])
    draw, width = ImageDraw.Draw(image), max(1, image.width // 200)
    centres = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in item.boxes.values()]
    if hint == "box+line":
        draw.line(centres, fill="yellow", width=width)
    for (label, (x1, y1, x2, y2)), colour in zip(item.boxes.items(), ("red", "lime", "cyan", "magenta") * 9):
        draw.rectangle([x1, y1, x2 - 1, y2 - 1], outline=colour, width=width)
        draw.text((x1 + width + 1, y1 + width), label[:60], fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(new := path.with_suffix(f".{os.getpid()}.png"))  # several processes may draw it at the same time
    new.replace(path)


# ------------------------------------------------------------------------------------------------
# 2. Scorers
# ------------------------------------------------------------------------------------------------


def score_prediction(benchmark, row, prediction, scorer="strict"):
    """Score one prediction in [0, 1].

    benchmark: vsi, spbench, cvbench, spar or viewspatial; row: the benchmark's own fields; prediction: the whole completion.
    strict: the last <answer> (without one, the whole text) must be a letter, the option's own words, or one number, as
    common.parse_choice and parse_number read them; numbers score their mean relative accuracy. Empty and ambiguous answers,
    nan and inf score 0.
    paper: the published scorer bit for bit, faults included. Raises ZeroDivisionError where that does: vsi and spbench, a
    number for a true value of 0.
    """
    if scorer == "paper":
        return PAPER[benchmark](row, first_answer(prediction))
    if scorer != "strict":
        raise ValueError(f"scorer {scorer!r}: choose strict or paper")
    options, truth = question_of(benchmark, row)
    answer = common.extract_answer(prediction)
    if options:
        return float(common.parse_choice(answer, options) == truth.upper())
    if type_of(row) == "view_change_infer":
        predicted = parse_motions(answer)
        return view_change(predicted, parse_motions(truth)) if predicted else 0.0
    number, true = common.parse_number(answer), common.parse_number(truth)
    return float(common.mean_relative_accuracy([math.nan if number is None else number], [true])[0])


def score_completion(item, text):
    """{"score", "legal", "format"} of a completion, and for published benchmarks "paper", the published scorer's score."""
    form = float(common.score_format([text])[0])
    if item.benchmark in ("toy", "stage0"):
        scores, legal = common.score_answers([text], [item.example])
        return {"score": float(scores[0]), "legal": bool(legal[0]), "format": form}
    options, answer = question_of(item.benchmark, item.row)[0], common.extract_answer(text)
    if item.example.question_type == "view_change_infer":
        legal = parse_motions(answer) or None
    else:
        legal = common.parse_choice(answer, options) if options else common.parse_number(answer)
    try:
        paper = score_prediction(item.benchmark, item.row, text, "paper")
    except ZeroDivisionError:  # where the published scorer stops
        paper = 0.0
    score = score_prediction(item.benchmark, item.row, text)
    return {"score": score, "paper": paper, "legal": legal is not None, "format": form}


def first_answer(text):
    """What the published evaluation reads: the FIRST <answer> block; without the tag, the whole text."""
    if "<answer>" not in text:
        return text
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[1].strip() if found else "None"


def leading_letter(text, pattern, flags=0):
    """The published letter matching: the first word, if it looks like a letter of the pattern, else the whole text."""
    found = re.search(pattern, text.split(" ")[0].strip(), flags)
    return re.sub(r"[^A-D]", "", found[0].upper()) if found else text.strip()


def published_mra(prediction, truth):
    """The published mean relative accuracy of two floats. Raises ZeroDivisionError for a truth of 0."""
    return float((abs(prediction - truth) / truth <= 1 - common.THRESHOLDS).mean())


def paper_vsi(row, answer):
    """VSI-Bench and SPBench: letters by their first word; numbers by a list of number words first, in which "a" is 1."""
    if row["question_type"] not in VSI_NUMBERS:
        return float(leading_letter(answer.replace("Answer:", ""), r"^[A-D]\.?$").lower() == row["ground_truth"].lower())
    words = common.ONES.split()[1:] + ["nineteen"] + "twenty thirty forty fifty sixty seventy eighty ninety zero a an".split()
    values = [*range(1, 20), *range(20, 100, 10), 0, 1, 1]
    text = answer.strip().lower()
    number = next((float(value) for word, value in zip(words, values) if re.search(rf"\b{word}\b", text)), None)
    if number is None:
        digits = re.search(r"\d+(\.\d+)?", text)
        if not digits:
            return 0.0
        number = float(digits[0])
    return published_mra(number, float(row["ground_truth"]))


def paper_cvbench(row, answer):
    """CV-Bench: letters up to D, brackets allowed; a truth of (E) or (F) matches only the same three characters."""
    pattern = r"^[\(\[\{]?[A-D][\)\]\}]?\.?$"
    return float(leading_letter(answer, pattern, re.IGNORECASE) == leading_letter(row["answer"], pattern, re.IGNORECASE))


def paper_viewspatial(row, answer):
    """ViewSpatial-Bench: the first word must be the letter."""
    return float(leading_letter(answer, r"^[A-D]\.?$") == row["answer"][0])


def paper_spar(row, answer):
    """SPAR-Bench: a choice is right when it is part of the target (also when empty) or begins with it; view_change_infer
    has prediction and truth swapped."""
    task, truth = row["task"], str(row["answer"])
    if task == "view_change_infer":
        try:
            said, true = ({k: float(v) for k, v in (part.split(":") for part in text.split(","))} for text in (answer, truth))
        except ValueError:
            return 0.0
        return view_change(true, said)
    if task in SPAR_LOW:
        numbers = [float(number) for number in re.findall(r"(?<!\^)\d+\.\d+|(?<!\^)\d+", answer)]
        if not numbers and not task.endswith("_mv"):
            return 0.0
        number = (numbers or [-1.0])[-1 if task.endswith("_mv") else 0]
        try:
            return relative_or_absolute(number, float(truth))
        except ValueError:
            return 0.0
    answer, truth = answer.lower(), truth.lower()
    return float(answer in truth or answer[0] == truth)


PAPER = {"vsi": paper_vsi, "spbench": paper_vsi, "cvbench": paper_cvbench, "viewspatial": paper_viewspatial, "spar": paper_spar}
MOTIONS = [("move_right", "move_left"), ("move_up", "move_down"), ("move_forward", "move_backward"),
           ("rotate_right", "rotate_left"), ("rotate_up", "rotate_down")]  # fmt: skip


def parse_motions(text):
    """"move_right:0.3, rotate_up:12" as a dict. A part that is not of this form is left out."""
    found = (part.split(":") for part in common.bare_answer(text).lower().split(","))
    pairs = [(part[0].strip(), common.parse_number(part[1])) for part in found if len(part) == 2]
    return {name: value for name, value in pairs if value is not None}


def view_change(predicted, true):
    """SPAR-Bench's score of five signed motions: the mean of their mean relative accuracies. dicts of motions."""
    pairs = [[motion.get(plus, 0) - motion.get(minus, 0) for motion in (predicted, true)] for plus, minus in MOTIONS]
    return float(np.mean([relative_or_absolute(p, g) for p, g in pairs]))


def relative_or_absolute(prediction, truth):
    """SPAR-Bench's mean relative accuracy: for a truth of 0 the error is absolute."""
    error = abs(prediction - truth) / (abs(truth) or 1.0)
    return float((error <= 1 - common.THRESHOLDS).mean())


# ------------------------------------------------------------------------------------------------
# 3. Tables: averages, published numbers, the best constant guess
# ------------------------------------------------------------------------------------------------

VSI_NUMBERS = {"object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation"}
DIRECTIONS = [f"object_rel_direction_{level}" for level in ("easy", "medium", "hard")]


def mean_or_none(values):
    """The mean as a float; None (null in scores.json) of nothing."""
    return float(np.mean(values)) if len(values) else None


def mean_by_type(kinds, scores):
    """{question type: mean score}, sorted by name. kinds and scores: (N,)."""
    return {kind: float(scores[[other == kind for other in kinds]].mean()) for kind in sorted(set(kinds))}


def columns(benchmark, rows, scores, how="official"):
    """The numbers that the papers print for a benchmark, in [0, 1]: {column: mean}, by question type and in groups.

    rows: published rows; scores (N,). how: "official", or "paper": as the published evaluation averages (a missing level of
    VSI's directions counts as 0; SPAR is weighted by question).
    """
    kinds = [type_of(row) for row in rows]
    scores = np.asarray(scores, float)
    by_type = mean_by_type(kinds, scores)

    def mean(keep):
        return mean_or_none(scores[[bool(keep(row)) for row in rows]])

    if benchmark in ("vsi", "spbench"):
        tasks = merge_directions(by_type, how)
        numeric = [score for kind, score in tasks.items() if kind in VSI_NUMBERS]
        choices = [score for kind, score in tasks.items() if kind not in VSI_NUMBERS]
        out = {"NQ": mean_or_none(numeric), "MCQ": mean_or_none(choices), "avg": mean_or_none(list(tasks.values()))}
    elif benchmark == "cvbench":
        halves = [mean(lambda row, source=source: row["source"] == source) for source in ("ADE20K", "COCO")]
        out = {"2D": mean_or_none([h for h in halves if h is not None]), "3D": mean(lambda row: row["source"] == "Omni3D")}
        out["avg"] = mean_or_none([score for score in out.values() if score is not None])
    elif benchmark == "viewspatial":
        out = {side.lower(): mean(lambda row, side=side: row["question_type"].startswith(side)) for side in ("Camera", "Person")}
        out["avg"] = float(scores.mean())
    else:  # spar
        levels = {"low": SPAR_LOW, "medium": SPAR_MIDDLE, "high": set(kinds) - SPAR_LOW - SPAR_MIDDLE, "avg": set(kinds)}
        out = {}
        for name, tasks in levels.items():
            official = mean_or_none([score for task, score in by_type.items() if task in tasks])
            out[name] = official if how == "official" else mean(lambda row, tasks=tasks: row["task"] in tasks)
    return {"columns": out, "by_type": by_type}


def merge_directions(by_type, how):
    """{task: score} of VSI-Bench and SPBench: the levels of relative direction are one task, their mean."""
    tasks, levels = dict(by_type), [by_type[level] for level in DIRECTIONS if level in by_type]
    if how == "paper" and "object_rel_direction" not in tasks and len(levels) < 3:
        # The published script takes the levels out one by one; the first that is missing makes the task 0.
        for level in DIRECTIONS:
            if tasks.pop(level, None) is None:
                break
        tasks["object_rel_direction"] = 0.0
    elif levels:
        tasks = {kind: score for kind, score in tasks.items() if kind not in DIRECTIONS}
        tasks["object_rel_direction"] = float(np.mean(levels))
    return tasks


# Percent, from the paper's tables, in the order of the columns.
PUBLISHED = {
    "vsi": {"GPT-4o": (33.4, 34.6, 34.0), "Gemini-2.0-Flash": (46.4, 44.3, 45.4), "Qwen2.5-VL-3B": (26.0, 33.0, 29.4),
            "Qwen2.5-VL-7B": (37.1, 34.6, 35.8), "SpaceR-7B": (47.8, 41.2, 44.5), "SpatialLadder-3B": (50.8, 40.5, 45.7)},
    "spbench-si": {"GPT-4o": (24.5, 60.3, 42.4), "Gemini-2.0-Flash": (49.0, 60.4, 54.7), "Qwen2.5-VL-3B": (24.3, 56.2, 40.3),
                   "Qwen2.5-VL-7B": (36.3, 60.5, 48.4), "SpaceR-7B": (35.7, 61.5, 48.6), "SpatialLadder-3B": (58.6, 81.8, 70.2)},
    "spbench-mv": {"GPT-4o": (40.7, 59.4, 48.2), "Gemini-2.0-Flash": (51.9, 50.7, 56.5), "Qwen2.5-VL-3B": (25.6, 53.2, 36.6),
                   "Qwen2.5-VL-7B": (28.9, 49.8, 37.3), "SpaceR-7B": (63.2, 53.7, 59.4), "SpatialLadder-3B": (68.2, 75.0, 70.9)},
    "cvbench": {"GPT-4o": (69.4, 81.3, 75.4), "Qwen2.5-VL-3B": (69.1, 72.2, 70.6), "Qwen2.5-VL-7B": (75.0, 83.1, 79.0),
                "SpatialLadder-3B": (72.4, 74.9, 73.7)},
    "spar": {"GPT-4o": (29.3, 24.9, 45.1, 36.4), "Qwen2.5-VL-3B": (15.3, 26.4, 32.2, 24.6),
             "Qwen2.5-VL-7B": (17.5, 29.5, 41.8, 30.2), "SpatialLadder-3B": (25.8, 33.2, 42.6, 34.4)},
    "viewspatial": {"GPT-4o": (33.7, 31.5, 32.6), "Qwen2.5-VL-3B": (39.5, 32.0, 35.6), "Qwen2.5-VL-7B": (41.8, 34.3, 37.9),
                    "SpatialLadder-3B": (39.6, 48.5, 44.2)},
}  # fmt: skip


def best_number(values):
    """The value of `values` (N,) with the highest mean relative accuracy when it answers all of them."""
    return max(np.unique(values), key=lambda v: common.mean_relative_accuracy(np.full(len(values), v), values).mean())


def guess_scores(items):
    """What the best constant answer of a benchmark's own rows scores on them, row by row: one letter for questions with the
    same number of options, one number for a numeric type; view_change_infer is guessed as no motion."""
    groups, scores = {}, np.zeros(len(items))
    for i, item in enumerate(items):
        options, truth = options_and_answer(item)
        if item.example.question_type == "view_change_infer":
            scores[i] = view_change({}, parse_motions(truth))
        else:
            words = bool(options) or common.parse_number(truth) is None  # a letter, or an exact text
            groups.setdefault((item.example.question_type, len(options or []), words), []).append((i, str(truth).casefold()))
    for (_, _, words), members in groups.items():
        rows, truths = zip(*members)
        if words:
            best = Counter(truths).most_common(1)[0][0]
            scores[list(rows)] = [truth == best for truth in truths]
        else:
            numbers = np.array([common.parse_number(truth) for truth in truths], float)
            scores[list(rows)] = common.mean_relative_accuracy(np.full(len(numbers), best_number(numbers)), numbers)
    return scores


def kind_of(example):
    """The kind of pictures and the question type of an Example: "video: room size"."""
    return f"{example.data_type}: {example.question_type}"


def constant_guess(train, test):
    """What the best constant answer of the training examples scores on the test examples, by kind (see kind_of).

    Directions are guessed by their word, among training questions with the same set of words; other choices by letter;
    numbers by the training answer with the highest mean relative accuracy.
    Returns {kind: score}: the baseline that every table shows.
    """

    def choice(example):  # (words of the options, answer), as a constant guesser sees them
        if example.question_type != "relative direction":
            return (), example.answer
        words = {option[0]: option[2:].strip() for option in example.options}
        return tuple(sorted(words.values())), words[example.answer]

    guess, kinds = {}, {kind_of(example) for example in test}
    for kind in sorted(kinds, key=lambda kind: (common.DATA_TYPES.index(kind.split(":")[0]), kind)):
        known, wanted = ([e for e in examples if kind_of(e) == kind] for examples in (train, test))
        if wanted[0].options:
            counts = Counter(choice(example) for example in known)
            best = {words: max((c for c in counts if c[0] == words), key=counts.get) for words, _ in counts}
            guess[kind] = float(np.mean([best.get(choice(e)[0]) == choice(e) for e in wanted]))
        else:
            values, truths = (np.array([float(common.parse_number(e.answer)) for e in some]) for some in (known, wanted))
            guess[kind] = float(common.mean_relative_accuracy(np.full(len(truths), best_number(values)), truths).mean())
    return guess


def skill(by_type, guess):
    """Mean over kinds of (score - guess) / (1 - guess): 0 = the best constant answer, 1 = perfect.

    A kind that the constant answer solves needs no skill and is left out.
    """
    return float(np.mean([(by_type[kind] - guess[kind]) / (1 - guess[kind]) for kind in guess if guess[kind] < 1] or [0.0]))


def benchmark_scores(name, items, rows, missing):
    """All numbers of one benchmark: groups and types under both scorers and both ways to average, and the guess."""

    def grouped(scores, how="official"):
        if name != "stage0":
            return columns(name.split("-")[0], [item.row for item in items], scores, how)
        by_type = mean_by_type([item.example.question_type for item in items], np.array(scores))
        return {"columns": {"avg": float(np.mean(list(by_type.values())))}, "by_type": by_type}

    strict = [row["score"] for row in rows]
    out = {"questions": len(rows), "missing": missing}
    out |= {key: mean_or_none([row[key] for row in rows]) for key in ("format", "legal")}
    out |= {"strict": grouped(strict), "guess": grouped(guess_scores(items))}
    if name != "stage0":
        out |= {"strict_paper_average": grouped(strict, "paper"), "paper": grouped([row["paper"] for row in rows], "paper")}
    return out


def benchmark_table(name, scores, model):
    """Rows of cells: the published models (always on all questions of the full set), ours under both scorers, the best constant
    guess. Percent."""
    missing = f", {scores['missing']} without pictures skipped" if scores["missing"] else ""
    head = [f"{name} ({scores['questions']} questions{missing})", *scores["strict"]["columns"]]
    published = PUBLISHED.get(name, {}).items()
    rows = [[f"{other} (paper, full set)", *(f"{x:.1f}" for x in numbers)] for other, numbers in published]
    labels = {"guess": "best constant guess", "paper": f"{model}, published scorer", "strict": f"{model}, strict"}
    for key, label in labels.items():
        if key in scores:
            values = scores[key]["columns"].values()
            rows.append([label, *("-" if value is None else f"{100 * value:.1f}" for value in values)])
    return [head, *rows]


# ------------------------------------------------------------------------------------------------
# 4. Analyses of the paper
# ------------------------------------------------------------------------------------------------


def semantic_entropy(texts, options):
    """Entropy in nats of what K sampled completions mean: equal letters, or equal numbers, are one class; each text that
    cannot be parsed is a class of its own."""
    classes = Counter()
    for text in texts:
        answer = common.extract_answer(text)
        meaning = common.parse_choice(answer, options) if options else common.parse_number(answer)
        classes[answer if meaning is None else meaning] += 1
    shares = np.array(list(classes.values())) / len(texts)
    return float(-(shares * np.log(shares)).sum())


def sampled_entropies(items, rows):
    """{id: semantic entropy of its sampled answers}. items: {id: Item}; rows: of predictions.jsonl."""
    texts = {}
    for row in rows:
        if row["id"] in items and row["temperature"]:
            texts.setdefault(row["id"], []).append(row["text"])
    return {key: semantic_entropy(some, options_and_answer(items[key])[0]) for key, some in texts.items()}


@torch.no_grad()
def answer_attention(backbone, item, mode, max_new_tokens):
    """Attention over the picture from the position that predicts the answer's first token: (layers, h, w), mean of the heads,
    each layer summing to 1; and the completion's text. For one picture."""
    model = common.unwrap(backbone.model).model
    scene = common.Scene(item.example.images, item.example.data_type, [item.example])
    prefix = common.encode_scenes(backbone, [scene])[0]
    prompt = list(common.encode_text(backbone.tokenizer, common.prompt_text(item.example, mode) + common.BRANCH_END))
    completion = common.branch_generate(backbone, [prefix], [[prompt]], max_new_tokens)[0][0]
    beginnings = [backbone.tokenizer.decode(completion[:n]) for n in range(len(completion) + 1)]
    start = next((n for n, text in enumerate(beginnings) if "<answer>" in text), 0)  # tokens before the answer's first
    whole = common.extend_prefix(prefix, prompt + completion[:start])
    language, picture = model.language_model, common.picture_mask(backbone, whole.ids)
    before = language.config._attn_implementation
    language.config._attn_implementation = "eager"  # the only one that returns its weights
    out = language(
        inputs_embeds=common.embed(backbone, whole.ids, [whole.features])[None], position_ids=whole.positions[:, None],
        output_attentions=True, use_cache=False,
        **{"visual_pos_masks": picture[None], "deepstack_visual_embeds": whole.deepstack} if whole.deepstack else {},
    )  # fmt: skip
    language.config._attn_implementation = before
    weights = torch.stack([layer[0, :, -1, picture].float().mean(0) for layer in out.attentions])  # (layers, picture tokens)
    with Image.open(item.example.images[0]) as image:
        width, height = common.resized_size(backbone.processor, *image.size)
    side = backbone.processor.patch_size * backbone.processor.merge_size  # pixels of a token
    weights = (weights / weights.sum(1, keepdim=True)).view(len(weights), height // side, width // side)
    return weights.cpu().numpy(), common.decode(backbone, completion)


def inside_boxes(boxes, size, shape):
    """Which cells of a grid of `shape` (h, w) over a picture of `size` (width, height) have their centre in a box: (h, w)."""
    y, x = [(np.arange(n) + 0.5) * side / n for n, side in zip(shape, size[::-1])]
    return np.any([np.outer((y1 <= y) & (y < y2), (x1 <= x) & (x < x2)) for x1, y1, x2, y2 in boxes], axis=0)


def study_attention(backbone, items, count, mode, max_new_tokens):
    """How much of the answer's attention falls into the boxes of the objects in the question, over `count` questions.

    Returns {"questions", "share" (by layer), "area" (the share of uniform attention)}, and for the first three questions
    (path of the picture, boxes, weights (layers, h, w)).
    """
    items = [item for item in items if item.boxes][:count]
    if not items:
        raise SystemExit("--attention needs questions about one picture whose objects have boxes: --benchmarks stage0.")
    shares, areas, maps = [], [], []
    for item in tqdm(items, desc="attention"):
        weights, _ = answer_attention(backbone, item, mode, max_new_tokens)
        with Image.open(item.example.images[0]) as image:
            inside = inside_boxes(item.boxes.values(), image.size, weights.shape[1:])
        shares.append((weights * inside).sum((1, 2)))
        areas.append(inside.mean())
        maps.append((item.example.images[0], list(item.boxes.values()), weights))
    return {"questions": len(items), "share": np.mean(shares, axis=0).tolist(), "area": float(np.mean(areas))}, maps[:3]
