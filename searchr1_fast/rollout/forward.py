"""The forward pass of a step in which sequences join: whole, or in parts if the device has no memory for it whole.

A prefill of many tokens takes the most memory of a rollout, and the engine cannot know how much is free: a search
index, another process or fragmentation may have taken it. So a pass that runs out of memory is made again in two
halves, and these in halves in turn, down to a single token. Nothing is lost: a pass writes only the keys and values of
its own tokens and reads what was cached before it, so the parts give what the whole gives, and what a failed pass wrote
is written again.

Shape legend
    S  sequences    T  their new tokens    D  hidden size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from searchr1_fast.models import Decoder, KVCache


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of some sequences, end to end."""

    token_ids: torch.Tensor  # [T] int64
    cu_seqlens: torch.Tensor  # [S+1] int64: 0, …, T
    slots: torch.Tensor  # [S] int64
    positions: torch.Tensor  # [S] int64: how many tokens each slot holds already
    lengths: np.ndarray  # [S] int64: those of cu_seqlens, on the host

    def halves(self) -> tuple[Tokens, Tokens]:
        """Split into two parts with about as many tokens each, between sequences; a lone sequence is itself split."""
        ends = np.cumsum(self.lengths)
        if len(ends) == 1:
            return self._halves_of_one()
        cut = 1 + int(np.abs(ends[:-1] - ends[-1] / 2).argmin())  # sequences of the first part
        middle = int(ends[cut - 1])
        first = Tokens(
            self.token_ids[:middle],
            self.cu_seqlens[: cut + 1],
            self.slots[:cut],
            self.positions[:cut],
            self.lengths[:cut],
        )
        second = Tokens(
            self.token_ids[middle:],
            self.cu_seqlens[cut:] - middle,
            self.slots[cut:],
            self.positions[cut:],
            self.lengths[cut:],
        )
        return first, second

    def _halves_of_one(self) -> tuple[Tokens, Tokens]:
        length = int(self.lengths[0])
        parts, middle = [], length // 2
        for begin, end in ((0, middle), (middle, length)):
            ends = torch.tensor([0, end - begin], device=self.cu_seqlens.device)
            part = self.token_ids[begin:end], ends, self.slots, self.positions + begin, np.array([end - begin])
            parts.append(Tokens(*part))
        return parts[0], parts[1]


def forward_in_parts(
    model: Decoder,
    cache: KVCache,
    tokens: Tokens,
    on_split: Callable[[], None],  # called for every pass that is made again in two halves
) -> torch.Tensor:  # [S, D]
    """Append the tokens to the cache, and return the hidden state of each sequence's last one.

    torch.OutOfMemoryError if there is no memory for a single token.
    """
    arguments = tokens.token_ids, tokens.cu_seqlens, tokens.slots, tokens.positions, cache
    try:
        return model.forward_cached(*arguments, host_lengths=tokens.lengths)
    except torch.OutOfMemoryError as error:
        if len(tokens.token_ids) == 1:
            error.add_note("this ended the rollout: lower rollout.max_num_seqs, or rollout.cache_tokens")
            raise
    # After the handler: the exception is gone, and with it the tensors that its traceback held.
    on_split()
    first, second = (forward_in_parts(model, cache, part, on_split) for part in tokens.halves())
    return second if len(tokens.lengths) == 1 else torch.cat((first, second))
