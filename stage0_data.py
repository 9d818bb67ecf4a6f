"""Stage 0, data: scenes in, SpatialLadder-format rows out. And the toy's base model.

The paper (arXiv 2510.08531, section 3) describes this pipeline; its authors did not publish it. Three sources, one reader's
Room, one projection, one set of question generators:

toy      rooms with coloured solids, rendered by a pinhole camera, WRITTEN in ScanNet's own layout and READ BACK by the same
         read_scannet that reads the real thing
scannet  scenes of ScanNet with exported frames: seven question types over one picture, several views and video
meta     object boxes without pictures (VSI-Bench's meta information): the questions that need geometry only

    python stage0_data.py            # toy: data/toy and runs/toy/base, about two and a half minutes on two cores
    python stage0_data.py --source scannet --scannet <folder with scans/ and the label table> --out data/mine

You get {spld_grounding_data,spld_spatial_data,spld_coldstart_data}.jsonl with images/, manifest.json (seed, counts, every
threshold, what was skipped and why) and gallery.html to look at (the toy: gallery.png). The toy also gets the same under
data/toy/heldout from other rooms, and runs/toy/base/model: a tiny Qwen2.5-VL with random weights whose vision tower has
learnt to see coloured solids, as Qwen's own has learnt to see ours, and whose language model knows nothing yet.

The same command goes on where a run was stopped, at any moment: finished scenes are kept. Only the base's training, which
takes a minute, starts anew.

In reading order: 1 settings and rules, 2 the toy world, 3 reading scenes, 4 geometry, 5 questions (add yours here),
6 rows and files, 7 the gallery, 8 the toy's base, 9 main.
"""

import base64
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from plyfile import PlyData, PlyElement
from scipy.optimize import lsq_linear
from scipy.spatial import ConvexHull, Delaunay, QhullError, cKDTree
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

import common
from common import Settings, setting

# ------------------------------------------------------------------------------------------------
# 1. Settings and rules
# ------------------------------------------------------------------------------------------------


@dataclass
class DataSettings(Settings):
    """Stage 0. For the toy, --data is where the data goes and --out where the base goes; for the other sources --out is
    where the data goes. --model is not used; --max-steps shortens the training of the base."""

    source: str = setting("toy", "toy, scannet or meta")
    scannet: str = setting("", "scannet: folder with scans/ and scannetv2-labels.combined.tsv; meta: the JSON file")
    allow_val: bool = setting(False, "use ScanNet's validation scenes too: the benchmarks are built on them")
    extra: bool = setting(False, "also ask the two further types: perspective taking, view change")
    single_rows: int = setting(5929, "scannet, meta: questions about one picture; localisation has as many (0: all)")
    multi_rows: int = setting(5752, "scannet, meta: questions about several views (0: all)")
    video_rows: int = setting(9000, "scannet, meta: questions about video (0: all)")
    per_scene: int = setting(40, "scannet, meta: questions about one scene, at most")
    traces: int = setting(0, "thinking traces for the cold start; 0: 600 for the toy, else the paper's 1,255")
    workers: int = setting(2, "processes that make scenes; the rows do not depend on it")
    rooms: int = setting(1500, "toy: training rooms; each is photographed from eight sides")
    heldout_rooms: int = setting(160, "toy: held-out rooms, never trained on")
    base_steps: int = setting(600, "toy: steps of the base's vision training")
    base_batch: int = setting(32, "toy: pictures in such a step")


PRESETS = {"toy": {}}

# Every threshold of the pipeline: value, where it comes from, meaning. manifest.json repeats this table. "verified": in the
# authors' published rows or code; "inferred": from their rows; "ours": unpublished, our choice.
RULE_TABLE = {
    "occlusion_m": (0.1, "verified", "a point is occluded when it lies this much behind the depth picture"),
    "visible_share": (0.25, "ours", "an object is visible when this share of its projected vertices is unoccluded ..."),
    "visible_pixels": (400 / (1296 * 968), "ours", "... and its box covers this share of the picture"),
    "single_step": (20, "verified", "single images: one frame in so many"),
    "views_of": (32, "verified", "several views: from so many frames at equal steps ..."),
    "views": (8, "verified", "... so many neighbours ..."),
    "views_step": (4, "verified", "... every so many"),
    "video_frames": (16, "verified", "a video: so many frames at equal steps, in temporal order"),
    "frames_per_second": (30.0, "verified", "of ScanNet's recordings"),
    "axis_deg": (22.5, "verified", "one picture: nearer to an axis than this: left/right/front/back, else the diagonals"),
    "direction_m": (0.5, "ours", "one picture: middles nearer than this on the floor are not asked; rounded metres would mislead"),
    "guard_deg": (10.0, "ours", "directions this near to the border between two answers are not asked"),
    "stand_near_m": (0.3, "verified", "standing by an object: the three are at least this far apart ..."),
    "stand_far_m": (5.0, "verified", "... and at most this far"),
    "stand_corners": (2, "verified", "... and at most so many corners of the third lie in another sector"),
    "min_distance_m": (0.2, "verified", "shortest absolute distance asked"),
    "min_nearest_m": (0.15, "verified", "shortest distance of the nearest candidate"),
    "gap_m": (0.15, "verified", "smallest difference between two compared distances ..."),
    "gap_large_m": (0.3, "verified", "... in rooms larger than"),
    "large_room_m2": (40.0, "verified", "... this"),
    "min_count": (2, "verified", "smallest number of instances in a counting question"),
    "apart_s": (1.0, "verified", "smallest difference between two first appearances in a video"),
    "floor_cell_m": (0.05, "ours", "floor plan: vertices are gathered in cells of this side ..."),
    "floor_radius_m": (0.5, "ours", "... and triangles with a circumcircle up to this radius are floor (alpha shape)"),
    "move_m": (0.3, "ours", "view change: shortest movement asked, and its other parts are at most half as long"),
    "turn_deg": (15.0, "ours", "view change: smallest turn asked"),
    "tries": (100, "ours", "groups of objects tried for one type about the same pictures, at most"),
    "per_scene_type": (6, "ours", "questions of one type and kind of picture kept from a scene, before balancing"),
}
RULES = {name: value for name, (value, _, _) in RULE_TABLE.items()}
TOY_RULES = RULES | {"gap_m": 0.3, "direction_m": 0.0}  # a toy picture has few pixels for a metre; its solids stand apart
DROPPED_NYU40 = {0, 1, 2, 22, 38, 39, 40}  # wall, floor, ceiling, otherstructure, otherfurniture, otherprop, none
# Spaces of ScanNet v2's 312 validation scans (scene%04d_*): the benchmarks are built on them.
VALIDATION = {int(space) for space in """
11 15 19 25 30 46 50 63 64 77 81 84 86 88 95 100 131 139 144 146 149 153 164 169 187 193 196 203 207 208 217 221 222 231 246
249 251 256 257 277 278 300 304 307 314 316 328 329 334 338 342 343 351 353 354 355 356 357 377 378 382 389 406 412 414 423
426 427 430 432 435 441 458 461 462 474 488 490 494 496 500 518 527 535 549 550 552 553 558 559 565 568 574 575 578 580 583
591 593 595 598 599 606 607 608 609 616 618 621 629 633 643 644 645 647 648 651 652 653 655 658 660 663 664 665 670 671 678
684 685 686 689 690 693 695 696 697 699 700 701 702 704
""".split()}  # fmt: skip

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

    Colours are unique, except that in three rooms in ten a solid is repeated, to be counted. From every side the solids
    lie wholly in the picture and their middles in different 28-pixel cells.
    """
    colours = rng.sample(sorted(COLOURS), 3)
    names = [(rng.choice(SHAPES), colour) for colour in colours]
    if rng.random() < 0.3:
        count = rng.choice([2, 3, 4])
        names = [names[0]] * count + (names[1 : rng.choice([1, 2])] if count < 4 else [])
    else:
        names = names[: rng.choice([1, 2, 3, 3])]  # one: nothing to confuse it with; seeing is learnt there first
    largest = 1.65 if len(names) < 4 else 0.9  # four large ones would hardly ever fit
    while True:
        sizes = [0.45 * (largest / 0.45) ** rng.random() for _ in names]  # drawn first: or only small ones would stay
        for _ in range(60):
            cameras = [toy_camera((side + rng.uniform(-0.4, 0.4)) * math.pi / 4) for side in range(8)]
            solids = [
                {"shape": shape, "colour": colour, "size": size, "x": rng.uniform(-2.2, 2.2), "y": rng.uniform(-2.2, 2.2),
                 "yaw": rng.uniform(0, math.pi / 2)}
                for (shape, colour), size in zip(names, sizes)
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
# 3. Reading scenes
# ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Object:
    """An instance in the aligned world, metres: its mesh vertices (n, 3), and the smallest upright box around them.

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
    """A photograph: paths, and camera-to-aligned-world (4, 4). number: its place in the recording."""

    number: int
    color: Path
    depth: Path
    pose: np.ndarray


