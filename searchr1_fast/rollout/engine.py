"""Generate turns with continuous batching, over a KV cache that a sequence keeps from its first turn to its last.

The engine knows nothing of actions or searches. It is given sequences with tokens that the model has not seen (a
prompt, or an observation behind the last token of a turn), runs every running sequence one token further per `step`,
and hands back those whose turn ended. `step` is the whole of it: schedule, run (with sampling), postprocess.

What is known per slot lies in numpy arrays, so that a step costs a few gathers and no Python per token; Python runs
once per turn. What a sequence has in common with one that holds a slot is not computed but copied from that slot: the
prompt of a GRPO group, and the observations of those of its samples that wrote the same so far (prefixes.py). The model
is the trainer's own object: new weights need no copy.

On a GPU, a step that only decodes is a recorded graph (decode_graph.py); what a step needs is sent in one copy, and its
tokens and log-probabilities are read back in one, the only wait for the device (transfers.py).

Left out: splitting one prompt over steps, paged memory (a slot has room for the longest sequence), speculation.

Shape legend
    C  cache slots    S  sequences of a step    T  their new tokens    N  tokens that a turn may have at most
    D  hidden size    V  vocabulary
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from searchr1_kernels._installed import has_triton

from searchr1_fast.config import RolloutConfig
from searchr1_fast.models import Decoder, KVCache, TextTokenizer
from searchr1_fast.rollout.decode_graph import CudaDecodeGraphs, DecodeGraphs
from searchr1_fast.rollout.prefixes import Match, PrefixTree, longest_cached
from searchr1_fast.rollout.sampling import SamplingParams, head_logits, sample, uniforms
from searchr1_fast.rollout.sequence import Sequence, SequenceStatus
from searchr1_fast.rollout.stop import START, StopMatcher, vocabulary_bytes
from searchr1_fast.rollout.transfers import Transfers, pack

# Prompts and observations join a step up to this many tokens together: it bounds the activations of one forward pass.
MAX_PREFILL_TOKENS = 16384


@dataclass(slots=True)
class RolloutStatistics:
    """Where the time of a run went, and how many tokens passed through the model."""

    time_total: float = 0.0
    time_forward: float = 0.0  # model, head and sampling, until the tokens are on the host
    time_recording: float = 0.0  # the part of it that went into recording decode steps
    time_search_wait: float = 0.0  # in which nothing could be decoded
    num_steps: int = 0
    num_replayed_steps: int = 0  # the part of them that was a recorded decode step
    num_recordings: int = 0
    num_decode_tokens: int = 0  # the one token of a sequence that was running already
    num_prefill_tokens: int = 0  # computed for joining sequences: prompts, observations, what they had lost
    num_recomputed_tokens: int = 0  # the part of them that had been cached before
    num_shared_tokens: int = 0  # tokens of joining sequences not computed but copied from one that begins alike
    num_discarded_tokens: int = 0  # sampled after a stop tag; only with `stop_at_tags` off
    num_searches: int = 0
    num_search_batches: int = 0


class Batch(NamedTuple):
    """One step's work: the running sequences, then the joining ones."""

    slots: np.ndarray  # [S] int64
    token_ids: np.ndarray  # [T] int64
    lengths: np.ndarray  # [S] int64, adding up to T
    copies: list[PrefixCopy]  # before the forward pass

    @property
    def only_decodes(self) -> bool:
        """Whether it is one token per sequence and nothing else."""
        return len(self.token_ids) == len(self.slots) and not self.copies


class PrefixCopy(NamedTuple):
    """A sequence gets places `start` to `end` of its cache from one whose tokens are the same up to there."""

    source: int  # slot
    target: int  # slot
    start: int
    end: int


