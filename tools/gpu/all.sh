#!/usr/bin/env bash
# Does all that is wanted of a GPU, the most valuable first, within a time in seconds:
#
#     DATA=/dev/shm/cifar100 PHOTOGRAPHS=/dev/shm/imagenet bash tools/gpu/all.sh 540 OUT
#
# A step writes OUT/NAME.json and OUT/NAME.log, and OUT/NAME.done where it ends well. One that fails,
# or is not through in time, is named at the end, and the others go on. The exit status is 1 if one
# failed, and 0 if some were only not through. A call with the OUT of an earlier one goes on: tables
# go on with their runs, which are in OUT/runs_*.tar.gz; other steps that ended well are left out,
# and the rest begins again.
#
# DATA is CIFAR-100, as torchvision downloads it or as folders train/ and test/. PHOTOGRAPHS is a
# folder with train/, of ImageNet or a part of it; an epoch has each REPEAT times (1). Both should
# lie in memory. RUNS is the folder of the runs (OUT/runs), JOBS how many train at once (half the
# cores), SHARE how many percent of the time they have at first (60), PYTHON the interpreter
# (that of .venv, or python3). DRY_RUN=1 prints the commands. DEVICE=cpu rehearses them on a CPU,
# with few drawn images.
set -uo pipefail
total=${1:?the seconds that all may take} out=${2:-out}
[[ $total =~ ^[1-9][0-9]*$ ]] || {
  echo "the time must be a number of seconds above 0 in digits, as in 540, got $total" >&2
  exit 2
}
# Relative paths are relative to where it is called.
out=$(realpath -m -- "$out")
for path in DATA PHOTOGRAPHS RUNS; do
  [[ ${!path:-} ]] && printf -v "$path" %s "$(realpath -m -- "${!path}")"
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ -x .venv/bin/python ]] && : "${PYTHON:=.venv/bin/python}"
: "${PYTHON:=python3}" "${DEVICE:=0}" "${RUNS:=$out/runs}" "${DRY_RUN:=}" "${REPEAT:=1}" "${SHARE:=60}"
: "${JOBS:=$((($(nproc) + 1) / 2))}"
end=$((total - 15)) # the last step needs a moment to stop
steps=()
declare -A ended # how a step ended when it was last tried
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
# Many runs at once must not each compile with all cores.
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-2}

# step NAME SECONDS COMMAND…: runs a command for so long at most; it writes the file {json}.
# {seconds} stands for the time after which a command should end by itself.
step() {
  local name=$1 limit=$2 status since=$SECONDS least=11
  shift 2
  ((limit = limit < end - SECONDS ? limit : end - SECONDS))
  local command=("${@//\{json\}/$out/$name.json}")
  command=("${command[@]//\{seconds\}/$((limit - 10))}")
  if [[ $DRY_RUN ]]; then
    echo "${command[*]@Q}"
    return
  fi
  [[ ${ended[$name]:-} ]] || steps+=("$name")
  ended[$name]=well
  if [[ -e $out/$name.done && $* != *--budget* ]]; then
    echo "have  $name"
    return
  fi
  [[ $* == *--budget* ]] && least=25 # a table takes 20 s to begin and to end
  if ((limit < least)); then
    echo "left  $name: no time"
    ended[$name]=left
    return
  fi
  timeout --kill-after=10 $limit "${command[@]}" >> "$out/$name.log" 2>&1
  status=$?
  case $status in
    0)
      echo "done  $name, $((SECONDS - since)) s"
      touch "$out/$name.done"
      ;;
    3 | 124 | 137)
      echo "left  $name: not through after $((SECONDS - since)) s"
      ended[$name]=left
      ;;
    *)
      echo "FAIL  $name: status $status, $((SECONDS - since)) s; $out/$name.log ends with"
      tail -n 5 "$out/$name.log" | sed 's/^/      | /'
      ended[$name]=failed
      ;;
  esac
}

# table NAME SECONDS [OPTIONS…]: trains a table's runs side by side.
table() {
  local mps= name=$1 limit=$2
  shift 2
  if [[ ! $DRY_RUN && $DEVICE != cpu ]] && command -v nvidia-cuda-mps-control > /dev/null; then
    nvidia-cuda-mps-control -d && mps=1
  fi
  step "table_$name" "$limit" "$PYTHON" tools/reproduce.py --table "$name" --data "$DATA" \
    --out "$RUNS" --jobs "$JOBS" --budget '{seconds}' --archive "$out/runs_$name.tar.gz" \
    --json '{json}' "$@" -- "${folders[@]}" "${training[@]}"
  [[ $mps ]] && echo quit | nvidia-cuda-mps-control
}

