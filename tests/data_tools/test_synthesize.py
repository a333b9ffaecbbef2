"""Synthesis: exercises by the offline teacher and by a scripted LLM, textbooks and their gates."""

import json
import pathlib
from typing import Any

import pytest
from fake_openai import FakeServer, Reply, completion

from data_tools import prompts, synthesize, teacher
from data_tools.dataset import Dataset
from data_tools.synthesize import Config, Unusable, loops, read_exercise, read_textbook
from phi1.errors import UserError
from phi1.evaluate import exercises

GOOD = '''Here is one:

```python
from typing import List

def count_long(words: List[str]) -> int:
    """Return how many words have more than three letters.

    >>> count_long(["apple", "fig"])
    1
    >>> count_long([])
    0
    """
    count = 0
    for word in words:
        if len(word) > 3:
            count += 1
    return count

print(count_long(["a"]))
```
Enjoy.
'''
WRONG = GOOD.replace("> 3:", "> 9:")
ENDLESS = GOOD.replace("    return count", "    while True:\n        pass")
CHANCE = '''```python
def pick(s):
    """Pick an order.

    >>> pick("x")
    ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h']
    """
    return list({"a", "b", "c", "d", "e", "f", "g", "h"})
```'''
BY_HASH = '''```python
def parity(s):
    """Return 0 or 1.

    >>> parity("x") in (0, 1, 2)
    True
    >>> parity("some text")
    VALUE
    """
    return hash(s) % 2
```'''

SECTION = (
    "Lists and loops\n\nA list keeps several values in order, and a loop visits them one after another. Think of a shelf "
    "with numbered places: the first place has the number zero, and you may ask for the value at any place. When we "
    "want to do the same thing with every value, we write a for loop, and Python gives us the values in turn.\n\n"
    "```python\ndef total(prices):\n    result = 0\n    for price in prices:\n        result += price\n    return result\n```\n\n"
    "The variable result starts at zero. Each time round the loop a price is added to it, and when no price is left the "
    "function returns what has been added up. A frequent mistake is to put the return inside of the loop, which ends it "
    "after the first price."
)  # fmt: skip


def config(folder: pathlib.Path, server: FakeServer, kind: Any, count: int, **options: Any) -> Config:
    return Config(kind=kind, output=folder / kind, count=count, base_url=server.base_url, model="fake-1", **options)


