"""Bytes that `linear_policy_loss` takes on CUDA, with rows cut into chunks as in `searchr1_kernels`, by its numbers."""

from __future__ import annotations

from searchr1_fast.models import DecoderConfig

_FP32 = 4
CHUNK_BYTES = 1 << 30  # logits of a chunk and their gradient
KEPT_BYTES = 5 << 27  # likewise, where a product of its own keeps 16 bits per logit
ROUNDED_SUMS = 8  # up to this many chunks, the weight's gradient is summed in the compute type
TILE_ROWS = 128  # a chunk is a multiple of this many rows


def head_bytes(decoder: DecoderConfig, size: int, num_scored: int, is_learned: bool = True) -> list[tuple[str, int]]:
    """`linear_policy_loss` on CUDA at its peak: both gradients of the head (only the hidden states' if it is frozen),
    and a chunk of logits with its gradient or, if that is more, the copy in the compute type of an fp32 gradient of the
    weight."""
    weight = decoder.vocab_size * decoder.hidden_size if is_learned else 0
    row = decoder.vocab_size * (_FP32 + (size if size != _FP32 else 0))
    rows, chunks = _head_chunks(num_scored, CHUNK_BYTES // row)
    ways = [(rows * row, chunks, 0)]
    if size != _FP32:  # a GPU's architecture decides which way it takes
        rows, chunks = _kept_chunks(num_scored, decoder.vocab_size * size)
        product = _FP32 * rows * decoder.hidden_size  # a chunk's gradient of hidden states, before it is scaled
        ways.append((rows * decoder.vocab_size * size, chunks, product))
    peaks = []
    for logits, chunks, product in ways:
        rounded = size if chunks <= ROUNDED_SUMS else _FP32
        peaks.append((max(logits, size * weight) if rounded > size else logits, rounded * weight, product))
    logits, gradient, product = max(peaks, key=sum)
    return [
        ("logits of a chunk", logits),
        ("weight's gradient", gradient),
        ("hidden states and gradient", 2 * num_scored * decoder.hidden_size * size + product),
    ]


def _kept_chunks(num_scored: int, row: int) -> tuple[int, int]:
    """Like `_head_chunks`, with `row` bytes of probabilities per row; if these are too many chunks, half as many."""
    rows, chunks = _head_chunks(num_scored, KEPT_BYTES // row)
    return (rows, chunks) if chunks <= ROUNDED_SUMS else _head_chunks(num_scored, 2 * KEPT_BYTES // row)


def _head_chunks(num_scored: int, most: int) -> tuple[int, int]:
    """-> rows of a chunk, if about `most` fit, and the number of chunks."""
    longest = -(-num_scored // max(1, -(-num_scored // max(256, most))))
    rows = longest + -longest % TILE_ROWS
    return rows, -(-num_scored // max(1, rows))
