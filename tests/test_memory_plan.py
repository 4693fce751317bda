"""The memory planner: numbers by hand, and the bytes that small policies and critics really occupy."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.distributed.tensor import DTensor

from searchr1_fast import head_counts, memory_plan
from searchr1_fast import policy as policy_module
from searchr1_fast.checkpoint_writer import CheckpointWriter
from searchr1_fast.config import load_config
from searchr1_fast.critic import Critic
from searchr1_fast.distributed import process
from searchr1_fast.losses import value_loss
from searchr1_fast.memory_plan import plan_training
from searchr1_fast.models import Decoder, KVCache, load_model
from searchr1_fast.models.lora import adapter_parameters, base_parameters
from searchr1_fast.models.published import published_config
from searchr1_fast.packing import pack
from searchr1_fast.policy import Policy
from searchr1_fast.retrieval.memory_plan import size_text
from searchr1_fast.train import train

GB = 10**9


def rows_of(plan) -> dict[str, int]:
    return {row.name: row.num_bytes for row in plan.rows}


def test_numbers_by_hand():
    """Qwen2.5-7B with PPO on 8 ranks, computed on paper from the published shape."""
    config = load_config("configs/search_r1_7b_ppo.yaml")
    plan = plan_training(config, published_config("qwen2.5-7b"), num_ranks=8, device_bytes=80 * GB)
    rows = rows_of(plan)
    parameters, head = 7_615_616_512, 152_064 * 3584  # every matrix has a multiple of 8 rows
    assert rows["policy: master weights"] == parameters // 8 * 4
    assert rows["policy: Adam's moments"] == parameters // 8 * 8
    assert rows["policy: replica that generates"] == 2 * parameters
    assert rows["reference"] == parameters // 8 * 2
    # the value head: one row of 3584 and a bias, padded to one row on every rank
    critic = (parameters - head) // 8 + 3584 + 1
    assert (rows["critic: master weights"], rows["critic: Adam's moments"]) == (4 * critic, 8 * critic)
    # 64 sequences of 4,596 tokens in blocks of 64, one block for a graph's rows without a sequence; the block table
    assert rows["KV cache"] == (64 * 72 + 1) * 64 * 57_344 + (64 + 1) * 72 * 4
    block = (3584 * 3584 + 3584) + 2 * (512 * 3584 + 512) + 3584 * 3584 + 3 * 3584 * 18944 + 2 * 3584
    assert rows["gathered weights"] == 2 * (2 * head + 3584 + 2 * block)
    # per row of a block: 2 norms, query, key, value, attention's output and its 28 sums, four of the MLP's width
    kept = 2 * (4 * 3584 + 4 + 2 * 3584) + 2 * (3584 + 512 + 512 + 3584) + 4 * 28 + 4 * 2 * 18944
    longest = max(config.train.tokens_per_microbatch, config.rollout.max_sequence_tokens)
    assert rows["activations"] == longest * (28 * kept + 4 * 3584 + 4 + 2 * 3584)


def test_vllm_holds_the_weights_once_more_while_it_is_awake():
    config, shape = load_config("configs/search_r1_3b_grpo_fast.yaml"), published_config("qwen2.5-3b")
    native = plan_training(config, shape, num_ranks=8)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": "vllm"})})
    plan = plan_training(config, shape, num_ranks=8)
    weights = rows_of(native)["policy: replica that generates"]
    logits = rows_of(native)["logits and sampling"]
    assert rows_of(plan) == rows_of(native) | {
        "vLLM's copy of the weights": weights,
        "logits and sampling": 3 * logits,
        "recorded decode steps": rows_of(native)["recorded decode steps"] + 2 * logits,
    }
    assert (plan.rollout, plan.update) == (native.rollout + weights + 4 * logits, native.update)


@pytest.mark.parametrize(("sampling", "copies"), [({}, 1), ({"top_p": 0.9}, 2), ({"top_k": 5}, 2)])
def test_what_top_p_keeps_is_held_beside_the_logits(make_config, make_decoder, sampling, copies):
    config, decoder = make_config(rollout={"max_num_seqs": 3, **sampling}), make_decoder().config
    assert rows_of(plan_training(config, decoder))["logits and sampling"] == copies * 3 * decoder.vocab_size * 4


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("tied", [True, False])
def test_resident_rows_are_the_bytes_of_a_real_policy_and_critic(
    make_config, make_decoder, make_trajectory, dtype, size, tied
):
    """After a step, so that there are moments; one rank needs no padding."""
    algorithm = {"name": "ppo", "group_size": 2, "kl_coefficient": 0.1}
    config = make_config(model={"dtype": dtype}, algorithm=algorithm)
    (batch,) = pack([make_trajectory(0, [(False, 5), (True, 6)])], [1.0], 100)
    with process("cpu", 1, 0) as ranks:
        reference = make_decoder(1, tied).to(getattr(torch, dtype))
        policy = Policy(make_decoder(0, tied), config, ranks, reference)
        critic = Critic(make_decoder(0, tied), config, ranks)
        references = policy.reference_logprobs([batch])
        gradients = []
        for learner, loss in (
            (policy, lambda: policy.loss(batch, 6, references[0])[0]),
            (critic, lambda: value_loss(critic.module(batch), torch.ones(6), torch.zeros(6), 0.5, 6)),
        ):
            learner.backward(loss())
            gradients.append(num_bytes(parameter.grad for parameter in learner.parameters.values()))
            learner.step()
        plan = plan_training(config, policy.replica.config)
        rows = rows_of(plan)
        assert rows["policy: master weights"] == num_bytes(policy.parameters.values())
        assert rows["policy: Adam's moments"] == moments(policy)
        assert rows["reference"] == num_bytes(policy.reference.parameters())
        assert rows["critic: master weights"] == num_bytes(critic.parameters.values())
        assert rows["critic: Adam's moments"] == moments(critic)
        assert rows["gradients"] == max(gradients)
        if dtype == "float32":
            assert policy.replica is policy.module.decoder
            assert "policy: replica that generates" not in rows
        else:
            assert rows["policy: replica that generates"] == num_bytes(policy.replica.parameters())


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_resident_rows_with_an_adapter(make_config, make_decoder, make_trajectory, dtype, size):
    """There is one base for all, and nothing else as large."""
    algorithm = {"name": "ppo", "group_size": 2, "kl_coefficient": 0.1}
    config = make_config(model={"dtype": dtype, "lora": {"rank": 5}}, algorithm=algorithm)
    (batch,) = pack([make_trajectory(0, [(False, 5), (True, 6)])], [1.0], 100)
    with process("cpu", 1, 0) as ranks:
        policy = Policy(make_decoder(0, tied=True), config, ranks)
        critic = Critic(policy.replica.on_same_base(), config, ranks)
        gradients = []
        for learner, loss in (
            (policy, lambda: policy.loss(batch, 6, policy.reference_logprobs([batch])[0])[0]),
            (critic, lambda: value_loss(critic.module(batch), torch.ones(6), torch.zeros(6), 0.5, 6)),
        ):
            learner.backward(loss())
            gradients.append(num_bytes(parameter.grad for parameter in learner.parameters.values()))
            learner.step()
        rows = rows_of(plan_training(config, policy.replica.config))
        modules = (policy.module, policy.replica, policy.reference, critic.module)
        parameters = {id(p): p for module in modules for p in module.parameters()}
        expected = {
            "frozen base": num_bytes(base_parameters(policy.replica).values()),
            "policy: master weights": num_bytes(policy.parameters.values()),
            "policy: Adam's moments": moments(policy),
            "critic: master weights": num_bytes(critic.parameters.values()),
            "critic: Adam's moments": moments(critic),
        }
        if dtype == "bfloat16":
            expected["policy: adapter that generates"] = num_bytes(adapter_parameters(policy.replica).values())
        resident = {
            row.name: row.num_bytes for row in plan_training(config, policy.replica.config).rows if row.when == "always"
        }
        assert resident == expected
        assert sum(resident.values()) == num_bytes(parameters.values()) + moments(policy) + moments(critic)
        assert rows["gradients"] == max(gradients)


def test_an_adapter_s_numbers_by_hand():
    """Qwen2.5-7B on 8 ranks: rank 64 on all seven layers of 28 blocks."""
    config = load_config("configs/search_r1_7b_grpo.yaml", ["model.lora.rank=64"])
    plan = plan_training(config, published_config("qwen2.5-7b"), num_ranks=8)
    rows = rows_of(plan)
    ends = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)  # in + out of q and o, k and v, and the MLP's
    adapter = 28 * 64 * ends
    assert rows["frozen base"] == 2 * 7_615_616_512
    assert rows["policy: master weights"] == rows["gradients"] == 4 * adapter // 8
    assert rows["policy: Adam's moments"] == 8 * adapter // 8
    assert rows["policy: adapter that generates"] == 2 * adapter
    assert rows["gathered adapter and its gradient"] == 4 * adapter
    assert not rows.keys() & {"reference", "gathered weights", "head's gradient"}
    all_learned = rows_of(plan_training(load_config("configs/search_r1_7b_grpo.yaml"), published_config("qwen2.5-7b")))
    thin = 28 * 4596 * 2 * 64 * 7
    assert rows["activations"] == all_learned["activations"] + thin
    head = dict(head_counts.head_bytes(published_config("qwen2.5-7b"), 2, 4096, is_learned=False))
    learned = dict(head_counts.head_bytes(published_config("qwen2.5-7b"), 2, 4096))
    assert head["weight's gradient"] == 0 and learned["weight's gradient"] > 0
    assert sum(head.values()) == sum(learned.values()) - 2 * 152_064 * 3584


def num_bytes(tensors) -> int:
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def moments(learner) -> int:
    """Bytes of Adam's moments, without the step counter, one number per parameter."""
    return num_bytes(state[key] for state in learner.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))


