"""The decoder against transformers: logits and gradients; packed against cached; the round trip through a directory."""

import json

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from searchr1_fast.models import Decoder, DecoderConfig, KVCache, attention, load_model, save_model
from searchr1_fast.models.attention import cached_attention, cached_attention_reference, find_chunks

SHAPES = {
    "grouped-tied": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "multi-head-untied": dict(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False),
    "multi-query": dict(num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=False, rope_theta=1e6),
    "odd-sizes": dict(
        num_attention_heads=3, num_key_value_heads=3, hidden_size=36, intermediate_size=52, vocab_size=97
    ),
}


def make_reference(seed: int = 0, **changes) -> Qwen2ForCausalLM:
    """A transformers model whose every parameter is random: zero biases and unit norms would hide mistakes."""
    torch.manual_seed(seed)
    fields = dict(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
    fields = fields | dict(num_key_value_heads=2) | changes
    model = Qwen2ForCausalLM(Qwen2Config(max_position_embeddings=256, attn_implementation="eager", **fields)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15).add_(1.0 if "norm" in name else 0.0)
    return model


def pack(lengths, vocab_size):
    """Random ids of sequences end to end -> (token_ids [T], cu_seqlens [S+1])."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randint(vocab_size, (int(cu_seqlens[-1]),)), cu_seqlens


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(shape, tmp_path):
    reference = make_reference(**SHAPES[shape])
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    token_ids, cu_seqlens = pack([5, 1, 17], reference.config.vocab_size)
    logits = model.logits(token_ids, cu_seqlens)
    expected = torch.cat([reference(part[None]).logits[0] for part in token_ids.split(cu_seqlens.diff().tolist())])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)

    weights = torch.randn_like(expected)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        scale = gradients[name].grad.abs().max()
        error = (parameter.grad - gradients[name].grad).abs().max()
        assert error <= 1e-4 * scale + 1e-7, f"{name}: gradient off by {error} of {scale}"


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_forward_equals_packed_forward(shape):
    """Ragged appends, several tokens or one, in slots out of order, equal one packed pass."""
    torch.manual_seed(1)
    fields = dict(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=2) | SHAPES[shape]
    config = DecoderConfig(**fields)
    model = Decoder(config)
    cache = KVCache(config, num_slots=4, max_length=64)
    token_ids, cu_seqlens = pack([20, 9, 33], config.vocab_size)
    sequences = token_ids.split(cu_seqlens.diff().tolist())
    packed = model.hidden(token_ids, cu_seqlens).detach().split(cu_seqlens.diff().tolist())
    slots = torch.tensor([3, 0, 2])
    done = [0, 0, 0]
    for counts in ([4, 2, 7], [1, 1, 1], [6, 3, 20], [1, 3, 1]):
        new = torch.cat([s[d : d + n] for s, d, n in zip(sequences, done, counts, strict=True)])
        cu_new = torch.tensor([0, *counts]).cumsum(0)
        last = model.forward_cached(new, cu_new, slots, torch.tensor(done), cache)
        done = [d + n for d, n in zip(done, counts, strict=True)]
        expected = torch.stack([hidden[d - 1] for hidden, d in zip(packed, done, strict=True)])
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


def test_cached_attention_equals_its_plain_twin():
    torch.manual_seed(2)
    for num_heads, num_kv_heads, length in ((4, 2, 37), (6, 6, 1), (8, 1, 130)):
        keys, values = (torch.randn(5, num_kv_heads, length, 16) for _ in range(2))
        query = torch.randn(11, num_heads, 16) * 3
        slots, positions = torch.randint(5, (11,)), torch.randint(length, (11,))
        got = cached_attention(query, keys, values, slots, positions)
        expected = cached_attention_reference(query, keys, values, slots, positions)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2)])
def test_tokens_that_join_together_attend_as_they_would_alone(num_heads, num_kv_heads):
    """A step as the engine has them: sequences that decode among prompts from place 0 on and observations."""
    torch.manual_seed(5)
    runs = [(2, 40, 1), (0, 0, 100), (4, 17, 1), (1, 50, 90), (3, 130, 3), (5, 8, 30), (6, 132, 8)]
    slots = torch.cat([torch.full((count,), slot) for slot, _, count in runs])  # runs: slot, first place, count
    positions = torch.cat([torch.arange(first, first + count) for _, first, count in runs])
    keys, values = (torch.randn(7, num_kv_heads, 140, 16) for _ in range(2))
    query = torch.randn(len(slots), num_heads, 16) * 3
    chunks = find_chunks(slots, positions)
    found = [(chunk.slot, chunk.end - chunk.begin, chunk.length) for chunk in chunks.together]
    assert found == [(0, 100, 100), (1, 90, 140)]
    expected = cached_attention_reference(query, keys, values, slots, positions)
    for given in (chunks, None):
        got = cached_attention(query, keys, values, slots, positions, given)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_neighbours_of_another_slot_or_place_are_no_chunk(monkeypatch):
    monkeypatch.setattr(attention, "_MIN_CHUNK_PAIRS", 1)
    slots = torch.tensor([0] * 5 + [1] * 5 + [1] * 4 + [2] * 3)
    positions = torch.tensor([*range(5), *range(5, 10), *range(11, 15), *range(3)])
    chunks = find_chunks(slots, positions)
    assert [chunk[:4] for chunk in chunks.together] == [(0, 5, 0, 5), (5, 10, 1, 10), (10, 14, 1, 15)]
    assert chunks.alone.tolist() == [14, 15, 16]


def test_wanted_rows_equal_those_rows_of_all():
    torch.manual_seed(6)
    model = Decoder(DecoderConfig(50, 32, 48, 2, 4, 2))
    token_ids, cu_seqlens = pack([9, 4, 12], 50)
    rows = torch.tensor([0, 8, 9, 20, 24])
    gradients = []
    for hidden in (model.hidden(token_ids, cu_seqlens)[rows], model.hidden(token_ids, cu_seqlens, rows)):
        gradients.append((hidden, torch.autograd.grad(hidden.square().sum(), list(model.model.parameters()))))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    for name, whole, part in zip(dict(model.model.named_parameters()), gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(whole, part, rtol=1e-4, atol=1e-6, msg=name)


def test_sequences_of_a_pack_do_not_see_each_other():
    torch.manual_seed(3)
    model = Decoder(DecoderConfig(50, 32, 48, 2, 4, 2))
    first, second, other = torch.randint(50, (3, 9))
    cu_seqlens = torch.tensor([0, 9, 18])
    together = model.hidden(torch.cat([first, second]), cu_seqlens)
    changed = model.hidden(torch.cat([other, second]), cu_seqlens)
    assert torch.equal(together[9:], changed[9:])
    assert not torch.allclose(together[:9], changed[:9])


def test_bf16_forward_is_close_to_fp32():
    torch.manual_seed(4)
    model = Decoder(DecoderConfig(50, 64, 96, 2, 4, 2))
    token_ids, cu_seqlens = pack([12, 30], 50)
    exact = model.hidden(token_ids, cu_seqlens)
    model.bfloat16()
    rounded = model.hidden(token_ids, cu_seqlens)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_saved_directory_reads_back_with_transformers(tied, tmp_path):
    torch.manual_seed(5)
    model = Decoder(DecoderConfig(60, 32, 48, 2, 4, 2, rope_theta=5e5, tie_word_embeddings=tied))
    save_model(model, tmp_path)
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path)
    token_ids, cu_seqlens = pack([14], 60)
    torch.testing.assert_close(
        model.logits(token_ids, cu_seqlens), theirs(token_ids[None]).logits[0], rtol=1e-5, atol=1e-5
    )
    again = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_sharded_weights_load(tmp_path):
    reference = make_reference()
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = load_model(tmp_path)
    token_ids, cu_seqlens = pack([7], 211)
    torch.testing.assert_close(
        model.logits(token_ids, cu_seqlens), reference(token_ids[None]).logits[0], rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "runs 'qwen2'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type"),
        ({"hidden_size": 50}, "not a multiple"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"num_hidden_layers": 4}, "lacks"),
        ({"num_hidden_layers": 1}, "does not have"),
        ({"intermediate_size": 64}, r"config.json says"),
    ],
)
def test_unusable_directories_are_named(change, message, tmp_path):
    make_reference().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_missing_directories_and_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="builtin:base"):
        load_model("builtin:large")
    make_reference().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        load_model(tmp_path)
