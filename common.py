"""What every stage of SpatialLadder (arXiv 2510.08531) shares, in reading order:

1 examples   rows of JSONL -> Example -> Scene (pictures + the questions asked about them)
2 prompts    the text of a conversation, and what the model is asked to write
3 pictures   files -> patches, and boxes between original and resized pixels
4 backbone   load, adapt (LoRA or full), merge, save a Qwen2.5-VL
5 branches   encode a scene once, branch the questions: the two central functions
6 scoring    text -> answer -> score in [0, 1]; the reward in stage 3 and the metric in eval
7 runs       settings, processes, schedule, metrics, curves, checkpoints, the SFT loop

No stage imports another stage; this file imports none of them.
"""

import argparse
import contextlib
import gc
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before its import: it warns of kernels that nobody needs

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    HfArgumentParser,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

transformers.utils.logging.disable_progress_bar()  # of loading and saving; ours are enough

# ------------------------------------------------------------------------------------------------
# 1. Examples
# ------------------------------------------------------------------------------------------------

DATA_TYPES = ("single_image", "multi_view", "video")
CHOICE_TYPES = ("relative direction", "relative distance", "appearance order", "perspective taking", "view change")
NUMERIC_TYPES = ("absolute distance", "object size", "object count", "room size")
FILES = {
    "locate": "spld_grounding_data.jsonl",
    "spatial": "spld_spatial_data.jsonl",
    "coldstart": "spld_coldstart_data.jsonl",
    "worked": "toy_worked_data.jsonl",  # the toy's own: thoughts without tags, see stage2_understand.py
}


@dataclass
class Example:
    """One question. `answer` is a letter, a number as text, or (locate) a list of boxes in original pixels."""

    id: str
    images: tuple  # absolute paths, in the order in which they are shown
    data_type: str  # single_image, multi_view, video
    question_type: str  # one of the seven, or "locate", "coldstart", "worked"
    question: str  # without options
    options: list | None  # ["A. left", ...]
    answer: object
    solution: str = ""  # coldstart and worked rows: the whole text to be learnt


@dataclass
class Scene:
    """The pictures that several examples share, and those examples."""

    images: tuple
    data_type: str
    examples: list
    encoded: object = None  # the Prefix of these pictures, kept when the vision tower is frozen and small


def read_jsonl(path):
    """Read a JSON-lines file into a list of dicts.

    Raises SystemExit naming the file (missing or empty) or the line (not UTF-8, broken JSON, not an object).
    """
    path, rows = Path(path), []
    if not path.is_file():
        raise SystemExit(f"{path} is missing. Make it with stage0_data.py, or point --data at the folder that has it.")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)  # of bytes: it skips a byte order mark
            except (ValueError, RecursionError) as error:
                raise SystemExit(f"{path} line {number} is not JSON in UTF-8 ({error}). Mend or delete that line.") from None
            if not isinstance(row, dict):
                raise SystemExit(f"{path} line {number} is not an object but {json.dumps(row)[:40]}.")
            rows.append(row)
    if not rows:
        raise SystemExit(f"{path} has no rows.")
    return rows


def read_examples(data, kind):
    """Read one file of the released schema: kind is "locate", "spatial", "coldstart" or "worked".

    Strips `<image>` from questions, sorts video frames by their number (the released files hold them in string
    order), and checks that every field is there and every picture exists inside `data/images` (also where links lead).
    Raises SystemExit naming file, line and what is wrong.
    """
    data = Path(data)
    path, root, examples, paths = data / FILES[kind], (data / "images").resolve(), [], {}
    text_fields = {"locate": ("question",), "spatial": ("question", "question_type")}.get(kind, ("prompt", "solution"))
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path} row {number} (question_id {row.get('question_id')})"
        for name in (*text_fields, "data_type", "image", *["answer"] * (kind == "spatial")):
            if row.get(name) in (None, "", []):
                raise SystemExit(f"{where}: field {name!r} is missing or empty.")
            if name not in ("image", "answer") and not isinstance(row[name], str):
                raise SystemExit(f"{where}: field {name!r} is not text but {row[name]!r}.")
        if row["data_type"] not in DATA_TYPES:
            raise SystemExit(f"{where}: unknown data_type {row['data_type']!r}; known: {', '.join(DATA_TYPES)}.")
        names = [row["image"]] if isinstance(row["image"], str) else row["image"]
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise SystemExit(f"{where}: image {names!r} is not a list of file names.")
        if row["data_type"] == "video":
            names = sorted(names, key=lambda name: int(re.sub(r"\D", "", Path(name).stem) or 0))
        for name in names:
            if name not in paths:
                paths[name] = os.path.realpath(root / name)
                if not paths[name].startswith(str(root) + os.sep):
                    raise SystemExit(f"{where}: picture {name!r} lies outside {root}.")
                if not os.path.isfile(paths[name]):
                    raise SystemExit(f"{where}: picture {paths[name]} does not exist. Download or unpack the images first.")
        images = tuple(paths[name] for name in names)
        question_type = row["question_type"] if kind == "spatial" else kind
        question = row.get("question", row.get("prompt")).replace("<image>", "").strip()
        example = Example(
            id=f"{path.stem}:{number}", images=images, data_type=row["data_type"], question_type=question_type,
            question=question, options=row.get("options"), answer=row.get("answer"), solution=row.get("solution", ""),
        )  # fmt: skip
        check_answer(example, where)
        examples.append(example)
    return examples


def check_answer(example, where):
    """Raise SystemExit (starting with `where`) if the answer of `example` cannot be scored."""
    kind, answer, options = example.question_type, example.answer, example.options
    if kind in CHOICE_TYPES:
        good = isinstance(options, list) and all(isinstance(o, str) and re.match(r"[A-Z]\b", o) for o in options)
        if not good or len({option[0] for option in options}) < len(options):
            raise SystemExit(f'{where}: answer {answer!r} needs options like ["A. left", "B. right"], not {options!r}.')
        if answer not in [option[0] for option in options]:
            raise SystemExit(f"{where}: answer {answer!r} is not the letter of one of the options {options}.")
    elif kind in NUMERIC_TYPES:
        if options:
            raise SystemExit(f"{where}: a numeric question ({kind}) has options {options!r}; its answer would never be right.")
        if parse_number(answer) is None:
            raise SystemExit(f"{where}: answer {answer!r} of a numeric question is not a number.")
    elif kind == "locate":
        for box in answer if isinstance(answer, list) and answer else [None]:
            corners = box.get("bbox_2d") if isinstance(box, dict) and isinstance(box.get("label"), str) else None
            if not valid_box(corners):
                raise SystemExit(f'{where}: {box} is not {{"bbox_2d": [x1, y1, x2, y2], "label": ...}} with x1 < x2, y1 < y2.')
    elif kind not in ("coldstart", "worked"):
        raise SystemExit(f"{where}: unknown question_type {kind!r}; known: {', '.join(CHOICE_TYPES + NUMERIC_TYPES)}.")


def group_scenes(examples):
    """Group examples that show the same pictures in the same way: list of Scene, in order of first appearance."""
    scenes = {}
    for example in examples:
        key = (example.data_type, example.images)
        scenes.setdefault(key, Scene(example.images, example.data_type, [])).examples.append(example)
    return list(scenes.values())


# ------------------------------------------------------------------------------------------------
# 2. Prompts
# ------------------------------------------------------------------------------------------------

SYSTEM = "You are a helpful assistant."
INSTRUCTIONS = {
    "locate": "List each object's box and label as JSON.",
    "direct": "Answer with the letter or number only.",
    "work": "First locate the objects, then answer inside <answer> </answer>.",
    "think": "First think inside <think> </think>, then answer inside <answer> </answer>.",
}
PREFIX_START = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
BRANCH_END = "<|im_end|>\n<|im_start|>assistant\n"  # closes the question and opens the answer
STOP = "<|im_end|>"


def prompt_text(example, mode):
    """The user's words for `example` in one of the modes of INSTRUCTIONS, without pictures."""
    options = "\nOptions:\n" + "\n".join(example.options) if example.options else ""
    return f"{example.question}{options}\n{INSTRUCTIONS[mode]}"


def boxes_text(boxes):
    """Compact JSON of a list of boxes. The keys keep the order of the row: the released files put bbox_2d first (as
    Qwen2.5-VL does), the toy puts label first (so that the name is written before its numbers)."""
    return json.dumps(boxes, separators=(",", ":"), ensure_ascii=False)


def picture_text(grids, merge, video):
    """The placeholder tokens of a scene's pictures: one pad for each merge x merge square of patches.

    grids: (pictures, 3) of t, h, w in patches. A video is one grid whose t counts pairs of frames.
    """
    pad = "<|video_pad|>" if video else "<|image_pad|>"
    return "".join(f"<|vision_start|>{pad * int(t * h * w // merge**2)}<|vision_end|>" for t, h, w in grids)


# ------------------------------------------------------------------------------------------------
# 3. Pictures
# ------------------------------------------------------------------------------------------------


def load_image(path):
    """Open a picture as RGB, turned as its EXIF says. Raises SystemExit as picture_size does, and if it cannot be decoded."""
    picture_size(path)
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel: convert() alone would clip them to white
                image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SystemExit(f"{path} cannot be read as a picture ({error}). Replace it or remove its rows.") from None


