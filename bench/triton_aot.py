"""What Triton makes of our kernels: registers, spills, shared memory, tensor core instructions. Needs no GPU.

    python bench/triton_aot.py            writes bench/results/triton-aot.md
    python bench/triton_aot.py --quick    phi-1's case only (bfloat16, head_dim 64, causal), prints

Every kernel and autotune candidate is compiled for sm_80 and sm_90. Exit status 1 if one for 16-bit inputs spills;
attention in float32, which runs in the interpreter only, would spill, and the table says how much.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Before triton is imported: compiled, not interpreted; multiply-adds fused, as Triton's default has been up to 3.9.
os.environ.update(TRITON_INTERPRET="0", TRITON_DEFAULT_FP_FUSION="1")

ARCHS = (80, 90)
_FLOATS = {"scale", "keep_scale", "eps"}
_POINTERS = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "position_ptr": "*i64"}
_POINTERS |= {"cu_q_ptr": "*i32", "cu_k_ptr": "*i32", "stats_ptr": "*fp32", "partial_ptr": "*fp32", "loss_ptr": "*fp32"}
_POINTERS |= {"target_ptr": "*i64", "sum_ptr": "*fp32"}
# Multiples of 16 in phi-1: pointers, strides, widths.
_ALIGNED = ("_ptr", "_batch", "_seq", "_head", "_stride", "hidden", "width", "columns", "summed", "turned", "first_u")


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel, its constants and launch options, for one architecture."""

    module: str
    kernel: str
    arch: int
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Result:
    registers: int
    """A thread."""
    stack: int
    """Bytes a thread. Our kernels have no arrays and no calls: what is there was spilled."""
    shared: int
    """Bytes a block."""
    wgmma: int
    """`wgmma.mma_async` instructions in the PTX (Hopper's tensor cores)."""
    mma: int
    """`mma.sync` instructions in the PTX."""


def jobs(quick: bool) -> list[Job]:
    """Every kernel with every candidate."""
    dtypes = ("bf16",) if quick else ("bf16", "fp16", "fp32")
    found = []
    for arch, dtype in itertools.product(ARCHS, dtypes):
        found += _attention_jobs(arch, dtype, quick) + _other_jobs(arch, dtype, quick)
        if dtype != "fp32":  # refused on a GPU, as attention is
            found += _block_jobs(arch, dtype, quick)
    return found


def _attention_jobs(arch: int, dtype: str, quick: bool) -> list[Job]:
    import torch

    from kernels.triton import HEAD_DIMS, attention

    # phi-1's call; in float16 also the one that is not causal; in bfloat16 all eight.
    variants = [{"CAUSAL": True, "DROPOUT": True, "DOCUMENTS": False}]
    if not quick and dtype == "fp16":
        variants.append({**variants[0], "CAUSAL": False})
    if not quick and dtype == "bf16":
        options = itertools.product((True, False), repeat=3)
        variants = [dict(zip(("CAUSAL", "DROPOUT", "DOCUMENTS"), values, strict=True)) for values in options]
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    found = []
    for kernel, head_dim, variant in itertools.product(attention.TILES, (64,) if quick else HEAD_DIMS, variants):
        for m, n, warps, stages in attention.tiles(kernel, head_dim, kind, *variant.values()):
            constants = {"HEAD_DIM": head_dim, **variant, "BLOCK_M": m, "BLOCK_N": n}
            found.append(_job("attention", f"{kernel}_kernel", arch, dtype, constants, warps, stages))
    return found


def _job(module: str, kernel: str, arch: int, dtype: str, constants: dict[str, Any], warps: int, stages: int) -> Job:
    return Job(module, kernel, arch, dtype, tuple(constants.items()), warps, stages)


