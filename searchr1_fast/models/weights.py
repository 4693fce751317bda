"""Load weights from Hugging Face directories (config.json, model.safetensors or its shards), tensor by tensor.

Files are mapped, not read: what is copied goes from the file's pages straight into the parameter, in its dtype and on
its device, so a process never holds a second copy. Of a parameter that FSDP2 has sharded, a rank copies its own rows,
and the other rows are never touched. N ranks call `meta_model`, `fully_shard`, `to_empty` and `load_weights` in turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from searchr1_fast.files import read_object
from searchr1_fast.models.adapter_files import adapter_base, load_adapter
from searchr1_fast.models.decoder import Decoder
from searchr1_fast.models.decoder_config import DecoderConfig
from searchr1_fast.models.lora import base_parameters
from searchr1_fast.models.own_rows import own_rows

BUILTIN = {"builtin:base": "base", "builtin:instruct": "instruct"}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_ROWS_COMPARED = 4096  # at a time: 20 MB for a 4B model
_FLOATING = ("F64", "F32", "F16", "BF16")  # as safetensors spells them
_NAMES_SHOWN = 3


def resolve(path: str | Path, or_adapter: bool = False) -> Path:
    """Return a model directory; `builtin:base` and `builtin:instruct` name those in the package.

    ValueError if there is none. `or_adapter` also accepts the directory of an adapter, which `load_model` takes too.
    """
    if str(path) in BUILTIN:
        return Path(__file__).resolve().parent.parent / "assets" / BUILTIN[str(path)]
    if str(path).startswith("builtin:"):
        raise ValueError(f"model {path!r}: the built-in models are {', '.join(BUILTIN)}")
    if (base := adapter_base(path)) is not None:
        if or_adapter:
            return Path(path)
        raise ValueError(f"model {str(path)!r} is an adapter; give what it stands on ({base}), or the two merged")
    if not (Path(path) / "config.json").is_file():
        why = "it has no config.json" if Path(path).is_dir() else "there is no such directory"
        if (exported := Path(path) / "checkpoints" / "latest" / "hf").is_dir():
            why = f"it is a run, whose newest model is {exported}"
        raise ValueError(f"model {str(path)!r} is not a Hugging Face directory: {why}")
    return Path(path)


def load_model(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """Load the decoder of a Hugging Face directory, or of an adapter's directory with its base model. ValueError names
    what is missing, left over or of another shape."""
    base = adapter_base(directory)
    if base is not None and not (Path(base) / "config.json").is_file():
        raise ValueError(
            f"the adapter {directory} stands on {base}, which is not a model's directory here; say where it is in "
            "adapter_config.json, or give a merged model (a checkpoint's hf/)"
        )
    model = meta_model(base or directory, dtype)
    model.to_empty(device=device)
    load_weights(model, base or directory)
    if base is not None:
        load_adapter(model, directory)
    return model


def meta_model(directory: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a directory on the meta device: shapes and types, no memory. For sharding before loading."""
    config = read_config(resolve(directory))
    with torch.device("meta"):
        return Decoder(config).to(dtype)


@torch.no_grad()
def load_weights(model: Decoder, directory: str | Path) -> None:
    """Fill the model's parameters from a directory's files.

    Parameters may be plain or DTensors, of any floating dtype, on any device but meta. A model without a head
    (`lm_head` None) leaves the head in the file, and so does a tied one, for which it must be a copy of the embedding.
    An adapter stays as it is. ValueError, before anything is copied, names what does not fit.
    """
    directory = resolve(directory)
    parameters = base_parameters(model)
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}  # name -> slices of the mapped file
        for file in _weight_files(directory):
            reader = stack.enter_context(_open(file))
            tensors |= {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
        unused_head = tensors.pop(HEAD, None) if HEAD not in parameters else None
        _check(directory, tensors, parameters)
        if unused_head is not None and model.lm_head is not None:
            _check_copy(directory, unused_head, tensors[EMBEDDING], own_rows(parameters[EMBEDDING])[1])
        for name, parameter in parameters.items():
            local, rows = own_rows(parameter)
            if local.numel():
                # To the device first: the file's bf16 is half the size that the parameter's fp32 would be on the way.
                local.copy_(tensors[name][rows].to(local.device))


def read_config(directory: Path) -> DecoderConfig:
    """Read what a directory's config.json describes. ValueError if it is broken, or of a model not supported here."""
    path = directory / "config.json"
    values = read_object(path)
    try:
        return DecoderConfig.from_hf(values)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _check(directory: Path, tensors: dict[str, Any], parameters: dict[str, torch.nn.Parameter]) -> None:
    """Raise ValueError with everything in the files that is not as the model has it."""
    shared = sorted(tensors.keys() & parameters.keys())
    shapes = {name: tuple(tensors[name].get_shape()) for name in shared}
    problems = [
        ("lacks", sorted(parameters.keys() - tensors.keys())),
        ("holds, and this model does not have,", sorted(tensors.keys() - parameters.keys())),
        (
            "has in another shape",
            [
                f"{name} is {shapes[name]}, config.json says {tuple(parameters[name].shape)}"
                for name in shared
                if shapes[name] != tuple(parameters[name].shape)
            ],
        ),
        (
            "holds in a type that is not 16, 32 or 64-bit floating point",
            [f"{name} is {tensors[name].get_dtype()}" for name in shared if tensors[name].get_dtype() not in _FLOATING],
        ),
    ]
    found = [f"{what} {_listed(names)}" for what, names in problems if names]
    if found:
        raise ValueError(f"{directory} does not fit its config.json: it {'; it '.join(found)}")


def _check_copy(directory: Path, head: Any, embedding: Any, rows: slice) -> None:
    """Raise ValueError if the head that a tied model's files hold is another matrix than the embedding. transformers 5
    then ties nothing, and so runs another model. `rows`: this rank's, which it reads in any case."""
    same = tuple(head.get_shape()) == tuple(embedding.get_shape())
    begin, end, _ = rows.indices(embedding.get_shape()[0])
    for start in range(begin, end, _ROWS_COMPARED):
        part = slice(start, min(start + _ROWS_COMPARED, end))
        same = same and torch.equal(head[part], embedding[part])
    if not same:
        raise ValueError(
            f"{directory}: config.json says that the head is the embedding (tie_word_embeddings), and {HEAD} in the "
            "files is another matrix; set tie_word_embeddings to false there, or take it out of the files"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); copy it again") from error


def _weight_files(directory: Path) -> Iterable[Path]:
    names = [SINGLE]
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError("it names no files")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of weights: it has no weight_map") from error
    for name in names:
        if not (directory / name).is_file():
            if index.is_file():
                raise ValueError(f"{directory} has no {name}, which its {INDEX} names; copy the missing shard")
            raise ValueError(f"{directory} has no {name} and no {INDEX}; weights are read from safetensors files")
    return [directory / name for name in names]
