"""What ptxas makes of the CUDA kernels: registers, shared memory, spills, occupancy. Needs nvcc, no GPU.

    python bench/ptxas.py            writes bench/results/ptxas.md

Exit status 1 if a kernel spills, or if ptxas remarks that it ignores setmaxnreg (C7508), makes wgmma wait for each
other (C7510, C7512, C7514) or had to add a wait or a fence (C7517, C7519), or if a kernel of csrc/cuda/hopper has no
HGMMA, which is wgmma as assembled, or reads from registers what the assembler has let something else overwrite.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.util
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
REMARKS = ("C7508", "C7510", "C7512", "C7514", "C7517", "C7519")

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
#include "cuda/hopper/attention_backward.cuh"
#include "cuda/hopper/attention_forward.cuh"
#include "cuda/layer_norm.cuh"
#include "cuda/rotary.cuh"
using namespace phi1::cuda;
template <int kHeadDim> void attention() {
  std::printf("attention_forward %d %d %d\n", kHeadDim, kAttentionThreads, ForwardTile<kHeadDim>::kSharedBytes);
  std::printf("attention_row_stats %d %d 0\n", kHeadDim, kAttentionThreads);
  std::printf("attention_key_grad %d %d %d\n", kHeadDim, kAttentionThreads, KeyGradTile<kHeadDim>::kSharedBytes);
  std::printf("attention_query_grad %d %d %d\n", kHeadDim, kAttentionThreads, QueryGradTile<kHeadDim>::kSharedBytes);
}
template <typename Sizes> void print_hopper(const char* name, int head_dim) {
  std::printf("hopper_%s %d %d %d\n", name, head_dim, Sizes::kThreads, Sizes::kSharedBytes);
}
template <int kHeadDim> void hopper_attention() {
  print_hopper<hopper::ForwardTile<kHeadDim, 2>>("attention_forward", kHeadDim);
  print_hopper<hopper::KeyGradTile<kHeadDim>>("attention_key_grad", kHeadDim);
  print_hopper<hopper::QueryGradTile<kHeadDim>>("attention_query_grad", kHeadDim);
}
int main() {
  hopper_attention<64>(), hopper_attention<128>();
  print_hopper<hopper::ForwardTile<64, 3>>("attention_forward_wide", 64);
  attention<32>(), attention<64>(), attention<128>();
  for (const char* name : {"rotary", "rotary_runs"}) std::printf("%s 0 %d 0\n", name, kRotaryThreads);
  for (const char* name : {"layer_norm", "layer_norm_grad", "layer_norm_sum"})
    std::printf("%s 0 %d 0\n", name, kNormThreads);
  for (const char* name : {"after_in", "after_in_grad", "residual", "residual_grad"})
    std::printf("%s 0 %d 0\n", name, kBlockThreads);
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
    hgmma: int | None = None
    """HGMMA instructions; None: no disassembler (cuobjdump) was found."""
    remarks: tuple[str, ...] = ()
    """Of REMARKS, those that ptxas made."""
    overwritten: tuple[str, ...] = ()
    """See `overwritten_operands`."""

    def fault(self) -> str | None:
        """What is wrong with it, or None."""
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.remarks:
            return f"ptxas remarks {', '.join(self.remarks)}"
        if self.overwritten:
            return f"overwrites {', '.join(self.overwritten)} in a loop that multiplies with what was there before it"
        if self.name.startswith("hopper_") and self.hgmma == 0:
            return "has no HGMMA"
        return None

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


def _disassembler() -> str | None:
    """cuobjdump of the CUDA toolkit, or of triton's package."""
    found = shutil.which("cuobjdump")
    if found is None and (spec := importlib.util.find_spec("triton")) is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def _sass(compiled: str) -> dict[str, str] | None:
    """Mangled name -> instructions, of each kernel in an object file; None where there is no disassembler."""
    tool = _disassembler()
    if tool is None:
        return None
    parts = _run([tool, "-sass", compiled]).split("Function : ")[1:]
    return {part.split()[0]: part for part in parts}


