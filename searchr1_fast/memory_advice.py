"""Which settings to change if a run does not fit its GPUs; used by `memory_plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from searchr1_fast.cache_plan import plan_cache
from searchr1_fast.config import Config
from searchr1_fast.models import DecoderConfig
from searchr1_fast.retrieval.memory_plan import size_text

if TYPE_CHECKING:
    from searchr1_fast.memory_plan import TrainingPlan


def advice(config: Config, decoder: DecoderConfig, plan: TrainingPlan, num_ranks: int) -> Iterator[str]:
    """What would make the phase that is too large smaller, with the least loss first."""
    if plan.fits in (True, None):
        return
    room = plan.room
    sizes = {row.name: row.num_bytes for row in plan.rows}
    if config.rollout.keep_cache is True and plan.update > room:
        yield "rollout.keep_cache=auto: the cache goes during updates where there is no room for both"
    if config.model.dtype == "float32":
        yield "model.dtype=bfloat16: activations, cache and reference take half"
    if plan.update > room and num_ranks > 1:
        if config.train.reduce_after == "update":
            yield "train.reduce_after=microbatch: gradients are split among ranks, and added up more often"
        if config.train.reshard_after != "forward":
            yield "train.reshard_after=forward: two blocks are gathered at a time, and each more often"
    yield from _offload(plan)
    if plan.update > room and (index := plan.resident("index", "index: encoder")):
        yield f"retrieval.park_during_update=true: the index gives {size_text(index)} to the update, a copy back a step"
    if plan.update > room:
        tokens, mode = config.train.tokens_per_microbatch, config.train.activation_checkpointing
        if mode == "none":
            yield "train.activation_checkpointing=selective: keeps a fifth or less of the activations"
        if mode != "full":
            yield "train.activation_checkpointing=full: keeps the least, and computes each block twice"
        if tokens > config.rollout.max_sequence_tokens:
            fewer = max(config.rollout.max_sequence_tokens, tokens // 2)
            yield f"train.tokens_per_microbatch={fewer}: fewer rows at a time"
    if plan.rollout > room:
        over, cache = plan.rollout - room, plan_cache(config, decoder, num_ranks)
        if tokens := cache.tokens_within(over):
            yield f"rollout.cache_tokens={tokens}: sequences that find no room wait, or are computed again"
        if sequences := cache.sequences_within(over):
            yield f"rollout.max_num_seqs={sequences}: fewer sequences in the cache"
        yield "rollout.max_sequence_tokens lower: without cache_tokens, each sequence has room for the longest"
    if "index" in sizes:
        yield "retrieval.device=cpu: the index leaves the GPU"
    if plan.total("always") > room // 2 and not config.model.lora.rank:
        yield f"more ranks than {num_ranks}: weights, gradients and moments are split among them"
        yield "model.lora.rank=64: an adapter is learned; the model has neither gradient, moments nor master weights"
    if plan.resident("reference"):
        yield "algorithm.kl_coefficient=0: no reference model"


def _offload(plan: TrainingPlan) -> Iterator[str]:
    """The parts of `model.offload` that are on the GPU, with what each would free."""
    if plan.update > plan.room and (replica := plan.resident("policy: replica that generates")):
        yield f"model.offload.replica=true: the weights that generate give {size_text(replica)} to the update"
    if reference := plan.resident("reference"):
        yield f"model.offload.reference=true: {size_text(reference)} wait in host memory, a copy a step"
    if moments := plan.resident("policy: Adam's moments", "critic: Adam's moments"):
        yield (
            f"model.offload.optimizer=true: {size_text(moments)} lie in host memory, and pass the GPU in every "
            "optimizer step"
        )
