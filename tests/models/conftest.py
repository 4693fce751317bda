"""Shared by the tests of the decoder: small random models of each family, made by transformers, and packs of ids."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}

# Includes slow, medium and fast frequencies; sequences go beyond the original context of 24 places.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}

# Every family with grouped queries, with and without a tied head, and with its own head size.
SHAPES = {
    "qwen2-grouped-tied": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen2-multi-head-untied": dict(model_type="qwen2", num_key_value_heads=4),
    "qwen2-multi-query": dict(model_type="qwen2", num_key_value_heads=1, rope_theta=1e6),
    "qwen2-odd-sizes": dict(
        model_type="qwen2",
        num_attention_heads=3,
        num_key_value_heads=3,
        hidden_size=36,
        intermediate_size=52,
        vocab_size=97,
    ),
    "qwen2-own-head-size": dict(model_type="qwen2", head_dim=20),
    "qwen3-grouped-tied": dict(model_type="qwen3", head_dim=12, tie_word_embeddings=True),
    "qwen3-own-head-size": dict(model_type="qwen3", head_dim=32, rope_theta=1e6),
    "llama-plain": dict(model_type="llama", num_key_value_heads=4),
    "llama-scaled-tied": dict(model_type="llama", tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "llama-scaled-own-head-size": dict(model_type="llama", head_dim=20, rope_parameters=LLAMA3_ROPE),
}


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", SHAPES)


@pytest.fixture
def make_reference():
    """shape, changes -> a transformers model with every parameter random.

    Zero biases and unit norms would hide mistakes.
    """

    def make(shape: str = "qwen2-grouped-tied", seed: int = 0, **changes):
        torch.manual_seed(seed)
        fields = dict(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
        fields |= dict(num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False)
        fields |= SHAPES[shape] | changes
        config = CONFIGS[fields.pop("model_type")](**fields)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.15).add_(1.0 if "norm" in name else 0.0)
        return model

    return make


@pytest.fixture
def make_pack():
    """lengths, vocab_size -> random ids of sequences stored end to end: token_ids [T], cu_seqlens [S+1]."""

    def make(lengths: list[int], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        return torch.randint(vocab_size, (int(cu_seqlens[-1]),)), cu_seqlens

    return make
