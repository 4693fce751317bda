"""Recorded decode steps against the ordinary path; on a CPU a recording is its plain twin, over the same memory."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from trajectories import check_same

from searchr1_fast.models import KVCache
from searchr1_fast.rollout import Engine, PlainEngine, SamplingParams, SearchLoop, decode_graph
from searchr1_fast.rollout.decode_graph import CudaDecodeGraphs, DecodeGraphs, bucket_size
from searchr1_fast.rollout.sampling import head_logits, sample
from searchr1_fast.rollout.transfers import Transfers, pack

GREEDY, NUCLEUS = SamplingParams(temperature=0.0), SamplingParams(0.8, top_p=0.9, top_k=20)
SAMPLINGS = [GREEDY, SamplingParams(), NUCLEUS]
CPU = torch.device("cpu")
HAS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


class WatchedGraphs(DecodeGraphs):
    """Counts the replays by size: (sequences, rows)."""

    sizes: Counter

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sizes = Counter()

    def decode(self, token_ids, *arguments):
        self.sizes[len(token_ids), bucket_size(len(token_ids), self._max_rows)] += 1
        return super().decode(token_ids, *arguments)


def test_rows_of_a_graph():
    sizes = {n: bucket_size(n, 60) for n in range(1, 61)}
    assert sorted(set(sizes.values())) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 60]
    assert all(n <= size < n + max(8, n) for n, size in sizes.items())
    assert bucket_size(4, 5) == 4 < bucket_size(5, 5) == 5


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("engine_class", [Engine, PlainEngine])
def test_trajectories_are_those_of_the_ordinary_path(
    make_model, tokenizer, config, make_requests, fake_search, sampling, engine_class
):
    rows = Counter()
    for seed, max_num_seqs in ((3, 5), (4, 64)):  # 5: slots change hands, and the last graph has an odd size
        changed = config.model_copy(update={"max_num_seqs": max_num_seqs})
        model, requests = make_model(seed), make_requests(19, group_size=4, seed=seed)
        ordinary = SearchLoop(engine_class(model, tokenizer, changed, sampling), fake_search)
        engine = engine_class(model, tokenizer, changed, sampling, decode_graphs=WatchedGraphs)
        replayed = SearchLoop(engine, fake_search)
        check_same(ordinary.run(requests), replayed.run(requests))
        ours, theirs = replayed.statistics, ordinary.statistics
        assert theirs.num_replayed_steps == theirs.num_recordings == 0
        for name in ("num_steps", "num_decode_tokens", "num_prefill_tokens", "num_shared_tokens", "num_searches"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.num_searches > 0
        assert engine_class is PlainEngine or ours.num_shared_tokens > 0
        sizes = engine._graphs.sizes
        assert 0 < sizes.total() == ours.num_replayed_steps < ours.num_steps
        assert ours.num_recordings == len({size for _, size in sizes})
        assert ours.time_recording < ours.time_forward
        rows += sizes
    assert any(size > num_sequences for num_sequences, size in rows)
    assert any(size == num_sequences for num_sequences, size in rows)


def test_what_is_sampled_does_not_depend_on_the_rows(make_model, tokenizer, config, make_requests, fake_search):
    model, requests = make_model(4), make_requests(12)
    runs = []
    for max_num_seqs in (1, 3, 12):
        changed = config.model_copy(update={"overlap": True, "max_num_seqs": max_num_seqs})
        engine = Engine(model, tokenizer, changed, decode_graphs=WatchedGraphs)
        runs.append(SearchLoop(engine, fake_search).run(requests))
        assert engine._graphs.sizes
    check_same(runs[0], runs[1])
    check_same(runs[0], runs[2])


def test_rows_without_a_sequence_write_nowhere_else(make_model, tokenizer, config, make_requests, fake_search):
    engine = Engine(make_model(4), tokenizer, config, decode_graphs=WatchedGraphs)
    SearchLoop(engine, fake_search).run(make_requests(9))
    cache = engine._cache
    assert cache.num_blocks == engine._slots.blocks.num_free + 1
    assert cache.num_slots == config.max_num_seqs + 1 == len(engine._slots) + 1
    for memory in (*cache.keys, *cache.values):
        assert memory[-1, :, 0].any()
        assert not memory[-1, :, 1:].any()


def test_graphs_live_as_long_as_their_cache(make_model, tokenizer, config, make_requests, fake_search):
    model = make_model(4)
    expected = SearchLoop(Engine(model, tokenizer, config), fake_search).run(make_requests(7))
    for keep_cache in (False, True):
        changed = config.model_copy(update={"keep_cache": keep_cache})
        loop = SearchLoop(Engine(model, tokenizer, changed, decode_graphs=DecodeGraphs), fake_search)
        loop.run(make_requests(2))
        small = loop.engine._graphs
        check_same(expected, loop.run(make_requests(7)))  # needs more slots
        graphs, cache = loop.engine._graphs, loop.engine._cache
        assert graphs is not small
        loop.engine.free_cache()
        assert (loop.engine._graphs is graphs) == (loop.engine._cache is cache) == keep_cache
        assert keep_cache or loop.engine._graphs is loop.engine._cache is None
        check_same(expected, loop.run(make_requests(7)))
        assert (loop.statistics.num_recordings == 0) == keep_cache
        assert loop.statistics.num_replayed_steps > 0


def test_every_sampling_has_its_own_graphs(make_model, tokenizer, config, make_requests, fake_search):
    model, requests = make_model(4), make_requests(6)
    loop = SearchLoop(Engine(model, tokenizer, config, decode_graphs=DecodeGraphs), fake_search)
    for sampling, records in ((GREEDY, True), (NUCLEUS, True), (GREEDY, False)):  # as an evaluation changes it
        loop.engine.sampling = sampling
        check_same(
            SearchLoop(Engine(model, tokenizer, config, sampling), fake_search).run(requests), loop.run(requests)
        )
        assert (loop.statistics.num_recordings > 0) == records


def test_new_weights_are_seen(make_model, tokenizer, config, make_requests, fake_search):
    model, requests = make_model(4), make_requests(6)
    loop = SearchLoop(Engine(model, tokenizer, config, decode_graphs=DecodeGraphs), fake_search)
    loop.run(requests)
    other = make_model(5)
    with torch.no_grad():  # in place, as `sync_replica` and the optimizer write them
        for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
            parameter.copy_(new)
    expected = SearchLoop(Engine(other, tokenizer, config), fake_search).run(requests)
    check_same(expected, loop.run(requests))
    assert loop.statistics.num_recordings == 0
    model.lm_head.weight = torch.nn.Parameter(make_model(4).head_weight.detach().clone())  # and in other memory
    expected = SearchLoop(Engine(model, tokenizer, config), fake_search).run(requests)
    check_same(expected, loop.run(requests))
    assert loop.statistics.num_recordings > 0


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_step_that_finds_no_memory_to_be_recorded_is_launched(
    make_model, tokenizer, config, make_requests, fake_search, monkeypatch, run_ahead
):
    """Its kernels run one by one, in the attempt's buffers: the others may belong to a step that is not read yet."""

    class Refusing(DecodeGraphs):
        """Has memory for every third recording only."""

        num_attempts = 0

        def _record(self, step):
            self.num_attempts += 1
            step()  # so the last tokens already are the next ones
            if self.num_attempts % 3:
                raise torch.OutOfMemoryError("no memory for a recording")
            return step

    class Event:
        def record(self, stream):
            pass

        def synchronize(self):
            pass

    model, requests = make_model(4), make_requests(12, group_size=4)
    expected = SearchLoop(Engine(model, tokenizer, config), fake_search).run(requests)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Event())
    monkeypatch.setattr(Transfers, "_buffer", lambda self, size, dtype: torch.empty(size, dtype=dtype))
    engine = Engine(model, tokenizer, config, decode_graphs=Refusing, run_ahead=run_ahead)
    engine._transfers._is_cuda = True
    loop = SearchLoop(engine, fake_search)
    check_same(expected, loop.run(requests))
    statistics, graphs = loop.statistics, engine._graphs
    assert statistics.num_recordings == len(graphs._replays) == graphs.num_attempts // 3 > 0
    assert statistics.num_splits == graphs.num_attempts - statistics.num_recordings > 0
    assert statistics.num_replayed_steps > 0


