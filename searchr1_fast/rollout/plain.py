"""The lock-step twin of the engine, for tests and for the benchmark: how Search-R1 generates.

One `step` is one turn of every sequence: each whole context is prefilled again, and the turn lasts until the slowest
sequence has ended it; then the cache is thrown away. Within a turn the twin is as good as the engine (it is the
engine), as the original calls a batching engine for each turn. With `stop_at_tags` off it also generates past a turn's
end, as the original does. Tokens, log-probabilities and trajectories are the engine's.
"""

from __future__ import annotations

from searchr1_fast.rollout.engine import Engine
from searchr1_fast.rollout.sequence import Sequence


class PlainEngine(Engine):
    """Generates turn by turn, all sequences abreast, keeping nothing between turns."""

    share_prefixes = False

    def step(self) -> list[Sequence]:
        """One turn of every sequence that has something to say, in the order in which they ended it."""
        ended = []
        while self.has_work:
            ended += super().step()
        return ended

    def _end_turn(self, slot: int) -> Sequence:
        """Throw the sequence's cache away; its slot goes to one that waits."""
        sequence = super()._end_turn(slot)
        self.release(sequence)
        return sequence
