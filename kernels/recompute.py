"""What a non-reentrant checkpoint's recomputation must not choose anew.

`torch.utils.checkpoint.checkpoint(f, use_reentrant=False)` runs f again in the backward pass, maybe in another thread,
and outside of the `use_backend` block that its forward ran in. What is kept for it hangs on PyTorch's own record of the
checkpoint, which its hooks on saved tensors hold in their closures; no public interface leads there.
"""

import inspect
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_KEPT = "_phi1_kept"


def keep(value: T) -> T:
    """`value`; within a checkpoint's recomputation what the same call (by its number) gave in the forward pass.

    A checkpoint inside another's recomputation is a new one to PyTorch, and keeps what it finds then.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return value
    pack = inspect.unwrap(hooks[0])
    owner = getattr(pack, "__qualname__", "").partition(".")[0]
    if owner == "_checkpoint_hook":
        frame = _closure(pack)["frame"]
        frame.__dict__.setdefault(_KEPT, []).append(value)
    elif owner == "_recomputation_hook":
        closure = _closure(pack)
        frame = closure["target_frame_ref"]()
        kept, at = getattr(frame, _KEPT, []), frame.__dict__.setdefault(f"{_KEPT}_at", {})
        number = at.get(closure["gid"], 0)
        at[closure["gid"]] = number + 1
        if number < len(kept):
            return kept[number]
    return value


def _closure(function: Any) -> dict[str, Any]:
    """The names that a function closes over, and what they are."""
    return {
        name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True)
    }
