"""The stop automaton against a search for the tag in the whole text."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_fast.protocol import STOP_TAGS
from searchr1_fast.rollout.stop import START, StopMatcher, vocabulary_bytes


def first_end(pieces: list[bytes], tags: tuple[str, ...]) -> int | None:
    """-> number of tokens up to the one that completes the first tag."""
    text = b""
    for count, piece in enumerate(pieces, start=1):
        text += piece
        if any(tag.encode() in text for tag in tags):
            return count
    return None


def check(token_bytes: list[bytes], token_ids: list[int], tags: tuple[str, ...]) -> int | None:
    matcher = StopMatcher(token_bytes, tags)
    expected = first_end([token_bytes[i] for i in token_ids], tags)
    assert matcher.find(np.array(token_ids, dtype=np.int64)) == expected
    states, ended = np.array([START], dtype=np.uint8), None
    for count, token_id in enumerate(token_ids, start=1):
        states = matcher.advance(states, np.array([token_id]))
        if ended is None and states[0] == matcher.matched:
            ended = count
        assert (states[0] == matcher.matched) == (ended is not None)  # once found, found for good
    assert ended == expected
    return expected


@st.composite
def cut_texts(draw):
    """-> text full of tags and of prefixes of tags, cut at random into tokens of a vocabulary made of the pieces."""
    parts = ["<", "</", "</sea", "</search", "</search>", "</answer>", "</answe", "r>", ">", "é", "x", "<search>", "\n"]
    text = "".join(draw(st.lists(st.sampled_from(parts), max_size=14))).encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=len(text))))
    bounds = [0, *cuts, len(text)]
    return [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


@settings(max_examples=150, deadline=None)
@given(cut_texts())
def test_any_tokenisation_is_stopped_at_the_first_tag(pieces):
    vocabulary = sorted({*pieces, b"", b"zz"})
    check(vocabulary, [vocabulary.index(piece) for piece in pieces], STOP_TAGS)


@settings(max_examples=150, deadline=None)
@given(
    tags=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple),
    pieces=st.lists(st.text("abc", max_size=4), max_size=20),
)
def test_any_tags_that_overlap_or_contain_each_other(tags, pieces):
    vocabulary = sorted({piece.encode() for piece in pieces})
    check(vocabulary, [vocabulary.index(piece.encode()) for piece in pieces], tags)


def test_tokens_that_straddle_a_tag(tokenizer):
    token_bytes = [b"</", b"search", b">\n\n", b"></", b"answer", b"<", b"/search>x</answer>", "é".encode()[:1]]
    cases = [
        ([0, 1, 2, 7], 3),
        ([0, 1, 3, 4, 2], 3),
        ([5, 6], 2),
        ([0, 4, 3], 3),
        ([0, 7, 1, 2], None),
        ([0, 0, 1, 2], 4),
    ]
    for token_ids, expected in cases:
        assert check(token_bytes, token_ids, STOP_TAGS) == expected


def test_every_way_to_write_a_tag_with_a_real_vocabulary(tokenizer):
    vocabulary = vocabulary_bytes(tokenizer, tokenizer.vocab_size + 5)
    assert vocabulary[-5:] == [b""] * 5
    assert len(vocabulary) == tokenizer.vocab_size + 5
    text = "ö<search>who</search>"
    token_ids = tokenizer.encode(text)
    assert b"".join(vocabulary[i] for i in token_ids).decode() == text
    assert check(vocabulary, token_ids, STOP_TAGS) == len(token_ids)
    by_bytes = [vocabulary.index(bytes([byte])) for byte in text.encode()]
    assert check(vocabulary, by_bytes, STOP_TAGS) == len(by_bytes)


def test_sequences_are_independent(tokenizer):
    vocabulary = [b"</", b"search", b"answer", b">", b"x"]
    matcher = StopMatcher(vocabulary)
    rows = np.array([[0, 1, 3], [0, 2, 3], [0, 1, 4], [4, 1, 3]])
    states = np.full(4, START, dtype=np.uint8)
    for column in rows.T:
        states = matcher.advance(states, column)
    assert (states == matcher.matched).tolist() == [True, True, False, False]
