"""Hosts, launcher and options of a run over a hostfile, and what DeepSpeed makes of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.errors import error_of

from dwt_ds.launch.hostfile import Host
from dwt_ds.launch.local import DEEPSPEED, Launch
from dwt_ds.launch.multinode import active_hosts, on_hosts, read_options

HOSTS = [Host("node-1", 2), Host("node-2", 4), Host("node-3", 2)]
# Values that a shell would act on.
ODD = [
    "output_dir=runs/a b",
    "teacher.path=$(touch pwned);touch pwned`touch pwned`",
    'teacher.path=$(touch pwned) ; "quoted" \\n `touch pwned` $HOME',
    "distill.soft_weight={schedule: linear, start: 4, end: 1}",
    "train.betas=[0.9,0.99]",
    "data.dir=it's|a*b?&#~!",
    "data.dir='quoted words'",
]


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--exclude node-1",
        "--exclude node-2:0,3@node-3",
        "-e node-1:0@node-1:1",
        "--include node-3@node-1",
        "--include=node-2:3,1,1",
        "-i node-2@node-2:0",
        "--incl node-3 --log_level info",
        "--include node-1 --include node-2",
        "--num_nodes 2",
        "--num_nodes 9",
        "--num_nodes 0 --num_gpus 3",
        "--num_nodes=1 --num_accelerators 1 --launcher slurm --no_ssh_check --master_port=29511",
    ],
)
def test_filters_leave_what_deepspeed_leaves(options: str) -> None:
    from deepspeed.launcher import runner

    theirs = runner.parse_args([*options.split(), "script.py"])
    pool = {host.name: host.slots for host in HOSTS}
    active = runner.parse_inclusion_exclusion(pool, theirs.include, theirs.exclude)
    active = runner.apply_num_nodes_and_gpus(active, theirs.num_nodes, theirs.num_gpus)
    ours = read_options(options.split())
    assert active_hosts(HOSTS, ours) == [Host(name, len(slots)) for name, slots in active.items()]
    assert (ours.launcher, ours.master_port) == (theirs.launcher, theirs.master_port)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--exclude node-4", '--exclude node-4: the hostfile has no "node-4"; name its hosts, as in'),
        ("--include node-1,node-2", '--include node-1,node-2: the hostfile has no "node-1,node-2"; name its hosts'),
        ("--include node-1:2", '--include node-1:2: node-1 has no slot "2"; it has 0 to 1'),
        ("--include node-1:0-1", '--include node-1:0-1: node-1 has no slot "0-1"; it has 0 to 1'),
        ("--include node-1:", '--include node-1:: node-1 has no slot ""; it has 0 to 1'),
        ("--include node-1 --exclude node-2", "--include and --exclude cannot be combined; give one of them"),
        ("--include node-1 --num_gpus 0", "--include cannot be combined with --num_nodes or --num_gpus; give one"),
        ("--exclude node-1@node-2@node-3", "--exclude node-1@node-2@node-3 leaves no host; exclude fewer"),
        ("--num_nodes two", "argument --num_nodes: invalid int value: 'two'"),
        ("--exclude", "argument -e/--exclude: expected one argument"),
    ],
)
def test_a_bad_filter_is_refused_with_the_fix(options: str, message: str) -> None:
    said = error_of(lambda: active_hosts(HOSTS, read_options(options.split())))
    assert said.startswith(f"DEEPSPEED_ARGS: {message}")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Launch]:
    """`start(hostfile's lines, NAME=value ...)` in an empty folder that is home, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def on_lines(lines: str, **environment: str) -> Launch:
        Path("hosts").write_text(lines, encoding="utf-8")
        return on_hosts(Path("hosts"), environment)

    return on_lines


LINES = "".join(f"{host.name} slots={host.slots}\n" for host in HOSTS)


