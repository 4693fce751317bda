"""Norms, rotation with the write to the cache, and SwiGLU on a GPU: a program per row, per token and head, per piece of
a row. Each reads its inputs once and writes its outputs once, so memory bounds them where there are many tokens, and
the launch where there are few.

Shape legend: T tokens, D hidden size, I MLP size, H query heads, G key/value heads, d head size, P blocks of M places.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_PIECE = 1024  # components of a row of `multiply`


@triton.jit
def normalise(
    x,  # [T, D]
    residual,  # [T, D], read if ADD
    weight,  # [D]
    normed,  # [T, D]
    total,  # [T, D], written if ADD
    x_row, residual_row,  # strides
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """The sum, rounded, and its norm."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BD)
    known = column < D
    value = tl.load(x + row * x_row + column, mask=known, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * residual_row + column, mask=known, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * D + column, rounded, mask=known)
        value = rounded.to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    scale = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    tl.store(normed + row * D + column, (value * root * scale).to(normed.dtype.element_ty), mask=known)


@triton.jit
def rotate_head(source, target, norm, cos, sin, eps, D: tl.constexpr, BP: tl.constexpr, NORM: tl.constexpr):
    """d components from `source` to `target`, normalised if NORM, then rotated; cos, sin: this token's [d]."""
    pair = tl.arange(0, BP)
    known = pair < D // 2
    first = tl.load(source + pair, mask=known, other=0.0).to(tl.float32)
    second = tl.load(source + D // 2 + pair, mask=known, other=0.0).to(tl.float32)
    if NORM:
        root = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D + eps)
        first = first * root * tl.load(norm + pair, mask=known, other=0.0).to(tl.float32)
        second = second * root * tl.load(norm + D // 2 + pair, mask=known, other=0.0).to(tl.float32)
        first = first.to(target.dtype.element_ty).to(tl.float32)
        second = second.to(target.dtype.element_ty).to(tl.float32)
    left = first * tl.load(cos + pair, mask=known, other=0.0) - second * tl.load(sin + pair, mask=known, other=0.0)
    right = second * tl.load(cos + D // 2 + pair, mask=known, other=0.0)
    right += first * tl.load(sin + D // 2 + pair, mask=known, other=0.0)
    tl.store(target + pair, left.to(target.dtype.element_ty), mask=known)
    tl.store(target + D // 2 + pair, right.to(target.dtype.element_ty), mask=known)


@triton.jit
def rotate_and_write(
    query,  # [T, H, d]
    key,  # [T, G, d]
    value,  # [T, G, d]
    cos,  # [T, d] fp32
    sin,  # [T, d] fp32
    keys,  # [P, G, M, d]
    values,  # [P, G, M, d]
    blocks,  # [T] int64
    places,  # [T] int64
    query_norm,  # [d], read if NORM
    key_norm,  # [d], read if NORM
    output,  # [T, H, d]
    query_token, key_token, value_token, angle_token,  # strides
    key_block, key_head, key_place, value_block, value_head, value_place,  # strides
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BP: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """A head of a token: of the query to `output`, of key and value to their place."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cos += token * angle_token
    sin += token * angle_token
    if head < H:
        target = output + (token * H + head) * D
        rotate_head(query + token * query_token + head * D, target, query_norm, cos, sin, eps, D, BP, NORM)
    else:
        block = tl.load(blocks + token)
        place = tl.load(places + token)
        if head < H + G:
            head = head - H
            target = keys + block * key_block + head.to(tl.int64) * key_head + place * key_place
            rotate_head(key + token * key_token + head * D, target, key_norm, cos, sin, eps, D, BP, NORM)
        else:
            head = head - H - G
            component = tl.arange(0, 2 * BP)
            known = component < D
            written = tl.load(value + token * value_token + head * D + component, mask=known)
            target = values + block * value_block + head.to(tl.int64) * value_head + place * value_place
            tl.store(target + component, written, mask=known)


@triton.jit
def multiply(
    gate,  # [T, I]
    up,  # [T, I]
    output,  # [T, I]
    gate_row, up_row,  # strides
    size,  # I
    PIECE: tl.constexpr,
):  # fmt: skip
    """A piece of a row of `silu(gate) * up`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    known = column < size
    x = tl.load(gate + row * gate_row + column, mask=known, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_row + column, mask=known, other=0.0).to(tl.float32)
    silu = (x / (1.0 + tl.exp(-x))).to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + row * size + column, (silu * y).to(output.dtype.element_ty), mask=known)


def norm(x, residual, weight, eps):
    """x, residual [T, D], weight [D] -> normed, and the sum or None."""
    x = _rows(x)
    residual = None if residual is None else _rows(residual)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(normed)
    if x.numel() == 0:
        return normed, total
    add, size = residual is not None, x.shape[1]
    other, sum_ = (residual, total) if add else (x, normed)  # not read, not written
    with torch.cuda.device_of(x):
        strides = x.stride(0), other.stride(0)
        options = norm_configuration(size)
        normalise[(x.shape[0],)](x, other, weight.contiguous(), normed, sum_, *strides, eps, **options, D=size, ADD=add)
    return normed, total


def rotary_write(query, key, value, cos, sin, keys, values, blocks, places, query_norm, key_norm, eps):
    """As the operator; all on one device."""
    query, key, value = (_heads(tensor) for tensor in (query, key, value))
    (num_tokens, num_heads, head_dim), num_kv_heads = query.shape, key.shape[1]
    assert keys.stride(3) == values.stride(3) == 1, "the cache's components lie together"
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_tokens == 0:
        return output
    cos, sin, has_norm = cos.contiguous(), sin.contiguous(), query_norm is not None
    norms = (query_norm.contiguous(), key_norm.contiguous()) if has_norm else (query, key)  # not read
    strides = [tensor.stride(0) for tensor in (query, key, value, cos)]
    strides += [*keys.stride()[:3], *values.stride()[:3]]
    tensors = (query, key, value, cos, sin, keys, values, blocks.contiguous(), places.contiguous(), *norms, output)
    options = {"H": num_heads, "G": num_kv_heads, "D": head_dim, "NORM": has_norm} | rotary_configuration(head_dim)
    with torch.cuda.device_of(query):
        rotate_and_write[(num_tokens, num_heads + 2 * num_kv_heads)](*tensors, *strides, eps, **options)
    return output


def silu_mul(gate, up):
    """gate, up [T, I] -> [T, I]."""
    gate, up = _rows(gate), _rows(up)
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return output
    num_tokens, size = gate.shape
    with torch.cuda.device_of(gate):
        grid = (num_tokens, triton.cdiv(size, _PIECE))
        multiply[grid](gate, up, output, gate.stride(0), up.stride(0), size, PIECE=_PIECE, num_warps=4)
    return output


def norm_configuration(size: int) -> dict[str, int]:
    """Meta-parameters of `normalise`."""
    block = triton.next_power_of_2(size)
    return {"BD": block, "num_warps": min(16, max(1, block // 512))}


def rotary_configuration(head_dim: int) -> dict[str, int]:
    """Meta-parameters of `rotate_and_write`."""
    return {"BP": triton.next_power_of_2(head_dim // 2), "num_warps": 1}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[T, n] with components that lie together."""
    return x if x.stride(1) == 1 else x.contiguous()


def _heads(x: torch.Tensor) -> torch.Tensor:
    """[T, H, d] with heads that lie together."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """What is shipped, for the compile test: name, kernel, signature, constants, warps, stages, and the arguments that
    are multiples of 16."""
    norms = [_norm_case(element, size, add) for element, size in _NORM_SIZES for add in (True, False)]
    rotations = [_rotary_case(element, *shape) for element in ("bf16", "fp32") for shape in _ROTARY_SHAPES]
    pointers = dict.fromkeys(("gate", "up", "output"), "*bf16")
    integers = ("gate_row", "up_row", "size")
    signature = pointers | dict.fromkeys(integers, "i32")
    product = ("silu_mul_bf16", multiply, signature, {"PIECE": _PIECE}, 4, 3, {*pointers, *integers})
    return [*norms, *rotations, product]


_NORM_SIZES = (("bf16", 2048), ("bf16", 3584), ("fp32", 2048), ("bf16", 16384))
_ROTARY_SHAPES = ((16, 2, 128, False), (16, 8, 128, True))


def _norm_case(element: str, size: int, add: bool) -> tuple:
    """One of `compile_cases`."""
    constants = {"D": size, "ADD": add} | norm_configuration(size)
    num_warps = constants.pop("num_warps")
    pointers = dict.fromkeys(("x", "residual", "weight", "normed", "total"), f"*{element}")
    signature = pointers | {"x_row": "i32", "residual_row": "i32", "eps": "fp32"}
    name = f"rms_norm_{element}_{size}" + ("_add" if add else "")
    return name, normalise, signature, constants, num_warps, 3, {*pointers, "x_row", "residual_row"}


def _rotary_case(element: str, num_heads: int, num_kv_heads: int, head_dim: int, has_norm: bool) -> tuple:
    """One of `compile_cases`."""
    constants = {"H": num_heads, "G": num_kv_heads, "D": head_dim, "NORM": has_norm} | rotary_configuration(head_dim)
    num_warps = constants.pop("num_warps")
    names = ("query", "key", "value", "keys", "values", "query_norm", "key_norm", "output")
    pointers = dict.fromkeys(names, f"*{element}") | {"cos": "*fp32", "sin": "*fp32"}
    pointers |= {"blocks": "*i64", "places": "*i64"}
    strides = [f"{name}_token" for name in ("query", "key", "value", "angle")]
    strides += [f"{name}_{axis}" for name in ("key", "value") for axis in ("block", "head", "place")]
    signature = pointers | dict.fromkeys(strides, "i32") | {"eps": "fp32"}
    name = f"rotary_write_{element}_{num_heads}x{num_kv_heads}x{head_dim}" + ("_norm" if has_norm else "")
    return name, rotate_and_write, signature, constants, num_warps, 3, {*pointers, *strides}
