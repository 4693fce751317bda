"""Operators of a rollout, by module, and what runs instead for tensors that only claim to be on a GPU."""

from __future__ import annotations

OPERATORS = {
    "generation": {"_NORM": "_rms_norm", "_ADD_NORM": "_add_rms_norm", "_ROTARY_WRITE": "_rotary_write",
                   "_SILU_MUL": "_silu_mul"},
    "cached_attention": {"_OPERATOR": "_cached_attention"},
    "sampling": {"_OPERATOR": "_sample"},
}  # fmt: skip
