"""Runs that are stopped, killed or cannot write, text that nobody vouches for, and no network: stage 0 and eval.py."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from scannet_fixture import study, write_table
from tqdm import tqdm

import common
import eval as evaluation
import stage0_data
import stage1_localize
from common import Example
from support import benchmarks, report, toy_world
from support.benchmarks import Item
from support.scannet import read_labels

ROOT = Path(common.__file__).parent
ROOMS, SCENES = 16, 10
TOY = ("--rooms", ROOMS, "--heldout_rooms", 2, "--traces", 9, "--base_steps", 1, "--processes", 1)
STOPPED = "stopped; rerun the same command to resume\n"
if sys.platform == "win32":
    pytest.skip("these tests fork processes, which Windows cannot", allow_module_level=True)
FORK = multiprocessing.get_context("fork")


# A script in a process of its own, and group of processes, without the seconds that its imports take


def inside(module, folder, flags, patch):
    """What that process does: module.main() in `folder`; all that it and its workers say goes to `folder`/said."""
    os.setsid()
    for bar in (tqdm, evaluation.Progress):  # else one lock for all: a process that is killed in the middle of a bar keeps it
        bar.set_lock(threading.RLock())
    os.chdir(folder)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = [module.__file__, *map(str, flags)]
    sys.stdout = sys.stderr = open(folder / "said", "w", encoding="utf-8", buffering=1)
    for number in (1, 2):
        os.dup2(sys.stderr.fileno(), number)
    patch()
    try:
        module.main()
    except KeyboardInterrupt:
        traceback.print_exc()
        raise


BEGUN = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """A test that fails in the middle leaves no process behind."""
    yield
    while BEGUN:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(BEGUN.pop().pid, signal.SIGKILL)


def begin(module, folder, *flags, patch=lambda: None):
    process = FORK.Process(target=inside, args=(module, folder, flags, patch))
    process.start()
    BEGUN.append(process)
    return process


def said(folder):
    return (folder / "said").read_text(encoding="utf-8")


def finish(module, folder, *flags, patch=lambda: None):
    """Run it to its end. Returns its exit status."""
    process = begin(module, folder, *flags, patch=patch)
    process.join(100)
    assert process.exitcode is not None, said(folder)
    return process.exitcode


def wait_for(condition, process=None, seconds=60):
    began = time.time()
    while not condition():
        assert time.time() - began < seconds and (process is None or process.is_alive())
        time.sleep(0.005)


def members(process):
    """How many processes of its group are alive; those that nobody has buried yet are not."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True).stdout.splitlines()
    return sum(int(line.split()[0]) == process.pid and "Z" not in line for line in listed)


def stop(process, number, group=False):
    """Send a signal to the first process, or to all as a terminal does; wait until none of them is left."""
    (os.killpg if group else os.kill)(process.pid, number)
    process.join(20)
    wait_for(lambda: not members(process), seconds=10)


def check_stopped(process, folder):
    """One line, no traceback, status 130."""
    words = said(folder)
    assert process.exitcode == 130 and words.endswith(STOPPED) and words.count("stopped") == 1 and "Traceback" not in words, words


WAYS = [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)]  # signal, and whether all of the group get it


def jsonl(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("**/*.jsonl")}


# Stage 0


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of a toy that nobody has stopped, made by one worker."""
    folder = tmp_path_factory.mktemp("toy")
    assert finish(stage0_data, folder, *TOY, "--workers", 1) == 0, said(folder)
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A ScanNet folder of small scenes."""
    root = tmp_path_factory.mktemp("scannet")
    write_table(root)
    for number in range(SCENES):
        study(root, f"scene{10 + number:04d}_02", 7, nasty=False)
    return root


