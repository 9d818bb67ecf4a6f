"""Score models, and show what they answer.

Without flags: every rung of the toy's ladder on held-out rooms. Boxes, direct answers, and answers after thinking where a
model was trained to think, greedy and sampled. With --benchmarks: any checkpoint on the paper's six benchmarks (arXiv
2510.08531, section 5), from files as they are downloaded from the hub, and on data of stage 0. Only a --model that is a hub
id uses the network.

    python eval.py          # base, stage 1, stage 2, cold start, stage 3; about three minutes on two cores
    python eval.py --model runs/3b/stage3/model --benchmarks vsi spbench-si spbench-mv cvbench spar viewspatial --data <root>
    python eval.py --model <any> --benchmarks stage0 --data <folder> --samples 4 --traces traces.jsonl    # a cold start of your own
    python eval.py --curves runs/toy/stage3 runs/no-stage1/stage3      # reward and held-out score of several runs, one plot
    python eval.py --model runs/toy/stage3/model --images room.jpg --ask "How many red cube(s) appear?"    # your own pictures

Every table also shows the best constant guess. skill = mean of (score - guess) / (1 - guess) over all pairs of a question type
and a kind of pictures (one picture, several views, video): 0 is the guess, 1 is perfect. Benchmarks are scored twice: `strict`
is right, `paper` repeats the published scorers, faults included, so that published numbers can be compared.

Writes runs/<preset>/eval (with --benchmarks: eval/ beside the model's folder): predictions.jsonl (each answer as soon as it is
there; rerun the same command to resume), scores.json, table.txt (also printed), report.html (curves, tables and answers, one
file) and, for the toy, ladder.png and boxes.png; with --ask only ask.png. A stored answer counts only for the same question,
truth and pictures.
"""

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from tqdm import tqdm

import common
from support import benchmarks, files, memory, report, runs
from support.benchmarks import BENCHMARKS, HINTS, VSI_VERSIONS, Item
from support.runs import Settings, setting, word_list

# ------------------------------------------------------------------------------------------------
# 1. Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class EvalSettings(Settings):
    """Evaluation. --model names one model in place of the toy's ladder; --data is the toy's folder, or the folder that holds
    the benchmarks' folders (VSI-Bench, SPBench, CV-Bench, SPAR-Bench, ViewSpatial-Bench)."""

    out: str = setting("", "folder of the results; empty: runs/<preset>/eval, or, with --benchmarks or --ask, eval/ beside the "
                           "model's folder")  # fmt: skip
    ask: list[str] = word_list("questions about --images: prints each answer as it is written, and draws its boxes (ask.png)",
                               repeat=True)  # fmt: skip
    images: list[str] = word_list("what --ask is about: a picture, several, an mp4, or a folder with the frames of a video",
                                  repeat=True)  # fmt: skip
    benchmarks: list[str] = word_list("benchmarks to score --model on; stage0: a folder made by stage 0, or of your own photos",
                                      BENCHMARKS)  # fmt: skip
    mode: str = setting("think", "prompt of the questions of --benchmarks and --ask: think or direct; or, only --ask, locate",
                        ("think", "direct", "locate"))  # fmt: skip
    questions: int = setting(0, "number of questions, sampled by seed; 0: 640 of the toy's, all of a benchmark's")
    boxes: int = setting(240, "toy: number of held-out localisation questions (0: all)")
    max_new_tokens: int = setting(0, "longest completion; 0: 1,024 thinking and 128 direct (the toy: 224 and 24)")
    eval_batch: int = setting(0, "questions answered at once; 0: 256 for a model of under 100 million parameters, else 16")
    load: str = setting("auto", "benchmarks and --ask: weights in memory, fp32, bf16 or 4bit; auto: bf16 on a GPU, fp32 on a CPU",
                        ("auto", *common.LOADS))  # fmt: skip
    frames: int = setting(32, "benchmarks and --ask: frames of a video, at equal steps (the paper: 32)")
    min_picture_tokens: int = setting(16, "benchmarks and --ask: smallest picture in tokens (the paper)")
    max_picture_tokens: int = setting(512, "benchmarks and --ask: largest picture in tokens (the paper)")
    vsi: str = setting("full", "VSI-Bench: full, debiased or pruned", VSI_VERSIONS)
    allow_missing: bool = setting(False, "skip questions whose pictures are missing (the table says how many)")
    hint: str = setting("", "stage0: draw the boxes of the objects in the question on the picture; box+line: also a line "
                            "between them", HINTS)  # fmt: skip
    instruction: list[str] = runs.wording()
    samples: int = setting(0, "benchmarks: also K sampled answers a question, for their semantic entropy and for traces")
    traces: str = setting("", "stage0: write right answers to this file, as thinking traces for stage 3's cold start")
    trace_score: float = setting(0.9, "smallest score of a trace's answer (choices score 0 or 1)")
    traces_per_type: int = setting(180, "traces of each question type, at most (the paper has 1,255 of seven types); 0: all")
    attention: int = setting(0, "stage0: number of questions on which to measure the answer's attention to the boxes")
    curves: list[str] = word_list("folders of runs to draw in one plot; nothing else is done")

    def __post_init__(self):
        """Each model has its own folder of benchmark results and answers."""
        if (self.benchmarks or self.ask) and self.model and not self.out:
            path = Path(self.model)
            self.out = str(path.parent / "eval" if path.name == "model" else Path("runs") / "eval" / path.name)


