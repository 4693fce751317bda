"""Read and write an adapter alone, as peft does: adapter_config.json and adapter_model.safetensors in a directory.

What such a file may ask for and lora.py does not compute is refused, with a sentence that names it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from searchr1_fast.files import write_object
from searchr1_fast.models.decoder import Decoder
from searchr1_fast.models.lora import PARTS, adapted_layers, adapter_parameters, add_adapter, is_adapters
from searchr1_fast.models.own_rows import own_rows
from searchr1_fast.models.tensor_files import save_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, SUFFIX = "base_model.model.", ".weight"  # around our names, in peft's
# Keys that say nothing about the arithmetic, or whose values are checked against the tensors. Any other key, whichever
# peft will have, is refused unless its value is in `_PLAIN`, or in `_NOTHING` if `_PLAIN` lacks the key.
_KNOWN = {
    *("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"),
    *("task_type", "inference_mode", "auto_mapping", "revision", "peft_version"),
    *("layers_pattern", "megatron_core", "qalora_group_size", "eva_config"),
}
_NOTHING = (None, False, [], {})
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others take a part of the base away
}


def save_adapter(model: Decoder, directory: str | Path, base: str) -> None:
    """Write the adapter of a model that has one, as whole parameters in their own dtype. `base`: the adapter's base
    model, a Hugging Face directory or name."""
    alpha = next(iter(adapted_layers(model).values())).alpha
    write_adapter(adapter_parameters(model), alpha, directory, base)


def write_adapter(weights: Mapping[str, torch.Tensor], alpha: float, directory: str | Path, base: str) -> None:
    """Do `save_adapter` for weights apart from their model; weights other than A and B are passed over."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    own = {name: weight.detach().cpu().contiguous() for name, weight in weights.items() if is_adapters(name)}
    tensors = {f"{PREFIX}{name}{SUFFIX}": weight for name, weight in own.items()}
    save_tensors(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    ranks = {len(weight) for name, weight in own.items() if name.rpartition(".")[2] == PARTS[0]}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": ranks.pop(),
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # peft's is an integer
        "target_modules": sorted({name.split(".")[-2] for name in own}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    write_object(directory / CONFIG, config)


def adapter_base(directory: str | Path) -> str | None:
    """Return the base model of a directory's adapter; None if it holds no adapter."""
    return _read_config(Path(directory))["base_model_name_or_path"] if (Path(directory) / CONFIG).is_file() else None


def load_adapter(model: Decoder, directory: str | Path) -> None:
    """Put the adapter of a directory on a model without one, in the model's dtype and on its device. ValueError for a
    file that is not an adapter of such a model, or one that computes differently."""
    config = _read_config(Path(directory))
    add_adapter(model, config["r"], float(config["lora_alpha"]), config["target_modules"], model.head_weight.dtype)
    fill_adapter(model, directory)


@torch.no_grad()
def fill_adapter(model: torch.nn.Module, directory: str | Path) -> None:
    """Fill a model's adapter from a directory's; where FSDP2 has sharded it, with this rank's rows. ValueError, before
    anything is copied, names what does not fit."""
    directory = Path(directory)
    own = {f"{PREFIX}{name}{SUFFIX}": parameter for name, parameter in adapter_parameters(model).items()}
    with _open_tensors(directory / WEIGHTS) as file:
        for name in sorted(own.keys() ^ set(file.keys())):
            raise ValueError(
                f"{directory} does not fit its model: it {'lacks' if name in own else 'also holds'} {name}"
            )
        tensors = {name: file.get_slice(name) for name in own}
        for name, parameter in own.items():
            if (shape := tuple(tensors[name].get_shape())) != tuple(parameter.shape):
                shapes = f"{shape}, the model's is {tuple(parameter.shape)}"
                raise ValueError(f"{directory} does not fit its model: {name} is {shapes}")
        for name, parameter in own.items():
            local, rows = own_rows(parameter)
            local.copy_(tensors[name][rows])


def check_start(
    directory: str | Path,
    model: str | Path,  # a Hugging Face directory
    rank: int,
    alpha: float,
    targets: Collection[str],
) -> None:
    """Raise ValueError if such training cannot begin with the adapter of a directory. Nothing large is read."""
    directory = Path(directory)
    config = _read_config(directory)
    has = {"rank": config["r"], "alpha": config["lora_alpha"], "targets": config["target_modules"]}
    asked = {"rank": rank, "alpha": alpha, "targets": sorted(targets)}
    if differing := [key for key in has if has[key] != asked[key]]:
        values = " ".join(f"model.lora.{key}={_as_yaml(has[key])}" for key in differing)
        raise ValueError(f"model.lora.path: the adapter of {directory} has other settings than this run; set {values}")
    base = config["base_model_name_or_path"]
    # A name of the Hub does not say where its copy lies here, only what the copy's folder is called.
    is_here = base is not None and (Path(base) / "config.json").is_file()
    if not (Path(base).samefile(model) if is_here else Path(str(base)).name == Path(model).resolve().name):
        raise ValueError(
            f"model.lora.path: the adapter of {directory} stands on {base}, model.path is {model}; give its own model, "
            f"or, if that is the same, say so in {directory / CONFIG}, base_model_name_or_path"
        )


def _as_yaml(value: Any) -> str:
    """Format a value as an override on the command line has it."""
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory} is not an adapter's directory, as peft writes it: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        wanted = {key: config[key] for key in ("base_model_name_or_path", "r", "lora_alpha", "target_modules")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an adapter's configuration: {error!r}") from error
    for key in config.keys() - _KNOWN:
        if config[key] not in _PLAIN.get(key, _NOTHING):
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported; merge the adapter into its model")
    names = wanted["target_modules"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: target_modules must list names, not {names!r}")
    # For "all-linear" peft writes every layer's whole name; the tensors say whether any of them is missing.
    wanted["target_modules"] = sorted({name.rpartition(".")[2] for name in names})
    for key, kind in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(wanted[key], kind) or not wanted[key] > 0:
            raise ValueError(f"{path}: {key} must be a number above 0, not {wanted[key]!r}")
    return wanted


def _open_tensors(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; weights are read from safetensors files")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
