"""Comparisons of trajectories, shared by the tests of rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from searchr1_fast.types import Trajectory


def check_same(trajectories: Sequence[Trajectory], others: Sequence[Trajectory], tolerance: float = 1e-4) -> None:
    """Require the same tokens and all that was parsed from them, and log-probabilities up to rounding."""
    assert len(trajectories) == len(others) > 0
    for one, other in zip(trajectories, others, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
        np.testing.assert_allclose(one.rollout_logprobs, other.rollout_logprobs, atol=tolerance)
        assert (one.turns, one.segments, one.finish_reason) == (other.turns, other.segments, other.finish_reason)
        assert (one.question, one.group, one.prompt_length) == (other.question, other.group, other.prompt_length)
