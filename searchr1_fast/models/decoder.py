"""The decoder (Qwen2, Qwen3, Llama 3): one module for training on packed sequences and for generating with a cache.

Module and parameter names are those of Hugging Face, so a checkpoint's state dict is this module's. Left out on
purpose: padding, attention masks, dropout, and what `DecoderConfig.from_hf` refuses. Only generation uses one matrix
product for q, k and v together, and one for gate and up (generation.py, docs/models.md).

Shape legend
    T  packed tokens    S  sequences    D  hidden size    V  vocabulary    H, G  query, key/value heads    d  head size
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from searchr1_fast.models.attention import gather_rows
from searchr1_fast.models.attention_backends import PackedLayout, choose_attention
from searchr1_fast.models.cached_attention import cached_attention, find_chunks, least_chunk, make_tiles
from searchr1_fast.models.decoder_config import DecoderConfig
from searchr1_fast.models.generation import run_blocks
from searchr1_fast.models.lora import base_parameters
from searchr1_fast.models.projections import join_projections
from searchr1_fast.models.recompute import Recompute, recomputed
from searchr1_fast.models.rope import apply_rotary, rotary_embedding, rotary_rows
from searchr1_fast.types import PackedBatch, SharedPrefixes

if TYPE_CHECKING:
    from searchr1_fast.models.kv_cache import KVCache


RECOMPILE_LIMIT = 32  # graphs that one of a block's two halves may have


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467, eq. 4), statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, D] -> [T, D]
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """The matrices of grouped-query attention, with biases on q, k, v and norms over the heads of q and k where the
    family has them. The context computes the attention itself."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        bias = config.family.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.has_norms = config.family.qk_norm
        if self.has_norms:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,  # [T, D]
        cos: torch.Tensor,  # [T, 1, d] fp32
        sin: torch.Tensor,  # [T, 1, d] fp32
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # query [T, H, d], key and value [T, G, d]
        query = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        key = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        value = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.has_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value


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
    """One pre-norm layer: the unit that FSDP shards and, around its attention, the unit that torch compiles."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.recompute: Recompute = "none"
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,  # [T, D]
        context: PackedContext | CachedContext,
        rows: torch.Tensor | None = None,  # [R] int64: the tokens whose output is wanted
    ) -> torch.Tensor:  # [T, D], or [R, D]
        """Run the layer: all tokens are keys and values, and after attention only `rows` are worked on."""
        if self.recompute == "full":
            return recomputed(self._run, x, context, rows, _call)
        return self._run(x, context, rows, recomputed if self.recompute == "selective" else _call)

    def _run(
        self, x: torch.Tensor, context: PackedContext | CachedContext, rows: torch.Tensor | None, part: Callable
    ) -> torch.Tensor:  # [T, D], or [R, D]
        """Run the layer, with `part` to call what comes before attention and what comes after it."""
        attended = context.attend(self.layer, *part(self.before_attention, x, context.cos, context.sin))
        if rows is not None:
            x, attended = x.index_select(0, rows), attended.index_select(0, rows)
        return part(self.after_attention, x, attended)

    def before_attention(
        self,
        x: torch.Tensor,  # [T, D]
        cos: torch.Tensor,  # [T, 1, d] fp32
        sin: torch.Tensor,  # [T, 1, d] fp32
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [T, H, d], key and value [T, G, d]."""
        return self.self_attn(self.input_layernorm(x), cos, sin)

    def after_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """[R, D], [R, H, d] -> [R, D]"""
        x = x + self.self_attn.o_proj(attended.flatten(1))
        return x + self.mlp(self.post_attention_layernorm(x))

    def compile_in_place(self, backend: str) -> None:
        """Compile what surrounds attention, for any number of tokens. Attention itself is given lists of lengths, and
        would be compiled anew for each."""
        self.before_attention = torch.compile(self.before_attention, backend=backend, fullgraph=True, dynamic=True)
        self.after_attention = torch.compile(self.after_attention, backend=backend, fullgraph=True, dynamic=True)


def _call(function: Callable, *arguments: torch.Tensor) -> torch.Tensor:
    return function(*arguments)


