"""linear_policy_loss against its fp64 oracle and the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import PolicyLoss, _linear_chunks, linear_policy_loss, reference

KINDS = ("ppo", "cispo", "reinforce", "gspo")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks at test sizes."""
    monkeypatch.setattr(_linear_chunks, "_MIN_CHUNK_ROWS", 7)
    monkeypatch.setitem(_linear_chunks._CHUNK_BYTES, "cpu", 1)


def problem(rows, seed=0, size=4, vocabulary=11, dtype=torch.float64, spread=0.5):
    """hidden, weight, targets, rollout_logprobs, advantages; and ref_logprobs, old_logprobs, token_weights.

    All log-probabilities are `spread` around the true ones, so that ratios lie on both sides of every bound.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, size, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    true = reference.linear_logprob(hidden.double(), weight.double(), targets)
    noise = torch.randn(5, rows, generator=generator, dtype=torch.float64)
    known = torch.float64 if dtype == torch.float64 else torch.float32
    rollout, ref, old = ((true + spread * n).to(known) for n in noise[:3])
    extras = {"ref_logprobs": ref, "old_logprobs": old, "token_weights": noise[3].abs().to(known)}
    return (hidden, weight, targets, rollout, noise[4].to(known)), extras


def shared(inputs, extras, generator):
    """The same with half as many tokens again, each predicted by any of the rows; and their rows [N] int32."""
    hidden, weight, targets, *of_tokens = inputs
    token_rows = torch.randint(max(len(targets), 1), (3 * len(targets) // 2,), generator=generator)
    noise = 0.1 * torch.randn(len(token_rows), generator=generator, dtype=torch.float64)
    of_tokens = [values[token_rows] + noise for values in of_tokens]
    extras = {name: values[token_rows] for name, values in extras.items()}
    return (hidden, weight, targets, *of_tokens), extras, token_rows.int()


def run(function, inputs, **options):
    """loss, d hidden, d weight, metrics as numbers."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    loss, metrics = function(hidden, weight, *inputs[2:], **options)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, {name: float(value) for name, value in metrics.items()}


def assert_close(ours, oracle, tolerance):
    for name, have, want in zip(("loss", "d hidden", "d weight"), ours[:3], oracle[:3], strict=True):
        scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        error = float((have.double() - want).abs().max()) if want.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: {error} of {scale}"
    assert ours[3] == pytest.approx(oracle[3], rel=tolerance, abs=tolerance)