def test_cache_is_as_large_as_planned(make_config, make_decoder):
    decoder = make_decoder().config
    for graphs in (True, False):
        rollout = {"max_num_seqs": 3, "cuda_graphs": graphs, "max_sequence_tokens": 100}
        for cache_tokens, num_blocks in ((None, 3 * 4), (110, 4), (10**6, 3 * 4)):  # of 32 tokens
            config = make_config(run={"device": "cpu"}, rollout=rollout | {"cache_tokens": cache_tokens})
            cache = KVCache(decoder, 3 + graphs, 100, num_blocks=num_blocks + graphs)
            rows = rows_of(plan_training(config, decoder))
            assert rows["KV cache"] == cache.num_bytes
        assert ("recorded decode steps" in rows) == graphs


@pytest.mark.parametrize("overrides", [[], ["eval.sets={}"], ["rollout.cache_tokens=200000"], ["rollout.engine=vllm"]])
def test_a_cache_as_small_as_advised_fits(overrides):
    """Even where more sequences may run than a step has: lowering a limit above that number would save nothing."""
    decoder = published_config("qwen2.5-7b")

    def plan(*more):
        config = load_config("configs/search_r1_7b_grpo.yaml", ["rollout.max_num_seqs=2000", *overrides, *more])
        return plan_training(config, decoder, num_ranks=8, device_bytes=device_bytes)

    device_bytes = 10**15
    whole = plan()
    saved = rows_of(whole)["KV cache"] // 3
    device_bytes = whole.rollout - saved + memory_plan.RESERVE
    lines = [line.split(":")[0] for line in plan().advice if line.startswith(("rollout.cache", "rollout.max_num"))]
    assert len(lines) == 2 - ("rollout.cache_tokens=200000" in overrides)
    for line in lines:
        assert whole.rollout - 1.3 * saved < plan(line).rollout <= whole.rollout - saved, line


