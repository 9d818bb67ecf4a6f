"""Score models, and show what they say.

Without flags: every rung of the toy's ladder on held-out rooms. Boxes, direct answers, and answers after thinking where a
model has been taught to think, greedy and sampled. With --benchmarks: any checkpoint on the paper's six benchmarks (arXiv
2510.08531, section 5), from files as they are downloaded from the hub, and on data of stage 0. Only a --model that is a hub
id uses the network.

    python eval.py          # base, stage 1, stage 2, cold start, stage 3; about a minute on two cores
    python eval.py --model runs/3b/stage3/model --benchmarks vsi spbench-si spbench-mv cvbench spar viewspatial --data <root>
    python eval.py --curves runs/toy/stage3 runs/no-stage1/stage3      # reward and held-out score of several runs, one plot

Beside every score stands the best constant guess. skill = mean over question types of (score - guess) / (1 - guess): 0 is
the guess, 1 is perfect. Benchmarks are scored twice: `strict` is right, `paper` repeats the published scorers, faults
included, so that published numbers can be compared.

Writes runs/<preset>/eval (with --benchmarks: --out): predictions.jsonl (as the answers come; a run that was stopped goes on),
scores.json, table.txt (also printed), report.html (tables, bars and every answer, one file) and, for the toy, ladder.png and
boxes.png.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from tqdm import tqdm

import common
from common import Example, Settings, setting

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else reading a file on this disk is told to a server

# ------------------------------------------------------------------------------------------------
# 1. Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class EvalSettings(Settings):
    """Evaluation. --model names one model in place of the toy's ladder; --data is the toy's folder, or the folder that holds
    the benchmarks' folders (VSI-Bench, SPBench, CV-Bench, SPAR-Bench, ViewSpatial-Bench)."""

    benchmarks: list[str] = field(default_factory=list, metadata={"help": "vsi, spbench-si, spbench-mv, cvbench, spar, "
                                                                  "viewspatial; stage0: a folder made by stage 0"})  # fmt: skip
    mode: str = setting("think", "how a benchmark is asked: think or direct")
    questions: int = setting(0, "questions asked, drawn by seed; 0: 600 of the toy's, all of a benchmark's")
    boxes: int = setting(160, "toy: held-out localisation questions (0: all)")
    max_new_tokens: int = setting(0, "longest completion; 0: 1,024 thinking and 128 direct (the toy: 112 and 16)")
    batch: int = setting(256, "questions answered at once: less needs less memory")
    load: str = setting("bf16", "benchmarks: weights in memory, fp32, bf16 or 4bit")
    frames: int = setting(32, "benchmarks: frames of a video, at equal steps (the paper: 32)")
    min_pixels: int = setting(16 * 28 * 28, "benchmarks: smallest picture in pixels (the paper)")
    max_pixels: int = setting(512 * 28 * 28, "benchmarks: largest picture in pixels (the paper)")
    vsi: str = setting("full", "VSI-Bench: full, debiased or pruned")
    allow_missing: bool = setting(False, "skip questions whose pictures are missing (the table says how many)")
    hint: str = setting("", "stage0: box draws the asked objects' boxes on the picture; box+line also a line between them")
    samples: int = setting(0, "benchmarks: also K sampled answers a question, for their semantic entropy")
    attention: int = setting(0, "stage0: measure on so many questions how much of the answer's attention falls into the boxes")
    curves: list[str] = field(default_factory=list, metadata={"help": "folders of runs to draw in one plot; nothing else is done"})


PRESETS = {"toy": {}, "3b": {"batch": 16}}
LADDER = ("base", "stage1", "stage2", "coldstart", "stage3")
DIRECT = ("base", "stage1", "stage2")  # models that nobody has taught to think: they are not asked to

# ------------------------------------------------------------------------------------------------
# 2. Questions: one adapter a benchmark, rows in, items out
# ------------------------------------------------------------------------------------------------


@dataclass
class Item:
    """A question of a benchmark: the row as it is published, and the Example that is asked (its answer is a letter, a number,
    or what the row holds)."""

    benchmark: str
    row: dict
    example: Example
    boxes: dict = field(default_factory=dict)  # stage0, one picture: label -> box of the asked objects


SPAR_LOW = {f"{what}_prediction_{pair}" for what in ("depth", "distance") for pair in ("oc", "oo", "oc_mv", "oo_mv")}
SPAR_MIDDLE = {"view_change_infer", "position_matching", "camera_motion_infer"}
SPAR_BOXES = "The values are bounding boxes normalised to 0-1000, with the origin at the top-left corner of the picture."


def question_of(benchmark, row):
    """(options or None, right answer) of a benchmark's row: ["A. left", ...] and a letter, or None and a number as text.

    SPAR writes its options into the question; they are read from there. Its view_change_infer is None and the text.
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
        return [f"{letter}. {written.get(letter, '')}" for letter in written or "ABCD"], str(row["answer"]).strip()[:1]
    raise ValueError(f"benchmark {benchmark!r}: choose vsi, spbench, cvbench, spar or viewspatial")


def table_rows(paths):
    """Rows of parquet or JSON(-lines) files, pictures as bytes. Raises SystemExit naming a file that cannot be read."""
    for path in paths:
        if not Path(path).is_file():
            raise SystemExit(f"{path} is missing. Download the benchmark's folder from the hub into --data first.")
    kind = "parquet" if str(paths[0]).endswith(".parquet") else "json"
    try:
        rows = datasets.load_dataset(kind, data_files=[str(path) for path in paths], split="train")
    except Exception as error:  # whatever a broken file makes the readers raise
        raise SystemExit(f"{', '.join(map(str, paths))} cannot be read: {error.__cause__ or error}") from None
    for name, feature in rows.features.items():
        many = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(many, datasets.Image):
            rows = rows.cast_column(name, type(feature)(datasets.Image(decode=False)))
    return rows


def unpack(pictures, folder, name):
    """Write embedded pictures ({"bytes": ...}) to `folder`, once. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, picture in enumerate(pictures):
        short = hashlib.sha256(str(name).encode()).hexdigest()[:8]  # "a/b" and "a_b" are two names
        path = folder / f"{re.sub(r'[^A-Za-z0-9_-]', '_', str(name))}-{short}-{number}.img"
        if not path.is_file():
            path.with_suffix(f".{os.getpid()}").write_bytes(picture["bytes"])  # processes may write it at once
            path.with_suffix(f".{os.getpid()}").rename(path)
        paths.append(str(path))
    return tuple(paths)


def read_vsi(root, settings, folder):
    """VSI-Bench: questions about videos, <dataset>/<scene_name>.mp4. Yields (id, type, row, images, kind of pictures, text)."""
    root = root / "VSI-Bench"
    if settings.vsi not in ("full", "debiased", "pruned"):
        raise SystemExit(f"--vsi {settings.vsi}: choose full, debiased or pruned.")
    names = {"full": "test-00000-of-00001.parquet"}.get(settings.vsi, f"test_{settings.vsi}.parquet")
    if settings.vsi == "full" and not (root / names).is_file():
        names = "test.jsonl"
    for row in table_rows([root / names]):
        images = (str(root / row["dataset"] / f"{row['scene_name']}.mp4"),)
        yield row["id"], row["question_type"], row, images, "video", row["question"]


