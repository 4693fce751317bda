"""The command itself: help, mistakes in one sentence with exit code 2, where it finds models and runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from commands import OURS, environment, one_sentence

import searchr1_fast
from searchr1_fast.cli import COMMANDS, model_directory, run_config_path


def test_help_lists_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", out, re.MULTILINE)


def test_without_a_command_help_is_shown_and_it_is_an_error(run):
    code, out, _ = run()
    assert code == 2
    assert out.startswith("usage: searchr1 COMMAND")


def test_version(run):
    assert run("--version") == (0, f"searchr1_fast {searchr1_fast.__version__}\n", "")


@pytest.mark.parametrize(
    ("typed", "nearest"), [("trian", "train"), ("evaluate", "eval"), ("pretrain", "pretrain-base")]
)
def test_unknown_command_names_the_nearest(run, typed, nearest):
    code, out, error = run(typed, "--help")
    assert (code, out) == (2, "")
    assert one_sentence(error) == f"unknown command `{typed}`: did you mean `searchr1 {nearest}`?"


def test_unknown_command_far_from_all_lists_them(run):
    assert "there are train, eval, ask" in one_sentence(run("zzzzzz")[2])


@pytest.mark.parametrize("name", OURS)
def test_help_of_each_command_has_an_example(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert out.startswith(f"usage: searchr1 {name}")
    assert f"\nexample:\n  searchr1 {name} " in out


@pytest.mark.parametrize("name", OURS)
def test_help_does_not_wait_for_torch(name):
    """`import torch` takes seconds; nobody who asks for help should wait for it."""
    program = (
        "import sys; from searchr1_fast.cli import main\n"
        f"try: main(['{name}', '--help'])\n"
        "except SystemExit as exit: assert not exit.code\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: searchr1 {name}" in done.stdout


@pytest.mark.parametrize("module", ["searchr1_fast", "searchr1_fast.cli"])
def test_as_a_program(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "report", "no/such/run"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert one_sentence(done.stderr) == "no/such/run is not a run folder: it has no metrics.jsonl"


def test_each_command_is_a_module_too():
    done = subprocess.run(
        [sys.executable, "-m", "searchr1_fast.report", "gone"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "gone is not a run folder" in one_sentence(done.stderr)


def test_a_reader_that_leaves_early_is_no_error():
    program = f"{sys.executable} -m searchr1_fast --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------- configuration errors


@pytest.mark.parametrize("command", ["train", "eval"])
def test_what_is_missing_is_the_configuration_alone(run, command):
    code, _, error = run(command)
    assert code == 2
    assert error.rstrip().endswith("error: the following arguments are required: CONFIG")


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "no configuration file missing.yaml"),
        (["ok.yaml", "train.num_step=3"], "unknown key `train.num_step`: did you mean `train.num_steps`?"),
        (["ok.yaml", "rollout.temperature=-1"], "`rollout.temperature`: Input should be greater than 0"),
        (["ok.yaml", "nonsense"], "override 'nonsense' is not of the form section.key=value"),
        (["broken.yaml"], "broken.yaml is not valid YAML"),
    ],
)
def test_bad_configuration_is_one_sentence(run, tmp_path, command, arguments, message):
    (tmp_path / "ok.yaml").write_text("train: {num_steps: 1}\n")
    (tmp_path / "broken.yaml").write_text("train: [\n")
    code, out, error = run(command, *arguments)
    assert (code, out) == (2, "")
    assert message in one_sentence(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.yaml", "ok.yaml"]  # nothing half-written


@pytest.mark.parametrize(
    "arguments", [[], ["c.yaml", "--resum"], ["c.yaml", "--no-such"], ["c.yaml", "--dry-run", "--ranks", "0"]]
)
def test_argparse_errors_are_exit_code_2(run, arguments):
    code, out, error = run("train", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith("usage: searchr1 train")


# ------------------------------------------------------------------------------------------------------ models and runs


def test_model_directory_finds_the_weights_of_a_run(tmp_path):
    run_folder = tmp_path / "runs" / "demo"
    weights = run_folder / "checkpoints" / "step_000010" / "hf"
    weights.mkdir(parents=True)
    (run_folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        model_directory(run_folder)
    (run_folder / "checkpoints" / "latest").symlink_to("step_000010", target_is_directory=True)
    (run_folder / "config.yaml").write_text("")
    assert model_directory(run_folder).resolve() == weights
    assert model_directory(weights.parent) == weights
    assert model_directory(weights) == weights
    assert model_directory("builtin:base") == "builtin:base"
    assert run_config_path(model_directory(run_folder)) == run_folder / "config.yaml"
    (weights.parent / "adapter").mkdir()  # what was learned, unrounded
    assert model_directory(run_folder).resolve() == model_directory(weights.parent) == weights.parent / "adapter"
    assert run_config_path(model_directory(run_folder)) == run_folder / "config.yaml"
    assert run_config_path("builtin:base") is None
    assert run_config_path(tmp_path) is None
