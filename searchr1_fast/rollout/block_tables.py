"""Track, on the host, which blocks of the KV cache each slot has, and how many slots have each block.

A block is a few places of one sequence, or of several that begin alike; a slot that writes into a block has it alone.
The device has its own copy of the tables (`KVCache.table`); `take_changes` returns what it still lacks.

Shape legend
    C  slots    W  blocks that a slot may have    P  blocks    B  places of a block    n  some of any of them
"""

from __future__ import annotations

import numpy as np


class BlockTables:
    """Hands out blocks, the last one given back first, as it may still be in the processor's cache."""

    def __init__(self, num_slots: int, max_length: int, block_size: int, num_blocks: int) -> None:
        width = -(-max_length // block_size)
        assert num_slots == 0 or num_blocks >= width, "one sequence of any length must fit"
        self.block_size = block_size
        self.table = np.zeros((num_slots, width), dtype=np.int64)  # [C, W]
        self.counts = np.zeros(num_slots, dtype=np.int64)  # [C]: blocks that a slot has
        self.num_free = num_blocks
        self._free = np.arange(num_blocks)[::-1].copy()  # [P]: the first `num_free` are free
        self._num_holders = np.zeros(num_blocks, dtype=np.int64)  # [P]
        self._changed: list[tuple[np.ndarray, np.ndarray]] = []  # slots and numbers, [n] int64 each

    def num_needed(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def extend(self, slot: int, num_tokens: int) -> None:
        """Give a slot the blocks that it lacks for `num_tokens` tokens; `num_free` must suffice."""
        begin, end = int(self.counts[slot]), self.num_needed(num_tokens)
        if end > begin:
            self._set(np.full(end - begin, slot), np.arange(begin, end), self._take(end - begin))
            self.counts[slot] = end

    def extend_each(self, slots: np.ndarray) -> None:  # [n] int64, all different
        """Give each slot one more block; `num_free` must suffice."""
        if len(slots):
            self._set(slots, self.counts[slots], self._take(len(slots)))
            self.counts[slots] += 1

    def adopt(self, source: int, target: int, begin: int, end: int) -> None:
        """Replace blocks `begin` to `end` of `target`, which has at least `begin`, by those of `source`."""
        had = int(self.counts[target])
        assert begin <= had
        assert end <= self.counts[source]
        adopted = self.table[source, begin:end]
        self._num_holders[adopted] += 1  # first, as the same block may be given back and adopted
        self._give_back(self.table[target, begin : min(had, end)].copy())
        self._set(np.full(end - begin, target), np.arange(begin, end), adopted)
        self.counts[target] = max(had, end)

    def release(self, slot: int) -> None:
        """Take all of a slot's blocks back."""
        self._give_back(self.table[slot, : self.counts[slot]])
        self.counts[slot] = 0

    def take_changes(self) -> list[np.ndarray]:
        """Return slots, numbers and blocks, [n] int64 each, of the entries set since the last call; [] if none was."""
        if not self._changed:
            return []
        slots, numbers = (np.concatenate(parts) for parts in zip(*self._changed, strict=True))
        self._changed.clear()
        return [slots, numbers, self.table[slots, numbers]]

    def _set(self, slots: np.ndarray, numbers: np.ndarray, blocks: np.ndarray) -> None:  # [n] int64 each
        self.table[slots, numbers] = blocks
        self._changed.append((slots, numbers))

    def _take(self, count: int) -> np.ndarray:  # [count] int64
        assert count <= self.num_free
        self.num_free -= count
        blocks = self._free[self.num_free : self.num_free + count][::-1].copy()
        self._num_holders[blocks] = 1
        return blocks

    def _give_back(self, blocks: np.ndarray) -> None:  # [n] int64, all different
        self._num_holders[blocks] -= 1
        freed = blocks[self._num_holders[blocks] == 0][::-1]
        self._free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)
