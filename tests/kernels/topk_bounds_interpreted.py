"""The search's bounds on a GPU: every way to make them, and that they hold. Run by `test_triton`, as the others are."""

from __future__ import annotations

import pytest
import torch
from searchr1_kernels import _topk_cuda, _topk_passes, reference
from searchr1_kernels._topk_bounds_triton import CONFIGURATIONS, DIGITS_CONFIGURATIONS, Candidate, candidates
from searchr1_kernels._topk_passes import Corpus, Passes
from searchr1_kernels._topk_walk_triton import DIGITS_WALKS, WALKS
from topk_interpreted import DEVICE, DTYPES, assert_exact, few_blocks, problem  # noqa: F401  # its fixture is for all


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coarse", ["float", "int8"])
def test_whole_tiles(dtype, coarse):
    """Sizes that need no mask."""
    assert_exact("normal", 1280, 128, 5, 2, dtype, coarse)


def bounds_of(asked, corpus, scales, parts, way=None):
    """-> bounds [Q,G] fp32 and offsets [Q]."""
    return Passes(Corpus(corpus, scales, parts), len(asked), 1).bounds(asked, way)


def best_scores(asked, corpus, scales):
    """-> the best score of each block [Q,G], fp64."""
    scores = asked.double() @ corpus.double().T * (1 if scales is None else scales.double())
    padded = torch.nn.functional.pad(scores, (0, -corpus.shape[0] % 128), value=-torch.inf)
    return padded.view(len(asked), -1, 128).amax(2)


WALKING = _topk_passes._device(torch.device(DEVICE)).walks


def every_way(queries, size, digits):
    """-> all ways shipped for tiles of this many queries with D = `size`, on this device."""
    return candidates(queries, size, digits, 1 << 20, WALKING and size % 16 == 0)


@pytest.mark.parametrize("queries", [*(size + more for size in CONFIGURATIONS for more in (0, 1)), 300])
def test_bounds_for_any_number_of_queries(queries):
    """Every shipped tile, full and with one query over; each query's bounds are those it gets alone."""
    asked, corpus, scales = problem("normal", 300, 48, queries, torch.float16)  # of 40, programs would walk
    parts = _topk_cuda.prepare(corpus, scales, "float")
    bounds, _ = bounds_of(asked, corpus, scales, parts)
    assert (best_scores(asked, corpus, scales) <= bounds).all()
    for q in (0, queries - 1):
        alone, _ = bounds_of(asked[q : q + 1], corpus, scales, parts)
        torch.testing.assert_close(bounds[q : q + 1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 200, 257, 650])
