"""The toy: rooms with coloured solids, and a tiny Qwen2.5-VL (or Qwen3-VL) that sees them.

1 rooms      random solids on a floor: small rooms with eight cameras around them, larger ones with a camera that turns
2 pictures   a ray caster: colour, depth and the solid behind every pixel
3 files      a room in ScanNet's own layout, so that stage 0 reads it with the reader of the real data
4 the base   tokenizer, model, and the training of its vision tower

The base takes the place of Qwen's pre-trained model: its vision tower can see coloured solids, its language model is random.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from plyfile import PlyData, PlyElement
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

import common
from support import files, runs

# ------------------------------------------------------------------------------------------------
# 1. Rooms
# ------------------------------------------------------------------------------------------------

COLOURS = {"red": (214, 48, 49), "green": (46, 160, 67), "blue": (52, 90, 220), "yellow": (238, 212, 60),
           "purple": (150, 70, 190), "cyan": (70, 200, 210)}  # fmt: skip
SHAPES = ("cube", "ball", "cone")
SIDE = 112  # pixels: 4 x 4 picture tokens of 28 x 28
FOCAL = 126.0
PITCH = math.radians(60)  # downwards: nearer things are lower in the picture
CAMERA_HEIGHT, CAMERA_BACK = 5.5, 3.2  # metres above the floor and from the centre of the room
SIZES = 0.5, 1.65  # metres: smallest and largest solid
HALVES = 2.8, 5.4  # metres from the turning camera to the walls
TOUR = 0, 20, 60, 80, 120, 140, 180, 200  # numbers of the frames of a turning camera: two frames for each quarter
WALLS = {"grey": (50, 60, 80), "beige": (235, 200, 150), "brown": (105, 80, 65), "white": (245, 245, 245)}  # at -x, +x, -y, +y
SECOND_TURN = math.radians(8)  # between the two frames of a quarter: the halves of a video's temporal patch differ


def toy_intrinsics():
    """3x3 pinhole matrix. Pixel centres are at whole numbers, as in ScanNet."""
    return np.array([[FOCAL, 0, (SIDE - 1) / 2], [0, FOCAL, (SIDE - 1) / 2], [0, 0, 1]])


def toy_camera(yaw, back=CAMERA_BACK):
    """Camera-to-world matrix (4, 4) of a camera that looks down in direction `yaw`, from `back` metres behind the centre of the
    room. Camera axes: x right, y down, z forward."""
    (c, s), (flat, steep) = (math.cos(yaw), math.sin(yaw)), (math.cos(PITCH), math.sin(PITCH))
    level = np.array([-s, c, 0.0])  # horizontal viewing direction
    pose = np.eye(4)
    pose[:3, :3] = np.array([[c, steep * s, -flat * s], [s, -steep * c, flat * c], [0, -flat, -steep]])  # columns: x, y, z
    pose[:3, 3] = -back * level + np.array([0, 0, CAMERA_HEIGHT])
    return pose


def make_room(rng):
    """Draw a small room with eight cameras around it: a dict of solids (shape, colour, size, x, y, yaw), cameras, numbers (of
    the frames in the recording), half (of the floor's sides, in metres) and the colour of the floor.

    Colours are unique. In every picture all solids are inside the frame and their centres are in different 28-pixel cells.
    """
    names = [(rng.choice(SHAPES), colour) for colour in rng.sample(sorted(COLOURS), rng.choice([1, 2, 3, 3, 3]))]
    while True:
        sizes = [log_uniform(rng, *SIZES) for _ in names]  # not redrawn below, or mostly small solids would pass
        for _ in range(60):
            cameras = [toy_camera((side + rng.uniform(-0.4, 0.4)) * math.pi / 4) for side in range(8)]
            solids = [
                {"shape": shape, "colour": colour, "size": size, "x": rng.uniform(-2.2, 2.2), "y": rng.uniform(-2.2, 2.2),
                 "yaw": rng.uniform(0, math.pi / 2)}
                for (shape, colour), size in zip(names, sizes)
            ]  # fmt: skip
            if all(well_placed(solids, camera) for camera in cameras):
                return {"solids": solids, "cameras": cameras, "numbers": range(0, 160, 20), "half": (2.5, 2.5),
                        "floor": [rng.randint(120, 190) for _ in range(3)]}  # fmt: skip


def log_uniform(rng, low, high):
    """A random number whose logarithm is uniform."""
    return low * (high / low) ** rng.random()


def make_tour(rng):
    """Draw a room with a camera in its middle that turns to the right, a quarter at a time, from wall to wall: a dict as from
    make_room, with two frames of each quarter. Every solid is whole in one quarter's first frame and outside the pictures of the
    other three: what is asked about several solids must be put together from several pictures."""
    names = [(rng.choice(SHAPES), colour) for colour in rng.sample(sorted(COLOURS), rng.choice([3, 4, 4, 5, 5, 6]))]
    if rng.random() < 0.4:
        names = names[:1] * rng.choice([2, 3, 4, 5]) + names[1 : rng.choice([2, 3])]
    yaws = [-quarter * math.pi / 2 for quarter in range(4)]
    cameras = [[toy_camera(yaw, 0), toy_camera(yaw - SECOND_TURN, 0)] for yaw in yaws]
    while True:
        half = [log_uniform(rng, *HALVES) for _ in range(2)]
        quarters = rng.sample(range(4), 4) + [rng.randrange(4) for _ in names]
        solids = []
        for (shape, colour), quarter in zip(names, quarters):
            for _ in range(60):
                distance, yaw = rng.uniform(1.2, max(half)), yaws[quarter] + rng.uniform(-0.6, 0.6)
                solid = {"shape": shape, "colour": colour, "size": log_uniform(rng, *SIZES), "yaw": rng.uniform(0, math.pi / 2),
                         "x": -distance * math.sin(yaw), "y": distance * math.cos(yaw)}  # fmt: skip
                within = all(abs(solid[axis]) + 0.75 * solid["size"] < side for axis, side in zip("xy", half))
                here = [other for other, place in zip(solids, quarters) if place == quarter]
                if within and well_placed([*here, solid], cameras[quarter][0]) and do_not_touch([*solids, solid]) and all(
                    is_outside(solid, camera) for other, pair in enumerate(cameras) for camera in pair if other != quarter
                ):  # fmt: skip
                    solids.append(solid)
                    break
        if len(solids) == len(names):
            return {"solids": solids, "cameras": sum(cameras, []), "numbers": TOUR, "half": half,
                    "floor": [rng.randint(120, 190) for _ in range(3)]}  # fmt: skip


def do_not_touch(solids):
    """Whether there is room between all solids."""
    return all(
        math.hypot(a["x"] - b["x"], a["y"] - b["y"]) >= 0.75 * (a["size"] + b["size"]) + 0.2
        for a, b in itertools.combinations(solids, 2)
    )  # fmt: skip


def is_outside(solid, camera):
    """Whether no part of a solid is inside the picture."""
    x1, y1, x2, y2 = outline(solid, camera)
    return x2 < -0.5 or y2 < -0.5 or max(x1, y1) > SIDE - 0.5


def well_placed(solids, camera):
    """Whether the solids do not touch, are inside the picture, and have their centres in different cells of it."""
    if not do_not_touch(solids):
        return False
    cells = set()
    for solid in solids:
        x1, y1, x2, y2 = outline(solid, camera)
        if min(x1, y1) < 1 or max(x2, y2) > SIDE - 2:
            return False
        cells.add((int(x1 + x2) // 56, int(y1 + y2) // 56))
    return len(cells) == len(solids)


def outline(solid, camera):
    """Bounds x1, y1, x2, y2 in pixels of the upright box around a solid; they contain the whole solid."""
    half = 0.5 * solid["size"] * (math.sqrt(2) if solid["shape"] == "cube" else 1)
    corners = itertools.product((-half, half), (-half, half), (0, solid["size"]))
    points = np.array([[solid["x"] + x, solid["y"] + y, z] for x, y, z in corners])  # (8, 3)
    points = (points - camera[:3, 3]) @ camera[:3, :3]  # in the camera's axes
    u, v = (points @ toy_intrinsics().T)[:, :2].T / np.maximum(points[:, 2], 0.01)  # (8,) each; far outside if behind the camera
    return u.min(), v.min(), u.max(), v.max()


# ------------------------------------------------------------------------------------------------
# 2. Pictures
# ------------------------------------------------------------------------------------------------


def render(room, camera):
    """Ray-cast a room: colour (H, W, 3) uint8, depth (H, W) in metres, instance (H, W) int (0 = room, k = k-th solid)."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(toy_intrinsics()).T  # (H, W, 3), z = 1
    ray, origin = pixels @ camera[:3, :3].T, camera[:3, 3]  # a step of 1 along `ray` is a depth of 1 m
    light = np.array([0.35, -0.25, 0.9])

    # The room is a box of which only the inner faces are drawn: the nearest face that a ray leaves through.
    (x, y), height = room["half"], 9.0
    low, high = np.array([-x, -y, 0.0]), np.array([x, y, height])
    far = np.maximum((low - origin) / ray, (high - origin) / ray)  # (H, W, 3)
    far = np.where(far > 0, far, np.inf)  # the camera is outside the box: a wall behind it is not hit
    depth, axis = far.min(-1), far.argmin(-1)  # (H, W)
    wall = np.minimum(2 * axis + (np.take_along_axis(ray, axis[..., None], -1)[..., 0] > 0), 4)  # (H, W); 4: the floor
    colour = np.array([*WALLS.values(), room["floor"]], float)[wall]
    instance = np.zeros((SIDE, SIDE), int)
    for number, solid in enumerate(room["solids"], 1):
        x1, y1, x2, y2 = outline(solid, camera)  # cast rays only where the solid can be hit
        part = slice(max(0, math.floor(y1)), math.ceil(y2) + 1), slice(max(0, math.floor(x1)), math.ceil(x2) + 1)
        hit, normal = SOLIDS[solid["shape"]](solid, origin, ray[part])  # (h, w) depth or inf, (h, w, 3)
        nearer = hit < depth[part]
        shade = 0.45 + 0.55 * np.clip(normal @ light / np.linalg.norm(light), 0, 1)
        depth[part], instance[part] = np.where(nearer, hit, depth[part]), np.where(nearer, number, instance[part])
        colour[part] = np.where(nearer[..., None], np.array(COLOURS[solid["colour"]]) * shade[..., None], colour[part])
    return colour.round().astype(np.uint8), depth, instance


def hit_cube(solid, origin, ray):
    """Where rays (H, W, 3) hit a cube on the floor: depth (H, W), inf for a miss; outward normals (H, W, 3)."""
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
    """Where rays hit a ball on the floor; see hit_cube."""
    radius = solid["size"] / 2
    centre = np.array([solid["x"], solid["y"], radius])
    a, b = (ray**2).sum(-1), ray @ (origin - centre)
    root = b**2 - a * (((origin - centre) ** 2).sum() - radius**2)
    enter = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
    point = origin + ray * np.where(np.isfinite(enter), enter, 0)[..., None]
    return enter, (point - centre) / radius


def hit_cone(solid, origin, ray):
    """Where rays from above hit a cone on the floor, as wide as it is high; see hit_cube."""
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

# ------------------------------------------------------------------------------------------------
# 3. Files in ScanNet's layout
# ------------------------------------------------------------------------------------------------


def solid_points(solid):
    """Vertices (n, 3) on the surface of a solid, dense enough to give its outline in a picture."""
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
    """Write a toy room in ScanNet's layout to `folder`, whose name is the room's id.

    As in ScanNet, the stored coordinates are NOT axis-aligned. The mesh has vertices only, because stage 0 reads no faces.
    """
    name, angle = folder.name, rng.uniform(0, 2 * math.pi)
    align = np.eye(4)  # world_aligned = align @ world
    align[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    align[:3, 3] = [rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(-1, 1)]
    back = np.linalg.inv(align)
    for kind in ("color", "depth", "pose", "intrinsic"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    grids = np.meshgrid(*(np.linspace(-half, half, math.ceil(4 * half) + 1) for half in room["half"]))  # at most half a metre apart
    floor = np.stack([*(grid.ravel() for grid in grids), np.zeros(grids[0].size)], 1)
    parts = [floor] + [solid_points(solid) for solid in room["solids"]]
    labels = ["floor"] + [f"{solid['colour']} {solid['shape']}" for solid in room["solids"]]
    points = np.concatenate(parts) @ back[:3, :3].T + back[:3, 3]
    fields = [(axis, "f4") for axis in ("x", "y", "z")] + [(channel, "u1") for channel in ("red", "green", "blue", "alpha")]
    vertices = np.zeros(len(points), fields)
    vertices["x"], vertices["y"], vertices["z"] = points.T
    PlyData([PlyElement.describe(vertices, "vertex")]).write(folder / f"{name}_vh_clean_2.ply")
    segments = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": segments.tolist()}))
    groups = [{"objectId": i, "segments": [i], "label": label} for i, label in enumerate(labels)]
    (folder / f"{name}.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    (folder / f"{name}.txt").write_text("axisAlignment = " + " ".join(f"{x:.9f}" for x in align.ravel()) + "\n")
    intrinsics = np.eye(4)
    intrinsics[:3, :3] = toy_intrinsics()
    for kind in ("color", "depth"):
        np.savetxt(folder / "intrinsic" / f"intrinsic_{kind}.txt", intrinsics, fmt="%.6f")
    for number, camera in zip(room["numbers"], room["cameras"]):
        colour, depth, _ = render(room, camera)
        stem = str(number)  # the toy keeps some frames of a recording, as thinned exports of ScanNet do
        Image.fromarray(colour).save(folder / "color" / f"{stem}.jpg", quality=95)
        Image.fromarray((depth * 1000).round().astype(np.uint16)).save(folder / "depth" / f"{stem}.png", compress_level=1)
        np.savetxt(folder / "pose" / f"{stem}.txt", back @ camera, fmt="%.9f")


def write_labels(path):
    """Write the toy's label table in the format of scannetv2-labels.combined.tsv."""
    rows = ["raw_category\tnyu40id\tnyu40class", "floor\t2\tfloor"]
    rows += [f"{colour} {shape}\t29\tbox" for colour in COLOURS for shape in SHAPES]
    path.write_text("\n".join(rows) + "\n")

# ------------------------------------------------------------------------------------------------
# 4. The base: a tiny model that sees
# ------------------------------------------------------------------------------------------------

NAMES = [*COLOURS, *SHAPES]  # of solids; the words for walls are learnt, too
JSON_PIECES = ['[{"label":"', '","bbox_2d":[', '","picture":', ',"bbox_2d":[', ']},{"label":"', "]}]"]  # a token each: shorter
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def build_tokenizer(texts):
    """A byte-level BPE tokenizer trained on `texts`, with Qwen's special tokens. Digits and names are tokens of their own; the
    words up to the next punctuation mark may become one token, because the toy's questions repeat a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    names, marks = Regex(rf" ?\b({'|'.join([*NAMES, *WALLS])})\b"), Regex("[,:;\n]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split(names, "isolated"),
        pre_tokenizers.Split(marks, "merged_with_next"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in JSON_PIECES + TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def build_model(tokenizer, seed, backbone="qwen2_5_vl"):
    """A model of about 1.3 M random weights: transformers' own class, with patches of 14 pixels (Qwen3-VL: 16) merged 2 x 2.
    backbone: a key of common.FAMILIES."""
    torch.manual_seed(seed)
    ids, qwen3 = tokenizer.convert_tokens_to_ids, backbone == "qwen3_vl"
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.06,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5] if qwen3 else [4, 6, 6]},
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": ids("<|im_end|>"),
    }  # fmt: skip
    vision = {
        "qwen2_vl": {"embed_dim": 96, "hidden_size": 128, "mlp_ratio": 3},
        "qwen2_5_vl": {"hidden_size": 96, "intermediate_size": 256, "out_hidden_size": 128, "fullatt_block_indexes": [0, 1, 2]},
        "qwen3_vl": {"hidden_size": 96, "intermediate_size": 256, "out_hidden_size": 128, "num_position_embeddings": 64,
                     "deepstack_visual_indexes": [0, 1]},
    }[backbone]  # fmt: skip
    config = AutoConfig.for_model(
        backbone, text_config=text | ({"head_dim": 32} if qwen3 else {}),
        vision_config=vision | {"depth": 3, "num_heads": 4, "initializer_range": 0.06},
        tie_word_embeddings=True, image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    return common.FAMILIES[backbone].model(config)


def build_processor(model):
    """An image processor for a toy model that resizes pictures to 4 to 16 tokens: the toy's 112 x 112 pixels stay, or become
    128 x 128 where a token has 32 x 32 pixels, so that 4 x 4 tokens cover the same cells of the picture."""
    vision = model.config.vision_config
    processor = Qwen2VLImageProcessorPil(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
    common.limit_pictures(processor, 4, 16)
    return processor


def cell_targets(rows):
    """What each of the 4 x 4 cells of each picture (or pair of frames) shows, one cell a picture token: names (pictures, 16, 9),
    1 for the colour and the shape of the object whose centre is there; boxes (pictures, 16, 4), in units of the picture's side."""
    names, boxes = torch.zeros(len(rows), 16, len(NAMES)), torch.zeros(len(rows), 16, 4)
    for index, row in enumerate(rows):
        for thing in row["objects"]:
            x1, y1, x2, y2 = thing["bbox_2d"]
            cell = 4 * int((y1 + y2) / 2 // 28) + int((x1 + x2) / 2 // 28)
            names[index, cell, [NAMES.index(word) for word in thing["label"].split()]] = 1
            boxes[index, cell] = torch.tensor(thing["bbox_2d"]) / SIDE
    return names, boxes


def nearest_wall(picture):
    """The number in WALLS of the wall in the middle of a picture's upper edge."""
    return int(np.abs(np.array([*WALLS.values()]) - picture.getpixel((SIDE // 2, 0))).sum(1).argmin())


class VisionTask(torch.nn.Module):
    """What trains the vision tower: predict at every picture token the colour, the shape and the box of the object whose centre
    is in this cell, the wall behind it, and the mean colours of the cell's patches (where does the floor end?). Names are scored
    against their WORD EMBEDDINGS, so that pictures and words share one space; the linear heads are thrown away after the
    training. Cells without an object name no wall: the toy's attention is not sharp, and would read the walls of all pictures.
    The task sees single pictures, and pairs of video frames, which share their tokens."""

    def __init__(self, model, tokenizer, processor):
        super().__init__()

        def first_ids(texts):
            return torch.tensor([tokenizer(text)["input_ids"][0] for text in texts])

        width = model.config.text_config.hidden_size
        self.model, self.processor, self.words = model, processor, model.get_input_embeddings().weight
        self.to_box, self.to_digits = torch.nn.Linear(width, 4), torch.nn.Linear(width, 4 * 3 * width)
        self.to_colours = torch.nn.Linear(width, 4 * 3 * 2)  # of the 2 x 2 patches of a token, in both frames
        self.digit_ids, self.name_ids = first_ids("0123456789"), first_ids(f" {name}" for name in NAMES)
        self.wall_ids = first_ids(f" {name}" for name in WALLS)
        self.label_ids = first_ids(NAMES)  # in JSON no space precedes a label, so "blue" and " blue" are two tokens

    def forward(self, rows, folder):
        """n rows with one picture or two frames, sorted by that -> cells (n, 16, width), a logit for each name (n, 16, 9), boxes
        (n, 16, 4), the true mean colours of the patches (n, 16, 24), and the numbers of the walls above (n,)."""
        parts, walls = [], []
        for count in (1, 2):
            names = [name for row in rows if len(row["image"]) == count for name in row["image"]]
            pictures = [common.load_image(folder / "images" / name) for name in names]
            parts += [common.picture_patches(self.processor, pictures, video=count == 2)] if names else []  # pairs: one video
            walls += [nearest_wall(picture) for picture in pictures[::count]]
        pixels, grids = torch.cat([pixels for pixels, _ in parts]), torch.cat([grid for _, grid in parts])
        seen = self.model.model.visual(pixels, grid_thw=grids)
        cells = sum(getattr(seen, "deepstack_features", None) or [], seen.pooler_output).view(len(rows), 16, -1)
        colours = pixels.view(len(rows), 16, 4 * 3 * 2, -1).mean(-1)
        return cells, cells @ self.words[self.name_ids].T, self.to_box(cells), colours, torch.tensor(walls)

    def loss(self, rows, folder):
        """The loss of some rows: is there an object, which colour, which shape, its box twice, as digits and as numbers, the
        colours of the patches, and the wall."""
        rows = sorted(rows, key=lambda row: len(row["image"]))
        cells, logits, boxes, colours, walls = self(rows, folder)
        names, true_boxes = cell_targets(rows)
        on = names.any(-1)  # (n, 16) cells with an object
        side = common.FAMILIES[self.model.config.model_type].box_side or SIDE
        numbers = (true_boxes[on] * side).round().long().clamp(max=999)  # (objects, 4); 1,000 at a border has four digits
        digits = torch.stack([numbers // 100, numbers // 10 % 10, numbers % 10], -1)  # (objects, 4, 3)
        seen = cells @ self.words[self.wall_ids].T  # (n, 16, 4)
        spelled = self.to_digits(cells[on]).view(-1, 4, 3, cells.shape[-1]) @ self.words[self.digit_ids].T  # (objects, 4, 3, 10)
        return (
            F.binary_cross_entropy_with_logits(logits, names, pos_weight=torch.tensor(4.0)) * 5
            + F.cross_entropy(logits[on][:, : len(COLOURS)], names[on][:, : len(COLOURS)])
            + F.cross_entropy(logits[on][:, len(COLOURS) :], names[on][:, len(COLOURS) :])
            + F.cross_entropy(spelled.flatten(0, 2), digits.flatten()) * 2 + 20 * (boxes[on] - true_boxes[on]).abs().mean()
            + (self.to_colours(cells) - colours).abs().mean() * 5
            + F.cross_entropy(seen[on], walls[:, None].expand_as(on)[on]) + 0.1 * (seen[~on] ** 2).mean()
        )  # fmt: skip

    @torch.no_grad()
    def scores(self, rows, folder):
        """F1 of finding objects, accuracy of colours, shapes and walls, and the mean error of a box's side in pixels."""
        rows = sorted(rows, key=lambda row: len(row["image"]))
        cells, logits, boxes, _, walls = self(rows, folder)
        names, true_boxes = cell_targets(rows)
        on, found = names.any(-1), (logits > 0).any(-1)

        def accuracy(part):
            return (logits[on][:, part].argmax(-1) == names[on][:, part].argmax(-1)).float().mean().item()

        return {
            "f1": 2 * (on & found).sum().item() / (on.sum() + found.sum()).item(),
            "colour": accuracy(slice(0, len(COLOURS))), "shape": accuracy(slice(len(COLOURS), None)),
            "wall": (cells @ self.words[self.wall_ids].T).argmax(-1).eq(walls[:, None])[on].float().mean().item(),
            "box_error_px": SIDE * (boxes - true_boxes)[on].abs().mean().item(),
        }  # fmt: skip


def train_base(settings):
    """Train the vision tower of a new model on the pictures in settings.data; the language model stays random. Without this
    pre-training, stage 1 learns no grounding. Writes settings.out/model."""
    root = Path(settings.data)
    tokenizer = build_tokenizer(tokenizer_texts(root))
    model = build_model(tokenizer, settings.seed, settings.backbone)
    common.embed_patches_by_matrix(model)
    processor = build_processor(model)
    task, rows = VisionTask(model, tokenizer, processor), common.read_jsonl(root / "objects.jsonl")

    matrices = [p for p in model.model.visual.parameters() if p.ndim == 2]
    others = [p for p in model.model.visual.parameters() if p.ndim != 2]
    others += [*task.to_box.parameters(), *task.to_digits.parameters(), *task.to_colours.parameters(), task.words]
    optimizers = [runs.Muon(matrices, lr=0.02, weight_decay=0.0), torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0)]
    steps = min(settings.base_steps, settings.max_steps or settings.base_steps)
    bar = tqdm(range(steps), desc="base", disable=runs.rank() > 0)
    for step in bar:
        batch = common.batch_at(rows, step, settings.base_batch, settings.seed)[runs.rank() :: runs.world_size()]
        loss = task.loss(batch, root)
        task.zero_grad()
        loss.backward()
        runs.all_reduce_gradients(matrices + others)
        for parameter in matrices + others:
            parameter.grad /= runs.world_size()
        factor = min(1.0, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer, rate in zip(optimizers, (0.02, 3e-3)):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    scores = task.scores(common.read_jsonl(root / "heldout" / "objects.jsonl")[:256], root / "heldout")
    common.print0("base, on held-out pictures: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    with torch.no_grad():
        for label_id, name_id in zip(task.label_ids, task.name_ids):  # both tokens of a name get the trained embedding
            task.words[label_id] = task.words[name_id]
    if runs.rank() == 0:
        save_base(settings, scores, model, tokenizer, processor)


def tokenizer_texts(root):
    """The texts on which the toy's tokenizer is trained: questions, prompts and answers of the data in `root`."""
    texts = []
    for kind in ("locate", "worked", "coldstart"):
        for row in common.read_jsonl(root / common.FILES[kind])[:4000]:
            texts += [row.get("prompt") or row.get("question", ""), row.get("solution", "")]
    texts += [*common.INSTRUCTIONS.values(), common.SYSTEM, "system\n", "user\n", "assistant\n"]
    return texts + [f" {name} {name}" for name in [*NAMES, *WALLS]] * 50


CODE = {"code in support/toy_world.py": [__file__]}  # a base is recognised by it, too


def is_base_made(settings):
    """Whether settings.out has a base. Raises SystemExit if it was made with other settings, data or code of this file."""
    return runs.is_finished(settings, ("seed", "max_steps", "base_steps", "base_batch", "backbone"), CODE)


def save_base(settings, scores, *parts):
    """Write config.json, scores.json and model/ to settings.out. model/ is there only when all is whole."""
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_folder(folder / "model")
    files.write_atomic(folder / "config.json", json.dumps(runs.run_config(settings, CODE), indent=2))
    files.write_atomic(folder / "scores.json", json.dumps(scores, indent=2))
    with files.disk_errors(folder / "model.new"), files.whole_folder(folder / "model") as new:
        for part in parts:
            part.save_pretrained(new)
