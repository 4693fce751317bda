"""The weights of a BERT-family encoder, laid out for its forward pass.

Products take weights [in, out], and query, key and value are one product.

Shape legend
    H  hidden size
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Layer:
    """One layer: weights [in, out] with their biases [out], and the two normalisations."""

    qkv: tuple[torch.Tensor, torch.Tensor]
    output: tuple[torch.Tensor, torch.Tensor]
    norm: tuple[torch.Tensor, torch.Tensor]
    up: tuple[torch.Tensor, torch.Tensor]
    down: tuple[torch.Tensor, torch.Tensor]
    last_norm: tuple[torch.Tensor, torch.Tensor]

    @property
    def products(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """The weights and biases of the matrix products."""
        return self.qkv, self.output, self.up, self.down

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors of the layer."""
        return tuple(tensor for pair in (*self.products, self.norm, self.last_norm) for tensor in pair)


class Taker:
    """Takes tensors out of a state dict by name, on the device and in the dtype of the computation."""

    def __init__(self, weights: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype, folder: Path):
        self._weights, self._device, self._dtype, self._folder = weights, device, dtype, folder

    def __call__(self, name: str) -> torch.Tensor:
        if name not in self._weights:
            raise ValueError(f"{self._folder}: the weights lack {name}; is this a model of the BERT family?")
        return self._weights[name].to(self._device, self._dtype)

    def norm(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [H], bias [H]."""
        return self(f"{name}.weight"), self(f"{name}.bias")

    def linear(self, *names: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Layers of these names, side by side as one: weight [in, out], bias [out]."""
        weight = torch.cat([self(f"{name}.weight") for name in names]).t().contiguous()
        return weight, torch.cat([self(f"{name}.bias") for name in names])

    def layer(self, prefix: str) -> Layer:
        """The layer whose names begin with `prefix`."""
        own = f"{prefix}attention.self."
        return Layer(
            qkv=self.linear(f"{own}query", f"{own}key", f"{own}value"),
            output=self.linear(f"{prefix}attention.output.dense"),
            norm=self.norm(f"{prefix}attention.output.LayerNorm"),
            up=self.linear(f"{prefix}intermediate.dense"),
            down=self.linear(f"{prefix}output.dense"),
            last_norm=self.norm(f"{prefix}output.LayerNorm"),
        )
