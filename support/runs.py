"""What keeps a run safe. Nobody has to read this to understand the method.

1 optimizers  AdamW, Muon, the learning-rate schedule
2 settings    dataclasses of settings, read from the command line
3 processes   start them, share work, sum over them, stop at signals
4 data        training and held-out scenes; answers to many questions
5 runs        the folder of a run: steps, log, checkpoint
"""

import argparse
import contextlib
import hashlib
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate.utils.other import get_free_port
from tqdm import tqdm
from transformers import (
    HfArgumentParser,
)

import common
from common import print0
from support import files
from support.report import draw_curves

# ------------------------------------------------------------------------------------------------
# 1. Optimizers
# ------------------------------------------------------------------------------------------------


class Muon(torch.optim.Muon):
    """torch's Muon, with the Newton-Schulz iteration in float32. torch's own runs in bfloat16, which CPUs without bfloat16
    instructions emulate: on an AMD Zen 3 it takes 15 to 30 times as long."""

    @torch.no_grad()
    def step(self):
        """One update of every matrix that has a gradient. Each process orthogonalises its share of the matrices."""
        for group in self.param_groups:
            trained, updates = [p for p in group["params"] if p.grad is not None], []
            for number, parameter in enumerate(trained):
                momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                mine = number % world_size() == rank()
                update = parameter.grad.lerp(momentum, group["momentum"])  # Nesterov
                updates.append(orthogonalize(update) if mine else torch.zeros_like(parameter))
            for parameter, update in zip(trained, all_reduce_tensors(updates)):
                rows, columns = parameter.shape
                parameter.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(matrix, steps=5):
    """A matrix with the singular vectors of `matrix` and singular values near 1 (Muon's Newton-Schulz iteration)."""
    x = matrix.float() / matrix.norm().clamp(min=1e-7)
    x = x.T if len(x) > len(x.T) else x  # the short side first: smaller products
    a, b, c = 3.4445, -4.775, 2.0315
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if x.shape == matrix.shape else x.T).to(matrix.dtype)


def adamw(named, settings):
    """AdamW for all parameters. named: [(name, parameter)]."""
    return [torch.optim.AdamW([p for _, p in named], lr=settings.lr, weight_decay=0.0)]


def muon(named, settings):
    """Muon for the matrices of the language model's layers, AdamW for the other parameters."""
    if settings.tune == "lora":
        raise SystemExit("--optimizer muon is for the full matrices of --tune full; train adapters with adamw.")
    layers = [(name, p) for name, p in named if p.ndim == 2 and ".layers." in name]
    others = [(name, p) for name, p in named if not (p.ndim == 2 and ".layers." in name)]
    return [Muon([p for _, p in layers], lr=settings.muon_lr, weight_decay=0.0), *adamw(others, settings)]


OPTIMIZERS = {"adamw": adamw, "muon": muon}  # the choices of --optimizer


def make_optimizers(model, settings):
    """A list of optimizers for the trainable parameters of `model`. They update a float32 copy of a bf16 parameter, its
    attribute `master`: most updates of full tuning are too small to change a number of eight bits, and would be lost."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for _, parameter in trained:
        if parameter.dtype != torch.float32:
            parameter.master = parameter.detach().float()
    return OPTIMIZERS[settings.optimizer]([(name, master(p)) for name, p in trained], settings)


def master(parameter):
    """The tensor that the optimizer updates: the float32 copy of a bf16 parameter, or the parameter itself."""
    return getattr(parameter, "master", parameter)


def optimizer_step(model, optimizers, settings, step, steps):
    """Clip the gradients, set the scheduled learning rate, update, clear the gradients. Returns the norm before clipping.

    The rate rises linearly over the first `warmup` share of `steps`, then falls to zero as a cosine. A gradient that is zero
    everywhere or not finite changes nothing: the momentum of earlier steps must not move weights when nothing was learnt.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    copied = [p for p in trained if master(p) is not p]
    for parameter in copied:
        parameter.master.grad = None if parameter.grad is None else parameter.grad.float()
        parameter.grad = None
    norm = float(torch.nn.utils.clip_grad_norm_([master(p) for p in trained], settings.clip))
    rising = max(1, round(settings.warmup * steps))
    factor = (step + 1) / rising if step < rising else 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        if 0 < norm < math.inf:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for parameter in copied:
        parameter.data.copy_(parameter.master)
    return norm


# ------------------------------------------------------------------------------------------------
# 2. Settings
# ------------------------------------------------------------------------------------------------


def setting(default, help, choices=None):
    """A field of a settings dataclass. `help` is its comment and its line in --help. A number may be 0 only if its default is
    0 or `help` says what "0:" means."""
    return field(default=default, metadata={"help": help} | ({"choices": choices} if choices else {}))


