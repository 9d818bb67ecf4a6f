"""Every question type re-derived from the room that was made, not from what was read, and the files that hold them."""

import itertools
import json
import math
import random
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
import stage0_data
from support import benchmarks, memory, runs, scannet, toy_world

ROOMS = 60
TOY_TYPES = ["relative direction", "relative distance", "absolute distance", "object size", "object count"]
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
    return min(math.sqrt(((b - point) ** 2).sum(-1).min()) for point in a)


def offset_of(a, b, camera):
    """How far a lies to the right of b and beyond it. The camera looks over the middle of the room from its place."""
    gaze = -camera[:2, 3] / np.linalg.norm(camera[:2, 3])
    step = np.array([a["x"] - b["x"], a["y"] - b["y"]])
    return gaze[1] * step[0] - gaze[0] * step[1], float(gaze @ step)


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
            rows = {kind: list(stage0_data.GENERATORS[kind].generate(view)) for kind in TOY_TYPES}
            out.append((made, camera, view, {kind: [r for r in some if not isinstance(r, str)] for kind, some in rows.items()}))
        shutil.rmtree(folder)
    return out


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


def test_count_is_the_number_of_instances_that_the_picture_shows(views):
    answers = set()
    for made, camera, _, rows in views:
        instance = toy_world.render(made, camera)[2] if rows["object count"] else None
        for row in rows["object count"]:
            label = re.fullmatch(r"How many (.+)\(s\) appear\?", row["question"])[1]
            same = [k for k, thing in enumerate(made["solids"], 1) if name_of(thing) == label]
            shown = [k for k in same if (instance == k).any()]
            assert int(row["answer"]) == len(shown) >= stage0_data.RULES["min_count"]
            assert sorted(thing.number - 1 for thing in row["objects"]) == shown
            answers.add(row["answer"])
    assert {"2", "3"} <= answers


def test_objects_asked_about_by_name_have_a_name_of_their_own(views):
    for kind in set(TOY_TYPES) - {"object count"}:
        for made, _, row, named in rows_of(views, kind):
            names = [name_of(thing) for thing in made["solids"]]
            assert all(names.count(name_of(thing)) == 1 for thing in named)
            assert len({name_of(thing) for thing in named}) == len(named)
            assert all(name_of(thing) in row["question"] for thing in named)


def test_objects_asked_about_are_visible(views):
    for _, _, view, rows in views:
        assert all(thing.number in view.boxes[0] for kind in rows.values() for row in kind for thing in row["objects"])


# The files