def test_vllm_has_room_for_all_sequences_whatever_a_step_has():
    few = ("eval.sets={}", "rollout.max_num_seqs=3000")
    native, vllm = (rows_of(plan_3b(*few, f"rollout.engine={engine}"))["KV cache"] for engine in ("native", "vllm"))
    assert vllm > 3 * native


def test_checkpointing_is_advised_where_activations_are_too_much():
    config = load_config("configs/search_r1_7b_ppo.yaml", ["train.tokens_per_microbatch=16384"])
    decoder = published_config("qwen2.5-7b")
    plan = plan_training(config, decoder, num_ranks=8, device_bytes=80 * GB)
    assert plan.fits is False and plan.update > 80 * GB
    # the cheapest advice comes first; recomputation comes after offloading
    offloads = [f"model.offload.{name}=true" for name in ("replica", "reference", "optimizer")]
    wanted = [*offloads, "train.activation_checkpointing=selective", "train.activation_checkpointing=full"]
    assert [line.split(":")[0] for line in plan.advice[:5]] == wanted
    changed = load_config("configs/search_r1_7b_ppo.yaml", ["train.activation_checkpointing=selective"])
    again = plan_training(changed, decoder, num_ranks=8, device_bytes=80 * GB)
    assert again.update < plan.update / 1.5


