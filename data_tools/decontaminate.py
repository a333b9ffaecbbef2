"""Drop what is too close to HumanEval: by shared 13-grams, by embedding distance, by syntax trees (paper, section 5).

A row is removed if any of these holds for any HumanEval task (how the paper combines them is unpublished):

ngram      its text shares a run of --ngram words with the task's docstring
ast        one of its functions matches the task's solution at a rate of at least --ast-rate (data_tools/similarity.py)
embedding  its embedding is within --embedding-distance (L2, normalised) of the task's prompt and solution; looked at
           only for rows whose ast rate is at least --embed-above, since embedding is slow

What was removed is in the dataset's failure ledger: the test, the task, the value. Code that does not parse cannot be
tested by its tree: an exercise is then removed, a document stays if the other tests pass it (--unparsable).
"""

import ast
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from data_tools import similarity
from data_tools.dataset import Counted, Dataset, Failure, Produced, run_stage
from phi1.errors import UserError
from phi1.evaluate import humaneval
from phi1.files import sha256_json

if TYPE_CHECKING:
    import numpy

RATES = (0.95, 0.9, 0.85, 0.8)
"""The paper's thresholds; how many rows reach each is counted whichever is set."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 data decontaminate`."""

    input: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Dataset of exercises or of documents."""

    output: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Folder of the new dataset: the rows that stay."""

    problems: pathlib.Path | None = dataclasses.field(default=None, metadata={"no_effect": True})
    """A .jsonl or .jsonl.gz in HumanEval's columns instead of the installed package's."""

    ngram: int = 13
    """Words in a run that must not be shared."""

    ast_rate: float = 0.95
    """Remove at this match rate or above, 0 to 1 (the paper: 0.95 down to 0.8)."""

    ast_min_nodes: int | None = None
    """Compare only functions of at least this many tree nodes. Default: 0 for exercises, 40 for documents, since one
    of HumanEval's solutions is `return x + y`, and so is a part of many a file."""

    embedder: str = "auto"
    """As in `phi1 data embed --model`, or none for no embedding test."""

    embedding_distance: float = 0.5
    """Remove at this distance or below, 0 to 2. It depends on the embedder: with MiniLM, HumanEval's problems are 0.53
    and more from each other, the same code with new names and no docstring 0.46 to 0.84, the offline teacher's 0.84."""

    embed_above: float = 0.0
    """Embed only rows whose best ast rate is at least this; 0 embeds all."""

    unparsable: Literal["drop", "keep"] | None = None
    """What to do with code that does not parse. Default: drop exercises, keep documents that the other tests pass."""


