"""What each row adds: repeats, near twins, urns of topics."""

import pathlib
from typing import Any

import pyarrow
import pyarrow.parquet

from data_tools.novelty import PLACES, TOPICS, Earlier, masked


def test_masked_text_is_equal_for_what_only_looks_different() -> None:
    code = "def f(xs):\n    total = 0\n    for x in xs:\n        total += x\n    return total\n"
    assert masked(code) == masked(code.replace("total", "result").replace("xs", "values").replace("f(", "add("))
    assert masked(code) != masked(code.replace("+=", "+= 2 *")) and masked(code) != masked(code.replace("0", "1"))
    assert masked("A list. Keeps order") == masked("a list keeps  order!") != masked("a list keeps")


def row(number: int, topic: str, *, new: bool = True) -> dict[str, Any]:
    content = " ".join(f"word{number if new else 0}x{i}" for i in range(20)) + f" {number}"
    return {"content": content, "seed": f"0/{number}", "topic": topic}


def write(folder: pathlib.Path, shard: int, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")


def test_repeats_are_known_by_the_first_request() -> None:
    earlier = Earlier(pathlib.Path("unused"), ["t"])
    assert earlier.repeats("def f(x):\n    return x\n", "0/3") is None
    assert earlier.repeats("def g(y):\n    return y\n", "0/5") == "3"
    assert earlier.repeats("def g(y):\n    return y + 1\n", "0/6") is None


def test_shards_on_disk_and_shards_just_made_are_the_same(tmp_path: pathlib.Path) -> None:
    """A run that goes on knows what one that was not interrupted knows."""
    shards = [[row(i, "ab"[i % 2], new=i % 2 == 0 or i < 4) for i in range(k, k + 20)] for k in (0, 20, 40)]
    (tmp_path / "elsewhere").mkdir()  # where the urns of the one are no help to the other
    whole = Earlier(tmp_path / "elsewhere", ["a", "b"], lambda shard, urn: ["a", "b"] * 10)
    for number, rows in enumerate(shards):
        assert [whole.repeats(r["content"], r["seed"]) for r in rows] == [None] * 20
        whole.take(number, rows)
        write(tmp_path, number, rows)
    again = Earlier(tmp_path, ["a", "b"], lambda shard, urn: ["a", "b"] * 10)
    again.read_until(3)
    assert again.urn(3) == whole.urn(3) == ["a"] * PLACES + ["b"] * 1
    assert again.largest_share == whole.largest_share == 0.5
    assert again.repeats(shards[1][0]["content"], "0/99") == "20"
    assert again.take(3, [row(99, "a"), row(2, "a")]) == 1


def test_an_urn_is_decided_once(tmp_path: pathlib.Path) -> None:
    first = Earlier(tmp_path, ["a", "b"], lambda shard, urn: ["a", "a", "a", "b"])
    first.take(0, [row(0, "b")])
    assert first.urn(1) == ["a"] + ["b"] * PLACES
    with open(tmp_path / TOPICS, "a") as file:
        file.write('{"shard": 2, "fe')  # a killed writer's
    again = Earlier(tmp_path, ["a", "b"], lambda shard, urn: ["a", "a", "a", "b"])
    again.take(0, [row(1, "a"), row(2, "a"), row(3, "a"), row(4, "b")])  # another outcome than the first time
    assert again.urn(1) == ["a"] + ["b"] * PLACES and again.urn(2) == ["a", "b"]
    assert Earlier(tmp_path, ["a", "b"]).urn(2) == ["a", "b"]


def test_a_topic_never_leaves_the_urn(tmp_path: pathlib.Path) -> None:
    earlier = Earlier(tmp_path, ["a", "b"], lambda shard, urn: ["a"] * 1000)
    earlier.take(0, [])
    assert earlier.urn(1) == ["a"] + ["b"] * PLACES
