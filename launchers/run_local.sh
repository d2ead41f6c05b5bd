#!/usr/bin/env bash
# One machine: all its GPUs, or two processes where there is none.
#
#   launchers/run_local.sh RECIPE [key=value ...]
#
# RANKS, CUDA_VISIBLE_DEVICES, MASTER_PORT, DEEPSPEED_CONFIG and exit codes: dwt-ds launch --help
exec dwt-ds launch "$@"
