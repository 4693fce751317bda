"""Shared by the tests of vLLM itself, on CPU and GPU: when to skip, questions with a search, a short training."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from searchr1_fast.config import Config, load_config
from searchr1_fast.prompt import PromptBuilder
from searchr1_fast.rollout import RolloutRequest
from searchr1_fast.types import Passage, Question

only_with_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vllm is not installed; docs/architecture.md says how, in an environment of its own",
)
ROLLOUT = dict(
    engine="vllm", max_searches=2, max_turn_tokens=48, max_observation_tokens=80, max_sequence_tokens=320,
    max_num_seqs=16,
)  # fmt: skip
NAMES = ("Anna Bell", "Carl Dorn", "Emma Frey", "Gustav Holm", "Ida Jansen", "Karl Lund")


def search_letters(queries):
    return [[Passage(query, query, f"{query} was born in the town of {query[::-1]}.")] for query in queries]


def requests_for(config: Config, tokenizer, group_size: int = 1) -> list[RolloutRequest]:
    prompt = PromptBuilder(config.prompt, tokenizer)
    questions = [Question(name, f"Where was {name} born?", ("x",), "test") for name in NAMES]
    return [
        RolloutRequest(question, group, prompt(question), seed=100 * group + i)
        for group, question in enumerate(questions)
        for i in range(group_size)
    ]


def short_demo(directory: Path, *overrides: str) -> Config:
    """-> the configuration of the demo with vLLM: two steps of four questions."""
    return load_config("configs/demo.yaml", [
        *("rollout.engine=vllm", f"run.directory={directory}", "run.num_threads=1", "run.tensorboard=false"),
        *("data.world.num_entities=60", "data.world.num_questions=64", "train.num_steps=2"),
        *("train.questions_per_step=4", "train.eval_every=0", "checkpoint.every=0", "rollout.max_num_seqs=32"),
        "eval.sets={unseen: {world: {split: eval, num_entities: 60, num_questions: 12}}}",
        *overrides,
    ])  # fmt: skip