def test_an_answer_is_taken_apart() -> None:
    row = read_exercise(GOOD)
    assert row["prompt"].startswith(
        'from typing import List\n\n\ndef count_long(words: List[str]) -> int:\n    """Return'
    )
    assert row["prompt"].endswith('    0\n    """\n') and row["solution"].startswith("    count = 0\n")
    assert row["solution"].endswith("    return count\n") and row["content"] == row["prompt"] + row["solution"]
    assert row["entry_point"] == "count_long"
    assert (
        row["test"]
        == "def check(candidate):\n    assert count_long(['apple', 'fig']) == 1\n    assert count_long([]) == 0\n"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I am sorry, I cannot.", "not Python"),
        ("x = 1", "no function"),
        ("def f(x):\n    return x", "no docstring"),
        ('def f(x):\n    """Doc.\n\n    >>> f(1)\n    1\n    """', "no body"),
        ('def f(x):\n    """Doc."""\n    return x', "no example"),
        (
            'def f(x):\n    """Doc.\n\n    >>> f(1)\n    <object>\n    """\n    return x',
            "an example is not an expression",
        ),
        ('import os\ndef f(x):\n    """D.\n\n    >>> f(1)\n    1\n    """\n    return x', "imports something else: os"),
        ('def f(x):\n    """D.\n\n    >>> f(1)\n    1\n    """; return x\n', "docstring and body share a line"),
        ('def f(x):\n    """D."""\n    return x\n\ndef g(x):\n    return x', "more than one function"),
    ],
)
def test_unusable_answers_say_why(text: str, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        read_exercise(text)


def test_exercises_from_an_llm_are_run(server: FakeServer, tmp_path: pathlib.Path) -> None:
    answers = [GOOD, WRONG, ENDLESS, "Sorry.", CHANCE, GOOD.replace("count_long", "count_longer")]

    def script(body: dict[str, Any], index: int) -> Reply:
        seeds = [prompts.exercise(7, i, max_tokens=800, temperature=0.8).request.seed for i in range(6)]
        return completion(answers[seeds.index(body["seed"])])

    server.script = script
    made = synthesize.run(config(tmp_path, server, "exercises", 6, seed=7))
    rows = list(made.read())
    assert [row["entry_point"] for row in rows] == ["count_long", "count_longer"]
    assert {failure["key"]: failure["reason"].split(":")[0] for failure in made.failures()} == {
        "request 1": "examples do not hold", "request 2": "does not end", "request 3": "not Python",
        "request 4": "examples do not hold"}  # fmt: skip
    assert made.counters["dropped: examples do not hold"] == 2 and made.counters["dropped: does not end"] == 1
    row = rows[0]
    assert row["source"] == "llm:fake-1" and row["model"] == "fake-1" and row["seed"] == "7/0"
    assert json.loads(row["sampling"])["temperature"] == 0.8 and len(row["prompt_hash"]) == 64 and row["topic"]
    # Run again: nothing is asked, nothing changes.
    asked = len(server.bodies)
    assert synthesize.run(config(tmp_path, server, "exercises", 6, seed=7)).hash == made.hash
    assert len(server.bodies) == asked


def test_an_exercise_that_chance_decides_is_dropped() -> None:
    seed = prompts.exercise(0, 0, max_tokens=1, temperature=0.0)
    outcomes = set()
    for value in "01":  # whichever the hash gives, over ten pairs of servers both cannot always agree
        for _ in range(10):
            kept, lost = synthesize.run_exercises([(seed, read_exercise(BY_HASH.replace("VALUE", value)))], workers=1)
            outcomes.update(reason.split(":")[0] for _, reason in lost)
            if "another result when run again" in outcomes:
                return
            assert len(kept) + len(lost) == 1
    raise AssertionError(outcomes)


def test_seeds_differ_and_are_a_pure_function() -> None:
    seeds = [prompts.exercise(1, i, max_tokens=10, temperature=1.0) for i in range(50)]
    assert seeds == [prompts.exercise(1, i, max_tokens=10, temperature=1.0) for i in range(50)]
    assert len({seed.request.prompt_hash for seed in seeds}) > 45
    sections = [prompts.textbook(1, i, max_tokens=10, temperature=1.0) for i in range(50)]
    assert len({(seed.topic, seed.audience) for seed in sections}) > 40


def test_textbook_gates(server: FakeServer, tmp_path: pathlib.Path) -> None:
    looping = SECTION + "\n\n" + "And then we go on and on and on with it.\n" * 40
    answers = [SECTION, SECTION[:200], SECTION.replace("def total", "def def total"), looping,
               SECTION.replace("```python", "").replace("```", ""), SECTION + "\n\n```python\ndef unfinished(x"]  # fmt: skip

    def script(body: dict[str, Any], index: int) -> Reply:
        seeds = [prompts.textbook(0, i, max_tokens=800, temperature=0.8).request.seed for i in range(6)]
        return completion(answers[seeds.index(body["seed"])])

    server.script = script
    made = synthesize.run(config(tmp_path, server, "textbooks", 6))
    assert made.column("content") == [SECTION + "\n"] * 2  # the last was cut back to its last whole paragraph
    assert [failure["reason"].split(":")[0] for failure in made.failures()] == [
        "too short", "no code block that parses", "repeats itself", "no code block"]  # fmt: skip
    row = next(made.read())
    assert row["topic"] in prompts.TOPICS and row["audience"] in prompts.AUDIENCES and row["source"] == "llm:fake-1"


def test_loops_spares_ordinary_text() -> None:
    assert not loops(SECTION) and not loops(pathlib.Path(synthesize.__file__).read_text())
    assert loops("The loop is a loop. " * 60) and loops("x = 1 and more\n" * 30)
    with pytest.raises(Unusable, match="too short"):
        read_textbook("```python\nx = 1\n```")


def test_offline_exercises_in_two_splits(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesize, "_OFFLINE_SHARD", 40)

    def make(split: Any, folder: str, **options: Any) -> Dataset:
        return synthesize.run(Config(kind="exercises", teacher="offline", split=split, count=100, workers=1,
                                     output=tmp_path / folder, **options))  # fmt: skip

    train, held = make("train", "train"), make("held-out", "held")
    assert train.rows == held.rows == 100 and len(train.shards) == 3
    assert teacher.overlaps(train.read(), held.read()) == {"names": 0, "constants": 0, "compositions": 0, "prompts": 0}
    for row in train.read():
        assert row["source"] == row["model"] == "offline-teacher" and row["content"] == row["prompt"] + row["solution"]
    assert any(name.startswith("dropped: ") for name in train.counters)
    problems = exercises.load(held.folder)
    assert len(problems) == 100 and {problem.group for problem in problems} == {"one step", "two steps"}
    assert make("train", "again").hash == train.hash and make("train", "other", seed=1).hash != train.hash


def test_bad_options(server: FakeServer, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="offline writes exercises only"):
        synthesize.run(Config(kind="textbooks", teacher="offline", output=tmp_path / "x"))
    with pytest.raises(UserError, match="only the offline teacher"):
        synthesize.run(config(tmp_path, server, "exercises", 1, split="held-out"))
    with pytest.raises(UserError, match="--count 0"):
        synthesize.run(config(tmp_path, server, "exercises", 0))
    dead = FakeServer()
    dead.close()
    with pytest.raises(UserError, match="no server answers"):
        synthesize.run(config(tmp_path, dead, "exercises", 2, attempts=1))