def read_spbench(root, settings, folder, part="SI"):
    """SPBench: one picture (SI) or eight (MV)."""
    root = root / "SPBench"
    for row in table_rows([root / f"SPBench-{part}.parquet"]):
        names = [row["images"]] if isinstance(row["images"], str) else list(row["images"])
        folders = (root, root / "images", root / f"SPBench-{part}-images")
        places = [[place / name for place in folders] + [place / row["scene_name"] / name for place in folders] for name in names]
        images = tuple(str(next((path for path in some if path.is_file()), some[0])) for some in places)
        yield row["id"], row["question_type"], row, images, "single_image" if part == "SI" else "multi_view", row["question"]


def read_spbench_mv(root, settings, folder):
    """SPBench-MV: as SPBench-SI, with eight pictures."""
    return read_spbench(root, settings, folder, "MV")


def read_cvbench(root, settings, folder):
    """CV-Bench: one embedded picture."""
    root = root / "CV-Bench"
    for row in table_rows([root / "test_2d.parquet", root / "test_3d.parquet"]):
        images = unpack([row["image"]], folder / "pictures" / "cvbench", f"{row['type']}-{row['idx']}")
        yield f"{row['type']}-{row['idx']}", row["task"], row, images, "single_image", row["question"]


def read_spar(root, settings, folder):
    """SPAR-Bench: one to three embedded pictures; options stand in the question."""
    shards = sorted((root / "SPAR-Bench").glob("**/*.parquet")) or [root / "SPAR-Bench" / "test.parquet"]
    for row in table_rows(shards):
        images = unpack(row["image"], folder / "pictures" / "spar", row["id"])
        text = row["question"] + (f"\n{SPAR_BOXES}" if row["task"] in ("position_matching", "camera_motion_infer") else "")
        yield row["id"], row["task"], row, images, "single_image" if len(images) == 1 else "multi_view", text


def read_viewspatial(root, settings, folder):
    """ViewSpatial-Bench: one or several pictures, paths that begin with the folder's own name."""
    path = root / "ViewSpatial-Bench" / "ViewSpatial-Bench.json"
    if not path.is_file():
        raise SystemExit(f"{path} is missing. Download the benchmark's folder from the hub into --data first.")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON: {error}") from None
    for number, row in enumerate(rows):
        images = tuple(str(root / name) for name in row["image_path"])
        yield number, row["question_type"], row, images, "single_image" if len(images) == 1 else "multi_view", row["question"]


ADAPTERS = {"vsi": read_vsi, "spbench-si": read_spbench, "spbench-mv": read_spbench_mv, "cvbench": read_cvbench,
            "spar": read_spar, "viewspatial": read_viewspatial}  # fmt: skip


def read_items(name, settings, folder):
    """The items of a benchmark, every picture checked. Returns items and how many were left out for missing pictures.

    Raises SystemExit naming the file, the id and the path of what is missing, before any model is loaded.
    """
    items, missing, scored = [], 0, name.split("-")[0]
    if name == "stage0":
        items = read_stage0(Path(settings.data), settings, folder)
    elif name not in ADAPTERS:
        raise SystemExit(f"--benchmarks {name}: choose from {', '.join(ADAPTERS)}, stage0.")
    else:
        for key, kind, row, images, data_type, text in ADAPTERS[name](Path(settings.data), settings, folder):
            lost = [path for path in images if not Path(path).is_file()]
            if lost and not settings.allow_missing:
                raise SystemExit(f"{name}, question {key}: {lost[0]} does not exist (--allow_missing skips such questions).")
            missing += bool(lost)
            if lost:
                continue
            options, answer = question_of(scored, row)
            asked = None if scored == "spar" else options  # SPAR's question names them already
            example = Example(f"{name}:{key}", images, data_type, kind, text.replace("<image>", "").strip(), asked, answer)
            items.append(Item(scored, {key: value for key, value in row.items() if key != "image"}, example))
    if not items:
        raise SystemExit(f"{name}: no question is left ({missing} lack their pictures).")
    if settings.questions and settings.questions < len(items):
        items = random.Random(settings.seed).sample(items, settings.questions)
    return items, missing


def read_stage0(data, settings, folder):
    """Spatial rows of a folder in stage 0's schema, with the boxes of the objects that a question names. With --hint, those
    boxes are drawn on the picture, and questions without boxes are left out (the paper's perception gap)."""
    boxes = {}
    for row in common.read_jsonl(data / common.FILES["locate"]):
        boxes.setdefault((row["image"] if isinstance(row["image"], str) else row["image"][0], row["question"]), row["answer"])
    rows, items = common.read_jsonl(data / common.FILES["spatial"]), []
    objects = common.read_jsonl(data / "objects.jsonl") if (data / "objects.jsonl").is_file() else []  # the toy's
    named = {row["image"][0]: row["objects"] for row in objects}
    for row, example in zip(rows, common.read_examples(data, "spatial")):
        picture = row["image"] if isinstance(row["image"], str) else row["image"][0]
        text = " ".join([example.question, *(example.options or [])])
        found = boxes.get((picture, row["question"])) or [
            o for o in named.get(picture, []) if re.search(rf"\b{re.escape(o['label'])}\b", text)
        ]
        asked = {box["label"]: box["bbox_2d"] for box in found} if example.data_type == "single_image" else {}
        items.append(Item("stage0", row, example, asked))
    if settings.hint:
        if settings.hint not in ("box", "box+line"):
            raise SystemExit(f"--hint {settings.hint}: choose box or box+line.")
        items = [item for item in items if item.boxes]
        for item in items:
            path = folder / "pictures" / settings.hint / f"{item.example.id.split(':')[-1]}.png"
            draw_hint(item, settings.hint, path)
            item.example = replace(item.example, images=(str(path),))
    return items


