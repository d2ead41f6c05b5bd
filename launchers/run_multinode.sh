#!/usr/bin/env bash
# Several machines, as listed in a DeepSpeed hostfile (see hostfile.example), over ssh unless LAUNCHER says otherwise.
#
#   launchers/run_multinode.sh HOSTFILE RECIPE [key=value ...]
#
# MASTER_ADDR, MASTER_PORT, DEEPSPEED_CONFIG, LAUNCHER, LAUNCHER_ARGS, DEEPSPEED_ARGS, .deepspeed_env and exit codes:
# dwt-ds launch --help and docs/multinode.md
exec dwt-ds launch --hostfile "$@"
