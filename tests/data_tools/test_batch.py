"""The Batch API: whatever the server does and wherever the client is killed, nothing is submitted twice and the budget
holds.
"""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from asking import client, request
from fake_batches import FakeBatches, answered, chat, not_run

from data_tools import annotate, batch, llm, synthesize
from data_tools.chat import Answer, RequestFailed
from data_tools.llm import LLM, LLMConfig
from phi1.errors import UserError

PRICES = {"usd_per_million_input": 1000.0, "usd_per_million_output": 1000.0}  # a token is a thousandth of a dollar


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_POLL", (0.01, 0.02))
    monkeypatch.setattr(batch, "_BACKOFF", (0.01, 0.02))


@pytest.fixture
def batches() -> Iterator[FakeBatches]:
    fake = FakeBatches()
    yield fake
    fake.close()


@pytest.fixture
def half_price(tmp_path: pathlib.Path, batches: FakeBatches) -> dict[str, Any]:
    """Options: a token costs a thousandth of a dollar, half of that in a batch."""
    path = tmp_path / "prices.toml"
    path.write_text(f'["{batches.base_url}"]\nbatch = 0.5\n')
    return {"prices": path, **PRICES}


def texts(llm: LLM, count: int) -> list[str]:
    """What `count` requests get, failures as "! reason"."""
    answers = llm.ask_all([request(str(i)) for i in range(count)])
    return [answer.text if isinstance(answer, Answer) else f"! {answer}" for answer in answers]


