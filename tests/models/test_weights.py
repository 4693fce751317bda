"""Directories: files of transformers are read, single or sharded; mistakes are named; exports are read back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from searchr1_fast.models import load_model, load_weights, meta_model, save_model, save_weights

SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_weights_that_transformers_wrote_are_read_to_the_bit(shape, max_shard_size, make_reference, tmp_path):
    reference = make_reference(shape)
    reference.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    num_files = len(list(tmp_path.glob("*.safetensors")))
    assert num_files == 1 if max_shard_size == "5GB" else num_files > 3
    assert same_weights(load_model(tmp_path), reference)


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_weights_are_read_in_the_type_that_is_asked_for(stored, wanted, make_reference, tmp_path):
    reference = make_reference().to(getattr(torch, stored))
    reference.save_pretrained(tmp_path)
    assert same_weights(load_model(tmp_path, getattr(torch, wanted)), reference.to(getattr(torch, wanted)))


def test_a_head_that_is_tied_is_one_tensor_and_a_copy_of_it_in_the_file_is_left_there(make_reference, tmp_path):
    """Some published directories of tied models also hold the head (Qwen3-0.6B's does)."""
    make_reference("qwen3-grouped-tied").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("place", ["the last number", "the shape"])
def test_a_head_that_is_tied_and_another_matrix_in_the_file_is_refused(place, make_reference, tmp_path, monkeypatch):
    """transformers 5 then ties nothing, and computes another model."""
    monkeypatch.setattr("searchr1_fast.models.weights._ROWS_COMPARED", 100)
    reference = make_reference("llama-scaled-tied")
    reference.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    weights["lm_head.weight"] = head if place == "the last number" else head[:-1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight in the files is another matrix; set tie_word_embeddings to"):
        load_model(tmp_path)
    if place == "the last number":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    critic = meta_model(tmp_path)
    critic.lm_head = None
    load_weights(critic.to_empty(device="cpu"), tmp_path)  # it uses neither
    assert same_weights(critic.model, reference.model)


def test_a_tied_head_is_written_once_however_weights_are_given(make_reference, tmp_path):
    """A state dict holds it under both names."""
    make_reference("llama-scaled-tied").save_pretrained(tmp_path / "original")
    model = load_model(tmp_path / "original")
    assert "lm_head.weight" in model.state_dict()
    save_weights(model.state_dict(), model.config, tmp_path / "export")
    assert load_file(tmp_path / "export" / "model.safetensors").keys() == dict(model.named_parameters()).keys()
    assert same_weights(load_model(tmp_path / "export"), model)


def test_a_model_without_a_head_reads_the_others(make_reference, tmp_path):
    """Such as the critic's."""
    reference = make_reference("llama-plain")
    reference.save_pretrained(tmp_path)
    model = meta_model(tmp_path)
    model.lm_head = None
    model.to_empty(device="cpu")
    load_weights(model, tmp_path)
    assert same_weights(model.model, reference.model)


# ------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 20_000])
def test_export_generates_in_transformers_as_the_original_and_reads_back(
    shape, max_shard_bytes, make_reference, tmp_path
):
    """original -> ours -> export -> transformers -> its save -> ours: the same bits throughout, and the same tokens."""
    reference = make_reference(shape)
    reference.save_pretrained(tmp_path / "original")
    model = load_model(tmp_path / "original")
    save_model(model, tmp_path / "export", max_shard_bytes=max_shard_bytes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager")
    assert type(theirs) is type(reference)
    assert same_weights(theirs, reference)
    prompt = torch.arange(2, 12)[None]
    options = dict(max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(theirs.generate(prompt, **options), reference.generate(prompt, **options))
    assert same_weights(load_model(tmp_path / "export"), reference)
    theirs.save_pretrained(tmp_path / "again")
    assert same_weights(load_model(tmp_path / "again"), reference)
    assert load_model(tmp_path / "again").config == model.config


def test_shards_are_no_larger_than_asked_and_the_index_says_what_is_where(make_reference, tmp_path):
    reference = make_reference("qwen2-multi-head-untied")
    reference.save_pretrained(tmp_path / "original")
    model = load_model(tmp_path / "original")
    save_model(model, tmp_path, max_shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    for file in files:
        shard = load_file(tmp_path / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == shard.keys()
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 30_000
    assert same_weights(load_model(tmp_path), model)


def test_an_export_replaces_the_one_before_it(make_reference, tmp_path):
    """From shards to one file, then to other shards: a reader that prefers the index must not find an old one."""
    for seed, size in ((1, 20_000), (2, 10**9), (3, 60_000)):
        make_reference(seed=seed).save_pretrained(tmp_path / str(seed))
        model = load_model(tmp_path / str(seed))
        save_model(model, tmp_path / "export", max_shard_bytes=size)
        assert same_weights(load_model(tmp_path / "export"), model)
        assert (tmp_path / "export" / "model.safetensors").is_file() == (seed == 2)


def test_an_export_in_another_type_is_rounded_once(make_reference, tmp_path):
    make_reference().save_pretrained(tmp_path / "original")
    model = load_model(tmp_path / "original")
    save_model(model, tmp_path / "export", dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert theirs.dtype == torch.bfloat16
    assert same_weights(theirs, model.bfloat16())


def test_token_ids_for_generation_are_kept(make_reference, tmp_path):
    """A LlamaConfig without them would end at token 2."""
    ids = dict(bos_token_id=7, eos_token_id=[9, 11], pad_token_id=None)
    make_reference("llama-plain", **ids).save_pretrained(tmp_path / "original")
    save_model(load_model(tmp_path / "original"), tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").config
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (7, [9, 11], None)


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("shape_name", "change", "message"),
    [
        ("qwen2-grouped-tied", {"model_type": "mistral"}, "a 'mistral' model; this decoder runs qwen2, qwen3, llama"),
        ("qwen2-grouped-tied", {"use_sliding_window": True}, "sliding-window"),
        ("qwen3-grouped-tied", {"layer_types": ["full_attention", "sliding_attention"]}, "type 'sliding_attention'"),
        ("qwen3-grouped-tied", {"attention_bias": True}, "attention_bias"),
        ("llama-plain", {"mlp_bias": True}, "mlp_bias"),
        ("llama-plain", {"attention_dropout": 0.1}, "attention_dropout"),
        ("llama-plain", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("qwen2-grouped-tied", {"hidden_act": "gelu"}, "activation 'gelu'"),
        (
            "qwen2-grouped-tied",
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope type 'yarn'; .* 'default' and 'llama3'",
        ),
        (
            "llama-plain",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "lacks low_freq_factor, high_freq",
        ),
        ("llama-plain", {"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta must be a number above 0, not '1e6'"),
        ("llama-plain", {"rope_parameters": SCALED | {"factor": "8"}}, "factor must be a number above 0, not '8'"),
        ("llama-plain", {"rope_parameters": SCALED | {"low_freq_factor": 9}}, "scaling that cannot be"),
        ("llama-plain", {"rope_parameters": {"full_attention": SCALED}}, "layers of type 'full_attention'"),
        ("llama-plain", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama-plain", {"head_dim": 15}, "head_dim 15 is odd"),
        ("qwen2-grouped-tied", {"hidden_size": 50}, "50 is not a multiple of num_attention_heads 4"),
        ("qwen2-grouped-tied", {"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ("qwen2-grouped-tied", {"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ("qwen2-grouped-tied", {"num_hidden_layers": 4}, r"lacks model.layers.3.* and 9 more$"),
        ("qwen2-grouped-tied", {"num_hidden_layers": 1}, r"does not have, model.layers.1.* and 21 more$"),
        (
            "qwen2-grouped-tied",
            {"intermediate_size": 64},
            r"down_proj.weight is \(48, 80\), config.json says \(48, 64\)",
        ),
        ("qwen2-grouped-tied", {"model_type": "llama"}, "does not have, model.layers.0.self_attn.k_proj.bias"),
        ("qwen3-grouped-tied", {"model_type": "qwen2"}, "lacks .*k_proj.bias.*does not have, .*k_norm.weight"),
    ],
)
def test_unusable_directories_are_named(shape_name, change, message, make_reference, tmp_path):
    make_reference(shape_name).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_missing_and_broken_files_are_named(make_reference, tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="builtin:base"):
        load_model("builtin:large")
    make_reference().save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{shard.name} is not a whole safetensors file .*; copy it again"):
        load_model(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"no {shard.name}"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is not an index of weights"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_model(tmp_path)


def test_weights_that_are_no_floating_point_numbers_are_named(make_reference, tmp_path):
    make_reference().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="floating point model.norm.weight is F8_E4M3"):
        load_model(tmp_path)


def test_nothing_is_copied_before_everything_fits(make_reference, tmp_path):
    """A model in use is never left half old and half new."""
    make_reference(seed=1).save_pretrained(tmp_path / "first")
    make_reference(seed=2).save_pretrained(tmp_path / "second")
    model = load_model(tmp_path / "first")
    weights = load_file(tmp_path / "second" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "second" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks model.norm.weight"):
        load_weights(model, tmp_path / "second")
    assert same_weights(model, load_model(tmp_path / "first"))


def test_what_is_written_is_as_readable_as_other_files(make_reference, tmp_path):
    """By the umask; files that safetensors writes itself are readable by their owner only."""
    make_reference("qwen2-grouped-tied").save_pretrained(tmp_path / "theirs")
    model, before = load_model(tmp_path / "theirs"), os.umask(0o027)
    try:
        for _ in range(2):  # also over existing files
            save_model(model, tmp_path / "ours", max_shard_bytes=20_000)
    finally:
        os.umask(before)
    files = list((tmp_path / "ours").iterdir())
    assert len(files) > 3 and {file.stat().st_mode & 0o777 for file in files} == {0o640}


# ------------------------------------------------------------------------------------------------------ several ranks


def test_two_ranks_read_their_own_rows_alone(make_reference, tmp_path, on_two_ranks):
    """One launch of two ranks (FSDP2 on the CPU), each of which compares what it holds with what one rank reads."""
    for name, shape_name, vocab_size in (
        ("tied", "qwen2-grouped-tied", 2000),
        ("uneven", "llama-scaled-own-head-size", 2001),  # two ranks cannot share these rows evenly
    ):
        sizes = dict(vocab_size=vocab_size, hidden_size=96, intermediate_size=150)
        make_reference(shape_name, **sizes).bfloat16().save_pretrained(tmp_path / name, max_shard_size="300KB")
    on_two_ranks(Path(__file__).parent / "two_ranks_load.py", tmp_path, "tied", "uneven")
    for name in ("tied", "uneven"):
        for rank in range(2):
            report = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            assert report["differing"] == []
            assert report["hidden_difference"] == 0.0
            # Half of the model, and no more while it is read; reading first costs all of it. FSDP2 pads a shard that
            # lacks a row, and holds the largest shard twice for a moment.
            assert 0.49 < report["own_bytes"] / report["model_bytes"] < 0.51
            padding = report["largest_shard_bytes"] if name == "uneven" else 0
            assert report["own_bytes"] <= report["peak_bytes"] <= 1.02 * report["own_bytes"] + padding
            assert report["peak_bytes_of_one_rank"] == report["model_bytes"]
            assert report["peak_bytes_read_whole"] > report["model_bytes"]


def test_a_slice_of_a_file_is_no_copy(make_reference, tmp_path):
    """Loading relies on it: rows are taken from the mapped file in place, and the others are not touched."""
    make_reference().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as reader:
        rows = reader.get_slice("model.embed_tokens.weight")[3:5]
        whole = reader.get_tensor("model.embed_tokens.weight")
        assert torch.equal(rows, whole[3:5])
        assert rows.data_ptr() == whole[3:5].data_ptr()
