"""phi-1's network ("Textbooks Are All You Need", arXiv 2306.11644, section 2.3): a decoder of parallel blocks.

    x = embedding(tokens)
    x = x + dropout([attention | MLP](LN(x)))     each block, one call of `kernels.parallel_block`
    logits = LN(x) W^T + b                             lm_head, not tied to the embedding

Shape suffixes: b batch, t time, d hidden, v vocabulary.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import BlockShape, cache_rows, layer_norm, linear, linear_cross_entropy, parallel_block
from kernels.autocast import cast_dtype
from kernels.reference import CacheRows, KVCache
from kernels.seeds import Seed
from phi1.config import ModelConfig
from phi1.errors import UserError


@dataclasses.dataclass
class Cache:
    """Keys and values of the tokens seen so far, for incremental decoding; `Phi1.new_cache` makes one.

    keys, values: (layers, batch, max_length, kv_heads, head_dim). length: tokens seen; a number where every row has
    seen as many, int32 (batch,) where calls are packed: cu_seqlens' document i goes on in row i. A forward pass over T
    tokens writes a row's positions [length, length + T) and moves length on.
    """

    keys: Tensor
    values: Tensor
    length: int | Tensor = 0


class Block(nn.Module):
    """One layer's weights, fused along the two matrix products of the parallel block.

    w_in rows and b_in are [q | k | v | u]: query, key and value projections and the MLP's inner layer.
    w_out columns are [attention | activation(u)]. The attention's and the MLP's output biases stay two parameters,
    as in `PhiForCausalLM`: only their sum matters, but an optimizer moves each.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        self.shape = BlockShape(*heads, config.layer_norm_eps, activation=config.activation)
        self.training_shape = dataclasses.replace(
            self.shape, attention_dropout=config.attention_dropout, residual_dropout=config.residual_dropout
        )
        width_in = config.attention_width + 2 * config.kv_width + config.intermediate_size
        width_out = config.attention_width + config.intermediate_size
        self.norm_weight = nn.Parameter(torch.empty(config.hidden_size))
        self.norm_bias = nn.Parameter(torch.empty(config.hidden_size))
        self.w_in = nn.Parameter(torch.empty(width_in, config.hidden_size))
        self.b_in = nn.Parameter(torch.empty(width_in))
        self.w_out = nn.Parameter(torch.empty(config.hidden_size, width_out))
        self.b_attention = nn.Parameter(torch.empty(config.hidden_size))
        self.b_mlp = nn.Parameter(torch.empty(config.hidden_size))
        self.cast: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None = None
        """What `weights` gave, while `Phi1.cast_once` keeps it."""

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """norm_weight, norm_bias, w_in, b_in, w_out and b_out of `parallel_block`, for an input of that type."""
        # Cast before they are added, as in a model whose parameters have that type, or whose weights FSDP2 gathers in
        # it.
        low = cast_dtype(dtype, self.w_in.device)
        return (
            self.norm_weight.to(dtype),
            self.norm_bias.to(dtype),
            self.w_in.to(dtype),
            self.b_in.to(dtype),
            self.w_out.to(dtype),
            self.b_attention.to(low) + self.b_mlp.to(low),
        )

    def forward(
        self,
        x_btd: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        kv_cache: KVCache | None,
        dropout_seed: Seed,
    ) -> Tensor:
        return parallel_block(
            x_btd,
            *(self.cast or self.weights(x_btd.dtype)),
            *rotary,
            self.training_shape if self.training else self.shape,
            positions=positions,
            cu_seqlens=cu_seqlens,
            dropout_seed=dropout_seed,
            kv_cache=kv_cache,
        )


