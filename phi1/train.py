"""The training loop, for pretraining and finetuning.

    phi1 train RECIPE [--option value]
    torchrun --nproc-per-node 8 --shutdown-timeout 300 phi1/train.py RECIPE [--option value]

A step reads `sequences_per_step` samples, `micro_batch` at a time on each device. The loss of a step is the
cross-entropy summed over all devices and micro-batches, divided by the number of targets that count in all of
them, so neither accumulation nor the number of devices nor an uneven loss mask changes a token's weight.

A run writes a checkpoint every `checkpoint_every` steps, at the end, and when it is told to stop (Ctrl-C, SIGTERM,
SIGHUP, SIGUSR1). Told to stop it drops the step that it is in after the micro-batch at hand, so that the checkpoint is
of the last step that was done, and exits with status 75 ("try again"; 130 after Ctrl-C). torchrun passes signals on,
waits for --shutdown-timeout seconds (30 unless given) before it kills, and exits with 1 whatever its processes do;
SIGUSR1 it passes on with --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1. Started again, by hand or by
--max-restarts, a run goes on from its last whole checkpoint as if it had not stopped: the same samples, the same
dropout, the same bits on the same machine. What becomes of steps that go wrong is in phi1/trouble.py.
"""

if __name__ == "__main__":
    # Run as a script, sys.path[0] is phi1/, whose config.py, files.py, … would hide other packages' modules.
    import pathlib
    import sys

    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    from phi1.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from kernels import registry
from phi1 import __version__, checkpoint
from phi1.background import Background
from phi1.batches import Batch
from phi1.config import TrainConfig
from phi1.distributed import StopSignals, World
from phi1.engine import Engine
from phi1.errors import Interrupted, UserError
from phi1.metrics import Metrics, StepLine, flops_per_token, parameter_count, peak_flops, peak_memory, validation_loss
from phi1.model import Phi1
from phi1.optimizer import learning_rate, make_optimizer, state_size
from phi1.profiling import traced
from phi1.run import Run, mendable, opened, plain
from phi1.tokens import TokenDataset
from phi1.trouble import IN_A_ROW, Trouble, require_finite
from phi1.tune import choose_kernels, tune_first

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def train(config: TrainConfig) -> pathlib.Path:
    """Trains as `config` says; returns the folder of the final checkpoint.

    Under torchrun every process calls this. Raises UserError for what the user can mend, and Interrupted, after writing
    a checkpoint, if a signal stopped it.
    """
    world = World(config.train.device)
    with StopSignals(loud=world.rank == 0) as signals, world, mendable(config, world), opened(config, world) as run:
        return Trainer(run, signals).train()


