"""`searchr1 index`: build, import, verify, describe and export the vectors that dense retrieval searches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from searchr1_fast.cli import command_parser
from searchr1_fast.config import RetrievalConfig
from searchr1_fast.console import Console
from searchr1_fast.errors import entry_point

if TYPE_CHECKING:
    from searchr1_fast.retrieval.encoder_bert import BertSettings
    from searchr1_fast.retrieval.encoders import Encoder
    from searchr1_fast.retrieval.index_faiss import FlatFile
    from searchr1_fast.retrieval.index_format import TextColumn
    from searchr1_fast.types import Progress

HASHING = "hashing"
_DIMENSION = RetrievalConfig().hashing_dimension
_NUM_SAMPLES = 32  # rows that an import encodes again
_LEAST_COSINE = 0.99  # fp16 arithmetic stays above 0.9999; a wrong prefix or pooling falls below 0.98


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and run the action."""
    arguments = _parser().parse_args(argv)
    return arguments.action(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "index",
        "searchr1 index build --corpus corpus.jsonl --output corpus.index\n"
        "searchr1 index build --corpus corpus.jsonl --encoder models/bge-small --query-prefix '' --passage-prefix '' "
        "--output corpus.index\n"
        "searchr1 index import part_aa part_ab --corpus wiki-18.jsonl --encoder models/e5-base-v2 "
        "--query-prefix 'query: ' --passage-prefix 'passage: ' --max-length 256 --output wiki.index\n"
        "searchr1 index verify corpus.index",
        "An index is a folder; a run that was killed goes on where it was when it is given again.",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="build|import|verify|info|export")
    build = actions.add_parser("build", help="encode a JSONL corpus", allow_abbrev=False)
    _add_making(build)
    build.add_argument("--dimension", type=int, help=f"of the hashing encoder (default: {_DIMENSION})")
    build.add_argument("--device", help="where a model runs: cpu or cuda (default: cpu)")
    build.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="what a model computes passages in (default: float32)",
    )  # fmt: skip
    build.set_defaults(action=_build)
    importing = actions.add_parser("import", help="take the vectors of a faiss flat file", allow_abbrev=False)
    importing.add_argument("files", metavar="FILE", nargs="+", type=Path, help="the file, or its pieces in order")
    _add_making(importing)
    importing.set_defaults(action=_import)
    verify = actions.add_parser("verify", help="read every byte and compare digests")
    info = actions.add_parser("info", help="what an index holds and how it was made")
    export = actions.add_parser("export", help="write the vectors as a faiss flat file")
    for action, function in ((verify, _verify), (info, _info), (export, _export)):
        action.add_argument("index", metavar="INDEX", type=Path)
        action.set_defaults(action=function)
    export.add_argument("file", metavar="FILE", type=Path)
    return parser


def _add_making(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", metavar="FILE", type=Path, required=True, help="JSONL of passages, .gz allowed")
    parser.add_argument("--output", metavar="INDEX", type=Path, required=True, help="folder to make")
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier run had begun")
    add_encoder(parser, HASHING, "Hugging Face folder (default: %(default)s)")


def add_encoder(parser: argparse.ArgumentParser, default: str | None, help_text: str) -> None:
    """The options that name an encoder and its settings; `encoder_settings` reads the latter."""
    model = parser.add_argument_group("encoder", "What the model's folder says need not be given.")
    model.add_argument("--encoder", metavar="DIR", default=default, help=help_text)
    model.add_argument("--query-prefix", metavar="TEXT", help="before every query, such as 'query: '")
    model.add_argument("--passage-prefix", metavar="TEXT", help="before every passage")
    model.add_argument("--pooling", choices=("mean", "cls"), help="how tokens become one vector")
    model.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="whether vectors have length 1")
    model.add_argument("--max-length", metavar="TOKENS", type=int, help="longer texts are cut")


def encoder_settings(arguments: argparse.Namespace) -> BertSettings:
    """The encoder settings that were given."""
    from searchr1_fast.retrieval.encoder_bert import BertSettings

    names = ("pooling", "normalize", "max_length", "query_prefix", "passage_prefix")
    return BertSettings(**{name: getattr(arguments, name) for name in names})


