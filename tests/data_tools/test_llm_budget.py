"""What the LLM client has paid for: budgets, calls of dead processes, one spelling of an address, ledgers."""

import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from asking import client, request
from fake_openai import FakeServer, completion

from data_tools import llm as llm_module
from data_tools.chat import RequestFailed, canonical_url
from data_tools.ledger import Ledger
from data_tools.llm import LLM, LLMConfig, default_ledger
from phi1.errors import UserError


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "_MAX_BACKOFF", 0.05)


def test_the_token_budget_is_not_passed_and_the_work_goes_on_with_a_higher_one(
    server: FakeServer, tmp_path: pathlib.Path
) -> None:
    server.script = lambda body, index: completion(body["messages"][0]["content"], prompt=100, generated=5)
    requests = [request(str(i)) for i in range(40)]
    with client(server, tmp_path, budget_tokens=2000, concurrency=8) as llm:
        with pytest.raises(UserError, match="--budget-tokens and run the same command again"):
            list(llm.ask_all(requests))
        spent, _ = llm.ledger.spent()
    first = len(server.bodies)
    # An attempt reserves about 210 tokens and costs 105, so the stop comes within one reservation of the budget.
    assert 2000 - 250 < spent <= 2000 and spent == 105 * first
    with client(server, tmp_path) as llm:
        assert [a.text for a in llm.ask_all(requests) if not isinstance(a, RequestFailed)] == [
            str(i) for i in range(40)
        ]
    assert len(server.bodies) == 40  # what was answered before was not asked again


