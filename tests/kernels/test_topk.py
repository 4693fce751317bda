"""topk_inner_product against sorting all scores in fp64: ids, order, and scores that depend on query and row alone."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import Hits, TopKIndex, _topk_cpu, open_search, reference, topk_inner_product

KINDS = ("normal", "ties", "copies", "zero", "close", "one direction", "one large component", "all sizes", "tiny")


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Use several tiles and chunks of queries at test sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_topk_cpu, "_TILE_ELEMENTS", 1 << 11)
        patch.setattr(_topk_cpu, "_QUERIES_AT_ONCE", 16)
        yield


def problem(kind, rows=2000, size=24, queries=20, dtype=torch.float32, seed=0):
    """-> queries [Q,D], corpus [M,D] of a kind that some shortcut could get wrong."""
    generator = torch.Generator().manual_seed(seed)
    corpus = torch.randn(rows, size, generator=generator)
    asked = torch.randn(queries, size, generator=generator)
    if kind == "ties":
        corpus, asked = corpus.round(), asked.round()
    elif kind == "copies":
        corpus = corpus[torch.randint(max(1, rows // 9), (rows,), generator=generator)]
    elif kind == "zero":
        corpus *= torch.rand(rows, 1, generator=generator) < 0.1
        asked[::3] = 0
    elif kind == "close":  # too close for 8 bits
        corpus = corpus[:1] + 1e-3 * corpus
    elif kind == "one direction":
        corpus += 10
    elif kind == "one large component":
        corpus[:, 0] *= 1000
        asked[:, 0] = 0
    elif kind == "all sizes":
        corpus *= torch.exp(4 * torch.randn(rows, 1, generator=generator))
    elif kind == "tiny":
        corpus *= 1e-25
    if dtype == torch.int8:
        return asked, (corpus / corpus.abs().amax().clamp(min=1e-30) * 127).round().to(dtype)
    return asked, corpus.clamp(-6e4, 6e4).to(dtype)


def assert_equal(have, want):
    """Require the same bits: fp64 sums in any order round to the same fp32."""
    for left, right in zip(have, want, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 3000),
    size=st.integers(1, 70),
    queries=st.integers(0, 40),
    k=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8]),
    of_queries=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    prepared=st.booleans(),
    seed=st.integers(0, 100),
)
def test_matches_the_oracle(kind, rows, size, queries, k, dtype, of_queries, prepared, seed):
    asked, corpus = problem(kind, rows, size, queries, dtype, seed)
    asked = asked.to(of_queries)
    have = topk_inner_product(asked, TopKIndex(corpus) if prepared else corpus, min(k, rows))
    assert_equal(have, reference.topk_inner_product(asked, corpus, min(k, rows)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prepared", [False, True])
def test_every_kind_of_numbers(kind, prepared):
    asked, corpus = problem(kind, rows=4000, size=64)
    have = topk_inner_product(asked, TopKIndex(corpus) if prepared else corpus, 10)
    assert_equal(have, reference.topk_inner_product(asked, corpus, 10))


def test_by_hand():
    corpus = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [-1.0, 1.0]])
    scores, ids = topk_inner_product(torch.tensor([[1.0, 0.0], [-1.0, -1.0]]), corpus, 3)
    assert ids.tolist() == [[0, 2, 1], [3, 0, 2]]
    assert scores.tolist() == [[1.0, 1.0, 0.0], [0.0, -1.0, -1.0]]
    assert not scores.signbit()[:, :1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_one_component(dtype):
    """The one size at which torch's integer product depends on the strides of a dimension of length 1."""
    asked, corpus = problem("normal", rows=113, size=1, dtype=dtype)
    assert_equal(topk_inner_product(asked, corpus, 3), reference.topk_inner_product(asked, corpus, 3))


