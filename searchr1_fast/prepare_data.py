"""`searchr1 data`: the paper's training and evaluation questions from the published files, checked and counted."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from searchr1_fast.cli import command_parser
from searchr1_fast.console import Console
from searchr1_fast.errors import entry_point

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from rich.table import Table

    from searchr1_fast.question_sets import QuestionFile, SetSummary


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Read the files, write DIR/train.jsonl and DIR/eval/<set>.jsonl, print what became of every set."""
    arguments = _parser().parse_args(argv)
    from searchr1_fast.question_sets import Rules, flashrag_files, prepare_questions

    training = [_question_file(text) for text in arguments.train]
    evaluation = [_question_file(text) for text in arguments.eval]
    if arguments.flashrag is not None:
        published = flashrag_files(arguments.flashrag)
        training, evaluation = published[0] + training, published[1] + evaluation
    if not training and not evaluation:
        raise ValueError("no files were given; name them with --train and --eval, or a FlashRAG folder with --flashrag")
    rules = Rules(arguments.drop_unusable, arguments.drop_duplicates, arguments.drop_shared)
    ui = Console()
    summaries = prepare_questions(training, evaluation, arguments.output, rules, ui.note)
    ui.rich.print(summary_table(summaries))
    for remark in remarks(summaries, rules.drop_shared):
        ui.note(remark)
    ui.note(f"written to {arguments.output}")
    return 0


def _parser() -> ArgumentParser:
    parser = command_parser(
        "data",
        "searchr1 data --flashrag data/flashrag --output data/search_r1\n"
        "searchr1 data --train data/nq_hotpotqa_train/train.parquet --eval data/nq_hotpotqa_train/test.parquet "
        "--output data/search_r1\n"
        "searchr1 data --train nq=nq.jsonl --train mine.jsonl.gz --eval dev=dev.jsonl --output data/mine",
        "Reads FlashRAG's JSONL and Search-R1's Parquet, and writes train.jsonl, eval/<set>.jsonl and summary.json. "
        "Nothing is downloaded; docs/recipes.md has the commands that do.",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to make")
    parser.add_argument("--flashrag", metavar="DIR", type=Path, help="FlashRAG's data sets: nq/train.jsonl, …")
    for option, what in (("--train", "trained on"), ("--eval", "evaluated on")):
        parser.add_argument(
            option, metavar="[SET=]FILE", action="append", default=[],
            help=f"questions {what}; repeatable. SET names them all (default: each row's data_source, else the file)",
        )  # fmt: skip
    parser.add_argument(
        "--drop-unusable", action="store_true", help="leave out rows without a field or an answer, in place of stopping"
    )
    parser.add_argument("--drop-duplicates", action="store_true", help="train on a question once (the original: twice)")
    parser.add_argument(
        "--drop-shared", action="store_true", help="train on no question of an evaluation set (the original does)"
    )
    return parser


def _question_file(text: str) -> QuestionFile:
    """Parse `SET=FILE` or `FILE`; if a file has the whole text as its path, it is that file."""
    from searchr1_fast.question_sets import QuestionFile

    match = None if Path(text).is_file() else re.fullmatch(r"([\w.-]+)=(.+)", text)
    return QuestionFile(Path(match[2]), match[1]) if match else QuestionFile(Path(text))


def summary_table(summaries: Sequence[SetSummary]) -> Table:
    """One row per set: what was read, what was written, and what was found on the way."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("set", no_wrap=True)
    for title in ("rows", "unusable", "written", "“?” added", "blank answers", "twice", "also in eval"):
        table.add_column(title, justify="right")
    for summary in summaries:
        counts = (
            *(summary.num_rows, summary.num_unusable, summary.num_written),
            *(summary.num_marks_added, summary.num_blank_answers, summary.num_duplicates),
        )
        shared = f"{sum(summary.num_shared.values()):,}" if summary.part == "train" else "-"
        name = f"train: {summary.name}" if summary.part == "train" else summary.name
        table.add_row(name, *(f"{count:,}" for count in counts), shared)
    return table


def remarks(summaries: Sequence[SetSummary], are_shared_dropped: bool) -> list[str]:
    """What a person should not overlook: files not of the published length, training questions in eval sets."""
    lines = []
    for summary in summaries:
        name, expected = f"{summary.name} ({summary.part})", summary.published_rows
        if expected not in (None, summary.num_rows):
            lines.append(f"{name} has {summary.num_rows:,} rows; the published file has {expected:,}")
        if summary.num_shared:
            sets = ", ".join(f"{count:,} with {other}" for other, count in sorted(summary.num_shared.items()))
            fate = "left out" if are_shared_dropped else "kept, as in the original"
            lines.append(f"{name} shares questions with evaluation sets: {sets}; {fate}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