def word_list(help, choices=None, repeat=False):
    """A field of a settings dataclass that takes several words; repeat: also after several flags of its name."""
    more = ({"choices": choices} if choices else {}) | ({"action": "extend"} if repeat else {})
    return field(default_factory=list, metadata={"help": help} | more)


def wording():
    """The field --instruction: a list of words on the command line, a dict in the settings (see common.read_instructions)."""
    text = "ask in other words: MODE=TEXT or MODE=@FILE, MODE as in INSTRUCTIONS of common.py; empty: as the model was trained"
    return field(default_factory=list, metadata={"help": text, "action": "extend"})


@dataclass
class Settings:
    """What all scripts share. A stage adds its own fields, and preset values for "toy" and "3b"."""

    preset: str = setting("toy", "toy (a tiny model on a toy world, minutes on two CPU cores) or 3b (the paper's model)")
    model: str = setting("", "folder or hub id to start from; empty: the model of the stage before")
    data: str = setting("", "folder with the JSONL files and images/; empty: data/<preset>")
    out: str = setting("", "folder of this run; empty: runs/<preset>/<stage>")
    seed: int = setting(0, "seed of the data order and of sampling")
    max_steps: int = setting(0, "stop after this many optimiser steps (0: no limit); the schedule stays as planned")
    resume: str = setting("auto", "auto: resume this run if it was stopped; never: start again", ("auto", "never"))
    seconds_per_grid: float = setting(1.0, "videos: seconds between two pairs of frames, for their positions (Qwen's code: 1)")
    fps: float = setting(30.0, "Qwen3-VL, videos as numbered pictures: their frames a second (ScanNet: 30)")
    cuda_graph: bool = setting(True, "on a GPU: capture the decoding step as a CUDA graph")
    processes: int = setting(2, "processes that share the work on a CPU; on GPUs use torchrun")


@dataclass
class TrainSettings(Settings):
    """What the training stages share."""

    resume: str = setting("auto", "auto: resume from this run's checkpoint if there is one; never: start again; or the folder of "
                                  "a run: start from a copy of its checkpoint")  # fmt: skip
    load: str = setting("bf16", "weights in memory: fp32, bf16, or 4bit (QLoRA)", common.LOADS)
    tune: str = setting("lora", "lora: adapters on the language model; full: all its weights", ("lora", "full"))
    lora_rank: int = setting(16, "rank of the adapters")
    lora_alpha: int = setting(32, "scale of the adapters: alpha / rank")
    train_vision: bool = setting(False, "train the vision tower, too (only with --tune full)")
    checkpointing: bool = setting(False, "recompute activations in the backward pass: slower, far less memory")
    min_picture_tokens: int = setting(0, "smallest picture in tokens (28 x 28 pixels; Qwen3-VL: 32 x 32); 0: the model's own")
    max_picture_tokens: int = setting(0, "largest picture in tokens; 0: the model's own")
    keep_features: bool = setting(False, "keep the frozen vision tower's output of each scene in memory (small pictures only)")
    optimizer: str = setting("adamw", "adamw; or muon for the language model's matrices and AdamW for the rest", tuple(OPTIMIZERS))
    lr: float = setting(1e-4, "peak learning rate of AdamW (LoRA needs about ten times that of full tuning)")
    muon_lr: float = setting(0.01, "peak learning rate of Muon")
    warmup: float = setting(0.1, "share of the steps with a rising learning rate (0: none); then it falls to zero as a cosine")
    clip: float = setting(1.0, "largest norm of the gradient")
    steps: int = setting(0, "optimiser steps; 0: one pass over the data")
    train_batch: int = setting(16, "scenes (stage 3: questions) in an optimiser step, over all processes")
    branches: int = setting(8, "questions of one scene in a step, at most; they share its pictures")
    micro_batch: int = setting(1, "scenes in one forward and backward pass; lower needs less memory")
    eval_batch: int = setting(128, "questions answered at once when scoring; lower needs less memory")
    eval_every: int = setting(100, "steps between scores on held-out scenes")
    eval_scenes: int = setting(64, "held-out scenes scored during training; 0: hold none out, train on all")
    save_every: int = setting(100, "steps between checkpoints")
    instruction: list[str] = wording()
    track: str = setting("off", "also log to tensorboard or wandb (must be installed)", ("off", "tensorboard", "wandb"))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows the script's docstring as it is, and every default."""


