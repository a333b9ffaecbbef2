"""What each new row adds to those before it, while a language model writes: repeats, near twins, topics that run dry.

`Earlier` holds what the shards so far have, and reads each of them once: they are made one after another.
"""

import ast
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_tools.diversity import Twins, mask
from data_tools.similarity import words

TOPICS = "topics.jsonl"
"""Beside the shards, a line for each: the topics that had fewer places in the urn that its requests were drawn from.
What a shard asks is decided once, so that making it again (--retry-failed) finds its answers in the ledger.
"""
PLACES = 4
"""A topic's in the urn, where its answers add something; one is always left."""
LEAST_ROWS = 10
"""Of a shard, to say something about its share of near twins."""


def masked(content: str) -> str:
    """A text without what does not make it another one: case, blanks and punctuation, and, where it is one function,
    its name and those of its arguments and variables.
    """
    try:
        module = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return " ".join(words(content))
    names: dict[str, str] = {}
    for node in ast.walk(module):
        bound = node.name if isinstance(node, ast.FunctionDef) else node.arg if isinstance(node, ast.arg) else None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound = node.id
        if bound is not None:
            names.setdefault(bound, f"name{len(names)}")
    return " ".join(words(re.sub(r"[^\W\d]\w*", lambda match: names.get(match[0], match[0]), content)))


class Earlier:
    """The rows of the shards so far, all in one folder. topics: the recipe's. asked: from a shard and its urn to the
    topics of its requests; None: all urns are full.
    """

    def __init__(
        self, output: pathlib.Path, topics: Sequence[str], asked: Callable[[int, list[str]], list[str]] | None = None
    ) -> None:
        self._output, self._topics, self._asked = output, tuple(topics), asked
        self._read = 0  # shards
        self._first: dict[str, str] = {}  # a row's content, and its masked form -> number of its request
        self._twins = Twins()
        self._tried = dict.fromkeys(topics, 0)
        self._added = dict.fromkeys(topics, 0)
        self._fewer = self._decided()
        self.largest_share = 0.0
        """Of near twins among the rows of a shard, of those with enough rows."""

    def read_until(self, shard: int) -> None:
        """Takes in the shards before this one that it has not seen."""
        import pyarrow.parquet

        for number in range(self._read, shard):
            path = self._output / f"{number:05d}.parquet"
            rows = pyarrow.parquet.read_table(path, columns=["content", "seed", "topic"]).to_pylist()
            for row in rows:
                self.repeats(row["content"], row["seed"])
            self.take(number, rows)

    def repeats(self, content: str, seed: str) -> str | None:
        """The number of an earlier request that a row with this content repeats; if none, it is one of them from now
        on.
        """
        forms = (content, masked(content))
        for form in forms:
            if form in self._first:
                return self._first[form]
        self._first |= dict.fromkeys(forms, seed.rpartition("/")[2])
        return None

    def take(self, shard: int, rows: Sequence[Mapping[str, Any]]) -> int:
        """Takes in the rows of the next shard; returns how many are near twins of rows before them."""
        found = 0
        for row in rows:
            if self._twins.add(mask(row["content"])) is not None:
                found += 1
            else:
                self._added[row["topic"]] += 1
        if self._asked is not None:
            for topic in self._asked(shard, self.urn(shard)):
                self._tried[topic] += 1
        if len(rows) >= LEAST_ROWS:
            self.largest_share = max(self.largest_share, found / len(rows))
        self._read = shard + 1
        return found

    def urn(self, shard: int) -> list[str]:
        """Topics to draw a shard's from, each so often as befits the share of its requests so far that added a row
        which is no near twin, as if one more had.
        """
        if shard not in self._fewer:
            places = {
                topic: math.ceil(PLACES * (self._added[topic] + 1) / (self._tried[topic] + 1)) for topic in self._topics
            }
            self._fewer[shard] = {topic: count for topic, count in places.items() if count < PLACES}
            line = json.dumps({"shard": shard, "fewer": self._fewer[shard]})
            with open(self._output / TOPICS, "a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")  # after what an interruption may have left of another
        fewer = self._fewer[shard]
        if not fewer:
            return list(self._topics)
        return [topic for topic in self._topics for _ in range(fewer.get(topic, PLACES))]

    def _decided(self) -> dict[int, dict[str, int]]:
        path = self._output / TOPICS
        found: dict[int, dict[str, int]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # empty, or cut off: its shard was not begun
                continue
            found[entry["shard"]] = entry["fewer"]
        return found
