"""What the engine knows about the sequence in each slot, in numpy arrays, so that a step costs a few gathers.

Shape legend
    C  cache slots    N  tokens that a turn may have at most
"""

from __future__ import annotations

import numpy as np

from searchr1_fast.rollout.block_tables import BlockTables
from searchr1_fast.rollout.prefixes import PrefixTree
from searchr1_fast.rollout.sequence import Sequence
from searchr1_fast.rollout.stop import START


class SlotTable:
    """One row per slot; `blocks` and `prefixes` say what a slot's cache holds, and which other slots begin with it."""

    def __init__(self, max_turn_tokens: int, blocks: BlockTables) -> None:
        num_slots = len(blocks.counts)
        self.occupants: list[Sequence | None] = [None] * num_slots
        self.free = list(range(num_slots))[::-1]
        self.blocks = blocks
        self.prefixes = PrefixTree()
        self.num_cached = np.zeros(num_slots, dtype=np.int64)  # [C]
        self.arrival = np.zeros(num_slots, dtype=np.int64)  # [C]: larger for a sequence that got its slot later
        self.stop_state = np.zeros(num_slots, dtype=np.uint8)  # [C]
        self.stream_key = np.zeros(num_slots, dtype=np.uint64)  # [C]
        self.stream_start = np.zeros(num_slots, dtype=np.uint64)  # [C]: policy tokens before the turn
        self.turn_count = np.zeros(num_slots, dtype=np.int64)  # [C]: tokens of the turn so far, read or under way
        self.turn_limit = np.zeros(num_slots, dtype=np.int64)  # [C]
        self.turn_tokens = np.zeros((num_slots, max_turn_tokens), dtype=np.int64)  # [C, N]
        self.turn_logprobs = np.zeros((num_slots, max_turn_tokens), dtype=np.float32)  # [C, N]
        self._num_arrivals = 0

    def __len__(self) -> int:
        return len(self.occupants)

    def admit(self, sequence: Sequence) -> int:
        """Return a sequence's slot, giving it a free one if it has none."""
        if sequence.slot is None:
            sequence.slot = self.free.pop()
            self.occupants[sequence.slot] = sequence
            self.arrival[sequence.slot] = self._num_arrivals
            self._num_arrivals += 1
        return sequence.slot

    def begin_turn(self, sequence: Sequence) -> None:
        """Set a sequence's row for a turn of which nothing is sampled yet."""
        assert 0 < sequence.turn_limit <= self.turn_tokens.shape[1]
        slot = sequence.slot
        self.stop_state[slot] = START
        self.stream_key[slot] = sequence.stream_key
        self.stream_start[slot] = sequence.num_policy_tokens
        self.turn_count[slot] = 0
        self.turn_limit[slot] = sequence.turn_limit

    def uncached_tokens(self, sequence: Sequence) -> np.ndarray:  # [n] int64
        """Return what the model must see before the sequence can go on. Never empty: its last token is not cached."""
        assert sequence.num_cached < sequence.length
        tokens = sequence.tokens_from(sequence.num_cached)
        if not sequence.is_interrupted:
            return tokens
        return np.concatenate((tokens, self.turn_tokens[sequence.slot, : self.turn_count[sequence.slot]]))

    def length(self, sequence: Sequence) -> int:
        """The length of a sequence, tokens of an interrupted turn included."""
        return sequence.length + (int(self.turn_count[sequence.slot]) if sequence.is_interrupted else 0)

    def drop_cache(self, sequence: Sequence) -> None:
        """Forget what a sequence has cached; it keeps its slot."""
        slot = sequence.slot
        sequence.num_computed = max(sequence.num_computed, int(self.num_cached[slot]))
        self.blocks.release(slot)
        sequence.num_cached = self.num_cached[slot] = 0

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's slot and forget its cache."""
        slot = sequence.slot
        self.occupants[slot] = None
        self.free.append(slot)
        self.prefixes.remove(slot)
        self.blocks.release(slot)
        self.num_cached[slot] = 0
        sequence.slot, sequence.num_cached = None, 0
