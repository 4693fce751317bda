"""Run the decoder's blocks for generation, with one launch between products where the modules have several.

The weights are those of decoder.py's modules; the launches are `rms_norm`, `rotary_write` and `silu_mul` of
`searchr1_kernels`. On a GPU, a step of one token per sequence is bound by its launches or, recorded as a CUDA graph, by
the least time that each takes. Written as modules, a layer has about 40; here it has 13, and 10 where
`join_projections` laid weights side by side. An adapter (lora.py) on all layers adds two to each of a layer's four
products, three where alpha is not the rank. On a CPU, a small model is bound by passes over its tokens' numbers, of
which there are as many. Values are rounded where the modules round. Without gradients only; the plain twin is `Decoder`
itself.

Shape legend
    T  new tokens    R  those whose output is wanted    D  hidden size    I  MLP size    H, G  query, key/value heads
    d  head size
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from searchr1_kernels import rms_norm, rotary_write, silu_mul
from torch import nn

from searchr1_fast.models.generation_loops import run_loops
from searchr1_fast.models.projections import project

if TYPE_CHECKING:
    from searchr1_fast.models.decoder import Attention, Block, CachedContext, Model


def run_blocks(
    model: Model,
    x: torch.Tensor,  # [T, D]: embeddings
    context: CachedContext,
    rows: torch.Tensor | None,  # [R] int64
) -> torch.Tensor:  # [T, D], or [R, D]
    """Run all blocks and the final norm. Each norm adds what the part before it gave to the residual stream `x`."""
    output = run_loops(model, x, context, rows)
    if output is not None:
        return output
    added = None  # [T, D]
    for block in model.layers:
        normed, x = rms_norm(x, *_norm(block.input_layernorm), residual=added)
        attended = _attend(block, normed, context)
        if rows is not None and block is model.layers[-1]:
            x, attended = x.index_select(0, rows), attended.index_select(0, rows)
        projected = block.self_attn.o_proj(attended.flatten(1))
        normed, x = rms_norm(x, *_norm(block.post_attention_layernorm), residual=projected)
        gate, up = project(normed, (block.mlp.gate_proj, block.mlp.up_proj))
        added = block.mlp.down_proj(silu_mul(gate, up))
    return rms_norm(x, *_norm(model.norm), residual=added)[0]


def _attend(block: Block, normed: torch.Tensor, context: CachedContext) -> torch.Tensor:
    """[T, D] -> [T, H, d]; keys and values of the tokens are cached."""
    attention, cache = block.self_attn, context.cache
    heads = (_heads(x, attention) for x in project(normed, (attention.q_proj, attention.k_proj, attention.v_proj)))
    norms = {}
    if attention.has_norms:
        norms = {
            "query_norm": attention.q_norm.weight,
            "key_norm": attention.k_norm.weight,
            "eps": attention.q_norm.eps,
        }
    memory = cache.keys[block.layer], cache.values[block.layer]
    query = rotary_write(*heads, context.cos, context.sin, *memory, context.blocks, context.places, **norms)
    return context.read(block.layer, query)


def _norm(module: nn.Module) -> tuple[torch.Tensor, float]:
    return module.weight, module.eps


def _heads(x: torch.Tensor, attention: Attention) -> torch.Tensor:  # [T, n * d] -> [T, n, d]
    return x.unflatten(-1, (-1, attention.head_dim))
