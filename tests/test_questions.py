"""Every question type re-derived from the room that was made, not from what was read, and the files that hold them."""

import cmath
import itertools
import json
import math
import random
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist

import common
import stage0_data
from support import benchmarks, memory, runs, scannet, toy_world

ROOMS, TOURS = 45, 32
SINGLE = ["relative direction", "relative distance", "absolute distance", "object size"]  # types about one picture of the toy
SEVERAL, VIDEO = [*SINGLE, "object count"], [*SINGLE, "object count", "room size", "appearance order"]
AXES, DIAGONALS = ["left", "right", "front", "back"], ["left-front", "left-back", "right-front", "right-back"]


def name_of(thing):
    return f"{thing['colour']} {thing['shape']}"


def surface(thing):
    """Points (n, 3) all over a solid, much denser than its mesh, from what the solid is."""
    a = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    if thing["shape"] == "cube":
        u, v = (grid.ravel() for grid in np.meshgrid(np.linspace(-0.5, 0.5, 17), np.linspace(-0.5, 0.5, 17)))
        side = np.full_like(u, 0.5)
        box = np.concatenate([np.stack(face, 1) for s in (side, -side) for face in ((s, u, v), (u, s, v), (u, v, s))])
        c, s = math.cos(thing["yaw"]), math.sin(thing["yaw"])
        points = np.stack([c * box[:, 0] - s * box[:, 1], s * box[:, 0] + c * box[:, 1], box[:, 2]], 1)
    else:
        up = np.linspace(-0.5, 0.5, 25)
        radius = np.sqrt(0.25 - up**2) if thing["shape"] == "ball" else (0.5 - up) / 2
        rings = [np.stack([r * np.cos(a), r * np.sin(a), np.full(48, z)], 1) for r, z in zip(radius, up)]
        points = np.concatenate(rings)
    return points * thing["size"] + [thing["x"], thing["y"], thing["size"] / 2]


def smallest_gap(a, b):
    """Smallest distance between two point sets, all pairs compared."""
    return cdist(a, b).min()


def offset_of(a, b, camera):
    """How far a lies to the right of b and beyond it. The picture's x axis is level; what is ahead is at its left hand."""
    x, y = camera[:2, 0]
    step = np.array([a["x"] - b["x"], a["y"] - b["y"]])
    return step @ (x, y), step @ (-y, x)


