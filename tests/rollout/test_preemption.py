"""A cache too small for all sequences under way: they write the same, and the cost is counted."""

from __future__ import annotations

import time

import numpy as np
import pytest
from pydantic import ValidationError
from trajectories import check_same

from searchr1_fast.config import RolloutConfig
from searchr1_fast.rollout import Engine, PlainEngine, SamplingParams, SearchLoop
from searchr1_fast.rollout.decode_graph import DecodeGraphs

COOL = SamplingParams(temperature=0.5)
pytestmark = pytest.mark.usefixtures("small_blocks")


class WatchedEngine(Engine):
    """Checks at every step that no slot writes where another may read, and that no blocks are lost."""

    num_shared_blocks = 0
    interrupted = 0

    def _postprocess(self, step, token_ids, logprobs):
        batch, table, blocks = step.batch, self._slots, self._slots.blocks
        for slot, length in zip(batch.slots.tolist(), batch.lengths.tolist(), strict=True):
            end = int(table.num_cached[slot])  # the step's tokens are the last `length` of these
            assert blocks.counts[slot] * blocks.block_size >= end
            written = blocks.table[slot, (end - length) // blocks.block_size : blocks.num_needed(end)]
            assert (blocks._num_holders[written] == 1).all()
        held = {block for slot, n in enumerate(blocks.counts) for block in blocks.table[slot, :n].tolist()}
        assert len(held) + blocks.num_free == len(blocks._num_holders)
        assert np.count_nonzero(blocks._num_holders > 0) == len(held)
        WatchedEngine.num_shared_blocks += int(np.count_nonzero(blocks._num_holders > 1))
        WatchedEngine.interrupted += sum(len(batch.token_ids) > len(batch.slots) and c > 0 for c in
                                         step.counts[batch.lengths > 1])  # fmt: skip
        return super()._postprocess(step, token_ids, logprobs)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_a_small_cache_changes_nothing_but_the_work(
    make_model, tokenizer, config, make_requests, fake_search, overlap, share
):
    def slow_search(queries):
        time.sleep(0.002 * overlap)  # others decode meanwhile, and may want the blocks
        return fake_search(queries)

    config = config.model_copy(update={"max_num_seqs": 24, "overlap": overlap})
    model, requests = make_model(4), make_requests(24, group_size=8, seed=4)
    ample = SearchLoop(Engine(model, tokenizer, config, COOL), fake_search)
    expected = ample.run(requests)
    assert ample.statistics.num_preemptions == ample.statistics.num_recomputed_tokens == 0
    for cache_tokens in (260, 400, 1000):
        WatchedEngine.num_shared_blocks = WatchedEngine.interrupted = 0
        small = config.model_copy(update={"cache_tokens": cache_tokens})
        engine = WatchedEngine(model, tokenizer, small, COOL)
        engine.share_prefixes = share
        loop = SearchLoop(engine, slow_search)
        check_same(expected, loop.run(requests))
        check_work(engine, loop.statistics, expected)


def check_work(engine, statistics, expected) -> None:
    """All tokens are computed or shared, and lost ones once more; a sampled token is computed once."""
    cache_tokens = engine.config.cache_tokens
    assert engine._cache.num_blocks == -(-cache_tokens // 4)
    assert statistics.num_preemptions > 0
    assert statistics.num_recomputed_tokens > 0
    assert (WatchedEngine.num_shared_blocks > 0) == engine.share_prefixes
    computed = statistics.num_decode_tokens + statistics.num_prefill_tokens
    existing = sum(len(trajectory.token_ids) - 1 for trajectory in expected)
    if not engine.share_prefixes:
        assert computed == existing + statistics.num_recomputed_tokens
    assert engine._slots.blocks.num_free == engine._cache.num_blocks
    if cache_tokens < 1000:
        assert WatchedEngine.interrupted > 0


@pytest.mark.parametrize("engine_class", [Engine, PlainEngine])
def test_recorded_steps_too(make_model, tokenizer, config, make_requests, fake_search, engine_class):
    config = config.model_copy(update={"max_num_seqs": 24})
    model, requests = make_model(3), make_requests(24, group_size=8, seed=3)
    expected = SearchLoop(Engine(model, tokenizer, config, COOL), fake_search).run(requests)
    small = config.model_copy(update={"cache_tokens": 260})
    loop = SearchLoop(engine_class(model, tokenizer, small, COOL, decode_graphs=DecodeGraphs), fake_search)
    check_same(expected, loop.run(requests))
    assert engine_class is PlainEngine or loop.statistics.num_preemptions > 0
    assert loop.statistics.num_replayed_steps > 0


def test_who_came_last_loses_its_cache_first(make_model, tokenizer, config, make_requests, fake_search):
    config = config.model_copy(update={"max_num_seqs": 24, "cache_tokens": 300})
    engine = Engine(make_model(4), tokenizer, config, COOL)
    num_victims, drop = 0, engine._scheduler._preempt_youngest

    def watched(besides=None):
        nonlocal num_victims
        counts = engine._slots.blocks.counts
        had = [s.request.seed for s in engine._slots.occupants if s and counts[s.slot] and s.slot != besides]
        drop(besides)
        (victim,) = [
            s.request.seed for s in engine._slots.occupants if s and s.request.seed in had and not counts[s.slot]
        ]
        assert victim == max(had)  # seeds are in order of arrival
        num_victims += 1

    engine._scheduler._preempt_youngest = watched
    SearchLoop(engine, fake_search).run(make_requests(24, seed=0))
    assert num_victims > 5


def test_the_last_one_that_runs_keeps_its_cache(make_model, tokenizer, config, make_requests, fake_search):
    """A sequence that is searching does not need its blocks now, even if it came earlier."""

    class Spared(Engine):
        num_single = 0

        def step(self):
            running = self._scheduler.running
            interrupted = self.statistics.num_preemptions
            ended = super().step()
            if len(running) == 1 and self.statistics.num_preemptions > interrupted:
                assert not any(sequence.slot == running[0] for sequence in self._scheduler._resumed)
                assert self.lengths[running[0]] == 1  # it went on by its one token, and was not recomputed
                Spared.num_single += 1
            return ended

        def _postprocess(self, step, token_ids, logprobs):
            self.lengths = dict(zip(step.batch.slots.tolist(), step.batch.lengths.tolist(), strict=True))
            return super()._postprocess(step, token_ids, logprobs)

    config = config.model_copy(update={"max_num_seqs": 24})
    requests = make_requests(24, group_size=4, seed=1)
    expected = SearchLoop(Engine(make_model(3), tokenizer, config, COOL), fake_search).run(requests)
    small = config.model_copy(update={"cache_tokens": 260, "max_num_seqs": 24})
    loop = SearchLoop(Spared(make_model(3), tokenizer, small, COOL), fake_search)
    check_same(expected, loop.run(requests))
    assert Spared.num_single > 0


def test_an_ample_cache_refuses_nobody(make_model, tokenizer, config, make_requests, fake_search):
    """Every slot has room for the longest sequence, so nobody waits for blocks, whoever else is there."""
    config = config.model_copy(update={"max_num_seqs": 7})
    engine = Engine(make_model(4), tokenizer, config, COOL)
    answers, has_room = [], engine._scheduler._has_room

    def watched(*arguments):
        answers.append(has_room(*arguments))
        return answers[-1]

    engine._scheduler._has_room = watched
    SearchLoop(engine, fake_search).run(make_requests(30, group_size=3, seed=2))
    assert len(answers) > 30
    assert all(answers)


def test_a_cache_that_cannot_hold_one_sequence_is_refused():
    with pytest.raises(ValidationError, match="cache_tokens, 100, is less than max_sequence_tokens, 200"):
        RolloutConfig(max_sequence_tokens=200, cache_tokens=100)
