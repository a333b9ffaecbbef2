"""Asking an LLM through any OpenAI-compatible server, and never paying twice.

    with LLM(config, ledger=folder / "llm.sqlite") as llm:
        for answer in llm.ask_all(requests): ...

Each request goes through a ledger (`data_tools/ledger.py`): one that was answered before is answered from
there, and one that could pass the budget is not sent. The number of requests in flight adapts to the server: one more
per round of successes, half after a 429, a 5xx or a timeout (additive increase, multiplicative decrease),
and none before the time that `Retry-After` names.

Without `--base-url`, the embedded server (`data_tools/llm_server.py`) is started at the first request that
the ledger cannot answer.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data_tools import llm_server
from data_tools.adaptive import AdaptiveLimit, retry_after
from data_tools.ledger import Closed, Ledger
from data_tools.progress import Progress
from phi1.errors import UserError
from phi1.files import sha256_json

if TYPE_CHECKING:
    import openai

_NO_EFFECT = {"no_effect": True}
_MAX_BACKOFF = 60.0  # seconds
_HOPELESS = 3  # requests in a row that failed in every attempt: the server is down, not the request


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """Which LLM, and how much of it. A stage's Config inherits these options."""

    base_url: str | None = None
    """URL of an OpenAI-compatible server, e.g. https://api.openai.com/v1 (key in OPENAI_API_KEY).
    None: the embedded server, SmolLM2-135M-Instruct on this machine, no key needed."""

    model: str | None = None
    """The model's name at that server (needed with --base-url)."""

    usd_per_million_input: float | None = dataclasses.field(default=None, metadata=_NO_EFFECT)
    """Price of prompt tokens, US dollars per million."""

    usd_per_million_output: float | None = dataclasses.field(default=None, metadata=_NO_EFFECT)
    """Price of generated tokens, US dollars per million."""

    budget_usd: float | None = dataclasses.field(default=None, metadata=_NO_EFFECT)
    """Stop before the ledger's total passes this many US dollars (needs the prices)."""

    budget_tokens: int | None = dataclasses.field(default=None, metadata=_NO_EFFECT)
    """Stop before the ledger's total passes this many tokens, prompt and generated together."""

    ledger: pathlib.Path | None = dataclasses.field(default=None, metadata=_NO_EFFECT)
    """SQLite file of all requests and answers. None: llm.sqlite beside the output folder."""

    concurrency: int = dataclasses.field(default=32, metadata=_NO_EFFECT)
    """At most this many requests in flight."""

    timeout: float = dataclasses.field(default=180.0, metadata=_NO_EFFECT)
    """Seconds to wait for one answer."""

    attempts: int = dataclasses.field(default=8, metadata=_NO_EFFECT)
    """Attempts per request before it counts as failed."""

    llm_threads: int = dataclasses.field(default=2, metadata=_NO_EFFECT)
    """CPU threads of the embedded server."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One chat completion. Two equal requests are one: vary `seed` to sample again.

    messages: {"role", "content"} each. max_tokens: of the answer. schema: a JSON schema that the answer
    must fit (structured output). logprobs: also give the first token's 20 likeliest alternatives.
    """

    messages: Sequence[dict[str, str]]
    max_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    schema: dict[str, Any] | None = None
    logprobs: bool = False

    @property
    def prompt_hash(self) -> str:
        """SHA-256 of the messages."""
        return sha256_json(list(self.messages))

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings, for a document's provenance."""
        names = ("max_tokens", "temperature", "top_p", "seed", "stop")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value not in (None, ())}

    def body(self, model: str) -> dict[str, Any]:
        """The request as the server gets it."""
        body: dict[str, Any] = {"model": model, "messages": list(self.messages)} | self.sampling
        if self.schema is not None:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": self.schema, "strict": True},
            }
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": 20}
        return body


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the server said.

    text: the message. value: the parsed JSON if a schema was asked for. logprobs: the first token's
    alternatives, token -> natural log of its probability. model: as the server names it. paid: False if it
    came from the ledger. truncated: the answer ended at max_tokens.
    """

    text: str
    value: Any
    logprobs: dict[str, float]
    model: str
    prompt_tokens: int
    completion_tokens: int
    truncated: bool
    paid: bool


class RequestFailed(Exception):
    """This request got no usable answer; others may. The message is the reason."""


class LLM:
    """A client with a ledger; a context manager. Thread-safe.

    ledger: the SQLite file (config.ledger, if given, wins).
    Raises UserError, with what to do, for a missing server, a wrong key, an unknown model, a server without
    logprobs or structured output, a spent budget; `ask` raises RequestFailed for a request that failed alone.
    """

    def __init__(self, config: LLMConfig, ledger: pathlib.Path) -> None:
        if config.base_url is not None and not config.model:
            raise UserError(f"--model is missing: name a model that {config.base_url} serves")
        if config.base_url is None and config.model not in (None, llm_server.MODEL):
            raise UserError(
                f"--model {config.model}: the embedded server has only {llm_server.MODEL}; "
                "name the server that has it (--base-url URL)"
            )
        prices = (config.usd_per_million_input, config.usd_per_million_output)
        if config.budget_usd is not None and None in prices:
            raise UserError("--budget-usd needs --usd-per-million-input and --usd-per-million-output")
        self.config = config
        self.model = config.model or llm_server.MODEL
        # The embedded server's port changes from run to run and is no part of a request's identity.
        self.server = config.base_url or f"embedded:{llm_server.MODEL_FILE}"
        self.ledger = Ledger(
            config.ledger or ledger,
            usd_per_token=((prices[0] or 0.0) / 1e6, (prices[1] or 0.0) / 1e6),
            budget_tokens=config.budget_tokens,
            budget_usd=config.budget_usd,
            stale_after=config.timeout + 60,
        )
        # The embedded server answers one at a time; a second request waits in its queue.
        self._limit = AdaptiveLimit(config.concurrency if config.base_url else 2)
        self._stack = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._client: openai.OpenAI | None = None
        self._closed = threading.Event()
        self._answered = False
        self._failed_in_a_row = 0
        self._max_tokens_name = "max_tokens"

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        self._stack.close()
        self.ledger.close()

    def ask(self, request: Request) -> Answer:
        """The answer to one request, from the ledger or the server."""
        body = request.body(self.model)
        key = sha256_json({"server": self.server} | body)
        if (known := self.ledger.find(key)) is not None:
            return self._read(request, known, paid=False)
        last: Exception | None = None
        for attempt in range(self.config.attempts):
            try:
                with self._limit.slot(self._closed):
                    return self._attempt(request, key, body)
            except _Retry as retry:
                last = retry
            if attempt + 1 < self.config.attempts:
                wait = min(0.5 * 2**attempt, _MAX_BACKOFF) * random.uniform(0.5, 1.0)
                if self._closed.wait(wait):
                    raise Closed
        with self._lock:
            self._failed_in_a_row += 1
            hopeless = not self._answered or self._failed_in_a_row >= _HOPELESS
        if hopeless:
            raise UserError(
                f"{self.server}: {last} ({self.config.attempts} attempts); answers so far are in "
                f"{self.ledger.path}: run the same command again to go on"
            )
        raise RequestFailed(f"{last} ({self.config.attempts} attempts)")

    def _attempt(self, request: Request, key: str, body: dict[str, Any]) -> Answer:
        claim = self.ledger.claim(key, body, self._closed)
        if claim.response is not None:  # another thread or process asked the same meanwhile
            return self._read(request, claim.response, paid=False)
        sent = time.monotonic()
        try:
            response = self._send(body)
        except _Retry as retry:
            self._limit.failed(sent, retry.after)
            self.ledger.release(claim, lost=retry.billed)
            raise
        except (UserError, RequestFailed):
            self.ledger.release(claim, lost=False)
            raise
        except BaseException:  # the server may have done the work and may bill it
            self.ledger.release(claim, lost=True)
            raise
        self.ledger.settle(claim, response)
        self._limit.succeeded()
        with self._lock:
            self._answered, self._failed_in_a_row = True, 0
        try:
            return self._read(request, response, paid=True)
        except UserError:  # paid, but not what was asked for: another run must be able to ask again
            self.ledger.release(claim, lost=True)
            raise

    def ask_all(
        self, requests: Iterable[Request], *, progress: Progress | None = None
    ) -> Iterator[Answer | RequestFailed]:
        """Answers in the order of the requests, several in flight; a failed one is yielded, not raised.

        After an error (or if the caller stops early) the client sends nothing more.
        """
        pending: collections.deque[concurrent.futures.Future[Answer | RequestFailed]] = collections.deque()
        try:
            for request in requests:
                pending.append(self._start(request))
                if len(pending) >= 2 * self._limit.maximum:
                    yield self._next(pending, progress)
            while pending:
                yield self._next(pending, progress)
        except Exception:
            self._closed.set()
            concurrent.futures.wait(pending)  # what is in flight is still received: it is paid for
            raise
        except BaseException:  # Ctrl-C: what is in flight counts as lost
            self._closed.set()
            raise

    def _start(self, request: Request) -> "concurrent.futures.Future[Answer | RequestFailed]":
        future: concurrent.futures.Future[Answer | RequestFailed] = concurrent.futures.Future()

        def work() -> None:
            try:
                future.set_result(self.ask(request))
            except RequestFailed as failure:
                future.set_result(failure)
            except BaseException as error:
                future.set_exception(error)

        # Not a ThreadPoolExecutor: the interpreter would wait for its threads, after Ctrl-C for minutes.
        threading.Thread(target=work, name="llm", daemon=True).start()
        return future

    def _next(self, pending: "collections.deque[Any]", progress: Progress | None) -> Answer | RequestFailed:
        answer = pending.popleft().result()
        if progress is not None:
            progress.advance(note=f"{self._limit.value} in flight" if self._limit.maximum > 2 else "")
        return answer

    def _connect(self) -> "openai.OpenAI":
        with self._lock:
            if self._client is None:
                try:
                    import openai
                except ImportError as error:
                    raise UserError("the LLM client needs the package openai: pip install openai") from error
                if self.config.base_url is None:
                    server = llm_server.EmbeddedServer(threads=self.config.llm_threads)
                    base_url = self._stack.enter_context(server).base_url
                else:
                    base_url = self.config.base_url
                host = urllib.parse.urlparse(base_url).hostname
                local = host in ("127.0.0.1", "localhost", "::1")  # never through a proxy
                self._client = openai.OpenAI(
                    base_url=base_url,
                    api_key=os.environ.get("OPENAI_API_KEY") or "none",
                    max_retries=0,
                    timeout=self.config.timeout,
                    http_client=openai.DefaultHttpxClient(trust_env=not local),
                )
                self._stack.callback(self._client.close)
            return self._client

    def _send(self, body: dict[str, Any]) -> dict[str, Any]:
        """One attempt. Raises _Retry, RequestFailed or UserError."""
        client = self._connect()
        import openai

        sent = dict(body)
        sent[self._max_tokens_name] = sent.pop("max_tokens")
        try:
            raw = client.chat.completions.with_raw_response.create(**sent)
        except openai.APITimeoutError as error:
            raise _Retry(f"no answer within {self.config.timeout:g} s", billed=True) from error
        except openai.APIConnectionError as error:
            # By name: the client's HTTP library is httpx or httpx2, by its version.
            if type(error.__cause__).__name__ != "ConnectError":
                raise _Retry(f"connection lost ({error.__cause__!r})", billed=True) from error
            if self._answered:
                raise _Retry(f"does not accept connections any more ({error.__cause__})", billed=False) from error
            raise UserError(
                f"{self.server}: no server answers there ({error.__cause__}); start it, correct --base-url, "
                "or leave --base-url out to use the embedded model"
            ) from error
        except openai.APIStatusError as error:
            self._refused(error)
            return self._send(body)
        try:
            response = json.loads(raw.http_response.content)
            response["choices"][0]["message"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self.server}: answers, but not as an OpenAI-compatible server does; --base-url usually ends in /v1"
            ) from error
        return response

    def _refused(self, error: "openai.APIStatusError") -> None:
        """Raises what a refusal (HTTP status) means; returns if the request should be sent again at once."""
        message = _one_line(error.message)
        status = error.status_code
        if status in (401, 403):
            raise UserError(
                f"{self.server}: the key in OPENAI_API_KEY is refused ({status}: {message}); set a valid one"
            ) from error
        if status == 404:
            raise UserError(f"{self.server}: no model {self.model!r} there ({message}); {self._models()}") from error
        if status == 429 and "insufficient_quota" in message:
            raise UserError(
                f"{self.server}: the account's quota is spent ({message}); top it up, go on later"
            ) from error
        if status in (408, 409, 429) or status >= 500:
            raise _Retry(
                f"HTTP {status}: {message}", billed=False, after=retry_after(error.response.headers)
            ) from error
        if "max_completion_tokens" in message and self._max_tokens_name == "max_tokens":
            self._max_tokens_name = "max_completion_tokens"  # OpenAI's reasoning models call it so
            return
        if "logprob" in message:
            raise UserError(
                f"{self.server}: {self.model} gives no logprobs ({message}); use --mode rating, or another server"
            ) from error
        if "response_format" in message or "json_schema" in message:
            raise UserError(
                f"{self.server}: {self.model} has no structured output ({message}); "
                "use --mode logprob, or another server"
            ) from error
        raise RequestFailed(f"HTTP {status}: {message}") from error

    def _models(self) -> str:
        try:
            names = [model.id for model in self._connect().models.list().data]
        except Exception as error:  # any failure here only shortens the message
            return f"it does not list its models either ({type(error).__name__}): check --model and --base-url"
        return f"it serves: {', '.join(names[:8])}" + (", …" if len(names) > 8 else "")

    def _read(self, request: Request, response: dict[str, Any], *, paid: bool) -> Answer:
        choice = response["choices"][0]
        text = choice["message"].get("content") or ""
        logprobs: dict[str, float] = {}
        if request.logprobs:
            content = (choice.get("logprobs") or {}).get("content") or []
            if not content or not content[0].get("top_logprobs"):
                raise UserError(
                    f"{self.server}: {self.model} answered without logprobs; use --mode rating, or another server"
                )
            logprobs = {entry["token"]: entry["logprob"] for entry in content[0]["top_logprobs"]}
        value = None
        if request.schema is not None:
            try:
                value = json.loads(text)
            except ValueError as error:
                raise RequestFailed(f"the answer is not JSON: {_one_line(text)[:80]!r}") from error
        usage = response.get("usage") or {}
        return Answer(
            text=text,
            value=value,
            logprobs=logprobs,
            model=response.get("model") or self.model,
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            truncated=choice.get("finish_reason") == "length",
            paid=paid,
        )


class _Retry(Exception):
    """An attempt that failed and may be made again. billed: the server may have charged it.
    after: seconds to wait, if the server named them."""

    def __init__(self, reason: str, *, billed: bool, after: float | None = None) -> None:
        super().__init__(reason)
        self.billed, self.after = billed, after


def _one_line(text: str) -> str:
    return " ".join(str(text).split())[:300]
