"""`run_blocks` on a CPU, fp32 and bf16: the compiled loops of its operators and the products, on memory that is kept.

Steps of lone tokens go through generation_panels.py where it takes them; this file is its plain twin.

Between two operations of a layer, attention reads more keys and values than any cache of the processor holds, so
whatever the interpreter needs comes from memory again: checking arguments and taking tensors apart took longer than the
loops themselves (256 sequences of 4 heads of 64, one core of an Intel Xeon, 2026-11-27). So what does not change from
step to step is kept with the KV cache: views of the weights, checked at every step, and room for what a layer passes
on, while the number of tokens stays the same. Weights are the model's own memory, never copies.

Shape legend
    T  new tokens    R  those whose output is wanted    D  hidden size    H  query heads    d  head size
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from searchr1_kernels import _generation_numba as loops
from searchr1_kernels._numba_numbers import as_array
from torch import nn

from searchr1_fast.models import generation_panels
from searchr1_fast.models.generation_panels import PanelRoom
from searchr1_fast.models.lora import LoraLinear
from searchr1_fast.models.projections import project, side_by_side

if TYPE_CHECKING:
    from searchr1_fast.models.decoder import Block, CachedContext, Model, RMSNorm

_MOST_KEPT_TOKENS = 4096  # rows of the largest room that is kept from one step to the next

Flat = tuple[np.ndarray, int]  # all numbers from the first row to the last, and the distance between rows


def run_loops(
    model: Model,
    x: torch.Tensor,  # [T, D]: embeddings
    context: CachedContext,
    rows: torch.Tensor | None,  # [R] int64
) -> torch.Tensor | None:  # [T, D], or [R, D]
    """Run all blocks and the final norm; None on other devices, and where not all is fp32 or all bf16."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    if context.cache.keys[0].dtype != x.dtype or any(norm.weight.dtype != x.dtype for norm in _norms(model)):
        return None
    kept = context.cache.kept
    if kept is None:
        kept = context.cache.kept = Kept()
    layers = kept.layers(model)
    if generation_panels.takes(model, layers, x, context) and (rows is None or len(rows) == len(x)):
        return generation_panels.run_panels(model, layers, kept.panel_room(len(x), model, x.dtype), x, context)
    return _Step(kept, model, x, context).run(rows)


class Kept:
    """What a step leaves behind for the next."""

    def __init__(self) -> None:
        self._layers: list[Layer] = []
        self._room: _Room | None = None
        self._panel_room: PanelRoom | None = None

    def layers(self, model: Model) -> list[Layer]:
        """Return a `Layer` for every block, with its weights as they are now."""
        if len(self._layers) != len(model.layers) or not all(
            layer.is_of(block) for layer, block in zip(self._layers, model.layers, strict=True)
        ):
            self._layers = [Layer(block) for block in model.layers]
        return self._layers

    def panel_room(self, num_tokens: int, model: Model, dtype: torch.dtype) -> PanelRoom:
        """Return room for at least `num_tokens` lone tokens, which become fewer as sequences end."""
        room = self._panel_room
        if room is None or room.dtype != dtype or room.num_tokens < num_tokens:
            room = self._panel_room = PanelRoom(num_tokens, model, dtype)
        return room

    def room(self, num_tokens: int, model: Model, dtype: torch.dtype) -> _Room:
        """Return room for a step of `num_tokens` tokens."""
        if self._room is not None and self._room.shape == (num_tokens, dtype):
            return self._room
        self._room = None  # first, so that two are never held together
        room = _Room(num_tokens, model.layers[0], dtype)
        if num_tokens <= _MOST_KEPT_TOKENS:
            self._room = room
        return room


# --------------------------------------------------------------------------------------------------------- what is kept


class _Weights(NamedTuple):
    """The weights of one product, x @ weight + bias."""

    weight: torch.Tensor  # [what goes in, what comes out]
    bias: torch.Tensor | None

    def multiply(self, x: torch.Tensor, output: torch.Tensor) -> None:
        if self.bias is None:
            torch.mm(x, self.weight, out=output)
        else:
            torch.addmm(self.bias, x, self.weight, out=output)


