"""The operator on a CPU, its table of tiles and its errors; on a GPU the kernels at real sizes."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import _cached_attention_numba, attention_tiles, cached_attention, reference


def problem(lengths, heads=4, kv_heads=2, d=16, places=40, dtype=torch.float32, device="cpu", starts=None):
    """-> query, keys, values, slots, positions: a sequence per slot, its tokens at the end of what is cached."""
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    cache = [numbers(len(lengths), kv_heads, places, d) for _ in range(2)]
    starts = [3 + s for s in range(len(lengths))] if starts is None else starts
    slots = torch.cat([torch.full((n,), s) for s, n in enumerate(lengths)]).to(device)
    positions = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)]).to(device)
    return numbers(sum(lengths), heads, d), *cache, slots, positions


TOLERANCES = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 69)), max_size=9),
    heads=st.sampled_from([(4, 2, 64), (3, 1, 32), (4, 2, 33), (1, 1, 1)]),
    blocks=st.sampled_from([None, (7, 10), (5, 16), (3, 32)]),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 100),
)
def test_matches_the_oracle(tokens, heads, blocks, dtype, seed):
    """Any tokens of any slots, also several at one place, and blocks that slots share; unread places are NaN."""
    generator, width, size = torch.Generator().manual_seed(seed), *(blocks or (1, 70))
    slots, positions = torch.tensor(tokens, dtype=torch.int64).view(-1, 2).T
    query = torch.randn(len(tokens), heads[0], heads[2], generator=generator).to(dtype)
    keys, values = torch.randn(2, 9, heads[1], size, heads[2], generator=generator).to(dtype)
    table = None if blocks is None else torch.randint(9, (5, width), generator=generator, dtype=torch.int32)
    seen = torch.zeros(keys.shape[0], size, dtype=torch.bool)
    for slot, position in tokens:
        for place in range(position + 1):
            seen[slot if blocks is None else table[slot, place // size], place % size] = True
    for memory in (keys, values):
        memory.transpose(1, 2)[~seen] = torch.nan
    have = cached_attention(query, keys, values, slots, positions, table=table)
    exact = (query.double(), keys.double(), values.double(), slots, positions, table)
    assert have.dtype == dtype
    torch.testing.assert_close(
        have.double(), reference.cached_attention(*exact), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]
    )


def test_scores_of_any_size_and_equal_ones():
    """One key that takes all attention, at any place, and keys that share it equally."""
    query, keys, values, slots, positions = problem([1, 5, 1])
    for scale in (1e4, -1e4, 0.0):
        exact = (query.double(), scale * keys.double(), values.double(), slots, positions)
        have = cached_attention(query, scale * keys, values, slots, positions)
        torch.testing.assert_close(have.double(), reference.cached_attention(*exact), rtol=1e-3, atol=1e-3)
        blocks = [x.unflatten(2, (5, 8)).transpose(1, 2).flatten(0, 1).contiguous() for x in (scale * keys, values)]
        table = torch.arange(15, dtype=torch.int32).view(3, 5)
        paged = cached_attention(query, *blocks, slots, positions, table=table)
        torch.testing.assert_close(paged, have, rtol=1e-3, atol=1e-3)


def test_a_table_says_where_places_are():
    query, keys, values, slots, positions = problem([1, 5, 1], dtype=torch.float64)
    table = torch.randperm(3 * 5, generator=torch.Generator().manual_seed(0)).view(3, 5).int()
    blocks = [torch.empty(15, 2, 8, 16, dtype=torch.float64) for _ in range(2)]
    for memory, cache in zip(blocks, (keys, values), strict=True):
        memory[table.flatten().long()] = cache.unflatten(2, (5, 8)).transpose(1, 2).flatten(0, 1)
    have = cached_attention(query, *blocks, slots, positions, table=table)
    assert torch.equal(have, cached_attention(query, keys, values, slots, positions))
    want = reference.cached_attention(query, *blocks, slots, positions, table)
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_paged_tokens_are_read_by_the_compiled_loop_with_the_same_bits_alone(dtype, tolerance, monkeypatch):
    query, keys, values, slots, positions = problem([1] * 12, places=96, starts=range(20, 80, 5), dtype=dtype)
    table = torch.arange(12 * 6).view(12, 6).int()
    blocks = [x.unflatten(2, (6, 16)).transpose(1, 2).flatten(0, 1).contiguous() for x in (keys, values)]
    table[1::2, 0] = table[::2, 0]  # pairs share their first block
    want = reference.cached_attention(query.double(), *(x.double() for x in blocks), slots, positions, table)
    monkeypatch.setattr(importlib.import_module("searchr1_kernels.cached_attention"), "_attend_torch", None)
    have = cached_attention(query, *blocks, slots, positions, table=table)
    assert have.dtype == dtype
    torch.testing.assert_close(have.double(), want, rtol=0, atol=tolerance)
    for t in range(12):
        own = slice(t, t + 1)
        alone = cached_attention(query[own], *blocks, slots[own], positions[own], table=table)
        assert torch.equal(alone, have[own])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 2, 64), (3, 1, 32)])
def test_written_out_blocks_give_what_the_plain_loop_gives(heads, kv_heads, d, dtype, tolerance, monkeypatch):
    """Ragged lengths, a group at once and head by head; nothing past a token's position is read."""
    query, keys, values, slots, positions = problem([1] * 11, heads, kv_heads, d, 96, dtype, starts=range(0, 88, 8))
    table = torch.arange(11 * 3).view(11, 3).int()
    for memory in (keys, values):
        memory.transpose(1, 2)[torch.arange(96) > positions[:, None]] = torch.nan
    blocks = [x.unflatten(2, (3, 32)).transpose(1, 2).flatten(0, 1).contiguous() for x in (keys, values)]
    have = cached_attention(query, *blocks, slots, positions, table=table)
    monkeypatch.setattr(_cached_attention_numba, "takes", lambda *_: False)
    want = cached_attention(query, *blocks, slots, positions, table=table)
    assert want.isfinite().all()
    torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)


