"""An engine that launches a step before it reads the previous one writes the same as one that waits."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from trajectories import check_same

from searchr1_fast.rollout import Engine, PlainEngine, SamplingParams, SearchLoop
from searchr1_fast.rollout.decode_graph import DecodeGraphs

GREEDY, COOL = SamplingParams(temperature=0.0), SamplingParams(temperature=0.5)


class Watched(Engine):
    """Notes what is launched before the previous step is read, and hides from the host what is not read yet."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, run_ahead=True, **options)
        self.num_ahead = self.num_joined_ahead = self.num_handed_on = 0
        self._unread = None
        self._void = {}  # slot -> the sequence whose turn ended at the last step

    def _launch(self):
        preempted = self.statistics.num_preemptions
        is_ahead = self._unread is not None
        step = super()._launch()
        if is_ahead:
            assert self.statistics.num_preemptions == preempted  # the last step's tokens are not read yet
            assert step.batch.num_running > 0
            assert (step.batch.token_ids[: step.batch.num_running] == -1).all()
            self.num_ahead += 1
            self.num_joined_ahead += len(step.batch.slots) > step.batch.num_running
        self._unread = step
        return step

    def step(self):
        self._unread = self._under_way
        return super().step()

    def _postprocess(self, step, token_ids, logprobs):
        for slot in step.batch.slots[~step.is_wanted].tolist():
            occupant = self._slots.occupants[slot]
            self.num_handed_on += occupant is not None and occupant is not self._void.get(slot)
        self._unread = None
        broken = np.where(step.is_wanted, logprobs, np.nan)  # nobody may read the others
        ended = super()._postprocess(step, np.where(step.is_wanted, token_ids, -1), broken)
        self._void = {sequence.slot: sequence for sequence in ended}
        return ended


@pytest.mark.parametrize("graphs", [None, DecodeGraphs])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, COOL], ids=str)
def test_it_writes_the_same(make_model, tokenizer, config, make_requests, fake_search, graphs, overlap, sampling):
    counts = np.zeros(4, dtype=np.int64)
    for seed, max_num_seqs in ((3, 5), (4, 24)):
        changed = config.model_copy(update={"max_num_seqs": max_num_seqs, "overlap": overlap})
        model, requests = make_model(seed), make_requests(24, group_size=4, seed=seed)
        waiting = SearchLoop(Engine(model, tokenizer, changed, sampling), fake_search)
        engine = Watched(model, tokenizer, changed, sampling, decode_graphs=graphs)
        loop = SearchLoop(engine, fake_search)
        for _ in range(2):
            check_same(waiting.run(requests), loop.run(requests))
        ours, theirs = loop.statistics, waiting.statistics
        assert theirs.num_discarded_tokens == 0 < ours.num_discarded_tokens
        assert ours.num_recomputed_tokens == 0
        if not overlap and max_num_seqs == 24:  # nobody waits for a slot, so who shares with whom is the same
            assert ours.num_decode_tokens - ours.num_discarded_tokens == theirs.num_decode_tokens
        assert engine._under_way is None
        assert len(engine._slots.free) == len(engine._slots)
        counts += [engine.num_ahead, engine.num_joined_ahead, engine.num_handed_on, ours.num_replayed_steps]
    assert (counts[:3] > 0).all()
    assert (counts[3] > 0) == (graphs is not None)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("cache_tokens", [260, 400])
@pytest.mark.parametrize("overlap", [False, True])
def test_nobody_loses_tokens_that_are_not_read(
    make_model, tokenizer, config, make_requests, fake_search, cache_tokens, overlap
):
    def slow_search(queries):
        time.sleep(0.002 * overlap)
        return fake_search(queries)

    config = config.model_copy(update={"max_num_seqs": 24, "overlap": overlap})
    model, requests = make_model(4), make_requests(24, group_size=8, seed=4)
    expected = SearchLoop(Engine(model, tokenizer, config, COOL), fake_search).run(requests)
    small = config.model_copy(update={"cache_tokens": cache_tokens})
    engine = Watched(model, tokenizer, small, COOL, decode_graphs=DecodeGraphs)
    loop = SearchLoop(engine, slow_search)
    check_same(expected, loop.run(requests))
    assert loop.statistics.num_preemptions > 0 < engine.num_ahead
    assert engine._slots.blocks.num_free == engine._cache.num_blocks - 1  # the spare one


