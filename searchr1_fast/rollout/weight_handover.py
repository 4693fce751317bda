"""Hand the trainer's weights to a generator that has its own copy, and check that they arrived.

A weight that is not handed over stays as it was, and nothing complains. With a tied head and vLLM 0.32, weights without
`lm_head.weight` leave the old head in place, and log-probabilities are off by up to 12 at the start of a run and by 0.2
after the weights moved by a hundredth (`builtin:base`, Intel Xeon, 2026-11-27). So every hand-over is checked twice.

`check_weights` compares the weights that the receiver computes with and the trainer's, number by number, on the device
and without a copy. One weight of many that stays behind shows at the first step that moves it, a norm or a bias as well
as a matrix. That is what a checksum of each would show, but without its collisions: both sides are in one process.

`check_scores` lets both sides score a few known sequences. It sees what the first check cannot: a weight of which the
receiver has no plain copy, something derived from the old weights, a sum over other numbers. At the first hand-over the
receiver has random weights, so a weight that never arrives shows there. A weight that arrived once and does not again
is harder to see, as an update moves the scores by less than rounding explains. It is recognised by scores of the
receiver that stay as they were, to the bit, while the model's move away.

Shape legend
    L  tokens of a known sequence    T  of all of them    D  hidden size    V  vocabulary    ...  a weight's own shape
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from searchr1_fast.models import Decoder, TextTokenizer
from searchr1_fast.models.lora import adapter_scale, base_parameters, merged
from searchr1_fast.models.weights import HEAD
from searchr1_fast.protocol import INVALID_ACTION_MESSAGE, format_observation
from searchr1_fast.rollout.sampling import head_logits

KNOWN_LENGTH = 48  # tokens, at most
# Mean absolute difference of log-probabilities that rounding explains, by the dtype both compute in. Measured for
# builtin:base on a CPU: 3e-6 in fp32, 0.03 in bf16 (Intel Xeon, 2026-11-27); on a GPU, and for larger models: not yet.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
# How far in the mean the model's scores may move, since the receiver's last moved, before the receiver's must move too.
# A margin for a model whose sums are not ordered the same every time, far below what the tolerance lets pass.
STANDSTILL = {torch.float32: 1e-5, torch.bfloat16: 0.02}
COMPARED = 1 << 26  # numbers at a time: comparing them takes a byte each
REMEDY = "take one that this was tested with (docs/architecture.md), or set rollout.engine=native"


class Scores(NamedTuple):
    """Both sides' scores of the known sequences, from when the receiver's last changed."""

    model: np.ndarray  # [T - sequences] fp32
    receiver: np.ndarray  # [T - sequences] fp32


class HandedWeights(Mapping[str, torch.Tensor]):
    """Every weight by its Hugging Face name, a tied head under both of its names.

    An adapter is merged when a weight is asked for, so that one weight at a time is a copy, and not the whole model.
    """

    def __init__(self, model: Decoder) -> None:
        self._all, self._scale = dict(model.named_parameters()), adapter_scale(model)
        self._own = base_parameters(model)
        if model.config.tie_word_embeddings:
            self._all[HEAD] = self._own[HEAD] = model.head_weight

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every weight, by name."""
        return {name: parameter.shape for name, parameter in self._own.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return merged(self._all, name, self._scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def named_weights(model: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the items of `HandedWeights`, one after the other."""
    yield from HandedWeights(model).items()


def check_weights(
    weights: Mapping[str, torch.Tensor],  # [...] each
    held: Iterable[tuple[str, torch.Tensor]],  # [...] each, on the trainer's device
    receiver: str,
) -> list[str]:
    """Return the names of weights of which the receiver showed no copy. ValueError if a copy is not the trainer's.

    `held`: name and copy, in the receiver's own dtype, to which the trainer's numbers are rounded.
    """
    names, counts = [], []
    for name, theirs in held:
        names.append(name)
        counts.append(count_unlike(weights[name], theirs))
    found = torch.stack(counts).tolist() if counts else []  # the one wait for the device
    unlike = {name: count for name, count in zip(names, found, strict=True) if count}
    if unlike:
        name, count = next(iter(unlike.items()))
        raise ValueError(
            f"{receiver} has not got the trainer's weights: {len(unlike)} of {len(weights)} differ, the first {name!r} "
            f"in {count} of its {weights[name].numel()} numbers. Most likely this release names or shares weights in "
            f"another way: {REMEDY}"
        )
    return [name for name in weights if name not in set(names)]


@torch.no_grad()
def count_unlike(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:  # [...], [...] -> [] int64
    """Count the numbers that differ once they have the same dtype. NaN differs from everything."""
    rows = max(1, COMPARED * len(mine) // max(1, mine.numel()))
    parts = zip(mine.split(rows), theirs.split(rows), strict=True)
    return torch.stack([(one.to(other.dtype) != other).sum() for one, other in parts]).sum()


def known_sequences(tokenizer: TextTokenizer, vocab_size: int, max_length: int) -> list[list[int]]:
    """Return texts that a policy sees, and ids from all over the vocabulary in both orders; [L] each, L >= 2."""
    length = min(KNOWN_LENGTH, max_length)
    spread = np.linspace(0, vocab_size - 1, length).astype(np.int64).tolist()
    texts = [INVALID_ACTION_MESSAGE, format_observation([])]
    known = [tokenizer.encode(text)[:length] for text in texts] + [spread, spread[::-1]]
    return [token_ids for token_ids in known if len(token_ids) >= 2]


@torch.no_grad()
def score(model: Decoder, sequences: list[list[int]]) -> np.ndarray:  # [T - sequences] fp32
    """Return the model's log-probability of every token but each sequence's first."""
    device = model.head_weight.device
    token_ids = torch.tensor([token for sequence in sequences for token in sequence], device=device)  # [T]
    lengths = torch.tensor([0, *map(len, sequences)])
    hidden = model.hidden(token_ids, lengths.cumsum(0).to(device), max_seqlen=int(lengths.max()))  # [T, D]
    table = torch.log_softmax(head_logits(hidden, model.head_weight), dim=-1)  # [T, V]
    after = table[:-1].gather(1, token_ids[1:, None])[:, 0].cpu().numpy()
    starts = lengths.cumsum(0)[1:-1].numpy()  # the token after one sequence's end is the next one's first: left out
    return np.delete(after, starts - 1)


def check_scores(
    model: Decoder,
    sequences: list[list[int]],
    scores: list[np.ndarray],  # [L - 1] fp32 each
    receiver: str,
    before: Scores | None = None,
) -> tuple[Scores, float]:
    """Return what to pass as `before` the next time, and the largest difference of two log-probabilities.

    ValueError if the receiver's scores are not the model's, or have not moved with it.
    """
    now = Scores(score(model, sequences), np.concatenate(scores))
    differences, dtype = np.abs(now.receiver - now.model), model.head_weight.dtype
    mean, most, allowed = float(differences.mean()), float(differences.max()), TOLERANCE[dtype]
    if not mean <= allowed:  # NaN too
        raise ValueError(
            f"{receiver} has not got the trainer's weights: it scores known sequences otherwise, by {mean:.3g} in the "
            f"mean and {most:.3g} at most, where rounding explains {allowed:g}. Most likely this release names or "
            f"shares weights in another way: {REMEDY}"
        )
    if before is None or not np.array_equal(before.receiver, now.receiver):
        return now, most
    moved = np.abs(now.model - before.model).mean()
    if moved > STANDSTILL[dtype]:
        raise ValueError(
            f"{receiver} still has the weights of an earlier step: its scores of known sequences have not changed at "
            f"all, and the trainer's by {moved:.3g} in the mean. Most likely this release renews weights in another "
            f"way: {REMEDY}"
        )
    return before, most
