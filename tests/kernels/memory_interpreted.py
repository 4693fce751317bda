"""Faulty kernels that the watch over memory and races must catch, and their sound twins, which it must let pass.

They run in Triton's interpreter only: nothing watches a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the watch is over the interpreter")
SIZE = tl.constexpr(8)


@triton.jit
def copy(source, target, num, step, shift):
    """SIZE numbers per program; sound if there are `num` numbers, `step` is SIZE and `shift` is 0."""
    at = tl.program_id(0) * step + tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + at + shift, mask=at < num), mask=at < num)


@triton.jit
def smooth(values):
    """Add to each number its left neighbour, in place; sound with a single program."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    left = tl.load(values + at - 1, mask=at > 0, other=0.0)
    tl.store(values + at, tl.load(values + at) + left)


@triton.jit
def turn(values, with_barrier: tl.constexpr):
    """Read what other threads of the program wrote; sound with a barrier."""
    at = tl.arange(0, SIZE)
    tl.store(values + at, at.to(tl.float32))
    if with_barrier:
        tl.debug_barrier()
    tl.store(values + SIZE + at, tl.load(values + SIZE - 1 - at))


@triton.jit
def scatter(target, places, values):
    """Sound if no two places are equal, or equal places receive the same value."""
    at = tl.arange(0, SIZE)
    tl.store(target + tl.load(places + at), tl.load(values + at))


@triton.jit
def count(total):
    tl.atomic_add(total, 1)


@triton.jit
def described(source, target):
    """Copy through descriptors, which stay within their shape by themselves."""
    target.store([tl.program_id(0) * SIZE], source.load([tl.program_id(0) * SIZE]))


def caught(sentence):
    return pytest.raises(Exception, match=sentence)  # the interpreter's error, which quotes the watch


def test_what_is_sound_passes():
    source, target = torch.arange(20.0), torch.zeros(20)
    copy[(3,)](source, target, 20, SIZE, 0)
    assert torch.equal(source, target)
    smooth[(1,)](target)
    assert target[:8].tolist() == [0.0, 1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0]
    turn[(1,)](target, with_barrier=True)
    assert target[8:16].tolist() == list(range(7, -1, -1))
    scatter[(1,)](target, torch.arange(8), source)
    scatter[(1,)](target, torch.zeros(8, dtype=torch.int64), torch.ones(8))
    view = torch.zeros(4, 8)[1:3, 2:6]  # the gaps belong to the same allocation
    copy[(1,)](source, view, 4, SIZE, 0)
    described[(3,)](*(TensorDescriptor(x, [20], [1], [SIZE.value]) for x in (source, target)))
    assert torch.equal(source, target)


@pytest.mark.parametrize("num", [19, 21])
def test_outside_of_a_tensor(num):
    allocation = torch.zeros(64)
    source, target = (allocation[begin:][:20] for begin in (4, 40))
    if num == 19:
        with caught(r"copy: program \(0, 0, 0\) loads 4 bytes outside every tensor of its launch, in 1 lanes"):
            copy[(3,)](source, target, num, SIZE, -1)
    else:
        with caught(r"copy: program \(2, 0, 0\) loads 4 bytes outside every tensor of its launch, in 1 lanes"):
            copy[(3,)](source, target, num, SIZE, 0)
    with caught(r"stores 4 bytes outside every tensor"):
        copy[(1,)](source, target[:7], 8, SIZE, 0)
    with caught("loads 4 bytes outside every tensor"):
        copy[(1,)](torch.zeros(0), torch.zeros(0), 8, SIZE, 0)


def test_an_address_that_is_no_multiple():
    words = torch.zeros(64, dtype=torch.int8)[1:]
    with caught("loads 4 bytes at no multiple of them"):
        copy[(1,)](triton.reinterpret(words, tl.float32), torch.zeros(8), 8, SIZE, 0)


def test_races_between_programs():
    source, target = torch.arange(32.0), torch.zeros(32)
    with caught("copy: program .1, 0, 0. stores what another program stores, in 7 lanes"):
        copy[(2,)](source, target, 32, 1, 0)
    with caught("smooth: program .1, 0, 0. loads what another program stores, in 1 lanes"):
        smooth[(2,)](target)
    with caught("copy: program .1, 0, 0. stores what another program loads, in 1 lanes"):
        copy[(2,)](source[1:], source, 16, SIZE, 0)
    halves = target.view(torch.float16)  # the same bytes, in another type
    with caught("copy: program .1, 0, 0. stores what another program loads, in 8 lanes"):
        copy[(2,)](target[6:], halves, 64, 16, 0)


def test_races_within_a_program():
    with caught("turn: program .0, 0, 0. loads what it has stored, with no barrier between, in 8 lanes"):
        turn[(1,)](torch.zeros(16), with_barrier=False)
    with caught("scatter: program .0, 0, 0. stores two values in one place, in 7 lanes"):
        scatter[(1,)](torch.zeros(8), torch.zeros(8, dtype=torch.int64), torch.arange(8.0))


def test_what_was_never_written_shows():
    target = torch.empty(8)
    copy[(1,)](torch.empty(8), target, 8, SIZE, 0)
    assert target.isnan().all()
    assert (torch.zeros(8, dtype=torch.int32).new_empty(8) == torch.iinfo(torch.int32).max).all()


def test_atomics_are_not_watched():
    with caught("count: an atomic, which is not watched"):
        count[(2,)](torch.zeros(1))
