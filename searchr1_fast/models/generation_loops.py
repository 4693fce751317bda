"""The operators of generation.py on a CPU without their way in: the compiled loops, called on memory as it lies.

A step of a small model calls each some times, and between two calls attention reads more keys and values than any
cache holds, so that what the interpreter needs to check arguments and to take tensors apart comes from memory again.
Here that is done once a step, or not at all.

Shape legend
    T  new tokens    D  hidden size    I  MLP size    H, G  query, key/value heads    d  head size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from searchr1_kernels import _generation_numba as loops
from searchr1_kernels._numba_numbers import as_array

if TYPE_CHECKING:
    from searchr1_fast.models.decoder import Block, CachedContext, Model, RMSNorm


class CompiledLoops:
    """The loops, and those of their arguments that are the same for all layers of a step."""

    def __init__(self, context: CachedContext) -> None:
        self._memory = context.cache
        self._angles = tuple(x[:, 0].numpy() for x in (context.cos, context.sin))  # [T, d] each
        self._targets = context.blocks.numpy(), context.places.numpy()  # [T] each

    @classmethod
    def of(cls, model: Model, x: torch.Tensor, context: CachedContext) -> CompiledLoops | None:
        """None on other devices, and where not all is fp32 or all bf16."""
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
            return None
        norms = [model.norm]
        for block in model.layers:
            norms += [block.input_layernorm, block.post_attention_layernorm]
            if block.self_attn.has_norms:
                norms += [block.self_attn.q_norm, block.self_attn.k_norm]
        types = {context.cache.keys[0].dtype, *(norm.weight.dtype for norm in norms)}
        return cls(context) if types == {x.dtype} else None

    def norm(
        self,
        x: torch.Tensor,  # [T, D]
        added: torch.Tensor | None,  # [T, D]
        module: RMSNorm,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`searchr1_kernels.rms_norm`."""
        output = torch.empty_like(x)
        total = output if added is None else torch.empty_like(x)
        given = [*loops.flat(x), *loops.flat(x if added is None else added)]
        weight, results = _numbers(module.weight), (as_array(output), as_array(total))
        loops.norm_loop(*given, weight, *results, np.float32(module.eps), added is not None)
        return output, x if added is None else total

    def rotary_write(self, block: Block, heads: Sequence[torch.Tensor]) -> torch.Tensor:
        """Query, key and value, [T, n * d] each -> [T, H, d]: `searchr1_kernels.rotary_write`."""
        attention = block.self_attn
        output = torch.empty(len(heads[0]), attention.num_heads, attention.head_dim, dtype=heads[0].dtype)
        norms, eps = [_NO_NUMBERS[output.dtype]] * 2, 0.0
        if attention.has_norms:
            norms, eps = [_numbers(norm.weight) for norm in (attention.q_norm, attention.k_norm)], attention.q_norm.eps
        flat = [part for x in heads for part in loops.flat(x)]
        memory = (as_array(x[block.layer]) for x in (self._memory.keys, self._memory.values))
        places = (*self._angles, *memory, *self._targets)
        loops.rotary_write_loop(*flat, *places, *norms, np.float32(eps), as_array(output))
        return output

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """[T, I] each -> [T, I]: `searchr1_kernels.silu_mul`."""
        output = torch.empty(gate.shape, dtype=gate.dtype)
        loops.silu_mul_loop(*loops.flat(gate), *loops.flat(up), as_array(output))
        return output


_NO_NUMBERS = {dtype: as_array(torch.empty(0, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)}


def _numbers(parameter: torch.Tensor) -> np.ndarray:
    return as_array(parameter.detach())
