"""Numbers and datasets that make no sense are told in one line, before anything is made of them or paid for."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pytest

from data_tools import annotate, classify, embed, filter, ingest, synthesize, tokenizer
from data_tools.dataset import Dataset, run_stage
from data_tools.llm import LLM, LLMConfig
from phi1.errors import UserError

HERE = pathlib.Path("nowhere")
STAGES: dict[Any, dict[str, Any]] = {
    annotate: {"input": HERE, "output": HERE},
    classify: {"annotations": HERE, "embeddings": HERE, "output": HERE},
    filter: {"input": HERE, "embeddings": HERE, "classifier": HERE, "output": HERE},
    ingest: {"output": HERE},
    synthesize: {"kind": "exercises", "output": HERE},
}


@pytest.mark.parametrize(
    ("stage", "option", "value"),
    [
        *((classify, "held_out", value) for value in (0.0, 1.0, 1.5, -0.5, math.nan)),
        (classify, "trees", 0),
        (classify, "min_leaf", 0),
        (classify, "seed", -1),
        (classify, "seed", 2**32),
        (filter, "threshold", math.nan),
        (filter, "threshold", -0.1),
        (annotate, "threshold", math.nan),
        (ingest, "limit", -1),
        (ingest, "max_bytes", 0),
        (ingest, "min_alphanumeric", math.nan),
        (synthesize, "workers", 0),
        (synthesize, "max_tokens", 0),
        (synthesize, "temperature", math.nan),
    ],
)
def test_a_number_that_makes_no_sense_is_told(stage: Any, option: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^--{option.replace('_', '-')} {value}: must be "):
        stage.run(stage.Config(**STAGES[stage] | {option: value}))
    assert not HERE.exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("budget_usd", math.nan),
        ("budget_usd", -1.0),
        ("budget_tokens", -1),
        ("usd_per_million_input", -1.0),
        ("usd_per_million_input", math.nan),
        ("usd_per_million_output", math.inf),
        ("concurrency", 0),
        ("attempts", 0),
        ("patience", math.nan),
    ],
)
def test_money_is_a_number(option: str, value: Any, tmp_path: pathlib.Path) -> None:
    priced = {"usd_per_million_input": 1.0, "usd_per_million_output": 1.0} | {option: value}
    with pytest.raises(UserError, match=f"^--{option.replace('_', '-')} {value}: must be "):
        LLM(LLMConfig(base_url="http://127.0.0.1:9/v1", model="m", **priced), tmp_path / "llm.sqlite")


@pytest.mark.parametrize("value", [0, -5, 1, 2])
def test_a_model_reads_something_of_a_text(value: int, make_documents: Callable[..., Dataset]) -> None:
    documents = make_documents(["x = 1"])
    settings = embed.Config(input=documents.folder, output=documents.folder.parent / "e", model="minilm")
    with pytest.raises(UserError, match=f"^--max-tokens {value}: must be at least 3"):
        embed.run(dataclasses.replace(settings, max_tokens=value))


def test_a_dataset_of_another_kind_is_told(tmp_path: pathlib.Path) -> None:
    def made(name: str, schema: pyarrow.Schema) -> pathlib.Path:
        run_stage(name, ingest.Config(output=tmp_path), tmp_path / name, [], 1, lambda *_: [], schema, quiet=True)
        return tmp_path / name

    vectors, exercises = made("vectors", embed.schema()), made("exercises", synthesize.schema("exercises"))
    output = tmp_path / "output"
    no_content = "needs the columns? .*content.*, has hexsha, embedding; name a dataset that has"
    for again, told in (
        (lambda: tokenizer.run(tokenizer.Config(inputs=(vectors,), output=output)), no_content),
        (lambda: embed.run(embed.Config(input=vectors, output=output, model="minilm")), no_content),
        (lambda: annotate.run(annotate.Config(input=vectors, output=output)), no_content),
        (lambda: annotate.run(annotate.Config(input=exercises, output=output)), "max_stars_repo_name, has hexsha, con"),
        (
            lambda: classify.run(classify.Config(annotations=vectors, embeddings=vectors, output=output)),
            "needs the columns hexsha, label, score, group and held_out, has hexsha, embedding",
        ),
    ):
        with pytest.raises(UserError, match=told):
            again()


def test_labels_that_are_missing_and_splits_that_cannot_be_are_told(make_documents: Callable[..., Dataset]) -> None:
    documents = make_documents([f"x = {i}" for i in range(40)])

    def rows(missing: bool) -> Callable[..., Iterator[dict[str, Any]]]:
        def produce(*_: Any) -> Iterator[dict[str, Any]]:
            for i, key in enumerate(documents.column("hexsha")):
                yield {"hexsha": key, "score": 1.0, "label": None if missing and i == 7 else i % 2}

        return produce

    def vectors(*_: Any) -> Iterator[dict[str, Any]]:
        yield from ({"hexsha": key, "embedding": [1.0, 2.0]} for key in documents.column("hexsha"))

    folder = documents.folder.parent
    settings = annotate.Config(input=documents.folder, output=folder)
    for name, stage, produce, schema in (
        ("bare", "annotate", rows(True), annotate.schema()),
        ("labelled", "annotate", rows(False), annotate.schema()),
        ("vectors", "embed", vectors, embed.schema()),
    ):
        run_stage(stage, settings, folder / name, [documents], 1, produce, schema, extra={"n": name}, quiet=True)
    config = classify.Config(annotations=folder / "bare", embeddings=folder / "vectors", output=folder / "forest")
    with pytest.raises(UserError, match="bare: 1 of 40 rows have no label of 0 or 1"):
        classify.run(config)
    alike = dataclasses.replace(config, annotations=folder / "labelled", held_out=0.99)
    with pytest.raises(UserError, match=r"--held-out 0\.99: leaves too few of 40 documents"):
        classify.run(alike)
    tested = json.loads((classify.run(dataclasses.replace(alike, held_out=0.001)) / classify.METRICS).read_text())
    assert tested["test_rows"] == 2  # as few as have both labels
