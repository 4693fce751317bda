"""A step that runs out of memory is computed in parts, with the same tokens, and is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trajectories import check_same

from searchr1_fast.models import KVCache
from searchr1_fast.rollout import Engine, SamplingParams, SearchLoop, engine, sampling
from searchr1_fast.rollout.decode_graph import DecodeGraphs
from searchr1_fast.rollout.forward import Tokens, forward_in_parts

COOL = SamplingParams(temperature=0.5)


def narrow(model, monkeypatch, most: int, sizes: list[int]) -> None:
    """Let the model run out of memory above `most` tokens, in the middle of the pass: its keys are written by then."""
    whole = model.forward_cached

    def forward(token_ids, *arguments, **options):
        hidden = whole(token_ids, *arguments, **options)
        if len(token_ids) > most:
            raise torch.OutOfMemoryError(f"no memory for {len(token_ids)} tokens")
        sizes.append(len(token_ids))
        return hidden

    monkeypatch.setattr(model, "forward_cached", forward)


@pytest.fixture
def tokens():
    """lengths, cached -> random tokens of sequences that have `cached` tokens in the cache."""

    def make(lengths, cached) -> Tokens:
        generator = torch.Generator().manual_seed(len(lengths))
        token_ids = torch.randint(0, 60, (sum(lengths),), generator=generator)
        ends = torch.tensor([0, *np.cumsum(lengths).tolist()])
        return Tokens(token_ids, ends, torch.arange(len(lengths)), torch.tensor(cached), np.array(lengths))

    return make


@pytest.mark.parametrize("most", [1, 2, 7, 30])
@pytest.mark.parametrize("lengths", [[40], [1, 60, 1], [9, 9, 9, 9], [1, 1, 1, 1, 80], [33, 2]], ids=str)
def test_parts_give_what_the_whole_gives(make_model, monkeypatch, tokens, lengths, most):
    model, results, caches, splits, sizes = make_model(4), [], [], [], []
    before = tokens([5] * len(lengths), [0] * len(lengths))
    new = tokens(lengths, [5] * len(lengths))
    for is_narrow in (False, True):
        cache = KVCache(model.config, num_slots=len(lengths), max_length=90)
        forward_in_parts(model, cache, before, pytest.fail)
        if is_narrow:
            narrow(model, monkeypatch, most, sizes)
        results.append(forward_in_parts(model, cache, new, lambda: splits.append(1)))
        caches.append(cache)
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-5)
    for one, other in zip((*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
    assert (sum(sizes), len(sizes)) == (sum(lengths), len(splits) + 1)
    assert max(sizes) <= most
    assert len(sizes) >= sum(lengths) / most


@pytest.mark.parametrize("graphs", [None, DecodeGraphs])
def test_a_rollout_with_little_memory_is_the_same(
    make_model, tokenizer, config, make_requests, fake_search, monkeypatch, graphs
):
    changed = config.model_copy(update={"max_num_seqs": 24})
    model, requests, sizes = make_model(4), make_requests(24, group_size=4), []
    ample = SearchLoop(Engine(model, tokenizer, changed, COOL), fake_search)
    expected = ample.run(requests)
    assert ample.statistics.num_splits == 0
    narrow(model, monkeypatch, 11, sizes)
    loop = SearchLoop(Engine(model, tokenizer, changed, COOL, decode_graphs=graphs), fake_search)
    check_same(expected, loop.run(requests))
    assert loop.statistics.num_splits > 10
    assert max(sizes) <= 11
    computed = loop.statistics.num_prefill_tokens + loop.statistics.num_decode_tokens
    assert graphs is not None or sum(sizes) == computed


def test_logits_for_which_there_is_no_memory_are_made_in_parts(
    make_model, tokenizer, config, make_requests, fake_search, monkeypatch
):
    changed = config.model_copy(update={"max_num_seqs": 24})
    model, requests, sizes = make_model(4), make_requests(24, group_size=4), []
    expected = SearchLoop(Engine(model, tokenizer, changed, COOL), fake_search).run(requests)
    head_logits = sampling.head_logits

    def narrow_head(hidden, weight):
        if len(hidden) > 5:
            raise torch.OutOfMemoryError(f"no memory for {len(hidden)} rows of logits")
        sizes.append(len(hidden))
        return head_logits(hidden, weight)

    monkeypatch.setattr(sampling, "head_logits", narrow_head)
    loop = SearchLoop(Engine(model, tokenizer, changed, COOL, run_ahead=True), fake_search)
    check_same(expected, loop.run(requests))
    assert loop.statistics.num_splits == len(sizes) - loop.statistics.num_steps > 0
    monkeypatch.setattr(sampling, "head_logits", lambda hidden, weight: narrow_head(hidden.repeat(6, 1), weight))
    with pytest.raises(torch.OutOfMemoryError) as error:
        loop.run(requests)
    assert "rollout.max_num_seqs" in error.value.__notes__[-1]


@pytest.mark.parametrize("graphs", [None, DecodeGraphs])
def test_no_memory_for_the_cache_leaves_none_behind(
    make_model, tokenizer, config, make_requests, fake_search, monkeypatch, graphs
):
    """A caller that frees memory and runs again finds the engine as it was."""
    model, requests = make_model(4), make_requests(6)
    expected = SearchLoop(Engine(model, tokenizer, config, COOL), fake_search).run(requests)
    loop = SearchLoop(Engine(model, tokenizer, config, COOL, decode_graphs=graphs), fake_search)
    loop.run(requests[:2])

    def refuse(*arguments, **options):
        raise torch.OutOfMemoryError("no memory for a cache")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "KVCache", refuse)
        with pytest.raises(torch.OutOfMemoryError) as error:
            loop.run(requests)
    assert "rollout.max_num_seqs" in error.value.__notes__[-1]
    check_same(expected, loop.run(requests))


def test_no_memory_for_one_token_ends_the_rollout(
    make_model, tokenizer, config, make_requests, fake_search, monkeypatch
):
    model = make_model(4)
    narrow(model, monkeypatch, 0, [])
    with pytest.raises(torch.OutOfMemoryError) as error:
        SearchLoop(Engine(model, tokenizer, config), fake_search).run(make_requests(4))
    assert "rollout.max_num_seqs" in error.value.__notes__[-1]
