"""A server of OpenAI's files and batches on 127.0.0.1, with faults, that keeps the books of what it bills."""

import collections
import email.parser
import email.policy
import json
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import local_http
from local_http import LocalServer

Line = dict[str, Any]


def answered(key: str, body: Any, status: int = 200) -> Line:
    """A line of an output or error file."""
    return {
        "id": "r",
        "custom_id": key,
        "response": {"status_code": status, "request_id": "q", "body": body},
        "error": None,
    }


def not_run(key: str, code: str = "batch_expired") -> Line:
    return {"id": "r", "custom_id": key, "response": None, "error": {"code": code, "message": f"{code}: not run"}}


def chat(text: str, prompt: int = 10, generated: int = 1, logprobs: dict[str, float] | None = None) -> dict[str, Any]:
    """A chat completion."""
    from fake_openai import completion

    return completion(text, logprobs=logprobs, prompt=prompt, generated=generated)[2]


class FakeBatches(LocalServer):
    """A batch is worked off in `steps` looks. Its lines are `script(custom_id, body, number of the batch)`, None for no
    line; its end is `ends(number)`. `hook(what, number of its kind)` runs before each reply ("upload", "create",
    "look", "list", "content"), after what was asked is done; it returns None, "cut" (the connection breaks), or an HTTP
    status. `refuse(what, number)` the same, before anything is done.
    """

    def __init__(self) -> None:
        self.script: Callable[[str, dict[str, Any], int], Line | None] = lambda key, body, number: answered(
            key, chat("yes")
        )
        self.ends: Callable[[int], str] = lambda number: "completed"
        self.errors: Callable[[list[Any]], list[dict[str, Any]]] = lambda lines: []
        self.hook: Callable[[str, int], Any] = lambda what, number: None
        self.refuse: Callable[[str, int], Any] = lambda what, number: None
        self.extra_lines: list[str] = []
        self.steps = 2
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.sent: list[dict[str, dict[str, Any]]] = []  # custom_id -> body, of each batch
        self.billed: collections.Counter[str] = collections.Counter()  # answers by custom_id
        self.tokens = 0  # of what was answered
        self.asked: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        fake = self

        class Handler(local_http.Handler):
            def do_GET(self) -> None:
                url = urllib.parse.urlsplit(self.path)
                parts = url.path.removeprefix("/v1/").split("/")
                if parts[0] == "files":
                    self._serve("content", lambda: fake.files[parts[1]])
                elif len(parts) == 2:
                    self._serve("look", lambda: fake._look(parts[1]))
                else:
                    self._serve("list", lambda: fake._list(dict(urllib.parse.parse_qsl(url.query))))

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/files":
                    self._serve("upload", lambda: fake._upload(self.headers["Content-Type"], data))
                else:
                    assert self.path == "/v1/batches", self.path
                    self._serve("create", lambda: fake._create(json.loads(data)))

            def _serve(self, what: str, work: Callable[[], Any]) -> None:
                with fake._lock:
                    fake.asked[what] += 1
                    number = fake.asked[what]
                    fault = fake.refuse(what, number)
                    reply = None if fault else work()
                fault = fault or fake.hook(what, number)
                self.close_connection = True
                if fault == "cut":
                    if isinstance(reply, bytes):  # in the middle of a file
                        self.send_response(200)
                        self.send_header("Content-Length", str(len(reply)))
                        self.end_headers()
                        self.wfile.write(reply[: len(reply) // 2])
                    return
                status = fault or 200
                if isinstance(status, tuple):
                    status, reply = status
                elif fault:
                    reply = {"error": {"message": f"HTTP {status}", "code": None}}
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                try:
                    self.send(status, data)
                except (BrokenPipeError, ConnectionResetError):
                    return  # the client was killed

        self.serve(Handler)
        self.base_url = self.root + "/v1"

    def _upload(self, kind: str, data: bytes) -> dict[str, Any]:
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(
            f"Content-Type: {kind}\r\n\r\n".encode() + data
        )
        fields = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in message.iter_parts()
        }
        assert fields["purpose"] == b"batch"
        id = f"file-{len(self.files)}"
        self.files[id] = fields["file"]
        return {
            "id": id,
            "object": "file",
            "bytes": len(fields["file"]),
            "created_at": 0,
            "filename": "f",
            "purpose": "batch",
            "status": "processed",
        }

    def _create(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["endpoint"] == "/v1/chat/completions" and body["completion_window"] == "24h"
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
        id = f"batch-{len(self.batches)}"
        self.batches[id] = {
            "id": id,
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "status": "validating",
            "created_at": int(time.time()),
            "metadata": body.get("metadata"),
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            "looks": 0,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
        }
        self.sent.append({line["custom_id"]: line["body"] for line in lines})
        return self.batches[id]

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        newest = list(reversed(self.batches.values()))
        if "after" in query:
            newest = newest[[batch["id"] for batch in newest].index(query["after"]) + 1 :]
        page = newest[: min(2, int(query["limit"]))]  # small pages, so that there are several
        return {
            "object": "list",
            "data": page,
            "has_more": len(page) < len(newest),
            "last_id": page[-1]["id"] if page else None,
        }

    def _look(self, id: str) -> dict[str, Any]:
        batch = self.batches[id]
        batch["looks"] += 1
        if batch["looks"] <= self.steps:
            batch["status"] = "in_progress"
        elif batch["status"] == "in_progress":
            self._end(batch)
        return batch

    def _end(self, batch: dict[str, Any]) -> None:
        number = int(batch["id"].removeprefix("batch-"))
        batch["status"] = self.ends(number)
        if batch["status"] == "failed":
            batch["errors"] = {"object": "list", "data": self.errors(list(self.sent[number]))}
            return
        lines = [self.script(key, body, number) for key, body in reversed(self.sent[number].items())]  # in no order
        good, bad = [], []
        for line in filter(None, lines):
            (good if (line["response"] or {}).get("status_code") == 200 else bad).append(line)
        for line in good:
            self.billed[line["custom_id"]] += 1
            body = line["response"]["body"]
            usage = (body.get("usage") if isinstance(body, dict) else None) or {}
            self.tokens += usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        for name, content in (("output_file_id", good), ("error_file_id", bad)):
            texts = [json.dumps(line) for line in content] + (self.extra_lines if name == "output_file_id" else [])
            if texts:
                batch[name] = f"file-{name}-{number}"
                self.files[batch[name]] = "".join(f"{text}\n" for text in texts).encode()
