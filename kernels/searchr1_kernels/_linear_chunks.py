"""What `linear_logprob` and `linear_policy_loss` share: hidden states through the head, chunk by chunk.

All chunks use one workspace of logits, so its size is that of a chunk, whatever N is. Three classes know what happens
to a chunk's logits: `PlainRows` here, in torch, its faster twin `FusedRows` in `_linear_rows_triton`, and where a
matrix product of our own is worth it `KeptRows` in `_linear_gradient_triton`. All offer

    scores(rows, …)     logits, then log-probability and entropy of every row
    gradient(…)         after that: the gradient of the logits, for the two matrix products that remain, and what its
                        rows are still to be multiplied by, or None

and `PlainRows` also recall(rows, …), logits again for a backward pass of its own (that of `FusedRows` is in
`_linear_slabs`), and select(…), to go on with some of the rows.

Left out: skipping rows without a gradient on CUDA. Only the device knows how many they are, and the shape of a matrix
product is given by the host, which would have to wait. `FusedRows` saves reading such rows' logits, no more.

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
# Bytes of a chunk of `KeptRows`, which has 2 a logit: 2,048 rows of a vocabulary of 151,936 at a time for 16,384, whose
# gradient, of 2,048 columns, is 128 tiles of 128 by 256: one for nearly every multiprocessor of an H200. Twice as many
# where it would be more than `_linear_sums.ROUNDED_SUMS` chunks, here from 17,664 rows on.
_KEPT_BYTES = 5 << 27
# Whether matrix products of our own, with the passes over logits inside, may take the place of a library's.
OWN_PRODUCTS = True
# Below this many rows the weight and its gradient would be re-read too often to be worth a smaller workspace.
_MIN_CHUNK_ROWS = 256
# Chunks on CUDA are multiples of so many rows, so that no tile of a matrix product is left half empty.
_TILE_ROWS = 128
# Chunks of logits up to so many bytes are kept for the backward pass, whatever N is; the others are recomputed.
_KEEP_BYTES = {"cpu": 32 << 20, "cuda": 0}
# Rows of every product that gives logits are filled up to a multiple of so many. Of other numbers a library adds up the
# last few rows in another order (MKL on an AMD EPYC: of no multiple of 4, in fp64 always, in fp32 below 12), and a row
# would not have the bits alone that it has in a batch.
_ROW_STEP = 16
# With a smaller share of rows than this to differentiate, recomputing only those beats using what was kept of all.
_LIVE_SHARE = 0.6


class PlainRows:
    """The passes in torch. Logits are overwritten by log-probabilities, and those by the gradient."""

    def __init__(self, hidden, weight, temperature, softcap, num_rows: int, *, for_gradient: bool) -> None:
        """`weight` [V,D] as `operand` gives it; the workspace is for chunks of up to `num_rows`."""
        self.weight, self.temperature, self.softcap, self.for_gradient = weight, temperature, softcap, for_gradient
        self._height, self._dtype = _filled_up(num_rows), compute_dtype(hidden)
        self._spares: dict[str, torch.Tensor] = {}

    @staticmethod
    def saved_shape(hidden, weight, softcap, differentiable: bool) -> tuple[int, int]:
        """[K,V]: log-probabilities of the first chunks, as many as may be kept; of all rows, with those they are
        filled up with."""
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

        `saved` [C or more, V] or None gets what `recall` wants, in its first C rows; those after them may change too.
        With entropy `gradient` may follow.
        """
        log_p = self._products(rows, saved)
        torch.log_softmax(log_p, dim=-1, out=log_p)
        torch.gather(log_p, 1, targets[:, None], out=logprobs[:, None])
        if entropy is not None:
            self._weigh(log_p)
            # Two rows at the least: of one alone, torch would split the sum between threads.
            sums = self._spare("logits")[: max(2, len(log_p))].sum(dim=-1)
            torch.neg(sums[: len(log_p)], out=entropy)

    def recall(self, rows, saved, with_entropy: bool) -> None:
        """rows [C,D] and what `scores` saved of them, [C,V] or None."""
        log_p = self._products(rows) if saved is None else saved
        if not with_entropy:
            # Of logits or log-probabilities alike.
            self._p = torch.softmax(log_p, dim=-1, out=self._spare("logits")[: len(rows)])
            return
        if saved is None:
            torch.log_softmax(log_p, dim=-1, out=log_p)
        self._weigh(log_p)

    def select(self, index: torch.Tensor, with_entropy: bool) -> None:
        """Go on with the rows at `index` [L] of the chunk alone."""
        length = len(index)
        self._p = torch.index_select(self._p, 0, index, out=self._spare("selected")[:length])
        if with_entropy:
            self._weighted = torch.index_select(self._weighted, 0, index, out=self._spare("p")[:length])
        if self.softcap is not None:
            self._tanh = self._tanh[index]

    def gradient(self, targets, g, e, entropy) -> tuple[torch.Tensor, None]:  # [C,V] in the dtype of the operand
        """targets [C]; g, e [C] the gradients of log-probability and entropy H [C], e None where there is none.

        With p the probabilities
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
        """Logits [C,V] after softcap and temperature, in the first rows of `saved`, or of the workspace. A gradient
        wants the tanh as well."""
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
        """[C,V] log p -> p and p log p. Overwrites `log_p` where that lies in the workspace."""
        self._p = torch.softmax(log_p, dim=-1, out=self._spare("p")[: len(log_p)])  # a third faster than exp
        self._weighted = torch.mul(log_p, self._p, out=self._spare("logits")[: len(log_p)])

    def _spare(self, name: str) -> torch.Tensor:
        """[C,V] filled up, made when first wanted: the workspace, "logits", and what one operation or the other needs
        beside it."""
        if name not in self._spares:
            self._spares[name] = self.weight.new_empty(self._height, self.weight.shape[0], dtype=self._dtype)
        return self._spares[name]


def _filled_up(num_rows: int) -> int:
    """Rows of a product for so many."""
    return num_rows + -num_rows % _ROW_STEP


def runs_fused(hidden: torch.Tensor) -> bool:
    """Whether Triton's row passes take tensors of this kind."""
    return hidden.device.type == "cuda" and hidden.dtype != torch.float64 and has_triton()


