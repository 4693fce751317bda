"""masked_kl against its fp64 oracle, and at the extremes where a limit set in the wrong place gives NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import masked_kl, reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


KINDS = ["k1", "k2", "k3"]
finite_fp32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(0, 70),
    share=st.sampled_from([None, 0.0, 0.5, 1.0]),
    spread=st.sampled_from([0.0, 1e-3, 5.0, 19.0]),
    seed=st.integers(0, 1000),
)
def test_matches_the_oracle_with_gradient(kind, tokens, share, spread, seed):
    """None, one and many tokens; none and all of them masked; equal values, and up to the exponential's limit."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, ref = -spread * torch.rand(2, tokens, generator=generator, dtype=torch.float64)
    mask = None if share is None else torch.rand(tokens, generator=generator) < share
    coefficient = torch.randn(tokens, generator=generator, dtype=torch.float64)
    results = []
    for function in (masked_kl, reference.masked_kl):
        leaf = logprobs.clone().requires_grad_()
        estimate = function(leaf, ref, kind, mask)
        (estimate * coefficient).sum().backward()
        results.append((estimate.detach(), leaf.grad))
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
        assert mask is None or (have[~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [1e-3, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_within_those_of_plain_torch(kind, spread, dtype):
    """At most three times plain torch's for values, and twice for gradients."""
    logprobs, ref = (-1 - spread * torch.rand(2, 500)).to(dtype)
    coefficient, results = torch.randn(500), []
    for function, leaf, other in (
        (masked_kl, logprobs.clone(), ref),
        (reference.masked_kl, logprobs.clone(), ref),
        (reference.masked_kl, logprobs.double(), ref.double()),
    ):
        estimate = function(leaf.requires_grad_(), other, kind)
        (estimate * coefficient).sum().backward()
        results.append([tensor.double() for tensor in (estimate.detach(), leaf.grad)])
    for have, plain, exact, times in zip(*results, (3, 2), strict=True):
        assert float((have - exact).norm()) <= times * float((plain - exact).norm()) + 1e-7 * float(exact.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    logprobs = (-5 * torch.rand(20, dtype=torch.float64)).requires_grad_()
    ref = -5 * torch.rand(20, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda leaf: masked_kl(leaf, ref, kind), (logprobs,))


@settings(deadline=None)
@given(values=st.lists(st.tuples(finite_fp32, finite_fp32), min_size=1, max_size=20), kind=st.sampled_from(KINDS))
def test_finite_for_any_finite_input(values, kind):
    logprobs, ref = torch.tensor(values, dtype=torch.float32).T
    logprobs = logprobs.clone().requires_grad_()
    estimate = masked_kl(logprobs, ref, kind)
    estimate.sum().backward()
    assert estimate.isfinite().all()
    assert logprobs.grad.isfinite().all()
    assert kind == "k1" or (estimate >= 0).all()


def test_a_reference_far_above_saturates_and_one_far_below_does_not():
    logprobs = torch.tensor([-200.0, -19.0, -1.0], requires_grad=True)
    estimate = masked_kl(logprobs, torch.tensor([-1.0, 0.0, -300.0]))
    estimate.sum().backward()
    limit = torch.tensor(20.0).expm1() - 20.0
    torch.testing.assert_close(
        estimate.detach(), torch.stack([limit, torch.tensor(19.0).expm1() - 19, torch.tensor(298.0)])
    )
    torch.testing.assert_close(
        logprobs.grad, torch.stack([torch.tensor(0.0), -torch.tensor(19.0).expm1(), torch.tensor(1.0)])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_from_masked_tokens(kind):
    logprobs = torch.tensor([-1.0, float("nan"), float("-inf"), -2.0], requires_grad=True)
    ref = torch.tensor([-1.5, 0.0, float("-inf"), float("inf")])
    mask = torch.tensor([True, False, False, False])
    estimate = masked_kl(logprobs, ref, kind, mask)
    estimate.sum().backward()
    assert estimate.isfinite().all() and (estimate[1:] == 0).all()
    assert logprobs.grad.isfinite().all()
    assert (logprobs.grad[1:] == 0).all()


def test_small_differences_keep_their_digits():
    """In fp32, exp(d) - 1 - d is only rounding at 1e-4."""
    estimate = masked_kl(torch.tensor([-1e-4]), torch.tensor([0.0]))
    assert float(estimate) == pytest.approx(5e-9, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_reference_is_constant_and_output_precise(dtype):
    logprobs, ref = torch.zeros(3, dtype=dtype, requires_grad=True), torch.ones(3, dtype=dtype, requires_grad=True)
    estimate = masked_kl(logprobs, ref)
    estimate.sum().backward()
    assert ref.grad is None
    assert logprobs.grad.dtype == dtype
    assert estimate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("mask", [None, torch.zeros(0, dtype=torch.bool)])
def test_no_tokens(mask):
    assert masked_kl(torch.zeros(0), torch.zeros(0), mask=mask).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3), "k4"), "kind: expected 'k1', 'k2' or 'k3', got 'k4'"),
        ((torch.zeros(3), torch.zeros(3), torch.ones(3, dtype=torch.bool)), "kind: expected 'k1', 'k2' or 'k3'"),
        ((torch.zeros(3, 1), torch.zeros(3)), "logprobs: expected shape"),
        ((torch.zeros(3), torch.zeros(2)), "ref_logprobs: expected shape"),
        ((torch.zeros(3, dtype=torch.int64), torch.zeros(3)), "^logprobs: expected a floating-point"),
        ((torch.zeros(3), torch.zeros(3, dtype=torch.int64)), "ref_logprobs: expected a floating-point"),
        ((torch.zeros(3), torch.zeros(3, device="meta")), r"ref_logprobs: expected the device of logprobs \(cpu\)"),
        ((torch.zeros(3), torch.zeros(3), "k1", torch.ones(3)), "mask: expected torch.bool"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        masked_kl(*arguments)
