"""What all stages share, in reading order:

1 examples   rows of JSON lines -> Example -> Scene: some pictures and the questions about them
2 prompts    the text of a conversation, and the answer that the model learns to write
3 pictures   files -> patches for the vision tower; boxes in original and in resized pixels
4 backbone   load and adapt (LoRA or all weights) a Qwen2-VL, Qwen2.5-VL or Qwen3-VL; what differs between them
5 branches   encode a scene once, branch its questions: branch_logprobs and branch_generate
6 scoring    text -> answer -> score in [0, 1]: the reward in stage 3 and the metric in eval.py

This file imports no other file of the project. Shapes in comments: B prefixes, N branches (all prefixes together), P prefix
tokens, C completion tokens, T tokens of a packed row, V vocabulary.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import random
import re
import shlex
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before its import: it warns about kernels that are not needed
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # likewise: it warns about processes that were ended on purpose

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from PIL import Image, ImageOps
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

transformers.utils.logging.disable_progress_bar()  # for loading and saving: the scripts show their own


def print0(text):
    """Print on rank 0 only, to stderr, without breaking a progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stderr)


print_once = lru_cache(print0)  # the same line once a process


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
SPECIAL = re.compile(r"<\|[^\s<>|]+\|>")  # a special token of a tokenizer
TYPES = ("relative direction", "relative distance", "appearance order", "absolute distance", "object size", "object count",
         "room size")  # fmt: skip


@dataclass
class Example:
    """One question and its answer."""

    id: str
    images: tuple  # absolute paths, in the order in which they are shown
    data_type: str  # one of DATA_TYPES
    question_type: str  # such as "object size"; or "locate", "coldstart", "worked"
    question: str  # without its options
    options: list | None  # ["A. left", ...]; None if the answer is a number, an exact text, or boxes
    answer: object  # a letter, a number, a text, or (locate) a list of boxes in pixels of the original picture
    solution: str = ""  # coldstart and worked rows: the whole text to learn
    boxes: list | None = None  # spatial rows of stage 0: boxes of the objects in the question, each with the number of its picture


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


def data_file(data, kind):
    """The path of a file of FILES in a data folder. Without the released spatial file, the folder's only other JSONL file takes
    the place of the spatial and the localisation file: your own questions, see own_row."""
    path, known = Path(data) / FILES[kind], {*FILES.values(), "objects.jsonl"}
    if kind in ("spatial", "locate") and not path.is_file() and not (Path(data) / FILES["spatial"]).is_file():
        others = sorted(other for other in Path(data).glob("*.jsonl") if other.name not in known)
        if len(others) > 1:
            raise SystemExit(f"{data} has several files of questions ({', '.join(p.name for p in others)}): put them into one.")
        path = others[0] if others else path
    return path


def own_row(row, kind, where):
    """A row of your own file in the released schema; kind "locate": its boxes as the answer, or None if it has none.

    It must have image, question and answer. data_type follows from the pictures, question_type from the answer. Options may come
    without letters; then the answer is a letter or one of the options.
    """
    row = {name: value for name, value in row.items() if value is not None}
    names = row.get("image", [])
    names = names if isinstance(names, list) else [names]
    video = any(is_video(str(name)) for name in names)
    row = {"data_type": "video" if video else "single_image" if len(names) == 1 else "multi_view"} | row
    if row.get("boxes") and row["data_type"] != "single_image":
        raise SystemExit(f"{where}: boxes need a question about one picture.")
    if kind == "locate":
        return row | {"answer": row["boxes"], "question_type": kind} if row.get("boxes") else None
    options, answer = row.get("options"), row.get("answer")
    answer = str(answer).strip() if isinstance(answer, (str, int, float)) else answer
    if isinstance(options, list) and 1 < len(options) <= 26 and all(isinstance(o, (str, int, float)) for o in options):
        options = [str(option).strip() for option in options]
        if not all(re.match(r"[A-Z](?:[.):]|$)", option) for option in options):
            options = [f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options)]
        answer = parse_choice(str(answer), options) or answer
        row["options"] = options
    shape = "choice" if options else "text" if parse_number(answer) is None else "number"
    return {"question_type": shape} | row | {"answer": answer}


def is_video(path):
    """Whether a file is an mp4, by its name."""
    return path.lower().endswith(".mp4")


def picture_folder(data, name):
    """The folder that the picture `name` of a row is relative to: images/ of the data folder, or the data folder itself."""
    folder = Path(data) / "images"
    return folder if (folder / name).is_file() or not (Path(data) / name).is_file() else Path(data)


def read_examples(data, kind, types=()):
    """Read one file of the released schema, or your own questions (see data_file). kind: a key of FILES. types: if there are any,
    other question types are left out.

    Removes `<image>` and `<video>` from questions and sorts video frames by number (the released files sort them as strings).
    Checks that every field can be used and that every picture exists inside `data`/images, or inside `data`.
    Raises SystemExit naming the file, the row and the fault.
    """
    path, examples, paths, found = data_file(data, kind), [], {}, set()
    if kind == "coldstart" and not path.is_file():
        raise SystemExit(f"{path} is missing. Make it with stage0_data.py or eval.py --traces, or use --cold_start false.")
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path} row {number} (question_id {row.get('question_id')})"
        if path.name != FILES[kind]:
            row = own_row(row, kind, where)
            if row is None:
                continue
        for name in (*TEXT_FIELDS[kind], "data_type", "image", *["answer"] * (kind == "spatial")):
            if row.get(name) in (None, "", []) or not str(row[name]).strip():
                raise SystemExit(f"{where}: field {name!r} is missing or empty.")
            if name not in ("image", "answer") and not isinstance(row[name], str):
                raise SystemExit(f"{where}: field {name!r} is not text but {row[name]!r}.")
        if row["data_type"] not in DATA_TYPES:
            raise SystemExit(f"{where}: unknown data_type {row['data_type']!r}; choose from {', '.join(DATA_TYPES)}.")
        if types and kind != "locate":
            if not isinstance(row.get("question_type"), str):
                raise SystemExit(f"{where}: it has no question_type, which --types needs.")
            found.add(row["question_type"])
            if row["question_type"] not in types:
                continue
        names = [row["image"]] if isinstance(row["image"], str) else row["image"]
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise SystemExit(f"{where}: image {names!r} is not a list of file names.")
        if row["data_type"] == "video":
            names = sorted(names, key=lambda name: int(re.sub(r"\D", "", Path(name).stem) or 0))
        for name in names:
            if name not in paths:  # links are followed: a picture must not lead out of the folder
                root = picture_folder(data, name).resolve()
                paths[name] = os.path.realpath(root / name)
                if not paths[name].startswith(str(root) + os.sep):
                    raise SystemExit(f"{where}: picture {name!r} lies outside {root}.")
                if not os.path.isfile(paths[name]):
                    raise SystemExit(f"{where}: picture {missing_file(paths[name], Path(data).resolve())}")
        example = Example(
            id=f"{path.stem}:{number}", images=tuple(paths[name] for name in names), data_type=row["data_type"],
            question_type=row["question_type"] if kind == "spatial" else kind,
            question=clean_question(row.get("question", row.get("prompt"))), options=row.get("options"),
            answer=row.get("answer"), solution=row.get("solution", ""), boxes=row.get("boxes"),
        )  # fmt: skip
        check_text(example, where)
        check_answer(example, where)
        examples.append(example)
    missing = sorted(set(types) - found)
    if found and missing and (kind == "spatial" or not examples):  # traces may lack a type
        raise SystemExit(f"{path} has no rows of --types {', '.join(missing)}. It has {', '.join(sorted(found))}.")
    return examples


def missing_file(path, folder):
    """What to do about the file `path`, which does not exist: the command to unpack the zip that has it, where one lies in
    `folder` or between it and the file."""
    path, folder, broken = Path(path), Path(folder), ""
    for place in [folder, *(parent for parent in path.parents if folder in parent.parents)]:
        for archive in sorted(place.glob("*.zip")):
            try:
                with zipfile.ZipFile(archive) as opened:
                    names = opened.namelist()
            except (zipfile.BadZipFile, OSError):
                broken += f" {archive} is not a whole zip file: download it again."
                continue
            for name in names:
                if path.as_posix().endswith("/" + name):
                    target = path.as_posix().removesuffix("/" + name)
                    command = shlex.join(["unzip", "-q", str(archive), "-d", target])
                    return f"{path} does not exist, but it is in {archive}. Unpack that: {command}"
                if name.endswith("/" + "/".join(path.parts[-2:])):
                    return f"{path} does not exist, but {archive} has it as {name}. Unpack that, and put the file there."
    return f"{path} does not exist.{broken or ' Download or unpack the images first.'}"


