"""Reading and writing questions and passages, their errors, and the resumable stream."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_fast.data import (
    QuestionStream,
    parse_passage,
    passage_contents,
    read_corpus,
    read_questions,
    write_corpus,
    write_questions,
)
from searchr1_fast.types import Passage, Question

DATA = Path(os.environ.get("SEARCHR1_DATA", Path(__file__).parents[2] / "shared" / "data"))
GOOD = {"id": "a", "question": "Who?", "golden_answers": ["Ann"]}


def data_file(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {path}; set SEARCHR1_DATA to the directory that holds {name}")
    return path


def write_lines(path: Path, *rows) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


# ---------------------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("name", "count", "kinds"),
    [
        ("2wiki_dev", 605, {"compositional": 252, "comparison": 148, "bridge_comparison": 140, "inference": 65}),
        ("hotpotqa_dev", 2000, None),
        ("musique_train100", 100, {"": 100}),
        ("nq_test_open", 3093, {"": 3093}),
        ("triviaqa_dev", 503, {"": 503}),
    ],
)
def test_real_questions(name, count, kinds):
    questions = read_questions(data_file(f"qa/{name}.jsonl"))
    assert len(questions) == count
    assert {question.source for question in questions} == {name}
    assert kinds is None or Counter(question.kind for question in questions) == kinds


def test_real_question_with_limit_and_source():
    (question,) = read_questions(data_file("qa/2wiki_dev.jsonl"), source="2wikimultihopqa", limit=1)
    assert question == Question(
        "83bf3b5a0bd911eba7f7acde48001122",
        "When did Lothair Ii's mother die?",
        ("20 March 851",),
        "2wikimultihopqa",
        "compositional",
    )


@pytest.mark.parametrize(("name", "count"), [("2wiki", 6119), ("hotpotqa_dev100", 1000), ("musique_train100", 1890)])
def test_real_corpus_comes_back_whole(name, count):
    path = data_file(f"corpus/{name}.jsonl")
    passages = list(read_corpus(path))
    assert [passage.id for passage in passages] == [str(row) for row in range(count)]
    contents = [json.loads(line)["contents"] for line in path.open(encoding="utf-8")]
    assert [passage_contents(passage) for passage in passages] == contents
    assert not any("\n" in passage.title for passage in passages)


def test_real_titles_carry_no_wrapping_quotes():
    titles = {passage.title for passage in read_corpus(data_file("corpus/2wiki.jsonl"))}
    questions = [json.loads(line) for line in data_file("qa/2wiki_dev.jsonl").open(encoding="utf-8")]
    assert {title for question in questions for title in question["supporting_titles"]} <= titles


# ------------------------------------------------------------------------------------------------------ passages


def test_parse_passage():
    assert parse_passage("0", '"Paris"\nA city.\nIn France.') == Passage("0", "Paris", "A city.\nIn France.")
    assert parse_passage("0", '""Heroes""\nA song.').title == '"Heroes"'
    assert parse_passage("0", "Paris\nA city.").title == "Paris"
    assert parse_passage("0", '"') == Passage("0", '"', "")


text = st.text(max_size=30)
line = text.filter(lambda value: "\n" not in value)
passage = st.builds(Passage, id=st.text(min_size=1, max_size=5), title=line, text=text)


@settings(max_examples=50, deadline=None)
@given(st.lists(passage, min_size=1, unique_by=lambda p: p.id))
def test_corpus_round_trip(tmp_path_factory, passages):
    path = tmp_path_factory.mktemp("corpus") / "new" / "corpus.jsonl"
    write_corpus(path, passages)
    assert list(read_corpus(path)) == passages


def test_compressed_corpus(tmp_path):
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": 7, "contents": "\\"Paris\\"\\nA city."}\n'))
    assert list(read_corpus(path)) == [Passage("7", "Paris", "A city.")]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-20], r"beyond line \d+: Compressed file ended before"),
        (lambda data: data[: len(data) // 2], "Compressed file ended before"),
        (lambda data: data[:10] + b"\7" + data[11:], "Error -3 while decompressing"),  # a block of no known type
        (lambda data: data[:-6] + bytes([data[-6] ^ 1]) + data[-5:], r"beyond line \d+: CRC check failed"),
        (lambda data: gzip.decompress(data), "Not a gzipped file"),
    ],
)
def test_compressed_corpora_that_are_cut_or_damaged_are_named(tmp_path, damage, message):
    path = tmp_path / "corpus.jsonl.gz"
    rows = (json.dumps({"id": str(row), "contents": f"text {row * row}"}) + "\n" for row in range(300))
    path.write_bytes(damage(gzip.compress("".join(rows).encode())))
    with pytest.raises(ValueError, match=rf"corpus\.jsonl\.gz cannot be decompressed.*{message}"):
        list(read_corpus(path))


def test_corpus_is_read_as_it_is_asked_for(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", {"id": "0", "contents": "x"}, "{broken")
    passages = read_corpus(path)
    assert next(passages).id == "0"
    with pytest.raises(ValueError, match=r"c\.jsonl, line 2 is not valid JSON"):
        next(passages)


@pytest.mark.parametrize(
    ("ids", "bad"),
    [("012", False), ("011", True), ("0a20", True), ("aa", True), ("10", False), ("100", True), ("0a1", False)],
)
def test_duplicate_corpus_ids(tmp_path, ids, bad):
    """`bad`: the last id repeats an earlier one."""
    path = write_lines(tmp_path / "c.jsonl", *({"id": name, "contents": "x"} for name in ids))
    if bad:
        with pytest.raises(ValueError, match=rf"c\.jsonl, line {len(ids)}: the id '{ids[-1]}' is already taken"):
            list(read_corpus(path))
    else:
        assert [passage.id for passage in read_corpus(path)] == list(ids)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["0", "1", "2", "3", "00", "²", "a", "9" * 5000]), max_size=6))
def test_duplicates_are_exactly_those_of_a_set(tmp_path_factory, ids):
    path = write_lines(tmp_path_factory.mktemp("ids") / "c.jsonl", *({"id": name, "contents": "x"} for name in ids))
    read = []
    try:
        for found in read_corpus(path):
            read.append(found.id)
    except ValueError:
        assert not ids or ids[len(read)] in read
    else:
        assert len(set(ids)) == len(ids)
    assert len(set(read)) == len(read)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no passages"),
        (["", "  "], "holds no passages"),
        ([{"contents": "x"}], "line 1: the key `id` is missing"),
        ([{"id": "0", "text": "x"}], "line 1: the key `contents` is missing"),
        ([{"id": "0", "contents": " "}], "line 1: `contents` must be a text that is not empty"),
        ([{"id": True, "contents": "x"}], "line 1: `id` must be"),
        (["[1]"], "line 1 must be an object"),
        (['{"id": "0", "contents": ' + "[" * 100_000], "line 1 is not valid JSON: it is nested too deeply"),
    ],
)
def test_corpus_errors(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        list(read_corpus(write_lines(tmp_path / "c.jsonl", *lines)))


def test_title_with_a_newline_is_refused_and_leaves_nothing(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("old")
    with pytest.raises(ValueError, match="must not hold a newline"):
        write_corpus(path, [Passage("0", "a", "x"), Passage("1", "a\nb", "x")])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------------------- questions

questions_strategy = st.lists(
    st.builds(
        Question,
        id=st.text(min_size=1, max_size=5),
        text=text.filter(str.strip),
        golden_answers=st.lists(text.filter(str.strip), min_size=1, max_size=3).map(tuple),
        source=st.text(min_size=1, max_size=5),
        kind=st.sampled_from(["", "2-hop", "comparison"]),
    ),
    min_size=1,
)


@settings(max_examples=50, deadline=None)
@given(questions_strategy)
def test_questions_round_trip(tmp_path_factory, questions):
    path = tmp_path_factory.mktemp("qa") / "q.jsonl"
    write_questions(path, questions)
    assert read_questions(path) == questions


def test_kind_and_ignored_keys(tmp_path):
    path = write_lines(
        tmp_path / "nq.jsonl",
        GOOD | {"hops": 3, "evidence": [1]},
        GOOD | {"type": "bridge", "hops": 2},
        GOOD | {"data_source": "popqa", "golden_answers": ["", "Ann", " "]},
    )
    first, second, third = read_questions(path)
    assert (first.kind, first.source) == ("3-hop", "nq")
    assert second.kind == "bridge"
    assert (third.source, third.golden_answers) == ("popqa", ("Ann",))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("null", "line 2 must be an object"),
        ({"id": "a", "golden_answers": ["x"]}, "line 2: the key `question` is missing"),
        ({"question": "Who?", "golden_answers": ["x"]}, "line 2: the key `id` is missing"),
        ({"id": "a", "question": "Who?"}, "line 2: `golden_answers` must be a list of strings"),
        (GOOD | {"golden_answers": "Ann"}, "line 2: `golden_answers` must be a list of strings"),
        (GOOD | {"golden_answers": [1]}, "line 2: `golden_answers` must be a list of strings"),
        (GOOD | {"golden_answers": []}, "line 2: the question has no answer"),
        (GOOD | {"golden_answers": [" "]}, "line 2: the question has no answer"),
        (GOOD | {"question": " "}, "line 2: `question` must be a text that is not empty"),
    ],
)
def test_question_errors(tmp_path, bad, message):
    with pytest.raises(ValueError, match=rf"q\.jsonl, {message}"):
        read_questions(write_lines(tmp_path / "q.jsonl", GOOD, bad))


def test_missing_empty_and_badly_encoded_files(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*none\.jsonl"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"no file .*none\.jsonl"):
        next(read_corpus(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"q\.jsonl holds no questions"):
        read_questions(write_lines(tmp_path / "q.jsonl"))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"id": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 1 is not valid JSON"):
        read_questions(latin)


# ------------------------------------------------------------------------------------------------------- Parquet


def published_row(index: int, source: str, **leftover) -> dict:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"Answer inside <answer>. Question: who is number {index}?\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": [f"N{index}", "N"]}},
        "extra_info": {"split": "train", "index": index},
    } | leftover


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "train.parquet"
    rows = [published_row(0, "nq"), published_row(0, "hotpotqa"), published_row(1, "hotpotqa")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    questions = read_questions(path)
    assert questions[0] == Question("nq:train_0", "who is number 0?", ("N0", "N"), "nq")
    assert [question.id for question in questions] == ["nq:train_0", "hotpotqa:train_0", "hotpotqa:train_1"]
    assert [question.id for question in read_questions(path, limit=2)] == ["nq:train_0", "hotpotqa:train_0"]

    leftover = {"id": "test_3", "question": "Who?", "golden_answers": ["Ann"], "metadata": None}
    parquet.write_table(pyarrow.Table.from_pylist([published_row(0, "nq", **leftover)]), path)
    assert read_questions(path, source="mine") == [Question("nq:test_3", "Who?", ("Ann",), "mine")]


def test_parquet_of_ports(tmp_path):
    """A prompt that is a single text, and answers that no `target` wraps."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = published_row(4, "nq", prompt="Question: who?\n", reward_model={"ground_truth": ["Ann", "Bo"]})
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "q.parquet")
    assert read_questions(tmp_path / "q.parquet") == [Question("nq:train_4", "who?", ("Ann", "Bo"), "nq")]


