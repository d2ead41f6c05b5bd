"""docs/first_run.ipynb runs from its first cell to its last."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first_run.ipynb"


def test_it_is_committed_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_cell_runs(tmp_path: Path, tiny_text: Path) -> None:
    """On a small text instead of the documentation of all packages; nbclient and ipykernel are in the dev extra."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(
            "docs=True, train_tokenizer=2000", f"text={str(tiny_text)!r}, train_tokenizer=300"
        )
        cell.source = cell.source.replace("every=20", "validation=0.1")
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in told)
    assert printed.count("step 50/50  loss ") == 3
    (table,) = (output.data["text/markdown"] for output in told if "text/markdown" in output.get("data", {}))
    assert "| as good as alone after: tokens |" in table
    guesses = told[-1].data["text/plain"]
    assert len(re.findall(r"\('.*?', [\d.]+\)", guesses)) == 5, guesses
    assert (tmp_path / "runs" / "first_run" / "report" / "index.html").is_file()
