"""The plain twin of `searchr1 serve`: a search server as published ones are written, one search per request.

    python bench/plain_server.py --index wiki.index --port 8000

It is FastAPI with an ordinary function as its endpoint, which its thread pool calls. Each request encodes its queries
and searches for them alone, by faiss `IndexFlatIP` over the vectors in fp32; passages come from a list in memory.
Vectors and encoder are the index's own, so that only the serving differs. It is no straw man: it starts no progress
bars, empties no caches, and its encoder costs tens of microseconds a query.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import faiss
import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from searchr1_fast.retrieval.encoders import open_encoder
from searchr1_fast.retrieval.index_format import TextColumn, open_index


class QueryRequest(BaseModel):
    """A request of the protocol."""

    queries: list[str]
    topk: int = 3
    return_scores: bool = False


def flat_index(folder: Path) -> faiss.IndexFlatIP:
    """Build a faiss index over the vectors of an index of ours."""
    index = open_index(folder)
    flat = faiss.IndexFlatIP(index.dimension)
    for _, part in index.vector_parts():
        for begin in range(0, len(part), 65536):
            flat.add(np.asarray(part[begin : begin + 65536], dtype=np.float32))
    return flat


def application(folder: Path) -> FastAPI:
    """Make the server over an index."""
    index = open_index(folder)
    encoder = open_encoder(index.manifest.encoder, index.folder)
    encoder.encode_queries(["compiles"])
    flat = flat_index(folder)
    texts = TextColumn(folder, "passages")
    corpus = [{"id": str(row), "contents": texts[row]} for row in range(len(index))]
    app = FastAPI()

    @app.post("/retrieve")
    def retrieve(request: QueryRequest) -> dict:
        scores, rows = flat.search(encoder.encode_queries(request.queries), request.topk)
        results = []
        for own_rows, own_scores in zip(rows.tolist(), scores.tolist(), strict=True):
            documents = [corpus[row] for row in own_rows]
            if request.return_scores:
                pairs = zip(documents, own_scores, strict=True)
                documents = [{"document": document, "score": score} for document, score in pairs]
            results.append(documents)
        return {"result": results}

    return app


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(prog="plain_server.py", allow_abbrev=False, description=__doc__)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    uvicorn.run(application(arguments.index), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
