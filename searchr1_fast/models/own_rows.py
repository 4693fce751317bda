"""Which rows of a parameter a rank holds: all of them, or FSDP2's part."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Shard


def own_rows(parameter: torch.nn.Parameter) -> tuple[torch.Tensor, slice]:
    """Return the part of a parameter that this rank holds, and which rows of the whole it is."""
    if not isinstance(parameter, DTensor):
        return parameter, slice(None)
    local = parameter.to_local()
    (placement,) = parameter.placements
    assert placement == Shard(0), f"FSDP2 shards rows, this parameter is {placement}"
    # FSDP2 cuts like torch.chunk: equal parts, rounded up, the last ones shorter or empty.
    size = -(-parameter.shape[0] // parameter.device_mesh.size())
    begin = min(parameter.device_mesh.get_local_rank() * size, parameter.shape[0])
    end = min(begin + size, parameter.shape[0])
    assert local.shape[0] == end - begin, f"{tuple(local.shape)} rows here, {begin} to {end} were expected"
    return local, slice(begin, end)