def clean_question(text):
    """A question without the marks where its pictures belong: `<image>` and `<video>`."""
    return re.sub("<(image|video)>", "", text).strip()


def check_text(example, where):
    """Raise SystemExit (its text starts with `where`) if the texts of `example` hold no question, or a special token of a
    tokenizer such as <|im_end|> or <|image_pad|>: it would end the conversation early, or ask for a picture."""
    if not example.question:
        raise SystemExit(f"{where}: the question has no text.")
    token = SPECIAL.search(f"{example.question} {example.options} {example.answer} {example.solution}")
    if token:
        raise SystemExit(f"{where}: its text holds the special token {token[0]}. Remove it, or the row.")


def check_answer(example, where):
    """Raise SystemExit (its text starts with `where`) if the answer of `example` can never be scored as right, or its boxes
    cannot be used."""
    answer, options, boxes = example.answer, example.options, example.boxes

    def fits(box):
        """Whether it is a box in one of the example's pictures."""
        number = box.get("picture", 1) if is_labelled_box(box) else None
        return type(number) is int and 1 <= number <= len(example.images)

    if boxes is not None and not (isinstance(boxes, list) and all(map(fits, boxes))):
        raise SystemExit(f'{where}: boxes {boxes!r} are not like [{{"bbox_2d": [x1, y1, x2, y2], "label": ..., "picture": 1}}].')
    if example.question_type in ("coldstart", "worked"):
        return
    if example.question_type == "locate":
        for box in answer if isinstance(answer, list) and answer else [None]:
            if not fits(box):
                raise SystemExit(f'{where}: {box} is not {{"bbox_2d": [x1, y1, x2, y2], "label": ...}} with x1 < x2, y1 < y2, and '
                                 '"picture": its number, if there are several.')  # fmt: skip
    elif options:
        good = isinstance(options, list) and all(isinstance(o, str) and re.match(r"[A-Z]\b", o) for o in options)
        if not good or len({option[0] for option in options}) < len(options):
            raise SystemExit(f'{where}: options {options!r} are not like ["A. left", "B. right"], each with its own letter.')
        if answer not in [option[0] for option in options]:
            raise SystemExit(f"{where}: answer {answer!r} is not the letter of one of the options {options}.")
    elif parse_number(answer) is None and (example.question_type in TYPES or not isinstance(answer, str)):
        raise SystemExit(f"{where}: answer {answer!r} is not a number, and there are no options to choose from.")


def group_scenes(examples):
    """Group examples that show the same pictures in the same way: a list of Scene, in order of first appearance."""
    scenes = {}
    for example in examples:
        key = (example.data_type, example.images)
        scenes.setdefault(key, Scene(example.images, example.data_type, [])).examples.append(example)
    return list(scenes.values())


def load_scenes(data, kinds, backbone, types=()):
    """Read the files `kinds` (keys of FILES) of a data folder; boxes come in the units of the model (see box_space): a list of
    Scene. Prints what each file holds. types: see read_examples."""
    examples = []
    for kind in kinds:
        some = read_examples(data, kind, types)
        counts = Counter(example.question_type for example in some)
        listed = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
        print_once(f"read {data_file(data, kind)}: {len(some):,} rows" + f" ({listed})" * (len(counts) > 1))
        if kind == "coldstart" and not any(has_instruction(example.question, "think") for example in some):
            print_once(f"{data_file(data, kind)}: its prompts do not ask as --instruction think does. Use their wording for it.")
        examples += some
    for example in examples:
        if example.question_type == "locate":
            example.answer = boxes_for_model(backbone, example)
        elif example.data_type == "video" and backbone.family.timed:
            frame_numbers(example.images)
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
OTHER_WORDING = {"direct-text": "Answer with a word or a short phrase only."}  # behind a hyphen: for answers of this shape alone
SHAPES = ("choice", "number", "text")  # of an answer: one of the options, a number, an exact text
WORDING_FILE = "instructions.json"  # in a model's folder: INSTRUCTIONS of the run that has trained it
PREFIX_START = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
BRANCH_END = "<|im_end|>\n<|im_start|>assistant\n"  # ends the question and starts the answer
STOP = "<|im_end|>"


OUR_INSTRUCTIONS = dict(INSTRUCTIONS)


def read_instructions(words):
    """{mode: text} from the words of --instruction: MODE=TEXT or MODE=@FILE. Raises SystemExit naming the word that is wrong."""
    chosen = {}
    for word in words:
        mode, _, text = word.partition("=")
        if text.startswith("@"):
            try:
                text = Path(text[1:]).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise SystemExit(f"--instruction {word}: the file cannot be read ({error}).") from None
        chosen |= check_instructions({mode: text}, f"--instruction {word}")
    return chosen


def check_instructions(wording, where):
    """A dict {mode: text}, the texts stripped. mode: a key of INSTRUCTIONS, or one for answers of one of the SHAPES alone, such as
    think-number. Raises SystemExit (its text starts with `where`) for another mode, and for a text that cannot be used."""
    modes = [mode + shape for mode in OUR_INSTRUCTIONS for shape in ("", *(f"-{shape}" for shape in SHAPES))]
    for mode, text in wording.items():
        if mode not in modes or not isinstance(text, str) or not text.strip():
            raise SystemExit(f"{where}: give MODE=TEXT or MODE=@FILE. MODE is one of {', '.join(modes)}.")
        if token := SPECIAL.search(text):
            raise SystemExit(f"{where}: its text holds the special token {token[0]}. Remove it.")
    return {mode: text.strip() for mode, text in wording.items()}


def instructions_of(model, chosen=()):
    """The INSTRUCTIONS to ask a model with: ours, then those in its folder's instructions.json, then `chosen`, a dict as from
    read_instructions. Prints one line if the model's differ from ours. Raises SystemExit if its file is broken."""
    path, stored = Path(model) / WORDING_FILE, {}
    if path.is_file():
        try:
            stored = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise SystemExit(f"{path} is not a JSON object ({error}). Delete it to ask in this project's wording.") from None
    stored = check_instructions(stored, path)
    other = [mode for mode, text in stored.items() if OUR_INSTRUCTIONS.get(mode) != text]
    if other:
        print_once(f"{path}: this model was trained with its own wording for {', '.join(other)}")
    return OUR_INSTRUCTIONS | stored | dict(chosen)


def use_instructions(model, chosen=()):
    """Ask in the wording of instructions_of from now on, in this process. Returns that wording, a dict."""
    wording = instructions_of(model, chosen)
    INSTRUCTIONS.clear()
    INSTRUCTIONS.update(wording)
    return wording


def has_instruction(prompt, mode):
    """Whether a prompt has the words of an instruction (for answers of any shape)."""
    texts = [text for name, text in INSTRUCTIONS.items() if name.partition("-")[0] == mode]
    return any(all(part.strip() in prompt for part in text.split("{question}")) for text in texts)


def prompt_text(example, mode):
    """The user's text for `example` in one of the modes of INSTRUCTIONS, without the pictures: the question with its options, then
    the instruction; an instruction with "{question}" has them there."""
    question = example.question + ("\nOptions:\n" + "\n".join(example.options) if example.options else "")
    shape = "choice" if example.options else "text" if parse_number(example.answer) is None else "number"
    instruction = (OTHER_WORDING | INSTRUCTIONS).get(f"{mode}-{shape}", INSTRUCTIONS[mode])
    return instruction.replace("{question}", question) if "{question}" in instruction else f"{question}\n{instruction}"


def boxes_text(boxes):
    """Compact JSON of a list of boxes, with the keys in the order of the row: the released files put bbox_2d first, as
    Qwen2.5-VL does; the toy puts label first, so that a name is written before its numbers."""
    return json.dumps(boxes, separators=(",", ":"), ensure_ascii=False)


