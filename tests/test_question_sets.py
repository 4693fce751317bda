"""Published questions: FlashRAG's layout and Search-R1's Parquet in, checked and counted question files out."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from pathlib import Path

import pytest

from searchr1_fast import cli
from searchr1_fast.data import read_questions
from searchr1_fast.question_sets import (
    EVALUATION_SETS,
    QuestionFile,
    Rules,
    flashrag_files,
    prepare_questions,
)
from searchr1_fast.types import Question

DATA = Path(os.environ.get("SEARCHR1_DATA", Path(__file__).parents[2] / "shared" / "data"))


def published(split: str, index: int, text: str, answers=("x",), **more) -> dict:
    """A row as FlashRAG publishes it, which does not say to which set it belongs."""
    return {"id": f"{split}_{index}", "question": text, "golden_answers": list(answers)} | more


def write_lines(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def flashrag(tmp_path) -> Path:
    """The paper's sets in small: two questions per evaluation set; some, such as HotpotQA's, come only as `dev`."""
    folder = tmp_path / "flashrag"
    write_lines(folder / "nq/train.jsonl", published("train", 0, "who wrote faust"),
                published("train", 1, " who sang hello? ", ["Ann", " "]))  # fmt: skip
    hotpot = {"metadata": {"type": "bridge", "level": "hard", "context": {"title": ["A"], "sentences": [["…"]]}}}
    write_lines(folder / "hotpotqa/train.jsonl", published("train", 0, "Which is older, A or B?", **hotpot))
    for name in EVALUATION_SETS:
        split = "test" if name in ("nq", "triviaqa", "popqa", "bamboogle") else "dev"
        rows = [published(split, index, f"{name} question {index}?") for index in range(2)]
        write_lines(folder / name / f"{split}.jsonl", *rows)
    write_lines(folder / "nq/dev.jsonl", "never read: there is a test.jsonl")
    return folder


# ------------------------------------------------------------------------------------------------- what is written


def test_flashrag_becomes_one_training_file_and_seven_evaluation_files(flashrag, tmp_path):
    summaries = prepare_questions(*flashrag_files(flashrag), tmp_path / "out")
    assert lines_of(tmp_path / "out/train.jsonl") == [
        {"id": "nq:train_0", "question": "who wrote faust?", "golden_answers": ["x"], "data_source": "nq"},
        {"id": "nq:train_1", "question": "who sang hello?", "golden_answers": ["Ann"], "data_source": "nq"},
        {"id": "hotpotqa:train_0", "question": "Which is older, A or B?", "golden_answers": ["x"],
         "data_source": "hotpotqa", "type": "bridge"},
    ]  # fmt: skip
    assert sorted(path.stem for path in (tmp_path / "out/eval").iterdir()) == sorted(EVALUATION_SETS)
    assert read_questions(tmp_path / "out/eval/2wikimultihopqa.jsonl")[1] == Question(
        "2wikimultihopqa:dev_1", "2wikimultihopqa question 1?", ("x",), "2wikimultihopqa"
    )
    assert [(s.part, s.name, s.num_rows, s.num_written) for s in summaries] == [
        ("train", "nq", 2, 2),
        ("train", "hotpotqa", 1, 1),
        *(("eval", name, 2, 2) for name in EVALUATION_SETS),
    ]
    assert (summaries[0].num_marks_added, summaries[0].num_blank_answers) == (1, 1)
    assert [(s["name"], s["num_rows"]) for s in json.loads((tmp_path / "out/summary.json").read_text())] == [
        (s.name, s.num_rows) for s in summaries
    ]


def test_musique_tells_its_hops_by_its_steps(tmp_path):
    steps = {"metadata": {"question_decomposition": [{"id": 1}, {"id": 2}, {"id": 3}]}}
    path = write_lines(tmp_path / "musique/dev.jsonl", published("dev", 0, "Who?", **steps))
    prepare_questions([], [QuestionFile(path)], tmp_path / "out")
    assert read_questions(tmp_path / "out/eval/musique.jsonl")[0].kind == "3-hop"


def test_a_file_of_many_sets_is_dealt_by_data_source(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def row(source: str, index: int, **leftover) -> dict:
        return {
            "data_source": source,
            "prompt": [{"role": "user", "content": f"… <answer> Beijing </answer>. Question: {source} {index}?\n"}],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": ["x", ""]}},
            "extra_info": {"split": "test", "index": index},
        } | leftover

    plain = {"id": "dev_1", "question": "hotpotqa 1", "golden_answers": ["y"], "metadata": {"type": "comparison"}}
    none = dict.fromkeys(plain)
    rows = [row("nq", 0, **none), row("nq", 1, **none), row("hotpotqa", 0, **none), row("hotpotqa", 1, **plain)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet", row_group_size=3)
    summaries = prepare_questions([], [QuestionFile(tmp_path / "test.parquet")], tmp_path / "out")
    assert read_questions(tmp_path / "out/eval/nq.jsonl") == [
        Question(f"nq:test_{index}", f"nq {index}?", ("x",), "nq") for index in range(2)
    ]
    assert read_questions(tmp_path / "out/eval/hotpotqa.jsonl") == [
        Question("hotpotqa:test_0", "hotpotqa 0?", ("x",), "hotpotqa"),
        Question("hotpotqa:dev_1", "hotpotqa 1?", ("y",), "hotpotqa", "comparison"),
    ]
    assert [(s.name, s.num_blank_answers, s.num_marks_added) for s in summaries] == [("nq", 2, 0), ("hotpotqa", 1, 1)]


def test_parquet_without_the_columns_is_refused_at_once(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "q.parquet"
    for row, message in (
        (
            {"text": "Who?", "golden_answers": ["x"]},
            "no questions: neither a column `question` nor `prompt`; it has te",
        ),
        ({"question": "Who?", "answer": "x"}, "no answers: neither a column `golden_answers` nor `reward_model`"),
    ):
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        with pytest.raises(ValueError, match=message):
            prepare_questions([QuestionFile(path)], [], tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "name", "row", "expected"),
    [
        ("nq/test.jsonl", None, {}, "nq"),  # FlashRAG's layout
        ("nq/test.jsonl", "mine", {"data_source": "theirs"}, "mine"),
        ("nq/test.jsonl", None, {"data_source": "theirs"}, "theirs"),
        ("some/questions.jsonl.gz", None, {}, "questions"),
    ],
)
def test_the_set_of_a_row(tmp_path, file, name, row, expected):
    assert QuestionFile(tmp_path / file, name).source(row) == expected


# --------------------------------------------------------------------------------------------------------- checks


BAD_ROWS = [
    ({"question": "Who?", "golden_answers": ["x"]}, "line 2: the key `id` is missing"),
    ({"id": "b", "golden_answers": ["x"]}, "line 2: the key `question` is missing"),
    ({"id": "b", "question": "Who?"}, "line 2: `golden_answers` must be a list of strings"),
    ({"id": "b", "question": "Who?", "golden_answers": [" "]}, "line 2: the question has no answer"),
    (published("train", 0, "Another?"), "line 2: the id 'q:train_0' is taken by an earlier row"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named_or_left_out(tmp_path, bad, message):
    path = write_lines(tmp_path / "q.jsonl", published("train", 0, "Who?"), bad, published("train", 2, "Two?"))
    with pytest.raises(ValueError, match=rf"^1 rows cannot be used: .*q\.jsonl, {message}"):
        prepare_questions([QuestionFile(path)], [], tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [path]  # nothing was left behind
    (summary,) = prepare_questions([QuestionFile(path)], [], tmp_path / "out", Rules(drop_unusable=True))
    assert (summary.num_rows, summary.num_unusable, summary.num_written) == (3, 1, 2)
    assert [row["id"] for row in lines_of(tmp_path / "out/train.jsonl")] == ["q:train_0", "q:train_2"]


def test_all_rows_that_cannot_be_used_are_counted_and_the_first_named(tmp_path):
    path = write_lines(tmp_path / "q.jsonl", *({"id": str(index)} for index in range(9)))
    with pytest.raises(
        ValueError, match=r"^9 rows cannot be used: .*line 5: the key `question` is missing; and 4 more$"
    ):
        prepare_questions([], [QuestionFile(path)], tmp_path / "out")
    with pytest.raises(ValueError, match=r"^nothing is left of q \(eval\)$"):
        prepare_questions([], [QuestionFile(path)], tmp_path / "out", Rules(drop_unusable=True))


def test_broken_empty_and_missing_files(tmp_path):
    broken = write_lines(tmp_path / "broken.jsonl", published("train", 0, "Who?"), "{")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2 is not valid JSON"):
        prepare_questions([QuestionFile(broken)], [], tmp_path / "out", Rules(drop_unusable=True))
    with pytest.raises(ValueError, match="they hold no questions"):
        prepare_questions([QuestionFile(write_lines(tmp_path / "empty.jsonl"))], [], tmp_path / "out")
    with pytest.raises(ValueError, match=r"there is no file .*none\.jsonl"):
        prepare_questions([QuestionFile(tmp_path / "none.jsonl")], [], tmp_path / "out")
    named = write_lines(tmp_path / "q.jsonl", published("train", 0, "Who?", data_source="../../etc"))
    with pytest.raises(ValueError, match=r"q\.jsonl, line 1: a set cannot be called '\.\./\.\./etc'"):
        prepare_questions([], [QuestionFile(named)], tmp_path / "out")
    for number in (7, 2.5, ["nq"]):
        numbered = write_lines(tmp_path / "n.jsonl", published("train", 0, "Who?", data_source=number))
        with pytest.raises(ValueError, match=r"n\.jsonl, line 1: `data_source` must be the name of a set, not "):
            prepare_questions([], [QuestionFile(numbered)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_is_not_touched(flashrag, tmp_path):
    (tmp_path / "out").mkdir()
    prepare_questions(*flashrag_files(flashrag), tmp_path / "out")  # an empty folder is fine
    before = (tmp_path / "out/train.jsonl").read_bytes()
    with pytest.raises(ValueError, match="out exists already"):
        prepare_questions(*flashrag_files(flashrag), tmp_path / "out")
    assert (tmp_path / "out/train.jsonl").read_bytes() == before


def test_a_copy_of_flashrag_with_holes_names_them(flashrag):
    (flashrag / "hotpotqa/train.jsonl").unlink()
    (flashrag / "musique/dev.jsonl").unlink()
    expected = r"no hotpotqa/train\.jsonl, no musique/test\.jsonl or musique/dev\.jsonl$"
    with pytest.raises(ValueError, match=expected):
        flashrag_files(flashrag)


@pytest.fixture
def overlapping(tmp_path) -> tuple[list[QuestionFile], list[QuestionFile]]:
    """Four training questions: one repeats another in other words, and one is in two evaluation sets."""
    training = write_lines(
        tmp_path / "train.jsonl",
        *(published("train", index, text) for index, text in
          enumerate(["who wrote the Faust", "Who wrote Faust?", "Where is Ulm?", "When was Ulm founded?"])),
    )  # fmt: skip
    one = write_lines(tmp_path / "one.jsonl", published("dev", 0, "where is  ULM"),
                      published("dev", 1, "Where is Ulm"))  # fmt: skip
    two = write_lines(tmp_path / "two.jsonl", published("dev", 0, "Where is Ulm?"))
    return [QuestionFile(training, "mine")], [QuestionFile(one), QuestionFile(two)]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (Rules(), [0, 1, 2, 3]),
        (Rules(drop_duplicates=True), [0, 2, 3]),
        (Rules(drop_shared=True), [0, 1, 3]),
        (Rules(drop_duplicates=True, drop_shared=True), [0, 3]),
    ],
)
def test_duplicates_and_shared_questions_are_counted_and_dropped_from_training_only(overlapping, tmp_path, rules, kept):
    training, one, two = prepare_questions(*overlapping, tmp_path / "out", rules)
    assert [row["id"] for row in lines_of(tmp_path / "out/train.jsonl")] == [f"mine:train_{index}" for index in kept]
    assert (training.num_duplicates, training.num_shared, training.num_written) == (1, {"one": 1, "two": 1}, len(kept))
    assert (one.num_duplicates, one.num_written, two.num_duplicates, two.num_written) == (1, 2, 0, 1)


def test_memory_does_not_grow_with_what_rows_carry(tmp_path):
    """300 rows of 50 KB, as FlashRAG's multi-hop rows carry whole articles."""
    path = tmp_path / "hotpotqa.jsonl"
    with path.open("w") as file:
        for index in range(300):
            context = {"context": {"sentences": ["x" * 50_000]}}
            file.write(json.dumps(published("train", index, f"Number {index}?", metadata=context)) + "\n")
    prepare_questions([QuestionFile(path)], [], tmp_path / "warm")  # imports and buffers
    tracemalloc.start()
    prepare_questions([QuestionFile(path)], [], tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 < path.stat().st_size / 10


# ------------------------------------------------------------------------------------------------ the command itself


def test_the_command_shows_what_it_counted(overlapping, tmp_path, capsys):
    (training,), (one, two) = overlapping
    arguments = ["--train", f"nq={training.path}", "--eval", str(one.path), "--eval", str(two.path)]
    assert cli.main(["data", *arguments, "--output", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "train: nq 4 0 4 1 0 1 2" in shown  # rows, unusable, written, question marks, blank answers, twice, shared
    assert "nq (train) has 4 rows; the published file has 79,168" in shown
    assert "shares questions with evaluation sets: 1 with one, 1 with two; kept, as in the original" in shown
    assert cli.main(["data", *arguments, "--output", str(tmp_path / "two"), "--drop-shared"]) == 0
    assert "1 with two; left out" in capsys.readouterr().out
    assert len(lines_of(tmp_path / "two/train.jsonl")) == 3


def test_the_command_reads_a_copy_of_flashrag(flashrag, tmp_path, capsys):
    assert cli.main(["data", "--flashrag", str(flashrag), "--output", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out/eval").iterdir())) == 7
    assert cli.main(["data", "--output", str(tmp_path / "none")]) == 2
    assert "no files were given; name them with --train and --eval" in capsys.readouterr().err


def test_the_command_says_what_reads_parquet(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    assert cli.main(["data", "--train", str(tmp_path / "train.parquet"), "--output", str(tmp_path / "out")]) == 2
    assert "train.parquet needs pyarrow: pip install 'searchr1_fast[parquet]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_real_files(tmp_path):
    """The training set here is 483 of the NQ test questions; every one of them is found to be shared."""
    names = {"nq_dev": "nq_dev", "nq": "nq_test_open", "2wikimultihopqa": "2wiki_dev", "popqa": "popqa_dev"}
    for name in names.values():
        if not (DATA / f"qa/{name}.jsonl").is_file():
            pytest.skip(f"no {DATA}/qa/{name}.jsonl; set SEARCHR1_DATA to the directory that holds qa/{name}.jsonl")
    files = [QuestionFile(DATA / f"qa/{file}.jsonl", name) for name, file in names.items()]
    summaries = prepare_questions(files[:1], files[1:], tmp_path / "out")
    by_name = {summary.name: summary for summary in summaries}
    assert by_name["nq_dev"].num_shared == {"nq": 483}
    assert (by_name["nq"].num_written, by_name["nq"].num_marks_added) == (3093, 3093)
    assert by_name["popqa"].num_duplicates == 2
    read = read_questions(tmp_path / "out/eval/2wikimultihopqa.jsonl")
    assert {question.kind for question in read} == {"compositional", "comparison", "bridge_comparison", "inference"}