def number(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"])


def echo(key: str, body: dict[str, Any], _: int) -> Any:
    return answered(key, chat(str(number(body))))


def test_answers_are_what_they_are_online_at_the_price_of_a_batch(
    batches: FakeBatches, tmp_path: pathlib.Path, half_price: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    batches.script = echo
    batches.extra_lines = [json.dumps(answered("nobody's", chat("?"))), "no JSON"]
    with client(batches, tmp_path, batch=True, **half_price) as llm:
        assert texts(llm, 30) == [str(i) for i in range(30)]
        assert llm.ledger.spent() == (30 * 11, pytest.approx(30 * 11 * 0.0005))
        assert llm.used == {
            "requests": 30,
            "prompt_tokens": 300,
            "completion_tokens": 30,
            "usd_billionths": 165_000_000,
        }
    said = capsys.readouterr().err
    assert "batch-0: 30 requests submitted; Ctrl-C is safe" in said and "2 lines that answer nothing" in said
    assert len(batches.batches) == 1
    sent = next(iter(batches.sent[0].values()))
    assert sent == {
        "model": "fake-1",
        "messages": [{"role": "user", "content": "0"}],
        "max_tokens": 5,
        "temperature": 0.0,
    }
    # The ledger is the same one: a run without --batch has all answers already.
    with client(batches, tmp_path) as llm:
        assert texts(llm, 30) == [str(i) for i in range(30)]


def test_a_stage_in_a_batch_makes_the_same_dataset(batches: FakeBatches, make_documents: Any) -> None:
    def script(key: str, body: dict[str, Any], _: int) -> Any:
        value = float(body["messages"][-1]["content"].split("x = ")[1].split("\n")[0])
        return answered(key, chat("yes", logprobs={"yes": value - 100, "no": -100.0}))

    batches.script = script
    documents = make_documents([f"x = {i}\n" for i in range(12)])
    config = annotate.Config(
        input=documents.folder,
        output=documents.folder.parent / "annotated",
        base_url=batches.base_url,
        model="fake-1",
        batch=True,
    )
    made = annotate.run(config)
    assert {row["content"]: row["score"] for row in made.read()} == {f"x = {i}": pytest.approx(i) for i in range(12)}
    assert made.counters["prompt_tokens"] == 120 and made.counters["requests"] == 12 and len(batches.batches) == 1


def test_all_shards_of_a_synthesis_are_one_batch(
    batches: FakeBatches, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesize, "_LLM_SHARD", 2)
    flagged = {"error": {"message": "flagged", "code": "content_filter"}}
    batches.script = lambda key, body, n: (
        answered(key, flagged, 400) if body["seed"] % 2 else answered(key, chat("short"))
    )
    config = synthesize.Config(
        kind="textbooks",
        output=tmp_path / "books",
        count=9,
        base_url=batches.base_url,
        model="fake-1",
        batch=True,
        max_failed=1.0,
    )
    with pytest.raises(UserError, match="asks everything beforehand"):
        synthesize.run(config)
    made = synthesize.run(dataclasses.replace(config, adapt=False))
    # What failed is not asked again by its shard.
    assert len(made.shards) == 5 and [len(sent) for sent in batches.sent] == [9]
    assert 0 < made.counters["requests"] == len(batches.billed) < 9 == made.counters["failures"]


@pytest.mark.parametrize(
    ("hook", "refuse"),
    [
        (("upload", 500), None),  # it was stored, but the client cannot know
        (("create", "cut"), None),
        (("create", 500), None),
        (("look", 503), None),
        (("content", "cut"), None),
        (None, ("upload", 429)),
        (None, ("create", "cut")),
        (None, ("create", 500)),
        (None, ("list", "cut")),
        (None, ("look", "cut")),
        (None, ("content", 502)),
    ],
)
def test_one_batch_whatever_breaks(hook: Any, refuse: Any, batches: FakeBatches, tmp_path: pathlib.Path) -> None:
    batches.script = echo
    if hook:
        batches.hook = lambda what, number: hook[1] if what == hook[0] and number <= 2 else None
    if refuse:
        batches.refuse = lambda what, number: refuse[1] if what == refuse[0] and number <= 2 else None
        if refuse[0] == "list":
            batches.hook = lambda what, number: "cut" if what == "create" and number == 1 else None
    with client(batches, tmp_path, batch=True) as llm:
        assert texts(llm, 8) == [str(i) for i in range(8)]
    assert len(batches.batches) == 1 and set(batches.billed.values()) == {1}


def test_a_server_that_stays_away_is_told_and_waited_for_later(batches: FakeBatches, tmp_path: pathlib.Path) -> None:
    batches.script, batches.refuse = echo, lambda what, number: 503 if what == "look" else None
    told = r"waiting for batch-0: HTTP 503.*--patience 0.05 s.*again to go on"
    with client(batches, tmp_path, batch=True, patience=0.05) as llm, pytest.raises(UserError, match=told):
        texts(llm, 5)
    # Without --batch nothing is paid twice either.
    with client(batches, tmp_path) as llm, pytest.raises(UserError, match=r"was asked in a batch.*--batch"):
        texts(llm, 5)
    batches.refuse = lambda what, number: None
    with client(batches, tmp_path, batch=True) as llm:
        assert texts(llm, 5) == ["0", "1", "2", "3", "4"]
    assert len(batches.batches) == 1


def test_what_a_batch_leaves_is_asked_in_the_next_one(batches: FakeBatches, tmp_path: pathlib.Path) -> None:
    batches.script = lambda key, body, n: echo(key, body, n) if number(body) % 3 <= n else not_run(key)
    batches.ends = lambda number: "expired" if number == 0 else "cancelled" if number == 1 else "completed"
    with client(batches, tmp_path, batch=True) as llm:
        assert texts(llm, 9) == [str(i) for i in range(9)]
        assert llm.ledger.spent()[0] == 9 * 11  # what did not run is not counted
    assert [len(sent) for sent in batches.sent] == [9, 6, 3] and set(batches.billed.values()) == {1}


def test_a_batch_that_answers_nothing_stops_and_goes_on_when_run_again(
    batches: FakeBatches, tmp_path: pathlib.Path
) -> None:
    batches.script, batches.ends = (lambda key, body, n: not_run(key)), (lambda number: "expired")
    with client(batches, tmp_path, batch=True) as llm, pytest.raises(UserError, match="batch-0 expired: nothing in it"):
        texts(llm, 4)
    batches.script, batches.ends = echo, lambda number: "completed"
    with client(batches, tmp_path, batch=True) as llm:
        assert texts(llm, 4) == ["0", "1", "2", "3"] and llm.ledger.spent()[0] == 44


def test_lines_of_every_kind(batches: FakeBatches, tmp_path: pathlib.Path) -> None:
    def script(key: str, body: dict[str, Any], n: int) -> Any:
        error = {"message": "flagged", "code": "content_filter"}
        return {
            0: answered(key, {"error": error}, 400),
            1: answered(key, {"error": {"message": "oops"}}, 500),
            2: answered(key, "<html>"),
            3: {"id": "r", "custom_id": key, "response": None, "error": {"code": "odd", "message": "odd"}},
            4: None,
            5: answered(key, chat("x") | {"choices": [{"message": None}]}),
            6: {"id": "r", "custom_id": key, "response": None, "error": None},
        }.get(number(body), echo(key, body, n))

    batches.script = script
    with client(batches, tmp_path, batch=True, max_failed=1.0) as llm:
        got = texts(llm, 9)
        spent = llm.ledger.spent()[0]
    assert got[7:] == ["7", "8"] and all(text.startswith("! ") for text in got[:7])
    reasons = ["flagged", "oops (3 b", "no chat completion", "odd", "without a word on it", "no message", "null (3 b"]
    assert all(reason in text for reason, text in zip(reasons, got, strict=False)), got
    assert [len(sent) for sent in batches.sent] == [9, 5, 5]
    bound = len(json.dumps(request("2").body("fake-1"), sort_keys=True)) + 64 + 5
    # Four of them may have been billed in each of three batches, and count at their bound; a refusal is not billed.
    assert spent == 3 * 11 + 4 * 3 * bound


def test_a_parameter_that_is_called_otherwise(batches: FakeBatches, tmp_path: pathlib.Path) -> None:
    wrong = {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}}
    batches.script = lambda key, body, n: answered(key, wrong, 400) if "max_tokens" in body else echo(key, body, n)
    with client(batches, tmp_path, batch=True) as llm:
        assert texts(llm, 3) == ["0", "1", "2"]
    assert len(batches.batches) == 2


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}, 429, "out of money"),
        ({"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}, 401, "OPENAI_API_KEY"),
        ({"error": {"message": "The model `fake-1` does not exist"}}, 404, "--model"),
    ],
)
def test_what_fails_for_everyone_stops_and_can_be_gone_on_with(
    body: Any, status: int, told: str, batches: FakeBatches, tmp_path: pathlib.Path
) -> None:
    batches.script = lambda key, sent, n: answered(key, body, status)
    with client(batches, tmp_path, batch=True) as llm:
        with pytest.raises(UserError, match=f"{told}.*again to go on"):
            texts(llm, 4)
        assert llm.ledger.spent() == (0, 0.0)
    batches.script = echo
    with client(batches, tmp_path, batch=True) as llm:
        assert texts(llm, 4) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("what", ["upload", "create", "look"])