def picture_size(path):
    """(width, height) of a picture as load_image gives it, without decoding it. Raises SystemExit naming the path if it cannot
    be read, is larger than PIL's limit against decompression bombs, or is a strip of which the processor would make nothing."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many")
            if max(width, height) > 200 * min(width, height):
                raise ValueError(f"{width} x {height} pixels are a strip, longer than 200 times its breadth")
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SystemExit(f"{path} cannot be read as a picture ({error}). Replace it or remove its rows.") from None
    return (height, width) if turned else (width, height)


def read_video(path, frames):
    """`frames` pictures at equal steps from an mp4, first and last included, in temporal order (through decord).

    Raises SystemExit naming the path if it is no video or has no frames.
    """
    import decord  # here, because only mp4 files need it

    try:
        reader = decord.VideoReader(str(path))
        picks = np.linspace(0, len(reader) - 1, min(frames, len(reader))).round().astype(int)
        return [Image.fromarray(frame) for frame in reader.get_batch(picks).asnumpy()]
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, IndexError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1:] or ["no frames"]
        raise SystemExit(f"{path} cannot be read as a video ({reason[0]}). Replace it or remove its rows.") from None


def picture_patches(processor, images, video=False):
    """Pictures -> patches for the vision tower.

    Returns pixels (N, channels * 2 * 14 * 14) float32 and grids (pictures, 3) of t, h, w in patches. A video is ONE
    grid: two consecutive frames share a temporal patch, an odd number of frames repeats the last.
    """
    if not video:
        out = processor(images=images, return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]
    images = images + images[-1:] * (len(images) % 2)
    out = processor(images=images, return_tensors="pt")
    t, h, w = len(images) // 2, *out["image_grid_thw"][0, 1:].tolist()
    # The processor repeats a still picture in both halves of a temporal patch; take one half from each frame.
    pixels = out["pixel_values"].view(t, 2, h * w, 3, 2, -1)  # (pairs, frame of pair, patches, channels, half, 14*14)
    pixels = torch.stack([pixels[:, 0, :, :, 0], pixels[:, 1, :, :, 1]], dim=3)  # (pairs, patches, channels, 2, 14*14)
    return pixels.reshape(t * h * w, -1), torch.tensor([[t, h, w]])


def resized_size(processor, width, height):
    """Width and height, multiples of 28, to which the processor resizes a picture of width x height pixels."""
    height, width = smart_resize(
        height, width, processor.patch_size * processor.merge_size,
        processor.size["shortest_edge"], processor.size["longest_edge"],
    )  # fmt: skip
    return width, height


def valid_box(box):
    """Whether `box` is [x1, y1, x2, y2], finite, not reversed."""
    try:
        x1, y1, x2, y2 = box
        return -1e9 < x1 < x2 < 1e9 and -1e9 < y1 < y2 < 1e9  # false for nan and inf, too
    except (TypeError, ValueError):
        return False


def scale_box(box, source, target):
    """A box in pixels of a picture of size source = (width, height) -> integer pixels of size target, clipped."""
    (sw, sh), (tw, th) = source, target
    x1, y1, x2, y2 = box
    return [round(min(max(value * t / s, 0), t)) for value, s, t in zip((x1, y1, x2, y2), (sw, sh, sw, sh), (tw, th, tw, th))]


def boxes_for_model(processor, example):
    """The boxes of a locate example in pixels of the RESIZED picture, which is what Qwen2.5-VL is trained on; a thin one keeps
    a pixel. Raises SystemExit naming the picture that cannot be read, or the row of a box that lies outside."""
    source = picture_size(example.images[0])
    target, boxes = resized_size(processor, *source), []
    for box in example.answer:
        left, top, right, low = box["bbox_2d"]
        if left >= source[0] or top >= source[1] or right <= 0 or low <= 0:
            where = f"its picture {example.images[0]} ({source[0]} x {source[1]})"
            raise SystemExit(f"{example.id}: {box} lies outside of {where}. Mend or remove the row.")
        left, top, right, low = scale_box(box["bbox_2d"], source, target)
        left, top = min(left, target[0] - 1), min(top, target[1] - 1)
        boxes.append(box | {"bbox_2d": [left, top, max(right, left + 1), max(low, top + 1)]})
    return boxes


# ------------------------------------------------------------------------------------------------
# 4. Backbone
# ------------------------------------------------------------------------------------------------

# Only the language model: short names ("q_proj") would also hit the MLP of the vision tower.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


LOADS = ("fp32", "bf16", "4bit")


def load_backbone(path, load="bf16", min_pixels=None, max_pixels=None, device="cpu"):
    """Load a Qwen2.5-VL folder or hub id for use with the branch functions.

    load: "fp32", "bf16" or "4bit" (nf4; vision tower and head stay bf16). Pixel limits default to the folder's own.
    Returns a namespace: model, tokenizer, processor (the PIL image processor: Qwen2_5_VLProcessor needs torchvision),
    stop (ids that end a completion), suppress (ids never sampled), path, frames (pictures taken of an mp4),
    start (a checksum of some of its weights: a checkpoint is continued from the same model only).
    Raises SystemExit if the folder has no model or another one, lacks weights, or has no tokenizer that belongs to it.
    """
    if load not in LOADS:
        raise SystemExit(f"--load {load}: choose from {', '.join(LOADS)}.")
    if (Path(path) / "adapter_config.json").is_file():
        raise SystemExit(f"{path} is a LoRA adapter, not a model. Give --model the folder model/ beside it: both are merged there.")
    is_hub_id = re.fullmatch(r"(?!runs/)\w[\w.-]*/[\w.-]+", str(path)) and not Path(path).exists()
    if not is_hub_id and not (Path(path) / "config.json").is_file():
        raise SystemExit(f"{path} holds no model (config.json is missing). Run the stage before this one, or give --model.")
    kwargs = {"dtype": torch.float32 if load == "fp32" else torch.bfloat16}
    if load == "4bit":
        # "visual" alone skips nothing: the modules are named from the top.
        skip = ["model.visual", "lm_head"]
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skip,
        )  # fmt: skip
        kwargs["device_map"] = {"": device}
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind != "qwen2_5_vl":  # of another kind transformers would build a 7B model of random weights
            raise ValueError(f"config.json says that it is {kind}")
        tokenizer = AutoTokenizer.from_pretrained(path)
        processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, attn_implementation={"": "sdpa", "text_config": "branches"}, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **kwargs,
        )  # fmt: skip
        if tokenizer.convert_tokens_to_ids("<|image_pad|>") != model.config.image_token_id:
            raise ValueError("its tokenizer is missing, or is that of another model")
        if wrong := sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]:
            raise ValueError(f"{len(wrong)} weights are missing or have another shape, such as {wrong[0]}")
    except SafetensorError as error:
        raise SystemExit(f"{path}: a file of its weights (model*.safetensors) is broken ({error}). Copy or make it anew.") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be loaded as Qwen2.5-VL with tokenizer and image processor: {error}") from None
    if load == "4bit":
        for module in model.modules():
            # On CPUs with AVX512-BF16 an eval forward repacks the weights in place, and training after it silently
            # loses gradients. GRPO samples in eval and trains in train: forbid the repacking.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    else:
        model.to(device)
    embed_patches_by_matrix(model)
    processor.size = {
        "shortest_edge": min_pixels or processor.size["shortest_edge"],
        "longest_edge": max_pixels or processor.size["longest_edge"],
    }
    ids, start = tokenizer.convert_tokens_to_ids, 0
    for weight in model.parameters():
        start = zlib.crc32(weight.detach().flatten()[:64].float().cpu().numpy().tobytes(), start)
    return SimpleNamespace(
        model=model.eval(), tokenizer=tokenizer, processor=processor, path=str(path), device=torch.device(device), frames=16,
        start=start,
        stop=[ids(STOP), ids("<|endoftext|>")],
        suppress=[ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad", "video_pad")],
    )  # fmt: skip


def embed_patches_by_matrix(model):
    """Let the vision tower embed its patches by a matrix product, in place. Its convolution has a stride as long as its
    kernel, so it is one; and Conv3d took a third of the toy tower's time on a CPU."""
    patch = model.model.visual.patch_embed
    patch.forward = lambda pixels: F.linear(pixels.to(patch.proj.weight.dtype), patch.proj.weight.flatten(1))


def core(model):
    """The Qwen2_5_VLForConditionalGeneration inside a PEFT wrapper (LoRA layers are put in place, so calling the core
    still runs the adapter)."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapt(backbone, settings):
    """Make the backbone trainable, in place, as `tune`, `lora_rank`, `lora_alpha`, `train_vision` and `checkpointing` of
    TrainSettings say. Prints how much is trained.

    The vision tower stays frozen (and then runs under no_grad, storing nothing) unless train_vision.
    """
    model = backbone.model
    if settings.tune == "lora":
        torch.manual_seed(settings.seed)  # every process must draw the same adapter
        model = backbone.model = get_peft_model(model, LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
        ))  # fmt: skip
    else:
        model.requires_grad_(True)
        model.model.visual.requires_grad_(settings.train_vision)
    if settings.checkpointing:
        core(model).gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    adapted = sum(hasattr(module, "lora_A") for module in model.modules())
    say(f"training {sum(trained):,} of {sum(p.numel() for p in model.parameters()):,} parameters"
        + (f" in {adapted} LoRA modules" if adapted else ""))  # fmt: skip


def save_model(backbone, folder):
    """Merge the adapter and write `folder`/model as a plain Hugging Face folder, the adapter beside it.

    A 4-bit model is merged into its bf16 weights, loaded again on the CPU: never into the 4-bit ones.
    """
    folder, model = Path(folder), backbone.model
    if isinstance(model, PeftModel):
        model.save_pretrained(folder / "adapter")
        if getattr(core(model), "is_loaded_in_4bit", False):
            plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone.path, dtype=torch.bfloat16)
            model = PeftModel.from_pretrained(plain, folder / "adapter").merge_and_unload()
        else:
            model = model.merge_and_unload()
    model.save_pretrained(folder / "model")
    backbone.tokenizer.save_pretrained(folder / "model")
    backbone.processor.save_pretrained(folder / "model")


# ------------------------------------------------------------------------------------------------
# 5. Branches: encode a scene once, branch the questions
# ------------------------------------------------------------------------------------------------


@dataclass
class Prefix:
    """What all branches of a scene share: system words, pictures, and (for a rollout) the question."""

    ids: torch.Tensor  # (P,) token ids, with a pad token for each picture token
    positions: torch.Tensor  # (3, P) M-RoPE positions: time, height, width
    features: torch.Tensor | None  # (picture tokens, width) from the vision tower
    name: str = ""  # the scene's examples, for messages


@lru_cache(maxsize=200_000)
def encode_text(tokenizer, text):
    """Token ids of `text`, as a tuple. Pieces of a conversation meet at special tokens, so encoding them apart and
    joining is the same as encoding the whole."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def scene_patches(backbone, scene):
    """Read the pictures of a scene: (pixels, grids) as picture_patches gives them, or None if it is encoded already."""
    if scene.encoded is not None:
        return None
    if scene.images[0].endswith(".mp4"):
        pictures = read_video(scene.images[0], backbone.frames)
    else:
        pictures = [load_image(path) for path in scene.images]
    return picture_patches(backbone.processor, pictures, scene.data_type == "video")


