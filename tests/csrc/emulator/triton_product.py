"""Prints the operands' descriptors in what Triton makes of tl.dot on sm_90: name, then their constants in steps of 16
k.

Triton lays out tiles as csrc/cuda/hopper/tile.cuh does: 128-byte swizzle, pages of 64 columns.
"""

import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


@triton.jit
def product(a_ptr, b_ptr, c_ptr, m: tl.constexpr, n: tl.constexpr, k: tl.constexpr, transposed: tl.constexpr):
    i, j, at = tl.arange(0, m), tl.arange(0, n), tl.arange(0, k)
    a = tl.load(a_ptr + i[:, None] * k + at[None, :])
    if transposed:  # noqa: SIM108 (Triton takes no expression here)
        b = tl.load(b_ptr + j[:, None] * k + at[None, :]).T
    else:
        b = tl.load(b_ptr + at[:, None] * n + j[None, :])
    tl.store(c_ptr + i[:, None] * n + j[None, :], tl.dot(a, b))


def descriptors(n: int, k: int, transposed: bool) -> tuple[list[int], list[int]]:
    """Of a (64, k) and of b (k, n), or (n, k) transposed: start address 0."""
    source = triton.compiler.ASTSource(
        fn=product,
        signature={"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32"}
        | dict.fromkeys(("m", "n", "k", "transposed"), "constexpr"),
        constexprs={"m": 64, "n": n, "k": k, "transposed": transposed},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    values = {name: int(value) for name, value in re.findall(r"(?:or|add)\.[bs]64\s+(%rd\d+), %rd\d+, (\d{19});", ptx)}
    operands = re.findall(r"wgmma\.mma_async\S+m64n\d+k16\S*\s+\{[^}]*\},\s*(%rd\d+),\s*(%rd\d+),", ptx)
    return [values[a] for a, _ in operands], [values[b] for _, b in operands]


def main() -> None:
    rows_64, rows_128 = descriptors(128, 128, True)
    print("rows 64 x 128:", *rows_64)
    print("rows 128 x 128:", *rows_128)
    print("columns 128 x 128:", *descriptors(128, 128, False)[1])
    rows, columns = descriptors(64, 64, False)
    print("rows 64 x 64:", *rows)
    print("columns 64 x 64:", *columns)


if __name__ == "__main__":
    main()
