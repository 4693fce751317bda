"""The decoder (Qwen2 architecture): one module for training on packed sequences and for generating with a cache.

Module and parameter names are those of Hugging Face's Qwen2, so a checkpoint's state dict is this module's. Left out
on purpose: padding, attention masks, dropout, sliding windows (`DecoderConfig.from_hf` refuses a model that needs one).

Shape legend
    T  packed tokens    S  sequences    D  hidden size    V  vocabulary    H, G  query, key/value heads    d  head size
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from searchr1_fast.models.attention import (
    cached_attention,
    find_chunks,
    gather_rows,
    packed_attention,
    suffix_masks,
)
from searchr1_fast.types import SharedPrefixes

if TYPE_CHECKING:
    from searchr1_fast.models.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The fields of a Hugging Face Qwen2 config.json that change the computation."""

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

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        """d = D / H."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> DecoderConfig:
        """From the contents of a config.json. ValueError for another architecture or an option that is not built."""
        model_type = values.get("model_type")
        if model_type != "qwen2":
            raise ValueError(f"config.json describes a {model_type!r} model; this decoder runs 'qwen2'")
        if values.get("use_sliding_window"):
            raise ValueError("config.json asks for sliding-window attention, which this decoder does not have")
        if values.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json asks for the activation {values['hidden_act']!r}; this decoder has 'silu'")
        # transformers 5 writes `rope_parameters`, earlier releases `rope_theta` and `rope_scaling`
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"config.json asks for the rope type {rope}; this decoder has the default one")
        names = cls.__dataclass_fields__
        fields = {name: values[name] for name in names if values.get(name) is not None and name != "rope_theta"}
        fields["rope_theta"] = float(rope.get("rope_theta", values.get("rope_theta") or 10000.0))
        missing = [name for name in names if name not in fields and name in cls.__match_args__[:6]]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers reads as the same model."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rope_theta"}
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            **values,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "torch_dtype": "float32",
        }


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467, eq. 4), statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, D] -> [T, D]
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_embedding(
    positions: torch.Tensor,  # [T] int64
    head_dim: int,
    theta: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # cos, sin: [T, 1, d] fp32
    """Angles of rotary position embedding (arXiv 2104.09864, eq. 34), halves layout as in Hugging Face."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None].float() * (1.0 / theta**exponents)  # [T, d/2]
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:  # [T, H, d] -> [T, H, d]
    """Rotate pairs (i, i + d/2) by the token's angles."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with biases on q, k, v, as Qwen2 has it."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=True)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,  # [T, D]
        context: PackedContext | CachedContext,
        rows: torch.Tensor | None,  # [R] int64
    ) -> torch.Tensor:  # [T, D], or [R, D]
        query = apply_rotary(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)), context.cos, context.sin)
        key = apply_rotary(self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)), context.cos, context.sin)
        value = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        output = context.attend(self.layer, query, key, value).flatten(1)
        return self.o_proj(output if rows is None else output.index_select(0, rows))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202, eq. 5)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, D] -> [T, D]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm layer; the unit that FSDP shards."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,  # [T, D]
        context: PackedContext | CachedContext,
        rows: torch.Tensor | None = None,  # [R] int64: the tokens whose output is wanted
    ) -> torch.Tensor:  # [T, D], or [R, D]
        """All tokens are keys and values; past the attention only `rows` are worked on."""
        attended = self.self_attn(self.input_layernorm(x), context, rows)
        x = attended + (x if rows is None else x.index_select(0, rows))
        return x + self.mlp(self.post_attention_layernorm(x))


class PackedContext:
    """What attention needs in a packed forward: the angles, where sequences end, and what they share."""

    def __init__(
        self, cu_seqlens: torch.Tensor, num_tokens: int, prefixes: SharedPrefixes | None, config: DecoderConfig
    ) -> None:
        positions = packed_positions(cu_seqlens, num_tokens)
        self.sequence_lengths = self.key_lengths = cu_seqlens.diff().tolist()
        self.key_index, self.masks = None, None
        if prefixes is not None:
            own = cu_seqlens.diff().long()
            shared = prefixes.cu_seqlens_k.diff().long() - own
            positions = positions + shared.repeat_interleave(own, output_size=num_tokens)
            self.key_index, self.key_lengths = prefixes.key_index, prefixes.cu_seqlens_k.diff().tolist()
            self.masks = suffix_masks(self.sequence_lengths, self.key_lengths, cu_seqlens.device)
        self.cos, self.sin = rotary_embedding(positions, config.head_dim, config.rope_theta)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[T, H, d], [T, G, d], [T, G, d] -> [T, H, d]"""
        if self.key_index is None:
            return packed_attention(query, key, value, self.sequence_lengths)
        key, value = (gather_rows(x, self.key_index) for x in (key, value))  # [K, G, d]
        return packed_attention(query, key, value, self.sequence_lengths, self.key_lengths, self.masks)


