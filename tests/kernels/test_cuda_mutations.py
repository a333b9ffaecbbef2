"""Small mistakes, one at a time, in csrc/cuda: each must be noticed by a few of the cases that the kernels are tested
on.

A mutant that survives means that the tests cannot see such a mistake, or that the code it changed does nothing. `make
mutants` runs them all, `make test` every third.
"""

import functools
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import cuda_block_cases
import emulator
import pytest
import torch
from attention_cases import Case
from cuda_mutations import MMA_ATTENTION, OTHERS, Mutation
from hopper_mutations import HOPPER
from test_cuda_layer_norm import check_equal_numbers, check_layer_norm
from test_cuda_loss import check_extremes, check_loss, check_parts, check_wrong_targets
from test_extreme_values import check_extreme_scores

from kernels import reference

CUDA = emulator.ROOT / "csrc" / "cuda"
MUTATIONS = [*MMA_ATTENTION, *HOPPER, *OTHERS]


ATTENTION = [
    Case("mutants_causal", batch=4, seqlen_q=40, seqlen_k=70, heads=2, kv_heads=1, dropout_p=0.25, seed_in_memory=True),
    Case("mutants_tall", batch=1, seqlen_q=140, seqlen_k=129, heads=1, kv_heads=1),
    Case("mutants_documents", batch=1, heads=4, kv_heads=2, documents=((5, 90), (40, 20), (4, 0), (0, 9), (33, 33))),
    Case("mutants_blind", batch=1, seqlen_q=139, seqlen_k=3, heads=1, kv_heads=1),
    Case("mutants_full", batch=1, seqlen_q=100, seqlen_k=150, heads=1, kv_heads=1, causal=False, dropout_p=0.5),
]


def _check_attention(module: ModuleType) -> None:
    for case in ATTENTION:
        emulator.check_attention(case, torch.bfloat16)
    check_extreme_scores("cuda", torch.bfloat16)
    counters = module.counters()
    assert counters["shared_wavefronts"] == counters["shared_wavefronts_least"], "bank conflicts"


# The hopper kernels' tiles are 128 x 128, in blocks that take several: more rows, several tiles for each of 3 blocks.
HOPPER = [
    Case(
        "mutants_causal", batch=3, seqlen_q=140, seqlen_k=300, heads=2, kv_heads=1, dropout_p=0.25, seed_in_memory=True
    ),
    Case("mutants_peaked", batch=1, seqlen_q=20, seqlen_k=300, heads=1, kv_heads=1, causal=False, magnitude=100.0),
    Case("mutants_corner", batch=1, seqlen_q=140, seqlen_k=141, heads=1, kv_heads=1),
    Case("mutants_documents", batch=1, heads=4, kv_heads=2, documents=((5, 90), (40, 20), (4, 0), (0, 9), (133, 133))),
    Case("mutants_blind", batch=1, seqlen_q=139, seqlen_k=3, heads=1, kv_heads=1),
    Case("mutants_full", batch=1, seqlen_q=100, seqlen_k=550, heads=1, kv_heads=1, causal=False, dropout_p=0.5),
]


def _check_hopper(module: ModuleType, backward: bool) -> None:
    for seed in range(2):
        module.set_seed(seed)
        for case in HOPPER:
            emulator.check_attention(case, torch.bfloat16, version="cuda/hopper", backward=backward)
    if backward:
        check_extreme_scores("cuda/hopper", torch.bfloat16)
    counters = module.counters()
    assert counters["shared_wavefronts"] == counters["shared_wavefronts_least"], "bank conflicts"


def _check_rotary(module: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 3, heads, 64, generator=generator).to(torch.bfloat16) for heads in (9, 2))
    where = torch.randint(32, (2, 3), generator=generator)
    # By element, in runs.
    for dims, positions, inverse in itertools.product((36, 16, 32), (None, where), (False, True)):
        cos, sin = reference.rotary_table(32, dims)
        ours = torch.ops.phi1.rotary(q, k, cos, sin, positions, inverse, "cuda")
        for x, y in zip(ours, reference.rotary(q, k, cos, sin, positions, inverse), strict=True):
            torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-6)


def _check_layer_norm(module: ModuleType) -> None:
    for shape in ((3, 64), (70, 264), (1100, 8)):  # the last with more rows a chunk than a block's threads take at once
        check_layer_norm(shape, torch.bfloat16)
    check_equal_numbers()


BLOCK = [
    cuda_block_cases.Case("mutants_rows", batch=3, seq=45, heads=1, hidden=8, inner=8, positions="batch"),
    cuda_block_cases.Case("mutants_wide", batch=2, seq=3, heads=24, kv_heads=6, head_dim=64, rotary=32, inner=48),
    cuda_block_cases.Case("mutants_relu2", seq=3, inner=48, activation="relu2"),
]


def _check_block(module: ModuleType) -> None:
    for case in BLOCK:
        cuda_block_cases.check_projection_in(case, torch.bfloat16)
    cuda_block_cases.check_projection_out(135, 40, 0.3, torch.bfloat16)


def _check_loss(module: ModuleType) -> None:
    # Ignored rows, parts of a chunk; 2 parts of the rows; more columns than a block takes in a turn.
    for shape, rows in (((13, 16, 72), 7), ((40, 8, 1032), 33), ((3, 8, 4112), 7)):
        check_loss(shape, torch.bfloat16, chunk_rows=rows)
    check_loss((13, 16, 72), torch.bfloat16, z_loss=0.1)
    check_extremes(torch.bfloat16)
    check_wrong_targets()
    check_parts(module)


