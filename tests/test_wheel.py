"""The wheel holds both packages, the models that ship with them and the command, and runs without a checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import searchr1_fast

ROOT = Path(searchr1_fast.__file__).parents[1]
SOURCES = ("searchr1_fast", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The path of the wheel, built from a copy so that the checkout stays clean."""
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    if not (ROOT / "setup.py").is_file():
        pytest.skip(f"{ROOT} is no checkout: it has no setup.py")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [*pip, "--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_what_is_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(root))
        for root, package in ((ROOT, "searchr1_fast"), (ROOT / "kernels", "searchr1_kernels"))
        for path in (root / package).rglob("*.py")
    }
    assert expected <= names, sorted(expected - names)
    assert {"searchr1_fast/py.typed", "searchr1_kernels/py.typed"} <= names
    sources = {path.name for path in (ROOT / "csrc").glob("*.cu")}
    assert sources and {f"searchr1_fast/csrc/{name}" for name in sources} <= names
    for variant in ("base", "instruct"):
        shipped = [path for path in (ROOT / "searchr1_fast" / "assets" / variant).glob("*") if path.is_file()]
        missing = [path.name for path in shipped if str(path.relative_to(ROOT)) not in names]
        assert not missing, f"searchr1_fast/assets/{variant} lacks {missing}"
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"searchr1_fast", "searchr1_kernels"}


def test_its_metadata(wheel):
    files = zipfile.ZipFile(wheel)
    text = {Path(name).name: files.read(name).decode() for name in files.namelist() if ".dist-info/" in name}
    assert "searchr1 = searchr1_fast.cli:main" in text["entry_points.txt"]
    assert "Apache License" in text["LICENSE"]
    assert f"Version: {searchr1_fast.__version__}" in text["METADATA"]
    needs = [line for line in text["METADATA"].splitlines() if line.startswith("Requires-Dist")]
    required = [line for line in needs if "extra ==" not in line]
    for heavy in ("flash-attn", "vllm", "faiss", "cupy"):
        assert not any(heavy in line for line in required), f"{heavy} is required, not an extra"


def test_it_runs_where_there_is_no_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import searchr1_kernels, searchr1_fast.cli\n"
        f"assert searchr1_fast.__file__.startswith({str(tmp_path)!r}), searchr1_fast.__file__\n"
        f"assert searchr1_kernels.__file__.startswith({str(tmp_path)!r}), searchr1_kernels.__file__\n"
        "assert callable(searchr1_kernels.linear_logprob)\n"
        "from searchr1_fast.retrieval.device_code import cuda_source\n"
        "assert 'merge_hits' in cuda_source('merge')\n"
        "sys.exit(searchr1_fast.cli.main(['--version']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"searchr1_fast {searchr1_fast.__version__}\n"
