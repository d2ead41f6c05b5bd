"""Which rank a process is, by the environment of whatever started it."""

from __future__ import annotations

import re
import socket

import pytest
from harness.ranks import Run

from dwt_ds.engine.rank_environment import fill_rank_environment, number_of_visible_device

ADDRESS = {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
RANK_5 = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}


@pytest.mark.parametrize(
    "given",
    [
        RANK_5,
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        {
            "OMPI_COMM_WORLD_RANK": "5",
            "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        },
        {
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": "5",
            "SLURM_NTASKS": "8",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        },
    ],
    ids=["deepspeed", "torchrun", "openmpi", "slurm"],
)
def test_ranks_of_every_launcher_are_read(given: dict[str, str]) -> None:
    environment = {**given, **ADDRESS}
    fill_rank_environment(environment)
    assert {name: environment[name] for name in (*RANK_5, *ADDRESS)} == {**RANK_5, **ADDRESS}


def test_ranks_of_deepspeed_within_a_slurm_step_take_precedence() -> None:
    slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    environment = {**slurm, **RANK_5, **ADDRESS}
    fill_rank_environment(environment)
    assert {name: environment[name] for name in RANK_5} == RANK_5


@pytest.mark.parametrize("given", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}])
def test_without_a_launcher_there_is_one_rank(given: dict[str, str]) -> None:
    environment = dict(given)
    fill_rank_environment(environment)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    assert {name: environment[name] for name in alone} == alone
    assert int(environment["MASTER_PORT"]) > 0


@pytest.mark.parametrize("left_out", list(ADDRESS))
def test_a_missing_address_is_named(left_out: str) -> None:
    environment = {**RANK_5, **ADDRESS}
    del environment[left_out]
    with pytest.raises(ValueError, match=rf"^{left_out}: not set, and there are 8 ranks; export"):
        fill_rank_environment(environment)


@pytest.mark.parametrize(("local_rank", "devices", "expected"), [("3", 1, "0"), ("3", 8, "3"), ("5", 4, "1")])
def test_the_local_rank_is_the_number_of_a_visible_device(local_rank: str, devices: int, expected: str) -> None:
    """`srun --gpus-per-task=1` shows each task one GPU."""
    slurm, openmpi = {"LOCAL_RANK": local_rank}, {"LOCAL_RANK": local_rank, "OMPI_COMM_WORLD_LOCAL_RANK": local_rank}
    for environment in (slurm, openmpi):
        number_of_visible_device(environment, devices)
    assert slurm == {"LOCAL_RANK": expected}
    assert openmpi == {"LOCAL_RANK": expected, "OMPI_COMM_WORLD_LOCAL_RANK": expected}


def test_gpus_that_were_asked_for_and_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match=r"^DS_ACCELERATOR=cuda: torch sees no GPU on .*; see whether nvidia-smi"):
        number_of_visible_device({"LOCAL_RANK": "0"}, 0)


# Rank 1 is on a host whose driver is down.
APART = """
import os, sys
from deepspeed.accelerator import get_accelerator
from dwt_ds.engine.ranks import AllRanksError, OtherRankError, start_ranks
if os.environ["RANK"] == "0":
    get_accelerator().communication_backend_name = lambda: "nccl"
try:
    start_ranks()
except AllRanksError as error:
    print(type(error).__name__, error)
"""


def test_ranks_with_and_without_a_gpu_end_at_once(run_ranks: Run) -> None:
    """They would wait for one another, in a group of NCCL and one of gloo, until the time limit."""
    first, second = run_ranks([["-c", APART]] * 2, seconds=60)
    assert first.out.startswith("AllRanksError ranks on different devices: "), first.err
    assert ", nccl on " in first.out
    assert "; gloo means that torch sees no GPU there: see what nvidia-smi lists" in first.out
    assert second.out.startswith("OtherRankError "), second.err


# Each rank on the GPU that its environment names, of which torch sees one.
ON_GPU = """
import os, types
import torch
from deepspeed.accelerator import get_accelerator
from dwt_ds.engine import ranks
accelerator = get_accelerator()
accelerator.device_name = lambda number=None: "cuda"
accelerator.device_count = lambda: 1
accelerator.set_device = lambda number: None
torch.cuda.get_device_properties = lambda number: types.SimpleNamespace(uuid=os.environ["GPU"])
try:
    ranks.start_ranks()
    print("met")
except ranks.AllRanksError as error:
    print(type(error).__name__, error)
"""


def test_ranks_with_the_same_gpu_end_at_once(run_ranks: Run) -> None:
    """NCCL would end at the first collective, with "Duplicate GPU"."""
    first, *others = run_ranks([["-c", ON_GPU]] * 3, own=[{"GPU": gpu} for gpu in "aba"], seconds=60)
    refused = r"AllRanksError ranks 0 and 2 have the same GPU: the 3 ranks on \S+ see 2 GPU\(s\); start as many "
    refused += r"ranks as GPUs there, with --num_gpus or slots= in the hostfile, or see what CUDA_VISIBLE_DEVICES is\n"
    assert re.fullmatch(refused, first.out), first
    for other in others:
        assert other.out.startswith("OtherRankError ranks 0 and 2 have the same GPU: "), other.err


