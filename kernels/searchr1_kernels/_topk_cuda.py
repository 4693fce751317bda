"""Exact top-k on a GPU: bounds of all blocks of 128 rows, exact scores of the best blocks, and a proof.

1. `block_bounds`: one pass over the corpus (or over its 8-bit codes) gives an upper bound per block and query; what it
   can miss is the quantisation, by Cauchy-Schwarz as in `_topk_cpu`, and the rounding of the matrix units.
2. The k + 16 blocks with the highest bounds are scored exactly. At most k - 1 blocks can have a row above the k-th best
   score, so more than k are needed only for what bounds blur.
3. If the highest bound that is left over is below the k-th exact score, the result is proven, ties included. The host
   waits for this one answer. For queries where it fails, codes give way to the rows as floats, then 8 times as many
   blocks are scored, until the proof holds or no block is left.

Shape legend: Q queries, M rows, D components, G blocks of 128 rows, P chosen blocks per query.
"""

from __future__ import annotations

import functools

import torch

# Blocks scored beyond k. What bounds blur is a few blocks for 16-bit rows and some dozens for codes.
_SLACK = {"float": 16, "int8": 64}
_WIDEN = 8
_QUERIES_AT_ONCE = 1024
_KEY_BYTES = 1 << 30  # of exact scores at once
_ROWS_AT_ONCE = 1 << 18  # when codes are made
_ROUNDING = 2.5e-7  # of scores and bounds to fp32, as in _topk_numba
# Sums of exact products in fp32, of which a matrix unit may drop the last two bits of every addition.
_SUM_ROUNDING = 2.0**-22
# fp32 operands are cut to 10 bits of mantissa each, which is a relative 2^-10.
_TF32_ROUNDING = 2.0**-9 + 2.0**-20


