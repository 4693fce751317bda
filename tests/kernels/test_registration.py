"""Operators in torch's registry pass torch's own checks, compile into one graph, and give the same bits twice.

Compiled, they give the same results.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import searchr1_kernels
import torch
from searchr1_kernels import (
    TopKIndex,
    cached_attention,
    gae,
    group_advantages,
    masked_kl,
    masked_moments,
    masked_whiten,
    rms_norm,
    rotary_write,
    sample_tokens,
    silu_mul,
    topk_inner_product,
)

OPERATORS = torch.ops.searchr1_kernels


def numbers(*shape, seed=0, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


CU_SEQLENS = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
MASK = torch.tensor([True, False] * 5)
GROUPS = torch.tensor([4, 4, 1, 1, 1, 4, -2, 7, 7, 7])
CORPUS = numbers(100, 6)
INDEX = TopKIndex(numbers(100, 5))

CACHE = numbers(2, 1, 6, 5, seed=2), numbers(2, 1, 6, 5, seed=3)
PLACES = torch.tensor([0, 1]), torch.tensor([5, 2])

TOKENS = numbers(2, 2, 4), numbers(2, 1, 4, seed=1), numbers(2, 1, 4, seed=2), *numbers(2, 2, 1, 4, seed=3)
UNIFORMS = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
ROWS = numbers(3, 8), numbers(3, 8, seed=1), numbers(8, seed=2)


# The cache's two slots, each in three blocks of two places, and each of the two tokens in a tile of its own.
PAGES = tuple(cache.unflatten(2, (3, 2)).transpose(1, 2).flatten(0, 1).contiguous() for cache in CACHE)
TABLE = torch.arange(6, dtype=torch.int32).view(2, 3)
TILES = torch.tensor([[0, 1], [1, 1]], dtype=torch.int32)
WHOLE_ROWS = (CORPUS * 40).round().clamp(-127, 127).to(torch.int8)


def written():
    return [torch.zeros(2, 1, 6, 4) for _ in range(2)]


CHECKED = {
    "cached_attention": (numbers(2, 1, 5), *CACHE, *PLACES, None, None, 0),
    "rms_norm": (ROWS[0], ROWS[2], 1e-6),
    "add_rms_norm": (*ROWS, 1e-6),
    "rotary_write": (*TOKENS, *written(), *PLACES, None, None, 1e-6),
    "silu_mul": ROWS[:2],
    "sample_tokens": (numbers(3, 50), UNIFORMS, 0.7, 9, 0.8),
    "gae": (numbers(10), numbers(10, seed=1), CU_SEQLENS, 0.9, 0.8, MASK),
    "masked_kl": (numbers(10, grad=True), numbers(10, seed=1), "k3", MASK),
    "group_advantages": (numbers(10), GROUPS, True, 1e-6),
    "masked_moments": (numbers(10), MASK),
    "masked_whiten": (numbers(10), None, None, 1e-8),
    "topk_inner_product": (numbers(4, 6), CORPUS, 3, None, TopKIndex(CORPUS).parts),
}

CALLED = {
    "cached_attention": lambda x: cached_attention(x.view(2, 1, 5), *CACHE, *PLACES),
    "cached_attention, paged": lambda x: cached_attention(
        x.view(2, 1, 5), *PAGES, *PLACES, table=TABLE, tiles=TILES, num_alone=2
    ),
    "rms_norm": lambda x: rms_norm(x.view(2, 5), x[:5], 1e-6),
    "rms_norm, of a sum": lambda x: rms_norm(x.view(2, 5), x[:5], 1e-6, x.view(2, 5)),
    "rotary_write, norms": lambda x: rotary_write(
        x[:8].view(2, 1, 4), *TOKENS[1:], *written(), *PLACES, query_norm=x[:4], key_norm=x[4:8]
    ),
    "rotary_write": lambda x: rotary_write(x[:8].view(2, 1, 4), *TOKENS[1:], *written(), *PLACES),
    "silu_mul": lambda x: silu_mul(x.view(2, 5), x.view(2, 5)),
    "sample_tokens": lambda x: sample_tokens(x.view(2, 5), UNIFORMS[:2], temperature=0.7, top_k=3, top_p=0.8),
    "gae": lambda x: gae(x, x.cos(), CU_SEQLENS, gamma=0.9, lam=0.8, mask=MASK),
    "gae, no mask": lambda x: gae(x, x.cos(), CU_SEQLENS.long()),
    "masked_kl": lambda x: masked_kl(x, x.detach().cos(), "k3", MASK),
    "masked_kl, k1": lambda x: masked_kl(x, x.detach().cos(), "k1"),
    "masked_kl, k2": lambda x: masked_kl(x, x.detach().cos(), "k2"),
    "group_advantages": lambda x: group_advantages(x, GROUPS),
    "masked_moments": lambda x: masked_moments(x, MASK),
    "masked_whiten": lambda x: masked_whiten(x, MASK),
    "masked_whiten, by moments": lambda x: masked_whiten(x, moments=masked_moments(x, MASK)),
    "topk_inner_product": lambda x: topk_inner_product(x.view(2, 5), CORPUS[:, :5].contiguous(), 4),
    "topk_inner_product, int8": lambda x: topk_inner_product(x[:6].view(1, 6), WHOLE_ROWS, 4, scales=CORPUS[:, 0]),
    "topk_inner_product, prepared": lambda x: topk_inner_product(x.view(2, 5), INDEX, 4),
}


# With what is left out above, without what is given there, and with no rows.
ALSO_CHECKED = [
    ("cached_attention", (numbers(2, 1, 5), *PAGES, *PLACES, TABLE, TILES, 2)),
    ("cached_attention", (numbers(0, 1, 5), *CACHE, PLACES[0][:0], PLACES[1][:0], None, None, 0)),
    ("rms_norm", (ROWS[0][:0], ROWS[2], 1e-6)),
    ("add_rms_norm", (ROWS[0].bfloat16(), ROWS[1].bfloat16(), ROWS[2].bfloat16(), 1e-6)),
    ("rotary_write", (*TOKENS, *written(), *PLACES, ROWS[2][:4], ROWS[2][4:], 1e-6)),
    ("silu_mul", (ROWS[0][:0], ROWS[1][:0])),
    ("sample_tokens", (numbers(3, 50), UNIFORMS.float(), 0.0, 0, 1.0)),
    ("sample_tokens", (numbers(0, 50), UNIFORMS[:0], 1.0, 9, 0.5)),
    ("gae", (numbers(10), numbers(10, seed=1), CU_SEQLENS.long(), 1.0, 1.0, None)),
    ("masked_kl", (numbers(10, grad=True), numbers(10, seed=1), "k1", None)),
    ("masked_kl", (numbers(10, grad=True), numbers(10, seed=1), "k2", MASK)),
    ("masked_kl", (numbers(0, grad=True), numbers(0), "k3", None)),
    ("group_advantages", (numbers(10), GROUPS.int(), False, 1e-6)),
    ("group_advantages", (numbers(0), GROUPS[:0], True, 1e-6)),
    ("masked_moments", (numbers(0), None)),
    ("masked_whiten", (numbers(10), MASK, torch.tensor([9.0, 1.0, 3.0]), 1e-8)),
    ("topk_inner_product", (numbers(4, 6), CORPUS, 3, None, [])),
    ("topk_inner_product", (numbers(0, 6), CORPUS, 3, None, [])),
    ("topk_inner_product", (numbers(4, 6), WHOLE_ROWS, 3, CORPUS[:, 0].contiguous(), [])),
]


@pytest.mark.parametrize("name", CHECKED)
def test_passes_the_checks_of_torch(name):
    torch.library.opcheck(getattr(OPERATORS, name).default, CHECKED[name])


@pytest.mark.parametrize("place", range(len(ALSO_CHECKED)), ids=[name for name, _ in ALSO_CHECKED])
def test_passes_the_checks_of_torch_in_other_forms(place):
    name, arguments = ALSO_CHECKED[place]
    torch.library.opcheck(getattr(OPERATORS, name).default, arguments)


def test_every_operator_is_checked():
    """Here or, for the head's, in `test_linear_registration`."""
    for path in Path(searchr1_kernels.__file__).parent.glob("[!_]*.py"):
        importlib.import_module(f"searchr1_kernels.{path.stem}")
    schemas = {schema.name for schema in torch._C._jit_get_all_schemas()}
    known = {name.removeprefix("searchr1_kernels::") for name in schemas if name.startswith("searchr1_kernels::")}
    head = {"linear_logprob", "linear_logprob_backward", "linear_policy_loss", "policy_objective"}
    assert known == {*CHECKED, *head}
    text = Path(__file__).with_name("test_linear_registration.py").read_text(encoding="utf-8")
    assert all(f"opcheck(OPERATORS.{name}.default" in text for name in head)


