"""What all stages share, in reading order:

1 examples   rows of JSON lines -> Example -> Scene: some pictures and the questions about them
2 prompts    the text of a conversation, and the answer that the model learns to write
3 pictures   files -> patches for the vision tower; boxes in original and in resized pixels
4 backbone   load, adapt (LoRA or all weights), merge and save a Qwen2.5-VL
5 branches   encode a scene once, branch its questions: branch_logprobs and branch_generate
6 scoring    text -> answer -> score in [0, 1]: the reward in stage 3 and the metric in eval.py

This file imports no other file of the project. Shapes in comments: B prefixes, N branches (all prefixes together), P prefix
tokens, C completion tokens, T tokens of a packed row, V vocabulary.
"""

import contextlib
import json
import logging
import math
import os
import random
import re
import shutil
import sys
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before its import: it warns about kernels that are not needed
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # likewise: it warns about processes that were ended on purpose

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageOps
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

transformers.utils.logging.disable_progress_bar()  # for loading and saving: the scripts show their own


def print0(text):
    """Print on rank 0 only, to stderr, without breaking a progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)


# ------------------------------------------------------------------------------------------------
# 1. Examples
# ------------------------------------------------------------------------------------------------

DATA_TYPES = ("single_image", "multi_view", "video")
FILES = {
    "locate": "spld_grounding_data.jsonl",
    "spatial": "spld_spatial_data.jsonl",
    "coldstart": "spld_coldstart_data.jsonl",
    "worked": "toy_worked_data.jsonl",  # only in the toy: thoughts without tags, see stage2_understand.py
}
TEXT_FIELDS = {  # the fields with text that a row of each file must have; all rows also have data_type and image
    "locate": ("question",),
    "spatial": ("question", "question_type"),
    "coldstart": ("prompt", "solution"),
    "worked": ("prompt", "solution"),
}


@dataclass
class Example:
    """One question and its answer."""

    id: str
    images: tuple  # absolute paths, in the order in which they are shown
    data_type: str  # one of DATA_TYPES
    question_type: str  # such as "object size"; or "locate", "coldstart", "worked"
    question: str  # without its options
    options: list | None  # ["A. left", ...]; None if the answer is a number or boxes
    answer: object  # a letter, a number, or (locate) a list of boxes in pixels of the original picture
    solution: str = ""  # coldstart and worked rows: the whole text to learn


@dataclass
class Scene:
    """Some pictures, and the examples that ask about them."""

    images: tuple
    data_type: str
    examples: list
    encoded: object = None  # their Prefix, if encode_scenes was told to keep it


def read_jsonl(path):
    """Read a file of JSON lines into a list of dicts.

    Raises SystemExit naming the file (missing or empty) or the line (not UTF-8, not JSON, not an object).
    """
    path, rows = Path(path), []
    if not path.is_file():
        raise SystemExit(f"{path} is missing. Make it with stage0_data.py, or set --data to the folder that has it.")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)  # bytes: json skips a byte order mark
            except (ValueError, RecursionError) as error:
                raise SystemExit(f"{path} line {number} is not JSON in UTF-8 ({error}). Fix or delete the line.") from None
            if not isinstance(row, dict):
                raise SystemExit(f"{path} line {number} is not a JSON object but {json.dumps(row)[:40]}.")
            rows.append(row)
    if not rows:
        raise SystemExit(f"{path} has no rows.")
    return rows


def read_examples(data, kind):
    """Read one file of the released schema. kind: a key of FILES.

    Removes `<image>` from questions and sorts video frames by number (the released files sort them as strings). Checks that
    every field can be used and that every picture exists inside `data`/images.
    Raises SystemExit naming the file, the row and the fault.
    """
    path, root, examples, paths = Path(data) / FILES[kind], (Path(data) / "images").resolve(), [], {}
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path} row {number} (question_id {row.get('question_id')})"
        for name in (*TEXT_FIELDS[kind], "data_type", "image", *["answer"] * (kind == "spatial")):
            if row.get(name) in (None, "", []):
                raise SystemExit(f"{where}: field {name!r} is missing or empty.")
            if name not in ("image", "answer") and not isinstance(row[name], str):
                raise SystemExit(f"{where}: field {name!r} is not text but {row[name]!r}.")
        if row["data_type"] not in DATA_TYPES:
            raise SystemExit(f"{where}: unknown data_type {row['data_type']!r}; choose from {', '.join(DATA_TYPES)}.")
        names = [row["image"]] if isinstance(row["image"], str) else row["image"]
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise SystemExit(f"{where}: image {names!r} is not a list of file names.")
        if row["data_type"] == "video":
            names = sorted(names, key=lambda name: int(re.sub(r"\D", "", Path(name).stem) or 0))
        for name in names:
            if name not in paths:  # links are followed: a picture must not lead out of the folder
                paths[name] = os.path.realpath(root / name)
                if not paths[name].startswith(str(root) + os.sep):
                    raise SystemExit(f"{where}: picture {name!r} lies outside {root}.")
                if not os.path.isfile(paths[name]):
                    raise SystemExit(f"{where}: picture {paths[name]} does not exist. Download or unpack the images first.")
        example = Example(
            id=f"{path.stem}:{number}", images=tuple(paths[name] for name in names), data_type=row["data_type"],
            question_type=row["question_type"] if kind == "spatial" else kind,
            question=row.get("question", row.get("prompt")).replace("<image>", "").strip(), options=row.get("options"),
            answer=row.get("answer"), solution=row.get("solution", ""),
        )  # fmt: skip
        check_answer(example, where)
        examples.append(example)
    return examples


def check_answer(example, where):
    """Raise SystemExit (its text starts with `where`) if the answer of `example` can never be scored as right."""
    answer, options = example.answer, example.options
    if example.question_type in ("coldstart", "worked"):
        return
    if example.question_type == "locate":
        for box in answer if isinstance(answer, list) and answer else [None]:
            if not is_labelled_box(box):
                raise SystemExit(f'{where}: {box} is not {{"bbox_2d": [x1, y1, x2, y2], "label": ...}} with x1 < x2, y1 < y2.')
    elif options:
        good = isinstance(options, list) and all(isinstance(o, str) and re.match(r"[A-Z]\b", o) for o in options)
        if not good or len({option[0] for option in options}) < len(options):
            raise SystemExit(f'{where}: options {options!r} are not like ["A. left", "B. right"], each with its own letter.')
        if answer not in [option[0] for option in options]:
            raise SystemExit(f"{where}: answer {answer!r} is not the letter of one of the options {options}.")
    elif parse_number(answer) is None:
        raise SystemExit(f"{where}: answer {answer!r} is not a number, and there are no options to choose from.")


def group_scenes(examples):
    """Group examples that show the same pictures in the same way: a list of Scene, in order of first appearance."""
    scenes = {}
    for example in examples:
        key = (example.data_type, example.images)
        scenes.setdefault(key, Scene(example.images, example.data_type, [])).examples.append(example)
    return list(scenes.values())


def load_scenes(data, kinds, processor):
    """Read the files `kinds` (keys of FILES) of a data folder; boxes come in pixels of the resized picture: a list of Scene."""
    examples = [example for kind in kinds for example in read_examples(data, kind)]
    for example in examples:
        if example.question_type == "locate":
            example.answer = boxes_for_model(processor, example)
    return group_scenes(examples)


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
BRANCH_END = "<|im_end|>\n<|im_start|>assistant\n"  # ends the question and starts the answer
STOP = "<|im_end|>"


def prompt_text(example, mode):
    """The user's text for `example` in one of the modes of INSTRUCTIONS, without the pictures."""
    options = "\nOptions:\n" + "\n".join(example.options) if example.options else ""
    return f"{example.question}{options}\n{INSTRUCTIONS[mode]}"