def test_written_out_blocks_keep_what_is_not_finite():
    query, keys, values, slots, positions = problem([1] * 3, 4, 2, 64, 32, starts=[20, 20, 20])
    keys[0, 1, 7, 3], values[2, 0, 20, 5] = torch.nan, torch.inf
    table = torch.arange(3).view(3, 1).int()
    finite = cached_attention(query, keys, values, slots, positions, table=table).isfinite()
    assert finite[1].all() and finite[0, :2].all() and not finite[0, 2:].any()
    assert (~finite[2]).nonzero().tolist() == [[0, 5], [1, 5]]


@pytest.mark.parametrize("group", [1, 7, 8, 100])
@pytest.mark.parametrize("lengths", [[2], [1, 200, 1, 64, 65, 3, 0]])
def test_tiles_hold_every_token_once_and_none_crosses_a_sequence(lengths, group):
    tiles, num_alone = attention_tiles(lengths, group)
    ends = np.cumsum(lengths)
    owner = np.searchsorted(ends, tiles[:, 0], side="right")
    assert (tiles.sum(1) <= ends[owner]).all()
    tokens = np.concatenate([np.arange(first, first + count) for first, count in tiles])
    assert sorted(tokens) == list(range(sum(lengths)))
    assert tiles[:, 1].max() * group <= max(64, group)
    assert num_alone == lengths.count(1)
    assert (tiles[:num_alone, 1] == 1).all()


def test_no_table_where_every_token_is_alone():
    assert attention_tiles([1, 1], 2) is None
    assert attention_tiles([], 2) is None


