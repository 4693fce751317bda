"""The head's memory: the planner counts the kernels' chunks."""

from __future__ import annotations

import pytest
import torch
from searchr1_kernels import _linear_chunks, _linear_sums

from searchr1_fast import head_counts
from searchr1_fast.models.published import published_config


def test_the_head_s_chunks_are_the_kernel_s():
    assert _linear_chunks._CHUNK_BYTES["cuda"] == head_counts.CHUNK_BYTES
    assert _linear_chunks._KEPT_BYTES == head_counts.KEPT_BYTES
    assert head_counts.TILE_ROWS == _linear_chunks._TILE_ROWS
    assert head_counts.ROUNDED_SUMS == _linear_sums.ROUNDED_SUMS
    head = dict(head_counts.head_bytes(published_config("qwen2.5-3b"), 2, 4096))
    row = 151_936 * 6  # logits in fp32, gradient in bf16: 1177 rows make a GiB, 4096 rows four chunks of 1024
    assert head == {
        "logits of a chunk": 1024 * row,
        "weight's gradient": 2 * 151_936 * 2048,
        "hidden states and gradient": 2 * 2 * 4096 * 2048,
    }
    # Fewer than nine chunks are summed in bf16; from there on chunks of a library's logits, GiBs, have the larger sum.
    for num_rows, rows, bytes_of_row, size in (
        (9416, 1280, row, 2),
        (9424, 1152, row, 4),
        (35_328, 1152, row, 4),
        (35_329, 3968, 2 * 151_936, 4),
    ):
        head = dict(head_counts.head_bytes(published_config("qwen2.5-3b"), 2, num_rows))
        assert head["logits of a chunk"] == rows * bytes_of_row, num_rows
        assert head["weight's gradient"] == size * 151_936 * 2048


@pytest.mark.parametrize("vocabulary", [32_001, 151_936, 1_000_000])
def test_probabilities_have_the_kernel_s_chunks(vocabulary):
    """For any number of rows, with plenty of memory: equal lengths, and the same choice of a sum in 16 bits."""
    weight = torch.empty(vocabulary, 8, dtype=torch.bfloat16, device="meta")
    fitting = max(256, head_counts.KEPT_BYTES // (2 * vocabulary))
    edges = {number + more for number in range(0, 20 * fitting, fitting // 2) for more in (-1, 0, 1)}
    for num_rows in sorted({*edges, *range(0, 20 * fitting, 97), 255, 256, 257, 513, 768, 769}):
        if num_rows < 0:
            continue
        hidden = torch.empty(num_rows, 8, dtype=torch.bfloat16, device="meta")
        chunks = _linear_chunks.chunk_ranges(hidden, weight, for_gradient=True, kept=True)
        rows, num_chunks = head_counts._kept_chunks(num_rows, 2 * vocabulary)
        assert rows == _linear_chunks.whole_tiles(_linear_chunks.longest(chunks)), num_rows
        rounded = head_counts.ROUNDED_SUMS
        assert (num_chunks <= rounded) == (rounded * rows >= num_rows) == (len(chunks) <= rounded), num_rows