def plan_3b(*overrides, device_bytes=None):
    config = load_config("configs/search_r1_3b_grpo.yaml", overrides)
    return plan_training(config, published_config("qwen2.5-3b"), num_ranks=8, device_bytes=device_bytes)


@pytest.mark.parametrize("engine", ["native", "vllm"])
def test_the_cache_is_kept_where_both_fit(engine):
    plan = functools.partial(plan_3b, f"rollout.engine={engine}")
    given, kept = plan("rollout.keep_cache=false"), plan("rollout.keep_cache=true")
    rows = rows_of(given)
    both = sum(rows[name] for name in rows.keys() & memory_plan.KEPT)
    assert both > 0
    assert (memory_plan.VLLM_WEIGHTS in rows) == (engine == "vllm")
    assert (given.keeps_cache, kept.keeps_cache) == (False, True)
    assert kept.update == given.update + both
    assert kept.rollout == given.rollout
    enough = (kept.peak + memory_plan.RESERVE) / (1 - memory_plan.KEEPING_SHARE)
    assert plan(device_bytes=int(enough) + 2) == plan("rollout.keep_cache=true", device_bytes=int(enough) + 2)
    assert plan(device_bytes=int(enough) - 2).keeps_cache is False
    assert plan().keeps_cache is False  # the device's memory is unknown


PLACES = {  # by setting: where it moves rows, and which; without it they are in `always`
    "optimizer": ("host", ("policy: Adam's moments", "critic: Adam's moments")),
    "reference": ("host", ("reference",)),
    "replica": ("rollout", ("policy: replica that generates",)),
}


@pytest.mark.parametrize("part", PLACES)
def test_what_is_offloaded_is_elsewhere(part):
    """Offloading is also advised by name, with the size, where it is not done, and no longer where it is."""
    recipe, place = "configs/search_r1_7b_ppo.yaml", f"model.offload.{part}=true"
    shape, device = published_config("qwen2.5-7b"), 60 * GB
    plan, moved = (
        plan_training(load_config(recipe, overrides), shape, num_ranks=8, device_bytes=device)
        for overrides in ([], [place])
    )
    when, names = PLACES[part]
    size = sum(rows_of(plan)[name] for name in names)
    assert {row.when for row in moved.rows if row.name in names} == {when}
    assert rows_of(moved) == rows_of(plan)
    assert moved.update == plan.update - size
    assert moved.rollout == plan.rollout - (0 if part == "replica" else size)
    assert moved.total("host") - plan.total("host") == (0 if part == "replica" else size)
    (line,) = (line for line in plan.advice if line.startswith(place))
    assert size_text(size) in line
    assert not any(line.startswith(place) for line in moved.advice)
    in_place = plan_training(load_config(recipe, ["checkpoint.background=false"]), shape)
    assert ("host   " in str(moved), "host   " in str(in_place)) == (True, False)