def verdict_of(right, beyond):
    """(form, word, degrees to the border between the forms) of a direction, by its full angle."""
    angle = math.degrees(math.atan2(beyond, right)) % 360  # 0 right, 90 front, 180 left, 270 back
    sector = round(angle / 90) % 4
    to_axis = abs((angle + 45) % 90 - 45)
    border = abs(to_axis - 22.5)
    if to_axis < 22.5:
        return AXES, ["right", "front", "left", "back"][sector], border
    return DIAGONALS, ["right-front", "left-front", "left-back", "right-back"][int(angle // 90)], border


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """[(made room, camera, view, {type: all rows})], every second photograph of many rooms."""
    root, out = tmp_path_factory.mktemp("rooms"), []
    toy_world.write_labels(root / "labels.tsv")
    labels = scannet.read_labels(root / "labels.tsv")
    for seed in range(ROOMS):
        rng = random.Random(f"questions {seed}")
        made = toy_world.make_room(rng)
        folder = root / f"scene{seed:04d}_00"
        toy_world.write_room(made, folder, rng)
        room = stage0_data.read_scannet(folder, labels)
        for camera, frame in list(zip(made["cameras"], room.frames))[::2]:
            boxes, glimpsed = stage0_data.visible_boxes(room, frame)
            view = stage0_data.View(room, "single_image", [frame], [boxes], [glimpsed], rng, stage0_data.TOY_RULES)
            rows = {kind: list(stage0_data.GENERATORS[kind].generate(view)) for kind in SINGLE}
            out.append((made, camera, view, {kind: [r for r in some if not isinstance(r, str)] for kind, some in rows.items()}))
        shutil.rmtree(folder)
    return out


@pytest.fixture(scope="module")
def tours(tmp_path_factory):
    """{data_type: [(made room, its first camera, view, {type: all rows})]} of rooms with a turning camera."""
    root, out = tmp_path_factory.mktemp("tours"), {"multi_view": [], "video": []}
    toy_world.write_labels(root / "labels.tsv")
    labels = scannet.read_labels(root / "labels.tsv")
    for seed in range(TOURS):
        rng = random.Random(f"tours {seed}")
        made = toy_world.make_tour(rng)
        folder = root / f"scene{seed:04d}_00"
        toy_world.write_room(made, folder, rng)
        *singles, several, video = stage0_data.toy_views(stage0_data.read_scannet(folder, labels), rng)
        made["masks"] = [toy_world.render(made, camera)[2] for camera in made["cameras"]]
        assert [[frame.number for frame in view.frames] for view in singles] == [[0], [60], [120], [180]]
        for view, kinds in ((several, SEVERAL), (video, VIDEO)):
            rows = {kind: list(stage0_data.GENERATORS[kind].generate(view)) for kind in kinds}
            rows = {kind: [row for row in some if not isinstance(row, str)] for kind, some in rows.items()}
            out[view.data_type].append((made, made["cameras"][0], view, rows))
        shutil.rmtree(folder)
    return out


def masks_of(made, data_type):
    """What the pictures of a view show: the number of a solid at every pixel, or 0."""
    return made["masks"][::2] if data_type == "multi_view" else made["masks"]


def rows_of(views, kind):
    """(made room, camera, row, solids named by row["objects"] in order) of one type."""
    for made, camera, _, rows in views:
        for row in rows[kind]:
            # Mesh instance 1 is the floor, so solid k of the room is instance k + 2.
            yield made, camera, row, [made["solids"][thing.number - 2] for thing in row["objects"]]


def answered(row):
    """The words of the option that is the answer."""
    return dict(option.split(". ", 1) for option in row["options"])[row["answer"]]


def test_direction_is_where_a_lies_from_b_as_the_camera_sees_it(views):
    seen = set()
    for _, camera, row, (a, b) in rows_of(views, "relative direction"):
        words, verdict, border = verdict_of(*offset_of(a, b, camera))
        assert answered(row) == verdict
        assert row["options"] == [f"{letter}. {word}" for letter, word in zip("ABCD", words)]
        assert border >= stage0_data.RULES["guard_deg"] - 1e-3
        asked = f"{', '.join(words[:-1])}, or {words[-1]}?"
        assert row["question"] == f"From the camera's perspective, is the {name_of(a)} to the {name_of(b)}'s {asked}"
        seen.add(verdict)
    assert seen == {*AXES, *DIAGONALS}


def test_every_direction_outside_the_guard_band_is_asked_and_no_other(views):
    skipped = 0
    for made, camera, view, rows in views:
        asked = {tuple(thing.number for thing in row["objects"]) for row in rows["relative direction"]}
        names = [name_of(thing) for thing in made["solids"]]
        shown = [k for k, name in enumerate(names) if names.count(name) == 1 and k + 2 in view.boxes[0]]
        for a, b in itertools.permutations(shown, 2):
            border = verdict_of(*offset_of(made["solids"][a], made["solids"][b], camera))[2]
            if abs(border - stage0_data.RULES["guard_deg"]) > 1e-3:  # the mesh holds float32
                assert ((a + 2, b + 2) in asked) == (border > stage0_data.RULES["guard_deg"])
                skipped += border < stage0_data.RULES["guard_deg"]
    assert skipped > 20


def test_relative_distance_is_won_by_the_nearer_one_by_more_than_the_gap(views):
    count = 0
    for _, _, row, (a, b, reference) in rows_of(views, "relative distance"):
        # On the mesh, which the rules are about, and on the true surfaces, which the question is about.
        near, far = sorted(smallest_gap(toy_world.solid_points(thing), toy_world.solid_points(reference)) for thing in (a, b))
        assert near >= stage0_data.RULES["min_nearest_m"] - 1e-5 and far - near > stage0_data.TOY_RULES["gap_m"] - 1e-5
        true = {name_of(thing): smallest_gap(surface(thing), surface(reference)) for thing in (a, b)}
        assert answered(row) == min(true, key=true.get)
        assert [option[3:] for option in row["options"]] == [name_of(a), name_of(b)]
        assert row["question"].endswith(f"({name_of(a)}, {name_of(b)}) is closer to the {name_of(reference)}?")
        count += 1
        if count == 40:  # all pairs of points are slow
            break
    assert count == 40


def test_letters_of_relative_distance_are_balanced(views):
    letters = [row["answer"] for _, _, row, _ in rows_of(views, "relative distance")]
    assert set(letters) == {"A", "B"}
    assert abs(letters.count("A") / len(letters) - 0.5) < 1.5 / math.sqrt(len(letters))  # three standard errors


def test_absolute_distance_is_that_of_the_surfaces(views):
    asked = list(rows_of(views, "absolute distance"))
    assert len(asked) > 100
    for _, _, row, (a, b) in asked[::6]:
        mesh, true = smallest_gap(toy_world.solid_points(a), toy_world.solid_points(b)), smallest_gap(surface(a), surface(b))
        assert mesh >= stage0_data.RULES["min_distance_m"] - 1e-5
        assert abs(float(row["answer"]) - mesh) <= 0.05 + 1e-5 and re.fullmatch(r"\d+\.\d", row["answer"])
        assert abs(float(row["answer"]) - true) <= 0.1
        assert f"between the {name_of(a)} and the {name_of(b)} (in meters)" in row["question"]


def test_size_is_the_longest_side_in_centimetres(views):
    asked = list(rows_of(views, "object size"))
    assert {thing["shape"] for _, _, _, (thing,) in asked} == set(toy_world.SHAPES)
    for _, _, row, (thing,) in asked:
        assert abs(int(row["answer"]) - 100 * thing["size"]) <= 0.5 + 1e-3
        assert f"of the {name_of(thing)}, measured in centimeters?" in row["question"]


def test_objects_asked_about_by_name_have_a_name_of_their_own(views, tours):
    for some, kind in itertools.product((views, *tours.values()), SINGLE):
        for made, _, row, named in rows_of(some, kind):
            names = [name_of(thing) for thing in made["solids"]]
            assert all(names.count(name_of(thing)) == 1 for thing in named)
            assert len({name_of(thing) for thing in named}) == len(named)
            assert all(name_of(thing) in row["question"] for thing in named)


def test_objects_asked_about_are_visible(views):
    for _, _, view, rows in views:
        assert all(thing.number in view.boxes[0] for kind in rows.values() for row in kind for thing in row["objects"])


# Several views, and video


BOTH = pytest.mark.parametrize("data_type", ["multi_view", "video"])
QUADRANTS = {"front-left", "front-right", "back-left", "back-right"}


def standing_word(place, facing, target, words):
    """(where the target is for somebody at a place who faces something, degrees to the border between two answers)."""
    ahead, step = (complex(thing["x"] - place["x"], thing["y"] - place["y"]) for thing in (facing, target))
    turn = math.degrees(cmath.phase(step / ahead))  # (-180, 180], to the left is positive
    side = "left" if turn > 0 else "right"
    if words == QUADRANTS:
        return f"{'front' if abs(turn) < 90 else 'back'}-{side}", 45 - abs(abs(turn) % 90 - 45)
    if words == {"left", "right", "back"}:
        return "back" if abs(turn) > 135 else side, min(abs(turn), abs(abs(turn) - 135))
    assert words == {"left", "right"}
    return side, 90 - abs(abs(turn) - 90)


@BOTH
def test_standing_direction_is_the_turn_from_what_is_faced(tours, data_type):
    seen, forms, asked = set(), {4: "to my front-left, front-right", 3: "to my left, right, or back", 2: "to the left or the"}, 0
    for _, _, row, (place, facing, target) in rows_of(tours[data_type], "relative direction"):
        words = {option[3:] for option in row["options"]}
        word, border = standing_word(place, facing, target, words)
        assert answered(row) == word and border >= stage0_data.RULES["guard_deg"] - 1e-2
        start = f"If I am standing by the {name_of(place)} and facing the {name_of(facing)}, is the {name_of(target)} "
        assert row["question"].startswith(start + forms[len(words)])
        spans = [smallest_gap(toy_world.solid_points(a), toy_world.solid_points(b))
                 for a, b in itertools.combinations((place, facing, target), 2)] if asked % 10 == 0 else []  # fmt: skip
        assert all(0.3 - 1e-4 <= span <= 12 for span in spans)
        seen.add((len(words), word))
        asked += 1
    quadrants = {(4, word) for word in QUADRANTS}
    easier = {(3, "left"), (3, "right"), (2, "left"), (2, "right")}
    seen.discard((3, "back"))  # rare: the solids stand around the camera, hardly ever behind each other
    assert seen == quadrants | (easier if data_type == "video" else set()) and asked > 150


@BOTH
def test_relative_distance_over_pictures_is_won_by_the_nearest(tours, data_type):
    sizes, rows = set(), list(rows_of(tours[data_type], "relative distance"))
    for _, _, row, (*others, reference) in rows[:: len(rows) // 40]:
        spans = sorted(smallest_gap(toy_world.solid_points(thing), toy_world.solid_points(reference)) for thing in others)
        gap = 0.3 - 1e-4  # in large rooms and in the toy
        assert spans[0] >= 0.15 - 1e-4 and all(b - a > gap for a, b in itertools.pairwise(spans))
        true = {name_of(thing): smallest_gap(surface(thing), surface(reference)) for thing in others}
        assert answered(row) == min(true, key=true.get) and [option[3:] for option in row["options"]] == [*true]
        assert row["question"].endswith(f"to the {name_of(reference)}?") and f"({', '.join(true)})" in row["question"]
        sizes.add(len(others))
    assert sizes == ({2, 3} if data_type == "multi_view" else {3})


@BOTH
def test_absolute_distance_and_size_over_pictures(tours, data_type):
    rows = list(rows_of(tours[data_type], "absolute distance"))
    for _, _, row, (a, b) in rows[:: len(rows) // 30]:
        mesh, true = smallest_gap(toy_world.solid_points(a), toy_world.solid_points(b)), smallest_gap(surface(a), surface(b))
        assert abs(float(row["answer"]) - mesh) <= 0.05 + 1e-4 and abs(float(row["answer"]) - true) <= 0.1 and mesh >= 0.2 - 1e-4
        assert row["question"].endswith(f"between the {name_of(a)} and the {name_of(b)} (in meters)?")
    sizes = list(rows_of(tours[data_type], "object size"))
    assert len(sizes) > 60
    for _, _, row, (thing,) in sizes:
        assert abs(int(row["answer"]) - 100 * thing["size"]) <= 0.5 + 1e-3 and f"of the {name_of(thing)}," in row["question"]


@BOTH
def test_count_is_the_number_of_solids_that_the_pictures_show(tours, data_type):
    answers, words = Counter(), {"multi_view": "appear", "video": "are in this room"}[data_type]
    for made, _, row, things in rows_of(tours[data_type], "object count"):
        (label,) = {name_of(thing) for thing in things}
        assert row["question"] == f"How many {label}(s) {words}?"
        same = [number for number, thing in enumerate(made["solids"], 1) if name_of(thing) == label]
        shown = [number for number in same if any((mask == number).any() for mask in masks_of(made, data_type))]
        assert int(row["answer"]) == len(shown) == len(same) == len(things)
        numbers = [next(number for number in same if made["solids"][number - 1] is thing) for thing in things]
        firsts = [next(n for n, mask in enumerate(masks_of(made, data_type)) if (mask == number).sum() > 8) for number in numbers]
        assert firsts == sorted(firsts)
        answers[row["answer"]] += 1
    assert set(answers) == {"2", "3", "4", "5"}


def test_the_room_of_a_video_has_the_size_that_was_drawn(tours):
    sizes = set()
    for made, _, row, _ in rows_of(tours["video"], "room size"):
        x, y = made["half"]
        assert abs(float(row["answer"]) - 4 * x * y) <= 0.05 * (2 * x + 2 * y) + 0.0025 + 0.05  # vertices to 5 cm, answer to 0.1
        sides = [float(side) for side in re.match(r"sides (\S+) by (\S+), floor ", row["thought"]).groups()]
        assert np.abs(np.subtract(sides, sorted((2 * x, 2 * y)))).max() <= 0.05 + 1e-3
        sizes.add(row["answer"])
    assert len(sizes) > 0.9 * TOURS


def test_appearance_order_is_the_order_of_the_frames_that_first_show_them(tours):
    asked = 0
    for made, _, row, _ in rows_of(tours["video"], "appearance order"):
        first = {}  # label -> number of the frame that first shows more than a sliver of it
        for number, thing in enumerate(made["solids"], 1):
            pixels = [(mask == number).sum() for mask in made["masks"]]
            start = next(place for place, count in enumerate(pixels) if count > 0.02 * max(pixels))
            first[name_of(thing)] = min(first.get(name_of(thing), 999), toy_world.TOUR[start])
        for option in row["options"]:
            order = option[3:].split(", ")
            frames = [first[label] for label in order]
            right = all(b - a > 30 for a, b in itertools.pairwise(frames))  # more than a second apart
            assert right == (option[0] == row["answer"]) and len(order) == 4
        assert all(label in row["question"] for label in order)
        asked += 1
    assert asked > 10


def test_most_questions_over_several_views_cannot_be_answered_from_one_of_them(tours):
    together = Counter()
    for kind in ("relative direction", "relative distance", "absolute distance", "object count"):
        for made, _, _, things in rows_of(tours["multi_view"], kind):
            numbers = [index + 1 for index, thing in enumerate(made["solids"]) if any(thing is other for other in things)]
            shown = [all((mask == number).any() for number in numbers) for mask in masks_of(made, "multi_view")]
            together[kind, any(shown)] += 1
    share = {kind: together[kind, False] / (together[kind, False] + together[kind, True]) for kind, _ in together}
    assert share["object count"] == 1 and share["relative direction"] > 0.95
    assert share["relative distance"] > 0.9 and share["absolute distance"] > 0.75


# The files


def build(root, rooms, first, seed, traces, workers, detection, extra=False, made_from=""):
    """build_toy with its settings. Returns the counts."""
    settings = stage0_data.DataSettings(seed=seed, workers=workers, extra=extra)
    everything = dict.fromkeys(common.DATA_TYPES, 0)
    return stage0_data.build_toy(root, rooms, first, settings, traces, detection, everything, made_from)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A folder with training rooms and, in heldout/, rooms that come after them."""
    root = tmp_path_factory.mktemp("split")
    counts = build(root, 24, 0, 3, 40, 2, True)
    build(root / "heldout", 4, 24, 3, 0, 2, False)
    return root, counts


def texts_of(root):
    """{file name: bytes} of the JSONL files of a split."""
    return {path.name: path.read_bytes() for path in sorted(root.glob("*.jsonl"))}


def thoughts_of(root):
    """(spatial row, boxes of its thought, the words after them, the final answer) of worked and cold-start rows."""
    spatial = {row["question_id"]: row for row in common.read_jsonl(root / common.FILES["spatial"])}
    for kind in ("worked", "coldstart"):
        for row in common.read_jsonl(root / common.FILES[kind]):
            question = spatial[row["question_id"]]
            assert row["prompt"].startswith(question["question"]) and row["image"] == question["image"]
            text = row["solution"].replace("<think>", "").replace("</think>", "").strip()
            thought, _, answer = text.partition("<answer>")
            lists = re.findall(r"\[\{.+?\}\]", thought)
            assert len(lists) in (0, 1, len(question["boxes"])) and thought.startswith(lists[:1] and lists[0] or "")
            boxes, words = [box for some in lists for box in json.loads(some)], re.sub(r"\[\{.+?\}\] ?", "", thought)
            yield question, boxes, words.strip(), answer.removesuffix("</answer>")


def test_files_obey_the_schema(split):
    root, counts = split
    for kind in ("locate", "spatial", "coldstart", "worked"):
        examples = common.read_examples(root, kind)
        assert len(examples) == counts[kind] > 0
        sizes = {("single_image", 1), ("multi_view", 4), ("video", 8)}
        assert {(e.data_type, len(e.images)) for e in examples} == sizes
    assert counts["coldstart"] == 40 and counts["worked"] == counts["spatial"]
    rows = common.read_jsonl(root / common.FILES["spatial"])
    fields = {"question_id", "question", "options", "answer", "image", "question_type", "data_type", "boxes"}
    assert all(set(row) == fields and isinstance(row["answer"], str) for row in rows)
    assert counts["by_type"] == Counter(row["question_type"] for row in rows)
    kinds = {"single_image": SINGLE, "multi_view": SEVERAL, "video": VIDEO}
    assert counts["by_kind"] == Counter(f"{row['data_type']}: {row['question_type']}" for row in rows)
    assert set(counts["by_kind"]) == {f"{data_type}: {kind}" for data_type, some in kinds.items() for kind in some}
    spread = Counter(f"{row['data_type']}: {row['question_type']}" for row in common.read_jsonl(root / common.FILES["coldstart"]))
    least = min(spread[kind] for kind, count in counts["by_kind"].items() if spread[kind] < count)
    assert set(spread) == set(counts["by_kind"]) and max(spread.values()) <= least + 1  # as even as the rows allow
    assert len({(row["question_id"], *row["image"], row["data_type"]) for row in rows}) == len(rows)


def test_training_rows_are_shared_evenly_among_types(split, tmp_path):
    targets = {"single_image": 20, "multi_view": 26, "video": 21}
    settings, everything = stage0_data.DataSettings(seed=3, workers=1), split[1]["by_kind"]
    counts = stage0_data.build_toy(tmp_path, 24, 0, settings, 0, False, targets)["by_kind"]
    for data_type, wanted in targets.items():
        some = {kind: count for kind, count in counts.items() if kind.startswith(data_type)}
        assert sum(some.values()) == wanted
        reached = max(some.values())
        assert all(count >= reached - 1 or count == everything[kind] for kind, count in some.items())


def test_localisation_rows_name_their_boxes_and_stay_in_the_picture(split):
    rows = common.read_jsonl(split[0] / "objects.jsonl")
    shown, asked_for = {row["image"][0]: row["objects"] for row in rows if len(row["image"]) == 1}, Counter()
    for row in common.read_jsonl(split[0] / common.FILES["locate"]):
        first = row["image"][:: 2 if row["data_type"] == "video" else 1]  # the first frame of each quarter shows its objects
        whole = [(number, box) for number, image in enumerate(row["image"], 1) if image in first for box in shown.get(image, [])]
        said = [(box.get("picture", 1), {"label": box["label"], "bbox_2d": box["bbox_2d"]}) for box in row["answer"]]
        assert all(("picture" in box) == (len(row["image"]) > 1) for box in row["answer"])
        asked = re.fullmatch(r"Locate (.+)\.", row["question"])[1].replace(" and ", ", ")
        asked_for[row["data_type"], asked.split()[0]] += 1
        if asked == "all objects":
            assert sorted(map(str, said)) == sorted(map(str, whole)) and [n for n, _ in said] == sorted(n for n, _ in said)
        elif asked.startswith("every "):
            wanted = [(n, box) for n, box in whole if f"every {box['label']}" == asked]
            assert len(said) > 1 and sorted(map(str, said)) == sorted(map(str, wanted))
            assert [n for n, _ in said] == [n for n, _ in wanted]
        else:
            assert asked == ", ".join(f"the {box['label']}" for box in row["answer"])
        for number, box in said:
            x1, y1, x2, y2 = box["bbox_2d"]
            assert (number, box) in whole and all(isinstance(x, int) for x in box["bbox_2d"])
            assert 0 <= x1 < x2 <= toy_world.SIDE and 0 <= y1 < y2 <= toy_world.SIDE
    several = {(data_type, word) for data_type in ("multi_view", "video") for word in ("the", "every", "all")}
    assert set(asked_for) == several | {("single_image", "the"), ("single_image", "all")}


def test_a_thought_never_contradicts_its_answer(split):
    kinds = set()
    for row, _, words, answer in thoughts_of(split[0]):
        assert answer == row["answer"]
        if row["question_type"] == "appearance order":
            pictures, checked = {box["label"]: box["picture"] for box in row["boxes"]}, words.split("; ")
            for option, text in itertools.zip_longest(row["options"][: len(checked)], checked):
                labels = option[3:].split(", ")
                numbers = [pictures[label] for label in labels]
                falls = [place for place in range(1, 4) if numbers[place] < numbers[place - 1]]  # by hand
                said = [f"{label} {number}" for label, number in zip(labels, numbers)][: falls[0] + 1 if falls else 4]
                assert text == f"{option[:3]}{', '.join(said)}: {'no' if falls else 'yes'}"
            assert words.endswith(": yes") and checked[-1][0] == answer
        elif row["question_type"] == "relative distance":
            assert words.endswith(f": {answer}")
        elif row["options"]:
            assert words.endswith(answered(row)) and not words.endswith(f"-{answered(row)}")
        else:
            assert re.findall(r"[\d.]+", words)[-1] == answer
        kinds.add(row["question_type"])
    assert kinds == set(VIDEO)


def made_of(name, seed=3):
    """The room of a name as it was made: every second is a larger one with a turning camera."""
    return (toy_world.make_room if int(name[5:9]) % 2 else toy_world.make_tour)(random.Random(f"{seed} {name}"))


@pytest.fixture(scope="module")
def made(split):
    """{room of the split: the room as it was made, with its masks}"""
    rooms = {path.name: made_of(path.name) for path in (split[0] / "images").iterdir()}
    for room in rooms.values():
        room["masks"] = [toy_world.render(room, camera)[2] for camera in room["cameras"]]
    return rooms


def pictures_of(row, made):
    """(made room, the places of a row's pictures among its frames)."""
    name = row["image"][0].split("/")[0]
    numbers = list(made[name]["numbers"])
    return made[name], [numbers.index(int(image.split("/")[1].removesuffix(".jpg"))) for image in row["image"]]


def test_the_boxes_of_a_thought_are_those_of_the_objects_in_the_question(split):
    every = {f"{colour} {shape}" for colour in toy_world.COLOURS for shape in toy_world.SHAPES}
    for row, boxes, _, answer in thoughts_of(split[0]):
        assert row["boxes"] == boxes and all(("picture" in box) == (len(row["image"]) > 1) for box in boxes)
        labels, text = [box["label"] for box in boxes], " ".join([row["question"], *(row["options"] or [])])
        if row["question_type"] == "object count":
            assert len(boxes) == int(answer) and set(labels) == {label for label in every if label in text}
            assert len({(box["picture"], *box["bbox_2d"]) for box in row["boxes"]}) == len(boxes)
        elif row["question_type"] == "appearance order":
            assert f": {', '.join(labels)}?" in row["question"]
        elif row["question_type"] in SINGLE:
            assert sorted(labels) == sorted(label for label in every if label in text)
        else:
            assert not boxes


def test_a_box_is_that_of_the_mask_in_the_first_picture_that_shows_it(split, made):
    pictures, checked = Counter(), 0
    for row in common.read_jsonl(split[0] / common.FILES["spatial"]):
        room, places = pictures_of(row, made)
        masks = [room["masks"][place] for place in places]
        for box in row["boxes"]:
            box = {"picture": 1} | box
            pictures[row["data_type"], box["picture"]] += 1
            found = []
            for number in (n for n, thing in enumerate(room["solids"], 1) if name_of(thing) == box["label"]):
                rows, columns = np.nonzero(masks[box["picture"] - 1] == number)
                if not len(rows):
                    continue
                bounds = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                cut = bounds[0] == 0 or bounds[1] == 0 or max(bounds) == toy_world.SIDE  # vertices are some pixels apart
                if np.abs(np.subtract(bounds, box["bbox_2d"])).max() <= (5 if cut else 2):
                    found.append(max(((mask == number).sum() for mask in masks[: box["picture"] - 1]), default=0))
            assert len(found) == 1 and found[0] <= 8  # before, at most a sliver of it
            checked += 1
    assert {picture for data_type, picture in pictures if data_type == "multi_view"} == {1, 2, 3, 4} and checked > 150
    assert {picture for data_type, picture in pictures if data_type == "video"} >= {1, 3, 5, 7}


def close(said, truth, step):
    """Whether the numbers of a thought (x, y), in steps of `step` metres, are the true metres, rounded to a step."""
    return np.abs(np.subtract(np.multiply(said, step), truth)).max() <= step / 2 + 1e-3


def test_places_steps_and_turn_of_a_thought_are_those_of_the_room(split, made):
    done, number = Counter(), r"(-?\d+(?:\.\d)?),(-?\d+(?:\.\d)?)"
    for row, _, words, _ in thoughts_of(split[0]):
        room, places = pictures_of(row, made)
        kind, camera, several = row["question_type"], room["cameras"][places[0]], len(places) > 1
        step = 1.0 if several else 0.5
        named = []  # a name may be unique in the picture, but not in the room
        for box in row["boxes"]:
            numbers = np.unique(room["masks"][places[box.get("picture", 1) - 1]])
            shown = [room["solids"][number - 1] for number in numbers if number]
            named.append(next(thing for thing in shown if name_of(thing) == box["label"]))  # of counts the first, which is enough
        placed = kind in ("relative distance", "absolute distance") or kind == "relative direction" and several
        stands = {}  # label -> its place as the thought has it
        pattern = (rf"picture (\d): {number}; " if several else "") + rf"([a-z]+ [a-z]+) {number}; ?"
        for thing, box in zip(named, row["boxes"]) if placed else []:
            found = re.match(pattern, words)
            words, (*own_place, label, x, y) = words[found.end() :], found.groups()
            if several:
                picture, own_x, own_y = own_place
                own = room["cameras"][places[box["picture"] - 1]]
                assert int(picture) == box["picture"]
                assert close((float(own_x), float(own_y)), offset_of(thing, dict(zip("xy", own[:2, 3])), own), step)
            stands[label] = np.array([float(x), float(y)])
            assert close(stands[name_of(thing)], offset_of(thing, dict(zip("xy", camera[:2, 3])), camera), step)
        if kind not in SINGLE[:3]:
            continue
        *others, last = named
        if "turn" in words:
            last, *others = named
        offsets = re.findall(r"(left|right) ([\d.]+), (front|back) ([\d.]+)", words)
        pairs = re.findall(rf"([a-z]+ [a-z]+) {number} from ([a-z]+ [a-z]+) {number}: ", words)
        assert len(offsets) == len(others) and len(pairs) == (len(others) if placed else 0)
        for thing, (side, right, along, ahead) in zip(others, offsets):
            said = np.array([float(right) * (1 if side == "right" else -1), float(ahead) * (1 if along == "front" else -1)])
            if not placed:
                assert close(said / 0.1, offset_of(thing, last, camera), 0.1)
                continue
            label, x, y, origin, from_x, from_y = pairs.pop(0)
            assert (label, origin) == (name_of(thing), name_of(last))
            start, end = np.array([float(from_x), float(from_y)]), np.array([float(x), float(y)])
            assert (stands[label] == end).all() and (stands[origin] == start).all() and np.allclose(end - start, said)
        if "turn" in words:
            *turn, eighths, side, verdict = re.search(r"from (\d) to (\d) turn (\d) to the (left|right): (.+)", words).groups()
            ways = [int(way) for way in re.findall(r" at (\d)", words)]
            left = int(eighths) * (1 if side == "left" else -1)
            assert ways == [int(way) for way in turn] and (ways[1] - ways[0]) % 8 == left % 8
            for way, thing in zip(ways, others):
                step = complex(*(stands[name_of(thing)] - stands[name_of(last)]))  # right + ahead i
                assert abs((45 * way - math.degrees(cmath.phase(step / 1j)) + 180) % 360 - 180) <= 22.5 + 1e-6
            assert verdict == answered(row) and (verdict.endswith(side) or verdict == "back")
        done[row["data_type"], kind] += 1
    assert min(done[data_type, kind] for data_type in common.DATA_TYPES for kind in SINGLE[:3]) > 0


def test_the_base_learns_from_pictures_and_pairs_that_show_something(split, made):
    rows = common.read_jsonl(split[0] / "objects.jsonl")
    found = {tuple(row["image"]): {thing["label"] for thing in row["objects"]} for row in rows}
    wanted = {}
    for name, room in made.items():
        step = 2 if room["numbers"] == toy_world.TOUR else 1
        for group in [[place] for place in range(0, 8, step)] + [[place, place + 1] for place in range(0, 8, 2)] * (step - 1):
            labels = {name_of(thing) for number, thing in enumerate(room["solids"], 1)
                      if any((room["masks"][place] == number).sum() > 8 for place in group)}  # fmt: skip
            if labels:
                wanted[tuple(f"{name}/{room['numbers'][place]}.jpg" for place in group)] = labels
    assert set(found) == set(wanted) and len(found) == len(rows) and {len(images) for images in found} == {1, 2}
    assert sum(found[images] == wanted[images] for images in found) >= 0.95 * len(found)  # a solid may be nearly hidden


def test_the_steps_of_a_thought_agree_with_the_verdict(split):
    directions = distances = 0
    for row, _, words, _ in thoughts_of(split[0]):
        if row["question_type"] == "relative direction" and row["data_type"] == "single_image":
            # Every direction word said on the way is one that the offset has; a diagonal is made of two of them.
            steps = words.removesuffix(answered(row))
            said = set(re.findall(r"left|right|front|back", steps))
            assert set(answered(row).split("-")) <= said and len(said) <= 2
            assert not {"left", "right"} <= said and not {"front", "back"} <= said
            directions += 1
        elif row["question_type"] == "relative distance":
            spans = {letter: float(span) for letter, span in re.findall(r"([A-D]) apart (\d+\.\d)", words)}
            assert row["answer"] == min(spans, key=spans.get) and len(set(spans.values())) == len(row["options"])
            distances += 1
    assert directions > 10 and distances > 5


def test_the_offsets_of_a_thought_are_those_of_its_objects(views):
    count = 0
    for _, camera, row, (a, b) in rows_of(views, "relative direction"):
        right, beyond = offset_of(a, b, camera)
        for pattern, value in ((r"(left|right) (\d+\.\d)", right), (r"(front|back) (\d+\.\d)", beyond)):
            found = re.search(pattern, row["thought"])
            if found:  # the words are free to leave the metres out, not to get them wrong
                sign = 1 if found[1] in ("right", "front") else -1
                assert abs(sign * float(found[2]) - value) <= 0.05 + 1e-5
                count += 1
    assert count > 0


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(split, tmp_path):
    build(tmp_path / "one", 24, 0, 3, 40, 1, True)
    assert texts_of(tmp_path / "one") == texts_of(split[0])
    assert len(texts_of(split[0])) == 5


def test_another_seed_gives_other_rooms(split, tmp_path):
    build(tmp_path / "other", 24, 0, 4, 40, 2, True)
    other, same = texts_of(tmp_path / "other"), texts_of(split[0])
    assert set(other) == set(same) and all(other[name] != same[name] for name in same)


def test_training_and_heldout_share_no_room(split):
    root = split[0]
    parts = root, root / "heldout"
    scenes = [{row["image"][0].split("/")[0] for row in common.read_jsonl(part / "objects.jsonl")} for part in parts]
    assert len(scenes[0]) == 24 and len(scenes[1]) == 4 and not scenes[0] & scenes[1]
    pictures = [{path.read_bytes() for path in (part / "images").rglob("*.jpg")} for part in parts]
    assert not pictures[0] & pictures[1]


# Second pictures: --extra


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of toy data with the extra types."""
    root = tmp_path_factory.mktemp("pairs")
    build(root, 5, 0, 9, 20, 1, True, extra=True)
    return root


EXTRA = ["relative distance with depth", "absolute distance with depth", "object size with depth", "object in a crop"]


def test_rows_with_a_second_picture_go_through_all_stages(pairs, backbone, tmp_path):
    examples = {kind: common.read_examples(pairs, kind) for kind in ("locate", "spatial", "coldstart", "worked")}
    two = [example for example in examples["spatial"] if len(example.images) == 2]
    assert {example.question_type for example in two} == set(EXTRA) and {example.data_type for example in two} == {"multi_view"}
    assert {len(example.images) for example in examples["locate"]} == {1, 4, 8}
    assert any(len(example.images) == 2 for example in examples["worked"]) and len(examples["worked"]) == len(examples["spatial"])

    scenes = common.load_scenes(pairs, ["spatial", "worked"], backbone)
    scenes = [scene for scene in scenes if len(scene.images) == 2][:12]
    assert {example.question_type for scene in scenes for example in scene.examples} >= {"object in a crop", "worked"}
    packs = common.make_packs(backbone.tokenizer, scenes, 8, 0)
    prefixes = common.encode_scenes(backbone, [pack.scene for pack in packs])
    for pack, prefix in zip(packs, prefixes):
        grids = common.scene_patches(backbone, pack.scene)[1]
        assert len(grids) == 2 and len(prefix.features) == int(grids.prod(-1).sum()) // 4
        assert len(prefix.ids) <= memory.scene_length(backbone, pack.scene)  # what the memory forecast assumes
    logps, _, mask = common.branch_logprobs(backbone, prefixes, [pack.pairs for pack in packs])
    assert torch.isfinite(logps).all() and mask.any(1).all()
    ((_, texts),) = runs.answer_batches(backbone, scenes, "think", 3)
    assert [len(some) for some in texts] == [len(scene.examples) for scene in scenes]
    scores, legal = common.score_answers([f"<answer>{example.answer}</answer>" for example in two], two)
    assert scores.tolist() == [1.0] * len(two) and legal.all()
    items = benchmarks.read_stage0(pairs, "", tmp_path)
    assert [item.example.images for item in items] == [example.images for example in examples["spatial"]]


def test_second_pictures_show_what_their_question_says(pairs):
    made, seen = {}, set()
    for row in common.read_jsonl(pairs / common.FILES["spatial"]):
        if row["question_type"] not in EXTRA:
            continue
        name, second = row["image"][0].split("/")[0], row["image"][1]
        if name not in made:
            made[name] = made_of(name, 9)
        number, kind, *numbers = second.split("/")[1].rsplit(".", 1)[0].split("_")
        _, depth, instance = toy_world.render(made[name], made[name]["cameras"][list(made[name]["numbers"]).index(int(number))])
        pixels = np.asarray(Image.open(pairs / "images" / second)).astype(int)
        if kind == "depth":
            assert numbers == ["10"] and row["question"].startswith(
                "The second picture shows depth: dark blue is 0 m, yellow is 10 m or more, black is unknown. "
            )
            share = (depth.clip(0, 10) / 10)[..., None]
            dark, middle, bright = (np.array(colour) for colour in ((20, 20, 110), (30, 150, 140), (250, 230, 30)))
            wanted = np.where(share < 0.5, dark + 2 * share * (middle - dark), middle + (2 * share - 1) * (bright - middle))
            assert np.abs(pixels - wanted).max() <= 1
        else:
            x1, y1, x2, y2 = map(int, numbers)
            first = np.asarray(Image.open(pairs / "images" / row["image"][0])).astype(int)[y1:y2, x1:x2]
            assert np.array_equal(first, pixels) and min(x2 - x1, y2 - y1) >= 8
            shown = {name_of(made[name]["solids"][k - 1]) for k in np.unique(instance[y1:y2, x1:x2]) if k}
            wrong = {option[3:] for option in row["options"]} - {answered(row)}
            assert answered(row) in shown and wrong and not wrong & shown
        seen.add(row["question_type"])
    assert seen == set(EXTRA)


def test_extra_types_leave_the_other_rows_as_they_are(pairs, tmp_path):
    build(tmp_path, 5, 0, 9, 20, 1, True)
    plain, extra = (common.read_jsonl(root / common.FILES["locate"]) for root in (tmp_path, pairs))
    assert len(plain) == len(extra)
    plain, extra = (common.read_jsonl(root / common.FILES["spatial"]) for root in (tmp_path, pairs))
    assert len(plain) == sum(row["question_type"] not in EXTRA for row in extra) > 0


# Resuming


def test_toy_rooms_are_made_again_only_if_what_they_are_made_from_changed(tmp_path):
    build(tmp_path, 2, 0, 3, 2, 1, True, made_from="code 1")
    part = tmp_path / "parts" / "scene0001_00.json"
    content = json.loads(part.read_text())
    content["result"]["spatial"] = []
    part.write_text(json.dumps(content))
    scan = tmp_path / "scans" / "scene0001_00"
    shutil.copy(scan / "color" / "0.jpg", scan / "color" / "160.jpg")  # as older code with more cameras would have left it
    for kind in ("depth", "pose"):
        shutil.copy(next((scan / kind).glob("0.*")), scan / kind / f"160{next((scan / kind).glob('0.*')).suffix}")

    def rooms():
        return {row["image"][0].split("/")[0] for row in common.read_jsonl(tmp_path / common.FILES["spatial"])}

    build(tmp_path, 2, 0, 3, 2, 1, True, made_from="code 1")
    assert rooms() == {"scene0000_00"}
    build(tmp_path, 2, 0, 3, 2, 1, True, made_from="code 2")
    assert rooms() == {"scene0000_00", "scene0001_00"}
    pictures = {name for row in common.read_jsonl(tmp_path / "objects.jsonl") for name in row["image"]}
    assert sum(name.startswith("scene0000_00") for name in pictures) == 8 and not (scan / "color" / "160.jpg").exists()
