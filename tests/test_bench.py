"""The throughput benchmark compares like with like. No durations are tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from searchr1_fast.console import Console
from searchr1_fast.distributed import process
from searchr1_fast.run import build_run

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """name -> a module of the folder bench, imported as `python bench/…` does it."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def make_twins(bench, make_config):
    """Changes by section -> (run, the plain policy, the questions of a step)."""

    def make(**changes):
        config = make_config(**changes)
        with process("cpu", 1, 0) as ranks:
            run = build_run(config, ranks, Console(quiet=True))
        return run, bench("plain").plain_policy(run), run.stream.next(config.train.questions_per_step)

    return make


def sampled(steps, run, questions, scored=False):
    """Take our step and undo it -> the step."""
    restore = steps.restorer(run.policy)
    step = steps.our_step(run, questions, scored)
    restore()
    return step


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"rollout": {"temperature": 0.8}, "train": {"tokens_per_microbatch": 60, "num_minibatches": 2}},
        {"algorithm": {"kl_coefficient": 0.05, "entropy_coefficient": 0.01}},
        {"algorithm": {"mask_observations": False}},
    ],
)
def test_losses_and_gradients_agree(bench, make_twins, changes, padding):
    """With one denominator, several micro-batches, and a reference that differs from the policy."""
    run, twin, questions = make_twins(**{"train": {"tokens_per_microbatch": 60}, **changes})
    steps = bench("steps")
    for learner in (run.policy, twin):
        if learner.reference is not None:
            with torch.no_grad():
                for parameter in learner.reference.parameters():
                    parameter.mul_(1.05)
    step = sampled(steps, run, questions)
    assert step.cost.update_tokens > 2 * run.config.train.tokens_per_microbatch
    agreed = steps.agreement(run, twin, step, padding=padding)
    assert agreed["gradient_norm"] > 0.01
    assert agreed["gradient_difference"] < 1e-4
    assert agreed["loss_plain"] == pytest.approx(agreed["loss_ours"], rel=1e-4, abs=1e-6)


def test_the_plain_loss_is_a_mean_of_means(bench, make_twins):
    """One micro-batch gives the mean over its policy tokens; several give the average, however many tokens each has."""
    steps, plain = bench("steps"), bench("plain")
    run, twin, questions = make_twins()
    trajectories = sampled(steps, run, questions).trajectories
    advantages = np.linspace(-1, 1, len(trajectories), dtype=np.float32)
    batches = plain.pad(trajectories, advantages, range(len(trajectories)), run.config, run.ranks.device)
    assert len({batch.num_policy_tokens for batch in batches}) > 1
    assert sum(batch.num_policy_tokens for batch in batches) == sum(t.loss_mask.sum() for t in trajectories)

    def accumulated(some, denominator=None):
        loss = twin.accumulate(some, twin.logprobs(some, twin.module), None, denominator).item()
        return loss, steps.take_gradient(twin)

    alone = [accumulated([batch]) for batch in batches]
    for batch, (loss, gradient) in zip(batches, alone, strict=True):
        # on-policy the ratio is 1, so the loss follows from the advantages
        assert loss == pytest.approx(-batch.advantages.sum().item() / batch.num_policy_tokens, abs=1e-6)
        torch.testing.assert_close(gradient, accumulated([batch], batch.num_policy_tokens)[1])
    loss, gradient = accumulated(batches)
    assert loss == pytest.approx(np.mean([loss for loss, _ in alone]), abs=1e-6)
    torch.testing.assert_close(gradient, torch.stack([gradient for _, gradient in alone]).mean(0))


