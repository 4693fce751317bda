"""vLLM itself, where it is installed, against the native engine: `make test-vllm`."""

from __future__ import annotations

import json
import random
import warnings
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from trajectories import check_same
from vllm_cases import ROLLOUT, only_with_vllm, requests_for, search_letters, short_demo
from vllm_stand_in import GREEDY, check_logprobs

from searchr1_fast.config import Config
from searchr1_fast.console import Console
from searchr1_fast.evaluate import build_engine
from searchr1_fast.models import Decoder, DecoderConfig, load_model, load_tokenizer
from searchr1_fast.models.lora import adapted_layers, add_adapter, reset_adapter
from searchr1_fast.rollout import Engine, SamplingParams, SearchLoop, vllm_engine
from searchr1_fast.rollout.vllm_model import CPU_BLOCK
from searchr1_fast.rollout.weight_handover import named_weights
from searchr1_fast.train import train


@pytest.fixture
def base():
    """-> the built-in model, its tokenizer, and a configuration with vLLM."""
    config = Config.model_validate({"prompt": {"template": "plain"}, "rollout": ROLLOUT})
    return load_model("builtin:base"), load_tokenizer("builtin:base"), config


@pytest.fixture
def open_engine():
    """model, tokenizer, configuration -> an engine that is closed after the test."""
    with ExitStack() as stack:

        def open_(*arguments):
            engine = build_engine(*arguments)
            stack.callback(engine.close)
            return engine

        yield open_


def check_kept(statistics, trajectories) -> None:
    """Of earlier turns only a block that is not full is computed again, not the whole context."""
    later = [turn for trajectory in trajectories for turn in trajectory.turns[1:]]
    assert statistics.num_recomputed_tokens <= len(later) * CPU_BLOCK < sum(turn.start for turn in later)


@only_with_vllm
def test_vllm_writes_what_the_native_engine_writes(base, open_engine):
    """The same tokens when greedy; when sampled, the trainer's log-probabilities, and the same tokens in any batch."""
    model, tokenizer, config = base
    num_threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    engine = open_engine(model, tokenizer, config)
    assert torch.set_num_threads is set_num_threads
    assert torch.get_num_threads() == num_threads
    loop, requests = SearchLoop(engine, search_letters), requests_for(config, tokenizer, group_size=2)
    engine.sampling = GREEDY
    greedy = loop.run(requests)
    check_same(greedy, SearchLoop(Engine(model, tokenizer, config.rollout, GREEDY), search_letters).run(requests))
    assert sum(len(trajectory.turns) for trajectory in greedy) > len(greedy)
    check_kept(loop.statistics, greedy)
    engine.sampling = SamplingParams(0.8)
    sampled = loop.run(requests)
    check_logprobs(model, sampled, 0.8)
    assert any(len(a.token_ids) != len(b.token_ids) for a, b in zip(sampled[::2], sampled[1::2], strict=True))
    engine.update_weights()  # empties the prefix cache
    check_same(sampled[::-1], loop.run(requests[::-1]))
    check_same(sampled[:1], loop.run(requests[:1]))
    engine.sampling = SamplingParams(1.0, top_k=5)
    with pytest.raises(ValueError, match="rollout.engine=native"):
        loop.run(requests[:1])
    assert not engine.has_work


@only_with_vllm
def test_vllm_reports_the_whole_vocabulary_where_sampling_is_cut(base, open_engine):
    model, tokenizer, config = base
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"top_k": 3, "top_p": 0.9})})
    engine = open_engine(model, tokenizer, config)
    trajectories = SearchLoop(engine, search_letters).run(requests_for(config, tokenizer))
    check_logprobs(model, trajectories, 1.0)
    for trajectory in trajectories:  # sampling is cut: only the three likeliest
        ids = torch.from_numpy(trajectory.token_ids)
        with torch.no_grad():
            logits = model.logits(ids, torch.tensor([0, len(ids)]))[:-1]
        ranks = (logits > logits.gather(1, ids[1:, None])).sum(-1)
        assert ranks[torch.from_numpy(trajectory.loss_mask[1:])].max() < 3


@only_with_vllm
def test_vllm_takes_new_weights_and_misses_a_forgotten_head(base, open_engine, monkeypatch):
    model, tokenizer, config = base
    engine = open_engine(model, tokenizer, config)
    engine.sampling = GREEDY
    loop, requests = SearchLoop(engine, search_letters), requests_for(config, tokenizer)
    before = loop.run(requests)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    monkeypatch.setattr(vllm_engine, "named_weights", lambda model: model.named_parameters())
    with pytest.raises(ValueError, match="has not got the trainer's weights"):
        engine.update_weights()
    monkeypatch.undo()
    engine.update_weights()
    after = loop.run(requests)
    check_same(after, SearchLoop(Engine(model, tokenizer, config.rollout, GREEDY), search_letters).run(requests))
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(before, after, strict=True))


@only_with_vllm
def test_vllm_writes_what_an_adapter_writes(base, open_engine):
    model, tokenizer, config = base
    add_adapter(model, 8, 16.0, ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"))
    reset_adapter(model, seed=0)
    engine = open_engine(model, tokenizer, config)
    engine.sampling = GREEDY
    loop, requests = SearchLoop(engine, search_letters), requests_for(config, tokenizer)
    before = loop.run(requests)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.copy_(0.05 * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(1)))
    engine.update_weights()
    after = loop.run(requests)
    check_same(after, SearchLoop(Engine(model, tokenizer, config.rollout, GREEDY), search_letters).run(requests))
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(before, after, strict=True))


