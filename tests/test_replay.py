"""Updates that are not finite: the run continues without them and keeps them, and `searchr1 replay` finds the cause."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from searchr1_fast import train as train_module
from searchr1_fast.bad_updates import BadUpdate, MicroBatch, read_bad_update, write_bad_update
from searchr1_fast.critic import Critic
from searchr1_fast.distributed import Ranks
from searchr1_fast.examination import examine, load_learner
from searchr1_fast.models import load_model
from searchr1_fast.packing import pack
from searchr1_fast.policy import Policy, TrainingDiverged
from searchr1_fast.replay import main
from searchr1_fast.train import train

PPO = {"name": "ppo", "group_size": 2, "critic_learning_rate": 1e-3, "kl_coefficient": 0.01, "kl_in_reward": True}
ADVANTAGES = [1.5, -0.5, 0.25]


@pytest.fixture
def spoil(monkeypatch):
    """change -> None; from then on it is called with each rollout's number and minibatches, which it may change."""

    def run(change) -> None:
        add_references, steps = train_module.add_references, iter(range(1, 1000))

        def spoiled(run, minibatches, rewards):
            add_references(run, minibatches, rewards)
            change(next(steps), minibatches)

        monkeypatch.setattr(train_module, "add_references", spoiled)

    return run


@pytest.fixture
def trajectories(make_trajectory):
    lengths = ([(False, 7), (True, 2)], [(False, 5), (True, 4), (False, 6), (True, 3)], [(False, 3), (True, 9)])
    return [make_trajectory(seed, pieces) for seed, pieces in enumerate(lengths)]


def rows(config) -> list[dict]:
    return [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]


def replayed(capsys, *arguments: str | Path) -> tuple[int, str]:
    """Exit code and what was printed, on one line."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, " ".join("".join(capsys.readouterr()).split())


def nan_at(values: torch.Tensor, place: int) -> torch.Tensor:
    values = values.clone()
    values[place] = float("nan")
    return values


def test_a_run_goes_on_without_a_bad_update_and_its_replay_names_the_input(make_config, make_console, spoil, capsys):
    def change(step, minibatches):
        if step == 2:
            batches = minibatches[1].batches
            batches[1] = replace(batches[1], advantages=nan_at(batches[1].advantages, 3))

    spoil(change)
    config = make_config(
        algorithm={"kl_coefficient": 0.05, "drop_zero_variance_groups": False},
        train={"num_steps": 3, "num_minibatches": 2},
    )
    console = make_console()
    assert train(config, console)["step"] == 3
    assert [row.get("skipped_updates") for row in rows(config)] == [None, 0, 1, 0]
    folder = config.run_directory / "bad_steps"
    assert sorted(path.name for path in folder.iterdir()) == ["policy_000003.safetensors", "step_000002_policy_1.pt"]
    file = folder / "step_000002_policy_1.pt"
    (note,) = [note for note in console.notes if "skipped" in note]
    assert note.startswith("step 2: skipped an update of the policy: the gradient of ")
    assert note.endswith(f"; the weights are finite; searchr1 replay {file}")
    written = config.run_directory / "trajectories" / "step_000002.jsonl"  # although the configuration asks for none
    assert len(written.read_text().splitlines()) == 24

    update = read_bad_update(file)
    assert (update.step, update.minibatch, update.learner, update.num_updates, update.on_policy) == (
        2, 1, "policy", 3, False,
    )  # fmt: skip
    assert all(micro_batch.ref_logprobs is not None for micro_batch in update.micro_batches)
    batch = update.micro_batches[1].batch
    sequence = sum(end <= 3 for end in batch.policy_cu_seqlens.tolist()[1:])
    code, said = replayed(capsys, file)
    assert code == 0
    trajectory = batch.trajectory_index[sequence]
    assert (
        f"micro-batch 1, rank 0: the advantages that the loss was given, of 1 of {batch.num_policy_tokens} policy "
        f"tokens, the first number 3, in sequence {sequence} (trajectory {trajectory} of the step); the loss"
    ) in said
    assert said.count("rank 0: ") == 1  # the other micro-batches are fine
    assert "what the policy wrote up to there: <" in said


def test_a_token_that_nobody_sampled_is_no_flaw(make_config, make_decoder, trajectories, tmp_path):
    """Where observations are trained on, the sampler's log-probabilities of their tokens are NaN."""
    config = make_config(algorithm={"mask_observations": False})
    ranks = Ranks(0, 1, torch.device("cpu"))
    policy = Policy(make_decoder(0, tied=True), config, ranks)
    (batch,) = pack(trajectories, ADVANTAGES, 1000, mask_observations=False)
    assert batch.rollout_logprobs.isnan().any()
    infinite = batch.rollout_logprobs.clone()
    infinite[0] = -torch.inf
    update = bad_update(config, policy, [batch, replace(batch, rollout_logprobs=infinite)])
    policy.skipped_in_a_row = 1
    path = write_bad_update(tmp_path, update, policy, torch.float32)
    read = read_bad_update(path)
    module = load_learner(read, config, tmp_path, None, "float32", ranks.device)
    assert examine(module, read, config, 0, ranks.device).found == []
    (found, *_) = examine(module, read, config, 1, ranks.device).found
    assert found.startswith(f"the rollout_logprobs that the loss was given, of 1 of {batch.num_policy_tokens} policy")


