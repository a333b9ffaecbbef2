"""What a benchmark's script is: its cases and candidates, and the command line that all of them share."""

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import Benchmark, Candidate, matrix_peak

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """The same inputs for all candidates."""

    name: str
    works: dict[str, float]
    """What is timed ("forward", ...) and how much it is: FLOPs, bytes or tokens."""
    candidates: Sequence[Candidate]
    size: str | None = None
    """Of the call, as automatic choice sees it (`kernels.measured.size_class`); None: it is no op's."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """A benchmark."""

    name: str
    """Of the result files."""
    description: str
    form: str
    """What the numbers of a shape are, joined by " x "; the last may be in brackets: "tokens x hidden [x columns]"."""
    formula: str
    """How the amount of work follows from the shape."""
    shapes: dict[str, list[Shape]]
    """By device type, as all of these."""
    quick_shapes: dict[str, list[Shape]]
    dtypes: dict[str, list[str]]
    """Names in DTYPES; --quick takes the first."""
    cases: Callable[[str, str, Shape], Iterable[Case]]
    """(device, dtype's name, shape) -> the cases."""
    check: Callable[[Shape], str | None] = lambda shape: None
    """What is wrong with a shape, or None."""
    quantity: str = "FLOP"
    """Or "B", or "tokens". FLOP are compared with a matrix product's."""
    seconds: tuple[float, float] = (0.3, 2.0)
    """Measuring time for a group, with --quick and without."""
    rounds: dict[str, int] = dataclasses.field(default_factory=lambda: {"cuda": 10, "cpu": 3})
    """Rounds that every candidate gets in any case."""


def arguments(description: str, form: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases, fewer rounds")
    parser.add_argument("--shapes", help=f"comma-separated, each {form}, e.g. 1x512x...")
    parser.add_argument("--dtypes", help="comma-separated, of fp32, bf16, fp16")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--skip", help="leave out implementations whose name matches this regular expression")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument(
        "--save", action="store_true", help="write bench/results/<name>-<kind of machine>.json, .md and .png"
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses, checks the device and sets the threads."""
    options = parser.parse_args(argv)
    try:
        re.compile(options.skip or "")
    except re.error as error:
        parser.error(f"--skip {options.skip}: must be a regular expression ({error})")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}; make it")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False; use --device cpu")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads {options.threads}: must be at least 1")
        torch.set_num_threads(options.threads)
    return options


def parse_dtypes(parser: argparse.ArgumentParser, names: str) -> list[str]:
    """Checked names of dtypes."""
    for name in names.split(","):
        if name not in DTYPES:
            parser.error(f"--dtypes {name}: must be of {', '.join(DTYPES)}")
    return names.split(",")


def parse_shape(parser: argparse.ArgumentParser, text: str, suite: Suite) -> Shape:
    """ "1x512x32x64" -> (1, 512, 32, 64), as many as the suite's form names."""
    parts, most = text.split("x"), 1 + suite.form.count("x ")
    if not most - suite.form.count("[") <= len(parts) <= most or not all(p.isdigit() and int(p) > 0 for p in parts):
        parser.error(f"--shapes {text}: must be {suite.form}, positive whole numbers joined by 'x'")
    shape = tuple(int(p) for p in parts)
    wrong = suite.check(shape)
    if wrong is not None:
        parser.error(f"--shapes {text}: {wrong}")
    return shape


def main(suite: Suite, argv: Sequence[str] | None = None) -> None:
    """Runs a benchmark from the command line."""
    parser = arguments(suite.description, suite.form)
    options = parse(parser, argv)
    device = options.device
    if device not in suite.shapes:
        parser.error(f"--device {device}: this benchmark is for {', '.join(suite.shapes)}")
    shapes = (suite.quick_shapes if options.quick else suite.shapes)[device]
    if options.shapes:
        shapes = [parse_shape(parser, text, suite) for text in options.shapes.split(",")]
    dtypes = suite.dtypes[device][: 1 if options.quick else None]
    if options.dtypes:
        dtypes = parse_dtypes(parser, options.dtypes)
    flop = suite.quantity == "FLOP"
    prefix, scale = ("T", 1e12) if flop and device == "cuda" else ("G", 1e9)
    if suite.quantity == "tokens":
        prefix, scale = "", 1.0
    bench = Benchmark(
        suite.name,
        device,
        unit=f"{prefix}{suite.quantity}/s",
        formula=suite.formula,
        seconds=suite.seconds[0 if options.quick else 1],
        rounds=suite.rounds[device],
    )
    bench.json = options.json
    for name in dtypes:
        peak = matrix_peak(device, DTYPES[name]) / scale if flop else None
        if peak is not None:
            bench.notes.append(f"matrix product in {name}, measured in this run: {peak:.4g} {bench.unit}")
        for shape in shapes:
            for case in suite.cases(device, name, shape):
                label = " ".join(["x".join(map(str, shape)), name, case.name]).rstrip()
                wanted = [c for c in case.candidates if not (options.skip and re.search(options.skip, c.name))]
                for work, amount in case.works.items():
                    bench.group(label, work, amount / scale, wanted, peak, shape, name, case.size)
    bench.finish(options)
    if bench.failed:
        raise SystemExit("one of our own implementations failed: see the table")


def timed(
    run: Callable[..., Any],
    inputs: Sequence[Tensor],
    grads: Tensor | Sequence[Tensor] | None,
    work: str,
    parameters: Sequence[Tensor] = (),
) -> Callable[[], Any]:
    """The call to time: run(*inputs) without a graph ("forward"), the backward on a kept graph ("backward"), or both.

    grads: of what `run` returns; None for a scalar. The gradients of inputs and parameters are taken.
    """
    if work == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return run(*inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    wanted = [*leaves, *parameters]
    if work == "backward":
        out = run(*leaves)
        return lambda: torch.autograd.grad(out, wanted, grads, retain_graph=True)
    return lambda: torch.autograd.grad(run(*leaves), wanted, grads)


def our_backends(op: str, device: str, **options: Any) -> list[tuple[str, str | None]]:
    """(version, why it cannot be measured here or None) for every version of `op` but the reference."""
    import kernels.triton
    from kernels import registry

    found: list[tuple[str, str | None]] = []
    for version in registry.versions():
        if version == "reference" or not registry.has(op, version):
            continue
        try:
            registry.choose(op, torch.device(device), version, **options)
        except registry.BackendError as error:
            found.append((version, str(error).split("cannot serve this call: ")[-1].split("; able:")[0]))
        else:
            interpreted = registry.backend_of(version) == "triton" and kernels.triton.INTERPRETED
            found.append((version, "it runs in Triton's interpreter, for correctness only" if interpreted else None))
    return found


def automatic_choice(op: str, device: str, work: str, **options: Any) -> str:
    """The version that automatic choice takes for such a call."""
    from kernels import registry

    return registry.choose(op, torch.device(device), None, training=work != "forward", **options)


def op_candidates(
    op: str,
    device: str,
    ours: Callable[..., Any],
    peers: dict[str, Callable[[], Callable[..., Any]]],
    inputs: Sequence[Tensor],
    grads: Tensor | Sequence[Tensor] | None = None,
    **options: Any,
) -> list[Candidate]:
    """Automatic choice ("phi1"), every version of `op`, called as ours(*inputs, backend=...), and the peers, of each a
    function that makes it.

    grads: see `timed`. options: what the choice of a backend looks at, besides the dtype.
    """

    def mine(version: str | None, reason: str | None) -> Candidate:
        make = partial(timed, partial(ours, backend=version), inputs, grads)
        name, chosen = ("phi1", automatic) if version is None else (f"phi1 {version}", None)
        return Candidate(name, True, make, reason, version, chosen)

    automatic = partial(automatic_choice, op, device, dtype=inputs[0].dtype, **options)
    versions = our_backends(op, device, dtype=inputs[0].dtype, **options)
    found = [mine(None, None), *(mine(version, reason) for version, reason in versions)]

    def peer(name: str, make: Callable[[], Callable[..., Any]]) -> Candidate:
        return Candidate(name, False, lambda work: timed(make(), inputs, grads, work))

    return [*found, *(peer(name, make) for name, make in peers.items())]
