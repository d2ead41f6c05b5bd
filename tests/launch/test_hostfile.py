from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dwt_ds.launch.hostfile import Host, active_hosts, read_deepspeed_env, read_hostfile
from dwt_ds.launch.options import read_options


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text, encoding="utf-8")
    return path


def test_hosts_come_in_their_order_without_comments(tmp_path: Path) -> None:
    path = write(tmp_path, "# ours\n\nnode-2 slots=8\r\n  10.0.0.1\tslots=4   # the old one\n")
    assert read_hostfile(path) == [Host("node-2", 8), Host("10.0.0.1", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nobody\n", "names no host; see launchers/hostfile.example"),
        ("a slots=8\nb\n", 'line 2 is "b"; write it as: HOST slots=N'),
        ("a slots=0\n", 'line 1 is "a slots=0"; write it as: HOST slots=N'),
        ("a slots=8 slots=8\n", 'line 1 is "a slots=8 slots=8"; write it as: HOST slots=N'),
        ("a slots=8\n#\na slots=4\n", "line 3 names a again; keep one line and add up its slots"),
        ("node[1-4] slots=8\n", 'line 1 names "node[1-4]"; a host is written in letters, digits and . - _, one a line'),
        ("-oProxyCommand=x slots=8\n", 'line 1 names "-oProxyCommand=x"; a host is written in letters'),
        ("a;reboot slots=8\n", 'line 1 names "a;reboot"; a host is written in letters'),
        ("me@a slots=8\n", "(user and port go into ~/.ssh/config)"),
    ],
)
def test_a_bad_line_is_told_with_its_number_and_the_fix(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"^hostfile .*hosts: ") as told:
        read_hostfile(path)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such hosts: no such file; see launchers/hostfile\.example"):
        read_hostfile(tmp_path / "no such hosts")


HOSTS = [Host("node-1", 2), Host("node-2", 4), Host("node-3", 2)]


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
        "--num_nodes=1 --num_accelerators 1 --launcher slurm --no_ssh_check",
    ],
)
def test_filters_leave_what_deepspeed_leaves(options: str) -> None:
    from deepspeed.launcher import runner

    theirs = runner.parse_args([*options.split(), "script.py"])
    pool = {host.name: host.slots for host in HOSTS}
    active = runner.parse_inclusion_exclusion(pool, theirs.include, theirs.exclude)
    active = runner.apply_num_nodes_and_gpus(active, theirs.num_nodes, theirs.num_gpus)
    ours = active_hosts(HOSTS, read_options(options.split()))
    assert ours == [Host(name, len(slots)) for name, slots in active.items()]
    assert read_options(options.split()).launcher == theirs.launcher


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--exclude node-4", '--exclude node-4: the hostfile has no "node-4"; name its hosts, as in'),
        ("--include node-1,node-2", '--include node-1,node-2: the hostfile has no "node-1,node-2"; name its hosts'),
        ("--include node-1:2", '--include node-1:2: node-1 has no slot "2"; it has 0 to 1'),
        ("--include node-1:0-1", '--include node-1:0-1: node-1 has no slot "0-1"; it has 0 to 1'),
        ("--include node-1:", '--include node-1:: node-1 has no slot ""; it has 0 to 1'),
        ("--include node-1 --exclude node-2", "--include and --exclude do not go together; give one of them"),
        ("--include node-1 --num_gpus 0", "--include does not go with --num_nodes or --num_gpus; give one of them"),
        ("--exclude node-1@node-2@node-3", "--exclude node-1@node-2@node-3 leaves no host; leave out fewer"),
        ("--num_nodes two", "argument --num_nodes: invalid int value: 'two'"),
        ("--exclude", "argument -e/--exclude: expected one argument"),
    ],
)
def test_a_bad_filter_is_told_with_the_fix(options: str, message: str) -> None:
    with pytest.raises(ValueError, match="^DEEPSPEED_ARGS: ") as told:
        active_hosts(HOSTS, read_options(options.split()))
    assert str(told.value).startswith(f"DEEPSPEED_ARGS: {message}")
    assert "\n" not in str(told.value)


def test_the_scripts_get_names_or_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dwt_ds.launch.hostfile"]
    good = write(tmp_path, "a slots=1\nb slots=1\n")
    done = subprocess.run([*command, str(good)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "a\nb\n")
    done = subprocess.run([*command, str(good), "-e", "a"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "b\n")
    done = subprocess.run([*command, str(good), "-e", "c"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n# why=because\n", encoding="utf-8")
    done = subprocess.run([*command, str(good)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith('error: .deepspeed_env: line 2 is "# why=because"; write NAME=VALUE')
    assert len(done.stderr.splitlines()) == 1


def test_variables_of_a_later_file_go_over_those_of_an_earlier(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("A=1\nB=x=y\n", encoding="utf-8")
    (tmp_path / "here").write_text("A=2\n", encoding="utf-8")
    assert read_deepspeed_env([tmp_path / "home", tmp_path / "here"]) == {"A": "2", "B": "x=y"}


@pytest.mark.parametrize("line", ["", "NCCL_DEBUG", "# comment", "NCCL_DEBUG=", "export A=1"])
def test_a_line_that_the_launcher_cannot_read_is_told(line: str, tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text(f"A=1\n{line}\nB=2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"env: line 2 is .*write NAME=VALUE"):
        read_deepspeed_env([path])
