"""The lock-step twin of the engine, for tests and for the benchmark: it generates as Search-R1 does.

One `step` is one turn of every sequence. Each whole context is prefilled again, the turn lasts until the slowest
sequence has ended it, and then the cache is thrown away. Within a turn the twin is as good as the engine (it is the
engine), because the original calls a batching engine for each turn. With `stop_at_tags` off it also generates past a
turn's end, as the original does. Tokens, log-probabilities and trajectories are the same as the engine's.
"""

from __future__ import annotations

from searchr1_fast.rollout.engine import Engine
from searchr1_fast.rollout.sequence import Sequence


class PlainEngine(Engine):
    """Generates turn by turn, all sequences together, and keeps nothing between turns."""

    share_prefixes = False

    def step(self) -> list[Sequence]:
        """Run one turn of every sequence that has one to sample; return them in the order in which they ended it."""
        ended = []
        while self.has_work:
            ended += super().step()
        return ended

    def _end_turn(self, slot: int) -> Sequence:
        """End the turn and throw the sequence's cache away; its slot goes to a waiting one."""
        sequence = super()._end_turn(slot)
        self.release(sequence)
        return sequence
