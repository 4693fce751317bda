"""The operations of `generation` on a CPU, fp32 and bf16: one pass over each token in place of torch's several.

A decoding step of a small model has a few hundred numbers per token and operation. Torch's operators would read and
write them a dozen times, with a call each time. Values are rounded where the operators round.

Rows may have gaps between them, as the parts of one product do; the last dimension is contiguous. The loops take flat
memory and a row distance, because a loop over unknown strides does not become SIMD. Code that calls a loop many times
has these at hand and calls it directly, which takes 1 us; through its operator a call takes 20 to 60 us once the caches
are full of keys (26 to 57 for calls in a row, one core of an Intel Xeon, 2026-11-27).

Shape legend: T tokens, D hidden size, I MLP size, H query heads, G key/value heads, d head size, P blocks of M places.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from searchr1_kernels._numba_numbers import FAST_MATH, LOG2_E, as_array, exp2, may_share_out, narrow, prefetch, widen
from searchr1_kernels._threads import numba_as_torch

_LOG2_E = np.float32(LOG2_E)
_LINE_BYTES = 64  # of a cache line
_TOKENS_AHEAD = 8  # distance in tokens at which places in the KV cache are fetched before they are written


def takes(*tensors: torch.Tensor | None) -> bool:
    """Whether the loops take these tensors, which must all have one type."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        given[0].dtype in (torch.float32, torch.bfloat16)
        and all(x.device.type == "cpu" and x.dtype == given[0].dtype and x.stride(-1) == 1 for x in given)
        and may_share_out()
    )


def norm(
    x: torch.Tensor,  # [T, D]
    residual: torch.Tensor | None,  # [T, D]
    weight: torch.Tensor,  # [D]
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the RMS norm of x + residual, and that sum."""
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = output if residual is None else torch.empty_like(output)
    other = x if residual is None else residual
    rows = (*flat(x), *flat(other))
    numba_as_torch()
    norm_loop(*rows, as_array(weight), as_array(output), as_array(total), np.float32(eps), residual is not None)
    return output, x if residual is None else total


def rotary_write(query, key, value, cos, sin, keys, values, blocks, places, query_norm, key_norm, eps) -> torch.Tensor:
    """Shapes as in `generation.rotary_write` -> [T, H, d]; `keys` and `values` [P, G, M, d] are contiguous."""
    output = torch.empty(query.shape, dtype=query.dtype)
    norms = [key.new_empty(0) if weight is None else weight for weight in (query_norm, key_norm)]
    numba_as_torch()
    rotary_write_loop(
        *flat(query), *flat(key), *flat(value), cos[:, 0].numpy(), sin[:, 0].numpy(), as_array(keys),
        as_array(values), blocks.numpy(), places.numpy(), *(as_array(weight) for weight in norms), np.float32(eps),
        as_array(output),
    )  # fmt: skip
    return output


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [T, I] -> silu(gate) * up [T, I]."""
    output = torch.empty(gate.shape, dtype=gate.dtype)
    numba_as_torch()
    silu_mul_loop(*flat(gate), *flat(up), as_array(output))
    return output


def heads_are_rows(*tensors: torch.Tensor) -> bool:
    """Whether the heads of each token [T, n, d] are contiguous."""
    return all(tensor.stride(1) == tensor.shape[2] or tensor.shape[1] == 1 for tensor in tensors)


def flat(x: torch.Tensor) -> tuple[np.ndarray, int]:
    """x [T, …], each token's numbers contiguous -> all memory from the first to the last, and the tokens' distance."""
    count, distance = x.shape[0], x.stride(0)
    size = x.shape[1] if x.ndim == 2 else x.shape[1:].numel()
    return as_array(x.as_strided(((count - 1) * distance + size if count else 0,), (1,))), distance


# ------------------------------------------------------------------------------------------------------------ the loops


@numba.njit(parallel=True, fastmath=FAST_MATH, cache=True)
def norm_loop(x, x_row, residual, residual_row, weight, output, total, eps, adds):
    """The loop of `norm`. Without `adds`, `residual` and `total` are neither read nor written."""
    num_tokens, size = output.shape
    for t in numba.prange(num_tokens):
        first, second, own = x[t * x_row :], residual[t * residual_row :], total[t]
        squares = np.float32(0.0)
        if adds:
            for i in range(size):
                own[i] = narrow(widen(first[i]) + widen(second[i]), own[i])
            for i in range(size):
                squares += widen(own[i]) * widen(own[i])
        else:
            own = first
            for i in range(size):
                squares += widen(own[i]) * widen(own[i])
        factor = np.float32(1.0) / np.sqrt(squares / np.float32(size) + eps)
        for i in range(size):
            output[t, i] = narrow(widen(own[i]) * factor * widen(weight[i]), output[t, i])


@numba.njit(fastmath=FAST_MATH, inline="always")
def _rotate(head, weight, cos, sin, eps, scratch, output):
    """Normalise one head [d] if there is a weight, and rotate it by the angles."""
    size = len(cos)
    half = size // 2
    for i in range(size):
        scratch[i] = widen(head[i])
    if len(weight):
        squares = np.float32(0.0)
        for i in range(size):
            squares += scratch[i] * scratch[i]
        factor = np.float32(1.0) / np.sqrt(squares / np.float32(size) + eps)
        for i in range(size):
            scratch[i] = widen(narrow(scratch[i] * factor * widen(weight[i]), head[i]))
    for i in range(half):
        output[i] = narrow(scratch[i] * cos[i] - scratch[half + i] * sin[i], output[i])
    for i in range(half):
        rotated = scratch[half + i] * cos[half + i] + scratch[i] * sin[half + i]
        output[half + i] = narrow(rotated, output[half + i])


@numba.njit(parallel=True, fastmath=FAST_MATH, cache=True)
def rotary_write_loop(
    query, query_row, key, key_row, value, value_row, cos, sin, keys, values, blocks, places, query_norm, key_norm,
    eps, output,
):  # fmt: skip
    """The loop of `rotary_write`; cos and sin [T, d]. Where there are no norms, theirs are empty."""
    num_tokens, num_heads, size = output.shape
    for t in numba.prange(num_tokens):
        scratch = np.empty(size, dtype=np.float32)
        ahead = min(t + _TOKENS_AHEAD, num_tokens - 1)
        for g in range(keys.shape[1]):
            for i in range(0, size, _LINE_BYTES // keys.itemsize):
                prefetch(keys[blocks[ahead], g, places[ahead]], i)
                prefetch(values[blocks[ahead], g, places[ahead]], i)
        for h in range(num_heads):
            begin = t * query_row + h * size
            _rotate(query[begin : begin + size], query_norm, cos[t], sin[t], eps, scratch, output[t, h])
        for g in range(keys.shape[1]):
            begin = t * key_row + g * size
            target = keys[blocks[t], g, places[t]]
            _rotate(key[begin : begin + size], key_norm, cos[t], sin[t], eps, scratch, target)
            begin = t * value_row + g * size
            written = values[blocks[t], g, places[t]]
            for i in range(size):
                written[i] = value[begin + i]


@numba.njit(parallel=True, fastmath=FAST_MATH, cache=True)
def silu_mul_loop(gate, gate_row, up, up_row, output):
    """The loop of `silu_mul`."""
    num_tokens, size = output.shape
    for t in numba.prange(num_tokens):
        first, second = gate[t * gate_row :], up[t * up_row :]
        for i in range(size):
            x = widen(first[i])
            silu = x / (np.float32(1.0) + exp2(-x * _LOG2_E))
            output[t, i] = narrow(widen(narrow(silu, output[t, i])) * widen(second[i]), output[t, i])
