#!/usr/bin/env bash
# Everything that only a GPU can tell: one command, one NVIDIA GPU, about 8 minutes, no network.
#
#   benchmarks/gpu_round.sh --out DIR [--wheels DIR] [--data DIR] [--only STAGE,...] [--dry-run] [--tiny]
#
# --out DIR     gets summary.md (a page) and gpu_round.tar.gz (CSVs and logs), both written again after each stage
# --wheels DIR  first installs the wheels there, then dwt_ds itself, into the Python that is on the path
# --data DIR    packed rows from `dwt-ds prepare`; without them a student beside its teacher is not measured, and speed is
#               measured on invented text
# --only NAMES  these stages alone, for less time; comma-separated. Rows that they read are made
# --dry-run     prints each stage's seconds and command
# --tiny        sizes for a CPU: shows that everything runs, and measures nothing
#
# Each stage has its own limit of seconds, the most important come first. The same command again passes over what is
# done, but for install and preflight, since it may be on another machine. WORK (default: DIR/work) is the folder for
# logs, rows and models, some gigabytes; results are in WORK/results.
# Exit code: 0 if every stage is done, 3 if the kernels are wrong (nothing else is measured then), else 1.
set -uo pipefail

out='' wheels='' data='' only='' dry='' tiny=''
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    --wheels) wheels=$(realpath "${2:?--wheels needs a folder}") || exit 2; shift 2 ;;
    --data) data=$(realpath "${2:?--data needs a folder}") || exit 2; shift 2 ;;
    --only) only=${2:?--only needs names of stages}; shift 2 ;;
    --dry-run) dry=yes; shift ;;
    --tiny) tiny=yes; shift ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) echo "error: $1: unknown; --help lists the options" >&2; exit 2 ;;
  esac
done
[ -n "$out" ] || { echo "error: --out DIR is missing" >&2; exit 2; }
out=$(realpath -m "$out")
work=$(realpath -m "${WORK:-$out/work}")
results=$work/results
cd "$(dirname "$(realpath "$0")")/.." || exit 2

export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export work results  # for the stages' commands
# One folder for compiled operators; the tests would choose another, and compile them again.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$work/extensions}
export rows=${data:-$work/data}

if [ -z "$tiny" ]; then
  stand_in=() model=()
  speed=(--micro-batches 128 16 256 64 --steps 200 --seconds 2) loop=(--loop-steps 60) default=layers/auto
  modes=(--micro-batches 128 16 --steps 200 --seconds 2 --modes off/off off/auto layers/off)
  logits=(8192x30522 4096x128256 8192x128256 512x30522) compiled=(8192x30522 4096x128256)
  linear=(8192x128256x2048x4096 8192x30522x768x768 2432x30522x768x768 304x30522x768x768)
  rounds=20 slower=1 tests=(-n 12 --dist loadgroup tests/engine/test_gpu.py kernels/tests) batch=128 run_steps=1000 every=250
else
  stand_in=(--rows 300 --seq-len 32 --vocabulary 500)
  model=(student.layers=1 student.hidden_size=32 student.num_heads=2 student.max_positions=128)
  speed=(--micro-batches 4 2 --steps 2) loop=(--loop-steps 2) default=off/auto
  modes=(--micro-batches 4 2 --steps 2 --modes off/off)
  logits=(8x500) compiled=(8x500) linear=(8x500x32x32)
  rounds=1 slower=5 tests=(-n 0 kernels/tests/test_published_values.py) batch=4 run_steps=4 every=2
fi
# One test at a time for each worker (loadgroup): the long ones come first, and one worker would get all of them.
# Of the kernels' tests, all that run on the device; the ones left out compile for other GPUs or draw shapes at random.
# DeepSpeed's injected kernels, which nvcc compiles for minutes, have a stage of their own.
tests+=(-m 'not slow' -k 'not test_any_shape and not test_injected_kernels' -v -p no:cacheprovider)
for name in assembly benchmarks in_interpreter mutations; do tests+=("--ignore=kernels/tests/test_$name.py"); done
run=("train.micro_batch_size=$batch" "train.max_steps=$run_steps" "train.eval_every=$every" "train.log_every=$((every / 2))")
run+=("train.eval_rows=$((8 * batch))" "train.checkpoint_every=0")
# Gentler than the recipes, which are made for 100 times as many steps: with 5e-4 after 50 steps, 6 layers stayed at the
# loss that token frequencies give. Layer norms after each sum need a longer warm-up the more layers there are (Xiong et
# al. 2020), and Adam's variance of so few steps is not known well (Liu et al. 2020).
run+=("train.learning_rate=0.0003" "train.warmup_ratio=0.25")

chosen() { # STAGE
  case ",$only," in ,, | *",$1,"*) return 0 ;; *) return 1 ;; esac
}

only=${only// /}
# These two read rows.
if [ -n "$only" ] && [ -z "$data" ] && { chosen training_speed || chosen training_modes; }; then only=data,$only; fi
for name in ${only//,/ }; do
  if ! grep -Eq "^ *(train_)?stage $name [0-9]" "benchmarks/$(basename "$0")"; then
    echo "error: --only $name: no such stage; --dry-run lists them" >&2
    exit 2
  fi
  case $name in
    install) given=$wheels option=--wheels ;;
    teacher | alone | distilled) given=$data option=--data ;;
    *) continue ;;
  esac
  [ -n "$given" ] || { echo "error: --only $name: needs $option" >&2; exit 2; }
done

say() { echo "$(date +%H:%M:%S)  $*"; }

