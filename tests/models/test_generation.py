"""Fused generation against the modules: the same numbers and tokens, whether or not weights lie side by side."""

from __future__ import annotations

import numba
import pytest
import torch
from safetensors.torch import load_file
from searchr1_kernels import _panels_llvm as panel_products

from searchr1_fast.models import Decoder, DecoderConfig, KVCache, generation_panels, load_model, save_model
from searchr1_fast.models.projections import side_by_side
from searchr1_fast.rollout.sampling import head_logits


def build(model_type: str = "qwen3") -> Decoder:
    """-> a model with every parameter random: zero biases and unit norms would hide mistakes."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(50, 32, 48, 3, 4, 2, model_type=model_type, head_dim=12)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    return model


def appended(model: Decoder, fused: bool, counts=([4, 2, 7], [1, 1, 1], [6, 3, 20], [1, 3, 1]), decodes: int = 12):
    """Ragged appends to slots out of order, then greedy tokens -> hidden states, tokens, and the cache."""
    model.fused_generation = fused
    cache = KVCache(model.config, num_slots=4, max_length=64, dtype=model.head_weight.dtype)
    generator, slots, done = (
        torch.Generator().manual_seed(1),
        torch.tensor([3, 0, 2]),
        torch.zeros(3, dtype=torch.int64),
    )
    found, tokens = [], []
    for count in counts:
        token_ids = torch.randint(model.config.vocab_size, (sum(count),), generator=generator)
        hidden = model.forward_cached(token_ids, torch.tensor([0, *count]).cumsum(0), slots, done, cache)
        found.append(hidden)
        done = done + torch.tensor(count)
    for _ in range(decodes):
        tokens.append(head_logits(hidden, model.head_weight).argmax(-1))
        hidden = model.decode_cached(tokens[-1], slots, done, cache)
        found.append(hidden)
        done = done + 1
    return torch.stack(found), torch.stack(tokens), cache


@pytest.mark.parametrize("joined", [False, True])
def test_equals_the_modules(shape, joined, make_reference, tmp_path):
    make_reference(shape, seed=1).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    want = appended(model, fused=False)
    if joined:
        model.requires_grad_(False).join_projections()
    have = appended(model, fused=True)
    torch.testing.assert_close(have[0], want[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(have[1], want[1])
    for left, right in zip((*have[2].keys, *have[2].values), (*want[2].keys, *want[2].values), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_equals_the_modules_in_bf16(model_type):
    """The twins round where the modules round, so no bit differs."""
    model = build(model_type).bfloat16()
    have, want = appended(model, fused=True), appended(model, fused=False)
    assert torch.equal(have[0], want[0])
    assert torch.equal(have[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joined", [False, True])
def test_loops_on_memory_that_stays_give_the_bits_of_the_operators(dtype, joined, monkeypatch):
    model = build().to(dtype)
    if joined:
        model.join_projections()
    have = appended(model, fused=True)
    monkeypatch.setattr("searchr1_fast.models.generation.run_loops", lambda *_: None)
    want = appended(model, fused=True)
    assert torch.equal(have[0], want[0]) and torch.equal(have[1], want[1])


PANELS = pytest.mark.skipif(not panel_products.takes(is_bf16=True), reason="needs AVX-512 and AMX")


def decoded(model: Decoder, num_tokens: int, num_steps: int = 10):
    """Prompts that begin alike in pairs, then greedy tokens, slots out of order -> hidden states, tokens, keys."""
    cache = KVCache(model.config, num_tokens, 64, model.head_weight.dtype)
    cache.table[1::2, 0] = cache.table[: num_tokens - num_tokens % 2 : 2, 0]  # pairs share a block
    generator = torch.Generator().manual_seed(1)
    order, lengths = torch.randperm(num_tokens, generator=generator), torch.full((num_tokens,), 33)
    lengths += torch.arange(num_tokens) % 5
    rows = zip(lengths.tolist(), order.tolist(), strict=True)
    token_ids = torch.cat([torch.arange(length) * (slot // 2 + 1) % 50 for length, slot in rows])
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    hidden = model.forward_cached(token_ids, ends, order, torch.zeros_like(order), cache)
    found, tokens, kept = [], [], num_tokens - num_tokens // 7
    for step in range(num_steps):
        if step == num_steps // 2:  # some sequences end
            hidden, order, lengths = hidden[:kept], order[:kept], lengths[:kept]
        token_ids = head_logits(hidden, model.head_weight).argmax(-1)
        hidden = model.forward_cached(token_ids, torch.arange(len(order) + 1), order, lengths, cache)
        found.append(hidden[:kept])
        tokens.append(token_ids[:kept])
        lengths = lengths + 1
    return torch.stack(found), torch.stack(tokens), torch.cat([keys.flatten() for keys in (*cache.keys, *cache.values)])


@PANELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("num_tokens", [21, 69])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_panels_equal_the_loops(dtype, model_type, num_tokens, num_threads, monkeypatch):
    """In bf16 a sum in another order is rounded to the other side here and there."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(50, 64, 96, 3, 4, 2, model_type=model_type, head_dim=32)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    model.to(dtype).join_projections()
    calls, run_panels = [], generation_panels.run_panels
    monkeypatch.setattr(generation_panels, "run_panels", lambda *given: calls.append(1) or run_panels(*given))
    before = numba.get_num_threads()
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    try:
        have = decoded(model, num_tokens)
    finally:
        numba.set_num_threads(before)
    assert len(calls) == 10
    monkeypatch.setattr(generation_panels, "takes", lambda *_: False)
    want = decoded(model, num_tokens)
    if dtype == torch.float32:
        assert torch.equal(have[1], want[1])
        for left, right in zip(have, want, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    else:
        same = (have[1] == want[1]).all(0)  # [T]: the sequences that have the same tokens to the end
        assert same.float().mean() > 0.8
        torch.testing.assert_close(have[0][:, same], want[0][:, same], rtol=0.05, atol=0.1)


@PANELS
def test_panels_leave_the_tiles_of_others_alone():
    """torch's own bf16 products, before and after a step, use tiles of another shape."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(50, 64, 96, 1, 2, 1, head_dim=32)).requires_grad_(False).bfloat16()
    model.join_projections()
    x, weight = torch.randn(40, 96).bfloat16(), torch.randn(72, 96).bfloat16()
    want = x @ weight.T
    decoded(model, 16, num_steps=1)
    assert torch.equal(x @ weight.T, want)


def test_what_steps_keep_is_never_stale():
    """One cache is used while the model learns, and gets new memory, new biases and another model's layer."""
    model = build("qwen2")
    model.join_projections()
    cache, slot, ids = KVCache(model.config, 1, 64), torch.zeros(1, dtype=torch.int64), torch.arange(5)
    ends = torch.tensor([0, 5])

    def check() -> torch.Tensor:
        have, want = (
            model.forward_cached(ids, ends, slot, slot, memory) for memory in (cache, KVCache(model.config, 1, 64))
        )
        assert torch.equal(have, want)
        return have

    def learn() -> None:
        model.requires_grad_(True)
        model.hidden(ids, ends).square().sum().backward()
        torch.optim.AdamW(model.parameters(), lr=0.1).step()
        model.requires_grad_(False)

    def replace(name: str) -> None:
        parameter = model.get_parameter(name)
        parameter.data = 2 * parameter + 1

    before = check()
    for change in (
        learn,
        lambda: replace("model.layers.1.self_attn.k_proj.bias"),
        lambda: replace("model.layers.0.mlp.down_proj.weight"),
        lambda: replace("model.layers.2.input_layernorm.weight"),
        lambda: setattr(
            model.layers[0].self_attn, "o_proj", build("qwen2").double().float().layers[1].self_attn.o_proj
        ),
    ):
        change()
        after = check()
        assert not torch.allclose(after, before, atol=1e-3)
        before = after


def test_biases_apart_are_not_lost():
    """The weights lie side by side, but the biases have their own memory."""
    model = build("qwen2")
    want = appended(model, fused=False)
    model.join_projections()
    for block in model.layers:
        for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            layer.bias.data = layer.bias.data.clone()
    have = appended(model, fused=True)
    torch.testing.assert_close(have[0], want[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(have[1], want[1])


def test_it_is_taken_where_it_should_be(monkeypatch):
    calls = []
    monkeypatch.setattr("searchr1_fast.models.decoder.run_blocks", lambda model, x, *_: calls.append(1) or x)
    token_ids, cu_seqlens = torch.arange(5), torch.tensor([0, 5])
    for dtype, by_itself in ((torch.float32, True), (torch.bfloat16, True), (torch.float64, False)):
        model = build().to(dtype)
        cache, zero = KVCache(model.config, 1, 8, dtype), torch.zeros(1, dtype=torch.int64)
        for fused, expected in ((None, by_itself), (False, False), (True, True)):
            calls.clear()
            model.fused_generation = fused
            model.hidden(token_ids, cu_seqlens)  # a packed pass never does
            model.forward_cached(token_ids, cu_seqlens, zero, zero, cache)
            assert len(calls) == expected


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_joined_weights_are_the_same_parameters(model_type, tmp_path):
    model = build(model_type)
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    model.join_projections()
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
    attention = model.layers[0].self_attn
    weights = [layer.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert torch.equal(side_by_side(weights), torch.cat(weights))
    weights[1].copy_(torch.ones_like(weights[1]))  # as `sync_replica` writes
    assert torch.equal(side_by_side(weights), torch.cat(weights))
    save_model(model, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name], p) for name, p in model.named_parameters() if name in written)
    assert set(dict(load_model(tmp_path).named_parameters())) == set(before)


def test_what_is_not_side_by_side():
    memory = torch.zeros(6, 4)
    first, second, third = memory.split(2)
    assert side_by_side([first, second, third]).shape == (6, 4)
    assert side_by_side([second, third]).data_ptr() == second.data_ptr()
    assert side_by_side([first, third]) is None
    assert side_by_side([second, first]) is None
    assert side_by_side([first, torch.zeros(2, 4)]) is None
    assert side_by_side([memory[:, :2], second]) is None
    moved = build()
    moved.join_projections()
    moved.double()  # gives every parameter memory of its own
    mlp = moved.layers[0].mlp
    assert side_by_side([mlp.gate_proj.weight, mlp.up_proj.weight]) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_on_a_gpu_it_equals_the_modules(dtype, tolerance):
    model = build().to("cuda", dtype)
    model.join_projections()
    cache = [KVCache(model.config, 4, 64, dtype, "cuda") for _ in range(2)]
    slots = torch.tensor([3, 0, 2], device="cuda")
    done = torch.zeros(3, dtype=torch.int64, device="cuda")
    for count in ([4, 2, 7], [1, 1, 1], [6, 3, 20], [1, 1, 1]):
        token_ids = (torch.arange(sum(count)) % 50).cuda()
        found = []
        for fused, memory in zip((None, False), cache, strict=True):
            model.fused_generation = fused
            ends = torch.tensor([0, *count]).cumsum(0).cuda()
            found.append(model.forward_cached(token_ids, ends, slots, done, memory))
        torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)
        done = done + torch.tensor(count, device="cuda")
