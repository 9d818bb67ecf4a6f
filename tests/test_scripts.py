"""Every script as a user runs it: in a process of its own, from an empty folder, with tiny flags."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import common
import eval as evaluation
import stage0_data
import stage1_localize
import stage2_understand
import stage3_grpo
from support import benchmarks, runs

ROOT = Path(common.__file__).parent
SCRIPTS = {
    "stage0_data": stage0_data.DataSettings,
    "stage1_localize": stage1_localize.LocalizeSettings,
    "stage2_understand": stage2_understand.UnderstandSettings,
    "stage3_grpo": stage3_grpo.GRPOSettings,
    "eval": evaluation.EvalSettings,
}
ONE = ("--processes", "1")
TRAIN = (*ONE, "--train_batch", "4", "--branches", "2", "--eval_scenes", "1", "--eval_every", "2")
TINY = {  # flags of a small toy ladder
    "stage0_data": (*ONE, "--rooms", "12", "--heldout_rooms", "6", "--traces", "16", "--base_steps", "4"),
    "stage1_localize": (*TRAIN, "--optimizer", "adamw", "--lr", "3e-4", "--warmup", "0", "--max_steps", "4"),
    "stage2_understand": (*TRAIN, "--max_steps", "4"),
    # Here max_steps bounds the cold start, which ends before it at the share of well-formed answers asked for.
    "stage3_grpo": (*TRAIN, "--train_batch", "6", "--group_size", "4", "--max_new_tokens", "16", "--steps", "4", "--mu", "1",
                    "--beta", "0.1", "--cold_steps", "150", "--cold_format", "0.1", "--cold_eval_every", "10", "--cold_mix", "0",
                    "--max_steps", "150"),
}  # fmt: skip
STAGES = {"stage1_localize": "stage1", "stage2_understand": "stage2", "stage3_grpo": "stage3"}


def run(folder, script, *flags):
    """Run a script in `folder`. Returns the finished process, its output as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def succeed(folder, script, *flags):
    done = run(folder, script, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def at_once(*jobs):
    """Run several (folder, script, *flags) side by side: a start is mostly imports."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: succeed(*job), jobs))


@pytest.fixture(scope="session")
def ladder(tmp_path_factory):
    """The folder in which the whole toy ladder has run, four steps a stage."""
    folder = tmp_path_factory.mktemp("toy")
    for script, flags in TINY.items():
        succeed(folder, script, *flags)
        if script == "stage0_data":
            shorten_thoughts(folder / "data" / "toy" / common.FILES["coldstart"])
    return folder


def shorten_thoughts(path):
    """Cut the thoughts to a word: a few steps then teach the format, and GRPO finds rewards that differ."""
    rows = common.read_jsonl(path)
    for row in rows:
        row["solution"] = "<think> x </think>" + row["solution"].partition("</think>")[2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def evaluated(ladder):
    """The folder of eval.py's run over that ladder."""
    succeed(ladder, "eval", *ONE, "--questions", "12", "--boxes", "6", "--max_new_tokens", "24")
    return ladder / "runs" / "toy" / "eval"


@pytest.fixture
def copied(ladder, tmp_path):
    """copied(stage) -> a copy of the ladder's folder in which that stage has not run."""

    def copy(stage):
        shutil.copytree(ladder, tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy" / "runs" / "toy" / stage)
        return tmp_path / "copy"

    return copy


def metrics(folder):
    return common.read_jsonl(folder / "metrics.jsonl")


def weights(folder):
    """All tensors of a run's model."""
    parts = sorted((folder / "model").glob("*.safetensors"))
    return {name: tensor for part in parts for name, tensor in load_file(part).items()}


def check_picture(path):
    """A picture that opens, of some size, with something on it."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 50 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def check_model(folder):
    """A plain model folder: it opens without anything of ours, and answers a forward pass."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Where is it?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.shape == (1, ids.shape[1], model.config.text_config.vocab_size) and logits.isfinite().all()
    assert not any("lora" in name for name, _ in model.named_parameters())
    common.load_backbone(folder, "fp32")  # with the image processor, which the next stage needs


def check_run(folder, adapter):
    """What every training stage leaves behind."""
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "checkpoint.pt"):
        assert (folder / name).stat().st_size > 0
    assert (folder / "adapter" / "adapter_config.json").is_file() == adapter
    assert not list(folder.glob("*.new"))  # what a save leaves while it is under way
    check_picture(folder / "curves.png")
    check_model(folder / "model")
    json.loads((folder / "config.json").read_text())
    for row in common.read_jsonl(folder / "samples.jsonl"):
        assert {"step", "question", "answer", "text"} <= set(row)


# Command lines


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """{script: text of --help}."""
    folder = tmp_path_factory.mktemp("help")
    done = at_once(*((folder, script, "--help") for script in SCRIPTS))
    assert not list(folder.iterdir())  # help writes nothing
    return {script: process.stdout for script, process in zip(SCRIPTS, done)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_setting_with_its_comment(script, helps):
    words = " ".join(helps[script].split())
    for field in fields(SCRIPTS[script]):
        assert f"--{field.name}" in words
        # argparse breaks lines where it likes, also at a hyphen or a slash: compare without white space.
        assert "".join(field.metadata["help"].split()) in "".join(words.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_first_settings_are_the_same_in_every_script(script, helps):
    flags = [field.name for field in fields(SCRIPTS[script])]
    assert flags[:7] == ["preset", "model", "data", "out", "seed", "max_steps", "resume"]


def test_an_unknown_preset_is_named_with_those_there_are(capsys):
    with pytest.raises(SystemExit) as error:
        runs.parse_settings(SCRIPTS["stage1_localize"], stage1_localize.PRESETS, "stage1", argv=["--preset", "70b"])
    words = capsys.readouterr().err
    assert error.value.code != 0 and "70b" in words and "toy" in words and "3b" in words


@pytest.mark.parametrize(
    "module, before", [(stage1_localize, "base"), (stage2_understand, "stage1"), (stage3_grpo, "stage2")]
)
def test_preset_3b_is_lora_in_bf16_and_a_flag_beats_it(module, before):
    name = module.__name__
    stage = STAGES[name]

    def parse(*argv):
        return runs.parse_settings(SCRIPTS[name], module.PRESETS, stage, before, ["--preset", "3b", *argv])

    plain = parse()
    assert (plain.load, plain.tune, plain.checkpointing, plain.keep_features) == ("bf16", "lora", True, False)
    assert 0 < plain.min_picture_tokens < plain.max_picture_tokens and plain.out == f"runs/3b/{stage}"
    assert plain.model == ("Qwen/Qwen2.5-VL-3B-Instruct" if stage == "stage1" else f"runs/3b/{before}/model")
    changed = parse("--max-picture-tokens", "5000", "--lr=0.5", "--checkpointing", "false", "--model", "there")
    assert (changed.max_picture_tokens, changed.lr, changed.checkpointing, changed.model) == (5000, 0.5, False, "there")


MISTAKES = {  # what is wrong: script and flags, words of the message
    "an unknown flag": (("stage2_understand", "--stepz", "3"), ["--stepz"]),
    "no data": (("stage1_localize", *ONE, "--data", "nowhere"), ["nowhere", "missing"]),
    "no model": (("stage2_understand", *ONE, "--model", "runs/none"), ["runs/none", "no model"]),
    "no siblings": (("stage3_grpo", *TINY["stage3_grpo"], "--group_size", "1"), ["--group_size 1"]),
    "no reference": (("stage3_grpo", *TINY["stage3_grpo"], "--tune", "full"), ["--tune full", "--beta"]),
    "another setting": (("stage1_localize", *TINY["stage1_localize"], "--clip", "0.123"), ["--clip", "0.123"]),
}


@pytest.fixture(scope="module")
def mistakes(ladder, tmp_path_factory):
    """{what is wrong: (the finished process, its folder)}. Stage 3 starts from stage 2, before any cold start."""

    def make(name):
        (script, *flags), _ = MISTAKES[name]
        folder = tmp_path_factory.mktemp("mistake")
        (folder / "data").symlink_to(ladder / "data")
        needed = {"no siblings": "stage2", "no reference": "stage2", "no data": "base", "another setting": "stage1"}
        stage = needed.get(name)
        if stage:
            shutil.copytree(ladder / "runs" / "toy" / stage, folder / "runs" / "toy" / stage)
        return run(folder, script, *flags), folder

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MISTAKES, pool.map(make, MISTAKES)))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_by_one_clear_line(name, mistakes):
    done, _ = mistakes[name]
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in MISTAKES[name][1]), last


