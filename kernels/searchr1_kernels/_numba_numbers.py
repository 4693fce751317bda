"""Operations on numbers that numba lacks, or does not turn into SIMD, for compiled loops on a CPU.

numpy does not know bf16: its bits travel as int16, and are widened to fp32 and rounded back in registers.
"""

from __future__ import annotations

import math
import os

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

# reassoc lets sums use SIMD. There are no flags that would change the meaning of infinities and NaN.
FAST_MATH = {"reassoc", "contract", "nsz"}
LOG2_E = 1.4426950408889634

_forked = False


def may_share_out() -> bool:
    """Whether loops may use numba's threads. GNU OpenMP ends a forked child that uses them after its parent did."""
    return not _forked


def _note_fork() -> None:
    global _forked
    try:
        _forked = numba.threading_layer() == "omp"
    except ValueError:  # no parallel loop has run so far
        _forked = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """-> the memory of a CPU tensor; for bf16, its bits as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@intrinsic
def widen(typing_context, x):
    """fp32, or int16 that holds bf16 bits -> fp32."""

    def generate(context, builder, signature, arguments):
        if x == types.float32:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(x), generate


@intrinsic
def narrow(typing_context, x, like):
    """fp32 -> the type of `like`: fp32, or int16 that holds bf16 bits, rounded to nearest, ties to even."""

    def generate(context, builder, signature, arguments):
        if like == types.float32:
            return arguments[0]
        number = ir.IntType(32)
        bits = builder.bitcast(arguments[0], number)
        odd = builder.and_(builder.lshr(bits, number(16)), number(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, number(0x7FFF))), number(16))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])  # rounding must not carry into its bits
        return builder.trunc(builder.select(is_nan, number(0x7FC0), rounded), ir.IntType(16))

    return like(types.float32, like), generate


@intrinsic
def _power_of_2(typing_context, exponent):
    """int32 from -126 to 127 -> that power of 2, fp32."""

    def generate(context, builder, signature, arguments):
        number = ir.IntType(32)
        bits = builder.shl(builder.add(arguments[0], number(127)), number(23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def prefetch(typing_context, array, index):
    """Prefetch the cache line of `array[index]`; the array is contiguous and has one dimension."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", (byte,), function_type)
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(function, [pointer, number(0), number(3), number(1)])  # to read; keep in every cache; data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def _pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@numba.njit
def array_at(address, size, like):
    """-> array of `size` numbers at an address, of the type of the array `like`; empty if the address is 0."""
    return numba.carray(_pointer(address), size if address else 0, like.dtype)


# 2^f on [0, 1): the polynomial through the Chebyshev nodes, of the degree that leaves only fp32's own rounding.
_NODES = 0.5 + 0.5 * np.cos(math.pi * (2 * np.arange(7) + 1) / 14)
POLYNOMIAL_OF_EXP2 = np.polyfit(_NODES, 2.0**_NODES, 6)[::-1].astype(np.float32)
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = POLYNOMIAL_OF_EXP2


@numba.njit(fastmath=FAST_MATH, inline="always")
def exp2(x):
    """-> 2^x, as SIMD; 2^127 for x above 127, 2^-126 for x below -126."""
    x = min(max(x, np.float32(-126.0)), np.float32(127.0))
    whole = np.floor(x)
    f = x - whole
    power = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return power * _power_of_2(np.int32(whole))
