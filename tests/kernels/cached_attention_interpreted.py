"""The Triton kernels of `cached_attention`. Run by `test_triton`, not collected by itself.

Without a GPU they run in Triton's interpreter, in a process of their own because importing Triton fixes that choice. On
a GPU they are compiled.
"""

from __future__ import annotations

import pytest
import torch
from far_memory import far_memory
from searchr1_kernels import _cached_attention_triton, attention_tiles, reference
from searchr1_kernels.cached_attention import _attend_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True, scope="module")
def small_parts():
    """Use several parts, launches of lone tokens and blocks of heads to combine, in a short cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cached_attention_triton, "PART", 64)
        patch.setattr(_cached_attention_triton, "_COMBINED", 256)
        patch.setattr(_cached_attention_triton, "_TOKENS_AT_ONCE", 3)
        yield


def problem(pieces, heads, kv_heads, d, dtype=torch.float32, places=150, seed=0):
    """pieces (slot, first position, count) -> query, keys, values, slots, positions, and lengths on the host.

    What no token sees is NaN.
    """
    generator, slots = torch.Generator().manual_seed(seed), max(piece[0] for piece in pieces) + 1
    query = torch.randn(sum(piece[2] for piece in pieces), heads, d, generator=generator)
    keys, values = (torch.randn(slots, kv_heads, places, d, generator=generator) for _ in range(2))
    for slot in range(slots):
        end = max((start + count for s, start, count in pieces if s == slot), default=0)
        keys[slot, :, end:] = values[slot, :, end:] = torch.nan
    slot = torch.cat([torch.full((count,), s) for s, _, count in pieces])
    position = torch.cat([torch.arange(start, start + count) for _, start, count in pieces])
    floats = (tensor.to(DEVICE, dtype) for tensor in (query, keys, values))
    return *floats, slot.to(DEVICE), position.to(DEVICE), [piece[2] for piece in pieces]


def paged(cache, size):
    """[C, G, M, d] -> shuffled blocks of `size` places [P, G, size, d], NaN past M, and their table."""
    slots, kv_heads, places, d = cache.shape
    blocks = -(-places // size)
    whole = torch.nn.functional.pad(cache, (0, 0, 0, blocks * size - places), value=torch.nan)
    whole = whole.unflatten(2, (blocks, size)).transpose(1, 2).reshape(slots * blocks, kv_heads, size, d)
    order = torch.randperm(len(whole) + 3, generator=torch.Generator().manual_seed(1))[: len(whole)].to(DEVICE)
    memory = torch.full((len(whole) + 3, kv_heads, size, d), torch.nan, dtype=cache.dtype, device=DEVICE)
    memory[order] = whole
    return memory, order.view(slots, blocks).int()


def attend(query, keys, values, slots, positions, lengths=None, table=None):
    output = torch.full(query.shape, torch.nan, dtype=query.dtype, device=DEVICE)
    found = None if lengths is None else attention_tiles(lengths, query.shape[1] // keys.shape[1])
    tiles, num_alone = (None, 0) if found is None else (torch.from_numpy(found[0]).to(DEVICE), found[1])
    return _attend_triton(query, keys, values, slots, positions, table, tiles, num_alone, output)


def close(have, query, keys, values, slots, positions):
    want = reference.cached_attention(query.double(), keys.double(), values.double(), slots, positions)
    torch.testing.assert_close(have.double(), want, rtol=0, atol=TOLERANCE[query.dtype])


MIXED = [(2, 140, 1), (0, 0, 1), (1, 3, 70), (3, 63, 1), (4, 64, 2)]


LONE = [(2, 140, 1), (0, 0, 1), (1, 62, 4), (3, 64, 1)]
each_way = pytest.mark.parametrize(("pieces", "tiled"), [(MIXED, True), (LONE, False)])


@each_way
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(2, 2, 16), (4, 2, 80), (7, 1, 64), (8, 1, 32), (3, 1, 96)])
def test_matches_the_oracle(heads, kv_heads, d, pieces, tiled):
    *tensors, lengths = problem(pieces, heads, kv_heads, d)
    close(attend(*tensors, lengths if tiled else None), *tensors)


@each_way
def test_scores_far_apart(pieces, tiled):
    """The largest scores of two parts are hundreds apart, in either order, and no weight overflows."""
    query, *others, lengths = problem(pieces, 4, 2, 16)
    query *= 300
    have = attend(query, *others, lengths if tiled else None)
    want = reference.cached_attention(query.double(), *(x.double() for x in others[:2]), *others[2:])
    torch.testing.assert_close(have.double(), want, rtol=0, atol=5e-3)


@each_way
@pytest.mark.parametrize("size", [16, 48, 64, 128])
def test_blocks_in_any_order_are_as_good_as_one_piece(pieces, tiled, size):
    query, keys, values, slots, positions, lengths = problem(pieces, 4, 2, 32)
    (memory, table), (others, _) = paged(keys, size), paged(values, size)
    have = attend(query, memory, others, slots, positions, lengths if tiled else None, table)
    close(have, query, keys, values, slots, positions)
    if size % 64 == 0:  # the same number of keys is multiplied at once
        assert torch.equal(have, attend(query, keys, values, slots, positions, lengths if tiled else None))


@pytest.mark.parametrize("size", [16, 48, 64])
def test_lone_tokens_find_the_blocks_of_every_part(monkeypatch, size):
    """The first and last place of parts and of blocks; entries past a position lead nowhere.

    A part has four blocks of keys, in a type whose blocks of keys are as long as a GPU's.
    """
    monkeypatch.setattr(_cached_attention_triton, "PART", 256)
    ends = (0, 15, 16, 47, 48, 255, 256, 257, 511, 599)
    pieces = [(slot, position, 1) for slot, position in enumerate(ends)]
    query, keys, values, slots, positions, _ = problem(pieces, 4, 2, 32, torch.float16, places=600)
    (memory, table), (others, _) = paged(keys, size), paged(values, size)
    for slot, position in enumerate(ends):
        table[slot, position // size + 1 :] = 2**30
    have = attend(query, memory, others, slots, positions, table=table)
    close(have, query, keys, values, slots, positions)
    if size == 64:
        assert torch.equal(have, attend(query, keys, values, slots, positions))


def test_slots_may_have_blocks_in_common():
    query, keys, values, slots, positions, lengths = problem([(0, 70, 3), (1, 70, 3)], 4, 2, 32)
    keys[1, :, :64], values[1, :, :64] = keys[0, :, :64], values[0, :, :64]
    (memory, table), (others, _) = paged(keys, 32), paged(values, 32)
    lost = table[1, :2].clone()
    table[1, :2] = table[0, :2]
    memory[lost.long()] = others[lost.long()] = torch.nan
    close(attend(query, memory, others, slots, positions, lengths, table), query, keys, values, slots, positions)


# bf16 on a GPU only: the interpreter multiplies its bit patterns as integers, as `linear_interpreted` found too.
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize("d", [128, 256])
def test_other_types_and_sizes(dtype, d):
    *tensors, lengths = problem(MIXED, 8, 1, d, dtype)
    close(attend(*tensors, lengths), *tensors)


@each_way
def test_a_piece_alone_equals_the_piece_in_a_batch(pieces, tiled):
    query, keys, values, slots, positions, lengths = problem(pieces, 4, 2, 32)
    together = attend(query, keys, values, slots, positions, lengths if tiled else None)
    parts = (tensor.split(lengths) for tensor in (query, slots, positions, together))
    for q, s, p, want in zip(*parts, strict=True):
        assert torch.equal(attend(q, keys, values, s, p, [len(q)] if tiled else None), want)


def test_a_longer_cache_changes_no_bit():
    query, keys, values, slots, positions, _ = problem(LONE, 4, 2, 32)
    longer = (torch.nn.functional.pad(cache, (0, 0, 0, 200), value=torch.nan) for cache in (keys, values))
    have = attend(query, *longer, slots, positions)
    assert torch.equal(have, attend(query, keys, values, slots, positions))


@pytest.mark.parametrize("combined", [16, 64, 1024])
def test_blocks_of_heads_change_no_bit_and_parts_that_nobody_wrote_are_not_read(combined, monkeypatch):
    *tensors, _ = problem(LONE, 14, 2, 32)
    want = attend(*tensors)
    monkeypatch.setattr(_cached_attention_triton, "_COMBINED", combined)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, torch.nan, **options))
    assert torch.equal(attend(*tensors), want)


def test_any_strides():
    query, keys, values, slots, positions, lengths = problem(MIXED, 4, 2, 32)
    views = [torch.stack([x, x], dim=1)[:, 1] for x in (query, keys, values)]
    views[1] = views[1].transpose(1, 2).contiguous().transpose(1, 2)
    have = attend(*views, *torch.stack([slots, positions], dim=1).unbind(1), lengths)
    assert torch.equal(have, attend(query, keys, values, slots, positions, lengths))


@pytest.mark.parametrize("size", [None, 64])
@each_way
def test_offsets_beyond_32_bits(tmp_path, pieces, tiled, size):
    """A cache whose last slot, or block, begins 2^31 numbers after the first."""
    query, keys, values, slots, positions, lengths = problem(pieces, 2, 1, 16, torch.float16)
    table = None
    if size is not None:
        (keys, table), (values, _) = paged(keys, size), paged(values, size)
    far, stride = [], ((1 << 31) // (len(keys) - 1) // 16 + 1) * 16
    for cache in (keys, values):
        count = (len(cache) - 1) * stride + cache[0].numel()
        memory = far_memory(tmp_path, count, DEVICE)
        far.append(memory.as_strided(cache.shape, (stride, *cache.stride()[1:])).copy_(cache))
    arguments = (slots, positions, lengths if tiled else None, table)
    assert torch.equal(attend(query, *far, *arguments), attend(query, keys, values, *arguments))


@pytest.mark.parametrize("lone", [True, False])
def test_texts_end_to_end_are_slots_that_overlap(lone):
    """Texts stored end to end, as by an encoder: slot r begins at row r, and tokens see all of their text.

    Rows past the texts are NaN. If a text has one query, which finds all alike, the result is a mean.
    """
    lengths, heads, d, longest = [5, 1, 70, 3], 2, 16, 80
    num_rows, width = sum(lengths), heads * d
    rows = torch.randn(num_rows + longest - 1, 3 * width, generator=torch.Generator().manual_seed(0))
    rows[num_rows:] = torch.nan
    rows = rows.to(DEVICE)
    keys, values = (
        rows.as_strided((num_rows, heads, longest, d), (3 * width, d, 3 * width, 1), part * width) for part in (1, 2)
    )
    begins = [sum(lengths[:text]) for text in range(len(lengths))]
    texts = [rows[begin : begin + length].double().view(length, 3, heads, d).unbind(1)
             for begin, length in zip(begins, lengths, strict=True)]  # fmt: skip
    if lone:
        query = torch.zeros(len(lengths), heads, d, device=DEVICE)
        firsts, lasts = torch.tensor(begins), torch.tensor(lengths) - 1
        want, tiles = torch.stack([value.mean(0) for _, _, value in texts]), None
    else:
        query = rows[:num_rows, :width].view(num_rows, heads, d)
        firsts, lasts = (torch.cat([torch.full((length,), number) for length, number in pairs]) for pairs in (
            zip(lengths, begins, strict=True), [(length, length - 1) for length in lengths]))  # fmt: skip
        tiles = [(begin + skip, min(length - skip, 64))
                 for begin, length in zip(begins, lengths, strict=True) for skip in range(0, length, 64)]  # fmt: skip
        scores = [torch.einsum("qhd,khd->hqk", query, key) * d**-0.5 for query, key, _ in texts]
        want = torch.cat([torch.einsum("hqk,khd->qhd", score.softmax(-1), value)
                          for score, (_, _, value) in zip(scores, texts, strict=True)])  # fmt: skip
        tiles = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    output = torch.full(query.shape, torch.nan, device=DEVICE)
    _attend_triton(query, keys, values, firsts.to(DEVICE), lasts.to(DEVICE), None, tiles, 0, output)
    torch.testing.assert_close(output.double(), want, rtol=0, atol=2e-6)
