"""The operators of a decoding step on a CPU, and their errors; the kernels are in `generation_interpreted`."""

from __future__ import annotations

import pytest
import torch
from searchr1_kernels import reference, rms_norm, rotary_write, silu_mul


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


def test_norms_match_the_oracle():
    x, residual, weight = numbers(4, 10), numbers(4, 10, seed=1), numbers(10, seed=2)
    for other in (None, residual):
        have, want = rms_norm(x, weight, 0.1, other), reference.rms_norm(x, weight, 0.1, other)
        torch.testing.assert_close(have, want)
    assert rms_norm(x, weight, 0.1)[1] is x


@pytest.mark.parametrize("has_norm", [True, False])
def test_rotation_and_write_match_the_oracle(has_norm):
    arguments, norms = step(has_norm=has_norm)
    want = reference.rotary_write(*arguments, **norms)
    have = rotary_write(*arguments, **norms)
    for left, right in zip((have, *arguments[5:7]), want, strict=True):
        torch.testing.assert_close(left, right)


def test_products_match_the_oracle():
    gate, up = numbers(3, 7), numbers(3, 7, seed=1)
    torch.testing.assert_close(silu_mul(gate, up), reference.silu_mul(gate, up))


def test_types_are_rounded_where_torch_rounds():
    x, residual, weight = (numbers(*shape, dtype=torch.bfloat16) for shape in ((4, 10), (4, 10), (10,)))
    total = x + residual
    exact = torch.nn.functional.rms_norm(total.float(), (10,), weight.float(), 1e-6)
    normed, have = rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(have, total) and torch.equal(normed, exact.bfloat16())
    assert torch.equal(silu_mul(x, residual), torch.nn.functional.silu(x) * residual)


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


def test_errors_of_norms_and_heads():
    arguments, norms = step()
    with pytest.raises(ValueError, match="expected both or none"):
        rotary_write(*arguments, query_norm=norms["query_norm"])
    with pytest.raises(ValueError, match="key_norm: expected shape"):
        rotary_write(*arguments, query_norm=norms["query_norm"], key_norm=norms["key_norm"][1:])
    odd = [x[..., :5] if x.is_floating_point() else x for x in arguments]
    with pytest.raises(ValueError, match="even number of components"):
        rotary_write(*odd)
