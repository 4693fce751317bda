"""A row's result has the same bits alone and in any batch, at any place in it, and in any memory layout.

This is for the operations whose rows are a few numbers each. The head, the scan, groups, sampling and search have tests
of their own.
"""

from __future__ import annotations

import pytest
import torch
from searchr1_kernels import cached_attention, masked_kl, masked_whiten, rms_norm, rotary_write, silu_mul

NUM_ROWS = 301  # no multiple of a vector, and enough for two threads
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MOMENTS = torch.tensor([50.0, 10.0, 70.0], dtype=torch.float64)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(kind):
    def run(logprobs, reference):
        leaf = logprobs.detach().requires_grad_()
        estimate = masked_kl(leaf, reference, kind)
        return estimate.detach(), *torch.autograd.grad(estimate.sum(), leaf)

    return run, ((), ())


def norm(x, residual):
    weight = numbers(x.shape[1], seed=9).to(x.dtype)
    return rms_norm(x, weight, 1e-6)[0], *rms_norm(x, weight, 1e-6, residual)


def rotation(has_norm):
    def run(query, key, value, angles):
        """Each token has a slot of its own."""
        caches = [query.new_zeros(len(query), key.shape[1], 2, query.shape[2]) for _ in range(2)]
        angles = angles.to(torch.promote_types(query.dtype, torch.float32))
        slots, places = torch.arange(len(query)), torch.ones(len(query), dtype=torch.int64)
        weight = numbers(query.shape[2], seed=9).to(query.dtype)
        norms = {"query_norm": weight, "key_norm": 2 * weight} if has_norm else {}
        tensors = (query, key, value, angles.cos(), angles.sin(), *caches)
        return rotary_write(*tensors, slots, places, **norms), *caches

    return run, ((4, 20), (2, 20), (2, 20), (1, 20))


def attention(paged):
    def run(query, keys, values, place):
        """Each token has a slot of its own, of 32 places, which are two blocks."""
        slots, positions = torch.arange(len(query)), (place.double() * 1e4).long().abs() % 32
        if not paged:
            return (cached_attention(query, keys, values, slots, positions),)
        blocks = [x.unflatten(2, (2, 16)).transpose(1, 2).flatten(0, 1).contiguous() for x in (keys, values)]
        table = torch.arange(2 * len(query), dtype=torch.int32).view(-1, 2)
        return (cached_attention(query, *blocks, slots, positions, table=table),)

    return run, ((4, 64), (2, 32, 64), (2, 32, 64), ())


# The function, and the shapes of its inputs per row.
OPERATIONS = {
    "masked_kl, k1": kl("k1"),
    "masked_kl, k2": kl("k2"),
    "masked_kl, k3": kl("k3"),
    "masked_whiten": (lambda x: (masked_whiten(x, moments=MOMENTS),), ((),)),
    "rms_norm": (norm, ((33,), (33,))),
    "silu_mul": (lambda gate, up: (silu_mul(gate, up),), ((33,), (33,))),
    "rotary_write": rotation(has_norm=False),
    "rotary_write, norms": rotation(has_norm=True),
    "cached_attention": attention(paged=False),
    "cached_attention, paged": attention(paged=True),
}


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=OPERATIONS)
def operation(request):
    return OPERATIONS[request.param]


def check_equal(have, want):
    for left, right in zip(have, want, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_bits_that_it_has_alone(operation, dtype):
    run, shapes = operation
    count = NUM_ROWS if len(shapes) < 4 else 20
    rows = [3 * numbers(count, *shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    together = run(*rows)
    alone = [slice(i, i + 1) for i in range(0, count, 1 + count // 60)]
    for part in (*alone, slice(count - 1, count), slice(5, 8), slice(3, count)):
        check_equal(run(*(tensor[part].clone() for tensor in rows)), [output[part] for output in together])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    check_equal(run(*(tensor[order] for tensor in rows)), [output[order] for output in together])
    check_equal(run(*rows), together)


@pytest.mark.parametrize("dtype", DTYPES)
def test_how_numbers_lie_changes_no_bit(operation, dtype):
    """Every other number in memory, rows that begin at any address, and transposed rows."""
    run, shapes = operation
    rows = [3 * numbers(20, *shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    want = run(*rows)
    check_equal(run(*(torch.stack([tensor, -tensor], dim=-1)[..., 0] for tensor in rows)), want)
    check_equal(run(*(torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in rows)), want)
    check_equal(run(*(tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in rows)), want)
