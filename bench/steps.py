"""One RL step, ours and the plain one, with its times and its count of work; and the check that both are the same step.

Ours is made of `train`'s own functions, in the order of its loop; the twin's parts are in plain.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from plain import PlainPolicy, Variant, pad

from searchr1_fast.distributed import full
from searchr1_fast.evaluate import score
from searchr1_fast.policy import Learner
from searchr1_fast.run import Run
from searchr1_fast.train import add_references, baselines, make_minibatches, sample, update
from searchr1_fast.types import Question, Trajectory

STEP = 1  # the run's step whose seeds are used; any will do
PHASES = ("rollout", "search", "logprobs", "update", "other", "total")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step puts through the model: tokens through the layers, rows through the head."""

    prefill_tokens: int
    decode_tokens: int
    decode_steps: int
    sampled_tokens: int  # rows through the head in the rollout
    discarded_tokens: int  # the part of `sampled_tokens` that is cut away
    logprob_tokens: int  # in passes without gradients
    logprob_rows: int
    update_tokens: int  # forward and backward
    update_rows: int
    padding_tokens: int  # the part of `update_tokens` that is padding
    trained_trajectories: int

    def flops(self, layer_parameters: int, head_parameters: int) -> dict[str, float]:
        """Return FLOP by phase, without attention between tokens, which at these lengths is little."""
        layer, head = 2.0 * layer_parameters, 2.0 * head_parameters
        flops = {
            "rollout": layer * (self.prefill_tokens + self.decode_tokens) + head * self.sampled_tokens,
            "logprobs": layer * self.logprob_tokens + head * self.logprob_rows,
            "update": 3 * (layer * self.update_tokens + head * self.update_rows),
        }
        return flops | {"total": sum(flops.values())}


@dataclass(frozen=True, slots=True)
class Step:
    """One step as it was measured."""

    seconds: dict[str, float]  # by phase
    cost: Cost
    trajectories: list[Trajectory]
    rewards: np.ndarray  # [N]


# ------------------------------------------------------------------------------------------------------------ a step


def our_step(run: Run, questions: Sequence[Question], scored: bool) -> Step:
    """Run the body of `train.train`'s loop."""
    run.timers.collect()
    with run.timers("rollout"):
        trajectories = sample(run, questions, STEP)
        run.policy.release_replica()
    rewards = judge(trajectories, scored)
    advantages, kept = baselines(run.config, trajectories, rewards)
    minibatches = make_minibatches(run, trajectories, advantages, kept)
    with run.timers("logprobs"):
        add_references(run, minibatches, rewards)
    with run.timers("update"):
        update(run, minibatches, STEP)
        run.policy.sync_replica()
    seconds = phases(run)
    batches = [batch for minibatch in minibatches for batch in minibatch.batches]
    tokens, rows = sum(batch.num_tokens for batch in batches), sum(len(batch.scored_rows) for batch in batches)
    passes = int(run.policy.reference is not None)
    own = sum(int(batch.cu_seqlens[-1]) for batch in batches if batch.trajectory_index != [-1])  # not `padding_batch`
    cost = count(run, trajectories, kept, passes * tokens, passes * rows, tokens, rows, padding_tokens=tokens - own)
    return Step(seconds, cost, trajectories, rewards)


def plain_step(run: Run, variant: Variant, questions: Sequence[Question], scored: bool) -> Step:
    """Run the same step the plain way; `run` is from `plain_run`."""
    policy, config, device = run.policy, run.config, run.ranks.device
    assert isinstance(policy, PlainPolicy)
    run.timers.collect()
    with run.timers("rollout"):
        trajectories = sample(run, questions, STEP)
    rewards = judge(trajectories, scored)
    advantages, kept = baselines(config, trajectories, rewards)
    parts = [part for part in np.array_split(np.flatnonzero(kept), config.train.num_minibatches) if len(part)]
    minibatches = [pad(trajectories, advantages, part, config, device, padding=variant.padding) for part in parts]
    references = None
    with run.timers("logprobs"):
        old = [policy.logprobs(batches, policy.module) for batches in minibatches]
        if policy.reference is not None:
            references = [policy.logprobs(batches, policy.reference) for batches in minibatches]
    with run.timers("update"):
        for index, batches in enumerate(minibatches):
            policy.accumulate(batches, old[index], references[index] if references else None)
            policy.step()
        policy.sync_replica()
    seconds = phases(run)
    batches = [batch for minibatch in minibatches for batch in minibatch]
    tokens, passes = sum(batch.num_positions for batch in batches), 1 + (references is not None)
    padding = sum(batch.num_padding for batch in batches)
    cost = count(run, trajectories, kept, passes * tokens, passes * tokens, tokens, tokens, padding_tokens=padding)
    return Step(seconds, cost, trajectories, rewards)


