"""Train a random forest to predict the annotation from the embedding (the paper's section 2.1).

Writes forest.skops (no pickle), metrics.json and threshold.svg: the share of all embedded documents that each
threshold keeps; and scores, a dataset of the forest's probability of each of them, which the filter reads. The metrics
are of documents that the forest has not seen, with bootstrap intervals, beside what always guessing the more frequent
class would score. Documents of one repository are all learned from or all tested on: else a forest that knows the
repositories by their style would pass for one that knows quality.
"""

import dataclasses
import functools
import io
import json
import pathlib
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_tools.dataset import MANIFEST, Dataset, Produced, config_dict, reading, run_stage, sweep
from data_tools.engine import Engine, worth
from data_tools.ranges import at_least
from data_tools.timing import Clock, Timing
from phi1 import __version__
from phi1.errors import UserError
from phi1.files import atomic_write, check_identity, sha256_file, sha256_json, write_json

if TYPE_CHECKING:
    import numpy as np
    from sklearn.ensemble import RandomForestClassifier

FOREST = "forest.skops"
METRICS = "metrics.json"
PLOT = "threshold.svg"
SCORES = "scores"
_TRUSTED = frozenset({"sklearn.tree._tree.Tree"})  # what a forest holds besides skops' own safe types
_ANNOTATED = ("hexsha", "label", "score", "group", "held_out")  # what is read of annotations
_BOOTSTRAP = 1000
_BINS = 100
_SECONDS_A_SCORE = 0.3e-3  # 500 trees on one core


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Engine):
    """Options of `phi1 data classify`."""

    annotations: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Dataset that annotate made."""

    embeddings: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Dataset that embed made, of the same documents."""

    corpus: pathlib.Path | None = dataclasses.field(default=None, metadata={"no_effect": True})
    """Dataset that embed made of the documents to be filtered, if they are others: the plot is of them."""

    output: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Folder for the forest, its metrics and the plot."""

    trees: int = 500
    """Trees in the forest."""

    min_leaf: int = 2
    """Samples in a leaf, at least."""

    held_out: float = 0.25
    """Fraction of the annotated documents kept for the metrics, about, by whole repositories; the gold set says itself
    which.
    """

    seed: int = 0
    """Of the split, the forest and the bootstrap."""


def run(config: Config) -> pathlib.Path:
    """Trains and measures; returns the output folder.

    Raises UserError if the datasets do not belong together, hold too little to learn from, or the folder holds a
    forest made of something else.
    """
    started = time.monotonic()
    at_least(1, config, "trees", "min_leaf")
    if not 0 < config.held_out < 1:
        raise UserError(f"--held-out {config.held_out}: must be more than 0 and less than 1")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"--seed {config.seed}: must be from 0 to below 2**32")
    annotations, embeddings = Dataset(config.annotations), Dataset(config.embeddings)
    documents = [[entry["hash"] for entry in dataset.manifest["inputs"]] for dataset in (annotations, embeddings)]
    if documents[0] != documents[1]:
        raise UserError(
            f"{config.annotations} and {config.embeddings} were made of different documents; "
            "annotate and embed the same dataset"
        )
    corpus = embeddings if config.corpus is None else Dataset(config.corpus)
    annotations.require(*_ANNOTATED)
    for dataset in (embeddings, corpus):
        dataset.require("hexsha", "embedding")
    if embedder(corpus) != embedder(embeddings):
        raise UserError(
            f"{config.corpus}: embedded otherwise than {config.embeddings}; use the same embedder and options"
        )
    made_of = {
        "config": config_dict(config),
        "annotations": annotations.hash,
        "embeddings": embeddings.hash,
        "corpus": corpus.hash,
        "documents": documents[1],
        "embedder": embedder(embeddings),
    }
    path = config.output / METRICS
    if path.exists():
        check_identity(config.output, read_metrics(config.output)["made_of"], made_of, "a forest")
        print(f"classify: already in {config.output}", file=sys.stderr)
        return config.output
    sweep(config.output)
    clock = Clock()
    with Timing(config.output, config, started) as timing:
        metrics = _train(config, annotations, embeddings, corpus)
        timing.shard(shard=0, rows=metrics["train_rows"], **clock.read())
    write_json(path, {"made_of": made_of, "code_version": __version__} | metrics)  # last: it says "whole"
    print(describe(metrics), file=sys.stderr)
    return config.output


def embedder(embeddings: Dataset) -> dict[str, Any]:
    """How a dataset was embedded: model, weights, tokens read."""
    # "auto" is one of others.
    return {key: value for key, value in embeddings.manifest["config"].items() if key != "model"}


def read_metrics(folder: pathlib.Path) -> dict[str, Any]:
    """What the forest in a folder was made of, and how well it does."""
    path = folder / METRICS
    with reading(path, "delete it and run `phi1 data classify` again"):
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        metrics["made_of"]["embedder"], at_chance(metrics), describe(metrics)
    return metrics


def load_forest(folder: pathlib.Path) -> "RandomForestClassifier":
    """The forest in a folder, without running anything from the file.

    Raises UserError if it is absent, corrupt, of another scikit-learn, or holds a type that a forest does not.
    """
    if not (folder / FOREST).exists() or not (folder / METRICS).exists():
        raise UserError(f"{folder}: no forest there ({FOREST}, {METRICS}); run `phi1 data classify` first (again)")
    return _load(folder / FOREST)


@functools.lru_cache(maxsize=1)
def _loaded(path: pathlib.Path, digest: str) -> "RandomForestClassifier":
    """The forest whose file has this SHA-256, loaded once in a process."""
    return _load(path)


def _load(path: pathlib.Path) -> "RandomForestClassifier":
    import skops.io

    try:
        strange = set(skops.io.get_untrusted_types(file=path)) - _TRUSTED
        if strange:
            raise UserError(f"{path}: holds {', '.join(sorted(strange))}, which no forest does; do not use this file")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # InconsistentVersionWarning: trees of another scikit-learn may be misread
            return skops.io.load(path, trusted=sorted(_TRUSTED))
    except UserError:
        raise
    except Exception as error:  # a broken zip, JSON, array or version: each has its own type
        raise UserError(
            f"{path}: cannot be loaded ({type(error).__name__}: {str(error)[:200]}); delete {path.parent} and run "
            "`phi1 data classify` again"
        ) from error


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What scores are made with: the SHA-256 of the forest's file."""

    forest: str


