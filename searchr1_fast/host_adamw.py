"""AdamW with its moments in host memory: `model.offload.optimizer`.

The moments of all parameters lie end to end, and pass through the GPU in pieces of equal size during a step. There are
three buffers: one piece arrives while another is updated and a third leaves. The arithmetic is torch's fused AdamW, on
the GPU and element by element, so weights and moments equal those of `torch.optim.AdamW` bit for bit.

The cost is two copies of 8 bytes per parameter and step over the bus, one in each direction. The buffers,
`3 x 8 x PIECE` bytes, are allocated when activations are gone. The CPU computes nothing.

On a CPU device, in tests, the same pieces pass through the same buffers, one after the other.

Shape legend
    M  elements of a rank's parameters, each filled up to a multiple of ALIGNMENT
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from searchr1_fast.host_memory import host_memory
from searchr1_fast.offload import local

PIECE = 1 << 24  # elements: 128 MiB of moments
NUM_BUFFERS = 3  # one arrives, one is updated, one leaves
ALIGNMENT = 32  # elements, so that what a kernel reads at once never spans two parameters


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a parameter whose moments lie in one piece."""

    parameter: int  # its index among all
    begin: int  # in the parameter's elements
    end: int
    offset: int  # in the piece's


class HostAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` of one group, fused, with `exp_avg` and `exp_avg_sq` in host memory and `step` on the device.

    `state` is as in torch, and so are checkpoints: the moments of a sharded parameter are sharded in the same way.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        piece: int = PIECE,
    ) -> None:
        super().__init__(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)
        assert len(self.param_groups) == 1 and piece % ALIGNMENT == 0
        self._parameters: list[torch.nn.Parameter] = self.param_groups[0]["params"]
        self._device = self._parameters[0].device
        starts = [0]
        for parameter in self._parameters:
            starts.append(starts[-1] + -(-local(parameter).numel() // ALIGNMENT) * ALIGNMENT)
        self._starts = dict(zip(self._parameters, starts[:-1], strict=True))
        self._moments = host_memory(2 * 4 * starts[-1], self._device).view(torch.float32).view(2, -1)  # [2, M]
        self._pieces = list(_pieces(self._parameters, starts, piece))
        self._size = min(piece, starts[-1])
        self._mesh = _host_mesh(self._parameters[0])  # a collective
        # Made once: torch keeps the memory that a new stream asks for apart from that of the others.
        self._streams = [torch.cuda.Stream(self._device) for _ in range(2)] if self._device.type == "cuda" else None

    def new_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """AdamW's initial state: zeros, which host memory holds until a step or a checkpoint writes it."""
        first, second = (self._of_parameter(parameter, moment) for moment in self._moments)
        step = torch.zeros((), dtype=torch.float32, device=self._device)
        return {"step": step, "exp_avg": first, "exp_avg_sq": second}

    def wait(self) -> None:
        """Wait until the moments are on the host, before the CPU reads them."""
        if self._streams is not None:
            self._streams[1].synchronize()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step for all parameters that have a gradient. Waits for nothing."""
        assert closure is None
        live = [place for place, parameter in enumerate(self._parameters) if parameter.grad is not None]
        if not live:
            return
        for parameter in (self._parameters[place] for place in live):
            if not self.state[parameter]:
                self.state[parameter] = self.new_state(parameter)
        counts = [self.state[self._parameters[place]]["step"] for place in live]
        before = torch.stack(counts)
        buffers = _Buffers(self._device, self._size, self._streams)
        for begin, end, slices in self._pieces:
            chosen = [one for one in slices if self._parameters[one.parameter].grad is not None]
            if chosen:
                host = self._moments[:, begin:end]
                moments = buffers.bring(host)
                self._update(chosen, moments, dict(zip(live, before.clone(), strict=True)))
                buffers.take(moments, host)
        buffers.finish()
        torch._foreach_add_(counts, 1)

    def _update(
        self,
        slices: list[Slice],
        moments: torch.Tensor,  # [2, elements of the piece] fp32, in place
        counts: dict[int, torch.Tensor],  # by parameter, its steps before this one: copies, which torch increments
    ) -> None:
        """Apply torch's fused AdamW to parts of parameters, viewed as vectors."""
        group = self.param_groups[0]
        parameters = [self._parameters[one.parameter] for one in slices]
        spans = [slice(one.offset, one.offset + one.end - one.begin) for one in slices]
        adamw(
            [local(p).view(-1)[one.begin : one.end] for p, one in zip(parameters, slices, strict=True)],
            [local(p.grad).view(-1)[one.begin : one.end] for p, one in zip(parameters, slices, strict=True)],
            [moments[0, span] for span in spans],
            [moments[1, span] for span in spans],
            [],
            [counts[one.parameter] for one in slices],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _of_parameter(self, parameter: torch.nn.Parameter, moment: torch.Tensor) -> torch.Tensor:
        """A parameter's part of a moment [M], in its shape; sharded if the parameter is, over a mesh of hosts."""
        shape, start = local(parameter).shape, self._starts[parameter]
        part = moment[start : start + shape.numel()].view(shape)
        if not isinstance(parameter, DTensor):
            return part
        return DTensor.from_local(
            part,
            self._mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


class _Buffers:
    """Device memory for the pieces of one step, used in turn. Arriving and leaving pieces have a CUDA stream each."""

    def __init__(self, device: torch.device, size: int, streams: list[torch.cuda.Stream] | None) -> None:
        self._device, self._streams, self._turn = device, streams, 0
        self._memory = torch.empty(NUM_BUFFERS, 2, size, device=device)
        self._left: list[torch.cuda.Event | None] = [None] * NUM_BUFFERS  # when a buffer's last piece was on the host
        if streams is not None:
            for stream in streams:  # work already queued on the device may use this memory, or these moments
                stream.wait_stream(torch.cuda.current_stream(device))

    def bring(self, host: torch.Tensor) -> torch.Tensor:  # [2, n] fp32 both
        """Copy a piece to the device, for the kernels that are queued next."""
        number = self._turn % NUM_BUFFERS
        buffer = self._memory[number, :, : host.shape[1]]
        if self._streams is not None and self._left[number] is not None:
            self._streams[0].wait_event(self._left[number])
        with self._on(0):
            _copy(host, buffer)
        if self._streams is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._streams[0])
        return buffer

    def take(self, buffer: torch.Tensor, host: torch.Tensor) -> None:  # [2, n] fp32 both
        """Copy a piece back to the host, after the kernels that were queued."""
        if self._streams is not None:
            self._streams[1].wait_stream(torch.cuda.current_stream(self._device))
        with self._on(1):
            _copy(buffer, host)
        if self._streams is not None:
            self._left[self._turn % NUM_BUFFERS] = self._streams[1].record_event()
        self._turn += 1

    def finish(self) -> None:
        """Make all later work wait until the last piece has left, so that the buffers may be reused."""
        if self._streams is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._streams[1])

    def _on(self, number: int) -> AbstractContextManager[Any]:
        return nullcontext() if self._streams is None else torch.cuda.stream(self._streams[number])


def _host_mesh(parameter: torch.nn.Parameter) -> DeviceMesh | None:
    """The ranks that share a sharded parameter, as hosts: a DTensor over a mesh of GPUs would be moved to a GPU."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    return mesh if mesh.device_type == "cpu" else DeviceMesh("cpu", mesh.mesh)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy row by row: each row is contiguous on both sides, and so one copy."""
    for one, other in zip(source, target, strict=True):
        other.copy_(one, non_blocking=True)


def _pieces(
    parameters: list[torch.nn.Parameter], starts: list[int], piece: int
) -> Iterator[tuple[int, int, list[Slice]]]:
    """-> [begin, end) of each piece of the moments, and the slices that lie there."""
    ends = [start + local(parameter).numel() for parameter, start in zip(parameters, starts, strict=False)]
    first = 0
    for begin in range(0, starts[-1], piece):
        end = min(begin + piece, starts[-1])
        while ends[first] <= begin and first < len(ends) - 1:
            first += 1
        slices = []
        place = first
        while place < len(ends) and starts[place] < end:
            low, high = max(begin, starts[place]), min(end, ends[place])
            if low < high:
                slices.append(Slice(place, low - starts[place], high - starts[place], low - begin))
            place += 1
        yield begin, end, slices