@pytest.fixture(scope="module")
def real(scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    assert finish(stage0_data, folder, *scannet(scans), "--workers", 1) == 0, said(folder)
    return folder


def scannet(scans):
    return "--source", "scannet", "--scannet", scans, "--out", "data"


def parts(root):
    return list(root.glob("parts/*.json"))


def holding(root, most):
    """A patch: with so many parts done, no further scene is read; a few are being made already."""

    def patch():
        read, first = stage0_data.read_scannet, os.getpid()

        def held(*args):
            while len(parts(root)) >= most and os.getppid() == first:
                time.sleep(0.01)
            return read(*args)

        stage0_data.read_scannet = held

    return patch


@pytest.mark.parametrize("source", ["toy", "scannet"])
def test_stage_0_is_stopped_and_killed_and_goes_on_to_the_same_bytes(source, toy, scans, real, tmp_path):
    root = tmp_path / ("data/toy" if source == "toy" else "data")
    flags = (TOY if source == "toy" else scannet(scans)) + ("--workers", 2)
    before = 0
    for number, group in WAYS:
        process = begin(stage0_data, tmp_path, *flags, patch=holding(root, before + 1))
        wait_for(lambda: len(parts(root)) > before, process)  # noqa: B023
        stop(process, number, group)
        if number != signal.SIGKILL:
            check_stopped(process, tmp_path)
        made = [json.loads(path.read_text()) for path in parts(root)]  # they are whole
        assert before < len(made) < (ROOMS if source == "toy" else SCENES) and not jsonl(root)
        before = len(made)
    assert finish(stage0_data, tmp_path, *flags) == 0, said(tmp_path)
    assert jsonl(tmp_path) == jsonl(toy if source == "toy" else real)  # whatever the number of workers, too
    assert not list(root.glob("**/parts*")) and not list(root.glob("**/*.new"))


def die_before(names):
    """A patch: the process is killed when it is about to give the first of these files its name."""

    def patch():
        replace = os.replace

        def killed(path, target):
            if Path(target).name in names and not Path(target).exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(path, target)

        os.replace = killed

    return patch


@pytest.mark.parametrize("source", ["toy", "scannet"])
def test_stage_0_killed_while_it_writes_never_leaves_half_a_file(source, toy, scans, real, tmp_path):
    whole, root = (toy, tmp_path / "data" / "toy") if source == "toy" else (real, tmp_path / "data")
    names = {Path(name).name for name in jsonl(whole)} | {"manifest.json"}
    wanted, deaths = jsonl(whole), 0
    flags = TOY if source == "toy" else scannet(scans)
    while (code := finish(stage0_data, tmp_path, *flags, patch=die_before(names))) == -signal.SIGKILL:
        deaths += 1
        assert jsonl(tmp_path).items() <= wanted.items() and not (root / "manifest.json").exists()
        if (root / "heldout").is_dir():  # the rooms of the first half are not made again
            assert len(parts(root)) == ROOMS
        names.discard(next(iter(names - {path.name for path in root.glob("**/*")}), None))
        assert deaths < 20
    assert code == 0 and deaths >= 4 and jsonl(tmp_path) == wanted, said(tmp_path)


def test_a_killed_worker_is_told_and_not_waited_for(tmp_path):
    root = tmp_path / "data" / "toy"
    process = begin(stage0_data, tmp_path, *TOY, "--workers", 2, patch=holding(root, 1))
    wait_for(lambda: parts(root), process)
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    os.kill(next(int(pid) for pid, parent in zip(listed[::2], listed[1::2]) if int(parent) == process.pid), signal.SIGKILL)
    process.join(20)
    assert process.exitcode == 1 and "a worker was killed" in said(tmp_path) and "Traceback" not in said(tmp_path)
    wait_for(lambda: not members(process))


def test_the_base_is_stopped_at_any_time_and_only_its_training_is_lost(toy, tmp_path):
    """Two processes: first while the second one is still being started, then in the training."""
    shutil.copytree(toy / "data", tmp_path / "data")
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("data/**/*")}
    flags = (*TOY, "--processes", 2, "--base_steps", 5000)
    for condition in (lambda process: members(process) > 1, lambda _: re.search(r" [1-9]\d*/5000", said(tmp_path))):
        process = begin(stage0_data, tmp_path, *flags)
        wait_for(lambda: condition(process), process)  # noqa: B023
        stop(process, signal.SIGINT, group=True)
        check_stopped(process, tmp_path)
    assert not (tmp_path / "runs").exists() and made == {path: path.stat().st_mtime_ns for path in tmp_path.glob("data/**/*")}


