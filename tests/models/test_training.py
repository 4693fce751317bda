"""The trainer takes each family from a directory: rollout, update, export, as it takes the built-in models."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from searchr1_fast.models import load_model
from searchr1_fast.train import train

FAMILIES = {
    "qwen3": dict(head_dim=16),
    "llama": dict(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
}


@pytest.fixture(params=FAMILIES)
def directory(request, tiny_tokenizer, tmp_path):
    """A random model of transformers' making, with the tests' tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param,
        vocab_size=tiny_tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        **FAMILIES[request.param],
    )
    folder = tmp_path / request.param
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer.save(folder)
    return folder


def test_a_step_from_a_directory_to_an_export(directory, make_config, make_console):
    """Random answers are all wrong, so the step rewards entropy. What the sampler saw is what the trainer computes."""
    config = make_config(
        model={"path": str(directory)},
        algorithm={"drop_zero_variance_groups": False, "entropy_coefficient": 0.1},
        train={"num_steps": 1},
        eval={"sets": {}},
    )
    train(config, make_console())
    row = json.loads((config.run_directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 1
    assert row["grad_norm"] > 0
    assert abs(row["rollout_policy_kl"]) < 1e-6
    # Almost uniform over the vocabulary, the model being random.
    assert row["entropy"] == pytest.approx(math.log(load_model(directory).config.vocab_size), rel=0.2)
    export = config.run_directory / "checkpoints" / "latest" / "hf"
    theirs, start = AutoModelForCausalLM.from_pretrained(export), load_model(directory)
    trained = dict(load_model(export).named_parameters())
    assert all(torch.equal(parameter, trained[name]) for name, parameter in theirs.named_parameters())
    assert not any(torch.equal(parameter, trained[name]) for name, parameter in start.named_parameters())