def runs_products(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> bool:
    """Whether Triton's products with the passes inside take these."""
    if not OWN_PRODUCTS or softcap is not None or hidden.dtype != torch.bfloat16 or not runs_fused(hidden):
        return False
    from searchr1_kernels import _linear_forward_triton

    return _linear_forward_triton.takes(hidden, weight)


def rows_class(hidden: torch.Tensor, kept: bool = False) -> Any:
    """The passes for tensors of this kind; `kept`: those of `runs_products`."""
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
    """-> logprobs [N], entropy [N] or None, both fp32 (fp64 for fp64), and what `gradient_chunks` wants saved."""
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
    """`gradient_chunks`, or for tensors of this kind its twin `slab_gradients`."""
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
    """-> grad_hidden [N,D], grad_weight [V,D]: None where not wanted, else of the types `Gradients` says. By
    `PlainRows`."""
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
    """[N] each -> [L] int64: rows with any gradient at all (clipped tokens have none); None where that is more than a
    share of them. On CUDA always None: finding out would wait for the GPU."""
    if slope.device.type != "cpu":
        return None
    live = slope != 0
    if entropy_slope is not None:
        live |= entropy_slope != 0
    return None if int(live.sum()) >= share * live.numel() else live.nonzero().squeeze(1)


def chunk_ranges(
    hidden: torch.Tensor, weight: torch.Tensor, *, for_gradient: bool, kept: bool = False
) -> list[slice]:  # fmt: skip
    """Slices that cover [0, N), of equal size but for the last. `weight` as an operand; `kept`: for `KeptRows`."""
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
        bytes_per_logit += weight.dtype.itemsize  # the gradient has a buffer of its own
    size = chunk_size(hidden.shape[0], _chunk_rows(hidden.device, weight.shape[0] * bytes_per_logit))
    if hidden.device.type == "cuda":
        size = whole_tiles(size)
    return ranges(hidden.shape[0], size)


def chunk_size(total: int, most: int) -> int:
    """Rows of a chunk when `total` are cut into as few equal chunks as hold at most `most`; 1 for none."""
    return -(-total // -(-total // most)) if total else 1


def whole_tiles(size: int) -> int:
    """Rows of a chunk, up to the next whole tile of a GPU's products. A chunk's part of a vector then begins where the
    vector does, as far as Triton looks: another alignment would be another kernel, compiled in the middle of a step."""
    return -(-size // _TILE_ROWS) * _TILE_ROWS


def ranges(total: int, size: int) -> list[slice]:
    """Slices of `size` that cover [0, total); the last may be shorter."""
    return [slice(begin, min(begin + size, total)) for begin in range(0, total, size)]


def longest(chunks: list[slice]) -> int:
    """Rows of the first, which is the largest."""
    return chunks[0].stop if chunks else 0


def memory_budget(device: torch.device, most: int) -> int:
    """Bytes for a workspace: `most`, and on CUDA no more than a quarter of the free memory. That counts in powers of
    two: where it is plenty the chunks, and with them the order of sums, do not depend on what else is in memory."""
    if device.type != "cuda":
        return most
    free = torch.cuda.mem_get_info(device)[0]
    if free < 8 * most:  # torch's statistics are a dictionary of hundreds, made anew for every look
        statistics = torch.cuda.memory_stats(device)
        free += statistics.get("reserved_bytes.all.current", 0) - statistics.get("allocated_bytes.all.current", 0)
    return min(most, 1 << (free // 4).bit_length() >> 1)


def _chunk_rows(device: torch.device, row_bytes: int) -> int:
    """Rows that a chunk may have."""
    most = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"])
    return max(_MIN_CHUNK_ROWS, memory_budget(device, most) // row_bytes)
