"""Check the memory accesses of Triton kernels in Triton's interpreter, as memcheck and racecheck do on a GPU.

Every load and store must lie within a tensor that the launch was given (within its own elements, not merely its
allocation), at an address that is a multiple of the access size. Programs of a launch run concurrently and in any
order, so none may access what another writes. Nor may a program load what it has stored itself without a barrier in
between: another of its threads may have stored it. Atomics are refused, as no kernel here has any.

Not detected: pointers that land in another tensor of the same launch, accesses to shared memory (the compiler's), and
races between launches that overlap.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

_MANY = -1  # stands for the reading program where several have read
_PAGE_CELLS = 1 << 16


class Page:
    """The accesses to some adjacent cells of a region."""

    def __init__(self) -> None:
        self.writer = np.zeros(_PAGE_CELLS, np.int32)  # last program that wrote a cell, counted from 1; 0: none
        self.reader = np.zeros(_PAGE_CELLS, np.int32)
        self.barriers = np.zeros(_PAGE_CELLS, np.int32)  # how many the writer had passed when it wrote


@dataclass
class Region:
    """A range of bytes that tensors of a launch cover without a gap, in cells of their smallest element size."""

    begin: int
    end: int
    cell: int
    pages: defaultdict[int, Page] = field(init=False, default_factory=lambda: defaultdict(Page))  # of accessed cells


class Watch:
    """The accesses of one launch."""

    def __init__(self, name: str, arguments: Any) -> None:
        self.name = name
        self._regions = _regions(sorted(_extents(arguments)))
        self._begins = np.array([region.begin for region in self._regions], np.int64)
        self._ends = np.array([region.end for region in self._regions], np.int64)
        self._num_barriers = 0

    def barrier(self) -> None:
        """Record that the running program passes a barrier."""
        self._num_barriers += 1

    def touch(self, pointers: Any, mask: np.ndarray, written: np.ndarray | None = None) -> None:
        """Check a load by the running program, or a store of `written`, in the lanes that the mask selects."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses, mask = np.broadcast_arrays(pointers.data, mask)
        addresses = addresses[mask].astype(np.int64)
        if addresses.size == 0:
            return
        number = np.searchsorted(self._begins, addresses, side="right") - 1
        inside = number >= 0
        if inside.any():
            inside &= addresses + size <= self._ends[number]
        verb = "loads" if written is None else "stores"
        if not inside.all():
            self._complain(f"{verb} {size} bytes outside every tensor of its launch, in {(~inside).sum()} lanes")
        if (addresses % size).any():
            self._complain(f"{verb} {size} bytes at no multiple of them")
        values = None if written is None else np.broadcast_to(written, mask.shape)[mask]
        for one in np.unique(number):
            region, here = self._regions[one], number == one
            first = (addresses[here] - region.begin) // region.cell
            for step in range(size // region.cell):
                self._account(region, first + step, None if values is None else values[here])

    def _account(self, region: Region, cells: np.ndarray, values: np.ndarray | None) -> None:
        number, cells = np.divmod(cells, _PAGE_CELLS)
        for one in np.unique(number):
            page, here = region.pages[one], number == one
            if values is None:
                self._load(page, cells[here])
            else:
                self._store(page, cells[here], values[here])

    def _load(self, page: Page, cells: np.ndarray) -> None:
        me, writer = self._program(), page.writer[cells]
        self._compare((writer != 0) & (writer != me), "loads what another program stores")
        own = (writer == me) & (page.barriers[cells] == self._num_barriers)
        self._compare(own, "loads what it has stored, with no barrier between")
        reader = page.reader[cells]
        page.reader[cells] = np.where((reader == 0) | (reader == me), me, _MANY)

    def _store(self, page: Page, cells: np.ndarray, values: np.ndarray) -> None:
        me, writer, reader = self._program(), page.writer[cells], page.reader[cells]
        self._compare((writer != 0) & (writer != me), "stores what another program stores")
        self._compare((reader != 0) & (reader != me), "stores what another program loads")
        order = np.argsort(cells, kind="stable")
        again = cells[order][1:] == cells[order][:-1]
        bits = np.ascontiguousarray(values[order]).view(f"V{values.itemsize}")
        self._compare(again & (bits[1:] != bits[:-1]), "stores two values in one place")
        page.writer[cells], page.barriers[cells] = me, self._num_barriers

    def _program(self) -> int:
        builder = interpreter.interpreter_builder
        (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
        return 1 + (x * height + y) * depth + z

    def _compare(self, wrong: np.ndarray, sentence: str) -> None:
        if wrong.any():
            self._complain(f"{sentence}, in {wrong.sum()} lanes")

    def _complain(self, sentence: str) -> None:
        place = interpreter.interpreter_builder.grid_idx
        raise AssertionError(f"{self.name}: program {place} {sentence}")


def _extents(arguments: Any) -> Iterator[tuple[int, int, int]]:
    """-> begin, end and bytes per element of every tensor among the arguments."""
    if isinstance(arguments, (TensorDescriptor, TensorWrapper)):
        yield from _extents(arguments.base)
    elif isinstance(arguments, (tuple, list)):
        for argument in arguments:
            yield from _extents(argument)
    elif isinstance(arguments, torch.Tensor) and arguments.numel():
        steps = zip(arguments.shape, arguments.stride(), strict=True)
        size, begin = arguments.element_size(), arguments.data_ptr()
        yield begin, begin + (1 + sum((length - 1) * stride for length, stride in steps)) * size, size


def _regions(extents: list[tuple[int, int, int]]) -> list[Region]:
    """Merge overlapping extents; `extents` are sorted."""
    regions: list[Region] = []
    for begin, end, cell in extents:
        if regions and begin < regions[-1].end:
            last = regions.pop()
            regions.append(Region(last.begin, max(last.end, end), min(last.cell, cell)))
        else:
            regions.append(Region(begin, end, cell))
    return regions


@contextmanager
def watched() -> Iterator[None]:
    """Within this context a launch that breaks a rule above fails with an InterpreterError that names the rule."""
    watch: Watch | None = None
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    to_host, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def begin(self: Any, arguments: Any, named: dict[str, Any]) -> Any:
        nonlocal watch
        on_host = to_host(self, arguments, named)
        watch = Watch(self.fn.__name__, [*on_host[0], *on_host[1].values()])
        return on_host

    def watched_load(self: Any, pointers: Any, mask: Any, *others: Any, **named: Any) -> Any:
        watch.touch(pointers, mask.data)
        return load(self, pointers, mask, *others, **named)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any, **named: Any) -> Any:
        watch.touch(pointers, mask.data, value.data)
        return store(self, pointers, value, mask, *others, **named)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{watch.name}: an atomic, which is not watched")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", begin)
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        patch.setattr(builder, "create_barrier", lambda self: watch.barrier())
        patch.setattr(builder, "create_atomic_rmw", refuse)
        patch.setattr(builder, "create_atomic_cas", refuse)
        yield