def scored(forest: pathlib.Path, embeddings: Dataset, folder: pathlib.Path, engine: Engine) -> Dataset:
    """Makes the dataset `folder`: hexsha, and quality, the probability of label 1 by the forest in the file
    `forest`.
    """
    import pyarrow as pa

    return run_stage(
        "score",
        Scoring(sha256_file(forest)),
        folder,
        [embeddings],
        len(embeddings.shards),
        functools.partial(_probabilities, forest),
        pa.schema([("hexsha", pa.string()), ("quality", pa.float64())]),
        engine=worth(engine, _SECONDS_A_SCORE * embeddings.rows),
    )


def _probabilities(forest: pathlib.Path, config: Scoring, inputs: Sequence[Dataset], shard: int) -> Iterator[Produced]:
    vectors = matrix(inputs[0], shard)
    keys = inputs[0].table(shard, ["hexsha"]).column("hexsha").to_pylist()
    values = _loaded(forest, config.forest).predict_proba(vectors)[:, 1].tolist() if len(vectors) else []
    for key, value in zip(keys, values, strict=True):
        yield {"hexsha": key, "quality": value}


def scores_of(folder: pathlib.Path, embeddings: Dataset) -> Dataset | None:
    """The scores that classify left of these embeddings, if it was them that it scored."""
    path = folder / SCORES
    if not (path / MANIFEST).exists():
        return None
    scores = Dataset(path)
    made_of = scores.manifest["config"].get("forest"), [entry["hash"] for entry in scores.manifest["inputs"]]
    return scores if made_of == (sha256_file(folder / FOREST), [embeddings.hash]) else None


