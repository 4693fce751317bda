"""The sampler's log-probabilities against the trainer's: measured, reported, and left out where they differ."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from searchr1_kernels import linear_logprob

from searchr1_fast.agreement import AGREEMENT, LIMITS, AgreementWatch, agreement
from searchr1_fast.config import AlgorithmConfig, Config
from searchr1_fast.losses import mismatch_weights, policy_loss
from searchr1_fast.models import load_model
from searchr1_fast.packing import pack
from searchr1_fast.policy import TokenScorer
from searchr1_fast.rollout import Engine
from searchr1_fast.train import train

LOSSES = ("ppo", "cispo", "reinforce", "gspo")


@pytest.fixture
def scorer(tiny_model_directory):
    return TokenScorer(load_model(tiny_model_directory), temperature=0.7)


@pytest.fixture
def batch(make_trajectory, scorer):
    """share -> a batch of eight trajectories, and log p - log mu of each policy token [P].

    Pairs of trajectories share a prefix. They were sampled by almost the scorer's weights, but the third and the sixth
    in the batch by others.
    """

    def make(share: bool):
        pieces = [(False, 5), (True, 6), (False, 4), (True, 9)]
        trajectories = [make_trajectory(seed, pieces, seed // 2) for seed in range(8)]
        for one, other in zip(trajectories[::2], trajectories[1::2], strict=True):
            other.token_ids[:18] = one.token_ids[:18]
        (packed,) = pack(trajectories, [1.0, -0.5] * 4, 10**6, share_prefixes=share)
        with torch.no_grad():
            logprobs = packed.spread(scorer(packed, linear_logprob))
        generator = torch.Generator().manual_seed(0)
        noise = 1e-3 * torch.randn(logprobs.shape, generator=generator)
        starts = packed.policy_cu_seqlens.tolist()
        noise[starts[2] : starts[3]] += 0.3
        noise[starts[5] : starts[6]] -= 0.3
        return dataclasses.replace(packed, rollout_logprobs=logprobs - noise), noise

    return make


# ---------------------------------------------------------------------------------------------------------- measuring


def test_the_numbers_are_those_of_their_definitions():
    generator = np.random.default_rng(0)
    difference = 0.3 * generator.standard_normal(1000)
    ratio = np.exp(difference)
    sums = {
        "logprob_difference": np.abs(difference).sum(),
        "rollout_policy_kl": (ratio - 1 - difference).sum(),
        "ratio": ratio.sum(),
        "ratio_squared": (ratio**2).sum(),
    }
    row = agreement(sums, {"logprob_difference_max": np.abs(difference).max()}, 1000, 1000)
    assert tuple(row) == AGREEMENT
    assert row["sampler_difference_mean"] == pytest.approx(np.abs(difference).mean())
    assert row["sampler_difference_max"] == np.abs(difference).max()
    assert row["sampler_kl"] == pytest.approx(0.045, rel=0.2)  # half the variance
    weights = ratio / ratio.sum()
    assert row["sampler_ess"] == pytest.approx(1 / (1000 * (weights**2).sum()))
    equal = {"logprob_difference": 0.0, "rollout_policy_kl": 0.0, "ratio": 7.0, "ratio_squared": 7.0}
    assert agreement(equal, {"logprob_difference_max": 0.0}, 7, 7)["sampler_ess"] == 1.0
    sums["ratio"], sums["ratio_squared"] = sums["ratio"] + 500, sums["ratio_squared"] + 500  # tokens not sampled
    others = agreement(sums, {"logprob_difference_max": np.abs(difference).max()}, 1500, 1000)
    assert others == pytest.approx(row)


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_loss_reports_them(batch, scorer, on_policy):
    packed, noise = batch(True)
    _, metrics = policy_loss(scorer, AlgorithmConfig(), packed, 100, on_policy=on_policy)
    torch.testing.assert_close(metrics["logprob_difference"], noise.abs().sum(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(metrics["ratio_squared"], (2 * noise).exp().sum(), atol=1e-3, rtol=1e-4)


def rows(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()][1:]


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_every_row_has_the_first_minibatchs(make_config, make_console, num_minibatches):
    config = make_config(train={"num_steps": 2, "num_minibatches": num_minibatches}, optimizer={"learning_rate": 1e-2})
    console = make_console()
    train(config, console)
    for row in rows(config):
        assert 0 < row["sampler_difference_mean"] <= row["sampler_difference_max"] < 1e-4
        assert 0 <= row["sampler_kl"] < LIMITS["float32"] and row["sampler_ess"] == pytest.approx(1.0, abs=1e-6)
        assert "ratio_squared" not in row
        moved = row["logprob_difference_max"] > 1e-3  # by the first minibatch's update
        assert moved == (num_minibatches == 2)
    assert not [note for note in console.notes if "not the trainer's" in note]


@pytest.mark.parametrize("mask_observations", [True, False])
def test_a_sampler_that_says_something_else_is_named(make_config, make_console, monkeypatch, mask_observations):
    """As with wrong contents in the cache, or weights of another step.

    Tokens that were not sampled do not hide it where they are trained on.
    """
    read = Engine._postprocess

    def wrong(engine, step, token_ids, logprobs):
        return read(engine, step, token_ids, logprobs - 0.1)

    monkeypatch.setattr(Engine, "_postprocess", wrong)
    settings = {"train": {"num_steps": 2}, "algorithm": {"mask_observations": mask_observations}}
    config, console = make_config(**settings), make_console()
    train(config, console)
    (note,) = [note for note in console.notes if "not the trainer's" in note]  # no worse at the second step
    assert note.startswith("step 1: the sampler's log-probabilities are not the trainer's: KL 0.00")
    assert "fault in the cached attention" in note
    assert rows(config)[0]["sampler_difference_mean"] == pytest.approx(0.1, abs=1e-3)


# -------------------------------------------------------------------------------------------------------------- saying


def row(kl: float | None, step: int = 1) -> dict[str, float | None]:
    return {"step": step} | dict.fromkeys(AGREEMENT, 0.5) | {"sampler_kl": kl}


def test_it_is_said_once_and_again_when_it_has_become_worse():
    watch = AgreementWatch(Config())
    limit = LIMITS[Config().model.dtype]
    said = [watch.warning(row(factor * limit, step)) for step, factor in enumerate((0.9, 1.1, 2.0, 1.5, 2.3, 2.3, 9.0))]
    assert [text is not None for text in said] == [False, True, False, False, True, False, True]
    assert said[4].startswith("step 4: ")
    assert watch.warning(row(None)) is None  # nothing was updated


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_update_that_was_not_finite_says_nothing_of_the_steps_behind_it(broken):
    watch = AgreementWatch(Config())
    limit = LIMITS[Config().model.dtype]
    said = [watch.warning(row(kl, step)) for step, kl in enumerate((broken, 0.1 * limit, 0.9 * limit, 1.1 * limit))]
    assert [text is not None for text in said] == [False, False, False, True]


@pytest.mark.parametrize(
    ("changes", "cause", "advice"),
    [
        ({"model": {"dtype": "float32"}}, "fp32 does not explain it", "rollout.engine=plain"),
        ({"model": {"dtype": "bfloat16"}}, "more than bf16 explains", "algorithm.mismatch_mask=geometric"),
        ({"rollout": {"engine": "vllm"}}, "likely vLLM's kernels", "rollout.engine=native"),
        (
            {"model": {"dtype": "bfloat16"}, "algorithm": {"importance_cap": 0, "mismatch_mask": "geometric"}},
            "more than bf16 explains",
            "algorithm.importance_cap=2 corrects small ones",
        ),
    ],
)
def test_the_cause_is_the_configurations(changes, cause, advice):
    text = AgreementWatch(Config.model_validate(changes)).warning(row(1.0))
    assert cause in text
    assert advice in text
    masks = changes.get("algorithm", {}).get("mismatch_mask") is not None
    assert not (masks and "mismatch_mask" in text)


# ------------------------------------------------------------------------------------------------------------- masking


def kept_by_hand(noise, packed, kind, low, high) -> list[bool]:
    starts = packed.policy_cu_seqlens.tolist()
    kept = []
    for begin, end in zip(starts, starts[1:], strict=False):
        own = noise[begin:end].double()
        ratio = math.exp(float(own.sum() if kind == "sequence" else own.mean()))
        kept.append(low <= ratio <= high)
    return kept


@pytest.mark.parametrize(("kind", "low", "high"), [("geometric", 0.99, 1.01), ("sequence", 0.0, 3.0)])
def test_who_is_left_out(batch, kind, low, high):
    packed, noise = batch(False)
    algorithm = AlgorithmConfig(mismatch_mask=kind, mismatch_low=low, mismatch_high=high)
    rollout = packed.rollout_logprobs
    weights = mismatch_weights(rollout + noise, rollout, packed.policy_cu_seqlens, algorithm)
    kept = kept_by_hand(noise, packed, kind, low, high)
    assert kept == [place not in ((2, 5) if kind == "geometric" else (2,)) for place in range(8)]
    lengths = packed.policy_cu_seqlens.diff().tolist()
    assert weights.tolist() == [float(flag) for flag, n in zip(kept, lengths, strict=True) for _ in range(n)]


def test_tokens_that_nobody_sampled_and_empty_trajectories_do_not_count():
    algorithm = AlgorithmConfig(mismatch_mask="geometric")
    logprobs, rollout = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, math.nan, -2.5])
    weights = mismatch_weights(logprobs, rollout, torch.tensor([0, 2, 2, 3], dtype=torch.int32), algorithm)
    assert weights.tolist() == [1.0, 1.0, 0.0]
    for offsets in ([0], [0, 0]):  # the latter is a micro-batch that only fills up a round
        nothing = mismatch_weights(logprobs[:0], rollout[:0], torch.tensor(offsets, dtype=torch.int32), algorithm)
        assert nothing.shape == (0,)


def test_the_mean_is_over_the_tokens_that_somebody_sampled():
    """Where observations are trained on, counting them would hide the difference of the sampled tokens."""
    algorithm = AlgorithmConfig(mismatch_mask="geometric", mismatch_high=1.05)
    logprobs, rollout = torch.full((20,), -1.0), torch.full((20,), math.nan)
    rollout[4:6] = -1.1
    assert not mismatch_weights(logprobs, rollout, torch.tensor([0, 20], dtype=torch.int32), algorithm).any()


@pytest.mark.parametrize("kind", ["sequence", "geometric"])
def test_a_mask_does_not_wait_for_the_device(kind):
    """Runs on the meta device, which has no values to wait for."""
    logprobs, offsets = torch.zeros(7, device="meta"), torch.zeros(4, dtype=torch.int32, device="meta")
    algorithm = AlgorithmConfig(mismatch_mask=kind, mismatch_low=0.3, mismatch_high=3.0)
    weights = mismatch_weights(logprobs, logprobs, offsets, algorithm)
    assert (weights.shape, weights.dtype, weights.is_meta) == ((7,), torch.float32, True)


def test_no_mask_hides_a_trainer_that_is_broken():
    """A NaN of the trainer's stays in the loss, so that the update is skipped and reported."""
    algorithm = AlgorithmConfig(mismatch_mask="geometric")
    logprobs, rollout = torch.tensor([-1.0, math.nan, -3.0]), torch.tensor([-1.0, -2.0, -2.5])
    weights = mismatch_weights(logprobs, rollout, torch.tensor([0, 2, 3], dtype=torch.int32), algorithm)
    assert weights.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("on_policy", [True, False])
