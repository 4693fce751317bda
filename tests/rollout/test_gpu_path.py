"""What the engine does on a GPU, on any machine: `engine_interpreted.py`, in a process of its own."""

from __future__ import annotations

from pathlib import Path

from test_triton import run_in_the_interpreter


def test_rollouts_in_tritons_interpreter():
    run_in_the_interpreter(Path(__file__).with_name("engine_interpreted.py"))
