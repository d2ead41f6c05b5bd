from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dwt_ds.launch.doctor_launch import how_to_launch
from dwt_ds.launch.hostfile import read_deepspeed_env

FOLDER = Path(__file__).parents[2] / "launchers"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
RECORDER = """#!/bin/sh
printf '%s\\0' "$@" > {record}
"""
# The scripts' python, without the watch over the launcher, whose tests are elsewhere: the command is run as it is.
PYTHON = """#!/bin/bash
if [[ $1 == -m && $2 == dwt_ds.launch.supervise ]]; then
  shift 2
  : > {record}
  while [[ $1 != -- ]]; do printf '%s\\0' "$1" >> {record}; shift; done
  shift
  exec "$@"
fi
exec {python} "$@"
"""
# What pdsh does as far as quoting goes: its words, joined by spaces, are the other machine's shell's line.
PDSH = """#!{python}
import subprocess, sys
words = sys.argv[1:]
line = " ".join(words[words.index("-w") + 2 :])
line = line.replace("{python} -u -m deepspeed.launcher.launch", "{recorder}")
sys.exit(subprocess.call(["sh", "-c", line]))
"""
ODD = [
    "output_dir=runs/a b",
    "teacher.path=$(touch pwned);touch pwned`touch pwned`",
    'teacher.path=$(touch pwned) ; "quoted" \\n `touch pwned` $HOME',
    "distill.soft_weight={schedule: linear, start: 4, end: 1}",
    "train.betas=[0.9,0.99]",
    "data.dir=it's|a*b?&#~!",
    "data.dir='quoted words'",
]
SETTINGS = ("RANKS", "DEEPSPEED_CONFIG", "DEEPSPEED_ARGS", "LAUNCHER", "LAUNCHER_ARGS", "MASTER_ADDR", "MASTER_PORT")
DEVICES = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for the front of PATH: a `deepspeed` that records its arguments, and no GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "deepspeed", RECORDER.format(record=tmp_path / "record"))
    program(folder / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    program(folder / "python", PYTHON.format(record=tmp_path / "watched", python=sys.executable))
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def run(tmp_path: Path, programs: Path) -> Run:
    def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if k not in (*SETTINGS, *DEVICES)}
        return subprocess.run(
            [str(FOLDER / name), *arguments],
            env={**clean, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path), **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run_script


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[], list[str]]:
    return lambda: (tmp_path / "record").read_text(encoding="utf-8").split("\0")[:-1]


@pytest.fixture
def hostfile(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "hosts").write_text(text, encoding="utf-8")
        return "hosts"

    return write


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses_and_may_be_executed(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("name", "arguments", "mentions"),
    [
        ("run_local.sh", [], ["RECIPE [key=value ...]", "RANKS=4", "DEEPSPEED_CONFIG=FILE"]),
        (
            "run_multinode.sh",
            [],
            ["HOSTFILE RECIPE [key=value ...]", "MASTER_ADDR=", "LAUNCHER=", "DEEPSPEED_ARGS=", "docs/multinode.md"],
        ),
        ("slurm.sbatch", [], ["RECIPE [key=value ...]", "RANKS_PER_NODE=N", ".deepspeed_env"]),
        ("run_multinode.sh", ["hosts"], ["HOSTFILE RECIPE [key=value ...]"]),
    ],
)
def test_too_few_arguments_give_the_usage(
    name: str, arguments: list[str], mentions: list[str], run: Run, tmp_path: Path
) -> None:
    done = run(name, *arguments)
    assert done.returncode == 2
    assert all(mention in done.stderr for mention in mentions)
    # The comment at the top of the script, and nothing of its code.
    assert "set -euo" not in done.stderr
    assert not any(line.startswith("#") for line in done.stderr.splitlines())
    assert not (tmp_path / "record").exists()


# One machine.


