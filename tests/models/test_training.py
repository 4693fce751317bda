"""The trainer takes each family from a directory, for rollout, update and export, like the built-in models."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from searchr1_fast.models import TextTokenizer, load_model
from searchr1_fast.run import open_run
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
    """A random model made by transformers, with the tests' tokenizer."""
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
    """Random answers are all wrong, so the step rewards entropy. The trainer computes what the sampler saw."""
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
    # The model is random, so almost uniform over the vocabulary.
    assert row["entropy"] == pytest.approx(math.log(load_model(directory).config.vocab_size), rel=0.2)
    export = config.run_directory / "checkpoints" / "latest" / "hf"
    theirs, start = AutoModelForCausalLM.from_pretrained(export), load_model(directory)
    trained = dict(load_model(export).named_parameters())
    assert all(torch.equal(parameter, trained[name]) for name, parameter in theirs.named_parameters())
    assert not any(torch.equal(parameter, trained[name]) for name, parameter in start.named_parameters())


def test_a_chat_s_turns_end_as_its_template_has_it(directory, tiny_tokenizer, make_config, make_console):
    """In rollouts and in the export, though no file of the directory says so: as in Qwen2.5's base models."""
    backend = Tokenizer.from_str(tiny_tokenizer.backend.to_str())
    backend.add_special_tokens(["<information>"])  # an existing one, so that the embedding has its row
    template = "{% for m in messages %}{{ m.content }}{{ '<information>' if m.role == 'assistant' }}{% endfor %}"
    TextTokenizer(backend, tiny_tokenizer.eos_token, template).save(directory)
    expected = [tiny_tokenizer.eos_id, backend.token_to_id("<information>")]
    changes = {"model": {"path": str(directory)}, "prompt": {"chat_template": True}, "eval": {"sets": {}}}
    config = make_config(train={"num_steps": 1}, **changes)
    with open_run(config, make_console()) as run:
        assert run.engine.is_eos.nonzero()[0].tolist() == sorted(expected)
        run.tokenizer.save(directory)
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == expected
