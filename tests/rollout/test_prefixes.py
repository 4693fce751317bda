"""The tree of prefixes against a scan of everything it was told, and the copying of cache places against a loop."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_fast.models import DecoderConfig, KVCache
from searchr1_fast.rollout.prefixes import PrefixTree, longest_cached

TOKENS = st.lists(st.integers(0, 2), max_size=7)
SLOTS = st.integers(0, 4)
HASH_MODULUS = sys.hash_info.modulus  # of integers: 2**61 - 1


def as_tokens(values):
    return np.array(values, dtype=np.int64)


def num_shared(first, second):
    same = [a == b for a, b in zip(first, second, strict=False)]
    return same.index(False) if False in same else len(same)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["append", "append", "remove", "match"]), SLOTS, TOKENS), max_size=30),
    st.lists(st.integers(0, 12), min_size=5, max_size=5),
)
def test_the_tree_finds_what_a_scan_finds(operations, num_cached):
    tree, known = PrefixTree(), {}
    for operation, slot, values in operations:
        if operation == "append":
            tree.append(slot, as_tokens(values))
            known[slot] = known.get(slot, []) + values
        elif operation == "remove":
            tree.remove(slot)
            known.pop(slot, None)
        else:
            for asking in (slot, None):  # as a continuation of that slot, and as a sequence of its own
                whole = known.get(asking, []) + values
                matches = tree.match(asking, as_tokens(values))
                lengths = [length for length, _ in matches]
                assert lengths == sorted(lengths, reverse=True)
                found = {}
                for length, slots in matches:
                    for other in slots:
                        found.setdefault(other, length)
                expected = {other: num_shared(whole, tokens) for other, tokens in known.items()}
                assert found == {other: length for other, length in expected.items() if length}
                usable = {other: min(length, num_cached[other]) for other, length in expected.items()}
                length, holder = longest_cached(matches, num_cached)
                assert length == max(usable.values(), default=0)
                assert holder == -1 if length == 0 else usable[holder] == length
        assert [tree.num_tokens(s) for s in range(5)] == [len(known.get(s, [])) for s in range(5)]
    for slot in range(5):
        tree.remove(slot)
    assert not tree._root.children  # nothing is kept of slots that are gone


def test_tokens_decide_and_not_their_hash():
    other = 5 + HASH_MODULUS
    assert hash(other) == hash(5)
    tree = PrefixTree()
    tree.append(0, as_tokens([5, 1, 5, 7]))
    assert tree.match(None, as_tokens([other, 1, 5, 7])) == []
    assert [length for length, _ in tree.match(None, as_tokens([5, 1, other, 7]))] == [2]
    tree.append(1, as_tokens([other, 1, 5, 7]))
    assert [(length, list(slots)) for length, slots in tree.match(None, as_tokens([5, 1, 5]))] == [(3, [0])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_places_are_copied_and_no_others(dtype):
    config = DecoderConfig(11, 24, 8, 3, 6, 2)
    cache = KVCache(config, num_slots=5, max_length=9, dtype=dtype)  # one block each
    for memory in (*cache.keys, *cache.values):
        memory.normal_()
    expected = [memory.clone() for memory in (*cache.keys, *cache.values)]
    ranges = [(3, 0, 2, 7), (3, 1, 0, 9), (2, 4, 8, 9), (0, 2, 0, 2)]  # slot 0 is read before 2, and written after it
    for source, target, start, end in ranges:
        for memory in expected:
            memory[target, :, start:end] = memory[source, :, start:end].clone()
    rows = [(s, t, place) for s, t, start, end in ranges for place in range(start, end)]
    cache.copy(*torch.tensor(rows).T)
    for memory, reference in zip((*cache.keys, *cache.values), expected, strict=True):
        assert torch.equal(memory, reference)
