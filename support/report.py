"""Pages and plots: report.html, curves.png and the other pictures of eval.py, and the gallery of stage 0.

Text from data and models is untrusted (HTML, bidi marks, huge strings). On a page it passes through a jinja2 template with
autoescape, so that it can never run, and through safe_text, which truncates it and makes invisible characters visible.
"""

import base64
import gc
import io
import random
import textwrap
import unicodedata
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
# 2. report.html: tables, bars and answers in one file, no server and no network
# ------------------------------------------------------------------------------------------------

REPORT = TEMPLATES.from_string("""\
<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>
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
</style><body><h1>Evaluation</h1>
{% for section in sections %}
<h2>{{ section.heading | safe_text(200) }}</h2>
{% if section.table %}<table>{% endif %}
{% for row in section.table %}
{% set cell = "th" if loop.first else "td" %}
{% set style = "ours" if "strict" in row[0] and not loop.first else "guess" if "guess" in row[0] else "" %}
<tr class="{{ style }}">{% for text in row %}<{{ cell }}>{{ text | safe_text(200) }}</{{ cell }}>{% endfor %}</tr>
{% endfor %}
{% if section.table %}</table>{% endif %}
{% for kind, score in section.by_type.items() %}
<div class="bar"><span>{{ kind | safe_text(200) }}</span><span class="track"><i style="width:{{ "%.1f" % (100 * score) }}%"></i>
{% if kind in section.guess %}<b style="left:{{ "%.1f" % (100 * section.guess[kind]) }}%"></b>{% endif %}
</span><span>{{ "%.1f" % (100 * score) }}</span></div>
{% endfor %}
{% endfor %}
<h2>Answers</h2><p><select id="benchmark"></select><select id="type"></select><select id="verdict"><option value="">right and wrong
</option><option value="wrong">wrong</option><option value="right">right</option></select><span id="count"></span></p>
<div id="list"></div><p><button id="more">more</button></p>
<script type="application/json" id="data">{{ answers | tojson }}</script><script>
const rows = JSON.parse(document.getElementById("data").textContent), get = id => document.getElementById(id);
let limit = 20;
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
  for (const row of kept.slice(0, limit)) {
    const box = add(get("list"), "article"), inner = add(box, "div", undefined, row.verdict);
    for (const picture of row.pictures) add(inner, "img").src = picture;
    add(inner, "div", row.question, "text");
    for (const option of row.options) add(inner, "div", option, "text");
    if (row.thought) add(inner, "pre", row.thought, "thought");
    add(inner, "div", `answered: ${row.said}`, "text");
    add(inner, "div", `right: ${row.answer}   score ${row.score.toFixed(2)}`, "text");
    add(inner, "div", `${row.benchmark}, ${row.type}, ${row.id}`, "thought");
  }
  get("more").hidden = kept.length <= limit;
}
fill("benchmark", "benchmark", "everything"); fill("type", "type", "all types");
for (const id of ["benchmark", "type", "verdict"]) get(id).onchange = () => { limit = 20; draw(); };
get("more").onclick = () => { limit += 20; draw(); };
draw();
</script></body></html>
""")
REPORT_ANSWERS = 240  # of one model and benchmark; two thirds of them wrong


def report_page(sections, answers):
    """report.html as text. sections: dicts of heading, table (rows of cells), by_type and guess ({question type: score}: bars,
    each with a red mark at the best constant guess); answers: from report_answers."""
    return REPORT.render(sections=sections, answers=answers)


