"""The `cuda` backend: CUDA C++ kernels (csrc/cuda), compiled where nvcc is.

The functions take the module that launches: kernels._native on a GPU; the tests register the emulator
(csrc/emulator), which runs the same kernels on CPU tensors.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import chunked_loss, fused_block, native
from kernels.checks import check_offsets
from kernels.fused_block import Dropout, Layout, Pieces
from kernels.machine import Machine
from kernels.registry import missing_here, register


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def rotary(
    module: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated into new contiguous tensors; see `kernels.apply_rotary`."""
    q, k = native.rows_contiguous(q), native.rows_contiguous(k)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    cos, sin = cos.contiguous(), sin.contiguous()
    positions = None if positions is None else positions.contiguous()
    with native.on_device(q):
        module.rotary_cuda(*native.rotary_arguments(q, k, q_out, k_out, cos, sin, positions, inverse), _stream(q))
    return q_out, k_out


def attention_refuses(*, dtype: torch.dtype, head_dim: int, **_: object) -> str | None:
    """Why the kernels cannot serve this call of `flash_attention`, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype = {dtype}: the kernels multiply bfloat16 or float16"
    return native.refuses_head_dim(head_dim)


ATTENTION_VERSIONS = {"mma": (0, 0), "hopper": (1, 1), "hopper_wide": (2, 1)}
"""Of attention, which kernels run (forward, backward), by the number that the native module takes: 0, mma.sync on any
card; 1, wgmma, compute capability 9.0 and head_dim 64 or 128 only; 2, the same with three computing warpgroups for two
at head_dim 64 without dropout. `hopper_wide` is never chosen by itself: it was timed on a GPU, its results were checked
under the emulator alone.
"""


def _hopper_needs(machine: Machine) -> str | None:
    if machine.capability == (9, 0):
        return missing_here("cuda/hopper")(machine)
    return machine.missing.get("cuda") or f"{machine.name} has not compute capability 9.0"


def _hopper_refuses(refuses: Callable[..., str | None], *, head_dim: int, **options: Any) -> str | None:
    """Why those of the kernels that are made for Hopper cannot serve a call, or None; refuses: of the others."""
    if head_dim not in (64, 128):
        return f"head_dim = {head_dim}: the hopper kernels are made for 64 and 128"
    return refuses(head_dim=head_dim, **options)


def _is_aligned(x: Tensor) -> bool:
    """Each row of x is contiguous and starts at a multiple of 16 bytes."""
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)


def _aligned(x: Tensor) -> Tensor:
    """x if it is aligned, else a contiguous copy."""
    return x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _dense(x: Tensor) -> Tensor:
    """x if it is contiguous and starts at a multiple of 16 bytes, else a copy that is."""
    aligned = x.is_contiguous() and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _check_sizes(q: Tensor, k: Tensor) -> None:
    """Raises ValueError for more rows or heads than the kernels count."""
    for name, size in (("seqlen_q", q.shape[1]), ("seqlen_k", k.shape[1])):
        if size >= 2**30:
            raise ValueError(f"{name} = {size}: the cuda backend counts rows up to {2**30 - 1}; split the sequence")
    if q.shape[0] * q.shape[2] >= 2**31:
        raise ValueError(f"batch * heads = {q.shape[0] * q.shape[2]}: must be below {2**31}; split the batch")


def attention_forward(
    module: Any,
    version: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    causal: bool,
    scale: float,
    *dropout: Any,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (a new tensor, or the one given) and the log-sum-exp (batch, heads, seqlen_q) float32; see
    `kernels.flash_attention`.

    version: the kernels' number in ATTENTION_VERSIONS."""
    _check_sizes(q, k)
    q, scale, _ = native.positive_scale(q, scale)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None or not _is_aligned(out) else out
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    if cu_q is not None and cu_k is not None:
        check_offsets("cu_seqlens_q", cu_q, q.shape[1])
        check_offsets("cu_seqlens_k", cu_k, k.shape[1])
        cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
        result.zero_(), lse.fill_(-math.inf)  # rows that no document holds
    if q.numel():
        with native.on_device(q):
            module.attention_forward_cuda(
                *native.attention_arguments(q, k, v, result, lse, cu_q, cu_k, causal, scale, *dropout),
                _stream(q),
                version,
            )
    return result if out is None or out is result else out.copy_(result), lse


