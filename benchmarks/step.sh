#!/usr/bin/env bash
# Full training steps of both 7B models on one GPU, in one command and under nine minutes: build the working tree against
# the torch that is there, then benchmarks/step.py. Usage: benchmarks/step.sh [OUT]
# Where no package index is in reach, wheels that the machine lacks (liger-kernel) are taken from the folder $WHEELS.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
wheels=("${WHEELS:-.whl}"/*.whl)
if [ -e "${wheels[0]}" ]; then
  # The image's own torch and triton are used as they are: no dependencies.
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "${wheels[@]}" && export PYTHONPATH=$site
fi
python3 setup.py build_ext --inplace -q 2>&1 | tail -n 5
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
python3 benchmarks/step.py --out "$out" --seconds $((${LIMIT:-480} - SECONDS)) 2>&1 | tee "$out/step.log"
