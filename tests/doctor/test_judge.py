"""Which answers of a host pass and which fail, each failure made from the answers of a good host; and the table."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dwt_ds.doctor.hosts import Reach
from dwt_ds.doctor.judge import CheckResult, judge_collective, judge_host, judge_reach, render

GOOD: dict[str, Any] = {
    "host": "node-2",
    "first_host": "node-1",
    "software": {
        **{"python": "3.11", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "triton": "3.9.0"},
        "dwt_ds": "1",
    },
    "gpus": [{"name": "NVIDIA H100", "driver_version": "570.1", "memory.total": "81559 MiB"}] * 2,
    "torch_gpus": 2,
    "interfaces": {
        "lo": {"up": True, "megabits": 0, "addresses": ["127.0.0.1"]},
        "eth0": {"up": True, "megabits": 100000, "addresses": ["10.0.0.2"]},
        "eth1": {"up": False, "megabits": 0, "addresses": ["10.1.0.2"]},
    },
    "adapters": {"mlx5_0": "4: ACTIVE"},
    "variables": {},
    "own_addresses": ["10.0.0.2"],
    "master_addresses": ["10.0.0.1"],
    "shared": {"problem": ""},
    "free_bytes": {"/shared": 100 * 2**30},
    "locks": [],
    "kernels": [{"device": "cuda:0", "backend": "triton", "errors": {"fp32": 1e-7, "bf16": 8e-3}, "problem": ""}],
    "operators": [{"name": "cpu_adam", "problem": "", "fix": ""}],
    "apex": {"installed": False, "problem": ""},
}


def bad(changes: dict[str, Any], *, several_hosts: bool = True) -> list[CheckResult]:
    answers = {**copy.deepcopy(GOOD), **changes}
    results = judge_host("node-2", 2, answers, GOOD, several_hosts=several_hosts)
    return [result for result in results if not result.passed]


def test_a_good_host_has_no_bad_finding() -> None:
    assert bad({}) == []
    assert bad({}, several_hosts=False) == []


@pytest.mark.parametrize(
    ("changes", "check", "found", "fix"),
    [
        ({"problem": "No module named dwt_ds"}, "package", "No module named dwt_ds", "same path"),
        (
            {"software": {**GOOD["software"], "torch": "2.11.0"}},
            "versions",
            "torch 2.11.0 (first host: 2.13.0)",
            "same set",
        ),
        ({"torch_gpus": 0}, "GPUs", "torch uses 0", "built for CUDA"),
        ({"torch_gpus": 1}, "GPUs", "gives it 2 slots", "slots=1"),
        ({"torch_gpus": 0, "gpus": []}, "GPUs", "none, but the first host has some", "from the hostfile"),
        (
            {"gpus": [{**GOOD["gpus"][0], "driver_version": "535.2"}] * 2},
            "GPUs",
            "the first host's driver is 570.1",
            "same driver",
        ),
        ({"variables": {"NCCL_SOCKET_IFNAME": "ib"}}, "interfaces", "NCCL_SOCKET_IFNAME=ib: no ib that is up", "eth0"),
        ({"variables": {"NCCL_SOCKET_IFNAME": "=eth"}}, "interfaces", "no eth that is up", "eth0"),
        ({"variables": {"GLOO_SOCKET_IFNAME": "eth"}}, "interfaces", "no eth that is up", "eth0"),
        ({"variables": {"GLOO_SOCKET_IFNAME": "eth1"}}, "interfaces", "no eth1 that is up", "eth0"),
        ({"variables": {"NCCL_IB_HCA": "mlx5_0,mlx5_3:1"}}, "interfaces", "no mlx5_3 that is up", "mlx5_0"),
        ({"master_addresses": []}, "name resolution", "has no address", "MASTER_ADDR"),
        ({"master_addresses": ["127.0.1.1"]}, "name resolution", "this host itself", "/etc/hosts"),
        ({"own_addresses": ["127.0.1.1"]}, "name resolution", "127.0.1.1", "GLOO_SOCKET_IFNAME=eth0"),
        ({"own_addresses": ["::1"]}, "name resolution", "::1", "GLOO_SOCKET_IFNAME=eth0"),
        ({"shared": {"problem": "not visible"}}, "shared folder", "not visible", "same file system"),
        ({"free_bytes": {"/shared": 2**30}}, "disk", "1 GiB free in /shared", "make room"),
        (
            {"kernels": [{"device": "cuda:0", "backend": "triton", "errors": {}, "problem": "off by 1e-01"}]},
            "loss kernel",
            "cuda:0: Triton: off by 1e-01",
            "distill.backend=torch",
        ),
        (
            {"operators": [{"name": "cpu_adam", "problem": "no compiler", "fix": "install a C++ compiler"}]},
            "compiled operators",
            "cpu_adam: no compiler",
            "C++",
        ),
        (
            {"operators": [{"name": "all", "problem": "not built within 900 s", "fix": "ask again"}]},
            "compiled operators",
            "not built within 900 s",
            "ask again",
        ),
        (
            {"locks": ["/c/cpu_adam/lock"]},
            "compiled operators",
            "a build that was killed",
            "rm /c/cpu_adam/lock",
        ),
        ({"apex": {"installed": True, "problem": "not NVIDIA's package"}}, "apex", "not NVIDIA's", "pip uninstall"),
    ],
)
def test_a_bad_answer_fails_once_with_its_fix(changes: dict[str, Any], check: str, found: str, fix: str) -> None:
    results = bad(changes)
    assert [result.check for result in results] == [check]
    assert found in results[0].found
    assert fix in results[0].fix


@pytest.mark.parametrize(
    "variables",
    [
        {"NCCL_SOCKET_IFNAME": "eth"},
        {"NCCL_SOCKET_IFNAME": "^docker"},
        {"NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"},
        {"NCCL_IB_HCA": "mlx5"},
        {"NCCL_IB_HCA": "=mlx5_0:1"},
    ],
)
def test_variables_that_fit_the_host_pass(variables: dict[str, str]) -> None:
    assert bad({"variables": variables}) == []


def test_with_the_interface_named_its_own_name_may_be_the_loopback() -> None:
    assert bad({"own_addresses": ["127.0.1.1"], "variables": {"GLOO_SOCKET_IFNAME": "eth0"}}) == []


def test_a_machine_alone_needs_no_names_and_no_gpu() -> None:
    alone = {"own_addresses": ["127.0.0.1"], "master_addresses": []}
    assert bad(alone, several_hosts=False) == []
    cpu = {**GOOD, "gpus": [], "torch_gpus": 0}
    results = judge_host("node-1", None, cpu, cpu, several_hosts=False)
    assert all(result.passed for result in results)


def test_a_gpu_without_triton_fails_and_its_loss_is_reported_as_torchs() -> None:
    answers = {
        **GOOD,
        "software": {**GOOD["software"], "triton": "none"},
        "kernels": [{**GOOD["kernels"][0], "backend": "torch"}],
    }
    results = judge_host("node-1", 2, answers, answers, several_hosts=True)
    assert [(result.check, result.found) for result in results if not result.passed] == [
        ("versions", "triton is not installed")
    ]
    (kernel,) = [result for result in results if result.check == "loss kernel"]
    assert kernel.found == "cuda:0: torch, within 1e-07 in fp32, 8e-03 in bf16 of the fp64 reference"
    cpu = {**answers, "gpus": [], "torch_gpus": 0}
    assert all(result.passed for result in judge_host("node-1", None, cpu, cpu, several_hosts=False))


def test_a_host_that_does_not_answer_or_whose_clock_is_off_fails() -> None:
    silent = judge_reach("node-2", Reach("Permission denied (publickey).", 0, 0))
    assert [(result.check, result.passed) for result in silent] == [("ssh", False)]
    assert "ssh -o BatchMode=yes node-2 true" in silent[0].fix
    # What the question's own time could explain is no skew.
    assert all(result.passed for result in judge_reach("node-2", Reach("", 2.5, 1.0)))
    late = judge_reach("node-2", Reach("", -90.0, 0.1))
    assert [(result.check, result.passed) for result in late] == [("ssh", True), ("clock", False)]
    assert "-90.0 s" in late[1].found
    assert "chrony" in late[1].fix


def test_a_collective_must_have_all_ranks() -> None:
    measured = {
        "ranks": 2,
        "hosts": ["a", "b"],
        "bytes": 2**24,
        "seconds": 0.1,
        "latency_seconds": 0.001,
        "bus_bytes_per_second": 1.7e8,
    }
    good = judge_collective(measured, 2)
    assert good.passed
    assert "2 ranks on 2 host(s): 16 MiB summed in 100.0 ms, 0.17 GB/s" in good.found
    assert not judge_collective(measured, 4).passed
    assert not judge_collective({"problem": "RuntimeError: connection refused"}, 2).passed


# The table.

RESULTS = [
    CheckResult("ssh", "node-1", "answers"),
    CheckResult("ssh", "node-2", "no route to host", "start sshd there"),
    CheckResult("disk", "node-1", "62 GiB free"),
    CheckResult("disk", "node-2", "62 GiB free"),
    CheckResult("collective", "", "2 ranks"),
]


def test_every_line_has_its_verdict_and_a_failed_one_its_fix() -> None:
    lines = render(RESULTS, colour=False).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["PASS", "ssh", "node-1", "answers"],
        ["FAIL", "ssh", "node-2", "no", "route", "to", "host", "->", "start", "sshd", "there"],
    ]
    assert lines[-1] == "1 of 5 checks failed"
    assert "\033" not in "".join(lines)


def test_hosts_with_the_same_result_share_a_line() -> None:
    assert "node-1, node-2  62 GiB free" in render(RESULTS, colour=False)
    many = [CheckResult("disk", f"node-{i}", "62 GiB free") for i in range(64)]
    assert "node-0 and 63 others  62 GiB free" in render(many, colour=False)


def test_colour_is_added_to_the_verdicts() -> None:
    text = render(RESULTS, colour=True)
    assert "\033[32mPASS\033[0m" in text
    assert "\033[31mFAIL\033[0m" in text


def test_the_last_line_reports_that_all_is_well() -> None:
    assert render(RESULTS[:1], colour=False).splitlines()[-1] == "everything is in order"
