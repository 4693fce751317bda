"""Attention of new tokens over a paged KV cache, for generation. No gradients; nothing is padded.

On a CPU, tokens read their blocks in place (`searchr1_kernels`, fp32 and bf16), but many that join a sequence together
go through matrix products over a copy of its keys. On CUDA, it is the Triton kernel of `searchr1_kernels`.
`cached_attention_reference` is the plain twin of all of these, and the path of every other device and dtype.

Shape legend
    T  new tokens    S  sequences    H  query heads    G  key/value heads (H a multiple of G)    d  head dimension
    C  cache slots    W  blocks of a slot    P  blocks    B  places of a block    U  lone tokens    N  tiles
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import searchr1_kernels
import torch
import torch.nn.functional as F
from searchr1_kernels._attention_block_llvm import takes
from searchr1_kernels._cached_attention_numba import attend_blocks, order_by_blocks

from searchr1_fast.models.attention import suffix_masks

GATHERED_TOKENS = 512  # bounds what the plain twin gathers: [512, H, length, d]


class Least(NamedTuple):
    """The least run of tokens that goes through matrix products: its tokens, and its tokens times keys."""

    tokens: int
    pairs: int


# Tokens that join one sequence are faster through matrix products than one by one where they meet many keys. Speed of
# the products relative to the compiled loop: 2.4 for 210 tokens after 300, 1.4 for 8 after 500, 0.6 for 40 at the
# beginning (4 heads of 32, one core of an AMD EPYC, 2026-11-25). Relative to the vector code in fp32: 0.4 to 0.7 for 64
# tokens, 0.6 to 1 for 128 and 0.6 to 1.2 for 256, at the beginning and after 500. In bf16, which has AMX in its
# products: for 64, 0.5 to 1.2 at the beginning and 1 to 1.6 after 500; for 128, 0.8 to 1.4 at the beginning and 1.4 to
# 1.9 after 500 (4 heads of 32 and of 64, 14 of 64, 16 of 128, 2 for keys; one core of an Intel Xeon, 2026-11-27).
_LEAST = Least(4, 4096)
_LEAST_OF_VECTORS = {torch.float32: Least(256, 0), torch.bfloat16: Least(4, 8192)}


def least_chunk(keys: torch.Tensor) -> Least:  # [P, G, B, d]
    """Return the least run of tokens that have these keys."""
    size, head_dim = keys.shape[2:]
    return _LEAST_OF_VECTORS[keys.dtype] if takes(head_dim, size, keys.dtype == torch.bfloat16) else _LEAST


class Chunk(NamedTuple):
    """Tokens `begin` to `end` of a step, at places `length - (end - begin)` to `length` of one slot."""

    begin: int
    end: int
    slot: int
    length: int
    mask: torch.Tensor | None  # [end - begin, length] bool; None: from place 0 on, plainly causal


class Chunks(NamedTuple):
    """The tokens of a step by how their attention is computed on a CPU."""

    together: list[Chunk]
    alone: torch.Tensor  # [U] int64: the other tokens, those that share blocks side by side


def find_chunks(
    slots: torch.Tensor,  # [T] int64, on the CPU
    positions: torch.Tensor,  # [T] int64
    table: torch.Tensor,  # [C, W] int32
    least: Least = _LEAST,
) -> Chunks:
    """Find consecutive tokens at consecutive places of one slot, where they are many; the others are alone."""
    slot, position = slots.numpy(), positions.numpy()
    assert len(slot) > 0
    breaks = np.flatnonzero((slot[1:] != slot[:-1]) | (position[1:] != position[:-1] + 1)) + 1
    begins, ends = np.concatenate(([0], breaks)), np.concatenate((breaks, [len(slot)]))
    is_alone = np.ones(len(slot), dtype=bool)
    together = []
    counts, lengths = ends - begins, position[ends - 1] + 1
    for i in np.flatnonzero((counts >= least.tokens) & (counts * lengths >= least.pairs)):
        begin, end, length = int(begins[i]), int(ends[i]), int(lengths[i])
        (mask,) = suffix_masks([end - begin], [length], slots.device)
        together.append(Chunk(begin, end, int(slot[begin]), length, mask))
        is_alone[begin:end] = False
    return Chunks(together, order_by_blocks(table, slots, torch.from_numpy(np.flatnonzero(is_alone))))


class Tiles(NamedTuple):
    """The tokens of a step by how their attention is computed on CUDA."""

    table: torch.Tensor  # [N, 2] int32: first token, count; lone tokens first
    num_alone: int


def make_tiles(lengths: np.ndarray, group: int, device: torch.device) -> Tiles | None:
    """Tile a step's sequences of `lengths` [S], with `group` query heads per key/value head; None if every token is
    alone."""
    found = searchr1_kernels.attention_tiles(lengths, group)
    return None if found is None else Tiles(torch.from_numpy(found[0]).to(device, non_blocking=True), found[1])


def cached_attention(
    query: torch.Tensor,  # [T, H, d]
    keys: torch.Tensor,  # [P, G, B, d]
    values: torch.Tensor,  # [P, G, B, d]
    table: torch.Tensor,  # [C, W] int32
    slots: torch.Tensor,  # [T] int64: the cache slot of each token
    positions: torch.Tensor,  # [T] int64: its place in the slot, already written
    chunks: Chunks | None = None,  # of these slots, positions and table, if they are known; read only on the CPU
    tiles: Tiles | None = None,  # of these tokens, from `make_tiles`; read only on CUDA
) -> torch.Tensor:  # [T, H, d]
    """Let token t attend to places 0 … positions[t] of its slot."""
    if query.device.type == "cuda":
        found, num_alone = (None, 0) if tiles is None else tiles
        options = {"table": table, "tiles": found, "num_alone": num_alone}
        return searchr1_kernels.cached_attention(query, keys, values, slots, positions, **options)
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.bfloat16):
        return cached_attention_reference(query, keys, values, table, slots, positions)
    chunks = find_chunks(slots, positions, table, least_chunk(keys)) if chunks is None else chunks
    query = query.contiguous()
    output = torch.empty_like(query)
    if len(chunks.alone):
        attend_blocks(query, keys, values, table, slots, positions, chunks.alone, output)
    for chunk in chunks.together:
        output[chunk.begin : chunk.end] = _attend_together(query, keys, values, table, chunk)
    return output


def _attend_together(query, keys, values, table, chunk: Chunk) -> torch.Tensor:
    """[T, H, d] of all -> [end - begin, H, d] of the chunk's tokens."""
    blocks = table[chunk.slot, : -(-chunk.length // keys.shape[2])].long()
    k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, : chunk.length] for cache in (keys, values))
    group = query.shape[1] // keys.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    q, is_causal = query[chunk.begin : chunk.end].transpose(0, 1), chunk.mask is None
    attended = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=chunk.mask, is_causal=is_causal)
    return attended[0].transpose(0, 1)


