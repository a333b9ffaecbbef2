"""Ask for the educational value of a sample of documents: an LLM, or the gold set.

The question is the paper's (section 2.1): "determine its educational value for a student whose goal is to
learn basic coding concepts". The annotators (`MODES`):

logprob   four examples, then yes or no; the score is the log-odds of the first token. Small models can do this.
rating    first the reasoning, then a value from 0 to 10, as structured output. For strong models.
gold      the label from 0 to 10 that the gold set has for a document, asking nobody. For documents of `ingest --sources
gold`.
"""

import dataclasses
import functools
import hashlib
import heapq
import math
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from data_tools import gold
from data_tools.chat import Answer, Request, RequestFailed, whole_unicode
from data_tools.dataset import MANIFEST, Counted, Dataset, Failure, Produced, failed_shards, run_stage
from data_tools.llm import LLM, LLMConfig, default_ledger
from data_tools.prompts import PROMPTS
from phi1.errors import UserError
from phi1.files import sha256_file, sha256_json
from phi1.progress import Progress

if TYPE_CHECKING:
    import pyarrow

_SHARD_ROWS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LLMConfig):
    """Options of `phi1 data annotate`."""

    input: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Dataset of documents."""

    output: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Folder of the new dataset: one row per annotated document."""

    samples: int = 1000
    """Documents to annotate (the paper: about 100,000), chosen by a hash of seed and content."""

    mode: Literal["logprob", "rating", "gold"] = "logprob"
    """How to ask: yes or no by log-odds, or reasoning and then a rating; or look the documents up in the gold set."""

    characters: int = 500
    """Show the model this many characters of a document at most, from its first code on, whole lines."""

    positive_fraction: float = 0.3
    """Label the best-scored documents 1, this fraction of them and what ties with the last; the scores of a small
    model are biased, so that a fixed threshold means little."""

    threshold: float | None = None
    """Label 1 from this score on instead (log-odds, or rating or gold label 0 to 10)."""

    temperature: float | None = 0.0
    """Sampling temperature; none: the server's own, for models that take no other."""

    seed: int = 0
    """Chooses the sample."""


RATING_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"reasoning": {"type": "string"}, "rating": {"type": "integer", "minimum": 0, "maximum": 10}},
    "required": ["reasoning", "rating"],
    "additionalProperties": False,
}


def schema() -> "pyarrow.Schema":
    """Columns of a dataset of annotations. group: the document's repository; held_out: whether the annotator keeps it
    for tests.
    """
    import pyarrow as pa

    strings = ("reasoning", "model", "prompt_hash", "source", "group")
    return pa.schema(
        [("hexsha", pa.string()), ("content", pa.string()), ("score", pa.float64()), ("label", pa.int8())]
        + [(name, pa.string()) for name in strings]
        + [("held_out", pa.bool_())]
    )


