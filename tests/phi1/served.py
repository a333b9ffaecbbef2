"""A local server that speaks the protocol of OpenAI's, for the models under evaluation and for judges."""

import json
from collections.abc import Callable
from typing import Any

import local_http
from local_http import LocalServer

Said = str | bytes | None | tuple[int, str]
"""The text of the answer, raw bytes in its place, null, or (status, message) of a refusal."""


class Server(LocalServer):
    """`reply(request)` answers chat and plain completions; requests, with their path, are kept."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reply: Callable[[dict[str, Any]], Said] = lambda request: "{}"
        server = self

        class Handler(local_http.Handler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"]))) | {"path": self.path}
                server.requests.append(request)
                said = server.reply(request)
                status, data = 200, b""
                if isinstance(said, tuple):
                    status, data = said[0], json.dumps({"error": {"message": said[1]}}).encode()
                elif isinstance(said, bytes):
                    data = said
                elif self.path.endswith("/chat/completions"):
                    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
                    data = json.dumps(
                        {"id": "x", "object": "chat.completion", "created": 0, "model": "fake", "choices": [choice]}
                    ).encode()
                else:
                    choice = {"index": 0, "finish_reason": "stop", "text": said}
                    data = json.dumps(
                        {"id": "x", "object": "text_completion", "created": 0, "model": "fake", "choices": [choice]}
                    ).encode()
                try:
                    self.send(status, data)
                except (BrokenPipeError, ConnectionResetError):
                    return  # a client that gave up waiting

        self.serve(Handler)
        self.url = self.root + "/v1"