@pytest.mark.parametrize(
    ("environment", "launcher", "options"),
    [
        ({}, "pdsh", "--master_addr node-1 --force_multi"),
        (
            {"MASTER_ADDR": "10.0.0.1", "DEEPSPEED_ARGS": "--include node-2:0,1\n--ssh_port 2222"},
            "pdsh",
            "--master_addr 10.0.0.1 --include node-2:0,1 --ssh_port 2222 --force_multi",
        ),
        ({"MASTER_PORT": "29511"}, "pdsh", "--master_addr node-1 --master_port 29511 --force_multi"),
        ({"DEEPSPEED_ARGS": "-e node-1"}, "pdsh", "--master_addr node-2 -e node-1 --force_multi"),
        (
            {"DEEPSPEED_ARGS": "--no_ssh --node_rank 0", "LAUNCHER": "slurm"},
            "none",
            "--master_addr node-1 --no_ssh --node_rank 0 --launcher slurm --force_multi",
        ),
        ({"LAUNCHER": "Slurm"}, "slurm", "--master_addr node-1 --launcher Slurm --force_multi --no_ssh_check"),
        (
            {"DEEPSPEED_ARGS": "--launcher=mpich"},
            "mpich",
            "--master_addr node-1 --launcher=mpich --force_multi --no_ssh_check",
        ),
        (
            {"LAUNCHER": "impi", "DEEPSPEED_ARGS": "--launcher pdsh"},
            "impi",
            "--master_addr node-1 --launcher pdsh --launcher impi --force_multi --no_ssh_check",
        ),
    ],
    ids=str,
)
def test_launcher_and_options_come_from_the_environment(
    environment: dict[str, str], launcher: str, options: str, start: Callable[..., Launch]
) -> None:
    launch = start(LINES, **environment)
    assert launch.launcher == launcher
    assert launch.options == ["--hostfile", "hosts", *options.split()]
    assert launch.master_address == launch.options[3]


def test_a_hostfile_of_this_machine_alone_needs_no_ssh(start: Callable[..., Launch]) -> None:
    launch = start("localhost slots=2", LAUNCHER="openmpi")
    assert launch.launcher == "none"
    assert "--force_multi" not in launch.options
    assert "--no_ssh_check" in launch.options
    assert launch.command("m", ODD)[-len(ODD) :] == ODD


def test_mpi_and_slurm_start_a_file_whose_ranks_find_the_first_host(start: Callable[..., Launch]) -> None:
    launch = start(LINES, LAUNCHER="openmpi", LAUNCHER_ARGS="--mca a 'b c'", DEEPSPEED_ARGS="--master_port 29511")
    assert launch.options[-1] == "--launcher_args=-x MASTER_ADDR -x MASTER_PORT --mca a 'b c'"
    assert (launch.environment["MASTER_ADDR"], launch.environment["MASTER_PORT"]) == ("node-1", "29511")
    assert start(LINES, LAUNCHER="slurm", LAUNCHER_ARGS="--time 5").options[-1] == "--launcher_args=--time 5"
    assert start(LINES, LAUNCHER="mpich").environment["MASTER_PORT"] == "29500"


def test_ssh_notices_a_host_that_is_gone(start: Callable[..., Launch]) -> None:
    ssh = start(LINES, PDSH_SSH_ARGS_APPEND="-p 2222").environment["PDSH_SSH_ARGS_APPEND"]
    assert ssh == "-o ServerAliveInterval=15 -o ServerAliveCountMax=4 -p 2222"


def test_under_slurm_each_node_starts_its_own_ranks(start: Callable[..., Launch]) -> None:
    Path(".deepspeed_env").write_text("NCCL_DEBUG=INFO\n", encoding="utf-8")
    slurm = {"LAUNCHER": "srun", "MASTER_PORT": "21234", "SLURM_CPUS_ON_NODE": "64", "LAUNCHER_ARGS": "--mem 0"}
    launch = start(LINES, **slurm)
    command = launch.command("dwt_ds.pretrain", ODD)
    srun = "srun --ntasks-per-node=1 --cpus-per-task=64 --kill-on-bad-exit=1 --label --mem 0 bash -c"
    assert command[:9] == srun.split()
    assert command[10] == sys.executable
    assert not any(word.startswith("--launcher_args") for word in command)
    assert launch.environment["NCCL_DEBUG"] == "INFO"
    with pytest.raises(ValueError, match="^DEEPSPEED_ARGS: LAUNCHER=srun uses all nodes of the job; "):
        start(LINES, **slurm, DEEPSPEED_ARGS="--exclude node-1")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LAUNCHER": "mvapich"}, "LAUNCHER=mvapich: no such launcher; one of pdsh, openmpi, mpich, impi, slurm, srun"),
        ({"MASTER_PORT": "none"}, "MASTER_PORT=none: write a whole number from 1 to 65535"),
        ({"LAUNCHER_ARGS": "--a 'b"}, "LAUNCHER_ARGS=--a 'b: No closing quotation; close it"),
        (
            {"DEEPSPEED_ARGS": "--exclude node-4"},
            'DEEPSPEED_ARGS: --exclude node-4: the hostfile has no "node-4"; ',
        ),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_in_one_line(
    environment: dict[str, str], message: str, start: Callable[..., Launch]
) -> None:
    assert error_of(start, LINES, **environment).startswith(message)