class PackedContext:
    """What attention needs in a packed forward: the angles, where sequences end, and what they share."""

    def __init__(
        self,
        x: torch.Tensor,  # [T, D]: for its device and type
        cu_seqlens: torch.Tensor,  # [S+1] int
        prefixes: SharedPrefixes | None,
        max_seqlen: int | None,
        positions: torch.Tensor | None,  # [T] int64
        config: DecoderConfig,
    ) -> None:
        if positions is None:
            positions = packed_positions(cu_seqlens, len(x), prefixes)
        max_seqlen = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
        ends = cu_seqlens.int()
        self.layout = PackedLayout(ends, ends, max_seqlen, max_seqlen)
        self.key_index = None
        if prefixes is not None:
            self.key_index = prefixes.key_index
            self.layout = PackedLayout(ends, prefixes.cu_seqlens_k.int(), max_seqlen, prefixes.max_seqlen_k)
        self.cos, self.sin = rotary_embedding(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        self.attention = choose_attention(x.device, x.dtype, config.head_dim).attend

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[T, H, d], [T, G, d], [T, G, d] -> [T, H, d]"""
        if self.key_index is not None:
            key, value = (gather_rows(x, self.key_index) for x in (key, value))  # [K, G, d]
        return self.attention(query, key, value, self.layout)


class CachedContext:
    """What attention needs when tokens are appended to cached sequences."""

    def __init__(
        self,
        slots: torch.Tensor,  # [T] int64
        positions: torch.Tensor,  # [T] int64
        cache: KVCache,
        config: DecoderConfig,
        lengths: np.ndarray | None = None,  # [S], on the host
    ) -> None:
        self.cos, self.sin = rotary_rows(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        self.slots, self.positions, self.cache = slots, positions, cache
        self.blocks, self.places = cache.locate(slots, positions)  # where the tokens' own keys and values go
        self.chunks = None
        if slots.device.type == "cpu" and cache.keys[0].dtype in (torch.float32, torch.bfloat16):
            self.chunks = find_chunks(slots, positions, cache.table, least_chunk(cache.keys[0]))  # once for all layers
        self.tiles = None
        if lengths is not None and slots.device.type == "cuda":
            self.tiles = make_tiles(lengths, config.num_attention_heads // config.num_key_value_heads, slots.device)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[T, H, d], [T, G, d], [T, G, d] -> [T, H, d]"""
        self.cache.write(layer, key, value, self.blocks, self.places)
        return self.read(layer, query)

    def read(self, layer: int, query: torch.Tensor) -> torch.Tensor:  # [T, H, d] -> [T, H, d]
        """Attend to what is cached, the tokens themselves included."""
        memory = self.cache.keys[layer], self.cache.values[layer], self.cache.table
        return cached_attention(query, *memory, self.slots, self.positions, self.chunks, self.tiles)


class Model(nn.Module):
    """Embedding, blocks and final norm; the `model.` prefix of Hugging Face's names."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model over packed token ids."""

    # Whether generation.py runs cached passes, and not the modules; None: where its operations have kernels.
    fused_generation: bool | None = None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set normal weights of `initializer_range`, zero biases and unit norms; tie the head if the config says so."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Decoder:
        """Do what `to`, `to_empty` and the like do to every parameter; to a tied head only once, as the embedding.

        nn.Module would give the head memory of its own, and so hold the largest matrix of a small model twice.
        """
        head = self.lm_head
        if head is None or not self.config.tie_word_embeddings:
            return super()._apply(fn, recurse)
        self.lm_head = None
        try:
            super()._apply(fn, recurse)
        finally:
            self.lm_head = head
        self._tie()
        return self

    def compile_blocks(self, backend: str = "inductor") -> None:
        """`torch.compile` every block around its attention, once, before the first forward.

        Two graphs serve all layers and lengths, each with and without gradients. A single token, and none, have graphs
        of their own, as torch treats sizes of 0 and 1 apart; with an adapter, so do passes of the base alone, and a
        critic on the same base. The limit of 8, where torch would give up, is soon reached.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        for block in self.layers:
            block.compile_in_place(backend)

    def join_projections(self) -> None:
        """Let fused generation use one product for q, k and v, and one for gate and up; likewise for their adapters."""
        join_projections(self.model)

    def on_same_base(self) -> Decoder:
        """Return another decoder that has the same parameter objects, but no adapter."""
        with torch.device("meta"):
            other = Decoder(self.config)
        for name, parameter in base_parameters(self).items():
            module, _, own = name.rpartition(".")
            other.get_submodule(module).register_parameter(own, parameter)
        other._tie()
        return other

    def checkpoint_blocks(self, recompute: Recompute) -> None:
        """Set what blocks keep for the backward pass of `hidden`; generation keeps nothing in any case."""
        for block in self.layers:
            block.recompute = recompute

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, for sharding."""
        return self.model.layers

    @property
    def head_weight(self) -> torch.Tensor:  # [V, D]
        """The language-model head; the embedding itself when tied."""
        return self.lm_head.weight

    def forward(self, token_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Do `hidden`; calling the module runs the hooks that FSDP needs."""
        return self.hidden(token_ids, cu_seqlens)

    def hidden(
        self,
        token_ids: torch.Tensor,  # [T] int64
        cu_seqlens: torch.Tensor,  # [S+1] int: 0, …, T
        rows: torch.Tensor | None = None,  # [R] int64
        prefixes: SharedPrefixes | None = None,
        max_seqlen: int | None = None,
        positions: torch.Tensor | None = None,  # [T] int64
    ) -> torch.Tensor:  # [T, D], or [R, D]
        """Return the final hidden states of packed sequences, each causal in itself.

        `rows`: the tokens to return. In training most tokens are retrieved text that only has to be attended to, and
        the last layer need not work on them. `prefixes`: how sequences continue what others began (`PackedBatch`).
        `max_seqlen`: the longest length in `cu_seqlens`; without it, the host waits for a GPU to compute it.
        `positions`: of the tokens in their sequences; computed if not given.
        """
        x = self.model.embed_tokens(token_ids)
        return self._run(x, PackedContext(x, cu_seqlens, prefixes, max_seqlen, positions, self.config), rows)

    def scored_hidden(self, batch: PackedBatch) -> torch.Tensor:  # [R, D]
        """Return `hidden` of those rows of a batch that predict, each once."""
        return self.hidden(
            batch.token_ids, batch.cu_seqlens, batch.scored_rows, batch.prefixes, batch.max_seqlen, batch.positions
        )

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
        host_lengths: np.ndarray | None = None,  # [S] int64: those of cu_seqlens, where the host knows them
    ) -> torch.Tensor:  # [S, D]
        """Append tokens to cached sequences, and return the hidden state of each sequence's last new token.

        With `host_lengths`, tokens that join a sequence together on a GPU share the loads of its keys. Without, each
        loads its own. Neither waits for the device.
        """
        if len(token_ids) == len(slots):  # one each
            return self.decode_cached(token_ids, slots, start_positions, cache)
        cu_seqlens = cu_seqlens.long()
        lengths = cu_seqlens.diff()
        num_tokens = len(token_ids)  # for repeat_interleave, which would otherwise wait for the device
        starts, slots = (x.repeat_interleave(lengths, output_size=num_tokens) for x in (start_positions, slots))
        positions = packed_positions(cu_seqlens, num_tokens) + starts
        context = CachedContext(slots, positions, cache, self.config, host_lengths)
        return self._run(self.model.embed_tokens(token_ids), context, rows=cu_seqlens[1:] - 1)

    @torch.no_grad()
    def decode_cached(
        self,
        token_ids: torch.Tensor,  # [S] int64: one new token of each of S sequences
        slots: torch.Tensor,  # [S] int64: their cache slots
        positions: torch.Tensor,  # [S] int64: how many tokens each slot holds already
        cache: KVCache,
    ) -> torch.Tensor:  # [S, D]
        """Do `forward_cached` for one new token per sequence. This is what `DecodeGraphs` records."""
        context = CachedContext(slots, positions, cache, self.config)
        return self._run(self.model.embed_tokens(token_ids), context, rows=None)

    def _run(
        self, x: torch.Tensor, context: PackedContext | CachedContext, rows: torch.Tensor | None
    ) -> torch.Tensor:  # [T, D] -> [T, D], or [R, D]
        if isinstance(context, CachedContext):
            has_kernels = x.is_cuda or (x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16))
            if has_kernels if self.fused_generation is None else self.fused_generation:
                return run_blocks(self.model, x, context, rows)
        *blocks, last = self.model.layers
        for block in blocks:
            x = block(x, context)
        return self.model.norm(last(x, context, rows))


def packed_positions(
    cu_seqlens: torch.Tensor,  # [S+1] int
    num_tokens: int,
    prefixes: SharedPrefixes | None = None,
) -> torch.Tensor:  # [T] int64
    """Count positions 0, 1, … from the start of each sequence, including what it shares with others."""
    own, starts = cu_seqlens.diff().long(), cu_seqlens[:-1].long()
    if prefixes is not None:
        starts = starts + own - prefixes.cu_seqlens_k.diff().long()
    # without output_size, repeat_interleave would wait for the device to know it
    return torch.arange(num_tokens, device=cu_seqlens.device) - starts.repeat_interleave(own, output_size=num_tokens)