def encode_scenes(backbone, scenes, keep=False, patches=None):
    """Run the vision tower once over all pictures of `scenes`: a list of Prefix (system words + pictures).

    keep: remember the result in each scene; for small pictures and a frozen tower only. patches: what scene_patches gives
    for each scene, if that has been called already.
    """
    model, merge = core(backbone.model).model, backbone.processor.merge_size
    patches = patches or [scene_patches(backbone, scene) for scene in scenes]
    fresh, patches = [s for s in scenes if s.encoded is None], [part for part in patches if part is not None]
    prefixes = {}
    if fresh:
        trained = any(parameter.requires_grad for parameter in model.visual.parameters())
        pixels = torch.cat([pixels for pixels, _ in patches]).to(backbone.device, model.visual.dtype)
        grids = torch.cat([grids for _, grids in patches]).to(backbone.device)
        with contextlib.nullcontext() if trained and torch.is_grad_enabled() else torch.no_grad():
            features = model.visual(pixels, grid_thw=grids).pooler_output  # (all picture tokens, width)
        counts = [int(g.prod(-1).sum()) // merge**2 for _, g in patches]
        for scene, (_, grids), part in zip(fresh, patches, features.split(counts)):
            video = scene.data_type == "video"
            words = PREFIX_START + picture_text(grids, merge, video)
            ids = torch.tensor(encode_text(backbone.tokenizer, words))
            kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
            where = {"video_grid_thw" if video else "image_grid_thw": grids}
            positions, _ = model.get_rope_index(ids[None], mm_token_type_ids=kinds[None], **where)
            name = ", ".join(example.id for example in scene.examples) or scene.images[0]
            prefixes[id(scene)] = Prefix(ids.to(backbone.device), positions[:, 0].to(backbone.device), part, name)
            if keep:
                scene.encoded = prefixes[id(scene)]
    return [scene.encoded or prefixes[id(scene)] for scene in scenes]


def text_positions(prefix, count):
    """(3, count) positions of text after a prefix: it starts behind the prefix's last token, equal in all three rows.
    (Not behind its largest position: the time of a long video runs ahead of the text that follows it.)"""
    start = int(prefix.positions[0, -1]) + 1
    return torch.arange(start, start + count, device=prefix.ids.device).expand(3, -1)


def extend_prefix(prefix, ids):
    """The prefix followed by the text tokens `ids`, as a new Prefix."""
    positions = torch.cat([prefix.positions, text_positions(prefix, len(ids))], dim=1)  # (3, P + text)
    return Prefix(torch.cat([prefix.ids, prefix.ids.new_tensor(ids)]), positions, prefix.features, prefix.name)


def check_lengths(backbone, prefixes, lengths):
    """Raise SystemExit if a prefix and one of its branches are longer than the model's context. lengths: B lists."""
    limit = core(backbone.model).config.text_config.max_position_embeddings
    for prefix, group in zip(prefixes, lengths):
        tokens = len(prefix.ids) + max(group, default=0)
        if tokens > limit:
            raise SystemExit(
                f"{tokens:,} tokens are more than the model's context of {limit:,}. Lower --max_pixels (or --max_new_tokens), or "
                f"leave out the question at fault, one of: {prefix.name}."
            )


def embed(backbone, ids, features):
    """Word embeddings of ids (any shape) with the picture tokens, in order, replaced by their features."""
    config = core(backbone.model).config
    out = core(backbone.model).get_input_embeddings()(ids)  # (..., width)
    is_picture = (ids == config.image_token_id) | (ids == config.video_token_id)
    return out.masked_scatter(is_picture[..., None], torch.cat(features).to(out.dtype)) if features else out


def pack_layout(prefixes, branches, device):
    """Where each token of a packed row sits. The row holds all prefixes, then all branches, without padding.

    prefixes: B lengths; branches: B lists of lengths, N in all. Returns a namespace of
    prefix (B, P) and branch (N, C): index in the row of each padded slot (padding points at 0);
    owner (N,): the prefix of each branch; mask (N, 1, C, P + C): what a branch token sees: its prefix and its own past;
    unpad (T,): the padded slot of each token of the row.
    """
    counts = [len(lengths) for lengths in branches]
    lengths = torch.tensor(prefixes), torch.tensor([n for lengths in branches for n in lengths])
    starts = torch.cat(lengths).cumsum(0) - torch.cat(lengths)  # (B + N,) first token of each part
    owner = torch.arange(len(prefixes)).repeat_interleave(torch.tensor(counts))  # (N,)
    slots, valid = [], []
    for first, length in zip(starts.split([len(n) for n in lengths]), lengths):
        steps = torch.arange(int(length.max()))
        valid.append(steps < length[:, None])  # (rows, longest)
        slots.append((first[:, None] + steps) * valid[-1])
    causal = torch.ones(valid[1].shape[1], valid[1].shape[1], dtype=torch.bool).tril()  # (C, C)
    sees_prefix = valid[0][owner][:, None, None].expand(-1, 1, len(causal), -1)  # (N, 1, C, P)
    mask = torch.cat([sees_prefix, causal.expand(len(owner), 1, -1, -1)], dim=-1)  # (N, 1, C, P + C)
    unpad = torch.cat([v.flatten() for v in valid]).nonzero()[:, 0]  # (T,)
    return SimpleNamespace(
        prefix=slots[0].to(device), branch=slots[1].to(device), owner=owner.to(device), mask=mask.to(device),
        unpad=unpad.to(device), branch_valid=valid[1].to(device), prefix_last=starts[: len(prefixes)] + lengths[0] - 1,
    )  # fmt: skip


def branch_attention(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """Attention of a packed row: prefixes attend causally, branches attend to their prefix and themselves.

    query (1, heads, T, D), key and value (1, kv heads, T, D) -> (1, T, heads, D). The cost is B prefixes of P x P / 2
    and N branches of C x (P + C), where a dense 4-D mask would pay T x T. Without a layout this is plain sdpa.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    def pad(packed, slots):  # (1, H, T, D) -> (rows, H, longest, D); index_select has the fast backward
        rows = packed[0].transpose(0, 1).index_select(0, slots.flatten())  # (rows * longest, H, D)
        return rows.unflatten(0, slots.shape).transpose(1, 2)

    def attend(query, key, value, **how):
        return F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=query.shape[1] > key.shape[1], **how)

    prefix_key, prefix_value = pad(key, layout.prefix), pad(value, layout.prefix)  # (B, kv heads, P, D)
    prefix_out = attend(pad(query, layout.prefix), prefix_key, prefix_value, is_causal=True)
    branch_key = torch.cat([prefix_key.index_select(0, layout.owner), pad(key, layout.branch)], dim=2)  # (N, kv, P + C, D)
    branch_value = torch.cat([prefix_value.index_select(0, layout.owner), pad(value, layout.branch)], dim=2)
    if query.is_cuda:  # a mask and grouped heads together would leave the one kernel that writes all scores to memory
        groups = query.shape[1] // key.shape[1]
        branch_key, branch_value = (part.repeat_interleave(groups, dim=1) for part in (branch_key, branch_value))
    branch_out = attend(pad(query, layout.branch), branch_key, branch_value, attn_mask=layout.mask)
    out = [part.transpose(1, 2).flatten(0, 1) for part in (prefix_out, branch_out)]  # each (rows * longest, heads, D)
    return torch.cat(out).index_select(0, layout.unpad)[None], None


AttentionInterface.register("branches", branch_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("branches", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


LOGITS_AT_ONCE = 1024  # a token has 152,000 of them


def branch_logprobs(backbone, prefixes, branches, chunk=LOGITS_AT_ONCE):
    """Log-probability of every completion token, with each prefix encoded once.

    prefixes: B Prefix. branches: B lists of (prompt ids, completion ids); N branches in all.
    Returns logps (N, C), zero at padding; entropy (N, C), without gradient; mask (N, C), true at completion tokens.
    C is the longest completion. Equal to separate rows [prefix + prompt + completion], at the cost of
    P + sum(branch) tokens instead of N * P + sum(branch). Logits are made at completion tokens only, `chunk` at a time.
    """
    model = core(backbone.model)
    flat = [branch for group in branches for branch in group]
    lengths = [[len(p) + len(c) for p, c in group] for group in branches]
    check_lengths(backbone, prefixes, lengths)
    layout = pack_layout([len(prefix.ids) for prefix in prefixes], lengths, backbone.device)
    tokens = [torch.tensor([*prompt, *completion], device=backbone.device) for prompt, completion in flat]
    ids = torch.cat([prefix.ids for prefix in prefixes] + tokens)  # (T,)
    owners = [prefix for prefix, group in zip(prefixes, branches) for _ in group]
    after = [text_positions(prefix, len(ids)) for prefix, ids in zip(owners, tokens)]
    positions = torch.cat([prefix.positions for prefix in prefixes] + after, dim=1)  # (3, T)
    features = [prefix.features for prefix in prefixes if prefix.features is not None]
    hidden = model.model.language_model(
        inputs_embeds=embed(backbone, ids, features)[None], position_ids=positions[:, None],
        attention_mask={"full_attention": None}, use_cache=False, layout=layout,
    ).last_hidden_state[0]  # (T, width)  # fmt: skip

    # Token t of a branch is predicted at token t - 1; its first token at the last token of the prefix.
    sources, targets = [], []
    for row, (prompt, completion) in enumerate(flat):
        first = int(layout.branch[row, 0])
        before = first + len(prompt) - 1 if prompt else int(layout.prefix_last[layout.owner[row]])
        sources += [before] + list(range(first + len(prompt), first + len(prompt) + len(completion) - 1))
        targets += completion
    sources, targets = torch.tensor(sources, device=backbone.device), torch.tensor(targets, device=backbone.device)

    def score(hidden, targets):  # (n, width), (n,) -> (n,), (n,)
        logits = model.lm_head(hidden).float().log_softmax(-1)  # (n, V)
        entropy = -(logits.detach().exp() * logits.detach()).sum(-1)
        return logits.gather(-1, targets[:, None])[:, 0], entropy

    parts = []
    for rows, wanted in zip(hidden.index_select(0, sources).split(chunk), targets.split(chunk)):
        if len(targets) > chunk and torch.is_grad_enabled():  # keep hidden states, not logits, for the backward pass
            parts.append(torch.utils.checkpoint.checkpoint(score, rows, wanted, use_reentrant=False))
        else:
            parts.append(score(rows, wanted))
    lengths = torch.tensor([len(completion) for _, completion in flat], device=backbone.device)
    mask = torch.arange(int(lengths.max()), device=backbone.device) < lengths[:, None]  # (N, C)
    zeros = torch.zeros(mask.shape, device=backbone.device)
    logps, entropy = (zeros.masked_scatter(mask, torch.cat(column)) for column in zip(*parts))
    return logps, entropy, mask


@torch.no_grad()
def branch_generate(backbone, prefixes, branches, max_new_tokens, temperature=0.0):
    """Complete every branch, with each prefix encoded once.

    prefixes: B Prefix. branches: B lists of prompt ids (may be empty: a rollout has G empty branches).
    temperature 0 is greedy; above 0 samples from the model's own distribution (no top-k, no top-p, no penalty: sampler
    and scorer must be one distribution), except that vision tokens are never sampled: they would break the next forward.
    Returns B lists of completion ids, the end token included where it was reached.
    Sets eval mode while it runs: train mode with gradient checkpointing would drop the cache.
    """
    check_lengths(backbone, prefixes, [[len(prompt) + max_new_tokens for prompt in group] for group in branches])
    model, device = core(backbone.model), backbone.device
    was_training = backbone.model.training
    backbone.model.eval()
    longest = max(len(prefix.ids) for prefix in prefixes)
    ids = torch.zeros(len(prefixes), longest, dtype=torch.long, device=device)  # (B, P), padded on the left
    positions = torch.zeros(3, len(prefixes), longest, dtype=torch.long, device=device)
    mask = torch.zeros(len(prefixes), longest, dtype=torch.long, device=device)
    for row, prefix in enumerate(prefixes):
        ids[row, -len(prefix.ids) :] = prefix.ids
        positions[:, row, -len(prefix.ids) :] = prefix.positions
        mask[row, -len(prefix.ids) :] = 1
    features = [prefix.features for prefix in prefixes if prefix.features is not None]
    cache = DynamicCache(config=model.config)

    def forward(embeds, positions, mask):  # -> hidden state of the last token, (rows, width)
        out = model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state[:, -1]

    hidden = forward(embed(backbone, ids, features), positions, mask)  # (B, width)
    owner = torch.arange(len(prefixes), device=device).repeat_interleave(
        torch.tensor([len(group) for group in branches], device=device)
    )  # (N,)
    cache.batch_select_indices(owner)  # one copy of its prefix for each branch
    hidden, mask, next_position = hidden[owner], mask[owner], positions[0, :, -1][owner] + 1  # (N, width), (N, P), (N,)
    prompts = [prompt for group in branches for prompt in group]
    if any(prompts):
        if not all(prompts):
            raise ValueError("either every branch has a prompt or none has")
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)  # (N, Q)
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        mask = torch.cat([mask, real], dim=1)
        text = (next_position[:, None] + real.cumsum(1) - 1).expand(3, -1, -1)  # (3, N, Q)
        hidden = forward(embed(backbone, ids, []), text, mask)
        next_position = next_position + real.sum(1)

    stop = torch.tensor(backbone.stop, device=device)
    completions = [[] for _ in prompts]
    live = torch.arange(len(prompts), device=device)  # (live,) the branches still in the cache
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # (live,) those of them that have ended
    for step in range(max_new_tokens):
        logits = model.lm_head(hidden).float()  # (live, V)
        logits[:, backbone.suppress] = -torch.inf
        if temperature == 0:
            token = logits.argmax(-1)  # (live,)
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        for row, value, ended in zip(live.tolist(), token.tolist(), done.tolist()):
            if not ended:
                completions[row].append(value)
        done = done | torch.isin(token, stop)
        if step + 1 == max_new_tokens or done.all():
            break
        if done.float().mean() > 0.25:  # drop ended rows now and then: copying the cache is not free
            kept = (~done).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            live, done, token, mask, next_position = (x[kept] for x in (live, done, token, mask, next_position))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden = forward(embed(backbone, token[:, None], []), next_position.expand(3, 1, -1).transpose(1, 2), mask)
        next_position = next_position + 1
    backbone.model.train(was_training)
    grouped = iter(completions)
    return [[next(grouped) for _ in group] for group in branches]


# ------------------------------------------------------------------------------------------------
# 6. Scoring
# ------------------------------------------------------------------------------------------------

INSIDE = r"(?:(?!</?think>|</?answer>).)*"
FORMAT = re.compile(rf"\s*<think>{INSIDE}</think>\s*<answer>{INSIDE}</answer>\s*", re.DOTALL)
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
DIGITS = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+"
NUMBER = re.compile(rf"(?:about |approximately |around )?({DIGITS})\s*([a-z\u00b2 ]*[.23]?)\.?")
UNITS = {"", "m", "m2", "m\u00b2", "sqm", "sq m", "meter", "meters", "metre", "metres", "cm", "centimeter", "centimeters",
         "centimetre", "centimetres", "square meters", "square metres", "square meter", "square metre"}  # fmt: skip
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
WORDS = {word: number for number, word in enumerate((ONES + " nineteen").split())}
for _tens, _word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2):
    WORDS |= {_word: 10 * _tens} | {f"{_word}-{one}": 10 * _tens + n for n, one in enumerate(ONES.split()[1:10], 1)}
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # (T,) of mean relative accuracy


def extract_answer(text):
    """The text of the LAST <answer> block; without one, the whole text. Stripped."""
    text = text or ""
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))  # of the last one that is closed
    return (text[start + len("<answer>") : text.index("</answer>", start)] if start >= 0 else text).strip()


def parse_choice(text, options):
    """The option's letter meant by a short answer, or None: "B", "(B)", "B.", "B. right", "right", "The answer is B".

    An answer that names no option, or more than one ("A or B"), is None.
    """
    text = re.sub(r"^(?:the )?(?:correct )?(?:answer|option)(?: is|:)?\s+", "", text.strip(), flags=re.IGNORECASE).strip()
    words = {option[0].upper(): option[1:].lstrip(".): ").strip().lower() for option in options}
    for letter, option in words.items():
        bare = re.fullmatch(r"\(?([A-Za-z])\)?[.:)]*(?:\s+(.*?))?\.?", text, re.DOTALL)
        if bare and bare[1].upper() == letter and (bare[2] or option).lower() == option:
            return letter
    matches = [letter for letter, option in words.items() if option and text.lower().rstrip(".") == option]
    return matches[0] if len(matches) == 1 else None


def parse_number(text):
    """The single number of a short answer as a float, or None: "1,200", "-3", "two", "2.5 m", "about 2.5 meters".

    Text with several numbers, without one, nan and inf are None.
    """
    text = str(text).strip().lower()
    spelled = "-".join(text.rstrip(".").split())
    if spelled in WORDS:
        return float(WORDS[spelled])
    found = NUMBER.fullmatch(text)
    if not found or found[2].strip().rstrip(".") not in UNITS:
        return None
    value = float(found[1].replace(",", ""))
    return value if math.isfinite(value) else None


def parse_boxes(text):
    """A JSON list of {"bbox_2d", "label"} as such a list, or None if it is anything else."""
    try:
        boxes = json.loads(text)
    except (ValueError, RecursionError):
        return None
    good = isinstance(boxes, list) and all(
        isinstance(b, dict) and isinstance(b.get("label"), str) and valid_box(b.get("bbox_2d")) for b in boxes
    )
    return boxes if good else None


def mean_relative_accuracy(predictions, truths):
    """MRA of VSI-Bench: mean over theta in {.50, .55, ..., .95} of [ |p - g| / g <= 1 - theta ], in float64.

    predictions, truths: (N,) -> (N,) in [0, 1]. nan predictions score 0; a truth of 0 is right only when met exactly.
    """
    p, g = np.asarray(predictions, np.float64), np.asarray(truths, np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        error = np.where(p == g, 0.0, np.abs(p - g) / np.abs(g))  # (N,)
        return (error[:, None] <= 1 - THRESHOLDS).mean(1)  # (N, T) -> (N,)


def box_iou(a, b):
    """Intersection over union of boxes, (N, 4) and (N, 4) as x1, y1, x2, y2 -> (N,)."""
    a, b = np.asarray(a, np.float64).reshape(-1, 4), np.asarray(b, np.float64).reshape(-1, 4)
    sides = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)  # (N, 2)
    area = [(box[:, 2:] - box[:, :2]).prod(1) for box in (a, b)]
    overlap = sides.prod(1)
    return overlap / np.maximum(area[0] + area[1] - overlap, 1e-9)


def match_boxes(predicted, wanted):
    """For each wanted box, the first unused predicted one with its label, or an empty box. list of (4,)."""
    left, out = list(predicted or []), []
    for box in wanted:
        found = next((p for p in left if p["label"].strip().lower() == box["label"].strip().lower()), None)
        if found:
            left.remove(found)
        out.append(found["bbox_2d"] if found else [0, 0, 0, 0])
    return out


def score_answers(texts, examples):
    """Score N completions at once: the accuracy reward of stage 3 and the metric of eval.

    texts: N completions; examples: N Example (locate: with boxes in the pixels that the model sees).
    Choices score 0 or 1, numbers their mean relative accuracy, boxes their mean IoU (a box too many counts as a miss).
    Returns scores (N,) float64 and legal (N,) bool: whether the answer is one of the options, a number, or boxes.
    """
    scores, legal = np.zeros(len(texts)), np.zeros(len(texts), bool)
    choice, number = lru_cache(None)(parse_choice), lru_cache(None)(parse_number)  # short answers repeat: parse each once
    numbers, boxes = [], []  # (row, prediction, truth) to be scored together
    for row, (text, example) in enumerate(zip(texts, examples)):
        answer = extract_answer(text)
        if example.question_type == "locate":
            predicted = parse_boxes(answer)
            legal[row] = predicted is not None
            extra = max(len(predicted or []), len(example.answer))
            for p, wanted in zip(match_boxes(predicted, example.answer), example.answer):
                boxes.append((row, p, wanted["bbox_2d"], extra))
        elif example.options:
            letter = choice(answer, tuple(example.options))
            scores[row], legal[row] = letter == example.answer, letter is not None
        else:
            value = number(answer)
            legal[row] = value is not None
            numbers.append((row, math.nan if value is None else value, number(str(example.answer))))
    if numbers:
        rows, predictions, truths = zip(*numbers)
        scores[list(rows)] = mean_relative_accuracy(predictions, truths)
    if boxes:
        rows, predictions, truths, extra = zip(*boxes)
        np.add.at(scores, list(rows), box_iou(predictions, truths) / np.array(extra))
    return scores, legal


def score_format(texts):
    """1.0 where the WHOLE completion is one <think> block and then one <answer> block, else 0.0: (N,)."""
    return np.array([float(FORMAT.fullmatch(text) is not None) for text in texts])


def constant_guess(train, test):
    """What the best constant answer of the training examples scores on the test examples, by question type.

    Directions are guessed by their word, among training questions with the same set of words; other choices by letter;
    numbers by the training answer with the highest mean relative accuracy.
    Returns {question_type: score}: the baseline that every table shows.
    """

    def choice(example):  # (what is asked, what is answered) as a constant guesser sees it
        if example.question_type != "relative direction":
            return (), example.answer
        words = {option[0]: option[2:].strip() for option in example.options}
        return tuple(sorted(words.values())), words[example.answer]

    guess = {}
    for kind in sorted({example.question_type for example in test}):
        known, asked = [e for e in train if e.question_type == kind], [e for e in test if e.question_type == kind]
        if asked[0].options:
            counts = Counter(choice(example) for example in known)
            best = {key: max((c for c in counts if c[0] == key), key=counts.get) for key, _ in counts}
            guess[kind] = float(np.mean([best.get(choice(e)[0]) == choice(e) for e in asked]))
        else:
            values, truths = (np.array([float(parse_number(e.answer)) for e in some]) for some in (known, asked))
            best = max(np.unique(values), key=lambda v: mean_relative_accuracy(np.full(len(values), v), values).mean())
            guess[kind] = float(mean_relative_accuracy(np.full(len(truths), best), truths).mean())
    return guess


def skill(by_type, guess):
    """Mean over question types of (score - guess) / (1 - guess): 0 = the best constant answer, 1 = perfect.

    A type that the constant answer solves asks for no skill and is left out.
    """
    return float(np.mean([(by_type[kind] - guess[kind]) / (1 - guess[kind]) for kind in guess if guess[kind] < 1] or [0.0]))


# ------------------------------------------------------------------------------------------------
# 7. Runs
# ------------------------------------------------------------------------------------------------


def setting(default, help, choices=None):
    """A field of a settings dataclass; `help` is its comment here and its line in --help. A number may be 0 only where that
    is its default, or `help` says what "0:" means."""
    return field(default=default, metadata={"help": help} | ({"choices": choices} if choices else {}))


@dataclass
class Settings:
    """What all stages share. A stage adds its own fields and a preset of values for "toy" and "3b"."""

    preset: str = setting("toy", "toy (a tiny model on a toy world, minutes on two CPU cores) or 3b (the paper's model)")
    model: str = setting("", "folder or hub id to start from; empty: what the stage before this one wrote")
    data: str = setting("", "folder with the JSONL files and images/")
    out: str = setting("", "folder of this run; empty: runs/<preset>/<stage>")
    seed: int = setting(0, "seed of data order and sampling")
    max_steps: int = setting(0, "stop after this many optimiser steps (0: no limit); the schedule stays as planned")
    resume: str = setting("auto", "auto: go on from the run's checkpoint if there is one; never: start anew", ("auto", "never"))
    processes: int = setting(2, "processes that share the work on a CPU; on GPUs use torchrun instead")


TUNES, OPTIMIZERS = ("lora", "full"), ("adamw", "muon")


@dataclass
class TrainSettings(Settings):
    """What the three training stages share."""

    resume: str = setting("auto", "auto: go on from the run's checkpoint if there is one; never: start anew; or a run's folder: "
                                  "go on from a copy of its checkpoint")  # fmt: skip
    load: str = setting("bf16", "weights in memory: fp32, bf16, or 4bit (QLoRA)", LOADS)
    tune: str = setting("lora", "lora: adapters on the language model; full: all its weights", TUNES)
    lora_rank: int = setting(16, "rank of the adapters")
    lora_alpha: int = setting(32, "scale of the adapters: alpha / rank")
    train_vision: bool = setting(False, "train the vision tower too (only with --tune full)")
    checkpointing: bool = setting(False, "recompute activations in the backward pass: slower, far less memory")
    min_pixels: int = setting(0, "smallest picture in pixels; 0: as the model folder says")
    max_pixels: int = setting(0, "largest picture in pixels; 0: as the model folder says")
    keep_features: bool = setting(False, "remember the frozen vision tower's output of each scene (small pictures only)")
    optimizer: str = setting(
        "adamw", "adamw, or muon for the matrices of the language model and AdamW for the rest", OPTIMIZERS
    )
    lr: float = setting(1e-4, "AdamW's highest learning rate (LoRA needs about ten times that of full tuning)")
    muon_lr: float = setting(0.01, "Muon's highest learning rate")
    warmup: float = setting(0.1, "share of the steps in which the rate rises (0: none); it then falls as a cosine to zero")
    clip: float = setting(1.0, "largest norm of the gradient")
    steps: int = setting(0, "optimiser steps; 0: one pass over the data")
    scenes: int = setting(16, "scenes in an optimiser step, over all processes")
    branches: int = setting(8, "questions of one scene in a step, at most; they share its pictures")
    micro_scenes: int = setting(1, "scenes in one forward and backward pass; less needs less memory")
    eval_every: int = setting(100, "steps between scores on held-out scenes")
    eval_scenes: int = setting(64, "held-out scenes scored during training")
    batch: int = setting(128, "questions answered at once when scoring; less needs less memory")
    save_every: int = setting(100, "steps between checkpoints")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the stage's docstring as it is written, and every default."""


def parse_settings(cls, presets, stage, before="", argv=None):
    """Settings of a stage from the command line: defaults of the class, then of the preset, then the flags.

    before: the stage whose model this one starts from. Exits with a message on an unknown flag, preset or choice, and on a
    number that is negative, not finite, or 0 where that means nothing.
    """
    parser = HfArgumentParser(cls, description=sys.modules[cls.__module__].__doc__, formatter_class=HelpFormatter)
    argv = sys.argv[1:] if argv is None else argv
    preset = next((argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg == "--preset"), "toy")
    preset = next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--preset=")), preset)
    if preset not in presets:
        parser.error(f"--preset {preset} is unknown; choose from {', '.join(presets)}")
    parser.set_defaults(**presets[preset])
    if os.environ.get("RANK", "0") != "0":
        parser._print_message = lambda *args: None  # the first process says what is wrong with the flags
    settings = cls(**vars(parser.parse_args(argv)))
    for part in fields(settings):
        value, zero = getattr(settings, part.name), part.default == 0 or re.search(r"\b0:", part.metadata["help"])
        if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and zero):
            parser.error(f"--{part.name} {value}: give {'0 or more' if zero else 'more than 0'}")
    settings.data = settings.data or f"data/{preset}"
    settings.out = settings.out or f"runs/{preset}/{stage}"
    if before and not settings.model:
        settings.model = str(Path(settings.out).parent / before / "model")
    return settings


