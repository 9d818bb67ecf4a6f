"""Training in two processes, under torchrun and under --processes 2: the same update, one that writes, one end."""

import concurrent.futures.thread
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import stage1_localize
import stage2_understand
import stage3_grpo
from support import runs

SCRIPTS = {"stage1": stage1_localize, "stage2": stage2_understand, "stage3": stage3_grpo}
if sys.platform == "win32":
    pytest.skip("these tests fork processes, which Windows cannot", allow_module_level=True)
FORK = multiprocessing.get_context("fork")
LINE = runs.LOST


# What each process does: this file run as a script, in the place of the stage that SCRIPT names


def completions(backbone, example, count):
    """`count` completions that depend on the example alone: in most groups some are right, wrong, and cut."""
    number = zlib.crc32(example.id.encode())
    right = f"<think> x </think><answer>{example.answer}</answer>"
    texts = [common.boxes_text(example.answer) if example.question_type == "locate" else right, "<answer>B 1</answer>", "no"]
    ids = [backbone.tokenizer(texts[(number + n) % 3 if number % 4 else 0])["input_ids"] for n in range(count)]
    return [some + backbone.stop[:1] if len(some) % 2 else some for some in ids]


def act():
    """Run the stage with a rollout that depends on no seed, with the fault asked for, and note what is written."""
    out, written = sys.argv[sys.argv.index("--out") + 1], []
    torch.set_num_threads(1)  # one order of sums: AdamW divides by gradients near zero, and would make much of the last digit
    fault, guilty, others = (os.environ.get("FAULT") or "no no no").split()  # such as kill 1 busy
    step, rollout = runs.optimizer_step, stage3_grpo.rollout

    def die():
        Path(out).with_name("died").write_text(str(time.time()))
        if fault == "raise":
            raise ValueError("a fault of one process")
        os.kill(os.getpid(), signal.SIGKILL)

    def faulty_step(model, optimizers, settings, number, steps):
        if number == 1 and os.environ.get("RANK", "0") == guilty:
            die()
        if number == 1 and others == "busy":
            time.sleep(100)  # far from the next exchange
        return step(model, optimizers, settings, number, steps)

    def seedless_rollout(backbone, prompts, settings):
        prefixes, _ = rollout(backbone, prompts, replace(settings, max_new_tokens=1))
        return prefixes, [completions(backbone, example, settings.group_size) for _, example in prompts]

    def note(event, args):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if (changes or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)) and str(args[0]).startswith(str(Path(out).parent)):
            written.append(f"{event} {args[0]}")

    def noted(save):
        return lambda what, path, *args: (written.append(f"save {path}"), save(what, path, *args))

    def join(settings):
        if fault == "early" and os.environ["RANK"] == guilty:
            die()
        joined(settings)

    joined, runs.join_processes = runs.join_processes, join
    runs.optimizer_step, stage3_grpo.rollout = faulty_step, seedless_rollout
    torch.save = noted(torch.save)  # it opens files past Python
    sys.addaudithook(note)
    importlib.import_module(os.environ["SCRIPT"]).main()
    Path(out).with_name(f"written.{os.environ.get('RANK', '0')}").write_text(json.dumps(written))


if __name__ == "__main__":
    act()
    sys.exit()


# How it is started


def inside(folder, flags, more):
    """A first process without the seconds that its imports take; all that it and the others say goes to `folder`/said."""
    os.setsid()
    tqdm.set_lock(threading.RLock())  # else one lock for all: a process that is killed in the middle of a bar keeps it for ever
    concurrent.futures.thread._threads_queues.clear()  # forked in a pool's thread: at its end a process would wait for itself
    os.environ |= more
    sys.argv = [__file__, *flags]
    sys.stdout = sys.stderr = open(folder / "said", "w", buffering=1)
    for number in (1, 2):
        os.dup2(sys.stderr.fileno(), number)
    act()
    os._exit(0)  # it was forked in a thread: Python's own end would wait for that one


