"""The `cpu` backend: C++ kernels (csrc/cpu), chosen at run time by the CPU's instruction sets (PHI1_ISA overrides)."""

import itertools

import torch
from torch import Tensor

from kernels import native, reference
from kernels.registry import register


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated into new contiguous tensors; see `kernels.apply_rotary`."""
    if positions is not None:
        positions = positions.contiguous()
        low, high = (int(x) for x in torch.aminmax(positions)) if positions.numel() else (0, 0)
        if low < 0 or high >= cos.shape[0]:
            raise IndexError(f"positions in [{low}, {high}]: the rotary table has rows 0..{cos.shape[0] - 1}")
    q, k = native.rows_contiguous(q), native.rows_contiguous(k)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    native._native.rotary_cpu(
        *native.rotary_arguments(q, k, q_out, k_out, cos.contiguous(), sin.contiguous(), positions, inverse),
        torch.get_num_threads(),
    )
    return q_out, k_out


register("apply_rotary", "cpu", rotary, devices=("cpu",), missing=native.MISSING, refuses=native.refuses_dtype)


HEAD_DIMS = (32, 64, 128)
"""What the attention kernels are compiled for."""


def _attention_refuses(*, dtype: torch.dtype, head_dim: int, **_: object) -> str | None:
    if head_dim not in HEAD_DIMS:
        return f"head_dim = {head_dim}: the kernels are compiled for {', '.join(map(str, HEAD_DIMS))}"
    return native.refuses_dtype(dtype=dtype)


def _check_starts(name: str, starts: Tensor, length: int) -> Tensor:
    """`starts`, contiguous; raises ValueError unless it runs from 0 to length without a step back."""
    values = starts.tolist()
    if values[0] != 0 or values[-1] != length or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{name} = {values}: must rise from 0 to the sequence length, {length}")
    return starts.contiguous()


def _attention_arguments(
    q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    causal: bool, scale: float, dropout_p: float, dropout_seed: int,
) -> tuple[object, ...]:  # fmt: skip
    """The last arguments of `_native.attention_forward_cpu` and `_native.attention_backward_cpu`."""
    batch, seqlen_q, heads, head_dim = q.shape
    threshold = reference.dropout_threshold(dropout_p)
    return (
        (batch, seqlen_q, k.shape[1], heads, k.shape[2], head_dim),
        (0, 0, 0) if cu_q is None or cu_k is None else (cu_q.data_ptr(), cu_k.data_ptr(), cu_q.shape[0] - 1),
        causal, scale, (threshold, reference.dropout_scale(dropout_p), dropout_seed & (1 << 64) - 1),
        native.DTYPE_CODES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    causal: bool, scale: float, dropout_p: float, dropout_seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and the log-sum-exp; see `kernels.flash_attention`."""
    q, k, v = (native.rows_contiguous(x) for x in (q, k, v))
    if cu_q is not None and cu_k is not None:
        cu_q, cu_k = _check_starts("cu_seqlens_q", cu_q, q.shape[1]), _check_starts("cu_seqlens_k", cu_k, k.shape[1])
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    native._native.attention_forward_cpu(
        *(native.heads_spec(x) for x in (q, k, v, out)), lse.data_ptr(),
        *_attention_arguments(q, k, cu_q, cu_k, causal, scale, dropout_p, dropout_seed),
    )  # fmt: skip
    return out, lse


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    causal: bool, scale: float, dropout_p: float, dropout_seed: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v. Each (problem, key/value head) is one thread's: more threads than those stand idle."""
    grad_out, q, k, v, out = (native.rows_contiguous(x) for x in (grad_out, q, k, v, out))
    cu_q = None if cu_q is None else cu_q.contiguous()
    cu_k = None if cu_k is None else cu_k.contiguous()
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    lse = lse.contiguous()
    native._native.attention_backward_cpu(
        *(native.heads_spec(x) for x in (grad_out, q, k, v, out, *grads)), lse.data_ptr(),
        *_attention_arguments(q, k, cu_q, cu_k, causal, scale, dropout_p, dropout_seed),
    )  # fmt: skip
    return grads


def residual_keep(seed: int, rows: int, columns: int, p: float) -> Tensor:
    """`kernels.reference.residual_keep` on the CPU, the same bits."""
    keep = torch.empty(rows, columns, dtype=torch.bool)
    native._native.residual_keep_cpu(
        keep.data_ptr(), rows, columns, reference.dropout_threshold(p), seed & (1 << 64) - 1, torch.get_num_threads()
    )
    return keep


register(
    "flash_attention",
    "cpu",
    (attention_forward, attention_backward),
    devices=("cpu",),
    missing=native.MISSING,
    refuses=_attention_refuses,
)
