"""An object store (S3's protocol) and a hub (Hugging Face's), on 127.0.0.1, for reading."""

import collections
import hashlib
import json
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any
from xml.sax.saxutils import escape

import local_http
from local_http import LocalServer


class ObjectServer(LocalServer):
    """`objects`: "bucket/key" -> bytes. `hub`: "owner/name" -> path -> bytes, of data sets. `refuse(path)`: None, or
    (status, code) with which a request is refused. `asked`: (method, path) of all requests; `signed`: how many carried
    credentials.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.hub: dict[str, dict[str, bytes]] = {}
        self.refuse: Callable[[str], tuple[int, str] | None] = lambda path: None
        self.asked: collections.Counter[str] = collections.Counter()
        self.signed = 0
        store = self

        class Handler(local_http.Handler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                url = urllib.parse.urlsplit(self.path)
                path, query = urllib.parse.unquote(url.path), dict(urllib.parse.parse_qsl(url.query))
                store.asked[f"{self.command} {path}"] += 1
                store.signed += "Authorization" in self.headers
                if (refused := store.refuse(path)) is not None:
                    status, code = refused
                    self.send(
                        status,
                        f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode(),
                        {"X-Error-Code": code},
                    )
                elif path.startswith(("/api/", "/datasets/")):
                    self._hub(path)
                elif "list-type" in query:
                    self.send(200, store._listing(path.strip("/"), query), {"Content-Type": "application/xml"})
                else:
                    self._object(store.objects.get(path.strip("/")))

            do_HEAD = do_GET

            def do_POST(self) -> None:  # a hub's paths-info
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if (refused := store.refuse(self.path)) is not None:
                    self.send(refused[0], b"", {"X-Error-Code": refused[1]})
                    return
                name = "/".join(self.path.split("/")[3:5])
                wanted = (
                    json.loads(body)["paths"]
                    if body.startswith(b"{")
                    else urllib.parse.parse_qs(body.decode())["paths"]
                )
                self._json([entry for entry in store._tree(name, "") if entry["path"] in wanted])

            def _hub(self, path: str) -> None:
                parts = path.strip("/").split("/")
                if parts[0] == "api" and parts[1] == "datasets":
                    name = "/".join(parts[2:4])
                    if name not in store.hub:
                        self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                    elif len(parts) > 4 and parts[4] == "tree":
                        self._json(store._tree(name, "/".join(parts[6:])))
                    else:
                        self._json({"id": name, "sha": "0" * 40, "siblings": [], "private": False, "gated": False})
                elif parts[0] == "datasets" and parts[3] == "resolve":
                    self._object(store.hub.get("/".join(parts[1:3]), {}).get("/".join(parts[5:])))
                else:
                    self.send(404, b"{}", {})

            def _object(self, data: bytes | None) -> None:
                if data is None:
                    self.send(
                        404,
                        b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>",
                        {"X-Error-Code": "EntryNotFound"},
                    )
                    return
                headers = {
                    "ETag": f'"{hashlib.md5(data).hexdigest()}"',
                    "Accept-Ranges": "bytes",
                    "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT",
                    "X-Repo-Commit": "0" * 40,
                }
                status = 200
                if spec := self.headers.get("Range"):
                    first, _, last = spec.removeprefix("bytes=").partition("-")
                    start, end = int(first), min(int(last) if last else len(data), len(data) - 1)
                    headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                    status, data = 206, data[start : end + 1]
                self.send(status, data, headers)

            def _json(self, value: Any) -> None:
                self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        self.serve(Handler)
        self.url = self.root

    def _listing(self, bucket: str, query: Mapping[str, str]) -> bytes:
        prefix = query.get("prefix", "")
        keys = sorted(name.partition("/")[2] for name in self.objects if name.startswith(f"{bucket}/{prefix}"))
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[f'{bucket}/{key}'])}</Size>"
            "<LastModified>2025-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        )
        return (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        ).encode()

    def _tree(self, name: str, folder: str) -> list[dict[str, Any]]:
        """Files and folders below `folder`."""
        files = self.hub.get(name, {})
        below = {
            path: data for path, data in files.items() if not folder or path == folder or path.startswith(f"{folder}/")
        }
        folders = {"/".join(path.split("/")[:i]) for path in below for i in range(1, path.count("/") + 1)}
        found: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)
        ]
        found += [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in below.items()
        ]
        return [
            entry for entry in found if not folder or entry["path"] == folder or entry["path"].startswith(f"{folder}/")
        ]
