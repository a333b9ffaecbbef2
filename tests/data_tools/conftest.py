"""Shared by the data tools' tests: a scripted OpenAI-compatible server, and small datasets."""

import hashlib
import pathlib
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # helper modules beside the tests

from fake_openai import FakeServer

from data_tools import dataset, engine, ingest, tokenize
from data_tools.dataset import Dataset, run_stage


@pytest.fixture(autouse=True)
def own_ledger(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own ledger of LLM requests is not the tests'."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user-data"))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shards of a stage that has an engine are made by a copy of its task, as another process gets it. There must be
    such a stage.
    """
    moved: list[int] = []

    def run(
        on: engine.Engine, task: engine.Task, shards: Sequence[int], folder: pathlib.Path, *_: Any
    ) -> Iterator[dict[str, Any]]:
        if on is not engine.HERE:
            task = pickle.loads(pickle.dumps(task))
            moved.extend(shards)
        yield from map(task, shards)

    monkeypatch.setattr(engine, "START_SECONDS", 0.0)
    monkeypatch.setattr(dataset, "run_tasks", run)
    monkeypatch.setattr(tokenize, "run_tasks", run)
    yield
    assert moved


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


@pytest.fixture
def make_documents(tmp_path: pathlib.Path) -> Callable[..., Dataset]:
    """make_documents(texts, shards=1, name="documents") -> a dataset of documents with these contents."""

    def make(texts: Sequence[str], shards: int = 1, name: str = "documents") -> Dataset:
        def produce(_: Any, __: Any, shard: int) -> Iterator[dict[str, Any]]:
            for text in texts[shard::shards]:
                yield {
                    "hexsha": hashlib.sha1(text.encode()).hexdigest(),
                    "content": text,
                    "source": "test",
                    "lang": "Python",
                }

        config = ingest.Config(output=tmp_path / name)
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        return run_stage(
            "test", config, tmp_path / name, [], shards, produce, ingest.schema(), extra={"texts": digest}, quiet=True
        )

    return make
