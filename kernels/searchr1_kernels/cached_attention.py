"""Softmax attention of new tokens over a KV cache: each token attends to its slot, from the beginning to its own place.

A slot is one piece of memory, or it is paged: a row of a table of blocks, and slots whose sequences begin alike may
share blocks (Kwon et al. 2023, arXiv 2309.06180, section 4.1).

CUDA: `_cached_attention_triton`, which waits for nothing. CPU, paged, fp32 and bf16: `_cached_attention_numba`, in
which tokens that share blocks read them one after the other. Elsewhere: a loop over tokens, in torch.

Shape legend: T tokens, S sequences, N tiles, H query heads, G key/value heads, d head size, C slots of M places; paged:
P blocks of M places, C slots of up to W blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from searchr1_kernels import checks
from searchr1_kernels._installed import has_triton
from searchr1_kernels.registration import register

_TILE_ROWS = 64  # tokens of a tile times query heads per key/value head
BLOCK_STEP = 16  # a GPU loads the keys of this many places at once, so its blocks have a multiple of them


def tile_tokens(group: int) -> int:
    """-> the most tokens that a tile may have, with `group` query heads per key/value head."""
    return max(1, _TILE_ROWS // group)


def attention_tiles(lengths: Sequence[int] | np.ndarray, group: int) -> tuple[np.ndarray, int] | None:
    """-> tiles [N, 2] int32 (first token, count) of tokens that share loads of keys, and how many are of lone tokens.

    `lengths` [S], on the host, are the numbers of tokens that join each of S sequences, at consecutive places of one
    slot; they add up to T. `group` is H / G. Tiles of lone tokens come first. The result is None where every token is
    alone: `cached_attention` then needs no tiles. Raises ValueError where lengths or group are no such numbers.
    """
    given = np.asarray(lengths)
    if given.ndim != 1 or (given.size and (given.dtype.kind not in "iu" or given.min() < 0)):
        raise ValueError(f"lengths: expected whole numbers not below 0, [S], got {lengths!r}")
    checks.check_whole("group", group)
    if group < 1:
        raise ValueError(f"group: expected at least 1, got {group}")
    lengths = given.astype(np.int64)
    if (lengths <= 1).all():
        return None
    size = tile_tokens(group)
    begins = np.cumsum(lengths) - lengths
    alone = begins[lengths == 1]
    begins, lengths = begins[lengths > 1], lengths[lengths > 1]
    counts = -(-lengths // size)  # tiles of each
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.repeat(begins, counts) + number * size
    count = np.minimum(np.repeat(lengths, counts) - number * size, size)
    tiles = np.stack([np.concatenate((alone, first)), np.concatenate((np.ones_like(alone), count))], axis=1)
    return tiles.astype(np.int32), len(alone)


def cached_attention(
    query: torch.Tensor,  # [T, H, d]
    keys: torch.Tensor,  # [C, G, M, d]
    values: torch.Tensor,  # [C, G, M, d]
    slots: torch.Tensor,  # [T] int64
    positions: torch.Tensor,  # [T] int64
    *,
    table: torch.Tensor | None = None,  # [C, W] int32
    tiles: torch.Tensor | None = None,  # [N, 2] int32
    num_alone: int = 0,
) -> torch.Tensor:
    """-> the attention of every token, [T, H, d] in the type of `query`, a constant to autograd.

    Token t attends to places 0 to positions[t] of slots[t], with an fp32 softmax of scores times d^-0.5. Slots and
    positions are read on the device only. Keys and values may have any strides; if the last is not 1, they are copied.

    With `table`, `keys` and `values` are [P, G, M, d], and place p of slot c is place p % M of block
    `table[c, p // M]`; entries past a token's position are not read.

    `tiles`, on the device, and `num_alone` are those of `attention_tiles`: tokens of one tile share their loads of
    keys. Without tiles, each token loads its own. A lone token's output has the same bits alone and in any batch, and
    so have the outputs of tokens that join a sequence together.

    Raises ValueError where a shape, type or device is not as above or d is over 256; on a GPU also where the blocks of
    a table have a number of places that is not a multiple of 16; on a CPU also for slots, positions and blocks that do
    not exist.
    """
    checks.check_shape("query", query, ("T", "H", "d"))
    _, num_heads, head_dim = query.shape
    checks.check_shape("keys", keys, ("C", "G", "M", head_dim))
    checks.check_shape("values", values, tuple(keys.shape))
    checks.check_floating("query", query)
    checks.check_dtype("keys", keys, query.dtype)
    checks.check_dtype("values", values, query.dtype)
    for name, tensor in (("slots", slots), ("positions", positions)):
        checks.check_shape(name, tensor, (query.shape[0],))
        checks.check_dtype(name, tensor, torch.int64)
    if table is not None:
        checks.check_shape("table", table, ("C", "W"))
        checks.check_dtype("table", table, torch.int32)
    if tiles is not None:
        checks.check_shape("tiles", tiles, ("N", 2))
        checks.check_dtype("tiles", tiles, torch.int32)
        checks.check_whole("num_alone", num_alone)
        if not 0 <= num_alone <= tiles.shape[0]:
            raise ValueError(f"num_alone: expected a number of tiles, 0 to {tiles.shape[0]}, got {num_alone}")
    named = {"keys": keys, "values": values, "slots": slots, "positions": positions}
    named |= {"table": table, "tiles": tiles}
    for name, tensor in named.items():
        if tensor is not None:
            checks.check_device(name, tensor, "query", query)
    if keys.shape[1] == 0 or num_heads % keys.shape[1]:
        raise ValueError(f"query: expected heads in multiples of the {keys.shape[1]} of keys, got {num_heads}")
    if head_dim > 256:
        raise ValueError(f"query: expected heads of at most 256 components, got {head_dim}")
    tensors = (tensor.detach() for tensor in (query, keys, values))
    return _OPERATOR(*tensors, slots, positions, table, tiles, num_alone)


def _cached_attention(query, keys, values, slots, positions, table, tiles, num_alone):
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if query.numel() == 0:
        return output
    if query.device.type == "cuda" and has_triton():
        if query.dtype == torch.float64:
            raise ValueError("query: expected torch.float32, torch.float16 or torch.bfloat16 on a GPU, got fp64")
        if table is not None and keys.shape[2] % BLOCK_STEP:
            raise ValueError(f"keys: expected blocks of a multiple of {BLOCK_STEP} places, got {keys.shape[2]}")
        return _attend_triton(query, keys, values, slots, positions, table, tiles, num_alone, output)
    _check_places(keys, slots, positions, table)
    if table is not None and query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16):
        from searchr1_kernels._numba_numbers import may_share_out

        if may_share_out():
            return _attend_numba(query, keys, values, slots, positions, table)
    return _attend_torch(query, keys, values, slots, positions, table, output)


def _fake(query, keys, values, slots, positions, table, tiles, num_alone):
    return query.new_empty(query.shape)


_OPERATOR = register(
    "cached_attention(Tensor query, Tensor keys, Tensor values, Tensor slots, Tensor positions, Tensor? table, "
    "Tensor? tiles, int num_alone) -> Tensor",
    _cached_attention,
    _fake,
)


def _check_places(keys, slots, positions, table) -> None:
    """Raise ValueError for places outside the cache, which loops would read. Shapes as `cached_attention`, T not 0."""
    num_blocks, size = keys.shape[0], keys.shape[2]
    checks.check_indices("slots", slots, num_blocks if table is None else table.shape[0])
    checks.check_indices("positions", positions, size if table is None else size * table.shape[1])
    if table is not None and table.device.type == "cpu":
        numbers = torch.arange(table.shape[1], device="cpu")
        checks.check_indices("table", table[slots][numbers <= positions[:, None] // size], num_blocks)


def _attend_triton(query, keys, values, slots, positions, table, tiles, num_alone, output):
    """Shapes as `cached_attention`."""
    from searchr1_kernels import _cached_attention_triton

    query = query if query.stride(2) == 1 else query.contiguous()
    if keys.stride(3) != 1 or values.stride(3) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    table, tiles = (None if x is None else x.contiguous() for x in (table, tiles))
    inputs = (query, keys, values, slots.contiguous(), positions.contiguous())
    _cached_attention_triton.run(*inputs, table, tiles, num_alone, output)
    return output


def _attend_numba(query, keys, values, slots, positions, table):
    """Shapes as `cached_attention`."""
    from searchr1_kernels import _cached_attention_numba
    from searchr1_kernels._threads import numba_as_torch

    numba_as_torch()
    query, keys, values, table = (x.contiguous() for x in (query, keys, values, table))
    tokens = _cached_attention_numba.order_by_blocks(table, slots, torch.arange(len(query)))
    output = torch.empty_like(query)
    _cached_attention_numba.attend_blocks(query, keys, values, table, slots, positions, tokens, output)
    return output


def _attend_torch(query, keys, values, slots, positions, table, output):
    """Shapes as `cached_attention`; waits for the device."""
    compute = torch.promote_types(query.dtype, torch.float32)
    group, scale, size = query.shape[1] // keys.shape[1], query.shape[2] ** -0.5, keys.shape[2]
    for t, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        blocks = slice(slot, slot + 1) if table is None else table[slot, : position // size + 1].long()
        k, v = (cache[blocks].to(compute).transpose(0, 1).flatten(1, 2) for cache in (keys, values))
        # [G, m, d]; contiguous, or the layout would choose between products that round differently
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous()
                   for x in (query[t].to(compute), k[:, : position + 1], v[:, : position + 1]))  # fmt: skip
        scores = q.reshape(-1, group, query.shape[2]) @ k.transpose(1, 2) * scale  # [G, group, m]
        output[t] = (scores.softmax(-1) @ v).flatten(0, 1)
    return output