def picture_text(grids, merge, video, times=()):
    """Placeholder tokens of a scene's pictures: one pad for each merge x merge square of patches.

    grids: (pictures, 3), t, h, w in patches. A video is one grid; its t counts pairs of frames. times: the seconds of each pair
    for a model that reads them (Family.timed); each pair then has its own vision span, and its time as text before it, as in
    transformers 4.57, with which Qwen3-VL was released (5.10 and later put one more span around them all).
    """
    pad = "<|video_pad|>" if video else "<|image_pad|>"
    if times:
        span = f"<|vision_start|>{pad * int(grids[0, 1:].prod() // merge**2)}<|vision_end|>"
        return "".join(f"<{seconds:.1f} seconds>{span}" for seconds in times)
    return "".join(f"<|vision_start|>{pad * int(t * h * w // merge**2)}<|vision_end|>" for t, h, w in grids)


@lru_cache(maxsize=200_000)
def encode_text(tokenizer, text):
    """Token ids of `text`, a tuple. Encoding the pieces of a conversation one by one gives the same ids as encoding the whole:
    they meet at special tokens, or at the line end of BRANCH_END, behind which a completion has no leading whitespace."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode(backbone, ids):
    """The text of a completion, without its end token. Other special tokens stay visible: they must cost the format."""
    ids = ids[:-1] if len(ids) and ids[-1] in backbone.stop else ids
    return backbone.tokenizer.decode(ids, skip_special_tokens=False).strip()


def training_pair(example):
    """What SFT learns from an example: (prompt, completion). The completion is the boxes, the whole solution of a coldstart or
    worked row, or the letter or number, without whitespace around it (see encode_text)."""
    if example.question_type in ("coldstart", "worked"):  # their prompt has the instruction already
        prompt, completion = example.question, example.solution
    elif example.question_type == "locate":
        prompt, completion = prompt_text(example, "locate"), boxes_text(example.answer)
    else:
        prompt, completion = prompt_text(example, "direct"), str(example.answer)
    return prompt + BRANCH_END, completion.strip() + STOP


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


def read_video(path, frames, decode_with=""):
    """At most `frames` pictures of an mp4 at equal steps, the first and the last included, in temporal order. The time of each
    is its info["seconds"].

    decode_with: "decord" or "av"; empty: decord where it is installed (it has no wheels for macOS and ARM), else av.
    Raises SystemExit naming a file that is not a video, has no frames, or was cut.
    """
    decode_with = decode_with or ("decord" if importlib.util.find_spec("decord") else "av")
    with picture_errors(path, "video"):
        if decode_with == "decord":
            import decord  # only mp4 files need it

            reader = decord.VideoReader(str(path))
            picks = frame_picks(len(reader), frames)
            pictures = dict(zip(picks.tolist(), map(Image.fromarray, reader.get_batch(picks).asnumpy())))
            return with_times(pictures, reader.get_avg_fps())
        import av

        with av.open(str(path)) as file:  # first count, without decoding: a video is too large to be kept
            packets = [packet.is_discard for packet in file.demux(video=0) if packet.size]
            stated, count, fps = file.streams.video[0].frames, packets.count(False), float(file.streams.video[0].average_rate)
        pictures, picks = {}, set(frame_picks(count, frames).tolist())
        with av.open(str(path)) as file:
            file.streams.video[0].thread_type = "AUTO"
            for number, frame in enumerate(file.decode(video=0)):
                if number in picks:
                    pictures[number] = frame.to_image().rotate(frame.rotation, expand=True)
        if len(pictures) < len(picks) or len(packets) < stated:
            raise ValueError("frames are missing")
        return with_times(pictures, fps)


def with_times(pictures, fps):
    """The pictures {number of the frame: picture} in order, each with its time, info["seconds"]."""
    for number, picture in pictures.items():
        picture.info["seconds"] = number / fps
    return [pictures[number] for number in sorted(pictures)]


def frame_picks(count, frames):
    """The numbers of at most `frames` of a video's `count` frames, at equal steps: an array."""
    return np.linspace(0, count - 1, min(frames, count)).round().astype(int)


def frame_numbers(paths):
    """The numbers of a video's frames, the last number in each name; none for an mp4. Raises SystemExit if they do not rise."""
    if is_video(paths[0]):
        return []
    numbers = [int((re.findall(r"\d+", Path(path).stem) or [-1])[-1]) for path in paths]
    if numbers[0] < 0 or numbers != sorted(numbers):
        raise SystemExit(
            f"{paths[0]} and the other frames of its video have no rising numbers in their names, from which the times before the "
            "frames are computed. Name each picture by the number of its frame."
        )
    return numbers


def pair_times(paths, pictures, fps):
    """The seconds of each pair of a video's frames, the mean of its two. An odd number of frames repeats the last one.

    An mp4's pictures have their times (read_video); other frames are numbered, `fps` a second.
    """
    times = [number / fps for number in frame_numbers(paths)] or [picture.info["seconds"] for picture in pictures]
    times += times[-1:] * (len(times) % 2)
    return [(first + second) / 2 for first, second in zip(times[::2], times[1::2])]


def picture_patches(processor, images, video=False):
    """Pictures -> patches for the vision tower.

    Returns pixels (patches, channels * 2 * patch size ** 2) float32 and grids (pictures, 3), t, h, w in patches. A video is ONE
    grid: two consecutive frames share a temporal patch, and an odd number of frames repeats the last one.
    """
    if not video:
        out = processor(images=images, return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]
    images = images + images[-1:] * (len(images) % 2)
    out = processor(images=images, return_tensors="pt")
    t, h, w = len(images) // 2, *out["image_grid_thw"][0, 1:].tolist()
    # The processor repeats a still picture in both halves of a temporal patch; take one half from each frame.
    pixels = out["pixel_values"].view(t, 2, h * w, 3, 2, -1)  # (pairs, frame of pair, patches, channels, half, numbers)
    pixels = torch.stack([pixels[:, 0, :, :, 0], pixels[:, 1, :, :, 1]], dim=3)  # (pairs, patches, channels, 2, numbers)
    return pixels.reshape(t * h * w, -1), torch.tensor([[t, h, w]])


def resized_size(processor, width, height):
    """(width, height), multiples of a token's side, to which the processor resizes a picture of width x height pixels."""
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
    """A box in a picture of size source = (width, height) -> whole numbers in one of size target, clipped."""
    (sw, sh), (tw, th) = source, target
    x1, y1, x2, y2 = box
    return [round(min(max(value * t / s, 0), t)) for value, s, t in zip((x1, y1, x2, y2), (sw, sh, sw, sh), (tw, th, tw, th))]


def box_space(backbone, width, height):
    """(width, height) of the space in which the model writes boxes in a picture of width x height pixels: those of the RESIZED
    picture (Qwen2.5-VL), or Family.box_side twice."""
    side = backbone.family.box_side
    return (side, side) if side else resized_size(backbone.processor, width, height)


def boxes_for_model(backbone, example):
    """The boxes of a locate example in the units in which the model was trained (box_space); each side keeps at least one unit.

    Raises SystemExit naming the picture that cannot be read, or the row of a box outside its picture.
    """
    boxes = []
    for box in example.answer:
        path, (x1, y1, x2, y2) = example.images[box.get("picture", 1) - 1], box["bbox_2d"]
        source = picture_size(path)
        target = box_space(backbone, *source)
        if x1 >= source[0] or y1 >= source[1] or x2 <= 0 or y2 <= 0:
            picture = f"{path} ({source[0]} x {source[1]})"
            raise SystemExit(f"{example.id}: {box} lies outside its picture {picture}. Fix or remove the row.")
        x1, y1, x2, y2 = scale_box(box["bbox_2d"], source, target)
        x1, y1 = min(x1, target[0] - 1), min(y1, target[1] - 1)
        boxes.append(box | {"bbox_2d": [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]})
    return boxes


def box_from_model(backbone, box, size):
    """A box as the model writes it -> pixels of the original picture, whose size is (width, height)."""
    return scale_box(box, box_space(backbone, *size), size)


# ------------------------------------------------------------------------------------------------
# 4. Backbone
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """In what a family of models differs from the others. The size of a patch, the size of a head and the number of deepstack
    layers come from the model's own configuration."""

    name: str
    model: type  # transformers' class
    box_side: int | None  # boxes count from 0 to this number along each side of a picture; None: pixels of the RESIZED picture
    timed: bool  # a video's pairs of frames have their times as text; otherwise they have positions in time


