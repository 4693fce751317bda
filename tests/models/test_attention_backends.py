"""Which back-end is chosen and why; and that kernels are called as they require, on machines without a GPU too.

The kernels' stand-ins have the signatures of the real functions (torch 2.11, torch 2.12 and later, flash-attn 2.8) and
compute in plain torch what those document. On the meta device torch's own function runs.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types

import pytest
import torch

from searchr1_fast.models import Decoder, DecoderConfig, attention_backends, describe_attention
from searchr1_fast.models.attention_backends import PackedLayout, attend_sdpa, choose_attention
from searchr1_fast.packing import pack
from searchr1_fast.policy import padding_batch
from searchr1_fast.types import SharedPrefixes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
    """Causal attention of packed sequences, with the mask aligned at the end; refuses what the kernels refuse."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert type(max_q) is type(max_k) is int
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    assert query.shape[1] == key.shape[1] == value.shape[1]
    output = torch.zeros_like(query)
    ends = zip(
        cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), cu_seq_k[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True
    )
    for q_begin, q_end, k_begin, k_end in ends:
        queries, keys = q_end - q_begin, k_end - k_begin
        scores = torch.einsum("qhd,khd->hqk", query[q_begin:q_end], key[k_begin:k_end]) / query.shape[2] ** 0.5
        visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        output[q_begin:q_end] = torch.einsum("hqk,khd->qhd", weights, value[k_begin:k_end])
    return output


