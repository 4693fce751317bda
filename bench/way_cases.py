"""The same call with switches set differently: what each costs or saves, in one run on one machine.

For a GPU: on a CPU the switches have no effect.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from kernel_case import OURS, Case, Provider
from searchr1_kernels import PolicyLoss, gae, linear_policy_loss

Switch = tuple[ModuleType, str, Any]  # module, name, value


def switched(run: Callable[[], Any], *switches: Switch) -> Callable[[], Any]:
    """Return `run` with the switches set while it runs."""

    def wrapped() -> Any:
        before = [getattr(module, name) for module, name, _ in switches]
        for module, name, value in switches:
            setattr(module, name, value)
        try:
            return run()
        finally:
            for (module, name, _), value in zip(switches, before, strict=True):
                setattr(module, name, value)

    return wrapped


def head_ways_case(hidden, weight, targets, rows, bare: Callable[[], None], shape: dict[str, Any]) -> Case:
    """`linear_policy_loss` and both gradients: hidden [N,H], weight [V,H], targets [N], rows [n] that count."""
    from searchr1_kernels import _linear_chunks, _linear_gradient_triton, _linear_sums, _scaling

    objective, zeros = PolicyLoss(kind="reinforce"), torch.zeros(len(rows), device=hidden.device)

    def run(factor: float = 1.0) -> tuple[torch.Tensor, ...]:
        loss, _ = linear_policy_loss(
            hidden[rows], weight, targets[rows], zeros, zeros + 1, loss=objective, denominator=float(len(rows))
        )
        return loss.detach() * factor, *torch.autograd.grad(loss * factor, (hidden, weight))

    copied: Switch = (_scaling, "IN_PLACE", False)
    normalized: Switch = (_linear_gradient_triton, "SCALE_ROWS", False)
    library: Switch = (_linear_chunks, "OWN_PRODUCTS", False)
    longer: Switch = (_linear_chunks, "_KEPT_BYTES", 2 * _linear_chunks._KEPT_BYTES)
    summed: Switch = (_linear_sums, "ROUNDED_SUMS", 1)  # so also twice as long, where they are more than one
    ways = {
        OURS: (),
        "gradients copied by the backward pass": (copied,),
        "every row normalized": (normalized,),
        "both": (copied, normalized),
        "both, a library's products": (copied, library),
        "chunks twice as long": (longer,),
        "the same, summed in fp32": (summed,),
    }
    providers = {name: Provider(switched(run, *switches)) for name, switches in ways.items()}
    providers["ours, the loss times 3"] = Provider(
        switched(lambda: run(3.0)), lambda output: tuple(tensor.float() / 3.0 for tensor in output)
    )
    providers["bare products"] = Provider(bare, None)
    num_rows, (vocabulary, width) = len(rows), weight.shape
    return Case("head_ways", shape, providers, flops=6.0 * num_rows * width * vocabulary)


def gae_ways_case(inputs: tuple[torch.Tensor, ...], options: dict[str, Any], shape: dict[str, Any]) -> Case:
    """`gae` of rewards [N], values [N], cu_seqlens [S+1]."""
    from searchr1_kernels import _gae_triton

    def warps(number: int) -> Switch:
        return _gae_triton, "NUM_WARPS", number

    launcher: Switch = (_gae_triton, "LAUNCH_DIRECTLY", False)
    longer: Switch = (_gae_triton, "TILE", 1024)
    early: Switch = (_gae_triton, "OVERLAP", True)
    ways = {
        OURS: (),
        "through Triton's launcher": (launcher,),
        "a program per tile": ((_gae_triton, "_LONG", 0),),
        "a program per sequence": ((_gae_triton, "_LONG", 1 << 40),),
        "2 warps": (warps(2),),
        "8 warps": (warps(8),),
        "tiles of 1,024": (longer,),
        "tiles of 1,024, 8 warps": (longer, warps(8)),
        "the second launch begins early": (early,),
        "the same, tiles of 1,024": (early, longer),
    }
    providers = {
        name: Provider(switched(lambda: gae(*inputs, **options), *switches)) for name, switches in ways.items()
    }
    return Case("gae_ways", shape, providers, bytes=17.0 * len(inputs[0]))
