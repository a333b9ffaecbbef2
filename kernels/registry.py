"""Which backend serves a call: the table of implementations, the automatic choice, and its overrides.

A backend is one way to run an op: `reference` (plain PyTorch, the ground truth), `torch` (PyTorch's own
fast ops), `cpu` (csrc/cpu), `triton` (kernels/triton), `cuda` (csrc/cuda). The choice, first that is given:
the call's `backend=`, the innermost `use_backend` block, the environment variable PHI1_KERNELS, automatic.
A backend that is asked for by name and cannot serve the call is an error, never replaced by another.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")

# Automatic choice tries these in order. `cpu` first: bench/rotary.py measures it ahead of torch there.
# On a GPU PyTorch's own ops come first until our kernels have been measured on one.
_ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("torch", "cuda", "triton", "reference")}


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


def choose(op: str, device: str, requested: str | None, **options: Any) -> str:
    """The backend for this call of `op` on tensors of type `device` ("cpu", "cuda").

    options: what an implementation's `refuses` may look at (dropout_p, dtype, ...).
    Raises BackendError if the backend asked for cannot serve the call.
    """
    forced = forced_backend(requested)
    if forced is not None:
        reason = _why_not(op, forced, device, options)
        if reason is not None:
            able = [b for b in BACKENDS if _why_not(op, b, device, options) is None]
            raise BackendError(f"{op}: backend {forced!r} cannot serve this call: {reason}; able: {', '.join(able)}")
        return forced
    for backend in _ORDER.get(device, ("torch", "reference")):
        if _why_not(op, backend, device, options) is None:
            return backend
    raise BackendError(f"{op}: no backend serves tensors on {device!r}; move them to cpu or cuda")


def implementation(op: str, backend: str) -> Any:
    """What was registered as `run` for `backend` of `op`."""
    return _IMPLEMENTATIONS[op][backend].run


def backends() -> str:
    """A table, one line per op and backend: is it available here, and why not."""
    lines = [f"{'op':<22}{'backend':<11}{'here':<6}devices / why not"]
    for op, table in _IMPLEMENTATIONS.items():
        for backend in BACKENDS:
            found = table.get(backend)
            reason = f"{op} has no {backend} backend" if found is None else found.missing
            detail = reason if reason is not None else ", ".join(found.devices) if found else ""
            lines.append(f"{op:<22}{backend:<11}{'no' if reason else 'yes':<6}{detail}")
    return "\n".join(lines)
