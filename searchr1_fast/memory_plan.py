"""How much GPU memory a run takes, computed from its configuration and the shape of its model; nothing is loaded.

What each part of policy.py, critic.py and the engine holds, and when:

    always    master weights and Adam's two moments, fp32, a part on each of N ranks; the whole replica that generates,
              in the compute type (none if one rank computes in fp32: the trained module then generates); the
              reference's part, in the compute type; the part of the index, and its encoder. With `model.offload`, the
              replica is there only in rollouts; moments and reference are on the host, and pass the GPU when
              activations are not there. With an adapter (`model.lora`), all of this is the adapter's; beside it is one
              frozen base, whole, in the compute type, which is also the reference (together with a copy of the adapter
              that training began with, if it began with one)
    rollout   the KV cache and the working memory of recorded decode steps, the activations of a prefill, logits,
              partial sums of attention over the cache; vLLM's copy of the weights, if it generates (its other memory is
              taken to be that of the native engine, with three times the logits)
    update    gradients, fp32, a part on each rank, of one learner at a time (the critic's are freed before the
              policy's are made), or whole with `train.reduce_after=update`; what FSDP gathers: embedding, head and last
              norm whole, and two blocks, or all blocks unless `train.reshard_after=forward` (or the whole adapter,
              whose gradient is whole too until the pass ends); what the blocks keep for the backward pass; what one
              block needs during its own or, if that is more, logits of a chunk and the head's gradient
    host      what `model.offload` and a parked index keep in page-locked host memory; the copy that a checkpoint is
              written from, unless `checkpoint.background` is off, on the rank that also copies the exported weights

Rollout and update never overlap, so the peak is the larger of the two. But cache and recorded steps are always there if
`rollout.keep_cache` keeps them, as `auto` does if the sum fits with `KEEPING_SHARE` to spare. Activations are those of
the 16-bit attention kernels and of CUDA's fused norm. The allocator's fragments, the CUDA context and NCCL's buffers
come on top: `RESERVE`.

Shape legend
    T  rows of a micro-batch    P  parameters    D  hidden size    I  MLP size    V  vocabulary    N  ranks
    H, G  query, key/value heads    d  head size
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from searchr1_fast.activation_counts import block_kept, block_working, norm_kept
from searchr1_fast.cache_plan import plan_cache
from searchr1_fast.config import Config
from searchr1_fast.head_counts import head_bytes
from searchr1_fast.memory_advice import advice
from searchr1_fast.models import DecoderConfig
from searchr1_fast.models.attention_backends import repeats_key_heads
from searchr1_fast.parameter_counts import (
    count,
    critic_parameters,
    is_ppo,
    is_wrapped,
    itemsize,
    meta_decoder,
    policy_parameters,
    sharded,
)
from searchr1_fast.retrieval.encoder_folder import read_json
from searchr1_fast.retrieval.index_format import read_manifest
from searchr1_fast.retrieval.memory_plan import MemoryPlan as IndexPlan
from searchr1_fast.retrieval.memory_plan import encoder_bytes, size_text
from searchr1_fast.rollout.sampling import SamplingParams
from searchr1_fast.rollout.scheduler import MAX_PREFILL_TOKENS

RESERVE = 1 << 30  # CUDA context, NCCL, what the allocator cannot use: an estimate
_FP32 = 4
ATTENTION_PLACES, ATTENTION_TOKENS = 512, 1024  # searchr1_kernels on CUDA: places per part, lone tokens at a time
# How far off the arithmetic may be when `auto` keeps the cache. Being wrong ends a run; recording again costs seconds.
KEEPING_SHARE = 0.1
VLLM_WEIGHTS = "vLLM's copy of the weights"
REPLICA = "policy: replica that generates"
KEPT = ("KV cache", "recorded decode steps", VLLM_WEIGHTS)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the plan."""

    name: str
    num_bytes: int
    when: str  # "always", "rollout", "update", or "host": not on the GPU
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Bytes on one rank."""

    rows: tuple[Row, ...]
    device_bytes: int | None  # None: not known
    advice: tuple[str, ...]  # what would make it smaller, the cheapest first
    keeps_cache: bool = False  # whether cache and recorded steps are always there

    def total(self, when: str) -> int:
        """Bytes of the rows of one kind."""
        return sum(row.num_bytes for row in self.rows if row.when == when)

    def resident(self, *names: str) -> int:
        """Bytes of the rows with these names that are always there."""
        return sum(row.num_bytes for row in self.rows if row.when == "always" and row.name in names)

    @property
    def room(self) -> int:
        """Bytes of the device that may be planned with; its memory must be known."""
        return self.device_bytes - RESERVE

    @property
    def rollout(self) -> int:
        """Bytes while trajectories are sampled."""
        return self.total("always") + self.total("rollout")

    @property
    def update(self) -> int:
        """Bytes while a micro-batch's backward pass begins."""
        return self.total("always") + self.total("update")

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.rollout, self.update)

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits, with the reserve; None if the device's memory is not known."""
        return None if self.device_bytes is None else self.peak + RESERVE <= self.device_bytes

    def describe_cache(self) -> str:
        """What happens to cache and recorded steps after a rollout, in one line."""
        rows = [row for row in self.rows if row.name in KEPT]
        kept = sum(row.num_bytes for row in rows)
        both = f"{' and '.join(row.name for row in rows)} ({size_text(kept)})"
        if self.keeps_cache:
            return f"{both} are kept during updates: {size_text(self.update)} planned{self._of_device()}"
        return f"{both} are given to the updates: with them {size_text(self.update + kept)} planned{self._of_device()}"

    def _of_device(self) -> str:
        return "" if self.device_bytes is None else f", of {size_text(self.device_bytes)}"

    def __str__(self) -> str:
        lines = []
        for when in ("always", "rollout", "update", *(["host"] if self.total("host") else [])):
            lines.append(f"{when:<38}{size_text(self.total(when)):>10}")
            lines += [
                f"  {row.name:<36}{size_text(row.num_bytes):>10}  {row.detail}".rstrip()
                for row in self.rows
                if row.when == when
            ]
        lines.append(f"{'peak, rollout':<38}{size_text(self.rollout):>10}")
        lines.append(f"{'peak, update':<38}{size_text(self.update):>10}")
        lines.append(self.describe_cache())
        if self.device_bytes is None:
            lines.append("no GPU here: say how much memory it will have with --device-memory 80GB")
            return "\n".join(lines)
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines.append(
            f"{verdict}: {size_text(self.peak)} and {size_text(RESERVE)} in reserve, of {size_text(self.device_bytes)}"
        )
        if not self.fits:
            lines += ["what to change:", *(f"  {one}" for one in self.advice)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Batch:
    """The sizes of a micro-batch; by default the worst that the configuration allows."""

    num_rows: int  # T
    num_keys: int  # rows that are attended to: more than T where sequences share beginnings
    num_scored: int  # rows that the head sees


def plan_training(
    config: Config,
    decoder: DecoderConfig,
    *,
    num_ranks: int = 1,
    ranks_per_machine: int | None = None,
    index_shape: tuple[int, int] | None = None,
    encoder: Mapping[str, Any] | None = None,
    device_bytes: int | None = None,
    batch: Batch | None = None,
    repeats_keys: bool = False,
) -> TrainingPlan:
    """Plan what a rank takes.

    `index_shape`: rows and components, if the run has an index on a GPU. `encoder`: the config.json of the model that
    it was built with, if there is one. `ranks_per_machine` (None: all, up to 8): how many ranks share a machine's
    index. `batch` None: as many rows as the configuration allows, all of them scored, nothing shared. `repeats_keys`:
    the attention kernel needs as many key heads as query heads.
    """
    longest = max(config.train.tokens_per_microbatch, config.rollout.max_sequence_tokens)
    rows = [
        *_resident(config, decoder, num_ranks),
        *_index(config, index_shape, min(num_ranks, ranks_per_machine or 8), encoder),
        *_rollout(config, decoder, num_ranks),
        *_update(config, decoder, num_ranks, batch or Batch(longest, longest, longest), repeats_keys),
    ]
    plan = _settle_cache(config, TrainingPlan(tuple(row for row in rows if row.num_bytes), device_bytes, ()))
    return replace(plan, advice=tuple(advice(config, decoder, plan, num_ranks)))


def plan_rank(
    config: Config,
    decoder: DecoderConfig,
    num_ranks: int,
    ranks_per_machine: int | None,
    device_bytes: int | None,
) -> TrainingPlan:
    """Apply `plan_training` to a configuration: read its index's manifest and look up the attention kernel."""
    return plan_training(
        config,
        decoder,
        num_ranks=num_ranks,
        ranks_per_machine=ranks_per_machine,
        index_shape=_index_shape(config),
        encoder=_encoder(config),
        device_bytes=device_bytes,
        repeats_keys=repeats_key_heads(getattr(torch, config.model.dtype)),
    )


def _index_shape(config: Config) -> tuple[int, int] | None:
    """Rows and components of the index. One that is hashed in memory is small, and not counted."""
    if config.retrieval.backend != "dense" or config.retrieval.index is None:
        return None
    manifest = read_manifest(Path(config.retrieval.index))
    return manifest.num_rows, manifest.dimension


def _encoder(config: Config) -> dict[str, Any] | None:
    """The config.json of the index's encoder; None if it has no model. A missing file is left for the run to report."""
    if config.retrieval.backend != "dense" or config.retrieval.index is None:
        return None
    record = read_manifest(Path(config.retrieval.index)).encoder
    if record.get("kind") != "bert":
        return None
    return read_json(Path(config.retrieval.encoder or record["path"]) / "config.json")


def _settle_cache(config: Config, plan: TrainingPlan) -> TrainingPlan:
    """Count cache and recorded steps under `always` if `rollout.keep_cache` keeps them."""
    if config.rollout.keep_cache is False:
        return plan
    rows = tuple(replace(row, when="always") if row.name in KEPT else row for row in plan.rows)
    kept = replace(plan, rows=rows, keeps_cache=True)
    if config.rollout.keep_cache is True:
        return kept
    room = 0 if plan.device_bytes is None else plan.device_bytes * (1 - KEEPING_SHARE) - RESERVE
    return kept if kept.peak <= room else plan


# ---------------------------------------------------------------------------------------------------------------- rows


def _resident(config: Config, decoder: DecoderConfig, num_ranks: int) -> Iterator[Row]:
    """What lives as long as the run."""
    policy, size, has_adapter = policy_parameters(config, decoder), itemsize(config), config.model.lora.rank > 0
    part = f"1/{num_ranks} of " if num_ranks > 1 else ""
    text = f"{part}{count(policy) / 1e9:.3f}e9"
    local = sharded(policy, num_ranks)
    if has_adapter:
        base = size * count(meta_decoder(decoder).parameters())
        yield Row("frozen base", base, "always", f"whole, {config.model.dtype}; also the reference's and the critic's")
    yield Row("policy: master weights", _FP32 * local, "always", f"{text} x fp32")
    offload = config.model.offload
    moments = "host" if offload.optimizer else "always"
    yield Row("policy: Adam's moments", 2 * _FP32 * local, moments, f"{text} x 2 x fp32")
    if is_wrapped(config, num_ranks):
        when = "rollout" if offload.replica else "always"
        name = "policy: adapter that generates" if has_adapter else REPLICA
        yield Row(name, size * count(policy), when, f"whole, {config.model.dtype}")
    if config.algorithm.kl_coefficient > 0 and not has_adapter:
        when = "host" if offload.reference else "always"
        yield Row("reference", size * local, when, f"{text} x {config.model.dtype}")
    elif config.algorithm.kl_coefficient > 0 and config.model.lora.path is not None:
        yield Row("reference's adapter", size * count(policy), "always", f"whole, {config.model.dtype}")
    critic = 0
    if is_ppo(config):
        critic = sharded(critic_parameters(config, decoder), num_ranks)
        yield Row("critic: master weights", _FP32 * critic, "always", "fp32")
        yield Row("critic: Adam's moments", 2 * _FP32 * critic, moments, "2 x fp32")
    if config.checkpoint.background:
        exported = count(policy) + (count(meta_decoder(decoder).parameters()) if has_adapter else 0)
        copied = 3 * _FP32 * (local + critic) + size * exported
        yield Row("checkpoint's copy", copied, "host", "weights, moments, exported weights; from the first save on")


def _index(
    config: Config, shape: tuple[int, int] | None, num_parts: int, encoder: Mapping[str, Any] | None
) -> Iterator[Row]:
    retrieval = config.retrieval
    if shape is None or retrieval.backend != "dense" or retrieval.device == "cpu":
        return
    num_parts = num_parts if retrieval.sharded else 1
    index = IndexPlan(-(-shape[0] // num_parts), shape[1], retrieval.scan)
    when, kept = "rollout" if retrieval.park_during_update else "always", index.rows + index.codes + index.bounds
    yield Row("index", index.total, when, str(index))
    if encoder is not None:
        weights, work = encoder_bytes(encoder)
        kept += weights
        yield Row("index: encoder", weights + work, when, f"fp32, {size_text(work)} of it for recorded passes")
    if retrieval.park_during_update:
        yield Row("index, parked", kept, "host", "while weights are updated")


def _rollout(config: Config, decoder: DecoderConfig, num_ranks: int) -> Iterator[Row]:
    rollout, size = config.rollout, itemsize(config)
    cache = plan_cache(config, decoder, num_ranks)
    slots = cache.num_slots
    if rollout.engine == "vllm":
        weights = size * count(meta_decoder(decoder).parameters())
        yield Row(VLLM_WEIGHTS, weights, "rollout", f"whole, {config.model.dtype}")
    length, heads = rollout.max_sequence_tokens, decoder.num_attention_heads
    yield Row("KV cache", cache.num_bytes, "rollout", str(cache))
    copies, sampling = 1, SamplingParams(rollout.temperature, rollout.top_p, rollout.top_k)
    if rollout.engine == "vllm":
        copies = 3  # logits, probabilities, what is kept of them
    elif not (sampling.is_greedy or sampling.keeps_all):
        copies = 2  # logits, weights that may be kept
    logits = copies * slots * decoder.vocab_size * _FP32
    if rollout.cuda_graphs:
        recorded = logits + slots * block_working(decoder, size)
        yield Row("recorded decode steps", recorded, "rollout", f"logits and activations of {slots} tokens")
    prefill = MAX_PREFILL_TOKENS * block_working(decoder, size)
    yield Row("a prefill's activations", prefill, "rollout", f"{MAX_PREFILL_TOKENS} tokens")
    tokens, parts = min(slots, ATTENTION_TOKENS), -(-length // ATTENTION_PLACES)
    sums = tokens * heads * parts * (decoder.head_dim + 2) * _FP32
    yield Row("attention's partial sums", sums, "rollout", f"{tokens} x {heads} heads x {parts} parts, fp32")
    yield Row("logits and sampling", logits, "rollout", f"{copies} x {slots} x {decoder.vocab_size} x fp32")


def _update(config: Config, decoder: DecoderConfig, num_ranks: int, batch: Batch, repeats: bool) -> Iterator[Row]:
    policy, size, mode = policy_parameters(config, decoder), itemsize(config), config.train.activation_checkpointing
    learners, lora = [policy, *([critic_parameters(config, decoder)] if is_ppo(config) else [])], config.model.lora
    parts = num_ranks if config.train.reduce_after == "microbatch" else 1
    trained = max(sharded(learner, parts) for learner in learners)
    yield Row(
        "gradients", _FP32 * trained, "update", f"fp32{', whole' * (parts < num_ranks)}, of one learner at a time"
    )
    if is_wrapped(config, num_ranks) and lora.rank:
        adapter = size * max(count(learner) for learner in learners)
        yield Row("gathered adapter and its gradient", 2 * adapter, "update", f"whole, {config.model.dtype}")
    elif is_wrapped(config, num_ranks):
        block = count(meta_decoder(decoder).layers[0].parameters())
        root = count(policy) - block * decoder.num_hidden_layers
        if config.train.reshard_after == "forward":
            yield Row("gathered weights", size * (root + 2 * block), "update", "embedding, head, two blocks")
        else:
            yield Row("gathered weights", size * count(policy), "update", f"whole, {config.model.dtype}")
    kept = block_kept(decoder, size, mode, batch.num_keys / batch.num_rows, repeats, lora)
    layers = decoder.num_hidden_layers
    whole = (layers - 1) * kept[0] * batch.num_rows
    last = kept[1] * batch.num_rows + (kept[0] - kept[1]) * batch.num_scored
    last += norm_kept(decoder.hidden_size, size) * batch.num_scored
    detail = f"{batch.num_rows} rows x {layers} layers x {kept[0] / 1e3:.1f} kB, checkpointing: {mode}"
    yield Row("activations", int(whole + last), "update", detail)
    again = 0
    if mode != "none":
        again = block_kept(decoder, size, "none", batch.num_keys / batch.num_rows, repeats, lora)[0]
    working = block_working(decoder, size) + again
    parts = head_bytes(decoder, size, batch.num_scored, is_learned=not lora.rank)
    head = sum(row for _, row in parts)
    in_block = int(working * batch.num_rows)
    # While the blocks run backward, the head's gradient, in the compute type, waits for the embedding's; the chunk of
    # logits and the fp32 gradient are gone. So the larger of the two counts. A frozen head has no gradient.
    head_gradient = 0 if lora.rank else size * decoder.vocab_size * decoder.hidden_size
    if head >= in_block + head_gradient:
        yield Row("head and loss", head, "update", ", ".join(f"{name} {size_text(part)}" for name, part in parts))
    else:
        yield Row("a block's backward pass", in_block, "update", f"{batch.num_rows} rows x {working / 1e3:.1f} kB")
        yield Row("head's gradient", head_gradient, "update", config.model.dtype)


def memory_size(text: str) -> int:
    """Bytes of "80GB", "79.6GiB", … . ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"--device-memory {text!r} is not a size; write it as 80GB or 79.6GiB")
    return int(float(match[1]) * _UNITS[match[2]])
