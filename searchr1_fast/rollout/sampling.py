"""Choose the next token of every running sequence, and say how likely it was.

Each sequence has its own stream of uniforms, a hash of (its seed, the number of tokens it has sampled), and a token is
the inverse of the distribution's cumulative function at the next uniform. What a sequence samples is therefore a
function of its seed and its logits: not of the sequences it shares a batch with, nor of the order they came in.

On a GPU the host learns nothing on the way, and no shape depends on values: decode steps are recorded with it. Only
top-p without top-k sorts the vocabulary.

Shape legend
    S  running sequences    D  hidden size    V  vocabulary    K  weights to draw from: the vocabulary, or a part of it
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to turn logits into a token. Temperature 0 is greedy and ignores the rest; `top_k` 0 is no limit."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is negative; give 0 for greedy or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]; give 1 to keep every token")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is negative; give 0 for no limit")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def keeps_all(self) -> bool:
        """Whether every token may be drawn."""
        return self.top_p == 1.0 and self.top_k == 0


def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # [S, D], [V, D] -> [S, V] fp32
    """The head. On CUDA the sums of a bf16 product are kept in fp32, as the trainer keeps them."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return torch.mm(hidden, weight.T).float()


def sample(
    logits: torch.Tensor,  # [S, V] fp32
    uniforms: torch.Tensor,  # [S] fp64 in [0, 1)
    params: SamplingParams,
) -> tuple[torch.Tensor, torch.Tensor]:  # token_ids [S] int64, logprobs [S] fp32
    """The next tokens and their log-probabilities.

    The log-probability is of the whole vocabulary at the temperature (1 when greedy), whatever top-p and top-k leave
    out: it is what the trainer computes for the same token.
    """
    assert logits.dtype == torch.float32
    assert uniforms.dtype == torch.float64
    if params.is_greedy:
        likeliest = logits.argmax(dim=-1)
        return likeliest, logits.gather(1, likeliest[:, None])[:, 0] - logits.logsumexp(dim=-1)
    if params.temperature != 1.0:
        logits = logits / params.temperature
    probabilities = torch.softmax(logits, dim=-1)  # [S, V]
    weights = probabilities if params.keeps_all else _keep(probabilities, params)
    token_ids = _draw(weights, uniforms)
    # No cancellation: a softmax has small relative errors, and what was drawn is not zero.
    return token_ids, probabilities.gather(1, token_ids[:, None])[:, 0].log()


def _draw(
    weights: torch.Tensor,  # [S, K] fp32, not negative
    uniforms: torch.Tensor,  # [S] fp64
) -> torch.Tensor:  # [S] int64
    """The place at which the running sum of the weights reaches the uniform's share of their total.

    Found in two strides, first the block and then the place in it: running sums over a whole vocabulary cost more than
    the softmax, sums of blocks next to nothing.
    """
    width = math.gcd(weights.shape[1], 64)
    blocks = weights.unflatten(1, (-1, width))  # [S, K / width, width]
    sums = blocks.sum(dim=-1).cumsum(dim=-1)  # [S, K / width]
    shares = (uniforms * sums[:, -1]).float()
    block = _first_above(sums, shares)
    before = sums.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0].masked_fill(block == 0, 0.0)
    inside = blocks[torch.arange(len(blocks), device=weights.device), block].cumsum(dim=-1)  # [S, width]
    return block * width + _first_above(inside, shares - before)


def _first_above(sums: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:  # [S, n] fp32, [S] fp32 -> [S] int64
    """The first place whose running sum exceeds the share; of NaN, some place.

    A share that rounding lifted to the total is put below it, so that the weight at the place is never zero.
    """
    total = sums[:, -1]
    shares = torch.minimum(shares, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, shares[:, None], right=True)[:, 0].clamp(max=sums.shape[1] - 1)


def _keep(probabilities: torch.Tensor, params: SamplingParams) -> torch.Tensor:  # [S, V] fp32 -> [S, V] fp32
    """The probabilities with 0 for what top-k and top-p leave out; equals are kept or left out together.

    Top-p counts in the distribution that top-k left, and always keeps the likeliest token. Only values are sorted; all
    of them on the CPU by numpy, which is six times as fast there.
    """
    if params.top_k:
        descending = probabilities.topk(min(params.top_k, probabilities.shape[1])).values  # [S, K]
    elif probabilities.device.type == "cpu":
        descending = torch.from_numpy(np.sort(probabilities.numpy(), axis=-1)).flip(-1)  # [S, V]
    else:
        descending = probabilities.sort(dim=-1, descending=True).values
    before = descending.cumsum(dim=-1) - descending
    num_kept = (before < params.top_p * descending.sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True)  # [S, 1]
    least = descending.gather(1, (num_kept - 1).clamp(min=0))
    return probabilities.masked_fill(probabilities < least, 0.0)


def stream_keys(seeds: list[int]) -> np.ndarray:  # [S] uint64
    """One key per seed, for `uniforms`. Seeds are any integers."""
    return _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64) + _GOLDEN)


def uniforms(
    keys: np.ndarray,  # [S] uint64
    counters: np.ndarray,  # [S] uint64
) -> np.ndarray:  # [S] fp64 in [0, 1)
    """Number `counters[s]` of the stream `keys[s]`, 53 bits each."""
    return (_mix(keys + counters * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:  # [S] uint64 -> [S] uint64
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection in which every bit reaches every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
