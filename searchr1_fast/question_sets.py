"""Prepare published questions for training and evaluation: one merged training file, one file per evaluation set.

Questions are changed as the original's scripts change them: white space around them is stripped, and a question mark
added where there is none; case stays as published. Beyond that, rows are checked, not changed. A row without a field,
without an answer, or with an id that is taken is reported with its file and row; questions that come twice, and
training questions that are also in an evaluation set, are counted. Two questions are the same if they differ only in
case, punctuation, articles and white space (`reward.normalize_answer`).

Rows are streamed. Of each question, only a 64-bit digest of its id and one of its text stay in memory; the chance that
two different texts among the 221,328 published questions share a digest is 1 in 7 x 10^8.

Left out: downloads, which are huggingface_hub's; and prompts, which prompt.py makes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from searchr1_fast.data import file_stem, parse_question, question_row, read_rows
from searchr1_fast.reward import normalize_answer
from searchr1_fast.types import Question

# The sets of the paper (arXiv 2503.09516, section 4.1) under their published names, in the original's order.
TRAINING_SETS = ("nq", "hotpotqa")
EVALUATION_SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")

# Rows of PeterJinGo/nq_hotpotqa_train, and so of the FlashRAG files that it was made from.
PUBLISHED_ROWS = {
    "train": {"nq": 79168, "hotpotqa": 90447},
    "eval": dict(zip(EVALUATION_SETS, (3610, 11313, 14267, 7405, 12576, 2417, 125), strict=True)),
}

_SPLITS = ("train", "dev", "test")
_MAX_NAMED = 5  # unusable rows named in the error; the rest are counted

Part = Literal["train", "eval"]


@dataclass(frozen=True)
class QuestionFile:
    """A published file. `name`: the set of all its rows; None: each row's `data_source`, else the file's location."""

    path: Path
    name: str | None = None

    def source(self, row: dict[str, Any]) -> str:
        """The set that a row belongs to: `nq` for FlashRAG's `nq/train.jsonl`, the file's own name for any other."""
        stem = file_stem(self.path)
        return self.name or row.get("data_source") or (self.path.resolve().parent.name if stem in _SPLITS else stem)


@dataclass
class SetSummary:
    """What became of one set's rows."""

    part: Part
    name: str
    num_rows: int = 0
    num_written: int = 0
    num_unusable: int = 0
    num_marks_added: int = 0
    num_blank_answers: int = 0
    num_duplicates: int = 0
    num_shared: dict[str, int] = field(default_factory=dict)  # training: by evaluation set that also has the question

    @property
    def published_rows(self) -> int | None:
        """How many rows the set should have, if that is known."""
        return PUBLISHED_ROWS[self.part].get(self.name)


@dataclass(frozen=True)
class Rules:
    """What to leave out. Evaluation sets lose at most unusable rows, so that scores stay comparable."""

    drop_unusable: bool = False
    drop_duplicates: bool = False
    drop_shared: bool = False


def flashrag_files(folder: str | Path) -> tuple[list[QuestionFile], list[QuestionFile]]:
    """The paper's training files and evaluation files (`test`, else `dev`) in a copy of FlashRAG's data sets."""
    folder = Path(folder)
    wanted = [(name, ("train",)) for name in TRAINING_SETS] + [(name, ("test", "dev")) for name in EVALUATION_SETS]
    files, missing = [], []
    for name, splits in wanted:
        paths = [folder / name / f"{split}.jsonl" for split in splits]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            missing.append(" or ".join(str(path.relative_to(folder)) for path in paths))
        else:
            files.append(QuestionFile(found, name))
    if missing:
        raise ValueError(f"{folder} is not a whole copy of FlashRAG's data sets: there is no {', no '.join(missing)}")
    return files[: len(TRAINING_SETS)], files[len(TRAINING_SETS) :]


