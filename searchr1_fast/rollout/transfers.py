"""Send a step's inputs to the device and read its results back: one copy each way, and one wait.

A copy of a few numbers takes a GPU longer to begin than to make, and a copy from memory that is not pinned makes the
host wait. So everything that a step needs travels in one pinned buffer, 8 bytes per number, and its results come back
in another. There are two such pairs, used in turn, because a step may be launched before the previous one is read. A
pair is reused once the device has done all that it was asked to do with it, whether or not the results were read.

Where sequences join, the model also sends its attention's table of tiles: a few kB, from memory that the driver copies
at once. On a CPU nothing is pinned, and what is sent is the buffer itself.

Shape legend
    S  sequences of a step    n  numbers of one array    W  all that is sent
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

NUM_PAIRS = 2


class Transfers:
    """Both pairs of buffers, which grow with what is sent."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._pairs = [_Pair(self._buffer(4096, torch.int64), self._buffer(512, torch.int32)) for _ in range(NUM_PAIRS)]

    def send(
        self,
        arrays: Sequence[np.ndarray],  # [n] int64 or fp64 each
        target: torch.Tensor | None = None,  # [>= W] int64 on the device; None: new memory
    ) -> list[torch.Tensor]:  # [n] each, of the same type
        """Put the arrays on the device, in order and end to end in one piece of memory.

        On a CPU they are valid until the `send` after the next.
        """
        if not self._pairs[-1].is_unfetched:  # else its step failed: reuse it, as the other may not have been read yet
            self._pairs.append(self._pairs.pop(0))
        pair = self._pairs[-1]
        self._finish(pair)
        pair.is_unfetched = self._is_cuda
        sizes = [len(array) for array in arrays]
        total = sum(sizes)
        if total > len(pair.sent):
            pair.sent = self._buffer(2 * total, torch.int64)
        host = pair.sent[:total]
        np.concatenate([array.view(np.int64) for array in arrays], out=host.numpy())
        if target is None:
            memory = host.to(self.device, non_blocking=True)
        else:
            memory = target[:total]
            memory.copy_(host, non_blocking=True)
        parts = zip(arrays, memory.split(sizes), strict=True)
        return [part.view(torch.float64) if array.dtype == np.float64 else part for array, part in parts]

    def fetch(self, results: torch.Tensor) -> Receipt:  # [2 * S] int32, from `pack`
        """Begin to copy the results of the last `send` to the host, without waiting."""
        pair = self._pairs[-1]
        if not self._is_cuda:
            return Receipt(self, pair, results.numpy().copy())
        if len(results) > len(pair.received):
            pair.received = self._buffer(2 * len(results), torch.int32)
        host = pair.received[: len(results)]
        host.copy_(results, non_blocking=True)
        pair.done, pair.is_unfetched = torch.cuda.Event(), False
        pair.done.record(torch.cuda.current_stream(self.device))
        return Receipt(self, pair, host.numpy())

    def finish(self) -> None:
        """Wait until nothing is under way."""
        for pair in self._pairs:
            self._finish(pair)

    def _finish(self, pair: _Pair) -> None:
        if pair.is_unfetched:  # the step failed, and what it sent may still be on its way
            torch.cuda.current_stream(self.device).synchronize()
            pair.is_unfetched = False
        if pair.done is not None:
            self._wait(pair.done)
            pair.done = None

    def _wait(self, done: torch.cuda.Event) -> None:
        """Wait until the device has done all that it was asked to do before the event."""
        done.synchronize()

    def _buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self._is_cuda)


class _Pair:
    """The buffers of one step.

    `done`: when the device no longer needs them; None if it does not know of them. `is_unfetched`: something was sent
    to a GPU, and nothing was asked back.
    """

    def __init__(self, sent: torch.Tensor, received: torch.Tensor) -> None:
        self.sent, self.received = sent, received
        self.done: torch.cuda.Event | None = None
        self.is_unfetched = False


class Receipt:
    """Token ids and log-probabilities of a step, on their way. Read them once, before the `send` after the next."""

    def __init__(self, transfers: Transfers, pair: _Pair, host: np.ndarray) -> None:  # [2 * S] int32
        self._transfers, self._pair, self._host, self._done = transfers, pair, host, pair.done

    def wait(self) -> tuple[np.ndarray, np.ndarray]:  # [S] int64, [S] fp32
        """Wait for them and return them: the one wait of a step."""
        assert self._pair.done is self._done, "the buffers are another step's by now"
        self._transfers._finish(self._pair)
        token_ids, logprobs = self._host.copy().reshape(2, -1)
        return token_ids.astype(np.int64), logprobs.view(np.float32)


def pack(token_ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:  # [S] int64, [S] fp32 -> [2 * S] int32
    """Join both, so that one copy reads them: the ids, then the bits of the log-probabilities."""
    return torch.cat((token_ids.int(), logprobs.view(torch.int32)))
