"""How many parameters a run trains, on a rank and in all, from shapes without memory; used by `memory_plan`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from searchr1_fast.config import Config, LoraConfig
from searchr1_fast.critic import ValueModel
from searchr1_fast.models import Decoder, DecoderConfig
from searchr1_fast.models.lora import adapter_parameters, add_adapter


def meta_decoder(decoder: DecoderConfig) -> Decoder:
    """A decoder on the meta device: shapes without memory."""
    with torch.device("meta"):
        return Decoder(decoder)


def meta_critic(decoder: DecoderConfig) -> ValueModel:
    """A critic's model, likewise."""
    with torch.device("meta"):
        return ValueModel(Decoder(decoder))


def meta_adapter(decoder: DecoderConfig, lora: LoraConfig) -> list[nn.Parameter]:
    """A and B of every adapted layer, likewise; none at rank 0."""
    if not lora.rank:
        return []
    model = meta_decoder(decoder)
    add_adapter(model, lora.rank, lora.alpha, lora.targets)
    return list(adapter_parameters(model).values())


def policy_parameters(config: Config, decoder: DecoderConfig) -> list[nn.Parameter]:
    """What the policy learns, without memory: all of it, or its adapter."""
    return meta_adapter(decoder, config.model.lora) or list(meta_decoder(decoder).parameters())


def critic_parameters(config: Config, decoder: DecoderConfig) -> list[nn.Parameter]:
    """What a critic learns, likewise."""
    critic = meta_critic(decoder)
    adapter = meta_adapter(decoder, config.model.lora)
    return [*adapter, *critic.value_head.parameters()] if adapter else list(critic.parameters())


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers they hold; a module's `parameters()` has a tied head once."""
    return sum(parameter.numel() for parameter in parameters)


def sharded(parameters: Iterable[nn.Parameter], num_ranks: int) -> int:
    """How many numbers are on one rank: FSDP2 splits rows, and pads to equal parts."""
    return sum(-(-p.shape[0] // num_ranks) * (p.numel() // p.shape[0]) for p in parameters)


def itemsize(config: Config) -> int:
    """Bytes per number in the compute type."""
    return getattr(torch, config.model.dtype).itemsize


def is_ppo(config: Config) -> bool:
    """Whether there is a critic."""
    return config.algorithm.name == "ppo"


def is_wrapped(config: Config, num_ranks: int) -> bool:
    """Whether FSDP holds the weights, and the replica is a module of its own (`Policy`)."""
    return num_ranks > 1 or config.model.dtype != "float32"