class CachedContext:
    """What attention needs when tokens are appended to cached sequences."""

    def __init__(self, slots: torch.Tensor, positions: torch.Tensor, cache: KVCache, config: DecoderConfig) -> None:
        self.cos, self.sin = rotary_embedding(positions, config.head_dim, config.rope_theta)
        self.slots, self.positions, self.cache = slots, positions, cache
        self.chunks = find_chunks(slots, positions) if slots.device.type == "cpu" else None  # once for all layers

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[T, H, d], [T, G, d], [T, G, d] -> [T, H, d]"""
        self.cache.write(layer, key, value, self.slots, self.positions)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return cached_attention(query, keys, values, self.slots, self.positions, self.chunks)


class Model(nn.Module):
    """Embedding, blocks and final norm; the `model.` prefix of Hugging Face's names."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model over packed token ids."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of `initializer_range`, zero biases, unit norms; ties the head where the config says so."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, for sharding."""
        return self.model.layers

    @property
    def head_weight(self) -> torch.Tensor:  # [V, D]
        """The language-model head; the embedding itself when tied."""
        return self.lm_head.weight

    def forward(self, token_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """`hidden`: calling the module runs the hooks that FSDP needs."""
        return self.hidden(token_ids, cu_seqlens)

    def hidden(
        self,
        token_ids: torch.Tensor,  # [T] int64
        cu_seqlens: torch.Tensor,  # [S+1] int: 0, …, T
        rows: torch.Tensor | None = None,  # [R] int64
        prefixes: SharedPrefixes | None = None,
    ) -> torch.Tensor:  # [T, D], or [R, D]
        """Final hidden states of packed sequences, each causal in itself.

        `rows`: of these tokens alone. In training most tokens are retrieved text that only has to be attended to, and
        the last layer need not work on them. `prefixes`: how sequences continue what others began (`PackedBatch`).
        """
        context = PackedContext(cu_seqlens, len(token_ids), prefixes, self.config)
        return self._run(token_ids, context, rows)

    def logits(self, token_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:  # [T], [S+1] -> [T, V]
        """Logits of every token. For tests and small inputs: training asks the head for policy tokens only."""
        return self.lm_head(self.hidden(token_ids, cu_seqlens))

    @torch.no_grad()
    def forward_cached(
        self,
        token_ids: torch.Tensor,  # [T] int64: the new tokens of S sequences, end to end
        cu_seqlens: torch.Tensor,  # [S+1] int: one or more each
        slots: torch.Tensor,  # [S] int64: their cache slots
        start_positions: torch.Tensor,  # [S] int64: how many tokens each slot holds already
        cache: KVCache,
    ) -> torch.Tensor:  # [S, D]
        """Append tokens to cached sequences; the hidden state of each sequence's last new token."""
        cu_seqlens = cu_seqlens.long()
        lengths = cu_seqlens.diff()
        num_tokens = len(token_ids)  # given to repeat_interleave, which else would wait for the device
        starts, slots = (x.repeat_interleave(lengths, output_size=num_tokens) for x in (start_positions, slots))
        context = CachedContext(slots, packed_positions(cu_seqlens, num_tokens) + starts, cache, self.config)
        return self._run(token_ids, context, rows=cu_seqlens[1:] - 1)

    def _run(
        self, token_ids: torch.Tensor, context: PackedContext | CachedContext, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.model.embed_tokens(token_ids)
        *blocks, last = self.model.layers
        for block in blocks:
            x = block(x, context)
        return self.model.norm(last(x, context, rows))


def packed_positions(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:  # [S+1] -> [T] int64
    """0, 1, … from the start of each sequence."""
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff().long(), output_size=num_tokens)
    return torch.arange(num_tokens, device=cu_seqlens.device) - starts