def _build(arguments: argparse.Namespace) -> int:
    from searchr1_fast.retrieval.encoders import EncodingSource
    from searchr1_fast.retrieval.index_build import build_index

    encoder: Encoder
    if arguments.encoder == HASHING:
        from searchr1_fast.retrieval.encoder_hashing import HashingEncoder

        options = vars(encoder_settings(arguments)) | {"device": arguments.device, "dtype": arguments.dtype}
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is for a model; the hashing encoder has no such thing")
        encoder = HashingEncoder(_DIMENSION if arguments.dimension is None else arguments.dimension)
    else:
        from searchr1_fast.retrieval.encoder_bert import BertEncoder

        if arguments.dimension is not None:
            raise ValueError("--dimension is of the hashing encoder; a model's vectors have the size that it makes")
        settings = encoder_settings(arguments)
        encoder = BertEncoder(arguments.encoder, settings, arguments.device or "cpu", arguments.dtype or "float32")
    ui = Console()
    index = build_index(arguments.output, arguments.corpus, EncodingSource(encoder), ui, arguments.restart)
    ui.note(f"{arguments.output}: {len(index)} passages, {index.dimension} components")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from searchr1_fast.retrieval.encoder_bert import BertEncoder
    from searchr1_fast.retrieval.index_build import build_index
    from searchr1_fast.retrieval.index_faiss import FlatFile

    if arguments.encoder == HASHING:
        raise ValueError("--encoder is missing: the model that the vectors were made with, to encode queries with")
    flat = FlatFile(arguments.files)
    encoder = BertEncoder(arguments.encoder, encoder_settings(arguments))
    ui = Console()
    index = build_index(arguments.output, arguments.corpus, FlatSource(flat, encoder), ui, arguments.restart)
    how = "nothing was lost to fp16" if index.manifest.lossless else "rounded to fp16"
    ui.note(f"{arguments.output}: {len(index)} passages, {index.dimension} components, {how}")
    return 0


class FlatSource:
    """A `VectorSource` over a faiss flat file; it checks that the encoder named made the file."""

    def __init__(self, flat: FlatFile, encoder: Encoder) -> None:
        self._flat, self._encoder = flat, encoder
        self.dimension = flat.dimension
        if encoder.dimension != flat.dimension:
            raise ValueError(
                f"{flat.name} has vectors of {flat.dimension} components, the encoder makes {encoder.dimension}"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The files and the encoder."""
        files = [str(path.resolve()) for path in self._flat.paths]
        return {"encoder": self._encoder.identity, "faiss": files, "metric": self._flat.metric}

    def prepare(self, folder: Path, texts: TextColumn, progress: Progress) -> dict[str, Any]:
        """Refuse a corpus of another length, and a corpus or an encoder that gives other vectors."""
        if len(texts) != self._flat.num_rows:
            raise ValueError(f"{self._flat.name} has {self._flat.num_rows} vectors, the corpus {len(texts)} passages")
        rows = np.unique(np.linspace(0, len(texts) - 1, _NUM_SAMPLES).astype(np.int64))
        made = self._encoder.encode_passages([texts[row] for row in rows.tolist()])
        stored = np.concatenate([self._flat.rows(row, row + 1) for row in rows.tolist()])
        lengths = np.linalg.norm(made, axis=1) * np.linalg.norm(stored, axis=1)
        cosines = (made * stored).sum(axis=1) / np.maximum(lengths, 1e-30)
        if np.median(cosines) < _LEAST_COSINE:
            raise ValueError(
                f"{self._flat.name} was not made from this corpus with this encoder: of {len(rows)} rows encoded again "
                f"the median cosine with what is stored is {np.median(cosines):.3f}; check --passage-prefix, "
                "--pooling, --max-length, and that the corpus is in the order of the vectors"
            )
        progress(len(texts), len(texts))
        return self._encoder.fit(folder, texts, progress)

    def rows(self, begin: int, end: int, texts: TextColumn) -> np.ndarray:
        """[N,D] fp32."""
        return self._flat.rows(begin, end)


def _verify(arguments: argparse.Namespace) -> int:
    from searchr1_fast.retrieval.index_format import open_index

    ui = Console()
    index = open_index(arguments.index)
    with ui.phase("verify") as progress:
        index.verify(progress)
    ui.note(f"{arguments.index} is whole: {len(index)} passages, {len(index.manifest.files)} files")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from searchr1_fast.retrieval.index_format import open_index

    manifest = open_index(arguments.index).manifest
    size = sum(record.num_bytes for record in manifest.files.values())
    rows = {
        "passages": str(manifest.num_rows),
        "components": f"{manifest.dimension} ({manifest.dtype}, {'lossless' if manifest.lossless else 'rounded'})",
        "ids": "the row's number" if manifest.ids == "rows" else "as in the corpus",
        "size": f"{size / 2**20:.1f} MiB in {len(manifest.files)} files",
        **{f"encoder {name}": repr(value) for name, value in manifest.encoder.items()},
        **{f"from {name}": str(value) for name, value in manifest.source.items() if name != "encoder"},
    }
    width = max(map(len, rows))
    ui = Console()
    for name, value in rows.items():
        ui.note(f"{name:<{width}}  {value}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from searchr1_fast.retrieval.index_faiss import export_flat
    from searchr1_fast.retrieval.index_format import open_index

    if arguments.file.exists():
        raise ValueError(f"{arguments.file} exists already; remove it or give another name")
    ui = Console()
    index = open_index(arguments.index)
    with ui.phase("export", len(index)) as progress:
        export_flat(index, arguments.file, progress)
    ui.note(f"{arguments.file}: {len(index)} vectors of {index.dimension} components")
    return 0


if __name__ == "__main__":
    sys.exit(main())
