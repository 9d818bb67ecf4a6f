"""Qwen2-VL and Qwen3-VL through every stage and eval.py, as test_scripts.py does with Qwen2.5-VL."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_eval import read_run
from test_scripts import ONE, check_run, metrics, shorten_thoughts, weights
from transformers import AutoModelForImageTextToText

import common
import eval as evaluation
import stage0_data
import stage1_localize
import stage2_understand
import stage3_grpo

SMALL = ["--min_picture_tokens", "4", "--max_picture_tokens", "9"]


def call(monkeypatch, module, *flags):
    """Run a script in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
    module.main()


@pytest.mark.parametrize("family, load", [("qwen2_vl", "bf16"), ("qwen3_vl", "4bit")])
def test_a_family_goes_the_whole_way(tiny_models, ladder_data, tmp_path, monkeypatch, family, load):
    """Stages 1 to 3 on the released schema (a picture, several views, videos), stage 1 with a stop and a resume; eval.py with the
    attention to the boxes. Every stage learns and leaves a plain folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    monkeypatch.setattr(stage3_grpo, "rewards", lambda texts, *_: {"accuracy": rng.random(len(texts))})
    flags = ["--preset", "3b", "--data", ladder_data, *ONE, "--load", load, "--train_batch", 2, "--branches", 3, *SMALL,
             "--eval_scenes", 1, "--lr", 1e-2, "--warmup", 0, "--keep_features", "true"]  # fmt: skip
    first = [*flags, "--model", tiny_models(family), "--steps", 2]
    call(monkeypatch, stage1_localize, *first)
    if load == "4bit":
        call(monkeypatch, stage1_localize, *first, "--max_steps", 1, "--out", "runs/3b/stopped")
        call(monkeypatch, stage1_localize, *first, "--out", "runs/3b/stopped")  # resumes
        stopped, whole = weights(Path("runs/3b/stopped")), weights(Path("runs/3b/stage1"))
        assert all(torch.equal(stopped[name], whole[name]) for name in whole)
        assert [row["step"] for row in metrics(Path("runs/3b/stopped"))] == [1, 2]
    call(monkeypatch, stage2_understand, *flags, "--max_steps", 1)
    call(monkeypatch, stage3_grpo, *flags, "--max_steps", 1, "--group_size", 2, "--max_new_tokens", 6)
    for stage in ("stage1", "stage2", "stage3"):
        folder = Path("runs/3b") / stage
        check_run(folder, adapter=True)
        assert all(row["grad_norm"] > 0 for row in metrics(folder)), stage
        assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    saved = AutoModelForImageTextToText.from_pretrained("runs/3b/stage3/model")
    assert type(saved) is common.FAMILIES[family].model
    before = dict(common.load_backbone(tiny_models(family), "bf16").model.named_parameters())
    moved = {name for name, weight in saved.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all("language_model.layers" in name and name.endswith("_proj.weight") for name in moved)
    samples = [box for row in common.read_jsonl("runs/3b/stage1/samples.jsonl") for box in row["answer"]]
    assert samples and max(max(box["bbox_2d"]) for box in samples) > 400  # thousandths: a resized picture has 84 or 96 pixels
    call(monkeypatch, evaluation, "--model", "runs/3b/stage3/model", "--benchmarks", "stage0", "--data", ladder_data, "--load",
         load, *ONE, *SMALL, "--max_new_tokens", 3, "--out", "runs/3b/eval", "--attention", 1, "--questions", 5)  # fmt: skip
    assert read_run(Path("runs/3b/eval"))[2]["benchmarks"]["stage0"]["attention"]["questions"] == 1


def test_the_toy_of_qwen3_vl(tmp_path, monkeypatch):
    """stage0_data.py --backbone qwen3_vl, then all stages and eval.py on its data: one step each."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    monkeypatch.setattr(stage3_grpo, "rewards", lambda texts, *_: {"accuracy": rng.random(len(texts))})
    call(monkeypatch, stage0_data, "--backbone", "qwen3_vl", *ONE, "--rooms", 6, "--heldout_rooms", 3, "--traces", 8,
         "--base_steps", 2, "--workers", 1)  # fmt: skip
    base = common.load_backbone("runs/toy/base/model", "fp32")
    assert base.family is common.FAMILIES["qwen3_vl"] and common.resized_size(base.processor, 112, 112) == (128, 128)
    # A thought's boxes have the units of the answers of stage 1.
    located = {}
    for scene in common.load_scenes("data/toy", ["locate"], base):
        located[scene.images] = [box for example in scene.examples for box in example.answer]
    thoughts = [(e.images, box) for e in common.read_examples("data/toy", "worked") if len(e.images) == 1
                if e.solution.startswith("[") for box in json.JSONDecoder().raw_decode(e.solution)[0]]  # fmt: skip
    assert len(thoughts) > 5 and all(box in located[images] for images, box in thoughts)
    shorten_thoughts(Path("data/toy") / common.FILES["coldstart"])
    flags = [*ONE, "--train_batch", 4, "--eval_scenes", 2, "--max_steps", 1, "--steps", 1]
    for module, more in ((stage1_localize, []), (stage2_understand, []),
                         (stage3_grpo, ["--cold_steps", 1, "--group_size", 2, "--max_new_tokens", 8])):  # fmt: skip
        call(monkeypatch, module, *flags, *more)
    for stage in ("stage1", "stage2", "stage3"):
        check_run(Path("runs/toy") / stage, adapter=stage == "stage3")
    call(monkeypatch, evaluation, *ONE, "--questions", 4, "--boxes", 4, "--max_new_tokens", 4)
    assert json.loads(Path("runs/toy/eval/scores.json").read_text())["models"].keys() == set(evaluation.LADDER)
