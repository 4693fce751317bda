"""The plain twin of a training step: the same mathematics, done the way Search-R1 does it.

    rollout     lock-step: all sequences take a turn, whole contexts are prefilled again each turn, nothing is shared;
                a turn runs on to the end-of-sequence token or its limit and is cut at its tag afterwards
    old         one more pass without gradients over every trajectory, for log-probabilities that the sampler had
    update      micro-batches with equal numbers of rows, padded to the longest; the head, a log-softmax over the
                vocabulary and the entropy at every position, including prompt, observations and padding; then a mask.
                Every group is trained on, also one whose rewards are all the same, which teaches nothing
    loss        the mean over a micro-batch's policy tokens, averaged over micro-batches

It is no straw man. Decoder, attention, optimizer, search, number of threads and token budget are the fast path's own;
within a turn it batches continuously; it knows the longest row and takes as many rows as then fit; an entropy that is
only reported is kept out of the backward pass. It leaves out those parts of the original's work that an honest rival
would fix first: a further log-probability pass after each turn whose result nobody reads, activation checkpointing,
turning text into tokens again, sending weights to a second engine each turn, offloading. In one point it does more: the
original's recipes drop the padding before the decoder (`use_remove_padding`). So there are kinder variants, see
`VARIANTS`.

Shape legend
    B  rows of a micro-batch    T  its positions, padding included    D  hidden size    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from searchr1_kernels import masked_kl
from torch import nn

from searchr1_fast.config import AlgorithmConfig, Config
from searchr1_fast.distributed import Ranks, copy_parameters, reshard, shard
from searchr1_fast.metrics import PhaseTimers
from searchr1_fast.models import Decoder, load_model, resolve
from searchr1_fast.packing import policy_mask
from searchr1_fast.policy import Learner, empty_replica
from searchr1_fast.rollout import PlainEngine, SearchLoop
from searchr1_fast.run import Run
from searchr1_fast.schedule import policy_learning_rate
from searchr1_fast.types import Trajectory


@dataclass(frozen=True, slots=True)
class Variant:
    """Which of the original's habits the twin keeps."""

    label: str
    stop_at_tags: bool
    padding: bool


VARIANTS = {
    "original": Variant("plain", stop_at_tags=False, padding=True),
    "stop": Variant("plain, stops at tags", stop_at_tags=True, padding=True),
    "unpadded": Variant("plain, unpadded", stop_at_tags=False, padding=False),
    "kindest": Variant("plain, both", stop_at_tags=True, padding=False),
}


@dataclass(frozen=True, slots=True)
class PlainBatch:
    """Rows end to end, padded to one length unless padding is off. Position t predicts `targets[t]`."""

    token_ids: torch.Tensor  # [T] int64
    cu_seqlens: torch.Tensor  # [B+1] int32
    targets: torch.Tensor  # [T] int64; at a row's last position it is not read
    mask: torch.Tensor  # [T] bool: predicts a policy token
    advantages: torch.Tensor  # [T] fp32, 0 off the mask
    num_policy_tokens: int
    num_padding: int

    @property
    def num_positions(self) -> int:
        """T."""
        return self.token_ids.shape[0]


