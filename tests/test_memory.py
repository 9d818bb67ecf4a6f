"""The memory budget against a count of every tensor that a step really allocates, and its refusal."""

import re
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TEXTS
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
from support import files, memory, runs, toy_world


class Peak(TorchDispatchMode):
    """Bytes of all tensors alive, and their largest sum so far. `known`: tensors made before."""

    def __init__(self, known):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0
        for tensor in known:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            weakref.finalize(storage, self.drop, storage._cdata)
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def drop(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


def wide_folder(folder, family, section, **text):
    """A model with the proportions of a large one (a wide MLP, grouped heads, many words) in small, in `folder`."""
    tokenizer = toy_world.build_tokenizer(TEXTS)
    model = toy_world.build_model(tokenizer, 0, family)
    config = model.config
    config.text_config.update({"hidden_size": 256, "num_attention_heads": 4, "vocab_size": 4096} | text)
    config.text_config.rope_parameters["mrope_section"] = section
    config.vision_config.update({"out_hidden_size": 256})
    processor = toy_world.build_processor(model)
    common.limit_pictures(processor, 1, 1024)
    for part in (type(model)(config), tokenizer, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Qwen2.5-VL 3B in small."""
    text = {"intermediate_size": 1376, "num_key_value_heads": 1}
    return wide_folder(tmp_path_factory.mktemp("wide"), "qwen2_5_vl", [8, 12, 12], **text)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """Qwen3-VL 4B in small: heads wider than hidden_size / heads."""
    text = {"intermediate_size": 973, "num_key_value_heads": 2, "head_dim": 96}
    return wide_folder(tmp_path_factory.mktemp("wide3"), "qwen3_vl", [16, 16, 16], **text)


@pytest.fixture
def scene(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28 * 8, 28 * 16, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return common.Scene((str(tmp_path / "a.png"),), "single_image", [])


def settings_of(**changes):
    return replace(runs.TrainSettings(), **{"load": "fp32", "warmup": 0.0, "eval_batch": 1} | changes)


def tensors(backbone, optimizers, prefix):
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    states += [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
    parts = [prefix.features, prefix.ids, prefix.positions, *prefix.deepstack] if prefix else []
    return [*backbone.model.parameters(), *backbone.model.buffers(), *states, *parts]


def test_a_picture_that_cannot_be_read_is_named_before_training(folder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    scene = common.Scene((str(tmp_path / "broken.jpg"),), "single_image", [])
    with pytest.raises(SystemExit, match="broken.jpg cannot be read as a picture"):
        memory.scene_length(common.load_backbone(folder, "fp32"), scene)


CASES = [
    ({}, [48] * 8),
    ({}, [180, 30]),
    ({"tune": "full"}, [48] * 8),
    ({"checkpointing": True}, [48] * 8),
    ({"load": "bf16"}, [48] * 8),
    ({"load": "bf16", "checkpointing": True}, [180, 30]),
    ({"load": "bf16", "tune": "full", "max_picture_tokens": 4}, [12]),
    ({"load": "4bit"}, [48] * 8),
    ({"load": "4bit", "checkpointing": True}, [48] * 8),
]


@pytest.mark.parametrize("changes,branches", CASES)
def test_the_budget_is_the_measured_peak_of_a_training_step(folder, scene, changes, branches):
    measure_step(folder, scene, changes, branches)


@pytest.mark.parametrize("changes,branches", [({}, [48] * 8), ({"checkpointing": True}, [180, 30])])
def test_the_budget_holds_for_qwen3_vl(qwen3, scene, changes, branches):
    measure_step(qwen3, scene, changes, branches)


def measure_step(folder, scene, changes, branches):
    """The largest memory of a training step, counted tensor by tensor, against the budget."""
    settings = settings_of(**changes)
    backbone = common.load_backbone(folder, settings.load, max_picture_tokens=settings.max_picture_tokens)
    common.adapt(backbone, settings)
    prefix = common.encode_scenes(backbone, [scene])[0]
    optimizers = runs.make_optimizers(backbone.model, settings)

    def step():
        backbone.model.train()
        for _ in range(2):  # parts of a step: the second finds the gradients of the first
            logps = common.branch_logprobs(backbone, [prefix], [[([], [70] * count) for count in branches]])[0]
            (-logps.mean()).backward()
        runs.optimizer_step(backbone.model, optimizers, settings, 0, 1)

    step()  # the optimizer has its averages from here on
    with Peak(tensors(backbone, optimizers, prefix)) as counted:
        step()
    _, peak = memory.memory_budget(backbone, settings, [len(prefix.ids)], [branches], sum(branches), 1)
    assert peak == pytest.approx(counted.peak, rel=0.1)


@pytest.mark.parametrize("family", ["folder", "qwen3"])
def test_the_budget_is_the_measured_peak_of_a_rollout(family, scene, request):
    folder = request.getfixturevalue(family)
    backbone = common.load_backbone(folder, "fp32")
    backbone.stop = [-1]
    settings = settings_of()
    common.adapt(backbone, settings)
    prefix = common.encode_scenes(backbone, [scene])[0]
    with Peak(tensors(backbone, [], prefix)) as counted:
        common.branch_generate(backbone, [prefix], [[[]] * 64], 16, 1.0)
    parts, peak = memory.memory_budget(backbone, settings, [8], [[8]], 8, len(prefix.ids) + 64 * 16)
    assert peak - parts["optimizer"] == pytest.approx(counted.peak, rel=0.1)  # of which there is none yet


def test_without_room_for_a_merged_copy_decoding_goes_on_without_it(folder, monkeypatch, capsys):
    backbone = common.load_backbone(folder, "fp32")
    settings = settings_of()
    common.adapt(backbone, settings)
    budget = backbone, settings, [8], [[8]], 8, 5000
    parts, peak = memory.memory_budget(*budget)
    matrices = [m.weight for m in common.unwrap(backbone.model).modules() if hasattr(m, "lora_A")]
    assert parts["merged"] == sum(weight.nbytes for weight in matrices) > 1e6
    monkeypatch.setattr(memory, "device_memory", lambda device: peak - 1)
    memory.check_memory(backbone, settings, [(8, [(0, 8)])], 8, 5000)
    assert not backbone.merge_decoding and "no room for a merged copy" in capsys.readouterr().err
    assert memory.memory_budget(*budget)[1] < peak
    prefix = common.Prefix(torch.arange(20, 30), torch.arange(10).expand(3, -1), None, 10)
    assert len(common.branch_generate(backbone, [prefix], [[[]]], 3)[0][0])


@pytest.mark.parametrize("kind,count", [("single_image", 1), ("multi_view", 3), ("video", 4), ("video", 5)])
def test_the_length_of_a_scene_is_known_without_its_pixels(folder, qwen3, tmp_path, kind, count):
    backbone = common.load_backbone(folder, "fp32")
    paths = [str(tmp_path / f"{n}.png") for n in range(count)]
    for path in paths:
        Image.new("RGB", (130, 77)).save(path)
    scene = common.Scene(tuple(paths), kind, [])
    assert memory.scene_length(backbone, scene) == len(common.encode_scenes(backbone, [scene])[0].ids)
    backbone = common.load_backbone(qwen3, "fp32")
    wanted, unknown = len(common.encode_scenes(backbone, [scene])[0].ids), (count + 1) // 2 * 6 * (kind == "video")
    assert wanted <= memory.scene_length(backbone, scene) <= wanted + unknown  # the digits of times


@pytest.mark.parametrize(
    "most,named",
    [("weights", "--load 4bit"), ("optimizer", "--lora_rank"), ("cache", "--eval_batch"), ("activations", "--micro_batch")],
)
def test_what_does_not_fit_is_refused_with_the_setting_to_lower(backbone, monkeypatch, capsys, most, named):
    parts = {name: 5e9 if name == most else 2e9 for name in memory.LOWER} | {"merged": 0.0}
    monkeypatch.setattr(memory, "memory_budget", lambda *_: (parts, sum(parts.values())))
    monkeypatch.setattr(memory, "device_memory", lambda device: 11.5e9)
    memory.check_memory(backbone, settings_of(), [(9, [(1, 1)])], 1)
    assert re.search(r"weights \d,000, .* at most 11,000 of 11,500", capsys.readouterr().err)
    monkeypatch.setattr(memory, "device_memory", lambda device: 10e9)
    with pytest.raises(SystemExit, match=re.escape(named)):
        memory.check_memory(backbone, settings_of(), [(9, [(1, 1)])], 1)


def test_the_memory_of_a_cpu_is_what_is_free_and_what_we_have(monkeypatch, tmp_path):
    """Pages that are mapped from files are free memory already: 268 MB of them, all read, must not count again."""
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(2**28)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=4e9, total=100e9))
    before = memory.device_memory(torch.device("cpu"))
    resident = memory.psutil.Process().memory_info().rss
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=2**28, dtype=torch.uint8)
    assert mapped[::4096].sum() == 0 and memory.psutil.Process().memory_info().rss - resident > 2.6e8
    assert memory.device_memory(torch.device("cpu")) == pytest.approx(before, abs=5e7)
    ours = torch.ones(300_000_000, dtype=torch.uint8)
    assert memory.device_memory(torch.device("cpu")) == pytest.approx(before + ours.nbytes, abs=5e7)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=4e9, total=4.1e9))
    assert memory.device_memory(torch.device("cpu")) == 4.1e9  # never more than there is
    monkeypatch.setattr(runs, "world_size", lambda: 2)
    assert memory.device_memory(torch.device("cpu")) == 2.05e9


# Groups of processes with limits of their own: (lines of /proc/self/cgroup, files, cores of 64, GB of 100)
UNLIMITED = {"a/cpu.max": "max 100000\n", "a/memory.max": "max\n"}
GROUPS = {
    "none": ("0::/\n", {}, 64, 100),
    "version 2, no limit": ("0::/a\n", UNLIMITED, 64, 100),
    "version 2": ("0::/a\n", {"a/cpu.max": "400000 100000\n", "a/memory.max": "3000000000\n"}, 4, 3),
    "version 2, a group above": (
        "0::/job/step/task\n",
        {"job/cpu.max": "250000 100000\n", "job/step/cpu.max": "max 100000\n", "job/memory.max": "5000000000\n",
         "job/step/memory.max": "7000000000\n", "other/memory.max": "1\n"}, 3, 5,
    ),
    "version 2, seen from inside a container": ("0::/\n", {"cpu.max": "50000 100000\n", "memory.max": "2000000000\n"}, 1, 2),
    "version 1": (
        "5:memory:/job\n4:cpu,cpuacct:/job\n3:pids:/other\n0::/\n",
        {"cpu/job/cpu.cfs_quota_us": "200000\n", "cpu/job/cpu.cfs_period_us": "100000\n", "cpu/cpu.cfs_quota_us": "-1\n",
         "cpu/cpu.cfs_period_us": "100000\n", "memory/job/memory.limit_in_bytes": "4000000000\n",
         "memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/other/memory.limit_in_bytes": "1\n"}, 2, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_cores_and_memory_are_those_that_the_system_grants(name, monkeypatch, tmp_path):
    lines, written, cores, granted = GROUPS[name]
    for path, text in written.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "mine").write_text(lines)
    monkeypatch.setattr(runs, "CGROUPS", tmp_path)
    monkeypatch.setattr(runs, "PROCESS", tmp_path / "mine")
    monkeypatch.setattr(runs.os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=99e9, total=100e9))
    monkeypatch.setattr(memory.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=9e9, shared=0)))
    assert runs.usable_cores() == cores and memory.device_memory(torch.device("cpu")) == granted * 1e9


@pytest.mark.parametrize("processes, wanted", [(1, 3), (2, 1), (8, 1)])
def test_the_threads_of_torch_are_the_usable_cores(processes, wanted, monkeypatch):
    """Also where there is one process: torch itself starts a thread for every core of the node."""
    seen = []
    monkeypatch.setattr(runs, "usable_cores", lambda: 3)
    monkeypatch.setattr(runs.os, "environ", {"WORLD_SIZE": str(processes)})
    monkeypatch.setattr(runs.dist, "init_process_group", seen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    runs.join_processes(runs.TrainSettings())
    assert seen[0] == wanted


def test_a_4bit_model_is_merged_without_a_second_model_in_memory(folder, tmp_path, monkeypatch):
    """Beside the 4-bit model there is one shard, of 2 MB, and one matrix in float32, with its update."""
    backbone = common.load_backbone(folder, "4bit")
    common.adapt(backbone, settings_of(load="4bit"))
    monkeypatch.setattr(files, "SHARD", 2_000_000)
    largest = 4 * 256 * 1376  # bytes of the largest matrix in float32
    with Peak(tensors(backbone, [], None)) as counted:
        before = counted.now
        files.save_model(backbone, tmp_path)
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in shards) > 10_000_000 and len(shards) > 3
    assert counted.peak - before < 2_000_000 + 5 * largest


def test_the_largest_packs_of_a_micro_batch_are_budgeted(backbone, monkeypatch):
    """Prefix and pairs together decide which packs are the largest; the longest prefix decides about the cache."""
    seen = []
    monkeypatch.setattr(memory, "memory_budget", lambda *args: (seen.append(args[2:]), ({"weights": 1.0}, 1.0))[1])
    lengths = [(50, [(1, 2)]), (9, [(10, 20), (10, 30)]), (40, [(3, 4), (5, 6)]), (5, [(1, 1)])]
    memory.check_memory(backbone, settings_of(micro_batch=2, eval_batch=7), lengths, 100)
    assert seen == [([40, 9], [[7, 11], [30, 40]], 60, 7 * 150)]
