"""OpenAI's Batch API under the ledger: many requests at half the price, answered within a day.

    failures = Batches(...).ask(bodies)        # what is not among the failures is in the ledger

A batch's life: its calls and its token are written down (`Ledger.begin_batch`: their worst price must fit the budget),
its requests are uploaded as a file, it is created with the token as metadata, and the server's name for it is written
down. From then on the same command finds it and waits for it, whatever ended the command before: no request is
submitted twice. A batch of which it is not known whether it was created is looked for by its token among the server's.

When a batch is over (completed, failed, expired, cancelled) its output and error files are read into the ledger, line
by line: an answer is settled at what it cost, a refusal looked up in `provider_errors`, and what was not run is asked
again in the next batch. What the server says nothing about stays counted at its bound.
"""

import collections
import dataclasses
import itertools
import json
import pathlib
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from data_tools.chat import Refused, answer_in
from data_tools.ledger import Claim, Closed, Ledger, OpenBatch
from data_tools.llm_connection import Connection, fetched
from data_tools.provider_errors import Remedy, Verdict, one_line, sort
from phi1.errors import UserError
from phi1.progress import Progress

if TYPE_CHECKING:
    import openai

T = TypeVar("T")
MAX_REQUESTS = 50_000  # in a batch, and
MAX_BYTES = 200_000_000  # in its file: OpenAI's limits
_METADATA = "phi1_batch"
_OVER = ("completed", "failed", "expired", "cancelled")
_POLL = (5.0, 60.0)  # seconds between two looks, at first and at most
_BACKOFF = (1.0, 60.0)  # seconds after a failed call, at first and at most
_LOOKS = 3  # for a batch that may have been created, before it counts as not
_ROUNDS = 3  # batches in which a request may fail without a reason of its own
_SLOW = 20  # times the timeout that moving a file may take
_TOGETHER = 1000  # lines of a file read into the ledger in one transaction
_NOT_RUN = ("batch_expired", "batch_cancelled")
_QUEUE_FULL = "token_limit_exceeded"


