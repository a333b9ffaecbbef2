"""The forest: what it learns, how it is measured, that it is the same every time, and the files it refuses."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
import sklearn.metrics
import skops.io

from data_tools import annotate, classify, embed, filter
from data_tools.classify import Config, load_forest
from data_tools.dataset import Dataset, run_stage
from phi1.errors import UserError

Make = Callable[..., Dataset]
Vector = Callable[[int], np.ndarray[Any, Any]]
ROWS = 200


def rows_of(documents: Dataset) -> list[tuple[str, float]]:
    """Key and quality of each document: "x = 17" has quality 17 / ROWS."""
    return [(row["hexsha"], int(row["content"][4:]) / ROWS) for row in documents.read(["hexsha", "content"])]


def annotations(documents: Dataset, name: str = "annotations", flat: bool = False) -> Dataset:
    def produce(*_: Any) -> Iterator[dict[str, Any]]:
        for key, quality in rows_of(documents)[::2]:
            yield {"hexsha": key, "content": "", "score": quality * 4 - 2, "label": 0 if flat else int(quality > 0.6)}

    folder = documents.folder.parent / name
    config = annotate.Config(input=documents.folder, output=folder)
    return run_stage("annotate", config, folder, [documents], 1, produce, annotate.schema(), quiet=True)


def quality_and_noise(number: int, width: int = 8) -> np.ndarray[Any, Any]:
    """The quality is one of the coordinates, with noise; the others are noise."""
    vector = np.random.default_rng(number).normal(size=width)
    vector[3] = number / ROWS * 10 + vector[3] * 0.5
    return vector


def embeddings(
    documents: Dataset, name: str = "embeddings", vector: Vector = quality_and_noise, model: str | None = None
) -> Dataset:
    def produce(_: Any, inputs: Any, shard: int) -> Iterator[dict[str, Any]]:
        for row in inputs[0].read(["hexsha", "content"], [shard]):
            number = int(row["content"][4:])
            yield {"hexsha": row["hexsha"], "embedding": vector(number).astype(np.float32)}

    folder = documents.folder.parent / name
    config = embed.Config(input=documents.folder, output=folder)
    extra = {"embedder": model or name}
    return run_stage(
        "embed", config, folder, [documents], len(documents.shards), produce, embed.schema(), extra=extra, quiet=True
    )


@pytest.fixture
def documents(make_documents: Make) -> Dataset:
    return make_documents([f"x = {i}" for i in range(ROWS)], shards=3)


@pytest.fixture
def config(documents: Dataset) -> Config:
    return Config(
        annotations=annotations(documents).folder,
        embeddings=embeddings(documents).folder,
        output=documents.folder.parent / "forest",
        trees=30,
        workers=1,
    )


def test_it_learns_and_says_how_well_beside_the_majority(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    folder = classify.run(config)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["train_rows"], metrics["test_rows"]) == (75, 25)
    for name, baseline in {"accuracy": 0.6, "macro_f1": 0.375, "roc_auc": 0.5, "spearman": 0.0}.items():
        value = metrics["test"][name]
        assert value["baseline"] == pytest.approx(baseline, abs=0.02)
        assert value["value"] > (0.6 if name == "spearman" else 0.75)
        assert value["baseline"] < value["interval"][0] <= value["value"] <= value["interval"][1] <= 1.0
    assert metrics["test"]["average_precision"]["value"] > 0.8
    said = capsys.readouterr().err
    assert "75 documents to learn from, 25 held out" in said and "majority: 0.600" in said
    kept = [point["kept"] for point in metrics["kept_by_threshold"]]
    assert kept[0] == ROWS and kept == sorted(kept, reverse=True) and ROWS > kept[50] > kept[100]
    assert (folder / "threshold.svg").read_text().startswith("<?xml")


def test_the_curve_is_what_the_filter_keeps(config: Config, documents: Dataset) -> None:
    folder = classify.run(config)
    curve = json.loads((folder / "metrics.json").read_text())["kept_by_threshold"]
    for index in (20, 50, 80):
        kept = filter.run(
            filter.Config(
                input=documents.folder,
                embeddings=config.embeddings,
                classifier=folder,
                output=documents.folder.parent / f"kept-{index}",
                threshold=curve[index]["threshold"],
            )
        )
        assert kept.rows == curve[index]["kept"]


def test_the_same_seed_gives_the_same_bytes(config: Config) -> None:
    one = classify.run(config)
    other = classify.run(dataclasses.replace(config, output=config.output.with_name("other"), workers=2))
    for name in ("forest.skops", "metrics.json", "threshold.svg"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    shard = Dataset(config.embeddings)
    expected = load_forest(one).predict_proba(classify.matrix(shard, 0))[:, 1]
    np.testing.assert_array_equal(expected, classify.qualities(Dataset(one / classify.SCORES), 0))
    seeded = classify.run(dataclasses.replace(config, output=config.output.with_name("seeded"), seed=1))
    measured = [json.loads((folder / "metrics.json").read_text())["test"] for folder in (one, seeded)]
    assert measured[0] != measured[1]


@pytest.mark.parametrize("seed", range(5))
def test_no_repository_is_on_both_sides_of_the_split(seed: int) -> None:
    generator = np.random.default_rng(seed)
    groups = generator.choice([f"package-{i}" for i in range(20)], size=300)
    labels = generator.integers(0, 2, size=300)
    train, test, by = classify.split(labels, groups, [None] * 300, 0.25, seed)
    assert by == "group" and sorted([*train, *test]) == list(range(300))
    assert not set(groups[train]) & set(groups[test]) and 40 < len(test) < 110
    again = classify.split(labels, groups, [None] * 300, 0.25, seed)
    np.testing.assert_array_equal(test, again[1])


def test_what_the_annotator_holds_out_is_what_is_tested_on() -> None:
    labels = np.array([0, 1] * 10)
    groups = np.array([f"package-{i // 4}" for i in range(20)])
    given = [i < 4 for i in range(20)]
    train, test, by = classify.split(labels, groups, given, 0.25, 0)
    assert by == "annotator" and test.tolist() == [0, 1, 2, 3] and train.tolist() == list(range(4, 20))
    # Of one label only, or of a repository that is learned from as well: nothing that could be tested on.
    for bad in ([i in (0, 2) for i in range(20)], [i in (0, 1) for i in range(20)]):
        assert classify.split(labels, groups, bad, 0.25, 0)[2] == "group"


def of_repositories(documents: Dataset, count: int) -> tuple[Dataset, Dataset]:
    """Annotations and embeddings that know nothing of a document but its repository: the label is its, and so is the
    vector, with a little noise.
    """

    def annotated(*_: Any) -> Iterator[dict[str, Any]]:
        for key, quality in rows_of(documents):
            group = int(quality * count)
            yield {"hexsha": key, "content": "", "score": group % 2, "label": group % 2, "group": f"package-{group}"}

    folder = documents.folder.parent / f"{count}-packages"
    settings = annotate.Config(input=documents.folder, output=folder)
    made = run_stage("annotate", settings, folder, [documents], 1, annotated, annotate.schema(), quiet=True)

    def vector(number: int) -> np.ndarray[Any, Any]:
        noise = np.random.default_rng(number).normal(size=8)
        return 10 * np.random.default_rng(number * count // ROWS).normal(size=8) + noise

    return made, embeddings(documents, f"of-{count}-packages", vector=vector)


def test_a_forest_that_knows_the_repositories_only_is_at_chance(
    config: Config, documents: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """Were documents of one repository on both sides, it would seem to know the label: as it does where nothing else is
    left.
    """
    for count, by in ((20, "group"), (2, "document")):
        annotated, embedded = of_repositories(documents, count)
        settings = dataclasses.replace(config, annotations=annotated.folder, embeddings=embedded.folder)
        folder = classify.run(dataclasses.replace(settings, output=config.output.with_name(by)))
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["split_by"] == by
        assert (metrics["test"]["roc_auc"]["value"] > 0.95) == (by == "document")
        told = "documents of one repository are on both sides of the split" in capsys.readouterr().err
        assert told == (by == "document")


def test_the_curve_is_of_the_corpus_where_that_is_another(
    config: Config, documents: Dataset, make_documents: Make
) -> None:
    corpus = make_documents([f"x = {i}" for i in range(150, 190)], name="corpus")
    embedded = embeddings(corpus, "embeddings-of-it", model="embeddings")
    folder = classify.run(dataclasses.replace(config, corpus=embedded.folder))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["documents"] == metrics["kept_by_threshold"][0]["kept"] == 40
    settings = filter.Config(
        input=corpus.folder,
        embeddings=embedded.folder,
        classifier=folder,
        output=corpus.folder.parent / "kept",
        threshold=0.5,
    )
    assert filter.run(settings).rows == metrics["kept_by_threshold"][50]["kept"] > 30
    other = embeddings(corpus, "of-another-model")
    with pytest.raises(UserError, match=r"of-another-model: embedded otherwise than"):
        classify.run(dataclasses.replace(config, corpus=other.folder, output=folder.with_name("other")))
    with pytest.raises(UserError, match=r"embedded otherwise than .*of-another-model"):
        filter.run(dataclasses.replace(settings, embeddings=other.folder, output=folder.with_name("others-kept")))


def test_metrics_are_what_sklearn_and_scipy_say() -> None:
    generator = np.random.default_rng(0)
    for case in range(50):
        score = generator.normal(size=30).round(1 if case % 2 else 8)  # ties in every other case
        predicted = np.clip(generator.normal(0.5, 0.2, size=30) + 0.2 * score, 0, 1).round(1 if case % 2 else 8)
        label = (score > 0).astype(int)
        measured = classify._measure(label, score, predicted)
        assert measured == pytest.approx(
            {
                "accuracy": sklearn.metrics.accuracy_score(label, predicted >= 0.5),
                "macro_f1": sklearn.metrics.f1_score(label, predicted >= 0.5, average="macro"),
                "roc_auc": sklearn.metrics.roc_auc_score(label, predicted),
                "average_precision": sklearn.metrics.average_precision_score(label, predicted),
                "spearman": scipy.stats.spearmanr(score, predicted).statistic,
            },
            abs=1e-12,
        )


def test_intervals_narrow_with_the_data() -> None:
    generator = np.random.default_rng(0)

    def measured(count: int) -> dict[str, Any]:
        score = generator.normal(size=count)
        predicted = 1 / (1 + np.exp(-(score + generator.normal(size=count))))
        return classify.evaluate((score > 0).astype(int), score, predicted, seed=0)

    small, large = measured(40), measured(1000)
    for name in small:
        width = [m[name]["interval"][1] - m[name]["interval"][0] for m in (small, large)]
        assert width[0] > 2 * width[1] > 0
    # With score and noise both N(0, 1) the guessed sign is right with probability 3/4.
    assert large["accuracy"]["interval"][0] < 0.75 < large["accuracy"]["interval"][1]


def test_a_run_again_does_nothing_and_another_setting_is_refused(config: Config) -> None:
    folder = classify.run(config)
    before = (folder / "forest.skops").stat().st_mtime_ns
    classify.run(config)
    assert (folder / "forest.skops").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds a forest made with other settings"):
        classify.run(dataclasses.replace(config, trees=31))
    settings = filter.Config(
        input=folder.parent / "documents",
        embeddings=config.embeddings,
        classifier=folder,
        output=folder.parent / "kept",
        threshold=0.5,
    )
    for damaged in ("{", "[]", '{"made_of": {}}'):
        (folder / "metrics.json").write_text(damaged)
        for again in (lambda: classify.run(config), lambda: filter.run(settings)):
            with pytest.raises(
                UserError, match=r"metrics\.json: not what was written .*run `phi1 data classify` again"
            ):
                again()


def test_one_class_and_foreign_embeddings_are_told(config: Config, documents: Dataset, make_documents: Make) -> None:
    with pytest.raises(UserError, match="0 have the rarer label"):
        classify.run(dataclasses.replace(config, annotations=annotations(documents, "flat", flat=True).folder))
    foreign = embeddings(make_documents(["x = 1"], name="others"), "foreign")
    with pytest.raises(UserError, match="made of different documents"):
        classify.run(dataclasses.replace(config, embeddings=foreign.folder))


def test_forest_files_that_are_cut_strange_or_absent_are_told(config: Config) -> None:
    folder = classify.run(config)
    path = folder / "forest.skops"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"forest\.skops: cannot be loaded.*run `phi1 data classify` again"):
        load_forest(folder)
    skops.io.dump(Config, path)  # a type that no forest holds
    with pytest.raises(UserError, match="do not use this file"):
        load_forest(folder)
    path.unlink()
    with pytest.raises(UserError, match="no forest there"):
        load_forest(folder)


@pytest.mark.usefixtures("elsewhere")
def test_filter_keeps_the_best_with_their_quality(config: Config, documents: Dataset) -> None:
    folder = classify.run(config)
    kept = filter.run(
        filter.Config(
            input=documents.folder,
            embeddings=config.embeddings,
            classifier=folder,
            output=documents.folder.parent / "kept",
            keep_fraction=0.25,
        )
    )
    assert ROWS * 0.25 <= kept.rows <= ROWS * 0.35  # ties with the last are kept too
    assert kept.counters["dropped_low_quality"] == ROWS - kept.rows
    rows = list(kept.read())
    assert set(rows[0]) == {*documents.table(0).column_names, "quality"}
    threshold = kept.manifest["config"]["applied_threshold"]
    assert min(row["quality"] for row in rows) == threshold > 0.5
    numbers = [int(row["content"][4:]) for row in rows]
    assert np.mean([number > 0.55 * ROWS for number in numbers]) > 0.95
    assert [row["hexsha"] for row in rows] == [
        k for k in documents.column("hexsha") if k in {r["hexsha"] for r in rows}
    ]


def test_what_was_filtered_can_be_filtered_again(config: Config, documents: Dataset) -> None:
    folder = classify.run(config)
    settings = filter.Config(
        input=documents.folder, embeddings=config.embeddings, classifier=folder, output=folder.parent / "once"
    )
    once = filter.run(dataclasses.replace(settings, threshold=0.5))
    again = embeddings(once, "embedded-again", model="embeddings")
    twice = dataclasses.replace(settings, input=once.folder, embeddings=again.folder, output=folder.parent / "twice")
    made = filter.run(dataclasses.replace(twice, keep_fraction=0.5))
    assert made.schema.names == once.schema.names and 0 < made.rows < once.rows
    assert made.column("quality") == [q for q in once.column("quality") if q >= min(made.column("quality"))]


@pytest.mark.parametrize(("threshold", "told"), [(1.01, "kept nothing"), (0.0, "kept everything")])
def test_filter_that_matches_nothing_or_everything_warns(
    threshold: float, told: str, config: Config, documents: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = classify.run(config)
    options = {"input": documents.folder, "embeddings": config.embeddings, "classifier": folder}
    filter.run(filter.Config(output=documents.folder.parent / "kept", threshold=threshold, **options))
    assert f"warning: filter: {told} of 200 documents" in capsys.readouterr().err


def test_a_forest_at_chance_is_told_and_filters_by_permission_only(
    config: Config, documents: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    def produce(*_: Any) -> Iterator[dict[str, Any]]:
        for i, (key, _quality) in enumerate(rows_of(documents)[::2]):
            # Nothing to do with the embedding.
            yield {"hexsha": key, "content": "", "score": float(i % 2), "label": i % 2}

    folder = documents.folder.parent / "random"
    made = annotate.Config(input=documents.folder, output=folder, seed=9)
    run_stage("annotate", made, folder, [documents], 1, produce, annotate.schema(), quiet=True)
    forest = classify.run(dataclasses.replace(config, annotations=folder))
    assert "warning: classify: chance (AUC 0.5) is inside the interval" in capsys.readouterr().err
    settings = filter.Config(
        input=documents.folder,
        embeddings=config.embeddings,
        classifier=forest,
        output=folder.parent / "kept",
        keep_fraction=0.5,
    )
    with pytest.raises(UserError, match=r"may as well be guessing \(AUC 0\.\d\d, 95% interval .*--allow-chance"):
        filter.run(settings)
    assert filter.run(dataclasses.replace(settings, allow_chance=True)).rows >= ROWS / 2
    assert "warning: filter: by a forest that may as well be guessing" in capsys.readouterr().err


def test_filter_refuses_what_does_not_belong_together(config: Config, documents: Dataset, make_documents: Make) -> None:
    folder = classify.run(config)
    good = filter.Config(
        input=documents.folder,
        embeddings=config.embeddings,
        classifier=folder,
        output=folder.parent / "kept",
        threshold=0.5,
    )
    with pytest.raises(UserError, match="one of --threshold and --keep-fraction"):
        filter.run(dataclasses.replace(good, keep_fraction=0.5))
    with pytest.raises(UserError, match="was not made of"):
        filter.run(dataclasses.replace(good, input=make_documents(["x = 1"], name="others").folder))
    with pytest.raises(UserError, match=r"8 dimensions, .* has 5"):
        filter.run(
            dataclasses.replace(
                good, embeddings=embeddings(documents, "narrow", functools.partial(quality_and_noise, width=5)).folder
            )
        )


def test_embeddings_are_read_as_a_matrix(tmp_path: pathlib.Path) -> None:
    vectors = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]

    def produce(*_: Any) -> Iterator[dict[str, Any]]:
        yield from ({"hexsha": str(i), "embedding": vector} for i, vector in enumerate(vectors))

    folder = tmp_path / "e"
    config = embed.Config(input=tmp_path, output=folder)
    dataset = run_stage("embed", config, folder, [], 1, produce, embed.schema(), quiet=True)
    matrix = classify.matrix(dataset, 0)
    assert matrix.tolist() == vectors and matrix.dtype == np.float32
    assert pa.types.is_float32(dataset.table(0).schema.field("embedding").type.value_type)
