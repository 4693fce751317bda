"""Low-rank adapters (LoRA, arXiv 2106.09685): with W frozen, A and B learned, layers use W + alpha / rank * B A.

Numerics are peft's: A starts as peft draws it and B at zero, so that training starts at the base. The adapter is two
thin products beside the frozen one, in training and in generation alike, and W is never written.

Generation does not use a merged copy. It would be as large as the model, and W + B A would have to be rounded to the
compute dtype, where B A is lost while it is smaller than half of W's last digit. In bf16 (rank 32, B as ten steps of
AdamW at 1e-5 leave it, 3584 x 3584 of deviation 0.02) 94 % of what the adapter adds is gone, after a hundred steps
51 %, after a thousand 6 %: the sampler would not see what the trainer learns. Merged weights are for what leaves the
process: files, and engines with weights of their own. `save_adapter` writes what such rounding would lose.

The base is shared, as nothing writes it: by the module that is trained, the one that generates, the reference (the base
without adapter) and PPO's critic, which has an adapter of its own.

Left out: dropout on the adapter's input (the sampler could not have it), rsLoRA and DoRA, adapters on embedding and
head, base weights in fewer bits.

Shape legend
    T  packed tokens    I, O  what a layer takes and gives    r  rank
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from searchr1_fast.models.own_rows import own_rows

PARTS = ("lora_A", "lora_B")


class LoraLinear(nn.Linear):
    """A linear layer with its adapter. `weight` and `bias` are those of the layer that it replaces."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=dtype, device=device))  # [r, I]
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=dtype, device=device))  # [O, r]
        self.rank, self.alpha = rank, alpha
        self.is_active = True
        self.joined: JoinedAdapters | None = None

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, I] -> [T, O]
        if not self.is_active:
            return F.linear(x, self.weight, self.bias)
        return adapted_product(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale)


def adapted_product(
    x: torch.Tensor,  # [T, I]
    weight: torch.Tensor,  # [O, I]
    bias: torch.Tensor | None,  # [O]
    below: torch.Tensor,  # [r, I]: A
    above: torch.Tensor,  # [O, r]: B
    scale: float,
) -> torch.Tensor:  # [T, O]
    """Compute x W^T + bias + scale x A^T B^T.

    The frozen product comes last and is added in place. So its sum, with B A's part in it, is rounded only once. And as
    it keeps nothing, recomputation ends before a block's last such product, which is over a quarter of a block.
    """
    thin = F.linear(x, below)  # [T, r]
    if scale != 1.0:
        thin = thin.mul_(scale)  # not by `addmm_`, whose backward would scale at full width
    return F.linear(thin, above, bias).addmm_(x, weight.t())


# ---------------------------------------------------------------------------------------------------- parts of a model


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted layers by name; {} if the model has no adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return A and B of every adapted layer, by name."""
    layers = adapted_layers(model)
    return {f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in PARTS}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters but the adapter's, by Hugging Face's names; a tied head once, as the embedding."""
    own = adapter_parameters(model).keys()
    return {name: parameter for name, parameter in model.named_parameters() if name not in own}


def adapter_scale(model: nn.Module) -> float:
    """Return what B A is multiplied by in all layers; 1 if there is no adapter."""
    return next((layer.scale for layer in adapted_layers(model).values()), 1.0)


def is_adapters(name: str) -> bool:
    """Whether a parameter's name is that of an A or a B."""
    return name.rpartition(".")[2] in PARTS


@torch.no_grad()
def merged(weights: Mapping[str, torch.Tensor], name: str, scale: float) -> torch.Tensor:
    """Return a weight by its name among all of a model's. With an adapter, it is W + scale * B A, summed in fp32 and
    rounded once to W's dtype."""
    layer, _, own = name.rpartition(".")
    weight, below = weights[name].detach(), weights.get(f"{layer}.{PARTS[0]}")
    if own != "weight" or below is None:
        return weight
    above = weights[f"{layer}.{PARTS[1]}"]
    return torch.addmm(weight.float(), above.detach().float(), below.detach().float(), alpha=scale).to(weight.dtype)


def describe_adapter(model: nn.Module) -> str:
    """Describe the adapter of a model that has one, in one line."""
    layers = adapted_layers(model)
    rank, targets = next(iter(layers.values())).rank, dict.fromkeys(name.rpartition(".")[2] for name in layers)
    learned, frozen = (sum(p.numel() for p in part(model).values()) for part in (adapter_parameters, base_parameters))
    return f"adapter: rank {rank} on {', '.join(targets)}; {learned:,} numbers are learned beside {frozen:,} frozen"


