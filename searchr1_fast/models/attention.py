"""Causal attention over packed sequences, and over a KV cache. Pure functions; nothing is padded.

Shape legend
    T  packed tokens    S  sequences    K  keys: T, or more where sequences share beginnings
    H  query heads    G  key/value heads (H a multiple of G)    d  head dimension
    C  cache slots    M  cache length per slot

`packed_attention` is differentiable. `cached_attention` is for generation: on the CPU a numba kernel reads each
token's own slot in place, exactly as long as it is, and tokens that join a sequence together go through matrix
products; on CUDA it is the Triton kernel of `searchr1_kernels`. `cached_attention_reference` is the plain twin of both,
and the path of every other device and type.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import searchr1_kernels
import torch
import torch.nn.functional as F

GATHERED_TOKENS = 512  # bounds what the plain twin gathers: [512, H, length, d]

# Tokens that join one sequence are faster through matrix products than one by one where they meet many keys: 2.4 times
# for 210 tokens behind 300, 1.4 for 8 behind 500; 0.6 times for 40 at the beginning (4 heads of 32, one core of an AMD
# EPYC, 2026-11-25).
_MIN_CHUNK_TOKENS = 4
_MIN_CHUNK_PAIRS = 4096


def packed_attention(
    query: torch.Tensor,  # [T, H, d]
    key: torch.Tensor,  # [K, G, d]
    value: torch.Tensor,  # [K, G, d]
    sequence_lengths: list[int],  # [S], adding up to T
    key_lengths: list[int] | None = None,  # [S], adding up to K; None: the sequences' own
    masks: list[torch.Tensor | None] | None = None,  # [S], from `suffix_masks`
) -> torch.Tensor:  # [T, H, d]
    """Causal softmax attention inside each sequence; with `key_lengths` a sequence's queries are the last of its keys.

    One SDPA call per sequence: the lengths differ and padding would be work. `split` and not slicing, because the
    gradient of a split is one concatenation, that of S slices S tensors of full size.
    """
    if query.device.type == "cpu" and query.dtype != torch.float32:
        # torch's CPU attention takes 2.6 times as long backward in bf16 as in fp32 (AMD EPYC, torch 2.13, 2026-11-22)
        with torch.autocast("cpu", enabled=False):
            query, key, value, dtype = query.float(), key.float(), value.float(), query.dtype
            return packed_attention(query, key, value, sequence_lengths, key_lengths, masks).to(dtype)
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if num_heads != num_kv_heads:
        key = key.repeat_interleave(num_heads // num_kv_heads, dim=1)
        value = value.repeat_interleave(num_heads // num_kv_heads, dim=1)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        for q, k, v, mask in zip(
            query.transpose(0, 1).unsqueeze(0).split(sequence_lengths, dim=2),
            key.transpose(0, 1).unsqueeze(0).split(key_lengths or sequence_lengths, dim=2),
            value.transpose(0, 1).unsqueeze(0).split(key_lengths or sequence_lengths, dim=2),
            masks or [None] * len(sequence_lengths),
            strict=True,
        )
        if q.shape[2]
    ]
    # A tensor of its own, as the kernels return: the copy is made in any case, by whoever flattens the heads, and
    # compiled code would tell views from what is none.
    return torch.cat(outputs, dim=2)[0].transpose(0, 1).clone(memory_format=torch.contiguous_format)


def suffix_masks(
    sequence_lengths: list[int],  # [S]
    key_lengths: list[int],  # [S]
    device: torch.device,
) -> list[torch.Tensor | None]:  # [queries, keys] bool each
    """Which keys the last tokens of each sequence see; None where the queries are all of the sequence."""
    return [
        torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n) if m > n else None
        for n, m in zip(sequence_lengths, key_lengths, strict=True)
    ]


def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:  # [T, G, d], [K] int64 -> [K, G, d]
    """`x[rows]`, as an embedding: its gradient adds row to row, fast and in a fixed order; indexing is neither."""
    return F.embedding(rows, x.flatten(1)).view(len(rows), *x.shape[1:])


class Chunk(NamedTuple):
    """Tokens `begin` to `end` of a step: places `length - (end - begin)` to `length` of one slot."""

    begin: int
    end: int
    slot: int
    length: int
    mask: torch.Tensor | None  # [end - begin, length] bool; None: from place 0 on, plainly causal


class Chunks(NamedTuple):
    """The tokens of a step by how their attention is computed on a CPU."""

    together: list[Chunk]
    alone: torch.Tensor  # [U] int64: the other tokens


def find_chunks(slots: torch.Tensor, positions: torch.Tensor) -> Chunks:  # [T] int64 each, on the CPU
    """Consecutive tokens at consecutive places of one slot, where they are many."""
    slot, position = slots.numpy(), positions.numpy()
    assert len(slot) > 0
    breaks = np.flatnonzero((slot[1:] != slot[:-1]) | (position[1:] != position[:-1] + 1)) + 1
    begins, ends = np.concatenate(([0], breaks)), np.concatenate((breaks, [len(slot)]))
    is_alone = np.ones(len(slot), dtype=bool)
    together = []
    counts, lengths = ends - begins, position[ends - 1] + 1
    for i in np.flatnonzero((counts >= _MIN_CHUNK_TOKENS) & (counts * lengths >= _MIN_CHUNK_PAIRS)):
        begin, end, length = int(begins[i]), int(ends[i]), int(lengths[i])
        (mask,) = suffix_masks([end - begin], [length], slots.device)
        together.append(Chunk(begin, end, int(slot[begin]), length, mask))
        is_alone[begin:end] = False
    return Chunks(together, torch.from_numpy(np.flatnonzero(is_alone)))


class Tiles(NamedTuple):
    """The tokens of a step by how their attention is computed on CUDA."""

    table: torch.Tensor  # [N, 2] int32: first token, count; lone tokens first
    num_alone: int


def make_tiles(lengths: np.ndarray, group: int, device: torch.device) -> Tiles | None:
    """lengths [S] of a step's sequences; query heads per key/value head. None where every token is alone."""
    found = searchr1_kernels.attention_tiles(lengths, group)
    return None if found is None else Tiles(torch.from_numpy(found[0]).to(device, non_blocking=True), found[1])


