"""Choose which code computes packed attention, once per device and dtype; `describe_attention` says it in one line.

All back-ends take packed rows with the ends of each sequence. They are causal, aligned at the end: where a sequence has
more keys than queries (it continues a beginning that others share), its queries are the last of its keys.

    flash-attn  flash_attn.flash_attn_varlen_func, where the package is installed
    varlen      torch.nn.attention.varlen.varlen_attn, which is torch's own build of the same kernels
    sdpa        attention.packed_attention, one call per sequence: the plain twin, and the path of the CPU and of fp32

The first two need a GPU (flash-attn has not been tried on one yet). Without one, tests compare their calls with the
twin's.

Shape legend
    T  packed tokens    S  sequences    K  keys: T, or more where sequences share beginnings
    H  query heads    G  key/value heads (H a multiple of G)    d  head dimension
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch

from searchr1_fast.models.attention import packed_attention, suffix_masks

_MAX_FLASH_HEAD_DIM = 256
_MIN_FLASH_CAPABILITY = (8, 0)  # FlashAttention 2: Ampere
_MIN_FLASH_VERSION = (2, 5)  # from 2.1 the causal mask is aligned at the end, from 2.4.1 the gradient may be repeatable


@dataclass(slots=True)
class PackedLayout:
    """Where sequences end, among queries and among keys; the same for all layers of a forward pass.

    Kernels size their grids by the longest lengths, which the host knows. The plain twin needs all lengths: `lists`
    reads them when first called, which waits for a GPU.
    """

    cu_seqlens_q: torch.Tensor  # [S+1] int32
    cu_seqlens_k: torch.Tensor  # [S+1] int32
    max_seqlen_q: int
    max_seqlen_k: int
    _lists: tuple[list[int], list[int], list[torch.Tensor | None]] | None = field(default=None, repr=False)

    def lists(self) -> tuple[list[int], list[int], list[torch.Tensor | None]]:
        """Return the lengths of queries and keys, and the masks of the sequences that have more keys than queries."""
        if self._lists is None:
            query_lengths, key_lengths = self.cu_seqlens_q.diff().tolist(), self.cu_seqlens_k.diff().tolist()
            masks = suffix_masks(query_lengths, key_lengths, self.cu_seqlens_q.device)
            self._lists = query_lengths, key_lengths, masks
        return self._lists


# query [T, H, d], key [K, G, d], value [K, G, d], layout -> [T, H, d]
PackedAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedLayout], torch.Tensor]


class AttentionBackend(NamedTuple):
    """One way to compute packed attention, and why it was chosen."""

    name: str
    reason: str
    attend: PackedAttention


@cache
def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """Choose the fastest back-end that is there for tensors of this kind; nothing is imported that is not used."""
    obstacle = _obstacle(device, dtype, head_dim)
    if obstacle:
        return AttentionBackend("sdpa", obstacle, attend_sdpa)
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return AttentionBackend("varlen", "flash-attn is not installed; it is taken where it is", attend_varlen())
    if tuple(int(part) for part in version.split(".")[:2]) < _MIN_FLASH_VERSION:
        return AttentionBackend("varlen", f"flash-attn {version} is older than 2.5", attend_varlen())
    return AttentionBackend("flash-attn", f"version {version} is installed", attend_flash())


def describe_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Describe the choice in one line."""
    chosen = choose_attention(device, dtype, head_dim)
    return f"attention: {chosen.name} ({chosen.reason})"


def repeats_key_heads(dtype: torch.dtype) -> bool:
    """Whether a GPU's attention in this dtype is given a key head per query head: memory that a plan must count."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True  # the plain twin does
    if importlib.util.find_spec("flash_attn") is not None:
        return False
    return not _has_groups(importlib.import_module("torch.nn.attention.varlen").varlen_attn)


def _has_groups(varlen_attn: Callable) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Say why the kernels cannot take these tensors; "" if they can."""
    if device.type != "cuda":
        return f"on the {device.type.upper()}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"kernels take 16-bit types, this model computes in {str(dtype).removeprefix('torch.')}"
    if head_dim > _MAX_FLASH_HEAD_DIM or head_dim % 8:
        return f"kernels take heads of a multiple of 8 up to {_MAX_FLASH_HEAD_DIM}, this model's have {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_FLASH_CAPABILITY:
        return f"kernels need compute capability 8.0, this GPU has {'.'.join(map(str, capability))}"
    return ""


def attend_sdpa(
    query: torch.Tensor,  # [T, H, d]
    key: torch.Tensor,  # [K, G, d]
    value: torch.Tensor,  # [K, G, d]
    layout: PackedLayout,
) -> torch.Tensor:  # [T, H, d]
    """The plain twin."""
    query_lengths, key_lengths, masks = layout.lists()
    return packed_attention(query, key, value, query_lengths, key_lengths, masks)


def attend_flash() -> PackedAttention:
    """Return flash-attn's function, which aligns the causal mask at the end and groups heads by itself.

    Without `deterministic`, blocks add to the queries' gradient in the order in which they happen to end.
    """
    varlen_func = importlib.import_module("flash_attn").flash_attn_varlen_func

    def attend(query, key, value, layout):
        return varlen_func(
            query,
            key,
            value,
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            causal=True,
            deterministic=True,
        )

    return attend


def attend_varlen() -> PackedAttention:
    """Return torch's function. `window_size=(-1, 0)` is its causal mask, aligned at the end as in flash-attn (torch's
    own `causal_lower_right` uses the same kernel).

    torch 2.11 has no `enable_gqa` and documents equal numbers of heads; from 2.12 groups must be asked for.
    """
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    has_groups = _has_groups(varlen_attn)

    def attend(query, key, value, layout):
        group = query.shape[1] // key.shape[1]
        options = {"enable_gqa": group > 1} if has_groups else {}
        if group > 1 and not has_groups:
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        return varlen_attn(
            query,
            key,
            value,
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            window_size=(-1, 0),
            **options,
        )

    return attend
