"""The trainer. `train` is the loop, and reads like this picture of the data flow:

    questions -> rollout -> reward -> advantage -> packed minibatches -> update -> sync -> metrics -> eval, checkpoint

Every rank runs the whole loop. Ranks divide the rollout by whole groups and exchange the results, so every rank has all
trajectories: rewards, baselines, dropped groups and metrics need no further thought about ranks, and the update's
work is dealt out by length. What a trajectory samples depends only on the run's seed, the step and its place in the
step. So a run repeats on any number of ranks, and a resumed run equals one that was never stopped.

Left out: rollouts that overlap the update. They would make every minibatch off-policy.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch

from searchr1_fast.advantage import grpo_advantages, ppo_advantages, token_rewards
from searchr1_fast.agreement import AgreementWatch
from searchr1_fast.bad_updates import FOLDER, BadUpdate, MicroBatch, NotKept, write_bad_update
from searchr1_fast.cli import train_parser
from searchr1_fast.config import Config, load_config
from searchr1_fast.dry_run import dry_run
from searchr1_fast.errors import INTERRUPTED, entry_point, sentence
from searchr1_fast.evaluate import score, trajectory_seed
from searchr1_fast.losses import accumulate_metrics
from searchr1_fast.packing import lay_out, pack_rank
from searchr1_fast.policy import Learner, padding_batch, to_device
from searchr1_fast.rollout import RolloutRequest
from searchr1_fast.run import Run, UserInterface, is_due, open_run
from searchr1_fast.step_metrics import Updates, rollout_metrics, update_metrics
from searchr1_fast.types import PackedBatch, Question, SearchError, Trajectory


def train(config: Config, ui: UserInterface | None = None) -> dict[str, Any]:
    """Train as the configuration says, and write to its run folder.

    Returns `step`, `interrupted`, and the metrics of each evaluation set as `before` and `after`.
    """
    agreement = AgreementWatch(config)
    with open_run(config, ui) as run, StopSignal() as stop:
        if run.step == 0:
            run.write({"step": 0} | run.evaluate(0))
        for step in range(run.step + 1, config.train.num_steps + 1):
            run.checkpoints.check()
            run.timers.collect()  # discarded: a step's time and searches leave out evaluations and checkpoints
            run.environment.take_statistics()
            with run.timers("rollout"):
                questions = run.stream.next(config.train.questions_per_step)
                trajectories = sample(run, questions, step)
                run.policy.release_replica()
            run.park_searches()
            rewards = np.array([score(trajectory).em for trajectory in trajectories])  # [N]
            advantages, kept = baselines(config, trajectories, rewards)  # [N], [N]
            minibatches = make_minibatches(run, trajectories, advantages, kept)
            with run.timers("ref"):
                add_references(run, minibatches, rewards)
            with run.timers("update"):
                updates = update(run, minibatches, step)
            with run.timers("sync"):
                handover = run.sync()
            run.unpark_searches()
            run.step = step
            metrics = {"step": step} | rollout_metrics(run, trajectories, rewards, kept)
            metrics |= update_metrics(run, updates)
            metrics |= run.take_search_statistics().row() | handover
            if warning := agreement.warning(metrics):
                run.ui.note(warning)
            run.ui.step(metrics)
            stopped, last = bool(run.ranks.max(stop.requested)), step == config.train.num_steps
            if last or (is_due(step, config.train.eval_every) and not stopped):
                metrics |= run.evaluate(step)
            if run.note_best(metrics) or last or stopped or is_due(step, config.checkpoint.every):
                metrics |= run.stage_checkpoint()
            run.write(metrics, trajectories)  # before the checkpoint, so that all of its rows are on disk
            run.checkpoints.start()
            if stopped and not last:
                run.checkpoints.wait()
                run.ui.note(f"stopped after step {step}, and saved; go on with run.resume=true")
                break
        return run.finish()


# -------------------------------------------------------------------------------------------- the arrows of the loop


@dataclass(slots=True)
class Minibatch:
    """This rank's share of one optimizer step, in micro-batches, padded to as many as the busiest rank has."""

    batches: list[PackedBatch]
    denominator: int  # policy tokens, all ranks together
    num_sampled: int  # how many of them the policy wrote; all, with `mask_observations`
    imbalance: float  # how much ranks wait for the slowest: `packing.Layout.imbalance`
    ref_logprobs: list[torch.Tensor] | None = None  # [P] fp32 each
    returns: list[torch.Tensor] = field(default_factory=list)  # PPO: [P] fp32 each
    old_values: list[torch.Tensor] = field(default_factory=list)  # PPO: [P] fp32 each