@pytest.mark.parametrize("scales", [(0.5, 2.0), (-1.0, 1.0), (0.0, 0.0)])
def test_rows_of_8_bits_with_scales(scales):
    asked, corpus = problem("normal", dtype=torch.int8)
    scales = torch.empty(len(corpus)).uniform_(*scales, generator=torch.Generator().manual_seed(0))
    want = reference.topk_inner_product(asked, corpus, 10, scales=scales)
    assert_equal(topk_inner_product(asked, corpus, 10, scales=scales.requires_grad_()), want)
    assert_equal(topk_inner_product(asked, TopKIndex(corpus, scales=scales), 10), want)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize(("largest", "mean"), [(2e-44, 0), (1e37, 1000), (3e38, 1)])
def test_scores_that_rounding_makes_equal(largest, mean, size, sign):
    """Scores that underflow or are infinite: of equal ones the first rows win, however unequal before rounding."""
    asked, corpus = problem("normal", rows=700, size=size)
    asked, corpus = largest * (asked / asked.abs().max()), sign * (corpus.abs() + mean)
    want = reference.topk_inner_product(asked, corpus, 3)
    for prepared in (corpus, TopKIndex(corpus)):
        assert_equal(topk_inner_product(asked, prepared, 3), want)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_all_scores_below_zero(dtype, prepared):
    """An upper bound of a negative score is the one of smaller magnitude."""
    asked, corpus = problem("normal", dtype=dtype)
    corpus = -corpus.abs()
    have = topk_inner_product(asked.abs(), TopKIndex(corpus) if prepared else corpus, 10)
    assert_equal(have, reference.topk_inner_product(asked.abs(), corpus, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_at_the_ends_of_fp32(dtype):
    """All of one sign, but one of the other: around their mean none is finite."""
    corpus = torch.full((300, 3), torch.finfo(dtype).max, dtype=dtype)
    corpus[7] *= -1
    asked = torch.eye(3) * 0.5
    want = reference.topk_inner_product(asked, corpus, 300)
    assert_equal(topk_inner_product(asked, corpus, 300), want)
    assert_equal(topk_inner_product(asked, TopKIndex(corpus), 300), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_torch_may_have_other_defaults(dtype):
    """A model is built under the default type of its weights, or under `torch.set_default_device`."""
    asked, corpus = problem("normal", dtype=dtype)
    want = topk_inner_product(asked, corpus, 10)
    _topk_cpu.integer_products_are_exact.cache_clear()
    _topk_cpu._meanings.cache_clear()
    default = torch.get_default_dtype()
    try:
        for other in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(other)
            with torch.device("meta"):
                assert_equal(topk_inner_product(asked, TopKIndex(corpus), 10), want)
                assert_equal(topk_inner_product(asked, corpus, 10), want)
    finally:
        torch.set_default_dtype(default)


def test_a_query_alone_equals_the_query_in_a_batch():
    asked, corpus = problem("close", queries=30)
    index = TopKIndex(corpus)
    scores, ids = topk_inner_product(asked, index, 7)
    for q in range(30):
        assert_equal(topk_inner_product(asked[q : q + 1], index, 7), (scores[q : q + 1], ids[q : q + 1]))


def test_a_score_does_not_depend_on_where_its_row_stands():
    asked, corpus = problem("normal")
    scores, ids = topk_inner_product(asked, corpus, 10)
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(0))
    moved_scores, moved_ids = topk_inner_product(asked, corpus[order], 10)
    assert_equal((moved_scores, order[moved_ids]), (scores, ids))


@pytest.mark.parametrize("kind", ["normal", "ties", "copies"])
@pytest.mark.parametrize("cuts", [[700], [1, 20, 999, 1990]])
def test_merged_parts_equal_the_whole(kind, cuts):
    asked, corpus = problem(kind)
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, len(corpus)], strict=True):
        scores, ids = topk_inner_product(asked, corpus[begin:end], min(10, end - begin))
        parts.append((scores, ids + begin))
    scores, ids = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    order = ids.argsort(dim=1, stable=True)  # by id, then stably by score
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :10]
    assert_equal((scores.gather(1, order), ids.gather(1, order)), topk_inner_product(asked, corpus, 10))


