"""Files and model folders: written whole or not at all."""

import contextlib
import copy
import json
import re
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

import common

SHARD = 10**9  # bytes of a weights file that merge_into_files writes


@contextlib.contextmanager
def disk_errors(path):
    """Make an OSError name a file: `path`, if it names none (the error of a full disk does not)."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from None
    except OSError as error:
        name = error.filename2 or error.filename or str(path)  # of two, the one that is written
        raise OSError(error.errno, error.strerror or str(error), name) from None


def write_atomic(path, text):
    """Write a text file under another name, then rename it: the file at `path` is whole at any moment."""
    new = Path(path).with_name(f"{Path(path).name}.new")
    with disk_errors(path):
        new.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on all systems
        new.replace(path)


def save_model(backbone, folder):
    """Merge the adapter and write `folder`/model, a plain Hugging Face folder, and before it `folder`/adapter."""
    folder, model = Path(folder), backbone.model
    if isinstance(model, PeftModel):
        with whole_folder(folder / "adapter") as new:
            model.save_pretrained(new)
    with whole_folder(folder / "model") as new:
        if getattr(common.unwrap(model), "is_loaded_in_4bit", False):
            merge_into_files(backbone, new)
        else:
            (model.merge_and_unload() if isinstance(model, PeftModel) else model).save_pretrained(new)
        backbone.tokenizer.save_pretrained(new)
        backbone.processor.save_pretrained(new)
        write_older_names(common.unwrap(model).config.tie_word_embeddings, new)
        write_atomic(new / common.WORDING_FILE, json.dumps(common.INSTRUCTIONS, indent=2))


def write_older_names(tied, folder):
    """Write what transformers 4.57 reads under other names into a model folder, too. Without it that version opens the folder with
    an untied head, the wrong rotary embedding and its own pixel limits, mostly without an error. tied: whether the head is."""

    def change(name, function):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        function(values)
        write_atomic(folder / name, json.dumps(values, indent=2) + "\n")

    def model(config):
        text = config["text_config"]
        rope = {name: value for name, value in text["rope_parameters"].items() if name != "type"}
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
        text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}

    def pictures(config):
        config |= {"min_pixels": config["size"]["shortest_edge"], "max_pixels": config["size"]["longest_edge"]}

    def tokenizer(config):
        if config["tokenizer_class"] == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")

    change("config.json", model)
    change("preprocessor_config.json", pictures)
    change("tokenizer_config.json", tokenizer)


def merge_into_files(backbone, folder):
    """Write the stored bf16 model plus the adapter of a 4-bit one to `folder`. Weights go from file to file, SHARD bytes at a
    time, so that no second model is in memory. The sum is computed in float32, never from the 4-bit weights."""
    source = Path(cached_file(backbone.path, "config.json")).parent  # the folder, also of a hub id
    adapted = {re.sub(r".*(layers\.)", r"\1", name): module
               for name, module in backbone.model.named_modules() if hasattr(module, "lora_A")}  # fmt: skip
    places, shard = {}, {}

    def write():
        name = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                weight = file.get_tensor(name)
                # The names in files start in several ways ("model.", "model.language_model."), those of the layers end alike.
                if module := adapted.pop(re.sub(r".*(layers\..*)\.weight", r"\1", name), None):
                    weight = weight.float() + module.get_delta_weight("default").float().cpu()
                if sum(weight.nbytes for weight in shard.values()) >= SHARD:
                    write()
                shard[name] = weight.to(torch.bfloat16)
    write()
    if adapted:
        raise SystemExit(f"{source} has no weights for {next(iter(adapted))}: the adapter cannot be merged. It is saved.")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config = copy.deepcopy(common.unwrap(backbone.model).config)
    del config.quantization_config
    config.save_pretrained(folder)
    common.unwrap(backbone.model).generation_config.save_pretrained(folder)


@contextlib.contextmanager
def whole_folder(path):
    """Give the name of a new folder to write to; in the end it takes the place of `path`. A stop at any moment leaves the old
    folder, the new one or none under that name, but never a part of one."""
    new = path.with_name(f"{path.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    remove_folder(path)
    new.replace(path)


def remove_folder(path):
    """Remove a folder, if it exists. It loses its name first, so that a stop leaves no part of it under that name."""
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.replace(old)
        shutil.rmtree(old, ignore_errors=True)
