"""The packages, where they are, and the C++ extension; everything else is in pyproject.toml.

`kernels/` is a folder, not a package: an importable `kernels` would break transformers, which looks for one.
"""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ParallelCompile(default=0).install()  # 0: as many files at a time as there are cores


class BuildPackages(build_py):
    """Puts the CUDA C++ sources, which are compiled where they run, into the wheel; a checkout has them in csrc/."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = os.path.join(self.build_lib, "searchr1_fast", "csrc")
            self.mkpath(folder)
            for path in sorted(glob("csrc/*.cu")):
                self.copy_file(path, folder)


setup(
    cmdclass={"build_py": BuildPackages},
    packages=[*find_packages(include=["searchr1_fast", "searchr1_fast.*"]), *find_packages("kernels")],
    package_dir={"searchr1_kernels": "kernels/searchr1_kernels"},
    ext_modules=[
        Pybind11Extension(
            "searchr1_fast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=["-O2", "-g0", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
        )
    ],
)
