"""Two ranks (gloo, FSDP2 on the CPU) do for twenty steps what one rank does; one rank resumes their checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import environment
from safetensors.torch import load_file

from searchr1_fast.distributed import Ranks, process
from searchr1_fast.train import train

NUM_STEPS = 20
# At 1e-3 rounding grows from step to step until it decides a token: with two seeds of four, and anew on each machine.
RATE = 1e-4
TRAIN = {"num_steps": NUM_STEPS, "num_minibatches": 2}
OPTIMIZER = {"learning_rate": RATE, "warmup_steps": 2}
RECOMPUTE = {"grpo": "selective", "ppo": "full", "lora": "selective"}  # on two ranks; one rank keeps every activation
ALGORITHMS = {
    "grpo": {"kl_coefficient": 0.05},
    "ppo": {
        "name": "ppo",
        "group_size": 2,
        "critic_learning_rate": RATE,
        "kl_coefficient": 0.05,
        "kl_in_reward": True,
        "lam": 0.9,
    },
}
ALGORITHMS["lora"] = ALGORITHMS["ppo"]
MODELS = {"lora": {"lora": {"rank": 3, "alpha": 6.0}}}  # rows of A that two ranks cannot share evenly


@pytest.fixture
def two_ranks(make_config, tmp_path, on_two_ranks):
    """The reports of both ranks, and the configurations that they ran."""
    configs, files = {}, []
    for name, algorithm in ALGORITHMS.items():
        recompute = {"activation_checkpointing": RECOMPUTE[name]}
        model = MODELS.get(name, {})
        configs[name] = make_config(
            algorithm=algorithm, model=model, optimizer=OPTIMIZER, run={"name": f"{name}-two"}, train=TRAIN | recompute
        )
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(configs[name].to_yaml())
    on_two_ranks(Path(__file__).parent / "two_ranks.py", tmp_path, *files)
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)], configs


def test_two_ranks(two_ranks, tmp_path, make_config, make_console):
    """One test with one launch, as starting processes takes most of the time."""
    reports, configs = two_ranks
    check_collectives(reports)
    check_gloo_ends_before_the_interpreter(tmp_path)
    for place, (name, algorithm) in enumerate(ALGORITHMS.items()):
        alone = make_config(
            algorithm=algorithm,
            model=MODELS.get(name, {}),
            optimizer=OPTIMIZER,
            run={"name": f"{name}-one"},
            train=TRAIN,
        )
        result = train(alone, make_console())
        check_same_rows(rows(configs[name]), rows(alone))
        check_same_weights(
            weights(configs[name]), weights(alone), load_file(Path(alone.model.path) / "model.safetensors")
        )
        for report in reports:
            assert report["trained"][place]["step"] == NUM_STEPS
            assert report["trained"][place]["after"]["letters"]["em"] == result["after"]["letters"]["em"]
        check_resumes_on_one_rank(name, algorithm, make_config, make_console)


def check_gloo_ends_before_the_interpreter(directory: Path) -> None:
    """A gloo thread that frees a tensor while the interpreter shuts down would abort the process."""
    if not Path("/proc/self/task").is_dir():
        return
    for rank in range(2):
        in_training, at_the_end = map(int, (directory / f"rank{rank}.threads").read_text().split())
        assert in_training > 0 and at_the_end == 0


def check_collectives(reports) -> None:
    for report in reports:
        assert report["collectives"] == {
            "world_size": 2,
            "sum": 3.0,
            "max": 10.0,
            "gather": [{"rank": 0}, {"rank": 1}],
            "broadcast": "from 0",
            "all_reduce": [2.0, 1.0],
            "all_reduce_max": [1.0, 1.0],
            "unshare": list("ABCDE"),
            "shares": [list("ace"), list("bd")],
        }


def check_same_rows(two: list[dict], one: list[dict]) -> None:
    """Trajectories are the same to the token, so counts are equal; sums over tokens differ by rounding.

    Over all steps that moves no metric by more than a relative 1e-4.
    """
    assert [row["step"] for row in two] == [row["step"] for row in one] == list(range(NUM_STEPS + 1))
    for theirs, ours in zip(two, one, strict=True):
        assert theirs.keys() == ours.keys()
        for key, value in ours.items():
            # Two ranks search for the same queries, but in more and smaller batches.
            is_time = key.startswith("time_") or key.endswith("_per_second") or key == "update_imbalance"
            if not is_time and (not key.startswith("search/") or key == "search/queries"):
                assert theirs[key] == pytest.approx(value, rel=1e-4, abs=4e-6), (ours["step"], key)
    assert one[1]["grad_norm"] > 0
    assert two[1]["grad_norm"] == pytest.approx(one[1]["grad_norm"], rel=1e-5)  # before AdamW magnifies the rounding
    assert two[1]["response_tokens_mean"] == one[1]["response_tokens_mean"]


def check_same_weights(
    two: dict[str, torch.Tensor], one: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> None:
    """After forty AdamW steps of 1e-4 only parameters whose gradient is rounding noise may differ.

    Of the others, at most 2.5e-7 was seen.
    """
    assert two.keys() == one.keys() == start.keys()
    differences, moves = (
        torch.cat([(other[name] - one[name]).abs().flatten() for name in one]) for other in (two, start)
    )
    assert moves.max() > 1e-3
    assert (differences < 1e-6).float().mean() > 0.99
    assert differences.max() < 4e-4


def check_resumes_on_one_rank(name, algorithm, make_config, make_console) -> None:
    """One rank reads the checkpoint of two; its next step equals that of the run that was always on one rank."""
    endings = []
    for run in (f"{name}-two", f"{name}-one"):
        config = make_config(
            algorithm=algorithm,
            model=MODELS.get(name, {}),
            optimizer=OPTIMIZER,
            run={"name": run, "resume": True},
            train=TRAIN | {"num_steps": NUM_STEPS + 1},
        )
        console = make_console()
        train(config, console)
        assert console.notes[0].startswith(f"going on after step {NUM_STEPS}")
        endings.append(rows(config)[-1])
    assert endings[0]["step"] == NUM_STEPS + 1
    for key in ("reward_mean", "policy_loss", "entropy", "grad_norm", "lr"):
        assert endings[0][key] == pytest.approx(endings[1][key], rel=2e-2, abs=1e-4), key


def rows(config) -> list[dict]:
    return [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(config.run_directory / "checkpoints" / f"step_{NUM_STEPS:06d}" / "hf" / "model.safetensors")


def test_one_rank_joins_no_group_and_its_collectives_are_no_ops():
    with process("cpu", seed=5) as ranks:
        assert not torch.distributed.is_initialized()
        first = torch.rand(3)
        assert (ranks.rank, ranks.world_size, ranks.is_main, ranks.device.type) == (0, 1, True, "cpu")
        assert (ranks.sum(2), ranks.max(2), ranks.gather("x"), ranks.broadcast("x")) == (2.0, 2.0, ["x"], "x")
        assert ranks.unshare(ranks.share([1, 2, 3])) == [1, 2, 3]
    with process("cpu", seed=5):
        assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_shares_join_to_the_whole(monkeypatch, world_size, count):
    items = list(range(count))
    shares = [Ranks(rank, world_size, torch.device("cpu")).share(items) for rank in range(world_size)]
    monkeypatch.setattr(Ranks, "gather", lambda self, value: shares)
    assert Ranks(0, world_size, torch.device("cpu")).unshare(shares[0]) == items


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be had")
def test_a_gpu_that_is_not_there_is_one_sentence():
    with pytest.raises(ValueError, match="run.device=cuda, but torch sees no GPU"), process("cuda"):
        raise AssertionError("not reached")


ARITHMETIC = """
import torch
from searchr1_fast.distributed import process
with process("cpu", num_threads=1):
    print(torch.get_num_threads(), (torch.full((64,), 1e-30) * 1e-9).count_nonzero().item())
"""


def test_a_rank_has_the_threads_it_was_given_and_no_denormals():
    """In a process of its own: numba's threads start only once, and their start is what would undo torch's setting."""
    result = subprocess.run(
        [sys.executable, "-c", ARITHMETIC],
        env=environment(NUMBA_NUM_THREADS="2"),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.split() == ["1", "0"]


def test_denormals_are_numbers_again_when_the_context_ends():
    for before in (False, True):
        torch.set_flush_denormal(before)
        try:
            with process("cpu"):
                assert not torch.tensor(1e-39).mul(1.0)
            assert bool(torch.tensor(1e-39).mul(1.0)) is not before
        finally:
            torch.set_flush_denormal(False)
