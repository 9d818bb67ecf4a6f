"""Bad pictures, full disks, numbers that are none, and runs that are killed: nothing is lost, and the message helps.

What happens when ... Each line is a test, here or in test_interruptions.py, test_processes.py, test_bad_input.py, test_runs.py or
test_memory.py.

- Ctrl-C or SIGTERM while training: finishes and saves the step; a second one stops at once, and the last checkpoint is whole
- Ctrl-C or SIGTERM in stage 0 or eval.py: all processes end at once; finished rooms and written answers are kept
- kill -9 at any moment, also during a save: only the work since the last checkpoint is lost (stage 0: the current rooms;
  eval.py: the current batch); a model folder is whole or absent
- a stopped run is resumed: training: bit-identical weights; stage 0: byte-identical rows; eval.py: the same scores; other
  settings are refused by name
- a checkpoint is broken, from another model, or contains code: refused, with what to do; nothing is unpickled
- the model, rows or pictures that a run started from have changed: a finished run and a checkpoint are refused; stage 0 makes
  those rooms again; eval.py asks those questions again
- one of several processes dies: the others end within seconds; the error is printed once
- the disk is full or read-only: the last checkpoint stays whole; the message names the path
- there is too little memory: refused before training, and before eval.py loads a model, with the setting to lower
- a gradient is not finite: the step is skipped and its examples are named; five in a row end the run
- the model's output is not finite while it samples: the run ends; step and question are named
- all groups of a GRPO step are dead: the step is skipped: momentum must not move the weights
- a picture or video is missing, broken, too large, or outside images/: named; EXIF rotation, CMYK, 16 bits, animations, one
  pixel and one frame work
- a row is broken (JSON, fields, options, answer, box), or a text holds a special token such as <|im_end|>: the message names
  the file, the row and the fault
- a prompt exceeds the model's context: its rows are named; nothing is truncated
- a model folder is an adapter, incomplete, quantised, or of another architecture: refused, with what to do
- a setting cannot work (--group_size 1, a negative number, an unknown word): one line names it, before anything is loaded
- untrusted text in gallery.html and report.html (HTML, bidi marks, huge strings): escaped and truncated
- no hub id is given: no script uses the network
- a ScanNet scan is incomplete or contradicts itself: left out, with the reason in the manifest; tried again in the next run
- a benchmark has two rows with one id, or the same table twice: each row is a question; copies are read once
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import stage1_localize
from support import runs

ROOT = Path(common.__file__).parent


# Pictures


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def cut_in_half(path):
    noise(64, 48).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD = {
    "empty.jpg": lambda path: path.write_bytes(b""),
    "text.png": lambda path: path.write_text("not a picture"),
    "cut.png": cut_in_half,
    "cut.jpg": cut_in_half,
    "strip.png": lambda path: Image.new("RGB", (2010, 10)).save(path),
    "bomb.png": lambda path: Image.new("1", (10_000, 10_000)).save(path),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_named(name, tmp_path):
    BAD[name](tmp_path / name)
    with pytest.raises(SystemExit, match=re.escape(str(tmp_path / name))):
        common.load_image(tmp_path / name)


def test_a_bad_picture_of_a_localisation_row_is_named(backbone, tmp_path):
    BAD["strip.png"](tmp_path / "strip.png")
    answer = [{"bbox_2d": [1, 1, 5, 5], "label": "chair"}]
    example = common.Example("x", (str(tmp_path / "strip.png"),), "single_image", "locate", "", None, answer)
    with pytest.raises(SystemExit, match="strip.png cannot be read as a picture"):
        common.boxes_for_model(backbone, example)


def test_odd_pictures_are_read(tmp_path):
    picture = noise(40, 30)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.convert("P").save(tmp_path / "palette.png")
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    picture.save(tmp_path / "moving.gif", save_all=True, append_images=[noise(40, 30, 1)])
    for name in ("cmyk.jpg", "palette.png", "alpha.png", "moving.gif"):
        found = common.load_image(tmp_path / name)
        assert found.mode == "RGB" and found.size == common.picture_size(tmp_path / name) == (40, 30)
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    assert common.load_image(tmp_path / "dot.png").size == (1, 1)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    found = np.asarray(common.load_image(tmp_path / "deep.png"), float)[..., 0]
    assert np.abs(found - grey / 257).max() <= 1 and found.max() == 255 and found.min() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation, tmp_path):
    """The top left corner, red, comes where the standard puts the first row and the first column."""
    picture = Image.new("RGB", (64, 32), "blue")
    picture.paste("red", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "turned.png", exif=exif)
    found = common.load_image(tmp_path / "turned.png")
    assert found.size == common.picture_size(tmp_path / "turned.png") == ((64, 32) if orientation < 5 else (32, 64))
    right, low = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    corner = (found.width - 2 if right else 1, found.height - 2 if low else 1)
    assert found.getpixel(corner) == (255, 0, 0)


def test_a_bad_video_is_named(tmp_path):
    for name, content in (("text.mp4", b"not a video"), ("empty.mp4", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match=f"{name} cannot be read as a video"):
            common.read_video(tmp_path / name, 4)


# Numbers that are none


def settings_of(folder, **more):
    return stage1_localize.LocalizeSettings(
        out=str(folder), tune="full", steps=50, train_batch=1, micro_batch=1, eval_every=100, save_every=2, lr=1e-3, **more
    )


@pytest.fixture
def training(backbone, tmp_path, photo):
    """(backbone, packs, settings, run) of a tiny training on one picture."""
    photo(56, 56).save(tmp_path / "a.png")
    example = common.Example("row:7", (str(tmp_path / "a.png"),), "single_image", "object count", "How many?", None, "2")
    packs = common.make_packs(backbone.tokenizer, common.group_scenes([example]), 4, 0)
    settings = settings_of(tmp_path / "run")
    common.adapt(backbone, settings)
    return backbone, packs, settings, runs.Run(settings, {"loss": ["loss"], "norm": ["grad_norm"]})


def spoil(monkeypatch, steps):
    """Let the gradient be nan in these steps, counted from 1."""
    whole, calls = common.branch_logprobs, []

    def spoiled(*args, **kwargs):
        logps, entropy, mask = whole(*args, **kwargs)
        calls.append(1)
        return (logps * math.nan if len(calls) in steps else logps), entropy, mask

    monkeypatch.setattr(common, "branch_logprobs", spoiled)


def test_a_step_without_a_finite_gradient_teaches_nothing_and_is_told(training, monkeypatch, capsys):
    backbone, packs, settings, run = training
    settings.max_steps = 3
    spoil(monkeypatch, {2})
    seen = []
    step = runs.optimizer_step

    def watched(model, *args):
        before = [p.detach().clone() for p in model.parameters()]
        norm = step(model, *args)
        seen.append(max((a - b).abs().max().item() for a, b in zip(before, model.parameters())))
        return norm

    monkeypatch.setattr(runs, "optimizer_step", watched)
    stage1_localize.train(backbone, packs, [], settings, run)
    assert seen[1] == 0 < min(seen[0], seen[2])
    assert "step 2: the gradient is not finite; nothing is learnt from row:7" in capsys.readouterr().err
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["grad_norm"] is None for row in rows] == [False, True, False]
    assert all(p.isfinite().all() for p in backbone.model.parameters())


def test_too_many_such_steps_in_a_row_end_the_run(training, monkeypatch):
    backbone, packs, settings, run = training
    spoil(monkeypatch, set(range(3, 100)))
    with pytest.raises(SystemExit, match="5 steps in a row without a finite gradient, the last one 7. Lower --lr"):
        stage1_localize.train(backbone, packs, [], settings, run)
    assert runs.Run(settings, {}).first == 6


# Disks


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_leaves_the_checkpoint_before_it(error, training, monkeypatch):
    backbone, _, settings, run = training
    optimizers = runs.make_optimizers(backbone.model, settings)
    run.save(3, backbone, optimizers)
    whole = run.checkpoint.read_bytes()

    def full(state, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match=r"checkpoint.new cannot be written .* needs about [\d,]+ bytes. .* is whole"):
        run.save(4, backbone, optimizers)
    assert run.checkpoint.read_bytes() == whole and not run.checkpoint.with_suffix(".new").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_file_size_limit_of_the_system_is_met_in_the_same_way(tmp_path):
    """The real thing: a process that may not write more than 100 kB into a file."""
    code = """
