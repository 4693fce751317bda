"""An adapter alone, as peft keeps it: adapter_config.json and adapter_model.safetensors, in a directory of its own.

What such a file may say and lora.py does not compute is refused, with a sentence that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from searchr1_fast.models.decoder import Decoder
from searchr1_fast.models.lora import PARTS, adapted_layers, adapter_parameters, add_adapter, is_adapters
from searchr1_fast.models.tensor_files import save_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, SUFFIX = "base_model.model.", ".weight"  # around our names, in peft's
# What changes the arithmetic, and what it is where nothing is changed; a file may leave them out.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_rslora": (False,),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
}


def save_adapter(model: Decoder, directory: str | Path, base: str) -> None:
    """Write the adapter of a model that has one, whole parameters in their own type. `base`: what the adapter stands
    on, a Hugging Face directory or name."""
    alpha = next(iter(adapted_layers(model).values())).alpha
    write_adapter(adapter_parameters(model), alpha, directory, base)


def write_adapter(weights: Mapping[str, torch.Tensor], alpha: float, directory: str | Path, base: str) -> None:
    """`save_adapter` of weights that left their model; others than A and B among them are passed over."""
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
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adapter_base(directory: str | Path) -> str | None:
    """What the adapter of a directory stands on; None where it holds none."""
    return _read_config(Path(directory))["base_model_name_or_path"] if (Path(directory) / CONFIG).is_file() else None


@torch.no_grad()
def load_adapter(model: Decoder, directory: str | Path) -> None:
    """Put the adapter of a directory on a model without one, in the model's type and where it is. ValueError: a file
    that is not an adapter of such a model, or one that computes otherwise."""
    directory = Path(directory)
    config, tensors = _read_config(directory), _read_tensors(directory / WEIGHTS)
    weight = model.head_weight
    add_adapter(model, config["r"], float(config["lora_alpha"]), config["target_modules"], weight.dtype)
    own = {f"{PREFIX}{name}{SUFFIX}": parameter for name, parameter in adapter_parameters(model).items()}
    for name in sorted(own.keys() ^ tensors.keys()):
        raise ValueError(f"{directory} does not fit its model: it {'lacks' if name in own else 'also holds'} {name}")
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            shapes = f"{tuple(tensors[name].shape)}, the model's is {tuple(parameter.shape)}"
            raise ValueError(f"{directory} does not fit its model: {name} is {shapes}")
        parameter.copy_(tensors[name])


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        wanted = {key: config[key] for key in ("base_model_name_or_path", "r", "lora_alpha", "target_modules")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an adapter's configuration: {error!r}") from error
    for key, plain in _PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported; merge the adapter into its model")
    if not isinstance(wanted["target_modules"], list):
        raise ValueError(f"{path}: target_modules must list names, not {wanted['target_modules']!r}")
    return wanted


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
