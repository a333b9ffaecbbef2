"""Annotation: the real small model end to end, and the rules of sample, excerpt, score and label."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from fake_openai import FakeServer, completion

from data_tools import annotate
from data_tools.annotate import Config, excerpt, log_odds
from data_tools.chat import RequestFailed
from data_tools.dataset import Dataset
from phi1 import cli
from phi1.errors import UserError

Make = Callable[..., Dataset]
TEACHING = '''def factorial(n):
    """Return n! = 1 * 2 * ... * n.

    >>> factorial(4)
    24
    """
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result
'''
DULL = '_REG = {0x01: _a.H, 0x02: _a.K, 0x07: _a.Q}\n__all__ = ["_REG"]\n'


def config(documents: Dataset, server: FakeServer | None, **options: Any) -> Config:
    where = {} if server is None else {"base_url": server.base_url, "model": "fake-1"}
    output = documents.folder.parent / "annotations"
    return Config(input=documents.folder, output=output, llm_threads=1, **(where | options))


def test_the_embedded_model_prefers_what_teaches(make_documents: Make) -> None:
    documents = make_documents([TEACHING, DULL])
    dataset = annotate.run(config(documents, None, samples=2, positive_fraction=0.5))
    rows = {row["content"]: row for row in dataset.read()}
    assert rows.keys() == {TEACHING.rstrip(), DULL.rstrip()}
    assert rows[TEACHING.rstrip()]["score"] > rows[DULL.rstrip()]["score"] + 0.3
    assert (rows[TEACHING.rstrip()]["label"], rows[DULL.rstrip()]["label"]) == (1, 0)
    assert {row["model"] for row in rows.values()} == {"SmolLM2-135M-Instruct"}
    assert all(len(row["prompt_hash"]) == 64 and row["source"] == "test" for row in rows.values())


def by_number(body: dict[str, Any], index: int) -> Any:
    """Document "x = 7" gets log-odds 7."""
    number = float(body["messages"][-1]["content"].split("x = ")[1].split("\n")[0])
    return completion("yes", logprobs={"yes": number - 100, "no": -100.0})


def test_the_best_fraction_is_labelled_and_rows_stand_in_the_order_of_the_sample(
    server: FakeServer, make_documents: Make
) -> None:
    server.script = by_number
    documents = make_documents([f"x = {i}\n" for i in range(40)], shards=3)
    dataset = annotate.run(config(documents, server, samples=20, positive_fraction=0.25))
    rows = list(dataset.read())
    assert [row["hexsha"] for row in rows] == annotate.sample(documents, 20, 0)
    best = sorted(rows, key=lambda row: -row["score"])[:5]
    assert [row["label"] for row in rows] == [int(row in best) for row in rows]
    assert all(row["score"] == pytest.approx(float(row["content"][4:])) for row in rows)


def test_a_larger_sample_holds_the_smaller_and_a_seed_draws_another(make_documents: Make) -> None:
    documents = make_documents([f"x = {i}\n" for i in range(100)], shards=2)
    ten = annotate.sample(documents, 10, 0)
    assert annotate.sample(documents, 30, 0)[:10] == ten
    assert set(annotate.sample(documents, 10, 1)) != set(ten)
    assert ten != sorted(ten)  # not simply the lowest keys, by which ingest may have chosen


def test_ties_that_pass_the_fraction_are_told(
    server: FakeServer, make_documents: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(body: dict[str, Any], index: int) -> Any:
        last = "x = 1\n" in body["messages"][-1]["content"] + "\n"
        return completion(f'{{"reasoning": "r", "rating": {2 if last else 5}}}')

    server.script = script
    documents = make_documents([f"x = {i}\n" for i in range(60)])
    settings = config(documents, server, mode="rating")
    assert sum(annotate.run(settings).column("label")) == 59
    told = "59 of 60 documents got label 1, not 0.3 of them (--positive-fraction), as many tie at a score of 5; set a"
    assert told in capsys.readouterr().err
    chosen = dataclasses.replace(settings, threshold=5.0, output=settings.output.with_name("chosen"))
    assert sum(annotate.run(chosen).column("label")) == 59 and "warning" not in capsys.readouterr().err


def test_one_class_warns(server: FakeServer, make_documents: Make, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = by_number
    annotate.run(config(make_documents(["x = 1\n", "x = 2\n"]), server, threshold=9.0))
    assert "all 2 documents got label 0" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_and_pays_for_nothing_twice(server: FakeServer, make_documents: Make) -> None:
    server.script = by_number
    documents = make_documents([f"x = {i}\n" for i in range(30)])
    stopped = config(documents, server, budget_tokens=40_000, concurrency=1)
    body = annotate.request_for("x = 1", stopped).body("fake-1")
    bound = len(str(body))
    stopped = dataclasses.replace(stopped, budget_tokens=bound + 11 * 12)  # room for about twelve answers
    with pytest.raises(UserError, match="budget"):
        annotate.run(stopped)
    asked = len(server.bodies)
    assert 0 < asked < 30
    with pytest.raises(UserError, match="interrupted"):
        Dataset(stopped.output)
    dataset = annotate.run(dataclasses.replace(stopped, budget_tokens=None))
    assert dataset.rows == 30 and len(server.bodies) == 30


@pytest.mark.parametrize(
    "refusal",
    [
        (402, {}, {"error": {"message": "Insufficient Balance"}}),
        (400, {}, {"error": {"message": "Your credit balance is too low to access the API."}}),
        (400, {}, {"error": {"message": "Unsupported value: 'temperature' does not support 0 with this model."}}),
    ],
)
def test_an_empty_account_seals_nothing_and_the_run_goes_on_when_it_is_filled(
    refusal: Any, server: FakeServer, make_documents: Make
) -> None:
    server.script = lambda body, index: by_number(body, index) if index < 10 else refusal
    settings = config(make_documents([f"x = {i}\n" for i in range(40)]), server, concurrency=2)
    with pytest.raises(UserError, match="to go on"):
        annotate.run(settings)
    with pytest.raises(UserError, match="interrupted"):
        Dataset(settings.output)
    refused = len(server.bodies)
    server.script = by_number
    assert annotate.run(settings).rows == 40 and len(server.bodies) == refused + 30


def test_what_failed_can_be_asked_again(server: FakeServer, make_documents: Make) -> None:
    def script(body: dict[str, Any], index: int) -> Any:
        text = body["messages"][-1]["content"]
        if "x = 3\n" in text:
            return 403, {}, {"error": {"message": "forbidden"}}
        return completion("?", logprobs={"Hm": -1.0}) if "x = 4\n" in text else by_number(body, index)

    server.script = script
    settings = config(make_documents([f"x = {i}\n" for i in range(8)]), server, concurrency=2)
    first = annotate.run(settings)
    assert first.rows == 6 and len(first.failures()) == 2
    server.script = by_number
    assert annotate.run(settings).hash == first.hash
    asked = len(server.bodies)
    assert annotate.run(dataclasses.replace(settings, retry_failed=True)).rows == 8
    assert len(server.bodies) == asked + 2
    assert annotate.run(dataclasses.replace(settings, retry_failed=True)).rows == 8 and len(server.bodies) == asked + 2


def test_a_changed_question_refuses_the_folder(server: FakeServer, make_documents: Make) -> None:
    server.script = by_number
    first = config(make_documents(["x = 1\n", "x = 2\n"]), server)
    annotate.run(first)
    assert annotate.run(first).rows == 2 and len(server.bodies) == 2
    with pytest.raises(UserError, match=r"other settings .*config\.characters"):
        annotate.run(dataclasses.replace(first, characters=7))
    assert annotate.run(dataclasses.replace(first, timeout=5.0)).rows == 2  # cannot change the result


def test_ratings_carry_their_reasoning_and_bad_ones_go_to_the_failures(
    server: FakeServer, make_documents: Make
) -> None:
    replies = {"x = 1": '{"reasoning": "clear\\ud800", "rating": 8}', "x = 2": '{"reasoning": "dull", "rating": 2}'}
    replies |= {"x = 3": '{"reasoning": "?", "rating": 11}', "x = 4": "I would say seven"}

    def script(body: dict[str, Any], index: int) -> Any:
        return completion(next(v for k, v in replies.items() if k in body["messages"][-1]["content"]))

    server.script = script
    documents = make_documents([f"{key}\n" for key in replies])
    dataset = annotate.run(config(documents, server, mode="rating", positive_fraction=0.5))
    rows = {row["content"]: (row["score"], row["label"], row["reasoning"]) for row in dataset.read()}
    assert rows == {"x = 1": (8.0, 1, "clear\ufffd"), "x = 2": (2.0, 0, "dull")}
    assert sorted(failure["reason"][:20] for failure in dataset.failures()) == [
        "no rating from 0 to ",
        "the answer is not JS",
    ]
    assert server.bodies[0]["response_format"]["type"] == "json_schema"


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (None, "no server answers there"),
        ((401, {}, {"error": {"message": "Incorrect API key"}}), "the key in OPENAI_API_KEY is refused"),
        ((404, {}, {"error": {"message": "no such model"}}), "it serves: fake-1"),
        (completion("yes"), "without logprobs; it gives no logprobs: use --mode rating"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong_and_can_be_run_again(
    reply: Any, told: str, server: FakeServer, make_documents: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = make_documents(["x = 1\n", "x = 2\n"])
    output = documents.folder.parent / "annotations"
    words = ["data", "annotate", "--input", str(documents.folder), "--output", str(output), "--model", "fake-1"]
    server.script = lambda body, index: reply
    url = "http://127.0.0.1:9/v1" if reply is None else server.base_url
    assert cli.main([*words, "--base-url", url]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("phi1: error: ") and told in said[0]
    server.script = by_number
    assert cli.main([*words, "--base-url", server.base_url]) == 0
    assert Dataset(output).rows == 2


def test_a_corrupt_shard_of_documents_is_told(server: FakeServer, make_documents: Make) -> None:
    documents = make_documents(["x = 1\n", "x = 2\n"])
    path = documents.folder / "00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"00000\.parquet: corrupt shard"):
        annotate.run(config(documents, server))
    assert not server.bodies


def test_excerpts_end_with_a_line() -> None:
    assert excerpt("x = 1\ny = 2\n", 100) == "x = 1\ny = 2"
    assert excerpt("x = 1\ny = 2\n", 8) == "x = 1"
    assert excerpt("x = 1\ny = 2\n", 5) == "x = 1"
    assert excerpt("a" * 50, 10) == "a" * 10


CODE = "@cache\ndef f(x):\n    return x"


@pytest.mark.parametrize(
    "head",
    [
        "# Copyright\n#\n\n",
        '"""What it is.\n\nimport this\n"""\n',
        "#!/usr/bin/python\n'''One line.'''\n\n",
        '"One line."\n',
        "import os\nimport sys as system, re  # why\n",
        "from .a.b import (\n    c,\n    d,\n)\nfrom x import *\n",
        "from a import b, \\\n    c\n",
        '__all__ = ["f",\n           "g"]\n__version__: str = "1.0"\n',
        "if TYPE_CHECKING:\n    from a import b\n\n    from c import d\n",
        "if typing.TYPE_CHECKING:  # types\n    import a\nelse:\n    a = None\n\n",
        "try:\n    import a\nexcept ImportError:\n    a = None\n\n",
        '# c\n"""Doc."""\n\nfrom __future__ import annotations\n\n# d\nimport a\n\n__all__ = ()\n\n\n',
    ],
)
def test_excerpts_begin_with_code(head: str) -> None:
    assert excerpt(f"{head}{CODE}\n", 100) == CODE


@pytest.mark.parametrize(
    "text",
    [
        "import_path = 1\nfrom_here = 2",
        "try:\n    x = 1\nexcept ValueError:\n    pass",
        "if TYPE:\n    x = 1",
        "print('''a\n''')",
        "from the beginning of the book on, words",
        '"""never closed\nx = 1',
    ],
)
def test_what_only_looks_like_a_head_stays(text: str) -> None:
    assert excerpt(f"{text}\n", 200) == text


def test_a_file_that_is_all_head_is_shown_from_after_its_licence() -> None:
    assert excerpt("# Copyright\n\nimport os\nimport sys\n", 100) == "import os\nimport sys"
    assert excerpt("# only a comment\n", 100) == "# only a comment"


def test_log_odds_sum_spellings_and_bound_what_is_not_there() -> None:
    both = {"yes": math.log(0.3), " Yes": math.log(0.1), "no": math.log(0.2), "maybe": math.log(0.05)}
    assert log_odds(both) == pytest.approx(math.log(0.4 / 0.2))
    assert log_odds({"yes": -0.1, "The": -6.0}) == pytest.approx(-0.1 + 6.0)
    assert log_odds({"no": -0.1, "The": -6.0}) == pytest.approx(-6.0 + 0.1)
    assert log_odds({"yes": -5000.0, "no": -5002.0}) == pytest.approx(2.0)  # their probabilities are 0 in float64
    with pytest.raises(RequestFailed, match="neither yes nor no"):
        log_odds({"The": -0.1})
