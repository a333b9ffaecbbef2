"""torch.autocast and the ops: one rule, on every backend.

In an autocast region of the tensors' device type the ops that are matrix products (`flash_attention`, `parallel_block`,
`linear_cross_entropy`) take their float32, bfloat16 and float16 tensors in the region's dtype, cast where the op is
called and differentiably, as PyTorch casts for `F.linear`; results have the dtype that these inputs give without
autocast. float64 is left alone, as PyTorch leaves it. Within an op there is no autocast, in the backward pass neither:
a product between two pieces would be cast behind the kernels' back. `apply_rotary` and `layer_norm`, which compute in
float32 whatever they are given, keep the dtype of q and k and of x; layer_norm's weight and bias are cast to it.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast region for tensors on `device`, or None outside one."""
    # Devices by name: torch 2.11 cannot trace torch.amp.is_autocast_available. Others, as meta, have none, or none of
    # our ops.
    if device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def cast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a matrix product's input of floating `dtype` on `device` is cast to here: by autocast, or left alone."""
    return dtype if dtype == torch.float64 else autocast_dtype(device) or dtype


def cast_inputs(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates an op whose first parameters are `names`: applies the rule above to those, and runs it without
    autocast.
    """

    def decorate(op: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(op)
        def call(*args: P.args, **options: P.kwargs) -> R:
            first = args[0] if args else options.get(names[0])
            if not isinstance(first, Tensor) or autocast_dtype(first.device) is None:
                return op(*args, **options)
            kind = first.device.type

            def cast(x: Any) -> Any:
                eligible = isinstance(x, Tensor) and x.is_floating_point() and x.device.type == kind
                return x.to(cast_dtype(x.dtype, x.device)) if eligible else x

            positional: tuple[Any, ...] = (*map(cast, args[: len(names)]), *args[len(names) :])
            named: dict[str, Any] = {name: cast(x) if name in names else x for name, x in options.items()}
            with torch.autocast(kind, enabled=False):
                return op(*positional, **named)

        return call

    return decorate


def without_autocast(kernel: Callable[P, R]) -> Callable[P, R]:
    """Decorates what a torch.library operator runs; its first argument is a tensor."""

    @functools.wraps(kernel)
    def call(*args: P.args, **options: P.kwargs) -> R:
        device = args[0].device  # type: ignore[attr-defined]
        if autocast_dtype(device) is None:
            return kernel(*args, **options)
        with torch.autocast(device.type, enabled=False):
            return kernel(*args, **options)

    return call
