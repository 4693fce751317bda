"""What linear_policy_loss takes and returns; errors name the wrong setting or argument."""

from __future__ import annotations

import pytest
import torch
from policy_loss_problems import assert_close, problem, run
from searchr1_kernels import PolicyLoss, linear_policy_loss

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("denominator", [torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_denominator_may_be_a_tensor(denominator, recompute):
    inputs, _ = problem(20, dtype=torch.float32)
    ours = run(linear_policy_loss, inputs, denominator=denominator, recompute=recompute)
    assert ours[0].dtype == torch.float32
    assert_close(ours, run(linear_policy_loss, inputs, denominator=7), 1e-6)


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
        ({"clip_low": "0.2"}, "clip_low: expected a number, got str"),
        ({"importance_cap": None}, "importance_cap: expected a number, got NoneType"),
        ({"kl_coefficient": torch.tensor(0.1)}, "kl_coefficient: expected a number, got Tensor"),
        ({"clip_high": 0.0}, "clip_high: expected a finite number above 0, got 0.0"),
        ({"clip_high": float("inf")}, "clip_high: expected"),
        ({"clip_high": float("nan")}, "clip_high: expected"),
        ({"dual_clip": 1.0}, "dual_clip: expected 0 or a number above 1, got 1.0"),
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
        ({"hidden": torch.nn.Linear(4, 6)}, "hidden: expected a tensor, got Linear"),
        ({"rollout_logprobs": None}, "rollout_logprobs: expected a tensor, got NoneType"),
        ({"advantages": [0.0] * 6}, "advantages: expected a tensor, got list"),
        ({"loss": "ppo"}, "loss: expected a PolicyLoss, got str"),
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
