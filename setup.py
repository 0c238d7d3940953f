"""Only what pyproject.toml cannot say: `lowering/` is installed as `fp4compile.lowering`.

Setuptools' own discovery would find it as a top-level `lowering`; a list written by hand in
pyproject.toml would leave a new subpackage out of the wheel without a word.
"""

from setuptools import find_packages, setup

inner = ["fp4compile.lowering", *(f"fp4compile.lowering.{p}" for p in find_packages("lowering"))]

setup(
    packages=[*find_packages(include=["fp4compile", "fp4compile.*"]), *inner],
    package_dir={"fp4compile.lowering": "lowering"},
)
