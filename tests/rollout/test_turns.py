"""What follows from what the policy wrote: the policy is scripted, and everything else is real."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from searchr1_fast.config import RolloutConfig
from searchr1_fast.models import DecoderConfig
from searchr1_fast.protocol import INVALID_ACTION_MESSAGE, format_observation
from searchr1_fast.rollout import Engine, RolloutRequest, SearchLoop
from searchr1_fast.types import Action, FinishReason, Passage, Question

PASSAGES = [Passage("p1", "Oak", "an oak is a tree"), Passage("p2", "Elm", "an elm is another")]
SEARCH, ANSWER = "<search> oak </search>", "<answer>yes</answer>"


class ScriptedModel:
    """Writes given turns, token by token; a chunk of several tokens is taken as the beginning of the next turn."""

    def __init__(self, turns: list[list[int]], vocab_size: int) -> None:
        self.config = DecoderConfig(vocab_size, 8, 8, 1, 1, 1)
        self.head_weight = torch.eye(vocab_size) * 100
        self.turns, self.by_slot = turns, {}

    def forward_cached(self, token_ids, cu_seqlens, slots, start_positions, cache, host_lengths=None):
        bounds = cu_seqlens.tolist()
        following = []
        for i, (slot, start) in enumerate(zip(slots.tolist(), start_positions.tolist(), strict=True)):
            chunk = token_ids[bounds[i] : bounds[i + 1]].tolist()
            if start == 0:
                self.by_slot[slot] = [iter(turn) for turn in self.turns]
            elif len(chunk) > 1:
                self.by_slot[slot].pop(0)
            following.append(next(self.by_slot[slot][0]))
        return torch.eye(self.config.vocab_size)[following]


@pytest.fixture
def play(tokenizer):
    """(turns as texts or ids, changes to the configuration) -> trajectory, queries."""

    def play(turns, search=None, **changes):
        config = RolloutConfig(**{"max_searches": 2, "max_turn_tokens": 200, "max_observation_tokens": 200} | changes)
        prompt = "Question: oak?\n"
        # After its text a scripted turn would go on for ever; if it is not stopped, the filler shows.
        filler = tokenizer.encode("z") * 1000
        script = [(tokenizer.encode(turn) if isinstance(turn, str) else turn) + filler for turn in turns]
        model = ScriptedModel(script, tokenizer.vocab_size)
        queries = []

        def fake(batch):
            queries.extend(batch)
            return [PASSAGES for _ in batch]

        loop = SearchLoop(Engine(model, tokenizer, config), search or fake)
        request = RolloutRequest(Question("q1", "oak?", ("yes",), "test"), 0, prompt, seed=1)
        return loop.run([request])[0], queries

    return play


def kinds(trajectory):
    return [text for _, text in trajectory.segments[1:]]


def test_search_then_answer(play):
    trajectory, queries = play(["I think. " + SEARCH, "So " + ANSWER])
    assert queries == ["oak"]
    assert kinds(trajectory) == ["I think. " + SEARCH, format_observation(PASSAGES), "So " + ANSWER]
    assert trajectory.finish_reason is FinishReason.ANSWER
    assert trajectory.num_searches == 1
    assert [(t.action, t.content, t.passage_ids) for t in trajectory.turns] == [
        (Action.SEARCH, "oak", ("p1", "p2")),
        (Action.ANSWER, "yes", None),
    ]


def test_the_token_that_completes_the_tag_is_kept_whole(play, tokenizer):
    straddling = tokenizer.encode("<search>oak</search") + tokenizer.encode(">\n\n")
    assert len(tokenizer.encode(">\n\n")) == 1
    trajectory, queries = play([straddling, ANSWER])
    assert queries == ["oak"]
    assert kinds(trajectory)[0] == "<search>oak</search>\n\n"
    turn = trajectory.turns[0]
    assert trajectory.token_ids[turn.start : turn.end].tolist() == straddling


def test_an_invalid_turn_is_told_so_and_counts(play):
    trajectory, queries = play(["hm</search>", "<search> </search>", SEARCH])
    assert queries == []
    assert kinds(trajectory) == [
        "hm</search>",
        INVALID_ACTION_MESSAGE,
        "<search> </search>",
        INVALID_ACTION_MESSAGE,
        SEARCH,
    ]
    assert [turn.action for turn in trajectory.turns] == [Action.INVALID, Action.INVALID, Action.SEARCH]
    assert trajectory.finish_reason is FinishReason.NO_ANSWER
    assert trajectory.num_searches == 0


def test_the_final_turn_is_announced_and_its_search_is_not_executed(play):
    trajectory, queries = play([SEARCH, SEARCH, SEARCH], final_turn_message="\nAnswer.\n")
    assert len(queries) == 2
    assert trajectory.num_searches == 2
    assert kinds(trajectory)[-3:] == [format_observation(PASSAGES), "\nAnswer.\n", SEARCH]
    assert kinds(trajectory).count("\nAnswer.\n") == 1
    assert trajectory.finish_reason is FinishReason.NO_ANSWER


def test_without_searches_the_first_turn_is_the_final_one(play):
    trajectory, queries = play([SEARCH], max_searches=0, final_turn_message="Answer.")
    assert kinds(trajectory) == ["Answer.", SEARCH]
    assert queries == []
    assert trajectory.finish_reason is FinishReason.NO_ANSWER
    assert not trajectory.loss_mask[: trajectory.turns[0].start].any()


def test_eos_ends_a_turn_and_is_a_policy_token(play, tokenizer):
    trajectory, _ = play([tokenizer.encode("hm") + [tokenizer.eos_id], [tokenizer.eos_id], ANSWER])
    assert kinds(trajectory) == ["hm", INVALID_ACTION_MESSAGE, "", INVALID_ACTION_MESSAGE, ANSWER]
    for turn in trajectory.turns[:2]:
        assert trajectory.token_ids[turn.end - 1] == tokenizer.eos_id
        assert trajectory.loss_mask[turn.end - 1]
    assert trajectory.finish_reason is FinishReason.ANSWER


def test_every_token_that_ends_a_turn_does(play, tokenizer, monkeypatch):
    (other,) = tokenizer.encode("!")
    monkeypatch.setattr(tokenizer, "eos_ids", (tokenizer.eos_id, other))
    trajectory, _ = play([tokenizer.encode("hm") + [other], [tokenizer.eos_id], ANSWER])
    assert kinds(trajectory) == ["hm", INVALID_ACTION_MESSAGE, "", INVALID_ACTION_MESSAGE, ANSWER]
    assert trajectory.token_ids[trajectory.turns[0].end - 1] == other
    assert trajectory.loss_mask[trajectory.turns[0].end - 1]


def test_a_turn_ends_at_its_budget(play, tokenizer):
    size = len(tokenizer.encode(ANSWER))
    cut, _ = play([ANSWER, ANSWER, ANSWER], max_turn_tokens=size - 1)
    assert [turn.end - turn.start for turn in cut.turns] == [size - 1] * 3
    assert cut.finish_reason is FinishReason.NO_ANSWER
    assert cut.turns[0].action is Action.INVALID
    whole, _ = play([ANSWER], max_turn_tokens=size)
    assert whole.finish_reason is FinishReason.ANSWER


def test_a_turn_ends_at_the_budget_of_the_sequence(play, tokenizer):
    prompt = len(tokenizer.encode("Question: oak?\n"))
    trajectory, _ = play(["zzz"], max_sequence_tokens=prompt + 7)
    assert trajectory.response_length == 7
    assert trajectory.finish_reason is FinishReason.LENGTH
    size = len(tokenizer.encode(ANSWER))
    trajectory, _ = play([ANSWER], max_sequence_tokens=prompt + size)
    assert trajectory.finish_reason is FinishReason.ANSWER


def test_observations_shrink_to_what_is_left(play, tokenizer):
    before = len(tokenizer.encode("Question: oak?\n")) + len(tokenizer.encode(SEARCH))
    one, empty = (len(tokenizer.encode(format_observation(shown))) for shown in (PASSAGES[:1], []))
    trajectory, _ = play([SEARCH, "z"], max_sequence_tokens=before + one + 1)
    assert kinds(trajectory) == [SEARCH, format_observation(PASSAGES[:1]), "z"]
    assert trajectory.finish_reason is FinishReason.LENGTH
    assert trajectory.turns[0].passage_ids == ("p1", "p2")
    trajectory, _ = play([SEARCH, "z"], max_sequence_tokens=before + empty + 1)
    assert kinds(trajectory) == [SEARCH, format_observation([]), "z"]
    trajectory, queries = play([SEARCH], max_sequence_tokens=before + empty)
    assert trajectory.finish_reason is FinishReason.LENGTH
    assert queries == []
    trajectory, _ = play([SEARCH, ANSWER], max_observation_tokens=one)
    assert kinds(trajectory)[1] == format_observation(PASSAGES[:1])


def test_room_is_kept_for_the_final_message(play, tokenizer):
    message = "\nAnswer.\n"
    before = len(tokenizer.encode("Question: oak?\n")) + len(tokenizer.encode(SEARCH))
    one, final = len(tokenizer.encode(format_observation(PASSAGES[:1]))), len(tokenizer.encode(message))
    settings = {"max_searches": 1, "final_turn_message": message}
    trajectory, _ = play([SEARCH, "z"], max_sequence_tokens=before + one + final + 1, **settings)
    assert kinds(trajectory) == [SEARCH, format_observation(PASSAGES[:1]), message, "z"]


def test_an_invalid_turn_without_room_for_the_message_ends_it(play, tokenizer):
    before = len(tokenizer.encode("Question: oak?\n")) + len(tokenizer.encode("a</search>"))
    size = len(tokenizer.encode(INVALID_ACTION_MESSAGE))
    trajectory, _ = play(["a</search>"], max_sequence_tokens=before + size)
    assert kinds(trajectory) == ["a</search>"]
    assert trajectory.finish_reason is FinishReason.LENGTH


def test_nothing_found_is_an_empty_observation(play):
    trajectory, _ = play([SEARCH, ANSWER], search=lambda queries: [[] for _ in queries])
    assert kinds(trajectory)[1] == format_observation([]) == "\n\n<information></information>\n\n"
    assert trajectory.finish_reason is FinishReason.ANSWER


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failed_search_ends_the_run_and_leaves_the_engine_usable(
    make_model, tokenizer, config, make_requests, fake_search, overlap
):
    def failing(queries):
        raise ConnectionError("no route to the retriever")

    engine = Engine(make_model(4), tokenizer, config.model_copy(update={"overlap": overlap}))
    with pytest.raises(ConnectionError, match="no route") as caught:
        SearchLoop(engine, failing).run(make_requests(8))
    assert "a search for" in caught.value.__notes__[0]
    again = SearchLoop(engine, fake_search).run(make_requests(8))
    fresh = SearchLoop(Engine(make_model(4), tokenizer, config), fake_search).run(make_requests(8))
    assert [t.token_ids.tolist() for t in again] == [t.token_ids.tolist() for t in fresh]


def test_a_search_function_that_loses_queries_is_refused(play):
    with pytest.raises(ValueError, match="0 results for 1 queries"):
        play([SEARCH, ANSWER], search=lambda queries: [])


def test_mistakes_in_the_configuration_are_named(play, tokenizer, make_model, config, fake_search):
    with pytest.raises(ValueError, match="leaves no room in rollout.max_sequence_tokens"):
        play([ANSWER], max_sequence_tokens=5)
    with pytest.raises(ValueError, match="rollout.max_observation_tokens is 3"):
        play([ANSWER], max_observation_tokens=3)
    engine = Engine(make_model(0), tokenizer, config)
    question = Question("q9", "?", ("x",), "test")
    with pytest.raises(ValueError, match="'q9' is empty"):
        SearchLoop(engine, fake_search).run([RolloutRequest(question, 0, "", 0)])
    small = ScriptedModel([], tokenizer.vocab_size - 1)
    with pytest.raises(ValueError, match="tokenizer has"):
        Engine(small, tokenizer, config)


def test_progress_counts_up_to_all(make_model, tokenizer, config, make_requests, fake_search):
    calls = []
    loop = SearchLoop(Engine(make_model(4), tokenizer, config), fake_search)
    loop.run(make_requests(9), progress=lambda finished, total: calls.append((finished, total)))
    assert calls == sorted(set(calls))
    assert calls[-1] == (9, 9)
    assert loop.run([]) == []


def test_memory_can_be_given_back_between_runs(make_model, tokenizer, config, make_requests, fake_search):
    engine = Engine(make_model(4), tokenizer, config)
    first = SearchLoop(engine, fake_search).run(make_requests(7))
    engine.free_cache()
    assert engine._cache is None
    again = SearchLoop(engine, fake_search).run(make_requests(7))
    assert [dataclasses.astuple(t)[2].tolist() for t in first] == [dataclasses.astuple(t)[2].tolist() for t in again]
