"""What phi-1's data will take: tokens, hours and money, from the pace of stages that were run here.

    phi1 data plan --run runs/quickstart

Every finished dataset below --run says how long it took (timing.log) and how much it was made of. A stage's pace is
work over time, where its work is documents (embed, score), rows that were asked for (synthesize), or bytes of text (the
others). The time of a target is what its start takes, measured too, and its work at that pace over the workers. Default
targets are the paper's (section 2): 35 million files of 35 billion tokens filtered to 6 billion, 1 billion of
textbooks, 180 million of exercises.

Core hours are of the CPU's time, hours of the clock's, under the load that the machine had. With --own the targets are
the run's own sizes, each dataset at its own pace: what it says then should be what the run took.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from data_tools import timing
from data_tools.classify import METRICS
from data_tools.dataset import MANIFEST, Dataset
from data_tools.engine import cores
from data_tools.prices import PRICES, price_of
from data_tools.timing import Took
from phi1.errors import UserError

BYTES_PER_TOKEN = 3.2
"""Of Python by codegen-350M-mono's tokenizer: 3.20 on the quickstart's code, 2.80 on its exercises, 3.64 on its
textbooks.
"""
KINDS = ("code", "textbooks", "exercises")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of `phi1 data plan`."""

    run: pathlib.Path = pathlib.Path("runs/quickstart")
    """Folder with finished datasets, at any depth, whose pace is taken."""
    own: bool = False
    """Plan for the run's own sizes and workers, dataset by dataset, beside what each took."""
    workers: int = dataclasses.field(default_factory=cores)
    """Shards made at a time."""
    files: int = 35_000_000
    """Documents to ingest, embed and filter."""
    corpus_tokens: float = 35e9
    """Tokens in them."""
    filtered_tokens: float = 6e9
    """Tokens that the filter leaves."""
    textbook_tokens: float = 1e9
    """Tokens of textbooks to write."""
    exercise_tokens: float = 180e6
    """Tokens of exercises to write."""
    annotations: int = 100_000
    """Documents for a language model to label."""
    textbook_length: int = 800
    """Tokens of a textbook section. The paper does not say."""
    exercise_length: int = 205
    """Tokens of an exercise. The paper: 180 million in 879,500."""
    prompt_length: int = 200
    """Tokens of a request besides the text that it shows."""
    excerpt_length: int = 300
    """Tokens of a document that an annotator is shown."""
    kept: float = 1.0
    """Share of what the model writes that passes the checks."""
    model: str = "gpt-3.5-turbo"
    """Who writes textbooks and exercises, by its name in --prices."""
    annotator: str = "gpt-4"
    """Who labels documents."""
    server: str = "https://api.openai.com/v1"
    """Whose prices."""
    prices: pathlib.Path = PRICES
    """TOML file of prices."""
    batch: bool = False
    """Ask by the server's Batch API, at its price."""
    requests_per_second: float = 5.0
    """Answers that the server gives, all in flight together: 50 of 10 s each."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise UserError(f"--{field.name.replace('_', '-')} {value}: must be more than 0")
        if self.kept > 1:
            raise UserError(f"--kept {self.kept}: must be at most 1")


@dataclasses.dataclass(frozen=True)
class Made:
    """A finished dataset: its stage, of which kind of text (KINDS, or "" if it cannot be told), how much work it was,
    what it took.
    """

    folder: pathlib.Path
    stage: str
    kind: str
    work: float
    took: Took

    @property
    def start(self) -> float:
        """Seconds that did not go into shards: of reading inputs, loading models, starting workers."""
        return max(0.0, self.took.wall - self.took.busy / self.took.workers)


_UNITS = {"embed": "documents", "score": "documents", "synthesize": "rows"}
_LEFT_OUT = ("ingest-keys",)  # is a part of ingest


def run(config: Config) -> None:
    """`phi1 data plan`: prints the plan."""
    made = measured(config.run)
    print("\n".join(own(made) if config.own else describe(config, made)))


def measured(folder: pathlib.Path) -> list[Made]:
    """The finished datasets below a folder that know what they took, in the order in which they were finished.

    Raises UserError if there is none.
    """
    datasets = _datasets(folder, timed=True)
    if not datasets:
        raise UserError(
            f"--run {folder}: no finished dataset there that says what it took; run the stages on a sample first"
        )
    by_hash = {_hash(dataset): dataset for dataset in datasets.values()}
    result = []
    for place, dataset in datasets.items():
        took = timing.read(place)
        stage = dataset.manifest["stage"]
        if took is None or stage in _LEFT_OUT:
            continue
        if stage == "ingest" and (keys := timing.read(place / "keys")) is not None:
            took = took.together_with(keys)
        sources = [by_hash[entry["hash"]] for entry in dataset.manifest["inputs"] if entry["hash"] in by_hash]
        result.append(Made(place, stage, _kind(dataset, by_hash), _work(stage, dataset, sources), took))
    for path in sorted(folder.rglob(METRICS)):
        if (learned := timing.read(path.parent)) is not None:
            result.append(Made(path.parent, "classify", "", learned.rows, learned))
    return result


def funnel(folder: pathlib.Path) -> list[dict[str, Any]]:
    """What came out of each finished dataset below a folder, in the order of the pipeline (a dataset after those it was
    made of).

    Each {"name", "stage", "kind", "inputs": names, "rows", "failures", "bytes" of text, "tokens" (about), "dropped":
    reason -> rows}. A token folder has its true tokens.
    """
    datasets = {
        place: dataset
        for place, dataset in _datasets(folder, timed=False).items()
        if dataset.manifest["stage"] not in (*_LEFT_OUT, "score")
    }
    by_hash = {_hash(dataset): dataset for dataset in datasets.values()}
    names = {_hash(dataset): str(place.relative_to(folder)) for place, dataset in datasets.items()}
    steps = []
    for dataset in _in_order(by_hash):
        counters = dataset.manifest.get("counters", {})
        rows = dataset.manifest.get("documents", counters.get("rows", 0))
        size = text_bytes(dataset) if rows else 0  # a column without rows has bytes of its own
        steps.append(
            {
                "name": names[_hash(dataset)],
                "stage": dataset.manifest["stage"],
                "kind": _kind(dataset, by_hash),
                "inputs": [names[entry["hash"]] for entry in dataset.manifest["inputs"] if entry["hash"] in names],
                "rows": rows,
                "failures": counters.get("failures", 0),
                "bytes": size,
                "tokens": dataset.manifest.get("tokens", round(size / BYTES_PER_TOKEN)),
                "dropped": {key: value for key, value in counters.items() if key.startswith(("dropped", "removed"))},
            }
        )
    return steps


def _datasets(folder: pathlib.Path, *, timed: bool) -> dict[pathlib.Path, Dataset]:
    """The finished datasets and token folders below a folder, in the order in which they were finished. timed: those
    that say what they took.

    Training runs and checkpoints have a manifest of their own, which names no stage.
    """
    found = {}
    for path in sorted(folder.rglob(MANIFEST), key=lambda path: (path.stat().st_mtime_ns, path)):
        if timed and not (path.parent / timing.FILE).exists():
            continue
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: no JSON ({error}); leave that folder out, or run its stage again") from error
        if isinstance(manifest, dict) and {"stage", "inputs", "shards"} <= manifest.keys():
            found[path.parent] = Dataset(path.parent)
    return found


def _hash(dataset: Dataset) -> str:
    """A dataset's hash; of token shards, that nothing is made of here, their folder."""
    return str(dataset.folder) if dataset.manifest["stage"] == "tokenize" else dataset.hash


