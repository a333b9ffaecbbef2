"""The CUDA kernels under the emulator, built by each compiler with AddressSanitizer: what is in bounds passes, and what
is not dies, also where the emulator was told of more memory than there is."""

import pathlib
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).resolve().parents[3] / "csrc"
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]


@pytest.fixture(scope="module", params=COMPILERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """address.cpp with every kernel for bfloat16 and head_dim 64."""
    path = tmp_path_factory.mktemp("address") / "program"
    empty = [request.param, "-fsanitize=address", "-xc++", "-", "-o", path]
    if subprocess.run(empty, input="int main() {}", capture_output=True, text=True).returncode:
        pytest.skip(f"{request.param} has no AddressSanitizer (Debian: libclang-rt-14-dev, libasan8)")
    emulator = CSRC / "emulator"
    sources = [pathlib.Path(__file__).parent / "address.cpp", emulator / "emulator.cpp", emulator / "block.cpp"]
    command = [
        request.param, "-std=c++20", "-O1", "-g1", "-fsanitize=address", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
        "-Werror", "-DPHI1_EMULATOR", "-DPHI1_ONE_INSTANCE", f"-I{CSRC}", *sources,
        "-xc++", *sorted((CSRC / "cuda").glob("*.cu")), "-o", path,
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return path


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        ("none", None),
        # The launch itself names a row too many: only the end of the heap block tells.
        ("global", "AddressSanitizer: heap-buffer-overflow"),
        ("shared", "+ 4 is outside the block's 512 bytes"),
        ("local", "AddressSanitizer: stack-buffer-overflow"),
    ],
)
def test_what_is_out_of_bounds_dies(program: pathlib.Path, planted: str, message: str | None) -> None:
    done = subprocess.run([program, planted], capture_output=True, text=True, timeout=60)
    if message is None:
        assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
    else:
        assert done.returncode != 0 and "ok" not in done.stdout
        assert message in done.stderr, done.stderr
