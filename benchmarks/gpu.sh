#!/usr/bin/env bash
# Tests and times the kernels on a GPU, in one command and under ten minutes: builds the working tree against the
# installed torch, runs the gpu tests, then the benchmarks. Usage: benchmarks/gpu.sh [OUT]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
# Uses the installed torch and triton as they are: no isolated build, no other dependencies.
python3 setup.py build_ext --inplace -q 2>&1 | tail -n 5
export PYTHONPATH=$PWD
python3 -m pytest -q -m gpu tests -p no:cacheprovider --timeout 240 2>&1 | tee "$out/gpu-tests.log" | tail -n 40
status=${PIPESTATUS[0]}
[ "$status" -eq 0 ] || { echo "gpu tests failed, so nothing is timed"; exit "$status"; }
python3 -c 'from gasp_fast.cli import main; main()' bench --rounds "${ROUNDS:-20}" --out "$out"
