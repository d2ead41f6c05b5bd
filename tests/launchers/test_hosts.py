"""Runs over several hosts, with the launcher, ssh and network that real ones have.

One host with as many ranks is what they are compared with. All runs are of 40 steps with a checkpoint every 4.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.launcher import Launch
from harness.runs import completed, untimed_rows
from harness.waiting import wait_until

from dwt_ds import __version__
from dwt_ds.base.processes import own_command
from dwt_ds.base.software import host_name, package_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Done = subprocess.CompletedProcess[str]

SCRIPT = Path(__file__).parents[2] / "launchers" / "run_multinode.sh"
SETTINGS = ["train.max_steps=40", "train.checkpoint_every=4", "train.eval_every=10", "student.dropout=0.1"]

COLLECTIVE_SECONDS = 20.0
# What is left then: ssh gives up a silent host after 4 x 15 s, the launcher waits 30 s for its ranks, and the ranks
# of this small machine take their time to end.
END_SECONDS = 150.0


def hostfile(cluster: Any, slots: dict[int, int]) -> Path:
    path = Path(cluster.folder) / "hostfile"
    path.write_text("".join(f"node-{host} slots={ranks}\n" for host, ranks in slots.items()), encoding="utf-8")
    return path


def run_on(
    cluster: Any, slots: dict[int, int], recipe: Path, output: Path, *overrides: str, **environment: str
) -> Done:
    """run_multinode.sh on the first of the hosts."""
    arguments = [str(recipe), f"output_dir={output}", *SETTINGS, *overrides]
    done: Done = cluster.run(next(iter(slots)), [SCRIPT, hostfile(cluster, slots), *arguments], environment)
    return done


@pytest.fixture(scope="module")
def on_one_host(launch: Launch, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of a run of four ranks on this machine, without ssh."""
    output = tmp_path_factory.mktemp("one_host") / "run"
    completed(launch(4, [str(tiny_recipe), f"output_dir={output}", *SETTINGS]))
    return untimed_rows(output)


def test_hosts_train_as_one_host_with_as_many_ranks(
    cluster: Any, tiny_recipe: Path, tmp_path: Path, on_one_host: list[dict[str, Any]]
) -> None:
    slots = {1: 1, 2: 1, 3: 1, 4: 1}
    done = run_on(cluster, slots, tiny_recipe, tmp_path / "run", "train.expected_world_size=4")
    assert done.returncode == 0, done.stdout
    assert "4 ranks on the CPU, ZeRO-2" in done.stdout
    assert "teacher: " in done.stdout
    assert untimed_rows(tmp_path / "run") == on_one_host


