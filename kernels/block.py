"""phi-1's parallel block: attention and MLP side by side on one LayerNorm, as two matrix products.

    [q | k | v | u] = LN(x) W_in^T + b_in          hidden -> (heads + 2 kv_heads) head_dim + inner
    y = x + dropout([attn(rot(q), rot(k), v) | act(u)] W_out^T + b_out)

One residual mask covers the sum of both branches (transformers' PhiDecoderLayer draws one for each): with W_out
fused there is one sum to drop from, and each element is dropped with the same probability.

The op is here; what it checks in block_checks.py, its two routes in composed_block.py and fused_block.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import composed_block, reference  # noqa: F401  (composed_block registers `reference` and `torch`)
from kernels.autocast import cast_inputs
from kernels.autograd import unwatched
from kernels.block_checks import check_block, check_rows
from kernels.fused_block import FusedBlock, forward_cached, forward_of_rows
from kernels.measured import size_class
from kernels.reference import BlockShape, CacheRows, KVCache
from kernels.registry import choose, differentiated, forced_backend, in_graph
from kernels.seeds import Seed, check_seed, for_backward, operands


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
    shape: BlockShape,
    *,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_seed: Seed = 0,
    kv_cache: KVCache | None = None,
    backend: str | None = None,
) -> Tensor:
    """One decoder layer (phi-1 paper section 2.3; transformers' PhiDecoderLayer), causal.

        shape = BlockShape(heads=32, kv_heads=32, head_dim=64)      once for a model
        y = parallel_block(x, *parameters, cos, sin, shape)

    x: (batch, seq, hidden). norm_weight, norm_bias: (hidden,).
    w_in: (heads * head_dim + 2 * kv_heads * head_dim + inner, hidden), rows [q | k | v | u]; b_in its rows.
    w_out: (hidden, heads * head_dim + inner), columns [attention | activated]; b_out: (hidden,). All of x's dtype.
    cos, sin: (positions, rotary_dim / 2) float32. positions: as in `apply_rotary`.
    shape: heads, head_dim, the LayerNorm's eps, the activation, and the probabilities of dropout, which are those of
        this call: a model has one BlockShape for training and one without dropout.
    cu_seqlens: int32 (documents + 1,), offsets into the folded batch * seq tokens; attention stays inside a document.
    dropout_seed: masks are `kernels.reference.attention_keep` and `residual_keep` of it. 64 bits, a number or
        an int64 tensor, as in `flash_attention`.
    kv_cache: (k, v, length): this call's keys and values are written at [length, length + seq), then attention
        runs over the first length + seq. With cu_seqlens document i goes on in row i, and length is int32 (documents,),
        the tokens that each row holds, or what `cache_rows` made of them; a document may be empty. k and v have x's
        dtype and device. For inference: such a call records no gradient, on any backend, whatever requires one.
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
    parameters = (norm_weight, norm_bias, w_in, b_in, w_out, b_out)
    inner = check_block(x, parameters, (cos, sin), shape, positions, cu_seqlens, kv_cache)
    seed = check_seed(dropout_seed, max(shape.attention_dropout, shape.residual_dropout), "x", x)
    batch, seq, hidden = x.shape
    queries, seen = seq, seq
    if kv_cache is not None:
        keys, values, length = kv_cache
        if not isinstance(length, Tensor | CacheRows):
            seen = length + seq
        elif cu_seqlens is not None:  # how long each document is only the run knows
            queries, seen = -(-batch * seq // (cu_seqlens.shape[0] - 1)), keys.shape[1]
            if isinstance(length, Tensor):
                length = reference.cache_rows(length, cu_seqlens, batch * seq, seen)
                kv_cache = keys, values, length
    name = choose(
        "parallel_block",
        x.device,
        backend,
        dtype=x.dtype,
        head_dim=shape.head_dim,
        size=size_class(queries, seen),
        training=kv_cache is None and differentiated(x, *parameters),
        hidden=hidden,
        inner=inner,
        rotary_dim=2 * cos.shape[-1],
    )
    if isinstance(seed, Tensor) and kv_cache is None and differentiated(x, *parameters):
        seed = for_backward(seed)
    forward = in_graph("parallel_block", name)
    if forward is not None:
        piece = "reference" if name == "reference" else forced_backend(backend)
        with torch.set_grad_enabled(torch.is_grad_enabled() and kv_cache is None):
            return forward(x, *parameters, cos, sin, shape, positions, cu_seqlens, seed, kv_cache, piece=piece)
    rows = x.reshape(batch * seq, hidden)
    seed_tensor, number = operands(seed)
    options = (cos, sin, positions, cu_seqlens, seed_tensor, seq, *shape.values, number, name)
    if kv_cache is not None:
        with torch.no_grad():
            each = (0, length[:4]) if isinstance(length, CacheRows) else (length, [])
            plain = unwatched(rows, *parameters, keys, values)
            run: Callable[..., Tensor] = forward_cached if plain else torch.ops.phi1.parallel_block_cached
            y = run(rows, *parameters, keys, values, *each, *options)
    elif unwatched(rows, *parameters):
        y = forward_of_rows(rows, *parameters, False, *options)[0]
    else:
        y = FusedBlock.apply(rows, *parameters, differentiated(rows, *parameters), *options)[0]
    return y.view(batch, seq, hidden)


def cache_rows(lengths: Tensor, cu_seqlens: Tensor, tokens: int, capacity: int) -> CacheRows:
    """Where the documents of a call go on in the rows of a cache, for `kv_cache`: once for all layers of a model.

    lengths: int32 (documents,), the tokens that each row holds. cu_seqlens: int32 (documents + 1,), the offsets of the
    new tokens, `tokens` in all. capacity: the tokens that a row has room for.
    Raises ValueError for arguments that do not fit.
    """
    check_rows("the cache", lengths, cu_seqlens, capacity)
    return reference.cache_rows(lengths, cu_seqlens, tokens, capacity)