def test_without_a_gpu_there_are_two_ranks(run: Run, recorded: Callable[[], list[str]]) -> None:
    done = run("run_local.sh", "quickstart", "train.max_steps=5", MASTER_PORT="29511")
    assert done.returncode == 0, done.stderr
    command = (
        "--log_level warning --num_gpus 2 --master_port 29511 --module dwt_ds.pretrain quickstart train.max_steps=5"
    )
    assert recorded() == command.split()


def test_every_gpu_gets_a_rank(run: Run, programs: Path, recorded: Callable[[], list[str]]) -> None:
    program(programs / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: a'; echo 'GPU 1: a'; echo 'GPU 2: a'\n")
    run("run_local.sh", "quickstart")
    assert recorded()[2:5] == ["--num_gpus", "3", "--master_port"]
    first = recorded()[5]
    run("run_local.sh", "quickstart")
    assert recorded()[5] != first, "two runs on one machine need two ports"


def test_ranks_and_json_come_from_the_environment(run: Run, recorded: Callable[[], list[str]]) -> None:
    settings = {"RANKS": "4", "DEEPSPEED_CONFIG": "my configs/zero 3.json", "MASTER_PORT": "29512"}
    run("run_local.sh", "a recipe.yaml", "seed=1", **settings)
    assert recorded() == [
        "--log_level",
        "warning",
        "--num_gpus",
        "4",
        "--master_port",
        "29512",
        "--module",
        "dwt_ds.pretrain",
        "a recipe.yaml",
        "seed=1",
        "--deepspeed_config",
        "my configs/zero 3.json",
    ]


@pytest.mark.parametrize(
    ("environment", "where"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, []),
        ({"CUDA_VISIBLE_DEVICES": "2,3,5", "RANKS": "2"}, ["--include", "localhost:2,3"]),
        ({"CUDA_VISIBLE_DEVICES": "", "RANKS": "3"}, ["--num_gpus", "3"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["--num_gpus", "8"]),
        ({"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cpu", "RANKS": "2"}, ["--num_gpus", "2"]),
    ],
)
def test_the_gpus_that_are_named_are_used(
    environment: dict[str, str], where: list[str], run: Run, programs: Path, recorded: Callable[[], list[str]]
) -> None:
    program(programs / "nvidia-smi", "#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i; done\n")
    done = run("run_local.sh", "quickstart", MASTER_PORT="29511", **environment)
    assert done.returncode == 0, done.stderr
    assert recorded()[2:] == [*where, "--master_port", "29511", "--module", "dwt_ds.pretrain", "quickstart"]


def test_gpus_that_deepspeed_cannot_take_are_told(run: Run, tmp_path: Path) -> None:
    done = run("run_local.sh", "quickstart", CUDA_VISIBLE_DEVICES="2,3", RANKS="4")
    assert (done.returncode, done.stderr) == (
        2,
        "error: RANKS=4: CUDA_VISIBLE_DEVICES=2,3 are fewer GPUs; name more, or lower RANKS\n",
    )
    done = run("run_local.sh", "quickstart", CUDA_VISIBLE_DEVICES="GPU-8932f937")
    assert done.returncode == 2
    assert done.stderr.startswith("error: CUDA_VISIBLE_DEVICES=GPU-8932f937: DeepSpeed wants numbers; write 2,3 or")
    assert not (tmp_path / "record").exists()


def test_one_machine_gets_odd_values_as_they_are(run: Run, recorded: Callable[[], list[str]], tmp_path: Path) -> None:
    run("run_local.sh", "my recipe's.yaml", *ODD)
    assert recorded()[8:] == ["my recipe's.yaml", *ODD]
    assert not (tmp_path / "pwned").exists()


def test_the_exit_code_is_the_launchers(run: Run, programs: Path, hostfile: Callable[[str], str]) -> None:
    program(programs / "deepspeed", "#!/bin/sh\nexit 7\n")
    assert run("run_local.sh", "quickstart").returncode == 7
    assert run("run_multinode.sh", hostfile("a slots=1\n"), "quickstart").returncode == 7


# Several machines.

HOSTS = "# ours\n\nnode-1 slots=8\n  node-2\tslots=4   # the old one\n"


def test_the_hostfile_and_its_first_machine_go_to_the_launcher(
    run: Run, recorded: Callable[[], list[str]], hostfile: Callable[[str], str]
) -> None:
    done = run("run_multinode.sh", hostfile(HOSTS), "paper_weak", "seed=3")
    assert done.returncode == 0, done.stderr
    command = (
        "--log_level warning --hostfile hosts --master_addr node-1 --force_multi "
        "--module dwt_ds.pretrain paper_weak seed=3"
    )
    assert recorded() == command.split()


def test_address_json_and_further_options_come_from_the_environment(
    run: Run, recorded: Callable[[], list[str]], hostfile: Callable[[str], str]
) -> None:
    run(
        "run_multinode.sh",
        hostfile(HOSTS),
        "paper_weak",
        MASTER_ADDR="10.0.0.1",
        DEEPSPEED_CONFIG="zero3",
        DEEPSPEED_ARGS="--include node-2:0,1 --master_port 29511",
    )
    command = (
        "--log_level warning --hostfile hosts --master_addr 10.0.0.1 --include node-2:0,1 --master_port 29511 "
        "--force_multi --module dwt_ds.pretrain paper_weak --deepspeed_config zero3"
    )
    assert recorded() == command.split()


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ("--exclude node-1", "node-2"),
        ("--exclude node-1:0", "node-1"),
        ("--include node-2", "node-2"),
        ("--include=node-2:0@node-1:1", "node-1"),
        ("-e node-1@node-3\n--log_level info", "node-2"),
        ("--log_level info\n-i node-3", "node-3"),
        ("--num_nodes 1", "node-1"),
    ],
)
def test_the_ranks_meet_at_the_first_machine_that_the_filters_leave(
    options: str, first: str, run: Run, recorded: Callable[[], list[str]], hostfile: Callable[[str], str]
) -> None:
    slots = hostfile("node-1 slots=2\nnode-2 slots=2\nnode-3 slots=2\n")
    done = run("run_multinode.sh", slots, "paper_weak", DEEPSPEED_ARGS=options)
    assert done.returncode == 0, done.stderr
    command = f"--hostfile hosts --master_addr {first} {options} --force_multi --module"
    assert recorded()[2:-2] == command.split()


