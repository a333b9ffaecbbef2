"""What a model is, and how it is trained: frozen dataclasses; the paper's two model sizes by name.

A recipe (`phi1/recipe.py`) is a TOML file with one table for each field of `TrainConfig`.
"""

import dataclasses
import math
import pathlib
from typing import Literal, get_args

from phi1.errors import UserError

Activation = Literal["gelu_new", "relu2"]
"""The MLP's activations (`kernels.reference.ACTIVATIONS`), by their names in transformers."""


def _require_numbers(table: str, config: "ModelConfig | LoopConfig | OptimizerConfig") -> None:
    """UserError unless integers are some, and other numbers neither NaN nor infinite, which no comparison finds."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int and type(value) is not int:
            raise UserError(f"{table}.{field.name} = {value!r}: must be an integer")
        if field.type is float and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise UserError(f"{table}.{field.name} = {value!r}: must be a finite number")


def _require(table: str, config: object, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < minimum:
            raise UserError(f"{table}.{name} = {value}: must be at least {minimum}")


def _require_above_0(table: str, config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"{table}.{name} = {getattr(config, name)}: must be above 0")


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
    activation: Activation = "gelu_new"
    """Of the MLP; gelu_new, the tanh form, is phi-1's."""

    def __post_init__(self) -> None:
        _require_numbers("model", self)
        _require(
            "model",
            self,
            1,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "rotary_dim",
            "max_positions",
        )
        _require("model", self, 0, "initializer_range")
        _require_above_0("model", self, "rotary_base", "layer_norm_eps")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"model.num_kv_heads = {self.num_kv_heads}: must divide num_heads = {self.num_heads}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise UserError(
                f"model.rotary_dim = {self.rotary_dim}: must be even and at most head_dim = {self.head_dim}"
            )
        if self.activation not in get_args(Activation):
            raise UserError(f"model.activation = {self.activation!r}: must be one of {', '.join(get_args(Activation))}")
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
    # The quickstart's model: a few million parameters with a vocabulary trained for it. Weights start at about
    # hidden_size ** -0.5, as wide a spread as keeps activations in scale: 0.02 is the larger models'. Eight heads of 32
    # learn to copy sooner than four of 64 (LOG.md).
    "phi1-tiny": ModelConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=1024,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        head_dim=32,
        rotary_dim=16,
        max_positions=512,
        initializer_range=0.06,
    ),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut into sequences."""

    tokens: pathlib.Path | dict[str, pathlib.Path]
    """Folder of token shards to train on (`phi1 data tokenize` writes it). Or several, by name, mixed by `weights`."""
    weights: dict[str, float] | None = None
    """Of several sets: each one's share of the sequences to the others', by name (4 and 1 is 80% and 20%)."""
    validation_tokens: pathlib.Path | dict[str, pathlib.Path] | None = None
    """Folder of held-out token shards for the evaluation loss. Or several, by name: each has a loss of its own."""
    sequence_length: int = 2048
    """Tokens in a training sequence."""
    document_masking: bool = False
    """Let attention stay inside a document. The paper concatenates plainly: attention crosses <|endoftext|>."""
    loss_mask: bool = True
    """Use the shards' loss mask where they have one (exercises: the loss counts the solution only)."""

    def __post_init__(self) -> None:
        _require("data", self, 1, "sequence_length")
        for field in ("tokens", "validation_tokens"):
            folders = getattr(self, field)
            if isinstance(folders, dict) and (not folders or "" in folders):
                raise UserError(
                    f"data.{field} = {folders}: must be a folder, or name = folder for each of several sets"
                )
        names = sorted(self.tokens) if isinstance(self.tokens, dict) else []
        weights = self.weights
        if weights is None and len(names) > 1:
            raise UserError(
                f"data.weights is missing: data.tokens names {len(names)} sets ({', '.join(names)}), give each a weight"
            )
        if weights is not None and sorted(weights) != names:
            what = (
                f"exactly those of data.tokens ({', '.join(names)})"
                if names
                else "left out, for data.tokens is one folder"
            )
            raise UserError(f"data.weights, of {', '.join(sorted(weights)) or 'no set'}: must be {what}")
        for name, weight in (weights or {}).items():
            if not 0 < weight < math.inf:
                raise UserError(f"data.weights.{name} = {weight}: must be above 0; to leave a set out, do not name it")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long, on what, and what is written when. A recipe's [train] table."""

    run_folder: pathlib.Path
    """Folder of this run: checkpoints, metrics.jsonl, TensorBoard. A run started again there goes on."""
    init_from: pathlib.Path | None = None
    """Checkpoint (or run folder) whose weights to start from; otherwise the weights are random."""
    steps: int = 36_000
    """Optimizer steps; also the length of the learning rate schedule."""
    sequences_per_step: int = 1024
    """Sequences in a step over all devices; does not change with their number."""
    micro_batch: int = 8
    """Sequences on a device at a time; the rest of a step is accumulated. Lower it if memory runs out.
    Any number of devices shares the micro-batches of a step, the last of which may be smaller."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "bf16"
    """Of the computation. Parameters and optimizer state are fp32; fp16 has a loss scaler.
    auto: bf16 where the device has instructions for it; without them fp16 on a GPU, fp32 on a CPU."""
    device: str = "auto"
    """auto: a GPU where there is one, else the CPU. Or cpu, cuda, cuda:1."""
    data_parallel: Literal["ddp", "fsdp2"] = "ddp"
    """How processes share the model: each holds all of it, its gradients and optimizer state, or each a shard of them
    (less memory, more exchange; phi1/engine.py). A run may go on with the other. One process alone holds all."""
    compile: bool = False
    """Run the model through torch.compile."""
    seed: int = 0
    """Of the initial weights, the order of the sequences and dropout."""
    log_every: int = 10
    """Steps between progress lines (metrics.jsonl has every step)."""
    evaluate_every: int = 1000
    """Steps between evaluation losses, where validation_tokens is given."""
    evaluation_sequences: int = 256
    """Sequences in an evaluation loss, at most."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    checkpoint_minutes: float = 0.0
    """Also write a checkpoint when the last is so many minutes old (0: by steps only, as the paper)."""
    keep_last: int = 2
    """Newest checkpoints to keep. The disk needs room for one more, while that is written."""
    keep_every: int = 0
    """Also keep the checkpoints whose step is a multiple of this (0: none)."""
    spikes: Literal["log", "skip"] = "log"
    """What to do with a step whose loss or gradient is far above the last ones' (phi1/trouble.py): note it, or skip it.
    """
    tune: bool = True
    """Measure first which kernels are fastest (phi1 tune), on a machine of whose kind there is no measurement."""
    tensorboard: bool = False
    """Also write TensorBoard events to <run>/tensorboard."""
    tracker: Literal["trackio", "wandb"] | None = None
    """Also log to Trackio or Weights & Biases, project phi1; each start is a run of theirs, in a group named as the run
    folder.
    """
    profile: int = 0
    """Steps to trace with torch.profiler, after the first three of this start, into <run>/profile (0: none)."""

    def __post_init__(self) -> None:
        _require_numbers("train", self)
        _require(
            "train",
            self,
            1,
            "steps",
            "sequences_per_step",
            "micro_batch",
            "log_every",
            "evaluate_every",
            "evaluation_sequences",
            "checkpoint_every",
            "keep_last",
        )
        if self.run_folder.parts[:1] == ("~",):  # a shell expands it, a recipe or quotes do not
            raise UserError(f"train.run_folder = {self.run_folder}: would be a folder named ~ here; write the path out")
        _require("train", self, 0, "seed", "keep_every", "checkpoint_minutes", "profile")
        if self.seed >= 1 << 63:
            raise UserError(f"train.seed = {self.seed}: must be below 2**63")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and the learning rate's course: linear warmup, then linear decay, at once or at the end."""

    algorithm: Literal["adamw", "muon"] = "adamw"
    """adamw, as the paper. muon: the blocks' matrices by torch.optim.Muon, the rest (embedding, lm_head, biases,
    LayerNorms) by AdamW, with the same lr and weight_decay (phi1/optimizer.py).
    """
    lr: float = 1e-3
    """Largest learning rate."""
    lr_floor: float = 0.0
    """Learning rate that the decay ends at."""
    warmup_steps: int = 750
    """Steps of linear warmup."""
    decay_steps: int = 0
    """Steps of linear decay at the end (0: all after warmup, as the paper). With fewer the rate stays at lr in between:
    warmup-stable-decay (MiniCPM, arXiv 2404.06395), where a run that has not begun to decay may be given more steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only (embeddings among them; not on biases and LayerNorms)."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.98
    """Decay of AdamW's second moment."""
    eps: float = 1e-7
    """Added to the root of AdamW's second moment."""
    momentum: float = 0.95
    """Decay of Muon's momentum, which is Nesterov's."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    loss_scale: float = 65536.0
    """Initial loss scale, in fp16."""

    def __post_init__(self) -> None:
        _require_numbers("optimizer", self)
        _require(
            "optimizer",
            self,
            0,
            "lr_floor",
            "warmup_steps",
            "decay_steps",
            "weight_decay",
            "beta1",
            "beta2",
            "momentum",
        )
        _require_above_0("optimizer", self, "lr", "eps", "clip_norm", "loss_scale")
        for name in ("beta1", "beta2", "momentum"):
            if getattr(self, name) >= 1:
                raise UserError(f"optimizer.{name} = {getattr(self, name)}: must be below 1")
        if self.lr_floor > self.lr:
            raise UserError(f"optimizer.lr_floor = {self.lr_floor}: must be at most lr = {self.lr}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole training run; each field is a table of a recipe."""

    model: ModelConfig
    """Shape of the model. In a recipe: `preset` names one of PRESETS, other keys change it."""
    data: DataConfig
    """What is read."""
    train: LoopConfig
    """How long, on what, and what is written when."""
    optimizer: OptimizerConfig
    """The optimizer and the learning rate."""

    def __post_init__(self) -> None:
        if self.data.sequence_length > self.model.max_positions:
            raise UserError(
                f"data.sequence_length = {self.data.sequence_length}: must be at most "
                f"model.max_positions = {self.model.max_positions}"
            )
        if self.optimizer.algorithm == "muon" and self.train.data_parallel == "fsdp2":
            # On shards torch's products add up in bf16: weights moved otherwise by 5e-4 in four steps at lr = 3e-3
            # (2e-7 with ddp).
            raise UserError(
                "train.data_parallel = 'fsdp2': Muon moves whole matrices, of which each process would have a part; "
                "take ddp, or algorithm adamw"
            )
        if self.optimizer.decay_steps and self.optimizer.warmup_steps + self.optimizer.decay_steps > self.train.steps:
            raise UserError(
                f"optimizer.decay_steps = {self.optimizer.decay_steps}: with {self.optimizer.warmup_steps} of warmup "
                f"more than train.steps = {self.train.steps}"
            )
