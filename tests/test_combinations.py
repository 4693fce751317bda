"""Combinations of settings in one run: algorithm, adapter, offload, recomputation, and when ranks gather and reduce.

Each setting alone is tested with its own code. Here every combination trains and equals the plain run: bit for bit on
one rank, and within rounding on two, over twenty steps.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from searchr1_fast import policy as policy_module
from searchr1_fast.models import Decoder
from searchr1_fast.train import train

ALGORITHMS = {
    "grpo": {"kl_coefficient": 0.05, "entropy_coefficient": 0.01},
    "ppo": {"name": "ppo", "group_size": 2, "critic_learning_rate": 1e-3, "kl_coefficient": 0.05, "kl_in_reward": True},
}
MODELS = {"all": {}, "lora": {"rank": 3, "alpha": 6.0}}  # rows of A that two ranks cannot share evenly
OFFLOAD = {"all": {"optimizer": True, "reference": True, "replica": True}, "lora": {"optimizer": True}}
# activation_checkpointing, reshard_after, reduce_after; they cover every pair of values that changes memory
PLAIN = ("none", "forward", "microbatch")
OTHERS = [("selective", "backward", "microbatch"), ("full", "update", "update"), ("none", "forward", "update")]


def settings(make_config, algorithm: str, kind: str, offload: bool, memory: tuple[str, str, str], **sections):
    checkpointing, reshard_after, reduce_after = memory
    model = {"path": make_config().model.path, "lora": MODELS[kind], "offload": OFFLOAD[kind] if offload else {}}
    how = {"activation_checkpointing": checkpointing, "reshard_after": reshard_after, "reduce_after": reduce_after}
    return make_config(
        algorithm=ALGORITHMS[algorithm],
        model=model | sections.pop("model", {}),
        train={"num_minibatches": 2} | how | sections.pop("train"),
        eval={"sets": {}},
        **sections,
    )


def rows(config) -> list[dict]:
    """The rows of metrics.jsonl, without times and what depends on them."""
    lines = (config.run_directory / "metrics.jsonl").read_text().splitlines()
    is_exact = lambda key: not key.startswith(("time_", "search/")) and not key.endswith("_per_second")  # noqa: E731
    return [{key: value for key, value in json.loads(line).items() if is_exact(key)} for line in lines]


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(config.run_directory / "checkpoints" / "latest" / "hf" / "model.safetensors")


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    monkeypatch.setattr(policy_module, "leaves", lambda device: True)
    # The loops that generate on a CPU view weights through numpy, which never lets go of memory it has viewed.
    monkeypatch.setattr(Decoder, "fused_generation", False)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_combination_is_the_plain_run(make_config, make_console, as_if_on_a_gpu, algorithm, kind):
    """In bf16, which puts one rank under FSDP: it adds gradients in fp32, in the same order whenever it does."""

    def run(number: int, offload: bool, memory: tuple[str, str, str]):
        config = settings(
            make_config, algorithm, kind, offload, memory,
            train={"num_steps": 2}, run={"name": f"{number}"}, model={"dtype": "bfloat16"},
        )  # fmt: skip
        train(config, make_console())
        return config

    plain = run(0, False, PLAIN)
    expected = rows(plain)
    assert len(expected) == 2 and all(row["grad_norm"] > 0 for row in expected)
    assert ("critic_grad_norm" in expected[0]) == (algorithm == "ppo")
    for number, memory in enumerate(OTHERS, start=1):
        config = run(number, True, memory)
        assert rows(config) == expected, memory
        found = weights(config)
        assert all(torch.equal(found[name], weight) for name, weight in weights(plain).items()), memory


TWENTY = {
    "grpo-all": (True, ("selective", "forward", "microbatch")),
    "ppo-all": (True, ("full", "update", "update")),
    "ppo-lora": (True, ("selective", "backward", "update")),
}


def test_twenty_steps_of_two_ranks_are_those_of_one(make_config, make_console, tmp_path, on_two_ranks):
    """Every metric within 1e-4, over forty updates at a hundred times the recipes' learning rate.

    Both sample the same tokens, so the runs differ only in the order of sums.
    """
    sections = {"train": {"num_steps": 20}, "optimizer": {"learning_rate": 1e-4, "warmup_steps": 2}}
    pairs, files = {}, []
    for name, (offload, memory) in TWENTY.items():
        algorithm, kind = name.split("-")
        pairs[name] = [
            settings(make_config, algorithm, kind, *how, run={"name": f"{name}-{number}"}, **sections)
            for number, how in ((1, (False, PLAIN)), (2, (offload, memory)))
        ]
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(pairs[name][1].to_yaml())
    on_two_ranks(Path(__file__).parent / "two_ranks_offload.py", *files)
    for name, (one, two) in pairs.items():
        train(one, make_console())
        assert [row["step"] for row in rows(two)] == list(range(1, 21))
        for theirs, ours in zip(rows(two), rows(one), strict=True):
            assert theirs.keys() == ours.keys()
            for key in ours.keys() - {"update_imbalance"}:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-4), (name, ours["step"], key)
        rewards = [row["reward_mean"] for row in rows(one)]
        assert len(set(rewards)) > 3 and all(row["grad_norm"] > 0 for row in rows(one)), name
