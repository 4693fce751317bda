"""The sampler against softmax, and its random streams against what a stream must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_fast.rollout.sampling import SamplingParams, sample, stream_keys, uniforms


def draw(logits: torch.Tensor, count: int, params: SamplingParams, seed: int = 0):
    """-> `count` samples from one distribution [V], each for a sequence of its own."""
    keys = stream_keys(list(range(seed, seed + count)))
    randoms = torch.from_numpy(uniforms(keys, np.zeros(count, dtype=np.uint64)))
    return sample(logits.expand(count, -1).contiguous(), randoms, params)


def kept(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:  # [V] -> [V] fp64 probabilities
    """Top-k, then top-p, in fp64 and by hand."""
    p = torch.softmax(logits.double() / params.temperature, dim=-1).numpy()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: params.top_k or None]
    whole, mass, result = sum(p[order]), 0.0, np.zeros(len(p))
    for i in order:
        if mass >= params.top_p * whole:
            break
        result[i] = p[i]
        mass += p[i]
    return result / result.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(0.6),
        SamplingParams(1.5, top_k=7),
        SamplingParams(1.2, 0.7),
        SamplingParams(1.1, 0.8, 9),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(params):
    logits = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 1.5
    count = 40_000
    token_ids, logprobs = draw(logits, count, params)
    expected = kept(logits, params) * count
    observed = np.bincount(token_ids.numpy(), minlength=24)
    assert (observed[expected == 0] == 0).all()
    big = expected >= 5
    chi_square = ((observed - expected)[big] ** 2 / expected[big]).sum()
    degrees = big.sum() - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)
    table = torch.log_softmax(logits.double() / params.temperature, dim=-1)  # of the whole vocabulary, whatever is kept
    torch.testing.assert_close(logprobs, table[token_ids].float(), atol=1e-5, rtol=0)


def test_greedy_takes_the_likeliest_and_scores_it_at_temperature_one():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(2)) * 3
    token_ids, logprobs = sample(logits, torch.rand(50, dtype=torch.float64), SamplingParams(temperature=0.0))
    assert torch.equal(token_ids, logits.argmax(dim=-1))
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, dim=-1).max(dim=-1).values)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.9, 0.95), SamplingParams(1.0, 1.0, 40)], ids=str)
def test_a_row_does_not_depend_on_the_others(params):
    logits = torch.randn(40, 500, generator=torch.Generator().manual_seed(3)) * 2
    randoms = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    together = sample(logits, randoms, params)
    for row in range(0, 40, 7):
        alone = sample(logits[row : row + 1], randoms[row : row + 1], params)
        assert torch.equal(alone[0], together[0][row : row + 1])
        torch.testing.assert_close(alone[1], together[1][row : row + 1])


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(1.0, 0.9), SamplingParams(1.0, 1.0, 2)], ids=str)
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_impossible_tokens_are_never_drawn(params, uniform):
    logits = torch.full((3, 1000), -torch.inf)
    logits[:, 17], logits[:, 400], logits[:, 401] = 0.0, 1.0, -60.0
    token_ids, logprobs = sample(logits, torch.full((3,), uniform, dtype=torch.float64), params)
    assert set(token_ids.tolist()) <= {17, 400}
    assert torch.isfinite(logprobs).all()


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    token_ids, logprobs = sample(logits, torch.tensor([0.999, 0.5], dtype=torch.float64), SamplingParams())
    assert token_ids.tolist() == [0, 1]
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -np.log(3.0)], dtype=torch.float32))


def test_streams_are_uniform_and_unrelated():
    seeds = list(range(200))
    keys = stream_keys(seeds)
    table = np.stack([uniforms(keys, np.full(200, n, dtype=np.uint64)) for n in range(200)])  # [number, seed]
    assert (table >= 0).all()
    assert (table < 1).all()
    assert len(np.unique(table)) == table.size
    counts = np.histogram(table, bins=50, range=(0, 1))[0]
    assert ((counts - 800) ** 2 / 800).sum() < 49 + 5 * np.sqrt(98)
    centred = table - 0.5
    for axis in (0, 1):  # neighbouring numbers of a stream, neighbouring seeds
        neighbours = (centred.take(range(199), axis) * centred.take(range(1, 200), axis)).mean() * 12
        assert abs(neighbours) < 5 / np.sqrt(table.size)


@settings(deadline=None)
@given(seed=st.integers(-(2**70), 2**70), number=st.integers(0, 2**40))
def test_any_integer_is_a_seed(seed, number):
    one, same = (uniforms(stream_keys([seed]), np.array([number], dtype=np.uint64)) for _ in range(2))
    other = uniforms(stream_keys([seed + 1]), np.array([number], dtype=np.uint64))
    assert one == same != other


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}])
def test_senseless_parameters_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingParams(**values)
