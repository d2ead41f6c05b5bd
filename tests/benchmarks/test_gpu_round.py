"""benchmarks/gpu_round.sh: its stages on a CPU at tiny sizes, and what it does around them with a Python that only says
what it was asked to run."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_round.sh"
REAL_PYTHON = sys.executable
# The stages in order, with the seconds of each.
STAGES = {
    "install": 15,
    "preflight": 40,
    "logits_form": 25,
    "logits_compiled": 20,
    "training_speed": 85,
    "training_modes": 60,
    "linear_form": 50,
    "tests": 100,
    "teacher": 100,
    "alone": 85,
    "distilled": 85,
    "injection": 85,
}
AT_THE_SAME_TIME = [("tests", "teacher"), ("alone", "distilled", "injection")]
# Only the script's own programs decide what happens, but for the summary, which is the real one.
PYTHON = """#!/usr/bin/env bash
case "$*" in *round_summary*) exec {real} "$@" ;; esac
echo "$*" >> {calls}
echo "said by $1"
case "$*" in {cases} esac
"""


def start(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def recorded(folder: Path, cases: str = "") -> tuple[dict[str, str], Path]:
    """An environment with the Python of `cases`, shell patterns with what to do, and the file of its calls."""
    calls = folder / "calls"
    calls.touch()
    python = folder / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON.format(real=REAL_PYTHON, calls=calls, cases=cases or "*) ;;"))
    python.chmod(0o755)
    return {"PATH": f"{python.parent}:{os.environ['PATH']}"}, calls


def outcomes(out: Path) -> dict[str, str]:
    with (out / "work" / "results" / "stages.csv").open() as lines:
        return {row["stage"]: row["exit_code"] for row in csv.DictReader(lines)}


def test_a_dry_run_prints_every_stage_and_starts_nothing(tmp_path: Path) -> None:
    environment, calls = recorded(tmp_path)
    out = tmp_path / "out"
    ended = start("--out", out, "--data", tmp_path, "--wheels", tmp_path, "--dry-run", **environment)
    assert ended.returncode == 0, ended.stderr
    lines = dict(re.fullmatch(r"(\w+) +(\d+) s  .+", line).groups() for line in ended.stdout.splitlines())  # type: ignore[union-attr]
    assert {name: int(seconds) for name, seconds in lines.items()} == STAGES
    waited_for = sum(STAGES.values())
    for names in AT_THE_SAME_TIME:
        waited_for -= sum(STAGES[name] for name in names) - max(STAGES[name] for name in names)
    assert waited_for <= 480
    assert not out.exists()
    assert calls.read_text() == ""


def test_the_table_of_the_docs_has_the_limits() -> None:
    table = re.findall(r"^\| ([a-z_, ]+) \| (\d+) \|", (ROOT / "docs" / "speed.md").read_text(), re.MULTILINE)
    told = {tuple(names.split(", ")): int(seconds) for names, seconds in table if names.split(", ")[0] in STAGES}
    assert [name for names in told for name in names] == list(STAGES)
    for names, seconds in told.items():
        limits = [STAGES[name] for name in names]
        assert seconds == (max(limits) if names in AT_THE_SAME_TIME else sum(limits)), names


def test_every_script_of_a_stage_is_there_and_has_its_options(tmp_path: Path) -> None:
    printed = start("--out", tmp_path / "out", "--data", tmp_path, "--dry-run").stdout
    scripts = set(re.findall(r"\S*benchmarks/\w+\.py", printed))
    assert len(scripts) == 5
    for script in scripts:
        text = (ROOT / script).read_text()
        if "parse_options(" in text:
            text += (ROOT / "kernels" / "benchmarks" / "options.py").read_text()
        for line in (line for line in printed.splitlines() if script in line):
            for option in re.findall(r" (--[a-z][a-z-]+)", line):
                assert f'"{option}"' in text, (script, option)
    for ignored in re.findall(r"--ignore=(\S+)|(kernels/tests) |(tests/engine/test_gpu.py)", printed):
        assert (ROOT / next(filter(None, ignored))).exists()


def test_a_round_leaves_an_archive_and_a_page_and_its_repetition_does_what_failed(tmp_path: Path) -> None:
    environment, calls = recorded(tmp_path, cases='*logits_form*compiled*) [ -e "$work/repaired" ] || exit 4 ;;')
    out = tmp_path / "out"
    ended = start("--out", out, "--data", tmp_path, **environment)
    assert ended.returncode == 1, ended.stderr
    stages = [name for name in STAGES if name != "install"]
    assert outcomes(out) == {**dict.fromkeys(stages, "0"), "logits_compiled": "4"}
    assert "| logits_compiled |" in (out / "summary.md").read_text()
    with tarfile.open(out / "gpu_round.tar.gz") as archive:
        names = set(archive.getnames())
    assert {f"results/{name}.log" for name in stages} | {"results/stages.csv"} <= names

    calls.write_text("")
    (out / "work" / "repaired").touch()
    ended = start("--out", out, "--data", tmp_path, **environment)
    assert ended.returncode == 0, ended.stderr
    assert "training_speed: already done" in ended.stdout
    again = [call for call in calls.read_text().splitlines() if "preflight" not in call]
    assert ["torch.compile" in call for call in again] == [True]


def test_a_repetition_installs_and_checks_again_since_the_machine_may_be_another(tmp_path: Path) -> None:
    environment, calls = recorded(tmp_path)
    only = "install,preflight,alone"
    round_of = ("--out", tmp_path / "out", "--data", tmp_path, "--wheels", tmp_path, "--only", only)
    assert start(*round_of, **environment).returncode == 0
    # The install calls Python twice, for the wheels and for dwt_ds itself.
    install, itself, preflight, alone = calls.read_text().splitlines()
    assert "dwt_ds.pretrain" in alone
    calls.write_text("")
    assert start(*round_of, **environment).returncode == 0
    assert calls.read_text().splitlines() == [install, itself, preflight]


def test_all_stages_compile_operators_into_one_folder(tmp_path: Path) -> None:
    """The tests would choose another one by themselves, and be cut short while nvcc compiles there."""
    environment, _ = recorded(tmp_path, cases='*) echo "extensions in $TORCH_EXTENSIONS_DIR" ;;')
    out = tmp_path / "out"
    assert start("--out", out, "--data", tmp_path, **environment, TORCH_EXTENSIONS_DIR="").returncode == 0
    for name in ("preflight", "tests"):
        said = (out / "work" / "results" / f"{name}.log").read_text()
        assert f"extensions in {out}/work/extensions" in said


def test_wrong_kernels_end_the_round(tmp_path: Path) -> None:
    environment, calls = recorded(tmp_path, cases="*preflight*) exit 3 ;;")
    ended = start("--out", tmp_path / "out", "--data", tmp_path, **environment)
    assert ended.returncode == 3
    assert "The loss kernels are wrong on this device" in ended.stderr
    assert len(calls.read_text().splitlines()) == 1
    assert (tmp_path / "out" / "gpu_round.tar.gz").is_file()


def test_without_data_no_student_is_compared_and_speed_is_measured_on_invented_text(tmp_path: Path) -> None:
    environment, calls = recorded(tmp_path)
    ended = start("--out", tmp_path / "out", **environment)
    assert ended.returncode == 0, ended.stderr
    asked = calls.read_text()
    assert asked.startswith(f"benchmarks/stand_in_data.py {tmp_path}/out/work/data")
    assert "dwt_ds.pretrain" not in asked
    assert "distilled: passed over, needs --data" in ended.stdout


def test_a_cut_short_teacher_is_the_last_that_it_exported_also_for_a_repetition(tmp_path: Path) -> None:
    environment, calls = recorded(tmp_path, cases="*/work/distilled*) exit 1 ;;")
    export = tmp_path / "out" / "work" / "teacher" / "export"
    for step in ("step_00000250", "step_00000500"):
        (export / step).mkdir(parents=True)
    for _ in range(2):
        calls.write_text("")
        assert start("--out", tmp_path / "out", "--data", tmp_path, **environment).returncode == 1
        assert f"teacher.path={export}/step_00000500 " in calls.read_text()
        (export / "config.json").touch()  # the teacher is finished in the meantime


def test_a_teacher_that_is_finished_before_distilled_begins_is_the_last_one(tmp_path: Path) -> None:
    environment, calls = recorded(tmp_path)
    export = tmp_path / "out" / "work" / "teacher" / "export"
    (export / "step_00000500").mkdir(parents=True)
    round_of = ("--out", tmp_path / "out", "--data", tmp_path, "--only")
    assert start(*round_of, "teacher", **environment).returncode == 0
    (export / "config.json").touch()
    assert start(*round_of, "distilled", **environment).returncode == 0
    assert f"teacher.path={export} " in calls.read_text()


def test_stages_can_be_chosen(tmp_path: Path) -> None:
    environment, calls = recorded(tmp_path)
    out = tmp_path / "out"
    chosen = start("--out", out, "--data", tmp_path, "--only", "logits_form,alone", **environment)
    assert chosen.returncode == 0, chosen.stderr
    assert outcomes(out) == {"logits_form": "0", "alone": "0"}
    assert len(calls.read_text().splitlines()) == 2
    ended = start("--out", tmp_path / "spaces", "--data", tmp_path, "--only", " logits_form, alone", **environment)
    assert ended.returncode == 0, ended.stderr
    assert outcomes(tmp_path / "spaces") == {"logits_form": "0", "alone": "0"}


def test_a_stage_that_reads_rows_has_some(tmp_path: Path) -> None:
    environment, _ = recorded(tmp_path)
    for stage in ("training_speed", "training_modes"):
        out = tmp_path / stage
        assert start("--out", out, "--only", f"linear_form,{stage}", **environment).returncode == 0
        assert outcomes(out) == {"data": "0", stage: "0", "linear_form": "0"}
    without = start("--out", tmp_path / "without", "--only", "linear_form", **environment)
    assert without.returncode == 0
    assert "passed over" not in without.stdout, "of stages that nobody asked for"
    assert outcomes(tmp_path / "without") == {"linear_form": "0"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--outt", "x"], "--outt: unknown"),
        ([], "--out DIR is missing"),
        (["--out"], "--out needs a folder"),
        (["--out", "x", "--only", "tests,speed"], "--only speed: no such stage; --dry-run lists them"),
        (["--out", "x", "--only", "tests,alone"], "--only alone: needs --data"),
        (["--out", "x", "--only", "install"], "--only install: needs --wheels"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    ended = start(*arguments)
    assert ended.returncode != 0
    assert message in ended.stderr


# pytest's own variables would reach the round's tests.
ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTEST_ADDOPTS": ""}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_speed_can_be_measured_on_invented_text(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = start("--out", out, "--tiny", "--only", "data,training_speed", **ON_CPU)
    results = out / "work" / "results"
    logs = [(results / f"{name}.log").read_text()[-2000:] for name in ("data", "training_speed")]
    assert ended.returncode == 0, logs
    assert outcomes(out) == {"data": "0", "training_speed": "0"}
    with (results / "training_steps.csv").open() as lines:
        assert {"4", "2"} <= {row["micro_batch"] for row in csv.DictReader(lines)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_that_a_cpu_can_runs_there(tmp_path: Path, tiny_data: Path) -> None:
    out = tmp_path / "out"
    ended = start("--out", out, "--data", tiny_data, "--tiny", **ON_CPU)
    found = outcomes(out)
    logs = {
        name: (out / "work" / "results" / f"{name}.log").read_text()[-2000:] for name in found if found[name] != "0"
    }
    assert set(logs) == {"injection"}, logs
    assert "needs a CUDA device" in logs["injection"]
    assert ended.returncode == 1
    page = (out / "summary.md").read_text()
    # The optimizer's class, for example "AdamW of torch", depends on what has been compiled.
    assert re.search(r"^\| dwt_ds \| \w+ of \w+ \| off \| off \| 4 \|", page, re.MULTILINE), page
    for measured in ("| loop |", "| torch.compile | 8 | 500 |", "| dwt_kernels chunked | 8 |", "| 4 | distilled |"):
        assert measured in page