class PlainScorer(nn.Module):
    """A decoder that scores every token, as one module, so that FSDP's hooks see the head's use."""

    def __init__(self, decoder: Decoder, temperature: float) -> None:
        super().__init__()
        self.decoder, self.temperature = decoder, temperature

    def forward(
        self, batch: PlainBatch, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:  # logprobs [T] fp32, entropy [T] fp32
        """Return the log-probability of the next token and the entropy at every position."""
        hidden = self.decoder.hidden(batch.token_ids, batch.cu_seqlens)  # [T, D]
        logits = (hidden @ self.decoder.head_weight.T).float()  # [T, V]
        if self.temperature != 1.0:
            logits = logits / self.temperature
        logprobs = logits.log_softmax(dim=-1)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        return -F.nll_loss(logprobs, batch.targets, reduction="none"), entropy


class PlainPolicy(Learner):
    """`policy.Policy` with the plain scorer in place of the fast one."""

    def __init__(self, decoder: Decoder, config: Config, ranks: Ranks, reference: Decoder | None = None) -> None:
        dtype = getattr(torch, config.model.dtype)
        scorer = PlainScorer(decoder, config.rollout.temperature)
        self.replica = decoder
        if dtype != torch.float32:
            self.replica = empty_replica(decoder, dtype, ranks.device)
        shard(scorer, decoder.layers, ranks, dtype)
        super().__init__("plain", scorer, policy_learning_rate(config), config, ranks)
        self.algorithm = config.algorithm
        self.reference = None
        if reference is not None:
            self.reference = PlainScorer(reference.requires_grad_(False), config.rollout.temperature)
            shard(self.reference, reference.layers, ranks, dtype)
        self.sync_replica()

    @torch.no_grad()
    def logprobs(self, batches: Sequence[PlainBatch], model: PlainScorer) -> list[torch.Tensor]:  # [T] fp32 each
        """Score every batch under the policy or the reference. The entropy is computed too, as in the original."""
        logprobs = [model(batch)[0] for batch in batches]
        reshard(model)
        return logprobs

    def accumulate(
        self,
        batches: Sequence[PlainBatch],
        old: Sequence[torch.Tensor],  # [T] fp32 each
        references: Sequence[torch.Tensor] | None,  # [T] fp32 each
        denominator: int | None = None,
    ) -> torch.Tensor:  # 0-d
        """Add the gradients of one minibatch; return its loss. `denominator` None: the original's mean of means."""
        total = torch.zeros((), device=batches[0].token_ids.device)
        for index, batch in enumerate(batches):
            logprobs, entropy = self.module(batch, entropy_gradient=self.algorithm.entropy_coefficient > 0)
            reference = references[index] if references is not None else None
            tokens = denominator or batch.num_policy_tokens * len(batches)
            loss = plain_loss(logprobs, entropy, old[index], reference, batch, self.algorithm) / tokens
            self.backward(loss)
            total += loss.detach()
        return total

    def sync_replica(self) -> None:
        """Give the generating replica the trained weights, if it is another module."""
        if self.replica is not self.module.decoder:
            copy_parameters(self.module.decoder, self.replica)


def plain_loss(
    logprobs: torch.Tensor,  # [T] fp32, differentiable
    entropy: torch.Tensor,  # [T] fp32
    old: torch.Tensor,  # [T] fp32
    reference: torch.Tensor | None,  # [T] fp32
    batch: PlainBatch,
    algorithm: AlgorithmConfig,
) -> torch.Tensor:  # 0-d: a sum over policy tokens
    """Compute clipped surrogate, KL and entropy at every position, then apply the mask."""
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
    terms = torch.maximum(-batch.advantages * ratio, -batch.advantages * clipped)
    if reference is not None:
        terms = terms + algorithm.kl_coefficient * masked_kl(logprobs, reference, algorithm.kl_kind)
    if algorithm.entropy_coefficient > 0:
        terms = terms - algorithm.entropy_coefficient * entropy
    return (terms * batch.mask).sum()


def pad(
    trajectories: Sequence[Trajectory],
    advantages: np.ndarray,  # [N] fp32
    indices: Sequence[int],
    config: Config,
    device: torch.device,
    *,
    padding: bool = True,
    to_longest: bool = False,
) -> list[PlainBatch]:
    """Make micro-batches of equally many rows, in order: as many rows as fit the token budget if all were the longest.

    `to_longest`: rows are padded to the longest of all, not only to the longest of their micro-batch.
    """
    longest = max(len(trajectories[i].token_ids) for i in indices)
    rows = max(1, config.train.tokens_per_microbatch // longest)
    chosen = [(trajectories[i], float(advantages[i])) for i in indices]
    parts = [chosen[start : start + rows] for start in range(0, len(chosen), rows)]
    return [_pad_one(part, config, padding, device, longest if to_longest else 0) for part in parts]


def _pad_one(
    rows: list[tuple[Trajectory, float]], config: Config, padding: bool, device: torch.device, at_least: int
) -> PlainBatch:
    longest = max(at_least, *(len(trajectory.token_ids) for trajectory, _ in rows))
    lengths = [longest if padding else len(trajectory.token_ids) for trajectory, _ in rows]
    starts = np.concatenate([[0], np.cumsum(lengths)])  # [B+1]
    token_ids, targets = (np.zeros(starts[-1], dtype=np.int64) for _ in range(2))  # any id can pad: causal, masked
    mask, advantages = np.zeros(starts[-1], dtype=bool), np.zeros(starts[-1], dtype=np.float32)
    for (trajectory, advantage), start in zip(rows, starts[:-1], strict=True):
        end = start + len(trajectory.token_ids)
        token_ids[start:end] = trajectory.token_ids
        targets[start : end - 1] = trajectory.token_ids[1:]
        mask[start : end - 1] = policy_mask(trajectory, config.algorithm.mask_observations)[1:]
        advantages[start:end] = advantage
    tensors = (torch.from_numpy(array).to(device) for array in (token_ids, starts.astype(np.int32), targets, mask))
    return PlainBatch(
        *tensors,
        advantages=torch.from_numpy(advantages * mask).to(device),
        num_policy_tokens=int(mask.sum()),
        num_padding=int(starts[-1]) - sum(len(trajectory.token_ids) for trajectory, _ in rows),
    )


def plain_policy(run: Run) -> PlainPolicy:
    """Make the twin of a run's policy, with the same start and weights of its own."""
    config, device, directory = run.config, run.ranks.device, resolve(run.config.model.path)
    reference = None
    if config.algorithm.kl_coefficient > 0:
        reference = load_model(directory, getattr(torch, config.model.dtype), device)
    return PlainPolicy(load_model(directory, torch.float32, device), config, run.ranks, reference)


def plain_run(run: Run, policy: PlainPolicy, variant: Variant, engine_type: type[PlainEngine] = PlainEngine) -> Run:
    """Return the run with the twin's policy and engine: what `train.sample` needs to sample the same trajectories."""
    config = run.config
    engine = engine_type(policy.replica, run.tokenizer, config.rollout, stop_at_tags=variant.stop_at_tags)
    return replace(
        run,
        config=config.model_copy(
            update={"algorithm": config.algorithm.model_copy(update={"drop_zero_variance_groups": False})}
        ),
        timers=PhaseTimers(torch.cuda.synchronize if run.ranks.device.type == "cuda" else None),
        policy=policy,
        engine=engine,
        loop=SearchLoop(engine, run.loop.search, config=config.rollout.model_copy(update={"overlap": False})),
    )
