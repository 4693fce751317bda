"""`searchr1 train --dry-run`: options, output and mistakes. Its numbers are tested in test_memory_plan.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from searchr1_fast.cli import main as command
from searchr1_fast.memory_plan import memory_size

GB = 10**9


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * GB), ("79.5GiB", int(79.5 * 2**30)), ("141 gb", 141 * GB), ("1024", 1024)]
)
def test_sizes(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["80 gigs", "", "-3GB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="write it as 80GB"):
        memory_size(text)


def test_dry_run_says_whether_it_fits(capsys, tmp_path):
    arguments = ["train", "configs/search_r1_3b_grpo.yaml", "--dry-run", "--shape", "qwen2.5-3b", "--ranks", "8"]
    assert command([*arguments, "--device-memory", "80GB", f"run.directory={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "each of 8 ranks" in out and "fits: " in out
    assert command([*arguments, "--device-memory", "24GB"]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "train.activation_checkpointing=selective" in out
    assert command([*arguments, "--device-memory", "80GB", "model.lora.rank=8"]) == 0
    out = capsys.readouterr().out
    assert "qwen2.5-3b, an adapter of rank 8, grpo" in out and "frozen base" in out
    assert list(tmp_path.iterdir()) == []  # nothing was started


def test_dry_run_of_a_directory(capsys):
    assert command(["train", "configs/demo.yaml", "--dry-run", "--device-memory", "8GB"]) == 0
    assert "policy: master weights" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["qwen2.5-3b", "llama-3.2-3b", "qwen3-4b"])
@pytest.mark.parametrize("recipe", sorted(Path("configs").glob("search_r1*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_planned_before_anything_is_downloaded(capsys, recipe, shape):
    """The model is replaced by `--shape`; the index of the fast recipes is missing, and the output says so."""
    arguments = ["train", str(recipe), "--dry-run", "--shape", shape, "--ranks", "8", "--device-memory", "141GB"]
    assert command(arguments) == 0
    out = capsys.readouterr().out
    assert "fits: " in out
    assert ("not counted: the index data/wiki-18.index" in out) == recipe.stem.endswith(("_fast", "_lora"))


def test_the_advice_grows_with_what_is_missing(capsys):
    arguments = ["train", "configs/search_r1_7b_ppo.yaml", "--dry-run", "--shape", "qwen2.5-7b"]
    assert command([*arguments, "--device-memory", "80GB"]) == 1
    out = capsys.readouterr().out
    for setting in ("train.activation_checkpointing=selective", "model.offload.optimizer=true", "model.lora.rank=64",
                    "more ranks than 1", "algorithm.kl_coefficient=0"):  # fmt: skip
        assert setting in out, setting


def test_a_model_that_is_not_there_yet_is_told_of_shapes(capsys):
    assert command(["train", "configs/search_r1_3b_grpo.yaml", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "models/Qwen2.5-3B" in said and "; to plan before it is downloaded, give its --shape: qwen2.5-0.5b, " in said
    assert command(["train", "configs/search_r1_3b_grpo.yaml", "--dry-run", "model.path=builtin:large"]) == 2
    assert "--shape" not in capsys.readouterr().err


def test_a_broken_config_json_is_one_sentence(capsys, tmp_path):
    (tmp_path / "config.json").write_text("[]")
    assert command(["train", "configs/demo.yaml", "--dry-run", f"model.path={tmp_path}"]) == 2
    assert "config.json must hold an object, not a list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dry-run", "--shape", "qwen9"], "no published shape 'qwen9'"),
        (["--dry-run", "--device-memory", "lots"], "write it as 80GB"),
        (["--device-memory", "80GB"], "goes with --dry-run"),
    ],
)
def test_mistakes_are_one_sentence(capsys, arguments, sentence):
    assert command(["train", "configs/demo.yaml", *arguments]) == 2
    assert sentence in capsys.readouterr().err
