"""What Triton makes of our kernels: registers, spills, shared memory, tensor core and TMA instructions. Needs no GPU.

    python bench/triton_aot.py            writes bench/results/triton-aot.md
    python bench/triton_aot.py --quick    phi-1's case only (bfloat16, head_dim 64, causal), prints

Every kernel and autotune candidate is compiled for sm_80 and sm_90, those with tensor descriptors for sm_90. Exit
status 1 if one for 16-bit inputs spills; attention in float32, which runs in the interpreter only, would spill, and the
table says how much.
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
    warps: int
    """A program; three times the candidate's where they are specialised."""
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
    tma: int
    """`cp.async.bulk.tensor` instructions in the PTX: tiles copied by descriptor."""
    hgmma: int
    """HGMMA instructions in the SASS: wgmma as assembled."""
    utmaldg: int
    """UTMALDG instructions in the SASS: TMA loads as assembled."""


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

    from kernels.native import HEAD_DIMS
    from kernels.triton import attention_tuning

    # phi-1's call; in 16 bits all eight.
    variants = [{"CAUSAL": True, "DROPOUT": True, "DOCUMENTS": False}]
    if not quick and dtype != "fp32":
        options = itertools.product((True, False), repeat=3)
        variants = [dict(zip(("CAUSAL", "DROPOUT", "DOCUMENTS"), values, strict=True)) for values in options]
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    found = []
    heads = (64,) if quick else HEAD_DIMS
    for kernel, head_dim, variant in itertools.product(attention_tuning.TILES, heads, variants):
        by_descriptors = arch >= 90 and not variant["DOCUMENTS"]
        tiles = attention_tuning.candidates(
            kernel, head_dim, kind, variant["CAUSAL"], variant["DROPOUT"], variant["DOCUMENTS"], by_descriptors
        )
        for (m, n, warps, stages), tma in tiles:
            constants = {"HEAD_DIM": head_dim, **variant, "DESCRIPTORS": tma, "BLOCK_M": m, "BLOCK_N": n, "TMA": tma}
            module = "attention_forward" if kernel == "forward" else "attention_backward"
            found.append(_job(module, f"{kernel}_kernel", arch, dtype, constants, warps, stages))
    return found


def _job(module: str, kernel: str, arch: int, dtype: str, constants: dict[str, Any], warps: int, stages: int) -> Job:
    return Job(module, kernel, arch, dtype, tuple(constants.items()), warps, stages)


def _other_jobs(arch: int, dtype: str, quick: bool) -> list[Job]:
    """Rotary, LayerNorm at phi-1's width and at the greatest, sums and the loss; they serve float32 too."""
    from kernels.triton import column_sums, loss, norm

    rotary = {
        "HALF": 16,
        "HEAD_DIM": 64,
        "BLOCK_HEADS": 16,
        "BLOCK_HALF": 16,
        "BLOCK_REST": 32,
        "INVERSE": False,
        "HAS_POSITIONS": True,
    }
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
    heads = {"HEAD_DIM": 64, "HALF": 16, "POSITIONS": True, "ACTIVATION": "gelu_new"}
    chunk = {"CHUNK": column_sums.CHUNK_ROWS}
    found = [
        _job("block_elementwise", "after_in_kernel", arch, dtype, {**heads, **tile}, 4, 3),
        _job("block_elementwise", "after_in_backward_kernel", arch, dtype, {**heads, **chunk, **tile}, 4, 3),
        _job("block_elementwise", "after_out_kernel", arch, dtype, {"DROPOUT": True, **tile}, 4, 3),
        _job("block_elementwise", "residual_factor_kernel", arch, dtype, tile, 4, 3),
        _job("block_elementwise", "after_out_backward_kernel", arch, dtype, {"DROPOUT": True, **chunk, **tile}, 4, 3),
    ]
    products: list[tuple[str, dict[str, Any]]] = [("project_in", heads), ("project_out", {"DROPOUT": True})]
    for (kernel, constants), even in itertools.product(products, (True,) if quick else (True, False)):
        seen = set()
        for config in block.candidates(specialized=kernel == "project_out"):
            form = config.kwargs["TMA"], config.kwargs.get("WARP_SPECIALIZE")
            if (config.kwargs["TMA"] and arch < 90) or (quick and form in seen):
                continue
            seen.add(form)
            options = {**constants, "EVEN": even, "DESCRIPTORS": config.kwargs["TMA"], **config.kwargs}
            found.append(
                _job("block_product", f"{kernel}_kernel", arch, dtype, options, config.num_warps, config.num_stages)
            )
    return found


def compile_job(job: Job) -> Result:
    """Compiles ahead of time, with the arguments aligned as phi-1's are."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.triton import attention_tuning

    kernel = getattr(importlib.import_module(f"kernels.triton.{job.module}"), job.kernel)
    constants, signature, attributes = dict(job.constants), {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name.endswith("_rows") and constants["TMA"]:
            rows = constants[attention_tuning.ROWS[name.removesuffix("_rows")]]
            signature[name] = f"tensordesc<{job.dtype}{[1, 1, rows, constants['HEAD_DIM']]}>"
        elif name.endswith("_rows"):
            constants[name], signature[name] = None, "constexpr"
        elif name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = _POINTERS.get(name, f"*{job.dtype}")
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
        if name.endswith(_ALIGNED) and name not in constants:
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", job.arch, 32),
        options={"num_warps": job.warps, "num_stages": job.stages},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    match = re.search(rf"Function {job.kernel}:\s+REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    instructions = [ptx.count(name) for name in ("wgmma.mma_async", "mma.sync", "cp.async.bulk.tensor")]
    assembled = [sass.count(name) for name in ("HGMMA", "UTMALDG")]
    return Result(metadata.num_warps, int(match[1]), int(match[2]), metadata.shared, *instructions, *assembled)


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
        f"triton {triton.__version__}; `python bench/triton_aot.py`. Registers and stack are a thread's, stack is "
        f"spills; "
        "shared memory a block's; wgmma, mma.sync and TMA (`cp.async.bulk.tensor`) are counted in the PTX, HGMMA and "
        "UTMALDG in the SASS. Attention in float32 spills, and is refused outside the interpreter.\n",
        "| kernel | arch | dtype | constants | warps | stages | registers | spilled B | shared KiB "
        "| wgmma | mma.sync | TMA | HGMMA | UTMALDG |",
        "|" + "---|" * 14,
    ]
    for job, r in results.items():
        constants = " ".join(
            name.lower() if value is True else f"{name.lower()}={value}"
            for name, value in job.constants
            if value is not False and name != "DESCRIPTORS"  # as TMA
        )
        lines.append(
            f"| {job.kernel.strip('_')} | sm_{job.arch} | {job.dtype} | {constants} | {r.warps} | {job.stages} "
            f"| {r.registers} | {r.stack} | {r.shared / 1024:.0f} | {r.wgmma} | {r.mma} | {r.tma} | {r.hgmma} | "
            f"{r.utmaldg} |"
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
