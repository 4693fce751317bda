"""Write a safetensors file with the permissions that the user's umask gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Do `safetensors.torch.save_file`, with the permissions of a file made the usual way.

    In 0.8, `save_file` leaves files that only their owner can read; another user's server, say, could not load what a
    run exported. The permissions are those that `touch` gives, as to ask for the umask is to set it for every thread.
    """
    path.touch()
    permissions = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(permissions)
