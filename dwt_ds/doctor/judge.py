"""From hosts' answers to results with their fixes, and the table of them; nothing here asks or starts anything."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dwt_ds.base.words import GIB, table
from dwt_ds.doctor.hosts import Reach

_GREEN, _RED, _PLAIN = "\033[32m", "\033[31m", "\033[0m"
# A checkpoint of BERT-large with its optimizer state is 5 GiB.
FREE_GIB = 5
# Enough for time stamps to stay in order over a run's logs and checkpoints.
SKEW_SECONDS = 2.0


class CheckResult(NamedTuple):
    """One check on one host; `host` is "" if it concerns all of them together."""

    check: str
    host: str
    found: str
    fix: str = ""
    """What to do; empty if the check passed."""

    @property
    def passed(self) -> bool:
        return not self.fix


def judge_reach(host: str, reached: Reach) -> list[CheckResult]:
    """ssh, and the host's clock against ours."""
    if reached.problem:
        fix = (
            f"make `ssh -o BatchMode=yes {host} true` work: name or address, key without a password, known host key; "
            "on a Slurm cluster without ssh: docs/multinode.md"
        )
        return [CheckResult("ssh", host, reached.problem, fix)]
    skew = abs(reached.clock_ahead_seconds) - reached.uncertain_seconds
    if skew > SKEW_SECONDS:
        found = f"{reached.clock_ahead_seconds:+.1f} s against this machine"
        clock = CheckResult("clock", host, found, "keep it in time with chrony or ntpd")
    else:
        clock = CheckResult("clock", host, f"within {SKEW_SECONDS:.0f} s of this machine")
    return [CheckResult("ssh", host, "answers without a password"), clock]


def judge_host(
    host: str, slots: int | None, answers: Mapping[str, Any], first: Mapping[str, Any], *, several_hosts: bool
) -> list[CheckResult]:
    """All checks on one host's answers; `first` are the first host's, which it has to match.

    `slots` is how many ranks the hostfile and the launcher's filters give it, None without a hostfile.
    """
    if "problem" in answers:
        fix = "install the same dwt_ds at the same path, with the same virtual environment, on every host"
        return [CheckResult("package", host, answers["problem"], fix)]
    return [
        _software(host, answers["software"], first["software"], gpus=bool(answers["gpus"] or answers["torch_gpus"])),
        _gpus(host, slots, answers, first["gpus"]),
        *_network(host, answers, several_hosts=several_hosts),
        _shared(host, answers["shared"]),
        *_disks(host, answers["free_bytes"]),
        *_kernels(host, answers["kernels"]),
        *_operators(host, answers),
        _apex(host, answers["apex"]),
    ]


def judge_collective(measured: Mapping[str, Any], expected_ranks: int) -> CheckResult:
    """The timed all-reduce over all ranks."""
    fix = (
        "see docs/multinode.md: a firewall between the hosts, the wrong interface (GLOO_SOCKET_IFNAME, "
        "NCCL_SOCKET_IFNAME in .deepspeed_env), a port in use (MASTER_PORT)"
    )
    if "problem" in measured:
        return CheckResult("collective", "", measured["problem"], fix)
    found = (
        f"{measured['ranks']} ranks on {len(measured['hosts'])} host(s): {measured['bytes'] / 2**20:.0f} MiB summed in "
        f"{measured['seconds'] * 1e3:.1f} ms, {measured['bus_bytes_per_second'] / 1e9:.2f} GB/s a link; "
        f"one number in {measured['latency_seconds'] * 1e3:.2f} ms"
    )
    if measured["ranks"] != expected_ranks:
        return CheckResult("collective", "", f"{found}; expected {expected_ranks} ranks", fix)
    return CheckResult("collective", "", found)


def _software(host: str, ours: Mapping[str, str], first: Mapping[str, str], *, gpus: bool) -> CheckResult:
    other = [f"{name} {ours.get(name)} (first host: {first[name]})" for name in first if ours.get(name) != first[name]]
    # On a CPU the loss is torch's; a GPU without Triton would silently use that, too.
    needed = ("torch", "deepspeed", "transformers", *(("triton",) if gpus else ()))
    missing = [name for name in needed if ours[name] == "none"]
    if other or missing:
        found = ", ".join([*other, *(f"{name} is not installed" for name in missing)])
        return CheckResult("versions", host, found, "install the same set on every host (constraints.txt)")
    return CheckResult("versions", host, ", ".join(f"{name} {version}" for name, version in ours.items()))


