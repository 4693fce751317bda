"""Hidden states through the head, chunk by chunk: what `linear_logprob` and `linear_policy_loss` share.

All chunks share one workspace of logits, so it is as large as one chunk, whatever N is. Three classes process a chunk's
logits: `PlainRows` here, in torch; its faster twin `FusedRows` in `_linear_rows_triton`; and, where a matrix product of
our own is worth it, `KeptRows` in `_linear_gradient_triton`. All of them offer

    scores(rows, …)     computes the logits, then the log-probability and entropy of every row
    gradient(…)         after `scores`: the gradient of the logits, for the two matrix products that remain, and the
                        factors [C] that its rows must still be multiplied by, or None

`PlainRows` also has recall(rows, …), which restores the logits for a backward pass of its own (`FusedRows` has its
backward pass in `_linear_slabs`), and select(…), which continues with a subset of the rows.

Rows without a gradient are not skipped on CUDA: only the device knows how many there are, and the host, which sets the
shape of a matrix product, would have to wait for it. `FusedRows` skips reading such rows' logits, no more.

Shape legend: N rows, D hidden size, V vocabulary, C rows of a chunk, K rows kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch

from searchr1_kernels import _linear_sums as sums
from searchr1_kernels._installed import has_triton
from searchr1_kernels._linear_sums import Gradients, compute_dtype, multiply, operand

# Bytes of one chunk's logits and their gradient. CPU: small enough for the cache. CUDA: large enough for the matrix
# products, but at most a quarter of the free memory.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
# Bytes of a chunk of `KeptRows`, at 2 bytes a logit. With 16,384 rows and a vocabulary of 151,936, a chunk is 2,048
# rows; their grad_hidden, of 2,048 columns, is 128 tiles of 128 by 256: one for nearly every multiprocessor of an
# H200. Doubled where there would be more than `_linear_sums.ROUNDED_SUMS` chunks, here from 17,664 rows on.
_KEPT_BYTES = 5 << 27
# Whether our own matrix products, with the passes over logits inside, may replace the library's.
OWN_PRODUCTS = True
# Below this many rows the weight and its gradient would be re-read too often to be worth a smaller workspace.
_MIN_CHUNK_ROWS = 256
# On CUDA, chunks are multiples of this many rows, so that no tile of a matrix product is left half empty.
_TILE_ROWS = 128
# Chunks of logits up to this many bytes are kept for the backward pass, whatever N is; the others are recomputed.
_KEEP_BYTES = {"cpu": 32 << 20, "cuda": 0}
# The rows of every product that gives logits are padded to a multiple of this. At other counts a library sums the last
# few rows in another order (MKL on an AMD EPYC: where the count is no multiple of 4, in fp64 always, in fp32 below 12),
# and a row alone would not have the same bits as in a batch.
_ROW_STEP = 16
# If the share of rows to differentiate is smaller than this, recomputing those beats using what was kept of all rows.
_LIVE_SHARE = 0.6


class PlainRows:
    """The passes in torch. Log-probabilities overwrite the logits, and the gradient overwrites those."""

    def __init__(self, hidden, weight, temperature, softcap, num_rows: int, *, for_gradient: bool) -> None:
        """`weight` [V,D] is as `operand` returns it; the workspace holds chunks of up to `num_rows`."""
        self.weight, self.temperature, self.softcap, self.for_gradient = weight, temperature, softcap, for_gradient
        self._height, self._dtype = _filled_up(num_rows), compute_dtype(hidden)
        self._spares: dict[str, torch.Tensor] = {}

    @staticmethod
    def saved_shape(hidden, weight, softcap, differentiable: bool) -> tuple[int, int]:
        """-> [K,V], for the log-probabilities of as many first chunks as may be kept; of all rows, with padding."""
        num_rows, vocabulary = hidden.shape[0], weight.shape[0]
        row_bytes = vocabulary * compute_dtype(hidden).itemsize
        budget = _KEEP_BYTES.get(hidden.device.type, 0) // row_bytes if differentiable and softcap is None else 0
        if num_rows <= budget:
            return _filled_up(num_rows), vocabulary
        if budget == 0:
            return 0, vocabulary
        size = chunk_size(num_rows, _chunk_rows(hidden.device, row_bytes))
        return budget // size * size, vocabulary

    def scores(self, rows, targets, logprobs, entropy, saved=None) -> None:
        """rows [C,D], targets [C] -> fills logprobs [C] and, where not None, entropy [C].

        `saved` [C or more, V], unless None, gets what `recall` needs in its first C rows; later rows may change too.
        `gradient` may follow only if entropy was computed.
        """
        log_p = self._products(rows, saved)
        torch.log_softmax(log_p, dim=-1, out=log_p)
        torch.gather(log_p, 1, targets[:, None], out=logprobs[:, None])
        if entropy is not None:
            self._weigh(log_p)
            # At least two rows: torch would split the sum of a single one between threads.
            sums = self._spare("logits")[: max(2, len(log_p))].sum(dim=-1)
            torch.neg(sums[: len(log_p)], out=entropy)

    def recall(self, rows, saved, with_entropy: bool) -> None:
        """Prepare for `gradient` from rows [C,D] and what `scores` saved of them, [C,V] or None."""
        log_p = self._products(rows) if saved is None else saved
        if not with_entropy:
            # The same for logits and log-probabilities.
            self._p = torch.softmax(log_p, dim=-1, out=self._spare("logits")[: len(rows)])
            return
        if saved is None:
            torch.log_softmax(log_p, dim=-1, out=log_p)
        self._weigh(log_p)

    def select(self, index: torch.Tensor, with_entropy: bool) -> None:
        """Keep only the chunk's rows at `index` [L]."""
        length = len(index)
        self._p = torch.index_select(self._p, 0, index, out=self._spare("selected")[:length])
        if with_entropy:
            self._weighted = torch.index_select(self._weighted, 0, index, out=self._spare("p")[:length])
        if self.softcap is not None:
            self._tanh = self._tanh[index]

    def gradient(self, targets, g, e, entropy) -> tuple[torch.Tensor, None]:  # [C,V] in the dtype of the operand
        """Gradient of the logits, given targets [C] and the gradients g, e [C] of log-probability and entropy H [C].

        e is None where the entropy has no gradient. With p the probabilities
            d logits = (g * (1[target] - p)  -  e * p * (log p + H)) / temperature,  times 1 - tanh^2 under a softcap
        """
        g, targets = g[:, None] / self.temperature, targets[:, None]
        if e is None:
            gradient = self._p
            gradient.scatter_(1, targets, gradient.gather(1, targets) - 1).mul_(-g)
        else:
            e = e[:, None] / self.temperature
            gradient = self._weighted.mul_(-e).sub_(self._p.mul_(g + e * entropy[:, None]))
            gradient.scatter_add_(1, targets, g)
        if self.softcap is not None:
            gradient.addcmul_(gradient, self._tanh.square_(), value=-1)
        return gradient.to(self.weight.dtype), None

    def _products(self, rows: torch.Tensor, saved: torch.Tensor | None = None) -> torch.Tensor:
        """-> logits [C,V] after softcap and temperature, in the first rows of `saved` or of the workspace. Under a
        softcap, the tanh is kept too where a gradient will need it."""
        missing = _filled_up(len(rows)) - len(rows)
        filled = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
        has_room = saved is not None and len(saved) >= len(filled)
        whole = (saved if has_room else self._spare("logits"))[: len(filled)]
        multiply(filled, self.weight.t(), out=whole, scale=1.0 / (self.softcap or self.temperature))
        out = whole[: len(rows)]
        if saved is not None and not has_room:
            out = saved[: len(rows)].copy_(out)
        if self.softcap is not None:
            self._tanh = torch.tanh(out, out=self._spare("tanh")[: len(rows)] if self.for_gradient else out)
            torch.mul(self._tanh, self.softcap / self.temperature, out=out)
        return out

    def _weigh(self, log_p: torch.Tensor) -> None:
        """Compute p and p log p from log p [C,V]. Overwrites `log_p` where it lies in the workspace."""
        self._p = torch.softmax(log_p, dim=-1, out=self._spare("p")[: len(log_p)])  # a third faster than exp
        self._weighted = torch.mul(log_p, self._p, out=self._spare("logits")[: len(log_p)])

    def _spare(self, name: str) -> torch.Tensor:
        """-> [C,V] with padding, allocated on first use: the workspace "logits", or more room for some operation."""
        if name not in self._spares:
            self._spares[name] = self.weight.new_empty(self._height, self.weight.shape[0], dtype=self._dtype)
        return self._spares[name]