def boxes_text(boxes):
    """Compact JSON of a list of boxes, with the keys in the order of the row: the released files put bbox_2d first, as
    Qwen2.5-VL does; the toy puts label first, so that a name is written before its numbers."""
    return json.dumps(boxes, separators=(",", ":"), ensure_ascii=False)


def picture_text(grids, merge, video):
    """Placeholder tokens of a scene's pictures: one pad for each merge x merge square of patches.

    grids: (pictures, 3), t, h, w in patches. A video is one grid; its t counts pairs of frames.
    """
    pad = "<|video_pad|>" if video else "<|image_pad|>"
    return "".join(f"<|vision_start|>{pad * int(t * h * w // merge**2)}<|vision_end|>" for t, h, w in grids)


@lru_cache(maxsize=200_000)
def encode_text(tokenizer, text):
    """Token ids of `text`, a tuple. The pieces of a conversation meet at special tokens, so encoding them one by one gives
    the same ids as encoding the whole."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode(backbone, ids):
    """The text of a completion, without its end token."""
    return backbone.tokenizer.decode(ids, skip_special_tokens=True).strip()


def training_pair(example):
    """What SFT learns from an example: (prompt, completion). The completion is the boxes, the whole solution of a coldstart or
    worked row, or the letter or number."""
    if example.question_type in ("coldstart", "worked"):  # their prompt has the instruction already
        return example.question + BRANCH_END, example.solution + STOP
    if example.question_type == "locate":
        return prompt_text(example, "locate") + BRANCH_END, boxes_text(example.answer) + STOP
    return prompt_text(example, "direct") + BRANCH_END, str(example.answer) + STOP


@dataclass
class Pack:
    """A scene and some of its training pairs, the unit of SFT: they share one prefix."""

    scene: Scene
    pairs: list  # [(prompt ids, completion ids)]


def make_packs(tokenizer, scenes, branches, seed):
    """Shuffle the training pairs of each scene and split them into packs of at most `branches` pairs: a list of Pack."""
    rng, packs = random.Random(seed), []
    for scene in scenes:
        pairs = [training_pair(example) for example in scene.examples]
        rng.shuffle(pairs)
        packs += [Pack(scene, pairs[i : i + branches]) for i in range(0, len(pairs), branches)]
    texts = list({text for pack in packs for pair in pack.pairs for text in pair})
    ids = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"])) if texts else {}  # all at once: 10x faster
    for pack in packs:
        pack.pairs = [(ids[prompt], ids[completion]) for prompt, completion in pack.pairs]
    return packs


def batch_at(items, step, count, seed):
    """The `count` items of a step (from 0): pass after pass over `items`, each pass in its own seeded order."""
    batch = []
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, len(items))
        batch.append(items[shuffled_order(len(items), seed, epoch)[place]])
    return batch


@lru_cache(maxsize=4)
def shuffled_order(count, seed, epoch):
    """The numbers below `count` in the order of a pass."""
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


# ------------------------------------------------------------------------------------------------
# 3. Pictures
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def picture_errors(path, what="picture"):
    """Turn every error of a decoder into a SystemExit that names the file."""
    try:
        yield
    except Exception as error:  # broken files raise all kinds
        reason = (str(error).strip().splitlines() or ["no frames"])[-1]
        raise SystemExit(f"{path} cannot be read as a {what} ({reason}). Replace it or remove its rows.") from None


def picture_size(path):
    """(width, height) of a picture as load_image returns it, without decoding it. Raises SystemExit naming a file that is not
    a picture, has more pixels than PIL's limit, or is too narrow for the image processor."""
    with picture_errors(path), Image.open(path) as image:
        width, height = image.size
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{width} x {height} pixels are too many")
        if max(width, height) > 200 * min(width, height):
            raise ValueError(f"{width} x {height} pixels: one side is over 200 times the other")
        rotated = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 swap the sides
    return (height, width) if rotated else (width, height)


