"""The whole trainer on a tiny model: it learns, repeats, stops when asked, and resumes as if it had not stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from searchr1_fast import checkpoint as checkpoint_module
from searchr1_fast import policy as policy_module
from searchr1_fast import run as run_module
from searchr1_fast import train as train_module
from searchr1_fast.config import Config
from searchr1_fast.evaluate import trajectory_seed
from searchr1_fast.models import Decoder
from searchr1_fast.run import changed_keys, open_run
from searchr1_fast.train import StopSignal, baselines, main, train

DESIGN_KEYS = (
    "step reward_mean em searches_mean response_tokens_mean policy_tokens kept_fraction entropy kl_ref "
    "rollout_policy_kl clip_fraction grad_norm lr trajectories_per_second tokens_per_second time_rollout "
    "time_search_wait time_ref time_update time_sync time_step"
)
PPO = {"name": "ppo", "group_size": 2, "critic_learning_rate": 1e-3, "kl_coefficient": 0.01, "kl_in_reward": True}


def rows(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]


def without_times(row: dict) -> dict:
    times = re.compile("time_|search/wait_|.*_per_second")
    return {key: value for key, value in row.items() if not times.match(key)}


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(config.run_directory / "checkpoints" / "latest" / "hf" / "model.safetensors")


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_grpo_learns_which_letter_answers_which_question(make_config, make_console):
    """It learns from one in four, by nothing but the reward.

    All of 16 seeds end at four letters of four, which leaves room for another machine's rounding; in groups of 8 at a
    rate of 4e-3, two of 14 ended at two.
    """
    config = make_config(
        rollout={"max_searches": 0},
        algorithm={"group_size": 16},
        optimizer={"learning_rate": 3e-3, "warmup_steps": 0, "betas": (0.9, 0.95)},
        train={"num_steps": 80, "questions_per_step": 8, "tokens_per_microbatch": 4000},
    )
    result = train(config, make_console())
    history = rows(config)
    assert [row["step"] for row in history] == list(range(81))
    assert history[1].keys() >= set(DESIGN_KEYS.split())
    first, last = (np.mean([row["reward_mean"] for row in part]) for part in (history[1:4], history[-3:]))
    assert first < 0.4
    assert last > 0.7
    assert result["before"]["letters"]["em"] < 0.5
    assert result["after"]["letters"]["em"] == history[-1]["eval/letters/em"] > 0.7
    for key in ("em", "f1", "sub_em", "searches_mean", "odd/em", "even/em"):
        assert f"eval/letters/{key}" in history[0]


@pytest.mark.parametrize("algorithm", [{"kl_coefficient": 0.02}, PPO])
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(make_config, make_console, algorithm):
    """Bit for bit: weights, optimizer, and every number of metrics.jsonl that is not a time."""
    train_settings = {"num_steps": 4, "num_minibatches": 2, "eval_every": 3}
    whole = make_config(algorithm=algorithm, run={"name": "whole"}, train=train_settings)
    assert train(whole, make_console())["interrupted"] is False

    def stop(metrics):
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    halves = make_config(algorithm=algorithm, run={"name": "halves"}, train=train_settings)
    console = make_console(stop)
    result = train(halves, console)
    assert (result["step"], result["interrupted"]) == (2, True)
    assert "resume=true" in console.notes[-1]
    resumed = make_config(algorithm=algorithm, run={"name": "halves", "resume": True}, train=train_settings)
    console = make_console()
    assert train(resumed, console)["step"] == 4
    assert console.notes[0].startswith("going on after step 2")
    assert "differ" not in console.notes[0]

    assert [without_times(row) for row in rows(resumed)] == [without_times(row) for row in rows(whole)]
    assert_equal(weights(resumed), weights(whole))
    learners = [
        {name: tensor for learner in loaded.learners for name, tensor in learner.tensors().items()}
        for loaded in (reopened(whole, make_console), reopened(resumed, make_console))
    ]
    assert any(name.endswith("exp_avg_sq") for name in learners[0])
    assert_equal(*learners)


def reopened(config: Config, make_console):
    """Open the run from its last checkpoint."""
    config = config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})
    with run_module.open_run(config, make_console()) as run:
        return run


def test_rows_after_the_checkpoint_are_dropped_when_a_killed_run_goes_on(make_config, make_console):
    settings = {"train": {"num_steps": 4}, "checkpoint": {"every": 2}}

    def die(metrics):
        if metrics["step"] == 4:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(make_config(**settings), make_console(die))
    config = make_config(**settings, run={"resume": True})
    assert [row["step"] for row in rows(config)] == [0, 1, 2, 3]
    train(config, make_console())
    assert [row["step"] for row in rows(config)] == [0, 1, 2, 3, 4]


def test_a_save_that_fails_ends_the_run_with_its_name(make_config, tmp_path, monkeypatch, capsys):
    """It ends at the next save at the latest; here every step saves."""

    def full(path):
        raise OSError(28, "No space left on device")

    config = make_config(train={"num_steps": 4}, checkpoint={"every": 1}, eval={"sets": {}})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    monkeypatch.setattr(checkpoint_module, "_flush_tree", full)
    assert main([str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert "error: the checkpoint of step 1 could not be written" in error
    assert "No space left on device; there is none before it" in error
    assert [row["step"] for row in rows(config)] == [1]  # step 2's save waited for it, and step 2 wrote no row


def test_a_run_that_fails_keeps_what_it_was_writing(make_config, make_console, monkeypatch):
    is_open, flush_tree = threading.Event(), checkpoint_module._flush_tree
    monkeypatch.setattr(checkpoint_module, "_flush_tree", lambda path: is_open.wait(60) and flush_tree(path))

    def die(metrics):
        if metrics["step"] == 2:
            threading.Timer(0.1, is_open.set).start()
            raise RuntimeError("a search failed")

    config = make_config(train={"num_steps": 4}, checkpoint={"every": 1}, eval={"sets": {}})
    with pytest.raises(RuntimeError, match="a search failed"):
        train(config, make_console(die))
    assert os.readlink(config.run_directory / "checkpoints" / "latest") == "step_000001"


def test_a_row_says_what_its_checkpoint_took(make_config, make_console):
    config = make_config(train={"num_steps": 4}, checkpoint={"every": 2}, eval={"sets": {}})
    train(config, make_console())
    keys = [{key for key in row if key.startswith("time_checkpoint")} for row in rows(config)]
    assert keys[0] == keys[2] == set()
    assert keys[1] == {"time_checkpoint", "time_checkpoint_wait"}
    assert keys[3] == {"time_checkpoint", "time_checkpoint_wait", "time_checkpoint_write"}


def test_the_plain_writer_writes_the_same(make_config, make_console):
    """It makes no copy, and training waits for it."""
    configs = [
        make_config(run={"name": f"background-{background}"}, checkpoint={"every": 1, "background": background})
        for background in (True, False)
    ]
    for config in configs:
        train(config, make_console())
    for step in (1, 2):
        folders = [config.run_directory / "checkpoints" / f"step_{step:06d}" for config in configs]
        contents = [
            {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
            for folder in folders
        ]
        assert contents[0].keys() == contents[1].keys()
        for file in contents[0]:
            # trainer.pt and .metadata name run and folder; the manifest has their checksums
            if file.name not in ("trainer.pt", ".metadata", "manifest.json"):
                assert contents[0][file] == contents[1][file], file


def test_the_best_evaluation_is_saved_and_kept(make_config, make_console):
    """Whether a save is due or not; of equal scores the first; also after a resumption."""
    settings = {
        "optimizer": {"learning_rate": 4e-3, "warmup_steps": 0},
        "checkpoint": {"every": 0, "keep": 1, "best": "letters/em"},
    }

    def config(num_steps, resume=False):
        return make_config(
            train={"num_steps": num_steps, "eval_every": 1, "questions_per_step": 8}, run={"resume": resume}, **settings
        )

    for end in (6, 9):
        run = config(end, resume=end > 6)
        train(run, make_console())
        scores = [row["eval/letters/em"] for row in rows(run)[1:]]
        best = 1 + scores.index(max(scores))
        root = run.run_directory / "checkpoints"
        assert os.readlink(root / "best") == f"step_{best:06d}"
        assert {path.name for path in root.iterdir()} == {"best", "latest", f"step_{best:06d}", f"step_{end:06d}"}
        with open_run(config(end, resume=True), make_console()) as opened:
            assert opened.best == {"metric": "letters/em", "value": max(scores), "step": best}


def test_a_score_that_no_evaluation_has_is_said_before_anything_is_trained(make_config, make_console):
    config = make_config(checkpoint={"best": "letters/bleu"})
    with pytest.raises(ValueError, match="no score `letters/bleu`; there are letters/.*letters/em, .*letters/odd/em"):
        train(config, make_console())
    assert rows(config) == []


def test_a_run_that_is_done_may_be_resumed(make_config, make_console):
    """As after a kill that follows the last checkpoint: nothing is left to do but to report the results."""
    result = train(make_config(), make_console())
    console = make_console()
    again = train(make_config(run={"resume": True}), console)
    assert again == result and again["after"]["letters"]["em"] >= 0
    assert console.notes[0].startswith("going on after step 2")
    assert console.notes[-1].startswith(f"written to {make_config().run_directory}: curves.png")


def test_a_resumption_of_nothing_is_a_beginning_and_says_so(make_config, make_console):
    config, console = make_config(train={"num_steps": 1}, eval={"sets": {}}, run={"resume": True}), make_console()
    assert train(config, console)["step"] == 1
    assert console.notes[0] == f"there is no checkpoint in {config.run_directory}: beginning at the start"


def test_a_folder_with_a_run_is_refused_without_resume(make_config, make_console, monkeypatch):
    config = make_config(train={"num_steps": 1}, eval={"sets": {}})
    train(config, make_console())
    assert (config.run_directory / "config.yaml").read_text() == config.to_yaml()
    monkeypatch.setattr("searchr1_fast.run.build_run", pytest.fail)  # refused before a large model is loaded
    with pytest.raises(ValueError, match="holds a run already"):
        train(config, make_console())


def test_a_configuration_that_cannot_run_writes_nothing(make_config, make_console, tmp_path):
    for changes in ({"model": {"path": str(tmp_path / "none")}}, {"data": {"questions": str(tmp_path / "none.jsonl")}}):
        config = make_config(**changes)
        with pytest.raises(ValueError, match="none"):
            train(config, make_console())
        assert not config.run_directory.exists()


def test_a_refused_resumption_leaves_the_run_as_it_was(make_config, make_console):
    train(make_config(train={"num_steps": 1}, eval={"sets": {}}), make_console())
    config = make_config(train={"num_steps": 2}, eval={"sets": {}}, run={"resume": True}, algorithm=PPO)
    before = {path: path.read_bytes() for path in config.run_directory.glob("*.*")}
    assert before
    with pytest.raises(ValueError, match="ppo|critic|algorithm"):
        train(config, make_console())
    assert {path: path.read_bytes() for path in config.run_directory.glob("*.*")} == before


def test_a_step_without_anything_to_learn_makes_no_update(make_config, make_console, tmp_path):
    impossible = tmp_path / "impossible.jsonl"
    impossible.write_text('{"id": "q", "question": "k1", "golden_answers": ["nobody knows"]}\n')
    corpus = str(tmp_path / "corpus.jsonl")
    config = make_config(data={"questions": str(impossible), "corpus": corpus}, run={"trajectories_every": 2})
    console = make_console()
    train(config, console)
    assert [note for note in console.notes if "no update" in note] == [
        f"step {step}: no group has rewards that differ; no update" for step in (1, 2)
    ]
    for row in rows(config)[1:]:
        assert (row["kept_fraction"], row["policy_tokens"], row["reward_mean"], row["entropy"]) == (0.0, 0, 0.0, None)
    start = load_file(f"{config.model.path}/model.safetensors")
    assert_equal(weights(config), start)
    (written,) = (config.run_directory / "trajectories").iterdir()
    assert (written.name, len(written.read_text().splitlines())) == ("step_000002.jsonl", 24)


def test_a_trajectory_that_never_spoke_is_not_trained_on(make_config, make_trajectory):
    trajectories = [make_trajectory(0, [(False, 3), (True, 2)]), make_trajectory(1, [(False, 4)])]
    _, kept = baselines(make_config(), trajectories, np.array([1.0, 0.0]))
    assert kept.tolist() == [True, False]


@pytest.mark.parametrize(("coefficient", "num_loads"), [(0.0, 1), (0.1, 2)])
def test_without_a_kl_no_reference_is_loaded(make_config, make_console, monkeypatch, coefficient, num_loads):
    loads = []
    load_weights = policy_module.load_weights
    monkeypatch.setattr(policy_module, "load_weights", lambda *arguments: loads.append(1) or load_weights(*arguments))
    config = make_config(algorithm={"kl_coefficient": coefficient}, train={"num_steps": 1}, eval={"sets": {}})
    train(config, make_console())
    assert len(loads) == num_loads
    kl = rows(config)[-1]["kl_ref"]
    assert (kl is None) if coefficient == 0 else kl == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("keep_cache", "expected"), [("auto", (True, False)), (True, (True, True)), (False, (False, False))]
)
def test_the_cache_is_kept_as_the_planner_says(make_config, make_console, keep_cache, expected):
    """With an invented amount of GPU memory: 80 GB leave room beside the tiny run, 1 GB not even for the reserve."""
    with open_run(make_config(rollout={"keep_cache": keep_cache}), make_console()) as run:
        notes = []
        run.ui.note = notes.append
        for size, kept in zip((80 * 10**9, 10**9), expected, strict=True):
            run.settle_cache(size)
            assert run.engine.keep_cache is kept
            assert ("are kept during updates" in notes[-1]) is kept
        run.engine.free_cache()
    assert len(notes) == 2


def test_critic_warm_up_leaves_the_policy_alone(make_config, make_console):
    config = make_config(algorithm=PPO | {"critic_warmup_steps": 1}, eval={"sets": {}}, checkpoint={"every": 1})
    train(config, make_console())
    first = config.run_directory / "checkpoints" / "step_000001" / "hf" / "model.safetensors"
    assert_equal(load_file(first), load_file(f"{config.model.path}/model.safetensors"))
    assert rows(config)[0]["grad_norm"] is None
    assert rows(config)[0]["critic_grad_norm"] > 0
    assert rows(config)[1]["grad_norm"] > 0


def test_the_first_interrupt_is_noted_and_the_second_ends_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert stop.requested is False
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested is True
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat itself; it is not an impatient user
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_command_line(make_config, tmp_path):
    config = make_config(eval={"sets": {}})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    arguments = [str(tmp_path / "config.yaml"), "train.num_steps=1"]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert main([*arguments[:1], "train.num_steps=2", "--resume"]) == 0
    assert [row["step"] for row in rows(config)] == [1, 2]
    assert (config.run_directory / "curves.png").is_file()


def test_changed_settings_are_named():
    old, new = Config().model_dump(mode="json"), Config.model_validate({"optimizer": {"learning_rate": 1}})
    assert changed_keys(old, new.model_dump(mode="json")) == ["optimizer.learning_rate"]


def test_seeds_depend_on_every_part_of_their_key():
    keys = [(seed, step, place) for seed in range(3) for step in range(5) for place in range(20)] + [
        (1, 11, 1),
        (11, 1, 1),
    ]
    seeds = {trajectory_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_loop_fits_on_a_screen():
    """The architecture is one short function; it stays one."""
    import inspect

    assert len(inspect.getsource(train_module.train).splitlines()) <= 60


def test_a_row_counts_passes_that_were_made_again_in_two(make_config, make_console, monkeypatch):
    whole = Decoder.forward_cached

    def narrow(decoder, token_ids, *arguments, **options):
        if len(token_ids) > 6:
            raise torch.OutOfMemoryError("no memory for so many tokens")
        return whole(decoder, token_ids, *arguments, **options)

    found = {}
    for name, forward in (("ample", whole), ("narrow", narrow)):
        monkeypatch.setattr(Decoder, "forward_cached", forward)
        config = make_config(run={"name": name}, train={"num_steps": 1}, eval={"sets": {}})
        train(config, make_console())
        (found[name],) = rows(config)
    assert found["narrow"]["forward_splits"] > 0 == found["ample"]["forward_splits"]
    assert found["narrow"]["policy_tokens"] == found["ample"]["policy_tokens"]
