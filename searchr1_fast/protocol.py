"""What policy and environment write to each other: tags, actions, observations. Text only, no tokens.

The tags are Search-R1's (arXiv 2503.09516, table 1) and are ordinary text in every tokenizer. A turn's action is the
first `<search>…</search>` or `<answer>…</answer>` pair in it, as in the original.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from searchr1_fast.types import Action, Passage

STOP_TAGS = ("</search>", "</answer>")

OBSERVATION_OPEN = "\n\n<information>"
OBSERVATION_CLOSE = "</information>\n\n"

# The wording is Search-R1's: released checkpoints were trained on it, so it is part of the protocol.
INVALID_ACTION_MESSAGE = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)

_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def parse_action(turn_text: str) -> tuple[Action, str]:
    """The action of one policy turn and its stripped content; an empty query is invalid."""
    match = _ACTION.search(turn_text)
    if match is None:
        return Action.INVALID, ""
    action, content = Action(match.group(1)), match.group(2).strip()
    if action is Action.SEARCH and not content:
        return Action.INVALID, ""
    return action, content


def extract_answer(policy_text: str) -> str | None:
    """The last closed `<answer>` in text that the policy wrote, stripped; None if there is none.

    Never pass the prompt: the original did, and scored the prompt's example answer, "Beijing", for silent models.
    """
    matches = _ANSWER.findall(policy_text)
    return matches[-1].strip() if matches else None


def format_passage(rank: int, passage: Passage) -> str:
    """One line of an observation; `rank` counts from 1."""
    return f'Doc {rank}(Title: "{passage.title}") {passage.text}\n'


def format_observation(passages: Sequence[Passage]) -> str:
    """The whole observation, always closed."""
    documents = "".join(format_passage(rank, passage) for rank, passage in enumerate(passages, start=1))
    return f"{OBSERVATION_OPEN}{documents.strip()}{OBSERVATION_CLOSE}"
