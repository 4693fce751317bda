"""`searchr1 train --dry-run`: what a person asks for, reads and gets wrong. Its numbers are test_memory_plan.py's."""

from __future__ import annotations

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
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_dry_run_of_a_directory(capsys):
    assert command(["train", "configs/demo.yaml", "--dry-run", "--device-memory", "8GB"]) == 0
    assert "policy: master weights" in capsys.readouterr().out


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
