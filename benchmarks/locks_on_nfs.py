"""A folder on a real NFS: its lock when the owner is killed or cut off, and a run resumed by another host.

For docs/reliability.md:

python benchmarks/locks_on_nfs.py [--packages FOLDER]

As root on Linux. It starts a kernel of its own (user-mode Linux, with this machine's files read-only), and in it an NFS
4.2 server and two hosts in network namespaces; nothing leaves it. Debian: user-mode-linux nfs-kernel-server nfs-common
iproute2, installed, or unpacked into FOLDER (`dpkg -x`) with what they need. DeepSpeed's operators must have been
compiled (any run does), and vm.max_map_count must be some 1,000,000. Takes 5 minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parents[1]
FOLDER = "/mnt/shared/run"
LEASE_SECONDS = 15
INIT = """#!/bin/sh
export PATH={programs}:/usr/sbin:/usr/bin:/sbin:/bin OPERATORS={operators}
mount -t proc proc /proc; mount -t sysfs sys /sys
for folder in /run /mnt /var/lib; do mount -t tmpfs tmpfs $folder; done
{python} {script} --packages {packages} --inside
exec {python} -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321fedc)'
"""
SERVER = f"""
mkdir -p /run/export /run/netns /mnt/shared /var/lib/nfs/v4recovery /var/lib/nfs/rpc_pipefs
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
mount -t tmpfs export /run/export; mount -t nfsd nfsd /proc/fs/nfsd
hostname server; ip link set lo up
ip link add switch type bridge; ip address add 10.77.0.100/24 dev switch; ip link set switch up
for n in 1 2; do
  ip netns add node-$n
  ip link add eth0 netns node-$n type veth peer name port-$n; ip link set port-$n master switch up
  ip -n node-$n address add 10.77.0.$n/24 dev eth0; ip -n node-$n link set eth0 up
  ip -n node-$n link set lo up
done
echo 10 > /proc/fs/nfsd/nfsv4gracetime; echo {LEASE_SECONDS} > /proc/fs/nfsd/nfsv4leasetime
rpc.mountd -N 3; sleep 1
exportfs -o rw,no_root_squash,fsid=0,insecure,no_subtree_check '*:/run/export' 2>/dev/null
rpc.nfsd -N 3 4
"""
HOST = (
    "hostname node-{n}; mount -i -t nfs4 -o vers=4.2,addr=10.77.0.100,clientaddr=10.77.0.{n},proto=tcp,hard "
    "10.77.0.100:/ /mnt/shared && echo ready; exec sleep 1000"
)
HOLD = f"""
import os, time; from pathlib import Path; from dwt_ds.base.locks import FolderLock
lock = FolderLock(Path({FOLDER!r}), "output_dir"); print(os.getpid(), flush=True)
os.fork() or time.sleep(1000)
try:
    while True: time.sleep(1); lock.require("output_dir")
except ValueError as error: print(error, flush=True)
"""
TAKE = f"""
import time; from pathlib import Path; from dwt_ds.base.locks import FolderLock
began = time.monotonic()
while True:
    try: lock = FolderLock(Path({FOLDER!r}), "output_dir"); break
    except ValueError as error:
        if ASKED_ONCE: print(f"after {{time.monotonic() - began:.2f}} s: {{error}}"); raise SystemExit
