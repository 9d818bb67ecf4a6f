"""Stage 0, data: rooms in, question-and-answer rows in SpatialLadder's format out. For the toy also its base model.

The paper (arXiv 2510.08531, section 3) describes this pipeline, but its authors did not publish it. Here three sources share
one Room class, one projection and one set of question generators:

toy      rooms with coloured solids, rendered by support/toy_world.py, WRITTEN in ScanNet's own layout and READ BACK by the
         same read_scannet that reads the real data
scannet  rooms of ScanNet with exported frames: seven question types about one picture, several views or a video
meta     object boxes without pictures (VSI-Bench's meta information): the questions that need geometry only

    python stage0_data.py            # toy: data/toy and runs/toy/base, about five minutes on two cores
    python stage0_data.py --source scannet --scannet <folder with scans/ and the label table> --out data/mine

A scan is a folder of scans/ with the mesh (<id>_vh_clean_2.ply), its segments and aggregation, <id>.txt, and the frames exported by
ScanNet's SensReader: color/, depth/, pose/, intrinsic/. Validation rooms are refused without --allow_val: benchmarks use them.

Output: {spld_grounding_data,spld_spatial_data,spld_coldstart_data}.jsonl with images/, manifest.json (seed, counts, every
threshold, what was skipped and why) and gallery.html to look at (toy: and gallery.png). The toy also gets data/toy/heldout, the
same files from other rooms, and runs/toy/base/model: a tiny Qwen2.5-VL with random weights whose vision tower was trained to
recognise coloured solids and the walls behind them.

Rerun the same command to resume: finished rooms are kept, unless their files or this code have changed since; rooms that failed
are tried again. Only the training of the base, which takes two minutes, starts again.

Sections: 1 settings and rules, 2 reading rooms (support/scannet.py reads the files), 3 geometry, 4 questions (add your own
here), 5 rows and files, 6 main.
"""

import itertools
import json
import math
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.optimize import lsq_linear
from scipy.spatial import ConvexHull, Delaunay, QhullError, cKDTree
from tqdm import tqdm

import common
from support import files, jobs, report, runs, scannet, toy_world
from support.runs import Settings, setting

# ------------------------------------------------------------------------------------------------
# 1. Settings and rules
# ------------------------------------------------------------------------------------------------


@dataclass
class DataSettings(Settings):
    """Stage 0. Toy: --data is the folder of the data and --out that of the base. Other sources: --out is the folder of the
    data. --model is not used; --max-steps shortens the training of the base."""

    source: str = setting("toy", "where the rooms come from", ("toy", "scannet", "meta"))
    scannet: str = setting("", "scannet: folder with scans/ and scannetv2-labels.combined.tsv; meta: the JSON file")
    allow_val: bool = setting(False, "use ScanNet's validation rooms too, although the benchmarks are built on them")
    extra: bool = setting(False, "generate more question types: perspective taking, view change, and questions with a depth "
                                 "picture or a part of the picture as a second picture (toy: only the last two)")  # fmt: skip
    single_rows: int = setting(5929, "scannet, meta: questions about one picture, and as many localisation rows (0: all)")
    multi_rows: int = setting(5752, "scannet, meta: questions about several views (0: all)")
    video_rows: int = setting(9000, "scannet, meta: questions about a video (0: all)")
    per_room: int = setting(40, "scannet, meta: largest number of questions about one room")
    traces: int = setting(0, "thinking traces for the cold start; 0: 600 for the toy, else the paper's 1,255")
    workers: int = setting(2, "processes that work on rooms; the rows do not depend on it")
    rooms: int = setting(1500, "toy: training rooms, each with eight pictures")
    heldout_rooms: int = setting(160, "toy: rooms for evaluation only")
    backbone: str = setting("qwen2_5_vl", "toy: the family of the base", tuple(common.FAMILIES))
    base_steps: int = setting(800, "toy: steps of the base's vision training")
    base_batch: int = setting(36, "toy: pictures in one such step")


PRESETS = {"toy": {}}

# Every threshold of the pipeline: value, origin, meaning. manifest.json repeats this table. Origin "verified": found in the
# authors' published rows or code; "ours": unpublished, our choice.
RULE_TABLE = {
    "occlusion_m": (0.1, "verified", "a point is occluded when it is this far behind the depth picture"),
    "visible_share": (0.25, "ours", "an object is visible when this share of its projected vertices is unoccluded ..."),
    "visible_pixels": (400 / (1296 * 968), "ours", "... and its box covers this share of the picture"),
    "single_step": (20, "verified", "single images: every how many frames"),
    "views_of": (32, "verified", "several views: of this many evenly spaced frames ..."),
    "views": (8, "verified", "... this many neighbours ..."),
    "views_step": (4, "verified", "... starting at every how many"),
    "video_frames": (16, "verified", "video: evenly spaced frames, in temporal order"),
    "frames_per_second": (30.0, "verified", "of ScanNet's recordings"),
    "axis_deg": (22.5, "verified", "one picture: this close to an axis the answer is left, right, front or back, else a diagonal"),
    "direction_m": (0.5, "ours", "one picture: smallest distance of two centres on the floor; below it rounding could mislead"),
    "guard_deg": (10.0, "ours", "directions this close to the border between two answers are rejected"),
    "stand_near_m": (0.3, "verified", "standing by an object: smallest distance between two of the three objects"),
    "stand_far_m": (5.0, "verified", "... and largest distance"),
    "stand_corners": (2, "verified", "... and at most this many corners of the third object lie in another sector"),
    "min_distance_m": (0.2, "verified", "smallest absolute distance in a question"),
    "compared": (4, "verified", "several views: the nearest of two to this many objects; video: of this many"),
    "min_nearest_m": (0.15, "verified", "smallest distance of the nearest candidate"),
    "gap_m": (0.15, "verified", "smallest difference between two compared distances ..."),
    "gap_large_m": (0.3, "verified", "... in rooms larger than"),
    "large_room_m2": (40.0, "verified", "... this"),
    "min_count": (2, "verified", "smallest count in a counting question"),
    "apart_s": (1.0, "verified", "smallest time between two first appearances in a video"),
    "floor_cell_m": (0.05, "ours", "floor plan: vertices are rounded to a grid of this step ..."),
    "floor_radius_m": (0.5, "ours", "... and triangles with a circumradius up to this belong to the floor (alpha shape)"),
    "move_m": (0.3, "ours", "view change: smallest movement; of its parts sideways and ahead one is at most half the other"),
    "turn_deg": (15.0, "ours", "view change: smallest turn"),
    "depth_m": (5.0, "ours", "depth pictures: everything from this distance on is yellow"),
    "crop_px": (40, "ours", "a part of a picture as a second picture: smallest side in pixels"),
    "step_m": (0.0, "ours", "thoughts about several pictures count places in whole steps of so many metres, those about one "
                            "picture in half such steps; 0: in metres, with one decimal"),
    "heading_deg": (1, "ours", "unit of the angles in thoughts about several pictures, a divisor of 360"),
    "shuffled": (1, "VSI-Bench", "standing direction: whether the options are in random order"),
    "tries": (100, "ours", "largest number of object groups tried for one type and one view"),
    "per_room_type": (6, "ours", "largest number of questions kept of one type, kind of picture and room, before balancing"),
}
RULES = {name: value for name, (value, _, _) in RULE_TABLE.items()}
# A metre has few pixels in a toy picture, its solids do not touch, and its cameras are far away. A model this small learns to
# subtract whole numbers in minutes, but not decimals.
TOY_RULES = RULES | {"gap_m": 0.3, "gap_large_m": 1.0, "direction_m": 0.0, "stand_far_m": 12.0, "compared": 3, "tries": 30,
                     "depth_m": 10.0, "crop_px": 8, "step_m": 1.0, "heading_deg": 45, "shuffled": 0}

# ------------------------------------------------------------------------------------------------
# 2. Reading rooms
# ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Object:
    """An object in the axis-aligned world, in metres: its mesh vertices (n, 3) and the smallest upright box around them.

    points is None where only a box is known. axes (3, 3): one unit vector a row; sides (3,): the box's length along each.
    """

    number: int
    label: str
    points: np.ndarray | None
    centre: np.ndarray
    axes: np.ndarray
    sides: np.ndarray


@dataclass
class Frame:
    """A picture: paths, and camera-to-world (4, 4) in the aligned world. number: its place in the recording."""

    number: int
    color: Path
    depth: Path
    pose: np.ndarray


