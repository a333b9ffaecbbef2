"""Rewrite code with an LLM: a step beyond phi-1, after SwallowCode (arXiv 2505.02881).

Four steps, each on what the one before left:

compile          the program parses, as Python 3
lint             its score is at least --min-lint (`lint_scores`)
style            an LLM rewrites it in good style
self-contained   an LLM rewrites that so that it can be read and run on its own

The prompts are `rewrite-style` and `rewrite-self-contained` of `prompts.PROMPTS`. A rewrite must parse and define what
the program defined (`usable`); one that does not, or was not answered, is in the failure ledger with the step and the
reason, as is a program that does not parse. The manifest counts what was left after each step.
"""

import ast
import collections
import dataclasses
import functools
import json
import pathlib
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_tools import ingest
from data_tools.batch import MAX_REQUESTS
from data_tools.chat import Answer, Request, RequestFailed
from data_tools.dataset import Counted, Dataset, Failure, Produced, failed_shards, run_stage
from data_tools.llm import LLM, LLMConfig, default_ledger
from data_tools.prompts import PROMPTS
from data_tools.python_text import parsed, programs
from data_tools.units import Raw
from phi1.errors import UserError
from phi1.progress import Progress

if TYPE_CHECKING:
    import pyarrow

STEPS = {"style": "rewrite-style", "self-contained": "rewrite-self-contained"}
"""The LLM's rewrites in their order: name -> prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LLMConfig):
    """Options of `phi1 data rewrite`."""

    input: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Dataset of documents that are Python programs."""

    output: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Folder of the new dataset."""

    min_lint: float = 7.0
    """Rewrite programs with at least this lint score, at most 10 (SwallowCode: 7)."""

    max_characters: int = 12_000
    """Leave longer programs out: their rewrite would not fit the answer."""

    max_tokens: int = 4096
    """Longest answer, tokens."""

    temperature: float | None = 0.0
    """Sampling temperature; none: the server's own, for models that take no other."""


def schema() -> "pyarrow.Schema":
    """Columns: those of documents, whose content and hexsha are the rewrite's, and where it came from.

    rewritten_from: hexsha of the program in the input; lint, rewritten_lint: the scores of both; prompt_hashes: of the
    requests, in the order of `STEPS`; model: which answered; sampling: settings as JSON.
    """
    import pyarrow as pa

    strings = ("rewritten_from", "model", "sampling")
    columns = [(name, pa.string()) for name in strings] + [("lint", pa.float64()), ("rewritten_lint", pa.float64())]
    return pa.schema(
        [
            *ingest.schema(),
            *map(lambda column: pa.field(*column), columns),
            pa.field("prompt_hashes", pa.list_(pa.string())),
        ]
    )


def run(config: Config) -> Dataset:
    """Makes the dataset. Raises UserError where the LLM client does (server, key, model, budget), or without ruff."""
    if config.min_lint > 10:
        raise UserError(f"--min-lint {config.min_lint:g}: no program has more than 10")
    if config.max_characters < 1 or config.max_tokens < 1:
        raise UserError("--max-characters and --max-tokens must be at least 1")
    documents = Dataset(config.input)
    redo: set[int] = set()
    if config.retry_failed:
        redo = {shard for step in STEPS for shard in failed_shards(config.output, f"{step}: ")}
    with LLM(config, *default_ledger(config, config.output)) as llm:
        waiting = set(range(len(documents.shards)))

        def produce(_: Config, __: Sequence[Dataset], shard: int) -> Iterator[Produced]:
            # A batch takes what many shards ask; each then finds it in the ledger.
            if config.batch and shard in waiting:
                _asked(config, llm, selected(config, documents.read(shards=_group(documents, shard, waiting)))[0])
            yield from _rewritten(config, llm, documents.read(shards=[shard]))

        prompts = {step: dataclasses.asdict(PROMPTS[name]) for step, name in STEPS.items()}
        return run_stage(
            "rewrite",
            config,
            config.output,
            [documents],
            len(documents.shards),
            produce,
            schema(),
            extra={"prompts": prompts, "answered_by": llm.model},
            redo=sorted(redo),
        )


