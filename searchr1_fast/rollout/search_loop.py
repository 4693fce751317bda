"""Drive an engine and a search function through whole rollouts: turns, actions, observations, ends.

`normal_loop` searches inline: queries that become pending at a step are searched as one batch before the next step.
`overlap_loop` searches in a worker thread while the other sequences go on decoding: one batch is in flight at a time,
and queries that become pending meanwhile are the next batch. Read them as a diff. Both give the same tokens, which
depend only on a sequence's own seed and context.

A failed search ends the run; a note on the exception has the number of queries and the first of them. With
`rollout.on_search_error=drop` it ends only the sequences that asked, and their `finish_reason` says so. An exception
other than `SearchError` ends the run in either case.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from searchr1_fast.config import RolloutConfig
from searchr1_fast.models import TextTokenizer
from searchr1_fast.protocol import INVALID_ACTION_MESSAGE, format_observation, parse_action
from searchr1_fast.rollout.engine import Engine
from searchr1_fast.rollout.observation import Text, encode, fit_observation
from searchr1_fast.rollout.sampling import stream_keys
from searchr1_fast.rollout.sequence import RolloutRequest, Sequence, SequenceStatus
from searchr1_fast.rollout.statistics import RolloutStatistics
from searchr1_fast.rollout.vllm_engine import VllmEngine
from searchr1_fast.types import (
    Action,
    FinishReason,
    Passage,
    Progress,
    SearchError,
    SearchFunction,
    Trajectory,
    Turn,
)

Results = list[list[Passage]] | SearchError  # by query; or the error, where it ends only the sequences that asked


class SearchLoop:
    """Samples trajectories. `statistics` are those of the last run."""

    def __init__(
        self,
        engine: Engine | VllmEngine,
        search: SearchFunction,
        tokenizer: TextTokenizer | None = None,
        config: RolloutConfig | None = None,
    ) -> None:
        """`tokenizer` and `config` default to the engine's."""
        self.engine, self.search = engine, search
        self.tokenizer = tokenizer or engine.tokenizer
        self.config = config or engine.config
        self.statistics = RolloutStatistics()
        self.last_error: SearchError | None = None  # of the searches that the last run dropped
        self._invalid = encode(INVALID_ACTION_MESSAGE, self.tokenizer)
        self._empty = encode(format_observation([]), self.tokenizer)
        self._final = encode(self.config.final_turn_message, self.tokenizer)
        for name in ("max_turn_tokens", "max_sequence_tokens"):
            if getattr(self.config, name) > getattr(engine.config, name):
                raise ValueError(
                    f"rollout.{name} is {getattr(self.config, name)}, but the engine was made for "
                    f"{getattr(engine.config, name)}; make the engine with the larger one"
                )
        if len(self._empty.token_ids) > self.config.max_observation_tokens:
            raise ValueError(
                f"rollout.max_observation_tokens is {self.config.max_observation_tokens}, but an observation without "
                f"passages has {len(self._empty.token_ids)} tokens; raise it"
            )

    def run(self, requests: list[RolloutRequest], progress: Progress | None = None) -> list[Trajectory]:
        """Sample one trajectory per request, in the order of the requests. `progress` is called as sequences finish.

        The first failed search is raised. Where a failed search ends only its own sequences, none is raised:
        `statistics` says how many failed, and `last_error` why.
        """
        started = time.perf_counter()
        self.statistics = self.engine.statistics = RolloutStatistics()
        self.last_error = None
        self._progress, self._num_finished, self._num_sequences = progress, 0, len(requests)
        keys = stream_keys([request.seed for request in requests])
        sequences = [self._start(request, key) for request, key in zip(requests, keys, strict=True)]
        try:
            self.engine.add(sequences)
            if self.config.overlap:
                self.overlap_loop()
            else:
                self.normal_loop()
        finally:
            self.engine.reset()
        self.statistics.time_total = time.perf_counter() - started
        return [sequence.to_trajectory() for sequence in sequences]

    def normal_loop(self) -> None:
        """Step, then search for the sequences that asked at this step."""
        while self.engine.has_work:
            pending = self._read_turns(self.engine.step())
            if pending:
                started = time.perf_counter()
                results = self._search(pending)
                self.statistics.time_search_wait += time.perf_counter() - started
                self._observe(pending, results)

    def overlap_loop(self) -> None:
        """Step on while a search is in flight; wait for it only when nothing else is left to do."""
        pending: list[Sequence] = []
        in_flight: list[Sequence] = []
        future: Future[Results] | None = None
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="search") as worker:
            while self.engine.has_work or future or pending:
                if future and (future.done() or not self.engine.has_work):
                    started = time.perf_counter()
                    results = future.result()
                    self.statistics.time_search_wait += time.perf_counter() - started
                    self._observe(in_flight, results)
                    future = None
                if pending and not future:
                    in_flight, pending = pending, []
                    future = worker.submit(self._search, in_flight)
                if self.engine.has_work:
                    pending += self._read_turns(self.engine.step())

    # ---- turns ------------------------------------------------------------------------------------------------------

    def _start(self, request: RolloutRequest, stream_key: np.uint64) -> Sequence:
        """Make a sequence with its prompt, ready to be added to the engine."""
        token_ids = self.tokenizer.encode_prompt(request.prompt, request.question.text)
        if not token_ids:
            raise ValueError(f"the prompt of question {request.question.id!r} is empty; check prompt.template")
        sequence = Sequence(request, stream_key)
        sequence.append_prompt(token_ids, request.prompt)
        if not self._open_turn(sequence):
            raise ValueError(
                f"the prompt of question {request.question.id!r} has {len(token_ids)} tokens and leaves no room in "
                f"rollout.max_sequence_tokens, {self.config.max_sequence_tokens}; raise it or shorten the prompt"
            )
        return sequence

    def _room(self, sequence: Sequence) -> int:
        """How many tokens the environment may add, leaving one for the policy and room for the final message."""
        room = self.config.max_sequence_tokens - sequence.length - 1
        return room - (len(self._final.token_ids) if len(sequence.turns) == self.config.max_searches else 0)

    def _open_turn(self, sequence: Sequence) -> bool:
        """Set the next turn's limit, appending the final turn's message if it is due; False if no turn fits."""
        if self._room(sequence) < 0:
            return False
        if len(sequence.turns) == self.config.max_searches and self._final.token_ids:
            sequence.append_observation(self._final.token_ids, self._final.text)
        sequence.turn_limit = min(self.config.max_turn_tokens, self.config.max_sequence_tokens - sequence.length)
        return True

    def _read_turns(self, ended: list[Sequence]) -> list[Sequence]:
        """Act on the turns that ended; return the sequences to search for. All others are settled."""
        num_finished = self._num_finished
        for sequence in ended:
            self._read_turn(sequence)
        if self._num_finished > num_finished:
            self._report()
        return [sequence for sequence in ended if sequence.status is SequenceStatus.SEARCHING]

    def _read_turn(self, sequence: Sequence) -> None:
        """End the sequence, mark it for a search or let it try again, depending on what the policy wrote."""
        action = self._record_turn(sequence).action
        if action is Action.ANSWER:
            self._finish(sequence, FinishReason.ANSWER)
        elif len(sequence.turns) > self.config.max_searches:
            is_full = sequence.length >= self.config.max_sequence_tokens
            self._finish(sequence, FinishReason.LENGTH if is_full else FinishReason.NO_ANSWER)
        elif self._room(sequence) < len((self._empty if action is Action.SEARCH else self._invalid).token_ids):
            self._finish(sequence, FinishReason.LENGTH)
        elif action is Action.SEARCH:
            sequence.status = SequenceStatus.SEARCHING
        else:
            self._continue(sequence, self._invalid)

    def _record_turn(self, sequence: Sequence) -> Turn:
        """Record the turn that the engine appended. An end-of-sequence token is in its tokens, but not in its text."""
        token_ids = sequence.token_pieces[-1]
        written = token_ids[~self.engine.is_eos[token_ids]].tolist()
        text = b"".join(self.engine.token_bytes[i] for i in written).decode(errors="replace")
        action, content = parse_action(text)
        turn = Turn(sequence.length - len(token_ids), sequence.length, action, content)
        sequence.turns.append(turn)
        sequence.segments.append(("policy", text))
        return turn

    def _search(self, sequences: list[Sequence]) -> Results:
        """Return the passages for each sequence's query, best first."""
        queries = [sequence.turns[-1].content for sequence in sequences]
        try:
            results = self.search(queries)
        except Exception as error:
            if isinstance(error, SearchError) and self.config.on_search_error == "drop":
                return error
            error.add_note(f"this ended the rollout: a search for {len(queries)} queries, first {queries[0]!r}")
            raise
        if len(results) != len(queries):
            raise ValueError(f"the search function returned {len(results)} results for {len(queries)} queries")
        return results

    def _observe(self, sequences: list[Sequence], results: Results) -> None:
        """Append what was found and resume the sequences; if the search failed, end them."""
        if isinstance(results, SearchError):
            self.statistics.num_failed_searches += len(sequences)
            self.last_error = results
            for sequence in sequences:
                self._finish(sequence, FinishReason.SEARCH_FAILED)
            self._report()
            return
        self.statistics.num_searches += len(sequences)
        self.statistics.num_search_batches += 1
        for sequence, passages in zip(sequences, results, strict=True):
            sequence.turns[-1] = replace(sequence.turns[-1], passage_ids=tuple(passage.id for passage in passages))
            room = min(self.config.max_observation_tokens, self._room(sequence))
            observation = fit_observation(passages, self.tokenizer, room)
            assert observation is not None  # the empty one fits: checked before the search
            self._continue(sequence, observation)

    def _continue(self, sequence: Sequence, observation: Text) -> None:
        sequence.append_observation(observation.token_ids, observation.text)
        is_open = self._open_turn(sequence)
        assert is_open
        self.engine.resume(sequence)

    def _report(self) -> None:
        if self._progress:
            self._progress(self._num_finished, self._num_sequences)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.status, sequence.finish_reason = SequenceStatus.FINISHED, reason
        self.engine.release(sequence)
        self._num_finished += 1
