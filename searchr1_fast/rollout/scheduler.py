"""Decide which sequences run at the next step, on which tokens, and where their keys and values go.

Running sequences advance by one token. Sequences whose turn is to begin join as the token budget, the slots and the
blocks allow. What a sequence has in common with one that holds a slot is not recomputed: whole blocks are shared, and
the rest is copied. So the cache holds the prompt of a GRPO group once, and the observations of those of its samples
that have written the same so far once too (prefixes.py).

When blocks run short, the sequences that got their slots last lose their cache, in the middle of a turn if need be, and
rejoin when there is room. The only cost is recomputing it, which is counted: sampled tokens are kept, and every step
samples some.

Shape legend
    S  sequences of a step    T  their new tokens    C  slots    n  blocks or tokens
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from searchr1_fast.rollout.prefixes import Match, longest_cached
from searchr1_fast.rollout.sequence import Sequence, SequenceStatus
from searchr1_fast.rollout.slot_table import SlotTable
from searchr1_fast.rollout.statistics import RolloutStatistics

# Prompts and observations join a step up to this many tokens in all, to bound the activations of one forward pass.
MAX_PREFILL_TOKENS = 16384


class PrefixCopy(NamedTuple):
    """Copy places `start` to `end` of block `source` to the same places of block `target`."""

    source: int
    target: int
    start: int
    end: int


class Batch(NamedTuple):
    """One step's work: the running sequences, then the joining ones."""

    slots: np.ndarray  # [S] int64
    token_ids: np.ndarray  # [T] int64; -1: what the slot's sequence sampled last, which the host may not know yet
    lengths: np.ndarray  # [S] int64, adding up to T
    num_running: int  # how many of the sequences were running already
    changes: list[np.ndarray]  # to the block tables: slots, numbers, blocks, [n] int64 each; or empty
    copies: list[PrefixCopy]  # to be made before the forward pass
    only_decodes: bool  # whether the step is one token per sequence, each into a block of its own, and nothing else