def counting(patch, name):
    """Count the calls of a function of `_topk_cpu`."""
    calls, function = [], getattr(_topk_cpu, name)
    patch.setattr(_topk_cpu, name, lambda *arguments: calls.append(0) or function(*arguments))
    return calls


@pytest.mark.parametrize(("kind", "falls_back"), [("normal", False), ("one large component", True)])
def test_codes_give_way_where_they_are_too_coarse(monkeypatch, kind, falls_back):
    calls = counting(monkeypatch, "_coarse_fp64")
    asked, corpus = problem(kind, rows=6000, size=128)
    assert_equal(topk_inner_product(asked, corpus, 5), reference.topk_inner_product(asked, corpus, 5))
    assert bool(calls) == falls_back


def test_codes_are_not_used_where_their_products_saturate(monkeypatch):
    calls = counting(monkeypatch, "_coarse_int8")
    monkeypatch.setattr(_topk_cpu, "integer_products_are_exact", lambda: False)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        asked, corpus = problem("normal", dtype=dtype)
        assert_equal(topk_inner_product(asked, corpus, 5), reference.topk_inner_product(asked, corpus, 5))
    corpus = torch.zeros(3000, 3)
    corpus[2500, 1] = torch.nan
    with pytest.raises(ValueError, match="corpus: expected finite numbers, row 2500 has others"):
        topk_inner_product(torch.zeros(1, 3), corpus, 1)
    assert not calls