def cached_attention(
    query: torch.Tensor,  # [T, H, d]
    keys: torch.Tensor,  # [C, G, M, d]
    values: torch.Tensor,  # [C, G, M, d]
    slots: torch.Tensor,  # [T] int64: the cache slot of each token
    positions: torch.Tensor,  # [T] int64: its place in the slot, already written
    chunks: Chunks | None = None,  # of these slots and positions, where they are known; read on the CPU alone
    tiles: Tiles | None = None,  # of these tokens, from `make_tiles`; read on CUDA alone
) -> torch.Tensor:  # [T, H, d]
    """Token t attends to places 0 … positions[t] of its slot. No gradient."""
    if query.device.type == "cuda":
        table, num_alone = (None, 0) if tiles is None else tiles
        options = {"tiles": table, "num_alone": num_alone}
        return searchr1_kernels.cached_attention(query, keys, values, slots, positions, **options)
    if query.device.type != "cpu" or query.dtype != torch.float32:
        return cached_attention_reference(query, keys, values, slots, positions)
    chunks = find_chunks(slots, positions) if chunks is None else chunks
    if not chunks.together:
        return _attend_alone(query, keys, values, slots, positions)
    output, alone = torch.empty_like(query), chunks.alone
    if len(alone):
        output[alone] = _attend_alone(query[alone], keys, values, slots[alone], positions[alone])
    group = query.shape[1] // keys.shape[1]
    for chunk in chunks.together:
        k, v = (cache[chunk.slot, :, : chunk.length] for cache in (keys, values))  # [G, length, d]
        if group > 1:
            k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
        q, is_causal = query[chunk.begin : chunk.end].transpose(0, 1), chunk.mask is None
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=chunk.mask, is_causal=is_causal)
        output[chunk.begin : chunk.end] = attended[0].transpose(0, 1)
    return output


def _attend_alone(query, keys, values, slots, positions) -> torch.Tensor:
    """`cached_attention` by the compiled kernel: every token reads its slot for itself."""
    output = torch.empty_like(query)
    _cached_attention_cpu(
        query.numpy(),
        keys.numpy(),
        values.numpy(),
        slots.numpy(),
        positions.numpy(),
        output.numpy(),
        keys.shape[-1] ** -0.5,
    )
    return output


def cached_attention_reference(
    query: torch.Tensor,  # [T, H, d]
    keys: torch.Tensor,  # [C, G, M, d]
    values: torch.Tensor,  # [C, G, M, d]
    slots: torch.Tensor,  # [T] int64
    positions: torch.Tensor,  # [T] int64
) -> torch.Tensor:  # [T, H, d]
    """`cached_attention` in plain torch: gathers every token's slot up to the longest, some tokens at a time."""
    if len(query) > GATHERED_TOKENS:
        parts = zip(*(x.split(GATHERED_TOKENS) for x in (query, slots, positions)), strict=True)
        return torch.cat([cached_attention_reference(q, keys, values, s, p) for q, s, p in parts])
    length = int(positions.max()) + 1 if len(positions) else 0
    group = query.shape[1] // keys.shape[1]
    k = keys[slots, :, :length].repeat_interleave(group, dim=1)  # [T, H, length, d]
    v = values[slots, :, :length].repeat_interleave(group, dim=1)
    visible = torch.arange(length, device=query.device) <= positions[:, None]  # [T, length]
    return F.scaled_dot_product_attention(query.unsqueeze(2), k, v, attn_mask=visible[:, None, None, :]).squeeze(2)


# reassoc lets the dot products use SIMD; no other fast-math flag, so infinities and NaN keep their meaning.
@numba.njit(parallel=True, fastmath={"reassoc", "contract", "nsz"}, cache=True)
def _cached_attention_cpu(query, keys, values, slots, positions, output, scale):  # pragma: no cover (compiled)
    num_tokens, num_heads, head_dim = query.shape
    group = num_heads // keys.shape[1]
    for t in numba.prange(num_tokens):
        slot, length = slots[t], positions[t] + 1
        scores = np.empty(length, dtype=np.float32)
        for h in range(num_heads):
            g = h // group
            highest = np.float32(-np.inf)
            for m in range(length):
                score = np.float32(0.0)
                for i in range(head_dim):
                    score += query[t, h, i] * keys[slot, g, m, i]
                score *= np.float32(scale)
                scores[m] = score
                highest = max(highest, score)
            total = np.float32(0.0)
            for m in range(length):
                scores[m] = np.exp(scores[m] - highest)
                total += scores[m]
            for i in range(head_dim):
                output[t, h, i] = np.float32(0.0)
            for m in range(length):
                weight = scores[m] / total
                for i in range(head_dim):
                    output[t, h, i] += weight * values[slot, g, m, i]
