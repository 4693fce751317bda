"""linear_policy_loss against its fp64 oracle and the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_loss_problems import KINDS, assert_close, problem, run, shared
from searchr1_kernels import PolicyLoss, linear_policy_loss, reference

pytestmark = pytest.mark.usefixtures("small_chunks")


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
    options = {"loss": loss, "denominator": 2.7, "temperature": head[0], "softcap": head[1]}  # not an fp32 number
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


@pytest.mark.parametrize(
    ("kind", "kl_kind", "recompute"),
    [
        ("ppo", "k1", False),
        ("ppo", "k2", True),
        ("ppo", "k3", False),
        ("reinforce", "k3", False),
        ("gspo", "k2", False),
    ],
)
def test_gradcheck(kind, kl_kind, recompute):
    """Finite differences, for objectives whose gradient is that of their value.

    That excludes cispo, and gspo unless a sequence has one advantage. Some rows predict two tokens, except for gspo.
    """
    inputs, extras = problem(12, seed=3)
    clip = {} if kind == "reinforce" else {"dual_clip": 1.6}
    loss = PolicyLoss(kind=kind, kl_kind=kl_kind, kl_coefficient=0.5, entropy_coefficient=0.2, **clip)
    options = {"loss": loss, "denominator": 2.0, "softcap": 4.0, "recompute": recompute}
    if kind == "gspo":
        options["cu_seqlens"] = torch.tensor([0, 5, 12])
        options["token_weights"] = torch.tensor([0.2] * 5 + [1 / 7] * 7, dtype=torch.float64)
        inputs = (*inputs[:4], torch.tensor([0.7] * 5 + [-0.4] * 7, dtype=torch.float64))
    else:
        inputs, extras, options["token_rows"] = shared(inputs, extras, torch.Generator().manual_seed(0))

    def objective(hidden, weight):
        return linear_policy_loss(hidden, weight, *inputs[2:], ref_logprobs=extras["ref_logprobs"], **options)[0]

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
    assert ours[3] == pytest.approx(oracle[3], rel=1e-4)  # metrics are of fp32, whatever the inputs are
    plain = run(reference.linear_policy_loss, inputs, **(options | {"ref_logprobs": extras["ref_logprobs"]}))
    assert float((ours[0] - oracle[0]).abs()) <= 3 * float((plain[0] - oracle[0]).abs()) + 1e-6
    for have, other, want in zip(ours[1:3], plain[1:3], oracle[1:3], strict=True):
        error, allowed = (float((tensor.double() - want).norm() / want.norm()) for tensor in (have, other))
        assert error <= 2 * torch.finfo(dtype).eps if dtype != torch.float32 else error <= 1e-5
        assert error <= 2 * allowed + 1e-7


def test_gspo_is_the_papers_formula():
    """arXiv 2507.18071, eq. 5 and 7: one advantage per sequence, mean over sequences; differentiated by autograd."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind, magnitude, dtype):
    """One logit far above or below the others, as the target and not; and all of them equally far."""
    hidden, targets = torch.ones(6, 1, dtype=dtype), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = PolicyLoss(kind=kind, clip_high=0.3, kl_coefficient=0.1, entropy_coefficient=0.1)
    for weight in (torch.tensor([[magnitude], [0.0], [1.0]], dtype=dtype), torch.full((3, 1), magnitude, dtype=dtype)):
        true = reference.linear_logprob(hidden.double(), weight.double(), targets).to(dtype)
        advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=dtype)
        inputs, options = (hidden, weight, targets, true + 0.25, advantages), {"loss": loss, "denominator": 6.0}
        options["ref_logprobs"] = true - 0.5
        if kind == "gspo":
            options["cu_seqlens"] = torch.tensor([0, 2, 6])
        ours = run(linear_policy_loss, inputs, **options)
        exact = (hidden.double(), weight.double(), targets, *(x.double() for x in inputs[3:]))
        oracle = run(reference.linear_policy_loss, exact, **(options | {"ref_logprobs": (true - 0.5).double()}))
        assert all(tensor.isfinite().all() for tensor in ours[:3])
        assert_close(ours, oracle, 2e-3 if dtype == torch.float32 else 1e-11)  # fp32 resolves 1e4 to 1e-3


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


@pytest.mark.parametrize("kind", [*KINDS, "shared"])
@pytest.mark.parametrize("recompute", [False, True])
def test_repeats_bit_for_bit(kind, recompute):
    inputs, extras = problem(50, size=16, vocabulary=99, dtype=torch.float32)
    options = {"denominator": 50, "recompute": recompute}
    if kind == "shared":
        inputs, _, options["token_rows"] = shared(inputs, extras, torch.Generator().manual_seed(0))
    else:
        options["loss"] = PolicyLoss(kind=kind, importance_cap=2.0, entropy_coefficient=0.1)
    if kind == "gspo":
        options["cu_seqlens"] = torch.tensor([0, 9, 9, 50])
    runs = [run(linear_policy_loss, inputs, **options) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0][:3], again[:3], strict=True))
        assert runs[0][3] == again[3]