FAMILIES = {  # by model_type
    "qwen2_vl": Family("Qwen2-VL", Qwen2VLForConditionalGeneration, 1000, False),  # arXiv 2409.12191
    "qwen2_5_vl": Family("Qwen2.5-VL", Qwen2_5_VLForConditionalGeneration, None, False),  # arXiv 2502.13923
    "qwen3_vl": Family("Qwen3-VL", Qwen3VLForConditionalGeneration, 1000, True),  # arXiv 2511.21631
}


def family_of(config):
    """The Family of a model's configuration. Raises ValueError saying why the model cannot be used."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or []) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"model_type {config.model_type} has layers of {', '.join(sorted(kinds))}. Only full attention keeps the branches of a "
            "packed row apart: the recurrent state of a hybrid model would leak from branch to branch"
        )
    if config.model_type not in FAMILIES:  # transformers would build a 7B model with random weights
        raise ValueError(f"config.json has model_type {config.model_type}; choose from {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]


LOADS = ("fp32", "bf16", "4bit")
# Only the language model: short names such as "q_proj" would also match the MLP of the vision tower.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def load_backbone(path, load="bf16", min_picture_tokens=None, max_picture_tokens=None, device="cpu"):
    """Load a model of one of FAMILIES from a folder or a hub id.

    load: "fp32", "bf16" or "4bit" (nf4; the vision tower and the head stay bf16). A picture's limits default to the folder's own.
    Returns a namespace: model; family; tokenizer; processor (the PIL image processor: the family's own processor needs
    torchvision); stop (ids that end a completion); forbidden (see forbidden_tokens); path; device; frames (taken from an mp4);
    seconds_per_grid (between two temporal patches of a video, for its positions; 1.0 as in Qwen's code); fps (see pair_times);
    cuda_graph and merge_decoding (how branch_generate works: see capture_step and merged_layers).
    Raises SystemExit if the folder has no model, another kind of model or a quantised one, weights are missing, or the
    tokenizer does not fit.
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
        config = AutoConfig.from_pretrained(path)
        family = family_of(config)
        if stored := getattr(config, "quantization_config", None):  # an adapter could not be merged into such weights
            raise SystemExit(
                f"{path} is stored quantised ({stored.get('quant_method')}). Use the folder or hub id of the original model, "
                "and --load 4bit to save memory."
            )
        tokenizer = AutoTokenizer.from_pretrained(path)
        processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        vision = config.vision_config
        if (processor.patch_size, processor.merge_size) != (vision.patch_size, vision.spatial_merge_size):
            raise ValueError(f"its image processor makes patches of {processor.patch_size} pixels, not {vision.patch_size}")
        model, info = family.model.from_pretrained(
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
        names = ", ".join(family.name for family in FAMILIES.values())
        raise SystemExit(f"{path} cannot be loaded as {names} with tokenizer and image processor: {error}") from None
    if load == "4bit":
        for module in model.modules():
            # On CPUs with AVX512-BF16 an eval forward repacks the weights in place, and training after it loses gradients
            # without an error. GRPO samples in eval mode and then trains: forbid the repacking.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    else:
        model.to(device)
    embed_patches_by_matrix(model)
    limit_pictures(processor, min_picture_tokens, max_picture_tokens)
    stop = [tokenizer.convert_tokens_to_ids(token) for token in (STOP, "<|endoftext|>")]
    return SimpleNamespace(
        model=model.eval(), family=family, tokenizer=tokenizer, processor=processor, path=str(path), device=torch.device(device),
        frames=16, stop=stop, forbidden=forbidden_tokens(tokenizer, model, stop).to(device), seconds_per_grid=1.0, fps=30.0,
        cuda_graph=True, merge_decoding=True,
    )  # fmt: skip


def limit_pictures(processor, smallest, largest):
    """Set the limits to which pictures are resized, in tokens, in place. None or 0 leaves the processor's own."""
    for edge, tokens in (("shortest_edge", smallest), ("longest_edge", largest)):
        if tokens:
            processor.size[edge] = tokens * (processor.patch_size * processor.merge_size) ** 2


def forbidden_tokens(tokenizer, model, stop):
    """(V,) bool: tokens that no completion may contain. Those are all special tokens except `stop` (a picture token would break
    the next forward pass, and decoding hides the others from the rewards), and ids that the tokenizer does not know."""
    forbidden = torch.arange(model.lm_head.out_features) >= len(tokenizer)
    forbidden[[number for number, token in tokenizer.added_tokens_decoder.items() if token.special]] = True
    forbidden[stop] = False
    return forbidden


def check_model_folder(path, load):
    """Raise SystemExit if load_backbone cannot work with these arguments."""
    if load not in LOADS:
        raise SystemExit(f"--load {load}: choose from {', '.join(LOADS)}.")
    if (Path(path) / "adapter_config.json").is_file():
        raise SystemExit(f"{path} is a LoRA adapter, not a model. Use the folder model/ beside it, where the adapter is merged.")
    is_hub_id = re.fullmatch(r"(?!runs/)\w[\w.-]*/[\w.-]+", str(path)) and not Path(path).exists()
    if not is_hub_id and not has_model(path):
        raise SystemExit(
            f"{path} has no model (config.json or *.safetensors is missing). Run the stage before this one, or set --model."
        )


def has_model(folder):
    """Whether a folder has a model's configuration and weights."""
    return (Path(folder) / "config.json").is_file() and any(Path(folder).glob("*.safetensors"))


def embed_patches_by_matrix(model):
    """Compute the vision tower's patch embedding as a matrix product, in place: the stride of its convolution equals its
    kernel, so the two are the same, and Conv3d took a third of the toy tower's time on a CPU."""
    patch = model.model.visual.patch_embed
    patch.forward = lambda pixels: F.linear(pixels.to(patch.proj.weight.dtype), patch.proj.weight.flatten(1), patch.proj.bias)


def unwrap(model):
    """The transformers model inside a PEFT wrapper. Its LoRA layers stay in place: they run either way."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapt(backbone, settings):
    """Make the backbone trainable, in place: see `tune`, `lora_rank`, `lora_alpha`, `train_vision`, `checkpointing`,
    `seconds_per_grid`, `fps` and `cuda_graph` of TrainSettings. A vision tower that is not trained stays frozen and runs under
    no_grad, storing nothing."""
    model, backbone.seconds_per_grid, backbone.cuda_graph = backbone.model, settings.seconds_per_grid, settings.cuda_graph
    backbone.fps = settings.fps
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


# ------------------------------------------------------------------------------------------------
# 5. Branches: encode a scene once, branch its questions
# ------------------------------------------------------------------------------------------------


@dataclass
class Prefix:
    """What all branches of a scene share: system prompt, pictures, and (in a rollout) the question."""

    ids: torch.Tensor  # (P,) token ids, one pad token for each picture token
    positions: torch.Tensor  # (3, P) M-RoPE positions: time, height, width
    features: torch.Tensor | None  # (picture tokens, width) from the vision tower
    next_position: int  # of the text behind it: the largest position + 1
    name: str = ""  # ids of the scene's examples, for messages
    deepstack: tuple = ()  # Qwen3-VL: features like `features`, one for each of the first layers of the language model


def scene_patches(backbone, scene):
    """Read the pictures of a scene: (pixels, grids) as in picture_patches, and the times of picture_text; or None if the scene
    is encoded already."""
    if scene.encoded is not None:
        return None
    if is_video(scene.images[0]):
        pictures = read_video(scene.images[0], backbone.frames)
    else:
        pictures = [load_image(path) for path in scene.images]
    video = scene.data_type == "video"
    times = pair_times(scene.images, pictures, backbone.fps) if video and backbone.family.timed else ()
    return *picture_patches(backbone.processor, pictures, video), times


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
        pixels = torch.cat([pixels for pixels, *_ in patches]).to(backbone.device, model.visual.dtype)
        grids = torch.cat([grids for _, grids, _ in patches]).to(backbone.device)
        with contextlib.nullcontext() if trained and torch.is_grad_enabled() else torch.no_grad():
            seen = model.visual(pixels, grid_thw=grids)
        features = [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])]  # each (all picture tokens, width)
        counts = [int(g.prod(-1).sum()) // merge**2 for _, g, _ in patches]
        parts = zip(*(feature.split(counts) for feature in features))
        for scene, (_, grids, times), (part, *deepstack) in zip(fresh, patches, parts):
            video = scene.data_type == "video"
            ids = torch.tensor(encode_text(backbone.tokenizer, PREFIX_START + picture_text(grids, merge, video, times)))  # (P,)
            per_second = getattr(model.config.vision_config, "tokens_per_second", None)
            rate = per_second * backbone.seconds_per_grid if per_second else 1  # Qwen2-VL counts pairs of frames
            spans = torch.tensor([[1, *grids[0, 1:].tolist()]] * len(times)) if times else grids  # with times, each pair is one
            positions = mrope_positions(picture_mask(backbone, ids), spans, merge, rate)  # (3, P)
            name = ", ".join(example.id for example in scene.examples) or scene.images[0]
            following = int(positions.max()) + 1
            ids, positions = ids.to(backbone.device), positions.to(backbone.device)
            prefixes[id(scene)] = Prefix(ids, positions, part, following, name, tuple(deepstack))
            if keep:
                scene.encoded = prefixes[id(scene)]
    return [scene.encoded or prefixes[id(scene)] for scene in scenes]


def picture_mask(backbone, ids):
    """Which of the token ids are pads of pictures or videos, bool of the same shape."""
    config = unwrap(backbone.model).config
    return (ids == config.image_token_id) | (ids == config.video_token_id)


def mrope_positions(is_picture, grids, merge, rate):
    """M-RoPE positions of a row of text and pictures (Qwen2.5-VL, arXiv 2502.13923, section 2.1; how they become angles differs
    between families, inside the model).

    is_picture (T,) bool, True at picture tokens. grids (pictures, 3): t, h, w in patches. rate: positions between two time
    steps of a video. A text token has the same position three times. The tokens of a picture have their time step, row and
    column, counted from the position after the text before it. What follows starts at the LARGEST position so far + 1, as in
    Qwen's own code; transformers 5 starts after the picture's last token, which differs for videos.
    Returns (3, T), long: time, height, width.
    """
    parts, start, grids = [], 0, iter(grids.tolist())
    kinds, counts = torch.unique_consecutive(is_picture, return_counts=True)
    for picture, count in zip(kinds.tolist(), counts.tolist()):
        if picture:
            t, h, w = next(grids)
            part = torch.cartesian_prod(torch.arange(t), torch.arange(h // merge), torch.arange(w // merge)).T  # (3, count)
            part = torch.stack([(part[0] * rate).long(), part[1], part[2]])
        else:
            part = torch.arange(count).expand(3, -1)
        parts.append(start + part)
        start = int(parts[-1].max()) + 1
    return torch.cat(parts, dim=1)


def text_positions(start, count, device):
    """Positions (3, count) of text: counted from `start`, equal in all three rows."""
    return torch.arange(start, start + count, device=device).expand(3, -1)


def extend_prefix(prefix, ids):
    """The prefix followed by the text tokens `ids`, a new Prefix."""
    after = text_positions(prefix.next_position, len(ids), prefix.ids.device)
    positions = torch.cat([prefix.positions, after], dim=1)  # (3, P + text)
    ids = torch.cat([prefix.ids, prefix.ids.new_tensor(ids)])
    return Prefix(ids, positions, prefix.features, prefix.next_position + after.shape[1], prefix.name, prefix.deepstack)


def check_lengths(backbone, prefixes, lengths):
    """Raise SystemExit if a prefix and one of its branches exceed the model's context. lengths: B lists of token counts."""
    limit = unwrap(backbone.model).config.text_config.max_position_embeddings
    for prefix, group in zip(prefixes, lengths):
        if (tokens := len(prefix.ids) + max(group, default=0)) > limit:
            raise SystemExit(
                f"{tokens:,} tokens exceed the model's context of {limit:,}. Lower --max_picture_tokens (or --max_new_tokens), or "
                f"remove the question, one of: {prefix.name}."
            )


def embed(backbone, ids, features=()):
    """Word embeddings of ids (any shape), with the picture tokens replaced by `features` (list of tensors) in order."""
    out = unwrap(backbone.model).get_input_embeddings()(ids)  # (..., width)
    return out.masked_scatter(picture_mask(backbone, ids)[..., None], torch.cat(features).to(out.dtype)) if features else out


BUCKETS = 4  # of branches with about the same length


def pack_layout(prefixes, branches, device, slots=0):
    """Where each token of a packed row is. The row holds all prefixes, then all branches, without padding.

    prefixes: B lengths; branches: B lists of lengths, N in all. Returns a namespace: prefix (B, P), the place in the row of every
    padded slot (padding points at place 0); buckets, for n branches of similar length each: their slots (n, C), the prefix of each
    (n,), and what they attend to (n, 1, C, P + C); sees (N, P), the tokens of a branch's prefix; unpad (T,), the padded slot of
    every token of the row; starts and ends, N integers each: the place of a branch's first and of its prefix's last token.
    slots: if not 0, branch_attention stores keys and values in `cache`, with room for so many tokens of each branch; there is one
    bucket then.
    """
    owner = np.repeat(np.arange(len(prefixes)), [len(lengths) for lengths in branches])  # (N,)
    prefixes, lengths = np.array(prefixes), np.array([n for lengths in branches for n in lengths], int)  # (B,), (N,)
    ends = np.cumsum(np.concatenate([prefixes, lengths]))  # (B + N,) behind the last token of each part
    starts, prefix_ends, unpad = ends[len(prefixes) :] - lengths, ends[: len(prefixes)], np.zeros(ends[-1], int)
    slots_before = 0

    def grid(starts, lengths):  # -> places (n, longest), and which of them are no padding
        nonlocal slots_before
        valid = np.arange(lengths.max(initial=0)) < lengths[:, None]
        places = (starts[:, None] + np.arange(valid.shape[1])) * valid
        unpad[places[valid]] = slots_before + np.flatnonzero(valid)
        slots_before += valid.size
        return torch.tensor(places, device=device), torch.tensor(valid, device=device)

    prefix, valid = grid(prefix_ends - prefixes, prefixes)
    sees = valid[torch.tensor(owner, device=device)]  # (N, P)
    buckets = []
    count = min(BUCKETS, len(lengths)) or 1
    for rows in [np.arange(len(lengths))] if slots else np.array_split(lengths.argsort(kind="stable"), count):
        branch, _ = grid(starts[rows], lengths[rows])  # (n, C)
        own = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=device).tril()  # (C, C)
        seen = sees[torch.tensor(rows, device=device)]  # (n, P)
        mask = torch.cat([seen[:, None].expand(-1, len(own), -1), own.expand(len(rows), -1, -1)], dim=-1)[:, None]
        buckets.append((branch, torch.tensor(owner[rows], device=device), mask))
    return SimpleNamespace(
        prefix=prefix, buckets=buckets, sees=sees, unpad=torch.tensor(unpad, device=device), starts=starts.tolist(),
        ends=(prefix_ends - 1)[owner].tolist(), slots=slots, cache=[],
    )  # fmt: skip


def packed_forward(backbone, embeds, positions, layout, deepstack=()):
    """The language model's layers. embeds (rows, tokens, width), positions (3, rows, tokens) -> hidden (rows, tokens, width).

    layout: a packed row (pack_layout), rows = 1; or one new token for each branch (see branch_generate), rows = N, tokens = 1.
    deepstack: like embeds, one for each of the first layers, added to its output.
    """
    language = unwrap(backbone.model).model.language_model
    angles, hidden = language.rotary_emb(embeds, positions), embeds
    for number, layer in enumerate(language.layers):
        hidden = layer(hidden, position_embeddings=angles, layout=layout)
        if number < len(deepstack):
            hidden = hidden + deepstack[number]
    return language.norm(hidden)


def branch_attention(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """Attention of a packed row: prefixes attend causally, a branch attends to its prefix and to itself.

    query (1, heads, T, D), key and value (1, kv heads, T, D) -> (1, T, heads, D). The cost is B prefixes of P x P / 2 and N
    branches of C x (P + C); a dense 4-D mask would cost T x T. Without a layout this is transformers' sdpa.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if hasattr(layout, "slot"):
        return step_attention(query, key, value, scaling, layout, *layout.cache[module.layer_idx]), None

    def pad(packed, slots):  # (1, H, T, D) -> (rows, H, longest, D); index_select has the fast backward
        rows = packed[0].transpose(0, 1).index_select(0, slots.flatten())  # (rows * longest, H, D)
        return rows.unflatten(0, slots.shape).transpose(1, 2)

    def attend(query, key, value, **how):
        return F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=query.shape[1] > key.shape[1], **how)

    prefix_key, prefix_value = pad(key, layout.prefix), pad(value, layout.prefix)  # (B, kv heads, P, D)
    out = [attend(pad(query, layout.prefix), prefix_key, prefix_value, is_causal=True)]
    for branch, owner, mask in layout.buckets:
        own_key, own_value = pad(key, branch), pad(value, branch)  # (n, kv heads, C, D)
        if layout.slots:
            room = [F.pad(part, (0, 0, 0, layout.slots - part.shape[2])) for part in (own_key, own_value)]  # (N, kv, slots, D)
            layout.cache.append((prefix_key, prefix_value, *room))
        if not branch.numel():  # a rollout's branches are empty
            continue
        branch_key = torch.cat([prefix_key.index_select(0, owner), own_key], dim=2)  # (n, kv heads, P + C, D)
        branch_value = torch.cat([prefix_value.index_select(0, owner), own_value], dim=2)
        if query.is_cuda:  # a mask with grouped heads would leave only the kernel that writes all scores to memory
            groups = query.shape[1] // key.shape[1]
            branch_key, branch_value = (part.repeat_interleave(groups, dim=1) for part in (branch_key, branch_value))
        out.append(attend(pad(query, branch), branch_key, branch_value, attn_mask=mask))
    out = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in out])  # (padded slots, heads, D)
    return out.index_select(0, layout.unpad)[None], None


def step_attention(query, key, value, scaling, state, prefix_key, prefix_value, own_key, own_value):
    """Attention of one new token of each branch: to its prefix, whose keys all its branches share, and to its own tokens.

    query (N, heads, 1, D), key and value (N, kv heads, 1, D) -> (N, 1, heads, D). Stores key and value in the branch's slot.
    """
    kv, width = key.shape[1], state.width
    own_key[state.rows, :, state.slot], own_value[state.rows, :, state.slot] = key[:, :, 0], value[:, :, 0]
    own_key, own_value = own_key[:, :, :width], own_value[:, :, :width]  # (N, kv, width, D)
    query = (query[:, :, 0] * scaling).unflatten(1, (kv, -1))  # (N, kv, heads of a kv head, D)

    def gather(x):  # (N, kv, heads, n) -> (B, kv, G * heads, n): the branches of a prefix as one matrix
        x = x[state.grid] if state.ragged else x.unflatten(0, state.grid.shape)  # (B, G, kv, heads, n)
        return x.transpose(1, 2).flatten(2, 3)

    def scatter(x):  # and back
        x = x.unflatten(2, (state.grid.shape[1], -1)).transpose(1, 2).flatten(0, 1)  # (B * G, kv, heads, n)
        return x[state.place] if state.ragged else x

    scores = torch.cat([scatter(gather(query) @ prefix_key.mT), query @ own_key.mT], dim=-1)  # (N, kv, heads, P + width)
    weights = (scores.float() + state.mask).softmax(-1).to(value.dtype)
    shared, own = weights.split([prefix_key.shape[2], width], dim=-1)
    return (scatter(gather(shared) @ prefix_value) + own @ own_value).flatten(1, 2)[:, None]


AttentionInterface.register("branches", branch_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("branches", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
LOGITS_AT_ONCE = 1024  # tokens: each has 152,000 logits


def packed_row(backbone, prefixes, branches, slots=0):
    """Run all prefixes and then all branches (B lists of lists of ids, N in all) as one row: (hidden (T, width), layout)."""
    device, flat = backbone.device, [branch for group in branches for branch in group]
    layout = pack_layout([len(prefix.ids) for prefix in prefixes], [list(map(len, group)) for group in branches], device, slots)
    owners = [prefix for prefix, group in zip(prefixes, branches) for _ in group]
    after = [text_positions(prefix.next_position, len(branch), device) for prefix, branch in zip(owners, flat)]
    words = torch.tensor([token for branch in flat for token in branch], dtype=torch.long, device=device)
    ids = torch.cat([*(prefix.ids for prefix in prefixes), words])  # (T,)
    positions = torch.cat([*(prefix.positions for prefix in prefixes), *after], dim=1)  # (3, T)
    seen = [prefix for prefix in prefixes if prefix.features is not None]
    embeds = embed(backbone, ids, [prefix.features for prefix in seen])[None]  # (1, T, width)
    deepstack = [torch.zeros_like(embeds).masked_scatter(picture_mask(backbone, ids)[:, None], torch.cat(part).to(embeds.dtype))
                 for part in zip(*(prefix.deepstack for prefix in seen))]  # fmt: skip
    return packed_forward(backbone, embeds, positions[:, None], layout, deepstack)[0], layout


def branch_logprobs(backbone, prefixes, branches, temperature=None, chunk=LOGITS_AT_ONCE):
    """Log-probability of every completion token, with each prefix encoded once.

    prefixes: B Prefix. branches: B lists of (prompt ids, completion ids), N in all; a prompt may be empty.
    Returns logps (N, C), zero at padding; entropy (N, C) in nats, without gradient, zero for SFT; mask (N, C), True at completion
    tokens. Equal to separate rows [prefix + prompt + completion], at the cost of P + sum(branch) tokens instead of
    N * P + sum(branch). Logits are computed at completion tokens only, `chunk` at a time.
    temperature: of the distribution that branch_generate samples from with it, in which forbidden tokens have no probability (for
    GRPO: sampler and scorer must be one distribution). None, for SFT: of the model's own distribution, forbidden tokens left in,
    so that the saved model learns to avoid them by itself.
    """
    model, device = unwrap(backbone.model), backbone.device
    flat = [branch for group in branches for branch in group]
    check_lengths(backbone, prefixes, [[len(prompt) + len(text) for prompt, text in group] for group in branches])
    hidden, layout = packed_row(backbone, prefixes, [[[*prompt, *text] for prompt, text in group] for group in branches])

    # Token t of a branch is predicted at token t - 1; its first token is predicted at the last token of the prefix.
    sources = []
    for start, end, (prompt, text) in zip(layout.starts, layout.ends, flat):
        first = start + len(prompt)  # of the completion
        sources += [first - 1 if prompt else end, *range(first, first + len(text) - 1)]
    sources = torch.tensor(sources, device=device)
    targets = torch.tensor([token for _, text in flat for token in text], device=device)

    def score(hidden, targets):  # (n, width), (n,) -> (n,), (n,)
        logits = model.lm_head(hidden).float()  # (n, V)
        if temperature:
            logits = logits.masked_fill_(backbone.forbidden, -torch.inf) / temperature
        logps = logits.log_softmax(-1)
        entropy = torch.special.entr(logps.detach().exp()).sum(-1) if temperature else torch.zeros_like(logps[:, 0])
        return logps.gather(-1, targets[:, None])[:, 0], entropy

    parts = []
    for rows, wanted in zip(hidden.index_select(0, sources).split(chunk), targets.split(chunk)):
        if len(targets) > chunk and torch.is_grad_enabled():  # store hidden states, not logits, for the backward pass
            parts.append(torch.utils.checkpoint.checkpoint(score, rows, wanted, use_reentrant=False))
        else:
            parts.append(score(rows, wanted))
    lengths = [len(text) for _, text in flat]
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]  # (N, C)
    zeros = torch.zeros(mask.shape, device=device)
    logps, entropy = (zeros.masked_scatter(mask, torch.cat(column)) for column in zip(*parts))
    return logps, entropy, mask


@torch.no_grad()
def row_logprobs(backbone, prefix, completion):
    """Log-probabilities (C,) of a completion under the sampler, from a plain causal row [prefix + completion], to check
    branch_logprobs."""
    hidden, _ = packed_row(backbone, [extend_prefix(prefix, completion)], [[[]]])
    logits = unwrap(backbone.model).lm_head(hidden[-len(completion) - 1 : -1]).float()  # (C, V)
    logps = logits.masked_fill(backbone.forbidden, -torch.inf).log_softmax(-1)
    return logps.gather(-1, torch.tensor(completion, device=backbone.device)[:, None])[:, 0]


@contextlib.contextmanager
def merged_layers(backbone):
    """Inside, every adapted layer computes with one matrix in the model's dtype, its own weights plus the adapter's.

    For decoding: an adapter costs more launches than arithmetic at one token, and 4-bit weights would be dequantised again at
    every token. The matrices are a copy (5.6 GB for the 3B model in bf16), freed at the end.
    """
    layers = [module for module in backbone.model.modules() if hasattr(module, "lora_A")] if backbone.merge_decoding else []
    for layer in layers:
        weight = dequantize_module_weight(layer.base_layer)
        weight = (weight + layer.get_delta_weight("default")).to(unwrap(backbone.model).dtype)
        layer.forward = partial(F.linear, weight=weight, bias=layer.base_layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.no_grad()
def branch_generate(backbone, prefixes, branches, max_new_tokens, temperature=0.0):
    """Complete every branch, with each prefix encoded and its keys and values stored once.

    prefixes: B Prefix. branches: B lists of prompt ids, N in all; a prompt may be empty (in a rollout the prefix has the
    question). temperature 0 is greedy; above 0 samples from the model's own distribution (no top-k, top-p or penalty: sampler
    and scorer must be one distribution).
    Returns B lists of completion ids, with the end token where it was reached.
    Raises FloatingPointError, naming the scene, if the model's output is not finite.
    Runs in eval mode. On a GPU the step is captured as a CUDA graph (backbone.cuda_graph), and the host looks at finished
    rows every 16 tokens; on a CPU it looks at every token.
    """
    check_lengths(backbone, prefixes, [[len(prompt) + max_new_tokens for prompt in group] for group in branches])
    was_training = backbone.model.training
    backbone.model.eval()
    with merged_layers(backbone):
        completions = decode_rows(backbone, prefixes, branches, max_new_tokens, temperature)
    backbone.model.train(was_training)
    grouped = iter(completions)
    return [[next(grouped) for _ in group] for group in branches]


def decode_rows(backbone, prefixes, branches, max_new_tokens, temperature):
    """branch_generate, without its checks: a list of N completions."""
    state = start_decoding(backbone, prefixes, branches, max_new_tokens, temperature)
    rows = [(prefix, []) for prefix, group in zip(prefixes, branches) for _ in group]  # of state: (prefix, completion)
    completions, gpu, replay, captured = [ids for _, ids in rows], backbone.device.type == "cuda", None, 0
    longest = max(len(prompt) for group in branches for prompt in group)
    for count in range(1, max_new_tokens + 1):  # tokens so far
        if not gpu or count % 16 == 0 or count == max_new_tokens:  # look at them, which waits for a GPU
            left = collect_tokens(state, rows, count, backbone.stop, 0.5 if gpu else 0.75)
            rows, replay = left, replay if left is rows else None
        if count == max_new_tokens or not rows:
            break
        # Slots that no row has reached yet are not read. On a GPU the width rises in large steps: each needs a new graph.
        state.width = longest + count if not gpu else min(longest + max_new_tokens, -(-(longest + count) // 256) * 256)
        if replay and state.width == captured:
            replay()
        else:
            decode_step(backbone, state)
            captured, replay = state.width, capture_step(backbone, state) if gpu and backbone.cuda_graph else None
    return completions


@dataclass
class DecodeState:
    """What decode_step reads and changes in place. N rows, each with its own number of tokens; B prefixes."""

    cache: list  # for each layer: keys and values of the prefixes (B, kv heads, P, D) and of the rows (N, kv heads, slots, D)
    sees: torch.Tensor  # (N, P) True at the tokens of a row's prefix
    token: torch.Tensor  # (N,) the last token
    slot: torch.Tensor  # (N,) where its key and value go
    position: torch.Tensor  # (N,)
    tokens: torch.Tensor  # (N, max_new_tokens) all new tokens
    count: torch.Tensor  # (1,) how many there are
    done: torch.Tensor  # (N,) True after an end token; what follows it is ignored
    bad: torch.Tensor  # (N,) True if the logits were not finite
    stop: torch.Tensor  # end tokens
    temperature: float
    width: int = 0  # slots that are read
    owners: np.ndarray = None  # (N,) the prefix of each row
    grid: torch.Tensor = None  # (B, G) the rows of each prefix, padded with row 0
    place: torch.Tensor = None  # (N,) where each row is in the grid
    rows: torch.Tensor = None  # (N,) 0, 1, 2, ...
    ragged: bool = False  # whether the prefixes have unequal numbers of rows
    mask: torch.Tensor = None  # (N, 1, 1, P + width) 0 where a row attends, else -inf


def start_decoding(backbone, prefixes, branches, max_new_tokens, temperature):
    """Run prefixes and prompts, and sample the first token of each branch: a DecodeState."""
    device, prompts = backbone.device, [prompt for group in branches for prompt in group]
    slots = max(map(len, prompts)) + max_new_tokens
    hidden, layout = packed_row(backbone, prefixes, branches, slots)
    owners = [row for row, group in enumerate(branches) for _ in group]
    following = [prefixes[row].next_position + len(prompt) for row, prompt in zip(owners, prompts)]
    like = {"dtype": torch.long, "device": device}
    state = DecodeState(
        cache=layout.cache, sees=layout.sees, token=torch.zeros(len(prompts), **like),
        slot=torch.tensor([len(prompt) for prompt in prompts], **like), position=torch.tensor(following, **like),
        tokens=torch.zeros(len(prompts), max_new_tokens, **like), count=torch.zeros(1, **like),
        done=torch.zeros(len(prompts), dtype=torch.bool, device=device),
        bad=torch.zeros(len(prompts), dtype=torch.bool, device=device), stop=torch.tensor(backbone.stop, **like),
        temperature=temperature,
    )  # fmt: skip
    group_rows(state, owners, device)
    last = [start + len(prompt) - 1 if prompt else end for start, end, prompt in zip(layout.starts, layout.ends, prompts)]
    sample_tokens(backbone, state, hidden.index_select(0, torch.tensor(last, device=device)))  # predicted at the last token
    return state


def group_rows(state, owners, device):
    """Set owners, grid, place and rows of a DecodeState. owners: the prefix of each row, ascending."""
    owners = np.array(owners)
    counts = np.bincount(owners)  # (B,)
    within = np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]  # (N,) number of a row among its siblings
    grid, rows = np.zeros((len(counts), counts.max()), int), np.arange(len(owners))
    grid[owners, within] = rows
    place = owners * grid.shape[1] + within
    state.owners, state.ragged = owners, grid.size > len(owners)
    state.grid, state.place, state.rows = (torch.tensor(x, device=device) for x in (grid, place, rows))


def keep_rows(state, live):
    """Drop all rows but `live` (a list of row numbers), and the prefixes that no row needs any more."""
    used, owners = np.unique(state.owners[live], return_inverse=True)
    live, used = (torch.tensor(x, device=state.slot.device) for x in (live, used))
    for name in ("token", "slot", "position", "done", "bad", "tokens", "sees"):
        setattr(state, name, getattr(state, name).index_select(0, live))
    prefixes = len(state.cache[0][0])
    for layer, (*shared, own_key, own_value) in enumerate(state.cache):
        shared = shared if len(used) == prefixes else [part.index_select(0, used) for part in shared]
        state.cache[layer] = (*shared, own_key.index_select(0, live), own_value.index_select(0, live))
    group_rows(state, owners, live.device)


def decode_step(backbone, state):
    """Run the model on the last token of every row and sample the next one. Nothing in it waits for the device."""
    own = torch.arange(state.width, device=state.slot.device) <= state.slot[:, None]  # (N, width)
    mask = torch.cat([state.sees, own], dim=1)[:, None, None]  # (N, 1, 1, P + width)
    state.mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    positions = state.position.expand(3, 1, -1).transpose(1, 2)  # (3, N, 1)
    hidden = packed_forward(backbone, embed(backbone, state.token[:, None]), positions, state)[:, 0]  # (N, width)
    state.slot += 1
    state.position += 1
    sample_tokens(backbone, state, hidden)


def capture_step(backbone, state):
    """Record decode_step as a CUDA graph: a function that replays it without launching its kernels one by one; None where
    that is not possible."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records, and runs nothing
            decode_step(backbone, state)
    except RuntimeError as error:
        print0(f"decoding without a CUDA graph, which is slower: {str(error).splitlines()[0]}")
        backbone.cuda_graph = False
        return None
    return graph.replay


def sample_tokens(backbone, state, hidden):
    """Sample a token for each row from the hidden states (N, width) of its last one, and store it."""
    logits = unwrap(backbone.model).lm_head(hidden).float().masked_fill_(backbone.forbidden, -torch.inf)  # (N, V)
    state.bad |= ~(logits.amax(-1).isfinite() | state.done)
    if state.temperature == 0:
        token = logits.argmax(-1)  # (N,)
    else:  # as torch.multinomial does it, without its check, for which the host would wait
        chance = (logits / state.temperature).softmax(-1)
        token = (chance / torch.empty_like(chance).exponential_()).argmax(-1)
    state.token.copy_(token)
    state.tokens.index_copy_(1, state.count, token[:, None])
    state.count += 1
    state.done |= (token[:, None] == state.stop).any(1)


def collect_tokens(state, rows, count, stop, share):
    """Read the `count` tokens of each row, and drop the rows that have ended once at most `share` of them go on.

    rows: [(prefix, completion ids)], in the order of the state's; their ids are extended. Returns the rows that are left.
    """
    done, bad = state.done.tolist(), state.bad.tolist()
    if any(bad):
        prefix, ids = rows[bad.index(True)]
        raise FloatingPointError(
            f"the model's output is not finite (after {len(ids)} or more tokens of an answer to {prefix.name})"
        )
    read = max(len(ids) for _, ids in rows)
    for (_, ids), tokens in zip(rows, state.tokens[:, read:count].tolist()):
        if not (ids and ids[-1] in stop):
            end = next((place for place, token in enumerate(tokens, 1) if token in stop), len(tokens))
            ids += tokens[:end]
    live = [row for row, ended in enumerate(done) if not ended]
    if len(live) > share * len(rows):
        return rows
    if live:
        keep_rows(state, live)
    return [rows[row] for row in live]


# ------------------------------------------------------------------------------------------------
# 6. Scoring
# ------------------------------------------------------------------------------------------------

INSIDE = r"(?:(?!</?think>|</?answer>).)*"
FORMAT = re.compile(rf"\s*<think>{INSIDE}</think>\s*<answer>{INSIDE}</answer>\s*", re.DOTALL)
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
WORDS = {word: number for number, word in enumerate((ONES + " nineteen").split())}
for _tens, _word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2):
    WORDS |= {_word: 10 * _tens} | {f"{_word}-{one}": 10 * _tens + n for n, one in enumerate(ONES.split()[1:10], 1)}