@pytest.mark.parametrize("coarse", ["float", "int8"])
def test_every_way_to_make_bounds(coarse, rows, monkeypatch):
    """All are bounds, as close as the plain kernel's."""
    # Also where a walking program's step ends past the rows, and for a width that is read number by number.
    size = 75 if rows == 650 else 80
    monkeypatch.setattr(_topk_passes, "MAX_CODED_QUERIES", 1 << 20)
    tables = (DIGITS_CONFIGURATIONS, DIGITS_WALKS) if coarse == "int8" else (CONFIGURATIONS, WALKS)
    for queries in sorted(set(tables[0]) | set(tables[1])):
        count = queries + 3 if rows == 200 and queries <= 32 else 5  # two tiles of them
        asked, corpus, scales = problem("normal", rows, size, count, torch.float16)
        if rows == 257:
            corpus -= 20 * asked[0].half()  # all scores of a query below zero, unlike what a descriptor fills in
        parts = _topk_cuda.prepare(corpus, scales, coarse)
        best = None
        for way in every_way(queries, size, coarse == "int8"):
            bounds, offsets = bounds_of(asked, corpus, scales, parts, way)
            best = best_scores(asked, corpus, scales) - offsets[:, None] if best is None else best
            assert (best <= bounds).all(), way.name
            plain, _ = bounds_of(asked, corpus, scales, parts)
            torch.testing.assert_close(bounds, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("coarse", ["float", "int8"])
def test_no_result_depends_on_the_way(coarse, monkeypatch):
    """Whichever way was found the fastest, for whatever reason; what was tried is reported, the fastest first."""
    monkeypatch.setattr(_topk_passes, "_FASTEST", {})
    asked, corpus, scales = problem("ties", 900, 32, 3, torch.float16)
    parts = _topk_cuda.prepare(corpus, scales, coarse)
    ways = every_way(16, 32, coarse == "int8")
    assert len(ways) > (2 if WALKING else 0)
    results = []
    for favourite in ways:
        seconds = iter([0.5 if way == favourite else 1.0 for way in ways])
        passes = Passes(Corpus(corpus, scales, parts), 3, 4)
        times = passes.tune(3, lambda run, seconds=seconds: (run(), next(seconds))[1])
        assert list(times) == [favourite.name, *(way.name for way in ways if way != favourite)]
        assert passes._ways(3) == [favourite] and passes._ways(4) == [favourite]
        results.append(_topk_cuda.search(asked, corpus, 4, scales, parts))
    want = reference.topk_inner_product(asked, corpus, 4)
    for result in results:
        assert all(torch.equal(one, other) for one, other in zip(result, want, strict=True))


def test_a_way_with_other_bounds_is_not_used(monkeypatch):
    """One that leaves out a block, for example, even if it is the fastest."""
    monkeypatch.setattr(_topk_passes, "_FASTEST", {})
    _, corpus, _ = problem("normal", 900, 32, 3, torch.float16)
    passes = Passes(Corpus(corpus, None, _topk_cuda.prepare(corpus, None, "float")), 3, 4)
    first, wrong, *_ = ways = [Candidate(0, 128, tile, 4, 2) for tile in (16, 32, 128)]
    monkeypatch.setattr(_topk_passes, "_candidates", lambda *kind: ways)

    def seconds(run):
        bounds, _ = run()
        if run.args[-1] == wrong:
            bounds[1, -1] = bounds[1, -1] - 1.0
        return 0.5 if run.args[-1] == wrong else 1.0

    with pytest.warns(UserWarning, match=f"{wrong.name} gives other bounds on {DEVICE}.*; it is not used"):
        times = passes.tune(3, seconds)
    assert list(times) == [first.name, ways[2].name] and passes._ways(3) == [first]


def test_only_rows_that_descriptors_can_name_are_walked():
    if not WALKING:
        pytest.skip("nothing walks on this GPU")

    def walking(rows, coarse="float"):
        passes = Passes(Corpus(rows, None, _topk_cuda.prepare(rows, None, coarse)), 4, 1)
        return any(way.programs for way in passes._ways(4))

    half = torch.zeros(9, 32, dtype=torch.float16, device=DEVICE)
    assert walking(half) and walking(half[:, :16].float()) and walking(half, "int8") and walking(half.char(), "int8")
    assert not walking(half[:, :7].contiguous()) and not walking(half[:, :24].contiguous(), "int8")  # 14, 24 bytes
    anywhere = half.view(-1)[1:]  # begins at no multiple of 16 bytes
    assert not walking(anywhere[:96].view(4, 24)) and walking(anywhere[:96].view(3, 32))  # the second in a copy
    assert walking(half.char().view(-1)[1:257].view(8, 32), "int8")  # whose codes are the copy
    assert not walking(half.char())  # its operand is floats


@pytest.mark.parametrize(
    ("coarse", "dtype"), [("float", torch.float16), ("float", torch.float32), ("int8", torch.float16)]
)
@pytest.mark.parametrize("kind", ["normal", "tiny", "zero", "large"])
def test_prepared_queries_are_the_queries_up_to_what_is_said(coarse, dtype, kind):
    """scale * operand and what it lacks: norms from fp64, no less than the truth and little more. Of fp32 a product may
    drop all but 10 bits."""
    asked, corpus, _ = problem("normal", 300, 300, 4, dtype)
    asked *= {"normal": 1.0, "tiny": 1e-34, "zero": 0.0, "large": 1e30}[kind]
    passes = Passes(Corpus(corpus, None, _topk_cuda.prepare(corpus, None, coarse)), 4, 1)
    _, offsets = passes.bounds(asked)
    if coarse == "int8":
        first, second = passes._operand[: 2 * asked.numel()].view(torch.int8).view(2, 4, 300).double()
        assert first.abs().max() <= 127 and second.abs().max() <= 64
        operand, rounding = 128 * first + second, 0.0
        torch.testing.assert_close(offsets, asked.double() @ passes.corpus.parts[1].double(), rtol=1e-12, atol=0.0)
    else:
        operand = passes._operand[: dtype.itemsize * asked.numel()].view(dtype).view(4, 300).double()
        assert operand.abs().max() <= 1 and not offsets.any()
        rounding = 300 * 2.0**-22 + (2.0**-9 + 2.0**-20 if dtype == torch.float32 else 0.0)
    norms = asked.double().norm(dim=1)
    lacking = (asked.double() - passes._scales.double()[:, None] * operand).norm(dim=1)
    lacking += rounding * (norms + lacking)
    for said, true in ((passes._norms, norms), (passes._residual_norms, lacking)):
        assert (true <= said.double()).all() and (said.double() <= true * (1 + 2e-6) + 1e-40).all()
    if kind in ("normal", "large"):
        assert (lacking <= ((1e-4 if coarse == "int8" else 5e-4) + rounding) * norms).all()


def test_bounds_hold_and_are_close():
    """No score of a block is above its bound, and the best is not far below."""
    # With codes of random rows it is some 0.01 of the norms: the rows' own residuals, as the queries have two digits.
    for dtype in DTYPES:
        for coarse, distance in (("float", 5e-3), ("int8", 0.03)):
            asked, corpus, scales = problem("normal", 700, 70, 4, dtype)
            parts = _topk_cuda.prepare(corpus, scales, coarse)
            bounds, offsets = bounds_of(asked, corpus, scales, parts)
            best = best_scores(asked, corpus, scales) - offsets[:, None]
            norms = asked.double().norm(dim=1)[:, None] * parts[0].double()
            assert (best <= bounds).all()
            assert (bounds - best <= distance * norms).all()


def test_bounds_of_what_codes_hold_exactly():
    """Nothing is missed, but the product of sums and scales is rounded."""
    _, corpus, scales = problem("normal", 700, 70, 1, torch.int8)
    asked = torch.randint(-127, 128, (4, 70), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    asked[:, 0] = 127
    bounds, _ = bounds_of(asked, corpus, scales, _topk_cuda.prepare(corpus, scales, "int8"))
    best = best_scores(asked, corpus, scales)
    assert (best <= bounds).all() and (bounds <= best + 1.5e-6 * best.abs()).all()
