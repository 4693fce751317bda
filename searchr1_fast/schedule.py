"""The learning rate of every update: linear warm-up, then constant, or a linear or half-cosine decay to a floor.

The schedule counts optimizer steps that were applied, not steps of the run: a rollout that leaves no group to learn
from does not advance it, nor does a skipped gradient. The formulas are those of transformers'
`get_*_schedule_with_warmup`, with one difference: there the first update has learning rate 0 and changes nothing (as in
the original, whose scheduler moves once per rollout); here the first of w has 1/w of the peak, the last all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from searchr1_fast.config import Config


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The rate by update number: `LearningRate(1e-6, num_warmup=10, num_updates=100)(n)` is that of update n."""

    peak: float
    num_warmup: int = 0  # updates
    num_updates: int = 1  # of the whole run
    shape: Literal["constant", "linear", "cosine"] = "constant"
    final_ratio: float = 0.0

    def __call__(self, update: int) -> float:
        """The learning rate of update number `update`, counted from 0; after the last, the final one."""
        if update < self.num_warmup:
            return self.peak * (update + 1) / self.num_warmup
        if self.shape == "constant":
            return self.peak
        done = min(1.0, (update - self.num_warmup) / max(1, self.num_updates - self.num_warmup))
        left = 1.0 - done if self.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.peak * (self.final_ratio + (1.0 - self.final_ratio) * left)


def policy_learning_rate(config: Config) -> LearningRate:
    """The policy's learning rate. With PPO, the policy makes no update during `algorithm.critic_warmup_steps`."""
    num_steps = config.train.num_steps
    if config.algorithm.name == "ppo":
        num_steps = max(1, num_steps - config.algorithm.critic_warmup_steps)
    return _learning_rate(config, config.optimizer.learning_rate, num_steps * config.train.num_minibatches)


def critic_learning_rate(config: Config) -> LearningRate:
    """The critic's learning rate: its own peak, the policy's shape, and its own warm-up if one is configured."""
    num_updates, ratio = config.train.num_steps * config.train.num_minibatches, config.optimizer.critic_warmup_ratio
    num_warmup = None if ratio is None else _share(ratio, num_updates)
    return _learning_rate(config, config.algorithm.critic_learning_rate, num_updates, num_warmup)


def _learning_rate(config: Config, peak: float, num_updates: int, num_warmup: int | None = None) -> LearningRate:
    """`num_warmup`: None takes the policy's, in steps or as a share."""
    optimizer = config.optimizer
    if num_warmup is None:
        num_warmup = optimizer.warmup_steps or _share(optimizer.warmup_ratio, num_updates)
    return LearningRate(peak, num_warmup, num_updates, optimizer.schedule, optimizer.final_learning_rate_ratio)


def _share(ratio: float, count: int) -> int:
    """Round down, as the original does, but not for a rounding error in the last bit: 0.29 of 100 is 29."""
    return int(ratio * count + 1e-6)
