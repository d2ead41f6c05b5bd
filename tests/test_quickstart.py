"""The first command of the README, with runs of four steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from harness.gpus import have_gpus

from dwt_ds import quickstart
from dwt_ds.cli.main import main
from dwt_ds.prepare import documentation
from dwt_ds.prepare.pipeline import InstalledDocumentation

RUN = quickstart._run
SHORT = ["train.max_steps=4", "train.log_every=2", "train.eval_every=2", "train.eval_rows=16"]


def run_on_less_text(*arguments: str) -> None:
    """As the quickstart's, but text is prepared in this process, which reads two packages instead of sixteen."""
    if arguments[0] == "prepare":
        assert main([*arguments]) == 0
    else:
        RUN(*arguments)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_trains_teacher_and_students_and_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "_run", run_on_less_text)
    monkeypatch.setattr(documentation, "InstalledDocumentation", partial(InstalledDocumentation, packages=("numpy",)))
    overrides = {name: [*words, *SHORT] for name, words in quickstart.RUN_RECIPES.items()}
    monkeypatch.setattr(quickstart, "RUN_RECIPES", overrides)
    assert quickstart.main() == 0
    said, errors = capfd.readouterr()
    table = said[said.index("model      held-out MLM loss") :].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["teacher", "alone", "distilled"]
    assert all(8 < float(line.split()[1]) < 10 for line in table[1:4]), "near log(8000) after four steps"
    assert "[MASK] = " in said
    page = Path("runs/quickstart/report/index.html")
    assert said.splitlines()[-1].endswith(str(page))
    assert "as good as alone after: tokens" in page.read_text(encoding="utf-8")
    assert all(each not in (said + errors).lower() for each in ("warning", "hostfile", "lock")), errors
    for name, teacher in (("teacher", None), ("alone", None), ("distilled", "runs/quickstart/teacher/export")):
        run = tmp_path / "runs" / "quickstart" / name
        assert (run / "complete.json").is_file()
        assert yaml.safe_load((run / "config.yaml").read_text())["teacher"]["path"] == teacher
    # The data are kept for the next start.
    capfd.readouterr()
    assert quickstart.main() == 0
    said = capfd.readouterr().out
    assert "dwt-ds prepare" not in said
    assert said.count("already finished at step 4") == 3


@pytest.mark.parametrize(
    ("has_gpu", "bf16_instructions", "words"),
    [
        (False, [], ["deepspeed_config=zero2_fp32"]),
        (False, ["avx512_bf16"], []),
        (False, ["amx_bf16"], []),
        (True, [], []),
    ],
)
def test_fp32_where_bf16_is_emulated(
    has_gpu: bool, bf16_instructions: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dict.fromkeys(("avx2", "avx512_bf16", "amx_bf16"), False) | dict.fromkeys(bf16_instructions, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found | {"cpu_name": "a CPU"})
    have_gpus(monkeypatch, int(has_gpu))
    assert quickstart._precision() == words
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert bool(quickstart._precision()) == (not bf16_instructions)


def test_the_first_failure_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started = []

    def failing(*arguments: str) -> list[str]:
        started.append(arguments)
        return ["bash", "-c", "exit 75"]

    monkeypatch.setattr(quickstart, "own_command", failing)
    with pytest.raises(SystemExit, match=r"^error: .* ended with exit code 75; make quickstart resumes there"):
        quickstart.main()
    assert len(started) == 1


INTERRUPTED = """
import sys
from dwt_ds import quickstart
command = "trap 'sleep 1; echo saved; exit 75' INT; echo begun; while :; do sleep 0.1; done"
quickstart.own_command = lambda *_: ["bash", "-c", command]
quickstart._run("launch")
"""


def test_ctrl_c_waits_for_the_run_to_be_saved() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "begun\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the whole group
    said, errors = process.communicate(timeout=20)
    assert said == "saved\n"
    assert "error: the command above ended with exit code 75; make quickstart resumes there" in errors
    assert "Traceback" not in errors
