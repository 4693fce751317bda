"""One safetensors file, readable by whom the user's umask lets read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """`safetensors.torch.save_file`, which in 0.8 leaves files that nobody but their owner can read: another user's
    server, say, could not load what a run exported. Of a file made the usual way the permissions are taken over; to ask
    for the umask is to set it for every thread."""
    path.touch()
    permissions = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(permissions)
