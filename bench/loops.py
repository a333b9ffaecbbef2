"""Whole training loops for bench/train.py: phi1's Trainer, Hugging Face's, and nanoGPT's in plain torch.

Each is a function that returns the call that does the loop's next optimizer step. All of them train the same shape with
float32 weights, in the benchmark's dtype (autocast, or casts of the weights), with AdamW (fused), gradients clipped to
1, two micro-batches a step, and a constant learning rate.
"""

import contextlib
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Unavailable
from phi1.config import DataConfig, LoopConfig, ModelConfig, OptimizerConfig, TrainConfig
from phi1.distributed import StopSignals, World
from phi1.run import opened
from phi1.tokenizer import train_tokenizer
from phi1.tokens import TokenWriter
from phi1.train import Trainer

MICRO_BATCHES = 2
LR = 1e-4
STEPS = 1_000_000
"""More than any benchmark takes."""


def phi1(shape: ModelConfig, batch: int, device: str, dtype: str, *, compiled: bool) -> Callable[[], Any]:
    """`phi1 train`'s own steps, from token shards on the disk; what it writes after a step is left out."""
    length, stack = shape.max_positions, contextlib.ExitStack()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 4, 320)
    if shape.vocab_size < tokenizer.vocab_size:
        raise Unavailable(f"its tokenizer has {tokenizer.vocab_size} ids, the model {shape.vocab_size}")
    writer = TokenWriter(folder / "tokens", tokenizer, masked=False, identity={})
    ids = torch.randint(tokenizer.eot_id, (64, length)).tolist()
    writer.write(0, ((row, None) for row in ids))
    writer.finish(1)
    loop = LoopConfig(
        folder / "run",
        steps=STEPS,
        sequences_per_step=MICRO_BATCHES * batch,
        micro_batch=batch,
        precision=dtype,  # type: ignore[arg-type]
        device=device,
        compile=compiled,
        tune=False,
    )
    optimizer = OptimizerConfig(lr=LR, lr_floor=LR, warmup_steps=0)
    config = TrainConfig(shape, DataConfig(folder / "tokens", sequence_length=length), loop, optimizer)
    run = stack.enter_context(opened(config, stack.enter_context(World(device))))
    trainer = Trainer(run, StopSignals())

    def step() -> None:
        trainer.update()

    weakref.finalize(step, stack.close)
    return step


class _InTurn:
    """Has a loop that runs in a thread of its own do one step a call: it calls `begin` before each step and `stepped`
    behind.
    """

    def __init__(self, loop: Callable[["_InTurn"], Any]) -> None:
        self._go, self._done, self._ended = threading.Semaphore(0), threading.Semaphore(0), False
        self._failure: BaseException | None = None

        def run() -> None:
            try:
                loop(self)
            except BaseException as error:
                self._failure = error
            self._done.release()

        threading.Thread(target=run, daemon=True).start()

    def begin(self) -> None:
        """Waits for the call."""
        self._go.acquire()
        if self._ended:
            raise SystemExit

    def stepped(self) -> None:
        """Lets the call return."""
        self._done.release()

    def end(self) -> None:
        """Ends the loop, the thread and what they hold."""
        self._ended = True
        self._go.release()

    def __call__(self) -> None:
        self._go.release()
        self._done.acquire()
        if self._failure is not None:
            raise self._failure


