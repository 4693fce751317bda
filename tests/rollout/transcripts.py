"""Split a finished Search-R1 transcript into what the policy wrote and what the environment wrote.

This is for transcripts that exist only as text: published outputs of others, and logs. Our own rollouts never need it,
as their mask is made where the tokens are made. The two writers are told apart by position: generation stops at
`</search>`, so the environment writes right after it and nowhere else. An `<information>` block anywhere else was made
up by the policy and stays policy text.

Not handled are transcripts of engines that do not stop at `</search>`, and observations that were cut before they
closed (the original cuts at 500 tokens, `</information>` included): there the text cannot tell who wrote what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from searchr1_fast.protocol import (
    INVALID_ACTION_MESSAGE,
    OBSERVATION_CLOSE,
    OBSERVATION_OPEN,
    extract_answer,
    parse_action,
)
from searchr1_fast.types import Action

_SEARCH_CLOSE = "</search>"


@dataclass(frozen=True, slots=True)
class Transcript:
    """`segments` are ("policy" | "observation", text) in order; joined, their texts are the response."""

    segments: tuple[tuple[str, str], ...]
    searches: tuple[str, ...]  # queries that the environment answered
    answer: str | None  # the last closed <answer> of the policy, stripped
    num_invalid: int  # invalid-action messages of the environment

    @property
    def policy_text(self) -> str:
        """Everything the policy wrote, with turns joined by a newline, as in `Trajectory.policy_text`."""
        return _policy_text(self.segments)


def parse_transcript(response: str) -> Transcript:
    """Split everything after the prompt by writer; never fails, and text that fits no pattern is the policy's."""
    segments: list[tuple[str, str]] = []
    searches: list[str] = []
    num_invalid = 0
    turn_start = search_from = 0
    while (close := response.find(_SEARCH_CLOSE, search_from)) >= 0:
        turn_end = search_from = close + len(_SEARCH_CLOSE)
        turn = response[turn_start:turn_end]
        action, content = parse_action(turn)
        observation_end = _observation_end(response, turn_end, action)
        if observation_end == turn_end:
            continue
        segments += [("policy", turn), ("observation", response[turn_end:observation_end])]
        if action is Action.SEARCH:
            searches.append(content)
        else:
            num_invalid += 1
        turn_start = search_from = observation_end
    if turn_start < len(response):
        segments.append(("policy", response[turn_start:]))
    return Transcript(tuple(segments), tuple(searches), extract_answer(_policy_text(segments)), num_invalid)


def _policy_text(segments: Iterable[tuple[str, str]]) -> str:
    return "\n".join(text for kind, text in segments if kind == "policy")


def _observation_end(response: str, start: int, action: Action) -> int:
    """-> where the environment's text that begins at `start` ends; `start` if the environment wrote nothing there."""
    if action is Action.SEARCH and response.startswith(OBSERVATION_OPEN, start):
        close = response.find(OBSERVATION_CLOSE, start)
        return close + len(OBSERVATION_CLOSE) if close >= 0 else start
    if action is Action.INVALID and response.startswith(INVALID_ACTION_MESSAGE, start):
        return start + len(INVALID_ACTION_MESSAGE)
    return start