def attention_backward(
    module: Any, version: int, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, scale: float, *dropout: Any,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, in new tensors or in `grads` (rows as `_is_aligned` asks), bitwise reproducible."""
    q, scale, sign = native.positive_scale(q, scale)
    grad_out, q, k, v, out = (_aligned(x) for x in (grad_out, q, k, v, out))
    cu_q, cu_k = (None if x is None else x.contiguous() for x in (cu_q, cu_k))
    lse = lse.contiguous()
    if grads is None:
        grads = q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape)
    if cu_q is not None:
        for grad in grads:
            grad.zero_()  # rows that no document holds
    row_stats = torch.empty((*lse.shape, 2), dtype=torch.float32, device=q.device)
    if q.numel():
        with native.on_device(q):
            module.attention_backward_cuda(
                (grad_out, *grads),
                row_stats,
                *native.attention_arguments(q, k, v, out, lse, cu_q, cu_k, causal, scale, *dropout),
                _stream(q),
                version,
            )
    if sign != 1:
        grads[0].mul_(sign)
    return grads


def _norm_rows(x: Tensor, width: int) -> Tensor:
    """x as (rows, width), each row contiguous and starting at a multiple of 16 bytes."""
    if width % 8:
        raise ValueError(f"x.shape[-1] = {width}: the cuda backend's layer_norm takes a multiple of 8; pad the width")
    return _aligned(x.reshape(-1, width))


def layer_norm_forward(module: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (contiguous) and (mean, 1 / sqrt(variance + eps)) of each row; see `kernels.layer_norm`."""
    rows, weight, bias = _norm_rows(x, weight.numel()), _aligned(weight), _aligned(bias)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty((rows.shape[0], 2), dtype=torch.float32, device=x.device)
    if x.numel():
        with native.on_device(x):
            module.layer_norm_forward_cuda(
                rows,
                weight,
                bias,
                y,
                stats,
                (*rows.shape, rows.stride(0)),
                eps,
                native.DTYPE_CODES[x.dtype],
                _stream(x),
            )
    return y, stats


NORM_CHUNKS = 64
"""Chunks of rows whose sums for the gradients of weight and bias are made by separate blocks: with 32 strips of
columns at hidden 2,048 these are 2,048 blocks. Fixed, so that the sums do not depend on the machine."""


def layer_norm_backward(
    module: Any, grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (plus `residual`), weight and bias (contiguous), bitwise reproducible."""
    rows, weight, stats = _norm_rows(x, weight.numel()), _aligned(weight), stats.contiguous()
    grad, residual = _dense(grad), None if residual is None else _dense(residual)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weight, grad_bias = (torch.zeros(weight.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    chunks = min(NORM_CHUNKS, max(rows.shape[0], 1))
    partial = torch.empty((chunks, 2, weight.numel()), dtype=torch.float32, device=x.device)
    if x.numel():
        with native.on_device(x):
            module.layer_norm_backward_cuda(
                grad,
                rows,
                weight,
                stats,
                residual,
                grad_x,
                grad_weight,
                grad_bias,
                partial,
                chunks,
                (*rows.shape, rows.stride(0)),
                native.DTYPE_CODES[x.dtype],
                _stream(x),
            )
    return grad_x, grad_weight, grad_bias


def block_refuses(
    *, dtype: torch.dtype, head_dim: int, hidden: int, inner: int, rotary_dim: int, **_: object
) -> str | None:
    """Why the kernels cannot serve this call of `parallel_block`, or None."""
    for name, width in (("x.shape[-1]", hidden), ("inner (w_in's rows beyond q, k and v)", inner)):
        if width % 8:
            return f"{name} = {width}: the kernels take a multiple of 8; pad it with zeros"
    if rotary_dim % 16:
        return (
            f"rotary_dim = 2 * cos.shape[-1] = {rotary_dim}: the kernels turn a multiple of 16 dims; "
            "use another backend"
        )
    return attention_refuses(dtype=dtype, head_dim=head_dim)


PARTIAL_SUMS = 2**20
"""Partial sums of a bias's gradient, all chunks of rows together; csrc/cuda/block.cuh says why."""


def _sum_parts(rows: int, columns: int) -> int:
    """Parts of 16 or more rows whose sums are made apart. The shape decides, so that sums repeat."""
    return min(-(-rows // 16), max(PARTIAL_SUMS // columns, 1))


def _partial_sums(x: Tensor) -> Tensor:
    """Room for the sums of each part of x's rows: (parts, columns)."""
    return torch.empty((_sum_parts(*x.shape), x.shape[1]), dtype=torch.float32, device=x.device)


def _after_in_arguments(z: Tensor, bias: Tensor, activated: Tensor, layout: Layout) -> tuple[object, ...]:
    """The arguments of `after_in_cuda`, and the last of `after_in_backward_cuda`."""
    if layout.tokens >= 2**30:
        raise ValueError(
            f"batch * seq = {layout.tokens}: the cuda backend counts tokens up to {2**30 - 1}; split the batch"
        )
    return *native.after_in_arguments(z, bias, activated, _dense_layout(layout)), _stream(z)


def _dense_layout(layout: Layout) -> Layout:
    positions = None if layout.positions is None else layout.positions.contiguous()
    return layout._replace(cos=_dense(layout.cos), sin=_dense(layout.sin), positions=positions)


def project_in(module: Any, n: Tensor, w_in: Tensor, b_in: Tensor, activated: Tensor, layout: Layout) -> Tensor:
    """See `Pieces.project_in`."""
    z, b_in = torch.mm(n, w_in.T), _dense(b_in)
    with native.on_device(z):
        module.after_in_cuda(*_after_in_arguments(z, b_in, activated, layout))
    return z


def project_in_backward(
    module: Any, grad_z: Tensor, z: Tensor, b_in: Tensor, activated: Tensor, layout: Layout
) -> Tensor:
    """See `Pieces.project_in_backward`."""
    b_in = _dense(b_in)
    grad_bias, partial = torch.empty_like(b_in), _partial_sums(z)
    with native.on_device(z):
        module.after_in_backward_cuda(
            grad_z,
            grad_bias,
            partial,
            partial.shape[0],
            *_after_in_arguments(z, b_in, activated, layout),
        )
    return grad_bias


def project_out(module: Any, g: Tensor, w_out: Tensor, b_out: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    """See `Pieces.project_out`."""
    y, b_out, x = torch.mm(g, w_out.T), _dense(b_out), _dense(x)
    with native.on_device(y):
        module.residual_cuda(
            y,
            b_out,
            x,
            tuple(y.shape),
            native.dropout_arguments(dropout),
            native.DTYPE_CODES[y.dtype],
            _stream(y),
        )
    return y


def project_out_backward(module: Any, grad_y: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """See `Pieces.project_out_backward`."""
    grad_y = _dense(grad_y)
    threshold, *rest = native.dropout_arguments(dropout)
    grad_h = grad_y if threshold == 0 else torch.empty_like(grad_y)
    grad_bias, partial = grad_y.new_empty(grad_y.shape[1]), _partial_sums(grad_y)
    with native.on_device(grad_y):
        module.residual_backward_cuda(
            grad_y,
            grad_h,
            grad_bias,
            partial,
            partial.shape[0],
            tuple(grad_y.shape),
            (threshold, *rest),
            native.DTYPE_CODES[grad_y.dtype],
            _stream(grad_y),
        )
    return grad_h, grad_bias


def loss_refuses(*, dtype: torch.dtype, columns: int, **_: object) -> str | None:
    """Why the kernels cannot serve this call of `linear_cross_entropy`, or None."""
    if columns % 8:
        return (
            f"columns = weight.shape[0] = {columns}: the kernels take a multiple of 8; "
            "pad weight with rows of zeros and bias with -inf"
        )
    return native.refuses_dtype(dtype=dtype)


def cross_entropy(
    module: Any,
    logits: Tensor,
    bias: Tensor,
    targets: Tensor,
    loss: Tensor,
    bias_sums: Tensor | None,
    ignore_index: int,
    z_loss: float,
) -> None:
    """See `kernels.chunked_loss.Pieces.cross_entropy`; bitwise reproducible."""
    bias, stats = _dense(bias), loss.new_empty((logits.shape[0], 2))
    parts = 0 if bias_sums is None else bias_sums.shape[0]
    with native.on_device(logits):
        module.cross_entropy_cuda(
            logits,
            bias,
            targets,
            loss,
            bias_sums,
            stats,
            parts,
            (*logits.shape, ignore_index),
            z_loss,
            native.DTYPE_CODES[logits.dtype],
            _stream(logits),
        )


def register_kernels(
    module: Any, devices: tuple[str, ...], needs: Callable[[Machine], str | None] | None = None
) -> None:
    """Makes the launches of `module` the `cuda` backend of every op, for tensors on `devices`.

    Attention has the versions of ATTENTION_VERSIONS, and so has the layer with it; other ops have one, `cuda`.
    needs: in place of what a GPU and the build of the native module must have.
    """

    def of(function: Callable[..., Any], *more: Any) -> Callable[..., Any]:
        return functools.partial(function, module, *more)

    norm, loss = (
        (of(layer_norm_forward), of(layer_norm_backward)),
        chunked_loss.Pieces(of(cross_entropy), bias_parts=_sum_parts),
    )
    refuses: Callable[..., str | None]
    for op, run, refuses in (
        ("apply_rotary", (of(rotary), of(rotary)), native.refuses_dtype),
        ("layer_norm", norm, native.refuses_dtype),
        ("linear_cross_entropy", chunked_loss.operators(loss), loss_refuses),
    ):
        register(op, "cuda", *run, devices=devices, needs=needs, refuses=refuses)
    for name, (forward, backward) in ATTENTION_VERSIONS.items():
        attention = of(attention_forward, forward), of(attention_backward, backward)
        pieces = Pieces(
            *norm, of(project_in), of(project_in_backward), *attention, of(project_out), of(project_out_backward)
        )
        for op, run, refuses in (
            ("flash_attention", attention, attention_refuses),
            ("parallel_block", fused_block.operators(pieces), block_refuses),
        ):
            here = needs or (_hopper_needs if forward else None)
            refused = functools.partial(_hopper_refuses, refuses) if forward else refuses
            register(op, f"cuda/{name}", *run, devices=devices, needs=here, refuses=refused)


register_kernels(native._native, devices=("cuda",))
