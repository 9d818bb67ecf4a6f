"""Score every rung of the ladder on held-out scenes (for now of the toy world), and show it.

Each model answers the same questions: boxes, direct answers, and answers after thinking, greedy and sampled. The scorer
(common.score_answers) is the one that rewards in stage 3. Beside every score stands the best constant guess: the answer
that scores most on the training set, whatever the question. skill = mean over question types of
(score - guess) / (1 - guess): 0 is the guess, 1 is perfect.

    python eval.py          # base, stage 1, stage 2, cold start, stage 3; about a minute and a half on two cores

Writes runs/<preset>/eval: predictions.jsonl, scores.json, table.txt (also printed), ladder.png (scores as bars) and
boxes.png (boxes on held-out rooms, prediction beside truth).
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import common
from common import Settings, setting

# ------------------------------------------------------------------------------------------------
# 1. Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class EvalSettings(Settings):
    """Evaluation. --model names one model to score in place of the ladder."""

    questions: int = setting(600, "held-out spatial questions, drawn by seed (0: all)")
    boxes: int = setting(160, "held-out localisation questions")
    max_new_tokens: int = setting(112, "longest completion")
    batch: int = setting(256, "questions answered at once")


PRESETS = {"toy": {}}
LADDER = ("base", "stage1", "stage2", "coldstart", "stage3")
THINKERS = ("coldstart", "stage3")  # models whose own way to answer is to think; the others answer directly

# ------------------------------------------------------------------------------------------------
# 2. Data
# ------------------------------------------------------------------------------------------------


def draw_questions(data, kind, count, processor, seed):
    """`count` held-out examples of a kind ("spatial" or "locate"), grouped into scenes; 0 = all of them."""
    scenes = common.load_scenes(Path(data) / "heldout", [kind], processor)
    examples = [example for scene in scenes for example in scene.examples]
    kept = {e.id for e in random.Random(seed).sample(examples, min(count or len(examples), len(examples)))}
    for scene in scenes:
        scene.examples = [example for example in scene.examples if example.id in kept]
    return [scene for scene in scenes if scene.examples]


# ------------------------------------------------------------------------------------------------
# 3. The idea: one scorer, one baseline, every rung
# ------------------------------------------------------------------------------------------------


def ask(backbone, scenes, mode, temperature, settings, name):
    """Answers of one model in one mode. Returns rows for predictions.jsonl, each with its score."""
    bar = tqdm(total=len(scenes), desc=f"{name} {mode}{' sampled' if temperature else ''}", disable=common.world()[0] > 0)
    common.seed_step(settings, 0)
    examples, texts = common.generate_answers(
        backbone, scenes, mode, settings.max_new_tokens, temperature, settings.batch, keep=True, bar=bar
    )
    bar.close()
    scores, legal = common.score_answers(texts, examples)
    form = common.score_format(texts)
    return [
        {"model": name, "mode": mode, "temperature": temperature, "id": e.id, "question_type": e.question_type,
         "image": e.images[0], "question": e.question, "options": e.options, "answer": e.answer, "text": text,
         "score": float(score), "legal": bool(ok), "format": float(f)}
        for e, text, score, ok, f in zip(examples, texts, scores, legal, form)
    ]  # fmt: skip


def mean(rows, key="score"):
    """Mean of a field; None (null in scores.json) of nothing."""
    return float(np.mean([row[key] for row in rows])) if rows else None


def summarise(rows, name, guess):
    """All numbers of one model from its prediction rows."""
    located = [row for row in rows if row["mode"] == "locate"]
    overlaps = []
    for row in located:
        predicted = common.match_boxes(common.parse_boxes(row["text"]), row["answer"])
        overlaps += common.box_iou(predicted, [box["bbox_2d"] for box in row["answer"]]).tolist()
    out = {"localize": {"iou": float(np.mean(overlaps)), "acc50": float(np.mean(np.array(overlaps) >= 0.5))}}
    for mode in ("direct", "think"):
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
    return out | {"mode": "think" if name in THINKERS else "direct"} | out["think" if name in THINKERS else "direct"]


# ------------------------------------------------------------------------------------------------
# 4. Tables and pictures
# ------------------------------------------------------------------------------------------------


def table(scores):
    """The ladder as text: one row a model and mode, the best constant guess in its own row."""
    kinds = list(scores["guess"])
    head = ["", "answers", "IoU", "acc@0.5", *kinds, "skill", "format", "greedy", "sampled"]
    guesses = [f"{scores['guess'][k]:.3f}" for k in kinds]
    body = [["best constant guess", "", "", "", *guesses, "0.000", "", f"{scores['guess_accuracy']:.3f}", ""]]
    for name, model in scores["models"].items():
        for mode in ("direct", "think"):
            part, first = model[mode], mode == "direct"
            body.append([
                name if first else "", mode, *(f"{model['localize'][k]:.3f}" if first else "" for k in ("iou", "acc50")),
                *(f"{part['by_type'][k]:.3f}" for k in kinds), f"{part['skill']:.3f}", f"{part['format']:.3f}",
                f"{part['greedy_accuracy']:.3f}", f"{part['sampled_accuracy']:.3f}",
            ])  # fmt: skip
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = []
    for row in [head, *body]:
        words, numbers = zip(row[:2], widths), zip(row[2:], widths[2:])
        lines.append("  ".join([*(cell.ljust(width) for cell, width in words), *(cell.rjust(width) for cell, width in numbers)]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw_ladder(scores, path):
    """Bars: each question type, one bar a model, in the model's own way to answer; a line at the best constant guess."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds, models = list(scores["guess"]), scores["models"]
    figure, axis = plt.subplots(figsize=(11, 4))
    columns = ["boxes (IoU)", *kinds, "skill"]
    for number, (name, model) in enumerate(models.items()):
        heights = [model["localize"]["iou"], *(model["by_type"][k] for k in kinds), model["skill"]]
        width = 0.8 / len(models)
        places = np.arange(len(columns)) + (number - len(models) / 2 + 0.5) * width
        axis.bar(places, heights, width, label=f"{name} ({model['mode']})")
    for x, kind in enumerate(kinds, 1):
        label = "best constant guess" if x == 1 else None
        axis.hlines(scores["guess"][kind], x - 0.42, x + 0.42, color="black", linestyle=":", label=label)
    axis.set_xticks(range(len(columns)), columns)
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
            image = Image.open(row["image"]).convert("RGB")
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
# 5. Main
# ------------------------------------------------------------------------------------------------


