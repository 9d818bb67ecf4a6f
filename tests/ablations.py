"""Which rung carries how much? Every arm leaves something out of the toy's ladder and gets its seconds elsewhere.

    python tests/ablations.py --seeds 3              # all arms; rerun the command to resume it
    python tests/ablations.py --seeds 1 --scale 0.25 # a quarter of the steps

Needs the toy's data and base (python stage0_data.py). The full ladder of a seed comes first; the median seconds of its steps are
the price of a step. An arm that leaves a part out spends that part's seconds on more steps of another part (see ARMS), so that
all arms of a seed cost the same. Parts that two arms share are trained once.

Writes --out (one folder a seed and arm), tests/results/ablations.csv (one line a seed and arm, as soon as it is there) and, from
that file, ablations.txt (means and spreads) and ablations.png beside it.
"""

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import eval as evaluation  # noqa: E402
import stage1_localize  # noqa: E402
import stage2_understand  # noqa: E402
import stage3_grpo  # noqa: E402
from support import report, runs  # noqa: E402

PARTS = {  # part: its script, what it runs, its settings
    "stage1": (stage1_localize, stage1_localize.work, stage1_localize.LocalizeSettings),
    "stage2": (stage2_understand, stage2_understand.work, stage2_understand.UnderstandSettings),
    "coldstart": (stage3_grpo, stage3_grpo.cold_start, stage3_grpo.GRPOSettings),
    "stage3": (stage3_grpo, stage3_grpo.work, stage3_grpo.GRPOSettings),
}
# arm: (its parts in order, what gets the seconds of the missing parts, further flags of that part, how it is scored)
ARMS = {
    "full": (("stage1", "stage2", "coldstart", "stage3"), None, "", "think"),
    "without stage 1": (("stage2", "coldstart", "stage3"), "stage2", "", "think"),
    "without stage 2": (("stage1", "coldstart", "stage3"), "stage3", "", "think"),
    "without cold start": (("stage1", "stage2", "stage3"), "stage3", "--cold_start false", "think"),
    "without GRPO": (("stage1", "stage2", "coldstart"), "coldstart", "--cold_format 1.1", "think"),
    "without thinking": (("stage1", "stage2"), "stage2", "--worked 0 --direct 1", "direct"),
    "direct RL from stage 1": (("stage1", "stage3"), "stage3", "--cold_start false", "think"),
}
COLUMNS = ["scale", "seed", "arm", "steps", "seconds", "iou", "acc50", "skill", "greedy", "sampled", "format", "given_format"]


def settings_of(part, folder, model, seed, flags):
    """The settings of a part that starts from `model` and writes `folder`."""
    script, _, cls = PARTS[part]
    argv = ["--model", str(model), "--out", str(folder), "--seed", str(seed), *flags.split()]
    return runs.parse_settings(cls, script.PRESETS, part, argv=argv)


def planned_steps(part, scale):
    """The steps of a part in the full ladder."""
    preset = PARTS[part][0].PRESETS["toy"]
    return max(4, round(scale * preset["cold_steps" if part == "coldstart" else "steps"]))


def train(part, folder, model, seed, steps, flags=""):
    """Train a part unless it is finished. Returns (its model's folder, how many steps it took, the median seconds of a step)."""
    name = "--cold_steps" if part == "coldstart" else "--steps"
    out = folder.parent / "stage3" if part == "coldstart" else folder  # stage 3 finds its cold start beside its own folder
    settings = settings_of(part, out, model, seed, f"{name} {steps} {flags}")
    runs.launch(PARTS[part][1], settings, graceful=True)
    seconds = [row["seconds"] for row in common.read_jsonl(folder / "metrics.jsonl")]
    return folder / "model", len(seconds), statistics.median(seconds)