@pytest.mark.parametrize("lora", [{}, {"rank": 3}], ids=["all", "lora"])
def test_the_weights_that_are_kept_are_those_that_the_update_met(
    make_config, tiny_model_directory, trajectories, tmp_path, lora
):
    """Without a flaw, the replay gives the trainer's own loss and gradient. An adapter's base is not kept."""
    config = make_config(model={"lora": lora})
    ranks = Ranks(0, 1, torch.device("cpu"))
    policy = Policy(load_model(tiny_model_directory), config, ranks)
    batches = pack(trajectories, ADVANTAGES, 1000)
    policy.update(batches, 18)  # so that its weights differ from the file's
    update = bad_update(config, policy, batches)
    policy.skipped_in_a_row = 1
    path = write_bad_update(tmp_path, update, policy, torch.float32)
    (kept,) = tmp_path.glob("*.safetensors")
    assert kept.name == "policy_000001.safetensors"
    assert load_file(kept).keys() == policy.parameters.keys()
    for name, tensor in load_file(kept).items():
        assert torch.equal(tensor, policy.parameters[name]), name
    read = read_bad_update(path)
    module = load_learner(read, config, tmp_path, None, "float32", ranks.device)
    finding = examine(module, read, config, 0, ranks.device)
    assert finding.found == []
    loss, _ = policy.loss(batches[0], 18)
    assert finding.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert finding.grad_norm == pytest.approx(policy.update(batches, 18)[1], rel=1e-5)


def bad_update(config, learner, batches, **beside) -> BadUpdate:
    return BadUpdate(
        step=7,
        minibatch=0,
        learner=learner.name,
        num_updates=learner.num_updates,
        denominator=18,
        on_policy=True,
        diagnosis=learner.diagnosis,
        config=config.to_yaml(),
        micro_batches=[MicroBatch(0, batch, **beside) for batch in batches],
    )


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_first_layer_that_overflows_is_named(
    make_config, tiny_model_directory, trajectories, tmp_path, capsys, recompute
):
    config = make_config(train={"activation_checkpointing": recompute})
    decoder = load_model(tiny_model_directory)
    with torch.no_grad():
        decoder.model.layers[1].mlp.up_proj.weight.mul_(1e30)
        decoder.model.layers[1].mlp.down_proj.weight.mul_(1e30)
    policy = Policy(decoder, config, Ranks(0, 1, torch.device("cpu")))
    batches = pack(trajectories, ADVANTAGES, 1000)
    policy.update(batches, 18)
    assert policy.skipped_in_a_row == 1
    path = write_bad_update(tmp_path, bad_update(config, policy, batches), policy, torch.float32)
    code, said = replayed(capsys, path)
    assert code == 0
    assert "rank 0: the output of decoder.model.layers.1.mlp.down_proj; the log-probabilities, of " in said
    assert "the gradient that comes back to the output of decoder.model" in said
    code, said = replayed(capsys, path, "--model", tiny_model_directory)
    assert code == 1
    assert "everything is finite this time" in said
    for kept in tmp_path.glob("*.safetensors"):
        kept.unlink()
    code, said = replayed(capsys, path)
    assert code == 2
    assert "policy_000000.safetensors, are gone" in said