# ------------------------------------------------------------------------------------------------- making and switching


def add_adapter(
    model: nn.Module, rank: int, alpha: float, targets: Collection[str], dtype: torch.dtype = torch.float32
) -> None:
    """Freeze every parameter, and replace every linear layer whose own name (the last part, `q_proj`) is among the
    targets by a LoraLinear of `rank`. A and B are on the layer's device, A uninitialised. ValueError for a target that
    the model does not have."""
    assert not adapted_layers(model), "one adapter at a time"
    model.requires_grad_(False)
    found = set()
    for name, module in list(model.named_modules()):
        above, _, own = name.rpartition(".")
        if own in targets and isinstance(module, nn.Linear):
            setattr(model.get_submodule(above), own, LoraLinear(module, rank, alpha, dtype))
            found.add(own)
    if missing := sorted(set(targets) - found):
        raise ValueError(f"the model has no linear layer {missing[0]!r} to adapt")


@torch.no_grad()
def reset_adapter(model: nn.Module, seed: int) -> None:
    """Draw A uniformly in +-1 / sqrt(I), as peft does, and set B to zero. The result is the same on any number of
    ranks: each draws all of A and keeps its rows."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        bound = layer.in_features**-0.5
        whole = torch.empty(layer.rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        local, rows = own_rows(layer.lora_A)
        local.copy_(whole[rows])
        own_rows(layer.lora_B)[0].zero_()


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Use the base alone inside this context. Without an adapter, there is nothing to switch."""
    layers = list(adapted_layers(model).values())
    for layer in layers:
        layer.is_active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_active = True


@torch.no_grad()
def fingerprint(model: nn.Module) -> int:
    """Return a number that tells bases apart: the sum of all their numbers' bits, which is the same in any order."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    parameters = list(base_parameters(model).values())
    total = torch.zeros((), dtype=torch.int64, device=parameters[0].device)
    for parameter in parameters:
        # In pieces, because a sum of narrow integers first widens all of them.
        for piece in parameter.view(integers[parameter.element_size()]).flatten().split(1 << 24):
            total += piece.sum(dtype=torch.int64)
    return int(total)


# ------------------------------------------------------------------------------------- adapters of layers side by side


class JoinedAdapters(NamedTuple):
    """The adapters of n layers that take the same input, as two matrices; each layer's A and B are views of them."""

    below: torch.Tensor  # [n r, I]: each A below the one before
    diagonal: torch.Tensor  # [sum of O, n r]: each B on the diagonal, zeros beside them
    views: list[tuple[torch.Tensor, torch.Tensor]]  # A and B of each


def join_adapters(layers: Sequence[nn.Linear]) -> None:
    """Put the adapters of layers that take the same input into one memory, so that two products serve them all. Layers
    without an adapter get rows of zeros. The parameters remain the same objects with the same values."""
    adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
    if not adapted:
        return
    below = torch.cat([layer.lora_A.detach() for layer in adapted])
    diagonal = below.new_zeros(sum(layer.out_features for layer in layers), len(below))
    outputs = dict(zip(layers, diagonal.split([layer.out_features for layer in layers]), strict=True))
    rank = adapted[0].rank
    views = [(part, outputs[layer].narrow(1, place * rank, rank))
             for place, (layer, part) in enumerate(zip(adapted, below.split(rank), strict=True))]  # fmt: skip
    for layer, (part, block) in zip(adapted, views, strict=True):
        block.copy_(layer.lora_B.detach())
        layer.lora_A.data, layer.lora_B.data = part, block
        layer.joined = JoinedAdapters(below, diagonal, views)


def joined_adapters(layers: Sequence[LoraLinear]) -> JoinedAdapters | None:
    """Return what `join_adapters` made; None if A and B no longer lie there, as after `Module.to`."""
    joined = layers[0].joined
    if joined is None or len(joined.views) != len(layers):
        return None
    for layer, (part, block) in zip(layers, joined.views, strict=True):
        if (layer.lora_A.data_ptr(), layer.lora_B.data_ptr()) != (part.data_ptr(), block.data_ptr()):
            return None
    return joined
