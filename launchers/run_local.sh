#!/usr/bin/env bash
# One machine: all its GPUs, or two processes where there is none.
#
#   launchers/run_local.sh RECIPE [key=value ...]
#
# RANKS=4                  another number of processes
# CUDA_VISIBLE_DEVICES=2,3 these GPUs, or the first RANKS of them
# MASTER_PORT=29500        the port at which the processes meet (default: a free one)
# DEEPSPEED_CONFIG=FILE    your own DeepSpeed JSON (a path, or a name from ds_configs/)
set -euo pipefail
[[ $# -ge 1 ]] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }

# GPUs that are cut into MIG instances list these below them.
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || gpus=0
where=(--num_gpus "${RANKS:-$(( gpus > 0 ? gpus : 2 ))}")
devices=${CUDA_VISIBLE_DEVICES:-}
if [[ -n $devices && ${DS_ACCELERATOR:-} != cpu ]]; then
  # With --num_gpus DeepSpeed would forget them, and take the machine's first GPUs from whoever has those.
  if [[ ! $devices =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    echo "error: CUDA_VISIBLE_DEVICES=$devices: DeepSpeed wants numbers; write 2,3 or, for CPUs, DS_ACCELERATOR=cpu" >&2
    exit 2
  fi
  IFS=, read -r -a numbers <<<"$devices"
  if ((${RANKS:-1} > ${#numbers[@]})); then
    echo "error: RANKS=$RANKS: CUDA_VISIBLE_DEVICES=$devices are fewer GPUs; name more, or lower RANKS" >&2
    exit 2
  fi
  where=()
  if [[ -n ${RANKS:-} ]]; then
    where=(--include "localhost:$(IFS=,; echo "${numbers[*]:0:RANKS}")")
    # Or else DeepSpeed says that it ignores what the option now has.
    unset CUDA_VISIBLE_DEVICES
  fi
fi

arguments=("$@")
[[ -z ${DEEPSPEED_CONFIG:-} ]] || arguments+=(--deepspeed_config "$DEEPSPEED_CONFIG")

port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

# The supervisor passes SIGTERM and Ctrl-C on to the ranks, which save and end. Exit code: 0 the run is complete, 75 it
# was stopped and the same command goes on from its last checkpoint, else an error.
exec python -m dwt_ds.launch.supervise "${arguments[@]}" -- \
  deepspeed --log_level warning ${where[@]+"${where[@]}"} --master_port "$port" --module dwt_ds.pretrain "${arguments[@]}"
