"""A failed search ends the run or, if configured so, the sequences that asked; the others are not affected."""

from __future__ import annotations

import numpy as np
import pytest

from searchr1_fast.rollout import Engine, SamplingParams, SearchLoop
from searchr1_fast.types import FinishReason, SearchError

COOL = SamplingParams(temperature=0.5)


class Failing:
    """A search function whose every `period`-th call fails."""

    def __init__(self, search, period: int, error: type[Exception] = SearchError):
        self.search, self.period, self.error = search, period, error
        self.num_calls = self.num_failed = 0

    def __call__(self, queries):
        self.num_calls += 1
        if self.num_calls % self.period == 0:
            self.num_failed += len(queries)
            raise self.error(f"call {self.num_calls} found the index gone")
        return self.search(queries)


@pytest.fixture
def loop(make_model, tokenizer, config, fake_search):
    """search, changes -> a loop over the same model."""
    model = make_model(4)

    def make(search=fake_search, run_ahead=False, **changes) -> SearchLoop:
        changed = config.model_copy(update={"max_num_seqs": 24} | changes)
        return SearchLoop(Engine(model, tokenizer, changed, COOL, run_ahead=run_ahead), search)

    return make


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_dropped_sequences_leave_the_others_as_they_were(loop, make_requests, fake_search, overlap, run_ahead):
    requests, search, reported = make_requests(24, group_size=4), Failing(fake_search, 3), []
    expected = loop().run(requests)
    failing = loop(search, on_search_error="drop", overlap=overlap, max_num_seqs=7, run_ahead=run_ahead)
    trajectories = failing.run(requests, lambda done, _: reported.append(done))
    dropped = [t.finish_reason is FinishReason.SEARCH_FAILED for t in trajectories]
    assert sum(dropped) == search.num_failed == failing.statistics.num_failed_searches > 0
    assert not all(dropped)
    for one, other, is_dropped in zip(expected, trajectories, dropped, strict=True):
        length = len(other.token_ids)
        np.testing.assert_array_equal(one.token_ids[:length], other.token_ids)
        assert is_dropped or (one.turns, one.finish_reason) == (other.turns, other.finish_reason)
        assert not is_dropped or (other.turns[-1].passage_ids is None and length < len(one.token_ids))
    assert reported == sorted(reported)
    assert reported[-1] == len(requests)
    assert str(failing.last_error).endswith("found the index gone")
    assert len(failing.engine._slots.free) == len(failing.engine._slots)


@pytest.mark.parametrize("overlap", [False, True])
def test_by_default_the_run_stops(loop, make_requests, fake_search, overlap):
    with pytest.raises(SearchError, match="call 3 found the index gone") as error:
        loop(Failing(fake_search, 3), overlap=overlap).run(make_requests(24))
    assert "this ended the rollout: a search for" in error.value.__notes__[0]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_fault_of_the_search_function_stops_in_any_case(loop, make_requests, fake_search, overlap):
    with pytest.raises(KeyError, match="call 3"):
        loop(Failing(fake_search, 3, KeyError), overlap=overlap, on_search_error="drop").run(make_requests(24))


def test_a_search_that_never_works_leaves_those_who_do_not_search(loop, make_requests, fake_search):
    """Whether such a step can be learned from is for train.py to decide, which knows all ranks."""
    search = Failing(fake_search, 1)
    failing = loop(search, on_search_error="drop")
    reasons = [t.finish_reason for t in failing.run(make_requests(24))]
    assert 0 < reasons.count(FinishReason.SEARCH_FAILED) == failing.statistics.num_failed_searches < 24
    assert failing.statistics.num_searches == 0
    assert not hasattr(failing.last_error, "__notes__")  # it did not end the rollout
    failing.search = fake_search
    failing.run(make_requests(24))
    assert failing.last_error is None
