"""Run by test_weights.py on two ranks: `two_ranks_load.py FOLDER NAME…` reads FOLDER/NAME sharded, and reports.

Peaks are of torch's memory on the CPU, counted at every operation; pages of a mapped file are not included.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from searchr1_fast.config import Config
from searchr1_fast.critic import Critic
from searchr1_fast.distributed import Ranks, full, process, shard
from searchr1_fast.models import Decoder, load_model, load_weights, meta_model
from searchr1_fast.policy import Policy


class Wrapper(nn.Module):
    """As in the trainer: the decoder is inside the module that is sharded as a whole."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, token_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return self.decoder.hidden(token_ids, cu_seqlens)


class PeakMemory(TorchDispatchMode):
    """Bytes of the live storages that operations have made, and their peak.

    Views that an operation returns are not counted, so the pages of a mapped file never are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        for tensor in [] if is_view else tree_leaves(result):
            if isinstance(tensor, DTensor):  # what it does to its shard is not seen by this mode
                tensor = tensor.to_local()
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._known:
            return
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def peak(build: Callable[[], Any]) -> tuple[Any, int]:
    """-> what is built, and the most memory that it took."""
    with PeakMemory() as memory:
        module = build()
    return module, memory.peak


def read_own(folder: Path, ranks: Ranks) -> Wrapper:
    """Shard the shapes, then read this rank's rows."""
    module = Wrapper(meta_model(folder))
    shard(module, module.decoder.layers, ranks, torch.float32)
    module.to_empty(device="cpu")
    load_weights(module.decoder, folder)
    return module


def read_whole(folder: Path, ranks: Ranks) -> Wrapper:
    """Read everything, then shard."""
    module = Wrapper(load_model(folder))
    shard(module, module.decoder.layers, ranks, torch.float32)
    return module


def differing(parameters: Iterable[tuple[str, torch.Tensor]], expected: Decoder) -> list[str]:
    """-> names of the parameters that, when gathered, differ from what one rank reads."""
    wanted = dict(expected.named_parameters())
    return [name for name, parameter in parameters if not torch.equal(full(parameter.detach()), wanted[name])]


def trainers(folder: Path, ranks: Ranks) -> list[str]:
    """Fill policy, replica, reference and critic from shapes alone -> what differs from what one rank reads."""
    config = Config(model={"dtype": "bfloat16"}, algorithm={"name": "ppo", "kl_coefficient": 0.1})
    reference = meta_model(folder, torch.bfloat16)
    policy = Policy(meta_model(folder), config, ranks, reference, weights=folder)
    critic = Critic(meta_model(folder), config, ranks, weights=folder)
    whole, rounded = load_model(folder), load_model(folder, torch.bfloat16)
    decoder, replica = policy.module.decoder, policy.replica
    head = [full(p.detach()).any() for p in critic.module.value_head.parameters()]
    is_tied = [d.lm_head.weight is d.model.embed_tokens.weight for d in (decoder, replica)]
    return [
        *differing(decoder.named_parameters(), whole),
        *differing(replica.named_parameters(), rounded),
        *differing(reference.named_parameters(), rounded),
        *differing(critic.module.decoder.named_parameters(), whole),
        *("value head" for is_set in head if is_set),
        *("tie" for tied in is_tied if tied != (folder.name == "tied")),
    ]


def report(folder: Path, ranks: Ranks) -> dict[str, Any]:
    whole, peak_of_one_rank = peak(lambda: load_model(folder))
    module, peak_bytes = peak(lambda: read_own(folder, ranks))
    other, peak_read_whole = peak(lambda: read_whole(folder, ranks))
    del other
    parameters, expected = dict(module.decoder.named_parameters()), dict(whole.named_parameters())
    assert parameters.keys() == expected.keys()
    token_ids, cu_seqlens = torch.arange(60), torch.tensor([0, 7, 60])
    difference = (module(token_ids, cu_seqlens) - whole.hidden(token_ids, cu_seqlens)).abs().max()
    return {
        "differing": differing(parameters.items(), whole) + trainers(folder, ranks),
        "hidden_difference": difference.item(),
        "model_bytes": sum(p.numel() * 4 for p in expected.values()),
        "own_bytes": sum(p.to_local().numel() * 4 for p in parameters.values()),
        "largest_shard_bytes": max(p.to_local().numel() * 4 for p in parameters.values()),
        "peak_bytes_of_one_rank": peak_of_one_rank,
        "peak_bytes": peak_bytes,
        "peak_bytes_read_whole": peak_read_whole,
    }


def main() -> None:
    """Write FOLDER/NAME-RANK.json."""
    folder = Path(sys.argv[1])
    with process("cpu", num_threads=1) as ranks:
        for name in sys.argv[2:]:
            (folder / f"{name}-{ranks.rank}.json").write_text(json.dumps(report(folder / name, ranks)))


if __name__ == "__main__":
    main()
