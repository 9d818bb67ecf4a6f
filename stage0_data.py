"""Stage 0, data: scenes in, SpatialLadder-format rows out. And the toy's base model.

The paper (arXiv 2510.08531, section 3) describes this pipeline; its authors did not publish it. Here a toy world stands
in for ScanNet: rooms with coloured solids, rendered by a pinhole camera, WRITTEN in ScanNet's own layout and READ BACK by
the same read_scannet that reads the real thing. One reader, one projection, one set of question generators.

    python stage0_data.py            # data/toy and runs/toy/base, two and a half minutes on two cores

You get data/toy/{spld_grounding_data,spld_spatial_data,spld_coldstart_data}.jsonl with images/, the same under
data/toy/heldout from other rooms, manifest.json (seed, counts, every threshold), gallery.png, and runs/toy/base/model: a
tiny Qwen2.5-VL with random weights whose vision tower has learnt to see coloured solids, as Qwen's own has learnt to see
ours, and whose language model knows nothing yet.
"""

import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from plyfile import PlyData, PlyElement
from scipy.spatial import ConvexHull, QhullError, cKDTree
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

import common
from common import Settings, setting

# ------------------------------------------------------------------------------------------------
# 1. Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class DataSettings(Settings):
    """Stage 0. --model is not used here; --max-steps shortens the training of the base."""

    rooms: int = setting(1500, "training rooms; each is photographed from eight sides")
    heldout_rooms: int = setting(160, "held-out rooms, never trained on")
    traces: int = setting(600, "thinking traces for the cold start (the paper: 1,255 for 20,681 questions)")
    base_steps: int = setting(600, "steps of the base's vision training")
    base_batch: int = setting(32, "pictures in such a step")


PRESETS = {"toy": {}}

# Thresholds of the questions; all of them are written into manifest.json. DATA.md-style notes: [V] = as verified in the
# authors' published code or rows, [ours] = unpublished, our choice.
RULES = {
    "occlusion_m": 0.1,  # [V] a point is occluded when it lies this much behind the depth picture
    "visible_share": 0.25,  # [ours] an object is visible when this share of its projected vertices is unoccluded ...
    "visible_pixels": 400 / (1296 * 968),  # [ours] ... and its box covers this share of the picture
    "axis_deg": 22.5,  # [V] nearer than this to an axis: left/right/front/back, else the four diagonals
    "guard_deg": 10.0,  # [ours] directions this near to the border between two answers are not asked
    "min_distance_m": 0.2,  # [V] shortest absolute distance asked
    "min_nearest_m": 0.15,  # [V] shortest distance of the nearest candidate
    "gap_m": 0.3,  # [V] smallest difference between two compared distances: 0.15, in large rooms 0.3; toy pixels are large
    "min_count": 2,  # [V] smallest number of instances in a counting question
}
DROPPED_NYU40 = {0, 1, 2, 22, 38, 39, 40}  # wall, floor, ceiling, otherstructure, otherfurniture, otherprop, none

# ------------------------------------------------------------------------------------------------
# 2. The toy world
# ------------------------------------------------------------------------------------------------

COLOURS = {"red": (214, 48, 49), "green": (46, 160, 67), "blue": (52, 90, 220), "yellow": (238, 212, 60),
           "purple": (150, 70, 190), "cyan": (70, 200, 210)}  # fmt: skip
SHAPES = ("cube", "ball", "cone")
SIDE = 112  # pixels: 4 x 4 picture tokens of 28 x 28
FOCAL = 126.0
PITCH = math.radians(60)  # down: what is nearer stands lower in the picture
CAMERA_HEIGHT, CAMERA_BACK = 5.5, 3.2  # metres above the floor and behind the middle of the room
ROOM = 5.0  # metres


def toy_intrinsics():
    """3x3 pinhole matrix. Pixel centres are at whole numbers, as in ScanNet."""
    return np.array([[FOCAL, 0, (SIDE - 1) / 2], [0, FOCAL, (SIDE - 1) / 2], [0, 0, 1]])


def toy_camera(yaw):
    """Camera-to-world (4, 4) looking down at the middle of the room from the side `yaw`. Axes: x right, y down, z gaze."""
    back = np.array([-math.sin(yaw), math.cos(yaw), 0.0])  # horizontal direction of the gaze
    right = np.array([math.cos(yaw), math.sin(yaw), 0.0])
    gaze = math.cos(PITCH) * back + np.array([0, 0, -math.sin(PITCH)])
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(gaze, right), gaze], axis=1)
    pose[:3, 3] = -CAMERA_BACK * back + np.array([0, 0, CAMERA_HEIGHT])
    return pose


def project(points, pose, intrinsics):
    """World points (n, 3) -> pixels u, v and depth z, each (n,). pose is camera-to-world; z <= 0 is behind the camera."""
    camera = (points - pose[:3, 3]) @ pose[:3, :3]  # (n, 3)
    z = camera[:, 2]
    uv = camera @ intrinsics.T  # (n, 3)
    safe = np.where(z > 1e-6, z, np.inf)
    return uv[:, 0] / safe, uv[:, 1] / safe, z