class Batches:
    """For the lifetime of a client. price: share of the full price that a request costs in a batch. patience: seconds
    that the server may be out of reach. closed: set when the client is to stop. again: what a user is told about going
    on."""

    def __init__(
        self,
        ledger: Ledger,
        connection: Connection,
        server: str,
        *,
        price: float,
        patience: float,
        closed: threading.Event,
    ) -> None:
        self._ledger, self._connection, self._server = ledger, connection, server
        self._price, self._patience, self._closed = price, patience, closed
        self._largest = MAX_REQUESTS
        self._together = True  # whether the server's queue takes all batches at once
        self._rounds: collections.Counter[str] = collections.Counter()
        self._failures: dict[str, str] = {}
        self._progressed = False

    def ask(self, bodies: Mapping[str, dict[str, Any]], *, quiet: bool = False) -> dict[str, str]:
        """Asks everything of `bodies` (key -> body) that the ledger does not hold; returns key -> reason of what
        failed.

        Raises UserError for a spent budget or account, a server without batches, a batch that the server refuses. What
        was submitted is waited for when the same command is run again, also after Ctrl-C.
        """
        wanted = {key: body for key, body in bodies.items() if key not in self._failures}
        over: UserError | None = None
        with _Watch(len(wanted), quiet) as watch:
            while rest := self._unanswered(wanted):
                batches = self._ledger.open_batches(rest)
                under_way = {key for batch in batches for key in self._ledger.batch_calls(batch.token)}
                new = {key: body for key, body in rest.items() if key not in under_way}
                if new and over is None and (self._together or not batches):
                    try:
                        if not self._submit(new, watch):
                            self._pause(0.2)  # another process asks the rest at the moment
                    except UserError as error:
                        if not batches:
                            raise
                        over = error  # what is under way is waited for, and may leave room in the budget
                    continue
                self._progressed, over = False, None
                ended = self._wait(rest, watch, len(wanted) - len(rest))
                for batch, told in ended:
                    self._collect(batch, told)
                if not self._progressed:
                    statuses = ", ".join(f"{told.id} {told.status}" for _, told in ended)
                    raise self._error(f"{statuses}: nothing in it was answered", "look at it on the provider's page")
        return {key: reason for key, reason in self._failures.items() if key in bodies}

    def _unanswered(self, wanted: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        known = self._ledger.known(wanted)
        return {key: body for key, body in wanted.items() if key not in known and key not in self._failures}

    def _error(self, what: str, advice: str = "") -> UserError:
        return UserError(
            f"{self._server}: {what}"
            + (f"; {advice}" if advice else "")
            + f"; answers so far are in {self._ledger.path}: run the same command again to go on"
        )

    def _pause(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise Closed

    def _call(self, ask: "Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, T]]", what: str, *, slow: int = 1) -> T:
        """What the server answers. While it is out of reach, or its limits are, it is asked again, up to `patience`
        seconds."""
        since, wait = time.monotonic(), _BACKOFF[0]
        while True:
            try:
                return self._connection.call(ask, slow=slow)
            except Refused as refused:
                verdict = refused.verdict
                if verdict.remedy not in (Remedy.WAIT, Remedy.RETRY):
                    raise self._refusal(verdict, what) from refused
                wait = self._pause_before_retry(refused, what, since, wait)

    def _pause_before_retry(self, refused: Refused, what: str, since: float, wait: float) -> float:
        """Waits `wait` seconds, or as long as the server says, and returns how long to wait the next time. since: when
        it was asked first.
        """
        pause = refused.verdict.after or wait
        if time.monotonic() - since + pause > self._patience:
            raise self._error(
                f"{what}: {refused.verdict.reason}, for longer than --patience {self._patience:g} s"
            ) from refused
        self._pause(pause)
        return min(2 * wait, _BACKOFF[1])

    def _refusal(self, verdict: Verdict, what: str) -> UserError:
        known = verdict.remedy is Remedy.STOP or "HTTP 401" in verdict.reason or "HTTP 403" in verdict.reason
        if "HTTP 404" in verdict.reason or "HTTP 405" in verdict.reason:
            return self._error(
                f"{what}: {verdict.reason}",
                "a server without batches is asked without --batch; a batch is found with the key that made it",
            )
        return self._error(f"{what}: {verdict.reason}", verdict.advice if known else "")

    # Submitting.

    def _submit(self, bodies: Mapping[str, dict[str, Any]], watch: "_Watch") -> int:
        """Submits what of `bodies` fits the budget, in as few batches as there can be; returns how many requests."""
        waiting, submitted = list(bodies), 0
        while waiting:
            chunk: dict[str, dict[str, Any]] = {}
            size = 0
            for key in waiting[: self._largest]:
                size += len(self._line(key, bodies[key]))
                if size > MAX_BYTES and chunk:
                    break
                chunk[key] = bodies[key]
            token = uuid.uuid4().hex
            taken = self._ledger.begin_batch(token, chunk, self._price)
            if taken:
                self._create(token, bodies, taken, time.time(), watch)
                submitted += len(taken)
            if len(taken) < len(chunk) or not self._together:
                break
            waiting = waiting[len(chunk) :]
        return submitted

    def _line(self, key: str, body: dict[str, Any]) -> bytes:
        request = {
            "custom_id": key,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": self._connection.named(body),
        }
        return json.dumps(request).encode() + b"\n"

    def _create(
        self, token: str, bodies: Mapping[str, dict[str, Any]], keys: list[str], started: float, watch: "_Watch"
    ) -> None:
        """Uploads a batch and creates it, once."""
        with tempfile.TemporaryDirectory(prefix="phi1-batch-") as folder:
            path = pathlib.Path(folder) / f"phi1-{token}.jsonl"
            with open(path, "wb") as file:
                file.writelines(self._line(key, bodies[key]) for key in keys)
            try:
                uploaded = self._call(
                    lambda client: client.files.create(file=path, purpose="batch"), "uploading a batch", slow=_SLOW
                )
            except UserError:
                self._drop(token)
                raise
        since, wait, sent = time.monotonic(), _BACKOFF[0], False
        while True:
            # Whether a call that broke off has created the batch is seen in the server's list.
            found = self._find(token, started) if sent else None
            if found is not None:
                break
            try:
                found = self._connection.call(
                    lambda client: client.batches.create(
                        input_file_id=uploaded.id,
                        endpoint="/v1/chat/completions",
                        completion_window="24h",
                        metadata={_METADATA: token},
                    )
                )
                break
            except Refused as refused:
                verdict = refused.verdict
                if verdict.remedy not in (Remedy.WAIT, Remedy.RETRY):
                    self._drop(token)
                    raise self._refusal(verdict, "creating a batch") from refused
                sent = True
                wait = self._pause_before_retry(refused, "creating a batch", since, wait)
        self._ledger.batch_is(token, found.id)
        watch.say(
            f"{found.id}: {len(keys):,} requests submitted; Ctrl-C is safe: the same command goes on waiting for them"
        )

    def _find(self, token: str, started: float) -> Any:
        """The server's batch with this token, None if it has none after several looks."""

        async def look(client: "openai.AsyncOpenAI") -> Any:
            async for batch in client.batches.list(limit=100):
                if (batch.metadata or {}).get(_METADATA) == token:
                    return batch
                if batch.created_at < started - 86400:  # the newest come first; clocks may differ
                    return None
            return None

        for last in range(_LOOKS):
            found = self._call(look, "looking for a batch")
            if found is not None:
                return found
            if last < _LOOKS - 1:
                self._pause(_BACKOFF[0])
        return None

    def _drop(self, token: str) -> None:
        """Forgets a batch that did not come to be: nothing of it is billed."""
        with self._ledger.together():
            for claim in self._ledger.batch_calls(token).values():
                self._ledger.release(claim, lost=False)
            self._ledger.end_batch(token)

    # Waiting.

    def _wait(self, keys: Collection[str], watch: "_Watch", done: int) -> list[tuple[OpenBatch, Any]]:
        """The batches with these keys that are over, as soon as one is, and what the server says of them."""
        pause = _POLL[0]
        while batches := self._ledger.open_batches(keys):
            ended, counted, states = [], done, collections.Counter[str]()
            for batch in batches:
                told = self._look(batch)
                states[told.status if told else "being created"] += 1
                if told and told.request_counts:
                    counted += told.request_counts.completed + told.request_counts.failed
                if told and told.status in _OVER:
                    ended.append((batch, told))
            watch.report(counted, states, self._ledger.spent())
            if ended:
                return ended
            self._pause(pause)
            pause = min(1.5 * pause, _POLL[1])
        self._progressed = True  # another process has collected them, or they did not come to be
        return []

    def _look(self, batch: OpenBatch) -> Any:
        if batch.id is not None:
            return self._call(lambda client: client.batches.retrieve(batch.id or ""), f"waiting for {batch.id}")
        if batch.making:
            return None
        # Its maker was killed between writing it down and hearing of its creation.
        self._ledger.adopt_batch(batch.token)
        found = self._find(batch.token, batch.started)
        if found is None:
            self._drop(batch.token)
        else:
            self._ledger.batch_is(batch.token, found.id)
        return found

    # Collecting.

    def _collect(self, batch: OpenBatch, told: Any) -> None:
        """Reads a batch that is over into the ledger."""
        calls = self._ledger.batch_calls(batch.token)
        # Else it was read in part before.
        whole = told.request_counts is None or len(calls) == told.request_counts.total
        self._progressed = self._progressed or not calls
        doubts: dict[str, Verdict] = {}
        stop: Verdict | None = None
        unknown = answered = 0
        records = self._records(told)
        while chunk := list(itertools.islice(records, _TOGETHER)):
            with self._ledger.together():
                for record in chunk:
                    key = str(record.get("custom_id")) if isinstance(record, dict) else ""
                    if key not in calls:
                        unknown += 1
                    elif (verdict := self._read(calls.pop(key), record)) is None:
                        answered += 1
                    elif verdict.remedy is Remedy.STOP:
                        stop = verdict
                    elif verdict.remedy is Remedy.DOUBT:
                        doubts[key] = verdict
                    else:
                        self._unserved(key, verdict)
        with self._ledger.together():
            for key, claim in calls.items():
                # Of a batch that was refused whole nothing ran; of another, what has no line may have been billed.
                self._ledger.release(claim, lost=told.status != "failed")
                if told.status == "completed":
                    self._again(key, f"{told.id} completed without a word on it")
            self._ledger.end_batch(batch.token)
        self._progressed = self._progressed or answered > 0
        if unknown and whole:
            print(
                f"warning: {told.id}: {unknown:,} lines that answer nothing that was asked are left out",
                file=sys.stderr,
            )
        if stop is not None:
            raise self._error(stop.reason, stop.advice)
        if doubts and not answered:
            verdict = next(iter(doubts.values()))
            raise self._error(f"{told.id}: {verdict.reason}", verdict.advice)
        for key, verdict in doubts.items():
            self._fail(key, verdict.reason)
        if told.status == "failed":
            self._refused_whole(told, len(calls))

    def _read(self, claim: Claim, record: dict[str, Any]) -> Verdict | None:
        """Settles a call by its line; returns what to do if it was not answered."""
        response, error = record.get("response"), record.get("error")
        if isinstance(response, dict):
            status, text = response.get("status_code"), json.dumps(response.get("body"))
            if status == 200:
                try:
                    self._ledger.settle(claim, answer_in(text.encode()))
                    return None
                except Refused as refused:
                    self._ledger.release(claim, lost=True, response=refused.response)
                    return dataclasses.replace(refused.verdict, billed=True)
            verdict = sort(status if isinstance(status, int) else 500, {}, text)
        elif isinstance(error, dict) and error.get("code") in _NOT_RUN:
            verdict = Verdict(Remedy.WAIT, str(error.get("message") or error["code"]))
        else:
            verdict = Verdict(Remedy.RETRY, one_line(json.dumps(error))[:200], billed=True)
        self._ledger.release(claim, lost=verdict.billed)
        return verdict

    def _unserved(self, key: str, verdict: Verdict) -> None:
        """What becomes of a request that was not served, and of which it is clear whose fault that is."""
        if verdict.remedy is Remedy.REQUEST:
            self._fail(key, verdict.reason)
        elif verdict.remedy is Remedy.RENAME:
            self._connection.rename()
            self._again(key, verdict.reason)
        elif verdict.remedy is Remedy.RETRY:
            self._again(key, verdict.reason)

    def _fail(self, key: str, reason: str) -> None:
        self._failures[key] = reason
        self._progressed = True

    def _again(self, key: str, reason: str) -> None:
        """Lets a request be asked in the next batch, or gives it up."""
        self._rounds[key] += 1
        self._progressed = True
        if self._rounds[key] >= _ROUNDS:
            self._fail(key, f"{reason} ({_ROUNDS} batches)")

    def _refused_whole(self, told: Any, requests: int) -> None:
        errors = (told.errors.data if told.errors else None) or []
        reason = one_line(
            "; ".join(
                f"{error.message} (line {error.line})" if error.line else str(error.message) for error in errors[:3]
            )
        )
        if not any(error.code == _QUEUE_FULL for error in errors):
            raise self._error(f"{told.id} was refused: {reason or 'no reason given'}")
        if requests <= 1:
            raise self._error(f"{told.id} was refused: {reason}", "wait until the account's other batches are over")
        # The account's queue is too small for it: halve it, one at a time.
        self._largest, self._together, self._progressed = requests // 2, False, True

    def _records(self, told: Any) -> Iterator[Any]:
        """The lines of a batch's output and error files, as JSON; None for one that is none."""
        with tempfile.TemporaryDirectory(prefix="phi1-batch-") as folder:
            for number, id in enumerate(filter(None, (told.output_file_id, told.error_file_id))):
                path = pathlib.Path(folder) / f"{number}.jsonl"
                self._call(lambda client, id=id, path=path: fetched(client, id, path), f"fetching {id}", slow=_SLOW)  # type: ignore[misc]
                with open(path, "rb") as file:
                    for line in file:
                        if line.strip():
                            try:
                                yield json.loads(line)
                            except (ValueError, RecursionError):
                                yield None


class _Watch:
    """The progress of batches."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet = total, quiet
        self._progress: Progress | None = None

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._progress is not None:
            self._progress.close()

    def say(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)

    def report(self, done: int, states: Mapping[str, int], spent: tuple[int, float]) -> None:
        if self._progress is None:
            self._progress = Progress("batch", self._total, "requests", quiet=self._quiet)
        told = ", ".join(f"{count} {state}" for state, count in states.items())
        self._progress.report(done, self._total, f"{told}; at most {spent[0]:,} tokens, ${spent[1]:,.2f}")
