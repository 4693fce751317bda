"""Questions and passages on disk, and the endless stream of questions that training draws from.

Questions are JSONL `{"id", "question", "golden_answers"}` or Search-R1's published Parquet; passages are JSONL
`{"id", "contents": "\\"Title\\"\\ntext"}`. A malformed file is one ValueError that names the file and the line.

Left out: prompts, which prompt.py makes, and what `searchr1 data` does to published questions (question_sets.py).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from searchr1_fast.files import write_jsonl
from searchr1_fast.types import Passage, Question

# ---------------------------------------------------------------------------------------------------- questions


def read_questions(path: str | Path, source: str | None = None, limit: int = 0) -> list[Question]:
    """All questions of a JSONL or Parquet file, or the first `limit` of them.

    `source` names the data set; without it, the rows' `data_source` does, else the file's name. `parse_question` says
    what becomes of a row.
    """
    path = Path(path)
    rows = islice(read_rows(path), limit or None)
    questions = [parse_question(row, where, source or row.get("data_source") or file_stem(path)) for where, row in rows]
    if not questions:
        raise ValueError(f"{path} holds no questions; give a file with one question a row")
    return questions


def write_questions(path: str | Path, questions: Iterable[Question]) -> None:
    """Write questions so that `read_questions` gives them back."""
    write_jsonl(path, map(question_row, questions))


def question_row(question: Question) -> dict[str, Any]:
    """The JSON object that `parse_question` reads back."""
    row = {"id": question.id, "question": question.text, "golden_answers": list(question.golden_answers)}
    return row | {"data_source": question.source} | ({"type": question.kind} if question.kind else {})


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a JSONL (`.gz`: compressed) or Parquet file of questions, one batch in memory at a time."""
    path = _existing(path)
    return _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)


def parse_question(row: Mapping[str, Any], where: str, source: str) -> Question:
    """Turn a row of `read_rows` into a question. ValueError names `where` and what the row lacks.

    A row's `type`, else its number of `hops`, becomes `Question.kind`. In FlashRAG's rows, `metadata` holds the type,
    or for MuSiQue a list of steps instead of `hops`. Other keys are ignored. Blank golden answers are dropped (an empty
    answer would be right by saying nothing), and a question that has no others is an error.
    """
    if row.get("question") is None and row.get("prompt"):
        raise ValueError(f"{where}: there is no `question` column and the prompt holds no `Question: `")
    text = _text(row, "question", where)
    answers = row.get("golden_answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: `golden_answers` must be a list of strings")
    answers = tuple(answer for answer in answers if answer.strip())
    if not answers:
        raise ValueError(f"{where}: the question has no answer; give at least one in `golden_answers`")
    return Question(_identifier(row, where), text, answers, source, _kind(row))


def file_stem(path: str | Path) -> str:
    """The file's name up to the first dot: `nq` of `nq.jsonl.gz`."""
    return Path(path).name.split(".")[0]


def _kind(row: Mapping[str, Any]) -> str:
    metadata = row.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    steps = metadata.get("question_decomposition")
    hops = row.get("hops") or (len(steps) if isinstance(steps, list) else None)
    return str(row.get("type") or metadata.get("type") or (f"{hops}-hop" if isinstance(hops, int) else hops) or "")


_PARQUET_COLUMNS = {
    *("id", "question", "golden_answers", "data_source", "prompt", "reward_model", "extra_info", "type", "hops"),
}
_PARQUET_BATCH_ROWS = 1024  # a row with its prompt is about 1 KB


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a file with Search-R1's columns, rows brought into the form of our JSONL."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"reading {path} needs pyarrow: pip install 'searchr1_fast[parquet]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    schema = table.schema_arrow
    columns = [name for name in schema.names if name in _PARQUET_COLUMNS]
    for what, names in (("questions", ("question", "prompt")), ("answers", ("golden_answers", "reward_model"))):
        if not {*names} & {*columns}:
            there = f"neither a column `{names[0]}` nor `{names[1]}`; it has {', '.join(schema.names)}"
            raise ValueError(f"{path} has no {what}: {there}")
    if "metadata" in schema.names and pyarrow.types.is_struct(schema.field("metadata").type):
        columns += ["metadata.type"]  # only this leaf: the column holds whole articles
    number = 0
    for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", _from_search_r1(row)


