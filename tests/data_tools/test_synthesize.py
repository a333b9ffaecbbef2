"""Synthesis: exercises by the offline teacher and by a scripted LLM, textbooks and their gates."""

import dataclasses
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

RECIPE = prompts.load(prompts.RECIPE)
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
    "Lists and loops\n\nA list keeps several values in order, and a loop visits them one after another. Think of a "
    "shelf "
    "with numbered places: the first place has the number zero, and you may ask for the value at any place. When we "
    "want to do the same thing with every value, we write a for loop, and Python gives us the values in turn.\n\n"
    "```python\ndef total(prices):\n    result = 0\n    for price in prices:\n        result += price\n    return "
    "result\n```\n\n"
    "The variable result starts at zero. Each time round the loop a price is added to it, and when no price is left "
    "the "
    "function returns what has been added up. A frequent mistake is to put the return inside of the loop, which ends "
    "it after the first price."
)


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
    other = GOOD.replace("count_long", "count_longer").replace("more than three", "over three")
    answers = [GOOD, WRONG, ENDLESS, "Sorry.", CHANCE, other]

    def script(body: dict[str, Any], index: int) -> Reply:
        seeds = [prompts.exercise(RECIPE, 7, i, max_tokens=800, temperature=0.8).request.seed for i in range(6)]
        return completion(answers[seeds.index(body["seed"])])

    server.script = script
    made = synthesize.run(config(tmp_path, server, "exercises", 6, seed=7))
    rows = list(made.read())
    assert [row["entry_point"] for row in rows] == ["count_long", "count_longer"]
    assert {failure["key"]: failure["reason"].split(":")[0] for failure in made.failures()} == {
        "request 1": "examples do not hold",
        "request 2": "does not end",
        "request 3": "not Python",
        "request 4": "examples do not hold",
    }
    assert made.counters["dropped: examples do not hold"] == 2 and made.counters["dropped: does not end"] == 1
    row = rows[0]
    assert row["source"] == "llm:fake-1" and row["model"] == "fake-1" and row["seed"] == "7/0"
    assert json.loads(row["sampling"])["temperature"] == 0.8 and len(row["prompt_hash"]) == 64 and row["topic"]
    # Run again: nothing is asked, nothing changes.
    asked = len(server.bodies)
    assert synthesize.run(config(tmp_path, server, "exercises", 6, seed=7)).hash == made.hash
    assert len(server.bodies) == asked


def test_equal_answers_make_one_row_over_all_shards(
    server: FakeServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesize, "_LLM_SHARD", 4)
    renamed = (
        GOOD.replace("count_long", "long_ones")
        .replace("words", "texts")
        .replace("count ", "n ")
        .replace("count\n", "n\n")
    )
    answers = [
        GOOD,
        GOOD,
        renamed,
        GOOD.replace("three letters.", "three  letters!"),
        GOOD.replace("three", "3"),
        renamed,
        GOOD,
    ]

    def script(body: dict[str, Any], index: int) -> Reply:
        seeds = [prompts.exercise(RECIPE, 0, i, max_tokens=800, temperature=0.8).request.seed for i in range(7)]
        return completion(answers[seeds.index(body["seed"])])

    server.script = script
    made = synthesize.run(config(tmp_path, server, "exercises", 7, adapt=False))
    assert [row["seed"] for row in made.read()] == ["0/0", "0/4"] and len(made.shards) == 2
    assert {f["key"]: f["reason"] for f in made.failures()} == {
        f"request {i}": "duplicate: of request 0" for i in (1, 2, 3, 5, 6)
    }
    assert made.counters["dropped: duplicate"] == 5


def test_what_was_not_answered_can_be_asked_again(
    server: FakeServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesize, "_LLM_SHARD", 3)
    asked: list[int] = []

    def script(body: dict[str, Any], index: int) -> Reply:
        seeds = [prompts.textbook(RECIPE, 0, i, max_tokens=800, temperature=0.8).request.seed for i in range(9)]
        number = seeds.index(body["seed"])
        asked.append(number)
        if number == 4 and len(asked) <= 9:
            return 400, {}, {"error": {"message": "flagged", "code": "content_filter"}}
        return completion(SECTION.replace("shelf", f"shelf {number}") if number != 7 else "short")

    server.script = script
    settings = config(tmp_path, server, "textbooks", 9, adapt=False)
    first = synthesize.run(settings)
    assert first.rows == 7 and sorted(asked) == list(range(9))
    again = synthesize.run(dataclasses.replace(settings, retry_failed=True))
    assert again.rows == 8 and asked[9:] == [4] and [f["key"] for f in again.failures()] == ["request 7"]


