"""The command itself, on this machine and on hosts that do not answer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

# Operators may have to be compiled.
pytestmark = pytest.mark.timeout(900)

CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def doctor(arguments: Sequence[str], tmp_path: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dwt_ds.cli.main", "doctor", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **CPU, **environment},
    )


def test_a_machine_without_gpu_or_ssh_is_in_order(tmp_path: Path) -> None:
    done = doctor([], tmp_path, {})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    checks = {line.split("  ")[1].strip() for line in lines if line.startswith("PASS")}
    assert {"versions", "GPUs", "interfaces", "disk", "shared folder", "loss kernel", "collective"} <= checks
    assert "FAIL" not in done.stdout
    assert "2 ranks on 1 host(s)" in done.stdout
    assert lines[-1] == "everything is in order"
    assert "\033" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_ssh_does_not_reach_fails_with_a_fix(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text("#!/bin/sh\necho 'No route to host' >&2; exit 255\n", encoding="utf-8")
    (programs / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n", encoding="utf-8")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = doctor(["--hostfile", "hosts"], tmp_path, {"PATH": path, "HOME": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    assert "No route to host  ->  make `ssh -o BatchMode=yes node-2 true` work" in done.stdout
    assert sum(line.startswith("FAIL  ssh ") for line in done.stdout.splitlines()) == 2
    assert done.stdout.splitlines()[-1].endswith("of 3 checks failed")


def test_a_hostfile_that_is_missing_or_names_a_host_twice_is_refused(tmp_path: Path) -> None:
    done = doctor(["--hostfile", "none"], tmp_path, {"HOME": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: hostfile none: no such file; see launchers/hostfile.example\n"
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-1 slots=1\n", encoding="utf-8")
    done = doctor(["--hostfile", "hosts"], tmp_path, {"HOME": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr == "error: hostfile hosts: line 2 names node-1 again; keep one line and add up its slots\n"
