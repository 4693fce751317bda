"""Compute layers that take the same input as one product; their weights lie side by side but stay separate parameters.

Shape legend
    T  tokens    D  hidden size    n  rows of one part
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from searchr1_fast.models.lora import LoraLinear, adapted_product, join_adapters, joined_adapters

if TYPE_CHECKING:
    from searchr1_fast.models.decoder import Model


def project(x: torch.Tensor, layers: Sequence[nn.Linear]) -> Sequence[torch.Tensor]:
    """[T, D] -> what each layer gives, [T, its outputs] each.

    It takes one product if the weights lie side by side, and the biases too, and two more if the layers are adapted.
    """
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


def join_projections(model: Model) -> None:
    """Lay the weights of q, k and v side by side in memory, and those of gate and up, and their adapters as well.

    The parameters remain the same objects with the same names and values. Whatever gives them other memory
    (`Module.to`) undoes this, which costs only the speed.
    """
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
    """Return a view of all parts if they lie one after the other in one memory, else None."""
    first = parts[0]
    expected, memory = first.data_ptr(), first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != expected or part.untyped_storage().data_ptr() != memory or not part.is_contiguous():
            return None
        expected += part.numel() * part.element_size()
    return first.detach().as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