def test_a_base_that_was_half_saved_is_not_taken_as_whole(toy, tmp_path):
    shutil.copytree(toy / "data", tmp_path / "data")

    def patch():
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        toy_world.Qwen2VLImageProcessorPil.save_pretrained = full

    assert finish(stage0_data, tmp_path, *TOY, patch=patch) == 1
    words = said(tmp_path)
    assert "runs/toy/base/model.new cannot be read or written (No space left on device)" in words and "Traceback" not in words
    assert finish(stage0_data, tmp_path, *TOY) == 0
    assert {path.name for path in (tmp_path / "runs" / "toy" / "base").iterdir()} == {"model", "config.json", "scores.json"}
    assert (tmp_path / "runs/toy/base/model/preprocessor_config.json").is_file()


def test_a_base_of_other_settings_data_or_code_is_refused_and_one_without_weights_is_trained(toy, tmp_path, monkeypatch):
    for name in ("data", "runs"):
        shutil.copytree(toy / name, tmp_path / name)
    base, rows = tmp_path / "runs" / "toy" / "base", tmp_path / "data" / "toy" / "objects.jsonl"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stage0_data.py", *map(str, TOY)])
    trained = []
    monkeypatch.setattr(stage0_data.runs, "launch", lambda work, settings: trained.append(settings))
    stage0_data.main()
    assert not trained  # the same again
    code = next(iter(toy_world.CODE))
    changes = {
        "--base_steps 1, not --base_steps 2": lambda patch: patch.setattr(sys, "argv", [*sys.argv, "--base_steps", "2"]),
        "before the data in data/toy changed": lambda patch: patch.setattr(common, "FILES", {"spatial": common.FILES["spatial"]}),
        "before the code in support/toy_world.py changed": lambda patch: patch.setitem(toy_world.CODE, code, [rows]),
    }
    for words, change in changes.items():
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=words):
            change(patch)
            stage0_data.main()
    (base / "model" / "model.safetensors").unlink()
    stage0_data.main()
    assert len(trained) == 1


def test_resume_never_says_how_to_go_on_and_drops_old_rows_first(toy, tmp_path):
    """Old rows beside new pictures would be wrong answers."""
    shutil.copytree(toy / "data", tmp_path / "data")
    root = tmp_path / "data" / "toy"
    process = begin(stage0_data, tmp_path, *TOY, "--seed", 1, "--resume", "never", patch=holding(root, 1))
    wait_for(lambda: parts(root), process)
    stop(process, signal.SIGTERM)
    assert process.exitcode == 130 and said(tmp_path).endswith("stopped; rerun the same command without --resume never to resume\n")
    assert not jsonl(root) and not (root / "manifest.json").exists()
    assert finish(stage0_data, tmp_path, *TOY, "--seed", 1) == 0


# eval.py


