"""report.html and gallery.html: what they show, and how a browser lays them out."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

import common
import eval as evaluation
import stage0_data
from common import Example
from support import report
from support.benchmarks import Item

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
MODELS = ("base", "stage1", "stage3")
THOUGHT = '<think>picture 2 [{"label":"chair","bbox_2d":[28,21,56,42]}] 2</think><answer>2</answer>'


def picture(path, width, height, seed=0, noise=False):
    """A picture file: noise, which no JPEG makes small, or one colour."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3) if noise else (1, 1, 3), dtype=np.uint8)
    Image.fromarray(np.broadcast_to(pixels, (height, width, 3)).copy()).save(path)
    return str(path)


def row_of(item, model, mode, text, score):
    """A row of predictions.jsonl."""
    example = item.example
    return {"model": model, "mode": mode, "temperature": 0.0, "sample": 0, "id": example.id, "question_type": example.question_type,
            "data_type": example.data_type, "images": list(example.images), "question": example.question,
            "options": example.options, "answer": example.answer, "text": text, "score": score, "format": 1.0,
            "legal": 1.0}  # fmt: skip


@pytest.fixture(scope="module")
def seen_by():
    pictures = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    return SimpleNamespace(processor=pictures, family=common.FAMILIES["qwen2_5_vl"])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(spatial items, locate items, rows of three models, folder) about 640 x 480 pictures; the model sees 112 x 84."""
    root = tmp_path_factory.mktemp("toy")
    room = root / "data" / "heldout" / "images" / "scene0001_00"
    room.mkdir(parents=True)
    files = [picture(room / f"{20 * n}.jpg", 640, 480, n) for n in range(3)]
    spatial = []
    for kind, some in (("single_image", files[:1]), ("multi_view", files)):
        for name, options, answer in (("object count", None, "2"), ("relative direction", ["A. left", "B. right"], "A")):
            for number in range(3):
                text = f"{name} {number}: which chair has the longest armrest?"
                example = Example(f"{kind} {name}:{number}", tuple(some), kind, name, text, options, answer)
                spatial.append(Item("toy", {}, example))
    boxes = [{"label": "chair", "bbox_2d": [28, 21, 56, 42]}]  # in pixels that the model sees
    locate = [Item("toy", {}, Example("locate:1", (files[0],), "single_image", "locate", "Locate the chair.", None, boxes))]
    rows = []
    for model in MODELS:
        rows.append(row_of(locate[0], model, "locate", '[{"label":"chair","bbox_2d":[0,0,7,7]}]', 0.0))
        for number, item in enumerate(spatial):
            for mode in ("direct", "think") if model == "stage3" else ("direct",):
                rows.append(row_of(item, model, mode, THOUGHT if mode == "think" else "2", float(number % 2)))
                rows.append(rows[-1] | {"temperature": 1.0, "text": "sampled"})
    return spatial, locate, rows, root


def page_data(path):
    """The JSON in a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', Path(path).read_text(encoding="utf-8"), re.DOTALL)[1])


def test_one_question_of_every_type_and_kind_is_told_at_every_rung(toy, seen_by):
    spatial, locate, rows, root = toy
    items, shown = {item.example.id: item for item in spatial + locate}, {}
    own = [row for row in rows if not row["temperature"] and (row["mode"] != "direct" or row["model"] != "stage3")]
    counted = [item.example for item in spatial if item.example.question_type == "object count"]
    truth = {e.id: [(n, "chair", [160 + n, 120, 320, 240]) for n in range(len(e.images))] for e in counted}
    stories = report.report_stories(own, items, truth, seen_by, shown)
    told = {(story[0]["kind"], story[0]["type"]): story for story in stories}
    kinds = [(kind, name) for kind in ("single image", "multi view") for name in ("object count", "relative direction")]
    assert sorted(told) == sorted([*kinds, ("single image", "locate")]) and len(stories) == 5
    for story in stories:
        assert [card["model"] for card in story] == list(MODELS) and len({card["id"] for card in story}) == 1
        assert story[0]["id"].endswith(":0") or story[0]["type"] == "locate"
    # Boxes in pixels of the file: 640 / 112 = 480 / 84 = 40 / 7 times those that the model sees.
    assert told["single image", "locate"][0]["pictures"] == [
        (0, [("truth", "chair", 160, 120, 320, 240), ("answer", "chair", 0, 0, 40, 40)])
    ]
    direct, _, thinking = told["multi view", "object count"]
    assert [boxes for _, boxes in direct["pictures"]] == [[("truth", "chair", 160 + n, 120, 320, 240)] for n in range(3)]
    assert thinking["pictures"][1][1][1:] == [("thought", "chair", 160, 120, 320, 240)]  # on picture 2 alone
    assert [len(boxes) for _, boxes in thinking["pictures"]] == [1, 2, 1] and len(shown) == 3
    assert thinking["thought"].startswith("<think>picture 2") and thinking["said"] == "2"