class StandIns:
    """Stand-ins on a CPU for what `CudaDecodeGraphs` calls in torch.cuda: a graph reruns what it recorded."""

    def __init__(self, monkeypatch):
        self.pools, self.log, self.num_streams, self.num_refusals = [], [], 0, 0
        monkeypatch.setattr(decode_graph, "_recording_stream", cache(decode_graph._recording_stream.__wrapped__))
        names = ("CUDAGraph", "graph_pool_handle", "current_stream", "stream", "graph")
        for name in names:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)

    def new_stream(self, device):
        self.num_streams += 1
        return self.Stream()

    class Stream:
        def wait_stream(self, stream):
            pass

    class CUDAGraph:
        def replay(self):
            self.step()

    def graph_pool_handle(self):
        self.pools.append(object())
        return self.pools[-1]

    def current_stream(self, device):
        return self.Stream()

    @contextmanager
    def stream(self, stream):
        self.log.append("warm-up")
        yield

    @contextmanager
    def graph(self, cuda_graph, pool=None, stream=None, capture_error_mode="global"):  # torch 2.11 and later
        assert pool is self.pools[-1] and isinstance(stream, self.Stream) and capture_error_mode == "thread_local"
        self.log.append("recording")
        if self.num_refusals:
            self.num_refusals -= 1
            raise torch.OutOfMemoryError("no memory for a recording")
        yield
        cuda_graph.step = self.last_step


