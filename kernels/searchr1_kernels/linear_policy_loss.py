"""The policy's loss straight from hidden states: the head, the ratio, the clip, KL and entropy in one pass.

A row's loss is a closed-form function of its log-probability (`policy_objective`), so the gradient of a chunk's logits
can be formed as soon as its log-probabilities are known, while the logits still exist. Compared with `linear_logprob`
followed by a loss, this saves the recomputation in the backward pass: 6 N D V operations instead of 8. Autograd sees a
loss with two finished gradients. They include the denominator, so the usual backward pass, which begins with 1, has
nothing left to do and hands them out as they are (`_scaling`).

The price is that the weight's gradient exists from the forward pass on, beside a chunk of logits. For V 151,936,
D 2,048 and bf16 it takes 0.62 GB where up to eight chunks are summed in bf16, with a rounding for each, and 1.24 GB
where more are summed in fp32. A chunk takes 1.17 GB on CUDA. On sm_90 and sm_100 without a softcap it holds
probabilities in bf16 (`_linear_gradient_triton`) and takes up to 0.7 GB: eight of these are 17,600 rows. For more rows
it takes up to 1.4 GB: eight of these are 35,000 rows. `recompute` takes the two passes of `linear_logprob` instead:
8 N D V operations, and for 16k bf16 rows at most 1.36 GB with both gradients (`_linear_slabs`). So does GSPO, whose
ratio is known only after the last row of a sequence.

On a CPU, a row without a gradient (zero advantage and no KL, or clipped) is left out of the gradients' matrix products.
On CUDA it is not (`_linear_chunks` says why), so drop what the host knows to be zero, such as groups of equal rewards,
before the call.

Where sequences begin alike, one row predicts a token of each. It goes through the head once, and the slopes of its
tokens add up.

Shape legend: N tokens, R rows that predict them (R = N, one each, without `token_rows`), D hidden size, V vocabulary,
S sequences, M rows that a mask keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from searchr1_kernels import checks
from searchr1_kernels._linear_chunks import chunk_ranges, live_rows, longest, rows_class, runs_products
from searchr1_kernels._linear_sums import Gradients, compute_dtype, gradient_dtype, operand, weight_gradient_dtype
from searchr1_kernels._objective_operator import NUM_METRICS, OBJECTIVE, SCHEMA, Objective, arguments
from searchr1_kernels._scaling import scaled
from searchr1_kernels.linear_logprob import check_head, score_all
from searchr1_kernels.policy_objective import MAX_METRICS, MIN_METRICS, SUM_METRICS, PolicyLoss, PolicyRows
from searchr1_kernels.registration import register

# Above this share of rows with a gradient, gathering those of a chunk costs what the smaller products would save.
_LIVE_SHARE = 0.9


def linear_policy_loss(
    hidden: torch.Tensor,  # [R, D]
    weight: torch.Tensor,  # [V, D], the dtype of hidden
    targets: torch.Tensor,  # [R] int64 or int32
    rollout_logprobs: torch.Tensor,  # [N]
    advantages: torch.Tensor,  # [N]
    *,
    ref_logprobs: torch.Tensor | None = None,  # [N]
    old_logprobs: torch.Tensor | None = None,  # [N]
    loss: PolicyLoss | None = None,
    denominator: float | torch.Tensor,
    on_policy: bool = False,
    token_weights: torch.Tensor | None = None,  # [N]
    token_rows: torch.Tensor | None = None,  # [N] int64 or int32
    cu_seqlens: torch.Tensor | None = None,  # [S+1] int32 or int64
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,  # [N] bool
    recompute: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-> loss (0-d fp32, fp64 for fp64 inputs), differentiable in `hidden` and `weight`, and metrics (0-d, constants).

        loss = sum over tokens of token_weight * (policy + kl_coefficient * KL - entropy_coefficient * H) / denominator

    `loss` is the objective, `PolicyLoss()` by default; `policy_objective` writes out its terms. Its ratio is

    - by default, to the sampler: exp(log p - rollout_logprobs), at most `importance_cap`, without an importance weight;
    - with `on_policy`, 1, because these weights sampled. The importance weight, a constant, is
      min(p / p_sampler, importance_cap): how far sampler and trainer disagree in arithmetic;
    - with `old_logprobs`, to the trainer's weights before the step: exp(log p - old_logprobs). The importance weight is
      min(p_old / p_sampler, importance_cap).

    With `importance_cap` 0 there is neither cap nor weight. REINFORCE has no ratio, only the importance weight: that of
    `old_logprobs` where they are given, else that of `on_policy`. A NaN in `rollout_logprobs` marks a token that nobody
    sampled, which counts as on-policy.

    `token_weights` and `denominator` define the mean:

    - no weights, and the number of policy tokens of the whole optimizer step (DAPO, and this project);
    - 1 / length of the row's sequence, and the number of sequences (GRPO, GSPO);
    - no weights, and the number of sequences times a constant length (Dr. GRPO).

    Losses of micro-batches with the same denominator add up.

    `token_rows` is the row that predicts each token, where several tokens (of sequences that begin alike) share one.
    `cu_seqlens` is where sequences begin in N; it is for gspo, which needs whole sequences. Rows where `mask` is False
    count for nothing, whatever they hold; selecting the others waits for the GPU once. `mask` is not for use with
    `token_rows`, which already lists what counts.

    `recompute` forms the gradients in the backward pass, from recomputed logits. That takes a third more operations; on
    CUDA the weight's gradient then never exists in fp32 as a whole, however many rows there are.

    Metrics are sums over tokens, so those of micro-batches and ranks add up, except the extremes
    `logprob_difference_max`, `ratio_max` and `ratio_min` (infinite without rows). Computing them does not wait for the
    device. The sums are

    - policy_loss: weighted, not divided;
    - clip_fraction: tokens whose gradient the clip removed, or for cispo bounded;
    - truncated_fraction: tokens that the cap bound;
    - logprob_difference: |log p - log p_sampler|;
    - ratio: p / p_sampler; ratio_squared; importance_weight;
    - rollout_policy_kl: k3 of KL(sampler || policy);
    - entropy; and with `ref_logprobs`, kl_ref.

    Raises ValueError where `linear_logprob` does, for settings that lack their inputs, for inputs that nothing would
    read, and for 16-bit log-probabilities. FSDP casts the arguments of a module to its `param_dtype`, unless its
    `MixedPrecisionPolicy` has `cast_forward_inputs=False`.
    """
    loss = PolicyLoss() if loss is None else loss
    check_head(hidden, weight, targets, temperature, softcap, mask)
    compute = compute_dtype(hidden)
    given = PolicyRows(rollout_logprobs, advantages, ref_logprobs, old_logprobs, token_weights)
    _check(hidden, given, loss, denominator, on_policy, token_rows, mask, cu_seqlens)
    rows = PolicyRows(*(None if tensor is None else tensor.detach().to(compute) for tensor in given))
    if mask is not None:
        hidden, targets, rows, cu_seqlens = _keep(mask, hidden, targets, rows, cu_seqlens)
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    aims = arguments(rows, token_rows, cu_seqlens, loss, on_policy)
    if recompute or loss.kind == "gspo" or not any(wanted):
        scores = score_all(hidden, weight, targets, temperature, softcap, return_entropy=True)
        total, metrics, *_ = OBJECTIVE(*scores, *aims)
        value = (total / denominator).to(total.dtype)
    else:
        if not isinstance(denominator, torch.Tensor):  # a compiler would build a graph for each number
            denominator = denominator * torch.ones((), dtype=torch.float64, device="cpu")  # and with torch.full as well
        options = (denominator, temperature, softcap, *wanted, True)  # the gradients returned are dropped here
        value, metrics, *_ = _OPERATOR(hidden, weight, targets.long(), *aims, *options)
    named = dict(zip((*SUM_METRICS, *MAX_METRICS, *MIN_METRICS), metrics.unbind(), strict=True))
    if ref_logprobs is None:
        del named["kl_ref"]
    return value, named


