"""Activation checkpointing: the same gradients to the bit, with fewer bytes kept for the backward pass."""

from __future__ import annotations

import pytest
import torch

from searchr1_fast.critic import Critic
from searchr1_fast.distributed import full, process
from searchr1_fast.losses import value_loss
from searchr1_fast.models import Decoder, DecoderConfig
from searchr1_fast.packing import pack
from searchr1_fast.policy import Policy

PIECES = [(False, 40), (True, 20), (False, 60), (True, 12)]


@pytest.fixture
def batch(make_trajectory):
    """Six sequences of two questions, three per prompt: a tree; the last layer works on some of its rows."""
    trajectories = [make_trajectory(seed, PIECES) for seed in range(6)]
    for index, trajectory in enumerate(trajectories):
        trajectory.token_ids[:40] = trajectories[index // 3 * 3].token_ids[:40]
    (packed,) = pack(trajectories, [0.5, -1.0, 2.0, -0.5, 1.0, 0.25], 10_000)
    assert packed.prefixes is not None and len(packed.scored_rows) < packed.num_tokens
    return packed


def loss_of(learner, batch) -> torch.Tensor:
    if isinstance(learner, Policy):
        return learner.loss(batch, batch.num_policy_tokens)[0]
    targets = torch.linspace(-1, 1, batch.num_policy_tokens)
    return value_loss(learner.module(batch), targets, torch.zeros_like(targets), 0.5, batch.num_policy_tokens)


def saved_bytes(run, parameters) -> int:
    """-> bytes that autograd keeps for the backward pass: each piece of memory once, without parameters."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, torch.Tensor] = {}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = tensor  # held, so that its memory is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        output = run()
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return num_bytes


def gradients(learner, batch) -> dict[str, torch.Tensor]:
    loss_of(learner, batch).backward()
    found = {name: full(parameter.grad).clone() for name, parameter in learner.parameters.items()}
    learner.optimizer.zero_grad()
    return found


@pytest.mark.parametrize(
    ("learner_class", "dtype", "compiled"),
    [
        (Policy, "float32", False),
        (Policy, "bfloat16", False),  # one rank of FSDP2, whose parameters come and go
        (Policy, "bfloat16", True),
        (Critic, "float32", False),
        (Critic, "bfloat16", False),
    ],
)
def test_gradients_are_the_same_to_the_bit(make_config, make_decoder, batch, learner_class, dtype, compiled):
    found = {}
    with process("cpu", 1, 0) as ranks:
        for mode in ("none", "selective", "full"):
            config = make_config(train={"activation_checkpointing": mode}, model={"dtype": dtype})
            decoder = make_decoder(3)
            if compiled:
                decoder.compile_blocks("aot_eager")
            learner = learner_class(decoder, config, ranks)
            if learner_class is Critic:
                torch.nn.init.constant_(learner.module.value_head.weight, 0.1)
            assert {block.recompute for block in learner.module.decoder.layers} == {mode}
            found[mode] = gradients(learner, batch)
    assert any(gradient.abs().max() > 0 for gradient in found["none"].values())
    for mode in ("selective", "full"):
        for name, gradient in found["none"].items():
            assert torch.equal(found[mode][name], gradient), (mode, name)


def test_less_is_kept(batch):
    """An extra layer costs its input with `full`; with `selective` query, key, value and attention's results."""
    costs = {}
    for mode in ("none", "selective", "full"):
        kept = []
        for num_layers in (2, 3):
            decoder = wide_decoder(num_layers)
            decoder.checkpoint_blocks(mode)
            kept.append(saved_bytes(lambda d=decoder: hidden_of(d, batch), decoder.parameters()))
        costs[mode] = kept[1] - kept[0]
    rows, config = batch.num_tokens, decoder.config
    width = config.hidden_size
    heads = config.head_dim * config.num_attention_heads
    keys = config.head_dim * config.num_key_value_heads
    assert costs["full"] == rows * width * 4
    assert costs["selective"] < 0.55 * costs["none"]
    assert costs["selective"] >= costs["full"] + rows * (2 * heads + 2 * keys) * 4


def wide_decoder(num_layers: int) -> Decoder:
    """-> a decoder whose MLP is about as much wider than the rest as in the published models."""
    torch.manual_seed(0)
    return Decoder(
        DecoderConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=320,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def hidden_of(decoder: Decoder, batch) -> torch.Tensor:
    return decoder.scored_hidden(batch)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_generation_is_left_alone(batch, mode):
    """Without gradients there is nothing to recompute."""
    decoder = wide_decoder(2)
    with torch.no_grad():
        expected = hidden_of(decoder, batch)
        decoder.checkpoint_blocks(mode)
        assert torch.equal(hidden_of(decoder, batch), expected)
