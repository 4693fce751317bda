"""Shared by the tests of the commands: where the program is, a small corpus with questions, how an error is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import searchr1_fast

ROOT = Path(searchr1_fast.__file__).parent.parent
OURS = ["train", "eval", "ask", "data", "index", "serve", "replay", "report"]
CORPUS = [
    {"id": "1", "contents": '"Ann"\nAnn was born in Arden [bold].'},
    {"id": "2", "contents": '"Arden"\nArden was founded by Bela.'},
]
QUESTIONS = [
    {"id": "a", "question": "Where was Ann born?", "golden_answers": ["Arden"], "type": "1-hop"},
    {"id": "b", "question": "Who founded Ann's place of birth?", "golden_answers": ["Bela"], "type": "2-hop"},
]
SMALL = ("rollout.max_turn_tokens=8", "rollout.max_searches=1", "rollout.max_sequence_tokens=400", "run.device=cpu")


def environment(**changes: str) -> dict[str, str]:
    """-> variables for a process that finds this package; packages beside the interpreter's own are still found."""
    folders = (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))} | changes


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one_sentence(error: str) -> str:
    """-> the single line on stderr, without its prefix."""
    assert error.count("\n") == 1, error
    assert error.startswith("searchr1: error: "), error
    return error.removeprefix("searchr1: error: ").rstrip("\n")
