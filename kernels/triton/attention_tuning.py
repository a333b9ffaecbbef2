"""Attention's candidates: among those of a kind of call its first call on a GPU chooses."""

import itertools

import torch
import triton

from kernels.triton import INTERPRETED, descriptors, trial

Tile = tuple[int, int, int, int]
"""(BLOCK_M, BLOCK_N, warps, stages)."""

# By kernel and head_dim, for 16-bit inputs. bench/triton_aot.py compiles each for sm_80 and sm_90; one that spills
# registers on either is left out.
TILES: dict[str, dict[int, list[Tile]]] = {
    "forward": {
        32: [(128, 64, 8, 3), (128, 32, 8, 3)],
        64: [(128, 64, 8, 3), (64, 64, 4, 3)],
        128: [(64, 64, 8, 3), (64, 32, 4, 2)],
    },
    "dq": {
        32: [(128, 64, 8, 2), (64, 32, 4, 3)],
        64: [(128, 64, 8, 2), (64, 32, 4, 3)],
        128: [(64, 32, 4, 2), (64, 32, 8, 2)],
    },
    "dkv": {
        32: [(32, 128, 8, 1), (32, 64, 4, 1)],
        64: [(32, 128, 8, 1), (32, 64, 4, 1), (32, 32, 4, 2)],
        128: [(32, 32, 4, 1), (32, 64, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)],
    },
}
# These spill in some kinds of calls only (8 to 272 bytes a thread, triton 3.7.1 or 3.9.0), "full" being not causal,
# "batch" without documents and "whole" without dropout; of several words a call must be all.
# Finding a program's document takes registers, and so does dropout; without the diagonal's loop the compiler spends
# them elsewhere.
_NOT_WITH: dict[tuple[str, int], dict[Tile, set[str]]] = {
    ("forward", 32): {(128, 64, 8, 3): {"full", "causal documents whole"}},
    ("forward", 64): {(64, 64, 4, 3): {"full", "documents"}},
    ("forward", 128): {(64, 32, 4, 2): {"batch whole", "full whole"}},
    ("dq", 32): {(128, 64, 8, 2): {"full"}},
    ("dq", 64): {(128, 64, 8, 2): {"dropout"}},
    ("dq", 128): {(64, 32, 4, 2): {"causal dropout batch"}},
    ("dkv", 32): {(32, 64, 4, 1): {"full documents whole"}},
    ("dkv", 64): {
        (32, 128, 8, 1): {"documents", "causal dropout"},
        (32, 64, 4, 1): {"documents", "dropout"},
        (32, 32, 4, 2): {"full batch dropout"},
    },
    ("dkv", 128): {
        (32, 32, 4, 1): {"full", "causal dropout"},
        (32, 64, 8, 1): {"causal"},
        (32, 32, 8, 1): {"full", "documents"},
        (16, 32, 8, 1): {"full", "batch"},
    },
}
# Loading by tensor descriptors, on sm_90 only. They take fewer registers (dq's (128, 64) at head_dim 64, causal: 122 a
# thread, not 156), so that larger tiles fit.
DESCRIPTOR_TILES: dict[str, dict[int, list[Tile]]] = {
    "forward": {
        32: [(128, 64, 8, 3), (128, 128, 8, 2)],
        64: [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)],
        128: [(128, 64, 8, 2), (64, 64, 4, 2)],
    },
    "dq": {
        32: [(128, 64, 8, 2)],
        64: [(128, 64, 8, 2), (64, 64, 4, 2)],
        128: [(128, 64, 8, 2), (64, 32, 4, 2)],
    },
    "dkv": {
        32: [(32, 128, 8, 2)],
        64: [(32, 128, 8, 2), (64, 128, 8, 1)],
        128: [(32, 64, 8, 2)],
    },
}
_DESCRIPTORS_NOT_WITH: dict[tuple[str, int], dict[Tile, set[str]]] = {
    ("dkv", 64): {(64, 128, 8, 1): {"causal dropout"}}
}
# The constant that says how many rows of each tensor a descriptor loads.
ROWS = {"q": "BLOCK_M", "grad": "BLOCK_M", "k": "BLOCK_N", "v": "BLOCK_N"}
# float32 inputs: full precision without tensor cores, for checks rather than for speed.
FLOAT32_TILE = (32, 32, 4, 1)
# The interpreter runs one program after another: few tiles, but enough for the tests to cross their borders.
_INTERPRETER_TILE = (64, 64, 4, 1)


def candidates(
    kernel: str, head_dim: int, dtype: torch.dtype, causal: bool, dropout: bool, documents: bool, by_descriptors: bool
) -> list[tuple[Tile, bool]]:
    """(tile, whether it loads by tensor descriptors) for a call; by_descriptors: it may have them."""
    if INTERPRETED:
        return [(_INTERPRETER_TILE, True)]
    if dtype == torch.float32:
        return [(FLOAT32_TILE, False)]
    kinds = {
        "causal" if causal else "full",
        "documents" if documents else "batch",
        "dropout" if dropout else "whole",
    }

    def those(
        tiles: dict[str, dict[int, list[Tile]]], not_with: dict[tuple[str, int], dict[Tile, set[str]]]
    ) -> list[Tile]:
        spills_with = not_with.get((kernel, head_dim), {})
        return [
            tile
            for tile in tiles[kernel][head_dim]
            if not any(kinds.issuperset(kind.split()) for kind in spills_with.get(tile, ()))
        ]

    found = [(tile, False) for tile in those(TILES, _NOT_WITH)]
    if by_descriptors:
        found += [(tile, True) for tile in those(DESCRIPTOR_TILES, _DESCRIPTORS_NOT_WITH)]
    return found


def tuned(function, kernel: str):
    """`trial.tuned` among the kernel's candidates of a call."""
    every = [(tile, False) for tile in [FLOAT32_TILE, *itertools.chain(*TILES[kernel].values())]]
    every += [(tile, True) for tile in itertools.chain(*DESCRIPTOR_TILES[kernel].values())]
    configs = {
        (tile, tma): triton.Config(
            {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "TMA": tma}, num_warps=tile[2], num_stages=tile[3]
        )
        for tile, tma in ([(_INTERPRETER_TILE, True)] if INTERPRETED else every)
    }

    def prune(_, named, **options):
        arguments = {**named, **options}
        call = (
            arguments["HEAD_DIM"],
            arguments["q_ptr"].dtype,
            *(arguments[name] for name in ("CAUSAL", "DROPOUT", "DOCUMENTS", "DESCRIPTORS")),
        )
        return [configs[candidate] for candidate in candidates(kernel, *call)]

    key = ["HEAD_DIM", "CAUSAL", "DROPOUT", "DOCUMENTS", "DESCRIPTORS", "length_class"]
    return trial.tuned(list(configs.values()), key, prune)(descriptors.head_rows(**ROWS)(function))