@pytest.mark.parametrize("rows", [10, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gae_passes_the_checks_of_torch_for_other_types(dtype, rows):
    values = numbers(rows).to(dtype).requires_grad_()  # constants to `gae`
    arguments = (numbers(rows), values.detach(), torch.tensor([0, rows // 2, rows]), 1.0, 1.0, None)
    torch.library.opcheck(OPERATORS.gae.default, arguments)
    assert not any(output.requires_grad for output in gae(numbers(rows), values, arguments[2]))


TURNED = numbers(8, 3).T, numbers(8, 3, seed=1).T
TURNED_HEADS = tuple(tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in TOKENS[:3])
STRIDED = {
    "rms_norm": (TURNED[0], ROWS[2], 1e-6),
    "add_rms_norm": (*TURNED, ROWS[2], 1e-6),
    "rotary_write": (*TURNED_HEADS, *TOKENS[3:], *written(), *PLACES, None, None, 1e-6),
    "silu_mul": TURNED,
    "sample_tokens": (TURNED[0], UNIFORMS, 1.0, 0, 1.0),
}


@pytest.mark.parametrize("name", STRIDED)
def test_strides_are_those_that_tracing_is_told(name):
    torch.library.opcheck(getattr(OPERATORS, name).default, STRIDED[name])


@pytest.mark.parametrize("name", CALLED)
def test_compiles_into_one_graph(name):
    """The numbers may differ in the last bit where torch fuses, so the backend that only traces is used."""
    x = numbers(10, grad=True)
    compiled = torch.compile(CALLED[name], fullgraph=True, backend="aot_eager")
    have, want = compiled(x), CALLED[name](x)
    for left, right in zip(as_tuple(have), as_tuple(want), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
        assert left.requires_grad == right.requires_grad


def test_a_compiled_loss_has_the_same_gradient():
    gradients = []
    for function in (CALLED["masked_kl"], torch.compile(CALLED["masked_kl"], fullgraph=True, backend="aot_eager")):
        x = numbers(10, grad=True)
        (function(x) * numbers(10, seed=2)).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert gradients[0].count_nonzero() == MASK.sum()


@pytest.mark.parametrize("name", CALLED)
def test_the_same_bits_twice(name):
    x = numbers(10)
    for left, right in zip(as_tuple(CALLED[name](x)), as_tuple(CALLED[name](x)), strict=True):
        assert torch.equal(left, right)


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def on_gpu(value):
    """Copy tensors to the GPU, each time anew: an operator may write to them."""
    if isinstance(value, torch.Tensor):
        return value.detach().cuda().requires_grad_(value.requires_grad)
    return tuple(on_gpu(one) for one in value) if isinstance(value, tuple) else value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CHECKED)
def test_the_same_on_a_gpu(name):
    """Torch's checks pass, and the bits are the same twice."""
    operator, arguments = getattr(OPERATORS, name).default, CHECKED[name]
    if name == "topk_inner_product":
        arguments = (*arguments[:-1], TopKIndex(CORPUS.cuda()).parts)
    torch.library.opcheck(operator, on_gpu(arguments))
    for left, right in zip(*(as_tuple(operator(*on_gpu(arguments))) for _ in range(2)), strict=True):
        assert left.is_cuda and torch.equal(left, right)
