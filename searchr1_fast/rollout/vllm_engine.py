"""The engine's interface over vLLM: a turn is a request, and stop tags are found here.

`SearchLoop` drives it as it drives the native engine. Every turn is one request with all the tokens so far; vLLM finds
what it computed for earlier turns, and for samples of the same prompt, in its prefix cache. End-of-sequence tokens and
the turn's limit end a request inside vLLM. A stop tag may be several tokens and may end inside one, so it is found
here, by the native engine's automaton after every step, and the request is aborted before the next.

A turn's seed is a hash of its sequence's seed and of the number of tokens sampled before it. The same seeds give the
same tokens whatever the batch, but not the native engine's tokens, except when greedy: vLLM draws in its own way.

vLLM has its own copy of the weights. `update_weights` hands them over in place after every update of the policy, checks
that they arrived (weight_handover.py), and reports what that took and found, for the step's row of metrics.

Left out: vLLM's asynchronous scheduling, which would sample a token past every stop tag; parallelism inside the model.

Shape legend
    R  running turns    V  vocabulary
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from searchr1_fast.config import RolloutConfig
from searchr1_fast.models import Decoder, TextTokenizer
from searchr1_fast.rollout.sampling import SamplingParams, stream_keys
from searchr1_fast.rollout.sequence import Sequence, SequenceStatus
from searchr1_fast.rollout.statistics import RolloutStatistics
from searchr1_fast.rollout.stop import START, StopMatcher, vocabulary_bytes
from searchr1_fast.rollout.vllm_model import Piece, VllmModel
from searchr1_fast.rollout.weight_handover import (
    HandedWeights,
    Scores,
    check_scores,
    check_weights,
    known_sequences,
    named_weights,
)


class Generator(Protocol):
    """What the engine needs of vLLM. `VllmModel` implements and documents it."""

    version: str

    def add(self, request_id: str, token_ids: list[int], limit: int, seed: int, sampling: SamplingParams) -> None: ...
    def step(self) -> list[Piece]: ...
    def abort(self, request_ids: list[str]) -> None: ...
    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None: ...
    def held(self, shapes: Mapping[str, torch.Size]) -> Iterable[tuple[str, torch.Tensor]]: ...
    def sleep(self) -> None: ...
    def score(self, sequences: list[list[int]]) -> list[np.ndarray]: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class RunningTurn:
    """What is known of a turn while vLLM samples it."""

    sequence: Sequence
    stop_state: int = START
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class VllmEngine:
    """Samples turns with vLLM. As in the native engine, `sampling`, `statistics` and `keep_cache` may be replaced
    between runs."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: TextTokenizer,
        config: RolloutConfig,
        sampling: SamplingParams | None = None,
        *,
        generator: Generator | None = None,
    ) -> None:
        """`sampling` defaults to the configuration's, and `generator` to vLLM, which is then started here.

        ValueError if vLLM is not installed, cannot do what is configured, or does not get the weights.
        """
        vocab_size = model.config.vocab_size
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.sampling = sampling or SamplingParams(config.temperature, config.top_p, config.top_k)
        self.keep_cache = config.keep_cache is True  # `auto` is decided by the run, as for the native engine
        self.statistics = RolloutStatistics()
        self.token_bytes = vocabulary_bytes(tokenizer, vocab_size)
        self.is_eos = np.zeros(vocab_size, dtype=bool)  # [V]
        self.is_eos[list(tokenizer.eos_ids)] = True
        self._matcher = StopMatcher(self.token_bytes)
        self._turns: dict[str, RunningTurn] = {}  # by request
        self._num_requests = 0
        self._is_awake = True
        self._known = known_sequences(tokenizer, vocab_size, config.max_sequence_tokens - 1)
        self._scores: Scores | None = None
        self._generator = generator or VllmModel(model, config, self.sampling, tokenizer.eos_ids)
        with ExitStack() as on_error:
            on_error.callback(self.close)
            self.update_weights()
            on_error.pop_all()

    @property
    def has_work(self) -> bool:
        """Whether there is a turn to sample."""
        return bool(self._turns)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Take new sequences, with their prompts appended and `turn_limit` set."""
        for sequence in sequences:
            self.resume(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Take a sequence whose next turn is to be sampled, with `turn_limit` set."""
        assert self._is_awake, "update_weights wakes vLLM"
        assert sequence.turn_limit > 0
        sequence.status = SequenceStatus.RUNNING
        request_id, self._num_requests = str(self._num_requests), self._num_requests + 1
        token_ids = sequence.tokens_from(0).tolist()
        self._generator.add(request_id, token_ids, sequence.turn_limit, turn_seed(sequence), self.sampling)
        self._turns[request_id] = RunningTurn(sequence)

    def release(self, sequence: Sequence) -> None:
        """Do nothing: nothing is held between turns, and vLLM's cache evicts what was least recently used."""

    def reset(self) -> None:
        """Forget every sequence."""
        self._generator.abort(list(self._turns))
        self._turns.clear()

    def free_cache(self) -> None:
        """Let vLLM sleep until `update_weights`, unless `keep_cache`. No sequence may be held."""
        assert not self._turns
        if not self.keep_cache:
            self._generator.sleep()
            self._is_awake = False

    def close(self) -> None:
        """End vLLM; the engine cannot be used any more."""
        self.reset()
        self._generator.close()

    def update_weights(self) -> dict[str, float]:
        """Hand the model's weights to vLLM, which wakes up for it. ValueError if they did not arrive.

        Returns `time_handover` (seconds for everything), `time_handover_checks` (seconds after the copy),
        `handover_logprob_difference_max` (over the known sequences) and `handover_unseen_weights` (how many weights
        only the known sequences vouch for).
        """
        assert not self._turns
        started = time.perf_counter()
        weights = HandedWeights(self.model)
        self._generator.load(named_weights(self.model))
        loaded, self._is_awake = time.perf_counter(), True
        receiver = f"vLLM {self._generator.version}"
        held = self._generator.held(weights.shapes)
        unseen = check_weights(weights, held, receiver)
        if unseen:
            warnings.warn(
                f"{receiver} shows no copy of {len(unseen)} of {len(weights)} weights, the first {unseen[0]!r}: only "
                "the scores of known sequences tell that they arrive",
                stacklevel=2,
            )
        scores = self._generator.score(self._known)
        self._scores, difference = check_scores(self.model, self._known, scores, receiver, self._scores)
        ended = time.perf_counter()
        return {
            "time_handover": ended - started,
            "time_handover_checks": ended - loaded,
            "handover_logprob_difference_max": difference,
            "handover_unseen_weights": len(unseen),
        }

    def step(self) -> list[Sequence]:
        """Advance every running sequence by one token; return those whose turn ended with it, its tokens appended."""
        assert self.has_work
        started = time.perf_counter()
        pieces = self._generator.step()
        self.statistics.time_forward += time.perf_counter() - started
        self.statistics.num_steps += 1
        if not all(math.isfinite(logprob) for piece in pieces for logprob in piece.logprobs):
            raise ValueError(
                "the model's logits are not finite; its weights are broken: go back to a checkpoint before this"
            )
        ended, cut = [], []
        for piece in pieces:
            turn = self._turns[piece.request_id]
            self._append(turn, piece)
            is_stopped = turn.stop_state == self._matcher.matched
            if piece.is_finished or is_stopped:
                ended.append(self._end_turn(self._turns.pop(piece.request_id)))
            if is_stopped and not piece.is_finished:
                cut.append(piece.request_id)
        self._generator.abort(cut)
        return ended

    def _append(self, turn: RunningTurn, piece: Piece) -> None:
        """Keep the one token that a step sampled, and look for the end of a tag in it."""
        if not piece.token_ids:
            return  # none yet: a long prompt takes several steps
        (token_id,) = piece.token_ids
        sequence, statistics = turn.sequence, self.statistics
        if turn.token_ids:
            statistics.num_decode_tokens += 1
        else:
            num_cached = min(piece.num_cached, sequence.length - 1)
            statistics.num_prefill_tokens += sequence.length - num_cached
            statistics.num_recomputed_tokens += max(0, sequence.num_computed - num_cached)
            statistics.num_shared_tokens += max(0, num_cached - sequence.num_computed)
        turn.token_ids.append(token_id)
        turn.logprobs += piece.logprobs
        turn.stop_state = int(self._matcher.advance(turn.stop_state, token_id))

    def _end_turn(self, turn: RunningTurn) -> Sequence:
        """Append the turn's tokens to its sequence. vLLM has not computed the last of them."""
        sequence = turn.sequence
        sequence.append_turn(np.array(turn.token_ids, dtype=np.int64), np.array(turn.logprobs, dtype=np.float32))
        sequence.num_computed = sequence.length - 1
        return sequence


def turn_seed(sequence: Sequence) -> int:
    """Return 63 bits for the next turn of a sequence."""
    return int(stream_keys([int(sequence.stream_key) + sequence.num_policy_tokens])[0]) >> 1
