"""The workload benchmark counts what it runs. No durations are tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from searchr1_fast.config import LoraTarget
from searchr1_fast.distributed import process
from searchr1_fast.models import Decoder, DecoderConfig
from searchr1_fast.models.lora import add_adapter
from searchr1_fast.packing import pack

BENCH = Path(__file__).parent.parent / "bench"
SMALL = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--tokens", "600", "--sequence-length", "60"]
SMALL += ["--tokens-per-microbatch", "300", "--group-size", "4", "--repetitions", "1", "--num-seqs", "4", "8"]
SMALL += ["--prompt-tokens", "12", "--new-tokens", "6"]


@pytest.fixture
def bench(monkeypatch):
    """name -> a module of the folder bench, imported as `python bench/…` does it."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def shape() -> DecoderConfig:
    return DecoderConfig(512, 64, 160, 3, 4, 2)


def test_the_mix_is_that_of_traces(bench):
    trajectories = bench("random_work").make_trajectories(40_000, 400, 4, 1000)
    lengths = np.array([len(t.token_ids) for t in trajectories])
    assert len(trajectories) % 4 == 0 and lengths.sum() >= 40_000
    assert lengths.mean() == pytest.approx(400, rel=0.1)
    assert sum(t.loss_mask.sum() for t in trajectories) / lengths.sum() == pytest.approx(0.35, abs=0.02)
    for first, other in zip(trajectories[::4], trajectories[1::4], strict=True):
        assert first.group == other.group
        assert np.array_equal(first.token_ids[:96], other.token_ids[:96])
        assert not np.array_equal(first.token_ids[96:110], other.token_ids[96:110])


def sum_in_place(summed: torch.Size, left: torch.Size, right: torch.Size, **_) -> int:
    """Operations of `addmm_`, which torch's counter does not know."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("lora_rank", [0, 3])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_operations_are_those_that_torch_counts(bench, shape, checkpointing, lora_rank):
    """Our count for a batch that shares nothing, against torch's of its matrix products, recomputed ones included.

    torch counts no attention on a CPU, so it is left out of ours too.
    """
    work = bench("random_work")
    trajectories = work.make_trajectories(500, 60, 1, shape.vocab_size)
    (batch,) = pack(trajectories, [1.0] * len(trajectories), 10_000)
    counted = work.Work.of(trajectories, [batch])
    assert (counted.rows, counted.row_pairs) == (counted.tokens, counted.pairs)
    without_pairs = work.Work(counted.tokens, 0, counted.policy_tokens, counted.rows, 0, counted.scored)
    decoder = Decoder(shape)
    decoder.checkpoint_blocks(checkpointing)
    if lora_rank:
        add_adapter(decoder, lora_rank, 8.0, get_args(LoraTarget))
    in_place = {torch.ops.aten.addmm_: sum_in_place}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        hidden = decoder.scored_hidden(batch)
        (hidden @ decoder.head_weight.T).sum().backward()
    products = counter.get_flop_counts()["Global"]
    operators = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
    expected = sum(count for operator, count in products.items() if operator in operators)
    flops = work.count_flops(shape, without_pairs, checkpointing, lora_rank)
    assert flops["done"] == pytest.approx(expected, rel=1e-6)


def test_attention_and_the_model_s_operations(bench, shape):
    """By hand: 3 layers of 4 heads of 16; `model` counts nothing as saved."""
    work = bench("random_work")
    counted = work.Work(tokens=100, pairs=2000, policy_tokens=30, rows=80, row_pairs=1500, scored=25)
    idle = work.Work(tokens=100, pairs=0, policy_tokens=30, rows=80, row_pairs=0, scored=25)
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 160
    assert work.count_flops(shape, counted, "none")["model"] == 6 * (3 * layer + 512 * 64) * 100 + 12 * 64 * 3 * 2000

    thin = 7 * (64 + 64) + 96 + 96 + 96 - 32 - 32  # in + out of 7 layers: 64, except the MLP's 160 and 32 of k and v
    with_adapter = work.count_flops(shape, counted, "none", lora_rank=5)["model"]
    assert with_adapter == 4 * (3 * layer + 512 * 64) * 100 + 6 * 3 * 5 * thin * 100 + 12 * 64 * 3 * 2000

    def attention(mode):
        return work.count_flops(shape, counted, mode)["done"] - work.count_flops(shape, idle, mode)["done"]

    assert attention("none") == attention("selective") == 3 * 4 * 64 * 3 * 1500
    assert attention("full") == 4 * 4 * 64 * 3 * 1500


def test_main_prints_a_row_last_and_appends_it(bench, tmp_path, capsys):
    output = tmp_path / "workload.jsonl"
    others = ["--offload", "optimizer", "replica", "--reshard-after", "update", "--reduce-after", "update"]
    assert bench("workload").main([*SMALL, "--checkpointing", "selective", *others, "--output", str(output)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert output.read_text().splitlines() == printed[-1:]
    row = json.loads(printed[-1])
    assert row.keys() >= {"benchmark", "date", "commit", "device", "versions", "model", "workload", "plan"}
    workload, update = row["workload"], row["update"]
    assert workload["rows"] < workload["tokens"]  # prompts are shared
    assert workload["checkpointing"] == "selective" and workload["microbatches"] > 1
    assert workload["offload"] == ["optimizer", "replica"] and "policy: Adam's moments" not in row["plan"]
    assert update["peak_bytes"] is None and "mfu" not in update  # no GPU
    assert update["planned_bytes"] >= sum(row["plan"].values())
    assert [one["num_seqs"] for one in row["rollout"]] == [4, 8]
    for one in row["rollout"]:
        groups = one["num_seqs"] // 4
        assert one["prefill_tokens"] + one["shared_tokens"] == one["num_seqs"] * 12
        assert one["prefill_tokens"] == groups * (12 + 3)  # the last token of a prompt is never shared


def test_the_update_is_the_policy_s_own(bench):
    """It moves weights, on the packed batches."""
    workload = bench("workload")
    options = workload.parse_arguments(SMALL)
    moved = []
    policy_class = workload.Policy

    class Watched(policy_class):
        def update(self, batches, denominator):
            assert denominator == sum(batch.num_policy_tokens for batch in batches)
            before = self.module.decoder.head_weight.detach().clone()
            result = super().update(batches, denominator)
            moved.append(not torch.equal(before, self.module.decoder.head_weight))
            return result

    workload.Policy = Watched
    try:
        with process("cpu", 1, 0) as ranks:
            options.phases = ["update"]
            row = workload.measure(options, ranks, lambda _: None)
    finally:
        workload.Policy = policy_class
    assert moved == [True, True] and row["rollout"] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tokens", "0"], "--tokens 0"),
        (["--new-tokens", "2"], "--new-tokens 2"),
        (["--lora-rank", "-1"], "--lora-rank -1"),
        (["--num-seqs", "4", "0"], "--num-seqs 0"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(bench, capsys, arguments, sentence):
    assert bench("workload").main(arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["workload", "padded_update"])
def test_ranks_are_refused(bench, monkeypatch, capsys, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench(name).main([]) == 2
    assert "start it with python, not torchrun" in capsys.readouterr().err
