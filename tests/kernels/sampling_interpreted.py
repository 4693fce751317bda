"""The Triton kernels of `sample_tokens`. Run by `test_triton`, not collected by itself.

Without a GPU they run in Triton's interpreter, in a process of their own because importing Triton fixes that choice. On
a GPU they are compiled.
"""

from __future__ import annotations

import math

import pytest
import torch
from searchr1_kernels import _sampling_draw_triton, _sampling_triton, sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = [
    (1.0, 0, 1.0), (0.6, 0, 1.0), (0.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.9), (0.7, 20, 0.8), (1.5, 90, 0.4),
    (2.0, 0, 0.99999), (1.0, 1, 0.5), (1.0, 0, 1e-9),
]  # fmt: skip
each_setting = pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)


@pytest.fixture
def small(monkeypatch):
    """Make several parts of a few dozen tokens; 200 tokens have fewer blocks than some k."""
    monkeypatch.setattr(_sampling_draw_triton, "PART", 64)
    monkeypatch.setattr(_sampling_draw_triton, "BLOCK", 8)
    monkeypatch.setattr(_sampling_triton, "AT_ONCE", 128)


def problem(rows, vocabulary, spread=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, vocabulary, generator=generator)
    return logits.to(DEVICE), torch.rand(rows, dtype=torch.float64, generator=generator).to(DEVICE)


@each_setting
@pytest.mark.parametrize("vocabulary", [1, 64, 190])
def test_tokens_and_log_probabilities_are_those_of_the_distribution(
    small, check_sample, vocabulary, temperature, top_k, top_p
):
    """Flat and peaked rows, rows of equals, and one where most tokens can never be drawn."""
    logits, randoms = problem(6, vocabulary, 2.0, vocabulary)
    logits[1] *= 5
    logits[2] = logits[2].round()
    logits[3] = 0.0
    logits[4, vocabulary // 3 + 1 :] = -torch.inf
    logits[5] *= 0.01
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    check_sample(logits, randoms, _sampling_triton.sample(logits, randoms, **options), **options)


@each_setting
def test_tokens_are_the_twins(temperature, top_k, top_p):
    """With parts of the shipped size; here no token depends on rounding."""
    logits, randoms = problem(4, 5000, seed=1)
    have = _sampling_triton.sample(logits, randoms, temperature, top_k, top_p)
    want = sampling.sample_torch(logits, randoms, temperature, top_k, top_p)
    assert torch.equal(have[0], want[0])
    torch.testing.assert_close(have[1], want[1], rtol=1e-6, atol=2e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="no GPU promises that its powers of 2 are exact")
@pytest.mark.parametrize(("top_p", "num_kept"), [(0.49, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 4)])
def test_a_share_that_is_held_exactly_needs_no_more(top_p, num_kept):
    """Probabilities of 1/2, 1/4, 1/8 and 1/8: at this temperature ratios are powers of 2, and sums are exact."""
    logits = torch.tensor([[-1.0, -3.0, -2.0, -3.0]], device=DEVICE).repeat(9, 1)
    randoms = torch.linspace(0, 0.99, 9, dtype=torch.float64, device=DEVICE)
    ids, _ = _sampling_triton.sample(logits, randoms, 1 / math.log(2), 0, top_p)
    assert sorted(set(ids.tolist())) == sorted([0, 2, 1, 3][:num_kept])


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS[3:8])
def test_the_bound_decides_nothing(small, monkeypatch, temperature, top_k, top_p):
    """The tokens are the same if everything is collected."""
    logits, randoms = problem(2, 190, seed=2)
    have = _sampling_triton.sample(logits, randoms, temperature, top_k, top_p)

    class Nothing:
        def __getitem__(self, grid):
            return self

        def __call__(self, peaks, sums, block_peaks, tops, cuts, *others, **options):
            tops.copy_(logits.max(dim=1).values)
            cuts.fill_(1)

    monkeypatch.setattr(_sampling_triton, "bound", Nothing())
    for one, other in zip(have, _sampling_triton.sample(logits, randoms, temperature, top_k, top_p), strict=True):
        assert torch.equal(one, other)


