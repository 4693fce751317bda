"""Published shapes of the models that people train: parameters counted without memory, configurations kept.

The counts are those of the published weights: half of `total_size` in model.safetensors.index.json where there is one.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from searchr1_fast.models import Decoder, DecoderConfig
from searchr1_fast.models.published import PUBLISHED

COUNTS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
}
# Keys by which releases of transformers write the same computation differently, and keys that are no part of it.
_NOTATION = {"_name_or_path", "transformers_version", "dtype", "max_window_layers", "use_mrope"}


@pytest.fixture(params=PUBLISHED)
def published(request) -> tuple[dict, int]:
    return PUBLISHED[request.param], COUNTS[request.param]


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
    """transformers reads our file as it reads the publisher's; written twice, it is the same."""
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
    """transformers 5 saves `rope_parameters` and `dtype`, for which the published files have other keys."""
    values, _ = published
    (tmp_path / "config.json").write_text(json.dumps(values))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in again
    assert DecoderConfig.from_hf(again) == DecoderConfig.from_hf(values)
