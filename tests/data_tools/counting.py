"""A stage that counts, for the tests of datasets: in a module of its own, so that worker processes can import it."""

import dataclasses
import os
import pathlib
import signal
from collections.abc import Iterator, Sequence

import pyarrow as pa

from data_tools.dataset import Counted, Dataset, Failure, Produced

SCHEMA = pa.schema([("n", pa.int64())])


@dataclasses.dataclass(frozen=True)
class Config:
    start: int = 0
    names: tuple[str, ...] = ("a", "b")
    place: pathlib.Path = pathlib.Path("somewhere")
    workers: int = dataclasses.field(default=1, metadata={"no_effect": True})


def produce(config: Config, inputs: Sequence[Dataset], shard: int) -> Iterator[Produced]:
    for i in range(3):
        yield {"n": config.start + 10 * shard + i}
    yield Failure(f"key-{shard}", "odd")
    yield Counted({"seen": 4})


def die(config: Config, inputs: Sequence[Dataset], shard: int) -> Iterator[Produced]:
    """The same in its rows; a worker that comes to shard 2 is killed."""
    if shard == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from produce(config, inputs, shard)