def load_image(path):
    """Open a picture as RGB, rotated as its EXIF says. Raises SystemExit as picture_size does."""
    picture_size(path)
    with picture_errors(path), Image.open(path) as image:
        if image.mode.startswith("I"):  # 16 bits a pixel: convert() alone would clip them to white
            image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
        return ImageOps.exif_transpose(image).convert("RGB")


def read_video(path, frames):
    """At most `frames` pictures of an mp4 at equal steps, the first and the last included, in temporal order.

    Raises SystemExit naming a file that is not a video or has no frames.
    """
    import decord  # only mp4 files need it

    with picture_errors(path, "video"):
        reader = decord.VideoReader(str(path))
        picks = np.linspace(0, len(reader) - 1, min(frames, len(reader))).round().astype(int)
        return [Image.fromarray(frame) for frame in reader.get_batch(picks).asnumpy()]


def picture_patches(processor, images, video=False):
    """Pictures -> patches for the vision tower.

    Returns pixels (patches, channels * 2 * 14 * 14) float32 and grids (pictures, 3), t, h, w in patches. A video is ONE grid:
    two consecutive frames share a temporal patch, and an odd number of frames repeats the last one.
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
    """(width, height), multiples of 28, to which the processor resizes a picture of width x height pixels."""
    side, limits = processor.patch_size * processor.merge_size, processor.size
    height, width = smart_resize(height, width, side, limits["shortest_edge"], limits["longest_edge"])
    return width, height


def valid_box(box):
    """Whether `box` is [x1, y1, x2, y2] with finite numbers, x1 < x2 and y1 < y2."""
    try:
        x1, y1, x2, y2 = box
        return -1e9 < x1 < x2 < 1e9 and -1e9 < y1 < y2 < 1e9  # also False for nan and inf
    except (TypeError, ValueError):
        return False


def scale_box(box, source, target):
    """A box in a picture of size source = (width, height) -> integer pixels of a picture of size target, clipped."""
    (sw, sh), (tw, th) = source, target
    x1, y1, x2, y2 = box
    return [round(min(max(value * t / s, 0), t)) for value, s, t in zip((x1, y1, x2, y2), (sw, sh, sw, sh), (tw, th, tw, th))]


def boxes_for_model(processor, example):
    """The boxes of a locate example in pixels of the RESIZED picture, as Qwen2.5-VL is trained; each keeps at least one pixel.

    Raises SystemExit naming the picture that cannot be read, or the row of a box outside its picture.
    """
    source = picture_size(example.images[0])
    target, boxes = resized_size(processor, *source), []
    for box in example.answer:
        x1, y1, x2, y2 = box["bbox_2d"]
        if x1 >= source[0] or y1 >= source[1] or x2 <= 0 or y2 <= 0:
            picture = f"{example.images[0]} ({source[0]} x {source[1]})"
            raise SystemExit(f"{example.id}: {box} lies outside its picture {picture}. Fix or remove the row.")
        x1, y1, x2, y2 = scale_box(box["bbox_2d"], source, target)
        x1, y1 = min(x1, target[0] - 1), min(y1, target[1] - 1)
        boxes.append(box | {"bbox_2d": [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]})
    return boxes


# ------------------------------------------------------------------------------------------------
# 4. Backbone
# ------------------------------------------------------------------------------------------------

LOADS = ("fp32", "bf16", "4bit")
# Only the language model: short names such as "q_proj" would also match the MLP of the vision tower.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def load_backbone(path, load="bf16", min_pixels=None, max_pixels=None, device="cpu"):
    """Load a Qwen2.5-VL from a folder or a hub id.

    load: "fp32", "bf16" or "4bit" (nf4; the vision tower and the head stay bf16). Pixel limits default to the folder's own.
    Returns a namespace: model; tokenizer; processor (the PIL image processor: Qwen2_5_VLProcessor needs torchvision); stop
    (ids that end a completion); suppress (ids that are never sampled); path; device; frames (taken from an mp4); checksum (of
    the first weights of every tensor: a checkpoint can only be resumed from the model that it started from).
    Raises SystemExit if the folder has no model or another kind of model, weights are missing, or the tokenizer does not fit.
    """
    check_model_folder(path, load)
    kwargs = {"dtype": torch.float32 if load == "fp32" else torch.bfloat16}
    if load == "4bit":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["model.visual", "lm_head"],  # "visual" alone would skip nothing: names start at the top
        )  # fmt: skip
        kwargs["device_map"] = {"": device}
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind != "qwen2_5_vl":  # transformers would build a 7B model with random weights
            raise ValueError(f"config.json has model_type {kind}")
        tokenizer = AutoTokenizer.from_pretrained(path)
        processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, attn_implementation={"": "sdpa", "text_config": "branches"}, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **kwargs,
        )  # fmt: skip
        if tokenizer.convert_tokens_to_ids("<|image_pad|>") != model.config.image_token_id:
            raise ValueError("its tokenizer is missing, or belongs to another model")
        if wrong := sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]:
            raise ValueError(f"{len(wrong)} weights are missing or have another shape, such as {wrong[0]}")
    except SafetensorError as error:
        raise SystemExit(f"{path}: a weights file (model*.safetensors) is broken ({error}). Copy it or make it again.") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be loaded as Qwen2.5-VL with tokenizer and image processor: {error}") from None
    if load == "4bit":
        for module in model.modules():
            # On CPUs with AVX512-BF16 an eval forward repacks the weights in place, and training after it loses gradients
            # without an error. GRPO samples in eval mode and then trains: forbid the repacking.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    else:
        model.to(device)
    embed_patches_by_matrix(model)
    processor.size = {
        "shortest_edge": min_pixels or processor.size["shortest_edge"],
        "longest_edge": max_pixels or processor.size["longest_edge"],
    }
    ids, checksum = tokenizer.convert_tokens_to_ids, 0
    for weight in model.parameters():
        checksum = zlib.crc32(weight.detach().flatten()[:64].float().cpu().numpy().tobytes(), checksum)
    return SimpleNamespace(
        model=model.eval(), tokenizer=tokenizer, processor=processor, path=str(path), device=torch.device(device), frames=16,
        checksum=checksum, stop=[ids(STOP), ids("<|endoftext|>")],
        suppress=[ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad", "video_pad")],
    )  # fmt: skip


def check_model_folder(path, load):
    """Raise SystemExit if load_backbone cannot work with these arguments."""
    if load not in LOADS:
        raise SystemExit(f"--load {load}: choose from {', '.join(LOADS)}.")
    if (Path(path) / "adapter_config.json").is_file():
        raise SystemExit(f"{path} is a LoRA adapter, not a model. Use the folder model/ beside it, where the adapter is merged.")
    is_hub_id = re.fullmatch(r"(?!runs/)\w[\w.-]*/[\w.-]+", str(path)) and not Path(path).exists()
    if not is_hub_id and not (Path(path) / "config.json").is_file():
        raise SystemExit(f"{path} has no model (config.json is missing). Run the stage before this one, or set --model.")


def embed_patches_by_matrix(model):
    """Compute the vision tower's patch embedding as a matrix product, in place: the stride of its convolution equals its
    kernel, so the two are the same, and Conv3d took a third of the toy tower's time on a CPU."""
    patch = model.model.visual.patch_embed
    patch.forward = lambda pixels: F.linear(pixels.to(patch.proj.weight.dtype), patch.proj.weight.flatten(1))


