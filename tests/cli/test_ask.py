"""`searchr1 ask`."""

from __future__ import annotations

import pytest
from commands import CORPUS, SMALL, one_sentence, write_jsonl


def small_settings() -> list[str]:
    return [word for setting in SMALL for word in ("--set", setting)]


def test_ask_shows_the_transcript_and_ends_with_the_answer(run, tmp_path, model):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    code, out, error = run("ask", "--model", model, "--corpus", corpus, *small_settings(), "Who is [red]Ann[/red]?")
    assert code == 0, error
    assert "Who is [red]Ann[/red]?" in out
    assert "searches: 0" in out
    assert out.splitlines()[-1] == "no answer"  # of a random model
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
