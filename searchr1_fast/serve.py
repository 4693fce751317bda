"""`searchr1 serve`: serve a corpus or an index over Search-R1's POST /retrieve, to other trainers and to this one."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from searchr1_fast.cli import command_parser
from searchr1_fast.config import RetrievalConfig, load_config
from searchr1_fast.console import Console
from searchr1_fast.errors import entry_point
from searchr1_fast.index import add_encoder, encoder_settings

if TYPE_CHECKING:  # they need numba
    from searchr1_fast.retrieval import Retriever
    from searchr1_fast.retrieval.dense import PassageSource

_TOKEN_VARIABLE = RetrievalConfig().token_variable


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Load the corpus, say where it is served, answer until interrupted."""
    arguments = _parser().parse_intermixed_args(argv)
    if not 0 <= arguments.port < 65536:
        raise ValueError(f"--port {arguments.port}: a port is a number from 0 to 65535")
    first = ["retrieval.backend=bm25"]
    if arguments.index is not None:
        first = ["retrieval.backend=dense", f"retrieval.index={json.dumps(str(arguments.index), ensure_ascii=False)}"]
    elif arguments.web:
        first = ["retrieval.backend=web"]
    config = load_config(None, [*first, *arguments.overrides]).retrieval
    _check_faiss(arguments)

    from searchr1_fast.retrieval import RetrievalServer, open_retriever
    from searchr1_fast.retrieval.protocol import Closes

    ui = Console()
    token = os.environ.get(config.token_variable, "")
    # The port first: a large corpus takes minutes to index, and a port that is taken should be reported before that.
    try:
        server = RetrievalServer(None, arguments.host, arguments.port, config.topk, token)
    except OSError as error:
        where = f"{arguments.host} port {arguments.port}"
        raise ValueError(f"cannot listen on {where}: {error.strerror}; choose another --port") from error
    with server:
        ui.note(f"opening {arguments.index or arguments.corpus or config.web_engine}")
        if arguments.faiss is not None:
            server.retriever = _open_faiss(arguments, config, ui)
        else:
            server.retriever = open_retriever(config, arguments.corpus)
        if not token and not _is_loopback(arguments.host):
            ui.note(f"whoever reaches {arguments.host} may search: set {config.token_variable} to ask for a token")
        ui.note(f"serving POST {server.url} (Ctrl-C ends it)")
        sys.stdout.flush()  # whoever waits for this line may read it through a pipe
        try:
            server.serve_forever()
        finally:
            if isinstance(server.retriever, Closes):
                server.retriever.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "serve",
        "searchr1 serve --corpus corpus.jsonl --port 8000\n"
        "searchr1 serve --index wiki.index\n"
        "SERPER_API_KEY=… searchr1 serve --web retrieval.web_pages=true\n"
        "searchr1 serve --index wiki.index --faiss e5_HNSW64.index --faiss-parameters efSearch=128\n"
        "searchr1 train configs/demo.yaml retrieval.backend=remote 'data={questions: questions.jsonl}' eval.sets={}",
        'A corpus is JSONL, {"id", "contents": "\\"Title\\"\\ntext"} in each row, searched with BM25 unless '
        "retrieval.backend says otherwise; an index (`searchr1 index`) is searched by its vectors. "
        f"If the environment variable {_TOKEN_VARIABLE} is set (retrieval.token_variable names another), requests must "
        "carry it as their bearer token.",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="settings: retrieval.bm25_k1=1.2")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--corpus", metavar="FILE", type=Path, help="JSONL of passages, .gz allowed")
    what.add_argument("--index", metavar="DIR", type=Path, help="an index, which brings its passages")
    what.add_argument("--web", action="store_true", help="a live web search (retrieval.web_engine), with its key")
    parser.add_argument(
        "--faiss", metavar="FILE", type=Path,
        help="search this faiss file of any kind (flat, IVF, HNSW, CAGRA) in place of the index's vectors, or for the "
        "passages of --corpus, then with --encoder; needs faiss",
    )  # fmt: skip
    parser.add_argument("--faiss-parameters", metavar="SETTINGS", default="", help="of its search, as nprobe=64")
    add_encoder(parser, None, "Hugging Face folder that encodes queries, for --faiss with --corpus")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    return parser


def _check_faiss(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that nothing would read."""
    settings = ("query_prefix", "passage_prefix", "pooling", "normalize", "max_length")
    given = [name for name in settings if getattr(arguments, name) is not None]
    if arguments.faiss is None:
        given += [name for name in ("encoder", "faiss_parameters") if getattr(arguments, name)]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} goes with --faiss")
    elif arguments.web:
        raise ValueError("--faiss goes with --index or --corpus")
    elif arguments.index is not None and given:
        raise ValueError(f"--{given[0].replace('_', '-')} is recorded in the index; it is for --faiss with --corpus")


def _open_faiss(arguments: argparse.Namespace, config: RetrievalConfig, ui: Console) -> Retriever:
    """Open a faiss file, with the passages and encoder of an index, or with a corpus and a model."""
    from searchr1_fast.data import read_corpus
    from searchr1_fast.retrieval.batcher import BatchedRetriever
    from searchr1_fast.retrieval.dense import MemoryStore, check_sizes
    from searchr1_fast.retrieval.encoder_bert import BertEncoder
    from searchr1_fast.retrieval.encoders import open_encoder
    from searchr1_fast.retrieval.faiss_search import FaissSearch
    from searchr1_fast.retrieval.index_format import open_index
    from searchr1_fast.retrieval.passages import PassageStore

    store: PassageSource
    if arguments.index is not None:
        index = open_index(arguments.index)
        encoder = open_encoder(index.manifest.encoder, index.folder, arguments.encoder or config.encoder, config.device)
        store = PassageStore(index.folder)
    elif arguments.encoder is not None:
        encoder = BertEncoder(arguments.encoder, encoder_settings(arguments), config.device)
        store = MemoryStore(read_corpus(arguments.corpus))
    else:
        raise ValueError("--encoder is missing: the model that the faiss file's vectors were made with")
    search = FaissSearch(arguments.faiss, encoder, arguments.faiss_parameters)
    check_sizes(search, store)
    ui.note(f"{arguments.faiss}: {len(search):,} vectors, {search.kind}, searched by faiss: {search.mode}")
    return BatchedRetriever(search, store, timeout=config.timeout_seconds)


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; of names, only `localhost` counts."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
