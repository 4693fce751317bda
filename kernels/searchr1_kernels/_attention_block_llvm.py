"""One block of keys and values for a few query heads that share them, in vector instructions that are written out.

What a compiler makes of the loops over `head_dim` numbers is bound by their ends: a sum across lanes per key, and sums
that are stored and reloaded per value. Here the length of a row is known when code is generated. So queries and sums
stay in registers, a row is loaded and widened once for all `heads` that share it, and the scores of a vector's worth of
keys are summed across lanes together. Memory is prefetched: with each row of this block, the same of the next one.

In bf16, queries and sums are kept in the order of `_vector_code`.

Shape legend
    h  heads    d  head dimension    B  places of a block, a multiple of LANES
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from searchr1_kernels import _vector_code as vectors
from searchr1_kernels._vector_code import LANES

_LINE = 64  # bytes of a cache line


def heads_together(group: int, head_dim: int) -> int:
    """-> how many of the heads that share keys take a block at once: as many as have their queries in registers."""
    heads = 1
    while group % (2 * heads) == 0 and 2 * heads <= LANES and 2 * heads * head_dim <= LANES * LANES // 2:
        heads *= 2
    return heads


def takes(head_dim: int, size: int, is_bf16: bool) -> bool:
    """Whether rows and blocks consist of whole vectors."""
    return head_dim % (2 * LANES if is_bf16 else LANES) == 0 and size % LANES == 0


# ----------------------------------------------------------------------------------------------------------- intrinsics
# Arrays have one dimension and are contiguous, but may be views; `heads` and `head_dim` are constants.


@intrinsic(prefer_literal=True)
def load_queries(typing_context, query, scale, queries, heads, head_dim):
    """query [h * d] times scale -> queries [h * d] fp32."""

    def generate(context, builder, signature, arguments):
        source, target = (vectors.data(context, builder, signature, arguments, i) for i in (0, 2))
        scales = vectors.splat(builder, arguments[1])
        for place in range(0, heads.literal_value * head_dim.literal_value, vectors.row_step(signature.args[0])):
            for i, part in enumerate(vectors.widened(builder, vectors.at(builder, source, vectors.INDEX(place)))):
                vectors.store(
                    builder, builder.fmul(part, scales), vectors.at(builder, target, vectors.INDEX(place + i * LANES))
                )
        return context.get_dummy_value()

    return types.void(query, types.float32, queries, heads, head_dim), generate


@intrinsic(prefer_literal=True)
def store_sums(typing_context, sums, share, output, head_dim):
    """sums [d] fp32 times share -> output [d]."""

    def generate(context, builder, signature, arguments):
        source, target = (vectors.data(context, builder, signature, arguments, i) for i in (0, 2))
        shares, step = vectors.splat(builder, arguments[1]), vectors.row_step(signature.args[2])
        for place in range(0, head_dim.literal_value, step):
            parts = [
                vectors.load(builder, vectors.at(builder, source, vectors.INDEX(place + i)))
                for i in range(0, step, LANES)
            ]
            parts = [builder.fmul(part, shares) for part in parts]
            vectors.store(builder, vectors.narrowed(builder, parts), vectors.at(builder, target, vectors.INDEX(place)))
        return context.get_dummy_value()

    return types.void(sums, types.float32, output, head_dim), generate


@intrinsic(prefer_literal=True)
def add_block(
    typing_context, queries, keys, values, filled, next_keys, next_values, next_filled, weights, peaks, totals, sums,
    heads, head_dim,
):  # fmt: skip
    """Add one block to an online softmax: peaks, totals [h] and sums [h * d] are updated.

    queries [h * d] are from `load_queries`; keys and values are [B * d], of which `filled` places count. `weights`
    [h * B] is scratch. The filled rows of the next block, if any, are prefetched."""

    def generate(context, builder, signature, arguments):
        names = ("queries", "keys", "values", "next_keys", "next_values", "weights", "peaks", "totals", "sums")
        places = (0, 1, 2, 4, 5, 7, 8, 9, 10)
        memory = {
            n: vectors.data(context, builder, signature, arguments, i) for n, i in zip(names, places, strict=True)
        }
        shape = heads.literal_value, head_dim.literal_value, vectors.row_step(signature.args[1])
        _Block(builder, memory, arguments[3], arguments[6], *shape).emit()
        return context.get_dummy_value()

    index = types.intp
    signature = types.void(
        queries, keys, values, index, next_keys, next_values, index, weights, peaks, totals, sums, heads, head_dim
    )
    return signature, generate


# ------------------------------------------------------------------------------------------------------------ the block


class _Block:
    """Generates the code of `add_block`."""

    def __init__(self, builder, memory, filled, next_filled, heads: int, head_dim: int, step: int) -> None:
        self.builder, self.memory, self.filled, self.next_filled = builder, memory, filled, next_filled
        self.heads, self.head_dim, self.step = heads, head_dim, step
        self.parts = head_dim // LANES  # vectors of a row
        rounded = builder.add(filled, vectors.INDEX(LANES - 1))
        self.whole = builder.and_(rounded, vectors.INDEX(-LANES))  # places up to here are computed

    def emit(self) -> None:
        """Generate all of it."""
        highest = self._scores()
        shrinks = self._weights(highest)
        self._sums(shrinks)

    def _scores(self) -> list[ir.Value]:
        """Store scores in `weights` [h, whole], -inf from `filled` on. -> a vector per head of each lane's peak."""
        builder, heads = self.builder, self.heads
        starts = [[vectors.INDEX(h * self.head_dim + i * LANES) for i in range(self.parts)] for h in range(heads)]
        memory = self.memory["queries"]
        queries = [[vectors.load(builder, vectors.at(builder, memory, at)) for at in own] for own in starts]
        lowest = ir.Constant(vectors.FLOATS, [float("-inf")] * LANES)
        with vectors.Loop(builder, self.whole, LANES, [lowest] * heads) as loop:
            scores = self._tile(loop.index, queries)
            places = builder.add(vectors.splat(builder, builder.trunc(loop.index, vectors.NUMBER)), vectors.iota())
            counts = builder.icmp_signed(
                "<", places, vectors.splat(builder, builder.trunc(self.filled, vectors.NUMBER))
            )
            peaks = []
            for h, score in enumerate(scores):
                masked = builder.select(counts, score, lowest)
                vectors.store(builder, masked, self._weight_at(h, loop.index))
                peaks.append(vectors.larger(builder, loop.values[h], masked))
            loop.end(peaks)
        return loop.results

    def _tile(self, first, queries) -> list[ir.Value]:
        """-> scores of LANES places from `first` on, one vector per head.

        The vectors of sums, one per key and head, are reduced together as a tree, so that one addition serves LANES of
        them. Leaves that share a key are side by side, and the results are put in order at the end.
        """
        builder, heads, count = self.builder, self.heads, LANES // self.heads
        last = builder.sub(self.filled, vectors.INDEX(1))
        tiles = []  # a vector of `count` places and all heads each
        for tile in range(heads):
            rows: dict[int, list[ir.Value]] = {}

            def leaf(number, begin=tile * count, rows=rows):
                place, head = divmod(number, heads)
                if place not in rows:
                    number = builder.add(first, vectors.INDEX(begin + place))
                    self._prefetch(number, is_second=False)
                    rows[place] = self._row(
                        "keys", vectors.smaller(builder, number, last)
                    )  # later rows may never have been written
                return vectors.dot(builder, queries[head], rows[place])

            tiles.append(vectors.tree(builder, leaf, 0, LANES))
        lane_of = {leaf: lane for lane, leaf in enumerate(vectors.leaf_of_lanes(0, LANES))}
        lanes = [[lane_of[place * heads + head] for place in range(count)] for head in range(heads)]
        return [vectors.chosen(builder, tiles, lanes[head]) for head in range(heads)]

    def _row(self, name: str, place) -> list[ir.Value]:
        """-> the vectors of a row."""
        builder = self.builder
        begin = builder.mul(place, vectors.INDEX(self.head_dim))
        found = []
        for i in range(0, self.head_dim, self.step):
            found += vectors.widened(
                builder, vectors.at(builder, self.memory[name], builder.add(begin, vectors.INDEX(i)))
            )
        return found

    def _prefetch(self, place, is_second: bool) -> None:
        """Prefetch a share of the next block: of its first half beside each row of keys, of its second beside values.

        Its keys and values are fetched at the same time, as a processor follows several runs of memory faster than one
        (12 against 9 GB/s: one core of an Intel Xeon, blocks of 8 kB, two cores busy, 2026-11-27)."""
        builder = self.builder
        lines = self.head_dim * (4 if self.step == LANES else 2) // _LINE  # of a row
        count = max(1, lines // 2)
        if is_second:
            if lines < 2:
                return
            place = builder.add(place, self.filled)
        last = builder.sub(builder.mul(self.next_filled, vectors.INDEX(lines)), vectors.INDEX(count))
        line = vectors.smaller(builder, builder.mul(place, vectors.INDEX(count)), last)
        for name in ("next_keys", "next_values"):
            begin = builder.bitcast(self.memory[name], vectors.BYTE.as_pointer())
            for i in range(count):
                at = builder.mul(builder.add(line, vectors.INDEX(i)), vectors.INDEX(_LINE))
                vectors.ask(builder, vectors.at(builder, begin, at))

    def _weights(self, highest: list[ir.Value]) -> list[ir.Value]:
        """Replace the scores in `weights` by their powers of 2, relative to the peaks; update peaks and totals.

        -> the factors of the sums so far, vectors of one value each."""
        builder, shrinks = self.builder, []
        tops, counts = [], []
        for h in range(self.heads):
            peak_at = vectors.at(builder, self.memory["peaks"], vectors.INDEX(h))
            peak = builder.load(peak_at)
            top = vectors.larger(builder, peak, vectors.across(builder, "fmax", highest[h]))
            builder.store(top, peak_at)
            shrinks.append(vectors.exp2(builder, vectors.splat(builder, builder.fsub(peak, top))))
            tops.append(vectors.splat(builder, top))
            counts.append(ir.Constant(vectors.FLOATS, [0.0] * LANES))
        with vectors.Loop(builder, self.whole, LANES, counts) as loop:
            totals = []
            for h in range(self.heads):
                at = self._weight_at(h, loop.index)
                weight = vectors.exp2(builder, builder.fsub(vectors.load(builder, at), tops[h]))
                vectors.store(builder, weight, at)
                totals.append(builder.fadd(loop.values[h], weight))
            loop.end(totals)
        for h in range(self.heads):
            at = vectors.at(builder, self.memory["totals"], vectors.INDEX(h))
            before = builder.fmul(builder.load(at), builder.extract_element(shrinks[h], vectors.NUMBER(0)))
            builder.store(builder.fadd(before, vectors.across(builder, "fadd", loop.results[h])), at)
        return shrinks

    def _sums(self, shrinks: list[ir.Value]) -> None:
        builder, parts = self.builder, self.parts
        places = [vectors.at(builder, self.memory["sums"], vectors.INDEX(i * LANES)) for i in range(self.heads * parts)]
        begin = [builder.fmul(vectors.load(builder, at), shrinks[i // parts]) for i, at in enumerate(places)]
        with vectors.Loop(builder, self.filled, 1, begin) as loop:
            self._prefetch(loop.index, is_second=True)
            row = self._row("values", loop.index)
            sums = []
            for h in range(self.heads):
                weight = vectors.splat(builder, builder.load(self._weight_at(h, loop.index, vectors.FLOAT)))
                sums += [vectors.add_product(builder, weight, row[i], loop.values[h * parts + i]) for i in range(parts)]
            loop.end(sums)
        for at, total in zip(places, loop.results, strict=True):
            vectors.store(builder, total, at)

    def _weight_at(self, head: int, place, kind=None):
        # The heads' weights are interleaved in runs of LANES places, so that no distance has to be known.
        builder = self.builder
        run, inside = builder.and_(place, vectors.INDEX(-LANES)), builder.and_(place, vectors.INDEX(LANES - 1))
        offset = builder.add(
            builder.mul(run, vectors.INDEX(self.heads)), builder.add(inside, vectors.INDEX(head * LANES))
        )
        return vectors.at(builder, self.memory["weights"], offset)