def _keep(mask, hidden, targets, rows: PolicyRows, cu_seqlens):
    """-> the arguments with only the M rows that the mask [N] keeps, and where sequences begin among those."""
    kept = mask.nonzero().squeeze(1)  # [M]
    if cu_seqlens is not None:
        if not torch.compiler.is_compiling():  # reads the values on a CPU
            checks.check_offsets("cu_seqlens", cu_seqlens, mask.shape[0])
        cu_seqlens = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.cumsum(0)])[cu_seqlens.long()]
    return hidden[kept], targets[kept], PolicyRows(*(None if x is None else x[kept] for x in rows)), cu_seqlens


def _check(hidden, rows: PolicyRows, loss: PolicyLoss, denominator, on_policy: bool, token_rows, mask, cu_seqlens):
    """Check what `check_head` does not; shapes as in `linear_policy_loss`."""
    num_tokens = hidden.shape[0]
    if token_rows is not None:
        num_tokens = _check_token_rows(token_rows, hidden, mask)
    if not isinstance(loss, PolicyLoss):
        raise ValueError(f"loss: expected a PolicyLoss, got {type(loss).__name__}")
    for name, tensor in rows._asdict().items():
        if tensor is not None or name in ("rollout_logprobs", "advantages"):
            checks.check_shape(name, tensor, (num_tokens,))
            checks.check_floating(name, tensor)
            checks.check_device(name, tensor, "hidden", hidden)
    for name in ("rollout_logprobs", "ref_logprobs", "old_logprobs"):
        checks.check_precise(name, getattr(rows, name))
    if not isinstance(denominator, torch.Tensor):
        checks.check_positive("denominator", denominator)
    elif denominator.dim() != 0:
        raise ValueError(f"denominator: expected a number or a 0-d tensor, got shape {list(denominator.shape)}")
    elif denominator.device.type != "cpu":  # a meta tensor would dispatch to the operator's fake
        checks.check_device("denominator", denominator, "hidden", hidden)
    if loss.kl_coefficient and rows.ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected [N] for a kl_coefficient of {loss.kl_coefficient}, got None")
    if on_policy and rows.old_logprobs is not None:
        raise ValueError("old_logprobs: expected None on policy, where the ratio is 1, got a tensor")
    if (loss.kind == "gspo") != (cu_seqlens is not None):
        got = "None" if cu_seqlens is None else "a tensor"
        raise ValueError(f"cu_seqlens: expected [S+1] for gspo and None for the others, got {got} for {loss.kind}")
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, "hidden", hidden)


