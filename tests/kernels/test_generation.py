"""The operators of a decoding step on a CPU, and their errors; the kernels are in `generation_interpreted`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import _generation_numba, reference, rms_norm, rotary_write, silu_mul


def numbers(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(heads=4, kv_heads=2, d=6, has_norm=True, dtype=torch.float64):
    """-> arguments of `rotary_write` for three tokens in a cache of two slots, and its options."""
    query, key, value = (numbers(3, n, d, dtype=dtype, seed=n) for n in (heads, kv_heads, kv_heads + 9))
    value = value[:, :kv_heads]
    keys, values = (numbers(2, kv_heads, 5, d, dtype=dtype, seed=seed) for seed in (3, 4))
    angles = numbers(3, 1, d // 2, dtype=torch.promote_types(dtype, torch.float32), seed=5).repeat(1, 1, 2)
    slots, positions = torch.tensor([1, 0, 1]), torch.tensor([4, 0, 2])
    norms = {"query_norm": numbers(d, dtype=dtype, seed=6), "key_norm": numbers(d, dtype=dtype, seed=7)}
    return (query, key, value, angles.cos(), angles.sin(), keys, values, slots, positions), norms if has_norm else {}


TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
any_type = st.sampled_from(list(TOLERANCES))


def close(have, want):
    assert have.shape == want.shape
    tolerance = TOLERANCES[have.dtype]
    torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9), size=st.integers(1, 70), spread=st.sampled_from([1e-3, 1.0, 30.0]), dtype=any_type,
    turned=st.booleans(), seed=st.integers(0, 100),
)  # fmt: skip
def test_norms_and_products_match_the_oracle(rows, size, spread, dtype, turned, seed):
    x, other = (spread * numbers(rows, size, seed=seed + i) for i in range(2))
    x, other = (tensor.to(dtype) if not turned else tensor.T.to(dtype).contiguous().T for tensor in (x, other))
    weight = numbers(size, dtype=dtype, seed=2)
    assert rms_norm(x, weight, 1e-5)[1] is x
    for residual in (None, other):
        have = rms_norm(x, weight, 1e-5, residual)
        total = x if residual is None else x + residual
        assert torch.equal(have[1], total)  # rounded once, and the norm is of the rounded sum
        close(have[0], reference.rms_norm(total.double(), weight.double(), 1e-5)[0])
    close(silu_mul(x, other), reference.silu_mul(x.double(), other.double()))


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), unique=True, max_size=9),
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1), (3, 3)]),
    half=st.sampled_from([1, 3, 16]),
    dtype=any_type,
    has_norm=st.booleans(),
    seed=st.integers(0, 100),
)
def test_rotation_and_write_match_the_oracle(places, heads, half, dtype, has_norm, seed):
    """Tokens are written to any distinct places, and all other places keep what they hold."""
    count, d = len(places), 2 * half
    query, key, value = (numbers(count, n, d, dtype=dtype, seed=seed + i) for i, n in enumerate((*heads, heads[1])))
    keys, values = (numbers(4, heads[1], 5, d, dtype=dtype, seed=seed + 3 + i) for i in range(2))
    angles = numbers(count, 1, d, dtype=torch.promote_types(dtype, torch.float32), seed=5)
    angles[..., half:] = angles[..., :half]
    norms = [numbers(d, dtype=dtype, seed=6 + i) for i in range(2)] if has_norm else [None, None]
    blocks, inside = torch.tensor(places, dtype=torch.int64).view(-1, 2).T
    tensors = (query, key, value, angles.cos(), angles.sin(), keys, values)
    exact = (*(x.double() for x in tensors), blocks, inside, *(x if x is None else x.double() for x in norms))
    want = reference.rotary_write(*exact)
    have = rotary_write(*tensors, blocks, inside, query_norm=norms[0], key_norm=norms[1])
    for left, right in zip((have, keys, values), want, strict=True):
        close(left, right)
    written = torch.zeros(4, 5, dtype=torch.bool)
    written[blocks, inside] = True
    for memory, before in ((keys, exact[5]), (values, exact[6])):
        assert torch.equal(memory.transpose(1, 2)[~written].double(), before.transpose(1, 2)[~written])


def test_types_are_rounded_where_torch_rounds():
    x, residual, weight = (numbers(*shape, dtype=torch.bfloat16) for shape in ((4, 10), (4, 10), (10,)))
    total = x + residual
    exact = torch.nn.functional.rms_norm(total.float(), (10,), weight.float(), 1e-6)
    normed, have = rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(have, total) and torch.equal(normed, exact.bfloat16())
    assert torch.equal(silu_mul(x, residual), torch.nn.functional.silu(x) * residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "size"), [(5, 34), (1, 64), (0, 16), (3, 7)])
def test_loops_give_what_torch_gives(dtype, tokens, size, monkeypatch):
    """On a CPU, with rows that lie apart, as parts of one product do; bf16 differs at most in the last bit of sums."""
    product, weight = numbers(tokens, 3 * size, dtype=dtype), numbers(size, dtype=dtype, seed=1)
    first, second, third = product.split(size, dim=1)
    calls = (
        lambda: rms_norm(first, weight, 1e-5, second),
        lambda: rms_norm(third, weight, 1e-5),
        lambda: (silu_mul(first * 4, third),),
        lambda: (silu_mul(second, third),),
    )
    ours = [call() for call in calls]
    monkeypatch.setattr(_generation_numba, "takes", lambda *_: False)
    check_alike(ours, [call() for call in calls], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("joined", [True, False])
def test_the_loop_of_rotation_gives_what_torch_gives(dtype, has_norm, joined, monkeypatch):
    arguments, norms = step(heads=4, kv_heads=2, d=32, has_norm=has_norm, dtype=dtype)
    if joined:
        heads = torch.cat(arguments[:3], dim=1).flatten(1).split([4 * 32, 2 * 32, 2 * 32], dim=1)
        arguments = (*(x.unflatten(1, (-1, 32)) for x in heads), *arguments[3:])
    memory = [(x.clone(), y.clone()) for x, y in [arguments[5:7]] * 2]
    ours = (rotary_write(*arguments[:5], *memory[0], *arguments[7:], **norms), *memory[0])
    monkeypatch.setattr(_generation_numba, "takes", lambda *_: False)
    theirs = (rotary_write(*arguments[:5], *memory[1], *arguments[7:], **norms), *memory[1])
    check_alike([ours], [theirs], dtype)


def check_alike(ours, theirs, dtype):
    for one, other in zip(ours, theirs, strict=True):
        for have, want in zip(one, other, strict=True):
            assert have.dtype == want.dtype == dtype
            assert have.is_contiguous() or have.data_ptr() == want.data_ptr()  # x itself, returned as the sum
            if dtype == torch.float32:
                torch.testing.assert_close(have, want, rtol=2e-6, atol=2e-6)
            else:
                torch.testing.assert_close(have, want, rtol=2**-7, atol=2e-6)  # one step of bf16
                assert (have != want).sum() <= 0.01 * have.numel() + 1


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_loops_keep_what_is_not_finite_and_round_halves_to_even(special):
    x = torch.tensor([[1.00390625, 1.01171875, -1.00390625, 3e38, 1e-40, special, 1.0, 2.0]])  # halves of a bf16 step
    ones = torch.ones(1, 8)
    total = rms_norm(x.bfloat16(), ones[0].bfloat16(), 1e-6, ones.bfloat16())[1]
    torch.testing.assert_close(total, x.bfloat16() + ones.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert rms_norm(x, ones[0], 1e-6)[0].isnan().any()
    large = torch.full((1, 8), 88.0).bfloat16()
    for gate, up in ((x.bfloat16(), ones.bfloat16()), (large, (x / 88).bfloat16())):
        product = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(silu_mul(gate, up), product, rtol=0, atol=0, equal_nan=True)


def test_constants_to_autograd():
    x = numbers(2, 8).requires_grad_()
    assert not silu_mul(x, x).requires_grad
    assert not rms_norm(x, x[0], 1e-6, x)[0].requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm(x[0], x[0], 1e-6), "x: expected shape"),
        (lambda x: rms_norm(x, x[0, 1:], 1e-6), "weight: expected shape"),
        (lambda x: rms_norm(x, x[0], 1e-6, x[:1]), "residual: expected shape"),
        (lambda x: rms_norm(x, x[0], 1e-6, x.half()), "residual: expected torch.float64"),
        (lambda x: rms_norm(x.new_zeros(1, 16385), x.new_zeros(16385), 1e-6), "at most 16384 components"),
        (lambda x: rms_norm(x.long(), x[0].long(), 0.1), "x: expected a floating-point"),
        (lambda x: silu_mul(x, x[:1]), "up: expected shape"),
        (lambda x: silu_mul(x.long(), x), "gate: expected a floating-point"),
        (lambda x: silu_mul(x, x.to("meta")), "up: expected the device of gate"),
    ],
)
def test_errors_of_norm_and_product(call, message):
    with pytest.raises(ValueError, match=message):
        call(numbers(2, 8))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[0], "query: expected shape"),
        (1, lambda x: x[:2], "key: expected shape"),
        (2, lambda x: x[:, :1], "value: expected shape"),
        (2, lambda x: x.half(), "value: expected torch.float64"),
        (3, lambda x: x[..., :3], "cos: expected shape"),
        (4, lambda x: x.float(), "sin: expected torch.float64"),
        (5, lambda x: x[:, :1], "keys: expected shape"),
        (6, lambda x: x[:1], "values: expected shape"),
        (6, lambda x: x.to("meta"), "values: expected the device of query"),
        (7, lambda x: x.int(), "blocks: expected torch.int64"),
        (8, lambda x: x[:2], "places: expected shape"),
    ],
)
def test_errors_of_rotation(place, change, message):
    arguments, norms = step()
    changed = [change(x) if i == place else x for i, x in enumerate(arguments)]
    with pytest.raises(ValueError, match=message):
        rotary_write(*changed, **norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        (7, 2, "blocks: expected ids from 0 to 1, got 1 to 2"),
        (7, -1, "blocks: expected ids from 0 to 1, got -1 to 1"),
        (8, 5, "places: expected ids from 0 to 4, got 2 to 5"),
        (8, -1, "places: expected ids from 0 to 4, got -1 to 4"),
    ],
)
def test_places_that_are_not_there_are_named(place, number, message, dtype):
    """On a CPU, where the loops would write to any memory."""
    arguments, norms = step(dtype=dtype)
    arguments[place][1] = number
    before = [memory.clone() for memory in arguments[5:7]]
    with pytest.raises(ValueError, match=message):
        rotary_write(*arguments, **norms)
    assert all(map(torch.equal, before, arguments[5:7]))


@pytest.mark.parametrize("apart", [5, 6])
def test_a_cache_may_be_any_view(apart):
    """Writing it as if it were contiguous would hit another's memory."""
    arguments, norms = step(d=32, dtype=torch.float32)
    want = reference.rotary_write(*arguments, **norms)
    around = torch.nn.functional.pad(arguments[apart], (0, 0, 0, 0, 0, 1), value=7.0)  # one head more
    given = [*(tensor.contiguous() for tensor in arguments[:apart]), around[:, :-1], *arguments[apart + 1 :]]
    have = rotary_write(*given, **norms)
    for left, right in zip((have, *given[5:7]), want, strict=True):
        torch.testing.assert_close(left, right)
    assert (around[:, -1] == 7).all()


