"""One block of keys and values for a few query heads that share them, as vector instructions that are written out.

What a compiler makes of the loops over `head_dim` numbers is bound by their ends: a sum across lanes per key, sums that
are stored and loaded again per value. Here the length of a row is known while code is made, so that queries and sums
stay in registers, a row is loaded and widened once for all `heads` that share it, and scores of a vector's worth of
keys are summed across lanes together. Memory is asked ahead: with each row of this block that of the next one.

Vectors are of `LANES` numbers, what the processor has; elsewhere they are cut, and nothing else changes. In bf16 two
numbers lie in 32 bits, so that a shift gives the even ones of a vector and a mask the odd ones: queries and sums are
kept in that order.

Shape legend
    h  heads    d  head dimension    B  places of a block, a multiple of LANES
"""

from __future__ import annotations

import llvmlite.binding
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from searchr1_kernels._numba_numbers import POLYNOMIAL_OF_EXP2

LANES = 16 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 8

_LINE = 64  # bytes that a processor reads at once
_CONTRACT = ("contract",)
_BIT, _BYTE, _SHORT, _NUMBER, _INDEX, _FLOAT = (*(ir.IntType(n) for n in (1, 8, 16, 32, 64)), ir.FloatType())
_FLOATS, _NUMBERS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_NUMBER, LANES)


def heads_together(group: int, head_dim: int) -> int:
    """How many of the heads that share keys go through a block at once: as their queries fit into registers."""
    heads = 1
    while group % (2 * heads) == 0 and 2 * heads <= LANES and 2 * heads * head_dim <= LANES * LANES // 2:
        heads *= 2
    return heads


def takes(head_dim: int, size: int, is_bf16: bool) -> bool:
    """Whether rows and blocks are whole vectors."""
    return head_dim % (2 * LANES if is_bf16 else LANES) == 0 and size % LANES == 0


# ----------------------------------------------------------------------------------------------------------- intrinsics
# Arrays are of one dimension and contiguous, but for what they are views of; `heads` and `head_dim` are constants.


@intrinsic(prefer_literal=True)
def load_queries(typing_context, query, scale, queries, heads, head_dim):
    """query [h * d] times scale -> queries [h * d] fp32."""

    def generate(context, builder, signature, arguments):
        source, target = (_data(context, builder, signature, arguments, i) for i in (0, 2))
        scales = _splat(builder, arguments[1])
        for place in range(0, heads.literal_value * head_dim.literal_value, _row_step(signature.args[0])):
            for i, part in enumerate(_widened(builder, _at(builder, source, _INDEX(place)))):
                _store(builder, builder.fmul(part, scales), _at(builder, target, _INDEX(place + i * LANES)))
        return context.get_dummy_value()

    return types.void(query, types.float32, queries, heads, head_dim), generate


@intrinsic(prefer_literal=True)
def store_sums(typing_context, sums, share, output, head_dim):
    """sums [d] fp32 times share -> output [d]."""

    def generate(context, builder, signature, arguments):
        source, target = (_data(context, builder, signature, arguments, i) for i in (0, 2))
        shares, step = _splat(builder, arguments[1]), _row_step(signature.args[2])
        for place in range(0, head_dim.literal_value, step):
            parts = [_load(builder, _at(builder, source, _INDEX(place + i))) for i in range(0, step, LANES)]
            parts = [builder.fmul(part, shares) for part in parts]
            _store(builder, _narrowed(builder, parts), _at(builder, target, _INDEX(place)))
        return context.get_dummy_value()

    return types.void(sums, types.float32, output, head_dim), generate