LATEX = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
LEAD = re.compile(r"(?:(?:the |my )?(?:final |correct )?(?:answer|option|choice)(?: is)?(?:\s*:\s*|\s+))*", re.IGNORECASE)
CHOICE = re.compile(r"\(?([A-Za-z])\)?[.:)]*(?: (.*))?")
DIGITS = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3})?"
SPELLED = "|".join(sorted(WORDS, key=len, reverse=True)).replace("-", "[- ]")
UNIT = r"(?: ?(?:sq )?(?:c?m|sqm|(?:centi)?met(?:er|re)s?)(?: ?\^ ?2|2|\u00b2)?)?"
NUMBER = re.compile(
    rf"(?:(?:about|approximately|around|roughly) |[~\u2248] ?)?({DIGITS}|{SPELLED}){UNIT}((?: [a-z][a-z'-]+(?:\(s\))?){{0,2}})\.?"
)
CHANGING = set(WORDS) | set(  # behind a number: they change it, deny it, or are units that no question asks for
    "or and to than of point over times by plus minus not no hundred thousand million billion dozen half third thirds quarter "
    "quarters percent mm millimeter millimeters millimetre millimetres km kilometer kilometers kilometre kilometres ft foot feet "
    "inch inches yard yards mile miles".split()
)
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # (10,) of mean relative accuracy


