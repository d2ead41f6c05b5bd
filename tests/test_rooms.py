"""The tour in CONTRIBUTING.md: it names every room, and imports run down it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = {
    path.name
    for path in (ROOT / "dwt_ds").iterdir()
    if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").is_file()
}


def rows_of_the_tour() -> dict[str, int]:
    """Room (`run.py`, or `engine` for a folder) -> the row of the table that it stands in."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = [(name.removeprefix("dwt_ds/").rstrip("/"), row) for row, cell in enumerate(rows) for name in ticked(cell)]
    assert len(named) == len(dict(named)), "a room stands in two rows"
    return dict(named)


def ticked(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def imports(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, module) of every import in the Python files there, those inside of functions too."""
    for path in sorted(folder.rglob("*.py")):
        yield from ((path, module) for module in imported_by(path))


@cache
def imported_by(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def room_of(module: str) -> str:
    name = module.split(".")[1]
    return name if name in ROOMS else f"{name}.py"


def test_every_room_is_in_the_tour() -> None:
    assert set(rows_of_the_tour()) >= ROOMS


def test_imports_run_down_the_tour() -> None:
    rows, package = rows_of_the_tour(), ROOT / "dwt_ds"
    up = {
        f"{importer} imports {imported}"
        for path, module in imports(package)
        if module.startswith("dwt_ds.")
        and (imported := room_of(module)) in rows
        and (importer := path.relative_to(package).parts[0]) in rows
        and rows[imported] < rows[importer]
    }
    assert not up


def test_deepspeed_and_triton_are_known_in_one_room_each() -> None:
    found = {
        (library, package.name, path.relative_to(package).parts[0])
        for package in (ROOT / "dwt_ds", ROOT / "kernels" / "dwt_kernels")
        for path, module in imports(package)
        if (library := module.split(".")[0]) in ("deepspeed", "triton")
    }
    assert found == {("deepspeed", "dwt_ds", "engine"), ("triton", "dwt_kernels", "on_triton")}


def test_every_module_that_we_import_is_there() -> None:
    """mypy passes over a module of ours that is missing, as it must over libraries without types."""
    missing = {
        f"{path.relative_to(ROOT)} imports {module}"
        for folder in ("dwt_ds", "tests", "benchmarks", "kernels")
        for path, module in imports(ROOT / folder)
        if module.startswith(("dwt_ds.", "dwt_kernels."))
        and not is_module(module)
        and not is_module(module.rpartition(".")[0])
    }
    assert not missing


def is_module(name: str) -> bool:
    path = (ROOT if name.startswith("dwt_ds") else ROOT / "kernels") / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
