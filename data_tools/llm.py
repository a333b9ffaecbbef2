"""Asking an LLM through any OpenAI-compatible server, and never paying twice.

    with LLM(config, ledger=folder / "llm.sqlite") as llm:
        for answer in llm.ask_all(requests): ...

Each request goes through a ledger (`data_tools/ledger.py`): one that was answered before is answered from
there, and one that could pass the budget is not sent. The number of requests in flight adapts to the server: one more
per round of successes, half after a 429, a 5xx or a timeout (additive increase, multiplicative decrease),
and none before the time that the server names.

What a refusal means is looked up in one table (`data_tools/provider_errors.py`). A request that fails alone is a
`RequestFailed`, its row's failure; what fails for everyone is a `UserError`, after which the same command goes on.
Where that is in doubt, the answers to other requests decide, or if there are none a probe: the same request with a
harmless question. Money is counted high where it is not known: a 200 that is no answer (HTML, cut JSON, no choices), a
lost connection and a timeout count at the bound of their request.

One attempt over the network is `data_tools/llm_connection.py`. Without `--base-url`, the embedded server
(`data_tools/llm_server.py`) is started at the first request that the ledger cannot answer.
"""

import collections
import concurrent.futures
import os
import pathlib
import random
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sized
from typing import Any, NoReturn

from data_tools import chat, llm_server
from data_tools.adaptive import AdaptiveLimit
from data_tools.batch import Batches
from data_tools.chat import Answer, NoLogprobs, Refused, Request, RequestFailed, canonical_url
from data_tools.ledger import Claim, Closed, Ledger, asked_of_others, has_spent
from data_tools.llm_config import LLMConfig, priced
from data_tools.llm_connection import Connection
from data_tools.provider_errors import Remedy, Verdict
from data_tools.ranges import at_least
from phi1.errors import UserError
from phi1.files import sha256_json
from phi1.progress import Progress

_MAX_BACKOFF = 60.0  # seconds
_NO_ANSWER_ATTEMPTS = 3  # for a 200 that is no answer: each may be billed
_PROBE_ATTEMPTS = 2
_DOUBTS = 3  # requests in doubt together before a probe is sent
_SHARE_FROM = 20  # requests, before the share that failed means something


def default_ledger(config: LLMConfig, output: pathlib.Path) -> tuple[pathlib.Path, str]:
    """The ledger of a stage that writes `output`, and the scope of its budget (see LLMConfig.ledger).

    That the embedded model wrote one beside the output changes nothing for a server: its answers would be paid for
    again. Raises UserError where both hold what servers were asked for this folder, from when that was not so.
    """
    if config.ledger is not None:
        return config.ledger, ""
    beside = output.parent / "llm.sqlite"
    if config.base_url is None:
        return beside, ""
    home = pathlib.Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    own, scope = home / "phi1" / "llm.sqlite", str(output.parent.resolve())
    if not beside.exists():
        return own, scope
    if beside.stat().st_size == 0:  # put there to be it
        return beside, ""
    if not asked_of_others(beside, llm_server.MODEL):
        return own, scope
    if own.exists() and has_spent(own, scope):
        raise UserError(
            f"--ledger is missing: {beside} and {own} both hold answers that were paid for in {scope}; name the one "
            "to go on with (--ledger FILE counts all that it holds)"
        )
    return beside, ""


