"""Every command that writes a folder refuses one that another process writes, and leaves it as it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.errors import Refusal
from harness.runs import write_run

from dwt_ds.base import locks
from dwt_ds.base.software import host_name
from dwt_ds.cli.main import main
from dwt_ds.config.schema import RunConfig
from dwt_ds.study.page import Page

HOLD = """
import sys
from pathlib import Path
from dwt_ds.base.locks import FolderLock
with FolderLock(Path(sys.argv[1]), "--out x", name=sys.argv[2]):
    print("has it", flush=True)
    sys.stdin.read()
"""
Hold = Callable[..., int]


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_WAIT_SECONDS", 0.3)


@pytest.fixture
def hold() -> Iterator[Hold]:
    """`hold(folder)` starts a process that writes there; its id."""
    started = []

    def start(folder: Path, name: str = ".writer") -> int:
        words = [sys.executable, "-c", HOLD, str(folder), name]
        started.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "has it\n"
        return started[-1].pid

    yield start
    for process in started:
        process.communicate()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a report needs of a run."""
    write_run(tmp_path / "run", {2: 5.0}, RunConfig().to_dict())
    return tmp_path / "run"


def refused(arguments: list[object], out: Path, owner: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    assert main([str(word) for word in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"process {owner} on host {host_name()} has been writing there since" in error, error
    assert error.startswith(f"error: --out {out}: "), error
    assert {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")} == before


def test_prepare(
    hold: Hold, tiny_text: Path, tiny_vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["prepare", "--text", tiny_text, "--tokenizer", tiny_vocabulary, "--out", out]
    refused(arguments, out, hold(out), capsys)


def test_report(hold: Hold, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    owner = hold(out)
    hold(run)  # a run in progress may be drawn
    refused(["report", run, "--out", out], out, owner, capsys)
    assert main(["report", str(run)]) == 0


def test_study(hold: Hold, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["study", "remapping", "--out", out, f"data.dir={tiny_data}"]
    refused(arguments, out, hold(out), capsys)


def test_export(hold: Hold, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    out = tmp_path / "out"
    refused(["export", tmp_path / "run", "--out", out], out, hold(tmp_path, ".out.writer"), capsys)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "run" / "export")]) == 2
    assert "the run itself writes there; name another folder" in capsys.readouterr().err


def test_a_page_of_somebody_elses_is_not_written_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "site" / "index.html"
    page.parent.mkdir()
    page.write_text("<html>my site</html>")
    assert main(["report", str(run), "--out", str(page.parent)]) == 2
    assert "index.html is not a report; rename it" in capsys.readouterr().err
    assert page.read_text() == "<html>my site</html>"
    Page("Run: a").write(page)
    assert main(["report", str(run), "--out", str(page.parent)]) == 0


@pytest.mark.parametrize("words", [["--out", "a\nb"], ["--out", "ok", "a\tb"]])
def test_a_name_that_no_message_could_show_is_refused(words: list[str], refusal: Refusal) -> None:
    error = refusal("export", *words, *(["run"] if len(words) == 2 else []))
    assert "has a line break, a control character or a byte that is not UTF-8; rename it" in error


@pytest.mark.parametrize("name", ["data #1", "2024", "'q'", "null", "[1]"])
def test_a_plans_data_folder_is_the_one_that_was_named(
    name: str,
    tiny_data: Path,
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).symlink_to(tiny_data)
    assert main(["plan", str(tiny_recipe), "--gpu", "cpu", "--data", name]) == 0
    assert f"{name}: " in capsys.readouterr().out
