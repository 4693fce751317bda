"""Make random weights write given turns: real texts with real queries, of the lengths of Search-R1's traces.

Random weights never write a tag. So the engine is given, sequence by sequence, what each turn says, and takes the
script's token instead of the one that was sampled. Everything else is done as usual: the forward pass, the sampling,
finding the end of the turn, the search for the query in it. Only the log-probability that is kept is not real: it is
that of the token that was sampled.

The number of policy tokens of a turn is drawn from quantiles of 361 turns of a released Search-R1 instruct model on
Bamboogle, and of the final turn from its last turns; observations are what the search gives, cut as in training.

Shape legend
    C  cache slots    N  tokens that a turn may have    S  sequences of a step    n  tokens of a turn
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from searchr1_fast.models import TextTokenizer
from searchr1_fast.rollout import Engine, PlainEngine
from searchr1_fast.rollout.engine import Launched
from searchr1_fast.rollout.scheduler import Batch
from searchr1_fast.rollout.transfers import Receipt

# The most tokens that a share of turns have: the traces' 10, 50, 90 and 99 % and their longest, in tokens of Qwen2.5's
# tokenizer. The shortest is ours: what an action without a thought takes.
_SHARES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
SEARCHING, ANSWERING = (8, 27, 50, 80, 101, 117), (8, 31, 41, 60, 92, 111)
_FILLER = " so"


@dataclass(frozen=True, slots=True)
class Workload:
    """A published workload: questions of a step, samples of each, searches before the answer."""

    questions: int
    group_size: int
    searches: int


WORKLOADS = {"A": Workload(512, 4, 1), "B": Workload(512, 5, 3)}

Script = list[np.ndarray]  # a trajectory's turns, [n] int64 each


def write_scripts(
    seeds: Sequence[int], queries: Sequence[str], searches: int, tokenizer: TextTokenizer, seed: int = 0
) -> dict[int, Script]:
    """Write a script for each trajectory's seed, with queries drawn from `queries`."""
    rng = np.random.default_rng(seed)
    scripts = {}
    for one in seeds:
        turns = [
            _write(tokenizer, f"<search> {rng.choice(queries)} </search>", int(_draw(rng, SEARCHING)))
            for _ in range(searches)
        ]
        turns.append(_write(tokenizer, "<answer> x </answer>", int(_draw(rng, ANSWERING))))
        scripts[one] = turns
    return scripts


def _draw(rng: np.random.Generator, quantiles: Sequence[int]) -> float:
    return np.round(np.interp(rng.random(), _SHARES, quantiles))


def _write(tokenizer: TextTokenizer, action: str, length: int) -> np.ndarray:  # -> [n] int64
    """Write a thought, then the action: as many tokens as wanted, or what the action alone takes."""
    opening, filler, closing = (tokenizer.encode(text) for text in ("<think>", _FILLER, f" </think> {action}"))
    missing = max(0, length - len(opening) - len(closing))
    filling = (filler * (missing // len(filler) + 1))[:missing]
    return np.array(opening + filling + closing, dtype=np.int64)


class Scripted:
    """An engine whose tokens are those of `scripts`, which has a script for each request's seed."""

    scripts: Mapping[int, Script]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.scripts = {}
        super().__init__(*arguments, **options)

    def _allocate(self, num_slots: int) -> None:
        super()._allocate(num_slots)
        self._script = np.zeros_like(self._slots.turn_tokens)  # [C, N]
        self._length = np.zeros(num_slots, dtype=np.int64)  # [C]

    def _replay(self, batch: Batch, randoms: np.ndarray) -> Receipt:  # [S] fp64
        return super()._replay(self._dictate(batch), randoms)

    def _run(self, batch: Batch, randoms: np.ndarray) -> Receipt:  # [S] fp64
        return super()._run(self._dictate(batch), randoms)

    def _dictate(self, batch: Batch) -> Batch:
        """Let running sequences continue from the script's tokens, not from what they sampled on the device."""
        counts = self._slots.turn_count[batch.slots]
        for slot in batch.slots[counts == 0].tolist():
            sequence = self._slots.occupants[slot]
            turn = self.scripts[sequence.request.seed][len(sequence.turns)]
            self._length[slot] = len(turn)
            self._script[slot, : len(turn)] = turn
        token_ids, running = batch.token_ids.copy(), slice(batch.num_running)
        token_ids[running] = self._written(batch.slots[running], counts[running] - 1, token_ids[running])
        return batch._replace(token_ids=token_ids)

    def _postprocess(self, step: Launched, token_ids: np.ndarray, logprobs: np.ndarray) -> list:  # [S] int64, [S] fp32
        return super()._postprocess(step, self._written(step.batch.slots, step.counts, token_ids), logprobs)

    def _written(self, slots: np.ndarray, counts: np.ndarray, token_ids: np.ndarray) -> np.ndarray:  # [S] int64 each
        """Return token `counts[i]` of each turn; past its end, what was sampled: the twin without stop tags goes on."""
        return np.where(counts < self._length[slots], self._script[slots, counts], token_ids)


class ScriptedEngine(Scripted, Engine):
    """Our engine, scripted."""


class ScriptedPlainEngine(Scripted, PlainEngine):
    """The lock-step twin, scripted."""
