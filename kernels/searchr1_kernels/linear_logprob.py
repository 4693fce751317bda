"""Log-probabilities of given tokens straight from hidden states, without ever holding the logits of all rows.

    logits = hidden @ weight.T        softcap * tanh(logits / softcap)        / temperature        log_softmax

Rows are taken in chunks that share one workspace; the backward pass recomputes a chunk's logits instead of keeping
them. So the memory is one chunk, and on a CPU the chunk is sized to stay in cache, which is where the speed is from:
the plain way writes and re-reads [N,V] several times through memory that the operating system has to map first.

Precision: logits, log-probabilities, entropy and the gradient of the logits are fp32 whatever the inputs are (fp64 for
fp64 inputs). Low-precision inputs are multiplied with fp32 results on CUDA and upcast on a CPU.

Left out: a bias (no language-model head in use here has one), and gradients of gradients.

Shape legend: N rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from searchr1_kernels import checks

# Bytes of one chunk of logits. CPU: small enough for the cache. CUDA: large enough for the matrix products.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
# Below this many rows the weight and its gradient would be re-read too often to be worth a smaller workspace.
_MIN_CHUNK_ROWS = 256
# Chunks of logits up to so many bytes are kept for the backward pass, whatever N is; the others are recomputed.
_KEEP_BYTES = {"cpu": 32 << 20, "cuda": 0}
# With a smaller share of rows than this to differentiate, recomputing only those beats using what was kept of all.
_LIVE_SHARE = 0.6


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
    """`log_softmax(cap(hidden @ weight.T) / temperature)[targets]` as [N] fp32, and with `return_entropy` also the
    entropy of each row's distribution, [N] fp32. Differentiable in `hidden` and `weight`, through both outputs.

    Rows where `mask` is False cost nothing, return 0 and get no gradient; their targets may be anything. Selecting rows
    waits for the GPU once, so select before the call where the selection is known to the host.
    fp64 inputs give fp64 outputs.
    """
    _check(hidden, weight, targets, temperature, softcap, mask)
    if mask is None:
        return _apply(hidden, weight, targets, temperature, softcap, return_entropy)
    rows = mask.nonzero().squeeze(1)  # [M]
    outputs = _apply(hidden[rows], weight, targets[rows], temperature, softcap, return_entropy)
    if not return_entropy:
        return outputs.new_zeros(mask.shape).index_put((rows,), outputs)
    return tuple(output.new_zeros(mask.shape).index_put((rows,), output) for output in outputs)


def _apply(hidden, weight, targets, temperature, softcap, return_entropy):
    """Check what the mask may excuse, then the differentiable part. Shapes as above, all rows wanted."""
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"targets: expected ids from 0 to {weight.shape[0] - 1}, got {low} to {high}")
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    logprobs, entropy = _LinearLogprob.apply(hidden, weight, targets.long(), temperature, softcap, return_entropy, keep)
    return (logprobs, entropy) if return_entropy else logprobs


def _check(hidden, weight, targets, temperature, softcap, mask) -> None:
    checks.check_shape("hidden", hidden, ("N", "D"))
    checks.check_shape("weight", weight, ("V", hidden.shape[1]))
    checks.check_shape("targets", targets, (hidden.shape[0],))
    checks.check_floating("hidden", hidden)
    checks.check_dtype("weight", weight, hidden.dtype)
    checks.check_dtype("targets", targets, torch.int64, torch.int32)
    checks.check_device("weight", weight, "hidden", hidden)
    checks.check_device("targets", targets, "hidden", hidden)
    checks.check_positive("temperature", temperature)
    if softcap is not None:
        checks.check_positive("softcap", softcap)
    checks.check_mask(mask, "hidden", hidden)
    if weight.shape[0] == 0:
        raise ValueError("weight: expected at least one vocabulary row, got none")


class _LinearLogprob(torch.autograd.Function):
    """(hidden [N,D], weight [V,D], targets [N]) -> (logprobs [N], entropy [N] or None)."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, temperature, softcap, return_entropy, keep):
        keep_bytes = _KEEP_BYTES.get(hidden.device.type, 0) if keep and softcap is None else 0
        logprobs, entropy, ctx.kept = _forward_chunks(
            hidden, weight, targets, temperature, softcap, return_entropy, keep_bytes
        )
        ctx.save_for_backward(hidden, weight, targets, entropy)
        ctx.temperature, ctx.softcap = temperature, softcap
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs, grad_entropy):
        nothing = (None,) * 7
        kept, ctx.kept = ctx.kept, {}  # used up in place; a second backward pass recomputes
        if grad_logprobs is None and grad_entropy is None:
            return nothing
        hidden, weight, targets, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(grad_entropy)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        rows = _live_rows(grad_logprobs, grad_entropy)
        if rows is not None:
            kept = {}
            hidden_all, hidden, targets, grad_logprobs = hidden, hidden[rows], targets[rows], grad_logprobs[rows]
            if grad_entropy is not None:
                grad_entropy, entropy = grad_entropy[rows], entropy[rows]
        grad_hidden, grad_weight = _backward_chunks(
            hidden, weight, targets, grad_logprobs, grad_entropy, entropy, kept,
            ctx.temperature, ctx.softcap, want_hidden, want_weight,
        )  # fmt: skip
        if rows is not None and want_hidden:
            grad_hidden = torch.zeros_like(hidden_all).index_copy_(0, rows, grad_hidden)
        return grad_hidden, grad_weight, *nothing[2:]


