"""The command itself, on this machine and on hosts that do not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from harness.ranks import SERVER_ENVIRONMENT, Ended, Python
from harness.waiting import wait_until

from dwt_ds.base.ports import reserve_port
from dwt_ds.base.processes import OUR_MODULE, own_command

# Operators may have to be compiled.
pytestmark = pytest.mark.timeout(900)

# Reaches this machine under every name but that of a host that is dead, and writes down whom it was asked for.
SSH = """#!/bin/bash
host=${{@: -2:1}}
echo "$host" >> {asked}
[[ $host != 127.0.0.9 ]] || {{ echo 'No route to host' >&2; exit 255; }}
exec sh -c "${{@: -1}}"
"""
# As Slurm's: as many tasks as -n says, with the variables of --export and its own.
SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
tasks = int(words[words.index("-n") + 1])
assert words[words.index("--nodelist") + 1] == "127.0.0.1,127.0.0.2"
(export,) = [word for word in words if word.startswith("--export=ALL,")]
given = dict(pair.split("=") for pair in export.split(",")[1:])
numbers = [{{"SLURM_PROCID": str(i), "SLURM_NTASKS": str(tasks), "SLURM_LOCALID": "0"}} for i in range(tasks)]
step = {{"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}}
command = words[words.index(export) + 1 :]
ranks = [subprocess.Popen(command, env={{**os.environ, **given, **step, **own}}) for own in numbers]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """For the front of PATH: a cluster whose ssh and Slurm are this machine's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = {
        "ssh": SSH.format(asked=tmp_path / "asked"),
        "srun": SRUN.format(python=sys.executable),
        "sinfo": "#!/bin/sh\n",
        "pdsh": f"#!/bin/sh\ntouch {tmp_path}/pdsh-was-run; exit 1\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


Doctor = Callable[..., Ended]


@pytest.fixture
def doctor(python: Python, tmp_path: Path) -> Doctor:
    def run(*arguments: str, **environment: str) -> Ended:
        return python("-m", OUR_MODULE, "doctor", *arguments, environment=environment, cwd=tmp_path)

    return run


@pytest.mark.slow  # compiles, and starts a process for each check
def test_a_machine_without_gpu_or_ssh_is_in_order(doctor: Doctor, tmp_path: Path) -> None:
    done = doctor()
    assert done.code == 0, done.out + done.err
    lines = done.out.splitlines()
    checks = {line.split("  ")[1].strip() for line in lines if line.startswith("PASS")}
    assert {"versions", "GPUs", "interfaces", "disk", "shared folder", "loss kernel", "collective"} <= checks
    assert "FAIL" not in done.out
    assert "2 ranks on 1 host(s)" in done.out
    assert lines[-1] == "everything is in order"
    assert "\033" not in done.out
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_ssh_does_not_reach_fails_with_a_fix(programs: Path, doctor: Doctor, tmp_path: Path) -> None:
    (programs / "ssh").write_text("#!/bin/sh\necho 'No route to host' >&2; exit 255\n", encoding="utf-8")
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n", encoding="utf-8")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = doctor("--hostfile", "hosts", PATH=path, HOME=str(tmp_path))
    assert done.code == 1, done.err
    assert "No route to host  ->  make `ssh -o BatchMode=yes node-2 true` work" in done.out
    assert sum(line.startswith("FAIL  ssh ") for line in done.out.splitlines()) == 2
    assert done.out.splitlines()[-1].endswith("of 3 checks failed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_starts_without_the_doctor(number: signal.Signals, programs: Path, tmp_path: Path) -> None:
    """Its ssh to two hosts waits for an answer, in two threads, when the doctor is told to end."""
    (programs / "ssh").write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/waiting\nexec sleep 600\n", encoding="utf-8")
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n", encoding="utf-8")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    command = own_command("doctor", "--hostfile", "hosts")
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, **SERVER_ENVIRONMENT, "PATH": path},
        stderr=subprocess.PIPE,
        # A shell's background job ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    try:
        asked = tmp_path / "waiting"
        wait_until(lambda: asked.is_file() and asked.read_text().count("\n") == 2)
        waiting = [int(line) for line in asked.read_text().split()]
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert not any(psutil.pid_exists(pid) for pid in waiting)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_cluster_without_pdsh_whose_dead_host_is_left_out_is_in_order(
    programs: Path, doctor: Doctor, tmp_path: Path
) -> None:
    names = ["127.0.0.9", "127.0.0.1", "127.0.0.2"]
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in names), encoding="utf-8")
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=lo\n", encoding="utf-8")
    port = {"MASTER_PORT": str(reserve_port())}
    settings = {"DEEPSPEED_ARGS": "--exclude 127.0.0.9", "LAUNCHER": "slurm", **port}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = doctor("--hostfile", "hosts", PATH=path, **settings)
    assert done.code == 0, done.out + done.err
    assert "slurm: sinfo is installed here" in done.out
    assert "2 ranks on 1 host(s)" in done.out
    assert set((tmp_path / "asked").read_text(encoding="utf-8").split()) == {"127.0.0.1", "127.0.0.2"}
    assert not (tmp_path / "pdsh-was-run").exists()


def test_the_launcher_that_is_asked_for_must_be_there(programs: Path, doctor: Doctor, tmp_path: Path) -> None:
    (programs / "sinfo").unlink()
    (programs / "ssh").write_text("#!/bin/sh\nexit 255\n", encoding="utf-8")
    (tmp_path / "hosts").write_text("node-1 slots=1\n", encoding="utf-8")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = doctor("--hostfile", "hosts", PATH=path, HOME=str(tmp_path), LAUNCHER="slurm")
    assert done.code == 1, done.err
    assert "slurm: sinfo is not installed here  ->  start where Slurm's commands are, inside an alloc" in done.out
    done = doctor("--hostfile", "hosts", HOME=str(tmp_path), LAUNCHER="mvapich")
    assert done.code == 2
    assert done.err == "error: LAUNCHER=mvapich: no such launcher; one of pdsh, openmpi, mpich, impi, slurm, srun\n"


def test_a_hostfile_that_is_missing_or_names_a_host_twice_is_refused(doctor: Doctor, tmp_path: Path) -> None:
    done = doctor("--hostfile", "none", HOME=str(tmp_path))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: hostfile none: no such file; ")
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-1 slots=1\n", encoding="utf-8")
    done = doctor("--hostfile", "hosts", HOME=str(tmp_path))
    assert done.code == 2
    assert done.err == "error: hostfile hosts: line 2 names node-1 again; keep one line and add up its slots\n"
