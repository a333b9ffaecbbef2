"""Our attention in transformers' models: `attn_implementation="phi1"`.

    from phi1.huggingface import register_attention
    register_attention()
    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M", attn_implementation="phi1")

transformers asks an implementation for two functions. `_mask` runs once in a forward pass: it is given the pattern that
the model wants (padding, packed sequences, a window), and what it returns goes to every layer. `_attention` runs in
each layer. The mask that they agree on is FlashAttention's: offsets of packed documents, (2, 1, 1, documents + 1)
int32, those of the queries and those of the keys in the batch folded to one sequence. Padding is a document without
queries, or without keys, so it costs nothing, and nothing is copied to leave it out. Four dims, because transformers
hands a mask with four dims on as it is. None: plain causal, the last query sees the last key.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kernels import flash_attention
from phi1.errors import UserError

Unsupported = Literal["error", "sdpa"]


def register_attention(*, unsupported: Unsupported = "error") -> None:
    """Makes `kernels.flash_attention` the attention "phi1" of transformers (4.57 and 5), for all its causal models.

        AutoModelForCausalLM.from_pretrained(..., attn_implementation="phi1")
        model.set_attn_implementation("phi1")

    Served: training and generation with dynamic and static caches, grouped key/value heads, padding on the left and on
    the right, packed sequences (position_ids that start again, cu_seq_lens_q and cu_seq_lens_k), attention dropout,
    scaling, any head_dim. Outputs at padding are zeros. Dropout draws its seed from torch's default generator.
    unsupported: what to do with a call outside of that: a sliding window or chunks shorter than the sequence, a mask
        that is not causal or has holes, a mask that the caller made, values of another width than keys, a position
        bias. "error": `UserError`, in one line. "sdpa": transformers' `sdpa` serves it. Softcaps, attention sinks and
        output_attentions, which `sdpa` does not serve either, and models with attention code of their own (CodeGen,
        Bloom) are always an error.

    Registering again replaces the choice. Raises UserError where transformers is missing or too old.
    """
    if unsupported not in ("error", "sdpa"):
        raise UserError(f"unsupported = {unsupported!r}: must be 'error' or 'sdpa'")
    try:
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise UserError(f"register_attention: {error}; run `pip install 'transformers>=4.57'`") from error

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        why = _refuses(module, query, key, value, attention_mask, options)
        if why is None:
            return _attention(query, key, value, attention_mask, **options), None
        if unsupported == "error":
            raise _error(why)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def mask(**pattern: Any) -> Tensor | None:
        _require_interface(pattern.get("config"))
        try:
            return _mask(**pattern)
        except _Unsupported as why:
            if unsupported == "error":
                raise _error(str(why)) from None
        # Never None, which here means causal with the last query at the last key.
        return sdpa_mask(**pattern | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    AttentionInterface.register("phi1", attention)
    AttentionMaskInterface.register("phi1", torch.compiler.disable(mask))


class _Unsupported(Exception):
    """Why documents cannot say a pattern."""


def _error(why: str) -> UserError:
    return UserError(
        f"attn_implementation='phi1': {why}; load the model with attn_implementation='sdpa', "
        "or let sdpa serve such calls: register_attention(unsupported='sdpa')"
    )


def _require_interface(config: object) -> None:
    """Raises UserError for a model of transformers that asks for a mask and then computes attention in its own code:
    Bloom, CodeGen and others. Our mask, or None, would mean another pattern to it, without a word.
    """
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    model = sys.modules.get(name)
    if model is not None and ".modeling_" in name and not hasattr(model, "ALL_ATTENTION_FUNCTIONS"):
        raise UserError(
            f"attn_implementation='phi1': {name.rpartition('.')[2].removeprefix('modeling_')} computes attention in "
            "its own code and takes no other; load the model with attn_implementation='eager'"
        )


# ------------------------------------------------------------------------------------------------------ the mask


def _mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    **_: object,
) -> Tensor | None:
    """Documents for the pattern in which transformers says a mask; see transformers.masking_utils.sdpa_mask.

    batch_size, q_length, kv_length: of the call; a static cache's kv_length includes its empty end.
    q_offset: where the first query stands among the keys; transformers 4 gives cache_position, of each query, instead
    of it and of q_length.
    mask_function: (batch, head, query, key) -> whether the query sees the key, padding aside.
    attention_mask: (batch, up to kv_length) bool, False at padding.
    Raises _Unsupported for a pattern that is not causal attention in documents.
    """
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    assert q_length is not None
    first, seen = int(q_offset), int(q_offset) + q_length  # the queries are the tokens [first, seen)
    if use_vmap:
        raise _Unsupported("the model adds a function of its own to the causal mask")
    if local_size is not None and kv_offset + kv_length > local_size:
        raise _Unsupported(f"sliding_window (or chunk) = {local_size}, shorter than the {kv_offset + kv_length} keys")
    if kv_offset != 0:
        raise _Unsupported(f"kv_offset = {kv_offset}: the cache has dropped keys")

    starts = _document_starts(batch_size, first, seen, mask_function, device)
    valid = torch.ones((batch_size, seen), dtype=torch.bool, device=device)
    if attention_mask is not None:
        given = attention_mask[:, :seen]
        valid[:, given.shape[1] :] = False
        valid[:, : given.shape[1]] = given
    if bool(starts.any()):
        if not bool(valid.all()):
            raise _Unsupported("packed sequences (position_ids that start again) beside padding in attention_mask")
        return packed_documents(starts)
    if seen == kv_length and bool(valid.all()):
        return None
    return _padded_documents(valid, first, kv_length)


def _document_starts(
    batch: int, first: int, seen: int, sees: Callable[..., Tensor], device: torch.device | str | None
) -> Tensor:
    """(batch, queries) bool: whether a query does not see the token before it, which so ends a document.

    The pattern is a function; instead of all its values a few for each query are looked at: the token before, the one
    after, and the first one of the document.
    """
    row = torch.arange(batch, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    query = torch.arange(first, seen, device=device)[None]
    shape = (batch, seen - first - 1)
    starts = torch.zeros((batch, seen - first), dtype=torch.bool, device=device)
    starts[:, 1:] = ~sees(row, head, query[:, 1:], query[:, :-1]).expand(shape)
    if bool(sees(row, head, query[:, :-1], query[:, 1:]).any()):
        raise _Unsupported("a mask that is not causal")
    start = torch.where(starts, query - first, 0).cummax(dim=1).values
    start = torch.where(start > 0, start + first, 0)  # the first document begins with the cache
    if not bool(sees(row, head, query, start).all()):
        raise _Unsupported("a window shorter than the sequence")
    return starts


def packed_documents(starts: Tensor) -> Tensor:
    """Documents that begin where `starts` (batch, time) is True, and with each row; queries and keys are the same."""
    starts = starts.clone()
    starts[:, 0] = True
    offsets = torch.cat([starts.flatten().nonzero()[:, 0], starts.new_full((1,), starts.numel(), dtype=torch.int64)])
    return offsets.int().expand(2, 1, 1, -1).contiguous()


def _padded_documents(valid: Tensor, first: int, kv_length: int) -> Tensor:
    """Five documents a row: queries at the padding before, its keys, the sequence, queries at the padding behind, its
    keys.

    valid: (batch, seen) bool. first: the first query's index. kv_length: keys that there are, in a static cache more
    than were seen.
    """
    seen = valid.shape[1]
    queries = seen - first
    count = valid.sum(dim=1)
    begin = valid.int().argmax(dim=1)
    end = seen - valid.flip(1).int().argmax(dim=1)
    holes = ((end - begin != count) & (count > 0)).nonzero()[:, 0].tolist()
    if holes:
        raise _Unsupported(
            f"attention_mask has a hole in row {holes[0]} (generation goes on after padding on the right, say): pad on "
            f"the left"
        )
    end = begin + count
    before = (begin - first).clamp(0, queries)
    inside = (end - first).clamp(0, queries) - before
    none = torch.zeros_like(count)
    lengths = torch.stack(
        [
            torch.stack([before, none, inside, queries - before - inside, none], dim=1),
            torch.stack([none, begin, count, none, kv_length - end], dim=1),
        ]
    )
    return _offsets(lengths.flatten(1))


def _offsets(lengths: Tensor) -> Tensor:
    """(2, documents) lengths of queries and keys -> the mask (2, 1, 1, documents + 1)."""
    return nn.functional.pad(lengths.cumsum(dim=1), (1, 0)).int()[:, None, None]


# ------------------------------------------------------------------------------------------------- the attention


def _is_documents(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.shape[:3] == (2, 1, 1)


def _refuses(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> str | None:
    """Why documents and our kernels cannot serve a call, or None. Raises UserError for what sdpa cannot serve
    either.
    """
    for name in ("softcap", "s_aux", "output_attentions"):
        if (given := options.get(name)) is not None and given is not False:
            shown = "learned attention sinks" if name == "s_aux" else f"{name} = {given}"
            raise UserError(f"attn_implementation='phi1': {shown}: load the model with attn_implementation='eager'")
    if mask is not None and not _is_documents(mask):
        return f"a mask of the caller's own, {tuple(mask.shape)} {mask.dtype}"
    is_causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return "attention that is not causal"
    window = options.get("sliding_window")
    if window is not None and key.shape[2] > window:
        return f"sliding_window = {window}, shorter than the {key.shape[2]} keys"
    if value.shape[-1] != query.shape[-1]:
        return f"values of width {value.shape[-1]} beside queries and keys of {query.shape[-1]}"
    for name in ("position_bias", "cache"):
        if options.get(name) is not None:
            return f"{name} is given"
    return None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_: object,
) -> Tensor:
    """query (batch, heads, queries, head_dim), key and value (batch, kv_heads, keys, head_dim) -> (batch, queries,
    heads, head_dim), as transformers has them.
    """
    batch, heads, queries, head_dim = query.shape
    # Of the device's default generator, so that torch.manual_seed decides it and activation checkpointing draws it
    # again; a tensor, so that a graph that was compiled or captured draws it anew.
    seed = torch.randint(2**63 - 1, (), device=query.device) if dropout > 0 else 0
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "dropout_seed": seed}
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        cu_q, cu_k = cu_seq_lens_q.int(), cu_seq_lens_k.int()
    else:
        if mask is None and queries == key.shape[2]:
            mask = _restarts(position_ids, batch)
        if mask is None:
            return _call(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), options)
        if queries == 1:
            return _one_query(query, key, value, mask, options)
        cu_q, cu_k = mask[:, 0, 0]
    q, k, v = (x.transpose(1, 2).reshape(1, -1, x.shape[1], head_dim) for x in (query, key, value))
    out = _call(q, k, v, {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k} | options)
    return out.view(batch, queries, heads, head_dim)


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """The same for one query a row, where every key/value head is a document of its own: so a cache, (batch, kv_heads,
    keys, head_dim) in memory, is read where it is. mask: of `_padded_documents`."""
    batch, heads, _, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    lengths = mask.diff().view(2, batch, 1, -1).expand(-1, -1, kv_heads, -1)
    cu_q, cu_k = _offsets(lengths.flatten(1))[:, 0, 0]
    q = query.reshape(1, batch * kv_heads, heads // kv_heads, head_dim)
    k, v = (x.reshape(1, batch * kv_heads * keys, 1, head_dim) for x in (key, value))
    return _call(q, k, v, {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k} | options).view(batch, 1, heads, head_dim)


def _restarts(position_ids: Tensor | None, batch: int) -> Tensor | None:
    """Documents where positions do not go on by one, or None.

    transformers looks for those itself, but not where there is a cache, and models make one unless use_cache=False.
    """
    if position_ids is None or position_ids.dim() != 2 or torch.compiler.is_compiling():
        return None
    starts = nn.functional.pad(position_ids.diff() != 1, (1, 0)).expand(batch, -1)
    return packed_documents(starts) if bool(starts.any()) else None


def _call(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    out = flash_attention(q, k, v, **options)
    assert isinstance(out, Tensor)
    return out
