"""Which version of which backend serves a call: the table of implementations, the automatic choice, and its overrides.

A backend is one way to run an op: `reference` (plain PyTorch, the ground truth), `torch` (PyTorch's own fast ops),
`cpu` (csrc/cpu), `triton` (kernels/triton), `cuda` (csrc/cuda). The native ones have versions: `cpu/avx512`,
`cuda/mma`, `triton/descriptors`. Each says what it needs of a machine, and which calls it refuses.

The choice, first that is given: the call's `backend=`, the innermost `use_backend` block, the environment variable
PHI1_KERNELS (or PHI1_ISA=avx512, short for PHI1_KERNELS=cpu/avx512), automatic. Automatic takes the first that serves
the call of an order: what a held run took (`held`), else by speed as measured on this kind of machine
(kernels/measured.py), else `fixed_order`. A name that is asked for and cannot serve the call is an error, never
replaced by another; a backend's name without a version leaves the version to the order, and so does a version that only
other ops have.
"""

import contextlib
import contextvars
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from kernels import machine as machines
from kernels import measured, recompute
from kernels.machine import Machine
from kernels.measured import BACKENDS, Cell, Row


class BackendError(ValueError):
    """The backend that was asked for does not exist, is not available here, or cannot serve this call."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One version of one op."""

    forward: Callable[..., Any]
    """The op's module says what it takes and returns."""
    backward: Callable[..., Any] | None
    """Its derivative; None: PyTorch differentiates the forward, which then runs in the caller's graph."""
    differentiable: bool
    """PyTorch may differentiate the forward although there is a backward: so calls run that are not compiled, and have
    derivatives of any order."""
    devices: tuple[str, ...]
    """Device types whose tensors it takes."""
    needs: Callable[[Machine], str | None]
    """Why it cannot run on a machine, or None."""
    refuses: Callable[..., str | None]
    """Given the call's options (keyword arguments), why it cannot serve them, or None."""


_IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}
_machines: dict[torch.device, Machine] = {}
_rows: dict[Cell, Row] = measured.read()
_held: Mapping[str, tuple[str, ...]] = {}
_cache: dict[tuple[Any, ...], str] = {}


# Changes with the tables below, and with it what torch.compile guards on.
_GENERATION = ["0"]
_generations = itertools.count(1)


def _forget(generation: str | None = None) -> None:
    """What was chosen under other tables; generation: theirs, if these are tables that there were before."""
    _cache.clear()
    _GENERATION[0] = generation or str(next(_generations))


def generation() -> str:
    """What changes when a choice may: versions that came or went, tables that were read, orders that are held."""
    return _GENERATION[0]


def backend_of(version: str) -> str:
    """ "cpu/avx512" -> "cpu"."""
    return version.partition("/")[0]


def missing_here(version: str) -> Callable[[Machine], str | None]:
    """The usual `needs`: what the machine says is missing, of the version or its backend."""

    def needs(machine: Machine) -> str | None:
        return machine.missing.get(backend_of(version)) or machine.missing.get(version)

    return needs


def register(
    op: str,
    version: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    *,
    differentiable: bool = False,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    needs: Callable[[Machine], str | None] | None = None,
    refuses: Callable[..., str | None] = lambda **options: None,
) -> None:
    """Adds `version` of `op`: a backend's name, or "backend/version". See `Implementation` for the rest.

    Raises ValueError if the op has it already, or there is no such backend.
    """
    if backend_of(version) not in BACKENDS:
        raise ValueError(f"version = {version!r}: must begin with one of {', '.join(BACKENDS)}")
    table = _IMPLEMENTATIONS.setdefault(op, {})
    if version in table:
        raise ValueError(f"{op} has a version {version!r} already: give the second another name")
    table[version] = Implementation(forward, backward, differentiable, devices, needs or missing_here(version), refuses)
    _forget()


@contextlib.contextmanager
def replacing(backend: str) -> Iterator[None]:
    """Within the block no op has a version of `backend` but those that are registered there. For tests."""
    before = {op: dict(table) for op, table in _IMPLEMENTATIONS.items()}
    for op, table in before.items():
        _IMPLEMENTATIONS[op] = {version: found for version, found in table.items() if backend_of(version) != backend}
    _forget()
    try:
        yield
    finally:
        _IMPLEMENTATIONS.update(before)
        _forget()


def versions() -> list[str]:
    """All versions of all ops, by backend."""
    found = dict.fromkeys(version for table in _IMPLEMENTATIONS.values() for version in table)
    return sorted(found, key=lambda version: BACKENDS.index(backend_of(version)))


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS and not any(name in table for table in _IMPLEMENTATIONS.values()):
        native = [version for version in versions() if version not in BACKENDS]
        raise BackendError(f"{where} = {name!r}: must be one of {', '.join(BACKENDS)}, or of {', '.join(native)}")
    return name


