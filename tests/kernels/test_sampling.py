"""`sample_tokens` on a CPU, and its twin in torch's operators, against the distribution.

The kernels are in `sampling_interpreted`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from searchr1_kernels import linear_logprob, reference, sample_tokens
from searchr1_kernels.sampling import sample_torch

SETTINGS = [(1.0, 0, 1.0), (0.6, 0, 1.0), (0.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.9), (0.7, 20, 0.8), (1.5, 999, 0.4)]


def twin(logits, randoms, *, temperature=1.0, top_k=0, top_p=1.0):
    return sample_torch(logits, randoms, temperature, top_k, top_p)


each_way = pytest.mark.parametrize("sample", [sample_tokens, twin])


def problem(rows, vocabulary, spread=2.0, seed=0):
    """-> logits, randoms."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, vocabulary, generator=generator)
    return logits, torch.rand(rows, dtype=torch.float64, generator=generator)


@st.composite
def problems(draw):
    """A few rows of any kind, and settings."""
    vocabulary = draw(st.sampled_from([1, 2, 63, 64, 65, 200]))
    spread = draw(st.sampled_from([0.0, 0.01, 1.0, 4.0, 20.0]))
    logits, randoms = problem(4, vocabulary, spread, draw(st.integers(0, 2**20)))
    if draw(st.booleans()):
        logits = logits.round()  # makes equals
    if draw(st.booleans()):
        logits[:, draw(st.integers(0, vocabulary - 1)) + 1 :] = -torch.inf
    randoms[0] = draw(st.sampled_from([0.0, 0.5, 1 - 2**-53]))
    temperature = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    top_k = draw(st.sampled_from([0, 1, 2, 30, vocabulary, vocabulary + 1]))
    top_p = draw(st.sampled_from([1.0, 0.99999, 0.95, 0.5, 0.01, 1e-9]))
    return logits, randoms, {"temperature": temperature, "top_k": top_k, "top_p": top_p}


@each_way
@given(problem=problems())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_and_log_probabilities_are_those_of_the_distribution(sample, check_sample, problem):
    logits, randoms, options = problem
    check_sample(logits, randoms, sample(logits, randoms, **options), **options)


@each_way
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_it_is_the_oracle(sample, temperature, top_k, top_p):
    """Where rounding decides nothing: a wide vocabulary, with randoms drawn once."""
    logits, randoms = problem(30, 3001)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    ids, logprobs = sample(logits, randoms, **options)
    want, exact = reference.sample_tokens(logits.double(), randoms, **options)
    assert torch.equal(ids, want)
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_a_real_vocabulary(check_sample, spread):
    logits, randoms = problem(2, 151_936, spread)
    for temperature, top_k, top_p in SETTINGS:
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        check_sample(logits, randoms, sample_tokens(logits, randoms, **options), **options)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(temperature, top_k, top_p, monkeypatch):
    logits, randoms = problem(24, 500)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    together = sample_tokens(logits, randoms, **options)
    for rows in (slice(0, 1), slice(5, 12), slice(23, 24)):
        for some, all_ in zip(sample_tokens(logits[rows], randoms[rows], **options), together, strict=True):
            assert torch.equal(some, all_[rows])
    monkeypatch.setattr("searchr1_kernels.sampling._TOKENS_PER_THREAD", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    strided = torch.stack([logits, -logits], dim=2)[:, :, 0]
    for shared, all_ in zip(sample_tokens(strided, randoms, **options), together, strict=True):
        assert torch.equal(shared, all_)


def test_equals_are_kept_or_left_out_together():
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, 0.0]]).expand(400, 6)
    randoms = torch.linspace(0, 0.9999, 400, dtype=torch.float64)
    p = torch.softmax(logits[0], 0)
    two = float(p[1] + 0.5 * p[2])  # the likeliest, and no more than half of one of three equals
    for options, kept in (
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2, 3, 4}),
        ({"top_k": 5}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": float(p[1]) - 1e-3}, {1}),
        ({"top_p": two}, {1, 2, 3, 4}),
        ({"top_k": 2, "top_p": float(p[1] / (p[1] + p[2])) - 1e-3}, {1}),  # the share is of two tokens, not of four
    ):
        assert set(sample_tokens(logits, randoms, **options)[0].tolist()) == kept, options


@pytest.mark.parametrize(("top_p", "num_kept"), [(0.49, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 4)])
def test_a_share_that_is_held_exactly_needs_no_more(top_p, num_kept):
    """Probabilities of 1/2, 1/4, 1/8 and 1/8: at this temperature ratios are powers of 2, and sums are exact."""
    logits, randoms = torch.tensor([[-1.0, -3.0, -2.0, -3.0]]).expand(99, 4), torch.linspace(0, 0.99, 99)
    kept = torch.tensor([0, 2, 1, 3])[:num_kept].tolist()
    ids, _ = sample_tokens(logits, randoms, temperature=1 / math.log(2), top_p=top_p)
    assert sorted(set(ids.tolist())) == sorted(kept)


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [-torch.inf, -torch.inf, -5.0, -5.0]])
    ids, logprobs = sample_tokens(logits, torch.rand(2), temperature=0.0, top_k=3, top_p=0.2)
    assert ids.tolist() == [1, 2]
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, dim=-1).max(dim=-1).values)