class SlotTable:
    """What the engine knows of the sequence in each slot."""

    def __init__(self, num_slots: int, max_turn_tokens: int) -> None:
        self.occupants: list[Sequence | None] = [None] * num_slots
        self.free = list(range(num_slots))[::-1]
        self.prefixes = PrefixTree()
        self.num_cached = np.zeros(num_slots, dtype=np.int64)  # [C]
        self.last_token = np.zeros(num_slots, dtype=np.int64)  # [C]
        self.stop_state = np.zeros(num_slots, dtype=np.uint8)  # [C]
        self.stream_key = np.zeros(num_slots, dtype=np.uint64)  # [C]
        self.stream_start = np.zeros(num_slots, dtype=np.uint64)  # [C]: policy tokens before the turn
        self.turn_count = np.zeros(num_slots, dtype=np.int64)  # [C]: tokens of the turn so far
        self.turn_limit = np.zeros(num_slots, dtype=np.int64)  # [C]
        self.turn_tokens = np.zeros((num_slots, max_turn_tokens), dtype=np.int64)  # [C, N]
        self.turn_logprobs = np.zeros((num_slots, max_turn_tokens), dtype=np.float32)  # [C, N]

    def __len__(self) -> int:
        return len(self.occupants)

    def begin_turn(self, sequence: Sequence) -> None:
        """Set a sequence's entries; one without a slot gets a free one."""
        assert 0 < sequence.turn_limit <= self.turn_tokens.shape[1]
        if sequence.slot is None:
            sequence.slot = self.free.pop()
            self.occupants[sequence.slot] = sequence
        slot = sequence.slot
        self.num_cached[slot] = sequence.num_cached
        self.stop_state[slot] = START
        self.stream_key[slot] = sequence.stream_key
        self.stream_start[slot] = sequence.num_policy_tokens
        self.turn_count[slot] = 0
        self.turn_limit[slot] = sequence.turn_limit

    def release(self, sequence: Sequence) -> None:
        """Make a sequence's slot free, its cache forgotten."""
        self.occupants[sequence.slot] = None
        self.free.append(sequence.slot)
        self.prefixes.remove(sequence.slot)
        self.num_cached[sequence.slot] = 0
        sequence.slot, sequence.num_cached = None, 0