PRESETS = {"toy": {}, "3b": {}}
LIMITS, TOY_LIMITS = {"direct": 128, "think": 1024}, {"direct": 24, "think": 224, "locate": 112}  # new tokens
LADDER = ("base", "stage1", "stage2", "coldstart", "stage3")
DIRECT = ("base", "stage1", "stage2")  # not trained to think: direct answers only

# ------------------------------------------------------------------------------------------------
# 2. Predictions: every answer is written as soon as it is there
# ------------------------------------------------------------------------------------------------


def fingerprint(path):
    """A short name for a model folder, from the first row of each weight and all of config, tokenizer and image processor; of a
    hub id: its commit in the local cache, or the id itself."""
    if not Path(path).is_dir():
        cached = try_to_load_from_cache(path, "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else str(path)
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                digest.update(name.encode() + opened.get_slice(name)[:1].float().numpy().tobytes())
    for file in sorted([*Path(path).glob("*.json"), *Path(path).glob("*.txt")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def row_digest(item):
    """A digest of what an answer and its score depend on: the row, the question as it is asked, its truth, and its pictures (or
    video), all their bytes."""
    pictures = [benchmarks.file_digest(path) for path in item.example.images]
    parts = [item.row, asdict(item.example) | {"images": pictures}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def key_of(row):
    """What identifies an answer: model, mode, temperature, sample and id."""
    return row["model"], row["mode"], row["temperature"], row["sample"], row["id"]


def open_predictions(folder, header, resume="auto", items=()):
    """The answers that an earlier run left in `folder`: {key: row}; see key_of. header (a dict) says how they were made, and
    is the first line of predictions.jsonl. Raises SystemExit if they were made with other settings.

    items: those that will be asked. They get their digest; answers that were given to other questions with their ids are dropped.
    """
    path, done = folder / "predictions.jsonl", {}
    for item in items:
        item.digest = row_digest(item)
    runs.barrier()  # all processes have written all their answers
    parts = [path, *sorted(folder.glob("predictions.*.jsonl"))] if resume == "auto" else []
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
                            f"{part} was made with {name} {row['settings'].get(name)!r}, not {header[name]!r}. Use the same "
                            "value, or --resume never to start over, or another --out."
                        )
            else:
                done[key_of(row)] = row
    digests = {item.example.id: item.digest for item in items}
    others = [key for key, row in done.items() if row["id"] in digests and row.get("digest") != digests[row["id"]]]
    for key in others:
        del done[key]
    if others:
        common.print0(f"{path}: {len(others)} answers are to other questions or pictures than those of now; they are asked anew")
    runs.barrier()
    if runs.rank() == 0:
        save_predictions(folder, header, done.values())
    runs.barrier()
    return done


def save_predictions(folder, header, rows):
    """Write all answers into one predictions.jsonl, header first, and remove the files of the single processes."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ({"settings": header}, *rows)]
    files.write_atomic(folder / "predictions.jsonl", "".join(lines))
    for part in folder.glob("predictions.*.jsonl"):
        part.unlink()


def shared_scenes(items):
    """The scenes of `items` that this process answers. Those of similar length are neighbours: little padding."""
    scenes = common.group_scenes([item.example for item in items])
    return runs.share(sorted(scenes, key=lambda scene: (scene.data_type, len(scene.images))))


def answer_items(backbone, items, name, mode, temperature, sample, settings, done):
    """Let a model answer all items that are not in `done`; append each batch to this process's file and to `done`. Returns the
    keys of all items.

    A resumed run starts with the batch that was interrupted; samples depend on the seed and the batch alone.
    """
    rank, toy = runs.rank(), items[0].benchmark == "toy"
    by_id = {item.example.id: item for item in items}
    scenes = shared_scenes(items)
    limit = settings.max_new_tokens or (TOY_LIMITS if toy else LIMITS)[mode]
    path = Path(settings.out) / ("predictions.jsonl" if rank == 0 else f"predictions.{rank}.jsonl")
    label = f"{name} {mode}" + (f" sample {sample or 1}" if temperature else "")
    bar = Progress(len(items), sum(len(scene.examples) for scene in scenes), label, rank > 0)

    def key(example):
        return name, mode, temperature, sample, example.id

    def is_done(part):
        known = all(key(e) in done for scene in part for e in scene.examples)
        bar.add(known * sum(len(scene.examples) for scene in part))
        return known

    for part, texts in runs.answer_batches(
        backbone, scenes, mode, limit, temperature, settings.eval_batch, toy, f"{settings.seed} {sample}", is_done
    ):  # fmt: skip
        rows = []
        for example, text in zip((e for scene in part for e in scene.examples), (t for some in texts for t in some)):
            row = dict(zip(("model", "mode", "temperature", "sample", "id"), key(example)))
            row |= {"digest": by_id[example.id].digest, "question_type": example.question_type, "data_type": example.data_type,
                    "images": list(example.images), "question": example.question, "options": example.options,
                    "answer": example.answer, "text": text}  # fmt: skip
            rows.append(row | benchmarks.score_completion(by_id[example.id], text))
            done[key(example)] = rows[-1]
        with files.disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        bar.add(len(rows))
        bar.set_postfix(score=f"{np.mean([row['score'] for row in rows]):.2f}")
    bar.close()
    return [key(item.example) for item in items]


class Progress(tqdm):
    """A bar over all items that advances with the share of one process, and ends exactly at its total."""

    def __init__(self, count, share, label, disable):
        super().__init__(total=count, desc=label, disable=disable)
        self.share, self.answered = share, 0

    def add(self, count):
        """Count items of this process."""
        self.answered += count
        self.update(self.total * self.answered // self.share - self.n if self.share else 0)


def collect(folder, header, keys):
    """Merge the answers of all processes: the rows of `keys` in that order, the same in every process."""
    done = open_predictions(folder, header)
    if runs.rank() == 0:
        wanted = set(keys)
        others = [row for key, row in done.items() if key not in wanted]  # of other benchmarks: they stay
        save_predictions(folder, header, [done[key] for key in keys] + others)
    return [done[key] for key in keys]


# ------------------------------------------------------------------------------------------------
# 3. The toy's ladder: one scorer, one baseline, every rung
# ------------------------------------------------------------------------------------------------


def toy_items(data, kind, count, seed):
    """`count` held-out examples of the toy, "spatial" or "locate" (0: all), sampled by seed: as many of every question type and
    kind of pictures, as far as they reach."""
    examples, order, turn = common.read_examples(Path(data) / "heldout", kind), [], Counter()
    for example in random.Random(seed).sample(examples, len(examples)):
        turn[benchmarks.kind_of(example)] += 1
        order.append((turn[benchmarks.kind_of(example)], example.id))
    chosen = {key for _, key in sorted(order)[: count or len(order)]}
    return [Item("toy", {}, example) for example in examples if example.id in chosen]


def mean(rows, key="score"):
    """The mean of a field; None of no rows."""
    return benchmarks.mean_or_none([row[key] for row in rows])


def summarise(rows, guess):
    """All numbers of one model from its prediction rows."""
    one, several = [], []  # IoU of the boxes in single pictures, and of those whose picture must be named, too
    for row in rows:
        if row["mode"] == "locate":
            predicted = common.match_boxes(common.parse_boxes(row["text"]), row["answer"])
            overlaps = common.box_iou(predicted, [box["bbox_2d"] for box in row["answer"]]).tolist()
            (one if row["data_type"] == "single_image" else several).extend(overlaps)
    numbers = {"iou": one, "acc50": np.array(one) >= 0.5, "iou_several": several}
    out = {"localize": {name: benchmarks.mean_or_none(some) for name, some in numbers.items()}}
    modes = [mode for mode in ("direct", "think") if any(row["mode"] == mode for row in rows)]
    for mode in modes:
        form = "format" if mode == "think" else "legal"
        greedy = [row for row in rows if row["mode"] == mode and not row["temperature"]]
        sampled = [row for row in rows if row["mode"] == mode and row["temperature"]]
        formed = [row for row in sampled if row[form]]
        by_type = {kind: mean([row for row in greedy if f"{row['data_type']}: {row['question_type']}" == kind]) for kind in guess}
        out[mode] = {
            "by_type": by_type, "by_pictures": by_pictures(by_type), "skill": benchmarks.skill(by_type, guess),
            "greedy_accuracy": mean(greedy), "format": mean(greedy, form), "sampled_accuracy": mean(sampled),
            "sampled_format": len(formed) / len(sampled), "sampled_accuracy_given_format": mean(formed),
        }  # fmt: skip
    # A model's own numbers are at the top: thinking if it was trained to think, otherwise direct.
    return out | {"mode": modes[-1]} | out[modes[-1]]


def by_pictures(by_type):
    """The mean score over the question types of each kind of pictures. by_type: {"video: room size": score}."""
    types = [kind.split(":")[0] for kind in by_type]
    return {name: float(np.mean([by_type[k] for k in by_type if k.startswith(name)])) for name in dict.fromkeys(types)}


def decimals(value):
    """A score as text; "-" for None."""
    return "-" if value is None else f"{value:.3f}"


def ladder_table(scores):
    """The ladder as rows of cells: a head, the best constant guess, then one row a model and mode."""
    guesses = by_pictures(scores["guess"])
    head = ["", "answers", "IoU", "acc@0.5", "IoU several", *(name.replace("_", " ") for name in guesses), "skill", "format",
            "greedy", "sampled", "given format"]  # fmt: skip
    body = [["best constant guess", "", "", "", "", *(f"{x:.3f}" for x in guesses.values()), "0.000", "",
             f"{scores['guess_accuracy']:.3f}", "", ""]]  # fmt: skip
    for name, model in scores["models"].items():
        for mode in [mode for mode in ("direct", "think") if mode in model]:
            part, first = model[mode], mode == "direct"
            body.append([
                name if first else "", mode,
                *(decimals(model["localize"][k]) if first else "" for k in ("iou", "acc50", "iou_several")),
                *(decimals(part["by_pictures"][k]) for k in guesses),
                *(decimals(part[k]) for k in ("skill", "format", "greedy_accuracy", "sampled_accuracy",
                                              "sampled_accuracy_given_format")),
            ])  # fmt: skip
    return [head, *body]


def types_table(scores):
    """Greedy scores of every question type and kind of pictures as rows of cells: one column a model and mode."""
    parts = {f"{name} {mode}": part for name, model in scores["models"].items() for mode, part in model.items()
             if mode in ("direct", "think")}  # fmt: skip
    body = []
    for kind, guess in scores["guess"].items():
        numbers = [guess, *(part["by_type"][kind] for part in parts.values())]
        body.append([kind.replace("_", " "), str(scores["counts"][kind]), *(f"{number:.3f}" for number in numbers)])
    return [["greedy", "questions", "guess", *parts], *body]


def text_table(rows, text_columns=2):
    """Rows of cells as aligned text; the first columns are words, the others numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < text_columns else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def score_ladder(settings):
    """Let every rung of the ladder answer everything, then write tables, pictures and the report."""
    folder = Path(settings.out)
    ladder = {"model": Path(settings.model)} if settings.model else {name: folder.parent / name / "model" for name in LADDER}
    for path in ladder.values():
        if not common.has_model(path):
            raise SystemExit(f"{path} has no model (config.json and weights). Run the stage that writes it, or set --model.")
    spatial = toy_items(settings.data, "spatial", settings.questions or 640, settings.seed)
    located = toy_items(settings.data, "locate", settings.boxes, settings.seed)
    scenes, limit = shared_scenes(spatial) + shared_scenes(located), settings.max_new_tokens or TOY_LIMITS["think"]
    wording = {name: common.use_instructions(path, settings.instruction) for name, path in ladder.items()}
    memory.check_answers(path, "fp32", scenes, "think", settings, limit)  # all rungs have one shape
    header = {name: getattr(settings, name) for name in ("data", "seed", "questions", "boxes", "eval_batch", "max_new_tokens")}
    header |= {"models": {name: fingerprint(path) for name, path in ladder.items()}, "prompts": wording}
    header |= {"processes": runs.world_size()}
    done, keys = open_predictions(folder, header, settings.resume, spatial + located), []
    for number, (name, path) in enumerate(ladder.items()):
        backbone = common.load_backbone(path, "fp32", device=runs.device())
        common.use_instructions(path, settings.instruction)
        for item in located if number == 0 else []:
            item.example.answer = common.boxes_for_model(backbone, item.example)
        tasks = [(located, "locate", 0.0)]
        tasks += [(spatial, mode, t) for mode in (("direct",) if name in DIRECT else ("direct", "think")) for t in (0.0, 1.0)]
        for items, mode, temperature in tasks:
            keys += answer_items(backbone, items, name, mode, temperature, 0, settings, done)
    rows = collect(folder, header, keys)
    if runs.rank() == 0:
        write_ladder(settings, ladder, spatial, located, rows, backbone)


def write_ladder(settings, ladder, spatial, located, rows, backbone):
    """scores.json, table.txt (also printed), ladder.png, boxes.png and report.html of the toy. ladder: {name: folder of the
    model}."""
    folder, test = Path(settings.out), [item.example for item in spatial]
    guess = benchmarks.constant_guess(common.read_examples(settings.data, "spatial"), test)
    counts = Counter(map(benchmarks.kind_of, test))
    scores = {
        "questions": len(test), "counts": counts, "guess": guess,
        "guess_accuracy": sum(guess[k] * n for k, n in counts.items()) / len(test),
        "models": {name: summarise([row for row in rows if row["model"] == name], guess) for name in ladder},
    }  # fmt: skip
    files.write_atomic(folder / "scores.json", json.dumps(scores, indent=2))
    cells, types = ladder_table(scores), types_table(scores)
    tables = f"{text_table(cells)}\n\n{text_table(types, 1)}"
    files.write_atomic(folder / "table.txt", tables + "\n")
    report.draw_ladder(scores, folder / "ladder.png")
    report.draw_boxes(rows, folder / "boxes.png", list(ladder), backbone)
    last, model = list(scores["models"].items())[-1]
    sections = [
        {"heading": "The ladder", "table": cells, "by_type": {}, "guess": {}},
        {"heading": "Every question type and kind of pictures", "table": types, "by_type": {}, "guess": {}},
        {"heading": f"{last}, by question type", "table": [], "by_type": model["by_type"], "guess": guess},
    ]
    curves = [(f"Training, {name}", path.parent / "curves.png") for name, path in ladder.items()]
    figures = [("The ladder", folder / "ladder.png")] + [(heading, path) for heading, path in curves if path.is_file()]
    own = [row for row in rows if not row["temperature"] and row["mode"] in ("locate", scores["models"][row["model"]]["mode"])]
    items, pictures = {item.example.id: item for item in spatial + located}, {}
    truth = {e.id: [(box.get("picture", 1) - 1, box["label"], box["bbox_2d"]) for box in e.boxes or []] for e in test}
    stories = report.report_stories(own, items, truth, backbone, pictures)
    answers = report.report_answers([row for row in own if row["model"] == last], items, truth, backbone, pictures)
    files.write_atomic(folder / "report.html", report.report_page(sections, answers, pictures, stories, figures))
    print(tables)


# ------------------------------------------------------------------------------------------------
# 4. Benchmarks: one model, the paper's tables with its row
# ------------------------------------------------------------------------------------------------

HEADER = ("model", "data", "seed", "questions", "mode", "frames", "seconds_per_grid", "fps", "min_picture_tokens",
          "max_picture_tokens", "load", "max_new_tokens", "eval_batch", "vsi", "hint")  # fmt: skip


def load_of(settings):
    """--load, with "auto" decided by the device."""
    return settings.load if settings.load != "auto" else "bf16" if torch.cuda.is_available() else "fp32"


def score_benchmarks(settings):
    """Let one model answer all benchmarks, then write the paper's tables with its row, and the report."""
    folder = Path(settings.out)
    if not settings.model:
        raise SystemExit("--benchmarks needs --model: the folder or hub id to score.")
    settings.load = load_of(settings)
    selected = {name: benchmarks.read_items(name, settings, folder) for name in settings.benchmarks}
    scenes = [scene for items, _ in selected.values() for scene in shared_scenes(items)]
    wording = common.use_instructions(settings.model, settings.instruction)
    limit, sizes = settings.max_new_tokens or LIMITS[settings.mode], (settings.min_picture_tokens, settings.max_picture_tokens)
    memory.check_answers(settings.model, settings.load, scenes, settings.mode, settings, limit, *sizes)
    header = {name: getattr(settings, name) for name in HEADER} | {"prompts": wording, "decoding": "greedy"}
    header |= {"revision": fingerprint(settings.model), "processes": runs.world_size()}
    backbone = common.load_backbone(settings.model, settings.load, *sizes, runs.device())
    backbone.seconds_per_grid, backbone.cuda_graph = settings.seconds_per_grid, settings.cuda_graph
    backbone.frames, backbone.fps = settings.frames, settings.fps
    asked = [item for items, _ in selected.values() for item in items]
    done, keys = open_predictions(folder, header, settings.resume, asked), []
    for items, _ in selected.values():
        for sample in range(settings.samples + 1):  # number 0 is greedy
            keys += answer_items(backbone, items, "model", settings.mode, float(sample > 0), sample, settings, done)
    rows = collect(folder, header, keys)
    if runs.rank() == 0:
        write_benchmarks(settings, selected, rows, backbone)
        if settings.traces:
            write_traces(settings, asked, rows)


def write_benchmarks(settings, selected, rows, backbone):
    """scores.json, table.txt (also printed) and report.html of a model, and the plots of the analyses. selected:
    {benchmark: (items, how many were left out)}."""
    folder, path = Path(settings.out), Path(settings.model)
    label = path.parent.name if path.name == "model" else path.name
    scores, sections, answers, tables, pictures = {"model": settings.model, "benchmarks": {}}, [], [], [], {}
    for name, (items, missing) in selected.items():
        by_id = {item.example.id: item for item in items}
        greedy = [row for row in rows if row["id"] in by_id and not row["temperature"]]
        scores["benchmarks"][name] = numbers = benchmarks.benchmark_scores(name, items, greedy, missing)
        if settings.samples:
            entropies = benchmarks.sampled_entropies(by_id, rows)
            numbers["semantic_entropy"] = {"samples": settings.samples, "mean": float(np.mean(list(entropies.values())))}
            score_of = {row["id"]: row["score"] for row in greedy}
            pairs = [(entropy, score_of[key]) for key, entropy in entropies.items()]
            report.draw_entropy(pairs, folder / f"entropy-{name}.png")
        if settings.attention and name == "stage0":
            tokens = settings.max_new_tokens or 1024
            shares, maps = benchmarks.study_attention(backbone, items, settings.attention, settings.mode, tokens)
            numbers["attention"] = shares
            report.draw_attention(shares, maps, folder / "attention.png")
        cells = benchmarks.benchmark_table(name, numbers, label)
        tables.append(text_table(cells, 1))
        by_type, guess = numbers["strict"]["by_type"], numbers["guess"]["by_type"]
        sections.append({"heading": name, "table": cells, "by_type": by_type, "guess": guess})
        truth = {key: [(0, label, box) for label, box in item.boxes.items()] for key, item in by_id.items()}
        room = report.PAGE_BYTES // len(selected)
        answers += report.report_answers(greedy, by_id, truth, backbone, pictures, room)
    files.write_atomic(folder / "scores.json", json.dumps(scores, indent=2))
    files.write_atomic(folder / "table.txt", "\n\n".join(tables) + "\n")
    files.write_atomic(folder / "report.html", report.report_page(sections, answers, pictures))
    print("\n\n".join(tables))


def write_traces(settings, items, rows):
    """Rejection sampling, as the paper makes its cold start: write well-formed answers that have a thought and score at least
    trace_score to --traces, as rows of the cold start's schema. One a question (the first), at most traces_per_type of a type.

    Prints counts by type. Raises SystemExit if there is no such answer.
    """
    right, counts, traces = {}, {}, []
    for row in rows:
        thought = row["text"].partition("<think>")[2].partition("</think>")[0]
        if row["format"] and row["score"] >= settings.trace_score and thought.strip():
            right.setdefault(row["id"], row["text"])
    for item in random.Random(settings.seed).sample(items, len(items)):
        example, count = item.example, counts.setdefault(item.example.question_type, Counter())
        count.update(questions=1, right=example.id in right)
        if example.id in right and count["traces"] < (settings.traces_per_type or len(items)):
            count["traces"] += 1
            traces.append({"question_id": item.row.get("question_id"), "prompt": common.prompt_text(example, "think"),
                           "solution": right[example.id], "image": item.row["image"], "data_type": example.data_type})  # fmt: skip
    for kind, count in sorted(counts.items()):
        print(f"traces, {kind}: {count['questions']} questions, {count['right']} with a right answer, {count['traces']} written")
    if not traces:
        raise SystemExit(f"{settings.traces} is not written: no answer is well formed and right. Try more --samples.")
    Path(settings.traces).parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(settings.traces, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in traces))


# ------------------------------------------------------------------------------------------------
# 5. Ask: your own questions about your own pictures
# ------------------------------------------------------------------------------------------------


def own_scene(settings):
    """The questions of --ask about --images, a Scene. Several pictures are views of one place; an mp4 or a folder is a video."""
    if not (settings.model and settings.images and settings.ask):
        raise SystemExit("--ask needs --model (a folder or hub id) and --images (pictures, an mp4, or a folder of frames).")
    paths, kind = [Path(path) for path in settings.images], "single_image" if len(settings.images) == 1 else "multi_view"
    if len(paths) == 1 and paths[0].is_dir():
        kind, frames = "video", [path for path in paths[0].iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
        if not frames:
            raise SystemExit(f"--images {paths[0]}: the folder has no .jpg or .png files.")
        frames.sort(key=lambda path: int(re.sub(r"\D", "", path.stem) or 0))
        paths = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, min(settings.frames, len(frames)))]
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"--images {path}: there is no such file.")
        if path.suffix != ".mp4":
            common.picture_size(path)  # raises SystemExit if it is not a picture
        elif len(paths) > 1:
            raise SystemExit(f"--images {path}: give one mp4 alone, or pictures.")
        else:
            kind = "video"
    scene = common.Scene(tuple(map(str, paths)), kind, [])
    for text in settings.ask:
        scene.examples.append(common.Example("--ask", scene.images, kind, "ask", common.clean_question(text), None, None))
        common.check_text(scene.examples[-1], "--ask")
    return scene