class Phi1(nn.Module):
    """The whole network.

    config: its shape. compute_dtype: what weights are cast to where they are used, and the type of the
    residual stream; None: the parameters' own type. Parameters in float32 with compute_dtype bfloat16 are mixed
    precision with master weights: the cast is differentiable, so gradients arrive in float32. The loss is float32.
    Under torch.autocast blocks, lm_head and loss compute in its dtype (kernels/autocast.py), which the residual stream
    then has too: as with that compute_dtype.

    Built on the meta device it holds shapes only; `to_empty(device)` followed by `reset_parameters()`, or
    `load_state_dict(…, assign=True)`, makes it real.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_weight = nn.Parameter(torch.empty(config.hidden_size))
        self.norm_bias = nn.Parameter(torch.empty(config.hidden_size))
        self.head_weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size))
        self._cast: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self.register_load_state_dict_post_hook(_after_load)
        self._fill_rotary()
        self.reset_parameters()

    def _fill_rotary(self) -> None:
        """Puts the rotary table, (max_positions, rotary_dim / 2) in float32, where the weights are.

        The angles are rounded to float32 as in transformers' modeling_phi.py. Exact ones differ by up to 1e-4 at
        position 2,000, and logits of a sharp model by 1e-3 (measured): it would not be the model that is exported.
        Computed on the CPU, so that it is the same on every device.
        """
        config, cpu = self.config, torch.device("cpu")
        exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=cpu) / config.rotary_dim
        positions = torch.arange(config.max_positions, dtype=torch.float32, device=cpu)
        angles = positions[:, None] * (1.0 / config.rotary_base**exponents)
        self.register_buffer("rotary_cos", angles.cos().to(self.embedding.device), persistent=False)
        self.register_buffer("rotary_sin", angles.sin().to(self.embedding.device), persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # nn.Module's `.to(bfloat16)` would round the rotary table, and `.to_empty()` would leave noise in it.
        super()._apply(fn, recurse)
        self._fill_rotary()
        return self

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws fresh weights: matrices N(0, initializer_range), biases 0, LayerNorms 1 and 0 (no depth scaling)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)
            elif name.endswith("norm_weight"):
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)

    @contextlib.contextmanager
    def cast_once(self) -> Iterator[None]:
        """Within the block all forward passes share one copy of the weights in the compute type, made at its beginning.

        For the micro-batches of one step, or the tokens of a completion: parameters must not change meanwhile. Each
        pass may have a backward pass of its own, whose gradients go through the copies to the parameters as if it had
        made them. The embedding is not copied: its rows are cast as they are looked up.
        """
        dtype = self.compute_dtype or self.embedding.dtype
        blocks = [block for block in self.blocks if isinstance(block, Block)]  # all of them, as far as mypy can see
        for block in blocks:
            block.cast = block.weights(dtype)
        self._cast = self._norm(dtype), self._head(dtype)
        try:
            yield
        finally:
            self._cast = None
            for block in blocks:
                block.cast = None

    def _norm(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._cast[0] if self._cast else (self.norm_weight.to(dtype), self.norm_bias.to(dtype))

    def _head(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._cast[1] if self._cast else (self.head_weight.to(dtype), self.head_bias.to(dtype))

    def new_cache(self, batch: int, max_length: int) -> Cache:
        """An empty cache for `batch` sequences of up to max_length tokens, in the compute type.

        For calls under torch.autocast make it there too: keys and values then have autocast's dtype.
        """
        config = self.config
        # In memory a head's keys lie one after another, row behind row: a step reads head by head.
        shape = (config.num_layers, config.num_kv_heads, batch, max_length, config.head_dim)
        dtype = cast_dtype(self.compute_dtype or self.embedding.dtype, self.embedding.device)
        keys, values = (
            torch.empty(shape, dtype=dtype, device=self.embedding.device).permute(0, 2, 3, 1, 4) for _ in range(2)
        )
        return Cache(keys, values)

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        dropout_seed: Seed = 0,
    ) -> Tensor:
        """What lm_head reads: the last block's output after the final LayerNorm, (batch, time, hidden)."""
        config, (batch, time) = self.config, tokens.shape
        seen = 0 if cache is None else cache.length
        if cache is not None and cu_seqlens is not None and not isinstance(seen, Tensor):
            seen = torch.full((cu_seqlens.shape[0] - 1,), seen, dtype=torch.int32, device=tokens.device)
        if positions is None:
            if cu_seqlens is not None:
                positions = document_positions(cu_seqlens, batch * time, seen).view(batch, time)
            elif isinstance(seen, Tensor):
                raise UserError("cache.length differs between rows: give cu_seqlens, which tokens go on in which row")
            elif seen + time > config.max_positions:
                raise UserError(
                    f"{seen + time} tokens: the model has {config.max_positions} positions (model.max_positions); "
                    "shorten the sequence"
                )
            elif cache is not None:
                positions = torch.arange(seen, seen + time, device=tokens.device)
        at: int | Tensor | CacheRows = seen
        if cache is not None and cu_seqlens is not None and isinstance(seen, Tensor):
            at = cache_rows(seen, cu_seqlens, batch * time, cache.keys.shape[2])
        x_btd = F.embedding(tokens, self.embedding)
        if self.compute_dtype is not None:
            x_btd = x_btd.to(self.compute_dtype)
        for layer, block in enumerate(self.blocks):
            kv_cache = None if cache is None else (cache.keys[layer], cache.values[layer], at)
            # A seed for every (call, layer), whether callers hash dropout_seed or count it up. No step of this sum
            # leaves int64: torch.compile keeps it as a symbol, so that a new seed is not a new graph.
            layer_seed = dropout_seed % (1 << 52) + (layer << 52)
            x_btd = block(x_btd, (self.rotary_cos, self.rotary_sin), positions, cu_seqlens, kv_cache, layer_seed)
        if cache is not None:
            cache.length = seen + (time if cu_seqlens is None else cu_seqlens.diff())
        return layer_norm(x_btd, *self._norm(x_btd.dtype), config.layer_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """lm_head: (…, hidden) -> (…, vocabulary), in the compute type."""
        return linear(hidden, *self._head(hidden.dtype))

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        dropout_seed: Seed = 0,
    ) -> Tensor:
        """Logits, or the summed loss.

        tokens: (batch, time) int64.
        targets: (batch, time) int64, what follows each token (the caller shifts); -100 does not count.
        cu_seqlens: (documents + 1,) int32, where documents start and end in the batch folded to batch * time
            tokens (ends of rows included). Attention and positions then stay inside a document, which is at most
            max_positions long. With a cache document i is what comes next in row i, and may be empty. Without it the
            rows are plain sequences, documents concatenated in them, as in the paper.
        positions: (time,) or (batch, time) int64, overrides what is derived from the above.
        cache: keys and values of the tokens before these; written and moved on in place. For inference: no gradient
            is recorded.
        dropout_seed: non-negative, another one for every training call; read only in training mode. A tensor, as in
            `kernels.flash_attention`, in a captured CUDA graph.

        Returns logits (batch, time, vocabulary) in the compute type, or with targets the cross-entropy summed over
        the targets that count, a float32 scalar: divide by their number, over all micro-batches.
        Raises UserError for more tokens than the model has positions.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            hidden = self.hidden_states(
                tokens, cu_seqlens=cu_seqlens, positions=positions, cache=cache, dropout_seed=dropout_seed
            )
            if targets is None:
                return self.logits(hidden)
            return linear_cross_entropy(hidden, *self._head(hidden.dtype), targets, reduction="sum")


def _after_load(model: Phi1, _: object) -> None:
    model._fill_rotary()  # a function with a name: a model with a lambda cannot be pickled


def document_positions(cu_seqlens: Tensor, total: int, seen: int | Tensor = 0) -> Tensor:
    """Each token's index in its own document, (total,) int64.

    cu_seqlens: (documents + 1,) int32, from 0 to total. seen: (documents,), the tokens of each document before these.
    """
    index = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, index, right=True) - 1
    return (index - (cu_seqlens[:-1] - seen)[document]).long()