def parse_settings(cls, presets, stage, before="", argv=None):
    """Settings from the command line: defaults of `cls`, then of the preset, then the flags.

    before: the stage whose model this one starts from. Exits with a message for an unknown flag, preset or choice, and for a
    number that is negative, not finite, or 0 without a meaning.
    """
    parser = HfArgumentParser(cls, description=sys.modules[cls.__module__].__doc__, formatter_class=HelpFormatter)
    argv = sys.argv[1:] if argv is None else argv
    preset = next((argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg == "--preset"), "toy")
    preset = next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--preset=")), preset)
    if preset not in presets:
        parser.error(f"--preset {preset} is unknown; choose from {', '.join(presets)}")
    parser.set_defaults(**presets[preset])
    if os.environ.get("RANK", "0") != "0":
        parser._print_message = lambda *args: None  # rank 0 prints what is wrong with the flags
    settings = cls(**vars(parser.parse_args(argv)))
    for part in fields(settings):
        value, zero = getattr(settings, part.name), part.default == 0 or re.search(r"\b0:", part.metadata["help"])
        if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and zero):
            parser.error(f"--{part.name} {value}: give {'0 or more' if zero else 'more than 0'}")
    if hasattr(settings, "instruction"):
        settings.instruction = common.read_instructions(settings.instruction)
    if getattr(settings, "types", None) == ["all"]:
        settings.types = []
    settings.data = settings.data or f"data/{preset}"
    settings.out = settings.out or f"runs/{preset}/{stage}"
    if before and not settings.model:
        settings.model = str(Path(settings.out).parent / before / "model")
    return settings


# ------------------------------------------------------------------------------------------------
# 3. Processes
# ------------------------------------------------------------------------------------------------
# On a CPU two processes of one thread each are faster than one process with two threads: small matrices do not fill two cores.

START = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
stop_flag = START.RawValue("b", 0)  # set by a signal, read by every process after each step
LOST = "one of the processes ended; what is saved is whole; rerun the same command to resume"
logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it reports each process that it ends


def rank():
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def device():
    """The device of this process: its GPU if there is one, else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def share(items):
    """The items that this process works on."""
    return items[rank() :: world_size()]


def micro_batches(batch, size):
    """This process's share of a batch of packs, in lists of at most `size`, those with few pictures first: what is computed
    together is padded to the longest."""
    mine = sorted(share(batch), key=lambda pack: len(pack.scene.images))
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def gather(items):
    """The lists of all processes in one, in every process: the inverse of share."""
    parts = [items]
    if dist.is_initialized():
        parts = [None] * world_size()
        dist.all_gather_object(parts, items)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def all_reduce(values):
    """Sum a list of floats over the processes, element by element."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor.tolist()


def all_reduce_tensors(tensors):
    """Sum a list of tensors over the processes: a list of new tensors (the same ones with a single process)."""
    if not dist.is_initialized() or not tensors:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    return [part.view_as(tensor) for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]))]


def all_reduce_gradients(parameters):
    """Sum the gradients of trainable parameters over the processes, in place."""
    parameters = [p for p in parameters if p.requires_grad]
    if dist.is_initialized():
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter, gradient in zip(parameters, all_reduce_tensors(gradients)):
            parameter.grad = gradient


CGROUPS, PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # what a container or a job of a cluster may use


def cgroup_limits(kind, *names):
    """The numbers in files of this process's control group and of those above it, as far as they are visible: a list of lists.
    kind: "cpu" or "memory", the folder of version 1; version 2 has one folder for all."""
    found = []
    with contextlib.suppress(OSError):  # only Linux has them
        for line in PROCESS.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            group = CGROUPS / (kind if kinds else "") / path.strip("/")
            for folder in (group, *group.parents) if kind in kinds.split(",") or not kinds else ():
                if all((folder / name).is_file() for name in names):
                    words = " ".join((folder / name).read_text() for name in names).replace("max", "inf").split()
                    found.append([float(word) for word in words])
    return found