def hugging_face(shape: ModelConfig, batch: int, device: str, dtype: str, *, compiled: bool) -> Callable[[], Any]:
    """transformers' Trainer with PhiForCausalLM (sdpa)."""
    try:
        import accelerate  # noqa: F401
        import transformers
    except ImportError as error:
        raise Unavailable(f"{error}: pip install transformers accelerate") from None
    config = phi_config(shape)
    with torch.device(device):
        model = transformers.PhiForCausalLM(config)
    folder = tempfile.TemporaryDirectory()
    arguments = transformers.TrainingArguments(
        folder.name,
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=MICRO_BATCHES,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        use_cpu=device == "cpu",
        optim="adamw_torch_fused",
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        torch_compile=compiled,
    )

    class Turns(transformers.TrainerCallback):
        def __init__(self, turn: _InTurn) -> None:
            self.turn = turn

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.turn.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.turn.stepped()

    class Data(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            while True:
                row = torch.randint(shape.vocab_size, (shape.max_positions,))
                yield {"input_ids": row, "labels": row}

    turn = _InTurn(
        lambda turn: transformers.Trainer(model, arguments, train_dataset=Data(), callbacks=[Turns(turn)]).train()
    )

    def step() -> None:
        turn()

    weakref.finalize(step, turn.end)
    weakref.finalize(step, folder.cleanup)
    return step


def phi_config(shape: ModelConfig) -> Any:
    """The shape as transformers has it."""
    import transformers

    return transformers.PhiConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.max_positions,
        partial_rotary_factor=shape.rotary_dim / shape.head_dim,
        resid_pdrop=shape.residual_dropout,
        embd_pdrop=0.0,
        attention_dropout=shape.attention_dropout,
        use_cache=False,
        attn_implementation="sdpa",
    )


class Plain(nn.Module):
    """phi-1's network in PyTorch's own layers, as one would write it in a file."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(_PlainBlock(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.hidden_size)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size)
        frequencies = 10_000 ** -(torch.arange(0, shape.rotary_dim, 2) / shape.rotary_dim)
        angles = torch.arange(shape.max_positions)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of (batch, time) tokens."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class _PlainBlock(nn.Module):
    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(shape.hidden_size)
        self.qkv = nn.Linear(shape.hidden_size, 3 * shape.attention_width)
        self.attention_out = nn.Linear(shape.attention_width, shape.hidden_size)
        self.inner = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.outer = nn.Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape, n = self.shape, self.norm(x)
        batch, time, _ = x.shape
        q, k, v = self.qkv(n).view(batch, time, 3, shape.num_heads, shape.head_dim).permute(2, 0, 3, 1, 4)
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        dropout = shape.attention_dropout if self.training else 0.0
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        attention = self.attention_out(attention.transpose(1, 2).reshape(batch, time, -1))
        branches = attention + self.outer(F.gelu(self.inner(n), approximate="tanh"))
        return x + F.dropout(branches, shape.residual_dropout, self.training)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos[: x.shape[-2]].to(x.dtype), sin[: x.shape[-2]].to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def nanogpt(shape: ModelConfig, batch: int, device: str, dtype: str, *, compiled: bool) -> Callable[[], Any]:
    """The loop of nanoGPT's train.py, written anew: autocast, accumulated micro-batches, the next batch drawn from a
    memory map while the device computes, gradients freed behind each step. The network is `Plain`.
    """
    with torch.device(device):
        model = Plain(shape).train()
    network: Any = torch.compile(model) if compiled else model
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups: Sequence[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), fused=True)
    scaler = torch.amp.GradScaler(device, enabled=dtype == "fp16")
    data, length = torch.randint(shape.vocab_size, (1 << 20,)), shape.max_positions
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype)
    autocast = contextlib.nullcontext() if precision is None else torch.autocast(device, precision)

    def next_batch() -> tuple[Tensor, Tensor]:
        at = torch.randint(len(data) - length, (batch,)).tolist()
        tokens = torch.stack([data[i : i + length] for i in at])
        targets = torch.stack([data[i + 1 : i + 1 + length] for i in at])
        if device == "cuda":
            return tokens.pin_memory().to(device, non_blocking=True), targets.pin_memory().to(device, non_blocking=True)
        return tokens, targets

    drawn = [next_batch()]

    def step() -> None:
        for _ in range(MICRO_BATCHES):
            with autocast:
                loss = network(*drawn[0]) / MICRO_BATCHES
            drawn[0] = next_batch()
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step