@each_setting
def test_a_row_has_the_same_bits_alone_and_in_any_batch(small, temperature, top_k, top_p):
    logits, randoms = problem(3, 130)
    together = _sampling_triton.sample(logits, randoms, temperature, top_k, top_p)
    strided = torch.cat([logits[:, :1], logits], dim=1)[:, 1:]
    for rows, given in ((slice(2, 3), logits[2:3]), (slice(0, 2), strided[:2])):
        alone = _sampling_triton.sample(given, randoms[rows], temperature, top_k, top_p)
        for one, all_ in zip(alone, together, strict=True):
            assert torch.equal(one, all_[rows])


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (200, 1.0), (0, 0.9)])
def test_the_running_sum_has_to_pass_the_uniform(small, top_k, top_p):
    """256 tokens of one weight in several parts: a uniform of n / 256 draws the n-th, and one that was rounded to 1 the
    last that can be drawn."""
    logits = torch.zeros(5, 300, device=DEVICE)
    logits[:, 256:] = -torch.inf
    places = torch.tensor([0, 63, 64, 255, 256], device=DEVICE)
    for sample in (_sampling_triton.sample, sampling.sample_torch):
        ids, _ = sample(logits, places.double() / 256, 1.0, top_k, top_p)
        assert ids.tolist() == places.clamp(max=255).tolist()


@pytest.mark.parametrize("random", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.9), (7, 0.99999)])
def test_impossible_tokens_are_never_drawn(small, random, top_k, top_p):
    logits = torch.full((2, 300), -torch.inf, device=DEVICE)
    logits[:, 100], logits[:, 230], logits[:, 231] = 0.0, 1.0, -70.0
    randoms = torch.full((2,), random, dtype=torch.float64, device=DEVICE)
    ids, logprobs = _sampling_triton.sample(logits, randoms, 1.0, top_k, top_p)
    assert set(ids.tolist()) <= {100, 230}
    assert logprobs.isfinite().all()


def test_greedy_takes_the_first_of_equals(small):
    logits = torch.tensor([[0.0, 1.0] * 100, [2.0] * 200, [-torch.inf] * 130 + [-3.0] * 70], device=DEVICE)
    ids, _ = _sampling_triton.sample(logits, torch.zeros(3, device=DEVICE), 0.0, 0, 1.0)
    assert ids.tolist() == [1, 0, 130]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS[::2])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_log_probability(small, wrong, temperature, top_k, top_p):
    """Every search ends, too."""
    logits, randoms = problem(5, 130)
    logits[1, 110] = wrong
    logits[2, :] = wrong
    logits[3, :] = -torch.inf
    ids, logprobs = _sampling_triton.sample(logits, randoms, temperature, top_k, top_p)
    assert ((ids >= 0) & (ids < 130)).all()
    assert logprobs.isfinite().tolist() == [True, False, False, False, True]


def test_uniforms_in_single_precision_and_no_rows(small):
    logits, randoms = problem(5, 200)
    single = randoms.float()
    have, want = (_sampling_triton.sample(logits, u, 1.0, 9, 0.9)[0] for u in (single, single.double()))
    assert torch.equal(have, want)
    ids, logprobs = _sampling_triton.sample(logits[:0], randoms[:0], 1.0, 9, 0.9)
    assert ids.shape == logprobs.shape == (0,)


def test_the_operator_on_these_kernels_passes_torchs_checks(small, monkeypatch):
    monkeypatch.setattr(sampling, "_on_gpu", lambda logits: True)
    logits, randoms = problem(2, 70)
    turned = logits.T.contiguous().T
    for given, settings in ((logits, SETTINGS[0]), (turned, SETTINGS[5]), (turned, SETTINGS[2])):
        torch.library.opcheck(torch.ops.searchr1_kernels.sample_tokens.default, (given, randoms, *settings))


@pytest.mark.skipif(DEVICE == "cpu", reason="takes minutes in the interpreter")
@each_setting
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_a_real_vocabulary(check_sample, spread, temperature, top_k, top_p):
    logits, randoms = problem(8, 151_936, spread)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    check_sample(logits, randoms, _sampling_triton.sample(logits, randoms, **options), **options)
