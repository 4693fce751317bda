"""Beyond 2^31 numbers, where a 32-bit product would wrap around: the last blocks of a cache and rows of a corpus.

It takes some gigabytes, and seconds.
"""

from __future__ import annotations

import pytest
import torch
from searchr1_kernels import TopKIndex, cached_attention, open_search, rotary_write

from searchr1_fast.models import DecoderConfig, KVCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LIMIT = 1 << 31


def need(num_bytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < num_bytes:
        pytest.skip(f"needs {num_bytes >> 30} GiB, and {free >> 30} are free")


def test_the_last_blocks_of_a_cache():
    """Written, copied and read as in a cache of six blocks, to the bit; for lone tokens and for several together."""
    need(12 << 30)
    num_heads, num_kv_heads, head_dim, places = 16, 8, 128, 64
    shape = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = DecoderConfig(**shape, num_attention_heads=16, num_key_value_heads=num_kv_heads, head_dim=head_dim)
    most = LIMIT // (num_kv_heads * places * head_dim) + 200
    generator = torch.Generator("cuda").manual_seed(0)

    def numbers(heads: int) -> torch.Tensor:
        return torch.randn(130, heads, head_dim, device="cuda", generator=generator, dtype=torch.bfloat16)

    query, key, value = numbers(num_heads), numbers(num_kv_heads), numbers(num_kv_heads)
    angles = torch.randn(2, 130, 1, head_dim, device="cuda", generator=generator)
    slots = torch.zeros(130, dtype=torch.int64, device="cuda")
    positions = torch.arange(130, device="cuda")
    tiles = torch.tensor([[0, 32], [32, 32], [64, 32], [96, 32], [128, 2]], dtype=torch.int32, device="cuda")
    found = []
    for num_blocks in (6, most):
        cache = KVCache(config, 2, 3 * places, torch.bfloat16, "cuda", num_blocks=num_blocks)
        assert cache.block_size == places and (cache.keys[0].numel() > LIMIT) == (num_blocks == most)
        cache.table[:] = torch.arange(num_blocks - 6, num_blocks, device="cuda").view(2, 3)
        memory = cache.keys[0], cache.values[0]
        blocks, inside = cache.locate(slots, positions)
        rotated = rotary_write(query, key, value, *angles, *memory, blocks, inside)
        cache.copy(blocks, blocks + 3, inside)
        results = [rotated]
        for slot in (slots, slots + 1):
            results.append(cached_attention(rotated, *memory, slot, positions, table=cache.table))
            results.append(cached_attention(rotated, *memory, slot, positions, table=cache.table, tiles=tiles))
        results += [part[-6:].clone() for part in memory]
        found.append(results)
        del cache, memory
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    _, alone, together, alone_of_copy, together_of_copy, *_ = found[1]
    assert alone.isfinite().all() and torch.equal(alone, alone_of_copy) and torch.equal(together, together_of_copy)


@pytest.mark.parametrize("coarse", ["float", "int8"])
def test_the_last_rows_of_a_corpus(coarse):
    """Ten rows near each query: at the beginning, around the limit, and at the end; the others are far from all."""
    need(20 << 30)
    size, num_rows = 768, 2_900_000
    assert num_rows * size > LIMIT
    generator = torch.Generator("cuda").manual_seed(0)
    corpus = torch.empty(num_rows, size, device="cuda", dtype=torch.float16).normal_(generator=generator)
    search_queries = torch.randn(4, size, device="cuda", generator=generator)
    firsts = (0, LIMIT // size - 5, num_rows - 300, num_rows - 10)
    for query, first in zip(search_queries, firsts, strict=True):
        corpus[first : first + 10] = query + 0.05 * torch.randn(10, size, device="cuda", generator=generator)
    search = open_search(TopKIndex(corpus, coarse=coarse), 4, 10)
    search.queries[:] = search_queries
    hits = search.launch(4, 10)
    search.settle(4, 10)
    for place, (query, first) in enumerate(zip(search_queries, firsts, strict=True)):
        exact = (corpus[first : first + 10].double() @ query.double()).float()
        scores, order = exact.sort(descending=True)
        assert torch.equal(hits.scores[place], scores) and torch.equal(hits.ids[place], order + first)