KERNELS: dict[str, tuple[tuple[str, ...], Callable[[ModuleType], None]]] = {
    "attention": (("attention_forward.cu", "attention_backward.cu"), _check_attention),
    "hopper_forward": (("hopper/attention_forward.cu",), functools.partial(_check_hopper, backward=False)),
    "hopper_backward": (("hopper/attention_backward.cu",), functools.partial(_check_hopper, backward=True)),
    "rotary": (("rotary.cu",), _check_rotary),
    "layer_norm": (("layer_norm.cu",), _check_layer_norm),
    "block": (("block.cu",), _check_block),
    "loss": (("cross_entropy.cu",), _check_loss),
}
"""Sources, and a check that they do what they should."""
SOURCES = tuple(source for sources, _ in KERNELS.values() for source in sources)


def _killed_by(module: ModuleType, mutation: Mutation | None) -> str | None:
    """The first line of what goes wrong, or None. What `torch.empty` gives is NaN, not by chance the right zeros."""
    module.reset_counters()
    torch.use_deterministic_algorithms(True)
    try:
        with emulator.as_cuda_backend(module):
            for name, (_, check) in KERNELS.items():
                if mutation is None or mutation.kernels == name:
                    check(module)
    except (AssertionError, RuntimeError) as error:
        return str(error).splitlines()[0]
    finally:
        torch.use_deterministic_algorithms(False)
    return None


FLAGS = ("-std=c++20", "-O1", "-march=native", "-fPIC", "-fvisibility=hidden", "-DPHI1_EMULATOR", "-DPHI1_ONE_INSTANCE")
PREFIX = "".join(f"#include <{name}>\n" for name in ("cstdint", "functional", "stdexcept", "string", "vector"))
"""What every source includes, compiled once: 0.25 s less for each, of 0.55 s (measured, GCC 12)."""


def _run(*command: str | pathlib.Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _build(folder: pathlib.Path, objects: list[pathlib.Path], mutation: Mutation | None) -> pathlib.Path:
    """The emulator module of a mutated copy of csrc/cuda; `objects` are those of the unmutated sources."""
    shutil.copytree(CUDA, folder / "cuda")
    sources = SOURCES
    if mutation is not None:
        target = folder / "cuda" / mutation.file
        text = target.read_text()
        found = text.count(mutation.old)
        assert found == 1, f"{mutation.file}: {mutation.old!r} occurs {found} times, not once"
        target.write_text(text.replace(mutation.old, mutation.new))
        sources = KERNELS[mutation.kernels][0]
    built = []
    for source in sources:
        built.append(folder / (source.replace("/", "-") + ".o"))
        includes = ("-include", folder.parent / "prefix.h", f"-I{folder}", f"-I{CUDA.parent}")
        _run("c++", *FLAGS, *includes, "-xc++", "-c", folder / "cuda" / source, "-o", built[-1])
    kept = [x for x in objects if x.name not in {y.name for y in built}]
    module = folder / "_emulator.so"
    _run("c++", "-shared", "-o", module, *built, *kept)
    return module


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """A folder to work in and the object files of the unmutated module."""
    emulator.build()
    folder = tmp_path_factory.mktemp("mutants")
    (folder / "prefix.h").write_text(PREFIX)
    _run("c++", *FLAGS, "-xc++-header", folder / "prefix.h", "-o", folder / "prefix.h.gch")
    every = list((emulator.BUILD / "CMakeFiles").rglob("*.o"))
    # One instance only.
    others = [x for x in every if not x.as_posix().endswith(tuple(f"/cuda/{source}.o" for source in SOURCES))]
    _build(folder / "control", others, None)
    return folder, others + sorted((folder / "control").glob("*.o"))


@pytest.fixture(scope="module")
def killed(request: pytest.FixtureRequest) -> Iterator[list[bool]]:
    """Of each mutant that was run; the total is printed at the end."""
    results: list[bool] = []
    yield results
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nCUDA mutants killed: {sum(results)}/{len(results)}", file=sys.stderr)


def test_the_unmutated_kernels_pass(control: tuple[pathlib.Path, list[pathlib.Path]]) -> None:
    folder, _ = control
    assert _killed_by(emulator.load(folder / "control" / "_emulator.so"), None) is None


def test_every_mutation_changes_one_place() -> None:
    for mutation in MUTATIONS:
        assert (CUDA / mutation.file).read_text().count(mutation.old) == 1, f"{mutation.file}: {mutation.what}"


@pytest.mark.parametrize(
    "mutation",
    MUTATIONS if os.environ.get("PHI1_MUTANTS") == "all" else MUTATIONS[::6],
    ids=lambda m: f"{m.file}: {m.what}",
)
def test_mutant_is_killed(mutation: Mutation, control, killed: list[bool]) -> None:
    folder, objects = control
    module = emulator.load(_build(folder / str(MUTATIONS.index(mutation)), objects, mutation))
    reason = _killed_by(module, mutation)
    killed.append(reason is not None)
    assert reason is not None, f"{mutation.file}: no test notices: {mutation.what}"