@pytest.mark.parametrize("run_ahead", [False, True])  # then a step is under way while another is recorded
def test_what_is_asked_of_cuda(make_model, tokenizer, config, make_requests, fake_search, monkeypatch, run_ahead):
    """One pool for all graphs, a warm-up before each, a new pool for moved weights, and one stream for all caches."""
    stand_ins = StandIns(monkeypatch)

    def watched(*arguments):
        step = decode_step(*arguments)

        def run():
            stand_ins.last_step = step
            step()

        return run

    decode_step = decode_graph._decode_step
    monkeypatch.setattr(decode_graph, "_decode_step", watched)
    model, requests = make_model(4), make_requests(9)
    expected = SearchLoop(Engine(model, tokenizer, config), fake_search).run(requests)
    engine = Engine(model, tokenizer, config, decode_graphs=CudaDecodeGraphs, run_ahead=run_ahead)
    loop = SearchLoop(engine, fake_search)
    for _ in range(2):
        check_same(expected, loop.run(requests))
    graphs = loop.engine._graphs
    assert stand_ins.log == ["warm-up", "recording"] * graphs.num_recordings
    pool = graphs._pool
    model.lm_head.weight = torch.nn.Parameter(model.head_weight.detach().clone())
    check_same(expected, loop.run(requests))
    assert loop.statistics.num_recordings > 0
    assert graphs._pool is not pool
    loop.engine.free_cache()
    stand_ins.num_refusals, num_pools = 2, len(stand_ins.pools)
    check_same(expected, loop.run(requests))
    assert loop.engine._graphs is not graphs
    assert loop.statistics.num_splits == 2 and stand_ins.num_refusals == 0
    assert len(stand_ins.pools) >= num_pools + 3  # a pool without graphs cannot be used again
    assert stand_ins.num_streams == 1  # torch keeps memory for each stream for good


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_host_is_told_nothing(make_model, monkeypatch, sampling):
    """On the meta device, which has no values to read; the attention's kernel has its own tests."""
    monkeypatch.setattr("searchr1_fast.models.decoder.cached_attention", lambda query, *_: query)
    model = make_model(4).to("meta")
    cache = KVCache(model.config, num_slots=9, max_length=20, device="meta")
    whole = torch.zeros(8, dtype=torch.int64, device="meta")
    hidden = model.decode_cached(whole, whole, whole, cache)
    uniforms = torch.zeros(8, dtype=torch.float64, device="meta")
    results = pack(*sample(head_logits(hidden, model.head_weight), uniforms, sampling))
    assert (results.shape, results.dtype) == ((16,), torch.int32)


# ---------------------------------------------------------------------------------------------------------------- GPU


