"""Started by test_collectives.py on two ranks: `two_ranks_collectives.py OUTPUT` counts what FSDP sends in an update.

Every module that FSDP shards gets an all-gather and a reduce-scatter that count their calls, by the module's name.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from searchr1_fast.config import Config
from searchr1_fast.critic import Critic
from searchr1_fast.distributed import Ranks, full, process
from searchr1_fast.models import Decoder, DecoderConfig
from searchr1_fast.policy import Learner, Policy, padding_batch
from searchr1_fast.types import PackedBatch

NUM_BATCHES = 3
SHAPE = DecoderConfig(61, 32, 48, 2, 4, 2, initializer_range=0.1)
# torch 2.13 has new names for both, and warns about the old ones.
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Counting:
    """What the two collectives that count their calls have in common, in the form that FSDP asks for."""

    def __init__(self, counts: Counter[str], name: str) -> None:
        self.counts, self.name = counts, name

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Allocate memory for what is sent."""
        return torch.empty(*size, dtype=dtype, device=device)


class CountingAllGather(Counting):
    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group, async_op: bool = False) -> Any:
        self.counts[self.name] += 1
        return ALL_GATHER(output_tensor, input_tensor, group=group, async_op=async_op)


class CountingReduceScatter(Counting):
    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group, op, async_op: bool = False
    ) -> Any:
        self.counts[self.name] += 1
        return REDUCE_SCATTER(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def count(module: torch.nn.Module) -> tuple[Counter[str], Counter[str]]:
    """-> counters of all-gathers and reduce-scatters from here on, by name of the sharded module; the root is ""."""
    gathers: Counter[str] = Counter()
    reduces: Counter[str] = Counter()
    for name, part in module.named_modules():
        if isinstance(part, FSDPModule):
            part.set_custom_all_gather(CountingAllGather(gathers, name))
            part.set_custom_reduce_scatter(CountingReduceScatter(reduces, name))
    return gathers, reduces


def make_batches(ranks: Ranks) -> list[PackedBatch]:
    """Three micro-batches of two sequences; the last of rank 1 is a `padding_batch`."""
    generator = torch.Generator().manual_seed(ranks.rank)
    batches = []
    for _ in range(NUM_BATCHES):
        lengths = torch.tensor([0, 9, 16])
        policy_index = torch.tensor([3, 4, 5, 6, 7, 11, 12, 13, 14])
        token_ids = torch.randint(61, (16,), generator=generator)
        batches.append(
            replace(
                padding_batch(),
                token_ids=token_ids,
                positions=torch.cat([torch.arange(9), torch.arange(7)]),
                cu_seqlens=lengths.int(),
                max_seqlen=9,
                policy_index=policy_index,
                targets=token_ids[policy_index + 1],
                policy_cu_seqlens=torch.tensor([0, 5, 9], dtype=torch.int32),
                rollout_logprobs=torch.full((9,), -4.1),
                advantages=torch.randn(9, generator=generator),
                trajectory_index=[0, 1],
            )
        )
    return batches if ranks.rank == 0 else [*batches[:-1], padding_batch()]


def decoder(seed: int) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(SHAPE)


def weights(learner: Learner) -> list[float]:
    """All weights of a learner, gathered."""
    return torch.cat([full(p.detach()).flatten() for p in learner.parameters.values()]).tolist()


def update(ranks: Ranks, dtype: str, **train: str) -> dict[str, Any]:
    """-> counts of a reference's passes and of a critic's and a policy's update; norms and weights of two updates."""
    config = Config.model_validate({
        "model": {"dtype": dtype}, "train": train, "optimizer": {"learning_rate": 1e-2},
        "algorithm": {"name": "ppo", "group_size": 2, "kl_coefficient": 0.1},
    })  # fmt: skip
    policy = Policy(decoder(0), config, ranks, decoder(1).to(getattr(torch, dtype)))
    critic = Critic(decoder(2), config, ranks)
    batches, denominator = make_batches(ranks), 9 * (2 * NUM_BATCHES - 1)
    report: dict[str, Any] = {"norms": []}
    (gathers, _) = count(policy.reference)
    for number in range(2):
        gathers.clear()
        references = policy.reference_logprobs(batches)
        values = critic.values(batches)
        counted = [count(learner.module) for learner in (policy, critic)]
        returns = [torch.ones_like(batch.advantages) for batch in batches]
        report["norms"].append(critic.update(batches, returns, values, denominator)[1])
        report["norms"].append(policy.update(batches, denominator, references, on_policy=number == 0)[1])
        report["gathers"] = {"reference": gathers, "policy": counted[0][0], "critic": counted[1][0]}
        report["reduces"] = {"policy": counted[0][1], "critic": counted[1][1]}
    report["weights"] = weights(policy) + weights(critic)
    report["logprobs"] = torch.cat(references).tolist()
    return report


def main() -> None:
    """Write OUTPUT/rank<i>.json: what was counted and learned, by settings."""
    with process("cpu", num_threads=1) as ranks:
        reports = {}
        for dtype in ("float32", "bfloat16"):
            for reshard_after in ("forward", "backward", "update"):
                for reduce_after in ("microbatch", "update"):
                    name = f"{dtype} {reshard_after} {reduce_after}"
                    train = {"reshard_after": reshard_after, "reduce_after": reduce_after}
                    reports[name] = update(ranks, dtype, **train)
        train = {"activation_checkpointing": "full", "reshard_after": "forward", "reduce_after": "update"}
        reports["checkpointing"] = update(ranks, "float32", **train)
        (Path(sys.argv[1]) / f"rank{ranks.rank}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