@pytest.mark.parametrize("name", ["no siblings", "no reference"])
def test_settings_that_cannot_work_are_refused_before_the_cold_start(name, mistakes):
    assert not (mistakes[name][1] / "runs" / "toy" / "coldstart").exists()  # minutes that would be for nothing


# The toy ladder, end to end


def test_stage_0_writes_data_manifest_gallery_and_base(ladder):
    data = ladder / "data" / "toy"
    for part in (data, data / "heldout"):
        for kind in ("locate", "spatial"):
            assert common.read_examples(part, kind)
    assert len(common.read_examples(data, "coldstart")) == 16
    manifest = json.loads((data / "manifest.json").read_text())
    assert {"seed": 0, "rooms": 12, "heldout_rooms": 6, "traces": 16}.items() <= manifest["config"].items()
    assert {name: rule["value"] for name, rule in manifest["rules"].items()} == stage0_data.RULES
    assert manifest["counts"]["train"]["spatial"] == len(common.read_examples(data, "spatial"))
    rooms = [{path.name for path in (part / "images").iterdir()} for part in (data, data / "heldout")]
    assert len(rooms[0]) == 12 and len(rooms[1]) == 6 and not rooms[0] & rooms[1]
    check_picture(data / "gallery.png")
    check_model(ladder / "runs" / "toy" / "base" / "model")


