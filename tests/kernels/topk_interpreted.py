"""The search's Triton kernels and their host side. Run by `test_triton`, not collected by itself.

Without a GPU they run in Triton's interpreter, which has to be chosen before Triton is imported: hence a process of
their own. With one (`pytest tests/kernels/topk_interpreted.py`) they are compiled. bf16 products are left to a GPU: the
interpreter multiplies bf16 bit patterns as integers, and gets nonsense without a word.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import _topk_cuda, reference
from searchr1_kernels._topk_triton import CONFIGURATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.int8] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture(autouse=True, scope="module")
def few_blocks():
    """Fewer blocks scored at once than a small corpus has, so that something is left to prove."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_topk_cuda, "_SLACK", {"float": 1, "int8": 3})
        patch.setattr(_topk_cuda, "_WIDEN", 2)
        patch.setattr(_topk_cuda, "_QUERIES_AT_ONCE", 6)
        patch.setattr(_topk_cuda, "_KEY_BYTES", 8 << 10)
        patch.setattr(_topk_cuda, "_ROWS_AT_ONCE", 500)
        yield


def problem(kind, rows, size, queries, dtype, seed=0):
    """queries [Q,D], corpus [M,D], scales [M] or None."""
    generator = torch.Generator().manual_seed(seed)
    corpus, asked = torch.randn(rows, size, generator=generator), torch.randn(queries, size, generator=generator)
    if kind == "ties":
        corpus, asked = corpus.round(), asked.round()
    elif kind == "copies":
        corpus = corpus[torch.randint(max(1, rows // 200), (rows,), generator=generator)]
    elif kind == "close":
        corpus = corpus[:1] + 1e-3 * corpus
    elif kind == "large component":
        corpus[:, 0], asked[:, 0] = 1000 * corpus[:, 0], 0
    scales = None
    if dtype == torch.int8:
        corpus = corpus / corpus.abs().amax() * 127
        scales = torch.rand(rows, generator=generator).to(DEVICE)
    return asked.to(DEVICE), corpus.to(dtype).to(DEVICE), scales


def assert_exact(kind, rows, size, queries, k, dtype, coarse, seed=0):
    asked, corpus, scales = problem(kind, rows, size, queries, dtype, seed)
    parts = _topk_cuda.prepare(corpus, scales, coarse) if coarse else []
    have = _topk_cuda.search(asked, corpus, k, scales, parts)
    for left, right in zip(have, reference.topk_inner_product(asked, corpus, k, scales=scales), strict=True):
        assert torch.equal(left, right)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["normal", "ties", "copies", "close", "large component"]),
    rows=st.integers(1, 1000),
    size=st.integers(1, 80),
    queries=st.integers(0, 9),
    k=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    coarse=st.sampled_from([None, "float", "int8"]),
    seed=st.integers(0, 9),
)
def test_matches_the_oracle(kind, rows, size, queries, k, dtype, coarse, seed):
    assert_exact(kind, rows, size, queries, min(k, rows), dtype, coarse, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coarse", ["float", "int8"])
def test_whole_tiles(dtype, coarse):
    """Sizes that need no mask."""
    assert_exact("normal", 1280, 128, 5, 2, dtype, coarse)


@pytest.mark.parametrize("queries", [*(size + more for size in CONFIGURATIONS for more in (0, 1)), 300])
def test_bounds_for_any_number_of_queries(queries):
    """Every shipped tile, full and with one query over; each query's bounds are those it gets alone."""
    asked, corpus, scales = problem("normal", 300, 40, queries, torch.float16)
    parts = _topk_cuda.prepare(corpus, scales, "float")
    bounds, _ = _topk_cuda._bounds(asked, corpus, scales, parts, "float")
    best = torch.nn.functional.pad(asked.double() @ corpus.double().T, (0, 84), value=-torch.inf)
    assert (best.view(queries, 3, 128).amax(2) <= bounds).all()
    for q in (0, queries - 1):
        alone, _ = _topk_cuda._bounds(asked[q : q + 1], corpus, scales, parts, "float")
        torch.testing.assert_close(bounds[q : q + 1], alone, rtol=1e-6, atol=1e-6)


def test_more_is_scored_until_it_is_proven(monkeypatch):
    """Copies in more blocks than are scored at first: the first answer cannot be the last."""
    scored, function = [], _topk_cuda._score_blocks

    def count(queries, corpus, k, scales, blocks):
        scored.append(blocks.shape[1])
        return function(queries, corpus, k, scales, blocks)

    monkeypatch.setattr(_topk_cuda, "_score_blocks", count)
    assert_exact("normal", 1500, 16, 4, 1, torch.float16, "float")
    assert scored == [2]
    scored.clear()
    assert_exact("copies", 1500, 16, 4, 1, torch.float16, "int8")
    assert scored == [4, 2, 4, 8, 12]  # codes; rows as they are, ever more of them


def test_bounds_hold_and_are_close():
    """No score of a block is above its bound, and the best is not far below."""
    for dtype in DTYPES:
        for coarse, distance in (("float", 5e-3), ("int8", 0.1)):
            asked, corpus, scales = problem("normal", 700, 70, 17, dtype)
            parts = _topk_cuda.prepare(corpus, scales, coarse)
            bounds, offsets = _topk_cuda._bounds(asked, corpus, scales, parts, coarse)
            scores = asked.double() @ corpus.double().T * (1 if scales is None else scales.double())
            padded = torch.nn.functional.pad(scores, (0, 68), value=-torch.inf)
            best = padded.view(17, 6, 128).amax(2) - offsets[:, None]
            norms = asked.double().norm(dim=1)[:, None] * parts[0].double()
            assert (best <= bounds).all()
            assert (bounds - best <= distance * norms).all()


def test_numbers_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match="corpus: expected finite numbers"):
        _topk_cuda.prepare(torch.full((3, 2), torch.nan, device=DEVICE), None, "float")