# ------------------------------------------------------------------------------------------------- overrides

# Of this thread and task. Compiled code cannot ask a context variable; what it asks instead is in `_FORCED_COMPILED`,
# of the whole process, on which torch.compile guards.
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("phi1_forced_backend", default=None)
_FORCED_COMPILED: list[str] = []
_ENTERED: list[object] = []  # the block of each of these
_environment: str | None = None


def read_environment() -> None:
    """Takes the override of PHI1_KERNELS or PHI1_ISA. Raises BackendError if there is no such version, or not here."""
    global _environment
    name, isa = os.environ.get("PHI1_KERNELS"), os.environ.get("PHI1_ISA")
    _environment = None
    if isa:
        if name and name != f"cpu/{isa}":
            raise BackendError(
                f"PHI1_ISA = {isa!r} is short for PHI1_KERNELS = 'cpu/{isa}', which is {name!r}: unset one"
            )
        name = f"cpu/{isa}"
    if not name:
        return
    where = "environment variable " + ("PHI1_ISA" if isa else "PHI1_KERNELS")
    if isa and isa not in machines.native.ISA_NAMES:
        raise BackendError(f"{where} = {isa!r}: must be one of {', '.join(machines.native.ISA_NAMES)}")
    _checked(name, where)
    if name not in BACKENDS:
        here = [machines.cpu()] if backend_of(name) == "cpu" else []  # asking for a GPU would start its driver
        for why in filter(None, (missing_here(name)(machine) for machine in here)):
            raise BackendError(f"{where} = {isa or name!r}: {why}")
    _environment = name
    _forget()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op that this thread or task calls without `backend=` runs on `name`.

    name: a backend, or one version of it ("cpu/avx512"). Functions under torch.compile follow the block that was
    entered last in the whole process: what they guard on knows no threads.
    """
    token = _forced.set(_checked(name, "use_backend(name)"))
    _FORCED_COMPILED.append(name)
    _ENTERED.append(token)
    try:
        yield
    finally:
        at = next(i for i, entered in enumerate(_ENTERED) if entered is token)
        del _ENTERED[at], _FORCED_COMPILED[at]
        _forced.reset(token)


def forced_backend(requested: str | None) -> str | None:
    """What the caller, a `use_backend` block or the environment asks for, or None (automatic)."""
    if requested is not None:
        return _checked(requested, "backend")
    if torch.compiler.is_compiling():
        return _FORCED_COMPILED[-1] if _FORCED_COMPILED else _environment
    return recompute.keep(_forced.get()) or _environment


# ------------------------------------------------------------------------------------------------- the choice


def fixed_order(machine: Machine, cell: Cell) -> tuple[str, ...]:
    """What automatic choice tries, in turn, where nothing of the cell was measured on the kind of machine.

    On a GPU ours come after PyTorch's own ops until measurements put them first. Some did (an H200, torch 2.11,
    bench/results/ first-gpu-run): at compute capability 9.0 the layer (1.22 times plain PyTorch forward, 1.07 with the
    backward, and PyTorch's residual mask is 142 kernels), the loss (1.9) and rotary (2.2) come before PyTorch's;
    attention without dropout does not, PyTorch takes cuDNN's there. On a CPU the most capable instruction set first,
    but for what is known to be slower:

    - On an Intel CPU `vdpbf16ps` runs at 110 to 150 GFLOP/s on two cores, half of what Zen 4 has, so that AVX-512's own
      multiplications beat it in every case (2 cores of a Xeon, Emerald Rapids, torch 2.13.0).
    - Without AMX PyTorch's attention in bf16 beats both there on long sequences, in the forward pass (up to 2.6 times)
      and, from head_dim 64 on, with the backward.
    - AVX2's attention with few queries in float32, at 0.88 of PyTorch's speed for two (Zen 4, 2,048 keys), 0.75 for one
      (Zen 3, 544 keys), and its LayerNorm, at 0.54 to 0.89 (Zen 3, hidden 512; bf16 and float32, one thread).
    - Products of a few rows by our loops without AMX, but for AVX2's on an AMD CPU from two rows on: 1.2 to 2.1 times
      MKL's speed in float32 with 16, 1.6 to 4.6 with 4, in bf16 3.3 to 4.7 with 16 (Zen 3, one thread, busy machine).
    - Code without vector instructions always.
    """
    if machine.device != "cpu":
        ours = ("cuda/hopper", "cuda/mma", "cuda", "triton/descriptors", "triton/pointers", "triton/product", "triton")
        ours_first = machine.capability == (9, 0) and cell.op in (
            "parallel_block",
            "linear_cross_entropy",
            "apply_rotary",
        )
        return (*ours, "torch", "reference") if ours_first else ("torch", *ours, "reference")
    bf16, intel, attention = (
        cell.dtype == torch.bfloat16,
        machine.vendor == "GenuineIntel",
        cell.op == "flash_attention",
    )
    native = ["cpu/avx512_bf16", "cpu/avx512"] if bf16 and not intel else ["cpu/avx512", "cpu/avx512_bf16"]
    native = [version for version in (*native, "cpu/avx2") if missing_here(version)(machine) is None]
    slower = False  # than PyTorch's op
    if attention and bf16 and intel and cell.size == "long" and native[:1] == ["cpu/avx512"]:
        slower = cell.work == "forward" or cell.head_dim != 32
    if cell.op == "product":
        slower = native[:1] != ["cpu/avx2"] or intel or cell.size.startswith("1-row")
    elif native[:1] == ["cpu/avx2"]:
        slower = cell.op == "layer_norm" or (attention and cell.dtype == torch.float32 and cell.size == "few")
    ordered = ["torch", *native] if slower else [*native, "torch"]
    if bf16 and missing_here("cpu/amx_bf16")(machine) is None:  # without bf16 it is avx512_bf16's code
        ordered.insert(0, "cpu/amx_bf16")
    return (*ordered, "cpu/portable", "reference")


def machine_of(device: torch.device) -> Machine:
    """The machine of a device's tensors. The first time its user's own measurements are read, too."""
    found = _machines.get(device)
    if found is None:
        if device.type == "cpu":
            found = machines.cpu()
        else:
            found = machines.gpu(device) if device.type == "cuda" else Machine(device.type, device.type, device.type)
        _rows.update(measured.read_own(found))
        _machines[device] = found
    return found


def read_tables() -> None:
    """Reads again what was measured: the table that comes with the package, and the user's own over it."""
    _machines.clear()
    _rows.clear()
    _rows.update(measured.read())
    _forget()


@contextlib.contextmanager
def held(orders: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Within the block, in the whole process, cells named in `orders` keep that order; see `orders`."""
    global _held
    before, generation, _held = _held, _GENERATION[0], orders
    _forget()
    try:
        yield
    finally:
        _held = before
        _forget(generation)


def order(machine: Machine, cell: Cell) -> tuple[tuple[str, ...], str]:
    """(what automatic choice tries for a call of the cell, in turn; where that order comes from)."""
    kept = _held.get(cell.name)
    if kept is not None:
        return kept, "kept from the run's checkpoint"
    rest = fixed_order(machine, cell)
    row = _rows.get(cell._replace(kind=machine.kind))
    if row is None:
        return rest, "fixed order: not measured on this kind of machine"
    rest = tuple(version for version in rest if version not in row.speed and version not in row.failed)
    return (*row.speed, *rest), "; ".join(row.results)


def _why_not(op: str, version: str, machine: Machine, options: Mapping[str, Any]) -> str | None:
    implementation = _IMPLEMENTATIONS[op].get(version)
    if implementation is None:
        return f"{op} has no {version} backend"
    why = implementation.needs(machine)
    if why is not None:
        return why
    if machine.device not in implementation.devices:
        return f"it takes tensors on {' or '.join(implementation.devices)}, not on {machine.device}"
    return implementation.refuses(**options)


def _why_none(op: str, names: list[str], machine: Machine, options: Mapping[str, Any]) -> str:
    """Why no version of a backend serves a call: of those that run here the call's fault, else what each lacks."""
    here = [v for v in names if machine.device in _IMPLEMENTATIONS[op][v].devices]
    here = [v for v in here if _IMPLEMENTATIONS[op][v].needs(machine) is None] or here or names
    reasons: dict[str, list[str]] = {}
    for version in here:
        reasons.setdefault(str(_why_not(op, version, machine, options)), []).append(version)
    return "; ".join(why if len(reasons) == 1 else f"{', '.join(names)}: {why}" for why, names in reasons.items())


def select(
    op: str,
    machine: Machine,
    forced: str | None,
    *,
    dtype: torch.dtype,
    head_dim: int | None = None,
    size: str = "long",
    training: bool = False,
    **options: Any,
) -> str:
    """The version for a call of `op` on `machine`, of `forced` or, if that is None, of all.

    size: `measured.size_class` of the call. training: a backward pass may follow. options: what else `refuses` looks
        at.
    Raises BackendError if there is none.
    """
    cell = Cell(op, machine.kind, dtype, head_dim, size, "training" if training else "forward")
    options = {"dtype": dtype, "head_dim": head_dim, **options} if head_dim is not None else {"dtype": dtype, **options}
    table = _IMPLEMENTATIONS[op]
    if forced is not None and forced in table:
        ordered: list[str] = [forced]
    else:
        ordered = [version for version in order(machine, cell)[0] if version in table]
        if forced is not None:
            ordered += [version for version in table if version not in ordered]
            ordered = [version for version in ordered if backend_of(version) == backend_of(forced)]
    for version in ordered:
        if _why_not(op, version, machine, options) is None:
            return version
    if forced is None:
        raise BackendError(f"{op}: no backend serves tensors on {machine.device!r}; move them to cpu or cuda")
    reason = _why_none(op, ordered, machine, options) if ordered else f"{op} has no {forced} backend"
    able = [version for version in versions() if version in table and _why_not(op, version, machine, options) is None]
    raise BackendError(f"{op}: backend {forced!r} cannot serve this call: {reason}; able: {', '.join(able)}")


def differentiated(*tensors: torch.Tensor) -> bool:
    """Whether a backward pass may follow a call that takes these."""
    return torch.is_grad_enabled() and any([x.requires_grad for x in tensors])


@torch._dynamo.assume_constant_result
def _select_once(generation: str, op: str, device: torch.device, forced: str | None, **call: Any) -> str:
    """`select` where torch.compile traces: a constant of the graph. It guards on `generation`."""
    return select(op, machine_of(device), forced, **call)


def choose(op: str, device: torch.device, requested: str | None, **call: Any) -> str:
    """The version for this call of `op` on tensors on `device`; see `select` for `call`.

    Raises BackendError if what is asked for cannot serve the call.
    """
    forced = forced_backend(requested)
    if torch.compiler.is_compiling():
        # A number may be a symbol there; in a set it becomes the value that the graph then holds for.
        fixed = {name: next(iter({x})) if isinstance(x, int | float) else x for name, x in call.items()}
        return _select_once(_GENERATION[0], op, device, forced, **fixed)
    key = (op, device, forced, *call.items())
    found = _cache.get(key)
    if found is None:
        found = _cache[key] = select(op, machine_of(device), forced, **call)
    return found


def implementation(op: str, name: str) -> Implementation:
    """A version of `op`; of a backend's name the first version that runs here."""
    found = _IMPLEMENTATIONS[op].get(name)
    if found is None:
        here = [machines.cpu(), *_machines.values()]
        ordered = [v for v in _IMPLEMENTATIONS[op] if backend_of(v) == name and any(runs(op, v, m) for m in here)]
        if not ordered:
            raise BackendError(f"{op} has no {name} backend here")
        found = _IMPLEMENTATIONS[op][ordered[0]]
    return found


def in_graph(op: str, name: str) -> Callable[..., Any] | None:
    """The forward of a version whose forward PyTorch differentiates in the caller's graph; None of one that runs as an
    operator of its own with its own backward."""
    found = implementation(op, name)
    opaque = found.backward is not None and (torch.compiler.is_compiling() or not found.differentiable)
    return None if opaque else found.forward


def ops() -> list[str]:
    """The ops' names."""
    return list(_IMPLEMENTATIONS)


def runs(op: str, version: str, machine: Machine) -> bool:
    """Whether a version of the op can run on the machine, whatever the call."""
    found = _IMPLEMENTATIONS[op].get(version)
    return found is not None and machine.device in found.devices and found.needs(machine) is None


def why_missing(version: str, machine: Machine) -> str:
    """Why a version that runs for no op on the machine does not."""
    found = next(table[version] for table in _IMPLEMENTATIONS.values() if version in table)
    return found.needs(machine) or f"it takes tensors on {' or '.join(found.devices)}"


def serves(op: str, version: str, machine: Machine, options: Mapping[str, Any]) -> bool:
    """Whether a version exists, runs on the machine, and serves calls of the op with these options."""
    return version in _IMPLEMENTATIONS[op] and _why_not(op, version, machine, options) is None


def has(op: str, version: str) -> bool:
    """Whether the op has such a version, wherever it runs."""
    return version in _IMPLEMENTATIONS[op]


def measured_here(machine: Machine) -> bool:
    """Whether anything was measured on the machine's kind, by the user or for the package."""
    return any(cell.kind == machine.kind for cell in _rows)


def orders(machine: Machine, dtype: torch.dtype, head_dim: int) -> dict[str, tuple[str, ...]]:
    """By `Cell.name` what automatic choice tries on the machine, of what can run: what a run records and `held`
    takes.
    """
    found: dict[str, tuple[str, ...]] = {}
    for op in _IMPLEMENTATIONS:
        of_heads = head_dim if op in ("flash_attention", "parallel_block") else None
        for size, work in measured.calls(op):
            cell = Cell(op, machine.kind, dtype, of_heads, size, work)
            found[cell.name] = tuple(version for version in order(machine, cell)[0] if runs(op, version, machine))
    return found