@dataclass
class Room:
    """A room as read. Intrinsics are (3, 3). counts: objects of each label; skipped: {what was left out: how often}."""

    name: str
    objects: list
    frames: list
    color_intrinsics: np.ndarray | None
    depth_intrinsics: np.ndarray | None
    floor_area: float  # square metres
    sides: tuple  # metres, of the smallest rectangle around the floor plan, the shorter first; empty if it is not known
    counts: Counter
    skipped: Counter
    scaled: dict = field(default_factory=dict)  # {"color" | "depth": how the intrinsics were scaled}
    depth_shift: float = 1000.0  # units of the depth pictures in a metre
    distances: dict = field(default_factory=dict)  # cache: (object number, object number) -> metres
    letters: dict = field(default_factory=dict)  # number of options -> Counter of the places of the correct one


def read_scannet(folder, labels):
    """The Room in a folder scans/<id>. labels: from scannet.read_labels. Raises SystemExit naming the file that is wrong."""
    points, things, frames, facts = scannet.read_scan(Path(folder), labels)
    objects = [Object(number, label, some, *upright_box(some)) for number, label, some in things]
    counts, frames = Counter(o.label for o in objects), [Frame(*frame) for frame in frames]
    sides = tuple(sorted(upright_box(points)[2][:2]))
    return Room(Path(folder).name, objects, frames, floor_area=floor_area(points), sides=sides, counts=counts, **facts)


def read_meta(path):
    """{name: Room} of VSI-Bench's meta information: oriented boxes, counts and floor areas, but no pictures. Raises SystemExit
    naming the file, and the room that lacks something."""
    rooms = {}
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read as JSON ({error}).") from None
    for name, facts in contents.items():
        if not name.replace("_", "").isalnum() or len(name) > 99:
            raise SystemExit(f"{path}: {name[:99]!r} cannot be the name of a room, because files are named after it.")
        try:
            boxes = [(label, box) for label, some in sorted(facts["object_bbox"].items()) for box in some]
            objects = [
                Object(number, label, None, np.array(box["centroid"], float),
                       np.array(box["normalizedAxes"], float).reshape(3, 3), np.array(box["axesLengths"], float))
                for number, (label, box) in enumerate(boxes, 1)
            ]  # fmt: skip
            area, counts = float(facts["room_size"]), Counter(facts["object_counts"])
            rooms[name] = Room(name, objects, [], None, None, area, (), counts, Counter())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SystemExit(f"{path}, {name}: {error!r}. A room needs object_bbox, object_counts and room_size.") from None
    return rooms


def read_room(settings, path):
    """The Room at a path that list_rooms gave."""
    if settings.source == "meta":
        return read_meta(settings.scannet)[path]
    return read_scannet(path, scannet.read_labels(Path(settings.scannet) / scannet.LABELS))


def list_rooms(settings):
    """{room: its folder (meta: its name)} of the source, without validation rooms unless they are allowed."""
    source = Path(settings.scannet)
    if settings.source == "meta":
        rooms = {name: name for name in read_meta(source)}
    else:
        folder = source / "scans" if (source / "scans").is_dir() else source
        rooms = {path.name: path for path in sorted(folder.glob("scene[0-9][0-9][0-9][0-9]_*")) if path.is_dir()}
        scannet.read_labels(source / scannet.LABELS)  # fails now if it is missing, not once a room
    refused = [name for name in rooms if name[5:9].isdigit() and int(name[5:9]) in scannet.VALIDATION]
    if refused and not settings.allow_val:
        common.print0(f"leaving out {len(refused)} validation rooms such as {refused[0]}, used by the benchmarks (--allow_val)")
        rooms = {name: path for name, path in rooms.items() if name not in refused}
    if not rooms:
        raise SystemExit(f"{source} holds no room to use (expected scans/scene*_*; validation rooms need --allow_val).")
    return rooms


# ------------------------------------------------------------------------------------------------
# 3. Geometry
# ------------------------------------------------------------------------------------------------


def project(points, pose, intrinsics):
    """World points (n, 3) -> pixels u, v and depth z, each (n,). pose is camera-to-world; z <= 0 is behind the camera."""
    camera = (points - pose[:3, 3]) @ pose[:3, :3]  # (n, 3)
    z = camera[:, 2]
    uv = camera @ intrinsics.T  # (n, 3)
    safe = np.where(z > 1e-6, z, np.inf)
    return uv[:, 0] / safe, uv[:, 1] / safe, z


def visible_boxes(room, frame):
    """({number of a visible object: its box}, numbers of all objects with at least one unoccluded vertex) of a frame.

    A box [x1, y1, x2, y2] bounds the unoccluded vertices, in integer pixels of the colour picture; x2 and y2 are the first
    column and row outside.
    """
    with Image.open(frame.color) as image:
        width, height = image.size
    depth = scannet.read_depth(frame.depth, room.depth_shift)  # (h, w) metres, 0 = unknown
    if not depth.any():
        room.skipped["frame with an empty depth picture"] += 1
    points = np.concatenate([o.points for o in room.objects]) if room.objects else np.zeros((0, 3))
    owner = np.repeat(np.arange(len(room.objects)), [len(o.points) for o in room.objects])
    u, v, z = project(points, frame.pose, room.color_intrinsics)
    du, dv, _ = project(points, frame.pose, room.depth_intrinsics)
    inside = (z > 0) & (u > -0.5) & (v > -0.5) & (u < width - 0.5) & (v < height - 0.5)
    column = np.clip(du.round(), 0, depth.shape[1] - 1).astype(int)
    row = np.clip(dv.round(), 0, depth.shape[0] - 1).astype(int)
    surface = depth[row, column]
    seen = inside & (surface > 0) & (z <= surface + RULES["occlusion_m"])
    boxes, glimpsed = {}, set()
    for index, thing in enumerate(room.objects):
        mine = seen & (owner == index)
        if not mine.any():
            continue
        glimpsed.add(thing.number)
        # Pixel centres are whole numbers, so a pixel covers half a unit on both sides.
        bounds = np.array([u[mine].min(), v[mine].min(), u[mine].max(), v[mine].max()]) + 0.5
        x1, y1, x2, y2 = np.clip(bounds.round(), 0, [width, height, width, height]).astype(int).tolist()
        enough = mine.sum() >= RULES["visible_share"] * (inside & (owner == index)).sum()
        if enough and (x2 - x1) * (y2 - y1) >= max(1, RULES["visible_pixels"] * width * height):
            boxes[thing.number] = [x1, y1, x2, y2]
    return boxes, glimpsed


def upright_box(points):
    """The smallest box around points (n, 3) that stands on the floor plane: centre (3,), axes (3, 3), sides (3,).

    Its base is the minimum-area rectangle of the floor plan, of which one side lies on an edge of the convex hull.
    """
    flat, axes = points[:, :2], np.eye(3)
    try:
        hull = flat[ConvexHull(flat).vertices]
    except QhullError:  # all points on one line, or fewer than three: a box along the world's axes
        return (points.min(0) + points.max(0)) / 2, axes, np.ptp(points, axis=0)
    edges = np.roll(hull, -1, axis=0) - hull
    along = edges / np.linalg.norm(edges, axis=1, keepdims=True)  # (edges, 2)
    across = np.stack([-along[:, 1], along[:, 0]], 1)
    spans = np.stack([np.ptp(hull @ along.T, axis=0), np.ptp(hull @ across.T, axis=0)], 1)  # (edges, 2)
    best = spans.prod(1).argmin()
    axes[:2, :2] = along[best], across[best]
    inner = points @ axes.T  # (n, 3) along the axes
    return (inner.min(0) + inner.max(0)) / 2 @ axes, axes, np.ptp(inner, axis=0)


def corners(thing):
    """The eight corners (8, 3) of an object's box."""
    return thing.centre + np.array(list(itertools.product((-0.5, 0.5), repeat=3))) * thing.sides @ thing.axes


def closest_distance(a, b):
    """Smallest distance in metres between the vertices of two objects, or between their boxes where only boxes are known."""
    if a.points is not None:
        return float(cKDTree(a.points).query(b.points)[0].min())
    # Points of a box are centre + s @ (sides * axes) with |s| <= 1/2: the nearest pair is a bounded least-squares problem.
    matrix = np.concatenate([a.sides[:, None] * a.axes, -b.sides[:, None] * b.axes]).T  # (3, 6)
    return float(np.sqrt(2 * lsq_linear(matrix, b.centre - a.centre, (-0.5, 0.5), tol=1e-12).cost))