def test_a_host_with_another_package_or_torch_is_refused_with_a_table(
    cluster: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    ours, theirs = package_folder("dwt_ds"), tmp_path / "dwt_ds"
    shutil.copytree(ours, theirs, ignore=shutil.ignore_patterns("__pycache__"))
    package = theirs / "__init__.py"
    package.write_text(package.read_text(encoding="utf-8").replace(__version__, "9.9.9"), encoding="utf-8")
    torch_file = Path(torch.__file__).with_name("version.py")
    other_torch = tmp_path / "version.py"
    other_torch.write_text(torch_file.read_text(encoding="utf-8") + '\n__version__ = "2.9.7"\n', encoding="utf-8")
    cluster.replace(2, ours, theirs)
    cluster.replace(3, torch_file, other_torch)
    try:
        done = run_on(cluster, {1: 1, 2: 1, 3: 1}, tiny_recipe, tmp_path / "run")
    finally:
        cluster.put_back(2, ours)
        cluster.put_back(3, torch_file)
    assert done.returncode not in (0, 75), done.stdout
    lines = [line.removeprefix("node-1: ").split() for line in done.stdout.splitlines()]
    assert done.stdout.count("error: the hosts run different software; install the same on each of them:") == 1
    assert ["2.9.7", "node-3", "(rank", "2)"] in lines, done.stdout
    assert ["torch", torch.__version__, "node-1", "(rank", "0),", "node-2", "(rank", "1)"] in lines
    assert any(line[:1] == ["9.9.9"] and line[2:] == ["node-2", "(rank", "1)"] for line in lines), done.stdout
    assert any(line[:1] == ["dwt_ds"] and line[-6:-3] == ["node-1", "(rank", "0),"] for line in lines), done.stdout
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_host_with_other_data_is_refused_with_a_table(
    cluster: Any, tiny_recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_data, other)
    manifest = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    manifest.update(fingerprint="f" * 64)
    (other / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    cluster.replace(2, tiny_data, other)
    try:
        done = run_on(cluster, {1: 1, 2: 1}, tiny_recipe, tmp_path / "run")
    finally:
        cluster.put_back(2, tiny_data)
    assert done.returncode not in (0, 75), done.stdout
    assert done.stdout.count("error: the hosts read different data or settings") == 1
    lines = [line.removeprefix("node-1: ").split() for line in done.stdout.splitlines()]
    assert ["ffffffffffff", "node-2", "(rank", "1)"] in lines, done.stdout
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_number_of_ranks_than_meant_is_refused(cluster: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    filters = {"DEEPSPEED_ARGS": "--exclude node-3"}
    done = run_on(cluster, {3: 1, 1: 1, 2: 1}, tiny_recipe, tmp_path / "run", "train.expected_world_size=3", **filters)
    assert done.returncode not in (0, 75), done.stdout
    assert "train.expected_world_size=3: there are 2 ranks; check the hostfile" in done.stdout


def test_a_lost_host_ends_the_run_which_resumes_on_the_others(
    cluster: Any, tiny_recipe: Path, tmp_path: Path, on_one_host: list[dict[str, Any]]
) -> None:
    output = tmp_path / "run"
    limit = f"train.collective_timeout_seconds={COLLECTIVE_SECONDS}"
    arguments = [str(tiny_recipe), f"output_dir={output}", *SETTINGS, limit]
    process = cluster.start(2, [SCRIPT, hostfile(cluster, {2: 1, 3: 1, 4: 2}), *arguments])
    pointer = output / "checkpoints" / "latest"
    wait_until(lambda: pointer.is_file() or process.poll() is not None)
    cluster.cut_off(4)
    began = time.monotonic()
    try:
        text, _ = process.communicate(timeout=COLLECTIVE_SECONDS + END_SECONDS)
    finally:
        process.kill()
        cluster.boot(4)
    print(f"ended {time.monotonic() - began:.1f} s after the loss\n{text}")
    assert process.returncode != 0, text
    for host in (2, 3):
        assert re.search(f"node-{host}: ssh exited with exit code [1-9]", text), text
        assert ranks_on(cluster, host) == "0", f"node-{host}\n{text}"
    lost_at = untimed_rows(output)[-1]["step"]
    assert lost_at < 40, f"lost too late to show anything\n{text}"

    fewer = tmp_path / "fewer"
    shutil.copytree(output, fewer)
    done = run_on(cluster, {2: 2, 3: 2}, tiny_recipe, output, limit)
    assert done.returncode == 0, done.stdout
    assert "resuming from" in done.stdout
    assert untimed_rows(output) == on_one_host

    # With half the ranks, that takes two micro-batches a step: the same text, summed in another order.
    done = run_on(cluster, {2: 1, 3: 1}, tiny_recipe, fewer, limit, "train.gradient_accumulation_steps=2")
    assert done.returncode == 0, done.stdout
    assert "resuming from" in done.stdout
    whole = {row["step"]: row["loss"] for row in on_one_host if "loss" in row}
    ours = {row["step"]: row["loss"] for row in untimed_rows(fewer) if "loss" in row}
    assert ours.keys() == whole.keys()
    assert ours == pytest.approx(whole, rel=0.02)


def test_a_host_that_fails_before_the_ranks_meet_ends_the_launch(
    cluster: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Long before the ranks of the others would give up waiting for it (30 minutes)."""
    package, broken = Path(package_folder("dwt_ds"), "pretrain.py"), tmp_path / "pretrain.py"
    broken.write_text("raise ImportError('nothing works on this host')\n", encoding="utf-8")
    cluster.replace(2, package, broken)
    began = time.monotonic()
    try:
        done = run_on(cluster, {1: 1, 2: 1, 3: 1}, tiny_recipe, tmp_path / "run")
    finally:
        cluster.put_back(2, package)
    print(f"ended after {time.monotonic() - began:.1f} s\n{done.stdout}")
    assert done.returncode == 1, done.stdout
    assert "node-2: ssh exited with exit code 1" in done.stdout
    assert "error: 1 of 3 hosts ended before all ranks had met" in done.stdout
    for host in (1, 3):
        assert ranks_on(cluster, host) == "0", f"node-{host}\n{done.stdout}"


def test_a_host_without_a_login_is_named_before_anything_starts(
    cluster: Any, tiny_recipe: Path, tmp_path: Path
) -> None:
    done = run_on(cluster, {1: 1, 9: 1}, tiny_recipe, tmp_path / "run")
    assert done.returncode == 2, done.stdout
    assert done.stdout.startswith("error: no login to node-9 (ssh: Could not resolve hostname node-9"), done.stdout
    assert not (tmp_path / "run").exists()


def ranks_on(cluster: Any, host: int) -> str:
    """How many processes of a run a host still has."""
    count = "import psutil; print(sum('dwt_ds.pretrain' in process.cmdline() for process in psutil.process_iter()))"
    done: Done = cluster.run(host, [sys.executable, "-c", count])
    return done.stdout.strip()


def test_the_doctor_finds_good_hosts_good_and_bad_ones_bad(cluster: Any, tmp_path: Path) -> None:
    assert host_name() not in ("node-1", "node-2")
    # One that is not there, and is left out.
    hosts = hostfile(cluster, {9: 1, 1: 1, 2: 1})
    command = own_command("doctor", "--hostfile", hosts)
    filters = {"DEEPSPEED_ARGS": "--exclude node-9"}
    done = cluster.run(1, command, filters, timeout_seconds=600)
    assert done.returncode == 0, done.stdout
    for words in ("answers without a password", "eth0 10.77.0.2", "2 ranks on 2 host(s)", "everything is in order"):
        assert words in done.stdout, done.stdout

    # A host whose output folder is its own, and which takes the first host's name for itself.
    (tmp_path / "hosts").write_text("127.0.0.1 localhost node-1\n10.77.0.2 node-2\n", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    shared = Path(cluster.folder) / "shared"
    shared.mkdir()
    cluster.replace(2, shared, tmp_path / "empty")
    cluster.replace(2, Path("/etc/hosts"), tmp_path / "hosts")
    try:
        done = cluster.run(1, [*command, "--shared", shared], filters, timeout_seconds=600)
    finally:
        cluster.put_back(2, shared)
        cluster.put_back(2, Path("/etc/hosts"))
    assert done.returncode == 1, done.stdout
    failed = {line.split("  ")[1].strip() for line in done.stdout.splitlines() if line.startswith("FAIL")}
    assert {"shared folder", "name resolution"} <= failed, done.stdout
    assert "mount the same file system at the same path on every host" in done.stdout