@torch.no_grad()
def stream_answers(backbone, prefix, prompts, max_new_tokens):
    """Complete all prompts behind one prefix, greedily. Yields their completions so far, lists of ids, after every token: as
    common.branch_generate, which returns them at the end."""
    common.check_lengths(backbone, [prefix], [[len(prompt) + max_new_tokens for prompt in prompts]])
    state = common.start_decoding(backbone, [prefix], [prompts], max_new_tokens, 0.0)
    rows, longest = [(prefix, []) for _ in prompts], max(map(len, prompts))
    completions = [ids for _, ids in rows]
    for count in range(1, max_new_tokens + 1):
        rows = common.collect_tokens(state, rows, count, backbone.stop, 0.75)
        yield completions
        if not rows or count == max_new_tokens:
            return
        state.width = longest + count
        common.decode_step(backbone, state)


def ask(settings):
    """Answer --ask about --images, and draw ask.png. All answers are made at the same time; the first is printed as it is made,
    each other one when those before it have ended."""
    settings.load = load_of(settings)
    scene, limit = own_scene(settings), settings.max_new_tokens or LIMITS.get(settings.mode, 1024)
    common.use_instructions(settings.model, settings.instruction)
    sizes = settings.min_picture_tokens, settings.max_picture_tokens
    memory.check_answers(settings.model, settings.load, [scene], settings.mode, settings, limit, *sizes)
    backbone = common.load_backbone(settings.model, settings.load, device=runs.device())
    backbone.seconds_per_grid, backbone.fps, backbone.frames = settings.seconds_per_grid, settings.fps, settings.frames
    limits, own = backbone.processor.size, [backbone.processor.size[edge] for edge in ("shortest_edge", "longest_edge")]
    common.limit_pictures(backbone.processor, *sizes)
    for edge, pixels in zip(("shortest_edge", "longest_edge"), own):
        limits[edge] = min(limits[edge], pixels)  # those of the toy are lower
    prefix = common.encode_scenes(backbone, [scene])[0]
    mp4 = common.is_video(scene.images[0])
    pictures = common.read_video(scene.images[0], settings.frames) if mp4 else [common.load_image(path) for path in scene.images]
    prompts = [common.prompt_text(example, settings.mode) + common.BRANCH_END for example in scene.examples]
    prompts = [list(common.encode_text(backbone.tokenizer, prompt)) for prompt in prompts]
    asked, printed = [], None  # questions that are answered; what is printed of the next one's answer
    for completions in stream_answers(backbone, prefix, prompts, limit):
        while len(asked) < len(prompts):
            question, ids = scene.examples[len(asked)].question, completions[len(asked)]
            text, ended = common.decode(backbone, ids), ids[-1] in backbone.stop
            if printed is None:
                print(f"\n{question}")
            fresh = text.rstrip("\ufffd")[len(printed or "") :]  # \ufffd: half a letter
            print(report.safe_text(fresh), end="", flush=True)  # safe_text: no control characters for the terminal
            printed = (printed or "") + fresh
            if not ended and len(ids) < limit:
                break
            print("" if ended else f"\n(cut after {limit:,} tokens; see --max_new_tokens)")
            print(report.safe_text(f"answer: {common.extract_answer(text)}"))
            named = []
            for part, place, label, box in report.named_boxes(text, len(pictures)):
                named.append((part, place, label, common.box_from_model(backbone, box, pictures[place].size)))
                picture = f"{scene.images[0]}, frame {place + 1}" if mp4 else scene.images[place]
                print(report.safe_text(f"box in the {part}: {label} {named[-1][-1]} in {picture}"))
            asked.append((question, common.extract_answer(text), pictures, named))
            printed = None
    path = Path(settings.out) / "ask.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    report.draw_answers(asked, path)
    print(f"\nwrote {path}")


