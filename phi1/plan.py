"""What a training will take: memory on each GPU by part, work by part, and at least how many days.

    phi1 plan recipes/pretrain-phi1.toml --gpus 8 --device a100

Counted, not measured, for the fused block (kernels/fused_block.py) and the chunked loss (kernels/chunked_loss.py): what
tensors there are, how many FLOP their products take, and how many bytes the kernels between them move. A part's time is
the longer of its FLOP at the peak and its bytes at the bandwidth of the data sheet, so the days are the fewest that the
device allows, reached by no program; which kernels serve a machine, `phi1 doctor` says.
"""

import dataclasses
import pathlib

import tyro

from phi1.config import ModelConfig, TrainConfig
from phi1.errors import UserError
from phi1.recipe import load_recipe

# NVIDIA's data sheets: dense bf16 FLOP/s with fp32 accumulation, bytes of memory, bytes/s.
DEVICES = {
    "a100": (312e12, 80e9, 2.039e12),
    "a100-40gb": (312e12, 40e9, 1.555e12),
    "h100": (989e12, 80e9, 3.35e12),
    "h200": (989e12, 141e9, 4.8e12),
    "b200": (2250e12, 180e9, 7.7e12),
    "l40s": (362e12, 48e9, 0.864e12),
    "l4": (121e12, 24e9, 0.3e12),
}
# Logits in a chunk of the loss on a GPU (kernels/chunked_loss.py).
CHUNK_LOGITS = {"cuda": 4096 * 51_200, "cpu": 256 * 51_200}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 plan`."""

    recipe: tyro.conf.Positional[pathlib.Path]
    """The recipe that is to be trained."""
    gpus: int = 8
    """How many GPUs share a step."""
    device: str = "a100"
    """Which: a100 (80 GB), a100-40gb, h100, h200, b200, l40s, l4. Of another nothing is known: no days are given."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A part of a step on one GPU, forward and backward."""

    name: str
    flop: float
    bytes: float

    def seconds(self, peak: float, bandwidth: float) -> float:
        """The least that the device allows."""
        return max(self.flop / peak, self.bytes / bandwidth)


def run(config: Config) -> None:
    """`phi1 plan`: prints the plan."""
    recipe = load_recipe(config.recipe)
    if config.gpus < 1:
        raise UserError(f"--gpus {config.gpus}: must be at least 1")
    micro_batches = -(-recipe.train.sequences_per_step // recipe.train.micro_batch)
    if micro_batches < config.gpus:
        raise UserError(f"--gpus {config.gpus}: a step of the recipe has {micro_batches} micro-batches only")
    print("\n".join(describe(recipe, config.gpus, config.device)))


def shapes(model: ModelConfig) -> dict[str, list[tuple[int, int]]]:
    """Rows and columns of every parameter, by part, as `Phi1` has them; a vector is one column."""
    hidden, inner, width = model.hidden_size, model.intermediate_size, model.attention_width
    width_in = width + 2 * model.kv_width + inner
    return {
        "embedding": [(model.vocab_size, hidden)],
        "block matrices": model.num_layers * [(width_in, hidden), (hidden, width + inner)],
        "biases and LayerNorms": model.num_layers * [*4 * [(hidden, 1)], (width_in, 1)] + 2 * [(hidden, 1)],
        "lm_head": [(model.vocab_size, hidden), (model.vocab_size, 1)],
    }


def parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters by part."""
    return {part: sum(rows * columns for rows, columns in each) for part, each in shapes(model).items()}


def _sharded(config: TrainConfig, gpus: int) -> bool:
    return config.train.data_parallel == "fsdp2" and gpus > 1


def _held(config: TrainConfig, gpus: int) -> int:
    """Parameters whose master weights, gradients and moments one GPU holds: all, or the rows of its shard of each."""
    share = gpus if _sharded(config, gpus) else 1
    return sum(-(-rows // share) * columns for part in shapes(config.model).values() for rows, columns in part)


def memory(config: TrainConfig, gpus: int, device: str = "cuda") -> dict[str, int]:
    """Bytes on one device by part, at the moment of a step when they are most; the parts are there at once."""
    model, count = config.model, parameters(config.model)
    hidden, inner, width = model.hidden_size, model.intermediate_size, model.attention_width
    width_in = width + 2 * model.kv_width + inner
    size = 4 if config.train.precision == "fp32" else 2  # bytes of the computation's type
    total = sum(count.values())
    by_muon = count["block matrices"] if config.optimizer.algorithm == "muon" else 0
    rows = min(config.train.micro_batch, config.train.sequences_per_step) * config.data.sequence_length
    step = -(-config.train.sequences_per_step // (config.train.micro_batch * gpus)) * rows

    saved = rows * (size * (hidden + width_in + width) + 4 * model.num_heads)  # x, z, attention's output and lse
    chunk = min(max(1, CHUNK_LOGITS[device] // model.vocab_size), rows)
    table = model.vocab_size * hidden
    wide = 4 if config.train.precision == "fp16" else size  # of the loss's gradients
    loss = size * chunk * (model.vocab_size + hidden) + wide * (table + rows * hidden)
    if config.train.precision in ("bf16", "auto") and chunk < rows:
        loss += 4 * table if device == "cuda" else 2 * table  # float32 sums, of which a CPU keeps a half here
    # Later the gradient that the loss made stands beside its scaled copy, and that one beside its float32 one.
    loss = max(loss, (wide + size) * table, (size + 4) * table if size < 4 else 0)
    dropout = model.residual_dropout > 0
    products = size * hidden * (width + inner)
    block = size * rows * (hidden * (1 + dropout) + width + inner + width_in) + products
    together = {
        "weights, float32": 4 * total,
        "gradients, float32": 4 * total,
        "AdamW's moments, float32": 8 * (total - by_muon),
        "Muon's momentum, float32": 4 * by_muon,
        "weights cast for the computation": 0 if size == 4 else size * (total - count["embedding"]),
    }
    if _sharded(config, gpus):
        each, outside, held = shapes(model), ("embedding", "lm_head"), _held(config, gpus)
        # Each is gathered in as many pieces of one size as there are processes.
        gathered = {part: sum(-(-rows // gpus) * gpus * columns for rows, columns in each[part]) for part in each}
        one = sum(gathered[part] for part in each if part not in outside) // model.num_layers
        accumulated = config.train.sequences_per_step > config.train.micro_batch * gpus
        together = {
            "shards of weights, float32": 4 * held,
            "shards of gradients, float32": 4 * held,
            "shards of AdamW's moments, float32": 8 * held,
            "embedding and lm_head, gathered, float32": 4 * sum(gathered[part] for part in outside),
            "lm_head cast for the computation": 0 if size == 4 else size * count["lm_head"],
            "two blocks' weights, gathered": 2 * size * one,
            "gradients that are not exchanged yet, float32": 4 * total if accumulated else 0,
        }
        block += size * one
    return together | {
        "kept of each block for its gradient": model.num_layers * saved,
        "hidden states before and after the last LayerNorm": 2 * size * rows * hidden,
        "tokens of a step": 2 * 8 * step,
        "while one block's gradient or the loss is made": max(loss, block),
    }


def work(config: TrainConfig, gpus: int) -> list[Work]:
    """What one GPU does in a step, by part."""
    model, count = config.model, parameters(config.model)
    hidden, inner, width, length = (
        model.hidden_size,
        model.intermediate_size,
        model.attention_width,
        config.data.sequence_length,
    )
    qkv = width + 2 * model.kv_width
    size = 4 if config.train.precision == "fp32" else 2
    sequences = config.train.sequences_per_step / gpus
    micro_batches = -(-config.train.sequences_per_step // (config.train.micro_batch * gpus))
    tokens, layers, total = sequences * length, model.num_layers, sum(count.values())
    chunks = micro_batches * -(-config.train.micro_batch * length * model.vocab_size // CHUNK_LOGITS["cuda"])
    # Each of a matrix's three products reads two operands and writes the third.
    traffic = (
        3 * size * (layers * (2 * hidden + qkv + 2 * inner + width) * tokens + micro_batches * count["block matrices"])
    )
    casts = micro_batches if _sharded(config, gpus) else 1
    by_muon, muon = 0, []
    if config.optimizer.algorithm == "muon":
        by_muon = count["block matrices"]
        # Five iterations of three products each, of every matrix on every GPU. Of an element's bytes 50 are theirs.
        shapes = [sorted((hidden, qkv + inner)), sorted((hidden, width + inner))]
        flop = layers * sum(5 * (4 * short**2 * long + 2 * short**3) for short, long in shapes)
        muon = [Work("Muon", flop, 84 * by_muon)]
    between = 5 * hidden + 2 * qkv + 2 * inner + 8 * hidden + 4 * inner + 2 * qkv + 2 * width
    return [
        Work("block matrices", 6 * count["block matrices"] * tokens, traffic),
        # 2 products forward, 5 backward, of which the causal mask leaves half.
        Work("attention", 7 * layers * width * length * tokens, layers * size * (3 * qkv + 5 * width) * tokens),
        Work("LayerNorm, rotary, GELU, dropout, residual", 0, layers * size * between * tokens),
        # Logits are written, turned into their gradient, and read by two products; sums of the weight's size per chunk.
        Work(
            "lm_head and loss",
            6 * count["lm_head"] * tokens,
            5 * size * model.vocab_size * tokens + 8 * count["lm_head"] * chunks,
        ),
        # float32 weights to the computation's type, and gradients of each micro-batch back and added up.
        Work(
            "casts of weights", 0, 0 if size == 4 else (6 * casts + 10 * micro_batches) * (total - count["embedding"])
        ),
        Work("clipping and AdamW", 0, (12 + 4 + 28) * _held(config, gpus) - 28 * by_muon),
        *muon,
    ]


def describe(config: TrainConfig, gpus: int, device: str) -> list[str]:
    """The plan as lines."""
    count, parts, works = parameters(config.model), memory(config, gpus), work(config, gpus)
    total, settings, length = sum(count.values()), config.train, config.data.sequence_length
    tokens = settings.sequences_per_step * length
    lines = [
        f"{total:,} parameters: {', '.join(f'{name} {number:,}' for name, number in count.items())}",
        f"{settings.steps:,} steps of {tokens:,} tokens, {settings.steps * tokens / 1e9:,.1f} billion in all; on "
        f"{gpus} x {device}, {settings.micro_batch} sequences of {length:,} at a time, {settings.precision}"
        + (f", {settings.data_parallel}" if gpus > 1 else ""),
        "",
        f"{'memory on each GPU':<52}{'GB':>8}",
        *(f"  {name:<50}{number / 1e9:>8.2f}" for name, number in parts.items() if number),
        f"  {'together':<50}{sum(parts.values()) / 1e9:>8.2f}",
    ]
    sheet = DEVICES.get(device.lower())
    if sheet is not None:
        fits = sum(parts.values()) < 0.95 * sheet[1]  # the driver, the context and fragments take some
        lines[-1] += f"   of {sheet[1] / 1e9:.0f}" + (
            ""
            if fits
            else ": does not fit; lower --micro-batch"
            + ("" if _sharded(config, gpus) else ', or set data_parallel = "fsdp2"') * (gpus > 1)
        )
    least = 0.0 if sheet is None else sum(part.seconds(sheet[0], sheet[2]) for part in works)
    lines += [
        "",
        f"{'a step on each GPU, forward and backward':<52}{'TFLOP':>8}{'GB':>10}"
        + ("" if sheet is None else f"{'seconds':>10}{'share':>8}"),
    ]
    for part in works:
        row = f"  {part.name:<50}{part.flop / 1e12:>8.1f}{part.bytes / 1e9:>10.1f}"
        if sheet is not None:
            seconds = part.seconds(sheet[0], sheet[2])
            row += f"{seconds:>10.3f}{seconds / least:>8.1%}"
        lines.append(row)
    if gpus > 1:
        what, exchanged = "gradients to and from the other GPUs", 8 * total
        if _sharded(config, gpus):  # weights for each pass, what is not in a block once for both; gradients once a step
            what, blocks = "weights from, gradients to the other GPUs", count["block matrices"]
            micro_batches = -(-settings.sequences_per_step // (settings.micro_batch * gpus))
            size = 4 if settings.precision == "fp32" else 2
            exchanged = micro_batches * (2 * size * blocks + 4 * (total - blocks)) + 4 * total
        lines.append(f"  {what:<50}{'':>8}{(gpus - 1) / gpus * exchanged / 1e9:>10.1f}")
    if sheet is None:
        return [*lines, "", f"{device}: no data sheet here, so no days (known: {', '.join(DEVICES)})"]
    strict = 6 * (total - count["embedding"]) + 12 * config.model.num_layers * config.model.attention_width * length
    limit = strict * tokens / gpus / sheet[0] / least
    days = settings.steps * least / 86_400
    return [
        *lines,
        "",
        f"at least {days:.2f} days ({24 * days * gpus:,.0f} GPU hours), which is an MFU of {limit:.0%}; at 50% "
        f"{days * limit / 0.5:.2f} days, at 40% {days * limit / 0.4:.2f} (exchange, checkpoints and evaluations not "
        f"counted)",
    ]
