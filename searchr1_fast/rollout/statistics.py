"""Times and counts of a rollout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RolloutStatistics:
    """Where the time of a run went, and how many tokens passed through the model."""

    time_total: float = 0.0
    time_forward: float = 0.0  # model, head and sampling, until the tokens are on the host
    time_recording: float = 0.0  # the part of time_forward that went into recording decode steps
    time_search_wait: float = 0.0  # in which nothing could be decoded
    num_steps: int = 0
    num_replayed_steps: int = 0  # the steps that replayed a recorded decode step
    num_recordings: int = 0
    num_decode_tokens: int = 0  # one per step for each sequence that was running already
    num_prefill_tokens: int = 0  # computed for joining sequences: prompts, observations, and what they had lost
    num_recomputed_tokens: int = 0  # the prefill tokens that had been cached before
    num_shared_tokens: int = 0  # of joining sequences: not computed, but shared with one that begins alike
    num_preemptions: int = 0  # times that a sequence lost its cache to others, to be recomputed
    num_splits: int = 0  # for lack of memory: passes and logits made again in two halves, and recordings given up
    num_discarded_tokens: int = 0  # sampled past the end of a turn: with `stop_at_tags` off, and by running ahead
    num_searches: int = 0
    num_search_batches: int = 0
    num_failed_searches: int = 0  # whose sequences were dropped