def draw_hint(item, hint, path):
    """Draw the boxes of an item on a copy of its picture; box+line: also a line through their middles."""
    image = common.load_image(item.example.images[0])
    draw, width = ImageDraw.Draw(image), max(1, image.width // 200)
    middles = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in item.boxes.values()]
    if hint == "box+line":
        draw.line(middles, fill="yellow", width=width)
    for (label, (x1, y1, x2, y2)), colour in zip(item.boxes.items(), ("red", "lime", "cyan", "magenta") * 9):
        draw.rectangle([x1, y1, x2 - 1, y2 - 1], outline=colour, width=width)
        draw.text((x1 + width + 1, y1 + width), label[:60], fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(new := path.with_suffix(f".{os.getpid()}.png"))  # processes may draw it at once
    new.rename(path)


def toy_items(data, kind, count, seed):
    """`count` held-out examples of the toy, "spatial" or "locate" (0: all), drawn by seed."""
    examples = common.read_examples(Path(data) / "heldout", kind)
    chosen = {e.id for e in random.Random(seed).sample(examples, min(count or len(examples), len(examples)))}
    return [Item("toy", {}, example) for example in examples if example.id in chosen]


# ------------------------------------------------------------------------------------------------
# 3. Scorers
# ------------------------------------------------------------------------------------------------


def score_prediction(benchmark, row, prediction, scorer="strict"):
    """Score one prediction in [0, 1].

    benchmark: vsi, spbench, cvbench, spar or viewspatial; row: the benchmark's own fields; prediction: the whole completion.
    strict: the last <answer> (without one, the whole text) must be a letter, the option's own words, or one number; numbers
    score their mean relative accuracy. Empty and ambiguous answers, nan and inf score 0.
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
    if benchmark == "spar" and row["task"] == "view_change_infer":
        said = motions(answer)
        return view_change(said, motions(truth)) if said else 0.0
    number, true = common.parse_number(answer), common.parse_number(truth)
    return float(common.mean_relative_accuracy([math.nan if number is None else number], [true])[0])


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
    said = next((float(value) for word, value in zip(words, values) if re.search(rf"\b{word}\b", text)), None)
    if said is None:
        digits = re.search(r"\d+(\.\d+)?", text)
        if not digits:
            return 0.0
        said = float(digits[0])
    return published_mra(said, float(row["ground_truth"]))


def paper_cvbench(row, answer):
    """CV-Bench: letters up to D, brackets allowed; a truth of (E) or (F) is met by the same three characters only."""
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
        said = (numbers or [-1.0])[-1 if task.endswith("_mv") else 0]
        try:
            return relative_or_absolute(said, float(truth))
        except ValueError:
            return 0.0
    answer, truth = answer.lower(), truth.lower()
    return float(answer in truth or answer[0] == truth)


PAPER = {"vsi": paper_vsi, "spbench": paper_vsi, "cvbench": paper_cvbench, "viewspatial": paper_viewspatial, "spar": paper_spar}
MOTIONS = [("move_right", "move_left"), ("move_up", "move_down"), ("move_forward", "move_backward"),
           ("rotate_right", "rotate_left"), ("rotate_up", "rotate_down")]  # fmt: skip


def motions(text):
    """"move_right:0.3, rotate_up:12" as a dict. A part that is not of this form is left out."""
    found = (part.split(":") for part in text.lower().split(","))
    pairs = [(part[0].strip(), common.parse_number(part[1])) for part in found if len(part) == 2]
    return {name: value for name, value in pairs if value is not None}


def view_change(said, true):
    """SPAR-Bench's score of five signed motions: the mean of their mean relative accuracies. dicts of motions."""
    pairs = [[motion.get(plus, 0) - motion.get(minus, 0) for motion in (said, true)] for plus, minus in MOTIONS]
    return float(np.mean([relative_or_absolute(p, g) for p, g in pairs]))


def relative_or_absolute(prediction, truth):
    """SPAR-Bench's mean relative accuracy: for a truth of 0 the error is absolute."""
    error = abs(prediction - truth) / (abs(truth) or 1.0)
    return float((error <= 1 - common.THRESHOLDS).mean())


VSI_NUMBERS = {"object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation"}
DIRECTIONS = [f"object_rel_direction_{level}" for level in ("easy", "medium", "hard")]


def columns(benchmark, rows, scores, how="official"):
    """The numbers that the papers print for a benchmark, in [0, 1]: {column: mean}, by question type and in groups.

    rows: published rows; scores (N,). how: "official", or "paper": as the published evaluation averages (a missing level of
    VSI's directions counts as 0; SPAR is weighted by question).
    """
    kinds = [row.get("task") or row["question_type"] for row in rows]
    scores = np.asarray(scores, float)

    def mean(keep):
        kept = scores[[bool(keep(row)) for row in rows]]
        return float(kept.mean()) if len(kept) else None

    by_type = {kind: float(scores[[other == kind for other in kinds]].mean()) for kind in sorted(set(kinds))}
    if benchmark in ("vsi", "spbench"):
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
        numeric = [score for kind, score in tasks.items() if kind in VSI_NUMBERS]
        choices = [score for kind, score in tasks.items() if kind not in VSI_NUMBERS]
        groups = {"NQ": numeric, "MCQ": choices, "avg": list(tasks.values())}
        out = {name: float(np.mean(some)) if some else None for name, some in groups.items()}
    elif benchmark == "cvbench":
        halves = [mean(lambda row: row["source"] == "ADE20K"), mean(lambda row: row["source"] == "COCO")]
        two = [half for half in halves if half is not None]
        out = {"2D": float(np.mean(two)) if two else None, "3D": mean(lambda row: row["source"] == "Omni3D")}
        both = [score for score in out.values() if score is not None]
        out["avg"] = float(np.mean(both))
    elif benchmark == "viewspatial":
        out = {side.lower(): mean(lambda row, side=side: row["question_type"].startswith(side)) for side in ("Camera", "Person")}
        out["avg"] = float(scores.mean())
    else:  # spar
        levels = {"low": SPAR_LOW, "medium": SPAR_MIDDLE, "high": set(kinds) - SPAR_LOW - SPAR_MIDDLE}
        out = {}
        for name, tasks in (*levels.items(), ("avg", set(kinds))):
            some = [by_type[task] for task in tasks if task in by_type]
            official = float(np.mean(some)) if some else None
            out[name] = official if how == "official" else mean(lambda row, tasks=tasks: row["task"] in tasks)
    return {"columns": out, "by_type": by_type}


# Percent, from the paper's tables: what our row stands beside.
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

# ------------------------------------------------------------------------------------------------
# 4. Asking: every answer is kept as it comes
# ------------------------------------------------------------------------------------------------


def fingerprint(path):
    """A short name for the weights in a model folder (from the first row of each), or a hub id as it stands."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        return str(path)
    digest = hashlib.sha256()
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                digest.update(name.encode() + opened.get_slice(name)[:1].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_predictions(folder, header, settings):
    """Answers that an earlier run has left in `folder`: {key: row}; see key_of. header (a dict) says how they were made, and
    stands in the first line of predictions.jsonl. Raises SystemExit if they were made otherwise."""
    path, done = folder / "predictions.jsonl", {}
    meet()  # all have written all their answers
    parts = [path] + sorted(folder.glob("predictions.*.jsonl")) if settings.resume == "auto" else []
    for part in parts:
        for line in part.read_bytes().split(b"\n") if part.is_file() else []:  # an answer may hold U+2028: no splitlines
            try:
                row = json.loads(line)
            except ValueError:  # the line that was being written when the run was killed
                continue
            if "settings" in row:
                for name in header:
                    if row["settings"].get(name) != header[name]:
                        raise SystemExit(
                            f"{part} was made with {name} {row['settings'].get(name)!r}, not {header[name]!r}. Give the same, "
                            "or --resume never to start anew, or another --out."
                        )
            else:
                done[key_of(row)] = row
    meet()
    if common.world()[0] == 0:
        save_predictions(folder, header, done.values())
    meet()
    return done


def meet():
    """Wait for all processes, awake to signals: a plain barrier hears none until the slowest process comes."""
    if common.world()[1] > 1:
        meeting = torch.distributed.barrier(async_op=True)
        while not meeting.is_completed():
            time.sleep(0.01)
        meeting.wait()  # raises if one of them has ended


def key_of(row):
    """What makes an answer one: model, mode, temperature, sample and id."""
    return row["model"], row["mode"], row["temperature"], row["sample"], row["id"]


def save_predictions(folder, header, rows):
    """Write all answers into one predictions.jsonl, header first, and drop the files of the single processes."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ({"settings": header}, *rows)]
    common.write_whole(folder / "predictions.jsonl", "".join(lines))
    for part in folder.glob("predictions.*.jsonl"):
        part.unlink()


def score_row(item, text):
    """{"score", "legal", "format"} of a completion, and for published benchmarks "paper", the published scorer's score."""
    form = float(common.score_format([text])[0])
    if item.benchmark in ("toy", "stage0"):
        scores, legal = common.score_answers([text], [item.example])
        return {"score": float(scores[0]), "legal": bool(legal[0]), "format": form}
    options, answer = question_of(item.benchmark, item.row)[0], common.extract_answer(text)
    if item.example.question_type == "view_change_infer":
        legal = motions(answer) or None
    else:
        legal = common.parse_choice(answer, options) if options else common.parse_number(answer)
    try:
        paper = score_prediction(item.benchmark, item.row, text, "paper")
    except ZeroDivisionError:  # where the published scorer stops
        paper = 0.0
    score = score_prediction(item.benchmark, item.row, text)
    return {"score": score, "paper": paper, "legal": legal is not None, "format": form}


def ask(backbone, items, name, mode, temperature, sample, settings, folder, done):
    """Ask a model all items that are not in `done`, and append each batch of answers to this process's file and to `done`.

    A stopped run goes on with the batch that it stopped in; samples depend on the seed and the batch alone.
    """
    rank, size = common.world()
    by_id = {item.example.id: item for item in items}
    scenes = common.group_scenes([item.example for item in items])
    scenes.sort(key=lambda scene: (scene.data_type, len(scene.images)))  # alike in length: little is padded
    limits = {"direct": 16, "think": 112, "locate": 112} if items[0].benchmark == "toy" else {"direct": 128, "think": 1024}
    tokens = settings.max_new_tokens or limits[mode]
    label = f"{name} {mode}" + (f" sample {sample or 1}" if temperature else "")
    bar = tqdm(total=len(items), desc=label, disable=rank > 0)

    def key(example):
        return name, mode, temperature, sample, example.id

    def asked_before(part):
        known = all(key(e) in done for scene in part for e in scene.examples)
        bar.update(known * sum(len(scene.examples) for scene in part) * size)
        return known

    file_name = "predictions.jsonl" if rank == 0 else f"predictions.{rank}.jsonl"
    for part, texts in common.answer_batches(
        backbone, scenes[rank::size], mode, tokens, temperature, settings.batch, keep=items[0].benchmark == "toy",
        seed=f"{settings.seed} {sample}", skip=asked_before,
    ):  # fmt: skip
        rows = []
        for example, text in zip((e for scene in part for e in scene.examples), (t for some in texts for t in some)):
            row = dict(zip(("model", "mode", "temperature", "sample", "id"), key(example)))
            row |= {"question_type": example.question_type, "images": list(example.images), "question": example.question,
                    "options": example.options, "answer": example.answer, "text": text}  # fmt: skip
            rows.append(row | score_row(by_id[example.id], text))
            done[key(example)] = rows[-1]
        with common.naming(folder / file_name), (folder / file_name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        bar.update(len(rows) * size)
        scores = [row["score"] for row in rows]
        bar.set_postfix(score=f"{np.mean(scores):.2f}")
    bar.close()


def collect(folder, header, settings, order):
    """Bring the processes' answers together: all rows in the order of `order` (keys), the same in every process."""
    done = open_predictions(folder, header, replace(settings, resume="auto"))
    if common.world()[0] == 0:
        asked = set(order)
        others = [row for key, row in done.items() if key not in asked]  # of other benchmarks: they stay
        save_predictions(folder, header, [done[key] for key in order] + others)
    return [done[key] for key in order]


# ------------------------------------------------------------------------------------------------
# 5. The toy's ladder: one scorer, one baseline, every rung
# ------------------------------------------------------------------------------------------------


def mean(rows, key="score"):
    """Mean of a field; None (null in scores.json) of nothing."""
    return float(np.mean([row[key] for row in rows])) if rows else None


def summarise(rows, guess):
    """All numbers of one model from its prediction rows."""
    located = [row for row in rows if row["mode"] == "locate"]
    overlaps = []
    for row in located:
        predicted = common.match_boxes(common.parse_boxes(row["text"]), row["answer"])
        overlaps += common.box_iou(predicted, [box["bbox_2d"] for box in row["answer"]]).tolist()
    out = {"localize": {"iou": float(np.mean(overlaps)), "acc50": float(np.mean(np.array(overlaps) >= 0.5))}}
    modes = [mode for mode in ("direct", "think") if any(row["mode"] == mode for row in rows)]
    for mode in modes:
        greedy = [row for row in rows if row["mode"] == mode and not row["temperature"]]
        sampled = [row for row in rows if row["mode"] == mode and row["temperature"]]
        formed = [row for row in sampled if (row["format"] if mode == "think" else row["legal"])]
        by_type = {kind: mean([row for row in greedy if row["question_type"] == kind]) for kind in guess}
        out[mode] = {
            "by_type": by_type, "skill": common.skill(by_type, guess), "greedy_accuracy": mean(greedy),
            "format": mean(greedy, "format" if mode == "think" else "legal"), "sampled_accuracy": mean(sampled),
            "sampled_format": len(formed) / len(sampled), "sampled_accuracy_given_format": mean(formed),
        }  # fmt: skip
    # A model's own numbers stand at the top: thinking for those that have learnt to think, direct for the others.
    return out | {"mode": modes[-1]} | out[modes[-1]]


def ladder_table(scores):
    """The ladder as rows of cells: a head, the best constant guess, then one row a model and mode."""
    kinds = list(scores["guess"])
    head = ["", "answers", "IoU", "acc@0.5", *kinds, "skill", "format", "greedy", "sampled"]
    guesses = [f"{scores['guess'][k]:.3f}" for k in kinds]
    body = [["best constant guess", "", "", "", *guesses, "0.000", "", f"{scores['guess_accuracy']:.3f}", ""]]
    for name, model in scores["models"].items():
        for mode in [mode for mode in ("direct", "think") if mode in model]:
            part, first = model[mode], mode == "direct"
            body.append([
                name if first else "", mode, *(f"{model['localize'][k]:.3f}" if first else "" for k in ("iou", "acc50")),
                *(f"{part['by_type'][k]:.3f}" for k in kinds), f"{part['skill']:.3f}", f"{part['format']:.3f}",
                f"{part['greedy_accuracy']:.3f}", f"{part['sampled_accuracy']:.3f}",
            ])  # fmt: skip
    return [head, *body]


def text_table(rows, words=2):
    """Rows of cells as aligned text; the first `words` columns are words, the others numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i < words else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot():
    """matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_ladder(scores, path):
    """Bars: each question type, one bar a model, in the model's own way to answer; a line at the best constant guess."""
    kinds, models = list(scores["guess"]), scores["models"]
    figure, axis = plot().subplots(figsize=(11, 4))
    names = ["boxes (IoU)", *kinds, "skill"]
    for number, (name, model) in enumerate(models.items()):
        heights = [model["localize"]["iou"], *(model["by_type"][k] for k in kinds), model["skill"]]
        width = 0.8 / len(models)
        places = np.arange(len(names)) + (number - len(models) / 2 + 0.5) * width
        axis.bar(places, heights, width, label=f"{name} ({model['mode']})")
    for x, kind in enumerate(kinds, 1):
        label = "best constant guess" if x == 1 else None
        axis.hlines(scores["guess"][kind], x - 0.42, x + 0.42, color="black", linestyle=":", label=label)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylim(-0.25, 1)  # a model that cannot answer at all has a skill far below the guess: cut
    axis.set_title(f"The ladder, {scores['questions']} held-out questions")
    axis.legend(fontsize=8, ncols=3)
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_boxes(rows, path, names, pictures=5, scale=3):
    """Held-out rooms, one column each: truth in the first line, then the boxes of each model."""
    by_model = {name: {row["id"]: row for row in rows if row["model"] == name and row["mode"] == "locate"} for name in names}
    ids = sorted(by_model[names[0]], key=lambda i: -len(by_model[names[0]][i]["answer"]))[:pictures]
    colours = ["white", "orange", "magenta", "lime"]
    lines = []
    for title, answers in [("truth", None), *by_model.items()]:
        tiles = []
        for i in ids:
            row = by_model[names[0]][i]
            image = common.load_image(row["images"][0])
            tile = image.resize((image.width * scale, image.height * scale), Image.NEAREST)
            draw = ImageDraw.Draw(tile)
            boxes = row["answer"] if answers is None else common.parse_boxes(answers[i]["text"]) or []
            wanted = [box["label"] for box in row["answer"]]
            for box in boxes:
                colour = colours[1 + wanted.index(box["label"]) % 3] if box["label"] in wanted else colours[0]
                x1, y1, x2, y2 = (value * scale for value in box["bbox_2d"])
                draw.rectangle([x1, y1, x2 - 1, y2 - 1], outline=colour, width=2)
                draw.text((x1 + 3, y1 + 1), box["label"], fill="black")
            draw.text((4, tile.height - 14), title, fill="black")
            tiles.append(tile)
        lines.append(tiles)
    width, height = lines[0][0].size
    sheet = Image.new("RGB", ((width + 6) * len(ids), (height + 6) * len(lines)), "white")
    for y, tiles in enumerate(lines):
        for x, tile in enumerate(tiles):
            sheet.paste(tile, (x * (width + 6), y * (height + 6)))
    sheet.save(path)


# ------------------------------------------------------------------------------------------------
# 6. Benchmarks: tables beside the published ones
# ------------------------------------------------------------------------------------------------


def guess_scores(items):
    """What the best constant answer of a benchmark's own rows scores on them, row by row: one letter for questions with the
    same number of options, one number for a numeric type; view_change_infer is guessed as no motion."""
    groups, scores = {}, np.zeros(len(items))
    for i, item in enumerate(items):
        options, truth = question_of(item.benchmark, item.row) if item.benchmark != "stage0" else (
            item.example.options, item.example.answer)  # fmt: skip
        if item.example.question_type == "view_change_infer":
            scores[i] = view_change({}, motions(truth))
        else:
            groups.setdefault((item.example.question_type, len(options or [])), []).append((i, truth))
    for (_, choices), members in groups.items():
        rows, truths = zip(*members)
        if choices:
            best = Counter(truths).most_common(1)[0][0]
            scores[list(rows)] = [truth == best for truth in truths]
        else:
            numbers = np.array([common.parse_number(truth) for truth in truths], float)
            scores[list(rows)] = max(
                (common.mean_relative_accuracy(np.full(len(numbers), v), numbers) for v in np.unique(numbers)), key=np.mean
            )
    return scores


def benchmark_scores(name, items, rows, missing):
    """All numbers of one benchmark: groups and types under both scorers and both ways to average, and the guess."""
    published = [item.row for item in items]
    plain = name == "stage0"
    kinds = [item.example.question_type for item in items]

    def grouped(scores, how="official"):
        if not plain:
            return columns(name.split("-")[0], published, scores, how)
        scores = np.array(scores)
        by_type = {kind: float(scores[[k == kind for k in kinds]].mean()) for kind in sorted(set(kinds))}
        return {"columns": {"avg": float(np.mean(list(by_type.values())))}, "by_type": by_type}

    out = {"questions": len(rows), "missing": missing, "format": mean(rows, "format"), "legal": mean(rows, "legal")}
    out["strict"] = grouped([row["score"] for row in rows])
    out["guess"] = grouped(guess_scores(items))
    if not plain:
        out["strict_paper_average"] = grouped([row["score"] for row in rows], "paper")
        out["paper"] = grouped([row["paper"] for row in rows], "paper")
    return out


def benchmark_table(name, scores, model):
    """Rows of cells: the published models, ours under both scorers, the best constant guess. Percent."""
    names = list(scores["strict"]["columns"])
    missing = f", {scores['missing']} without pictures skipped" if scores["missing"] else ""
    head = [f"{name} ({scores['questions']} questions{missing})", *names]
    rows = [[model, *(f"{x:.1f}" for x in numbers)] for model, numbers in PUBLISHED.get(name, {}).items()]
    labels = {"guess": "best constant guess", "paper": f"{model}, published scorer", "strict": f"{model}, strict"}
    for key, label in labels.items():
        if key in scores:
            values = scores[key]["columns"].values()
            rows.append([label, *("-" if value is None else f"{100 * value:.1f}" for value in values)])
    return [head, *rows]


# ------------------------------------------------------------------------------------------------
# 7. Analyses of the paper
# ------------------------------------------------------------------------------------------------


def semantic_entropy(texts, options):
    """Entropy in nats of what K sampled completions mean: equal letters, or equal numbers, are one class; what cannot be
    read is a class of its own text."""
    classes = Counter()
    for text in texts:
        answer = common.extract_answer(text)
        meaning = common.parse_choice(answer, options) if options else common.parse_number(answer)
        classes[answer if meaning is None else meaning] += 1
    shares = np.array(list(classes.values())) / len(texts)
    return float(-(shares * np.log(shares)).sum())


@torch.no_grad()
def answer_attention(backbone, item, mode, tokens):
    """Attention of the place that writes the answer's first token, over the picture: (layers, h, w), mean of the heads, each
    layer summing to 1; and the answer's text. For one picture."""
    model = common.core(backbone.model).model
    scene = common.Scene(item.example.images, item.example.data_type, [item.example])
    prefix = common.encode_scenes(backbone, [scene])[0]
    prompt = list(common.encode_text(backbone.tokenizer, common.prompt_text(item.example, mode) + common.BRANCH_END))
    completion = common.branch_generate(backbone, [prefix], [[prompt]], tokens)[0][0]
    written = [backbone.tokenizer.decode(completion[:n]) for n in range(len(completion) + 1)]
    start = next((n for n, text in enumerate(written) if "<answer>" in text), 0)  # tokens before the answer's first
    whole = common.extend_prefix(prefix, prompt + completion[:start])
    language = model.language_model
    before = language.config._attn_implementation
    language.config._attn_implementation = "eager"  # the only one that hands out its weights
    out = language(
        inputs_embeds=common.embed(backbone, whole.ids, [whole.features])[None], position_ids=whole.positions[:, None],
        output_attentions=True, use_cache=False,
    )  # fmt: skip
    language.config._attn_implementation = before
    picture = whole.ids == model.config.image_token_id
    weights = torch.stack([layer[0, :, -1, picture].float().mean(0) for layer in out.attentions])  # (layers, picture tokens)
    with Image.open(item.example.images[0]) as image:
        width, height = common.resized_size(backbone.processor, *image.size)
    weights = (weights / weights.sum(1, keepdim=True)).view(len(weights), height // 28, width // 28)
    return weights.cpu().numpy(), common.decode(backbone, completion)


def inside_boxes(boxes, size, shape):
    """Which cells of a grid of `shape` (h, w) over a picture of `size` (width, height) have their middle in a box: (h, w)."""
    y, x = [(np.arange(n) + 0.5) * side / n for n, side in zip(shape, size[::-1])]
    return np.any([np.outer((y1 <= y) & (y < y2), (x1 <= x) & (x < x2)) for x1, y1, x2, y2 in boxes], axis=0)


def study_attention(backbone, items, settings, folder, shown=3):
    """How much of the answer's attention falls into the asked objects' boxes, by layer: numbers, and attention.png.

    Returns {"questions", "share" (by layer), "area" (what an even gaze would give)}.
    """
    items = [item for item in items if item.boxes][: settings.attention]
    if not items:
        raise SystemExit("--attention needs questions about one picture whose objects have boxes: --benchmarks stage0.")
    shares, areas, pictures = [], [], []
    for item in tqdm(items, desc="attention"):
        weights, text = answer_attention(backbone, item, settings.mode, settings.max_new_tokens or 1024)
        with Image.open(item.example.images[0]) as image:
            inside = inside_boxes(item.boxes.values(), image.size, weights.shape[1:])
        shares.append((weights * inside).sum((1, 2)))
        areas.append(inside.mean())
        pictures.append((item, weights))
    layers = len(shares[0])
    chosen = sorted({round(x) for x in np.linspace(0, layers - 1, 4)})
    plt = plot()
    figure = plt.figure(figsize=(2.4 * (len(chosen) + 1), 3 + 2.4 * min(shown, len(items))))
    grid = figure.add_gridspec(1 + min(shown, len(items)), len(chosen) + 1)
    axis = figure.add_subplot(grid[0, :])
    axis.plot(range(layers), np.mean(shares, axis=0), marker=".", label="answer token")
    axis.axhline(np.mean(areas), color="black", linestyle=":", label="an even gaze")
    axis.locator_params(axis="x", integer=True)
    axis.set(xlabel="layer", ylabel="share inside the boxes", title=f"Attention on the asked objects, {len(items)} questions")
    axis.legend(fontsize=8)
    for line, (item, weights) in enumerate(pictures[:shown], 1):
        image = common.load_image(item.example.images[0])
        for column, layer in enumerate([None, *chosen]):
            axis = figure.add_subplot(grid[line, column])
            axis.imshow(image)
            for x1, y1, x2, y2 in item.boxes.values():
                axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="lime"))
            if layer is not None:
                axis.imshow(weights[layer], extent=(0, image.width, image.height, 0), alpha=0.6, cmap="inferno")
            axis.set_title("picture" if layer is None else f"layer {layer}", fontsize=8)
            axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(folder / "attention.png", dpi=110)
    plt.close(figure)
    return {"questions": len(items), "share": np.mean(shares, axis=0).tolist(), "area": float(np.mean(areas))}


def draw_dynamics(folders, path):
    """Reward, its spread and the held-out score against steps, one line a run (the paper: with and without stages)."""
    runs = {str(folder): common.read_jsonl(Path(folder) / "metrics.jsonl") for folder in folders}
    wanted = {"reward": "reward", "spread of the reward in a group": "reward_std", "held-out score": "think", "loss": "loss"}
    panels = {title: key for title, key in wanted.items() if any(key in row for rows in runs.values() for row in rows)}
    if not panels:
        raise SystemExit(f"--curves: {', '.join(map(str, folders))} logged none of {', '.join(wanted.values())}.")
    figure, axes = plot().subplots(1, len(panels), figsize=(4.4 * len(panels), 3.4), squeeze=False)
    for axis, (title, key) in zip(axes[0], panels.items()):
        for name, rows in runs.items():
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points), label=name, marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------------
# 8. The report: one page, no server, no network
# ------------------------------------------------------------------------------------------------

