"""One page: what this machine is, what each op takes on it for which call and why, and what is missing."""

import platform

import torch

from kernels import machine as machines
from kernels import measured, registry
from kernels.machine import Machine
from kernels.measured import PRODUCT_SIZES, WORKS, Cell

_HEAD_DIM = {"flash_attention": 64, "parallel_block": 64}
"""What the page is of; other head_dims may differ."""


def backends() -> str:
    """The page, as `phi1 doctor` prints it."""
    found = [registry.machine_of(device) for device in _devices()]
    return "\n".join(
        [*_facts(found), *(line for machine in found for line in ("", *_choices(machine))), "", *_missing(found)]
    )


def _devices() -> list[torch.device]:
    """The CPU, and of the GPUs one of each kind."""
    gpus: dict[str, torch.device] = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        gpus.setdefault(registry.machine_of(device).kind, device)
    return [torch.device("cpu"), *gpus.values()]


def _facts(found: list[Machine]) -> list[str]:
    cpu, *gpus = found
    sets = [
        name
        for name in ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable")
        if not registry.missing_here(f"cpu/{name}")(cpu)
    ]
    lines = [
        f"CPU      {cpu.name} ({cpu.kind}), {torch.get_num_threads()} threads",
        f"         instruction sets granted: {', '.join(sets) or 'none'}",
    ]
    for gpu in gpus:
        lines.append(f"GPU      {gpu.kind}, driver {machines.driver() or 'unknown'}")
    if not gpus:
        lines.append("GPU      none that torch sees")
    native = cpu.missing.get("cpu") or f"built, {'without' if not machines.native._native.has_cuda else 'with'} CUDA"
    lines.append(f"native   {native}")
    lines.append(f"torch    {torch.__version__}, Python {platform.python_version()}")
    for machine in found:
        path = measured.own_path(machine.kind)
        own = any(cell.kind == machine.kind for cell in measured.read_own(machine))
        lines.append(f"measured {machine.kind}: {path if own else 'not on this machine; `phi1 tune` does it'}")
    forced = registry.forced_backend(None)
    return lines + ([f"forced   every op runs on {forced}"] if forced else [])


def _choices(machine: Machine) -> list[str]:
    """Of each op, dtype, size and work: what automatic choice takes, and why."""
    dtypes = (torch.bfloat16, torch.float32) if machine.device == "cpu" else (torch.bfloat16,)
    rows: list[tuple[str, str, str, str, str]] = []
    for op in registry.ops():
        for dtype in dtypes:
            taken: dict[tuple[str, str, str], list[str]] = {}
            for size, work in sorted(measured.calls(op), key=lambda call: WORKS.index(call[1])):
                cell = Cell(op, machine.kind, dtype, _HEAD_DIM.get(op), size, work)
                order, why = registry.order(machine, cell)
                version = next(v for v in order if registry.runs(op, v, machine))
                taken.setdefault((work, version, why), []).append(size)
            for (work, version, why), sizes in taken.items():
                rows.append((op, str(dtype).removeprefix("torch."), f"{work}, {_joined(sizes)}", version, why))
    lines = [
        f"On {machine.kind}, head_dim 64 (few: up to 16 queries; short: up to 512 keys; long: more; "
        "small: up to 4M multiplications):"
    ]
    table = [("op", "dtype", "work, size", "automatic", "why"), *rows]
    widths = [max(len(row[i]) for row in table) + 2 for i in range(4)]
    return lines + ["".join(f"{row[i]:<{widths[i]}}" for i in range(4)) + row[4] for row in table]


def _joined(sizes: list[str]) -> str:
    """ "few/long"; all of an op's "all"."""
    return "all" if len(sizes) == len(PRODUCT_SIZES) else "/".join(sizes)


def _missing(found: list[Machine]) -> list[str]:
    """Versions that run on none of the devices, by reason."""
    reasons: dict[str, list[str]] = {}
    for version in registry.versions():
        if not any(registry.runs(op, version, machine) for op in registry.ops() for machine in found):
            reasons.setdefault(registry.why_missing(version, found[-1]), []).append(version)
    lines = [f"  {', '.join(names)}: {why}" for why, names in reasons.items()]
    return ["Missing here:", *lines] if lines else ["Nothing is missing."]