import resource, signal, sys, types
sys.path.insert(0, sys.argv[1])
import torch, stage1_localize
from support import runs
run = runs.Run(stage1_localize.LocalizeSettings(out=sys.argv[2]), {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run.save(1, types.SimpleNamespace(model=torch.nn.Linear(400, 400)), [])
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "checkpoint.new cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("checkpoint*"))


def test_half_a_line_of_a_log_is_dropped_on_resume(training):
    backbone, _, settings, run = training
    run.save(2, backbone, runs.make_optimizers(backbone.model, settings))
    separator = json.dumps({"step": 2, "text": "a\u2028b"}, ensure_ascii=False)
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo', encoding="utf-8")
    (run.folder / "samples.jsonl").write_text(f"{separator}\n", encoding="utf-8")
    assert runs.Run(settings, {}).first == 2
    assert (run.folder / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (run.folder / "samples.jsonl").read_text(encoding="utf-8") == f"{separator}\n"


# Kill


def test_a_killed_training_goes_on_from_its_last_checkpoint(tiny_model, ladder_data, tmp_path):
    flags = ["--preset", "3b", "--data", ladder_data, "--model", tiny_model, "--processes", "1", "--load", "fp32"]
    flags += ["--train_batch", "1", "--steps", "2000", "--save_every", "1", "--eval_every", "10000"]
    flags += ["--min_picture_tokens", 4, "--max_picture_tokens", 9]
    command = [sys.executable, str(ROOT / "stage1_localize.py"), *map(str, flags)]
    where = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE, "text": True}
    run = tmp_path / "runs" / "3b" / "stage1"
    process, began = subprocess.Popen(command, **where), time.time()
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < 4:
        assert time.time() - began < 200
        time.sleep(0.02)
    process.kill()
    process.communicate()
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[2])["step"]
    done = subprocess.run([*command, "--max_steps", "12"], **where, timeout=200)
    found = int(re.search(r"resuming from step (\d+)", done.stderr)[1])
    assert done.returncode == 0 and found >= step
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, max(found, 12) + 1))


