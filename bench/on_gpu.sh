#!/bin/bash
# Everything that needs a GPU in one call: bench/on_gpu.py, which says what and how.
set -u
cd "$(dirname "$0")/.."
command -v nvcc >/dev/null || export PATH=/usr/local/cuda/bin:$PATH
exec "${PYTHON:-python3}" bench/on_gpu.py "$@"