def test_a_bad_line_of_either_file_is_refused_before_anything_starts(start: Callable[..., Launch]) -> None:
    with pytest.raises(ValueError, match='^hostfile hosts: line 1 is "node-1"; write it as: HOST slots=N$'):
        start("node-1")
    Path(".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n# why=because\n", encoding="utf-8")
    with pytest.raises(ValueError, match='line 2 is "# why=because"; write NAME=VALUE'):
        start(LINES)


@pytest.fixture
def made_by_deepspeed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Launch], list[str]]:
    """The words that DeepSpeed's launcher starts for a `Launch` of dwt_ds.pretrain with ODD; nothing is started."""
    from deepspeed.launcher import multinode_runner, runner

    class Started:
        returncode = 0

        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

        def wait(self) -> None:
            pass

    started: list[list[str]] = []

    def start(launch: Launch) -> list[str]:
        words = launch.command("dwt_ds.pretrain", ODD)
        with monkeypatch.context() as patched:
            patched.setattr(multinode_runner.shutil, "which", lambda name: f"/bin/{name}")
            patched.setattr(runner.subprocess, "check_call", lambda *_, **__: 0)
            patched.setattr(runner.subprocess, "Popen", Started)
            patched.setattr(runner.signal, "signal", lambda *_: None)
            runner.main(words[words.index("--log_level") :])
        return started[-1]

    return start


def test_odd_values_reach_the_other_hosts_unchanged_through_deepspeed_and_pdsh(
    start: Callable[..., Launch], made_by_deepspeed: Callable[[Launch], list[str]], tmp_path: Path
) -> None:
    words = made_by_deepspeed(start(LINES))
    # pdsh joins its words with spaces, and the other host's shell reads that line.
    line = " ".join(words[words.index("-w") + 2 :])
    launcher = f"{sys.executable} -u -m deepspeed.launcher.launch"
    assert launcher in line
    line = line.replace(launcher, "printf '%s\\0'")
    received = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=tmp_path).stdout.split("\0")[:-1]
    assert received[received.index("dwt_ds.pretrain") + 1 :] == ODD
    assert "--module" in received
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["mpich", "impi", "slurm", "openmpi"])
def test_what_deepspeed_makes_of_mpi_and_slurm_starts_the_training(
    name: str, start: Callable[..., Launch], made_by_deepspeed: Callable[[Launch], list[str]]
) -> None:
    words = made_by_deepspeed(start("node-1 slots=2\nnode-2 slots=2\n", LAUNCHER=name))
    at = words.index("dwt_ds.pretrain")
    assert words[at + 1 : at + 1 + len(ODD)] == ODD
    assert Path(words[at - 1]).name == "run_module.py"
    # The interpreter, and DeepSpeed's helper where it needs one; never -m, which these launchers lose.
    assert words[at - (5 if name == "mpich" else 2)] == "-u"
    assert "-m" not in words


def test_what_deepspeed_makes_of_srun_is_this_nodes_ranks(
    start: Callable[..., Launch], made_by_deepspeed: Callable[[Launch], list[str]]
) -> None:
    launch = start(LINES, LAUNCHER="srun", MASTER_PORT="21234")
    on_node = launch._replace(options=[*launch.options, "--node_rank", "1"])
    words = made_by_deepspeed(on_node)
    assert words[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    assert {"--node_rank=1", "--master_addr=node-1", "--master_port=21234", "--module"} <= set(words)
    assert words[words.index("dwt_ds.pretrain") + 1 :] == ODD


def test_on_this_machine_and_on_hosts_deepspeeds_launcher_is_the_same(start: Callable[..., Launch]) -> None:
    assert start(LINES).command("m")[: len(DEEPSPEED)] == DEEPSPEED