def qualities(scores: Dataset, shard: int) -> "np.ndarray[Any, Any]":
    """(rows of the shard,) float64: the forest's probability of label 1, in the shard's order."""
    return scores.table(shard, ["quality"]).column("quality").to_numpy()


def matrix(embeddings: Dataset, shard: int) -> "np.ndarray[Any, Any]":
    """(rows, dimensions) float32: the embeddings of one shard."""
    import numpy as np

    column = embeddings.table(shard, ["embedding"]).column("embedding").combine_chunks()
    if len(column) == 0:  # a shard of ingest may hold no document
        return np.zeros((0, 0), np.float32)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def describe(metrics: dict[str, Any]) -> str:
    """The metrics as a small table for the terminal."""
    lines = [f"classify: {metrics['train_rows']} documents to learn from, {metrics['test_rows']} held out"]
    for name, value in metrics["test"].items():
        low, high = value["interval"]
        lines.append(
            f"  {name:<18} {value['value']:6.3f}  (95% {low:.3f} to {high:.3f})   majority: {value['baseline']:.3f}"
        )
    if metrics.get("split_by") == "document":
        lines.append(
            "warning: classify: documents of one repository are on both sides of the split, which flatters: no split "
            "by repositories leaves both labels on both sides; annotate documents of more repositories"
        )
    if at_chance(metrics):
        lines.append(
            "warning: classify: chance (AUC 0.5) is inside the interval: on unseen documents this forest has not been "
            "shown to tell anything; annotate more documents, or with a better model"
        )
    return "\n".join(lines)


def at_chance(metrics: dict[str, Any]) -> bool:
    """Whether the interval of the AUC holds 0.5 or lies below it: whether the forest may as well be guessing."""
    return metrics["test"]["roc_auc"]["interval"][0] <= 0.5


def _train(config: Config, annotations: Dataset, embeddings: Dataset, corpus: Dataset) -> dict[str, Any]:
    import numpy as np
    import skops.io
    from sklearn.ensemble import RandomForestClassifier

    labels = {row["hexsha"]: row for row in annotations.read(_ANNOTATED)}
    if bare := [key for key, row in labels.items() if row["label"] not in (0, 1) or row["score"] is None]:
        raise UserError(
            f"{config.annotations}: {len(bare):,} of {len(labels):,} rows have no label of 0 or 1 with a score, as "
            f"{bare[0]}; annotate again into another folder"
        )
    found: list[tuple[str, Any]] = []
    for shard in range(len(embeddings.shards)):
        keys = embeddings.table(shard, ["hexsha"]).column("hexsha").to_pylist()
        positions = [i for i, key in enumerate(keys) if key in labels]
        if positions:
            found += zip([keys[i] for i in positions], matrix(embeddings, shard)[positions], strict=True)
    found.sort(key=lambda pair: pair[0])
    x = np.array([vector for _, vector in found])
    y = np.array([labels[key]["label"] for key, _ in found])
    score = np.array([labels[key]["score"] for key, _ in found])
    smaller = min((y == 0).sum(), (y == 1).sum()) if len(y) else 0
    if smaller < 4:
        raise UserError(
            f"{config.annotations}: of {len(y)} annotated documents with an embedding, {smaller} have the rarer label, "
            "too few to learn from and to test; annotate more documents"
        )
    groups = np.array([labels[key]["group"] or key for key, _ in found])  # of no known repository: one of its own
    given = [labels[key]["held_out"] for key, _ in found]
    train, test, split_by = split(y, groups, given, config.held_out, config.seed)
    forest = RandomForestClassifier(
        n_estimators=config.trees,
        min_samples_leaf=config.min_leaf,
        class_weight="balanced",  # label 1 is the rarer one; else 0.5 is hardly ever reached
        random_state=config.seed,
        n_jobs=config.workers,
    ).fit(x[train], y[train])
    forest.set_params(n_jobs=None)  # the file shall not depend on this machine
    config.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(config.output / FOREST) as file:
        file.write(_canonical(skops.io.dumps(forest)))
    histogram = np.zeros(_BINS + 1, dtype=np.int64)
    scores = scored(config.output / FOREST, corpus, config.output / SCORES, config)
    for shard in range(len(scores.shards)):
        # Rounded as printed, so that a threshold means the same here and in the filter up to half a bin.
        bins = np.floor(qualities(scores, shard) * _BINS + 1e-9).astype(np.int64)
        histogram += np.bincount(bins, minlength=_BINS + 1)
    kept = histogram[::-1].cumsum()[::-1]
    curve = [{"threshold": i / _BINS, "kept": int(kept[i])} for i in range(_BINS + 1)]
    _plot(config.output / PLOT, curve, int(kept[0]))
    return {
        "train_rows": len(train),
        "test_rows": len(test),
        "test_positive": int(y[test].sum()),
        "split_by": split_by,
        "test": evaluate(y[test], score[test], forest.predict_proba(x[test])[:, 1], config.seed),
        "kept_by_threshold": curve,
        "documents": int(kept[0]),
    }