def device_name():
    """The device of this process: its GPU if there is one, else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


_started, _over = [], threading.Event()  # processes started here; set when they may end without any alarm


def start_processes(settings):
    """Join the processes that share this run's work, and start them where torchrun has not.

    Each takes its share of the scenes; gradients are summed over all. On a CPU two processes of one thread are faster
    than one of two threads: small matrices do not fill two cores.
    """
    torch.manual_seed(settings.seed)
    if "RANK" not in os.environ and settings.processes > 1 and not torch.cuda.is_available():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(settings.processes), "RANK": "0"}
        os.environ |= {"STARTED_BY": str(os.getpid()), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: one that still imports cannot be stopped well,
        for rank in range(1, settings.processes):  # and its parent would wait for it for ever
            more = os.environ | {"RANK": str(rank)}
            _started.append(subprocess.Popen([sys.executable, *sys.argv], env=more, stdout=subprocess.DEVNULL))
        signal.signal(signal.SIGINT, before)
    if "STARTED_BY" in os.environ:
        threading.Thread(target=watch, daemon=True).start()
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(device_name())
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


LOST = "one of the processes ended; what is saved is whole; the same command goes on"


def watch():
    """In a thread of each process: end it soon after one that it has started, or that has started it, ends before its time.
    (Its work may be far from the next exchange with that one. Under torchrun, torchrun does this.)"""
    while not _over.wait(0.5):
        ended = any(process.poll() not in (None, 0, 130) for process in _started)  # 130: asked to stop, as we are too
        if ended or int(os.environ["STARTED_BY"]) not in (os.getpid(), os.getppid()):
            fail(LOST)


def fail(words):
    """End this process, and those that it has started. Only the first process that fails says why: most errors are raised in
    all of them, and the others follow from its end."""
    first = os.environ["RANK"] == "0"
    if dist.is_initialized():
        try:
            first = dist.distributed_c10d._get_default_store().add("failed", 1) == 1
        except RuntimeError:  # the store went down with process 0
            first = os.environ["RANK"] == "1"
    if first:
        print(f"\n{words}", file=sys.stderr, flush=True)  # a new line: there may be a bar
    else:
        time.sleep(1)  # the first one may still be speaking
    for process in _started:
        process.kill()
    os._exit(1)


@contextlib.contextmanager
def ending_together():
    """Used as a decorator of a main: an error in one process ends them all, and is told once."""
    try:
        yield
    except BaseException as error:
        alone = "RANK" not in os.environ or os.environ["WORLD_SIZE"] == "1"
        if alone or isinstance(error, SystemExit) and not isinstance(error.code, str):
            raise
        if isinstance(error, RuntimeError) and re.search(r"gloo.*(Connection|Broken pipe)", str(error)):
            fail(LOST)
        fail(error.code if isinstance(error, SystemExit) else traceback.format_exc().strip())


_signals = []  # received since the start: a first one asks to stop


@contextlib.contextmanager
def stop_at_signals():
    """While it holds, Ctrl-C and SIGTERM let the step that runs finish; a second one stops at once, which a checkpoint
    survives. Used as a decorator of the training loops."""

    def asked(number, frame):
        if _signals:
            os._exit(130)
        _signals.append(number)
        say("\nstopping when this step is done (once more: at once)")

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_asked():
    """Whether any of the processes has been asked to stop; all of them learn it at the same step."""
    return total([float(len(_signals))])[0] > 0


def stop_here(folder, step):
    """End the program after a step whose checkpoint is written, saying how to go on. Raises SystemExit(130)."""
    say(f"stopped after step {step}; the same command goes on from {folder}/checkpoint")
    end_processes()
    raise SystemExit(130)


@contextlib.contextmanager
def stop_at_once(settings):
    """For stage 0 and eval.py, which keep each piece of their work as soon as it is done. While it holds, Ctrl-C, SIGTERM and a
    disk that fails end the program and all that it has started, with one line about what to do."""
    mine = os.getpid()
    again = "the same command goes on" + (" when --resume never is left out" if settings.resume == "never" else "")

    def end_others():
        _over.set()
        for process in (*multiprocessing.active_children(), *_started):
            process.kill()

    def stopped(number, frame):
        if os.getpid() == mine:  # a forked worker ends without a word
            end_others()
            if os.environ.get("RANK", "0") == "0":
                os.write(2, f"\nstopped; {again}\n".encode())  # print may be busy just now
        os._exit(130)

    before = {number: signal.signal(number, stopped) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with naming(settings.out):
            yield
    except OSError as error:
        end_others()
        raise SystemExit(  # a new line: there may be a bar
            f"\n{error.filename} cannot be read or written ({error.strerror}). What is done is kept: mend that, and {again}."
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def naming(path):
    """Let an error of the disk name `path` where it names no file: that of a full disk does not."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from None
    except OSError as error:
        name = error.filename2 or error.filename or str(path)  # of two, the one that is written
        raise OSError(error.errno, error.strerror or str(error), name) from None


