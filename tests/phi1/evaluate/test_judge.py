"""The judge against a local server that speaks the protocol, and against answers that are none."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from phi1.errors import UserError
from phi1.evaluate import judge
from phi1.evaluate.humaneval import Problem

PROBLEMS = [Problem(f"P/{i}", f'def f{i}(x):\n    """Return x + {i}."""\n', f"f{i}", "") for i in range(4)]
COMPLETIONS = [f"    return x + {i}\n" for i in range(4)]


class Server:
    """Answers chat completions with `reply(request)` -> (status, content of the message)."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reply: Callable[[dict[str, Any]], tuple[int, str]] = lambda request: (200, "{}")
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(request)
                status, text = server.reply(request)
                body: dict[str, Any] = {"error": {"message": text}}
                if status == 200:
                    message = {"role": "assistant", "content": text}
                    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "fake",
                            "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                return

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    one = Server()
    yield one
    one.close()


def test_grades_through_the_protocol(server: Server) -> None:
    server.reply = lambda request: (200, json.dumps({"critique": "Fine.", "grade": 8 if "f1(" in str(request) else 4}))
    grades = judge.grade(PROBLEMS, COMPLETIONS, judge.openai_ask(server.url, "fake"))
    assert [g.grade for g in grades] == [4, 8, 4, 4] and grades[1] == judge.Grade("P/1", 8, "Fine.")
    request = next(r for r in server.requests if "f2(" in str(r))
    assert (
        PROBLEMS[2].prompt in request["messages"][1]["content"] and COMPLETIONS[2] in request["messages"][1]["content"]
    )
    schema = request["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["critique", "grade"]  # the critique comes first
    assert request["temperature"] == 0
    summary = judge.summary(grades)
    assert summary["grade_percent"] == pytest.approx(50) and summary["graded"] == 4 and summary["without_grade"] == 0
    low, high = summary["interval_percent"]
    assert low < 50 < high


def test_an_answer_without_a_grade_is_asked_for_again_and_then_counted(server: Server) -> None:
    answers = iter(["not JSON", '{"critique": "x", "grade": 11}', '{"critique": "x", "grade": 3}'])
    server.reply = lambda request: (200, next(answers))
    (grade,) = judge.grade(PROBLEMS[:1], COMPLETIONS[:1], judge.openai_ask(server.url, "fake"), workers=1)
    assert grade.grade == 3
    for bad in ('{"critique": "x"}', '{"critique": "x", "grade": true}', '{"critique": "x", "grade": "9"}', "[]", ""):
        server.reply = lambda request, bad=bad: (200, bad)  # type: ignore[misc]
        grades = judge.grade(PROBLEMS[:1], COMPLETIONS[:1], judge.openai_ask(server.url, "fake"), attempts=2)
        assert grades[0].grade is None and grades[0].critique
    summary = judge.summary(grades)
    assert (
        summary["grade_percent"] is None and summary["without_grade"] == 1 and summary["interval_percent"] == [0, 100]
    )


def test_errors_name_the_way_out(server: Server) -> None:
    server.reply = lambda request: (401, "bad key")
    with pytest.raises(UserError, match="OPENAI_API_KEY is refused"):
        judge.grade(PROBLEMS, COMPLETIONS, judge.openai_ask(server.url, "fake"))
    server.reply = lambda request: (404, "no such model")
    with pytest.raises(UserError, match=r"refuses model 'fake' \(404"):
        judge.grade(PROBLEMS, COMPLETIONS, judge.openai_ask(server.url, "fake"))
    url = server.url.replace(str(server.http.server_port), "9")
    with pytest.raises(UserError, match="no judge answers there"):
        judge.grade(PROBLEMS[:1], COMPLETIONS[:1], judge.openai_ask(url, "fake"))
