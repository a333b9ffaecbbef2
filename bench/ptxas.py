"""What ptxas makes of the CUDA kernels: registers, shared memory, spills, occupancy. Needs nvcc, no GPU.

    python bench/ptxas.py            writes bench/results/ptxas.md

Exit status 1 if a kernel spills.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
ARCHS = ("sm_80", "sm_90a")

# Shared memory of a multiprocessor in bytes (CUDA C++ Programming Guide, technical specifications per compute
# capability). Of both: 65,536 registers, 2,048 threads, 32 blocks; the system takes 1 KiB of shared memory a block,
# and a warp's registers come in units of 256.
SHARED = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024}

_SIZES = r"""
#include <cstdio>
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"
#include "cuda/block.cuh"
#include "cuda/cross_entropy.cuh"
#include "cuda/layer_norm.cuh"
#include "cuda/rotary.cuh"
using namespace phi1::cuda;
template <int kHeadDim> void attention() {
  std::printf("attention_forward %d %d %d\n", kHeadDim, kAttentionThreads, ForwardTile<kHeadDim>::kSharedBytes);
  std::printf("attention_row_stats %d %d 0\n", kHeadDim, kAttentionThreads);
  std::printf("attention_key_grad %d %d %d\n", kHeadDim, kAttentionThreads, KeyGradTile<kHeadDim>::kSharedBytes);
  std::printf("attention_query_grad %d %d %d\n", kHeadDim, kAttentionThreads, QueryGradTile<kHeadDim>::kSharedBytes);
}
int main() {
  attention<32>(), attention<64>(), attention<128>();
  std::printf("rotary 0 %d 0\n", 32 * kRotaryWarps);
  for (const char* name : {"layer_norm", "layer_norm_grad", "layer_norm_sum"}) std::printf("%s 0 %d 0\n", name, kNormThreads);
  for (const char* name : {"after_in", "after_in_grad", "residual", "residual_grad"}) std::printf("%s 0 %d 0\n", name, kBlockThreads);
  std::printf("block_sum 0 %d %d\n", kSumThreads, kSumSharedBytes);
  std::printf("cross_entropy 0 %d %d\ncross_entropy_grad 0 %d 0\n", kLossThreads, kLossSharedBytes, kBlockThreads);
  std::printf("layer_norm_partial 0 %d %d\n", kNormThreads, kNormSharedBytes);
}
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One instantiation for one architecture."""

    name: str
    dtype: str
    head_dim: int
    """0: not a template argument."""
    arch: str
    registers: int
    spilled: int
    """Bytes of spill stores and loads, a thread."""
    threads: int
    shared: int
    """Dynamic shared memory in bytes, a block."""

    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        warps = self.threads // 32
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256) // warps
        return min(by_registers, SHARED[self.arch] // (self.shared + 1024), 2048 // self.threads, 32)

    def occupancy(self) -> float:
        """Resident threads over the most there can be."""
        return self.blocks() * self.threads / 2048


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _launch_sizes(folder: Path) -> dict[tuple[str, int], tuple[int, int]]:
    """(kernel, head_dim) -> (threads, bytes of shared memory), as the launchers take them from the kernels' headers."""
    source, program = folder / "sizes.cpp", folder / "sizes"
    source.write_text(_SIZES)
    compiler = os.environ.get("CXX", "c++")
    compiled = f"{program}.o"
    _run([compiler, "-std=c++20", "-O1", "-w", "-DPHI1_EMULATOR", f"-I{CSRC}", "-c", str(source), "-o", compiled])
    _run([compiler, compiled, "-o", str(program)])
    rows = [line.split() for line in _run([str(program)]).splitlines()]
    return {(name, int(head_dim)): (int(threads), int(shared)) for name, head_dim, threads, shared in rows}


def _compile(source: Path, arch: str, folder: Path) -> list[tuple[str, str, int, int, int]]:
    """(kernel, dtype, head_dim, registers, spilled bytes) of each kernel in a .cu file."""
    code = f"arch=compute_{arch[3:]},code={arch}"
    target = str(folder / f"{source.stem}.{arch}.o")
    flags = ["-std=c++20", "-O3", f"-I{CSRC}", "-gencode", code, "-Xptxas", "-v"]
    output = _run(["nvcc", *flags, "-c", str(source), "-o", target])
    found = []
    for part in output.split("Compiling entry function ")[1:]:
        mangled = part[1 : part.index("'", 1)]
        name = re.search(r"(\w+)_kernel<([^>]*)>", _run(["c++filt", mangled]))
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert name and registers and spills, part
        dtype, *dims = (x.strip().removeprefix("phi1::cuda::") for x in name[2].split(","))
        # A number is head_dim, a bool says whether the kernel draws dropout.
        head_dim = int(re.sub(r"\D", "", dims[0])) if dims and dims[0] not in ("true", "false") else 0
        kernel = f"{name[1]}_dropout" if dims == ["true"] else name[1]
        found.append((kernel, dtype, head_dim, int(registers[1]), int(spills[1]) + int(spills[2])))
    return found


def compile_kernels(archs: tuple[str, ...] = ARCHS, jobs: int = 2) -> list[Kernel]:
    """Compiles every csrc/cuda/*.cu for each of `archs`."""
    work = [(source, arch) for source in sorted((CSRC / "cuda").glob("*.cu")) for arch in archs]
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        sizes = _launch_sizes(folder)
        results = pool.map(lambda item: _compile(item[0], item[1], folder), work)
        return [
            Kernel(kernel, dtype, head_dim, arch, registers, spilled, *sizes[kernel.removesuffix("_dropout"), head_dim])
            for (_, arch), found in zip(work, results, strict=True)
            for kernel, dtype, head_dim, registers, spilled in found
        ]


def table(kernels: list[Kernel], version: str) -> str:
    """The kernels as Markdown."""
    lines = [
        "# What ptxas makes of the CUDA kernels",
        "",
        f"Written by `python bench/ptxas.py`; nvcc {version}. Occupancy is computed from registers, shared memory and",
        "threads, not measured: blocks a multiprocessor, and resident threads over the 2,048 there can be.",
        "",
        "| kernel | dtype | head_dim | arch | registers | spilled bytes | threads | shared bytes | blocks | occupancy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for k in sorted(kernels, key=lambda k: (k.name, k.head_dim, k.dtype, k.arch)):
        lines.append(
            f"| {k.name} | {k.dtype} | {k.head_dim or ''} | {k.arch} | {k.registers} | {k.spilled} | {k.threads} "
            f"| {k.shared} | {k.blocks()} | {k.occupancy():.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "ptxas.md")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("no nvcc on PATH: install the CUDA toolkit, or add its bin folder to PATH", file=sys.stderr)
        return 2
    kernels = compile_kernels()
    version = re.search(r"release [^,]*, V(\S+)", _run(["nvcc", "--version"]))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(table(kernels, version[1] if version else "of unknown version"))
    spilling = [k for k in kernels if k.spilled]
    for k in spilling:
        print(f"{k.name} {k.dtype} {k.head_dim} on {k.arch} spills {k.spilled} bytes", file=sys.stderr)
    print(f"{arguments.output}: {len(kernels)} kernels, {len(spilling)} spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
