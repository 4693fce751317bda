"""Per-token estimates of KL(policy || reference) from the log-probabilities of sampled tokens.

    k1 = log p - log q        k2 = (log p - log q)^2 / 2        k3 = q/p - 1 - log(q/p)

The difference is limited before the exponential, never after: a limit on the result leaves an infinite derivative
inside it, and 0 * inf is NaN. Beyond the limit an estimate is constant, so its gradient is 0.

Shape legend: N tokens.
"""

from __future__ import annotations

from typing import Literal

import torch

from searchr1_kernels import checks
from searchr1_kernels.registration import register

KLKind = Literal["k1", "k2", "k3"]

# exp(20) = 4.9e8: far above any meaningful ratio, far below the overflow of fp32 and bf16.
EXPONENT_LIMIT = 20.0
# k1 and k2 need no exponential; this only keeps the square of an absurd difference finite.
_DIFFERENCE_LIMIT = 1e9


def masked_kl(
    logprobs: torch.Tensor,  # [N]
    ref_logprobs: torch.Tensor,  # [N]
    kind: KLKind = "k3",
    mask: torch.Tensor | None = None,  # [N] bool
) -> torch.Tensor:
    """-> an estimate of the KL per token, [N] fp32 (fp64 for fp64), 0 where `mask` is False.

    The estimators are those of Schulman, "Approximating KL divergence" (2020). The reference gets no gradient. Values
    and gradients are finite for finite inputs; what masked tokens hold is ignored, even a NaN. Raises ValueError where
    a shape, type or device is not as above, or `kind` is none of the three.
    """
    checks.check_tensor("logprobs", logprobs)
    checks.check_tensor("ref_logprobs", ref_logprobs)
    checks.check_optional("mask", mask)
    if not isinstance(kind, str) or kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kind: expected 'k1', 'k2' or 'k3', got {kind!r}")
    return _OPERATOR(logprobs, ref_logprobs, kind, mask)


def _masked_kl(logprobs, ref_logprobs, kind, mask):
    checks.check_shape("logprobs", logprobs, ("N",))
    checks.check_shape("ref_logprobs", ref_logprobs, (logprobs.shape[0],))
    checks.check_floating("logprobs", logprobs)
    checks.check_floating("ref_logprobs", ref_logprobs)
    checks.check_device("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    checks.check_mask(mask, "logprobs", logprobs)
    compute = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    difference = logprobs.to(compute) - ref_logprobs.detach().to(compute)  # log p - log q
    if mask is not None:
        difference = difference.masked_fill(~mask, 0.0)  # before anything nonlinear, so that no NaN leaks out
    if kind == "k1":
        return difference.clamp(-_DIFFERENCE_LIMIT, _DIFFERENCE_LIMIT)
    if kind == "k2":
        return 0.5 * difference.clamp(-_DIFFERENCE_LIMIT, _DIFFERENCE_LIMIT).square()
    # Only q >> p overflows; q << p is nearly linear and keeps its gradient.
    log_ratio = -difference.clamp(-EXPONENT_LIMIT, _DIFFERENCE_LIMIT)
    return torch.expm1(log_ratio) - log_ratio


_OPERATOR = register(
    "masked_kl(Tensor logprobs, Tensor ref_logprobs, str kind, Tensor? mask) -> Tensor",
    _masked_kl,
)
