"""A run: everything that lives as long as it does, how it starts, how it is resumed, and what it leaves behind.

The loop in train.py moves it from step to step; nothing here knows what a step does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from searchr1_fast.checkpoint import Checkpoint, latest_checkpoint
from searchr1_fast.checkpoint_writer import CheckpointWriter
from searchr1_fast.config import Config
from searchr1_fast.console import Console
from searchr1_fast.critic import Critic
from searchr1_fast.curves import save_curves
from searchr1_fast.data import QuestionStream
from searchr1_fast.distributed import Ranks, process
from searchr1_fast.environment import Environment, build_environments
from searchr1_fast.errors import sentence
from searchr1_fast.evaluate import EvalResult, build_engine, evaluate
from searchr1_fast.files import whole_file
from searchr1_fast.memory_plan import plan_rank
from searchr1_fast.metrics import MetricsLog, PhaseTimers, check_is_new, read_metrics
from searchr1_fast.models import TextTokenizer, describe_attention, load_tokenizer, meta_model, resolve, save_weights
from searchr1_fast.models.adapter_files import check_start, write_adapter
from searchr1_fast.models.lora import adapter_scale, describe_adapter, fingerprint
from searchr1_fast.policy import Learner, Policy
from searchr1_fast.prompt import PromptBuilder
from searchr1_fast.retrieval.statistics import SearchStatistics
from searchr1_fast.rollout import Engine, SearchLoop, VllmEngine
from searchr1_fast.types import Progress, Trajectory


class UserInterface(Protocol):
    """How the loop reports to a person; `console.Console` is one. A phase yields `progress(finished, total)`."""

    def note(self, text: str) -> None: ...
    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Progress]: ...
    def step(self, metrics: Mapping[str, Any]) -> None: ...
    def evaluation(self, name: str, metrics: Mapping[str, Any]) -> None: ...
    def final(self, before: Mapping, after: Mapping, examples: tuple[Trajectory, Trajectory] | None = None) -> None: ...


@dataclass
class Run:
    """Everything that lives as long as the run does."""

    config: Config
    ranks: Ranks
    ui: UserInterface
    timers: PhaseTimers
    stream: QuestionStream
    environment: Environment  # of training
    evaluations: dict[str, Environment]
    tokenizer: TextTokenizer
    prompt: PromptBuilder
    policy: Policy
    critic: Critic | None
    engine: Engine | VllmEngine
    loop: SearchLoop
    checkpoints: CheckpointWriter
    step: int = 0  # the last that is done
    best: dict[str, Any] | None = None  # metric, value and step of the best checkpoint, if `checkpoint.best` is set
    log: MetricsLog | None = None  # rank 0's, once everything else is built
    results: dict[int, dict[str, EvalResult]] = field(default_factory=dict)  # by step: this process's first and last

    @property
    def learners(self) -> list[Learner]:
        """Everything that has weights and an optimizer."""
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def evaluate(self, step: int) -> dict[str, float]:
        """Score the policy on every evaluation set; return the scores as keys of the step's row."""
        row = {}
        results = {}
        for name, environment in self.evaluations.items():
            with self.ui.phase(f"eval {name}", len(self.ranks.share(environment.questions))) as progress:
                results[name] = evaluate(
                    None, self.tokenizer, environment, self.config,
                    name=name, engine=self.engine, ranks=self.ranks, progress=progress,
                )  # fmt: skip
            self.ui.evaluation(name, results[name].metrics())
            row |= results[name].row()
        wanted = self.config.checkpoint.best
        if wanted is not None and f"eval/{wanted}" not in row:
            name = wanted.partition("/")[0]
            known = ", ".join(sorted(key.removeprefix("eval/") for key in row if key.startswith(f"eval/{name}/")))
            raise ValueError(f"checkpoint.best: the evaluation has no score `{wanted}`; there are {known}")
        self.results = dict(list(self.results.items())[:1]) | {step: results}
        return row

    def write(self, row: dict[str, Any], trajectories: list[Trajectory] | None = None) -> None:
        """Write the step's row, and its trajectories if they are due or an update on them was skipped."""
        if self.log is None or len(row) == 1:
            return
        due = is_due(row["step"], self.config.run.trajectories_every) or bool(row.get("skipped_updates"))
        try:
            self.log.write(row)
            if trajectories is not None and due:
                self.log.write_trajectories(row["step"], trajectories)
        except OSError as error:
            raise ValueError(
                f"what step {row['step']} came to could not be written: {sentence(error)}; mend that and go on with "
                "run.resume=true"
            ) from error

    def sync(self) -> dict[str, float]:
        """Give the engine the trained weights; return what that took and found on the worst rank. A collective."""
        self.policy.sync_replica()
        return {key: self.ranks.max(value) for key, value in self.engine.update_weights().items()}

    def note_best(self, row: Mapping[str, Any]) -> bool:
        """Record the step's evaluation if it is the best so far by `checkpoint.best`; return whether it is."""
        metric = self.config.checkpoint.best
        value = None if metric is None else row.get(f"eval/{metric}")
        if value is None or (self.best is not None and value <= self.best["value"]):
            return False
        self.best = {"metric": metric, "value": value, "step": row["step"]}
        return True

    def stage_checkpoint(self) -> dict[str, float]:
        """Collect what the checkpoint of this step will hold; return the seconds it took, for the step's row."""

        replica, lora = self.policy.replica, self.config.model.lora

        def export(weights: dict[str, torch.Tensor], directory: Path) -> None:
            save_weights(weights, replica.config, directory, scale=adapter_scale(replica))
            self.tokenizer.save(directory)
            if lora.rank:  # beside it, not in it: transformers would take a directory with both for an adapter
                adapter = directory.with_name("adapter")
                write_adapter(weights, lora.alpha, adapter, str(resolve(self.config.model.path)))
                self.tokenizer.save(adapter)

        return self.checkpoints.stage(
            self.step,
            {key: tensor for learner in self.learners for key, tensor in learner.tensors().items()},
            {
                "stream": self.stream.state_dict(),
                "learners": {learner.name: learner.state_dict() for learner in self.learners},
                "config": self.config.to_yaml(),
                "best": self.best,
                "base": fingerprint(replica) if lora.rank else None,
            },
            dict(replica.named_parameters()),
            export,
            None if self.best is None else self.best["step"],
            self.environment.save_searches,
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore the run that wrote the checkpoint."""
        state = checkpoint.trainer_state
        base = state.get("base")
        if base is not None and self.config.model.lora.rank and base != fingerprint(self.policy.replica):
            raise ValueError(
                f"checkpoint {checkpoint.path} holds an adapter, and model.path={self.config.model.path} is not the "
                "model that it was trained on; resume with the model that the run began with"
            )
        self.stream.load_state_dict(state["stream"])
        checkpoint.read(
            {key: tensor for learner in self.learners for key, tensor in learner.tensors(checkpoint.keys).items()}
        )
        for learner in self.learners:
            learner.load_state_dict(state["learners"][learner.name])
        best = state.get("best")
        if best is not None and best["metric"] == self.config.checkpoint.best:  # of another metric, it says nothing
            self.best = best
        self.sync()
        self.step = checkpoint.step
        changed = changed_keys(yaml.safe_load(state["config"]), self.config.model_dump(mode="json"))
        self.ui.note(
            f"going on after step {self.step}, from {checkpoint.path}"
            + (f"; settings that differ from then: {', '.join(changed)}" if changed else "")
        )
        if said := self.environment.load_searches(checkpoint.searches):
            self.ui.note(said)

    def settle_cache(self, device_bytes: int) -> None:
        """Let the planner decide if KV cache and recorded decode steps stay during updates; note it in one line."""
        per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None
        decoder = self.policy.replica.config
        plan = plan_rank(self.config, decoder, self.ranks.world_size, per_machine, device_bytes)
        self.engine.keep_cache = plan.keeps_cache
        self.ui.note(plan.describe_cache())

    def park_searches(self) -> None:
        """Give the update the memory of the index, if `retrieval.park_during_update` is on. Call it when all ranks have
        searched: they search each other's parts."""
        self._move_searches("park", Environment.park)

    def unpark_searches(self) -> None:
        """Take it back. The copies overlap with whatever comes before the first search, which waits for them."""
        self._move_searches("unpark", Environment.unpark)

    def _move_searches(self, name: str, move: Callable[[Environment], None]) -> None:
        if not self.config.retrieval.park_during_update:
            return
        started = time.perf_counter()  # not a phase of the timers, which would wait for the copies
        for environment in (self.environment, *self.evaluations.values()):
            move(environment)
        self.timers.add(name, time.perf_counter() - started)

    def take_search_statistics(self) -> SearchStatistics:
        """Search statistics of training since they were last taken, all ranks together. A collective."""
        return sum(self.ranks.gather(self.environment.take_statistics()), SearchStatistics())

    def close(self) -> None:
        """Close the engine and the retrievers, whose threads would live until the garbage collector finds them."""
        with ExitStack() as stack:  # each is closed, whether or not the others could be
            stack.callback(self.engine.close)
            for environment in (self.environment, *self.evaluations.values()):
                stack.callback(environment.close)

    def finish(self) -> dict[str, Any]:
        """Wait for the last checkpoint, show before and after, draw the curves; return the result on every rank."""
        self.checkpoints.wait()
        done = self.step >= self.config.train.num_steps
        before: dict[str, dict[str, Any]] = {}
        after: dict[str, dict[str, Any]] = {}
        if self.log is not None:
            rows = read_metrics(self.config.run_directory)
            for name in self.evaluations:
                scored = [evaluation_part(row, name) for row in rows if f"eval/{name}/em" in row]
                if scored:
                    before[name], after[name] = scored[0], scored[-1]
            if done and after:
                self.ui.final(before, after, self.example())
            save_curves(self.config.run_directory)
            if done:
                self.ui.note(self.where_to_look())
        result = {"step": self.step, "interrupted": not done, "before": before, "after": after}
        return self.ranks.broadcast(result)

    def where_to_look(self) -> str:
        """The sentence that a run ends with."""
        folder = self.config.run_directory
        said = f"written to {folder}: curves.png, metrics.jsonl, checkpoints/latest/hf"
        has_world = self.config.data.world is not None
        return said + (f"; watch it answer: searchr1 ask --model {folder} --world" if has_world else "")

    def example(self) -> tuple[Trajectory, Trajectory] | None:
        """A question answered wrongly before training and rightly after it, if this process evaluated both times."""
        if len(self.results) < 2:  # as in a run that was resumed when all of its steps were done
            return None
        first, last = self.results.values()
        for name in first:
            for old, new in zip(first[name].scores, last[name].scores, strict=True):
                if new.em > old.em:
                    return old.trajectory, new.trajectory
        return None


@contextmanager
def open_run(config: Config, ui: UserInterface | None = None) -> Iterator[Run]:
    """Build everything, resume from the newest checkpoint if asked to, and release everything at the end."""
    with process(config.run.device, config.run.num_threads, config.run.seed) as ranks:
        ui = ui or Console(config.train.num_steps, quiet=not ranks.is_main)
        if ranks.is_main and not config.run.resume:
            check_is_new(config.run_directory)  # before the minutes that a large model takes to load
        path = latest_checkpoint(config.run_directory / "checkpoints") if config.run.resume else None
        checkpoint = Checkpoint(path, ranks) if path is not None else None
        run = build_run(config, ranks, ui)
        try:
            if checkpoint is not None:
                run.load(checkpoint)
            elif config.run.resume:
                ui.note(f"there is no checkpoint in {config.run_directory}: beginning at the start")
            dtype, head_dim = getattr(torch, config.model.dtype), run.policy.replica.config.head_dim
            ui.note(describe_attention(ranks.device, dtype, head_dim))
            if config.model.lora.rank:
                start = config.model.lora.path
                ui.note(describe_adapter(run.policy.replica) + (f"; it began as {start}" if start else ""))
            if ranks.device.type == "cuda":
                run.settle_cache(torch.cuda.get_device_properties(ranks.device).total_memory)
            # Last: by now any mistake in the configuration has been reported, with nothing written.
            run.log = open_log(config, run.step if checkpoint else -1) if ranks.is_main else None
            yield run
        except Exception:
            run.checkpoints.settle(ui.note)
            raise
        finally:
            run.close()
            if run.log is not None:
                run.log.close()


def open_log(config: Config, resume_step: int) -> MetricsLog:
    """Open the run folder and write the configuration. ValueError if it holds a run that this one does not resume."""
    log = MetricsLog(
        config.run_directory,
        tensorboard=config.run.tensorboard,
        wandb=config.run.wandb,
        resume_step=resume_step if config.run.resume else None,
        config=config.model_dump(mode="json"),
    )
    with ExitStack() as on_error:
        on_error.callback(log.close)
        with whole_file(config.run_directory / "config.yaml") as file:
            file.write_text(config.to_yaml(), encoding="utf-8")
        on_error.pop_all()
    return log


def build_run(config: Config, ranks: Ranks, ui: UserInterface) -> Run:
    """Build a run at step 0, which has written nothing yet."""
    directory, lora = resolve(config.model.path), config.model.lora
    if lora.path is not None:
        check_start(lora.path, directory, lora.rank, lora.alpha, lora.targets)
    training, evaluations = build_environments(config, ranks, ui)
    tokenizer = load_tokenizer(directory, for_chat=config.prompt.chat_template)
    reference, has_adapter = None, lora.rank > 0
    if config.algorithm.kl_coefficient > 0 and not has_adapter:
        reference = meta_model(directory, getattr(torch, config.model.dtype))
    policy = Policy(meta_model(directory), config, ranks, reference, weights=directory)
    critic = None
    if config.algorithm.name == "ppo" and has_adapter:
        critic = Critic(policy.replica.on_same_base(), config, ranks)
    elif config.algorithm.name == "ppo":
        critic = Critic(meta_model(directory), config, ranks, weights=directory)
    engine = build_engine(policy.replica, tokenizer, config)
    with ExitStack() as on_error:
        on_error.callback(engine.close)
        loop = SearchLoop(engine, training.search)
        on_error.pop_all()
    return Run(
        config=config,
        ranks=ranks,
        ui=ui,
        timers=PhaseTimers(torch.cuda.synchronize if ranks.device.type == "cuda" else None),
        stream=QuestionStream(training.questions, config.run.seed),
        environment=training,
        evaluations=evaluations,
        tokenizer=tokenizer,
        prompt=PromptBuilder(config.prompt, tokenizer),
        policy=policy,
        critic=critic,
        engine=engine,
        loop=loop,
        checkpoints=CheckpointWriter(
            config.run_directory / "checkpoints", ranks, config.checkpoint.keep, config.checkpoint.background
        ),
    )


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens at this one."""
    return every > 0 and step % every == 0


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`section.key` of every setting that differs, except in `run`, which only says where and how it is shown."""
    return [
        f"{section}.{key}"
        for section in sorted(new.keys() - {"run"})
        for key in sorted({*old.get(section, {}), *new[section]})
        if old.get(section, {}).get(key) != new[section].get(key)
    ]


def evaluation_part(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The part of a metrics.jsonl row that belongs to one evaluation set, without the prefix."""
    prefix = f"eval/{name}/"
    return {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
