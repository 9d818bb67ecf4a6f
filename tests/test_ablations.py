"""The ablations without their training: what each arm trains, that all arms cost the same, and that a stopped run goes on."""

import csv
import json
import sys
from pathlib import Path

import ablations
import numpy as np
import pytest

PRICES = {"stage1": 0.5, "stage2": 0.8, "coldstart": 0.7, "stage3": 2.0}


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Ablations in an empty folder; training and scoring only write down that they were called: [(part, folder, steps, flags)]."""
    calls = []

    def train(part, folder, model, seed, steps, flags=""):
        calls.append((part, str(folder.relative_to(tmp_path)), str(model), steps, flags.split()))
        taken = steps // 2 if part == "coldstart" and "1.1" not in flags else steps  # it stops at its measured format
        return folder / "model", taken, PRICES[part]

    def score(work, settings):
        model = {"localize": {"iou": 0.5, "acc50": 0.6}} | {
            mode: {"skill": 0.1 + len(calls) / 100, "greedy_accuracy": 0.4, "sampled_accuracy": 0.3, "sampled_format": 0.9,
                   "sampled_accuracy_given_format": None}
            for mode in ("direct", "think")
        }  # fmt: skip
        Path(settings.out).mkdir(parents=True, exist_ok=True)
        (Path(settings.out) / "scores.json").write_text(json.dumps({"models": {"model": model}}))

    monkeypatch.setattr(ablations, "train", train)
    monkeypatch.setattr(ablations.runs, "launch", score)
    return calls


def run(tmp_path, monkeypatch, *flags):
    argv = ["ablations.py", "--out", str(tmp_path), "--csv", str(tmp_path / "table.csv"), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    ablations.main()
    return list(csv.DictReader((tmp_path / "table.csv").open()))


def test_all_arms_cost_the_same_seconds(trained, tmp_path, monkeypatch, capsys):
    rows = run(tmp_path, monkeypatch, "--seeds", "1")
    assert [row["arm"] for row in rows] == list(ablations.ARMS)
    for row in rows:
        parts = dict(part.split() for part in row["steps"].split(", "))
        assert sum(int(count) * PRICES[part] for part, count in parts.items()) == pytest.approx(float(row["seconds"]), abs=1)
        assert float(row["seconds"]) == pytest.approx(float(rows[0]["seconds"]), abs=2.0)  # one step of the dearest part
    assert "full" in capsys.readouterr().out


def test_an_arm_leaves_its_part_out_and_starts_from_the_model_before(trained, tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, "--seeds", "1")
    full, own = "seed0/full", [call for call in trained if "without_stage_1" in call[1]]
    assert [call[0] for call in own] == ["stage2", "coldstart", "stage3"]
    assert own[0][2] == "runs/toy/base/model" and own[1][2].endswith("without_stage_1/stage2/model")
    assert own[2][2] == own[1][2]  # stage 3 begins with the cold start beside it
    shared = [call for call in trained if call[1].startswith(full) and call[0] == "stage1"]
    assert len(shared) == 6  # five arms besides full begin as the full ladder does: they find its finished stage 1
    rl = [call for call in trained if "direct_RL" in call[1]]
    assert [call[0] for call in rl] == ["stage3"] and rl[0][2].endswith("full/stage1/model") and "--cold_start" in rl[0][4]
    sft = [call for call in trained if "without_thinking" in call[1]]
    assert [call[0] for call in sft] == ["stage2"] and sft[0][4] == "--worked 0 --direct 1".split()


def test_a_stopped_run_goes_on_and_another_scale_is_refused(trained, tmp_path, monkeypatch):
    first = run(tmp_path, monkeypatch, "--seeds", "1", "--arms", "without GRPO")
    assert [row["arm"] for row in first] == ["full", "without GRPO"]
    trained.clear()
    both = run(tmp_path, monkeypatch, "--seeds", "2", "--arms", "without GRPO")
    assert both[:2] == first and [row["seed"] for row in both] == ["0", "0", "1", "1"]
    assert not any("seed0/without" in call[1] for call in trained)
    with pytest.raises(SystemExit, match="another --scale"):
        run(tmp_path, monkeypatch, "--seeds", "1", "--scale", "0.5")


def test_means_and_spreads_by_hand():
    rows = [{"arm": "full", "seed": str(s), "seconds": "100"} | dict.fromkeys(ablations.COLUMNS[5:], v)
            for s, v in enumerate(("0.2", "0.4", "0.6"))]  # fmt: skip
    head, line = ablations.summarise(rows)
    assert head[:3] == ["arm", "seeds", "seconds"] and line[:3] == ["full", "3", "100 ± 0"]
    assert line[3] == "0.40 ± 0.20" and np.std([0.2, 0.4, 0.6], ddof=1) == pytest.approx(0.2)
    rows[0]["given_format"] = ""
    assert ablations.summarise(rows[:1])[1][-1] == "-"
