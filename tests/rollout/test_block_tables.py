"""Which slot holds which block, against a model of lists and sets; and which blocks are handed back."""

from __future__ import annotations

import numpy as np
import pytest

from searchr1_fast.rollout.block_tables import BlockTables


def check(tables: BlockTables, expected: list[list[int]], device: np.ndarray, num_blocks: int) -> None:
    """Check all that the tables tell; `device` is a copy that follows their changes."""
    changes = tables.take_changes()
    if changes:
        slots, numbers, blocks = changes
        device[slots, numbers] = blocks
    assert tables.take_changes() == []
    held = {block for blocks in expected for block in blocks}
    assert tables.num_free == num_blocks - len(held)
    for slot, blocks in enumerate(expected):
        assert tables.counts[slot] == len(blocks)
        assert tables.table[slot, : len(blocks)].tolist() == device[slot, : len(blocks)].tolist() == blocks


@pytest.mark.parametrize("seed", range(5))
def test_tables_follow_their_model(seed):
    rng = np.random.default_rng(seed)
    num_slots, width, size, num_blocks = 6, 5, 4, 17
    tables = BlockTables(num_slots, width * size - 1, size, num_blocks)
    expected: list[list[int]] = [[] for _ in range(num_slots)]
    device = np.full((num_slots, width), -1)
    happened = set()
    for _ in range(600):
        slot, other = rng.choice(num_slots, 2, replace=False).tolist()
        before = set(tables._free[: tables.num_free].tolist())
        action = rng.choice(["extend", "extend_each", "adopt", "release"])
        if action == "extend":
            num_tokens = int(rng.integers(0, width * size))
            missing = max(0, tables.num_needed(num_tokens) - len(expected[slot]))
            if missing > tables.num_free:
                continue
            tables.extend(slot, num_tokens)
            got = tables.table[slot, len(expected[slot]) : len(expected[slot]) + missing].tolist()
            assert len(set(got)) == missing
            assert before.issuperset(got)
            expected[slot] += got
        elif action == "extend_each":
            slots = [s for s in range(num_slots) if len(expected[s]) < width][: tables.num_free]
            tables.extend_each(np.array(slots, dtype=np.int64))
            got = [int(tables.table[s, len(expected[s])]) for s in slots]
            assert len(set(got)) == len(slots)
            assert before.issuperset(got)
            for s, block in zip(slots, got, strict=True):
                expected[s].append(block)
        elif action == "adopt":
            begin = int(rng.integers(0, len(expected[other]) + 1))
            end = int(rng.integers(begin, len(expected[other]) + 1))
            if begin > len(expected[slot]) or begin == end:
                continue
            tables.adopt(other, slot, begin, end)
            expected[slot][begin:end] = expected[other][begin:end]
        else:
            tables.release(slot)
            expected[slot] = []
        happened.add(action)
        check(tables, expected, device, num_blocks)
    assert len(happened) == 4
    for slot in range(num_slots):
        tables.release(slot)
    assert tables.num_free == num_blocks
    assert sorted(tables._free.tolist()) == list(range(num_blocks))


def test_a_block_is_free_when_nobody_has_it_any_more():
    tables = BlockTables(3, 8, 4, 4)
    tables.extend(0, 8)
    tables.adopt(0, 1, 0, 2)
    tables.adopt(1, 2, 0, 1)
    for slot, num_free in ((0, 2), (1, 3), (2, 4)):
        tables.release(slot)
        assert tables.num_free == num_free


def test_the_block_given_back_last_is_taken_first():
    tables = BlockTables(2, 8, 4, 6)
    tables.extend(0, 8)
    had = tables.table[0].tolist()
    tables.release(0)
    tables.extend(1, 8)
    assert tables.table[1].tolist() == had


def test_a_cache_too_small_for_one_sequence_is_no_cache():
    with pytest.raises(AssertionError, match="one sequence of any length"):
        BlockTables(2, 9, 4, 2)