def sample(run: Run, questions: Sequence[Question], step: int) -> list[Trajectory]:
    """Sample `group_size` trajectories for every question; every rank gets all of them, in order."""
    seed, size = run.config.run.seed, run.config.algorithm.group_size
    groups = []
    for group, question in enumerate(questions):
        prompt, seeds = run.prompt(question), (trajectory_seed(seed, step, group * size + i) for i in range(size))
        groups.append([RolloutRequest(question, group, prompt, seed) for seed in seeds])
    mine = [request for group in run.ranks.share(groups) for request in group]
    with run.ui.phase("rollout", len(mine)) as progress:
        trajectories = run.loop.run(mine, progress)
    run.timers.add("search_wait", run.loop.statistics.time_search_wait)
    run.timers.add("recording", run.loop.statistics.time_recording)
    if run.ranks.device.type == "cuda":
        run.engine.free_cache()  # for the update, unless there is room for both
    shared = run.ranks.unshare([trajectories[i : i + size] for i in range(0, len(trajectories), size)])
    trajectories = [trajectory for group in shared for trajectory in group]
    count_failed_searches(run, trajectories, step)
    return trajectories


def count_failed_searches(run: Run, trajectories: list[Trajectory], step: int) -> None:
    """Report how many searches, on all ranks, failed and ended only their own trajectories, and why.

    Raises SearchError on every rank if no search worked, since the policy would then learn only from trajectories that
    do not search, or if no trajectory is left.
    """
    statistics, error = run.loop.statistics, run.loop.last_error
    own = statistics.num_failed_searches, statistics.num_searches, error and sentence(error)
    failed, worked, causes = zip(*run.ranks.gather(own), strict=True)
    if not any(failed):
        return
    cause = next(filter(None, causes))
    if not any(worked) or not any(trajectory.is_judged for trajectory in trajectories):
        what = "no trajectory is left" if any(worked) else "none worked"
        raise SearchError(f"step {step}: {sum(failed)} searches failed, and {what}: {cause}") from error
    run.ui.note(f"step {step}: {sum(failed)} searches failed, and their trajectories do not count: {cause}")


def baselines(
    config: Config,
    trajectories: list[Trajectory],
    rewards: np.ndarray,  # [N] fp64
) -> tuple[np.ndarray, np.ndarray]:  # advantages [N] fp32, kept [N] bool
    """Compute GRPO's advantages, and which trajectories to train on. PPO's advantages come later, from the critic.

    A trajectory whose search failed says nothing about the policy: it is not trained on, nor part of its group's
    baseline.
    """
    advantages = np.zeros(len(trajectories), dtype=np.float32)
    is_judged = np.array([t.is_judged for t in trajectories])
    kept = is_judged & np.array([bool(t.loss_mask.any()) for t in trajectories])
    if config.algorithm.name == "grpo":
        groups = np.array([t.group for t in trajectories])
        normalize = config.algorithm.normalize_std
        advantages[is_judged], varied = grpo_advantages(rewards[is_judged], groups[is_judged], normalize)
        if config.algorithm.drop_zero_variance_groups:
            kept[is_judged] &= varied
    return advantages, kept


def make_minibatches(
    run: Run,
    trajectories: list[Trajectory],
    advantages: np.ndarray,  # [N] fp32
    kept: np.ndarray,  # [N] bool
) -> list[Minibatch]:
    """Split the kept groups among minibatches, each minibatch into micro-batches, and deal these out to ranks."""
    config, ranks = run.config, run.ranks
    groups = sorted({trajectories[i].group for i in np.flatnonzero(kept)})
    minibatches = []
    for chosen in np.array_split(groups, config.train.num_minibatches):
        members = [int(i) for i in np.flatnonzero(kept) if trajectories[i].group in chosen]
        if not members:
            continue  # fewer groups than minibatches
        layout = lay_out(trajectories, config.train.tokens_per_microbatch, ranks.world_size, indices=members)
        mask_observations = config.algorithm.mask_observations
        batches = pack_rank(trajectories, advantages, layout, ranks.rank, mask_observations=mask_observations)
        denominator = int(ranks.sum(sum(batch.num_policy_tokens for batch in batches)))
        batches += [padding_batch() for _ in range(layout.num_rounds - len(batches))]
        on_device = [to_device(batch, ranks.device) for batch in batches]
        num_sampled = sum(int(trajectories[i].loss_mask.sum()) for i in members)
        minibatches.append(Minibatch(on_device, denominator, num_sampled, layout.imbalance))
    return minibatches