def extract_answer(text):
    """The text in the LAST <answer> block, or the whole text if there is none; stripped."""
    text = text or ""
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))  # of the last block that is closed
    return (text[start + len("<answer>") : text.index("</answer>", start)] if start >= 0 else text).strip()


@lru_cache(maxsize=1024)
def bare_answer(text):
    """A short answer on one line, without "The answer is:", Markdown's ** and ``, and LaTeX's $, \\( \\), \\boxed{}, \\text{}."""
    text = re.sub(r"(?<!\d)\*\*|\*\*(?!\d)", "", text).replace("^{2}", "^2")  # ** but not that of 5**6
    for _ in range(3):  # \boxed{\text{B}}: from the inside to the outside
        text = LATEX.sub(r" \1 ", text)
    text = " ".join(re.sub(r"\$|\\[,()\[\]]", " ", text).split()).strip("*_` ")
    return text[LEAD.match(text).end() :]


def parse_choice(text, options):
    """The letter of the one option that a short answer names, or None.

    Read are the letter ("B", "b.", "(B)"), the option's words ("right"), both ("B. right", "(B) right"), and each of them in
    what bare_answer removes ("The answer is: B", "**B**", "\\boxed{B}"). No option or several ("A or B") are None.
    """
    text = bare_answer(text)
    words = {option[0].upper(): bare_answer(option[1:].lstrip(".): ")).lower().rstrip(".") for option in options}
    named = CHOICE.fullmatch(text)
    letter = named[1].upper() if named else None
    if letter in words and bare_answer(named[2] or "").lower().rstrip(".") in ("", words[letter]):
        return letter
    matches = [letter for letter, option in words.items() if option and text.lower().rstrip(".") == option]
    return matches[0] if len(matches) == 1 else None


