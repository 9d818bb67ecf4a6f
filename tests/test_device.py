"""The path of a GPU, on a machine without one.

FakeTensorMode runs the real code on tensors that have shapes, types and a device "cuda" but no values: a tensor on another
device raises an error, and so does every place where the host would wait for a value (.item(), .tolist(), nonzero).
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers.initialization import no_init_weights

import common

CUDA = torch.device("cuda")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def tiny_model(request, tiny_models):
    """Everything here is asked of both generations."""
    return tiny_models(request.param)


class Indexing(TorchFunctionMode):
    """A few of Python's operators on a fake "cuda" tensor ask for CUDA's device guard, which a CPU build of torch lacks; aten's
    functions do not ask. torch.tensor likewise takes lists there, but no arrays."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.tensor and isinstance(args[0], np.ndarray):
            kwargs = {"dtype": torch.from_numpy(args[0]).dtype} | kwargs
            args = (args[0].tolist(),)
        func = {torch.Tensor.__invert__: torch.bitwise_not, torch.Tensor.copy_: torch.ops.aten.copy_}.get(func, func)
        if func not in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return func(*args, **(kwargs or {}))
        x, key = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(part is ... for part in key):
            place = [part is ... for part in key].index(True)
            rest = x.dim() - sum(part is not None for part in key) + 1
            key = (*key[:place], *[slice(None)] * rest, *key[place + 1 :])
        tensors = []
        for part in key:
            if part is None:
                x = x.unsqueeze(len(tensors))
            elif isinstance(part, int):
                x = x.select(len(tensors), part)
                continue
            elif isinstance(part, slice):
                x = torch.ops.aten.slice(x, len(tensors), part.start, part.stop, part.step or 1)
            tensors.append(part if isinstance(part, torch.Tensor) else None)
        if func is torch.Tensor.__getitem__:
            return torch.ops.aten.index(x, tensors) if any(part is not None for part in tensors) else x
        if any(part is not None for part in tensors):
            return torch.ops.aten.index_put_(x, tensors, args[2])
        return torch.ops.aten.copy_(x, args[2])


@contextlib.contextmanager
def fake_gpu(backbone, monkeypatch=None, lora=False):
    """Inside, a backbone like this one on a fake "cuda": its functions run, but nothing has a value."""
    with FakeTensorMode(allow_non_fake_inputs=False), Indexing():
        with CUDA, no_init_weights():
            model = backbone.family.model._from_config(
                backbone.model.config, attn_implementation={"": "sdpa", "text_config": "branches"}
            )
            if lora:  # on the device from the beginning: fake weights cannot be moved
                monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)
                model = get_peft_model(model, LoraConfig(r=4, target_modules=common.LORA_TARGETS, task_type="CAUSAL_LM"))
        forbidden = torch.zeros(len(backbone.forbidden), dtype=torch.bool, device=CUDA)
        yield SimpleNamespace(model=model, device=CUDA, forbidden=forbidden, stop=[5, 6], merge_decoding=True, cuda_graph=True)


def fake_prefixes(lengths):
    """Prefixes of text only."""
    zeros = [torch.zeros(4, length, dtype=torch.long, device=CUDA) for length in lengths]
    return [common.Prefix(z.select(0, 0), z.narrow(0, 1, 3), None, z.shape[1], "a scene") for z in zeros]


PROMPTS = {"prompts": [[[8, 9], [10]], [[11]]], "a rollout": [[[], []], [[]]], "mixed": [[[8], []], [[11]]]}


