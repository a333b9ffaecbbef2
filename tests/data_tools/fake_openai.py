"""A scripted OpenAI-compatible server on 127.0.0.1, for the tests of what speaks the protocol."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import local_http
from local_http import LocalServer

Reply = tuple[int, dict[str, str], Any]
"""HTTP status, headers, and the body: JSON-able, text as it is, or a function of the handler that writes what it likes.
"""


def completion(text: str, *, logprobs: dict[str, float] | None = None, prompt: int = 10, generated: int = 1) -> Reply:
    """A chat completion as OpenAI's servers answer it."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": None,
    }
    if logprobs is not None:
        top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": top}]}
    return (
        200,
        {},
        {
            "id": "x",
            "object": "chat.completion",
            "model": "fake-1",
            "choices": [choice],
            "usage": {"prompt_tokens": prompt, "completion_tokens": generated},
        },
    )


class FakeServer(LocalServer):
    """Answers with `script(body, index of the request)`; records bodies, headers, times and the most in flight."""

    def __init__(self) -> None:
        self.script: Callable[[dict[str, Any], int], Reply] = lambda body, index: completion("yes")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(local_http.Handler):
            def do_GET(self) -> None:
                self._reply((200, {}, {"object": "list", "data": [{"id": "fake-1", "object": "model"}]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    index = len(fake.bodies)
                    fake.bodies.append(body)
                    fake.headers.append({key.lower(): value for key, value in self.headers.items()})
                    fake.times.append(time.monotonic())
                    fake.in_flight += 1
                    fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
                try:
                    reply = fake.script(body, index)
                finally:
                    with fake._lock:
                        fake.in_flight -= 1
                self._reply(reply)

            def _reply(self, reply: Reply) -> None:
                status, headers, body = reply
                if callable(body):
                    self.close_connection = True
                    body(self)
                    return
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                try:
                    self.send(status, data, ({"Content-Type": "text/html"} if isinstance(body, str) else {}) | headers)
                except BrokenPipeError:
                    assert fake.hung_up_expected, "the client hung up"

        self.hung_up_expected = False
        self.serve(Handler)
        self.base_url = self.root + "/v1"
