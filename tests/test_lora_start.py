"""Training that begins with an existing adapter: a checkpoint's, or peft's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from searchr1_kernels import linear_logprob

from searchr1_fast.config import load_config
from searchr1_fast.distributed import full
from searchr1_fast.memory_plan import plan_training
from searchr1_fast.models import load_model, save_adapter
from searchr1_fast.models.adapter_files import CONFIG, WEIGHTS, check_start
from searchr1_fast.models.lora import adapter_parameters, add_adapter
from searchr1_fast.packing import pack
from searchr1_fast.run import open_run
from searchr1_fast.train import train

RANK, ALPHA, TARGETS = 3, 6.0, ("q_proj", "v_proj", "up_proj")
KL = {"kl_coefficient": 0.05}
PPO = KL | {"name": "ppo", "group_size": 2, "critic_learning_rate": 1e-2, "kl_in_reward": True}
# The keys that peft 0.21.2 writes for a plain adapter.
PEFT_KEYS = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None, "bias": "none",
    "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "kasa_config": None,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
    "lora_bias": False, "lora_dropout": 0.05, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
    "qalora_group_size": 16, "rank_pattern": {}, "revision": None, "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False,
}  # fmt: skip


@pytest.fixture
def adapter(tiny_model_directory, tmp_path) -> Path:
    """A directory as peft writes it, with an adapter that has an effect."""
    model = load_model(tiny_model_directory)
    add_adapter(model, RANK, ALPHA, TARGETS)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_adapter(model, tmp_path / "sft", str(tiny_model_directory))
    config = json.loads((tmp_path / "sft" / CONFIG).read_text())
    (tmp_path / "sft" / CONFIG).write_text(json.dumps(PEFT_KEYS | {"peft_version": "0.21.2"} | config))
    return tmp_path / "sft"


@pytest.fixture
def start_config(make_config, adapter):
    """dtype, sections -> the configuration of a run that begins with it."""

    def make(dtype: str = "float32", **sections):
        lora = {"rank": RANK, "alpha": ALPHA, "targets": TARGETS, "path": str(adapter)}
        sections["optimizer"] = {"learning_rate": 1e-2, "warmup_steps": 0}
        return make_config(model={"dtype": dtype, "lora": lora}, eval={"sets": {}}, **sections)

    return make


def rows(config) -> list[dict]:
    return [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policy_critic_and_reference_begin_with_it(start_config, make_console, make_trajectory, adapter, dtype):
    """The reference keeps it as well: the KL is to the start of the run, not to the base model."""
    config, console = start_config(dtype, algorithm=PPO), make_console()
    expected = load_file(adapter / WEIGHTS)
    batches = pack([make_trajectory(seed, [(False, 5), (True, 4)]) for seed in range(3)], [1.0, -1.0, 0.5], 100)
    with open_run(config, console) as run:
        for learner in (run.policy, run.critic):
            own = adapter_parameters(learner.module.decoder)
            assert len(own) == len(expected)
            for name, parameter in own.items():
                assert torch.equal(full(parameter.detach()), expected[f"base_model.model.{name}.weight"]), name
                assert parameter.requires_grad
        model = load_model(adapter, getattr(torch, dtype))
        ids, ends = torch.arange(20) * 7 % 200, torch.tensor([0, 20])
        assert torch.equal(run.policy.replica.logits(ids, ends), model.logits(ids, ends))
        first = run.policy.reference_logprobs(batches)
        with torch.no_grad():
            own = [batch.spread(run.policy.module(batch, linear_logprob)) for batch in batches]
        assert all(torch.equal(one, two) for one, two in zip(first, own, strict=True))
        for _ in range(2):
            run.policy.update(batches, 12, first)
        run.policy.sync_replica()
        kept = adapter_parameters(run.policy.reference.decoder).values()
        planned = {row.name: row.num_bytes for row in plan_training(config, model.config).rows}
        assert planned["reference's adapter"] == sum(p.numel() * p.element_size() for p in kept)
        again = run.policy.reference_logprobs(batches)
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
        with torch.no_grad():
            moved = batches[0].spread(run.policy.module(batches[0], linear_logprob))
        assert (moved - first[0]).abs().max() > 1e-2
    assert any(note.endswith(f"frozen; it began as {adapter}") for note in console.notes)


@pytest.mark.parametrize("algorithm", [KL, PPO], ids=["grpo", "ppo"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(start_config, make_console, algorithm):
    """It goes on from its checkpoint, not from the adapter that it began with."""
    whole = start_config(algorithm=algorithm, run={"name": "whole"}, train={"num_steps": 3})
    train(whole, make_console())
    train(start_config(algorithm=algorithm, run={"name": "halves"}, train={"num_steps": 2}), make_console())
    halves = start_config(algorithm=algorithm, run={"name": "halves", "resume": True}, train={"num_steps": 3})
    train(halves, make_console())
    assert rows(whole)[0]["kl_ref"] == pytest.approx(0.0, abs=1e-6) and rows(whole)[-1]["kl_ref"] > 1e-4
    for one, other in zip(rows(whole), rows(halves), strict=True):
        for key, value in one.items():
            if not key.startswith(("time_", "search/")) and not key.endswith("_per_second"):
                assert other[key] == value, key
    files = [c.run_directory / "checkpoints" / "latest" / "adapter" / WEIGHTS for c in (whole, halves)]
    ends = [load_file(file) for file in files]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_begins_where_another_ended(start_config, make_config, make_console):
    """The adapter that another run left behind is the one that it begins with."""
    first = start_config(run={"name": "first"}, train={"num_steps": 1})
    train(first, make_console())
    left = first.run_directory / "checkpoints" / "latest" / "adapter"
    lora = {"rank": RANK, "alpha": ALPHA, "targets": TARGETS, "path": str(left)}
    second = make_config(model={"lora": lora}, eval={"sets": {}}, run={"name": "second"})
    with open_run(second, make_console()) as run:
        for name, parameter in adapter_parameters(run.policy.replica).items():
            assert torch.equal(parameter, load_file(left / WEIGHTS)[f"base_model.model.{name}.weight"])


# ------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"rank": 4}, "has other settings than this run; set model.lora.rank=3$"),
        ({"alpha": 32.0}, "set model.lora.alpha=6$"),
        ({"rank": 2, "targets": ("q_proj", "k_proj")}, r"set model.lora.rank=3 model.lora.targets=\[q_proj,up_proj,v_"),
        ({"path": "nowhere"}, "nowhere is not an adapter's directory, as peft writes it: it has no adapter_config"),
    ],
)
def test_other_settings_are_said_before_anything_is_loaded(start_config, make_console, monkeypatch, lora, sentence):
    config = start_config()
    changed = config.model.lora.model_copy(update=lora)
    config = config.model_copy(update={"model": config.model.model_copy(update={"lora": changed})})
    monkeypatch.setattr("searchr1_fast.run.build_environments", None)
    with pytest.raises(ValueError, match=sentence):
        train(config, make_console())
    assert not config.run_directory.exists()


def test_an_adapter_of_another_model_is_refused(adapter, tiny_model_directory, tmp_path):
    """A copy of a model is another directory; a name on the Hub may stand for any directory with that name."""
    arguments = (RANK, ALPHA, TARGETS)
    check_start(adapter, tiny_model_directory, *arguments)
    copy = tmp_path / "copy" / "Qwen9-1B"
    shutil.copytree(tiny_model_directory, copy)
    with pytest.raises(ValueError, match=r"stands on \S+, model.path is \S+Qwen9-1B; give its own model, or"):
        check_start(adapter, copy, *arguments)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "Qwen/Qwen9-1B"}))
    check_start(adapter, copy, *arguments)
    with pytest.raises(ValueError, match="stands on Qwen/Qwen9-1B, model.path is"):
        check_start(adapter, tiny_model_directory, *arguments)
    (adapter / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="stands on None"):
        check_start(adapter, copy, *arguments)


def test_a_path_without_a_rank_is_refused():
    with pytest.raises(ValueError, match="model.lora.path: rank 0 means that there is no adapter; set model.lora.rank"):
        load_config(None, ["model.lora.path=runs/sft"])