def write_benchmark(root, count=24):
    """A made-up ViewSpatial-Bench."""
    (root / "ViewSpatial-Bench").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for n in range(count):
        name = f"ViewSpatial-Bench/{n}.png"
        Image.fromarray(rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(root / name)
        rows.append({"question_type": "Camera perspective", "image_path": [name], "question": f"Where is {n}?",
                     "answer": "A. left", "choices": "A. left\nB. right"})  # fmt: skip
    (root / "ViewSpatial-Bench" / "ViewSpatial-Bench.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def asked(tiny_model, tmp_path_factory):
    """(flags, folder) of a benchmark run that nobody has stopped, with one sampled answer a question."""
    folder = tmp_path_factory.mktemp("asked")
    write_benchmark(folder / "data")
    flags = ("--benchmarks", "viewspatial", "--model", tiny_model, "--data", folder / "data", "--out", "out", "--eval_batch", 2,
             "--max_new_tokens", 24, "--samples", 1, "--min_picture_tokens", 4, "--max_picture_tokens", 4)  # fmt: skip
    assert finish(evaluation, folder, *flags, "--processes", 1) == 0, said(folder)
    return flags, folder


@pytest.fixture(scope="module")
def ladder(toy, tiny_model, tmp_path_factory):
    """(flags, folder) of the toy's ladder that nobody has stopped; its five models are one."""
    folder = tmp_path_factory.mktemp("ladder")
    shutil.copytree(toy / "data", folder / "data")
    for name in evaluation.LADDER:
        shutil.copytree(tiny_model, folder / "runs" / "toy" / name / "model")
    flags = ("--questions", 4, "--boxes", 2, "--eval_batch", 4, "--max_new_tokens", 8, "--out", "runs/toy/eval")
    assert finish(evaluation, folder, *flags, "--processes", 1) == 0, said(folder)
    return flags, folder


def answers(path):
    """How many whole lines a file has after its first."""
    return max(0, path.read_bytes().count(b"\n") - 1) if path.is_file() else 0


def slowly():
    """A patch: the model thinks a little longer."""
    real = common.branch_generate
    common.branch_generate = lambda *args: (time.sleep(0.1), real(*args))[1]


@pytest.mark.parametrize("kind", ["asked", "ladder"])
def test_eval_is_stopped_and_killed_and_goes_on_to_the_same_scores(kind, tmp_path, request):
    flags, whole = request.getfixturevalue(kind)
    if kind == "ladder":
        shutil.copytree(whole, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("eval"))
    out, before = Path("out" if kind == "asked" else "runs/toy/eval"), 0
    path = tmp_path / out / "predictions.jsonl"
    for number, group in WAYS:
        process = begin(evaluation, tmp_path, *flags, "--processes", 1, patch=slowly)
        wait_for(lambda: answers(path) > before, process)  # noqa: B023
        stop(process, number, group)
        if number != signal.SIGKILL:
            check_stopped(process, tmp_path)
        assert before < answers(path) < answers(whole / out / path.name) and not (path.parent / "scores.json").exists()
        before = answers(path)
        with path.open("ab") as file:
            file.write(path.read_bytes().split(b"\n")[1][:-9])  # half a line
    assert finish(evaluation, tmp_path, *flags, "--processes", 1) == 0, said(tmp_path)
    for name in ("scores.json", "table.txt", "predictions.jsonl"):
        assert (tmp_path / out / name).read_text().replace(str(tmp_path), str(whole)) == (whole / out / name).read_text(), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_both_processes_of_eval_end_together(number, asked, tmp_path):
    """The second one is slow: if it did not end with the first, it would go on for minutes."""
    flags, whole = asked

    def patch():
        real = common.branch_generate
        common.branch_generate = lambda *args: (time.sleep(1.5 * (os.environ["RANK"] == "1")), real(*args))[1]

    process = begin(evaluation, tmp_path, *flags, "--processes", 2, patch=patch)
    wait_for((tmp_path / "out" / "predictions.1.jsonl").is_file, process)
    stop(process, number)
    if number != signal.SIGKILL:
        check_stopped(process, tmp_path)
    rows = [json.loads(line) for part in tmp_path.glob("out/*.jsonl") for line in part.read_text().splitlines()]
    assert sum("text" in row for row in rows) < answers(whole / "out" / "predictions.jsonl")


# Disks


def limited(size):
    """A patch: no file may grow beyond so many bytes."""

    def patch():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return patch


@pytest.mark.parametrize("size, named", [
    (1500, "data/toy/scans/scene0000_00"), (100_000, "data/toy/gallery.html"), (2_000_000, "runs/toy/base/model.new"),
])  # fmt: skip
def test_stage_0_names_what_it_could_not_write_and_goes_on(size, named, toy, tmp_path):
    assert finish(stage0_data, tmp_path, *TOY, "--workers", 1, patch=limited(size)) == 1
    line = next(line for line in said(tmp_path).splitlines() if "cannot be read or written" in line)
    assert line.startswith(named) and line.endswith("rerun the same command to resume.")
    assert "Traceback" not in said(tmp_path) and jsonl(tmp_path).items() <= jsonl(toy).items()
    assert finish(stage0_data, tmp_path, *TOY) == 0
    assert jsonl(tmp_path) == jsonl(toy)


@pytest.mark.parametrize("size, named", [(3000, "out/predictions.jsonl"), (40_000, "out/report.html")])
def test_eval_names_what_it_could_not_write_and_goes_on(size, named, asked, tmp_path):
    flags, whole = asked
    assert finish(evaluation, tmp_path, *flags, "--processes", 1, patch=limited(size)) == 1
    line = next(line for line in said(tmp_path).splitlines() if "File too large" in line)
    assert line.startswith(named) and line.endswith("rerun the same command to resume.") and "Traceback" not in said(tmp_path)
    kept = answers(tmp_path / "out" / "predictions.jsonl")
    assert kept > 0 and finish(evaluation, tmp_path, *flags, "--processes", 1) == 0
    for name in ("scores.json", "predictions.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()


@pytest.mark.parametrize("module, flags", [
    (stage0_data, (*TOY, "--data", "taken/toy")), (evaluation, ("--processes", 1, "--out", "taken/eval"))
])  # fmt: skip
def test_a_folder_that_cannot_be_made_is_named(module, flags, tmp_path):
    (tmp_path / "taken").write_text("a file of this name")
    assert finish(module, tmp_path, *flags) == 1
    last = said(tmp_path).strip().splitlines()[-1]
    assert "taken/" in last and "Not a directory" in last and "Traceback" not in said(tmp_path)


# Pages


HOSTILE = {
    "script": "<script>alert(1)</script>",
    "end of the script": '</script><script>alert(1)</script><!--<script>',
    "handler": "<img src=x onerror='alert(1)'>",
    "quotes": "\"'` onmouseover=alert(1) x=\"'",
    "direction": "chair \u202e\u2066elbat\u200f",
    "nothing": "a\x00b\x1b[31m\x85\u2028\u2029\ufeffc",
    "long": "x" * 1_000_000,
    "a long word of direction": "\u202e" * 1_000_000,
}


class Page(HTMLParser):
    """The tags, the names of attributes, and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.names, self.text = [], [], []
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.names += [name for name, _ in attributes]

    def handle_data(self, data):
        self.text.append(data)


def check_page(path, scripts):
    """Nothing runs but the page's own scripts, and every letter of it is one that is seen."""
    page = Page(path)
    assert page.tags.count("script") == scripts and not [name for name in page.names if name.startswith("on")]
    assert not {"img", "iframe", "object", "embed", "link", "base", "form"} & set(page.tags)
    assert report.safe_text(page.raw, 10**9) == page.raw
    return page


@pytest.mark.parametrize("name", HOSTILE)
def test_the_gallery_shows_any_text_as_text(name, scans, tmp_path):
    text = HOSTILE[name]
    labels = read_labels(scans / "scannetv2-labels.combined.tsv")
    room = stage0_data.read_scannet(scans / "scans" / "scene0010_02", labels)
    for thing in room.objects:
        thing.label = text
    row = {"question": text, "options": [f"A. {text}", f"B. {text}"], "answer": text, "thought": text, "question_type": text,
           "data_type": "single_image", "asked": [o.number for o in room.objects], "image": ["scene0010_02/20.jpg"]}  # fmt: skip
    page = report.gallery_page([stage0_data.gallery_entry(row, room)])
    (tmp_path / "gallery.html").write_text(page, encoding="utf-8")
    page = check_page(tmp_path / "gallery.html", 0)
    assert page.tags.count("svg") == 2 and page.tags.count("article") == 1
    assert report.safe_text(text) in page.text and len(page.raw) < 400_000


@pytest.mark.parametrize("name", HOSTILE)
def test_the_report_shows_any_text_as_text(name, tmp_path):
    text = HOSTILE[name]
    Image.new("RGB", (30, 20), "navy").save(tmp_path / "a.png")
    pictures, options = (str(tmp_path / "a.png"),), [f"A. {text}", f"B. {text}"]
    item = Item("vsi", {}, Example(f"{text}:1", pictures, "single_image", text, text, options, text))
    row = {"model": text, "mode": "think", "temperature": 0.0, "id": item.example.id, "score": 0, "question_type": text,
           "images": pictures, "question": text, "options": options, "answer": text,
           "text": f"<think>{text}</think><answer>{text}</answer>"}  # fmt: skip
    sections = [{"heading": text, "table": [["", text], [text, text]], "by_type": {text: 0.5}, "guess": {text: 0.2}}]
    shown = {}
    answers = report.report_answers([row], {row["id"]: item}, {}, None, shown)
    (tmp_path / "report.html").write_text(report.report_page(sections, answers, shown), encoding="utf-8")
    page = check_page(tmp_path / "report.html", 2)
    assert len(page.raw) < 400_000 and page.tags.count("h2") == 2
    found = json.loads(next(data for data in page.text if data.startswith("{")))["answers"][0]
    for words in (found["question"], found["answer"], found["options"][1], found["id"], found["benchmark"], found["type"]):
        assert words == report.safe_text(words, 10**9) and len(words) < 30_000 and report.safe_text(text, 200)[:200] in words


def test_scenes_whose_names_are_paths_are_refused(tmp_path):
    """Parts and pictures are named after them."""
    for name in ("../../evil", "/tmp/evil", "", "a" * 300, "a\x00"):
        facts = {"object_bbox": {}, "object_counts": {}, "room_size": 3}
        (tmp_path / "meta.json").write_text(json.dumps({name: facts}))
        with pytest.raises(SystemExit, match="meta.json: .* cannot be the name of a room"):
            stage0_data.read_meta(tmp_path / "meta.json")


def test_a_hint_cuts_a_label_without_end(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    example = Example("stage0:1", (str(tmp_path / "a.png"),), "single_image", "object size", "", None, "1")
    benchmarks.draw_hint(Item("stage0", {}, example, {"x" * 2_000_000: [1, 1, 9, 9]}), "box", tmp_path / "hint.png")
    assert Image.open(tmp_path / "hint.png").size == (60, 40)


# Network


def offline(log):
    """A patch: nothing but this machine can be reached; what is tried is written to `log`. It sees every socket of Python."""

    def watch(event, args):
        if event in ("socket.getaddrinfo", "socket.gethostbyname"):
            place = args[0]
        elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):  # else: a file
            place = args[1][0]
        else:
            return
        if place not in ("127.0.0.1", "::1", "localhost"):
            with log.open("a") as file:
                file.write(f"{event} {place}\n")
            raise OSError("there is no network")

    def patch():
        log.touch()
        huggingface_hub.constants.HF_HUB_OFFLINE = False  # what ran before may have set it
        datasets.config.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_CACHE = False, log.parent / "cache"
        sys.addaudithook(watch)

    return patch


def test_a_look_at_the_network_would_be_seen(tmp_path):
    def main():
        huggingface_hub.utils.get_session().head("https://huggingface.co")

    assert finish(SimpleNamespace(__file__="", main=main), tmp_path, patch=offline(tmp_path / "tried")) == 1
    assert "huggingface.co" in (tmp_path / "tried").read_text()


def test_no_script_looks_at_the_network_without_a_hub_id(asked, tiny_model, ladder_data, tmp_path):
    flags, whole = asked
    shutil.copytree(whole / "data", tmp_path / "data")
    (tmp_path / "data" / "SPBench").mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "data" / "SPBench" / "a.png")
    row = {"id": 1, "images": ["a.png"], "scene_name": "s", "question": "Where?", "options": ["A. left", "B. right"],
           "ground_truth": "A", "question_type": "object_rel_direction"}  # fmt: skip
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "data" / "SPBench" / "SPBench-SI.parquet")
    training = ("--preset", "3b", "--data", ladder_data, "--model", tiny_model, "--processes", 1, "--max_steps", 2, "--load",
                "fp32", "--train_batch", 1, "--eval_scenes", 1, "--min_picture_tokens", 4, "--max_picture_tokens", 9)  # fmt: skip
    more = ("--processes", 1, "--data", "data", "--questions", 2, "--benchmarks", "viewspatial", "spbench-si")
    log = tmp_path / "tried"
    for module, command in ((stage0_data, (*TOY, "--rooms", 4)), (stage1_localize, training), (evaluation, flags + more)):
        assert finish(module, tmp_path, *command, patch=offline(log)) == 0, said(tmp_path)
        assert not log.read_text()


def test_imports_do_not_look_at_the_network():
    code = f"""
import sys
sys.addaudithook(lambda event, args: event in ("socket.connect", "socket.getaddrinfo") and sys.exit(f"{{event}} {{args}}"))
sys.path.insert(0, {str(ROOT)!r})
import eval, stage0_data, stage1_localize, stage2_understand, stage3_grpo
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