def test_a_filter_that_deepspeed_would_stop_at_is_told(
    run: Run, hostfile: Callable[[str], str], tmp_path: Path
) -> None:
    done = run("run_multinode.sh", hostfile(HOSTS), "quickstart", DEEPSPEED_ARGS="--exclude node-3")
    assert done.returncode == 2
    assert done.stderr.startswith('error: DEEPSPEED_ARGS: --exclude node-3: the hostfile has no "node-3"; name its')
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "record").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "10.0.0.2", "MASTER_PORT": "29511", "LAUNCHER_ARGS": "-l"},
        {"DEEPSPEED_ARGS": "--exclude node-1\n--ssh_port 2222"},
        {"DEEPSPEED_ARGS": "--include localhost:1"},
        {"DEEPSPEED_ARGS": "--no_ssh --node_rank 0", "LAUNCHER": "slurm"},
        {"LAUNCHER": "OpenMPI", "LAUNCHER_ARGS": "--mca a b"},
        {"LAUNCHER": "openmpi", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511"},
        {"DEEPSPEED_ARGS": "--launcher=mpich"},
        {"LAUNCHER": "impi", "DEEPSPEED_ARGS": "--launcher pdsh"},
        {"LAUNCHER": "slurm", "DEEPSPEED_ARGS": "--exclude localhost", "LAUNCHER_ARGS": "--time 5"},
    ],
    ids=str,
)
def test_the_doctor_starts_its_collective_as_the_script_starts_a_run(
    environment: dict[str, str],
    run: Run,
    programs: Path,
    recorded: Callable[[], list[str]],
    hostfile: Callable[[str], str],
    tmp_path: Path,
) -> None:
    recorder = RECORDER.format(record=tmp_path / "record")
    program(programs / "deepspeed", recorder + 'echo "$MASTER_ADDR $MASTER_PORT"')
    slots = hostfile("node-1 slots=2\nlocalhost slots=2\nnode-2 slots=2\n")
    done = run("run_multinode.sh", slots, "quickstart", **environment)
    assert done.returncode == 0, done.stderr
    launch = how_to_launch(tmp_path / slots, environment)
    words = [word if word != str(tmp_path / slots) else slots for word in launch.options]
    modules = ["--module", "dwt_ds.pretrain"] if launch.takes_modules else [str(FOLDER / "pretrain.py")]
    assert recorded() == ["--log_level", "warning", *words, *modules, "quickstart"]
    found = {**environment, **launch.variables}
    assert done.stdout == f"{found.get('MASTER_ADDR', '')} {found.get('MASTER_PORT', '')}\n"


