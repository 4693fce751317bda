"""The objective as an operator on log-probabilities, and what it shares with the operator that includes the head.

Shape legend: N tokens, R rows that predict them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from searchr1_kernels import checks
from searchr1_kernels._segments import TokenRows
from searchr1_kernels.policy_objective import (
    MAX_METRICS,
    MIN_METRICS,
    SUM_METRICS,
    PolicyLoss,
    PolicyRows,
    RowTerms,
    entropy_slope,
    row_terms,
    total_and_metrics,
)
from searchr1_kernels.registration import register

# The part of both operators' schemas that describes the objective, in the order of `arguments`.
SCHEMA = (
    "Tensor rollout_logprobs, Tensor advantages, Tensor? ref_logprobs, Tensor? old_logprobs, Tensor? token_weights, "
    "Tensor? token_rows, Tensor? cu_seqlens, str kind, float clip_low, float clip_high, float dual_clip, "
    "float importance_cap, str kl_kind, float kl_coefficient, float entropy_coefficient, bool on_policy"
)
NUM_METRICS = len(SUM_METRICS) + len(MAX_METRICS) + len(MIN_METRICS)
_NUM_TOKEN_ARGUMENTS = len(PolicyRows._fields)
_NUM_LOSS_ARGUMENTS = len(PolicyLoss.__dataclass_fields__)


def arguments(tokens: PolicyRows, token_rows, cu_seqlens, loss: PolicyLoss, on_policy: bool) -> tuple[Any, ...]:
    """-> the operators' arguments that `SCHEMA` names."""
    settings = tuple(getattr(loss, name) for name in PolicyLoss.__dataclass_fields__)
    return (*tokens, None if token_rows is None else token_rows.long(), cu_seqlens, *settings, on_policy)


@dataclass(frozen=True)
class Objective:
    """The loss, and the data of the tokens, that the rows' log-probabilities are evaluated with."""

    loss: PolicyLoss
    tokens: PolicyRows  # [N] each
    sharing: TokenRows | None
    on_policy: bool
    cu_seqlens: torch.Tensor | None  # [S+1]

    @classmethod
    def of(cls, num_rows: int, values: tuple[Any, ...]) -> Objective:
        """Build from R and `arguments`; on a CPU, the numbers in `token_rows` and `cu_seqlens` are checked."""
        tokens, rest = PolicyRows(*values[:_NUM_TOKEN_ARGUMENTS]), values[_NUM_TOKEN_ARGUMENTS:]
        token_rows, cu_seqlens, *settings, on_policy = rest
        sharing = None
        if token_rows is not None:
            checks.check_indices("token_rows", token_rows, num_rows)
            sharing = TokenRows(token_rows, num_rows)
        if cu_seqlens is not None:
            checks.check_offsets("cu_seqlens", cu_seqlens, tokens.advantages.shape[0])
        return cls(PolicyLoss(*settings), tokens, sharing, on_policy, cu_seqlens)

    def slopes(
        self, logprobs: torch.Tensor, begin: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, RowTerms]:
        """logprobs [R] -> slopes of rows `begin` to `end`, and the terms behind them.

        The slopes are the derivatives with respect to log-probabilities and entropies, summed over a row's tokens.
        Only these rows of `logprobs` are read; for gspo, all are."""
        tokens = self.tokens
        if self.sharing is not None:
            # Only the device knows which tokens belong to these rows: all are computed, and the others ignored.
            logprobs = self.sharing.to_tokens(logprobs)
        elif self.cu_seqlens is None:
            tokens, logprobs = tokens.slice(begin, end), logprobs[begin:end]
        terms = row_terms(self.loss, tokens, logprobs, self.on_policy, self.cu_seqlens)
        slopes = (terms.slope, entropy_slope(self.loss, tokens, logprobs))
        if self.sharing is not None:
            slopes = tuple(None if slope is None else self.sharing.to_rows(slope)[begin:end] for slope in slopes)
        return *slopes, terms

    def value(
        self, logprobs: torch.Tensor, entropy: torch.Tensor, terms: RowTerms | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logprobs, entropy [R] -> `total_and_metrics`. `terms`: from `slopes`, if one call covered all rows."""
        if self.sharing is not None:
            logprobs, entropy = self.sharing.to_tokens(logprobs), self.sharing.to_tokens(entropy)
        if terms is None:
            terms = row_terms(self.loss, self.tokens, logprobs, self.on_policy, self.cu_seqlens)
        return total_and_metrics(self.loss, self.tokens, terms, entropy)


def _forward(logprobs, entropy, *values):
    """logprobs, entropy [R] -> total, metrics, and the slopes of both [R], empty where the entropy has none."""
    objective = Objective.of(len(logprobs), values)
    slope, by_entropy, terms = objective.slopes(logprobs, 0, len(logprobs))
    return *objective.value(logprobs, entropy, terms), slope, slope.new_empty(0) if by_entropy is None else by_entropy


def _has_bonus(values: tuple[Any, ...]) -> bool:
    """Whether the entropy's coefficient in `arguments` is not 0."""
    return bool(values[_NUM_TOKEN_ARGUMENTS + 2 + _NUM_LOSS_ARGUMENTS - 1])


def _forward_fake(logprobs, entropy, *values):
    """-> empty tensors of the shapes and types of `_forward`'s outputs."""
    by_entropy = torch.empty_like(logprobs) if _has_bonus(values) else logprobs.new_empty(0)
    return logprobs.new_empty(()), logprobs.new_empty(NUM_METRICS), torch.empty_like(logprobs), by_entropy


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, metrics, slope, by_entropy = output
    ctx.num_inputs, ctx.has_bonus = len(inputs), _has_bonus(inputs[2:])
    ctx.save_for_backward(slope, by_entropy)
    ctx.mark_non_differentiable(metrics, slope, by_entropy)
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate(ctx: Any, grad_total, *_):
    nothing = (None,) * ctx.num_inputs
    if grad_total is None:
        return nothing
    slope, by_entropy = ctx.saved_tensors
    return slope * grad_total, by_entropy * grad_total if ctx.has_bonus else None, *nothing[2:]


OBJECTIVE = register(
    f"policy_objective(Tensor logprobs, Tensor entropy, {SCHEMA}) "
    "-> (Tensor total, Tensor metrics, Tensor slope, Tensor entropy_slope)",
    _forward,
    _forward_fake,
)
torch.library.register_autograd(OBJECTIVE, _differentiate, setup_context=_setup_context)
