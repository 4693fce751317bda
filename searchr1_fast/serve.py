"""`searchr1 serve`: a corpus or an index behind Search-R1's POST /retrieve, for other trainers and for this one."""

from __future__ import annotations

import ipaddress
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from searchr1_fast.cli import command_parser
from searchr1_fast.config import RetrievalConfig, load_config
from searchr1_fast.console import Console
from searchr1_fast.errors import entry_point

_TOKEN_VARIABLE = RetrievalConfig().token_variable


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Load the corpus, say where it is served, answer until interrupted."""
    parser = command_parser(
        "serve",
        "searchr1 serve --corpus corpus.jsonl --port 8000\n"
        "searchr1 serve --index wiki.index\n"
        "searchr1 train configs/demo.yaml retrieval.backend=remote 'data={questions: questions.jsonl}' eval.sets={}",
        'A corpus is JSONL, {"id", "contents": "\\"Title\\"\\ntext"} in each row, searched with BM25 unless '
        "retrieval.backend says otherwise; an index (`searchr1 index`) is searched by its vectors. "
        f"If the environment variable {_TOKEN_VARIABLE} is set (retrieval.token_variable names another), requests must "
        "carry it as their bearer token.",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings: retrieval.bm25_k1=1.2")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--corpus", metavar="FILE", type=Path, help="JSONL of passages, .gz allowed")
    what.add_argument("--index", metavar="DIR", type=Path, help="an index, which brings its passages")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    if not 0 <= arguments.port < 65536:
        raise ValueError(f"--port {arguments.port}: a port is a number from 0 to 65535")
    first = ["retrieval.backend=bm25"]
    if arguments.index is not None:
        first = ["retrieval.backend=dense", f"retrieval.index={json.dumps(str(arguments.index), ensure_ascii=False)}"]
    config = load_config(None, [*first, *arguments.overrides]).retrieval

    from searchr1_fast.retrieval import RetrievalServer, open_retriever
    from searchr1_fast.retrieval.protocol import Closes

    ui = Console()
    token = os.environ.get(config.token_variable, "")
    # The port first: a large corpus takes minutes to index, and a port that is taken should be known before.
    try:
        server = RetrievalServer(None, arguments.host, arguments.port, config.topk, token)
    except OSError as error:
        where = f"{arguments.host} port {arguments.port}"
        raise ValueError(f"cannot listen on {where}: {error.strerror}; choose another --port") from error
    with server:
        ui.note(f"opening {arguments.index or arguments.corpus}")
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


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; a name counts if it is `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