# ------------------------------------------------------------------------------------------------
# 6. Main
# ------------------------------------------------------------------------------------------------


def score_models(settings):
    """Score the toy's ladder, or one model on benchmarks. Every process runs this."""
    if settings.mode == "locate":
        raise SystemExit("--mode locate is for --ask; benchmarks are asked with think or direct.")
    if settings.traces and (settings.benchmarks != ["stage0"] or settings.mode != "think" or settings.hint):
        raise SystemExit("--traces needs --benchmarks stage0 alone, --mode think, and no --hint: stage 3 shows no drawn boxes.")
    with files.disk_errors(settings.out):
        Path(settings.out).mkdir(parents=True, exist_ok=True)
        benchmarks.file_digest.cache_clear()  # files may have changed since the last call
        (score_benchmarks if settings.benchmarks else score_ladder)(settings)


def main():
    """The toy's ladder, or benchmarks, or questions of your own, or a plot of several runs."""
    settings = runs.parse_settings(EvalSettings, PRESETS, "eval")
    if settings.ask or settings.images:
        settings.processes = 1
        runs.launch(ask, settings)
    elif settings.curves:
        path = Path(settings.out) / "dynamics.png"
        report.draw_dynamics(settings.curves, path)
        print(f"wrote {path}")
    else:
        runs.launch(score_models, settings)


if __name__ == "__main__":
    main()
