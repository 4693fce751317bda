"""Reads a Hugging Face folder: how its encoder wants texts (pooling, length, prefixes, …), tokenizer and weights.

The settings are in the files that sentence-transformers writes; options take precedence over them. What neither gives
is asked for, never guessed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from searchr1_fast.retrieval.index_format import combine, file_digests

Pooling = Literal["mean", "cls"]

FAMILY = {"bert": 0, "roberta": 1, "xlm-roberta": 1, "camembert": 1}  # 1: positions start after the padding token's id


@dataclass(frozen=True)
class BertSettings:
    """How texts become vectors; None: as the model's folder says."""

    pooling: Pooling | None = None
    normalize: bool | None = None
    max_length: int | None = None  # tokens, special ones included
    query_prefix: str | None = None
    passage_prefix: str | None = None


def complete_settings(folder: Path, given: BertSettings) -> BertSettings:
    """Fill in from the folder what `given` leaves open; ValueError, with the options to give, for what neither says."""
    if not folder.is_dir():
        raise ValueError(f"there is no model folder {folder}")
    modules = read_json(folder / "modules.json") or []
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module.get("path", "") for module in modules}
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ValueError(f"{folder}/modules.json has a module {sorted(unknown)[0]}, which is not implemented")
    prompts = (read_json(folder / "config_sentence_transformers.json") or {}).get("prompts") or {}
    limits = (
        (read_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length"),
        (read_json(folder / "tokenizer_config.json") or {}).get("model_max_length"),
    )
    config = read_json(folder / "config.json", required=True)
    positions = config.get("max_position_embeddings", 512)
    if FAMILY.get(config.get("model_type")):
        positions -= config["pad_token_id"] + 1
    found = BertSettings(
        pooling=_read_pooling(folder / kinds["Pooling"] / "config.json") if "Pooling" in kinds else None,
        normalize="Normalize" in kinds if modules else None,
        max_length=next((limit for limit in limits if isinstance(limit, int) and limit <= positions), None),
        query_prefix=prompts.get("query"),
        passage_prefix=prompts.get("passage", prompts.get("document")),
    )
    changes = {name: value for name, value in vars(given).items() if value is not None}
    settings = replace(found, **changes)
    missing = [name for name, value in vars(settings).items() if value is None]
    if missing:
        options = ", ".join(_OPTIONS[name] for name in missing)
        raise ValueError(
            f"{folder} does not say how the model wants its texts; give {options} as its documentation has it"
        )
    if settings.pooling not in ("mean", "cls"):
        raise ValueError(f"pooling {settings.pooling!r}: there are mean and cls")
    if not 3 <= (settings.max_length or 0) <= positions:
        raise ValueError(f"a maximum length of {settings.max_length} tokens: this model takes from 3 to {positions}")
    return settings


_OPTIONS = {
    "pooling": "--pooling mean|cls",
    "normalize": "--normalize or --no-normalize",
    "max_length": "--max-length",
    "query_prefix": "--query-prefix (may be empty)",
    "passage_prefix": "--passage-prefix (may be empty)",
}


def _read_pooling(path: Path) -> Pooling:
    modes = {name for name, value in (read_json(path, required=True)).items()
             if name.startswith("pooling_mode_") and value is True}  # fmt: skip
    if modes == {"pooling_mode_mean_tokens"}:
        return "mean"
    if modes == {"pooling_mode_cls_token"}:
        return "cls"
    found = ", ".join(sorted(modes)) or "of no kind"
    raise ValueError(f"{path}: pooling {found} is not implemented; there are mean and cls")


def read_json(path: Path, required: bool = False) -> Any:
    """The JSON of a file; None if it does not exist and is not `required`."""
    if not path.is_file():
        if required:
            raise ValueError(f"there is no file {path}")
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_tokenizer(folder: Path, max_length: int | None) -> Tokenizer:
    """The folder's fast tokenizer, set to truncate at `max_length` tokens and not to pad."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"there is no file {path}; save the model's fast tokenizer there")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def weights_file(folder: Path) -> Path:
    """The path of the folder's weights."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by their names within the encoder: a classifier's file has them under `bert.`."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    prefixes = ("bert.", "roberta.")
    return {name.removeprefix(next(filter(name.startswith, prefixes), "")): value for name, value in tensors.items()}


def file_digest(path: Path) -> str:
    """The digest of a whole file."""
    return combine(list(file_digests(path, 2**24)))