def cached_attention_reference(
    query: torch.Tensor,  # [T, H, d]
    keys: torch.Tensor,  # [P, G, B, d]
    values: torch.Tensor,  # [P, G, B, d]
    table: torch.Tensor,  # [C, W] int32
    slots: torch.Tensor,  # [T] int64
    positions: torch.Tensor,  # [T] int64
) -> torch.Tensor:  # [T, H, d]
    """Do `cached_attention` in plain torch: gather every token's blocks up to the longest, some tokens at a time."""
    if len(query) > GATHERED_TOKENS:
        parts = zip(*(x.split(GATHERED_TOKENS) for x in (query, slots, positions)), strict=True)
        return torch.cat([cached_attention_reference(q, keys, values, table, s, p) for q, s, p in parts])
    length = int(positions.max()) + 1 if len(positions) else 0
    blocks = table[slots, : -(-length // keys.shape[2])].long()  # [T, W']
    group = query.shape[1] // keys.shape[1]
    # Entries past a token's own may be any sequence's blocks, and hold anything: a weight of 0 would not silence a NaN.
    visible = torch.arange(length, device=query.device) <= positions[:, None]  # [T, length]
    k, v = (cache[blocks].transpose(1, 2).flatten(2, 3)[:, :, :length] for cache in (keys, values))
    k, v = (x.masked_fill(~visible[:, None, :, None], 0.0).repeat_interleave(group, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(query.unsqueeze(2), k, v, attn_mask=visible[:, None, None, :]).squeeze(2)
