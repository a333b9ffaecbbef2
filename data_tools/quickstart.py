"""The whole of phi-1, small, on one machine: real code in, a trained model and a report out.

Every step is a command of its own (`phi1 data ingest`, …, `phi1 report`) called here with the quickstart's settings.
Run again after an interruption it goes on where it was; a step that is whole is not done again.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from phi1.files import write_json

SOURCES = (
    # Textbook-like code, ordinary libraries, and code that a generator wrote (stripe): the filter has to tell them
    # apart.
    "pypi:algorithms",
    "pypi:more-itertools",
    "pypi:toolz",
    "pypi:boltons",
    "pypi:networkx",
    "pypi:sympy",
    "stdlib",
    "pypi:stripe",
)

MODELS = {"pretrain": "base", "solutions": "finetuned"}
"""Training runs that are evaluated, and what the paper calls their models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 quickstart`."""

    output: pathlib.Path = pathlib.Path("runs/quickstart")
    """Folder of the run; started again there it goes on."""
    scale: float = 1.0
    """Multiplies the numbers of documents, annotations, exercises and training steps; 0.02 is a smoke test."""
    annotator: Literal["gold", "logprob"] = "gold"
    """Whose labels the filter learns: the gold set's, or those of the embedded language model for a sample of the
    corpus.
    """
    tune: bool = True
    """Measure first which kernels are fastest (phi1 tune), on a machine of whose kind there is no measurement."""
    recipes: pathlib.Path = pathlib.Path(__file__).resolve().parent.parent / "recipes"
    """Folder with quickstart-pretrain.toml, quickstart-finetune.toml and quickstart-solutions.toml."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the quickstart."""

    name: str
    title: str
    run: Callable[[], object]


def run(config: Config) -> pathlib.Path:
    """Runs every step; returns the report's path."""
    from phi1.recipe import load_recipe

    config.output.mkdir(parents=True, exist_ok=True)
    timings_path = config.output / "timings.json"
    timings: dict[str, float] = json.loads(timings_path.read_text()) if timings_path.exists() else {}
    for name in ("pretrain", "finetune", "solutions"):  # before the work that they come after
        load_recipe(config.recipes / f"quickstart-{name}.toml")
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


def steps(config: Config) -> list[Step]:
    """The steps in order, each a command with the quickstart's settings."""
    from data_tools import (
        annotate,
        classify,
        decontaminate,
        embed,
        filter,
        ingest,
        report,
        synthesize,
        tokenize,
        tokenizer,
    )

    root = config.output

    def count(full: int, least: int) -> int:
        return max(least, round(full * config.scale))

    def decontaminated(name: str, **options: Any) -> Step:
        settings = decontaminate.Config(input=root / name, output=root / f"{name}-clean", **options)
        return Step(f"{name}-clean", f"decontaminate {name} against HumanEval", lambda: decontaminate.run(settings))

    def shards(name: str, inputs: list[str]) -> Step:
        settings = tokenize.Config(
            inputs=[root / folder for folder in inputs],
            tokenizer=str(root / "tokenizer.json"),
            output=root / f"{name}-tokens",
            validation=root / f"{name}-validation",
            validation_fraction=min(0.2, 0.02 / config.scale),
        )
        return Step(f"{name}-tokens", f"tokenize for {name}", lambda: tokenize.run(settings))

    def offline(name: str, split: Literal["train", "held-out"], number: int) -> Step:
        settings = synthesize.Config(
            kind="exercises", teacher="offline", split=split, course="first", count=number, output=root / name
        )
        return Step(
            name,
            f"synthesize {number:,} exercises with the offline teacher ({split})",
            lambda: synthesize.run(settings),
        )

    documents = count(2400, 150)
    ingested = ingest.Config(output=root / "code", sources=SOURCES, limit=documents, workers=2)
    embedded = embed.Config(input=root / "code", output=root / "embedded", model="minilm")
    if config.annotator == "gold":
        labelled = ingest.Config(output=root / "gold", sources=("gold",), limit=count(1000, 120))  # at scale 1: all
        annotated = annotate.Config(input=root / "gold", output=root / "annotated", mode="gold", threshold=5)
        gold_embedded = embed.Config(input=root / "gold", output=root / "gold-embedded", model="minilm")
        forest = classify.Config(
            annotations=root / "annotated",
            embeddings=root / "gold-embedded",
            corpus=root / "embedded",
            output=root / "forest",
        )
        labels = [
            Step("gold", "ingest the snippets of the gold set", lambda: ingest.run(labelled)),
            Step("annotated", "annotate them with their labels", lambda: annotate.run(annotated)),
            Step("embedded", "embed every document", lambda: embed.run(embedded)),
            Step("gold-embedded", "embed the gold set", lambda: embed.run(gold_embedded)),
        ]
    else:
        sampled = annotate.Config(
            input=root / "code", output=root / "annotated", samples=count(240, 40), characters=400
        )
        forest = classify.Config(annotations=root / "annotated", embeddings=root / "embedded", output=root / "forest")
        labels = [
            Step("annotated", "annotate a sample with a language model", lambda: annotate.run(sampled)),
            Step("embedded", "embed every document", lambda: embed.run(embedded)),
        ]
    filtered = filter.Config(
        input=root / "code",
        embeddings=root / "embedded",
        classifier=root / "forest",
        output=root / "filtered",
        keep_fraction=0.5,
        # The embedded annotator, and the few labels of a smoke test, may be at chance; the filter and the report say
        # so.
        allow_chance=config.annotator != "gold" or config.scale < 1,
    )
    textbooks = synthesize.Config(kind="textbooks", count=count(36, 2), max_tokens=400, output=root / "textbooks")
    written = synthesize.Config(kind="exercises", count=count(16, 2), max_tokens=250, output=root / "llm-exercises")
    small = tokenizer.Config(
        inputs=tuple(root / name for name in ("filtered-clean", "textbooks-clean", "exercises-clean")),
        output=root / "tokenizer.json",
    )
    return [
        Step("code", "ingest real Python code from installed packages", lambda: ingest.run(ingested)),
        *labels,
        Step("forest", "classify: a random forest learns the annotation", lambda: classify.run(forest)),
        Step("filtered", "filter: keep what the forest rates higher", lambda: filter.run(filtered)),
        Step("textbooks", "synthesize textbook sections with a language model", lambda: synthesize.run(textbooks)),
        Step("llm-exercises", "synthesize exercises with a language model", lambda: synthesize.run(written)),
        offline("exercises", "train", count(20_000, 200)),
        offline("exercises-held-out", "held-out", count(350, 40)),
        decontaminated("filtered", embedder="minilm", embed_above=0.7),
        decontaminated("textbooks", embedder="minilm"),
        decontaminated("llm-exercises", embedder="minilm"),
        decontaminated("exercises", embedder="minilm", embed_above=0.9),
        # The same rule for both splits, so that the held-out one asks for no family that training was denied.
        decontaminated("exercises-held-out", embedder="minilm", embed_above=0.9),
        Step("diversity", "measure how different the exercises are", lambda: _measure(root / "exercises-clean")),
        Step("tokenizer", "train a tokenizer of 1,024 entries", lambda: tokenizer.run(small)),
        shards("pretrain", ["filtered-clean", "textbooks-clean"]),
        shards("finetune", ["exercises-clean", "llm-exercises-clean"]),
        Step(
            "pretrain",
            "pretrain phi1-tiny on filtered code and textbooks",
            lambda: _train(config, "pretrain", "pretrain"),
        ),
        Step("finetune", "finetune it on exercises", lambda: _train(config, "finetune", "finetune", "pretrain")),
        Step(
            "solutions",
            "finetune further, on the solutions only",
            lambda: _train(config, "solutions", "finetune", "finetune"),
        ),
        *(
            Step(
                f"{benchmark}-{model}",
                f"evaluate the {MODELS[model]} model on {benchmark}",
                functools.partial(_evaluate, root, benchmark, model),
            )
            for benchmark in ("humaneval", "exercises")
            for model in MODELS
        ),
        Step("report", "write the report", lambda: report.run(report.Config(run=root))),
    ]


def _measure(folder: pathlib.Path) -> None:
    from data_tools import diversity

    if diversity.read(folder):
        print(f"diversity: already in {folder / diversity.FILE}", file=sys.stderr)
        return
    diversity.run(diversity.Config(input=folder))


def _train(config: Config, name: str, data: str, init_from: str | None = None) -> None:
    """Trains by recipe quickstart-`name`, on the token shards `data`, from the weights of the run `init_from`."""
    from phi1.recipe import load_recipe
    from phi1.train import train

    root = config.output
    recipe = load_recipe(config.recipes / f"quickstart-{name}.toml")
    loop = dataclasses.replace(
        recipe.train,
        run_folder=root / name,
        init_from=None if init_from is None else root / init_from,
        steps=max(20, round(recipe.train.steps * config.scale)),
        tune=config.tune,
    )
    shards = dataclasses.replace(
        recipe.data, tokens=root / f"{data}-tokens", validation_tokens=root / f"{data}-validation"
    )
    warmup = min(recipe.optimizer.warmup_steps, loop.steps // 2)
    optimizer = dataclasses.replace(recipe.optimizer, warmup_steps=warmup)
    train(dataclasses.replace(recipe, train=loop, data=shards, optimizer=optimizer))


def _evaluate(root: pathlib.Path, benchmark: Literal["humaneval", "exercises"], model: str) -> None:
    from phi1.evaluate import run as evaluate

    output = root / "evaluation" / f"{benchmark}-{model}"
    if (output / "results.json").exists():
        print(f"evaluate: already in {output}", file=sys.stderr)
        return
    evaluate.run(
        evaluate.Config(
            checkpoint=root / model,
            benchmark=benchmark,
            output=output,
            max_new_tokens=128,
            batch_size=32,
            exercises=root / "exercises-held-out-clean" if benchmark == "exercises" else None,
        )
    )
