"""Causal attention over packed sequences, in torch and differentiable. Pure functions; nothing is padded.

Shape legend
    T  packed tokens    S  sequences    K  keys: T, or more where sequences share beginnings
    H  query heads    G  key/value heads (H a multiple of G)    d  head dimension
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def packed_attention(
    query: torch.Tensor,  # [T, H, d]
    key: torch.Tensor,  # [K, G, d]
    value: torch.Tensor,  # [K, G, d]
    sequence_lengths: list[int],  # [S], adding up to T
    key_lengths: list[int] | None = None,  # [S], adding up to K; None: the sequences' own
    masks: list[torch.Tensor | None] | None = None,  # [S], from `suffix_masks`
) -> torch.Tensor:  # [T, H, d]
    """Causal softmax attention inside each sequence. With `key_lengths`, a sequence's queries are the last of its keys.

    There is one SDPA call per sequence, as the lengths differ and padding would be work. `split` is used and not
    slicing, because the gradient of a split is one concatenation, and that of S slices is S tensors of full size.
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
    # A tensor of its own, as the kernels return. Flattening the heads would copy in any case, and compiled code would
    # distinguish a view from a tensor that is none.
    return torch.cat(outputs, dim=2)[0].transpose(0, 1).clone(memory_format=torch.contiguous_format)


def suffix_masks(
    sequence_lengths: list[int],  # [S]
    key_lengths: list[int],  # [S]
    device: torch.device,
) -> list[torch.Tensor | None]:  # [queries, keys] bool each
    """Return which keys the last tokens of each sequence see; None where the queries are the whole sequence."""
    return [
        torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n) if m > n else None
        for n, m in zip(sequence_lengths, key_lengths, strict=True)
    ]


def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:  # [T, G, d], [K] int64 -> [K, G, d]
    """Return `x[rows]` by an embedding, whose gradient adds rows fast and in a fixed order; indexing does neither."""
    return F.embedding(rows, x.flatten(1)).view(len(rows), *x.shape[1:])