def test_a_server_that_refuses_batches_is_told(what: str, batches: FakeBatches, tmp_path: pathlib.Path) -> None:
    batches.refuse = lambda asked, number: 404 if asked == what else None
    with client(batches, tmp_path, batch=True) as llm:
        with pytest.raises(UserError, match="HTTP 404; a server without batches is asked without --batch"):
            texts(llm, 2)
        assert (llm.ledger.spent()[0] == 0) == (what != "look")


def test_a_full_queue_takes_smaller_batches(batches: FakeBatches, tmp_path: pathlib.Path) -> None:
    batches.script = echo
    batches.ends = lambda number: "failed" if len(batches.sent[number]) > 3 else "completed"
    batches.errors = lambda lines: [
        {"code": "token_limit_exceeded", "message": "Enqueued token limit reached", "line": None}
    ]
    with client(batches, tmp_path, batch=True) as llm:
        assert texts(llm, 8) == [str(i) for i in range(8)]
        assert llm.ledger.spent()[0] == 88
    assert [len(sent) for sent in batches.sent] == [8, 4, 2, 2, 2, 2]


def test_a_batch_that_is_refused_whole_is_told(batches: FakeBatches, tmp_path: pathlib.Path) -> None:
    batches.ends = lambda number: "failed"
    batches.errors = lambda lines: [{"code": "model_not_found", "message": "no such model", "line": 1}]
    with client(batches, tmp_path, batch=True) as llm:
        with pytest.raises(UserError, match=r"batch-0 was refused: no such model \(line 1\)"):
            texts(llm, 2)
        assert llm.ledger.spent() == (0, 0.0)