def _group(documents: Dataset, shard: int, waiting: set[int]) -> list[int]:
    """Takes this shard and as many others of those that wait as fill a batch."""
    group: list[int] = []
    rows = 0
    for other in [shard, *sorted(waiting - {shard})]:
        rows += documents.shards[other]["rows"]
        if group and rows > MAX_REQUESTS:
            break
        group.append(other)
    waiting -= set(group)
    return group


Selected = dict[str, tuple[Mapping[str, Any], float]]
"""Programs to rewrite: hexsha -> (row, lint score)."""


def _rewritten(config: Config, llm: LLM, rows: Iterable[Mapping[str, Any]]) -> Iterator[Produced]:
    before = llm.used.copy()
    kept, failures, counters = selected(config, rows)
    made, unmade = _asked(config, llm, kept)
    yield from (*failures, *unmade)
    counters |= {f"left_after_{step}": sum(len(done) > i for done in made.values()) for i, step in enumerate(STEPS)}
    whole = {key: done for key, done in made.items() if len(done) == len(STEPS)}
    scores = lint_scores([done[-1][2] for done in whole.values()])
    for (key, done), score in zip(whole.items(), scores, strict=True):
        row, lint = kept[key]
        request, answer, program = done[-1]
        document = _document(row, program)
        if not isinstance(document, dict):
            yield Failure(key, f"{list(STEPS)[-1]}: the rewrite is no document ({document})")
            continue
        yield document | {
            "rewritten_from": key,
            "lint": lint,
            "rewritten_lint": score,
            "model": answer.model,
            "sampling": json.dumps(request.sampling, sort_keys=True),
            "prompt_hashes": [request.prompt_hash for request, *_ in done],
        }
    yield Counted(counters + (llm.used - before))


def _asked(
    config: Config, llm: LLM, kept: Selected
) -> tuple[dict[str, list[tuple[Request, Answer, str]]], list[Failure]]:
    """hexsha -> (request, answer, program) of each step that a program passed; and the failures."""
    made: dict[str, list[tuple[Request, Answer, str]]] = {key: [] for key in kept}
    failures = []
    left = {key: row["content"] for key, (row, _) in kept.items()}
    for step in STEPS:
        requests = {key: request_for(step, program, kept[key][0]["content"], config) for key, program in left.items()}
        left = {}
        progress = Progress(step, len(requests), "programs")
        for (key, request), answer in zip(
            requests.items(), llm.ask_all(requests.values(), progress=progress), strict=True
        ):
            if isinstance(answer, RequestFailed):
                failures.append(Failure(key, f"{step}: {answer}"))
            else:
                left[key] = usable(answer, kept[key][0]["content"])
                made[key].append((request, answer, left[key]))
        progress.close()
    return made, failures


def selected(
    config: Config, rows: Iterable[Mapping[str, Any]]
) -> tuple[Selected, list[Failure], collections.Counter[str]]:
    """The programs to rewrite, what does not compile, and counters."""
    counters: collections.Counter[str] = collections.Counter()
    failures = []
    compiled: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        counters["read"] += 1
        content = row.get("content")
        if not isinstance(content, str) or not content.strip():
            failures.append(Failure(str(row["hexsha"]), "compile: empty"))
        elif row["hexsha"] in compiled:
            counters["dropped_duplicate"] += 1
        elif len(content) > config.max_characters:
            counters["dropped_long"] += 1
        elif (reason := parsed(content)[1]) is not None:
            failures.append(Failure(row["hexsha"], f"compile: {reason}"))
        else:
            compiled[row["hexsha"]] = row
    scores = lint_scores([row["content"] for row in compiled.values()])
    kept = {
        key: (row, score)
        for (key, row), score in zip(compiled.items(), scores, strict=True)
        if score >= config.min_lint
    }
    counters["dropped_lint"] = len(compiled) - len(kept)
    counters["left_after_compile"], counters["left_after_lint"] = len(compiled), len(kept)
    return kept, failures, counters


def request_for(step: str, program: str, original: str, config: Config) -> Request:
    """What is asked about one program, and what its answer must keep of the original."""
    accept = functools.partial(usable, program=original)
    messages = PROMPTS[STEPS[step]].messages(code=program)
    return Request(messages, config.max_tokens, temperature=config.temperature, accept=accept)