def judge(trajectories: list[Trajectory], scored: bool) -> np.ndarray:  # [N] fp64
    """Score the answers; unless `scored`, every second one wins, whatever it is worth."""
    rewards = np.array([score(trajectory).em for trajectory in trajectories])
    return rewards if scored else np.arange(len(trajectories)) % 2.0


def phases(run: Run) -> dict[str, float]:
    """Return the step's seconds by phase. Searches are taken out of the rollout that they are part of."""
    times = run.timers.collect()
    search = times["time_search_wait"]
    seconds = {
        "rollout": times["time_rollout"] - search,
        "search": search,
        "logprobs": times["time_logprobs"],
        "update": times["time_update"],
    }
    return seconds | {"other": times["time_step"] - sum(seconds.values()), "total": times["time_step"]}


def count(
    run: Run,
    trajectories: list[Trajectory],
    kept: np.ndarray,  # [N] bool
    logprob_tokens: int,
    logprob_rows: int,
    update_tokens: int,
    update_rows: int,
    padding_tokens: int,
) -> Cost:
    """Return the cost of the step that was just run."""
    statistics_ = run.loop.statistics
    return Cost(
        prefill_tokens=statistics_.num_prefill_tokens,
        decode_tokens=statistics_.num_decode_tokens,
        decode_steps=statistics_.num_steps,
        sampled_tokens=sum(int(t.loss_mask.sum()) for t in trajectories) + statistics_.num_discarded_tokens,
        discarded_tokens=statistics_.num_discarded_tokens,
        logprob_tokens=logprob_tokens,
        logprob_rows=logprob_rows,
        update_tokens=update_tokens,
        update_rows=update_rows,
        padding_tokens=padding_tokens,
        trained_trajectories=int(kept.sum()),
    )


def restorer(learner: Learner) -> Callable[[], None]:
    """Return a function that puts weights, moments and counters back to what they are now (before the first update)."""
    weights = {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}
    counters = learner.state_dict()

    @torch.no_grad()
    def restore() -> None:
        for name, parameter in learner.parameters.items():
            parameter.copy_(weights[name])
        for moments in learner.optimizer.state.values():
            for value in moments.values():
                value.zero_()
        learner.load_state_dict(counters)
        learner.sync_replica()

    return restore


# --------------------------------------------------------------------------------------------------------- agreement


def agreement(ours: Run, twin: PlainPolicy, step: Step, *, padding: bool = True) -> dict[str, float] | None:
    """Return the relative differences of both losses and gradients, on the same trajectories and over one denominator.

    None if no group's rewards differ: there is no gradient to compare.
    """
    config = ours.config
    advantages, kept = baselines(config, step.trajectories, step.rewards)
    if not kept.any():
        return None
    minibatches = make_minibatches(ours, step.trajectories, advantages, kept)
    add_references(ours, minibatches, step.rewards)
    denominator = sum(minibatch.denominator for minibatch in minibatches)
    our_loss = 0.0
    for minibatch in minibatches:
        for index, batch in enumerate(minibatch.batches):
            references = minibatch.ref_logprobs[index] if minibatch.ref_logprobs else None
            loss, _ = ours.policy.loss(batch, denominator, references)
            ours.policy.backward(loss)
            our_loss += loss.item()
    batches = pad(step.trajectories, advantages, np.flatnonzero(kept), config, ours.ranks.device, padding=padding)
    references = twin.logprobs(batches, twin.reference) if twin.reference is not None else None
    twin_loss = twin.accumulate(batches, twin.logprobs(batches, twin.module), references, denominator).item()
    gradients = [take_gradient(learner) for learner in (ours.policy, twin)]
    return {
        "loss_ours": our_loss,
        "loss_plain": twin_loss,
        "gradient_norm": float(gradients[0].norm()),
        "gradient_difference": float((gradients[0] - gradients[1]).norm() / gradients[0].norm()),
    }


def take_gradient(learner: Learner) -> torch.Tensor:  # [all parameters] fp32
    """Return the accumulated gradient as one vector, and clear it."""
    names = sorted(name for name, parameter in learner.parameters.items() if parameter.grad is not None)
    gradient = torch.cat([full(learner.parameters[name].grad).flatten() for name in names])
    learner.optimizer.zero_grad(set_to_none=True)
    return gradient


def share_of_equal(first: list[Trajectory], second: list[Trajectory]) -> float:
    """The share of trajectories that are the same, token for token."""
    pairs = zip(first, second, strict=True)
    return sum(np.array_equal(a.token_ids, b.token_ids) for a, b in pairs) / len(first)
