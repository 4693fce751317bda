"""Find the end of a turn while it is being sampled: the first `</search>` or `</answer>` in the bytes of its tokens.

A tag is ordinary text: it is several tokens, and need not begin or end where a token does. ">\\n\\n" may end it, "></"
may end it and carry on, and a multi-byte character may be half in one token. So the matcher is a finite automaton over
bytes. What each token does to each state is tabulated once, which leaves one look-up per sampled token, in one numpy
gather for all sequences. A token is kept whole: a turn ends after the token that completes the tag.

Shape legend
    S  sequences    V  vocabulary    A  states of the automaton    B  bytes of all tokens, end to end
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from searchr1_fast.models import TextTokenizer
from searchr1_fast.protocol import STOP_TAGS

START = 0


def vocabulary_bytes(tokenizer: TextTokenizer, vocab_size: int) -> list[bytes]:
    """Return the bytes of every id below `vocab_size`; b"" for ids that the model has and the tokenizer has not.

    ValueError if the tokenizer has more ids than the model.
    """
    known = tokenizer.vocab_size
    if known > vocab_size:
        raise ValueError(
            f"the tokenizer has {known} tokens and the model only {vocab_size}; give the tokenizer that the model was "
            "trained with"
        )
    return [tokenizer.token_bytes(token_id) for token_id in range(known)] + [b""] * (vocab_size - known)


class StopMatcher:
    """The automaton of a set of tags, tabulated over a vocabulary. States are small integers, `START` the first."""

    def __init__(self, token_bytes: Sequence[bytes], tags: Sequence[str] = STOP_TAGS) -> None:
        encoded = [tag.encode() for tag in tags]
        assert encoded
        assert all(encoded)
        prefixes = sorted({tag[:length] for tag in encoded for length in range(len(tag))}, key=len)
        self.matched = len(prefixes)  # the state after a whole tag; nothing leaves it
        assert self.matched < 256
        self._table = _tabulate(_byte_transitions(prefixes, encoded), token_bytes)

    def advance(
        self,
        states: np.ndarray,  # [S] uint8
        token_ids: np.ndarray,  # [S] int64
    ) -> np.ndarray:  # [S] uint8
        """Return the states after one more token each."""
        return self._table[states, token_ids]

    def find(self, token_ids: np.ndarray) -> int | None:  # [n] int64
        """Count the tokens, from `START`, that it takes to complete the first tag; None if there is none."""
        state = START
        for count, token_id in enumerate(token_ids.tolist(), start=1):
            state = self._table[state, token_id]
            if state == self.matched:
                return count
        return None


def _byte_transitions(prefixes: list[bytes], tags: list[bytes]) -> np.ndarray:  # [A, 256] uint8
    """The automaton of Aho and Corasick (1975): a state is the longest suffix of the text that is a prefix of a tag."""
    state_of = {prefix: state for state, prefix in enumerate(prefixes)}
    transitions = np.full((len(prefixes) + 1, 256), START, dtype=np.uint8)  # START: where a byte of no tag leads
    transitions[-1] = len(prefixes)
    for prefix, state in state_of.items():
        for byte in set(b"".join(tags)):
            text = prefix + bytes([byte])
            if text.endswith(tuple(tags)):
                transitions[state, byte] = len(prefixes)
            else:
                suffixes = (text[start:] for start in range(len(text) + 1))
                transitions[state, byte] = next(state_of[suffix] for suffix in suffixes if suffix in state_of)
    return transitions


def _tabulate(
    transitions: np.ndarray,  # [A, 256] uint8
    token_bytes: Sequence[bytes],
) -> np.ndarray:  # [A, V] uint8
    """Run every token from every state, all tokens at once, byte by byte."""
    lengths = np.array([len(token) for token in token_bytes], dtype=np.int64)
    offsets = np.concatenate(([0], lengths.cumsum()))[:-1]
    flat = np.frombuffer(b"".join(token_bytes), dtype=np.uint8)  # [B]
    longest_first = np.argsort(-lengths, kind="stable")
    table = np.repeat(np.arange(len(transitions), dtype=np.uint8)[:, None], len(token_bytes), axis=1)
    for place in range(int(lengths.max(initial=0))):
        tokens = longest_first[: np.count_nonzero(lengths > place)]
        table[:, tokens] = transitions[table[:, tokens], flat[offsets[tokens] + place]]
    return table