def whole_attention(query, keys, values, table, slots, positions, *_):
    """Cached attention over all places of a slot, masked: simple, and free of shapes that depend on values."""
    group, blocks = query.shape[1] // keys.shape[1], table[slots].long()  # [T, W]
    k, v = (cache[blocks].transpose(1, 2).flatten(2, 3) for cache in (keys, values))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # [T, H, W * B, d]
    visible = torch.arange(k.shape[2], device=query.device) <= positions[:, None]  # [T, W * B]
    mask = visible[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(query.unsqueeze(2), k, v, attn_mask=mask).squeeze(2)


@pytest.fixture(params=["whole", "own"])
def attention(request, monkeypatch):
    """The attention of a model on the GPU: one that is simple enough to be beyond doubt, or its own."""
    if request.param == "whole":
        monkeypatch.setattr("searchr1_fast.models.decoder.cached_attention", whole_attention)


@pytest.fixture
def gpu_loops(make_model, tokenizer, config, fake_search, attention):
    """seed, changes -> search loops with and without graphs over one model on the GPU."""

    def make(seed: int, sampling: SamplingParams, **changes) -> list[SearchLoop]:
        model = make_model(seed, head_dim=64).to("cuda")
        configs = [config.model_copy(update={"cuda_graphs": flag} | changes) for flag in (True, False)]
        return [SearchLoop(Engine(model, tokenizer, one, sampling), fake_search) for one in configs]

    return make


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("overlap", [False, True])
def test_on_a_gpu(gpu_loops, make_requests, sampling, overlap):
    for seed, max_num_seqs, keep_cache in ((3, 5, False), (4, 64, True)):
        recorded, single = gpu_loops(seed, sampling, overlap=overlap, max_num_seqs=max_num_seqs, keep_cache=keep_cache)
        requests = make_requests(19, group_size=4, seed=seed)
        expected = single.run(requests)
        for is_first in (True, False):
            check_same(expected, recorded.run(requests), tolerance=2e-4)
            assert 0 < recorded.statistics.num_replayed_steps < recorded.statistics.num_steps
            assert single.statistics.num_replayed_steps == 0
            if not overlap:  # with it, when a search returns decides how many rows there are
                assert (recorded.statistics.num_recordings > 0) == (is_first or not keep_cache)
            recorded.engine.free_cache()
        assert keep_cache or recorded.engine._graphs is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_step_waits_once(gpu_loops, make_requests, monkeypatch, sampling):
    waits, wait = [], Transfers._wait

    def allowed(transfers, done):
        waits.append(torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("default")
        wait(transfers, done)
        torch.cuda.set_sync_debug_mode(waits[-1])

    monkeypatch.setattr(Transfers, "_wait", allowed)
    for loop in gpu_loops(4, sampling, keep_cache=True):
        loop.run(make_requests(12, group_size=4))  # records, compiles
        waits.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop.run(make_requests(12, group_size=4))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # Nothing else waits; the last step of a run may be unwanted, and then nobody reads it.
        assert set(waits) == {2}
        assert len(waits) <= loop.statistics.num_steps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_give_their_memory_back(gpu_loops, make_requests):
    loop, _ = gpu_loops(4, NUCLEUS)
    left = []
    for _ in range(3):
        loop.run(make_requests(12, group_size=4))
        assert loop.statistics.num_recordings > 0
        loop.engine.free_cache()
        torch.cuda.empty_cache()
        left.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert left[1] == left[2]  # libraries keep some memory from the first run on


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("num_rows", [1, 8, 136])  # torch sorts few rows one by one, many together
@pytest.mark.parametrize("params", [*SAMPLINGS, SamplingParams(1.0, top_p=0.95)], ids=str)
def test_sampling_from_a_large_vocabulary_can_be_recorded(num_rows, params):
    generator = torch.Generator("cuda").manual_seed(num_rows)
    logits = 3 * torch.randn(num_rows, 151936, device="cuda", generator=generator)
    uniforms = torch.rand(num_rows, device="cuda", dtype=torch.float64, generator=generator)
    expected = pack(*sample(logits, uniforms, params))  # also the warm-up
    results, graph = torch.zeros_like(expected), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results.copy_(pack(*sample(logits, uniforms, params)))
    graph.replay()
    assert torch.equal(results[:num_rows], expected[:num_rows])
    logprobs = (one[num_rows:].view(torch.float32) for one in (results, expected))
    torch.testing.assert_close(*logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("num_rows", [1, 5, 8, 13])
def test_a_graph_in_bf16_is_the_step(make_model, attention, num_rows):
    """For the same inputs twice: likeliest tokens and log-probs up to rounding, and nothing written elsewhere."""
    model = make_model(4, head_dim=64).to("cuda", torch.bfloat16)
    generator = np.random.default_rng(num_rows)
    slots, lengths = generator.permutation(16)[:num_rows], generator.integers(1, 30, num_rows)
    tokens = generator.integers(0, model.config.vocab_size, num_rows)
    results, caches = [], []
    for graphs_class in (CudaDecodeGraphs, DecodeGraphs):
        torch.manual_seed(0)
        cache = KVCache(model.config, num_slots=17, max_length=40, dtype=torch.bfloat16, device="cuda")
        for memory in (*cache.keys, *cache.values):
            memory.normal_()
        last_tokens = torch.zeros(17, dtype=torch.int64, device="cuda")
        graphs = graphs_class(model, cache, last_tokens, Transfers(torch.device("cuda")), max_rows=16)
        for step in range(3):
            positions = lengths + step
            blocks = cache.table.cpu().numpy()[slots, positions // cache.block_size].astype(np.int64)
            receipt = graphs.decode(tokens, slots, positions, blocks, np.zeros(num_rows), GREEDY)
            result = [values[:num_rows] for values in receipt.wait()]
        results.append(result)
        caches.append(cache)
        assert graphs.num_recordings == 1
    np.testing.assert_allclose(results[0][1], results[1][1], atol=0.05)
    for one, other in zip(caches[0].keys, caches[1].keys, strict=True):
        torch.testing.assert_close(one[:-1], other[:-1], atol=0.1, rtol=0.02)