def test_failures_of_every_type_come_first_and_the_lowest_scores_before_others(toy, seen_by):
    spatial, _, rows, _ = toy
    items = {item.example.id: item for item in spatial}
    mine = [row for row in rows if row["model"] == "base" and row["id"] in items]
    mine = [row | {"score": number % 9 / 10} for number, row in enumerate(mine)]
    cards = report.report_answers(mine, items, {}, seen_by, {})
    assert [card["verdict"] for card in cards] == sorted((card["verdict"] for card in cards), reverse=True)
    assert len(cards) == len(spatial)  # no sampled answers
    wrong = [card for card in cards if card["verdict"] == "wrong"]
    kinds = {(card["kind"], card["type"]) for card in wrong}
    assert {(card["kind"], card["type"]) for card in wrong[: len(kinds)]} == kinds and len(kinds) == 4
    for kind in kinds:
        scores = [card["score"] for card in wrong if (card["kind"], card["type"]) == kind]
        assert scores == sorted(scores)


def test_pictures_of_a_page_are_stored_once_small_and_within_their_room(seen_by, tmp_path):
    items, rows, shown = {}, [], {}
    files = [picture(tmp_path / f"{n}.png", 500, 400, n, noise=True) for n in range(12)]
    for n in range(60):
        example = Example(f"x:{n}", (files[n % 12],), "single_image", "object size", "How long?", None, "1")
        items[example.id] = Item("vsi", {}, example)
        rows.append(row_of(items[example.id], "m", "think", "2", n / 60))
    cards = report.report_answers(rows, items, {}, seen_by, shown)
    assert len(cards) == 60 and len(shown) == 12
    for address, width, height in shown.values():
        assert (width, height) == (500, 400) and 10_000 < len(address) < 120_000
    one, few = len(next(iter(shown.values()))[0]), {}
    cards = report.report_answers(rows, items, {}, seen_by, few, room=6 * one)
    assert 5 <= len(few) <= 8 and {"right", "wrong"} == {card["verdict"] for card in cards}


def test_an_mp4_is_shown_by_four_frames_without_boxes(seen_by, photo, tmp_path):
    from test_pictures import write_mp4

    write_mp4(tmp_path / "a.mp4", [photo(64, 48, seed=n) for n in range(9)])
    example = Example("vsi:1", (str(tmp_path / "a.mp4"),), "video", "object count", "How many?", None, "2")
    item, shown = Item("vsi", {}, example), {}
    for text in (THOUGHT, "2"):
        card = report.answer_card(row_of(item, "m", "think", text, 1.0), {"vsi:1": item}, {}, seen_by, shown)
        assert card["pictures"] == [(n, []) for n in range(4)] and card["kind"] == "video"
    assert len(shown) == 4


@pytest.fixture(scope="module")
def ladder_page(toy, seen_by):
    """The folder in which write_ladder has written its files, of three models with curves."""
    spatial, locate, rows, root = toy
    training = "".join(json.dumps({"question": i.example.question, "options": i.example.options, "answer": i.example.answer,
                                      "image": [f"scene0001_00/{20 * n}.jpg" for n in range(len(i.example.images))],
                                      "question_type": i.example.question_type, "data_type": i.example.data_type}) + "\n"
                       for i in spatial)  # fmt: skip
    shutil.copytree(root / "data" / "heldout" / "images", root / "data" / "images")
    (root / "data" / common.FILES["spatial"]).write_text(training)
    ladder = {name: root / "runs" / name / "model" for name in MODELS}
    for name in MODELS[1:]:  # the base was not trained
        ladder[name].mkdir(parents=True)
        report.draw_lines(ladder[name].parent / "curves.png", {"loss": {"loss": [(1, 2.0), (2, 1.0)]}})
    settings = evaluation.EvalSettings(data=str(root / "data"), out=str(root / "runs" / "eval"))
    Path(settings.out).mkdir(parents=True)
    evaluation.write_ladder(settings, ladder, spatial, locate, rows, seen_by)
    return Path(settings.out)