def test_the_money_budget_is_not_passed(server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.script = lambda body, index: completion("x", prompt=100, generated=5)
    prices = {"usd_per_million_input": 1000.0, "usd_per_million_output": 4000.0}  # 0.12 dollars an answer
    with client(server, tmp_path, budget_usd=1.0, **prices) as llm:
        with pytest.raises(UserError, match=r"budget of \$1\.0000"):
            for i in range(40):
                llm.ask(request(str(i)))
        assert llm.ledger.spent()[1] == pytest.approx(0.12 * len(server.bodies))
        assert 0.7 < llm.ledger.spent()[1] <= 1.0


def test_the_bound_of_a_request_covers_any_tokenizer(server: FakeServer, tmp_path: pathlib.Path) -> None:
    # A token is at least one byte: 300 characters of three bytes each may be 900 tokens.
    with client(server, tmp_path, budget_tokens=900) as llm, pytest.raises(UserError, match="budget"):
        llm.ask(request("語" * 300))
    assert not server.bodies


def test_a_call_left_open_by_a_dead_process_is_asked_again_and_stays_counted(tmp_path: pathlib.Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    body = {"max_tokens": 5, "model": "m"}
    ledger.claim("key", body, threading.Event())
    bound = ledger.spent()[0]
    ledger._database.execute("UPDATE calls SET pid = 2147480000")  # no such process
    claim = ledger.claim("key", body, threading.Event())
    assert claim.response is None
    ledger.settle(claim, {"usage": {"prompt_tokens": 3, "completion_tokens": 1}})
    assert ledger.spent()[0] == bound + 4
    assert ledger.find("key") is not None
    ledger.close()


def test_ctrl_c_ends_at_once_and_what_was_asked_stays_counted(server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.hung_up_expected = True
    ended = threading.Event()
    answered: set[str] = set()

    def script(body: dict[str, Any], index: int) -> Any:
        if answered >= {"0", "1", "2"}:
            ended.wait()
        answered.add(body["messages"][0]["content"])
        return completion("yes")

    server.script = script
    program = (
        "import pathlib\nfrom data_tools.chat import Request\nfrom data_tools.llm import LLM, LLMConfig\n"
        f"config = LLMConfig(base_url={server.base_url!r}, model='fake-1', concurrency=4)\n"
        f"with LLM(config, pathlib.Path({str(tmp_path / 'llm.sqlite')!r})) as llm:\n"
        "    for answer in llm.ask_all(Request([{'role': 'user', 'content': str(i)}], 5) for i in range(300)):\n"
        "        print(answer.text, flush=True)\n"
    )
    root = pathlib.Path(llm_module.__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == ["yes\n"] * 3
    while server.in_flight < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.wait()  # though its requests are never answered
    process.stdout.close()
    ended.set()
    ledger = Ledger(tmp_path / "llm.sqlite")
    assert ledger.spent()[0] > 3 * 11 + 100  # three answers, and the bounds of those in flight
    assert ledger._in_flight() == set()
    ledger.close()


def test_a_ledger_from_before_there_were_batches_is_read(server: FakeServer, tmp_path: pathlib.Path) -> None:
    with client(server, tmp_path) as llm:
        llm.ask(request("known"))
        llm.ledger._database.executescript(
            "DROP INDEX batched; ALTER TABLE calls DROP COLUMN batch; DROP TABLE batches;"
        )
    with client(server, tmp_path) as llm:
        assert not llm.ask(request("known")).paid and llm.ask(request("new")).paid
        assert llm.ledger.spent()[0] == 22


def test_a_call_is_not_given_up_while_its_timeout_runs(server: FakeServer, tmp_path: pathlib.Path) -> None:
    with client(server, tmp_path, timeout=5000.0) as llm:
        claim = llm.ledger.claim("key", {"max_tokens": 5}, threading.Event())
        llm.ledger._database.execute("UPDATE calls SET started = started - 4000")
        assert llm.ledger._in_flight() == {claim.id}


def test_an_answer_that_comes_after_its_call_was_given_up_is_counted_and_spoils_nothing(tmp_path: pathlib.Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    late = ledger.claim("key", {"max_tokens": 5}, threading.Event())
    ledger._database.execute("UPDATE calls SET started = 0")
    again = ledger.claim("key", {"max_tokens": 5}, threading.Event())
    ledger.settle(late, {"usage": {"prompt_tokens": 3, "completion_tokens": 1}})
    ledger.settle(again, {"usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    assert ledger.spent()[0] == 9 and (found := ledger.find("key")) is not None and found.completion_tokens == 2
    ledger.close()


def test_a_file_that_is_no_ledger_is_told(tmp_path: pathlib.Path) -> None:
    (tmp_path / "llm.sqlite").write_text("no database, but long enough to be looked at" * 100)
    with pytest.raises(UserError, match="not a ledger"):
        Ledger(tmp_path / "llm.sqlite")


def test_a_full_disk_is_told(tmp_path: pathlib.Path) -> None:
    ledger = Ledger(tmp_path / "llm.sqlite")
    pages = ledger._database.execute("PRAGMA page_count").fetchone()[0]
    ledger._database.execute(f"PRAGMA max_page_count = {pages + 2}")  # SQLite's own way to say that space is out
    with pytest.raises(
        UserError, match=r"llm\.sqlite: the ledger cannot be written \(database or disk is full\); free"
    ):
        for i in range(100):
            ledger.claim(f"key {i}", {"max_tokens": 5, "text": "x" * 1000}, threading.Event())
    ledger.close()


@pytest.mark.parametrize(
    "other",
    [
        "http://Example.COM/v1",
        "http://example.com:80/v1/",
        "http://example.com",
        "http://user:key@example.com//v1",
        " http://example.com/v1 ",
    ],
)
def test_the_address_has_one_spelling_in_the_ledger(other: str) -> None:
    assert canonical_url(other) == "http://example.com/v1"


def test_other_servers_have_other_addresses() -> None:
    urls = [
        "http://a/v1",
        "https://a/v1",
        "http://a:8000/v1",
        "http://a/x/v1",
        "http://a/v1?api-version=2",
        "http://[::1]:9/v1",
    ]
    assert [canonical_url(url) for url in urls] == urls
    for url in ("localhost:8000/v1", "http://", "http://a:port/v1"):
        with pytest.raises(UserError, match="--base-url"):
            canonical_url(url)


def test_another_parent_folder_does_not_pay_again_and_has_its_own_budget(
    server: FakeServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    config = LLMConfig(base_url=server.base_url, model="fake-1", budget_tokens=400)
    spent = []
    for place in ("a", "b"):
        with LLM(config, *default_ledger(config, tmp_path / place / "annotated")) as llm:
            llm.ask(request("shared"))
            llm.ask(request(place))
            spent.append(llm.ledger.spent()[0])
    assert len(server.bodies) == 3 and spent == [22, 11]
    assert default_ledger(LLMConfig(), tmp_path / "a" / "x") == (tmp_path / "a" / "llm.sqlite", "")
    (tmp_path / "b" / "llm.sqlite").parent.mkdir()
    (tmp_path / "b" / "llm.sqlite").touch()
    assert default_ledger(config, tmp_path / "b" / "x") == (tmp_path / "b" / "llm.sqlite", "")


def test_a_ledger_that_the_embedded_model_wrote_beside_the_output_is_not_a_servers(
    server: FakeServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LLMConfig(base_url=server.base_url, model="fake-1")
    beside, output = tmp_path / "llm.sqlite", tmp_path / "out"

    def ask(*texts: str, **options: Any) -> tuple[int, int]:
        """(requests that the server got, tokens spent)"""
        before = len(server.bodies)
        options = {"base_url": server.base_url, "model": "fake-1"} | options
        asked = LLMConfig(**options)
        with LLM(asked, *default_ledger(asked, output)) as llm:
            for text in texts:
                llm.ask(request(text))
            return len(server.bodies) - before, llm.ledger.spent()[0]

    assert ask("a") == (1, 11)
    embedded = {"model": llm_module.llm_server.MODEL}
    Ledger(beside).close()  # as an embedded stage that asks nothing leaves it
    assert beside.stat().st_size and ask("a") == (0, 11)
    assert ask("embedded", ledger=beside, **embedded) == (1, 11)
    assert ask("a", "b") == (1, 22)
    # One that holds calls of a server stays that server's; where both do, the user decides.
    ask("c", ledger=beside)
    with pytest.raises(UserError, match=r"--ledger is missing: \S+llm\.sqlite and \S+phi1/llm\.sqlite both hold"):
        default_ledger(config, output)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another home"))
    assert ask("c") == (0, 22)
    beside.write_text("no database, but long enough to be looked at" * 100)
    with pytest.raises(UserError, match=r"not a ledger of LLM requests .* name another file \(--ledger\)"):
        default_ledger(config, output)


def test_no_lookup_reads_the_whole_ledger(server: FakeServer, tmp_path: pathlib.Path) -> None:
    # Without the index's own condition beside it, `state = 'done'` scanned all calls at every request.
    with client(server, tmp_path) as llm:
        asked: list[str] = []
        llm.ledger._database.set_trace_callback(asked.append)
        assert llm.ask(request("a")).paid and not llm.ask(request("a")).paid
        llm.ledger.forget(llm.key(request("a")))
        llm.ledger.begin_batch("token", {"key": {"max_tokens": 5}}, 1.0)
        llm.ledger.open_batches({"key"})
        llm.ledger.known(["key"])
        assert set(llm.ledger.batch_calls("token")) == {"key"}
        llm.ledger._database.set_trace_callback(None)
        explained = [text for text in asked if text.split()[0] in ("SELECT", "UPDATE", "DELETE")]
        plans = [str(llm.ledger._database.execute(f"EXPLAIN QUERY PLAN {text}").fetchall()) for text in explained]
    assert len(plans) > 20 and not [plan for plan in plans if "SCAN calls'" in plan]
