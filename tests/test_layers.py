"""What may import what, read from the source: a lower layer never a higher one, rollout never retrieval.

An import counts wherever it stands, also inside a function or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import searchr1_fast
from searchr1_fast.config import Section

ROOT = Path(searchr1_fast.__file__).parents[1]
PACKAGE, KERNELS, CSRC = ROOT / "searchr1_fast", ROOT / "kernels" / "searchr1_kernels", ROOT / "csrc"

# Modules, and folders of them, by name below searchr1_fast. A new one must be placed here.
LAYERS = (
    {"types", "config", "config_sections", "protocol", "files", "host_memory", "_C"},  # _C: csrc/, compiled
    {"models", "retrieval", "data", "question_sets", "reward", "prompt", "world"},
    {
        *("rollout", "packing", "advantage", "losses", "schedule", "policy", "critic", "offload", "host_adamw"),
        *("checkpoint", "checkpoint_writer", "bad_updates", "distributed"),
    },
    {
        *("train", "run", "memory_plan", "memory_advice", "cache_plan", "parameter_counts", "dry_run", "evaluate"),
        *("environment", "pretraining", "examination", "activation_counts", "head_counts", "agreement", "step_metrics"),
        *("cli", "eval", "ask", "serve", "report", "index", "prepare_data", "replay"),  # commands, like the next
        *("pretrain_base", "__main__", "world.__main__"),
        *("console", "curves", "metrics", "errors"),  # what users see
    },
)
LAYER_OF = {name: level for level, names in enumerate(LAYERS) for name in names}

# Packages that some machines lack: imports must not need them.
OPTIONAL = ("triton", "cupy", "vllm", "faiss", "flash_attn", "wandb", "pyarrow", "starlette", "uvicorn")
NEED_AN_EXTRA = {"retrieval.server_http"}  # subclasses uvicorn; server.py imports it when needed


def sources(*folders: Path) -> list[Path]:
    """Every Python file below the folders, except those that git ignores."""
    found = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return [path for path in found if not {"__pycache__", ".venv", "build"} & set(path.parts)]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    """`rollout.engine` of searchr1_fast/rollout/engine.py, `rollout` of its __init__.py, "" of the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports; `from a import b` is `a.b`, which may be a module or a name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def place(module: str) -> str | None:
    """The entry of LAYERS that a module of searchr1_fast falls under: the longest that matches."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in LAYER_OF), None)


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, place) of the parts of searchr1_fast that a file imports."""
    for line, name in imports(path):
        package, _, rest = name.partition(".")
        if package == "searchr1_fast" and (target := place(rest)) is not None:
            yield line, target


def test_every_module_has_a_layer():
    assert [str(path) for path in sources(PACKAGE) if module_name(path) and place(module_name(path)) is None] == []
    files = {name: PACKAGE / name.replace(".", "/") for name in LAYER_OF}
    missing = [name for name, file in files.items() if not any(file.with_suffix(s).is_file() for s in (".py", ".pyi"))]
    assert [name for name in missing if not (PACKAGE / name / "__init__.py").is_file()] == []


def test_no_layer_imports_a_higher_one():
    violations = []
    for path in sources(PACKAGE):
        own = place(module_name(path))
        if own is None:
            continue
        for line, target in own_imports(path):
            if LAYER_OF[target] > LAYER_OF[own]:
                violations.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {target}")
    assert violations == []


def test_importing_the_package_imports_none_of_its_modules():
    assert list(own_imports(PACKAGE / "__init__.py")) == []


def test_rollout_never_imports_retrieval():
    """It is given a `search` callable, and cannot tell what does the searching."""
    found = [(path.name, line) for path in sources(PACKAGE / "rollout") for line, name in own_imports(path)
             if name == "retrieval"]  # fmt: skip
    assert found == []


def test_nobody_imports_the_trainer_the_benchmarks_or_the_tests():
    for path in sources(PACKAGE, KERNELS):
        for line, name in imports(path):
            top, _, rest = name.partition(".")
            assert top not in ("bench", "tests"), f"{path}:{line} imports {name}"
            assert not (top == "searchr1_fast" and place(rest) == "train"), f"{path}:{line} imports {name}"


