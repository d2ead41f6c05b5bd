#!/usr/bin/env bash
# Several machines, as listed in a DeepSpeed hostfile (see hostfile.example), over ssh unless LAUNCHER says otherwise.
#
#   launchers/run_multinode.sh HOSTFILE RECIPE [key=value ...]
#
# MASTER_ADDR=ADDRESS      address of rank 0's machine that the others reach (default: the first host in use)
# MASTER_PORT=PORT         a free port there (default: 29500)
# DEEPSPEED_CONFIG=FILE    your own DeepSpeed JSON
# LAUNCHER=NAME            pdsh (default), openmpi, mpich, impi or slurm
# LAUNCHER_ARGS="..."      options for pdsh, mpirun or srun themselves
# DEEPSPEED_ARGS="..."     further options of the deepspeed launcher (--include, --exclude, --num_nodes ...)
# Variables for the other machines (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME ...) go into .deepspeed_env, one a line:
# see deepspeed_env.example. docs/multinode.md has all of this in order.
set -euo pipefail
[[ $# -ge 2 ]] || { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
hostfile=$1
shift

# Over all lines: an sbatch script may break them.
read -r -d '' -a options <<<"${DEEPSPEED_ARGS:-}" || true
# DeepSpeed would go on with this machine alone where there is no such file, and end in a traceback at a bad line. Rank 0
# is on the first host that its filters leave. dwt_ds/launch/doctor_launch.py follows this script: change both.
hosts=$(python -m dwt_ds.launch.hostfile "$hostfile" ${options[@]+"${options[@]}"}) || exit 2
master=${MASTER_ADDR:-$(head -n 1 <<<"$hosts")}

arguments=("$@")
[[ -z ${DEEPSPEED_CONFIG:-} ]] || arguments+=(--deepspeed_config "$DEEPSPEED_CONFIG")
settings=("${arguments[@]}")
[[ -z ${LAUNCHER:-} ]] || options+=(--launcher "$LAUNCHER")
[[ -z ${MASTER_PORT:-} ]] || options+=(--master_port "$MASTER_PORT")
launcher_args=${LAUNCHER_ARGS:-}
program=(--module dwt_ds.pretrain)

launcher=pdsh
# The last one counts.
[[ ! " ${options[*]} " =~ .*\ --launcher[\ =]([^\ ]+) ]] || launcher=${BASH_REMATCH[1],,}
[[ ! " ${options[*]} " =~ \ --no_ssh\  ]] || launcher=none
if [[ $hosts == localhost ]]; then
  launcher=none
  # DeepSpeed logs in to every first host, this machine too.
  options+=(--no_ssh_check)
else
  # One host alone, DeepSpeed would take for this machine, whatever its name.
  options+=(--force_multi)
fi

case $launcher in
  none) ;;
  pdsh)
    # pdsh hands all words to a shell on each machine: quote what that shell would act on. Words with spaces DeepSpeed
    # puts into double quotes itself.
    for i in "${!arguments[@]}"; do
      if [[ ${arguments[i]} == *" "* ]]; then
        # shellcheck disable=SC2001
        arguments[i]=$(sed 's/[\\$`]/\\&/g' <<<"${arguments[i]}")
      else
        arguments[i]=$(printf '%q' "${arguments[i]}")
      fi
    done
    # Notices within about a minute that a machine is gone; ssh alone would wait for it for hours.
    export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=15 -o ServerAliveCountMax=4 ${PDSH_SSH_ARGS_APPEND:-}"
    ;;
  *)
    # DeepSpeed's commands for MPICH and Slurm are wrong with --module, and none of these tells the ranks where to meet.
    # They need no ssh either, but for what mpirun does itself.
    options+=(--no_ssh_check)
    program=("$(cd "$(dirname "$0")" && pwd)/pretrain.py")
    export MASTER_ADDR=$master MASTER_PORT=${MASTER_PORT:-29500}
    [[ $launcher != openmpi ]] || launcher_args="-x MASTER_ADDR -x MASTER_PORT $launcher_args"
    ;;
esac
[[ -z $launcher_args ]] || options+=("--launcher_args=$launcher_args")

# Passes SIGTERM and Ctrl-C on to the ranks of all hosts; exit codes as in run_local.sh.
exec python -m dwt_ds.launch.supervise "${settings[@]}" -- \
  deepspeed --log_level warning --hostfile "$hostfile" --master_addr "$master" ${options[@]+"${options[@]}"} \
  "${program[@]}" "${arguments[@]}"
