#!/usr/bin/env bash
# Several machines over ssh (pdsh), as listed in a DeepSpeed hostfile (see hostfile.example).
#
#   launchers/run_multinode.sh HOSTFILE RECIPE [key=value ...]
#
# MASTER_ADDR=ADDRESS      address of the first machine that the others reach (default: the hostfile's first)
# DEEPSPEED_CONFIG=FILE    your own DeepSpeed JSON
# DEEPSPEED_ARGS="..."     further options of the deepspeed launcher (--include, --exclude, --launcher ...)
# Variables for the other machines (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME ...) go into .deepspeed_env, one a line.
set -euo pipefail
[[ $# -ge 2 ]] || { sed -n '2,10p' "$0" >&2; exit 2; }
hostfile=$1
shift

# DeepSpeed would go on with this machine alone.
[[ -f $hostfile ]] || { echo "error: hostfile $hostfile: no such file; see launchers/hostfile.example" >&2; exit 2; }
hosts=$(sed -E 's/#.*//' "$hostfile" | awk 'NF {print $1}')
[[ -n $hosts ]] || { echo "error: hostfile $hostfile: names no host; see launchers/hostfile.example" >&2; exit 2; }
bad=$(sed -E 's/[[:space:]]*#.*//' "$hostfile" | grep -nvE '^[[:space:]]*$|^[[:space:]]*[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$' | head -n 1) || true
[[ -z $bad ]] || { echo "error: hostfile $hostfile: line ${bad%%:*} is \"${bad#*:}\"; write it as: HOST slots=N" >&2; exit 2; }
twice=$(sort <<<"$hosts" | uniq -d | head -n 1)
[[ -z $twice ]] || { echo "error: hostfile $hostfile: names $twice twice; keep one line and add up its slots" >&2; exit 2; }

arguments=("$@")
[[ -z ${DEEPSPEED_CONFIG:-} ]] || arguments+=(--deepspeed_config "$DEEPSPEED_CONFIG")
read -r -a options <<<"${DEEPSPEED_ARGS:-}"

exec deepspeed --log_level warning --hostfile "$hostfile" --master_addr "${MASTER_ADDR:-$(head -n 1 <<<"$hosts")}" \
  ${options[@]+"${options[@]}"} --module dwt_ds.pretrain "${arguments[@]}"
