"""The paper's contamination study (section 5, table 3): does a model owe its score to data that is near the benchmark?

For each τ: exercises that match the benchmark at τ or above are pruned, a model is trained on the rest, and evaluated
beside the one that was trained on all. A problem is *similar* at τ if any exercise matches its solution at τ. A model
that merely remembers falls on the similar problems once they are pruned; one that has learned does not.

With --plant, renamed copies of that many of the problems (every so many, so that they are spread) are put among the
exercises first: contamination that is known, which must be found, and shows how large an effect the study can see.

Every step is one of phi1's own commands in a folder of --output: run again after an interruption it goes on where it
was.
"""

import ast
import copy
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from data_tools import decontaminate, tokenize
from data_tools.dataset import Dataset, Produced, run_stage
from data_tools.similarity import exact
from data_tools.tasks import entry
from phi1.errors import UserError
from phi1.evaluate import humaneval
from phi1.evaluate import run as evaluate
from phi1.evaluate.humaneval import Problem
from phi1.evaluate.passk import interval
from phi1.files import claim, sha256_file, write_json

PLANTED = "planted"
"""The source of planted rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 study`."""

    input: pathlib.Path
    """Dataset of exercises to finetune on, not decontaminated."""
    output: pathlib.Path
    """Folder of the study; started again there it goes on."""
    recipes: tuple[pathlib.Path, ...]
    """Recipes of the finetuning, one after another; their folders for data and runs are set here."""
    init_from: pathlib.Path | None = None
    """Checkpoint, or run folder, that the first recipe starts from."""
    tokenizer: str = "codegen"
    """As in `phi1 data tokenize`."""
    problems: pathlib.Path | None = None
    """The benchmark, as in `phi1 evaluate`; default: HumanEval."""
    rates: tuple[float, ...] = decontaminate.RATES
    """The τ, each with a model of its own."""
    plant: int = 0
    """Put renamed copies of this many of the problems among the exercises first."""
    copies: int = 1
    """Copies of each planted problem."""
    samples: int = 1
    """Completions per problem."""
    temperature: float = 0.0
    """Sampling temperature."""
    max_new_tokens: int = 256
    """Longest completion, in tokens."""
    device: str = "auto"
    """Where models are trained and evaluated: cpu, cuda, or auto."""


def run(config: Config) -> dict[str, Any]:
    """Does what is not done yet, prints the table, writes it to study.json, and returns it."""
    problems = humaneval.load(config.problems)
    if not 0 <= config.plant <= len(problems):
        raise UserError(f"--plant {config.plant}: must be from 0 to the benchmark's {len(problems)} problems")
    if not config.rates or not config.recipes:
        raise UserError("--rates and --recipes: name at least one of each")
    for rate in config.rates:
        if not 0 <= rate <= 1:
            raise UserError(f"--rates {rate}: must be from 0 to 1")
    exercises = _planted(config, problems)
    similar = _similarities(config, problems, exercises)
    everything = _scored(config, problems, "all", exercises.folder)
    table = []
    for rate in sorted(config.rates, reverse=True):
        name = f"pruned-{rate}"
        pruned = decontaminate.run(_pruning(config, exercises.folder, config.output / name, rate))
        table.append(_row(rate, exercises, pruned, similar, everything, _scored(config, problems, name, pruned.folder)))
    result = {
        "exercises": exercises.rows,
        "problems": len(problems),
        "planted": config.plant * config.copies,
        "rows": table,
    }
    write_json(config.output / "study.json", result)
    print(show(result))
    return result


