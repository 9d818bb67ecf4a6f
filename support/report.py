"""Pages and plots: report.html, curves.png and the other pictures of eval.py, and the gallery of stage 0.

Text from data and models is untrusted (HTML, bidi marks, huge strings). On a page it passes through a jinja2 template with
autoescape, so that it can never run, and through safe_text, which truncates it and makes invisible characters visible.
"""

import base64
import contextlib
import gc
import io
import json
import random
import re
import textwrap
import unicodedata
from collections import Counter
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image, ImageDraw
from scipy.spatial import ConvexHull, QhullError
from tqdm import tqdm

import common

# ------------------------------------------------------------------------------------------------
# 1. Untrusted text and inline pictures
# ------------------------------------------------------------------------------------------------


def safe_text(text, most=4000):
    """`text` cut to `most` characters; invisible characters that steer a page (controls, bidi marks, line separators) are
    written as their numbers."""
    text = text[:most] + " ... (cut)" if len(text) > most else text
    unseen = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(f"\\u{ord(x):04x}" if unicodedata.category(x) in unseen and x not in "\n\t" else x for x in text)


TEMPLATES = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
TEMPLATES.filters["safe_text"] = safe_text


def jpeg_address(image, quality=80):
    """A PIL picture as the data: address of a JPEG, to stand inside a page."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


# ------------------------------------------------------------------------------------------------
# 2. report.html: pictures of the runs, tables, bars and answers in one file, no server and no network
# ------------------------------------------------------------------------------------------------

REPORT = TEMPLATES.from_string("""\
<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation</title><style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5em auto; max-width: 1240px; padding: 0 1em; color: #222 }
h2 { margin-top: 1.8em; border-bottom: 1px solid #ccc } .wide { overflow-x: auto; margin: 1em 0 } .wide img { display: block }
table { border-collapse: collapse } td, th { padding: 2px 10px; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } .ours { font-weight: 600; background: #fff6e5 } .guess { color: #888 }
.bar { display: grid; grid-template-columns: minmax(0, 220px) 1fr 50px; gap: 8px; align-items: center; font-size: 13px }
.track { position: relative; height: 12px; background: #eee } .track i { position: absolute; inset: 0 auto 0 0; background: #47a }
.track b { position: absolute; top: -2px; bottom: -2px; border-left: 2px solid #c33 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(225px, 1fr)); gap: 12px; margin: 1em 0 }
article { border: 1px solid #ddd; border-top: 4px solid #c33; padding: 8px; min-width: 0 } article.right { border-top-color: #3a5 }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(90px, 1fr)); gap: 3px } .pictures svg { width: 100% }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: 4px 0; max-height: 16em; overflow: auto }
.small { color: #666; font-size: 13px } h3 { margin: 0 0 6px; font-size: 15px } summary { cursor: pointer; font-weight: 600 }
details { border-bottom: 1px solid #ddd; padding: 6px 0 } select, button { font: inherit; margin: 0 8px 4px 0; max-width: 100% }
rect { fill: none; stroke-width: 2px; vector-effect: non-scaling-stroke }
svg text { paint-order: stroke; stroke: white; stroke-width: 0.2em; stroke-linejoin: round }
rect.truth { stroke: #0b3 } rect.answer { stroke: #f70 } rect.thought { stroke: #d2c; stroke-dasharray: 5 3 }
text.truth { fill: #073 } text.answer { fill: #a40 } text.thought { fill: #a09 }
.legend span { white-space: nowrap; margin-right: 1.2em }
.legend i { display: inline-block; width: 16px; height: 10px; border: 2px solid #0b3; margin-right: 5px }
.legend .answer { border-color: #f70 } .legend .thought { border: 2px dashed #d2c }
@media (max-width: 600px) { #stories .cards { grid-template-columns: 1fr 1fr } }
</style><body><h1>Evaluation</h1>
{% for figure in figures %}
<h2>{{ figure.heading | safe_text(200) }}</h2>
<div class="wide"><img src="{{ figure.address }}" alt="{{ figure.heading | safe_text(200) }}"
style="width: 100%; max-width: {{ figure.width }}px; min-width: {{ figure.width // 2 }}px"></div>
{% endfor %}
{% for section in sections %}
<h2>{{ section.heading | safe_text(200) }}</h2>
{% if section.table %}<div class="wide"><table>{% endif %}
{% for row in section.table %}
{% set cell = "th" if loop.first else "td" %}
{% set style = "ours" if "strict" in row[0] and not loop.first else "guess" if "guess" in row[0] else "" %}
<tr class="{{ style }}">{% for text in row %}<{{ cell }}>{{ text | safe_text(200) }}</{{ cell }}>{% endfor %}</tr>
{% endfor %}
{% if section.table %}</table></div>{% endif %}
{% for kind, score in section.by_type.items() %}
<div class="bar"><span>{{ kind | safe_text(200) }}</span><span class="track"><i style="width:{{ "%.1f" % (100 * score) }}%"></i>
{% if kind in section.guess %}<b style="left:{{ "%.1f" % (100 * section.guess[kind]) }}%"></b>{% endif %}
</span><span>{{ "%.1f" % (100 * score) }}</span></div>
{% endfor %}
{% endfor %}
{% set legend %}<p class="legend"><span><i></i>true box</span> <span><i class="thought"></i>named in the thought</span>
<span><i class="answer"></i>named in the answer</span></p>{% endset %}
{% if data.stories %}
<h2>One question, every rung</h2><p>The first held-out question of every type, whatever the answers are.</p>{{ legend }}
<div id="stories"></div>
{% endif %}
<h2>Answers</h2>{{ legend }}
<p><select id="benchmark"></select><select id="kind"></select><select id="type"></select><select id="verdict"><option value="">right
and wrong</option><option value="wrong">wrong</option><option value="right">right</option></select><span id="count"></span></p>
<div id="list" class="cards"></div><p><button id="more">more</button></p>
<script type="application/json" id="data">{{ data | tojson }}</script><script>
const get = id => document.getElementById(id), data = JSON.parse(get("data").textContent);
const rows = data.answers, filters = ["benchmark", "kind", "type", "verdict"];
let limit = 24;
function add(parent, tag, text, name) {
  const node = parent.appendChild(document.createElement(tag));
  if (text !== undefined) node.textContent = text;  // never innerHTML: what a model writes is text
  if (name) node.className = name;
  return node;
}
function draw(parent, tag, facts, text) {
  const node = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", tag));
  for (const [name, value] of Object.entries(facts)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
function card(parent, row, heading) {
  const box = add(parent, "article", undefined, row.verdict), pictures = add(box, "div", undefined, "pictures");
  if (heading) add(box, "h3", heading);
  for (const [number, boxes] of row.pictures) {
    const [address, width, height] = data.pictures[number], size = width / 18;
    const drawing = draw(pictures, "svg", {viewBox: `0 0 ${width} ${height}`});
    draw(drawing, "image", {href: address, width, height});
    for (const [part, label, x1, y1, x2, y2] of boxes) {
      draw(drawing, "rect", {x: x1, y: y1, width: x2 - x1, height: y2 - y1, class: part});
      const y = part === "truth" ? Math.max(y1 - size / 4, size) : Math.min(y2 + size, height - size / 4);
      draw(drawing, "text", {x: Math.min(x1, width - size * label.length * 0.55), y, "font-size": size, class: part}, label);
    }
  }
  if (!heading) add(box, "div", [row.question, ...row.options].join("\\n"), "text");
  if (row.thought) add(box, "div", row.thought, "text small");
  add(box, "div", `answered: ${row.said}`, "text");
  add(box, "div", `right: ${row.answer}   score ${row.score.toFixed(2)}`, "text");
  if (!heading) add(box, "div", `${row.benchmark}, ${row.kind}, ${row.type}, ${row.id}`, "text small");
}
function fill(id, all) {
  const options = [...new Set(rows.map(row => row[id]))].sort();
  add(get(id), "option", all).value = "";
  for (const option of options) add(get(id), "option", option).value = option;
}
function list() {
  const kept = rows.filter(row => filters.every(id => !get(id).value || row[id] === get(id).value));
  get("list").replaceChildren();
  get("count").textContent = `${kept.length} answers, wrong ones first`;
  for (const row of kept.slice(0, limit)) card(get("list"), row);
  get("more").hidden = kept.length <= limit;
}
data.stories.forEach((story, number) => {
  const one = add(get("stories"), "details"), [first] = story;
  one.open = number < 4;
  add(one, "summary", `${first.kind}, ${first.type}: ${first.question}`);
  if (first.options.length) add(one, "div", first.options.join("\\n"), "text");
  const cards = add(one, "div", undefined, "cards");
  for (const row of story) card(cards, row, `${row.model} (${row.mode})`);
});
fill("benchmark", "everything"); fill("kind", "all kinds of pictures"); fill("type", "all types");
for (const id of filters) get(id).onchange = () => { limit = 24; list(); };
get("more").onclick = () => { limit += 24; list(); };
list();
</script></body></html>
""")
REPORT_ANSWERS = {True: 160, False: 80}  # wrong and right ones, of one model and benchmark
PAGE_BYTES = 4_000_000  # of the answers' pictures on a page


def report_page(sections, answers, pictures, stories=(), figures=()):
    """report.html as text. sections: dicts of heading, table (rows of cells), by_type and guess ({question type: score}: bars,
    each with a red mark at the best constant guess). answers: from report_answers; stories: from report_stories; pictures: the
    dict that both have filled. figures: [(heading, path of a PNG)] at the top."""
    shown = []
    for heading, path in figures:
        address = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
        with Image.open(path) as image:
            shown.append({"heading": heading, "address": address, "width": image.width})
    data = {"pictures": list(pictures.values()), "stories": list(stories), "answers": answers}
    return REPORT.render(sections=sections, figures=shown, data=data)


def report_stories(rows, items, truth, backbone, pictures):
    """For each type and kind of pictures its first question, as a list of cards (see answer_card), one for each row about it.
    rows: greedy answers of several models."""
    first = {}
    for row in rows:
        first.setdefault((items[row["id"]].example.data_type, row["question_type"]), row["id"])
    told = {key: [row for row in rows if row["id"] == key] for key in first.values()}
    return [[answer_card(row, items, truth, backbone, pictures) for row in some] for some in told.values()]


def report_answers(rows, items, truth, backbone, pictures, room=PAGE_BYTES):
    """Greedy answers for the page as cards (see answer_card), wrong ones first: of every type and kind of pictures in turn, the
    lowest scores first, until their pictures take `room` bytes (two thirds of it for wrong ones). rows: of predictions.jsonl."""
    turn, order, out, start = Counter(), {True: [], False: []}, [], page_bytes(pictures)
    for row in sorted((row for row in rows if not row["temperature"]), key=lambda row: row["score"]):
        wrong, key = row["score"] < 0.5, (items[row["id"]].example.data_type, row["question_type"], row["score"] < 0.5)
        order[wrong].append((turn[key], len(order[wrong]), row))
        turn[key] += 1
    for wrong, most in REPORT_ANSWERS.items():
        for _, _, row in tqdm(sorted(order[wrong])[:most], f"report, {'wrong' if wrong else 'right'} answers"):
            if page_bytes(pictures) - start < (room * 2 / 3 if wrong else room):
                out.append(answer_card(row, items, truth, backbone, pictures))
    return out


def page_bytes(pictures):
    """Size of a page's pictures."""
    return sum(len(address) for address, _, _ in pictures.values())


def answer_card(row, items, truth, backbone, pictures):
    """An answer as a page shows it: a dict of safe text, and its pictures: [(number in `pictures`, [(part, label, x1, y1, x2,
    y2)])], boxes in pixels of the file. part: truth, thought or answer.

    items: {id: Item}. truth: {id: [(number of the picture, label, box)]}, in pixels of the file; that of a "locate" row is its
    answer, in pixels that the model sees. pictures: {name: (address, width, height)}, to which those of this answer are added.
    """
    item, text, drawn = items[row["id"]], row["text"], []
    named = [] if common.is_video(row["images"][0]) else named_boxes(text, len(row["images"]))  # its frames have no numbers here
    wanted = row["answer"] if row["question_type"] == "locate" else []
    located = [("truth", box.get("picture", 1) - 1, box["label"], box["bbox_2d"]) for box in wanted]
    for place, name in page_pictures(row["images"], [*located, *named], pictures).items():
        size = pictures[name][1:]
        boxes = [("truth", label, *box) for number, label, box in truth.get(row["id"], []) if number == place]
        boxes += [(part, label, *common.box_from_model(backbone, box, size))
                  for part, number, label, box in [*located, *named] if number == place]  # fmt: skip
        drawn.append((list(pictures).index(name), [(part, safe_text(label, 60), *box) for part, label, *box in boxes]))
    thought, tag, _ = text.partition("<answer>")
    texts = {
        "benchmark": f"{row['model']}, {item.example.id.split(':')[0]}", "model": row["model"], "mode": row["mode"],
        "type": row["question_type"], "kind": item.example.data_type.replace("_", " "), "id": row["id"],
        "thought": thought if tag else "", "said": common.extract_answer(text), "question": row["question"],
        "answer": common.boxes_text(row["answer"]) if located else str(row["answer"]),
    }  # fmt: skip
    return {name: safe_text(part) for name, part in texts.items()} | {
        "options": [safe_text(option) for option in row["options"] or []], "score": row["score"],
        "verdict": "right" if row["score"] >= 0.5 else "wrong", "pictures": drawn,
    }  # fmt: skip


def page_pictures(paths, named, pictures):
    """The names of those pictures of an answer that a page shows, {place: name}: see shown_pictures; four frames of an mp4. They
    are read and added to `pictures` where they are not in it."""

    def thumbnail(image):
        small = image.copy()
        small.thumbnail((320, 320))
        return jpeg_address(small), *image.size

    if common.is_video(paths[0]):
        if f"{paths[0]} 0" not in pictures:
            pictures |= {f"{paths[0]} {n}": thumbnail(frame) for n, frame in enumerate(common.read_video(paths[0], 4))}
        return dict(enumerate(name for name in pictures if name.startswith(f"{paths[0]} ")))
    names = {place: paths[place] for place in shown_pictures(len(paths), named)}
    pictures |= {name: thumbnail(common.load_image(name)) for name in names.values() if name not in pictures}
    return names


PLACE = r"\b(?:picture|image|frame|view)[\s\":#_-]{0,3}(?P<number>\d{1,3})"
MARKS = re.compile(rf"(?P<object>\{{[^{{}}]*\}})|(?P<answer><answer>)|{PLACE}", re.IGNORECASE)


def named_boxes(text, count):
    """Every box that a completion names: [(part, number of the picture, label, box)], boxes in pixels that the model sees.

    part: "thought" before <answer>, else "answer"; of a text without these tags everything is the answer. The picture (from 0,
    of `count`) is that of the last "picture 2" (or image, frame, view) before the box or inside its JSON object, else the first.
    """
    part, number, out = "thought" if "<think>" in text or "<answer>" in text else "answer", 0, []
    for mark in MARKS.finditer(text):
        part = "answer" if mark["answer"] else part
        place = re.search(PLACE, mark["object"], re.IGNORECASE) if mark["object"] else mark
        if place and place["number"] and 0 < int(place["number"]) <= count:
            number = int(place["number"]) - 1
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(mark["object"] or "{}")
            if common.valid_box(found.get("bbox_2d")):
                out.append((part, number, str(found.get("label", "")), found["bbox_2d"]))
    return out


def shown_pictures(count, named, most=4):
    """Which of `count` pictures to show: `most` at equal steps, and those of the boxes `named` (see named_boxes)."""
    spread = np.linspace(0, count - 1, min(count, most)).round().astype(int)
    return sorted({*spread.tolist(), *(picture for _, picture, _, _ in named)})


# ------------------------------------------------------------------------------------------------
# 3. Plots
# ------------------------------------------------------------------------------------------------


def new_figure(width, height):
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # here, because it takes a second; not pyplot, which keeps figures for a screen

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Write a figure as PNG."""
    figure.savefig(path, dpi=110)
    gc.collect()  # a figure is full of reference cycles, which otherwise pile up


def draw_lines(path, panels):
    """One panel beside the other. panels: {title: {label: [(step, value), ...]}}."""
    figure = new_figure(4.2 * len(panels), 3.2)
    for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for label, points in lines.items():
            axis.plot(*zip(*points), label=label, marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def logged_points(rows, key):
    """(step, value) of the rows of metrics.jsonl that hold `key`."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def draw_curves(folder, panels):
    """Draw curves.png from metrics.jsonl. panels: {title: [metric, ...]}; metrics that were never logged are left out."""
    rows = common.read_jsonl(Path(folder) / "metrics.jsonl")
    lines = {title: {key: points for key in keys if (points := logged_points(rows, key))} for title, keys in panels.items()}
    draw_lines(Path(folder) / "curves.png", {title: found for title, found in lines.items() if found})


DYNAMICS = {"reward": "reward", "spread of the reward in a group": "reward_std", "held-out score": "think", "loss": "loss"}


def draw_dynamics(folders, path):
    """Reward, its spread and the held-out score against steps, one line a run (the paper: with and without stages)."""
    runs = {str(folder): common.read_jsonl(Path(folder) / "metrics.jsonl") for folder in folders}
    panels = {}
    for title, key in DYNAMICS.items():
        lines = {name: points for name, rows in runs.items() if (points := logged_points(rows, key))}
        panels |= {title: lines} if lines else {}
    if not panels:
        raise SystemExit(f"--curves: {', '.join(runs)} logged none of {', '.join(DYNAMICS.values())}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_lines(path, panels)


def draw_ladder(scores, path):
    """ladder.png: boxes (mean IoU) and skill, then the question types of each kind of pictures: one bar a model, in the model's
    own mode; a line at the best constant guess."""
    models, guess = scores["models"], scores["guess"]
    parts = {"boxes and skill": ["boxes", "boxes in several pictures", "skill"]}
    for kind in guess:
        parts.setdefault(kind.split(":")[0].replace("_", " "), []).append(kind)
    figure = new_figure(14, 4.2)
    axes = figure.subplots(1, len(parts), sharey=True, width_ratios=[len(kinds) for kinds in parts.values()], squeeze=False)[0]
    for axis, (title, kinds) in zip(axes, parts.items()):
        for number, (name, model) in enumerate(models.items()):
            heights = model["by_type"] | {"boxes": model["localize"]["iou"], "skill": model["skill"]}
            heights["boxes in several pictures"] = model["localize"]["iou_several"]
            places = np.arange(len(kinds)) + (number - len(models) / 2 + 0.5) * 0.8 / len(models)
            axis.bar(places, [heights[kind] or 0 for kind in kinds], 0.8 / len(models), label=f"{name} ({model['mode']})")
        for x, kind in enumerate(kinds):
            if kind in guess:
                label = None if x else "best constant guess"
                axis.hlines(guess[kind], x - 0.42, x + 0.42, color="black", linestyle=":", label=label)
        axis.set_xticks(range(len(kinds)), [kind.split(": ")[-1].replace(" ", "\n") for kind in kinds], fontsize=8)
        axis.set_ylim(-0.25, 1)  # a model that cannot answer at all has a skill far below the guess: cut
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(f"The ladder, {scores['questions']} held-out questions")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=6)
    save_figure(figure, path)


def draw_boxes(rows, path, names, backbone, pictures=5, scale=3):
    """boxes.png: held-out pictures, one column each: true boxes in the first line, then the boxes of each model. Questions about
    several pictures are left out. Boxes in `rows` have the units of the backbone (common.box_space)."""
    rows = [row for row in rows if row["mode"] == "locate" and len(row["images"]) == 1]
    by_model = {name: {row["id"]: row for row in rows if row["model"] == name} for name in names}
    truth = sorted(by_model[names[0]].values(), key=lambda row: -len(row["answer"]))[:pictures]
    if not truth:
        return
    lines = []
    for name in ("truth", *names):
        lines.append([])
        for row in truth:
            image = common.load_image(row["images"][0])
            tile = image.resize((image.width * scale, image.height * scale), Image.NEAREST)
            draw = ImageDraw.Draw(tile)
            boxes = row["answer"] if name == "truth" else common.parse_boxes(by_model[name][row["id"]]["text"]) or []
            wanted = [box["label"] for box in row["answer"]]
            for box in boxes:
                known = box["label"] in wanted  # a label that was not asked for is white
                colour = ("orange", "magenta", "lime")[wanted.index(box["label"]) % 3] if known else "white"
                x1, y1, x2, y2 = (value * scale for value in common.box_from_model(backbone, box["bbox_2d"], image.size))
                draw.rectangle([x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)], outline=colour, width=2)
                draw.text((x1 + 3, y1 + 1), box["label"], fill="black")
            draw.text((4, tile.height - 14), name, fill="black")
            lines[-1].append(tile)
    width, height = lines[0][0].size
    sheet = Image.new("RGB", ((width + 6) * len(truth), (height + 6) * len(lines)), "white")
    for y, tiles in enumerate(lines):
        for x, tile in enumerate(tiles):
            sheet.paste(tile, (x * (width + 6), y * (height + 6)))
    sheet.save(path)


def draw_answers(asked, path):
    """ask.png: one line for each question, with the pictures of shown_pictures and the boxes that the model names; the axes count
    pixels of the picture. asked: [(question, answer, pictures, boxes)], boxes as from named_boxes, but in pixels of the picture."""
    from matplotlib.patches import Rectangle

    shown = [shown_pictures(len(pictures), named) for _, _, pictures, named in asked]
    columns = max(map(len, shown))
    side, tallest = max(2.5, 8 / columns), max(image.height / image.width for _, _, pictures, _ in asked for image in pictures)
    figure = new_figure(side * columns, (side * tallest + 0.7) * len(asked))
    lines = figure.subplots(len(asked), columns, squeeze=False)
    for line, places, (question, answer, pictures, named) in zip(lines, shown, asked):
        words = textwrap.fill(safe_text(f"{question} -> {answer}", 400), round(11 * side * columns))
        line[0].annotate(words, (0, 1), (0, 6), "axes fraction", "offset points", fontsize=9, parse_math=False).set_in_layout(False)
        line[0].set_title(" \n" * words.count("\n") + " ", fontsize=9)  # keeps room for it, which reaches over all columns
        for axis in line[len(places) :]:
            axis.set_axis_off()
        for axis, place in zip(line, places):
            image = pictures[place]
            axis.imshow(image, extent=(0, image.width, image.height, 0))
            axis.tick_params(labelsize=7)
            axis.set_xlabel(f"picture {place + 1}" if len(pictures) > 1 else "", fontsize=8)
            for part, number, label, (x1, y1, x2, y2) in named:
                if number == place:
                    look = {"thought": ("magenta", "--"), "answer": ("darkorange", "-")}[part]
                    box = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=look[0], linestyle=look[1], linewidth=2)
                    axis.add_patch(box).set_label(f"named in the {part}")
                    plate = {"facecolor": look[0], "edgecolor": "none", "pad": 1}
                    words = axis.text(x1, y1, safe_text(label, 40), fontsize=8, color="white", bbox=plate, va="bottom")
                    words.set(parse_math=False, in_layout=False)
    found = {patch.get_label(): patch for axis in figure.axes for patch in axis.patches}
    if found:
        lines[0][0].legend(found.values(), found.keys(), loc="lower right", fontsize=7)
    save_figure(figure, path)


def draw_entropy(pairs, path):
    """entropy-<benchmark>.png: a histogram of the semantic entropy of right and of wrong questions. pairs: [(entropy, score)]."""
    figure = new_figure(5, 3.4)
    axis = figure.subplots()
    axis.hist([entropy for entropy, score in pairs if score >= 0.5], bins=20, alpha=0.6, label="right")
    axis.hist([entropy for entropy, score in pairs if score < 0.5], bins=20, alpha=0.6, label="wrong")
    title = f"mean {np.mean([entropy for entropy, _ in pairs]):.2f}, {len(pairs)} questions"
    axis.set(xlabel="semantic entropy (nats)", ylabel="questions", title=title)
    axis.legend()
    save_figure(figure, path)


def draw_attention(found, maps, path):
    """attention.png: the share of attention inside the boxes by layer, and below it a few pictures at four layers.

    found: {"questions", "share", "area"}; maps: [(path of the picture, boxes, weights (layers, h, w))]; see study_attention.
    """
    from matplotlib.patches import Rectangle

    layers = len(found["share"])
    columns = [None, *sorted({round(x) for x in np.linspace(0, layers - 1, 4)})]  # None: the picture alone
    figure = new_figure(2.4 * len(columns), 3 + 2.4 * len(maps))
    grid = figure.add_gridspec(1 + len(maps), len(columns))
    axis = figure.add_subplot(grid[0, :])
    axis.plot(range(layers), found["share"], marker=".", label="answer token")
    axis.axhline(found["area"], color="black", linestyle=":", label="uniform attention")
    axis.locator_params(axis="x", integer=True)
    title = f"Attention on the objects in the question, {found['questions']} questions"
    axis.set(xlabel="layer", ylabel="share inside the boxes", title=title)
    axis.legend(fontsize=8)
    for line, (picture, boxes, weights) in enumerate(maps, 1):
        image = common.load_image(picture)
        for column, layer in enumerate(columns):
            axis = figure.add_subplot(grid[line, column])
            axis.imshow(image)
            for x1, y1, x2, y2 in boxes:
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="lime"))
            if layer is not None:
                axis.imshow(weights[layer], extent=(0, image.width, image.height, 0), alpha=0.6, cmap="inferno")
            axis.set_title("picture" if layer is None else f"layer {layer}", fontsize=8)
            axis.set_axis_off()
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------
# 4. The gallery of stage 0
# ------------------------------------------------------------------------------------------------

GALLERY = TEMPLATES.from_string("""\
<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Stage 0</title><style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
h2 { margin-top: 2em; border-bottom: 1px solid #ccc } svg { display: block; max-width: 100%; height: auto }
article { display: flex; flex-wrap: wrap; gap: 1.2em; margin: 1.2em 0; align-items: flex-start }
.pictures { display: flex; flex-wrap: wrap; gap: 4px; width: 480px; max-width: 100% }
.words { flex: 1 0 240px; min-width: 0; overflow-wrap: anywhere } .thought { color: #666; font-size: 13px }
.answer { font-weight: 600 }
</style><body><h1>Questions and their geometry</h1>
<p>Beside each question, or below it, is the room from above. One square is a metre. The objects in the question are filled; blue
dots and lines show where the cameras stood and looked, numbered as the pictures.</p>
{% for entry in entries %}
{% if loop.first or entry.title != loop.previtem.title %}<h2>{{ entry.title | safe_text }}</h2>{% endif %}
<article>
{% if entry.pictures %}<div class="pictures">
{% for picture in entry.pictures %}{% set unit = picture.size[0] / 160 %}
<svg viewBox="0 0 {{ picture.size[0] }} {{ picture.size[1] }}" width="{{ picture.width }}" height="{{ picture.height }}">
<image href="{{ picture.address }}" width="{{ picture.size[0] }}" height="{{ picture.size[1] }}"/>
{% for (x1, y1, x2, y2), label in picture.boxes %}
<rect x="{{ x1 }}" y="{{ y1 }}" width="{{ x2 - x1 }}" height="{{ y2 - y1 }}" fill="none" stroke="orange" stroke-width="{{ unit }}"/>
<text x="{{ x1 }}" y="{{ [y1 - unit, 6 * unit] | max }}" font-size="{{ 6 * unit }}" fill="orange">{{ label | safe_text(60) }}</text>
{% endfor %}
</svg>
{% endfor %}
</div>{% endif %}
<div class="words"><div>{{ entry.question | safe_text }}</div>
{% for option in entry.options or [] %}<div>{{ option | safe_text }}</div>{% endfor %}
<div class="answer">{{ entry.answer | safe_text }}</div><div class="thought">{{ entry.thought | safe_text }}</div>
<div class="thought">{{ entry.room | safe_text }}</div></div>
{% set plan = entry.plan %}{% set width, height = plan.size %}
<svg viewBox="0 0 {{ width }} {{ height }}" width="{{ width }}" height="{{ height }}">
<rect width="{{ width }}" height="{{ height }}" fill="#fafafa" stroke="#ccc"/>
{% for x in plan.columns %}<line x1="{{ x }}" x2="{{ x }}" y2="{{ height }}" stroke="#eee"/>{% endfor %}
{% for y in plan.rows %}<line y1="{{ y }}" y2="{{ y }}" x2="{{ width }}" stroke="#eee"/>{% endfor %}
{% for outline, _, label in plan.objects %}{% set fill = "none" if label is none else "#fc9" %}
<polygon points="{% for x, y in outline %}{{ x }},{{ y }} {% endfor %}" fill="{{ fill }}" stroke="#999"/>
{% endfor %}
{% for (x, y), (dx, dy) in plan.cameras %}
<path d="M{{ x }} {{ y }} l{{ dx }} {{ dy }}" stroke="#36c" stroke-width="2"/>
<circle cx="{{ x }}" cy="{{ y }}" r="3" fill="#36c"/><text x="{{ x + 4 }}" y="{{ y - 4 }}" font-size="9">{{ loop.index }}</text>
{% endfor %}
{% for _, (x, y), label in plan.objects if label is not none %}
<text x="{{ x }}" y="{{ y }}" font-size="11" text-anchor="middle">{{ label | safe_text(60) }}</text>
{% endfor %}
</svg></article>
{% endfor %}
</body></html>
""")


def gallery_page(entries):
    """gallery.html as text: for each row of stage 0 its pictures with boxes, its texts, and the room from above.

    An entry is a dict of title, question, options, answer, thought, room; pictures: [(path, [(box, label)])]; and, in metres of
    the floor plane, objects: [(outline (n, 2), centre (2,), label or None if not in the question)]; cameras: [(place (2,),
    viewing direction (2,))].
    """
    drawn = []
    for entry in entries:
        width = 480 if len(entry["pictures"]) == 1 else 238 if len(entry["pictures"]) <= 4 else 116
        drawn.append(entry | {
            "pictures": [gallery_picture(path, boxes, width) for path, boxes in entry["pictures"]],
            "plan": floor_plan(entry["objects"], entry["cameras"]),
        })  # fmt: skip
    return GALLERY.render(entries=drawn)


def gallery_picture(path, boxes, width):
    """A picture for the page, `width` pixels wide; its size and its boxes stay those of the file."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((width, round(image.height * width / image.width)))
    return {"size": image.size, "width": width, "height": small.height, "address": jpeg_address(small, 85), "boxes": boxes}


def floor_plan(objects, cameras, side=260):
    """The room from above in pixels, at most `side` long, the positive y axis up: size, grid lines (columns, rows), objects
    (those in the question last, because they are filled) and cameras."""
    points = np.concatenate([*(outline for outline, _, _ in objects), *(place[None] for place, _ in cameras)])
    low, high = np.floor(points.min(0) - 0.3), np.ceil(points.max(0) + 0.3)
    scale = side / (high - low).max()

    def pixels(points):
        return ((np.array([low[0], high[1]]) - points) * [-scale, scale]).round(1).tolist()

    return {
        "size": ((high - low) * scale).round().astype(int).tolist(),
        "columns": [pixels([x, 0])[0] for x in np.arange(low[0] + 1, high[0])],
        "rows": [pixels([0, y])[1] for y in np.arange(low[1] + 1, high[1])],
        "objects": [
            (pixels(outline), pixels(centre), label)
            for outline, centre, label in sorted(objects, key=lambda item: item[2] is not None)
        ],
        "cameras": [(pixels(place), (gaze * [18, -18]).round(1).tolist()) for place, gaze in cameras],
    }


def outline(points):
    """The corners (m, 2) of the convex hull of points (n, 2)."""
    try:
        return points[ConvexHull(points).vertices]
    except QhullError:  # all on one line
        return points


def draw_gallery(root, seed, columns=4, side=336):
    """gallery.png as a picture: one question of each type and kind of pictures of the toy, with all boxes; the answer below. Of
    a video the first frame of every pair."""
    rows = common.read_jsonl(root / common.FILES["spatial"])
    objects = {row["image"][0]: row["objects"] for row in common.read_jsonl(root / "objects.jsonl") if len(row["image"]) == 1}
    random.Random(seed).shuffle(rows)
    picked = {(row["data_type"], row["question_type"]): row for row in rows}
    tiles = []
    for (data_type, kind), row in sorted(picked.items()):
        tile = Image.new("RGB", (side + 8, side + 124), "white")
        names = [name for name in row["image"] if name.endswith(".jpg")][:: 2 if data_type == "video" else 1]
        part = side if len(names) == 1 else side // 2 - 2
        for number, name in enumerate(names):
            picture, corner = Image.open(root / "images" / name), (number % 2 * (part + 4), number // 2 * (part + 4))
            scale = part / picture.width
            picture = picture.resize((part, part), Image.NEAREST)
            draw = ImageDraw.Draw(picture)
            for thing in objects.get(name, []):
                x1, y1, x2, y2 = (value * scale for value in thing["bbox_2d"])
                draw.rectangle([x1, y1, x2 - 1, y2 - 1], outline="white")
                draw.text((x1 + 2, y1), thing["label"], fill="black")
            tile.paste(picture, corner)
        for name in row["image"]:
            if name.endswith(".png"):  # a depth picture or a crop, small in the corner
                tile.paste(Image.open(root / "images" / name).convert("RGB").resize((96, 96)), (side - 96, 0))
        words = " ".join([row["question"], *(row["options"] or []), "->", row["answer"]])
        words = f"{data_type.replace('_', ' ')}, {kind}\n{textwrap.fill(words, 55, break_on_hyphens=False)}"
        ImageDraw.Draw(tile).text((2, side + 2), words, fill="black")
        tiles.append(tile)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return sheet
