"""Compile csrc/*.cu for a GPU that is not present, and report what each function needs of it, as JSON.

    python tests/csrc/cuda_report.py --arch sm_90

It calls NVRTC by ctypes, from the wheel `nvidia-cuda-nvrtc` (58 MB, which the tests' extra brings, and torch's builds
for GPUs do). CuPy is 70 MB more and needs the same wheel. Without that wheel the report is `null`.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from searchr1_fast.retrieval.device_code import OPTIONS, cuda_source

CSRC = Path(__file__).parents[2] / "csrc"


@cache
def library() -> ctypes.CDLL | None:
    """-> libnvrtc, or None if it is not installed."""
    package = importlib.util.find_spec("nvidia")
    folders = [] if package is None else [Path(folder) for folder in package.submodule_search_locations or ()]
    found = [path for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.*[0-9]"))]
    if not found:
        return None
    for path in found[-1].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(path))  # NVRTC 13.0 opens it by its bare name, and does not search a wheel's folders
    return ctypes.CDLL(str(found[-1]))


def compile_cuda(source: str, architecture: str, options: Sequence[str]) -> tuple[bytes, str]:
    """-> (cubin, the log of ptxas). Raises ValueError with the compiler's message if it does not compile."""
    nvrtc = library()
    assert nvrtc is not None
    program = ctypes.c_void_p()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"source.cu", 0, None, None))
    try:
        words = [word.encode() for word in (f"-arch={architecture}", *options, "-Xptxas=-v")]
        result = nvrtc.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
        log = fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if result != 0:
            raise ValueError(log)
        return fetch(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def needs(log: str) -> dict[str, dict[str, int]]:
    """-> registers per thread, and bytes of stack and of spills, for each function that ptxas reports."""
    patterns = {"registers": r"Used (\d+) registers", "stack": r"(\d+) bytes stack", "spill": r"(\d+) bytes spill"}
    report = {}
    for part in log.split("Compiling entry function '")[1:]:
        found = {name: re.search(pattern, part) for name, pattern in patterns.items()}
        assert all(found.values()), f"ptxas says it in other words now: {log}"
        report[part.partition("'")[0]] = {name: int(match.group(1)) for name, match in found.items()}
    return report


def fetch(size_of, copy, program: ctypes.c_void_p) -> bytes:
    """-> what NVRTC returns by a pair of calls for its size and its copy."""
    size = ctypes.c_size_t()
    check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    check(copy(program, buffer))
    return buffer.raw


def check(result: int) -> None:
    """Raise unless a call of NVRTC returned 0, which means success."""
    if result != 0:
        raise RuntimeError(f"NVRTC failed with {result}")


def main() -> None:
    """Print the report of every source, by file."""
    parser = argparse.ArgumentParser(description="What csrc/*.cu needs of a GPU.")
    parser.add_argument("--arch", default="sm_90", help="sm_80, sm_90, sm_100, … (default: sm_90)")
    architecture = parser.parse_args().arch
    report = None
    if library() is not None:
        report = {}
        for path in sorted(CSRC.glob("*.cu")):
            cubin, log = compile_cuda(cuda_source(path.stem), architecture, OPTIONS)
            assert cubin.startswith(b"\x7fELF")
            report[path.stem] = {"functions": needs(log), "warnings": log.count("warning")}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
