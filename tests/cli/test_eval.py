"""`searchr1 eval`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import CORPUS, QUESTIONS, SMALL, one_sentence, write_jsonl

from searchr1_fast import evaluate
from searchr1_fast.models import TextTokenizer, load_tokenizer
from searchr1_fast.rollout import Engine


def write_eval_config(folder: Path) -> Path:
    write_jsonl(folder / "corpus.jsonl", CORPUS)
    write_jsonl(folder / "questions.jsonl", QUESTIONS)
    path = folder / "run.yaml"
    path.write_text("eval: {sets: {tiny: {questions: questions.jsonl, corpus: corpus.jsonl}}}\n")
    return path


def test_eval_prints_a_table_and_writes_every_answer(run, tmp_path, model):
    config = write_eval_config(tmp_path)
    code, out, error = run("eval", config, "--model", model, *SMALL, "--output", "out/answers.jsonl")
    assert code == 0, error
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) > 5}
    assert rows["all"][:2] == ["2", "0.000"]
    assert rows["1-hop"][0] == "1"
    assert rows["2-hop"][0] == "1"
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [(a["set"], a["id"], a["em"], a["kind"]) for a in answers] == [
        ("tiny", "a", 0.0, "1-hop"), ("tiny", "b", 0.0, "2-hop"),
    ]  # fmt: skip
    assert answers[0]["segments"][0][0] == "prompt"
    assert "Where was Ann born?" in answers[0]["segments"][0][1]


def test_eval_of_several_sets_ends_with_a_table_of_all(run, tmp_path, model):
    config = write_eval_config(tmp_path)
    more = "eval.sets.again={questions: questions.jsonl, corpus: corpus.jsonl, limit: 1}"
    code, out, error = run("eval", config, "--model", model, *SMALL, more)
    assert code == 0, error
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) > 4}
    assert (rows["tiny"][:2], rows["again"][:2]) == (["2", "0.000"], ["1", "0.000"])
    assert rows["mean"][:4] == ["of", "the", "sets", "0.000"]
    assert "mean of the sets" not in run("eval", config, "--model", model, *SMALL)[1]


def test_eval_and_ask_end_a_chat_s_turns_as_its_template_has_it(run, tmp_path, model, monkeypatch):
    backend = load_tokenizer(model).backend
    backend.add_special_tokens(["!"])  # a single byte, so that the embedding has its row
    folder = Path(shutil.copytree(model, tmp_path / "chat"))
    TextTokenizer(backend, None, "{% for m in messages %}{{ m.content }}!{% endfor %}").save(folder)
    engines = []

    class Watched(Engine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            engines.append(self.is_eos.nonzero()[0].tolist())

    monkeypatch.setattr(evaluate, "Engine", Watched)
    config, chat = write_eval_config(tmp_path), "prompt.chat_template=true"
    set_small = [word for setting in (*SMALL, chat) for word in ("--set", setting)]
    assert run("eval", config, "--model", folder, *SMALL, chat)[0] == 0
    assert run("ask", "--model", folder, "--corpus", "corpus.jsonl", *set_small, "Who?")[0] == 0
    assert run("eval", config, "--model", folder, *SMALL)[0] == 0
    assert engines == [[backend.token_to_id("!")]] * 2 + [[]]


def test_eval_of_several_sets_starts_one_engine_and_ends_it(run, tmp_path, model, monkeypatch):
    config = write_eval_config(tmp_path)
    happened = []

    class Watched(Engine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            happened.append("start")

        def close(self):
            happened.append("end")

    monkeypatch.setattr(evaluate, "Engine", Watched)
    more = "eval.sets.again={questions: questions.jsonl, corpus: corpus.jsonl}"
    assert run("eval", config, "--model", model, *SMALL, more)[0] == 0
    assert happened == ["start", "end"]


def test_eval_is_greedy_and_repeats(run, tmp_path, model):
    config = write_eval_config(tmp_path)
    for name in ("one.jsonl", "two.jsonl"):
        assert run("eval", config, "--model", model, *SMALL, "--output", name)[0] == 0
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert run("eval", config, "--model", model, *SMALL, "--temperature", "1.5", "--output", "hot.jsonl")[0] == 0
    assert (tmp_path / "hot.jsonl").read_text() != (tmp_path / "one.jsonl").read_text()


def test_eval_of_questions_without_a_corpus_searches_the_training_corpus(run, tmp_path, model):
    config = write_eval_config(tmp_path)
    config.write_text(
        "data: {questions: questions.jsonl, corpus: corpus.jsonl}\neval: {sets: {tiny: {questions: questions.jsonl}}}\n"
    )
    code, _, error = run("eval", config, "--model", model, *SMALL)
    assert code == 0, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval.sets={}"], "has no eval.sets"),
        (["--sets", "tony"], "--sets tony: the configuration's eval.sets are tiny"),
        (["--temperature", "-1"], "--temperature -1.0: give 0 (greedy) or more"),
        (
            ["rollout.engine=vllm", "rollout.top_p=0.9", "--temperature", "0.7"],
            "eval.temperature: 0.7 (--temperature) does not go with rollout.engine=vllm",
        ),
        (["--model", "no/such/model"], "no/such/model"),
        (["eval.sets.tiny.questions=gone.jsonl"], "gone.jsonl"),
        (["eval.sets.tiny.corpus=gone.jsonl"], "gone.jsonl"),
        (["eval.sets.tiny.questions=bad.jsonl"], "bad.jsonl, line 2"),
        (["eval.sets.tiny.corpus=empty.jsonl"], "empty.jsonl"),
    ],
)
def test_eval_mistakes(run, tmp_path, model, arguments, message):
    config = write_eval_config(tmp_path)
    (tmp_path / "bad.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n{oops\n")
    (tmp_path / "empty.jsonl").write_text("")
    code, _, error = run("eval", config, "--model", model, *SMALL, *arguments, "--output", "answers.jsonl")
    assert code == 2
    assert message in one_sentence(error)
    assert not (tmp_path / "answers.jsonl").exists()
