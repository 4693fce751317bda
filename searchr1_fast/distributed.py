"""Ranks and collectives: one process per GPU, all of them running the same program.

One rank is plain Python and joins no process group (unless its compute type differs from its master weights, see
`shard`); N ranks are started by torchrun, on one node or many, with gloo on the CPU and NCCL on GPUs. Every collective
here is a no-op on one rank, so callers never ask how many there are. Host-side values (counts, trajectories, flags)
travel over gloo even where gradients travel over NCCL, so no GPU synchronisation hides in them.

Left out: tensor and pipeline parallelism; FSDP2 over data-parallel ranks carries the model sizes this is for.
"""

from __future__ import annotations

import atexit
import gc
import os
import random
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numba
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

# Ranks wait for the slowest rollout of a step; a remote retriever that retries can take minutes.
COLLECTIVE_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # for the collectives; None: the default one

    def apart(self) -> Ranks:
        """The same ranks over a gloo group of their own, which another thread may use while the main thread uses the
        default group. A collective."""
        if self.world_size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one to write logs and checkpoint manifests."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            self.sum(0)  # an all-reduce on the host; dist.barrier would take the GPU's backend

    def sum(self, value: float) -> float:
        """Sum of a host number over ranks, in fp64."""
        return float(self.all_reduce(torch.tensor(value, dtype=torch.float64)))

    def max(self, value: float) -> float:
        """Maximum of a host number over ranks."""
        return float(self.all_reduce(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MAX))

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce in place, and return the tensor."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op, group=self.group)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (picklable), in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def share(self, items: list[Any]) -> list[Any]:
        """This rank's part of a list that every rank holds: items rank, rank + world_size, …"""
        return items[self.rank :: self.world_size]

    def unshare(self, mine: list[Any]) -> list[Any]:
        """The inverse of `share` after each rank has replaced its items: the whole list, in the original order."""
        parts = self.gather(mine)
        merged: list[Any] = [None] * sum(len(part) for part in parts)
        for rank, part in enumerate(parts):
            merged[rank :: self.world_size] = part
        return merged


@contextmanager
def process(device: str = "auto", num_threads: int = 0, seed: int = 0) -> Iterator[Ranks]:
    """Join the process group that torchrun's environment describes, seed every generator, and leave on a clean exit.

    Within this context, CPU arithmetic of the whole process flushes denormal numbers to zero.

    device: `auto` (CUDA if available), `cpu` or `cuda`. Raises ValueError if `cuda` is asked for and not available. A
    group that the caller has already joined is used, and left alone.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    # Confident attention leaves probabilities below 1e-38, on which a CPU is so slow that a step of pretrain-base took
    # 5 s of CPU time; without them it takes 0.4 s (AMD EPYC, 2026-11-24). Set before any pool of threads is made,
    # because threads inherit it.
    flushed_before = not torch.tensor(1e-39).mul(1.0)
    torch.set_flush_denormal(True)
    num_threads = num_threads or torch.get_num_threads()  # torchrun's or the user's; numba alone would take every core
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    # After numba: its OpenMP layer, when it starts, tells the runtime that it shares with torch to use every core. Two
    # ranks of two threads on two cores then spin at every barrier, waiting for each other.
    torch.set_num_threads(num_threads)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    is_ours = not dist.is_initialized()
    if world_size > 1 and is_ours:
        dist.init_process_group(_backend(place), rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    is_failing = True
    try:
        yield Ranks(rank, world_size, place)
        is_failing = False
    finally:
        # After a failure the peers may be inside a collective that will never finish. Destroying the group could wait
        # for them for ever: leave it to the operating system, exit non-zero, and let torchrun stop them.
        if is_ours and dist.is_initialized() and not (is_failing and world_size > 1):
            dist.destroy_process_group()
            atexit.unregister(_end_groups)  # once, whatever the number of calls
            atexit.register(_end_groups)
        torch.set_flush_denormal(flushed_before)


def _end_groups() -> None:
    """Let gloo's threads end before the interpreter does.

    They live as long as their group, destroyed or not; every mesh holds its groups, and DTensor's caches hold meshes. A
    thread that is the last to own a tensor of a collective asks for the interpreter's lock. If the interpreter is
    ending by then, this aborts the process ("terminate called without an active exception"), and torchrun reports a
    completed run as failed.
    """
    for mesh in [thing for thing in gc.get_objects() if type(thing) is DeviceMesh]:
        mesh._pg_registry.clear()  # no public way in torch 2.11 to 2.13
    gc.collect()  # what is left of the run, with its groups


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    ranks: Ranks,
    dtype: torch.dtype,
    reshard_after_forward: bool = True,
    whole: Collection[nn.Parameter] = (),
) -> None:
    """Shard each block and then the rest of `module` over all ranks, in place, with FSDP2; master weights and
    reductions are fp32. Parameters in `whole` are left alone.

    With one rank and an fp32 compute type there is nothing to shard or cast, and the module stays as it is. One rank
    computing in bf16 takes this path too (a group of one), so that mixed precision has one implementation. The rest of
    the module, embedding and head, stays gathered from a forward pass to its backward pass in any case.
    """
    if ranks.world_size == 1 and dtype == torch.float32:
        return
    mesh = _mesh(ranks)
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard_after_forward)
    fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=set(whole) or None)


def reshard(module: nn.Module) -> None:
    """Free the gathered parameters that a forward pass without a backward leaves behind."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def before_backward(module: nn.Module, *, reshard_after: bool, reduce_after: bool) -> None:
    """Set whether the next backward pass frees the gathered parameters, and whether it adds up gradients over ranks.

    If it does not add them up, every rank keeps the whole gradient, in fp32, and adds to it.
    """
    if isinstance(module, FSDPModule):
        module.set_reshard_after_backward(reshard_after)
        module.set_requires_gradient_sync(reduce_after)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor behind a shard (a collective); a plain tensor is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy sharded fp32 parameters into a whole replica by name, except those that it shares; they are cast before they
    travel. A collective."""
    replicas = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        if replicas[name] is not parameter:
            replicas[name].copy_(full(parameter.detach().to(replicas[name].dtype)))


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but torch sees no GPU; set run.device=cpu or install a CUDA build of torch")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} here); "
            f"start torchrun with --nproc-per-node={torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _mesh(ranks: Ranks) -> DeviceMesh:
    if not dist.is_initialized():  # one rank, mixed precision
        dist.init_process_group(_backend(ranks.device), store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(ranks.device.type, (ranks.world_size,))
