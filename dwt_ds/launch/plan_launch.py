"""The command that starts what was planned."""

from __future__ import annotations

import shlex


def launch_commands(
    recipe: str, overrides: list[str], deepspeed_config: str | None, *, nodes: int, ranks_per_node: int
) -> list[str]:
    """The launcher's script, and the same by `deepspeed` itself; ready for a shell."""
    words = [recipe, *overrides]
    if not any(word.startswith("train.expected_world_size=") for word in overrides):
        words.append(f"train.expected_world_size={nodes * ranks_per_node}")
    quoted = shlex.join(words)
    variable = f"DEEPSPEED_CONFIG={shlex.quote(deepspeed_config)} " if deepspeed_config else ""
    option = f" --deepspeed_config {shlex.quote(deepspeed_config)}" if deepspeed_config else ""
    if nodes == 1:
        return [
            f"RANKS={ranks_per_node} {variable}launchers/run_local.sh {quoted}",
            f"deepspeed --num_gpus {ranks_per_node} --module dwt_ds.pretrain {quoted}{option}",
        ]
    return [
        f"{variable}launchers/run_multinode.sh HOSTFILE {quoted}",
        f"deepspeed --hostfile HOSTFILE --module dwt_ds.pretrain {quoted}{option}",
        f'# HOSTFILE: {nodes} lines like "HOST slots={ranks_per_node}" (launchers/hostfile.example)',
    ]
