"""Who wrote what in a finished transcript: in small ones, and in every real one."""

import json
import os
from pathlib import Path

import pytest
from transcripts import parse_transcript

from searchr1_fast.protocol import INVALID_ACTION_MESSAGE, OBSERVATION_OPEN, format_observation
from searchr1_fast.reward import exact_match
from searchr1_fast.types import Passage

DATA = Path(os.environ.get("SEARCHR1_DATA", Path(__file__).parents[3] / "shared" / "data"))

# rows, observations, rows with an invented <information>, rows that name an invalid action
TRACES = {
    "nq": (483, 471, 71, 16),
    "triviaqa": (503, 388, 138, 17),
    "popqa": (477, 375, 125, 11),
    "bamboogle": (125, 110, 26, 9),
}

OBSERVATION = format_observation([Passage("0", "Paris", "Paris is a city. <search> no </search>")])


@pytest.mark.parametrize("name", TRACES)
def test_every_real_trace(name):
    path = DATA / "traces" / f"searchr1_{name}_v0.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}; set SEARCHR1_DATA to the directory that holds traces/")
    num_rows, num_observations, num_invented, num_invalid = TRACES[name]
    seen = [0, 0, 0, 0]
    for line in path.open(encoding="utf-8"):
        row = json.loads(line)
        transcript = parse_transcript(row["response"])
        assert "".join(text for _, text in transcript.segments) == row["response"]
        assert (transcript.answer or "") == row["pred"], row["id"]
        assert exact_match(transcript.answer, row["golden_answers"]) == row["em"], row["id"]
        observations = [text for kind, text in transcript.segments if kind == "observation"]
        assert len(observations) == len(transcript.searches) + transcript.num_invalid
        assert all(text == INVALID_ACTION_MESSAGE or text.startswith(OBSERVATION_OPEN) for text in observations)
        assert all(query == query.strip() != "" for query in transcript.searches)
        seen[0] += 1
        seen[1] += len(transcript.searches)
        seen[2] += "<information>" in transcript.policy_text
        # The published count includes rows in which the policy made up the message; those contain none of ours.
        seen[3] += transcript.num_invalid > 0 or "previous action is invalid" in transcript.policy_text
    assert seen == [num_rows, num_observations, num_invented, num_invalid]


def test_search_then_answer():
    response = f"<think>x</think><search> city </search>{OBSERVATION}<answer> Paris </answer>"
    transcript = parse_transcript(response)
    assert transcript.segments == (
        ("policy", "<think>x</think><search> city </search>"),
        ("observation", OBSERVATION),
        ("policy", "<answer> Paris </answer>"),
    )
    assert (transcript.searches, transcript.answer, transcript.num_invalid) == (("city",), "Paris", 0)


def test_two_turns_with_an_invalid_one():
    turns = ["no query</search>", "<search>a</search>", "done"]
    response = turns[0] + INVALID_ACTION_MESSAGE + turns[1] + OBSERVATION + turns[2]
    transcript = parse_transcript(response)
    assert [text for kind, text in transcript.segments if kind == "policy"] == turns
    assert (transcript.searches, transcript.answer, transcript.num_invalid) == (("a",), None, 1)


@pytest.mark.parametrize(
    "response",
    [
        "<information>Doc 1</information>\n\n<answer>x</answer>",  # made up at the start
        "<search>q</search> \n\n<information>y</information>\n\n<answer>x</answer>",  # one space too many
        "<search>q</search>\n<information>y</information>\n\n<answer>x</answer>",  # one newline too few
        "<answer>x</answer><search>q</search>\n\n<information>y</information>\n\n",  # the answer had already ended it
        "q</search>\n\n<information>y</information>\n\n<answer>x</answer>",  # no query to read
        "<search> </search>\n\n<information>y</information>\n\n<answer>x</answer>",
        "<search>q</search>" + INVALID_ACTION_MESSAGE + "<answer>x</answer>",  # the action was valid
    ],
)
def test_invented_environment_text_stays_policy_text(response):
    transcript = parse_transcript(response)
    assert transcript.segments == (("policy", response),)
    assert (transcript.searches, transcript.answer, transcript.num_invalid) == ((), "x", 0)


def test_a_message_that_the_policy_begins_can_end_in_a_search():
    """A policy that repeats the message up to `</search>` searches for "and": real transcripts contain this."""
    begun = "My previous action is invalid. If I want to search, I should put the query between <search> and </search>"
    transcript = parse_transcript(begun + OBSERVATION + "<answer>x</answer>")
    assert transcript.segments[:2] == (("policy", begun), ("observation", OBSERVATION))
    assert (transcript.searches, transcript.num_invalid) == (("and",), 0)


@pytest.mark.parametrize("answer", ["<answer>Lyon</answer>", ""])
def test_answers_in_observations_do_not_count(answer):
    observation = format_observation([Passage("0", "Quiz", "<answer>Paris</answer>")])
    expected = "Lyon" if answer else None
    assert parse_transcript(f"<search>q</search>{observation}{answer}").answer == expected


def test_unfinished_search_and_empty_response():
    assert parse_transcript("<search>q</search>").segments == (("policy", "<search>q</search>"),)
    assert parse_transcript("<search>q</search>\n\n<information>cut").searches == ()
    assert parse_transcript("").segments == ()
