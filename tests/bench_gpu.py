"""Do the three stages fit a 24 GB card, and how fast are they? Five steps of each. Prints a table, and a JSON line last.

    python tests/bench_gpu.py                       # a GPU; Qwen2.5-VL-3B's true shape with random weights (8 GB of disk)
    python tests/bench_gpu.py --shape qwen3-2b      # or qwen3-4b: those of Qwen3-VL
    python tests/bench_gpu.py --shape tiny --load fp32 --steps 2 --new_tokens 8    # on a CPU: shows only that it runs

The scripts themselves run, with --preset 3b, for each of --load (LoRA on bf16 and on 4-bit weights), with the card's memory
capped at --cap GB. Pictures are noise of 640 x 480 pixels: stage 1 one picture, stage 2 a video of 16 frames with nine
questions, stage 3 eight questions about such videos, eight completions each. Rewards are drawn, since random weights earn none.

estimated    GB that the memory line announced before training
peak         GB that torch allocated at most; reserved: what its allocator held for it (fragments included)
seconds      of a step, median without the first
rollout      tokens a second written by stage 3, all completions together
update       tokens a second learnt from (shared prefixes counted once), scoring by policy and reference included
mfu          model FLOPs of the update over the card's peak in bf16 (dense), in percent: 2 x parameters x tokens forward, as many
             backward (the weights are frozen); neither attention nor what checkpointing computes twice is counted
hours        of the paper's epoch of stage 3: 2,585 steps of 8 prompts x 8 completions as long as here

Then a rollout of eight for one prompt of a thousand tokens: milliseconds a token (of all eight rows; picture and prompt not
counted) and tokens a second, for our captured and our eager step, transformers' generate, and its generate with a static cache
(which transformers compiles, with CUDA graphs, on a GPU). limit: the time in which the card can read the weights once.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
from pathlib import Path

import bench_branches  # finds the repository, too
import numpy as np
import torch
from PIL import Image

import common
import stage1_localize
import stage2_understand
import stage3_grpo
from support import memory, runs, toy_world

TEXT = {"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "max_position_embeddings": 128_000, "initializer_range": 0.02,
        "layer_types": ["full_attention"] * 36}  # fmt: skip
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
          "fullatt_block_indexes": [7, 15, 23, 31], "initializer_range": 0.02}  # fmt: skip
TEXT3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262_144,
         "initializer_range": 0.02}  # fmt: skip
VISION3 = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "num_position_embeddings": 2304,
           "deepstack_visual_indexes": [5, 11, 17], "initializer_range": 0.02}  # fmt: skip
SHAPES = {  # family, text, how its positions become angles, vision
    "3b": ("qwen2_5_vl", TEXT, {"rope_theta": 1e6, "mrope_section": [16, 24, 24]}, VISION),
    "qwen3-2b": ("qwen3_vl", TEXT3 | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                                      "num_attention_heads": 16}, {"rope_theta": 5e6, "mrope_section": [24, 20, 20]},
                 VISION3 | {"out_hidden_size": 2048}),
    "qwen3-4b": ("qwen3_vl", TEXT3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                                      "num_attention_heads": 32}, {"rope_theta": 5e6, "mrope_section": [24, 20, 20]},
                 VISION3 | {"out_hidden_size": 2560}),
    "tiny": ("qwen2_5_vl", {}, {}, {}), "qwen3-tiny": ("qwen3_vl", {}, {}, {}),
}  # fmt: skip
PEAKS = {"3090": 71, "4090": 165, "5090": 210, "L4": 121, "A100": 312, "A10": 125, "H100": 989, "H200": 989}  # TFLOP/s
BANDWIDTH = {"3090": 936, "4090": 1008, "5090": 1792, "L4": 300, "A100": 1555, "A10": 600, "H100": 3350, "H200": 4800}  # GB/s
QUESTIONS = 9
EPOCH = 2585  # steps of stage 3 in the paper


def build(folder, shape, device):
    """A model with random weights and our small tokenizer, in `folder`."""
    tokenizer = toy_world.build_tokenizer([*common.INSTRUCTIONS.values(), common.SYSTEM, "system user assistant chair"] * 3)
    family, text, angles, vision = SHAPES[shape]
    config = toy_world.build_model(tokenizer, 0, family).config
    config.text_config.update(text)
    config.text_config.rope_parameters.update(angles)
    config.vision_config.update(vision)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = common.FAMILIES[family].model(config)
    torch.set_default_dtype(torch.float32)
    processor = toy_world.build_processor(model)
    common.limit_pictures(processor, 4, 1280)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder / "model")


def write_data(folder, scenes=16):
    """Rows in the released schema: `scenes` pictures to locate in, as many videos with nine questions, and no traces."""
    rng = np.random.default_rng(0)
    located, spatial = [], []
    for scene in range(scenes):
        names = [f"scene{scene:02}/{frame}.jpg" for frame in range(16)]
        (folder / "images" / f"scene{scene:02}").mkdir(parents=True)
        for name in names:
            Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(folder / "images" / name)
        box = {"bbox_2d": [10, 20, 300, 200], "label": "chair"}
        located.append({"question": "Locate the chair.", "answer": [box], "image": names[:1], "data_type": "single_image"})
        for question in range(QUESTIONS):
            spatial.append({"question": f"{question}: how many chairs are in this room?", "options": None, "answer": "3",
                            "question_type": "object count", "image": names, "data_type": "video"})  # fmt: skip
    for kind, rows in (("locate", located), ("spatial", spatial)):
        (folder / common.FILES[kind]).write_text("".join(json.dumps(row) + "\n" for row in rows))


def stage(module, folder, load, asked):
    """Run a stage's own main for some steps. Returns its figures: a dict."""
    name = module.__name__.split("_")[0]
    out = folder / load / name
    flags = {
        "preset": "3b", "model": folder / "model", "data": folder, "out": out, "load": load, "max_steps": asked.steps, "steps": 100,
        "processes": 1, "eval_scenes": 1, "eval_every": 10**9,
    }  # fmt: skip
    if name == "stage3":
        flags |= {"max_new_tokens": asked.new_tokens}
        (out.parent / "coldstart").mkdir()  # none is needed here: random weights earn nothing anyway
        (out.parent / "coldstart" / "model").symlink_to(folder / "model")
    tokens, peaks, score, budget = {"forward": 0, "learnt": 0}, [], common.branch_logprobs, memory.memory_budget

    def counting(backbone, prefixes, branches, temperature=None):
        count = sum(len(p.ids) for p in prefixes) + sum(len(p) + len(c) for group in branches for p, c in group)
        tokens["forward"] += count
        tokens["learnt"] += count * torch.is_grad_enabled()
        return score(backbone, prefixes, branches, temperature)

    def noting(backbone, *largest):
        tokens["parameters"] = sum(p.numel() for p in common.unwrap(backbone.model).model.language_model.layers.parameters())
        if load == "4bit":
            tokens["parameters"] *= 2  # two in a byte
        peaks.append(budget(backbone, *largest)[1])
        return budget(backbone, *largest)

    on_gpu = torch.cuda.is_available()
    common.branch_logprobs, memory.memory_budget, runs.Run.finish = counting, noting, lambda *_: None
    stage3_grpo.rewards = lambda texts, *_: {"accuracy": np.random.default_rng(len(texts)).random(len(texts))}
    sys.argv = [name, *[str(word) for key, value in flags.items() for word in (f"--{key}", value)]]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        module.main()
    finally:
        common.branch_logprobs, memory.memory_budget = score, budget
    rows = common.read_jsonl(out / "metrics.jsonl")
    figures = {"stage": name, "load": load, "estimated": peaks[0] / 1e9}
    if on_gpu:
        figures |= {"peak": torch.cuda.max_memory_allocated() / 1e9, "reserved": torch.cuda.max_memory_reserved() / 1e9}
    gc.collect()
    torch.cuda.empty_cache()
    updates = [row.get("update_seconds", row["seconds"]) for row in rows[1:]]
    writing = [row["rollout_seconds"] for row in rows[1:] if "rollout_seconds" in row]
    figures["seconds"] = statistics.median(updates) + (statistics.median(writing) if writing else 0)
    figures["update"] = tokens["learnt"] / len(rows) / statistics.median(updates)
    if writing:
        completions = stage3_grpo.PRESETS["3b"]["train_batch"] * stage3_grpo.PRESETS["3b"]["group_size"]
        figures["rollout"] = rows[-1]["completion_tokens"] * completions / statistics.median(writing)
        figures["hours"] = EPOCH * figures["seconds"] / 3600
    if peak := of_card(PEAKS):
        flops = 2 * tokens["parameters"] * (tokens["forward"] + tokens["learnt"]) / len(rows)
        figures["mfu"] = 100 * flops / statistics.median(updates) / (peak * 1e12)
    return figures


