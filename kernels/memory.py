"""Fresh memory for large results on a CPU, in huge pages where Linux gives them.

A tensor of 15 MB is 3,600 pages of 4 KiB, and a thread stops at its first touch of each. Where the allocator had no
memory to give again, that was 11 of the 37 ms of a bf16 layer's forward pass (2 x 1,024 tokens, hidden 512, two threads
of an Intel Xeon with AMX, in a virtual machine). Of 2 MiB they are 7 pages.
"""

import ctypes
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE = 2 << 20
_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of `shape` on like's device, of its dtype if none is given; its elements are whatever was there.

    From 4 MiB on a CPU the system is asked to back the whole huge pages inside it with such. It may decline (huge pages
    turned off, memory in pieces): the tensor is the same.
    """
    x = like.new_empty(shape, dtype=dtype)
    if _madvise is not None and x.nbytes >= 2 * _HUGE and x.device.type == "cpu":
        first = -(-x.data_ptr() // _HUGE) * _HUGE
        _madvise(first, (x.data_ptr() + x.nbytes) // _HUGE * _HUGE - first, mmap.MADV_HUGEPAGE)
    return x


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of two matrices, by the vendor's library (oneDNN, cuBLASLt), in memory of `empty`."""
    return torch.mm(a, b, out=empty(a, (a.shape[0], b.shape[1])))