def usable_cores():
    """How many CPU cores this process may use: those it may run on, within the quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = cgroup_limits("cpu", "cpu.max") + cgroup_limits("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    return math.ceil(min([cores, *(quota / period for quota, period in quotas if quota > 0)]))


def launch(work, settings, graceful=False):
    """Run work(settings) in `settings.processes` processes on a CPU; in this process on a GPU, and under torchrun.

    An error in one process ends all of them and is printed once. Signals: see handle_signals.
    Raises SystemExit, with the error or with 130 after a signal.
    """
    with handle_signals(settings, graceful):
        if "RANK" in os.environ or settings.processes == 1 or torch.cuda.is_available():
            return run_here(work, settings)
        errors, port = START.SimpleQueue(), str(get_free_port())
        try:
            args = (work, settings, port, stop_flag, errors)
            processes = torch.multiprocessing.start_processes(
                worker, args, settings.processes, join=False, start_method=START.get_start_method()
            )
            ended = False
            while not ended:
                with contextlib.suppress(InterruptedError):  # Windows: a handled Ctrl-C ends the wait
                    ended = processes.join()
        except torch.multiprocessing.ProcessExitedException as error:
            raise SystemExit(130 if error.exit_code == 130 else f"\n{LOST if errors.empty() else errors.get()}") from None


def worker(number, work, settings, port, flag, errors):
    """One process of launch: join the others, work, and report an error to the parent."""
    global stop_flag
    stop_flag = flag
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    end_with_parent()
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(settings.processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    try:
        join_processes(settings)
        work(settings)
        leave_processes()
    except BaseException as error:
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            raise
        if text := error_text(error, settings):
            errors.put(text[-20_000:])  # a full pipe would block
        os._exit(1)


def end_with_parent():
    """End this process soon after its parent, even if that was killed and this one is busy or waits for another."""

    def watch():
        multiprocessing.parent_process().join()  # on all systems; the number of a parent that has ended stays on Windows
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_here(work, settings):
    """The only process, or one that torchrun has started."""
    try:
        join_processes(settings)
        work(settings)
        leave_processes()
    except BaseException as error:
        quiet = isinstance(error, KeyboardInterrupt) or isinstance(error, SystemExit) and not isinstance(error.code, str)
        if quiet or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        if os.environ["RANK"] != "0":  # most errors are raised in all processes: rank 0 prints them
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2)
        if text := error_text(error, settings):
            print(f"\n{text}", file=sys.stderr, flush=True)
        os._exit(1)


def join_processes(settings):
    """Join the processes that share the work, and seed this one."""
    torch.manual_seed(settings.seed)
    threads = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(max(1, min(threads, torch.get_num_threads())))  # never more than OMP_NUM_THREADS says
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave_processes():
    """Let all processes end together."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # one that is through may close its connections before the others are
            dist.barrier()
        dist.destroy_process_group()


def error_text(error, settings):
    """What to print about an error that ends the program; empty where another process's end is the cause."""
    if isinstance(error, SystemExit):
        return error.code
    if isinstance(error, FloatingPointError):
        return f"{error}. Use --load fp32; if that does not help, the weights are broken."
    if isinstance(error, OSError) and error.filename:
        command = "the same command" + (" without --resume never" if settings.resume == "never" else "")
        return (f"{error.filename2 or error.filename} cannot be read or written ({error.strerror}). What is done is kept: fix "
                f"this, then rerun {command} to resume.")  # fmt: skip
    if isinstance(error, RuntimeError) and re.search(r"gloo.*(Connection|Broken pipe)", str(error), re.DOTALL):
        return ""
    if isinstance(error, RuntimeError) and re.search("gloo device|interface or hostname", str(error)):  # seen on Windows
        return f"The processes cannot reach each other on this computer ({error}). Use --processes 1."
    return "".join(traceback.format_exception(error)).strip()


@contextlib.contextmanager
def handle_signals(settings, graceful=False):
    """While it holds, Ctrl-C and SIGTERM end the program and all processes that it has started, with one line and code 130; so
    does an error of the disk, with code 1.

    graceful: the first signal only sets stop_flag, so that training finishes its step and saves; the second one ends it.
    """
    me = os.getpid()

    def stop(number, frame):
        if os.getpid() != me:  # a forked process
            os._exit(130)
        words = "stopped; rerun the same command to resume"
        if settings.resume == "never":
            words = "stopped; rerun the same command without --resume never to resume"
        first = graceful and not stop_flag.value
        if os.environ.get("RANK", "0") == "0":
            words = "stopping after this step (again: at once)" if first else words
            os.write(2, f"\n{words}\n".encode())  # print may be busy just now
        if first:
            stop_flag.value = 1
            return
        for process in sorted(multiprocessing.active_children(), key=lambda process: -process.pid):  # rank 0, their server, last
            process.kill()
        os._exit(130)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (OSError, FloatingPointError) as error:
        raise SystemExit(f"\n{error_text(error, settings)}") from None  # a new line: there may be a progress bar
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------
# 4. Data
# ------------------------------------------------------------------------------------------------

HELD_OUT = 0.02  # share of the rooms that is never trained on, where the data has no heldout/ folder


def room_of(path, data=""):
    """The room that a picture shows: the name of its folder, or of a file directly in images/ or in the folder `data`. ScanNet's
    scene0011_00 and scene0011_01 are two scans of one room, scene0011."""
    path = Path(path)
    alone = path.parent.name == "images" or data and str(path.parent) == os.path.realpath(data)
    return re.sub(r"^(scene\d{4})_\d\d$", r"\1", path.stem if alone else path.parent.name)


