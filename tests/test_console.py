"""The display: what lines say, arbitrary model output that must print as itself, terminal and plain twins."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console as RichConsole

from searchr1_fast import console as console_module
from searchr1_fast.console import Console, before_after_table, sets_table, step_line, time_shares, transcript, visible
from searchr1_fast.types import Action, FinishReason, Question, Trajectory, Turn

METRICS = {
    "step": 3, "reward_mean": 0.4125, "em": 0.4, "searches_mean": 1.25, "response_tokens_mean": 143.4,
    "tokens_per_second": 4123.0, "time_step": 2.0, "time_rollout": 1.0, "time_search_wait": 0.2, "time_update": 0.8,
}  # fmt: skip


def make_trajectory(answer: str, reward: float, question: str = "Who is it?") -> Trajectory:
    segments = [
        ("prompt", f"Question: {question}\n"),
        ("policy", "<think>hm</think><search>x</search>"),
        ("observation", "\n\n<information>Doc 1</information>\n\n"),
        ("policy", f"<answer>{answer}</answer>"),
    ]
    turns = [Turn(1, 2, Action.SEARCH, "x", ("p1",)), Turn(3, 4, Action.ANSWER, answer)]
    return Trajectory(
        Question("1", question, ("Ann",), "world", "1-hop"), 0, np.arange(4), np.array([False, True, False, True]),
        np.zeros(4, np.float32), 1, turns, FinishReason.ANSWER, segments, reward,
    )  # fmt: skip


def scores(em: float, prefix: str = "") -> dict[str, float]:
    values = {"em": em, "em_low": em - 0.05, "em_high": em + 0.05, "searches_mean": 1 + em, "count": 400}
    return {f"{prefix}{key}": value for key, value in values.items()}


def plain() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(num_steps=20, file=file), file


def styles_at(text, fragment: str) -> set[str]:
    """Names of all styles applied to the first occurrence of a fragment."""
    start = text.plain.index(fragment)
    return {str(span.style) for span in text.spans if span.start <= start and span.end >= start + len(fragment)}


def test_step_line_says_everything_on_one_line():
    line = step_line(METRICS, 20).plain
    assert line == (
        "step  3/20  reward 0.412  EM 0.400  searches 1.25  length 143  4.1k tok/s  2.0s"
        "  rollout 40%  search 10%  update 40%  other 10%"
    )


def test_step_line_is_not_wrapped_into_a_file():
    ui, file = plain()
    ui.step(METRICS)
    assert file.getvalue().count("\n") == 1
    assert "\x1b" not in file.getvalue()


def test_step_line_with_numbers_missing():
    assert step_line({"step": 1, "reward_mean": None}, 9).plain.startswith("step 1/9  reward -  EM -")


def test_time_shares_add_up_and_search_lies_inside_the_rollout():
    shares = time_shares(METRICS | {"time_ref": 0.1})
    assert shares == pytest.approx({"rollout": 0.4, "search": 0.1, "update": 0.45, "other": 0.05})
    assert time_shares({"time_step": 0.0}) == {}


def test_evaluation_line_has_interval_and_hops():
    ui, file = plain()
    ui.evaluation("world", scores(0.25) | scores(0.5, "1-hop/") | scores(0.0, "2-hop/"))
    assert file.getvalue() == "  eval world  EM 0.250 [0.20, 0.30]  1-hop 0.50  2-hop 0.00  searches 1.25\n"


def test_before_after_table_by_hop():
    before = scores(0.25) | scores(0.5, "1-hop/")
    after = scores(0.95) | scores(0.45, "1-hop/")
    file = io.StringIO()
    RichConsole(file=file, width=120).print(before_after_table("world", before, after))
    rows = [line.split() for line in file.getvalue().splitlines() if line.strip().startswith(("all", "1-hop"))]
    assert rows[0] == ["all", "400", "0.250", "[0.20,", "0.30]", "1.25", "0.950", "[0.90,", "1.00]", "1.95", "+0.700"]
    assert rows[1] == ["1-hop", "400", "0.500", "[0.45,", "0.55]", "1.50", "0.450", "[0.40,", "0.50]", "1.45", "-0.050"]


def test_final_shows_both_trajectories_and_their_verdicts():
    ui, file = plain()
    examples = (make_trajectory("Bob", 0.0), make_trajectory("Ann", 1.0))
    ui.final({"world": scores(0.2)}, {"world": scores(0.9)}, examples)
    text = file.getvalue()
    assert text.index("before: Who is it?") < text.index("<answer>Bob</answer>") < text.index("wrong  expected: Ann")
    assert text.index("after: Who is it?") < text.index("<answer>Ann</answer>") < text.index("right  expected: Ann")


def test_final_without_examples_and_without_before():
    ui, file = plain()
    ui.final({}, {"world": scores(0.9)})
    assert "0.900 [0.85, 0.95]" in file.getvalue()
    assert " - " in file.getvalue()


def test_transcript_colours_segments_tags_and_the_answer():
    segments = make_trajectory("Ann", 1.0).segments
    right, wrong = transcript(segments, correct=True), transcript(segments, correct=False)
    assert right.plain == "".join(text for _, text in segments)
    assert styles_at(right, "Question") == {"dim"}
    assert styles_at(right, "Doc 1") == {"dim blue"}
    assert styles_at(right, "<search>") == {"bold yellow"}
    assert styles_at(right, "hm") == set()
    assert styles_at(right, "Ann") == {"bold green"}
    assert styles_at(wrong, "Ann") == {"bold red"}


def test_transcript_judges_the_last_answer_only():
    text = transcript([("policy", "<answer>one</answer> <answer>two</answer>")], correct=False)
    assert styles_at(text, "one") == {"bold"}
    assert styles_at(text, "two") == {"bold red"}


def test_tags_in_retrieved_text_are_not_the_policys():
    text = transcript([("policy", "<answer>mine</answer>"), ("observation", "<answer>theirs</answer>")], correct=True)
    assert styles_at(text, "theirs") == {"dim blue"}
    assert styles_at(text, "mine") == {"bold green"}


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/]", "[red", "\\[x]", ":smile:", "[link=http://x]y[/link]"])
def test_markup_in_model_output_prints_as_itself(text):
    ui, file = plain()
    ui.trajectory(make_trajectory(text, 0.0, question=text), title=text)
    ui.note(text)
    ui.evaluation(text, scores(0.5) | scores(0.5, f"{text}/"))
    ui.final({}, {text: scores(0.5)})
    assert f"<answer>{text}</answer>" in file.getvalue()
    assert f"Question: {text}" in file.getvalue()
    assert f"\n{text}\n" in file.getvalue()
    assert f"eval {text}" in file.getvalue()


def test_control_characters_are_shown_and_not_obeyed():
    assert visible("a\x1b[31m\rb\x00\x7f\n\tc\x9b") == "a␛[31m␍b␀␡\n\tc�"
    assert visible("\ud800") == "?"


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), max_size=40), st.booleans())
def test_any_text_prints_on_terminal_and_file(text, terminal):
    file = io.StringIO()
    ui = Console(file=file)
    ui.rich = RichConsole(file=file, force_terminal=terminal, width=60, markup=False, highlight=False)
    ui.trajectory(make_trajectory(text, 1.0, question=text), text)
    with ui.phase(text, 1) as progress:
        progress(1, 1)
    assert "\x00" not in file.getvalue()


def test_a_stream_that_lacks_a_character_gets_a_question_mark():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Console(file=file).note("Zürich → Genève")
    file.flush()
    assert raw.getvalue() == b"Z?rich ? Gen?ve\n"


def test_phase_on_a_terminal_is_live_and_leaves_no_line():
    file = io.StringIO()
    ui = Console(file=file)
    ui.rich = RichConsole(file=file, force_terminal=True, width=100)
    with ui.phase("[rollout]") as progress:
        progress(1, 4)
        progress(4, 4)
        ui.note("meanwhile")
    shown = file.getvalue()
    assert "4/4" in shown
    assert "meanwhile" in shown
    assert "[rollout]" in shown
    assert shown.endswith("\x1b[1A\x1b[2K")  # up, and the bar's line erased


def test_phase_in_a_file_is_silent_unless_it_takes_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    ui, file = plain()
    with ui.phase("eval world", 400) as progress:
        progress(10, 400)
        assert file.getvalue() == ""
        now[0] = 21.0
        progress(100, 400)
        progress(101, 400)
    assert file.getvalue() == "  eval world: 100 of 400\n"


def test_quiet_prints_nothing():
    file = io.StringIO()
    ui = Console(num_steps=5, quiet=True, file=file)
    ui.note("x")
    ui.step(METRICS)
    ui.evaluation("world", scores(0.5))
    ui.final({}, {"world": scores(0.5)}, (make_trajectory("a", 0.0), make_trajectory("b", 1.0)))
    with ui.phase("rollout", 3) as progress:
        progress(3, 3)
    assert file.getvalue() == ""


def test_the_mean_of_the_sets_does_not_weigh_them_by_size():
    """Bamboogle's 125 questions count as much as PopQA's 14,267, as in the published tables."""
    metrics = {
        "large": scores(0.2) | {"sub_em": 0.4, "f1": 0.3, "count": 14267},
        "[bold]": scores(0.5) | {"sub_em": 0.6, "f1": 0.9, "count": 125},
    }
    console, file = plain()
    console.rich.print(sets_table(metrics))
    rows = [line.split() for line in file.getvalue().splitlines() if line.strip()][2:]
    assert rows == [
        ["large", "14267", "0.200", "[0.15,", "0.25]", "0.400", "0.300", "1.20"],
        ["[bold]", "125", "0.500", "[0.45,", "0.55]", "0.600", "0.900", "1.50"],
        ["mean", "of", "the", "sets", "0.350", "0.500", "0.600", "1.35"],
    ]
