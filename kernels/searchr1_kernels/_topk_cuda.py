"""Exact top-k on a GPU: bounds of all blocks of 128 rows, exact scores of the best blocks, and a proof.

1. One pass over the corpus (or over its 8-bit codes) gives an upper bound per block and query. The bound includes what
   the pass can miss: the quantisation, by Cauchy-Schwarz as in `_topk_cpu`, and the rounding of the matrix units.
2. The k blocks with the highest bounds are scored exactly. Their k-th best score is a lower bound of the result's, so
   of the other blocks only those whose bounds reach it matter; these are scored too, as far as there are places.
3. If the highest bound left over is below the k-th exact score, the result is proven, ties included. The host waits for
   this one answer. If it is not proven (`settle`), all blocks whose bounds reach the k-th score are counted and scored,
   however many there are; or the rows are read as floats, if codes let through so many that this is less work.

`_topk_passes` runs the kernels in order; this module has the rest. `_plain` does the same with torch's own selection:
for more hits than a warp can sort, and as the twin that tests compare with.

Shape legend: Q queries, M rows, D components, G blocks of 128 rows, P chosen blocks per query.
"""

from __future__ import annotations

import functools

import torch

from searchr1_kernels.topk_search import Hits, Settled

_QUERIES_AT_ONCE = 1024
_KEY_BYTES = 1 << 30  # of exact scores that `_best_of_blocks` holds at once
_BOUND_BYTES = 1 << 27  # of bounds in fp64 that `settle` holds at once
_ROWS_AT_ONCE = 1 << 18  # when codes are made
_PLAIN_SLACK = 16
# Scoring what codes let through is preferred up to this fraction of the rows that a pass over the floats would read.
# Scoring reads rows for one query at a time and adds in fp64, so its bytes take longer; how much is not yet measured.
_WORTH = 0.5
# Rounding of scores and bounds to fp32, as in `_topk_numba`.
_ROUNDING, _LEAST, _HUGE = 2.5e-7, 1e-37, 3.4e38


