"""Packed attention by a GPU's kernels against its plain twin: forward, gradients, and whether they repeat."""

from __future__ import annotations

import pytest
import torch

from searchr1_fast.models.attention_backends import PackedLayout, attend_sdpa, attend_varlen, choose_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Alone; another's entirely; one token after another's keys; long; more keys than queries, over several kernel tiles.
LENGTHS = [5, 0, 1, 300, 40, 129]
KEY_LENGTHS = [5, 4, 9, 300, 700, 130]


def problem(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[list[torch.Tensor], PackedLayout, torch.Tensor]:
    """-> query, key, value in bf16; the layout; the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    ends, key_ends = (torch.tensor([0, *ls]).cumsum(0).int().cuda() for ls in (LENGTHS, KEY_LENGTHS))
    shapes = [(sum(LENGTHS), num_heads), (sum(KEY_LENGTHS), num_kv_heads), (sum(KEY_LENGTHS), num_kv_heads)]
    inputs = [torch.randn(*shape, head_dim, generator=generator).bfloat16().cuda() for shape in shapes]
    weights = torch.randn(sum(LENGTHS), num_heads, head_dim, generator=generator).bfloat16().cuda()
    return inputs, PackedLayout(ends, key_ends, max(LENGTHS), max(KEY_LENGTHS)), weights


def results(attend, inputs, layout, weights, dtype=torch.bfloat16) -> list[torch.Tensor]:
    """-> the output, and the gradients of query, key and value."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    output = attend(*inputs, layout)
    return [output.detach(), *torch.autograd.grad(output, inputs, weights.to(dtype))]


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_varlen_is_as_near_to_fp32_as_the_twin_in_bf16(num_heads, num_kv_heads, head_dim):
    arguments = problem(num_heads, num_kv_heads, head_dim)
    exact = results(attend_sdpa, *arguments, dtype=torch.float32)
    ours, twin = results(attend_varlen(), *arguments), results(attend_sdpa, *arguments)
    for name, one, other, want in zip(("output", "query", "key", "value"), ours, twin, exact, strict=True):
        assert one.isfinite().all(), name
        error, allowed = (float((x.float() - want).norm()) for x in (one, other))
        assert error <= 2 * allowed + 1e-3 * float(want.norm()), f"{name}: {error}, the twin {allowed}"


def test_varlen_is_what_bf16_gets_without_flash_attn():
    chosen = choose_attention(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, 64)
    assert chosen.name in ("varlen", "flash-attn")
    arguments = problem(4, 2, 64)
    exact = results(attend_sdpa, *arguments, dtype=torch.float32)
    for one, want in zip(results(chosen.attend, *arguments), exact, strict=True):
        assert float((one.float() - want).norm()) <= 0.01 * float(want.norm())


def test_a_sequence_alone_is_the_sequence_in_a_pack():
    """Bit for bit: a token's result does not depend on what it is packed with."""
    (query, key, value), layout, _ = problem(4, 2, 64)
    together = attend_varlen()(query, key, value, layout)
    places, key_places = layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist()
    for place in (0, 3, 5):
        rows, keys = slice(*places[place : place + 2]), slice(*key_places[place : place + 2])
        lengths = LENGTHS[place], KEY_LENGTHS[place]
        ends = [torch.tensor([0, length], dtype=torch.int32, device="cuda") for length in lengths]
        alone = attend_varlen()(query[rows], key[keys], value[keys], PackedLayout(*ends, *lengths))
        assert torch.equal(alone, together[rows])


def test_gradients_repeat_where_torch_is_asked_for_it():
    arguments = problem(4, 2, 64)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (results(attend_varlen(), *arguments) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