def overwritten_operands(sass: str) -> tuple[str, ...]:
    """Left operands of wgmma that ldmatrix put into registers before a loop, and that the loop overwrites.

    ptxas 13.0 did that to V in a kernel that computes dK: it took the registers for free behind their last use in the
    loop's body, so that all of the body's turns but the first multiplied with something else. No remark, and no
    emulator knows; on an H200 dK was wrong by a factor of a million.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", sass)]
    writes: dict[int, list[tuple[int, str]]] = {}  # of a register, by whom
    multiplied: list[tuple[int, int]] = []  # (address, first of four registers)
    loops: list[tuple[int, int]] = []
    for at, text in code:
        branch = re.match(r"(?:@!?\w+ )?BRA\S* (?:\w+, )?0x([0-9a-f]+)", text.strip())
        if branch and int(branch[1], 16) < at:
            loops.append((int(branch[1], 16), at))
        if (left := re.search(r"HGMMA\S* R\d+, R(\d+), gdesc", text)) is not None:
            multiplied.append((at, int(left[1])))
        elif (written := re.match(r"(?:@!?\w+ )?(\w+)(\S*) R(\d+)\b", text.strip())) is not None:
            wide = 4 if ".M88.4" in written[2] or ".128" in written[2] else 2 if ".WIDE" in written[2] else 1
            for register in range(int(written[3]), int(written[3]) + wide):
                writes.setdefault(register, []).append((at, written[1]))
    found: dict[str, None] = {}
    for at, first in multiplied:
        begin, end = min(((b, e) for b, e in loops if b <= at <= e), key=lambda loop: loop[1] - loop[0], default=(0, 0))
        for register in range(first, first + 4):
            inside = [who for where, who in writes.get(register, []) if begin <= where <= end]
            before = [who for where, who in writes.get(register, []) if where < begin]
            if "LDSM" in before and inside and "LDSM" not in inside:
                found[f"R{register}"] = None
    return tuple(found)


def _compile(source: Path, arch: str, folder: Path, sizes: dict[tuple[str, int], tuple[int, int]]) -> list[Kernel]:
    """The kernels in a .cu file."""
    code = f"arch=compute_{arch[3:]},code={arch}"
    is_hopper = source.parent.name == "hopper"
    target = str(folder / f"{source.parent.name}.{source.stem}.{arch}.o")
    flags = ["-std=c++20", "-O3", f"-I{CSRC}", "-gencode", code, "-Xptxas", "-v"]
    output = _run(["nvcc", *flags, "-c", str(source), "-o", target])
    sass = _sass(target) if is_hopper else None
    remarks = dict.fromkeys(REMARKS, "")  # ptxas names the kernel in the line itself
    for line in output.splitlines():
        for remark in REMARKS:
            if f"({remark})" in line:
                remarks[remark] += line
    found = []
    for part in output.split("Compiling entry function ")[1:]:
        mangled = part[1 : part.index("'", 1)]
        name = re.search(r"(\w+)_kernel<([^>]*)>", _run(["c++filt", mangled]))
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert name and registers and spills, part
        dtype, *dims = (x.strip().removeprefix("phi1::cuda::") for x in name[2].split(","))
        # A number is head_dim, a bool says whether the kernel draws dropout, a name is the activation's.
        of = dims[0] if dims else ""
        number = re.fullmatch(r"(?:\(int\))?(\d+)", of)
        head_dim = int(number[1]) if number else 0
        suffix = "_dropout" if of == "true" else f"_{of}" if of[:1].isupper() else ""
        kernel = f"hopper_{name[1]}" if is_hopper else name[1]
        suffix = "_wide" if is_hopper and dims[1:] == ["3"] else suffix  # three computing warpgroups
        threads, shared = sizes[kernel + suffix if is_hopper else kernel, head_dim]
        found.append(
            Kernel(
                kernel + suffix,
                dtype,
                head_dim,
                arch,
                int(registers[1]),
                int(spills[1]) + int(spills[2]),
                threads,
                shared,
                None if sass is None else sass[mangled].count("HGMMA"),
                tuple(remark for remark, lines in remarks.items() if mangled in lines),
                () if sass is None else overwritten_operands(sass[mangled]),
            )
        )
    return found


def compile_kernels(archs: tuple[str, ...] = ARCHS, jobs: int = 2) -> list[Kernel]:
    """Compiles every csrc/cuda/*.cu for each of `archs`, and csrc/cuda/hopper/*.cu for sm_90a."""
    work = [(source, arch) for source in sorted((CSRC / "cuda").glob("*.cu")) for arch in archs]
    if "sm_90a" in archs:
        work += [(source, "sm_90a") for source in sorted((CSRC / "cuda" / "hopper").glob("*.cu"))]
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        sizes = _launch_sizes(folder)
        return [
            kernel
            for found in pool.map(lambda item: _compile(item[0], item[1], folder, sizes), work)
            for kernel in found
        ]


def table(kernels: list[Kernel], version: str) -> str:
    """The kernels as Markdown."""
    lines = [
        "# What ptxas makes of the CUDA kernels",
        "",
        f"Written by `python bench/ptxas.py`; nvcc {version}. Occupancy is computed from registers, shared memory and",
        "threads, not measured: blocks a multiprocessor, and resident threads over the 2,048 there can be. HGMMA: "
        "wgmma in SASS.",
        "",
        "| kernel | dtype | head_dim | arch | registers | spilled bytes | threads | shared bytes | blocks | occupancy "
        "| HGMMA |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for k in sorted(kernels, key=lambda k: (k.name, k.head_dim, k.dtype, k.arch)):
        lines.append(
            f"| {k.name} | {k.dtype} | {k.head_dim or ''} | {k.arch} | {k.registers} | {k.spilled} | {k.threads} "
            f"| {k.shared} | {k.blocks()} | {k.occupancy():.1%} | {'' if k.hgmma is None else k.hgmma} |"
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
    faults = [(k, fault) for k in kernels if (fault := k.fault())]
    for k, fault in faults:
        print(f"{k.name} {k.dtype} {k.head_dim} on {k.arch} {fault}", file=sys.stderr)
    print(f"{arguments.output}: {len(kernels)} kernels, {len(faults)} with a fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
