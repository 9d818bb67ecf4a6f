"""How much faster are 18 questions about a video when they are answered together than one at a time? Prints a JSON line last.

    python tests/bench_eval.py           # half a minute on one CPU core, a tiny model with random weights

Same weights, same questions, same greedy answers, alternating in one run. The video is read from disk each time it is needed:
once for all its questions, or once a question.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from support import runs, toy_world

QUESTIONS, FRAMES, SIDE, NEW_TOKENS, PAIRS = 18, 16, 168, 16, 3


def main():
    """Build the model and the video, then time both ways."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    texts = [*common.INSTRUCTIONS.values(), common.SYSTEM, "system user assistant", "How many chairs are in this room? 0123456789"]
    tokenizer = toy_world.build_tokenizer(texts * 3)
    model = toy_world.build_model(tokenizer, seed=0)
    for part in (model, tokenizer, Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=SIDE * SIDE)):
        part.save_pretrained(folder / "model")
    backbone = common.load_backbone(folder / "model", "fp32")
    rng, frames = np.random.default_rng(0), []
    for number in range(FRAMES):
        frames.append(str(folder / f"{number}.png"))
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(frames[-1])
    questions = [
        common.Example(str(i), tuple(frames), "video", "object count", f"How many chairs are in this room? {i}", None, "2")
        for i in range(QUESTIONS)
    ]

    def answer(groups):
        """Seconds and texts of answering groups of questions, each group with one reading of the video."""
        began, texts = time.perf_counter(), []
        for group in groups:
            scene = common.Scene(tuple(frames), "video", group)
            for _, answers in runs.answer_batches(backbone, [scene], "direct", NEW_TOKENS):
                texts += answers[0]
        return time.perf_counter() - began, texts

    together, apart = [questions], [[question] for question in questions]
    answer(together)  # warm up
    times = []
    for _ in range(PAIRS):
        (fast, one), (slow, other) = answer(together), answer(apart)
        assert one == other, "the two ways must give the same answers"
        times.append((fast, slow))
        print(f"together {QUESTIONS / fast:.1f} questions a second, one at a time {QUESTIONS / slow:.1f}")
    speedup = statistics.median(slow / fast for fast, slow in times)
    tokens = int(len(common.encode_scenes(backbone, [common.Scene(tuple(frames), "video", [])])[0].ids))
    facts = {"eval_speedup": round(speedup, 2), "questions": QUESTIONS, "prefix_tokens": tokens, "new_tokens": NEW_TOKENS}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
