"""Activation checkpointing: what a block keeps for its backward pass, and what it recomputes.

    none       keeps everything
    selective  keeps the block's input, query, key, value and what attention returned; norms, projections and the MLP
               are recomputed, attention never is
    full       keeps only the block's input

`selective` checkpoints what comes before attention and what comes after it. A policy over single operators
(`create_selective_checkpoint_contexts`) could drop query, key and value too, which are a few per cent of a block. But
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
    """Call `function(*arguments)` and keep only the arguments for the backward pass; without gradients, just call it.

    It is not reentrant, so that FSDP's hooks, which are outside of it, see one forward and one backward pass. There is
    no dropout whose random numbers would have to be drawn again.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
