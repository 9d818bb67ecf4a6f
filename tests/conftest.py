"""What the tests share: a tiny model with random weights, and a folder in the released schema with small files."""

import json
import os
import string
import sys
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as common.py does, before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from support import toy_world  # noqa: E402

if sys.platform == "win32":  # only administrators may make links there
    Path.symlink_to = lambda *_, **__: pytest.skip("this test makes a symbolic link")

PHOTO = Path(__file__).resolve().parents[2] / "shared" / "data" / "real_photo" / "000017.jpg"

TEXTS = [
    *common.INSTRUCTIONS.values(),
    common.SYSTEM,
    "system\n",
    "user\n",
    "assistant\n",
    string.printable * 2,
    "0 1 2 3 4 5 6 7 8 9",
    '[{"label":"chair","bbox_2d":[12,34,56,78]},{"label":"table","bbox_2d":[90,12,34,56]}]',
    '[{"bbox_2d":[12,34,56,78],"label":"chair"}]',
    "<think>The chair is at 12, 34 and the table at 56, 78.</think><answer>B</answer>",
    "From the camera's perspective, is the chair to the table's left, right, front, or back?",
    "Options:\nA. left\nB. right\nC. front\nD. back",
    "Measuring from the closest point of each object, which is closer to the lamp: the chair or the table?",
    "What is the length of the longest dimension of the chair, measured in centimeters?",
    "How many chairs are in this room? What is the size of this room (in square meters)?",
] * 3


