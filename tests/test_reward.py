"""Scores against the official scorers' values, and the traps of the original."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_fast.reward import exact_match, extract_answer, f1, normalize_answer, sub_exact_match

DATA = Path(os.environ.get("SEARCHR1_DATA", Path(__file__).parents[2] / "shared" / "data"))
RUNS = {"nq": 0.314700, "triviaqa": 0.417495, "popqa": 0.312369, "bamboogle": 0.112000}  # published exact match

# Like Search-R1's prompt: two pairs of answer tags, the second an example.
PROMPT_WITH_EXAMPLE = (
    "Put the answer inside <answer> and </answer> without detail, for example <answer> Beijing </answer>. Question: "
)


def rows(name: str) -> list[dict]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {path}; set SEARCHR1_DATA to the directory that holds {name}")
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def test_equal_to_official_scores_row_by_row():
    reference = rows("ref/em_f1_dev.jsonl")
    assert len(reference) == 1588
    for row in reference:
        prediction, golden = row["pred"], row["golden_answers"]
        assert exact_match(prediction, golden) == row["searchr1_em"] == row["hotpot_em"], row["id"]
        assert sub_exact_match(prediction, golden) == row["searchr1_subem"], row["id"]
        assert f1(prediction, golden) == pytest.approx(row["hotpot_f1"], abs=1e-9), row["id"]
    assert sum(any(not normalize_answer(a) for a in row["golden_answers"]) for row in reference) == 2


@pytest.mark.parametrize("name", RUNS)
def test_published_exact_match(name):
    traces = rows(f"traces/searchr1_{name}_v0.jsonl")
    scores = [exact_match(row["pred"], row["golden_answers"]) for row in traces]
    assert sum(scores) / len(scores) == pytest.approx(RUNS[name], abs=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_no_row_scores_from_the_prompt(name):
    """The original's way would score silent rows as right for a question whose answer is Beijing. Ours pays none."""
    silent = [row for row in rows(f"traces/searchr1_{name}_v0.jsonl") if row["pred"] == ""]
    assert silent
    for row in silent:
        answer = extract_answer(row["response"])
        assert exact_match(answer, ["Beijing"]) == 0.0
        assert exact_match(extract_answer(PROMPT_WITH_EXAMPLE + row["response"]), ["Beijing"]) == 1.0


def test_normalisation():
    assert normalize_answer("  The  Well-Known\tBand, a.k.a. «X» ") == "wellknown band aka «x»"
    assert normalize_answer("Theatre and an anthem") == "theatre and anthem"


@pytest.mark.parametrize(
    ("prediction", "golden", "score"),
    [
        ("the Jesus Christ", ["Mary", "jesus  christ."], 1.0),
        ("Jesus", ["Jesus Christ"], 0.0),
        (None, ["Paris"], 0.0),
        ("", ["Paris"], 0.0),
        ("Paris", [], 0.0),
        # Golden answers that normalise to nothing are compared as written.
        ("the  the", ["The The"], 1.0),
        ("!!!", ["!!!"], 1.0),
        ("", ["The The"], 0.0),
        ("A", ["The The"], 0.0),
        ("", [""], 0.0),
        (None, ["---"], 0.0),
        ("Many", ["---", "many"], 1.0),
    ],
)
def test_exact_match(prediction, golden, score):
    assert exact_match(prediction, golden) == score


def test_sub_exact_match():
    assert sub_exact_match("It was in Paris, France", ["paris"]) == 1.0
    assert sub_exact_match("Paris", ["Paris, France"]) == 0.0
    assert sub_exact_match("anything", ["---"]) == 1.0  # as the original
    assert sub_exact_match(None, ["---"]) == 0.0


def test_f1():
    assert f1("Jesus", ["Jesus Christ"]) == pytest.approx(2 / 3)
    assert f1("Jesus Jesus", ["Jesus Christ"]) == pytest.approx(0.5)  # a token counts as often as it occurs
    assert f1("no it was not", ["no"]) == f1("no", ["no it was not"]) == 0.0  # yes and no are all or nothing
    assert f1("Yes.", ["yes"]) == 1.0
    assert f1("Mary", ["Jesus Christ", "Mary"]) == 1.0
    assert f1("the", ["a"]) == 0.0
    assert f1(None, ["yes"]) == 0.0


def test_one_string_of_answers_is_refused():
    with pytest.raises(TypeError, match="list of answers"):
        exact_match("P", "Paris")


@settings(deadline=None)
@given(st.text(max_size=40), st.lists(st.text(max_size=40), max_size=4))
def test_scores_are_consistent(prediction, golden):
    exact, contained, tokens = (score(prediction, golden) for score in (exact_match, sub_exact_match, f1))
    assert 0.0 <= tokens <= 1.0
    assert contained >= exact
    assert normalize_answer(normalize_answer(prediction)) == normalize_answer(prediction)
    if exact and any(normalize_answer(answer) == normalize_answer(prediction) != "" for answer in golden):
        assert tokens == pytest.approx(1.0)
