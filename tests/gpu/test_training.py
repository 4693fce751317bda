"""Training on a GPU: it runs in both types, resumes from a checkpoint, and an update waits for the device once."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import environment

from searchr1_fast import replay
from searchr1_fast.bad_updates import BadUpdate, MicroBatch, write_bad_update
from searchr1_fast.checkpoint import Checkpoint, latest_checkpoint
from searchr1_fast.checkpoint_writer import CheckpointWriter
from searchr1_fast.config import Config
from searchr1_fast.critic import Critic
from searchr1_fast.distributed import full, process
from searchr1_fast.models import load_model
from searchr1_fast.packing import pack
from searchr1_fast.policy import Policy, to_device
from searchr1_fast.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ALGORITHMS = {
    "grpo": {"name": "grpo", "group_size": 4, "kl_coefficient": 0.02},
    "ppo": {"name": "ppo", "group_size": 2, "critic_learning_rate": 1e-4, "kl_coefficient": 0.01, "kl_in_reward": True},
}
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def rows(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]


def demo(tmp_path: Path, algorithm: str, dtype: str, lora: dict | None = None) -> Config:
    """-> the configuration of two steps of the built-in model in a world of 60 entities."""
    world = {"num_entities": 60, "num_questions": 64}
    return Config.model_validate({
        "run": {"directory": str(tmp_path), "device": "cuda", "tensorboard": False, "trajectories_every": 0},
        "model": {"path": "builtin:base", "dtype": dtype, "lora": lora or {}},
        "prompt": {"template": "plain"},
        "data": {"world": world},
        "retrieval": {"topk": 2},
        "rollout": {
            "max_searches": 2, "max_turn_tokens": 32, "max_observation_tokens": 120, "max_sequence_tokens": 400,
            "max_num_seqs": 32,
        },
        "algorithm": ALGORITHMS[algorithm],
        "optimizer": {"learning_rate": 1e-4},
        "train": {"num_steps": 2, "questions_per_step": 6, "tokens_per_microbatch": 2000, "eval_every": 0},
        "eval": {"sets": {"unseen": {"world": world | {"split": "eval", "num_questions": 8}}}},
    })  # fmt: skip


@pytest.mark.parametrize("lora", [{}, {"rank": 8}], ids=["all", "lora"])
@each_algorithm
@each_dtype
def test_two_steps_of_the_built_in_model(tmp_path, make_console, algorithm, dtype, lora):
    config, console = demo(tmp_path, algorithm, dtype, lora), make_console()
    result = train(config, console)
    assert (result["step"], result["interrupted"]) == (2, False)
    last = rows(config)[-1]
    assert last["skipped_updates"] == 0 and last["searches_mean"] > 0
    assert last["policy_tokens"] > 0 and math.isfinite(last["grad_norm"]) and last["grad_norm"] > 0
    # The first minibatch is on-policy, so sampler and trainer differ only by rounding.
    assert abs(last["rollout_policy_kl"]) < (1e-5 if dtype == "float32" else 0.02)
    name = "sdpa" if dtype == "float32" else "varlen"
    assert any(note.startswith((f"attention: {name}", "attention: flash-attn")) for note in console.notes)
    assert (config.run_directory / "checkpoints" / "latest" / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize(("dtype", "overlap"), [("float32", True), ("bfloat16", False)])
def test_what_leaves_the_gpu_in_between_leaves_no_trace(tmp_path, make_console, dtype, overlap):
    """Moments, reference, replica and index come and go beside a cache and graphs that stay.

    Searches run in a thread of their own. (In bf16 not beside decoding, as rows that step together decide about last
    digits.)
    """
    found = []
    for name, moves in (("here", False), ("away", True)):
        values = demo(tmp_path / name, "grpo", dtype).model_dump()
        values["retrieval"] |= {"backend": "dense", "device": "cuda", "hashing_dimension": 256}
        values["retrieval"] |= {"park_during_update": moves}
        values["rollout"] |= {"overlap": moves and overlap, "keep_cache": moves}
        values["model"]["offload"] = dict.fromkeys(("optimizer", "reference", "replica"), moves)
        config = Config.model_validate(values)
        train(config, make_console())
        found.append(rows(config))
    (_, first, second), (_, other, last) = found
    for key in ("reward_mean", "searches_mean", "response_tokens_mean", "policy_tokens"):
        assert first[key] == other[key], key
    assert other["searches_mean"] > 0 and other["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-2)
    assert second["skipped_updates"] == last["skipped_updates"] == 0
    if dtype == "float32":
        assert last["grad_norm"] == pytest.approx(second["grad_norm"], rel=0.1)


@pytest.mark.parametrize(
    ("algorithm", "dtype", "lora"),
    [("grpo", "float32", {}), ("ppo", "bfloat16", {}), ("ppo", "bfloat16", {"rank": 4})],
)
def test_a_checkpoint_is_taken_up_where_it_was_left(make_config, make_console, algorithm, dtype, lora):
    """Step 3 after a checkpoint of step 2 is step 3 of the run that wrote it.

    Sampling is the same to the token, and learning up to sums that a GPU may add in any order.
    """
    settings = {
        "algorithm": ALGORITHMS[algorithm] | {"drop_zero_variance_groups": False},
        "model": {"dtype": dtype, "lora": lora},
        "train": {"num_steps": 3, "num_minibatches": 2},
        "checkpoint": {"every": 2},
    }
    run = {"device": "cuda"}
    config = changed(make_config, settings, run)
    train(config, make_console())
    whole = rows(config)[-1]
    checkpoints = config.run_directory / "checkpoints"
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step_000002", target_is_directory=True)
    shutil.rmtree(checkpoints / "step_000003")
    resumed = changed(make_config, settings, run | {"resume": True})
    console = make_console()
    train(resumed, console)
    assert console.notes[0].startswith("going on after step 2")
    again = rows(resumed)[-1]
    assert again["step"] == whole["step"] == 3
    for key in ("reward_mean", "searches_mean", "response_tokens_mean", "policy_tokens", "lr"):
        assert again[key] == whole[key], key
    for key in ("entropy", "kl_ref", "policy_loss", "grad_norm"):
        assert again[key] == pytest.approx(whole[key], rel=2e-2, abs=2e-3), key


def changed(make_config, settings: dict, run: dict) -> Config:
    """-> the configuration of the letters with `settings` and `run` merged into its sections."""
    base = make_config()
    sections = settings | {"run": run}
    values = base.model_dump()
    for name, section in sections.items():
        values[name] |= section
    return Config.model_validate(values)


def test_one_rank_under_torchrun(tmp_path):
    """NCCL and FSDP over a group of one rank, which bf16 uses."""
    config = demo(tmp_path, "grpo", "bfloat16")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*launcher, "-m", "searchr1_fast.train", str(file)],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert [row["step"] for row in rows(config)] == [0, 1, 2]


def prepared(make_config, make_decoder, make_trajectory, ranks, lora=None):
    """-> a policy with a reference, a critic, several micro-batches, and their number of policy tokens.

    Models are in bf16, and the micro-batches have shared beginnings.
    """
    algorithm = ALGORITHMS["grpo"] | {"entropy_coefficient": 0.01}
    config = make_config(model={"dtype": "bfloat16", "lora": lora or {}}, algorithm=algorithm)
    decoders = [make_decoder(seed).to(ranks.device) for seed in (0, 1, 2)]
    policy = Policy(decoders[0], config, ranks, decoders[1])
    critic = Critic(policy.replica.on_same_base() if lora else decoders[2], config, ranks)
    trajectories = [make_trajectory(seed, [(False, 9), (True, 6 + seed), (False, 12), (True, 4)]) for seed in range(6)]
    for trajectory in trajectories[1:]:
        trajectory.token_ids[:12] = trajectories[0].token_ids[:12]
    batches = pack(trajectories, [1.0, -1.0, 0.5, -0.5, 2.0, -2.0], 60)
    assert len(batches) > 2 and any(batch.prefixes is not None for batch in batches)
    count = sum(batch.num_policy_tokens for batch in batches)
    return policy, critic, [to_device(batch, ranks.device) for batch in batches], count


@pytest.mark.parametrize("lora", [{}, {"rank": 4}], ids=["all", "lora"])
def test_an_update_waits_for_the_device_once(make_config, make_decoder, make_trajectory, lora):
    """For the norm of the gradient; forward and backward passes of policy, reference and critic do not wait at all."""
    with process("cuda") as ranks:
        policy, critic, batches, count = prepared(make_config, make_decoder, make_trajectory, ranks, lora)
        returns = [torch.ones_like(batch.advantages) for batch in batches]

        def learn() -> None:
            values = critic.values(batches)
            references = policy.reference_logprobs(batches)
            critic.update(batches, returns, values, count)
            policy.update(batches, count, references)
            policy.update(batches, count, references, on_policy=False)

        for _ in range(2):  # compiles, allocates, creates the optimizers' state
            learn()
        steps = policy.step, critic.step
        policy.step = critic.step = lambda: 0.0
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            learn()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            policy.step, critic.step = steps
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                policy.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
        assert len(waits) == 1, waits


def test_a_save_holds_the_weights_as_they_were(tmp_path, make_config, make_decoder, make_trajectory):
    """They are copied to the host under FSDP's mixed precision, and written by a thread that opens no other device."""
    with process("cuda") as ranks:
        policy, _, batches, count = prepared(make_config, make_decoder, make_trajectory, ranks)
        references = policy.reference_logprobs(batches)
        writer = CheckpointWriter(tmp_path, ranks, keep=1)
        for step in (1, 2):  # the second one reuses the memory of the first
            policy.update(batches, count, references)
            expected = {name: full(tensor).clone() for name, tensor in policy.tensors().items()}
            writer.stage(step, policy.tensors(), {}, {}, lambda weights, directory: None)
            writer.start()
            for _ in range(3):
                policy.update(batches, count, references)
            writer.wait()
        saved = Checkpoint(latest_checkpoint(tmp_path), ranks)
        restored = policy.tensors(saved.keys)
        saved.read(restored)
        assert restored.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(full(restored[name]), tensor), name