class Trainer:
    """What a run is made of, and its loop."""

    def __init__(self, run: Run, signals: StopSignals) -> None:
        self.opened, self.signals = run, signals
        self.config, self.world, self.data = run.config, run.world, run.data
        config, world, facts = run.config, run.world, run.facts
        tune_first(config, world, DTYPES[run.precision])

        with torch.device("meta"):
            self.model = Phi1(config.model, DTYPES[run.precision])
        world.first(
            lambda: run.require_space(4 * (parameter_count(self.model) + state_size(self.model, config.optimizer)))
        )
        self.model.to_empty(device="cpu")  # weights are drawn on the CPU: the same for every device
        if run.source is None:
            self.model.reset_parameters(torch.Generator().manual_seed(config.train.seed))
        else:
            checkpoint.load_parameters(run.source, self.model)
            world.each(lambda: require_finite(self.model.named_parameters(), run.source))
        state = checkpoint.read_optimizer(run.source) if run.source and run.resumed else {}
        if world.distributed:  # only rank 0 checked the hashes of the files that it read
            loaded = _sum_of_bits([*self.model.parameters(), *state.values()])
            world.agree({"what was loaded": f"bits that add up to {loaded}"})
        self.engine = Engine(self.model, world, config.train)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        scaled = run.precision == "fp16"
        self.scaler = torch.amp.GradScaler(world.device.type, init_scale=config.optimizer.loss_scale, enabled=scaled)
        if run.resumed:
            checkpoint.load_optimizer(state, self.model, self.optimizer)
            if scaled and facts["scaler"]:
                self.scaler.load_state_dict(facts["scaler"])
        self.step = facts["step"] if run.resumed else 0
        self.tokens_seen = facts["tokens"] if run.resumed else 0
        self.trouble = Trouble(config.train.spikes == "skip", facts.get("trouble"))
        self.saved, self.saved_at = self.step, time.monotonic()
        self.waits: list[float] = []  # of each checkpoint the seconds that training stood still for it
        self.writer = Background()  # rank 0's, of the checkpoint that was taken last
        self.metrics: Metrics | None = None  # rank 0's, once training begins
        self.kernels = choose_kernels(config.model, world, DTYPES[run.precision], run.facts.get("kernels"))

    def train(self) -> pathlib.Path:
        """Trains to the last step; returns the final checkpoint."""
        settings, world = self.config.train, self.world
        with contextlib.ExitStack() as stack:
            self.validated = world.first(lambda: self._open_metrics(stack))
            if self.step == settings.steps and not self._validations_due():
                world.say(f"{self.opened.folder}: all {self.step:,} steps are done")
                return checkpoint.resolve(self.opened.folder)
            progress = self._introduce()
            stack.enter_context(registry.held(self.kernels["orders"]))
            stack.enter_context(self.signals.held())
            profiled = settings.profile if world.rank == 0 else 0
            traced_step = stack.enter_context(traced(self.opened.folder, self.step, profiled, world.say))
            began = time.monotonic()
            try:
                while True:
                    if self._checkpoint_due():
                        self._save()
                    for name in self._validations_due():
                        self._validate(name)
                    if self.step == settings.steps:
                        self._say_waits(time.monotonic() - began)
                        world.first(self.writer.wait)
                        return checkpoint.resolve(self.opened.folder)
                    started = time.monotonic()
                    facts = self.update()
                    traced_step()
                    facts |= {"tokens": self.tokens_seen, "seconds": time.monotonic() - started}
                    if self.waits and self.saved == self.step - 1:
                        facts |= {"checkpoint_seconds": self.waits[-1]}
                    facts |= {"memory": peak_memory(world.device)} | progress.mfu(1, facts["seconds"])
                    self._record(**facts)
                    progress.add(self.step, facts)
            except Interrupted as stop:
                self._save_what_is_done()
                world.say(f"stopped by {stop.signal.name} at step {self.step:,}; the same command goes on from there")
                raise
            except Exception:
                self.writer.wait()  # what is being written is of a step that was done well, whatever went wrong since
                raise

    def update(self) -> dict[str, Any]:
        """One optimizer step; returns what metrics.jsonl says of it.

        Raises Interrupted, nothing changed, if any process was told to stop.
        """
        config, world, number = self.config, self.world, self.step + 1
        began = time.monotonic()
        batches = self._read(self._next_batches)
        waited = time.monotonic() - began
        # The loss is over this many targets, of all processes: known before the first backward pass.
        counted = world.sum(sum(batch.counted for batch in batches))[0]
        lr = learning_rate(config.optimizer, self.step, config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        self.optimizer.zero_grad(set_to_none=False)  # the buffers are the engine's
        losses = [0.0] * len(batches)  # summed over a micro-batch
        # The exchange averages gradients over processes, hence world.size: in fp16 behind it, so that many overflow
        # where one does.
        scaled = self.scaler.is_enabled()
        ahead, behind = (1, world.size) if scaled else (world.size, 1)
        with self.engine.step():
            for index, batch in enumerate(batches if counted else []):
                self._stop_if_told()
                # Gradients are exchanged in the last backward pass.
                with self.engine.exchanging(index + 1 == len(batches)):
                    loss = self.engine.network(
                        batch.inputs, targets=batch.targets, cu_seqlens=batch.bounds, dropout_seed=batch.seed
                    )
                    self.scaler.scale(loss * (ahead / counted)).backward()
                losses[index] = loss.item()  # waits for the device, so that a signal does not wait for the step
        self.scaler.unscale_(self.optimizer)
        for parameter in self.model.parameters() if behind > 1 else ():
            assert parameter.grad is not None
            parameter.grad.mul_(behind)
        norm = self.engine.clip_gradient(config.optimizer.clip_norm)
        # Rank 0's norm for all: another kind of machine may round it otherwise.
        total, norm = world.sum(sum(losses), norm if world.rank == 0 else 0.0)
        mean = total / counted if counted else None
        overflow = scaled and mean is not None and math.isfinite(mean) and not math.isfinite(norm)
        # An overflow is the scaler's business, which halves its scale: no trouble, but no update either.
        wrong, skip = (None, True) if overflow else self.trouble.judge(number, mean, norm)
        if not skip:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step = number
        self.tokens_seen += config.train.sequences_per_step * config.data.sequence_length
        facts: dict[str, Any] = {"loss": mean, "lr": lr, "grad_norm": norm, "counted_tokens": int(counted)}
        facts = {name: value for name, value in facts.items() if value is not None and math.isfinite(value)}
        facts |= {"data_seconds": waited}
        facts |= {f"sequences/{name}": count for name, count in self.data.taken(number - 1, number).items()}
        if scaled:
            facts |= {"loss_scale": self.scaler.get_scale()}
        if scaled or skip:
            facts |= {"skipped": skip}
        if wrong is not None:
            facts |= {"trouble": wrong, "sequences": self._to_blame(batches, losses)}
        self._end_if_hopeless(wrong)
        return facts

    def _read(self, action: Callable[[], list[Batch]]) -> list[Batch]:
        """What `action` reads, done by every process. Where one cannot, the steps that were done are saved first,
        unless it is that the last checkpoint could not be written.
        """
        try:
            return self.world.each(action)
        except (UserError, OSError, SystemExit):  # one of them in each process: World.each
            if not self.world.first(lambda: self.writer.failed):
                self._save_what_is_done()
            raise

    def _next_batches(self) -> list[Batch]:
        self.writer.check()  # a checkpoint that could not be written ends the run
        return self.data.of_step(self.step)

    @torch.no_grad()
    def evaluate(self, dataset: TokenDataset) -> float:
        """Mean loss per token over a set's first sequences, shared among processes."""
        world = self.world
        self.model.eval()
        loss = counted = 0.0
        for batch in self._read(lambda: self.data.of_evaluation(dataset)):
            self._stop_if_told()
            loss += self.model(batch.inputs, targets=batch.targets, cu_seqlens=batch.bounds).item()
            counted += batch.counted
        loss, counted = world.sum(loss, counted)
        if counted == 0:
            world.fail(f"{dataset.folder}: no token counts in the evaluation loss; its loss mask is 0 there")
        return loss / counted

    def _stop_if_told(self) -> None:
        """Raises Interrupted in every process if any was told to stop; all of them must call this."""
        number = int(self.world.max(self.signals.received)[0])
        if number:
            raise Interrupted(number)

    def _to_blame(self, batches: list[Batch], losses: list[float]) -> list[int]:
        """Indices of a step's sequences that went wrong: of the micro-batches whose loss is not finite, or all."""
        shares = self.world.gather([(batch.sequences, loss) for batch, loss in zip(batches, losses, strict=True)])
        everything = [pair for share in shares for pair in share]
        guilty = [sequences for sequences, loss in everything if not math.isfinite(loss)]
        return [index for sequences in guilty or [sequences for sequences, _ in everything] for index in sequences]

    def _end_if_hopeless(self, wrong: str | None) -> None:
        scale = self.scaler.get_scale()
        if self.trouble.too_much(self.step):
            what = f"{wrong}, and the {IN_A_ROW} steps before it were skipped too"
        elif self.scaler.is_enabled() and scale < 1:
            what = f"gradients overflow in fp16 even at a loss scale of {scale}"
        else:
            return
        self.world.first(self.writer.wait)
        self.world.fail(
            f"step {self.step}: {what}; look at the sequences in metrics.jsonl, and try a lower --lr, more "
            f"--warmup-steps or --precision bf16. Training goes on from {self._last_saved()}"
        )

    def _last_saved(self) -> str:
        return f"step {self.saved:,}" if self.saved else "the beginning"

    def _validations_due(self) -> list[str]:
        """Names of the held-out sets whose loss at this step is still to be taken."""
        settings = self.config.train
        if self.step != settings.steps and self.step % settings.evaluate_every:
            return []
        return [name for name in self.data.validation if self.step > self.validated.get(validation_loss(name), 0)]

    def _validate(self, name: str) -> None:
        loss = self.evaluate(self.data.validation[name])
        self.world.say(f"step {self.step:,}  validation loss{f' of {name}' if name else ''} {loss:.4f}")
        self._record(**{validation_loss(name): loss})
        self.validated[validation_loss(name)] = self.step

    def _checkpoint_due(self) -> bool:
        settings = self.config.train
        if self.step == self.saved:
            return False
        if self.step == settings.steps or self.step % settings.checkpoint_every == 0:
            return True
        old = time.monotonic() - self.saved_at >= 60 * settings.checkpoint_minutes
        return settings.checkpoint_minutes > 0 and self.world.first(lambda: old)

    def _save(self) -> None:
        """Takes a checkpoint of the step that was done last, and has it written while training goes on."""
        world, opened, tokenizer, began = self.world, self.opened, self.data.tokenizer, time.monotonic()
        world.first(self.writer.wait)
        if self.metrics is not None:
            self.metrics.sync()
        content = None
        if world.rank == 0 or self.engine.sharded:
            # A copy on the CPU, after which training may go on. FSDP2 gathers the shards: all processes take part.
            content = checkpoint.snapshot(self.model, self.optimizer, keep=world.rank == 0)
        step = self.step
        facts = {
            "step": step,
            "tokens": self.tokens_seen,
            "recipe": plain(self.config),
            "data_hash": self.data.training.hash,
            "sequences": self.data.taken(0, step),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "trouble": self.trouble.state(),
            "init_from": opened.facts.get("init_from"),
            "kernels": self.kernels,
        }

        def begin() -> None:
            assert content is not None
            remedy = f"try a lower --lr; {self._last_saved()} is kept"
            require_finite(content.weights.items(), f"step {step} is not saved", remedy)
            self.writer.start(
                lambda: opened.save(step, lambda folder: checkpoint.write(folder, content, tokenizer, facts))
            )

        world.first(begin)
        self.saved, self.saved_at = step, time.monotonic()
        self.waits.append(self.saved_at - began)

    def _save_what_is_done(self) -> None:
        if self.saved < self.step:
            self._save()
        self.world.first(self.writer.wait)

    def _say_waits(self, seconds: float) -> None:
        """Says how long of the training's `seconds` checkpoints took; the last one's writing is not over."""
        self.world.say(
            f"{len(self.waits)} checkpoint{'s' * (len(self.waits) != 1)} kept training waiting for "
            f"{sum(self.waits):.3g} s, {sum(self.waits) / seconds:.2%} of its time"
        )

    def _open_metrics(self, stack: contextlib.ExitStack) -> dict[str, int]:
        """Opens them on rank 0; returns the last step of each validation loss."""
        settings, recipe = self.config.train, plain(self.config)
        self.metrics = Metrics(
            self.opened.folder, self.step, tensorboard=settings.tensorboard, tracker=settings.tracker, recipe=recipe
        )
        stack.callback(self.metrics.close)
        return self.metrics.validated

    def _record(self, **facts: Any) -> None:
        if self.metrics is not None:
            try:
                self.metrics.record(self.step, **facts)
            except OSError as error:
                self.writer.fail(error)  # raised where all processes look for what a checkpoint's writing has raised

    def _introduce(self) -> StepLine:
        """Says what is about to run."""
        config, world = self.config, self.world
        settings, length = config.train, config.data.sequence_length
        parameters = parameter_count(self.model)
        flops = flops_per_token(config.model, parameters, length)
        own_peak = peak_flops(world.device, DTYPES[self.opened.precision])
        peak = world.sum(math.nan if own_peak is None else own_peak)[0]
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        world.say(
            f"phi1 {__version__}: {settings.run_folder}: {parameters:,} parameters, {self.opened.precision} on "
            f"{world.size} x {name}"
        )
        for line in self.data.describe(settings.steps):
            world.say(line)
        known = math.isfinite(peak)
        world.say(
            f"FLOPs per token = 6 x (parameters - input embedding) + 12 x layers x attention width x sequence = "
            f"{flops:.3g}; "
            + (
                f"MFU = tokens/s x FLOPs per token / peak of {peak / 1e12:.3g} TFLOP/s (data sheet, dense bf16)"
                if known
                else f"no MFU: the peak of {name} in {self.opened.precision} is not known here"
            )
        )
        return StepLine(config, self.step, flops / peak if known else None, world.say)


def _sum_of_bits(tensors: Iterable[torch.Tensor]) -> int:
    """A number that changes with any bit of tensors of float32."""
    return sum(int(tensor.detach().view(torch.int32).sum(dtype=torch.int64)) for tensor in tensors)