def report_answers(rows, items):
    """Greedy answers for the page, wrong ones first: dicts of safe text and pictures. rows: of predictions.jsonl; items:
    {id: Item}."""
    order = sorted((row for row in rows if not row["temperature"]), key=lambda row: row["score"])
    wrong = [row for row in order if row["score"] < 0.5]
    right = [row for row in order if row["score"] >= 0.5][::-1]
    out = []
    for row in tqdm(wrong[: REPORT_ANSWERS * 2 // 3] + right[: REPORT_ANSWERS // 3], desc="report"):
        item, text = items[row["id"]], row["text"]
        if row["question_type"] == "locate":
            boxes = [(box["bbox_2d"], "lime") for box in row["answer"]]
            boxes += [(box["bbox_2d"], "orange") for box in common.parse_boxes(text) or []]
        else:
            boxes = [(box, "lime") for box in item.boxes.values()]
        thought, tag, _ = text.partition("<answer>")
        texts = {
            "benchmark": f"{row['model']}, {item.example.id.split(':')[0]}", "type": row["question_type"], "id": row["id"],
            "thought": thought if tag else "", "said": common.extract_answer(text), "question": row["question"],
            "answer": str(row["answer"]),
        }  # fmt: skip
        out.append({name: safe_text(part) for name, part in texts.items()} | {
            "options": [safe_text(option) for option in row["options"] or []], "score": row["score"],
            "verdict": "right" if row["score"] >= 0.5 else "wrong", "pictures": thumbnails(row["images"], boxes),
        })  # fmt: skip
    return out


def thumbnails(paths, boxes, height=150, most=4):
    """Up to four small pictures of each file as data: addresses. boxes: [(box, colour)], drawn on the first."""
    pictures = []
    for path in paths[:most]:
        frames = common.read_video(path, most) if path.endswith(".mp4") else [common.load_image(path)]
        for image in frames:
            scale = height / image.height
            small = image.resize((max(1, round(image.width * scale)), height))
            draw = ImageDraw.Draw(small)
            for box, colour in boxes if not pictures else []:
                draw.rectangle([value * scale for value in box], outline=colour, width=2)
            pictures.append(jpeg_address(small))
    return pictures


# ------------------------------------------------------------------------------------------------
# 3. Plots
# ------------------------------------------------------------------------------------------------


def new_figure(width, height):
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # here, because it takes a second; not pyplot, which keeps figures for a screen

    return Figure(figsize=(width, height))


def save_figure(figure, path):
    """Write a figure as PNG."""
    figure.tight_layout()
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
    """ladder.png: for each question type one bar a model, in the model's own mode; a line at the best constant guess."""
    kinds, models = list(scores["guess"]), scores["models"]
    figure = new_figure(11, 4)
    axis = figure.subplots()
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
    save_figure(figure, path)


def draw_boxes(rows, path, names, pictures=5, scale=3):
    """boxes.png: held-out pictures, one column each: true boxes in the first line, then the boxes of each model."""
    by_model = {name: {row["id"]: row for row in rows if row["model"] == name and row["mode"] == "locate"} for name in names}
    truth = sorted(by_model[names[0]].values(), key=lambda row: -len(row["answer"]))[:pictures]
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
                x1, y1, x2, y2 = (value * scale for value in box["bbox_2d"])
                draw.rectangle([x1, y1, x2 - 1, y2 - 1], outline=colour, width=2)
                draw.text((x1 + 3, y1 + 1), box["label"], fill="black")
            draw.text((4, tile.height - 14), name, fill="black")
            lines[-1].append(tile)
    width, height = lines[0][0].size
    sheet = Image.new("RGB", ((width + 6) * len(truth), (height + 6) * len(lines)), "white")
    for y, tiles in enumerate(lines):
        for x, tile in enumerate(tiles):
            sheet.paste(tile, (x * (width + 6), y * (height + 6)))
    sheet.save(path)


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
<!doctype html><html lang="en"><meta charset="utf-8"><title>Stage 0</title><style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
article { display: flex; gap: 1.2em; margin: 1.2em 0; align-items: flex-start }
.pictures { display: flex; flex-wrap: wrap; gap: 4px; flex: 0 0 480px } .pictures svg { display: block }
.words { flex: 1; min-width: 0; overflow-wrap: anywhere } .thought { color: #666; font-size: 13px } .answer { font-weight: 600 }
</style><body><h1>Questions and their geometry</h1>
<p>On the right of each question is the room from above. One square is a metre. The objects in the question are filled; blue dots
and lines show where the cameras stood and looked, numbered as the pictures.</p>
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
        width = 480 if len(entry["pictures"]) == 1 else 116
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


def draw_gallery(root, types, seed, columns=4, scale=3):
    """gallery.png as a picture: two pictures of each of the toy's question types, with all boxes, and question and answer below."""
    rows = common.read_jsonl(root / common.FILES["spatial"])
    objects = {row["image"][0]: row["objects"] for row in common.read_jsonl(root / "objects.jsonl")}
    random.Random(seed).shuffle(rows)
    picked = [row for kind in types for row in [r for r in rows if r["question_type"] == kind][:2]]
    tiles = []
    for row in picked:
        picture = Image.open(root / "images" / row["image"][0])
        width, height = picture.width * scale, picture.height * scale
        tile = Image.new("RGB", (width + 8, height + 112), "white")
        tile.paste(picture.resize((width, height), Image.NEAREST))
        draw = ImageDraw.Draw(tile)
        for thing in objects[row["image"][0]]:
            x1, y1, x2, y2 = (value * scale for value in thing["bbox_2d"])
            draw.rectangle([x1, y1, x2 - 1, y2 - 1], outline="white")
            draw.text((x1 + 2, y1), thing["label"], fill="black")
        for name in row["image"][1:]:  # a depth picture or a crop, small in the corner
            tile.paste(Image.open(root / "images" / name).convert("RGB").resize((96, 96)), (width - 96, 0))
        words = " ".join([row["question"], *(row["options"] or []), "->", row["answer"]])
        words = textwrap.fill(words, 53, break_on_hyphens=False)
        draw.text((2, height + 2), words, fill="black")
        tiles.append(tile)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return sheet