def test_a_step_moves_the_weights_and_is_undone(bench, make_twins):
    steps, plain = bench("steps"), bench("plain")
    run, twin, questions = make_twins(optimizer={"learning_rate": 1e-2})
    variant = plain.VARIANTS["original"]
    one = plain.plain_run(run, twin, variant)
    for learner, step in (
        (run.policy, lambda: steps.our_step(run, questions, False)),
        (twin, lambda: steps.plain_step(one, variant, questions, False)),
    ):
        start = {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}
        restore = steps.restorer(learner)
        ends = []
        for _ in range(2):
            step()
            ends.append({name: parameter.detach().clone() for name, parameter in learner.parameters.items()})
            assert any(not torch.equal(start[name], ends[-1][name]) for name in start)
            restore()
            assert all(torch.equal(start[name], parameter) for name, parameter in learner.parameters.items())
            assert learner.num_updates == 0
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)  # no moments were left behind


def test_the_twins_sample_the_same_and_count_their_work(bench, make_twins):
    throughput, steps, plain = bench("throughput"), bench("steps"), bench("plain")
    run, twin, questions = make_twins()
    providers = throughput.build_providers(run, twin, list(plain.VARIANTS), scored=False)
    taken = {name: provider.run() for name, provider in providers.items()}
    ours = taken.pop("ours")
    lengths = [len(t.token_ids) for t in ours.trajectories]
    policy_tokens = sum(int(t.loss_mask.sum()) for t in ours.trajectories)
    assert any(t.num_searches for t in ours.trajectories)
    # every prefix counts once: a token is identified by all that comes before it
    tokens = {tuple(t.token_ids[: n + 1]) for t in ours.trajectories for n in range(len(t.token_ids))}
    rows = {tuple(t.token_ids[: n + 1]) for t in ours.trajectories for n in np.flatnonzero(t.loss_mask)}
    assert (ours.cost.update_tokens, ours.cost.update_rows) == (len(tokens), len(rows))
    assert len(tokens) < 0.8 * sum(lengths)
    assert (ours.cost.logprob_tokens, ours.cost.padding_tokens, ours.cost.discarded_tokens) == (0, 0, 0)
    assert ours.cost.sampled_tokens == policy_tokens
    for name, step in taken.items():
        variant, cost = plain.VARIANTS[name], step.cost
        assert steps.share_of_equal(ours.trajectories, step.trajectories) == 1.0
        assert cost.prefill_tokens > ours.cost.prefill_tokens
        assert cost.padding_tokens + sum(lengths) == cost.update_tokens == cost.update_rows == cost.logprob_rows
        assert (cost.padding_tokens > 0) == variant.padding
        assert (cost.discarded_tokens > 0) != variant.stop_at_tags
        assert cost.trained_trajectories == len(lengths)
        assert set(step.seconds) == set(steps.PHASES)


def test_scored_rewards_let_ours_drop_groups(bench, make_twins):
    throughput = bench("throughput")
    run, twin, questions = make_twins(algorithm={"group_size": 2})
    providers = throughput.build_providers(run, twin, ["stop"], scored=True)
    ours, stop = (provider.run() for provider in providers.values())
    pairs = ours.rewards.reshape(-1, 2)
    varied = int((pairs[:, 0] != pairs[:, 1]).sum())
    assert np.array_equal(ours.rewards, [t.reward for t in ours.trajectories])
    assert 0 < varied < len(pairs)
    assert (ours.cost.trained_trajectories, stop.cost.trained_trajectories) == (2 * varied, 2 * len(pairs))