def unwrap(model):
    """The Qwen2_5_VLForConditionalGeneration inside a PEFT wrapper. Its LoRA layers stay in place: they run either way."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapt(backbone, settings):
    """Make the backbone trainable, in place: see `tune`, `lora_rank`, `lora_alpha`, `train_vision` and `checkpointing` of
    TrainSettings. A vision tower that is not trained stays frozen and runs under no_grad, storing nothing."""
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
        unwrap(model).gradient_checkpointing_enable({"use_reentrant": False})
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapted = sum(hasattr(module, "lora_A") for module in model.modules())
    print0(f"training {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters"
           + (f" in {adapted} LoRA modules" if adapted else ""))  # fmt: skip


def save_model(backbone, folder):
    """Merge the adapter and write `folder`/model, a plain Hugging Face folder, and the adapter beside it.

    A 4-bit model's adapter is merged into the bf16 weights, loaded again on the CPU; never into the 4-bit weights.
    model/ gets its name when it is whole.
    """
    folder, model = Path(folder), backbone.model
    if isinstance(model, PeftModel):
        model.save_pretrained(folder / "adapter")
        if getattr(unwrap(model), "is_loaded_in_4bit", False):
            plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone.path, dtype=torch.bfloat16)
            model = PeftModel.from_pretrained(plain, folder / "adapter")
        model = model.merge_and_unload()
    shutil.rmtree(folder / "model.new", ignore_errors=True)
    for part in (model, backbone.tokenizer, backbone.processor):
        part.save_pretrained(folder / "model.new")
    shutil.rmtree(folder / "model", ignore_errors=True)
    (folder / "model.new").rename(folder / "model")


# ------------------------------------------------------------------------------------------------
# 5. Branches: encode a scene once, branch its questions
# ------------------------------------------------------------------------------------------------


@dataclass
class Prefix:
    """What all branches of a scene share: system prompt, pictures, and (in a rollout) the question."""

    ids: torch.Tensor  # (P,) token ids, one pad token for each picture token
    positions: torch.Tensor  # (3, P) M-RoPE positions: time, height, width
    features: torch.Tensor | None  # (picture tokens, width) from the vision tower
    name: str = ""  # ids of the scene's examples, for messages


def scene_patches(backbone, scene):
    """Read the pictures of a scene: (pixels, grids) as in picture_patches, or None if the scene is encoded already."""
    if scene.encoded is not None:
        return None
    if scene.images[0].endswith(".mp4"):
        pictures = read_video(scene.images[0], backbone.frames)
    else:
        pictures = [load_image(path) for path in scene.images]
    return picture_patches(backbone.processor, pictures, scene.data_type == "video")


def encode_scenes(backbone, scenes, keep=False, patches=None):
    """Run the vision tower once over the pictures of all scenes: a list of Prefix (system prompt + pictures).

    keep: store the result in each scene; for small pictures and a frozen tower. patches: the results of scene_patches, if
    they were read before.
    """
    model, merge = unwrap(backbone.model).model, backbone.processor.merge_size
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
            ids = torch.tensor(encode_text(backbone.tokenizer, PREFIX_START + picture_text(grids, merge, video)))  # (P,)
            kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()  # (P,)
            positions, _ = model.get_rope_index(
                ids[None], mm_token_type_ids=kinds[None], **{"video_grid_thw" if video else "image_grid_thw": grids}
            )  # (3, 1, P)
            name = ", ".join(example.id for example in scene.examples) or scene.images[0]
            prefixes[id(scene)] = Prefix(ids.to(backbone.device), positions[:, 0].to(backbone.device), part, name)
            if keep:
                scene.encoded = prefixes[id(scene)]
    return [scene.encoded or prefixes[id(scene)] for scene in scenes]


def text_positions(prefix, count):
    """Positions (3, count) of the text behind a prefix: they go on from the prefix's last token, equal in all three rows."""
    start = int(prefix.positions[0, -1]) + 1
    return torch.arange(start, start + count, device=prefix.ids.device).expand(3, -1)


