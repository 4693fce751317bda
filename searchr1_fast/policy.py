"""The policy: a decoder with its optimizer, and the frozen reference it may be held to.

`TokenScorer` is the forward pass of training: hidden states of packed sequences, the rows that predict policy tokens,
and the fused head on those rows alone; in an update, the head includes the whole loss. `Learner` is what policy and
critic share: gradient accumulation over micro-batches and ranks, clipping, the learning rate's schedule, and a guard
that never lets a non-finite gradient into the weights.

An update reads from the device once per optimizer step, for the gradient norm; metrics stay on the device until the
run's step ends. Every rank must have as many micro-batches as the others, because FSDP gathers parameters in step:
`padding_batch` fills the gaps.

Shape legend
    T  rows of a micro-batch    S  its sequences    P  its policy tokens    R  of them those that are scored: a token
    in a beginning that sequences share is scored once    D  hidden size    V  vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from searchr1_kernels import linear_logprob
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from searchr1_fast.checkpoint import optimizer_tensors
from searchr1_fast.config import Config, LoraConfig, OffloadConfig
from searchr1_fast.distributed import Ranks, before_backward, copy_parameters, full, reshard, shard
from searchr1_fast.host_adamw import HostAdamW
from searchr1_fast.losses import accumulate_metrics, policy_loss
from searchr1_fast.models import Decoder, load_weights
from searchr1_fast.models.adapter_files import fill_adapter, load_adapter
from searchr1_fast.models.lora import add_adapter, base_parameters, reset_adapter, without_adapter
from searchr1_fast.offload import DeviceMemory, FrozenWeights, leaves
from searchr1_fast.schedule import LearningRate, policy_learning_rate
from searchr1_fast.types import PackedBatch

MAX_SKIPPED_IN_A_ROW = 3


class TokenScorer(nn.Module):
    """A decoder and its head on the rows that predict policy tokens. One module, so that FSDP's hooks see both."""

    def __init__(self, decoder: Decoder, temperature: float) -> None:
        super().__init__()
        self.decoder, self.temperature = decoder, temperature

    def forward(self, batch: PackedBatch, head: Callable[..., Any], **arguments: Any) -> Any:
        """Apply `head` (`linear_logprob` or `linear_policy_loss`) to rows, weight and targets, at the sampler's
        temperature. Even without rows (`padding_batch`): FSDP expects a gradient, if only zero, for every parameter."""
        hidden = self.decoder.scored_hidden(batch)  # [R, D]
        weight = self.decoder.head_weight  # [V, D]
        return head(hidden, weight, batch.scored_targets, temperature=self.temperature, **arguments)


class TrainingDiverged(ValueError):
    """Gradients stayed non-finite. A ValueError because the cure is a setting, which the message names."""


