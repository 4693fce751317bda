"""The Triton kernels of `rms_norm`, `rotary_write` and `silu_mul`. Run by `test_triton`, not collected by itself.

Without a GPU they run in Triton's interpreter, in a process of their own because importing Triton fixes that choice. On
a GPU they are compiled.
"""

from __future__ import annotations

import sys

import pytest
import torch
from far_memory import far_memory
from searchr1_kernels import _generation_triton, reference, rms_norm

generation = sys.modules[rms_norm.__module__]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
each_type = pytest.mark.parametrize("dtype", TOLERANCE)


def numbers(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(have, want):
    tolerance = TOLERANCE[have.dtype]
    torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance)


@each_type
@pytest.mark.parametrize(("rows", "size"), [(3, 16), (2, 100), (1, 2048), (5, 1030)])
def test_norm_matches_the_oracle(rows, size, dtype):
    x, residual = (numbers(rows, size, dtype=dtype, seed=seed) for seed in range(2))
    weight = numbers(size, 2, dtype=dtype, seed=2)[:, 1]
    normed, nothing = _generation_triton.norm(x, None, weight, 1e-3)
    assert nothing is None
    close(normed, reference.rms_norm(x.double(), weight.double(), 1e-3)[0])
    normed, total = _generation_triton.norm(x, residual, weight, 1e-3)
    if dtype != torch.bfloat16 or DEVICE == "cuda":  # the interpreter truncates to bf16 and does not round
        assert torch.equal(total, x + residual)
    close(total, x.double() + residual.double())
    # The norm is of the rounded sum, which is what goes on through the layers.
    close(normed, reference.rms_norm(total.double(), weight.double(), 1e-3)[0])


def tokens(heads, kv_heads, d, dtype=torch.float32, has_norm=False, count=5):
    """-> arguments of `rotary_write`."""
    query = numbers(count, heads, d, dtype=dtype)
    key, value = (numbers(count, kv_heads, d, dtype=dtype, seed=seed) for seed in (1, 2))
    keys, values = (numbers(4, kv_heads, 9, d, dtype=dtype, seed=seed) for seed in (3, 4))
    angles = numbers(count, 1, d // 2, dtype=torch.float32, seed=5).repeat(1, 1, 2)
    slots = torch.tensor([3, 0, 0, 1, 3], device=DEVICE)[:count]
    positions = torch.tensor([8, 0, 1, 5, 2], device=DEVICE)[:count]
    norms = [numbers(d, dtype=dtype, seed=seed) for seed in (6, 7)] if has_norm else [None, None]
    return query, key, value, angles.cos(), angles.sin(), keys, values, slots, positions, *norms, 1e-6


def check_rotation(arguments):
    *tensors, eps = (x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments)
    want = reference.rotary_write(*tensors, eps)
    have = _generation_triton.rotary_write(*arguments)
    for left, right in zip((have, *arguments[5:7]), want, strict=True):
        close(left, right)


@each_type
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 2, 16), (3, 3, 20), (7, 1, 64), (2, 1, 128), (5, 3, 80)])
def test_rotation_and_write_match_the_oracle(heads, kv_heads, d, has_norm, dtype):
    check_rotation(tokens(heads, kv_heads, d, dtype, has_norm))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d"), [(14, 2, 64), (20, 17, 128), (12, 6, 256), (9, 9, 80), (6, 2, 512)]
)
def test_rotation_of_several_blocks_of_heads(heads, kv_heads, d, count):
    """The last block, of queries or of keys, may not be full."""
    check_rotation(tokens(heads, kv_heads, d, has_norm=True, count=count))


@pytest.mark.parametrize("has_norm", [True, False])
def test_blocks_of_heads_change_no_bit(has_norm, monkeypatch):
    results = []
    for pairs in (1024, 128, 1):
        monkeypatch.setattr(_generation_triton, "_PAIRS", pairs)
        arguments = tokens(7, 3, 64, has_norm=has_norm)
        results.append((_generation_triton.rotary_write(*arguments), *arguments[5:7]))
    for other in results[1:]:
        # With norms, threads in another layout may add up in another order.
        tolerance = 0 if DEVICE == "cpu" or not has_norm else 1e-6
        torch.testing.assert_close(other, results[0], rtol=tolerance, atol=tolerance)


def test_rotation_takes_views_of_one_product():
    """q, k and v side by side, cosines beside sines, blocks beside places, both norms' weights, and a cache with its
    heads inside its places."""
    product = numbers(3, 8 * 16, dtype=torch.float32)
    query, key, value = (x.unflatten(1, (-1, 16)) for x in product.split([64, 32, 32], dim=1))
    caches = [torch.zeros(2, 5, 2, 16, device=DEVICE).transpose(1, 2) for _ in range(2)]
    angles = numbers(3, 1, 8, dtype=torch.float32, seed=5).repeat(1, 1, 2)
    slots, positions = torch.tensor([[1, 0], [0, 4], [1, 1]], device=DEVICE).unbind(1)
    tensors = (query, key, value, *torch.stack([angles.cos(), angles.sin()], dim=3).unbind(3), *caches)
    norms = numbers(16, 2, dtype=torch.float32, seed=6).unbind(1)
    doubles, double_norms = ([tensor.double() for tensor in given] for given in (tensors, norms))
    want = reference.rotary_write(*doubles, slots, positions, *double_norms, 1e-6)
    have = _generation_triton.rotary_write(*tensors, slots, positions, *norms, 1e-6)
    for left, right in zip((have, *caches), want, strict=True):
        close(left, right)


