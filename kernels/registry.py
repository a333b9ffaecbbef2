"""Which backend serves a call: the table of implementations, the automatic choice, and its overrides.

A backend is one way to run an op: `reference` (plain PyTorch, the ground truth), `torch` (PyTorch's own
fast ops), `cpu` (csrc/cpu), `triton` (kernels/triton), `cuda` (csrc/cuda). The choice, first that is given:
the call's `backend=`, the innermost `use_backend` block, the environment variable PHI1_KERNELS, automatic: what was
measured fastest for this op, device, dtype and head_dim (kernels/measured.json), a fixed order where nothing was.
A backend that is asked for by name and cannot serve the call is an error, never replaced by another.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kernels import measured
from kernels.measured import BACKENDS, Cell

# Automatic choice takes the fastest that was measured for such a call and can serve it, else the first of these that can.
# That order is for calls without a row: on a GPU ours come after PyTorch's own ops until measurements put them first.
_ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("torch", "cuda", "triton", "reference")}
_MEASURED = measured.read()


class BackendError(ValueError):
    """The backend that was asked for does not exist, is not available here, or cannot serve this call."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One backend of one op."""

    run: Any
    """The function; for an op whose backward is an op of its own, (forward, backward)."""
    devices: tuple[str, ...]
    """Device types whose tensors it takes."""
    missing: str | None
    """Why it is not available on this machine, or None."""
    refuses: Callable[..., str | None]
    """Given the call's options (keyword arguments), why it cannot serve them, or None."""


_IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}


def register(
    op: str,
    backend: str,
    run: Any,
    *,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    missing: str | None = None,
    refuses: Callable[..., str | None] = lambda **options: None,
) -> None:
    """Adds `run` as the `backend` of `op`. See `Implementation` for the other arguments."""
    assert backend in BACKENDS, backend
    _IMPLEMENTATIONS.setdefault(op, {})[backend] = Implementation(run, devices, missing, refuses)


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{where} = {name!r}: must be one of {', '.join(BACKENDS)}")
    return name


_overrides: list[str] = []
if os.environ.get("PHI1_KERNELS"):
    _overrides.append(_checked(os.environ["PHI1_KERNELS"], "environment variable PHI1_KERNELS"))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op that is called without `backend=` runs on backend `name`."""
    _overrides.append(_checked(name, "use_backend(name)"))
    try:
        yield
    finally:
        _overrides.pop()


def forced_backend(requested: str | None) -> str | None:
    """The backend that the caller, a `use_backend` block or the environment asks for, or None (automatic)."""
    if requested is not None:
        return _checked(requested, "backend")
    return _overrides[-1] if _overrides else None


def _why_not(op: str, backend: str, device: str, options: dict[str, Any]) -> str | None:
    implementation = _IMPLEMENTATIONS[op].get(backend)
    if implementation is None:
        return f"{op} has no {backend} backend"
    if implementation.missing is not None:
        return implementation.missing
    if device not in implementation.devices:
        return f"it takes tensors on {' or '.join(implementation.devices)}, not on {device}"
    return implementation.refuses(**options)


def choose(op: str, device: torch.device, requested: str | None, **options: Any) -> str:
    """The backend for this call of `op` on tensors on `device`.

    options: `dtype`, `head_dim` where the op has one, and what else an implementation's `refuses` may look at.
    Raises BackendError if the backend asked for cannot serve the call.
    """
    forced = forced_backend(requested)
    if forced is not None:
        reason = _why_not(op, forced, device.type, options)
        if reason is not None:
            able = [b for b in BACKENDS if _why_not(op, b, device.type, options) is None]
            raise BackendError(f"{op}: backend {forced!r} cannot serve this call: {reason}; able: {', '.join(able)}")
        return forced
    row = _MEASURED.get(Cell(op, measured.device_kind(device), options["dtype"], options.get("head_dim")))
    for backend in (*(row.speed if row is not None else ()), *_ORDER.get(device.type, ("torch", "reference"))):
        if _why_not(op, backend, device.type, options) is None:
            return backend
    raise BackendError(f"{op}: no backend serves tensors on {device.type!r}; move them to cpu or cuda")


def implementation(op: str, backend: str) -> Any:
    """What was registered as `run` for `backend` of `op`."""
    return _IMPLEMENTATIONS[op][backend].run


def backends() -> str:
    """Two tables: of op and backend, is it available here, and why not; of each measured kind of call, what automatic choice takes."""
    lines = [f"{'op':<22}{'backend':<11}{'here':<6}devices / why not"]
    for op, table in _IMPLEMENTATIONS.items():
        for backend in BACKENDS:
            found = table.get(backend)
            reason = f"{op} has no {backend} backend" if found is None else found.missing
            detail = reason if reason is not None else ", ".join(found.devices) if found else ""
            lines.append(f"{op:<22}{backend:<11}{'no' if reason else 'yes':<6}{detail}")
    return "\n".join([*lines, "", *_choices()])


def _choices() -> list[str]:
    """The second table of `backends`: the cells of this machine's devices."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    kinds = {measured.device_kind(device): device.type for device in devices}
    lines = [f"{'op':<22}{'device':<8}{'dtype':<10}{'head_dim':<10}{'automatic':<11}why"]

    def add(op: str, kind: str, dtype: str, head_dim: str, order: tuple[str, ...], why: str) -> None:
        table, device = _IMPLEMENTATIONS[op], kinds[kind]
        usable = [b for b in order if b in table and table[b].missing is None and device in table[b].devices]
        lines.append(f"{op:<22}{kind:<8}{dtype:<10}{head_dim:<10}{usable[0]:<11}{why}")

    for kind, device in kinds.items():
        for op in _IMPLEMENTATIONS:
            for cell, row in _MEASURED.items():
                if (cell.op, cell.device) == (op, kind):
                    speeds = ", ".join(f"{backend} {speed:.2f}" for backend, speed in row.speed.items())
                    dtype, head_dim = str(cell.dtype).removeprefix("torch."), str(cell.head_dim or "any")
                    why = f"measured: {speeds} ({'; '.join(row.results)})"
                    add(op, kind, dtype, head_dim, (*row.speed, *_ORDER[device]), why)
            add(op, kind, "other", "other", _ORDER[device], "unmeasured: the first that can serve the call")
    return lines
