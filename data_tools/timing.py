"""What a stage took, in `timing.log` beside its dataset: no part of what the dataset is, and never hashed.

{"shard": 3, "rows": 812, "seconds": 1.93, "cpu_seconds": 1.88}                  a shard that was made
{"run": 2, "seconds": 4.1, "workers": 2, "engine": "local", "cores": 2}          a run of the stage, which made 2 shards
"""

import dataclasses
import json
import os
import pathlib
import time
from typing import Any

from data_tools.engine import Engine

FILE = "timing.log"
"""JSON lines; not named .jsonl, so that no folder of datasets has a source in it."""


class Clock:
    """Wall-clock and CPU seconds of this process since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def read(self) -> dict[str, float]:
        """Both, rounded to 0.1 ms."""
        return {
            "seconds": round(time.monotonic() - self._wall, 4),
            "cpu_seconds": round(time.process_time() - self._cpu, 4),
        }


class Timing:
    """Keeps the time of a run and its shards, also of one that is interrupted. started: `time.monotonic()`, now if
    None.
    """

    def __init__(self, folder: pathlib.Path, engine: Engine, started: float | None = None) -> None:
        self._path, self._engine = folder / FILE, engine
        self._started = time.monotonic() if started is None else started
        self._made = 0

    def __enter__(self) -> "Timing":
        return self

    def shard(self, **facts: Any) -> None:
        """Notes a shard that was made."""
        self._made += 1
        self._append(facts)

    def __exit__(self, *_: object) -> None:
        if self._made:
            seconds = round(time.monotonic() - self._started, 4)
            engine = {"workers": self._engine.workers, "engine": self._engine.engine, "cores": os.cpu_count()}
            self._append({"run": self._made, "seconds": seconds} | engine)

    def _append(self, facts: dict[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")


@dataclasses.dataclass(frozen=True)
class Took:
    """What making a dataset took. shards, rows: those that were timed. busy, cpu: seconds of all shards together; wall:
    of the runs (0 where none was seen to its end); workers: of the last run.
    """

    shards: int
    rows: int
    busy: float
    cpu: float
    wall: float
    workers: int

    def together_with(self, other: "Took") -> "Took":
        """Both as one, for a stage of two passes over the same work."""
        return dataclasses.replace(
            self, busy=self.busy + other.busy, cpu=self.cpu + other.cpu, wall=self.wall + other.wall
        )


def read(folder: pathlib.Path) -> Took | None:
    """What is known of a dataset's time; None if nothing is. A shard that was made again counts as it was last."""
    path = folder / FILE
    if not path.exists():
        return None
    shards: dict[int, dict[str, Any]] = {}
    runs: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            facts = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if not isinstance(facts, dict):
            continue
        if {"run", "seconds", "workers"} <= facts.keys():
            runs.append(facts)
        elif {"shard", "rows", "seconds", "cpu_seconds"} <= facts.keys():
            shards[facts["shard"]] = facts
    if not shards:
        return None
    return Took(
        len(shards),
        sum(shard["rows"] for shard in shards.values()),
        sum(shard["seconds"] for shard in shards.values()),
        sum(shard["cpu_seconds"] for shard in shards.values()),
        sum(run["seconds"] for run in runs),
        runs[-1]["workers"] if runs else 1,
    )
