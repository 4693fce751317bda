"""Products and transpositions of panels, in vector instructions that are written out.

A panel is LANES tokens, one per lane: number by number, the values of all tokens lie side by side. So a product reads
the weights in place, row by row, and no sum goes across lanes. In fp32 a weight is broadcast to a vector and multiplied
by one number of 16 tokens. In bf16 an AMX tile holds 16 rows of weights, 32 numbers each, and the packed numbers of a
panel are the pairs that the other tile has to have.

Shape legend
    N  rows of weights    K  numbers of each    P  panels at a time
"""

from __future__ import annotations

import functools
import sys

import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from searchr1_kernels import _vector_code as vectors
from searchr1_kernels._vector_code import LANES

ROWS = 32  # of weights at a time
_ROWS_IN_REGISTERS = 8  # of these, in fp32
_TILE_ROWS, _TILE_BYTES = 16, 64
CONFIGURATION_BYTES = 64


@functools.cache
def takes(is_bf16: bool) -> bool:
    """Whether the processor has the instructions and the process may use them: AMX needs the system's permission."""
    features = get_host_cpu_features().split(",")
    if LANES != 16 or not is_bf16:
        return LANES == 16
    has_tiles = "+amx-bf16" in features and "+amx-tile" in features
    return has_tiles and sys.platform == "linux" and torch.cpu._init_amx()


# ------------------------------------------------------------------------------------------------------------ products


@intrinsic(prefer_literal=True)
def multiply(
    typing_context, weights, first, depth, packed, place, distance, output, target, target_distance, panels
):  # fmt: skip
    """Multiply ROWS rows of weights [N * K], from number `first` on, by P panels. -> ROWS numbers of each token, fp32.

    `depth` is K. The panels begin at `place` of `packed`, the results at `target` of `output`, and each next one at the
    respective distance. K is a multiple of 32; in bf16 this thread has called `begin_tiles`. P is 1 or 2."""

    def generate(context, builder, signature, arguments):
        memory = [
            vectors.place(context, builder, signature, arguments, array, index)
            for array, index in ((0, 1), (3, 4), (6, 7))
        ]
        depth, distances = arguments[2], (arguments[5], arguments[8])
        emit = _multiply_fp32 if signature.args[0].dtype == types.float32 else _multiply_bf16
        emit(builder, *memory, depth, *distances, panels.literal_value)
        return context.get_dummy_value()

    index = types.intp
    return types.void(weights, index, index, packed, index, index, output, index, index, panels), generate


def _multiply_fp32(builder, weights, packed, output, depth, distance, target_distance, panels) -> None:
    packed = builder.bitcast(packed, vectors.FLOAT.as_pointer())
    with vectors.Loop(builder, vectors.INDEX(ROWS), _ROWS_IN_REGISTERS, []) as loop:
        own = vectors.at(builder, weights, builder.mul(depth, loop.index))
        sums = _sums_fp32(builder, own, packed, depth, distance, panels)
        for panel in range(panels):
            begin = builder.add(
                builder.mul(target_distance, vectors.INDEX(panel)), builder.mul(loop.index, vectors.INDEX(LANES))
            )
            for row, total in enumerate(sums[panel::panels]):
                place = builder.add(begin, vectors.INDEX(row * LANES))
                vectors.store(builder, total, vectors.at(builder, output, place))
        loop.end([])


def _sums_fp32(builder, weights, packed, depth, distance, panels) -> list[ir.Value]:
    """-> sums row by row, and within a row panel by panel."""
    unrolled = 4
    starts = [vectors.at(builder, weights, builder.mul(depth, vectors.INDEX(r))) for r in range(_ROWS_IN_REGISTERS)]
    begins = [vectors.at(builder, packed, builder.mul(distance, vectors.INDEX(p))) for p in range(panels)]
    zero = ir.Constant(vectors.FLOATS, [0.0] * LANES)
    with vectors.Loop(builder, depth, unrolled, [zero] * (len(starts) * panels)) as loop:
        sums = list(loop.values)
        for step in range(unrolled):
            k = builder.add(loop.index, vectors.INDEX(step))
            lanes = builder.mul(k, vectors.INDEX(LANES))
            x = [vectors.load(builder, vectors.at(builder, begin, lanes)) for begin in begins]
            for r, start in enumerate(starts):
                weight = vectors.splat(builder, builder.load(vectors.at(builder, start, k)))
                for p in range(panels):
                    sums[r * panels + p] = vectors.add_product(builder, weight, x[p], sums[r * panels + p])
        loop.end(sums)
    return loop.results


