"""The shapes that people train, as the publishers' config.json files have them (huggingface.co/Qwen, …/meta-llama).

Weights are not here: this is for planning memory, for benchmarks with random weights, and for tests.
"""

from __future__ import annotations

from typing import Any

from searchr1_fast.models.decoder_config import DecoderConfig

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


PUBLISHED: dict[str, dict[str, Any]] = {  # the contents of config.json
    "qwen2.5-0.5b": _qwen2(24, 896, 4864, 14, 2, 32768),
    "qwen2.5-1.5b": _qwen2(28, 1536, 8960, 12, 2, 131072),
    "qwen2.5-3b": _qwen2(36, 2048, 11008, 16, 2, 32768),
    "qwen2.5-7b": _qwen2(28, 3584, 18944, 28, 4, 131072, tied=False, vocab_size=152064),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, tied=False),
    "llama-3.2-1b": _config(_LLAMA, 16, 2048, 8192, 32, head_dim=64),
    "llama-3.2-3b": _config(_LLAMA, 28, 3072, 8192, 24, head_dim=128),
}


def published_config(name: str) -> DecoderConfig:
    """Return the configuration of a name in `PUBLISHED`. ValueError if there is none."""
    if name not in PUBLISHED:
        raise ValueError(f"no published shape {name!r}; there are {', '.join(PUBLISHED)}")
    return DecoderConfig.from_hf(PUBLISHED[name])
