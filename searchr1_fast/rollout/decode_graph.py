"""Decode steps, recorded once per batch size and replayed.

A step in which no sequence joins is the same work every time: each sequence's last token passes through the layers, the
head and the sampler. Launched one by one, its hundreds of small kernels take the host longer than the device. Recorded
as a CUDA graph, they are one launch. The graph reads what differs from step to step (tokens, slots, positions,
uniforms) from memory at fixed addresses, and leaves tokens and log-probabilities at fixed addresses. It finds each
sequence's last sampled token on the device, so the host may launch a step before it has read the previous one.

A graph has a fixed number of rows, so a step takes the next larger of a few sizes (`bucket_size`). Rows without a
sequence write place 0 of a spare slot, the cache's last, in a spare block; no sequence uses either, and what these rows
sample is not read. Of the cache's table, a step is sent the entries that it writes to.

`DecodeGraphs` replays by calling the function that would be recorded: it is the plain twin, for tests on a CPU.
`CudaDecodeGraphs` records it. Graphs hold addresses: of the cache, of the weights, and of one another's scratch memory
(they share one pool, as only one runs at a time). So new graphs are made with every cache, and `refresh` forgets those
whose weights have moved. Weights that are written in place stay where they are.

Shape legend
    S  sequences of a step    B  rows of a bucket, at least S    C  cache slots
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache as cached

import numpy as np
import torch

from searchr1_fast.models import Decoder, KVCache
from searchr1_fast.rollout.sampling import SamplingParams, head_logits, sample
from searchr1_fast.rollout.transfers import Receipt, Transfers, pack

NUM_INPUTS = 5  # numbers per row that a step sends


class DecodeGraphs:
    """Replays steps over one cache, whose last slot and block are spare. This class replays a step by running it."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        last_tokens: torch.Tensor,  # [C] int64: what each slot's sequence sampled last
        transfers: Transfers,
        max_rows: int,
    ) -> None:
        assert cache.num_slots > max_rows
        self._model, self._cache, self._transfers, self._max_rows = model, cache, transfers, max_rows
        self._last_tokens = last_tokens
        self._inputs = torch.zeros(NUM_INPUTS * max_rows, dtype=torch.int64, device=transfers.device)
        self._outputs = torch.zeros(2 * max_rows, dtype=torch.int32, device=transfers.device)
        self._replays: dict[tuple[SamplingParams, int], Callable[[], None]] = {}
        self._addresses = self._weight_addresses()
        self.num_recordings = 0
        self.time_recording = 0.0  # seconds

    def decode(
        self,
        token_ids: np.ndarray,  # [S] int64: the last token of each sequence; -1: what it sampled last
        slots: np.ndarray,  # [S] int64
        positions: np.ndarray,  # [S] int64: how many tokens each slot holds already
        blocks: np.ndarray,  # [S] int64: the cache's blocks in which these positions are
        uniforms: np.ndarray,  # [S] fp64
        params: SamplingParams,
    ) -> Receipt:  # of [B]: the sequences' rows are the first
        """Cache the last tokens and sample the next; these and their log-probabilities are on their way to the host.

        torch.OutOfMemoryError if there is no memory to record the step; it is then as if it had not been asked for.
        """
        size = bucket_size(len(slots), self._max_rows)
        spare_slot, spare_block = self._cache.num_slots - 1, self._cache.num_blocks - 1
        rows = ((token_ids, 0), (slots, spare_slot), (positions, 0), (blocks, spare_block), (uniforms, 0))
        inputs = self._transfers.send([_lengthen(array, size, filling) for array, filling in rows], self._inputs)
        outputs = self._outputs[: 2 * size]
        replay = self._replays.get((params, size))
        if replay is None:  # after the inputs were sent: recording runs the step, and writes where they say
            started = time.perf_counter()
            step = _decode_step(self._model, self._cache, self._last_tokens, inputs, outputs, params)
            before = self._last_tokens.clone()
            try:
                replay = self._replays[params, size] = self._record(step)
            finally:  # also if there was no memory to record it, and the engine makes the step in another way
                self._last_tokens.copy_(before)
            self.num_recordings += 1
            self.time_recording += time.perf_counter() - started
        replay()
        return self._transfers.fetch(outputs)

    def refresh(self) -> None:
        """Forget all recordings if any weight has moved."""
        addresses = self._weight_addresses()
        if addresses != self._addresses:
            self._replays.clear()
            self._addresses = addresses

    def _weight_addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._model.parameters()]

    def _record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does what the step does, from and to the same memory."""
        return step


class CudaDecodeGraphs(DecodeGraphs):
    """Records steps as CUDA graphs.

    The first step of a rollout is about its widest, so the pool has its full size from the first graph on. A step runs
    once before it is recorded, so that kernels are compiled and loaded and libraries take their memory, none of which
    may happen during a recording. The replay then writes again what this run wrote.
    """

    def __init__(
        self, model: Decoder, cache: KVCache, last_tokens: torch.Tensor, transfers: Transfers, max_rows: int
    ) -> None:
        super().__init__(model, cache, last_tokens, transfers, max_rows)
        self._stream = _recording_stream(transfers.device)
        self._pool = torch.cuda.graph_pool_handle()

    def refresh(self) -> None:
        """Also renew the pool if no graph is left."""
        super().refresh()
        self._renew_pool()

    def _record(self, step: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._transfers.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                step()
        finally:  # also when memory ran out midway: what was launched still writes to memory that others will use
            current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: a search in another thread may use the device while this one records
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        except torch.OutOfMemoryError:
            self._renew_pool()
            raise
        return graph.replay

    def _renew_pool(self) -> None:
        """Take a new pool if no graph is left: a pool whose graphs are all gone cannot be used again."""
        if not self._replays:
            self._pool = torch.cuda.graph_pool_handle()


@cached
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's stream for recordings, as the default stream cannot be recorded.

    There is only one, because torch keeps cuBLAS's workspace (32 MiB on Hopper) for good for every stream that it has
    met, and a new cache comes with every rollout.
    """
    return torch.cuda.Stream(device)


def bucket_size(num_rows: int, max_rows: int) -> int:
    """How many rows the graph for `num_rows` sequences has: 1, 2, 4, 8, 16, 24, 32, …, and `max_rows` at most."""
    size = 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8
    return min(size, max_rows)


def _decode_step(
    model: Decoder,
    cache: KVCache,
    last_tokens: torch.Tensor,  # [C] int64
    inputs: list[torch.Tensor],  # token_ids, slots, positions, blocks [B] int64, uniforms [B] fp64
    outputs: torch.Tensor,  # [2 * B] int32, from `pack`
    params: SamplingParams,
) -> Callable[[], None]:
    """Return a function that runs one step from these inputs to these outputs, with no value known to the host."""
    token_ids, slots, positions, blocks, uniforms = inputs

    @torch.no_grad()
    def step() -> None:
        cache.set_table(slots, positions // cache.block_size, blocks)
        own = torch.where(token_ids < 0, last_tokens[slots], token_ids)
        hidden = model.decode_cached(own, slots, positions, cache)  # [B, D]
        sampled, logprobs = sample(head_logits(hidden, model.head_weight), uniforms, params)
        last_tokens[slots] = sampled
        outputs.copy_(pack(sampled, logprobs))

    return step


def _lengthen(array: np.ndarray, size: int, filling: int) -> np.ndarray:  # [S] -> [B]
    return np.concatenate((array, np.full(size - len(array), filling, dtype=array.dtype)))