@pytest.mark.parametrize("stage", ["stage1", "stage2", "coldstart", "stage3"])
def test_every_stage_leaves_a_whole_run_folder(stage, ladder):
    folder = ladder / "runs" / "toy" / stage
    config = json.loads((folder / "config.json").read_text())
    check_run(folder, adapter=config["tune"] == "lora")
    steps = [row["step"] for row in metrics(folder)]
    assert steps == list(range(1, len(steps) + 1)) and (len(steps) == 4 or stage == "coldstart")
    assert all(np.isfinite(value) for row in metrics(folder) for value in row.values())


def test_every_stage_starts_from_the_one_before_and_moves(ladder):
    stages = ["base", "stage1", "stage2", "coldstart", "stage3"]
    models = [weights(ladder / "runs" / "toy" / stage) for stage in stages]
    for before, after in zip(models, models[1:]):
        assert set(before) == set(after)
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert moved and not any("visual" in name for name in moved)  # the toy's vision tower is frozen


def test_the_cold_start_ends_where_its_measured_format_is_good_enough(ladder):
    rows = metrics(ladder / "runs" / "toy" / "coldstart")
    measured = [row["format"] for row in rows if "format" in row]
    assert len(rows) < 150 and measured[-1] >= 0.1 and all(share < 0.1 for share in measured[:-1])


def test_stage_3_logs_what_grpo_must_be_watched_by(ladder):
    wanted = {"reward", "format", "accuracy", "reward_std", "dead_groups", "completion_tokens", "cut", "kl", "clip", "entropy",
              "grad_norm", "rollout_seconds", "update_seconds"}  # fmt: skip
    rows = metrics(ladder / "runs" / "toy" / "stage3")
    assert all(wanted <= set(row) for row in rows)
    assert rows[0]["kl"] == 0.0 and rows[-1]["kl"] > 0  # the first update is at the starting policy itself
    assert all(row["clip"] == 0 for row in rows)  # one update a rollout: the ratio is 1
    assert any(row["dead_groups"] < 1 and row["grad_norm"] > 0 for row in rows)
    assert all(0 < row["completion_tokens"] <= 16 and 0 <= row["dead_groups"] <= 1 for row in rows)


