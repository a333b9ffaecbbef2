"""Write textbooks and exercises: with an LLM from randomised seeds, or exercises with the offline teacher.

Of texts that are equal, or equal but for names, blanks and punctuation, the first is kept. An exercise is kept only if
its solution runs in the sandbox and its docstring's examples hold. A textbook section is kept if it is long enough,
holds code that parses, and does not go round in circles. What was not kept is in the dataset's failure ledger (LLM) or
counters (offline teacher), with the reason.

The offline teacher is a program (data_tools/teacher.py), named "offline-teacher" in the rows' source and model.
"""

import ast
import dataclasses
import doctest
import functools
import hashlib
import io
import json
import pathlib
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from data_tools import prompts
from data_tools.chat import Answer, RequestFailed
from data_tools.dataset import Counted, Dataset, Failure, Produced, failed_shards, run_stage
from data_tools.engine import Engine
from data_tools.llm import LLM, LLMConfig, default_ledger
from data_tools.markdown import fenced, unwrapped, without_thought
from data_tools.novelty import Earlier
from data_tools.python_text import PYTHON, parsed, programs
from data_tools.ranges import at_least
from phi1.errors import UserError

if TYPE_CHECKING:
    import pyarrow


_OFFLINE_SHARD = 2000  # rows: about six seconds of one core
_LLM_SHARD = 50  # requests: what a crash of the process loses is in the ledger anyway
_NO_ANSWER = "no answer"
_TIMEOUT = 5.0  # seconds for a solution and its examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LLMConfig):
    """Options of `phi1 data synthesize`."""

    kind: Literal["textbooks", "exercises"]
    """What to write."""

    output: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Folder of the new dataset."""

    teacher: Literal["llm", "offline"] = "llm"
    """llm: a language model writes (--base-url, or the embedded one). offline: the offline teacher, exercises only."""

    recipe: pathlib.Path = dataclasses.field(default=prompts.RECIPE, metadata={"no_effect": True})
    """llm: TOML file of topics, audiences, names and constraints that prompts are drawn from."""

    count: int = 1000
    """llm: requests, of which some give no usable row. offline: exercises."""

    split: Literal["train", "held-out"] = "train"
    """offline: the two splits share no function name, constant or two-step composition."""

    course: Literal["first", "whole"] = "whole"
    """offline: first: 55 families of a line or a loop, half of the exercises with one step, in one layout: what a model
    of a few million parameters learns in minutes. whole: all 300, early returns, several layouts.
    """

    seed: int = 0
    """Seed of all random choices."""

    max_tokens: int = 800
    """llm: longest answer, tokens."""

    temperature: float | None = 0.8
    """llm: sampling temperature; none: the server's own."""

    adapt: bool = True
    """llm: draw topics whose answers added nothing (unusable, or near twins of earlier rows) less often from then on.
    """

    max_twins: float | None = None
    """llm: stop asking when more than this share of the rows of 50 requests (at least 10 rows) are near twins of
    earlier ones (data_tools/diversity.py); none: ask --count times.
    """

    workers: int = dataclasses.field(default=2, metadata={"no_effect": True})
    """Processes (offline), or programs run at a time (llm)."""


def schema(kind: str) -> "pyarrow.Schema":
    """Columns of a dataset of textbooks or of exercises."""
    import pyarrow as pa

    names = ["hexsha", "content", "source", "prompt_hash", "model", "sampling", "topic", "audience"]
    fields = [(name, pa.string()) for name in names] + [("seed", pa.string())]
    if kind == "exercises":
        names = ["prompt", "solution", "test", "entry_point", "family", "composition"]
        fields += [(name, pa.string()) for name in names] + [("constants", pa.list_(pa.string()))]
    return pa.schema(fields)