def test_offsets_beyond_32_bits(tmp_path):
    """Rows, tokens and blocks of a cache 2^30 numbers apart."""
    width = 1 << 30
    memory = far_memory(tmp_path, (2 << 30) + 64, DEVICE)
    x, weight = numbers(3, 32, dtype=torch.float16), numbers(32, dtype=torch.float16, seed=1)
    far = memory.as_strided((3, 32), (width, 1)).copy_(x)
    assert torch.equal(
        _generation_triton.norm(far, None, weight, 1e-3)[0], _generation_triton.norm(x, None, weight, 1e-3)[0]
    )
    assert torch.equal(_generation_triton.silu_mul(far, x), _generation_triton.silu_mul(x, x))
    arguments = tokens(1, 1, 16, torch.float16, count=3)
    places = (torch.tensor([2, 0, 1], device=DEVICE), torch.tensor([0, 1, 1], device=DEVICE))
    caches = [
        cache.as_strided((3, 1, 2, 16), (32, 32, 16, 1))
        for cache in torch.zeros(2, 3, 32, dtype=torch.float16, device=DEVICE)
    ]
    far = [memory.as_strided((3, 1, 2, 16), (width, 32, 16, 1), begin).zero_() for begin in (0, 32)]
    for written in (caches, far):
        _generation_triton.rotary_write(*arguments[:5], *written, *places, *arguments[9:])
    for have, want in zip(far, caches, strict=True):
        assert torch.equal(have, want)


@each_type
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 1024), (2, 2500), (2, 4096)])
def test_product_matches_the_oracle(rows, size, dtype):
    both = 4 * numbers(rows, 2 * size, dtype=dtype)
    gate, up = both.chunk(2, dim=1)
    close(_generation_triton.silu_mul(gate, up), reference.silu_mul(gate.double(), up.double()))


@pytest.mark.parametrize("turned", [False, True])
def test_operators_on_these_kernels_pass_torchs_checks(monkeypatch, turned):
    """Outputs share no memory and have the strides that tracing is told, whatever those of the inputs are."""
    monkeypatch.setattr(generation, "_on_gpu", lambda name, x: True)
    operators = torch.ops.searchr1_kernels
    rows, others = (numbers(8, 3, dtype=torch.float32, seed=seed) for seed in range(2))
    rows, others = (x.T if turned else x.T.contiguous() for x in (rows, others))
    weight = numbers(8, dtype=torch.float32, seed=2)
    heads = [numbers(n, 3, 4, dtype=torch.float32, seed=n).transpose(0, 1) for n in (2, 1, 1)]
    heads = heads if turned else [x.contiguous() for x in heads]
    caches = [torch.zeros(2, 1, 6, 4, device=DEVICE) for _ in range(2)]
    angles = numbers(3, 1, 4, dtype=torch.float32, seed=5)
    places = torch.tensor([[0, 1, 1], [5, 2, 3]], device=DEVICE)
    for operator, arguments in (
        (operators.rms_norm, (rows, weight, 1e-6)),
        (operators.add_rms_norm, (rows, others, weight, 1e-6)),
        (operators.silu_mul, (rows, others)),
        (operators.rotary_write, (*heads, angles.cos(), angles.sin(), *caches, *places, None, None, 1e-6)),
    ):
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("name", ["keys", "values"])
def test_a_cache_whose_components_lie_apart_is_named(monkeypatch, name):
    """The cache is written in place."""
    monkeypatch.setattr(generation, "_on_gpu", lambda name, x: True)
    arguments = list(tokens(2, 1, 8))
    place = 5 if name == "keys" else 6
    arguments[place] = arguments[place].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(
        ValueError, match=rf"{name}: expected components that lie together, got strides \(72, 72, 1, 9\)"
    ):
        generation.rotary_write(*arguments[:9])


def test_large_numbers_and_none():
    gate = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]], device=DEVICE)
    have = _generation_triton.silu_mul(gate, torch.ones_like(gate))
    torch.testing.assert_close(have, torch.nn.functional.silu(gate))
    nothing = torch.empty(0, 16, device=DEVICE)
    assert _generation_triton.silu_mul(nothing, nothing).shape == (0, 16)
    assert _generation_triton.norm(nothing, nothing, nothing.new_ones(16), 1e-6)[1].shape == (0, 16)