@dataclass
class Room:
    """A scene as read. Intrinsics are 3x3; counts: instances of each label; skipped: what was left out, and why."""

    name: str
    objects: list
    frames: list
    color_intrinsics: np.ndarray | None
    depth_intrinsics: np.ndarray | None
    floor_area: float  # square metres
    counts: Counter
    skipped: Counter
    distances: dict = field(default_factory=dict)  # (object number, object number) -> metres, as they are asked for
    letters: dict = field(default_factory=dict)  # number of options -> Counter of the places of the right one


def read_labels(path):
    """raw_category -> nyu40id from scannetv2-labels.combined.tsv (or the toy's table in its form)."""
    if not Path(path).is_file():
        raise SystemExit(f"{path} is missing: it is part of ScanNet's download (and names every category).")
    header, *rows = [line.split("\t") for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
    raw, nyu = header.index("raw_category"), header.index("nyu40id")
    return {row[raw]: int(row[nyu] or 0) for row in rows}


def read_scannet(folder, labels):
    """Read scans/<id> with exported frames: objects in the axis-aligned world, frames in order of their number.

    labels: raw category -> nyu40 id. Structural categories are dropped; labels that the table lacks, frames with an infinite
    pose and frames without depth are skipped and counted in Room.skipped. Frame names may be padded with zeros.
    Raises SystemExit naming a file that is missing, and how to get it.
    """
    folder = Path(folder)
    scene = folder.name
    if not (folder / "color").is_dir() and (folder / f"{scene}.sens").is_file():
        raise SystemExit(
            f"{folder}/{scene}.sens is not read. Export its frames with ScanNet's SensReader: python reader.py --filename "
            f"{scene}.sens --output_path {folder} --export_color_images --export_depth_images --export_poses --export_intrinsics"
        )
    mesh, segs, groups = f"{scene}_vh_clean_2.ply", f"{scene}_vh_clean_2.0.010000.segs.json", f"{scene}.aggregation.json"
    for name in (mesh, segs, groups, "color", "depth", "pose", "intrinsic/intrinsic_color.txt", "intrinsic/intrinsic_depth.txt"):
        if not (folder / name).exists():
            raise SystemExit(f"{folder / name} is missing: export the frames and download the mesh of {scene}.")
    align, info = np.eye(4), folder / f"{scene}.txt"
    for line in info.read_text().splitlines() if info.is_file() else []:
        key, _, value = line.partition("=")
        if key.strip() == "axisAlignment":
            align = np.array(value.split(), float).reshape(4, 4)
    vertices = PlyData.read(folder / mesh)["vertex"]
    points = np.stack([vertices["x"], vertices["y"], vertices["z"]], 1).astype(np.float64) @ align[:3, :3].T + align[:3, 3]
    segments = np.array(json.loads((folder / segs).read_text())["segIndices"])
    if len(segments) != len(points):
        raise SystemExit(f"{folder / segs} has {len(segments)} entries for a mesh of {len(points)} vertices.")
    objects, skipped = [], Counter()
    for group in json.loads((folder / groups).read_text())["segGroups"]:
        mine = points[np.isin(segments, group["segments"])]
        if group["label"] not in labels:
            skipped["label not in the table"] += 1
        elif labels[group["label"]] not in DROPPED_NYU40 and len(mine):
            objects.append(Object(group["objectId"] + 1, group["label"], mine, *upright_box(mine)))

    def numbered(kind, suffix):
        return {int(path.stem): path for path in (folder / kind).glob(f"*.{suffix}") if path.stem.isdigit()}

    frames, depths, poses = [], numbered("depth", "png"), numbered("pose", "txt")
    for number, color in sorted(numbered("color", "jpg").items()):
        pose = np.loadtxt(poses[number]) if number in poses else np.full((4, 4), np.inf)
        if not np.isfinite(pose).all():
            skipped["frame without a finite pose"] += 1
        elif number not in depths:
            skipped["frame without depth"] += 1
        else:
            frames.append(Frame(number, color, depths[number], align @ pose))
    intrinsics = [np.loadtxt(folder / "intrinsic" / f"intrinsic_{kind}.txt")[:3, :3] for kind in ("color", "depth")]
    return Room(scene, objects, frames, *intrinsics, floor_area(points), Counter(o.label for o in objects), skipped)


def read_meta(path):
    """Read VSI-Bench's meta information: rooms with oriented boxes, counts and floor areas, and no pictures.

    Returns {scene: Room}. Raises SystemExit naming the file, and the scene that lacks something.
    """
    rooms = {}
    try:
        scenes = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read as JSON ({error}).") from None
    for scene, facts in scenes.items():
        if not scene.replace("_", "").isalnum() or len(scene) > 99:
            raise SystemExit(f"{path}: {scene[:99]!r} cannot be the name of a scene: files are named after it.")
        try:
            boxes = [(label, box) for label, some in sorted(facts["object_bbox"].items()) for box in some]
            objects = [
                Object(number, label, None, np.array(box["centroid"], float),
                       np.array(box["normalizedAxes"], float).reshape(3, 3), np.array(box["axesLengths"], float))
                for number, (label, box) in enumerate(boxes, 1)
            ]  # fmt: skip
            area, counts = float(facts["room_size"]), Counter(facts["object_counts"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SystemExit(f"{path}, {scene}: {error!r}; wanted are object_bbox, object_counts and room_size.") from None
        rooms[scene] = Room(scene, objects, [], None, None, area, counts, Counter())
    return rooms


# ------------------------------------------------------------------------------------------------
# 4. Geometry
# ------------------------------------------------------------------------------------------------


def look(room, frame):
    """What a frame shows: ({object number: [x1, y1, x2, y2]} of its visible objects, numbers of all that it shows a bit of).

    A box is the bounds of the unoccluded vertices, integer pixels of the colour picture; x2 and y2 are the first column and
    row outside.
    """
    with Image.open(frame.color) as image:
        width, height = image.size
    depth = np.asarray(Image.open(frame.depth), np.float64) / 1000  # (h, w) metres, 0 = none
    points = np.concatenate([o.points for o in room.objects]) if room.objects else np.zeros((0, 3))
    owner = np.repeat(np.arange(len(room.objects)), [len(o.points) for o in room.objects])
    u, v, z = project(points, frame.pose, room.color_intrinsics)
    du, dv, _ = project(points, frame.pose, room.depth_intrinsics)
    inside = (z > 0) & (u > -0.5) & (v > -0.5) & (u < width - 0.5) & (v < height - 0.5)
    column = np.clip(du.round(), 0, depth.shape[1] - 1).astype(int)
    row = np.clip(dv.round(), 0, depth.shape[0] - 1).astype(int)
    there = depth[row, column]
    seen = inside & (there > 0) & (z <= there + RULES["occlusion_m"])
    boxes, glimpsed = {}, set()
    for index, thing in enumerate(room.objects):
        mine = seen & (owner == index)
        if not mine.any():
            continue
        glimpsed.add(thing.number)
        # A pixel covers half a unit to both sides of its whole-numbered centre.
        bounds = np.array([u[mine].min(), v[mine].min(), u[mine].max(), v[mine].max()]) + 0.5
        x1, y1, x2, y2 = np.clip(bounds.round(), 0, [width, height, width, height]).astype(int).tolist()
        enough = mine.sum() >= RULES["visible_share"] * (inside & (owner == index)).sum()
        if enough and (x2 - x1) * (y2 - y1) >= max(1, RULES["visible_pixels"] * width * height):
            boxes[thing.number] = [x1, y1, x2, y2]
    return boxes, glimpsed


def upright_box(points):
    """The smallest box around points (n, 3) that stands on the floor plane: centre (3,), axes (3, 3), sides (3,).

    Its base is the minimum-area rectangle of the floor plan: one side of it lies on an edge of the convex hull.
    """
    flat, axes = points[:, :2], np.eye(3)
    try:
        hull = flat[ConvexHull(flat).vertices]
    except QhullError:  # all on one line, or fewer than three: along the world's axes
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
    """Smallest distance in metres between two objects: of their vertices, or of their boxes where only those are known."""
    if a.points is not None:
        return float(cKDTree(a.points).query(b.points)[0].min())
    # Points of the boxes are centre + s @ (sides * axes) with |s| <= 1/2: the nearest pair is a bounded least-squares problem.
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
    """Unit vectors of the floor plane, (2,) each: to the right of a camera, and along its level gaze."""
    gaze = pose[:2, 2] / np.linalg.norm(pose[:2, 2])
    return np.array([gaze[1], -gaze[0]]), gaze


def camera_offset(a, b, pose):
    """How far the middle of a lies to the right of b and beyond it (farther along the level gaze), in metres."""
    right, gaze = level_axes(pose)
    step = (a.centre - b.centre)[:2]
    return float(step @ right), float(step @ gaze)


def bearing(origin, facing, target):
    """Degrees in [0, 360), counter-clockwise from above, by which one who stands at `origin` and faces `facing` must turn to
    face `target`; each (..., 2)."""
    forward, step = facing - origin, target - origin
    across = forward[..., 0] * step[..., 1] - forward[..., 1] * step[..., 0]
    return np.degrees(np.arctan2(across, (forward * step).sum(-1))) % 360


# ------------------------------------------------------------------------------------------------
# 5. Questions
# ------------------------------------------------------------------------------------------------
# One generator a type, all with the same signature: view -> rows. A row is a dict with question, options, answer and, for
# the thinking traces, the objects to name and a `thought` about them. A candidate that a guard rejects is yielded as its
# reason, a string, so that rejections are counted. To add a type: write such a function, add it to GENERATORS and to the
# kinds of pictures in ASKED, and (for letters) its name to CHOICE_TYPES in common.py.


@dataclass
class View:
    """Some pictures of a room and what can be asked about them."""

    room: Room
    data_type: str  # single_image, multi_view, video
    frames: list  # in temporal order; empty where there are no pictures: then every object counts as shown
    boxes: list  # for each frame {number of a visible object: box}
    glimpsed: list  # for each frame the numbers of the objects of which it shows anything
    rng: random.Random
    rules: dict = field(default_factory=lambda: RULES)

    def shown(self):
        """Objects that are visible in at least one picture."""
        return [o for o in self.room.objects if not self.frames or any(o.number in boxes for boxes in self.boxes)]

    def unique(self):
        """Shown objects that their label names without doubt, shuffled: no other object in the picture (several pictures:
        in the room) has the label, or one that ends in it ("chair", "office chair")."""
        others = self.room.objects
        if self.data_type == "single_image" and self.frames:
            others = [o for o in others if o.number in self.glimpsed[0]]
        names = Counter(o.label for o in others)
        found = [
            o for o in self.shown()
            if names[o.label] == 1 and (self.frames or self.room.counts[o.label] == 1) and not self.confused(o.label, names)
        ]  # fmt: skip
        return self.rng.sample(found, len(found))

    def confused(self, label, names):
        """Whether another label ends in this one."""
        return any(name.endswith(f" {label}") for name in names)

    def groups(self, ordered, unordered=0):
        """Groups of unique objects: the first `ordered` in every order, the others in one; at most rules["tries"], drawn."""
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
        """Closest-point distance of two objects in metres, remembered in the room."""
        key = tuple(sorted((a.number, b.number)))
        if key not in self.room.distances:
            self.room.distances[key] = closest_distance(a, b)
        return self.room.distances[key]

    def options(self, right, wrong):
        """([labels of the options], letter): the right one stands where it stood least often in this room, the others are
        shuffled."""
        used = self.room.letters.setdefault(len(wrong) + 1, Counter())
        least = min(used[place] for place in range(len(wrong) + 1))
        place = self.rng.choice([place for place in range(len(wrong) + 1) if used[place] == least])
        used[place] += 1
        words = self.rng.sample(wrong, len(wrong))
        words.insert(place, right)
        return words, "ABCDEFGH"[place]


def lettered(words):
    """["A. left", "B. right", ...]"""
    return [f"{letter}. {word}" for letter, word in zip("ABCDEFGH", words)]


def listed(words):
    """"left, right, front, or back" """
    return f"{', '.join(words[:-1])}{',' if len(words) > 2 else ''} or {words[-1]}"


def offset_words(a, b, pose):
    """("right 1.2", "front 0.4"): where a lies as seen from b, in words and metres; front is farther from the camera."""
    right, front = camera_offset(a, b, pose)
    return f"{'right' if right > 0 else 'left'} {abs(right):.1f}", f"{'front' if front > 0 else 'back'} {abs(front):.1f}"


def relative_direction(view):
    """Where is an object? One picture: from another, as the camera sees it. Several: for one who stands in the room."""
    return camera_direction(view) if view.data_type == "single_image" else standing_direction(view)


def camera_direction(view):
    """From the camera, where is A from B? Four axes near an axis, four diagonals between them. Front is farther away."""
    for a, b in view.groups(2):
        right, front = camera_offset(a, b, view.frames[0].pose)
        if math.hypot(right, front) < view.rules["direction_m"]:
            yield "too near"
            continue
        angle = math.degrees(math.atan2(abs(front), abs(right)))  # 0 = sideways, 90 = along the gaze
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
            "options": lettered(words),
            "answer": "ABCD"[words.index(verdict)],
            "objects": [a, b],
            "thought": f"{', '.join(offset_words(a, b, view.frames[0].pose))}: {verdict}",
        }


# Who stands by P and faces O: answers and their sectors, in degrees counter-clockwise from straight ahead. The wording is
# VSI-Bench's, so that the training questions are the benchmark's.
HARD = {"front-left": (0, 90), "back-left": (90, 180), "back-right": (180, 270), "front-right": (270, 360)}
MEDIUM = {"left": (0, 135), "back": (135, 225), "right": (225, 360)}
EASY = {"left": (0, 180), "right": (180, 360)}
STANDING = {
    "hard": (HARD, "to my front-left, front-right, back-left, or back-right? The directions refer to the quadrants of a "
                   "Cartesian plane (if I am standing at the origin and facing along the positive y-axis)."),
    "medium": (MEDIUM, "to my left, right, or back? An object is to my back if I would have to turn at least 135 degrees in "
                       "order to face it."),
    "easy": (EASY, "to the left or the right of the {facing}?"),
}  # fmt: skip


def standing_direction(view):
    """Standing by P and facing O, where is Q? Several views: the quadrants. Video: quadrants, left/right/back, left/right."""
    for place, facing, asked in view.groups(3):
        spans = [view.distance(a, b) for a, b in itertools.combinations((place, facing, asked), 2)]
        if min(spans) < RULES["stand_near_m"] or max(spans) > RULES["stand_far_m"]:
            yield "too near or too far"
            continue
        sectors, words = STANDING[view.rng.choice(list(STANDING)) if view.data_type == "video" else "hard"]
        angle = float(bearing(place.centre[:2], facing.centre[:2], asked.centre[:2]))
        if min(abs((angle - start + 180) % 360 - 180) for start, _ in sectors.values()) < RULES["guard_deg"]:
            yield "near the border of two answers"
            continue
        verdict = next(word for word, (start, end) in sectors.items() if start <= angle < end)
        turns = bearing(place.centre[:2], facing.centre[:2], corners(asked)[:, :2])  # (8,)
        start, end = sectors[verdict]
        if ((turns < start) | (turns >= end)).sum() > RULES["stand_corners"]:
            yield "reaches over the border of two answers"
            continue
        options, answer = view.options(verdict, [word for word in sectors if word != verdict])
        turn = f"turn {angle:.0f} to the left" if angle < 180 else f"turn {360 - angle:.0f} to the right"
        yield {
            "question": f"If I am standing by the {place.label} and facing the {facing.label}, is the {asked.label} "
                        + words.format(facing=facing.label),
            "options": lettered(options),
            "answer": answer,
            "objects": [place, facing, asked],
            "thought": f"{turn}: {verdict}",
        }  # fmt: skip


def relative_distance(view):
    """Which object is the closest to another? One picture: of two. Several views: of two to four. Video: of four."""
    count = {"single_image": 2, "multi_view": view.rng.choice([2, 3, 4]), "video": 4}[view.data_type]
    gap = view.rules["gap_large_m" if view.room.floor_area > RULES["large_room_m2"] else "gap_m"]
    for reference, *others in view.groups(1, count):
        others.sort(key=lambda o: view.distance(o, reference))
        spans = [view.distance(o, reference) for o in others]
        if spans[0] < RULES["min_nearest_m"]:
            yield "too near"
            continue
        if min(b - a for a, b in zip(spans, spans[1:])) <= gap:
            yield "distances too much alike"
            continue
        labels, answer = view.options(others[0].label, [o.label for o in others[1:]])
        ordered = sorted(others, key=lambda o: labels.index(o.label))
        names = ", ".join(labels)
        question = (
            f"which of these two objects ({names}) is closer to the {reference.label}?" if count == 2
            else f"which of these objects ({names}) is the closest to the {reference.label}?"
        )  # fmt: skip
        steps = []
        for thing in ordered:
            offset = offset_words(thing, reference, view.frames[0].pose) if view.data_type == "single_image" else ()
            steps.append(", ".join([*offset, f"apart {view.distance(thing, reference):.1f}"]))
        yield {
            "question": f"Measuring from the closest point of each object, {question}",
            "options": lettered(labels),
            "answer": answer,
            "objects": [*ordered, reference],
            "thought": f"{'; '.join(steps)}: {others[0].label}",
        }


def absolute_distance(view):
    """The distance between two objects in metres, one decimal."""
    for a, b in view.groups(0, 2):
        distance = view.distance(a, b)
        if distance < RULES["min_distance_m"]:
            yield "too near"
            continue
        offset = offset_words(a, b, view.frames[0].pose) if view.data_type == "single_image" else ()
        yield {
            "question": "Measuring from the closest point of each object, what is the distance between "
                        f"the {a.label} and the {b.label} (in meters)?",
            "answer": f"{distance:.1f}",
            "objects": [a, b],
            "thought": ", ".join([*offset, f"apart {distance:.1f}"]),
        }  # fmt: skip


def object_size(view):
    """The longest side of an object in centimetres."""
    for thing in view.unique():
        size = round(100 * thing.sides.max())
        yield {
            "question": "What is the length of the longest dimension (length, width, or height) of the "
                        f"{thing.label}, measured in centimeters?",
            "answer": str(size),
            "objects": [thing],
            "thought": f"size {size}",
        }  # fmt: skip


def object_count(view):
    """How many objects of a label are there? In a video: in the room, all of which it shows. Else: in the pictures."""
    shown = view.shown()
    for label in sorted({o.label for o in shown}):
        same = [o for o in shown if o.label == label]
        everywhere = [o for o in view.room.objects if o.label == label]
        if view.frames and view.data_type != "video":
            everywhere = [o for o in everywhere if any(o.number in numbers for numbers in view.glimpsed)]
        count = len(same) if view.frames else view.room.counts[label]
        if count < RULES["min_count"]:
            yield "too few"
        elif len(everywhere) > len(same):
            yield "not all are clearly shown"
        elif count != len(same):
            yield "the source counts them otherwise"
        elif view.confused(label, {o.label for o in view.room.objects}):
            yield "another label ends in this one"
        else:
            if view.data_type == "single_image":
                same.sort(key=lambda o: view.boxes[0][o.number])
            where = "are in this room" if view.data_type == "video" else "appear"
            yield {
                "question": f"How many {label}(s) {where}?",
                "answer": str(count),
                "objects": same,
                "thought": f"count {count}",
            }


def room_size(view):
    """The area of the floor plan in square metres, one decimal. One question a scene."""
    yield {
        "question": "What is the size of this room (in square meters)? If multiple rooms are shown, estimate the size of the "
                    "combined space.",
        "answer": f"{view.room.floor_area:.1f}",
        "objects": [],
        "thought": f"floor {view.room.floor_area:.1f}",
    }  # fmt: skip


def appearance_order(view):
    """In which order do four categories first appear in the video? Three other orders stand beside the right one."""
    first = {}  # label -> second of its first appearance
    labels = {o.label for o in view.shown()} if view.frames else set()
    for label in sorted(label for label in labels if not view.confused(label, labels)):
        numbers = {o.number for o in view.room.objects if o.label == label}
        clear = next(i for i, boxes in enumerate(view.boxes) if numbers & set(boxes))
        if any(numbers & some for some in view.glimpsed[:clear]):
            yield "seen a little before it is seen clearly"
        else:
            first[label] = view.frames[clear].number / RULES["frames_per_second"]
    fours = list(itertools.combinations(sorted(first), 4))
    for four in view.rng.sample(fours, min(len(fours), RULES["tries"])):
        order = sorted(four, key=first.get)
        if min(first[b] - first[a] for a, b in zip(order, order[1:])) <= RULES["apart_s"]:
            yield "appear at nearly the same time"
            continue
        others = [list(other) for other in itertools.permutations(order) if list(other) != order]
        options, answer = view.options(", ".join(order), [", ".join(other) for other in view.rng.sample(others, 3)])
        yield {
            "question": "What will be the first-time appearance order of the following categories in the video: "
                        f"{', '.join(view.rng.sample(order, 4))}?",
            "options": lettered(options),
            "answer": answer,
            "objects": [],
            "thought": ", ".join(f"{label} after {first[label]:.1f} s" for label in order),
        }  # fmt: skip


def perspective_taking(view):
    """Standing at P and looking at O in the picture, where is Q? One of eight directions, among four (ViewSpatial-Bench's
    "person perspective")."""
    words = ["front", "front-left", "left", "back-left", "back", "back-right", "right", "front-right"]
    for place, facing, asked in view.groups(3):
        spans = [view.distance(a, b) for a, b in itertools.combinations((place, facing, asked), 2)]
        if min(spans) < RULES["stand_near_m"] or max(spans) > RULES["stand_far_m"]:
            yield "too near or too far"
            continue
        angle = float(bearing(place.centre[:2], facing.centre[:2], asked.centre[:2]))
        if abs((angle + 22.5) % 45 - 22.5) > 22.5 - RULES["guard_deg"]:
            yield "near the border of two answers"
            continue
        verdict = words[round(angle / 45) % 8]
        options, answer = view.options(verdict, view.rng.sample([word for word in words if word != verdict], 3))
        turn = f"turn {angle:.0f} to the left" if angle < 180 else f"turn {360 - angle:.0f} to the right"
        yield {
            "question": f"Imagine you are standing at the {place.label} and looking towards the {facing.label}. Where is the "
                        f"{asked.label}?",
            "options": lettered(options),
            "answer": answer,
            "objects": [place, facing, asked],
            "thought": f"{turn}: {verdict}",
        }  # fmt: skip


def view_change(view):
    """How did the camera move, or turn, between two of the pictures? (SPAR's view change, Actial's viewpoints)"""
    for i, j in itertools.combinations(range(len(view.frames)), 2):
        before, after = view.frames[i].pose, view.frames[j].pose
        right, gaze = level_axes(before)
        step = after[:2, 3] - before[:2, 3]
        side, ahead = float(step @ right), float(step @ gaze)
        turned = float(bearing(np.zeros(2), gaze, level_axes(after)[1]))  # counter-clockwise: to the left
        turned = turned if turned < 180 else turned - 360
        asked = f"From picture {i + 1} to picture {j + 1}, did the camera mainly"
        if view.rng.random() < 0.5:
            small, large = sorted((abs(side), abs(ahead)))
            if large < RULES["move_m"] or small > large / 2:
                yield "no clear movement"
                continue
            words = ["forward", "backward", "left", "right"]
            verdict = ("right" if side > 0 else "left") if abs(side) > abs(ahead) else "forward" if ahead > 0 else "backward"
            question, thought = f"{asked} move {listed(words)}?", f"right {side:.1f}, ahead {ahead:.1f}: {verdict}"
        else:
            if not RULES["turn_deg"] <= abs(turned) <= 180 - RULES["guard_deg"]:
                yield "no clear turn"
                continue
            words = ["left", "right"]
            verdict = "left" if turned > 0 else "right"
            question, thought = f"{asked} turn {listed(words)}?", f"turned {abs(turned):.0f} degrees to the {verdict}"
        options, answer = lettered(words), "ABCD"[words.index(verdict)]
        yield {"question": question, "options": options, "answer": answer, "objects": [], "thought": thought}


GENERATORS = {
    "relative direction": relative_direction,
    "relative distance": relative_distance,
    "absolute distance": absolute_distance,
    "object size": object_size,
    "object count": object_count,
    "room size": room_size,
    "appearance order": appearance_order,
    "perspective taking": perspective_taking,
    "view change": view_change,
}
FOUR = ["relative direction", "relative distance", "absolute distance", "object size"]
ASKED = {  # kind of picture -> types of questions
    "single_image": FOUR,
    "multi_view": [*FOUR, "object count"],
    "video": [*FOUR, "object count", "room size", "appearance order"],
}
EXTRA = {"single_image": ["perspective taking"], "multi_view": ["view change"], "video": []}  # asked with --extra
# The toy: one picture, which also asks for counts; at most so many questions of a type. What is learnt soonest is asked once.
TOY_ASKED = {"relative direction": 1, "relative distance": 2, "absolute distance": 2, "object size": 1, "object count": 2}

# ------------------------------------------------------------------------------------------------
# 6. Rows and files
# ------------------------------------------------------------------------------------------------


def scene_views(room, rng):
    """The views of a room: every 20th frame alone, windows of 8 frames, a video of 16 frames; or, without frames, one view
    without pictures, asked what a video is asked."""
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
    seen = {frame.number: look(room, frame) for frame in {f.number: f for _, group in groups for f in group}.values()}
    return [
        View(room, kind, group, [seen[f.number][0] for f in group], [seen[f.number][1] for f in group], rng)
        for kind, group in groups
    ]


def ask(view, kind, rejected):
    """All rows of a type about a view, in the released schema, with `thought` and the asked `objects` beside it. What guards
    refuse is counted in `rejected`."""
    for row in GENERATORS[kind](view):
        if isinstance(row, str):
            rejected[f"{view.data_type}: {kind}: {row}"] += 1
            continue
        scene = view.room.name
        image = [f"{scene}/{frame.number}.jpg" for frame in view.frames] or [f"{scene}.mp4"]
        yield {"options": None} | row | {"image": image, "question_type": kind, "data_type": view.data_type}


def labelled_boxes(view, objects):
    """The stage-1 answer for these objects of a single image; a toy thought begins with one, token for token. Label first:
    the name is written before its numbers."""
    return [{"label": o.label, "bbox_2d": view.boxes[0][o.number]} for o in objects]


def positions(view, objects):
    """"chair (0.4, 2.1, -0.3), ...": metres to the right of the camera, ahead of it and above it in a single image; else in
    the room. A thought about real scenes begins with it."""
    words = []
    for thing in objects:
        place = thing.centre
        if view.data_type == "single_image":
            right, gaze = level_axes(view.frames[0].pose)
            step = place - view.frames[0].pose[:3, 3]
            place = (step[:2] @ right, step[:2] @ gaze, step[2])
        words.append(f"{thing.label} ({', '.join(f'{round(x, 1) + 0.0:.1f}' for x in place)})")  # + 0.0: no "-0.0"
    return ", ".join(words)


def scene_rows(room, settings, rng):
    """Candidate rows of a scene, at most per_scene_type for each kind of picture and type; how many passed the guards before
    that, and what the guards rejected.

    A row also holds `thought`, `asked` (numbers of its objects) and, for a single image, `boxes` (a localisation answer).
    """
    rows, rejected = {}, Counter()
    for view in scene_views(room, rng):
        for kind in ASKED[view.data_type] + (EXTRA[view.data_type] if settings.extra else []):
            for row in ask(view, kind, rejected):
                objects = row.pop("objects")
                row["asked"] = [o.number for o in objects]
                row["thought"] = "; ".join(filter(None, [positions(view, objects), row["thought"]]))
                if view.data_type == "single_image":
                    row["boxes"] = [{"bbox_2d": view.boxes[0][o.number], "label": o.label} for o in objects]
                rows.setdefault((view.data_type, kind), []).append(row)
    passed = {f"{data_type}: {kind}": len(some) for (data_type, kind), some in rows.items()}
    return [row for some in rows.values() for row in rng.sample(some, min(len(some), RULES["per_scene_type"]))], passed, rejected


def scannet_part(job):
    """One scene -> {"rows", "passed", "rejected", "skipped"}; one that cannot be read -> {"failed": reason}. job: (path,
    settings)."""
    path, settings = job
    torch.set_num_threads(1)
    try:
        if settings.source == "meta":
            room = read_meta(settings.scannet)[path]
        else:
            room = read_scannet(path, read_labels(Path(settings.scannet) / "scannetv2-labels.combined.tsv"))
            if not room.frames:
                raise SystemExit(f"{path}: no frame has a colour picture, depth and a finite pose.")
        rows, passed, rejected = scene_rows(room, settings, random.Random(f"{settings.seed} {room.name}"))
    except (Exception, SystemExit) as error:  # a bad scene must not stop a long run: it is named in the manifest
        return {"failed": str(error) if isinstance(error, SystemExit) else f"{path}: {type(error).__name__}: {error}"}
    return {"rows": rows, "passed": passed, "rejected": rejected, "skipped": room.skipped}


def make_parts(function, jobs, folder, workers, desc):
    """Run function(job) for every (name, job) in `workers` processes; each result is kept as folder/<name>.json until the
    whole run is done, so that one that was stopped goes on. Returns the results in the order of the jobs."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = [(name, job) for name, job in jobs if not (folder / f"{name}.json").is_file()]
    with multiprocessing.get_context("fork").Pool(workers, start_worker) as pool:
        processes, results = multiprocessing.active_children(), pool.imap(function, [job for _, job in todo])
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=desc)
        for name, _ in todo:
            common.write_whole(folder / f"{name}.json", json.dumps(next_result(results, processes)))
            bar.update()
        bar.close()
    return [json.loads((folder / f"{name}.json").read_text()) for name, _ in jobs]


def start_worker():
    """The first process hears the signals, and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def next_result(results, processes):
    """The next result of a pool. Raises SystemExit when one of its processes was killed: a pool waits for ever for what that
    one was making."""
    while True:
        try:
            return results.next(timeout=1)
        except multiprocessing.TimeoutError:
            if not all(process.is_alive() for process in processes):
                raise SystemExit(
                    "\na worker was killed; if it was for want of memory, give fewer --workers. The same command goes on."
                ) from None


def balance(rows, targets, per_scene, seed):
    """Choose rows so that each kind of picture has its target, shared evenly among its types as far as they reach, and no
    scene more than per_scene. targets: {data_type: number of rows, 0 = all}."""
    rng, groups, used, chosen = random.Random(seed), {}, Counter(), []
    for row in rows:
        groups.setdefault((row["data_type"], row["question_type"]), []).append(row)
    left = {kind: count or len(rows) for kind, count in targets.items()}
    for _, group in sorted(groups.items()):
        rng.shuffle(group)
    while groups:  # one row of every type in turn, the scarcest first
        for key, group in sorted(groups.items(), key=lambda item: (len(item[1]), item[0])):
            while group and used[scene_of(group[-1])] >= per_scene:
                group.pop()
            if not group or not left[key[0]]:
                del groups[key]
                continue
            chosen.append(group.pop())
            used[scene_of(chosen[-1])] += 1
            left[key[0]] -= 1
    rng.shuffle(chosen)
    return chosen


def scene_of(row):
    """The scene that a row asks about."""
    return row["image"][0].split("/")[0].removesuffix(".mp4")


def spread_sample(kinds, count, seed):
    """`count` places of the list `kinds`, one of every kind in turn as far as they reach, drawn by seed."""
    places, turn = random.Random(seed).sample(range(len(kinds)), len(kinds)), Counter()
    order = []
    for place in places:
        order.append((turn[kinds[place]], kinds[place], place))
        turn[kinds[place]] += 1
    return [place for _, _, place in sorted(order)[:count]]


def write_rows(root, spatial, locate, traces, seed, detail=()):
    """Number the rows and write the JSONL files of a split. Spatial rows hold their `thought`, which becomes the cold start's
    solutions. detail: further files, {name: rows}. Returns counts for the manifest."""
    for rows in (spatial, locate):
        for number, row in enumerate(rows):
            row.setdefault("question_id", number)
    thoughts = [row.pop("thought") for row in spatial]

    def solved(number, mode, solution):
        row = spatial[number]
        example = common.Example("", (), "", row["question_type"], row["question"], row["options"], row["answer"])
        return {"question_id": row["question_id"], "prompt": common.prompt_text(example, mode), "solution": solution,
                "image": row["image"], "data_type": row["data_type"]}  # fmt: skip

    chosen = spread_sample([row["question_type"] for row in spatial], traces, seed)
    form = "<think> {} </think><answer>{}</answer>"
    parts = {"locate": locate, "spatial": spatial} | dict(detail)
    parts["coldstart"] = [solved(i, "think", form.format(thoughts[i], spatial[i]["answer"])) for i in chosen]
    if "objects" in parts:  # the toy's
        parts["worked"] = [
            solved(i, "work", f"{thoughts[i]} <answer>{row['answer']}</answer>") for i, row in enumerate(spatial)
        ]
    for kind, rows in parts.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        common.write_whole(root / common.FILES.get(kind, f"{kind}.jsonl"), lines)
    counts = {kind: len(rows) for kind, rows in parts.items()}
    return counts | {"by_type": dict(Counter(row["question_type"] for row in spatial))}


def named_question(objects):
    """The toy's localisation question: "Locate the red cube, the blue ball and the green cone." """
    names = [f"the {o.label}" for o in objects]
    return "Locate " + ", ".join(names[:-1]) + (" and " if names[1:] else "") + "".join(names[-1:]) + "."


def toy_part(job):
    """Make, write and read back one toy room, and ask about its pictures.

    job: (scene id, seed, root, detection: whether to ask for all objects, too).
    Returns {"locate" | "spatial" | "objects": rows, "rejected"}; spatial rows carry their thought.
    """
    scene, seed, root, detection = job
    torch.set_num_threads(1)
    rng = random.Random(f"{seed} {scene}")
    folder = root / "scans" / scene
    with common.naming(folder):
        write_room(make_room(rng), folder, rng)
    room = read_scannet(folder, read_labels(root / "labels.tsv"))
    (root / "images" / scene).mkdir(parents=True, exist_ok=True)
    out = {"locate": [], "spatial": [], "objects": [], "rejected": Counter()}
    for frame in room.frames:
        name = f"{scene}/{frame.number}.jpg"
        shutil.copyfile(frame.color, root / "images" / name)
        boxes, glimpsed = look(room, frame)
        view = View(room, "single_image", [frame], [boxes], [glimpsed], rng, TOY_RULES)
        shown = view.shown()
        out["objects"].append({"image": [name], "objects": labelled_boxes(view, shown)})
        asked = view.unique()[: rng.choice([1, 2, 2, 3, 3])]
        shown.sort(key=lambda o: boxes[o.number])
        # "All objects" must be recognised, not only found by name: that is where names and pictures meet. Without these
        # rows the model draws good boxes around the wrong objects: held-out IoU .23 after 700 steps, and .57 with them.
        for question, objects in ((named_question(asked), asked), ("Locate all objects.", shown if detection else [])):
            if objects:
                out["locate"].append({
                    "question": question, "answer": labelled_boxes(view, objects), "image": [name], "data_type": "single_image",
                })  # fmt: skip
        for kind, count in TOY_ASKED.items():
            rows = list(ask(view, kind, out["rejected"]))
            for row in rng.sample(rows, min(len(rows), count)):
                row["thought"] = f"{common.boxes_text(labelled_boxes(view, row.pop('objects')))} {row['thought']}"
                out["spatial"].append(row)
    return out


def build_toy(root, rooms, first, seed, traces, workers, detection):
    """Build `rooms` toy rooms under `root` and write the JSONL files. Returns counts by type for the manifest."""
    root.mkdir(parents=True, exist_ok=True)
    write_labels(root / "labels.tsv")
    scenes = [f"scene{first + i:04d}_00" for i in range(rooms)]
    jobs = [(scene, (scene, seed, root, detection)) for scene in scenes]
    parts = make_parts(toy_part, jobs, root / "parts", workers, f"rooms of {root.name}")
    spatial, locate, objects = ([row for part in parts for row in part[kind]] for kind in ("spatial", "locate", "objects"))
    counts = write_rows(root, spatial, locate, traces, seed, {"objects": objects})
    return counts | {"rejected": total_counts(part["rejected"] for part in parts)}


def total_counts(counters):
    """The sum of dicts of numbers, by name."""
    out = Counter()
    for counter in counters:
        out.update(counter)
    return dict(sorted(out.items()))


def list_scenes(settings):
    """{scene id: its folder (meta: its id)} of the source, without validation scenes unless they are allowed."""
    source = Path(settings.scannet)
    if settings.source == "meta":
        scenes = {name: name for name in read_meta(source)}
    else:
        folder = source / "scans" if (source / "scans").is_dir() else source
        scenes = {path.name: path for path in sorted(folder.glob("scene[0-9][0-9][0-9][0-9]_*")) if path.is_dir()}
        read_labels(source / "scannetv2-labels.combined.tsv")  # missing? say so now
    refused = [name for name in scenes if name[5:9].isdigit() and int(name[5:9]) in VALIDATION]
    if refused and not settings.allow_val:
        common.say(
            f"leaving out {len(refused)} validation scenes, such as {refused[0]}: the benchmarks are built on them (--allow_val)"
        )
        scenes = {name: path for name, path in scenes.items() if name not in refused}
    if not scenes:
        raise SystemExit(f"{source} holds no scene to use (looked for scans/scene*_*; validation scenes need --allow_val).")
    return scenes


def build_real(settings, root, scenes):
    """Build a data set from ScanNet scenes (or from boxes alone) under `root`. Returns the facts for the manifest."""
    jobs = [(name, (path, settings)) for name, path in scenes.items()]
    parts = dict(zip(scenes, make_parts(scannet_part, jobs, root / "parts", settings.workers, "scenes")))
    failed = {name: part["failed"] for name, part in parts.items() if "failed" in part}
    good = [part for part in parts.values() if "failed" not in part]
    if not good:
        first = next(iter(failed.values()))
        raise SystemExit(f"none of the {len(scenes)} scenes of {settings.scannet} could be read; the first: {first}")
    for name, reason in list(failed.items())[:5]:
        common.say(f"left out {name}: {reason}")
    targets = {"single_image": settings.single_rows, "multi_view": settings.multi_rows, "video": settings.video_rows}
    candidates = [row for part in good for row in part["rows"]]
    rows = balance(candidates, targets, settings.per_scene, settings.seed)
    if not rows:
        raise SystemExit(f"no question survived the guards in the {len(good)} scenes of {settings.scannet}.")
    for number, row in enumerate(rows):
        row["question_id"] = number
    gallery = [dict(row) for row in sample_rows(rows, settings.seed)]
    locate = [
        {"question": row["question"], "answer": row["boxes"], "image": row["image"], "data_type": row["data_type"],
         "question_id": row["question_id"]}
        for row in rows if row.get("boxes")
    ]  # fmt: skip
    for row in rows:
        row.pop("boxes", None)
        row.pop("asked")
    counts = write_rows(root, rows, locate, settings.traces, settings.seed)
    if settings.source == "scannet":
        pictures = sorted({name for row in rows for name in row["image"]})
        for name in tqdm(pictures, desc="pictures"):
            copy_picture(scenes[name.split("/")[0]], root / "images" / name)
    write_gallery(gallery, lambda name: scenes_room(settings, scenes, name), root / "gallery.html")
    by_kind = Counter(f"{row['data_type']}: {row['question_type']}" for row in rows)
    letters = Counter(row["answer"] for row in rows if row["options"])
    return {
        "counts": counts, "by_kind": dict(sorted(by_kind.items())), "letters": dict(sorted(letters.items())),
        "passed": total_counts(part["passed"] for part in good),
        "candidates": total_counts({f"{row['data_type']}: {row['question_type']}": 1} for row in candidates),
        "rejected": total_counts(part["rejected"] for part in good),
        "skipped": total_counts(part["skipped"] for part in good), "failed_scenes": failed, "scenes": len(good),
    }  # fmt: skip


def scenes_room(settings, scenes, name):
    """The Room of a scene, read again."""
    if settings.source == "meta":
        return read_meta(settings.scannet)[name]
    return read_scannet(scenes[name], read_labels(Path(settings.scannet) / "scannetv2-labels.combined.tsv"))


def copy_picture(folder, target):
    """Copy the colour picture whose number is target's from a scene's folder; padded names lose their zeros."""
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        numbered = {int(path.stem): path for path in (folder / "color").glob("*.jpg") if path.stem.isdigit()}
        new = target.with_suffix(".new")
        with common.naming(target):
            shutil.copyfile(numbered[int(target.stem)], new)
        new.rename(target)


# ------------------------------------------------------------------------------------------------
# 7. The gallery
# ------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
article { display: flex; gap: 1.2em; margin: 1.2em 0; align-items: flex-start }
.pictures { display: flex; flex-wrap: wrap; gap: 4px; flex: 0 0 480px }
.pictures svg { display: block }
.words { flex: 1 } .thought { color: #666; font-size: 13px } .answer { font-weight: 600 }
"""


def sample_rows(rows, seed, count=2):
    """`count` rows of each kind of picture and type, for the gallery."""
    groups = {}
    for row in random.Random(seed).sample(rows, len(rows)):
        groups.setdefault((row["data_type"], row["question_type"]), []).append(row)
    return [row for _, group in sorted(groups.items()) for row in group[:count]]


def shown(text, most=4000):
    """Text from outside as HTML: escaped, cut, and nothing in it is unseen."""
    return html.escape(common.visible(text, most))


def picture_svg(frame, boxes, asked, width):
    """One picture as inline SVG, with the boxes of the asked objects. boxes: {number: box}; asked: {number: label}."""
    with Image.open(frame.color) as image:
        w, h = image.size
        small = image.convert("RGB").resize((width, round(h * width / w)))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    inside = [f'<image href="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}" width="{w}" height="{h}"/>']
    for number, label in asked.items():
        if number in boxes:
            x1, y1, x2, y2 = boxes[number]
            unit = w / 160  # so that lines and letters look the same in small and large pictures
            inside.append(
                f'<rect x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}" fill="none" stroke="orange" stroke-width="{unit}"/>'
                f'<text x="{x1}" y="{max(y1 - unit, 6 * unit)}" font-size="{6 * unit}" fill="orange">{shown(label, 60)}</text>'
            )
    return f'<svg viewBox="0 0 {w} {h}" width="{width}" height="{small.height}">{"".join(inside)}</svg>'


def outline_above(thing):
    """The outline (n, 2) of an object's box as seen from above."""
    flat = corners(thing)[:, :2]
    try:
        return flat[ConvexHull(flat).vertices]
    except QhullError:  # a box without breadth
        return flat


def plan_svg(room, asked, frames, side=260):
    """The room from above as inline SVG: every object's box, the asked ones filled and named, and where the camera stood
    and looked. North is up; one grid square is a metre."""
    outlines = {o.number: outline_above(o) for o in room.objects}
    points = np.concatenate([*outlines.values(), *(frame.pose[None, :2, 3] for frame in frames)])
    low, high = np.floor(points.min(0) - 0.3), np.ceil(points.max(0) + 0.3)
    scale = side / (high - low).max()

    def spot(point):
        return (point[0] - low[0]) * scale, (high[1] - point[1]) * scale

    width, height = (high - low) * scale
    inside = [f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fafafa" stroke="#ccc"/>']
    for x in np.arange(low[0] + 1, high[0]):
        inside.append(f'<line x1="{(x - low[0]) * scale:.1f}" x2="{(x - low[0]) * scale:.1f}" y2="{height:.0f}" stroke="#eee"/>')
    for y in np.arange(low[1] + 1, high[1]):
        inside.append(f'<line y1="{(high[1] - y) * scale:.1f}" y2="{(high[1] - y) * scale:.1f}" x2="{width:.0f}" stroke="#eee"/>')
    for thing in sorted(room.objects, key=lambda o: o.number in asked):
        ring = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(spot, outlines[thing.number]))
        inside.append(f'<polygon points="{ring}" fill="{"#fc9" if thing.number in asked else "none"}" stroke="#999"/>')
    for number, frame in enumerate(frames, 1):
        x, y = spot(frame.pose[:2, 3])
        dx, dy = 18 * level_axes(frame.pose)[1]
        inside.append(
            f'<path d="M{x:.1f} {y:.1f} l{dx:.1f} {-dy:.1f}" stroke="#36c" stroke-width="2"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#36c"/>'
            f'<text x="{x + 4:.1f}" y="{y - 4:.1f}" font-size="9">{number}</text>'
        )
    for thing in room.objects:
        if thing.number in asked:
            x, y = spot(thing.centre)
            inside.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" text-anchor="middle">{shown(thing.label, 60)}</text>')
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">{"".join(inside)}</svg>'


def write_gallery(rows, room_of, path):
    """One page, no server: for each row its pictures with boxes, question, answer, thought, and a plan of the room.

    rows hold `asked` (object numbers) beside the released fields, and `thought`; room_of(scene) -> Room. All text is escaped.
    """
    rooms, body, heading = {}, [], ""
    for row in tqdm(rows, desc="gallery"):
        scene = scene_of(row)
        if scene not in rooms:
            rooms[scene] = room_of(scene)
        room = rooms[scene]
        numbers = [int(Path(name).stem) for name in row["image"] if name.endswith(".jpg")]
        frames = [next(f for f in room.frames if f.number == number) for number in numbers]
        asked = {o.number: o.label for o in room.objects if o.number in row["asked"]}
        pictures = [picture_svg(f, look(room, f)[0], asked, 480 if len(frames) == 1 else 116) for f in frames]
        title = f"{row['question_type']}, {row['data_type'].replace('_', ' ')}"
        if title != heading:
            body.append(f"<h2>{shown(title)}</h2>")
            heading = title
        options = "".join(f"<div>{shown(option)}</div>" for option in row["options"] or [])
        left = f'<div class="pictures">{"".join(pictures)}</div>' if pictures else ""
        body.append(
            f'<article>{left}<div class="words">'
            f'<div>{shown(row["question"])}</div>{options}<div class="answer">{shown(row["answer"])}</div>'
            f'<div class="thought">{shown(row["thought"])}</div><div class="thought">{shown(scene)}</div></div>'
            f"{plan_svg(room, asked, frames)}</article>"
        )
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Stage 0</title><style>{STYLE}</style><body>'
    lead = (
        "<h1>Questions, and the geometry behind them</h1><p>Beside each question stands the room from above: one square is a "
        "metre, the asked objects are filled, blue is where the camera stood and looked, numbered as the pictures.</p>"
    )
    common.write_whole(path, page + lead + "\n".join(body) + "</body></html>")


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
    with common.naming(path):
        sheet.save(path)


# ------------------------------------------------------------------------------------------------
# 8. The toy's base: a tiny Qwen2.5-VL that sees
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
    `folder`/model appears when it is whole.
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
    common.embed_patches_by_matrix(model)
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
        common.write_whole(folder / "scores.json", json.dumps(scores, indent=2))
        new, old = folder / "model.new", folder / "model.old"
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        with common.naming(new):
            for part in (model, tokenizer, processor):
                part.save_pretrained(new)
        if (folder / "model").exists():
            (folder / "model").rename(old)
        new.rename(folder / "model")
        shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------
# 9. Main
# ------------------------------------------------------------------------------------------------


def prepare(root, config, settings):
    """Make `root` ready for data made with `config` (a dict). Returns whether there is anything to do.

    A folder that holds the data already is kept; one that was begun is continued; one of other settings is refused.
    """
    manifest, begun = root / "manifest.json", root / "parts.json"
    if settings.resume != "never":
        for path in (manifest, begun):
            old = json.loads(path.read_text()).get("config", {}) if path.is_file() else config
            for name in config:
                if old.get(name) != config[name]:
                    raise SystemExit(
                        f"{root} was made with --{name} {old.get(name)}, not {config[name]}. Give the same, or --resume never "
                        "to make it anew, or another folder."
                    )
        if manifest.is_file():
            drop_parts(root)
            common.say(f"found the data in {root}; --resume never makes it anew")
            return False
    else:
        for name in ("manifest.json", *common.FILES.values(), "objects.jsonl"):  # first: they need the pictures
            (root / name).unlink(missing_ok=True)
        for name in ("parts", "heldout", "scans", "images"):
            shutil.rmtree(root / name, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    common.write_whole(begun, json.dumps({"config": config}))
    return True


def drop_parts(root):
    """Delete what was kept for a run that might be stopped."""
    for folder in (root, root / "heldout"):
        shutil.rmtree(folder / "parts", ignore_errors=True)
    (root / "parts.json").unlink(missing_ok=True)


def finish(root, config, facts):
    """Write the manifest: the data is complete."""
    rules = {name: {"value": value, "from": origin, "meaning": text} for name, (value, origin, text) in RULE_TABLE.items()}
    facts = {"config": config, "rules": rules, "dropped_nyu40": sorted(DROPPED_NYU40)} | facts
    common.write_whole(root / "manifest.json", json.dumps(facts, indent=2))
    drop_parts(root)


def main_real(settings):
    """Data from ScanNet scenes, or from boxes alone."""
    root = Path(settings.out if settings.out != f"runs/{settings.preset}/base" else f"data/{settings.source}")
    names = ("source", "scannet", "seed", "allow_val", "extra", "single_rows", "multi_rows", "video_rows", "per_scene", "traces")
    config = {name: getattr(settings, name) for name in names}
    if not settings.scannet:
        raise SystemExit(f"--source {settings.source} needs --scannet: the folder with scans/, or the JSON file of boxes.")
    scenes = list_scenes(settings)
    if prepare(root, config, settings):
        facts = build_real(settings, root, scenes)
        finish(root, config, facts)
        print(f"wrote {root} from {facts['scenes']} scenes ({len(facts['failed_scenes'])} left out)")
        print(f"{'rows':>8} {'passed':>8} {'refused by a guard':>20}")
        for name, count in facts["by_kind"].items():
            refused = sum(n for reason, n in facts["rejected"].items() if reason.startswith(f"{name}: "))
            print(f"{count:8} {facts['passed'][name]:8} {refused:20}  {name}")


def main_toy(settings):
    """The toy's data, then its base. All the rows that its rooms give are kept."""
    root, folder = Path(settings.data), Path(settings.out)
    config = {name: getattr(settings, name) for name in ("seed", "rooms", "heldout_rooms", "traces")}
    if os.environ.get("RANK", "0") == "0" and prepare(root, config, settings):
        workers, heldout = settings.workers, root / "heldout"
        counts = {
            "train": build_toy(root, settings.rooms, 0, settings.seed, settings.traces, workers, True),
            "heldout": build_toy(heldout, settings.heldout_rooms, settings.rooms, settings.seed, 0, workers, False),
        }
        draw_gallery(root, root / "gallery.png", settings.seed)
        finish(root, config, {"counts": counts})
        print(f"wrote {root}: " + ", ".join(f"{n} {kind}" for kind, n in counts["train"]["by_type"].items()))
    common.start_processes(settings)
    if settings.resume == "never" or not (folder / "model" / "config.json").is_file():
        train_base(settings, root, folder)


@common.ending_together()
def main():
    """Build the data (and the toy's base); what is already there is kept."""
    settings = common.parse_settings(DataSettings, PRESETS, "base")
    if settings.source not in ("toy", "scannet", "meta"):
        raise SystemExit(f"--source {settings.source}: choose toy, scannet or meta.")
    settings.traces = settings.traces or (600 if settings.source == "toy" else 1255)
    with common.stop_at_once(settings):
        (main_toy if settings.source == "toy" else main_real)(settings)


if __name__ == "__main__":
    main()