def two_topics(folder: pathlib.Path) -> pathlib.Path:
    """The recipe with the topics "dry" and "rich" alone."""
    path = folder / "two.toml"
    lists = dataclasses.asdict(RECIPE) | {"topics": ["dry", "rich"]}
    path.write_text("".join(f"{name} = {json.dumps(list(values))}\n" for name, values in lists.items()))
    return path


def section(number: int) -> str:
    """A section that is no near twin of another number's."""
    return SECTION.replace("keeps", " ".join(f"w{number}x{i}" for i in range(60)))


def test_topics_that_add_nothing_are_asked_less(
    server: FakeServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers on one topic are all alike. A failure asked again later changes no other question: none is paid twice."""
    monkeypatch.setattr(synthesize, "_LLM_SHARD", 20)
    asked: list[str] = []
    failing = [True]

    def script(body: dict[str, Any], index: int) -> Reply:
        topic = "dry" if "about dry" in body["messages"][-1]["content"] else "rich"
        asked.append(topic)
        if failing[0] and index == 25:
            return 400, {}, {"error": {"message": "flagged", "code": "content_filter"}}
        return completion(section(index) if topic == "rich" else SECTION.replace("shelf", f"shelf {index}"))

    server.script = script
    settings = config(tmp_path, server, "textbooks", 120, recipe=two_topics(tmp_path), concurrency=1)
    made = synthesize.run(settings)
    assert 4 <= asked[:20].count("dry") <= 16  # by lot
    assert asked[40:].count("dry") < 0.35 * 80 and asked[40:].count("dry") > 0
    dry = [row for row in made.read() if row["topic"] == "dry"]
    assert made.counters["near_twins"] == len(dry) - 1
    # The shards after the second are made again, from the same questions.
    failing[0] = False
    again = synthesize.run(dataclasses.replace(settings, retry_failed=True))
    assert len(asked) == 121 and again.rows == made.rows + 1
    # An equal run elsewhere, of other answers' numbers, asks the same first shard; without --adapt there is no urn.
    plain = synthesize.run(dataclasses.replace(settings, output=tmp_path / "plain", adapt=False))
    assert not (plain.folder / "topics.jsonl").exists()
    assert plain.column("topic").count("dry") > len(dry) * 1.5


def test_a_level_of_near_twins_stops_the_run(
    server: FakeServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthesize, "_LLM_SHARD", 20)
    server.script = lambda body, index: completion(
        section(index) if index < 20 else SECTION.replace("shelf", f"shelf {index}")
    )
    settings = config(tmp_path, server, "textbooks", 100, max_twins=0.5, concurrency=1)
    made = synthesize.run(settings)
    assert len(server.bodies) == 40 and made.rows == 40 and made.counters["not_asked"] == 60
    line = "stopped after 40 of 100 requests, as of the rows of the last 20 more than --max-twins 0.5 are near twins"
    assert line in capsys.readouterr().err
    assert synthesize.run(settings).hash == made.hash and len(server.bodies) == 40
    through = synthesize.run(dataclasses.replace(settings, output=tmp_path / "all", max_twins=None))
    assert through.rows == 100 and "not_asked" not in through.counters
    with pytest.raises(UserError, match="--max-twins 1"):
        synthesize.run(dataclasses.replace(settings, max_twins=1.0))


def test_an_exercise_that_chance_decides_is_dropped() -> None:
    seed = prompts.exercise(RECIPE, 0, 0, max_tokens=1, temperature=0.0)
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
    seeds = [prompts.exercise(RECIPE, 1, i, max_tokens=10, temperature=1.0) for i in range(50)]
    assert seeds == [prompts.exercise(RECIPE, 1, i, max_tokens=10, temperature=1.0) for i in range(50)]
    assert len({seed.request.prompt_hash for seed in seeds}) > 45
    sections = [prompts.textbook(RECIPE, 1, i, max_tokens=10, temperature=1.0) for i in range(50)]
    assert len({(seed.topic, seed.audience) for seed in sections}) > 40


def test_the_recipe_is_large_and_another_one_is_another_dataset(server: FakeServer, tmp_path: pathlib.Path) -> None:
    assert len(RECIPE.verbs) * (1 + len(RECIPE.qualifiers)) * len(RECIPE.objects) > 500_000
    seeds = [prompts.exercise(RECIPE, 0, i, max_tokens=10, temperature=1.0) for i in range(3000)]
    names = {seed.request.messages[-1]["content"].split(".")[0] for seed in seeds}
    assert len(names) > 2950 and len({seed.request.prompt_hash for seed in seeds}) == 3000
    server.script = lambda body, index: completion(GOOD)
    settings = config(tmp_path, server, "exercises", 1)
    synthesize.run(settings)
    other = tmp_path / "other.toml"
    other.write_text(prompts.RECIPE.read_text().replace('"a kitchen"', '"an ocean"'))
    with pytest.raises(UserError, match=r"config\.recipe"):
        synthesize.run(dataclasses.replace(settings, recipe=other))
    for change, told in {
        'topics = ["a", 1]': "topics must be a list",
        "topics = []": "topics must be",
        "topics = [": "cannot be read",
        'verbs = ["be quick"]': "parts of a function's name",
        "": "must have the lists topics",
    }.items():
        lists = {name: f'{name} = ["a", "b"]' for name in dataclasses.asdict(RECIPE)}
        other.write_text("\n".join((lists | {change.partition(" ")[0]: change}).values()) if change else "")
        with pytest.raises(UserError, match=told):
            prompts.load(other)


@pytest.mark.parametrize(
    "written",
    [
        SECTION.replace("```python", "```Python"),
        SECTION.replace("```python", "```python3"),
        SECTION.replace("```python", "```{python}"),
        SECTION.replace("```python", '```python title="a.py"'),
        SECTION.replace("```", "````"),
        SECTION.replace("```", "~~~"),
        SECTION.replace("```python", "   ```python").replace("\n```\n", "\n   ```\n"),
    ],
)
def test_a_section_is_kept_whatever_its_fences_look_like(written: str) -> None:
    assert read_textbook(written) == {"content": written + "\n"}
    half = written[: written.index("    for price")]  # met its limit
    with pytest.raises(Unusable, match="too short" if len(half) < 500 else "no code block"):
        read_textbook(half)


@pytest.mark.parametrize(
    "written",
    [
        f"<think>A section on lists.\n```python\nx = 1\n```</think>\n\n{SECTION}",
        f"```markdown\n{SECTION}\n```",
        SECTION.replace("\n", "\r\n"),
    ],
)
def test_a_section_is_what_stands_in_the_answer(written: str) -> None:
    assert read_textbook(written) == read_textbook(SECTION) == {"content": SECTION + "\n"}
    with pytest.raises(Unusable, match="too short: 0"):
        read_textbook(f"<think>{SECTION}")


def test_code_that_is_not_python_is_no_code_block() -> None:
    with pytest.raises(Unusable, match="no code block"):
        read_textbook(SECTION.replace("```python", "```text"))


def test_textbook_gates(server: FakeServer, tmp_path: pathlib.Path) -> None:
    looping = SECTION + "\n\n" + "And then we go on and on and on with it.\n" * 40
    longer = SECTION + " It happens to everyone once."
    answers = [
        SECTION,
        SECTION[:200],
        SECTION.replace("def total", "def def total"),
        looping,
        SECTION.replace("```python", "").replace("```", ""),
        longer + "\n\n```python\ndef unfinished(x",
    ]

    def script(body: dict[str, Any], index: int) -> Reply:
        seeds = [prompts.textbook(RECIPE, 0, i, max_tokens=800, temperature=0.8).request.seed for i in range(6)]
        return completion(answers[seeds.index(body["seed"])])

    server.script = script
    made = synthesize.run(config(tmp_path, server, "textbooks", 6))
    # The last was cut back to its last whole paragraph.
    assert made.column("content") == [SECTION + "\n", longer + "\n"]
    assert [failure["reason"].split(":")[0] for failure in made.failures()] == [
        "too short",
        "no code block that parses",
        "repeats itself",
        "no code block",
    ]
    row = next(made.read())
    assert row["topic"] in RECIPE.topics and row["audience"] in RECIPE.audiences and row["source"] == "llm:fake-1"


def test_loops_spares_ordinary_text() -> None:
    assert not loops(SECTION) and not loops(pathlib.Path(synthesize.__file__).read_text())
    assert loops("The loop is a loop. " * 60) and loops("x = 1 and more\n" * 30)
    with pytest.raises(Unusable, match="too short"):
        read_textbook("```python\nx = 1\n```")


def test_offline_exercises_in_two_splits(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesize, "_OFFLINE_SHARD", 20)
    monkeypatch.setattr(teacher, "BATCH", 32)

    def make(split: Any, folder: str, **options: Any) -> Dataset:
        return synthesize.run(
            Config(
                kind="exercises",
                teacher="offline",
                split=split,
                count=50,
                workers=1,
                output=tmp_path / folder,
                **options,
            )
        )

    train, held = make("train", "train"), make("held-out", "held")
    assert train.rows == held.rows == 50 and len(train.shards) == 3
    assert teacher.overlaps(train.read(), held.read()) == {"names": 0, "constants": 0, "compositions": 0, "prompts": 0}
    for row in train.read():
        assert row["source"] == row["model"] == "offline-teacher" and row["content"] == row["prompt"] + row["solution"]
    assert any(name.startswith("dropped: ") for name in train.counters)
    problems = exercises.load(held.folder)
    assert len(problems) == 50 and {problem.group for problem in problems} == {"one step", "two steps"}
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
