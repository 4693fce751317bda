"""Weights to and from Hugging Face directories (config.json, model.safetensors or its shards)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from searchr1_fast.models.decoder import Decoder, DecoderConfig

BUILTIN = {"builtin:base": "base", "builtin:instruct": "instruct"}


def resolve(path: str | Path) -> Path:
    """A model directory; `builtin:base` and `builtin:instruct` name those in the package. ValueError: there is none."""
    if str(path) in BUILTIN:
        return Path(__file__).resolve().parent.parent / "assets" / BUILTIN[str(path)]
    if str(path).startswith("builtin:"):
        raise ValueError(f"model {path!r}: the built-in models are {', '.join(BUILTIN)}")
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"model {str(path)!r} is not a Hugging Face directory: it has no config.json")
    return Path(path)


def load_model(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The decoder of a Hugging Face directory. ValueError names what is missing, left over or of another shape."""
    directory = resolve(directory)
    config = DecoderConfig.from_hf(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device=device).to(dtype)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    expected = dict(model.named_parameters())  # a tied head appears once, as the embedding
    seen: set[str] = set()
    for file in _weight_files(directory):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (a safetensors reader is no dict)
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                if name not in expected:
                    raise ValueError(f"{file} holds {name!r}, which this model does not have")
                tensor = reader.get_tensor(name)
                if tensor.shape != expected[name].shape:
                    raise ValueError(
                        f"{file}: {name} is {tuple(tensor.shape)}, config.json says {tuple(expected[name].shape)}"
                    )
                with torch.no_grad():
                    expected[name].copy_(tensor)
                seen.add(name)
    missing = sorted(expected.keys() - seen)
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} weights, the first {missing[0]!r}")
    return model


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (directory / name).is_file():
            raise ValueError(f"{directory} has no {name}; weights are read from safetensors files")
    return [directory / name for name in names]


def save_model(model: Decoder, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors; `dtype` None keeps the parameters' own. Reads back with transformers."""
    write_state_dict(model.config, model.state_dict(), directory, dtype)


def write_state_dict(
    config: DecoderConfig, state: dict[str, torch.Tensor], directory: str | Path, dtype: torch.dtype | None = None
) -> None:
    """`save_model` for a full state dict that was gathered from elsewhere."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor for name, tensor in state.items() if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    state = {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in state.items()}
    values = config.to_hf() | {"torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch.")}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
