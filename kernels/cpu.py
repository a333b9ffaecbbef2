"""The `cpu` backend: C++ kernels (csrc/cpu), a version for each instruction set that they are compiled for.

The functions take the instruction set's kernels first, an entry of `native.ISAS`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import chunked_loss, fused_block, measured, memory, native, reference
from kernels.checks import check_offsets
from kernels.fused_block import Dropout, Layout, Pieces
from kernels.registry import generation, implementation, machine_of, register, select
from kernels.seeds import Seed


def rotary(
    isa: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated into new contiguous tensors; see `kernels.apply_rotary`."""
    positions = None if positions is None else positions.contiguous()
    q, k = native.rows_contiguous(q), native.rows_contiguous(k)
    q_out, k_out = memory.empty(q, q.shape), memory.empty(k, k.shape)
    isa.rotary(
        *native.rotary_arguments(q, k, q_out, k_out, cos.contiguous(), sin.contiguous(), positions, inverse),
        torch.get_num_threads(),
    )
    return q_out, k_out


def _attention_refuses(*, dtype: torch.dtype, head_dim: int, **_: object) -> str | None:
    return native.refuses_head_dim(head_dim) or native.refuses_dtype(dtype=dtype)


def attention_forward(
    isa: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    causal: bool,
    scale: float,
    p: float,
    seed: Seed,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (a new tensor, or the one given) and the log-sum-exp; see `kernels.flash_attention`."""
    q, k, v = (native.rows_contiguous(x) for x in (q, k, v))
    if cu_q is not None and cu_k is not None:
        check_offsets("cu_seqlens_q", cu_q, q.shape[1])
        check_offsets("cu_seqlens_k", cu_k, k.shape[1])
        cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    result = memory.empty(q, q.shape) if out is None or out.stride(-1) != 1 else out
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    isa.attention_forward(
        *native.attention_arguments(q, k, v, result, lse, cu_q, cu_k, causal, scale, p, int(seed)),
        torch.get_num_threads(),
    )
    return result if out is None or out is result else out.copy_(result), lse


def attention_backward(
    isa: Any,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    causal: bool,
    scale: float,
    p: float,
    seed: Seed,
    *,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in new tensors or in `grads` (contiguous last dims). Each (problem, key/value head) is
    one thread's: more threads than those stand idle.
    """
    grad_out, q, k, v, out = (native.rows_contiguous(x) for x in (grad_out, q, k, v, out))
    cu_q = None if cu_q is None else cu_q.contiguous()
    cu_k = None if cu_k is None else cu_k.contiguous()
    grads = grads or (memory.empty(q, q.shape), memory.empty(k, k.shape), memory.empty(v, v.shape))
    lse = lse.contiguous()
    isa.attention_backward(
        (grad_out, *grads),
        *native.attention_arguments(q, k, v, out, lse, cu_q, cu_k, causal, scale, p, int(seed)),
        torch.get_num_threads(),
    )
    return grads


def residual_keep(seed: Seed, rows: int, columns: int, p: float, isa: Any = None) -> Tensor:
    """`kernels.reference.residual_keep` on the CPU, the same bits. isa: default the most capable."""
    isa = isa or next(isa for isa in native.ISAS if isa.missing is None)
    keep = torch.empty((rows, columns), dtype=torch.bool, device="cpu")
    isa.residual_keep(
        keep, rows, columns, reference.dropout_threshold(p), int(seed) & (1 << 64) - 1, torch.get_num_threads()
    )
    return keep


# ------------------------------------------------------------------------------------- LayerNorm and the block


def layer_norm_forward(isa: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (contiguous) and (mean, 1 / sqrt(variance + eps)) of each row; see `kernels.layer_norm`."""
    rows = native.rows_contiguous(x.reshape(-1, weight.numel()))
    y = memory.empty(x, x.shape)
    stats = x.new_empty((rows.shape[0], 2), dtype=torch.float32)
    weight, bias = weight.contiguous(), bias.contiguous()
    isa.layer_norm_forward(
        rows,
        weight,
        bias,
        y,
        stats,
        (*rows.shape, rows.stride(0)),
        eps,
        native.DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    return y, stats


def layer_norm_backward(
    isa: Any, grad: Tensor, x: Tensor, weight: Tensor, stats: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (plus `residual`), weight and bias."""
    rows, grad, weight = native.rows_contiguous(x.reshape(-1, weight.numel())), grad.contiguous(), weight.contiguous()
    residual, stats = None if residual is None else residual.contiguous(), stats.contiguous()
    grads = memory.empty(x, x.shape), torch.empty_like(weight), torch.empty_like(weight)
    isa.layer_norm_backward(
        grad,
        rows,
        weight,
        stats,
        residual,
        *grads,
        (*rows.shape, rows.stride(0)),
        native.DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
    )
    return grads


_products: dict[tuple[str, str, torch.dtype, str], Callable[[Tensor, Tensor], Tensor]] = {}
"""What `product` takes, by the tables' generation, the caller's instruction set, dtype and size."""


def product(isa: Any, x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for x (rows, width) and weight (columns, width): of up to 16 rows by what is fastest of the vendor's and
    `product_of_few` with the instructions of `isa` or fewer, of more by the vendor's.
    """
    rows = x.shape[0]
    if 0 < rows <= measured.MOST_ROWS and x.stride(1) == weight.stride(1) == 1:
        size = measured.product_class(rows, rows * weight.numel())
        key = generation(), isa.name, x.dtype, size
        run = _products.get(key)
        if run is None:
            # Whatever is asked for: that says what the whole op runs on.
            version = select("product", machine_of(x.device), None, dtype=x.dtype, size=size, caller=isa.name)
            run = _products[key] = implementation("product", version).forward
        return run(x, weight)
    return memory.product(x, weight.T)


def product_of_few(isa: Any, x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for x of 1 to 16 rows, all rows contiguous: csrc/cpu/product.inl."""
    y = x.new_empty((x.shape[0], weight.shape[0]))
    sizes = (*y.shape, x.shape[1], x.stride(0), weight.stride(0))
    isa.product(x, weight, y, sizes, native.DTYPE_CODES[x.dtype], torch.get_num_threads())
    return y


def _product_refuses(name: str, *, dtype: torch.dtype, caller: str | None = None, **_: object) -> str | None:
    if caller is not None and native.ISA_NAMES.index(name) < native.ISA_NAMES.index(caller):
        return f"it has instructions beyond {caller}'s, which its caller is held to"
    return native.refuses_dtype(dtype=dtype)


def _contiguous(layout: Layout) -> Layout:
    positions = None if layout.positions is None else layout.positions.contiguous()
    return layout._replace(cos=layout.cos.contiguous(), sin=layout.sin.contiguous(), positions=positions)


def _project_in(isa: Any, n: Tensor, w_in: Tensor, b_in: Tensor, activated: Tensor, layout: Layout) -> Tensor:
    z, b_in = product(isa, n, w_in), b_in.contiguous()
    isa.after_in(*native.after_in_arguments(z, b_in, activated, _contiguous(layout)), torch.get_num_threads())
    return z


def _project_in_backward(
    isa: Any, grad_z: Tensor, z: Tensor, b_in: Tensor, activated: Tensor, layout: Layout
) -> Tensor:
    b_in = b_in.contiguous()
    grad_bias = torch.empty_like(b_in)
    arguments = native.after_in_arguments(z, b_in, activated, _contiguous(layout))
    isa.after_in_backward(grad_z, grad_bias, *arguments, torch.get_num_threads())
    return grad_bias


def _dropout_arguments(dropout: Dropout) -> tuple[object, ...]:
    return native.dropout_arguments(Dropout(dropout.p, int(dropout.seed)))


def _project_out(isa: Any, g: Tensor, w_out: Tensor, b_out: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    y, b_out, x = product(isa, g, w_out), b_out.contiguous(), x.contiguous()
    isa.residual(
        y,
        b_out,
        x,
        tuple(y.shape),
        _dropout_arguments(dropout),
        native.DTYPE_CODES[y.dtype],
        torch.get_num_threads(),
    )
    return y


def _project_out_backward(isa: Any, grad_y: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    threshold, *rest = _dropout_arguments(dropout)
    grad_h = grad_y if threshold == 0 else memory.empty(grad_y, grad_y.shape)
    grad_bias = grad_y.new_empty(grad_y.shape[1])
    isa.residual_backward(
        grad_y,
        grad_h,
        grad_bias,
        tuple(grad_y.shape),
        (threshold, *rest),
        native.DTYPE_CODES[grad_y.dtype],
        torch.get_num_threads(),
    )
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
            f"targets in [{int(kept.min())}, {int(kept.max())}]: must be in [0, {columns}) or ignore_index = "
            f"{ignore_index}"
        )
    isa.cross_entropy(
        logits.T,
        bias,
        targets,
        loss,
        bias_sums,
        (rows, columns, ignore_index),
        z_loss,
        native.DTYPE_CODES[logits.dtype],
        torch.get_num_threads(),
    )


def _add_product(isa: Any, grad: Tensor, low: Tensor, product: Tensor, first: bool, last: bool) -> None:
    """The sum's upper 16 bits stand in grad's memory, whatever its dtype, and the lower in `low`."""
    isa.add_product(
        grad,
        low,
        product,
        product.numel(),
        first,
        last,
        native.DTYPE_CODES[grad.dtype],
        torch.get_num_threads(),
    )


# ------------------------------------------------------------------------------------------------- registration


def register_kernels(name: str, isa: Any) -> None:
    """Makes the kernels of an instruction set the version `cpu/<name>` of every op; None: it was not compiled."""

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, isa)

    attention = of(attention_forward), of(attention_backward)
    norm = of(layer_norm_forward), of(layer_norm_backward)
    block = fused_block.operators(
        Pieces(
            *norm,
            of(_project_in),
            of(_project_in_backward),
            *attention,
            of(_project_out),
            of(_project_out_backward),
        )
    )
    loss = chunked_loss.operators(
        chunked_loss.Pieces(of(_cross_entropy), add_product=of(_add_product), scratch=torch.int16, columns_first=True)
    )
    for op, run, refuses in (
        ("apply_rotary", (of(rotary), of(rotary)), native.refuses_dtype),
        ("flash_attention", attention, _attention_refuses),
        ("layer_norm", norm, native.refuses_dtype),
        ("parallel_block", block, _attention_refuses),
        ("linear_cross_entropy", loss, native.refuses_dtype),
        ("product", (of(product_of_few),), functools.partial(_product_refuses, name)),
    ):
        register(op, f"cpu/{name}", *run, devices=("cpu",), refuses=refuses)


_compiled = {isa.name: isa for isa in native.ISAS}
for _name in native.ISA_NAMES:
    register_kernels(_name, _compiled.get(_name))
