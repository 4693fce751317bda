"""Registers operators with torch, where `torch.compile`, export and profilers find them, at the lowest cost per call.

A `torch.library.custom_op` costs 9 us a call, a definition in a `Library` 2 us (2-core CPU machine). That matters for
kernels that run for less than that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "searchr1_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any] | None = None) -> Any:
    """Define `schema` ("name(Tensor x) -> Tensor") and return the operator.

    With `fake` (same arguments, empty outputs of the right shape) the operator is opaque: tracing does not look inside,
    so the implementation may read values, and autograd does not differentiate it. Without `fake`, it consists of
    torch's operators and is differentiated, traced and fused as those are.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    if fake is None:
        _LIBRARY.impl(name, implementation, "CompositeImplicitAutograd")
    else:
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
