"""Logins before a launch: pdsh is the real one, and ssh a script that knows two hosts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.errors import error_of

from dwt_ds.launch.local import Launch
from dwt_ds.launch.logins import check_logins
from dwt_ds.launch.multinode import on_hosts

pytestmark = pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")

# Its words come last: ssh's options, the host, the command.
SSH = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
case " $* " in
  *" node-1 "*|*" node-2 "*) exit 0 ;;
  *" locked "*) echo "@@@ WARNING @@@" >&2; echo "Permission denied (publickey)." >&2; exit 255 ;;
  *" silent "*) exit 255 ;;
  *) echo "ssh: Could not resolve hostname" >&2; exit 255 ;;
esac
"""

Start = Callable[..., Launch]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """`start(hosts, **variables)`: a launch on these hosts."""
    (tmp_path / "ssh").write_text(SSH, encoding="utf-8")
    (tmp_path / "ssh").chmod(0o755)

    def launch(hosts: str, **variables: str) -> Launch:
        (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts.split()), encoding="utf-8")
        of_hosts = on_hosts(tmp_path / "hosts", {**os.environ, **variables})
        of_hosts.environment["PATH"] = f"{tmp_path}:{of_hosts.environment['PATH']}"
        return of_hosts

    return launch


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text(encoding="utf-8").splitlines()


def test_every_host_in_use_is_tried_with_the_options_of_the_launch(start: Start, tmp_path: Path) -> None:
    check_logins(
        start(
            "node-1 absent node-2",
            DEEPSPEED_ARGS="--exclude absent --ssh_port 2222",
            LAUNCHER_ARGS="-l someone",
            PDSH_SSH_ARGS_APPEND="-o Compression=yes",
        )
    )
    assert len(calls(tmp_path)) == 2
    for call in calls(tmp_path):
        for words in ("-lsomeone", "-p 2222", "-o Compression=yes", "-o BatchMode=yes", "-o ConnectTimeout=15"):
            assert words in call


def test_a_host_without_a_login_is_named_with_what_ssh_says(start: Start) -> None:
    assert error_of(check_logins, start("node-1 locked node-2")).startswith(
        "no login to locked (Permission denied (publickey).); `ssh HOST true` has to work from here"
    )
    assert "no login to silent (ssh exited with exit code 255);" in error_of(check_logins, start("silent node-2"))


def test_of_many_hosts_three_are_named(start: Start) -> None:
    message = error_of(check_logins, start("a b node-1 c d e"))
    assert message.count("ssh: Could not resolve hostname") == 3
    assert "c (ssh: Could not resolve hostname) and 2 more; " in message


def test_options_that_pdsh_refuses_are_the_users_mistake(start: Start) -> None:
    message = error_of(check_logins, start("node-1 node-2", LAUNCHER_ARGS="-Z"))
    assert message == "pdsh: invalid option -- 'Z'; correct LAUNCHER_ARGS, which pdsh gets"
    started = start("node-1 node-2", DEEPSPEED_ARGS="--launcher_args='-l")
    assert error_of(check_logins, started) == "--launcher_args: No closing quotation"


def test_a_pdsh_that_ends_without_a_word_is_reported(start: Start, tmp_path: Path) -> None:
    (tmp_path / "pdsh").write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    (tmp_path / "pdsh").chmod(0o755)
    message = error_of(check_logins, start("node-1 node-2"))
    assert message == "pdsh ended with exit code 3; correct LAUNCHER_ARGS, which pdsh gets"


@pytest.mark.parametrize(
    "variables",
    [
        {"DEEPSPEED_ARGS": "--no_ssh --node_rank 0"},
        {"DEEPSPEED_ARGS": "--no_ssh_check"},
        {"LAUNCHER": "openmpi"},
    ],
)
def test_where_no_ssh_is_needed_or_wanted_none_is_tried(
    start: Start, tmp_path: Path, variables: dict[str, str]
) -> None:
    check_logins(start("a b", **variables))
    check_logins(start("localhost", **variables))
    assert not (tmp_path / "calls").exists()
