"""Turn logic over vLLM's interface, with a stand-in for vLLM: turns, stop tags, seeds, sleep."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from trajectories import check_same
from vllm_stand_in import GREEDY, check_logprobs

from searchr1_fast.rollout import Engine, SamplingParams, SearchLoop
from searchr1_fast.rollout.sampling import stream_keys
from searchr1_fast.rollout.sequence import Sequence
from searchr1_fast.rollout.vllm_engine import turn_seed
from searchr1_fast.types import Action, FinishReason


@pytest.mark.parametrize("overlap", [False, True])
def test_greedy_rollouts_are_the_native_engines(
    make_model, make_vllm_engine, tokenizer, config, make_requests, fake_search, overlap
):
    """Tags that end inside tokens, turns and sequences that reach their limits, forced final turns."""
    actions = Counter()
    config = config.model_copy(update={"overlap": overlap, "final_turn_message": "\n<answer>"})
    for seed in (3, 4, 5):
        model, requests = make_model(seed), make_requests(9, seed=seed)
        engine = make_vllm_engine(model, GREEDY)
        trajectories = SearchLoop(engine, fake_search, config=config).run(requests)
        native = SearchLoop(Engine(model, tokenizer, config, GREEDY), fake_search)
        check_same(trajectories, native.run(requests))
        assert not engine.has_work
        assert not engine._generator.requests
        assert engine.statistics.num_decode_tokens == native.statistics.num_decode_tokens
        actions.update(turn.action for trajectory in trajectories for turn in trajectory.turns)
    assert actions[Action.SEARCH] > 0 < actions[Action.INVALID]


def test_sampled_turns_end_at_the_first_tag_whatever_the_batch(
    make_model, make_vllm_engine, tokenizer, config, make_requests, fake_search
):
    model, requests = make_model(4), make_requests(12, group_size=3, seed=4)
    engine = make_vllm_engine(model, SamplingParams(1.3))
    trajectories = SearchLoop(engine, fake_search).run(requests)
    check_logprobs(model, trajectories, 1.3)
    endings = Counter()
    for trajectory in trajectories:
        for turn in trajectory.turns:
            ids = trajectory.token_ids[turn.start : turn.end].tolist()
            before, whole = (b"".join(map(tokenizer.token_bytes, part)) for part in (ids[:-1], ids))
            tags = (b"</search>", b"</answer>")
            assert not any(tag in before for tag in tags)
            assert not set(ids[:-1]) & set(tokenizer.eos_ids)
            is_full = len(ids) == config.max_turn_tokens or turn.end == config.max_sequence_tokens
            is_tag, is_eos = any(tag in whole for tag in tags), ids[-1] in tokenizer.eos_ids
            assert is_full or is_tag or is_eos
            endings.update({"tag": is_tag, "inside": is_tag and not whole.endswith(tags), "full": is_full})
    assert all(endings[name] for name in ("tag", "inside", "full"))
    assert {t.finish_reason for t in trajectories} >= {FinishReason.ANSWER, FinishReason.LENGTH}
    one_by_one = make_vllm_engine(model, SamplingParams(1.3))
    check_same(trajectories, [SearchLoop(one_by_one, fake_search).run([request])[0] for request in requests])


def test_only_turns_that_a_tag_ended_are_aborted(make_model, make_vllm_engine, tokenizer, make_requests, fake_search):
    engine = make_vllm_engine(make_model(5), SamplingParams(1.0))
    trajectories = SearchLoop(engine, fake_search).run(make_requests(10, seed=5))
    stand_in = engine._generator
    turns = [(t, turn) for t in trajectories for turn in t.turns]
    assert len(stand_in.seeds) == len(set(stand_in.seeds)) == len(turns)
    assert 0 < len(stand_in.aborted) < len(turns)


def test_a_search_that_fails_leaves_nothing_behind(make_model, make_vllm_engine, make_requests, fake_search):
    engine = make_vllm_engine(make_model(4), SamplingParams(1.0))

    def fail(queries):
        raise OSError("no index")

    with pytest.raises(OSError, match="no index"):
        SearchLoop(engine, fail).run(make_requests(9, seed=4))
    assert not engine.has_work
    assert not engine._generator.requests
    assert SearchLoop(engine, fake_search).run(make_requests(3, seed=4))


def test_a_turns_seed_depends_on_the_sequences_seed_and_on_what_it_sampled(make_requests):
    keys = stream_keys([0, 1, 2])
    seeds = set()
    for request, key in zip(make_requests(3), keys, strict=True):
        sequence = Sequence(request, key)
        sequence.append_prompt([1, 2], "x")
        seeds.add(turn_seed(sequence))
        sequence.append_observation([3], "y")
        seeds.add(turn_seed(sequence))  # what the environment writes changes nothing
        sequence.append_turn(np.array([4, 5]), np.zeros(2, dtype=np.float32))
        seeds.add(turn_seed(sequence))
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_vllm_sleeps_until_the_weights_are_handed_over(
    make_model, make_vllm_engine, config, make_requests, fake_search
):
    model, requests = make_model(4), make_requests(3, seed=4)
    engine = make_vllm_engine(model, GREEDY)
    before = SearchLoop(engine, fake_search).run(requests)
    engine.free_cache()
    with pytest.raises(AssertionError, match="update_weights"):
        SearchLoop(engine, fake_search).run(requests)
    engine.update_weights()
    check_same(before, SearchLoop(engine, fake_search).run(requests))