def write_whole(path, text):
    """Write a text file: first under another name, then renamed, so that what stands under `path` is whole at any moment."""
    new = path.with_name(f"{path.name}.new")
    with naming(path):
        new.write_text(text, encoding="utf-8")
        new.rename(path)


def visible(text, most=4000):
    """Text from outside, fit for a page: at most so many letters, and those that are not seen but steer the text (controls,
    marks of direction, line separators) as their numbers."""
    text = text[:most] + " ... (cut)" if len(text) > most else text
    unseen = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(f"\\u{ord(x):04x}" if unicodedata.category(x) in unseen and x not in "\n\t" else x for x in text)


def world():
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(text):
    """Print from the first process only, without breaking a progress bar."""
    if world()[0] == 0:
        tqdm.write(text, file=sys.stderr)


def gather(items):
    """The lists of all processes, interleaved: the inverse of items[rank::size]."""
    rank, size = world()
    if size == 1:
        return items
    parts = [None] * size
    dist.all_gather_object(parts, items)
    return [parts[i % size][i // size] for i in range(sum(len(part) for part in parts))]


def total(values):
    """Sum a list of floats over the processes, element by element."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device_name())
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor.tolist()


def make_optimizers(model, settings):
    """A list of optimizers for the trainable parameters. Muon takes the 2-D weights of the language model's layers."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if settings.optimizer == "muon" and settings.tune == "lora":
        raise SystemExit("--optimizer muon is for the matrices of --tune full; adapters learn with adamw.")
    if settings.optimizer == "adamw":
        return [torch.optim.AdamW([p for _, p in named], lr=settings.lr, weight_decay=0.0)]
    matrix = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
    return [
        torch.optim.Muon(matrix, lr=settings.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=settings.lr, weight_decay=0.0),
    ]


def optimizer_step(model, optimizers, settings, step, steps):
    """Sum gradients over the processes, clip, set the scheduled rate, step, clear. Returns the gradient's norm; with a norm
    that is not finite nothing is learnt from this step, in any process.

    The rate rises linearly over the first `warmup` share of `steps`, then falls as a cosine to zero.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if dist.is_initialized():
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            parameter.grad = part.view_as(parameter)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip))
    rising = max(1, round(settings.warmup * steps))
    factor = (step + 1) / rising if step < rising else 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
    for optimizer, rate in zip(optimizers[::-1], (settings.lr, settings.muon_lr)):  # AdamW is always the last
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def scene_length(backbone, scene):
    """Tokens of a scene's prefix. Only the size of its first picture is read. Raises SystemExit if it cannot be."""
    processor, video, count = backbone.processor, scene.data_type == "video", len(scene.images)
    side = processor.patch_size * processor.merge_size  # pixels of a token
    if scene.images[0].endswith(".mp4"):
        tokens, count = processor.size["longest_edge"] // side**2, backbone.frames  # at most
    else:
        tokens = math.prod(resized_size(processor, *picture_size(scene.images[0]))) // side**2
    pictures = math.ceil(count / 2) if video else count
    around = len(encode_text(backbone.tokenizer, PREFIX_START)) + 2 * (1 if video else pictures)
    return around + pictures * tokens


def stored_by_layer(backbone, prefixes, branches):
    """Bytes that autograd stores for ONE layer of the language model, counted while it runs on zeros.

    prefixes, branches: token counts as pack_layout takes them.
    """
    model, stored = core(backbone.model), {}
    text, width = model.model.language_model, model.config.text_config.hidden_size
    layout = pack_layout(prefixes, branches, backbone.device)
    tokens, like = len(layout.unpad), {"dtype": model.dtype, "device": backbone.device}
    hidden = torch.zeros(1, tokens, width, requires_grad=True, **like)  # (1, T, width)
    angles = text.rotary_emb(hidden, torch.zeros(3, 1, tokens, dtype=torch.long, device=backbone.device))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            stored[memory.data_ptr()] = memory.nbytes(), tensor  # kept, so that its address is not given to another
        return tensor

    backbone.model.eval()  # training with checkpointing would store nothing
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        text.layers[0](hidden, position_embeddings=angles, layout=layout)
    return sum(size for size, _ in stored.values())


def memory_budget(backbone, settings, prefixes, branches, learnt, sequences, length):
    """Bytes that training needs at its largest: ({part: bytes}, peak). Not all parts are there at once.

    prefixes, branches: token counts of the largest part of a step, as pack_layout takes them; learnt: those of its tokens that
    are learnt, whose logits are made. sequences, length: how many answers are written at once, and their longest, prefix
    included. Not counted: the vision tower's activations (frozen, they are gone before) and features that are kept.
    """
    model = core(backbone.model)
    text, number = model.config.text_config, model.dtype.itemsize
    layers, tokens = text.num_hidden_layers, sum(prefixes) + sum(map(sum, branches))
    layer = stored_by_layer(backbone, prefixes, branches)
    inner = tokens * text.intermediate_size * 2 * 4  # gradients inside a layer: two tensors of float32
    if settings.checkpointing:  # the input of each layer is stored; in the backward pass one layer runs again
        stored, inner = layers * tokens * text.hidden_size * number, layer + inner
    else:
        stored = layers * layer
    heads = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    parts = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        # Gradients and AdamW's two averages. Muon has one: a small overestimate.
        "optimizer": 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        "cache": sequences * length * 2 * layers * heads * number,
        "activations": stored + inner,
        "logits": min(learnt, LOGITS_AT_ONCE) * text.vocab_size * 3 * 4,  # three tensors of float32
    }
    learning = stored + max(inner, parts["logits"])  # the logits are gone when the gradients reach the layers
    return parts, parts["weights"] + parts["optimizer"] + max(learning, parts["cache"])


LOWER = {  # what to do when a part of the budget is the largest
    "weights": "--load 4bit",
    "optimizer": "--tune lora, or a lower --lora_rank",
    "cache": "a lower --batch (scoring), or --prompts, --max_new_tokens and --group (stage 3)",
    "activations": "--checkpointing true, then a lower --micro_scenes, --max_pixels and --branches (stage 3: --max_new_tokens)",
}


def device_memory(device):
    """Bytes that this process may still come to use: of the card (its limit by torch.cuda.set_per_process_memory_fraction
    included), or its share of the machine's memory."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return min(free + torch.cuda.memory_reserved(device), whole * torch.cuda.get_per_process_memory_fraction(device))
    return psutil.virtual_memory().available / world()[1] + psutil.Process().memory_info().rss


def check_memory(backbone, settings, *largest):
    """Print one line of what training needs at its largest (arguments as memory_budget). Raises SystemExit, naming the
    settings to lower, if that is more than there is: better now than in step 40."""
    (parts, peak), there = memory_budget(backbone, settings, *largest), device_memory(backbone.device)
    line = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts.items())
    say(f"memory in MB: {line}, not all at once; at most {peak / 1e6:,.0f} of {there / 1e6:,.0f}")
    if peak > there:
        most = max(LOWER, key=parts.get)
        raise SystemExit(f"This needs {peak / 1e9:.1f} GB, and there are {there / 1e9:.1f}. Most are {most}: try {LOWER[most]}.")


MOST_SKIPPED = 5  # steps in a row whose gradient is not finite: then the run ends


def check_norm(norm, streak, step, ids):
    """How many steps in a row have had a gradient that is not finite, this one included; 0 if it is finite. `ids`: the
    examples of this process's step. Raises SystemExit, saying what to try, after MOST_SKIPPED of them."""
    if math.isfinite(norm):
        return 0
    say(f"step {step}: the gradient is not finite; nothing is learnt from {', '.join(sorted(set(ids)))}")
    if streak + 1 == MOST_SKIPPED:
        raise SystemExit(
            f"{MOST_SKIPPED} steps in a row without a finite gradient, the last one {step}. Lower --lr (and --muon_lr), or "
            "--load fp32; if it is always the same examples, look at them. The last checkpoint is whole."
        )
    return streak + 1


def start_run(settings):
    """Make the run's folder and save the settings. Returns (folder, step to start from).

    A checkpoint of the same settings is continued; one of other settings is refused, naming the setting.
    """
    folder = Path(settings.out)
    checkpoint = folder / "checkpoint"
    config, step = asdict(settings), 0
    if world()[0] == 0 and checkpoint.with_suffix(".old").is_dir() and not checkpoint.is_dir():
        checkpoint.with_suffix(".old").rename(checkpoint)  # stopped between the two renames of a save
    if world()[0] == 0 and settings.resume not in ("auto", "never") and not checkpoint.is_dir():
        copy_run(Path(settings.resume), folder)
    if dist.is_initialized():
        dist.barrier()
    if settings.resume != "never" and (checkpoint / "state.json").is_file():
        try:
            state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
            step, made = int(state["step"]), dict(state["config"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{checkpoint / 'state.json'} is broken ({error!r}). --resume never starts anew.") from None
        names = [name for name in config | made if name not in ("out", "max_steps", "resume", "processes")]
        refuse_others(checkpoint, made, config, names)
        say(f"going on from step {step} of {checkpoint}")
    if dist.is_initialized():
        dist.barrier()
    if world()[0] == 0:
        if step == 0:
            shutil.rmtree(checkpoint, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", json.dumps(config, indent=2))
        for name in ("metrics.jsonl", "samples.jsonl"):  # drop what was logged after the checkpoint
            # Not splitlines: a sample may hold a line separator of its own (U+2028).
            lines = (folder / name).read_text(encoding="utf-8").split("\n") if step and (folder / name).is_file() else []
            write_whole(folder / name, "".join(line + "\n" for line in lines if logged_by(line, step)))
    return folder, step


def copy_run(run, folder):
    """Copy checkpoint and logs of another run to `folder`. Raises SystemExit if `run` has no checkpoint."""
    if not (run / "checkpoint" / "state.json").is_file():
        raise SystemExit(f"--resume {run}: there is no checkpoint in that folder. Give auto, never, or the folder of a run.")
    shutil.copytree(run / "checkpoint", folder / "checkpoint.new", dirs_exist_ok=True)
    for log_file in run.glob("*.jsonl"):
        shutil.copy(log_file, folder)
    (folder / "checkpoint.new").rename(folder / "checkpoint")  # last, so that a copy that was cut short is made again


def refuse_others(folder, made, config, names):
    """Raise SystemExit, naming the first setting that differs, if `folder` was made with others of these settings."""
    for name in names:
        if made.get(name, ...) != config.get(name, ...):
            before, now = (f"--{name} {some[name]}" if name in some else f"no --{name}" for some in (made, config))
            raise SystemExit(
                f"{folder} was made with {before}, not {now}. Give the same, or --resume never to start anew, or another --out."
            )


def logged_by(line, step):
    """Whether a line of a log is whole and was written at or before `step`. (A killed run may leave half a line.)"""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def save_checkpoint(folder, step, backbone, optimizers, settings):
    """Write `folder`/checkpoint: trained weights, optimizers, step, settings. First a new folder, then a rename, so that
    a stop at any moment leaves a whole one. No random state is kept: every step is seeded by (seed, step, rank)."""
    if world()[0] == 0:
        new, now, old = (Path(folder) / f"checkpoint{suffix}" for suffix in (".new", "", ".old"))
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        weights = {name: p.detach().contiguous() for name, p in backbone.model.named_parameters() if p.requires_grad}
        try:
            save_file(weights, new / "weights.safetensors")
            torch.save([optimizer.state_dict() for optimizer in optimizers], new / "optimizers.pt")
            state = {"step": step, "config": asdict(settings), "start": getattr(backbone, "start", None)}
            (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own word for a full disk
            shutil.rmtree(new, ignore_errors=True)
            needed = 3 * sum(weight.numel() * weight.element_size() for weight in weights.values())
            raise SystemExit(
                f"{new} cannot be written ({error}); it needs about {needed:,} bytes. "
                + (f"{now} is whole: make room, and the same command goes on from it." if now.is_dir() else "Make room.")
            ) from None
        shutil.rmtree(old, ignore_errors=True)
        if now.exists():
            now.rename(old)
        new.rename(now)
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder, backbone, optimizers):
    """Put the weights and optimizers of `folder`/checkpoint back in place. Raises SystemExit if it is broken, or belongs to
    another model than the backbone's."""
    checkpoint = Path(folder) / "checkpoint"
    trained = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    try:
        start = json.loads((checkpoint / "state.json").read_text(encoding="utf-8")).get("start")
        weights = load_file(checkpoint / "weights.safetensors", device=str(backbone.device))
        if other := sorted(trained ^ set(weights)):
            raise ValueError(f"it holds other weights, such as {other[0]}: it belongs to another model")
        if start and start != backbone.start:
            raise ValueError(f"{backbone.path} is no longer the model that it started from")
        backbone.model.load_state_dict(weights, strict=False)
        for optimizer, state in zip(optimizers, torch.load(checkpoint / "optimizers.pt", weights_only=True)):
            optimizer.load_state_dict(state)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every part of it has errors of its own
        reason = re.split(r"\. |\n", str(error).strip() or repr(error))[0]  # not torch's advice to load it all the same
        raise SystemExit(f"{checkpoint} cannot be continued ({reason}). --resume never starts anew.") from None


def seed_step(settings, step):
    """Seed torch for this step and process, so that a resumed run draws the same numbers."""
    torch.manual_seed((settings.seed * 1_000_003 + step) * 64 + world()[0])


def log(folder, row, name="metrics.jsonl"):
    """Append one JSON line to a file of the run (first process only)."""
    if world()[0] == 0:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}  # JSON has no NaN
        try:
            with (Path(folder) / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite, ensure_ascii=False) + "\n")
        except OSError as error:
            raise SystemExit(f"{Path(folder) / name} cannot be written ({error}). The last checkpoint is whole.") from None


def log_samples(folder, step, examples, texts, count=4):
    """Append the first `count` questions, answers and completions to samples.jsonl."""
    for example, text in zip(examples[:count], texts):
        row = {"step": step, "question": example.question, "options": example.options, "answer": example.answer}
        log(folder, row | {"text": text}, "samples.jsonl")


def draw_curves(folder, panels):
    """Draw curves.png from metrics.jsonl. panels: {title: [metric, ...]}; metrics that were never logged are left out."""
    if world()[0] != 0:
        return
    from matplotlib.figure import Figure  # not pyplot, which keeps figures for a screen

    rows = read_jsonl(Path(folder) / "metrics.jsonl")
    panels = {title: [k for k in keys if any(row.get(k) is not None for row in rows)] for title, keys in panels.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    figure = Figure(figsize=(4.2 * len(panels), 3.2))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, keys) in zip(axes[0], panels.items()):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*points), label=key, marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    gc.collect()  # a figure is full of circles, which Python would let pile up


def load_scenes(data, kinds, processor):
    """Read the files `kinds` of a data folder, turn boxes into pixels of the resized picture, group by pictures."""
    examples = [example for kind in kinds for example in read_examples(data, kind)]
    for example in examples:
        if example.question_type == "locate":
            example.answer = boxes_for_model(processor, example)
    return group_scenes(examples)


def heldout_scenes(settings, kinds, processor):
    """`eval_scenes` scenes of the data's heldout/ folder, the same ones each time; without that folder (the released data
    has none) the last scenes of the training data, which then also serve as training scenes."""
    folder = Path(settings.data) / "heldout"
    scenes = load_scenes(folder if folder.is_dir() else settings.data, kinds, processor)
    return random.Random(0).sample(scenes, min(settings.eval_scenes, len(scenes)))


def answer_batches(backbone, scenes, mode, max_new_tokens, temperature=0.0, batch=128, keep=False, seed=None, skip=None):
    """Ask every example of `scenes` in a mode of INSTRUCTIONS ("locate" examples always in theirs).

    The pictures of a scene are read and encoded once for all its questions, and those of the next batch are read while the
    model is busy with this one. batch: questions answered at once. Yields (scenes, texts), one list of texts a scene.
    With a seed, the samples of a batch depend on it and the batch alone; a batch for which skip(scenes) holds is left out.
    """
    parts, asked = [], batch
    for scene in scenes:
        if asked + len(scene.examples) > batch:
            parts.append([])
            asked = 0
        parts[-1].append(scene)
        asked += len(scene.examples)
    parts = [part for part in parts if not (skip and skip(part))]
    if not parts:
        return

    def read(part):
        return [scene_patches(backbone, scene) for scene in part]

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, parts[0])
        for part, following in zip(parts, [*parts[1:], []]):
            patches = ahead.result()
            ahead = reader.submit(read, following)
            branches = []
            for scene in part:
                words = [prompt_text(e, "locate" if e.question_type == "locate" else mode) for e in scene.examples]
                branches.append([list(encode_text(backbone.tokenizer, text + BRANCH_END)) for text in words])
            with torch.no_grad():
                prefixes = encode_scenes(backbone, part, keep, patches)
            if seed is not None:
                torch.manual_seed(zlib.crc32(f"{seed} {part[0].examples[0].id}".encode()))
            answers = branch_generate(backbone, prefixes, branches, max_new_tokens, temperature)
            yield part, [[decode(backbone, completion) for completion in ids] for ids in answers]


