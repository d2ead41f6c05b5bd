"""The two distributions: dwt-ds, and dwt-kernels on which it depends."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import dwt_kernels
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import dwt_ds

ROOT = Path(__file__).resolve().parents[1]


def test_both_distributions_have_one_version() -> None:
    """setup.py requires exactly its own version of dwt-kernels."""
    assert dwt_ds.__version__ == dwt_kernels.__version__


def supported_pythons() -> list[str]:
    """The oldest of setup.py, and those of CI."""
    oldest = re.findall(r'python_requires=">=([\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    ci = re.search(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert ci
    return sorted({*oldest, *re.findall(r"[\d.]+", ci[1])})


@pytest.mark.parametrize("python", supported_pythons())
def test_every_python_has_one_pin_of_each_package_and_may_install_it(python: str) -> None:
    lines = [*(ROOT / "constraints.txt").open(), *(ROOT / "constraints-cpu.txt").open()]
    pins = [Requirement(line.strip()) for line in lines if not line.startswith("#")]
    held = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert sorted(pin.name for pin in held) == sorted({pin.name for pin in pins})
    for pin in held:
        installed = distribution(pin.name)
        # What another version needs is not known here.
        if installed.version in pin.specifier:
            assert python in SpecifierSet(installed.metadata["Requires-Python"] or ""), pin


# Stands for the environment's Python: records what pip installs, and has the torch that it found.
PYTHON = """#!/bin/bash
cd "$(dirname "$0")"
case "$*" in
  *"metadata.version"*) cat torch ;;
  *"pip install"*torch==*+cpu) [[ $CPU_BUILDS == yes ]] && echo 2.13.0+cpu >torch ;;
  *"pip install"*torch==*) echo 2.13.0 >torch ;;
  *"pip install"*) echo "$*" >>installed ;;
esac
"""


@pytest.mark.parametrize(
    ("cpu_builds", "gpu", "options"),
    [
        ("yes", "", "-c constraints.txt -c constraints-cpu.txt"),
        # This torch brings another Triton.
        ("no", "", "-c constraints.txt"),
        ("yes", "GPU 0", "-c constraints.txt"),
    ],
)
def test_make_pins_triton_only_beside_a_cpu_build_of_torch(
    cpu_builds: str, gpu: str, options: str, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON, encoding="utf-8")
    (tmp_path / "bin" / "python").chmod(0o755)
    command = ["make", "venv", f"VENV={tmp_path}", f"HAS_GPU={gpu}", "TORCH_INDEX="]
    # The tests may have been started by make, whose variables its own make would take.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    subprocess.run(command, cwd=ROOT, env={**environment, "CPU_BUILDS": cpu_builds}, check=True)
    last = (tmp_path / "bin" / "installed").read_text(encoding="utf-8").splitlines()[-1]
    assert last == f"-m pip install -q --no-build-isolation {options} -e ./kernels -e .[dev]"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, zipfile.ZipFile]:
    """Distribution -> its wheel, built from a copy, since setuptools writes beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in ("dwt_ds", "ds_configs", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(out), "./kernels", "."], cwd=source, check=True)
    return {path.name.partition("-")[0]: zipfile.ZipFile(path) for path in out.glob("*.whl")}


def files_of(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def files_of_package(folder: Path, name: str, *patterns: str) -> set[str]:
    found = {path for pattern in patterns for path in folder.rglob(pattern)}
    return {f"{name}/{path.relative_to(folder).as_posix()}" for path in found}


@pytest.mark.slow
def test_every_file_is_in_exactly_one_wheel(wheels: dict[str, zipfile.ZipFile]) -> None:
    """So that uninstalling one distribution leaves the other whole."""
    assert set(wheels) == {"dwt_ds", "dwt_kernels"}
    kernels = files_of_package(ROOT / "kernels" / "dwt_kernels", "dwt_kernels", "*.py", "py.typed")
    assert files_of(wheels["dwt_kernels"]) == kernels
    package = files_of_package(ROOT / "dwt_ds", "dwt_ds", "*.py", "*.yaml", "py.typed")
    engine_json = files_of_package(ROOT / "ds_configs", "dwt_ds/ds_configs", "*.json")
    assert files_of(wheels["dwt_ds"]) >= package | engine_json
    assert {"dwt_kernels/py.typed"} <= kernels
    assert {"dwt_ds/py.typed", "dwt_ds/config/recipes/quickstart.yaml"} <= package
    assert "dwt_ds/ds_configs/zero2_bf16.json" in engine_json
    assert not files_of(wheels["dwt_ds"]) & kernels


@pytest.mark.slow
def test_dwt_ds_depends_on_the_kernels(wheels: dict[str, zipfile.ZipFile]) -> None:
    wheel = wheels["dwt_ds"]
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    required = wheel.read(metadata).decode().splitlines()
    assert f"Requires-Dist: dwt-kernels=={dwt_kernels.__version__}" in required