def test_eval_writes_every_number_asked_for(evaluated):
    scores = json.loads((evaluated / "scores.json").read_text())
    assert {"questions", "guess", "models"} <= set(scores) and scores["questions"] == 12
    assert set(scores["models"]) == {"base", "stage1", "stage2", "coldstart", "stage3"}
    asked = {"localize", "by_type", "skill", "format", "greedy_accuracy"}
    asked |= {"sampled_accuracy", "sampled_accuracy_given_format"}
    for model in scores["models"].values():
        assert asked <= set(model) and set(model["localize"]) == {"iou", "acc50", "iou_several"}
        assert set(model["by_type"]) == set(scores["guess"])
        skill = np.mean([(model["by_type"][k] - g) / (1 - g) for k, g in scores["guess"].items() if g < 1])
        assert np.isclose(model["skill"], skill)
    head, *rows = common.read_jsonl(evaluated / "predictions.jsonl")
    assert list(head["settings"]["models"]) == list(scores["models"])
    assert head["settings"]["prompts"] == dict.fromkeys(scores["models"], common.INSTRUCTIONS)
    for name, model in scores["models"].items():  # the models that nobody has taught to think are asked direct answers only
        modes = ["direct"] if name in ("base", "stage1", "stage2") else ["direct", "think"]
        asked = {(row["mode"], row["temperature"]) for row in rows if row["model"] == name}
        assert asked == {("locate", 0.0)} | {(mode, t) for mode in modes for t in (0.0, 1.0)}
        assert model["mode"] == modes[-1] and [mode for mode in ("direct", "think") if mode in model] == modes
    assert len(rows) == 3 * (6 + 2 * 12) + 2 * (6 + 4 * 12)
    for name in ("ladder.png", "boxes.png"):
        check_picture(evaluated / name)
    report = (evaluated / "report.html").read_text(encoding="utf-8")
    assert report.count("</script>") == 2 and all(name in report for name in scores["models"])
    table = (evaluated / "table.txt").read_text()
    assert all(word in table for word in [*scores["models"], "best constant guess", "IoU", "skill"])
    assert set(scores["counts"]) == set(scores["guess"]) and sum(scores["counts"].values()) == 12
    assert all(kind.replace("_", " ") in table for kind in scores["guess"])


def test_scores_are_json_that_every_reader_takes(evaluated):
    def refuse(word):
        raise AssertionError(f"scores.json holds {word}, which is not JSON")

    json.loads((evaluated / "scores.json").read_text(), parse_constant=refuse)


def test_a_type_that_the_constant_guess_solves_does_not_break_the_skill():
    # Few questions of a type may all have the answer that is commonest in training.
    assert np.isclose(benchmarks.skill({"count": 1.0, "size": 0.7}, {"count": 1.0, "size": 0.4}), 0.5)


def test_scores_of_eval_are_those_of_its_predictions(evaluated):
    scores = json.loads((evaluated / "scores.json").read_text())
    rows = common.read_jsonl(evaluated / "predictions.jsonl")[1:]  # the first line holds the settings
    for name, model in scores["models"].items():
        for mode in [mode for mode in ("direct", "think") if mode in model]:
            mine = [row for row in rows if (row["model"], row["mode"]) == (name, mode)]
            for key, temperature in (("greedy_accuracy", 0), ("sampled_accuracy", 1)):
                found = np.mean([row["score"] for row in mine if row["temperature"] == temperature])
                assert np.isclose(model[mode][key], found)


# The golden run: the first steps of every stage must stay what they are

GOLDEN = Path(__file__).with_name("golden_toy.json")  # to renew it on purpose: delete it and run the test, which writes it
WATCHED = {  # metrics and how many steps; stage 3 samples, so a last digit may change a token
    "stage1": (("loss", "grad_norm", "tokens"), 4), "stage2": (("loss", "grad_norm", "tokens"), 4),
    "coldstart": (("loss", "grad_norm", "tokens"), 8), "stage3": (("entropy", "completion_tokens", "reward", "grad_norm"), 2),
}  # fmt: skip