check() { # NAME SECONDS PATTERNS
  step "$1" "$2" "$PYTHON" tools/gpu_check.py --data "$PHOTOGRAPHS" --device "$DEVICE" \
    --jobs "$JOBS" --only "$3" --json '{json}'
}

benchmark() { # NAME SECONDS BENCHMARK OPTIONS…
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$PYTHON" tools/benchmark.py "$@" --device "$DEVICE" --json '{json}'
}

mkdir -p "$out" "$RUNS"
for archive in "$out"/runs_*.tar.gz; do
  [[ -e $archive ]] && tar -xf "$archive" -C "$RUNS" --skip-old-files
done
if [[ $DEVICE == cpu ]]; then
  # So small that a step takes seconds. What only a GPU can do is left out.
  : "${DATA:=$out/small}" "${PHOTOGRAPHS:=$out/small}"
  if [[ ! $DRY_RUN ]]; then
    "$PYTHON" tools/make_demo_data.py --out "$out/small" --classes 3 --train-max 100 \
      --imbalance 1 --val-per-class 4 --size-range 32 32
  fi
  tiny=(--models cifar_resnet20 --seeds 1 --epochs 1)
  lt=("${tiny[@]}" --sections rho100_bs --methods none,scae)
  table1=("${tiny[@]}" --methods none) table4=("${tiny[@]}" --methods none --sections lt)
  training=(--device cpu --amp none --batch_size 32 --threads 1)
  new_checks='erase/clip' all_checks='arrays/scae/fp32-NCHW'
  few=(--batch-size 4 --rounds 1)
  small=(--model cifar_resnet20 --images 64 --steps 2 "${few[@]}")
  pipeline=(--size 32 --threads 1,2 --hw-decoder-load 0.65 --batches 2 "${few[@]}")
  train=(--model cifar_resnet20 --size 32 --steps 2 "${few[@]}")
  passes=(--model cifar_resnet20 --sizes 32,16 --images 8 "${few[@]}")
else
  : "${DATA:?the folder of CIFAR-100}" "${PHOTOGRAPHS:?a folder of photographs}"
  lt=() table1=() table4=()
  training=(--threads 2 --compile reduce-overhead)
  new_checks='arrays/*,saliency-arrays/*,harvest/*,compile/*,unwaited/*,erase/*' all_checks='*'
  half=(--amp bf16 --channels-last)
  small=(--model cifar_resnet32 --images 10880 --batch-size 128 --threads 4 "${half[@]}" \
    --compile reduce-overhead)
  pipeline=(--threads 4,8,16 --hw-decoder-load 0.65,0.9 --batch-size 256 --dtype fp16 \
    --layout NHWC --batches 10 --rounds 8)
  train=(--model resnet50 --batch-size 256 --threads 8 "${half[@]}" --steps 20 --pass-size 160 \
    --rounds 3)
  passes=(--model resnet50 --sizes 160,224 --images 50000 --batch-size 256 --threads 8 \
    "${half[@]}" --rounds 1)
fi
folders=()
if [[ ! -d $DATA/cifar-100-python ]]; then
  folders=(--data.format folder --data.in_memory true)
  [[ -d $DATA/test ]] && folders+=(--data.val_dir test)
fi
photographs=(--data "$PHOTOGRAPHS" --repeat "$REPEAT")

table lt $((end * SHARE / 100)) "${lt[@]}"
check check_new 150 "$new_checks"
check check_all 240 "$all_checks"
if [[ $DEVICE == cpu ]]; then
  echo "skip  pytest: its tests need a GPU"
else
  step pytest 120 "$PYTHON" -m pytest -m gpu -p no:cacheprovider tests
fi
benchmark train_small 120 train --source memory "${small[@]}" --pass-every 10
benchmark pipeline 240 pipeline "${photographs[@]}" --methods none,scae --peers none \
  "${pipeline[@]}"
for load in 0.65 0.9; do
  benchmark "train_load_$load" 120 train "${photographs[@]}" "${train[@]}" --pass-every 10 \
    --hw-decoder-load "$load"
done
benchmark pass 240 saliency_pass "${photographs[@]}" "${passes[@]}"
table 1 $(((end - SECONDS) / 3)) "${table1[@]}"
table 4 $(((end - SECONDS) / 3)) "${table4[@]}"
table lt $((end - SECONDS)) "${lt[@]}" # what the others have left of the time

failed=() left=()
for name in "${steps[@]}"; do
  [[ ${ended[$name]} == failed ]] && failed+=("$name")
  [[ ${ended[$name]} == left ]] && left+=("$name")
done
echo "failed: ${failed[*]:-nothing}; not through: ${left[*]:-nothing}; $SECONDS of $total s"
[[ ${#failed[@]} == 0 ]]
