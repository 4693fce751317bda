"""Weights read back from a model as vLLM builds it: joined projections, a padded vocabulary, packed layers; no vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from searchr1_fast.rollout import vllm_weights
from searchr1_fast.rollout.vllm_weights import held_weights
from searchr1_fast.rollout.weight_handover import check_weights, named_weights


class Joined(nn.Module):
    """A decoder's weights laid out as in vLLM."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        parts = {part: whole for whole, names in self.packed_modules_mapping.items() for part in names}
        grouped: dict[str, list[torch.Tensor]] = {}
        for name, tensor in weights.items():
            *path, module, leaf = name.split(".")
            grouped.setdefault(".".join([*path, parts.get(module, module), leaf]), []).append(tensor)
        for name, tensors in grouped.items():
            tensor = torch.cat(tensors)
            if name in ("model.embed_tokens.weight", "lm_head.weight"):  # rows up to a multiple of 64
                tensor = torch.cat([tensor, torch.zeros(-len(tensor) % 64, tensor.shape[1])])
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, nn.Parameter(tensor.clone()))


def pack(layer: nn.Module, keeps: bool) -> torch.Tensor:
    """Let a layer compute with a copy of its weight, as on a CPU -> the copy."""
    packed = layer.weight.detach().clone()
    layer.cpu_linear, layer.input_size = object(), packed.shape[1]
    layer.quant_method = SimpleNamespace(apply=lambda _, inputs, bias: inputs @ packed.T)
    if not keeps:
        layer.weight = nn.Parameter(torch.empty(0))
    return packed


@pytest.fixture
def weights(make_model):
    return dict(named_weights(make_model(3)))


def check(weights, model) -> list[str]:
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    return check_weights(weights, held_weights(model, shapes), "it")


def test_every_weight_is_found_and_none_may_differ(weights):
    model = Joined(weights)
    assert check(weights, model) == []
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter[min(3, len(parameter) - 1)] += 1e-6
        with pytest.raises(ValueError, match="it has not got the trainer's weights: 1 of"):
            check(weights, model)
        with torch.no_grad():
            parameter.copy_(before)
        assert check(weights, model) == [], name


def test_rows_of_a_joined_layer_belong_to_its_parts(weights):
    model = Joined(weights)
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.qkv_proj.bias")[-1] += 1.0
    with pytest.raises(ValueError, match=r"the first 'model.layers.1.self_attn.v_proj.bias' in 1 of its 16 numbers"):
        check(weights, model)


@pytest.mark.parametrize("keeps", [False, True])
def test_what_a_packed_layer_computes_with_is_seen(weights, monkeypatch, keeps):
    monkeypatch.setattr(vllm_weights, "UNIT_VECTORS", 5)  # several at a time, fewer in the last group
    model = Joined(weights)
    packed = pack(model.get_submodule("model.layers.0.mlp.gate_up_proj"), keeps)
    pack(model.lm_head, keeps=True)
    assert check(weights, model) == []
    packed[-1, -1] *= 1 + 1e-6
    with pytest.raises(ValueError, match=r"1 of 27 differ, the first 'model.layers.0.mlp.up_proj.weight' in 1 of its"):
        check(weights, model)


def test_what_cannot_be_found_is_left_out(weights):
    model = Joined(weights)
    del model.model.norm
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().T.contiguous())
    assert check(weights, model) == ["model.norm.weight", "lm_head.weight"]
