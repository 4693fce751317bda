"""Memory for keys and values during generation, in blocks of a few places each, and the table of each slot's blocks.

A slot is a row of `table`, for one sequence: its token p is at place p % B of block `table[c, p // B]` (Kwon et al.
2023, arXiv 2309.06180). Slots whose sequences begin alike may share their first blocks; a block is written by one slot
only.

Who owns what: this class holds memory and table, on the device. The engine's `BlockTables` decides which slot has which
block; a cache made without `num_blocks` has all blocks of every slot laid out from the start.

Shape legend
    C  slots    W  blocks of a slot    P  blocks    G  key/value heads    B  places of a block    d  head dimension
    T  tokens    n  table entries
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from searchr1_fast.models.decoder_config import DecoderConfig

if TYPE_CHECKING:
    from searchr1_fast.models.generation_loops import Kept

# Places per block. CUDA: as many keys as one step of the attention kernel loads. CPU: small, as sequences that begin
# alike share whole blocks; but attention takes 1.1 to 1.25 times as long with 16 as with 32, and as long with 64 as
# with 32 (4 heads of 32 and of 64, one core of an Intel Xeon, 2026-11-27).
BLOCK_SIZE = {"cpu": 32, "cuda": 64}


def block_size(device: torch.device | str) -> int:
    """Return the places per block on a device of this kind."""
    return BLOCK_SIZE.get(torch.device(device).type, BLOCK_SIZE["cuda"])


class KVCache:
    """Keys and values per layer, `[P, G, B, d]` each, and `table` [C, W] int32.

    The head comes before the place so that one head's keys lie together, as the attention reads them. Memory starts as
    zeros: an attention that masks by a weight of 0 would otherwise read 0 * NaN from places never written.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_slots: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        num_blocks: int | None = None,
    ) -> None:
        """Make room for `num_slots` sequences of up to `max_length` tokens, as far as `num_blocks` blocks suffice.

        `num_blocks` None: as many as they may need, and every slot has its own.
        """
        self.block_size = block_size(device)
        self.num_slots, self.max_length = num_slots, max_length
        width = -(-max_length // self.block_size)
        self.table = torch.zeros(num_slots, width, dtype=torch.int32, device=device)
        if num_blocks is None:
            num_blocks = num_slots * width
            self.table += torch.arange(num_blocks, dtype=torch.int32, device=device).view(num_slots, width)
        shape = (num_blocks, config.num_key_value_heads, self.block_size, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.kept: Kept | None = None  # what steps leave behind for the next; goes with the memory

    @property
    def num_blocks(self) -> int:
        """P."""
        return len(self.keys[0])

    def locate(self, slots: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] int64 each -> the blocks of these positions, and the places in them, [T] int64 each."""
        blocks = self.table[slots, positions // self.block_size]
        return blocks.long(), positions % self.block_size

    def set_table(self, slots: torch.Tensor, numbers: torch.Tensor, blocks: torch.Tensor) -> None:
        """Let block `numbers[i]` of slot `slots[i]` be `blocks[i]`, [n] int64 each."""
        self.table[slots, numbers] = blocks.int()

    def write(
        self,
        layer: int,
        key: torch.Tensor,  # [T, G, d]
        value: torch.Tensor,  # [T, G, d]
        blocks: torch.Tensor,  # [T] int64
        places: torch.Tensor,  # [T] int64
    ) -> None:
        """Store the T tokens where `locate` found them."""
        self.keys[layer][blocks, :, places] = key.to(self.keys[layer].dtype)
        self.values[layer][blocks, :, places] = value.to(self.values[layer].dtype)

    def copy(
        self,
        sources: torch.Tensor,  # [T] int64
        targets: torch.Tensor,  # [T] int64
        places: torch.Tensor,  # [T] int64
    ) -> None:
        """Give place `places[t]` of block `targets[t]` what block `sources[t]` has at the same place.

        Everything is read before anything is written, a layer at a time. One head at one place is a contiguous row:
        copying rows takes half the time of indexing blocks and places (AMD EPYC, 2026-11-24).
        """
        memory = self.keys[0]
        heads = torch.arange(memory.shape[1], device=memory.device)
        read, written = (
            ((blocks[:, None] * memory.shape[1] + heads) * self.block_size + places[:, None]).flatten()
            for blocks in (sources, targets)
        )
        for memory in (*self.keys, *self.values):
            rows = memory.view(-1, memory.shape[-1])  # [P * G * B, d]
            rows.index_copy_(0, written, rows.index_select(0, read))

    @property
    def num_bytes(self) -> int:
        """The bytes of all layers and of the table."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values, self.table))
