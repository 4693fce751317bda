"""User errors give one line and an exit code; our own mistakes keep their traceback."""

from __future__ import annotations

import pytest

from searchr1_fast import errors
from searchr1_fast.errors import entry_point


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("train.x: too\n  big"), "error: train.x: too big"),
        (ValueError(), "error: ValueError without a message"),
        (FileNotFoundError(2, "No such file or directory", "q.jsonl"), "error: q.jsonl: no such file or directory"),
        (ConnectionError("refused"), "error: refused"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(capsys, error, said):
    def fail():
        raise error

    assert entry_point(fail)() == 2
    assert capsys.readouterr().err == f"searchr1: {said}\n"


def test_a_failed_search_is_the_users_to_mend(capsys):
    from searchr1_fast.retrieval import RetrievalError

    def fail():
        raise RetrievalError("http://x/retrieve: connection refused, 5 attempts")

    assert entry_point(fail)() == 2
    assert capsys.readouterr().err == "searchr1: error: http://x/retrieve: connection refused, 5 attempts\n"


def test_interrupt_is_130(capsys):
    def fail():
        raise KeyboardInterrupt

    assert entry_point(fail)() == errors.INTERRUPTED == 130
    assert capsys.readouterr().err == "searchr1: interrupted\n"


@pytest.mark.parametrize("error", [AssertionError("ours"), RuntimeError("ours"), KeyError("ours"), SystemExit(3)])
def test_our_own_mistakes_keep_their_traceback(error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        entry_point(fail)()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_debugging_lets_everything_through(monkeypatch, error):
    monkeypatch.setenv("SEARCHR1_DEBUG", "1")

    def fail():
        raise error

    with pytest.raises(type(error)):
        entry_point(fail)()


def test_under_torchrun_an_error_says_whose_it_is(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    def fail():
        raise ValueError("no")

    assert entry_point(fail)() == 2
    assert capsys.readouterr().err == "[rank 1] searchr1: error: no\n"


def test_exit_codes_of_success():
    assert entry_point(lambda: None)() == 0
    assert entry_point(lambda: 5)() == 5
