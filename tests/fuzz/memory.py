"""Memory as a fuzzer wants it: inputs inside NaN, fresh memory full of NaN with bands around it that must stay."""

import contextlib
import ctypes
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

BAND = 64  # elements on each side: 128 bytes of 16-bit numbers, which keeps the alignment
LAYOUTS = ("contiguous", "sliced", "odd", "transposed", "reversed_dims", "expanded", "every_other")


def laid_out(value: Tensor, layout: str) -> Tensor:
    """A tensor equal to `value` (but for "expanded", equal along its first dim) in another layout, NaN around it."""
    shape = value.shape
    if layout == "expanded":
        return value[:1].contiguous().expand(shape)
    if layout == "transposed":
        return value.transpose(-1, 0).contiguous().transpose(-1, 0)
    if layout == "reversed_dims":
        dims = (*range(value.dim() - 2, -1, -1), value.dim() - 1)
        back = tuple(dims.index(i) for i in range(value.dim()))
        return value.permute(dims).contiguous().permute(back)
    if layout == "contiguous" or value.dim() == 0:
        return value.clone()
    step = 2 if layout == "every_other" else 1
    at = {"sliced": 16, "odd": 3, "every_other": 1}[layout]
    wide = torch.full(
        (*shape[:-2], shape[-2] * step + 2, shape[-1] + 24) if value.dim() > 1 else (shape[-1] + 24,),
        float("nan"),
        dtype=value.dtype,
    )
    inner = wide[..., at : at + shape[-1]]
    view = inner[..., 1 : 1 + shape[-2] * step : step, :] if value.dim() > 1 else inner
    return view.copy_(value)


layouts = st.sampled_from(LAYOUTS)


@contextlib.contextmanager
def poisoned_and_guarded() -> Iterator[None]:
    """Within the block the kernels' new tensors hold NaN and lie between bands; at its end no band may have changed.

    What C++ allocates for itself is filled with 0x7f bytes, 3.4e38 or NaN as numbers (glibc's M_PERTURB).
    """
    bands: list[Tensor] = []
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    new_empty = torch.Tensor.new_empty
    empty = originals["empty"]

    def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
        count = torch.Size(shape).numel()
        whole = empty(count + 2 * BAND, dtype=dtype, device=device)
        whole.fill_(float("nan") if dtype.is_floating_point else 1)
        for band in (whole[:BAND], whole[BAND + count :]):
            bands.append(band.fill_(77))
        return whole[BAND : BAND + count].view(shape)

    def sizes(size: tuple[Any, ...]) -> tuple[int, ...]:
        return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)

    def guarded_empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        return guarded(sizes(size), dtype or torch.get_default_dtype(), device)

    def guarded_new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return guarded(sizes(size), dtype or self.dtype, device or self.device)

    def guarded_like(x: Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        return guarded(tuple(x.shape), dtype or x.dtype, device or x.device)

    m_perturb = -6
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_perturb, 0x80)
    try:
        with (
            unittest.mock.patch.object(torch, "empty", guarded_empty),
            unittest.mock.patch.object(torch, "empty_like", guarded_like),
            unittest.mock.patch.object(torch.Tensor, "new_empty", guarded_new_empty),
        ):
            yield
    finally:
        torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]  # patch would leave a copy on the subclass
        if mallopt is not None:
            mallopt(m_perturb, 0)
    assert all(bool((band == 77).all()) for band in bands), "written beside a tensor"
