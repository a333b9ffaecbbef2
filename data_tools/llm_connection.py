"""The connection of `data_tools/llm.py` to a server that speaks OpenAI's protocol: one attempt at one request.

All requests live in one event loop, in a thread of its own, where a deadline can cut one off wherever it is. Whatever
comes of an attempt but an answer is a `Refused`, or a UserError where there is no server.
"""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import threading
import urllib.parse
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from data_tools import llm_server
from data_tools.chat import Refused, answer_in
from data_tools.provider_errors import Remedy, Verdict, one_line, sort
from phi1.errors import UserError

if TYPE_CHECKING:
    import openai

T = TypeVar("T")
_LARGEST_BODY = 64 << 20  # bytes of an answer: what is longer is none


class Connection:
    """Made at the first request. base_url: none, for the embedded server, which is then started with `threads` threads.

    timeout: of an attempt, in seconds. Thread-safe.
    """

    def __init__(self, base_url: str | None, timeout: float, threads: int) -> None:
        self._base_url, self._timeout, self._threads = base_url, timeout, threads
        self._stack = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._client: openai.AsyncOpenAI | None = None
        self._loop = asyncio.new_event_loop()
        self._answered = False
        self._max_tokens_name = "max_tokens"

    def close(self) -> None:
        """Cuts off what is in flight, and ends the embedded server."""
        self._stack.close()
        if not self._loop.is_running():
            self._loop.close()

    def _connect(self) -> "openai.AsyncOpenAI":
        with self._lock:
            if self._client is None:
                try:
                    import openai
                except ImportError as error:
                    raise UserError("the LLM client needs the package openai: pip install openai") from error
                if self._base_url is None:
                    server = llm_server.EmbeddedServer(threads=self._threads)
                    base_url = self._stack.enter_context(server).base_url
                else:
                    base_url = self._base_url
                host = urllib.parse.urlparse(base_url).hostname
                local = host in ("127.0.0.1", "localhost", "::1")  # never through a proxy
                client = openai.AsyncOpenAI(
                    base_url=base_url,
                    api_key=os.environ.get("OPENAI_API_KEY") or "none",
                    max_retries=0,
                    timeout=self._timeout,
                    http_client=openai.DefaultAsyncHttpxClient(trust_env=not local),
                )
                thread = threading.Thread(target=self._loop.run_forever, name="llm-network", daemon=True)
                thread.start()
                self._stack.callback(self._disconnect, client, thread)
                self._client = client
            return self._client

    def _disconnect(self, client: "openai.AsyncOpenAI", thread: threading.Thread) -> None:
        async def finish() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.close()

        asyncio.run_coroutine_threadsafe(finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        thread.join()

    def send(self, body: dict[str, Any]) -> dict[str, Any]:
        """One attempt. Raises Refused, or UserError where there is no server."""
        sent = self.named(body)
        try:
            answer = answer_in(self.call(lambda client: _received(client, sent)))
        except Refused as refused:
            if refused.verdict.remedy is not Remedy.RENAME:
                raise
            if "max_tokens" in sent:  # this request's name, whatever other threads have changed meanwhile
                self.rename()
                return self.send(body)
            raise Refused(dataclasses.replace(refused.verdict, remedy=Remedy.DOUBT)) from refused
        self._answered = True
        return answer

    def named(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request with its parameters called as the server calls them."""
        return {self._max_tokens_name if key == "max_tokens" else key: value for key, value in body.items()}

    def rename(self) -> None:
        """From now on, max_tokens is called as OpenAI's reasoning models call it."""
        self._max_tokens_name = "max_completion_tokens"

    def call(self, ask: "Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, T]]", *, slow: int = 1) -> T:
        """What a coroutine gives that asks the server; slow: how many times the timeout it may take. Raises Refused, or
        UserError where there is no server."""
        client = self._connect()
        import openai

        timeout = slow * self._timeout
        try:
            return asyncio.run_coroutine_threadsafe(asyncio.wait_for(ask(client), timeout), self._loop).result()
        except (asyncio.TimeoutError, openai.APITimeoutError) as error:
            reason = f"no whole answer within {timeout:g} s"
            raise Refused(Verdict(Remedy.RETRY, reason, billed=True)) from error
        except openai.APIConnectionError as error:
            # By name: the client's HTTP library is httpx or httpx2, by its version.
            if type(error.__cause__).__name__ != "ConnectError":
                raise Refused(Verdict(Remedy.RETRY, f"connection lost ({error.__cause__!r})", billed=True)) from error
            if self._answered:
                reason = f"does not accept connections any more ({error.__cause__})"
                raise Refused(Verdict(Remedy.RETRY, reason)) from error
            raise UserError(
                f"{self._base_url}: no server answers there ({error.__cause__}); start it, correct --base-url, "
                "or leave --base-url out to use the embedded model"
            ) from error
        except _Cut as error:
            raise Refused(Verdict(Remedy.RETRY, f"connection lost ({error})", billed=True)) from error
        except openai.APIStatusError as error:
            headers = {key.lower(): value for key, value in error.response.headers.items()}
            raise Refused(sort(error.status_code, headers, error.response.text)) from error
        except (openai.APIError, ValueError, TypeError) as error:  # a body that is not what the client expects
            raise Refused(
                Verdict(Remedy.RETRY, f"an answer that cannot be read ({one_line(str(error))[:80]})")
            ) from error

    def models(self) -> str:
        """What the server serves, in words."""
        try:
            listed = asyncio.run_coroutine_threadsafe(_model_names(self._connect()), self._loop)
            names = listed.result(self._timeout)
        except Exception as error:  # any failure here only shortens the message
            return f"it does not list its models either ({type(error).__name__})"
        return f"it serves: {', '.join(names[:8])}" + (", …" if len(names) > 8 else "")


class _Cut(Exception):
    """The connection broke inside of an answer."""


async def _received(client: "openai.AsyncOpenAI", sent: dict[str, Any]) -> bytes:
    """The body of the answer to a chat completion."""
    data = bytearray()
    async with client.chat.completions.with_streaming_response.create(**sent) as raw:
        try:
            async for part in raw.iter_bytes():
                data += part
                if len(data) > _LARGEST_BODY:
                    raise _Cut(f"longer than {_LARGEST_BODY >> 20} MiB")
        except (asyncio.CancelledError, _Cut):
            raise
        except Exception as error:  # of the HTTP library (httpx or httpx2), by its version
            raise _Cut(repr(error)) from error
    return bytes(data)


async def fetched(client: "openai.AsyncOpenAI", file: str, path: pathlib.Path) -> None:
    """A file of the server's, whole, at `path`."""
    async with client.files.with_streaming_response.content(file) as raw:
        try:
            await raw.stream_to_file(path)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # of the HTTP library (httpx or httpx2), by its version
            raise _Cut(repr(error)) from error


async def _model_names(client: "openai.AsyncOpenAI") -> list[str]:
    return [model.id for model in (await client.models.list()).data]
