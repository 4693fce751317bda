"""One rollout while it grows: its tokens and its state.

Who writes what: `SearchLoop` makes sequences, appends what the environment says, and sets SEARCHING and FINISHED. The
engine appends what the policy says, sets WAITING and RUNNING, and owns `slot`, `num_cached`, `num_computed`,
`stayed_behind` and `is_interrupted`. The mask is written here, together with the tokens, and nowhere else.

Shape legend
    n  tokens of one piece    L  tokens of the trajectory
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from searchr1_fast.types import FinishReason, Question, Trajectory, Turn


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One trajectory to sample. The same prompt and seed give the same tokens, whatever else is in the batch."""

    question: Question
    group: int
    prompt: str
    seed: int


class SequenceStatus(Enum):
    """The state of a sequence."""

    WAITING = auto()  # has tokens that the model has not seen; in one of the engine's queues
    RUNNING = auto()  # samples a token at every step
    SEARCHING = auto()  # its query is queued or in flight; keeps its cache
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, mask and log-probabilities in pieces, one per appended text; joined once, by `to_trajectory`."""

    request: RolloutRequest
    stream_key: np.uint64
    status: SequenceStatus = SequenceStatus.WAITING
    length: int = 0
    num_policy_tokens: int = 0  # also the position in the sequence's stream of uniforms
    prompt_length: int = 0
    turn_limit: int = 0  # tokens that the current turn may take
    turns: list[Turn] = field(default_factory=list)
    segments: list[tuple[str, str]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    slot: int | None = None  # row of the engine's table
    num_cached: int = 0  # tokens whose keys and values are in the slot's blocks
    num_computed: int = 0  # tokens that were cached at least once
    stayed_behind: bool = False  # waited one step, to share with another that joined at it
    is_interrupted: bool = False  # lost its cache in the middle of a turn, whose tokens are in the slot's row
    token_pieces: list[np.ndarray] = field(default_factory=list)  # [n] int64 each
    logprob_pieces: list[np.ndarray] = field(default_factory=list)  # [n] fp32 each
    policy_pieces: list[bool] = field(default_factory=list)

    def append_prompt(self, token_ids: list[int], text: str) -> None:
        """Append the first piece."""
        assert self.length == 0
        self._append(np.array(token_ids, dtype=np.int64), None)
        self.prompt_length = self.length
        self.segments.append(("prompt", text))

    def append_observation(self, token_ids: list[int], text: str) -> None:
        """Append what the environment says: seen by the policy, masked from the loss."""
        self._append(np.array(token_ids, dtype=np.int64), None)
        self.segments.append(("observation", text))

    def append_turn(self, token_ids: np.ndarray, logprobs: np.ndarray) -> None:  # [n] int64, [n] fp32
        """Append what the policy sampled. The loop adds to `turns` and `segments` when it has read the turn."""
        self._append(token_ids, logprobs)
        self.num_policy_tokens += len(token_ids)

    def _append(self, token_ids: np.ndarray, logprobs: np.ndarray | None) -> None:
        self.token_pieces.append(token_ids)
        self.logprob_pieces.append(np.zeros(len(token_ids), dtype=np.float32) if logprobs is None else logprobs)
        self.policy_pieces.append(logprobs is not None)
        self.length += len(token_ids)

    def tokens_from(self, start: int) -> np.ndarray:  # [length - start] int64
        """Return all but the first `start` tokens."""
        pieces, missing = [], self.length - start
        for piece in reversed(self.token_pieces):
            pieces.append(piece[max(0, len(piece) - missing) :])
            missing -= len(piece)
            if missing <= 0:
                break
        return np.concatenate(pieces[::-1])

    def to_trajectory(self) -> Trajectory:
        """Join the pieces of a finished rollout into its trajectory."""
        assert self.status is SequenceStatus.FINISHED
        assert self.finish_reason is not None
        sizes = [len(piece) for piece in self.token_pieces]
        return Trajectory(
            question=self.request.question,
            group=self.request.group,
            token_ids=np.concatenate(self.token_pieces),
            loss_mask=np.repeat(np.array(self.policy_pieces), sizes),
            rollout_logprobs=np.concatenate(self.logprob_pieces),
            prompt_length=self.prompt_length,
            turns=self.turns,
            finish_reason=self.finish_reason,
            segments=self.segments,
        )
