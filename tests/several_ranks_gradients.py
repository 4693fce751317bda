"""Started by test_denominators.py on several ranks: `several_ranks_gradients.py OUTPUT CONFIG…`.

It takes one update of each configuration, and keeps loss and gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from searchr1_fast.config import Config, load_config
from searchr1_fast.critic import Critic
from searchr1_fast.distributed import Ranks, full, process
from searchr1_fast.models import meta_model, resolve
from searchr1_fast.models.own_rows import own_rows
from searchr1_fast.policy import Learner, Policy
from searchr1_fast.step_metrics import Updates, update_metrics
from searchr1_fast.train import add_references, baselines, make_minibatches
from searchr1_fast.train import update as take_update
from searchr1_fast.types import FinishReason, Question, Trajectory

NUM_TRAJECTORIES = 13  # a prime, so that neither ranks nor micro-batches share it evenly


def make_trajectories(vocab_size: int) -> list[Trajectory]:
    """Trajectories of various lengths, in groups of three with a shared prompt, and one alone; the last but one is
    silent."""
    generator = np.random.default_rng(0)
    trajectories = []
    for number in range(NUM_TRAJECTORIES):
        group, speaks = number // 3, number != NUM_TRAJECTORIES - 2
        prompt = np.random.default_rng(100 + group).integers(0, vocab_size, 6)
        sizes = generator.integers(1, 12, 3)
        mask = np.repeat([False, speaks, False, speaks], [6, *sizes])
        token_ids = np.concatenate([prompt, generator.integers(0, vocab_size, sizes.sum())])
        logprobs = np.where(mask, generator.normal(-np.log(vocab_size), 0.3, len(mask)), 0.0).astype(np.float32)
        question = Question(f"q{group}", "k", ("b",), "letters")
        trajectories.append(Trajectory(question, group, token_ids, mask, logprobs, 6, [], FinishReason.ANSWER))
    return trajectories


def one_update(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Metrics and every learner's gradients of one step of the loop, from trajectories to the optimizer."""
    directory = resolve(config.model.path)
    reference = None if config.model.lora.rank else meta_model(directory)
    policy = Policy(meta_model(directory), config, ranks, reference, weights=directory)
    critic = None
    if config.algorithm.name == "ppo" and config.model.lora.rank:
        critic = Critic(policy.replica.on_same_base(), config, ranks)
    elif config.algorithm.name == "ppo":
        critic = Critic(meta_model(directory), config, ranks, weights=directory)
    learners = [policy] if critic is None else [policy, critic]
    with torch.no_grad():
        # As in the middle of training: at its start, values, an adapter's B and the KL to the reference are all zero.
        for learner in learners:
            stir(learner)
    policy.sync_replica()
    gradients: dict[str, torch.Tensor] = {}
    for learner in learners:
        learner.optimizer.step = lambda learner=learner: keep(learner, gradients)
    run = SimpleNamespace(config=config, ranks=ranks, policy=policy, critic=critic, ui=Silent())
    trajectories = make_trajectories(policy.replica.config.vocab_size)
    rewards = np.array([(number * 7 % 5) / 4 for number in range(len(trajectories))])
    advantages, kept = baselines(config, trajectories, rewards)
    minibatches = make_minibatches(run, trajectories, advantages, kept)
    add_references(run, minibatches, rewards)
    updates: Updates = take_update(run, minibatches, step=1)
    return {
        "metrics": update_metrics(run, updates),
        "gradients": gradients,
        "micro_batches": [len(minibatch.batches) for minibatch in minibatches],
    }


def stir(learner: Learner) -> None:
    """Move every parameter a little, the same on any number of ranks."""
    for number, name in enumerate(sorted(learner.parameters)):
        parameter = learner.parameters[name].detach()
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05
        local, rows = own_rows(parameter)
        local.add_(noise[rows])


def keep(learner: Learner, gradients: dict[str, torch.Tensor]) -> None:
    """Keep the gradients, in place of the optimizer's step."""
    for name, parameter in learner.parameters.items():
        gradients[f"{learner.name}.{name}"] = full(parameter.grad).clone()


class Silent:
    """A user interface that only has to keep silent."""

    def note(self, text: str) -> None:
        raise AssertionError(text)

    def phase(self, name: str, total: int) -> Silent:
        return self

    def __enter__(self):
        return lambda *counts: None

    def __exit__(self, *error) -> None:
        pass


def main() -> None:
    """Write OUTPUT/<world size>.pt: the results of each configuration's update, by its name."""
    output = Path(sys.argv[1])
    with process("cpu", num_threads=1) as ranks:
        reports = {Path(path).stem: one_update(load_config(path), ranks) for path in sys.argv[2:]}
        if ranks.is_main:
            torch.save(reports, output / f"{ranks.world_size}.pt")


if __name__ == "__main__":
    main()
