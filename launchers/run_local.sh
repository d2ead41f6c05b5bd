#!/usr/bin/env bash
# One machine: all its GPUs, or two processes where there is none.
#
#   launchers/run_local.sh RECIPE [key=value ...]
#
# RANKS=4                  another number of processes
# DEEPSPEED_CONFIG=FILE    your own DeepSpeed JSON (a path, or a name from ds_configs/)
set -euo pipefail
[[ $# -ge 1 ]] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }

gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=0
ranks=${RANKS:-$(( gpus > 0 ? gpus : 2 ))}

arguments=("$@")
[[ -z ${DEEPSPEED_CONFIG:-} ]] || arguments+=(--deepspeed_config "$DEEPSPEED_CONFIG")

# The supervisor passes SIGTERM and Ctrl-C on to the ranks, which save and end. Exit code: 0 the run is complete, 75 it
# was stopped and the same command goes on from its last checkpoint, else an error.
exec python -m dwt_ds.supervise "${arguments[@]}" -- \
  deepspeed --log_level warning --num_gpus "$ranks" --module dwt_ds.pretrain "${arguments[@]}"
