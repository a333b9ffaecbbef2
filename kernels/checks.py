"""Argument checks shared by the ops: each raises a ValueError that names the argument, its value and the remedy."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_like(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    """x has the dtype and the device of reference."""
    if x.dtype != reference.dtype:
        raise ValueError(
            f"{name}.dtype = {x.dtype}, {reference_name}.dtype = {reference.dtype}: must be equal; use "
            f"{name}.to({reference.dtype})"
        )
    check_device(name, x, reference_name, reference)


def check_device(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    """x is on the device of reference."""
    if x.device != reference.device:
        raise ValueError(
            f"{name} is on {x.device}, {reference_name} on {reference.device}: move one to the other's device"
        )


def check_dtype(name: str, x: Tensor) -> None:
    """x is a tensor of a floating dtype that the ops take."""
    check_tensor(name, x)
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}.dtype = {x.dtype}: must be float64, float32, bfloat16 or float16")


def check_tensor(name: str, x: object, meaning: str = "") -> None:
    """x is a tensor, and not None, say."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} = {x!r}: must be a tensor{': ' if meaning else ''}{meaning}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """x is a tensor and has exactly this shape."""
    if not isinstance(x, Tensor):
        instead = "where there is none, give zeros (ones for a LayerNorm's weight)"
        raise ValueError(f"{name} = {x!r}: must be a tensor of shape {shape} {meaning}; {instead}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}.shape = {tuple(x.shape)}: must be {shape} {meaning}")


def check_whole(name: str, x: int, meaning: str = "a whole number") -> int:
    """x as an int; NumPy's are whole numbers, too."""
    if isinstance(x, int):
        return x
    try:
        return operator.index(x)
    except TypeError as error:
        raise ValueError(f"{name} = {x!r}: must be {meaning}") from error


def check_int64(name: str, x: int) -> int:
    """x as an int that operators take."""
    x = check_whole(name, x)
    if not -(2**63) <= x < 2**63:
        raise ValueError(f"{name} = {x}: must fit 64 bits")
    return x


def check_rank(name: str, x: Tensor, rank: int, meaning: str) -> None:
    """x is a tensor and has this many dims."""
    check_tensor(name, x, meaning)
    if x.dim() != rank:
        raise ValueError(f"{name}.shape = {tuple(x.shape)}: must be {meaning}")


def check_float32(name: str, x: Tensor) -> None:
    """x is float32."""
    if x.dtype != torch.float32:
        raise ValueError(f"{name}.dtype = {x.dtype}: must be float32; use {name}.float()")


def check_int32(name: str, x: Tensor) -> None:
    """x is int32."""
    if x.dtype != torch.int32:
        raise ValueError(f"{name}.dtype = {x.dtype}: must be int32; use {name}.int()")


def check_offsets(name: str, offsets: Tensor, length: int) -> None:
    """`offsets` of documents rise from 0 to length. On a GPU, where looking would stop the stream, nothing is
    checked.
    """
    if offsets.device.type != "cpu":
        return
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != length or values != sorted(values):
        raise ValueError(f"{name} = {values}: must rise from 0 to the sequence length, {length}")


def check_positions(positions: Tensor | None, table_rows: int) -> None:
    """The positions are rows of the table, else IndexError. On a GPU nothing is checked, as in `check_offsets`."""
    if positions is None or positions.device.type != "cpu" or positions.numel() == 0:
        return
    if torch.compiler.is_compiling():  # a check that the graph keeps; RuntimeError
        inside = ((positions >= 0) & (positions < table_rows)).all()
        torch._assert_async(inside, f"a position is outside the rotary table, of rows 0..{table_rows - 1}")
        return
    if positions.numel() <= 64:  # of a few a list is faster, by 8 us for one
        values = positions.flatten().tolist()
        low, high = min(values), max(values)
    else:
        low, high = (int(x) for x in torch.aminmax(positions))
    if low < 0 or high >= table_rows:
        raise IndexError(f"positions in [{low}, {high}]: the rotary table has rows 0..{table_rows - 1}")


def _reaches(distance: int, steps: Sequence[tuple[int, int]]) -> bool:
    """Is distance = sum(n * stride) for some 0 <= n <= most of each (stride, most), strides falling?"""
    if not steps:
        return distance == 0
    (stride, most), rest = steps[0], steps[1:]
    beyond = sum(s * m for s, m in rest)
    first, last = max(0, -(-(distance - beyond) // stride)), min(most, distance // stride)
    return any(_reaches(distance - n * stride, rest) for n in range(first, last + 1))


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Is an element of x in the memory of one of y? Of the same dtype, with strides of any kind."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    size = x.element_size()
    # In bytes: the first element of x + its steps - (that of y + its steps) = e, |e| < size. Steps of x are counted
    # from its last element back, so that all have one sign, and e from 1 - size on.
    distance, most = x.data_ptr() - y.data_ptr() + size - 1, {1: 2 * (size - 1)}
    for stride, count in zip(x.stride() + y.stride(), x.shape + y.shape, strict=True):
        most[stride * size] = most.get(stride * size, 0) + count - 1
    distance += sum(stride * size * (count - 1) for stride, count in zip(x.stride(), x.shape, strict=True))
    return _reaches(distance, sorted(((s, n) for s, n in most.items() if s * n), reverse=True))


def overlaps_itself(x: Tensor) -> bool:
    """May two elements of x be at the same place? True also of strides that only look so (a dim inside another's
    gaps).
    """
    reached = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reached:
                return True
            reached += stride * (size - 1)
    return False
