"""Adapters against the merged formula: values, gradients, fused generation, files, and peft where it is installed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from searchr1_fast.models import (
    Decoder,
    DecoderConfig,
    KVCache,
    load_model,
    load_weights,
    resolve,
    save_adapter,
    save_model,
)
from searchr1_fast.models.lora import (
    adapted_layers,
    adapter_parameters,
    add_adapter,
    base_parameters,
    fingerprint,
    joined_adapters,
    reset_adapter,
    without_adapter,
)
from searchr1_fast.rollout.sampling import head_logits
from searchr1_fast.rollout.weight_handover import HandedWeights, named_weights

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ALL = (*ATTENTION, *MLP)
SOME = (ALL, ("q_proj", "v_proj"), ("v_proj", "up_proj"), ("k_proj", "down_proj", "o_proj"))
RANK, ALPHA = 3, 7.5
LENGTHS = [5, 1, 9]


def randomize(model: Decoder, seed: int = 7) -> Decoder:
    """-> a model whose adapter looks half trained: a B of zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator) * 0.2)
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
    return model


@pytest.fixture
def adapted(make_reference, tmp_path):
    """shape, targets -> a random model with a random adapter; its directory holds it without the adapter."""

    def make(shape: str = "qwen2-grouped-tied", targets=ALL) -> Decoder:
        make_reference(shape, seed=1).save_pretrained(tmp_path / "base")
        model = load_model(tmp_path / "base")
        add_adapter(model, RANK, ALPHA, targets)
        return randomize(model)

    return make


def plain_merged(model: Decoder) -> dict[str, torch.Tensor]:
    """-> weights W + alpha / rank * B A, by autograd."""
    weights = dict(base_parameters(model))
    for name, layer in adapted_layers(model).items():
        weights[f"{name}.weight"] = layer.weight + ALPHA / RANK * layer.lora_B @ layer.lora_A
    return weights


@pytest.mark.parametrize("targets", SOME, ids=",".join)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_gradients_are_those_of_the_merged_formula(adapted, make_pack, targets, mode):
    model = adapted(targets=targets)
    model.checkpoint_blocks(mode)
    token_ids, cu_seqlens = make_pack(LENGTHS, model.config.vocab_size)
    rows = torch.tensor([0, 4, 5, 8, 14])
    wanted = torch.randn(len(rows), model.config.hidden_size)
    parameters = adapter_parameters(model)
    plain = Decoder(model.config)
    (functional_call(plain, plain_merged(model), (token_ids, cu_seqlens))[rows] * wanted).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    model.zero_grad()
    (model.hidden(token_ids, cu_seqlens, rows) * wanted).sum().backward()
    assert len(expected) == 2 * model.config.num_hidden_layers * len(targets)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
    assert all(p.grad is None and not p.requires_grad for p in base_parameters(model).values())


def test_every_family_computes_with_the_merged_weight(shape, adapted, make_pack):
    model = adapted(shape)
    token_ids, cu_seqlens = make_pack(LENGTHS, model.config.vocab_size)
    plain = Decoder(model.config)
    expected = functional_call(plain, plain_merged(model), (token_ids, cu_seqlens))
    torch.testing.assert_close(model.hidden(token_ids, cu_seqlens), expected, rtol=1e-4, atol=1e-5)


def test_a_new_adapter_and_one_switched_off_are_the_base(adapted, make_pack, tmp_path):
    model = adapted()
    base = load_model(tmp_path / "base")
    token_ids, cu_seqlens = make_pack(LENGTHS, model.config.vocab_size)
    expected = base.hidden(token_ids, cu_seqlens)
    changed = model.hidden(token_ids, cu_seqlens)
    assert not torch.allclose(changed, expected, atol=0.1)
    with without_adapter(model):
        assert torch.equal(model.hidden(token_ids, cu_seqlens), expected)
    with pytest.raises(IndexError), without_adapter(model):
        model.hidden(token_ids + 1000, cu_seqlens)
    assert torch.equal(model.hidden(token_ids, cu_seqlens), changed)
    reset_adapter(model, seed=0)
    assert torch.equal(model.hidden(token_ids, cu_seqlens), expected)


