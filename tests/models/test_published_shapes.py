"""The models people train, in their published shapes: parameters counted without memory, configurations kept.

The dictionaries are what the publishers' config.json files say (huggingface.co/Qwen, huggingface.co/meta-llama), and
the counts are those of the published weights: half of `total_size` in model.safetensors.index.json where there is one.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from searchr1_fast.models import Decoder, DecoderConfig

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def _config(base: dict, layers: int, hidden: int, inner: int, heads: int, **others) -> dict:
    sizes = dict(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads)
    return base | sizes | others


def _qwen2(layers, hidden, inner, heads, kv_heads, positions, tied=True, **others) -> dict:
    names = dict(num_key_value_heads=kv_heads, max_position_embeddings=positions, tie_word_embeddings=tied)
    return _config(_QWEN2, layers, hidden, inner, heads, max_window_layers=layers, **names, **others)


def _qwen3(layers, hidden, inner, heads, tied) -> dict:
    return _config(_QWEN3, layers, hidden, inner, heads, max_window_layers=layers, tie_word_embeddings=tied)


PUBLISHED = {
    "Qwen2.5-0.5B": (_qwen2(24, 896, 4864, 14, 2, 32768), 494_032_768),
    "Qwen2.5-1.5B": (_qwen2(28, 1536, 8960, 12, 2, 131072), 1_543_714_304),
    "Qwen2.5-3B": (_qwen2(36, 2048, 11008, 16, 2, 32768), 3_085_938_688),
    "Qwen2.5-7B": (_qwen2(28, 3584, 18944, 28, 4, 131072, tied=False, vocab_size=152064), 7_615_616_512),
    "Qwen3-0.6B": (_qwen3(28, 1024, 3072, 16, tied=True), 596_049_920),
    "Qwen3-1.7B": (_qwen3(28, 2048, 6144, 16, tied=True), 1_720_574_976),
    "Qwen3-4B": (_qwen3(36, 2560, 9728, 32, tied=True), 4_022_468_096),
    "Qwen3-8B": (_qwen3(36, 4096, 12288, 32, tied=False), 8_190_735_360),
    "Llama-3.2-1B": (_config(_LLAMA, 16, 2048, 8192, 32, head_dim=64), 1_235_814_400),
    "Llama-3.2-3B": (_config(_LLAMA, 28, 3072, 8192, 24, head_dim=128), 3_212_749_824),
}
# What differs between releases of transformers in how the same computation is written down, and what it is no part of.
_NOTATION = {"_name_or_path", "transformers_version", "dtype", "max_window_layers", "use_mrope"}


@pytest.fixture(params=PUBLISHED)
def published(request) -> tuple[dict, int]:
    return PUBLISHED[request.param]


def test_parameters_are_as_many_as_published_and_named_as_in_transformers(published, tmp_path):
    values, count = published
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        model = Decoder(DecoderConfig.from_hf(values))
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert shapes == {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}


def test_configuration_survives_the_round_trip(published, tmp_path):
    """transformers reads what is written as it reads the publisher's; written twice, it is the same."""
    values, _ = published
    ours = DecoderConfig.from_hf(values)
    assert DecoderConfig.from_hf(json.loads(json.dumps(ours.to_hf()))) == ours
    read = {}
    for name, contents in (("theirs", values), ("ours", ours.to_hf())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(contents))
        read[name] = AutoConfig.from_pretrained(tmp_path / name).to_dict()
    kept = {name: {k: v for k, v in config.items() if k not in _NOTATION} for name, config in read.items()}
    assert kept["ours"] == kept["theirs"]


def test_transformers_way_of_writing_is_read_as_the_publishers(published, tmp_path):
    """transformers 5 saves `rope_parameters` and `dtype` where the published files have other keys."""
    values, _ = published
    (tmp_path / "config.json").write_text(json.dumps(values))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in again
    assert DecoderConfig.from_hf(again) == DecoderConfig.from_hf(values)
