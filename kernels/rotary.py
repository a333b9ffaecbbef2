"""Partial rotary position embedding on q and k."""

import torch
from torch import Tensor

from kernels import reference
from kernels.autograd import distinct, operator, unwatched
from kernels.checks import check_device, check_dtype, check_float32, check_like, check_positions, check_rank
from kernels.measured import size_class
from kernels.registry import choose, differentiated, implementation, in_graph, register

torch.library.define(
    "phi1::rotary",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool inverse, str backend) -> (Tensor, Tensor)",
)


@operator("phi1::rotary")
def _rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    check_positions(positions, cos.shape[0])
    return implementation("apply_rotary", backend).forward(q, k, cos, sin, positions, inverse)


@torch.library.register_fake("phi1::rotary")
def _rotary_fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, inverse, backend):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin, positions)
        ctx.inverse, ctx.backend = inverse, backend
        return torch.ops.phi1.rotary(q, k, cos, sin, positions, inverse, backend)

    @staticmethod
    def backward(ctx, grad_q, grad_k):  # type: ignore[no-untyped-def]
        # A rotation's transpose is the rotation by the negative angle; being linear, it has derivatives of any order.
        cos, sin, positions = ctx.saved_tensors
        further = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        turn = _Rotary.apply if further else torch.ops.phi1.rotary
        return *turn(grad_q, grad_k, cos, sin, positions, not ctx.inverse, ctx.backend), None, None, None, None, None


# (q, k, cos, sin, positions, inverse) -> q, k; the backward is the forward with the other `inverse`.
register("apply_rotary", "reference", reference.rotary, reference.rotary, differentiable=True)
# Plain PyTorch again, but in the caller's graph: torch.compile fuses it with its neighbours.
register("apply_rotary", "torch", reference.rotary)


def check_table(
    x: Tensor, batch: int, seq: int, head_dim: int, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> None:
    """Raises ValueError unless cos, sin and positions fit (batch, seq) tokens of heads of head_dim, on x's device."""
    check_rank("cos", cos, 2, "(positions, rotary_dim / 2)")
    check_rank("sin", sin, 2, "(positions, rotary_dim / 2)")
    if sin.shape != cos.shape:
        raise ValueError(f"sin.shape = {tuple(sin.shape)}: must be cos.shape = {tuple(cos.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_float32(name, table)
        check_device(name, table, "the input", x)
    if not 0 < 2 * cos.shape[1] <= head_dim:
        raise ValueError(
            f"cos.shape = {tuple(cos.shape)}: rotary_dim = {2 * cos.shape[1]} must be in 2..{head_dim}, head_dim"
        )
    if positions is None:
        if cos.shape[0] < seq:
            raise ValueError(
                f"cos.shape = {tuple(cos.shape)}: {seq} tokens need {seq} rows; build a longer rotary_table"
            )
    else:
        if not (positions.dtype == torch.int64 and tuple(positions.shape) in ((seq,), (batch, seq))):
            raise ValueError(
                f"positions = {positions.dtype} {tuple(positions.shape)}: must be int64 of shape ({seq},) or ({batch}, "
                f"{seq})"
            )
        check_device("positions", positions, "the input", x)


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates the first rotary_dim = 2 * cos.shape[-1] dims of every head; the rest passes through.

    Dim i is paired with dim i + rotary_dim / 2 ("rotate half", as in transformers' modeling_phi.py):
    (a, b) -> (a cos - b sin, b cos + a sin), computed in float32 (float64 for float64 inputs).

    q: (batch, seq, heads, head_dim), any strides with a contiguous last dim in the native backends.
    k: (batch, seq, kv_heads, head_dim), q's dtype.
    cos, sin: (positions, rotary_dim / 2) float32, see `kernels.reference.rotary_table`.
    positions: row of the table for each token, (seq,) or (batch, seq) int64; default: its index in the sequence.
    Returns new tensors shaped like q and k. Gradients flow to q and k.

    Raises ValueError if shapes, dtypes or devices do not fit, BackendError if `backend` cannot serve the call.
    A position outside the table is undefined behaviour on a GPU and an error on a CPU.
    """
    check_rank("q", q, 4, "(batch, seq, heads, head_dim)")
    check_rank("k", k, 4, "(batch, seq, kv_heads, head_dim)")
    check_dtype("q", q)
    check_like("k", k, "q", q)
    batch, seq, _, head_dim = q.shape
    if head_dim == 0:
        raise ValueError(f"q.shape = {tuple(q.shape)}: head_dim must be at least 1")
    if not (k.shape[0] == batch and k.shape[1] == seq and k.shape[3] == head_dim):
        raise ValueError(
            f"k.shape = {tuple(k.shape)}: must be ({batch}, {seq}, kv_heads, {head_dim}), q being {tuple(q.shape)}"
        )
    check_table(q, batch, seq, head_dim, cos, sin, positions)
    name = choose(
        "apply_rotary", q.device, backend, dtype=q.dtype, size=size_class(batch * seq), training=differentiated(q, k)
    )
    forward = in_graph("apply_rotary", name)
    if forward is not None:
        check_positions(positions, cos.shape[0])
        return forward(q, k, cos, sin, positions, False)
    if unwatched(q, k, cos, sin):
        return _rotary(q, k, cos, sin, positions, False, name)
    return _Rotary.apply(*distinct(q, k, cos, sin), positions, False, name)
