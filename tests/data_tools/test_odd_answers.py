"""Odd answers of providers in every stage that asks one: a row's failure or a row, never a traceback; not asked twice;
the budget holds.
"""

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from asking import client, request
from fake_openai import FakeServer, completion

from data_tools import annotate, llm, rewrite, synthesize
from data_tools.dataset import Dataset
from data_tools.ledger import Ledger

CODE = '"""Doc."""\n\n\ndef f(n):\n    """Return n + 1.\n\n    >>> f(1)\n    2\n    """\n    return n + 1\n'
USAGE = {"prompt_tokens": 10, "completion_tokens": 5}


def answer(message: Any = None, choice: Any = None, **facts: Any) -> Any:
    """A chat completion with parts of it replaced."""
    whole = completion(f"```python\n{CODE}```", logprobs={"yes": -0.1, "no": -2.0}, generated=5)[2]
    if message is not None:
        whole["choices"][0]["message"] = message
    whole["choices"][0] |= choice or {}
    return 200, {}, whole | facts


def raw(data: bytes, headers: dict[str, str] | None = None, status: str = "200 OK") -> Any:
    """Bytes as they are."""

    def write(handler: Any) -> None:
        lines = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        head = "".join(f"{key}: {value}\r\n" for key, value in lines.items() if value)
        handler.wfile.write(f"HTTP/1.1 {status}\r\n{head}Connection: close\r\n\r\n".encode() + data)

    return 200, {}, write


def text(**facts: Any) -> bytes:
    return json.dumps(answer(**facts)[2]).encode()


def with_top(*entries: Any) -> Any:
    return {"logprobs": {"content": [{"token": "yes", "top_logprobs": list(entries)}]}}


