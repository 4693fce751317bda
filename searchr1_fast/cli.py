"""The `searchr1` command: find the subcommand, import it, run it.

Each subcommand is a module with `main(argv)`, so that `searchr1 train …` and `python -m searchr1_fast.train …` (which
torchrun wants) are the same thing. Nothing heavy is imported before a subcommand has read its arguments.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from searchr1_fast import __version__
from searchr1_fast.errors import entry_point


class Command(NamedTuple):
    """Where a subcommand lives and what it does."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("train", "train a search agent by reinforcement learning"),
    "eval": Command("eval", "score a model: exact match, F1 and searches, by kind of question"),
    "ask": Command("ask", "put one question to a model and see how it searches"),
    "data": Command("prepare_data", "prepare published questions for training and evaluation, with checks"),
    "index": Command("index", "build, import, verify, describe or export an index of vectors"),
    "serve": Command("serve", "serve a corpus over HTTP with Search-R1's /retrieve protocol"),
    "replay": Command("replay", "compute a skipped update again, and see where it is not finite"),
    "report": Command("report", "summarise and compare runs, redraw their curves"),
    "pretrain-base": Command("pretrain_base", "pre-train the tiny base models that ship with the package"),
    "world": Command("world.__main__", "write a generated encyclopedia: corpus and questions as JSONL"),
}


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run `searchr1 COMMAND …`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"searchr1_fast {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise ValueError(unknown(name))
    if name == "train":
        train_parser().parse_intermixed_args(rest)  # help and mistakes, before the import of torch, which takes seconds
    return importlib.import_module(f"searchr1_fast.{COMMANDS[name].module}").main(rest)


def usage() -> str:
    """What `searchr1 --help` prints."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: searchr1 COMMAND …\n\n"
        "Trains language models to reason and search in turns, by reinforcement learning on the correctness of their "
        f"answers.\n\ncommands\n{commands}\n\n"
        "`searchr1 COMMAND --help` explains each one with an example. SEARCHR1_DEBUG=1 shows the traceback of an error."
    )


def unknown(name: str) -> str:
    """The sentence for a command that does not exist; names the nearest one."""
    nearest = [known for known in COMMANDS if known.startswith(name)]  # "pretrain" is cut short, not misspelt
    nearest += difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
    hint = f"did you mean `searchr1 {nearest[0]}`?" if nearest else f"there are {', '.join(COMMANDS)}"
    return f"unknown command `{name}`: {hint}"


def command_parser(name: str, example: str, detail: str = "") -> argparse.ArgumentParser:
    """The parser of a subcommand: its summary on top, an example below."""
    summary = COMMANDS[name].summary
    description = f"{summary[0].upper()}{summary[1:]}.{' ' if detail else ''}{detail}"
    epilog = "example:\n" + "\n".join(f"  {line}" for line in example.strip().splitlines())
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"searchr1 {name}", description=description, epilog=epilog, formatter_class=formatter, allow_abbrev=False
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`CONFIG [key=value …]`; read them with `parse_intermixed_args`, so that options may stand anywhere."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file, such as configs/demo.yaml")
    # Without a default, argparse would list settings among the required arguments.
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="settings over it: train.num_steps=50"
    )


def add_model_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """`--model DIR`; read it through `model_directory`."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="Hugging Face folder, run folder (its newest checkpoint), builtin:base or builtin:instruct "
        f"(default: {default})",
    )


def model_directory(path: str | Path) -> str | Path:
    """The folder with the weights. A run folder stands for its newest checkpoint, and a checkpoint for its `adapter` if
    an adapter was learned, else for its `hf`; any other `path` stands for itself."""
    for inside in ("checkpoints/latest/adapter", "checkpoints/latest/hf", "adapter", "hf"):
        if (Path(path) / inside).is_dir():
            return Path(path) / inside
    if (Path(path) / "metrics.jsonl").is_file():
        raise ValueError(f"run {path} has no checkpoint yet")
    return path


def run_config_path(model: str | Path) -> Path | None:
    """config.yaml of the run that wrote a model, found from the model's place, `<run>/checkpoints/step_000100/hf`."""
    for parent in Path(model).resolve().parents:
        if parent.name == "checkpoints" and (parent.parent / "config.yaml").is_file():
            return parent.parent / "config.yaml"
    return None


def train_parser() -> argparse.ArgumentParser:
    """`searchr1 train`'s arguments."""
    parser = command_parser(
        "train",
        "searchr1 train configs/demo.yaml\n"
        "searchr1 train configs/demo.yaml run.name=hot optimizer.learning_rate=3e-4 rollout.temperature=1.2\n"
        "searchr1 train configs/demo.yaml --resume\n"
        "searchr1 train configs/search_r1_7b_ppo.yaml --dry-run --ranks 8 --device-memory 80GB --shape qwen2.5-7b\n"
        "torchrun --nproc-per-node 8 -m searchr1_fast.train configs/demo.yaml",
        "Writes runs/<run.name>/: config.yaml, metrics.jsonl, tensorboard/, trajectories/, checkpoints/, curves.png.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run's newest checkpoint (run.resume=true)"
    )
    parser.add_argument(
        "--dry-run", action="store_true",
        help="train nothing: print what each rank's GPU will hold, whether that fits (exit code 1: it does not), and "
        "what to change; the next three go with it",
    )  # fmt: skip
    parser.add_argument("--device-memory", metavar="SIZE", help="80GB, 79.6GiB, … (default: that of the GPU here)")
    parser.add_argument("--ranks", metavar="N", type=_ranks, help="GPUs of all machines (default: torchrun's or 1)")
    parser.add_argument("--shape", metavar="NAME", help="a published model, qwen2.5-3b, instead of a directory")
    return parser


def _ranks(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks; give 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