def test_the_limits_of_a_file_make_several_batches(
    batches: FakeBatches, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches.script = echo
    monkeypatch.setattr(batch, "MAX_REQUESTS", 7)
    with client(batches, tmp_path, batch=True) as llm:
        assert texts(llm, 20) == [str(i) for i in range(20)]
    assert [len(sent) for sent in batches.sent] == [7, 7, 6]
    monkeypatch.setattr(batch, "MAX_REQUESTS", 100)
    monkeypatch.setattr(batch, "MAX_BYTES", 1000)
    with client(batches, tmp_path, batch=True) as llm:
        assert texts(llm, 30) == [str(i) for i in range(30)]
    assert sum(map(len, batches.sent)) == 30 and len(batches.sent) > 4
    assert all(len(data) <= 1000 for name, data in batches.files.items() if name in ("file-3", "file-4"))


def test_the_budget_is_never_passed_and_used(
    batches: FakeBatches, tmp_path: pathlib.Path, half_price: dict[str, Any]
) -> None:
    batches.script = lambda key, body, n: answered(key, chat(str(number(body)), prompt=50, generated=5))
    bound = len(json.dumps(request("10").body("fake-1"), sort_keys=True)) + 64 + 5  # of which 55 are billed
    budget = 10 * bound * 0.0005
    with client(batches, tmp_path, batch=True, budget_usd=budget, **half_price) as llm:
        with pytest.raises(UserError, match=r"budget.*--budget-usd"):
            texts(llm, 60)
        assert llm.ledger.spent()[1] <= budget
        assert llm.ledger.spent() == (sum(batches.billed.values()) * 55, pytest.approx(batches.tokens * 0.0005))
    assert [len(sent) for sent in batches.sent] == [10, 6]  # then less than a tenth of the rest had room
    with client(batches, tmp_path, batch=True, budget_usd=0.0001, **half_price) as llm:
        before = len(batches.batches)
        with pytest.raises(UserError, match="budget"):
            texts(llm, 60)
        assert len(batches.batches) == before  # refused before anything was sent
    with client(batches, tmp_path, batch=True, **half_price) as llm:
        assert texts(llm, 60) == [str(i) for i in range(60)]
    assert set(batches.billed.values()) == {1}


def test_ctrl_c_while_waiting_loses_nothing(batches: FakeBatches, tmp_path: pathlib.Path) -> None:
    batches.script = echo
    batches.hook = lambda what, number: os.kill(os.getpid(), signal.SIGINT) if what == "look" and number == 2 else None
    with pytest.raises(KeyboardInterrupt), client(batches, tmp_path, batch=True) as llm:
        texts(llm, 6)
    with client(batches, tmp_path, batch=True) as llm:
        assert texts(llm, 6) == [str(i) for i in range(6)] and llm.ledger.spent()[0] == 66
    assert len(batches.batches) == 1


@pytest.mark.parametrize("moment", ["upload", "create", "look", "content"])
def test_killed_at_any_moment_it_is_the_same_batch(moment: str, batches: FakeBatches, tmp_path: pathlib.Path) -> None:
    batches.script = echo
    process: subprocess.Popen[bytes] | None = None

    def kill(what: str, number: int) -> None:
        if what == moment and process is not None and process.poll() is None:
            process.kill()
            process.wait()

    batches.hook = kill
    program = (
        "import pathlib\nfrom data_tools import batch, llm\nfrom data_tools.chat import Request\nbatch._POLL = (0.01, "
        f"0.02)\nconfig = llm.LLMConfig(base_url={batches.base_url!r}, model='fake-1', batch=True)\n"
        f"with llm.LLM(config, pathlib.Path({str(tmp_path / 'llm.sqlite')!r})) as client:\n"
        "    list(client.ask_all([Request([{'role': 'user', 'content': str(i)}], max_tokens=5) for i in range(6)]))\n"
    )
    root = pathlib.Path(llm.__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", program], cwd=root, stderr=subprocess.DEVNULL)
    assert process.wait() == -signal.SIGKILL
    with client(batches, tmp_path, batch=True) as again:
        assert texts(again, 6) == [str(i) for i in range(6)] and again.ledger.spent()[0] == 66
    assert len(batches.batches) == 1 and set(batches.billed.values()) == {1}


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_server_does_the_books_hold(
    seed: int, batches: FakeBatches, tmp_path: pathlib.Path, half_price: dict[str, Any]
) -> None:
    chance = random.Random(seed)
    bound = len(json.dumps(request("10").body("fake-1"), sort_keys=True)) + 64

    good: set[str] = set()
    twice: list[str] = []

    def script(key: str, body: dict[str, Any], n: int) -> Any:
        twice.extend({key} & good)
        kind = chance.choice(["good"] * 4 + ["expired", "500", "flagged", "nothing", "odd"])
        good.update({key} if kind == "good" else ())
        return {
            "good": answered(key, chat("x", prompt=bound - 2, generated=5)),
            "expired": not_run(key),
            "500": answered(key, {"error": {"message": "oops"}}, 500),
            "nothing": None,
            "flagged": answered(key, {"error": {"message": "flagged", "code": "content_filter"}}, 400),
            "odd": answered(key, {"usage": {"prompt_tokens": bound - 2, "completion_tokens": 5}}),
        }[kind]

    batches.script = script
    batches.ends = lambda number: chance.choice(["completed", "completed", "expired", "cancelled"])
    batches.hook = lambda what, number: chance.choice([None, None, None, 500, "cut"])
    budget = 3.0
    for _ in range(20):
        try:
            with client(batches, tmp_path, batch=True, budget_usd=budget, max_failed=1.0, **half_price) as llm:
                texts(llm, 40)
                break
        except UserError as caught:
            assert "to go on" in str(caught)
        finally:
            with client(batches, tmp_path) as llm:
                assert batches.tokens * 0.0005 <= llm.ledger.spent()[1] + 1e-9 <= budget + 2e-9
        budget += 2.0
    else:
        pytest.fail("it never came to an end")
    tokens = [about["metadata"]["phi1_batch"] for about in batches.batches.values()]
    assert not twice and good and len(set(tokens)) == len(tokens)


def test_the_embedded_server_has_no_batches(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"--batch.*--base-url"):
        LLM(LLMConfig(batch=True), tmp_path / "l")


def test_failures_are_raised_as_they_are_online(batches: FakeBatches, tmp_path: pathlib.Path) -> None:
    batches.script = lambda key, body, n: answered(key, chat("yes" if number(body) else "no"))

    def accept(answer: Answer) -> None:
        if answer.text == "no":
            raise RequestFailed("said no")

    requests = [request(str(i), accept=accept) for i in range(3)]
    with client(batches, tmp_path, batch=True) as llm:
        assert [str(answer) for answer in llm.ask_all(requests) if isinstance(answer, RequestFailed)] == ["said no"]
    batches.script = echo
    with client(batches, tmp_path, batch=True, retry_failed=True) as llm:
        assert [answer.text for answer in llm.ask_all(requests) if isinstance(answer, Answer)] == ["0", "yes", "yes"]
    assert [len(sent) for sent in batches.sent] == [3, 1]
