"""What does it save to encode a scene once and branch the questions? Prints a table, and a JSON line last.

    python tests/bench_branches.py              # some minutes on one CPU core, 5 million random weights
    python tests/bench_branches.py --prefix 1024 --completion 64     # one cell of the table

Each line compares this repository with what transformers does for separate rows, on the same weights and the same tokens,
alternating in one run; the ratio is the median of the pairs. P: tokens of the shared prefix (a picture), C: tokens of each
question with its answer.

sft          nine questions about a picture: forward and backward, against a padded batch of nine rows
update       GRPO, eight completions of one prompt: forward and backward, against a batch of eight rows
rollout      sampling eight completions, against generate(num_return_sequences=8)
eval         18 questions about the same pictures, 16 new tokens each, against generate for one at a time
overhead     our forward and backward over a plain causal one of as many tokens (language model only)
difference   largest difference of a log-probability between the two ways, float32
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from support import toy_world

PAIRS, NEW_TOKENS = 3, 16


def build(folder):
    """A Qwen2.5-VL of about five million random weights, saved as a plain folder and loaded as a backbone."""
    texts = [*common.INSTRUCTIONS.values(), common.SYSTEM, "system user assistant"] * 3
    tokenizer = toy_world.build_tokenizer(texts)
    config = toy_world.build_model(tokenizer, 0).config
    config.text_config.update({"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2})
    config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]
    config.vision_config.update({"hidden_size": 128, "out_hidden_size": 256, "intermediate_size": 384,
                                 "fullatt_block_indexes": [2]})  # windows in the others, as in the real tower (4 of its 32 see all)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    for part in (model, tokenizer, Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=2048 * 28 * 28)):
        part.save_pretrained(folder)
    backbone = common.load_backbone(folder, "fp32")
    backbone.model.model.visual.requires_grad_(False)
    backbone.stop = [-1]  # random weights must not end early: all ways write the same number of tokens
    return backbone


def picture(folder, tokens, side=28):
    """A picture that becomes about `tokens` tokens of side x side pixels."""
    height = round(tokens**0.5)
    rng, path = np.random.default_rng(0), folder / f"{tokens}.png"
    Image.fromarray(rng.integers(0, 256, (side * height, side * (tokens // height), 3), dtype=np.uint8)).save(path)
    return str(path)


def rows_of(backbone, scene, branches):
    """The inputs of transformers' own forward for separate rows [prefix + branch], padded on the right; lengths (N,)."""
    prefix = common.encode_scenes(backbone, [scene])[0].ids.tolist()
    ids = [prefix + list(branch) for branch in branches]
    width = max(map(len, ids))
    lengths = torch.tensor([len(row) for row in ids])
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    pixels, grid, _ = common.scene_patches(backbone, scene)
    inputs = {
        "input_ids": tokens, "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        "mm_token_type_ids": (tokens == backbone.model.config.image_token_id).int(),
        "pixel_values": pixels.repeat(len(ids), 1), "image_grid_thw": grid.repeat(len(ids), 1),
    }  # fmt: skip
    return inputs, len(prefix)


def plain_logprobs(backbone, inputs, start):
    """Log-probabilities (N, C) of the tokens from `start` on, by transformers' forward of separate rows."""
    logits = backbone.model(**inputs).logits[:, start - 1 : -1].float().log_softmax(-1)  # (N, C, V)
    return logits.gather(-1, inputs["input_ids"][:, start:, None])[..., 0]


def timed(function):
    """Seconds of a call, and what it returns."""
    began = time.perf_counter()
    out = function()
    return time.perf_counter() - began, out


def ratio(ours, theirs):
    """Median of theirs / ours over alternating pairs, after one warm-up of each."""
    ours(), theirs()
    pairs = [(timed(ours)[0], timed(theirs)[0]) for _ in range(PAIRS)]
    return statistics.median(slow / fast for fast, slow in pairs)


def learn(backbone, logps):
    """A backward pass, and the gradients thrown away."""
    (-logps.mean()).backward()
    backbone.model.zero_grad(set_to_none=True)


