"""Compile every shipped kernel for some GPUs, without one, and report what each needs: registers, shared memory, stack.

    python tests/kernels/compile_report.py --arch 90                     what is needed now, as JSON
    python tests/kernels/compile_report.py --write                       and make that the budget of this Triton

The kernels of a module `searchr1_kernels._<name>_triton` are those in its `compile_cases()`: tuples of name, kernel,
signature, constants, warps, stages, and the names of the arguments that are multiples of 16 (which the launcher finds
by itself). A module that runs on only some architectures names them in `ARCHITECTURES`. A stack means that registers
were spilled, or that an array is not in registers.

To compile with another Triton, put its folder first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BUDGET = Path(__file__).with_name("compile_budget.json")
ARCHITECTURES = (80, 90, 100)
PACKAGE = "searchr1_kernels"


def cases(architecture: int) -> dict[str, tuple]:
    """-> every case that runs on the architecture, by name."""
    folder = Path(importlib.import_module(PACKAGE).__file__).parent
    modules = [importlib.import_module(f"{PACKAGE}.{path.stem}") for path in sorted(folder.glob("_*_triton.py"))]
    modules = [module for module in modules if architecture in getattr(module, "ARCHITECTURES", ARCHITECTURES)]
    found = [case for module in modules for case in module.compile_cases()]
    names = [case[0] for case in found]
    assert len(set(names)) == len(names), f"two cases have one name: {sorted(names)}"
    return {case[0]: case for case in found}


def compile_case(case: tuple, architecture: int) -> dict[str, int]:
    """-> what the case needs on this architecture."""
    from triton.runtime.jit import JITFunction

    _, kernel, signature, constants, num_warps, num_stages, divisible = case
    # Autotuning runs every candidate, even those that change their operands, and chooses another in every process.
    assert isinstance(kernel, JITFunction), f"{case[0]}: is chosen at run time"
    arguments = kernel.arg_names
    differing = (set(signature) | set(constants)) ^ set(arguments)
    assert not differing, f"{case[0]}: the case and the kernel differ in {sorted(differing)}"
    types = {name: "constexpr" if name in constants else signature[name] for name in arguments}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(arguments) if name in divisible}
    return compile_source(kernel, types, constants, attributes, num_warps, num_stages, architecture)


def compile_source(*source: Any) -> dict[str, int]:
    """-> what a kernel needs, given the arguments of `compiled`."""
    made = compiled(*source)
    # Descriptors made on the device would: Triton's allocator belongs to one thread, and autograd's threads have none.
    assert made.metadata.global_scratch_size == 0, f"{source[0].__name__} wants memory that its launcher allocates"
    registers, stack = usage(made.asm["cubin"])
    return {"registers": registers, "shared": made.metadata.shared, "stack": stack}


def compiled(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[Any, Any],
    attributes: dict[tuple[int, ...], Any],
    num_warps: int,
    num_stages: int,
    architecture: int,
) -> Any:
    """-> what Triton makes of a kernel for these."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    if version() >= (3, 9):
        options["enable_fp_fusion"] = True  # what a launch sets; a compilation by hand does not
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def usage(cubin: bytes) -> tuple[int, int]:
    """-> registers per thread and bytes of stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    assert found, f"cuobjdump says nothing of registers:\n{done.stdout}{done.stderr}"
    return int(found[1]), int(found[2])


def version() -> tuple[int, int]:
    """-> Triton's version, as far as budgets differ by it."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def main() -> int:
    """Compile, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", help="80, 90 or 100 (default: all)")
    parser.add_argument("--write", action="store_true", help=f"replace the budget of this Triton in {BUDGET.name}")
    arguments = parser.parse_args()
    name = ".".join(map(str, version()))
    report = {
        f"sm_{architecture}": {key: compile_case(case, architecture) for key, case in cases(architecture).items()}
        for architecture in arguments.arch or ARCHITECTURES
    }
    if arguments.write:
        budget = json.loads(BUDGET.read_text(encoding="utf-8")) if BUDGET.is_file() else {}
        budget[name] = budget.get(name, {}) | report
        lines = json.dumps(budget, indent=1, sort_keys=True)
        lines = re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", lines)
        BUDGET.write_text(lines + "\n", encoding="utf-8")
    print(json.dumps({name: report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