def test_weights_that_are_not_finite_are_said(make_config, tiny_model_directory, trajectories, tmp_path, capsys):
    config = make_config()
    decoder = load_model(tiny_model_directory)
    with torch.no_grad():
        decoder.model.layers[0].self_attn.k_proj.weight[0, 0] = float("inf")
    policy = Policy(decoder, config, Ranks(0, 1, torch.device("cpu")))
    batches = pack(trajectories, ADVANTAGES, 1000)
    policy.update(batches, 18)
    path = write_bad_update(tmp_path, bad_update(config, policy, batches), policy, torch.float32)
    _, said = replayed(capsys, path)
    assert "the weights are not finite: 1 parameters, the first decoder.model.layers.0.self_attn.k_proj.weight" in said
    assert "rank 0: the output of decoder.model.layers.0.self_attn.k_proj" in said


def test_the_critic_has_its_own(make_config, make_console, spoil, capsys, tiny_model_directory):
    def change(step, minibatches):
        if step == 1:
            minibatches[0].returns[0] = nan_at(minibatches[0].returns[0], 0)

    spoil(change)
    config = make_config(algorithm=PPO, eval={"sets": {}})
    train(config, make_console())
    assert [row["skipped_updates"] for row in rows(config)] == [1, 0]
    file = config.run_directory / "bad_steps" / "step_000001_critic_0.pt"
    code, said = replayed(capsys, file)
    assert code == 0
    assert "micro-batch 0, rank 0: the returns that the loss was given, of 1 of" in said
    code, said = replayed(capsys, file, "--model", tiny_model_directory)
    assert code == 2
    assert "this update is the critic's" in said


def test_three_in_a_row_end_the_run_and_say_what_to_replay(make_config, make_console, spoil):
    def change(step, minibatches):
        for minibatch in minibatches if step > 1 else ():
            batches = minibatch.batches
            minibatch.batches = [replace(batch, advantages=nan_at(batch.advantages, 0)) for batch in batches]

    spoil(change)
    config = make_config(
        algorithm={"drop_zero_variance_groups": False}, train={"num_steps": 9, "num_minibatches": 2}, eval={"sets": {}}
    )
    with pytest.raises(TrainingDiverged, match=r"3 times in a row, after 2 updates.*replay \S+step_000003_policy_0.pt"):
        train(config, make_console())
    names = sorted(path.name for path in (config.run_directory / "bad_steps").iterdir())
    assert names == [
        "policy_000002.safetensors",  # one for all three
        "step_000002_policy_0.pt",
        "step_000002_policy_1.pt",
        "step_000003_policy_0.pt",
    ]


def test_only_the_newest_weights_are_kept(make_config, make_decoder, trajectories, tmp_path):
    config = make_config(algorithm=PPO)
    critic = Critic(make_decoder(0), config, Ranks(0, 1, torch.device("cpu")))
    batches = pack(trajectories, ADVANTAGES, 1000)
    for number in range(4):
        critic.num_updates, critic.skipped_in_a_row = number, 1
        values = {"returns": batches[0].advantages, "old_values": batches[0].advantages}
        write_bad_update(
            tmp_path, replace(bad_update(config, critic, batches, **values), step=number), critic, torch.float32
        )
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "critic_000002.safetensors",
        "critic_000003.safetensors",
    ]
    assert len(list(tmp_path.glob("*.pt"))) == 4


def test_what_is_no_update_is_refused(tmp_path, capsys):
    assert "there is no file" in replayed(capsys, tmp_path / "none.pt")[1]
    torch.save({"step": 1}, tmp_path / "other.pt")
    code, said = replayed(capsys, tmp_path / "other.pt")
    assert (code, "is not an update that a run has kept (KeyError: 'micro_batches')" in said) == (2, True)
    (tmp_path / "text.pt").write_text("text")
    assert "is not an update that a run has kept" in replayed(capsys, tmp_path / "text.pt")[1]
