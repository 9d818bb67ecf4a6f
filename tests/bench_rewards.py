"""How fast is score_answers, the accuracy reward? Prints where its time goes, and a JSON line last.

    python tests/bench_rewards.py          # seconds on one CPU core

16,384 completions (letters, numbers, boxes, and junk) are scored at once, and one by one in a plain loop that is written
here from the definitions; the two must agree. The ratio is the median of alternating pairs, for all and for each kind.
The loop parses every answer; score_answers parses each distinct one once. Boxes gain least: each is its own JSON.
"""

import cProfile
import json
import pstats
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

COUNT, PAIRS = 16_384, 5
DIRECTIONS = ["A. left", "B. right", "C. front", "D. back"]


def cases(rng):
    """COUNT texts and examples: a third each of choices, numbers and boxes; some answers are junk."""
    texts, examples = [], []
    for _ in range(COUNT):
        kind = rng.choice(["relative direction", "object size", "locate"])
        if kind == "relative direction":
            answer, options = rng.choice("ABCD"), DIRECTIONS
            said = rng.choice([rng.choice("ABCD"), f"({rng.choice('ABCD')})", "left", "A or B", ""])
        elif kind == "object size":
            answer, options = str(rng.randint(20, 200)), None
            said = rng.choice([str(rng.randint(20, 200)), f"{rng.randint(20, 200)} cm", "two", "1,200", "about it"])
        else:
            corners = sorted(rng.sample(range(100), 2)), sorted(rng.sample(range(100), 2))
            answer = [{"bbox_2d": [corners[0][0], corners[1][0], corners[0][1], corners[1][1]], "label": "chair"}]
            moved = [value + rng.randint(0, 9) for value in answer[0]["bbox_2d"]]
            said, options = common.boxes_text([{"bbox_2d": moved, "label": rng.choice(["chair", "table"])}]), None
        texts.append(said if kind == "locate" else f"<think> so </think><answer>{said}</answer>")
        examples.append(common.Example("", (), "single_image", kind, "", options, answer))
    return texts, examples


def plain(texts, examples):
    """The same scores, one completion at a time and one threshold at a time."""
    scores = []
    for text, example in zip(texts, examples):
        answer = common.extract_answer(text)
        if example.question_type == "locate":
            predicted = common.parse_boxes(answer) or []
            total = 0.0
            for p, wanted in zip(common.match_boxes(predicted, example.answer), example.answer):
                (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = p, wanted["bbox_2d"]
                overlap = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
                union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap
                total += overlap / max(union, 1e-9)
            scores.append(total / max(len(predicted), len(example.answer)))
        elif example.options:
            scores.append(float(common.parse_choice(answer, example.options) == example.answer))
        else:
            number, truth = common.parse_number(answer), float(example.answer)
            met = [number is not None and abs(number - truth) / truth <= 1 - theta for theta in np.linspace(0.5, 0.95, 10)]
            scores.append(float(np.mean(met)))
    return np.array(scores)


def measure(texts, examples):
    """Median seconds of score_answers, and median of (seconds of the loop / seconds of score_answers)."""
    pairs = []
    for _ in range(PAIRS):
        times = []
        for function in (common.score_answers, plain):
            began = time.perf_counter()
            function(texts, examples)
            times.append(time.perf_counter() - began)
        pairs.append(times)
    return statistics.median(fast for fast, _ in pairs), statistics.median(slow / fast for fast, slow in pairs)


def main():
    """Check, profile, time."""
    texts, examples = cases(random.Random(0))
    assert np.allclose(common.score_answers(texts, examples)[0], plain(texts, examples), atol=1e-12)
    profile = cProfile.Profile()
    profile.runcall(common.score_answers, texts, examples)
    pstats.Stats(profile).sort_stats("tottime").print_stats(8)
    seconds, speedup = measure(texts, examples)
    by_kind = {}
    for kind in ("relative direction", "object size", "locate"):
        some = [(text, example) for text, example in zip(texts, examples) if example.question_type == kind]
        by_kind[kind] = round(measure(*zip(*some))[1], 2)
    print(json.dumps({"completions": COUNT, "microseconds_each": round(1e6 * seconds / COUNT, 2),
                      "speedup": round(speedup, 2), "speedup_by_kind": by_kind}))  # fmt: skip


if __name__ == "__main__":
    main()
