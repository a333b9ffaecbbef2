"""What the tests' servers share: HTTP on 127.0.0.1, in a thread."""

import http.server
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class Handler(http.server.BaseHTTPRequestHandler):
    """Says nothing, and sends whole answers."""

    def send(self, status: int, data: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        """headers: JSON's type if they name none. Raises ConnectionError if the client has hung up."""
        self.send_response(status)
        for key, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | dict(headers)
        ).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        return


class LocalServer:
    """Serves until it is closed."""

    def serve(self, handler: type[Handler]) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_port
        self.root = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
