"""Which GPUs, how many ranks and which port a run on this machine gets."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from harness.errors import error_of
from harness.gpus import have_gpus

from dwt_ds.base.processes import own_command
from dwt_ds.launch.hostfile import Host
from dwt_ds.launch.local import Launch, on_this_machine, pretrain_command, printed_commands


@pytest.mark.parametrize(
    ("gpus", "environment", "ranks", "where"),
    [
        (0, {}, 2, "--num_gpus 2"),
        (0, {"RANKS": "3"}, 3, "--num_gpus 3"),
        (0, {"CUDA_VISIBLE_DEVICES": "2,3"}, 2, "--num_gpus 2"),  # a CPU has no such devices
        (8, {}, 8, "--num_gpus 8"),
        (8, {"RANKS": "4"}, 4, "--num_gpus 4"),
        (2, {"CUDA_VISIBLE_DEVICES": "2,3"}, 2, "--include localhost:2,3"),
        (3, {"CUDA_VISIBLE_DEVICES": "2,3, 5", "RANKS": "2"}, 2, "--include localhost:2,3"),
        (1, {"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cpu", "RANKS": "2"}, 2, "--num_gpus 2"),
        (8, {"DS_ACCELERATOR": "cpu"}, 2, "--num_gpus 2"),
    ],
)
def test_ranks_and_their_gpus(
    gpus: int, environment: dict[str, str], ranks: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_gpus(monkeypatch, gpus)
    launch = on_this_machine({**environment, "MASTER_PORT": "29511"})
    assert launch.options == ["--hostfile", os.devnull, *where.split(), "--master_port", "29511"]
    assert launch.hosts == [Host("localhost", ranks)]
    assert launch.ranks == ranks


def test_deepspeed_gets_devices_once_and_learns_of_a_machine_without_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have_gpus(monkeypatch, 2)
    environment = on_this_machine({"CUDA_VISIBLE_DEVICES": "2,3", "OMP_NUM_THREADS": "4"}).environment
    assert "CUDA_VISIBLE_DEVICES" not in environment
    assert "DS_ACCELERATOR" not in environment
    assert environment["OMP_NUM_THREADS"] == "4"
    have_gpus(monkeypatch, 0)
    assert on_this_machine({}).environment["DS_ACCELERATOR"] == "cpu"


def test_a_start_on_the_cpu_does_not_wait_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert on_this_machine({"DS_ACCELERATOR": "cpu"}).ranks == 2


def test_this_pythons_programs_come_first() -> None:
    path = on_this_machine({"PATH": "/somewhere"}).environment["PATH"]
    assert path.split(os.pathsep) == [str(Path(sys.executable).parent), "/somewhere"]


@pytest.mark.parametrize(
    ("gpus", "environment", "message"),
    [
        (0, {"RANKS": "0"}, "RANKS=0: write a whole number of 1 or more"),
        (0, {"RANKS": "two"}, "RANKS=two: write a whole number of 1 or more"),
        (0, {"MASTER_PORT": "65536"}, "MASTER_PORT=65536: write a whole number from 1 to 65535"),
        (
            2,
            {"CUDA_VISIBLE_DEVICES": "2,3", "RANKS": "4"},
            "--ranks 4 (or RANKS): CUDA_VISIBLE_DEVICES=2,3 has 2 GPUs; ask for at most 2",
        ),
        (8, {"RANKS": "9"}, "--ranks 9 (or RANKS): this machine has 8 GPUs; ask for at most 8"),
        (
            1,
            {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"},
            "CUDA_VISIBLE_DEVICES=GPU-8932f937: DeepSpeed needs numbers; write 2,3 or, for ranks on the CPU, "
            "set DS_ACCELERATOR=cpu",
        ),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_in_one_line(
    gpus: int, environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_gpus(monkeypatch, gpus)
    assert error_of(on_this_machine, environment) == message


def test_the_command_starts_deepspeeds_launcher_with_this_python() -> None:
    launch = Launch([Host("localhost", 2)], "127.0.0.1", "none", ["--num_gpus", "2"], {})
    launcher = "-m deepspeed.launcher.runner --log_level error"
    words = [sys.executable, *launcher.split(), "--num_gpus", "2", "--module", "here.there"]
    assert launch.command("here.there", ["a b", "$HOME"]) == [*words, "a b", "$HOME"]


def test_a_module_started_as_a_file_sees_what_it_would_see_started_by_name(tmp_path: Path) -> None:
    (tmp_path / "shows.py").write_text(
        "import sys\nfrom pathlib import Path\nprint(__name__, Path(sys.path[0] or '.').resolve(), sys.argv[1:])\n",
        encoding="utf-8",
    )
    launch = Launch([Host("a", 1)], "a", "mpich", [], {})
    *_, file, module, first, second = launch.command("shows", ["x y", "-z"])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}

    def shown(*words: str) -> str:
        command = [sys.executable, *words, first, second]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout

    assert module == "shows"
    assert shown(file, module) == shown("-m", module) == f"__main__ {tmp_path.resolve()} ['x y', '-z']\n"


def test_printed_commands_are_ready_for_a_shell() -> None:
    dwt_ds, deepspeed = printed_commands("paper_weak", ["output_dir=a b"], "zero1", nodes=1, ranks_per_node=4)
    run = ["paper_weak", "output_dir=a b", "train.expected_world_size=4", "--deepspeed_config", "zero1"]
    assert shlex.split(dwt_ds) == ["dwt-ds", "launch", "--ranks", "4", *run]
    assert shlex.split(deepspeed) == ["deepspeed", "--num_gpus", "4", "--module", "dwt_ds.pretrain", *run]
    several = printed_commands("large", ["train.expected_world_size=null"], None, nodes=3, ranks_per_node=8)
    assert several == [
        "dwt-ds launch --hostfile HOSTFILE large train.expected_world_size=null",
        "deepspeed --hostfile HOSTFILE --module dwt_ds.pretrain large train.expected_world_size=null",
        '# HOSTFILE: 3 lines like "HOST slots=8"',
    ]


def test_a_single_rank_needs_no_launcher() -> None:
    """Each of several runs at once takes a port of its own, and none a JSON that the environment names."""
    recipe, settings = Path("r.yaml"), ["seed=3"]
    unset = ["env", "-u", "DEEPSPEED_CONFIG", "-u", "MASTER_PORT"]
    alone = [*unset, sys.executable, "-m", "dwt_ds.pretrain", "r.yaml", "seed=3"]
    assert pretrain_command(recipe, settings, 1) == alone
    launched = own_command("launch", "--ranks", "2", "r.yaml", "seed=3")
    assert pretrain_command(recipe, settings, 2) == [*unset, *launched]