def test_only_retrieval_uses_the_extension():
    found = [(path.name, line) for path in sources(PACKAGE) for line, name in own_imports(path)
             if name == "_C" and place(module_name(path)) != "retrieval"]  # fmt: skip
    assert found == []


def test_python_stays_at_the_edge_of_the_extension():
    """The C++ below the bindings does not use Python, so its threads cannot touch it; none of it uses torch."""
    files = [path for path in CSRC.glob("*") if path.is_file()]
    headers = {path: re.findall(r'#include [<"](.*)[>"]', path.read_text()) for path in files}
    assert len(headers) > 10
    users = {path.name for path, names in headers.items() for name in names
             if name.startswith(("Python.h", "pybind11/", "python_glue", "awaited", "listener"))}  # fmt: skip
    edge = {f"{name}.{kind}" for name in ("python_glue", "awaited", "listener") for kind in ("h", "cpp")}
    assert users == {"bindings.cpp", *edge}
    assert [name for names in headers.values() for name in names if name.startswith(("torch/", "ATen/", "c10/"))] == []


def test_kernels_stand_alone():
    """Usable without the trainer: they import only torch, numpy, and the compilers (llvmlite is numba's)."""
    allowed = {"torch", "numpy", "numba", "llvmlite", "triton", "searchr1_kernels", *sys.stdlib_module_names}
    found = [f"{path.name}:{line}: {name}" for path in sources(KERNELS) for line, name in imports(path)
             if name.partition(".")[0] not in allowed]  # fmt: skip
    assert found == []


def test_the_folder_kernels_is_no_package():
    """An importable `kernels` breaks transformers, and a tests/kernels/__init__.py would make one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    folders = [ROOT / name for name in ("searchr1_fast", "kernels", "bench", "tests")]
    found = [f"{path}:{line}" for path in sources(*folders) for line, name in imports(path)
             if name.partition(".")[0] == "kernels"]  # fmt: skip
    assert found == []


def test_imports_need_no_optional_package():
    """Everything can be imported without the packages for GPUs, as the CPU path needs none of them."""
    names = [module_name(path) for path in sources(PACKAGE)]
    modules = [f"searchr1_fast.{name}" for name in names if name and name not in NEED_AN_EXTRA]
    code = f"""
import sys, importlib
sys.path[:0] = {[str(ROOT), str(KERNELS.parent)]!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
import searchr1_fast, searchr1_kernels
assert "torch" not in sys.modules and "numpy" not in sys.modules
for name in searchr1_kernels.__all__:
    getattr(searchr1_kernels, name)
for module in {modules!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------- docstrings


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[int, str]]:
    """(line, name) of public functions, classes and methods that lack the docstring that the house rules ask for."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None and not is_excused(node):
            yield node.lineno, prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{node.name}.")


def is_excused(node: ast.stmt) -> bool:
    """Whether the signature says all there is to say."""
    if isinstance(node, ast.ClassDef):
        # A section of the configuration: a list of fields, each with its own text.
        return any(isinstance(base, ast.Name) and base.id == "Section" for base in node.bases)
    # `forward`, whose class and shapes are documented; what http.server calls; a method of a Protocol.
    is_declaration = len(node.body) == 1 and ast.unparse(node.body[0]) == "..."
    return node.name in ("forward", "do_POST", "do_GET") or is_declaration


@pytest.mark.parametrize("path", sources(PACKAGE, KERNELS), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings(path):
    """Every module says what, why and what was left out; everything public in it has at least one line."""
    assert ast.get_docstring(tree(path)), f"{path} has no docstring"
    assert [f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in undocumented(tree(path).body)] == []


def test_every_configuration_key_is_read():
    """A key that nothing reads is a promise that nothing keeps."""
    read = {node.attr for path in sources(PACKAGE)
            for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}  # fmt: skip
    unread = [f"{section.__name__}.{name}" for section in Section.__subclasses__()
              for name in section.model_fields if name not in read]  # fmt: skip
    assert unread == []
