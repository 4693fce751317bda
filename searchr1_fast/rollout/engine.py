"""Generate turns with continuous batching, over a KV cache that a sequence keeps from its first turn to its last.

The engine knows nothing of actions or searches. It is given sequences that have tokens the model has not seen (a
prompt, or an observation after the last token of a turn), advances every running sequence by one token per `step`, and
hands back those whose turn ended. `step` is all there is to it: schedule (scheduler.py), run (with sampling),
postprocess.

The cache is paged: sequences that begin alike share blocks, and sequences for which there is no room wait or are
recomputed later (scheduler.py). Per-slot state is in numpy arrays, so that a step costs a few gathers and no Python per
token; Python runs once per turn. The model is the trainer's own object, so new weights need no copy.

On a GPU, a step that only decodes is a recorded graph (decode_graph.py). A step's inputs are sent in one copy, and its
tokens and log-probabilities are read back in one, which is the only wait for the device (transfers.py). The host runs
ahead: it launches a step before it reads the previous one, so that the device does not wait for the host. The token
that a sequence sampled last is on the device; the host learns a step late if this token ended the turn, and then does
not read what was sampled past the end. The tokens are those of an engine that waits.

A forward pass that runs out of device memory is made again in parts (forward.py), and so are logits. A step for whose
recording there is no memory is launched kernel by kernel. Left out: speculative decoding.

Shape legend
    C  cache slots    S  sequences of a step    T  their new tokens    D  hidden size    V  vocabulary    n  some slots
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from searchr1_kernels._installed import has_triton

from searchr1_fast.config import RolloutConfig
from searchr1_fast.models import Decoder, KVCache, TextTokenizer
from searchr1_fast.models.kv_cache import block_size
from searchr1_fast.rollout.block_tables import BlockTables
from searchr1_fast.rollout.decode_graph import CudaDecodeGraphs, DecodeGraphs
from searchr1_fast.rollout.forward import Tokens, forward_in_parts
from searchr1_fast.rollout.sampling import SamplingParams, sample_in_parts, uniforms
from searchr1_fast.rollout.scheduler import Batch, Scheduler, copied_places
from searchr1_fast.rollout.sequence import Sequence
from searchr1_fast.rollout.slot_table import SlotTable
from searchr1_fast.rollout.statistics import RolloutStatistics
from searchr1_fast.rollout.stop import StopMatcher, vocabulary_bytes
from searchr1_fast.rollout.transfers import Receipt, Transfers, pack


@dataclass(slots=True)
class Launched:
    """A step that has been launched and is still to be read."""

    batch: Batch
    counts: np.ndarray  # [S] int64: tokens of each turn before this step
    is_wanted: np.ndarray  # [S] bool: False where the previous step turns out to have ended the turn
    receipt: Receipt  # of [>= S]


class Engine:
    """Continuous batching over a paged cache. `sampling`, `statistics`, `keep_cache` may be replaced between runs."""

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
        run_ahead: bool | None = None,
    ) -> None:
        """`sampling` defaults to the configuration's.

        With `stop_at_tags` off, turns run on to EOS or their limit and are cut afterwards, as in the original: same
        trajectories, more work. `decode_graphs` defaults to CUDA graphs if `rollout.cuda_graphs` is on and there are a
        GPU and Triton. `run_ahead` defaults to on if there is a GPU; on a CPU, which is both host and device, running
        ahead only adds work.
        """
        vocab_size = model.config.vocab_size
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.sampling = sampling or SamplingParams(config.temperature, config.top_p, config.top_k)
        self.stop_at_tags = stop_at_tags
        self.keep_cache = config.keep_cache is True  # `auto` is decided by the run, which knows what else needs memory
        self.token_bytes = vocabulary_bytes(tokenizer, vocab_size)
        self._matcher = StopMatcher(self.token_bytes)
        self.is_eos = np.zeros(vocab_size, dtype=bool)  # [V]: ends a turn by itself
        self.is_eos[list(tokenizer.eos_ids)] = True
        self._transfers = Transfers(model.head_weight.device)
        if decode_graphs is None and config.cuda_graphs and self._transfers.device.type == "cuda" and has_triton():
            decode_graphs = CudaDecodeGraphs  # without Triton, attention over the cache waits for the device
        self._graphs_class, self._graphs = decode_graphs, None
        self._runs_ahead = self._transfers.device.type == "cuda" if run_ahead is None else run_ahead
        self._under_way: Launched | None = None
        self._cache: KVCache | None = None
        self._scheduler = Scheduler(self._make_slots(0))

    @property
    def statistics(self) -> RolloutStatistics:
        """Times and counts of the run so far."""
        return self._scheduler.statistics

    @statistics.setter
    def statistics(self, statistics: RolloutStatistics) -> None:
        """Use another object for all further times and counts."""
        self._scheduler.statistics = statistics

    @property
    def has_work(self) -> bool:
        """Whether a sequence can run. One that waits for a slot, or for memory held by searching ones, cannot."""
        return self._under_way is not None or self._scheduler.has_work

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Take new sequences, with their prompts appended and `turn_limit` set."""
        scheduler = self._scheduler
        scheduler.share_prefixes = self.share_prefixes
        scheduler.add(sequences)
        wanted = min(self.config.max_num_seqs, scheduler.num_waiting)
        if wanted > len(self._slots) == len(self._slots.free):
            self._allocate(wanted)
        if self._graphs is not None:
            self._graphs.refresh()

    def resume(self, sequence: Sequence) -> None:
        """Take back a sequence whose turn ended, with the observation appended and `turn_limit` set."""
        self._scheduler.resume(sequence)

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence whose turn ended and that will not be resumed."""
        if sequence.slot is not None:
            self._slots.release(sequence)

    def reset(self) -> None:
        """Forget every sequence, but keep the memory."""
        self._under_way = None
        self._scheduler.reset(self._make_slots(len(self._slots)))

    def free_cache(self) -> None:
        """Free the memory of cache and graphs until the next `add`, unless `keep_cache`. No sequence may be held."""
        assert len(self._slots.free) == len(self._slots)
        if not self.keep_cache:
            self._transfers.finish()
            self._cache = self._graphs = self._last_tokens = None
            self._scheduler.table = self._make_slots(0)
            if self._transfers.device.type == "cuda":
                # Return it to the driver. Otherwise what an update allocates and keeps (Adam's moments, in the first
                # one) would lie in pieces of this memory, and no later cache would find it whole: for a 3B model 3 of
                # 26 GiB would be lost (the allocator's rules, simulated, 2026-11-27).
                torch.cuda.empty_cache()

    def update_weights(self) -> dict[str, float]:
        """Do nothing, report nothing: the model is the trainer's own. Engines with a copy need it (vllm_engine.py)."""
        return {}

    def close(self) -> None:
        """Do nothing: the memory goes with the object."""

    def step(self) -> list[Sequence]:
        """Advance every running sequence by one token; return those whose turn ended with it, its tokens appended."""
        assert self.has_work
        step = self._under_way or self._launch()
        self._under_way = self._launch() if self._runs_ahead and self._scheduler.can_run_ahead else None
        started = time.perf_counter()
        token_ids, logprobs = (values[: len(step.counts)] for values in step.receipt.wait())
        self.statistics.time_forward += time.perf_counter() - started
        return self._postprocess(step, token_ids, logprobs)

    @property
    def _slots(self) -> SlotTable:
        return self._scheduler.table

    def _make_slots(self, num_slots: int) -> SlotTable:
        """Make slots without sequences, and the tables of the cache's blocks."""
        config, size = self.config, block_size(self._transfers.device)
        num_blocks = cache_blocks(config, num_slots, size)
        blocks = BlockTables(num_slots, config.max_sequence_tokens, size, num_blocks)
        return SlotTable(config.max_turn_tokens, blocks)

    def _allocate(self, num_slots: int) -> None:
        weight, max_length = self.model.head_weight, self.config.max_sequence_tokens
        self._transfers.finish()
        self._cache = self._graphs = None  # first, so that old and new are never held together
        self._scheduler.table = self._make_slots(0)
        table = self._make_slots(num_slots)
        num_spare = int(self._graphs_class is not None)  # a slot and its block, for rows without a sequence
        try:
            self._cache = KVCache(
                self.model.config, num_slots + num_spare, max_length, weight.dtype, weight.device,
                num_blocks=table.blocks.num_free + num_spare,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            error.add_note("this was for the KV cache: lower rollout.max_num_seqs, or rollout.cache_tokens")
            raise
        self._last_tokens = torch.zeros(num_slots + num_spare, dtype=torch.int64, device=weight.device)  # [C]
        if self._graphs_class is not None:
            memory = self._cache, self._last_tokens
            self._graphs = self._graphs_class(self.model, *memory, self._transfers, num_slots)
        self._scheduler.table = table  # last: if there is no memory for all of the above, there must be no slots

    def _launch(self) -> Launched:
        """Launch a step. A sequence whose turn reaches its limit with it is known already, and does not run on."""
        batch, table = self._scheduler.schedule(), self._slots
        started = time.perf_counter()
        counts = table.turn_count[batch.slots]
        # The next number of each sequence's own stream.
        randoms = uniforms(table.stream_key[batch.slots], table.stream_start[batch.slots] + counts.astype(np.uint64))
        receipt = (self._replay if self._can_replay(batch) else self._run)(batch, randoms)
        table.num_cached[batch.slots] += batch.lengths
        table.turn_count[batch.slots] = counts + 1
        self._scheduler.running = batch.slots[counts + 1 < table.turn_limit[batch.slots]]
        self.statistics.time_forward += time.perf_counter() - started
        return Launched(batch, counts, np.ones(len(counts), dtype=bool), receipt)

    def _can_replay(self, batch: Batch) -> bool:
        return self._graphs is not None and batch.only_decodes

    def _replay(self, batch: Batch, randoms: np.ndarray) -> Receipt:  # [S] fp64
        """Do what `_run` does for a batch that only decodes, by replaying a recorded step."""
        graphs, statistics = self._graphs, self.statistics
        num_recordings, time_recording = graphs.num_recordings, graphs.time_recording
        positions, blocks = self._slots.num_cached[batch.slots], self._slots.blocks
        own = blocks.table[batch.slots, positions // blocks.block_size]
        try:
            receipt = graphs.decode(batch.token_ids, batch.slots, positions, own, randoms, self.sampling)
        except torch.OutOfMemoryError:
            self._count_split()
            receipt = None
        if receipt is None:  # after the handler, whose exception keeps the attempt's tensors alive
            return self._run(batch, randoms)
        statistics.num_replayed_steps += 1
        statistics.num_recordings += graphs.num_recordings - num_recordings
        statistics.time_recording += graphs.time_recording - time_recording
        return receipt

    @torch.no_grad()
    def _run(self, batch: Batch, randoms: np.ndarray) -> Receipt:  # [S] fp64
        """Run the model and sample; the next tokens and their log-probabilities are then on their way to the host."""
        cu_seqlens = np.zeros(len(batch.slots) + 1, dtype=np.int64)
        np.cumsum(batch.lengths, out=cu_seqlens[1:])
        positions = self._slots.num_cached[batch.slots]
        arrays = (batch.token_ids, cu_seqlens, batch.slots, positions, randoms)
        sent = self._transfers.send((*arrays, *batch.changes, *copied_places(batch.copies)))
        (token_ids, cu_seqlens, slots, positions, randoms), moves = sent[:5], sent[5:]
        if batch.changes:
            self._cache.set_table(*moves[:3])
        if batch.copies:
            self._cache.copy(*moves[-3:])
        own = token_ids[: batch.num_running]
        own.copy_(torch.where(own < 0, self._last_tokens[slots[: batch.num_running]], own))
        tokens = Tokens(token_ids, cu_seqlens, slots, positions, batch.lengths)
        hidden = forward_in_parts(self.model, self._cache, tokens, self._count_split)  # [S, D]
        head = self.model.head_weight, randoms, self.sampling
        sampled, logprobs = sample_in_parts(hidden, *head, self._count_split)
        self._last_tokens[slots] = sampled
        return self._transfers.fetch(pack(sampled, logprobs))

    def _count_split(self) -> None:
        self.statistics.num_splits += 1

    def _postprocess(self, step: Launched, token_ids: np.ndarray, logprobs: np.ndarray) -> list[Sequence]:
        """Store the tokens ([S] int64) and log-probabilities ([S] fp32); return the sequences whose turn ended."""
        table, slots, counts = self._slots, step.batch.slots, step.counts
        if not step.is_wanted.all():
            slots, counts, token_ids, logprobs = (x[step.is_wanted] for x in (slots, counts, token_ids, logprobs))
        num_broken = np.count_nonzero(~np.isfinite(logprobs))
        if num_broken:
            raise ValueError(
                f"the model's logits are not finite for {num_broken} of {len(logprobs)} sequences; its weights are "
                "broken: go back to a checkpoint before this"
            )
        table.turn_tokens[slots, counts] = token_ids
        table.turn_logprobs[slots, counts] = logprobs
        table.stop_state[slots] = states = self._matcher.advance(table.stop_state[slots], token_ids)
        ended = (counts + 1 == table.turn_limit[slots]) | self.is_eos[token_ids]
        if self.stop_at_tags:
            ended |= states == self._matcher.matched
        if not ended.any():
            return []
        self._stop(slots[ended])
        return [self._end_turn(slot) for slot in slots[ended].tolist()]

    def _stop(self, slots: np.ndarray) -> None:  # [n] int64
        """Stop running these slots; a step of theirs that is under way is undone, as if it had never been."""
        scheduler, table, ahead = self._scheduler, self._slots, self._under_way
        is_stopped = np.zeros(len(table), dtype=bool)  # [C]
        is_stopped[slots] = True
        scheduler.running = scheduler.running[~is_stopped[scheduler.running]]
        if ahead is None:
            return
        is_void = is_stopped[ahead.batch.slots]
        void = ahead.batch.slots[is_void]
        table.num_cached[void] -= 1
        table.turn_count[void] -= 1
        ahead.is_wanted &= ~is_void
        self.statistics.num_discarded_tokens += len(void)
        if not ahead.is_wanted.any():
            self._under_way = None

    def _end_turn(self, slot: int) -> Sequence:
        """Append the turn's tokens to its sequence, which keeps its slot. The last of them is not cached yet."""
        table = self._slots
        sequence = table.occupants[slot]
        sampled = int(table.turn_count[slot])
        count = sampled if self.stop_at_tags else self._num_kept(sequence, table.turn_tokens[slot, :sampled])
        self.statistics.num_discarded_tokens += sampled - count
        sequence.append_turn(table.turn_tokens[slot, :count].copy(), table.turn_logprobs[slot, :count].copy())
        num_cached = int(table.num_cached[slot])
        sequence.num_computed = max(sequence.num_computed, min(num_cached, sequence.length))
        sequence.num_cached = table.num_cached[slot] = min(num_cached, sequence.length - 1)
        self._scheduler.register(sequence)
        return sequence

    def _num_kept(self, sequence: Sequence, token_ids: np.ndarray) -> int:  # [n] int64
        """Count the tokens to keep of a turn that ran on to EOS or its limit: through its first stop tag, else all."""
        return self._matcher.find(token_ids) or len(token_ids)


def cache_blocks(config: RolloutConfig, num_slots: int, size: int) -> int:
    """Count the cache's blocks of `size` places: enough for a sequence of any length in every slot, or fewer if
    `rollout.cache_tokens` says so."""
    most = num_slots * -(-config.max_sequence_tokens // size)
    return most if config.cache_tokens is None else min(most, -(-config.cache_tokens // size))
