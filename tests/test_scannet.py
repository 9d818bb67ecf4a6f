"""Stage 0 for real scenes: rooms that are known to the last vertex, every question re-derived from what they are."""

import cmath
import html
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scannet_fixture import (
    NO_ROW,
    Camera,
    alignment,
    bedroom,
    cast,
    rectangle,
    shrink,
    study,
    without_lines,
    write_scene,
    write_table,
)
from scipy.spatial.distance import cdist

import common
import stage0_data
from support import jobs, report, scannet

META = Path(__file__).resolve().parents[2] / "shared" / "data" / "scannet_meta_info_val.json"
FOUR = ["relative direction", "relative distance", "absolute distance", "object size"]
TYPES = {  # kind of picture -> question types, without --extra
    "single_image": FOUR,
    "multi_view": [*FOUR, "object count"],
    "video": [*FOUR, "object count", "room size", "appearance order"],
}
AXES, DIAGONALS = ["left", "right", "front", "back"], ["left-front", "left-back", "right-front", "right-back"]
EIGHT = ["front", "front-left", "left", "back-left", "back", "back-right", "right", "front-right"]
CLOSEST = "Measuring from the closest point of each object, "
DEPTH = r"The second picture shows depth: dark blue is 0 m, yellow is 5 m or more, black is unknown\. "
ASKED = {  # type -> pattern of its question
    "relative direction": r"From the camera's perspective, is the (.+) to the (.+)'s (left.+)\?$",
    "standing": r"If I am standing by the (.+) and facing the (.+), is the (.+?) to (my|the) (?:front-)?left",
    "relative distance": CLOSEST + r"which of these (?:two )?objects \((.+)\) is (closer|the closest) to the (.+)\?$",
    "absolute distance": CLOSEST + r"what is the distance between the (.+) and the (.+) \(in meters\)\?$",
    "object size": r"What is the length of the longest dimension \(length, width, or height\) of the (.+), "
                   r"measured in centimeters\?$",
    "object count": r"How many (.+)\(s\) (are in this room|appear)\?$",
    "room size": r"(What is the size of this room \(in square meters\)\?)",
    "appearance order": r"What will be the first-time appearance order of the following categories in the video: (.+)\?$",
    "perspective taking": r"Imagine you are standing at the (.+) and looking towards the (.+)\. Where is the (.+)\?$",
    "relative distance with depth": DEPTH + CLOSEST + r"which of these two objects \((.+)\) is (closer) to the (.+)\?$",
    "absolute distance with depth": DEPTH + CLOSEST + r"what is the distance between the (.+) and the (.+) \(in meters\)\?$",
    "object size with depth": DEPTH + r"What is the length of the longest dimension \(length, width, or height\) of the (.+), "
                              r"measured in centimeters\?$",
    "object in a crop": r"(The second picture is a part of the first\. Which of these objects is in it\?)$",
    "view change": r"From picture (\d+) to picture (\d+), did the camera mainly (move|turn) (.+)\?$",
}  # fmt: skip


# -- the truth, and how it is asked ----------------------------------------------------------------


class Truth:
    """What can be known of a made scene without stage 0: what its pictures show, and how far its boxes are apart."""

    def __init__(self, made):
        self.made, self.sights, self.gaps = made, {}, {}
        self.labels = [box.label for box in made.boxes]
        self.camera = {camera.number: camera for camera in made.frames}

    def sight(self, number):
        """({index of a visible box: bounds as numbers with a fraction}, indices of all of which there is a bit)."""
        if number not in self.sights:
            self.sights[number] = self.see(self.camera[number])
        return self.sights[number]

    def see(self, camera):
        made, inverse = self.made, np.linalg.inv(camera.matrix())
        (w, h), depth = made.size, made.depth[camera.number]
        boxes, bits = {}, set()
        for index, box in enumerate(made.boxes):
            local = inverse @ np.column_stack([box.points, np.ones(len(box.points))]).T
            local = local[:3, local[2] > 0]
            x, y = (made.color @ local)[:2] / local[2]
            dx, dy = np.floor((made.depth_camera @ local)[:2] / local[2] + 0.5).astype(int)
            inside = (np.floor(x + 0.5) >= 0) & (np.floor(x + 0.5) < w) & (np.floor(y + 0.5) >= 0) & (np.floor(y + 0.5) < h)
            x, y, z, there = x[inside], y[inside], local[2][inside], depth[dy[inside], dx[inside]]
            free = (there > 0) & (z - there <= 0.1)
            if not free.any():
                continue
            bits.add(index)
            bounds = [x[free].min() + 0.5, y[free].min() + 0.5, x[free].max() + 0.5, y[free].max() + 0.5]
            x1, y1, x2, y2 = (round(min(max(value, 0), limit)) for value, limit in zip(bounds, (w, h, w, h)))
            if free.mean() >= 0.25 and (x2 - x1) * (y2 - y1) >= 400 / (1296 * 968) * w * h:
                boxes[index] = bounds
        return boxes, bits

    def shown(self, numbers):
        return {index for number in numbers for index in self.sight(number)[0]}

    def named(self, numbers):
        """{label: index} of what can be asked about by name in these pictures."""
        around = self.sight(numbers[0])[1] if len(numbers) == 1 else range(len(self.labels))
        labels = [self.labels[index] for index in around]
        return {
            self.labels[index]: index
            for index in self.shown(numbers)
            if labels.count(self.labels[index]) == 1 and not any(other.endswith(" " + self.labels[index]) for other in labels)
        }

    def gap(self, a, b):
        """Smallest distance between two boxes: all pairs of their vertices."""
        key = min(a, b), max(a, b)
        if key not in self.gaps:
            self.gaps[key] = min(
                cdist(self.made.boxes[a].points[i : i + 500], self.made.boxes[b].points).min()
                for i in range(0, len(self.made.boxes[a].points), 500)
            )
        return self.gaps[key]

    def spot(self, index):
        return complex(*self.made.boxes[index].centre[:2])

    def offset(self, a, b, camera):
        """How far a lies to the right of b (real) and beyond it (imaginary)."""
        return (self.spot(a) - self.spot(b)) * cmath.exp(1j * (math.pi / 2 - camera.yaw))

    def turn(self, place, facing, asked):
        """Degrees counter-clockwise, [0, 360), from facing to asked; for the middle and for the eight corners."""
        forward = self.spot(facing) - self.spot(place)
        ends = [self.spot(asked), *(complex(*corner[:2]) for corner in self.made.boxes[asked].corners())]
        first, *others = [math.degrees(cmath.phase((end - self.spot(place)) / forward)) % 360 for end in ends]
        return first, others


