"""`run_blocks` on a CPU for steps in which every token is alone in its sequence.

It is a compiled loop in which each thread takes its tokens through all layers (`searchr1_kernels._decode_numba`). Its
plain twin is generation_loops.py, which runs all other steps.

Shape legend
    T  tokens    N  panels    L  LANES    D  hidden size    I  MLP size    H, G  query, key/value heads    d  head size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from searchr1_kernels import _attention_block_llvm as attention_block
from searchr1_kernels import _decode_numba as loops
from searchr1_kernels import _panels_llvm as products
from searchr1_kernels._numba_numbers import LOG2_E, as_array
from searchr1_kernels._vector_code import LANES

if TYPE_CHECKING:
    from searchr1_fast.models.decoder import CachedContext, Model
    from searchr1_fast.models.generation_loops import Layer

# The number of tokens from which this is faster: a panel of one fp32 token takes as long as one of 16.
MIN_TOKENS = {torch.float32: 16, torch.bfloat16: 1}
# The most that a thread may pass to a layer's last product. At this size it outgrows the second-level cache, and
# products that are cut by depth as well, as torch's are, catch up (fp32, 256 tokens of 4,864: as long as with them).
_MOST_BYTES = 256 * 4864 * 4


def takes(model: Model, layers: Sequence[Layer], x: torch.Tensor, context: CachedContext) -> bool:
    """Whether tokens `x` [T, D] can go this way: enough of them, all alone, and all sizes those of whole vectors."""
    num_panels = -(-len(x) // LANES)
    if len(x) < MIN_TOKENS[x.dtype] or num_panels < numba.get_num_threads() or len(context.chunks.alone) < len(x):
        return False
    attention, inner = model.layers[0].self_attn, model.layers[0].mlp.down_proj.in_features
    sizes = (x.shape[1], inner, attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim)
    is_bf16, num_threads = x.dtype == torch.bfloat16, numba.get_num_threads()
    return (
        -(-num_panels // num_threads) * LANES * inner * x.dtype.itemsize <= _MOST_BYTES
        and all(size % products.ROWS == 0 for size in (*sizes, attention.head_dim))
        and attention_block.takes(attention.head_dim, context.cache.block_size, is_bf16)
        and products.takes(is_bf16)
        and all(layer.addresses is not None and layer.types == {x.dtype} for layer in layers)
    )


class PanelRoom:
    """Memory for what a step of `num_tokens` tokens or fewer passes on."""

    def __init__(self, num_tokens: int, model: Model, dtype: torch.dtype) -> None:
        attention, self.num_tokens, self.dtype = model.layers[0].self_attn, num_tokens, dtype
        head_dim, hidden = attention.head_dim, model.norm.weight.shape[0]
        width, inner = attention.num_heads * head_dim, model.layers[0].mlp.down_proj.in_features
        num_lanes = -(-num_tokens // LANES) * LANES
        share = 4 // dtype.itemsize  # numbers in 32 bits
        projected = max(width + 2 * attention.num_kv_heads * head_dim, hidden)
        floats = [np.empty(num_lanes * n, np.float32) for n in (head_dim // 2, head_dim // 2, hidden, projected)]
        packed = [np.empty(num_lanes * n // share, np.int32) for n in (max(hidden, width), inner)]
        self.panels = loops.Panels(np.empty(num_lanes, np.int64), *floats, *packed)
        query, attended = (torch.empty(num_tokens * width, dtype=dtype) for _ in range(2))
        self.rows = as_array(query), as_array(attended), _packed(query), _packed(attended)


def run_panels(
    model: Model, layers: Sequence[Layer], room: PanelRoom, x: torch.Tensor, context: CachedContext
) -> torch.Tensor:  # [T, D] -> [T, D]
    """Run all blocks and the final norm."""
    cache, attention = context.cache, model.layers[0].self_attn
    head_dim, num_heads, num_kv_heads = attention.head_dim, attention.num_heads, attention.num_kv_heads
    tokens, share = context.chunks.alone.numpy(), 4 // x.dtype.itemsize
    panels = room.panels._replace(tokens=room.panels.tokens[: -(-len(tokens) // LANES) * LANES])
    panels.tokens[: len(tokens)] = tokens  # those that share blocks are side by side, in one thread
    panels.tokens[len(tokens) :] = tokens[-1]
    places = context.blocks.numpy() * (num_kv_heads * cache.block_size) + context.places.numpy()
    rows = loops.Rows(
        *room.rows, panels.tokens * (num_heads * head_dim // share), places[panels.tokens] * (head_dim // share),
        cache.table.numpy(), context.slots.numpy(), context.positions.numpy(),
    )  # fmt: skip
    inner = model.layers[0].mlp.down_proj.in_features
    sizes = loops.Sizes(x.shape[1], inner, num_heads, num_kv_heads, cache.block_size, cache.num_blocks)
    head_eps = attention.q_norm.eps if attention.has_norms else 0.0
    constants = layers[0].norms[0][1], head_eps, model.norm.eps, head_dim**-0.5 * LOG2_E
    numbers = tuple(np.float32(one) for one in constants)
    memory = zip(layers, cache.keys, cache.values, strict=True)
    addresses = np.array([[*layer.addresses, keys.data_ptr(), values.data_ptr()] for layer, keys, values in memory])
    run_step = loops.step_loop(head_dim, attention_block.heads_together(num_heads // num_kv_heads, head_dim))
    num_parts = max(1, min(numba.get_num_threads(), len(panels.tokens) // LANES))
    x, output = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    angles = (one[:, 0].numpy() for one in (context.cos, context.sin))
    norm = as_array(model.norm.weight.detach())
    run_step(_packed(x), _packed(output), norm, addresses, *angles, panels, rows, sizes, num_parts, numbers)
    return output


def _packed(x: torch.Tensor) -> np.ndarray:
    """View contiguous memory as 32-bit numbers."""
    return x.view(torch.int32).numpy().reshape(-1)