def _planted(config: Config, problems: Sequence[Problem]) -> Dataset:
    """The exercises, with the planted ones among them."""
    before = Dataset(config.input)
    if not config.plant:
        return before
    if not before.shards:
        raise UserError(f"{config.input}: holds no rows")
    schema = before.table(0).schema
    chosen = [problems[i * len(problems) // config.plant] for i in range(config.plant)]

    def produce(_: Config, inputs: Sequence[Dataset], shard: int) -> Iterator[Produced]:
        yield from inputs[0].read(shards=[shard])
        if shard == 0:
            for number in range(config.copies):
                for problem in chosen:
                    yield {name: None for name in schema.names} | planted_row(problem, number)

    @dataclasses.dataclass(frozen=True)
    class Planted:
        problems: tuple[str, ...]
        copies: int

    made = Planted(tuple(problem.task_id for problem in chosen), config.copies)
    return run_stage("plant", made, config.output / "exercises", [before], len(before.shards), produce, schema)


def planted_row(problem: Problem, number: int) -> dict[str, Any]:
    """A renamed copy of a problem as an exercise: its own docstring, the solution's names with a suffix."""
    function = copy.deepcopy(entry(problem))
    own = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id in own:
            node.id += f"_{number}"
    body = "".join(
        f"    {line}\n"
        for s in function.body[ast.get_docstring(function) is not None :]
        for line in ast.unparse(s).split("\n")
    )
    content = problem.prompt + body
    return {
        "hexsha": hashlib.sha1(content.encode()).hexdigest(),
        "content": content,
        "source": PLANTED,
        "prompt": problem.prompt,
        "solution": body,
        "test": problem.test,
        "entry_point": problem.entry_point,
    }


def _pruning(config: Config, source: pathlib.Path, output: pathlib.Path, rate: float) -> decontaminate.Config:
    benchmark = "humaneval" if config.problems is None else str(config.problems)
    return decontaminate.Config(input=source, output=output, problems=(benchmark,), ast_rate=rate, embedder="none")


def _similarities(config: Config, problems: Sequence[Problem], exercises: Dataset) -> dict[str, Fraction]:
    """Per problem, the highest rate at which any exercise matches it (0 below the lowest τ)."""
    path = config.output / "similar.json"
    identity = {
        "exercises": exercises.hash,
        "problems": [problem.task_id for problem in problems],
        "rates": sorted(config.rates),
    }
    if path.exists() and (known := json.loads(path.read_text(encoding="utf-8")))["of"] == identity:
        return {name: Fraction(rate) for name, rate in known["rates"].items()}
    lowest = _pruning(config, exercises.folder, config.output, min(config.rates))
    benchmark = decontaminate.Benchmark(lowest, exercises=True)
    found = {problem.task_id: Fraction(0) for problem in problems}
    for shard in range(len(exercises.shards)):
        rows = exercises.table(shard, ["content"]).column("content").to_pylist()
        for task, rate in benchmark.similar(rows).items():
            found[task] = max(found[task], rate)
    write_json(path, {"of": identity, "rates": {name: str(rate) for name, rate in found.items()}})
    return found


def _scored(config: Config, problems: Sequence[Problem], name: str, data: pathlib.Path) -> dict[str, list[bool]]:
    """Trains on a dataset and evaluates: per problem, whether each sample passed."""
    from phi1 import checkpoint
    from phi1.recipe import load_recipe
    from phi1.train import train

    folder = config.output / name
    tokens = tokenize.Config(inputs=[data], output=config.output / f"{name}-tokens", tokenizer=config.tokenizer)
    tokenize.run(tokens)
    start = config.init_from
    for number, path in enumerate(config.recipes):
        recipe = load_recipe(path)
        run_folder = config.output / f"{name}-model-{number}"
        start = start or recipe.train.init_from  # of the first recipe; the others go on from the one before
        loop = dataclasses.replace(recipe.train, run_folder=run_folder, init_from=start, device=config.device)
        shards = dataclasses.replace(recipe.data, tokens=tokens.output, weights=None, validation_tokens=None)
        train(dataclasses.replace(recipe, train=loop, data=shards))
        start = run_folder
    output = config.output / f"{name}-evaluation"
    evaluation = evaluate.Config(
        checkpoint=start,
        problems=config.problems,
        output=output,
        samples=config.samples,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        device=config.device,
    )
    if not (output / "results.json").exists():
        evaluate.run(evaluation)
    else:
        made = checkpoint.resolve(run_folder)
        hashes = checkpoint.digest(made), sha256_file(made / checkpoint.TOKENIZER)
        claim(output / "settings.json", evaluate.settings(evaluation, problems, *hashes), "samples")
        print(f"study: {folder.name} is evaluated already in {output}", file=sys.stderr)
    passed: dict[str, list[bool]] = {problem.task_id: [] for problem in problems}
    for row in evaluate.read_lines(output / "samples.jsonl"):
        passed[row["task_id"]].append(row["status"] == "passed")
    return passed


def _row(
    rate: float,
    exercises: Dataset,
    pruned: Dataset,
    similar: dict[str, Fraction],
    everything: dict[str, list[bool]],
    retrained: dict[str, list[bool]],
) -> dict[str, Any]:
    """A line of the table."""
    near = [name for name, value in similar.items() if value >= exact(rate)]
    far = [name for name, value in similar.items() if value < exact(rate)]
    kept = sum(value == PLANTED for value in pruned.column("source")) if "source" in pruned.table(0).schema.names else 0

    def shares(passed: dict[str, list[bool]]) -> dict[str, Any]:
        return {
            kind: _share([passed[name] for name in names])
            for kind, names in (("similar", near), ("non-similar", far), ("total", [*near, *far]))
        }

    return {
        "rate": rate,
        "similar": len(near),
        "non-similar": len(far),
        "pruned": exercises.rows - pruned.rows,
        "planted_kept": kept,
        "all": shares(everything),
        "retrained": shares(retrained),
    }


def _share(outcomes: Sequence[Sequence[bool]]) -> dict[str, float | None]:
    """pass@1 with its 95% interval (Wilson); None for no problems."""
    values = [sum(samples) / len(samples) for samples in outcomes if samples]
    low, high = interval(values)
    return {"pass": sum(values) / len(values) if values else None, "low": low, "high": high}


def show(result: dict[str, Any]) -> str:
    """Table 3 in the paper's form, with intervals."""

    def cell(share: dict[str, float | None]) -> str:
        if share["pass"] is None or share["low"] is None or share["high"] is None:
            return f"{'–':>19}"
        return f"{100 * share['pass']:.1f} ({100 * share['low']:.1f}–{100 * share['high']:.1f})".rjust(19)

    kinds = ("similar", "non-similar", "total")
    lines = [
        f"pass@1 on {result['problems']} problems in %, with 95% intervals; {result['exercises']:,} exercises, "
        f"{result['planted']} of them planted",
        f"{'τ':>5} {'problems':>9} {'pruned':>8} {'planted left':>13}  {'model':<10}"
        + "".join(f"{kind:>19}" for kind in kinds),
    ]
    for row in result["rows"]:
        head = (
            f"{row['rate']:>5.2f} {row['similar']:>4}/{row['non-similar']:<4} {row['pruned']:>8,} "
            f"{row['planted_kept']:>13}"
        )
        for name, label in (("all", "on all"), ("retrained", "on pruned")):
            lines.append(f"{head}  {label:<10}" + "".join(cell(row[name][kind]) for kind in kinds))
            head = " " * len(head)
    return "\n".join(lines)
