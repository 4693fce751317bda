"""What a search launches on a GPU, as `test_launches` has it for models and the head."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from searchr1_kernels import Hits

pytest.importorskip("triton", reason="needs Triton")
_topk_passes, _topk_triton, _topk_bounds = (
    importlib.import_module(f"searchr1_kernels._topk_{name}") for name in ("passes", "triton", "bounds_triton")
)
recording = importlib.import_module("launch_recording")
tensor = recording.tensor


@pytest.mark.parametrize("coarse", ["float", "int8"])
@pytest.mark.parametrize("rows", [8_000_000, 21_015_324])
def test_a_search(launches, rows, coarse):
    """Nine launches for any number of queries and hits, with every way to read the rows."""
    size, num_blocks = 768, -(-rows // 128)
    parts = [tensor(num_blocks)]
    if coarse == "int8":
        parts += [tensor(size), tensor(rows, size, dtype=torch.int8), tensor(rows), tensor(rows), tensor(num_blocks)]
    searches = _topk_passes.Passes(_topk_passes.Corpus(tensor(rows, size, dtype=torch.float16), None, parts), 512, 192)
    memory, queries = tensor(Hits.nbytes(512, 192), dtype=torch.uint8), tensor(512, size)
    for count in (1, 16, 48, 128, 256, 512):
        for k in (1, 16, 100):
            launches.clear()
            searches.launch(queries[:count], k, Hits.views(memory, count, k))
            assert [name for name in launches if not name.endswith("_bounds")] == [
                "prepare_queries", "group_maxima", *["best_blocks", "exact_keys", "best_hits"] * 2,
            ]  # fmt: skip
            assert len(launches) == 9
        ways = _topk_passes._candidates(*searches._kind(count))
        assert len(ways) > 1
        for way in ways:
            searches.bounds(queries[:count], way)


@pytest.mark.parametrize("coarse", ["float", "int8"])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(400, torch.float16), (768, torch.float32), (768, torch.int8)]
    + [(200, torch.float16), (200, torch.int8)]
    + [(75, dtype) for dtype in (torch.float16, torch.float32, torch.int8)],
)
def test_a_search_of_other_rows(launches, size, dtype, coarse):
    """Rows that do not fill whole steps or vectors, and 8-bit rows with their scales.

    400 numbers are no whole number of steps. 200 are read in vectors by descriptors alone, and 75 by nothing.
    """
    rows, num_blocks = 200_000, 1563
    memory, queries = tensor(Hits.nbytes(512, 100), dtype=torch.uint8), tensor(512, size)
    scales = tensor(rows) if dtype == torch.int8 else None
    parts = [tensor(num_blocks)]
    if coarse == "int8":
        parts += [tensor(size), tensor(rows, size, dtype=torch.int8), tensor(rows), tensor(rows), tensor(num_blocks)]
    corpus = _topk_passes.Corpus(tensor(rows, size, dtype=dtype), scales, parts)
    searches = _topk_passes.Passes(corpus, 512, 100)
    for count in (1, 128, 512):
        searches.launch(queries[:count], 16, Hits.views(memory, count, 16))
        for way in _topk_passes._candidates(*searches._kind(count)):
            searches.bounds(queries[:count], way)


@pytest.mark.parametrize(
    ("num_blocks", "k", "fits"),
    [(256, 32_768, True), (257, 208, True), (257, 209, False), (1 << 22, 208, True), ((1 << 22) + 1, 1, False)],
)
def test_what_a_warp_takes(num_blocks, k, fits):
    """All blocks of a small corpus, or as many as there are hits and 48 more; and 1,024 groups of 4,096 blocks."""
    searches = object.__new__(_topk_passes.Passes)
    searches.corpus = _topk_passes.Corpus(None, None, [tensor(num_blocks)])
    assert searches.can_launch(k) == fits
    group, groups = _topk_triton.group_constants(num_blocks).values()
    assert group <= 4096 and group * groups >= num_blocks and (groups <= 1024 or num_blocks > 1 << 22)
    assert _topk_triton.maxima_tile(group) * group == 4096


@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("size", [75, 768])
@pytest.mark.parametrize("shared_memory", [64 << 10, 99 << 10, 163 << 10, 227 << 10])  # sm_75, sm_86, sm_80, sm_90
def test_stages_fit_the_memory_there_is(shared_memory, size, digits):
    for queries in (1, 16, 17, 64, 128, 500):
        (way,) = _topk_bounds.candidates(queries, size, digits, shared_memory, walks=False)
        stage = (way.rows + way.queries * (1 + digits)) * way.stage_bytes
        assert way.num_stages * stage <= shared_memory or way.num_stages == 1
        (most,) = _topk_bounds.candidates(queries, size, digits, 1 << 20, walks=False)
        assert way.num_stages == most.num_stages or (way.num_stages + 1) * stage > shared_memory


def test_programs_walk_on_hopper_over_rows_that_a_descriptor_can_number(launches, monkeypatch):
    def ways(rows: int, dtype: torch.dtype, coarse: str = "float"):
        rows = tensor(rows, 16, dtype=dtype)
        parts = [tensor(1)] if coarse == "float" else [tensor(1), tensor(16), rows, tensor(1), tensor(1), tensor(1)]
        searches = object.__new__(_topk_passes.Passes)
        searches.corpus = _topk_passes.Corpus(rows, None, parts)
        return searches._ways(4)

    most = (1 << 31) - 1
    assert len(ways(most, torch.float16)) > 1 and len(ways(most, torch.int8, "int8")) > 1
    assert len(ways(most + 1, torch.float16)) == len(ways(most + 1, torch.int8, "int8")) == 1
    for major in (8, 10):
        properties = SimpleNamespace(**vars(recording.H200) | {"major": major})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        _topk_passes._device.cache_clear()
        assert len(ways(most, torch.float16)) == len(ways(most, torch.int8, "int8")) == 1


def test_a_search_of_rows_anywhere_in_memory_and_of_many_queries(launches):
    """Otherwise the address of rows of whole 16 numbers would choose the order in which exact scores are summed."""
    memory = tensor(20_000 * 64 + 8, dtype=torch.float16)

    def run(first: int) -> None:
        rows = memory[first : first + 20_000 * 64].view(20_000, 64)
        searches = _topk_passes.Passes(_topk_passes.Corpus(rows, None, [tensor(157)]), 70_000, 1)
        for count in (1, 70_000):
            searches.launch(tensor(count, 64), 1, Hits.views(tensor(1 << 21, dtype=torch.uint8), count, 1))

    recording.one_set_of_kernels(launches, run, (0, 1, 8))