def floor_area(points):
    """Area in square metres of the floor plan of vertices (n, 3): their alpha shape, seen from above."""
    cells = np.unique((points[:, :2] / RULES["floor_cell_m"]).round(), axis=0) * RULES["floor_cell_m"]
    if len(cells) < 3:
        return 0.0
    triangles = cells[Delaunay(cells).simplices]  # (triangles, 3, 2)
    sides = np.linalg.norm(triangles - np.roll(triangles, 1, axis=1), axis=2)  # (triangles, 3)
    (ax, ay), (bx, by) = (triangles[:, 1] - triangles[:, 0]).T, (triangles[:, 2] - triangles[:, 0]).T
    area = np.abs(ax * by - ay * bx) / 2
    with np.errstate(divide="ignore"):
        circumradius = sides.prod(1) / (4 * area)
    return float(area[circumradius <= RULES["floor_radius_m"]].sum())


def level_axes(pose):
    """Two unit vectors (2,) of the floor plane: to the right of a camera, and along its viewing direction."""
    forward = pose[:2, 2] / np.linalg.norm(pose[:2, 2])
    return np.array([forward[1], -forward[0]]), forward


def camera_offset(a, b, pose):
    """How far the centre of a is to the right of b and beyond it (farther from the camera), in metres."""
    right, forward = level_axes(pose)
    step = (a.centre - b.centre)[:2]
    return float(step @ right), float(step @ forward)


def bearing(origin, facing, target):
    """The turn from `facing` to `target` for somebody at `origin`: degrees in [0, 360), counter-clockwise seen from above.
    Points are (..., 2)."""
    forward, step = facing - origin, target - origin
    across = forward[..., 0] * step[..., 1] - forward[..., 1] * step[..., 0]
    return np.degrees(np.arctan2(across, (forward * step).sum(-1))) % 360


# ------------------------------------------------------------------------------------------------
# 4. Questions
# ------------------------------------------------------------------------------------------------
# One generator a type, all with the same signature: view -> rows. A row is a dict with question, answer, options (choice
# questions only), objects (those to locate) and thought (the thinking trace); with Question.pair also second: what follows the
# frame's number in the name of the second picture, see scannet.second_picture. A candidate that a guard rejects is yielded as the
# reason, a string, so that rejections are counted. To add a type, write such a function and add it to GENERATORS.


@dataclass
class View:
    """Some pictures of a room, and what can be asked about them."""

    room: Room
    data_type: str  # single_image, multi_view, video
    frames: list  # in temporal order; empty where there are no pictures: then every object counts as visible
    boxes: list  # for each frame {number of a visible object: box}
    glimpsed: list  # for each frame the numbers of all objects with at least one unoccluded vertex
    rng: random.Random
    rules: dict = field(default_factory=lambda: RULES)

    def visible_objects(self):
        """Objects that are visible in at least one picture."""
        return [o for o in self.room.objects if not self.frames or any(o.number in boxes for boxes in self.boxes)]

    def unique(self):
        """Visible objects whose label is unambiguous, shuffled: no other object in the picture (with several pictures: in the
        room) has this label, or one that ends in it ("chair", "office chair")."""
        others = self.room.objects
        if self.data_type == "single_image" and self.frames:
            others = [o for o in others if o.number in self.glimpsed[0]]
        labels = Counter(o.label for o in others)
        found = [
            o for o in self.visible_objects()
            if labels[o.label] == 1 and (self.frames or self.room.counts[o.label] == 1) and not is_ambiguous(o.label, labels)
        ]  # fmt: skip
        return self.rng.sample(found, len(found))

    def groups(self, ordered, unordered=0):
        """Groups of unique objects: the first `ordered` in every order, the others in one order; a random sample of
        rules["tries"] if there are more."""
        things, tries = self.unique(), self.rules["tries"]
        if len(things) < ordered + unordered:
            return []
        if math.perm(len(things), ordered) * math.comb(len(things) - ordered, unordered) <= 2 * tries:
            out = [
                (*first, *rest)
                for first in itertools.permutations(things, ordered)
                for rest in itertools.combinations([thing for thing in things if thing not in first], unordered)
            ]
            return self.rng.sample(out, min(tries, len(out)))
        found = {}
        while len(found) < tries:
            some = self.rng.sample(things, ordered + unordered)
            found.setdefault((*some[:ordered], frozenset(some[ordered:])), some)
        return list(found.values())

    def distance(self, a, b):
        """Closest-point distance of two objects in metres, cached in the room."""
        key = tuple(sorted((a.number, b.number)))
        if key not in self.room.distances:
            self.room.distances[key] = closest_distance(a, b)
        return self.room.distances[key]

    def options(self, correct, wrong):
        """([texts of the options], letter of the correct one). Places the correct option at the letter used least often in
        this room so far, and shuffles the others."""
        used = self.room.letters.setdefault(len(wrong) + 1, Counter())
        least = min(used[place] for place in range(len(wrong) + 1))
        place = self.rng.choice([place for place in range(len(wrong) + 1) if used[place] == least])
        used[place] += 1
        words = self.rng.sample(wrong, len(wrong))
        words.insert(place, correct)
        return words, "ABCDEFGH"[place]


def is_ambiguous(label, labels):
    """Whether another label ends in this one: "office chair" makes "chair" ambiguous."""
    return any(other.endswith(f" {label}") for other in labels)


def lettered(words):
    """["A. left", "B. right", ...]"""
    return [f"{letter}. {word}" for letter, word in zip("ABCDEFGH", words)]


def listed(words):
    """The words as "left, right, front, or back"."""
    return f"{', '.join(words[:-1])}{',' if len(words) > 2 else ''} or {words[-1]}"


def counted(numbers, view):
    """Metres as a thought writes them: ["0.4", "-1.2"]; in the toy whole numbers of steps."""
    step = view.rules["step_m"] * (1 if len(view.frames) > 1 else 0.5)
    return decimals([x / step for x in numbers], 0) if step else decimals(numbers)


def offset_words(right, front, digits=1):
    """["right 1.2", "front 0.4"]: a step as a camera sees it; front is farther from the camera."""
    side, along = "right" if right > 0 else "left", "front" if front > 0 else "back"
    return [f"{side} {abs(right):.{digits}f}", f"{along} {abs(front):.{digits}f}"]


def step_between(a, b, view):
    """How far a is to the right of b and beyond it for the camera of the first picture: the difference of their places as a
    thought writes them, so that its arithmetic is exact."""
    (ax, ay), (bx, by) = (map(float, counted(place_of(view, thing)[:2], view)) for thing in (a, b))
    return round(ax - bx, 1), round(ay - by, 1)