def run(config: Config) -> Dataset:
    """Makes the dataset. Raises UserError where the LLM client does (server, key, model, budget), and, for the gold
    set, if it labels none of the documents.
    """
    if not 0 < config.positive_fraction < 1:
        raise UserError(f"--positive-fraction {config.positive_fraction}: must lie between 0 and 1")
    if config.samples < 1 or config.characters < 1:
        raise UserError("--samples and --characters must be at least 1")
    if config.threshold is not None and math.isnan(config.threshold):
        raise UserError(f"--threshold {config.threshold}: must be a number")
    documents = Dataset(config.input)
    documents.require(*_COLUMNS)
    dataset = MODES[config.mode](config, documents)
    given = dataset.column("label")
    if config.threshold is None and sum(given) > config.positive_fraction * len(given) + max(1, len(given) // 20):
        lowest = min(row["score"] for row in dataset.read(["score", "label"]) if row["label"])
        print(
            f"warning: annotate: {sum(given)} of {len(given)} documents got label 1, not {config.positive_fraction:g} "
            f"of them (--positive-fraction), as many tie at a score of {lowest:g}; set a --threshold above it",
            file=sys.stderr,
        )
    labels = set(given)
    if len(labels) == 1:
        print(
            f"warning: annotate: all {dataset.rows} documents got label {labels.pop()}: nothing to learn from; "
            "annotate more documents, or change --positive-fraction, --threshold or the model",
            file=sys.stderr,
        )
    return dataset


Rows = list[dict[str, Any] | Failure]


def _stage(
    config: Config,
    documents: Dataset,
    shards: int,
    annotated: Callable[[], Rows],
    redo: Collection[int],
    used: Mapping[str, int],
    **extra: Any,
) -> Dataset:
    """The dataset of what `annotated`, called once if there is anything to do, gives in the order of the sample. used:
    what it cost, then.
    """
    made = functools.cache(annotated)

    def produce(_: Config, __: Sequence[Dataset], shard: int) -> Iterator[Produced]:
        yield from made()[shard * _SHARD_ROWS : (shard + 1) * _SHARD_ROWS]
        if shard == 0:
            yield Counted(used)

    return run_stage("annotate", config, config.output, [documents], shards, produce, schema(), extra=extra, redo=redo)


def _by_llm(config: Config, documents: Dataset) -> Dataset:
    shards = -(-min(config.samples, documents.rows) // _SHARD_ROWS)
    whole = (config.output / MANIFEST).exists()
    with LLM(config, *default_ledger(config, config.output)) as llm:
        return _stage(
            config,
            documents,
            shards,
            lambda: _labelled(config, _asked(config, documents, llm)),
            # A label depends on all scores: shards that were made of some answers do not fit those made of more.
            range(shards) if not whole or (config.retry_failed and failed_shards(config.output)) else (),
            llm.used,
            prompt=sha256_json(list(request_for("", config).messages)),
            answered_by=llm.model,
        )


def _by_gold(config: Config, documents: Dataset) -> Dataset:
    labelled = {snippet.sha256: snippet for snippet in gold.load()}
    found = {
        row["hexsha"]: (row, labelled[key])
        for row in documents.read(_COLUMNS)
        if (key := gold.digest(row["content"])) in labelled
    }
    if not found:
        raise UserError(f"--input {config.input}: the gold set labels none of its documents; ingest --sources gold")

    def annotated() -> Rows:
        keys = lowest(found, config.samples, config.seed)
        return _labelled(config, [_row(found[key][0]) | _gold_judgement(found[key][1]) for key in keys])

    shards = -(-min(config.samples, len(found)) // _SHARD_ROWS)
    return _stage(config, documents, shards, annotated, (), {}, answered_by="gold", labels=sha256_file(gold.LABELS))


MODES: dict[str, Callable[[Config, Dataset], Dataset]] = {"logprob": _by_llm, "rating": _by_llm, "gold": _by_gold}
"""The annotators: each makes the dataset of annotations of a dataset of documents."""


def sample(documents: Dataset, count: int, seed: int) -> list[str]:
    """The keys of `count` documents: those that hash lowest with the seed, so that more is a superset of fewer."""
    return lowest((row["hexsha"] for row in documents.read(["hexsha"])), count, seed)


def lowest(keys: Iterable[str], count: int, seed: int) -> list[str]:
    """The `count` keys that hash lowest with the seed."""
    return heapq.nsmallest(count, keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())


_HEAD = re.compile(
    r"""(?:
    [ \t]*(?:\#[^\n]*)?\n                                                       # blank, comment
    | [rRuU]?(?P<quotes>"{3}|'{3})(?s:.*?)(?P=quotes)[^\n]*\n                   # docstring
    | [rRuU]?"[^"\n]*"[ \t]*\n
    | (?:from[ ]+[.\w]+[ ]+)?import\b(?:[^\n(\\]|\\\n|\([^)]*\))*\n
    | __\w+__[ \t]*(?::[^\n=]*)?\+?=[ \t]*(?:[\[(][^\])]*[\])][^\n]*|[^\n]*)\n        # __all__, __version__
    | if[ ]+(?:\w+\.)?TYPE_CHECKING\b[^\n]*\n(?:[ \t]+[^\n]*\n|[ \t]*\n)+
    | (?:try:[^\n]*\n[ \t]+(?:from|import)\b|except\b|else:)[^\n]*\n(?:[ \t]+[^\n]*\n|[ \t]*\n)*
    )*""",
    re.VERBOSE,
)


def excerpt(content: str, characters: int) -> str:
    """The document's first whole lines of code within `characters`: from after what stands at the head of a file
    (comments, the module's docstring, imports, __all__). Of a document that holds nothing else, from after its header
    comment.
    """
    text = f"{content}\n"
    head = _HEAD.match(text)
    body = text[head.end() if head else 0 :].rstrip()
    if not body:
        lines = content.split("\n")
        first = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), 0)
        body = "\n".join(lines[first:]).rstrip()
    if len(body) <= characters:
        return body
    cut = body[: characters + 1].rfind("\n")
    return body[:cut] if cut > 0 else body[:characters]


def request_for(text: str, config: Config) -> Request:
    """What is asked about one excerpt."""
    accept = functools.partial(_judgement, config)
    if config.mode == "rating":
        messages = PROMPTS["rating"].messages(code=text)
        return Request(messages, max_tokens=400, temperature=config.temperature, schema=RATING_SCHEMA, accept=accept)
    messages = PROMPTS["value"].messages(code=text)
    return Request(messages, max_tokens=1, temperature=config.temperature, logprobs=True, accept=accept)


def log_odds(logprobs: dict[str, float]) -> float:
    """log p(yes) - log p(no) of the first token, over all spellings (case, blanks) among the alternatives.

    logprobs: finite. An answer that is not among them counts as the least likely of them, which bounds its probability
        from above.
    Raises RequestFailed if neither is there.
    """

    def of(word: str) -> float | None:
        found = [value for token, value in logprobs.items() if token.strip().lower() == word]
        highest = max(found, default=0.0)  # taken out of the sum: exp(-800) is 0
        return highest + math.log(math.fsum(math.exp(value - highest) for value in found)) if found else None

    yes, no, least = of("yes"), of("no"), min(logprobs.values())
    if yes is None and no is None:
        raise RequestFailed(
            f"neither yes nor no among the likeliest tokens ({', '.join(map(repr, list(logprobs)[:4]))})"
        )
    return (least if yes is None else yes) - (least if no is None else no)


_COLUMNS = ("hexsha", "content", "source", "max_stars_repo_name")


def _row(document: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    """What an annotation takes from its document."""
    text = document["content"] if content is None else content
    named = {"hexsha": document["hexsha"], "source": document["source"], "group": document["max_stars_repo_name"]}
    return named | {"content": text, "held_out": None}


def _gold_judgement(snippet: gold.Snippet) -> dict[str, Any]:
    return {"score": float(snippet.label), "reasoning": snippet.reason, "model": "gold", "held_out": snippet.held_out}


def _asked(config: Config, documents: Dataset, llm: LLM) -> Rows:
    """All rows in the order of the sample, without labels. What was asked before comes from the ledger."""
    keys = sample(documents, min(config.samples, documents.rows), config.seed)
    wanted = set(keys)
    rows = {
        row["hexsha"]: _row(row, excerpt(row["content"], config.characters))
        for row in documents.read(_COLUMNS)
        if row["hexsha"] in wanted
    }
    requests = {key: request_for(rows[key]["content"], config) for key in keys}
    progress = Progress("annotate", len(keys), "documents")
    made: Rows = []
    answers = llm.ask_all(requests.values(), progress=progress)
    for key, answer in zip(keys, answers, strict=True):
        try:
            if isinstance(answer, RequestFailed):
                raise answer
            made.append(rows[key] | _judgement(config, answer) | {"prompt_hash": requests[key].prompt_hash})
        except RequestFailed as failure:
            made.append(Failure(key, str(failure)))
    progress.close()
    return made


def _labelled(config: Config, made: Rows) -> Rows:
    """The rows with their labels: 1 from the threshold on, or for the best-scored fraction."""
    scores = sorted((row["score"] for row in made if isinstance(row, dict)), reverse=True)
    if scores:
        positives = max(1, round(config.positive_fraction * len(scores)))
        threshold = scores[positives - 1] if config.threshold is None else config.threshold
        for row in made:
            if isinstance(row, dict):
                row["label"] = int(row["score"] >= threshold)
    return made


def _judgement(config: Config, answer: Answer) -> dict[str, Any]:
    """The columns that an answer fills. Raises RequestFailed if it is of no use."""
    if config.mode == "logprob":
        return {"score": log_odds(answer.logprobs), "reasoning": None, "model": answer.model}
    value = answer.value if isinstance(answer.value, dict) else {}
    rating, reasoning = value.get("rating"), value.get("reasoning")
    if (
        not isinstance(rating, int | float)
        or isinstance(rating, bool)
        or not 0 <= rating <= 10
        or not isinstance(reasoning, str)
    ):
        raise RequestFailed(f"no rating from 0 to 10 in the answer: {answer.text[:80]!r}")
    return {"score": float(rating), "reasoning": whole_unicode(reasoning), "model": answer.model}
