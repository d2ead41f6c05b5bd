"""`pip install ./kernels` installs the loss kernels alone: torch, and Triton where it exists, are all they need.

dwt-ds depends on the same version of this distribution: raise both together (tests/test_packaging.py).
"""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("dwt_kernels").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="dwt-kernels",
    version=VERSION,
    description="Masked-LM cross-entropy and temperature KL distillation in one pass over the logits",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["dwt_kernels", "dwt_kernels.*"]),
    package_data={"dwt_kernels": ["py.typed"]},
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
)
