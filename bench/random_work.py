"""Trajectories of random tokens in the mix of Search-R1's traces, and how many operations training on them takes.

    model   6 P T + 12 A x layers x pairs: what the workload asks for if nothing is shared and the head sees every
            token. P: weights of all matrices, including the head but not the embedding; T: tokens of all trajectories;
            A: query heads x head size; pairs: of a token and one before it or itself.
    done    what this project computes of it: shared beginnings once, the last layer after its attention and the head
            only on scored rows; and what checkpointing recomputes.

Both count only matrix products, two operations per multiplication and addition, with backward twice forward. With an
adapter on all layers a frozen weight has no gradient, so backward is once forward for it, 4 P T instead of 6; the thin
products come on top, and for them backward is twice forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from searchr1_fast.models import DecoderConfig
from searchr1_fast.types import FinishReason, PackedBatch, Question, Trajectory

PROMPT_SHARE, POLICY_SHARE = 0.24, 0.35  # of a trajectory's tokens; the rest are passages
FIRST_TURN = 0.6  # of the policy's tokens
QUESTION = Question("q", "", ("",), "random")


def make_trajectories(
    num_tokens: int, mean_length: int, group_size: int, vocab_size: int, seed: int = 0
) -> list[Trajectory]:
    """Make whole groups, until there are enough tokens."""
    generator = np.random.default_rng(seed)
    trajectories: list[Trajectory] = []
    total = 0
    while total < num_tokens:
        prompt = generator.integers(0, vocab_size, max(1, round(PROMPT_SHARE * mean_length)))
        for _ in range(group_size):
            scale = generator.uniform(0.5, 1.5) * mean_length
            policy = POLICY_SHARE * scale
            sizes = [FIRST_TURN * policy, (1 - PROMPT_SHARE - POLICY_SHARE) * scale, (1 - FIRST_TURN) * policy]
            sizes = [len(prompt), *(max(1, round(size)) for size in sizes)]
            mask = np.repeat([False, True, False, True], sizes)
            logprobs = np.where(mask, generator.normal(-np.log(vocab_size), 0.1, len(mask)), 0.0)
            tokens = np.concatenate([prompt, generator.integers(0, vocab_size, len(mask) - len(prompt))])
            trajectories.append(
                Trajectory(
                    question=QUESTION,
                    group=len(trajectories) // group_size,
                    token_ids=tokens,
                    loss_mask=mask,
                    rollout_logprobs=logprobs.astype(np.float32),
                    prompt_length=len(prompt),
                    turns=[],
                    finish_reason=FinishReason.ANSWER,
                )
            )
            total += len(mask)
    return trajectories


@dataclass(frozen=True, slots=True)
class Work:
    """What an update is asked to do, and what of it is laid out."""

    tokens: int  # of all trajectories
    pairs: int  # of tokens and those that they attend to, nothing shared
    policy_tokens: int
    rows: int  # of all micro-batches
    row_pairs: int
    scored: int  # rows that the head sees

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], batches: Sequence[PackedBatch]) -> Work:
        """Count the work, on the host."""
        lengths = [len(trajectory.token_ids) for trajectory in trajectories]
        return cls(
            tokens=sum(lengths),
            pairs=sum(length * (length + 1) // 2 for length in lengths),
            policy_tokens=sum(batch.num_policy_tokens for batch in batches),
            rows=sum(batch.num_tokens for batch in batches),
            row_pairs=sum(int(batch.positions.sum()) + batch.num_tokens for batch in batches),
            scored=sum(len(batch.scored_rows) for batch in batches),
        )


def count_flops(decoder: DecoderConfig, work: Work, checkpointing: str, lora_rank: int = 0) -> dict[str, float]:
    """Return `model` and `done`, as defined at the top of the file."""
    hidden, layers = decoder.hidden_size, decoder.num_hidden_layers
    queries, keys = (n * decoder.head_dim for n in (decoder.num_attention_heads, decoder.num_key_value_heads))
    before = hidden * (queries + 2 * keys)
    down = hidden * decoder.intermediate_size
    after = hidden * queries + 3 * down
    head = decoder.vocab_size * hidden
    inputs = 3 * lora_rank * hidden  # A of q, k and v
    thin_before = inputs + lora_rank * (queries + 2 * keys)
    thin_after = lora_rank * (queries + hidden + 3 * (hidden + decoder.intermediate_size))
    passes = 2.0 if lora_rank else 3.0  # through weights that are not the adapter's
    model = 2.0 * passes * (layers * (before + after) + head) * work.tokens + 12.0 * queries * layers * work.pairs
    model += 6.0 * layers * (thin_before + thin_after) * work.tokens

    def blocks(ahead: int, behind: int) -> float:
        """Operations of all layers in a forward pass, with `ahead` weights before attention and `behind` after it."""
        last = ahead * work.rows + behind * work.scored
        return 2.0 * ((layers - 1) * (ahead + behind) * work.rows + last)

    attention, thin = 4.0 * queries * layers * work.row_pairs, blocks(thin_before, thin_after)
    done = passes * (blocks(before, after) + 2.0 * head * work.scored) + 3.0 * (attention + thin)
    if lora_rank:  # the embedding is frozen, so the gradient of the first layer's input is not needed
        done -= 2.0 * (before + inputs) * work.rows
    if checkpointing != "none":  # a block's last product is not recomputed
        done += blocks(before, after - down) + thin + (attention if checkpointing == "full" else 0.0)
    return {"model": model, "done": done}