def extend_prefix(prefix, ids):
    """The prefix followed by the text tokens `ids`, a new Prefix."""
    positions = torch.cat([prefix.positions, text_positions(prefix, len(ids))], dim=1)  # (3, P + text)
    return Prefix(torch.cat([prefix.ids, prefix.ids.new_tensor(ids)]), positions, prefix.features, prefix.name)


def check_lengths(backbone, prefixes, lengths):
    """Raise SystemExit if a prefix and one of its branches exceed the model's context. lengths: B lists of token counts."""
    limit = unwrap(backbone.model).config.text_config.max_position_embeddings
    for prefix, group in zip(prefixes, lengths):
        if (tokens := len(prefix.ids) + max(group, default=0)) > limit:
            raise SystemExit(
                f"{tokens:,} tokens exceed the model's context of {limit:,}. Lower --max_pixels (or --max_new_tokens), or remove "
                f"the question, one of: {prefix.name}."
            )


def embed(backbone, ids, features):
    """Word embeddings of ids (any shape), with the picture tokens replaced by `features` (list of tensors) in order."""
    config = unwrap(backbone.model).config
    out = unwrap(backbone.model).get_input_embeddings()(ids)  # (..., width)
    is_picture = (ids == config.image_token_id) | (ids == config.video_token_id)
    return out.masked_scatter(is_picture[..., None], torch.cat(features).to(out.dtype)) if features else out