class Layer:
    """A block's linear layers and norms. `weights` is None for a product whose weights lie apart, or that has an
    adapter: then the layers themselves are called."""

    def __init__(self, block: Block) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.heads = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.output, self.gates, self.down = (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)
        self._linear = (*self.heads, *self.output, *self.gates, *self.down)
        self._norms = tuple(_norms_of(block))
        self._pointers = self._read_pointers()
        self.weights = {layers: _weights(layers) for layers in (self.heads, self.output, self.gates, self.down)}
        self.norms = [(as_array(norm.weight.detach()), np.float32(norm.eps)) for norm in self._norms]
        self.types = {parameter.dtype for parameter in self._parameters()}
        self.addresses = self._addresses() if None not in self.weights.values() else None

    def _addresses(self) -> list[int]:
        """The addresses that `_decode_numba` takes, except those of the cache."""
        heads, output, gates, down = (one.weight.data_ptr() for one in self.weights.values())
        bias = self.weights[self.heads].bias
        input_norm, mlp_norm, *of_heads = (norm.weight.data_ptr() for norm in self._norms)
        bias_address = 0 if bias is None else bias.data_ptr()
        return [input_norm, heads, bias_address, *(of_heads or (0, 0)), output, mlp_norm, gates, down]

    def is_of(self, block: Block) -> bool:
        """Whether the block still has these layers, in the same memory."""
        attention, mlp = block.self_attn, block.mlp
        linear = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        linear += (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        return (
            linear == self._linear
            and tuple(_norms_of(block)) == self._norms
            and (self._read_pointers() == self._pointers)
        )

    def _read_pointers(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters()]

    def _parameters(self) -> list[nn.Parameter]:
        parameters = [module.weight for module in (*self._linear, *self._norms)]
        return parameters + [layer.bias for layer in self._linear if layer.bias is not None]


def _norms_of(block: Block) -> list[RMSNorm]:
    attention = block.self_attn
    own = [attention.q_norm, attention.k_norm] if attention.has_norms else []
    return [block.input_layernorm, block.post_attention_layernorm, *own]


def _norms(model: Model) -> list[RMSNorm]:
    return [model.norm, *(norm for block in model.layers for norm in _norms_of(block))]


def _weights(layers: Sequence[nn.Linear]) -> _Weights | None:
    if any(isinstance(layer, LoraLinear) for layer in layers):
        return None
    weight, bias = side_by_side([layer.weight for layer in layers]), None
    if layers[0].bias is not None:
        bias = side_by_side([layer.bias for layer in layers])
        if bias is None:
            return None
    return None if weight is None else _Weights(weight.t(), bias)


class _Rows:
    """A contiguous tensor [T, n], as torch and as the loops see it."""

    def __init__(self, tensor: torch.Tensor, sizes: Sequence[int] = ()) -> None:
        self.tensor, self.array = tensor, as_array(tensor)
        flat = self.array.reshape(-1)
        starts = [0, *accumulate(sizes)][:-1] if sizes else [0]
        self.parts: list[Flat] = [(flat[start:], tensor.shape[1]) for start in starts]  # columns of `sizes` each

    def first(self, count: int) -> _Rows:
        """The first `count` rows."""
        return _Rows(self.tensor[:count])


class _Room:
    """Memory for what a layer's operations give."""

    def __init__(self, num_tokens: int, block: Block, dtype: torch.dtype) -> None:
        self.shape = num_tokens, dtype

        def rows(*sizes: int) -> _Rows:
            return _Rows(torch.empty(num_tokens, sum(sizes), dtype=dtype), sizes)

        attention, mlp = block.self_attn, block.mlp
        size, inner = mlp.down_proj.out_features, mlp.down_proj.in_features
        heads = [layer.out_features for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.normed, self.sums, self.added = rows(size), (rows(size), rows(size)), rows(size)
        self.heads, self.gates, self.inner = rows(*heads), rows(inner, inner), rows(inner)
        self.query = torch.empty(num_tokens, attention.num_heads, attention.head_dim, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------- a step


class _Step:
    """One pass over the blocks."""

    def __init__(self, kept: Kept, model: Model, x: torch.Tensor, context: CachedContext) -> None:
        self._model, self._x, self._context = model, x.contiguous(), context
        self._layers, self._room = kept.layers(model), kept.room(len(x), model, x.dtype)
        self._angles = [angles[:, 0].numpy() for angles in (context.cos, context.sin)]  # [T, d] each
        self._places = context.blocks.numpy(), context.places.numpy()  # [T] each
        self._count, self._turn = len(x), 0

    def run(self, rows: torch.Tensor | None) -> torch.Tensor:
        """[R] int64 -> [R, D]; None: all."""
        sum_, added = _Rows(self._x), None
        for number, layer in enumerate(self._layers):
            sum_ = self._add_norm(sum_, added, layer.norms[0])
            attended = self._attend(number, layer).flatten(1)
            if number == len(self._layers) - 1 and rows is not None and len(rows) < self._count:
                sum_, attended = _Rows(sum_.tensor.index_select(0, rows)), attended.index_select(0, rows)
                self._count = len(rows)
            (added,) = self._multiply(layer, layer.output, attended, self._room.added)
            sum_ = self._add_norm(sum_, added, layer.norms[1])
            inner = self._rows(self._room.inner)
            gates = self._multiply(layer, layer.gates, self._normed, self._room.gates)
            loops.silu_mul_loop(*gates[0], *gates[1], inner.array)
            (added,) = self._multiply(layer, layer.down, inner.tensor, self._room.added)
        norm = self._model.norm
        output = _Rows(torch.empty_like(sum_.tensor))  # new memory, which the next step does not overwrite
        self._add_norm(sum_, added, (as_array(norm.weight.detach()), np.float32(norm.eps)), output)
        return output.tensor

    def _rows(self, rows: _Rows) -> _Rows:
        return rows if len(rows.array) == self._count else rows.first(self._count)

    def _add_norm(
        self, x: _Rows, added: Flat | None, norm: tuple[np.ndarray, np.float32], output: _Rows | None = None
    ) -> _Rows:
        """Write the norm of the sum to `output`, or to the next product's input; return the sum."""
        if output is None:
            output = self._rows(self._room.normed)
            self._normed = output.tensor
        total = self._rows(self._room.sums[self._turn])  # not the one that holds `x`
        weight, eps = norm
        given = x.parts[0]
        loops.norm_loop(*given, *(added or given), weight, output.array, total.array, eps, added is not None)
        if added is None:
            return x
        self._turn ^= 1
        return total

    def _attend(self, number: int, layer: Layer) -> torch.Tensor:  # [T, H, d]
        heads = self._multiply(layer, layer.heads, self._normed, self._room.heads)
        cache = self._context.cache
        memory = as_array(cache.keys[number]), as_array(cache.values[number])
        no_numbers = memory[0][:0, 0, 0, 0]
        (query_norm, eps), (key_norm, _) = layer.norms[2:] or [(no_numbers, np.float32(0))] * 2
        places, query = (*self._angles, *memory, *self._places), self._room.query
        flat = (one for part in heads for one in part)
        loops.rotary_write_loop(*flat, *places, query_norm, key_norm, eps, as_array(query))
        return self._context.read(number, query)

    def _multiply(self, layer: Layer, layers: tuple[nn.Linear, ...], x: torch.Tensor, output: _Rows) -> list[Flat]:
        """[T, n] -> what each of the layers gives."""
        weights = layer.weights[layers]
        if weights is None:
            return [loops.flat(y) for y in (project(x, layers) if len(layers) > 1 else [layers[0](x)])]
        if len(output.array) != len(x):
            output = _Rows(output.tensor[: len(x)], [layer.out_features for layer in layers])
        weights.multiply(x, output.tensor)
        return output.parts