def held_out_rooms(settings):
    """The rooms that are scored and never trained on: those of the heldout/ folder, or HELD_OUT of all rooms in the data's files.

    They depend on the data alone, so that they are the same in every stage and with every --seed. Empty with --eval_scenes 0,
    and if there is only one room.
    """
    data, rooms, real = Path(settings.data), set(), lru_cache(None)(os.path.realpath)
    if not settings.eval_scenes:
        return rooms
    has_folder = (data / "heldout").is_dir()
    data = data / "heldout" if has_folder else data
    folder = lru_cache(None)(lambda name: common.picture_folder(data, name))
    for path in dict.fromkeys(common.data_file(data, kind) for kind in common.FILES):
        for row in common.read_jsonl(path) if path.is_file() and path.stat().st_size else []:
            for image in [row["image"]] if isinstance(row.get("image"), str) else row.get("image") or []:
                picture = folder(str(image)) / str(image)
                rooms.add(room_of(Path(real(picture.parent)) / picture.name, data))
    count = len(rooms) if has_folder else max(1, round(HELD_OUT * len(rooms))) if len(rooms) > 1 else 0
    return set(random.Random(0).sample(sorted(rooms), count))


def training_scenes(settings, kinds, backbone):
    """The scenes of `settings.data` with their rows of `kinds` (keys of common.FILES), without those of held_out_rooms."""
    rooms = held_out_rooms(settings)
    scenes = common.load_scenes(settings.data, kinds, backbone, getattr(settings, "types", ()))
    kept = [scene for scene in scenes if not rooms & {room_of(path, settings.data) for path in scene.images}]
    if rooms:
        print0(f"{len(kept)} training scenes; left out: {len(scenes) - len(kept)} scenes of {len(rooms)} held-out rooms")
    return kept


def held_out_scenes(settings, kinds, backbone):
    """At most `settings.eval_scenes` scenes to score during training, the same ones each time: from the heldout/ folder, or
    from held_out_rooms."""
    folder, rooms = Path(settings.data) / "heldout", held_out_rooms(settings)
    if not settings.eval_scenes or not (rooms or folder.is_dir()):
        return []
    data = folder if folder.is_dir() else settings.data
    scenes = common.load_scenes(data, kinds, backbone)
    scenes = [scene for scene in scenes if rooms & {room_of(path, data) for path in scene.images}]
    return random.Random(0).sample(scenes, min(settings.eval_scenes, len(scenes)))


def answer_batches(backbone, scenes, mode, max_new_tokens, temperature=0.0, eval_batch=128, keep=False, seed=None, skip=None):
    """Ask every example of `scenes` in a mode of INSTRUCTIONS ("locate" examples always in theirs).

    The pictures of a scene are read and encoded once for all its questions; those of the next batch are read while the model
    works on this one. eval_batch: questions answered at once. Yields (scenes, texts), a list of texts for each scene.
    With a seed, the samples of a batch depend only on it and on the batch. Batches for which skip(scenes) is true are left out.
    """
    parts, asked = [], eval_batch
    for scene in scenes:
        if asked + len(scene.examples) > eval_batch:
            parts.append([])
            asked = 0
        parts[-1].append(scene)
        asked += len(scene.examples)
    parts = [part for part in parts if not (skip and skip(part))]
    if not parts:
        return

    def read(part):
        return [common.scene_patches(backbone, scene) for scene in part]

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, parts[0])
        for part, following in zip(parts, [*parts[1:], []]):
            patches = ahead.result()
            ahead = reader.submit(read, following)
            branches = []
            for scene in part:
                texts = [common.prompt_text(e, "locate" if e.question_type == "locate" else mode) for e in scene.examples]
                branches.append([list(common.encode_text(backbone.tokenizer, text + common.BRANCH_END)) for text in texts])
            with torch.no_grad():
                prefixes = common.encode_scenes(backbone, part, keep, patches)
            if seed is not None:
                torch.manual_seed(zlib.crc32(f"{seed} {part[0].examples[0].id}".encode()))
            answers = common.branch_generate(backbone, prefixes, branches, max_new_tokens, temperature)
            yield part, [[common.decode(backbone, completion) for completion in ids] for ids in answers]


def generate_answers(backbone, scenes, mode, max_new_tokens, temperature=0.0, eval_batch=128, keep=False):
    """answer_batches for all scenes, shared by the processes.

    Returns examples and texts, two lists in the same order, the same in every process.
    """
    batches = answer_batches(backbone, share(scenes), mode, max_new_tokens, temperature, eval_batch, keep)
    texts = gather([some for _, texts in batches for some in texts])
    return [e for scene in scenes for e in scene.examples], [text for group in texts for text in group]