def _live_rows(grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor | None) -> torch.Tensor | None:
    """[M] int64: rows with any gradient at all (clipped tokens have none); None where that is nearly every row.

    On CUDA always None: finding out would wait for the GPU.
    """
    if grad_logprobs.device.type != "cpu":
        return None
    live = grad_logprobs != 0
    if grad_entropy is not None:
        live |= grad_entropy != 0
    return None if int(live.sum()) >= _LIVE_SHARE * live.numel() else live.nonzero().squeeze(1)


def _forward_chunks(hidden, weight, targets, temperature, softcap, return_entropy, keep_bytes):
    """-> logprobs [N], entropy [N] or None, and kept {first row: log-probabilities [C,V]}; fp32 (fp64 for fp64)."""
    compute = _compute_dtype(hidden)
    num_rows, chunks = hidden.shape[0], _chunks(hidden, weight, compute)
    logprobs = hidden.new_empty(num_rows, dtype=compute)
    entropy = hidden.new_empty(num_rows, dtype=compute) if return_entropy else None
    weight = _operand(weight)
    logits_buffer = _workspace(hidden, weight, chunks, compute)
    product_buffer = torch.empty_like(logits_buffer) if return_entropy else None
    kept: dict[int, torch.Tensor] = {}
    for begin, end in chunks:
        logits = logits_buffer[: end - begin]  # [C, V]
        keep_bytes -= logits.nbytes
        if keep_bytes >= 0:
            logits = kept[begin] = torch.empty_like(logits)
        _logits(_operand(hidden[begin:end]), weight, temperature, softcap, out=logits, tanh=logits)
        torch.log_softmax(logits, dim=-1, out=logits)
        torch.gather(logits, 1, targets[begin:end, None], out=logprobs[begin:end, None])
        if return_entropy:
            product = product_buffer[: end - begin]
            torch.exp(logits, out=product).mul_(logits)
            torch.sum(product, dim=-1, out=entropy[begin:end]).neg_()
    return logprobs, entropy, kept


