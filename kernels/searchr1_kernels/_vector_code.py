"""LLVM code for vectors of fp32, for CPU loops that no compiler vectorises by itself: what is written is what runs.

Vectors have `LANES` numbers, as many as the processor's registers; elsewhere they are split, and nothing else changes.
In bf16 two numbers share 32 bits, so that a shift gives the even ones of a vector and a mask the odd ones, and rows are
kept in that order.
"""

from __future__ import annotations

import llvmlite.binding
from llvmlite import ir
from numba.core import types

from searchr1_kernels._numba_numbers import POLYNOMIAL_OF_EXP2

LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8

CONTRACT = ("contract",)
BYTE, NUMBER, INDEX, FLOAT = (*(ir.IntType(n) for n in (8, 32, 64)), ir.FloatType())
FLOATS, NUMBERS = ir.VectorType(FLOAT, LANES), ir.VectorType(NUMBER, LANES)


def data(context, builder, signature, arguments, place: int):
    """-> pointer to the beginning of an argument that is an array."""
    return context.make_array(signature.args[place])(context, builder, arguments[place]).data


def place(context, builder, signature, arguments, array: int, index: int):
    """-> pointer to an element of an argument that is an array, at the index that another argument gives."""
    return at(builder, data(context, builder, signature, arguments, array), arguments[index])


def at(builder, pointer, offset):
    """-> the pointer, advanced by `offset` numbers."""
    return builder.gep(pointer, [offset])


def row_step(array) -> int:
    """-> numbers per load: one vector of fp32, or two of bf16."""
    return LANES if array.dtype == types.float32 else 2 * LANES


def ask(builder, pointer, to_write: bool = False) -> None:
    """Prefetch the cache line of a byte into every level of cache."""
    function = builder.module.declare_intrinsic(
        "llvm.prefetch", (pointer.type,), ir.FunctionType(ir.VoidType(), [pointer.type, NUMBER, NUMBER, NUMBER])
    )
    builder.call(function, [pointer, NUMBER(int(to_write)), NUMBER(3), NUMBER(1)])


def load(builder, pointer, kind=FLOATS):
    """-> a vector from memory, of any alignment."""
    loaded = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    loaded.align = 2
    return loaded


def store(builder, vector, pointer) -> None:
    """Store a vector to memory, of any alignment."""
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=2)


def widened(builder, pointer) -> list[ir.Value]:
    """fp32 or bf16 in memory -> one vector, or two: the even and the odd numbers."""
    if pointer.type.pointee == FLOAT:
        return [load(builder, pointer)]
    pairs = load(builder, pointer, NUMBERS)
    even = builder.shl(pairs, ir.Constant(NUMBERS, [16] * LANES))
    odd = builder.and_(pairs, ir.Constant(NUMBERS, [0xFFFF0000] * LANES))
    return [builder.bitcast(x, FLOATS) for x in (even, odd)]


def narrowed(builder, parts: list[ir.Value]):
    """-> the inverse of `widened`, rounded to nearest, ties to even."""
    if len(parts) == 1:
        return parts[0]
    high = ir.Constant(NUMBERS, [16] * LANES)
    even, odd = (rounded(builder, part) for part in parts)
    return builder.or_(builder.lshr(even, high), builder.and_(odd, ir.Constant(NUMBERS, [0xFFFF0000] * LANES)))


def rounded(builder, part):
    """fp32 -> bits whose upper half is the number in bf16."""
    bits = builder.bitcast(part, NUMBERS)
    odd = builder.and_(builder.lshr(bits, ir.Constant(NUMBERS, [16] * LANES)), ir.Constant(NUMBERS, [1] * LANES))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(NUMBERS, [0x7FFF] * LANES)))
    is_nan = builder.fcmp_unordered("uno", part, part)
    return builder.select(is_nan, ir.Constant(NUMBERS, [0x7FC00000] * LANES), rounded)


def splat(builder, value):
    """-> a vector of one value."""
    kind = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, NUMBER(0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(NUMBERS, [0] * LANES))


def iota():
    """-> the vector 0, 1, …"""
    return ir.Constant(NUMBERS, list(range(LANES)))


def smaller(builder, a, b):
    """-> the smaller of two integers."""
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def larger(builder, a, b):
    """-> the larger of two numbers; either one if one is NaN: the weights of a NaN are NaN whatever the peak is."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def smaller_number(builder, a, b):
    """-> the smaller of two numbers; either one if one is NaN."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def add_product(builder, a, b, c):
    """-> a * b + c, rounded once where the processor can."""
    return builder.fadd(builder.fmul(a, b, flags=CONTRACT), c, flags=CONTRACT)


def dot(builder, query: list[ir.Value], row: list[ir.Value]):
    """-> LANES sums that add up to the dot product."""
    total = builder.fmul(query[0], row[0], flags=CONTRACT)
    for a, b in zip(query[1:], row[1:], strict=True):
        total = add_product(builder, a, b, total)
    return total


def across(builder, name: str, vector):
    """-> the largest ("fmax") or the sum ("fadd") of a vector's lanes."""
    if name == "fmax":
        function = builder.module.declare_intrinsic(
            f"llvm.vector.reduce.fmax.v{LANES}f32", fnty=ir.FunctionType(FLOAT, [FLOATS])
        )
        return builder.call(function, [vector])
    function = builder.module.declare_intrinsic(
        f"llvm.vector.reduce.fadd.v{LANES}f32", fnty=ir.FunctionType(FLOAT, [FLOAT, FLOATS])
    )
    return builder.call(function, [FLOAT(0.0), vector], fastmath=("reassoc",))


