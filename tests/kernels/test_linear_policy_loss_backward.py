"""The backward pass of linear_policy_loss: what it scales, hands over and leaves out.

The forward pass has already formed the gradients.
"""

from __future__ import annotations

import threading

import pytest
import torch
import torch.utils.checkpoint
from policy_loss_problems import KINDS, assert_close, problem, run
from searchr1_kernels import PolicyLoss, _linear_chunks, _linear_sums, linear_policy_loss, reference

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_fp16_gradients_below_its_range_survive_until_they_are_scaled():
    """As with a loss scaler: when the loss is multiplied, the gradients formed earlier must be multiplied too."""
    inputs, _ = problem(20, dtype=torch.float16)
    small = (*inputs[:4], inputs[4] * 2.0**-30)
    hidden, weight = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    loss, _ = linear_policy_loss(hidden, weight, *small[2:], denominator=1)
    (loss * 2.0**30).backward()
    _, hidden_gradient, weight_gradient, _ = run(linear_policy_loss, inputs, denominator=1)
    torch.testing.assert_close(hidden.grad, hidden_gradient, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(weight.grad, weight_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_gradient_are_not_multiplied(monkeypatch, kind, recompute):
    """Rows with zero advantage and no KL take no part in the products of the backward pass."""
    multiplied = []
    add = _linear_sums.Gradients.add

    def record(self, gradient, *rest):
        multiplied.append(len(gradient))
        add(self, gradient, *rest)

    monkeypatch.setattr(_linear_sums.Gradients, "add", record)
    inputs, _ = problem(40, spread=0.0)
    inputs[4][::2] = 0.0
    inputs[4][20:] = 0.0
    options = {"loss": PolicyLoss(kind=kind), "denominator": 1.0}
    if kind == "gspo":
        options["cu_seqlens"] = torch.tensor([0, 40])
    ours = run(linear_policy_loss, inputs, recompute=recompute, **options)
    assert sum(multiplied) == 10
    assert_close(ours, run(reference.linear_policy_loss, inputs, **options), 1e-12)


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_rows_that_are_clipped_are_not_multiplied(monkeypatch, kind):
    """At a ratio of e, rows with a positive advantage are clipped; rows with a negative one are not."""
    multiplied = []
    add = _linear_sums.Gradients.add
    monkeypatch.setattr(
        _linear_sums.Gradients, "add", lambda self, *rest: multiplied.append(len(rest[0])) or add(self, *rest)
    )
    inputs, _ = problem(40, spread=0.0)
    advantages = torch.where(torch.arange(40) < 30, 1.0, -1.0).double()
    inputs, options = (*inputs[:3], inputs[3] - 1.0, advantages), {"loss": PolicyLoss(kind=kind), "denominator": 1.0}
    if kind == "gspo":
        options["cu_seqlens"] = torch.tensor([0, 30, 40])
    ours = run(linear_policy_loss, inputs, **options)
    assert sum(multiplied) == 10 and ours[3]["clip_fraction"] == 30
    assert_close(ours, run(reference.linear_policy_loss, inputs, **options), 1e-12)


def test_the_weight_s_gradient_is_rounded_with_each_of_eight_chunks_and_of_more_once(monkeypatch):
    """Emulates bf16 rows on a GPU by products on a CPU that round once."""

    def multiply(left, right, *, out, scale=1.0):
        out.copy_(scale * (left.float() @ right.float()))

    def multiply_add(left, right, *, out):
        out.copy_(out.float() + left.float() @ right.float())

    for name, value in (("multiply", multiply), ("multiply_add", multiply_add), ("operand", lambda tensor: tensor)):
        monkeypatch.setattr(_linear_sums, name, value)
    monkeypatch.setattr(_linear_sums, "weight_gradient_dtype", lambda weight: weight.dtype)
    generator = torch.Generator().manual_seed(0)
    gradient, rows, weight = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((768, 200), (768, 64), (200, 64))
    )
    exact, errors = gradient.double().T @ rows.double(), {}
    for size, dtype in ((768, torch.bfloat16), (500, torch.bfloat16), (96, torch.bfloat16), (90, torch.float32)):
        sums = _linear_sums.Gradients(rows, weight, False, True)
        for where in _linear_chunks.ranges(768, size):
            sums.add(gradient[where], None, rows[where], where)
        assert sums._weight.dtype == dtype
        hidden_gradient, weight_gradient = sums.results()
        assert hidden_gradient is None and weight_gradient.dtype == torch.bfloat16
        errors[size] = float((weight_gradient.double() - exact).norm())
    assert errors[90] == pytest.approx(errors[768], rel=1e-3)
    assert errors[96] == pytest.approx(4.5**0.5 * errors[768], rel=0.03)
    assert errors[500] == pytest.approx((1 + 500 / 768) ** 0.5 * errors[768], rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_come_with_a_scale_have_it_in_both_sums(dtype):
    """Rows of kept probabilities have a scale on a GPU. In two chunks; the caller's rows stay as they are."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(count, 6, generator=generator).to(dtype) for count in (9, 13))
    gradient, scales = torch.randn(9, 13, generator=generator), torch.randn(9, generator=generator)
    rows, exact = hidden.float(), (scales[:, None] * gradient).double()
    sums = _linear_sums.Gradients(hidden, weight, True, True)
    for where in (slice(0, 5), slice(5, 9)):
        sums.add(gradient[where], scales[where], rows[where], where)
    assert torch.equal(rows, hidden.float())
    for have, want in zip(sums.results(), (exact @ weight.double(), exact.T @ hidden.double()), strict=True):
        rounded = torch.finfo(have.dtype).eps / 2  # rounded once
        torch.testing.assert_close(have.double(), want, rtol=rounded, atol=3e-6)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_are_rounded_once(dtype, scale):
    """Products of fp32 operands, as for the gradient of 16-bit hidden states on a CPU; others keep their own type."""
    left, right = torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if dtype != torch.float64:
        left, right = left.float(), right.float()
    out = torch.full((40, 40), torch.nan, dtype=dtype)
    _linear_sums.multiply(left, right, out=out, scale=scale)
    exact = scale * (left.double() @ right.double())
    summed, rounded = (torch.finfo(kind).eps for kind in (left.dtype, dtype))
    assert float((out.double() - exact).abs().max() / exact.abs().max()) <= 8 * summed + rounded / 2


@pytest.mark.parametrize("recompute", [False, True])
def test_a_second_backward_pass_gives_the_same_gradient(recompute):
    inputs, _ = problem(20)
    weight = inputs[1].requires_grad_()
    loss, _ = linear_policy_loss(*inputs, denominator=1, recompute=recompute)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_passes_of_any_factor(dtype):
    """Only the last backward pass scales the gradients in place and gives them away; factors are fp32."""
    inputs, _ = problem(20, dtype=dtype)
    _, *want, _ = run(linear_policy_loss, inputs, denominator=7)
    sides = [tensor.clone().requires_grad_() for tensor in inputs[:2]]
    loss, _ = linear_policy_loss(*sides, *inputs[2:], denominator=7)
    for factor, keep in ((3.0, True), (1.0, True), (1.003, True), (0.1, False)):
        grads = torch.autograd.grad(loss * factor, sides, retain_graph=keep)
        for have, plain in zip(grads, want, strict=True):
            error = float((have.double() - factor * plain.double()).norm() / plain.double().norm() / factor)
            assert error <= (0 if factor == 1.0 else 1e-6 if dtype == torch.float32 else 3e-3)
            have.zero_()  # memory of its own
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, sides)


def test_the_backward_pass_copies_no_gradient(monkeypatch):
    """The parameter's gradient is the memory that the forward pass filled; a second micro-batch adds to it."""
    formed, results = [], _linear_sums.Gradients.results

    def record(self):
        gradients = results(self)
        formed[:] = [gradient.data_ptr() for gradient in gradients]
        return gradients

    monkeypatch.setattr(_linear_sums.Gradients, "results", record)
    inputs, _ = problem(20, dtype=torch.float32)
    weight = inputs[1].clone().requires_grad_()
    single = []
    for rows, factor in ((slice(0, 8), 1.0), (slice(8, 20), 2.0)):
        hidden = inputs[0][rows].clone().requires_grad_()
        part = (hidden, weight, *(x[rows] for x in inputs[2:]))
        single.append(factor * run(linear_policy_loss, (inputs[0][rows], *inputs[1:2], *part[2:]), denominator=20)[2])
        loss, _ = linear_policy_loss(*part, denominator=20)
        (loss * factor).backward()
        assert hidden.grad.data_ptr() == formed[0]
        assert (weight.grad.data_ptr() == formed[1]) == (rows.start == 0)
        torch.testing.assert_close(weight.grad, sum(single))


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_what_saves_tensors_elsewhere_gets_the_same_gradients(reentrant):
    """Checkpointing forms them a second time; hooks return copies, as those that move tensors to a CPU do."""
    inputs, _ = problem(20, dtype=torch.float32)
    want = run(linear_policy_loss, inputs, denominator=7)
    sides = [tensor.clone().requires_grad_() for tensor in inputs[:2]]

    def loss(hidden, weight):
        return linear_policy_loss(hidden, weight, *inputs[2:], denominator=7)[0]

    if reentrant is None:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
            value = loss(*sides)
    else:
        value = torch.utils.checkpoint.checkpoint(loss, *sides, use_reentrant=reentrant)
    (2.0 * value).backward()
    for side, gradient in zip(sides, want[1:3], strict=True):
        torch.testing.assert_close(side.grad, 2.0 * gradient)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_head_may_be_the_embedding(recompute):
    """Tied weights: the embedding and a second micro-batch add to the gradient that is given away."""
    inputs, _ = problem(20)
    ids, gradients = torch.arange(20) % 11, []
    for function, more in ((linear_policy_loss, {"recompute": recompute}), (reference.linear_policy_loss, {})):
        tied = inputs[1].clone().requires_grad_()
        for part in (slice(0, 8), slice(8, 20)):
            rows = (x[part] for x in inputs[2:])
            options = {"loss": PolicyLoss(kind="reinforce"), "denominator": 7.0} | more
            (2.0 * function(tied[ids[part]].tanh(), tied, *rows, **options)[0]).backward()
        gradients.append(tied.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_backward_pass_may_run_in_another_thread(recompute):
    inputs, _ = problem(20)
    want = run(linear_policy_loss, inputs, denominator=7, recompute=recompute)
    sides = [tensor.clone().requires_grad_() for tensor in inputs[:2]]
    loss, _ = linear_policy_loss(*sides, *inputs[2:], denominator=7, recompute=recompute)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for side, gradient in zip(sides, want[1:3], strict=True):
        assert torch.equal(side.grad, gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_one_side_may_be_frozen(kind, frozen):
    inputs, _ = problem(20)
    options = {"loss": PolicyLoss(kind=kind), "denominator": 4}
    if kind == "gspo":
        options["cu_seqlens"] = torch.tensor([0, 9, 20])
    want = run(linear_policy_loss, inputs, **options)
    sides = dict(zip(("hidden", "weight"), (tensor.clone() for tensor in inputs[:2]), strict=True))
    for name, tensor in sides.items():
        tensor.requires_grad_(frozen not in (name, "both"))
    loss, metrics = linear_policy_loss(*sides.values(), *inputs[2:], **options)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(want[3])
    torch.testing.assert_close(loss.detach(), want[0])
    if frozen == "both":
        assert not loss.requires_grad
        return
    loss.backward()
    for (name, tensor), gradient in zip(sides.items(), want[1:3], strict=True):
        if name == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, gradient)
