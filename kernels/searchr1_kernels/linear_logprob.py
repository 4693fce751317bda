"""Log-probabilities of given tokens straight from hidden states, without ever holding the logits of all rows.

    logits = hidden @ weight.T        softcap * tanh(logits / softcap)        / temperature        log_softmax

Rows go through the head in chunks that share one workspace. The backward pass recomputes a chunk's logits instead of
keeping them (a CPU keeps up to 32 MiB of them where there is no softcap), so the memory is that of one chunk. On CUDA
the backward pass goes through the vocabulary in slabs; `_linear_slabs` says what that takes. On a CPU the chunk is
sized to stay in cache, which is where the speed comes from: the plain way writes and re-reads [N,V] several times,
through memory that the operating system has to map first.

On CUDA with Triton the passes over a chunk's logits are fused (`_linear_rows_triton`). On sm_90 and sm_100, bf16 and
fp16 rows that need no gradient take a kernel that keeps no logits at all (`_linear_forward_triton`). So do bf16 rows
that need one, if there is no softcap; their backward pass forms the gradient in the product that makes the logits
(`_linear_gradient_triton`).

Precision: logits, log-probabilities, entropy and the gradient of the logits are fp32 whatever the inputs are (fp64 for
fp64 inputs); on CUDA the gradient of bf16 rows is rounded to bf16 before its products. Low-precision inputs are
multiplied with fp32 results on CUDA and upcast on a CPU. fp32 operands are multiplied in fp32 unless
`torch.set_float32_matmul_precision` says otherwise.

Results repeat bit for bit: nothing is added in an order that varies. A row's log-probability and entropy have the same
bits alone and in any batch

- on CUDA, where the kernel without logits computes them: nothing in it depends on N;
- on a CPU with MKL: products have a multiple of 16 rows, for which MKL sums over D in one order (tried up to D 8,192
  with AVX2 and AVX-512, on an AMD EPYC, 2026-11-25).

This is not promised where cuBLAS multiplies: it picks a kernel, and with it the order of sums, by the height of a
chunk, and chunks depend on N and on free memory. Nor is it promised for the gradient of `hidden`, whose sums over V
both libraries split by the shape of the product.

Left out: a bias (no language-model head in use here has one), gradients of gradients, and forward-mode differentiation.

Shape legend: N rows, D hidden size, V vocabulary, K rows kept for the backward pass.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch.autograd.function import once_differentiable

from searchr1_kernels import checks
from searchr1_kernels._installed import has_triton
from searchr1_kernels._linear_chunks import PlainRows, head_gradients, rows_class, runs_products, score_chunks
from searchr1_kernels._linear_sums import compute_dtype
from searchr1_kernels.registration import register


# For type checkers: with `return_entropy` two tensors, else one.
@overload
def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = ...,
    softcap: float | None = ...,
    mask: torch.Tensor | None = ...,
    return_entropy: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = ...,
    softcap: float | None = ...,
    mask: torch.Tensor | None = ...,
    return_entropy: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def linear_logprob(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D], the dtype of hidden
    targets: torch.Tensor,  # [N] int64 or int32
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,  # [N] bool
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """-> log-probabilities of the targets, [N] fp32, and with `return_entropy` each row's entropy in nats, [N] fp32.

        logprob = log_softmax(cap(hidden @ weight.T) / temperature)[targets]

    The entropy is that of the same distribution. Both outputs are differentiable in `hidden` and `weight`. fp64 inputs
    give fp64 outputs. Any strides will do.

    Rows where `mask` is False cost nothing, return 0 and get no gradient; their targets may be anything. Selecting the
    other rows waits for the GPU once, so where the host knows the selection, select before the call.

    Raises ValueError for shapes, types, devices or options that do not fit, and on a CPU for targets outside [0, V). On
    a GPU nobody reads the targets, and Triton's passes give such a row a log-probability of NaN. Targets of -100, which
    other losses ignore, therefore need `mask=targets != -100`; leaving their rows out before the call is better.
    """
    check_head(hidden, weight, targets, temperature, softcap, mask)
    if mask is None:
        return score_all(hidden, weight, targets, temperature, softcap, return_entropy)
    rows = mask.nonzero().squeeze(1)  # [M]
    outputs = score_all(hidden[rows], weight, targets[rows], temperature, softcap, return_entropy)
    if not return_entropy:
        return outputs.new_zeros(mask.shape).index_put((rows,), outputs)
    return tuple(output.new_zeros(mask.shape).index_put((rows,), output) for output in outputs)


def score_all(hidden, weight, targets, temperature, softcap, return_entropy):
    """`linear_logprob` without a mask, on arguments that have been checked."""
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    logprobs, entropy, _ = _OPERATOR(
        hidden, weight, targets.long(), temperature, softcap, return_entropy, differentiable
    )
    return (logprobs, entropy) if return_entropy else logprobs


def check_head(hidden, weight, targets, temperature, softcap, mask) -> None:
    """Check the arguments that all operations on the head share; shapes as in `linear_logprob`."""
    checks.check_shape("hidden", hidden, ("N", "D"))
    checks.check_shape("weight", weight, ("V", hidden.shape[1]))
    checks.check_shape("targets", targets, (hidden.shape[0],))
    checks.check_floating("hidden", hidden)
    checks.check_dtype("weight", weight, hidden.dtype)
    checks.check_reverse_mode("hidden", hidden)
    checks.check_reverse_mode("weight", weight)
    checks.check_dtype("targets", targets, torch.int64, torch.int32)
    checks.check_device("weight", weight, "hidden", hidden)
    checks.check_device("targets", targets, "hidden", hidden)
    checks.check_positive("temperature", temperature)
    if softcap is not None:
        checks.check_positive("softcap", softcap)
    checks.check_mask(mask, "hidden", hidden)
    if weight.shape[0] == 0:
        raise ValueError("weight: expected at least one vocabulary row, got none")


def score_tokens(hidden, weight, targets, temperature, softcap, return_entropy, differentiable):
    """-> logprobs [N], entropy [N] or None, and what the backward pass needs saved."""
    checks.check_indices("targets", targets, weight.shape[0])
    if runs_products(hidden, weight, softcap) if differentiable else _scores_without_logits(hidden, weight):
        from searchr1_kernels import _linear_forward_triton

        saved = hidden.new_empty(_saved_shape(hidden, weight, softcap, differentiable), dtype=torch.float32)
        outputs = _linear_forward_triton.score_without_logits(
            hidden, weight, targets, temperature, softcap, return_entropy, saved if differentiable else None
        )  # fmt: skip
        return *outputs, saved
    return score_chunks(hidden, weight, targets, temperature, softcap, return_entropy, differentiable)


def _scores_without_logits(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel without logits takes these tensors."""
    if hidden.device.type != "cuda" or not has_triton():
        return False
    from searchr1_kernels import _linear_forward_triton

    return _linear_forward_triton.takes(hidden, weight)


