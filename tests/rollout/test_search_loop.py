"""Whole rollouts: engine, twin and loop against the rollout by hand, and against one another."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from trajectories import check_same

from searchr1_fast.rollout import Engine, PlainEngine, SamplingParams, SearchLoop
from searchr1_fast.types import Action, FinishReason

GREEDY = SamplingParams(temperature=0.0)
COOL = SamplingParams(temperature=0.5)  # many samples of a group write the same first turn, few the same trajectory


class SharingPlainEngine(PlainEngine):
    """Loses every slot after every turn, and shares with the sequences that are running."""

    share_prefixes = True


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.7])
def test_rollouts_are_those_made_by_hand(
    make_model, tokenizer, config, make_requests, fake_search, rollout_by_hand, temperature
):
    outcomes, actions = Counter(), Counter()
    for seed in (4, 5):
        model, requests = make_model(seed), make_requests(9, group_size=3, seed=seed)
        engine = Engine(model, tokenizer, config, SamplingParams(temperature))
        for request, trajectory in zip(requests, SearchLoop(engine, fake_search).run(requests), strict=True):
            expected = rollout_by_hand(model, request, config, trajectory.token_ids, temperature=temperature)
            assert trajectory.token_ids.tolist() == expected.ids
            assert trajectory.loss_mask.tolist() == expected.mask
            np.testing.assert_allclose(trajectory.rollout_logprobs, expected.logprobs, atol=1e-4)
            assert [(turn.action, turn.content) for turn in trajectory.turns] == expected.actions
            assert trajectory.finish_reason is expected.reason
            outcomes[trajectory.finish_reason] += 1
            actions.update(turn.action for turn in trajectory.turns)
    # The comparison is worth something only if everything happened.
    assert actions[Action.SEARCH] > 0
    assert actions[Action.INVALID] > 0
    if temperature:
        assert all(outcomes[reason] for reason in (FinishReason.ANSWER, FinishReason.NO_ANSWER, FinishReason.LENGTH))


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(1.0), SamplingParams(0.8, top_p=0.9, top_k=20)])
@pytest.mark.parametrize("stop_at_tags", [True, False])
def test_plain_twin_agrees(make_model, tokenizer, config, make_requests, fake_search, sampling, stop_at_tags):
    native_batches = discarded = 0
    for seed in (3, 4):
        model, requests = make_model(seed), make_requests(13, group_size=4, seed=seed)
        native = SearchLoop(Engine(model, tokenizer, config, sampling), fake_search)
        plain = SearchLoop(PlainEngine(model, tokenizer, config, sampling, stop_at_tags=stop_at_tags), fake_search)
        check_same(native.run(requests), plain.run(requests))
        assert native.statistics.num_recomputed_tokens == 0 < plain.statistics.num_recomputed_tokens
        assert plain.statistics.num_search_batches <= config.max_searches
        native_batches += native.statistics.num_search_batches
        discarded += plain.statistics.num_discarded_tokens
    assert native_batches > 0
    assert (discarded > 0) == (not stop_at_tags)


@pytest.mark.parametrize("max_num_seqs", [1, 5, 64])  # 1: the only slot is often held by a sequence that searches
def test_overlap_changes_nothing(make_model, tokenizer, config, make_requests, fake_search, max_num_seqs):
    def slow_search(queries):
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0.01)  # long enough for others to decode on
        return fake_search(queries)

    model, requests = make_model(4), make_requests(20, group_size=2)
    normal = SearchLoop(Engine(model, tokenizer, config), fake_search)
    config = config.model_copy(update={"overlap": True, "max_num_seqs": max_num_seqs})
    overlap = SearchLoop(Engine(model, tokenizer, config), slow_search)
    check_same(normal.run(requests), overlap.run(requests))
    assert normal.statistics.num_searches == overlap.statistics.num_searches > 5


def test_overlap_decodes_while_a_search_is_in_flight(make_model, tokenizer, config, make_requests, fake_search):
    loop = SearchLoop(Engine(make_model(4), tokenizer, config.model_copy(update={"overlap": True})), None)
    steps_at_search, waited_for = [], []

    def search(queries):
        start = loop.statistics.num_steps
        steps_at_search.append(start)
        deadline = time.monotonic() + 5
        # Hold the first search until others have decoded on; if the loop waited, nothing would move.
        while len(steps_at_search) == 1 and loop.statistics.num_steps < start + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        waited_for.append(loop.statistics.num_steps - start)
        return fake_search(queries)

    loop.search = search
    loop.run(make_requests(12))
    assert waited_for[0] >= 3


def test_a_sequence_does_not_depend_on_its_company(make_model, tokenizer, config, make_requests, fake_search):
    model, requests = make_model(4), make_requests(14, group_size=7)
    together = SearchLoop(Engine(model, tokenizer, config), fake_search).run(requests)
    loop = SearchLoop(Engine(model, tokenizer, config.model_copy(update={"max_num_seqs": 1})), fake_search)
    alone = [loop.run([request])[0] for request in reversed(requests)]
    check_same(together, alone[::-1])
    roomy = SearchLoop(Engine(model, tokenizer, config.model_copy(update={"max_num_seqs": 64})), fake_search)
    check_same(together, roomy.run(requests))
    assert len({t.token_ids.tobytes() for t in together}) > 10  # the seeds differ, so do the members of a group


def test_prefill_is_split_when_prompts_exceed_the_token_budget(
    make_model, tokenizer, config, make_requests, fake_search, monkeypatch
):
    config = config.model_copy(update={"max_num_seqs": 64})
    model, requests = make_model(3), make_requests(12)
    expected = SearchLoop(Engine(model, tokenizer, config), fake_search).run(requests)
    monkeypatch.setattr("searchr1_fast.rollout.scheduler.MAX_PREFILL_TOKENS", 40)
    engine = Engine(model, tokenizer, config)
    scheduler = engine._scheduler
    joined, schedule = [], scheduler.schedule

    def watched():
        num_running = len(scheduler.running)
        batch = schedule()
        joined.append(batch.lengths[num_running:])
        return batch

    scheduler.schedule = watched
    check_same(expected, SearchLoop(engine, fake_search).run(requests))
    assert all(len(lengths) <= 1 or lengths.sum() <= 40 for lengths in joined)
    assert any(len(lengths) > 1 for lengths in joined)


def test_a_prompt_is_computed_once_for_its_group(make_model, tokenizer, config, make_requests):
    config = config.model_copy(update={"max_num_seqs": 64, "max_searches": 0})
    requests = make_requests(16, group_size=8)
    prompts = [len(tokenizer.encode(request.prompt)) for request in requests[::8]]
    loop = SearchLoop(Engine(make_model(4), tokenizer, config), None)
    shared = loop.run(requests)
    # Both groups' first samples join at the first step, where the other group's beginning is not there yet.
    assert loop.statistics.num_prefill_tokens == sum(prompts) + 7 * 2
    assert loop.statistics.num_shared_tokens == 7 * sum(length - 1 for length in prompts)
    loop.engine.share_prefixes = False
    check_same(shared, loop.run(requests))
    assert loop.statistics.num_shared_tokens == 0


def test_a_group_that_writes_the_same_is_prefilled_once(make_model, tokenizer, config, make_requests, fake_search):
    """Greedy: whenever they join, seven of eight compute one token each, and the first one everything."""
    config = config.model_copy(update={"max_num_seqs": 64})
    num_turns = 0
    for seed in (3, 4, 5):
        loop = SearchLoop(Engine(make_model(seed), tokenizer, config, GREEDY), fake_search)
        requests = make_requests(1, seed=seed) * 8
        (alone,) = loop.run(requests[:1])
        prefilled, turns = loop.statistics.num_prefill_tokens, len(alone.turns)
        assert (
            prefilled == len(alone.token_ids) - alone.loss_mask.sum() + turns - 1
        )  # the last token of each turn but one
        check_same([alone] * 8, loop.run(requests))
        assert loop.statistics.num_prefill_tokens == prefilled + 7 * turns
        assert loop.statistics.num_shared_tokens == 7 * (prefilled - turns)
        num_turns += turns
    assert num_turns > 3  # there were observations


@pytest.mark.parametrize("engine_class", [Engine, SharingPlainEngine])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("stop_at_tags", [True, False])
@pytest.mark.parametrize("max_num_seqs", [3, 64])  # 3: slots are released and taken by others all the time
@pytest.mark.usefixtures("small_blocks")
def test_sharing_changes_nothing(
    make_model, tokenizer, config, make_requests, fake_search, engine_class, overlap, stop_at_tags, max_num_seqs
):
    config = config.model_copy(update={"overlap": overlap, "max_num_seqs": max_num_seqs})
    model, requests = make_model(4), make_requests(16, group_size=8, seed=4)
    loop = SearchLoop(engine_class(model, tokenizer, config, COOL, stop_at_tags=stop_at_tags), fake_search)
    shares = watch_shares(loop.engine)
    trajectories, sharing = loop.run(requests), loop.statistics
    # The comparison is worth something only if samples shared observations and then parted.
    assert any(end > 80 for end in shares)  # a prompt has fewer than 30 tokens, a turn 24
    assert num_parted_after_a_turn(trajectories) > 0
    loop.engine.share_prefixes = False
    check_same(trajectories, loop.run(requests))
    assert loop.statistics.num_shared_tokens == 0 < sharing.num_shared_tokens
    assert loop.statistics.num_prefill_tokens == sharing.num_prefill_tokens + sharing.num_shared_tokens


def watch_shares(engine):
    """-> a list that gets, for each sequence that joins from now on, how many of its tokens are shared."""
    shares, share = [], engine._scheduler._share

    def watched(source, target, start, end, length):
        shares.append(end if end > start else 0)
        return share(source, target, start, end, length)

    engine._scheduler._share = watched
    return shares


def num_parted_after_a_turn(trajectories):
    """-> number of pairs that have the first turn and its observation in common, but not the rest."""
    count = 0
    for one, other in itertools.combinations(trajectories, 2):
        if len(one.turns) > 1 and len(other.turns) > 1:
            start = one.turns[1].start
            alike = np.array_equal(one.token_ids[:start], other.token_ids[:start])
            count += alike and not np.array_equal(one.token_ids, other.token_ids)
    return count


def test_runs_repeat_bit_for_bit(make_model, tokenizer, config, make_requests, fake_search):
    loop = SearchLoop(Engine(make_model(4), tokenizer, config), fake_search)
    once, again = (loop.run(make_requests(12, group_size=4)) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        assert one.token_ids.tobytes() == other.token_ids.tobytes()
        assert one.rollout_logprobs.tobytes() == other.rollout_logprobs.tobytes()


def test_broken_weights_are_reported(make_model, tokenizer, config, make_requests, fake_search):
    for sampling in (GREEDY, SamplingParams(), SamplingParams(1.0, 0.9, 5)):
        model = make_model(4)
        with torch.no_grad():
            model.head_weight[7] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            SearchLoop(Engine(model, tokenizer, config, sampling), fake_search).run(make_requests(3))


def test_logprobs_are_those_of_a_packed_forward(make_model, tokenizer, config, make_requests, fake_search):
    model = make_model(4)
    for temperature in (1.0, 0.7):
        engine = Engine(model, tokenizer, config, SamplingParams(temperature))
        trajectories = SearchLoop(engine, fake_search).run(make_requests(10, group_size=5))
        lengths = [len(t.token_ids) for t in trajectories]
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
        token_ids = torch.from_numpy(np.concatenate([t.token_ids for t in trajectories]))
        table = torch.log_softmax(model.logits(token_ids, cu_seqlens).detach() / temperature, dim=-1)
        chosen = torch.cat((torch.zeros(1), table[:-1].gather(1, token_ids[1:, None])[:, 0])).numpy()
        mask = np.concatenate([t.loss_mask for t in trajectories])
        logprobs = np.concatenate([t.rollout_logprobs for t in trajectories])
        np.testing.assert_allclose(logprobs[mask], chosen[mask], atol=1e-4)
        assert (logprobs[~mask] == 0).all()
        assert mask.sum() > 100


def test_bfloat16_models_generate(make_model, tokenizer, config, make_requests, fake_search):
    model = make_model(4).bfloat16()
    trajectories = SearchLoop(Engine(model, tokenizer, config), fake_search).run(make_requests(6, group_size=3))
    for trajectory in trajectories:
        token_ids = torch.from_numpy(trajectory.token_ids)
        logits = model.logits(token_ids, torch.tensor([0, len(token_ids)])).detach().float()
        chosen = torch.log_softmax(logits[:-1], dim=-1).gather(1, token_ids[1:, None])[:, 0].numpy()
        mask = trajectory.loss_mask[1:]
        assert np.abs(trajectory.rollout_logprobs[1:] - chosen)[mask].mean() < 0.1  # bf16 has 3 digits


def test_mask_turns_and_segments_describe_the_same_tokens(make_model, tokenizer, config, make_requests, fake_search):
    config = config.model_copy(update={"final_turn_message": "\nAnswer now.\n"})
    trajectories = SearchLoop(Engine(make_model(4), tokenizer, config), fake_search).run(make_requests(25))
    final_turns = 0
    for trajectory in trajectories:
        in_turns = np.zeros(len(trajectory.token_ids), dtype=bool)
        for turn in trajectory.turns:
            in_turns[turn.start : turn.end] = True
            assert turn.end > turn.start
        np.testing.assert_array_equal(trajectory.loss_mask, in_turns)
        written = [t for t in trajectory.token_ids.tolist() if t != tokenizer.eos_id]
        text = b"".join(tokenizer.token_bytes(t) for t in written)
        assert len(text.decode(errors="replace")) == len("".join(text for _, text in trajectory.segments))
        assert [text for kind, text in trajectory.segments if kind == "policy"] == [
            _text(tokenizer, trajectory.token_ids[turn.start : turn.end]) for turn in trajectory.turns
        ]
        if len(trajectory.turns) == config.max_searches + 1:
            final_turns += 1
            assert trajectory.segments[-2] == ("observation", "\nAnswer now.\n")
        else:
            assert ("observation", "\nAnswer now.\n") not in trajectory.segments
    assert final_turns


def _text(tokenizer, token_ids):
    written = [token for token in token_ids.tolist() if token != tokenizer.eos_id]
    return b"".join(map(tokenizer.token_bytes, written)).decode(errors="replace")
