"""How much GPU memory an index takes, computed and shown before a byte is copied; one that cannot fit is refused.

    rows       2 bytes per component: fp16, as on the disk
    codes      1 byte per component, 8 for the scale and the residual of each row, where passes read 8-bit codes
    bounds     4 bytes per block of 128 rows, 8 with codes: the inputs of the block's bound
    work       the larger of what preparing takes temporarily and what a search of the largest batch takes

What a search takes stays with torch's caching allocator, so later searches ask the driver for nothing.

An encoder on the same GPU takes its weights and the working memory of its largest recorded pass, which the graphs keep.

Shape legend
    M  rows    D  components    Q  queries of a search
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Scan = Literal["float16", "int8"]

MAX_QUERIES = 512  # searched at once; a pass over the rows costs the same for one query as for about a hundred
RECORDED_ROWS = 8192 + 256  # in an encoder's largest pass on a GPU
_BLOCK_ROWS = 128  # searchr1_kernels: rows under one bound
_PREPARED_ROWS = 2**18  # prepared at a time, in fp64
_SCORED_BYTES = 256 * (8 * _BLOCK_ROWS + 64)  # per query: its places for blocks, a key per row and a few more numbers


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device."""

    num_rows: int
    dimension: int
    scan: Scan

    @property
    def rows(self) -> int:
        """The vectors."""
        return 2 * self.num_rows * self.dimension

    @property
    def codes(self) -> int:
        """Codes with their scales and residuals, and the center that was subtracted from the rows."""
        return (self.dimension + 8) * self.num_rows + 4 * self.dimension if self.scan == "int8" else 0

    @property
    def bounds(self) -> int:
        """A norm per block; with codes, a magnitude too."""
        return (8 if self.scan == "int8" else 4) * self._num_blocks

    @property
    def work(self) -> int:
        """Working memory on top of what stays, estimated from above. Preparing: rows in fp64 (for codes also centred,
        and rounded). Searching: exact scores, and a bound per query and block, twice, as settling makes a copy."""
        preparing = 8 * min(self.num_rows, _PREPARED_ROWS) * self.dimension * (4 if self.scan == "int8" else 1)
        searching = MAX_QUERIES * (2 * 4 * self._num_blocks + _SCORED_BYTES + 4 * self.dimension)
        return max(preparing, searching)

    @property
    def total(self) -> int:
        """The sum of all of these."""
        return self.rows + self.codes + self.bounds + self.work

    @property
    def _num_blocks(self) -> int:
        return -(-self.num_rows // _BLOCK_ROWS)

    def __str__(self) -> str:
        codes = f", codes {size_text(self.codes)}" if self.codes else ""
        return (
            f"{self.num_rows:,} rows of {self.dimension} components: {size_text(self.rows)} as float16{codes}, "
            f"{size_text(self.bounds + self.work)} to prepare and search them, {size_text(self.total)} in all"
        )

    def check(self, free: int, device: torch.device | str) -> None:
        """Raise ValueError if the total is more than `free` bytes."""
        if self.total <= free:
            return
        advice = ["spread it over more GPUs (torchrun, one rank for each)", "search it on the CPU"]
        if self.scan == "int8":
            advice.insert(0, "choose retrieval.scan=float16, which needs no codes")
        raise ValueError(
            f"the index does not fit on {device}: {self}, and {size_text(free)} are free; {', or '.join(advice)}"
        )


def encoder_bytes(config: Mapping[str, Any]) -> tuple[int, int]:
    """(weights, work): bytes of a BERT-family encoder on a GPU, in fp32. `config`: its config.json; what that does not
    say is taken from BERT."""
    bert = {"intermediate_size": 3072, "max_position_embeddings": 512, "vocab_size": 30522}
    config = bert | dict(config)
    size, inner, longest = config["hidden_size"], config["intermediate_size"], config["max_position_embeddings"]
    layer = 4 * size * (size + 1) + inner * (size + 1) + size * (inner + 1) + 4 * size
    weights = (config["vocab_size"] + longest + 2) * size + config["num_hidden_layers"] * layer
    # The residual stream, plus the input and output of the MLP's activation, or query, key, value and result.
    work = RECORDED_ROWS * (size + max(2 * inner, 4 * size)) + 3 * size * (longest - 1)
    return 4 * weights, 4 * work


def free_bytes(device: torch.device) -> int:
    """What an allocation may use: the driver's free memory, and what torch's allocator holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def size_text(num_bytes: int) -> str:
    """1.5 GiB, 20 MiB, …"""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{-(-num_bytes // 1024)} KiB"