def test_a_hostfile_of_this_machine_alone_needs_no_other(
    run: Run, recorded: Callable[[], list[str]], hostfile: Callable[[str], str]
) -> None:
    run("run_multinode.sh", hostfile("localhost slots=2"), "quickstart", *ODD)
    assert "--force_multi" not in recorded()
    assert "--no_ssh_check" in recorded()
    assert recorded()[-len(ODD) :] == ODD


@pytest.mark.parametrize("options", ["--launcher slurm", "--no_ssh --node_rank 0", "--launcher=openmpi"])
def test_launchers_without_a_shell_between_get_the_words_as_they_are(
    options: str, run: Run, recorded: Callable[[], list[str]], hostfile: Callable[[str], str]
) -> None:
    run("run_multinode.sh", hostfile(HOSTS), "quickstart", *ODD, DEEPSPEED_ARGS=options)
    assert recorded()[-len(ODD) :] == ODD


@pytest.mark.parametrize("name", ["openmpi", "mpich", "impi", "slurm"])
def test_other_launchers_get_a_file_to_run_and_their_own_options(
    name: str, run: Run, recorded: Callable[[], list[str]], hostfile: Callable[[str], str], tmp_path: Path
) -> None:
    program(
        tmp_path / "bin" / "deepspeed", RECORDER.format(record=tmp_path / "record") + 'echo "$MASTER_ADDR $MASTER_PORT"'
    )
    done = run(
        "run_multinode.sh",
        hostfile(HOSTS),
        "quickstart",
        *ODD,
        LAUNCHER=name,
        LAUNCHER_ARGS="--time 5",
        MASTER_PORT="29511",
    )
    assert done.stdout == "node-1 29511\n"
    meet = "-x MASTER_ADDR -x MASTER_PORT " if name == "openmpi" else ""
    assert recorded()[4:-1] == [
        *("--master_addr", "node-1", "--launcher", name, "--master_port", "29511", "--force_multi"),
        *("--no_ssh_check", f"--launcher_args={meet}--time 5", str(FOLDER / "pretrain.py"), "quickstart", *ODD[:-1]),
    ]