def prepare(corpus: torch.Tensor, scales: torch.Tensor | None, coarse: str) -> list[torch.Tensor]:
    """-> [norms [G]] for "float"; [norms [G], center [D], codes [M,D], scales [M], residuals [G], magnitudes [G]] for
    "int8". Of rows the largest value per block is kept."""
    norms = _per_block(_row_norms(corpus, scales))
    if coarse == "float":
        return [norms]
    if corpus.dtype == torch.int8:
        ones = corpus.new_ones(corpus.shape[0], dtype=torch.float32) if scales is None else scales
        center = corpus.new_zeros(corpus.shape[1], dtype=torch.float32)
        return [norms, center, corpus, ones, torch.zeros_like(norms), norms]
    center = corpus[:: max(1, corpus.shape[0] // 4096)].double().mean(0).float()
    codes = torch.empty_like(corpus, dtype=torch.int8)
    row_scales, residuals, magnitudes = (corpus.new_empty(corpus.shape[0], dtype=torch.float32) for _ in range(3))
    for begin in range(0, corpus.shape[0], _ROWS_AT_ONCE):
        part = slice(begin, begin + _ROWS_AT_ONCE)
        codes[part], row_scales[part], residuals[part], magnitudes[part] = _quantize(corpus[part], center)
    return [norms, center, codes, row_scales, _per_block(residuals), _per_block(magnitudes)]


def products(parts: list[torch.Tensor]) -> str:
    """What proposes candidates, given what `prepare` made."""
    return "int8" if len(parts) > 1 else "float"


def _row_norms(corpus: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """[M] fp32, no less than the norms."""
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
    """rows [M,D] -> codes [M,D] int8, scales, residuals, magnitudes [M] fp32; norms from fp64."""
    from searchr1_kernels._topk_numba import TINY

    centred = rows.double() - center.double()
    peaks = centred.abs().amax(1)
    scales = (peaks / 127).float()
    codes = (centred / scales.double().clamp(min=1e-45)[:, None]).round_().clamp_(-127, 127)
    magnitudes = torch.linalg.vector_norm(codes, dim=1) * scales
    residuals = torch.linalg.vector_norm(centred.addcmul_(codes, scales[:, None].double(), value=-1), dim=1)
    return codes.to(torch.int8), scales, *((norm * (1 + 1e-6) + TINY).float() for norm in (residuals, magnitudes))


def _per_block(values: torch.Tensor) -> torch.Tensor:
    """[M] -> [G]: the largest of each block."""
    from searchr1_kernels._topk_triton import BLOCK_ROWS

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
    queries = queries.contiguous()
    parts = parts or prepare(corpus, scales, "int8" if corpus.dtype == torch.int8 else "float")
    coarse = products(parts)
    keys = queries.new_empty(queries.shape[0], k, dtype=torch.int64)
    with torch.cuda.device_of(corpus):
        for begin in range(0, queries.shape[0], _QUERIES_AT_ONCE):
            part = slice(begin, begin + _QUERIES_AT_ONCE)
            keys[part] = _search(queries[part], corpus, k, scales, parts, coarse)
    return _unpack(keys)


def _search(queries, corpus, k, scales, parts, coarse) -> torch.Tensor:
    """-> the k best keys [Q,k] int64, in order."""
    num_blocks = parts[0].shape[0]
    chosen = min(num_blocks, k + _SLACK[coarse])
    if chosen == num_blocks:
        return _score_all(queries, corpus, k, scales, num_blocks)
    bounds, offsets = _bounds(queries, corpus, scales, parts, coarse)  # [Q, G], [Q]
    best = torch.empty(queries.shape[0], k, dtype=torch.int64, device=queries.device)
    pending = torch.arange(queries.shape[0], device=queries.device)
    while True:
        rest, blocks = torch.topk(bounds, chosen + 1, dim=1)
        keys = _score_blocks(queries[pending], corpus, k, scales, blocks[:, :chosen].contiguous())
        best[pending] = keys
        rest = rest[:, chosen].double()
        highest = offsets + rest + _ROUNDING * ((offsets + rest).abs() + rest.abs())
        failed = ~(highest < _unpack(keys[:, -1:])[0].squeeze(1))
        if not bool(failed.any()):  # the one wait
            return best
        pending, bounds, offsets = pending[failed], bounds[failed], offsets[failed]
        chosen = min(num_blocks, chosen * _WIDEN)
        if coarse == "int8" and chosen < num_blocks:
            best[pending] = _search(queries[pending], corpus, k, scales, parts, "float")
            return best
        if chosen == num_blocks:
            best[pending] = _score_all(queries[pending], corpus, k, scales, num_blocks)
            return best


def _score_all(queries, corpus, k, scales, num_blocks) -> torch.Tensor:
    """[Q,k]; for a corpus of few blocks, or for bounds that tell nothing."""
    every = torch.arange(num_blocks, device=queries.device).expand(queries.shape[0], -1)
    return _score_blocks(queries, corpus, k, scales, every)


def _score_blocks(queries, corpus, k, scales, blocks) -> torch.Tensor:
    """blocks [Q,P] -> the k best keys [Q,k] of their rows."""
    from searchr1_kernels._topk_triton import BLOCK_ROWS, EXACT_CONFIGURATION, exact_keys

    num_chosen = blocks.shape[1]
    step = max(1, _KEY_BYTES // (8 * num_chosen * BLOCK_ROWS))
    best = []
    for begin in range(0, queries.shape[0], step):
        part = blocks[begin : begin + step].contiguous()
        keys = queries.new_empty(part.shape[0], num_chosen * BLOCK_ROWS, dtype=torch.int64)
        exact_keys[(part.numel(),)](
            corpus, corpus if scales is None else scales, queries[begin : begin + step], part, keys,
            corpus.shape[0], corpus.shape[1], num_chosen, SCALED=scales is not None, **EXACT_CONFIGURATION,
        )  # fmt: skip
        best.append(torch.topk(keys, k, dim=1).values)  # keys are all different: there is one answer
    return torch.cat(best) if best else blocks.new_empty(0, k)


def _bounds(queries, corpus, scales, parts, coarse) -> tuple[torch.Tensor, torch.Tensor]:
    """-> bounds [Q,G] fp32 of the scores of each block, less offsets [Q] fp64."""
    from searchr1_kernels._topk_triton import block_bounds, bounds_configuration

    exact = queries.double()
    norms = torch.linalg.vector_norm(exact, dim=1)  # [Q]
    if coarse == "int8":
        _, center, rows, row_scales, residuals, magnitudes = parts
        offsets, largest, dtype = exact @ center.double(), 127, torch.int8
    else:
        rows, row_scales, magnitudes = corpus, scales, parts[0]
        # What has no exponent left in fp32 may be dropped by the product.
        residuals, offsets, largest = torch.full_like(magnitudes, 1e-36), torch.zeros_like(norms), 1
        dtype = torch.float16 if corpus.dtype == torch.int8 else corpus.dtype
    peaks = exact.abs().amax(1)
    units = torch.where(peaks > 0, peaks / largest, 1.0)  # [Q]
    operand = exact / units[:, None]
    operand = (operand.round() if coarse == "int8" else operand).to(dtype)  # [Q, D]
    left_over = torch.linalg.vector_norm(exact - operand.double() * units[:, None], dim=1)
    if coarse == "float":
        rounding = _SUM_ROUNDING * exact.shape[1] + (_TF32_ROUNDING if dtype == torch.float32 else 0.0)
        left_over = left_over + rounding * (norms + left_over)
    num_queries, size = operand.shape
    num_blocks = magnitudes.shape[0]
    configuration = bounds_configuration(num_queries, operand.element_size(), _shared_memory(corpus.device))
    bounds = exact.new_empty(num_queries, num_blocks, dtype=torch.float32)
    grid = (num_blocks * -(-num_queries // configuration["BN"]),)
    block_bounds[grid](
        rows, rows if row_scales is None else row_scales, operand,
        units.float(), *((tensor * (1 + 1e-6)).float() for tensor in (norms, left_over)), residuals, magnitudes, bounds,
        corpus.shape[0], num_queries, size, num_blocks,
        SCALED=row_scales is not None, EVEN=size % configuration["BK"] == 0, **configuration,
    )  # fmt: skip
    return bounds, offsets


def _unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of `exact_keys` -> scores fp32, ids int64."""
    monotone = (keys >> 32).to(torch.int32)
    bits = monotone ^ ((monotone >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program can have. An interpreted kernel runs on the CPU, where there is no limit."""
    if device.type != "cuda":
        return 1 << 20
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
