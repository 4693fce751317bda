"""What leaves the GPU between its uses (`model.offload`), either to page-locked host memory or by being freed.

    reference   scores in one phase of a step and is frozen: its weights wait on the host, and a fetch is one copy
    replica     generates, and is written anew after every update: in between its memory is free, and nothing is copied
    optimizer   Adam's moments pass through the GPU in pieces during an optimizer step (host_adamw.py)

Tensors keep their identity, also for FSDP: the memory under them is taken away and given back
(`UntypedStorage.resize_`, as FSDP does with gathered weights). While it is away, nothing may read them.

FSDP's own CPUOffloadPolicy is not used. It would copy weights to the GPU for every gather, twice per micro-batch, and
gradients to the host after every micro-batch; it would take the optimizer's step on the CPU; and it would leave a
single fp32 rank, which nothing shards, as it is. Here everything moves once per step and the arithmetic stays on the
GPU, so results are the same bit for bit. Master weights and gradients stay on the GPU; more ranks make them smaller.

On a CPU there is nowhere to go, so `leaves` is False and nothing is moved.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from searchr1_fast.host_memory import host_memory


def leaves(device: torch.device) -> bool:
    """Whether tensors that are not in use can leave this device. Tests make it True for a CPU."""
    return device.type == "cuda"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class DeviceMemory:
    """The memory under a module's parameters, which others may have for a time. Its contents are lost.

    Memory that it shares with parameters of `beside` stays: a module that is in use never loses its memory.
    """

    def __init__(self, module: nn.Module, beside: nn.Module) -> None:
        self._module, self._beside = module, beside
        self._away: list[tuple[torch.UntypedStorage, int]] = []  # with their bytes

    @property
    def is_away(self) -> bool:
        """Whether the memory was released, and not restored since."""
        return bool(self._away)

    @torch.no_grad()
    def release(self) -> None:
        """Give the memory away."""
        if not self.is_away:
            # Looked up each time: FSDP replaces a shard that it has to pad, at the first forward pass.
            in_use = _storages(self._beside)
            storages = [one for address, one in _storages(self._module).items() if address not in in_use]
            if storages:
                self._leave(storages)
            self._away = [(storage, storage.nbytes()) for storage in storages]
            for storage in storages:
                storage.resize_(0)

    @torch.no_grad()
    def restore(self) -> None:
        """Allocate the memory again, perhaps at other addresses. If there is not enough (torch.OutOfMemoryError), all
        of it stays away."""
        try:
            for storage, num_bytes in self._away:
                storage.resize_(num_bytes)
        except RuntimeError:
            for storage, _ in self._away:
                storage.resize_(0)
            raise
        away, self._away = self._away, []
        if away:
            self._return([storage for storage, _ in away])

    def _leave(self, storages: list[torch.UntypedStorage]) -> None:
        """Called before the memory is given away."""

    def _return(self, storages: list[torch.UntypedStorage]) -> None:
        """Called once it is there again."""


class FrozenWeights(DeviceMemory):
    """A frozen module's weights: always on the host, and on the device only inside `with`, which may be nested."""

    def __init__(self, module: nn.Module, beside: nn.Module) -> None:
        super().__init__(module, beside)
        self._host: torch.Tensor | None = None  # [bytes] uint8
        self._copied: list[torch.UntypedStorage] = []  # the storages that the host's copy is of
        self._depth = 0
        self.release()

    def __enter__(self) -> None:
        self.restore()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.release()

    def _leave(self, storages: list[torch.UntypedStorage]) -> None:
        if len(storages) == len(self._copied) and all(a is b for a, b in zip(storages, self._copied, strict=True)):
            return  # the copy stays valid: the weights are frozen
        device = storages[0].device
        self._host, self._copied = host_memory(sum(storage.nbytes() for storage in storages), device), storages
        for storage, part in zip(storages, self._parts(storages), strict=True):
            part.copy_(_bytes_of(storage))

    def _return(self, storages: list[torch.UntypedStorage]) -> None:
        for storage, part in zip(storages, self._parts(storages), strict=True):
            _bytes_of(storage).copy_(part, non_blocking=True)

    def _parts(self, storages: list[torch.UntypedStorage]) -> tuple[torch.Tensor, ...]:
        """The parts of the host's copy, one for each storage."""
        return self._host.split([storage.nbytes() for storage in storages])


def _storages(module: nn.Module) -> dict[int, torch.UntypedStorage]:
    """The storages under a module's parameters, by address, each once; not those that are empty or away."""
    storages = (local(parameter).untyped_storage() for parameter in module.parameters())
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:  # [bytes] uint8
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