def test_the_report_begins_with_the_pictures_and_needs_no_other_file(ladder_page):
    text = (ladder_page / "report.html").read_text(encoding="utf-8")
    headings = [unescape(found) for found in re.findall(r"<h2>(.*?)</h2>", text)]
    assert headings[:4] == ["The ladder", "Training, stage1", "Training, stage3", "The ladder"]
    assert headings[-2:] == ["One question, every rung", "Answers"]
    assert text.count('src="data:image/png;base64,') == 3 and text.index("<img") < text.index("<table>")
    assert not re.search(r"""(?:src|href)=["'](?!data:)|@import|<link|url\(""", text)
    assert not re.search("https?:", text.replace("http://www.w3.org/2000/svg", "")) and 'name="viewport"' in text
    data = page_data(ladder_page / "report.html")
    assert len(data["stories"]) == 5 and {card["model"] for card in data["answers"]} == {"stage3"}
    assert {card["mode"] for card in data["answers"]} == {"locate", "think"}


def in_browser(page, script, tmp_path):
    """The value of an expression at the end of a page that is 1,300 and 420 pixels wide: {width: value}."""
    text = Path(page).read_text(encoding="utf-8")
    probe = f"<script>parent.postMessage(JSON.stringify([innerWidth, {script}]), '*');</script></body>"
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    frames = "".join(f'<iframe src="probe.html" width="{width}" height="900" frameborder="0"></iframe>' for width in (1300, 420))
    collect = "const all = []; onmessage = event => { all.push(event.data); document.title = 'SAYS[' + all + ']'; }"
    (tmp_path / "frames.html").write_text(f"<title></title><script>{collect}</script>{frames}", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    command = [BROWSER, *flags, "--dump-dom", (tmp_path / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return dict(json.loads(unescape(re.search(r"<title>SAYS(.*?)</title>", done.stdout, re.DOTALL)[1])))


@pytest.mark.skipif(not BROWSER, reason="no browser")
def test_a_browser_shows_the_report_without_scrolling_sideways(ladder_page, tmp_path):
    script = """(() => {
        const count = what => document.querySelectorAll(what).length, before = count("#list article");
        const change = (id, value) => { const node = document.getElementById(id); node.value = value; node.onchange(); };
        change("kind", "multi view"); change("verdict", "wrong");
        const cards = [...document.querySelectorAll("#stories article")], card = cards[0].getBoundingClientRect();
        return {page: document.documentElement.scrollWidth, before, kept: count("#list article"), width: card.width,
                stories: count("#stories details"), cards: cards.length, thoughts: count("#stories rect.thought"),
                row: cards.filter(node => node.getBoundingClientRect().top === card.top).length};
    })()"""
    for width, found in in_browser(ladder_page / "report.html", script, tmp_path).items():
        assert found["page"] <= width and found["width"] > 150 and found["row"] == {1300: 3, 420: 2}[width]
        assert (found["before"], found["kept"], found["stories"], found["cards"]) == (13, 3, 5, 15)
        assert found["thoughts"] == 4  # of stage 3's four thoughts, each on one picture


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """The folder of a toy of a few rooms."""
    root = tmp_path_factory.mktemp("gallery")
    settings = stage0_data.DataSettings(preset="toy", data=str(root), extra=True, workers=1)
    stage0_data.build_toy(root, 5, 0, settings, 4, True, dict.fromkeys(common.DATA_TYPES, 0))
    return root


def test_the_gallery_of_the_toy_has_every_type_and_kind(gallery):
    text = (gallery / "gallery.html").read_text(encoding="utf-8")
    rows = common.read_jsonl(gallery / common.FILES["spatial"])
    kinds = [f"{row['question_type']}, {row['data_type'].replace('_', ' ')}" for row in rows]
    assert sorted(re.findall(r"<h2>(.*?)</h2>", text)) == sorted(set(kinds)) and len(set(kinds)) > 4
    assert text.count("<article>") == sum(min(2, kinds.count(kind)) for kind in set(kinds))
    assert text.count('stroke="orange"') > len(set(kinds)) and text.count("<image href=") >= text.count("<article>")
    assert not re.search(r'(?:src|href)="(?!data:)|@import|<link|<script', text) and len(text) < 6_000_000
    assert not any("asked" in row or "thought" in row for row in rows)


@pytest.mark.skipif(not BROWSER, reason="no browser")
def test_a_browser_shows_the_gallery_without_scrolling_sideways(gallery, tmp_path):
    script = """(() => {
        const [words, pictures] = [".words", ".pictures"].map(what => document.querySelector(what).getBoundingClientRect());
        return {page: document.documentElement.scrollWidth, width: words.width, beside: words.left >= pictures.right,
                below: words.top >= pictures.bottom};
    })()"""
    for width, found in in_browser(gallery / "gallery.html", script, tmp_path).items():
        assert found["page"] <= width and found["width"] > 230
        assert (found["beside"], found["below"]) == ((True, False) if width == 1300 else (False, True))
