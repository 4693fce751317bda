"""Shared by the tests of `linear_policy_loss`: random problems, and the results of running a function on one.

Shape legend
    N  tokens    D  hidden    V  vocabulary
"""

from __future__ import annotations

import pytest
import torch
from searchr1_kernels import reference

KINDS = ("ppo", "cispo", "reinforce", "gspo")


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
