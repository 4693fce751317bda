"""Rollouts as on a GPU, from the buffers that are sent to the tokens that come back.

The engine runs ahead, its steps are recorded, and everything between matrix products is Triton's. Run by
`test_gpu_path` in Triton's interpreter, which must be chosen before Triton is imported; not collected by itself.
"""

from __future__ import annotations

import contextlib
import importlib

import torch
from gpu_operators import OPERATORS
from searchr1_kernels import _cached_attention_triton
from torch.overrides import TorchFunctionMode
from trajectories import check_same

from searchr1_fast.rollout import Engine, SamplingParams, SearchLoop
from searchr1_fast.rollout.decode_graph import DecodeGraphs

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COOL = SamplingParams(temperature=0.5)


class SayGpu(TorchFunctionMode):
    """Tensors claim to be on a GPU, and stay on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.device.__get__:
            return GPU
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if kwargs.pop("out_dtype", None) is not None:  # the operands are fp32
            assert function is torch.mm
        if "device" in kwargs:
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        if function is torch.Tensor.to:
            args = tuple(CPU if isinstance(argument, torch.device) else argument for argument in args)
        return function(*args, **kwargs)


class Event:
    """A stand-in for torch.cuda.Event; on a CPU everything is done at once."""

    def record(self, stream) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


def test_they_are_those_of_the_cpu(make_model, tokenizer, config, make_requests, fake_search, monkeypatch):
    """Sequences share prompts, search, and hand on their slots."""
    changes = {"max_num_seqs": 3, "max_turn_tokens": 6, "max_searches": 1, "max_sequence_tokens": 128}
    config, model = config.model_copy(update=changes), make_model(11, head_dim=16)
    requests = make_requests(5, group_size=3, seed=11)
    expected = SearchLoop(Engine(model, tokenizer, config, COOL), fake_search).run(requests)
    for module, names in OPERATORS.items():
        module = importlib.import_module(f"searchr1_kernels.{module}")
        for name, implementation in names.items():
            monkeypatch.setattr(module, name, getattr(module, implementation))
    for name, stand_in in {
        "device_of": lambda tensor: contextlib.nullcontext(),
        "current_stream": lambda device: None,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    attend, had_tiles = _cached_attention_triton.run, []

    def attend_and_note(*arguments):
        had_tiles.append(arguments[6] is not None)
        attend(*arguments)

    monkeypatch.setattr(_cached_attention_triton, "run", attend_and_note)
    with SayGpu():
        engine = Engine(model, tokenizer, config, COOL, decode_graphs=DecodeGraphs)
        loop = SearchLoop(engine, fake_search)
        found = loop.run(requests)
    check_same(expected, found)
    statistics = loop.statistics
    assert set(had_tiles) == {True, False}
    assert engine._cache.block_size == 64 and statistics.num_discarded_tokens > 0  # as on a GPU, and running ahead
    assert statistics.num_searches > 0 < statistics.num_shared_tokens
    assert 0 < statistics.num_replayed_steps < statistics.num_steps