@pytest.mark.parametrize("name", ["mpich", "impi", "slurm", "openmpi"])
def test_what_deepspeed_makes_of_it_starts_the_training(
    name: str, run: Run, programs: Path, hostfile: Callable[[str], str], recorded: Callable[[], list[str]]
) -> None:
    for command in ("mpirun", "srun", "ompi_info", "sinfo"):
        (programs / "deepspeed").replace(programs / "recorder") if (programs / "deepspeed").exists() else None
        program(programs / command, f'#!/bin/sh\nexec {programs / "recorder"} "$@"\n')
    python = str(Path(sys.executable))
    program(programs / "deepspeed", f'#!/bin/sh\nexec {python} {Path(python).with_name("deepspeed")} "$@"\n')
    # A cluster may have no ssh between its machines.
    program(programs / "ssh", "#!/bin/sh\nexit 255\n")
    slots = hostfile("node-1 slots=2\nnode-2 slots=2\n")
    done = run("run_multinode.sh", slots, "quickstart", *ODD, LAUNCHER=name, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr
    words = recorded()
    start = words.index(str(FOLDER / "pretrain.py"))
    assert words[start + 1 : start + 2 + len(ODD)] == ["quickstart", *ODD]
    # The interpreter, and DeepSpeed's helper where it needs one; never -m, which these launchers lose.
    assert words[start - (4 if name == "mpich" else 1)] == "-u"
    assert "-m" not in words


def test_the_watch_gets_the_settings_as_they_are(run: Run, hostfile: Callable[[str], str], tmp_path: Path) -> None:
    run("run_multinode.sh", hostfile(HOSTS), "quickstart", *ODD, DEEPSPEED_CONFIG="zero3")
    watched = (tmp_path / "watched").read_text(encoding="utf-8").split("\0")[:-1]
    assert watched == ["quickstart", *ODD, "--deepspeed_config", "zero3"]


def test_ssh_is_told_to_notice_a_host_that_is_gone(run: Run, programs: Path, hostfile: Callable[[str], str]) -> None:
    program(programs / "deepspeed", '#!/bin/sh\necho "$PDSH_SSH_ARGS_APPEND"\n')
    done = run("run_multinode.sh", hostfile(HOSTS), "quickstart", PDSH_SSH_ARGS_APPEND="-p 2222")
    assert done.stdout == "-o ServerAliveInterval=15 -o ServerAliveCountMax=4 -p 2222\n"


def test_the_example_of_variables_is_read_as_it_says(tmp_path: Path) -> None:
    text = (FOLDER / "deepspeed_env.example").read_text(encoding="utf-8")
    assert "  sed '/^#/d; /^$/d' launchers/deepspeed_env.example > .deepspeed_env" in text
    copied = subprocess.run(
        ["sed", "/^#/d; /^$/d", str(FOLDER / "deepspeed_env.example")], capture_output=True, text=True
    )
    (tmp_path / "env").write_text(copied.stdout, encoding="utf-8")
    assert {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"} <= set(read_deepspeed_env([tmp_path / "env"]))


# Slurm.


@pytest.fixture
def slurm(programs: Path, tmp_path: Path) -> dict[str, str]:
    """Programs and variables of a job on two nodes; srun starts the first node's task only."""
    program(
        programs / "scontrol",
        f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n[ "$1" = requeue ] || printf "n1\\nn2\\n"\n',
    )
    program(
        programs / "srun",
        f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/srun\nwhile [[ $1 == --* ]]; do shift; done\n'
        'SLURM_NODEID=1 exec "$@"\n',
    )
    return {
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "64",
    }


def test_slurm_starts_the_launcher_on_each_node(
    run: Run, slurm: dict[str, str], programs: Path, recorded: Callable[[], list[str]], tmp_path: Path
) -> None:
    program(
        programs / "deepspeed",
        RECORDER.format(record=tmp_path / "record") + f"cp hostfile.41234 {tmp_path}/used; echo $NCCL_DEBUG\n",
    )
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n", encoding="utf-8")
    done = run("slurm.sbatch", "quickstart", *ODD, DEEPSPEED_CONFIG="zero3", **slurm)
    assert done.returncode == 0, done.stderr
    assert recorded() == [
        *("--log_level", "warning", "--hostfile", "hostfile.41234", "--no_ssh", "--node_rank", "1"),
        *("--master_addr", "n1", "--master_port", "21234", "--module", "dwt_ds.pretrain", "quickstart", *ODD),
        *("train.expected_world_size=16", "--deepspeed_config", "zero3"),
    ]
    assert (tmp_path / "used").read_text(encoding="utf-8") == "n1 slots=8\nn2 slots=8\n"
    assert done.stdout == "INFO\n"
    srun = (tmp_path / "srun").read_text(encoding="utf-8").split("\0")
    assert srun[:5] == ["--ntasks-per-node=1", "--cpus-per-task=64", "--kill-on-bad-exit=1", "--label", "bash"]
    assert (tmp_path / "scontrol").read_text(encoding="utf-8") == "show hostnames n[1-2]\n"
    assert not (tmp_path / "hostfile.41234").exists()
    assert not (tmp_path / "pwned").exists()


def test_a_job_on_cpus_has_the_ranks_it_is_given(
    run: Run, slurm: dict[str, str], recorded: Callable[[], list[str]]
) -> None:
    del slurm["SLURM_GPUS_ON_NODE"]
    run("slurm.sbatch", "quickstart", RANKS_PER_NODE="2", **slurm)
    assert "train.expected_world_size=4" in recorded()


@pytest.mark.parametrize("expectation", ["train.expected_world_size=8", "train.expected_world_size=null"])
def test_the_users_own_expectation_of_a_job_stands(
    expectation: str, run: Run, slurm: dict[str, str], recorded: Callable[[], list[str]]
) -> None:
    run("slurm.sbatch", "quickstart", expectation, "output_dir=a train.expected_world_size=b", **slurm)
    assert recorded()[-2:] == [expectation, "output_dir=a train.expected_world_size=b"]


def test_only_an_argument_of_its_own_is_the_users_expectation(
    run: Run, slurm: dict[str, str], recorded: Callable[[], list[str]]
) -> None:
    run("slurm.sbatch", "quickstart", "output_dir=a train.expected_world_size=b", **slurm)
    assert recorded()[-1] == "train.expected_world_size=16"


def test_a_job_has_the_variables_of_both_files_to_their_last_lines(
    run: Run, slurm: dict[str, str], programs: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\nNCCL_IB_HCA=mlx5_0,mlx5_1", encoding="utf-8")
    (tmp_path / ".deepspeed_env").write_bytes(b"NCCL_DEBUG=WARN\r\nNCCL_SOCKET_IFNAME=eth0 eth1=x")
    program(programs / "deepspeed", '#!/bin/sh\necho "$NCCL_DEBUG|$NCCL_IB_HCA|$NCCL_SOCKET_IFNAME|"\n')
    done = run("slurm.sbatch", "quickstart", HOME=str(home), **slurm)
    assert done.stdout == "WARN|mlx5_0,mlx5_1|eth0 eth1=x|\n", done.stderr


def test_a_failed_job_has_the_runs_exit_code_and_is_not_queued_again(
    run: Run, slurm: dict[str, str], programs: Path, tmp_path: Path
) -> None:
    for code in (2, 75):
        program(programs / "deepspeed", f"#!/bin/sh\nexit {code}\n")
        assert run("slurm.sbatch", "quickstart", **slurm).returncode == code
    assert "requeue" not in (tmp_path / "scontrol").read_text(encoding="utf-8")


def test_a_job_that_is_asked_to_stop_saves_and_goes_back_into_the_queue(
    slurm: dict[str, str], programs: Path, tmp_path: Path
) -> None:
    program(programs / "deepspeed", "#!/bin/bash\ntrap 'sleep 1; exit 75' TERM\ntouch started\nsleep 60 & wait\n")
    job = subprocess.Popen(
        [str(FOLDER / "slurm.sbatch"), "quickstart"],
        env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **slurm},
        cwd=tmp_path,
    )
    give_up = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < give_up:
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=60) == 75
    assert (tmp_path / "scontrol").read_text(encoding="utf-8").splitlines()[-1] == "requeue 41234"


def test_odd_values_reach_the_other_machines_whole_through_deepspeed_and_pdsh(
    run: Run, programs: Path, hostfile: Callable[[str], str], recorded: Callable[[], list[str]], tmp_path: Path
) -> None:
    (programs / "deepspeed").rename(programs / "recorder")
    python = str(Path(sys.executable))
    program(programs / "deepspeed", f'#!/bin/sh\nexec {python} {Path(python).with_name("deepspeed")} "$@"\n')
    program(programs / "ssh", "#!/bin/sh\nexit 0\n")
    program(programs / "pdsh", PDSH.format(python=python, recorder=programs / "recorder"))
    done = run("run_multinode.sh", hostfile(HOSTS), "my recipe.yaml", *ODD, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr
    words = recorded()
    assert "--module" in words
    assert words[words.index("dwt_ds.pretrain") + 1 :] == ["my recipe.yaml", *ODD]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host; see launchers/hostfile.example"),
        ("# node-1 slots=8\n\n", "names no host; see launchers/hostfile.example"),
        ("node-1 slots=8\nnode-2\n", 'line 2 is "node-2"; write it as: HOST slots=N'),
        ("\n# x\nnode-1 slot=8\n", 'line 3 is "node-1 slot=8"; write it as: HOST slots=N'),
        ("node-1 slots=0\n", 'line 1 is "node-1 slots=0"; write it as: HOST slots=N'),
        ("node-1 slots=two\n", 'line 1 is "node-1 slots=two"; write it as: HOST slots=N'),
        ("node-1 slots=8 max=9\n", 'line 1 is "node-1 slots=8 max=9"; write it as: HOST slots=N'),
        ("node-1:8\n", 'line 1 is "node-1:8"; write it as: HOST slots=N'),
        ("slots=8\n", 'line 1 is "slots=8"; write it as: HOST slots=N'),
        (
            "node-1 slots=8\nnode-2 slots=8\n# x\nnode-1 slots=4\n",
            "line 4 names node-1 again; keep one line and add up its slots",
        ),
    ],
)
def test_a_hostfile_that_deepspeed_would_misread_is_told_by_its_line(
    text: str, message: str, run: Run, hostfile: Callable[[str], str], tmp_path: Path
) -> None:
    done = run("run_multinode.sh", hostfile(text), "quickstart")
    assert done.returncode == 2
    assert done.stderr == f"error: hostfile hosts: {message}\n"
    assert not (tmp_path / "record").exists()


