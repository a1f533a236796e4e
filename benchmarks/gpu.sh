#!/usr/bin/env bash
# Tests and times the kernels on a GPU in under ten minutes, with the installed torch and triton and this working tree.
#
#     benchmarks/gpu.sh [OUT [PHASE...]]        phases: info tests ours peers; LIMIT=540 seconds in all
#
# Phases run in order of importance. Each has a limit of its own, and what fails or takes too long stops only itself.
# Every workload writes its JSON into OUT when it is done, so whatever ends the script loses one row at most.
# The tests of training need omegaconf; with DeepSpeed, ZeRO-2 is tested too. What the machine lacks is taken from the
# folder $WHEELS: `benchmarks/wheels.sh`.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu}
shift $(($# > 0))
phases=${*:-info tests ours peers}
limit=${LIMIT:-540}
workloads=${WORKLOADS:-w1 w3 w2 w4 w5}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
source benchmarks/wheels.sh

# phase NAME SECONDS COMMAND...: prints as it goes, keeps a log, never ends the script.
phase() {
  local name=$1 seconds=$2 begin=$SECONDS left=$((limit - SECONDS))
  shift 2
  if [ "$left" -lt 15 ]; then
    echo "== $name: skipped, no time left"
    return
  fi
  [ "$seconds" -gt "$left" ] && seconds=$left
  timeout -k 5 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 124 ] && status="124, over its limit of $seconds s"
  echo "== $name: status $status, $((SECONDS - begin)) s"
}

bench() { phase "$1" "$2" python3 -c 'from gasp_fast.cli import main; main()' bench --out "$out/$1" "${@:3}"; }

# All files with gpu tests. Others cannot be collected on a machine without the packages of `.[dev]`.
test_files="tests/loss/test_gpu.py tests/supervision/test_heads.py tests/supervision/test_coordinates.py"
if python3 -c 'import omegaconf' 2>/dev/null; then
  test_files="$test_files tests/backbones/test_vision_layers.py tests/g2vlm/test_model.py tests/gpu"
else
  echo "== tests: without omegaconf only those of loss and heads"
fi
parallel=$(python3 -c 'import xdist' 2>/dev/null && echo "-n 8")

# The extensions serve the CPU, and draw the rooms of the tests; only these wait for them.
build() { timeout -k 5 180 python3 setup.py build_ext --inplace -q >"$out/build.log" 2>&1; }
build &
build_job=$!

for what in $phases; do
  case $what in
    info)
      phase info 30 nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm --format=csv,noheader
      phase versions 60 python3 -c 'import torch, triton; print(torch.__version__, triton.__version__)'
      ;;
    tests)
      wait "$build_job"
      phase tests 240 python3 -m pytest -q -m gpu -p no:cacheprovider $parallel $test_files
      ;;
    ours) for load in $workloads; do bench "ours-$load" 45 --workload "$load" --only ours --rounds 10; done ;;
    peers) for load in $workloads; do bench "peers-$load" 100 --workload "$load" --rounds 5; done ;;
    *) echo "== unknown phase $what" ;;
  esac
done
wait "$build_job"
echo "== build_ext: status $?"
