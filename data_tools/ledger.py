"""The ledger of LLM requests: what was asked, what came back, what it cost. One SQLite file.

A call is `open` (sent, its price reserved at an upper bound), `done` (answered, its price as billed) or `lost` (no
answer that could be used, but the server may bill it: what was counted stays counted). Only one call per key is open
or done, over all threads and processes, so nothing is paid for twice; the totals move in the same transaction as the
call, so the budget holds for all of them together.

What is not known is counted high: a call whose end nobody saw, or that was answered with something that is no answer,
at its bound; a `usage` without a number at the bound of that number. Where a server bills more than the bound (it adds
a prompt of its own), the bound of all later calls is raised by as much.

Calls that are asked together, in a batch that the server works off within a day, carry the batch's token. They stay
open whatever becomes of the process, until what the server says of the batch settles them. A batch is written down,
with its calls, before the server hears of it, and under its token (its metadata at the server) it is found again.
"""

import dataclasses
import json
import os
import pathlib
import sqlite3
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from phi1.errors import UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL, state TEXT NOT NULL, pid INTEGER NOT NULL, started REAL NOT NULL,
  prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, usd REAL NOT NULL,
  request TEXT NOT NULL, response TEXT, batch TEXT);
CREATE UNIQUE INDEX IF NOT EXISTS live ON calls (key) WHERE state IN ('open', 'done');
CREATE INDEX IF NOT EXISTS in_flight ON calls (started) WHERE state = 'open';
CREATE TABLE IF NOT EXISTS batches (
  token TEXT PRIMARY KEY, id TEXT, pid INTEGER NOT NULL, started REAL NOT NULL, discount REAL NOT NULL,
  scope TEXT NOT NULL, over INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS totals (one INTEGER PRIMARY KEY CHECK (one = 1), tokens INTEGER NOT NULL, usd REAL NOT NULL);
INSERT OR IGNORE INTO totals VALUES (1, 0, 0.0);
CREATE TABLE IF NOT EXISTS scopes (scope TEXT PRIMARY KEY, tokens INTEGER NOT NULL, usd REAL NOT NULL);
"""
_BATCH_COLUMN = "ALTER TABLE calls ADD COLUMN batch TEXT"  # ledgers from before there were batches have none
_OVERHEAD = 64  # tokens that a chat template adds
_LARGEST_COUNT = 1 << 40  # of tokens: what is more is no count


@dataclasses.dataclass(frozen=True)
class Claim:
    """The right to send a request (response is None), or its answer from the ledger. price: share of the full price
    that it costs. scope: whose budget it is on, if not this ledger's."""

    id: int
    response: dict[str, Any] | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    price: float = 1.0
    scope: str | None = None


@dataclasses.dataclass(frozen=True)
class OpenBatch:
    """A batch that is not over. id: the server's name for it, None if it may not have come to be. making: whether
    another process that lives is at work on that."""

    token: str
    id: str | None
    started: float
    making: bool


class Closed(Exception):
    """The client was closed while a request waited for another one."""


class Ledger:
    """Opened for many threads; many processes may open the same file.

    scope: what the budget is counted over: calls of the same scope ("": all calls of the file). usd_per_token: (prompt,
    completion). budget_tokens, budget_usd: the totals of the scope never pass them. stale_after: seconds after which
    an open call of another process is given up as lost.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        scope: str = "",
        usd_per_token: tuple[float, float] = (0.0, 0.0),
        budget_tokens: int | None = None,
        budget_usd: float | None = None,
        stale_after: float = 600.0,
    ) -> None:
        self.path, self._scope = path, scope
        self._prices, self._stale_after = usd_per_token, stale_after
        self._budget_tokens, self._budget_usd = budget_tokens, budget_usd
        self._lock = threading.RLock()
        self._mine: set[int] = set()  # open calls of this ledger object
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.executescript(_SCHEMA)
            with self._transaction():
                if "batch" not in [row[1] for row in self._database.execute("PRAGMA table_info(calls)")]:
                    self._database.execute(_BATCH_COLUMN)
                self._database.execute("CREATE INDEX IF NOT EXISTS batched ON calls (batch) WHERE batch IS NOT NULL")
            self._database.execute("INSERT OR IGNORE INTO scopes VALUES (?, 0, 0.0)", (scope,))
            # How far bills have passed the bounds: (prompt, completion) tokens.
            row = self._database.execute(
                "SELECT max(prompt_tokens - length(CAST(request AS BLOB)) - ?), "
                "max(completion_tokens - json_extract(request, '$.max_tokens')) FROM calls WHERE state = 'done'",
                (_OVERHEAD,),
            ).fetchone()
            self._excess = max(0, row[0] or 0), max(0, row[1] or 0)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path}: not a ledger of LLM requests ({error}); name another file (--ledger)") from error

    def close(self) -> None:
        """Closes the file; calls of this object that are still open are lost: they stay counted at their bound."""
        with self._transaction():
            for call in self._mine:
                self._database.execute("UPDATE calls SET state = 'lost' WHERE id = ?", (call,))
        with self._lock:
            self._database.close()

    def spent(self) -> tuple[int, float]:
        """Tokens and US dollars of all calls, open and lost ones at their bound."""
        with self._lock:
            return self._totals()

    def find(self, key: str) -> Claim | None:
        """The answer to a request that was made before, and what it cost; or None."""
        with self._lock:
            row = self._database.execute(
                "SELECT id, response, prompt_tokens, completion_tokens, usd FROM calls WHERE key = ? AND state IN "
                "('open', 'done') AND state = 'done'",
                (key,),
            ).fetchone()
        return None if row is None else Claim(row[0], _loaded(row[1]), *row[2:])

    def forget(self, key: str) -> None:
        """Lets a request be asked again: its answer goes, what was paid for it stays counted."""
        with self._transaction():
            self._database.execute(
                "UPDATE calls SET state = 'lost' WHERE key = ? AND state IN ('open', 'done') AND state = 'done'", (key,)
            )

    def claim(self, key: str, body: dict[str, Any], closed: threading.Event) -> Claim:
        """The answer to `body` if the ledger has it, else the right to ask; waits while another asks the same.

        Raises UserError, before anything is sent, if the call could pass the budget (and will even when the
        calls in flight have settled); Closed if `closed` is set while waiting.
        """
        request = json.dumps(body, sort_keys=True, ensure_ascii=False)
        while True:
            with self._transaction():
                row = self._database.execute(
                    "SELECT id, state, batch, response, prompt_tokens, completion_tokens, usd FROM calls "
                    "WHERE key = ? AND state IN ('open', 'done')",
                    (key,),
                ).fetchone()
                if row is not None and row[1] == "done":
                    return Claim(row[0], _loaded(row[3]), *row[4:])
                if row is not None and row[2] is not None:
                    raise UserError(
                        f"{self.path}: this was asked in a batch that the server may still be at; run the same command "
                        "with --batch to fetch its answers"
                    )
                in_flight = self._in_flight()
                if row is not None and row[0] not in in_flight:
                    self._database.execute("UPDATE calls SET state = 'lost' WHERE id = ?", (row[0],))
                    row = None
                if row is None and (claim := self._reserve(key, request, body["max_tokens"], bool(in_flight))):
                    return claim
            if closed.wait(0.1):
                raise Closed

    def settle(self, claim: Claim, response: dict[str, Any]) -> Claim:
        """Records the answer and replaces the reserved price by the billed one; returns what it came to."""
        prompt, completion = billed(response)
        prompt = claim.prompt_tokens if prompt is None else prompt
        completion = claim.completion_tokens if completion is None else completion
        usd = self._price(prompt, completion) * claim.price
        with self._transaction():
            self._mine.discard(claim.id)
            if self._state(claim) == "done":  # another process read the same batch
                return claim
            self._learn(claim, prompt, completion)
            self._add(prompt + completion - claim.prompt_tokens - claim.completion_tokens, usd - claim.usd, claim.scope)
            # ASCII: half a surrogate pair can be stored too.
            self._database.execute(
                # A call that was taken for lost may have been asked again meanwhile: that one's answer counts.
                "UPDATE calls SET state = iif(EXISTS (SELECT 1 FROM calls AS other WHERE other.key = calls.key "
                "AND other.id <> calls.id AND other.state IN ('open', 'done')), 'lost', 'done'), prompt_tokens = ?, "
                "completion_tokens = ?, usd = ?, response = ? WHERE id = ?",
                (prompt, completion, usd, json.dumps(response), claim.id),
            )
        return Claim(claim.id, response, prompt, completion, usd)

    def _state(self, claim: Claim) -> str | None:
        row = self._database.execute("SELECT state FROM calls WHERE id = ?", (claim.id,)).fetchone()
        return None if row is None else row[0]

    def _learn(self, claim: Claim, prompt: int, completion: int) -> None:
        self._excess = (
            self._excess[0] + max(0, prompt - claim.prompt_tokens),
            self._excess[1] + max(0, completion - claim.completion_tokens),
        )

    def release(self, claim: Claim, *, lost: bool, response: Any = None) -> None:
        """Gives up a claim. lost: what is counted for it stays counted, for it may be billed; else nothing is.
        response: a body that is no answer; where it states a usage above the bound, that is counted."""
        prompt, completion = (
            max(a, b or 0)
            for a, b in zip((claim.prompt_tokens, claim.completion_tokens), billed(response), strict=True)
        )
        with self._transaction():
            self._mine.discard(claim.id)
            counted = self._state(claim) != "open"  # its bill is known, or another process read the same batch
            if lost and not counted and (prompt > claim.prompt_tokens or completion > claim.completion_tokens):
                usd = self._price(prompt, completion) * claim.price
                self._learn(claim, prompt, completion)
                self._add(
                    prompt + completion - claim.prompt_tokens - claim.completion_tokens, usd - claim.usd, claim.scope
                )
                self._database.execute(
                    "UPDATE calls SET prompt_tokens = ?, completion_tokens = ?, usd = ? WHERE id = ?",
                    (prompt, completion, usd, claim.id),
                )
            if lost:
                self._database.execute("UPDATE calls SET state = 'lost' WHERE id = ?", (claim.id,))
            elif self._database.execute("DELETE FROM calls WHERE id = ?", (claim.id,)).rowcount:
                self._add(-claim.prompt_tokens - claim.completion_tokens, -claim.usd, claim.scope)

    # Batches.

    def begin_batch(self, token: str, asked: Mapping[str, dict[str, Any]], price: float) -> list[str]:
        """Writes down a batch of calls, its token, and what they may cost; returns their keys, in order.

        asked: key -> body. price: what a call of a batch costs, as a share of the full price. What is known, or asked
        by others, is left out; so is what does not fit the budget. Raises UserError if less than a tenth fits: each
        batch may take a day, and ever smaller ones would never end.
        """
        taken: list[str] = []
        with self._transaction():
            self._database.execute(
                "INSERT INTO batches (token, pid, started, discount, scope) VALUES (?, ?, ?, ?, ?)",
                (token, os.getpid(), time.time(), price, self._scope),
            )
            in_flight = self._in_flight()
            for key, body in asked.items():
                row = self._database.execute(
                    "SELECT id, state, batch FROM calls WHERE key = ? AND state IN ('open', 'done')", (key,)
                ).fetchone()
                if row is not None and (row[1] == "done" or row[2] is not None or row[0] in in_flight):
                    continue
                if row is not None:
                    self._database.execute("UPDATE calls SET state = 'lost' WHERE id = ?", (row[0],))
                request = json.dumps(body, sort_keys=True, ensure_ascii=False)
                enough = bool(taken) and len(taken) >= len(asked) / 10
                if self._reserve(key, request, body["max_tokens"], wait=enough, batch=token, price=price) is None:
                    break
                taken.append(key)
            if not taken:
                self._database.execute("DELETE FROM batches WHERE token = ?", (token,))
        return taken

    def batch_is(self, token: str, id: str) -> None:
        """Notes the server's name for a batch."""
        with self._transaction():
            self._database.execute("UPDATE batches SET id = ? WHERE token = ?", (id, token))

    def adopt_batch(self, token: str) -> None:
        """Takes over the making of a batch from a process that is gone."""
        with self._transaction():
            self._database.execute(
                "UPDATE batches SET pid = ?, started = ? WHERE token = ?", (os.getpid(), time.time(), token)
            )

    def end_batch(self, token: str) -> None:
        """Notes that nothing more comes of a batch: its open calls have been settled or released."""
        with self._transaction():
            self._database.execute("UPDATE batches SET over = 1 WHERE token = ?", (token,))

    def open_batches(self, keys: Collection[str]) -> list[OpenBatch]:
        """The batches that are not over and hold one of these keys."""
        with self._lock:
            rows = self._database.execute(
                "SELECT token, id, pid, started FROM batches WHERE over = 0 ORDER BY started, token"
            ).fetchall()
            mine = os.getpid()
            return [
                OpenBatch(token, id, started, pid != mine and alive(pid) and time.time() - started < self._stale_after)
                for token, id, pid, started in rows
                if any(
                    key in keys for (key,) in self._database.execute("SELECT key FROM calls WHERE batch = ?", (token,))
                )
            ]

    def batch_calls(self, token: str) -> dict[str, Claim]:
        """Key -> claim of a batch's calls that are still open."""
        with self._lock:
            rows = self._database.execute(
                "SELECT key, calls.id, prompt_tokens, completion_tokens, usd, discount, scope FROM calls "
                "JOIN batches ON batch = token WHERE batch = ? AND state = 'open' ORDER BY calls.id",
                (token,),
            ).fetchall()
        return {key: Claim(id, None, *counts) for key, id, *counts in rows}

    def _in_flight(self) -> set[int]:
        """Calls that may be answered soon: sent not long ago, in no batch, by a process that lives."""
        rows = self._database.execute(
            "SELECT id, pid, started FROM calls WHERE state = 'open' AND batch IS NULL"
        ).fetchall()
        return {id for id, pid, started in rows if time.time() - started < self._stale_after and alive(pid)}

    def _reserve(
        self, key: str, request: str, max_tokens: int, wait: bool, batch: str | None = None, price: float = 1.0
    ) -> Claim | None:
        """A claim; None if it does not fit the budget now but may when a call in flight settles (`wait`)."""
        # A token is at least one byte, and the JSON text holds the roles and the schema as well.
        # About four times too high for code, but only for calls in flight.
        prompt = len(request.encode()) + _OVERHEAD + self._excess[0]
        max_tokens += self._excess[1]
        usd = self._price(prompt, max_tokens) * price
        tokens, spent = self._totals()
        over_tokens = self._budget_tokens is not None and tokens + prompt + max_tokens > self._budget_tokens
        over_usd = self._budget_usd is not None and spent + usd > self._budget_usd
        if (over_tokens or over_usd) and wait:
            return None
        if over_tokens or over_usd:
            limit = f"{self._budget_tokens:,} tokens" if over_tokens else f"${self._budget_usd:,.4f}"
            option = "--budget-tokens" if over_tokens else "--budget-usd"
            raise UserError(
                f"the budget of {limit} would be passed: {tokens:,} tokens (${spent:,.4f}) are spent and "
                f"the next request may take {prompt + max_tokens:,} (${usd:,.4f}); answers so far are in {self.path}: "
                f"raise {option} and run the same command again to go on"
            )
        self._add(prompt + max_tokens, usd)
        row = self._database.execute(
            "INSERT INTO calls (key, state, pid, started, prompt_tokens, completion_tokens, usd, request, batch) "
            "VALUES (?, 'open', ?, ?, ?, ?, ?, ?, ?)",
            (key, os.getpid(), time.time(), prompt, max_tokens, usd, request, batch),
        )
        assert row.lastrowid is not None
        if batch is None:
            self._mine.add(row.lastrowid)
        return Claim(row.lastrowid, None, prompt, max_tokens, usd, price)

    def _price(self, prompt: int, completion: int) -> float:
        return prompt * self._prices[0] + completion * self._prices[1]

    def _totals(self) -> tuple[int, float]:
        query = "SELECT tokens, usd FROM scopes WHERE scope = ?" if self._scope else "SELECT tokens, usd FROM totals"
        tokens, usd = self._database.execute(query, (self._scope,) if self._scope else ()).fetchone()
        return tokens, usd

    def _add(self, tokens: int, usd: float, scope: str | None = None) -> None:
        self._database.execute("UPDATE totals SET tokens = tokens + ?, usd = max(0.0, usd + ?)", (tokens, usd))
        self._database.execute(
            "UPDATE scopes SET tokens = tokens + ?, usd = max(0.0, usd + ?) WHERE scope = ?",
            (tokens, usd, self._scope if scope is None else scope),
        )

    def known(self, keys: Iterable[str]) -> set[str]:
        """Those of the requests that have an answer."""
        query = "SELECT 1 FROM calls WHERE key = ? AND state IN ('open', 'done') AND state = 'done'"
        with self.together():
            return {key for key in keys if self._database.execute(query, (key,)).fetchone()}

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside of the block is one transaction, and all undone if it raises: a thousand calls settle in
        the time of a few."""
        with self._transaction():
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """One write transaction over all processes, or a part of the one that this thread is in; rolled back if the
        block raises."""
        with self._lock:
            if self._database.in_transaction:
                yield
                return
            try:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    yield
                except BaseException:
                    if self._database.in_transaction:  # SQLite may have rolled back itself, e.g. on a full disk
                        self._database.execute("ROLLBACK")
                    raise
                self._database.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                raise UserError(
                    f"{self.path}: the ledger cannot be written ({error}); free space or name another file (--ledger)"
                ) from error


def asked_of_others(path: pathlib.Path, model: str) -> bool:
    """Whether a ledger holds a call of another model."""
    return _any(path, "SELECT 1 FROM calls WHERE json_extract(request, '$.model') IS NOT ? LIMIT 1", model)


def has_spent(path: pathlib.Path, scope: str) -> bool:
    """Whether a ledger holds calls of a scope that cost anything."""
    return _any(path, "SELECT 1 FROM scopes WHERE scope = ? AND tokens > 0", scope)


def _any(path: pathlib.Path, query: str, value: str) -> bool:
    """Whether a ledger that is there has such a row."""
    try:
        with closing(sqlite3.connect(path, timeout=60)) as database:
            return database.execute(query, (value,)).fetchone() is not None
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: not a ledger of LLM requests ({error}); name another file (--ledger)") from error


def billed(response: Any) -> tuple[int | None, int | None]:
    """(prompt, completion) tokens that a response says were used; None where it states no number."""
    usage = response.get("usage") if isinstance(response, dict) else None
    values = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (
        int(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LARGEST_COUNT
        else None
        for value in values
    )
    return prompt, completion


def _loaded(response: str | None) -> dict[str, Any]:
    """A stored answer; {} for one that is damaged, which the client reports as its row's failure."""
    try:
        value = json.loads(response or "")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def alive(pid: int) -> bool:
    """Whether a process of this machine lives. A dead one that still has its number, as in a container whose first
    process reaps nobody, does not.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:  # it ended just now, or this is no Linux
        return pathlib.Path(f"/proc/{pid}").exists() or not pathlib.Path("/proc/self").exists()
    return state != "Z"
