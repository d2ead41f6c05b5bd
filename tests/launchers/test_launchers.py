from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "launchers"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
RECORDER = """#!/bin/sh
printf '%s\\0' "$@" > {record}
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
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for the front of PATH: a `deepspeed` that records its arguments, and no GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "deepspeed", RECORDER.format(record=tmp_path / "record"))
    program(folder / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def run(tmp_path: Path, programs: Path) -> Run:
    def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if k not in ("RANKS", "DEEPSPEED_CONFIG", "DEEPSPEED_ARGS")}
        return subprocess.run(
            [str(FOLDER / name), *arguments],
            env={**clean, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **environment},
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
            ["HOSTFILE RECIPE [key=value ...]", "MASTER_ADDR=", "DEEPSPEED_ARGS=", ".deepspeed_env"],
        ),
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
    done = run("run_local.sh", "quickstart", "train.max_steps=5")
    assert done.returncode == 0, done.stderr
    command = "--log_level warning --num_gpus 2 --module dwt_ds.pretrain quickstart train.max_steps=5"
    assert recorded() == command.split()


def test_every_gpu_gets_a_rank(run: Run, programs: Path, recorded: Callable[[], list[str]]) -> None:
    program(programs / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: a'; echo 'GPU 1: a'; echo 'GPU 2: a'\n")
    run("run_local.sh", "quickstart")
    assert recorded()[2:4] == ["--num_gpus", "3"]


def test_ranks_and_json_come_from_the_environment(run: Run, recorded: Callable[[], list[str]]) -> None:
    run("run_local.sh", "a recipe.yaml", "seed=1", RANKS="4", DEEPSPEED_CONFIG="my configs/zero 3.json")
    assert recorded() == [
        "--log_level",
        "warning",
        "--num_gpus",
        "4",
        "--module",
        "dwt_ds.pretrain",
        "a recipe.yaml",
        "seed=1",
        "--deepspeed_config",
        "my configs/zero 3.json",
    ]


def test_one_machine_gets_odd_values_as_they_are(run: Run, recorded: Callable[[], list[str]], tmp_path: Path) -> None:
    run("run_local.sh", "my recipe's.yaml", *ODD)
    assert recorded()[6:] == ["my recipe's.yaml", *ODD]
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


def test_a_hostfile_of_this_machine_alone_needs_no_other(
    run: Run, recorded: Callable[[], list[str]], hostfile: Callable[[str], str]
) -> None:
    run("run_multinode.sh", hostfile("localhost slots=2"), "quickstart", *ODD)
    assert "--force_multi" not in recorded()
    assert recorded()[-len(ODD) :] == ODD


@pytest.mark.parametrize("options", ["--launcher slurm", "--no_ssh --node_rank 0", "--launcher=openmpi"])
def test_launchers_without_a_shell_between_get_the_words_as_they_are(
    options: str, run: Run, recorded: Callable[[], list[str]], hostfile: Callable[[str], str]
) -> None:
    run("run_multinode.sh", hostfile(HOSTS), "quickstart", *ODD, DEEPSPEED_ARGS=options)
    assert recorded()[-len(ODD) :] == ODD


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