def _backward_chunks(
    hidden, weight, targets, grad_logprobs, grad_entropy, entropy, kept, temperature, softcap, want_hidden, want_weight
):
    """-> grad_hidden [N,D] or None, grad_weight [V,D] or None, in the dtypes of hidden and weight.

    With p the probabilities, g and e the gradients of log-probability and entropy H:
        d logits = (g * (1[target] - p)  -  e * p * (log p + H)) / temperature,  times 1 - tanh^2 under a softcap
    """
    compute = _compute_dtype(hidden)
    chunks = _chunks(hidden, weight, compute)
    grad_hidden = torch.empty_like(hidden) if want_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=compute) if want_weight else None
    operand = _operand(weight)
    logits_buffer = _workspace(hidden, operand, chunks, compute)
    tanh_buffer = torch.empty_like(logits_buffer) if softcap is not None else logits_buffer
    product_buffer = torch.empty_like(logits_buffer) if grad_entropy is not None else None
    for begin, end in chunks:
        logits, tanh = logits_buffer[: end - begin], tanh_buffer[: end - begin]  # [C, V]
        rows = _operand(hidden[begin:end])
        if begin in kept:
            logits = kept.pop(begin)  # log-probabilities differ from logits by a constant, which what follows ignores
        else:
            _logits(rows, operand, temperature, softcap, out=logits, tanh=tanh)
        g = grad_logprobs[begin:end, None] / temperature  # [C, 1]
        if grad_entropy is None:
            _logprob_gradient(logits, targets[begin:end, None], g)
        else:
            e = grad_entropy[begin:end, None] / temperature
            _entropy_gradient(logits, targets[begin:end, None], g, e, entropy[begin:end, None],
                              product_buffer[: end - begin])  # fmt: skip
        if softcap is not None:
            logits.addcmul_(logits, tanh.square_(), value=-1)
        gradient = logits.to(operand.dtype)
        if want_hidden:
            _multiply(gradient, operand, out=grad_hidden[begin:end])
        if want_weight:
            _multiply_add(gradient.t(), rows, out=grad_weight)
    return grad_hidden, grad_weight.to(weight.dtype) if want_weight else None


def _logprob_gradient(logits: torch.Tensor, targets: torch.Tensor, g: torch.Tensor) -> None:
    """[C,V] logits become g * (1[target] - p), in place; targets, g [C,1]."""
    torch.softmax(logits, dim=-1, out=logits)
    logits.scatter_(1, targets, logits.gather(1, targets) - 1).mul_(-g)


def _entropy_gradient(logits, targets, g, e, entropy, probabilities) -> None:
    """[C,V] logits become g * (1[target] - p) - e * p * (log p + H), in place; targets, g, e, entropy [C,1]."""
    torch.log_softmax(logits, dim=-1, out=logits)
    torch.exp(logits, out=probabilities)
    logits.mul_(-e).sub_(g + e * entropy).mul_(probabilities)
    logits.scatter_(1, targets, logits.gather(1, targets) + g)


def _logits(rows, weight, temperature, softcap, *, out: torch.Tensor, tanh: torch.Tensor) -> None:
    """Logits of some rows after softcap and temperature into `out`; under a softcap tanh(logits / softcap) is left in
    `tanh`, which may be `out` where nobody needs it."""
    _multiply(rows, weight.t(), out=out, scale=1.0 / (temperature if softcap is None else softcap))
    if softcap is not None:
        torch.tanh(out, out=tanh)
        torch.mul(tanh, softcap / temperature, out=out)


def _multiply(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor, scale: float = 1.0) -> None:
    """out = scale * left @ right, summed in at least fp32 and rounded at most once."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=0, alpha=scale, out=out)  # beta 0: `out` is not read
    elif out.dtype == torch.float32:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
        if scale != 1.0:
            out.mul_(scale)
    else:
        out.copy_(torch.mm(left, right).mul_(scale))


def _multiply_add(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
    """out += left @ right."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _operand(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the matrix products take it: bf16 stays so on CUDA, which multiplies it with fp32 results. A CPU
    would round the logits to bf16, and fp16 cannot hold gradients divided by a large number of tokens."""
    if tensor.device.type == "cuda" and tensor.dtype == torch.bfloat16:
        return tensor
    return tensor.to(_compute_dtype(tensor))


def _workspace(hidden, weight, chunks: list[tuple[int, int]], compute: torch.dtype) -> torch.Tensor:
    """[C, V] uninitialised, for the largest chunk."""
    rows = max((end - begin for begin, end in chunks), default=0)
    return hidden.new_empty(rows, weight.shape[0], dtype=compute)


def _chunks(hidden: torch.Tensor, weight: torch.Tensor, compute: torch.dtype) -> list[tuple[int, int]]:
    """Row ranges of nearly equal size that cover [0, N)."""
    return list(_ranges(hidden.shape[0], _chunk_rows(hidden.device.type, weight.shape[0] * compute.itemsize)))


def _chunk_rows(device_type: str, row_bytes: int) -> int:
    budget = _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["cuda"])
    return max(_MIN_CHUNK_ROWS, budget // row_bytes)


def _ranges(total: int, most: int) -> Iterator[tuple[int, int]]:
    size = math.ceil(total / math.ceil(total / most)) if total else 1
    for begin in range(0, total, size):
        yield begin, min(begin + size, total)