def test_a_missing_hostfile_is_an_error_and_no_run_on_this_machine_alone(run: Run, tmp_path: Path) -> None:
    done = run("run_multinode.sh", "no such hosts", "quickstart")
    assert done.returncode == 2
    assert done.stderr == "error: hostfile no such hosts: no such file; see launchers/hostfile.example\n"
    assert not (tmp_path / "record").exists()


def test_a_hostfile_from_windows_is_read(
    run: Run, recorded: Callable[[], list[str]], hostfile: Callable[[str], str]
) -> None:
    done = run("run_multinode.sh", hostfile("node-1 slots=8\r\nnode-2 slots=8\r\n"), "quickstart")
    assert done.returncode == 0, done.stderr
    assert recorded()[4:6] == ["--master_addr", "node-1"]


def test_the_example_hostfile_is_a_good_one(run: Run, recorded: Callable[[], list[str]]) -> None:
    done = run("run_multinode.sh", str(FOLDER / "hostfile.example"), "quickstart")
    assert done.returncode == 0, done.stderr
    assert recorded()[4:6] == ["--master_addr", "node-1"]


def test_instances_of_a_gpu_are_no_gpus(tmp_path: Path) -> None:
    listed = "GPU 0: H100 (UUID: GPU-1)\\n  MIG 3g.40gb Device 0: (UUID: MIG-1)\\n  MIG 3g.40gb Device 1: (UUID: MIG-2)"
    for name, text in (("nvidia-smi", f"printf '{listed}\\n'"), ("python", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANKS", "CUDA_VISIBLE_DEVICES")}
    environment = {**kept, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "MASTER_PORT": "29511"}
    done = subprocess.run([str(FOLDER / "run_local.sh"), "quickstart"], env=environment, capture_output=True, text=True)
    assert "--num_gpus 1 --master_port" in done.stdout, done