print(f"has it after {{time.monotonic() - began:.2f}} s", flush=True)
if KEEPS_IT: time.sleep(1000)
"""
WRITE_TEXT = """
import random; from pathlib import Path
draw = random.Random(1); words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(100)]
lines = ("".join(" ".join(draw.choices(words, k=12)) + ".\\n" for _ in range(5)) for _ in range(200))
Path("/mnt/shared/text.txt").write_text("\\n".join(lines)); print("written")
"""
PREPARE = "-m dwt_ds prepare --text /mnt/shared/text.txt --train-tokenizer 300 --seq-len 32 --out /mnt/shared/data"
RUN = (
    "-m dwt_ds.pretrain paper_alone data.dir=/mnt/shared/data deepspeed_config=zero2_fp32 student.layers=2 "
    "student.hidden_size=32 student.num_heads=2 train.max_steps=12 train.micro_batch_size=4 train.log_every=1 "
    "train.eval_every=4 train.checkpoint_every=2 output_dir=/mnt/shared/"
)
KILLED_AT = "step 7/12"
EXPORTED = "/run/export"
ONE_RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
    "GLOO_SOCKET_IFNAME": "lo",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TORCH_EXTENSIONS_DIR": "/run/operators",
    "HOME": "/run",
    "TMPDIR": "/run",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("/"), metavar="FOLDER")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.packages)
        return 0
    from dwt_ds.engine.build_locks import extensions_folder  # imports torch, which the kernel inside need not do

    kernel = [str(options.packages / "usr/bin/linux.uml"), "mem=3G", "root=none", "rootfstype=hostfs", "rootflags=/"]
    consoles = ["con=null", "con0=null,fd:1", "con1=null,fd:1"]
    with tempfile.TemporaryDirectory() as folder:
        init = Path(folder, "init.sh")
        operators = extensions_folder()
        python = Path(sys.executable)
        places = {"python": python, "programs": python.parent, "packages": options.packages, "operators": operators}
        init.write_text(INIT.format(script=Path(__file__).resolve(), **places))
        init.chmod(0o755)
        command = [*kernel, "ro", "quiet", f"init={init}", *consoles]
        return subprocess.run(command, stdin=subprocess.DEVNULL).returncode


def inside(packages: Path) -> None:
    """In the kernel of its own."""
    load_modules(packages, ["veth", "bridge", "nfsv4", "nfsd"])
    folders = [packages / name for name in ("usr/sbin", "sbin")]
    libraries = [packages / name / "x86_64-linux-gnu" for name in ("usr/lib", "lib")]
    environment = {**os.environ, "PATH": ":".join(map(str, [*folders, os.environ["PATH"]]))}
    if packages != Path("/"):
        environment["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
    subprocess.run(["sh", "-c", SERVER], env=environment, check=True)
    hosts = {n: Host(n) for n in (1, 2)}
    owner = hosts[1].start(["-c", HOLD])
    print("owner on the first host; the second:", hosts[2].take(), flush=True)
    os.kill(owner.pid, 9)
    print("kill -9, its child lives; the second:", hosts[2].take(), flush=True)
    owner = hosts[1].start(["-c", HOLD])
    subprocess.run(["ip", "link", "set", "port-1", "down"], check=True)
    print("its network is gone; the second:", hosts[2].take(), flush=True)
    new = hosts[2].start(["-c", f"ASKED_ONCE, KEEPS_IT = False, True\n{TAKE}"])
    print("and then:", new.first_line, flush=True)
    subprocess.run(["ip", "link", "set", "port-1", "up"], check=True)
    print("its network is back; the owner:", owner.next_line(), flush=True)
    new.kill()

    shutil.copytree(os.environ["OPERATORS"], ONE_RANK["TORCH_EXTENSIONS_DIR"])
    hosts[1].start(["-c", WRITE_TEXT])
    hosts[1].start(PREPARE.split()).wait_for("is ready")
    hosts[1].start(f"{RUN}whole".split()).wait_for("exported")
    killed = hosts[1].start(f"{RUN}moved".split())
    killed.wait_for(KILLED_AT)
    killed.kill()
    moved = hosts[2].start(f"{RUN}moved".split())
    print(f"a run on the first host, killed after {KILLED_AT}; the second:", moved.wait_for("resum"), flush=True)
    moved.wait_for("exported")
    exports = [Path(EXPORTED, run, "export", "model.safetensors").read_bytes() for run in ("whole", "moved")]
    print("the weights are those of a run that was never killed:", exports[0] == exports[1], flush=True)


class Host:
    def __init__(self, number: int) -> None:
        shell = f"ip netns exec node-{number} unshare --mount --uts sh -c".split()
        self._process = subprocess.Popen([*shell, HOST.format(n=number)], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def start(self, words: list[str]) -> Program:
        names = ["--net", "--mount", "--uts"]
        return Program(["nsenter", "-t", str(self._process.pid), *names, sys.executable, *words])

    def take(self) -> str:
        return self.start(["-c", f"ASKED_ONCE, KEEPS_IT = True, False\n{TAKE}"]).first_line


class Program:
    def __init__(self, words: list[str]) -> None:
        environment = {**os.environ, **ONE_RANK, "PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.pid = self._process.pid
        self.first_line = self.next_line()

    def next_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def wait_for(self, words: str) -> str:
        """The next line with `words`. Raises RuntimeError, with what it printed, if it ends before."""
        assert self._process.stdout is not None
        lines = [self.first_line]
        while words not in lines[-1]:
            lines.append(self._process.stdout.readline())
            if not lines[-1]:
                raise RuntimeError("".join(lines))
        return lines[-1].strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def load_modules(packages: Path, names: list[str]) -> None:
    """With what they need, where there is no modprobe."""
    [base] = (packages / "usr/lib/uml/modules").iterdir()
    needs = dict(line.split(":") for line in (base / "modules.dep").read_text().splitlines())
    for name in names:
        [module] = (path for path in needs if path.endswith(f"/{name}.ko"))
        for path in [*reversed(needs[module].split()), module]:
            descriptor = os.open(base / path, os.O_RDONLY)
            ctypes.CDLL(None).syscall(313, descriptor, b"", 0)  # finit_module; one that is loaded already is no harm
            os.close(descriptor)
    time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
