"""csrc/*.cu: compiled for every GPU without one; run on a CPU against the C++ twin; on a GPU, where there is one."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("searchr1_fast._C", reason="the batcher is not compiled")

from searchr1_fast.retrieval import hit_merge
from searchr1_fast.retrieval.hit_merge import DeviceMerge, HostMerge, compare_merges, example_hits
from searchr1_fast.retrieval.staging import CpuCopies

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUDGET = {"merge": ("merge_hits", 48)}  # function, registers per thread; nothing may spill


def test_every_source_has_a_budget():
    assert {path.stem for path in CSRC.glob("*.cu")} == set(BUDGET)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_they_compile_for_every_gpu(architecture):
    """In a process of its own, as the compiler is 150 MB."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, HERE / "cuda_report.py", "--arch", architecture]
    done = run(command, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    if report is None:
        pytest.skip("there is no NVRTC: pip install nvidia-cuda-nvrtc")
    for name, (function, registers) in BUDGET.items():
        assert report[name]["warnings"] == 0
        needed = report[name]["functions"][function]
        assert needed["registers"] <= registers and needed["stack"] == needed["spill"] == 0, needed


# ---------------------------------------------------------------------------------------------------- on this machine


def run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def build(output: Path, *flags: str) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    every = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-pthread", f"-I{CSRC}", *flags]
    built = run([compiler, *every, HERE / "merge_on_cpu.cpp", "-o", output])
    if built.returncode != 0 and "-fsanitize=thread" in flags and "tsan" in built.stderr:
        pytest.skip(f"{compiler} cannot build with ThreadSanitizer")
    assert built.returncode == 0 and "warning" not in built.stderr, built.stderr


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> DeviceMerge:
    """-> the class that drives the kernel, running the kernel's own source on a CPU."""
    path = tmp_path_factory.mktemp("library") / "merge.so"
    build(path, "-shared", "-fPIC")
    kernel = ctypes.CDLL(str(path)).launch_merge
    types = {np.uint64: ctypes.c_void_p, np.int64: ctypes.c_longlong, np.int32: ctypes.c_int}

    def launch(num_blocks, num_threads, shared_bytes, arguments):
        assert shared_bytes <= hit_merge.SHARED_BYTES
        kernel(num_blocks, 16, *(types[type(value)](value.item()) for value in arguments))  # 128 threads take too long

    return DeviceMerge(launch, CpuCopies(), lambda: None)


def merged(merge, bodies: list[bytes], num_queries: int, widths: list[int], k: int):
    for room, body in zip(merge.rooms(num_queries, widths), bodies, strict=True):
        room[:] = body
    return merge.merge(k)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_queries=st.integers(0, 3),
    widths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    k=st.integers(1, 40),
    num_levels=st.sampled_from([1, 3, 1000]),
)
def test_the_kernel_finds_what_its_twin_finds(emulated, seed, num_queries, widths, k, num_levels):
    """Few levels make many ties, which rows decide; also k above the number of hits, and parts without a hit."""
    generator = np.random.default_rng(seed)
    bodies = []
    for part, width in enumerate(widths):
        rows = np.stack([generator.permutation(100)[:width] for _ in range(num_queries)] or [np.empty(width)])
        rows = rows[:num_queries].astype(np.int64) + part * 2**40
        scores = (generator.integers(-num_levels, num_levels, rows.shape) / 8).astype(np.float32)
        order = np.lexsort((rows, -scores), axis=1)
        rows, scores = (np.take_along_axis(array, order, axis=1) for array in (rows, scores))
        bodies.append(rows.tobytes() + scores.tobytes())
    found, wanted = (merged(merge, bodies, num_queries, widths, k) for merge in (emulated, HostMerge()))
    for one, other in zip(found, wanted, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)


def test_what_a_block_cannot_hold_is_merged_by_the_twin(emulated, monkeypatch):
    bodies = example_hits(3, 4, 20)
    wanted = merged(HostMerge(), bodies, 4, [20] * 3, 20)
    monkeypatch.setattr(hit_merge, "SHARED_BYTES", 12 * 60 + 4 * 20 - 1)
    monkeypatch.setattr(emulated, "_launch", None)
    for one, other in zip(merged(emulated, bodies, 4, [20] * 3, 20), wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_nonsense_is_refused(emulated):
    emulated.rooms(1, [1])
    for merge in (emulated, HostMerge()):
        merge.rooms(1, [1])
        with pytest.raises(ValueError, match="k must be at least 1"):
            merge.merge(0)


def test_merges_that_differ_are_found_before_they_are_used(emulated):
    seconds = compare_merges([HostMerge(), emulated], 3, 2, 5, repetitions=2)
    assert len(seconds) == 2 and min(seconds) > 0

    class Faulty(HostMerge):
        def merge(self, k):
            scores, rows = super().merge(k)
            rows[-1, -1] += 1
            return scores, rows

    with pytest.raises(RuntimeError, match="a faulty GPU"):
        compare_merges([HostMerge(), Faulty()], 3, 2, 5, repetitions=1)


def test_no_thread_reads_what_another_may_be_writing(tmp_path):
    """ThreadSanitizer runs the kernel's source: without one of its barriers it reports a race."""
    build(tmp_path / "merge", "-DWITH_MAIN", "-fsanitize=thread")
    # Older ThreadSanitizers refuse the address randomization of newer kernels.
    setarch = ["setarch", "-R"] if shutil.which("setarch") and run(["setarch", "-R", "true"]).returncode == 0 else []
    done = run([*setarch, tmp_path / "merge"])
    assert done.returncode == 0 and "ThreadSanitizer" not in done.stderr, done.stdout + done.stderr
    assert done.stdout == "merged\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("num_parts", "num_queries", "k"), [(1, 1, 1), (2, 300, 16), (8, 256, 16), (8, 5, 300)])
def test_on_a_gpu(num_parts, num_queries, k):
    """Raises if the kernel and its twin differ."""
    pytest.importorskip("cupy", reason="kernels are compiled by CuPy")
    merge, reason = hit_merge.choose_merge("cuda", num_parts, num_queries, k)
    assert isinstance(merge, HostMerge | DeviceMerge) and "us for" in reason
