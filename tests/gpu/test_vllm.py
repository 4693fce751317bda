"""vLLM on a GPU beside the trainer: it sleeps and wakes, gets every weight, trains on one rank and on two.

python -m pytest -q tests/gpu/test_vllm.py          # in an environment with vLLM (docs/architecture.md)
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from commands import environment
from trajectories import check_same
from vllm_cases import ROLLOUT, only_with_vllm, requests_for, search_letters, short_demo
from vllm_stand_in import GREEDY, check_logprobs

from searchr1_fast.config import Config
from searchr1_fast.console import Console
from searchr1_fast.evaluate import build_engine
from searchr1_fast.models import load_model, load_tokenizer
from searchr1_fast.rollout import Engine, SearchLoop
from searchr1_fast.rollout.vllm_model import cache_bytes
from searchr1_fast.rollout.weight_handover import named_weights
from searchr1_fast.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    only_with_vllm,
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def open_engine():
    """dtype, settings of the rollout -> an engine over the built-in model, open until the test ends; its config."""
    with ExitStack() as stack:

        def open_(dtype, **rollout):
            config = Config.model_validate({"prompt": {"template": "plain"}, "rollout": ROLLOUT | rollout})
            model = load_model("builtin:base", dtype, torch.device("cuda"))
            engine = build_engine(model, load_tokenizer("builtin:base"), config)
            stack.callback(engine.close)
            engine.sampling = GREEDY
            return engine, config

        yield open_


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_vllm_writes_what_the_native_engine_writes(open_engine, cuda_graphs):
    num_threads = torch.get_num_threads()
    engine, config = open_engine(torch.float32, cuda_graphs=cuda_graphs)
    assert torch.get_num_threads() == num_threads
    requests = requests_for(config, engine.tokenizer, group_size=2)
    trajectories = SearchLoop(engine, search_letters).run(requests)
    native = Engine(engine.model, engine.tokenizer, config.rollout, GREEDY)
    others = SearchLoop(native, search_letters).run(requests)
    # Either of two tokens may be chosen that are equally likely up to the last bits.
    same = [np.array_equal(a.token_ids, b.token_ids) for a, b in zip(trajectories, others, strict=True)]
    assert np.mean(same) >= 0.75
    check_logprobs(engine.model.cpu(), trajectories, 1.0, tolerance=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vllm_sleeps_and_wakes_with_the_same_weights(open_engine, dtype):
    engine, config = open_engine(dtype, keep_cache=False)
    loop, requests = SearchLoop(engine, search_letters), requests_for(config, engine.tokenizer)
    before = loop.run(requests)
    free = torch.cuda.mem_get_info()[0]
    engine.free_cache()
    weights = sum(tensor.nbytes for tensor in engine.model.parameters())
    assert torch.cuda.mem_get_info()[0] - free > 0.9 * (cache_bytes(engine.model, config.rollout) + weights)
    for _ in range(2):
        report = engine.update_weights()
        assert report["handover_unseen_weights"] == 0
        check_same(before, loop.run(requests))
        engine.free_cache()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_weight_that_stays_behind_is_named(open_engine, dtype):
    engine, _ = open_engine(dtype, keep_cache=True)
    model, load = engine.model, engine._generator.load
    layer = f"model.layers.{model.config.num_hidden_layers - 1}"
    parts = ("input_layernorm.weight", "self_attn.k_proj.bias", "self_attn.v_proj.weight", "mlp.up_proj.weight")
    for name in ("model.norm.weight", *(f"{layer}.{part}" for part in parts)):
        old = dict(named_weights(model))[name].clone()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 2 * torch.finfo(dtype).eps)
        engine._generator.load = lambda weights, name=name, old=old: load(
            (key, old if key == name else weight) for key, weight in weights
        )
        with pytest.raises(ValueError, match=rf"has not got the trainer's weights: 1 of 75 differ, .*'{name}'"):
            engine.update_weights()
        engine._generator.load = load
        assert engine.update_weights()["handover_unseen_weights"] == 0


def check_rows(config: Config, tolerance: float) -> None:
    """Hand-overs are reported, and the log-probabilities of sampler and trainer agree up to rounding."""
    rows = [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert 0 < row["time_handover_checks"] < row["time_handover"] < row["time_sync"] < row["time_step"]
        assert row["handover_unseen_weights"] == 0
        assert row["rollout_policy_kl"] is None or abs(row["rollout_policy_kl"]) < tolerance


@pytest.mark.parametrize(("dtype", "keep_cache"), [("float32", "false"), ("bfloat16", "false"), ("bfloat16", "true")])
def test_the_demo_trains(tmp_path, dtype, keep_cache):
    config = short_demo(
        tmp_path, "run.device=cuda", f"model.dtype={dtype}", f"rollout.keep_cache={keep_cache}", "run.num_threads=2"
    )
    assert train(config, Console(quiet=True))["after"]["unseen"]["count"] == 12
    check_rows(config, 1e-3 if dtype == "float32" else 0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_train_with_an_engine_each(tmp_path):
    config = short_demo(tmp_path, "run.device=cuda", "model.dtype=bfloat16", "rollout.keep_cache=false")
    (tmp_path / "demo.yaml").write_text(config.to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, "-m", "searchr1_fast.train", str(tmp_path / "demo.yaml")],
        env=environment(), capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    check_rows(config, 0.05)
