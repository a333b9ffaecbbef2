"""csrc/cpu's attention as a program of its own (attention_test.cpp): under sanitizers."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def test_under_address_and_undefined_behaviour_sanitizers(tmp_path: pathlib.Path) -> None:
    """Every tensor ends where its heap block ends, so a lane too many is an error.

    The portable instruction set: the sources are the same for all. -O0, since GCC takes minutes to instrument the
    unrolled register blocks.
    """
    program, source = tmp_path / "sanitized", ROOT / "tests" / "csrc" / "attention_test.cpp"
    sanitize = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    include = f"-I{ROOT / 'csrc'}"
    subprocess.run(
        ["g++", "-std=c++20", "-fopenmp", "-w", include, "-DPHI1_ISA=tested", *sanitize, source, "-o", program],
        check=True,
    )
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout + done.stderr[-2000:]