def _filled_up(num_rows: int) -> int:
    """-> rows of the product that computes `num_rows` rows: with padding."""
    return num_rows + -num_rows % _ROW_STEP


def runs_fused(hidden: torch.Tensor) -> bool:
    """Whether the row passes in Triton take tensors of this kind."""
    return hidden.device.type == "cuda" and hidden.dtype != torch.float64 and has_triton()


def runs_products(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> bool:
    """Whether the products in Triton, with the passes inside, take these tensors."""
    if not OWN_PRODUCTS or softcap is not None or hidden.dtype != torch.bfloat16 or not runs_fused(hidden):
        return False
    from searchr1_kernels import _linear_forward_triton

    return _linear_forward_triton.takes(hidden, weight)


def rows_class(hidden: torch.Tensor, kept: bool = False) -> Any:
    """-> the class with the passes for tensors of this kind; `kept`: where `runs_products` holds, `KeptRows`."""
    if kept:
        from searchr1_kernels._linear_gradient_triton import KeptRows

        return KeptRows
    if runs_fused(hidden):
        from searchr1_kernels._linear_rows_triton import FusedRows

        return FusedRows
    return PlainRows


def score_chunks(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [N]
    temperature: float,
    softcap: float | None,
    return_entropy: bool,
    differentiable: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """-> logprobs [N], entropy [N] or None, both fp32 (fp64 for fp64), and what `gradient_chunks` needs saved."""
    rows_type = rows_class(hidden)
    logprobs = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    entropy = torch.empty_like(logprobs) if return_entropy else None
    saved = logprobs.new_empty(rows_type.saved_shape(hidden, weight, softcap, differentiable))
    weight = operand(weight)
    chunks = chunk_ranges(hidden, weight, for_gradient=False)
    passes = rows_type(hidden, weight, temperature, softcap, longest(chunks), for_gradient=False)
    for chunk in chunks:
        passes.scores(
            operand(hidden[chunk]),
            targets[chunk],
            logprobs[chunk],
            entropy[chunk] if return_entropy else None,
            saved[chunk.start :] if chunk.stop <= len(saved) else None,
        )
    return logprobs, entropy, saved


def head_gradients(hidden: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`gradient_chunks`, or its twin `slab_gradients` for tensors that `runs_fused` accepts."""
    if runs_fused(hidden):
        from searchr1_kernels._linear_slabs import slab_gradients

        return slab_gradients(hidden, *arguments)
    return gradient_chunks(hidden, *arguments)


def gradient_chunks(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [N]
    grad_logprobs: torch.Tensor,  # [N]
    grad_entropy: torch.Tensor | None,  # [N]
    entropy: torch.Tensor | None,  # [N]: where grad_entropy is given
    saved: torch.Tensor,  # by `score_chunks`
    temperature: float,
    softcap: float | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """-> grad_hidden [N,D], grad_weight [V,D], by `PlainRows`, in the types of `Gradients`; None where not wanted."""
    num_rows, live = hidden.shape[0], live_rows(grad_logprobs, grad_entropy, _LIVE_SHARE)
    if live is not None:
        hidden, targets, grad_logprobs, saved = hidden[live], targets[live], grad_logprobs[live], saved[:0]
        if grad_entropy is not None:
            grad_entropy, entropy = grad_entropy[live], entropy[live]
    gradients = Gradients(hidden, weight, want_hidden, want_weight)
    chunks = chunk_ranges(hidden, gradients.operand, for_gradient=True)
    passes = PlainRows(hidden, gradients.operand, temperature, softcap, longest(chunks), for_gradient=True)
    for chunk in chunks:
        rows = operand(hidden[chunk])
        passes.recall(rows, saved[chunk] if chunk.stop <= len(saved) else None, grad_entropy is not None)
        g, e, h = (None if x is None else x[chunk] for x in (grad_logprobs, grad_entropy, entropy))
        gradients.add(*passes.gradient(targets[chunk], g, e, h), rows, chunk)
    grad_hidden, grad_weight = gradients.results()
    if live is not None and want_hidden:
        grad_hidden = grad_hidden.new_zeros(num_rows, hidden.shape[1]).index_copy_(0, live, grad_hidden)
    return grad_hidden, grad_weight


def live_rows(slope: torch.Tensor, entropy_slope: torch.Tensor | None, share: float) -> torch.Tensor | None:
    """Slopes [N] -> [L] int64: rows with any gradient (clipped tokens have none); None if at least `share` have one.

    On CUDA always None: finding out would wait for the GPU."""
    if slope.device.type != "cpu":
        return None
    live = slope != 0
    if entropy_slope is not None:
        live |= entropy_slope != 0
    return None if int(live.sum()) >= share * live.numel() else live.nonzero().squeeze(1)


def chunk_ranges(
    hidden: torch.Tensor, weight: torch.Tensor, *, for_gradient: bool, kept: bool = False
) -> list[slice]:  # fmt: skip
    """-> slices that cover [0, N), equal but for the last. `weight` is an operand; `kept`: for `KeptRows`."""
    if kept:
        for most in (_KEPT_BYTES, 2 * _KEPT_BYTES):
            fitting = memory_budget(hidden.device, most) // (weight.shape[0] * weight.dtype.itemsize)
            chunks = ranges(hidden.shape[0], whole_tiles(chunk_size(hidden.shape[0], max(_MIN_CHUNK_ROWS, fitting))))
            if len(chunks) <= sums.ROUNDED_SUMS:
                break
        return chunks
    compute = compute_dtype(hidden)
    bytes_per_logit = compute.itemsize
    if for_gradient and weight.dtype != compute:
        bytes_per_logit += weight.dtype.itemsize  # the gradient has its own buffer
    size = chunk_size(hidden.shape[0], _chunk_rows(hidden.device, weight.shape[0] * bytes_per_logit))
    if hidden.device.type == "cuda":
        size = whole_tiles(size)
    return ranges(hidden.shape[0], size)


def chunk_size(total: int, most: int) -> int:
    """-> rows per chunk when `total` rows are cut into the fewest equal chunks of at most `most`; 1 for none."""
    return -(-total // -(-total // most)) if total else 1


def whole_tiles(size: int) -> int:
    """Round rows of a chunk up to whole tiles of a GPU's matrix products.

    A chunk's slice of a vector then has the vector's alignment as Triton sees it; with another one, Triton would
    compile another kernel in the middle of a step."""
    return -(-size // _TILE_ROWS) * _TILE_ROWS


def ranges(total: int, size: int) -> list[slice]:
    """-> slices of `size` that cover [0, total); the last may be shorter."""
    return [slice(begin, min(begin + size, total)) for begin in range(0, total, size)]


def longest(chunks: list[slice]) -> int:
    """-> rows of the first chunk, which is the largest."""
    return chunks[0].stop if chunks else 0


def memory_budget(device: torch.device, most: int) -> int:
    """-> bytes for a workspace: `most`, but on CUDA at most a quarter of the free memory.

    That quarter is rounded down to a power of two. Where memory is plentiful, the chunks, and with them the order of
    sums, do not depend on what else is in memory."""
    if device.type != "cuda":
        return most
    free = torch.cuda.mem_get_info(device)[0]
    if free < 8 * most:  # torch's statistics are a dictionary of hundreds, rebuilt for every look
        statistics = torch.cuda.memory_stats(device)
        free += statistics.get("reserved_bytes.all.current", 0) - statistics.get("allocated_bytes.all.current", 0)
    return min(most, 1 << (free // 4).bit_length() >> 1)


def _chunk_rows(device: torch.device, row_bytes: int) -> int:
    """-> the most rows that a chunk may have."""
    most = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"])
    return max(_MIN_CHUNK_ROWS, memory_budget(device, most) // row_bytes)
