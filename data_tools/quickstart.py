"""The whole of phi-1, small, on one machine: real code in, a trained model and a report out.

Every step is a command of its own (`phi1 data ingest`, …, `phi1 report`) called here with the quickstart's settings. Run
again after an interruption it goes on where it was; a step that is whole is not done again.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable

from phi1.files import write_json

SOURCES = (
    # Textbook-like code, ordinary libraries, and code that a generator wrote (stripe): the filter has to tell them apart.
    "pypi:algorithms", "pypi:more-itertools", "pypi:toolz", "pypi:boltons", "pypi:networkx", "pypi:sympy",
    "stdlib", "pypi:stripe",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 quickstart`."""

    output: pathlib.Path = pathlib.Path("runs/quickstart")
    """Folder of the run; started again there it goes on."""
    scale: float = 1.0
    """Multiplies the numbers of documents, annotations, exercises and training steps; 0.02 is a smoke test."""
    recipes: pathlib.Path = pathlib.Path(__file__).resolve().parent.parent / "recipes"
    """Folder with quickstart-pretrain.toml and quickstart-finetune.toml."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the quickstart."""

    name: str
    title: str
    run: Callable[[], object]


def run(config: Config) -> pathlib.Path:
    """Runs every step; returns the report's path."""
    config.output.mkdir(parents=True, exist_ok=True)
    timings_path = config.output / "timings.json"
    timings: dict[str, float] = json.loads(timings_path.read_text()) if timings_path.exists() else {}
    todo = steps(config)
    for number, step in enumerate(todo, 1):
        print(f"\n== {number}/{len(todo)}  {step.title}", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            step.run()
        finally:  # an interrupted step's time counts too
            timings[step.name] = round(timings.get(step.name, 0.0) + time.monotonic() - started, 2)
            write_json(timings_path, timings)
    total = sum(timings.values())
    print(f"\nDone in {total / 60:.1f} minutes. Open {config.output / 'report.html'} in a browser.", file=sys.stderr)
    return config.output / "report.html"