@intrinsic(prefer_literal=True)
def add_block(
    typing_context, queries, keys, values, filled, next_keys, next_values, next_filled, weights, peaks, totals, sums,
    heads, head_dim,
):  # fmt: skip
    """Online softmax of one block: queries [h * d] of `load_queries`, keys and values [B * d], of which `filled` places
    count -> peaks, totals [h] and sums [h * d] with them. `weights` [h * B]: scratch. The rows of the next block that
    are filled, if any, are prefetched."""

    def generate(context, builder, signature, arguments):
        names = ("queries", "keys", "values", "next_keys", "next_values", "weights", "peaks", "totals", "sums")
        places = (0, 1, 2, 4, 5, 7, 8, 9, 10)
        memory = {n: _data(context, builder, signature, arguments, i) for n, i in zip(names, places, strict=True)}
        shape = heads.literal_value, head_dim.literal_value, _row_step(signature.args[1])
        _Block(builder, memory, arguments[3], arguments[6], *shape).emit()
        return context.get_dummy_value()

    index = types.intp
    signature = types.void(
        queries, keys, values, index, next_keys, next_values, index, weights, peaks, totals, sums, heads, head_dim
    )
    return signature, generate


# ------------------------------------------------------------------------------------------------------------ the block


class _Block:
    """Writes the code of `add_block`."""

    def __init__(self, builder, memory, filled, next_filled, heads: int, head_dim: int, step: int) -> None:
        self.builder, self.memory, self.filled, self.next_filled = builder, memory, filled, next_filled
        self.heads, self.head_dim, self.step = heads, head_dim, step
        self.parts = head_dim // LANES  # vectors of a row
        rounded = builder.add(filled, _INDEX(LANES - 1))
        self.whole = builder.and_(rounded, _INDEX(-LANES))  # places up to here are computed

    def emit(self) -> None:
        highest = self._scores()
        shrinks = self._weights(highest)
        self._sums(shrinks)

    def _scores(self) -> list[ir.Value]:
        """-> `weights` [h, whole], -inf from `filled` on; the peaks with them, vectors of one value each."""
        builder, heads = self.builder, self.heads
        queries = [[_load(builder, _at(builder, self.memory["queries"], _INDEX(h * self.head_dim + i * LANES)))
                    for i in range(self.parts)] for h in range(heads)]  # fmt: skip
        lowest = ir.Constant(_FLOATS, [float("-inf")] * LANES)
        with _Loop(builder, self.whole, LANES, [lowest] * heads) as loop:
            scores = self._tile(loop.index, queries)
            places = builder.add(_splat(builder, builder.trunc(loop.index, _NUMBER)), _iota())
            counts = builder.icmp_signed("<", places, _splat(builder, builder.trunc(self.filled, _NUMBER)))
            peaks = []
            for h, score in enumerate(scores):
                masked = builder.select(counts, score, lowest)
                _store(builder, masked, self._weight_at(h, loop.index))
                peaks.append(_larger(builder, loop.values[h], masked))
            loop.end(peaks)
        return loop.results

    def _tile(self, first, queries) -> list[ir.Value]:
        """Scores of LANES places from `first` on -> one vector a head.

        A vector of sums per key and head is reduced with its neighbours, as a tree, so that one addition serves LANES
        of them. Leaves that share a key are side by side, and what comes out is put in order.
        """
        builder, heads, count = self.builder, self.heads, LANES // self.heads
        last = builder.sub(self.filled, _INDEX(1))
        tiles = []  # a vector of `count` places and all heads each
        for tile in range(heads):
            rows: dict[int, list[ir.Value]] = {}

            def leaf(number, begin=tile * count, rows=rows):
                place, head = divmod(number, heads)
                if place not in rows:
                    number = builder.add(first, _INDEX(begin + place))
                    self._prefetch(number, is_second=False)
                    rows[place] = self._row("keys", _smaller(builder, number, last))  # others may never be written
                return _dot(builder, queries[head], rows[place])

            tiles.append(_tree(builder, leaf, 0, LANES))
        lane_of = {leaf: lane for lane, leaf in enumerate(_leaf_of_lanes(0, LANES))}
        lanes = [[lane_of[place * heads + head] for place in range(count)] for head in range(heads)]
        return [_chosen(builder, tiles, lanes[head]) for head in range(heads)]

    def _row(self, name: str, place) -> list[ir.Value]:
        """The vectors of a row."""
        builder = self.builder
        begin = builder.mul(place, _INDEX(self.head_dim))
        found = []
        for i in range(0, self.head_dim, self.step):
            found += _widened(builder, _at(builder, self.memory[name], builder.add(begin, _INDEX(i))))
        return found

    def _prefetch(self, place, is_second: bool) -> None:
        """Beside a row of the keys as many lines of the next block's first half as there are rows, and beside the
        values' of its second half: keys and values at once, as a processor follows several runs of memory faster than
        one (12 against 9 GB/s: one core of an Intel Xeon, blocks of 8 kB, two cores busy, 2026-11-27)."""
        builder = self.builder
        lines = self.head_dim * (4 if self.step == LANES else 2) // _LINE  # of a row
        count = max(1, lines // 2)
        if is_second:
            if lines < 2:
                return
            place = builder.add(place, self.filled)
        last = builder.sub(builder.mul(self.next_filled, _INDEX(lines)), _INDEX(count))
        line = _smaller(builder, builder.mul(place, _INDEX(count)), last)
        for name in ("next_keys", "next_values"):
            begin = builder.bitcast(self.memory[name], _BYTE.as_pointer())
            for i in range(count):
                at = builder.mul(builder.add(line, _INDEX(i)), _INDEX(_LINE))
                _ask(builder, _at(builder, begin, at))

    def _weights(self, highest: list[ir.Value]) -> list[ir.Value]:
        """Scores in `weights` -> their powers of 2, relative to the peaks; peaks and totals are written. What sums
        until now are multiplied by, vectors of one value each."""
        builder, shrinks = self.builder, []
        tops, counts = [], []
        for h in range(self.heads):
            peak_at = _at(builder, self.memory["peaks"], _INDEX(h))
            peak = builder.load(peak_at)
            top = _larger(builder, peak, _across(builder, "fmax", highest[h]))
            builder.store(top, peak_at)
            shrinks.append(_exp2(builder, _splat(builder, builder.fsub(peak, top))))
            tops.append(_splat(builder, top))
            counts.append(ir.Constant(_FLOATS, [0.0] * LANES))
        with _Loop(builder, self.whole, LANES, counts) as loop:
            totals = []
            for h in range(self.heads):
                at = self._weight_at(h, loop.index)
                weight = _exp2(builder, builder.fsub(_load(builder, at), tops[h]))
                _store(builder, weight, at)
                totals.append(builder.fadd(loop.values[h], weight))
            loop.end(totals)
        for h in range(self.heads):
            at = _at(builder, self.memory["totals"], _INDEX(h))
            before = builder.fmul(builder.load(at), builder.extract_element(shrinks[h], _NUMBER(0)))
            builder.store(builder.fadd(before, _across(builder, "fadd", loop.results[h])), at)
        return shrinks

    def _sums(self, shrinks: list[ir.Value]) -> None:
        builder, parts = self.builder, self.parts
        places = [_at(builder, self.memory["sums"], _INDEX(i * LANES)) for i in range(self.heads * parts)]
        begin = [builder.fmul(_load(builder, at), shrinks[i // parts]) for i, at in enumerate(places)]
        with _Loop(builder, self.filled, 1, begin) as loop:
            self._prefetch(loop.index, is_second=True)
            row = self._row("values", loop.index)
            sums = []
            for h in range(self.heads):
                weight = _splat(builder, builder.load(self._weight_at(h, loop.index, _FLOAT)))
                sums += [_add_product(builder, weight, row[i], loop.values[h * parts + i]) for i in range(parts)]
            loop.end(sums)
        for at, total in zip(places, loop.results, strict=True):
            _store(builder, total, at)

    def _weight_at(self, head: int, place, kind=None):
        # Weights of the heads lie interleaved in runs of LANES places, so that no distance has to be known.
        builder = self.builder
        run, inside = builder.and_(place, _INDEX(-LANES)), builder.and_(place, _INDEX(LANES - 1))
        offset = builder.add(builder.mul(run, _INDEX(self.heads)), builder.add(inside, _INDEX(head * LANES)))
        return _at(builder, self.memory["weights"], offset)


class _Loop:
    """`with _Loop(builder, end, step, initial) as loop: … loop.end(values)`: index from 0 to before `end`."""

    def __init__(self, builder, end, step: int, initial) -> None:
        self.builder, self.step, self.initial = builder, step, initial
        self._end = end

    def __enter__(self) -> _Loop:
        builder = self.builder
        before, self._body = builder.block, builder.append_basic_block("rows")
        self._after = builder.append_basic_block("rows.end")
        builder.branch(self._body)  # there is always a first one
        builder.position_at_end(self._body)
        self.index = builder.phi(_INDEX)
        self.index.add_incoming(_INDEX(0), before)
        self.values = []
        for value in self.initial:
            phi = builder.phi(value.type)
            phi.add_incoming(value, before)
            self.values.append(phi)
        return self

    def end(self, values) -> None:
        builder = self.builder
        following = builder.add(self.index, _INDEX(self.step))
        self.index.add_incoming(following, builder.block)
        for phi, value in zip(self.values, values, strict=True):
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, self._end), self._body, self._after)
        self.results = values

    def __exit__(self, *_: object) -> None:
        self.builder.position_at_end(self._after)


# ------------------------------------------------------------------------------------------------------------- numbers


def _data(context, builder, signature, arguments, place: int):
    return context.make_array(signature.args[place])(context, builder, arguments[place]).data


def _at(builder, pointer, offset):
    return builder.gep(pointer, [offset])


def _row_step(array) -> int:
    """Numbers that one load gives: of fp32 one vector, of bf16 two."""
    return LANES if array.dtype == types.float32 else 2 * LANES


def _ask(builder, pointer) -> None:
    """Prefetch the line of a byte, to read it, into every cache."""
    function = builder.module.declare_intrinsic(
        "llvm.prefetch", (pointer.type,), ir.FunctionType(ir.VoidType(), [pointer.type, _NUMBER, _NUMBER, _NUMBER])
    )
    builder.call(function, [pointer, _NUMBER(0), _NUMBER(3), _NUMBER(1)])


def _load(builder, pointer, kind=_FLOATS):
    loaded = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    loaded.align = 2
    return loaded


def _store(builder, vector, pointer) -> None:
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=2)


def _widened(builder, pointer) -> list[ir.Value]:
    """fp32 or bf16 in memory -> one vector, or the even and the odd ones of two."""
    if pointer.type.pointee == _FLOAT:
        return [_load(builder, pointer)]
    pairs = _load(builder, pointer, _NUMBERS)
    even = builder.shl(pairs, ir.Constant(_NUMBERS, [16] * LANES))
    odd = builder.and_(pairs, ir.Constant(_NUMBERS, [0xFFFF0000] * LANES))
    return [builder.bitcast(x, _FLOATS) for x in (even, odd)]


def _narrowed(builder, parts: list[ir.Value]):
    """The inverse of `_widened`, rounded to the nearest, ties to even."""
    if len(parts) == 1:
        return parts[0]
    high = ir.Constant(_NUMBERS, [16] * LANES)
    even, odd = (_rounded(builder, part) for part in parts)
    return builder.or_(builder.lshr(even, high), builder.and_(odd, ir.Constant(_NUMBERS, [0xFFFF0000] * LANES)))


def _rounded(builder, part):
    """fp32 -> its bits with those of bf16 in the upper half."""
    bits = builder.bitcast(part, _NUMBERS)
    odd = builder.and_(builder.lshr(bits, ir.Constant(_NUMBERS, [16] * LANES)), ir.Constant(_NUMBERS, [1] * LANES))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(_NUMBERS, [0x7FFF] * LANES)))
    is_nan = builder.fcmp_unordered("uno", part, part)
    return builder.select(is_nan, ir.Constant(_NUMBERS, [0x7FC00000] * LANES), rounded)


