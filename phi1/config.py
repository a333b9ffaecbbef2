"""What a model is: shapes as frozen dataclasses, with the paper's two sizes by name."""

import dataclasses

from phi1.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a phi-1 style decoder (paper section 2.3; `PhiConfig` in transformers).

    Sizes count elements. `attention_width` = heads * head_dim need not equal `hidden_size`.
    """

    vocab_size: int = 51200
    """Rows of the embedding and of lm_head (codegen-350M-mono's tokenizer uses 50,295 of them)."""
    hidden_size: int = 2048
    """Width of the residual stream."""
    intermediate_size: int = 8192
    """Inner width of the MLP."""
    num_layers: int = 24
    """Parallel blocks."""
    num_heads: int = 32
    """Query heads."""
    num_kv_heads: int = 32
    """Key/value heads: equal to num_heads (multi-head), a divisor of it (grouped), or 1 (multi-query)."""
    head_dim: int = 64
    """Width of a head: 32, 64 or 128 in the fast kernels."""
    rotary_dim: int = 32
    """The first dims of a head that are rotated; even, at most head_dim."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    max_positions: int = 2048
    """Longest sequence, in tokens."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    attention_dropout: float = 0.0
    """Dropout probability on attention weights, in training."""
    residual_dropout: float = 0.0
    """Dropout probability on a block's output, in training."""

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                      "num_kv_heads", "head_dim", "rotary_dim", "max_positions"):  # fmt: skip
            if getattr(self, field) < 1:
                raise UserError(f"model.{field} = {getattr(self, field)}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"model.num_kv_heads = {self.num_kv_heads}: must divide num_heads = {self.num_heads}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise UserError(
                f"model.rotary_dim = {self.rotary_dim}: must be even and at most head_dim = {self.head_dim}"
            )
        for field in ("attention_dropout", "residual_dropout"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise UserError(f"model.{field} = {getattr(self, field)}: must be in [0, 1)")

    @property
    def attention_width(self) -> int:
        """num_heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim


PRESETS: dict[str, ModelConfig] = {
    "phi1": ModelConfig(),
    "phi1-small": ModelConfig(hidden_size=1024, intermediate_size=4096, num_layers=20, num_heads=16, num_kv_heads=16),
    # The quickstart's model: a few million parameters with a vocabulary trained for it.
    "phi1-tiny": ModelConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=4, num_kv_heads=4,
        max_positions=512,
    ),
}  # fmt: skip