def prepare_questions(
    training: Sequence[QuestionFile],
    evaluation: Sequence[QuestionFile],
    output: str | Path,
    rules: Rules = Rules(),
    note: Callable[[str], None] = lambda text: None,
) -> list[SetSummary]:
    """Write `output`/train.jsonl, `output`/eval/<set>.jsonl and `output`/summary.json; `output` appears when complete.

    `note` is told of every file as it is opened. ValueError if a file is missing or broken, if a row cannot be used and
    is not to be dropped (raised after all files have been read, so that all such rows are counted), if nothing is left,
    or if `output` already holds something.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} exists already; remove it or give another name")
    with _made_whole(output) as temporary, ExitStack() as files:
        preparation = _Preparation(temporary, files, rules)
        for file in evaluation:  # first: training questions are compared with them
            note(f"reading {file.path}")
            preparation.read(file, "eval")
        for file in training:
            note(f"reading {file.path}")
            preparation.read(file, "train")
        summaries = preparation.finish()
        (temporary / "summary.json").write_text(json.dumps([asdict(s) for s in summaries], indent=2) + "\n")
    return summaries


class _Preparation:
    """The state of one run over all files."""

    def __init__(self, folder: Path, files: ExitStack, rules: Rules) -> None:
        self.folder, self.files, self.rules = folder, files, rules
        self.summaries: dict[tuple[Part, str], SetSummary] = {}
        self.evaluated: dict[int, list[str]] = {}  # digest of a text -> the evaluation sets that have it
        self.ids: dict[Path, set[int]] = {}  # by output file
        self.texts: dict[Path, set[int]] = {}
        self.handles: dict[Path, IO[str]] = {}
        self.unusable: list[str] = []  # the first few

    def read(self, file: QuestionFile, part: Part) -> None:
        """Check every row of a file, and write it where it belongs."""
        for where, row in read_rows(file.path):
            name = file.source(row)
            if not isinstance(name, str):
                raise ValueError(f"{where}: `data_source` must be the name of a set, not {name!r}")
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"{where}: a set cannot be called {name!r}, as a file is named after it")
            summary = self.summaries.setdefault((part, name), SetSummary(part, name))
            summary.num_rows += 1
            path = self.folder / ("train.jsonl" if part == "train" else f"eval/{name}.jsonl")
            try:
                # Ids restart in every published set; `read_rows` has put `data_source` before those of a Parquet file.
                is_told_apart = file.path.suffix == ".parquet" and bool(row.get("data_source"))
                question = tidy(parse_question(row, where, name), "" if is_told_apart else f"{name}:")
                self._claim_id(question, path, where)
            except ValueError as error:
                summary.num_unusable += 1
                self.unusable = [*self.unusable, str(error)][:_MAX_NAMED]
                continue
            summary.num_marks_added += question.text != row["question"].strip()
            summary.num_blank_answers += len(row["golden_answers"]) - len(question.golden_answers)
            if self._is_wanted(question, summary, path):
                self._handle(path).write(json.dumps(question_row(question), ensure_ascii=False) + "\n")
                summary.num_written += 1

    def finish(self) -> list[SetSummary]:
        """Close the files, and check what only all rows together show; -> summaries, training first."""
        for handle in self.handles.values():
            handle.close()
        summaries = sorted(self.summaries.values(), key=lambda summary: summary.part, reverse=True)
        num_unusable = sum(summary.num_unusable for summary in summaries)
        if num_unusable and not self.rules.drop_unusable:
            rest = num_unusable - len(self.unusable)
            more = f"; and {rest} more" if rest else ""
            raise ValueError(f"{num_unusable} rows cannot be used: {'; '.join(self.unusable)}{more}")
        empty = [f"{summary.name} ({summary.part})" for summary in summaries if not summary.num_written]
        if empty or not summaries:
            raise ValueError(f"nothing is left of {', '.join(empty) or 'the files: they hold no questions'}")
        return summaries

    def _claim_id(self, question: Question, path: Path, where: str) -> None:
        taken, digest = self.ids.setdefault(path, set()), _digest(question.id)
        if digest in taken:
            raise ValueError(f"{where}: the id {question.id!r} is taken by an earlier row; is a file given twice?")
        taken.add(digest)

    def _is_wanted(self, question: Question, summary: SetSummary, path: Path) -> bool:
        """Count the question if others are the same, and return whether the rules keep it."""
        digest = _digest(normalize_answer(question.text) or question.text)
        seen = self.texts.setdefault(path, set())
        is_duplicate = digest in seen
        seen.add(digest)
        summary.num_duplicates += is_duplicate
        if summary.part == "eval":
            sets = self.evaluated.setdefault(digest, [])
            if summary.name not in sets:
                sets.append(summary.name)
            return True
        shared = self.evaluated.get(digest, ())
        for name in shared:
            summary.num_shared[name] = summary.num_shared.get(name, 0) + 1
        return not ((is_duplicate and self.rules.drop_duplicates) or (shared and self.rules.drop_shared))

    def _handle(self, path: Path) -> IO[str]:
        if path not in self.handles:
            path.parent.mkdir(exist_ok=True)
            self.handles[path] = self.files.enter_context(path.open("w", encoding="utf-8", newline="\n"))
        return self.handles[path]


def tidy(question: Question, id_prefix: str = "") -> Question:
    """The question as the original's scripts make it: stripped, and with a question mark at its end."""
    text = question.text.strip()
    return replace(question, id=f"{id_prefix}{question.id}", text=text if text.endswith("?") else f"{text}?")


@contextmanager
def _made_whole(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` that takes its place at the end; after an error, nothing is left of it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir()
        yield temporary
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