def test_those_left_out_have_no_gradient(batch, scorer, loss, on_policy, share):
    """The loss is that of the others, by the same denominator."""
    packed, noise = batch(share)
    results = []
    kept = torch.tensor(kept_by_hand(noise, packed, "geometric", 0.99, 1.01))
    alone = packed.advantages * kept.repeat_interleave(packed.policy_cu_seqlens.diff().long())
    for mask, advantages in (("geometric", packed.advantages), ("none", alone)):
        algorithm = AlgorithmConfig(loss=loss, mismatch_mask=mask)
        value, metrics = policy_loss(
            scorer, algorithm, dataclasses.replace(packed, advantages=advantages), 50, on_policy=on_policy
        )
        assert ("mismatch_fraction" in metrics) == (mask != "none")
        if mask != "none":
            assert float(metrics["mismatch_fraction"]) == float((alone == 0).sum())
        scorer.zero_grad()
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in scorer.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert any(gradient.abs().max() > 0 for gradient in results[0][1:])


def test_a_run_with_a_mask_counts_what_it_left_out(make_config, make_console):
    settings = {"mismatch_mask": "sequence", "mismatch_low": 0.999999, "mismatch_high": 1.0000001}  # even for fp32
    config = make_config(train={"num_steps": 1}, algorithm=settings)
    train(config, make_console())
    assert 0 < rows(config)[0]["mismatch_fraction"] < 1


# ------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_losses_differ_off_policy_alone(make_config, make_console, loss):
    settings = {"num_steps": 1, "num_minibatches": 2}
    found = {}
    for name in ("ppo", loss):
        config = make_config(
            run={"name": name}, train=settings, algorithm={"loss": name}, optimizer={"learning_rate": 1e-2}
        )
        train(config, make_console())
        found[name] = rows(config)[0]
    assert found[loss]["policy_tokens"] == found["ppo"]["policy_tokens"]
    assert found[loss]["grad_norm"] != found["ppo"]["grad_norm"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dual_clip": 0.5}, "dual_clip: give 0, or"),
        ({"dual_clip": 3.0, "loss": "cispo"}, "dual_clip: give 0, or"),
        ({"dual_clip": 3.0}, "importance_cap, 2, so that 3 bounds nothing"),
        ({"mismatch_high": 0.9}, "mismatch_high"),
        ({"mismatch_mask": "sequence", "mismatch_low": 0.3}, "give mismatch_low and mismatch_high"),
        ({"loss": "grpo"}, "loss"),
    ],
)
def test_settings_that_cannot_be(changes, sentence):
    with pytest.raises(ValidationError, match=sentence):
        AlgorithmConfig(**changes)
