"""The LLM client against a scripted server: what is paid, what is asked again, what the user is told."""

import concurrent.futures
import datetime
import email.utils
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from fake_openai import FakeServer, completion

from data_tools import llm as llm_module
from data_tools.adaptive import AdaptiveLimit, retry_after
from data_tools.ledger import Ledger
from data_tools.llm import LLM, LLMConfig, Request, RequestFailed
from phi1.errors import UserError


def request(text: str = "hello", **options: Any) -> Request:
    return Request([{"role": "user", "content": text}], **({"max_tokens": 5} | options))


def client(server: FakeServer | str, tmp_path: pathlib.Path, **options: Any) -> LLM:
    base_url = server if isinstance(server, str) else server.base_url
    return LLM(LLMConfig(base_url=base_url, model="fake-1", **options), tmp_path / "llm.sqlite")


def error(status: int, message: str, headers: dict[str, str] | None = None, code: str = "") -> Any:
    return status, headers or {}, {"error": {"message": message, "code": code}}


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "_MAX_BACKOFF", 0.05)


def test_an_answer_is_read_whole_and_the_request_is_what_was_asked(
    server: FakeServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    server.script = lambda body, index: completion("yes", logprobs={"yes": -0.1, "no": -2.5}, prompt=12, generated=1)
    with client(server, tmp_path) as llm:
        answer = llm.ask(request(temperature=0.7, top_p=0.9, seed=3, stop=["\n"], logprobs=True))
    assert (answer.text, answer.model, answer.prompt_tokens, answer.completion_tokens) == ("yes", "fake-1", 12, 1)
    assert answer.logprobs == {"yes": -0.1, "no": -2.5} and answer.paid and not answer.truncated
    assert server.headers[0]["authorization"] == "Bearer sk-test"
    sent = {"temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ["\n"], "max_tokens": 5}
    assert sent | {"logprobs": True, "top_logprobs": 20} | server.bodies[0] == server.bodies[0]


def test_structured_output_is_asked_for_and_parsed(server: FakeServer, tmp_path: pathlib.Path) -> None:
    schema = {"type": "object", "properties": {"rating": {"type": "integer"}}}
    server.script = lambda body, index: completion('{"rating": 7}' if index == 0 else '{"rating": 7')
    with client(server, tmp_path) as llm:
        assert llm.ask(request(schema=schema)).value == {"rating": 7}
        assert server.bodies[0]["response_format"]["json_schema"]["schema"] == schema
        with pytest.raises(RequestFailed, match="not JSON"):
            llm.ask(request("cut off", schema=schema))


def test_nothing_is_asked_twice_over_runs_and_a_changed_request_is_another(
    server: FakeServer, tmp_path: pathlib.Path
) -> None:
    for run in range(2):
        with client(server, tmp_path) as llm:
            answer = llm.ask(request("same"))
            assert answer.paid == (run == 0)
            assert llm.ledger.spent() == (11, 0.0)
    assert len(server.bodies) == 1
    with client(server, tmp_path) as llm:
        llm.ask(request("same", seed=1))
    assert len(server.bodies) == 2


def test_equal_requests_in_flight_together_are_sent_once(server: FakeServer, tmp_path: pathlib.Path) -> None:
    def slowly(body: dict[str, Any], index: int) -> Any:
        time.sleep(0.3)
        return completion("yes")

    server.script = slowly
    # Two connections to one ledger.
    with (
        client(server, tmp_path) as one,
        client(server, tmp_path) as other,
        concurrent.futures.ThreadPoolExecutor(6) as pool,
    ):
        answers = list(pool.map(lambda i: (one if i % 2 else other).ask(request()), range(6)))
    assert len(server.bodies) == 1
    assert sum(answer.paid for answer in answers) == 1


def test_answers_come_in_the_order_of_the_requests_and_failures_among_them(
    server: FakeServer, tmp_path: pathlib.Path
) -> None:
    def script(body: dict[str, Any], index: int) -> Any:
        text = body["messages"][0]["content"]
        time.sleep(0.05 if int(text) % 2 else 0.0)
        return error(400, "the request exceeds the available context size") if text == "7" else completion(text)

    server.script = script
    with client(server, tmp_path) as llm:
        answers = list(llm.ask_all(request(str(i)) for i in range(20)))
    assert [getattr(a, "text", None) for a in answers] == [str(i) if i != 7 else None for i in range(20)]
    assert "context size" in str(answers[7])


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (error(401, "Incorrect API key provided"), "OPENAI_API_KEY is refused"),
        (error(404, "model not found"), "it serves: fake-1"),
        (error(429, "You exceeded your quota: insufficient_quota"), "quota is spent"),
        (error(400, "logprobs are not supported by this model"), "--mode rating"),
        (error(400, "response_format json_schema is unsupported"), "--mode logprob"),
        ((200, {}, "<html>hello</html>"), "usually ends in /v1"),
    ],
)
def test_what_the_user_can_mend_is_one_clear_line_and_asked_once(
    reply: Any, told: str, server: FakeServer, tmp_path: pathlib.Path
) -> None:
    server.script = lambda body, index: reply
    with client(server, tmp_path) as llm, pytest.raises(UserError, match=told) as caught:
        llm.ask(request(logprobs=True))
    assert "\n" not in str(caught.value) and server.base_url in str(caught.value)
    assert len(server.bodies) == 1


