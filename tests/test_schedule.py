"""The learning rate, number by number, and against transformers' formulas."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from searchr1_fast.config import load_config
from searchr1_fast.schedule import LearningRate, critic_learning_rate, policy_learning_rate


@pytest.mark.parametrize(
    ("shape", "final_ratio", "expected"),
    [
        ("constant", 0.0, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.0, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ("linear", 0.2, [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("cosine", 0.0, [0.25, 0.5, 0.75, 1.0, 1.0, 0.5 + 2**-1.5, 0.5, 0.5 - 2**-1.5, 0.0, 0.0]),
        ("cosine", 0.5, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75 + 2**-2.5, 0.75, 0.75 - 2**-2.5, 0.5, 0.5]),
    ],
)
def test_every_value_of_a_small_schedule(shape, final_ratio, expected):
    rate = LearningRate(3e-4, num_warmup=4, num_updates=8, shape=shape, final_ratio=final_ratio)
    assert [rate(update) for update in range(10)] == pytest.approx([3e-4 * factor for factor in expected], abs=1e-18)


def test_without_a_warm_up_the_first_update_has_all_of_it():
    assert LearningRate(2e-6)(0) == LearningRate(2e-6, shape="cosine", num_updates=5)(0) == 2e-6


def test_a_run_that_is_all_warm_up_divides_by_nothing():
    rate = LearningRate(1.0, num_warmup=4, num_updates=4, shape="linear")
    assert [rate(update) for update in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("shape", "theirs"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_after_the_warm_up_it_is_that_of_transformers(shape, theirs):
    rate = LearningRate(1e-3, num_warmup=7, num_updates=50, shape=shape)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    scheduler = theirs(optimizer, 7, 50)
    for update in range(50):
        expected = optimizer.param_groups[0]["lr"]  # in the warm-up theirs lags by one: it starts at 0
        assert rate(update if update >= 7 else update - 1) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_shares_count_optimizer_steps():
    settings = ["train.num_steps=1005", "train.num_minibatches=2", "optimizer.warmup_ratio=0.285", "algorithm.name=ppo"]
    config = load_config(None, [*settings, "optimizer.critic_warmup_ratio=0.015", "optimizer.learning_rate=1e-6"])
    policy, critic = policy_learning_rate(config), critic_learning_rate(config)
    assert (policy.num_warmup, policy.num_updates, critic.num_warmup, critic.num_updates) == (572, 2010, 30, 2010)
    assert (policy(0), policy(571), policy(2009)) == (1e-6 / 572, 1e-6, 1e-6)
    assert (critic(0), critic(29)) == (1e-5 / 30, 1e-5)


def test_the_critic_warms_up_as_the_policy_does_unless_told_otherwise():
    config = load_config(None, ["optimizer.warmup_steps=5", "train.num_steps=10"])
    assert critic_learning_rate(config).num_warmup == policy_learning_rate(config).num_warmup == 5
    config = load_config(None, ["optimizer.warmup_ratio=0.29", "train.num_steps=100"])
    assert critic_learning_rate(config).num_warmup == policy_learning_rate(config).num_warmup == 29  # not 28.999…
    config = load_config(None, ["algorithm.name=ppo", "optimizer.warmup_steps=5", "optimizer.critic_warmup_ratio=0"])
    assert (critic_learning_rate(config).num_warmup, policy_learning_rate(config).num_warmup) == (0, 5)


def test_updates_that_the_policy_never_makes_are_not_counted():
    settings = ["train.num_steps=10", "train.num_minibatches=3", "algorithm.critic_warmup_steps=4"]
    ppo = load_config(None, [*settings, "algorithm.name=ppo"])
    assert (policy_learning_rate(ppo).num_updates, critic_learning_rate(ppo).num_updates) == (18, 30)
    assert policy_learning_rate(load_config(None, settings)).num_updates == 30  # GRPO has no critic to wait for


def test_two_lengths_of_the_warm_up_are_refused():
    with pytest.raises(ValueError, match=r"optimizer\.warmup_ratio: warmup_steps says how long"):
        load_config(None, ["optimizer.warmup_steps=5", "optimizer.warmup_ratio=0.1"])
    with pytest.raises(ValueError, match=r"optimizer\.final_learning_rate_ratio: a constant schedule"):
        load_config(None, ["optimizer.final_learning_rate_ratio=0.1"])


def test_a_warm_up_of_a_critic_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.critic_warmup_ratio: GRPO has no critic; drop it"):
        load_config(None, ["optimizer.critic_warmup_ratio=0.1"])
