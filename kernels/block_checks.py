"""Checks of `parallel_block`'s arguments: each raises a ValueError that names the argument, its value and the
remedy.
"""

import torch
from torch import Tensor

from kernels.attention import check_documents
from kernels.checks import check_device, check_dtype, check_int32, check_like, check_shape, check_tensor
from kernels.reference import BlockShape, CacheRows, KVCache
from kernels.rotary import check_table


def check_block(
    x: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    table: tuple[Tensor, Tensor],
    shape: BlockShape,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    kv_cache: KVCache | None,
) -> int:
    """All of a call but its seed and its backend. Returns the MLP's inner width.

    parameters: norm_weight, norm_bias, w_in, b_in, w_out, b_out. table: cos, sin.
    """
    if not isinstance(shape, BlockShape):
        raise ValueError(f"shape = {shape!r}: must be a kernels.BlockShape (heads, kv_heads, head_dim, …)")
    check_dtype("x", x)
    if x.dim() != 3:
        raise ValueError(f"x.shape = {tuple(x.shape)}: must be (batch, seq, hidden)")
    batch, seq, hidden = x.shape
    if x.numel() == 0:
        raise ValueError(f"x.shape = {tuple(x.shape)}: must hold at least one token of one number")
    q_width, kv_width = shape.attention_width, shape.kv_width
    norm_weight, norm_bias, w_in, b_in, w_out, b_out = parameters
    check_tensor("w_in", w_in)
    width_in = w_in.shape[0] if w_in.dim() == 2 else 0
    inner = width_in - q_width - 2 * kv_width
    if inner <= 0 or w_in.shape[1] != hidden:
        raise ValueError(f"w_in.shape = {tuple(w_in.shape)}: must be ({q_width} + 2 * {kv_width} + inner, {hidden})")
    for name, parameter, dims, meaning in (
        ("norm_weight", norm_weight, (hidden,), "(hidden,), x's last dim"),
        ("norm_bias", norm_bias, (hidden,), "(hidden,), x's last dim"),
        ("w_in", w_in, (width_in, hidden), ""),
        ("b_in", b_in, (width_in,), "(w_in's rows,)"),
        ("w_out", w_out, (hidden, q_width + inner), "(hidden, attention width + inner)"),
        ("b_out", b_out, (hidden,), "(hidden,)"),
    ):
        check_shape(name, parameter, dims, meaning)
        check_like(name, parameter, "x", x)
    if cu_seqlens is not None:
        check_documents(cu_seqlens, cu_seqlens, x)
    if kv_cache is not None:
        if not isinstance(kv_cache, tuple) or len(kv_cache) != 3:
            raise ValueError(f"kv_cache: must be a tuple of keys, values and length, not {type(kv_cache).__name__}")
        keys, values, length = kv_cache
        if not isinstance(length, int | Tensor | CacheRows):
            raise ValueError(f"kv_cache[2] = {length!r}: must be a whole number, or with cu_seqlens an int32 tensor")
        if isinstance(length, Tensor | CacheRows) != (cu_seqlens is not None):
            raise ValueError(
                "kv_cache[2]: must be a number, or with cu_seqlens an int32 tensor of a number for each document"
            )
        if isinstance(length, CacheRows) and length.row.shape[0] != batch * seq:
            raise ValueError(
                f"kv_cache[2] is of {length.row.shape[0]} tokens, x of {batch * seq}: make another by cache_rows"
            )
        for name, cache in (("kv_cache[0]", keys), ("kv_cache[1]", values)):
            _check_cache(name, cache, length, x, cu_seqlens, shape)
    check_table(x, batch, seq, shape.head_dim, *table, positions)
    return inner


def _check_cache(
    name: str, cache: Tensor, length: int | Tensor | CacheRows, x: Tensor, cu_seqlens: Tensor | None, shape: BlockShape
) -> None:
    """Raises ValueError unless x's tokens fit into `cache` (keys or values): backends write there without another
    look.
    """
    batch, seq, _ = x.shape
    if cu_seqlens is not None:
        batch = cu_seqlens.shape[0] - 1
    heads = shape.kv_heads, shape.head_dim
    if cache.dim() != 4 or cache.shape[0] < batch or tuple(cache.shape[2:]) != heads:
        raise ValueError(
            f"{name}.shape = {tuple(cache.shape)}: must be ({batch} or more, capacity, {heads[0]}, {heads[1]})"
        )
    check_like(name, cache, "x", x)
    if isinstance(length, CacheRows):
        if length.capacity != cache.shape[1]:
            raise ValueError(
                f"{name}.shape[1] = {cache.shape[1]}, kv_cache[2].capacity = {length.capacity}: must be equal"
            )
        return
    if isinstance(length, Tensor):
        assert cu_seqlens is not None
        check_rows(name, length, cu_seqlens, cache.shape[1])
        return
    if length < 0:
        raise ValueError(f"kv_cache[2] = {length}: must be the number of tokens so far")
    if length + seq > cache.shape[1]:
        raise ValueError(
            f"{name} holds {length} of {cache.shape[1]} tokens: {seq} more do not fit; make a longer cache"
        )


def check_rows(name: str, lengths: Tensor, cu_seqlens: Tensor, capacity: int) -> None:
    """Raises ValueError unless each document fits behind its row's tokens. On a GPU only shapes are looked at."""
    check_shape("kv_cache[2]", lengths, (cu_seqlens.shape[0] - 1,), "(documents,)")
    check_int32("kv_cache[2]", lengths)
    check_device("kv_cache[2]", lengths, "cu_seqlens", cu_seqlens)
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for row, (length, new) in enumerate(zip(lengths.tolist(), cu_seqlens.diff().tolist(), strict=True)):
        if length < 0 or length + new > capacity:
            raise ValueError(
                f"{name} holds {length} of {capacity} tokens in row {row}: {new} more do not fit; make a longer cache"
            )