def make_room(rng):
    """A room as a dict: solids (shape, colour, size, x, y, yaw) and the cameras of its eight photographs.

    Colours are unique, except that in two rooms in five a solid is repeated, to be counted. From every side the solids
    lie wholly in the picture and their middles in different 28-pixel cells.
    """
    colours = rng.sample(sorted(COLOURS), 3)
    names = [(rng.choice(SHAPES), colour) for colour in colours]
    if rng.random() < 0.4:
        count = rng.choice([2, 3, 4])
        names = [names[0]] * count + (names[1 : rng.choice([1, 2])] if count < 4 else [])
    else:
        names = names[: rng.choice([1, 2, 3, 3])]  # one: nothing to confuse it with; seeing is learnt there first
    largest = 1.65 if len(names) < 4 else 0.9  # four large ones would hardly ever fit
    while True:
        cameras = [toy_camera((side + rng.uniform(-0.4, 0.4)) * math.pi / 4) for side in range(8)]
        for _ in range(40):
            solids = [
                {"shape": shape, "colour": colour, "size": 0.45 * (largest / 0.45) ** rng.random(),
                 "x": rng.uniform(-2.2, 2.2), "y": rng.uniform(-2.2, 2.2), "yaw": rng.uniform(0, math.pi / 2)}
                for shape, colour in names
            ]  # fmt: skip
            if all(well_placed(solids, camera) for camera in cameras):
                return {"solids": solids, "cameras": cameras, "floor": [rng.randint(120, 190) for _ in range(3)]}


