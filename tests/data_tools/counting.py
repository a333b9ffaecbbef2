"""A stage that counts, for the tests of datasets: in a module of its own, so that worker processes can import it."""

import dataclasses
import os
import pathlib
import signal
import sys
import time
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


def wait(config: Config, inputs: Sequence[Dataset], shard: int) -> Iterator[Produced]:
    """The same in its rows; from shard 1 on it says which process it is, and goes on once the file `gate` in that
    folder is there.
    """
    place = pathlib.Path(os.environ["COUNTING"])
    if shard:
        (place / f"{os.getpid()}.worker").touch()
        while not (place / "gate").exists():
            time.sleep(0.01)
    yield from produce(config, inputs, shard)


if __name__ == "__main__":
    # counting.py FUNCTION FOLDER ENGINE WORKERS SHARDS: as a stage's command does it, in a process that can be killed
    import counting

    from data_tools.dataset import run_stage
    from data_tools.engine import Engine
    from phi1.errors import UserError

    function, folder, engine, workers, shards = sys.argv[1:]
    options = Engine(workers=int(workers), engine=engine, slurm_partition="test", task_memory=0.2)  # type: ignore[arg-type]
    try:
        run_stage(
            "count",
            counting.Config(),
            pathlib.Path(folder),
            [],
            int(shards),
            getattr(counting, function),
            SCHEMA,
            engine=options,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
