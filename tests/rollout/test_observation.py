"""Observations within a budget: whole passages, always closed, and never more than requested."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_fast.protocol import OBSERVATION_CLOSE, OBSERVATION_OPEN, format_observation
from searchr1_fast.rollout.observation import fit_observation
from searchr1_fast.types import Passage

words = st.text("abé ", min_size=0, max_size=30)
passage_lists = st.lists(st.builds(Passage, st.just("1"), words, words), max_size=4)


@settings(max_examples=100, deadline=None)
@given(passages=passage_lists, budget=st.integers(0, 160))
def test_the_longest_that_fits_is_shown(tokenizer, passages, budget):
    observation = fit_observation(passages, tokenizer, budget)
    size = lambda text: len(tokenizer.encode(text))  # noqa: E731
    if observation is None:
        assert size(format_observation([])) > budget
        return
    assert observation.token_ids == tokenizer.encode(observation.text)
    assert len(observation.token_ids) <= budget
    assert observation.text.startswith(OBSERVATION_OPEN)
    assert observation.text.endswith(OBSERVATION_CLOSE)
    whole = [format_observation(passages[:count]) for count in range(1, len(passages) + 1)]
    fitting = [text for text in whole if size(text) <= budget]
    if fitting:
        assert observation.text == fitting[-1]
    elif passages and size(format_observation([Passage("1", passages[0].title, "")])) <= budget:
        body = observation.text.removeprefix(OBSERVATION_OPEN).removesuffix(OBSERVATION_CLOSE)
        assert body
        assert whole[0].removeprefix(OBSERVATION_OPEN).startswith(body.rstrip())
    else:
        assert observation.text == format_observation([])


def test_a_long_first_passage_is_cut_at_a_word(tokenizer):
    passage = Passage("1", "Oak", "an oak is a tree that grows slowly")
    size = len(tokenizer.encode(format_observation([passage])))
    observation = fit_observation([passage, passage], tokenizer, size - 1)
    assert observation.text == format_observation([Passage("1", "Oak", "an oak is a tree that grows")])
