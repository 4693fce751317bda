"""Training with an adapter: what moves and what does not, who shares the base, what a run writes and resumes from."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from searchr1_kernels import linear_logprob
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from searchr1_fast.cli import model_directory
from searchr1_fast.config import load_config
from searchr1_fast.critic import Critic
from searchr1_fast.distributed import process
from searchr1_fast.models import load_model, load_tokenizer
from searchr1_fast.models.decoder import Block
from searchr1_fast.models.lora import adapted_layers, adapter_parameters, base_parameters
from searchr1_fast.packing import pack
from searchr1_fast.policy import Policy, padding_batch
from searchr1_fast.rollout.weight_handover import HandedWeights
from searchr1_fast.run import open_run
from searchr1_fast.train import train

LORA = {"rank": 4, "alpha": 8.0}
PIECES = [(False, 5), (True, 4), (False, 6), (True, 3)]
ADVANTAGES = [1.5, -0.5, 0.25, 2.0, -1.0]
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture
def batches(make_trajectory):
    trajectories = [make_trajectory(seed, [*PIECES, (False, 2), (True, 1 + seed)]) for seed in range(5)]
    for trajectory in trajectories[1:3]:  # a shared prefix
        trajectory.token_ids[:7] = trajectories[0].token_ids[:7]
    packed = pack(trajectories, ADVANTAGES, 60)
    assert len(packed) > 1 and any(batch.prefixes is not None for batch in packed)
    return [*packed, padding_batch()]


@pytest.fixture
def make_policy(make_config, make_decoder):
    """ranks, dtype, sections -> a policy with an adapter."""

    def make(ranks, dtype="float32", lora=None, **sections) -> Policy:
        config = make_config(model={"dtype": dtype, "lora": LORA | (lora or {})}, **sections)
        return Policy(make_decoder(0, tied=True), config, ranks)

    return make


def count_tokens(batches) -> int:
    return sum(batch.num_policy_tokens for batch in batches)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


# -------------------------------------------------------------------------------------------------------- what is moved


@each_dtype
def test_the_adapter_moves_and_the_base_keeps_its_bits(make_policy, make_decoder, batches, dtype):
    compute = getattr(torch, dtype)
    with process("cpu", 1, 0) as ranks:
        policy = make_policy(ranks, dtype, optimizer={"learning_rate": 1e-2, "weight_decay": 0.1})
        expected = {name: p.detach().to(compute).clone() for name, p in make_decoder(0, tied=True).named_parameters()}
        before = {name: whole(p) for name, p in policy.parameters.items()}
        for _ in range(3):
            policy.update(batches, count_tokens(batches))
        policy.sync_replica()
        decoder = policy.module.decoder
        assert {name.removeprefix("decoder.") for name in policy.parameters} == adapter_parameters(decoder).keys()
        assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
        assert {id(p) for p in policy.optimizer.state} == {id(p) for p in policy.parameters.values()}
        assert not any(torch.equal(whole(p), before[name]) for name, p in policy.parameters.items())
        for name, parameter in base_parameters(policy.replica).items():
            assert parameter is base_parameters(decoder)[name]  # one base, unsharded
            assert parameter.grad is None and not isinstance(parameter, DTensor)
            assert parameter.dtype == compute and torch.equal(parameter, expected[name]), name
        for name, parameter in adapter_parameters(policy.replica).items():
            assert torch.equal(parameter, whole(adapter_parameters(decoder)[name]).to(compute))


@each_dtype
def test_a_gradient_is_the_merged_policy_s(make_policy, make_config, make_decoder, batches, dtype):
    """Chain rule by hand: with G the gradient of W where every weight learns, A gets B^T G and B gets G A^T."""
    tolerance = 1e-3 if dtype == "float32" else 0.05
    count = count_tokens(batches)
    with process("cpu", 1, 0) as ranks:
        policy = make_policy(ranks, dtype, algorithm={"entropy_coefficient": 0.01, "importance_cap": 0})
        with torch.no_grad():
            for parameter in policy.parameters.values():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.copy_(torch.randn(local.shape, generator=torch.Generator().manual_seed(len(local))) * 0.1)
        policy.sync_replica()
        merged = make_decoder(0, tied=True)
        with torch.no_grad():
            handed = HandedWeights(policy.replica)
            for name, parameter in merged.named_parameters():
                parameter.copy_(handed[name])
        config = make_config(algorithm={"entropy_coefficient": 0.01, "importance_cap": 0})
        plain = Policy(merged, config, ranks)
        policy.step = plain.step = lambda: 0.0
        policy.update(batches, count), plain.update(batches, count)
        for name, layer in adapted_layers(policy.replica).items():
            gradient = plain.parameters[f"decoder.{name}.weight"].grad
            expected = {
                "lora_A": layer.scale * layer.lora_B.float().T @ gradient,
                "lora_B": layer.scale * gradient @ layer.lora_A.float().T,
            }
            for part, value in expected.items():
                found = whole(policy.parameters[f"decoder.{name}.{part}"].grad)
                assert (found - value).norm() <= tolerance * value.norm(), (name, part)


@pytest.mark.parametrize("mode", ["selective", "full"])
@each_dtype
def test_recomputation_changes_nothing(make_policy, batches, mode, dtype):
    gradients = []
    with process("cpu", 1, 0) as ranks:
        for each in ("none", mode):
            policy = make_policy(ranks, dtype, train={"activation_checkpointing": each})
            policy.step = lambda: 0.0
            policy.update(batches, count_tokens(batches))
            gradients.append({name: whole(p.grad) for name, p in policy.parameters.items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.any() for name, gradient in gradients[0].items() if name.endswith("lora_B"))


# ------------------------------------------------------------------------------------------------- who shares the base


@each_dtype
def test_the_reference_is_the_base(make_policy, make_config, make_decoder, batches, dtype):
    """It gives what a reference in a module of its own gives, and costs no parameters."""
    kl = {"algorithm": {"kl_coefficient": 0.1}}
    with process("cpu", 1, 0) as ranks:
        policy = make_policy(ranks, dtype, optimizer={"learning_rate": 1e-2}, **kl)
        config = make_config(model={"dtype": dtype}, **kl)
        other = Policy(make_decoder(0, tied=True), config, ranks, make_decoder(0, tied=True))
        for batch, ours, theirs in zip(
            batches, policy.reference_logprobs(batches), other.reference_logprobs(batches), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if dtype == "float32" else 0.02)
            with torch.no_grad():
                assert torch.equal(ours, batch.spread(policy.module(batch, linear_logprob)))  # B is zero
        first = policy.reference_logprobs(batches)
        for _ in range(2):
            policy.update(batches, count_tokens(batches), first)
        policy.sync_replica()
        again = policy.reference_logprobs(batches)
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
        with torch.no_grad():
            assert not torch.allclose(batches[0].spread(policy.module(batches[0], linear_logprob)), first[0], atol=1e-3)
        assert all(parameter.grad is None for parameter in policy.reference.parameters())


@each_dtype
def test_the_critic_stands_on_the_policy_s_base(make_config, make_policy, batches, dtype):
    with process("cpu", 1, 0) as ranks:
        policy = make_policy(ranks, dtype)
        algorithm = {"critic_learning_rate": 2e-2, "value_clip": 0.0}
        config = make_config(model={"dtype": dtype, "lora": LORA}, algorithm=algorithm)
        critic = Critic(policy.replica.on_same_base(), config, ranks)
        base = base_parameters(policy.replica)
        assert all(p is base[name] for name, p in base_parameters(critic.module.decoder).items())
        own = {name.removeprefix("decoder.") for name in critic.parameters}
        assert own == {*adapter_parameters(policy.replica), "value_head.weight", "value_head.bias"}
        before = {name: p.clone() for name, p in base.items()}
        returns = [batch.advantages for batch in batches]
        assert all((values == 0).all() for values in critic.values(batches))
        losses = []
        for _ in range(40):
            metrics, _ = critic.update(batches, returns, critic.values(batches), count_tokens(batches))
            losses.append(float(metrics["value_loss"]))
        assert losses[-1] < 0.15 * losses[0]  # prefixes shared by different returns cannot fit
        assert all(torch.equal(p, before[name]) for name, p in base.items())


# ---------------------------------------------------------------------------------------------------------- whole runs


def lora_config(make_config, dtype="float32", lora=LORA, **sections):
    sections["optimizer"] = {"learning_rate": 1e-2, "warmup_steps": 0} | sections.get("optimizer", {})
    return make_config(model={"dtype": dtype, "lora": lora}, **sections)


def rows(config) -> list[dict]:
    return [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns(make_config, make_console):
    """It learns which letter answers which question, from one in four, with nothing but pairs of thin matrices."""
    config = lora_config(
        make_config,
        lora={"rank": 8, "alpha": 32.0},
        rollout={"max_searches": 0},
        algorithm={"group_size": 8},
        optimizer={"learning_rate": 5e-3, "betas": (0.9, 0.95), "weight_decay": 0.0},
        train={"num_steps": 80, "questions_per_step": 8, "tokens_per_microbatch": 4000},
    )
    result = train(config, make_console())
    before, after = (result[when]["letters"]["em"] for when in ("before", "after"))
    assert before < 0.5
    assert after > 0.7
    first, last = (np.mean([row["reward_mean"] for row in part]) for part in (rows(config)[1:4], rows(config)[-3:]))
    assert first < 0.4
    assert last > 0.55


@each_dtype
def test_what_a_run_leaves_is_the_engine_s_policy(make_config, make_console, tiny_tokenizer, dtype):
    """`hf/` is complete and merged, `adapter/` lies beside it, and `state/` holds nothing of the base."""
    config, console = lora_config(make_config, dtype), make_console()
    train(config, console)
    (said,) = (note for note in console.notes if note.startswith("adapter: rank 4 on q_proj, k_proj, v_proj, o_proj, "))
    checkpoint = config.run_directory / "checkpoints" / "latest"
    with open_run(
        config.model_copy(update={"run": config.run.model_copy(update={"resume": True})}), make_console()
    ) as run:
        replica = run.policy.replica
        ids = torch.arange(40) * 3 % tiny_tokenizer.vocab_size
        logits = replica.logits(ids, torch.tensor([0, 40]))
        handed = HandedWeights(replica)
        written = load_file(checkpoint / "hf" / "model.safetensors")
        assert all(torch.equal(written[name], handed[name]) for name in base_parameters(replica))
        adapter = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
        for name, parameter in adapter_parameters(replica).items():
            assert torch.equal(adapter[f"base_model.model.{name}.weight"], parameter)
        learned, frozen = (
            sum(p.numel() for p in part(replica).values()) for part in (adapter_parameters, base_parameters)
        )
        assert said.endswith(f"{learned:,} numbers are learned beside {frozen:,} frozen")
        keys = {key for learner in run.learners for key in learner.tensors()}
        assert all("lora_" in key for key in keys) and any(".optimizer." in key for key in keys)
    settings = json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["base_model_name_or_path"]) == (4, config.model.path)
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint / "hf", dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    tolerance = 1e-4 if dtype == "float32" else 0.03
    difference = (theirs(ids[None]).logits[0].float() - logits.float()).abs().max()
    assert difference <= tolerance * logits.float().abs().max()
    assert dict(load_model(checkpoint / "hf").named_parameters()).keys() == base_parameters(replica).keys()
    assert model_directory(config.run_directory) == checkpoint / "adapter"  # evaluations lose nothing to rounding
    again = load_model(checkpoint / "adapter", getattr(torch, dtype))
    assert torch.equal(again.logits(ids, torch.tensor([0, 40])), logits)
    assert load_tokenizer(checkpoint / "adapter").encode("k1?") == tiny_tokenizer.encode("k1?")


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_stopped_run_goes_on_as_if_it_had_not(make_config, make_console, algorithm):
    settings = {"kl_coefficient": 0.05, "name": algorithm}
    if algorithm == "ppo":
        settings |= {"group_size": 2, "critic_learning_rate": 1e-2, "kl_in_reward": True}
    sections = {"algorithm": settings, "eval": {"sets": {}}}
    config = lora_config(make_config, run={"name": "whole"}, train={"num_steps": 3}, **sections)
    train(config, make_console())
    train(lora_config(make_config, run={"name": "halves"}, train={"num_steps": 2}, **sections), make_console())
    halves = lora_config(make_config, run={"name": "halves", "resume": True}, train={"num_steps": 3}, **sections)
    train(halves, make_console())
    ends = [
        load_file(c.run_directory / "checkpoints" / "latest" / "hf" / "model.safetensors") for c in (config, halves)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    timed = ("time_", "search/")
    for one, other in zip(rows(config), rows(halves), strict=True):
        for key, value in one.items():
            if not key.startswith(timed) and not key.endswith("_per_second"):
                assert other[key] == value, key


def test_another_base_or_kind_is_refused(make_config, make_console, tmp_path):
    config = lora_config(make_config, train={"num_steps": 1}, eval={"sets": {}})
    train(config, make_console())
    again = lora_config(make_config, run={"resume": True}, eval={"sets": {}})
    moved = again.model_copy(update={"model": again.model.model_copy(update={"path": str(tmp_path / "other")})})
    checkpoint = config.run_directory / "checkpoints" / "latest"
    shutil.copytree(checkpoint / "hf", tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds an adapter, and model.path=\S+other is not the model"):
        train(moved, make_console())
    plain = again.model_copy(update={"model": make_config().model})
    with pytest.raises(ValueError, match=r"another kind of run: it (lacks|also holds) 'policy"):
        train(plain, make_console())


def test_compiled_blocks_with_a_reference(make_config, make_console, monkeypatch):
    """Passes of the base have graphs of their own, and there is room for both kinds."""
    original = Block.compile_in_place
    monkeypatch.setattr(Block, "compile_in_place", lambda self, backend: original(self, "eager"))
    sections = {"algorithm": {"kl_coefficient": 0.05}, "eval": {"sets": {}}}
    results = []
    for compiled in (False, True):
        config = lora_config(make_config, run={"name": str(compiled)}, **sections)
        model = config.model.model_copy(update={"compile_blocks": compiled})
        train(config.model_copy(update={"model": model}), make_console())
        results.append(rows(config)[-1])
    for key in ("reward_mean", "policy_loss", "kl_ref", "grad_norm"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-3, abs=1e-5), key
    assert results[0]["kl_ref"] > 0


def test_compiled_blocks_have_graphs_for_all_who_share_a_base(make_config, make_decoder, make_trajectory, monkeypatch):
    """Policy, critic, replica and reference, with many rows, one and none.

    That is more graphs of two pieces of code than torch allows by default, and a second step adds none.
    """
    graphs, original = [], Block.compile_in_place

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(Block, "compile_in_place", lambda self, backend: original(self, keep))
    with process("cpu", 1, 0) as ranks:
        algorithm = {"name": "ppo", "group_size": 2, "kl_coefficient": 0.1, "kl_in_reward": True}
        config = make_config(model={"dtype": "bfloat16", "compile_blocks": True, "lora": LORA}, algorithm=algorithm)
        policy = Policy(make_decoder(0, tied=True), config, ranks)
        critic = Critic(policy.replica.on_same_base(), config, ranks)
        trajectories = [make_trajectory(seed, [(False, 5), (True, 4)]) for seed in range(4)]
        single = pack([make_trajectory(9, [(False, 4), (True, 1)])], [1.0], 60)
        batches = [*pack(trajectories, ADVANTAGES[:4], 20), padding_batch(), *single]
        counts = []
        for _ in range(2):
            references, values = policy.reference_logprobs(batches), critic.values(batches)
            policy.update(batches, 17, references)
            critic.update(batches, [batch.advantages for batch in batches], values, 17)
            policy.sync_replica()
            counts.append(len(graphs))
        assert counts[0] == counts[1] > 8


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.lora.targets=[q_proj, lm_head]", "model.lora.targets.1"),
        ("model.lora.targets=[q_proj, q_proj]", "each once"),
        ("model.lora.targets=[]", "at least one layer"),
        ("model={lora: {rank: 8}, offload: {replica: true}}", "replica and reference are the frozen base"),
        ("model.lora.r=8", "did you mean `model.lora.rank`"),
        ("model.lora.rank=-1", "model.lora.rank"),
    ],
)
def test_mistakes_are_one_sentence(override, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config(None, [override])
