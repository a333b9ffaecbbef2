"""Keep the documents that the forest rates high enough; each keeps its probability as `quality`."""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from data_tools import classify
from data_tools.dataset import Counted, Dataset, Failure, Produced, run_stage
from data_tools.engine import Engine
from data_tools.ranges import at_least
from phi1.errors import UserError
from phi1.files import sha256_file

if TYPE_CHECKING:
    import pyarrow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Engine):
    """Options of `phi1 data filter`."""

    input: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Dataset of documents."""

    embeddings: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Dataset that embed made of them."""

    classifier: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Folder that classify wrote."""

    output: pathlib.Path = dataclasses.field(metadata={"no_effect": True})
    """Folder of the new dataset: the documents kept, with `quality` from 0 to 1."""

    threshold: float | None = None
    """Keep documents of at least this probability, 0 to 1."""

    keep_fraction: float | None = None
    """Keep this fraction of the documents, the best ones (and what ties with the last)."""

    allow_chance: bool = dataclasses.field(default=False, metadata={"no_effect": True})
    """Filter even by a forest that may as well be guessing (chance is inside the interval of its AUC)."""


def run(config: Config) -> Dataset:
    """Makes the dataset. Raises UserError if the inputs do not belong together."""
    started = time.monotonic()
    if (config.threshold is None) == (config.keep_fraction is None):
        raise UserError("give one of --threshold and --keep-fraction")
    if config.keep_fraction is not None and not 0 < config.keep_fraction <= 1:
        raise UserError(f"--keep-fraction {config.keep_fraction}: must lie between 0 and 1")
    at_least(0, config, "threshold")
    documents, embeddings = Dataset(config.input), Dataset(config.embeddings)
    embeddings.require("hexsha", "embedding")
    if [entry["hash"] for entry in embeddings.manifest["inputs"]] != [documents.hash]:
        raise UserError(f"{config.embeddings}: was not made of {config.input}; embed that dataset first")
    forest = classify.load_forest(config.classifier)
    file = config.classifier / classify.FOREST
    if forest.n_features_in_ != (width := _width(embeddings)):
        raise UserError(
            f"{config.classifier}: its forest reads embeddings of {forest.n_features_in_} dimensions, "
            f"{config.embeddings} has {width}; use the same embedder for both"
        )
    metrics = classify.read_metrics(config.classifier)
    if metrics["made_of"]["embedder"] != classify.embedder(embeddings):
        raise UserError(
            f"{config.classifier}: its forest learned from documents that were embedded otherwise than "
            f"{config.embeddings}; use the same embedder and options for both"
        )
    if classify.at_chance(metrics):
        auc = metrics["test"]["roc_auc"]
        told = f"AUC {auc['value']:.2f}, 95% interval {auc['interval'][0]:.2f} to {auc['interval'][1]:.2f}"
        if not config.allow_chance:
            raise UserError(
                f"{config.classifier}: its forest may as well be guessing ({told}), and would drop documents by "
                f"chance; annotate more documents or with a better model, or pass --allow-chance"
            )
        print(f"warning: filter: by a forest that may as well be guessing ({told})", file=sys.stderr)
    scores = classify.scores_of(config.classifier, embeddings) or classify.scored(
        file, embeddings, config.output / classify.SCORES, config
    )
    threshold = config.threshold if config.threshold is not None else _quantile(scores, config.keep_fraction or 1.0)
    dataset = run_stage(
        "filter",
        config,
        config.output,
        [documents, embeddings],
        len(documents.shards),
        functools.partial(_kept, scores, threshold),
        _with_quality(documents.schema),
        engine=config,
        started=started,
        extra={"forest": sha256_file(file), "applied_threshold": float(threshold)},
    )
    judged = dataset.rows + dataset.counters.get("dropped_low_quality", 0)
    if dataset.rows in (0, judged):
        what = "kept nothing" if dataset.rows == 0 else "kept everything"
        print(
            f"warning: filter: {what} of {judged:,} documents at threshold {threshold:.3f}; "
            f"see {config.classifier / classify.PLOT} and choose another --threshold or --keep-fraction",
            file=sys.stderr,
        )
    return dataset


def _with_quality(schema: "pyarrow.Schema") -> "pyarrow.Schema":
    """Of the documents kept. What was filtered before has a quality already: this one takes its place."""
    import pyarrow as pa

    quality, index = pa.field("quality", pa.float64()), schema.get_field_index("quality")
    return schema.append(quality) if index < 0 else schema.set(index, quality)


def _width(embeddings: Dataset) -> int:
    return next((len(row["embedding"]) for row in embeddings.read(["embedding"])), 0)


def _kept(scores: Dataset, threshold: float, _: Config, inputs: Sequence[Dataset], shard: int) -> Iterator[Produced]:
    table = scores.table(shard)
    of = dict(zip(table.column("hexsha").to_pylist(), table.column("quality").to_pylist(), strict=True))
    dropped = 0
    for row in inputs[0].read(shards=[shard]):
        if row["hexsha"] not in of:
            yield Failure(row["hexsha"], "has no embedding")
        elif of[row["hexsha"]] >= threshold:
            yield row | {"quality": of[row["hexsha"]]}
        else:
            dropped += 1
    yield Counted({"dropped_low_quality": dropped})


def _quantile(scores: Dataset, fraction: float) -> float:
    import numpy as np

    quality = [classify.qualities(scores, shard) for shard in range(len(scores.shards))]
    ranked = np.sort(np.concatenate([*quality, np.zeros(0)]))[::-1]
    if not len(ranked):
        raise UserError("there is no document to filter: the dataset of embeddings is empty")
    return float(ranked[max(1, round(fraction * len(ranked))) - 1])