class Scheduler:
    """The queues, and the slots of the sequences in them. Without `share_prefixes`, each computes all of its tokens."""

    def __init__(self, table: SlotTable, *, share_prefixes: bool = True) -> None:
        self.share_prefixes = share_prefixes
        self.statistics = RolloutStatistics()
        self.reset(table)

    def reset(self, table: SlotTable) -> None:
        """Forget every sequence."""
        self.table = table
        self._waiting: deque[Sequence] = deque()  # hold no slot
        self._resumed: deque[Sequence] = deque()  # hold one
        self.running = np.empty(0, dtype=np.int64)  # [S] slots, in the order in which they joined

    @property
    def has_work(self) -> bool:
        """Whether a sequence can run. One that waits for a slot, or for blocks held by searching ones, cannot."""
        if len(self.running) or self._resumed:
            return True
        if not self._waiting or not self.table.free:
            return False
        return not self.table.blocks.counts.any() or self._has_room(self._waiting[0], 0, ())

    @property
    def num_waiting(self) -> int:
        """How many sequences hold no slot."""
        return len(self._waiting)

    @property
    def can_run_ahead(self) -> bool:
        """Whether the next step can be launched before it is known which turns the last one ended.

        It can if some sequence runs on and there are blocks for all that do, so that none loses unread tokens.
        """
        return len(self.running) > 0 and len(self._running_full()) <= self.table.blocks.num_free

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Take new sequences."""
        self._waiting.extend(sequences)

    def resume(self, sequence: Sequence) -> None:
        """Take back a sequence whose turn ended."""
        sequence.status = SequenceStatus.WAITING
        (self._waiting if sequence.slot is None else self._resumed).append(sequence)

    def schedule(self) -> Batch:
        """Choose the sequences of the next step, and their tokens."""
        self._extend_running()
        grown = self.table.blocks.take_changes()
        running, last_tokens = self.running, np.full(len(self.running), -1)
        self.statistics.num_steps += 1
        self.statistics.num_decode_tokens += len(running)
        lengths = np.ones(len(running), dtype=np.int64)
        if not self._resumed and not (self._waiting and self.table.free):
            return Batch(running, last_tokens, lengths, len(running), grown, [], only_decodes=True)
        joining, copies = self._admit()
        pieces = [self.table.uncached_tokens(sequence) for sequence in joining]
        for sequence in joining:
            sequence.is_interrupted = False
        sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self.statistics.num_prefill_tokens += int(sizes.sum())
        self.statistics.num_recomputed_tokens += sum(max(0, s.num_computed - s.num_cached) for s in joining)
        joined = self.table.blocks.take_changes()
        changes = [np.concatenate(parts) for parts in zip(grown, joined, strict=True)] if grown and joined else None
        return Batch(
            slots=np.concatenate((running, np.array([sequence.slot for sequence in joining], dtype=np.int64))),
            token_ids=np.concatenate((last_tokens, *pieces)),
            lengths=np.concatenate((lengths, sizes)),
            num_running=len(running),
            changes=changes or grown or joined,
            copies=copies,
            only_decodes=bool((sizes == 1).all()) and not copies and not joined,
        )

    def register(self, sequence: Sequence) -> None:
        """Let other sequences find what this one's slot holds, or will hold after this step."""
        if self.share_prefixes:
            prefixes = self.table.prefixes
            prefixes.append(sequence.slot, sequence.tokens_from(prefixes.num_tokens(sequence.slot)))

    # ------------------------------------------------------------------------------------------------------- joining

    def _admit(self) -> tuple[list[Sequence], list[PrefixCopy]]:
        """Admit resumed sequences, then waiting ones, as the token budget, the free slots and the free blocks allow.

        Only what another slot had before this step is shared, because copies are made before the forward pass.
        """
        table, budget, num_reserved = self.table, MAX_PREFILL_TOKENS, 0
        had = table.num_cached.tolist()  # [C]
        joining: dict[int, Sequence] = {}  # by slot
        copies: list[PrefixCopy] = []
        behind: list[Sequence] = []
        while self._resumed or (self._waiting and num_reserved < len(table.free)):
            queue = self._resumed or self._waiting
            sequence = queue[0]
            matches = self._match(sequence)
            num_shared, holder = longest_cached(matches, had)
            end = max(sequence.num_cached, num_shared)
            if _stays_behind(sequence, end, matches, joining):
                sequence.stayed_behind = True
                num_reserved += sequence.slot is None
                behind.append(queue.popleft())
                continue
            if joining and table.length(sequence) - end > budget:
                break
            if not self._has_room(sequence, end, joining):
                if joining or len(self.running):
                    break
                self._preempt_youngest(besides=sequence.slot)
                had = table.num_cached.tolist()
                continue
            budget -= table.length(sequence) - end
            copies += self._join(queue.popleft(), holder, end)
            joining[sequence.slot] = sequence
        for sequence in reversed(behind):
            (self._waiting if sequence.slot is None else self._resumed).appendleft(sequence)
        return list(joining.values()), copies

    def _match(self, sequence: Sequence) -> list[Match]:
        """Find which slots share how much of a sequence, but for its last token: what follows it must be predicted."""
        if not self.share_prefixes:
            return []
        prefixes = self.table.prefixes
        matches = prefixes.match(sequence.slot, sequence.tokens_from(prefixes.num_tokens(sequence.slot)))
        return [(min(length, sequence.length - 1), slots) for length, slots in matches]

    def _join(self, sequence: Sequence, holder: int, end: int) -> list[PrefixCopy]:
        """Give a sequence its slot, its blocks, and up to `end` what slot `holder` has; return what is to be copied."""
        table, start = self.table, sequence.num_cached
        slot = table.admit(sequence)
        copies = self._share(holder, slot, start, end, table.length(sequence))
        self.statistics.num_shared_tokens += end - start
        sequence.num_cached = table.num_cached[slot] = end
        if not sequence.is_interrupted:
            table.begin_turn(sequence)
        self.register(sequence)
        sequence.status, sequence.stayed_behind = SequenceStatus.RUNNING, False
        return copies

    def _share(self, source: int, target: int, start: int, end: int, length: int) -> list[PrefixCopy]:
        """Share the blocks that are the same up to their end, allocate the others, and return what is to be copied."""
        blocks = self.table.blocks
        size = blocks.block_size
        first, last = start // size, end // size
        if end > start and last > first:
            blocks.adopt(source, target, first, last)
            start = last * size
        blocks.extend(target, length)
        if end <= start:
            return []
        pair = int(blocks.table[source, last]), int(blocks.table[target, last])
        return [PrefixCopy(*pair, start - last * size, end - last * size)]

    # ---------------------------------------------------------------------------------------------------- running short

    def _has_room(self, sequence: Sequence, end: int, joining: Collection[int]) -> bool:
        """Whether there are blocks for a sequence of which everything before `end` is there already.

        There must also be one block for each sequence that runs or joins (`joining`: slots): otherwise the newcomer
        would be the next to lose its cache.
        """
        table, blocks = self.table, self.table.blocks
        count = 0 if sequence.slot is None else int(blocks.counts[sequence.slot])
        wanted = blocks.num_needed(table.length(sequence)) - max(count, end // blocks.block_size)
        going_on = np.concatenate((self.running, np.fromiter(joining, np.int64, len(joining))))
        growing = np.count_nonzero(blocks.counts[going_on] < blocks.table.shape[1])
        return wanted <= 0 or wanted + growing <= blocks.num_free

    def _extend_running(self) -> None:
        """Give every running sequence room for its next token, preempting others where blocks run short."""
        blocks = self.table.blocks
        while True:
            full = self._running_full()
            if len(full) <= blocks.num_free:
                blocks.extend_each(full)
                return
            # If only one runs, it is spared: it would rejoin at this very step, with blocks of those that do not run.
            self._preempt_youngest(besides=int(self.running[0]) if len(self.running) == 1 else None)

    def _running_full(self) -> np.ndarray:  # [n] int64
        """The slots of running sequences whose next token needs a block that they do not have yet."""
        table, blocks = self.table, self.table.blocks
        return self.running[table.num_cached[self.running] == blocks.counts[self.running] * blocks.block_size]

    def _preempt_youngest(self, besides: int | None = None) -> None:
        """Take the blocks of the sequence that got its slot last, among those that have blocks. If it was running, it
        rejoins before all others. Slot `besides` is spared."""
        table = self.table
        candidates = np.flatnonzero(table.blocks.counts)
        candidates = candidates[candidates != (-1 if besides is None else besides)]
        slot = int(candidates[table.arrival[candidates].argmax()])
        sequence = table.occupants[slot]
        table.drop_cache(sequence)
        self.statistics.num_preemptions += 1
        if slot in self.running:
            self.running = self.running[self.running != slot]
            sequence.is_interrupted, sequence.status = True, SequenceStatus.WAITING
            self._resumed.appendleft(sequence)


def copied_places(copies: list[PrefixCopy]) -> list[np.ndarray]:
    """Return source block, target block and place of every copied token, [n] int64 each; [] if none is copied."""
    if not copies:
        return []
    sources, targets, starts, ends = np.array(copies, dtype=np.int64).T
    lengths = ends - starts
    offsets = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    places = np.arange(len(offsets)) + offsets
    return [np.repeat(sources, lengths), np.repeat(targets, lengths), places]


def _stays_behind(sequence: Sequence, num_cached: int, matches: list[Match], joining: dict[int, Sequence]) -> bool:
    """Whether a sequence waits a step because one that joins now computes all but its last token, which it can share.

    It waits only once, whatever becomes of the other. A sequence that would share less joins at once: it has tokens of
    its own to compute, and others may want to share them.
    """
    last = sequence.length - 1
    if sequence.stayed_behind or sequence.is_interrupted or num_cached == last:
        return False
    return any(length == last and not joining.keys().isdisjoint(slots) for length, slots in matches)