keep() { # what there is so far, for whoever looks before the end
  for model_run in teacher alone distilled; do
    if [ -e "$work/$model_run/metrics.jsonl" ]; then cp "$work/$model_run/metrics.jsonl" "$results/$model_run.jsonl"; fi
  done
  local new=$out/.new.$BASHPID
  python3 benchmarks/round_summary.py "$results" > "$new" && mv "$new" "$out/summary.md"
  tar -C "$work" -czf "$new" results 2> /dev/null
  [ $? -le 1 ] || return 0 # 1: a log grew meanwhile
  mv "$new" "$out/gpu_round.tar.gz"
}

stage() { # NAME SECONDS COMMAND...
  local name=$1 limit=$((slower * $2)) code began
  shift 2
  chosen "$name" || return 0
  if [ -n "$dry" ]; then printf '%-16s %4d s  %s\n' "$name" "$limit" "$(printf '%q ' "$@")"; return 0; fi
  case $name in
    install | preflight) ;;
    *) if [ -e "$results/$name.done" ]; then say "$name: already done"; return 0; fi ;;
  esac
  say "$name: at most $limit s"
  began=$(date +%s)
  timeout --kill-after=5 "$limit" "$@" > "$results/$name.log" 2>&1
  code=$?
  if [ "$code" = 0 ]; then touch "$results/$name.done"; fi
  echo "$name,$limit,$(($(date +%s) - began)),$code" >> "$results/stages.csv"
  say "$name: exit code $code"
  keep
  return "$code"
}

train_stage() { # NAME SECONDS RECIPE key=value...
  local name=$1 limit=$2
  shift 2
  chosen "$name" || return 0
  if [ -z "$data$dry" ]; then say "$name: passed over, needs --data"; return 0; fi
  stage "$name" "$limit" python3 -m dwt_ds.pretrain "$@" "data.dir=$rows" "output_dir=$work/$name" "${run[@]}" "${model[@]}"
}

teacher_of_distilled() { # the teacher's last export, or the last one before it was cut short
  local teacher=$work/teacher choice=$work/teacher_of_distilled
  if [ -n "$dry" ] || [ -z "$data" ] || ! chosen distilled; then echo "$teacher/export"; return; fi
  # A repetition goes on with the same run, even if the teacher was finished in the meantime.
  if [ ! -s "$choice" ]; then
    (cd "$teacher" && if [ -e export/config.json ]; then echo export; else ls -d export/step_* | tail -n 1; fi) > "$choice"
  fi
  echo "$teacher/$(cat "$choice")"
}

if [ -z "$dry" ]; then
  mkdir -p "$out" "$results" || exit 2
  [ -e "$results/stages.csv" ] || echo stage,seconds_allowed,seconds,exit_code > "$results/stages.csv"
fi
failed=0

if [ -n "$wheels" ]; then
  pip="python3 -m pip install -q --no-index --no-deps --break-system-packages"
  stage install 15 bash -c "$pip --no-compile '$wheels'/*.whl && $pip --no-build-isolation ./kernels -e ." || failed=1
fi
if [ -z "$data" ]; then
  stage data 20 python3 benchmarks/stand_in_data.py "$rows" "${stand_in[@]}" || failed=1
fi
stage preflight 40 python3 benchmarks/preflight.py --out "$results" --adam-seconds 8
code=$?
if [ "$code" = 3 ]; then
  echo "The loss kernels are wrong on this device, see $results/preflight.log: nothing else is measured." >&2
  exit 3
fi
[ "$code" = 0 ] || failed=1
# Before the training: DeepSpeed's Adam is being built meanwhile. On the device's clock that does not show.
stage logits_form 25 python3 kernels/benchmarks/logits_form.py --out "$results" --rounds "$rounds" \
  --shapes "${logits[@]}" --providers dwt_kernels eager || failed=1
stage logits_compiled 20 python3 kernels/benchmarks/logits_form.py --out "$results/compiled" --rounds "$rounds" \
  --shapes "${compiled[@]}" --providers dwt_kernels torch.compile || failed=1
stage training_speed 85 python3 benchmarks/training_speed.py --data "$rows" --out "$results" "${loop[@]}" "${speed[@]}" \
  --modes "$default" -- "${model[@]}" || failed=1
stage training_modes 60 python3 benchmarks/training_speed.py --data "$rows" --out "$results" "${modes[@]}" \
  -- "${model[@]}" || failed=1
if [ -z "$dry$tiny" ] && chosen injection && [ ! -e "$results/injection.done" ]; then
  # For the stage of that name. In a session of its own, so that it is not cut short and leaves its lock behind.
  MAX_JOBS=4 DS_NVCC_THREADS=1 setsid python3 benchmarks/kernel_injection.py --build > "$results/build.log" 2>&1 &
fi
stage linear_form 50 python3 kernels/benchmarks/linear_form.py --out "$results" --rounds "$rounds" \
  --shapes "${linear[@]}" --providers "dwt_kernels chunked" "liger chunked" "dwt_kernels logit_free" eager || failed=1
train_stage teacher 100 paper_teacher_4 "train.export_every=$every" &
beside=$!
stage tests 100 python3 -m pytest "${tests[@]}" || failed=1
wait "$beside" || failed=1
train_stage alone 85 paper_weak_h100 teacher.path=null &
beside=$!
stage injection 85 python3 benchmarks/kernel_injection.py --families bert --out "$results" &
injection=$!
train_stage distilled 85 paper_weak_h100 "teacher.path=$(teacher_of_distilled)" || failed=1
wait "$beside" || failed=1
wait "$injection" || failed=1

[ -n "$dry" ] || say "results: $out/summary.md and $out/gpu_round.tar.gz"
exit "$failed"