def of_card(figures):
    """The figure of this machine's card, or None."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((value for card, value in figures.items() if card in name), None)


def rollouts(folder, load, asked, device):
    """A rollout of eight for one prompt: {way: {"ms": a token, "tokens": a second}}, and "limit", the ms to read the weights."""
    backbone = common.load_backbone(folder / "model", load, device=device)
    backbone.stop = [-1]  # nobody ends early
    side = backbone.processor.patch_size * backbone.processor.merge_size
    scene = common.Scene((bench_branches.picture(folder, 1000, side),), "single_image", [])
    end = list(common.encode_text(backbone.tokenizer, common.BRANCH_END))
    inputs = {name: tensor.to(device) for name, tensor in bench_branches.rows_of(backbone, scene, [end])[0].items()}
    count = min(asked.new_tokens, 256)
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": -1, "pad_token_id": 0,
                "num_return_sequences": 8}  # fmt: skip

    def ours(count, cuda_graph):
        backbone.cuda_graph = cuda_graph
        common.branch_generate(backbone, common.encode_scenes(backbone, [scene]), [[end] * 8], count, 1.0)

    def generate(count, **how):
        backbone.model.generate(**inputs, **sampling, **how, max_new_tokens=count, min_new_tokens=count)

    ways = {"captured": lambda n: ours(n, True)} if device != "cpu" else {}
    ways |= {"eager": lambda n: ours(n, False), "generate": generate}
    ways["static"] = lambda n: generate(n, cache_implementation="static")
    speeds = {}
    for name, way in ways.items():
        def seconds(n, way=way):
            way(n)  # the warm-up, in which the static one is compiled
            return bench_branches.timed(lambda: [way(n), device == "cpu" or torch.cuda.synchronize()])[0]

        one, all_of_them = seconds(1), seconds(count)
        speeds[name] = {"ms": 1e3 * (all_of_them - one) / (count - 1), "tokens": 8 * count / all_of_them}
    model = backbone.model
    weights = sum(p.numel() * p.element_size() for p in [*model.model.language_model.layers.parameters(), model.lm_head.weight])
    if bandwidth := of_card(BANDWIDTH):
        speeds["limit"] = {"ms": weights / bandwidth / 1e6}
    return speeds


def main():
    """Build, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--load", nargs="+", default=["bf16", "4bit"])
    parser.add_argument("--cap", type=float, default=24.0, help="GB of the card that may be used")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=1024)
    asked = parser.parse_args()
    device = runs.device()
    if device == "cpu" and "tiny" not in asked.shape:
        raise SystemExit("There is no GPU here. --shape tiny runs the same on a CPU, which shows only that it runs.")
    if device != "cpu":
        torch.cuda.set_per_process_memory_fraction(min(1.0, asked.cap * 1e9 / torch.cuda.get_device_properties(0).total_memory))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(folder, asked.shape, device)
        write_data(folder)
        lines = []
        for load in asked.load:
            lines += [stage(module, folder, load, asked) for module in (stage1_localize, stage2_understand, stage3_grpo)]
        speeds = {load: rollouts(folder, load, asked, device) for load in asked.load}
    names = ["stage", "load", "estimated", "peak", "reserved", "seconds", "rollout", "update", "mfu", "hours"]
    print("".join(f"{name:>10}" for name in names))
    for line in lines:
        cells = [line.get(name, "-") for name in names]
        print("".join(f"{cell:10.2f}" if isinstance(cell, float) else f"{cell:>10}" for cell in cells))
    for load, ways in speeds.items():
        for way, figures in ways.items():
            print(f"{load} {way:>9}" + "".join(f"{value:10.2f} {name}" for name, value in figures.items()))
    print(json.dumps({
        "device": torch.cuda.get_device_name() if device != "cpu" else "CPU", "shape": asked.shape, "cap": asked.cap,
        "torch": torch.__version__, "stages": lines, "generation": speeds,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
