"""Loss and gradients of a batch are the same however it is cut: on 1, 2 or 4 ranks, in one micro-batch or many.

The means are over all policy tokens of the optimizer step; a mean of means, over ranks or micro-batches, would not be.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "several_ranks_gradients.py"
ALGORITHMS = {
    "grpo": {"kl_coefficient": 0.1, "entropy_coefficient": 0.02, "group_size": 3, "drop_zero_variance_groups": False},
    "ppo": {
        "name": "ppo", "group_size": 3, "kl_coefficient": 0.1, "kl_in_reward": True, "kl_kind": "k1",
        "entropy_coefficient": 0.02, "lam": 0.9, "gamma": 0.99, "value_clip": 0.1,
    },
}  # fmt: skip
MODELS = {"all": {}, "lora": {"rank": 3, "alpha": 6.0}}
BUDGETS = {"one": 10_000, "many": 30}  # rows of a micro-batch
TRAIN = {"all": {}, "lora": {"reduce_after": "update", "reshard_after": "update"}}


@pytest.fixture
def reports(make_config, tmp_path, on_two_ranks, monkeypatch) -> dict[int, dict]:
    """Reports by world size and name; one launch per world size, as starting processes takes most of the time."""
    files = []
    for algorithm, settings in ALGORITHMS.items():
        for kind, lora in MODELS.items():
            for number, budget in BUDGETS.items():
                config = make_config(
                    algorithm=settings,
                    model={"path": make_config().model.path, "lora": lora},
                    train={"tokens_per_microbatch": budget} | TRAIN[kind],
                    optimizer={"max_grad_norm": 1e9},
                )
                files.append(tmp_path / f"{algorithm}-{kind}-{number}.yaml")
                files[-1].write_text(config.to_yaml())
    monkeypatch.setattr("sys.argv", [str(SCRIPT), str(tmp_path), *map(str, files)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    for num_ranks in (2, 4):
        on_two_ranks(SCRIPT, tmp_path, *files, num_ranks=num_ranks)
    return {num_ranks: torch.load(tmp_path / f"{num_ranks}.pt") for num_ranks in (1, 2, 4)}


def test_loss_and_gradients_do_not_depend_on_the_cut(reports):
    for algorithm in ALGORITHMS:
        for kind in MODELS:
            expected = reports[1][f"{algorithm}-{kind}-one"]
            assert expected["micro_batches"] == [1]
            assert reports[1][f"{algorithm}-{kind}-many"]["micro_batches"][0] > 4
            assert reports[4][f"{algorithm}-{kind}-many"]["micro_batches"][0] > 1
            for num_ranks in reports:
                for number in BUDGETS:
                    found = reports[num_ranks][f"{algorithm}-{kind}-{number}"]
                    check_same(found, expected, f"{algorithm}, {kind}, {num_ranks} ranks, {number}")


def check_same(found: dict, expected: dict, where: str) -> None:
    wanted = {"policy_loss", "kl_ref", "entropy", "grad_norm", "policy_tokens", "clip_fraction"}
    assert wanted <= expected["metrics"].keys()
    assert ("critic_grad_norm" in expected["metrics"]) == where.startswith("ppo")
    for key in expected["metrics"].keys() - {"update_imbalance"}:
        assert found["metrics"][key] == pytest.approx(expected["metrics"][key], rel=1e-5, abs=1e-7), (where, key)
    assert found["gradients"].keys() == expected["gradients"].keys()
    assert any(name.startswith("critic") for name in expected["gradients"]) == where.startswith("ppo")
    for name, gradient in expected["gradients"].items():
        largest = gradient.abs().max()
        assert largest > 0, (where, name)
        assert (found["gradients"][name] - gradient).abs().max() <= 1e-5 * largest, (where, name)