def _splat(builder, value):
    kind = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _NUMBER(0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(_NUMBERS, [0] * LANES))


def _iota():
    return ir.Constant(_NUMBERS, list(range(LANES)))


def _smaller(builder, a, b):
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _larger(builder, a, b):
    """Of a NaN and a number some; the weights of a NaN are NaN whatever the peak is."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _add_product(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)


def _dot(builder, query: list[ir.Value], row: list[ir.Value]):
    total = builder.fmul(query[0], row[0], flags=_CONTRACT)
    for a, b in zip(query[1:], row[1:], strict=True):
        total = _add_product(builder, a, b, total)
    return total


def _across(builder, name: str, vector):
    """The largest, or the sum, of a vector's lanes."""
    if name == "fmax":
        function = builder.module.declare_intrinsic(
            f"llvm.vector.reduce.fmax.v{LANES}f32", fnty=ir.FunctionType(_FLOAT, [_FLOATS])
        )
        return builder.call(function, [vector])
    function = builder.module.declare_intrinsic(
        f"llvm.vector.reduce.fadd.v{LANES}f32", fnty=ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
    )
    return builder.call(function, [_FLOAT(0.0), vector], fastmath=("reassoc",))


def _exp2(builder, x):
    """2^x as `_numba_numbers.exp2`, of a vector of numbers up to 0; below -126 it is 2^-126."""
    least = ir.Constant(_FLOATS, [-126.0] * LANES)
    x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    function = builder.module.declare_intrinsic(f"llvm.floor.v{LANES}f32", fnty=ir.FunctionType(_FLOATS, [_FLOATS]))
    whole = builder.call(function, [x])
    f = builder.fsub(x, whole)
    *lower, power = (ir.Constant(_FLOATS, [float(c)] * LANES) for c in POLYNOMIAL_OF_EXP2)
    for coefficient in reversed(lower):
        power = _add_product(builder, f, power, coefficient)
    exponent = builder.add(builder.fptosi(whole, _NUMBERS), ir.Constant(_NUMBERS, [127] * LANES))
    return builder.fmul(power, builder.bitcast(builder.shl(exponent, ir.Constant(_NUMBERS, [23] * LANES)), _FLOATS))