def run(config: Config) -> Dataset:
    """Makes the dataset and says what was removed. Raises UserError for thresholds that make no sense."""
    for name, low, high in (("ast_rate", 0, 1), ("embedding_distance", 0, 2), ("embed_above", 0, 1), ("ngram", 2, 100)):
        if not low <= getattr(config, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be from {low} to {high}")
    rows = Dataset(config.input)
    if not rows.shards:
        raise UserError(f"{config.input}: holds no rows")
    schema = rows.table(0).schema
    if not {"hexsha", "content"} <= set(schema.names):
        raise UserError(f"{config.input}: needs the columns hexsha and content, has {', '.join(schema.names)}")
    benchmark = Benchmark(config, exercises="solution" in schema.names)

    def produce(_: Config, inputs: Sequence[Dataset], shard: int) -> Iterator[Produced]:
        yield from benchmark.sort_out(list(inputs[0].read(shards=[shard])))

    kept = run_stage("decontaminate", config, config.output, [rows], len(rows.shards), produce, schema,
                     extra=benchmark.facts)  # fmt: skip
    print(summary(rows.rows, kept), file=sys.stderr)
    return kept


def summary(before: int, kept: Dataset) -> str:
    """What was removed, in a few lines; warns if that is everything."""
    counters = kept.counters
    removed = before - kept.rows
    tests = ", ".join(
        f"{test} {counters.get(f'removed_{test}', 0):,}" for test in ("ngram", "ast", "embedding", "unparsable")
    )
    reached = ", ".join(f"{rate:.2f}: {counters.get(f'ast_rate_{rate:.2f}', 0):,}" for rate in RATES)
    lines = [
        f"decontaminate: {removed:,} of {before:,} rows removed ({tests}); rows with an ast rate of at least {reached}"
    ]
    if kept_untested := counters.get("kept_without_ast_test", 0):
        lines.append(
            f"decontaminate: {kept_untested:,} rows stay whose code does not parse; the other tests passed them"
        )
    if before == 0:
        lines.append("decontaminate: the input holds no row")
    elif removed == 0:
        lines.append("decontaminate: nothing matched, which is normal for data that was not made from HumanEval")
    if 0 < removed == before:
        lines.append(
            "warning: decontaminate removed EVERY row: the thresholds are too strict, or the data is the benchmark"
        )
    return "\n".join(lines)


class Benchmark:
    """HumanEval in the three forms that rows are compared with."""

    def __init__(self, config: Config, *, exercises: bool) -> None:
        self.config, self.exercises = config, exercises
        self.problems = humaneval.load(config.problems)
        self.min_nodes = (0 if exercises else 40) if config.ast_min_nodes is None else config.ast_min_nodes
        self.drop_unparsable = exercises if config.unparsable is None else config.unparsable == "drop"
        self.ngrams: dict[str, str] = {}
        trees: list[tuple[str, str]] = []
        short = 0
        for problem in self.problems:
            if not problem.solution:
                raise UserError(f"{problem.task_id}: has no canonical_solution, which the ast test needs")
            function = _entry(problem)
            found = similarity.ngrams(ast.get_docstring(function) or "", config.ngram)
            short += not found
            self.ngrams.update(dict.fromkeys(found, problem.task_id))
            trees.append((similarity.serialise(function), problem.task_id))
        self.trees = [tree for tree, _ in trees if len(tree) >= self.min_nodes]
        self.tree_tasks = [task for tree, task in trees if len(tree) >= self.min_nodes]
        embedder, weights = ("none", "")
        if config.embedder != "none":
            from data_tools import embed

            embedder, self._folder = embed.resolve(config.embedder)
            weights = str(sorted((p.name, p.stat().st_size) for p in self._folder.glob("*.safetensors")))
        self._embedder_name = embedder
        self.facts: dict[str, Any] = {
            "benchmark": sha256_json([dataclasses.asdict(problem) for problem in self.problems]),
            "serialisation": similarity.SERIALISATION,
            "rate": similarity.RATE,
            "combined": "removed if any test holds",
            "min_nodes": self.min_nodes,
            "tasks_without_ngrams": short,  # docstrings of fewer words
            "tasks_without_tree": len(trees) - len(self.trees),  # smaller than min_nodes
            "unparsable_rule": "drop" if self.drop_unparsable else "keep",
            "embedding_model": embedder,
            "embedding_weights": weights,
        }

    def sort_out(self, rows: list[dict[str, Any]]) -> Iterator[Produced]:
        """Yields the rows that stay; a Failure for each one removed; counters."""
        best, untested = self._best_rates([row["content"] for row in rows])
        reasons: dict[int, tuple[str, str]] = {}  # row -> (test, words)
        for i, row in enumerate(rows):
            shared = [gram for gram in similarity.ngrams(row["content"], self.config.ngram) if gram in self.ngrams]
            if shared:
                gram = min(shared)
                reasons[i] = ("ngram", f"{self.ngrams[gram]}: {gram!r}")
            elif best[i][0] >= self.config.ast_rate:
                reasons[i] = ("ast", f"{best[i][1]}: rate {best[i][0]:.3f}")
            elif i in untested and self.drop_unparsable:
                reasons[i] = ("unparsable", "its code does not parse, so its tree cannot be compared")
        # A row without a tree has no rate to be looked at by: it is embedded in any case.
        looked_at = [i for i in range(len(rows)) if i not in reasons
                     and (i in untested or best[i][0] >= self.config.embed_above)]  # fmt: skip
        if looked_at and self._embedder_name != "none":
            vectors, benchmark = self._embedded([rows[i]["content"] for i in looked_at]), self._benchmark_vectors
            distances = ((2 - 2 * (vectors @ benchmark.T)).clip(min=0)) ** 0.5
            for i, to_tasks in zip(looked_at, distances, strict=True):
                nearest = int(to_tasks.argmin())
                if to_tasks[nearest] <= self.config.embedding_distance:
                    reasons[i] = ("embedding", f"{self.problems[nearest].task_id}: distance {to_tasks[nearest]:.3f}")
        counters = {f"ast_rate_{rate:.2f}": sum(value >= rate for value, _ in best) for rate in RATES}
        for i, row in enumerate(rows):
            if i in reasons:
                test, words = reasons[i]
                counters[f"removed_{test}"] = counters.get(f"removed_{test}", 0) + 1
                yield Failure(row["hexsha"], f"{test}: {words}")
            else:
                counters["kept_without_ast_test"] = counters.get("kept_without_ast_test", 0) + (i in untested)
                yield row
        yield Counted(counters)

    def _best_rates(self, contents: Sequence[str]) -> tuple[list[tuple[float, str]], set[int]]:
        """Per row, its best rate (0 if below all thresholds) and the task; the rows whose code does not parse."""
        best: list[tuple[float, str]] = [(0.0, "")] * len(contents)
        untested: set[int] = set()
        trees: list[str] = []
        owners: list[int] = []
        for i, content in enumerate(contents):
            found = similarity.functions(content)
            if found is None or (self.exercises and not found):
                untested.add(i)
            trees += [tree for tree in found or [] if len(tree) >= self.min_nodes]
            owners += [i] * (len(trees) - len(owners))
        cutoff = min([self.config.ast_rate, *RATES] + [self.config.embed_above] * (self.config.embed_above > 0))
        for start in range(0, len(trees), 4096):
            rates = similarity.ast_rates(trees[start : start + 4096], self.trees, cutoff)
            if not rates.size:
                continue
            for owner, row in zip(owners[start:], rates, strict=False):
                nearest = int(row.argmax())
                if row[nearest] > best[owner][0]:
                    best[owner] = (float(row[nearest]), self.tree_tasks[nearest])
        return best, untested

    @functools.cached_property
    def _embedder(self) -> Any:
        from data_tools.embed import Embedder

        return Embedder(self._embedder_name, self._folder)

    def _embedded(self, texts: Sequence[str]) -> "numpy.ndarray":
        return self._embedder.embed(list(texts))

    @functools.cached_property
    def _benchmark_vectors(self) -> "numpy.ndarray":
        return self._embedded([problem.prompt + problem.solution for problem in self.problems])


def _entry(problem: humaneval.Problem) -> ast.FunctionDef:
    """The function that the problem asks for, with its canonical solution."""
    module = ast.parse(problem.prompt + problem.solution)
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == problem.entry_point:
            return node
    raise UserError(f"{problem.task_id}: its prompt does not define {problem.entry_point}")