def generate_answers(backbone, scenes, mode, max_new_tokens, temperature=0.0, batch=128, keep=False):
    """answer_batches for all scenes, which the processes share.

    Returns examples and texts, two lists in the same order, equal in every process.
    """
    rank, size = world()
    batches = answer_batches(backbone, scenes[rank::size], mode, max_new_tokens, temperature, batch, keep)
    texts = gather([some for _, texts in batches for some in texts])
    return [e for scene in scenes for e in scene.examples], [text for group in texts for text in group]


def decode(backbone, ids):
    """The text of a completion, without the end token."""
    return backbone.tokenizer.decode(ids, skip_special_tokens=True).strip()


def sft_pair(example):
    """What is learnt from an example: (prompt, completion). Boxes, a worked answer or thinking trace as it stands, or the
    bare letter or number."""
    if example.question_type in ("coldstart", "worked"):  # their prompt is complete
        return example.question + BRANCH_END, example.solution + STOP
    if example.question_type == "locate":
        return prompt_text(example, "locate") + BRANCH_END, boxes_text(example.answer) + STOP
    return prompt_text(example, "direct") + BRANCH_END, str(example.answer) + STOP


@dataclass
class Pack:
    """One scene and some of the things to learn about it: (prompt text, completion text) pairs."""

    scene: Scene
    pairs: list


