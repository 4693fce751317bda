"""The paper's recipes: every value as published, the differences of the fast ones and no others, and that they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import searchr1_fast
from searchr1_fast.cli import main as command
from searchr1_fast.config import load_config
from searchr1_fast.question_sets import EVALUATION_SETS
from searchr1_fast.schedule import critic_learning_rate, policy_learning_rate
from searchr1_fast.train import train

CONFIGS = Path(searchr1_fast.__file__).parents[1] / "configs"
PAPER = [f"search_r1_{size}_{algorithm}" for size in ("3b", "7b") for algorithm in ("ppo", "grpo")]
LORA = "search_r1_7b_grpo_lora"

if not CONFIGS.is_dir():
    pytest.skip("no configs/ beside the package: an installed copy, not a checkout", allow_module_level=True)


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """`section.key` -> value."""
    if not isinstance(section, dict):
        return {prefix: section}
    return {key: value for name, part in section.items() for key, value in flat(part, f"{prefix}.{name}").items()}


def settings(name: str) -> dict[str, Any]:
    values = flat(load_config(CONFIGS / f"{name}.yaml").model_dump(mode="json"))
    return {key.removeprefix("."): value for key, value in values.items()}


def test_these_are_all_the_recipes():
    names = {path.stem for path in CONFIGS.glob("search_r1*.yaml")}
    assert names == {*PAPER, *(f"{name}_fast" for name in PAPER), LORA}
    assert all(settings(name)["run.name"] == name for name in names)


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_values(name):
    """Values of `scripts/nq_hotpotqa/v0.2` in the original, and of its yaml."""
    is_ppo = name.endswith("_ppo")
    expected = {
        "model.path": f"models/Qwen2.5-{name.split('_')[2].upper()}",
        "model.dtype": "bfloat16",
        "prompt.template": "search_r1",
        "prompt.chat_template": True,
        "data.questions": "data/search_r1/train.jsonl",
        "retrieval.topk": 3,
        "rollout.temperature": 1.0,
        "rollout.top_p": 1.0 if is_ppo else 0.95,
        "rollout.top_k": 0,
        "rollout.max_searches": 4,
        "rollout.max_turn_tokens": 500,
        "rollout.max_observation_tokens": 500,
        "rollout.max_sequence_tokens": 4096 + 500,
        "algorithm.name": "ppo" if is_ppo else "grpo",
        "algorithm.group_size": 1 if is_ppo else 5,
        "algorithm.mask_observations": True,
        "algorithm.clip_low": 0.2,
        "algorithm.clip_high": 0.2,
        "algorithm.importance_cap": 0.0,
        "algorithm.kl_coefficient": 0.001,
        "algorithm.kl_kind": "k1" if is_ppo else "k3",
        "algorithm.kl_in_reward": is_ppo,
        "algorithm.entropy_coefficient": 0.001,
        "algorithm.drop_zero_variance_groups": False,
        "algorithm.normalize_std": True,
        "algorithm.gamma": 1.0,
        "algorithm.lam": 1.0,
        "algorithm.whiten_advantages": True,
        "algorithm.value_clip": 0.5,
        "algorithm.critic_learning_rate": 1e-5,
        "algorithm.critic_warmup_steps": 0,
        "optimizer.learning_rate": 1e-6,
        "optimizer.schedule": "constant",
        "optimizer.weight_decay": 0.01,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.max_grad_norm": 1.0,
        "train.num_steps": 1005,
        "train.questions_per_step": 512,
        "train.num_minibatches": 2 if is_ppo else 10,
        "train.eval_every": 100,
        "checkpoint.every": 100,
        "eval.temperature": 1.0,
    } | {f"eval.sets.{set_name}.questions": f"data/search_r1/eval/{set_name}.jsonl" for set_name in EVALUATION_SETS}
    found = settings(name)
    assert {key: found[key] for key in expected} == expected
    config = load_config(CONFIGS / f"{name}.yaml")
    assert list(config.eval.sets) == list(EVALUATION_SETS)
    assert all(data.limit == 0 for data in config.eval.sets.values())
    num_minibatches, policy = config.train.num_minibatches, policy_learning_rate(config)
    assert policy.num_warmup == int(0.285 * 1005 * num_minibatches)  # 286 rollouts
    assert policy.num_warmup // num_minibatches == 286
    if is_ppo:
        assert critic_learning_rate(config).num_warmup == 30  # 15 rollouts


@pytest.mark.parametrize("name", PAPER)
def test_a_fast_recipe_differs_in_this_and_nothing_else(name):
    paper, fast = settings(name), settings(f"{name}_fast")
    changed = {key: value for key, value in fast.items() if value != paper[key]}
    expected = {
        "run.name": f"{name}_fast",
        "retrieval.backend": "dense",
        "retrieval.index": "data/wiki-18.index",
        "retrieval.device": "cuda",
        "rollout.overlap": True,
        "algorithm.importance_cap": 2.0,
        "algorithm.kl_coefficient": 0.0,
        "algorithm.entropy_coefficient": 0.0,
        "algorithm.drop_zero_variance_groups": True,
        "eval.temperature": 0.0,
        **{f"eval.sets.{set_name}.limit": 500 for set_name in EVALUATION_SETS if set_name != "bamboogle"},
    }
    if name.endswith("_grpo"):
        expected |= {"rollout.top_p": 1.0, "train.num_minibatches": 2}
    assert changed == expected


def test_the_recipe_of_an_adapter_differs_in_this_and_nothing_else():
    fast, lora = settings("search_r1_7b_grpo_fast"), settings(LORA)
    assert {key: value for key, value in lora.items() if value != fast[key]} == {
        "run.name": LORA,
        "model.lora.rank": 32,
        "optimizer.learning_rate": 1e-5,
    }
    assert lora["model.lora.alpha"] == 32.0
    assert len(lora["model.lora.targets"]) == 7


# ------------------------------------------------------------------------------------------------------ they run


@pytest.fixture
def prepared(make_config, tmp_path) -> Path:
    """`searchr1 data` over the tiny model's letters in FlashRAG's layout; all sets have the same questions."""
    rows = [json.loads(line) for line in Path(make_config().data.questions).read_text().splitlines()]
    for index, row in enumerate(rows):
        row["id"] = f"train_{index}"
    for name in EVALUATION_SETS:
        (tmp_path / "flashrag" / name).mkdir(parents=True)
        for split, some in (("train", rows), ("test", rows[:4])):
            text = "".join(json.dumps(row) + "\n" for row in some)
            (tmp_path / "flashrag" / name / f"{split}.jsonl").write_text(text)
    output = tmp_path / "data"
    assert command(["data", "--flashrag", str(tmp_path / "flashrag"), "--output", str(output)]) == 0
    return output


@pytest.mark.parametrize(
    "name", ["search_r1_3b_ppo", "search_r1_7b_grpo", "search_r1_7b_ppo_fast", "search_r1_3b_grpo_fast", LORA]
)
def test_a_recipe_runs_in_small_from_published_files(name, make_config, prepared, tiny_model_directory, tmp_path):
    """Two steps on the CPU; overrides are sizes, places, and the chat template, which the tiny model lacks."""
    overrides = [
        f"data={{questions: {prepared}/train.jsonl, corpus: {make_config().data.corpus}}}",
        *(f"eval.sets.{set_name}.questions={prepared}/eval/{set_name}.jsonl" for set_name in EVALUATION_SETS),
        *(f"model.path={tiny_model_directory}", "prompt.template='{question}'", "prompt.chat_template=false"),
        *(f"run.directory={tmp_path}/runs", "run.device=cpu", "run.num_threads=1", "run.tensorboard=false"),
        *("retrieval.backend=bm25", "retrieval.index=null", "retrieval.device=cpu", "retrieval.topk=1"),
        *("rollout.max_searches=1", "rollout.max_turn_tokens=12", "rollout.max_observation_tokens=80"),
        *("rollout.max_sequence_tokens=200", "train.num_steps=2", "train.questions_per_step=10"),
        *("train.eval_every=0", "checkpoint.every=0"),
    ]
    result = train(load_config(CONFIGS / f"{name}.yaml", overrides))
    assert (result["step"], result["interrupted"]) == (2, False)
    assert list(result["after"]) == list(EVALUATION_SETS)
    rows = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["policy_tokens"] > 0 and row["grad_norm"] > 0 for row in rows[1:])
    kls = [row["kl_ref"] for row in rows[1:]]
    assert all(kl is None for kl in kls) if name.endswith(("_fast", "_lora")) else all(kl is not None for kl in kls)
    assert ("critic_grad_norm" in rows[1]) == ("ppo" in name)
