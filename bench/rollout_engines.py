"""Shared by both parts of rollout.py: the model, the engines, sequences without a question, the clock."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from searchr1_fast.config import RolloutConfig
from searchr1_fast.models import Decoder, DecoderConfig, TextTokenizer
from searchr1_fast.models.published import published_config
from searchr1_fast.rollout import Engine, RolloutRequest, SamplingParams, VllmEngine
from searchr1_fast.rollout.sampling import stream_keys
from searchr1_fast.rollout.sequence import Sequence as Rollout
from searchr1_fast.types import Question

OURS = "native"
SHAPES = {
    "small": DecoderConfig(4096, 256, 512, 4, 4, 2, tie_word_embeddings=True),
    "3b": published_config("qwen2.5-3b"),
}
QUESTION = Question("", "", ("",), "bench")
HAS_VLLM = importlib.util.find_spec("vllm") is not None


class Provider:
    """One way: how to run it, what its runs took and what it left. `prepare` is not timed."""

    def __init__(self, run: Callable[[], list[np.ndarray]], prepare: Callable[[], object] = lambda: None) -> None:
        self.run, self.prepare = run, prepare
        self.samples: list[dict[str, float]] = []
        self.tokens: list[np.ndarray] = []

    def measure(self) -> None:
        """Time one run, until its tokens are on the host."""
        self.prepare()
        cpu, wall = time.process_time(), time.perf_counter()
        self.tokens = self.run()
        self.samples.append({"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu})


def build_model(shape: str, device: torch.device) -> Decoder:
    """Make a model with random weights, in fp32 on a CPU and in bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = Decoder(SHAPES[shape])
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    model.reset_parameters()
    model.join_projections()
    return model


def other_types(model: Decoder) -> list[torch.dtype]:
    """The dtypes that other projects are measured in: the model's own, and on a CPU also the one they are built for."""
    return list(dict.fromkeys([model.head_weight.dtype, torch.bfloat16]))


def type_name(dtype: torch.dtype) -> str:
    """The dtype's name in a table."""
    return str(dtype).removeprefix("torch.")


def in_type(model: Decoder, dtype: torch.dtype) -> Decoder:
    """Return the model, or a copy of it in another dtype."""
    if model.head_weight.dtype == dtype:
        return model
    copy = Decoder(model.config).to(dtype).to(model.head_weight.device)
    copy.load_state_dict(model.state_dict())
    copy.requires_grad_(False).join_projections()
    return copy


def transformers_model(model: Decoder, dtype: torch.dtype) -> Any:
    """Make transformers' own model with the same weights. Nothing ends its sequences."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = model.config
    config = Qwen2Config(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads, rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    with model.head_weight.device:
        other = Qwen2ForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    return other.to(dtype)


def native_engine(
    kind: type[Engine], model: Decoder, tokenizer: TextTokenizer, config: RolloutConfig, temperature: float
) -> Engine:
    """Make an engine whose turns end at their limit, as the tokenizer has no end-of-sequence token."""
    return kind(model, tokenizer, config, SamplingParams(temperature), stop_at_tags=False)


def vllm_engine(
    model: Decoder, tokenizer: TextTokenizer, config: RolloutConfig, temperature: float, stack: ExitStack
) -> VllmEngine:
    """Make the trainer's engine over vLLM, which `stack` closes. No random model writes a whole tag."""
    engine = VllmEngine(model, tokenizer, config, SamplingParams(temperature))
    stack.callback(engine.close)
    return engine


def make_sequences(prompts: np.ndarray, turn_limits: list[int]) -> list[Rollout]:
    """Make one sequence per prompt [S, n], each with its own stream."""
    sequences = []
    for place, key in enumerate(stream_keys(list(range(len(prompts))))):
        sequence = Rollout(RolloutRequest(QUESTION, place, "", place), key)
        sequence.append_prompt(prompts[place].tolist(), "")
        sequence.turn_limit = turn_limits[place]
        sequences.append(sequence)
    return sequences
