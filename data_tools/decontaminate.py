"""Drop what is too close to a benchmark: by shared 13-grams, by embedding distance, by syntax trees (paper, section 5).

A row is removed if any of these holds for any task (how the paper combines them is unpublished):

ngram      its text shares a run of --ngram words with the task's docstring or with its solution's code
ast        one of its functions (data_tools/python_text.py finds them, in any text) matches the task's solution at a
           rate of at least --ast-rate (data_tools/similarity.py). Where one of the two trees has fewer than
           --ast-min-nodes nodes, as `return x + y` has, name or docstring must agree too (`agree`)
tokens     code that does not parse matches the solution at that rate by its tokens
embedding  its embedding is within --embedding-distance (L2, normalised) of the task's prompt and solution; looked at
           only for rows whose ast rate is at least --embed-above, since embedding is slow
judge      a language model says that it is one of the --judge-nearest tasks that are nearest by embedding, in other
           words, another language or by another algorithm: what none of the tests above can see; off by default, it
           costs a request for each row and task
unchecked  none of its code could be compared: an exercise without a function, a function that does not parse even
           with single lines mended, a row without text, a judge that gives no answer. What cannot be checked is not
           clean (--unchecked)

What was removed is in the dataset's failure ledger: the test, the task, the value. How many tasks have a twin
among the benchmark's own stands beside each rate: what is below that says nothing about leaks.
"""

import ast
import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from data_tools import embed, python_text, similarity, tasks
from data_tools.chat import Answer, Request
from data_tools.dataset import Counted, Dataset, Failure, Produced, run_stage
from data_tools.engine import HERE, Engine, worth
from data_tools.llm import LLM, LLMConfig, default_ledger
from data_tools.prompts import PROMPTS
from data_tools.python_text import Function
from data_tools.similarity import Serialisation, exact
from phi1.errors import UserError
from phi1.evaluate import humaneval
from phi1.files import sha256_file, sha256_json

if TYPE_CHECKING:
    import numpy

RATES = (0.95, 0.9, 0.85, 0.8)
"""The paper's thresholds; how many rows reach each is counted whichever is set."""
TESTS = ("ngram", "ast", "tokens", "embedding", "judge", "unchecked")
_SECONDS_A_ROW = 2e-3  # on one core, of exercises 0.7e-3, of files of code 14e-3
AGREEMENT = exact(0.5)
"""Share of a docstring's words that two docstrings of small functions must have in common."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LLMConfig, Engine):
    """Options of `phi1 data decontaminate`; those of the language model are --judge-nearest's, with which shards are
    made one after the other.
    """

    input: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Dataset of exercises or of documents."""

    output: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Folder of the new dataset: the rows that stay."""

    problems: tuple[str, ...] = ("humaneval",)
    """Benchmarks: humaneval (the installed package's), or files as `phi1 evaluate --problems` takes, e.g. MBPP's."""

    ngram: int = 13
    """Words in a run that must not be shared."""

    ast_rate: float = 0.95
    """Remove at this match rate or above, 0 to 1 (the paper: 0.95 down to 0.8)."""

    serialisations: tuple[Serialisation, ...] = ("preorder", "sorted")
    """How trees are compared (data_tools/similarity.py); the nearest counts. sorted finds reordered statements."""

    ast_min_nodes: int = 14
    """Trees smaller than this prove nothing alone: name or docstring must agree as well. Of HumanEval's 164 solutions
    15 are smaller; with 0, 2.0% of the offline teacher's exercises go at 0.95 (13.7% of an earlier table's), with 14
    none; of the solutions under other names and docstrings 100% are found with 0, 92.1% with 14
    (bench/decontaminate.py).
    """

    embedder: str = "auto"
    """As in `phi1 data embed --model`, or none for no embedding test."""

    embedding_distance: float = 0.5
    """Remove at this distance or below, 0 to 2. It depends on the embedder: with MiniLM, HumanEval's problems are 0.53
    and more from each other, the same code with new names and no docstring 0.46 to 0.84, the offline teacher's 0.84."""

    embed_above: float = 0.0
    """Embed only rows whose best ast rate is at least this; 0 embeds all."""

    judge_nearest: int = 0
    """Ask a language model about so many of the nearest tasks of each row that the other tests leave; 0: do not ask."""

    unchecked: Literal["drop", "keep"] = "drop"
    """What to do with rows whose code could not be compared; those kept are counted."""


