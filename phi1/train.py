"""The training loop, for pretraining and finetuning.

    phi1 train RECIPE [--option value]
    torchrun --nproc-per-node 8 phi1/train.py RECIPE [--option value]

A step reads `sequences_per_step` samples, `micro_batch` at a time on each device. The loss of a step is the
cross-entropy summed over all devices and micro-batches, divided by the number of targets that count in all of
them, so neither accumulation nor the number of devices nor an uneven loss mask changes a token's weight.

A run writes a checkpoint every `checkpoint_every` steps, at the end, and when it is told to stop (Ctrl-C,
SIGTERM; torchrun allows 30 seconds for it unless --shutdown-timeout says more). Started again it goes on from the
last whole one, as if it had not stopped: the same samples, the same dropout, the same bits on the same machine.
"""

if __name__ == "__main__":
    # Run as a script, sys.path[0] is phi1/, whose config.py, files.py, … would hide other packages' modules.
    import pathlib
    import sys

    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    from phi1.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch.nn.parallel import DistributedDataParallel

import kernels
from kernels import registry
from phi1 import __version__, checkpoint
from phi1.config import TrainConfig
from phi1.distributed import StopSignals, World, native_precision
from phi1.errors import UserError
from phi1.metrics import Metrics, duration, flops_per_token, parameter_count, peak_flops
from phi1.model import Phi1
from phi1.optimizer import learning_rate, make_optimizer
from phi1.tokenizer import Tokenizer
from phi1.tokens import IGNORE, TokenDataset, document_bounds, mix
from phi1.tune import tune_first

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# A run that goes on with another value of one of these would not be the same run.
_FIXED = ("data.sequence_length", "data.document_masking", "data.loss_mask", "train.sequences_per_step", "train.seed")
# These say where and how, and change nothing that is worth a line when they differ.
_FREE = (
    "data.tokens",
    "data.validation_tokens",
    "train.run_folder",
    "train.device",
    "train.log_every",
    "train.tune",
    "train.tensorboard",
)


def train(config: TrainConfig) -> pathlib.Path:
    """Trains as `config` says; returns the folder of the final checkpoint.

    Under torchrun every process calls this. Raises UserError for what the user can mend, and KeyboardInterrupt,
    after writing a checkpoint, if a signal stopped it.
    """
    with World(config.train.device) as world:
        try:
            with _claimed(config.train.run_folder, world):
                return Trainer(config, world).run()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"no space left in {config.train.run_folder}: free space on that disk and run the same command again; "
                "the checkpoints there are whole"
            ) from error
        except kernels.BackendError as error:  # PHI1_KERNELS names one that cannot serve this model
            raise UserError(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{world.device} is out of memory at --micro-batch {config.train.micro_batch}: lower it "
                f"(the step stays {config.train.sequences_per_step} sequences)"
            ) from error