REPORT = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: 2px 10px; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } .ours { font-weight: 600; background: #fff6e5 } .guess { color: #888 }
.bar { display: grid; grid-template-columns: 220px 1fr 60px; gap: 8px; align-items: center; font-size: 13px }
.track { position: relative; height: 12px; background: #eee } .track i { position: absolute; inset: 0 auto 0 0; background: #47a }
.track b { position: absolute; top: -2px; bottom: -2px; border-left: 2px solid #c33 }
article { border-top: 1px solid #ccc; padding: 1em 0 } article img { height: 150px; margin-right: 4px }
.wrong { border-left: 4px solid #c33; padding-left: 10px } .right { border-left: 4px solid #3a5; padding-left: 10px }
pre, .text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: 4px 0; font: inherit }
.thought { color: #666; font-size: 13px } select, button { font: inherit; margin-right: 8px }
</style><body><h1>Evaluation</h1>BODY
<h2>Answers</h2><p><select id="benchmark"></select><select id="type"></select><select id="verdict"><option value="">right and wrong
</option><option value="wrong">wrong</option><option value="right">right</option></select><span id="count"></span></p>
<div id="list"></div><p><button id="more">more</button></p>
<script type="application/json" id="data">DATA</script><script>
const rows = JSON.parse(document.getElementById("data").textContent), get = id => document.getElementById(id);
let shown = 20;
function add(parent, tag, text, name) {
  const node = parent.appendChild(document.createElement(tag));
  if (text !== undefined) node.textContent = text;  // never innerHTML: what a model writes is text
  if (name) node.className = name;
  return node;
}
function fill(id, key, all) {
  const options = [...new Set(rows.map(row => row[key]))].sort();
  add(get(id), "option", all).value = "";
  for (const option of options) add(get(id), "option", option).value = option;
}
function draw() {
  const wanted = ["benchmark", "type", "verdict"].map(id => get(id).value);
  const kept = rows.filter(row => ["benchmark", "type", "verdict"].every((key, i) => !wanted[i] || row[key] === wanted[i]));
  get("list").replaceChildren();
  get("count").textContent = `${kept.length} answers, wrong ones first`;
  for (const row of kept.slice(0, shown)) {
    const box = add(get("list"), "article"), inner = add(box, "div", undefined, row.verdict);
    for (const picture of row.pictures) add(inner, "img").src = picture;
    add(inner, "div", row.question, "text");
    for (const option of row.options) add(inner, "div", option, "text");
    if (row.thought) add(inner, "pre", row.thought, "thought");
    add(inner, "div", `answered: ${row.said}`, "text");
    add(inner, "div", `right: ${row.answer}   score ${row.score.toFixed(2)}`, "text");
    add(inner, "div", `${row.benchmark}, ${row.type}, ${row.id}`, "thought");
  }
  get("more").hidden = kept.length <= shown;
}
fill("benchmark", "benchmark", "everything"); fill("type", "type", "all types");
for (const id of ["benchmark", "type", "verdict"]) get(id).onchange = () => { shown = 20; draw(); };
get("more").onclick = () => { shown += 20; draw(); };
draw();
</script></body></html>
"""
REPORT_SAMPLES, REPORT_TEXT = 240, 4000  # answers of one model and benchmark in the page, wrong ones first; letters of one text


def html_table(rows):
    """Rows of cells as an HTML table, everything escaped; ours and the guess stand out."""
    lines = []
    for number, row in enumerate(rows):
        style = "ours" if number and "strict" in row[0] else "guess" if "guess" in row[0] else ""
        cell = "td" if number else "th"
        cells = [html.escape(common.visible(text, 200)) for text in row]
        lines.append(f'<tr class="{style}">' + "".join(f"<{cell}>{text}</{cell}>" for text in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def html_bars(by_type, guess):
    """One bar a question type, a red mark at the best constant guess."""
    lines = []
    for kind, score in by_type.items():
        mark = f'<b style="left:{100 * guess[kind]:.1f}%"></b>' if kind in guess else ""
        lines.append(
            f'<div class="bar"><span>{html.escape(common.visible(kind, 200))}</span><span class="track">'
            f'<i style="width:{100 * score:.1f}%"></i>{mark}</span><span>{100 * score:.1f}</span></div>'
        )
    return "".join(lines)


def thumbnails(row, boxes, height=150, most=4):
    """Up to four small pictures of a question as data: addresses. boxes: [(box, colour)], drawn on the first."""
    pictures = []
    for path in row["images"][:most]:
        frames = common.read_video(path, most) if path.endswith(".mp4") else [common.load_image(path)]
        for number, image in enumerate(frames):
            scale = height / image.height
            small = image.resize((max(1, round(image.width * scale)), height))
            draw = ImageDraw.Draw(small)
            for box, colour in boxes if number == 0 and not pictures else []:
                draw.rectangle([value * scale for value in box], outline=colour, width=2)
            data = io.BytesIO()
            small.save(data, "JPEG", quality=80)
            pictures.append("data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode())
    return pictures


def report_samples(rows, items):
    """Greedy answers for the page, wrong ones first: dicts of text and pictures. items: {id: Item}."""
    order = sorted((row for row in rows if not row["temperature"]), key=lambda row: row["score"])
    wrong = [row for row in order if row["score"] < 0.5]
    right = [row for row in order if row["score"] >= 0.5][::-1]
    some = wrong[: REPORT_SAMPLES * 2 // 3] + right[: REPORT_SAMPLES // 3]
    out = []
    for row in tqdm(some, desc="report"):
        item, text = items[row["id"]], row["text"]
        located = row["question_type"] == "locate"
        boxes = [(box["bbox_2d"], "lime") for box in row["answer"]] if located else [(box, "lime") for box in item.boxes.values()]
        if located:
            boxes += [(box["bbox_2d"], "orange") for box in common.parse_boxes(text) or []]
        thought, tag, _ = text.partition("<answer>")
        texts = {
            "benchmark": f"{row['model']}, {item.example.id.split(':')[0]}", "type": row["question_type"], "id": row["id"],
            "thought": thought if tag else "", "said": common.extract_answer(text), "question": row["question"],
            "answer": str(row["answer"]),
        }  # fmt: skip
        out.append({name: common.visible(part, REPORT_TEXT) for name, part in texts.items()} | {
            "options": [common.visible(option, REPORT_TEXT) for option in row["options"] or []], "score": row["score"],
            "verdict": "right" if row["score"] >= 0.5 else "wrong", "pictures": thumbnails(row, boxes),
        })  # fmt: skip
    return out


def write_report(path, sections, samples):
    """report.html. sections: [(heading, HTML)]; samples: from report_samples. A model's output stands in the page as JSON in
    which no "<" survives, and is shown as text only: it can never run."""
    body = "".join(f"<h2>{html.escape(common.visible(heading, 200))}</h2>{content}" for heading, content in sections)
    data = json.dumps(samples, ensure_ascii=True).replace("<", "\\u003c")
    head, middle, end = re.split("BODY|DATA", REPORT)
    common.write_whole(path, head + body + middle + data + end)


# ------------------------------------------------------------------------------------------------
# 9. Main
# ------------------------------------------------------------------------------------------------


def main_toy(settings, folder):
    """Ask every rung of the ladder everything, then write the table, the pictures and the report."""
    ladder = {name: folder.parent / name / "model" for name in LADDER}
    if settings.model:
        ladder = {"model": Path(settings.model)}
    for path in ladder.values():
        if not (path / "config.json").is_file():
            raise SystemExit(f"{path} holds no model. Run the stage that writes it, or give --model.")
    spatial = toy_items(settings.data, "spatial", settings.questions or 600, settings.seed)
    located = toy_items(settings.data, "locate", settings.boxes, settings.seed)
    header = {
        "models": {name: fingerprint(path) for name, path in ladder.items()}, "data": settings.data, "seed": settings.seed,
        "questions": settings.questions, "boxes": settings.boxes, "prompts": common.INSTRUCTIONS, "batch": settings.batch,
        "max_new_tokens": settings.max_new_tokens, "processes": common.world()[1],
    }  # fmt: skip
    done, order = open_predictions(folder, header, settings), []
    for number, (name, path) in enumerate(ladder.items()):
        backbone = common.load_backbone(path, "fp32", device=common.device_name())
        for item in located if number == 0 else []:
            item.example.answer = common.boxes_for_model(backbone.processor, item.example)
        tasks = [(located, "locate", 0.0)]
        tasks += [(spatial, m, t) for m in (("direct",) if name in DIRECT else ("direct", "think")) for t in (0.0, 1.0)]
        for items, mode, temperature in tasks:
            ask(backbone, items, name, mode, temperature, 0, settings, folder, done)
            order += [(name, mode, temperature, 0, item.example.id) for item in items]
    rows = collect(folder, header, settings, order)
    if common.world()[0] != 0:
        return
    test = [item.example for item in spatial]
    guess = common.constant_guess(common.read_examples(settings.data, "spatial"), test)
    counts = {kind: sum(e.question_type == kind for e in test) for kind in guess}
    scores = {
        "questions": len(test), "counts": counts, "guess": guess,
        "guess_accuracy": sum(guess[k] * n for k, n in counts.items()) / len(test),
        "models": {name: summarise([row for row in rows if row["model"] == name], guess) for name in ladder},
    }  # fmt: skip
    common.write_whole(folder / "scores.json", json.dumps(scores, indent=2))
    cells = ladder_table(scores)
    common.write_whole(folder / "table.txt", text_table(cells) + "\n")
    draw_ladder(scores, folder / "ladder.png")
    draw_boxes(rows, folder / "boxes.png", list(ladder))
    last = list(ladder)[-1]
    bars = html_bars(scores["models"][last]["by_type"], guess)
    sections = [("The ladder", html_table(cells)), (f"{last}, by question type", bars)]
    own = [row for row in rows if row["model"] == last and row["mode"] in ("locate", scores["models"][last]["mode"])]
    samples = report_samples(own, {item.example.id: item for item in spatial + located})
    write_report(folder / "report.html", sections, samples)
    print(text_table(cells))


def main_benchmarks(settings, folder):
    """Ask one model all benchmarks, then write the paper's tables with its row, and the report."""
    benchmarks, left_out = {}, {}
    for name in settings.benchmarks:
        benchmarks[name], left_out[name] = read_items(name, settings, folder)
    if settings.mode not in ("think", "direct"):
        raise SystemExit(f"--mode {settings.mode}: choose think or direct.")
    if not settings.model:
        raise SystemExit("--benchmarks needs --model: the folder or hub id to score.")
    names = ("model", "data", "seed", "questions", "mode", "frames", "min_pixels", "max_pixels", "load", "max_new_tokens", "batch",
             "vsi", "hint")  # fmt: skip
    header = {name: getattr(settings, name) for name in names} | {"prompts": common.INSTRUCTIONS, "decoding": "greedy"}
    header |= {"revision": fingerprint(settings.model), "processes": common.world()[1]}
    load = settings.load if torch.cuda.is_available() or settings.load == "4bit" else "fp32"
    backbone = common.load_backbone(settings.model, load, settings.min_pixels, settings.max_pixels, common.device_name())
    backbone.frames = settings.frames
    done = open_predictions(folder, header, settings)
    order = []
    for items in benchmarks.values():
        for sample in range(settings.samples + 1):  # number 0 is greedy
            temperature = 1.0 if sample else 0.0
            ask(backbone, items, "model", settings.mode, temperature, sample, settings, folder, done)
            order += [("model", settings.mode, temperature, sample, item.example.id) for item in items]
    rows = collect(folder, header, settings, order)
    if common.world()[0] != 0:
        return
    scores, sections, samples, tables = {"model": settings.model, "benchmarks": {}}, [], [], []
    label = Path(settings.model).parent.name if Path(settings.model).name == "model" else Path(settings.model).name
    for name, items in benchmarks.items():
        mine = {item.example.id: item for item in items}
        greedy = [row for row in rows if row["id"] in mine and not row["temperature"]]
        scores["benchmarks"][name] = found = benchmark_scores(name, items, greedy, left_out[name])
        if settings.samples:
            texts = {}
            for row in rows:
                if row["id"] in mine and row["temperature"]:
                    texts.setdefault(row["id"], []).append(row["text"])
            options = {key: item.example.options or (item.benchmark != "stage0" and question_of(item.benchmark, item.row)[0])
                       for key, item in mine.items()}  # fmt: skip
            entropies = [semantic_entropy(some, options[key]) for key, some in texts.items()]
            found["semantic_entropy"] = {"samples": settings.samples, "mean": float(np.mean(entropies))}
            by_id = {row["id"]: row["score"] for row in greedy}
            draw_entropy(entropies, [by_id[key] for key in texts], folder / f"entropy-{name}.png")
        if settings.attention and name == "stage0":
            found["attention"] = study_attention(backbone, items, settings, folder)
        cells = benchmark_table(name, found, label)
        tables.append(text_table(cells, 1))
        sections += [(name, html_table(cells) + html_bars(found["strict"]["by_type"], found["guess"]["by_type"]))]
        samples += report_samples(greedy, mine)
    common.write_whole(folder / "scores.json", json.dumps(scores, indent=2))
    common.write_whole(folder / "table.txt", "\n\n".join(tables) + "\n")
    write_report(folder / "report.html", sections, samples)
    print("\n\n".join(tables))


def draw_entropy(entropies, scores, path):
    """How sure the model is: a histogram of the semantic entropy of right and of wrong questions."""
    figure, axis = plot().subplots(figsize=(5, 3.4))
    for name, keep in (("right", lambda score: score >= 0.5), ("wrong", lambda score: score < 0.5)):
        axis.hist([e for e, score in zip(entropies, scores) if keep(score)], bins=20, alpha=0.6, label=name)
    title = f"mean {np.mean(entropies):.2f}, {len(entropies)} questions"
    axis.set(xlabel="semantic entropy (nats)", ylabel="questions", title=title)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@common.ending_together()
def main():
    """The toy's ladder, or benchmarks, or a plot of several runs."""
    settings = common.parse_settings(EvalSettings, PRESETS, "eval")
    folder = Path(settings.out)
    if settings.curves:
        draw_dynamics(settings.curves, folder / "dynamics.png")
        print(f"wrote {folder / 'dynamics.png'}")
        return
    with common.stop_at_once(settings):
        common.start_processes(settings)
        folder.mkdir(parents=True, exist_ok=True)
        (main_benchmarks if settings.benchmarks else main_toy)(settings, folder)
        common.end_processes()


if __name__ == "__main__":
    main()
