"""Start a run with DeepSpeed's launcher, on this machine or a hostfile's hosts, and supervise it until it finishes.

SIGTERM, Ctrl-C and a closed terminal (but not under nohup) become a request to the run, which saves a checkpoint and
ends. Exit code: 0 if the run is complete, 75 if it stopped and the same command resumes it, 2 for a mistake, else the
launcher's own.
"""

from __future__ import annotations

import argparse
import os

from dwt_ds.base.processes import home_path
from dwt_ds.base.streams import outlive_lost_output

VARIABLES = """environment variables:
  RANKS=N                   --ranks
  CUDA_VISIBLE_DEVICES=2,3  these GPUs of this machine, or the first N of them
  MASTER_PORT=PORT          where the ranks meet (this machine: a free port; a hostfile: 29500)
  DEEPSPEED_CONFIG=JSON     --deepspeed_config
with --hostfile:
  MASTER_ADDR=ADDRESS       address of rank 0's host that the others reach (default: the first host in use)
  LAUNCHER=NAME             pdsh (default), openmpi, mpich, impi or slurm; srun: DeepSpeed's launcher on each node of
                            a Slurm job, for launchers/slurm.sbatch of a checkout
  LAUNCHER_ARGS="..."       options for pdsh, mpirun or srun themselves
  DEEPSPEED_ARGS="..."      more options of the deepspeed launcher (--include, --exclude, --num_nodes ...)
Variables for the other hosts (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME ...) go into .deepspeed_env, one on each line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = VARIABLES
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=home_path, metavar="FILE", help='hosts, one on each line: "HOST slots=N"')
    where.add_argument("--ranks", metavar="N", help="ranks on this machine (default: one per GPU; 2 on a CPU)")
    parser.add_argument("recipe", help="path of a recipe, or the name of a packaged one")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dotted settings that replace the recipe's"
    )
    parser.add_argument("--deepspeed_config", metavar="JSON", help="DeepSpeed JSON, by path or packaged name")


def main(args: argparse.Namespace) -> int:
    from dwt_ds.config.recipe import load_recipe
    from dwt_ds.launch.local import on_this_machine
    from dwt_ds.launch.logins import check_logins
    from dwt_ds.launch.multinode import on_hosts, require_program
    from dwt_ds.launch.supervise import watch
    from dwt_ds.run.folder import RunFolder

    folder = RunFolder(load_recipe(args.recipe, args.overrides).config.output_dir)
    environment = os.environ if args.ranks is None else {**os.environ, "RANKS": args.ranks}
    launch = on_hosts(args.hostfile, environment) if args.hostfile else on_this_machine(environment)
    require_program(launch.launcher)
    check_logins(launch)
    arguments = [args.recipe, *args.overrides]
    json = args.deepspeed_config or environment.get("DEEPSPEED_CONFIG")
    arguments += ["--deepspeed_config", json] if json else []
    outlive_lost_output()
    return watch(launch, arguments, folder)
