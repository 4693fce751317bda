"""Rotary position embedding (arXiv 2104.09864), with Llama 3's scaling of its frequencies.

Shape legend
    T  packed tokens    H  heads    d  head size
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

from searchr1_fast.models.decoder_config import Llama3Scaling

_FEWEST_ROWS = 1024  # of a table
_tables: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}  # cos, sin: [N, 1, d] fp32, by head size, theta and scaling


def rotary_embedding(
    positions: torch.Tensor,  # [T] int64
    head_dim: int,
    theta: float,
    scaling: Llama3Scaling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # cos, sin: [T, 1, d] fp32
    """Cosines and sines of rotary position embedding (eq. 34), in the halves layout of Hugging Face."""
    # A stand-in tensor, with which torch traces, must not be cached for others, nor meet a cached tensor.
    frequencies = _frequencies if type(positions) is torch.Tensor else _frequencies.__wrapped__
    angles = positions[:, None].float() * frequencies(head_dim, theta, scaling, positions.device)  # [T, d/2]
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotary_rows(
    positions: torch.Tensor,  # [T] int64
    head_dim: int,
    theta: float,
    scaling: Llama3Scaling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # cos, sin: [T, 1, d] fp32
    """Return `rotary_embedding`, on a CPU from a table of all positions so far.

    A decode step's cosines are little work, but a library still splits it among its threads. Waking them beside those
    of the compiled loops took 4 ms of a step of 19 (256 sequences, two threads, two cores of an Intel Xeon,
    2026-11-27).
    """
    if positions.device.type != "cpu" or type(positions) is not torch.Tensor or not len(positions):
        return rotary_embedding(positions, head_dim, theta, scaling)
    rows, kind = positions.numpy(), (head_dim, theta, scaling)
    needed = max(_FEWEST_ROWS, int(rows.max()) + 1)
    if kind not in _tables or len(_tables[kind][0]) < needed:
        everywhere = rotary_embedding(torch.arange(1 << (needed - 1).bit_length()), *kind)
        _tables[kind] = tuple(tensor.numpy() for tensor in everywhere)
    cos, sin = _tables[kind]
    return torch.from_numpy(cos[rows]), torch.from_numpy(sin[rows])


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:  # [T, H, d] -> [T, H, d]
    """Rotate pairs (i, i + d/2) by the token's angles."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


@cache
def _frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None, device: torch.device) -> torch.Tensor:
    """[d/2] fp32, radians per token; made once, as on a GPU each of these small operations is a launch per step.
    They are kept for good, as CUDA graphs of decode steps read them at their address."""
    with torch.inference_mode(False):  # else a first call in inference mode would leave what autograd cannot save
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        frequencies = 1.0 / theta**exponents
        return frequencies if scaling is None else _scale_llama3(frequencies, scaling)


def _scale_llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:  # [d/2] -> [d/2]
    """Slow down slow rotations by `factor`, keep fast ones, and mix the two linearly in between, in the number of turns
    that fit into the original context (`apply_scaling` of meta-llama/llama-models, models/llama3/model.py)."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)  # 0: below low_freq_factor turns, 1: above high_freq_factor
    return frequencies * (kept + (1.0 - kept) / scaling.factor)