@pytest.fixture(scope="session")
def photo():
    """photo(width, height, seed) -> a picture: a piece of a real photograph where there is one, else noise."""
    real = Image.open(PHOTO).convert("RGB") if PHOTO.is_file() else None

    def make(width, height, seed=0):
        rng = np.random.default_rng(seed)
        if real is None:
            return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        x, y = rng.integers(0, real.width // 2), rng.integers(0, real.height // 2)
        return real.crop((x, y, x + real.width // 2, y + real.height // 2)).resize((width, height))

    return make


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """tiny_models(family) -> the folder of a model of 1.3 M random weights, with tokenizer and image processor. family: a key of
    common.FAMILIES."""

    @lru_cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        tokenizer = toy_world.build_tokenizer(TEXTS)
        model = toy_world.build_model(tokenizer, 0, family)
        if family == "qwen3_vl":  # heads that are wider than hidden_size / heads, as in the 4B model
            model.config.text_config.head_dim, model.config.text_config.rope_parameters["mrope_section"] = 48, [8, 8, 8]
            torch.manual_seed(0)
            model = type(model)(model.config)
            torch.nn.init.normal_(model.model.visual.patch_embed.proj.bias, std=0.3)
        for layer in model.model.language_model.layers:  # they start at zero: no token would look at any other
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                torch.nn.init.normal_(weight, std=0.06)
        for part in (model, tokenizer, toy_world.build_processor(model)):
            part.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_models):
    """The tiny Qwen2.5-VL."""
    return tiny_models("qwen2_5_vl")


@pytest.fixture
def backbone(tiny_model):
    """The tiny model, loaded anew for each test."""
    return common.load_backbone(tiny_model, "fp32")


SMALL, LARGE = "scene0011_00", "scene0022_01"  # 640x480 and 1296x968 colour
DIRECTION = "From the camera's perspective, is the chair to the table's left, right, front, or back?"
DISTANCE = "Measuring from the closest point of each object, which of these two objects (chair, lamp) is closer to it?"
GAP = "Measuring from the closest point of each object, what is the distance between the chair and the bed (in meters)?"
LENGTH = "What is the length of the longest dimension (length, width, or height) of the bed, measured in centimeters?"
COUNT = "How many chair(s) are in this room?"
AREA = "What is the size of this room (in square meters)?"
ORDER = "What will be the first-time appearance order of the categories in the video: chair, bed, lamp, table?"
SIDES = ["A. left", "B. right", "C. front", "D. back"]
PAIR = ["A. chair", "B. lamp"]
ORDERS = ["A. bed, lamp, chair, table", "B. chair, bed, lamp, table", "C. lamp, bed, table, chair"]


@pytest.fixture(scope="session")
def ladder_data(tmp_path_factory, photo):
    """A folder as SpatialLadder-26k releases it: 14 spatial, 6 grounding and 4 coldstart rows, and their pictures."""
    root = tmp_path_factory.mktemp("ladder")
    frames = {SMALL: [20 * n for n in range(8)], LARGE: [20 * n for n in range(16)]}
    frames[LARGE][-1] = 1040  # one with more digits
    for seed, (scene, size) in enumerate({SMALL: (640, 480), LARGE: (1296, 968)}.items()):
        (root / "images" / scene).mkdir(parents=True)
        for frame in frames[scene]:
            photo(*size, seed=100 * seed + frame).save(root / "images" / scene / f"{frame}.jpg", quality=80)

    one = [f"{SMALL}/20.jpg"]
    big = [f"{LARGE}/40.jpg"]
    views = [f"{SMALL}/{frame}.jpg" for frame in frames[SMALL]]
    video = sorted(f"{LARGE}/{frame}.jpg" for frame in frames[LARGE])  # 0, 100, 1040, 120, ...: the released order
    spatial = [
        (DIRECTION, SIDES, "B", one, "relative direction", "single_image"),
        ("<image>" + DISTANCE, PAIR, "A", one, "relative distance", "single_image"),
        (GAP, None, "0.7", one, "absolute distance", "single_image"),
        (LENGTH, None, "116", one, "object size", "single_image"),
        (DIRECTION, SIDES, "D", big, "relative direction", "single_image"),
        (LENGTH, None, "203", big, "object size", "single_image"),
        ("<image>\n" + DIRECTION, SIDES, "A", views, "relative direction", "multi_view"),
        (DISTANCE, PAIR, "B", views, "relative distance", "multi_view"),
        (COUNT, None, "3", views, "object count", "multi_view"),
        (GAP, None, "1.4", views, "absolute distance", "multi_view"),
        ("<image>" + COUNT, None, "2", video, "object count", "video"),
        (AREA, None, "15.2", video, "room size", "video"),
        (ORDER, ORDERS, "C", video, "appearance order", "video"),
        (GAP, None, "2.1", video, "absolute distance", "video"),
    ]
    names = ("question", "options", "answer", "image", "question_type", "data_type")
    rows = [{"question_id": n} | dict(zip(names, row)) for n, row in enumerate(spatial)]
    write_rows(root / "spld_spatial_data.jsonl", rows)

    chair, table = [64, 48, 320, 240], [300, 200, 620, 470]
    located = [(row[0], row[3], row[5]) for row in spatial if row[5] == "single_image"]
    rows = []
    for n, (question, image, data_type) in enumerate(located):
        scale = 2 if image == big else 1
        boxes = [[scale * x for x in box] for box in ((chair, table) if n % 2 else (chair,))]
        answer = [{"bbox_2d": box, "label": label} for box, label in zip(boxes, ("chair", "table"))]
        rows.append({"question_id": n, "question": question, "answer": answer, "image": image, "data_type": data_type})
    write_rows(root / "spld_grounding_data.jsonl", rows)

    rows = []
    for n, image in enumerate((one, big, views, video)):
        rows.append({
            "question_id": n,
            "prompt": f"<image>{DIRECTION}\nOptions:\n" + "\n".join(SIDES) + "\n" + common.INSTRUCTIONS["think"],
            "solution": "<think>The chair is at 64, the table at 300.</think><answer>A</answer>",
            "image": image, "data_type": ("single_image", "single_image", "multi_view", "video")[n],
        })  # fmt: skip
    write_rows(root / "spld_coldstart_data.jsonl", rows)
    return root


def write_rows(path, rows):
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
