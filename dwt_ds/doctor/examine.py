"""All checks in their order: hostfile, ssh, each host's own answers, the shared folder, a collective over all ranks."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

from dwt_ds.base.files import appears
from dwt_ds.base.software import host_name
from dwt_ds.doctor.hosts import ask, reach, time_collective
from dwt_ds.doctor.judge import CheckResult, judge_collective, judge_host, judge_reach
from dwt_ds.doctor.probe import Question
from dwt_ds.launch.local import Launch, on_this_machine, only_here
from dwt_ds.launch.multinode import PROGRAMS, on_hosts

# NFS may keep a folder's old listing that long.
_VISIBLE_SECONDS = 60.0


def examine(hostfile: Path | None, shared: Path, say: Callable[[str], None]) -> list[CheckResult]:
    """Every result, by host in the hostfile's order; `say` gets a line for each step.

    Hosts that the launcher's filters leave out are not asked. Raises ValueError for a hostfile, a .deepspeed_env or
    variables for the launcher that cannot be used.
    """
    launch = on_hosts(hostfile, os.environ) if hostfile else on_this_machine(os.environ)
    hosts, over_ssh = launch.hosts, not only_here(launch.hosts)
    results: list[CheckResult] = []
    if over_ssh:
        say(f"asking {len(hosts)} host(s) over ssh")
        with ThreadPoolExecutor(max_workers=64) as pool:
            reached = list(pool.map(reach, [host.name for host in hosts]))
        for host, how in zip(hosts, reached):
            results += judge_reach(host.name, how)
        if launch.launcher in PROGRAMS:
            results.append(_look_for_launcher(launch.launcher))
        if any(how.problem for how in reached):
            return results

    say("checking every host; this takes minutes if operators have not been compiled before")
    answers = _ask_all(launch, shared, over_ssh=over_ssh)
    first = next((answer for answer in answers if "problem" not in answer), {})
    for host, answer in zip(hosts, answers):
        name, slots = host.name if over_ssh else host_name(), host.slots if hostfile else None
        results += judge_host(name, slots, answer, first, several_hosts=len(hosts) > 1)
    if any("problem" in answer for answer in answers):
        return results

    if any(result.check in ("interfaces", "name resolution") and not result.passed for result in results):
        # The ranks could not reach each other.
        results.append(CheckResult("collective", "", "not tried", "correct interfaces and names first"))
        return results

    say(f"timing a collective over {launch.ranks} ranks")
    results.append(judge_collective(time_collective(launch), launch.ranks))
    return results


def _look_for_launcher(name: str) -> CheckResult:
    program, fix = PROGRAMS[name]
    if shutil.which(program) is not None:
        return CheckResult("launcher", "", f"{name}: {program} is installed here")
    fix = f"{fix}, or start with another LAUNCHER (docs/multinode.md)"
    return CheckResult("launcher", "", f"{name}: {program} is not installed here", fix)


def _ask_all(launch: Launch, shared: Path, *, over_ssh: bool) -> list[dict[str, Any]]:
    """Every host's answers, with whether what it wrote to the shared folder is visible here."""
    folder = shared.resolve() / f".dwt-ds-doctor-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        (folder / "asked").write_text("", encoding="utf-8")
        hosts, master = launch.hosts, launch.master_address if over_ssh else ""
        names = [host.name if over_ssh else None for host in hosts]
        questions = [Question(master, str(folder), f"host-{i}") for i in range(len(hosts))]
        with ThreadPoolExecutor(max_workers=64) as pool:
            answers = list(pool.map(ask, names, questions, repeat(launch.host_variables)))
        for question, answer in zip(questions, answers):
            if "problem" in answer:
                continue
            answer["first_host"] = answers[0].get("host", "")
            shared_answer = answer["shared"]
            if not shared_answer["problem"] and not appears(folder / question.mark / "answer", _VISIBLE_SECONDS):
                shared_answer["problem"] = f"its rename in {shared} is not visible here within {_VISIBLE_SECONDS:.0f} s"
        return answers
    finally:
        shutil.rmtree(folder, ignore_errors=True)