def pack_layout(prefixes, branches, device):
    """Where each token of a packed row is. The row holds all prefixes, then all branches, without padding.

    prefixes: B lengths; branches: B lists of lengths. Returns a namespace: prefix (B, P) and branch (N, C), the place in the
    row of every padded slot (padding points at place 0); owner (N,), the prefix of each branch; mask (N, 1, C, P + C), what a
    branch token attends to; unpad (T,), the padded slot of every token of the row; prefix_last (B,), the last prefix tokens.
    """
    counts = [len(lengths) for lengths in branches]
    lengths = torch.tensor(prefixes), torch.tensor([n for lengths in branches for n in lengths])  # (B,), (N,)
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
        unpad=unpad.to(device), prefix_last=starts[: len(prefixes)] + lengths[0] - 1,
    )  # fmt: skip


def branch_attention(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """Attention of a packed row: prefixes attend causally, a branch attends to its prefix and to itself.

    query (1, heads, T, D), key and value (1, kv heads, T, D) -> (1, T, heads, D). The cost is B prefixes of P x P / 2 and N
    branches of C x (P + C); a dense 4-D mask would cost T x T. Without a layout this is transformers' sdpa.
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
    if query.is_cuda:  # a mask with grouped heads would leave only the kernel that writes all scores to memory
        groups = query.shape[1] // key.shape[1]
        branch_key, branch_value = (part.repeat_interleave(groups, dim=1) for part in (branch_key, branch_value))
    branch_out = attend(pad(query, layout.branch), branch_key, branch_value, attn_mask=layout.mask)
    out = [part.transpose(1, 2).flatten(0, 1) for part in (prefix_out, branch_out)]  # each (rows * longest, heads, D)
    return torch.cat(out).index_select(0, layout.unpad)[None], None


AttentionInterface.register("branches", branch_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("branches", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
LOGITS_AT_ONCE = 1024  # tokens: each has 152,000 logits


def branch_logprobs(backbone, prefixes, branches, chunk=LOGITS_AT_ONCE):
    """Log-probability of every completion token, with each prefix encoded once.

    prefixes: B Prefix. branches: B lists of (prompt ids, completion ids), N in all; a prompt may be empty.
    Returns logps (N, C), zero at padding; entropy (N, C) in nats, without gradient; mask (N, C), True at completion tokens.
    Equal to separate rows [prefix + prompt + completion], at the cost of P + sum(branch) tokens instead of N * P +
    sum(branch). Logits are computed at completion tokens only, `chunk` at a time.
    """
    model = unwrap(backbone.model)
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

    # Token t of a branch is predicted at token t - 1; its first token is predicted at the last token of the prefix.
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
        if len(targets) > chunk and torch.is_grad_enabled():  # store hidden states, not logits, for the backward pass
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

    prefixes: B Prefix. branches: B lists of prompt ids, N in all (either all have a prompt, or none: in a rollout the prefix
    has the question). temperature 0 is greedy; above 0 samples from the model's own distribution (no top-k, top-p or penalty:
    sampler and scorer must be one distribution), but never a vision token, which would break the next forward pass.
    Returns B lists of completion ids, with the end token where it was reached.
    Runs in eval mode: train mode with gradient checkpointing would drop the cache.
    """
    check_lengths(backbone, prefixes, [[len(prompt) + max_new_tokens for prompt in group] for group in branches])
    model, device = unwrap(backbone.model), backbone.device
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
    live = torch.arange(len(prompts), device=device)  # (live,) the branches that are still in the cache
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
        if done.float().mean() > 0.25:  # drop ended rows now and then: copying the cache costs time, too
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
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # (10,) of mean relative accuracy


def extract_answer(text):
    """The text in the LAST <answer> block, or the whole text if there is none; stripped."""
    text = text or ""
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))  # of the last block that is closed
    return (text[start + len("<answer>") : text.index("</answer>", start)] if start >= 0 else text).strip()


