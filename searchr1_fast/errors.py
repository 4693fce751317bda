"""User errors become one sentence and an exit code; everything else keeps its traceback.

The house rule makes this possible: ValueError is for the user (a bad key, a missing file, a malformed row), assert is
for ourselves. Every command's `main` has `@entry_point`, so the rule holds for `searchr1 X` and for
`python -m searchr1_fast.X` alike. SEARCHR1_DEBUG=1 lets every traceback through.

    exit code 0   done
              2   the user can fix it: the sentence says how
              130 interrupted
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

USER_ERROR = 2
INTERRUPTED = 130


def entry_point(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's `main(argv=None)`: returns its exit code, or that of the user error that ended it."""

    @functools.wraps(main)
    def guarded(*args, **kwargs) -> int:
        try:
            code = main(*args, **kwargs) or 0
            sys.stdout.flush()  # here, where a closed pipe can still be handled
            return code
        except KeyboardInterrupt:
            if debugging():
                raise
            _say("interrupted")
            return INTERRUPTED
        except BrokenPipeError:
            # The reader (`| head`) has gone; point stdout elsewhere so that the interpreter's last flush cannot fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            if debugging() or not isinstance(error, _user_errors()):
                raise
            _say(f"error: {sentence(error)}")
            return USER_ERROR

    return guarded


def debugging() -> bool:
    """Whether SEARCHR1_DEBUG asks for tracebacks."""
    return os.environ.get("SEARCHR1_DEBUG", "") not in ("", "0")


def sentence(error: BaseException) -> str:
    """The error's message on one line. An OSError names its file first."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror.lower()}"
    text = " ".join(str(error).split())
    return text or f"{type(error).__name__} without a message"


def _user_errors() -> tuple[type[Exception], ...]:
    """Errors that the user can fix. SearchError is not imported for this: if nothing imported it, nothing raised it."""
    types = sys.modules.get("searchr1_fast.types")
    return (ValueError, OSError) if types is None else (ValueError, OSError, types.SearchError)


def _say(text: str) -> None:
    """Print one line on stderr; under torchrun, with the rank."""
    rank = os.environ.get("RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    prefix = f"[rank {rank}] " if rank is not None else ""
    print(f"{prefix}searchr1: {text}", file=sys.stderr, flush=True)
