"""The scripts from end to end, with stand-ins for DeepSpeed and Slurm; tests/launch has the rules."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.waiting import wait_until

from dwt_ds.launch.hostfile import Host, read_deepspeed_env, read_hostfile

FOLDER = Path(__file__).parents[2] / "launchers"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
# Stands for DeepSpeed's launcher: records its words, and shows some variables.
DEEPSPEED = """
import os, pathlib, sys
pathlib.Path("record").write_text("\\0".join(sys.argv[1:]))
print("|".join(os.environ.get(name, "") for name in ("NCCL_DEBUG", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME")), flush=True)
if os.path.exists("hostfile.41234"):
    pathlib.Path("hosts_then").write_text(pathlib.Path("hostfile.41234").read_text())
"""
ODD = [
    "output_dir=runs/a b",
    "teacher.path=$(touch pwned)`touch pwned`",
    "distill.temperature={schedule: constant, start: 2}",
]
VARIABLES = {
    *("RANKS", "RANKS_PER_NODE", "DEEPSPEED_CONFIG", "DEEPSPEED_ARGS", "LAUNCHER", "LAUNCHER_ARGS"),
    *("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"),
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With a package `deepspeed` in front, and Slurm's variables and programs: srun starts the second node's task."""
    launcher = tmp_path / "packages" / "deepspeed" / "launcher"
    launcher.mkdir(parents=True)
    (launcher / "__init__.py").touch()
    (launcher.parent / "__init__.py").touch()
    (launcher / "runner.py").write_text(DEEPSPEED, encoding="utf-8")
    programs = tmp_path / "bin"
    programs.mkdir()
    texts = {
        "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n[ "$1" = requeue ] || printf "n1\\nn2\\n"\n',
        "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=1 exec "$@"\n',
        "mpirun": "#!/bin/sh\n",
    }
    for name, text in texts.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    packages = os.pathsep.join([str(launcher.parents[1]), os.environ.get("PYTHONPATH", "")])
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8"}
    return {**clean, "PYTHONPATH": packages, "PATH": path, "HOME": str(tmp_path), "DS_ACCELERATOR": "cpu", **slurm}


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str]) -> Run:
    def run_script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(FOLDER / name), *arguments],
            env={**environment, **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run_script


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[], list[str]]:
    """Without the launch's name, which is another each time."""

    def words() -> list[str]:
        *words, name = (tmp_path / "record").read_text(encoding="utf-8").split("\0")
        assert re.fullmatch("--launched_as=[0-9a-f]{16}", name)
        return words

    return words


