"""Packages and where they lie; everything else is in pyproject.toml.

`kernels/` is a folder, not a package: an import name `kernels` would break transformers, which looks for one.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["searchr1_fast", "searchr1_fast.*"]), *find_packages("kernels")],
    package_dir={"searchr1_kernels": "kernels/searchr1_kernels"},
)