class Learner:
    """A sharded module with its AdamW."""

    def __init__(self, name: str, module: nn.Module, learning_rate: LearningRate, config: Config, ranks: Ranks) -> None:
        self.name, self.module, self.ranks, self.config = name, module, ranks, config
        self.learning_rate = learning_rate
        self.parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self.optimizer = make_optimizer(self.parameters.values(), learning_rate.peak, config, ranks.device)
        self.last_learning_rate = 0.0
        self.num_updates = 0
        self.num_skipped = 0
        self.skipped_in_a_row = 0
        self.diagnosis = ""  # of the last skipped update
        self._loss: torch.Tensor | None = None  # 0-d, of the micro-batches since the last update, on the device

    def backward(self, loss: torch.Tensor, is_last: bool = True) -> None:
        """Accumulate gradients of a loss whose denominator is this rank's `share`.

        `is_last`: in the optimizer step. After the others, `train.reshard_after` and `reduce_after` say what stays.
        """
        train = self.config.train
        before_backward(
            self.module,
            reshard_after=is_last or train.reshard_after != "update",
            reduce_after=is_last or train.reduce_after != "update",
        )
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        loss.backward()

    def share(self, denominator: int) -> float:
        """The divisor that turns this rank's sums into a mean over all ranks' tokens: FSDP averages over ranks, where a
        sum is needed. Used inside the loss, not after it: a head that gets a gradient of 1 need not scale its own."""
        return denominator / self.ranks.world_size

    def step(self) -> float:
        """Clip and apply the accumulated gradients; return their norm.

        If the norm or the loss is not finite, apply nothing and return NaN or an infinity. The caller may then keep the
        micro-batches (bad_updates.py), and calls `raise_if_diverged`.
        """
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norm = full(get_total_norm(gradients))
        loss = self.ranks.all_reduce(self._loss.to(norm.dtype, copy=True))
        self._loss = None
        # The only wait for the device; the same number on every rank. A loss may be infinite when its gradient is not.
        norm_value = (norm + 0.0 * loss).item()
        if math.isfinite(norm_value):
            clip_grads_with_norm_(self.parameters.values(), self.config.optimizer.max_grad_norm, norm)
            self.last_learning_rate = self.next_learning_rate
            for group in self.optimizer.param_groups:
                group["lr"] = self.last_learning_rate
            self.optimizer.step()
            self.num_updates += 1
            self.skipped_in_a_row = 0
        else:
            self.num_skipped += 1
            self.skipped_in_a_row += 1
            self.diagnosis = self._diagnosis()
        self.optimizer.zero_grad(set_to_none=True)
        return norm_value

    def raise_if_diverged(self, remedy: str = "") -> None:
        """Raise TrainingDiverged after so many skipped updates in a row that the next will be skipped too.

        `remedy`: what the caller adds to the message.
        """
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(
                f"the {self.name}'s update was not finite {self.skipped_in_a_row} times in a row, after "
                f"{self.num_updates} updates at learning rate {self.next_learning_rate:.3g}: {self.diagnosis}. Go on "
                f"from the last checkpoint with a lower optimizer.learning_rate or algorithm.importance_cap{remedy}"
            )

    @property
    def next_learning_rate(self) -> float:
        """The learning rate of the next update."""
        return self.learning_rate(self.num_updates)

    def tensors(self, saved_keys: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """Weights and optimizer state by name, for the checkpoint; with `saved_keys`, room for what was saved."""
        prefix = f"{self.name}.optimizer."
        entries = None if saved_keys is None else {k.removeprefix(prefix) for k in saved_keys if k.startswith(prefix)}
        weights = {f"{self.name}.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        new_state = None
        if isinstance(self.optimizer, HostAdamW):
            self.optimizer.wait()
            new_state = self.optimizer.new_state
        moments = optimizer_tensors(self.optimizer, self.parameters, entries, new_state)
        return weights | {f"{prefix}{key}": tensor for key, tensor in moments.items()}

    def state_dict(self) -> dict[str, float]:
        """The counters."""
        names = ("last_learning_rate", "num_updates", "num_skipped", "skipped_in_a_row")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the counters."""
        for key in self.state_dict():
            setattr(self, key, state[key])

    def _diagnosis(self) -> str:
        """Name what is not finite; called before the gradients are dropped. A collective."""
        bad_weights = [n for n, p in self.parameters.items() if not full(p.detach()).isfinite().all()]
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        bad_gradients = [n for n, gradient in gradients.items() if not full(gradient).isfinite().all()]
        where = "the loss, or the norm of all gradients together"
        if bad_gradients:
            count = f"{len(bad_gradients)} of {len(gradients)}"
            where = f"the gradient of {count} parameters, the first {bad_gradients[0]!r}"
        weights = f"the weights are not finite either ({bad_weights[0]!r})" if bad_weights else "the weights are finite"
        return f"{where}; {weights}"


class Policy(Learner):
    """The decoder that is trained, the replica that generates, and the reference."""

    def __init__(
        self,
        decoder: Decoder,
        config: Config,
        ranks: Ranks,
        reference: Decoder | None = None,
        weights: Path | None = None,
    ) -> None:
        """`decoder`: fp32 master weights, or what an adapter is put on. `reference`: the same start, frozen; required
        if there is a KL, except with an adapter. The reference then shares the base, alone or with the adapter that
        training began with.

        `weights`: the directory that both were made from, if they are `meta_model`s; each rank reads its own rows.
        """
        dtype, temperature = getattr(torch, config.model.dtype), config.rollout.temperature
        prepare_blocks(decoder, config)
        scorer = TokenScorer(decoder, temperature)
        prepare_learner(scorer, decoder, config, ranks, weights)
        super().__init__("policy", scorer, policy_learning_rate(config), config, ranks)
        self.replica = decoder  # generates; the trained module itself if that is whole and in the compute type
        if ranks.world_size > 1 or dtype != torch.float32:
            self.replica = empty_replica(decoder, dtype, ranks.device, config.model.lora)
            prepare_blocks(self.replica, config)
        offload = config.model.offload if leaves(ranks.device) else OffloadConfig()
        self._replica_memory = None
        if offload.replica and self.replica is not decoder:
            self._replica_memory = DeviceMemory(self.replica, beside=scorer)
        self.reference: TokenScorer | None = None
        self.reference_at_hand: AbstractContextManager[None] = nullcontext()  # inside it, the weights are on the device
        if config.algorithm.kl_coefficient > 0 and config.model.lora.rank:
            self.reference = TokenScorer(beginning(self.replica, config), temperature)
        elif config.algorithm.kl_coefficient > 0:
            assert reference is not None, "a KL needs a reference"
            prepare_blocks(reference, config)
            self.reference = TokenScorer(reference.requires_grad_(False), temperature)
            shard(self.reference, reference.layers, ranks, dtype, config.train.reshard_after == "forward")
            fill(self.reference, reference, weights, ranks.device)
            if offload.reference:
                self.reference_at_hand = FrozenWeights(self.reference, beside=scorer)
        self.sync_replica()

    def loss(
        self,
        batch: PackedBatch,
        denominator: float,
        ref_logprobs: torch.Tensor | None = None,  # [P] fp32
        on_policy: bool = True,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`policy_loss` of this policy."""
        return policy_loss(self.module, self.config.algorithm, batch, denominator, ref_logprobs, on_policy)

    @torch.no_grad()
    def reference_logprobs(self, batches: list[PackedBatch]) -> list[torch.Tensor]:  # [P] fp32 each
        """Log-probabilities of every batch under the reference."""
        assert self.reference is not None
        is_base = self.reference.decoder is self.replica
        with self.reference_at_hand, without_adapter(self.reference) if is_base else nullcontext():
            logprobs = [batch.spread(self.reference(batch, linear_logprob)) for batch in batches]
            reshard(self.reference)
        return logprobs

    def update(
        self,
        batches: list[PackedBatch],
        denominator: int,
        ref_logprobs: list[torch.Tensor] | None = None,
        on_policy: bool = True,
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Make one optimizer step over micro-batches; `denominator`: policy tokens of the step, all ranks together.

        Returns the loss's metrics over this rank's tokens, on the device, and the gradient's norm.
        """
        totals: dict[str, torch.Tensor] = {}
        for index, batch in enumerate(batches):
            references = ref_logprobs[index] if ref_logprobs is not None else None
            loss, metrics = self.loss(batch, self.share(denominator), references, on_policy)
            self.backward(loss, is_last=index == len(batches) - 1)
            accumulate_metrics(totals, metrics)
        return totals, self.step()

    def release_replica(self) -> None:
        """Give the generating replica's memory to the update, if `model.offload.replica` is on."""
        if self._replica_memory is not None:
            self._replica_memory.release()

    def sync_replica(self) -> None:
        """Give the generating replica the trained weights; nothing to do if they are the same module."""
        if self._replica_memory is not None:
            self._replica_memory.restore()
        if self.replica is not self.module.decoder:
            copy_parameters(self.module.decoder, self.replica)


def make_optimizer(
    parameters: Iterable[nn.Parameter], learning_rate: float, config: Config, device: torch.device
) -> torch.optim.AdamW:
    """Make a fused AdamW, with its moments in host memory if `model.offload.optimizer` is on."""
    betas, weight_decay = config.optimizer.betas, config.optimizer.weight_decay
    if config.model.offload.optimizer and leaves(device):
        return HostAdamW(parameters, learning_rate, betas, weight_decay)
    return torch.optim.AdamW(parameters, learning_rate, betas, weight_decay=weight_decay, fused=True)


def prepare_blocks(decoder: Decoder, config: Config) -> None:
    """Set what blocks keep for the backward pass, and compile them if configured. Call it before they are sharded."""
    decoder.checkpoint_blocks(config.train.activation_checkpointing)
    if config.model.compile_blocks:
        decoder.compile_blocks()


def prepare_learner(module: nn.Module, decoder: Decoder, config: Config, ranks: Ranks, weights: Path | None) -> None:
    """Shard a module and fill the decoder in it; with an adapter, freeze the decoder in the compute type, and shard
    only what is learned.

    The frozen base stays whole on every rank. Generation needs it whole in any case, so a shard beside it would take
    more memory, not less; and a pass gathers the adapter, in one piece, instead of every block's weights.
    """
    dtype, lora = getattr(torch, config.model.dtype), config.model.lora
    if not lora.rank:
        shard(module, decoder.layers, ranks, dtype, config.train.reshard_after == "forward")
        fill(module, decoder, weights, ranks.device)
        return
    add_adapter(decoder.to(dtype), lora.rank, lora.alpha, lora.targets)
    shard(module, (), ranks, dtype, whole=base_parameters(decoder).values())
    fill(module, decoder, weights, ranks.device)
    if lora.path is None:
        reset_adapter(decoder, config.run.seed)
    else:
        fill_adapter(decoder, lora.path)


def beginning(decoder: Decoder, config: Config) -> Decoder:
    """What training with an adapter began with, frozen: the decoder itself, to be used with its adapter off, or another
    decoder on its base that keeps the adapter of `model.lora.path`."""
    if config.model.lora.path is None:
        return decoder
    start = decoder.on_same_base()
    load_adapter(start, config.model.lora.path)
    prepare_blocks(start.requires_grad_(False), config)
    return start


def fill(module: nn.Module, decoder: Decoder, weights: Path | None, device: torch.device) -> None:
    """Allocate this rank's part of a module that was sharded on the meta device, and load the weights of its decoder.

    `weights` None: the module has both. Everything else in the module is left uninitialised.
    """
    if weights is not None:
        module.to_empty(device=device)
        load_weights(decoder, weights)


def empty_replica(
    decoder: Decoder, dtype: torch.dtype, device: torch.device, lora: LoraConfig | None = None
) -> Decoder:
    """A frozen decoder of the same shape with uninitialised weights: initialising billions of them takes minutes. With
    an adapter, the base is shared and only the adapter has memory of its own."""
    if lora is not None and lora.rank:
        replica = decoder.on_same_base()
        add_adapter(replica, lora.rank, lora.alpha, lora.targets, dtype)
        replica.requires_grad_(False)
    else:
        with torch.device("meta"):
            replica = Decoder(decoder.config)
        replica = replica.to(dtype).to_empty(device=device).requires_grad_(False)
    replica.join_projections()
    return replica


def padding_batch() -> PackedBatch:
    """A micro-batch of one token that predicts nothing: keeps a rank in step with the others, and adds zero."""
    nothing = torch.zeros(0)
    return PackedBatch(
        token_ids=torch.zeros(1, dtype=torch.int64),
        positions=torch.zeros(1, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        max_seqlen=1,
        policy_index=nothing.long(),
        targets=nothing.long(),
        policy_cu_seqlens=torch.zeros(2, dtype=torch.int32),
        rollout_logprobs=nothing,
        advantages=nothing,
        trajectory_index=[-1],
    )


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Move the batch's tensors to the device; copies from the host do not wait."""
    if device.type == "cpu":
        return batch
    prefixes = None if batch.prefixes is None else _tensors_to_device(batch.prefixes, device)
    return replace(_tensors_to_device(batch, device), prefixes=prefixes)


def _tensors_to_device(values: Any, device: torch.device) -> Any:
    """Move a dataclass's own tensors to the device."""
    named = {field.name: getattr(values, field.name) for field in fields(values)}
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    moved = {name: value.pin_memory().to(device, non_blocking=True) for name, value in tensors.items()}
    return replace(values, **moved)
