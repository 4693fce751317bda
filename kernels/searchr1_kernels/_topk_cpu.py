"""Exact top-k on the CPU: products of 8-bit codes propose candidates, bounds on their error decide which are scored.

    row = center + scale * code + residual            query = query_scale * query_code + query_residual
    query . row = query . center + query_scale * scale * (query_code . code)  +-  error
    error <= |query| * |residual| + |query_residual| * |scale * code|                          (Cauchy-Schwarz)

1. Integer matrix products run over tiles of rows that stay in cache. Only the maximum of each block of rows is kept,
   and for each query the k best lower bounds, which bound its k-th best score from below.
2. Each query goes through the blocks whose upper bounds reach that, best first, and in them likewise through the rows.
   These alone are scored exactly, until no upper bound reaches the k-th best exact score. So nothing is approximate,
   however coarse the codes are.

The integer products do four times the arithmetic of fp32 ones per instruction (AVX-512 VNNI). On one thread of an AMD
EPYC (Zen 4), 2026-11-24, 200,000 x 384, 256 queries take 98 ms, where an fp32 product takes 574 ms. Rows that compress
badly (one huge component) leave too many candidates; then fp64 products are used instead.

Shape legend: Q queries, M rows, D components, T rows of a tile, B rows of a block, G blocks.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from searchr1_kernels import _topk_numba as kernels
from searchr1_kernels._threads import num_parts, run_parts

_QUERIES_AT_ONCE = 256
_TILE_ELEMENTS = 1 << 18  # of a tile's products, 1 MiB: they are read again immediately
_MIN_BLOCK_ROWS = 16
_MAX_BLOCKS = 1 << 16  # 64 MiB of maxima for 256 queries
# Fraction of candidate blocks above which coarser products cost more than they save: fp64 products take eight times as
# long, and scoring a row alone takes about as long as it does in one of those.
_TOO_MANY = 1 / 8


class Codes(NamedTuple):
    """Rows in the form that integer products take. `residuals` and `magnitudes` bound |residual| and |scale * code|."""

    codes: torch.Tensor  # [M, D] int8
    scales: torch.Tensor  # [M] fp32
    residuals: torch.Tensor  # [M] fp32
    magnitudes: torch.Tensor  # [M] fp32


def empty_codes(num_rows: int, size: int) -> Codes:
    """-> memory for `quantize` to fill."""
    return Codes(torch.empty(num_rows, size, dtype=torch.int8, device="cpu"), *(_floats(num_rows) for _ in range(3)))


def _floats(*shape: int) -> torch.Tensor:
    """-> fp32 memory on the CPU, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def quantize(rows: torch.Tensor, center: torch.Tensor, out: Codes, first: int = 0) -> Codes:
    """Write codes of floating rows [M,D] around a center [D] fp32 to the first M places of `out`. -> those places.

    ValueError where a row is not finite; `first` is the number of the first row, for its message."""
    num_rows, size = rows.shape
    step = max(1, _TILE_ELEMENTS // max(1, size))
    for begin in range(0, num_rows, step):
        end = min(begin + step, num_rows)
        tile = rows[begin:end].float().numpy()  # converted while it is in cache
        bad = kernels.quantize(tile, center.numpy(), *(tensor[begin:end].numpy() for tensor in out))
        if bad >= 0:
            raise ValueError(f"corpus: expected finite numbers, row {first + begin + bad} has others")
    return Codes(*(tensor[:num_rows] for tensor in out))


def adopt(rows: torch.Tensor, row_scales: torch.Tensor | None) -> Codes:
    """-> codes of rows that are 8-bit codes already and have no residuals."""
    scales = _floats(rows.shape[0]).fill_(1) if row_scales is None else row_scales
    if not bool(scales.isfinite().all()):
        raise ValueError("scales: expected finite numbers")
    magnitudes = _floats(rows.shape[0])
    kernels.code_magnitudes(rows.numpy(), scales.numpy(), magnitudes.numpy())
    return Codes(rows, scales, _floats(rows.shape[0]).zero_(), magnitudes)


def sample_center(rows: torch.Tensor, most: int = 4096) -> torch.Tensor:
    """-> [D] fp32, about the mean of the rows.

    Any center is correct; one near the mean leaves the least to encode, which helps a lot where all rows point the same
    way, as those of most text encoders do. Components that could take a finite number beyond fp32's range are 0."""
    center = rows[:: max(1, rows.shape[0] // most)].double().mean(0).float()
    return torch.where(center.abs() < 2.0**102, center, 0.0)  # less than half the step of the largest fp32


def prepare(corpus: torch.Tensor, scales: torch.Tensor | None, coarse: str) -> list[torch.Tensor]:
    """-> center [D] fp32, then the codes of all rows, in the order of `Codes`."""
    assert coarse == "int8", coarse
    if corpus.dtype == torch.int8:
        return [_floats(corpus.shape[1]).zero_(), *adopt(corpus, scales)]
    center = sample_center(corpus)
    return [center, *quantize(corpus, center, empty_codes(*corpus.shape))]


def products(parts: list[torch.Tensor]) -> str:
    """-> the products that propose candidates, given what `prepare` returned."""
    return "int8" if integer_products_are_exact() else "fp64"


def search(
    queries: torch.Tensor,  # [Q, D] floating
    corpus: torch.Tensor,  # [M, D] fp32, fp16, bf16 or int8, contiguous
    k: int,
    scales: torch.Tensor | None,  # [M] fp32
    parts: list[torch.Tensor],  # of `prepare`; empty: made on the way, tile by tile
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> scores [Q,k] fp32, ids [Q,k] int64."""
    if not bool(queries.isfinite().all()):
        raise ValueError("queries: expected finite numbers")
    codes = Codes(*parts[1:]) if parts else None
    if parts:
        center = parts[0]
    else:
        center = _floats(corpus.shape[1]).zero_() if corpus.dtype == torch.int8 else sample_center(corpus)
    scores, ids = _floats(queries.shape[0], k), queries.new_empty(queries.shape[0], k, dtype=torch.int64)
    for begin in range(0, queries.shape[0], _QUERIES_AT_ONCE):
        part = slice(begin, begin + _QUERIES_AT_ONCE)
        problem = _Problem(queries[part].float().contiguous(), corpus, scales, center, codes, k)
        bounds = _coarse_int8(problem) if integer_products_are_exact() else None
        if bounds is None or bounds.num_candidates() > _TOO_MANY * bounds.highest.size:
            bounds = _coarse_fp64(problem)
        _refine(problem, bounds, scores[part], ids[part])
    return scores, ids


@functools.cache
def integer_products_are_exact() -> bool:
    """Whether `torch._int_mm` keeps every bit on this processor. Warns, once, if it does not.

    Without VNNI, 8-bit products are added in pairs in 16 bits, which saturates at the ends of the range."""
    ends = [torch.full(shape, 127, dtype=torch.int8, device="cpu") for shape in ((64, 384), (384, 32))]
    exact = all(
        bool((torch._int_mm(sign * ends[0], other * ends[1]) == sign * other * 384 * 127 * 127).all())
        for sign in (-1, 1)
        for other in (-1, 1)
    )
    if not exact:
        warnings.warn(
            "searchr1_kernels: this processor's 8-bit products saturate, so exact search multiplies in fp64, about "
            "eight times slower",
            stacklevel=2,
        )
    return exact


class _Problem(NamedTuple):
    """The input of both ways of proposing candidates."""

    queries: torch.Tensor  # [Q, D] fp32
    rows: torch.Tensor
    row_scales: torch.Tensor | None
    center: torch.Tensor
    codes: Codes | None
    k: int

    @property
    def block_rows(self) -> int:
        rows = max(_MIN_BLOCK_ROWS, -(-self.rows.shape[0] // _MAX_BLOCKS))
        return 1 << (rows - 1).bit_length()

    @property
    def tile_rows(self) -> int:
        rows = min(max(_TILE_ELEMENTS // self.queries.shape[0], 512), 4096)
        return max(rows - rows % self.block_rows, self.block_rows)


class _Bounds(NamedTuple):
    """What is known of every score: `scale * product` +- `norm * residual + residual_norm * magnitude`."""

    highest: np.ndarray  # [Q, G] fp32: no score of the block, rounded to fp32 and less its offset, is above this
    thresholds: np.ndarray  # [Q] fp32: no more than the k-th best score, less its offset
    offsets: np.ndarray  # [Q] fp64: query . center, which products of codes lack
    scales: np.ndarray  # [Q] fp64
    norms: np.ndarray  # [Q] fp64
    residual_norms: np.ndarray  # [Q] fp64
    query_codes: np.ndarray | None  # [Q, D] int8; None: rows of a block cannot be told apart without scoring them

    def num_candidates(self) -> int:
        """-> the number of blocks, over all queries, that may hold one of the k best."""
        return kernels.count_candidates(self.highest, self.thresholds)


def _coarse_int8(problem: _Problem) -> _Bounds:
    queries = problem.queries.double()
    peaks = queries.abs().amax(1)
    scales = torch.where(peaks > 0, peaks / 127, 1.0)
    query_codes = (queries / scales[:, None]).round().clamp(-127, 127)
    left_over = torch.linalg.vector_norm(queries - scales[:, None] * query_codes, dim=1)
    # Not a transposed view: with one component its strides are (1, 1), which `torch._int_mm` (2.13) silently misreads.
    operand = queries.new_empty(queries.shape[::-1], dtype=torch.int8).copy_(query_codes.t())  # [D, Q]
    # Reused from tile to tile: fresh memory would cost a third of the product's time in page faults.
    buffer = queries.new_empty(problem.tile_rows, queries.shape[0], dtype=torch.int32)
    made = None
    if problem.codes is None and problem.rows.dtype != torch.int8:
        made = empty_codes(problem.tile_rows, queries.shape[1])

    def products(begin: int, end: int) -> tuple[np.ndarray, Codes]:
        if problem.codes is not None:
            codes = Codes(*(tensor[begin:end] for tensor in problem.codes))
        elif made is not None:
            codes = quantize(problem.rows[begin:end], problem.center, made, begin)
        else:
            own_scales = None if problem.row_scales is None else problem.row_scales[begin:end]
            codes = adopt(problem.rows[begin:end], own_scales)
        return torch._int_mm(codes.codes, operand, out=buffer[: end - begin]).numpy(), codes

    return _coarse(problem, products, scales, left_over, problem.center, query_codes.to(torch.int8).numpy())


def _coarse_fp64(problem: _Problem) -> _Bounds:
    """The same with products that are exact to 2^-53, so that hardly anything but the k best remains.

    fp64, because `torch.set_float32_matmul_precision` lets fp32 ones be computed in bf16."""
    queries = problem.queries.double()
    rounding = problem.queries.new_full((queries.shape[0],), queries.shape[1] * 2.0**-52, dtype=torch.float64)

    def products(begin: int, end: int) -> tuple[np.ndarray, Codes]:
        rows = problem.rows[begin:end].double()
        if problem.row_scales is not None:
            rows *= problem.row_scales[begin:end, None]
        lengths = torch.linalg.vector_norm(rows, dim=1)
        if problem.codes is None and not bool(lengths.isfinite().all()):  # codes were checked when they were made
            name, row = "scales" if problem.row_scales is not None else "corpus", int(lengths.isfinite().int().argmin())
            raise ValueError(f"{name}: expected finite numbers, row {begin + row} has others")
        magnitudes = lengths.float() * (1 + kernels.BOUND_SLACK)
        ones, zeros = torch.ones_like(magnitudes), torch.zeros_like(magnitudes)
        return (rows @ queries.t()).numpy(), Codes(problem.rows[begin:end], ones, zeros, magnitudes)

    norms = torch.linalg.vector_norm(queries, dim=1)
    return _coarse(problem, products, torch.ones_like(norms), rounding * norms, torch.zeros_like(problem.center), None)


def _coarse(
    problem: _Problem,
    products: Callable[[int, int], tuple[np.ndarray, Codes]],  # of rows begin to end: [T, Q], and their bounds
    scales: torch.Tensor,  # [Q] fp64
    residual_norms: torch.Tensor,  # [Q] fp64
    center: torch.Tensor,  # [D] fp32
    query_codes: np.ndarray | None,
) -> _Bounds:
    queries, num_rows, block = problem.queries.double(), problem.rows.shape[0], problem.block_rows
    highest = np.empty((queries.shape[0], -(-num_rows // block)), dtype=np.float32)
    lowest = np.full((queries.shape[0], problem.k), -np.inf)  # a heap per query, its root first
    norms = torch.linalg.vector_norm(queries, dim=1)
    offsets, *per_query = (t.numpy() for t in (queries @ center.double(), scales, norms, residual_norms))
    for begin in range(0, num_rows, problem.tile_rows):
        end = min(begin + problem.tile_rows, num_rows)
        tile, codes = products(begin, end)
        arrays = (tensor.numpy() for tensor in codes[1:])
        kernels.reduce_tile(tile, *arrays, block, begin // block, highest, lowest, offsets, *per_query)
    return _Bounds(highest, _thresholds(lowest[:, 0], offsets), offsets, *per_query, query_codes)


def _thresholds(lowest: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Lower bounds of the k-th best scores, less their offsets, [Q] fp64 -> thresholds [Q] fp32."""
    # Unequal scores may be rounded to equal ones: a threshold allows for that, and for its own rounding.
    lowest = np.minimum(lowest, kernels.HUGE - offsets)
    thresholds = lowest - kernels.ROUNDING * (np.abs(offsets + lowest) + np.abs(lowest)) - kernels.LEAST
    # Below that, scores are -inf and equals. `lowest` is -inf also where there are fewer than k blocks.
    everything = np.isnan(thresholds) | (offsets + lowest < -kernels.HUGE)
    with np.errstate(over="ignore"):
        return np.where(everything, -np.inf, thresholds).astype(np.float32)


def _refine(problem: _Problem, bounds: _Bounds, scores: torch.Tensor, ids: torch.Tensor) -> None:
    """Fill scores and ids [Q,k]; queries are distributed over torch's threads."""
    rows, table = _readable(problem.rows)
    codes = problem.codes if bounds.query_codes is not None else None
    if bounds.query_codes is not None and problem.rows.dtype == torch.int8:
        codes = None  # exact scores cost what coarse ones do
    coarse = None if codes is None else tuple(tensor.numpy() for tensor in codes)
    row_scales = None if problem.row_scales is None else problem.row_scales.numpy()
    arguments = (problem.queries.numpy(), rows, table, row_scales, coarse, problem.block_rows, *bounds)
    outputs = (scores.numpy(), ids.numpy())
    num_queries = problem.queries.shape[0]
    cuts = np.linspace(0, num_queries, num_parts(num_queries, 1) + 1).astype(np.int64)
    run_parts(lambda turns: kernels.refine_queries(turns, cuts, *arguments, *outputs), len(cuts) - 1)


def _readable(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
    """-> rows as numba can read them; 16-bit floats as bits, with a table [65536] fp32 of what the bits mean."""
    if rows.dtype in (torch.float16, torch.bfloat16):
        return rows.view(torch.int16).numpy().view(np.uint16), _meanings(rows.dtype)
    return rows.numpy(), None


@functools.cache
def _meanings(dtype: torch.dtype) -> np.ndarray:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16, device="cpu")
    return bits.roll(1 << 15).view(dtype).float().numpy()
