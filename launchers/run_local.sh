#!/usr/bin/env bash
# One machine: all its GPUs, or two processes where there is none.
#
#   launchers/run_local.sh RECIPE [key=value ...]
#
# RANKS=4                  another number of processes
# MASTER_PORT=29500        the port at which the processes meet (default: a free one)
# DEEPSPEED_CONFIG=FILE    your own DeepSpeed JSON (a path, or a name from ds_configs/)
set -euo pipefail
[[ $# -ge 1 ]] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=0
ranks=${RANKS:-$(( gpus > 0 ? gpus : 2 ))}

arguments=("$@")
[[ -z ${DEEPSPEED_CONFIG:-} ]] || arguments+=(--deepspeed_config "$DEEPSPEED_CONFIG")

port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

# The supervisor passes SIGTERM and Ctrl-C on to the ranks, which save and end. Exit code: 0 the run is complete, 75 it
# was stopped and the same command goes on from its last checkpoint, else an error.
exec python -m dwt_ds.supervise "${arguments[@]}" -- \
  deepspeed --log_level warning --num_gpus "$ranks" --master_port "$port" --module dwt_ds.pretrain "${arguments[@]}"
