"""An encoder's forward pass over packed texts, recorded as a CUDA graph once per number of tokens, and replayed.

A pass is some hundred small kernels, which take the host longer to launch than the device to run for a few queries.
Recorded as a CUDA graph they are one launch, which reads texts from and leaves vectors in memory at fixed addresses. A
graph has a fixed number of rows, so a batch uses the next larger of some sizes. Of the rows beyond its tokens, the last
is a text of its own; every unused entry points to it, and its result is ignored.

What makes this possible for texts of any length is attention that reads on the device where each text begins and ends
(`searchr1_kernels.cached_attention`; keys are the packed tokens, and every token sees all of its text). Attention by
torch, one launch for all texts of a length, takes as many launches as there are lengths, with other shapes in every
batch; that cannot be recorded. Each row's arithmetic is the same in every batch, so a text's vector is bit for bit the
same alone and among others.

`RecordedForward` replays by calling the function that would be recorded: the plain twin, for tests on a CPU.
`CudaRecordedForward` records it.

Shape legend
    S  texts, or places for them    T  tokens, or rows for them    N  tiles    H  components
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from searchr1_kernels.cached_attention import tile_tokens

from searchr1_fast.retrieval.staging import HostBuffer, copies_of
from searchr1_fast.retrieval.streams import on_stream, recording_again

_MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_ROWS_OF_A_TEXT = 4  # R rows have places for R / 4 texts and R / 4 tiles; batches of shorter texts use a larger size


class PackedTexts(NamedTuple):
    """Texts laid end to end, int64 on the device."""

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]: in the text
    firsts: torch.Tensor  # [T]: the row where the text of this row begins
    lasts: torch.Tensor  # [T]: the position of its last token
    text_firsts: torch.Tensor  # [S]: the row where a text begins
    text_lasts: torch.Tensor  # [S]: the position of its last token
    tiles: torch.Tensor  # [N, 2]: first row, and count, of tokens of one text

    @classmethod
    def views(cls, memory: torch.Tensor, num_rows: int) -> PackedTexts:
        """Views of memory [at least `num_numbers`] int64, on any device."""
        places = num_places(num_rows)
        sizes = [num_rows] * 4 + [places] * 2 + [2 * places]
        parts = memory[: sum(sizes)].split(sizes)
        return cls(*parts[:-1], parts[-1].view(-1, 2))


def num_places(num_rows: int) -> int:
    """The number of places for texts, and for tiles, that this many rows have."""
    return num_rows // _ROWS_OF_A_TEXT


def num_numbers(num_rows: int) -> int:
    """How many numbers a `PackedTexts` of this many rows holds."""
    return 4 * num_rows + 4 * num_places(num_rows)


Forward = Callable[[PackedTexts], torch.Tensor]  # -> [S, H] fp32, a vector for each place


class RecordedForward:
    """Replays passes of one encoder, one at a time; here, by running them."""

    def __init__(self, forward: Forward, device: torch.device, step: int, most_tokens: int) -> None:
        """`step`: sizes are multiples of it. `most_tokens`, also a multiple: of a batch; larger ones are cut."""
        assert most_tokens % step == 0
        self.sizes = (*(step * many for many in _MULTIPLES if step * many <= most_tokens), most_tokens + step)
        self.enabled = True  # False: launch kernel by kernel, for benchmarks
        self._forward, self._device = forward, device
        self._host = HostBuffer(copies_of(device))
        self._memory = torch.zeros(num_numbers(self.sizes[-1]), dtype=torch.int64, device=device)
        self._replays: dict[int, Callable[[], torch.Tensor]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many sizes are recorded."""
        return len(self._replays)

    def record(self) -> None:
        """Record all sizes, the largest first, so that the others share its memory; waits for the device."""
        with self._lock:
            for size in reversed(self.sizes):
                self._send([[0]], size)
                self._replays[size] = self._record(self._pass(size))

    def forget(self) -> None:
        """Drop the recordings and their working memory: the weights' memory is about to go, and addresses with it."""
        with self._lock:
            self._replays.clear()

    def record_again(self) -> None:
        """Record all sizes with the weights at their present addresses. Nothing runs, and nothing is waited for."""
        with self._lock:
            self._begin_again()
            for size in reversed(self.sizes):
                self._replays[size] = self._record_again(self._pass(size))

    def pooled(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Token ids of N texts, none of them empty -> their vectors [N,H] fp32 on the host."""
        with self._lock:
            return torch.cat([self._encode(part) for part in self._cut(texts)])

    def _encode(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        num_tokens, num_tiles = sum(map(len, texts)), sum(map(_num_tiles, texts))
        size = next(size for size in self.sizes if num_tokens < size and num_tiles <= num_places(size))
        self._send(texts, size)
        replay = self._replays.get(size) if self.enabled else None
        return (replay or self._pass(size))()[: len(texts)].cpu()

    def _pass(self, size: int) -> Callable[[], torch.Tensor]:
        texts = PackedTexts.views(self._memory, size)
        return lambda: self._forward(texts)

    def _send(self, texts: Sequence[Sequence[int]], size: int) -> None:
        """Write the texts where the pass of this size reads them."""
        staged = self._host.view((num_numbers(size),), torch.int64)
        fill(PackedTexts.views(staged, size), texts)
        # On the current stream, before the pass. The buffer is free: the vectors of what it last held were fetched.
        stream = None if self._device.type == "cpu" else torch.cuda.current_stream(self._device)
        copies_of(self._device, stream).start(self._memory[: len(staged)], staged)

    def _cut(self, texts: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
        """Cut texts into parts that fit the largest size."""
        begin = tokens = tiles = 0
        for place, text in enumerate(texts):
            tokens, tiles = tokens + len(text), tiles + _num_tiles(text)
            if place > begin and (tokens >= self.sizes[-1] or tiles > num_places(self.sizes[-1])):
                yield texts[begin:place]
                begin, tokens, tiles = place, len(text), _num_tiles(text)
        yield texts[begin:]

    def _record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """A function that does what `run` does, from and to the same memory."""
        return run

    def _begin_again(self) -> None:
        """Called before the first recording of `record_again`."""

    def _record_again(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """`_record`, for a `run` that has run before."""
        return run


class CudaRecordedForward(RecordedForward):
    """Records passes as CUDA graphs. Each runs once beforehand, so that kernels are compiled and loaded and libraries
    take their memory: none of this may happen during a recording."""

    def __init__(self, forward: Forward, device: torch.device, step: int, most_tokens: int) -> None:
        super().__init__(forward, device, step, most_tokens)
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def _record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with on_stream(self._stream):
            run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # The device is set because `torch.cuda.graph` waits for the current one: what was staged must have arrived.
        # thread_local: a trainer in another thread may use the device while this one records
        recording = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.device(self._device), torch.cuda.graph(graph, **recording):
            vectors = run()
        return _replay(graph, vectors)

    def _begin_again(self) -> None:
        # The pool of the dropped graphs is going away too: a recording must not join it.
        self._pool = torch.cuda.graph_pool_handle()

    def _record_again(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with on_stream(self._stream), recording_again(graph, pool=self._pool):
            vectors = run()
        return _replay(graph, vectors)


def _replay(graph: torch.cuda.CUDAGraph, vectors: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that runs the graph and returns the vectors [S,H] that it leaves, always in the same memory."""

    def replay() -> torch.Tensor:
        graph.replay()
        return vectors

    return replay


def fill(target: PackedTexts, texts: Sequence[Sequence[int]]) -> None:
    """Write texts to host memory; the remaining entries point to a text of one token in the last row."""
    lengths = np.array([len(text) for text in texts])
    begins, num_tokens = np.cumsum(lengths) - lengths, int(lengths.sum())
    counts = -(-lengths // tile_tokens(1))
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of each tile in its text
    skipped = number * tile_tokens(1)
    spare = len(target.token_ids) - 1
    assert num_tokens <= spare and len(skipped) <= len(target.tiles)
    token_ids = np.fromiter((token for text in texts for token in text), np.int64, num_tokens)
    tiles = np.repeat(begins, counts) + skipped, np.minimum(np.repeat(lengths, counts) - skipped, tile_tokens(1))
    rows = (
        (target.token_ids, token_ids, 0),
        (target.positions, np.arange(num_tokens) - np.repeat(begins, lengths), 0),
        (target.firsts, np.repeat(begins, lengths), spare),
        (target.lasts, np.repeat(lengths - 1, lengths), 0),
        (target.text_firsts, begins, spare),
        (target.text_lasts, lengths - 1, 0),
        (target.tiles[:, 0], tiles[0], spare),
        (target.tiles[:, 1], tiles[1], 1),
    )
    for tensor, values, filling in rows:
        array = tensor.numpy()
        array[: len(values)] = values
        array[len(values) :] = filling


def _num_tiles(text: Sequence[int]) -> int:
    return -(-len(text) // tile_tokens(1))