def run(config: Config) -> Dataset:
    """Makes the dataset and says what was removed. Raises UserError for thresholds that make no sense."""
    started = time.monotonic()
    for name, low, high in (("ast_rate", 0, 1), ("embedding_distance", 0, 2), ("embed_above", 0, 1), ("ngram", 2, 100)):
        if not low <= getattr(config, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be from {low} to {high}")
    if config.judge_nearest < 0 or (config.judge_nearest and config.embedder == "none"):
        raise UserError(f"--judge-nearest {config.judge_nearest}: must be at least 0, and needs an --embedder")
    if not config.serialisations:
        raise UserError("--serialisations: name at least one of preorder, brackets, sorted")
    rows = Dataset(config.input)
    schema = rows.schema
    rows.require("hexsha", "content")
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(LLM(config, *default_ledger(config, config.output))) if config.judge_nearest else None
        exercises = "solution" in schema.names
        embedder = None if config.embedder == "none" else embed.resolve(config.embedder)
        benchmark = _prepared(config, exercises, embedder)
        engine = worth(config, _SECONDS_A_ROW * rows.rows)
        engine = engine if embedder is None else embed.on_devices(engine)
        if llm is not None:
            benchmark, engine = Benchmark(config, exercises=exercises, embedder=embedder, llm=llm), HERE
        produce = functools.partial(_sorted_out, exercises, embedder, benchmark if llm else None)
        kept = run_stage(
            "decontaminate",
            config,
            config.output,
            [rows],
            len(rows.shards),
            produce,
            schema,
            engine=engine,
            started=started,
            extra=benchmark.facts,
            spelled=("problems", "embedder", "embedding_model"),
        )
    print(summary(rows.rows, kept), file=sys.stderr)
    return kept


@functools.lru_cache(maxsize=1)
def _prepared(config: Config, exercises: bool, embedder: tuple[str, pathlib.Path] | None) -> "Benchmark":
    """The benchmark, once in a process."""
    return Benchmark(config, exercises=exercises, embedder=embedder)


def _sorted_out(
    exercises: bool,
    embedder: tuple[str, pathlib.Path] | None,
    benchmark: "Benchmark | None",
    config: Config,
    inputs: Sequence[Dataset],
    shard: int,
) -> Iterator[Produced]:
    benchmark = benchmark or _prepared(config, exercises, embedder)
    yield from benchmark.sort_out(list(inputs[0].read(shards=[shard])))


def _weights(embedder: str, folder: pathlib.Path) -> str:
    """What an embedder's folder holds. The packaged one's files are the package's: name and size tell its versions."""
    if embedder == "minilm":
        return str(sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors")))
    patterns = ("*.safetensors", "*.bin", "config.json", "tokenizer.json")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return sha256_json([(path.name, sha256_file(path)) for path in files])


def summary(before: int, kept: Dataset) -> str:
    """What was removed, in a few lines; warns if that is everything."""
    counters = kept.counters
    removed = before - kept.rows
    tests = ", ".join(f"{test} {counters.get(f'removed_{test}', 0):,}" for test in TESTS)
    twins, tasks = kept.manifest["config"]["own_twins"], kept.manifest["config"]["tasks"]
    reached = ", ".join(
        f"{rate:.2f}: {counters.get(f'ast_rate_{rate:.2f}', 0):,} ({twins[f'{rate:.2f}']} of {tasks})" for rate in RATES
    )
    lines = [
        f"decontaminate: {removed:,} of {before:,} rows removed ({tests}); rows with an ast rate of at least {reached} "
        "(in parentheses: the benchmark's tasks with a twin among its own, by the same rule)"
    ]
    if small := counters.get("small_trees_alone", 0):
        lines.append(
            f"decontaminate: {small:,} rows stay that match a task by a tree of fewer than "
            f"{kept.manifest['config']['ast_min_nodes']} nodes and by nothing else"
        )
    for name, why in (
        ("kept_unchecked", "stay although none of their code could be compared by its tree (--unchecked keep)"),
        (
            "kept_with_other_languages",
            "stay with code blocks of other languages, which only 13-grams and embeddings read",
        ),
        (
            "kept_without_code",
            "stay without a function: prose, data or statements, which only 13-grams and embeddings read",
        ),
    ):
        if count := counters.get(name, 0):
            lines.append(f"decontaminate: {count:,} rows {why}")
    if before == 0:
        lines.append("decontaminate: the input holds no row")
    elif removed == 0:
        lines.append("decontaminate: nothing matched, which is normal for data that was not made from a benchmark")
    if 0 < removed == before:
        lines.append(
            "warning: decontaminate removed EVERY row: the thresholds are too strict, or the data is the benchmark"
        )
    return "\n".join(lines)


class Match(NamedTuple):
    """A function of a row that is near a task's: nodes that match of `nodes`, as the rate's fraction."""

    same: int
    nodes: int
    task: int

    @property
    def rate(self) -> Fraction:
        return Fraction(self.same, self.nodes)


@dataclasses.dataclass
class Checked:
    """What the tests on trees say of a row."""

    best: Match | None = None  # the nearest that counts
    by_tokens: Match | None = None
    small_alone: bool = False  # a small tree matches at --ast-rate, and nothing agrees
    unread: str = ""  # why some of its code could not be compared
    functions: int = 0
    languages: bool = False


class Benchmark:
    """The benchmark's tasks in the forms that rows are compared with. embedder: as `embed.resolve` gives it."""

    def __init__(
        self,
        config: Config,
        *,
        exercises: bool,
        embedder: tuple[str, pathlib.Path] | None = None,
        llm: LLM | None = None,
    ) -> None:
        self.config, self.exercises, self.llm = config, exercises, llm
        self._embedder_place = embedder
        self.problems = tasks.load(config.problems)
        self.rate = exact(config.ast_rate)
        self.ngrams: dict[str, str] = {}
        self.functions: list[Function] = []
        self._short = 0
        for problem in self.problems:
            function = tasks.entry(problem)
            self.functions.append(function)
            docstring = similarity.ngrams(tasks.describe(problem, function), config.ngram)
            self._short += not docstring
            code = similarity.ngrams(tasks.code(function), config.ngram) | similarity.ngrams(
                problem.solution, config.ngram
            )
            self.ngrams |= dict.fromkeys(sorted(code), f"{problem.task_id}: code")
            self.ngrams |= dict.fromkeys(sorted(docstring), f"{problem.task_id}: docstring")
        self.trees = {how: [similarity.serialise(f, how) for f in self.functions] for how in config.serialisations}
        self.sizes = [len(similarity.serialise(function)) for function in self.functions]
        self.tokens = [similarity.tokens(tasks.code(function)) for function in self.functions]
        self.names = [function.name for function in self.functions]
        self.descriptions = [
            frozenset(similarity.words(tasks.describe(problem, function)))
            for problem, function in zip(self.problems, self.functions, strict=True)
        ]

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What the rule is and what it is of, for the manifest."""
        embedder, folder = self._embedder_place or ("none", None)
        return {
            "benchmark": sha256_json([dataclasses.asdict(problem) for problem in self.problems]),
            "tasks": len(self.problems),
            "left_out": similarity.LEFT_OUT,
            "rate": similarity.RATE,
            "combined": "removed if any test holds",
            "small_trees": (
                f"below ast_min_nodes: same name, or {float(AGREEMENT):g} of the docstring's words in common"
            ),
            "small_tasks": sum(size < self.config.ast_min_nodes for size in self.sizes),
            "tasks_without_ngrams": self._short,  # docstrings of fewer words
            "own_twins": self._own_twins(),
            "embedding_model": embedder,
            "embedding_weights": _weights(embedder, folder) if folder else "",
        }

    def _own_twins(self) -> dict[str, int]:
        """Per rate, how many tasks another task of the benchmark matches, by the rule for rows."""
        found = self._near(self.functions)
        rates = [
            max((match.rate for match in matches if match.task != i), default=Fraction(0))
            for i, (matches, _) in enumerate(found)
        ]
        return {f"{rate:.2f}": sum(value >= exact(rate) for value in rates) for rate in RATES}

    def sort_out(self, rows: list[dict[str, Any]]) -> Iterator[Produced]:
        """Yields the rows that stay; a Failure for each one removed; counters."""
        contents = [row["content"] if isinstance(row["content"], str) else "" for row in rows]
        checked = self.check(contents)
        reasons: dict[int, tuple[str, str]] = {}  # row -> (test, words)
        for i, (content, about) in enumerate(zip(contents, checked, strict=True)):
            shared = [gram for gram in similarity.ngrams(content, self.config.ngram) if gram in self.ngrams]
            best, by_tokens = about.best, about.by_tokens
            if shared:
                gram = min(shared)
                reasons[i] = ("ngram", f"{self.ngrams[gram]}: {gram!r}")
            elif best and best.rate >= self.rate:
                reasons[i] = ("ast", self._words(best))
            elif by_tokens and by_tokens.rate >= self.rate:
                reasons[i] = ("tokens", self._words(by_tokens))
            elif about.unread and self.config.unchecked == "drop":
                reasons[i] = ("unchecked", about.unread)
        # A row without a tree has no rate to be looked at by: it is embedded in any case.
        above = exact(self.config.embed_above)
        looked_at = [
            i
            for i, about in enumerate(checked)
            if i not in reasons
            and contents[i].strip()
            and (about.unread or not about.functions or (about.best.rate if about.best else 0) >= above)
        ]
        if looked_at and self._embedder_place:
            vectors, benchmark = self._embedded([contents[i] for i in looked_at]), self._benchmark_vectors
            distances = ((2 - 2 * (vectors @ benchmark.T)).clip(min=0)) ** 0.5
            left: dict[int, list[int]] = {}  # row -> its nearest tasks
            for i, to_tasks in zip(looked_at, distances, strict=True):
                nearest = int(to_tasks.argmin())
                if to_tasks[nearest] <= self.config.embedding_distance:
                    reasons[i] = ("embedding", f"{self.problems[nearest].task_id}: distance {to_tasks[nearest]:.3f}")
                else:
                    left[i] = to_tasks.argsort()[: self.config.judge_nearest].tolist()
            judged, unanswered = self._judged(contents, left)
            for i, words in unanswered.items():
                checked[i].unread = words
            dropped = unanswered if self.config.unchecked == "drop" else {}
            reasons |= {i: ("unchecked", words) for i, words in dropped.items()} | judged
        counters = {
            f"ast_rate_{rate:.2f}": sum(bool(c.best and c.best.rate >= exact(rate)) for c in checked) for rate in RATES
        }
        for i, row in enumerate(rows):
            if i in reasons:
                test, words = reasons[i]
                name = f"removed_{test}"
                yield Failure(str(row["hexsha"]), f"{test}: {words}")
                counters[name] = counters.get(name, 0) + 1
                continue
            for name, holds in (
                ("small_trees_alone", checked[i].small_alone),
                ("kept_unchecked", bool(checked[i].unread)),
                ("kept_with_other_languages", checked[i].languages),
                ("kept_without_code", not checked[i].functions and not checked[i].unread),
            ):
                counters[name] = counters.get(name, 0) + holds
            yield row
        yield Counted(counters)

    def _judged(
        self, contents: Sequence[str], nearest: dict[int, list[int]]
    ) -> tuple[dict[int, tuple[str, str]], dict[int, str]]:
        """Rows that the language model takes for one of their nearest tasks; rows about which it says nothing
        usable.
        """
        same: dict[int, tuple[str, str]] = {}
        unanswered: dict[int, str] = {}
        if self.llm is None:
            return same, unanswered
        pairs = [(i, task) for i, tasks in nearest.items() for task in tasks]
        answers = self.llm.ask_all(_question(self.problems[task], contents[i]) for i, task in pairs)
        for (i, task), answer in zip(pairs, answers, strict=True):
            said = answer.value.get("same") if isinstance(answer, Answer) and isinstance(answer.value, dict) else None
            name = self.problems[task].task_id
            if said is True:
                same.setdefault(i, ("judge", f"{name}: the same task, says {self.llm.model}"))
            elif said is not False:
                unanswered.setdefault(i, f"the judge gives no answer about {name}")
        return same, unanswered

    def _words(self, match: Match) -> str:
        return f"{self.problems[match.task].task_id}: rate {float(match.rate):.3f} ({match.same} of {match.nodes})"

    def check(self, contents: Sequence[str]) -> list[Checked]:
        """Compares each row's code with all tasks."""
        checked = [Checked() for _ in contents]
        functions: list[Function] = []
        owners: list[int] = []
        texts: list[str] = []
        text_owners: list[int] = []
        for i, content in enumerate(contents):
            found = python_text.find(content)
            about = checked[i]
            about.functions, about.languages = len(found.functions), bool(found.languages)
            functions += found.functions
            owners += [i] * len(found.functions)
            texts += found.unread + found.mentions
            text_owners += [i] * (len(found.unread) + len(found.mentions))
            if found.unread:
                line = found.unread[0].partition("\n")[0].strip()
                about.unread = f"its code does not parse, so its tree cannot be compared: {line[:80]!r}"
            elif self.exercises and not found.functions:
                about.unread = "an exercise without a function"
            elif not content.strip():
                about.unread = "no text"
        for owner, (matches, small_alone) in zip(owners, self._near(functions), strict=True):
            about = checked[owner]
            about.small_alone |= small_alone
            for match in matches:
                if about.best is None or match.rate > about.best.rate:
                    about.best = match
        for i, task, same, length in similarity.near_pairs(
            [similarity.tokens(text) for text in texts], self.tokens, self.rate
        ):
            about, match = checked[text_owners[i]], Match(same, length, task)
            if min(len(self.tokens[task]), length) >= self.config.ast_min_nodes and (
                about.by_tokens is None or match.rate > about.by_tokens.rate
            ):
                about.by_tokens = match
        return checked

    def _near(self, functions: Sequence[Function]) -> list[tuple[list[Match], bool]]:
        """Per function, the tasks that match at the least rate of interest, each at its best serialisation; and whether
        a small tree matches at --ast-rate without agreeing.
        """
        rates = [self.config.ast_rate, *RATES] + [self.config.embed_above] * (self.config.embed_above > 0)
        least = min(map(exact, rates))
        nearest: list[dict[int, Match]] = [{} for _ in functions]
        for how, theirs in self.trees.items():
            trees = [similarity.serialise(function, how) for function in functions]
            for i, task, same, nodes in similarity.near_pairs(trees, theirs, least):
                match = Match(same, nodes, task)
                if task not in nearest[i] or match.rate > nearest[i][task].rate:
                    nearest[i][task] = match
        found: list[tuple[list[Match], bool]] = []
        for function, matches in zip(functions, nearest, strict=True):
            size = len(similarity.serialise(function)) if matches else 0
            counting, alone = [], False
            for task, match in matches.items():
                if min(size, self.sizes[task]) >= self.config.ast_min_nodes or self.agree(function, task):
                    counting.append(match)
                else:
                    alone |= match.rate >= self.rate
            found.append((counting, alone))
        return found

    def similar(self, contents: Sequence[str]) -> dict[str, Fraction]:
        """Per task that some function in the contents matches, the highest rate."""
        found: dict[str, Fraction] = {}
        functions = [function for content in contents for function in python_text.find(content or "").functions]
        for matches, _ in self._near(functions):
            for match in matches:
                task = self.problems[match.task].task_id
                found[task] = max(found.get(task, Fraction(0)), match.rate)
        return found

    def agree(self, function: Function, task: int) -> bool:
        """Whether a function has a task's name, or half of the words of the shorter docstring of the two in common."""
        if _flat(function.name) == _flat(self.names[task]):
            return True
        ours, theirs = frozenset(similarity.words(ast.get_docstring(function) or "")), self.descriptions[task]
        shorter = min(len(ours), len(theirs))
        return shorter > 0 and len(ours & theirs) >= AGREEMENT * shorter

    @functools.cached_property
    def _embedder(self) -> Any:
        assert self._embedder_place is not None
        return embed.loaded(*self._embedder_place)

    def _embedded(self, texts: Sequence[str]) -> "numpy.ndarray":
        return self._embedder.embed(list(texts))

    @functools.cached_property
    def _benchmark_vectors(self) -> "numpy.ndarray":
        return self._embedded([problem.prompt + problem.solution for problem in self.problems])


_SAME: dict[str, Any] = {
    "type": "object",
    "properties": {"same": {"type": "boolean"}},
    "required": ["same"],
    "additionalProperties": False,
}
_EXCERPT = 4000  # characters of a row that the judge reads


def _question(problem: humaneval.Problem, content: str) -> Request:
    """Whether a row is a task in other clothes."""
    messages = PROMPTS["same-task"].messages(task=problem.prompt + problem.solution, text=content[:_EXCERPT])
    return Request(messages, max_tokens=20, schema=_SAME)


def _flat(name: str) -> str:
    return name.replace("_", "").lower()