def split(
    labels: "np.ndarray[Any, Any]",
    groups: "np.ndarray[Any, Any]",
    given: Sequence[bool | None],
    share: float,
    seed: int,
) -> tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]", str]:
    """Positions to learn from, positions to test on, and by what they were parted.

    labels: 0 or 1; groups: repositories, none of which is on both sides; given: what the annotator keeps for tests, if
    it does (then those are tested on: "annotator"). All (documents,). share: to test on, about. Where no split by
    groups ("group") leaves both labels on both sides, documents are parted one by one ("document").
    """
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold, train_test_split

    if any(value is not None for value in given):
        kept = np.array([bool(value) for value in given])
        sides = np.flatnonzero(~kept), np.flatnonzero(kept)
        if all(len(np.unique(labels[side])) == 2 for side in sides) and not set(groups[kept]) & set(groups[~kept]):
            return *sides, "annotator"
    folds = min(round(1 / share), len(np.unique(groups)), int(np.bincount(labels).max()))
    if folds >= 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a label rarer than folds: seen below
            parted = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, groups)
            fit = [sides for sides in parted if all(len(np.unique(labels[side])) == 2 for side in sides)]
        if fit:
            return *min(fit, key=lambda sides: abs(len(sides[1]) - share * len(labels))), "group"
    try:
        sides = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=seed)
    except ValueError as error:
        raise UserError(
            f"--held-out {share}: leaves too few of {len(labels):,} documents to learn from, or to test on; choose "
            "another, or annotate more documents"
        ) from error
    return *sides, "document"


