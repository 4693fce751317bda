"""Fit what the environment says into a token budget.

The original cuts an observation's ids at the budget, and so loses `</information>` and half a passage. Here whole
passages are left out, worst first, and the tag is always closed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from searchr1_fast.models import TextTokenizer
from searchr1_fast.protocol import format_observation
from searchr1_fast.types import Passage


class Text(NamedTuple):
    """Text of the environment and its ids."""

    text: str
    token_ids: list[int]


def encode(text: str, tokenizer: TextTokenizer) -> Text:
    """Return the text with its ids."""
    return Text(text, tokenizer.encode(text))


def fit_observation(passages: Sequence[Passage], tokenizer: TextTokenizer, max_tokens: int) -> Text | None:
    """Make an observation of as many passages as fit, in order; None if not even an empty observation fits.

    If the first passage alone is too long, it is cut at a word; if its title alone is, nothing of it is shown.
    """
    for count in range(len(passages), 0, -1):
        observation = encode(format_observation(passages[:count]), tokenizer)
        if len(observation.token_ids) <= max_tokens:
            return observation
    observation = _fit_first(passages[0], tokenizer, max_tokens) if passages else None
    if observation is None:
        observation = encode(format_observation([]), tokenizer)
    return observation if len(observation.token_ids) <= max_tokens else None


def _fit_first(passage: Passage, tokenizer: TextTokenizer, max_tokens: int) -> Text | None:
    """Make an observation of one passage and as many of its words as fit, found by bisection; None if its title does
    not."""
    ends = [0, *(match.end() for match in re.finditer(r"\S+", passage.text))]
    best, low, high = None, 0, len(ends)  # fewer than `low` words fit; `high` are too many
    while low < high:
        middle = (low + high) // 2
        cut = replace(passage, text=passage.text[: ends[middle]])
        observation = encode(format_observation([cut]), tokenizer)
        if len(observation.token_ids) <= max_tokens:
            best, low = observation, middle + 1
        else:
            high = middle
    return best
