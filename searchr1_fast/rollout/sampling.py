"""Choose the next token of every running sequence, and give its log-probability.

Each sequence has its own stream of uniforms, a hash of (its seed, the number of tokens it has sampled). A token is
drawn by inverting the distribution's cumulative function at the next uniform. What a sequence samples is therefore a
function of its seed and its logits, not of the sequences it shares a batch with, nor of the order they came in.

On a GPU, sampling never synchronises with the host and no shape depends on values, so recorded decode steps include it.

Shape legend
    S  running sequences    D  hidden size    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from searchr1_kernels import _head_numba, sample_tokens

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
    """Apply the head. On CUDA the sums of a bf16 product are kept in fp32, as in the trainer."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return torch.mm(hidden, weight.T).float()


def sample(
    logits: torch.Tensor,  # [S, V] fp32
    uniforms: torch.Tensor,  # [S] fp64 in [0, 1)
    params: SamplingParams,
) -> tuple[torch.Tensor, torch.Tensor]:  # token_ids [S] int64, logprobs [S] fp32
    """Sample the next tokens, and return them with their log-probabilities.

    The log-probability is over the whole vocabulary at the temperature (1 when greedy), even where top-p and top-k
    leave tokens out: that is what the trainer computes for the same token.
    """
    assert logits.dtype == torch.float32
    assert uniforms.dtype == torch.float64
    return sample_tokens(logits, uniforms, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p)


def sample_in_parts(
    hidden: torch.Tensor,  # [S, D]
    weight: torch.Tensor,  # [V, D]
    uniforms: torch.Tensor,  # [S] fp64 in [0, 1)
    params: SamplingParams,
    on_split: Callable[[], None],  # called whenever rows are taken again in two parts
) -> tuple[torch.Tensor, torch.Tensor]:  # token_ids [S] int64, logprobs [S] fp32
    """Apply the head and `sample`, for all rows at once or for as many as there is memory for.

    Greedy sampling on a CPU finds the likeliest tokens without the logits. torch.OutOfMemoryError if there is no memory
    for a single row.
    """
    if params.is_greedy and _head_numba.takes(hidden, weight):
        return _head_numba.likeliest(hidden, weight)
    try:
        return sample(head_logits(hidden, weight), uniforms, params)
    except torch.OutOfMemoryError as error:
        if len(hidden) == 1:
            error.add_note("this ended the rollout: lower rollout.max_num_seqs, or rollout.cache_tokens")
            raise
    on_split()  # after the handler, as in forward.py
    middle = len(hidden) // 2
    parts = (slice(0, middle), slice(middle, None))
    found = [sample_in_parts(hidden[part], weight, uniforms[part], params, on_split) for part in parts]
    token_ids, logprobs = (torch.cat(both) for both in zip(*found, strict=True))
    return token_ids, logprobs


def stream_keys(seeds: list[int]) -> np.ndarray:  # [S] uint64
    """Return one key per seed, for `uniforms`. A seed may be any integer."""
    return _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64) + _GOLDEN)


def uniforms(
    keys: np.ndarray,  # [S] uint64
    counters: np.ndarray,  # [S] uint64
) -> np.ndarray:  # [S] fp64 in [0, 1)
    """Return number `counters[s]` of stream `keys[s]`, 53 bits each."""
    return (_mix(keys + counters * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:  # [S] uint64 -> [S] uint64
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection in which every bit reaches every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