def test_parquet_errors(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "train.parquet"
    path.write_text("not one")
    with pytest.raises(ValueError, match=r"train\.parquet is not a Parquet file"):
        read_questions(path)
    row = published_row(0, "nq", prompt=[{"role": "user", "content": "What?"}])
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    with pytest.raises(ValueError, match=r"train\.parquet, row 1: .*the prompt holds no `Question: `"):
        read_questions(path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install"):
        read_questions(path)


# -------------------------------------------------------------------------------------------------------- stream


def numbered(count: int) -> list[Question]:
    return [Question(str(number), "Who?", ("x",), "test") for number in range(count)]


def test_stream_visits_everything_once_an_epoch_in_a_new_order():
    stream = QuestionStream(numbered(50), seed=3)
    epochs = [[question.id for question in stream.next(50)] for _ in range(3)]
    assert all(sorted(epoch, key=int) == [str(number) for number in range(50)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [question.id for question in QuestionStream(numbered(50), seed=3).next(50)] == epochs[0]
    assert [question.id for question in QuestionStream(numbered(50), seed=4).next(50)] != epochs[0]


@settings(deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(0, 20), max_size=5), st.integers(0, 3))
def test_stream_does_not_depend_on_how_it_is_read_and_resumes(count, reads, seed):
    questions = numbered(count)
    stream = QuestionStream(questions, seed)
    pieces = [question for read in reads for question in stream.next(read)]
    whole = QuestionStream(questions, seed)
    assert pieces == whole.next(sum(reads))
    resumed = QuestionStream(questions, seed)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert resumed.next(11) == stream.next(11) == whole.next(11)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (QuestionStream(numbered(4)), "number of questions"),
        (QuestionStream([*numbered(4), Question("x", "Who?", ("x",), "test")]), "questions"),
        (QuestionStream(numbered(5), seed=1), "seed"),
    ],
)
def test_stream_refuses_a_foreign_position(other, what):
    with pytest.raises(ValueError, match=f"belongs to another {what} "):
        QuestionStream(numbered(5)).load_state_dict(other.state_dict())


def test_empty_stream():
    with pytest.raises(ValueError, match="at least one question"):
        QuestionStream([])
