"""Record when each trajectory of a replay was generated, searched for, or waiting for others.

Shape legend
    N  trajectories
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from searchr1_fast.rollout import Engine, VllmEngine
from searchr1_fast.rollout.sequence import Sequence as Rollout

COLORS = {"generate": "#2a6f97", "search": "#e07a1f", "idle": "#d9d9d9"}


class Span(NamedTuple):
    """A span of one trajectory's time, in seconds from the start of the run."""

    place: int
    what: str  # a key of COLORS
    begin: float
    end: float


class Timeline:
    """Spans of every trajectory, written while they run. A turn begins when it is given to the engine, so one that
    waits for a slot counts as being generated."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._started = time.perf_counter()
        self._turn_began: dict[int, float] = {}  # by place
        self._turn_ended: dict[int, float] = {}  # by sequence
        self._given_back: dict[int, float] = {}  # by place

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    @contextmanager
    def watching(self, engine: Engine | VllmEngine) -> Iterator[None]:
        """Note when turns end in the middle of a `step`: the lock-step twin's goes on until the last turn has ended."""
        if not isinstance(engine, Engine):
            yield
            return
        end_turn = engine._end_turn

        def noted(slot: int) -> Rollout:
            sequence = end_turn(slot)
            self._turn_ended[id(sequence)] = self.now()
            return sequence

        engine._end_turn = noted
        try:
            yield
        finally:
            del engine._end_turn

    def begin_turn(self, place: int) -> None:
        """Note that the engine has been given a turn."""
        self._turn_began[place] = self.now()

    def end_turn(self, place: int, sequence: Rollout) -> None:
        """Note that the engine has given it back."""
        ended = self._turn_ended.pop(id(sequence), self.now())
        self.spans.append(Span(place, "generate", self._turn_began.pop(place), ended))
        self._given_back[place] = ended

    def search(self, places: list[int], begin: float) -> None:
        """Note that passages for these are there, asked for at `begin`; they had waited since their turns ended."""
        now = self.now()
        for place in places:
            waited = Span(place, "idle", self._given_back.pop(place), begin)
            self.spans += [waited, Span(place, "search", begin, now)]

    def summary(self) -> dict[str, float]:
        """Return the seconds that 50 and 99 % of the trajectories took at most, and the shares of all their time."""
        ends: dict[int, float] = {}
        totals = dict.fromkeys(COLORS, 0.0)
        for span in self.spans:
            if span.what == "generate":
                ends[span.place] = span.end
            totals[span.what] += span.end - span.begin
        latencies = np.array(list(ends.values()))  # [N]
        whole = sum(totals.values())
        shares = {f"{what}_share": seconds / whole for what, seconds in totals.items()}
        return {f"latency_p{percent}": float(np.percentile(latencies, percent)) for percent in (50, 99)} | shares


def draw(timelines: dict[str, Timeline], title: str, path: Path) -> Path:
    """Draw a panel per provider, with a line per trajectory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, panels = pyplot.subplots(
        len(timelines), 1, figsize=(9, 1 + 1.5 * len(timelines)), sharex=True, squeeze=False, layout="constrained"
    )
    for (name, timeline), axes in zip(timelines.items(), panels[:, 0], strict=True):
        for what, color in COLORS.items():
            for place in {span.place for span in timeline.spans}:
                own = [(s.begin, s.end - s.begin) for s in timeline.spans if (s.place, s.what) == (place, what)]
                axes.broken_barh(own, (place, 1), facecolors=color, linewidth=0)
        summary = timeline.summary()
        axes.set_title(f"{name}: {summary['idle_share']:.0%} of the time waiting for others", loc="left", fontsize=9)
        axes.set_ylabel("trajectory", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("seconds")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    handles = [Patch(color=color, label=what) for what, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
