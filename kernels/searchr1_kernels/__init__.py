"""Kernels for reinforcement learning of language models, on packed tensors, usable without the rest of the project.

Names are resolved on first use, so importing the package loads neither a compiler nor torch, and a machine without a
GPU (or without Triton) pays for nothing that it does not call.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_HOME = {
    "linear_logprob": "linear_logprob",
    "linear_policy_loss": "linear_policy_loss",
    "PolicyLoss": "policy_objective",
    "masked_kl": "masked_kl",
    "gae": "gae",
    "group_advantages": "group",
    "masked_moments": "group",
    "masked_whiten": "group",
    "cached_attention": "cached_attention",
    "attention_tiles": "cached_attention",
    "rms_norm": "generation",
    "rotary_write": "generation",
    "silu_mul": "generation",
    "sample_tokens": "sampling",
    "topk_inner_product": "topk",
    "TopKIndex": "topk",
    "open_search": "topk_search",
    "TopKSearch": "topk_search",
    "Hits": "topk_search",
    "Settled": "topk_search",
}
_MODULES = ("reference",)

__all__ = [*_HOME, *_MODULES]


class _Package(ModuleType):
    """Some functions share their module's name. Importing a submodule sets it as an attribute of its package, which
    would hide the function from then on; here the function keeps the name, whatever is imported first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


sys.modules[__name__].__class__ = _Package
