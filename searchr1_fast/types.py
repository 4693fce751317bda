"""The nouns of the data flow, each defined once; the arrows between them are the modules.

    Question -> Trajectory (ragged, CPU) -> reward, advantage -> PackedBatch (packed, device)

Shape legend
    L  tokens of one trajectory        T  tokens of a packed batch
    S  sequences of a packed batch     P  policy tokens of a packed batch (those with loss_mask True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # only named here: retrieval and data should not wait seconds for torch
    import torch


@dataclass(frozen=True, slots=True)
class Question:
    """One question and the answers that count. `source` names its data set, `kind` its stratum ("2-hop")."""

    id: str
    text: str
    golden_answers: tuple[str, ...]
    source: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrieved passage. `title` carries no quotes; `score` is the retriever's, higher is better."""

    id: str
    title: str
    text: str
    score: float = 0.0


class SearchError(RuntimeError):
    """A search that failed for good. Any other exception from a search function is a bug in that function."""


# queries -> each query's passages, best first. This and SearchError are all that the rollout knows about retrieval.
SearchFunction = Callable[[Sequence[str]], list[list[Passage]]]

Progress = Callable[[int, int], None]  # long-running work calls it with (finished, total)


class FinishReason(StrEnum):
    """Why a trajectory ended."""

    ANSWER = "answer"  # the policy closed an <answer>
    NO_ANSWER = "no_answer"  # its forced final turn ended without one
    LENGTH = "length"  # the token budget of the whole sequence ran out
    SEARCH_FAILED = "search_failed"  # with `rollout.on_search_error=drop`; says nothing about the policy


class Action(StrEnum):
    """What the environment read in one policy turn."""

    SEARCH = "search"
    ANSWER = "answer"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Turn:
    """One policy turn: tokens `[start, end)` of the trajectory and what was read in them."""

    start: int
    end: int
    action: Action
    content: str  # the query, the answer, or "" for an invalid turn
    passage_ids: tuple[str, ...] | None = None  # what the search returned, best first; None: no search was executed


@dataclass(slots=True)
class Trajectory:
    """A finished rollout. `rollout.SearchLoop` writes it; the trainer sets `reward`, and nothing else changes.

    Example, prompt P0, turn A0, observation E0, turn A1:
        token_ids        = P0 + A0 + E0 + A1
        loss_mask        = [False]*len(P0) + [True]*len(A0) + [False]*len(E0) + [True]*len(A1)
        rollout_logprobs = [0.]*len(P0) + logprobs(A0) + [0.]*len(E0) + logprobs(A1)
    """

    question: Question
    group: int  # trajectories with the same group answer the same question and share a baseline
    token_ids: np.ndarray  # [L] int64: the ids that were sampled or appended, never re-tokenised
    loss_mask: np.ndarray  # [L] bool: True on policy tokens; made where the tokens are born
    rollout_logprobs: np.ndarray  # [L] fp32: the sampler's log-probability, 0 on all other tokens
    prompt_length: int
    turns: list[Turn]
    finish_reason: FinishReason
    segments: list[tuple[str, str]] = field(default_factory=list)  # ("prompt"|"policy"|"observation", text), in order
    reward: float = 0.0

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        assert len(self.loss_mask) == length and len(self.rollout_logprobs) == length
        assert 0 < self.prompt_length <= length and not self.loss_mask[: self.prompt_length].any()

    @property
    def is_judged(self) -> bool:
        """Whether the reward is the policy's doing: False if a failed search ended the trajectory."""
        return self.finish_reason is not FinishReason.SEARCH_FAILED

    @property
    def num_searches(self) -> int:
        """Searches that were executed, whatever they found."""
        return sum(turn.passage_ids is not None for turn in self.turns)

    @property
    def policy_text(self) -> str:
        """Everything the policy wrote, turns joined by a newline; neither prompt nor observations."""
        return "\n".join(text for kind, text in self.segments if kind == "policy")

    @property
    def response_length(self) -> int:
        """Tokens after the prompt, observations included."""
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """How sequences of a batch share beginnings: each is laid out once, with the first sequence that has it."""

    key_index: torch.Tensor  # [K] int64: the rows each sequence attends to, in order, shared and own
    cu_seqlens_k: torch.Tensor  # [S+1] int32: where each sequence's rows lie in `key_index`
    max_seqlen_k: int
    distinct: torch.Tensor  # [R] int64: indices in [P] of the policy tokens to score; each node of the tree once
    distinct_inverse: torch.Tensor  # [P] int64: index in [R] of each policy token's score


@dataclass(slots=True)
class PackedBatch:
    """Sequences laid end to end, without padding. `packing` writes it; the trainer adds nothing to it in place.

    `cu_seqlens` splits the rows by sequence. Where beginnings are shared (`prefixes`), a sequence has only the rows
    that no earlier sequence laid out; that may be none.

    Policy token j of the batch is `targets[j]`; the hidden state that predicts it lies at row `policy_index[j]`.
    `policy_cu_seqlens` splits the P policy tokens by sequence, shared or not.
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, counted from the sequence's first token
    cu_seqlens: torch.Tensor  # [S+1] int32
    max_seqlen: int
    policy_index: torch.Tensor  # [P] int64
    targets: torch.Tensor  # [P] int64
    policy_cu_seqlens: torch.Tensor  # [S+1] int32
    rollout_logprobs: torch.Tensor  # [P] fp32
    advantages: torch.Tensor  # [P] fp32
    trajectory_index: list[int] = field(default_factory=list)  # [S]: index of each sequence in the rollout's list
    prefixes: SharedPrefixes | None = None  # None: nothing is shared

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]

    @property
    def num_policy_tokens(self) -> int:
        """P."""
        return self.targets.shape[0]

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def scored_rows(self) -> torch.Tensor:
        """[R] int64: the rows whose hidden states predict policy tokens, each once. R = P where nothing is shared."""
        return self.policy_index if self.prefixes is None else self.policy_index[self.prefixes.distinct]

    @property
    def scored_targets(self) -> torch.Tensor:
        """[R] int64: the tokens that `scored_rows` predict."""
        return self.targets if self.prefixes is None else self.targets[self.prefixes.distinct]

    @property
    def token_rows(self) -> torch.Tensor | None:
        """[P] int64: which of the R rows predicts each policy token; None: one each, in order."""
        return None if self.prefixes is None else self.prefixes.distinct_inverse

    def spread(self, scores: torch.Tensor) -> torch.Tensor:  # [R] -> [P]
        """Give every policy token its score. An embedding: its gradient adds in a fixed order on every device."""
        if self.prefixes is None:
            return scores
        import torch.nn.functional as F  # not at the top: importing the types must not wait for torch

        return F.embedding(self.prefixes.distinct_inverse, scores.unsqueeze(1)).squeeze(1)
