"""Score a model on questions, with the rollout that trains it: exact match, sub-match, F1 and searches, by stratum.

Greedy by default. With a temperature, each question is sampled from its own stream of random numbers, so a score does
not depend on the batch or on the number of ranks. Exact match comes with its Wilson interval: at a few hundred
questions the last digit means nothing, and the interval says so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from searchr1_fast.config import Config
from searchr1_fast.distributed import Ranks
from searchr1_fast.environment import Environment
from searchr1_fast.models import Decoder, TextTokenizer
from searchr1_fast.prompt import PromptBuilder
from searchr1_fast.reward import exact_match, extract_answer, f1, sub_exact_match
from searchr1_fast.rollout import Engine, PlainEngine, RolloutRequest, SamplingParams, SearchLoop, VllmEngine
from searchr1_fast.types import Progress, Trajectory

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Score:
    """One question and how it went."""

    trajectory: Trajectory  # its reward is the exact match
    prediction: str | None
    em: float
    sub_em: float
    f1: float

    def record(self) -> dict[str, Any]:
        """The question, its prediction and its scores, for JSON."""
        question = self.trajectory.question
        return {
            "id": question.id,
            "question": question.text,
            "golden_answers": list(question.golden_answers),
            "source": question.source,
            "kind": question.kind,
            "prediction": self.prediction,
            "em": self.em,
            "sub_em": self.sub_em,
            "f1": self.f1,
            "searches": self.trajectory.num_searches,
            "response_tokens": self.trajectory.response_length,
            "finish_reason": self.trajectory.finish_reason.value,
        }


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Every question's score, in the order of the questions."""

    name: str
    scores: list[Score]

    def strata(self) -> dict[str, list[Score]]:
        """All scores under "", then those of each kind, then those of each source if there are several."""
        strata = {"": self.scores}
        for attribute in ("kind", "source"):
            values = sorted({getattr(score.trajectory.question, attribute) for score in self.scores})
            if len(values) > 1 or (attribute == "kind" and values != [""]):
                for value in values:
                    members = [s for s in self.scores if getattr(s.trajectory.question, attribute) == value]
                    strata[value or "other"] = members
        return strata

    def metrics(self) -> dict[str, float]:
        """`em`, `em_low`, … of all questions and `<stratum>/em`, … of each stratum."""
        metrics = {}
        for stratum, scores in self.strata().items():
            prefix = f"{stratum}/" if stratum else ""
            metrics |= {f"{prefix}{key}": value for key, value in summarise(scores).items()}
        return metrics

    def row(self) -> dict[str, float]:
        """`metrics` as the keys of metrics.jsonl: `eval/<set>/em`, `eval/<set>/<stratum>/em`, …"""
        return {f"eval/{self.name}/{key}": value for key, value in self.metrics().items()}


def evaluate(
    model: Decoder | None,
    tokenizer: TextTokenizer,
    environment: Environment,
    config: Config,
    *,
    name: str = "eval",
    temperature: float | None = None,
    seed: int | None = None,
    engine: Engine | VllmEngine | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Ask the model every question of the environment once.

    temperature, seed: None takes `eval.temperature` and `run.seed`; temperature 0 is greedy. engine: one that is
    already open (the trainer's), used instead of a new one over `model`. ranks: share the questions among ranks; every
    rank gets the whole result. progress counts this rank's questions.
    """
    sampling = SamplingParams(config.eval.temperature if temperature is None else temperature)
    seed = config.run.seed if seed is None else seed
    prompt = PromptBuilder(config.prompt, tokenizer)
    requests = [
        RolloutRequest(question, index, prompt(question), trajectory_seed("eval", name, seed, index))
        for index, question in enumerate(environment.questions)
    ]
    own = build_engine(model, tokenizer, config) if engine is None else None
    engine = engine or own
    previous, engine.sampling = engine.sampling, sampling
    try:
        whole = config.rollout.model_copy(update={"on_search_error": "stop"})  # a score of some questions is none
        loop = SearchLoop(engine, environment.search, config=whole)
        trajectories = loop.run(ranks.share(requests) if ranks else requests, progress)
    finally:
        engine.sampling = previous
        if own is not None:
            own.close()
    return EvalResult(name, [score(t) for t in (ranks.unshare(trajectories) if ranks else trajectories)])


def score(trajectory: Trajectory) -> Score:
    """Extract the answer from what the policy wrote and score it; sets the trajectory's reward."""
    golden = trajectory.question.golden_answers
    prediction = extract_answer(trajectory.policy_text)
    trajectory.reward = exact_match(prediction, golden)
    return Score(trajectory, prediction, trajectory.reward, sub_exact_match(prediction, golden), f1(prediction, golden))


def summarise(scores: Sequence[Score]) -> dict[str, float]:
    """Means over some questions, and the 95 % interval of the exact match."""
    count = len(scores)
    mean = {key: sum(getattr(s, key) for s in scores) / count for key in ("em", "sub_em", "f1")} if count else {}
    low, high = wilson_interval(sum(s.em for s in scores), count)
    return {
        **mean,
        "em_low": low,
        "em_high": high,
        "searches_mean": sum(s.trajectory.num_searches for s in scores) / max(count, 1),
        "response_tokens_mean": sum(s.trajectory.response_length for s in scores) / max(count, 1),
        "count": count,
    }


def wilson_interval(successes: float, count: int, z: float = 1.959964) -> Interval:
    """Wilson's score interval of a proportion (J. Am. Stat. Assoc. 22, 1927): honest at 0, at 1, for few."""
    if count == 0:
        return 0.0, 1.0
    share, spread = successes / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half_width = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def build_engine(model: Decoder, tokenizer: TextTokenizer, config: Config) -> Engine | VllmEngine:
    """Build the engine that `rollout.engine` names. ValueError if a sequence may outgrow the model's positions, or vLLM
    is missing."""
    known = model.config.max_position_embeddings
    if config.rollout.max_sequence_tokens > known:
        raise ValueError(
            f"rollout.max_sequence_tokens: {config.rollout.max_sequence_tokens} is more than the model was made for; "
            f"give at most {known} (max_position_embeddings in its config.json)"
        )
    engine_class = {"native": Engine, "plain": PlainEngine, "vllm": VllmEngine}[config.rollout.engine]
    return engine_class(model, tokenizer, config.rollout)


def trajectory_seed(*key: object) -> int:
    """63 bits that depend on every part of the key: the run's seed, the step, the trajectory's place."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
