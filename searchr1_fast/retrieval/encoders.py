"""Text to vectors: the `Encoder` protocol, and reopening the encoder that an index was built with.

    encoder_bert.py     any Hugging Face folder of the BERT family: E5, BGE, MiniLM (settings: encoder_folder.py)
    encoder_hashing.py  no model: words hashed into signed components, weighted by the corpus

An index records its encoder completely (kind, prefixes, pooling, digests of weights and tokenizer), so that a query is
encoded as the passages were, or refused in one sentence. Nothing is inferred from a model's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from searchr1_fast.retrieval.index_format import TextColumn
from searchr1_fast.types import Progress


class Encoder(Protocol):
    """Turns texts into vectors. A vector is a function of its text alone: the batch and its order change no bit."""

    dimension: int

    @property
    def identity(self) -> dict[str, Any]:
        """What the vectors depend on, as JSON. Vectors of equal identities may be compared."""
        ...

    def fit(self, folder: Path, texts: TextColumn, progress: Progress) -> dict[str, Any]:
        """Learn from the corpus what there is to learn, keep it in `folder`, and return the record for the manifest."""
        ...

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """[len(queries), D] fp32."""
        ...

    def encode_passages(self, contents: Sequence[str]) -> np.ndarray:
        """[len(contents), D] fp32; `contents` as the corpus has them, title and text."""
        ...


class EncodingSource:
    """A `VectorSource` that encodes the corpus."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.dimension = encoder.dimension

    @property
    def identity(self) -> dict[str, Any]:
        """The encoder's identity."""
        return {"encoder": self.encoder.identity}

    def prepare(self, folder: Path, texts: TextColumn, progress: Progress) -> dict[str, Any]:
        """Fit the encoder to the corpus."""
        return self.encoder.fit(folder, texts, progress)

    def rows(self, begin: int, end: int, texts: TextColumn) -> np.ndarray:
        """[N,D] fp32."""
        return self.encoder.encode_passages(texts.slice(begin, end))


def check_device(device: str) -> str:
    """`device` with its number, if it exists: `cuda` alone may mean another device in another thread."""
    import torch

    place = torch.device(device)
    if place.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"there is no device {device} on this machine: torch finds no CUDA GPU; use cpu")
    number = torch.cuda.current_device() if place.index is None else place.index
    if number >= torch.cuda.device_count():
        raise ValueError(f"there is no device {device} on this machine: its GPUs are {torch.cuda.device_count()}")
    return f"cuda:{number}"


def open_encoder(record: dict[str, Any], folder: Path, path: str | Path | None = None, device: str = "cpu") -> Encoder:
    """The encoder of an index in `folder` whose manifest holds `record`.

    `path`: where the model is now, if it has moved since the index was built. ValueError if it is another model.
    """
    kind = record.get("kind")
    if kind == "hashing":
        from searchr1_fast.retrieval.encoder_hashing import HashingEncoder

        if path is not None:
            raise ValueError(f"{folder} was built with the hashing encoder, which has no model; leave the encoder out")
        return HashingEncoder.open(record, folder)
    if kind == "bert":
        from searchr1_fast.retrieval.encoder_bert import BertEncoder

        return BertEncoder.open(record, path, device)
    raise ValueError(f"{folder} was built with an encoder of kind {kind!r}, which this program does not know")
