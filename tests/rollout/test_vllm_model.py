"""What can be requested from vLLM, and how it is started; without vLLM."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import pytest
import torch

from searchr1_fast.config import Config, RolloutConfig, load_config
from searchr1_fast.evaluate import build_engine
from searchr1_fast.models import Decoder
from searchr1_fast.rollout import SamplingParams
from searchr1_fast.rollout.vllm_model import _same_threads, is_reported, logprobs_mode, shape_directory

GREEDY = SamplingParams(0.0)


def test_the_reported_logprobs_are_ours_or_refused():
    cut = SamplingParams(1.0, top_p=0.9, top_k=20)
    assert logprobs_mode(SamplingParams(0.7)) == logprobs_mode(GREEDY) == "processed_logprobs"
    assert logprobs_mode(cut) == "raw_logprobs"
    with pytest.raises(ValueError, match="temperature other than 1"):
        logprobs_mode(SamplingParams(0.7, top_k=20))
    for mode, sampling, expected in [
        ("processed_logprobs", SamplingParams(0.7), True),
        ("processed_logprobs", GREEDY, True),
        ("processed_logprobs", cut, False),
        ("raw_logprobs", cut, True),
        ("raw_logprobs", GREEDY, True),
        ("raw_logprobs", SamplingParams(0.7), False),
    ]:
        assert is_reported(mode, sampling) is expected


def test_the_configuration_refuses_what_vllm_cannot_report():
    assert RolloutConfig(engine="vllm", top_p=0.9).top_p == 0.9
    with pytest.raises(ValueError, match="rollout.temperature=1"):
        load_config(None, ["rollout.engine=vllm", "rollout.top_k=20", "rollout.temperature=0.7"])


@pytest.mark.parametrize("cut", ["rollout.top_p=0.9", "rollout.top_k=20"])
def test_the_configuration_refuses_evaluations_that_vllm_cannot_report(cut):
    for temperature in (0.0, 1.0):
        overrides = ["rollout.engine=vllm", cut, f"eval.temperature={temperature}"]
        assert load_config(None, overrides).eval.temperature == temperature
    for fine in (["rollout.engine=vllm"], [cut]):
        assert load_config(None, [*fine, "eval.temperature=0.7"]).eval.temperature == 0.7
    with pytest.raises(ValueError, match="eval.temperature: 0.7 .*set it to 0 or 1, or rollout.engine=native"):
        load_config(None, ["rollout.engine=vllm", cut, "eval.temperature=0.7"])


def test_without_vllm_the_message_says_what_to_do(monkeypatch, make_model, tokenizer):
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = Config.model_validate({"rollout": {"engine": "vllm", "max_sequence_tokens": 200}})
    with pytest.raises(ValueError, match="vllm cannot be imported.*rollout.engine=native"):
        build_engine(make_model(0), tokenizer, config)


def test_a_shape_has_its_folder(make_model, tmp_path):
    """vLLM's cache of compiled code is keyed by the path."""
    model = make_model(0)
    directory = shape_directory(model, tmp_path)
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    assert json.loads((directory / "config.json").read_text()) == model.config.to_hf()
    assert shape_directory(make_model(1), tmp_path) == directory
    other = Decoder(replace(model.config, num_hidden_layers=1))
    assert shape_directory(other, tmp_path) != directory


def test_vllm_is_told_to_leave_the_threads_alone(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with _same_threads():
        assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with _same_threads():
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "3"
