"""Does a long run leak? 2,000 GRPO steps of a tiny model. Prints a JSON line last, and fails if something grows.

    python tests/soak.py                # about half an hour on one CPU core
    python tests/soak.py --steps 200    # a first look

Stage 3's own loop runs, with checkpoints and curves, on questions about pictures that are read anew at each step. The resident
memory, the open files and the seconds of a step are noted at every step; the first tenth (after 60 steps of warm-up) is compared
with the last: memory within 3 %, not a file more, and a step as fast.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import stage3_grpo
from support import runs, toy_world

WARM_UP = 60  # behind the first checkpoint and its curves


def build(folder):
    """A tiny model, and twelve pictures with a question each: the prompts."""
    tokenizer = toy_world.build_tokenizer([*common.INSTRUCTIONS.values(), common.SYSTEM, "system user assistant chair"] * 3)
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)
    for part in (toy_world.build_model(tokenizer, 0), tokenizer, processor):
        part.save_pretrained(folder / "model")
    prompts = []
    for number in range(12):
        path = folder / f"{number}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(path)
        example = common.Example(str(number), (str(path),), "single_image", "object count", "How many chairs?", None, "1")
        prompts.append((common.Scene((str(path),), "single_image", [example]), example))
    return prompts


def main():
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    process, notes = psutil.Process(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prompts = build(folder)
        settings = stage3_grpo.GRPOSettings(
            load="fp32", train_batch=4, group_size=4, max_new_tokens=16, steps=steps, save_every=50, eval_every=10**9,
            out=str(folder),
        )
        backbone = common.load_backbone(folder / "model", "fp32")
        common.adapt(backbone, settings)
        rng = np.random.default_rng(0)
        stage3_grpo.rewards = lambda texts, *_: {"accuracy": rng.random(len(texts))}  # random weights earn none
        log = runs.Run.log

        def noting(run, row, *args):
            notes.append((process.memory_info().rss, process.num_fds(), row["rollout_seconds"] + row["update_seconds"]))
            log(run, row, *args)

        runs.Run.log, common.print0 = noting, lambda text: None
        stage3_grpo.grpo(backbone, prompts, [], [], settings, runs.Run(settings, {}))
    tenth = max(1, (steps - WARM_UP) // 10)
    first, last = ([statistics.median(column) for column in zip(*part)] for part in (notes[WARM_UP:][:tenth], notes[-tenth:]))
    growth = 100 * (last[0] / first[0] - 1)
    out = {
        "steps": steps, "memory_mb": [round(first[0] / 1e6, 1), round(last[0] / 1e6, 1)], "memory_growth_percent": round(growth, 2),
        "open_files": [first[1], last[1]], "seconds_a_step": [round(first[2], 3), round(last[2], 3)],
    }  # fmt: skip
    print(json.dumps(out))
    if growth > 3 or last[1] > first[1] or last[2] > 1.25 * first[2]:
        raise SystemExit("Something grows.")


if __name__ == "__main__":
    main()
