"""csrc/emulator: each rule that a kernel can break is noticed, and only then."""

import pathlib
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).resolve().parents[3] / "csrc"
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]

EXPECTED = {
    "dense": "ok, sectors 4 of 4",
    "strided": "ok, sectors 32 of 4",
    "no_conflict": "ok, sectors 0 of 0, wavefronts 1 of 1",
    "conflict": "ok, sectors 0 of 0, wavefronts 32 of 1",
    "shared_bounds": "st.shared: shared offset 4096 + 4 is outside the block's 4096 bytes",
    "shared_alignment": "is not a multiple of 16",
    "global_bounds": "is outside the tensors of this launch",
    "global_alignment": "is not a multiple of 16",
    "copy_alignment": "is not a multiple of 16",
    "race_write_read": "race: ",
    "race_read_write": "race: ",
    "race_of_a_pair": "reads 1, writes 1",
    "barrier_orders": "ok",
    "warp_barrier_orders_a_warp": "ok",
    "warp_barrier_does_not_order_a_block": "race: ",
    "divergent_barrier": "divergence: no thread can go on; 40 wait at bar.sync, 24 have exited",
    "divergent_warp": "divergence: at ",
    "copy_never_waited_for": "exits with cp.async copies that were never waited for",
    "copies_land_at_their_wait": "ok",
    "seen": "ffffffff 5 ffffffff",
    "shared_memory_starts_as_nan": "ok",
    "fresh": "nan",
}


@pytest.fixture(scope="module", params=COMPILERS)
def lines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> what happened, of rules.cpp."""
    program = tmp_path_factory.mktemp("rules") / "rules"
    command = [
        request.param, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-DPHI1_EMULATOR",
        f"-I{CSRC}", str(pathlib.Path(__file__).parent / "rules.cpp"),
        str(CSRC / "emulator" / "emulator.cpp"), str(CSRC / "emulator" / "block.cpp"), "-o", str(program),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def test_every_rule_has_an_expectation(lines: dict[str, str]) -> None:
    assert set(lines) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_rule(lines: dict[str, str], name: str) -> None:
    assert EXPECTED[name] in lines[name]
