"""Write weights to Hugging Face directories, as transformers does: one file, or shards with an index above a size.

An adapter (lora.py) is merged into the weights; adapter_files.py writes it alone.
"""

from __future__ import annotations

from pathlib import Path

import torch

from searchr1_fast.files import write_object
from searchr1_fast.models.decoder import Decoder
from searchr1_fast.models.decoder_config import DecoderConfig
from searchr1_fast.models.lora import adapter_scale, is_adapters, merged
from searchr1_fast.models.tensor_files import save_tensors
from searchr1_fast.models.weights import HEAD, INDEX, SINGLE

MAX_SHARD_BYTES = 5 * 10**9  # what transformers wrote for years, and every loader copes with


def save_model(
    model: Decoder,
    directory: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and the weights; `dtype` None keeps the parameters' own. Reads back with transformers.

    Whole parameters only: a sharded model is gathered first. On the CPU there is at most one shard at a time. Files of
    an earlier export that this one does not replace are removed, so that no reader mixes the two.
    """
    weights, scale = dict(model.named_parameters()), adapter_scale(model)
    save_weights(weights, model.config, directory, dtype, max_shard_bytes, scale)


def save_weights(
    weights: dict[str, torch.Tensor],  # a decoder's, by its names; a tied head once, as the embedding
    config: DecoderConfig,
    directory: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    scale: float = 1.0,
) -> None:
    """Do `save_model` for weights apart from their model, such as those that a checkpoint has copied to the host. An
    adapter among them is merged, with `scale`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: weight for name, weight in weights.items() if not is_adapters(name)}
    if config.tie_word_embeddings:
        state.pop(HEAD, None)  # tied by the configuration, though not in memory
    stored = dtype or next(iter(state.values())).dtype
    shards = _split(state, stored, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        tensors = {key: merged(weights, key, scale).to("cpu", stored).contiguous() for key in shard}
        save_tensors(tensors, directory / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.numel() for tensor in state.values()) * stored.itemsize
        write_object(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for old in (*directory.glob("model-*-of-*.safetensors"), directory / SINGLE, directory / INDEX):
        if old.name not in (names if len(shards) == 1 else (*names, INDEX)):
            old.unlink(missing_ok=True)
    write_object(directory / "config.json", config.to_hf() | {"torch_dtype": str(stored).removeprefix("torch.")})


def _split(state: dict[str, torch.Tensor], dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    """Split names in order, where a shard would grow above `max_bytes`; a larger tensor goes alone."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        num_bytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards
