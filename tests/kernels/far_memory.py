"""Memory with more numbers than 32 bits can count, of which tests write few: a sparse file on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch


def far_memory(folder: Path, count: int, device: str) -> torch.Tensor:
    """-> [count] fp16."""
    if device == "cuda":
        return torch.empty(count, dtype=torch.float16, device=device)
    path = folder / f"memory{len(list(folder.iterdir()))}"
    with path.open("wb") as file:
        file.truncate(2 * count)
    return torch.from_file(str(path), shared=True, size=count, dtype=torch.float16)