@each_way
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_log_probability(sample, wrong, temperature, top_k, top_p):
    logits, randoms = problem(5, 300)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    want = sample(logits, randoms, **options)
    logits[1, 280] = wrong
    logits[3] = -torch.inf
    ids, logprobs = sample(logits, randoms, **options)
    assert ((ids >= 0) & (ids < 300)).all()
    assert logprobs.isfinite().tolist() == [True, False, True, False, True]
    assert sample(logits[1:2, 280:281], randoms[:1], **options)[0].tolist() == [0]  # one token, and it alone
    for row in (0, 2, 4):
        assert ids[row] == want[0][row] and logprobs[row] == want[1][row]


def test_the_log_probability_is_the_trainers():
    hidden, weight = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    hidden = hidden[:7]
    for temperature in (1.0, 0.6):
        logits = hidden @ weight.T
        ids, logprobs = sample_tokens(logits, problem(7, 1)[1], temperature=temperature, top_p=0.8)
        torch.testing.assert_close(logprobs, linear_logprob(hidden, weight, ids, temperature=temperature))


def test_uniforms_in_single_precision_and_no_rows():
    logits, randoms = problem(6, 100)
    single = randoms.float()
    assert torch.equal(sample_tokens(logits, single)[0], sample_tokens(logits, single.double())[0])
    for options in ({}, {"top_k": 3, "top_p": 0.5}, {"temperature": 0.0}):
        ids, logprobs = sample_tokens(logits[:0], randoms[:0], **options)
        assert ids.shape == logprobs.shape == (0,)


def test_constants_to_autograd():
    logits, randoms = problem(3, 50)
    assert not any(output.requires_grad for output in sample_tokens(logits.requires_grad_(), randoms))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x, u: (x[0], u), {}, "logits: expected shape"),
        (lambda x, u: (x.bfloat16(), u), {}, "logits: expected torch.float32"),
        (lambda x, u: (x[:, :0], u), {}, "logits: expected at least one token"),
        (lambda x, u: (x, u[:2]), {}, "randoms: expected shape"),
        (lambda x, u: (x, u.half()), {}, "randoms: expected torch.float64 or torch.float32"),
        (lambda x, u: (x, u.to("meta")), {}, "randoms: expected the device of logits"),
        (lambda x, u: (x, u), {"temperature": -1.0}, "temperature: expected 0 or"),
        (lambda x, u: (x, u), {"temperature": float("nan")}, "temperature: expected 0 or"),
        (lambda x, u: (x, u), {"temperature": float("inf")}, "temperature: expected 0 or"),
        (lambda x, u: (x, u), {"top_k": -1}, "top_k: expected 0"),
        (lambda x, u: (x, u), {"top_p": 0.0}, "top_p: expected a number above 0"),
        (lambda x, u: (x, u), {"top_p": 1.1}, "top_p: expected a number above 0"),
    ],
)
def test_errors(change, options, message):
    with pytest.raises(ValueError, match=message):
        sample_tokens(*change(*problem(3, 50)), **options)


def test_a_share_past_the_total_takes_the_last_that_is_kept():
    """The sums round: there are many equal weights, whose fp32 sum depends on the order."""
    logits = torch.full((3, 70_001), -0.1)
    logits[:, 60_000:] = -torch.inf
    randoms = torch.full((3,), np.nextafter(1.0, 0.0), dtype=torch.float64)
    for options in ({}, {"top_k": 60_000}, {"top_p": 0.99999}):
        assert sample_tokens(logits, randoms, **options)[0].tolist() == [59_999] * 3


@pytest.mark.parametrize("vocabulary", [40, 64, 100, 200])
def test_where_memory_lies_changes_no_bit(vocabulary):
    """A row's scratch memory may begin right after its logits; if that mattered, a run would not repeat to the bit."""
    from searchr1_kernels import _sampling_numba

    logits = np.random.default_rng(0).normal(size=vocabulary).astype(np.float32)
    results = set()
    for gap in range(160):
        memory = np.empty(2 * vocabulary + gap, np.float32)
        ends = memory[:vocabulary], memory[vocabulary + gap :]
        for values, weights in (ends, ends[::-1]):
            values[:] = logits
            sums = np.empty(-(-vocabulary // _sampling_numba.BLOCK), np.float32)
            _sampling_numba._weigh(values, values.max(), 1.0, weights, sums)
            results.add((sums.tobytes(), weights.tobytes()))
    assert len(results) == 1