def test_an_answer_without_logprobs_is_told(server: FakeServer, tmp_path: pathlib.Path) -> None:
    with client(server, tmp_path) as llm, pytest.raises(UserError, match="without logprobs; use --mode rating"):
        llm.ask(request(logprobs=True))
    server.script = lambda body, index: completion("yes", logprobs={"yes": -0.1})
    with client(server, tmp_path) as llm:  # the useless answer is paid for, but does not stand in the way
        assert llm.ask(request(logprobs=True)).logprobs == {"yes": -0.1}
        assert llm.ledger.spent()[0] == 22


def test_a_missing_server_is_told_at_once(tmp_path: pathlib.Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    started = time.monotonic()
    with client(url, tmp_path) as llm, pytest.raises(UserError, match=r"no server answers there.*--base-url"):
        llm.ask(request())
    assert time.monotonic() - started < 10


def test_options_that_do_not_fit_are_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="--model is missing"):
        LLM(LLMConfig(base_url="http://localhost:1/v1"), tmp_path / "l")
    with pytest.raises(UserError, match="has only SmolLM2"):
        LLM(LLMConfig(model="gpt-4"), tmp_path / "l")
    with pytest.raises(UserError, match="--usd-per-million-input"):
        LLM(LLMConfig(budget_usd=1.0), tmp_path / "l")


def test_429_waits_as_told_and_lowers_the_number_in_flight(server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.script = lambda body, index: (
        error(429, "slow down", {"Retry-After": "1"}) if index == 0 else completion("yes")
    )
    with client(server, tmp_path) as llm:
        before = llm._limit.value
        assert llm.ask(request()).text == "yes"
        assert llm._limit.value < before
        assert llm.ledger.spent()[0] == 11  # the refused attempt costs nothing
    assert server.times[1] - server.times[0] >= 1.0


def test_retry_after_is_read_as_seconds_and_as_a_date() -> None:
    soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=30)
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert 25 < (retry_after({"retry-after": email.utils.format_datetime(soon)}) or 0) <= 30
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_a_failing_server_is_asked_again_then_given_up(server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.script = lambda body, index: error(500, "oops") if index < 2 else completion("yes")
    with client(server, tmp_path, attempts=3) as llm:
        assert llm.ask(request()).text == "yes"
        server.script = lambda body, index: error(503, "overloaded")
        with pytest.raises(RequestFailed, match="503"):  # one request may be at fault
            llm.ask(request("other"))
        assert len(server.bodies) == 6
    with client(server, tmp_path, attempts=2) as llm, pytest.raises(UserError, match="to go on"):  # nothing works
        llm.ask(request("third"))


def test_a_timeout_stays_counted_because_it_may_be_billed(server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.hung_up_expected = True

    def script(body: dict[str, Any], index: int) -> Any:
        if index == 0:
            time.sleep(1.0)
        return completion("yes")

    server.script = script
    with client(server, tmp_path, timeout=0.4) as llm:
        assert llm.ask(request()).text == "yes"
        tokens, _ = llm.ledger.spent()
    assert tokens > 11 + 5  # the answer as billed, and the bound of the lost attempt


def test_the_number_in_flight_grows_to_the_maximum_and_not_past_it(server: FakeServer, tmp_path: pathlib.Path) -> None:
    def script(body: dict[str, Any], index: int) -> Any:
        time.sleep(0.02)
        return completion("yes")

    server.script = script
    with client(server, tmp_path, concurrency=8) as llm:
        list(llm.ask_all(request(str(i)) for i in range(120)))
        assert llm._limit.value == 8
    assert 4 < server.most_in_flight <= 8


def test_one_round_of_failures_halves_the_limit_once() -> None:
    limit = AdaptiveLimit(32)
    limit._limit = 16.0
    sent = time.monotonic()
    for _ in range(10):
        limit.failed(sent, None)
    assert limit.value == 8
    limit.failed(time.monotonic() + 1, None)
    assert limit.value == 4
    for _ in range(1000):
        limit.failed(time.monotonic() + 1, None)
    assert limit.value == 1


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

    def script(body: dict[str, Any], index: int) -> Any:
        time.sleep(0 if int(body["messages"][0]["content"]) < 3 else 20)
        return completion("yes")

    server.script = script
    program = (
        "import pathlib\nfrom data_tools.llm import LLM, LLMConfig, Request\n"
        f"config = LLMConfig(base_url={server.base_url!r}, model='fake-1', concurrency=4)\n"
        f"with LLM(config, pathlib.Path({str(tmp_path / 'llm.sqlite')!r})) as llm:\n"
        "    for answer in llm.ask_all(Request([{'role': 'user', 'content': str(i)}], 5) for i in range(9)):\n"
        "        print(answer.text, flush=True)\n"
    )
    root = pathlib.Path(llm_module.__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == ["yes\n"] * 3
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    process.wait(timeout=60)
    process.stdout.close()
    assert time.monotonic() - started < 10
    ledger = Ledger(tmp_path / "llm.sqlite")
    assert ledger.spent()[0] > 3 * 11 + 100  # three answers, and the bounds of those in flight
    assert ledger._in_flight() == set()
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


def test_servers_that_want_max_completion_tokens_get_it(server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.script = lambda body, index: (
        error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "max_tokens" in body
        else completion("yes")
    )
    with client(server, tmp_path) as llm:
        assert llm.ask(request()).text == "yes"
    assert server.bodies[1]["max_completion_tokens"] == 5