def main():
    """Ask every model everything, then write the table and the pictures."""
    settings = common.parse_settings(EvalSettings, PRESETS, "eval")
    common.start_processes(settings)
    folder = Path(settings.out)
    ladder = {name: folder.parent / name / "model" for name in LADDER}
    if settings.model:
        ladder = {"model": Path(settings.model)}
    for path in ladder.values():
        if not (path / "config.json").is_file():
            raise SystemExit(f"{path} holds no model. Run the stage that writes it, or give --model.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, path in ladder.items():
        backbone = common.load_backbone(path, "fp32", device=common.device_name())
        spatial = draw_questions(settings.data, "spatial", settings.questions, backbone.processor, settings.seed)
        located = draw_questions(settings.data, "locate", settings.boxes, backbone.processor, settings.seed)
        rows += ask(backbone, located, "locate", 0.0, settings, name)
        for mode in ("direct", "think"):
            for temperature in (0.0, 1.0):
                rows += ask(backbone, spatial, mode, temperature, settings, name)
    if common.world()[0] == 0:
        train = common.read_examples(settings.data, "spatial")
        test = [example for scene in spatial for example in scene.examples]
        guess = common.constant_guess(train, test)
        counts = {kind: sum(e.question_type == kind for e in test) for kind in guess}
        scores = {
            "questions": len(test), "counts": counts, "guess": guess,
            "guess_accuracy": sum(guess[k] * n for k, n in counts.items()) / len(test),
            "models": {name: summarise([row for row in rows if row["model"] == name], name, guess) for name in ladder},
        }  # fmt: skip
        with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "scores.json").write_text(json.dumps(scores, indent=2))
        (folder / "table.txt").write_text(table(scores) + "\n")
        draw_ladder(scores, folder / "ladder.png")
        draw_boxes(rows, folder / "boxes.png", list(ladder))
        print(table(scores))
    common.end_processes()


if __name__ == "__main__":
    main()
