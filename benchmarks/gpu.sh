#!/usr/bin/env bash
# All that awaits a GPU, in one command: builds the kernels, tests them, checks them with compute-sanitizer, measures.
# `bash benchmarks/gpu.sh [FOLDER]` leaves its results in FOLDER (benchmarks/results). PYTHON names the interpreter, which
# needs a build of torch for CUDA and `pip install -e '.[test]'`; nvcc comes from $CUDA_HOME, PATH or /usr/local/cuda.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PATH=${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin
failed=0
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no GPU here"; exit 1; }

step() {  # name, command...: its output goes to the terminal and to a file
  echo "== $1"
  "${@:2}" 2>&1 | tee "$out/gpu-$1.txt" || { echo "FAILED: $1"; failed=1; }
}
sanitizer() {  # tool, options...: on the tests made for it, whose kernels the step before has built
  step "$1" compute-sanitizer --error-exitcode 1 --tool "$@" "$python" -m pytest -q \
    tests/test_wkv6_gpu.py tests/test_wkv7_cuda_gpu.py tests/test_bone_cuda.py -k "sanitizer or on_a_gpu"
}

step doctor "$python" -m rwkv_bone.doctor
step tests "$python" -m pytest -q tests/test_wkv6_gpu.py tests/test_wkv7_cuda_gpu.py tests/test_bone_cuda.py
if command -v compute-sanitizer > /dev/null; then
  # every tensor an allocation of its own, or what is written beyond it lies in another of torch's; torch's own calls may fail
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitizer memcheck --report-api-errors no
  sanitizer racecheck
  sanitizer synccheck
else
  echo "compute-sanitizer is not here: memcheck, racecheck and synccheck did not run"
fi
step wkv6 "$python" benchmarks/wkv6.py --device cuda --output "$out"
step bone "$python" benchmarks/bone.py --device cuda --dtype bf16
step train_step "$python" benchmarks/train_step.py --device cuda --n_layer 24 --n_embd 2048 --vocab_size 65536 \
  --micro_bsz 8 --ctx_len 4096 --grad_cp
step train_step_x070 "$python" benchmarks/train_step.py --version x070 --device cuda --n_layer 24 --n_embd 2048 \
  --vocab_size 65536 --micro_bsz 8 --ctx_len 4096 --grad_cp
exit $failed