def add_references(run: Run, minibatches: list[Minibatch], rewards: np.ndarray) -> None:
    """Add everything that is computed before the weights change: reference log-probs, values, PPO's advantages."""
    algorithm, device = run.config.algorithm, run.ranks.device
    if run.policy.reference is not None:
        with run.policy.reference_at_hand:
            for minibatch in minibatches:
                minibatch.ref_logprobs = run.policy.reference_logprobs(minibatch.batches)
    if run.critic is None:
        return
    batches, values, outcomes = [], [], []
    for minibatch in minibatches:
        minibatch.old_values = run.critic.values(minibatch.batches)
        references = minibatch.ref_logprobs if algorithm.kl_in_reward else None
        for index, batch in enumerate(minibatch.batches):
            outcome = torch.tensor(rewards[batch.trajectory_index], dtype=torch.float32, device=device)  # [S]
            reference = references[index] if references else None
            penalty = {"kl_coefficient": algorithm.kl_coefficient, "kl_kind": algorithm.kl_kind}
            outcomes.append(token_rewards(batch, outcome, ref_logprobs=reference, **penalty))
        batches += minibatch.batches
        values += minibatch.old_values
    batches, returns = ppo_advantages(
        batches,
        outcomes,
        values,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
        whiten=algorithm.whiten_advantages,
        all_reduce=run.ranks.all_reduce,
    )
    for minibatch in minibatches:
        count = len(minibatch.batches)
        minibatch.batches, batches = batches[:count], batches[count:]
        minibatch.returns, returns = returns[:count], returns[count:]


def update(run: Run, minibatches: list[Minibatch], step: int) -> Updates:
    """Make one optimizer step per minibatch. Only the first is on-policy, whatever the sampler's rounding."""
    algorithm, updates = run.config.algorithm, Updates()
    if not minibatches:
        run.ui.note(f"step {step}: no group has rewards that differ; no update")
    with run.ui.phase("update", len(minibatches)) as progress:
        for index, minibatch in enumerate(minibatches):
            updates.num_tokens += minibatch.denominator
            updates.imbalances.append(minibatch.imbalance)
            if run.critic is not None:
                arguments = minibatch.batches, minibatch.returns, minibatch.old_values, minibatch.denominator
                sums, norm = run.critic.update(*arguments)
                accumulate_metrics(updates.metrics, sums)
                updates.critic_grad_norms.append(norm)
                keep_bad_update(run, run.critic, norm, minibatch, step, index)
            if run.critic is None or step > algorithm.critic_warmup_steps:
                arguments = minibatch.batches, minibatch.denominator, minibatch.ref_logprobs
                sums, norm = run.policy.update(*arguments, on_policy=index == 0)
                if index == 0:
                    updates.first = sums
                    updates.num_first_tokens, updates.num_first_sampled = minibatch.denominator, minibatch.num_sampled
                accumulate_metrics(updates.metrics, sums)
                updates.grad_norms.append(norm)
                keep_bad_update(run, run.policy, norm, minibatch, step, index)
            progress(index + 1, len(minibatches))
    return updates


def keep_bad_update(run: Run, learner: Learner, norm: float, minibatch: Minibatch, step: int, index: int) -> None:
    """Write a skipped update to disk for `searchr1 replay`, if there is room; after three in a row, end the run. Do
    nothing for an update that was applied."""
    if math.isfinite(norm):
        return
    of_policy, count = learner is run.policy, len(minibatch.batches)
    references = minibatch.ref_logprobs if of_policy else None
    returns, old_values = ([], []) if of_policy else (minibatch.returns, minibatch.old_values)
    columns = [values or [None] * count for values in (references, returns, old_values)]
    bad = BadUpdate(
        step=step,
        minibatch=index,
        learner=learner.name,
        num_updates=learner.num_updates,
        denominator=minibatch.denominator,
        on_policy=index == 0,
        diagnosis=learner.diagnosis,
        config=run.config.to_yaml(),
        micro_batches=[MicroBatch(run.ranks.rank, *row) for row in zip(minibatch.batches, *columns, strict=True)],
    )
    folder = run.config.run_directory / FOLDER
    try:
        kept = f"searchr1 replay {write_bad_update(folder, bad, learner, getattr(torch, run.config.model.dtype))}"
    except NotKept as failure:
        kept = str(failure)
    run.ui.note(f"step {step}: skipped an update of the {learner.name}: {bad.diagnosis}; {kept}")
    learner.raise_if_diverged(f"; {kept}")


class StopSignal:
    """Stop after the current step on Ctrl-C or SIGTERM, and at once on a second Ctrl-C.

    torchrun passes signals on and kills what still runs 30 seconds later; if steps take longer, signal the ranks' own
    processes instead.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers to be set only here
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested and os.environ.get("RANK", "0") == "0":
            # A handler may run in the middle of a print, so bypass Python's buffers and locks.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops now and loses it\n")
        self.requested = True


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """`searchr1 train`."""
    arguments = train_parser().parse_intermixed_args(argv)
    overrides = [*arguments.overrides, *(["run.resume=true"] if arguments.resume else [])]
    config = load_config(arguments.config, overrides)
    planned = {"device_memory": arguments.device_memory, "ranks": arguments.ranks, "shape": arguments.shape}
    if arguments.dry_run:
        return dry_run(config, **planned)
    if stray := [f"--{name.replace('_', '-')}" for name, value in planned.items() if value is not None]:
        raise ValueError(f"{stray[0]} goes with --dry-run; a run finds out by itself")
    return INTERRUPTED if train(config)["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
