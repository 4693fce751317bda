"""Shipped kernels compile for Ampere, Hopper and Blackwell within their budgets of registers, shared memory and stack.

They do so on the installed Triton and on the oldest supported one. No GPU takes part.

After a change that is meant, rewrite the budget and look at the difference:

    python tests/kernels/compile_report.py --write
    PYTHONPATH=build/triton-3.6 python tests/kernels/compile_report.py --write
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import compile_report
import pytest

FOLDER = Path(__file__).parent
SCRIPT, BUDGET = FOLDER / "compile_report.py", FOLDER / "compile_budget.json"
# pip install --no-deps --target build/triton-3.6 triton==3.6.0
OLDEST = FOLDER.parents[1] / "build" / "triton-3.6"

Usage = dict[str, dict[str, int]]  # by case: registers, shared, stack


def compile_all(toolchain: str, architecture: int, cache: Path) -> tuple[str, Usage]:
    """-> Triton's version and what each case needs, from a fresh process: one process has one Triton, in one mode."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache / toolchain)
    if toolchain == "oldest":
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OLDEST), environment.get("PYTHONPATH")]))
    command = [sys.executable, str(SCRIPT), "--arch", str(architecture)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    ((version, report),) = json.loads(done.stdout.splitlines()[-1]).items()
    return version, report[f"sm_{architecture}"]


def violations(have: Usage, budget: Usage | None) -> list[str]:
    """-> what is over the budget or unknown to it. Without a budget (an unmeasured Triton) only spills count."""
    found = [f"{name}: {usage['stack']} bytes of stack: it spills" for name, usage in have.items() if usage["stack"]]
    if budget is None:
        return found
    found += [f"{name}: in the budget or in compile_cases() only" for name in sorted(set(have) ^ set(budget))]
    for name in have.keys() & budget.keys():
        found += [f"{name}: {usage} {what}, {budget[name][what]} at most" for what, usage in have[name].items()
                  if usage > budget[name][what]]  # fmt: skip
    return found


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("toolchain", ["installed", "oldest"])
def test_kernels_stay_within_their_budget(toolchain, architecture, request, tmp_path):
    if toolchain == "installed" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install --no-deps triton")
    if toolchain == "oldest" and not (OLDEST / "triton").is_dir():
        pytest.skip(f"no Triton 3.6: pip install --no-deps --target {OLDEST} triton==3.6.0")
    kept = getattr(request.config, "cache", None)  # absent with `-p no:cacheprovider`
    version, have = compile_all(toolchain, architecture, kept.mkdir("triton") if kept else tmp_path)
    assert toolchain == "installed" or version == "3.6"
    budget = json.loads(BUDGET.read_text(encoding="utf-8")).get(version, {}).get(f"sm_{architecture}")
    found = violations(have, budget)
    assert not found, "\n".join(found)


def test_walking_programs_fit_beside_each_other():
    """As many fit as are started per multiprocessor: one that had to wait would begin when the others are done."""
    walk = pytest.importorskip("searchr1_kernels._topk_walk_triton", reason="needs Triton")
    for version, budgets in json.loads(BUDGET.read_text(encoding="utf-8")).items():
        for name, *_, num_warps, _, _ in walk.compile_cases():
            needs, programs = budgets["sm_90"][name], int(name.rpartition("_")[2].partition("x")[0])
            registers = -(-needs["registers"] // 8) * 8 * 32 * num_warps
            assert programs * registers <= 1 << 16, f"{name}, Triton {version}"
            shared = needs["shared"] + 1024  # the driver keeps the 1 KB
            assert programs * shared <= 228 * 1024, f"{name}, Triton {version}"


def test_smaller_gpus_of_ampere_have_room():
    """sm_86 and sm_89 run what is compiled for sm_80, with 99 KB per program instead of 163."""
    for version, budgets in json.loads(BUDGET.read_text(encoding="utf-8")).items():
        too_large = {name: needs["shared"] for name, needs in budgets["sm_80"].items() if needs["shared"] > 99 << 10}
        assert not too_large, version


def test_few_tokens_of_wide_heads_take_no_more_stages():
    """A third stage would take 146 KB in fp32."""
    attention = pytest.importorskip("searchr1_kernels._cached_attention_triton", reason="needs Triton")
    assert attention.stages_for_few(256, 4) == attention.configuration(8, 256, 4, True)["num_stages"] == 2
    assert attention.stages_for_few(128, 4) == attention.stages_for_few(256, 2) == 3


def test_a_launch_that_begins_early_waits_for_what_it_reads():
    """In both kernels' code: the maps are read after the wait, and a program without a tile waits too."""
    scan = pytest.importorskip("searchr1_kernels._gae_triton", reason="needs Triton")
    for name, kernel, types, constants, *numbers, _ in scan.compile_cases()[1:]:
        constants = constants | {"OVERLAPS": True}
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        code = compile_report.compiled(kernel, signature, constants, {}, *numbers, 90).asm["ptx"]
        read, begins = code.find("ld.global.b64"), code.find("griddepcontrol.launch_dependents")
        if name == "gae_scan_tiles":
            assert 0 <= begins < code.find("ld.global") and "griddepcontrol.wait" not in code
        else:
            assert 0 <= code.find("griddepcontrol.wait") < read and code.count("griddepcontrol.wait") == 2 > begins


def test_what_counts_as_a_violation():
    budget = {"scan": {"registers": 64, "shared": 128, "stack": 0}}
    assert violations(budget, budget) == []
    assert violations({"scan": {"registers": 60, "shared": 0, "stack": 0}}, budget) == []
    assert violations({"scan": {"registers": 65, "shared": 128, "stack": 0}}, budget)
    assert violations({"scan": {"registers": 64, "shared": 129, "stack": 0}}, budget)
    spilling = {"scan": {"registers": 64, "shared": 128, "stack": 8}}
    assert violations(spilling, spilling)
    assert violations(spilling, None)
    assert violations({}, budget)
    assert violations(budget | {"new": budget["scan"]}, budget)
