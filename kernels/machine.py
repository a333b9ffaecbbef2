"""The facts of a machine that decide which kernels run on it and how fast."""

import dataclasses
import functools
import importlib.util
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from kernels import native

TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device and what is installed for it."""

    device: str
    """Type of its tensors: "cpu" or "cuda"."""
    kind: str
    """What a measurement on it holds for. A CPU's vendor, family and best instruction set that the kernels may use; a
    GPU's name and compute capability."""
    name: str
    """As its maker calls it."""
    vendor: str = ""
    """Of a CPU, as CPUID says it: "GenuineIntel", "AuthenticAMD"."""
    capability: tuple[int, int] = (0, 0)
    """Of a GPU."""
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of backends ("cuda") and versions ("cpu/avx512") that cannot run here: why not, and what would help."""


@functools.cache
def cpu() -> Machine:
    """The CPU that this process runs on."""
    vendor, family, name = _cpu_identity()
    missing = _installed_for("cpu")
    granted = "no native kernels"
    if native.MISSING is None:
        compiled = {isa.name: isa.missing for isa in native.ISAS}
        why = {name: compiled.get(name, f"not compiled for {platform.machine()}") for name in native.ISA_NAMES}
        missing |= {f"cpu/{name}": reason for name, reason in why.items() if reason is not None}
        granted = next(name for name, reason in why.items() if reason is None)
    kind = ", ".join([f"{vendor} family {family}" if family else vendor, granted])
    return Machine("cpu", kind, name, vendor=vendor, missing=missing)


def gpu(device: torch.device) -> Machine:
    """A GPU that torch sees."""
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Machine(
        "cuda", gpu_kind(name, major, minor), name, capability=(major, minor), missing=_installed_for("cuda")
    )


def gpu_kind(name: str, major: int, minor: int) -> str:
    """`Machine.kind` of a GPU."""
    return f"{name}, sm_{major}{minor}"


def _installed_for(device: str) -> dict[str, str]:
    """`Machine.missing`, as far as it depends on what is installed."""
    found: dict[str, str] = {}
    if native.MISSING is not None:
        found |= {"cpu": native.MISSING, "cuda": native.MISSING}
    elif not native._native.has_cuda:
        found["cuda"] = "kernels._native was built without CUDA; build it where nvcc is: PHI1_CUDA=on pip install -e ."
    elif not torch.cuda.is_available():
        found["cuda"] = "torch.cuda.is_available() is False: no usable NVIDIA GPU, or a CPU build of torch"
    elif not native._native.has_hopper:
        found["cuda/hopper"] = "this build has no hopper kernels; build with 90a in PHI1_CUDA_ARCHS"
    if importlib.util.find_spec("triton") is None:
        found["triton"] = "the package triton is not installed: pip install triton"
    elif not TRITON_INTERPRETED and not torch.cuda.is_available():
        found["triton"] = "no usable GPU; TRITON_INTERPRET=1 in the environment runs Triton kernels on the CPU, slowly"
    elif TRITON_INTERPRETED and device == "cuda":
        found["triton"] = "TRITON_INTERPRET=1 in the environment runs Triton kernels on CPU tensors; unset it"
    return found


def _cpu_identity() -> tuple[str, str, str]:
    """(vendor, family, name), the family empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""

    def field(*names: str) -> str:
        found = re.search(rf"^(?:{'|'.join(names)})\s*: *(.*)$", text, re.MULTILINE)
        return found[1].strip() if found else ""

    vendor = field("vendor_id", "CPU implementer") or platform.machine()
    return vendor, field("cpu family", "CPU architecture"), field("model name") or platform.processor() or vendor


def driver() -> str | None:
    """The NVIDIA driver's version, as the kernel module says it, or None."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module\D*([\d.]+)", text)
    return found[1] if found else text.strip().splitlines()[0]
