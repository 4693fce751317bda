"""Record what host code launches on a GPU, without one, on tensors that have shapes and claim to be on a GPU."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace

import launch_forms
import pytest
import torch
from gpu_operators import OPERATORS
from searchr1_kernels import _gae_triton, _topk_passes
from torch.overrides import TorchFunctionMode
from triton.runtime import jit

from searchr1_fast.models import rope
from searchr1_fast.models.attention_backends import choose_attention

GPU, META = torch.device("cuda", 0), torch.device("meta")
H200 = SimpleNamespace(shared_memory_per_block_optin=232_448, multi_processor_count=132, major=9, minor=0)
MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)


class SayGpu(TorchFunctionMode):
    """Tensors without values, which are on the meta device, claim to be on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.device.__get__:
            return GPU if function(*args).type == "meta" else function(*args)
        if function == torch.Tensor.is_cuda.__get__:
            return args[0].is_meta
        if function is torch.Tensor.get_device:
            return 0 if args[0].is_meta else -1
        if function is torch.Tensor.data_ptr and args[0].is_meta:  # as from an allocator, at multiples of 512 bytes
            return (1 + args[0].untyped_storage()._cdata % 2**20) * 2**40 + args[0].storage_offset() * args[0].itemsize
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            assert function not in (torch.tensor, torch.as_tensor), "a copy from memory that is not pinned waits"
            kwargs["device"] = META
        if function in (torch.repeat_interleave, torch.Tensor.repeat_interleave):
            assert isinstance(args[1], int) or "output_size" in kwargs, "the device would be asked for a length"
        if function is torch.addmm and "out_dtype" in kwargs:  # where torch 2.11 takes the type for a factor
            assert kwargs["out"].shape == (args[1].shape[0], args[2].shape[1]) and args[0] is kwargs["out"]
            return kwargs["out"]
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.to and GPU in args:
            assert args[0].is_meta or kwargs.get("non_blocking"), "a copy to the device waits"
            args = tuple(META if isinstance(x, torch.device) and x == GPU else x for x in args)
        return function(*args, **kwargs)


class Launches(list):
    """Names of the kernels that were launched, in order, and all that Triton would have compiled, by key."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: dict[tuple, launch_forms.Form] = {}
        self._new: set[tuple] = set()

    def add(self, form: launch_forms.Form) -> None:
        self.append(form.kernel.__name__)
        self.forms[form.key] = form
        self._new.add(form.key)

    def take_keys(self) -> set[tuple]:
        """-> keys of what was launched since the last call."""
        keys, self._new = self._new, set()
        return keys


_compiled: set[tuple] = set()  # found without a fault


def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Yield the launches made meanwhile; all of them are compiled at the end."""
    found = Launches()

    def record(kernel, *given, grid, warmup=False, **named):
        parameters = {parameter.name: parameter for parameter in kernel.params}
        values = dict(zip(kernel.arg_names, given, strict=False)) | named
        missing = parameters.keys() - values.keys()
        assert not missing, f"{kernel.__name__} is not given {missing}"
        unknown = values.keys() - parameters.keys() - {"num_warps", "num_stages", "launch_pdl"}
        assert not unknown, f"{kernel.__name__} does not know {unknown}"
        for name, value in values.items():
            constant = isinstance(value, bool | int | float)
            assert constant or (name in parameters and not parameters[name].is_constexpr), f"{kernel.__name__}: {name}"
            if type(value).__name__ == "TensorDescriptor":
                assert max(value.block_shape) <= 256 and value.block_shape[-1] * value.base.itemsize <= 512
            elif isinstance(value, torch.Tensor):
                assert value.is_meta, f"{kernel.__name__}: {name} is in the host's memory"
        for programs, most in zip(grid, MOST_PROGRAMS, strict=False):
            assert 0 < programs <= most, f"{kernel.__name__}: {grid}"
        found.add(launch_forms.form_of(kernel, given, named))

    monkeypatch.setattr(jit.JITFunction, "run", record)
    for module, names in OPERATORS.items():
        module = importlib.import_module(f"searchr1_kernels.{module}")
        for name, implementation in names.items():
            monkeypatch.setattr(module, name, getattr(module, implementation))
    for name, value in {
        "device_of": lambda tensor: contextlib.nullcontext(),
        "get_device_properties": lambda device: H200,
        "get_device_capability": lambda device: (9, 0),
        "mem_get_info": lambda device: (130 << 30, 141 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    forget()
    with SayGpu(), torch.no_grad():
        yield found
    forget()
    new = [form for key, form in found.forms.items() if key not in _compiled]
    faults = [fault for form in new for fault in form.faults()]
    assert not faults, "\n".join(faults)
    _compiled.update(found.forms)


def forget() -> None:
    """Drop what is cached about a device that is not this one."""
    for remembered in (rope._frequencies, choose_attention, _topk_passes._device, _gae_triton._can_overlap):
        remembered.cache_clear()


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def places(count: int) -> torch.Tensor:
    return tensor(count, dtype=torch.int64)


def one_set_of_kernels(launches: Launches, run, counts: tuple[int, ...]) -> None:
    """Require that `run` launches the same kernels for each of the counts."""
    sets = []
    for count in counts:
        launches.take_keys()
        run(count)
        sets.append(launches.take_keys())
    for count, keys in zip(counts, sets, strict=True):
        differing = "\n".join(str(launches.forms[key]) for key in keys ^ sets[0])
        assert not differing, f"{count} and {counts[0]} rows do not have the same kernels:\n{differing}"