def _canonical(archive: bytes) -> bytes:
    """A skops file that is the same for equal forests.

    skops names objects and their arrays by memory address, stamps the archive's members with the time, and writes the
    nodes of a tree with whatever stood in the padding of their records. Here objects are numbered in the order in which
    the schema names them, the time is that of no file, and padding is zero.
    """
    import numpy as np

    numbers: dict[str, int] = {}

    def number(value: object) -> int:
        return numbers.setdefault(str(value), len(numbers))

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            value = {key: number(item) if key == "__id__" else renamed(item) for key, item in value.items()}
            if isinstance(name := value.get("file"), str):
                stem, dot, suffix = name.rpartition(".")
                value["file"] = f"{number(stem)}{dot}{suffix}"
            return value
        return [renamed(item) for item in value] if isinstance(value, list) else value

    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        schema = renamed(json.loads(source.read("schema.json")))
        members = {"schema.json": json.dumps(schema, indent=2).encode()}
        for name in source.namelist():
            if name == "schema.json":
                continue
            data = source.read(name)
            stem, dot, suffix = name.rpartition(".")
            if suffix == "npy":
                array = np.load(io.BytesIO(data), allow_pickle=False)
                if array.dtype.names:
                    clean = np.zeros(array.shape, array.dtype)
                    for field in array.dtype.names:
                        clean[field] = array[field]
                    array = clean
                buffer = io.BytesIO()
                np.save(buffer, array)
                data = buffer.getvalue()
            members[f"{number(stem)}{dot}{suffix}"] = data
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as target:
        for name in sorted(members):
            target.writestr(zipfile.ZipInfo(name), members[name])
    return result.getvalue()


def evaluate(
    labels: "np.ndarray[Any, Any]", scores: "np.ndarray[Any, Any]", predicted: "np.ndarray[Any, Any]", seed: int
) -> dict[str, dict[str, Any]]:
    """Metric -> value, 95% percentile-bootstrap interval, and the value of the constant guess "majority".

    labels: 0 or 1. scores: the annotator's. predicted: probability of label 1. All (documents,).
    """
    import numpy as np

    values = _measure(labels, scores, predicted)
    baseline = _measure(labels, scores, np.full(len(labels), float(labels.mean() >= 0.5)))
    generator = np.random.default_rng(seed)
    drawn: list[dict[str, float]] = []
    while len(drawn) < _BOOTSTRAP:
        i = generator.integers(0, len(labels), len(labels))
        if 0 < labels[i].sum() < len(labels):  # AUC needs both classes
            drawn.append(_measure(labels[i], scores[i], predicted[i]))
    return {
        name: {
            "value": float(value),
            "interval": [float(q) for q in np.quantile([d[name] for d in drawn], [0.025, 0.975])],
            "baseline": float(baseline[name]),
        }
        for name, value in values.items()
    }


def _measure(y: "np.ndarray[Any, Any]", s: "np.ndarray[Any, Any]", p: "np.ndarray[Any, Any]") -> dict[str, float]:
    """As scikit-learn and scipy define them, without their checks, with which 1,000 resamples took about 20 s on a busy
    core.
    """
    import numpy as np
    from scipy.stats import rankdata

    guess, positives = p >= 0.5, y.sum()
    f1 = [2 * (of & by).sum() / max(of.sum() + by.sum(), 1) for of, by in ((y == 1, guess), (y == 0, ~guess))]
    ranks = rankdata(p)
    score_ranks = rankdata(s)
    varied = p.min() < p.max() and s.min() < s.max()
    order = np.argsort(-p, kind="stable")
    last_of_ties = np.flatnonzero(np.append(np.diff(p[order]) != 0, True))
    found = np.cumsum(y[order])[last_of_ties]
    precision, recall = found / (last_of_ties + 1), found / positives
    return {
        "accuracy": float((guess == (y == 1)).mean()),
        "macro_f1": float(np.mean(f1)),
        "roc_auc": float((ranks[y == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(y) - positives))),
        "average_precision": float((np.diff(recall, prepend=0.0) * precision).sum()),
        "spearman": float(np.corrcoef(score_ranks, ranks)[0, 1]) if varied else 0.0,
    }


def _plot(path: pathlib.Path, curve: list[dict[str, Any]], total: int) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": sha256_json(curve), "font.size": 10}):  # the same bytes every time
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.step([p["threshold"] for p in curve], [p["kept"] / max(total, 1) for p in curve], where="pre")
        axes.set(
            xlabel="threshold (forest's probability)",
            ylabel=f"share kept of {total:,} documents",
            xlim=(0, 1),
            ylim=(0, 1.02),
        )
        axes.grid(alpha=0.3)
        with atomic_write(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