def end_with(code: int, tmp_path: Path) -> None:
    """DeepSpeed's launcher ends with this exit code."""
    runner = tmp_path / "packages" / "deepspeed" / "launcher" / "runner.py"
    runner.write_text(f"{DEEPSPEED}\nsys.exit({code})", encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses_and_may_be_executed(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("name", "arguments", "mention"),
    [
        ("run_local.sh", [], "the following arguments are required: recipe"),
        ("run_multinode.sh", [], "argument --hostfile: expected one argument"),
        ("run_multinode.sh", ["hosts"], "the following arguments are required: recipe"),
        ("slurm.sbatch", [], "RANKS_PER_NODE=N "),
    ],
)
def test_too_few_arguments_give_the_usage(name: str, arguments: list[str], mention: str, run: Run) -> None:
    done = run(name, *arguments)
    assert done.returncode == 2
    assert re.sub(r"\s+", " ", done.stderr).count(mention) == 1
    assert "set -euo" not in done.stderr


def test_one_machine(run: Run, recorded: Callable[[], list[str]], tmp_path: Path) -> None:
    end_with(7, tmp_path)
    settings = {"RANKS": "4", "DEEPSPEED_CONFIG": "my configs/zero 3.json", "MASTER_PORT": "29512"}
    done = run("run_local.sh", "quickstart", *ODD, **settings)
    assert done.returncode == 7, done.stderr
    assert recorded() == [
        *f"--log_level error --hostfile {os.devnull} --num_gpus 4 --master_port 29512".split(),
        *("--module", "dwt_ds.pretrain", "quickstart", *ODD, "--deepspeed_config", "my configs/zero 3.json"),
    ]
    assert not (tmp_path / "pwned").exists()


def test_several_machines(run: Run, recorded: Callable[[], list[str]], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node-1 slots=8\nnode-2 slots=8\n", encoding="utf-8")
    end_with(7, tmp_path)
    settings = {"DEEPSPEED_ARGS": "--exclude node-1", "LAUNCHER": "mpich", "DEEPSPEED_CONFIG": "zero3"}
    done = run("run_multinode.sh", "hosts", "paper_weak", *ODD, **settings)
    assert done.returncode == 7, done.stderr
    options = "--hostfile hosts --master_addr node-2 --exclude node-1 --launcher mpich --force_multi --no_ssh_check"
    assert recorded()[2:12] == options.split()
    assert recorded()[-7:] == ["dwt_ds.pretrain", "paper_weak", *ODD, "--deepspeed_config", "zero3"]


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        ("run_local.sh", {"RANKS": "0"}, "error: RANKS=0: write a whole number of 1 or more"),
        ("slurm.sbatch", {"RANKS_PER_NODE": "two"}, "error: RANKS_PER_NODE=two: write a whole number of 1 or more"),
        ("slurm.sbatch", {"SLURM_JOB_ID": ""}, "error: no Slurm job: submit this script with sbatch"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_in_one_line(
    name: str, variables: dict[str, str], message: str, run: Run, tmp_path: Path
) -> None:
    done = run(name, "quickstart", **variables)
    assert (done.returncode, done.stderr) == (2, f"{message}\n")
    assert not (tmp_path / "record").exists()


def test_a_missing_hostfile_is_an_error_and_no_run_on_this_machine_alone(run: Run, tmp_path: Path) -> None:
    done = run("run_multinode.sh", "no such hosts", "quickstart")
    assert done.returncode == 2
    assert done.stderr.startswith("error: hostfile no such hosts: no such file; ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "record").exists()


def test_the_example_hostfile_is_a_good_one() -> None:
    assert read_hostfile(FOLDER / "hostfile.example") == [Host("node-1", 8), Host("node-2", 8)]


def test_the_example_of_variables_is_read_as_it_says(tmp_path: Path) -> None:
    text = (FOLDER / "deepspeed_env.example").read_text(encoding="utf-8")
    assert "  sed '/^#/d; /^$/d' launchers/deepspeed_env.example > .deepspeed_env" in text
    copied = subprocess.run(
        ["sed", "/^#/d; /^$/d", str(FOLDER / "deepspeed_env.example")], capture_output=True, text=True
    )
    (tmp_path / "env").write_text(copied.stdout, encoding="utf-8")
    assert {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"} <= set(read_deepspeed_env([tmp_path / "env"]))


# Slurm.


def test_slurm_starts_the_launcher_on_each_node(run: Run, recorded: Callable[[], list[str]], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\nNCCL_IB_HCA=mlx5_0,mlx5_1", encoding="utf-8")
    (tmp_path / ".deepspeed_env").write_bytes(b"NCCL_DEBUG=WARN\r\nNCCL_SOCKET_IFNAME=eth0 eth1=x")
    end_with(7, tmp_path)
    home = str(tmp_path / "home")
    done = run("slurm.sbatch", "quickstart", *ODD, "train.expected_world_size=8", DEEPSPEED_CONFIG="zero3", HOME=home)
    assert done.returncode == 7, done.stderr
    assert recorded() == [
        *("--node_rank", "1", "--log_level", "warning", "--hostfile", "hostfile.41234", "--master_addr", "n1"),
        *("--launcher", "srun", "--master_port", "22930", "--force_multi", "--no_ssh", "--module", "dwt_ds.pretrain"),
        # The user's own number counts, since it comes later.
        *("quickstart", "train.expected_world_size=16", *ODD, "train.expected_world_size=8"),
        *("--deepspeed_config", "zero3"),
    ]
    assert (tmp_path / "hosts_then").read_text(encoding="utf-8") == "n1 slots=8\nn2 slots=8\n"
    assert done.stdout == "WARN|mlx5_0,mlx5_1|eth0 eth1=x\n"
    assert (tmp_path / "scontrol").read_text(encoding="utf-8") == "show hostnames n[1-2]\n"
    assert not (tmp_path / "hostfile.41234").exists()
    assert not (tmp_path / "pwned").exists()


def test_a_job_on_cpus_has_the_ranks_it_is_given_and_a_failed_one_is_not_queued_again(
    run: Run, recorded: Callable[[], list[str]], tmp_path: Path
) -> None:
    # Nothing was completed.
    assert run("slurm.sbatch", "quickstart", RANKS_PER_NODE="2", SLURM_GPUS_ON_NODE="").returncode == 75
    assert "train.expected_world_size=4" in recorded()
    assert "requeue" not in (tmp_path / "scontrol").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", [137, 247, 255])
def test_a_job_ends_with_its_runs_code_also_where_a_signal_would_give_it(code: int, run: Run, tmp_path: Path) -> None:
    end_with(code, tmp_path)
    assert run("slurm.sbatch", "quickstart").returncode == code
    assert "requeue" not in (tmp_path / "scontrol").read_text(encoding="utf-8")


def test_a_job_that_is_asked_to_stop_saves_and_goes_back_into_the_queue(
    environment: dict[str, str], tmp_path: Path
) -> None:
    runner = tmp_path / "packages" / "deepspeed" / "launcher" / "runner.py"
    waits = "\nimport time\nwhile not os.path.exists('run/stop'):\n    time.sleep(0.05)\n"
    runner.write_text(DEEPSPEED + waits, encoding="utf-8")
    script = [str(FOLDER / "slurm.sbatch"), "quickstart", "output_dir=run"]
    job = subprocess.Popen(script, env=environment, cwd=tmp_path)
    wait_until((tmp_path / "record").exists)
    job.terminate()
    time.sleep(0.2)
    job.terminate()
    assert job.wait(timeout=120) == 75
    assert (tmp_path / "scontrol").read_text(encoding="utf-8").splitlines()[-1] == "requeue 41234"
