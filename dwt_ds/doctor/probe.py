"""The checks that a host makes of itself; `dwt-ds doctor` runs them on every host and judges the answers.

python -m dwt_ds.doctor.probe QUESTION      QUESTION is JSON, see `Question`; the answer is the last line of stdout
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from dwt_ds.base.files import appears, write_text
from dwt_ds.base.gpus import computes_on_cpu, gpu_count
from dwt_ds.base.software import host_name, software
from dwt_ds.doctor.commands import end_commands_on_signals, error_line, run
from dwt_ds.doctor.kernel_check import check_kernels
from dwt_ds.engine.build_locks import extensions_folder, find_abandoned_locks

ANSWER = "dwt-ds probe: "
# The C++ compiler needs a minute for each operator; nvcc on a busy machine several.
_BUILD_SECONDS = 900.0
_VISIBLE_SECONDS = 15.0


@dataclass(frozen=True)
class Question:
    """What the host is to check."""

    master_address: str
    """Where rank 0 will be; "" for a run on this machine alone."""
    shared_folder: str
    """A folder with a file `asked` in it, which the asking host made in the folder that all hosts share."""
    mark: str
    """Name of this host's own entry in the shared folder."""


def probe(question: Question) -> dict[str, Any]:
    """The host's answers, ready for JSON; a check that fails has its error as an answer."""
    shared = _check_shared_folder(Path(question.shared_folder), question.mark)
    kernels = check_kernels()
    return {
        "host": host_name(),
        "software": software(),
        "gpus": _gpus(),
        "torch_gpus": gpu_count(),
        "interfaces": _interfaces(),
        "adapters": _adapters(),
        "variables": {k: v for k, v in os.environ.items() if k.startswith(("NCCL_", "GLOO_"))},
        "own_addresses": _addresses(socket.gethostname()),
        "master_addresses": _addresses(question.master_address) if question.master_address else [],
        "shared": shared,
        "free_bytes": _free_bytes(Path(question.shared_folder)),
        "locks": [str(lock) for lock in find_abandoned_locks()],
        "kernels": kernels,
        "operators": _build_operators(),
        "apex": check_apex(),
    }


def _check_shared_folder(folder: Path, mark: str) -> dict[str, Any]:
    """Wait for the asking host's file, and make a folder that appears by a rename, as checkpoints do."""
    if not appears(folder / "asked", _VISIBLE_SECONDS):
        return {"problem": f"{folder} is not visible within {_VISIBLE_SECONDS:.0f} s"}
    try:
        unfinished = folder / f"{mark}.unfinished"
        unfinished.mkdir()
        write_text(unfinished / "answer", mark)
        unfinished.rename(folder / mark)
    except OSError as error:
        return {"problem": f"cannot write and rename in {folder.parent}: {error.strerror}"}
    return {"problem": ""}


def _gpus() -> list[dict[str, str]]:
    """Name, driver and memory of every GPU that a run may use, from the driver."""
    if computes_on_cpu():
        return []
    fields = ["name", "driver_version", "memory.total"]
    code, out, _ = run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], 60.0)
    return [dict(zip(fields, line.split(", "))) for line in out.splitlines() if line.strip()] if code == 0 else []


def _interfaces() -> dict[str, dict[str, Any]]:
    stats = psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: {
            "up": name in stats and stats[name].isup,
            "megabits": stats[name].speed if name in stats else 0,
            "addresses": [address.address.partition("%")[0] for address in addresses if address.family in families],
        }
        for name, addresses in psutil.net_if_addrs().items()
    }


def _adapters() -> dict[str, str]:
    """InfiniBand and RoCE adapters with the state of their first port."""
    return {
        adapter.name: (adapter / "ports" / "1" / "state").read_text(encoding="utf-8").strip()
        for adapter in sorted(Path("/sys/class/infiniband").glob("*"))
        if (adapter / "ports" / "1" / "state").is_file()
    }


def _addresses(name: str) -> list[str]:
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError:
        return []


def _free_bytes(shared: Path) -> dict[str, int]:
    """Free bytes in the folders that runs fill."""
    free = {}
    for folder in (shared.parent, extensions_folder()):
        while not folder.is_dir():
            folder = folder.parent
        free[str(folder)] = shutil.disk_usage(folder).free
    return free


def _build_operators() -> list[dict[str, str]]:
    """In a process of its own, since a compiler may hang."""
    code, out, err = run([sys.executable, "-m", "dwt_ds.engine.ops_check"], _BUILD_SECONDS)
    if code == 124:
        fix = "ask again when the host is less busy; if it is idle, its compiler hangs"
        return [{"name": "all", "problem": f"not built within {_BUILD_SECONDS:.0f} s", "fix": fix}]
    if code != 0:
        fix = "run python -m dwt_ds.engine.ops_check there for all that it says"
        return [{"name": "all", "problem": error_line(err) or "no message", "fix": fix}]
    return json.loads(out.splitlines()[-1])


def check_apex() -> dict[str, Any]:
    """Whether apex is `installed`, and its `problem`, "" if there is none.

    The package index has another package of this name. NVIDIA's can be built without its CUDA extensions, and then
    fails where it is used. The probes are those that a run relies on.
    """
    spec = find_spec("apex")
    if spec is None:
        return {"installed": False, "problem": ""}
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "normalization").is_dir() and (folder / "optimizers").is_dir() for folder in folders):
        return {"installed": True, "problem": "not NVIDIA's package"}
    import torch

    from dwt_ds.engine.optimizers import unusable_reason
    from dwt_ds.models.layer_norm import why_not_apex

    device = torch.device("cuda" if gpu_count() else "cpu")
    reasons = {"FusedLayerNorm": why_not_apex(device)}
    reasons |= {name: unusable_reason(f"apex.{name}", device) for name in ("FusedAdam", "FusedLAMB")}
    return {"installed": True, "problem": "; ".join(f"{name}: {why}" for name, why in reasons.items() if why)}


def main(arguments: list[str]) -> int:
    end_commands_on_signals()
    answers = probe(Question(**json.loads(arguments[0])))
    print(f"{ANSWER}{json.dumps(answers)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
