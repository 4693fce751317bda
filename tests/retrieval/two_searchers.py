"""Run by test_sharded_rows.py on two ranks: they search an index together, each when it likes, then one dies."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from searchr1_fast.config import load_config
from searchr1_fast.console import Console
from searchr1_fast.distributed import process
from searchr1_fast.environment import build_environments
from searchr1_fast.retrieval.protocol import RetrievalError

TURNS = (12, 3)


def main() -> None:
    """Rank 0 writes rank0.json; rank 1 ends with status 77, as if killed."""
    folder = Path(sys.argv[1])
    queries = json.loads((folder / "queries.json").read_text())
    settings = [
        f"data={{questions: {folder / 'questions.jsonl'}}}",
        "eval.sets={}",
        "retrieval.backend=dense",
        f"retrieval.index={folder / 'index'}",
        "retrieval.timeout_seconds=60",
    ]
    with process("cpu", num_threads=1) as ranks:
        ui = Console(quiet=not ranks.is_main)
        together = build_environments(load_config(None, settings), ranks, ui)[0].retriever
        alone = build_environments(load_config(None, [*settings, "retrieval.sharded=false"]), ranks, ui)[0].retriever
        equal = True
        for turn in range(TURNS[ranks.rank]):
            mine = queries[turn : turn + 1 + 5 * ranks.rank]
            equal &= together.search(mine, 3 + turn) == alone.search(mine, 3 + turn)
        # A rank that has finished its turns waits here, in a collective, and still answers the other.
        reports = ranks.gather((TURNS[ranks.rank], equal))
        if ranks.rank == 1:
            os._exit(77)
        report = {"turns": [turns for turns, _ in reports], "equal": [equal for _, equal in reports]}
        report["error"] = fails(together, queries)
        (folder / "rank0.json").write_text(json.dumps(report))
        os._exit(0)  # the group has lost its other rank, for which an orderly exit would wait


def fails(retriever, queries: list[str]) -> bool:
    """Whether searches soon end in an error that names the rank, after it is gone."""
    for attempt in range(600):
        try:
            retriever.search([f"{queries[0]} {attempt}"], 3)  # nothing that is cached
        except RetrievalError as error:
            return "rank 1 is gone" in str(error)
        time.sleep(0.05)
    return False


if __name__ == "__main__":
    main()