ODD: dict[str, Callable[[], Any]] = {
    "content is a dict": lambda: answer({"role": "assistant", "content": {"text": "yes"}}),
    "content is parts": lambda: answer(
        {"content": [{"type": "text", "text": CODE}, None, {"type": "image"}, {"text": 5}]}
    ),
    "content is a number": lambda: answer({"content": 7}),
    "content is empty": lambda: answer({"content": ""}),
    "only tools": lambda: answer({"content": None, "tool_calls": [{"id": "a"}]}, {"finish_reason": "tool_calls"}),
    "only reasoning": lambda: answer({"content": None, "reasoning_content": "hm"}),
    "a refusal that is a dict": lambda: answer({"content": None, "refusal": {"why": ["no"]}}),
    "message is text": lambda: answer("yes"),
    "message is a list": lambda: answer([1]),
    "finish_reason is a number": lambda: answer(choice={"finish_reason": 5}),
    "cut": lambda: answer(choice={"finish_reason": "length"}),
    "filtered": lambda: answer(choice={"finish_reason": "content_filter"}),
    "choices is a dict": lambda: answer(choices={"0": {"message": {"content": "yes"}}}),
    "choices holds null": lambda: answer(choices=[None]),
    "two choices": lambda: answer(choices=answer()[2]["choices"] * 2),
    "model is a list": lambda: answer(model=["fake"]),
    "model is a surrogate": lambda: answer(model="fake\ud800"),
    "usage is a list": lambda: answer(usage=[1, 2]),
    "usage is negative": lambda: answer(usage={"prompt_tokens": -5, "completion_tokens": -1}),
    "usage is infinite": lambda: raw(text(usage={"prompt_tokens": float("inf"), "completion_tokens": float("nan")})),
    "usage is long": lambda: raw(text().replace(b'"prompt_tokens": 10', b'"prompt_tokens": 1' + b"0" * 400)),
    "usage is longer than Python reads": lambda: raw(
        text().replace(b'"prompt_tokens": 10', b'"prompt_tokens": 1' + b"0" * 5000)
    ),
    "usage is nested": lambda: answer(usage={"prompt_tokens": {"n": 5}, "completion_tokens": None}),
    "usage is true": lambda: answer(usage={"prompt_tokens": True, "completion_tokens": 2.5}),
    "nested": lambda: raw(b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a mark before it": lambda: raw(b"\xef\xbb\xbf" + text()),
    "UTF-16": lambda: raw(text().decode().encode("utf-16")),
    "bytes that are no text": lambda: raw(text().replace(b"Return", b"Ret\xff\xfern")),
    "a NUL": lambda: answer({"content": f"```python\n{CODE}\0```"}),
    "surrogates": lambda: answer({"content": f"\ud83d```python\n{CODE}```\udc00"}),
    "no body": lambda: raw(b""),
    "blanks": lambda: raw(b"  \n "),
    "a number": lambda: raw(b"5"),
    "null": lambda: raw(b"null"),
    "a stream of events": lambda: raw(
        b'data: {"choices": [{"delta": {"content": "y"}}]}\n\ndata: [DONE]\n\n', {"Content-Type": "text/event-stream"}
    ),
    "packed": lambda: raw(gzip.compress(text()), {"Content-Encoding": "gzip"}),
    "packed and cut": lambda: raw(gzip.compress(text())[:-20], {"Content-Encoding": "gzip"}),
    "said to be packed": lambda: raw(text(), {"Content-Encoding": "gzip"}),
    "in pieces that are cut": lambda: raw(b"50\r\n{", {"Transfer-Encoding": "chunked", "Content-Length": ""}),
    "longer than it says": lambda: raw(text(), {"Content-Length": "40"}),
    "another character set": lambda: raw(text(), {"Content-Type": "application/json; charset=no-such"}),
    "202": lambda: raw(text(), status="202 Accepted"),
    "204": lambda: raw(b"", status="204 No Content"),
    "an error in a 200": lambda: (200, {}, {"error": {"message": "upstream", "code": 502}}),
    "an error in words": lambda: (200, {}, {"error": "overloaded"}),
    "an error beside an answer": lambda: answer(error={"message": "late"}),
    "418": lambda: (418, {}, {"error": {"message": "I am a teapot"}}),
    "451": lambda: (451, {}, "unavailable for legal reasons"),
    "599": lambda: (599, {"Retry-After": "-5"}, ""),
    "503 with a wait that is none": lambda: (503, {"Retry-After": "soon"}, {"error": None}),
    "500 with a list": lambda: (500, {}, [1, 2]),
    "400 with messages that are lists": lambda: (
        400,
        {},
        {"error": {"message": [{"loc": ["body"]}], "code": 400, "type": None}},
    ),
    "logprobs is a list": lambda: answer(choice={"logprobs": [1]}),
    "logprobs is of another age": lambda: answer(
        choice={"logprobs": {"tokens": ["yes"], "top_logprobs": [{"yes": -0.1}]}}
    ),
    "logprobs by name": lambda: answer(
        choice=with_top() | {"logprobs": {"content": [{"top_logprobs": {"yes": -0.1}}]}}
    ),
    "logprobs without numbers": lambda: answer(
        choice=with_top({"token": "yes", "logprob": "-0.1"}, {"token": None, "logprob": -1})
    ),
    "logprobs of everything": lambda: answer(
        choice=with_top(
            *(
                {"token": word, "logprob": value}
                for word, value in [("yes", 5.0), ("yes", float("-inf")), ("no", -9999.0), (5, -1.0), ("no", -1.0)]
            )
        )
    ),
    "a rating that is a text": lambda: answer({"content": '{"reasoning": "r", "rating": "7"}'}),
    "a rating out of range": lambda: answer({"content": '{"reasoning": "r", "rating": 1e400}'}),
    "a rating in a list": lambda: answer({"content": '[{"reasoning": "r", "rating": 7}]'}),
    "a rating in a fence": lambda: answer({"content": '```json\n{"reasoning": "r", "rating": 7}\n```'}),
    "a rating that is no number": lambda: answer({"content": '{"reasoning": "\\ud800", "rating": NaN}'}),
    "code that is deep": lambda: answer({"content": "```python\nx = " + "-" * 50_000 + "1\n```"}),
    "code with form feeds": lambda: answer({"content": f"```python\n\f{CODE}\f\n```"}),
    "code without end": lambda: answer({"content": "```python\n" + "x = '''" * 1000}),
    "fences alone": lambda: answer({"content": "```\n```\n```"}),
    "an example that does not end": lambda: answer({"content": f"```python\n{CODE.replace('>>> f(1)', '>>> f(')}```"}),
}


UNUSABLE = (
    "content is empty",
    "message is text",
    "two choices",
    "usage is nested",
    "a rating in a list",
    "code without end",
)
"""Answers that are whole, whatever they are good for: paid, and in the ledger."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "_MAX_BACKOFF", 0.01)


def stages(server: FakeServer, documents: Dataset, folder: pathlib.Path) -> dict[str, tuple[Any, Any]]:
    """Stage -> its module and config, so that it asks as many requests as there are odd answers, one or two a row."""
    options: dict[str, Any] = {
        "base_url": server.base_url,
        "model": "fake-1",
        "attempts": 2,
        "max_failed": 1.0,
        "concurrency": 4,
    }
    of_documents = options | {"input": documents.folder}
    made = options | {"count": len(ODD), "max_tokens": 50, "workers": 1}
    return {
        "annotate": (annotate, annotate.Config(output=folder / "annotated", **of_documents)),
        "rating": (annotate, annotate.Config(output=folder / "rated", mode="rating", **of_documents)),
        "rewrite": (
            rewrite,
            rewrite.Config(output=folder / "rewritten", min_lint=-100.0, max_tokens=50, **of_documents),
        ),
        "exercises": (synthesize, synthesize.Config(output=folder / "exercises", kind="exercises", **made)),
        "textbooks": (synthesize, synthesize.Config(output=folder / "textbooks", kind="textbooks", **made)),
    }


@pytest.mark.parametrize("stage", ["annotate", "rating", "rewrite", "exercises", "textbooks"])
def test_no_odd_answer_stops_a_stage_or_is_paid_twice(
    stage: str, server: FakeServer, make_documents: Any, tmp_path: pathlib.Path
) -> None:
    texts = [CODE + f"\n\nnumber = {i}\n" for i in range(len(ODD))]
    module, config = stages(server, make_documents(texts), tmp_path)[stage]
    names, given = list(ODD), {}
    server.hung_up_expected = True

    def script(body: dict[str, Any], index: int) -> Any:
        if "word yes" in body["messages"][-1]["content"]:  # a probe
            return answer()
        asked = json.dumps(body["messages"])
        given.setdefault(asked, names[len(given) % len(names)])  # each request gets the same answer every time
        return ODD[given[asked]]()

    server.script = script
    made = module.run(config)
    assert len(given) >= len(ODD)
    failures = {failure["key"]: failure["reason"] for failure in made.failures()}
    assert made.rows + len(failures) == len(ODD) and all(reason and "\n" not in reason for reason in failures.values())
    ledger = Ledger(tmp_path / "user-data" / "phi1" / "llm.sqlite")
    tokens, _ = ledger.spent()
    ledger.close()
    asked = len(server.bodies)
    # Run again, and made again from the ledger: nothing that was answered is asked again.
    assert module.run(config).hash == made.hash and len(server.bodies) == asked
    answered = {asked for asked, name in given.items() if name in UNUSABLE}
    again = module.run(dataclasses.replace(config, output=config.output.with_name("again")))
    assert (again.rows, again.counters) == (made.rows, made.counters)
    assert answered and not answered & {json.dumps(body["messages"]) for body in server.bodies[asked:]}
    assert tokens >= 15 * sum(1 for name in given.values() if name == "two choices")


@pytest.mark.parametrize(
    "name",
    [
        "a mark before it",
        "UTF-16",
        "usage is longer than Python reads",
        "usage is infinite",
        "bytes that are no text",
        "surrogates",
        "packed",
        "202",
        "an error beside an answer",
        "content is parts",
        "two choices",
        "finish_reason is a number",
        "model is a surrogate",
    ],
)
def test_what_can_be_read_is_not_thrown_away(name: str, server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.script = lambda body, index: ODD[name]()
    with client(server, tmp_path) as llm:
        assert "def f(n):" in llm.ask(request()).text and llm.ask(request()).paid is False
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "text",
    [
        '<think>hm {"rating": 1}</think>{"reasoning": "r", "rating": 7}',
        'Sure!\n```json\n{"reasoning": "r", "rating": 7}```',
        'Like ```{"rating": 1}```:\r\n~~~JSON\r\n{"reasoning": "r", "rating": 7}\r\n~~~\r\nAsk for more!',
        '```\nThe rating:\n```\n\n```\n{"reasoning": "r",\n "rating": 7}\n```',
    ],
)
def test_json_is_found_in_what_stands_around_it(text: str, server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.script = lambda body, index: answer({"content": text})
    with client(server, tmp_path) as llm:
        assert llm.ask(request(schema={})).value == {"reasoning": "r", "rating": 7}
    value = {"reasoning": "it ends </think> early", "rating": 7}
    server.script = lambda body, index: answer({"content": json.dumps(value)})
    with client(server, tmp_path) as llm:
        assert llm.ask(request("whole", schema={})).value == value


def test_json_in_a_fence_is_json(server: FakeServer, tmp_path: pathlib.Path) -> None:
    server.script = lambda body, index: ODD["a rating in a fence"]()
    with client(server, tmp_path) as llm:
        assert llm.ask(request(schema={})).value == {"reasoning": "r", "rating": 7}