def alive(folder):
    """The processes that work for this run, without those that nobody has buried yet."""
    lines = subprocess.run(["ps", "-A", "-o", "stat=,args=", "-ww"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if f"{folder}/" in line and line[0] != "Z"]


def run(folder, way, script, *flags, fault=""):
    """Run a stage to its end, in `folder`/stage. way: "one", "ours" (--processes 2) or "torchrun".

    Returns (exit status, what all have said, seconds from the fault, if there was one, to the end of the last process).
    """
    folder.mkdir()
    flags = [str(flag) for flag in ("--out", folder / script, *flags)]
    more = {"SCRIPT": SCRIPTS[script].__name__, "FAULT": fault, "OMP_NUM_THREADS": "1"}
    if way == "torchrun":
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, *flags]
        with open(folder / "said", "w") as said:
            code = subprocess.run(launch, env=os.environ | more, stdout=said, stderr=said, timeout=120).returncode
    else:
        flags += ["--processes", "1" if way == "one" else "2"]
        process = FORK.Process(target=inside, args=(folder, flags, more))
        process.start()
        process.join(120)
        code = process.exitcode
    while left := alive(folder):
        time.sleep(0.1)
        died = folder / "died"
        assert not died.exists() or time.time() - float(died.read_text()) < 40, left
    seconds = time.time() - float((folder / "died").read_text()) if (folder / "died").exists() else 0
    return code, (folder / "said").read_text(), seconds


@pytest.fixture(scope="module")
def common_flags(tiny_model, ladder_data):
    return ("--preset", "3b", "--data", ladder_data, "--model", tiny_model, "--load", "fp32", "--warmup", "0", "--lr", "3e-4",
            "--min_picture_tokens", 4, "--max_picture_tokens", 9, "--eval_scenes", "1", "--max_steps", "3")  # fmt: skip


SFT = ("--train_batch", "3", "--branches", "2", "--steps", "4")
FLAGS = {  # odd counts, so that the shares are unequal; one held-out scene: the second process has none
    "stage1": SFT,
    "stage2": (*SFT, "--micro_batch", "2"),
    "stage3": ("--train_batch", "3", "--group_size", "4", "--mu", "2", "--beta", "0.1", "--locate", "0.3", "--max_new_tokens", "8",
               "--steps", "4", "--cold_lr", "3e-4", "--cold_train_batch", "3", "--cold_steps", "2"),
    "alone": (*SFT, "--train_batch", "1"),  # one scene in a step: the second process has none at all
}  # fmt: skip
FAULTS = {  # (name, way): who dies how, and what the others are doing
    ("killed", "torchrun"): "kill 1 ready", ("killed", "ours"): "kill 1 busy", ("first killed", "ours"): "kill 0 busy",
    ("raised", "torchrun"): "raise 1 ready", ("raised", "ours"): "raise 1 ready",
    ("killed before joining", "ours"): "early 1 ready",
}  # fmt: skip
MISTAKES = {  # the same in all processes; before they have joined, and after
    ("no data", "torchrun"): "spld_grounding_data.jsonl is missing", ("no data", "ours"): "spld_grounding_data.jsonl is missing",
    ("few prompts", "ours"): "--train_batch 1 cannot be shared by 2 processes",
}  # fmt: skip


@pytest.fixture(scope="module")
def done(common_flags, tmp_path_factory):
    """{(name, way): (its folder, exit status, what was said, seconds from the fault to the end)}."""
    root = tmp_path_factory.mktemp("processes")
    jobs = []
    for name, flags in FLAGS.items():
        for way in ("one", "ours" if name == "alone" else "torchrun"):
            jobs.append((name, way, name if name in SCRIPTS else "stage1", flags, ""))
    jobs += [(name, way, "stage1", SFT, fault) for (name, way), fault in FAULTS.items()]
    for name, way in MISTAKES:
        flags = ("--train_batch", "1") if name == "few prompts" else (*SFT, "--data", root / "nowhere")
        jobs.append((name, way, "stage3" if name == "few prompts" else "stage1", flags, ""))

    def work(job):
        name, way, script, flags, fault = job
        folder = root / f"{name}-{way}".replace(" ", "_")
        return (name, way), (folder, *run(folder, way, script, *common_flags, *flags, fault=fault))

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(work, jobs))


