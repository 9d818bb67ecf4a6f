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
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

import common
from support import runs, toy_world


class Peak(TorchDispatchMode):
    """Bytes of all tensors alive, and their largest sum so far. `known`: tensors made before."""

    def __init__(self, known):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0
        for tensor in known:
            self.add(tensor)

    def add(self, tensor):
        memory = tensor.untyped_storage()
        if memory._cdata not in self.alive:
            weakref.finalize(memory, self.drop, memory._cdata)
            self.alive[memory._cdata] = memory.nbytes()
            self.now += memory.nbytes()
            self.peak = max(self.peak, self.now)

    def drop(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with the 3B model's proportions (a wide MLP, grouped heads, many words) in small."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = toy_world.build_tokenizer(TEXTS)
    config = toy_world.build_model(tokenizer, 0).config
    config.text_config.update({
        "hidden_size": 256, "intermediate_size": 1376, "num_attention_heads": 4, "num_key_value_heads": 1,
        "vocab_size": 4096,
    })  # fmt: skip
    config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]
    config.vision_config.update({"out_hidden_size": 256})
    processor = Qwen2VLImageProcessorPil(min_pixels=28**2, max_pixels=2**20)
    for part in (Qwen2_5_VLForConditionalGeneration(config), tokenizer, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def scene(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28 * 8, 28 * 16, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return common.Scene((str(tmp_path / "a.png"),), "single_image", [])


def settings_of(**changes):
    return replace(runs.TrainSettings(), **{"load": "fp32", "warmup": 0.0, "eval_batch": 1} | changes)


def tensors(backbone, optimizers, prefix):
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return [*backbone.model.parameters(), *backbone.model.buffers(), *states, prefix.features, prefix.ids, prefix.positions]


def test_a_picture_that_cannot_be_read_is_named_before_training(folder, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    scene = common.Scene((str(tmp_path / "broken.jpg"),), "single_image", [])
    with pytest.raises(SystemExit, match="broken.jpg cannot be read as a picture"):
        runs.scene_length(common.load_backbone(folder, "fp32"), scene)


CASES = [
    ({}, [48] * 8),
    ({}, [180, 30]),
    ({"tune": "full"}, [48] * 8),
    ({"checkpointing": True}, [48] * 8),
    ({"load": "bf16"}, [48] * 8),
    ({"load": "bf16", "checkpointing": True}, [180, 30]),
    ({"load": "4bit"}, [48] * 8),
    ({"load": "4bit", "checkpointing": True}, [48] * 8),
]


@pytest.mark.parametrize("changes,branches", CASES)
def test_the_budget_is_the_measured_peak_of_a_training_step(folder, scene, changes, branches):
    settings = settings_of(**changes)
    backbone = common.load_backbone(folder, settings.load)
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
    _, peak = runs.memory_budget(backbone, settings, [len(prefix.ids)], [branches], sum(branches), 1, 1)
    assert peak == pytest.approx(counted.peak, rel=0.1)


def test_the_budget_is_the_measured_peak_of_a_rollout(folder, scene):
    backbone = common.load_backbone(folder, "fp32")
    backbone.stop = [-1]
    settings = settings_of()
    common.adapt(backbone, settings)
    prefix = common.encode_scenes(backbone, [scene])[0]
    with Peak(tensors(backbone, [], prefix)) as counted:
        common.branch_generate(backbone, [prefix], [[[]] * 64], 16, 1.0)
    parts, peak = runs.memory_budget(backbone, settings, [8], [[8]], 8, 64, len(prefix.ids) + 16)
    assert peak - parts["optimizer"] == pytest.approx(counted.peak, rel=0.1)  # of which there is none yet


@pytest.mark.parametrize("kind,count", [("single_image", 1), ("multi_view", 3), ("video", 4), ("video", 5)])
def test_the_length_of_a_scene_is_known_without_its_pixels(folder, tmp_path, kind, count):
    backbone = common.load_backbone(folder, "fp32")
    paths = [str(tmp_path / f"{n}.png") for n in range(count)]
    for path in paths:
        Image.new("RGB", (130, 77)).save(path)
    scene = common.Scene(tuple(paths), kind, [])
    assert runs.scene_length(backbone, scene) == len(common.encode_scenes(backbone, [scene])[0].ids)


@pytest.mark.parametrize(
    "most,named",
    [("weights", "--load 4bit"), ("optimizer", "--lora_rank"), ("cache", "--eval_batch"), ("activations", "--micro_batch")],
)
def test_what_does_not_fit_is_refused_with_the_setting_to_lower(backbone, monkeypatch, capsys, most, named):
    parts = {name: 5e9 if name == most else 2e9 for name in runs.LOWER}
    monkeypatch.setattr(runs, "memory_budget", lambda *_: (parts, sum(parts.values())))
    monkeypatch.setattr(runs, "device_memory", lambda device: 11.5e9)
    runs.check_memory(backbone, settings_of(), [(9, [(1, 1)])], 1, 1)
    assert re.search(r"weights \d,000, .* at most 11,000 of 11,500", capsys.readouterr().err)
    monkeypatch.setattr(runs, "device_memory", lambda device: 10e9)
    with pytest.raises(SystemExit, match=re.escape(named)):
        runs.check_memory(backbone, settings_of(), [(9, [(1, 1)])], 1, 1)


def test_the_memory_of_a_cpu_is_what_is_free_and_what_we_have(monkeypatch):
    monkeypatch.setattr(runs.psutil, "virtual_memory", lambda: SimpleNamespace(available=4e9))
    ours = runs.psutil.Process().memory_info().rss
    assert runs.device_memory(torch.device("cpu")) == pytest.approx(4e9 + ours, rel=0.05)


def test_the_largest_packs_of_a_micro_batch_are_budgeted(backbone, monkeypatch):
    """Prefix and pairs together decide which packs are the largest; the longest prefix decides about the cache."""
    seen = []
    monkeypatch.setattr(runs, "memory_budget", lambda *args: (seen.append(args[2:]), ({"weights": 1.0}, 1.0))[1])
    lengths = [(50, [(1, 2)]), (9, [(10, 20), (10, 30)]), (40, [(3, 4), (5, 6)]), (5, [(1, 1)])]
    runs.check_memory(backbone, settings_of(micro_batch=2), lengths, 7, 100)
    assert seen == [([40, 9], [[7, 11], [30, 40]], 60, 7, 150)]