def test_main_prints_a_row_last_and_appends_it(bench, make_config, tmp_path, capsys):
    path, output = tmp_path / "tiny.yaml", tmp_path / "rows" / "throughput.jsonl"
    path.write_text(make_config().to_yaml())
    main = bench("throughput").main
    for count in (1, 2):
        assert main(["--config", str(path), "--steps", "1", "--questions", "2", "--output", str(output)]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert output.read_text().splitlines()[count - 1 :] == printed[-1:]
    assert any("ours is faster by" in line for line in printed)
    row = json.loads(printed[-1])
    assert row.keys() >= {
        "benchmark",
        "date",
        "commit",
        "device",
        "threads",
        "versions",
        "model",
        "workload",
        "agreement",
    }
    assert row.keys() >= {"ratio", "ratios", "ratio_ranges", "flops_ratios", "repetitions", "systems", "overrides"}
    assert (row["workload"]["trajectories"], row["repetitions"]) == (8, 1)
    assert row["ratio"] == row["ratios"]["original"]
    assert row["agreement"]["gradient_difference"] < 1e-4
    assert list(row["systems"]) == ["ours", "original", "stop"]
    for system in row["systems"].values():
        assert system["equal_trajectories"] == 1.0
        assert sum(system["seconds"][p] for p in ("rollout", "search", "logprobs", "update", "other")) == pytest.approx(
            system["seconds"]["total"]
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["algorithm.name=ppo"], "algorithm.name=grpo"),
        (["rollout.engine=plain"], "rollout.engine"),
        (["--steps", "0"], "--steps 0"),
        (["train.question_per_step=3"], "questions_per_step"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(bench, capsys, arguments, sentence):
    assert bench("throughput").main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_every_provider_has_its_turn(bench):
    order = list(bench("harness").interleaved(["a", "b"], 3))
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows", "8,"], "--rows 8,: give numbers"),
        (["--rows", "0"], "--rows 0"),
        (["--context", "-1"], "--context -1"),
    ],
)
def test_decode_steps_that_cannot_be_are_one_sentence(bench, capsys, arguments, sentence):
    assert bench("decode").main(["--shape", "tiny", "--device", "cpu", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_decode_steps_are_timed_with_graphs_and_without(bench, capsys):
    engines = {"graphs", "waiting", "modules", "single"}
    arguments = ["--shape", "tiny", "--device", "cpu", "--rows", "3,1", "--context", "5", "--steps", "10"]
    assert bench("decode").main(arguments) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["rows"] for one in row["results"]] == [3, 1]
    for one in row["results"]:
        assert one["milliseconds"].keys() == one["tokens_per_second"].keys() == engines
    assert bench("decode").main([*arguments, "--engines", "graphs", "--parts"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["results"][0]["milliseconds"].keys() == {"graphs"} and row["results"][0]["parts"] == {}
    assert bench("decode").main([*arguments, "--lora-rank", "2", "--engines", "graphs,base"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["lora_rank"], row["results"][0]["milliseconds"].keys()) == (2, {"graphs", "base"})
    config = bench("decode").SHAPES["tiny"]
    model = bench("decode").build_model(config, torch.float32, torch.device("cpu"))
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert bench("decode").step_bytes(model, 3, 10) == weights + 4 * 2 * 3 * 10 * 2 * 2 * 16  # layers, heads, head size


def test_parts_of_a_decode_step_are_shown(bench, monkeypatch, capsys):
    """Shows the longest parts, profiles no more steps than there is room for, and with the engine's own mode."""
    parts = {"attend": {"ms": 1.999, "launches": 36.0}, "a copy": {"ms": 0.001, "launches": 2.0}}
    fused = []

    def device_parts(run, device, num_runs):
        fused.append([module for module in models if module.fused_generation])
        for _ in range(1 + num_runs):
            run()
        return parts

    models, build_model = [], bench("decode").build_model
    monkeypatch.setattr(bench("decode"), "build_model", lambda *given: models.append(build_model(*given)) or models[0])
    monkeypatch.setattr(bench("harness"), "device_parts", device_parts)
    arguments = ["--shape", "tiny", "--device", "cpu", "--rows", "3", "--context", "5", "--steps", "10", "--parts"]
    assert bench("decode").main([*arguments, "--engines", "graphs,modules"]) == 0
    *printed, row = capsys.readouterr().out.splitlines()
    assert json.loads(row)["results"][0]["parts"] == parts and fused == [models]
    assert "3 sequences: the device is at work for 2.00 ms of a step" in " ".join(" ".join(printed).split())
    assert [line.split() for line in printed if "attend" in line] == [["attend", "1.999", "36"]]
    assert not any("a copy" in line for line in printed)
