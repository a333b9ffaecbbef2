"""Chat completions as OpenAI's protocol has them: what is asked, what was answered, and what is no answer."""

import dataclasses
import json
import math
import re
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from data_tools.ledger import Claim, billed
from data_tools.markdown import without_thought
from data_tools.provider_errors import Remedy, Verdict, one_line, sort
from phi1.errors import UserError
from phi1.files import sha256_json

# Where a model without structured output writes JSON: behind such a fence, up to the next one.
_FENCED = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*(?:json)?[ \t]*\r?\n\s*", re.MULTILINE | re.IGNORECASE)
_NO_LOGPROB = -9999.0  # OpenAI's value for a token that is too unlikely to have one


@dataclasses.dataclass(frozen=True)
class Request:
    """One chat completion. Two equal requests are one: vary `seed` to sample again.

    messages: {"role", "content"} each. max_tokens: of the answer. schema: a JSON schema that the answer
    must fit (structured output). logprobs: also give the first token's 20 likeliest alternatives. temperature: None is
    the server's own. accept: raises RequestFailed for an answer that is of no use.
    """

    messages: Sequence[dict[str, str]]
    max_tokens: int
    temperature: float | None = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    schema: dict[str, Any] | None = None
    logprobs: bool = False
    accept: "Callable[[Answer], object] | None" = dataclasses.field(default=None, compare=False)

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
    came from the ledger. truncated: the answer ended at max_tokens. usd: what it cost, whenever it was paid for.
    """

    text: str
    value: Any
    logprobs: dict[str, float]
    model: str
    prompt_tokens: int
    completion_tokens: int
    truncated: bool
    paid: bool
    usd: float = 0.0


class RequestFailed(Exception):
    """This request got no usable answer; others may. The message is the reason."""


class Refused(Exception):
    """An attempt that got no answer. claim: the call in the ledger, where it was answered with something useless."""

    def __init__(self, verdict: Verdict, claim: Claim | None = None, response: Any = None) -> None:
        super().__init__(verdict.reason)
        self.verdict, self.claim, self.response = verdict, claim, response


class NoLogprobs(RequestFailed):
    """An answer without the logprobs that were asked for."""


def canonical_url(url: str) -> str:
    """One spelling of a server's address: scheme and host in lower case, no default port, no user, ends in /v1."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError as error:
        raise UserError(f"--base-url {url}: is no URL ({error})") from error
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"--base-url {url}: must be like http://HOST:PORT/v1")
    host = f"[{host}]" if ":" in host else "127.0.0.1" if host == "localhost" else host
    suffix = "" if port in (None, {"http": 80, "https": 443}[parts.scheme]) else f":{port}"
    path = "/".join(filter(None, parts.path.split("/")))
    path = path if "v1" in path.split("/") else f"{path}/v1".lstrip("/")
    return f"{parts.scheme}://{host}{suffix}/{path}" + (f"?{parts.query}" if parts.query else "")


def answer_in(data: bytes) -> dict[str, Any]:
    """The chat completion in a body that came with status 200. Raises Refused for what is none: it may be billed."""
    text = data.decode("utf-8", "replace")
    response: Any = None
    for body in (data, text):  # as it says which Unicode it is; else with what cannot be read replaced
        try:
            response = json.loads(body, parse_int=_integer)
            break
        except (ValueError, RecursionError):
            continue
    choices = response.get("choices") if isinstance(response, dict) else None
    if isinstance(choices, list) and choices and isinstance(choices[0], dict) and "message" in choices[0]:
        return response
    if isinstance(response, dict) and response.get("error"):  # OpenRouter wraps its upstream's refusals so
        code = response["error"].get("code") if isinstance(response["error"], dict) else None
        verdict = sort(code if isinstance(code, int) and 400 <= code < 600 else 500, {}, text)
        raise Refused(dataclasses.replace(verdict, billed=True), response=response)
    reason = f"a 200 that is no chat completion: {one_line(text)[:80]!r}"
    advice = "check --base-url, which usually ends in /v1"
    raise Refused(Verdict(Remedy.RETRY, reason, advice, billed=True), response=response or {})


def _integer(digits: str) -> float:
    """A number of JSON; one that Python refuses to read (more than 4,300 digits) is infinite, and spoils no answer."""
    return int(digits) if len(digits) < 1000 else math.inf


def read(request: Request, response: dict[str, Any], model: str, *, paid: bool, usd: float = 0.0) -> Answer:
    """The answer in a response. model: the name asked for. Raises RequestFailed, whatever the response is."""
    try:
        choice = response["choices"][0]
        message = choice["message"]
        content = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise RequestFailed("the answer holds no message") from error
    if isinstance(content, list):  # parts, as some servers answer
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    if choice.get("finish_reason") == "content_filter" and not request.logprobs:
        raise RequestFailed("the answer was cut by the server's content filter")
    if not isinstance(content, str):
        why = message.get("refusal") or choice.get("finish_reason") or "no content"
        if not request.logprobs:
            raise RequestFailed(f"the answer holds no text: {one_line(why)[:120]}")
        content = ""
    text = whole_unicode(content)
    logprobs = _first_logprobs(choice) if request.logprobs else {}
    if request.logprobs and not logprobs:
        raise NoLogprobs(f"{model} answered without logprobs")
    value = None
    if request.schema is not None:
        try:
            value = _json_in(text)
        except (ValueError, RecursionError) as error:
            raise RequestFailed(f"the answer is not JSON: {one_line(text)[:80]!r}") from error
    prompt, completion = billed(response)
    named = response.get("model")
    answer = Answer(
        text=text,
        value=value,
        logprobs=logprobs,
        model=whole_unicode(named) if isinstance(named, str) and named else model,
        prompt_tokens=prompt or 0,
        completion_tokens=completion or 0,
        truncated=choice.get("finish_reason") == "length",
        paid=paid,
        usd=usd,
    )
    if request.accept is not None:
        request.accept(answer)
    return answer


def _json_in(text: str) -> Any:
    """The JSON that a text is, or that stands in a fenced block of it. Raises ValueError for none."""
    try:
        return json.loads(text)
    except ValueError:
        said = without_thought(text)
    for fence in _FENCED.finditer(said):
        try:
            value, end = json.JSONDecoder().raw_decode(said, fence.end())
        except ValueError:
            continue  # another block may be it
        if said[end:].lstrip().startswith(fence[1]):
            return value
    return json.loads(said)


def _first_logprobs(choice: dict[str, Any]) -> dict[str, float]:
    """Token -> log-probability of the first token's alternatives, without those that have none (null, -inf, -9999)."""
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(entry["token"], entry["logprob"]) for entry in top]
    except (KeyError, IndexError, TypeError):
        return {}
    return {
        token: float(value)
        for token, value in pairs
        if isinstance(token, str)
        and isinstance(value, int | float)
        and math.isfinite(value)
        and _NO_LOGPROB < value <= 0.01  # rounding
    }


def whole_unicode(text: str) -> str:
    """A text with U+FFFD for each half of a surrogate pair, which JSON can carry and no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
