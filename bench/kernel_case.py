"""One problem of the kernels' benchmark: its providers, its least cost, and the peers that are missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

OURS = "ours"


@dataclass(slots=True)
class Provider:
    """One way to compute the result; `answer`, which is not timed, makes its output comparable with the others'."""

    run: Callable[[], Any]
    answer: Callable[[Any], tuple[torch.Tensor, ...]] | None = lambda output: output


@dataclass(slots=True)
class Case:
    """One problem; `flops` and `bytes` are the least that it can cost, `left_out` gives a reason per peer."""

    kernel: str
    shape: dict[str, Any]
    providers: dict[str, Provider]
    flops: float = 0.0
    bytes: float = 0.0
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The shape in one line."""
        return " ".join(f"{name}={value:,}" if isinstance(value, int) else f"{name}={value}"
                        for name, value in self.shape.items())  # fmt: skip
