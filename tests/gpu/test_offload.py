"""What leaves a real GPU between uses: the same bits, less memory, and no waiting."""

from __future__ import annotations

import pytest
import torch

from searchr1_fast.distributed import process
from searchr1_fast.host_adamw import HostAdamW
from searchr1_fast.host_memory import host_memory
from searchr1_fast.offload import FrozenWeights
from searchr1_fast.packing import pack
from searchr1_fast.policy import Policy, to_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)
PARTS = {"optimizer": True, "reference": True, "replica": True}


def test_host_memory_is_page_locked():
    memory = host_memory(3 << 20, DEVICE)
    assert memory.is_pinned() and not memory.any()


def test_moments_in_pieces_are_adamw_to_the_bit_and_wait_for_nothing():
    """The pieces are small compared to the parameters, so buffers are reused while copies are under way."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(4096, 1024), (1024,), (333, 77), (1 << 22,)]
    plain = [torch.nn.Parameter(torch.randn(shape, device=DEVICE, generator=generator)) for shape in shapes]
    moved = [torch.nn.Parameter(parameter.detach().clone()) for parameter in plain]
    optimizers = (
        torch.optim.AdamW(plain, 1e-2, (0.9, 0.99), weight_decay=0.1, fused=True),
        HostAdamW(moved, 1e-2, (0.9, 0.99), 0.1, piece=1 << 16),
    )
    for number in range(6):
        for one, other in zip(plain, moved, strict=True):
            one.grad = torch.randn(one.shape, device=DEVICE, generator=generator)
            other.grad = one.grad.clone()
        optimizers[0].step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first step creates its state
        try:
            optimizers[1].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    optimizers[1].wait()
    for one, other in zip(plain, moved, strict=True):
        assert torch.equal(one, other)
        expected, state = (optimizer.state[p] for optimizer, p in zip(optimizers, (one, other), strict=True))
        for key, tensor in expected.items():
            assert torch.equal(state[key].cpu(), tensor.cpu()), key
        assert state["exp_avg"].device.type == "cpu" and state["exp_avg"].is_pinned()


def test_frozen_weights_take_no_memory_while_they_wait():
    module = torch.nn.Linear(4096, 4096, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    expected = module.weight.cpu()
    before = torch.cuda.memory_allocated()
    at_hand = FrozenWeights(module, torch.nn.Identity())
    assert before - torch.cuda.memory_allocated() >= 2 * 4096 * 4096
    for _ in range(3):
        with at_hand:
            assert torch.equal(module.weight.cpu(), expected)
    assert before - torch.cuda.memory_allocated() >= 2 * 4096 * 4096


def test_a_policy_is_smaller_and_learns_the_same(make_config, make_decoder, make_trajectory):
    """In bf16, where FSDP holds the weights. Nearly the same, as a GPU may add gradients in any order."""
    trajectories = [make_trajectory(seed, [(False, 9), (True, 8)]) for seed in range(5)]
    norms, weights, resident = [], [], []
    for offload in ({}, PARTS):
        with process("cuda") as ranks:
            model = {"path": make_config().model.path, "dtype": "bfloat16", "offload": offload}
            config = make_config(model=model, algorithm={"kl_coefficient": 0.1})
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            decoders = make_decoder(0).to(ranks.device), make_decoder(1).to(ranks.device, torch.bfloat16)
            policy = Policy(decoders[0], config, ranks, decoders[1])
            batches = [to_device(b, ranks.device) for b in pack(trajectories, [1.0, -1.0, 0.5, -0.5, 2.0], 40)]
            for number in range(2):
                policy.release_replica()
                norms.append(policy.update(batches, 40, policy.reference_logprobs(batches), on_policy=number == 0)[1])
                resident.append(torch.cuda.memory_allocated() - before)
                policy.sync_replica()
            tensors = policy.tensors()
            assert {t.device.type for key, t in tensors.items() if key.endswith("exp_avg")} == (
                {"cpu"} if offload else {"cuda"}
            )
            weights.append(torch.cat([p.detach().float().cpu().flatten() for p in policy.replica.parameters()]))
            num_parameters = len(weights[-1])
            del policy, decoders, batches, tensors
    assert norms[2:] == pytest.approx(norms[:2], rel=1e-3)
    assert ((weights[0] - weights[1]).abs() < 1e-2 * weights[0].abs() + 1e-3).float().mean() > 0.99
    # Moments, reference and replica: 8 + 2 + 2 bytes per parameter.
    assert resident[1] - resident[3] > 0.8 * 12 * num_parameters