class LLM:
    """A client with a ledger; a context manager. Thread-safe.

    ledger: the SQLite file; scope: of its budget. config.ledger, if given, wins over both.
    Raises UserError, with what to do, for a missing server, a wrong key, an unknown model, a server without
    logprobs or structured output, a spent budget or account; `ask` raises RequestFailed for a request that failed
    alone.
    """

    def __init__(self, config: LLMConfig, ledger: pathlib.Path, scope: str = "") -> None:
        if config.base_url is not None and not config.model:
            raise UserError(f"--model is missing: name a model that {config.base_url} serves")
        if config.base_url is None and config.model not in (None, llm_server.MODEL):
            raise UserError(
                f"--model {config.model}: the embedded server has only {llm_server.MODEL}; "
                "name the server that has it (--base-url URL)"
            )
        if config.batch and config.base_url is None:
            raise UserError("--batch: the embedded server has no Batch API; name a server that has (--base-url URL)")
        if not 0 <= config.max_failed <= 1:
            raise UserError(f"--max-failed {config.max_failed}: must lie between 0 and 1")
        at_least(0, config, "budget_usd", "budget_tokens", "patience")
        at_least(1, config, "concurrency", "attempts", "llm_threads")
        self.config = config
        self.model = config.model or llm_server.MODEL
        # The embedded server's port changes from run to run and is no part of a request's identity.
        self.server = canonical_url(config.base_url) if config.base_url else f"embedded:{llm_server.MODEL_FILE}"
        # 400 tokens take 5 s on two idle cores, and took more than 180 s at a load of 13.
        timeout = config.timeout * (1 if config.base_url else 20)
        price = priced(config, self.server, self.model)
        self.ledger = Ledger(
            config.ledger or ledger,
            scope="" if config.ledger else scope,
            usd_per_token=price.usd_per_token or (0.0, 0.0),
            budget_tokens=config.budget_tokens,
            budget_usd=config.budget_usd,
            stale_after=max(600.0, 2 * timeout),
        )
        # The embedded server answers one at a time; a second request waits in its queue.
        self._limit = AdaptiveLimit(config.concurrency if config.base_url else 2)
        self._connection = Connection(config.base_url, timeout, config.llm_threads)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._batches = Batches(
            self.ledger,
            self._connection,
            config.base_url or self.server,
            price=price.batch,
            patience=config.patience,
            closed=self._closed,
        )
        self.used: collections.Counter[str] = collections.Counter()
        """What the answers that this object gave have cost, whenever they were paid for: requests, prompt_tokens,
        completion_tokens and usd_billionths. A stage puts it into its manifest.
        """
        self._paid: collections.Counter[str] = collections.Counter()
        self._asked_again: set[str] = set()
        # For what is in doubt: how many requests are being asked, wait in doubt, and were answered in a way that
        # shows that the server serves others; whether a probe is on its way; what stopped the client.
        self._news = threading.Condition()
        self._asking = self._doubting = self._served = 0
        self._probing = False
        self._stopped: UserError | None = None

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        self._connection.close()
        self.ledger.close()

    def _read(self, request: Request, claim: Claim, *, paid: bool) -> Answer:
        """The answer that a call got, counted whether it is of use or not."""
        cost = {
            "requests": 1,
            "prompt_tokens": claim.prompt_tokens,
            "completion_tokens": claim.completion_tokens,
            "usd_billionths": round(claim.usd * 1e9),
        }
        with self._lock:
            self.used.update(cost)
            if paid:
                self._paid.update(cost)
        return chat.read(request, claim.response or {}, self.model, paid=paid, usd=claim.usd)

    def _is_known(self, request: Request, key: str) -> bool:
        """Whether the ledger has an answer. One that is of no use is forgotten, once, if it is to be asked for
        again.
        """
        known = self.ledger.find(key)
        if known is None or not self.config.retry_failed:
            return known is not None
        try:
            chat.read(request, known.response or {}, self.model, paid=False)
        except RequestFailed:
            with self._lock:
                again = key not in self._asked_again
                self._asked_again.add(key)
            if again:
                self.ledger.forget(key)
            return not again
        return True

    def key(self, request: Request) -> str:
        """A request's name in the ledger: its content and the server."""
        return sha256_json({"server": self.server} | request.body(self.model))

    def ask(self, request: Request) -> Answer:
        """The answer to one request, from the ledger or the server."""
        body = request.body(self.model)
        key = self.key(request)
        if self._is_known(request, key) and (known := self.ledger.find(key)) is not None:
            return self._read(request, known, paid=False)
        with self._news:
            self._asking += 1
        try:
            return self._ask(request, key, body)
        finally:
            with self._news:
                self._asking -= 1
                self._news.notify_all()

    def _ask(self, request: Request, key: str, body: dict[str, Any]) -> Answer:
        failures = waits = 0
        limited = 0.0  # when a rate limit first refused this request
        while True:
            with self._news:
                served = self._served
            try:
                with self._limit.slot(self._closed):
                    return self._attempt(request, key, body, waits)
            except Refused as refused:
                verdict, no_answer = refused.verdict, refused.response is not None
                if verdict.remedy is Remedy.STOP:
                    raise self._stop(verdict) from refused
                if verdict.remedy is Remedy.REQUEST:
                    raise RequestFailed(verdict.reason) from refused
                if verdict.remedy is Remedy.WAIT:  # `slot` waits for all requests alike
                    waits += 1
                    limited = limited or time.monotonic()
                    if time.monotonic() - limited + (verdict.after or _backoff(waits)) > self.config.patience:
                        self._doubt(
                            body, refused, served, f"a rate limit outlasts --patience {self.config.patience:g} s"
                        )
                    continue
                failures += 1
                attempts = min(self.config.attempts, _NO_ANSWER_ATTEMPTS) if no_answer else self.config.attempts
                if verdict.remedy is Remedy.DOUBT or failures >= attempts:
                    self._doubt(body, refused, served, f"{failures} attempts" if failures > 1 else "")
            if self._closed.wait(_backoff(failures) * random.uniform(0.5, 1.0)):
                raise Closed

    def _attempt(self, request: Request, key: str, body: dict[str, Any], waits: int = 0) -> Answer:
        claim = self.ledger.claim(key, body, self._closed)
        if claim.response is not None:  # another thread or process asked the same meanwhile
            return self._read(request, claim, paid=False)
        sent = time.monotonic()
        try:
            response = self._connection.send(body)
        except Refused as refused:
            verdict = refused.verdict
            if verdict.remedy in (Remedy.WAIT, Remedy.RETRY):
                hold = verdict.after or (_backoff(waits + 1) if verdict.remedy is Remedy.WAIT else None)
                outlasts = verdict.remedy is Remedy.WAIT and hold is not None and hold > self.config.patience
                self._limit.failed(sent, None if outlasts else hold, verdict.reason[:120])
            self.ledger.release(claim, lost=verdict.billed, response=refused.response)
            raise
        except UserError:
            self.ledger.release(claim, lost=False)
            raise
        except BaseException:  # the server may have done the work and may bill it
            self.ledger.release(claim, lost=True)
            raise
        settled = self.ledger.settle(claim, response)
        self._limit.succeeded()
        try:
            answer = self._read(request, settled, paid=True)
        except NoLogprobs as failure:
            advice = "it gives no logprobs: use --mode rating, or another server or model"
            raise Refused(Verdict(Remedy.DOUBT, str(failure), advice), claim) from failure
        except RequestFailed:
            self._serves()
            raise
        self._serves()
        return answer

    def _serves(self) -> None:
        """Notes that a request was answered."""
        with self._news:
            self._served += 1
            self._news.notify_all()

    def _doubt(self, body: dict[str, Any], refused: Refused, served: int, note: str) -> NoReturn:
        """Raises RequestFailed if other requests are answered after this one was sent, else UserError.

        Waits for the others; if none is left that could tell, or several are in doubt, a probe tells: the same request
        with a harmless question. served: `_served` when this request was sent.
        """
        try:
            if not self._others_served(served):
                try:
                    works = self._probe(body)
                finally:
                    with self._news:
                        self._probing = False
                if not works:
                    raise self._stop(refused.verdict, note) from refused
                self._serves()
        except (UserError, Closed):
            if refused.claim is not None:  # paid, but of no use: a run that can use another answer asks again
                self.ledger.release(refused.claim, lost=True)
            raise
        raise RequestFailed(refused.verdict.reason + (f" ({note})" if note else "")) from refused

    def _others_served(self, served: int) -> bool:
        """True as soon as another request is answered; False if the caller has to send a probe."""
        with self._news:
            self._doubting += 1
            self._news.notify_all()
            try:
                while self._served == served:
                    if self._stopped is not None:
                        raise self._stopped
                    if self._closed.is_set():
                        raise Closed
                    if not self._probing and (self._doubting == self._asking or self._doubting >= _DOUBTS):
                        self._probing = True
                        return False
                    self._news.wait(0.2)
                return True
            finally:
                self._doubting -= 1

    def _probe(self, body: dict[str, Any]) -> bool:
        """Whether the server answers the same request with a harmless question."""
        harmless = body | {"messages": [{"role": "user", "content": "Answer with the word yes."}]}
        for attempt in range(_PROBE_ATTEMPTS):
            claim = self.ledger.claim(sha256_json({"probe": uuid.uuid4().hex}), harmless, self._closed)
            try:
                response = self._connection.send(harmless)
            except Refused as refused:
                self.ledger.release(claim, lost=refused.verdict.billed, response=refused.response)
                if refused.verdict.remedy is not Remedy.RETRY:
                    return False
            except BaseException:
                self.ledger.release(claim, lost=True)
                raise
            else:
                self.ledger.settle(claim, response)
                try:
                    chat.read(Request([], 1, logprobs=bool(body.get("logprobs"))), response, self.model, paid=True)
                except RequestFailed:
                    return False
                return True
            if self._closed.wait(_backoff(attempt + 1)):
                raise Closed
        return False

    def _stop(self, verdict: Verdict, note: str = "") -> UserError:
        """What stops the run, in one line; also told to all other requests."""
        models = f"; {self._connection.models()}" if "HTTP 404" in verdict.reason else ""
        error = UserError(
            f"{self.config.base_url or self.server}: {verdict.reason}"
            + (f" ({note})" if note else "")
            + models
            + (f"; {verdict.advice}" if verdict.advice else "")
            + f"; answers so far are in {self.ledger.path}: run the same command again to go on"
        )
        with self._news:
            self._stopped = self._stopped or error
            self._news.notify_all()
            return self._stopped

    def ask_all(
        self, requests: Iterable[Request], *, progress: Progress | None = None
    ) -> Iterator[Answer | RequestFailed]:
        """Answers in the order of the requests, several in flight; a failed one is yielded, not raised.

        After an error (or if the caller stops early) the client sends nothing more. Raises UserError if more than
        config.max_failed of the requests failed.
        """
        if self.config.batch:
            yield from self._ask_batch(list(requests), progress)
            return
        total = len(requests) if isinstance(requests, Sized) else None
        pending: collections.deque[concurrent.futures.Future[Answer | RequestFailed]] = collections.deque()
        asked = failed = 0
        reason = ""
        try:
            waiting = iter(requests)
            ended = False
            while pending or not ended:
                while not ended and len(pending) < 2 * self._limit.maximum:
                    if (request := next(waiting, None)) is None:
                        ended = True
                    else:
                        pending.append(self._start(request))
                if not pending:
                    break
                answer = self._next(pending)
                asked += 1
                if progress is not None:
                    progress.advance(note=self._note(None if total is None else total - asked))
                if isinstance(answer, RequestFailed):
                    failed, reason = failed + 1, str(answer)
                if asked >= _SHARE_FROM or (ended and not pending and asked > 1):
                    self._check_share(failed, asked, reason)
                yield answer
        except Exception:
            self._closed.set()
            concurrent.futures.wait(pending)  # what is in flight is still received: it is paid for
            raise
        except BaseException:  # Ctrl-C: what is in flight counts as lost
            self._closed.set()
            raise

    def _check_share(self, failed: int, asked: int, reason: str) -> None:
        if failed > self.config.max_failed * asked:
            raise UserError(
                f"{self.config.base_url or self.server}: {failed} of {asked} requests failed, the last with: {reason}; "
                "mend that and run the same command again, or accept it with a higher --max-failed"
            )

    def _start(self, request: Request) -> "concurrent.futures.Future[Answer | RequestFailed]":
        future: concurrent.futures.Future[Answer | RequestFailed] = concurrent.futures.Future()

        def work() -> None:
            try:
                future.set_result(self.ask(request))
            except RequestFailed as failure:
                future.set_result(failure)
            except BaseException as error:
                if isinstance(error, UserError):
                    with self._news:
                        self._stopped = self._stopped or error
                    self._closed.set()
                future.set_exception(error)

        # Not a ThreadPoolExecutor: the interpreter would wait for its threads, after Ctrl-C for minutes.
        threading.Thread(target=work, name="llm", daemon=True).start()
        return future

    def _next(self, pending: "collections.deque[Any]") -> Answer | RequestFailed:
        try:
            return pending.popleft().result()
        except Closed:
            if self._stopped is None:
                raise
            raise self._stopped from None

    def _note(self, left: int | None) -> str:
        """How much is in flight, what was paid in this run, and what it will come to if the `left` requests cost as
        much each.
        """
        with self._lock:
            paid = self._paid.copy()
        notes = [f"{self._limit.value} in flight"] if self._limit.maximum > 2 else []
        if paid["requests"]:
            tokens, usd = paid["prompt_tokens"] + paid["completion_tokens"], paid["usd_billionths"] / 1e9
            notes.append(f"{tokens:,} tokens" + (f", ${usd:,.2f}" if usd else ""))
            if usd and left:
                notes.append(f"about ${usd * (1 + left / paid['requests']):,.2f} in all")
        return ", ".join(notes)

    def _ask_batch(self, requests: list[Request], progress: Progress | None) -> Iterator[Answer | RequestFailed]:
        """`ask_all` through the server's Batch API."""
        keys = [self.key(request) for request in requests]
        new = {
            key: request.body(self.model)
            for key, request in zip(keys, requests, strict=True)
            if not self._is_known(request, key)
        }
        failures = self._batches.ask(new)
        failed = 0
        for asked, (key, request) in enumerate(zip(keys, requests, strict=True), 1):
            try:
                claim = self.ledger.find(key)
                if claim is None:
                    raise RequestFailed(failures.get(key, "not answered"))
                answer: Answer | RequestFailed = self._read(request, claim, paid=key in new)
            except RequestFailed as failure:
                answer, failed = failure, failed + 1
            if progress is not None:
                progress.advance(note=self._note(len(requests) - asked))
            if asked >= _SHARE_FROM or asked == len(requests) > 1:
                self._check_share(failed, asked, str(answer))
            yield answer


def _backoff(times: int) -> float:
    """Seconds to wait after the `times`-th failure, where the server names none: doubling from half a second."""
    return min(0.5 * 2 ** min(times - 1, 20), _MAX_BACKOFF)
