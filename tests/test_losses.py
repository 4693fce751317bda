"""The policy's objective as configured, the value loss by hand, and how metrics are combined."""

from __future__ import annotations

import pytest
import torch
from searchr1_kernels import PolicyLoss
from searchr1_kernels.policy_objective import MAX_METRICS, MIN_METRICS

from searchr1_fast.config import AlgorithmConfig
from searchr1_fast.losses import accumulate_metrics, policy_objective, value_loss


def test_the_objective_is_the_configured_one():
    algorithm = AlgorithmConfig(
        clip_low=0.1, clip_high=0.28, importance_cap=1.5, kl_kind="k2", kl_coefficient=0.3, entropy_coefficient=0.02
    )
    wanted = PolicyLoss("ppo", 0.1, 0.28, 0.0, 1.5, "k2", 0.3, 0.02)
    assert policy_objective(algorithm) == wanted
    assert policy_objective(AlgorithmConfig(loss="gspo", dual_clip=1.5)) == PolicyLoss(
        "gspo", 0.2, 0.2, 1.5, importance_cap=2.0
    )
    in_reward = AlgorithmConfig(name="ppo", kl_coefficient=0.5, kl_in_reward=True)
    assert policy_objective(in_reward).kl_coefficient == 0.0


def test_metrics_join_by_sum_and_by_extremes():
    totals: dict[str, torch.Tensor] = {}
    for ratio, largest, smallest in ((1.0, 0.5, 0.7), (2.0, 0.25, 0.9)):
        metrics = {"ratio": ratio, "logprob_difference_max": largest, "ratio_max": largest, "ratio_min": smallest}
        accumulate_metrics(totals, {name: torch.tensor(value) for name, value in metrics.items()})
    expected = {"ratio": 3.0, "logprob_difference_max": 0.5, "ratio_max": 0.5, "ratio_min": 0.7}
    assert {name: float(value) for name, value in totals.items()} == pytest.approx(expected)
    assert set(totals) == {"ratio", *MAX_METRICS, *MIN_METRICS}


def test_value_loss_by_hand():
    values = torch.tensor([0.0, 2.0, 2.0], requires_grad=True)
    returns, old = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 1.0])
    loss = value_loss(values, returns, old, 0.5, 2)
    # 1st: within the clip. 2nd: clipped to 1.5, but the unclipped error is larger. 3rd: clipped to 1.5, larger error.
    torch.testing.assert_close(loss.detach(), torch.tensor(0.5 * (1.0 + 1.0 + 1.5**2) / 2))
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([-0.5, 0.5, 0.0]))
    torch.testing.assert_close(value_loss(values, returns, old, 0.0, 2).detach(), torch.tensor(0.5 * 3.0 / 2))


def test_value_loss_of_no_tokens_and_with_a_denominator_on_the_device():
    empty = torch.zeros(0, requires_grad=True)
    assert value_loss(empty, torch.zeros(0), torch.zeros(0), 0.5, 5) == 0
    values, returns = torch.ones(4), torch.arange(4.0)
    assert value_loss(values, returns, values, 0.5, 7) == value_loss(values, returns, values, 0.5, torch.tensor(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"returns": torch.zeros(3)}, r"returns must have the shape of values \[2\], got \[3\]"),
        ({"old_values": torch.zeros(2, 1)}, "old_values must have the shape"),
        ({"denominator": 0}, "denominator: must be the number of policy tokens"),
    ],
)
def test_value_loss_names_mistakes(change, message):
    arguments = {"values": torch.zeros(2), "returns": torch.zeros(2), "old_values": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        value_loss(**({"clip": 0.5, "denominator": 1} | arguments | change))