class Engine:
    """Continuous batching over cache slots. `sampling`, `statistics`, `keep_cache` may be replaced between runs."""

    share_prefixes = True

    def __init__(
        self,
        model: Decoder,
        tokenizer: TextTokenizer,
        config: RolloutConfig,
        sampling: SamplingParams | None = None,
        *,
        stop_at_tags: bool = True,
        decode_graphs: type[DecodeGraphs] | None = None,
    ) -> None:
        """`sampling` None: as the configuration says. `stop_at_tags` off: turns run on to EOS or their limit and are
        cut afterwards, as the original does it; same trajectories, more work. `decode_graphs` None: CUDA graphs where
        there is a GPU and `rollout.cuda_graphs` says so.
        """
        vocab_size = model.config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {vocab_size}; "
                "give the tokenizer that the model was trained with"
            )
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.sampling = sampling or SamplingParams(config.temperature, config.top_p, config.top_k)
        self.stop_at_tags = stop_at_tags
        self.keep_cache = config.keep_cache is True  # `auto` is the run's to settle, which knows what else there is
        self.statistics = RolloutStatistics()
        self.token_bytes = vocabulary_bytes(tokenizer, vocab_size)
        self._matcher = StopMatcher(self.token_bytes)
        self.is_eos = np.zeros(vocab_size, dtype=bool)  # [V]: ends a turn by itself
        self.is_eos[list(tokenizer.eos_ids)] = True
        self._transfers = Transfers(model.head_weight.device)
        if decode_graphs is None and config.cuda_graphs and self._transfers.device.type == "cuda" and has_triton():
            decode_graphs = CudaDecodeGraphs  # without Triton, attention to the cache waits for the device
        self._graphs_class, self._graphs = decode_graphs, None
        self._cache: KVCache | None = None
        self._slots = SlotTable(0, 0)
        self.reset()

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence to run; one that waits for a slot is none."""
        return bool(len(self._running) or self._resumed or (self._waiting and self._slots.free))

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Take new sequences, their prompts appended and `turn_limit` set."""
        self._waiting.extend(sequences)
        wanted = min(self.config.max_num_seqs, len(self._waiting))
        if wanted > len(self._slots) == len(self._slots.free):
            self._allocate(wanted)
        if self._graphs is not None:
            self._graphs.refresh()

    def resume(self, sequence: Sequence) -> None:
        """Take back a sequence whose turn ended, the observation appended and `turn_limit` set."""
        sequence.status = SequenceStatus.WAITING
        (self._waiting if sequence.slot is None else self._resumed).append(sequence)

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence whose turn ended and that will not be resumed."""
        if sequence.slot is not None:
            self._slots.release(sequence)

    def reset(self) -> None:
        """Forget every sequence; the memory stays."""
        self._waiting: deque[Sequence] = deque()  # hold no slot
        self._resumed: deque[Sequence] = deque()  # hold one
        self._running = np.empty(0, dtype=np.int64)  # [S] slots, in the order in which they joined
        self._slots = SlotTable(len(self._slots), self.config.max_turn_tokens)

    def free_cache(self) -> None:
        """Give the memory of cache and graphs to others until the next `add`, unless `keep_cache`; no sequence may be
        held."""
        assert len(self._slots.free) == len(self._slots)
        if not self.keep_cache:
            self._cache, self._graphs, self._slots = None, None, SlotTable(0, 0)

    def update_weights(self) -> dict[str, float]:
        """Nothing to do or to report: the model is the trainer's own. For engines that have a copy (vllm_engine.py)."""
        return {}

    def close(self) -> None:
        """Nothing to do: the memory goes with the object."""

    def step(self) -> list[Sequence]:
        """Run every running sequence one token further; the sequences whose turn ended with it, tokens appended."""
        assert self.has_work
        batch = self._schedule()
        started = time.perf_counter()
        randoms = self._randoms(batch.slots)
        token_ids, logprobs = (self._replay if self._can_replay(batch) else self._run)(batch, randoms)
        self._slots.num_cached[batch.slots] += batch.lengths
        self.statistics.time_forward += time.perf_counter() - started
        if not np.isfinite(logprobs).all():
            raise ValueError(
                f"the model's logits are not finite for {np.count_nonzero(~np.isfinite(logprobs))} of {len(logprobs)} "
                "sequences; its weights are broken: go back to a checkpoint before this"
            )
        return self._postprocess(batch, token_ids, logprobs)

    def _allocate(self, num_slots: int) -> None:
        weight, max_length = self.model.head_weight, self.config.max_sequence_tokens
        self._cache = self._graphs = None  # first, so that old and new are never held together
        num_spare = int(self._graphs_class is not None)  # for rows without a sequence
        self._cache = KVCache(self.model.config, num_slots + num_spare, max_length, weight.dtype, weight.device)
        if self._graphs_class is not None:
            self._graphs = self._graphs_class(self.model, self._cache, self._transfers, num_slots)
        self._slots = SlotTable(num_slots, self.config.max_turn_tokens)

    def _schedule(self) -> Batch:
        """Whom to run, and on which tokens."""
        running, last_tokens = self._running, self._slots.last_token[self._running]
        self.statistics.num_steps += 1
        self.statistics.num_decode_tokens += len(running)
        lengths = np.ones(len(running), dtype=np.int64)
        if not self._resumed and not (self._waiting and self._slots.free):
            return Batch(running, last_tokens, lengths, [])
        joining, copies = self._admit()
        pieces = [sequence.uncached_tokens() for sequence in joining]
        sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self.statistics.num_prefill_tokens += int(sizes.sum())
        self.statistics.num_recomputed_tokens += sum(max(0, s.num_computed - s.num_cached) for s in joining)
        self.statistics.num_shared_tokens += sum(copy.end - copy.start for copy in copies)
        return Batch(
            slots=np.concatenate((running, np.array([sequence.slot for sequence in joining], dtype=np.int64))),
            token_ids=np.concatenate((last_tokens, *pieces)),
            lengths=np.concatenate((lengths, sizes)),
            copies=copies,
        )

    def _admit(self) -> tuple[list[Sequence], list[PrefixCopy]]:
        """Resumed sequences, then waiting ones, as the token budget and the free slots allow.

        Of a sequence's beginning is copied what another slot had before this step: copies come before the forward pass.
        """
        table, budget, num_reserved = self._slots, MAX_PREFILL_TOKENS, 0
        had = table.num_cached.tolist()  # [C]
        joining: dict[int, Sequence] = {}  # by slot
        copies: list[PrefixCopy] = []
        behind: list[Sequence] = []
        while self._resumed or (self._waiting and num_reserved < len(table.free)):
            queue = self._resumed or self._waiting
            sequence = queue[0]
            matches = self._match(sequence)
            num_shared, holder = longest_cached(matches, had)
            start, end = sequence.num_cached, max(sequence.num_cached, num_shared)
            if _stays_behind(sequence, end, matches, joining):
                sequence.stayed_behind = True
                num_reserved += sequence.slot is None
                behind.append(queue.popleft())
                continue
            if joining and sequence.length - end > budget:
                break
            budget -= sequence.length - end
            sequence.num_cached = end
            table.begin_turn(queue.popleft())
            self._register(sequence)
            sequence.status, sequence.stayed_behind = SequenceStatus.RUNNING, False
            joining[sequence.slot] = sequence
            if end > start:
                copies.append(PrefixCopy(holder, sequence.slot, start, end))
        for sequence in reversed(behind):
            (self._waiting if sequence.slot is None else self._resumed).appendleft(sequence)
        return list(joining.values()), copies

    def _match(self, sequence: Sequence) -> list[Match]:
        """Who shares how much with a sequence. Its last token is left out: what follows it must be predicted."""
        if not self.share_prefixes:
            return []
        prefixes = self._slots.prefixes
        matches = prefixes.match(sequence.slot, sequence.tokens_from(prefixes.num_tokens(sequence.slot)))
        return [(min(length, sequence.length - 1), slots) for length, slots in matches]

    def _register(self, sequence: Sequence) -> None:
        """Let others find what a sequence's slot holds or will hold after this step."""
        if self.share_prefixes:
            prefixes = self._slots.prefixes
            prefixes.append(sequence.slot, sequence.tokens_from(prefixes.num_tokens(sequence.slot)))

    def _randoms(self, slots: np.ndarray) -> np.ndarray:  # [S] int64 -> [S] fp64
        """The next number of each sequence's own stream."""
        table = self._slots
        return uniforms(table.stream_key[slots], table.stream_start[slots] + table.turn_count[slots].astype(np.uint64))

    def _can_replay(self, batch: Batch) -> bool:
        return self._graphs is not None and batch.only_decodes

    def _replay(self, batch: Batch, randoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [S] int64, [S] fp32
        """`_run` of a batch that only decodes, by a recorded step."""
        graphs, statistics = self._graphs, self.statistics
        num_recordings, time_recording = graphs.num_recordings, graphs.time_recording
        positions = self._slots.num_cached[batch.slots]
        results = graphs.decode(batch.token_ids, batch.slots, positions, randoms, self.sampling)
        statistics.num_replayed_steps += 1
        statistics.num_recordings += graphs.num_recordings - num_recordings
        statistics.time_recording += graphs.time_recording - time_recording
        return results

    @torch.no_grad()
    def _run(self, batch: Batch, randoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [S] int64, [S] fp32
        """The next tokens and their log-probabilities, on the host."""
        cu_seqlens = np.zeros(len(batch.slots) + 1, dtype=np.int64)
        np.cumsum(batch.lengths, out=cu_seqlens[1:])
        positions = self._slots.num_cached[batch.slots]
        arrays = (batch.token_ids, cu_seqlens, batch.slots, positions, randoms, *_copied_rows(batch.copies))
        token_ids, cu_seqlens, slots, positions, randoms, *copied = self._transfers.send(arrays)
        if copied:
            self._cache.copy(*copied)
        arguments = (token_ids, cu_seqlens, slots, positions, self._cache)
        hidden = self.model.forward_cached(*arguments, host_lengths=batch.lengths)  # [S, D]
        logits = head_logits(hidden, self.model.head_weight)
        return self._transfers.receive(pack(*sample(logits, randoms, self.sampling)))

    def _postprocess(self, batch: Batch, token_ids: np.ndarray, logprobs: np.ndarray) -> list[Sequence]:
        """Keep the tokens, find the turns that ended."""
        slots, table = batch.slots, self._slots
        count = table.turn_count[slots]
        table.turn_tokens[slots, count] = token_ids
        table.turn_logprobs[slots, count] = logprobs
        table.last_token[slots] = token_ids
        table.turn_count[slots] = count + 1
        table.stop_state[slots] = states = self._matcher.advance(table.stop_state[slots], token_ids)
        ended = (count + 1 == table.turn_limit[slots]) | self.is_eos[token_ids]
        if self.stop_at_tags:
            ended |= states == self._matcher.matched
        if not ended.any():
            self._running = slots
            return []
        self._running = slots[~ended]
        return [self._end_turn(slot) for slot in slots[ended].tolist()]

    def _end_turn(self, slot: int) -> Sequence:
        """Give a sequence the tokens of its turn. It keeps its slot; the turn's last token is not cached yet."""
        table = self._slots
        sequence = table.occupants[slot]
        count = sampled = int(table.turn_count[slot])
        if not self.stop_at_tags:
            count = self._matcher.find(table.turn_tokens[slot, :sampled]) or sampled
            self.statistics.num_discarded_tokens += sampled - count
        sequence.append_turn(table.turn_tokens[slot, :count].copy(), table.turn_logprobs[slot, :count].copy())
        num_cached = int(table.num_cached[slot])
        sequence.num_computed = max(sequence.num_computed, min(num_cached, sequence.length))
        sequence.num_cached = table.num_cached[slot] = min(num_cached, sequence.length - 1)
        self._register(sequence)
        return sequence


def _copied_rows(copies: list[PrefixCopy]) -> list[np.ndarray]:
    """Source slot, target slot and place of every token that is copied, [tokens] int64 each; nothing where none is."""
    if not copies:
        return []
    sources, targets, starts, ends = np.array(copies, dtype=np.int64).T
    lengths = ends - starts
    offsets = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    positions = np.arange(len(offsets)) + offsets
    return [np.repeat(sources, lengths), np.repeat(targets, lengths), positions]


def _stays_behind(sequence: Sequence, num_cached: int, matches: list[Match], joining: dict[int, Sequence]) -> bool:
    """Whether a sequence of which all but the last token joins at this very step waits until they can be copied.

    It does so once, whatever becomes of the other. One that shares less joins at once: it has tokens of its own to
    compute, and others may want to copy them.
    """
    last = sequence.length - 1
    if sequence.stayed_behind or num_cached == last:
        return False
    return any(length == last and not joining.keys().isdisjoint(slots) for length, slots in matches)
