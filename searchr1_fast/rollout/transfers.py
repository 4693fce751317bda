"""What a step of the engine sends to the device and reads back: one copy each way, and one wait. (Where sequences join,
the model sends its attention's table of tiles besides: a few kB, from memory that the driver copies at once.)

A copy of a few numbers takes a GPU longer to begin than to make, and one from memory that is not pinned makes the host
wait. So everything that a step needs travels in one pinned buffer, 8 bytes a number, and its results come back in
another. The buffers are used again by the next step: `receive` has waited for all that this one sent.

On a CPU nothing is pinned, and what is sent is the buffer itself.

Shape legend
    S  sequences of a step    n  numbers of one array    W  all that is sent
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class Transfers:
    """Both buffers; they grow with what is sent."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._sent = self._buffer(4096, torch.int64)
        self._received = self._buffer(512, torch.int32)

    def send(
        self,
        arrays: Sequence[np.ndarray],  # [n] int64 or fp64 each
        target: torch.Tensor | None = None,  # [>= W] int64 on the device; None: new memory
    ) -> list[torch.Tensor]:  # [n] each, of the same type
        """The arrays on the device, in order and end to end in one memory; on a CPU good until the next `send`."""
        sizes = [len(array) for array in arrays]
        total = sum(sizes)
        if total > len(self._sent):
            self._sent = self._buffer(2 * total, torch.int64)
        host = self._sent[:total]
        np.concatenate([array.view(np.int64) for array in arrays], out=host.numpy())
        if target is None:
            memory = host.to(self.device, non_blocking=True)
        else:
            memory = target[:total]
            memory.copy_(host, non_blocking=True)
        parts = zip(arrays, memory.split(sizes), strict=True)
        return [part.view(torch.float64) if array.dtype == np.float64 else part for array, part in parts]

    def receive(self, results: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:  # [2 * S] -> [S] int64, [S] fp32
        """Token ids and log-probabilities as `pack` made them; good until the next `receive`. Waits for the device."""
        host = results
        if self._is_cuda:
            if len(results) > len(self._received):
                self._received = self._buffer(2 * len(results), torch.int32)
            host = self._received[: len(results)]
            host.copy_(results, non_blocking=True)
            self._wait()
        token_ids, logprobs = host.numpy().reshape(2, -1)
        return token_ids.astype(np.int64), logprobs.view(np.float32)

    def _wait(self) -> None:
        """The one wait of a step: until what was asked of the device has been done."""
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        done.synchronize()

    def _buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self._is_cuda)


def pack(token_ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:  # [S] int64, [S] fp32 -> [2 * S] int32
    """Both in one memory, so that one copy reads them: the ids, then the bits of the log-probabilities."""
    return torch.cat((token_ids.int(), logprobs.view(torch.int32)))
