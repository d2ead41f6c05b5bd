"""How DeepSpeed's launcher is started, and the rules for ranks on this machine: which GPUs, how many, which port.

What trains, what a study runs and what `dwt-ds doctor` times all start from a `Launch`.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dwt_ds.base.gpus import gpu_count
from dwt_ds.base.ports import reserve_port
from dwt_ds.base.processes import own_command, own_programs_first, path_argument
from dwt_ds.launch.hostfile import Host

_RUN_MODULE = str(Path(__file__).with_name("run_module.py"))
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]


class Launch(NamedTuple):
    """A way to start DeepSpeed's launcher, whatever the ranks then run."""

    hosts: list[Host]
    """Those in use, with the ranks on each; rank 0 is on the first. `localhost` is this machine."""
    master_address: str
    """Where the other ranks reach rank 0's host."""
    launcher: str
    """A key of `multinode.PROGRAMS`; "none" where DeepSpeed starts this machine's ranks itself."""
    options: list[str]
    """Of DeepSpeed's launcher."""
    environment: dict[str, str]
    """All variables to start it with."""
    host_variables: dict[str, str] = {}
    """What .deepspeed_env sets on every host."""
    prefix: list[str] = DEEPSPEED
    """The words before the options."""

    @property
    def ranks(self) -> int:
        return sum(host.slots for host in self.hosts)

    def command(self, module: str, arguments: Sequence[str] = ()) -> list[str]:
        """The words that start `python -m MODULE ARGUMENTS` on every rank."""
        # DeepSpeed's commands for MPI and Slurm are wrong with --module.
        starts_modules = self.launcher in ("none", "pdsh", "srun")
        program = ["--module", module] if starts_modules else [_RUN_MODULE, module]
        words = [_quoted_for_pdsh(word) for word in arguments] if self.launcher == "pdsh" else arguments
        # The only warning of DeepSpeed's launcher is that there is no hostfile; on this machine that is intended.
        level = "error" if only_here(self.hosts) else "warning"
        return [*self.prefix, "--log_level", level, *self.options, *program, *words]


def only_here(hosts: Sequence[Host]) -> bool:
    """Whether all ranks are on this machine, which needs no ssh."""
    return [host.name for host in hosts] == ["localhost"]


def _quoted_for_pdsh(word: str) -> str:
    """pdsh passes all words to a shell on each host. DeepSpeed puts double quotes around words with a space in them."""
    if " " not in word:
        return shlex.quote(word)
    return "".join(f"\\{character}" if character in "\\$`" else character for character in word)


def on_this_machine(environment: Mapping[str, str]) -> Launch:
    """RANKS ranks of `environment`, by default one per visible GPU, or two on the CPU; they meet at MASTER_PORT, or at
    a free port.

    Raises ValueError of one line for values that cannot be used.
    """
    gpus = gpu_count(environment)
    ranks = whole_number(environment, "RANKS") or gpus or 2
    port = whole_number(environment, "MASTER_PORT", at_most=65535) or reserve_port()
    started = launcher_environment(environment)
    where = ["--num_gpus", str(ranks)]
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if gpus and visible:
        # With --num_gpus DeepSpeed would forget them, and take the machine's first GPUs.
        devices = [name.strip() for name in visible.split(",")]
        if not all(name.isdecimal() for name in devices):
            raise ValueError(
                f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed needs numbers; write 2,3 or, for ranks on the CPU, "
                "set DS_ACCELERATOR=cpu"
            )
        where = ["--include", f"localhost:{','.join(devices[:ranks])}"]
        del started["CUDA_VISIBLE_DEVICES"]  # DeepSpeed would print that it ignores it
    if gpus and ranks > gpus:
        among = f"CUDA_VISIBLE_DEVICES={visible} has" if visible else "this machine has"
        raise ValueError(f"--ranks {ranks} (or RANKS): {among} {gpus} GPUs; ask for at most {gpus}")
    if "DS_ACCELERATOR" not in started:
        import torch

        if not torch.accelerator.is_available():
            started["DS_ACCELERATOR"] = "cpu"  # DeepSpeed warns when it finds out by itself
    # DeepSpeed would use /job/hostfile where there is one.
    options = ["--hostfile", os.devnull, *where, "--master_port", str(port)]
    return Launch([Host("localhost", ranks)], "127.0.0.1", "none", options, started)


def whole_number(environment: Mapping[str, str], name: str, at_most: int | None = None) -> int | None:
    """A variable's value from 1 up; None if it is not set, ValueError if it is something else."""
    text = environment.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1 or (at_most is not None and int(text) > at_most):
        bound = "of 1 or more" if at_most is None else f"from 1 to {at_most}"
        raise ValueError(f"{name}={text}: write a whole number {bound}")
    return int(text)


def launcher_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with this Python's programs first on its PATH."""
    return {**environment, "PATH": own_programs_first(environment.get("PATH", os.defpath))}


def pretrain_command(recipe: Path, overrides: Sequence[str], ranks: int) -> list[str]:
    """A run on this machine, for a process of its own: `dwt-ds launch`, or its only rank by itself.

    Without DeepSpeed's launcher, whose processes load DeepSpeed one after another, the first step comes sooner. The
    DeepSpeed JSON is the recipe's and the port a free one, whatever the environment says: there may be several runs.
    """
    words = [path_argument(recipe), *overrides]
    alone = [sys.executable, "-m", "dwt_ds.pretrain", *words]
    together = own_command("launch", "--ranks", str(ranks), *words)
    return ["env", "-u", "DEEPSPEED_CONFIG", "-u", "MASTER_PORT", *(alone if ranks == 1 else together)]


def printed_commands(
    recipe: str, overrides: Sequence[str], deepspeed_config: str | None, *, nodes: int, ranks_per_node: int
) -> list[str]:
    """The same run by `dwt-ds launch` and by `deepspeed` itself, ready for a shell."""
    words = [recipe, *overrides]
    if not any(word.startswith("train.expected_world_size=") for word in overrides):
        words.append(f"train.expected_world_size={nodes * ranks_per_node}")
    words += ["--deepspeed_config", deepspeed_config] if deepspeed_config else []
    run = shlex.join(words)
    if nodes == 1:
        return [
            f"dwt-ds launch --ranks {ranks_per_node} {run}",
            f"deepspeed --num_gpus {ranks_per_node} --module dwt_ds.pretrain {run}",
        ]
    return [
        f"dwt-ds launch --hostfile HOSTFILE {run}",
        f"deepspeed --hostfile HOSTFILE --module dwt_ds.pretrain {run}",
        f'# HOSTFILE: {nodes} lines like "HOST slots={ranks_per_node}"',
    ]
