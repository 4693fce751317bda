"""Bytes per row that a block of the decoder takes in training; used by `memory_plan`."""

from __future__ import annotations

from searchr1_fast.config import LoraConfig
from searchr1_fast.models import DecoderConfig
from searchr1_fast.models.recompute import Recompute

_FP32 = 4
_ALL_LEARNED = LoraConfig()


def norm_kept(width: int, size: int, is_used: bool = True) -> int:
    """Bytes per row that an RMS norm keeps: input in fp32, the root, and the output if the next product keeps it."""
    return _FP32 * width + _FP32 + size * width * is_used


def block_kept(
    decoder: DecoderConfig,
    size: int,
    mode: Recompute,
    keys_per_row: float = 1.0,
    repeats_keys: bool = False,
    lora: LoraConfig = _ALL_LEARNED,
) -> tuple[float, float]:
    """Bytes per row that a block keeps for its backward pass, and the part of them up to attention.

    In the last layer, the rest is kept only for scored rows. A product keeps its input if its weight is learned or has
    an adapter; an adapter also keeps the output of its A.
    """
    hidden, heads = decoder.hidden_size, decoder.num_attention_heads
    queries, keys = heads * decoder.head_dim, decoder.num_key_value_heads * decoder.head_dim
    attention = size * queries + 2 * size * (queries if repeats_keys else keys) * keys_per_row + _FP32 * heads
    attention += size * queries  # what it returned, which the output projection keeps
    if mode == "full":
        return size * hidden, size * hidden
    if mode == "selective":
        return size * hidden + attention, size * hidden + attention

    def thin(*names: str) -> int:  # numbers that the adapters of these layers keep
        return sum(lora.rank for name in names if name in lora.targets)

    def uses_input(*names: str) -> bool:
        return not lora.rank or thin(*names) > 0

    inputs, gates = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    before = norm_kept(hidden, size, uses_input(*inputs)) + attention + size * thin(*inputs)
    if decoder.family.qk_norm:
        before += _FP32 * (queries + keys) + _FP32 * (heads + decoder.num_key_value_heads)
    widths = 3 + uses_input("down_proj")  # gate and up, SiLU of the one, and what the last product takes
    after = norm_kept(hidden, size, uses_input(*gates)) + widths * size * decoder.intermediate_size
    return before + after + size * thin("o_proj", *gates, "down_proj"), before


def block_working(decoder: DecoderConfig, size: int) -> int:
    """Temporary bytes per row in a block: three tensors as wide as the MLP, and the residual with a norm in fp32."""
    return 3 * size * decoder.intermediate_size + 2 * (size + _FP32) * decoder.hidden_size