def run_arm(arm, seed, out, scale, prices):
    """Train and score one arm. prices: {part: (steps, seconds a step)} of the full ladder; filled by the arm "full". Returns its
    row of the table."""
    parts, richer, flags, mode = ARMS[arm]
    model, folder, taken, spent = Path("runs/toy/base/model"), out / f"seed{seed}" / arm.replace(" ", "_"), [], 0.0
    same, start = True, model  # same: so far this arm is the full ladder
    for part in parts:
        steps, here = planned_steps(part, scale), folder
        same = same and part != richer and part == ARMS["full"][0][len(taken)]
        if same:
            here = out / f"seed{seed}" / "full"
        elif part == richer:
            missing = sum(count * price for name, (count, price) in prices.items() if name not in parts)
            steps = prices[part][0] + round(missing / prices[part][1])
        extra = f"--cold_steps {planned_steps('coldstart', scale)}" if part == "stage3" else ""
        # Stage 3 finds the finished cold start beside its folder, and is given the model from which that was made.
        start = start if part == "stage3" and "coldstart" in parts else model
        model, count, price = train(part, here / part, start, seed, steps, f"{extra} {flags if part == richer else ''}")
        if arm == "full":
            prices[part] = count, price
        taken.append(f"{part} {count}")
        spent += count * price
    settings = runs.parse_settings(evaluation.EvalSettings, evaluation.PRESETS, "eval",
                                   argv=["--model", str(model), "--out", str(folder / "eval")])  # fmt: skip
    runs.launch(evaluation.score_models, settings)
    scores = json.loads((folder / "eval" / "scores.json").read_text())["models"]["model"]
    names = ("skill", "greedy_accuracy", "sampled_accuracy", "sampled_format", "sampled_accuracy_given_format")
    numbers = [scores["localize"]["iou"], scores["localize"]["acc50"], *(scores[mode][name] for name in names)]
    numbers = ["" if number is None else round(number, 4) for number in numbers]
    return dict(zip(COLUMNS, [scale, seed, arm, ", ".join(taken), round(spent), *numbers]))


def summarise(rows):
    """Rows of cells: for each arm the mean and, with several seeds, the standard deviation of every number."""
    names = COLUMNS[4:]
    cells = [["arm", "seeds", *names]]
    for arm in [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]:
        some = [row for row in rows if row["arm"] == arm]
        line = [arm, str(len(some))]
        for name in names:
            values = [float(row[name]) for row in some if row[name] != ""]
            digits = 0 if name == "seconds" else 2
            spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
            line.append(f"{np.mean(values):.{digits}f}{spread}" if values else "-")
        cells.append(line)
    return cells


def draw(rows, path):
    """One line an arm: a dot for each seed, a bar at the mean."""
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    figure = report.new_figure(11, 0.45 * len(arms) + 1)
    for axis, (name, title) in zip(figure.subplots(1, 3, sharey=True), {
        "skill": "skill (0: the best constant guess)", "iou": "boxes (IoU)", "sampled": "sampled answers"
    }.items()):  # fmt: skip
        for y, arm in enumerate(arms):
            values = [float(row[name]) for row in rows if row["arm"] == arm]
            axis.barh(y, np.mean(values), color="lightsteelblue")
            axis.plot(values, [y] * len(values), "o", color="black", markersize=4)
        axis.set_yticks(range(len(arms)), arms)
        axis.set_title(title, fontsize=10)
        axis.axvline(0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    report.save_figure(figure, path)


def main():
    """Run the arms that the CSV lacks, then write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the presets' steps")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="which arms; full comes first")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    parser.add_argument("--csv", type=Path, default=ROOT / "tests/results/ablations.csv", help="the table; .txt and .png beside it")
    settings = parser.parse_args()
    rows = list(csv.DictReader(settings.csv.open(encoding="utf-8"))) if settings.csv.is_file() else []
    if any(float(row["scale"]) != settings.scale for row in rows):
        raise SystemExit(f"{settings.csv} was made with another --scale; use another --csv and --out.")
    for seed in range(settings.seeds):
        prices = {}
        for arm in dict.fromkeys(["full", *settings.arms]):
            done = any(row["arm"] == arm and int(row["seed"]) == seed for row in rows)
            if done and arm != "full":
                continue
            row = run_arm(arm, seed, settings.out, settings.scale, prices)  # full: finished parts only give their prices
            if not done:
                rows.append({name: str(value) for name, value in row.items()})
                settings.csv.parent.mkdir(parents=True, exist_ok=True)
                with settings.csv.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    writer.writeheader()
                    writer.writerows(rows)
    table = evaluation.text_table(summarise(rows), 1)
    settings.csv.with_suffix(".txt").write_text(table + "\n", encoding="utf-8")
    draw(rows, settings.csv.with_suffix(".png"))
    print(table)


if __name__ == "__main__":
    main()
