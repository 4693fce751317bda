"""Vectors of fp32 as values in compiled loops: `total = total + x * x` works on LANES numbers each.

No compiler has to discover that it may vectorise: what is written is what runs (`_vector_code`).

Memory is a contiguous array of one dimension; a place is an index into it. Packed numbers are int32: the bits of one
fp32, or of two bf16, the even one in the lower half.
"""

from __future__ import annotations

import operator

from numba.core import types
from numba.extending import intrinsic, models, overload, register_model

from searchr1_kernels import _vector_code as code


class Floats(types.Type):
    """LANES numbers of fp32."""

    def __init__(self) -> None:
        super().__init__(name="Floats")


FLOATS = Floats()


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, code.FLOATS)


# ------------------------------------------------------------------------------------------------------ memory


@intrinsic
def load(typing_context, array, place):
    """-> LANES numbers from `place` on, of fp32 or of int32 that holds the bits of fp32."""

    def generate(context, builder, signature, arguments):
        return code.load(builder, code.place(context, builder, signature, arguments, 0, 1))

    return FLOATS(array, types.intp), generate


@intrinsic
def store(typing_context, x, array, place):
    """The inverse of `load`."""

    def generate(context, builder, signature, arguments):
        code.store(builder, arguments[0], code.place(context, builder, signature, arguments, 1, 2))
        return context.get_dummy_value()

    return types.void(FLOATS, array, types.intp), generate


@intrinsic(prefer_literal=True)
def load_packed(typing_context, array, begin, pair, half, like):
    """-> number 2 * pair (`half` 0) or 2 * pair + 1 (`half` 1) of LANES tokens that are packed from `begin` on.

    `like`: an array of the type in which they are packed, fp32 or int16 that holds the bits of bf16."""

    def generate(context, builder, signature, arguments):
        pointer = _packed_place(context, builder, signature, arguments, 0, like)
        if like.dtype == types.float32:
            return code.load(builder, code.at(builder, pointer, code.INDEX(half.literal_value * code.LANES)))
        return code.widened(builder, builder.bitcast(pointer, code.NUMBER.as_pointer()))[half.literal_value]

    return FLOATS(array, types.intp, types.intp, half, like), generate


@intrinsic
def store_packed(typing_context, even, odd, array, begin, pair, like):
    """The inverse of `load_packed`, for both numbers at once, rounded to the type of `like`."""

    def generate(context, builder, signature, arguments):
        pointer = _packed_place(context, builder, signature, arguments, 2, like)
        if like.dtype == types.float32:
            code.store(builder, arguments[0], pointer)
            code.store(builder, arguments[1], code.at(builder, pointer, code.INDEX(code.LANES)))
        else:
            code.store(builder, code.narrowed(builder, list(arguments[:2])), pointer)
        return context.get_dummy_value()

    return types.void(FLOATS, FLOATS, array, types.intp, types.intp, like), generate


def _packed_place(context, builder, signature, arguments, array: int, like):
    begin = code.place(context, builder, signature, arguments, array, array + 1)
    vectors = 2 if like.dtype == types.float32 else 1  # of a pair
    return code.at(builder, begin, builder.mul(arguments[array + 2], code.INDEX(vectors * code.LANES)))


@intrinsic
def rounded(typing_context, x, like):
    """-> x rounded to the type of the array `like`, as in `load_packed`."""

    def generate(context, builder, signature, arguments):
        return arguments[0] if like.dtype == types.float32 else code.as_bf16(builder, arguments[0])

    return FLOATS(FLOATS, like), generate


# -------------------------------------------------------------------------------------------------- arithmetic


def _of_two(make):
    @intrinsic
    def apply(typing_context, a, b):
        def generate(context, builder, signature, arguments):
            return make(builder, *arguments)

        return FLOATS(FLOATS, FLOATS), generate

    return apply


def _of_one(make):
    @intrinsic
    def apply(typing_context, x):
        def generate(context, builder, signature, arguments):
            return make(builder, arguments[0])

        return FLOATS(FLOATS), generate

    return apply


@intrinsic
def splat(typing_context, x):
    """-> a vector of one value."""

    def generate(context, builder, signature, arguments):
        return code.splat(builder, arguments[0])

    return FLOATS(types.float32), generate


@intrinsic
def where_larger(typing_context, a, b, x, y):
    """-> `x` where a > b, elsewhere `y`."""

    def generate(context, builder, signature, arguments):
        first, second, *both = arguments
        return builder.select(builder.fcmp_ordered(">", first, second), *both)

    return FLOATS(FLOATS, FLOATS, FLOATS, FLOATS), generate


larger = _of_two(code.larger)  # either one if one is NaN
smaller = _of_two(code.smaller_number)
exp2 = _of_one(code.exp2)  # for numbers up to 0; below -126 it is 2^-126
square_root = _of_one(code.square_root)


def _define(symbol, make) -> None:
    apply = _of_two(make)

    @overload(symbol)
    def of_vectors(a, b):
        if isinstance(a, Floats) and isinstance(b, Floats):
            return lambda a, b: apply(a, b)
        return None


_define(operator.add, lambda builder, a, b: builder.fadd(a, b, flags=code.CONTRACT))
_define(operator.sub, lambda builder, a, b: builder.fsub(a, b, flags=code.CONTRACT))
_define(operator.mul, lambda builder, a, b: builder.fmul(a, b, flags=code.CONTRACT))
_define(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))