def test_the_largest_rows_and_heads():
    x = numbers(1, 16_384)
    torch.testing.assert_close(rms_norm(x, x[0], 0.1)[0], reference.rms_norm(x, x[0], 0.1, None)[0])
    arguments, norms = step(d=512)
    want = reference.rotary_write(*arguments, **norms)
    torch.testing.assert_close(rotary_write(*arguments, **norms), want[0])


FORK = """
import os, torch
from searchr1_kernels import cached_attention, rms_norm, rotary_write, silu_mul
x = torch.linspace(-1, 1, 48).view(3, 16)
heads, memory, places, angles = x[:, None], torch.zeros(2, 1, 4, 16), torch.arange(3), torch.zeros(3, 1, 16)
table = torch.tensor([[1, 0]], dtype=torch.int32)
def run():
    written = memory.clone(), memory.clone()
    query = rotary_write(heads, heads, heads, angles + 1, angles, *written, places % 2, places)
    attended = cached_attention(query, *written, places * 0, places, table=table)
    return rms_norm(x, x[0], 1e-6)[0], silu_mul(x, x), *written, attended
before = run()
child = os.fork()
if child == 0:
    for ours, parents in zip(run(), before, strict=True):
        torch.testing.assert_close(ours, parents)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_a_forked_child_is_not_ended():
    """GNU OpenMP ends a child that uses its threads after the parent has."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=300)


def test_errors_of_norms_and_heads():
    arguments, norms = step()
    with pytest.raises(ValueError, match="expected both or none"):
        rotary_write(*arguments, query_norm=norms["query_norm"])
    with pytest.raises(ValueError, match="key_norm: expected shape"):
        rotary_write(*arguments, query_norm=norms["query_norm"], key_norm=norms["key_norm"][1:])
    with pytest.raises(ValueError, match="key_norm: expected a floating-point"):
        rotary_write(*arguments, query_norm=norms["query_norm"], key_norm=norms["key_norm"].long())
    odd = [x[..., :5] if x.is_floating_point() else x for x in arguments]
    with pytest.raises(ValueError, match="even number of components"):
        rotary_write(*odd)