def heading(a, b, view):
    """The angle of the step from b to a to the left of the first camera's viewing direction, in units of heading_deg."""
    right, front = step_between(a, b, view)
    unit = view.rules["heading_deg"]
    return round(math.degrees(math.atan2(-right, front)) / unit) % (360 // unit)


def step_words(a, b, view):
    """["lamp 0.4,2.1 from bed -0.8,1.7: right 1.2, front 0.4"]: the step from b to a. What is subtracted stands beside the
    result, under its name: a small model learns neither to look it up by its place in a list nor to subtract from afar. Empty if
    there are no pictures."""
    if not view.frames:
        return []
    names = (f"{thing.label} {','.join(counted(place_of(view, thing)[:2], view))}" for thing in (a, b))
    digits = 0 if view.rules["step_m"] else 1
    return [f"{' from '.join(names)}: {', '.join(offset_words(*step_between(a, b, view), digits))}"]


def turn_words(angle, verdict, full=360):
    """The thought behind a bearing: "turn 30 to the left: left". full: the angle of a whole turn, 360 for degrees."""
    return f"{f'turn {angle:.0f} to the left' if angle < full / 2 else f'turn {full - angle:.0f} to the right'}: {verdict}"


def well_apart(view, group):
    """Whether three objects are neither too near nor too far apart for a question about standing by one of them."""
    spans = [view.distance(a, b) for a, b in itertools.combinations(group, 2)]
    return view.rules["stand_near_m"] <= min(spans) and max(spans) <= view.rules["stand_far_m"]


def relative_direction(view):
    """Where is an object? One picture: from another object, as the camera sees it. Else: for somebody standing in the room."""
    return camera_direction(view) if view.data_type == "single_image" else standing_direction(view)


def camera_direction(view):
    """From the camera, where is A from B? The four axes near an axis, the four diagonals between them. Front is farther away."""
    for a, b in view.groups(2):
        right, front = camera_offset(a, b, view.frames[0].pose)
        if math.hypot(right, front) < view.rules["direction_m"]:
            yield "too near"
            continue
        angle = math.degrees(math.atan2(abs(front), abs(right)))  # 0 = sideways, 90 = along the viewing direction
        off_axis = min(angle, 90 - angle)
        if abs(off_axis - RULES["axis_deg"]) < RULES["guard_deg"]:
            yield "near the border of two answers"
            continue
        side, along = ("right" if right > 0 else "left"), ("front" if front > 0 else "back")
        if off_axis < RULES["axis_deg"]:
            words, verdict = ["left", "right", "front", "back"], side if angle < 45 else along
        else:
            words, verdict = ["left-front", "left-back", "right-front", "right-back"], f"{side}-{along}"
        yield {
            "question": f"From the camera's perspective, is the {a.label} to the {b.label}'s {listed(words)}?",
            "options": lettered(words), "answer": "ABCD"[words.index(verdict)], "objects": [a, b],
            "thought": f"{', '.join(offset_words(right, front))}: {verdict}",
        }  # fmt: skip


# Standing by P and facing O: answers and their sectors, in degrees counter-clockwise from straight ahead. The wording is
# VSI-Bench's, so that training and benchmark ask the same question.
STANDING = {
    "hard": ({"front-left": (0, 90), "back-left": (90, 180), "back-right": (180, 270), "front-right": (270, 360)},
             "to my front-left, front-right, back-left, or back-right? The directions refer to the quadrants of a Cartesian "
             "plane (if I am standing at the origin and facing along the positive y-axis)."),
    "medium": ({"left": (0, 135), "back": (135, 225), "right": (225, 360)},
               "to my left, right, or back? An object is to my back if I would have to turn at least 135 degrees in order to "
               "face it."),
    "easy": ({"left": (0, 180), "right": (180, 360)}, "to the left or the right of the {facing}?"),
}  # fmt: skip


def standing_direction(view):
    """Standing by P and facing O, where is Q? Several views: quadrants. Video: quadrants, left/right/back or left/right."""
    for group in view.groups(3):
        if not well_apart(view, group):
            yield "too near or too far"
            continue
        place, facing, target = group
        sectors, words = STANDING[view.rng.choice(list(STANDING)) if view.data_type == "video" else "hard"]
        angle = float(bearing(place.centre[:2], facing.centre[:2], target.centre[:2]))
        if min(abs((angle - start + 180) % 360 - 180) for start, _ in sectors.values()) < RULES["guard_deg"]:
            yield "near the border of two answers"
            continue
        verdict, (start, end) = next(item for item in sectors.items() if item[1][0] <= angle < item[1][1])
        ways = [heading(o, place, view) for o in (facing, target)] if view.frames else []
        unit = view.rules["heading_deg"]
        if ways and not start < unit * (turn := (ways[1] - ways[0]) % (360 // unit)) < end:
            yield "a thought's rounded numbers would say something else"
            continue
        turns = bearing(place.centre[:2], facing.centre[:2], corners(target)[:, :2])  # (8,)
        if ((turns < start) | (turns >= end)).sum() > RULES["stand_corners"]:
            yield "extends over the border of two answers"
            continue
        options, answer = list(sectors), "ABCD"[list(sectors).index(verdict)]
        if view.rules["shuffled"]:
            options, answer = view.options(verdict, [word for word in sectors if word != verdict])
        yield {
            "question": f"If I am standing by the {place.label} and facing the {facing.label}, is the {target.label} "
                        + words.format(facing=facing.label),
            "options": lettered(options), "answer": answer, "objects": [place, facing, target],
            "thought": "; ".join([
                *(f"{words} at {way}" for o, way in zip((facing, target), ways) for words in step_words(o, place, view)),
                f"from {ways[0]} to {ways[1]} {turn_words(turn, verdict, 360 // unit)}" if ways else turn_words(angle, verdict),
            ]),
        }  # fmt: skip


def relative_distance(view):
    """Which object is the closest to another? One picture: of two objects. Several views: of two to four. Video: of four."""
    most = view.rules["compared"]
    count = {"single_image": 2, "multi_view": view.rng.randint(2, most), "video": most}[view.data_type]
    gap = view.rules["gap_large_m" if view.room.floor_area > RULES["large_room_m2"] else "gap_m"]
    for reference, *others in view.groups(1, count):
        others.sort(key=lambda o: view.distance(o, reference))
        spans = [view.distance(o, reference) for o in others]
        if spans[0] < RULES["min_nearest_m"]:
            yield "too near"
            continue
        if min(b - a for a, b in zip(spans, spans[1:])) <= gap:
            yield "distances too similar"
            continue
        labels, answer = view.options(others[0].label, [o.label for o in others[1:]])
        ordered = sorted(others, key=lambda o: labels.index(o.label))
        steps, nearest = [], None  # each option is compared with the nearest before it: two numbers, side by side
        for letter, o in zip("ABCD", ordered):
            apart = (view.distance(o, reference), letter)
            words = ", ".join([*step_words(o, reference, view), f"{letter} apart {apart[0]:.1f}"])
            steps.append(words if not nearest else f"{words}, {nearest[1]} apart {nearest[0]:.1f}: {min(nearest, apart)[1]}")
            nearest = min(nearest or apart, apart)
        which = f"which of these{' two' if count == 2 else ''} objects ({', '.join(labels)}) is"
        yield {
            "question": f"Measuring from the closest point of each object, {which} {'closer' if count == 2 else 'the closest'} "
                        f"to the {reference.label}?",
            "options": lettered(labels), "answer": answer, "objects": [*ordered, reference],
            "thought": "; ".join(steps),
        }  # fmt: skip


def absolute_distance(view):
    """The distance between two objects in metres, one decimal."""
    for a, b in view.groups(0, 2):
        distance = view.distance(a, b)
        if distance < RULES["min_distance_m"]:
            yield "too near"
            continue
        yield {
            "question": "Measuring from the closest point of each object, what is the distance between "
                        f"the {a.label} and the {b.label} (in meters)?",
            "answer": f"{distance:.1f}", "objects": [a, b],
            "thought": ", ".join([*step_words(a, b, view), f"apart {distance:.1f}"]),
        }  # fmt: skip


def object_size(view):
    """The longest side of an object in centimetres."""
    for thing in view.unique():
        size = round(100 * thing.sides.max())
        yield {
            "question": "What is the length of the longest dimension (length, width, or height) of the "
                        f"{thing.label}, measured in centimeters?",
            "answer": str(size), "objects": [thing], "thought": f"size {size}",
        }  # fmt: skip


def object_count(view):
    """How many objects of a label are there? A video shows the whole room: count there. Else: count in the pictures."""
    visible = view.visible_objects()
    for label in sorted({o.label for o in visible}):
        same = [o for o in visible if o.label == label]
        present = [o for o in view.room.objects if o.label == label]
        if view.frames and view.data_type != "video":
            present = [o for o in present if any(o.number in numbers for numbers in view.glimpsed)]
        count = len(same) if view.frames else view.room.counts[label]
        if count < RULES["min_count"]:
            yield "too few"
        elif len(present) > len(same):
            yield "not all are clearly visible"
        elif count != len(same):
            yield "the source's count differs"
        elif is_ambiguous(label, {o.label for o in view.room.objects}):
            yield "another label ends in this one"
        else:
            if view.frames:
                same.sort(key=partial(place_in_pictures, view))
            where = "are in this room" if view.data_type == "video" else "appear"
            yield {"question": f"How many {label}(s) {where}?", "answer": str(count), "objects": same, "thought": f"count {count}"}


def room_size(view):
    """The area of the floor plan in square metres, one decimal. One question a room."""
    sides = f"sides {' by '.join(decimals(view.room.sides))}, " if view.room.sides else ""
    yield {
        "question": "What is the size of this room (in square meters)? If multiple rooms are shown, estimate the size of the "
                    "combined space.",
        "answer": f"{view.room.floor_area:.1f}", "objects": [], "thought": f"{sides}floor {view.room.floor_area:.1f}",
    }  # fmt: skip


def appearance_order(view):
    """In which order do four labels first appear in the video? The wrong options are three other orders."""
    first, picture, shown = {}, {}, {}  # label -> second of its first appearance, number of that picture, its object there
    labels = {o.label for o in view.visible_objects()} if view.frames else set()
    for label in sorted(label for label in labels if not is_ambiguous(label, labels)):
        numbers = {o.number for o in view.room.objects if o.label == label}
        clear = next(i for i, boxes in enumerate(view.boxes) if numbers & set(boxes))
        shown[label] = next(o for o in view.room.objects if o.label == label and o.number in view.boxes[clear])
        if any(numbers & some for some in view.glimpsed[:clear]):
            yield "partly visible before it is clearly visible"
        else:
            first[label], picture[label] = view.frames[clear].number / RULES["frames_per_second"], clear + 1
    fours = list(itertools.combinations(sorted(first), 4))
    for four in view.rng.sample(fours, min(len(fours), RULES["tries"])):
        order = sorted(four, key=first.get)
        if min(first[b] - first[a] for a, b in zip(order, order[1:])) <= RULES["apart_s"]:
            yield "appear at nearly the same time"
            continue
        asked, orders = view.rng.sample(order, 4), {", ".join(x): x for x in itertools.permutations(order)}  # the right one first
        options, answer = view.options(", ".join(order), view.rng.sample(list(orders)[1:], 3))
        yield {
            "question": "What will be the first-time appearance order of the following categories in the video: "
                        f"{', '.join(asked)}?",
            "options": lettered(options), "answer": answer, "objects": [shown[label] for label in asked],
            "thought": "; ".join(order_words(letter, orders[option], picture) for letter, option in zip("ABCD", options)
                                 if letter <= answer),
        }  # fmt: skip


def order_words(letter, labels, picture):
    """A thought about one option: its labels with the numbers of their pictures, up to the first that comes too early: "A. lamp
    3, bed 1: no", or "B. bed 1, lamp 3: yes"."""
    numbers = [picture[label] for label in labels]
    early = next((i for i in range(1, len(labels)) if numbers[i] < numbers[i - 1]), None)
    words = [f"{label} {number}" for label, number in zip(labels, numbers)][: early and early + 1]
    return f"{letter}. {', '.join(words)}: {'no' if early else 'yes'}"


def perspective_taking(view):
    """Standing at P and looking at O in the picture, where is Q? Four of eight directions (ViewSpatial-Bench's "person
    perspective")."""
    words = ["front", "front-left", "left", "back-left", "back", "back-right", "right", "front-right"]
    for group in view.groups(3):
        if not well_apart(view, group):
            yield "too near or too far"
            continue
        place, facing, target = group
        angle = float(bearing(place.centre[:2], facing.centre[:2], target.centre[:2]))
        if abs((angle + 22.5) % 45 - 22.5) > 22.5 - RULES["guard_deg"]:
            yield "near the border of two answers"
            continue
        verdict = words[round(angle / 45) % 8]
        options, answer = view.options(verdict, view.rng.sample([word for word in words if word != verdict], 3))
        yield {
            "question": f"Imagine you are standing at the {place.label} and looking towards the {facing.label}. Where is the "
                        f"{target.label}?",
            "options": lettered(options), "answer": answer, "objects": [place, facing, target],
            "thought": turn_words(angle, verdict),
        }  # fmt: skip


def view_change(view):
    """How did the camera move, or turn, between two of the pictures? (SPAR's view change, Actial's viewpoints)"""
    for i, j in itertools.combinations(range(len(view.frames)), 2):
        before, after = view.frames[i].pose, view.frames[j].pose
        right, forward = level_axes(before)
        step = after[:2, 3] - before[:2, 3]
        side, ahead = float(step @ right), float(step @ forward)
        turned = float(bearing(np.zeros(2), forward, level_axes(after)[1]))  # counter-clockwise: to the left
        turned = turned if turned < 180 else turned - 360
        start = f"From picture {i + 1} to picture {j + 1}, did the camera mainly"
        if view.rng.random() < 0.5:
            small, large = sorted((abs(side), abs(ahead)))
            if large < RULES["move_m"] or small > large / 2:
                yield "no clear movement"
                continue
            words = ["forward", "backward", "left", "right"]
            verdict = ("right" if side > 0 else "left") if abs(side) > abs(ahead) else "forward" if ahead > 0 else "backward"
            question, thought = f"{start} move {listed(words)}?", f"right {side:.1f}, ahead {ahead:.1f}: {verdict}"
        else:
            if not RULES["turn_deg"] <= abs(turned) <= 180 - RULES["guard_deg"]:
                yield "no clear turn"
                continue
            words, verdict = ["left", "right"], "left" if turned > 0 else "right"
            question, thought = f"{start} turn {listed(words)}?", f"turned {abs(turned):.0f} degrees to the {verdict}"
        yield {
            "question": question, "options": lettered(words), "answer": "ABCD"[words.index(verdict)], "objects": [],
            "thought": thought,
        }  # fmt: skip


def with_depth(generate):
    """A generator of the rows of `generate`, whose second picture shows the depth of the first (TinyGiantVLM)."""

    def generator(view):
        far = f"{view.rules['depth_m']:g}"
        words = f"The second picture shows depth: dark blue is 0 m, yellow is {far} m or more, black is unknown."
        for row in generate(view):
            yield row if isinstance(row, str) else row | {"question": f"{words} {row['question']}", "second": f"depth_{far}.png"}

    return generator


def object_in_crop(view):
    """Which object is in a part of the picture, shown as the second picture? (The regions of RegionSpot.) No wrong option is
    the label of an object that the part may show, too."""
    boxes, labels = view.boxes[0], {o.label for o in view.room.objects}
    for thing in view.visible_objects():
        x1, y1, x2, y2 = box = boxes[thing.number]
        if min(x2 - x1, y2 - y1) < view.rules["crop_px"]:
            yield "too small"
            continue
        around = set()  # labels in the part; objects that are hardly visible have no box and may be anywhere
        for other in view.room.objects:
            a1, b1, a2, b2 = boxes.get(other.number, box)
            if other.number in view.glimpsed[0] and a1 < x2 and x1 < a2 and b1 < y2 and y1 < b2:
                around.add(other.label)
        wrong = [
            label for label in sorted(labels - around)
            if not is_ambiguous(label, around) and not any(is_ambiguous(other, {label}) for other in around)
        ]  # fmt: skip
        if not wrong:
            yield "no wrong option"
            continue
        options, answer = view.options(thing.label, view.rng.sample(wrong, min(3, len(wrong))))
        yield {
            "question": "The second picture is a part of the first. Which of these objects is in it?",
            "options": lettered(options), "answer": answer, "objects": [thing], "thought": f"second picture: {thing.label}",
            "second": f"crop_{x1}_{y1}_{x2}_{y2}.png",
        }  # fmt: skip


class Question(NamedTuple):
    """A question type: its generator and where it is used."""

    generate: Callable  # View -> rows
    pictures: list  # of single_image, multi_view, video
    toy: int = 0  # largest number of such questions about one picture of the toy; about several pictures six times as many
    places: tuple = ()  # for these pictures a thought of the toy also names the places of the objects on the floor
    extra: bool = False  # only with --extra
    pair: bool = False  # rows about one picture name a second one, made from it: their data_type becomes multi_view


GENERATORS = {
    "relative direction": Question(relative_direction, ["single_image", "multi_view", "video"], 1, ("multi_view", "video")),
    "relative distance": Question(relative_distance, ["single_image", "multi_view", "video"], 1, common.DATA_TYPES),
    "absolute distance": Question(absolute_distance, ["single_image", "multi_view", "video"], 1, common.DATA_TYPES),
    "object size": Question(object_size, ["single_image", "multi_view", "video"], toy=1),
    "object count": Question(object_count, ["multi_view", "video"], toy=2),
    "room size": Question(room_size, ["video"], toy=1),
    "appearance order": Question(appearance_order, ["video"], toy=1),
    "perspective taking": Question(perspective_taking, ["single_image"], extra=True),
    "view change": Question(view_change, ["multi_view"], extra=True),
    "relative distance with depth": Question(with_depth(relative_distance), ["single_image"], toy=1, extra=True, pair=True),
    "absolute distance with depth": Question(with_depth(absolute_distance), ["single_image"], toy=1, extra=True, pair=True),
    "object size with depth": Question(with_depth(object_size), ["single_image"], toy=1, extra=True, pair=True),
    "object in a crop": Question(object_in_crop, ["single_image"], toy=1, extra=True, pair=True),
}

# ------------------------------------------------------------------------------------------------
# 5. Rows and files
# ------------------------------------------------------------------------------------------------


def room_views(room, rng):
    """The views of a room: every 20th frame alone, windows of 8 frames, and a video of 16 frames. A room without frames has one
    view without pictures, which gets the questions of a video."""
    if not room.frames:
        return [View(room, "video", [], [], [], rng)]

    def spread(count):
        return [room.frames[round(i)] for i in np.linspace(0, len(room.frames) - 1, count)]

    thinned = []
    for frame in room.frames:
        if not thinned or frame.number - thinned[-1].number >= RULES["single_step"]:
            thinned.append(frame)
    groups = [("single_image", [frame]) for frame in thinned]
    if len(room.frames) >= RULES["views"]:
        some = spread(min(RULES["views_of"], len(room.frames)))
        starts = range(0, len(some) - RULES["views"] + 1, RULES["views_step"])
        groups += [("multi_view", some[i : i + RULES["views"]]) for i in starts]
    if len(room.frames) >= RULES["video_frames"]:
        groups.append(("video", spread(RULES["video_frames"])))
    return views_of(room, groups, rng, RULES)


def views_of(room, groups, rng, rules):
    """A View for each of `groups`, (data_type, frames)."""
    seen = {number: visible_boxes(room, f) for number, f in {f.number: f for _, group in groups for f in group}.items()}
    return [
        View(room, data_type, group, *([seen[f.number][i] for f in group] for i in (0, 1)), rng, rules)
        for data_type, group in groups
    ]  # fmt: skip


def toy_views(room, rng):
    """The views of a toy room: each of the eight pictures around a small room alone; of a room with a turning camera the first
    frame of every quarter alone, all four together, and all eight frames as a video."""
    tour = [frame.number for frame in room.frames] == list(toy_world.TOUR)
    first = room.frames[::2] if tour else room.frames
    groups = [("single_image", [frame]) for frame in first] + [("multi_view", first), ("video", room.frames)] * tour
    return views_of(room, groups, rng, TOY_RULES)


def rows_of_type(view, kind, rejected):
    """All rows of a type about a view, in the released schema, plus `thought` and the `objects` in the question. Rejections by
    guards are counted in `rejected`."""
    name, data_type = view.room.name, "multi_view" if GENERATORS[kind].pair else view.data_type
    for row in GENERATORS[kind].generate(view):
        if isinstance(row, str):
            rejected[f"{data_type}: {kind}: {row}"] += 1
            continue
        image = image_names(view) or [f"{name}.mp4"]
        image += [f"{name}/{view.frames[0].number}_{row.pop('second')}"] if GENERATORS[kind].pair else []
        yield {"options": None} | row | {"image": image, "question_type": kind, "data_type": data_type}


def image_names(view):
    """The names of a view's pictures, as in the rows."""
    return [f"{view.room.name}/{frame.number}.jpg" for frame in view.frames]


def place_of(view, thing):
    """Where an object is, in metres: (to the right of, ahead of, above) the camera of the first picture; in a room without
    pictures its coordinates."""
    if not view.frames:
        return thing.centre
    pose = view.frames[0].pose
    right, forward = level_axes(pose)
    step = thing.centre - pose[:3, 3]
    return step[:2] @ right, step[:2] @ forward, step[2]


def decimals(numbers, digits=1):
    """Numbers with so many decimals: ["0.4", "-1.2"]."""
    return [f"{round(x, digits) + 0.0:.{digits}f}" for x in numbers]  # + 0.0: no "-0.0"


def positions(view, objects):
    """The start of a thought about a real room, "chair (0.4, 2.1, -0.3), ...": see place_of."""
    return ", ".join(f"{thing.label} ({', '.join(decimals(place_of(view, thing)))})" for thing in objects)


def room_rows(room, settings, rng):
    """(rows of a room, {kind: how many passed the guards}, rejections). Of one type and kind of picture at most
    per_room_type rows are kept.

    A row also holds `thought`, `asked` (numbers of its objects) and, for a single image, `boxes` (a localisation answer).
    """
    rows, rejected = {}, Counter()
    for view in room_views(room, rng):
        for kind, question in GENERATORS.items():
            if view.data_type not in question.pictures or question.extra and not settings.extra:
                continue
            for row in rows_of_type(view, kind, rejected):
                objects = row.pop("objects")
                row["asked"] = [o.number for o in objects]
                row["thought"] = "; ".join(filter(None, [positions(view, objects), row["thought"]]))
                if row["data_type"] == "single_image":
                    row["boxes"] = [{"bbox_2d": view.boxes[0][o.number], "label": o.label} for o in objects]
                rows.setdefault((row["data_type"], kind), []).append(row)
    passed = {f"{data_type}: {kind}": len(some) for (data_type, kind), some in rows.items()}
    return [row for some in rows.values() for row in rng.sample(some, min(len(some), RULES["per_room_type"]))], passed, rejected


def process_scan(job):
    """Work of a process for one real room -> {"rows", "passed", "rejected", "skipped", "scaled"}, or {"failed": reason} if it
    cannot be read. job: (path, settings)."""
    path, settings = job
    try:
        room = read_room(settings, path)
        rows, passed, rejected = room_rows(room, settings, random.Random(f"{settings.seed} {room.name}"))
    except (Exception, SystemExit) as error:  # one bad room must not stop a long run: the manifest names it
        return {"failed": str(error) if isinstance(error, SystemExit) else f"{path}: {type(error).__name__}: {error}"}
    return {"rows": rows, "passed": passed, "rejected": rejected, "skipped": room.skipped, "scaled": room.scaled}


def balance(rows, targets, per_room, seed):
    """Choose rows so that each kind of picture reaches its target, shared evenly among its types as far as they reach, and no
    room gives more than per_room. targets: {data_type: number of rows, 0 = all}."""
    rng, groups, used, chosen = random.Random(seed), {}, Counter(), []
    for row in rows:
        groups.setdefault((row["data_type"], row["question_type"]), []).append(row)
    left = {data_type: count or len(rows) for data_type, count in targets.items()}
    for _, group in sorted(groups.items()):
        rng.shuffle(group)
    while groups:  # one row of every type in turn, the rarest type first
        for key, group in sorted(groups.items(), key=lambda item: (len(item[1]), item[0])):
            while group and used[room_of(group[-1])] >= per_room:
                group.pop()
            if not group or not left[key[0]]:
                del groups[key]
                continue
            chosen.append(group.pop())
            used[room_of(chosen[-1])] += 1
            left[key[0]] -= 1
    rng.shuffle(chosen)
    return chosen


def room_of(row):
    """The name of the room that a row is about."""
    return row["image"][0].split("/")[0].removesuffix(".mp4")


def spread_sample(kinds, count, seed):
    """`count` random indices of the list `kinds`, one of every kind in turn as far as they reach."""
    order, turn = [], Counter()
    for place in random.Random(seed).sample(range(len(kinds)), len(kinds)):
        order.append((turn[kinds[place]], kinds[place], place))
        turn[kinds[place]] += 1
    return [place for _, _, place in sorted(order)[:count]]


def write_rows(root, spatial, locate, traces, seed, objects=None):
    """Number the rows and write the JSONL files of a split. The `thought` of spatial rows becomes the solutions of the cold
    start. objects (the toy's): what each picture shows. Returns counts for the manifest."""
    for rows in (spatial, locate):
        for number, row in enumerate(rows):
            row.setdefault("question_id", number)
    thoughts = [row.pop("thought") for row in spatial]

    def solved(number, mode, solution):
        row = spatial[number]
        example = common.Example("", (), "", row["question_type"], row["question"], row["options"], row["answer"])
        return {"question_id": row["question_id"], "prompt": common.prompt_text(example, mode),
                "solution": solution.format(thoughts[number], row["answer"]), "image": row["image"],
                "data_type": row["data_type"], "question_type": row["question_type"]}  # fmt: skip

    chosen = spread_sample([kind_of(row) for row in spatial], traces, seed)
    tables = {"locate": locate, "spatial": spatial}
    tables["coldstart"] = [solved(number, "think", "<think> {} </think><answer>{}</answer>") for number in chosen]
    if objects is not None:
        tables["objects"] = objects
        tables["worked"] = [solved(number, "work", "{} <answer>{}</answer>") for number in range(len(spatial))]
    for kind, rows in tables.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_atomic(root / common.FILES.get(kind, f"{kind}.jsonl"), lines)
    counts = {kind: len(rows) for kind, rows in tables.items()}
    by_type, by_kind = (dict(Counter(some)) for some in ([row["question_type"] for row in spatial], map(kind_of, spatial)))
    return counts | {"by_type": by_type, "by_kind": by_kind}


def labelled_boxes(view, objects):
    """The stage-1 answer for some objects, each in the first picture that shows it: a name before its numbers, and of several
    pictures the number, from 1."""
    boxes = []
    for thing in objects:
        number = picture_of(view, thing)
        picture = {"picture": number + 1} if len(view.frames) > 1 else {}
        boxes.append({"label": thing.label, **picture, "bbox_2d": view.boxes[number][thing.number]})
    return boxes


def picture_of(view, thing):
    """The number, from 0, of the first picture in which an object is visible."""
    return next(number for number, boxes in enumerate(view.boxes) if thing.number in boxes)


def place_in_pictures(view, thing):
    """(number of the first picture that shows an object, its box there): to sort objects by."""
    return picture_of(view, thing), view.boxes[picture_of(view, thing)][thing.number]


def toy_thought(view, row, places, box_side):
    """The thinking trace of a toy row: stage-1 answers, token for token, then the comparison. With `places` it is one answer for
    each object, followed by where it is: "[{...}] red cube 0,2;" in metres to the right and ahead of the camera, or of several
    pictures "[{...}] picture 2: 0,2; red cube 2,0;", ahead of the camera of picture 2 and of the first. box_side: as in
    common.Family, the units of the model's boxes."""
    objects, side = row.pop("objects"), box_side or toy_world.SIDE
    boxes = [
        box | {"bbox_2d": common.scale_box(box["bbox_2d"], (toy_world.SIDE,) * 2, (side, side))}
        for box in labelled_boxes(view, objects)
    ]  # fmt: skip
    if not places:
        words = [common.boxes_text(boxes)]
    else:
        words = [f"{common.boxes_text([box])} {where_words(view, thing)}" for box, thing in zip(boxes, objects)]
    return " ".join([*words, row["thought"]] if objects else [row["thought"]])


def where_words(view, thing):
    """The words after a box in toy_thought."""
    picture, here = picture_of(view, thing), f"{thing.label} {','.join(counted(place_of(view, thing)[:2], view))};"
    own = replace(view, frames=view.frames[picture:])  # its first camera is that of the picture
    there = ",".join(counted(place_of(own, thing)[:2], view))
    return here if len(view.frames) == 1 else f"picture {picture + 1}: {there}; {here}"


def process_toy_room(job):
    """Work of a process for one toy room: make it, write it, read it back, generate its rows. Spatial rows carry their thought.
    job: (name, settings, root, detection: whether to ask for all objects, too)."""
    name, settings, root, detection = job
    rng, folder = random.Random(f"{settings.seed} {name}"), root / "scans" / name
    make = toy_world.make_room if int(name[5:9]) % 2 else toy_world.make_tour
    with files.disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)  # what an older version of the code has written
        toy_world.write_room(make(rng), folder, rng)
    room = read_scannet(folder, scannet.read_labels(root / "labels.tsv"))
    (root / "images" / name).mkdir(parents=True, exist_ok=True)
    for frame in room.frames:
        shutil.copyfile(frame.color, root / "images" / name / f"{frame.number}.jpg")
    out = {"locate": [], "spatial": [], "objects": [], "rejected": Counter()}
    for view in toy_views(room, rng):
        if (view.data_type == "single_image") == (make is toy_world.make_room):  # most pictures of a tour show one object
            out["locate"] += locate_rows(view, rng, detection)
        if view.data_type != "multi_view":  # single pictures and pairs of frames, for the base
            shown = [shown_objects(view, first) for first in range(0, len(view.frames), 2)]
            out["objects"] += [row for row in shown if row["objects"]]
        if make is toy_world.make_tour and view.data_type == "single_image":
            continue  # most of these show one object, whose size would be half of all questions
        for kind, question in GENERATORS.items():
            wanted = question.toy and view.data_type in question.pictures and (settings.extra or not question.extra)
            rows = list(rows_of_type(view, kind, out["rejected"])) if wanted else []
            for row in rng.sample(rows, min(len(rows), question.toy * (6 if make is toy_world.make_tour else 1))):
                for second in row["image"][1:] if question.pair else []:
                    frame = view.frames[0]
                    scannet.second_picture(second, frame.color, frame.depth, room.depth_shift).save(root / "images" / second)
                row["asked"] = [o.number for o in row["objects"]]
                row["boxes"] = labelled_boxes(view, row["objects"])
                places, family = view.data_type in question.places, common.FAMILIES[settings.backbone]
                row["thought"] = toy_thought(view, row, places, family.box_side)
                out["spatial"].append(row)
    return out


def locate_rows(view, rng, detection):
    """Localisation rows about a view of the toy: some of its objects by name, those of one name and, with `detection`, all.

    Without "all objects" the model draws good boxes around the wrong objects: held-out IoU .23 after 700 steps, against .57.
    Only rows about several pictures teach in which picture an object is: without them it stays a guess through stages 2 and 3.
    """
    visible, asked = sorted(view.visible_objects(), key=partial(place_in_pictures, view)), []
    for _ in range(1 if len(view.frames) == 1 else 5):
        named = view.unique()[: rng.choice([1, 2, 2, 3, 3])]
        names = [f"the {o.label}" for o in named]
        asked.append(("Locate " + " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) + ".", named))
    if len(view.frames) > 1:
        several = [label for label, count in view.room.counts.items() if count > 1]
        asked += [(f"Locate every {label}.", [o for o in visible if o.label == label]) for label in several]
    asked += [("Locate all objects.", visible)] * detection
    return [
        {"question": question, "answer": labelled_boxes(view, objects), "image": image_names(view), "data_type": view.data_type}
        for question, objects in asked if objects
    ]  # fmt: skip


def shown_objects(view, first):
    """What a picture of the toy shows or, in a video, two frames from number `first` on: a row of objects.jsonl."""
    some = replace(view, frames=view.frames[first : first + 2], boxes=view.boxes[first : first + 2])
    return {"image": image_names(some), "objects": labelled_boxes(some, some.visible_objects())}


def build_toy(root, rooms, first, settings, traces, detection, targets, made_from=""):
    """Build `rooms` toy rooms under `root`, numbered from `first`, and write the JSONL files. targets: see balance; made_from: see
    jobs.process_rooms. Returns counts for the manifest."""
    root.mkdir(parents=True, exist_ok=True)
    toy_world.write_labels(root / "labels.tsv")
    names = [f"scene{first + i:04d}_00" for i in range(rooms)]
    todo = [(name, made_from, (name, settings, root, detection)) for name in names]
    parts = jobs.process_rooms(process_toy_room, todo, root, settings.workers, f"rooms of {root.name}")
    spatial, locate, objects = ([row for part in parts for row in part[kind]] for kind in ("spatial", "locate", "objects"))
    spatial = balance(spatial, targets, 1000, settings.seed)
    labels = scannet.read_labels(root / "labels.tsv")
    entries = gallery_entries(spatial, cache(lambda name: read_scannet(root / "scans" / name, labels)), root, settings.seed)
    files.write_atomic(root / "gallery.html", report.gallery_page(entries))
    counts = write_rows(root, spatial, locate, traces, settings.seed, objects)
    return counts | {"rejected": jobs.sum_counts(part["rejected"] for part in parts)}


def build_real(settings, root, rooms, made_from):
    """Build a data set from ScanNet rooms (or from boxes alone) under `root`. made_from: {room: fingerprint of its inputs}.
    Returns facts for the manifest."""
    todo = [(name, made_from[name], (path, settings)) for name, path in rooms.items()]
    parts = dict(zip(rooms, jobs.process_rooms(process_scan, todo, root, settings.workers, "rooms")))
    failed = {name: part["failed"] for name, part in parts.items() if "failed" in part}
    good = [part for part in parts.values() if "failed" not in part]
    if not good:
        raise SystemExit(f"none of the {len(rooms)} rooms of {settings.scannet} could be read; the first: {[*failed.values()][0]}")
    for name, reason in list(failed.items())[:5]:
        common.print0(f"left out {name}: {reason}")
    scaled = {name: part["scaled"] for name, part in parts.items() if part.get("scaled")}
    if scaled:
        common.print0(f"scaled the intrinsics of {len(scaled)} rooms such as {next(iter(scaled))} to the size of their pictures")
    targets = {"single_image": settings.single_rows, "multi_view": settings.multi_rows, "video": settings.video_rows}
    candidates = [row for part in good for row in part["rows"]]
    rows = balance(candidates, targets, settings.per_room, settings.seed)
    if not rows:
        raise SystemExit(f"no question passed the guards in the {len(good)} rooms of {settings.scannet}.")
    kinds, locate = [kind_of(row) for row in rows], []
    entries = gallery_entries(rows, cache(lambda name: read_room(settings, rooms[name])), root, settings.seed)
    for number, row in enumerate(rows):
        if boxes := row.get("boxes"):
            locate.append({"question": row["question"], "answer": boxes, "image": row["image"], "data_type": row["data_type"],
                           "question_id": number})  # fmt: skip
    counts = write_rows(root, rows, locate, settings.traces, settings.seed)
    if settings.source == "scannet":
        frames = cache(lambda room: scannet.frame_files(rooms[room]))
        for name in tqdm(sorted({name for row in rows for name in row["image"]}), desc="pictures"):
            scannet.write_picture(root / "images" / name, *frames(name.split("/")[0]))
    files.write_atomic(root / "gallery.html", report.gallery_page(entries))
    return {
        "counts": counts,
        "by_kind": jobs.sum_counts([Counter(kinds)]),
        "letters": jobs.sum_counts([Counter(row["answer"] for row in rows if row["options"])]),
        "passed": jobs.sum_counts(part["passed"] for part in good),
        "candidates": jobs.sum_counts([Counter(map(kind_of, candidates))]),
        "rejected": jobs.sum_counts(part["rejected"] for part in good),
        "skipped": jobs.sum_counts(part["skipped"] for part in good),
        "scaled_intrinsics": scaled,
        "failed_rooms": failed,
        "rooms": len(good),
    }


def kind_of(row):
    """The kind of pictures and the type of a row: "video: room size"."""
    return f"{row['data_type']}: {row['question_type']}"


def gallery_entries(rows, read, root, seed):
    """Two rows of every kind for the gallery, as gallery_entry describes them. read: the name of a room -> the room. Removes
    `asked` from all rows."""
    kinds = [kind_of(row) for row in rows]
    some = spread_sample(kinds, sum(min(n, 2) for n in Counter(kinds).values()), seed)
    shown = [rows[i] for i in sorted(some, key=lambda i: kinds[i])]
    entries = [gallery_entry(row, read(room_of(row)), root / "images") for row in tqdm(shown, "gallery")]
    for row in rows:
        del row["asked"]
    return entries


def gallery_entry(row, room, images=Path()):
    """What report.gallery_page shows of a row: its texts, pictures with the boxes of its objects, and the room from above.
    images: the folder with the second pictures."""
    frames = [frame for frame in room.frames if f"{room.name}/{frame.number}.jpg" in row["image"]]
    asked = {o.number: o.label for o in room.objects if o.number in row["asked"]}
    boxes = [visible_boxes(room, frame)[0] for frame in frames]
    return {name: row[name] for name in ("question", "options", "answer", "thought")} | {
        "title": f"{row['question_type']}, {row['data_type'].replace('_', ' ')}", "room": room.name,
        "pictures": [
            (frame.color, [(some[number], label) for number, label in asked.items() if number in some])
            for frame, some in zip(frames, boxes)
        ] + [(images / name, []) for name in row["image"] if name.endswith(".png")],
        "objects": [(report.outline(corners(o)[:, :2]), o.centre[:2], asked.get(o.number)) for o in room.objects],
        "cameras": [(frame.pose[:2, 3], level_axes(frame.pose)[1]) for frame in frames],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------
# 6. Main
# ------------------------------------------------------------------------------------------------

# The settings that decide what the data is: data made with others is not resumed.
REAL_CONFIG = ("source", "scannet", "seed", "allow_val", "extra", "single_rows", "multi_rows", "video_rows", "per_room", "traces")
TOY_ROWS = {"single_image": 10 / 3, "multi_view": 10 / 3, "video": 4.4}  # questions for each training room, see balance
TOY_CONFIG = ("seed", "extra", "rooms", "heldout_rooms", "traces", "backbone")
RULES_FACTS = {  # for the manifest
    "rules": {name: {"value": value, "from": origin, "meaning": text} for name, (value, origin, text) in RULE_TABLE.items()},
    "dropped_nyu40": sorted(scannet.DROPPED_NYU40),
}


def inputs_of(settings, config, rooms):
    """{room: fingerprint of what its rows are made from}: the settings, the code, the labels, and the files of its scan."""
    source = Path(settings.scannet) / ("" if settings.source == "meta" else scannet.LABELS)
    common_part = jobs.fingerprint(config, Path(__file__), Path(scannet.__file__), source)
    return {name: jobs.fingerprint(common_part, path) for name, path in tqdm(rooms.items(), "files", disable=len(rooms) < 50)}


def real_data(settings):
    """Data from ScanNet rooms, or from boxes alone."""
    root = Path(settings.out if settings.out != f"runs/{settings.preset}/base" else f"data/{settings.source}")
    config = {name: getattr(settings, name) for name in REAL_CONFIG}
    if not settings.scannet:
        raise SystemExit(f"--source {settings.source} needs --scannet: the folder with scans/, or the JSON file of boxes.")
    rooms = list_rooms(settings)
    made_from = inputs_of(settings, config, rooms)
    everything = jobs.fingerprint(made_from)
    if not jobs.prepare(root, config, settings, everything):
        return
    facts = build_real(settings, root, rooms, made_from)
    jobs.finish(root, {"config": config, "made_from": everything} | RULES_FACTS | facts)
    print(f"wrote {root} from {facts['rooms']} rooms ({len(facts['failed_rooms'])} left out)")
    print(f"{'rows':>8} {'passed':>8} {'rejected by a guard':>20}")
    for name, count in facts["by_kind"].items():
        rejected = sum(n for reason, n in facts["rejected"].items() if reason.startswith(f"{name}: "))
        print(f"{count:8} {facts['passed'][name]:8} {rejected:20}  {name}")


def toy_data(settings):
    """The toy's data. Of the held-out rooms all rows are kept."""
    root, config = Path(settings.data), {name: getattr(settings, name) for name in TOY_CONFIG}
    made_from = jobs.fingerprint(config, Path(__file__), Path(scannet.__file__), Path(toy_world.__file__))
    if os.environ.get("RANK", "0") != "0" or not jobs.prepare(root, config, settings, made_from):
        return
    targets = {data_type: round(share * settings.rooms) for data_type, share in TOY_ROWS.items()}
    train = build_toy(root, settings.rooms, 0, settings, settings.traces, True, targets, made_from)
    everything = dict.fromkeys(common.DATA_TYPES, 0)
    heldout = build_toy(root / "heldout", settings.heldout_rooms, settings.rooms, settings, 0, False, everything, made_from)
    with files.disk_errors(root / "gallery.png"):
        report.draw_gallery(root, settings.seed).save(root / "gallery.png")
    jobs.finish(root, {"config": config, "made_from": made_from} | RULES_FACTS | {"counts": {"train": train, "heldout": heldout}})
    print(f"wrote {root}: " + ", ".join(f"{n} {kind}" for kind, n in train["by_type"].items()))


def main():
    """Build the data, and the toy's base. What is complete is kept."""
    settings = runs.parse_settings(DataSettings, PRESETS, "base")
    settings.traces = settings.traces or (600 if settings.source == "toy" else 1255)
    with runs.handle_signals(settings), files.disk_errors(settings.out):
        (toy_data if settings.source == "toy" else real_data)(settings)
    if settings.source == "toy" and not toy_world.is_base_made(settings):
        runs.launch(toy_world.train_base, settings)


if __name__ == "__main__":
    main()