def rows(folder):
    """metrics.jsonl without the times, and without what the cold start samples: that depends on the rank."""
    timed = ("seconds", "rollout_seconds", "update_seconds", *["accuracy_given_format"] * (folder.name == "coldstart"))
    return [{k: v for k, v in row.items() if k not in timed} for row in common.read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.parametrize("name, stage, steps", [
    ("stage1", "stage1", 3), ("stage2", "stage2", 3), ("stage3", "coldstart", 2), ("stage3", "stage3", 3), ("alone", "stage1", 3),
])  # fmt: skip
def test_two_processes_make_the_same_update_as_one(name, stage, steps, done):
    one, two = (done[name, way] for way in ("one", "ours" if name == "alone" else "torchrun"))
    assert one[1] == two[1] == 0, one[2] + two[2]
    stages = [folder / stage for folder, *_ in (one, two)]
    found = [torch.load(run / "checkpoint.pt", weights_only=True)["weights"] for run in stages]
    assert max(weight.abs().max().item() for name, weight in found[0].items() if "lora_B" in name) > 5e-4  # it starts at 0
    assert set(found[0]) == set(found[1])
    apart = torch.cat([(found[0][name] - found[1][name]).abs().flatten() for name in found[0]])
    assert (apart > 1e-5).float().mean() < 1e-4 and apart.max() < 1e-4  # AdamW: a gradient of nearly zero may change its sign
    logs = [rows(run) for run in stages]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] == list(range(1, steps + 1))
    for first, second in zip(*logs):
        assert set(first) == set(second)
        assert all(np.isclose(first[key], second[key], rtol=1e-3, atol=1e-6) for key in first), (first, second)
    assert all(row["grad_norm"] > 0 for row in logs[0])
    if stage == "stage3":
        assert all(0 < row[key] for row in logs[0] for key in ("format", "accuracy", "reward_std", "completion_tokens", "cut"))
        assert any(row["dead_groups"] > 0 for row in logs[0]) and logs[0][-1]["kl"] > 0


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_only_the_first_process_writes(name, done):
    written = [json.loads((done[name, "torchrun"][0] / f"written.{rank}").read_text()) for rank in (0, 1)]
    assert written[1] == []
    for word in ("metrics.jsonl", "samples.jsonl", "checkpoint.new", "model", "curves.png"):
        assert any(word in line for line in written[0]), word


@pytest.mark.parametrize("name, way", FAULTS)
def test_when_a_process_dies_all_end_soon_with_one_clear_line(name, way, done):
    folder, code, said, seconds = done[name, way]
    raised = name == "raised"
    assert code != 0 and seconds < 30, said
    assert said.count(LINE) == (way == "ours" and not raised) and said.count("ValueError: a fault") == raised, said
    assert way == "ours" or raised or "SIGKILL" in said, said  # torchrun says it itself
    assert said.count("Traceback") == raised + (way == "torchrun"), said  # torchrun's own report has one
    assert [row["step"] for row in rows(folder / "stage1")] == [1] if name != "killed before joining" else True


@pytest.mark.parametrize("name, way", MISTAKES)
def test_what_is_wrong_in_all_processes_is_said_once(name, way, done):
    _, code, said, _ = done[name, way]
    assert code != 0 and said.count(MISTAKES[name, way]) == 1 and LINE not in said, said
    assert said.count("Traceback") == (way == "torchrun"), said


def test_eval_says_once_what_is_wrong(tiny_model, tmp_path):
    flags = ["--benchmarks", "vsi", "--data", str(tmp_path), "--model", str(tiny_model), "--processes", "2"]
    script = Path(common.__file__).parent / "eval.py"
    done = subprocess.run([sys.executable, str(script), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.count("is missing. Download") == 1 and "Traceback" not in done.stderr
