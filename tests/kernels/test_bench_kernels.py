"""The kernels' benchmark runs without a GPU, its providers compute the same, and it reports where they do not."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from searchr1_kernels import TopKIndex

BENCH = Path(__file__).parents[2] / "bench"
CPU = torch.device("cpu")


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("kernel_cases")


@pytest.fixture
def bench(cases):
    """Load the script under another name: as `kernels`, transformers would find it."""
    spec = importlib.util.spec_from_file_location("bench_kernels", BENCH / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_main_leaves_a_row_per_case_and_a_plot_per_kernel(bench, cases, monkeypatch, tmp_path, capsys):
    corpus = cases.make_corpus(CPU, torch.float32, 3000, 32)
    small = [
        cases.gae_case(CPU, 2000, 16),
        cases.gae_case(CPU, 2000, 4),
        cases.group_case(CPU, 64, 8),
        cases.topk_case(corpus, TopKIndex(corpus), 20),
    ]
    monkeypatch.setattr(bench, "cases", lambda device, kernels: (case for case in small if case.kernel in kernels))
    monkeypatch.setattr(bench, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(bench, "KERNELS", ("gae", "group", "topk"))
    rows_file = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--repetitions", "2", "--output", str(rows_file), "--plot", str(tmp_path)]
    assert bench.main(arguments) == 0
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == rows[-1]
    assert [row["kernel"] for row in rows] == ["gae", "gae", "group", "topk"]
    for row in rows:
        assert row["commit"] and row["date"] and row["device"] and row["versions"]["torch"]
        for name, provider in row["providers"].items():
            assert provider["difference"] < 1e-5, f"{row['kernel']}, {name}"
            assert provider["seconds"] > 0 and len(provider["all_seconds"]) == 2
        assert row["providers"]["ours"]["seconds_over_ours"] == 1
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"kernels_{k}.png" for k in ("gae", "group", "topk")
    ]


def test_a_provider_that_computes_something_else_shows(bench, cases):
    case = cases.group_case(CPU, 64, 8)
    honest = case.providers["Python loop over groups"].run
    case.providers["Python loop over groups"].run = lambda: tuple(1.01 * output for output in honest())
    row = bench.measure(case, bench.Clock(CPU), 1, {"matmul_flops": 1e9, "copy_bytes": 1e9})
    assert row["providers"]["Python loop over groups"]["difference"] == pytest.approx(0.01, rel=1e-3)


def test_the_first_call_is_told_apart(bench, cases, monkeypatch):
    durations = iter([5.0, 1.0, 2.0, 3.0])
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    provider = cases.Provider(lambda: now.append(now.pop() + next(durations)))
    measured = bench.Clock(CPU).measure(provider, 4)
    assert (measured["first_seconds"], measured["seconds"]) == (5.0, 2.0)


def test_heads_of_all_providers_agree(bench, cases, monkeypatch):
    """Loss and both gradients; without torch.compile, which takes longer than the rest."""
    monkeypatch.setattr(cases, "add_compiled", lambda *arguments: None)
    for make in (cases.head_case, cases.score_case):
        case = make(CPU, torch.float32, N=40, H=16, V=130, kept=0.5)
        wanted = None
        for name, provider in case.providers.items():
            if provider.answer is not None:
                answer = provider.answer(provider.run())
                wanted = answer if wanted is None else wanted
                assert bench.difference(answer, wanted) < 1e-5, name


def test_switches_are_turned_back(cases):
    """Every way computes the same; on a CPU all of them are one."""
    ways = importlib.import_module("way_cases")
    shape = {"N": 40, "H": 16, "V": 130, "kept": 0.5}
    hidden, weight, targets, rows = cases.head_problem(CPU, torch.float32, **shape)
    rewards, values, mask, cu_seqlens, _ = cases.gae_problem(2000, 16)
    seen = []
    for case in (
        ways.head_ways_case(hidden, weight, targets, rows, lambda: None, shape),
        ways.gae_ways_case((rewards, values, cu_seqlens), {"mask": mask}, {}),
    ):
        wanted = case.providers["ours"].run()
        for provider in case.providers.values():
            if provider.answer is not None:
                for have, want in zip(provider.answer(provider.run()), wanted, strict=True):
                    torch.testing.assert_close(have, want)
    switch = (cases, "IGNORED", 1)
    ways.switched(lambda: seen.append(cases.IGNORED), switch)()
    assert seen == [1] and cases.IGNORED == -100


def test_ways_to_the_other_operations_agree(bench, cases, monkeypatch):
    """KL with its gradient, attention of lone and of joining tokens, norm, rotation and SwiGLU."""
    monkeypatch.setattr(cases, "add_compiled", lambda *arguments: None)
    generation = importlib.import_module("generation_cases")
    for case in (
        cases.kl_case(CPU, 500),
        generation.cached_case(CPU, torch.float32, [1] * 3, 70, H=4, d=64),
        generation.cached_case(CPU, torch.float32, [40], 0, H=4, d=64),
        generation.norm_case(CPU, torch.float32, 3, 64),
        generation.rotary_case(CPU, torch.float32, 3, H=4, d=32, places=8),
        generation.silu_case(CPU, torch.float32, 3, 64),
    ):
        row = bench.measure(case, bench.Clock(CPU), 1, {"matmul_flops": 1e9, "copy_bytes": 1e9})
        assert len(row["providers"]) > 1
        for name, provider in row["providers"].items():
            assert provider["difference"] < 1e-5, f"{case.kernel}, {name}"


def test_samplers_agree(bench, cases):
    for top_k, top_p in ((0, 1.0), (0, 0.9), (5, 1.0)):
        case = cases.sampling_case(CPU, 4, 700, top_k, top_p, 2.0)
        ours, plain, other = (provider.run() for provider in case.providers.values())
        assert torch.equal(ours[0], plain[0]) and bench.difference(ours[1:], plain[1:]) < 1e-5
        assert other[0].shape == ours[0].shape and other[1].isfinite().all()


def test_names_and_what_is_left_out_can_be_read(bench, cases):
    """On a console of 120 columns, the width where the output is no terminal."""
    case = cases.group_case(CPU, 64, 8)
    case.left_out["faiss"] = "faiss is not installed: pip install --no-deps faiss-cpu"
    row = bench.measure(case, bench.Clock(CPU), 1, {"matmul_flops": 1e9, "copy_bytes": 1e9})
    told = io.StringIO()
    Console(file=told, width=120).print(bench.table(case, row))
    lines = told.getvalue().splitlines()
    assert all(any(line.strip().startswith(f"{name}  ") for line in lines) for name in case.providers)
    assert any("left out: faiss: faiss is not installed" in line for line in lines) and "\u2026" not in told.getvalue()


def test_plots_want_matplotlib_before_anything_is_measured(bench, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench, "copy_rate", None)
    assert bench.main(["kl", "--device", "cpu", "--plot"]) != 0
    assert "--plot: matplotlib is not installed" in capsys.readouterr().err


def test_help_says_what_each_kernel_is(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    told = capsys.readouterr().out.partition("kernels:")[2]
    assert all(name in told for name in bench.KERNELS + bench.WAYS)


def test_wrong_arguments_are_one_sentence(bench, capsys):
    for arguments, sentence in (
        (["flash"], f"'flash' is none of {', '.join(bench.KERNELS + bench.WAYS)}"),
        (["gae_ways", "--device", "cpu"], "gae_ways: need a GPU"),
        (["--repetitions", "0"], "--repetitions 0: give at least 1"),
        (["--device", "tpu"], "--device tpu: give cpu or cuda"),
    ):
        assert bench.main(arguments) != 0
        assert sentence in capsys.readouterr().err


def test_the_script_is_not_found_as_the_package_kernels(tmp_path):
    """transformers looks for a package `kernels`, and a script's folder comes first on the path."""
    code = "import importlib.util, harness; assert importlib.util.find_spec('kernels') is None"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_does_not_fit_is_left_out_and_said(bench, cases):
    def too_much():
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = cases.Case(
        "kl", {"N": 1}, {"ours": cases.Provider(lambda: (torch.ones(1),)), "plain": cases.Provider(too_much)}
    )
    row = bench.measure(case, bench.Clock(CPU), 1, {"matmul_flops": 1.0, "copy_bytes": 1.0})
    assert list(row["providers"]) == ["ours"] and "memory" in row["left_out"]["plain"]
    case.providers = {"ours": case.providers["plain"]}
    with pytest.raises(torch.OutOfMemoryError):
        bench.measure(case, bench.Clock(CPU), 1, {"matmul_flops": 1.0, "copy_bytes": 1.0})