class Trainer:
    """A run: what it is made of, and its loop."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world, self.run_folder = config, world, config.train.run_folder
        step, group = config.train.sequences_per_step, config.train.micro_batch * world.size
        if step % group:
            raise UserError(
                f"train.sequences_per_step = {step}: must be a multiple of micro_batch x processes = "
                f"{config.train.micro_batch} x {world.size}; change --micro-batch"
            )
        self.micro_batches = step // group
        setting = config.train.precision
        self.precision = native_precision(world.device) if setting == "auto" else setting
        self._open_data()
        tune_first(config, world, DTYPES[self.precision])

        with torch.device("meta"):
            self.model = Phi1(config.model, DTYPES[self.precision])
        self.model.to_empty(device="cpu")  # weights are drawn on the CPU: the same for every device
        self.step = self.tokens_seen = 0
        self.facts: dict[str, Any] = {}
        resumed = checkpoint.newest(self.run_folder)
        if resumed is not None:
            self._resume(resumed)
        elif config.train.init_from is not None:
            self._start_from(checkpoint.resolve(config.train.init_from))
        else:
            self.model.reset_parameters(torch.Generator().manual_seed(config.train.seed))
        self.model.to(world.device)

        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.scaler = torch.amp.GradScaler(
            world.device.type, init_scale=config.optimizer.loss_scale, enabled=self.precision == "fp16"
        )
        if resumed is not None:
            checkpoint.load_optimizer(resumed, self.model, self.optimizer)
            if self.scaler.is_enabled() and self.facts["scaler"]:
                self.scaler.load_state_dict(self.facts["scaler"])

        # Gradients have buffers of their own from the start. Left to autograd, compiled code hands one tensor to two
        # parameters whose gradients are equal (b_attention, b_mlp), and accumulating would add to it twice.
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        network: Any = torch.compile(self.model) if config.train.compile else self.model
        if world.distributed:
            devices = [world.device] if world.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)
        self.network = network
        self.kernels = self._choose_kernels()

    def run(self) -> pathlib.Path:
        """Trains to the last step; returns the final checkpoint."""
        settings, world = self.config.train, self.world
        if self.step == settings.steps:
            world.say(f"{self.run_folder}: all {self.step:,} steps are done")
            return checkpoint.resolve(self.run_folder)
        peak = self._introduce()
        metrics = Metrics(self.run_folder, self.step, settings.tensorboard) if world.rank == 0 else None
        started, first = time.monotonic(), self.step
        losses: list[float] = []
        seconds = 0.0  # spent in steps since the last line; evaluations and checkpoints do not count
        keeping = contextlib.closing(metrics) if metrics else contextlib.nullcontext()
        with StopSignals() as signals, keeping, registry.held(self.kernels["orders"]):
            while self.step < settings.steps:
                step_started = time.monotonic()
                facts, stop = self.update(signals.received)
                self.step += 1
                elapsed = time.monotonic() - step_started
                seconds += elapsed
                losses.append(facts["loss"])
                last = stop or self.step == settings.steps
                if metrics is not None:
                    metrics.record(self.step, **facts, tokens=self.tokens_seen, seconds=elapsed)
                if last or self.step % settings.log_every == 0:
                    rate = len(losses) * settings.sequences_per_step * self.config.data.sequence_length / seconds
                    eta = (time.monotonic() - started) / (self.step - first) * (settings.steps - self.step)
                    world.say(
                        f"step {self.step:,}/{settings.steps:,}  loss {sum(losses) / len(losses):.4f}  "
                        f"lr {facts['lr']:.2e}  grad {facts['grad_norm'] or math.inf:.3f}  {rate:,.0f} tokens/s  "
                        f"MFU {100 * rate * self.flops_per_token / peak:.1f}%  ETA {duration(eta)}"
                    )
                    losses, seconds = [], 0.0
                if self.validation is not None and (
                    self.step == settings.steps or self.step % settings.evaluate_every == 0
                ):
                    loss = self.evaluate(self.validation)
                    world.say(f"step {self.step:,}  validation loss {loss:.4f}")
                    if metrics is not None:
                        metrics.record(self.step, validation_loss=loss)
                if last or self.step % settings.checkpoint_every == 0:
                    if metrics is not None:
                        metrics.sync()
                    world.on_first(self.save)
                if stop:
                    raise KeyboardInterrupt
        return checkpoint.resolve(self.run_folder)

    def update(self, stop: bool) -> tuple[dict[str, Any], bool]:
        """One optimizer step; returns its facts, and whether any process was told to stop."""
        config, world = self.config, self.world
        batches = [self._batch(index) for index in range(self.micro_batches)]
        counted, stops = world.sum(sum(int((targets != IGNORE).sum()) for _, targets, _, _ in batches), stop)
        if counted == 0:
            world.fail(f"step {self.step + 1}: no token counts in the loss; {self.dataset.folder} masks all of it")
        lr = learning_rate(config.optimizer, self.step, config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        self.optimizer.zero_grad(set_to_none=False)
        loss_sum = torch.zeros((), device=world.device)
        for index, (inputs, targets, bounds, seed) in enumerate(batches):
            # Gradients are exchanged once, in the last backward pass. DDP averages over processes: hence world.size.
            wait = world.distributed and index + 1 < len(batches)
            with self.network.no_sync() if wait else contextlib.nullcontext():
                loss = self.network(inputs, targets=targets, cu_seqlens=bounds, dropout_seed=seed)
                self.scaler.scale(loss * (world.size / counted)).backward()
            loss_sum += loss.detach()
        mean = world.sum(loss_sum.item())[0] / counted
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip_norm).item()
        self._check_finite(mean, norm)
        self.scaler.step(self.optimizer)  # in fp16, not if a gradient overflowed
        self.scaler.update()
        self.tokens_seen += config.train.sequences_per_step * config.data.sequence_length
        finite = math.isfinite(norm)
        facts = {"loss": mean, "lr": lr, "grad_norm": norm if finite else None, "counted_tokens": int(counted)}
        if self.scaler.is_enabled():
            facts |= {"loss_scale": self.scaler.get_scale(), "skipped": not finite}
        return facts, stops > 0

    @torch.no_grad()
    def evaluate(self, dataset: TokenDataset) -> float:
        """Mean loss per token over the first `evaluation_sequences` samples of seed 0, shared among processes."""
        size, world = self.config.train.micro_batch, self.world
        count = min(self.config.train.evaluation_sequences, dataset.windows(self.config.data.sequence_length))
        mine = range(count)[world.rank :: world.size]
        self.model.eval()
        loss = counted = 0.0
        for start in range(0, len(mine), size):
            inputs, targets, bounds = self._tensors(dataset, mine[start : start + size], seed=0)
            loss += self.model(inputs, targets=targets, cu_seqlens=bounds).item()
            counted += int((targets != IGNORE).sum())
        loss, counted = world.sum(loss, counted)
        if counted == 0:
            world.fail(f"{dataset.folder}: no token counts in the evaluation loss; its loss mask is 0 there")
        return loss / counted

    def save(self) -> None:
        """Writes a checkpoint of the step that was done last, and deletes those that are not to be kept."""
        settings = self.config.train
        facts = {
            "step": self.step,
            "tokens": self.tokens_seen,
            "recipe": _plain(self.config),
            "data_hash": self.dataset.hash,
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "init_from": self.facts.get("init_from"),
            "kernels": self.kernels,
        }
        folder = self.run_folder / f"step-{self.step:06d}"
        checkpoint.write_model(folder, self.model, self.tokenizer, facts, optimizer=self.optimizer)
        checkpoint.publish(folder, keep_last=settings.keep_last, keep_every=settings.keep_every)

    def _batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]:
        """Micro-batch `index` of this process in this step: inputs, targets, document bounds, dropout seed.

        Micro-batches are numbered through all processes, so that with the same micro_batch another number of
        processes computes the same ones, dropout included.
        """
        settings = self.config.train
        number = self.world.rank * self.micro_batches + index
        first = self.step * settings.sequences_per_step + number * settings.micro_batch
        samples = range(first, first + settings.micro_batch)
        seed = mix(settings.seed, self.step, number) >> 11  # the model reads 52 bits of it
        return *self._tensors(self.dataset, samples, settings.seed), seed

    def _tensors(
        self, dataset: TokenDataset, samples: range, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        options, device = self.config.data, self.world.device
        inputs, targets = dataset.batch(samples, options.sequence_length, seed=seed, loss_mask=options.loss_mask)
        bounds = None
        if options.document_masking:
            bounds = torch.from_numpy(document_bounds(inputs, dataset.eot_id)).to(device)
        return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), bounds

    def _check_finite(self, loss: float, norm: float) -> None:
        scaled = self.scaler.is_enabled()  # then an infinite gradient is no failure: the scale falls
        if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
            last = checkpoint.newest(self.run_folder)
            self.world.fail(
                f"step {self.step + 1}: {what}; try {'--precision bf16, ' if scaled else ''}a lower --lr or more "
                f"--warmup-steps. Training goes on from {last or 'the beginning'}"
            )
        if scaled and self.scaler.get_scale() < 1:
            self.world.fail(
                f"step {self.step + 1}: gradients overflow in fp16 even at a loss scale of {self.scaler.get_scale()}; "
                "try --precision bf16 or a lower --lr"
            )

    def _open_data(self) -> None:
        options, vocab_size = self.config.data, self.config.model.vocab_size
        self.dataset = TokenDataset(options.tokens)
        self.validation = None if options.validation_tokens is None else TokenDataset(options.validation_tokens)
        for dataset in filter(None, (self.dataset, self.validation)):
            dataset.windows(options.sequence_length)  # at least one
            if dataset.vocab_size > vocab_size:
                raise UserError(
                    f"{dataset.folder}: made by a tokenizer of {dataset.vocab_size:,} entries, more than "
                    f"model.vocab_size = {vocab_size:,}; raise it, or tokenize with a smaller one"
                )
            if dataset.tokenizer_hash != self.dataset.tokenizer_hash:
                raise UserError(
                    f"{dataset.folder}: made by another tokenizer than {self.dataset.folder}; make it again"
                )
            self.world.on_first(dataset.verify)
        self.tokenizer = Tokenizer.load(self.dataset.folder)
        if self.tokenizer.hash != self.dataset.tokenizer_hash:
            raise UserError(
                f"{self.dataset.folder / 'tokenizer.json'}: not the tokenizer that made the shards; "
                "run `phi1 data tokenize` again"
            )

    def _start_from(self, folder: pathlib.Path) -> None:
        facts = checkpoint.read_facts(folder)
        if Tokenizer.load(folder).hash != self.tokenizer.hash:
            raise UserError(
                f"{folder}: has another tokenizer than {self.dataset.folder}; tokenize with --tokenizer {folder}"
            )
        checkpoint.load_parameters(folder, self.model)
        origin = {"folder": str(folder), "step": facts.get("step"), "hash": checkpoint.digest(folder)}
        self.facts = {"init_from": origin}
        self.world.say(f"starting from {folder}")

    def _resume(self, folder: pathlib.Path) -> None:
        self.facts = checkpoint.read_facts(folder)
        checkpoint.require_shape(folder, self.config.model)
        there, here = _flat(self.facts["recipe"]), _flat(_plain(self.config))
        changed = [name for name in here if there.get(name) != here[name] and name not in _FREE]
        fixed = [f"{name} = {there.get(name)} there, {here[name]} here" for name in changed if name in _FIXED]
        if self.facts["data_hash"] != self.dataset.hash:
            fixed.append("other token shards")
        if fixed:
            raise UserError(
                f"{self.run_folder}: holds a run made otherwise ({'; '.join(fixed)}); choose another --run-folder, "
                "or delete this one"
            )
        if self.facts["step"] > self.config.train.steps:
            raise UserError(
                f"{folder}: past --steps {self.config.train.steps}; raise it, or choose another --run-folder"
            )
        self.world.say(f"going on from {folder}")
        for name in changed:
            self.world.say(f"  changed since then: {name} = {there.get(name)} -> {here[name]}")
        checkpoint.load_parameters(folder, self.model)
        self.step, self.tokens_seen = self.facts["step"], self.facts["tokens"]

    def _choose_kernels(self) -> dict[str, Any]:
        """The machine's kind, the backend that is asked for, and the orders of `kernels.registry`. Those of a run that
        goes on are kept, so that its numbers stay the same; what this machine would choose otherwise is said."""
        machine = registry.machine_of(self.world.device)
        now = registry.orders(machine, DTYPES[self.precision], self.config.model.head_dim)
        chosen: dict[str, Any] = {"kind": machine.kind, "forced": registry.forced_backend(None), "orders": now}
        before = self.facts.get("kernels") or chosen
        for name in ("kind", "forced"):
            if before[name] != chosen[name]:
                self.world.say(f"  changed since then: kernels, {name} = {before[name]} -> {chosen[name]}")
        for name, order in now.items():
            # Of another kind of machine some may not run here: this one's order stands behind what is kept.
            kept = tuple(version for version in before["orders"].get(name, ()) if version in order)
            if kept and kept[0] != order[0]:
                self.world.say(f"  kept: {name} on {kept[0]}; a new run would take {order[0]} on this machine")
            now[name] = (*kept, *(version for version in order if version not in kept))
        return chosen

    def _introduce(self) -> float:
        """Says what is about to run; returns the peak FLOP/s of all devices together."""
        config, world = self.config, self.world
        settings, length = config.train, config.data.sequence_length
        parameters, windows = parameter_count(self.model), self.dataset.windows(length)
        self.flops_per_token = flops_per_token(config.model, parameters, length)
        own_peak, source = peak_flops(world.device, DTYPES[self.precision])
        peak = world.sum(own_peak)[0]
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        world.say(
            f"phi1 {__version__}: {settings.run_folder}: {parameters:,} parameters, {self.precision} on {world.size} x {name}"
        )
        world.say(
            f"data: {self.dataset.tokens:,} tokens in {self.dataset.documents:,} documents; an epoch is {windows:,} "
            f"sequences of {length:,}; {settings.steps:,} steps of {settings.sequences_per_step:,} sequences are "
            f"{settings.steps * settings.sequences_per_step / windows:.2f} epochs"
        )
        world.say(
            "MFU = tokens/s x FLOPs per token / peak; FLOPs per token = 6 x (parameters - input embedding) + "
            f"12 x layers x attention width x sequence = {self.flops_per_token:.3g}; "
            f"peak = {peak / 1e12:.3g} TFLOP/s ({source}{f', sum of {world.size}' if world.size > 1 else ''})"
        )
        return peak


@contextlib.contextmanager
def _claimed(run_folder: pathlib.Path, world: World) -> Iterator[None]:
    """Keeps other trainings out of a run folder, and removes what an interrupted one left half-written there."""
    lock: list[IO[str]] = []

    def claim() -> None:
        run_folder.mkdir(parents=True, exist_ok=True)
        lock.append(open(run_folder / ".lock", "w"))  # noqa: SIM115, closed below
        try:
            fcntl.flock(lock[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{run_folder}: another training is running there; wait for it, or choose another --run-folder"
            ) from error
        checkpoint.remove_leftovers(run_folder)

    try:
        world.on_first(claim)
        yield
    finally:
        for file in lock:
            file.close()


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON-able values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _flat(tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{table}.{name}": value for table, values in tables.items() for name, value in values.items()}
