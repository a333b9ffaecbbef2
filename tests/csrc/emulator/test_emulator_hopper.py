"""The twins of Hopper's instructions: each refusal with a kernel of its own, results, and descriptors as Triton's."""

import os
import pathlib
import subprocess
import sys

import emulated
import pytest

EXPECTED = {
    "mbarrier_orders": "ok",
    "mbarrier_not_waited_for": "race: ",
    "mbarrier_waited_for_by_one_lane": "race: reads",
    "arrival_without_the_warps_barrier": "race: reads",
    "mbarrier_phase_ahead": "phase 1 while phase 0 runs",
    "mbarrier_phase_behind": "phase 0 while phase 2 runs",
    "mbarrier_without_init": "no mbarrier was initialised at shared offset 0",
    "mbarrier_init_without_barrier": "initialised",
    "mbarrier_init_twice": "the mbarrier is in use",
    "mbarrier_alignment": "is not a multiple of 8",
    "mbarrier_count": "count = 0: must be in 1..1048575",
    "mbarrier_written": "writes shared offset 4, which is an mbarrier",
    "arrival_left_over": "ends with 1 of 2 arrivals at the mbarrier at shared offset 0",
    "arrival_missing": "no thread can go on; 32 wait at an mbarrier",
    "named_barrier_orders": "ok",
    "named_barrier_orders_who_waits_only": "race: reads",
    "named_barrier_number": "named barrier 0: must be in 1..15",
    "named_barrier_threads": "named barrier 1: 48 threads: must be whole warps",
    "named_barrier_counts_differ": "threads, where others said",
    "named_barrier_left_over": "ends with 32 threads at named barrier 1",
    "named_barrier_missing": "no thread can go on; 32 wait at a named barrier",
    "named_barrier_lanes": "divergence: lanes at different named barriers",
    "registers_given_and_taken": "ok",
    "registers_that_were_not_launched_with": "of 64512 registers that the block was launched with 63232 are taken",
    "registers_all_given_and_taken": "ok",
    "registers_that_nobody_gives": "no thread can go on; 256 wait at setmaxnreg",
    "registers_increased_by_dec": "setmaxnreg.dec: from 168 to 232",
    "registers_decreased_by_inc": "setmaxnreg.inc: from 168 to 40",
    "registers_not_a_multiple_of_8": "setmaxnreg: 42 registers: must be 24, 32, ... 256",
    "product": "ok",
    "no_proxy_fence": "without fence.proxy.async between",
    "no_barrier_before_wgmma": "race: wgmma reads",
    "no_wgmma_fence": "changed since the last wgmma.fence",
    "no_commit": "wgmma.wait_group: a wgmma was not committed",
    "no_wait": "exits with wgmma that were never waited for",
    "neither_commit_nor_wait": "exits with wgmma that were never waited for",
    "pattern_off_by_a_row": "start 1152: the pattern does not begin at a multiple of 1024",
    "stride_of_half_a_pattern": "stride offset 512: must be a multiple of 1024",
    "outside_the_block": "is outside the block's 65536 bytes",
    "no_swizzle": "swizzle 0: these kernels use 1, 128 bytes",
    "proxy_fence_of_another_thread": "without fence.proxy.async between",
    "proxy_fence_before_the_copies_land": "without fence.proxy.async between",
    "two_on_one_accumulator": "ok",
    "accumulator_changed_after_the_fence": "registers of d of thread",
    "operand_changed_after_the_fence": "registers of a of thread",
    "operand_changed_in_flight": "changed before the wait",
    "accumulator_changed_in_flight": "changed before the wait",
    "accumulator_read_in_flight": "ok",
    "in_flight": "nan",
    "waits_for_one_group_too_few": "wgmma.wait_group 1: its accumulators are still in flight",
    "waits_for_the_older_group": "ok",
    "operand_overwritten_in_flight": "which a wgmma that was not waited for reads",
    "operand_overwritten_before_others_have_read": "race: ",
    "released_after_the_wait": "ok",
    "released_before_the_wait": "which a wgmma that was not waited for reads",
    "released_by_one_warp_for_all": "wgmma",
    "warps_at_different_wgmma": "divergence: warps of a warpgroup at different wgmma",
    "a_warp_without_wgmma": "divergence: warp 3 issued 0 wgmma, others of its warpgroup 1",
    "lanes_at_different_wgmma": "divergence: lanes of a warp at different wgmma",
}


@pytest.fixture(scope="module", params=emulated.COMPILERS)
def rules(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> what happened, of hopper_rules.cpp."""
    return emulated.lines(emulated.build(request.param, "hopper_rules.cpp", tmp_path_factory.mktemp("rules")))


def test_every_rule_has_an_expectation(rules: dict[str, str]) -> None:
    assert set(rules) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_rule(rules: dict[str, str], name: str) -> None:
    if EXPECTED[name] == "ok":
        assert rules[name] == "ok"
    else:
        assert EXPECTED[name] in rules[name]


@pytest.mark.parametrize("compiler", emulated.COMPILERS)
def test_twins_compute_what_the_instructions_say(compiler: str, tmp_path: pathlib.Path) -> None:
    found = emulated.lines(emulated.build(compiler, "twins.cu", tmp_path))
    assert len(found) == 17 and set(found.values()) == {"ok"}, found


def test_descriptors_are_those_that_triton_makes(tmp_path: pathlib.Path) -> None:
    ours = emulated.lines(emulated.build(emulated.COMPILERS[0], "descriptors.cpp", tmp_path))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    script = pathlib.Path(__file__).parent / "triton_product.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert len(ours) == 5 and ours == theirs
