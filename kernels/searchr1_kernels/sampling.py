"""The next token of every row of logits, and how likely it was, without sorting the vocabulary.

A token is the inverse of the cumulative distribution function at a given uniform number, so it depends on nothing but
its row and that number. The host reads nothing on the way and no shape depends on values, so a decoding step with
sampling can be recorded as a CUDA graph.

CUDA: `_sampling_triton`, two launches, or four with top-k or top-p. CPU: a few compiled passes over each row
(`_sampling_numba`). Elsewhere, and on CUDA without Triton: torch's operators, the plain twin of both.

Shape legend
    S  rows    V  vocabulary    K  the k likeliest tokens, or all
"""

from __future__ import annotations

import math

import numpy as np
import torch

from searchr1_kernels import checks
from searchr1_kernels._installed import has_triton
from searchr1_kernels._threads import num_parts, run_parts
from searchr1_kernels.registration import register

_TOKENS_PER_THREAD = 1 << 19  # that make starting a thread worthwhile


def sample_tokens(
    logits: torch.Tensor,  # [S, V] fp32
    randoms: torch.Tensor,  # [S] fp64 or fp32, in [0, 1)
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> token ids [S] int64 and their log-probabilities [S] fp32; constants to autograd.

    The id is the first at which the running sum of the kept probabilities, in the order of ids, exceeds `randoms` times
    their total. Top-k keeps the k likeliest tokens (0: all). Of these, top-p keeps the fewest likeliest that hold that
    share of their probability (Holtzman et al., 2020), at least one. Tokens as likely as one that is kept are kept.
    Temperature 0 takes the likeliest token, of equals the first.

    The log-probability is that of the token in the whole vocabulary at the temperature (1 where that is 0), whatever
    top-k and top-p left out: what `linear_logprob` gives for the same token. A token with a logit of -inf is never
    drawn. Where a row has other logits that are not finite, its log-probability is NaN or infinite and its id is
    arbitrary.

    A row has the same bits alone and in any batch. Raises ValueError where a shape, type, device or setting is not as
    above.
    """
    checks.check_shape("logits", logits, ("S", "V"))
    checks.check_dtype("logits", logits, torch.float32)  # in 16 bits the log-probability's error would become a ratio
    checks.check_shape("randoms", randoms, (logits.shape[0],))
    checks.check_dtype("randoms", randoms, torch.float64, torch.float32)
    checks.check_device("randoms", randoms, "logits", logits)
    if logits.shape[1] == 0:
        raise ValueError("logits: expected at least one token, got none")
    checks.check_number("temperature", temperature)
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected 0 or a finite number above, got {temperature}")
    checks.check_whole("top_k", top_k)
    if top_k < 0:
        raise ValueError(f"top_k: expected 0 (no limit) or a number above, got {top_k}")
    checks.check_number("top_p", top_p)
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a number above 0 and up to 1 (no limit), got {top_p}")
    return _OPERATOR(logits.detach(), randoms.detach(), temperature, top_k, top_p)


def _sample(logits, randoms, temperature, top_k, top_p):
    if _on_gpu(logits):
        from searchr1_kernels import _sampling_triton

        return _sampling_triton.sample(logits, randoms, temperature, top_k, top_p)
    if logits.device.type == "cpu":
        return _sample_cpu(logits, randoms, temperature, top_k, top_p)
    return sample_torch(logits, randoms, temperature, top_k, top_p)


def _on_gpu(logits):
    return logits.device.type == "cuda" and has_triton()


def _fake(logits, randoms, temperature, top_k, top_p):
    return randoms.new_empty(randoms.shape, dtype=torch.int64), logits.new_empty(randoms.shape)


def _sample_cpu(logits, randoms, temperature, top_k, top_p):
    """As `sample_torch`, in compiled passes."""
    from searchr1_kernels import _sampling_numba

    values = logits.contiguous().numpy()
    ids, logprobs = np.empty(len(randoms), np.int64), np.empty(len(randoms), np.float32)
    if temperature == 0:
        run, arrays = _sampling_numba.take_likeliest, (values, ids, logprobs)
    else:
        uniforms = randoms.double().contiguous().numpy()
        run, arrays = _sampling_numba.choose, (values, uniforms, temperature, top_k, float(top_p), ids, logprobs)
    cuts = np.linspace(0, len(ids), num_parts(values.size, _TOKENS_PER_THREAD) + 1).astype(np.int64)
    run_parts(lambda turns: run(turns, cuts, *arrays), len(cuts) - 1)
    return torch.from_numpy(ids), torch.from_numpy(logprobs)


def sample_torch(
    logits: torch.Tensor,  # [S, V] fp32
    randoms: torch.Tensor,  # [S]
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator in torch's own operators. With top-p alone it sorts the vocabulary."""
    if temperature == 0:
        likeliest = logits.argmax(dim=-1)
        return likeliest, logits.gather(1, likeliest[:, None])[:, 0] - logits.logsumexp(dim=-1)
    probabilities = _softmax(logits, temperature)
    weights = probabilities if top_k == 0 and top_p == 1 else _keep(probabilities, top_k, top_p)
    ids = _draw(weights, randoms)
    # No cancellation: a softmax has small relative errors, and the probability drawn is not zero.
    return ids, probabilities.gather(1, ids[:, None])[:, 0].log()


def _softmax(logits, temperature):
    """[S, V]."""
    return torch.softmax(logits / temperature if temperature != 1 else logits, dim=-1)


def _draw(weights, randoms):
    """weights [S, V], randoms [S] -> [S]: the place at which the running sum reaches the share of the total.

    It is found in two steps, first the block and then the place in it: running sums over a whole vocabulary cost more
    than the softmax, sums of blocks next to nothing.
    """
    width = math.gcd(weights.shape[1], 64)
    blocks = weights.unflatten(1, (-1, width))  # [S, V / width, width]
    sums = blocks.sum(dim=-1).cumsum(dim=-1)  # [S, V / width]
    shares = (randoms * sums[:, -1]).float()
    block = _first_above(sums, shares)
    before = sums.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0].masked_fill(block == 0, 0.0)
    inside = blocks[torch.arange(len(blocks), device=weights.device), block].cumsum(dim=-1)  # [S, width]
    return block * width + _first_above(inside, shares - before)


def _first_above(sums, shares):
    """sums [S, n], shares [S] -> [S]: the first place whose running sum exceeds the share; with NaN, an arbitrary one.

    A share that rounding has lifted to the total is lowered below it, so that the weight at the place is never zero.
    """
    total = sums[:, -1]
    shares = torch.minimum(shares, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, shares[:, None], right=True)[:, 0].clamp(max=sums.shape[1] - 1)


def _keep(probabilities, top_k, top_p):
    """[S, V] -> [S, V] with 0 for what is left out. On a CPU numpy sorts: it is six times as fast there."""
    if top_k:
        descending = probabilities.topk(min(top_k, probabilities.shape[1])).values  # [S, K]
    elif probabilities.device.type == "cpu":
        descending = torch.from_numpy(np.sort(probabilities.numpy(), axis=-1)).flip(-1)
    else:
        descending = probabilities.sort(dim=-1, descending=True).values
    before = descending.cumsum(dim=-1) - descending
    num_kept = (before < top_p * descending.sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True)  # [S, 1]
    least = descending.gather(1, (num_kept - 1).clamp(min=0))
    return probabilities.masked_fill(probabilities < least, 0.0)


_OPERATOR = register(
    "sample_tokens(Tensor logits, Tensor randoms, float temperature, int top_k, float top_p) -> (Tensor, Tensor)",
    _sample,
    _fake,
)
