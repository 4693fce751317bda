"""`searchr1 world`: write a generated encyclopedia to files, streaming, so that only the disk limits its size."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from searchr1_fast.cli import command_parser
from searchr1_fast.errors import entry_point
from searchr1_fast.types import Passage


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    """Write DIR/corpus.jsonl and DIR/questions.jsonl."""
    parser = command_parser(
        "world",
        "searchr1 world --output data/world\n"
        "searchr1 world --output data/large num_entities=1000000 style=rich 'hops=[1,1,1,1]' num_questions=10000",
        "Takes the settings of the configuration's `world` section.",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder for the two files")
    parser.add_argument(
        "settings", metavar="key=value", nargs="*", default=[], help="split, seed, num_entities, style, hops, …"
    )
    arguments = parser.parse_intermixed_args(argv)

    from searchr1_fast.config import load_config
    from searchr1_fast.data import write_corpus, write_questions
    from searchr1_fast.world import build_world

    config = load_config(None, [f"data.world.{setting}" for setting in arguments.settings]).data.world
    world = build_world(config)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_questions(arguments.output / "questions.jsonl", world.questions)
    write_corpus(arguments.output / "corpus.jsonl", _shown(world.iter_passages(), world.num_entities))
    print(f"{world.num_entities:,} passages and {len(world.questions):,} questions in {arguments.output}")


def _shown(passages: Iterator[Passage], total: int) -> Iterator[Passage]:
    """Yield the passages, with a progress bar on a terminal."""
    from rich.progress import track

    yield from track(passages, "writing passages", total, transient=True, disable=not sys.stdout.isatty())


if __name__ == "__main__":
    sys.exit(main())