def make_packs(scenes, branches, seed):
    """Split what each scene teaches, shuffled, into packs of at most `branches` (prompt, completion) pairs."""
    rng, packs = random.Random(seed), []
    for scene in scenes:
        pairs = [sft_pair(example) for example in scene.examples]
        rng.shuffle(pairs)
        packs += [Pack(scene, pairs[i : i + branches]) for i in range(0, len(pairs), branches)]
    return packs


def batch_at(items, step, count, seed):
    """The `count` items of a step: pass after pass over `items`, each pass in its own seeded order."""
    out = []
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, len(items))
        out.append(items[_order(len(items), seed, epoch)[place]])
    return out


@lru_cache(maxsize=4)
def _order(count, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


@stop_at_signals()
def sft(backbone, packs, settings, folder, first_step, evaluate, panels, new_tokens=128, stop=lambda scores: False):
    """Supervised fine-tuning: the loss is the mean negative log-probability of the completions' tokens, and nothing else.

    evaluate(backbone, step) -> {name: score} runs on held-out scenes every eval_every steps, with answers of at most
    `new_tokens`; stop(scores) ends the training. Writes metrics, curves and checkpoints to `folder`.
    """
    if not packs:
        raise SystemExit(f"{settings.data} has nothing to learn for this stage.")
    model, (rank, size) = backbone.model, world()
    steps = settings.steps or math.ceil(len(packs) / settings.scenes)
    last = min(steps, settings.max_steps or steps)
    optimizers = make_optimizers(model, settings)
    if first_step:
        load_checkpoint(folder, backbone, optimizers)
    texts = list({text for pack in packs for pair in pack.pairs for text in pair})
    ids = dict(zip(texts, backbone.tokenizer(texts, add_special_tokens=False)["input_ids"]))  # at once: ten times faster
    prefix = {id(scene): scene_length(backbone, scene) for scene in {id(p.scene): p.scene for p in packs}.values()}
    sizes = [(prefix[id(p.scene)], [[len(ids[text]) for text in pair] for pair in p.pairs]) for p in packs]
    largest = sorted(sizes, key=lambda size: size[0] + sum(map(sum, size[1])))[-min(settings.micro_scenes, settings.scenes) :]
    check_memory(
        backbone, settings, [first for first, _ in largest], [[sum(pair) for pair in pairs] for _, pairs in largest],
        sum(completion for _, pairs in largest for _, completion in pairs), settings.batch, max(prefix.values()) + new_tokens,
    )  # fmt: skip
    bar = tqdm(range(first_step, last), initial=first_step, total=last, desc=folder.name, disable=rank > 0)
    scores, skipped = {}, 0
    for step in bar:
        began = time.time()
        seed_step(settings, step)
        model.train()
        batch = batch_at(packs, step, settings.scenes, settings.seed)
        count = sum(len(ids[completion]) for pack in batch for _, completion in pack.pairs)  # over all processes
        mine, loss = batch[rank::size], 0.0
        for start in range(0, len(mine), settings.micro_scenes):
            part = mine[start : start + settings.micro_scenes]
            prefixes = encode_scenes(backbone, [pack.scene for pack in part], settings.keep_features)
            branches = [[(ids[prompt], ids[completion]) for prompt, completion in pack.pairs] for pack in part]
            logps, _, _ = branch_logprobs(backbone, prefixes, branches)  # (N, C), zero at padding
            part_loss = -logps.sum() / count
            part_loss.backward()
            loss += part_loss.item()
        norm = optimizer_step(model, optimizers, settings, step, steps)
        skipped = check_norm(norm, skipped, step + 1, [example.id for pack in mine for example in pack.scene.examples])
        row = {"step": step + 1, "loss": total([loss])[0], "grad_norm": norm, "tokens": count, "seconds": time.time() - began}
        if (step + 1) % settings.eval_every == 0 or step + 1 == last:
            row |= (scores := evaluate(backbone, step + 1))
        log(folder, row)
        bar.set_postfix({"loss": f"{row['loss']:.3f}"} | {k: f"{v:.2f}" for k, v in scores.items()})
        ended, stopping = bool(scores) and stop(scores), stop_asked()
        if (step + 1) % settings.save_every == 0 or step + 1 == last or ended or stopping:
            save_checkpoint(folder, step + 1, backbone, optimizers, settings)
            draw_curves(folder, panels)
        if stopping and step + 1 < last and not ended:
            stop_here(folder, step + 1)
        if ended:
            break
    bar.close()


def save_run(backbone, folder):
    """Write the run's plain model folder, from the first process; the others wait for it."""
    if world()[0] == 0:
        save_model(backbone, folder)
    say(f"wrote {folder}/model")
    if dist.is_initialized():
        dist.barrier()


def end_processes():
    """Let all processes end together."""
    _over.set()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