def direction_of(offset):
    """(options, word, degrees to the border between axes and diagonals) of an offset (right + i ahead)."""
    angle = math.degrees(cmath.phase(offset)) % 360  # 0 right, 90 front
    to_axis = min(angle % 90, 90 - angle % 90)
    if to_axis < 22.5:
        return AXES, ["right", "front", "left", "back"][round(angle / 90) % 4], 22.5 - to_axis
    return DIAGONALS, ["right-front", "left-front", "left-back", "right-back"][int(angle // 90)], to_axis - 22.5


def away(angle, borders):
    """Degrees from an angle to the nearest of the borders."""
    return min(abs(math.remainder(angle - border, 360)) for border in borders)


def quadrant(angle):
    return ["front-left", "back-left", "back-right", "front-right"][int(angle // 90)]


def third(angle):
    return "left" if angle < 135 else "back" if angle < 225 else "right"


STANDING = {  # level -> borders, word of an angle
    "hard": ([0, 90, 180, 270], quadrant),
    "medium": ([0, 135, 225], third),
    "easy": ([0, 180], lambda angle: "left" if angle < 180 else "right"),
}


def standing_verdict(truth, level, place, facing, asked):
    """The word for one who stands at place and faces another, or None where a guard holds."""
    gaps = [truth.gap(place, facing), truth.gap(place, asked), truth.gap(facing, asked)]
    borders, word = STANDING[level]
    angle, others = truth.turn(place, facing, asked)
    if min(gaps) < 0.3 or max(gaps) > 5 or away(angle, borders) < 10:
        return None
    return word(angle) if sum(word(other) != word(angle) for other in others) <= 2 else None


def perspective_verdict(truth, place, facing, asked):
    gaps = [truth.gap(place, facing), truth.gap(place, asked), truth.gap(facing, asked)]
    angle = truth.turn(place, facing, asked)[0]
    if min(gaps) < 0.3 or max(gaps) > 5 or away(angle, [22.5 + 45 * i for i in range(8)]) < 10:
        return None
    return EIGHT[int((angle + 22.5) // 45) % 8]


def nearest(truth, reference, others, limit=0.15):
    """The nearest of `others`, or None where a guard holds."""
    spans = sorted((truth.gap(reference, other), other) for other in others)
    close = any(b[0] - a[0] <= limit for a, b in itertools.pairwise(spans))
    return None if spans[0][0] < 0.15 or close else spans[0][1]


def level_of(question):
    return "hard" if "quadrants" in question else "medium" if "at least 135 degrees" in question else "easy"


def in_any_order(row):
    """Whether a question's options have no fixed order."""
    stands = row["question_type"] == "relative direction" and row["data_type"] != "single_image"
    return stands or row["question_type"] in (
        "relative distance", "appearance order", "perspective taking", "relative distance with depth", "object in a crop"
    )  # fmt: skip


def of_one_frame(row):
    """Whether a row is about one frame, shown alone or with a picture made from it."""
    return row["data_type"] == "single_image" or len(row["image"]) == 2


def words_of(row):
    return [option.split(". ", 1)[1] for option in row["options"]]


def chosen(row):
    """The words of the right option; the answer itself where there are none."""
    return words_of(row)["ABCDEFGH".index(row["answer"])] if row["options"] else row["answer"]


def asked_of(row):
    """The names in a question."""
    kind = row["question_type"]
    kind = "standing" if kind == "relative direction" and row["data_type"] != "single_image" else kind
    return re.match(ASKED[kind], row["question"]).groups()


def numbers_of(row):
    return tuple(int(Path(name).stem) for name in row["image"] if "_" not in Path(name).stem)


def all_rows(room, seed="rows"):
    """Every row that the generators yield about a room, and what they refuse: no limit to groups and rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stage0_data.RULES, "tries", 10**6)
        patch.setitem(stage0_data.RULES, "per_room_type", 10**6)
        rows, passed, rejected = stage0_data.room_rows(room, SimpleNamespace(extra=True), random.Random(seed))
    assert passed == Counter(f"{row['data_type']}: {row['question_type']}" for row in rows)
    return rows, rejected


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A ScanNet folder: two whole scenes, a short one, a broken one, a validation scene."""
    root = tmp_path_factory.mktemp("scannet")
    write_table(root)
    made = [bedroom(root), study(root), study(root, "scene0033_00", 9, nasty=False)]
    for name in ("scene0099_00", "scene0568_00"):
        folder = copy_scene(root / "scans" / "scene0033_00", root / "scans" / name)
    (root / "scans" / "scene0099_00" / "scene0099_00.aggregation.json").unlink()
    assert folder.name == "scene0568_00"
    return SimpleNamespace(path=root, made={one.name: one for one in made})


def copy_scene(source, target):
    """A scene under another name; its files bear the name, too."""
    shutil.copytree(source, target)
    for path in target.glob(f"{source.name}*"):
        path.rename(target / path.name.replace(source.name, target.name))
    return target


@pytest.fixture(scope="module")
def small(root, tmp_path_factory):
    """A ScanNet folder with the two scenes of small pictures."""
    path = tmp_path_factory.mktemp("small")
    write_table(path)
    for name in ("scene0012_01", "scene0033_00"):
        shutil.copytree(root.path / "scans" / name, path / "scans" / name)
    return path


@pytest.fixture(scope="module")
def labels(root):
    return scannet.read_labels(root.path / "scannetv2-labels.combined.tsv")


@pytest.fixture(scope="module")
def scenes(root, labels):
    """[(truth, room as read, all rows, rejected)] of the two whole scenes."""
    out = []
    for name in ("scene0007_00", "scene0012_01"):
        room = stage0_data.read_scannet(root.path / "scans" / name, labels)
        out.append(SimpleNamespace(truth=Truth(root.made[name]), room=room))
        out[-1].rows, out[-1].rejected = all_rows(room)
    return out


def rows_of(scenes, kind, *data_types):
    """(truth, row, numbers of its pictures, {label: index} of what can be named), and that there are any."""
    found = [(s.truth, row) for s in scenes for row in s.rows if row["question_type"] == kind and row["data_type"] in data_types]
    assert found
    for truth, row in found:
        yield truth, row, numbers_of(row), truth.named(numbers_of(row))


def views_of(scenes, kind, data_type):
    """(truth, numbers of the pictures, named, rows of this type) for every view, also where it has no rows."""
    for scene in scenes:
        rows = [row for row in scene.rows if row["question_type"] == kind and row["data_type"] == data_type]
        for numbers in expected_views(list(scene.truth.camera))[data_type]:
            yield scene.truth, numbers, scene.truth.named(numbers), [row for row in rows if numbers_of(row) == numbers]


def expected_views(numbers):
    """{kind: [numbers of its pictures]}: each alone, 8 of up to 32 every 4, and 16 for the video."""

    def evenly(count):
        return [numbers[math.floor(i * (len(numbers) - 1) / (count - 1) + 0.5)] for i in range(count)]

    some = evenly(min(32, len(numbers)))
    return {
        "single_image": [(number,) for number in numbers],
        "multi_view": [tuple(some[i : i + 8]) for i in range(0, len(some) - 7, 4)] if len(numbers) >= 8 else [],
        "video": [tuple(evenly(16))] if len(numbers) >= 16 else [],
    }


# -- reading ---------------------------------------------------------------------------------------


def test_reader_gives_the_scene_that_was_made(scenes):
    for truth, room in ((s.truth, s.room) for s in scenes):
        assert [(o.number, o.label) for o in room.objects] == [(box.number, box.label) for box in truth.made.boxes]
        assert room.counts == Counter(truth.labels)
        assert room.skipped == {"label not in the table": 1, "frame without a finite pose": 2, "frame without depth": 1}
        assert [frame.number for frame in room.frames] == [camera.number for camera in truth.made.frames]
        assert [int(frame.color.stem) for frame in room.frames] == [int(frame.depth.stem) for frame in room.frames]
        np.testing.assert_allclose(room.color_intrinsics, truth.made.color, atol=1e-8)
        np.testing.assert_allclose(room.depth_intrinsics, truth.made.depth_camera, atol=1e-8)
        for frame, camera in zip(room.frames, truth.made.frames):
            np.testing.assert_allclose(frame.pose, camera.matrix(), atol=1e-6)


def test_objects_are_in_the_aligned_world(scenes):
    for thing, box in ((o, b) for s in scenes for o, b in zip(s.room.objects, s.truth.made.boxes)):
        np.testing.assert_allclose(thing.points, box.points, atol=1e-9)
        np.testing.assert_allclose(thing.centre, box.centre, atol=1e-5)
        np.testing.assert_allclose(sorted(thing.sides), sorted(box.sides), atol=1e-5)
        np.testing.assert_allclose(thing.axes @ thing.axes.T, np.eye(3), atol=1e-12)
        assert cdist(stage0_data.corners(thing), box.corners()).min(1).max() < 1e-5


def test_structure_is_dropped(labels, scenes):
    assert labels["wall"] == 1 and "wall" in labels and NO_ROW not in labels
    assert not any(o.label in ("wall", "floor", NO_ROW) for s in scenes for o in s.room.objects)


NEEDED = ["{}_vh_clean_2.ply", "{}_vh_clean_2.0.010000.segs.json", "{}.aggregation.json", "color", "depth", "pose",
          "intrinsic/intrinsic_color.txt", "intrinsic/intrinsic_depth.txt"]  # fmt: skip


@pytest.fixture
def short(root, tmp_path):
    """A copy of the short scene to break."""
    return copy_scene(root.path / "scans" / "scene0033_00", tmp_path / "scene0033_00")


@pytest.mark.parametrize("name", NEEDED)
def test_missing_file_is_named(short, labels, name):
    path = short / name.format(short.name)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(SystemExit, match=re.escape(str(path))):
        stage0_data.read_scannet(short, labels)


def test_missing_info_file_means_no_alignment(short, labels):
    (short / f"{short.name}.txt").unlink()
    np.testing.assert_allclose(stage0_data.read_scannet(short, labels).objects[0].centre, (1.1, 3.8, 0.4), atol=1e-5)


def test_sens_file_is_refused_with_the_way_to_export(short, labels):
    for kind in ("color", "depth", "pose", "intrinsic"):
        shutil.rmtree(short / kind)
    (short / f"{short.name}.sens").write_bytes(b"x")
    with pytest.raises(SystemExit) as error:
        stage0_data.read_scannet(short, labels)
    for word in (f"{short.name}.sens", "--export_color_images", "--export_depth_images", "--export_poses", "--export_intrinsics"):
        assert word in str(error.value)


def test_segments_of_another_mesh_are_refused(short, labels):
    path = short / f"{short.name}_vh_clean_2.0.010000.segs.json"
    some = json.loads(path.read_text())["segIndices"]
    path.write_text(json.dumps({"segIndices": some[:-1]}))
    with pytest.raises(SystemExit, match=rf"{len(some) - 1} .* {len(some)}"):
        stage0_data.read_scannet(short, labels)


def test_missing_label_table_is_named(tmp_path):
    with pytest.raises(SystemExit, match="scannetv2-labels"):
        scannet.read_labels(tmp_path / "scannetv2-labels.combined.tsv")


def test_files_in_a_folder_that_are_no_frames_are_passed_over(short, labels):
    (short / "color" / "thumbnail.jpg").write_bytes(b"")
    assert len(stage0_data.read_scannet(short, labels).frames) == 9


def doubled(groups):
    """All objects listed twice, as in scene0217_00."""
    groups += json.loads(json.dumps(groups))


def test_objects_that_are_listed_twice_count_once(short, labels):
    before = stage0_data.read_scannet(short, labels)
    edit_groups(short, doubled)
    groups = json.loads((short / f"{short.name}.aggregation.json").read_text())["segGroups"]
    groups[1]["segments"] *= 2
    (short / f"{short.name}.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    room = stage0_data.read_scannet(short, labels)
    assert room.counts == before.counts and room.counts["stool"] == 2
    now, then = ([(o.number, o.label, len(o.points)) for o in some.objects] for some in (room, before))
    assert now == then
    assert room.skipped == {"object listed twice": len(before.objects)}


def edit_groups(folder, change):
    """Apply a function to the list of groups in the aggregation file; groups[1:] are furniture."""
    path = folder / f"{folder.name}.aggregation.json"
    content = json.loads(path.read_text())
    change(content["segGroups"])
    path.write_text(json.dumps(content))


def edit_matrix(folder, kind, change):
    """Apply a function to an intrinsic matrix (4, 4), in place or returning another."""
    path = folder / "intrinsic" / f"intrinsic_{kind}.txt"
    matrix = np.loadtxt(path)
    changed = change(matrix)
    np.savetxt(path, matrix if changed is None else changed)


def edit_picture(path, change):
    change(Image.open(path)).save(path)


def set_line(folder, key, value):
    without_lines(folder, key)
    with (folder / f"{folder.name}.txt").open("a") as file:
        file.write(f"{key} = {value}\n")


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(path).save(path, exif=exif)


def cropped(folder):
    for path in (folder / "color").iterdir():
        edit_picture(path, lambda image: image.crop((0, 0, 324, 182)))


def scaled_by(folder, x, y, kind="color"):
    edit_matrix(folder, kind, lambda m: np.diag([x, y, 1, 1]) @ m)


COLOR, DEPTH_20 = "color/000020.jpg", "depth/20.png"
FAULTS = {  # name: (function that breaks a scan, words of the message; the first names the file)
    "picture of another size": (lambda f: edit_picture(f / COLOR, lambda i: i.resize((9, 9))), "000020.jpg: .*9, 9.*324, 242"),
    "cropped pictures": (cropped, r"intrinsic_color.txt: .*324 x 242.*another shape, 324 x 182"),
    "cropped, size unknown": (lambda f: (cropped(f), without_lines(f, "color")), "intrinsic_color.txt: the principal point"),
    "depth cropped": (lambda f: [edit_picture(p, lambda i: i.crop((0, 0, 160, 90))) for p in (f / "depth").iterdir()],
                      "intrinsic_depth.txt: .*another shape, 160 x 90"),
    "principal point in a corner": (lambda f: edit_matrix(f, "color", lambda m: m.__setitem__((0, 2), 20)), "principal point"),
    "focal length of <id>.txt": (lambda f: set_line(f, "fx_color", 400), "intrinsic_color.txt: fx is 291.*fx_color.*400"),
    "centre of <id>.txt": (lambda f: set_line(f, "my_depth", 66), "intrinsic_depth.txt: my is .*my_depth .*66"),
    "three numbers": (lambda f: edit_matrix(f, "color", lambda m: m[:1, :3]), "intrinsic_color.txt: this is not a 3x3 or 4x4"),
    "not a number": (lambda f: edit_matrix(f, "depth", lambda m: m * np.nan), "intrinsic_depth.txt: this is not"),
    "transposed": (lambda f: edit_matrix(f, "color", lambda m: m.T.copy()), "intrinsic_color.txt: this is not a camera matrix"),
    "zeros": (lambda f: edit_matrix(f, "color", lambda m: 0 * m), "intrinsic_color.txt: this is not a camera matrix"),
    "text": (lambda f: (f / "intrinsic/intrinsic_color.txt").write_text("f = 3"), "intrinsic_color.txt: could not convert"),
    "RGB depth": (lambda f: edit_picture(f / DEPTH_20, lambda i: Image.new("RGB", i.size)), "20.png: this is no depth .* RGB"),
    "8-bit depth": (lambda f: edit_picture(f / DEPTH_20, lambda i: Image.new("L", i.size)), "20.png: this is no depth .* L,"),
    "no picture": (lambda f: (f / COLOR).write_bytes(b"no"), "000020.jpg: UnidentifiedImageError"),
    "rotated by EXIF": (lambda f: rotated(f / COLOR), "000020.jpg: .*EXIF"),
    "two of a number": (lambda f: shutil.copy(f / COLOR, f / "color" / "20.png"), "20.png and 000020.jpg have the same number"),
    "width": (lambda f: set_line(f, "colorWidth", -1), "scene0033_00.txt: colorWidth = -1 is not positive"),
    "depth shift": (lambda f: set_line(f, "depthShift", "0"), "scene0033_00.txt: depthShift = 0 is not positive"),
    "alignment of 15": (lambda f: set_line(f, "axisAlignment", "1 " * 15), "scene0033_00.txt: axisAlignment = .* 16"),
    "alignment of zeros": (lambda f: set_line(f, "axisAlignment", "0 " * 16), "scene0033_00.txt: axisAlignment is not a rotation"),
    "mesh cut short": (lambda f: (f / "scene0033_00_vh_clean_2.ply").write_bytes(b"ply\n"), "vh_clean_2.ply: "),
    "groups cut short": (lambda f: (f / "scene0033_00.aggregation.json").write_text("{"), "aggregation.json: JSONDecodeError"),
    "negative vertex segment": (
        lambda f: (p := f / "scene0033_00_vh_clean_2.0.010000.segs.json").write_text(p.read_text().replace("[0,", "[-1,", 1)),
        "segs.json: segIndices are not whole numbers from 0"),
    "negative segment": (lambda f: edit_groups(f, lambda g: g[1]["segments"].append(-4)), "json: object 2 .*such as -4"),
    "no segments": (lambda f: edit_groups(f, lambda g: g[1].update(segments=[])), "aggregation.json: object 2 .* no segments"),
    "no vertices": (lambda f: edit_groups(f, lambda g: g[2].update(segments=[7777])), "aggregation.json: object 5 .*such as 7777"),
    "no such field": (lambda f: edit_groups(f, lambda g: g[2].pop("objectId")), "aggregation.json: KeyError..objectId"),
    "negative object": (lambda f: edit_groups(f, lambda g: g[1].update(objectId=-1)), "aggregation.json: object -1 .*whole number"),
    "number of two": (lambda f: edit_groups(f, lambda g: g[2].update(objectId=2)), "aggregation.json: object 2 .* its number"),
    "shared segment": (lambda f: edit_groups(f, lambda g: g[2]["segments"].append(g[1]["segments"][0])),
                       "aggregation.json: object 5 .* shares segments with object 2"),
    "two labels": (lambda f: edit_groups(f, lambda g: g.append(g[1] | {"label": "lamp", "objectId": 99})),
                   "aggregation.json: object 99 .lamp. shares segments with object 2"),
    "poses of zeros": (lambda f: [np.savetxt(p, np.zeros((4, 4))) for p in (f / "pose").iterdir()],
                       "scene0033_00: no frame has .*9 x frame with a pose that scales"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_scan_are_named(short, labels, name):
    """A scan that contradicts itself is left out, with a reason that names the file."""
    change, words = FAULTS[name]
    change(short)
    with pytest.raises(SystemExit, match=words):
        stage0_data.read_scannet(short, labels)


def test_frames_whose_pose_cannot_be_used_are_counted(short, labels):
    mirror = np.loadtxt(short / "pose" / "60.txt") @ np.diag([-1, 1, 1, 1])
    for number, pose in ((0, np.full((4, 4), np.nan)), (20, np.zeros((4, 4))), (40, np.eye(3)), (60, mirror), (80, 2 * np.eye(4))):
        np.savetxt(short / "pose" / f"{number}.txt", pose)
    (short / "pose" / "100.txt").write_text("-1.#IND " * 16)
    room = stage0_data.read_scannet(short, labels)
    assert [frame.number for frame in room.frames] == [120, 140, 160]
    assert room.skipped == {
        "frame without a finite pose": 1, "frame with a pose that scales or mirrors": 3, "frame without a 4x4 pose": 2,
    }  # fmt: skip


def test_other_ways_to_export_the_same_scan(short, labels, tmp_path):
    """PNG pictures, 3x3 intrinsics, padded names, depth in other units: the same boxes."""
    before = stage0_data.read_scannet(short, labels)
    boxes = [stage0_data.visible_boxes(before, frame) for frame in before.frames]
    for path in list((short / "color").iterdir()):
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    for path in list((short / "depth").iterdir()):
        Image.fromarray((np.asarray(Image.open(path)).astype(float) * 5).clip(0, 65535).astype(np.uint16)).save(path)
        path.rename(path.with_stem(path.stem.zfill(5)))
    set_line(short, "depthShift", 5000)
    for kind in ("color", "depth"):
        edit_matrix(short, kind, lambda m: m[:3, :3])
    room = stage0_data.read_scannet(short, labels)
    assert [frame.number for frame in room.frames] == [frame.number for frame in before.frames] and not room.scaled
    assert [stage0_data.visible_boxes(room, frame) for frame in room.frames] == boxes and all(some for some, _ in boxes)
    scannet.write_picture(tmp_path / "images" / "20.jpg", *scannet.frame_files(short))
    with Image.open(tmp_path / "images" / "20.jpg") as image:
        assert image.format == "JPEG" and image.size == (324, 242)


# -- pictures of another size than the intrinsics ---------------------------------------------------


@pytest.fixture
def few(root, tmp_path):
    """The bedroom (640x480) with every eighth frame."""
    folder = copy_scene(root.path / "scans" / "scene0007_00", tmp_path / "scene0007_00")
    for path in [*folder.glob("color/*"), *folder.glob("depth/*"), *folder.glob("pose/*")]:
        if int(path.stem) // 20 % 8 != 3:
            path.unlink()
    return folder


def check_scaled_boxes(root, room, size):
    """The boxes are those of the original pictures, times the ratio of the sizes, to half a pixel."""
    truth, ratio = Truth(root.made["scene0007_00"]), np.tile(np.array(size) / (640, 480), 2)
    compared = 0
    for frame in room.frames:
        boxes = stage0_data.visible_boxes(room, frame)[0]
        for index, bounds in truth.sight(frame.number)[0].items():
            box = boxes[truth.made.boxes[index].number]
            assert np.abs(np.clip(np.array(bounds) * ratio, 0, np.tile(size, 2)) - box).max() < 0.501
            compared += 1
    assert len(room.frames) >= 4 and compared >= 15


@pytest.mark.parametrize("size", [(320, 240), (323, 238), (1296, 968)])
@pytest.mark.parametrize("told", ["by <id>.txt", "by the principal point", "intrinsics scaled, too"])
def test_boxes_follow_the_size_of_the_pictures(root, few, labels, size, told):
    shrink(few, "color", size)
    x, y = size[0] / 640, size[1] / 480
    if told == "by the principal point":
        without_lines(few, "color")
    elif told == "intrinsics scaled, too":
        edit_matrix(few, "color", lambda m: m.__setitem__(slice(3), np.array([[x, 0, x / 2 - 0.5], [0, y, y / 2 - 0.5], [0, 0, 1]])
                                                          @ m[:3]))  # fmt: skip
    room = stage0_data.read_scannet(few, labels)
    check_scaled_boxes(root, room, size)
    how = {"from": [640, 480], "to": list(size), "scale": [pytest.approx(x, abs=1e-4), pytest.approx(y, abs=1e-4)]}
    assert room.scaled == ({} if told == "intrinsics scaled, too" else {"color": how})


def test_depth_follows_the_size_of_its_pictures(root, few, labels):
    """Each vertex falls on the same part of the depth picture as before."""
    before = stage0_data.read_scannet(few, labels)
    shrink(few, "depth", (80, 60))
    room = stage0_data.read_scannet(few, labels)
    assert room.scaled == {"depth": {"from": [160, 120], "to": [80, 60], "scale": [0.5, 0.5]}}
    points = np.concatenate([o.points for o in room.objects])
    for frame in room.frames:
        u, v, z = stage0_data.project(points, frame.pose, room.depth_intrinsics)
        wide, high, _ = stage0_data.project(points, frame.pose, before.depth_intrinsics)
        front = z > 0.1
        np.testing.assert_allclose((u[front] + 0.5) / 80, (wide[front] + 0.5) / 160, atol=1e-9)
        np.testing.assert_allclose((v[front] + 0.5) / 60, (high[front] + 0.5) / 120, atol=1e-9)


def test_manifest_says_what_was_scaled_and_why_a_scene_is_left_out(two, monkeypatch, tmp_path, capsys):
    shrink(two / "scans" / "scene0033_00", "color", (162, 121))
    cropped(two / "scans" / "scene0034_00")
    manifest = make(monkeypatch, two, tmp_path / "out", *SMALL)
    assert manifest["scaled_intrinsics"] == {"scene0033_00": {"color": {"from": [324, 242], "to": [162, 121], "scale": [0.5, 0.5]}}}
    assert list(manifest["failed_rooms"]) == ["scene0034_00"] and "cropped" in manifest["failed_rooms"]["scene0034_00"]
    assert "scaled the intrinsics of 1 rooms such as scene0033_00" in capsys.readouterr().err


# -- what a picture shows --------------------------------------------------------------------------


def test_boxes_are_the_unoccluded_vertices(scenes):
    for truth, room in ((s.truth, s.room) for s in scenes):
        for frame in room.frames:
            boxes, glimpsed = stage0_data.visible_boxes(room, frame)
            wanted, bits = truth.sight(frame.number)
            assert glimpsed == {truth.made.boxes[index].number for index in bits}
            assert set(boxes) == {truth.made.boxes[index].number for index in wanted}
            for index, bounds in wanted.items():
                box = boxes[truth.made.boxes[index].number]
                assert all(type(value) is int for value in box)
                assert 0 <= box[0] < box[2] <= truth.made.size[0] and 0 <= box[1] < box[3] <= truth.made.size[1]
                limits = [0, 0, 0, 0], [*truth.made.size, *truth.made.size]
                assert np.abs(np.clip(bounds, *limits) - box).max() < 0.501


def test_boxes_fit_the_rendered_pixels(scenes):
    """An object that nothing hides: its box is that of the pixels whose rays meet it."""
    whole_ones, cut_ones = 0, 0
    for truth, room, step in ((scenes[0].truth, scenes[0].room, 13), (scenes[1].truth, scenes[1].room, 1)):
        made = truth.made
        for frame in room.frames[::step]:
            camera = truth.camera[frame.number]
            boxes, _ = stage0_data.visible_boxes(room, frame)
            owner = cast(made.boxes, camera, made.color, made.size)[1]
            for index, box in enumerate(made.boxes):
                if box.number not in boxes:
                    continue
                whole = cast([box], camera, made.color, made.size)[1] == 0
                if not np.array_equal(whole, owner == index) or whole[: made.size[1] // 10].any():  # hidden, or in the depth's hole
                    continue
                rows, columns = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
                wanted, slack = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]), 1.01
                if (wanted == [0, 0, *made.size]).any():  # the border cuts it between two of its vertices
                    z = (np.linalg.inv(camera.matrix()) @ np.column_stack([box.points, np.ones(len(box.points))]).T)[2]
                    slack = 0.1 * made.color[1, 1] / max(z.min(), 0.4)
                    cut_ones += 1
                else:
                    whole_ones += 1
                assert np.abs(wanted - boxes[box.number]).max() <= slack
    assert whole_ones >= 10 and cut_ones >= 5


def test_what_is_hidden_is_never_shown(scenes):
    truth, room = scenes[0].truth, scenes[0].room
    hidden = {box.number for box in truth.made.boxes if box.label in truth.made.hidden}
    assert len(hidden) == 2
    for row in scenes[0].rows:
        assert not hidden & set(row["asked"])
    for frame in room.frames:
        boxes, glimpsed = stage0_data.visible_boxes(room, frame)
        assert not hidden & set(boxes) and not hidden & glimpsed


def test_a_picture_without_depth_shows_nothing(short, labels):
    path = next((short / "depth").glob("20.png"))
    Image.fromarray(np.zeros((120, 160), np.uint16)).save(path)
    room = stage0_data.read_scannet(short, labels)
    assert stage0_data.visible_boxes(room, room.frames[1]) == ({}, set())
    assert room.skipped == {"frame with an empty depth picture": 1} and stage0_data.visible_boxes(room, room.frames[0])[0]


def test_views_are_those_of_the_rules(scenes, root, labels):
    for scene in scenes:
        for data_type, wanted in expected_views(list(scene.truth.camera)).items():
            rows = [row for row in scene.rows if row["data_type"] == data_type and len(row["image"]) != 2]
            assert {numbers_of(row) for row in rows} <= set(wanted)
            views = stage0_data.room_views(scene.room, random.Random(0))
            assert [tuple(f.number for f in v.frames) for v in views if v.data_type == data_type] == wanted
    short = stage0_data.read_scannet(root.path / "scans" / "scene0033_00", labels)
    assert Counter(v.data_type for v in stage0_data.room_views(short, random.Random(0))) == {"single_image": 9, "multi_view": 1}
    dense = [stage0_data.Frame(n, f.color, f.depth, f.pose) for n, f in zip(range(0, 70, 10), short.frames)]
    short.frames = dense  # numbered 0, 10, ... 60: every second is asked about alone, and there are too few for the rest
    assert [v.frames[0].number for v in stage0_data.room_views(short, random.Random(0))] == [0, 20, 40, 60]


# -- every question, from the room that was made ---------------------------------------------------


def test_direction_in_a_picture(scenes):
    forms = set()
    for truth, row, (number,), named in rows_of(scenes, "relative direction", "single_image"):
        a, b, listed = asked_of(row)
        options, word, margin = direction_of(truth.offset(named[a], named[b], truth.camera[number]))
        assert words_of(row) == options and chosen(row) == word and margin >= 10
        assert listed == ", ".join(options[:-1]) + ", or " + options[-1]
        forms.add(word)
    assert forms == {*AXES, *DIAGONALS}


def test_no_direction_in_a_picture_is_left_out(scenes):
    for truth, (number,), named, rows in views_of(scenes, "relative direction", "single_image"):
        offsets = {(a, b): truth.offset(named[a], named[b], truth.camera[number]) for a, b in itertools.permutations(named, 2)}
        wanted = {pair for pair, offset in offsets.items() if direction_of(offset)[2] >= 10}
        found = {asked_of(row)[:2] for row in rows}
        assert len(rows) == len(found) and found <= wanted
        assert all(abs(offsets[pair]) < 0.5 for pair in wanted - found)  # whose numbers, rounded, may say something else


def test_direction_for_one_who_stands_in_the_room(scenes):
    seen = Counter()
    for truth, row, _, named in rows_of(scenes, "relative direction", "multi_view", "video"):
        place, facing, asked, _ = asked_of(row)
        level = level_of(row["question"])
        assert level == "hard" or row["data_type"] == "video"
        assert chosen(row) == standing_verdict(truth, level, named[place], named[facing], named[asked])
        words = {"hard": {"front-left", "front-right", "back-left", "back-right"}, "medium": {"left", "right", "back"}}
        assert set(words_of(row)) == words.get(level, {"left", "right"}) and len(set(words_of(row))) == len(words_of(row))
        if level == "easy":
            assert row["question"].endswith(f"to the left or the right of the {facing}?")
        seen[row["data_type"], level] += 1
    assert len(seen) == 4 and min(seen.values()) >= 5


def test_no_direction_for_one_who_stands_is_left_out(scenes):
    for truth, _, named, rows in views_of(scenes, "relative direction", "multi_view"):
        groups = itertools.permutations(named, 3)
        wanted = {group for group in groups if standing_verdict(truth, "hard", *(named[label] for label in group))}
        assert len(rows) == len(wanted) and {asked_of(row)[:3] for row in rows} == wanted
    for truth, _, named, rows in views_of(scenes, "relative direction", "video"):
        found = {asked_of(row)[:3] for row in rows}
        assert len(found) == len(rows)
        for group in itertools.permutations(named, 3):  # which of the three is asked about a group is drawn
            if all(standing_verdict(truth, level, *(named[label] for label in group)) for level in STANDING):
                assert group in found


def test_nearest_object(scenes):
    counts = {}
    for truth, row, numbers, named in rows_of(scenes, "relative distance", "single_image", "multi_view", "video"):
        listed, form, reference = asked_of(row)
        labels = words_of(row)
        assert listed == ", ".join(labels) and len({*labels, reference}) == len(labels) + 1
        assert form == ("closer" if len(labels) == 2 else "the closest")
        best = nearest(truth, named[reference], [named[label] for label in labels])
        assert best is not None and truth.labels[best] == chosen(row)
        counts.setdefault((row["data_type"], numbers), set()).add(len(labels))
    assert all(len(some) == 1 for some in counts.values())
    sizes = {kind: set().union(*(some for key, some in counts.items() if key[0] == kind)) for kind, _ in counts}
    assert sizes["single_image"] == {2} and sizes["video"] == {4}
    assert sizes["multi_view"] <= {2, 3, 4} and len(sizes["multi_view"]) > 1


def test_no_nearest_object_is_left_out(scenes):
    for data_type in ("single_image", "multi_view", "video"):
        for truth, _, named, rows in views_of(scenes, "relative distance", data_type):
            found = [(asked_of(row)[2], frozenset(words_of(row))) for row in rows]
            counts = {len(some) for _, some in found} or {"single_image": {2}, "video": {4}, "multi_view": {2, 3, 4}}[data_type]
            wanted = [
                {
                    (reference, frozenset(some))
                    for reference in named
                    for some in itertools.combinations([label for label in named if label != reference], count)
                    if nearest(truth, named[reference], [named[label] for label in some]) is not None
                }
                for count in counts
            ]
            assert any(set(found) == some and len(found) == len(some) for some in wanted)


def test_large_rooms_need_larger_gaps(scenes, monkeypatch):
    truth, room = scenes[0].truth, scenes[0].room
    monkeypatch.setattr(room, "floor_area", 40.1)
    rows = [row for row in all_rows(room)[0] if row["question_type"] == "relative distance"]
    assert rows and len(rows) < sum(row["question_type"] == "relative distance" for row in scenes[0].rows)
    for row in rows:
        named = truth.named(numbers_of(row))
        assert nearest(truth, named[asked_of(row)[2]], [named[label] for label in words_of(row)], 0.3) is not None


def test_distance_of_two_objects(scenes):
    for truth, row, _, named in rows_of(scenes, "absolute distance", "single_image", "multi_view", "video"):
        a, b = asked_of(row)
        gap = truth.gap(named[a], named[b])
        assert re.fullmatch(r"\d+\.\d", row["answer"]) and row["options"] is None
        assert gap >= 0.2 and abs(float(row["answer"]) - gap) <= 0.05 + 1e-6
    for data_type in ("single_image", "multi_view", "video"):
        for truth, _, named, rows in views_of(scenes, "absolute distance", data_type):
            wanted = {frozenset(pair) for pair in itertools.combinations(named, 2) if truth.gap(*map(named.get, pair)) >= 0.2}
            assert len(rows) == len(wanted) and {frozenset(asked_of(row)) for row in rows} == wanted


def test_size_of_an_object(scenes):
    for truth, row, _, named in rows_of(scenes, "object size", "single_image", "multi_view", "video"):
        assert row["answer"] == str(round(100 * max(truth.made.boxes[named[asked_of(row)[0]]].sides))) and row["options"] is None
    for data_type in ("single_image", "multi_view", "video"):
        for _, _, named, rows in views_of(scenes, "object size", data_type):
            assert sorted(asked_of(row)[0] for row in rows) == sorted(named)


def test_count_of_objects(scenes):
    where = {"multi_view": "appear", "video": "are in this room"}
    for data_type in where:
        rows = 0
        for truth, numbers, _, found in views_of(scenes, "object count", data_type):
            shown, bits = truth.shown(numbers), set().union(*(truth.sight(number)[1] for number in numbers))
            wanted = set()
            for label in set(truth.labels):
                all_of = {index for index, name in enumerate(truth.labels) if name == label}
                near = all_of & bits if data_type == "multi_view" else all_of
                ends = any(name.endswith(" " + label) for name in truth.labels)
                if len(all_of & shown) >= 2 and near <= shown and not ends:
                    wanted.add((label, where[data_type], str(len(near))))
            assert sorted((*asked_of(row), row["answer"]) for row in found) == sorted(wanted)
            rows += len(found)
        assert rows
    assert not any(row["question_type"] == "object count" and row["data_type"] == "single_image" for s in scenes for row in s.rows)


def test_room_size(scenes):
    for scene in scenes:
        (row,) = (row for row in scene.rows if row["question_type"] == "room size")
        assert row["data_type"] == "video" and row["options"] is None and re.fullmatch(r"\d+\.\d", row["answer"])
        assert abs(float(row["answer"]) - scene.truth.made.area) <= 0.02 * scene.truth.made.area


@pytest.mark.parametrize("angle", [0.0, 0.3, 0.7])
def test_floor_area_follows_the_plan(angle):
    plans = [
        ([rectangle(0, 0, 6, 5)], 30.0),
        ([rectangle(0, 0, 7, 3), rectangle(0, 3, 2.5, 6)], 28.5),
        ([rectangle(0, 0, 4, 3), rectangle(6, 0, 9, 3)], 21.0),  # a gap of 2 m between two rooms is no floor
        ([rectangle(0, 0, 9, 3), rectangle(0, 3, 3, 6), rectangle(6, 3, 9, 6), rectangle(0, 6, 9, 9)], 72.0),  # a courtyard
    ]
    for parts, area in plans:
        points = np.concatenate(parts) @ alignment(angle, (0.3, 0.2, 0))[:3, :3].T + [0.313, -0.21, 0]
        assert abs(stage0_data.floor_area(points) - area) <= 0.02 * area


def test_order_of_appearance(scenes):
    found = 0
    for truth, numbers, _, rows in views_of(scenes, "appearance order", "video"):
        first, late = {}, set()
        for label in set(truth.labels):
            mine = {index for index, name in enumerate(truth.labels) if name == label}
            clear = [number for number in numbers if mine & set(truth.sight(number)[0])]
            bits = [number for number in numbers if mine & truth.sight(number)[1]]
            if clear and bits[0] == clear[0]:
                first[label] = clear[0] / 30
            elif clear:
                late.add(label)
        shown = {*first, *late}  # "the chair" may be any chair where an office chair is shown, too
        first = {label: when for label, when in first.items() if not any(other.endswith(f" {label}") for other in shown)}
        wanted = {
            frozenset(four) for four in itertools.combinations(first, 4)
            if min(b - a for a, b in itertools.pairwise(sorted(map(first.get, four)))) > 1
        }  # fmt: skip
        assert len(rows) == len(wanted)
        for row in rows:
            named = asked_of(row)[0].split(", ")
            assert chosen(row) == ", ".join(sorted(named, key=first.get)) and frozenset(named) in wanted
            assert len(set(words_of(row))) == 4 and all(sorted(words.split(", ")) == sorted(named) for words in words_of(row))
        assert len({frozenset(asked_of(row)[0].split(", ")) for row in rows}) == len(rows)
        found += len(rows)
    assert found > 5


def test_change_of_the_view(scenes):
    words = Counter()
    for truth, row, numbers, _ in rows_of(scenes, "view change", "multi_view"):
        i, j, form, _ = asked_of(row)
        before, after = (truth.camera[numbers[int(n) - 1]] for n in (i, j))
        assert int(i) < int(j)
        step = (complex(*after.place[:2]) - complex(*before.place[:2])) * cmath.exp(1j * (math.pi / 2 - before.yaw))
        turned = math.degrees(math.remainder(after.yaw - before.yaw, 2 * math.pi))
        small, large = sorted((abs(step.real), abs(step.imag)))
        if form == "move":
            assert words_of(row) == ["forward", "backward", "left", "right"] and large >= 0.3 and small <= large / 2
            ahead = "forward" if step.imag > 0 else "backward"
            assert chosen(row) == (ahead if abs(step.imag) > abs(step.real) else "right" if step.real > 0 else "left")
        else:
            assert words_of(row) == ["left", "right"] and 15 <= abs(turned) <= 170
            assert chosen(row) == ("left" if turned > 0 else "right")
        words[form, chosen(row)] += 1
    assert len(words) >= 5


def test_perspective_of_another(scenes):
    for truth, row, _, named in rows_of(scenes, "perspective taking", "single_image"):
        place, facing, asked = asked_of(row)
        assert chosen(row) == perspective_verdict(truth, named[place], named[facing], named[asked])
        assert len(set(words_of(row))) == 4 and set(words_of(row)) <= set(EIGHT)
    for truth, _, named, rows in views_of(scenes, "perspective taking", "single_image"):
        wanted = {g for g in itertools.permutations(named, 3) if perspective_verdict(truth, *(named[label] for label in g))}
        assert len(rows) == len(wanted) and {asked_of(row) for row in rows} == wanted


def test_depth_rows_ask_what_their_types_ask_alone(scenes):
    for scene in scenes:
        for kind in ("relative distance", "absolute distance", "object size"):
            alone, deep = [], []
            for row in scene.rows:
                if row["question_type"] == kind and row["data_type"] == "single_image":
                    alone.append((numbers_of(row), frozenset(asked_of(row)[-2:]) - {"closer"}, chosen(row)))
                elif row["question_type"] == f"{kind} with depth":
                    assert row["data_type"] == "multi_view" and row["image"][1] == row["image"][0].replace(".jpg", "_depth_5.png")
                    deep.append((numbers_of(row), frozenset(asked_of(row)[-2:]) - {"closer"}, chosen(row)))
            assert Counter(deep) == Counter(alone) and deep


def test_object_in_a_crop(scenes):
    """The part is the object's box; no wrong option is to be seen in it."""
    count = 0
    for truth, room_rows, number in ((s.truth, s.rows, number) for s in scenes for number in s.truth.camera):
        made, boxes, found = truth.made, truth.sight(number)[0], {}
        rounded = {i: [round(min(max(x, 0), limit)) for x, limit in zip(bounds, 2 * made.size)] for i, bounds in boxes.items()}
        owner = cast(made.boxes, truth.camera[number], made.color, made.size)[1] if number % 80 == 0 else None
        for row in room_rows:
            if row["question_type"] != "object in a crop" or numbers_of(row) != (number,):
                continue
            (index,) = (i for i, box in enumerate(made.boxes) if [box.number] == row["asked"])
            crop = re.fullmatch(rf"{made.name}/{number}_crop_(\d+)_(\d+)_(\d+)_(\d+).png", row["image"][1]).groups()
            x1, y1, x2, y2 = crop = [int(part) for part in crop]
            assert np.abs(np.array(crop) - rounded[index]).max() <= 1 and min(x2 - x1, y2 - y1) >= 40
            assert row["data_type"] == "multi_view" and chosen(row) == truth.labels[index] and index not in found
            wrong = set(words_of(row)) - {chosen(row)}
            assert len(wrong) == len(words_of(row)) - 1 <= 3 and wrong <= set(truth.labels)
            assert not any(label.endswith(f" {chosen(row)}") or chosen(row).endswith(f" {label}") for label in wrong)
            if owner is not None:
                shown = {truth.labels[i] for i in np.unique(owner[y1:y2, x1:x2]) if i >= 0}
                assert chosen(row) in shown and not wrong & shown
            found[index] = row
        for index, (x1, y1, x2, y2) in rounded.items():
            if min(x2 - x1, y2 - y1) > 40 and index not in found:  # then the part may show every label
                near = {truth.labels[i] for i in truth.sight(number)[1]}
                assert all(any(f" {a}".endswith(f" {b}") or f" {b}".endswith(f" {a}") for b in near) for a in truth.labels)
        count += len(found)
    assert count > 50


def test_names_without_doubt_only(scenes):
    for scene in scenes:
        for row in scene.rows:
            if row["question_type"] in ("object count", "appearance order", "object in a crop"):
                continue
            objects = [o.label for o in scene.room.objects if o.number in row["asked"]]
            named = scene.truth.named(numbers_of(row))
            assert set(objects) <= set(named) and len(objects) == len(set(objects))
    # With "office chair" in the room, "chair" names nothing for sure in several pictures, and something where it stands alone.
    study_rows = scenes[1].rows
    assert not any("the chair" in row["question"] for row in study_rows if not of_one_frame(row))
    assert all(any(name in row["question"] for row in study_rows) for name in ("the chair", "the office chair"))


def test_groups_are_all_or_as_many_as_tried(scenes):
    room = scenes[0].room
    views = stage0_data.room_views(room, random.Random(1))
    for view in views[:3] + views[-1:]:
        count = len(view.unique())
        view.rules = stage0_data.RULES | {"tries": 7}
        for ordered, unordered in ((2, 0), (3, 0), (0, 2), (1, 2)):
            groups = view.groups(ordered, unordered)
            keys = {(tuple(group[:ordered]), frozenset(group[ordered:])) for group in groups}
            total = math.perm(count, ordered) * math.comb(max(count - ordered, 0), unordered)
            assert len(keys) == len(groups) == min(7, total)


def test_right_options_stand_everywhere_alike(scenes):
    for scene in scenes:
        places = {}
        for row in scene.rows:
            if in_any_order(row):
                places.setdefault(len(row["options"]), Counter())[row["answer"]] += 1
        assert set(places) >= {2, 3, 4}
        for count, letters in places.items():
            assert max(letters.values()) - min(letters["ABCD"[i]] for i in range(count)) <= 1


def test_refusals_are_counted_by_reason(scenes):
    for scene in scenes:
        pairs = sum(math.perm(len(scene.truth.named((number,))), 2) for number in scene.truth.camera)
        rows = sum(row["question_type"] == "relative direction" and row["data_type"] == "single_image" for row in scene.rows)
        reasons = {name: count for name, count in scene.rejected.items() if name.startswith("single_image: relative direction: ")}
        assert sum(reasons.values()) == pairs - rows and any(name.endswith("near the border of two answers") for name in reasons)


# -- thoughts --------------------------------------------------------------------------------------

PLACE = r"(.+?) \((-?\d+\.\d), (-?\d+\.\d), (-?\d+\.\d)\)(?:, |; )"
SIDE = r"(left|right) (\d+\.\d), (front|back) (\d+\.\d)"


def split_thought(text):
    """([(label, x, y, z)], the rest)"""
    places = []
    while match := re.match(PLACE, text):
        places.append((match[1], *(float(value) for value in match.groups()[1:])))
        text = text[match.end() :]
    return places, text


def nearest_of(words, count):
    """The letter of the nearest of `count` options in a thought, after checking its comparisons: "B apart 2.5, A apart 6.0: B"."""
    spans = {}
    for letter, span in re.findall(r"([A-D]) apart (\d+\.\d)", words):
        assert spans.setdefault(letter, float(span)) == float(span)
    assert list(spans) == list("ABCD"[:count]) and list(spans.values()).count(min(spans.values())) == 1
    compared = re.findall(r"([A-D]) apart \S+, ([A-D]) apart \S+: ([A-D])(?:;|$)", words)
    before = "A"
    for letter, (new, old, nearer) in zip("BCD"[: count - 1], compared, strict=True):
        assert (new, old, nearer) == (letter, before, min(letter, before, key=spans.get))
        before = nearer
    return before


def derived(row, rest):
    """The answer in words, from nothing but the numbers of a thought."""
    kind = row["question_type"].removesuffix(" with depth")
    if kind == "object in a crop":
        return re.match(r"second picture: (.+)$", rest)[1]
    if kind == "relative direction" and row["data_type"] == "single_image":
        side, right, along, ahead = re.match(SIDE, rest).groups()
        offset = complex(float(right) * (1 if side == "right" else -1), float(ahead) * (1 if along == "front" else -1))
        return direction_of(offset)[1]
    if kind in ("relative direction", "perspective taking"):
        degrees, way = re.search(r"(?:^|; |; from \d+ to \d+ )turn (\d+) to the (left|right): ", rest).groups()
        angle = float(degrees) if way == "left" else (360 - float(degrees)) % 360
        if kind == "perspective taking":
            return EIGHT[int((angle + 22.5) // 45) % 8]
        return STANDING[level_of(row["question"])][1](angle)
    if kind == "relative distance":
        return words_of(row)["ABCD".index(nearest_of(rest, len(row["options"])))]
    if kind == "view change":
        if match := re.match(r"turned (\d+) degrees to the (left|right)$", rest):
            return match[2]
        right, ahead = (float(value) for value in re.match(r"right (-?\d+\.\d), ahead (-?\d+\.\d): ", rest).groups())
        return ("right" if right > 0 else "left") if abs(right) > abs(ahead) else "forward" if ahead > 0 else "backward"
    if kind == "appearance order":
        options = [option[3:].split(", ") for option in re.sub(": (no|yes)", "", rest).split("; ")]
        *wrong, right = [[part.rsplit(" ", 1) for part in parts] for parts in options]
        assert rest.count(": no") == len(wrong) and rest.endswith(": yes") and rest.split("; ")[-1][0] == row["answer"]
        order = {label: int(picture) for label, picture in right}
        assert len(order) == 4 and sorted(order.values()) == list(order.values())
        for *rising, early in wrong:  # the last word of a wrong option stands behind one of a later picture
            assert int(early[1]) == order[early[0]] < order[rising[-1][0]] and all(order[label] == int(n) for label, n in rising)
        return ", ".join(order)
    return re.search(r"(?:apart|size|count|floor) (\d+\.?\d*)$", rest)[1]


def test_thoughts_lead_to_the_answers(scenes):
    kinds = set()
    for row in (row for s in scenes for row in s.rows):
        places, rest = split_thought(row["thought"])
        assert derived(row, rest) == chosen(row), row
        if row["options"] and row["question_type"] not in ("appearance order",) and not rest.startswith("turned"):
            of_letters = row["question_type"].startswith("relative distance")
            assert rest.endswith(f": {row['answer'] if of_letters else chosen(row)}"), row
        kinds.add(row["question_type"])
    assert kinds == set(stage0_data.GENERATORS)


def test_thoughts_say_where_things_are(scenes):
    with_offsets = Counter()
    for scene in scenes:
        truth = scene.truth
        for row in scene.rows:
            places, rest = split_thought(row["thought"])
            objects = {box.number: box for box in truth.made.boxes}
            assert [label for label, *_ in places] == [objects[number].label for number in ordered_asked(scene, row, places)]
            for (_, *spot), number in zip(places, ordered_asked(scene, row, places)):
                want, camera = np.array(objects[number].centre), truth.camera[numbers_of(row)[0]]  # of the first picture
                step = complex(*(want - camera.place)[:2]) * cmath.exp(1j * (math.pi / 2 - camera.yaw))
                want = np.array([step.real, step.imag, want[2] - camera.place[2]])
                assert np.abs(want - spot).max() <= 0.05 + 1e-6
            if sides := re.findall(SIDE, rest):
                camera, named = truth.camera[numbers_of(row)[0]], truth.named(numbers_of(row))
                *others, last = [label for label, *_ in places]
                if "turn" in rest:  # from where somebody stands
                    last, *others = [label for label, *_ in places]
                assert len(sides) == len(others)
                spots = {label: np.array(spot[:2]) for label, *spot in places}
                for label, (side, right, along, ahead) in zip(others, sides):
                    offset = truth.offset(named[label], named[last], camera)
                    said = np.array([float(right) * (1 if side == "right" else -1), float(ahead) * (1 if along == "front" else -1)])
                    if named_steps := re.findall(rf"{re.escape(label)} (\S+) from {re.escape(last)} (\S+): ", rest):
                        ends = [[float(x) for x in spot.split(",")] for spot in named_steps[0]]
                        assert np.allclose(ends, [spots[label], spots[last]]) and np.allclose(said, spots[label] - spots[last])
                    rounding = 0.1 if named_steps else 0.05  # of two places, or of the step
                    assert np.abs(said - [offset.real, offset.imag]).max() <= rounding + 1e-3
                    with_offsets[row["data_type"], row["question_type"]] += 1
    for data_type in ("multi_view", "video"):
        assert min(with_offsets[data_type, kind] for kind in ("relative direction", "relative distance", "absolute distance")) > 5


def ordered_asked(scene, row, places):
    """Numbers of the asked objects in the order of a thought: that of `asked`."""
    assert len(row["asked"]) == len(places)
    return row["asked"]


def test_thoughts_about_small_offsets_lead_to_the_answers(tmp_path, labels):
    """Things that stand on each other: their middles are so near that one decimal may say something else."""
    furniture = [("table", (3.0, 2.5, 0.37), (1.4, 0.9, 0.74), 0)]
    names = ["monitor", "backpack", "stool", "plant", "vent", "lamp"]
    for i, (dx, dy) in enumerate([(0.245, 0.052), (-0.052, 0.245), (-0.245, -0.052), (0.052, -0.247), (0.04, 0.055), (-0.2, 0.2)]):
        furniture.append((names[i], (3 + dx, 2.5 + dy, 0.85), (0.08, 0.08, 0.21), 0))
    cameras = [Camera(20 * i, (3 - 1.8 * math.cos(a), 2.5 - 1.8 * math.sin(a), 1.5), a, 0.4)
               for i, a in enumerate(np.arange(8) * math.pi / 4)]  # fmt: skip
    made = write_scene(tmp_path, "scene0001_00", furniture, cameras, rectangle(0, 0, 6, 5), 30.0, nasty=False)
    room = stage0_data.read_scannet(tmp_path / "scans" / made.name, labels)
    rows = [row for row in all_rows(room)[0] if row["question_type"] == "relative direction"]
    assert len(rows) > 20
    wrong = [row["thought"] for row in rows if derived(row, split_thought(row["thought"])[1]) != chosen(row)]
    assert not wrong


# -- whole runs ------------------------------------------------------------------------------------

FILES = ("spld_spatial_data.jsonl", "spld_grounding_data.jsonl", "spld_coldstart_data.jsonl")
FIELDS = {"question_id", "question", "options", "answer", "image", "question_type", "data_type"}


def make(monkeypatch, root, out, *argv):
    """Run stage 0 in this process. Returns its manifest."""
    command = ["stage0_data.py", "--source", "scannet", "--scannet", str(root), "--out", str(out), *map(str, argv)]
    monkeypatch.setattr(sys, "argv", command)
    stage0_data.main()
    return json.loads((Path(out) / "manifest.json").read_text())


def rows_in(out, kind="spatial"):
    return common.read_jsonl(Path(out) / common.FILES[kind])


def bytes_of(out):
    return {name: (Path(out) / name).read_bytes() for name in (*FILES, "gallery.html")}


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    """A whole run in a process of its own, from another folder."""
    cwd = tmp_path_factory.mktemp("cwd")
    command = [sys.executable, str(Path(stage0_data.__file__).resolve()), "--source", "scannet", "--scannet", str(root.path)]
    finished = subprocess.run([*command, "--out", "mine", "--workers", "1"], cwd=cwd, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "scene0568_00" in finished.stdout + finished.stderr and "scene0099_00" in finished.stdout + finished.stderr
    return cwd / "mine"


def test_files_are_as_the_stages_read_them(done):
    for kind in ("locate", "spatial", "coldstart"):
        examples = common.read_examples(done, kind)
        assert len(examples) == len(rows_in(done, kind)) > 10
        assert {example.data_type for example in examples} == ({"single_image"} if kind == "locate" else {*common.DATA_TYPES})
    for row in rows_in(done):
        assert set(row) - {"boxes"} == FIELDS and ("boxes" in row) == (row["data_type"] == "single_image")
        assert type(row["question_id"]) is int and type(row["answer"]) is str
        assert len(row["image"]) == {"single_image": 1, "multi_view": 8, "video": 16}[row["data_type"]]
        assert row["question_type"] in TYPES[row["data_type"]]
        assert numbers_of(row) == tuple(sorted(set(numbers_of(row))))
        assert all(re.fullmatch(r"scene\d{4}_\d\d/(0|[1-9]\d*)\.jpg", name) for name in row["image"])
        if row["options"]:
            assert [option[:3] for option in row["options"]] == [f"{letter}. " for letter in "ABCD"[: len(row["options"])]]
    ids = Counter((row["question_id"], tuple(row["image"]), row["data_type"]) for row in rows_in(done))
    assert set(ids.values()) == {1}


def test_pictures_are_the_scenes_own(done, root):
    names = {name for row in rows_in(done) for name in row["image"]}
    assert names == {f"{path.parent.name}/{path.name}" for path in (done / "images").glob("*/*")}
    for name in names:
        scene, stem = name.split("/")[0], int(Path(name).stem)
        color = root.path / "scans" / scene / "color"
        source = next(path for path in (color / f"{stem}.jpg", color / f"{stem:06d}.jpg") if path.is_file())
        assert (done / "images" / name).read_bytes() == source.read_bytes()


def test_localisation_mirrors_the_single_images(done, root):
    single = {row["question_id"]: row for row in rows_in(done) if row["data_type"] == "single_image"}
    rows = rows_in(done, "locate")
    assert sorted(row["question_id"] for row in rows) == sorted(single)
    truths = {name: Truth(made) for name, made in root.made.items()}
    for row in rows:
        assert set(row) == {"question_id", "question", "answer", "image", "data_type"}
        assert {name: row[name] for name in ("question", "image", "data_type")} == {
            name: single[row["question_id"]][name] for name in ("question", "image", "data_type")
        }
        assert row["answer"] == single[row["question_id"]]["boxes"]
        truth, numbers = truths[row["image"][0].split("/")[0]], numbers_of(row)
        named, boxes = truth.named(numbers), truth.sight(numbers[0])[0]
        for box in row["answer"]:
            assert set(box) == {"bbox_2d", "label"} and box["label"] in row["question"]
            limits = [0, 0, 0, 0], [*truth.made.size, *truth.made.size]
            assert np.abs(np.clip(boxes[named[box["label"]]], *limits) - box["bbox_2d"]).max() < 0.501
        names = [box["label"] for box in row["answer"]]
        asked = asked_of(single[row["question_id"]])
        listed = {*asked[0].split(", "), *asked[1:]} if "which of these" in row["question"] else set(asked)
        assert set(names) <= listed and len(names) == len(set(names)) >= 1
        assert len(names) == {"object size": 1, "relative distance": 3}.get(single[row["question_id"]]["question_type"], 2)


def test_cold_start_rows_are_solved_spatial_rows(done):
    spatial = {row["question_id"]: row for row in rows_in(done)}
    rows = rows_in(done, "coldstart")
    assert len({row["question_id"] for row in rows}) == len(rows) == min(1255, len(spatial))
    for row in rows:
        question = spatial[row["question_id"]]
        assert set(row) == {"question_id", "prompt", "solution", "image", "data_type", "question_type"}
        assert row["question_type"] == question["question_type"]
        assert row["image"] == question["image"] and row["data_type"] == question["data_type"]
        assert question["question"] in row["prompt"] and all(option in row["prompt"] for option in question["options"] or [])
        thought, answer = re.fullmatch(r"<think> ?(.+?) ?</think><answer>(.+)</answer>", row["solution"]).groups()
        assert answer == question["answer"] and common.extract_answer(row["solution"]) == answer
        assert derived(question, split_thought(thought)[1]) == chosen(question)


def test_manifest_counts_what_is_there(done):
    manifest, rows = json.loads((done / "manifest.json").read_text()), rows_in(done)
    counts = manifest["counts"]
    assert counts["spatial"] == len(rows) and counts["by_type"] == Counter(row["question_type"] for row in rows)
    assert counts["locate"] == len(rows_in(done, "locate")) and counts["coldstart"] == len(rows_in(done, "coldstart"))
    assert manifest["by_kind"] == Counter(f"{row['data_type']}: {row['question_type']}" for row in rows)
    assert manifest["letters"] == Counter(row["answer"] for row in rows if row["options"])
    for kind, count in manifest["by_kind"].items():
        assert manifest["passed"][kind] >= manifest["candidates"][kind] >= count
        assert manifest["candidates"][kind] <= manifest["rooms"] * stage0_data.RULES["per_room_type"]
    assert list(manifest["failed_rooms"]) == ["scene0099_00"] and "aggregation.json" in manifest["failed_rooms"]["scene0099_00"]
    assert manifest["rooms"] == 3 and {name.split("/")[0] for row in rows for name in row["image"]} == {
        "scene0007_00", "scene0012_01", "scene0033_00",
    }  # fmt: skip
    assert manifest["skipped"] == {"label not in the table": 2, "frame without a finite pose": 4, "frame without depth": 2}
    assert manifest["rules"]["guard_deg"]["value"] == 10 and manifest["config"]["seed"] == 0
    assert sorted(path.name for path in done.iterdir()) == sorted([*FILES, "gallery.html", "images", "manifest.json"])


def test_a_scene_gives_at_most_so_many_rows(done, small, monkeypatch, tmp_path):
    for folder, most in ((done, 40), (tmp_path, 7)):
        if most == 7:
            make(monkeypatch, small, folder, "--per_room", most)
        scenes = Counter(row["image"][0].split("/")[0] for row in rows_in(folder))
        assert max(scenes.values()) == most


def test_rows_do_not_depend_on_the_workers_but_on_the_seed(done, root, monkeypatch, tmp_path):
    make(monkeypatch, root.path, tmp_path / "two", "--workers", 2)
    assert bytes_of(tmp_path / "two") == bytes_of(done)
    make(monkeypatch, root.path, tmp_path / "seed", "--seed", 1)
    assert all(bytes_of(tmp_path / "seed")[name] != bytes_of(done)[name] for name in FILES)


def test_targets_are_shared_among_the_types(root, monkeypatch, tmp_path):
    argv = ("--single_rows", 12, "--multi_rows", 10, "--video_rows", 15, "--per_room", 1000, "--traces", 9)
    manifest = make(monkeypatch, root.path, tmp_path, *argv)
    by_kind = manifest["by_kind"]
    assert Counter(row["data_type"] for row in rows_in(tmp_path)) == {"single_image": 12, "multi_view": 10, "video": 15}
    assert manifest["counts"]["locate"] == 12 and manifest["counts"]["coldstart"] == 9
    assert [by_kind[f"single_image: {kind}"] for kind in FOUR] == [3, 3, 3, 3]
    assert all(2 <= by_kind[f"multi_view: {kind}"] <= 3 or by_kind["multi_view: object count"] < 2 for kind in FOUR)
    video = {kind: by_kind.get(f"video: {kind}", 0) for kind in TYPES["video"]}
    short = [kind for kind in video if manifest["candidates"].get(f"video: {kind}", 0) <= 15 // 7]
    assert all(video[kind] == manifest["candidates"].get(f"video: {kind}", 0) for kind in short)
    rest = [video[kind] for kind in video if kind not in short]
    assert max(rest) - min(rest) <= 1


def test_balance_shares_a_target_as_far_as_types_reach():
    many = {"a": 50, "b": 50, "c": 3, "d": 9}

    def row(data_type, kind, scene):
        return {"data_type": data_type, "question_type": kind, "image": [f"scene{scene:04d}_00/0.jpg"]}

    rows = [row("video", kind, i) for kind in many for i in range(many[kind])] + [row("single_image", "a", i) for i in range(5)]
    chosen_rows = stage0_data.balance(list(rows), {"video": 52, "single_image": 0}, 100, 0)
    found = Counter((row["data_type"], row["question_type"]) for row in chosen_rows)
    assert found == {("video", "a"): 20, ("video", "b"): 20, ("video", "c"): 3, ("video", "d"): 9, ("single_image", "a"): 5}
    assert len({id(row) for row in chosen_rows}) == len(chosen_rows)
    few = stage0_data.balance(list(rows), {"video": 0, "single_image": 0}, 2, 0)
    assert set(Counter(row["image"][0] for row in few).values()) <= {1, 2}
    assert len({row["question_type"] for row in chosen_rows[:12]}) > 1  # not sorted by type


def test_a_full_scene_is_asked_everything():
    """Where the scenes' limit binds and not the targets, no type goes without."""
    kinds = [(data_type, kind) for data_type, some in TYPES.items() for kind in some]
    for scenes, most in ((1, 40), (5, 16)):
        rows = [
            {"data_type": data_type, "question_type": kind, "image": [f"scene{scene:04d}_00/0.jpg"]}
            for data_type, kind in kinds for scene in range(scenes) for _ in range(1 if kind == "room size" else 6)
        ]  # fmt: skip
        found = stage0_data.balance(rows, {"single_image": 5929, "multi_view": 5752, "video": 9000}, most, 0)
        counts = Counter((row["data_type"], row["question_type"]) for row in found)
        assert len(found) == scenes * most and set(counts) == set(kinds)
        wanted = scenes * most / len(kinds)
        assert all(0.5 * wanted <= count <= 2 * wanted for key, count in counts.items() if key[1] != "room size"), counts


def test_letters_of_a_run_are_even(done):
    letters = {}
    for row in rows_in(done):
        if in_any_order(row):
            letters.setdefault(len(row["options"]), []).append("ABCD".index(row["answer"]))
    for count, places in letters.items():
        for place in range(count):
            assert abs(places.count(place) - len(places) / count) <= 2.5 * math.sqrt(len(places) / count) + 1


def test_validation_scenes_only_when_told(root, monkeypatch, tmp_path, capsys):
    only = tmp_path / "only"
    shutil.copytree(root.path / "scans" / "scene0568_00", only / "scans" / "scene0568_00")
    write_table(only)
    with pytest.raises(SystemExit, match="--allow_val"):
        make(monkeypatch, only, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = make(monkeypatch, only, tmp_path / "out", "--allow_val", "--single_rows", 8)
    assert manifest["rooms"] == 1 and manifest["config"]["allow_val"] is True
    assert {row["image"][0].split("/")[0] for row in rows_in(tmp_path / "out")} == {"scene0568_00"}


def settings_of(root, out, **others):
    return stage0_data.DataSettings(source="scannet", scannet=str(root), out=str(out), traces=1255, **others)


def begin(settings, names):
    """What a run leaves that was stopped after the scenes `names`: {name: result}."""
    out, config = Path(settings.out), {name: getattr(settings, name) for name in stage0_data.REAL_CONFIG}
    scenes = stage0_data.list_rooms(settings)
    made_from = stage0_data.inputs_of(settings, config, scenes)
    assert jobs.prepare(out, config, settings, jobs.fingerprint(made_from))
    todo = [(name, made_from[name], (scenes[name], settings)) for name in names]
    return dict(zip(names, jobs.process_rooms(stage0_data.process_scan, todo, out, 1, "")))


def test_stopped_run_goes_on_to_the_same_bytes(done, root, monkeypatch, tmp_path):
    settings = settings_of(root.path, tmp_path)
    begin(settings, ["scene0007_00", "scene0012_01"])
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["scene0007_00.json", "scene0012_01.json"]
    (tmp_path / "parts" / "scene0033_00.new").write_text('{"rows": [')  # it was stopped while it wrote this
    make(monkeypatch, root.path, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(done)
    assert not (tmp_path / "parts").exists() and not (tmp_path / "parts.json").exists()


def test_half_copied_picture_is_copied_again(root, tmp_path):
    """A run may be stopped at any time, also while it copies a picture: what is there under its name is whole."""
    source, target = root.path / "scans" / "scene0012_01", tmp_path / "scene0012_01" / "20.jpg"
    files = scannet.frame_files(source)
    with pytest.MonkeyPatch.context() as patch:

        def stopped(_, path, **options):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt

        patch.setattr(shutil, "copyfile", stopped)
        with pytest.raises(KeyboardInterrupt):
            scannet.write_picture(target, *files)
    scannet.write_picture(target, *files)
    assert target.read_bytes() == (source / "color" / "000020.jpg").read_bytes()


SMALL = ("--single_rows", 8, "--multi_rows", 4, "--video_rows", 4)


def mark(out, names):
    """Write "marked" into the parts of rooms, so that it is seen later whether they were used."""
    for name in names:
        path = Path(out) / "parts" / f"{name}.json"
        part = json.loads(path.read_text())
        part["result"]["skipped"] = {"marked": 1}
        path.write_text(json.dumps(part))


@pytest.fixture
def two(root, tmp_path):
    """A ScanNet folder of two short scenes that may be changed."""
    write_table(tmp_path)
    copy_scene(root.path / "scans" / "scene0033_00", tmp_path / "scans" / "scene0033_00")
    copy_scene(root.path / "scans" / "scene0033_00", tmp_path / "scans" / "scene0034_00")
    return tmp_path


def test_finished_scenes_are_made_again_only_if_what_they_are_made_from_changed(two, monkeypatch, tmp_path):
    names, settings = ["scene0033_00", "scene0034_00"], settings_of(two, tmp_path / "out")

    def kept(change):
        """The rooms whose inputs are the same after a change."""
        config = {"seed": 1}
        before = stage0_data.inputs_of(settings, config, stage0_data.list_rooms(settings))
        change(config)
        after = stage0_data.inputs_of(settings, config, stage0_data.list_rooms(settings))
        return [name for name in names if before[name] == after[name]]

    depth, table, code = two / "scans" / names[0] / "depth" / "0.png", two / scannet.LABELS, tmp_path / "other.py"
    code.write_text("other code")
    assert kept(lambda _: None) == names
    assert kept(lambda _: depth.touch()) == names[1:]
    assert kept(lambda _: depth.rename(depth.with_stem("7"))) == names[1:]
    assert kept(lambda _: (two / "scans" / names[1] / "scene0034_00.txt").write_text("sceneType = Attic\n")) == names[:1]
    assert kept(lambda config: config.update(seed=2)) == []
    assert kept(lambda _: table.write_text(table.read_text() + "9\tnew\tnew\t1\t5\tchair\n")) == []
    assert kept(lambda _: monkeypatch.setattr(stage0_data, "__file__", str(code))) == []
    assert kept(lambda _: monkeypatch.setattr(scannet, "__file__", str(code))) == []

    begin(settings, names)
    mark(settings.out, names)
    (two / "scans" / names[0] / "color" / "000020.jpg").touch()
    assert [part["skipped"] == {"marked": 1} for part in begin(settings, names).values()] == [False, True]


def test_failed_scenes_are_tried_again(two, monkeypatch, tmp_path):
    names, out = ["scene0033_00", "scene0034_00"], tmp_path / "out"
    settings, tries = settings_of(two, out), []
    read = stage0_data.read_scannet

    def once(folder, labels):
        if folder.name == names[0] and not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            raise OSError("the disk was away")
        return read(folder, labels)

    monkeypatch.setattr(stage0_data, "read_scannet", once)
    for _ in range(2):
        made = begin(settings, names)
        tries.append([name for name in names if "failed" in made[name]])
        if not tries[1:]:
            mark(out, names[1:])
    assert tries == [names[:1], []] and made[names[1]]["skipped"] == {"marked": 1}


def test_pictures_are_copied_again_if_the_scan_has_others_now(two, monkeypatch, tmp_path):
    out = tmp_path / "out"
    make(monkeypatch, two, out, *SMALL)
    manifest = out / "manifest.json"
    manifest.unlink()  # as if it had been stopped before its end
    for name in ("scene0033_00", "scene0034_00"):
        shrink(two / "scans" / name, "color", (162, 121))
    facts = make(monkeypatch, two, out, *SMALL)
    assert {room: how["color"]["to"] for room, how in facts["scaled_intrinsics"].items()} == {
        "scene0033_00": [162, 121], "scene0034_00": [162, 121],
    }  # fmt: skip
    assert {Image.open(out / "images" / name).size for row in rows_in(out) for name in row["image"]} == {(162, 121)}


def test_complete_data_from_other_files_is_kept_with_a_note(two, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    make(monkeypatch, two, out, *SMALL)
    before = bytes_of(out)
    for changed in (False, True):
        if changed:
            next((two / "scans" / "scene0033_00" / "pose").iterdir()).touch()
        capsys.readouterr()
        make(monkeypatch, two, out, *SMALL)
        words = capsys.readouterr().err
        assert f"found complete data in {out}" in words and ("have changed since" in words) == changed
    assert bytes_of(out) == before


def test_other_settings_are_refused(done, root, monkeypatch, tmp_path, capsys):
    before = bytes_of(done)
    monkeypatch.chdir(done.parent)
    for name, value in (("seed", 5), ("per_room", 3), ("video_rows", 7)):
        with pytest.raises(SystemExit, match=f"--{name} .*{value}"):
            make(monkeypatch, root.path, "mine", f"--{name}", value)
    with pytest.raises(SystemExit, match="--extra"):
        make(monkeypatch, root.path, "mine", "--extra")
    begin(settings_of(root.path, tmp_path), [])
    with pytest.raises(SystemExit, match="--seed"):
        make(monkeypatch, root.path, tmp_path, "--seed", 9)
    make(monkeypatch, root.path, "mine")  # the same: nothing to do
    assert bytes_of(done) == before


def test_resume_never_makes_it_anew(small, monkeypatch, tmp_path):
    argv = ("--single_rows", 6, "--multi_rows", 4, "--video_rows", 4)
    make(monkeypatch, small, tmp_path, *argv)
    first = bytes_of(tmp_path)
    (tmp_path / "images" / "old").mkdir()
    manifest = make(monkeypatch, small, tmp_path, *argv, "--seed", 3, "--resume", "never")
    assert manifest["config"]["seed"] == 3 and bytes_of(tmp_path) != first and not (tmp_path / "images" / "old").exists()


def test_wrong_sources_are_refused(root, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["stage0_data.py", "--out", str(tmp_path / "out"), "--source", "scannetpp"])
    with pytest.raises(SystemExit, match="2"):
        stage0_data.main()
    message = r"--source: invalid choice: 'scannetpp' \(choose from '?toy'?, '?scannet'?, '?meta'?\)"
    assert re.search(message, capsys.readouterr().err)
    for argv, words in (
        (["--source", "scannet"], "needs --scannet"),
        (["--source", "meta"], "needs --scannet"),
        (["--source", "scannet", "--scannet", str(tmp_path)], "scannetv2-labels"),
    ):
        monkeypatch.setattr(sys, "argv", ["stage0_data.py", "--out", str(tmp_path / "out"), *argv])
        with pytest.raises(SystemExit, match=words):
            stage0_data.main()
    write_table(tmp_path)
    with pytest.raises(SystemExit, match="no room"):
        make(monkeypatch, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_broken_scenes_are_an_error(root, monkeypatch, tmp_path):
    shutil.copytree(root.path / "scans" / "scene0099_00", tmp_path / "scans" / "scene0099_00")
    write_table(tmp_path)
    with pytest.raises(SystemExit, match="aggregation.json"):
        make(monkeypatch, tmp_path, tmp_path / "out")


def test_folders_that_are_no_scenes_are_passed_over(root, monkeypatch, tmp_path):
    shutil.copytree(root.path / "scans" / "scene0033_00", tmp_path / "scans" / "scene0033_00")
    (tmp_path / "scans" / "scenes_old").mkdir()
    write_table(tmp_path)
    assert make(monkeypatch, tmp_path, tmp_path / "out", "--multi_rows", 3)["rooms"] == 1


def test_extra_types_are_asked_when_wanted(small, done, monkeypatch, tmp_path):
    extra = {kind for kind, question in stage0_data.GENERATORS.items() if question.extra}
    assert len(extra) == 6 and not {row["question_type"] for row in rows_in(done)} & extra
    manifest = make(monkeypatch, small, tmp_path, "--extra", "--per_room", 200)
    assert manifest["by_kind"]["single_image: perspective taking"] > 0 and manifest["by_kind"]["multi_view: view change"] > 3
    assert all(manifest["by_kind"][f"multi_view: {kind}"] > 1 for kind in extra if kind != "perspective taking")
    assert len(common.read_examples(tmp_path, "spatial")) == manifest["counts"]["spatial"]
    assert any(name.startswith("multi_view: object in a crop: ") for name in manifest["rejected"])
    pairs = [row["image"] for row in rows_in(tmp_path) if len(row["image"]) == 2]
    assert not any(len(row["image"]) == 2 for row in rows_in(tmp_path, "locate")) and len(pairs) > 8
    for first, second in pairs:
        scene, stem = Path(second).parent.name, Path(second).stem.split("_")
        pixels = np.asarray(Image.open(tmp_path / "images" / second)).astype(int)
        if stem[1] == "crop":
            part = Image.open(tmp_path / "images" / first).crop([int(part) for part in stem[2:]])
            assert np.array_equal(np.asarray(part), pixels)
        else:
            metres = np.asarray(Image.open(small / "scans" / scene / "depth" / f"{stem[0]}.png")) / 1000
            assert (pixels[metres == 0] == 0).all() and (pixels[metres >= 5] == [250, 230, 30]).all() and (metres == 0).any()
            middle = np.abs(metres - 2.5) < 0.01
            assert np.abs(pixels[middle] - [30, 150, 140]).max() <= 1 if middle.any() else True
            light = pixels[metres > 0].sum(-1)[np.argsort(metres[metres > 0])]
            assert (np.diff(light) >= -2).all()  # farther is lighter
    page = read_page((tmp_path / "gallery.html").read_text(encoding="utf-8"))
    assert sum(article.pictures == 2 for article in page.articles) == 8


# -- the gallery -----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Articles with their texts, pictures and orange boxes; every tag is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.articles, self.errors = [], Counter(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs, closed=False):
        self.tags[tag] += 1
        facts = dict(attrs)
        if tag == "article":
            self.articles.append(SimpleNamespace(texts=[], pictures=0, boxes=[]))
        elif tag == "image":
            assert facts["href"].startswith("data:image/jpeg;base64,") and len(facts["href"]) > 500
            self.articles[-1].pictures += 1
        elif tag == "rect" and facts.get("stroke") == "orange":
            x, y, w, h = (int(facts[name]) for name in ("x", "y", "width", "height"))
            self.articles[-1].boxes.append((x, y, x + w, y + h))
        if not closed and tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs, closed=True)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data):
        if self.articles:
            self.articles[-1].texts.append(data)


def read_page(text):
    page = Page(text)
    assert not page.errors and not page.open and page.tags["script"] == 0
    assert not re.search(r"(?:src|href)=\"(?!data:)", text) and "<link" not in text and "@import" not in text
    return page


def test_gallery_shows_rows_with_their_boxes(done, root):
    page = read_page((done / "gallery.html").read_text(encoding="utf-8"))
    rows, located = rows_in(done), {row["question_id"]: row for row in rows_in(done, "locate")}
    kinds = Counter((row["data_type"], row["question_type"]) for row in rows)
    assert len(page.articles) == sum(min(2, count) for count in kinds.values())
    assert page.tags["h2"] == len(kinds)
    truths = {name: Truth(made) for name, made in root.made.items()}
    for article in page.articles:
        texts = set(article.texts)
        same = [
            row for row in rows
            if {row["question"], row["answer"], row["image"][0].split("/")[0], *(row["options"] or [])} <= texts
            and len(row["image"]) == article.pictures
        ]  # fmt: skip
        assert same
        possible = []
        for row in same:
            truth, numbers = truths[row["image"][0].split("/")[0]], numbers_of(row)
            if row["data_type"] == "single_image":
                possible.append(sorted(tuple(box["bbox_2d"]) for box in located[row["question_id"]]["answer"]))
            else:
                if row["question_type"] == "object count":
                    asked = {index for index, label in enumerate(truth.labels) if label == asked_of(row)[0]}
                elif row["question_type"] == "appearance order":  # which of several with one label is shown is not known here
                    assert len(article.boxes) >= 4
                    possible.append(len(article.boxes))
                    continue
                elif row["question_type"] == "room size":
                    asked = set()
                else:
                    groups = asked_of(row) if row["question_type"] != "relative distance" else (*words_of(row), asked_of(row)[2])
                    asked = {truth.named(numbers)[label] for label in groups if label in truth.named(numbers)}
                possible.append(sum(len(asked & set(truth.sight(number)[0])) for number in numbers))
        found = sorted(article.boxes)
        assert found in possible or len(found) in possible
        assert any(text in row["thought"] for row in [{"thought": " ".join(texts)}] for text in texts)


def test_gallery_escapes_everything(scenes, tmp_path):
    scene = scenes[1]
    evil = [row for row in scene.rows if "<script>" in row["question"] or 'a"b&c' in row["question"]]
    evil = [row for row in evil if not row["question"].startswith("The second picture")]  # it would have to be written
    kinds = {(row["data_type"], row["question_type"]): row for row in evil}
    rows = list(kinds.values())
    assert len(rows) >= 8
    text = report.gallery_page([stage0_data.gallery_entry(row, scene.room) for row in rows])
    page = read_page(text)
    assert "<script" not in text and "&lt;script&gt;" in text and 'a"b&c' not in text and "a&#34;b&amp;c" in text
    for row, article in zip(rows, page.articles, strict=True):
        texts = set(article.texts)
        assert {row["question"], row["thought"], row["answer"], *(row["options"] or [])} <= texts
        assert article.pictures == len(row["image"])
        for label in {o.label for o in scene.room.objects if o.number in row["asked"]}:
            assert label in texts  # in the plan, at least
    assert html.escape("<script>alert(1)</script>") in text


# -- boxes without pictures ------------------------------------------------------------------------


def tiny_meta(**others):
    box = {"centroid": [0, 0, 0.5], "axesLengths": [1, 0.5, 0.8], "normalizedAxes": [1, 0, 0, 0, 1, 0, 0, 0, 1]}
    table = box | {"centroid": [3, 0, 0.5], "axesLengths": [0.4, 2.0, 1.0]}
    facts = {"room_size": 12.34, "object_counts": {"chair": 1, "table": 1}, "object_bbox": {"chair": [box], "table": [table]}}
    return {"scene0001_00": facts | others}


def write_json(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_tiny_meta_file(tmp_path, monkeypatch):
    path = write_json(tmp_path / "meta.json", tiny_meta())
    rows, _ = all_rows(stage0_data.read_meta(path)["scene0001_00"])
    answers = {row["question_type"]: row["answer"] for row in rows}
    assert answers == {"absolute distance": "2.3", "object size": answers["object size"], "room size": "12.3"}
    assert sorted(row["answer"] for row in rows if row["question_type"] == "object size") == ["100", "200"]
    manifest = make(monkeypatch, path, tmp_path / "out", "--source", "meta")
    assert manifest["counts"]["spatial"] == 4 and manifest["counts"]["locate"] == 0
    assert {name for row in rows_in(tmp_path / "out") for name in row["image"]} == {"scene0001_00.mp4"}
    read_page((tmp_path / "out" / "gallery.html").read_text(encoding="utf-8"))


def test_bad_meta_files_are_named(tmp_path):
    box = {"centroid": [0, 0], "axesLengths": [1, 1, 1], "normalizedAxes": [1, 0, 0]}
    bad = ["{", tiny_meta(object_bbox=None), tiny_meta(room_size="wide"), tiny_meta(object_bbox={"chair": [box]}),
           {"scene0001_00": {"room_size": 3}}]  # fmt: skip
    for number, content in enumerate(bad):
        path = write_json(tmp_path / f"{number}.json", content)
        with pytest.raises(SystemExit, match=str(path) + ("" if content == "{" else ".*scene0001_00")):
            stage0_data.read_meta(path)
    with pytest.raises(SystemExit, match="nothing.json"):
        stage0_data.read_meta(tmp_path / "nothing.json")


def test_plan_shows_the_footprint_of_boxes_whose_axes_stand_in_any_order(tmp_path):
    content = tiny_meta()
    chair = content["scene0001_00"]["object_bbox"]["chair"][0]
    c, s = math.cos(0.4), math.sin(0.4)
    chair |= {"axesLengths": [0.8, 1, 0.5], "normalizedAxes": [0, 0, 1, c, s, 0, -s, c, 0]}  # the first axis points up
    room = stage0_data.read_meta(write_json(tmp_path / "meta.json", content))["scene0001_00"]
    row = {"question_type": "x", "data_type": "video", "image": ["a.mp4"], "asked": [], "question": "", "options": None,
           "answer": "", "thought": ""}  # fmt: skip
    page = report.gallery_page([stage0_data.gallery_entry(row, room)])
    side = (np.array(re.findall(r'viewBox="0 0 (\d+) (\d+)"', page)[0], float)).max()
    ring = np.array([pair.split(",") for pair in re.findall(r'points="([^"]+)"', page)[0].split()], float)
    x, y = ring.T
    area = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
    low, high = -1, 4  # of the plan in metres along x: -0.56 - 0.3 and 3.2 + 0.3, to whole numbers
    assert abs(area / (side / (high - low)) ** 2 - 0.5) < 0.02


@pytest.fixture(scope="module")
def boxes():
    """(facts as in the file, rooms as read) of real scenes' boxes."""
    if not META.is_file():
        pytest.skip("no meta information here")
    return json.loads(META.read_text()), stage0_data.read_meta(META)


def nearest_points(a, b, steps=3000):
    """Distance of two boxes by projecting onto each of them in turn (from several starts they all reach the same)."""
    (ca, cb), (la, lb) = ([np.array(box[name]) for box in (a, b)] for name in ("centroid", "axesLengths"))
    (aa, ab), la, lb = (np.array(box["normalizedAxes"]).reshape(3, 3) for box in (a, b)), la / 2, lb / 2
    point, best = ca, math.inf
    for _ in range(steps):
        other = cb + np.clip(ab @ (point - cb), -lb, lb) @ ab
        point = ca + np.clip(aa @ (other - ca), -la, la) @ aa
        span = float(np.linalg.norm(point - other))
        if best - span < 1e-9:
            break
        best = span
    return span


def test_every_type_without_pictures_is_asked(boxes):
    facts, rooms = boxes
    kinds = Counter()
    for name, room in list(rooms.items())[::4]:
        rows, _ = all_rows(room) if len(room.objects) < 14 else ([], None)
        assert all(row["image"] == [f"{name}.mp4"] and row["data_type"] == "video" for row in rows)
        kinds += Counter(row["question_type"] for row in rows)
        for row in rows:
            assert derived(row, split_thought(row["thought"])[1]) == chosen(row)
    assert set(kinds) == set(TYPES["video"]) - {"appearance order"}


def test_counts_sizes_and_rooms_are_the_files(boxes):
    facts, rooms = boxes
    seen = Counter()
    for name, room in rooms.items():
        view = stage0_data.View(room, "video", [], [], [], random.Random(0))
        kinds = ("object count", "object size", "room size")
        rows = {kind: list(stage0_data.rows_of_type(view, kind, Counter())) for kind in kinds}
        some = facts[name]
        (row,) = rows["room size"]
        assert abs(float(row["answer"]) - some["room_size"]) <= 0.0501 and re.fullmatch(r"\d+\.\d", row["answer"])
        for row in rows["object count"]:
            label = asked_of(row)[0]
            assert int(row["answer"]) == some["object_counts"][label] == len(some["object_bbox"][label]) >= 2
        for row in rows["object size"]:
            (box,) = some["object_bbox"][asked_of(row)[0]]
            assert row["answer"] == str(round(100 * max(box["axesLengths"])))
        assert {asked_of(row)[0] for row in rows["object count"]} == {
            label for label, boxes_ in some["object_bbox"].items()
            if len(boxes_) == some["object_counts"].get(label) and len(boxes_) >= 2
            and not any(other.endswith(" " + label) for other in some["object_bbox"])
        }  # fmt: skip
        seen += Counter({kind: len(some) for kind, some in rows.items()})
    assert min(seen.values()) >= len(rooms) // 2


def test_box_distances_hold_another_way(boxes):
    facts, rooms = boxes
    compared = 0
    for name in list(rooms)[:24]:
        view = stage0_data.View(rooms[name], "video", [], [], [], random.Random(0))
        for row in stage0_data.rows_of_type(view, "absolute distance", Counter()):
            a, b = (facts[name]["object_bbox"][label][0] for label in asked_of(row))
            span = nearest_points(a, b)
            assert abs(view.distance(*row["objects"]) - span) < 1e-4
            assert abs(float(row["answer"]) - span) <= 0.05 + 1e-4 and span >= 0.2 - 1e-4
            compared += 1
    assert compared > 100


def test_boxes_that_meet_are_no_distance_apart():
    def thing(centre, sides, angle):
        return stage0_data.Object(1, "x", None, np.array(centre, float), alignment(angle, 0)[:3, :3].T, np.array(sides, float))

    assert stage0_data.closest_distance(thing((0, 0, 0), (1, 1, 1), 0.3), thing((0.6, 0, 0), (1, 1, 1), 0)) < 1e-6
    edge_on = stage0_data.closest_distance(thing((0, 0, 0), (1, 1, 1), 0), thing((3, 0, 0), (1, 1, 1), math.pi / 4))
    assert abs(edge_on - (2.5 - 0.5**0.5)) < 1e-6


def test_directions_between_real_boxes(boxes):
    facts, rooms = boxes
    seen = 0
    for name in list(rooms)[:24]:
        view = stage0_data.View(rooms[name], "video", [], [], [], random.Random(0))
        for row in stage0_data.rows_of_type(view, "relative direction", Counter()):
            place, facing, asked = (facts[name]["object_bbox"][label] for label in asked_of(row)[:3])
            assert len(place) == len(facing) == len(asked) == 1
            p, o, q = (complex(*some[0]["centroid"][:2]) for some in (place, facing, asked))
            angle = math.degrees(cmath.phase((q - p) / (o - p))) % 360
            borders, word = STANDING[level_of(row["question"])]
            assert chosen(row) == word(angle) and away(angle, borders) >= 10
            half, axes = np.array(asked[0]["axesLengths"]) / 2, np.array(asked[0]["normalizedAxes"]).reshape(3, 3)
            ends = [complex(*(np.array(signs) * half @ axes)[:2]) + q for signs in itertools.product((-1, 1), repeat=3)]
            turns = [math.degrees(cmath.phase((end - p) / (o - p))) % 360 for end in ends]
            assert sum(word(turn) != word(angle) for turn in turns) <= 2
            seen += 1
    assert seen > 50


def test_benchmark_scenes_count_as_validation(boxes):
    assert all(int(name[5:9]) in scannet.VALIDATION for name in boxes[1])