def build(root, rooms, first, seed, traces, workers, detection, extra=False, made_from=""):
    """build_toy with its settings. Returns the counts."""
    settings = stage0_data.DataSettings(seed=seed, workers=workers, extra=extra)
    return stage0_data.build_toy(root, rooms, first, settings, traces, detection, made_from)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A folder with training rooms and, in heldout/, rooms that come after them."""
    root = tmp_path_factory.mktemp("split")
    counts = build(root, 10, 0, 3, 40, 2, True)
    build(root / "heldout", 4, 10, 3, 0, 2, False)
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
            boxes, end = json.JSONDecoder().raw_decode(thought)
            yield question, boxes, thought[end:].strip(), answer.removesuffix("</answer>")


def test_files_obey_the_schema(split):
    root, counts = split
    for kind in ("locate", "spatial", "coldstart", "worked"):
        examples = common.read_examples(root, kind)
        assert len(examples) == counts[kind] > 0
        assert all(e.data_type == "single_image" and len(e.images) == 1 for e in examples)
    assert counts["coldstart"] == 40 and counts["worked"] == counts["spatial"]
    spatial = common.read_examples(root, "spatial")
    assert counts["by_type"] == {kind: sum(e.question_type == kind for e in spatial) for kind in TOY_TYPES}
    rows = common.read_jsonl(root / common.FILES["spatial"])
    fields = {"question_id", "question", "options", "answer", "image", "question_type", "data_type"}
    assert all(set(row) == fields and isinstance(row["answer"], str) for row in rows)
    assert len({(row["question_id"], *row["image"], row["data_type"]) for row in rows}) == len(rows)


def test_localisation_rows_name_their_boxes_and_stay_in_the_picture(split):
    shown = {row["image"][0]: row["objects"] for row in common.read_jsonl(split[0] / "objects.jsonl")}
    for row in common.read_jsonl(split[0] / common.FILES["locate"]):
        asked = re.fullmatch(r"Locate (.+)\.", row["question"])[1].replace(" and ", ", ")
        if asked == "all objects":
            assert sorted(map(str, row["answer"])) == sorted(map(str, shown[row["image"][0]]))
        else:
            assert asked == ", ".join(f"the {box['label']}" for box in row["answer"])
        for box in row["answer"]:
            x1, y1, x2, y2 = box["bbox_2d"]
            assert box in shown[row["image"][0]] and all(isinstance(x, int) for x in box["bbox_2d"])
            assert 0 <= x1 < x2 <= toy_world.SIDE and 0 <= y1 < y2 <= toy_world.SIDE


def test_a_thought_never_contradicts_its_answer(split):
    kinds = set()
    for row, _, words, answer in thoughts_of(split[0]):
        assert answer == row["answer"]
        if row["options"]:
            assert words.endswith(answered(row)) and not words.endswith(f"-{answered(row)}")
        else:
            assert re.findall(r"[\d.]+", words)[-1] == answer
        kinds.add(row["question_type"])
    assert kinds == set(TOY_TYPES)


def test_the_boxes_of_a_thought_are_those_of_the_objects_in_the_question(split):
    shown = {row["image"][0]: row["objects"] for row in common.read_jsonl(split[0] / "objects.jsonl")}
    for row, boxes, _, answer in thoughts_of(split[0]):
        there = [(box["label"], box["bbox_2d"]) for box in shown[row["image"][0]]]
        assert all((box["label"], box["bbox_2d"]) in there for box in boxes)
        labels = [box["label"] for box in boxes]
        text = " ".join([row["question"], *(row["options"] or [])])
        if row["question_type"] == "object count":
            assert len(boxes) == int(answer) and set(labels) == {label for label, _ in there if label in text}
            assert len({tuple(box["bbox_2d"]) for box in boxes}) == len(boxes)
        else:
            assert sorted(labels) == sorted(label for label, _ in there if label in text)


def test_the_steps_of_a_thought_agree_with_the_verdict(split):
    directions = distances = 0
    for row, _, words, _ in thoughts_of(split[0]):
        if row["question_type"] == "relative direction":
            # Every direction word said on the way is one that the offset has; a diagonal is made of two of them.
            steps = words.removesuffix(answered(row))
            said = set(re.findall(r"left|right|front|back", steps))
            assert set(answered(row).split("-")) <= said and len(said) <= 2
            assert not {"left", "right"} <= said and not {"front", "back"} <= said
            directions += 1
        elif row["question_type"] == "relative distance":
            first, second = (float(re.findall(r"\d+\.\d+", part)[-1]) for part in words.split(";"))
            assert answered(row) == row["options"][int(second < first)][3:] and first != second
            distances += 1
    assert directions > 20 and distances > 5


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
    build(tmp_path / "one", 10, 0, 3, 40, 1, True)
    assert texts_of(tmp_path / "one") == texts_of(split[0])
    assert len(texts_of(split[0])) == 5


def test_another_seed_gives_other_rooms(split, tmp_path):
    build(tmp_path / "other", 10, 0, 4, 40, 2, True)
    other, same = texts_of(tmp_path / "other"), texts_of(split[0])
    assert set(other) == set(same) and all(other[name] != same[name] for name in same)


def test_training_and_heldout_share_no_room(split):
    root = split[0]
    parts = root, root / "heldout"
    scenes = [{row["image"][0].split("/")[0] for row in common.read_jsonl(part / "objects.jsonl")} for part in parts]
    assert len(scenes[0]) == 10 and len(scenes[1]) == 4 and not scenes[0] & scenes[1]
    pictures = [{path.read_bytes() for path in (part / "images").rglob("*.jpg")} for part in parts]
    assert not pictures[0] & pictures[1]


# Second pictures: --extra


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of toy data with the extra types."""
    root = tmp_path_factory.mktemp("pairs")
    build(root, 3, 0, 9, 20, 1, True, extra=True)
    return root


EXTRA = ["relative distance with depth", "absolute distance with depth", "object size with depth", "object in a crop"]


def test_rows_with_a_second_picture_go_through_all_stages(pairs, backbone, tmp_path):
    examples = {kind: common.read_examples(pairs, kind) for kind in ("locate", "spatial", "coldstart", "worked")}
    two = [example for example in examples["spatial"] if len(example.images) == 2]
    assert {example.question_type for example in two} == set(EXTRA) and {example.data_type for example in two} == {"multi_view"}
    assert all(len(example.images) == 1 for example in examples["locate"])
    assert any(len(example.images) == 2 for example in examples["worked"]) and len(examples["worked"]) == len(examples["spatial"])

    scenes = common.load_scenes(pairs, ["spatial", "worked"], backbone.processor)
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
            made[name] = toy_world.make_room(random.Random(f"9 {name}"))
        number, kind, *numbers = second.split("/")[1].rsplit(".", 1)[0].split("_")
        _, depth, instance = toy_world.render(made[name], made[name]["cameras"][int(number) // 20])
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
    build(tmp_path, 3, 0, 9, 20, 1, True)
    plain, extra = (common.read_jsonl(root / common.FILES["locate"]) for root in (tmp_path, pairs))
    assert len(plain) == len(extra)
    plain, extra = (common.read_jsonl(root / common.FILES["spatial"]) for root in (tmp_path, pairs))
    assert len(plain) == sum(len(row["image"]) == 1 for row in extra) > 0


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
    assert len(common.read_jsonl(tmp_path / "objects.jsonl")) == 16 and not (scan / "color" / "160.jpg").exists()
