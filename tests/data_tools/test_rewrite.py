"""Rewriting: what each step keeps, what an answer may be, and that nothing is paid twice."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_batches import FakeBatches, answered
from fake_openai import FakeServer, completion

from data_tools import batch, rewrite
from data_tools.chat import Answer, RequestFailed
from data_tools.dataset import Dataset
from data_tools.prompts import PROMPTS
from data_tools.python_text import programs
from data_tools.rewrite import Config, lint_scores, usable
from phi1.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_POLL", (0.01, 0.02))


Make = Callable[..., Dataset]


def program(name: str) -> str:
    return f'"""About {name}."""\n\n\ndef {name}(n):\n    """Return n + 1."""\n    return n + 1\n'


def better(code: str, mark: str) -> str:
    return f"Here it is:\n\n```python\n# {mark}\n{code.strip()}\n```\nI hope that this helps."


def step_of(body: dict[str, Any]) -> str:
    system = body["messages"][0]["content"]
    return next(step for step, name in rewrite.STEPS.items() if PROMPTS[name].system == system)


def code_of(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"].removeprefix("```python\n").removesuffix("\n```")


def obedient(body: dict[str, Any], index: int) -> Any:
    return completion(better(code_of(body), step_of(body)), prompt=50, generated=20)


def config(documents: Dataset, server: FakeServer | FakeBatches, **options: Any) -> Config:
    output = documents.folder.parent / "rewritten"
    return Config(input=documents.folder, output=output, base_url=server.base_url, model="fake-1", **options)


BAD_LINT = "import os, sys\nfrom math import *\nx=undefined\ny=undefined_2\n"


def test_each_step_is_counted_and_a_row_says_where_it_came_from(server: FakeServer, make_documents: Make) -> None:
    def script(body: dict[str, Any], index: int) -> Any:
        code, step = code_of(body), step_of(body)
        if "def style_fails" in code:
            return completion("I cannot do that.")
        if "def ending_fails" in code and step == "self-contained":
            return completion(better("x = 1", step))
        return obedient(body, index)

    server.script = script
    texts = [program(name) for name in ("good", "other", "style_fails", "ending_fails")]
    documents = make_documents([*texts, "print 'Python 2'\n", BAD_LINT, "x = 1\n" * 5000], shards=2)
    made = rewrite.run(config(documents, server))
    rows = {row["content"].split("def ")[1].split("(")[0]: row for row in made.read()}
    assert rows.keys() == {"good", "other"}
    left = {key: value for key, value in made.counters.items() if key.startswith(("left", "dropped", "read"))}
    assert left == {
        "read": 7,
        "dropped_long": 1,
        "left_after_compile": 5,
        "dropped_lint": 1,
        "left_after_lint": 4,
        "left_after_style": 3,
        "left_after_self-contained": 2,
    }
    reasons = sorted(failure["reason"] for failure in made.failures())
    assert [reason.partition(" (line")[0] for reason in reasons] == [
        "compile: Missing parentheses in call to 'print'. Did you mean print(...)?",
        "self-contained: the rewrite lost endingfails",
        "style: the rewrite does not parse: invalid syntax",
    ]
    row, original = rows["good"], next(row for row in documents.read() if "def good" in row["content"])
    assert row["content"] == "# self-contained\n# style\n" + program("good") and row["size"] == len(row["content"])
    assert row["rewritten_from"] == original["hexsha"] != row["hexsha"] and row["source"] == "test"
    assert row["model"] == "fake-1" and json.loads(row["sampling"]) == {"max_tokens": 4096, "temperature": 0.0}
    style = rewrite.request_for("style", program("good"), program("good"), config(documents, server))
    assert row["prompt_hashes"][0] == style.prompt_hash and len(row["prompt_hashes"]) == 2
    assert row["lint"] == row["rewritten_lint"] == 10.0


def answer(text: str, **facts: Any) -> Answer:
    values = {"value": None, "logprobs": {}, "model": "m", "prompt_tokens": 1, "completion_tokens": 1} | facts
    return Answer(**({"text": text, "truncated": False, "paid": True} | values))


GOOD = "def f(n):\n    return n + 1\n"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```python\n{GOOD}```",
        f"```python\r\n{GOOD.replace(chr(10), chr(13) + chr(10))}```\r\n",
        f"Sure!\n\n```Python3\n{GOOD}\n```\nIt adds one.",
        f"~~~py\n{GOOD}~~~",
        f'```python title="f.py"\n{GOOD}```',
        f"``` python\n{GOOD}",  # the last fence is missing
        f"<think>Maybe ```python\ndef g(): pass\n``` will do</think>\n```python\n{GOOD}```",
        f"```\n{GOOD}```\n\nUse it so:\n\n```bash\npython f.py\n```",
        f"Before:\n\n```python\ndef g(): return 'something that is longer than the other "
        f"one'\n```\nAfter:\n```python\n{GOOD}```",
        "1. So:\n\n   ```python\n   def f(n):\n       return n + 1\n   ```",
        f"\ufeff```{{.python}}\n{GOOD}```",
    ],
)
def test_a_rewrite_is_found_in_whatever_stands_around_it(text: str) -> None:
    assert usable(answer(text), GOOD) == GOOD


def test_a_program_with_fences_in_its_docstring_is_whole() -> None:
    code = 'def f(n):\n    """Add one.\n\n```\nf(1)\n```\n    """\n    return n + 1\n'
    assert usable(answer(f"```python\n{code}```"), GOOD) == code


def test_a_name_may_be_spelled_in_better_style_and_private_ones_may_go() -> None:
    old = "class my_thing: pass\ndef getValue(): pass\ndef _helper(): pass\n"
    new = "class MyThing:\n    pass\n\n\ndef get_value():\n    pass\n"
    assert usable(answer(new), old) == new


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no code"),
        ("   \n", "holds no code"),
        ("```python\n```", "holds no code"),
        ("```python\n# nothing to improve\n```", "does not parse: it is empty"),
        ("I'm sorry, I can't help with that.", "does not parse: "),
        ("Yes", "lost f"),
        ("```python\ndef f(n:\n```", r"does not parse: .*line 1"),
        ("```python\ndef g(n):\n    return n + 1\n```", "lost f"),
        ("```diff\n- def f(n):\n+ def f(n: int):\n```", "does not parse"),
        ("x = " + "(" * 3000, "does not parse"),
    ],
)
def test_what_is_no_rewrite_says_why(text: str, reason: str) -> None:
    with pytest.raises(RequestFailed, match=reason):
        usable(answer(text), GOOD)


def test_an_answer_that_was_cut_is_none() -> None:
    with pytest.raises(RequestFailed, match="cut at --max-tokens"):
        usable(answer(GOOD, truncated=True), GOOD)
    with pytest.raises(RequestFailed, match="holds no code"):  # of a program without functions, a docstring is left
        usable(answer('"""Done."""'), "print(1)\n")


def test_answers_without_a_fence_are_taken_whole() -> None:
    assert programs("a\nb") == ["a\nb"] and programs("```\na\n```") == ["a"]


def test_the_lint_score_is_pylints_formula() -> None:
    clean = '"""Doc."""\n\nA = 1\nB = 2\n'  # three statements, with the docstring
    scores = lint_scores([clean, clean + "C = missing\n", clean + "import os\n", clean + "import os  # noqa\n"])
    # An undefined name is an error, 5; an unused import that does not stand at the top is two messages.
    assert scores == [10.0, 10 - 10 * 5 / 4, 10 - 10 * 2 / 4, 10 - 10 * 2 / 4]
    assert lint_scores([]) == []


def test_a_stopped_run_goes_on_and_pays_for_nothing_twice(server: FakeServer, make_documents: Make) -> None:
    server.script = obedient
    documents = make_documents([program(f"f{i}") for i in range(12)], shards=3)
    settings = config(documents, server, concurrency=1, max_tokens=100)
    bound = len(json.dumps(rewrite.request_for("style", program("f0"), program("f0"), settings).body("fake-1"))) + 300
    with pytest.raises(UserError, match="budget"):
        rewrite.run(dataclasses.replace(settings, budget_tokens=70 * 9 + bound))
    asked = len(server.bodies)
    assert 0 < asked < 24
    made = rewrite.run(settings)
    assert made.rows == 12 and len(server.bodies) == 24
    assert rewrite.run(settings).hash == made.hash and len(server.bodies) == 24


def test_what_failed_can_be_asked_again(server: FakeServer, make_documents: Make) -> None:
    server.script = lambda body, index: completion("no") if "f3" in code_of(body) else obedient(body, index)
    settings = config(make_documents([program(f"f{i}") for i in range(6)], shards=2), server)
    first = rewrite.run(settings)
    assert first.rows == 5 and [failure["reason"] for failure in first.failures()] == ["style: the rewrite lost f3"]
    server.script = obedient
    assert rewrite.run(settings).hash == first.hash
    asked = len(server.bodies)
    assert rewrite.run(dataclasses.replace(settings, retry_failed=True)).rows == 6
    assert len(server.bodies) == asked + 2


def test_a_batch_takes_what_all_shards_ask(make_documents: Make) -> None:
    batches = FakeBatches()
    batches.script = lambda key, body, number: answered(key, obedient(body, 0)[2])
    documents = make_documents([program(f"f{i}") for i in range(6)], shards=3)
    made = rewrite.run(config(documents, batches, batch=True))
    batches.close()
    assert made.rows == 6 and [len(sent) for sent in batches.sent] == [6, 6]
    assert made.counters["requests"] == 12 and made.counters["prompt_tokens"] == 600


def test_options_that_do_not_fit_are_told(server: FakeServer, make_documents: Make) -> None:
    documents = make_documents([program("f")])
    for options, told in (({"min_lint": 11.0}, "--min-lint 11"), ({"max_tokens": 0}, "--max-tokens")):
        with pytest.raises(UserError, match=told):
            rewrite.run(config(documents, server, **options))