@pytest.mark.parametrize("name,temperature", [("prompts", 0.0), ("a rollout", 1.0), ("mixed", 1.0)])
def test_decoding_stays_on_the_gpu_and_never_waits_for_it(backbone, monkeypatch, name, temperature):
    """Prefill, steps, and steps after rows have ended, adapters merged."""
    with fake_gpu(backbone, monkeypatch, lora=True) as gpu, torch.no_grad(), common.merged_layers(gpu):
        state = common.start_decoding(gpu, fake_prefixes([7, 9]), PROMPTS[name], 20, temperature)
        state.width = 12
        for _ in range(2):
            common.decode_step(gpu, state)
        common.keep_rows(state, [1, 2])
        common.decode_step(gpu, state)
        assert state.tokens.shape == (2, 20) and state.tokens.device.type == "cuda"
        assert [part.shape[0] for part in state.cache[0]] == [2, 2, 2, 2]
        common.keep_rows(state, [1])  # the first prefix is not needed any more
        common.decode_step(gpu, state)
        assert [part.shape[0] for part in state.cache[0]] == [1, 1, 1, 1]
        with pytest.raises(DataDependentOutputException):  # so waiting would have been noticed
            state.done.tolist()


@torch.no_grad()
def test_scoring_stays_on_the_gpu_and_never_waits_for_it(backbone, monkeypatch):
    """Without a backward pass: autograd itself needs a real device."""
    with fake_gpu(backbone, monkeypatch, lora=True) as gpu:
        branches = [[([1, 2], [3, 4])], [([], [3] * 5), ([1], [2])]]
        logps, entropy, mask = common.branch_logprobs(gpu, fake_prefixes([7, 9]), branches, chunk=3)
        assert logps.shape == entropy.shape == mask.shape == (3, 5) and logps.device.type == "cuda"


def test_a_tensor_on_the_wrong_device_is_noticed(backbone):
    with fake_gpu(backbone) as gpu:
        gpu.forbidden = torch.zeros(len(backbone.forbidden), dtype=torch.bool)
        with pytest.raises(Exception, match="device"), torch.no_grad():
            common.start_decoding(gpu, fake_prefixes([7]), [[[]]], 4, 0.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_step_compiles_once_without_a_graph_break(backbone, temperature):
    """What can be captured: no jump back to Python (fullgraph), nothing compiled anew for the next token."""
    prefix = common.Prefix(torch.arange(20, 30), torch.arange(10).expand(3, -1), None, 10)
    prefixes = [prefix, common.extend_prefix(prefix, [40])]
    state = common.start_decoding(backbone, prefixes, PROMPTS["prompts"], 8, temperature)
    plain = common.start_decoding(backbone, prefixes, PROMPTS["prompts"], 8, temperature)
    plain.token.copy_(state.token)
    state.width = plain.width = 10
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(common.decode_step, fullgraph=True, backend=counter)
    with torch.no_grad():
        for seed in range(4):
            for function, some in ((step, state), (common.decode_step, plain)):
                torch.manual_seed(seed)
                function(backbone, some)
    assert counter.frame_count == 1
    assert state.tokens[:, 1:5].tolist() == plain.tokens[:, 1:5].tolist()


def test_a_capture_that_fails_is_named_once_and_decoding_goes_on(backbone, monkeypatch, capsys):
    """As on a GPU, on a CPU: the captured step is replayed, and after a failure every step is run."""
    prefix = common.Prefix(torch.arange(20, 30), torch.arange(10).expand(3, -1), None, 10)
    backbone.stop = [-1]
    wanted = common.branch_generate(backbone, [prefix], [[[8], [9]]], 40)
    device, backbone.device = backbone.device, SimpleNamespace(type="cuda")
    real = common.start_decoding

    def start(*args):
        backbone.device = device
        state = real(*args)
        backbone.device = SimpleNamespace(type="cuda")
        return state

    replays = []

    def capture(backbone, state):
        return lambda: replays.append(1) or common.decode_step(backbone, state)

    monkeypatch.setattr(common, "start_decoding", start)
    with monkeypatch.context() as patch:
        patch.setattr(common, "capture_step", capture)
        assert common.branch_generate(backbone, [prefix], [[[8], [9]]], 40) == wanted
        assert len(replays) == 38  # the first token comes from the prefill, the second from the step before the capture
    assert common.branch_generate(backbone, [prefix], [[[8], [9]]], 40) == wanted  # this torch cannot capture
    assert common.branch_generate(backbone, [prefix], [[[8], [9]]], 40) == wanted
    assert backbone.cuda_graph is False and capsys.readouterr().err.count("without a CUDA graph") == 1
