#!/usr/bin/env bash
# All that awaits a GPU, in one command: bash benchmarks/gpu.sh [FOLDER] [--minutes 9]. What it does is in benchmarks/gpu.py.
# PYTHON names the interpreter, which needs a build of torch for CUDA; nvcc comes from $CUDA_HOME, PATH or /usr/local/cuda.
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH=$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}
export PATH=${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin
exec "${PYTHON:-python3}" "$root/benchmarks/gpu.py" "$@"