def parse_choice(text, options):
    """The letter of the option that a short answer names, or None: "B", "(B)", "B.", "B. right", "right", "The answer is B".

    An answer that names no option, or several ("A or B"), is None.
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
    """The number in a short answer, a float, or None: "1,200", "-3", "two", "2.5 m", "about 2.5 meters".

    Text with no number or with several, nan and inf are None.
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
    """A JSON list of {"bbox_2d", "label"} as a list, or None if the text is anything else."""
    try:
        boxes = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return boxes if isinstance(boxes, list) and all(map(is_labelled_box, boxes)) else None


def is_labelled_box(box):
    """Whether `box` is {"bbox_2d": a valid box, "label": text}."""
    return isinstance(box, dict) and isinstance(box.get("label"), str) and valid_box(box.get("bbox_2d"))


def mean_relative_accuracy(predictions, truths):
    """MRA of VSI-Bench: the mean over theta in {.50, .55, ..., .95} of [ |p - g| / g <= 1 - theta ], in float64.

    predictions, truths: (N,) -> (N,) in [0, 1]. A nan prediction scores 0; a truth of 0 must be met exactly.
    """
    p, g = np.asarray(predictions, np.float64), np.asarray(truths, np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        error = np.where(p == g, 0.0, np.abs(p - g) / np.abs(g))  # (N,)
        return (error[:, None] <= 1 - THRESHOLDS).mean(1)  # (N, 10) -> (N,)


def box_iou(a, b):
    """Intersection over union of boxes (N, 4) and (N, 4), each x1, y1, x2, y2 -> (N,)."""
    a, b = np.asarray(a, np.float64).reshape(-1, 4), np.asarray(b, np.float64).reshape(-1, 4)
    sides = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)  # (N, 2)
    area = [(box[:, 2:] - box[:, :2]).prod(1) for box in (a, b)]
    overlap = sides.prod(1)
    return overlap / np.maximum(area[0] + area[1] - overlap, 1e-9)


def match_boxes(predicted, wanted):
    """For each wanted box, the first unused predicted box with its label, or an empty box: a list of (4,)."""
    left, out = list(predicted or []), []
    for box in wanted:
        found = next((p for p in left if p["label"].strip().lower() == box["label"].strip().lower()), None)
        if found:
            left.remove(found)
        out.append(found["bbox_2d"] if found else [0, 0, 0, 0])
    return out


def score_answers(texts, examples):
    """Score N completions at once: the accuracy reward of stage 3 and the metric of eval.py.

    examples: N Example (locate: with boxes in the pixels that the model sees). Choices score 0 or 1, numbers their mean
    relative accuracy, boxes their mean IoU, where a box too many counts as a miss.
    Returns scores (N,) float64 and legal (N,) bool: whether the answer is one of the options, a number, or boxes.
    """
    scores, legal = np.zeros(len(texts)), np.zeros(len(texts), bool)
    choice, number = lru_cache(None)(parse_choice), lru_cache(None)(parse_number)  # short answers repeat: parse each once
    numbers, boxes = [], []  # (row, prediction, truth) to score together
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