def _check_token_rows(token_rows, hidden, mask) -> int:
    """Check `token_rows`, and return N."""
    checks.check_shape("token_rows", token_rows, ("N",))
    checks.check_dtype("token_rows", token_rows, torch.int64, torch.int32)
    checks.check_device("token_rows", token_rows, "hidden", hidden)
    if mask is not None:
        raise ValueError("mask: expected None with token_rows, which leaves tokens out by not listing them")
    return token_rows.shape[0]


def _forward(hidden, weight, targets, *rest):
    """Implementation of the operator on any device: chunk by chunk, log-probabilities, slopes and gradient."""
    *values, denominator, temperature, softcap, want_hidden, want_weight, _ = rest
    checks.check_indices("targets", targets, weight.shape[0])
    objective = Objective.of(len(hidden), tuple(values))
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, not on that of the tensors
        gradients = Gradients(hidden, weight, want_hidden, want_weight)
        kept = runs_products(hidden, gradients.operand, softcap)
        chunks = chunk_ranges(hidden, gradients.operand, for_gradient=True, kept=kept)
        rows_type = rows_class(hidden, kept)
        passes = rows_type(hidden, gradients.operand, temperature, softcap, longest(chunks), for_gradient=True)
        logprobs = hidden.new_zeros(hidden.shape[0], dtype=compute_dtype(hidden))
        entropy = torch.empty_like(logprobs)
        for where in chunks:
            chunk = operand(hidden[where])
            passes.scores(chunk, targets[where], logprobs[where], entropy[where])
            *slopes, terms = objective.slopes(logprobs, where.start, where.stop)
            slopes = tuple(None if slope is None else slope / denominator for slope in slopes)
            live = live_rows(*slopes, _LIVE_SHARE)
            inputs = (targets[where], *slopes, entropy[where])
            if live is not None:
                passes.select(live, with_entropy=slopes[1] is not None)
                inputs = tuple(None if tensor is None else tensor[live] for tensor in inputs)
                chunk, where = chunk[live], where.start + live
            gradients.add(*passes.gradient(*inputs), chunk, where)
        del passes  # frees their workspace before the weight's gradient is copied to another type
        grad_hidden, grad_weight = gradients.results()
    total, metrics = objective.value(logprobs, entropy, terms if len(chunks) == 1 else None)
    value, nothing = (total / denominator).to(total.dtype), total.new_empty(0)
    return value, metrics, grad_hidden if want_hidden else nothing, grad_weight if want_weight else nothing


def _forward_fake(hidden, weight, targets, *rest):
    """Shapes and types of `_forward`'s outputs."""
    compute, (want_hidden, want_weight, _) = compute_dtype(hidden), rest[-3:]
    value = hidden.new_empty((), dtype=compute)
    return (
        value,
        value.new_empty(NUM_METRICS),
        hidden.new_empty(hidden.shape, dtype=gradient_dtype(hidden)) if want_hidden else value.new_empty(0),
        weight.new_empty(weight.shape, dtype=weight_gradient_dtype(weight)) if want_weight else value.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight = inputs[:2]
    _, metrics, grad_hidden, grad_weight = output
    ctx.dtypes = (hidden.dtype, weight.dtype)
    ctx.num_inputs, ctx.may_change = len(inputs), inputs[-1]
    ctx.save_for_backward(grad_hidden, grad_weight)
    ctx.mark_non_differentiable(metrics, grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate(ctx: Any, grad_value, *_):
    if grad_value is None:
        return (None,) * ctx.num_inputs
    gradients = tuple(
        scaled(gradient, grad_value, dtype, ctx.may_change) if wanted else None
        for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
    )
    return *gradients, *(None,) * (ctx.num_inputs - 2)


# A gradient that is not wanted is empty: operators cannot return None. The denominator is 0-d, on the device or a CPU.
# `may_change`: the backward pass may overwrite the gradients returned, because nobody else holds them.
_OPERATOR = register(
    f"linear_policy_loss(Tensor hidden, Tensor weight, Tensor targets, {SCHEMA}, Tensor denominator, "
    "float temperature, float? softcap, bool want_hidden, bool want_weight, bool may_change) "
    "-> (Tensor value, Tensor metrics, Tensor grad_hidden, Tensor grad_weight)",
    _forward,
    _forward_fake,
)
torch.library.register_autograd(_OPERATOR, _differentiate, setup_context=_setup_context)
