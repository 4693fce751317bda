"""What a decoder is: the fields of a config.json that change the computation, and the families that share the code.

Left out on purpose, and refused by name where a config.json asks for it: sliding windows, rope scaling other than
Llama 3's, biases that only some checkpoints have, dropout, other activations, quantised weights, experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple


class Family(NamedTuple):
    """Where the architectures differ, beyond numbers."""

    architecture: str  # the name that transformers gives the class
    qkv_bias: bool
    qk_norm: bool  # RMS norm over each head of queries and keys, before the rotation


FAMILIES = {  # by config.json's model_type
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, qk_norm=False),
    "qwen3": Family("Qwen3ForCausalLM", qkv_bias=False, qk_norm=True),
    "llama": Family("LlamaForCausalLM", qkv_bias=False, qk_norm=False),
}

# Keys that are absent or off in every checkpoint this is for. (Qwen2's biases on q, k and v are not `attention_bias`.)
_MUST_BE_OFF = {
    "use_sliding_window": "sliding-window attention",
    "attention_bias": "biases in all of attention (attention_bias)",
    "mlp_bias": "biases in the MLP (mlp_bias)",
    "attention_dropout": "dropout in attention (attention_dropout)",
    "quantization_config": "quantised weights (quantization_config); save it in bfloat16",
}

_SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "head_dim"),
}
_NUMBERS = {"rms_norm_eps", "initializer_range"}

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's change of rotary frequencies (`rope_type: llama3`); the formula is in rope.py."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not (self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(f"config.json: a rope scaling that cannot be: {self}")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The fields of a Hugging Face config.json that change the computation, and the token ids that `generate` needs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    model_type: str = "qwen2"
    head_dim: int = 0  # if given as 0: hidden_size / num_attention_heads
    rope_scaling: Llama3Scaling | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _refuse_another_family(self.model_type)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}, and no head_dim is given"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs")

    @property
    def family(self) -> Family:
        """What sets the architecture apart."""
        return FAMILIES[self.model_type]

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Read the contents of a config.json. ValueError for another architecture or an option that is not built."""
        _refuse_what_is_not_built(values)
        theta, scaling = _read_rope(values)
        given = {field.name: values[field.name] for field in fields(cls) if values.get(field.name) is not None}
        given |= {"rope_theta": theta, "rope_scaling": scaling}
        given.setdefault("num_key_value_heads", given.get("num_attention_heads"))  # Llama's default: no groups
        if isinstance(given.get("eos_token_id"), list):
            given["eos_token_id"] = tuple(given["eos_token_id"])
        missing = [name for name in cls.__match_args__[:6] if given.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        _refuse_what_is_no_size(given)
        return cls(**given)

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that transformers, 4 and 5, reads as the same model."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _TOKEN_IDS}
        del values["rope_scaling"], values["model_type"]
        is_usual_size = self.head_dim * self.num_attention_heads == self.hidden_size
        if self.model_type == "qwen2" and is_usual_size:
            del values["head_dim"]  # Qwen2's files have none
        scaling = {"rope_type": "default"}
        if self.rope_scaling is not None:
            numbers = {field.name: getattr(self.rope_scaling, field.name) for field in fields(self.rope_scaling)}
            scaling = {"rope_type": "llama3", **numbers}
        eos = self.eos_token_id
        values |= {
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            # transformers 5 reads `rope_parameters`, earlier releases the two that follow it
            "rope_parameters": {**scaling, "rope_theta": self.rope_theta},
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else scaling,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": "float32",
        }
        if self.model_type != "llama":
            values["use_sliding_window"] = False
        if self.model_type != "qwen2":
            values["attention_bias"] = False
        return {"architectures": [self.family.architecture], "model_type": self.model_type, **values}


def _refuse_another_family(model_type: Any) -> None:
    if model_type not in FAMILIES:
        raise ValueError(f"config.json describes a {model_type!r} model; this decoder runs {', '.join(FAMILIES)}")


def _refuse_what_is_not_built(values: Mapping[str, Any]) -> None:
    _refuse_another_family(values.get("model_type"))
    for key, what in _MUST_BE_OFF.items():
        if values.get(key):
            raise ValueError(f"config.json asks for {what}, which this decoder does not have")
    kinds = {kind for kind in values.get("layer_types") or () if kind != "full_attention"}
    if kinds:
        raise ValueError(f"config.json asks for layers of type {sorted(kinds)[0]!r}; this decoder has 'full_attention'")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json asks for the activation {values['hidden_act']!r}; this decoder has 'silu'")


def _refuse_what_is_no_size(given: Mapping[str, Any]) -> None:
    for name in _SIZES & given.keys():
        if type(given[name]) is not int or given[name] < 1:
            raise ValueError(f"config.json: {name} must be a whole number above 0, not {given[name]!r}")
    for name in _NUMBERS & given.keys():
        _number(name, given[name])


def _read_rope(values: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Read base and scaling: transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: rope_parameters (or rope_scaling) must be an object, not {rope!r}")
    if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        raise ValueError(f"config.json asks for rotations of their own for layers of type {nested[0]!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json asks for the rope type {kind!r}; this decoder has 'default' and 'llama3'")
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ValueError("config.json asks for a rotation of part of each head (partial_rotary_factor)")
    theta = _number("rope_theta", rope.get("rope_theta") or values.get("rope_theta") or 10000.0)
    if kind == "default":
        return theta, None
    names = [field.name for field in fields(Llama3Scaling)]
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ValueError(f"config.json's rope scaling lacks {', '.join(missing)}")
    for name in names:
        _number(name, rope[name])
    return theta, Llama3Scaling(**{name: rope[name] for name in names})


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not value > 0:
        raise ValueError(f"config.json: {name} must be a number above 0, not {value!r}")
    return float(value)
