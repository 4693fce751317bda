"""The search's Triton kernels and their host side. Run by `test_triton`, not collected by itself.

Without a GPU they run in Triton's interpreter, in a process of their own because importing Triton fixes that choice. On
a GPU (`pytest tests/kernels/topk_interpreted.py`) they are compiled. bf16 products are left to a GPU: the interpreter
multiplies bf16 bit patterns as integers and silently returns nonsense.
"""

from __future__ import annotations

import pytest
import torch
from far_memory import far_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import Hits, TopKIndex, _topk_cuda, _topk_passes, reference, topk_search
from searchr1_kernels._topk_passes import Corpus, Passes
from searchr1_kernels._topk_triton import PARTS, best_blocks, group_constants, group_maxima, maxima_tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.int8] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture(autouse=True, scope="module")
def few_blocks():
    """Score fewer blocks at once than a small corpus has, so that something is left to prove."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_topk_passes, "SLACK", {"float": 1, "int8": 3})
        patch.setattr(_topk_passes, "MAX_CODED_QUERIES", 4)
        patch.setattr(_topk_cuda, "_PLAIN_SLACK", 1)
        patch.setattr(_topk_cuda, "_QUERIES_AT_ONCE", 6)
        patch.setattr(_topk_cuda, "_KEY_BYTES", 8 << 10)
        patch.setattr(_topk_cuda, "_BOUND_BYTES", 200)  # 4 queries against 6 blocks, 3 against 8
        patch.setattr(_topk_cuda, "_ROWS_AT_ONCE", 500)
        yield


def problem(kind, rows, size, queries, dtype, seed=0):
    """-> queries [Q,D], corpus [M,D], scales [M] or None."""
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
        scales = 2 * torch.randn(rows, generator=generator).to(DEVICE)
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
@pytest.mark.parametrize("coarse", ["float", "int8"])
@pytest.mark.parametrize(("size", "sign"), [(2, 1), (7, -1)])
@pytest.mark.parametrize(("largest", "mean"), [(2e-44, 0), (1e37, 1000), (3e38, 1)])
def test_scores_that_rounding_makes_equal(largest, mean, size, sign, coarse):
    """Scores that underflow or are infinite: of equal ones the first rows win, however unequal before rounding."""
    asked, corpus, _ = problem("normal", 900, size, 3, torch.float32)
    asked, corpus = largest * (asked / asked.abs().max()), sign * (corpus.abs() + mean)
    have = _topk_cuda.search(asked, corpus, 3, None, _topk_cuda.prepare(corpus, None, coarse))
    for left, right in zip(have, reference.topk_inner_product(asked, corpus, 3), strict=True):
        assert torch.equal(left, right)


def test_offsets_beyond_32_bits(tmp_path):
    """Exact scores of the last rows of a corpus of over 2^31 numbers."""
    size, rows = 64, (1 << 25) + 200  # the last block has 72 rows
    corpus = far_memory(tmp_path, rows * size, DEVICE).view(rows, size)
    asked, corpus[-72:], _ = problem("normal", 72, size, 2, torch.float16)
    block = torch.full((2, 1), rows // 128, device=DEVICE)
    keys, maxima = (torch.zeros(2, n, dtype=torch.int64, device=DEVICE) for n in (128, PARTS))
    _topk_passes.score_places(asked, Corpus(corpus, None, [corpus.new_ones(1).float()]), block, keys, maxima, 1, 0, 1)
    best = (asked.double() @ corpus[-72:].double().T).argmax(1)
    assert torch.equal(0xFFFFFFFF - (keys.amax(1) & 0xFFFFFFFF), rows - 72 + best)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("coarse", ["float", "int8"])
def test_all_scores_below_zero(dtype, coarse):
    """Except for a query of zeros. An upper bound of a negative score is the one of smaller magnitude."""
    asked, corpus, _ = problem("normal", 700, 40, 3, dtype)
    asked, corpus = asked.abs(), -corpus.abs()
    asked[1] = 0
    have = _topk_cuda.search(asked, corpus, 2, None, _topk_cuda.prepare(corpus, None, coarse))
    for left, right in zip(have, reference.topk_inner_product(asked, corpus, 2), strict=True):
        assert torch.equal(left, right)
    assert not have[0][1].signbit().any()


def test_zeros_of_either_sign_are_equals():
    """Products too small for fp32 become zeros that keep their sign; then the lower number comes first."""
    asked, corpus = torch.zeros(1, 16, device=DEVICE), torch.zeros(300, 16, dtype=torch.float16, device=DEVICE)
    asked[0, 0], corpus[::2, 0] = -1e-45, 0.1
    scores, ids = _topk_cuda.search(asked, corpus, 3, None, _topk_cuda.prepare(corpus, None, "float"))
    assert ids.tolist() == [[0, 1, 2]] and scores.tolist() == [[0, 0, 0]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
@pytest.mark.parametrize("coarse", ["float", "int8"])
def test_a_search_with_places_for_all_that_may_be_better_is_proven(monkeypatch, coarse):
    """Nothing is left to the host, which would correct any choice of blocks, at a cost in time that nobody sees; and
    blocks that cannot be better are not scored."""
    monkeypatch.setattr(_topk_passes, "SLACK", {"float": 8, "int8": 8})
    asked, corpus, _ = problem("copies", 900, 24, 4, torch.float16)
    passes = Passes(Corpus(corpus, None, _topk_cuda.prepare(corpus, None, coarse)), 4, 2)
    hits = Hits.views(torch.zeros(Hits.nbytes(4, 2), dtype=torch.uint8, device=DEVICE), 4, 2)
    passes.launch(asked, 2, hits)
    assert not hits.unproven.any()
    assert (passes._blocks == -1).any()  # the last block has no copy of every row
    want = reference.topk_inner_product(asked, corpus, 2)
    assert torch.equal(hits.scores, want[0]) and torch.equal(hits.ids, want[1])


@pytest.mark.parametrize("coarse", ["float", "int8"])
def test_scratch_holds_nothing_between_searches(coarse):
    """Others may use it meanwhile: every byte of it is written before it is read."""
    asked, corpus, _ = problem("ties", 900, 32, 3, torch.float16)
    passes = Passes(Corpus(corpus, None, _topk_cuda.prepare(corpus, None, coarse)), 4, 4)
    want = reference.topk_inner_product(asked, corpus, 4)
    for byte in (0xFF, 0x7F):
        for tensor in passes.scratch:
            whole = torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(tensor.untyped_storage())
            whole.fill_(byte)
        ids, scores = torch.empty(3, 4, dtype=torch.int64), torch.empty(3, 4)
        hits = Hits(*(tensor.to(DEVICE) for tensor in (ids, scores, torch.empty(3, dtype=torch.int32))))
        passes.launch(asked, 4, hits)
        _topk_cuda.settle(passes, asked, hits, hits.unproven.nonzero().squeeze(1))
        assert all(torch.equal(one, other) for one, other in zip((hits.scores, hits.ids), want, strict=True))


def test_what_is_left_is_settled(monkeypatch):
    """Copies lie in more blocks than there are places, so the first answer cannot be the last."""
    scored, function = [], _topk_cuda._best_of_blocks

    def count(queries, corpus, k, blocks):
        scored.append((len(queries), int((blocks >= 0).sum())))
        return function(queries, corpus, k, blocks)

    def settled(kind, coarse):
        scored.clear()
        asked, corpus, _ = problem(kind, 700, 16, 4, torch.float16)
        parts = _topk_cuda.prepare(corpus, None, coarse)
        *have, settled = _topk_cuda._search(asked, Corpus(corpus, None, parts), 1)
        want = reference.topk_inner_product(asked, corpus, 1)
        assert all(torch.equal(one, other) for one, other in zip(have, want, strict=True))
        return settled

    monkeypatch.setattr(_topk_cuda, "_best_of_blocks", count)
    monkeypatch.setattr(_topk_cuda, "_QUERIES_AT_ONCE", 3)
    assert settled("normal", "float") == (0, 0, 0) and scored == []
    assert settled("copies", "float") == (4, 0, 24) and scored == [(3, 18), (1, 6)]  # all of 6 blocks
    monkeypatch.setattr(_topk_cuda, "_WORTH", 3.3)  # 18 blocks are 3.29 times the rows
    assert settled("copies", "int8") == (4, 0, 24) and scored == [(3, 18), (1, 6)]
    monkeypatch.setattr(_topk_cuda, "_WORTH", 3.2)  # the rows themselves tell no more of copies
    assert settled("copies", "int8") == (4, 3, 24) and scored == [(3, 18), (1, 6)]


@pytest.mark.parametrize("launched", [True, False])
def test_scores_that_differ_by_less_than_their_rounding(launched, monkeypatch):
    """Rows that are almost equal: a block whose bound is just below a score may have a row whose score is rounded up to
    it, and which has a lower number."""
    if not launched:
        monkeypatch.setattr(Passes, "can_launch", lambda self, k: False)
    for spread in (3e-8, 1e-7):
        asked, corpus, _ = problem("normal", 900, 16, 3, torch.float32)
        asked, corpus = asked.abs(), corpus[:1].abs() * (1 + spread * corpus)
        have = _topk_cuda.search(asked, corpus, 1, None, _topk_cuda.prepare(corpus, None, "int8"))
        for left, right in zip(have, reference.topk_inner_product(asked, corpus, 1), strict=True):
            assert torch.equal(left, right)


def test_codes_of_close_rows_give_way_to_the_rows():
    """Rows too close for codes to tell apart are told apart as floats, in as many blocks as there are hits."""
    asked, corpus, _ = problem("large component", 700, 16, 4, torch.float16)
    parts = _topk_cuda.prepare(corpus, None, "int8")
    *have, settled = _topk_cuda._search(asked, Corpus(corpus, None, parts), 1)
    want = reference.topk_inner_product(asked, corpus, 1)
    assert all(torch.equal(one, other) for one, other in zip(have, want, strict=True))
    assert settled.num_queries == settled.num_rescanned == 4


@pytest.mark.parametrize(("k", "dtype"), [(1, torch.float16), (12, torch.int8)])
def test_more_hits_than_a_warp_takes(k, dtype, monkeypatch):
    """The plain way, which is also the twin, gives the same bits."""
    asked, corpus, scales = problem("ties", 1500, 16, 5, dtype)
    parts = _topk_cuda.prepare(corpus, scales, "int8")
    fast = _topk_cuda.search(asked, corpus, k, scales, parts)
    monkeypatch.setattr(Passes, "can_launch", lambda self, k: False)
    monkeypatch.delattr(Passes, "launch")
    for one, other in zip(fast, _topk_cuda.search(asked, corpus, k, scales, parts), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_blocks", [1, 31, 32, 40, 600])
def test_blocks_are_taken_in_order(num_blocks):
    """By bound, then by number, as sorting would have them; also if bounds are below zero, infinite or equal."""
    generator = torch.Generator().manual_seed(num_blocks)
    bounds = torch.randn(3, num_blocks, generator=generator)
    bounds[0] -= 10
    bounds[1] = bounds[1].round() + 0.0  # without -0, which comes after 0 here
    bounds[2, ::3] = torch.inf
    bounds = bounds.to(DEVICE)
    constants = group_constants(num_blocks)
    num_groups, tile = -(-num_blocks // constants["GROUP"]), maxima_tile(constants["GROUP"])
    maxima = torch.empty(3, num_groups, dtype=torch.int64, device=DEVICE)
    group_maxima[(3, -(-num_groups // tile))](
        bounds, maxima, num_blocks, num_groups, GROUP=constants["GROUP"], TILE=tile
    )
    places = min(num_blocks, 12)
    offsets, scores = torch.zeros(3, dtype=torch.float64, device=DEVICE), bounds.amin(1, keepdim=True)
    blocks, rest = torch.empty(3, places, dtype=torch.int64, device=DEVICE), torch.empty(3, device=DEVICE)
    for begin, end in ((0, places // 2), (places // 2, places)):  # the second goes on where the first ended
        best_blocks[(3,)](
            bounds, maxima, offsets, scores, blocks, rest, num_blocks, num_groups, places, begin, end, 1,
            THRESHOLD=begin > 0, num_warps=1, **constants,
        )  # fmt: skip
    values, order = bounds.sort(dim=1, descending=True, stable=True)
    assert torch.equal(blocks, order[:, :places])
    assert torch.equal(rest, values[:, places] if num_blocks > places else torch.full_like(rest, -torch.inf))


def test_blocks_below_the_threshold_have_no_place():
    bounds = torch.arange(40.0).repeat(2, 1).to(DEVICE)
    maxima = torch.empty(2, 2, dtype=torch.int64, device=DEVICE)
    group_maxima[(2, 1)](bounds, maxima, 40, 2, GROUP=32, TILE=2)
    offsets = torch.tensor([0.0, 1.0], dtype=torch.float64, device=DEVICE)
    scores = torch.full((2, 1), 37.0, device=DEVICE)
    blocks, rest = torch.empty(2, 5, dtype=torch.int64, device=DEVICE), torch.empty(2, device=DEVICE)
    best_blocks[(2,)](bounds, maxima, offsets, scores, blocks, rest, 40, 2, 5, 1, 5, 1,
                      GROUP=32, GROUPS=32, THRESHOLD=True, num_warps=1)  # fmt: skip
    assert blocks[:, 1:].tolist() == [[39, 38, 37, -1], [39, 38, 37, 36]]
    assert rest.tolist() == [36.0, 35.0]


@pytest.mark.parametrize("coarse", ["float", "int8"])
def test_a_search_in_memory_that_stays(coarse):
    """Launch for one number of queries and then another; what is unproven is settled for the queries asked about."""
    asked, corpus, _ = problem("copies", 900, 16, 4, torch.float16)
    asked[2] = 0  # as in a bucket with a row to spare
    index = object.__new__(TopKIndex)  # whose own checks keep rows as floats for a GPU
    index.corpus, index.scales, index.parts = corpus, None, _topk_cuda.prepare(corpus, None, coarse)
    search = topk_search._DeviceSearch(index, 4, 3)
    assert search.can_launch(4, 3) and not search.can_launch(5, 3) and not search.can_launch(4, 4)
    for num_queries, k, num_asked in ((4, 3, 4), (3, 1, 2), (4, 1, 3)):
        search.queries[:num_queries] = asked[:num_queries]
        hits = search.launch(num_queries, k)
        assert hits.unproven.all()
        settled = search.settle(num_queries, k, num_asked)
        assert settled.num_queries == num_asked
        want = reference.topk_inner_product(asked[:num_asked], corpus, k)
        assert torch.equal(hits.scores[:num_asked], want[0]) and torch.equal(hits.ids[:num_asked], want[1])
        packed = Hits.views(search.packed_hits(num_queries, k).clone(), num_queries, k)
        assert all(torch.equal(one, other) for one, other in zip(packed, hits, strict=True))