def _from_search_r1(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a Search-R1 row into a row of our JSONL; plain columns that are left in it take precedence."""
    extra, reward = row.get("extra_info") or {}, row.get("reward_model") or {}
    if row.get("question") is None and row.get("prompt"):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        _, marker, question = prompt.rpartition("Question: ")
        row["question"] = question.strip() if marker else None
    if row.get("golden_answers") is None:
        truth = reward.get("ground_truth")
        row["golden_answers"] = truth.get("target") if isinstance(truth, dict) else truth  # ports keep the bare list
    if row.get("id") is None and "index" in extra:
        row["id"] = f"{extra.get('split', 'train')}_{extra['index']}"
    # Ids restart in every data set that was merged into the file.
    if row.get("id") is not None and row.get("data_source"):
        row["id"] = f"{row['data_source']}:{row['id']}"
    return row


# ----------------------------------------------------------------------------------------------------- passages


def read_corpus(path: str | Path) -> Iterator[Passage]:
    """The passages of a JSONL file (`.gz`: compressed), read lazily; row i <-> vector i of an index."""
    for identifier, contents in read_corpus_rows(path):
        yield parse_passage(identifier, contents)


def read_corpus_rows(path: str | Path) -> Iterator[tuple[str, str]]:
    """(id, exact contents) of the same rows: what an encoder reads and an index stores."""
    path = _existing(path)
    seen: set[str] = set()
    number = 0
    for number, (where, row) in enumerate(_json_rows(path), start=1):
        identifier = _identifier(row, where)
        # An id that is its row's number cannot repeat, so only others cost memory (21 million do matter).
        if identifier != str(number - 1) or seen:
            duplicate = identifier in seen or _is_earlier_row(identifier, number - 1 - len(seen))
            if duplicate:
                raise ValueError(f"{where}: the id {identifier!r} is already taken by an earlier passage")
            seen.add(identifier)
        yield identifier, _text(row, "contents", where)
    if number == 0:
        raise ValueError(f"{path} holds no passages; give a file with one passage a line")


def write_corpus(path: str | Path, passages: Iterable[Passage]) -> None:
    """Write passages so that `read_corpus` gives them back; scores are not kept."""
    write_jsonl(path, ({"id": p.id, "contents": passage_contents(p)} for p in passages))


def parse_passage(identifier: str, contents: str, score: float = 0.0) -> Passage:
    """`contents` is a title in double quotes, a newline, the text (which may hold more newlines)."""
    title, _, text = contents.partition("\n")
    if len(title) >= 2 and title[0] == title[-1] == '"':
        title = title[1:-1]  # one pair only: a song's title has its own quotes
    return Passage(identifier, title, text, score)


def passage_contents(passage: Passage) -> str:
    """The `contents` that `parse_passage` reads back."""
    if "\n" in passage.title:
        raise ValueError(f"passage {passage.id}: a title must not hold a newline, this is {passage.title!r}")
    return f'"{passage.title}"\n{passage.text}'


def _is_earlier_row(identifier: str, num_rows: int) -> bool:
    """Whether `identifier` is the number of one of the first `num_rows` rows, in its usual spelling."""
    if not (identifier.isascii() and identifier.isdigit()) or len(identifier) > len(str(num_rows)):
        return False
    return str(int(identifier)) == identifier and int(identifier) < num_rows


# ------------------------------------------------------------------------------------------------------- stream


class QuestionStream:
    """An endless stream of questions, in a new seeded order every epoch. `state_dict` resumes at the very next one."""

    def __init__(self, questions: Sequence[Question], seed: int = 0) -> None:
        if not questions:
            raise ValueError("a question stream needs at least one question")
        self._questions = questions
        self._seed = seed
        self._fingerprint = zlib.crc32("\n".join(question.id for question in questions).encode())
        self.epoch = 0
        self.index = 0  # position of the next question in the epoch's order
        self._order = self._shuffle()

    def next(self, count: int) -> list[Question]:
        """The next `count` questions; they may span the end of an epoch."""
        taken: list[Question] = []
        while len(taken) < count:
            if self.index == len(self._questions):
                self.epoch, self.index = self.epoch + 1, 0
                self._order = self._shuffle()
            rows = self._order[self.index : self.index + count - len(taken)]
            taken += [self._questions[row] for row in rows]
            self.index += len(rows)
        return taken

    def state_dict(self) -> dict[str, int]:
        """The position, and what it is a position in."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "seed": self._seed,
            "num_questions": len(self._questions),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a saved position. Other questions or another seed are an error, because the order would differ."""
        own = self.state_dict()
        for key, what in (("num_questions", "number of questions"), ("fingerprint", "questions"), ("seed", "seed")):
            if state[key] != own[key]:
                raise ValueError(
                    f"the saved stream position belongs to another {what} ({state[key]}, here {own[key]}); "
                    "resume with the data and seed that the run began with"
                )
        self.epoch, self.index = state["epoch"], state["index"]
        self._order = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        """[num_questions] int64: the order of the current epoch."""
        return np.random.default_rng([self._seed, self.epoch]).permutation(len(self._questions))


# --------------------------------------------------------------------------------------------------------- rows


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a JSONL file; blank lines are skipped."""
    for number, line in _numbered_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:  # broken JSON, or bytes that are not UTF-8
            raise ValueError(f"{where} is not valid JSON: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{where} is not valid JSON: it is nested too deeply") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} must be an object, not a {type(row).__name__}")
        yield where, row


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a file (`.gz`: compressed), from 1. gzip's errors name neither the file nor a place in it."""
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # cut short, not gzip or with a wrong sum, damaged
            where = f" beyond line {number}" if number else ""
            raise ValueError(f"{path} cannot be decompressed{where}: {error}") from error


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if value is None:
        raise ValueError(f"{where}: the key `{key}` is missing")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: `{key}` must be a text that is not empty")
    return value


def _identifier(row: Mapping[str, Any], where: str) -> str:
    value = row.get("id")
    if value is None:
        raise ValueError(f"{where}: the key `id` is missing")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{where}: `id` must be a text or a whole number")
    return str(value)
