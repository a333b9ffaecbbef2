#!/usr/bin/env bash
# The tables that automatic choice follows, and training steps, on a machine without a GPU, into bench/results/:
# attention, the layer, the loss, a training step, rotary, LayerNorm, products of a few rows. Then
# kernels/measured.json, from all of bench/results/.
# Wants the machine to itself for about half an hour; each table says what load it met.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

"$python" bench/attn.py --dtypes bf16,fp32 --save \
    --shapes 1x2048x8x64,4x1024x16x64,1x2048x8x32,1x2048x8x128,1x2048x8x64x2,1x2048x8x64x1,1x257x8x64
"$python" bench/block.py --save
"$python" bench/loss.py --save
"$python" bench/train.py --save
"$python" bench/rotary.py --save
"$python" bench/norm.py --save
"$python" bench/linear.py --save
"$python" bench/choose.py bench/results/*.json # what automatic choice follows
