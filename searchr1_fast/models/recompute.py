"""Activation checkpointing: what a block keeps for its backward pass, and what it computes again.

    none       keeps everything
    selective  keeps the block's input, query, key, value and what attention returned; norms, projections and the MLP
               are computed again, attention never
    full       keeps the block's input alone

`selective` checkpoints what lies before attention and what lies behind it. A policy over single operators
(`create_selective_checkpoint_contexts`) could drop query, key and value too, which are a few per cent of a block; but
it would have to know the operator's name in every back-end, and flash-attn's older releases have none.

Gradients are the same to the bit where the operations are: the same kernels on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full"]


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, of which only the arguments are kept; without gradients nothing is done about it.

    Not reentrant, so that FSDP's hooks, which are outside of it, see one forward and one backward pass. There is no
    dropout whose random numbers would have to be drawn again.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
