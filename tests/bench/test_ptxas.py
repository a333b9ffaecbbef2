"""bench/ptxas.py: every CUDA kernel compiles for every architecture, none spills, Hopper's are as they were written."""

import dataclasses
import importlib.util
import pathlib
import shutil
import sys

import pytest

_PATH = pathlib.Path(__file__).resolve().parents[2] / "bench" / "ptxas.py"
_SPEC = importlib.util.spec_from_file_location("bench_ptxas", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
ptxas = importlib.util.module_from_spec(_SPEC)
sys.modules["bench_ptxas"] = ptxas
_SPEC.loader.exec_module(ptxas)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH: the CUDA kernels cannot be compiled here")
def test_no_kernel_has_a_fault():
    kernels = ptxas.compile_kernels()
    # rotary: 2 kernels, 3 dtypes; layer_norm: 4 kernels, 3 dtypes; block: 5 kernels, 2 of them for 2
    # activations, 2 with and without dropout, 3 dtypes;
    # cross_entropy: 2 kernels, 3 dtypes; attention: 4 kernels, 2 dtypes, 3 head_dims
    hopper = [k for k in kernels if k.name.startswith("hopper_")]
    assert len(kernels) - len(hopper) == (2 * 3 + 4 * 3 + (1 + 2 * 2 + 2 * 2) * 3 + 2 * 3 + 4 * 2 * 3) * len(
        ptxas.ARCHS
    )
    assert len(hopper) == (3 * 2 + 1) * 2  # forward, dK and dV, dQ, 2 head_dims; the wide forward; 2 dtypes
    assert [(k, k.fault()) for k in kernels if k.fault()] == []
    others = [k for k in kernels if k not in hopper]
    assert all(k.blocks() >= 2 for k in others), "a block alone on a multiprocessor cannot hide its own barriers"
    assert all(k.blocks() == 1 for k in hopper), "one block has all registers"
    # A wgmma for each 16 of the sum. Forward: scores and P V in the loop, scores of the first tile, P V of the last,
    # 128 keys. dK and dV: two over head_dim, two over 64 queries. dQ: two over head_dim, one over 128 keys (64).
    expected = {
        "hopper_attention_forward": {64: 2 * (4 + 8), 128: 2 * (8 + 8)},
        "hopper_attention_forward_wide": {64: 2 * (4 + 8)},
        "hopper_attention_key_grad": {64: 2 * 4 + 2 * 4, 128: 2 * 8 + 2 * 4},
        "hopper_attention_query_grad": {64: 2 * 4 + 8, 128: 2 * 8 + 4},
    }
    assert all(k.hgmma in (None, expected[k.name][k.head_dim]) for k in hopper)


def test_a_fault_is_named():
    kernel = ptxas.Kernel("hopper_k", "bf16", 64, "sm_90a", 168, 0, 384, 0, hgmma=8)
    assert kernel.fault() is None
    assert dataclasses.replace(kernel, spilled=16).fault() == "spills 16 bytes"
    assert dataclasses.replace(kernel, remarks=("C7510",)).fault() == "ptxas remarks C7510"
    assert dataclasses.replace(kernel, hgmma=0).fault() == "has no HGMMA"
    fault = "overwrites R8, R9 in a loop that multiplies with what was there before it"
    assert dataclasses.replace(kernel, overwritten=("R8", "R9")).fault() == fault
    assert dataclasses.replace(kernel, name="k", hgmma=0).fault() is None


# As cuobjdump prints it; of what ptxas 13.0 made of a kernel that computed dK wrong on an H200.
_LOOP = """
        /*1bf0*/                   LDSM.16.M88.4 R156, [R13+0x4000] ;      /* 0x004000000d9c783b */
        /*1ed0*/                   WARPGROUP.ARRIVE ;                      /* 0x00000000000079c5 */
        /*21e0*/                   HGMMA.64x64x16.F32.BF16 R24, R156, gdesc[UR20], RZ, !UPT ;
        /*32c0*/                   IMAD.WIDE.U32 R{free}, R156, -0x2daee0ad, RZ ;
        /*43a0*/                   F2FP.BF16.F32.PACK_AB R{packed}, R25, R24 ;
        /*4490*/                   HGMMA.64x64x16.F32.BF16 R120, R{packed}, gdesc[UR16].tnspB, R120 ;
        /*45e0*/              @!P0 BRA 0x1ed0 ;
"""


@pytest.mark.parametrize(
    ("free", "packed", "expected"),
    [(200, 204, ()), (158, 204, ("R158", "R159")), (200, 156, ("R156",)), (155, 204, ("R156",))],
)
def test_an_operand_that_the_loop_overwrites_is_found(free, packed, expected):
    assert ptxas.overwritten_operands(_LOOP.format(free=free, packed=packed)) == expected


def test_occupancy_is_bounded_by_the_scarcest_resource():
    def kernel(registers, threads, shared, arch="sm_80"):
        return ptxas.Kernel("k", "bf16", 64, arch, registers, 0, threads, shared)

    assert kernel(255, 128, 49152).blocks() == 2  # registers: 256 x 128 of 65,536
    assert kernel(32, 128, 65536).blocks() == 2  # shared memory: 65 KiB of 164
    assert kernel(32, 128, 65536, "sm_90a").blocks() == 3  # of 228
    assert kernel(16, 256, 0).blocks() == 8  # threads: 2,048
    assert kernel(16, 32, 0).blocks() == 32  # blocks
    assert kernel(16, 256, 0).occupancy() == 1.0