objectives = st.builds(
    PolicyLoss,
    kind=st.sampled_from(KINDS),
    clip_low=st.sampled_from([0.2, 0.5]),
    clip_high=st.sampled_from([0.2, 0.28]),
    importance_cap=st.sampled_from([0.0, 1.0, 2.0]),
    kl_kind=st.sampled_from(["k1", "k2", "k3"]),
    kl_coefficient=st.sampled_from([0.0, 0.3]),
    entropy_coefficient=st.sampled_from([0.0, 0.1]),
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 30),
    loss=objectives,
    dual_clip=st.sampled_from([0.0, 1.5]),
    anchor=st.sampled_from(["sampler", "on_policy", "old"]),
    weighted=st.booleans(),
    chosen=st.sampled_from(["all", "masked", "shared"]),
    dead=st.sampled_from([0.0, 0.5]),
    head=st.sampled_from([(1.0, None), (0.7, None), (1.3, 5.0)]),
    recompute=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_matches_the_oracle_in_fp64(rows, loss, dual_clip, anchor, weighted, chosen, dead, head, recompute, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, extras = problem(rows, seed)
    options = {"loss": loss, "denominator": 3.0, "temperature": head[0], "softcap": head[1]}
    if chosen == "shared":
        inputs, extras, options["token_rows"] = shared(inputs, extras, generator)
        rows = len(options["token_rows"])
    inputs[3][torch.rand(rows, generator=generator) < 0.1] = float("nan")
    inputs[4][torch.rand(rows, generator=generator) < dead] = 0.0
    if dual_clip and loss.kind in ("ppo", "gspo"):
        options["loss"] = PolicyLoss(**(vars(loss) | {"dual_clip": dual_clip}))
    options["on_policy"] = anchor == "on_policy"
    if anchor == "old":
        options["old_logprobs"] = extras["old_logprobs"]
    if loss.kl_coefficient or seed % 2:
        options["ref_logprobs"] = extras["ref_logprobs"]
    if weighted:
        options["token_weights"] = extras["token_weights"]
    if chosen == "masked":
        options["mask"] = torch.rand(rows, generator=generator) < 0.6
    if loss.kind == "gspo":
        cuts = torch.randint(rows + 1, (2,), generator=generator).sort().values
        options["cu_seqlens"] = torch.cat([torch.tensor([0]), cuts, torch.tensor([rows])]).int()
    ours = run(linear_policy_loss, inputs, recompute=recompute, **options)
    assert_close(ours, run(reference.linear_policy_loss, inputs, **options), 1e-11)


@pytest.mark.parametrize("kl_kind", ["k1", "k2", "k3"])
def test_gradcheck(kl_kind):
    """Of an objective without stopped gradients, by finite differences."""
    inputs, extras = problem(12, seed=3)
    loss = PolicyLoss(kl_kind=kl_kind, kl_coefficient=0.5, entropy_coefficient=0.2, dual_clip=1.6)

    def objective(hidden, weight):
        options = {"ref_logprobs": extras["ref_logprobs"], "loss": loss, "denominator": 2.0, "softcap": 4.0}
        return linear_policy_loss(hidden, weight, *inputs[2:], **options)[0]

    assert torch.autograd.gradcheck(objective, (inputs[0].requires_grad_(), inputs[1].requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision_is_near_fp64(kind, dtype):
    inputs, extras = problem(60, size=32, vocabulary=203, dtype=dtype, spread=0.1)
    loss = PolicyLoss(kind=kind, kl_coefficient=0.1, entropy_coefficient=0.01)
    options = {"ref_logprobs": extras["ref_logprobs"], "loss": loss, "denominator": 60.0}
    if kind == "gspo":
        options["cu_seqlens"] = torch.tensor([0, 20, 21, 60])
    ours = run(linear_policy_loss, inputs, **options)
    exact = tuple(tensor.double() for tensor in inputs[:2]) + (inputs[2], inputs[3].double(), inputs[4].double())
    options["ref_logprobs"] = extras["ref_logprobs"].double()
    oracle = run(reference.linear_policy_loss, exact, **options)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == ours[2].dtype == dtype
    assert float((ours[0].double() - oracle[0]).abs()) <= 2e-5
    for have, want in zip(ours[1:3], oracle[1:3], strict=True):
        error = float((have.double() - want).norm() / want.norm())
        assert error <= 2 * torch.finfo(dtype).eps if dtype != torch.float32 else error <= 1e-5


def test_fp16_gradients_below_its_range_survive_until_they_are_scaled():
    """As a loss scaler does: the loss is multiplied, and so must be the gradients that were formed before."""
    inputs, _ = problem(20, dtype=torch.float16)
    small = (*inputs[:4], inputs[4] * 2.0**-30)
    hidden, weight = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    loss, _ = linear_policy_loss(hidden, weight, *small[2:], denominator=1)
    (loss * 2.0**30).backward()
    _, hidden_gradient, weight_gradient, _ = run(linear_policy_loss, inputs, denominator=1)
    torch.testing.assert_close(hidden.grad, hidden_gradient, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(weight.grad, weight_gradient, rtol=1e-3, atol=1e-6)


def test_gspo_is_the_papers_formula():
    """arXiv 2507.18071, eq. 5 and 7: per sequence, one advantage, mean over sequences; differentiated by autograd."""
    inputs, _ = problem(30, spread=0.1)
    cu_seqlens = torch.tensor([0, 4, 15, 30])
    lengths = cu_seqlens.diff()
    advantages = torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64)
    shift = torch.tensor([-0.3, -0.3, 0.0], dtype=torch.float64)  # ratios of the first two are about 1.35
    inputs = (*inputs[:3], inputs[3] + shift.repeat_interleave(lengths), advantages.repeat_interleave(lengths))
    loss = PolicyLoss(kind="gspo", clip_low=0.05, clip_high=0.1)
    weights = (1.0 / lengths.double()).repeat_interleave(lengths)
    options = {"loss": loss, "denominator": 3, "cu_seqlens": cu_seqlens, "token_weights": weights}
    ours = run(linear_policy_loss, inputs, **options)

    def paper(hidden, weight, targets, rollout, _):
        log_ratio = reference.linear_logprob(hidden, weight, targets) - rollout
        s = torch.stack([part.mean().exp() for part in log_ratio.split(lengths.tolist())])
        return -torch.minimum(s * advantages, s.clamp(0.95, 1.1) * advantages).mean(), {}

    want = run(paper, inputs)
    assert ours[3]["clip_fraction"] == 4  # the first sequence, which should become likelier
    assert_close((*ours[:3], {}), want, 1e-12)


def test_weights_and_denominator_make_the_usual_means():
    """GRPO's mean of means, DAPO's mean over tokens and Dr. GRPO's constant, from the terms of single sequences."""
    inputs, _ = problem(20)
    lengths = torch.tensor([3, 5, 12])
    options = {"loss": PolicyLoss(clip_high=0.28)}
    parts = [
        float(
            linear_policy_loss(inputs[0][rows], inputs[1], *(x[rows] for x in inputs[2:]), denominator=1, **options)[0]
        )
        for rows in torch.arange(20).split(lengths.tolist())
    ]
    grpo = (1.0 / lengths).repeat_interleave(lengths).double()
    for weights, denominator, want in (
        (grpo, 3, sum(part / length for part, length in zip(parts, lengths.tolist(), strict=True)) / 3),
        (None, 20, sum(parts) / 20),
        (None, 3 * 12, sum(parts) / 36),
    ):
        have = linear_policy_loss(*inputs, token_weights=weights, denominator=denominator, **options)[0]
        assert float(have) == pytest.approx(want, rel=1e-6)


def test_parts_add_up_to_the_whole():
    inputs, extras = problem(40, dtype=torch.float32)
    loss = PolicyLoss(kl_coefficient=0.1, entropy_coefficient=0.1, importance_cap=1.5)
    whole = run(linear_policy_loss, inputs, loss=loss, denominator=40, ref_logprobs=extras["ref_logprobs"])
    parts = []
    for rows in (slice(0, 11), slice(11, 40)):
        part = (inputs[0][rows], inputs[1], *(x[rows] for x in inputs[2:]))
        parts.append(
            run(linear_policy_loss, part, loss=loss, denominator=40, ref_logprobs=extras["ref_logprobs"][rows])
        )
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(parts[0][2] + parts[1][2], whole[2])
    for name, value in whole[3].items():
        joined = {"max": max, "min": min}.get(name[-3:], lambda a, b: a + b)(parts[0][3][name], parts[1][3][name])
        assert joined == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_gradient_are_not_multiplied(monkeypatch, kind, recompute):
    """Zero advantages and no KL: their rows take no part in the products of the backward pass."""
    multiplied = []
    add = _linear_chunks.Gradients.add

    def record(self, gradient, *rest):
        multiplied.append(len(gradient))
        add(self, gradient, *rest)

    monkeypatch.setattr(_linear_chunks.Gradients, "add", record)
    inputs, _ = problem(40, spread=0.0)
    inputs[4][::2] = 0.0
    inputs[4][20:] = 0.0
    options = {"loss": PolicyLoss(kind=kind), "denominator": 1.0}
    if kind == "gspo":
        options["cu_seqlens"] = torch.tensor([0, 40])
    ours = run(linear_policy_loss, inputs, recompute=recompute, **options)
    assert sum(multiplied) == 10
    assert_close(ours, run(reference.linear_policy_loss, inputs, **options), 1e-12)


@pytest.mark.parametrize("distance", [1e4, -1e4, float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_absurd_ratios_stay_finite(kind, distance):
    inputs, extras = problem(10, dtype=torch.float32)
    inputs = (*inputs[:3], torch.full((10,), distance), inputs[4])
    loss = PolicyLoss(kind=kind, importance_cap=2.0, kl_coefficient=1.0)
    options = {"loss": loss, "denominator": 10, "ref_logprobs": torch.full((10,), max(-1e4, min(1e4, distance)))}
    if kind == "gspo":
        options["cu_seqlens"] = torch.tensor([0, 10])
    loss, *gradients, _ = run(linear_policy_loss, inputs, **options)
    assert math.isfinite(loss)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_no_rows_still_connect_to_the_graph():
    inputs, _ = problem(0, dtype=torch.float32)
    loss, hidden_gradient, weight_gradient, metrics = run(linear_policy_loss, inputs, denominator=5)
    assert loss == 0 and (weight_gradient == 0).all() and weight_gradient.shape == inputs[1].shape
    assert hidden_gradient.shape == inputs[0].shape
    assert metrics.pop("ratio_min") == float("inf")
    assert set(metrics.values()) == {0.0}
    inputs, _ = problem(6, dtype=torch.float32)
    assert run(linear_policy_loss, inputs, denominator=5, mask=torch.zeros(6, dtype=torch.bool))[0] == 0


def test_what_masked_rows_hold_does_not_matter():
    inputs, extras = problem(20)
    mask = torch.arange(20) % 3 != 0
    options = {"loss": PolicyLoss(kl_coefficient=1.0), "denominator": 1.0, "mask": mask}
    clean = run(linear_policy_loss, inputs, **options, ref_logprobs=extras["ref_logprobs"])
    for tensor in (inputs[0], *inputs[3:], extras["ref_logprobs"]):
        tensor[~mask] = float("nan")
    inputs[2][~mask] = -100
    dirty = run(linear_policy_loss, inputs, **options, ref_logprobs=extras["ref_logprobs"])
    assert clean[3] == dirty[3]
    assert all(torch.equal(a, b) for a, b in zip(clean[:3], dirty[:3], strict=True))


def test_repeats_bit_for_bit():
    inputs, _ = problem(50, size=16, vocabulary=99, dtype=torch.float32)
    runs = [run(linear_policy_loss, inputs, denominator=50) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0][:3], again[:3], strict=True))
        assert runs[0][3] == again[3]


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
    """The gradients are scaled where they lie, and given away, by the last backward pass alone; factors in fp32."""
    inputs, _ = problem(20, dtype=dtype)
    _, *want, _ = run(linear_policy_loss, inputs, denominator=7)
    sides = [tensor.clone().requires_grad_() for tensor in inputs[:2]]
    loss, _ = linear_policy_loss(*sides, *inputs[2:], denominator=7)
    for factor, keep in ((3.0, True), (1.0, True), (1.003, True), (0.1, False)):
        grads = torch.autograd.grad(loss * factor, sides, retain_graph=keep)
        for have, plain in zip(grads, want, strict=True):
            error = float((have.double() - factor * plain.double()).norm() / plain.double().norm() / factor)
            assert error <= (0 if factor == 1.0 else 1e-6 if dtype == torch.float32 else 3e-3)
            have.zero_()  # is nobody else's
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, sides)


def test_the_backward_pass_copies_no_gradient(monkeypatch):
    """The parameter has the memory that the forward pass filled; a second micro-batch adds to it."""
    formed, results = [], _linear_chunks.Gradients.results

    def record(self):
        gradients = results(self)
        formed[:] = [gradient.data_ptr() for gradient in gradients]
        return gradients

    monkeypatch.setattr(_linear_chunks.Gradients, "results", record)
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
    """Checkpoints form them a second time; hooks give back what they were given, as tensors moved to a CPU are."""
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


@pytest.mark.parametrize("denominator", [torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_denominator_may_be_a_tensor(denominator, recompute):
    inputs, _ = problem(20, dtype=torch.float32)
    ours = run(linear_policy_loss, inputs, denominator=denominator, recompute=recompute)
    assert ours[0].dtype == torch.float32
    assert_close(ours, run(linear_policy_loss, inputs, denominator=7), 1e-6)


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


def test_metrics_are_constants_of_no_dimension():
    inputs, _ = problem(8)
    _, metrics = linear_policy_loss(inputs[0].requires_grad_(), *inputs[1:], denominator=8)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "trpo"}, "kind: expected 'ppo', 'cispo'"),
        ({"kl_kind": "k4"}, "kl_kind: expected 'k1'"),
        ({"clip_low": 0.0}, "clip_low: expected a number above 0, at most 1, got 0.0"),
        ({"clip_low": 1.5}, "clip_low: expected"),
        ({"clip_high": -0.2}, "clip_high: expected a finite number above 0, got -0.2"),
        ({"clip_high": float("nan")}, "clip_high: expected"),
        ({"dual_clip": 0.5}, "dual_clip: expected 0 or a number above 1, got 0.5"),
        ({"dual_clip": 3.0, "kind": "cispo"}, "dual_clip: expected 0 for cispo"),
        ({"importance_cap": 0.5}, "importance_cap: expected 0 or a number not below 1, got 0.5"),
        ({"kl_coefficient": -1.0}, "kl_coefficient: expected a finite number not below 0, got -1.0"),
        ({"entropy_coefficient": float("inf")}, "entropy_coefficient: expected"),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4)}, "hidden: expected shape"),
        ({"weight": torch.zeros(11, 4, dtype=torch.float64)}, "weight: expected torch.float32"),
        ({"targets": torch.full((6,), 11)}, "targets: expected ids from 0 to 10, got 11"),
        ({"rollout_logprobs": torch.zeros(5)}, r"rollout_logprobs: expected shape \[6\], got \[5\]"),
        ({"advantages": torch.zeros(6, dtype=torch.int64)}, "advantages: expected a floating-point"),
        ({"ref_logprobs": torch.zeros(6, 1)}, "ref_logprobs: expected shape"),
        ({"old_logprobs": torch.zeros(6), "on_policy": True}, "old_logprobs: expected None on policy"),
        (
            {"rollout_logprobs": torch.zeros(6).bfloat16()},
            "rollout_logprobs: expected .*bfloat16, .*cast_forward_inputs",
        ),
        ({"ref_logprobs": torch.zeros(6).half()}, "ref_logprobs: expected torch.float32 or torch.float64, got"),
        ({"old_logprobs": torch.zeros(6).half()}, "old_logprobs: expected torch.float32 or torch.float64, got"),
        ({"token_weights": torch.zeros(7)}, "token_weights: expected shape"),
        ({"token_weights": torch.zeros(6, device="meta")}, "token_weights: expected the device of hidden"),
        ({"denominator": 0}, "denominator: expected a finite number above 0, got 0"),
        ({"denominator": torch.ones(2)}, "denominator: expected a number or a 0-d tensor"),
        ({"denominator": torch.tensor(6.0, device="meta")}, r"denominator: expected the device of hidden \(cpu\)"),
        ({"loss": PolicyLoss(kl_coefficient=0.1)}, "ref_logprobs: expected .* kl_coefficient of 0.1, got None"),
        ({"loss": PolicyLoss(kind="gspo")}, "cu_seqlens: expected .* for gspo and None .*, got None for gspo"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens: expected .*, got a tensor for ppo"),
        ({"loss": PolicyLoss(kind="gspo"), "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: expected offsets"),
        (
            {
                "loss": PolicyLoss(kind="gspo"),
                "cu_seqlens": torch.tensor([0, 9]),
                "mask": torch.ones(6, dtype=torch.bool),
            },
            "cu_seqlens: expected offsets that rise from 0 to 6, got 0 to 9",
        ),
        ({"mask": torch.ones(6)}, "mask: expected torch.bool"),
        ({"token_rows": torch.zeros(6)}, "token_rows: expected torch.int64"),
        ({"token_rows": torch.zeros(4, dtype=torch.int64)}, r"rollout_logprobs: expected shape \[4\], got \[6\]"),
        ({"token_rows": torch.full((6,), 6)}, "token_rows: expected ids from 0 to 5, got 6"),
        ({"token_rows": torch.arange(6), "mask": torch.ones(6, dtype=torch.bool)}, "mask: expected None with token_r"),
        ({"temperature": 0.0}, "temperature: expected"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    inputs, _ = problem(6, dtype=torch.float32)
    names = ("hidden", "weight", "targets", "rollout_logprobs", "advantages")
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**(dict(zip(names, inputs, strict=True)) | {"denominator": 1.0} | change))
