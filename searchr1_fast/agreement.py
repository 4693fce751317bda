"""How far the sampler's log-probabilities are from the trainer's, and the warning when that is too far.

Both compute log-probabilities of the same tokens under the same weights, so a difference is arithmetic, or a fault: a
weight that was not handed over, a cache that holds something else. It is measured on the first minibatch of a step,
before the weights change; importance weights correct it in the loss, and so hide it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from searchr1_fast.config import Config

# Metrics of `linear_policy_loss`, sums over tokens and extremes, from which the keys below are computed.
SUMS = ("logprob_difference", "rollout_policy_kl", "ratio", "ratio_squared")
MAXIMA = ("logprob_difference_max",)

AGREEMENT = ("sampler_difference_mean", "sampler_difference_max", "sampler_kl", "sampler_ess")  # keys of metrics.jsonl

# The KL between sampler and trainer that arithmetic explains, with a margin. The demo has 6e-14 in fp32 and 6e-6 in
# bf16 (one thread of an Intel Xeon, 2026-11-27); deeper models have more: others publish about 1e-3 in bf16 with vLLM.
LIMITS = {"float32": 1e-7, "bfloat16": 1e-2}


def agreement(
    sums: Mapping[str, float], maxima: Mapping[str, float], num_tokens: int, num_sampled: int
) -> dict[str, float]:
    """Compute `AGREEMENT` from `SUMS` and `MAXIMA` over `num_tokens` tokens: mean and largest |log p - log mu|, the k3
    estimate of KL(mu || p), and the share of tokens that importance weights p / mu leave (Kish's effective sample size,
    (sum w)^2 / (n sum w^2)). All are over the `num_sampled` tokens among them: tokens that nobody sampled are in the
    sums with a difference of 0 and a ratio of 1."""
    num_others = num_tokens - num_sampled
    ratio, ratio_squared = sums["ratio"] - num_others, sums["ratio_squared"] - num_others
    return {
        "sampler_difference_mean": sums["logprob_difference"] / num_sampled,
        "sampler_difference_max": maxima["logprob_difference_max"],
        "sampler_kl": sums["rollout_policy_kl"] / num_sampled,
        "sampler_ess": ratio**2 / (num_sampled * ratio_squared),
    }


class AgreementWatch:
    """Warns when a step is beyond the limit, and again only when it has become twice as bad."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._worst = LIMITS[config.model.dtype] / 2

    def warning(self, row: Mapping[str, float | None]) -> str | None:
        """A warning about a step's row, or None. An update that was not finite is reported elsewhere."""
        kl = row["sampler_kl"]
        if kl is None or not math.isfinite(kl) or kl <= 2 * self._worst:
            return None
        self._worst = kl
        return (
            f"step {row['step']}: the sampler's log-probabilities are not the trainer's: KL {kl:.2g}, difference "
            f"{row['sampler_difference_mean']:.2g} in the mean and {row['sampler_difference_max']:.2g} at most, "
            f"effective sample size {row['sampler_ess']:.0%}; {self._cause()}"
        )

    def _cause(self) -> str:
        """The likely cause, and what to do."""
        rollout, algorithm = self._config.rollout, self._config.algorithm
        remedy = ""
        if algorithm.importance_cap == 0:
            remedy += "; algorithm.importance_cap=2 corrects small ones"
        if algorithm.mismatch_mask == "none":
            remedy += "; algorithm.mismatch_mask=geometric leaves the worst trajectories out"
        if rollout.engine == "vllm":
            return (
                "likely vLLM's kernels, as its weights have been compared with the trainer's: try "
                f"rollout.engine=native, or model.dtype=float32, to see{remedy}"
            )
        if self._config.model.dtype == "bfloat16":
            return (
                "more than bf16 explains in most models, so likely very sure predictions, or a fault in the cached "
                f"attention: try model.dtype=float32, or rollout.engine=plain, to see{remedy}"
            )
        return (
            "fp32 does not explain it, so likely a fault in the cached attention or in a kernel: try "
            "rollout.engine=plain and rollout.cuda_graphs=false to see which, and do not trust the run"
        )
