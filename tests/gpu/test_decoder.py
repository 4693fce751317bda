"""The decoder on a GPU has the CPU's hidden states and gradients, also for sequences that share beginnings."""

from __future__ import annotations

import copy

import pytest
import torch

from searchr1_fast.models import Decoder
from searchr1_fast.packing import pack
from searchr1_fast.policy import padding_batch, to_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def batch(make_trajectory):
    """Five sequences: four begin alike, and the fifth is all another's."""
    trajectories = [make_trajectory(seed, [(False, 30), (True, 9 + seed), (False, 70)]) for seed in range(4)]
    for trajectory in trajectories[1:]:
        trajectory.token_ids[:35] = trajectories[0].token_ids[:35]
    (batch,) = pack([*trajectories, trajectories[0]], [1.0] * 5, 1000)
    assert batch.prefixes is not None
    return batch


def results(model: Decoder, batch) -> dict[str, torch.Tensor]:
    """-> hidden states of the scored rows and every parameter's gradient, on the CPU in fp32."""
    batch = to_device(batch, model.head_weight.device)
    model.zero_grad()
    hidden = model.scored_hidden(batch)
    weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)
    (hidden.float() * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"hidden": hidden.detach()}
    return {name: tensor.float().cpu() for name, tensor in found.items()}


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_forward_and_backward_are_those_of_the_cpu(make_decoder, batch, dtype, allowed):
    model = make_decoder(0).to(dtype)
    ours = results(copy.deepcopy(model).cuda(), batch)
    expected = results(model.float(), batch)  # the weights that the GPU has
    assert ours.keys() == expected.keys()
    for name, want in expected.items():
        error = float((ours[name] - want).norm() / want.norm().clamp(min=1e-6))
        assert error <= allowed, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_that_predicts_nothing(make_decoder, dtype):
    model = make_decoder(0).cuda().to(dtype)
    found = results(model, padding_batch())
    assert found["hidden"].shape == (0, 32)
    assert all((tensor == 0).all() for tensor in found.values())