def test_an_adapter_begins_as_peft_s_does(adapted):
    model = adapted()
    reset_adapter(model, seed=3)
    first = {name: p.clone() for name, p in adapter_parameters(model).items()}
    for layer in adapted_layers(model).values():
        bound = 1 / math.sqrt(layer.in_features)  # kaiming_uniform_ with a = sqrt(5)
        assert 0.9 * bound < layer.lora_A.abs().max() <= bound
        assert float(layer.lora_A.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
        assert not layer.lora_B.any()
    reset_adapter(model, seed=4)
    assert not any(torch.equal(p, first[name]) for name, p in adapter_parameters(model).items() if "lora_A" in name)
    reset_adapter(model, seed=3)
    assert all(torch.equal(p, first[name]) for name, p in adapter_parameters(model).items())


def test_a_target_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no linear layer 'c_attn'"):
        add_adapter(Decoder(DecoderConfig(50, 32, 48, 1, 4, 2)), 2, 4.0, ["q_proj", "c_attn"])


# ---------------------------------------------------------------------------------------------------- fused generation


def generated(model: Decoder, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """-> hidden states and tokens of a prompt of three sequences and ten greedy tokens."""
    model.fused_generation = fused
    cache = KVCache(model.config, 4, 32, model.head_weight.dtype)
    slots, done, counts = torch.tensor([3, 0, 2]), torch.zeros(3, dtype=torch.int64), [4, 2, 7]
    token_ids = torch.arange(sum(counts)) * 5 % model.config.vocab_size
    hidden = [model.forward_cached(token_ids, torch.tensor([0, *counts]).cumsum(0), slots, done, cache)]
    done, tokens = torch.tensor(counts), []
    for _ in range(10):
        tokens.append(head_logits(hidden[-1], model.head_weight).argmax(-1))
        hidden.append(model.decode_cached(tokens[-1], slots, done, cache))
        done = done + 1
    return torch.stack(hidden), torch.stack(tokens)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("targets", SOME, ids=",".join)
def test_fused_generation_has_the_adapter(adapted, targets, joined, monkeypatch):
    model = adapted(targets=targets).requires_grad_(False)
    expected = generated(model, fused=False)
    used = []
    if joined:
        model.join_projections()

        def note(layers):
            used.append(joined_adapters(layers))
            return used[-1]

        monkeypatch.setattr("searchr1_fast.models.projections.joined_adapters", note)
    found = generated(model, fused=True)
    assert bool(used) == joined and all(one is not None for one in used)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], expected[1])
    with without_adapter(model):
        base = generated(model, fused=True)[0], generated(model, fused=False)[0]
    torch.testing.assert_close(*base, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base[0], found[0], atol=0.05)


@pytest.mark.parametrize("fused", [False, True])
def test_the_cached_pass_is_the_packed_pass_in_bf16(adapted, fused):
    """Sampling and training round alike: the same products, with W and B A apart."""
    model = adapted("qwen3-grouped-tied").requires_grad_(False).bfloat16()
    model.join_projections()
    model.fused_generation = fused
    ids = torch.arange(12) * 7 % model.config.vocab_size
    ends, zero = torch.tensor([0, 12]), torch.zeros(1, dtype=torch.int64)
    cached = model.forward_cached(ids, ends, zero, zero, KVCache(model.config, 1, 12, torch.bfloat16))
    packed = model.hidden(ids, ends)[-1:]
    assert (cached - packed).abs().max() <= 2**-5 * packed.abs().max()


