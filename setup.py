"""Builds `kernels._native` with CMake and ninja: no torch, at build time or ever.

PHI1_CUDA=auto|on|off      auto: CUDA kernels where nvcc is found
PHI1_CUDA_ARCHS=80;90a     architectures to compile for (PTX for newer cards is added)
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        cuda = os.environ.get("PHI1_CUDA", "auto").lower()
        if cuda not in ("auto", "on", "off"):
            raise SystemExit(f"PHI1_CUDA={cuda!r}: must be auto, on or off")
        compiler = os.environ.get("CXX") or "c++"  # with options, or behind a launcher, as CMake takes it
        if shutil.which(shlex.split(compiler)[0]) is None:
            raise SystemExit(f"no C++ compiler ({compiler}): install one, e.g. `apt-get install g++`, or set CXX")
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPHI1_CUDA={cuda}",
            f"-DPHI1_CUDA_ARCHS={os.environ.get('PHI1_CUDA_ARCHS', '80;90a')}",
        ]
        # pip's isolated build environment has a new path each time: a cached one would be gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_native"], check=True)
        built = next(build.glob("_native*.so"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


setup(ext_modules=[Extension("kernels._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