@pytest.mark.parametrize(
    ("lengths", "group", "message"),
    [
        ([1, -1], 2, r"lengths: expected whole numbers not below 0, \[S\], got \[1, -1\]"),
        ([1.5], 2, "lengths: expected whole"),
        ([[1, 2]], 2, "lengths: expected whole"),
        (None, 2, "lengths: expected whole"),
        ("text", 2, "lengths: expected whole"),
        ([2], 0, "group: expected at least 1, got 0"),
        ([2], None, "group: expected a whole number, got NoneType"),
    ],
)
def test_wrong_lengths_are_named(lengths, group, message):
    with pytest.raises(ValueError, match=message):
        attention_tiles(lengths, group)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3, 4)}, "query: expected shape"),
        ({"keys": torch.zeros(2, 2, 9, 8)}, "keys: expected shape"),
        ({"values": torch.zeros(2, 2, 8, 16)}, "values: expected shape"),
        ({"values": torch.zeros(2, 2, 9, 16).half()}, "values: expected torch.float32"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, "slots: expected torch.int64"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions: expected shape"),
        ({"positions": torch.zeros(3, dtype=torch.int64, device="meta")}, "positions: expected the device of query"),
        ({"query": torch.zeros(3, 3, 16)}, "heads in multiples of the 2 of keys, got 3"),
        ({"table": torch.zeros(3, 2)}, "table: expected torch.int32"),
        ({"table": torch.zeros(3, dtype=torch.int32)}, "table: expected shape"),
        ({"tiles": torch.zeros(3, 2)}, "tiles: expected torch.int32"),
        ({"tiles": torch.zeros(1, 2, dtype=torch.int32), "num_alone": 2}, "num_alone: expected a number of tiles"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"query": torch.zeros(3, 4, 16), "keys": torch.zeros(2, 2, 9, 16), "values": torch.zeros(2, 2, 9, 16)}
    arguments |= {name: torch.zeros(3, dtype=torch.int64) for name in ("slots", "positions")}
    with pytest.raises(ValueError, match=message):
        cached_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [0, 2, 1]}, "slots: expected ids from 0 to 1, got 0 to 2"),
        ({"slots": [0, -1, 1]}, "slots: expected ids from 0 to 1, got -1 to 1"),
        ({"positions": [8, 18, 3]}, "positions: expected ids from 0 to 17, got 3 to 18"),
        ({"positions": [8, -1, 3]}, "positions: expected ids from 0 to 17, got -1 to 8"),
        ({"table": [[3, 4], [1, 9]]}, "table: expected ids from 0 to 3, got 1 to 4"),  # 9 is not read
        ({"table": [[-1, 9], [1, 2]], "positions": [8, 9, 3]}, "table: expected ids from 0 to 3, got -1 to 9"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_places_that_are_not_there_are_named(change, message, dtype):
    """On a CPU, where the loops would read any memory."""
    places = {"slots": [0, 0, 1], "positions": [8, 17, 3], "table": [[3, 0], [1, 9]]}
    query, memory = torch.ones(3, 4, 16, dtype=dtype), torch.ones(4, 2, 9, 16, dtype=dtype)

    def attend(**options):
        table = torch.tensor(options.pop("table"), dtype=torch.int32)
        tensors = {name: torch.tensor(numbers) for name, numbers in options.items()}
        return cached_attention(query, memory, memory, **tensors, table=table)

    torch.testing.assert_close(attend(**places), query)
    with pytest.raises(ValueError, match=message):
        attend(**(places | change))
    places["positions"] = [8, 9, 0]
    with pytest.raises(ValueError, match="positions: expected ids from 0 to 8, got 0 to 9"):
        cached_attention(query, memory, memory, *(torch.tensor(places[name]) for name in ("slots", "positions")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(16, 2, 128), (14, 2, 64), (4, 4, 80), (8, 2, 256)])
def test_a_gpu_and_fp64_agree(heads, kv_heads, d, dtype, tolerance):
    lengths, starts = [1, 1, 1, 150, 1], [0, 511, 512, 700, 1500]
    tensors = problem(lengths, heads, kv_heads, d, 1600, dtype, "cuda", starts)
    want = reference.cached_attention(*(x.double() for x in tensors[:3]), *tensors[3:])
    table, num_alone = attention_tiles(lengths, heads // kv_heads)
    tiles = torch.from_numpy(table).cuda()
    together = cached_attention(*tensors, tiles=tiles, num_alone=num_alone)
    for have in (together, cached_attention(*tensors)):
        torch.testing.assert_close(have.double(), want, rtol=0, atol=tolerance)
    query, keys, values, slots, positions = tensors
    places = torch.arange(5 * 25, device="cuda").flip(0).view(5, 25).int()
    blocks = [x.unflatten(2, (25, 64)).transpose(1, 2).flatten(0, 1).flip(0).contiguous() for x in (keys, values)]
    options = {"table": places, "tiles": tiles, "num_alone": num_alone}
    torch.testing.assert_close(cached_attention(query, *blocks, slots, positions, **options), together)
    with pytest.raises(ValueError, match="blocks of a multiple of 16 places, got 8"):
        cached_attention(query, keys[:, :, :8], values[:, :, :8], slots, positions, table=places)
    alone = cached_attention(query[-1:], keys, values, slots[-1:], positions[-1:])
    assert torch.equal(alone, together[-1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_step_follows_its_positions():
    """Neither launch nor grid depends on what positions hold."""
    tensors = problem([1] * 8, 16, 2, 128, 2048, torch.bfloat16, "cuda")
    positions = tensors[-1]
    cached_attention(*tensors)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = cached_attention(*tensors)
    positions += 1500
    graph.replay()
    assert torch.equal(output, cached_attention(*tensors))