def _saved_shape(hidden, weight, softcap, differentiable) -> tuple[int, int]:
    return rows_class(hidden).saved_shape(hidden, weight, softcap, differentiable)


def _forward(hidden, weight, targets, temperature, softcap, return_entropy, differentiable):
    """Implementation of `_OPERATOR` on any device."""
    with torch.cuda.device_of(hidden):  # Triton launches on the current device, not on that of the tensors
        logprobs, entropy, saved = score_tokens(
            hidden, weight, targets, temperature, softcap, return_entropy, differentiable
        )  # fmt: skip
    return logprobs, logprobs.new_empty(0) if entropy is None else entropy, saved


def _forward_fake(hidden, weight, targets, temperature, softcap, return_entropy, differentiable):
    """Shapes and types of `_forward`'s outputs."""
    from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols  # takes a second; tracing has loaded it

    logprobs = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    if has_free_unbacked_symbols(hidden.shape[0]) and rows_class(hidden) is PlainRows:
        # A mask inside the graph selects the rows: how many it keeps decides how many are saved.
        saved = logprobs.new_empty(torch.library.get_ctx().new_dynamic_size(), weight.shape[0])
    else:
        saved = logprobs.new_empty(_saved_shape(hidden, weight, softcap, differentiable))
    return logprobs, torch.empty_like(logprobs) if return_entropy else logprobs.new_empty(0), saved


def _backward(
    grad_logprobs, grad_entropy, hidden, weight, targets, entropy, saved, temperature, softcap, want_hidden, want_weight
):
    """Implementation of `_BACKWARD_OPERATOR` on any device."""
    with torch.cuda.device_of(hidden):
        grad_hidden, grad_weight = head_gradients(
            hidden, weight, targets, grad_logprobs, grad_entropy, entropy, saved,
            temperature, softcap, want_hidden, want_weight,
        )  # fmt: skip
    return (
        grad_hidden.to(hidden.dtype) if want_hidden else hidden.new_empty(0),
        grad_weight.to(weight.dtype) if want_weight else weight.new_empty(0),
    )


def _backward_fake(
    grad_logprobs, grad_entropy, hidden, weight, targets, entropy, saved, temperature, softcap, want_hidden, want_weight
):
    """Shapes and types of `_backward`'s outputs."""
    return (
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, targets, ctx.temperature, ctx.softcap, return_entropy, _ = inputs
    _, entropy, saved = output
    ctx.save_for_backward(hidden, weight, targets, entropy, saved)
    ctx.mark_non_differentiable(*([saved] if return_entropy else [entropy, saved]))
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate(ctx: Any, grad_logprobs, grad_entropy, _):
    nothing = (None,) * 7
    if grad_logprobs is None and grad_entropy is None:
        return nothing
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(grad_entropy)
    want_hidden, want_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = _BACKWARD_OPERATOR(
        grad_logprobs, grad_entropy, *ctx.saved_tensors, ctx.temperature, ctx.softcap, want_hidden, want_weight
    )
    return grad_hidden if want_hidden else None, grad_weight if want_weight else None, *nothing[2:]


# An output that is not wanted is empty: operators cannot return None.
_OPERATOR = register(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor targets, float temperature, float? softcap, "
    "bool return_entropy, bool differentiable) -> (Tensor logprobs, Tensor entropy, Tensor saved)",
    _forward,
    _forward_fake,
)
_BACKWARD_OPERATOR = register(
    "linear_logprob_backward(Tensor grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor targets, "
    "Tensor entropy, Tensor saved, float temperature, float? softcap, bool want_hidden, bool want_weight) "
    "-> (Tensor grad_hidden, Tensor grad_weight)",
    _backward,
    _backward_fake,
)
torch.library.register_autograd(_OPERATOR, _differentiate, setup_context=_setup_context)
