"""`searchr1 train CONFIG --dry-run`: what a rank's GPU will hold, whether that fits, and what to change.

It reads the configuration, the model's config.json and the index's manifest; no weights, no questions. An index that is
not there yet is not counted, which is reported.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from searchr1_fast.config import Config
from searchr1_fast.memory_plan import memory_size, plan_rank
from searchr1_fast.models import DecoderConfig, read_config, resolve
from searchr1_fast.models.published import PUBLISHED, published_config
from searchr1_fast.retrieval.index_format import MANIFEST

DOES_NOT_FIT = 1  # exit code


def dry_run(config: Config, shape: str | None, device_memory: str | None, ranks: int | None) -> int:
    """Print the plan; return the exit code.

    `shape`: one of `models.published.PUBLISHED` instead of the model's directory. `device_memory` None: that of the GPU
    here, if there is one. `ranks` None: as many as torchrun says, else one.
    """
    num_ranks = ranks or int(os.environ.get("WORLD_SIZE", "1"))
    decoder = published_config(shape) if shape else _decoder_of(config.model.path)
    ranks_per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None
    missing = _missing_index(config)
    if missing is not None:
        config = config.model_copy(update={"retrieval": config.retrieval.model_copy(update={"index": None})})
    plan = plan_rank(config, decoder, num_ranks, ranks_per_machine, _device_bytes(config, device_memory))
    if os.environ.get("RANK", "0") == "0":
        print(_title(config, shape, num_ranks))
        print(plan)
        if missing is not None:
            print(
                f"not counted: the index {missing}, which is not there yet; on a GPU 2 bytes a component, a part on "
                "each of a machine's ranks"
            )
    return DOES_NOT_FIT if plan.fits is False else 0


def _decoder_of(path: str) -> DecoderConfig:
    """The shape of a model's directory."""
    try:
        return read_config(resolve(path))
    except ValueError as error:
        if Path(path).exists() or path.startswith("builtin:"):
            raise
        shapes = ", ".join(PUBLISHED)
        raise ValueError(f"{error}; to plan before it is downloaded, give its --shape: {shapes}") from error


def _title(config: Config, shape: str | None, num_ranks: int) -> str:
    ranks = "one rank" if num_ranks == 1 else f"each of {num_ranks} ranks"
    adapter = f", an adapter of rank {config.model.lora.rank}" if config.model.lora.rank else ""
    return f"{shape or config.model.path}{adapter}, {config.algorithm.name}, {config.model.dtype}: memory of {ranks}"


def _missing_index(config: Config) -> str | None:
    """The index that the configuration names, if it does not exist; a damaged one is still an error."""
    retrieval = config.retrieval
    if retrieval.backend != "dense" or retrieval.index is None or (Path(retrieval.index) / MANIFEST).is_file():
        return None
    return retrieval.index


def _device_bytes(config: Config, device_memory: str | None) -> int | None:
    if device_memory is not None:
        return memory_size(device_memory)
    if config.run.device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory
