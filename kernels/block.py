"""phi-1's parallel block: attention and MLP side by side on one LayerNorm, as two matrix products.

    [q | k | v | u] = LN(x) W_in^T + b_in          hidden -> (heads + 2 kv_heads) head_dim + inner
    y = x + dropout([attn(rot(q), rot(k), v) | gelu(u)] W_out^T + b_out)

One residual mask covers the sum of both branches (transformers' PhiDecoderLayer draws one for each): with W_out
fused there is one sum to drop from, and each element is dropped with the same probability.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu, native, reference, triton
from kernels.attention import check_documents, flash_attention
from kernels.autocast import cast_inputs
from kernels.checks import (
    check,
    check_device,
    check_dtype,
    check_int32,
    check_like,
    check_not_captured,
    check_shape,
    seed_bits,
)
from kernels.fused_block import FusedBlock
from kernels.measured import size_class
from kernels.norm import layer_norm
from kernels.reference import Dropout, KVCache
from kernels.registry import choose, differentiated, forced_backend, in_graph, machine_of, register
from kernels.rotary import apply_rotary, check_table


def _attention(
    piece: str | None, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, dropout: Dropout
) -> Tensor:  # fmt: skip
    options = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "backend": piece}
    attention = flash_attention(q, k, v, dropout_p=dropout.p, dropout_seed=dropout.seed, **options)  # type: ignore[arg-type]
    assert isinstance(attention, Tensor)
    return attention


def _dropped(y: Tensor, dropout: Dropout) -> Tensor:
    if dropout.p == 0:
        return y
    return y * torch.ops.phi1.residual_factor(y.detach(), dropout.seed, dropout.p)


def _composed(linear: Callable[..., Tensor], gelu: Callable[..., Tensor], *arguments: Any, piece: str | None) -> Tensor:
    """`reference.parallel_block` of the package's ops, each on the backend `piece`, or None: on its own choice."""
    norm, rotary = functools.partial(layer_norm, backend=piece), functools.partial(apply_rotary, backend=piece)
    steps = reference.Steps(norm, linear, rotary, functools.partial(_attention, piece), gelu, _dropped)
    return reference.parallel_block(steps, *arguments)


register("parallel_block", "reference", functools.partial(_composed, reference.linear, reference.gelu))
register(
    "parallel_block", "torch", functools.partial(_composed, F.linear, functools.partial(F.gelu, approximate="tanh"))
)

# What residual dropout multiplies each element by: 0, or 1 / (1 - p). An op, so that torch.compile carries the seed as a
# symbol (no new graph for each seed) and does not look inside.
torch.library.define("phi1::residual_factor", "(Tensor like, SymInt seed, float p) -> Tensor")


@torch.library.impl("phi1::residual_factor", ("cpu", "cuda"))
def _residual_factor(like: Tensor, seed: int, p: float) -> Tensor:
    # The reference's integer tensors are 142 kernels and 61.8 GB for a layer of phi-1 with 16,384 tokens.
    batch, seq, hidden = like.shape
    shape, scale = (batch * seq, hidden), reference.dropout_scale(p)
    if like.device.type == "cuda" and "triton" not in machine_of(like.device).missing:
        return triton.residual_factor(like, seed, p)
    if like.device.type == "cpu" and native.MISSING is None:
        keep = cpu.residual_keep(seed, *shape, p)
    else:
        keep = reference.residual_keep(seed, *shape, p, like.device)
    return (keep * scale).to(like.dtype).view(like.shape)


@torch.library.register_fake("phi1::residual_factor")
def _residual_factor_fake(like: Tensor, seed: int, p: float) -> Tensor:
    return like.new_empty(like.shape)


