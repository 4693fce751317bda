"""Scores: their arithmetic by hand, and that they depend only on the model and the questions."""

from __future__ import annotations

import pytest
import torch

import searchr1_fast.eval as eval_command
from searchr1_fast.config import Config, DataSet, RetrievalConfig
from searchr1_fast.distributed import Ranks
from searchr1_fast.environment import build_environment, build_environments, evaluation_environments
from searchr1_fast.evaluate import EvalResult, build_engine, evaluate, score, wilson_interval
from searchr1_fast.models import load_model, load_tokenizer
from searchr1_fast.types import Action, Turn


@pytest.mark.parametrize(
    ("successes", "count", "expected"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (29, 29, (0.8830, 1.0)),
        (0, 0, (0.0, 1.0)),
    ],
)
def test_wilson_interval_as_published(successes, count, expected):
    assert wilson_interval(successes, count) == pytest.approx(expected, abs=6e-5)


def test_scores_by_kind_and_source(make_trajectory, make_question):
    """Four questions by hand, whose answers are b, c, d and e; text of the prompt is no answer."""

    def spoken(index: int, text: str, searches: int):
        trajectory = make_trajectory(index, [(False, 3), (True, 2 + index)])
        trajectory.question = make_question(index)
        trajectory.segments = [("prompt", "<answer>b</answer>"), ("policy", text)]
        trajectory.turns = [Turn(3, 5, Action.SEARCH, "k", ("1",)) for _ in range(searches)]
        return score(trajectory)

    result = EvalResult(
        "set",
        [
            spoken(0, "no answer", 1),
            spoken(1, "<answer> C! </answer>", 0),
            spoken(2, "<answer>c or d</answer>", 2),
            spoken(3, "<answer>x</answer> <answer>d</answer>", 0),
        ],
    )
    assert [s.prediction for s in result.scores] == [None, "C!", "c or d", "d"]
    assert [s.trajectory.reward for s in result.scores] == [s.em for s in result.scores]
    metrics = result.metrics()
    assert (metrics["em"], metrics["count"], metrics["searches_mean"]) == (0.25, 4, 0.75)
    assert (metrics["odd/em"], metrics["even/em"], metrics["even/sub_em"]) == (0.5, 0.0, 0.5)
    assert metrics["f1"] == pytest.approx((0 + 1 + 2 * (1 / 3) / (4 / 3) + 0) / 4)
    assert metrics["response_tokens_mean"] == 3.5
    assert (metrics["em_low"], metrics["em_high"]) == wilson_interval(1, 4)
    assert "letters/em" not in metrics  # a single source is the whole set
    assert result.row()["eval/set/odd/em"] == 0.5
    record = result.scores[2].record()
    assert (record["prediction"], record["em"], record["searches"], record["kind"]) == ("c or d", 0.0, 2, "even")


@pytest.fixture
def opened(make_config):
    """Configuration, model, tokenizer and the letters' environment."""
    config = make_config()
    _, environments = build_environments(config)
    return config, load_model(config.model.path), load_tokenizer(config.model.path), environments["letters"]


def texts(result: EvalResult) -> list[str]:
    return [s.trajectory.policy_text for s in result.scores]


def test_greedy_scores_do_not_depend_on_the_batch(opened):
    config, model, tokenizer, environment = opened
    whole = evaluate(model, tokenizer, environment, config)
    assert [s.trajectory.question.id for s in whole.scores] == [f"q{i}" for i in range(8)]
    assert any(s.trajectory.num_searches for s in whole.scores)
    narrow = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_num_seqs": 3})})
    assert texts(evaluate(model, tokenizer, environment, narrow)) == texts(whole)
    other_seed = evaluate(model, tokenizer, environment, config, seed=9)
    assert texts(other_seed) == texts(whole)


def test_sampled_scores_repeat_by_seed_and_are_shared_among_ranks(opened, monkeypatch):
    config, model, tokenizer, environment = opened
    first = evaluate(model, tokenizer, environment, config, temperature=1.0, seed=1)
    assert texts(evaluate(model, tokenizer, environment, config, temperature=1.0, seed=1)) == texts(first)
    assert texts(evaluate(model, tokenizer, environment, config, temperature=1.0, seed=2)) != texts(first)

    monkeypatch.setattr(Ranks, "unshare", lambda self, mine: mine)
    second_of_two = Ranks(1, 2, torch.device("cpu"))
    part = evaluate(model, tokenizer, environment, config, temperature=1.0, seed=1, ranks=second_of_two)
    assert texts(part) == texts(first)[1::2]


def test_an_open_engine_keeps_its_own_sampling(opened):
    config, model, tokenizer, environment = opened
    engine = build_engine(model, tokenizer, config)
    before = engine.sampling
    assert not before.is_greedy
    calls = []
    evaluate(None, tokenizer, environment, config, engine=engine, progress=lambda *counts: calls.append(counts))
    assert engine.sampling is before
    assert calls[-1] == (8, 8)


def test_sets_without_a_corpus_share_the_training_retriever(make_config):
    training, environments = build_environments(make_config())
    assert environments["letters"].retriever is training.retriever
    (found,) = training.search(["k3"])
    assert [passage.title for passage in found] == ["k3"]


@pytest.mark.parametrize("backend", ["bm25", "dense"])
def test_an_evaluation_alone_opens_the_training_corpus_once(make_config, backend):
    config = make_config(retrieval={"backend": backend})
    config.eval.sets["again"] = config.eval.sets["letters"]
    environments = eval_command._environments(config, ["letters", "again"])
    assert environments["letters"].retriever is environments["again"].retriever
    assert environments["letters"].search(["k3"])[0][0].title == "k3"


def test_a_world_brings_its_own_corpus():
    config = Config.model_validate({"data": {"world": {"num_entities": 40, "num_questions": 30}, "limit": 7}})
    environment = build_environment(config.data, config.retrieval)
    assert len(environment.questions) == 7
    question = environment.questions[0]
    (found,) = environment.search([question.text])
    assert 1 <= len(found) <= config.retrieval.topk
    assert build_environment(config.data, RetrievalConfig(backend="none")).search(["anything"]) == [[]]


def test_worlds_that_differ_in_their_questions_alone_share_a_retriever():
    world = {"num_entities": 40, "num_questions": 10}
    sets = {"one": world, "two": world | {"comparison": 1.0}, "other": world | {"seed": 1}}
    config = Config.model_validate({"eval": {"sets": {name: {"world": values} for name, values in sets.items()}}})
    opened = evaluation_environments(config)
    assert opened["one"].retriever is opened["two"].retriever
    assert opened["one"].questions != opened["two"].questions
    assert opened["one"].search(["Hill"]) != opened["other"].search(["Hill"])


def test_a_model_made_for_fewer_positions_is_named(opened):
    config, model, tokenizer, _ = opened
    known = model.config.max_position_embeddings
    changed = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"max_sequence_tokens": known + 1})}
    )
    with pytest.raises(ValueError, match=f"rollout.max_sequence_tokens: {known + 1} .* at most {known}"):
        build_engine(model, tokenizer, changed)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="nowhere.jsonl"):
        build_environment(DataSet(questions=str(tmp_path / "nowhere.jsonl")), RetrievalConfig())
