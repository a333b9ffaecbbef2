"""The CUDA kernels under the emulator, built by each compiler with AddressSanitizer: what is in bounds passes, and what
is not dies, also where the emulator was told of more memory than there is."""

import pathlib
import subprocess

import emulated
import pytest


@pytest.fixture(scope="module", params=emulated.COMPILERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """address.cpp with every kernel for bfloat16 and head_dim 64."""
    folder = tmp_path_factory.mktemp("address")
    empty = [request.param, "-fsanitize=address", "-xc++", "-", "-o", folder / "empty"]
    if subprocess.run(empty, input="int main() {}", capture_output=True, text=True).returncode:
        pytest.skip(f"{request.param} has no AddressSanitizer (Debian: libclang-rt-14-dev, libasan8)")
    flags = ("-g1", "-fsanitize=address", "-DPHI1_ONE_INSTANCE")
    kernels = (emulated.CSRC / "cuda").rglob("*.cu")
    return emulated.build(request.param, "address.cpp", folder, *flags, *sorted(kernels))


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