def _check_cache(
    name: str, cache: Tensor, length: int | Tensor, x: Tensor, cu_seqlens: Tensor | None, kv_heads: int, head_dim: int
) -> None:
    """Raises ValueError unless x's tokens fit into `cache` (keys or values): backends write there without another look."""
    batch, seq, _ = x.shape
    if cu_seqlens is not None:
        batch = cu_seqlens.shape[0] - 1
    check(
        cache.dim() == 4 and cache.shape[0] >= batch and tuple(cache.shape[2:]) == (kv_heads, head_dim),
        lambda: f"{name}.shape = {tuple(cache.shape)}: must be ({batch} or more, capacity, {kv_heads}, {head_dim})",
    )
    check_like(name, cache, "x", x)
    if isinstance(length, Tensor):
        _check_documents_fit(name, cache, length, cu_seqlens)
        return
    check(length >= 0, lambda: f"kv_cache[2] = {length}: must be the number of tokens so far")
    check(
        length + seq <= cache.shape[1],
        lambda: f"{name} holds {length} of {cache.shape[1]} tokens: {seq} more do not fit; make a longer cache",
    )


def _check_documents_fit(name: str, cache: Tensor, lengths: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError unless each document fits behind its row's tokens. On a GPU only shapes are looked at."""
    assert cu_seqlens is not None
    check_shape("kv_cache[2]", lengths, (cu_seqlens.shape[0] - 1,), "(documents,)")
    check_int32("kv_cache[2]", lengths)
    check_device("kv_cache[2]", lengths, "cu_seqlens", cu_seqlens)
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for row, (length, new) in enumerate(zip(lengths.tolist(), cu_seqlens.diff().tolist(), strict=True)):
        if length < 0 or length + new > cache.shape[1]:
            raise ValueError(
                f"{name} holds {length} of {cache.shape[1]} tokens in row {row}: {new} more do not fit; make a longer cache"
            )


@cast_inputs("x", "norm_weight", "norm_bias", "w_in", "b_in", "w_out", "b_out")
def parallel_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float = 1e-5,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    attention_dropout: float = 0.0,
    residual_dropout: float = 0.0,
    dropout_seed: int = 0,
    kv_cache: KVCache | None = None,
    backend: str | None = None,
) -> Tensor:
    """One decoder layer (phi-1 paper section 2.3; transformers' PhiDecoderLayer), causal.

    x: (batch, seq, hidden). norm_weight, norm_bias: (hidden,).
    w_in: (heads * head_dim + 2 * kv_heads * head_dim + inner, hidden), rows [q | k | v | u]; b_in its rows.
    w_out: (hidden, heads * head_dim + inner), columns [attention | gelu]; b_out: (hidden,). All of x's dtype.
    cos, sin: (positions, rotary_dim / 2) float32. positions: as in `apply_rotary`.
    cu_seqlens: int32 (documents + 1,), offsets into the folded batch * seq tokens; attention stays inside a document.
    attention_dropout, residual_dropout, dropout_seed: masks are `kernels.reference.attention_keep` and `residual_keep`
        of the seed. Both probabilities are rounded to a multiple of 1/256, as in `flash_attention`: 0.1 becomes 0.1016.
    kv_cache: (k, v, length): this call's keys and values are written at [length, length + seq), then attention
        runs over the first length + seq. With cu_seqlens document i goes on in row i, and length is int32 (documents,),
        the tokens that each row holds; a document may be empty. k and v have x's dtype and device. For inference: such a
        call records no gradient, on any backend, whatever requires one.
    Under torch.autocast x and the six parameters are cast to its dtype (kernels/autocast.py), which y then has.
    Returns y (batch, seq, hidden).

    The native backends run the fused route of kernels/fused_block.py, which saves x and z only, and have no second
    derivative. On `reference` and `torch` the block is composed of the ops of this package, each on that backend, or on
    its own choice if none is asked for.
    A NaN in one token stays in what sees that token, but for bfloat16 on a CPU with AMX: there oneDNN's products whose
    summed width (hidden, attention width + inner) is odd or no multiple of 32 may spread it to other rows (oneDNN issue
    5717, torch 2.13).
    Raises ValueError for arguments that do not fit, BackendError if `backend` cannot serve the call.
    """
    check(x.dim() == 3, lambda: f"x.shape = {tuple(x.shape)}: must be (batch, seq, hidden)")
    check_dtype("x", x)
    batch, seq, hidden = x.shape
    check(x.numel() > 0, lambda: f"x.shape = {tuple(x.shape)}: must hold at least one token of one number")
    check(
        min(heads, kv_heads, head_dim) > 0,
        lambda: f"heads = {heads}, kv_heads = {kv_heads}, head_dim = {head_dim}: must be at least 1",
    )
    check(heads % kv_heads == 0, lambda: f"kv_heads = {kv_heads}: must divide heads = {heads}")
    q_width, kv_width = heads * head_dim, kv_heads * head_dim
    width_in = w_in.shape[0] if w_in.dim() == 2 else 0
    inner = width_in - q_width - 2 * kv_width
    check(
        inner > 0 and w_in.shape[1] == hidden,
        lambda: f"w_in.shape = {tuple(w_in.shape)}: must be ({q_width} + 2 * {kv_width} + inner, {hidden})",
    )
    for name, parameter, shape, meaning in (
        ("norm_weight", norm_weight, (hidden,), "(hidden,), x's last dim"),
        ("norm_bias", norm_bias, (hidden,), "(hidden,), x's last dim"),
        ("w_in", w_in, (width_in, hidden), ""),
        ("b_in", b_in, (width_in,), "(w_in's rows,)"),
        ("w_out", w_out, (hidden, q_width + inner), "(hidden, attention width + inner)"),
        ("b_out", b_out, (hidden,), "(hidden,)"),
    ):
        check_shape(name, parameter, shape, meaning)
        check_like(name, parameter, "x", x)
    check(0.0 <= attention_dropout < 1.0, lambda: f"attention_dropout = {attention_dropout}: must be in [0, 1)")
    check(0.0 <= residual_dropout < 1.0, lambda: f"residual_dropout = {residual_dropout}: must be in [0, 1)")
    dropout_seed = seed_bits("dropout_seed", dropout_seed)
    if not torch.compiler.is_compiling():  # what is compiled is captured later: the operator looks again
        check_not_captured(max(attention_dropout, residual_dropout), x)
    if cu_seqlens is not None:
        check_documents(cu_seqlens, cu_seqlens, x)
    queries, seen = seq, seq
    if kv_cache is not None:
        keys, values, length = kv_cache
        check(
            isinstance(length, Tensor) == (cu_seqlens is not None),
            lambda: "kv_cache[2]: must be a number, or with cu_seqlens an int32 tensor of a number for each document",
        )
        _check_cache("kv_cache[0]", keys, length, x, cu_seqlens, kv_heads, head_dim)
        _check_cache("kv_cache[1]", values, length, x, cu_seqlens, kv_heads, head_dim)
        if not isinstance(length, Tensor):
            seen = length + seq
        elif cu_seqlens is not None:  # how long each document is only the run knows
            queries, seen = -(-batch * seq // (cu_seqlens.shape[0] - 1)), keys.shape[1]
    check_table(x, batch, seq, head_dim, cos, sin, positions)
    name = choose(
        "parallel_block", x.device, backend,
        dtype=x.dtype, head_dim=head_dim, size=size_class(queries, seen),
        training=kv_cache is None and differentiated(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out),
        hidden=hidden, inner=inner, rotary_dim=2 * cos.shape[-1],
    )  # fmt: skip
    forward = in_graph("parallel_block", name)
    parameters = (norm_weight, norm_bias, w_in, b_in, w_out, b_out)
    if forward is not None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and kv_cache is None):
            return forward(
                x, *parameters, cos, sin, positions, cu_seqlens, heads, kv_heads, head_dim, eps,
                Dropout(attention_dropout, dropout_seed), Dropout(residual_dropout, dropout_seed), kv_cache,
                piece="reference" if name == "reference" else forced_backend(backend),
            )  # fmt: skip
    rows = x.reshape(batch * seq, hidden)
    options = (
        cos, sin, positions, cu_seqlens, seq, heads, kv_heads, head_dim, eps, attention_dropout, residual_dropout,
        dropout_seed, name,
    )  # fmt: skip
    if kv_cache is not None:
        with torch.no_grad():
            each = (0, length) if isinstance(length, Tensor) else (length, None)
            y = torch.ops.phi1.parallel_block_cached(rows, *parameters, keys, values, *each, *options)
    else:
        y = FusedBlock.apply(rows, *parameters, differentiated(rows, *parameters), *options)[0]
    return y.view(batch, seq, hidden)
