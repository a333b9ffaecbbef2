"""Runs another script of this folder with the CUDA kernels under the emulator: backend "cuda" takes CPU tensors.

    python bench/rehearse.py bench/attn.py --device cpu --shapes 1x64x1x64

For bench/on_gpu.py --rehearse: what first runs on the day a GPU is there fails on that day. Nothing here is a figure.
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "kernels"))

import emulator  # type: ignore[import-not-found]  # noqa: E402

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with emulator.as_cuda_backend(emulator.load(emulator.build())):
        runpy.run_path(sys.argv[0], run_name="__main__")
