"""Read back the weights that vLLM computes with, under the names by which they were handed over.

vLLM joins projections of the same input (`qkv_proj`, `gate_up_proj`: its model's `packed_modules_mapping`) and pads the
vocabulary, so a weight of ours is some rows of one of its tensors. On a GPU, vLLM computes with that tensor. On a CPU
it computes with a copy packed for the processor's instructions, and often keeps no other. Applied to unit vectors, such
a layer gives its weight, to the bit. That costs as much as a prompt of `hidden_size` tokens.

Left out: layouts of other kinds (quantised, transposed, split among ranks). A weight that cannot be found is left out
of the answer, and the caller counts it (weight_handover.py).

Shape legend
    O  outputs of one of vLLM's layers    K  its inputs    k  inputs at a time
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

UNIT_VECTORS = 1024  # at a time, so that a layer of many inputs needs no square matrix of that size


class Place(NamedTuple):
    """Where vLLM has a weight of ours."""

    layer: str
    leaf: str  # "weight" or "bias"
    start: int  # row


def held_weights(model: nn.Module, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every copy that vLLM's model has of the named weights: two of some, none of one that it cannot show.

    It is quick if the weights of a layer follow each other, parts of a joined one included, as in a checkpoint.
    """
    joined = getattr(model, "packed_modules_mapping", {})
    wholes = {part: whole for whole, parts in joined.items() for part in parts}
    read, copies = "", {}
    for name, shape in shapes.items():
        layer, leaf, start = place(name, shapes, joined, wholes)
        if layer != read:
            read, copies = layer, {}
        if leaf not in copies:
            copies[leaf] = list(_copies(model, layer, leaf))
        for copy in copies[leaf]:
            rows = copy[start : start + shape[0]]
            if rows.shape == shape:
                yield name, rows


def place(
    name: str, shapes: Mapping[str, torch.Size], joined: Mapping[str, list[str]], wholes: Mapping[str, str]
) -> Place:
    """Find where vLLM has a weight. `joined`: a layer's parts, in the order of their rows; `wholes`: a part's layer."""
    path, _, leaf = name.rpartition(".")
    parent, dot, module = path.rpartition(".")
    if module not in wholes:
        return Place(path, leaf, 0)
    parts = joined[wholes[module]]
    before = [f"{parent}{dot}{part}.{leaf}" for part in parts[: parts.index(module)]]
    return Place(f"{parent}{dot}{wholes[module]}", leaf, sum(shapes[other][0] for other in before))


@torch.no_grad()
def _copies(model: nn.Module, name: str, leaf: str) -> Iterator[torch.Tensor]:  # [O, ...] each
    """Yield the plain tensor if there is one, and the weight of the copy packed for a CPU if there is one."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return
    plain = getattr(layer, leaf, None)
    if plain is None:
        return
    if plain.numel():
        yield plain.detach()
    if leaf == "weight" and hasattr(layer, "cpu_linear"):
        yield _unpacked(layer, plain)


def _unpacked(layer: Any, plain: torch.Tensor) -> torch.Tensor:  # [O, K]
    """Recover a linear layer's weight, column by column."""
    size = plain.shape[1] if plain.numel() else layer.input_size
    columns = []
    for start in range(0, size, UNIT_VECTORS):
        units = torch.zeros(min(UNIT_VECTORS, size - start), size, dtype=plain.dtype)  # [k, K]
        units.diagonal(start).fill_(1.0)
        columns.append(layer.quant_method.apply(layer, units, None).T)  # [O, k]
    return torch.cat(columns, dim=1)