def usable(answer: Answer, program: str) -> str:
    """The rewrite of `program` in an answer. Raises RequestFailed if it is cut, empty, does not parse, or does not
    define every function and class that `program` has at its top, case and underscores aside (good style may spell a
    name otherwise; private ones may go)."""
    if answer.truncated:
        raise RequestFailed("the answer was cut at --max-tokens")
    found = programs(answer.text)
    if not any(text.strip() for text in found):
        raise RequestFailed("the answer holds no code")
    results = [(text, *parsed(text)) for text in found]
    trees = [(text, tree) for text, tree, _ in results if tree is not None and tree.body]
    if not trees:
        raise RequestFailed(f"the rewrite does not parse: {next((why for _, _, why in results if why), 'it is empty')}")
    wanted = _defined(parsed(program)[0], outer=True)
    lost = [wanted - _defined(tree, outer=False) for _, tree in trees]
    least = min(lost, key=len)
    if least:
        raise RequestFailed(f"the rewrite lost {', '.join(sorted(least)[:3])}" + (", …" if len(least) > 3 else ""))
    text, tree = trees[lost.index(least)]
    if all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in tree.body):
        raise RequestFailed("the rewrite holds no code")
    return text.strip("\n") + "\n"


def _defined(tree: ast.Module | None, *, outer: bool) -> set[str]:
    """Names of functions and classes, as `usable` compares them. outer: the public ones at the program's top only."""
    if tree is None:
        return set()
    nodes = tree.body if outer else ast.walk(tree)
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    return {name.replace("_", "").lower() for name in names if not (outer and name.startswith("_"))} - {""}


def _document(row: Mapping[str, Any], program: str) -> dict[str, Any] | Failure | str:
    """The row of a document whose content is `program`, with what the old row says of its source."""
    raw = Raw(
        program,
        row.get("max_stars_repo_path") or "",
        row.get("max_stars_repo_name") or "",
        row.get("source") or "",
        tuple(row.get("max_stars_repo_licenses") or ()),
        row.get("lang") or "Python",
        origin=row.get("origin_hexsha"),
        head=row.get("max_stars_repo_head_hexsha"),
        stars=row.get("max_stars_count"),
        authors=tuple(row.get("authors") or ()),
        url=row.get("url"),
    )
    return ingest.document(raw, ingest.Config(output=pathlib.Path()))


# The pylint rules that ruff has, and what pyflakes, pycodestyle, naming and missing docstrings are in pylint.
_RULES = "E,W,F,PLC,PLE,PLR,PLW,N8,D1"
_IGNORED = "PLR2004"  # numbers in comparisons: off in pylint
_ERRORS = ("E9", "PLE", "F5", "F6", "F7", "F82")  # pylint's class of errors, which weigh five times as much


def lint_scores(contents: Sequence[str]) -> list[float]:
    """Of each program, which must parse, pylint's score: 10 − 10 · (5 · errors + other messages) / statements, at most
    10.

    The messages are ruff's, which has pylint's rules and looks at 300 files of 16 KB in 0.7 s. `noqa` hides nothing.
    """
    if not contents:
        return []
    try:
        import ruff
    except ImportError as error:
        raise UserError("the lint score needs the package ruff: pip install ruff") from error
    weights = [0] * len(contents)
    with tempfile.TemporaryDirectory(prefix="phi1-lint-") as folder:
        for number, content in enumerate(contents):
            (pathlib.Path(folder) / f"m{number}.py").write_text(content, encoding="utf-8", newline="")
        command = [
            ruff.find_ruff_bin(),
            "check",
            "--isolated",
            "--no-cache",
            "--ignore-noqa",
            "--exit-zero",
            "--quiet",
            "--line-length=100",
            f"--select={_RULES}",
            f"--ignore={_IGNORED}",
            "--output-format=json-lines",
            folder,
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            for line in process.stdout:
                message = json.loads(line)
                number = int(pathlib.Path(message["filename"]).stem[1:])
                weights[number] += 5 if (message["code"] or "E9").startswith(_ERRORS) else 1
            said = process.stderr.read()
        if process.returncode:
            raise UserError(f"ruff failed ({' '.join(said.split())[:200] or process.returncode}); pip install -U ruff")
    return [
        10.0 - 10.0 * weight / max(1, _statements(content)) for weight, content in zip(weights, contents, strict=True)
    ]


def _statements(content: str) -> int:
    tree, _ = parsed(content)
    return 0 if tree is None else sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
