"""Several hosts on one machine: network namespaces joined by a bridge, each with its own processes, name and sshd."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from harness.waiting import wait_until

NETWORK = "10.77.0"
PROGRAMS = ("ip", "pdsh", "sshd", "ssh", "ssh-keygen", "unshare", "nsenter", "mount")

SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
ListenAddress 0.0.0.0
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
LogLevel ERROR
MaxStartups 64
"""

SSH = """
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""

# What a host does when it is switched on. Its folders are the machine's own, like a shared file system, but for what
# every real host has to itself.
BOOT = """
set -e
hostname {name}
ip link set lo up
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
exec {sshd} -D -e -f {folder}/sshd_config
"""


class Cluster:
    """Hosts node-1 to node-N, by number; node-1 is 10.77.0.1."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count
        self._prefix = f"dwt{secrets.token_hex(2)}"
        self._switch = f"{self._prefix}-0"
        self._hosts: dict[int, subprocess.Popen[bytes]] = {}

    def switch_on(self) -> None:
        """The network and every host."""
        self._write_files()
        _do("ip", "netns", "add", self._switch)
        self._in_switch("ip", "link", "add", "bridge", "type", "bridge")
        self._in_switch("ip", "link", "set", "bridge", "up")
        for number in range(1, self.count + 1):
            self.boot(number)

    def boot(self, number: int) -> None:
        """Switch a host on and wait until it answers over ssh."""
        name = f"{self._prefix}-{number}"
        _do("ip", "netns", "add", name)
        # With an address that stays, since the others remember it.
        card = ["eth0", "address", f"02:00:00:00:00:{number:02x}"]
        _do("ip", "-n", name, "link", "add", *card, "type", "veth", "peer", "name", f"port{number}")
        _do("ip", "-n", name, "link", "set", f"port{number}", "netns", self._switch)
        self._in_switch("ip", "link", "set", f"port{number}", "master", "bridge", "up")
        _do("ip", "-n", name, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        _do("ip", "-n", name, "link", "set", "eth0", "up")
        script = BOOT.format(name=f"node-{number}", folder=self.folder, sshd=shutil.which("sshd"))
        own = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(self.folder / f"node-{number}.log", "wb") as log:
            self._hosts[number] = subprocess.Popen(
                ["ip", "netns", "exec", name, "unshare", *own, "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        give_up = time.monotonic() + 60
        while self.run(number, ["ssh", f"node-{number}", "true"]).returncode != 0:
            if time.monotonic() > give_up:
                raise OSError(f"node-{number} does not answer: {(self.folder / f'node-{number}.log').read_text()}")
            time.sleep(0.2)

    def cut_off(self, number: int) -> None:
        """What a power failure does: no packet more, not even that connections are closed; and all processes gone."""
        self._in_switch("ip", "link", "set", f"port{number}", "down")
        self._kill(number)
        self._in_switch("ip", "link", "delete", f"port{number}")

    def shut_down(self) -> None:
        for number in list(self._hosts):
            self._kill(number)
        for number in range(1, self.count + 1):
            _do("ip", "netns", "delete", f"{self._prefix}-{number}", check=False)
        _do("ip", "netns", "delete", self._switch, check=False)

    def start(
        self, number: int, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """A command on a host, as from a shell there, in the cluster's folder."""
        words = ["nsenter", "--target", str(self._init_of(number)), "--net", "--mount", "--uts", "--ipc", "--pid"]
        words += ["sh", "-c", 'cd "$0" && exec "$@"', str(self.folder), *map(str, command)]
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )

    def run(
        self,
        number: int,
        command: Sequence[str],
        environment: dict[str, str] | None = None,
        *,
        timeout_seconds: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """The same, to its end; pytest's failure if it hangs."""
        return end_of(self.start(number, command, environment), timeout_seconds)

    def replace(self, number: int, path: Path, other: Path) -> None:
        """From now on this host finds `other` at `path`, file or folder."""
        done = self.run(number, ["mount", "--bind", str(other), str(path)])
        assert done.returncode == 0, done.stdout

    def put_back(self, number: int, path: Path) -> None:
        self.run(number, ["umount", str(path)])

    def _write_files(self) -> None:
        for key in ("key", "host_key"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder), encoding="utf-8")
        (self.folder / "ssh_config").write_text(SSH.format(folder=self.folder), encoding="utf-8")
        names = "".join(f"{NETWORK}.{number} node-{number}\n" for number in range(1, self.count + 1))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="utf-8")
        variables = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        # The operators that this session has compiled, and the ninja that finds them up to date.
        variables |= {name: os.environ[name] for name in ("PATH", "TORCH_EXTENSIONS_DIR")}
        lines = [f"{name}={value}\n" for name, value in variables.items()]
        (self.folder / ".deepspeed_env").write_text("".join(lines), encoding="utf-8")

    def _in_switch(self, *command: str) -> None:
        _do("ip", "netns", "exec", self._switch, *command)

    def _init_of(self, number: int) -> int:
        host = psutil.Process(self._hosts[number].pid)
        wait_until(host.children)
        return int(host.children()[0].pid)

    def _kill(self, number: int) -> None:
        host = self._hosts.pop(number)
        # The end of a host's first process is the end of all its processes.
        host.kill()
        host.wait()
        _do("ip", "netns", "delete", f"{self._prefix}-{number}", check=False)


def end_of(process: subprocess.Popen[str], timeout_seconds: float) -> subprocess.CompletedProcess[str]:
    """Exit code and output (both streams) of a started command; pytest's failure if it hangs."""
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        # The launcher's ranks have sessions of their own, and hold the pipe.
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            each.kill()
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"still running after {timeout_seconds:.0f} s: {shlex.join(map(str, process.args))}\n{output}")
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


def _do(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise OSError(f"{shlex.join(command)}: {done.stderr.strip()}")


def why_no_hosts() -> str:
    """What this machine lacks for hosts of its own; "" if nothing."""
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"programs missing: {', '.join(missing)} (Debian: iproute2 openssh-client openssh-server pdsh)"
    probe = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "mount", "-t", "tmpfs", "none", "/mnt"]
    done = subprocess.run(probe, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"namespaces cannot be had here: {done.stderr.strip()}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four hosts. Skips where a machine cannot have them, and fails there if it is CI's."""
    problem = why_no_hosts()
    if problem:
        if os.environ.get("CI") == "true":
            pytest.fail(problem)
        pytest.skip(problem)
    hosts = Cluster(tmp_path_factory.mktemp("cluster"), 4)
    try:
        hosts.switch_on()
        yield hosts
    finally:
        hosts.shut_down()