def _in_order(by_hash: Mapping[str, Dataset]) -> list[Dataset]:
    """A dataset after its inputs; else by name."""
    done: dict[str, Dataset] = {}

    def add(digest: str) -> None:
        if digest in by_hash and digest not in done:
            for entry in by_hash[digest].manifest["inputs"]:
                add(entry["hash"])
            done[digest] = by_hash[digest]

    for digest in by_hash:
        add(digest)
    return list(done.values())


def _kind(dataset: Dataset, by_hash: Mapping[str, Dataset]) -> str:
    """Of what kind of text a dataset is, at the root of what it was made of."""
    stage, config = dataset.manifest["stage"], dataset.manifest.get("config", {})
    if stage == "ingest":
        return "code"
    if stage == "synthesize":
        return config.get("kind", "")
    kinds = [_kind(by_hash[entry["hash"]], by_hash) for entry in dataset.manifest["inputs"] if entry["hash"] in by_hash]
    return kinds[0] if kinds else ""


def _work(stage: str, dataset: Dataset, sources: Sequence[Dataset]) -> float:
    """Documents, rows that were asked for, or bytes of text that were read (for ingest, written)."""
    if stage == "synthesize":
        return dataset.rows + dataset.counters["failures"]
    if _UNITS.get(stage) == "documents":
        return dataset.rows
    read = [source for source in sources if text_bytes(source)] if stage != "ingest" else [dataset]
    return sum(map(text_bytes, read))