def test_joined_adapters_are_the_same_parameters(adapted):
    model = adapted(targets=("q_proj", "v_proj", "gate_proj")).requires_grad_(False)
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    model.join_projections()
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
    attention = model.layers[0].self_attn
    layers = [attention.q_proj, attention.v_proj]
    attention.v_proj.lora_B.copy_(torch.ones_like(attention.v_proj.lora_B))  # as `sync_replica` writes
    heights = [layer.out_features for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    query, key, value = joined_adapters(layers).diagonal.split(heights)
    assert torch.equal(query, torch.nn.functional.pad(attention.q_proj.lora_B, (0, RANK)))
    assert not key.any() and not value[:, :RANK].any() and (value[:, RANK:] == 1).all()
    assert joined_adapters(layers[:1]) is None
    model.double()  # gives every parameter memory of its own
    assert joined_adapters(layers) is None


# --------------------------------------------------------------------------------------------- what leaves the process


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_an_export_is_merged_and_loads_in_transformers(shape, adapted, make_pack, tmp_path, shard_bytes):
    model = adapted(shape)
    save_model(model, tmp_path / "merged", max_shard_bytes=shard_bytes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    token_ids, cu_seqlens = make_pack([13], model.config.vocab_size)
    logits = model.logits(token_ids, cu_seqlens)
    torch.testing.assert_close(theirs(token_ids[None]).logits[0], logits, rtol=1e-4, atol=1e-4)
    again = load_model(tmp_path / "merged")
    torch.testing.assert_close(again.logits(token_ids, cu_seqlens), logits, rtol=1e-4, atol=1e-4)
    assert dict(again.named_parameters()).keys() == base_parameters(model).keys()
    model.join_projections()
    handed = HandedWeights(model)
    assert all(torch.equal(p, handed[name]) for name, p in again.named_parameters())


def test_other_engines_are_handed_merged_weights(adapted):
    model = adapted()
    weights = dict(named_weights(model))
    assert weights.keys() == {*base_parameters(model), "lm_head.weight"}
    for name, expected in plain_merged(model).items():
        torch.testing.assert_close(weights[name], expected.detach(), rtol=1e-5, atol=1e-6)


def test_weights_are_loaded_below_an_adapter(adapted, tmp_path):
    model = adapted()
    expected = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in base_parameters(model).values():
            parameter.zero_()
    load_weights(model, tmp_path / "base")
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_a_fingerprint_is_the_base_s(adapted, tmp_path):
    model, base = adapted(), load_model(tmp_path / "base")
    assert fingerprint(model) == fingerprint(base)
    with torch.no_grad():
        base.model.norm.weight[3] += 1e-6
    assert fingerprint(model) != fingerprint(base)
    assert fingerprint(model.bfloat16()) == fingerprint(load_model(tmp_path / "base", torch.bfloat16))


def test_another_decoder_stands_on_the_same_base(shape, adapted, make_pack):
    model = adapted(shape)
    other = model.on_same_base()
    assert all(p is base_parameters(model)[name] for name, p in other.named_parameters())
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == model.config.tie_word_embeddings
    token_ids, cu_seqlens = make_pack(LENGTHS, model.config.vocab_size)
    with without_adapter(model):
        assert torch.equal(other.logits(token_ids, cu_seqlens), model.logits(token_ids, cu_seqlens))


def test_the_file_of_an_adapter_alone(adapted, tmp_path):
    """Names and shapes are as peft writes them, whether or not adapters lie side by side."""
    model = adapted(targets=("q_proj", "k_proj", "down_proj"))
    model.join_projections()
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, ALPHA, "LORA")
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj"]
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(written) == 2 * 3 * model.config.num_hidden_layers
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(written[f"base_model.model.{name}.weight"], parameter)


def test_an_adapter_alone_is_loaded_with_its_base(shape, adapted, make_pack, tmp_path):
    model = adapted(shape, ("q_proj", "o_proj", "up_proj"))
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    again = load_model(tmp_path / "adapter")
    token_ids, cu_seqlens = make_pack(LENGTHS, model.config.vocab_size)
    assert torch.equal(again.logits(token_ids, cu_seqlens), model.logits(token_ids, cu_seqlens))
    assert {p.dtype for p in load_model(tmp_path / "adapter", torch.bfloat16).parameters()} == {torch.bfloat16}
    assert resolve(tmp_path / "adapter", or_adapter=True) == tmp_path / "adapter"
    with pytest.raises(ValueError, match=r"is an adapter; give what it stands on \(\S+base\)"):
        resolve(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_rslora": True}, "use_rslora=True is not supported"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern=.* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"alora_invocation_tokens": [7]}, "alora_invocation_tokens=.* is not supported"),
        ({"of_a_later_peft": {"is_on": True}}, "of_a_later_peft=.* is not supported"),
        ({"r": "3"}, "r must be a number above 0, not '3'"),
        ({"lora_alpha": 0}, "lora_alpha must be a number above 0, not 0"),
        ({"target_modules": ["q_proj", 3]}, "target_modules must list names, not "),
        ({"target_modules": "all-linear"}, "target_modules must list names, not 'all-linear'"),
        ({"target_modules": ["q_proj"]}, "also holds base_model.model.*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "lacks base_model.model.*o_proj"),
        ({"target_modules": ["c_attn"]}, "no linear layer 'c_attn'"),
        ({"r": 5}, r"lora_A.weight is \(3, 48\), the model's is \(5, 48\)"),
        ({"base_model_name_or_path": "nowhere/at-all"}, "stands on nowhere/at-all, which is not a model's directory"),
        ({"r": None}, "not an adapter's configuration"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_sentence(adapted, tmp_path, change, sentence):
    save_adapter(adapted(targets=("q_proj", "v_proj")), tmp_path / "adapter", str(tmp_path / "base"))
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None or key != "r"}))
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"not")
    with pytest.raises(ValueError, match=f"{sentence}|not a whole safetensors file"):
        load_model(tmp_path / "adapter")


def test_layers_may_have_their_whole_names(adapted, make_pack, tmp_path):
    """peft writes them so when asked for all linear layers; a layer that is not listed is still found missing."""
    model = adapted()
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    path = tmp_path / "adapter" / "adapter_config.json"
    values, names = json.loads(path.read_text()), sorted(adapted_layers(model))
    path.write_text(json.dumps(values | {"target_modules": names}))
    token_ids, cu_seqlens = make_pack([13], model.config.vocab_size)
    again = load_model(tmp_path / "adapter")
    assert torch.equal(again.logits(token_ids, cu_seqlens), model.logits(token_ids, cu_seqlens))
    path.write_text(json.dumps(values | {"target_modules": [name for name in names if "q_proj" not in name]}))
    with pytest.raises(ValueError, match="also holds base_model.model.*q_proj"):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj")], ids=",".join)
def test_peft_reads_it_and_computes_the_same(shape, adapted, make_pack, tmp_path, targets):
    peft = pytest.importorskip("peft")
    model = adapted(shape, targets)
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    token_ids, cu_seqlens = make_pack([13], model.config.vocab_size)
    logits = model.logits(token_ids, cu_seqlens)
    torch.testing.assert_close(theirs(token_ids[None]).logits[0], logits, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")  # and we read what peft writes
    assert torch.equal(load_model(tmp_path / "theirs").logits(token_ids, cu_seqlens), logits)
    names = dict(theirs.merge_and_unload().named_parameters())
    handed = HandedWeights(model)
    for name in base_parameters(model):
        torch.testing.assert_close(names[name], handed[name], rtol=1e-5, atol=1e-6)