# Trust


def test_nothing_from_outside_is_run_or_unpickled():
    for script in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        text = script.read_text(encoding="utf-8")
        assert "trust_remote_code" not in text and "import pickle" not in text
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", text))
        readers = set(re.findall(r"(\w+)\.from_pretrained", text))  # weights are read in common.py only, and from safetensors
        harmless = {"AutoTokenizer", "AutoConfig", "Qwen2VLImageProcessorPil"}
        safe = text.count("use_safetensors=True") == len(readers - harmless) == 1
        assert readers <= harmless or script.name == "common.py" and safe


def test_a_checkpoint_with_code_in_it_is_refused(training):
    class Trap:
        def __reduce__(self):
            return print, ("it runs",)

    backbone, _, settings, run = training
    torch.save({"step": 1, "config": Trap()}, run.checkpoint)
    with pytest.raises(SystemExit, match="Weights only load failed"):
        runs.Run(settings, {})


def test_steps_without_a_finite_gradient_are_counted_in_a_row(training):
    _, _, settings, run = training
    run.bar, run.began = SimpleNamespace(set_postfix=lambda values: None), 0.0
    for norm, wanted in ((math.nan, 1), (1.0, 0), (math.inf, 1), (math.nan, 2)):
        run.log({"loss": 1.0, "grad_norm": norm})
        assert run.skipped == wanted


def test_signals_mean_after_a_launch_what_they_meant_before(training):
    """A pool of workers ends them with SIGTERM: a handler that waits for a step would hang it."""
    settings = training[2]
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    during = []

    def work(settings):
        during.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))

    settings.processes = 1
    runs.launch(work, settings, graceful=True)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert len(during) == 2 and not set(during) & set(before)
