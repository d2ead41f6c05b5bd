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
[[ $# -ge 2 ]] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
hostfile=$1
shift

# DeepSpeed would go on with this machine alone where there is no such file, and end in a traceback at a bad line.
hosts=$(python -m dwt_ds.doctor.hostfile "$hostfile") || exit 2

arguments=("$@")
[[ -z ${DEEPSPEED_CONFIG:-} ]] || arguments+=(--deepspeed_config "$DEEPSPEED_CONFIG")
settings=("${arguments[@]}")
read -r -a options <<<"${DEEPSPEED_ARGS:-}"

if [[ $hosts != localhost ]]; then
  # One host alone, DeepSpeed would take for this machine, whatever its name.
  options+=(--force_multi)
  if [[ ! " ${options[*]} " =~ \ (--launcher|--no_ssh)[\ =] ]]; then
    # pdsh hands all words to a shell on each machine: quote what that shell would act on. Words with spaces DeepSpeed
    # puts into double quotes itself.
    for i in "${!arguments[@]}"; do
      if [[ ${arguments[i]} == *" "* ]]; then
        arguments[i]=$(sed 's/[\\$`]/\\&/g' <<<"${arguments[i]}")
      else
        arguments[i]=$(printf '%q' "${arguments[i]}")
      fi
    done
  fi
fi

# Passes SIGTERM and Ctrl-C on to the ranks of all hosts; exit codes as in run_local.sh.
exec python -m dwt_ds.supervise "${settings[@]}" -- deepspeed --log_level warning --hostfile "$hostfile" --master_addr "${MASTER_ADDR:-$(head -n 1 <<<"$hosts")}" \
  ${options[@]+"${options[@]}"} --module dwt_ds.pretrain "${arguments[@]}"