def test_turns_that_reach_their_limit_are_not_run_on(make_model, tokenizer, config, make_requests, fake_search):
    """A limit is known beforehand: with one token per turn no turn runs on, and nothing is thrown away."""
    for limit in (1, 2, 7):
        changed = config.model_copy(update={"max_turn_tokens": limit})
        model, requests = make_model(4), make_requests(9)
        expected = SearchLoop(Engine(model, tokenizer, changed, COOL), fake_search).run(requests)
        engine = Watched(model, tokenizer, changed, COOL, decode_graphs=DecodeGraphs)
        loop = SearchLoop(engine, fake_search)
        check_same(expected, loop.run(requests))
        assert (engine.num_ahead > 0) == (limit > 1)
        assert limit > 1 or loop.statistics.num_discarded_tokens == 0


def test_the_lock_step_twin_too(make_model, tokenizer, config, make_requests, fake_search):
    model, requests = make_model(3), make_requests(12, group_size=4)
    for stop_at_tags in (True, False):
        options = {"stop_at_tags": stop_at_tags}
        expected = SearchLoop(PlainEngine(model, tokenizer, config, COOL, **options), fake_search).run(requests)
        ahead = PlainEngine(model, tokenizer, config, COOL, run_ahead=True, **options)
        check_same(expected, SearchLoop(ahead, fake_search).run(requests))


def test_a_run_that_broke_off_leaves_nothing_behind(make_model, tokenizer, config, make_requests, fake_search):
    model, requests = make_model(4), make_requests(12)
    expected = SearchLoop(Engine(model, tokenizer, config), fake_search).run(requests)
    engine = Engine(model, tokenizer, config, decode_graphs=DecodeGraphs, run_ahead=True)

    def broken(queries):
        assert engine._under_way is not None
        raise OSError("the index is gone")

    with pytest.raises(OSError, match="the index is gone"):
        SearchLoop(engine, broken).run(requests)
    assert not engine.has_work
    check_same(expected, SearchLoop(engine, fake_search).run(requests))


def test_memory_goes_when_the_device_is_done_with_it(make_model, tokenizer, config, make_requests, fake_search):
    """A run's last step may still be under way with nobody to read it; it is waited for before its cache goes."""
    engine = Engine(make_model(4), tokenizer, config, decode_graphs=DecodeGraphs, run_ahead=True)
    loop, waited, finish = SearchLoop(engine, fake_search), [], engine._transfers.finish

    def noted():
        waited.append(engine._cache)
        finish()

    engine._transfers.finish = noted
    loop.run(make_requests(2))
    small = engine._cache
    loop.run(make_requests(5))  # needs more slots
    assert waited == [None, small]
    large = engine._cache
    engine.keep_cache = True
    engine.free_cache()
    assert engine._cache is large
    engine.keep_cache = False
    engine.free_cache()
    assert waited == [None, small, large]
    assert engine._cache is engine._graphs is engine._last_tokens is None


def test_a_cache_goes_back_to_the_driver(make_model, tokenizer, config, make_requests, fake_search, monkeypatch):
    """Torch would keep the memory for whoever takes a piece of it; it is returned only once the cache is gone."""
    engine = Engine(make_model(4), tokenizer, config, decode_graphs=DecodeGraphs)
    SearchLoop(engine, fake_search).run(make_requests(2))
    held = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append((engine._cache, engine._graphs)))
    engine._transfers.device = torch.device("cuda", 0)
    engine.keep_cache = True
    engine.free_cache()
    assert held == []
    engine.keep_cache = False
    engine.free_cache()
    assert held == [(None, None)]


def test_broken_weights_are_named_all_the_same(make_model, tokenizer, config, make_requests, fake_search):
    model = make_model(4)
    engine = Engine(model, tokenizer, config, run_ahead=True)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="not finite for 5 of 5 sequences"):
        SearchLoop(engine, fake_search).run(make_requests(9))


# ---------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("cache_tokens", [None, 400])  # enough for all, and so little that some lose theirs
def test_on_a_gpu(make_model, tokenizer, config, make_requests, fake_search, overlap, cache_tokens):
    """Twice: the second run uses the buffers, cache and graphs with which the last step of the first was under way."""
    changes = {"max_num_seqs": 24, "overlap": overlap, "cache_tokens": cache_tokens, "keep_cache": True}
    config, model = config.model_copy(update=changes), make_model(4, head_dim=64).to("cuda")
    requests = make_requests(24, group_size=8, seed=4)
    waiting = SearchLoop(Engine(model, tokenizer, config, COOL, run_ahead=False), fake_search)
    ahead = SearchLoop(Watched(model, tokenizer, config, COOL), fake_search)
    for _ in range(2):
        check_same(waiting.run(requests), ahead.run(requests))
        assert waiting.statistics.num_discarded_tokens == 0 < ahead.statistics.num_discarded_tokens
        assert (ahead.statistics.num_preemptions > 0) == (cache_tokens is not None)
        ahead.engine.free_cache()
    assert ahead.engine.num_ahead > 0
