"""Exact search by inner product: for each query the k rows of a corpus with the largest `query . row`.

    score(query, row) = fp32(sum in fp64 of query_d * row_d, in one fixed order)  [* the row's scale]

A score depends on its query and its row alone, and the order is total (score descending, then id ascending). So a
query's result does not depend on what else is in the batch, on where a row stands, or on how the corpus is split:
merging the results of parts by (score, -id) gives the result of the whole, bit for bit.

CPU and GPU find the k rows in the same way. Cheap products (8-bit codes, or 16-bit floats) and a bound on their error
limit the maximum of each block of rows. The best blocks are scored exactly, and so is what the bound cannot exclude.

`TopKIndex` keeps the codes and bounds of a corpus that is searched repeatedly; a search of a bare tensor computes them
on the way. Left out: distances other than the inner product, and approximate search.

Shape legend: Q queries, M rows, D components.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch

from searchr1_kernels import checks
from searchr1_kernels._installed import triton_is_installed
from searchr1_kernels.registration import register

Coarse = Literal["int8", "float"]

_ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
_QUERY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TopKIndex:
    """A corpus prepared for `topk_inner_product`.

    It holds `corpus` itself, which must not change afterwards; on a GPU it holds a copy if 16 divides D and the corpus
    does not begin at a multiple of 16 bytes.

    The argument `coarse` selects what proposes candidates: "int8" codes (one more byte per component; on a GPU half the
    bytes to read of 16-bit rows), or "float", the rows as they are (only on a GPU, where that needs no more than their
    norms). Results have the same bits either way. An int8 corpus is its own code.

    The attribute `coarse` is what will propose them: the argument, or "fp64" on a CPU whose 8-bit products saturate (no
    AVX-512 VNNI or the like). Searches there multiply the rows themselves, about eight times slower; a warning says so
    once.
    """

    def __init__(
        self,
        corpus: torch.Tensor,  # [M, D] fp32, fp16, bf16 or int8
        *,
        scales: torch.Tensor | None = None,  # [M] fp32: what each row of an int8 corpus is multiplied by
        coarse: Coarse = "int8",
    ) -> None:
        _check_corpus(corpus, scales)
        if coarse not in ("int8", "float"):
            raise ValueError(f"coarse: expected 'int8' or 'float', got {coarse!r}")
        if coarse == "float" and corpus.device.type == "cpu":
            raise ValueError("coarse: 'float' is for a corpus on a GPU; a CPU multiplies int8 fastest")
        self.corpus = corpus if corpus.device.type == "cpu" else _aligned(corpus)  # [M, D]
        self.scales = None if scales is None else scales.detach()  # [M]
        self.parts = _prepare(self.corpus, self.scales, coarse)
        self.coarse = _implementation(corpus.device).products(self.parts)

    def __len__(self) -> int:
        return self.corpus.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the corpus and of what was made for it."""
        return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in self.tensors}.values())

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The corpus and what was made for it. None of them changes; some may share memory."""
        return [self.corpus, *([] if self.scales is None else [self.scales]), *self.parts]


def topk_inner_product(
    queries: torch.Tensor,  # [Q, D] fp32, fp16 or bf16
    corpus: torch.Tensor | TopKIndex,  # [M, D] fp32, fp16, bf16 or int8
    k: int,
    *,
    scales: torch.Tensor | None = None,  # [M] fp32: what each row of an int8 corpus is multiplied by
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> scores [Q,k] fp32, ids [Q,k] int64: the k rows of largest inner product per query, best first, ties by id.

    The result is exact: see the module. All numbers must be finite (ValueError on a CPU; undefined on a GPU), and
    M >= k >= 1. Nothing here is differentiable. On a GPU the host waits once, to see whether every query's result is
    proven.
    """
    if isinstance(corpus, TopKIndex):
        if scales is not None:
            raise ValueError("scales: give them to TopKIndex; here the corpus has been prepared already")
        corpus, scales, parts = corpus.corpus, corpus.scales, corpus.parts
    else:
        _check_corpus(corpus, scales)
        scales, parts = None if scales is None else scales.detach(), []
    checks.check_shape("queries", queries, ("Q", corpus.shape[1]))
    checks.check_dtype("queries", queries, *_QUERY_DTYPES)
    checks.check_device("queries", queries, "corpus", corpus)
    checks.check_whole("k", k)
    if not 1 <= k <= corpus.shape[0]:
        raise ValueError(f"k: expected from 1 to {corpus.shape[0]}, the rows of corpus, got {k}")
    return _OPERATOR(queries.detach(), corpus.detach(), k, scales, parts)


def _check_corpus(corpus: torch.Tensor, scales: torch.Tensor | None) -> None:
    checks.check_shape("corpus", corpus, ("M", "D"))
    checks.check_dtype("corpus", corpus, *_ROW_DTYPES)
    if corpus.shape[1] == 0:
        raise ValueError(f"corpus: expected at least one component, got shape {list(corpus.shape)}")
    if not corpus.is_contiguous():
        raise ValueError(f"corpus: expected a contiguous tensor, got strides {tuple(corpus.stride())}")
    if corpus.shape[0] >= 1 << 32:
        raise ValueError(f"corpus: expected fewer than 2^32 rows, got {corpus.shape[0]}; search it in parts")
    if scales is not None:
        if corpus.dtype != torch.int8:
            raise ValueError(f"scales: they are for an int8 corpus, and this one is {corpus.dtype}")
        checks.check_shape("scales", scales, (corpus.shape[0],))
        checks.check_dtype("scales", scales, torch.float32)
        checks.check_device("scales", scales, "corpus", corpus)


@torch.no_grad()
def _prepare(corpus: torch.Tensor, scales: torch.Tensor | None, coarse: Coarse) -> list[torch.Tensor]:
    """What the search on this device needs to know about every row; see `prepare` there."""
    return _implementation(corpus.device).prepare(corpus, scales, coarse)


def _search(
    queries: torch.Tensor, corpus: torch.Tensor, k: int, scales: torch.Tensor | None, parts: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(corpus.device).search(queries, corpus, k, scales, parts)


def _implementation(device: torch.device) -> ModuleType:
    """-> the module with `prepare`, `products` and `search` for tensors on this device."""
    if device.type == "cpu":
        from searchr1_kernels import _topk_cpu

        return _topk_cpu
    if device.type != "cuda":
        raise ValueError(f"corpus: expected a tensor on the CPU or on a CUDA device, got one on {device}")
    if not triton_is_installed():
        raise ValueError(
            f"corpus: expected a tensor on the CPU, got one on {device}, whose search needs Triton: pip install triton"
        )
    from searchr1_kernels import _topk_cuda

    return _topk_cuda


def _fake(queries, corpus, k, scales, parts):
    return (
        queries.new_empty(queries.shape[0], k, dtype=torch.float32),
        queries.new_empty(queries.shape[0], k, dtype=torch.int64),
    )


_OPERATOR = register(
    "topk_inner_product(Tensor queries, Tensor corpus, int k, Tensor? scales, Tensor[] parts) -> (Tensor, Tensor)",
    _search,
    _fake,
)


def _aligned(corpus: torch.Tensor) -> torch.Tensor:
    """`_topk_cuda.aligned`, once for an index instead of in every search of it."""
    from searchr1_kernels._topk_cuda import aligned

    return aligned(corpus)
