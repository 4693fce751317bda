"""Encoders of the BERT family (E5, BGE, MiniLM, …) from a Hugging Face folder, without padding and without a last-bit
dependence on the batch.

How a text becomes a vector is read from the folder, in the files that sentence-transformers writes (`modules.json`,
the pooling module's `config.json`, `sentence_bert_config.json`, `prompts` in `config_sentence_transformers.json`), or
given explicitly; what neither says is asked for. The original adds prefixes if the model's name contains "e5", and an
index built under another name silently loses them.

Texts are sorted by length and laid end to end, so no token is padding. Why a vector does not depend on the batch:

- Products of tokens with weights run in tiles of a fixed number of tokens (the last filled up with zeros), always the
  same library call on the same shape. A library chooses its order of summation by shape, and fp32 MKL on this project's
  machines gives other last bits for 1 and 2 rows than for 4 and more.
- Attention runs over all texts of one length at once, [texts, heads, length, size], each matrix by itself; on a GPU by
  `searchr1_kernels.cached_attention`, in which a token's arithmetic is a function of its text.
- Everything else (normalisation, activation, pooling) is computed for each token or text by itself.

Larger tiles are faster (weights are read less often), so a second tile size is used if a probe at load time finds its
rows bit for bit equal to the small tile's. Equal bits hold on one machine with one number of threads.

On a GPU a pass is one launch, recorded once per number of tokens (recorded_encoder.py).

Left out: relative positions, other architectures.

Shape legend
    N  texts    T  tokens of a batch, end to end    H  hidden size    D = H  components
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from searchr1_kernels import cached_attention

from searchr1_fast.retrieval.encoder_folder import (
    FAMILY,
    BertSettings,
    Pooling,
    complete_settings,
    file_digest,
    read_json,
    read_tokenizer,
    read_weights,
    weights_file,
)
from searchr1_fast.retrieval.encoder_weights import Taker
from searchr1_fast.retrieval.encoders import check_device
from searchr1_fast.retrieval.index_format import TextColumn
from searchr1_fast.retrieval.parking import ParkedMemory
from searchr1_fast.retrieval.recorded_encoder import CudaRecordedForward, PackedTexts, RecordedForward
from searchr1_fast.types import Progress

DType = Literal["float32", "bfloat16", "float16"]

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
_TOKENS_AT_ONCE = 8192
_TEXTS_AT_ONCE = 8192  # texts whose token ids are in memory at a time
_SMALL_TILE = {"cpu": 32, "cuda": 256}
_LARGE_TILE = {"cpu": 256, "cuda": 8192}


class BertEncoder:
    """Encodes texts. Safe to call from several threads (a call changes nothing), except to park, which needs all other
    calls to have ended. On a GPU it can be parked (`protocol.Parks`): its weights and the working memory of recorded
    passes are freed."""

    def __init__(
        self,
        folder: str | Path,
        settings: BertSettings = BertSettings(),  # noqa: B008 (frozen)
        device: str = "cpu",
        dtype: DType = "float32",
    ) -> None:
        self.dtype = dtype
        self.folder = Path(folder)
        self.settings = complete_settings(self.folder, settings)
        self._config = read_json(self.folder / "config.json", required=True)
        self._tokenizer = read_tokenizer(self.folder, self.settings.max_length)
        weights = weights_file(self.folder)
        self._digests = {
            "weights": file_digest(weights),
            "tokenizer": file_digest(self.folder / "tokenizer.json"),
            "config": file_digest(self.folder / "config.json"),
        }
        place = torch.device(check_device(device))  # with its number: searching threads have another current device
        self._model = _Bert(self._config, read_weights(weights), place, getattr(torch, dtype), self.folder)
        self.dimension = self._model.hidden_size
        self._recorded: RecordedForward | None = None
        self._memory: ParkedMemory | None = None  # none on a CPU
        if place.type == "cuda":
            self._memory = ParkedMemory(self._model.tensors, [], place)
        if place.type == "cuda" and find_spec("triton"):
            forward = partial(self._model.pooled_packed, pooling=self.settings.pooling)
            self._recorded = CudaRecordedForward(forward, place, _SMALL_TILE["cuda"], _TOKENS_AT_ONCE)
            self._recorded.record()

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, settings, and digests of weights, tokenizer and configuration. Not the folder: models move."""
        return {
            "kind": "bert",
            "dimension": self.dimension,
            "dtype": self.dtype,
            "pooling": self.settings.pooling,
            "normalize": self.settings.normalize,
            "max_length": self.settings.max_length,
            "query_prefix": self.settings.query_prefix,
            "passage_prefix": self.settings.passage_prefix,
            **self._digests,
        }

    @classmethod
    def open(cls, record: dict[str, Any], folder: str | Path | None, device: str = "cpu") -> BertEncoder:
        """Open the encoder of an index: settings as recorded, and a model that is the recorded one to the byte.

        It computes in fp32, whatever the passages were encoded in: queries are few.
        """
        folder = Path(record["path"] if folder is None else folder)
        if not folder.is_dir():
            raise ValueError(
                f"the index was built with the model in {folder}, which is not there; say where it is now "
                "(retrieval.encoder)"
            )
        names = ("pooling", "normalize", "max_length", "query_prefix", "passage_prefix")
        encoder = cls(folder, BertSettings(**{name: record[name] for name in names}), device)
        for name, value in encoder.identity.items():
            if name != "dtype" and record.get(name) != value:
                raise ValueError(f"{folder} is not the model that the index was built with: its {name} differs")
        return encoder

    def fit(self, folder: Path, texts: TextColumn, progress: Progress) -> dict[str, Any]:
        """Return the record for the manifest; nothing is learned from the corpus."""
        return self.identity | {"path": str(self.folder.resolve())}

    @property
    def is_parked(self) -> bool:
        """Whether its memory is lent to others."""
        return self._memory is not None and self._memory.is_parked

    def park(self) -> None:
        """Give its memory to others. Waits for the current stream, which must be the one that encoding used. Nothing if
        parked already. ValueError, with nothing parked, if the machine does not lock that much host memory."""
        if self._memory is not None and not self.is_parked:
            if self._recorded is not None:
                self._recorded.forget()
            try:
                self._memory.park()
            except ValueError:  # the weights are where they were
                if self._recorded is not None:
                    self._recorded.record_again()
                raise

    def unpark(self) -> None:
        """Take the memory back. Copies are queued on the current stream, which encoding must then use. Does nothing if
        not parked. If there is not enough memory (torch.OutOfMemoryError), it stays parked."""
        if self._memory is not None and self.is_parked:
            self._memory.unpark()
            if self._recorded is not None:
                self._recorded.record_again()

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """[N,D] fp32."""
        assert self.settings.query_prefix is not None
        return self._encode([self.settings.query_prefix + query for query in queries])

    def encode_passages(self, contents: Sequence[str]) -> np.ndarray:
        """[N,D] fp32."""
        assert self.settings.passage_prefix is not None
        return self._encode([self.settings.passage_prefix + text for text in contents])

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for begin in range(0, len(texts), _TEXTS_AT_ONCE):
            # A policy's bytes may decode to lone surrogates, which are not valid Unicode: the tokenizer would refuse.
            part = [text.encode("utf-8", "replace").decode() for text in texts[begin : begin + _TEXTS_AT_ONCE]]
            token_ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(part)]
            lengths = np.array([len(ids) for ids in token_ids])
            order = np.argsort(lengths, kind="stable")
            # A text without tokens (possible if the tokenizer adds none of its own) has no mean and no first token. Its
            # vector is zero, like the hashing encoder's for a text without words: every row scores the same.
            order = order[np.count_nonzero(lengths == 0) :]
            vectors[begin : begin + len(part)][lengths == 0] = 0.0
            for rows in _batches(order, token_ids):
                pooled = self._pooled([token_ids[row] for row in rows])
                if self.settings.normalize:
                    pooled = F.normalize(pooled, dim=1)
                vectors[begin + rows] = pooled.numpy()
        return vectors

    def _pooled(self, token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """[N,H] fp32 on the host, for texts in order of length."""
        if self._recorded is not None:
            return self._recorded.pooled(token_ids)
        return self._model.pooled(token_ids, self.settings.pooling).cpu()


def _batches(order: np.ndarray, token_ids: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Cut rows [N] into batches of at most _TOKENS_AT_ONCE tokens."""
    begin = tokens = 0
    for place, row in enumerate(order):
        length = len(token_ids[row])
        if tokens and tokens + length > _TOKENS_AT_ONCE:
            yield order[begin:place]
            begin, tokens = place, 0
        tokens += length
    if begin < len(order):
        yield order[begin:]


# --------------------------------------------------------------------------------------------------------- the model


class _Bert:
    """The forward pass over tokens laid end to end."""

    def __init__(
        self,
        config: dict[str, Any],
        weights: dict[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        _check_config(config, folder)
        self.hidden_size: int = config["hidden_size"]
        self._heads: int = config["num_attention_heads"]
        self._eps: float = config.get("layer_norm_eps", 1e-12)
        self._activation = _ACTIVATIONS[config["hidden_act"]]
        self._first_position = (config["pad_token_id"] + 1) if FAMILY[config["model_type"]] else 0
        self._device = device
        take = Taker(weights, device, dtype, folder)
        words, types = take("embeddings.word_embeddings.weight"), take("embeddings.token_type_embeddings.weight")
        self._words = words
        # One text, so every token is of the first type.
        self._positions = take("embeddings.position_embeddings.weight") + types[0]
        self._embedding_norm = take.norm("embeddings.LayerNorm")
        self._layers = [take.layer(f"encoder.layer.{number}.") for number in range(config["num_hidden_layers"])]
        self._small = _SMALL_TILE[device.type]
        self._large = self._probe(_LARGE_TILE[device.type])

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Its weights."""
        layers = (tensor for layer in self._layers for tensor in layer.tensors)
        return [self._words, self._positions, *self._embedding_norm, *layers]

    @torch.inference_mode()
    def pooled(self, token_ids: Sequence[Sequence[int]], pooling: Pooling | None) -> torch.Tensor:
        """[N,H] fp32 for texts in order of length."""
        lengths = [len(ids) for ids in token_ids]
        padding = [0] * (-sum(lengths) % self._small)
        flat = torch.tensor([token for ids in token_ids for token in ids] + padding, device=self._device)
        places = [place for length in lengths for place in range(length)]
        positions = torch.tensor(places + padding, device=self._device)
        groups = _groups(lengths)
        hidden = self._hidden(flat, positions, partial(self._attend, groups=groups))
        pooled = []
        for begin, count, length in groups:
            states = hidden[begin : begin + count * length].view(count, length, -1).float()
            pooled.append(states[:, 0] if pooling == "cls" else states.sum(1) / length)
        return torch.cat(pooled)

    @torch.inference_mode()
    def pooled_packed(self, texts: PackedTexts, pooling: Pooling | None) -> torch.Tensor:
        """[S,H] fp32 for texts in any order: a fixed list of launches for each number of rows and of places."""
        # A text's keys are the rows from its first on: each row begins a slot of the cache, and slots overlap.
        longest, heads, width = self._positions.shape[0], self._heads, self.hidden_size
        num_rows, size, tiles = len(texts.token_ids), width // heads, texts.tiles.int()

        def from_each_row(rows: torch.Tensor, component: int) -> torch.Tensor:  # [·,·] -> [T, heads, longest, size]
            stride = rows.shape[1]
            return rows.as_strided((num_rows, heads, longest, size), (stride, size, stride, 1), component)

        def attend(packed: torch.Tensor) -> torch.Tensor:  # [T + longest - 1, 3H] -> [T, H]
            query = packed[:num_rows, :width].view(num_rows, heads, size)
            keys, values = from_each_row(packed, width), from_each_row(packed, 2 * width)
            return cached_attention(query, keys, values, texts.firsts, texts.lasts, tiles=tiles).flatten(1)

        hidden = self._hidden(texts.token_ids, texts.positions, attend, longest - 1)
        if pooling == "cls":
            return hidden[texts.text_firsts].float()
        # A mean is attention with equal weights, whose order of summation depends on the text alone.
        states = hidden.new_empty(num_rows + longest - 1, width, dtype=torch.float32)
        states[:num_rows] = hidden
        alike, values = states.new_zeros(len(texts.text_firsts), heads, size), from_each_row(states, 0)
        return cached_attention(alike, values, values, texts.text_firsts, texts.text_lasts).flatten(1)

    def _hidden(
        self,
        token_ids: torch.Tensor,  # [T] int64, T a multiple of the small tile
        positions: torch.Tensor,  # [T] int64
        attend: Callable[[torch.Tensor], torch.Tensor],  # [T + spare_rows, 3H] -> [T, H]
        spare_rows: int = 0,
    ) -> torch.Tensor:  # [T, H]
        hidden = self._words[token_ids] + self._positions[positions + self._first_position]
        hidden = self._norm(hidden, self._embedding_norm)
        # Intermediates have no names: one with a name would live through the next layer, for half as much memory again.
        for layer in self._layers:
            hidden = self._norm(
                hidden + self._linear(attend(self._linear(hidden, *layer.qkv, spare_rows)), *layer.output), layer.norm
            )
            hidden = self._norm(
                hidden + self._linear(self._activation(self._linear(hidden, *layer.up)), *layer.down), layer.last_norm
            )
        return hidden

    def _attend(self, packed: torch.Tensor, groups: list[tuple[int, int, int]]) -> torch.Tensor:
        """[T,3H] -> [T,H]."""
        mixed = packed.new_zeros(packed.shape[0], self.hidden_size)
        for begin, count, length in groups:
            part = slice(begin, begin + count * length)
            shaped = packed[part].view(count, length, 3, self._heads, -1)
            query, key, value = (shaped[:, :, which].transpose(1, 2) for which in range(3))
            found = F.scaled_dot_product_attention(query, key, value)  # [count, heads, length, size]
            mixed[part] = found.transpose(1, 2).reshape(count * length, -1)
        return mixed

    def _linear(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, spare_rows: int = 0
    ) -> torch.Tensor:
        """inputs [T,·], T a multiple of the small tile; weight [in, out], bias [out] -> [T + spare_rows, out], whose
        spare rows are not written."""
        outputs = inputs.new_empty(inputs.shape[0] + spare_rows, weight.shape[1])
        begin = 0
        while begin < inputs.shape[0]:
            tile = self._large if inputs.shape[0] - begin >= self._large else self._small
            part = slice(begin, begin + tile)
            torch.addmm(bias, inputs[part], weight, out=outputs[part])
            begin += tile
        return outputs

    def _norm(self, hidden: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(hidden, (self.hidden_size,), *norm, self._eps)

    @torch.inference_mode()
    def _probe(self, large: int) -> int:
        """The large tile if its rows equal the small tile's to the bit, for this model's shapes on this machine; else
        the small one."""
        self._large = self._small
        generator = torch.Generator().manual_seed(0)
        for weight, bias in self._layers[0].products if self._layers else ():
            inputs = torch.randn(large, weight.shape[0], generator=generator).to(self._device, weight.dtype)
            if not torch.equal(self._linear(inputs, weight, bias), torch.addmm(bias, inputs, weight)):
                return self._small
        return large


def _groups(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first token, number of texts, length of each) for runs of equally long texts, given in order of length."""
    groups: list[tuple[int, int, int]] = []
    token = 0
    for length in lengths:
        if groups and groups[-1][2] == length:
            begin, count, _ = groups[-1]
            groups[-1] = (begin, count + 1, length)
        else:
            groups.append((token, 1, length))
        token += length
    return groups


def _check_config(config: dict[str, Any], folder: Path) -> None:
    kind = config.get("model_type")
    if kind not in FAMILY:
        raise ValueError(f"{folder} holds a model of type {kind!r}; encoders may be {', '.join(FAMILY)}")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{folder}: positions of type {config['position_embedding_type']!r} are not implemented")
    if config.get("hidden_act") not in _ACTIVATIONS:
        raise ValueError(f"{folder}: the activation {config.get('hidden_act')!r} is not implemented")