def measure(backbone, folder, prefix_tokens, completion):
    """All ratios for one P and C: a dict."""
    path = picture(folder, prefix_tokens - 16)
    scene = common.Scene((path,), "single_image", [])
    rng = np.random.default_rng(1)
    vocabulary = list(range(len(toy_world.SPECIAL), len(backbone.tokenizer)))  # words, no picture tokens

    def words(n):
        return rng.choice(vocabulary, n).tolist()

    def ours(branches):  # the picture is encoded each time, as in training without remembered features
        return common.branch_logprobs(backbone, common.encode_scenes(backbone, [scene]), [[([], b) for b in branches]])[0]

    out = {"P": prefix_tokens, "C": completion}
    for name, count in (("sft", 9), ("update", 8)):
        branches = [words(completion) for _ in range(count)]
        inputs, start = rows_of(backbone, scene, branches)
        with torch.no_grad():
            out["difference"] = (ours(branches) - plain_logprobs(backbone, inputs, start)).abs().max().item()
        backbone.model.train()
        out[name] = ratio(
            lambda b=branches: learn(backbone, ours(b)),
            lambda i=inputs, s=start: learn(backbone, plain_logprobs(backbone, i, s)),
        )
        backbone.model.eval()
    embeds = torch.randn(1, start + 8 * completion, backbone.model.config.text_config.hidden_size)
    prefix = common.encode_scenes(backbone, [scene])

    def causal():
        hidden = backbone.model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -8 * completion :]
        logits = backbone.model.lm_head(hidden)
        learn(backbone, -F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none"))

    groups = [[([], branch) for branch in branches]]
    out["overhead"] = 1 / ratio(lambda: learn(backbone, common.branch_logprobs(backbone, prefix, groups)[0]), causal)

    end = list(common.encode_text(backbone.tokenizer, common.BRANCH_END))
    one, _ = rows_of(backbone, scene, [end])
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": -1, "pad_token_id": 0,
                "suppress_tokens": backbone.forbidden.nonzero()[:, 0].tolist()}  # fmt: skip
    out["rollout"] = ratio(
        lambda: common.branch_generate(backbone, common.encode_scenes(backbone, [scene]), [[end] * 8], completion, 1.0),
        lambda: backbone.model.generate(
            **one, num_return_sequences=8, max_new_tokens=completion, min_new_tokens=completion, **sampling
        ),
    )
    asked = [words(16) for _ in range(18)]
    alone = [rows_of(backbone, scene, [question])[0] for question in asked]

    def one_at_a_time():
        for inputs in alone:
            backbone.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                                    eos_token_id=-1, pad_token_id=0)  # fmt: skip

    out["eval"] = ratio(
        lambda: common.branch_generate(backbone, common.encode_scenes(backbone, [scene]), [asked], NEW_TOKENS), one_at_a_time
    )
    return out


def main():
    """Measure every cell and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--completion", type=int, nargs="+", default=[64, 256])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    backbone = build(folder)
    parameters = sum(p.numel() for p in backbone.model.parameters())
    names = ["sft", "update", "rollout", "eval", "overhead"]
    print(f"{parameters / 1e6:.1f} M parameters\n    P    C  " + "".join(f"{name:>10}" for name in names) + "  difference")
    cells = []
    for prefix in asked.prefix:
        for completion in asked.completion:
            cell = measure(backbone, folder, prefix, completion)
            numbers = "".join(f"{cell[name]:10.2f}" for name in names)
            print(f"{prefix:5}{completion:5}  {numbers}  {cell['difference']:.1e}", flush=True)
            cells.append(cell)
    last = cells[-1] if len(cells) == 1 else next((c for c in cells if (c["P"], c["C"]) == (1024, 64)), cells[-1])
    print(json.dumps({
        "P": last["P"], "C": last["C"], "sft_speedup": last["sft"], "grpo_update_speedup": last["update"],
        "rollout_speedup": last["rollout"], "eval_speedup": last["eval"], "overhead": last["overhead"],
        "max_logprob_diff": max(cell["difference"] for cell in cells), "cells": cells,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