def prepare(corpus: torch.Tensor, scales: torch.Tensor | None, coarse: str) -> list[torch.Tensor]:
    """-> what bounds of a corpus are made of, by `coarse`.

    "float": [norms [G]]. "int8": [norms [G], center [D], codes [M,D], scales [M], residuals [M], magnitudes [G]]. A [G]
    has the largest value of each block's rows."""
    norms = _per_block(_row_norms(corpus, scales))
    if coarse == "float":
        return [norms]
    if corpus.dtype == torch.int8:
        ones = corpus.new_ones(corpus.shape[0], dtype=torch.float32) if scales is None else scales
        center = corpus.new_zeros(corpus.shape[1], dtype=torch.float32)
        return [norms, center, corpus, ones, torch.zeros_like(ones), norms]
    center = corpus[:: max(1, corpus.shape[0] // 4096)].double().mean(0).float()
    codes = torch.empty_like(corpus, dtype=torch.int8)
    row_scales, residuals, magnitudes = (corpus.new_empty(corpus.shape[0], dtype=torch.float32) for _ in range(3))
    for begin in range(0, corpus.shape[0], _ROWS_AT_ONCE):
        part = slice(begin, begin + _ROWS_AT_ONCE)
        codes[part], row_scales[part], residuals[part], magnitudes[part] = _quantize(corpus[part], center)
    return [norms, center, codes, row_scales, residuals, _per_block(magnitudes)]


def products(parts: list[torch.Tensor]) -> str:
    """-> the products that propose candidates, given what `prepare` returned."""
    return "int8" if len(parts) > 1 else "float"


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """-> rows [M,D], copied if 16 divides D but they do not begin at a multiple of 16 bytes.

    Read number by number, exact scores would be summed in another order, and bounds would take more registers than
    there are."""
    return rows.clone() if rows.shape[1] % 16 == 0 and rows.data_ptr() % 16 else rows


def _row_norms(corpus: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """-> upper bounds of the rows' norms, [M] fp32."""
    norms = corpus.new_empty(corpus.shape[0], dtype=torch.float32)
    for begin in range(0, corpus.shape[0], _ROWS_AT_ONCE):
        part = slice(begin, begin + _ROWS_AT_ONCE)
        rows = corpus[part] if corpus.is_floating_point() else corpus[part].half()
        norms[part] = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) * (1 + 1e-6)
    if scales is not None:
        norms *= scales.abs() * (1 + 1e-6)
    if not bool(norms.isfinite().all()):
        raise ValueError("corpus: expected finite numbers (and scales), whose products fit fp32")
    return norms


def _quantize(rows: torch.Tensor, center: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """rows [M,D] -> codes [M,D] int8, scales, residuals, magnitudes [M] fp32; the latter two are norms, from fp64."""
    from searchr1_kernels._topk_numba import TINY

    centred = rows.double() - center.double()
    peaks = centred.abs().amax(1)
    scales = (peaks / 127).float()
    codes = (centred / scales.double().clamp(min=1e-45)[:, None]).round_().clamp_(-127, 127)
    magnitudes = torch.linalg.vector_norm(codes, dim=1) * scales
    residuals = torch.linalg.vector_norm(centred.addcmul_(codes, scales[:, None].double(), value=-1), dim=1)
    return codes.to(torch.int8), scales, *((norm * (1 + 1e-6) + TINY).float() for norm in (residuals, magnitudes))


def _per_block(values: torch.Tensor) -> torch.Tensor:
    """values [M] -> the largest of each block [G]."""
    from searchr1_kernels._topk_bounds_triton import BLOCK_ROWS

    padding = -values.shape[0] % BLOCK_ROWS
    return torch.nn.functional.pad(values, (0, padding)).view(-1, BLOCK_ROWS).amax(1)


def search(
    queries: torch.Tensor,  # [Q, D] floating
    corpus: torch.Tensor,  # [M, D] fp32, fp16, bf16 or int8, contiguous
    k: int,
    scales: torch.Tensor | None,  # [M] fp32
    parts: list[torch.Tensor],  # of `prepare`; empty: norms are computed on the way
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> scores [Q,k] fp32, ids [Q,k] int64."""
    from searchr1_kernels._topk_passes import Corpus

    queries = queries.contiguous()
    parts = parts or prepare(corpus, scales, "int8" if corpus.dtype == torch.int8 else "float")
    with torch.cuda.device_of(corpus):
        scores, ids, _ = _search(queries, Corpus(corpus, scales, parts), k)
    return scores, ids


def _search(queries: torch.Tensor, corpus, k: int) -> tuple[torch.Tensor, torch.Tensor, Settled]:
    """-> scores, ids, and what settling took."""
    from searchr1_kernels._topk_passes import Passes

    passes, settled = Passes(corpus, min(len(queries), _QUERIES_AT_ONCE), k), Settled()
    scores = queries.new_empty(len(queries), k, dtype=torch.float32)
    ids = queries.new_empty(len(queries), k, dtype=torch.int64)
    unproven = queries.new_empty(len(queries), dtype=torch.int32)
    search = passes.launch if passes.can_launch(k) else functools.partial(_plain, passes)
    for begin in range(0, len(queries), _QUERIES_AT_ONCE):
        part = slice(begin, begin + _QUERIES_AT_ONCE)
        hits = Hits(ids[part], scores[part], unproven[part])
        search(queries[part], k, hits)
        left = hits.unproven.nonzero().squeeze(1)  # the one wait
        settled = settled + settle(passes, queries[part], hits, left)
    return scores, ids, settled


def _plain(passes, queries, k, hits) -> None:
    """The plain twin of `Passes.launch`."""
    num_blocks = passes.corpus.num_blocks
    bounds, offsets = passes.bounds(queries)
    chosen = min(num_blocks, k + _PLAIN_SLACK)
    highest, blocks = torch.topk(bounds, min(num_blocks, chosen + 1), dim=1)
    hits.scores[:], hits.ids[:] = _best_of_blocks(queries, passes.corpus, k, blocks[:, :chosen])
    left_over = _reaching(highest[:, chosen:], offsets, hits.scores[:, -1])  # [Q, 1], or [Q, 0] if nothing is left over
    hits.unproven[:] = left_over.any(1)


def settle(passes, queries: torch.Tensor, hits, unproven: torch.Tensor) -> Settled:
    """Correct the hits of the queries `unproven` [n] in the last search of `passes`. Waits for the device."""
    settled = Settled()
    for part in unproven.split(max(1, _BOUND_BYTES // (8 * passes.corpus.num_blocks))):
        if len(part):
            settled = settled + _settle(passes, queries, hits, part)
    return settled


def _settle(passes, queries, hits, unproven) -> Settled:
    from searchr1_kernels._topk_bounds_triton import BLOCK_ROWS
    from searchr1_kernels._topk_passes import Corpus

    corpus, k = passes.corpus, hits.scores.shape[1]
    pending = queries[unproven]
    bounds, offsets = (tensor[unproven] for tensor in passes.last_bounds(len(queries)))
    reaching = _reaching(bounds, offsets, hits.scores[unproven, -1])  # [n, G]
    counts = reaching.sum(1)
    total = int(counts.sum())
    codes = passes.coarse(len(queries)) == "int8" and corpus.rows.is_floating_point()
    if codes and total * BLOCK_ROWS > _WORTH * corpus.rows.shape[0]:
        floats = Corpus(corpus.rows, corpus.scales, corpus.parts[:1])
        hits.scores[unproven], hits.ids[unproven], more = _search(pending, floats, k)
        return Settled(len(unproven), len(unproven), more.num_blocks)
    highest, blocks = torch.topk(torch.where(reaching, bounds, -torch.inf), int(counts.max()), dim=1)
    blocks = torch.where(highest == -torch.inf, -1, blocks)
    hits.scores[unproven], hits.ids[unproven] = _best_of_blocks(pending, corpus, k, blocks)
    return Settled(len(unproven), 0, total)


def _reaching(bounds, offsets, scores) -> torch.Tensor:
    """bounds [n,G] fp32, offsets [n] fp64, scores [n] fp32 -> which blocks may reach the score, [n,G] bool."""
    bounds, offsets = bounds.double(), offsets[:, None]
    highest = offsets + bounds + _ROUNDING * ((offsets + bounds).abs() + bounds.abs()) + _LEAST
    return ~((highest < _HUGE) & (highest < scores.double()[:, None]))


def _best_of_blocks(queries, corpus, k, blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """blocks [Q,P], -1 where there is none -> scores, ids [Q,k] of the best of their rows."""
    from searchr1_kernels._topk_bounds_triton import BLOCK_ROWS
    from searchr1_kernels._topk_passes import score_places
    from searchr1_kernels._topk_triton import PARTS

    num_places = blocks.shape[1]
    step = max(1, _KEY_BYTES // (8 * num_places * BLOCK_ROWS))
    best = [torch.empty(0, k, dtype=torch.int64, device=queries.device)]
    for begin in range(0, len(queries), step):
        part = slice(begin, begin + step)
        size = len(queries[part])
        keys = torch.full((size, num_places * BLOCK_ROWS), -1 << 63, dtype=torch.int64, device=queries.device)
        maxima = keys.new_empty(size, num_places * PARTS)
        score_places(queries[part], corpus, blocks[part].contiguous(), keys, maxima, num_places, 0, num_places)
        best.append(torch.topk(keys, k, dim=1).values)  # keys are all different, so the answer is unique
    return _unpack(torch.cat(best))


def _unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of `exact_keys` -> scores fp32, ids int64."""
    monotone = (keys >> 32).to(torch.int32)
    bits = monotone ^ ((monotone >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)