def _multiply_bf16(builder, weights, packed, output, depth, distance, target_distance, panels) -> None:
    groups = ROWS // _TILE_ROWS
    sums = [[g * panels + p for p in range(panels)] for g in range(groups)]
    left = [groups * panels + g for g in range(groups)]
    right = [groups * panels + groups + p for p in range(panels)]
    starts = [vectors.at(builder, weights, builder.mul(depth, vectors.INDEX(g * _TILE_ROWS))) for g in range(groups)]
    begins = [vectors.at(builder, packed, builder.mul(distance, vectors.INDEX(p))) for p in range(panels)]
    row_bytes = builder.mul(depth, vectors.INDEX(2))
    for tile in sum(sums, []):
        _call(builder, "tilezero", tile)
    with vectors.Loop(builder, depth, 2 * _TILE_ROWS, []) as loop:
        for g, start in enumerate(starts):
            _move_tile(builder, "tileloadd64", left[g], vectors.at(builder, start, loop.index), row_bytes)
        pairs = builder.mul(loop.index, vectors.INDEX(LANES // 2))
        for p, begin in enumerate(begins):
            _move_tile(builder, "tileloadd64", right[p], vectors.at(builder, begin, pairs), vectors.INDEX(_TILE_BYTES))
        for g in range(groups):
            for p in range(panels):
                _call(builder, "tdpbf16ps", sums[g][p], left[g], right[p])
        loop.end([])
    for p in range(panels):
        begin = vectors.at(builder, output, builder.mul(target_distance, vectors.INDEX(p)))
        for g in range(groups):
            pointer = vectors.at(builder, begin, vectors.INDEX(g * _TILE_ROWS * LANES))
            _move_tile(builder, "tilestored64", sums[g][p], pointer, vectors.INDEX(_TILE_BYTES))


@intrinsic
def begin_tiles(typing_context, like, scratch):
    """Configure this thread's tiles for `multiply` with weights of the type of `like`.

    Their previous configuration is left in `scratch`, 2 * CONFIGURATION_BYTES uint8."""

    def generate(context, builder, signature, arguments):
        if like.dtype == types.float32:
            return context.get_dummy_value()
        saved = vectors.data(context, builder, signature, arguments, 1)
        wanted = vectors.at(builder, saved, vectors.INDEX(CONFIGURATION_BYTES))
        numbers = [0] * CONFIGURATION_BYTES
        numbers[0] = 1  # palette
        for tile in range(8):
            numbers[16 + 2 * tile], numbers[48 + tile] = _TILE_BYTES, _TILE_ROWS
        kind = ir.ArrayType(vectors.BYTE, CONFIGURATION_BYTES)
        builder.store(ir.Constant(kind, numbers), builder.bitcast(wanted, kind.as_pointer()), align=1)
        _call_of_pointer(builder, "sttilecfg", saved)
        _call_of_pointer(builder, "ldtilecfg", wanted)
        return context.get_dummy_value()

    return types.void(like, scratch), generate


@intrinsic
def end_tiles(typing_context, like, scratch):
    """Restore the tiles' configuration from before `begin_tiles`."""

    def generate(context, builder, signature, arguments):
        if like.dtype != types.float32:
            _call_of_pointer(builder, "ldtilecfg", vectors.data(context, builder, signature, arguments, 1))
        return context.get_dummy_value()

    return types.void(like, scratch), generate


def _call(builder, name: str, *tiles: int) -> None:
    kind = ir.FunctionType(ir.VoidType(), [vectors.BYTE] * len(tiles))
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, [vectors.BYTE(tile) for tile in tiles])


def _move_tile(builder, name: str, tile: int, pointer, stride) -> None:
    kind = ir.FunctionType(ir.VoidType(), [vectors.BYTE, vectors.BYTE.as_pointer(), vectors.INDEX])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, [vectors.BYTE(tile), builder.bitcast(pointer, vectors.BYTE.as_pointer()), stride])


def _call_of_pointer(builder, name: str, pointer) -> None:
    kind = ir.FunctionType(ir.VoidType(), [vectors.BYTE.as_pointer()])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, [builder.bitcast(pointer, vectors.BYTE.as_pointer())])


# ------------------------------------------------------------------------------------------------------ transpositions


@intrinsic
def to_rows(typing_context, packed, place, target, offsets, first, shift):
    """Write LANES packed numbers of each of a panel's tokens, from `place` on, side by side to `target`.

    Those of lane i go to `offsets[first + i] + shift`."""

    def generate(context, builder, signature, arguments):
        source = vectors.place(context, builder, signature, arguments, 0, 1)
        tile = [vectors.load(builder, _line(builder, source, i), vectors.NUMBERS) for i in range(LANES)]
        for i, row in enumerate(vectors.transposed(builder, tile)):
            vectors.store(builder, row, _row(context, builder, signature, arguments, 2, i))
        return context.get_dummy_value()

    index = types.intp
    return types.void(packed, index, target, offsets, index, index), generate


@intrinsic
def from_rows(typing_context, packed, place, source, offsets, first, shift):
    """The inverse of `to_rows`."""

    def generate(context, builder, signature, arguments):
        tile = [
            vectors.load(builder, _row(context, builder, signature, arguments, 2, i), vectors.NUMBERS)
            for i in range(LANES)
        ]
        target = vectors.place(context, builder, signature, arguments, 0, 1)
        for i, line in enumerate(vectors.transposed(builder, tile)):
            vectors.store(builder, line, _line(builder, target, i))
        return context.get_dummy_value()

    index = types.intp
    return types.void(packed, index, source, offsets, index, index), generate


def _line(builder, pointer, number: int):
    return vectors.at(builder, pointer, vectors.INDEX(number * LANES))


def _row(context, builder, signature, arguments, array: int, lane: int):
    """-> pointer to the row of a lane."""
    offsets = vectors.place(context, builder, signature, arguments, array + 1, array + 2)
    offset = builder.load(vectors.at(builder, offsets, vectors.INDEX(lane)))
    return vectors.at(
        builder, vectors.data(context, builder, signature, arguments, array), builder.add(offset, arguments[array + 3])
    )