@pytest.mark.parametrize("stage", ["base", *WATCHED])
def test_the_first_steps_are_those_of_the_golden_run(stage, ladder):
    runs_of = ladder / "runs" / "toy"
    found = {"base": json.loads((runs_of / "base" / "scores.json").read_text())}
    for name, (metric_names, count) in WATCHED.items():
        rows = metrics(runs_of / name)[:count]
        found[name] = {metric: [row[metric] for row in rows] for metric in metric_names}
    if not GOLDEN.is_file():
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"{GOLDEN.name} was missing and is written: look at it")
    wanted = json.loads(GOLDEN.read_text())[stage]
    assert set(found[stage]) == set(wanted)
    for metric, values in wanted.items():
        np.testing.assert_allclose(found[stage][metric], values, rtol=0.05 if stage in ("base", "stage3") else 0.01, err_msg=metric)


# Resume, processes


def test_a_finished_stage_3_is_left_as_it_is(ladder):
    model = ladder / "runs" / "toy" / "stage3" / "model" / "model.safetensors"
    made = model.stat().st_mtime_ns
    done = succeed(ladder, "stage3_grpo", *TINY["stage3_grpo"])
    assert "stage3 is finished" in done.stderr and "parameters" not in done.stderr  # nothing was loaded
    assert model.stat().st_mtime_ns == made


@pytest.mark.parametrize("script", STAGES)
def test_four_steps_equal_two_and_a_resume_and_two(script, ladder, copied):
    stage, flags = STAGES[script], TINY[script]
    folder = copied(stage)
    succeed(folder, script, *flags, "--max_steps", "2")
    straight, resumed = (part / "runs" / "toy" / stage for part in (ladder, folder))
    two = weights(resumed)
    assert [row["step"] for row in metrics(resumed)] == [1, 2]
    assert "resuming from step 2" in succeed(folder, script, *flags).stderr
    wanted, found = weights(straight), weights(resumed)
    assert set(wanted) == set(found) and all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert any(not torch.equal(two[name], found[name]) for name in two)
    rows = metrics(straight), metrics(resumed)
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
    timed = {"seconds", "rollout_seconds", "update_seconds"}
    for one, other in zip(*rows):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_asked_to_stop_finishes_its_step_and_goes_on_later(number, copied):
    folder = copied("stage1")
    flags = [str(flag) for flag in (*TINY["stage1_localize"], "--eval_every", "10000", "--processes", "2")]
    log = folder / "runs" / "toy" / "stage1" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "stage1_localize.py"), *flags, "--max_steps", "700"], cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    began = time.time()
    while not (log.is_file() and log.read_text().count("\n") >= 2) and time.time() - began < 200:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "rerun the same command to resume" in said and "Traceback" not in said
    step = torch.load(log.parent / "checkpoint.pt", weights_only=True)["step"]
    assert 2 <= step < 700 and [row["step"] for row in metrics(log.parent)] == list(range(1, step + 1))
    assert not (log.parent / "model").exists()
    assert f"resuming from step {step}" in succeed(folder, "stage1_localize", *flags, "--max_steps", step + 1).stderr
    assert [row["step"] for row in metrics(log.parent)] == list(range(1, step + 2))


def test_two_processes_make_the_same_update_as_one(ladder, copied):
    folder = copied("stage1")
    succeed(folder, "stage1_localize", *TINY["stage1_localize"], "--processes", "2")
    before = weights(ladder / "runs" / "toy" / "base")
    stages = [part / "runs" / "toy" / "stage1" for part in (ladder, folder)]
    one, two = (weights(stage) for stage in stages)
    assert max((one[name] - before[name]).abs().max().item() for name in one) > 1e-3
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    for first, second in zip(*map(metrics, stages)):
        assert first["step"] == second["step"] and first["tokens"] == second["tokens"]
        assert np.isclose(first["loss"], second["loss"], rtol=1e-5)
        assert np.isclose(first["grad_norm"], second["grad_norm"], rtol=1e-4)


# The released data


