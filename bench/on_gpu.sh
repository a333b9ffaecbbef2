#!/bin/bash
# Everything that needs a GPU, in one call of at most ten minutes, on a machine with a CUDA toolkit and without a package
# index: build, tests, compute-sanitizer, benchmarks. Needs torch, triton, pybind11, cmake, ninja and pytest.
#
#   bench/on_gpu.sh [folder]      default: $OUT, else bench/results/gpu
#
# The folder gets summary.txt (a line a step: seconds, exit status), a log for each step, the benchmarks' tables and
# measured.json, the rows of kernels/measured.json for this GPU.
# A step that fails or runs out of time does not stop the next; the exit status is 1 if any did.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-${OUT:-bench/results/gpu}}")
mkdir -p "$out"
python=${PYTHON:-python3}
started=$SECONDS
failed=0

# step NAME LIMIT_SECONDS COMMAND...
step() {
    local name=$1 limit=$2 begin=$SECONDS left=$((595 - SECONDS + started)) status
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -le 0 ]; then
        echo "$name: not run, the ten minutes are over" | tee -a "$out/summary.txt"
        failed=1
        return 1
    fi
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$name: $((SECONDS - begin)) s, exit status $status" | tee -a "$out/summary.txt"
    [ $status -eq 0 ] || { failed=1; tail -n 20 "$out/$name.log"; return 1; }
}

: >"$out/summary.txt"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader) || { echo "no GPU: nvidia-smi failed" >&2; exit 2; }
capability=${capability%%$'\n'*} # of the first GPU
command -v nvcc >/dev/null || export PATH=/usr/local/cuda/bin:$PATH
command -v nvcc >/dev/null || { echo "no nvcc: install the CUDA toolkit, or add its bin folder to PATH" >&2; exit 2; }
{ nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader; nvcc --version | tail -n 2; "$python" -c 'import torch; print("torch", torch.__version__)'; } | tee "$out/machine.txt"

# Machine code for this GPU only: half the build.
case $capability in
    9.0) arch=90a ;;
    *) arch=${capability/./} ;;
esac
build=build/on-gpu
step configure 60 cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Release -DPHI1_CUDA=on "-DPHI1_CUDA_ARCHS=$arch" \
    "-DPython_EXECUTABLE=$(command -v "$python")" "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" || exit 1
step build 150 cmake --build $build --target _native || exit 1
cp $build/_native*.so kernels/ || exit 1

export PYTHONPATH=$PWD
step backends 60 "$python" -c 'import kernels; print(kernels.backends())'
# The GPU's share of the tests, without the plugins that a bare machine lacks.
pytest=("$python" -m pytest -q -o addopts=--import-mode=importlib -o timeout=0 -W ignore::pytest.PytestConfigWarning)
cuda_tests=(tests/kernels/test_cuda_{attention,rotary,layer_norm,block,loss}.py)
step tests 150 "${pytest[@]}" "${cuda_tests[@]}" -k gpu
# Compiled here: each call of a new kind tries its candidate tiles first.
step tests-triton 150 "${pytest[@]}" tests/kernels/test_triton_{norm,loss,descriptors,block,attention}.py
small="gpu and (dropout_gqa_32 or documents_unequal or packed_128 or 203x113_32 or rotary_is or layer_norm_keeps)"
small="$small or gpu and (after_the_product or loss_keeps)"
if command -v compute-sanitizer >/dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # so that memcheck sees each tensor's end
    for tool in memcheck racecheck; do
        step "sanitizer-$tool" 90 compute-sanitizer --tool $tool --error-exitcode 9 --kernel-name regex:phi1 \
            "${pytest[@]}" "${cuda_tests[@]}" -k "$small"
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
    echo "sanitizer: not run, no compute-sanitizer on PATH" | tee -a "$out/summary.txt"
fi

export TRITON_PRINT_AUTOTUNING=1 # the logs say which candidate Triton's kernels run with
step bench-attn 150 "$python" bench/attn.py --quick --device cuda --json "$out/attn.json"
for name in block loss train rotary; do
    step "bench-$name" 60 "$python" "bench/$name.py" --quick --device cuda --json "$out/$name.json"
done
results=() # of those that ran
for name in attn block loss rotary; do
    [ -f "$out/$name.json" ] && results+=("$out/$name.json")
done
step choose 60 "$python" bench/choose.py "${results[@]}" --out "$out/measured.json"
echo "all: $((SECONDS - started)) s, in $out"
exit $failed
