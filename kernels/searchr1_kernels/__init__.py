"""Kernels for reinforcement learning of language models, on packed tensors, usable without the rest of the project.

Names are resolved on first use, so importing the package loads neither a compiler nor torch, and a machine without a
GPU (or without Triton) pays for nothing that it does not call.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # names for editors and type checkers, which run nothing; `as` marks them as re-exported
    from searchr1_kernels import reference as reference
    from searchr1_kernels.cached_attention import attention_tiles as attention_tiles
    from searchr1_kernels.cached_attention import cached_attention as cached_attention
    from searchr1_kernels.gae import gae as gae
    from searchr1_kernels.generation import rms_norm as rms_norm
    from searchr1_kernels.generation import rotary_write as rotary_write
    from searchr1_kernels.generation import silu_mul as silu_mul
    from searchr1_kernels.group import group_advantages as group_advantages
    from searchr1_kernels.group import masked_moments as masked_moments
    from searchr1_kernels.group import masked_whiten as masked_whiten
    from searchr1_kernels.linear_logprob import linear_logprob as linear_logprob
    from searchr1_kernels.linear_policy_loss import linear_policy_loss as linear_policy_loss
    from searchr1_kernels.masked_kl import masked_kl as masked_kl
    from searchr1_kernels.policy_objective import PolicyLoss as PolicyLoss
    from searchr1_kernels.sampling import sample_tokens as sample_tokens
    from searchr1_kernels.topk import TopKIndex as TopKIndex
    from searchr1_kernels.topk import topk_inner_product as topk_inner_product
    from searchr1_kernels.topk_search import Hits as Hits
    from searchr1_kernels.topk_search import Settled as Settled
    from searchr1_kernels.topk_search import TopKSearch as TopKSearch
    from searchr1_kernels.topk_search import open_search as open_search

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
    """Keeps a name for the function where a function and its module share one, whatever is imported first.

    Importing a submodule sets it as an attribute of its package, which would hide the function from then on.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


if not TYPE_CHECKING:  # a type checker would conclude that every name exists

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("_"))})


sys.modules[__name__].__class__ = _Package