def repeat(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert causal
    assert deterministic
    assert window_size == (-1, -1)
    k, v = repeat(k, q.shape[1]), repeat(v, q.shape[1])
    return documented(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size == (-1, 0)
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def varlen_attn_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert window_size == (-1, 0)
    if enable_gqa:
        key, value = repeat(key, query.shape[1]), repeat(value, query.shape[1])
    return documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


@pytest.fixture(params=["flash-attn", "varlen 2.11", "varlen 2.12"])
def kernel(request, monkeypatch):
    """-> the back-end, running on a stand-in."""
    if request.param == "flash-attn":
        package = types.ModuleType("flash_attn")
        package.flash_attn_varlen_func = flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        return attention_backends.attend_flash()
    stand_in = varlen_attn_2_11 if request.param == "varlen 2.11" else varlen_attn_2_12
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    return attention_backends.attend_varlen()


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_kernels_are_called_so_that_they_compute_what_the_twin_does(kernel, num_heads, num_kv_heads):
    """Sequences whose beginnings lie in others, one that lies in another entirely, and one alone; gradients too."""
    torch.manual_seed(0)
    lengths, key_lengths = [5, 0, 1, 30, 7], [5, 4, 9, 30, 20]
    ends, key_ends = (torch.tensor([0, *ls]).cumsum(0).int() for ls in (lengths, key_lengths))
    layout = PackedLayout(ends, key_ends, max(lengths), max(key_lengths))
    inputs = [
        torch.randn(total, heads, 8, requires_grad=True)
        for total, heads in ((43, num_heads), (68, num_kv_heads), (68, num_kv_heads))
    ]
    weights = torch.randn(43, num_heads, 8)
    got, expected = kernel(*inputs, layout), attend_sdpa(*inputs, layout)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad((output * weights).sum(), inputs) for output in (got, expected)]
    for name, one, other in zip(("query", "key", "value"), *gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_the_decoder_gives_kernels_what_they_need(kernel, monkeypatch, make_trajectory):
    """In a training batch whose sequences share beginnings, a kernel gives the same hidden states as the twin."""
    torch.manual_seed(1)
    model = Decoder(DecoderConfig(300, 32, 48, 2, 4, 2, model_type="qwen3"))
    trajectories = [make_trajectory(seed, [(False, 6), (True, 3 + seed), (False, 5)]) for seed in range(4)]
    for trajectory in trajectories[1:]:
        trajectory.token_ids[:8] = trajectories[0].token_ids[:8]
    trajectories.append(trajectories[0])
    (batch,) = pack(trajectories, [1.0] * 5, 1000)
    assert batch.prefixes is not None
    batch.token_ids %= 300
    arguments = (batch.token_ids, batch.cu_seqlens, batch.scored_rows, batch.prefixes)
    expected = model.hidden(*arguments)
    assert torch.equal(model.scored_hidden(batch), expected)  # with given positions, which are counted here
    chosen = attention_backends.AttentionBackend("kernel", "for the test", kernel)
    monkeypatch.setattr("searchr1_fast.models.decoder.choose_attention", lambda *_: chosen)
    for max_seqlen in (batch.max_seqlen, None):
        torch.testing.assert_close(model.hidden(*arguments, max_seqlen), expected, rtol=1e-4, atol=1e-5)
    empty = padding_batch()
    assert model.scored_hidden(empty).shape == (0, 32)


def test_torchs_own_function_takes_the_call_on_the_meta_device(monkeypatch):
    """In the installed release: shapes, types and the registered backward; the layers run in bf16, as on a GPU."""
    with torch.device("meta"):
        model = Decoder(DecoderConfig(100, 64, 96, 2, 4, 2, model_type="qwen3", head_dim=32)).bfloat16()
        token_ids = torch.zeros(20, dtype=torch.int64)
        cu_seqlens, cu_seqlens_k = (torch.zeros(4, dtype=torch.int32) for _ in range(2))
        index = torch.zeros(31, dtype=torch.int64)
    chosen = attention_backends.AttentionBackend("varlen", "for the test", attention_backends.attend_varlen())
    monkeypatch.setattr("searchr1_fast.models.decoder.choose_attention", lambda *_: chosen)
    monkeypatch.setattr(torch.Tensor, "item", no_host_reads)
    monkeypatch.setattr(torch.Tensor, "tolist", no_host_reads)
    rows = torch.zeros(6, dtype=torch.int64, device="meta")
    hidden = model.hidden(token_ids, cu_seqlens, rows, SharedPrefixes(index, cu_seqlens_k, 25, rows, rows), 20)
    assert (hidden.shape, hidden.dtype) == ((6, 64), torch.bfloat16)
    hidden.sum().backward()
    assert all(p.grad.shape == p.shape for name, p in model.named_parameters() if name != "lm_head.weight")


def no_host_reads(self, *_):
    raise AssertionError("a forward pass with kernels reads the device")


@pytest.fixture
def machine(monkeypatch):
    """flash-attn's version, compute capability -> a machine with such a GPU, as far as the choice depends on it."""

    def make(flash_attn: str | None, capability: tuple[int, int] = (9, 0)) -> None:
        choose_attention.cache_clear()
        package = types.ModuleType("flash_attn")
        package.flash_attn_varlen_func = flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, "flash_attn", package if flash_attn else None)
        monkeypatch.setattr(importlib.metadata, "version", version_of(flash_attn))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield make
    choose_attention.cache_clear()


def version_of(flash_attn: str | None):
    def version(name: str) -> str:
        assert name == "flash-attn"
        if flash_attn is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return flash_attn

    return version


@pytest.mark.parametrize(
    ("flash_attn", "said"),
    [
        ("2.8.3", "flash-attn (version 2.8.3 is installed)"),
        ("2.7.4.post1", "flash-attn (version 2.7.4.post1 is installed)"),
        ("2.4.1", "varlen (flash-attn 2.4.1 is older than 2.5)"),
        (None, "varlen (flash-attn is not installed; it is taken where it is)"),
    ],
)
def test_the_choice_is_made_by_what_is_there_and_said(machine, flash_attn, said):
    machine(flash_attn)
    assert describe_attention(CUDA, torch.bfloat16, 128) == f"attention: {said}"
    assert choose_attention(CUDA, torch.bfloat16, 128) is choose_attention(CUDA, torch.bfloat16, 128)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "reason"),
    [
        (CPU, torch.float32, 64, (9, 0), "on the CPU"),
        (CPU, torch.bfloat16, 64, (9, 0), "on the CPU"),
        (CUDA, torch.float32, 64, (9, 0), "kernels take 16-bit types, this model computes in float32"),
        (CUDA, torch.bfloat16, 20, (9, 0), "kernels take heads of a multiple of 8 up to 256, this model's have 20"),
        (CUDA, torch.bfloat16, 320, (9, 0), "kernels take heads of a multiple of 8 up to 256, this model's have 320"),
        (CUDA, torch.bfloat16, 64, (7, 5), "kernels need compute capability 8.0, this GPU has 7.5"),
    ],
)
def test_the_twin_is_taken_where_kernels_cannot(machine, device, dtype, head_dim, capability, reason):
    machine("2.8.3", capability)
    assert describe_attention(device, dtype, head_dim) == f"attention: sdpa ({reason})"
    assert choose_attention(device, dtype, head_dim).attend is attend_sdpa
