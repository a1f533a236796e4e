#!/usr/bin/env bash
# Full training steps of both 7B models on one GPU, in one command and under nine minutes: build the working tree against
# the torch that is there, then benchmarks/step.py. Usage: benchmarks/step.sh [OUT]
# Wheels that the machine lacks (liger-kernel) are taken from the folder $WHEELS: `benchmarks/wheels.sh`.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
source benchmarks/wheels.sh
python3 setup.py build_ext --inplace -q 2>&1 | tail -n 5
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
python3 benchmarks/step.py --out "$out" --seconds $((${LIMIT:-480} - SECONDS)) 2>&1 | tee "$out/step.log"
