"""The LLM client against a scripted server: what is paid, what is asked again, what the user is told."""

import concurrent.futures
import contextlib
import os
import pathlib
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from asking import client, error, request
from fake_openai import FakeServer, completion

from data_tools import llm as llm_module
from data_tools import llm_connection
from data_tools.adaptive import AdaptiveLimit
from data_tools.chat import Answer, RequestFailed
from data_tools.ledger import alive
from data_tools.llm import LLM, LLMConfig
from phi1.errors import UserError


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


HTML = (200, {}, "<html>hello</html>")


@pytest.mark.parametrize(
    ("reply", "told", "sent"),
    [
        (error(429, "You exceeded your quota", code="insufficient_quota"), "out of money: top it up", 1),
        (error(402, "Insufficient Balance"), "out of money: top it up", 1),
        (error(400, "Your credit balance is too low to access the API."), "out of money: top it up", 1),
        # In doubt: the second request is the probe.
        (error(401, "Incorrect API key provided"), "OPENAI_API_KEY is refused: set a valid one", 2),
        (error(403, "forbidden"), "OPENAI_API_KEY is refused", 2),
        (error(404, "model not found"), "it serves: fake-1", 2),
        (error(400, "logprobs are not supported by this model"), "--mode rating", 2),
        (error(400, "response_format json_schema is unsupported"), "--mode logprob", 2),
        (error(400, "'temperature' does not support 0 with this model."), "--temperature", 2),
        (error(422, "Extra inputs are not permitted"), "Extra inputs", 2),
        (completion("yes"), "without logprobs; it gives no logprobs: use --mode rating", 2),
        (HTML, "usually ends in /v1", 5),
        ((200, {}, {"error": {"code": 402, "message": "no credits left"}}), "out of money", 1),
    ],
)
def test_what_stops_everyone_is_one_clear_line_and_the_run_goes_on_later(
    reply: Any, told: str, sent: int, server: FakeServer, tmp_path: pathlib.Path
) -> None:
    server.script = lambda body, index: reply
    with client(server, tmp_path) as llm, pytest.raises(UserError, match=told) as caught:
        llm.ask(request(logprobs=True))
    assert "\n" not in str(caught.value) and server.base_url in str(caught.value) and "go on" in str(caught.value)
    assert len(server.bodies) == sent
    server.script = lambda body, index: completion("yes", logprobs={"yes": -0.1})
    with client(server, tmp_path) as llm:  # topped up, mended: it is asked again
        assert llm.ask(request(logprobs=True)).logprobs == {"yes": -0.1}


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "reply",
    [
        error(403, "forbidden"),
        error(401, "who are you"),
        error(400, "odd"),
        error(500, "oops"),
        HTML,
        (200, {}, {"choices": []}),
    ],
)
def test_what_fails_for_one_request_is_its_failure_wherever_it_stands(
    reply: Any, alone: bool, concurrency: int, server: FakeServer, tmp_path: pathlib.Path
) -> None:
    server.script = lambda body, index: reply if body["messages"][0]["content"] == "0" else completion("yes")
    with client(server, tmp_path, concurrency=concurrency, attempts=3) as llm:
        answers = list(llm.ask_all(request(str(i)) for i in range(1 if alone else 8)))
    assert isinstance(answers[0], RequestFailed) and all(isinstance(answer, Answer) for answer in answers[1:])


@pytest.mark.parametrize(
    "change",
    [
        {"message": None},
        {"message": "text"},
        {"message": {}},
        {"message": {"content": None, "refusal": "I can't."}},
        {"message": {"content": 7}},
        {"message": {"content": "cut"}, "finish_reason": "content_filter"},
    ],
)
def test_a_paid_answer_that_cannot_be_read_is_its_rows_failure_in_every_run(
    change: dict[str, Any], server: FakeServer, tmp_path: pathlib.Path
) -> None:
    status, headers, whole = completion("yes")
    bad = (status, headers, whole | {"choices": [whole["choices"][0] | change]})
    server.script = lambda body, index: bad if body["messages"][0]["content"] == "bad" else completion("yes")
    for _ in range(2):
        with client(server, tmp_path) as llm:
            answers = list(llm.ask_all([request("bad"), request("good"), request("better")]))
        assert [type(answer) for answer in answers] == [RequestFailed, Answer, Answer]
    assert len(server.bodies) == 3  # paid for once
    server.script = lambda body, index: completion("mended")
    with client(server, tmp_path, retry_failed=True) as llm:
        assert llm.ask(request("bad")).text == "mended"
        assert llm.ask(request("good")).text == "yes" and len(server.bodies) == 4
        assert llm.ledger.spent()[0] == 44