def _other_jobs(arch: int, dtype: str, quick: bool) -> list[Job]:
    """Rotary, LayerNorm at phi-1's width and at the greatest, sums and the loss; they serve float32 too."""
    from kernels.triton import column_sums, loss, norm

    rotary = {
        "HALF": 16, "HEAD_DIM": 64, "BLOCK_HEADS": 16, "BLOCK_HALF": 16, "BLOCK_REST": 32,
        "INVERSE": False, "HAS_POSITIONS": True,
    }  # fmt: skip
    found = [_job("rotary", "rotary_kernel", arch, dtype, rotary, 4, 3)]
    for hidden in (2048,) if quick else (2048, norm.MOST_COLUMNS):
        tile = norm.launch_options(hidden)
        warps = tile.pop("num_warps")
        found.append(_job("norm", "layer_norm_forward_kernel", arch, dtype, tile, warps, 3))
        constants = {"RESIDUAL": True, "CHUNK": column_sums.CHUNK_ROWS, **tile}
        found.append(_job("norm", "layer_norm_backward_kernel", arch, dtype, constants, warps, 3))
    rows, columns = column_sums.BLOCK
    constants = {"ADD": True, "BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns}
    found.append(_job("column_sums", "column_sums_kernel", arch, dtype, constants, 4, 3))
    constants = {"GRADS": True, "BLOCK": loss.LOSS_TILE["BLOCK"]}
    found.append(_job("loss", "cross_entropy_kernel", arch, dtype, constants, loss.LOSS_TILE["num_warps"], 3))
    return found


def _block_jobs(arch: int, dtype: str, quick: bool) -> list[Job]:
    """The parallel block at phi-1's sizes, with positions and dropout; also with sums that end in a part of a tile."""
    from kernels.triton import block, column_sums

    rows, columns = block.ELEMENTWISE_TILE
    tile = {"ROWS": rows, "BLOCK": columns}
    heads = {"HEAD_DIM": 64, "HALF": 16, "POSITIONS": True}
    chunk = {"CHUNK": column_sums.CHUNK_ROWS}
    found = [
        _job("block_elementwise", "after_in_kernel", arch, dtype, {**heads, **tile}, 4, 3),
        _job("block_elementwise", "after_in_backward_kernel", arch, dtype, {**heads, **chunk, **tile}, 4, 3),
        _job("block_elementwise", "after_out_kernel", arch, dtype, {"DROPOUT": True, **tile}, 4, 3),
        _job("block_elementwise", "after_out_backward_kernel", arch, dtype, {"DROPOUT": True, **chunk, **tile}, 4, 3),
    ]
    tiles = block.PRODUCT_TILES[:1] if quick else block.PRODUCT_TILES
    products: list[tuple[str, dict[str, Any]]] = [("project_in", heads), ("project_out", {"DROPOUT": True})]
    for (kernel, constants), even in itertools.product(products, (True,) if quick else (True, False)):
        for m, n, k, warps, stages in tiles:
            blocks = {"EVEN": even, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
            found.append(_job("block_product", f"{kernel}_kernel", arch, dtype, {**constants, **blocks}, warps, stages))
    return found


def compile_job(job: Job) -> Result:
    """Compiles ahead of time, with the arguments aligned as phi-1's are."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"kernels.triton.{job.module}"), job.kernel)
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in dict(job.constants):
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = _POINTERS.get(name, f"*{job.dtype}")
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
        if name.endswith(_ALIGNED) and name not in dict(job.constants):
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=dict(job.constants), attrs=attributes),
        target=GPUTarget("cuda", job.arch, 32),
        options={"num_warps": job.warps, "num_stages": job.stages},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(rf"Function {job.kernel}:\s+REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    ptx = compiled.asm["ptx"]
    return Result(
        int(match[1]), int(match[2]), compiled.metadata.shared, ptx.count("wgmma.mma_async"), ptx.count("mma.sync")
    )


def compile_all(quick: bool, processes: int = 2) -> dict[Job, Result]:
    work = jobs(quick)
    # Not forked: torch's threads do not survive it.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        return dict(zip(work, pool.map(compile_job, work), strict=True))


def table(results: dict[Job, Result]) -> str:
    import triton

    lines = [
        "# Triton kernels, compiled ahead of time\n",
        f"triton {triton.__version__}; `python bench/triton_aot.py`. Registers and stack are a thread's, stack is spills; "
        "shared memory a block's; instructions are counted in the PTX. Attention in float32 spills, and is refused outside "
        "the interpreter.\n",
        "| kernel | arch | dtype | constants | warps | stages | registers | spilled B | shared KiB | wgmma | mma.sync |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for job, r in results.items():
        constants = " ".join(
            name.lower() if value is True else f"{name.lower()}={value}"
            for name, value in job.constants
            if value is not False
        )
        lines.append(
            f"| {job.kernel.strip('_')} | sm_{job.arch} | {job.dtype} | {constants} | {job.warps} | {job.stages} "
            f"| {r.registers} | {r.stack} | {r.shared / 1024:.0f} | {r.wgmma} | {r.mma} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="phi-1's case only; prints the table, writes nothing")
    parser.add_argument("--processes", type=int, default=2, help="compilers at a time")
    options = parser.parse_args()
    results = compile_all(options.quick, options.processes)
    text = table(results)
    if options.quick:
        print(text)
    else:
        path = ROOT / "bench" / "results" / "triton-aot.md"
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}: {len(results)} kernels")
    spilled = [job for job, result in results.items() if result.stack and job.dtype != "fp32"]
    for job in spilled:
        print(f"spills {results[job].stack} bytes a thread: {job}", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
