"""The search's kernels in order, over memory allocated once: what `_topk_cuda` runs, and what can be recorded.

A search with Q queries for k hits:

    prepare_queries   operands, norms, and the norms of what the operands lack
    block_bounds      the one pass over the corpus: an upper bound per block and query
    group_maxima      the largest bound of each group of blocks
    best_blocks       the k best blocks; they have at least k rows, so their k-th score is a lower bound of the result's
    exact_keys, best_hits
    best_blocks       of the other blocks, those that may reach that score, as far as there are places
    exact_keys, best_hits, which tells whether all that may reach it had a place

Nothing here waits for the device, and nothing allocates after the first search of a kind: a search is a fixed list of
launches.

Shape legend: Q queries, M rows, D components, G blocks of 128 rows, P places, K hits, N groups of blocks.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from searchr1_kernels._topk_bounds_triton import (
    BLOCK_ROWS,
    Candidate,
    block_bounds,
    block_constants,
    candidates,
    digit_base,
)
from searchr1_kernels._topk_cuda import aligned
from searchr1_kernels._topk_triton import (
    EXACT_CONFIGURATION,
    MAX_GROUP_BLOCKS,
    MAX_GROUPS,
    MAX_PLACES,
    PARTS,
    PREPARE_CONFIGURATION,
    SCALAR_EXACT_CONFIGURATION,
    TAKE_CONFIGURATION,
    best_blocks,
    best_hits,
    exact_keys,
    group_constants,
    group_maxima,
    maxima_tile,
    prepare_queries,
)
from searchr1_kernels.topk_search import Hits

# Places beyond k for blocks that may reach the k-th score. An empty place costs a program that ends at once, and a KiB;
# a missing one costs the host's second look (`_topk_cuda.settle`). The blur of the bounds admits a few blocks with
# 16-bit rows, some dozens with codes.
SLACK = {"float": 48, "int8": 240}
# Products with two digits take twice as long: with more queries than this, they take more time than the reading.
MAX_CODED_QUERIES = 128
# Sums of exact products in fp32, where a matrix unit may drop the last two bits of every addition.
_SUM_ROUNDING = 2.0**-22
# fp32 operands are truncated to 10 bits of mantissa each, a relative error of 2^-10.
_TF32_ROUNDING = 2.0**-9 + 2.0**-20
# Products may drop what underflows in fp32.
_TINY = 1e-36
_SAME = 1e-4  # of the largest bound: matrix units differ in the order of sums; a wrong kernel is further off
_TUNED_QUERIES = (16, 32, 64, 128, 256)


class Corpus(NamedTuple):
    """The corpus that is searched."""

    rows: torch.Tensor  # [M, D]
    scales: torch.Tensor | None  # [M] fp32
    parts: list[torch.Tensor]  # of `_topk_cuda.prepare`

    @property
    def coarse(self) -> str:
        """-> what bounds can be made of: "int8" codes or "float" rows."""
        return "int8" if len(self.parts) > 1 else "float"

    @property
    def num_blocks(self) -> int:
        """-> the number of blocks of 128 rows."""
        return self.parts[0].shape[0]

    @property
    def device(self) -> torch.device:
        """-> the device of the rows."""
        return self.rows.device


class Passes:
    """Searches of up to `max_queries` queries for up to `max_k` hits, one at a time."""

    def __init__(self, corpus: Corpus, max_queries: int, max_k: int) -> None:
        size, rows = corpus.rows.shape[1], aligned(corpus.rows)  # a `TopKIndex` has aligned rows
        if rows is not corpus.rows:
            address = corpus.rows.data_ptr()
            corpus = Corpus(rows, corpus.scales, [rows if x.data_ptr() == address else x for x in corpus.parts])
        self.corpus = corpus
        num_blocks, max_places = corpus.num_blocks, self.num_places(max_k)
        self._num_groups = -(-num_blocks // group_constants(num_blocks)["GROUP"])
        new = functools.partial(torch.empty, device=corpus.device)
        self._operand = new(max_queries * size * max(2, corpus.rows.itemsize), dtype=torch.uint8)
        # Each of whole 16 bytes: otherwise a kernel would be compiled once more for another alignment.
        vectors = new(4, -(-max_queries // 4) * 4, dtype=torch.float32)
        self._scales, self._norms, self._residual_norms, self._rest = vectors
        self._offsets = new(max_queries, dtype=torch.float64)
        self._residuals = torch.full((num_blocks,), _TINY, dtype=torch.float32, device=corpus.device)
        self._bounds = new(max_queries * num_blocks, dtype=torch.float32)
        self._maxima = new(max_queries * self._num_groups, dtype=torch.int64)
        self._blocks = new(max_queries * max_places, dtype=torch.int64)
        self._keys = new(max_queries * max_places * BLOCK_ROWS, dtype=torch.int64)
        self._part_maxima = new(max_queries * max_places * PARTS, dtype=torch.int64)

    @property
    def scratch(self) -> list[torch.Tensor]:
        """-> the memory that every search fills before it reads it: all but `_residuals`."""
        names = ("_operand", "_norms", "_offsets", "_bounds", "_maxima", "_blocks", "_keys", "_part_maxima")
        return [getattr(self, name) for name in names]  # `_norms` shares memory with scales, residual norms and rest

    def num_places(self, k: int) -> int:
        """-> the number of blocks that can be scored for one query."""
        return min(self.corpus.num_blocks, MAX_PLACES, k + SLACK[self.corpus.coarse])

    def can_launch(self, k: int) -> bool:
        """Whether `launch` can find k hits in a corpus of this size."""
        num_blocks = self.corpus.num_blocks
        return num_blocks <= MAX_GROUPS * MAX_GROUP_BLOCKS and (
            num_blocks <= MAX_PLACES or k + SLACK["float"] <= MAX_PLACES
        )

    def coarse(self, num_queries: int) -> str:
        """-> what bounds are made of for this many queries: "int8" or "float"."""
        many = num_queries > MAX_CODED_QUERIES and self.corpus.rows.is_floating_point()
        return "float" if many else self.corpus.coarse

    def last_bounds(self, num_queries: int) -> tuple[torch.Tensor, torch.Tensor]:
        """-> what `bounds` returned in the last search, which had `num_queries` queries."""
        num_blocks = self.corpus.num_blocks
        return self._bounds[: num_queries * num_blocks].view(num_queries, num_blocks), self._offsets[:num_queries]

    def launch(self, queries: torch.Tensor, k: int, hits: Hits) -> None:
        """Search queries [Q,D], floating and contiguous, and fill `hits`."""
        num_queries, num_places = len(queries), self.num_places(k)
        bounds, offsets = self.bounds(queries)
        if num_queries == 0:
            return
        constants = group_constants(self.corpus.num_blocks)
        tile = maxima_tile(constants["GROUP"])
        group_maxima[(num_queries, -(-self._num_groups // tile))](
            bounds, self._maxima, self.corpus.num_blocks, self._num_groups, GROUP=constants["GROUP"], TILE=tile
        )
        first = min(k, num_places)
        for begin, end in ((0, first), (first, num_places)):
            if begin == end:  # the corpus has no more blocks
                break
            best_blocks[(num_queries,)](
                bounds, self._maxima, offsets, hits.scores, self._blocks, self._rest, self.corpus.num_blocks,
                self._num_groups, num_places, begin, end, k, THRESHOLD=begin > 0, **constants, **TAKE_CONFIGURATION,
            )  # fmt: skip
            score_places(queries, self.corpus, self._blocks, self._keys, self._part_maxima, num_places, begin, end)
            best_hits[(num_queries,)](
                self._keys, self._part_maxima, offsets, self._rest, *hits[1::-1], hits.unproven, num_places, end, k,
                PART=EXACT_CONFIGURATION["PART"], GROUPS=max(32, 1 << (end * PARTS - 1).bit_length()),
                **TAKE_CONFIGURATION,
            )  # fmt: skip

    def bounds(self, queries: torch.Tensor, way: Candidate | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """-> upper bounds [Q,G] fp32 of each block's scores, less offsets [Q] fp64. The next search overwrites both."""
        num_queries, size = queries.shape
        num_blocks = self.corpus.num_blocks
        bounds, offsets = self.last_bounds(num_queries)
        if num_queries == 0:
            return bounds, offsets
        digits = self.coarse(num_queries) == "int8"
        if digits:
            _, center, rows, row_scales, residuals, magnitudes = self.corpus.parts
            dtype, base, rounding = torch.int8, digit_base(size), 0.0
        else:
            rows, row_scales, magnitudes = self.corpus.rows, self.corpus.scales, self.corpus.parts[0]
            center, residuals, base = magnitudes, self._residuals, 0
            dtype = rows.dtype if rows.is_floating_point() else torch.float16
            rounding = _SUM_ROUNDING * size + (_TF32_ROUNDING if dtype == torch.float32 else 0.0)
        shape = ((1 + digits) * num_queries, size)
        operand = self._operand[: shape[0] * size * dtype.itemsize].view(dtype).view(shape)
        prepare_queries[(num_queries,)](
            queries, center, operand, self._scales, self._norms, self._residual_norms, self._offsets, num_queries, size,
            rounding, BASE=base, **PREPARE_CONFIGURATION,
        )  # fmt: skip
        way = way or self._ways(num_queries)[0]
        constants = block_constants(way, operand.itemsize) | {"SCALED": row_scales is not None, "BASE": base}
        tiles = -(-num_queries // way.queries)
        vectors = (self._scales, self._norms, self._residual_norms, residuals, magnitudes, bounds)
        numbers = (rows.shape[0], num_queries, size, num_blocks)
        row_scales = magnitudes if row_scales is None else row_scales
        if way.programs:
            _walk(way, rows, operand, row_scales, vectors, numbers, tiles, constants)
        else:
            even = size % constants["BK"] == 0
            block_bounds[(num_blocks * tiles,)](rows, row_scales, operand, *vectors, *numbers, EVEN=even, **constants)
        return bounds, offsets

    def tune(self, num_queries: int, seconds: Callable[[Callable[[], object]], float]) -> dict[str, float]:
        """Time every way to make bounds for this many queries. -> seconds by name, the fastest first.

        The fastest is remembered for every corpus of this device, type and width. `seconds` returns how long a call
        takes, including what it queues. A way whose bounds differ from those of the first is left out with a warning:
        wrong bounds would lose hits, and nobody would notice."""
        queries = torch.randn(num_queries, self.corpus.rows.shape[1], device=self.corpus.device)
        times: dict[Candidate, float] = {}
        wanted = None
        for way in _candidates(*self._kind(num_queries)):
            elapsed = seconds(functools.partial(self.bounds, queries, way))
            bounds, _ = self.last_bounds(num_queries)
            wanted = bounds.clone() if wanted is None else wanted
            if not times or bool((bounds - wanted).abs().max() <= _SAME * wanted.abs().max()):
                times[way] = elapsed
            else:
                warnings.warn(f"exact search: {way.name} gives other bounds on {self.corpus.device}; it is not used",
                              stacklevel=2)  # fmt: skip
        ways = sorted(times, key=times.__getitem__)
        _FASTEST[self._kind(num_queries)] = ways[0]
        return {way.name: times[way] for way in ways}

    def _ways(self, num_queries: int) -> list[Candidate]:
        """-> the ways worth trying, the best known first."""
        kind = self._kind(num_queries)
        return [_FASTEST[kind]] if kind in _FASTEST else _candidates(*kind)

    def _kind(self, num_queries: int) -> _Kind:
        """-> everything that determines the ways and which of them is the fastest."""
        digits = self.coarse(num_queries) == "int8"
        rows = self.corpus.parts[2] if digits else self.corpus.rows
        named = rows.shape[0] < 1 << 31 and rows.data_ptr() % 16 == 0 and rows.shape[1] * rows.itemsize % 16 == 0
        bucket = min((tuned for tuned in _TUNED_QUERIES if tuned >= num_queries), default=_TUNED_QUERIES[-1])
        return rows.device, rows.dtype, rows.shape[1], digits, named, bucket


_Kind = tuple[torch.device, torch.dtype, int, bool, bool, int]
_FASTEST: dict[_Kind, Candidate] = {}


def score_places(
    queries: torch.Tensor,  # [Q, D]
    corpus: Corpus,
    blocks: torch.Tensor,  # [Q, P] int64, or flat
    keys: torch.Tensor,  # [Q, P * 128] int64, or flat: filled where a place has a block
    maxima: torch.Tensor,  # [Q, P * PARTS] int64, or flat: filled
    num_places: int,
    begin: int,
    end: int,
) -> None:
    """Compute exact scores of the blocks in places from `begin` to `end`, as keys."""
    scales = corpus.parts[0] if corpus.scales is None else corpus.scales
    options = SCALAR_EXACT_CONFIGURATION if corpus.rows.shape[1] % 16 else EXACT_CONFIGURATION
    exact_keys[(len(queries) * (end - begin) * PARTS,)](
        corpus.rows, scales, queries, blocks, keys, maxima, *corpus.rows.shape, num_places, begin, end - begin,
        SCALED=corpus.scales is not None, **options,
    )  # fmt: skip


def _walk(way, rows, operand, row_scales, vectors, numbers, tiles, constants) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from searchr1_kernels._topk_walk_triton import walk_bounds

    steps = -(-rows.shape[0] // way.rows) * tiles
    descriptors = [
        TensorDescriptor.from_tensor(tensor, [num_rows, constants["BK"]])
        for tensor, num_rows in ((rows, way.rows), (operand, way.queries))
    ]
    programs = min(steps, way.programs * _device(rows.device).multiprocessors)
    walk_bounds[(programs,)](descriptors[0], row_scales, descriptors[1], *vectors, *numbers, **constants)


def _candidates(device, dtype, size, digits, named, num_queries) -> list[Candidate]:
    """-> candidates for this device and kind of rows.

    `named`: a descriptor can address the rows (whole 16 bytes, row numbers of 31 bits)."""
    limits = _device(device)
    walks = limits.walks and named and (digits or dtype.is_floating_point)  # and the operand has the rows' type
    return candidates(num_queries, size, digits, limits.shared_memory, walks)


class _Limits(NamedTuple):
    shared_memory: int  # bytes that one program can have
    multiprocessors: int
    walks: bool  # whether there are walking kernels for it


@functools.cache
def _device(device: torch.device) -> _Limits:
    """-> a device's limits. An interpreted kernel runs on the CPU, which has none."""
    if device.type != "cuda":
        return _Limits(1 << 20, 2, True)
    properties = torch.cuda.get_device_properties(device)
    return _Limits(properties.shared_memory_per_block_optin, properties.multi_processor_count, properties.major == 9)