def _gpus(host: str, slots: int | None, answers: Mapping[str, Any], first_gpus: list[dict[str, str]]) -> CheckResult:
    listed, usable = answers["gpus"], answers["torch_gpus"]
    if not listed and not usable:
        if first_gpus:
            return CheckResult("GPUs", host, "none, but the first host has some", "remove the host from the hostfile")
        return CheckResult("GPUs", host, "none: ranks compute on the CPU")
    kinds = ", ".join(sorted({f"{gpu['name']} {gpu['memory.total']}" for gpu in listed}))
    driver = listed[0]["driver_version"] if listed else "unknown"
    found = f"{len(listed)} x {kinds}, driver {driver}; torch uses {usable}"
    if usable == 0:
        fix = "install a torch built for CUDA, and a driver that is new enough for it"
        return CheckResult("GPUs", host, found, fix)
    if slots is not None and slots > usable:
        fix = f"write slots={usable} into the hostfile, and no higher --num_gpus into DEEPSPEED_ARGS"
        return CheckResult("GPUs", host, f"{found}; the run gives it {slots} slots", fix)
    if first_gpus and driver != first_gpus[0]["driver_version"]:
        found = f"{found}; the first host's driver is {first_gpus[0]['driver_version']}"
        return CheckResult("GPUs", host, found, "install the same driver on every host")
    return CheckResult("GPUs", host, found)


def _network(host: str, answers: Mapping[str, Any], *, several_hosts: bool) -> list[CheckResult]:
    interfaces, variables = answers["interfaces"], answers["variables"]
    up = {name: entry for name, entry in interfaces.items() if entry["up"] and entry["addresses"] and name != "lo"}
    shown = ", ".join(
        f"{name} {entry['addresses'][0]}" + (f" {entry['megabits'] / 1000:g} Gb/s" if entry["megabits"] > 0 else "")
        for name, entry in up.items()
    )
    adapters = "".join(f", {name} {state}" for name, state in answers["adapters"].items())
    wrong = _wrong_variables(interfaces, answers["adapters"], variables)
    found = wrong or (shown or "only the loopback") + adapters
    fix = f"name one that exists and is up: {', '.join([*up, *answers['adapters']]) or 'none is'}" if wrong else ""
    results = [CheckResult("interfaces", host, found, fix)]
    if several_hosts:
        results.append(_name_resolution(host, answers, next(iter(up), "eth0")))
    return results


def _name_resolution(host: str, answers: Mapping[str, Any], interface: str) -> CheckResult:
    """What this host makes of the first host's name and of its own; `interface` is one to name in the fix."""
    own, master = answers["own_addresses"], answers["master_addresses"]
    found, fix = "the first host's name and its own have addresses", ""
    if not master:
        found = "the first host's name has no address"
        fix = "put it into DNS or /etc/hosts on this host, or give another address as MASTER_ADDR"
    elif all(_loopback(address) for address in master) and answers["host"] != answers["first_host"]:
        found = f"the first host's name resolves to {master[0]}, this host itself"
        fix = "correct /etc/hosts on this host, or give another address as MASTER_ADDR"
    elif all(_loopback(address) for address in own) and "GLOO_SOCKET_IFNAME" not in answers["variables"]:
        found = f"its own name is {own[0] if own else 'unknown'}, which it would give the others as its address"
        fix = f"correct /etc/hosts, or write GLOO_SOCKET_IFNAME={interface} into .deepspeed_env"
    return CheckResult("name resolution", host, found, fix)