def test_ledger_entries_of_any_form_are_failures_of_their_rows(server: FakeServer, tmp_path: pathlib.Path) -> None:
    with client(server, tmp_path) as llm:
        llm.ask(request())
    for poison in ("{", "null", "[]", '{"choices": {}}', '{"choices": [[]]}', None):
        with sqlite3.connect(tmp_path / "llm.sqlite") as database:
            database.execute("UPDATE calls SET response = ?", (poison,))
        with client(server, tmp_path) as llm, pytest.raises(RequestFailed, match="holds no message"):
            llm.ask(request())


def test_logprobs_that_are_no_numbers_are_left_out(server: FakeServer, tmp_path: pathlib.Path) -> None:
    odd = {"yes": -0.1, "no": -9999.0, "maybe": float("-inf"), "never": None, "nan": float("nan"), "text": "x"}
    server.script = lambda body, index: completion("yes", logprobs=odd)  # type: ignore[arg-type]
    for _ in range(2):
        with client(server, tmp_path) as llm:
            assert llm.ask(request(logprobs=True)).logprobs == {"yes": -0.1}
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        [],
        {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": -5, "completion_tokens": "3"},
        {"prompt_tokens": float("nan"), "completion_tokens": True},
    ],
)
def test_a_usage_without_numbers_counts_at_the_bound(usage: Any, server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.script = lambda body, index: (200, {}, completion("yes")[2] | {"usage": usage})
    with client(server, tmp_path) as llm:
        answer = llm.ask(request())
        assert (answer.text, answer.prompt_tokens) == ("yes", 0)
        assert llm.ledger.spent()[0] > 64 + 5


@pytest.mark.parametrize(
    "body",
    [{"choices": []}, {"choices": None}, {}, [], "<html>x</html>", '{"choices": [{"message": {"con', {"choices": [1]}],
)
def test_a_200_that_is_no_answer_counts_at_the_bound_and_is_asked_a_few_times(
    body: Any, server: FakeServer, tmp_path: pathlib.Path
) -> None:
    server.script = lambda sent, index: (
        (200, {}, body) if sent["messages"][0]["content"] == "bad" else completion("yes")
    )
    with client(server, tmp_path) as llm:
        with pytest.raises(RequestFailed, match="no chat completion"):
            llm.ask(request("bad"))
        assert len(server.bodies) == 4  # three attempts and the probe
        assert llm.ledger.spent()[0] > 3 * (64 + 5) + 11
    # Where it states a usage above the bound, that is what counts, and later bounds are higher.
    usage = {"usage": {"prompt_tokens": 5000, "completion_tokens": 5}}
    server.script = lambda sent, index: (200, {}, {"choices": []} | usage)
    with client(server, tmp_path, attempts=1, budget_tokens=7000) as llm, pytest.raises(UserError, match="budget"):
        llm.ask(request("bad"))


def test_half_a_surrogate_pair_in_an_answer_is_no_poison(server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.script = lambda body, index: completion("a\ud800b")
    for _ in range(2):
        with client(server, tmp_path) as llm:
            assert llm.ask(request()).text == "a\ufffdb"
    assert len(server.bodies) == 1


def test_too_many_failures_stop_the_run_unless_accepted(server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.script = lambda body, index: (
        completion("yes") if body["messages"][0]["content"] == "5" else error(400, "content_filter")
    )
    requests = [request(str(i)) for i in range(60)]
    with (
        client(server, tmp_path, concurrency=2) as llm,
        pytest.raises(UserError, match=r"19 of 20 requests failed.*--max-failed"),
    ):
        list(llm.ask_all(requests))
    assert len(server.bodies) < 30
    with client(server, tmp_path, max_failed=1.0) as llm:
        assert sum(isinstance(answer, RequestFailed) for answer in llm.ask_all(requests)) == 59


def test_a_missing_server_is_told_at_once(tmp_path: pathlib.Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    with client(url, tmp_path) as llm, pytest.raises(UserError, match=r"no server answers there.*--base-url"):
        llm.ask(request())


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


def test_the_number_in_flight_doubles_a_round_until_the_first_failure() -> None:
    limit = AdaptiveLimit(32)
    rounds = [limit.value]
    while limit.value < 32:
        for _ in range(limit.value):
            limit.succeeded()
        rounds.append(limit.value)
    assert rounds == [4, 8, 16, 32]
    limit.failed(time.monotonic(), None)
    assert limit.value == 16
    for _ in range(17):
        limit.succeeded()
    assert limit.value == 17


def test_a_rate_limit_is_waited_out_however_often_it_refuses(
    server: FakeServer, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = lambda body, index: error(429, "Please try again in 20ms.") if index < 12 else completion("yes")
    with client(server, tmp_path, attempts=2) as llm:
        assert llm.ask(request()).text == "yes"
    assert len(server.bodies) == 13
    limit = AdaptiveLimit(8)
    limit.failed(time.monotonic(), 70.0, "HTTP 429: try again in 1m10s")
    assert "waiting 70 s as the server asks (HTTP 429: try again in 1m10s)" in capsys.readouterr().err
    assert 60 < limit._not_before - time.monotonic() <= 70


def test_a_rate_limit_beyond_patience_stops_and_says_so(server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.script = lambda body, index: error(429, "Please try again in 6h0m0s.")
    with (
        client(server, tmp_path) as llm,
        pytest.raises(UserError, match=r"6h0m0s.*outlasts --patience 3600 s.*to go on"),
    ):
        llm.ask(request())


def test_a_failing_server_is_asked_again_then_given_up(server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.script = lambda body, index: error(500, "oops") if index < 2 else completion("yes")
    with client(server, tmp_path, attempts=3) as llm:
        assert llm.ask(request()).text == "yes"
        server.script = lambda body, index: error(503, "overloaded")
        with pytest.raises(UserError, match=r"503: overloaded \(3 attempts\).*to go on"):
            llm.ask(request("other"))
        assert len(server.bodies) == 3 + 3 + 2


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_drip_does_not_outlive_the_timeout(part: str, server: FakeServer, tmp_path: pathlib.Path) -> None:
    ended = threading.Event()

    def drip(handler: Any) -> None:
        try:
            if part == "body":
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not ended.wait(0.05):
                handler.wfile.write(b"H" if part == "head" else b" ")
        except OSError:
            return

    server.script = lambda body, index: (200, {}, drip) if index == 0 else completion("yes")
    with client(server, tmp_path, timeout=1.0) as llm:
        assert llm.ask(request()).text == "yes"
    ended.set()
    assert len(server.bodies) >= 2  # the first would drip for ever


def test_a_body_without_end_is_cut_off(
    server: FakeServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_connection, "_LARGEST_BODY", 1 << 20)

    def flood(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(b" " * 65536)

    server.script = lambda body, index: (200, {}, flood) if index == 0 else completion("yes")
    with client(server, tmp_path) as llm:
        assert llm.ask(request()).text == "yes"


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
    together = threading.Event()

    def script(body: dict[str, Any], index: int) -> Any:
        if index == 60:
            together.wait()  # until eight are in flight
        elif index > 60 and server.in_flight == 8:
            together.set()
        elif index > 60 and not together.is_set():
            together.wait(0.5)
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


def test_servers_that_want_max_completion_tokens_get_it_and_no_request_is_lost(
    server: FakeServer, tmp_path: pathlib.Path
) -> None:
    together = threading.Barrier(4)  # four requests are in flight before the first refusal

    def script(body: dict[str, Any], index: int) -> Any:
        if index < 4:
            together.wait(30)
        message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return error(400, message) if "max_tokens" in body else completion("yes")

    server.script = script
    with client(server, tmp_path) as llm:
        assert [
            answer.text for answer in llm.ask_all(request(str(i)) for i in range(9)) if isinstance(answer, Answer)
        ] == ["yes"] * 9
    assert server.bodies[-1]["max_completion_tokens"] == 5


def test_a_process_that_ended_but_was_not_reaped_does_not_live() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert alive(process.pid)
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert pathlib.Path(f"/proc/{process.pid}").exists() and not alive(process.pid)
    assert not alive(process.pid)
