"""Norms, rotation with the write to the cache, and SwiGLU on a GPU.

A program takes a row, a block of a token's heads, or a piece of a row, respectively. Each kernel reads its inputs once
and writes its outputs once, so memory bounds it with many tokens, and the launch with few. At some hundred tokens the
number of programs to start bounds it; so they are made large enough to give a thread one or two loads from each input.

Shape legend: T tokens, D hidden size, I MLP size, H query heads, G key/value heads, d head size, P blocks of M places,
BH heads of a program, BP pairs of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_PAIRS = 1024  # pairs of components that a program of `rotate_and_write` rotates


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
    """Compute a row's sum with the residual, rounded, and its RMS norm."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BD)
    known = column < D
    value = tl.load(x + row * x_row + column, mask=known, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)  # early: arrives while the sum is made
    if ADD:
        value += tl.load(residual + row * residual_row + column, mask=known, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * D + column, rounded, mask=known)
        value = rounded.to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    tl.store(normed + row * D + column, (value * root * scale).to(normed.dtype.element_ty), mask=known)


@triton.jit
def rotate_heads(
    source,  # [BH, 1] pointers to heads
    target,  # [BH, 1] pointers to heads
    inside,  # [BH, 1]
    norm,  # [d], read if NORM
    cos,  # [d] fp32
    sin,  # [d] fp32
    eps,
    D: tl.constexpr,
    BP: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Normalise if NORM, then rotate the heads of one token that are inside."""
    pair = tl.arange(0, BP)[None, :]
    known = pair < D // 2
    mask = inside & known
    first = tl.load(source + pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + D // 2 + pair, mask=mask, other=0.0).to(tl.float32)
    cos_first = tl.load(cos + pair, mask=known, other=0.0)
    sin_first = tl.load(sin + pair, mask=known, other=0.0)
    cos_second = tl.load(cos + D // 2 + pair, mask=known, other=0.0)
    sin_second = tl.load(sin + D // 2 + pair, mask=known, other=0.0)
    if NORM:
        weight_first = tl.load(norm + pair, mask=known, other=0.0).to(tl.float32)
        weight_second = tl.load(norm + D // 2 + pair, mask=known, other=0.0).to(tl.float32)
        root = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
        first = (first * root * weight_first).to(target.dtype.element_ty).to(tl.float32)
        second = (second * root * weight_second).to(target.dtype.element_ty).to(tl.float32)
    left = first * cos_first - second * sin_first
    right = second * cos_second
    right += first * sin_second
    tl.store(target + pair, left.to(target.dtype.element_ty), mask=mask)
    tl.store(target + D // 2 + pair, right.to(target.dtype.element_ty), mask=mask)


# A token has one block and one place: the alignment of a step's arrays must not choose the kernel.
@triton.jit(do_not_specialize_on_alignment=["blocks", "places"])
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
    BH: tl.constexpr,
    BG: tl.constexpr,
    BP: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Rotate BH heads of a token's query into `output`, or write BG heads of its key and value to their place."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    cos += token * angle_token
    sin += token * angle_token
    query_parts: tl.constexpr = (H + BH - 1) // BH
    if part < query_parts:
        head = part * BH + tl.arange(0, BH)[:, None]
        query_source = query + token * query_token + head * D
        query_target = output + token * (H * D) + head * D
        rotate_heads(query_source, query_target, head < H, query_norm, cos, sin, eps, D, BP, NORM)
    else:
        block = tl.load(blocks + token)
        place = tl.load(places + token)
        kv_head = (part - query_parts) * BG + tl.arange(0, BG)[:, None]
        inside = kv_head < G
        component = tl.arange(0, 2 * BP)[None, :]
        mask = inside & (component < D)
        written = tl.load(value + token * value_token + kv_head * D + component, mask=mask)
        key_source = key + token * key_token + kv_head * D
        key_target = keys + block * key_block + place * key_place + kv_head.to(tl.int64) * key_head
        rotate_heads(key_source, key_target, inside, key_norm, cos, sin, eps, D, BP, NORM)
        value_target = values + block * value_block + place * value_place + kv_head.to(tl.int64) * value_head
        tl.store(value_target + component, written, mask=mask)


@triton.jit
def multiply(
    gate,  # [T, I]
    up,  # [T, I]
    output,  # [T, I]
    gate_row, up_row,  # strides
    size,  # I
    PIECE: tl.constexpr,
):  # fmt: skip
    """Compute a piece of a row of `silu(gate) * up`."""
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
    """Shapes as the operator's; all on one device, and the components of each head in the cache contiguous."""
    query, key, value = (_heads(tensor) for tensor in (query, key, value))
    (num_tokens, num_heads, head_dim), num_kv_heads = query.shape, key.shape[1]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_tokens == 0:
        return output
    cos, sin, has_norm = cos.contiguous(), sin.contiguous(), query_norm is not None
    norms = (query_norm.contiguous(), key_norm.contiguous()) if has_norm else (query, key)  # not read
    strides = [tensor.stride(0) for tensor in (query, key, value, cos)]
    strides += [*keys.stride()[:3], *values.stride()[:3]]
    tensors = (query, key, value, cos, sin, keys, values, blocks.contiguous(), places.contiguous(), *norms, output)
    sizes = {"H": num_heads, "G": num_kv_heads, "D": head_dim, "NORM": has_norm}
    options = rotary_configuration(num_heads, num_kv_heads, head_dim)
    num_parts = triton.cdiv(num_heads, options["BH"]) + triton.cdiv(num_kv_heads, options["BG"])
    with torch.cuda.device_of(query):
        rotate_and_write[(num_tokens, num_parts)](*tensors, *strides, eps, **sizes, **options)
    return output


def silu_mul(gate, up):
    """gate, up [T, I] -> [T, I]."""
    gate, up = _rows(gate), _rows(up)
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return output
    num_tokens, size = gate.shape
    options = product_configuration()
    with torch.cuda.device_of(gate):
        grid = (num_tokens, triton.cdiv(size, options["PIECE"]))
        multiply[grid](gate, up, output, gate.stride(0), up.stride(0), size, **options)
    return output


def norm_configuration(size: int) -> dict[str, int]:
    """-> meta-parameters of `normalise`."""
    block = triton.next_power_of_2(size)
    return {"BD": block, "num_warps": min(16, max(1, block // 512))}


def rotary_configuration(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
    """-> meta-parameters of `rotate_and_write`.

    A thread has 4 pairs of a query: with 8, cosines and sines need so many registers that they are loaded one after the
    other."""
    pairs = triton.next_power_of_2(head_dim // 2)
    heads, kv_heads = (min(max(1, _PAIRS // pairs), triton.next_power_of_2(n)) for n in (num_heads, num_kv_heads))
    return {"BH": heads, "BG": kv_heads, "BP": pairs, "num_warps": min(8, max(1, heads * pairs // 128))}


def product_configuration() -> dict[str, int]:
    """-> meta-parameters of `multiply`. A thread has 8 components, a load of 16 bytes of bf16 from either input."""
    return {"PIECE": 1024, "num_warps": 4}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """-> x [T, n] with contiguous rows."""
    return x if x.stride(1) == 1 else x.contiguous()


def _heads(x: torch.Tensor) -> torch.Tensor:
    """-> x [T, H, d] in which the heads of each token are contiguous."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """What is shipped, for the compile test: name, kernel, signature, constants, warps, stages, and the arguments that
    are multiples of 16."""
    norms = [_norm_case(element, size, add) for element, size in _NORM_SIZES for add in (True, False)]
    rotations = [_rotary_case(element, *shape) for element in ("bf16", "fp32") for shape in _ROTARY_SHAPES]
    pointers = dict.fromkeys(("gate", "up", "output"), "*bf16")
    integers = ("gate_row", "up_row", "size")
    signature = pointers | dict.fromkeys(integers, "i32")
    constants = product_configuration()
    num_warps = constants.pop("num_warps")
    product = ("silu_mul_bf16", multiply, signature, constants, num_warps, 3, {*pointers, *integers})
    return [*norms, *rotations, product]


_NORM_SIZES = (("bf16", 2048), ("bf16", 3584), ("fp32", 2048), ("bf16", 16384))
_ROTARY_SHAPES = ((16, 2, 128, False), (16, 8, 128, True), (14, 2, 64, False), (8, 2, 80, False), (8, 4, 256, True))


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
    constants = {"H": num_heads, "G": num_kv_heads, "D": head_dim, "NORM": has_norm}
    constants |= rotary_configuration(num_heads, num_kv_heads, head_dim)
    num_warps = constants.pop("num_warps")
    names = ("query", "key", "value", "keys", "values", "query_norm", "key_norm", "output")
    pointers = dict.fromkeys(names, f"*{element}") | {"cos": "*fp32", "sin": "*fp32"}
    pointers |= {"blocks": "*i64", "places": "*i64"}
    strides = [f"{name}_token" for name in ("query", "key", "value", "angle")]
    strides += [f"{name}_{axis}" for name in ("key", "value") for axis in ("block", "head", "place")]
    signature = pointers | dict.fromkeys(strides, "i32") | {"eps": "fp32"}
    name = f"rotary_write_{element}_{num_heads}x{num_kv_heads}x{head_dim}" + ("_norm" if has_norm else "")
    return name, rotate_and_write, signature, constants, num_warps, 3, {*pointers, *strides} - {"blocks", "places"}