def run(config: Config) -> Dataset:
    """Makes the dataset."""
    at_least(1, config, "count", "workers", "max_tokens")
    at_least(0, config, "temperature")
    if config.max_twins is not None and not 0 <= config.max_twins < 1:
        raise UserError(f"--max-twins {config.max_twins}: must be from 0 to below 1")
    if config.teacher == "offline":
        if config.kind != "exercises":
            raise UserError("--teacher offline writes exercises only; textbooks need --teacher llm")
        from data_tools import families

        shards = -(-config.count // _OFFLINE_SHARD)
        return run_stage(
            "synthesize",
            config,
            config.output,
            [],
            shards,
            _offline,
            schema("exercises"),
            engine=Engine(workers=config.workers),
            extra={"families": families.HASH},
        )
    if config.split != "train":
        raise UserError(f"--split {config.split}: only the offline teacher has held-out exercises")
    if config.batch and (config.adapt or config.max_twins is not None):
        raise UserError(
            "--batch asks everything beforehand, so no answer can change what is asked: add --no-adapt, and leave "
            "--max-twins out"
        )
    recipe = prompts.load(config.recipe)
    shards = -(-config.count // _LLM_SHARD)
    unanswered = failed_shards(config.output, _NO_ANSWER) if config.retry_failed else []
    # What follows is made again too: a row may repeat one that is made now.
    redo = range(unanswered[0], shards) if unanswered else ()

    def asked(shard: int, urn: list[str]) -> list[str]:
        return [seed.topic for seed in _seeds(config, recipe, _numbers(config, shard), urn)]

    earlier = Earlier(config.output, recipe.topics, asked if config.adapt else None)
    with LLM(config, *default_ledger(config, config.output)) as llm:

        @functools.cache
        def ask_everything() -> None:
            for _ in llm.ask_all([seed.request for seed in _seeds(config, recipe, range(config.count), recipe.topics)]):
                pass

        def produce(_: Config, __: Sequence[Dataset], shard: int) -> Iterator[Produced]:
            if config.batch:  # a batch takes what all shards ask; each then finds it in the ledger
                ask_everything()
            before = llm.used.copy()
            yield from _from_llm(config, recipe, llm, earlier, shard)
            yield Counted(llm.used - before)

        made = run_stage(
            "synthesize",
            config,
            config.output,
            [],
            shards,
            produce,
            schema(config.kind),
            extra={"recipe": recipe.hash},
            redo=redo,
        )
    if twins := made.counters.get("near_twins", 0):
        print(f"synthesize: {twins:,} of {made.rows:,} rows are near twins of earlier ones", file=sys.stderr)
    if left := made.counters.get("not_asked", 0):
        print(
            f"synthesize: stopped after {config.count - left:,} of {config.count:,} requests, as of the rows of the "
            f"last {_LLM_SHARD} more than --max-twins {config.max_twins:g} are near twins of earlier ones",
            file=sys.stderr,
        )
    return made


def _offline(config: Config, _: Sequence[Dataset], shard: int) -> Iterator[Produced]:
    from data_tools import teacher

    count = min(_OFFLINE_SHARD, config.count - shard * _OFFLINE_SHARD)
    counters: dict[str, int] = {}
    sampling = json.dumps({"split": config.split, "course": config.course, "seed": config.seed, "shard": shard})
    for row in teacher.write_exercises(count, f"{config.seed}/{shard}", config.split, counters, course=config.course):
        content = row["prompt"] + row["solution"]
        yield row | {
            "hexsha": _sha1(content),
            "content": content,
            "source": teacher.SOURCE,
            "model": teacher.SOURCE,
            "sampling": sampling,
        }
    yield Counted(counters)


def _seeds(config: Config, recipe: prompts.Recipe, numbers: Iterable[int], topics: Sequence[str]) -> list[prompts.Seed]:
    """The requests of these numbers, their topics drawn from `topics`."""
    make = prompts.textbook if config.kind == "textbooks" else prompts.exercise
    drawn = dataclasses.replace(recipe, topics=tuple(topics))
    return [make(drawn, config.seed, i, max_tokens=config.max_tokens, temperature=config.temperature) for i in numbers]


def _numbers(config: Config, shard: int) -> range:
    """Of a shard's requests."""
    return range(shard * _LLM_SHARD, min(config.count, (shard + 1) * _LLM_SHARD))


def _from_llm(config: Config, recipe: prompts.Recipe, llm: LLM, earlier: Earlier, shard: int) -> Iterator[Produced]:
    numbers = _numbers(config, shard)
    earlier.read_until(shard)
    if config.max_twins is not None and earlier.largest_share > config.max_twins:
        earlier.take(shard, [])
        yield Counted({"not_asked": len(numbers)})
        return
    seeds = _seeds(config, recipe, numbers, earlier.urn(shard) if config.adapt else recipe.topics)
    rows: list[tuple[prompts.Seed, dict[str, Any]]] = []
    for seed, answer in zip(seeds, llm.ask_all([seed.request for seed in seeds]), strict=True):
        try:
            if isinstance(answer, RequestFailed):
                raise Unusable(f"{_NO_ANSWER}: {answer}")
            read = read_textbook if config.kind == "textbooks" else read_exercise
            rows.append((seed, read(answer.text) | _provenance(config, seed, answer)))
        except Unusable as error:
            yield from _lost(seed, str(error))
    if config.kind == "exercises":
        rows, lost = run_exercises(rows, config.workers)
        for seed, reason in lost:
            yield from _lost(seed, reason)
    kept: list[dict[str, Any]] = []
    for seed, row in rows:
        if (first := earlier.repeats(row["content"], row["seed"])) is not None:
            yield from _lost(seed, f"duplicate: of request {first}")
        else:
            kept.append(row)
            yield row | {"hexsha": _sha1(row["content"])}
    if twins := earlier.take(shard, kept):
        yield Counted({"near_twins": twins})


def _lost(seed: prompts.Seed, reason: str) -> Iterator[Produced]:
    yield Failure(f"request {seed.number}", reason)
    yield Counted({f"dropped: {reason.split(':')[0]}": 1})


def _provenance(config: Config, seed: prompts.Seed, answer: Answer) -> dict[str, Any]:
    return {
        "source": f"llm:{answer.model}",
        "model": answer.model,
        "prompt_hash": seed.request.prompt_hash,
        "sampling": seed.sampling,
        "topic": seed.topic,
        "audience": seed.audience,
        "seed": f"{config.seed}/{seed.number}",
    }


def _sha1(content: str) -> str:
    return hashlib.sha1(content.encode()).hexdigest()


class Unusable(Exception):
    """An answer that makes no row. The message is the reason; what stands before its first colon is counted."""


# ---------------------------------------------------------------- textbooks

MIN_CHARACTERS = 500
MIN_PROSE_WORDS = 50
# Compressed size over size. 587 excerpts of networkx, of 1,500 and 4,000 characters, have 0.18 (1st percentile), 0.41
# (median), 0.56 (largest); a sentence repeated has 0.03.
MIN_COMPRESSION = 0.2
MAX_REPEATED_LINES = 0.3


def read_textbook(text: str) -> dict[str, Any]:
    """The answer as a section, cut back to its last whole paragraph or code block. Raises Unusable."""
    content = _whole(unwrapped(without_thought(text)))
    if len(content) < MIN_CHARACTERS:
        raise Unusable(f"too short: {len(content)} characters, at least {MIN_CHARACTERS}")
    if loops(content):
        raise Unusable("repeats itself")
    blocks = list(fenced(content))
    code = [block.code for block in blocks if block.language in PYTHON]
    if not any(map(_parses, code)):
        raise Unusable("no code block that parses" if code else "no code block")
    words = len(content.split()) - sum(len(content[block.start : block.end].split()) for block in blocks)
    if words < MIN_PROSE_WORDS:
        raise Unusable(f"too little prose: {words} words, at least {MIN_PROSE_WORDS}")
    return {"content": content + "\n"}


def _whole(text: str) -> str:
    """Cuts an unfinished code block, then an unfinished last paragraph, as an answer that met its limit has."""
    for block in fenced(text):
        if not block.closed:
            text = text[: block.start].rstrip()
    if not text.endswith((".", "!", "?", ":", "```", "~~~", "|", '"', ")")) and "\n\n" in text:
        text = text[: text.rindex("\n\n")].rstrip()
    return text


def loops(text: str) -> bool:
    """Whether a text goes round in circles: many equal lines, or it compresses far better than prose does."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 8]
    repeated = 1 - len(set(lines)) / len(lines) if lines else 0.0
    data = text.encode()
    return repeated > MAX_REPEATED_LINES or len(zlib.compress(data, 9)) < MIN_COMPRESSION * len(data)


def _parses(code: str) -> bool:
    try:
        return bool(ast.parse(textwrap.dedent(code)).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


# ---------------------------------------------------------------- exercises

IMPORTS = ("typing", "math", "random", "collections", "datetime", "itertools")
"""What 99.8% of the paper's exercises import from (section 2.3, footnote)."""


def read_exercise(text: str) -> dict[str, Any]:
    """Takes an answer apart into prompt, solution and test. Raises Unusable.

    The prompt is the imports, the `def` line and the docstring; the test asserts the docstring's examples.
    """
    code = programs(text)[0].strip("\n") + "\n"
    module, reason = parsed(code)
    if module is None:
        raise Unusable(f"not Python: {reason}")
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    imports = [node for node in module.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    if not functions:
        raise Unusable("no function")
    if len(functions) > 1:
        raise Unusable("more than one function")
    function, lines = functions[0], list(io.StringIO(code, newline=""))  # lines as Python counts them
    for node in imports:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] not in IMPORTS:
                raise Unusable(f"imports something else: {name}")
    docstring = ast.get_docstring(function, clean=False)
    if docstring is None:
        raise Unusable("no docstring")
    # What stands below the function (calls, prints) is left out; what stands above may only be imports.
    head = "".join(
        "".join(lines[node.lineno - 1 : node.end_lineno]) for node in imports if node.lineno < function.lineno
    )
    first = function.body[0]
    body = "".join(lines[(first.end_lineno or 0) : function.end_lineno])
    if len(function.body) < 2 or function.decorator_list:
        raise Unusable("no body" if len(function.body) < 2 else "decorated")
    if function.body[1].lineno == first.end_lineno:
        raise Unusable("docstring and body share a line")
    prompt = head + ("\n\n" if head else "") + "".join(lines[function.lineno - 1 : first.end_lineno])
    return {
        "prompt": prompt,
        "solution": body,
        "content": prompt + body,
        "entry_point": function.name,
        "test": _test_of_examples(function.name, docstring),
    }


def _test_of_examples(name: str, docstring: str) -> str:
    try:
        examples = doctest.DocTestParser().get_examples(docstring)
    except ValueError as error:
        raise Unusable(f"examples cannot be read: {error}") from error
    lines = []
    for example in examples:
        try:
            call = ast.parse(example.source.strip(), mode="eval").body
            result = ast.literal_eval(example.want.strip())
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise Unusable("an example is not an expression with a literal result") from error
        if any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(call)):
            shown = ast.unparse(call) if isinstance(call, ast.Call) else f"({ast.unparse(call)})"  # `f(1) in x == True`
            lines.append(f"    assert {shown} == {result!r}\n")
    if not lines:
        raise Unusable("no example")
    # The function is called by its name: the sandbox binds it, in the test's process, to the program's function.
    return "def check(candidate):\n" + "".join(lines)


def run_exercises(
    rows: Sequence[tuple[prompts.Seed, dict[str, Any]]], workers: int
) -> tuple[list[tuple[prompts.Seed, dict[str, Any]]], list[tuple[prompts.Seed, str]]]:
    """Runs each solution against its examples, twice; returns those that held both times, and the reasons of the rest.

    Twice, in two processes with different hash seeds: an exercise whose answer depends on chance is of no use.
    """
    from phi1.evaluate.sandbox import Job, close_idle, run_many

    kept, lost = list(rows), []
    run_of: Callable[[dict[str, Any]], Job] = lambda row: Job(  # noqa: E731
        row["content"], row["test"], row["entry_point"], timeout=_TIMEOUT
    )
    for again in (False, True):
        close_idle()  # the second time, new servers have new hash seeds
        results = run_many([run_of(row) for _, row in kept], workers=workers)
        still: list[tuple[prompts.Seed, dict[str, Any]]] = []
        for (seed, row), result in zip(kept, results, strict=True):
            if result.status == "passed":
                still.append((seed, row))
            elif again:
                lost.append((seed, "another result when run again"))
            else:
                reason = {"failed": "examples do not hold", "timed_out": "does not end"}.get(
                    result.status, result.status
                )
                lost.append((seed, f"{reason}: {result.detail}"))
        kept = still
    return kept, lost
