"""Fuzzes until the time is up: `python tests/fuzz [minutes] [first seed]`, or `make fuzz`.

Rounds of every op on every backend, each with a seed of its own, so that another round of the same seed draws the same
calls. The first call that breaks a rule is made as small as hypothesis can, printed with its seed, kept in
build/fuzz (and tried first the next time), and ends the run with status 1.
"""

import collections
import contextlib
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels"), str(ROOT / "tests" / "fuzz")]

from cpu_isa import CPU_BACKENDS  # noqa: E402
from emulator import as_cuda_backend, build, load  # noqa: E402
from fuzzers import FUZZERS  # noqa: E402
from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from hypothesis.database import DirectoryBasedExampleDatabase  # noqa: E402

KEPT = ROOT / "build" / "fuzz"
EXAMPLES = {"cpu": 100, "cuda": 3, "triton": 3}
"""Of an op in a round: what is emulated or interpreted takes its time."""


def fuzz_once(op: str, backend: str, number: int) -> int:
    """One op on one backend with one seed. Returns how many calls were tried; raises what a call raises."""
    calls, check = FUZZERS[op]
    count = 0

    @settings(
        max_examples=EXAMPLES[backend.partition("/")[0]],
        deadline=None,
        print_blob=True,
        database=DirectoryBasedExampleDatabase(KEPT / op / backend),
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(call=calls(backend))
    def run(call: object) -> None:
        nonlocal count
        count += 1
        check(backend, call)

    run()
    return count


def main(minutes: float, first_seed: int) -> int:
    counts: collections.Counter[str] = collections.Counter()
    backends = [*CPU_BACKENDS, "cuda", "triton"]
    end, number = time.monotonic() + 60 * minutes, first_seed
    where = ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_cuda_backend(load(build())))
        try:
            while time.monotonic() < end:
                for op in FUZZERS:
                    for backend in backends:
                        where = f"{op} on {backend}, seed {number}"
                        counts[f"{op} {backend}"] += fuzz_once(op, backend, number)
                number += 1
                print(f"seed {number - 1}: {sum(counts.values())} calls so far, no finding", flush=True)
        except BaseException:
            print(f"finding, or stopped: {where}, kept in {KEPT}", flush=True)
            raise
        finally:
            print(f"seeds {first_seed} to {number}, {sum(counts.values())} calls")
            for name, count in sorted(counts.items()):
                print(f"  {name}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(
        main(
            float(sys.argv[1]) if len(sys.argv) > 1 else 60.0,
            int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time()),
        )
    )