@pytest.fixture
def no_denormals():
    """Flush denormals, as a trainer may whose attention produces many."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def test_bounds_of_tiny_codes_hold_without_denormals(no_denormals):
    corpus = torch.randn(300, 50, generator=torch.Generator().manual_seed(3)) * 1e-37
    center, codes, scales, residuals, _ = TopKIndex(corpus).parts
    coded = scales.double()[:, None] * codes.double()
    assert ((corpus.double() - center.double() - coded).norm(dim=1) <= residuals.double()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_of_codes_hold(kind):
    """Residuals and magnitudes of codes are no less than the norms they bound, and little more."""
    _, corpus = problem(kind, size=50)
    center, codes, scales, residuals, magnitudes = TopKIndex(corpus).parts
    coded = scales.double()[:, None] * codes.double()
    for norm, bound in (
        ((corpus.double() - center.double() - coded).norm(dim=1), residuals),
        (coded.norm(dim=1), magnitudes),
    ):
        assert (norm <= bound.double()).all()
        assert (bound.double() <= 1.001 * norm + 1e-6 * magnitudes.double() + 2e-33).all()


def test_threads_share_the_queries(monkeypatch):
    """The hits are the same; torch's own threads take only the first part of the work."""
    asked, corpus = problem("normal")
    want = topk_inner_product(asked, corpus, 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert_equal(topk_inner_product(asked, corpus, 10), want)


def test_an_index_knows_its_size():
    corpus = torch.zeros(100, 8)
    index = TopKIndex(corpus)
    assert len(index) == 100
    assert index.nbytes == 100 * 8 * 4 + 100 * 8 + 3 * 100 * 4 + 8 * 4
    assert TopKIndex(corpus.to(torch.int8)).nbytes == 100 * 8 + 3 * 100 * 4 + 8 * 4


def test_queries_may_be_any_view():
    asked, corpus = problem("normal", size=24)
    wide = torch.stack([asked, asked], dim=2)
    assert_equal(topk_inner_product(wide[:, :, 0], corpus, 3), topk_inner_product(asked, corpus, 3))


def test_a_search_in_memory_that_stays():
    """The twin of a search on a GPU: as `topk_inner_product`, with nothing to settle and nothing to tune."""
    asked, corpus = problem("ties", rows=500)
    search = open_search(TopKIndex(corpus), max_queries=20, max_k=9)
    for num_queries, k in ((20, 9), (3, 1), (20, 4), (0, 2)):
        search.queries[:num_queries] = asked[:num_queries]
        want = reference.topk_inner_product(asked[:num_queries], corpus, k)
        hits = search.launch(num_queries, k)
        assert_equal((hits.scores, hits.ids), want)
        assert not hits.unproven.any() and search.settle(num_queries, k) == (0, 0, 0)
        packed = Hits.views(search.packed_hits(num_queries, k).clone(), num_queries, k)
        assert_equal(packed, hits)
    assert search.tune(16) == {}
    assert not search.can_launch(21, 9) and not search.can_launch(20, 10) and not search.can_launch(1, 0)
    with pytest.raises(ValueError, match="no room for 21 queries and 9 hits"):
        search.launch(21, 9)
    for max_queries, max_k, message in (
        (0, 1, "max_queries: expected at least 1, got 0"),
        (1, 0, "max_k: expected from 1 to 500, the rows of its index, got 0"),
        (1, 501, "max_k: expected from 1 to 500, the rows of its index, got 501"),
    ):
        with pytest.raises(ValueError, match=message):
            open_search(search.index, max_queries, max_k)


def test_hits_lie_in_one_piece():
    memory = torch.zeros(Hits.nbytes(3, 5), dtype=torch.uint8)
    hits = Hits.views(memory, 3, 5)
    hits.ids[:], hits.scores[:], hits.unproven[:] = 1 << 40, 2.0, 1
    assert (hits.ids == 1 << 40).all() and (hits.scores == 2).all() and (hits.unproven == 1).all()
    assert all(tensor.data_ptr() % 16 == memory.data_ptr() % 16 for tensor in hits)


QUERIES, CORPUS = torch.zeros(2, 3), torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(2, 4)}, r"queries: expected shape \[Q, 3\], got \[2, 4\]"),
        ({"queries": torch.zeros(2, 3, dtype=torch.float64)}, "queries: expected torch.float32 or"),
        ({"queries": torch.full((2, 3), torch.inf)}, "queries: expected finite numbers"),
        ({"corpus": torch.zeros(5)}, r"corpus: expected shape \[M, D\]"),
        ({"corpus": torch.zeros(5, 3, dtype=torch.int64)}, "corpus: expected torch.float32 or"),
        ({"corpus": torch.zeros(3, 5).t()}, "corpus: expected a contiguous tensor"),
        ({"corpus": torch.zeros(5, 0), "queries": torch.zeros(2, 0)}, "corpus: expected at least one component"),
        ({"corpus": torch.tensor([[0.0] * 3, [torch.nan] * 3])}, "corpus: expected finite numbers, row 1 has others"),
        ({"queries": torch.zeros(2, 3, device="meta")}, r"queries: expected the device of corpus \(cpu\), got meta"),
        ({"queries": QUERIES.numpy()}, "queries: expected a tensor, got ndarray"),
        ({"k": 0}, "k: expected from 1 to 5, the rows of corpus, got 0"),
        ({"k": 6}, "k: expected from 1 to 5"),
        ({"scales": torch.ones(5)}, "scales: they are for an int8 corpus"),
        ({"scales": torch.ones(4), "corpus": CORPUS.to(torch.int8)}, r"scales: expected shape \[5\]"),
        ({"scales": torch.ones(5).double(), "corpus": CORPUS.to(torch.int8)}, "scales: expected torch.float32"),
        ({"scales": torch.full((5,), torch.nan), "corpus": CORPUS.to(torch.int8)}, "scales: expected finite numbers"),
        ({"corpus": TopKIndex(CORPUS), "scales": torch.ones(5)}, "scales: give them to TopKIndex"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"queries": QUERIES, "corpus": CORPUS, "k": 1}
    with pytest.raises(ValueError, match=message):
        topk_inner_product(**(arguments | change))


def test_wrong_ways_to_prepare_are_named():
    with pytest.raises(ValueError, match="coarse: expected 'int8' or 'float', got 'fp8'"):
        TopKIndex(CORPUS, coarse="fp8")
    with pytest.raises(ValueError, match="coarse: 'float' is for a corpus on a GPU"):
        TopKIndex(CORPUS, coarse="float")
    with pytest.raises(ValueError, match="corpus: expected finite numbers, row 4 has others"):
        TopKIndex(torch.cat([CORPUS[:4], torch.full((1, 3), torch.inf)]))