def test_ranks_with_a_gpu_each_meet(run_ranks: Run) -> None:
    ended = run_ranks([["-c", ON_GPU]] * 2, own=[{"GPU": "a"}, {"GPU": "b"}], seconds=60)
    assert [rank.out for rank in ended] == ["met\n"] * 2, ended


# What srun and mpirun can do: ranks on cores of their own, and two that share theirs.
THREADS = """
import json, os
import torch
from dwt_ds.engine.ranks import start_ranks
os.environ.pop("OMP_NUM_THREADS", None)
os.sched_getaffinity = lambda _: set(json.loads(os.environ["CORES"]))
start_ranks()
print(torch.get_num_threads())
"""


def test_ranks_divide_the_cores_that_they_share(run_ranks: Run) -> None:
    bound = [{"CORES": cores} for cores in ("[0, 1, 2]", "[3, 4, 5, 6]", "[3, 4, 5, 6]")]
    ended = run_ranks([["-c", THREADS]] * 3, own=bound)
    assert [rank.out for rank in ended] == ["3\n", "2\n", "2\n"], ended


MEET_OR_SAY = """
from dwt_ds.engine import ranks
ranks._MEETING_SECONDS = 2.0
try:
    ranks.start_ranks(2.0)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("size", ["1", "2"])
def test_a_port_that_is_taken_is_named(size: str, run_ranks: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        [ended] = run_ranks([["-c", MEET_OR_SAY]], environment={"MASTER_PORT": port, "WORLD_SIZE": size})
    told = (
        rf"MASTER_ADDR=127\.0\.0\.1, MASTER_PORT={port}: the ranks cannot meet there \(.*address already in use\); .*\n"
    )
    assert re.fullmatch(told, ended.out), ended


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_never_comes_ends_the_others_with_one_line(rank: str, run_ranks: Run) -> None:
    [ended] = run_ranks([["-c", MEET_OR_SAY]], environment={"WORLD_SIZE": "2"}, own=[{"RANK": rank}])
    assert re.fullmatch(r"MASTER_ADDR=.*: the ranks cannot meet there \(.*[Tt]imed out.*\); .*\n", ended.out), ended


# Slurm's fourth task on a host, which sees its own GPU only.
FOURTH = """
from deepspeed.accelerator import get_accelerator
from dwt_ds.engine import ranks
given = []
accelerator = get_accelerator()
accelerator.device_name = lambda number=None: "cuda"
accelerator.device_count = lambda: 1
accelerator.set_device = given.append
ranks.start_ranks()
print(given, ranks.local_rank())
"""


def test_a_rank_keeps_its_place_on_its_machine_where_it_sees_one_gpu(run_ranks: Run) -> None:
    [ended] = run_ranks([["-c", FOURTH]], own=[{"LOCAL_RANK": "3"}])
    assert ended.out == "[0] 3\n", ended.err


# Ranks that meet late, and then one that keeps the others waiting for longer than a collective may take.
MEET = """
import os, sys, time
from dwt_ds.engine.ranks import barrier, start_ranks
late = os.environ["RANK"] == "1"
time.sleep(8 if late else 0)
start_ranks(4.0)
print("met", flush=True)
time.sleep(12 if late else 0)
barrier()
"""


@pytest.mark.slow
def test_the_limit_of_a_collective_is_not_that_of_the_start(run_ranks: Run) -> None:
    first, second = run_ranks([["-c", MEET]] * 2)
    assert (first.out, second.out) == ("met\n", "met\n")
    assert first.code != 0
    assert "imed out" in first.err or "imeout" in first.err, first.err


# On a CPU, with what a rank on GPU 3 has around it.
BARRIERS = """
import deepspeed.comm, torch.distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import TorchBackend
from dwt_ds.engine import ranks
ranks.start_ranks()
named = []
torch.distributed.barrier = lambda **given: named.append(given["device_ids"])
get_accelerator().current_device = lambda: 3
for _ in range(2):  # a process may start its ranks again
    TorchBackend.barrier = ranks._barrier_on_own_device
deepspeed.comm.barrier()
deepspeed.comm.barrier(torch.distributed.group.WORLD)
deepspeed.comm.barrier(device_ids=[1])
print(named)
"""


def test_deepspeeds_barriers_name_the_device(run_ranks: Run) -> None:
    """Otherwise NCCL would guess it by the global rank."""
    [ended] = run_ranks([["-c", BARRIERS]])
    assert ended.out == "[[3], [3], [1]]\n", ended.err
