"""Logins to a hostfile's hosts, tried all at once before pdsh starts ranks on them.

DeepSpeed's launcher tries the first host only, hides what ssh says, and ends in a traceback.
"""

from __future__ import annotations

import re
import shlex
import subprocess

from dwt_ds.base.words import prefix_errors
from dwt_ds.launch.local import Launch
from dwt_ds.launch.multinode import read_options

_CONNECT_SECONDS = 15
_LOGIN_SECONDS = 60
_MOST_NAMED = 3
# ssh says "HOST: WORDS", and then pdsh "pdsh@HERE: HOST: WORDS".
_LINE = re.compile(r"(?m)^(pdsh@[^:]+: )?([^:\s]+): (.+)$")


def check_logins(launch: Launch) -> None:
    """Raise ValueError of one line unless pdsh, with the options of the launch, can log in to every host.

    Does nothing for the other launchers, which need no ssh or test it themselves, nor with DeepSpeed's --no_ssh_check.
    """
    options = read_options(launch.options)
    if launch.launcher != "pdsh" or options.no_ssh_check:
        return
    ssh = f"{launch.environment['PDSH_SSH_ARGS_APPEND']} -o BatchMode=yes -o ConnectTimeout={_CONNECT_SECONDS}"
    if options.ssh_port is not None:
        ssh += f" -p {options.ssh_port}"
    names = [host.name for host in launch.hosts]
    command = ["pdsh", "-S", "-u", str(_LOGIN_SECONDS), "-f", str(len(names)), "-w", ",".join(names)]
    with prefix_errors("--launcher_args"):
        command += shlex.split(options.launcher_args)
    done = subprocess.run(
        [*command, "true"],
        env={**launch.environment, "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": ssh},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        return
    failures: dict[str, str] = {}
    words_of_ssh: dict[str, str] = {}
    for by_pdsh, host, words in _LINE.findall(done.stderr):
        (failures if by_pdsh else words_of_ssh)[host] = words
    failed = [f"{name} ({words_of_ssh.get(name, failures[name])})" for name in names if name in failures]
    if not failed:
        lines = done.stderr.splitlines() or [f"pdsh ended with exit code {done.returncode}"]
        raise ValueError(f"{lines[0]}; correct LAUNCHER_ARGS, which pdsh gets")
    more = f" and {len(failed) - _MOST_NAMED} more" if len(failed) > _MOST_NAMED else ""
    raise ValueError(
        f"no login to {', '.join(failed[:_MOST_NAMED])}{more}; `ssh HOST true` has to work from here without a "
        'password, or leave the host out (DEEPSPEED_ARGS="--exclude HOST")'
    )