# ------------------------------------------------------------------------------------------------- sums across lanes


def _tree(builder, leaf, begin: int, end: int):
    """Leaves `begin` to `end`, vectors each -> a vector in which each has LANES / (end - begin) lanes that add up to
    its own."""
    if end - begin == 1:
        return leaf(begin)
    middle = (begin + end) // 2
    first, second = _tree(builder, leaf, begin, middle), _tree(builder, leaf, middle, end)
    low, high = (_shuffled(builder, first, second, lanes) for lanes in _halves(LANES // (end - begin)))
    return builder.fadd(low, high)


def _halves(width: int) -> tuple[list[int], list[int]]:
    """Of two vectors, runs of 2 * width lanes are halved, to be added: the lanes of the first halves, and the second.
    Processors shuffle most cheaply where runs of 4 lanes stay inside of theirs, so narrow ones do."""
    inside = 4 if width < 4 else LANES
    runs = [begin + vector * LANES for begin in range(0, LANES, inside) for vector in (0, 1)]
    lanes = [begin + i for begin in runs for i in range(inside)]
    low = [lane for lane in lanes if lane % (2 * width) < width]
    return low, [lane + width for lane in low]


def _leaf_of_lanes(begin: int, end: int) -> list[int]:
    """Whose sums the lanes of `_tree` hold."""
    if end - begin == 1:
        return [begin] * LANES
    middle = (begin + end) // 2
    both = _leaf_of_lanes(begin, middle) + _leaf_of_lanes(middle, end)
    return [both[lane] for lane in _halves(LANES // (end - begin))[0]]


def _chosen(builder, vectors: list[ir.Value], lanes: list[int]):
    """The same lanes of each of 2^n vectors, end to end."""
    if len(vectors) == 1:
        return _shuffled(builder, vectors[0], vectors[0], lanes)
    while len(vectors) > 1:
        size = vectors[0].type.count
        mask = [*lanes, *(lane + size for lane in lanes)]
        vectors = [_shuffled(builder, *vectors[i : i + 2], mask) for i in range(0, len(vectors), 2)]
        lanes = list(range(len(mask)))
    return vectors[0]


def _shuffled(builder, first, second, lanes: list[int]):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_NUMBER, len(lanes)), lanes))
