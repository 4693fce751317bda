"""The hand-over of weights to a stand-in for vLLM: weights that arrive generate, and missing ones are detected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from trajectories import check_same
from vllm_stand_in import GREEDY, StandIn

from searchr1_fast.models import Decoder
from searchr1_fast.models.lora import adapted_layers, add_adapter, reset_adapter
from searchr1_fast.protocol import format_observation
from searchr1_fast.rollout import Engine, SearchLoop, VllmEngine, weight_handover
from searchr1_fast.rollout.weight_handover import (
    TOLERANCE,
    check_scores,
    check_weights,
    count_unlike,
    known_sequences,
    named_weights,
    score,
)


def test_updated_weights_are_the_ones_that_generate(
    make_model, make_vllm_engine, tokenizer, config, make_requests, fake_search
):
    model, requests = make_model(3), make_requests(6, seed=3)
    engine = make_vllm_engine(model, GREEDY)
    before = SearchLoop(engine, fake_search).run(requests)
    with torch.no_grad():
        for parameter, new in zip(model.parameters(), make_model(5).parameters(), strict=True):
            parameter.copy_(new)
    check_same(before, SearchLoop(engine, fake_search).run(requests))  # a copy: nothing has changed yet
    engine.update_weights()
    after = SearchLoop(engine, fake_search).run(requests)
    check_same(after, SearchLoop(Engine(model, tokenizer, config, GREEDY), fake_search).run(requests))
    assert any(len(a.token_ids) != len(b.token_ids) for a, b in zip(before, after, strict=True))


def test_an_adapter_is_handed_over_merged(make_model, make_vllm_engine, make_requests, fake_search, tokenizer, config):
    model, requests = make_model(3), make_requests(6, seed=3)
    add_adapter(model, rank=2, alpha=3.0, targets=("q_proj", "o_proj", "up_proj"))
    reset_adapter(model, seed=0)
    engine = make_vllm_engine(model, GREEDY)
    before = SearchLoop(engine, fake_search).run(requests)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.normal_(std=0.3)
    assert engine.update_weights()["handover_unseen_weights"] == 0
    after = SearchLoop(engine, fake_search).run(requests)
    check_same(after, SearchLoop(Engine(model, tokenizer, config, GREEDY), fake_search).run(requests))
    assert any(len(a.token_ids) != len(b.token_ids) for a, b in zip(before, after, strict=True))


@pytest.fixture
def model(make_model):
    """-> a model whose biases are not zero, unlike a new model's."""
    model = make_model(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_that_never_arrives_is_missed(model, make_vllm_engine, tied):
    model = tie(model, tied)
    make_vllm_engine(model)
    names = [name for name, _ in named_weights(model)]
    assert len(names) == len(set(names)) == len(list(model.parameters())) + tied
    assert "lm_head.weight" in names
    for name in names:
        with pytest.raises(ValueError, match=rf"has not got the trainer's weights: 1 of .*'{name}'.*engine=native"):
            make_vllm_engine(model, lost=[name])


@pytest.mark.filterwarnings("ignore:.*shows no copy")
def test_the_scores_alone_miss_it_too(model, make_vllm_engine):
    """This is for a receiver that shows no copies; it covers all but what mostly cancels in the softmax."""
    make_vllm_engine(model, shows=False)
    for name, _ in named_weights(model):
        if not name.endswith("k_proj.bias"):
            with pytest.raises(ValueError, match="has not got the trainer's weights: it scores.*engine=native"):
                make_vllm_engine(model, lost=[name], shows=False)


def test_one_weight_that_stays_behind_is_named_at_the_first_step(model, make_vllm_engine):
    """The update is so small that all scores stay within the tolerance; one tensor of many does not get it."""
    for name, _ in named_weights(model):
        engine = make_vllm_engine(model)
        load = engine._generator.load
        engine._generator.lost = {name}
        move(model, 1e-6)
        load(named_weights(model))
        differences = np.concatenate(engine._generator.score(engine._known)) - score(model, engine._known)
        assert np.abs(differences).mean() < TOLERANCE[torch.float32] / 10
        with pytest.raises(ValueError, match=rf"has not got the trainer's weights: 1 of .*'{name}'"):
            engine.update_weights()


@torch.no_grad()
def move(model: Decoder, size: float) -> None:
    """Move every number of every weight by about `size`."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def test_what_a_hand_over_took_and_found_is_reported(model, make_vllm_engine):
    engine = make_vllm_engine(model)
    report = engine.update_weights()
    times = {"time_handover", "time_handover_checks"}
    assert report.keys() == times | {"handover_logprob_difference_max", "handover_unseen_weights"}
    assert report["time_handover"] > report["time_handover_checks"] > 0
    assert 0 <= report["handover_logprob_difference_max"] < 1e-4
    assert report["handover_unseen_weights"] == 0
    with torch.no_grad():
        engine._generator.score = lambda sequences: [score(model, [ids]) + 1e-4 for ids in sequences]
    assert engine.update_weights()["handover_logprob_difference_max"] == pytest.approx(1e-4, rel=0.1)


def test_weights_that_cannot_be_seen_are_counted_and_said(model, make_vllm_engine):
    with pytest.warns(UserWarning, match=r"shows no copy of 27 of 27 weights, the first 'model\.embed_tokens"):
        engine = make_vllm_engine(model, shows=False)
    with pytest.warns(UserWarning, match="shows no copy"):
        assert engine.update_weights()["handover_unseen_weights"] == 27


def test_numbers_are_compared_as_the_receiver_keeps_them(monkeypatch):
    monkeypatch.setattr(weight_handover, "COMPARED", 10)  # several pieces, the last one smaller
    mine = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        theirs = mine.to(dtype, copy=True)
        assert count_unlike(mine, theirs).item() == 0
        theirs[8, 3] *= 1.01
        theirs[0, 0] = torch.nan
        assert count_unlike(mine, theirs).item() == 2
    assert count_unlike(mine.bfloat16(), mine.bfloat16().float()).item() == 0  # as vLLM keeps biases on a CPU
    assert check_weights({"a": mine, "b": mine}, [("b", mine), ("b", mine)], "it") == ["a"]
    with pytest.raises(ValueError, match="it has not got .* 1 of 2 differ, the first 'b' in 36 of its 36 numbers"):
        check_weights({"a": mine, "b": mine}, [("a", mine), ("b", mine), ("b", -mine)], "it")


def tie(model: Decoder, tied: bool) -> Decoder:
    """-> the same weights, or those with the head as the embedding."""
    if not tied:
        return model
    other = Decoder(replace(model.config, tie_word_embeddings=True))
    state = {**model.state_dict(), "model.embed_tokens.weight": model.head_weight}
    other.load_state_dict({**state, "lm_head.weight": model.head_weight})
    return other


def test_the_check_scores_each_sequence_by_itself_and_knows_nan(make_model, tokenizer):
    model = make_model(4)
    known = known_sequences(tokenizer, model.config.vocab_size, 20)
    assert {len(token_ids) for token_ids in known} == {20, len(tokenizer.encode(format_observation([])))}
    assert {token for token_ids in known[2:] for token in token_ids} >= {0, model.config.vocab_size - 1}
    scores = [score(model, [token_ids]) for token_ids in known]
    np.testing.assert_allclose(np.concatenate(scores), score(model, known), atol=1e-5)
    check_scores(model, known, scores, "it")
    scores[1] = np.full_like(scores[1], np.nan)
    with pytest.raises(ValueError, match="it has not got"):
        check_scores(model, known, scores, "it")


@pytest.mark.filterwarnings("ignore:.*shows no copy")
def test_scores_that_stand_still_are_noticed_before_they_have_gone_far(make_model, make_vllm_engine):
    """The receiver takes none of several small updates: scores stay far within the tolerance, but do not agree."""
    model = make_model(4)
    engine = make_vllm_engine(model, shows=False)
    engine.update_weights()  # the same weights once more: nothing has moved, and nothing should
    move(model, 2e-6)
    engine.update_weights()
    engine._generator.load = lambda weights: None
    move(model, 2e-6)
    differences = np.concatenate(engine._generator.score(engine._known)) - score(model, engine._known)
    assert np.abs(differences).mean() < TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match="still has the weights of an earlier step.*rollout.engine=native"):
        engine.update_weights()


def test_a_standstill_is_measured_from_the_last_change(make_model, tokenizer):
    """Steps too small to be noticed one by one are noticed all together."""
    model = make_model(4)
    known = known_sequences(tokenizer, model.config.vocab_size, 20)
    stale = [score(model, [token_ids]) for token_ids in known]
    before, _ = check_scores(model, known, stale, "it")

    def update(times):
        for _ in range(times):
            with torch.no_grad():
                model.head_weight.mul_(1 + 5e-7)
            assert check_scores(model, known, stale, "it", before)[0] is before

    update(1)
    with pytest.raises(ValueError, match="it still has"):
        update(100)


def test_an_engine_that_cannot_start_is_closed(make_model, tokenizer, config):
    model = make_model(4)
    stand_in = StandIn(model, tokenizer.eos_ids, lost=["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="has not got the trainer's weights"):
        VllmEngine(model, tokenizer, config, generator=stand_in)
    assert stand_in.requests is None