def text_bytes(dataset: Dataset) -> int:
    """Bytes of the texts of a dataset, before compression; by what its parquet files say of their columns, which are
    not read.
    """
    import pyarrow.parquet

    if dataset.manifest["stage"] == "tokenize":  # whose shards are of another kind
        return 0
    total = 0
    for shard in range(len(dataset.shards)):
        path = dataset.folder / f"{shard:05d}.parquet"
        if not path.exists():
            raise UserError(f"{path}: missing; leave that folder out, or run its stage again")
        metadata = pyarrow.parquet.read_metadata(path)
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
            total += sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "content")
    return total


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast a stage is: seconds for a unit of work, by the clock and of the CPU; seconds to start; on how much that
    was measured.
    """

    seconds: float
    cpu: float
    start: float
    work: float


def pace(made: Sequence[Made], stage: str, kind: str) -> Pace | None:
    """The pace of a stage on a kind of text, over all of its datasets; None if it was not run."""
    ran = [each for each in made if each.stage == stage and each.kind == kind and each.work and each.took.cpu]
    if not ran:
        return None
    work = sum(each.work for each in ran)
    busy, cpu = (sum(getattr(each.took, name) for each in ran) for name in ("busy", "cpu"))
    return Pace(busy / work, cpu / work, max(each.start for each in ran), work)


def own(made: Sequence[Made]) -> list[str]:
    """The plan for a run's own sizes beside what it took, dataset by dataset."""
    lines = [f"{'dataset':<28} {'stage':<14} {'work':>14} {'planned':>10} {'took':>10}"]
    total = [0.0, 0.0]
    places = {each.folder for each in made}
    for each in made:
        # A part of that one, as a forest's scores are; or nothing to do.
        if each.folder.parent in places or not each.work:
            continue
        planned = each.start + each.took.busy / each.took.workers
        total = [total[0] + planned, total[1] + each.took.wall]
        lines.append(
            f"{each.folder.name:<28} {each.stage:<14} {each.work:>14,.0f} {planned:>8,.1f} s {each.took.wall:>8,.1f} s"
        )
    return [*lines, f"{'':<28} {'':<14} {'':>14} {total[0]:>8,.1f} s {total[1]:>8,.1f} s"]


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _usd_per_token(config: Config, model: str) -> tuple[float, float]:
    """Of a prompt and of an answer. UserError for a model without a price."""
    price = price_of(config.server, model, config.prices)
    if price.usd_per_token is None:
        raise UserError(
            f"--prices {config.prices}: has no price of {model} at {config.server}; add a line, or name another model"
        )
    share = price.batch if config.batch else 1.0
    return price.usd_per_token[0] * share, price.usd_per_token[1] * share


def describe(config: Config, made: Sequence[Made]) -> list[str]:
    """The plan for a target."""
    size = BYTES_PER_TOKEN
    textbooks = config.textbook_tokens / config.textbook_length / config.kept
    exercises = config.exercise_tokens / config.exercise_length / config.kept
    work = [
        ("ingest", "code", config.corpus_tokens, config.corpus_tokens * size),
        ("embed", "code", config.corpus_tokens, config.files),
        ("score", "code", config.corpus_tokens, config.files),
        ("filter", "code", config.corpus_tokens, config.corpus_tokens * size),
        ("decontaminate", "code", config.filtered_tokens, config.filtered_tokens * size),
        ("decontaminate", "textbooks", config.textbook_tokens, config.textbook_tokens * size),
        ("decontaminate", "exercises", config.exercise_tokens, config.exercise_tokens * size),
        (
            "tokenize",
            "code",
            config.filtered_tokens + config.textbook_tokens,
            (config.filtered_tokens + config.textbook_tokens) * size,
        ),
        ("tokenize", "exercises", config.exercise_tokens, config.exercise_tokens * size),
    ]
    lines = [
        f"pace: {config.run}; {config.workers} workers; {config.requests_per_second:g} answers a second",
        f"{'stage':<14} {'of':<10} {'tokens':>16} {'core hours':>12} {'hours':>10} {'USD':>12}   measured on",
    ]
    hours, unknown = 0.0, 0
    for stage, kind, tokens, amount in work:
        rate = pace(made, stage, kind)
        head = f"{stage:<14} {kind:<10} {tokens:>16,.0f}"
        if rate is None:
            unknown += 1
            lines.append(f"{head} {'?':>12} {'?':>10} {'':>12}   not run in {config.run}")
            continue
        wall = rate.start + rate.seconds * amount / config.workers
        hours += wall / 3600
        unit = _UNITS.get(stage, "bytes")
        lines.append(
            f"{head} {rate.cpu * amount / 3600:>12,.1f} {wall / 3600:>10,.1f} {'':>12}   {rate.work:,.0f} {unit}, "
            f"{_count(1 / rate.cpu)} a core second"
        )
    asked, usd = 0.0, 0.0
    for kind, requests, prompt, answer, model in (
        ("labels", config.annotations, config.prompt_length + config.excerpt_length, 5, config.annotator),
        ("textbooks", textbooks, config.prompt_length, config.textbook_length, config.model),
        ("exercises", exercises, config.prompt_length, config.exercise_length, config.model),
    ):
        price = _usd_per_token(config, model)
        cost = requests * (prompt * price[0] + answer * price[1])
        asked, usd = asked + requests / config.requests_per_second / 3600, usd + cost
        lines.append(
            f"{'ask a model':<14} {kind:<10} {requests * (prompt + answer):>16,.0f} {'':>12} "
            f"{requests / config.requests_per_second / 3600:>10,.1f} {cost:>12,.0f}   {requests:,.0f} requests"
        )
    trained = config.filtered_tokens + config.textbook_tokens + config.exercise_tokens
    lines.append(
        f"{'in all':<14} {'':<10} {trained:>16,.0f} {'':>12} {hours + asked:>10,.1f} {usd:>12,.0f}   tokens to train on"
    )
    if unknown:
        print(f"warning: plan: {unknown} stages were not run in {config.run}, and are not in the sum", file=sys.stderr)
    return lines
