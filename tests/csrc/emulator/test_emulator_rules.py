"""csrc/emulator: each rule that a kernel can break is noticed, and only then."""

import emulated
import pytest

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


@pytest.fixture(scope="module", params=emulated.COMPILERS)
def lines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> what happened, of rules.cpp."""
    return emulated.lines(emulated.build(request.param, "rules.cpp", tmp_path_factory.mktemp("rules")))


def test_every_rule_has_an_expectation(lines: dict[str, str]) -> None:
    assert set(lines) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_rule(lines: dict[str, str], name: str) -> None:
    assert EXPECTED[name] in lines[name]