def _wrong_variables(
    interfaces: Mapping[str, Mapping[str, Any]], adapters: Mapping[str, str], variables: Mapping[str, str]
) -> str:
    """The first variable that names something this host does not have, as NCCL and gloo read them."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"):
        value = variables.get(name, "")
        if not value or value.startswith("^"):
            continue
        # gloo takes whole names, NCCL beginnings of names unless there is a "=".
        whole = name.startswith("GLOO") or value.startswith("=")
        there = list(adapters) if name == "NCCL_IB_HCA" else [n for n, entry in interfaces.items() if entry["up"]]
        for wanted in value.lstrip("=").split(","):
            wanted = wanted.partition(":")[0] if name == "NCCL_IB_HCA" else wanted
            if not any(have == wanted if whole else have.startswith(wanted) for have in there):
                return f"{name}={value}: no {wanted} that is up"
    return ""


def _loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _shared(host: str, shared: Mapping[str, Any]) -> CheckResult:
    if shared["problem"]:
        fix = "mount the same file system at the same path on every host, writable; or name another with --shared"
        return CheckResult("shared folder", host, shared["problem"], fix)
    return CheckResult(
        "shared folder", host, "files and renames of other hosts are visible here, and the other way round"
    )


def _disks(host: str, free_bytes: Mapping[str, int]) -> list[CheckResult]:
    results = []
    for folder, free in free_bytes.items():
        found = f"{free / GIB:.0f} GiB free in {folder}"
        fix = "" if free >= FREE_GIB * GIB else f"make room: {FREE_GIB} GiB at least"
        results.append(CheckResult("disk", host, found, fix))
    return results


def _kernels(host: str, kernels: list[dict[str, Any]]) -> list[CheckResult]:
    results = []
    for answer in kernels:
        kind = "Triton" if answer["backend"] == "triton" else "torch"
        errors = ", ".join(f"{error:.0e} in {dtype}" for dtype, error in answer["errors"].items())
        found = f"{answer['device']}: {kind}, within {errors} of the fp64 reference"
        if answer["problem"]:
            found = f"{answer['device']}: {kind}: {answer['problem']}"
        around = "distill.backend=torch trains without it; " if kind == "Triton" else ""
        fix = f"{around}report this with the versions above" if answer["problem"] else ""
        results.append(CheckResult("loss kernel", host, found, fix))
    return results


def _operators(host: str, answers: Mapping[str, Any]) -> list[CheckResult]:
    results = []
    abandoned = {Path(lock).parent.name: lock for lock in answers["locks"]}
    for operator, lock in abandoned.items():
        found = f"{operator}: the lock of a build that was killed; no run can start with it"
        results.append(CheckResult("compiled operators", host, found, f"rm {lock}"))
    for operator in answers["operators"]:
        if operator["name"] in abandoned:
            continue
        found = f"{operator['name']}: {operator['problem'] or 'builds'}"
        replaced = operator["name"] == "fused_adam" and bool(operator["problem"])
        found += "; torch's fused Adam is used" if replaced else ""
        fix = "" if replaced else operator["fix"]
        results.append(CheckResult("compiled operators", host, found, fix))
    return results


def _apex(host: str, apex: Mapping[str, Any]) -> CheckResult:
    if not apex["installed"]:
        return CheckResult("apex", host, "not installed, and not needed")
    if apex["problem"]:
        fix = "pip uninstall apex; then build github.com/NVIDIA/apex with its CUDA extensions, or do without"
        return CheckResult("apex", host, apex["problem"], fix)
    return CheckResult("apex", host, "NVIDIA's, with its CUDA extensions")


def render(results: Sequence[CheckResult], *, colour: bool) -> str:
    """One line for each check, hosts with the same result together, and the fix beside every FAIL."""
    rows = [("", "check", "host", "found")]
    for same in _alike(results):
        one = same[0]
        found = one.found if one.passed else f"{one.found}  ->  {one.fix}"
        rows.append(("PASS" if one.passed else "FAIL", one.check, _hosts([result.host for result in same]), found))
    lines = table(rows)
    if colour:
        for verdict, code in (("PASS", _GREEN), ("FAIL", _RED)):
            lines = [re.sub(f"^{verdict}", f"{code}{verdict}{_PLAIN}", line) for line in lines]
    bad = sum(not result.passed for result in results)
    lines.append("everything is in order" if not bad else f"{bad} of {len(results)} checks failed")
    return "\n".join(lines)


def _alike(results: Sequence[CheckResult]) -> list[list[CheckResult]]:
    groups: dict[CheckResult, list[CheckResult]] = {}
    for result in results:
        groups.setdefault(result._replace(host=""), []).append(result)
    order = list(dict.fromkeys(result.check for result in results))
    return sorted(groups.values(), key=lambda same: order.index(same[0].check))


def _hosts(names: list[str]) -> str:
    if len(names) <= 4:
        return ", ".join(names)
    return f"{names[0]} and {len(names) - 1} others"
