"""A local server that speaks the protocol of OpenAI's, for the models under evaluation and for judges."""

import http.server
import json
import threading
from collections.abc import Callable
from typing import Any

Said = str | bytes | None | tuple[int, str]
"""The text of the answer, raw bytes in its place, null, or (status, message) of a refusal."""


class Server:
    """`reply(request)` answers chat and plain completions; requests, with their path, are kept."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reply: Callable[[dict[str, Any]], Said] = lambda request: "{}"
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
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
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    return  # a client that gave up waiting

            def log_message(self, *_: Any) -> None:
                return

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