def as_bf16(builder, x):
    """-> fp32, rounded to bf16."""
    bits = builder.and_(rounded(builder, x), ir.Constant(NUMBERS, [0xFFFF0000] * LANES))
    return builder.bitcast(bits, FLOATS)


def square_root(builder, x):
    """-> the square root of each number."""
    function = builder.module.declare_intrinsic(f"llvm.sqrt.v{LANES}f32", fnty=ir.FunctionType(FLOATS, [FLOATS]))
    return builder.call(function, [x])


def exp2(builder, x):
    """-> 2^x as in `_numba_numbers.exp2`, for a vector of numbers up to 0; below -126 it is 2^-126."""
    least = ir.Constant(FLOATS, [-126.0] * LANES)
    x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    function = builder.module.declare_intrinsic(f"llvm.floor.v{LANES}f32", fnty=ir.FunctionType(FLOATS, [FLOATS]))
    whole = builder.call(function, [x])
    f = builder.fsub(x, whole)
    *lower, power = (ir.Constant(FLOATS, [float(c)] * LANES) for c in POLYNOMIAL_OF_EXP2)
    for coefficient in reversed(lower):
        power = add_product(builder, f, power, coefficient)
    exponent = builder.add(builder.fptosi(whole, NUMBERS), ir.Constant(NUMBERS, [127] * LANES))
    return builder.fmul(power, builder.bitcast(builder.shl(exponent, ir.Constant(NUMBERS, [23] * LANES)), FLOATS))


# ------------------------------------------------------------------------------------------------- sums across lanes


def tree(builder, leaf, begin: int, end: int):
    """Leaves `begin` to `end`, vectors -> a vector with LANES / (end - begin) lanes per leaf that add up to its sum."""
    if end - begin == 1:
        return leaf(begin)
    middle = (begin + end) // 2
    first, second = tree(builder, leaf, begin, middle), tree(builder, leaf, middle, end)
    low, high = (shuffled(builder, first, second, lanes) for lanes in halves(LANES // (end - begin)))
    return builder.fadd(low, high)


def halves(width: int) -> tuple[list[int], list[int]]:
    """-> the lanes of the first and of the second halves of runs of 2 * width lanes in two vectors, to be added.

    Processors shuffle most cheaply within runs of 4 lanes, so narrow runs stay inside these."""
    inside = 4 if width < 4 else LANES
    runs = [begin + vector * LANES for begin in range(0, LANES, inside) for vector in (0, 1)]
    lanes = [begin + i for begin in runs for i in range(inside)]
    low = [lane for lane in lanes if lane % (2 * width) < width]
    return low, [lane + width for lane in low]


def leaf_of_lanes(begin: int, end: int) -> list[int]:
    """-> for each lane of `tree`, the leaf whose sum it holds."""
    if end - begin == 1:
        return [begin] * LANES
    middle = (begin + end) // 2
    both = leaf_of_lanes(begin, middle) + leaf_of_lanes(middle, end)
    return [both[lane] for lane in halves(LANES // (end - begin))[0]]


def transposed(builder, rows: list[ir.Value]) -> list[ir.Value]:
    """LANES vectors -> their transpose: number j of vector i becomes number i of vector j."""
    rows, step = list(rows), 1
    while step < LANES:
        low = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
        high = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
        for i in range(LANES):
            if not i & step:
                pair = rows[i], rows[i + step]
                rows[i], rows[i + step] = shuffled(builder, *pair, low), shuffled(builder, *pair, high)
        step *= 2
    return rows


def chosen(builder, vectors: list[ir.Value], lanes: list[int]):
    """-> the same lanes of each of 2^n vectors, concatenated."""
    if len(vectors) == 1:
        return shuffled(builder, vectors[0], vectors[0], lanes)
    while len(vectors) > 1:
        size = vectors[0].type.count
        mask = [*lanes, *(lane + size for lane in lanes)]
        vectors = [shuffled(builder, *vectors[i : i + 2], mask) for i in range(0, len(vectors), 2)]
        lanes = list(range(len(mask)))
    return vectors[0]


def shuffled(builder, first, second, lanes: list[int]):
    """-> some lanes of two vectors that count as concatenated."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(NUMBER, len(lanes)), lanes))


# --------------------------------------------------------------------------------------------------------------- loops


class Loop:
    """`with Loop(builder, end, step, initial) as loop: … loop.end(values)`: index from 0 to before `end`."""

    def __init__(self, builder, end, step: int, initial) -> None:
        self.builder, self.step, self.initial = builder, step, initial
        self._end = end

    def __enter__(self) -> Loop:
        builder = self.builder
        before, self._body = builder.block, builder.append_basic_block("rows")
        self._after = builder.append_basic_block("rows.end")
        builder.branch(self._body)  # unconditional: there is always a first iteration
        builder.position_at_end(self._body)
        self.index = builder.phi(INDEX)
        self.index.add_incoming(INDEX(0), before)
        self.values = []
        for value in self.initial:
            phi = builder.phi(value.type)
            phi.add_incoming(value, before)
            self.values.append(phi)
        return self

    def end(self, values) -> None:
        """End the body: continue with these values if rows are left."""
        builder = self.builder
        following = builder.add(self.index, INDEX(self.step))
        self.index.add_incoming(following, builder.block)
        for phi, value in zip(self.values, values, strict=True):
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, self._end), self._body, self._after)
        self.results = values

    def __exit__(self, *_: object) -> None:
        self.builder.position_at_end(self._after)
