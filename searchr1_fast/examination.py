"""Recompute an update that was not finite, checking everything on the way: what `searchr1 replay` finds.

It goes micro-batch by micro-batch, on one device and without sharding: first what the loss was given, then every module
in the order of computation, the log-probabilities (or values), the loss, and the gradients on their way back.

Shape legend: P policy tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from searchr1_kernels import linear_logprob
from torch import nn
from torch.nn.utils import get_total_norm

from searchr1_fast.bad_updates import BadUpdate, MicroBatch
from searchr1_fast.cli import model_directory
from searchr1_fast.config import Config
from searchr1_fast.critic import ValueModel
from searchr1_fast.losses import policy_loss, value_loss
from searchr1_fast.models import load_tokenizer, load_weights, meta_model, resolve
from searchr1_fast.models.adapter_files import adapter_base, load_adapter
from searchr1_fast.models.lora import add_adapter
from searchr1_fast.policy import TokenScorer, to_device
from searchr1_fast.types import PackedBatch

SHOWN_TOKENS = 60  # of what the policy wrote before the first bad token


@dataclass(slots=True)
class Finding:
    """What was found in a micro-batch."""

    place: int
    rank: int
    num_tokens: int
    num_policy_tokens: int
    loss: float = 0.0
    grad_norm: float = 0.0
    log_ratio: float | None = None  # the largest |log q - log mu| of the finite ones; the critic has none
    found: list[str] = field(default_factory=list)  # what is not finite, in the order of computation
    token: int | None = None  # the first policy token involved


def load_learner(
    update: BadUpdate, config: Config, folder: Path, model: str | None, dtype: str, device: torch.device
) -> nn.Module:
    """The policy's `TokenScorer` or the critic's `ValueModel`, whole, with the weights of `model` or those kept."""
    decoder = meta_model(config.model.path, getattr(torch, dtype))
    is_policy = update.learner == "policy"
    decoder.checkpoint_blocks(config.train.activation_checkpointing)
    lora = config.model.lora
    if lora.rank and model is None:
        add_adapter(decoder, lora.rank, lora.alpha, lora.targets, getattr(torch, dtype))
    module = TokenScorer(decoder, config.rollout.temperature) if is_policy else ValueModel(decoder)
    module.to_empty(device=device)
    if model is not None:
        if not is_policy:
            raise ValueError("--model: this update is the critic's, and a model directory holds a policy; drop it")
        directory = model_directory(model)
        base = adapter_base(directory)
        load_weights(decoder, base or directory)
        if base is not None:
            load_adapter(decoder, directory)
        return module
    path = folder / update.weights_name
    if not path.is_file():
        raise ValueError(
            f"the weights of this update, {path}, are gone: a run keeps those of its last two; give those of a "
            "checkpoint near it with --model"
        )
    if lora.rank:
        load_weights(decoder, config.model.path)
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:  # what is frozen is not kept
                parameter.copy_(file.get_tensor(name))
    return module


def examine(module: nn.Module, update: BadUpdate, config: Config, place: int, device: torch.device) -> Finding:
    """Run forward and backward on one of the update's micro-batches, and return what is not finite."""
    micro_batch = update.micro_batches[place]
    batch = to_device(micro_batch.batch, device)
    finding = Finding(place, micro_batch.rank, batch.num_tokens, batch.num_policy_tokens)
    for name, values in micro_batch.inputs():
        if name == "rollout_logprobs" and not config.algorithm.mask_observations:
            values = values.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf)  # NaN says that nobody sampled it
        _look(finding, f"the {name} that the loss was given", values, batch)
    with Watch(module) as watch:
        with torch.no_grad():
            scores = token_scores(module, update, batch)
        if watch.output:
            finding.found.append(watch.output)
        what = "the log-probabilities" if update.learner == "policy" else "the values"
        _look(finding, what, scores, batch)
        if update.learner == "policy" and batch.num_policy_tokens:
            ratios = (scores - batch.rollout_logprobs).abs()
            finding.log_ratio = ratios[ratios.isfinite()].amax(0).item() if ratios.isfinite().any() else None
        module.zero_grad(set_to_none=True)
        loss = micro_batch_loss(module, update, config, micro_batch, batch, device)
        loss.backward()
    finding.loss = loss.item()
    if not loss.isfinite():
        finding.found.append("the loss")
    if watch.gradient:
        finding.found.append(watch.gradient)
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if bad:
        finding.found.append(f"the gradient of {len(bad)} of {len(gradients)} parameters, the first {bad[0]}")
    finding.grad_norm = get_total_norm(list(gradients.values())).item()
    module.zero_grad(set_to_none=True)
    return finding


