"""How many parameters a run trains, on a rank and in all, from shapes without memory; what `memory_plan` multiplies."""

from __future__ import annotations

import torch
from torch import nn

from searchr1_fast.config import Config
from searchr1_fast.critic import ValueModel
from searchr1_fast.models import Decoder, DecoderConfig


def meta_decoder(decoder: DecoderConfig) -> Decoder:
    """Shapes without memory."""
    with torch.device("meta"):
        return Decoder(decoder)


def meta_critic(decoder: DecoderConfig) -> ValueModel:
    """The same, as the critic has it."""
    with torch.device("meta"):
        return ValueModel(Decoder(decoder))


def count(module: nn.Module) -> int:
    """Parameters; a tied head once."""
    return sum(parameter.numel() for parameter in module.parameters())


def sharded(module: nn.Module, num_ranks: int) -> int:
    """Parameters on a rank: FSDP2 splits rows, and fills up to equal parts."""
    return sum(-(-p.shape[0] // num_ranks) * (p.numel() // p.shape[0]) for p in module.parameters())


def itemsize(config: Config) -> int:
    """Of the compute type."""
    return getattr(torch, config.model.dtype).itemsize


def is_ppo(config: Config) -> bool:
    """Whether there is a critic."""
    return config.algorithm.name == "ppo"


def is_wrapped(config: Config, num_ranks: int) -> bool:
    """Whether FSDP holds the weights, and the replica is another module (`Policy`)."""
    return num_ranks > 1 or config.model.dtype != "float32"
