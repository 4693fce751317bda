"""How large a run's KV cache is, as `memory_plan` counts it, and how many tokens of it would fit."""

from __future__ import annotations

from dataclasses import dataclass

from searchr1_fast.config import Config
from searchr1_fast.models import DecoderConfig
from searchr1_fast.models.kv_cache import block_size
from searchr1_fast.parameter_counts import itemsize
from searchr1_fast.rollout.engine import cache_blocks

_INT32 = 4


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The KV cache on one rank. `num_blocks` leaves out the blocks for rows of a recorded step without a sequence."""

    num_slots: int
    num_blocks: int
    places: int  # tokens of a block
    token_bytes: int
    num_spare: int  # slots, with a block each, for such rows
    slot_blocks: int  # blocks of the longest sequence

    @property
    def num_bytes(self) -> int:
        """Keys and values of all layers, and the table of blocks."""
        table = (self.num_slots + self.num_spare) * self.slot_blocks * _INT32
        return (self.num_blocks + self.num_spare) * self.places * self.token_bytes + table

    def __str__(self) -> str:
        blocks = self.num_blocks + self.num_spare
        return f"{blocks} blocks of {self.places} tokens x {self.token_bytes} bytes, for {self.num_slots} sequences"

    def tokens_within(self, over: int) -> int:
        """The `rollout.cache_tokens` that saves `over` bytes or more; 0 if the longest sequence would not fit."""
        left = self.num_blocks - -(-over // (self.places * self.token_bytes))
        return left * self.places if left >= self.slot_blocks else 0

    def sequences_within(self, over: int) -> int:
        """The `rollout.max_num_seqs` that saves `over` bytes or more of the cache; 0 if none does, because one sequence
        takes more, or if `rollout.cache_tokens` says how large the cache is."""
        if self.num_blocks < self.num_slots * self.slot_blocks:
            return 0
        return max(0, self.num_slots - -(-over // (self.slot_blocks * self.places * self.token_bytes)))


def plan_cache(config: Config, decoder: DecoderConfig, num_ranks: int) -> CachePlan:
    """Plan the cache of a rank. `run.device=auto` is planned for a GPU, as everything is, even on a machine without."""
    rollout = config.rollout
    slots, places = _num_slots(config, num_ranks), block_size("cpu" if config.run.device == "cpu" else "cuda")
    keys = decoder.num_key_value_heads * decoder.head_dim
    return CachePlan(
        num_slots=slots,
        num_blocks=cache_blocks(rollout, slots, places),
        places=places,
        token_bytes=2 * decoder.num_hidden_layers * keys * itemsize(config),
        num_spare=int(rollout.cuda_graphs),
        slot_blocks=-(-rollout.max_sequence_tokens // places),
    )


def _num_slots(config: Config, num_ranks: int) -> int:
    """As many as there are sequences; evaluations are assumed to fill all slots, and vLLM makes room for all."""
    rollout = config.rollout
    if config.eval.sets or rollout.engine == "vllm":
        return rollout.max_num_seqs
    questions = -(-config.train.questions_per_step // num_ranks)
    return min(rollout.max_num_seqs, questions * config.algorithm.group_size)