def test_a_gpu_without_triton_is_an_error_that_says_so(monkeypatch):
    """There is nothing slower to fall back on."""
    topk = sys.modules["searchr1_kernels.topk"]
    monkeypatch.setattr(topk, "triton_is_installed", lambda: False)
    with pytest.raises(ValueError, match="corpus: expected a tensor on the CPU, got one on cuda:0.*pip install triton"):
        topk._implementation(torch.device("cuda", 0))
    with pytest.raises(ValueError, match="corpus: expected a tensor on the CPU or on a CUDA device, got one on meta"):
        TopKIndex(CORPUS.to("meta"))


def test_an_index_says_what_will_multiply(monkeypatch):
    """A processor whose 8-bit products saturate is warned of once, and its indexes say that they search in fp64."""
    assert TopKIndex(CORPUS).coarse == ("int8" if _topk_cpu.integer_products_are_exact() else "fp64")
    _topk_cpu.integer_products_are_exact.cache_clear()
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: product(left, right).clamp(-(1 << 20), 1 << 20))
    with pytest.warns(UserWarning, match="8-bit products saturate, so exact search multiplies in fp64"):
        assert TopKIndex(CORPUS).coarse == "fp64"
    asked, corpus = problem("normal")
    assert_equal(topk_inner_product(asked, corpus, 5), reference.topk_inner_product(asked, corpus, 5))
    _topk_cpu.integer_products_are_exact.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["normal", "copies", "one direction"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_a_gpu_and_a_cpu_agree(kind, dtype):
    asked, corpus = problem(kind, rows=100_000, size=768, queries=200, dtype=dtype)
    want = topk_inner_product(asked, corpus, 10)
    for coarse in ("float", "int8"):
        index = TopKIndex(corpus.cuda(), coarse=coarse)
        for queries in (1, 50, 200):
            have = topk_inner_product(asked[:queries].cuda(), index, 10)
            assert_equal([tensor.cpu() for tensor in have], [tensor[:queries] for tensor in want])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("coarse", ["float", "int8"])
def test_an_index_on_a_gpu_copies_rows_that_begin_anywhere_once(coarse):
    asked, corpus = problem("normal", size=64, dtype=torch.float16)
    memory = corpus.new_empty(corpus.numel() + 1, device="cuda")
    anywhere = memory[1:].view(corpus.shape).copy_(corpus)
    index = TopKIndex(anywhere, coarse=coarse)
    assert index.corpus.data_ptr() % 16 == 0
    assert open_search(index, 4, 3)._passes.corpus.rows is index.corpus
    want = topk_inner_product(asked, corpus, 3)
    assert_equal([x.cpu() for x in topk_inner_product(asked.cuda(), index, 3)], want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("coarse", ["float", "int8"])
def test_every_way_on_a_gpu_has_the_same_bits(coarse, monkeypatch):
    """Every way of reading the corpus, for each tile; and a recorded search."""
    from searchr1_kernels import _topk_passes

    monkeypatch.setattr(_topk_passes, "_FASTEST", {})
    asked, corpus = problem("one direction", rows=300_000, size=768, queries=300, dtype=torch.float16)
    want = topk_inner_product(asked, corpus, 10)
    search = open_search(TopKIndex(corpus.cuda(), coarse=coarse), 300, 10)
    search.queries[:] = asked.cuda()
    for queries in (16, 32, 64, 128, 256, 300):
        kind = search._passes._kind(queries)
        for way in _topk_passes._candidates(*kind):
            _topk_passes._FASTEST[kind] = way
            hits = search.launch(queries, 10)
            search.settle(queries, 10)
            have = [tensor.cpu() for tensor in (hits.scores, hits.ids)]
            assert_equal(have, [tensor[:queries] for tensor in want])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hits = search.launch(queries, 10)
        hits.ids.zero_()
        graph.replay()
        search.settle(queries, 10)
        assert_equal([tensor.cpu() for tensor in (hits.scores, hits.ids)], [tensor[:queries] for tensor in want])
        assert len(search.tune(queries)) >= 1
