"""Importing the package loads nothing; every name resolves to the function, whatever was imported before."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import searchr1_kernels

ROOT = Path(searchr1_kernels.__file__).parents[1]
# Makes an import of Triton fail, as on a machine without it.
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"


def run(code: str) -> None:
    """Run the code in a fresh interpreter; if it fails, its traceback is the message."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_loads_nothing():
    run(
        "import searchr1_kernels\n"
        "loaded = [name for name in ('torch', 'triton', 'numba', 'numpy') if name in sys.modules]\n"
        "assert not loaded, loaded"
    )


def test_everything_resolves_without_triton():
    run(WITHOUT_TRITON + "import searchr1_kernels as k\n[getattr(k, name) for name in k.__all__]")


def test_a_function_keeps_its_name_after_an_import_of_its_module():
    run(
        "import searchr1_kernels.gae, searchr1_kernels.masked_kl\n"
        "from searchr1_kernels.linear_logprob import linear_logprob as inner\n"
        "from searchr1_kernels import gae, linear_logprob, masked_kl\n"
        "assert callable(gae) and callable(masked_kl) and linear_logprob is inner"
    )


def test_star_and_dir_offer_every_name():
    run(
        "import searchr1_kernels\nfrom searchr1_kernels import *\n"
        "assert callable(gae) and callable(group_advantages) and callable(reference.gae)\n"
        "offered = dir(searchr1_kernels)\n"
        "assert sorted(searchr1_kernels.__all__) == [name for name in offered if name[0] != '_'], offered"
    )


def test_type_checkers_see_every_name_and_no_other():
    """Type checkers run nothing, so the names are written out a second time for them."""
    tree = ast.parse(Path(searchr1_kernels.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for line in block.body:
        (alias,) = line.names
        assert alias.asname == alias.name, f"{alias.name}: without `as` it is no name of the package to them"
        seen[alias.name] = line.module.removeprefix("searchr1_kernels").removeprefix(".")
    assert seen == searchr1_kernels._HOME | dict.fromkeys(searchr1_kernels._MODULES, "")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'; it has linear_logprob"):
        searchr1_kernels.nonsense  # noqa: B018
    assert not hasattr(searchr1_kernels, "__wrapped__")
