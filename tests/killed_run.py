"""The run that test_kill.py starts and kills: `killed_run.py CONFIG STEP MOMENT FILE` trains.

When the save of STEP reaches MOMENT, a function of checkpoint.py, the save touches FILE and goes no further; training
does. FILE.pid<rank> names the process to kill."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from searchr1_fast import checkpoint
from searchr1_fast.config import load_config
from searchr1_fast.console import Console
from searchr1_fast.train import train


def main() -> None:
    """Train; does not return before it is killed, unless the run ends before that save."""
    path, step, moment, file = sys.argv[1:]
    Path(f"{file}.pid{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    before, begun = getattr(checkpoint, moment), []
    write = checkpoint._write_files

    def note_step(temporary, contents, ranks):
        begun.append(contents.step)
        if moment == "_write_files":
            reached()
        write(temporary, contents, ranks)

    def reached() -> None:
        if begun[-1] == int(step):
            Path(file).touch()
            time.sleep(600)

    def stop(*arguments):
        reached()
        return before(*arguments)

    setattr(checkpoint, moment, stop)
    checkpoint._write_files = note_step
    train(load_config(path), Console(quiet=True))


if __name__ == "__main__":
    main()
