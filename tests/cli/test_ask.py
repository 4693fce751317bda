"""`searchr1 ask`."""

from __future__ import annotations

import pytest
from commands import CORPUS, SMALL, one_sentence, write_jsonl

from searchr1_fast import ask


def small_settings() -> list[str]:
    return [word for setting in SMALL for word in ("--set", setting)]


def test_ask_shows_the_transcript_and_ends_with_the_answer(run, tmp_path, model):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    code, out, error = run("ask", "--model", model, "--corpus", corpus, *small_settings(), "Who is [red]Ann[/red]?")
    assert code == 0, error
    assert "Who is [red]Ann[/red]?" in out
    assert "searches: 0" in out
    assert out.splitlines()[-1] == "no answer"  # from a random model
    assert "right" not in out
    assert "wrong" not in out


def test_ask_the_world_knows_its_answers(run, model):
    code, out, error = run("ask", "--model", model, "--world", "--number", "3", *small_settings())
    assert code == 0, error
    assert "wrong  expected: " in out
    code, _, error = run("ask", "--model", model, "--world", "--number", "1000000", *small_settings())
    assert code == 2
    assert "--number 1000000: this world has questions 0 to" in one_sentence(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "gone.jsonl", "Who?"], "gone.jsonl"),
        (["--corpus", "gone.jsonl"], "there is no question"),
        (["--corpus", "corpus.jsonl", " "], "the question is empty"),
        (["--corpus", "corpus.jsonl", "Who?", "--set", "rollout.max_searchs=1"], "did you mean `rollout.max_searches`"),
        (["--corpus", "corpus.jsonl", "Who?", "--model", "nowhere"], "nowhere"),
    ],
)
def test_ask_mistakes(run, tmp_path, model, arguments, message):
    write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    code, _, error = run("ask", "--model", model, *arguments)
    assert code == 2
    assert message in one_sentence(error)


def test_ask_needs_something_to_search(run):
    code, _, error = run("ask", "Who?")
    assert code == 2
    assert "one of the arguments --corpus --url --world is required" in error


@pytest.mark.parametrize(
    ("of_the_run", "source", "backend"),
    [
        ("{backend: dense}", ["--world"], "dense"),
        ("{backend: bm25}", ["--world"], "bm25"),
        ("{backend: none}", ["--world"], "bm25"),
        ("{backend: dense, index: of_other_passages}", ["--world"], "bm25"),
        ("{backend: dense}", ["--corpus", "corpus.jsonl"], "bm25"),
        ("{backend: dense}", ["--url", "http://127.0.0.1:1/retrieve"], "remote"),
    ],
)
def test_a_world_is_searched_as_the_run_searched_its_own(tmp_path, of_the_run, source, backend):
    model = tmp_path / "checkpoints" / "step_000001" / "hf"
    model.mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(f"retrieval: {of_the_run}\n")
    assert ask._config(model, ask._parser().parse_args(source)).retrieval.backend == backend
