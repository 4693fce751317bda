"""Sharing of what another slot holds: exact counts, on an engine run by hand where it matters who joins when.

Every script is played with and without sharing and must write the same. Whole rollouts are in test_search_loop.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from searchr1_fast.models.kv_cache import BLOCK_SIZE
from searchr1_fast.rollout import Engine, RolloutRequest, SamplingParams, SearchLoop
from searchr1_fast.rollout.sampling import stream_keys
from searchr1_fast.rollout.sequence import Sequence
from searchr1_fast.types import Question

GREEDY = SamplingParams(temperature=0.0)


class Play:
    """An engine whose sequences are made and resumed by hand."""

    def __init__(self, model, tokenizer, config, share, **options):
        self.engine = Engine(model, tokenizer, config, GREEDY, **options)
        self.engine.share_prefixes = share
        self.engine._allocate(config.max_num_seqs)
        self.num_sequences = 0
        self.ended = set()

    def start(self, *pieces, limit=24):
        """-> a sequence of prompt, turn, observation, turn, … that waits for a slot."""
        request = RolloutRequest(Question("q", "?", ("x",), "test"), 0, "", seed=self.num_sequences)
        self.num_sequences += 1
        sequence = Sequence(request, stream_keys([request.seed])[0])
        for i, piece in enumerate(pieces):
            if i == 0:
                sequence.append_prompt(list(piece), "")
            elif i % 2:
                sequence.append_turn(np.array(piece), np.zeros(len(piece), dtype=np.float32))
            else:
                sequence.append_observation(list(piece), "")
        sequence.turn_limit = limit
        self.engine.add([sequence])
        return sequence

    def resume(self, sequence, observation):
        self.ended.remove(sequence)
        sequence.append_observation(list(observation), "")
        self.engine.resume(sequence)

    def run(self, *sequences):
        """Run until they have ended their turns -> (tokens computed, tokens shared) of those that joined meanwhile."""
        before = self.counts()
        while not self.ended.issuperset(sequences):
            self.step()
        return tuple(np.subtract(self.counts(), before).tolist())

    def step(self):
        self.ended.update(self.engine.step())

    def counts(self):
        return self.engine.statistics.num_prefill_tokens, self.engine.statistics.num_shared_tokens


@pytest.fixture(params=[4, 32])
def plays(make_model, tokenizer, config, request, monkeypatch):
    """(script, changes to the configuration) -> what the script returns with sharing; without, it writes the same.

    A script takes a `Play` and returns its sequences and the counts to be checked, which hold for any block size.
    """
    monkeypatch.setitem(BLOCK_SIZE, "cpu", request.param)

    def plays(script, stop_at_tags=True, **changes):
        changed = config.model_copy(update={"max_sequence_tokens": 200} | changes)
        written, counts = [], []
        for share in (True, False):
            sequences, count = script(Play(make_model(4), tokenizer, changed, share, stop_at_tags=stop_at_tags))
            written.append(
                [(np.concatenate(s.token_pieces).tolist(), np.concatenate(s.logprob_pieces)) for s in sequences]
            )
            counts.append(count)
        for (ours, logprobs), (theirs, expected) in zip(*written, strict=True):
            assert ours == theirs
            np.testing.assert_allclose(logprobs, expected, atol=1e-4)
        assert np.array(counts[0]).sum(1).tolist() == np.array(counts[1])[:, 0].tolist()  # all is computed or copied
        assert not np.array(counts[1])[:, 1].any()
        return counts[0]

    return plays


def tokens(first, count):
    """-> `count` ids; lists with the same `first` begin alike."""
    return [(first + 7 * i) % 200 for i in range(count)]


# ------------------------------------------------------------------------------------------------------ who has what


def test_a_prompt_is_copied_up_to_where_it_differs(plays):
    def script(play):
        first, twin = play.start(tokens(1, 30)), play.start(tokens(1, 30))
        counts = [play.run(first, twin)]
        other = play.start(tokens(1, 20) + tokens(2, 15))
        counts.append(play.run(other))
        beginning = play.start(tokens(1, 25))
        counts.append(play.run(beginning))
        return [first, twin, other, beginning], counts

    assert plays(script) == [(30 + 1, 29), (15, 20), (1, 24)]


def test_observations_are_copied_from_who_resumed_before(plays):
    def script(play):
        first, twin, third = (play.start(tokens(1, 12)) for _ in range(3))
        counts = [play.run(first, twin, third)]
        play.resume(first, tokens(3, 40))
        counts.append(play.run(first))
        play.resume(twin, tokens(3, 40))  # the first has gone on, but its cache still holds the observation
        play.resume(third, tokens(3, 31) + tokens(5, 4))
        counts.append(play.run(twin, third))
        return [first, twin, third], counts

    # The token that ended a turn is computed with the observation.
    assert plays(script) == [(12 + 1 + 1, 22), (1 + 40, 0), (1 + 4, 40 + 1 + 31)]


def test_what_was_lost_is_copied_as_far_as_it_is_cached(plays):
    turn_lengths = []

    def script(play):
        first = play.start(tokens(1, 12))
        counts = [play.run(first)]
        turn = first.token_pieces[1]
        turn_lengths.append(len(turn))
        again = play.start(tokens(1, 12), turn, tokens(3, 20))  # the turn's last token is cached by nobody
        counts.append(play.run(again))
        play.resume(first, tokens(3, 20))
        counts.append(play.run(first))
        return [first, again], counts

    assert plays(script, max_num_seqs=2) == [(12, 0), (1 + 20, 12 + turn_lengths[0] - 1), (1, 20)]


def test_slots_that_were_released_are_no_source(plays):
    def script(play):
        gone = play.start(tokens(9, 40))
        counts = [play.run(gone)]
        play.engine.release(gone)
        # The next gets its slot and joins together with one that begins alike, when there is nothing to copy yet.
        first, other = play.start(tokens(1, 30)), play.start(tokens(1, 20) + tokens(2, 15))
        assert play.engine._slots.free[-1] == 0
        counts.append(play.run(first, other))
        again = play.start(tokens(9, 40))
        counts.append(play.run(again))
        return [gone, first, other, again], counts

    assert plays(script) == [(40, 0), (30 + 35, 0), (40, 0)]


def test_discarded_tokens_are_never_copied(plays, tokenizer):
    """With `stop_at_tags` off, more is cached than kept until the observation overwrites it."""
    prompt, discarded = tokens(1, 12) + tokenizer.encode(" "), []

    def script(play):
        first, other = play.start(prompt), play.start(prompt)
        counts = [play.run(first, other)]
        discarded.append(play.engine.statistics.num_discarded_tokens)
        play.resume(first, tokens(3, 40) + tokens(4, 5))  # both join at the next step
        play.resume(other, tokens(3, 40) + tokens(5, 5))
        counts.append(play.run(first, other))
        assert first.token_pieces[1].tolist() == other.token_pieces[1].tolist()
        return [first, other], counts

    assert plays(script, stop_at_tags=False) == [(13 + 1, 12), (2 * (1 + 45), 0)]
    assert discarded == [2 * 16] * 2


def test_what_was_discarded_is_no_prefix(plays, tokenizer):
    prompt, num_kept = tokens(1, 12) + tokenizer.encode(" "), []

    def script(play):
        first = play.start(prompt)
        counts = [play.run(first)]
        table, kept = play.engine._slots, len(first.token_pieces[1])
        sampled = table.turn_tokens[first.slot, : table.turn_count[first.slot]]
        again = play.start(prompt, sampled[: kept + 6].tolist(), tokens(3, 4))  # as if six of them had been kept
        counts.append(play.run(again))
        num_kept.append(kept)
        return [first, again], counts

    assert plays(script, stop_at_tags=False) == [(13, 0), (1 + 6 + 4, 13 + 8 - 1)]
    assert num_kept == [8, 8]


def test_equal_lengths_with_one_other_token_are_not_shared_behind_it(plays):
    def script(play):
        prompt = tokens(1, 30)
        swapped = prompt[:10] + [prompt[11], prompt[10]] + prompt[12:]
        first, other = play.start(prompt), play.start(swapped)
        counts = [play.run(first, other)]
        third = play.start(swapped[:20])
        counts.append(play.run(third))
        return [first, other, third], counts

    assert plays(script) == [(60, 0), (1, 19)]


# ---------------------------------------------------------------------------------------------------- staying behind


def test_a_follower_stays_behind_once_whatever_becomes_of_the_leader(make_model, tokenizer, config, make_requests):
    changed = config.model_copy(update={"max_turn_tokens": 1, "max_searches": 0, "max_num_seqs": 8})
    loop = SearchLoop(Engine(make_model(4), tokenizer, changed), None)
    loop.run(make_requests(6, group_size=6))  # each leaves with its slot after the step at which it joined
    assert loop.statistics.num_steps == 2
    assert loop.statistics.num_shared_tokens == 0


def test_a_slot_is_kept_for_who_stays_behind(plays):
    def script(play):
        first, twin, other = play.start(tokens(1, 12)), play.start(tokens(1, 12)), play.start(tokens(5, 10))
        play.step()
        assert (first.slot is None, other.slot is None) == (False, True)
        play.step()
        assert twin.slot is not None
        play.run(first, twin)
        play.engine.release(first)
        play.run(other)
        return [first, twin, other], [play.counts()]

    assert plays(script, max_num_seqs=2) == [(12 + 1 + 10, 11)]


def test_no_step_is_spent_on_waiting_for_a_part(plays):
    def script(play):
        first, part = play.start(tokens(1, 30)), play.start(tokens(1, 20) + tokens(2, 15), limit=1)
        counts = [play.run(part)]
        assert play.engine.statistics.num_steps == 1
        counts.append(play.run(first))
        return [first, part], counts

    assert plays(script) == [(30 + 35, 0), (0, 0)]
