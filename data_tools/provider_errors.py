"""What a refusal of an LLM server means. One table, for every server that speaks OpenAI's protocol.

`sort` looks a response up and says what to do (`Remedy`):

    WAIT      a rate limit: wait as long as it says (or backing off) and ask again; this is no failed attempt
    RETRY     the server's trouble: ask again, a bounded number of times
    RENAME    it wants the parameter max_tokens under the name max_completion_tokens
    REQUEST   this request cannot be served, others can: the row's failure
    DOUBT     the request's fault or everyone's: the row's failure if the server answers others, else STOP
    STOP      the account is out of money: nothing can be served before the user acts; the run can go on later

The wordings are those of OpenAI, Azure, Anthropic, Gemini, Groq, DeepSeek, OpenRouter, Together, vLLM and llama.cpp
(`tests/data_tools/test_provider_errors.py` has their bodies).
"""

import dataclasses
import email.utils
import enum
import json
import re
import time
from collections.abc import Mapping
from typing import Any


class Remedy(enum.Enum):
    """What to do about a refusal (see the module)."""

    WAIT = enum.auto()
    RETRY = enum.auto()
    RENAME = enum.auto()
    REQUEST = enum.auto()
    DOUBT = enum.auto()
    STOP = enum.auto()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """remedy; reason: one line; advice: what the user can do; after: seconds to wait, if the server named them;
    billed: the server may charge for it."""

    remedy: Remedy
    reason: str
    advice: str = ""
    after: float | None = None
    billed: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """A line of the table. statuses: HTTP statuses it is for (empty: any); pattern: what its text must hold."""

    remedy: Remedy
    statuses: frozenset[int]
    pattern: str
    advice: str = ""
    billed: bool = False


def _rule(remedy: Remedy, statuses: str, pattern: str = "", advice: str = "", billed: bool = False) -> Rule:
    return Rule(remedy, frozenset(map(int, statuses.split())), pattern, advice, billed)


RULES: tuple[Rule, ...] = (
    # Gemini words its rate limit as OpenAI words an empty account; only the code tells them apart.
    _rule(Remedy.WAIT, "429", r"resource_exhausted"),
    _rule(
        Remedy.STOP,
        "",
        r"insufficient_quota|exceeded your current quota|billing_hard_limit|billing_not_active|account is not active"
        r"|credit balance is too low|insufficient (balance|credit|fund)|credit_limit|credit limit exceeded"
        r"|more credits|payment required",
        "the account is out of money: top it up",
    ),
    _rule(Remedy.STOP, "402", "", "the account is out of money: top it up"),
    # A request that is larger than the limit of a whole minute never fits, whenever it is sent.
    _rule(Remedy.REQUEST, "413 429", r"request too large|must be reduced in order to run"),
    _rule(Remedy.REQUEST, "413"),
    _rule(Remedy.WAIT, "429"),
    _rule(
        Remedy.REQUEST,
        "400 422 500",
        r"context_length_exceeded|maximum context length|exceed_context_size|context size|context window"
        r"|prompt is too long|input is too long|maximum model length|reduce the length",
    ),
    _rule(
        Remedy.REQUEST,
        "400 403 422 451",
        r"content_filter|content_policy|content management policy|safety system|moderation|invalid_prompt|usage polic"
        r"|flagged|responsibleai",
    ),
    _rule(Remedy.RENAME, "400 422", r"max_completion_tokens"),
    _rule(Remedy.DOUBT, "", r"logprob", "it gives no logprobs: use --mode rating, or another server or model"),
    _rule(
        Remedy.DOUBT,
        "",
        r"response_format|json_schema|grammar|structured output",
        "it has no structured output: use --mode logprob, or another server or model",
    ),
    _rule(Remedy.DOUBT, "400 422", r"temperature", "choose a --temperature that it takes (none: its own)"),
    _rule(
        Remedy.DOUBT,
        "400 401 403",
        r"api.?key|authenticat|unauthorized",
        "the key in OPENAI_API_KEY is refused: set a valid one",
    ),
    _rule(Remedy.DOUBT, "401 403", "", "the key in OPENAI_API_KEY is refused: set a valid one"),
    _rule(Remedy.DOUBT, "404", "", "check --model and --base-url (which usually ends in /v1)"),
    # A gateway that gave up on a server which may have done the work.
    _rule(Remedy.RETRY, "502 504 522 524", billed=True),
    _rule(Remedy.RETRY, "408 409 425 500 501 503 520 521 523 529"),
)

_UNITS = {"ms": 0.001, "milliseconds": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(milliseconds?|ms|s|m|h|d)[a-z]*")
_SPAN = r"((?:\d+(?:\.\d+)?\s*(?:ms\b|milliseconds?|s(?:ec)?\w*|m(?:in)?\w*|h(?:our)?\w*|d(?:ay)?\w*)\s*)+)"
_TOLD = re.compile(r"(?:try again|retry|retrydelay|wait)[\s\"':]*(?:in|after|for)?[\s\"':]*" + _SPAN, re.I)


def sort(status: int, headers: Mapping[str, str], text: str) -> Verdict:
    """What the response `status`, `headers` (names in lower case), `text` means; the first rule that fits decides."""
    message, searched = describe(text)
    reason = f"HTTP {status}: {message}"
    after = wait_told(headers, text)
    for rule in RULES:
        if (not rule.statuses or status in rule.statuses) and re.search(rule.pattern, searched):
            return Verdict(rule.remedy, reason, rule.advice, after, rule.billed)
    if status >= 500:
        return Verdict(Remedy.RETRY, reason, after=after)
    return Verdict(Remedy.DOUBT, reason)


def describe(text: str) -> tuple[str, str]:
    """(the message in one line, all that rules search: codes, types and messages, lower case) of an error's body."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        plain = one_line(re.sub(r"<[^>]*>", " ", text))
        return plain or "no message", plain.lower()
    if isinstance(value, list):  # Gemini
        value = value[0] if value else {}
    error = (value.get("error") or value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return one_line(str(error)), str(error).lower()
    message = next((error[name] for name in ("message", "detail", "error") if error.get(name)), error)
    if not isinstance(message, str):
        message = json.dumps(message)
    facts = [str(error.get(name) or "") for name in ("code", "type", "status", "param")]
    return one_line(message) or "no message", " ".join([*facts, message]).lower()


def wait_told(headers: Mapping[str, str], text: str = "") -> float | None:
    """Seconds that a response asks to wait: `Retry-After` (seconds or an HTTP date, RFC 9110 10.2.3), OpenAI's
    `retry-after-ms`, the reset of a limit of which nothing is left, or the text ("try again in 1m10s")."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    if (value := headers.get("retry-after")) is not None:
        seconds = _number(value)
        if seconds is None:
            try:
                seconds = max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
            except (ValueError, OverflowError):
                seconds = None
        if seconds:
            return seconds
    resets = [
        duration(headers.get(f"x-ratelimit-reset-{what}", ""))
        for what in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{what}") == "0"
    ]
    if any(resets):
        return max(filter(None, resets))
    told = _TOLD.search(text)
    return duration(told.group(1)) if told else None


def duration(text: str) -> float | None:
    """Seconds of a duration as servers write it: 300ms, 8.64s, 1m10s, 6h0m0s, 70 seconds, 2 minutes."""
    found = _DURATION.findall(text.lower())
    return (
        sum(float(number) * _UNITS["ms" if unit.startswith(("ms", "milli")) else unit] for number, unit in found)
        if found
        else None
    )


def one_line(text: str) -> str:
    """At most 300 characters of a text, without its line ends."""
    return " ".join(str(text).split())[:300]


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < 1e9 else None
