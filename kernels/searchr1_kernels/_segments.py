"""Sums over runs of rows, in a fixed order on every device: `index_add` on CUDA has none.

Shape legend: N tokens, R rows that predict them, S segments.
"""

from __future__ import annotations

import torch


def segment_sums(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """values [N], offsets [S+1] int64 that rise from 0 to N -> sums [S] fp64.

    `unsafe` because checking the offsets would wait for the device."""
    return torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0.0, unsafe=True)


class TokenRows:
    """Which row predicts each token, where sequences that begin alike have one row for several tokens."""

    def __init__(self, token_rows: torch.Tensor, num_rows: int) -> None:
        """`token_rows` [N] int64, from 0 to `num_rows` - 1."""
        self._rows = token_rows
        ordered, self._order = token_rows.sort(stable=True)
        self._offsets = torch.searchsorted(ordered, torch.arange(num_rows + 1, device=ordered.device))  # [R+1]

    def to_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """[R] -> [N], for each token its row's value."""
        return values[self._rows]

    def to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """[N] -> [R], for each row the sum over its tokens."""
        return segment_sums(values[self._order], self._offsets).to(values.dtype)