def parse_number(text):
    """The number in a short answer, a float, or None.

    Read are digits ("1,200", "-3", "2.5e0") and words ("two"), also behind "about", with a unit ("2.5 m", "2.5 m^2", "116 cm")
    or one or two words after it ("4 chairs"), and in what bare_answer removes ("The answer is: 4", "\\boxed{2.5}"). The unit
    is not converted: "2.5 cm" is 2.5. Several numbers ("2 or 3", "4 chairs or 5"), words that change a number ("4 dozen"),
    units that no question asks for ("8 feet"), nan, inf and text without a number are None.
    """
    found = NUMBER.fullmatch(bare_answer(str(text)).lower())
    if not found or CHANGING & set(found[2].split()):
        return None
    digits = found[1].replace(" ", "-")
    value = float(WORDS.get(digits, digits.replace(",", "")))
    return value if math.isfinite(value) else None


def parse_boxes(text):
    """A JSON list of {"bbox_2d", "label"} as a list, also inside a ```json fence; None if the text is anything else."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].removeprefix("json")
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
    """For each wanted box, the first unused predicted box with its label in its picture, or an empty box: a list of (4,)."""

    def name(box):
        """What must agree: the label and the number of the picture."""
        return box["label"].strip().lower(), box.get("picture", 1)

    left, out = list(predicted or []), []
    for box in wanted:
        found = next((p for p in left if name(p) == name(box)), None)
        if found:
            left.remove(found)
        out.append(found["bbox_2d"] if found else [0, 0, 0, 0])
    return out


def score_answers(texts, examples):
    """Score N completions at once: the accuracy reward of stage 3 and the metric of eval.py.

    examples: N Example (locate: with boxes in the pixels that the model sees). The text in the last <answer> block, or the
    whole text without one, is read by parse_choice, parse_number or parse_boxes; their docstrings say what they accept.
    Choices score 0 or 1, numbers their mean relative accuracy, boxes their mean IoU, where a box too many counts as a miss. Where
    the true answer is a text, the same text scores 1, in upper or lower case.
    Returns scores (N,) float64 and legal (N,) bool: whether the answer is one of the options, a number, a text, or boxes.
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
        elif (truth := number(str(example.answer))) is None:
            said, wanted = (bare_answer(text).casefold().rstrip(". ") for text in (answer, str(example.answer)))
            scores[row], legal[row] = said == wanted, said != ""
        else:
            value = number(answer)
            legal[row] = value is not None
            numbers.append((row, math.nan if value is None else value, truth))
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