def test_a_parked_index_is_the_update_s_memory_and_the_host_s():
    """21,015,324 rows of 768 on 8 ranks; parking is advised where updates lack memory and it is not done already."""
    setting, shape = "retrieval.park_during_update=true", published_config("qwen2.5-7b")
    dense = ["retrieval={backend: dense, index: x, device: cuda, scan: int8}"]
    plan, parked = (
        plan_training(
            load_config("configs/search_r1_7b_ppo.yaml", [*dense, *more]), shape, num_ranks=8, device_bytes=50 * GB,
            index_shape=(21_015_324, 768),
        )
        for more in ([], [setting])
    )  # fmt: skip
    index = rows_of(plan)["index"]
    assert rows_of(parked)["index"] == index
    assert parked.update == plan.update - index and parked.rollout == plan.rollout
    part = -(-21_015_324 // 8)
    kept = part * (2 * 768 + 768 + 8) + 4 * 768 + 8 * -(-part // 128)
    assert parked.total("host") - plan.total("host") == kept == rows_of(parked)["index, parked"]
    (line,) = (line for line in plan.advice if line.startswith(setting))
    assert size_text(index) in line
    assert not any(line.startswith(setting) for line in parked.advice)


def test_an_index_has_its_encoder_beside_it():
    """E5's encoder, whole on every rank, and parked with the index."""
    e5 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 30522}
    e5 |= {"max_position_embeddings": 512}
    shape, options = published_config("qwen2.5-3b"), {"num_ranks": 8, "index_shape": (21_015_324, 768)}
    weights = 4 * (30522 + 512 + 2) * 768 + 12 * 28_351_488
    size = weights + 4 * 8448 * 9 * 768 + 12 * 768 * 511
    for parks in (False, True):
        settings = [f"retrieval={{backend: dense, index: x, device: cuda, park_during_update: {str(parks).lower()}}}"]
        config = load_config("configs/search_r1_3b_grpo.yaml", settings)
        without, plan = (plan_training(config, shape, **options, encoder=encoder) for encoder in (None, e5))
        assert rows_of(plan)["index: encoder"] == size
        assert (plan.update - without.update, plan.rollout - without.rollout) == (0 if parks else size, size)
        assert plan.total("host") - without.total("host") == (weights if parks else 0)
        assert "index: encoder" not in rows_of(without)


@pytest.mark.parametrize("changes", [{}, {"offload": {"optimizer": True, "replica": True}}, {"lora": {"rank": 3}}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_s_copy_is_as_large_as_planned(make_config, make_console, monkeypatch, dtype, changes):
    """Moments that are already on the host are copied all the same: the next step overwrites them."""
    writers, copied = [], CheckpointWriter._copied
    monkeypatch.setattr(policy_module, "leaves", lambda device: True)
    monkeypatch.setattr(Decoder, "fused_generation", False)  # as in test_offload.py
    monkeypatch.setattr(CheckpointWriter, "_copied", lambda self, *a: writers.append(self) or copied(self, *a))
    algorithm = {"name": "ppo", "group_size": 2}
    model = {"path": make_config().model.path, "dtype": dtype} | changes
    config = make_config(model=model, algorithm=algorithm, train={"num_steps": 1}, eval={"sets": {}})
    train(config, make_console())
    copies = {name: tensor for name, tensor in writers[0]._copies.items() if not name.endswith(".step")}
    decoder = load_model(config.model.path).config
    assert rows_of(plan_training(config, decoder))["checkpoint's copy"] == num_bytes(copies.values())


def test_what_ranks_hold_whole_is_counted():
    recipe, shape = "configs/search_r1_7b_grpo.yaml", published_config("qwen2.5-7b")
    parameters, head = 7_615_616_512, 152_064 * 3584
    once = ["train.reshard_after=update", "train.reduce_after=update"]
    split, whole = (
        plan_training(load_config(recipe, overrides), shape, num_ranks=8, device_bytes=60 * GB)
        for overrides in ([], once)
    )
    assert rows_of(split)["gradients"] == parameters // 8 * 4
    assert rows_of(whole)["gradients"] == parameters * 4
    assert rows_of(whole)["gathered weights"] == 2 * parameters > rows_of(split)["gathered weights"] > 2 * 2 * head
    assert [line.split(":")[0] for line in whole.advice[:2]] == [
        "train.reduce_after=microbatch",
        "train.reshard_after=forward",
    ]
    assert not any("train.re" in line for line in split.advice)
    alone = load_config(recipe, ["train.reduce_after=update"])
    assert rows_of(plan_training(alone, shape))["gradients"] == parameters * 4  # one rank has all gradients anyway


def test_what_becomes_of_the_cache_is_one_line():
    assert "are kept during updates" in plan_3b(device_bytes=200 * GB).describe_cache()
    assert "are given to the updates" in plan_3b(device_bytes=60 * GB).describe_cache()
    plan = plan_3b("rollout.keep_cache=true", device_bytes=60 * GB)
    assert plan.fits is False
    assert plan.advice[0].startswith("rollout.keep_cache=auto")


def test_partial_sums_are_those_of_the_kernel():
    """`_run_alone` allocates sums [tokens, H, parts, d], and two numbers for each."""
    triton_kernel = pytest.importorskip("searchr1_kernels._cached_attention_triton")
    assert memory_plan.ATTENTION_PLACES == triton_kernel.PART
    assert memory_plan.ATTENTION_TOKENS == triton_kernel._TOKENS_AT_ONCE
    config = load_config("configs/search_r1_3b_grpo.yaml")
    rows = rows_of(plan_training(config, published_config("qwen2.5-3b"), num_ranks=8))
    slots, parts = min(1024, config.rollout.max_num_seqs), -(-config.rollout.max_sequence_tokens // 512)
    assert rows["attention's partial sums"] == slots * 16 * parts * (128 + 2) * 4