@pytest.fixture(scope="module")
def released(tmp_path_factory, tiny_model, ladder_data):
    """The folder in which stages 1 to 3 have run on the released schema with the 3b preset and a tiny model."""
    folder = tmp_path_factory.mktemp("released")
    flags = ("--preset", "3b", "--data", ladder_data, *ONE, "--load", "fp32", "--train_batch", "2", "--branches", "3",
             "--min_picture_tokens", 4, "--max_picture_tokens", 9, "--eval_scenes", "2", "--max_steps", "2")  # fmt: skip
    succeed(folder, "stage1_localize", *flags, "--model", tiny_model, "--train_batch", "1", "--branches", "1")
    succeed(folder, "stage2_understand", *flags)
    succeed(folder, "stage3_grpo", *flags, "--train_batch", "2", "--group_size", "2", "--max_new_tokens", "16")
    return folder / "runs" / "3b"


@pytest.mark.parametrize("stage, steps", [("stage1", 2), ("stage2", 2), ("coldstart", 1), ("stage3", 2)])
def test_the_released_files_go_through_every_stage(stage, steps, released):
    check_run(released / stage, adapter=True)
    assert [row["step"] for row in metrics(released / stage)] == list(range(1, steps + 1))
    config = json.loads((released / stage / "config.json").read_text())
    assert config["tune"] == "lora" and config["checkpointing"] and config["preset"] == "3b"


def test_the_released_boxes_are_learnt_in_resized_pixels(released):
    # 640x480 with at most 84 x 84 pixels becomes 84x56: every box of the answers lies in there.
    for row in common.read_jsonl(released / "stage1" / "samples.jsonl"):
        for box in row["answer"]:
            x1, y1, x2, y2 = box["bbox_2d"]
            assert 0 <= x1 < x2 <= 84 and 0 <= y1 < y2 <= 84


# QLoRA


def test_qlora_goes_the_whole_way(tiny_model, ladder_data, tmp_path, monkeypatch):
    """Stages 1 to 3 with 4-bit weights: every stage learns, after rollouts too, and merges into plain bf16 weights; eval reads."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    monkeypatch.setattr(stage3_grpo, "rewards", lambda texts, *_: {"accuracy": rng.random(len(texts))})
    flags = ["--preset", "3b", "--data", str(ladder_data), *ONE, "--load", "4bit", "--train_batch", "2", "--branches", "3",
             "--min_picture_tokens", "4", "--max_picture_tokens", "9", "--eval_scenes", "2", "--max_steps", "2",
             "--keep_features", "true"]  # fmt: skip
    for module, more in (
        (stage1_localize, ["--model", str(tiny_model)]),
        (stage2_understand, []),
        (stage3_grpo, ["--train_batch", "2", "--group_size", "2", "--max_new_tokens", "8"]),
    ):
        monkeypatch.setattr(sys, "argv", [module.__name__, *flags, *more])
        module.main()
    for stage, earlier in (("stage1", tiny_model), ("stage2", "runs/3b/stage1/model"), ("stage3", "runs/3b/coldstart/model")):
        folder = tmp_path / "runs" / "3b" / stage
        check_run(folder, adapter=True)
        assert all(row["grad_norm"] > 0 for row in metrics(folder)), stage
        files = sorted(Path(earlier).glob("*.safetensors"))  # a merged 4-bit model has several
        before, after = {name: tensor for file in files for name, tensor in load_file(file).items()}, weights(folder)
        assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
        moved = {name for name in after if not torch.equal(after[name], before[name].to(torch.bfloat16))}
        assert moved and all(re.fullmatch(r"model\.layers\..*_proj\.weight", name) for name in moved)
    argv = ["--model", "runs/3b/stage3/model", "--benchmarks", "stage0", "--data", str(ladder_data), "--load", "4bit", *ONE]
    monkeypatch.setattr(sys, "argv", ["eval", *argv, "--max_new_tokens", "4", "--out", "runs/3b/eval"])
    evaluation.main()
    assert json.loads((tmp_path / "runs" / "3b" / "eval" / "scores.json").read_text())