# ------------------------------------------------------------------------------------------------
# 5. Runs
# ------------------------------------------------------------------------------------------------

FREE = ("out", "max_steps", "resume", "processes", "track", "cuda_graph", "digests")  # may change when a run is resumed
MOST_SKIPPED = 5  # steps in a row without a finite gradient that end the run


def digest(paths):
    """A short name for the contents of files; "" if none exists. A folder counts with the names and sizes of its files, a file
    above 64 MB with its size and 1,000 pieces."""
    out, paths = hashlib.sha256(), [Path(path) for path in paths if Path(path).exists()]
    for path in paths:
        listing = [(name, os.lstat(f"{top}/{name}").st_size) for top, _, names in sorted(os.walk(path)) for name in sorted(names)]
        size = 0 if path.is_dir() else path.stat().st_size
        out.update(f"{path.name} {size} {listing}".encode())
        for place in range(0, size, max(2**16, size // 1000)):
            with path.open("rb") as file:
                file.seek(place)
                out.update(file.read(2**16))
    return out.hexdigest()[:16] if paths else ""


def model_files(folder):
    """The weights and JSON files of a model; none if the folder has no model."""
    return sorted([*Path(folder).glob("*.json"), *Path(folder).glob("*.safetensors")]) if common.has_model(folder) else []


def run_config(settings, more=()):
    """config.json of a run: the settings, and digests of what it starts from: the model (not of a hub id), the rows of the data
    (with the names and sizes of the pictures), and `more`, {what: paths}."""
    roots = [Path(settings.data), Path(settings.data) / "heldout"]
    rows = [root / name for root in roots for name in (*common.FILES.values(), "objects.jsonl", "images")]
    own = [root for root in roots if common.data_file(root, "spatial").name != common.FILES["spatial"]]
    rows += [path for root in own for path in (common.data_file(root, "spatial"), root)]  # pictures may lie beside the rows
    files = {"model": model_files(settings.model), "data": rows} | dict(more)
    return asdict(settings) | {"digests": {name: digest(paths) for name, paths in files.items()}}


def is_finished(settings, names=None, more=()):
    """Whether the run in `settings.out` has written its model. Raises SystemExit if that was made with other settings (names:
    which are compared; default: all that matter) or from another model or other data. more: as in run_config."""
    folder = Path(settings.out)
    if settings.resume == "never" or not common.has_model(folder / "model"):
        return False
    if (folder / "config.json").is_file():
        made, now = json.loads((folder / "config.json").read_text(encoding="utf-8")), run_config(settings, more)
        refuse_others(folder, made, now, names or [name for name in now | made if name not in FREE])
        if not names and made.get("max_steps") != now["max_steps"]:
            return False
    print0(f"{folder} is finished; --resume never trains it again")
    return True


def refuse_others(folder, made, now, names):
    """Raise SystemExit, naming the first setting that differs, if `folder` was made with other settings. made, now: dicts, such
    as from run_config. What has a digest in both is compared by it: a folder may move, or change under the same name."""
    digests = [some.get("digests", {}) for some in (made, now)]
    known = [name for name in digests[1] if all(some.get(name) for some in digests)]
    for name in dict.fromkeys([*names, *known]):
        old, new = (some.get(name, ...) for some in (digests if name in known else (made, now)))
        if old != new:
            before, after = (f"--{name} {some[name]}" if name in some else f"no --{name}" for some in (made, now))
            what = f"was made with {before}, not {after}. Use the same"
            if before == after:
                what = f"was made before the {name}{f' in {now[name]}' if name in now else ''} changed. Put the old one back"
            raise SystemExit(f"{folder} {what}, or --resume never to start again, or another --out.")


class Run:
    """A training run: its folder, log and checkpoint.

        run = Run(settings, panels)  # resumes from the folder's checkpoint if there is one
        for step in run.steps(steps, backbone, optimizers):
            ...
            run.log({"loss": loss, "grad_norm": norm}, scores, examples)
        run.finish(backbone)
    """

    def __init__(self, settings, panels, more=()):
        """Make the folder and write config.json. panels: {title: [metric, ...]} of curves.png. more: as in run_config.

        Raises SystemExit if the folder has a checkpoint that was made with other settings, or from another model or other data.
        """
        self.settings, self.panels, self.folder = settings, panels, Path(settings.out)
        common.use_instructions(settings.model, settings.instruction)
        self.config = run_config(settings, more)
        self.checkpoint = self.folder / "checkpoint.pt"
        self.scores, self.skipped, self.ended, self.tracker = {}, 0, False, None
        if rank() == 0 and settings.resume not in ("auto", "never") and not self.checkpoint.is_file():
            copy_run(Path(settings.resume), self.folder)
        barrier()
        self.state = self.read_checkpoint() if settings.resume != "never" and self.checkpoint.is_file() else {"step": 0}
        self.first = self.step = self.state["step"]
        barrier()
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("model", "adapter"):  # model/ beside config.json means: finished
                files.remove_folder(self.folder / name)
            files.write_atomic(self.folder / "config.json", json.dumps(self.config, indent=2))
            for name in ("metrics.jsonl", "samples.jsonl"):  # drop what was logged after the checkpoint
                # Not splitlines: a sample may contain a line separator of its own (U+2028).
                lines = (self.folder / name).read_text(encoding="utf-8").split("\n") if (self.folder / name).is_file() else []
                files.write_atomic(self.folder / name, "".join(f"{line}\n" for line in lines if logged_by(line, self.first)))
            if not self.first:
                self.checkpoint.unlink(missing_ok=True)
            self.tracker = start_tracker(settings.track, self.folder) if settings.track != "off" else None

    def steps(self, planned, backbone, optimizers):
        """Yield the numbers of the steps that are left, from 0. planned: steps of the whole schedule.

        Shows the progress bar; seeds every step; saves checkpoints and curves. After a signal it saves and raises
        SystemExit(130).
        """
        if self.first:
            self.restore(backbone, optimizers)
        last = self.first if self.state.get("ended") else min(planned, self.settings.max_steps or planned)
        self.state, self.last = None, last
        self.bar = tqdm(range(self.first, last), initial=self.first, total=last, desc=self.folder.name, disable=rank() > 0)
        for step in self.bar:
            self.step, self.began = step, time.time()
            seed_step(self.settings, step)
            yield step
            stopping = all_reduce([stop_flag.value])[0] > 0
            if (step + 1) % self.settings.save_every == 0 or step + 1 == last or self.ended or stopping:
                self.save(step + 1, backbone, optimizers)
                if rank() == 0:
                    draw_curves(self.folder, self.panels)
            if stopping and step + 1 < last and not self.ended:
                print0(f"stopped after step {step + 1}; rerun the same command to resume from {self.checkpoint}")
                barrier()
                raise SystemExit(130)
            if self.ended:
                break
        self.bar.close()

    def is_eval_step(self):
        """Whether scenes are scored after this step."""
        return (self.step + 1) % self.settings.eval_every == 0 or self.step + 1 == self.last

    def log(self, row, scores=None, examples=()):
        """Append the metrics `row` of this step, and held-out `scores` if there are any, to metrics.jsonl and the bar.

        examples: those of the step, named if row["grad_norm"] is not finite. Raises SystemExit after MOST_SKIPPED such steps.
        """
        self.scores = scores or self.scores
        row = {"step": self.step + 1} | row | {"seconds": time.time() - self.began} | (scores or {})
        self.append("metrics.jsonl", row)
        shown = {name: row[name] for name in ("loss", "reward", "kl") if name in row} | self.scores
        self.bar.set_postfix({name: f"{value:.3f}" if name == "loss" else f"{value:.2f}" for name, value in shown.items()})
        if self.tracker:
            self.tracker.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        self.skipped = 0 if math.isfinite(row["grad_norm"]) else self.skipped + 1
        if self.skipped:
            ids = ", ".join(sorted({example.id for example in examples}))
            print0(f"step {row['step']}: the gradient is not finite; nothing is learnt from {ids}")
        if self.skipped == MOST_SKIPPED:
            raise SystemExit(
                f"{MOST_SKIPPED} steps in a row without a finite gradient, the last one {row['step']}. Lower --lr (and --muon_lr), "
                "or use --load fp32; if it is always the same examples, look at them. The last checkpoint is whole."
            )

    @contextlib.contextmanager
    def check_finite(self):
        """Turn the FloatingPointError of a rollout into one line with the step."""
        try:
            yield
        except FloatingPointError as error:
            advice = "Lower --lr, or use --load fp32. The last checkpoint is whole."
            raise SystemExit(f"step {self.step + 1}: {error}. {advice}") from None

    def log_samples(self, examples, texts, count=4, **columns):
        """Append the first `count` questions, answers and completions to samples.jsonl. columns: further lists to write."""
        for i, example in enumerate(examples[:count]):
            row = {"step": self.step + 1, "question": example.question, "options": example.options, "answer": example.answer}
            self.append("samples.jsonl", row | {"text": texts[i]} | {name: float(column[i]) for name, column in columns.items()})

    def append(self, name, row):
        """Append one JSON line to a file of the run."""
        if rank() == 0:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}  # JSON has no NaN
            try:
                with (self.folder / name).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(finite, ensure_ascii=False) + "\n")
            except OSError as error:
                raise SystemExit(f"{self.folder / name} cannot be written ({error}). The last checkpoint is whole.") from None

    def end(self):
        """Make this step the last one."""
        self.ended = True

    def finish(self, backbone):
        """Write model/ (and adapter/), from rank 0; the others wait for it."""
        if rank() == 0:
            with files.disk_errors(self.folder / "model"):
                files.save_model(backbone, self.folder)
            if self.tracker:
                self.tracker.finish()
        print0(f"wrote {self.folder}/model")
        barrier()

    def save(self, step, backbone, optimizers):
        """Write checkpoint.pt: trained weights (float32), optimizers, step, config. Under another name first, so that a stop at
        any moment leaves a whole one. It needs no random state: every step is seeded by (seed, step, rank)."""
        if rank() > 0:
            return
        weights = {name: master(p).detach().contiguous() for name, p in backbone.model.named_parameters() if p.requires_grad}
        state = {"step": step, "config": self.config, "ended": self.ended, "weights": weights,
                 "optimizers": [o.state_dict() for o in optimizers]}  # fmt: skip
        new = self.checkpoint.with_suffix(".new")
        try:
            torch.save(state, new)
            new.replace(self.checkpoint)
        except (OSError, RuntimeError) as error:  # torch has its own error for a full disk
            new.unlink(missing_ok=True)
            needed = 3 * sum(weight.numel() * weight.element_size() for weight in weights.values())
            whole = f" {self.checkpoint} is whole: rerun the same command to resume from it." if self.checkpoint.is_file() else ""
            raise SystemExit(f"{new} cannot be written ({error}); it needs about {needed:,} bytes. Make room.{whole}") from None

    def read_checkpoint(self):
        """The checkpoint, its tensors still on the disk. Raises SystemExit if it is broken or was made with other settings."""
        with self.checkpoint_errors():
            mapped = sys.platform != "win32"  # there a file cannot be replaced while it is mapped
            state = torch.load(self.checkpoint, map_location="cpu", mmap=mapped, weights_only=True)
            step, made = int(state["step"]), dict(state["config"])
        refuse_others(self.folder, made, self.config, [name for name in self.config | made if name not in FREE])
        print0(f"resuming from step {step} of {self.checkpoint}")
        return state

    def restore(self, backbone, optimizers):
        """Put the checkpoint's weights and optimizer states in place. Raises SystemExit if they belong to another model."""
        with self.checkpoint_errors():
            weights = self.state["weights"]
            if other := sorted({name for name, p in backbone.model.named_parameters() if p.requires_grad} ^ set(weights)):
                raise ValueError(f"it has other weights, such as {other[0]}: it belongs to another model")
            backbone.model.load_state_dict(weights, strict=False)
            for name, parameter in backbone.model.named_parameters():
                if master(parameter) is not parameter:
                    parameter.master.copy_(weights[name])
            for optimizer, state in zip(optimizers, self.state["optimizers"], strict=True):
                optimizer.load_state_dict(state)

    @contextlib.contextmanager
    def checkpoint_errors(self):
        """Turn every error about the checkpoint's contents into one line."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # every part of it has its own errors
            reason = re.split(r"\. |\n", str(error).strip() or repr(error))[0]  # without torch's advice to load it anyway
            raise SystemExit(f"{self.checkpoint} cannot be resumed ({reason}). --resume never starts again.") from None


def seed_step(settings, step):
    """Seed torch for a step and process, so that a resumed run draws the same numbers."""
    torch.manual_seed((settings.seed * 1_000_003 + step) * 64 + rank())


def copy_run(run, folder):
    """Copy checkpoint and logs of another run to `folder`. Raises SystemExit if `run` has no checkpoint."""
    if not (run / "checkpoint.pt").is_file():
        raise SystemExit(f"--resume {run}: that folder has no checkpoint. Use auto, never, or the folder of a run.")
    folder.mkdir(parents=True, exist_ok=True)
    for file in run.glob("*.jsonl"):
        shutil.copy(file, folder)
    shutil.copy(run / "checkpoint.pt", folder / "checkpoint.new")
    (folder / "checkpoint.new").replace(folder / "checkpoint.pt")  # last: a copy that was cut short is made again


def logged_by(line, step):
    """Whether a line of a log is whole and was written at or before `step`. (A killed run may leave half a line.)"""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def start_tracker(name, folder):
    """accelerate's tracker "tensorboard" (writes to `folder`) or "wandb" (its project has the folder's name)."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # its logger asks for it
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](*[folder.name, folder.parent][: 2 if name == "tensorboard" else 1])
        tracker.start()
        return tracker
    except ImportError as error:
        raise SystemExit(f"--track {name}: {error}. Install it with: pip install {name}") from None
