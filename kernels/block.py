"""phi-1's parallel block: attention and MLP side by side on one LayerNorm, as two matrix products.

    [q | k | v | u] = LN(x) W_in^T + b_in          hidden -> (heads + 2 kv_heads) head_dim + inner
    y = x + dropout([attn(rot(q), rot(k), v) | gelu(u)] W_out^T + b_out)

One residual mask covers the sum of both branches (transformers' PhiDecoderLayer draws one for each): with W_out
fused there is one sum to drop from, and each element is dropped with the same probability.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu, native, reference
from kernels.attention import check_documents, flash_attention
from kernels.checks import check, check_dtype, check_like, check_shape
from kernels.fused_block import Dropout, FusedBlock, Layout, Pieces, block_forward
from kernels.measured import size_class
from kernels.norm import layer_norm
from kernels.registry import choose, differentiated, forced_backend, implementation, register
from kernels.rotary import apply_rotary, check_table

KVCache = tuple[Tensor, Tensor, int]
"""Keys and values (batch, capacity, kv_heads, head_dim) of the tokens so far, and how many there are."""

# Without fusion: (linear, gelu); the other parts are ops and choose for themselves. Native backends bring `Pieces`.
register("parallel_block", "reference", (reference.linear, reference.gelu))
register("parallel_block", "torch", (F.linear, functools.partial(F.gelu, approximate="tanh")))

# An op, so that torch.compile carries the seed as a symbol (no new graph for each seed) and does not look inside.
torch.library.define("phi1::residual_keep", "(Tensor like, SymInt seed, float p) -> Tensor")


@torch.library.impl("phi1::residual_keep", ("cpu", "cuda"))
def _residual_keep(like: Tensor, seed: int, p: float) -> Tensor:
    batch, seq, hidden = like.shape
    if like.device.type == "cpu" and native.MISSING is None:  # the same bits, in a hundredth of the time
        return cpu.residual_keep(seed, batch * seq, hidden, p).view(like.shape)
    return reference.residual_keep(seed, batch * seq, hidden, p, like.device).view(like.shape)


@torch.library.register_fake("phi1::residual_keep")
def _residual_keep_fake(like: Tensor, seed: int, p: float) -> Tensor:
    return like.new_empty(like.shape, dtype=torch.bool)


def _cache_is_full(kv_cache: KVCache | None, more: int) -> str:
    assert kv_cache is not None
    return f"kv_cache holds {kv_cache[2]} of {kv_cache[0].shape[1]} tokens: {more} more do not fit; make a longer cache"


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
    attention_dropout, residual_dropout, dropout_seed: masks are `kernels.reference.dropout_keep` of the seed.
    kv_cache: (k, v, length): this call's keys and values are written at [length, length + seq), then attention
        runs over the first length + seq. For inference: no gradient flows through the cache.
    Returns y (batch, seq, hidden).

    The native backends run the fused route of kernels/fused_block.py, which saves x and z only. On `reference` and
    `torch` the block is composed of the ops of this package, each on that backend, or on its own choice if none is asked for.
    Raises ValueError for arguments that do not fit, BackendError if `backend` cannot serve the call.
    """
    check(x.dim() == 3, lambda: f"x.shape = {tuple(x.shape)}: must be (batch, seq, hidden)")
    check_dtype("x", x)
    batch, seq, hidden = x.shape
    check(batch * seq > 0, lambda: f"x.shape = {tuple(x.shape)}: must hold at least one token")
    q_width, kv_width = heads * head_dim, kv_heads * head_dim
    inner = w_in.shape[0] - q_width - 2 * kv_width
    check(
        w_in.dim() == 2 and w_in.shape[1] == hidden and inner > 0,
        lambda: f"w_in.shape = {tuple(w_in.shape)}: must be ({q_width} + 2 * {kv_width} + inner, {hidden})",
    )
    check_shape("b_in", b_in, (w_in.shape[0],), "(w_in's rows,)")
    check_shape("w_out", w_out, (hidden, q_width + inner), "(hidden, attention width + inner)")
    check_shape("b_out", b_out, (hidden,), "(hidden,)")
    for name, parameter in (("w_in", w_in), ("b_in", b_in), ("w_out", w_out), ("b_out", b_out)):
        check_like(name, parameter, "x", x)
    check(0.0 <= residual_dropout < 1.0, lambda: f"residual_dropout = {residual_dropout}: must be in [0, 1)")
    check(
        kv_cache is None or cu_seqlens is None,
        lambda: "kv_cache and cu_seqlens are both given: decode packed documents as separate batch entries",
    )
    check(0.0 <= attention_dropout < 1.0, lambda: f"attention_dropout = {attention_dropout}: must be in [0, 1)")
    check(
        kv_cache is None or kv_cache[2] + seq <= kv_cache[0].shape[1],
        lambda: _cache_is_full(kv_cache, seq),
    )
    check_table(x, batch, seq, head_dim, cos, sin, positions)
    name = choose(
        "parallel_block", x.device, backend,
        dtype=x.dtype, head_dim=head_dim, size=size_class(seq, seq if kv_cache is None else kv_cache[2] + seq),
        training=differentiated(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out),
        hidden=hidden, inner=inner, rotary_dim=2 * cos.shape[-1],
    )  # fmt: skip
    pieces = implementation("parallel_block", name)
    if isinstance(pieces, Pieces):
        for what, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            check_shape(what, parameter, (hidden,), "(hidden,), x's last dim")
            check_like(what, parameter, "x", x)
        check(kv_heads > 0 and heads % kv_heads == 0, lambda: f"kv_heads = {kv_heads}: must divide heads = {heads}")
        if cu_seqlens is not None:
            check_documents(cu_seqlens, cu_seqlens, x)
        rows = x.reshape(batch * seq, hidden)
        parameters = (norm_weight, norm_bias, w_in, b_in, w_out, b_out)
        if kv_cache is not None:
            layout = Layout(batch, seq, heads, kv_heads, head_dim, inner, cos, sin, positions)
            dropout = Dropout(attention_dropout, dropout_seed), Dropout(residual_dropout, dropout_seed)
            with torch.no_grad():
                y = block_forward(rows, *parameters, layout, None, eps, *dropout, pieces, kv_cache)[0]
        else:
            with_grads = torch.is_grad_enabled() and any(t.requires_grad for t in (rows, *parameters))
            y = FusedBlock.apply(
                rows, *parameters, with_grads, cos, sin, positions, cu_seqlens, seq, heads, kv_heads, head_dim, eps,
                attention_dropout, residual_dropout, dropout_seed, name,
            )  # fmt: skip
        return y.view(batch, seq, hidden)

    linear, gelu = pieces
    piece = forced_backend(backend)
    z = linear(layer_norm(x, norm_weight, norm_bias, eps, backend=piece), w_in, b_in)
    q, k, v, u = z.split([q_width, kv_width, kv_width, inner], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in (q, k, v))
    q, k = apply_rotary(q, k, cos, sin, positions=positions, backend=piece)
    if kv_cache is not None:
        keys, values, length = kv_cache
        keys[:batch, length : length + seq] = k
        values[:batch, length : length + seq] = v
        k, v = keys[:batch, : length + seq], values[:batch, : length + seq]
    if cu_seqlens is not None:
        q, k, v = (part.reshape(1, batch * seq, -1, head_dim) for part in (q, k, v))
    attention = flash_attention(
        q, k, v, dropout_p=attention_dropout, dropout_seed=dropout_seed,
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, backend=piece,
    )  # fmt: skip
    assert isinstance(attention, Tensor)
    y = linear(torch.cat([attention.reshape(batch, seq, q_width), gelu(u)], dim=-1), w_out, b_out)
    if residual_dropout > 0:
        keep = torch.ops.phi1.residual_keep(y.detach(), dropout_seed, residual_dropout)
        y = y * (keep * reference.dropout_scale(residual_dropout)).to(y.dtype)
    return x + y