def well_placed(solids, camera):
    """Whether the solids stand apart, lie in the picture, and have their middles in different cells of it."""
    for a, b in itertools.combinations(solids, 2):
        if math.hypot(a["x"] - b["x"], a["y"] - b["y"]) < 0.75 * (a["size"] + b["size"]) + 0.2:
            return False
    cells = set()
    for solid in solids:
        x1, y1, x2, y2 = outline(solid, camera)
        if min(x1, y1) < 1 or max(x2, y2) > SIDE - 2:
            return False
        cells.add((int(x1 + x2) // 56, int(y1 + y2) // 56))
    return len(cells) == len(solids)


def outline(solid, camera):
    """Bounds x1, y1, x2, y2 in pixels of the upright box around a solid: nothing of it is outside."""
    half = 0.5 * solid["size"] * (math.sqrt(2) if solid["shape"] == "cube" else 1)
    corners = itertools.product((-half, half), (-half, half), (0, solid["size"]))
    u, v, _ = project(np.array([[solid["x"] + x, solid["y"] + y, z] for x, y, z in corners]), camera, toy_intrinsics())
    return u.min(), v.min(), u.max(), v.max()


def render(room, camera):
    """Ray-cast a room: colour (H, W, 3) uint8, depth (H, W) in metres, instance (H, W) int (0 = room, k = k-th solid)."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(toy_intrinsics()).T  # (H, W, 3), z = 1
    ray, origin = pixels @ camera[:3, :3].T, camera[:3, 3]  # a step of 1 along `ray` is a depth of 1 m
    half, light = ROOM / 2, np.array([0.35, -0.25, 0.9])

    # The room is seen from inside: the far side of a box, through its near side.
    low, high = np.array([-half, -half, 0.0]), np.array([half, half, 9.0])
    far = np.maximum((low - origin) / ray, (high - origin) / ray)  # (H, W, 3)
    far = np.where(far > 0, far, np.inf)  # the camera stands outside: some rays lead away from a wall behind it
    depth, axis = far.min(-1), far.argmin(-1)  # (H, W)
    colour = np.where((axis == 2)[..., None], np.array(room["floor"]), np.array(room["floor"]) * 0.72)
    instance = np.zeros((SIDE, SIDE), int)
    for number, solid in enumerate(room["solids"], 1):
        x1, y1, x2, y2 = outline(solid, camera)  # cast rays only where the solid can be
        part = slice(max(0, math.floor(y1)), math.ceil(y2) + 1), slice(max(0, math.floor(x1)), math.ceil(x2) + 1)
        hit, normal = SOLIDS[solid["shape"]](solid, origin, ray[part])  # (h, w) depth or inf, (h, w, 3)
        nearer = hit < depth[part]
        shade = 0.45 + 0.55 * np.clip(normal @ light / np.linalg.norm(light), 0, 1)
        depth[part], instance[part] = np.where(nearer, hit, depth[part]), np.where(nearer, number, instance[part])
        colour[part] = np.where(nearer[..., None], np.array(COLOURS[solid["colour"]]) * shade[..., None], colour[part])
    return colour.round().astype(np.uint8), depth, instance


def hit_cube(solid, origin, ray):
    """Where rays meet a cube on the floor: depth (H, W), inf for a miss; outward normals (H, W, 3)."""
    c, s = math.cos(solid["yaw"]), math.sin(solid["yaw"])
    turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])  # world -> cube
    half = solid["size"] / 2
    o, d = turn @ (origin - np.array([solid["x"], solid["y"], half])), ray @ turn.T
    d = np.where(np.abs(d) < 1e-12, 1e-12, d)
    near, far = np.minimum((-half - o) / d, (half - o) / d), np.maximum((-half - o) / d, (half - o) / d)
    enter, axis = near.max(-1), near.argmax(-1)
    normal = -np.sign(d) * (axis[..., None] == np.arange(3))
    return np.where((enter < far.min(-1)) & (enter > 0), enter, np.inf), normal @ turn


def hit_ball(solid, origin, ray):
    """Where rays meet a ball on the floor; as hit_cube."""
    radius = solid["size"] / 2
    centre = np.array([solid["x"], solid["y"], radius])
    a, b = (ray**2).sum(-1), ray @ (origin - centre)
    root = b**2 - a * (((origin - centre) ** 2).sum() - radius**2)
    enter = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
    point = origin + ray * np.where(np.isfinite(enter), enter, 0)[..., None]
    return enter, (point - centre) / radius


def hit_cone(solid, origin, ray):
    """Where rays from above meet a cone on the floor, as wide as it is high; as hit_cube."""
    height, slope = solid["size"], 0.5  # radius = slope * distance below the tip
    o = origin - np.array([solid["x"], solid["y"], height])  # from the tip
    sign = np.array([1, 1, -(slope**2)])
    a, b, c = (ray**2 * sign).sum(-1), ray @ (o * sign), (o**2 * sign).sum()
    root = b**2 - a * c
    best = np.full(a.shape, np.inf)
    for side in (-1, 1):
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (-b + side * np.sqrt(np.maximum(root, 0))) / a
        z = o[2] + t * ray[..., 2]
        best = np.where((root > 0) & (t > 0) & (z <= 0) & (z >= -height) & (t < best), t, best)
    point = o + ray * np.where(np.isfinite(best), best, 0)[..., None]
    normal = point * sign
    return best, normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)


SOLIDS = {"cube": hit_cube, "ball": hit_ball, "cone": hit_cone}


def solid_points(solid):
    """Vertices (n, 3) on the surface of a solid, dense enough that their outline is its outline."""
    size, steps = solid["size"], np.linspace(-0.5, 0.5, 9)
    if solid["shape"] == "cube":
        u, v = (grid.ravel() for grid in np.meshgrid(steps, steps))
        points = np.concatenate([
            np.insert(np.stack([u, v], 1), axis, side, axis=1) for axis in range(3) for side in (-0.5, 0.5)
        ])  # fmt: skip
        c, s = math.cos(solid["yaw"]), math.sin(solid["yaw"])
        points = points @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    else:
        turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        if solid["shape"] == "ball":
            polar = np.linspace(0, np.pi, 17)
            radius, height = np.sin(polar) / 2, np.cos(polar) / 2
        else:
            height = np.linspace(-0.5, 0.5, 13)
            radius = (0.5 - height) / 2
        x, y = np.outer(radius, np.cos(turn)).ravel(), np.outer(radius, np.sin(turn)).ravel()
        points = np.stack([x, y, np.repeat(height, 32)], 1)
    return (points + [0, 0, 0.5]) * size + [solid["x"], solid["y"], 0]


def write_room(room, folder, rng):
    """Write a toy room in ScanNet's layout to `folder` (its name is the scene id), with a world that is NOT axis-aligned.

    The mesh holds vertices only: nothing here reads faces.
    """
    scene, angle = folder.name, rng.uniform(0, 2 * math.pi)
    align = np.eye(4)  # world_aligned = align @ world
    align[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    align[:3, 3] = [rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(-1, 1)]
    back = np.linalg.inv(align)
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    grid = np.linspace(-ROOM / 2, ROOM / 2, 11)
    floor = np.stack([*(g.ravel() for g in np.meshgrid(grid, grid)), np.zeros(121)], 1)
    parts = [floor] + [solid_points(solid) for solid in room["solids"]]
    names = ["floor"] + [f"{solid['colour']} {solid['shape']}" for solid in room["solids"]]
    points = np.concatenate(parts) @ back[:3, :3].T + back[:3, 3]
    fields = [(name, "f4") for name in ("x", "y", "z")] + [(name, "u1") for name in ("red", "green", "blue", "alpha")]
    vertices = np.zeros(len(points), fields)
    vertices["x"], vertices["y"], vertices["z"] = points.T
    PlyData([PlyElement.describe(vertices, "vertex")]).write(folder / f"{scene}_vh_clean_2.ply")
    segments = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    (folder / f"{scene}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": segments.tolist()}))
    groups = [{"objectId": i, "segments": [i], "label": name} for i, name in enumerate(names)]
    (folder / f"{scene}.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    (folder / f"{scene}.txt").write_text("axisAlignment = " + " ".join(f"{x:.9f}" for x in align.ravel()) + "\n")
    intrinsics = np.eye(4)
    intrinsics[:3, :3] = toy_intrinsics()
    for kind in ("color", "depth"):
        np.savetxt(folder / "intrinsic" / f"intrinsic_{kind}.txt", intrinsics, fmt="%.6f")
    for number, camera in enumerate(room["cameras"]):
        colour, depth, _ = render(room, camera)
        stem = str(20 * number)  # ScanNet's frames are thinned to every 20th
        Image.fromarray(colour).save(folder / "color" / f"{stem}.jpg", quality=95)
        Image.fromarray((depth * 1000).round().astype(np.uint16)).save(folder / "depth" / f"{stem}.png", compress_level=1)
        np.savetxt(folder / "pose" / f"{stem}.txt", back @ camera, fmt="%.9f")


def write_labels(path):
    """Write the toy's label table in the form of scannetv2-labels.combined.tsv."""
    rows = ["raw_category\tnyu40id\tnyu40class", "floor\t2\tfloor"]
    rows += [f"{colour} {shape}\t29\tbox" for colour in COLOURS for shape in SHAPES]
    path.write_text("\n".join(rows) + "\n")


# ------------------------------------------------------------------------------------------------
# 3. Reading ScanNet's layout
# ------------------------------------------------------------------------------------------------


@dataclass
class Object:
    """An instance: its label and its mesh vertices (n, 3) in the aligned world, metres."""

    number: int
    label: str
    points: np.ndarray


@dataclass
class Frame:
    """A photograph: paths, and camera-to-aligned-world (4, 4)."""

    stem: str
    color: Path
    depth: Path
    pose: np.ndarray


@dataclass
class Room:
    """A scene as read from disk. Intrinsics are 3x3."""

    name: str
    objects: list
    frames: list
    color_intrinsics: np.ndarray
    depth_intrinsics: np.ndarray


def read_labels(path):
    """raw_category -> nyu40id from scannetv2-labels.combined.tsv (or the toy's table in its form)."""
    header, *rows = [line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
    raw, nyu = header.index("raw_category"), header.index("nyu40id")
    return {row[raw]: int(row[nyu] or 0) for row in rows}


def read_scannet(folder, labels):
    """Read scans/<id> with exported frames: objects in the axis-aligned world, frames in order of their number.

    labels: raw category -> nyu40 id. Structural categories and labels that are not in the table are dropped; frames with
    an infinite pose or without depth are skipped. Raises SystemExit naming a file that is missing.
    """
    folder = Path(folder)
    scene = folder.name
    for name in (f"{scene}_vh_clean_2.ply", f"{scene}_vh_clean_2.0.010000.segs.json", f"{scene}.aggregation.json", "color", "pose"):
        if not (folder / name).exists():
            raise SystemExit(f"{folder / name} is missing: export the frames and download the mesh of {scene}.")
    align, info = np.eye(4), folder / f"{scene}.txt"
    for line in info.read_text().splitlines() if info.is_file() else []:
        key, _, value = line.partition("=")
        if key.strip() == "axisAlignment":
            align = np.array(value.split(), float).reshape(4, 4)
    vertices = PlyData.read(folder / f"{scene}_vh_clean_2.ply")["vertex"]
    points = np.stack([vertices["x"], vertices["y"], vertices["z"]], 1).astype(np.float64) @ align[:3, :3].T + align[:3, 3]
    segments = np.array(json.loads((folder / f"{scene}_vh_clean_2.0.010000.segs.json").read_text())["segIndices"])
    objects = []
    for group in json.loads((folder / f"{scene}.aggregation.json").read_text())["segGroups"]:
        if labels.get(group["label"], 0) not in DROPPED_NYU40:
            objects.append(Object(group["objectId"] + 1, group["label"], points[np.isin(segments, group["segments"])]))
    frames = []
    for color in sorted((folder / "color").glob("*.jpg"), key=lambda path: int(path.stem)):
        pose = np.loadtxt(folder / "pose" / f"{color.stem}.txt")
        depth = folder / "depth" / f"{color.stem}.png"
        if np.isfinite(pose).all() and depth.is_file():
            frames.append(Frame(color.stem, color, depth, align @ pose))
    intrinsics = [np.loadtxt(folder / "intrinsic" / f"intrinsic_{kind}.txt")[:3, :3] for kind in ("color", "depth")]
    return Room(scene, [o for o in objects if len(o.points)], frames, *intrinsics)


# ------------------------------------------------------------------------------------------------
# 4. Geometry
# ------------------------------------------------------------------------------------------------


def visible_boxes(room, frame):
    """{object number: [x1, y1, x2, y2]} of the objects that a frame shows: the bounds of their unoccluded vertices.

    Integer pixels of the colour picture; x2 and y2 are the first column and row outside.
    """
    with Image.open(frame.color) as image:
        width, height = image.size
    depth = np.asarray(Image.open(frame.depth), np.float64) / 1000  # (h, w) metres, 0 = none
    points = np.concatenate([o.points for o in room.objects]) if room.objects else np.zeros((0, 3))
    owner = np.repeat(np.arange(len(room.objects)), [len(o.points) for o in room.objects])
    u, v, z = project(points, frame.pose, room.color_intrinsics)
    du, dv, _ = project(points, frame.pose, room.depth_intrinsics)
    inside = (z > 0) & (u > -0.5) & (v > -0.5) & (u < width - 0.5) & (v < height - 0.5)
    column = np.clip(du.round().astype(int), 0, depth.shape[1] - 1)
    row = np.clip(dv.round().astype(int), 0, depth.shape[0] - 1)
    there = depth[row, column]
    seen = inside & (there > 0) & (z <= there + RULES["occlusion_m"])
    boxes = {}
    for index, thing in enumerate(room.objects):
        mine = seen & (owner == index)
        if not mine.any() or mine.sum() < RULES["visible_share"] * (inside & (owner == index)).sum():
            continue
        # A pixel covers half a unit to both sides of its whole-numbered centre.
        bounds = np.array([u[mine].min(), v[mine].min(), u[mine].max(), v[mine].max()]) + 0.5
        x1, y1, x2, y2 = np.clip(bounds.round(), 0, [width, height, width, height]).astype(int).tolist()
        if (x2 - x1) * (y2 - y1) >= max(1, RULES["visible_pixels"] * width * height):
            boxes[thing.number] = [x1, y1, x2, y2]
    return boxes


def oriented_sides(points):
    """Sides (3,) in metres of the smallest upright box around points: the minimum-area rectangle of the floor plan's
    hull (one of its sides lies on an edge of the hull), and the height."""
    flat, height = points[:, :2], np.ptp(points[:, 2])
    try:
        hull = flat[ConvexHull(flat).vertices]
    except QhullError:  # all on one line
        return np.array([*np.ptp(flat, axis=0), height])
    edges = np.roll(hull, -1, axis=0) - hull
    angles = np.arctan2(edges[:, 1], edges[:, 0])
    axes = np.stack([np.cos(angles), np.sin(angles)], 1), np.stack([-np.sin(angles), np.cos(angles)], 1)
    spans = np.stack([np.ptp(hull @ axis.T, axis=0) for axis in axes], 1)  # (edges, 2)
    return np.array([*spans[spans.prod(1).argmin()], height])


def closest_distance(a, b):
    """Smallest distance in metres between two point sets (n, 3) and (m, 3)."""
    return float(cKDTree(a).query(b)[0].min())


def camera_offset(a, b, pose):
    """How far the middle of a lies to the right of b and beyond it (farther along the level gaze), in metres."""
    right, gaze = pose[:2, 0], pose[:2, 2]
    step = (a.points.min(0) + a.points.max(0) - b.points.min(0) - b.points.max(0))[:2] / 2
    return float(step @ right / np.linalg.norm(right)), float(step @ gaze / np.linalg.norm(gaze))


# ------------------------------------------------------------------------------------------------
# 5. Questions
# ------------------------------------------------------------------------------------------------
# One generator a type, all with the same signature: view -> rows. A row is a dict with question, options, answer and, for
# the thinking traces, the objects to name and a `thought` about them. A row that a guard rejects is not yielded.


@dataclass
class View:
    """One frame of a room and what can be asked about it."""

    room: Room
    frame: Frame
    boxes: dict  # visible object number -> box
    distance: object  # (object, object) -> metres, closest points
    rng: random.Random

    def unique(self):
        """Visible objects whose label no other object of the room shares, shuffled."""
        labels = [o.label for o in self.room.objects]
        found = [o for o in self.room.objects if o.number in self.boxes and labels.count(o.label) == 1]
        return self.rng.sample(found, len(found))


def offset_words(a, b, pose):
    """("right 1.2", "front 0.4"): where a lies as seen from b, in words and metres; front is farther from the camera."""
    right, front = camera_offset(a, b, pose)
    return f"{'right' if right > 0 else 'left'} {abs(right):.1f}", f"{'front' if front > 0 else 'back'} {abs(front):.1f}"


def relative_direction(view):
    """Single image: from the camera, where is A from B? Four axes near an axis, four diagonals between them."""
    for a, b in itertools.permutations(view.unique(), 2):
        right, front = camera_offset(a, b, view.frame.pose)
        angle = math.degrees(math.atan2(abs(front), abs(right)))  # 0 = sideways, 90 = along the gaze
        off_axis = min(angle, 90 - angle)
        if abs(off_axis - RULES["axis_deg"]) < RULES["guard_deg"]:
            continue
        side, along = ("right" if right > 0 else "left"), ("front" if front > 0 else "back")
        if off_axis < RULES["axis_deg"]:
            words, verdict = ["left", "right", "front", "back"], side if angle < 45 else along
            asked = "left, right, front, or back"
        else:
            words, verdict = ["left-front", "left-back", "right-front", "right-back"], f"{side}-{along}"
            asked = "left-front, left-back, right-front, or right-back"
        yield {
            "question": f"From the camera's perspective, is the {a.label} to the {b.label}'s {asked}?",
            "options": [f"{letter}. {word}" for letter, word in zip("ABCD", words)],
            "answer": "ABCD"[words.index(verdict)],
            "objects": [a, b],
            "thought": f"{', '.join(offset_words(a, b, view.frame.pose))}: {verdict}",
        }


def relative_distance(view):
    """Which of two objects is closer to a third? The right one is first or second by the toss of a coin."""
    for reference, a, b in itertools.permutations(view.unique(), 3):
        near, far = sorted([a, b], key=lambda o: view.distance(o, reference))
        d_near, d_far = view.distance(near, reference), view.distance(far, reference)
        if (a.number > b.number) or d_near < RULES["min_nearest_m"] or d_far - d_near <= RULES["gap_m"]:
            continue
        pair = view.rng.sample([near, far], 2)
        steps = [f"{', '.join(offset_words(o, reference, view.frame.pose))}, apart {view.distance(o, reference):.1f}" for o in pair]
        yield {
            "question": "Measuring from the closest point of each object, which of these two objects "
                        f"({pair[0].label}, {pair[1].label}) is closer to the {reference.label}?",
            "options": [f"{letter}. {o.label}" for letter, o in zip("AB", pair)],
            "answer": "AB"[pair.index(near)],
            "objects": [*pair, reference],
            "thought": f"{'; '.join(steps)}: {near.label}",
        }  # fmt: skip


def absolute_distance(view):
    """The distance between two objects in metres, one decimal."""
    for a, b in itertools.combinations(view.unique(), 2):
        distance = view.distance(a, b)
        if distance >= RULES["min_distance_m"]:
            yield {
                "question": "Measuring from the closest point of each object, what is the distance between "
                            f"the {a.label} and the {b.label} (in meters)?",
                "answer": f"{distance:.1f}",
                "objects": [a, b],
                "thought": f"{', '.join(offset_words(a, b, view.frame.pose))}, apart {distance:.1f}",
            }  # fmt: skip


def object_size(view):
    """The longest side of an object in centimetres."""
    for thing in view.unique():
        size = round(100 * oriented_sides(thing.points).max())
        yield {
            "question": "What is the length of the longest dimension (length, width, or height) of the "
                        f"{thing.label}, measured in centimeters?",
            "answer": str(size),
            "objects": [thing],
            "thought": f"size {size}",
        }  # fmt: skip


def object_count(view):
    """How many objects of a label does the picture show? At least two."""
    shown = [o for o in view.room.objects if o.number in view.boxes]
    for label in sorted({o.label for o in shown}):
        same = sorted([o for o in shown if o.label == label], key=lambda o: view.boxes[o.number])
        if len(same) >= RULES["min_count"]:
            yield {
                "question": f"How many {label}(s) appear?",
                "answer": str(len(same)),
                "objects": same,
                "thought": f"count {len(same)}",
            }


GENERATORS = {
    "relative direction": relative_direction,
    "relative distance": relative_distance,
    "absolute distance": absolute_distance,
    "object size": object_size,
    "object count": object_count,
}
PER_PICTURE = 2  # questions of a type about one picture, at most ...
EASY = ("relative direction", "object size")  # ... and one of these, which are learnt soonest

# ------------------------------------------------------------------------------------------------
# 6. Rows, manifest, gallery
# ------------------------------------------------------------------------------------------------


def named_question(objects):
    """The localisation question for these objects: "Locate the red cube, the blue ball and the green cone." """
    names = [f"the {o.label}" for o in objects]
    return "Locate " + ", ".join(names[:-1]) + (" and " if names[1:] else "") + "".join(names[-1:]) + "."


def labelled_boxes(view, objects):
    """The stage-1 answer for these objects; a thought begins with one, token for token. Label first: the name is written
    before its numbers."""
    return [{"label": o.label, "bbox_2d": view.boxes[o.number]} for o in objects]


def build_room(job):
    """Make, write and read back one room, and ask about its pictures.

    job: (scene id, seed, root, detection: whether to ask for all objects, too).
    Returns {"locate" | "spatial" | "objects": rows}; spatial rows carry their thought.
    """
    scene, seed, root, detection = job
    torch.set_num_threads(1)
    rng = random.Random(f"{seed} {scene}")
    folder = root / "scans" / scene
    write_room(make_room(rng), folder, rng)
    room = read_scannet(folder, read_labels(root / "labels.tsv"))
    near = {}

    def distance(a, b):
        key = frozenset((a.number, b.number))
        if key not in near:
            near[key] = closest_distance(a.points, b.points)
        return near[key]

    out = {"locate": [], "spatial": [], "objects": []}
    for frame in room.frames:
        name = f"{scene}/{frame.stem}.jpg"
        (root / "images" / scene).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(frame.color, root / "images" / name)
        view = View(room, frame, visible_boxes(room, frame), distance, rng)
        shown = [o for o in room.objects if o.number in view.boxes]
        out["objects"].append({"image": [name], "objects": labelled_boxes(view, shown)})
        asked = view.unique()[: rng.choice([1, 2, 2, 3, 3])]
        shown.sort(key=lambda o: view.boxes[o.number])
        # "All objects" must be recognised, not only found by name: that is where names and pictures meet. Without these
        # rows the model draws good boxes around the wrong objects: held-out IoU .23 after 700 steps, and .57 with them.
        for question, objects in ((named_question(asked), asked), ("Locate all objects.", shown if detection else [])):
            if objects:
                out["locate"].append({
                    "question": question, "answer": labelled_boxes(view, objects), "image": [name], "data_type": "single_image",
                })  # fmt: skip
        for kind, generator in GENERATORS.items():
            rows = list(generator(view))
            for row in rng.sample(rows, min(len(rows), 1 if kind in EASY else PER_PICTURE)):
                boxes = common.boxes_text(labelled_boxes(view, row.pop("objects")))
                row |= {"options": row.get("options"), "image": [name], "question_type": kind, "data_type": "single_image"}
                out["spatial"].append(row | {"thought": f"{boxes} {row['thought']}"})
    return out


def build_split(root, rooms, first, seed, traces, workers, detection):
    """Build `rooms` rooms under `root` and write the JSONL files. Returns counts by type for the manifest."""
    root.mkdir(parents=True, exist_ok=True)
    write_labels(root / "labels.tsv")
    jobs = [(f"scene{first + i:04d}_00", seed, root, detection) for i in range(rooms)]
    parts = {"locate": [], "spatial": [], "objects": []}
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for out in tqdm(pool.imap(build_room, jobs, chunksize=8), total=rooms, desc=f"rooms of {root.name}"):
            for kind, rows in out.items():
                parts[kind] += rows
    for rows in parts.values():
        for number, row in enumerate(rows):
            row["question_id"] = number
    thoughts = [row.pop("thought") for row in parts["spatial"]]

    def solved(number, mode, solution):
        row = parts["spatial"][number]
        example = common.Example("", (), "", row["question_type"], row["question"], row["options"], row["answer"])
        return {"question_id": row["question_id"], "prompt": common.prompt_text(example, mode), "solution": solution,
                "image": row["image"], "data_type": row["data_type"]}  # fmt: skip

    chosen = random.Random(seed).sample(range(len(thoughts)), min(traces, len(thoughts)))
    answers = [row["answer"] for row in parts["spatial"]]
    parts["coldstart"] = [
        solved(i, "think", f"<think> {thoughts[i]} </think><answer>{answers[i]}</answer>") for i in chosen
    ]
    parts["worked"] = [solved(i, "work", f"{thoughts[i]} <answer>{answers[i]}</answer>") for i in range(len(thoughts))]
    for kind, rows in parts.items():
        with (root / common.FILES.get(kind, "objects.jsonl")).open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    counts = {kind: len(rows) for kind, rows in parts.items()}
    counts["by_type"] = {kind: sum(row["question_type"] == kind for row in parts["spatial"]) for kind in GENERATORS}
    return counts


def draw_gallery(root, path, seed, columns=4, scale=3):
    """A picture to look at: twelve training pictures with all their boxes, and a question and answer under each."""
    rows = common.read_jsonl(root / common.FILES["spatial"])
    objects = {row["image"][0]: row["objects"] for row in common.read_jsonl(root / "objects.jsonl")}
    random.Random(seed).shuffle(rows)
    picked = [row for kind in GENERATORS for row in [r for r in rows if r["question_type"] == kind][:2]]
    tile, text = SIDE * scale, 112
    sheet = Image.new("RGB", (columns * (tile + 8), math.ceil(len(picked) / columns) * (tile + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(picked):
        x, y = index % columns * (tile + 8), index // columns * (tile + text)
        sheet.paste(Image.open(root / "images" / row["image"][0]).resize((tile, tile), Image.NEAREST), (x, y))
        for thing in objects[row["image"][0]]:
            box = [value * scale for value in thing["bbox_2d"]]
            draw.rectangle([box[0] + x, box[1] + y, box[2] + x - 1, box[3] + y - 1], outline="white")
            draw.text((box[0] + x + 2, box[1] + y), thing["label"], fill="black")
        words = " ".join([row["question"], *(row["options"] or []), "->", row["answer"]]).split()
        lines = [""]
        for word in words:
            lines = lines + [word] if len(lines[-1]) + len(word) > 52 else lines[:-1] + [f"{lines[-1]} {word}".strip()]
        draw.text((x + 2, y + tile + 2), "\n".join(lines), fill="black")
    sheet.save(path)


# ------------------------------------------------------------------------------------------------
# 7. The toy's base: a tiny Qwen2.5-VL that sees
# ------------------------------------------------------------------------------------------------

JSON_PIECES = ['[{"label":"', '","bbox_2d":[', ']},{"label":"', "]}]"]  # one token each: short answers train faster
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def build_tokenizer(texts):
    """A byte-level BPE of whole words trained on `texts`, digits single, with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ".join(texts))
    alphabet = sorted({letter for piece, _ in pieces for letter in piece})
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in JSON_PIECES + TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def build_model(tokenizer, seed):
    """A Qwen2.5-VL of about 1.3 M parameters with random weights: the real class, the real patches of 14 merged 2 x 2."""
    torch.manual_seed(seed)
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.06,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": ids("<|im_end|>"),
        },
        vision_config={
            "depth": 3, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 128,
            "fullatt_block_indexes": [0, 1, 2], "initializer_range": 0.06,
        },
        tie_word_embeddings=True, image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def cell_targets(rows):
    """What each of the 4 x 4 cells of each picture shows, one cell a picture token: words (pictures, 16, 9), 1 for the
    colour and the shape of the object whose middle lies there; box (pictures, 16, 4) in units of the picture's side."""
    names = [*COLOURS, *SHAPES]
    words, box = torch.zeros(len(rows), 16, len(names)), torch.zeros(len(rows), 16, 4)
    for index, row in enumerate(rows):
        for thing in row["objects"]:
            x1, y1, x2, y2 = thing["bbox_2d"]
            cell = 4 * int((y1 + y2) / 2 // 28) + int((x1 + x2) / 2 // 28)
            words[index, cell, [names.index(word) for word in thing["label"].split()]] = 1
            box[index, cell] = torch.tensor(thing["bbox_2d"]) / SIDE
    return words, box


def train_base(settings, root, folder):
    """Teach a new model's vision tower to say, at every picture token, what stands there: the colour and shape of the
    object whose middle lies in this cell, scored against the WORD EMBEDDINGS of their names, so that pictures and words
    meet; and its box. The language model is untouched. It plays the part of Qwen's pre-training; without it nothing grounds.
    """
    rank, size = common.world()
    texts = []
    for kind in ("locate", "worked", "coldstart"):
        for row in common.read_jsonl(root / common.FILES[kind])[:4000]:
            texts += [row.get("prompt", row["question"] if "question" in row else ""), row.get("solution", "")]
    texts += [*common.INSTRUCTIONS.values(), common.SYSTEM, "system\n", "user\n", "assistant\n"]
    texts += [f" {word} {word}" for word in (*COLOURS, *SHAPES)] * 50
    tokenizer = build_tokenizer(texts)
    model = build_model(tokenizer, settings.seed)
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=SIDE * SIDE)

    rows, tests = common.read_jsonl(root / "objects.jsonl"), common.read_jsonl(root / "heldout" / "objects.jsonl")[:256]
    width = model.config.text_config.hidden_size
    to_box, to_digits = torch.nn.Linear(width, 4), torch.nn.Linear(width, 4 * 3 * width)
    names = [*COLOURS, *SHAPES]
    name_ids = torch.tensor([tokenizer(f" {word}")["input_ids"][0] for word in names])
    words = model.get_input_embeddings().weight
    matrices = [p for p in model.model.visual.parameters() if p.ndim == 2]
    others = [p for p in model.model.visual.parameters() if p.ndim != 2]
    others += [*to_box.parameters(), *to_digits.parameters(), words]
    parameters = matrices + others
    optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0), torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0)]

    digit_ids = torch.tensor([tokenizer(digit)["input_ids"][0] for digit in "0123456789"])

    def look(some, part):  # n pictures -> cells (n, 16, width), a logit for each word (n, 16, 9), box (n, 16, 4)
        pictures = [common.load_image(part / "images" / row["image"][0]) for row in some]
        pixels, grid = common.picture_patches(processor, pictures)
        cells = model.model.visual(pixels, grid_thw=grid).pooler_output.view(len(some), 16, width)
        return cells, cells @ words[name_ids].T, to_box(cells)

    steps = min(settings.base_steps, settings.max_steps or settings.base_steps)
    bar = tqdm(range(steps), desc="base", disable=rank > 0)
    for step in bar:
        batch = common.batch_at(rows, step, settings.base_batch, settings.seed)[rank::size]
        cells, said, box = look(batch, root)
        wanted, wanted_box = cell_targets(batch)  # (n, 16, 9), (n, 16, 4)
        on = wanted.any(-1)  # (n, 16) cells with an object
        pixel = (wanted_box[on] * SIDE).round().long()  # (objects, 4)
        digits = torch.stack([pixel // 100, pixel // 10 % 10, pixel % 10], -1)  # (objects, 4, 3)
        spelled = to_digits(cells[on]).view(-1, 4, 3, width) @ words[digit_ids].T  # (objects, 4, 3, 10)
        loss = (
            F.binary_cross_entropy_with_logits(said, wanted, pos_weight=torch.tensor(4.0)) * 5
            + F.cross_entropy(said[on][:, : len(COLOURS)], wanted[on][:, : len(COLOURS)])
            + F.cross_entropy(said[on][:, len(COLOURS) :], wanted[on][:, len(COLOURS) :])
            + F.cross_entropy(spelled.flatten(0, 2), digits.flatten()) * 2 + 20 * (box[on] - wanted_box[on]).abs().mean()
        )
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        if size > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            torch.distributed.all_reduce(flat)
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
                parameter.grad = part.view_as(parameter) / size
        factor = min(1.0, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer, rate in zip(optimizers, (0.02, 3e-3)):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        cells, said, box = look(tests, root / "heldout")
        wanted, wanted_box = cell_targets(tests)
        on, found = wanted.any(-1), (said > 0).any(-1)
        colours = slice(0, len(COLOURS)), slice(len(COLOURS), None)
        scores = {
            "f1": 2 * (on & found).sum().item() / (on.sum() + found.sum()).item(),
            "colour": (said[on][:, colours[0]].argmax(-1) == wanted[on][:, colours[0]].argmax(-1)).float().mean().item(),
            "shape": (said[on][:, colours[1]].argmax(-1) == wanted[on][:, colours[1]].argmax(-1)).float().mean().item(),
            "box_error_px": SIDE * (box - wanted_box)[on].abs().mean().item(),
        }
        # JSON puts no space before a label, so "blue" is another token than the " blue" of a sentence: they start alike.
        for word in names:
            words[tokenizer(word)["input_ids"][0]] = words[tokenizer(f" {word}")["input_ids"][0]]
    common.say("base, on held-out pictures: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scores.json").write_text(json.dumps(scores, indent=2))
        for part in (model, tokenizer, processor):
            part.save_pretrained(folder / "model")


# ------------------------------------------------------------------------------------------------
# 8. Main
# ------------------------------------------------------------------------------------------------


def main():
    """Build the data, then the base; what is already there is kept."""
    settings = common.parse_settings(DataSettings, PRESETS, "base")
    root, folder = Path(settings.data), Path(settings.out)
    config = {"seed": settings.seed, "rooms": settings.rooms, "heldout_rooms": settings.heldout_rooms, "traces": settings.traces}
    manifest = root / "manifest.json"
    if os.environ.get("RANK", "0") == "0":
        done = json.loads(manifest.read_text()) if manifest.is_file() else {}
        if settings.resume == "never" or done.get("config") != config:
            shutil.rmtree(root, ignore_errors=True)
            workers, heldout = settings.processes, root / "heldout"
            counts = {
                "train": build_split(root, settings.rooms, 0, settings.seed, settings.traces, workers, True),
                "heldout": build_split(heldout, settings.heldout_rooms, settings.rooms, settings.seed, 0, workers, False),
            }
            draw_gallery(root, root / "gallery.png", settings.seed)
            facts = {"config": config, "rules": RULES, "dropped_nyu40": sorted(DROPPED_NYU40), "counts": counts}
            manifest.write_text(json.dumps(facts, indent=2))
            print(f"wrote {root}: " + ", ".join(f"{n} {kind}" for kind, n in counts["train"]["by_type"].items()))
    common.start_processes(settings)
    if settings.resume == "never" or not (folder / "model" / "config.json").is_file():
        train_base(settings, root, folder)


if __name__ == "__main__":
    main()