@only_with_vllm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_weight_of_vllms_that_stays_behind_is_named(base, open_engine, dtype):
    """The update is far within what rounding explains; a norm, a bias, parts of joined layers, and the last layer."""
    _, tokenizer, config = base
    model = load_model("builtin:base", dtype)
    engine = open_engine(model, tokenizer, config)
    load, layer = engine._generator.load, f"model.layers.{model.config.num_hidden_layers - 1}"
    parts = ("input_layernorm.weight", "self_attn.k_proj.bias", "self_attn.v_proj.weight", "mlp.up_proj.weight")
    for name in ("model.norm.weight", "model.embed_tokens.weight", *(f"{layer}.{part}" for part in parts)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 2 * torch.finfo(dtype).eps)  # up by one step or two, wherever there is one
        old = dict(engine._generator.held({key: weight.shape for key, weight in named_weights(model)}))[name].clone()
        engine._generator.load = lambda weights, name=name, old=old: load(
            (key, old if key == name else weight) for key, weight in weights
        )
        with pytest.raises(ValueError, match=rf"has not got the trainer's weights: [12] of 75 differ, .*'{name}'"):
            engine.update_weights()
        engine._generator.load = load
        report = engine.update_weights()
        assert report["handover_unseen_weights"] == 0
        assert dtype == torch.bfloat16 or report["handover_logprob_difference_max"] < 1e-4


@only_with_vllm
@pytest.mark.parametrize(("model_type", "tied"), [("qwen2", True), ("qwen3", False), ("llama", True)])
def test_every_weight_of_every_family_is_seen(base, open_engine, model_type, tied):
    """Every weight also arrives: norms are not ones, biases not zeros, and vLLM pads a vocabulary of 2050."""
    _, tokenizer, config = base
    shape = DecoderConfig(2050, 128, 256, 2, 4, 2, head_dim=32, tie_word_embeddings=tied, model_type=model_type)
    model = Decoder(shape).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    report = open_engine(model, tokenizer, config).update_weights()
    assert report["handover_unseen_weights"] == 0
    assert report["handover_logprob_difference_max"] < 1e-4


@only_with_vllm
def test_vllm_starts_in_silence_and_seeds_nobody_elses_generators(base, open_engine):
    model, tokenizer, config = base
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*was tested")
        open_engine(model, tokenizer, config)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected


@only_with_vllm
def test_vllms_scheduler_sleeps_and_wakes(base, open_engine):
    """A worker on a CPU keeps its memory, but the engine around it goes through the same states as on a GPU."""
    model, tokenizer, config = base
    engine = open_engine(model, tokenizer, config)
    engine.sampling, engine.keep_cache, engine._generator._can_sleep = GREEDY, False, True
    loop, requests = SearchLoop(engine, search_letters), requests_for(config, tokenizer)
    before = loop.run(requests)
    for _ in range(2):
        engine.free_cache()
        assert engine._generator.llm.llm_engine.is_sleeping()
        with pytest.raises(AssertionError, match="update_weights"):
            loop.run(requests)
        engine.update_weights()
        assert not engine._generator.llm.llm_engine.is_sleeping()
        check_same(before, loop.run(requests))


@only_with_vllm
def test_engines_of_one_process_follow_each_other(base, open_engine):
    """Each in a process group that the trainer makes and ends, as one rank does in bfloat16; then in one of its own."""
    model, tokenizer, config = base
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        engine = build_engine(model, tokenizer, config)
        engine.close()
        assert dist.is_initialized()
        dist.destroy_process_group()
    assert open_engine(model, tokenizer, config).update_weights()["handover_unseen_weights"] == 0


@pytest.fixture
def small_demo(tmp_path):
    return short_demo(tmp_path, "run.device=cpu")


def check_trained(config: Config, result: dict) -> None:
    """Both steps ran on the policy as it was: the log-probabilities of sampler and trainer are the same."""
    rows = [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    updated = [row for row in rows[1:] if row["policy_tokens"]]
    assert updated
    for row in rows[1:]:
        assert 0 < row["time_handover_checks"] < row["time_handover"] < row["time_sync"] < row["time_step"]
        assert row["handover_logprob_difference_max"] < 1e-4
        assert row["handover_unseen_weights"] == 0
    for row in updated:
        assert abs(row["rollout_policy_kl"]) < 1e-6
        assert row["logprob_difference_max"] < 1e-4
    assert result["after"]["unseen"]["count"] == 12


@only_with_vllm
def test_the_demo_trains_with_vllm(small_demo):
    check_trained(small_demo, train(small_demo, Console(quiet=True)))


@only_with_vllm
def test_two_ranks_train_with_an_engine_each(small_demo, tmp_path, on_two_ranks):
    (tmp_path / "demo.yaml").write_text(small_demo.to_yaml())
    on_two_ranks(Path(__file__).parents[1] / "two_ranks.py", tmp_path, tmp_path / "demo.yaml")
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text())["trained"][0] for rank in range(2))
    assert first == second
    check_trained(small_demo, first)