def token_scores(module: nn.Module, update: BadUpdate, batch: PackedBatch) -> torch.Tensor:  # [P] fp32
    """Log-probabilities of the policy's tokens, or the critic's values."""
    return batch.spread(module(batch, linear_logprob)) if update.learner == "policy" else module(batch)


def micro_batch_loss(
    module: nn.Module,
    update: BadUpdate,
    config: Config,
    micro_batch: MicroBatch,
    batch: PackedBatch,  # its own, on the device
    device: torch.device,
) -> torch.Tensor:  # 0-d
    """The loss that the trainer minimised."""
    if update.learner == "policy":
        references = None if micro_batch.ref_logprobs is None else micro_batch.ref_logprobs.to(device)
        return policy_loss(module, config.algorithm, batch, update.denominator, references, update.on_policy)[0]
    returns, old_values = micro_batch.returns.to(device), micro_batch.old_values.to(device)
    clip = config.algorithm.value_clip
    return value_loss(module(batch), returns, old_values, clip=clip, denominator=update.denominator)


class Watch:
    """While entered, note the first module whose output is not finite, and the first whose output gets a gradient that
    is not."""

    def __init__(self, module: nn.Module) -> None:
        self.output = self.gradient = ""
        self._module = module
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for name, child in self._module.named_modules():
            if name:
                self._handles.append(child.register_forward_hook(partial(self._forward, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _floating(output):
            if not self.output and not tensor.isfinite().all():
                whole = all(x.isfinite().all() for x in _floating(inputs))
                self.output = f"the output of {name}" + ("" if whole else ", whose input is not finite either")
            if tensor.requires_grad:
                tensor.register_hook(partial(self._backward, name))

    def _backward(self, name: str, gradient: torch.Tensor) -> None:
        if not self.gradient and not gradient.isfinite().all():
            self.gradient = f"the gradient that comes back to the output of {name}"


def written_up_to(micro_batch: MicroBatch, token: int, config: Config) -> str:
    """The policy's text in the token's sequence, up to and including the token."""
    batch = micro_batch.batch
    begin = batch.policy_cu_seqlens.tolist()[_sequence(batch, token)]
    targets = batch.targets[max(begin, token + 1 - SHOWN_TOKENS) : token + 1].tolist()
    return load_tokenizer(resolve(config.model.path)).decode(targets)


def _floating(values: Any) -> Iterator[torch.Tensor]:
    """The tensors of floating type among the inputs or outputs of a module."""
    for value in values if isinstance(values, tuple) else (values,):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value


def _look(finding: Finding, what: str, values: torch.Tensor, batch: PackedBatch) -> None:
    """Note values of policy tokens, [P], that are not finite."""
    bad = (~values.isfinite()).nonzero()[:, 0].tolist()
    if not bad:
        return
    sequence = _sequence(batch, bad[0])
    where = f"sequence {sequence} (trajectory {batch.trajectory_index[sequence]} of the step)"
    finding.found.append(f"{what}, of {len(bad)} of {len(values)} policy tokens, the first number {bad[0]}, in {where}")
    finding.token = bad[0] if finding.token is None else finding.token


def _sequence(batch: PackedBatch, token: int) -> int:
    """The sequence that a policy token belongs to."""
    return sum(end <= token for end in batch.policy_cu_seqlens.tolist()[1:])
