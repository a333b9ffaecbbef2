"""The `cpu` backend: C++ kernels (csrc/cpu), a version for each instruction set that they are compiled for.

The functions take the instruction set's kernels first, an entry of `native.ISAS`.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import chunked_loss, native, reference
from kernels.fused_block import Dropout, Layout, Pieces, dropout_arguments, vendor_product
from kernels.registry import register


def _checked_positions(positions: Tensor | None, table_rows: int) -> Tensor | None:
    if positions is None:
        return None
    low, high = (int(x) for x in torch.aminmax(positions)) if positions.numel() else (0, 0)
    if low < 0 or high >= table_rows:
        raise IndexError(f"positions in [{low}, {high}]: the rotary table has rows 0..{table_rows - 1}")
    return positions.contiguous()


def rotary(
    isa: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated into new contiguous tensors; see `kernels.apply_rotary`."""
    positions = _checked_positions(positions, cos.shape[0])
    q, k = native.rows_contiguous(q), native.rows_contiguous(k)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    isa.rotary(
        *native.rotary_arguments(q, k, q_out, k_out, cos.contiguous(), sin.contiguous(), positions, inverse),
        torch.get_num_threads(),
    )
    return q_out, k_out


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
    isa: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    causal: bool, scale: float, dropout_p: float, dropout_seed: int, *, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (a new tensor, or the one given) and the log-sum-exp; see `kernels.flash_attention`."""
    q, k, v = (native.rows_contiguous(x) for x in (q, k, v))
    if cu_q is not None and cu_k is not None:
        cu_q, cu_k = _check_starts("cu_seqlens_q", cu_q, q.shape[1]), _check_starts("cu_seqlens_k", cu_k, k.shape[1])
    result = q.new_empty(q.shape) if out is None or out.stride(-1) != 1 else out
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    isa.attention_forward(
        *(native.heads_spec(x) for x in (q, k, v, result)), lse.data_ptr(),
        *_attention_arguments(q, k, cu_q, cu_k, causal, scale, dropout_p, dropout_seed),
    )  # fmt: skip
    return result if out is None or out is result else out.copy_(result), lse


def attention_backward(
    isa: Any, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    causal: bool, scale: float, dropout_p: float, dropout_seed: int,
    *, grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in new tensors or in `grads` (contiguous last dims). Each (problem, key/value head) is one thread's: more threads than those stand idle."""
    grad_out, q, k, v, out = (native.rows_contiguous(x) for x in (grad_out, q, k, v, out))
    cu_q = None if cu_q is None else cu_q.contiguous()
    cu_k = None if cu_k is None else cu_k.contiguous()
    grads = grads or (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    lse = lse.contiguous()
    isa.attention_backward(
        *(native.heads_spec(x) for x in (grad_out, q, k, v, out, *grads)), lse.data_ptr(),
        *_attention_arguments(q, k, cu_q, cu_k, causal, scale, dropout_p, dropout_seed),
    )  # fmt: skip
    return grads


def residual_keep(seed: int, rows: int, columns: int, p: float, isa: Any = None) -> Tensor:
    """`kernels.reference.residual_keep` on the CPU, the same bits. isa: default the most capable."""
    keep = torch.empty(rows, columns, dtype=torch.bool)
    isa = isa or next(isa for isa in native.ISAS if isa.missing is None)
    isa.residual_keep(
        keep.data_ptr(), rows, columns, reference.dropout_threshold(p), seed & (1 << 64) - 1, torch.get_num_threads()
    )
    return keep


# ------------------------------------------------------------------------------------- LayerNorm and the block


def layer_norm_forward(isa: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (contiguous) and (mean, 1 / sqrt(variance + eps)) of each row; see `kernels.layer_norm`."""
    rows = native.rows_contiguous(x.reshape(-1, weight.numel()))
    y = torch.empty(x.shape, dtype=x.dtype)
    stats = torch.empty((rows.shape[0], 2), dtype=torch.float32)
    weight, bias = weight.contiguous(), bias.contiguous()
    isa.layer_norm_forward(
        rows.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), stats.data_ptr(),
        (*rows.shape, rows.stride(0)), eps, native.DTYPE_CODES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y, stats


def layer_norm_backward(
    isa: Any, grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (plus `residual`), weight and bias."""
    rows, grad, weight = native.rows_contiguous(x.reshape(-1, weight.numel())), grad.contiguous(), weight.contiguous()
    residual, stats = None if residual is None else residual.contiguous(), stats.contiguous()
    grads = torch.empty(x.shape, dtype=x.dtype), torch.empty_like(weight), torch.empty_like(weight)
    isa.layer_norm_backward(
        grad.data_ptr(), rows.data_ptr(), weight.data_ptr(), stats.data_ptr(),
        0 if residual is None else residual.data_ptr(), *(g.data_ptr() for g in grads),
        (*rows.shape, rows.stride(0)), native.DTYPE_CODES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return grads


def _after_in_arguments(z: Tensor, bias: Tensor, activated: Tensor, layout: Layout) -> tuple[object, ...]:
    """The arguments of `_native.after_in_cpu`, and the last of `_native.after_in_backward_cpu`."""
    positions = _checked_positions(layout.positions, layout.cos.shape[0])
    cos, sin = layout.cos.contiguous(), layout.sin.contiguous()
    sizes = (
        layout.batch, layout.seq, layout.heads + layout.kv_heads, layout.head_dim, cos.shape[1], z.shape[1], layout.inner,
        activated.stride(0),
    )  # fmt: skip
    arguments = (
        z.data_ptr(), bias.data_ptr(), activated.data_ptr(), sizes, cos.data_ptr(), sin.data_ptr(),
        0 if positions is None else positions.data_ptr(),
        positions.stride(0) if positions is not None and positions.dim() == 2 else 0,
        native.DTYPE_CODES[z.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return arguments


def _project_in(isa: Any, n: Tensor, w_in: Tensor, b_in: Tensor, activated: Tensor, layout: Layout) -> Tensor:
    z, b_in = vendor_product(n, w_in), b_in.contiguous()
    isa.after_in(*_after_in_arguments(z, b_in, activated, layout))
    return z


def _project_in_backward(
    isa: Any, grad_z: Tensor, z: Tensor, b_in: Tensor, activated: Tensor, layout: Layout
) -> Tensor:
    b_in = b_in.contiguous()
    grad_bias = torch.empty_like(b_in)
    isa.after_in_backward(grad_z.data_ptr(), grad_bias.data_ptr(), *_after_in_arguments(z, b_in, activated, layout))
    return grad_bias


def _project_out(isa: Any, g: Tensor, w_out: Tensor, b_out: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    y, b_out, x = vendor_product(g, w_out), b_out.contiguous(), x.contiguous()
    isa.residual(
        y.data_ptr(), b_out.data_ptr(), x.data_ptr(), *y.shape, dropout_arguments(dropout),
        native.DTYPE_CODES[y.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def _project_out_backward(isa: Any, grad_y: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    threshold, *rest = dropout_arguments(dropout)
    grad_h = grad_y if threshold == 0 else torch.empty_like(grad_y)
    grad_bias = grad_y.new_empty(grad_y.shape[1])
    isa.residual_backward(
        grad_y.data_ptr(), grad_h.data_ptr(), grad_bias.data_ptr(), *grad_y.shape, (threshold, *rest),
        native.DTYPE_CODES[grad_y.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return grad_h, grad_bias


# ------------------------------------------------------------------------------------------------- the loss


def _cross_entropy(
    isa: Any,
    logits: Tensor,
    bias: Tensor,
    targets: Tensor,
    loss: Tensor,
    bias_sums: Tensor | None,
    ignore_index: int,
    z_loss: float,
) -> None:
    rows, columns = logits.shape
    kept = targets[targets != ignore_index]
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < columns:
        raise IndexError(
            f"targets in [{int(kept.min())}, {int(kept.max())}]: must be in [0, {columns}) or ignore_index = {ignore_index}"
        )
    isa.cross_entropy(
        logits.data_ptr(), bias.data_ptr(), targets.data_ptr(), loss.data_ptr(),
        0 if bias_sums is None else bias_sums.data_ptr(), (rows, columns, ignore_index), z_loss,
        native.DTYPE_CODES[logits.dtype], torch.get_num_threads(),
    )  # fmt: skip


def _add_product(isa: Any, grad: Tensor, low: Tensor, product: Tensor, first: bool, last: bool) -> None:
    """The sum's upper 16 bits stand in grad's memory, whatever its dtype, and the lower in `low`."""
    isa.add_product(
        grad.data_ptr(), low.data_ptr(), product.data_ptr(), product.numel(), first, last,
        native.DTYPE_CODES[grad.dtype], torch.get_num_threads(),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- registration


def register_kernels(name: str, isa: Any) -> None:
    """Makes the kernels of an instruction set the version `cpu/<name>` of every op; None: it was not compiled."""

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, isa)

    attention = of(attention_forward), of(attention_backward)
    norm = of(layer_norm_forward), of(layer_norm_backward)
    block = Pieces(
        *norm, of(_project_in), of(_project_in_backward), *attention, of(_project_out), of(_project_out_backward),
        saves_attention=True,  # made again it took 6% of forward + backward at hidden 512, 1,024 tokens (Zen 4)
    )  # fmt: skip
    loss = chunked_loss.Pieces(of(_cross_entropy), add_product=of(_add_product), scratch=torch.int16)
    for op, run, refuses in (
        ("apply_rotary", of(rotary), native.refuses_dtype),
        ("flash_attention", attention, _attention_refuses),
        ("layer_norm", norm, native.refuses_dtype),
        ("parallel_block", block, _attention_refuses),
        ("linear_cross_entropy", loss, native.refuses_dtype),
    ):
        register(op, f"cpu/{name}", run, devices=("cpu",), refuses=refuses)


_compiled = {isa.name: isa for isa in native.ISAS}
for _name in native.ISA_NAMES:
    register_kernels(_name, _compiled.get(_name))
