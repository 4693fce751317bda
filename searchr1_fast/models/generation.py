"""The blocks as they generate: the weights of decoder.py's modules, and between their products one launch where the
modules have several (`searchr1_kernels`: `rms_norm`, `rotary_write`, `silu_mul`).

On a GPU a step of one token per sequence is bound by its launches, and recorded as a CUDA graph by what each takes at
the least: written as modules a layer has about 40, here 13, and 10 where `join_projections` laid weights side by side;
an adapter (lora.py) on all layers adds two to each of a layer's four products, three where alpha is not the rank. On a
CPU a small model is bound by passes over its tokens' numbers, of which there are as many. Values are rounded where the
modules round. Without gradients only; the plain twin is `Decoder` itself.

Shape legend
    T  new tokens    R  those whose output is wanted    D  hidden size    I  MLP size    H, G  query, key/value heads
    d  head size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from searchr1_kernels import rms_norm, rotary_write, silu_mul
from torch import nn

from searchr1_fast.models.generation_loops import CompiledLoops
from searchr1_fast.models.lora import LoraLinear, adapted_product, join_adapters, joined_adapters

if TYPE_CHECKING:
    from searchr1_fast.models.decoder import Attention, Block, CachedContext, Model


def run_blocks(
    model: Model,
    x: torch.Tensor,  # [T, D]: embeddings
    context: CachedContext,
    rows: torch.Tensor | None,  # [R] int64
) -> torch.Tensor:  # [T, D], or [R, D]
    """All blocks and the final norm. Each norm adds what the part before it gave to the residual stream `x`."""
    loops = CompiledLoops.of(model, x, context)
    if loops is not None:
        return _run_on_cpu(model, x, context, rows, loops)
    added = None  # [T, D]
    for block in model.layers:
        normed, x = rms_norm(x, *_norm(block.input_layernorm), residual=added)
        attended = _attend(block, normed, context)
        if rows is not None and block is model.layers[-1]:
            x, attended = x.index_select(0, rows), attended.index_select(0, rows)
        projected = block.self_attn.o_proj(attended.flatten(1))
        normed, x = rms_norm(x, *_norm(block.post_attention_layernorm), residual=projected)
        gate, up = _project(normed, (block.mlp.gate_proj, block.mlp.up_proj))
        added = block.mlp.down_proj(silu_mul(gate, up))
    return rms_norm(x, *_norm(model.norm), residual=added)[0]


def _run_on_cpu(
    model: Model,
    x: torch.Tensor,  # [T, D]
    context: CachedContext,
    rows: torch.Tensor | None,  # [R] int64
    loops: CompiledLoops,
) -> torch.Tensor:  # [T, D], or [R, D]
    """`run_blocks` by the loops of its operators."""
    added = None
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        normed, x = loops.norm(x, added, block.input_layernorm)
        heads = _project(normed, (attention.q_proj, attention.k_proj, attention.v_proj))
        attended = context.read(block.layer, loops.rotary_write(block, heads))
        if rows is not None and block is model.layers[-1]:
            x, attended = x.index_select(0, rows), attended.index_select(0, rows)
        normed, x = loops.norm(x, attention.o_proj(attended.flatten(1)), block.post_attention_layernorm)
        added = mlp.down_proj(loops.silu_mul(*_project(normed, (mlp.gate_proj, mlp.up_proj))))
    return loops.norm(x, added, model.norm)[0]


def _attend(block: Block, normed: torch.Tensor, context: CachedContext) -> torch.Tensor:
    """[T, D] -> [T, H, d]; keys and values of the tokens are cached."""
    attention, cache = block.self_attn, context.cache
    heads = (_heads(x, attention) for x in _project(normed, (attention.q_proj, attention.k_proj, attention.v_proj)))
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


def _project(x: torch.Tensor, layers: Sequence[nn.Linear]) -> Sequence[torch.Tensor]:
    """[T, D] -> what each layer gives, by one product where their weights are side by side, and their biases too; two
    more where they are adapted."""
    weight = side_by_side([layer.weight for layer in layers])
    has_bias = layers[0].bias is not None
    bias = side_by_side([layer.bias for layer in layers]) if has_bias else None
    adapted = [layer for layer in layers if isinstance(layer, LoraLinear) and layer.is_active]
    adapters = joined_adapters(adapted) if adapted else None
    if weight is None or (has_bias and bias is None) or (adapted and adapters is None):
        return [layer(x) for layer in layers]
    if adapters is None:
        y = F.linear(x, weight, bias)
    else:
        y = adapted_product(x, weight, bias, adapters.below, adapters.diagonal, adapted[0].scale)
    return y.split([layer.out_features for layer in layers], dim=-1)


# ------------------------------------------------------------------------------------------------- weights side by side


def join_projections(model: Model) -> None:
    """Lay the weights of q, k and v side by side in memory, and those of gate and up, and their adapters as well. The
    parameters stay themselves, their names and values too; what gives them other memory (`Module.to`) undoes it, and
    costs the speed alone."""
    for block in model.layers:
        _join((block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj))
        _join((block.mlp.gate_proj, block.mlp.up_proj))


def _join(layers: Sequence[nn.Linear]) -> None:
    join_adapters(layers)
    for name in ("weight", "bias"):
        parameters = [getattr(layer, name) for layer in layers]
        if parameters[0] is not None:
            memory = torch.cat([parameter.detach() for parameter in parameters])
            for parameter, piece in zip(parameters, memory.split([len(p) for p in parameters]), strict=True):
                parameter.data = piece


def side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:  # [n, …] each -> [sum of n, …]
    """A view of all of them where they lie one behind the other in one memory; else None."""
    first = parts[0]
    expected, memory = first.data_ptr(), first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != expected or part.untyped_storage().data_ptr() != memory or not part.is_contiguous():
            return None
        expected += part.numel() * part.element_size()
    return first.detach().as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