def test_a_save_in_the_background_never_waits_for_the_device(tmp_path, make_config, make_decoder, make_trajectory):
    """The device is busy for some ten seconds, on the stream that both threads share; the write is done before."""
    with process("cuda") as ranks:
        policy, _, batches, count = prepared(make_config, make_decoder, make_trajectory, ranks)
        policy.update(batches, count, policy.reference_logprobs(batches))
        writer, busy = CheckpointWriter(tmp_path, ranks, keep=1), torch.cuda.Event()
        writer.stage(1, policy.tensors(), {}, {}, lambda weights, directory: None)
        torch.cuda._sleep(20_000_000_000)  # cycles
        busy.record()
        writer.start()
        writer.wait()
        assert not busy.query()
        assert latest_checkpoint(tmp_path).name == "step_000001"


def test_a_replay_names_the_layer(tmp_path, capsys, make_config, tiny_model_directory, make_trajectory):
    """In bf16, like the run."""
    with process("cuda") as ranks:
        config = make_config(model={"path": str(tiny_model_directory), "dtype": "bfloat16"})
        decoder = load_model(tiny_model_directory, device=ranks.device)
        with torch.no_grad():
            decoder.model.layers[1].mlp.up_proj.weight.mul_(1e30)
            decoder.model.layers[1].mlp.down_proj.weight.mul_(1e30)
        policy = Policy(decoder, config, ranks)
        trajectories = [make_trajectory(seed, [(False, 9), (True, 8)]) for seed in range(4)]
        packed = pack(trajectories, [1.0, -1.0, 0.5, -0.5], 1000)
        assert not math.isfinite(policy.update([to_device(batch, ranks.device) for batch in packed], 32)[1])
        parts = [MicroBatch(0, to_device(batch, ranks.device)) for batch in packed]
        bad = BadUpdate(1, 0, policy.name, 0, 32, True, policy.diagnosis, config.to_yaml(), parts)
        path = write_bad_update(tmp_path, bad, policy, torch.bfloat16)
    assert replay.main([str(path), "--device", "cuda"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "rank 0: the output of decoder.model.layers.1.mlp.down_proj; the log-probabilities, of " in said


def test_bf16_updates_as_the_cpu_does_in_fp32(make_config, make_decoder, make_trajectory):
    """Compares the norm of the gradient, and the weights after the first step of AdamW."""
    norms, weights = [], []
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        with process(device) as ranks:
            config = make_config(model={"dtype": dtype})
            policy = Policy(make_decoder(0).to(ranks.device), config, ranks)
            trajectories = [make_trajectory(seed, [(False, 9), (True, 8)]) for seed in range(5)]
            batches = [to_device(b, ranks.device) for b in pack(trajectories, [1.0, -1.0, 0.5, -0.5, 2.0], 40)]
            norms.append(policy.update([replace(batch) for batch in batches], 40)[1])
            policy.sync_replica()
            weights.append(torch.cat([p.detach().float().cpu().flatten() for p in policy.replica.parameters()]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2] == pytest.approx(norms[0], rel=0.05)
    # A weight whose gradient is rounding noise may go either way.
    assert ((weights[1] - weights[0]).abs() < 1e-6).float().mean() > 0.99
