"""What a stranger meets first: the preflight, the native module, the package's names."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def preflight(path: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", str(ROOT / "preflight.sh")], capture_output=True, text=True, env={"PATH": str(path), **environment}
    )


@pytest.fixture
def tools(tmp_path: pathlib.Path) -> pathlib.Path:
    """A PATH folder with what preflight.sh uses, this Python as python3, and a compiler."""
    for name in ("df", "awk", "dirname", "cat"):
        (tmp_path / name).symlink_to(shutil.which(name) or f"/usr/bin/{name}")
    (tmp_path / "python3").symlink_to(sys._base_executable)  # type: ignore[attr-defined]
    (tmp_path / "c++").symlink_to(shutil.which("c++") or "/usr/bin/c++")
    return tmp_path


def test_preflight_passes_and_prints_the_python(tools: pathlib.Path) -> None:
    done = preflight(tools)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(tools / "python3")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("python3", r"no Python 3\.10 to 3\.13 .*apt-get install python3"),
        ("c++", r"no C\+\+ compiler .*apt-get install g\+\+"),
    ],
)
def test_preflight_names_what_is_missing(tools: pathlib.Path, missing: str, message: str) -> None:
    (tools / missing).unlink()
    done = preflight(tools)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"phi1: error: {message}.*\n", done.stderr), done.stderr


def test_preflight_refuses_an_old_python(tools: pathlib.Path) -> None:
    (tools / "python3").unlink()
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tools / "python3").chmod(0o755)
    assert "no Python 3.10 to 3.13" in preflight(tools).stderr


def test_preflight_names_a_small_disk(tools: pathlib.Path, tmp_path: pathlib.Path) -> None:
    clone = tmp_path / "clone"  # without a .venv, as a fresh one
    clone.mkdir()
    shutil.copy(ROOT / "preflight.sh", clone)
    done = subprocess.run(
        ["/bin/sh", str(clone / "preflight.sh")],
        capture_output=True,
        text=True,
        env={"PATH": str(tools), "PHI1_NEED_GB": "10000000"},
    )
    assert done.returncode == 2
    assert re.search(r"GB free in .*clone: 10000000 GB are needed", done.stderr)


def test_the_native_module_needs_neither_torch_nor_a_driver() -> None:
    from kernels import _native

    needed = subprocess.run(["readelf", "-d", _native.__file__], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert not [name for name in libraries if re.match(r"lib(torch|c10|cuda|cudart|nv)", name)], libraries
    # It loads in a process that never imports torch.
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('_native', {_native.__file__!r}); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "assert 'torch' not in sys.modules; print([i.name for i in module.isas() if i.missing is None][0], "
        "module.has_cuda)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] in ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    assert done.stdout.split()[1] == str(shutil.which("nvcc") is not None) or os.environ.get("PHI1_CUDA") == "off"


def test_no_native_source_includes_torch() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text(encoding="utf-8")), path


def test_the_package_brings_the_table_of_what_was_measured(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "source"
    for name in ("kernels", "phi1", "data_tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")]
    subprocess.run(command, cwd=source, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert (tmp_path / "built" / "kernels" / "measured.json").read_bytes() == (
        ROOT / "kernels" / "measured.json"
    ).read_bytes()


def test_another_package_named_kernels_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import phi1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pip uninstall kernels" in done.stderr.splitlines()[-1]


def test_a_compiler_may_have_options_and_one_that_is_missing_is_named(tmp_path: pathlib.Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    cmake = tmp_path / "bin" / "cmake"
    cmake.parent.mkdir()
    cmake.write_text("#!/bin/sh\necho configured\nexit 3\n")
    cmake.chmod(0o755)

    def build(compiler: str) -> str:
        environment = {**os.environ, "CXX": compiler, "PATH": f"{cmake.parent}:{os.environ['PATH']}"}
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        return done.stdout + done.stderr

    assert "configured" in build("c++ -O1")
    assert "no C++ compiler (nowhere++ -O1): install one" in build("nowhere++ -O1")
