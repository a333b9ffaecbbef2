"""The model that is evaluated: a checkpoint of phi1, a Hugging Face folder, or an OpenAI-compatible server."""

import concurrent.futures
import dataclasses
import itertools
import math
import os
import pathlib
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from phi1.errors import UserError
from phi1.files import sha256_file, sha256_json

Complete = Callable[[Sequence[str], int], "list[str | Refused]"]
"""complete(prompts, seed) -> an answer for each, or why there is none"""


class Refused(Exception):
    """The model gave no answer to this prompt; others it may answer."""


class Unserved(Refused):
    """The server, not the prompt, is why there is no answer: it failed, was slow, or spoke another protocol."""


@dataclasses.dataclass(frozen=True)
class Model:
    """name: for people. hash: what identifies the weights; a server's is that of its address and the model's name
    there, which prove nothing. tokenizer: the tokenizer's hash, "" where the server keeps it. complete: see above."""

    name: str
    hash: str
    tokenizer: str
    complete: Complete


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn. max_new_tokens: in tokens. temperature: 0 takes the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.95
    batch_size: int = 16


def load_folder(folder: pathlib.Path, sampling: Sampling, device: str) -> Model:
    """A checkpoint of phi1, or any Hugging Face folder of a causal language model."""
    from phi1 import checkpoint

    if (folder / "config.json").is_file() and not (folder / checkpoint.CHECKPOINT).exists():
        return _load_hugging_face(folder, sampling, device)
    from phi1.generate import complete, load

    folder = checkpoint.resolve(folder)
    model, tokenizer = load(folder, device)

    def answer(prompts: Sequence[str], seed: int) -> list[str | Refused]:
        return list(
            complete(
                model,
                tokenizer,
                prompts,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed,
                batch_size=sampling.batch_size,
            )
        )

    return Model(str(folder), checkpoint.digest(folder), sha256_file(folder / checkpoint.TOKENIZER), answer)


def _load_hugging_face(folder: pathlib.Path, sampling: Sampling, device: str) -> Model:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"{folder}: a Hugging Face folder needs the package transformers: pip install transformers"
        ) from error
    import torch

    from phi1.device import resolve

    there = resolve(device, "--device")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and its file formats raise dozens
        reason = (str(error).strip().split("\n") or [""])[0]
        raise UserError(f"{folder}: transformers cannot load it ({type(error).__name__}: {reason[:200]})") from error
    model = model.to(there, dtype=torch.bfloat16 if there.type == "cuda" else torch.float32).eval()
    end = tokenizer.eos_token_id
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30

    def answer(prompts: Sequence[str], seed: int) -> list[str | Refused]:
        encoded = [tokenizer(prompt, add_special_tokens=True)["input_ids"] for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        answers: dict[int, str | Refused] = {}
        for start in range(0, len(order), sampling.batch_size):
            part = order[start : start + sampling.batch_size]
            for i in [i for i in part if not 0 < len(encoded[i]) < limit]:
                answers[i] = Refused(
                    f"the prompt's {len(encoded[i])} tokens leave no room in the model's {limit} positions"
                )
            part = [i for i in part if i not in answers]
            if not part:
                continue
            width = max(len(encoded[i]) for i in part)
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0
            ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in part], device=there)
            mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in part], device=there)
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            torch.manual_seed(seed + start)
            with torch.inference_mode():
                new = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=min(sampling.max_new_tokens, limit - width),
                    pad_token_id=pad,
                    **(drawn if sampling.temperature > 0 else {"do_sample": False}),
                )
            for i, row in zip(part, new[:, width:].tolist(), strict=True):
                row = row[: row.index(end)] if end in row else row
                # No tidying: a blank before a bracket may be indentation.
                answers[i] = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [answers[i] for i in range(len(prompts))]

    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"])
    words = sorted(
        path
        for path in folder.iterdir()
        if path.name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "added_tokens"))
    )
    return Model(str(folder), _hash(weights), _hash(words), answer)


def _hash(paths: Sequence[pathlib.Path]) -> str:
    return sha256_json([(path.name, sha256_file(path)) for path in paths])


_BUSY = (429, 502, 503, 529)
"""Statuses of a server that may answer later: too many requests, a gateway without it, loading, overloaded."""
_WAITS = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds between two times that a busy server is asked; the last for all that follow."""


class _Busy(Unserved):
    """The server has one of the statuses `_BUSY`."""


class Server:
    """A client of an OpenAI-compatible server (key: OPENAI_API_KEY).

    Raises UserError for a server that is absent, busy all the time, or refuses the key or the model; `Refused` for a
    request that failed alone. timeout: seconds for one answer, from beginning to end, however slowly it drips, and
    however often a busy server is asked again.
    """

    def __init__(self, url: str | None, model: str, *, option: str = "--model-url", timeout: float = 300.0) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("a model on a server needs the package openai: pip install openai") from error
        self.url, self.model, self.option, self.timeout = url or "https://api.openai.com/v1", model, option, timeout
        local = urllib.parse.urlparse(self.url).hostname in ("127.0.0.1", "localhost", "::1")  # never through a proxy
        self.client: Any = openai.OpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout,
            max_retries=3,
            http_client=openai.DefaultHttpxClient(trust_env=not local),
        )
        self._limit_name = "max_tokens"
        self._answered = -math.inf  # when it last did

    def chat(self, messages: list[dict[str, str]], max_tokens: int, **options: Any) -> str:
        """The message that answers a conversation."""
        answer = self._within(
            lambda: self.client.chat.completions.create(
                model=self.model, messages=messages, **{self._limit_name: max_tokens}, **options
            )
        )
        return _text(lambda: answer.choices[0].message.content)

    def complete(self, prompt: str, max_tokens: int, **options: Any) -> str:
        """The text that goes on with a prompt."""
        answer = self._within(
            lambda: self.client.completions.create(model=self.model, prompt=prompt, max_tokens=max_tokens, **options)
        )
        return _text(lambda: answer.choices[0].text)

    def _within(self, call: Callable[[], Any]) -> Any:
        """The call's result; Refused after `timeout` seconds, whatever it does: the thread is then left to itself."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def work() -> None:
            try:
                future.set_result(self._patiently(call))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="model", daemon=True).start()
        try:
            return future.result(self.timeout)
        except concurrent.futures.TimeoutError as error:
            raise Unserved(f"no answer within {self.timeout:g} s") from error

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """The call's result, asked for again while the server loads its model or has too much to do."""
        started = time.monotonic()
        for wait in itertools.chain(_WAITS, itertools.repeat(_WAITS[-1])):
            asked = time.monotonic()
            try:
                result = self._call(call)
                self._answered = time.monotonic()
                return result
            except _Busy as busy:
                now = time.monotonic()
                # The client itself repeats a request, with pauses by chance: the next may take twice as long as this.
                if now + wait + 2 * (now - asked) < started + self.timeout:
                    time.sleep(wait)
                elif self._answered > started:  # others were served
                    raise
                else:
                    raise UserError(
                        f"{self.url}: busy for {now - started:.0f} s ({busy}); run the same command again later"
                    ) from busy

    def _call(self, call: Callable[[], Any]) -> Any:
        import openai

        try:
            return call()
        except openai.APITimeoutError as error:
            raise Unserved(f"no answer within {self.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise UserError(
                f"{self.url}: no server answers there ({error}); start it, or correct {self.option}"
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(f"{self.url}: the key in OPENAI_API_KEY is refused; set a valid one") from error
        except openai.NotFoundError as error:
            raise UserError(
                f"{self.url}: refuses model {self.model!r} ({error.status_code}: {error.message})"
            ) from error
        except openai.BadRequestError as error:
            if "max_completion_tokens" in str(error) and self._limit_name == "max_tokens":
                self._limit_name = "max_completion_tokens"  # OpenAI's newer models know the limit by this name
                return self._call(call)
            raise Refused(f"the server refuses the request ({error.status_code}: {error.message})") from error
        except openai.APIError as error:
            busy = getattr(error, "status_code", None) in _BUSY
            raise (_Busy if busy else Unserved)(f"{type(error).__name__}: {error.message}") from error
        except ValueError as error:  # not the protocol's JSON
            raise Unserved(f"not an answer of the protocol ({type(error).__name__}: {error})") from error


def _text(read: Callable[[], Any]) -> str:
    """The text in an answer; "" where the model said nothing. A server may send anything."""
    try:
        text = read()
    except (AttributeError, IndexError, TypeError) as error:
        raise Unserved("the answer holds no choice") from error
    return text if isinstance(text, str) else ""


ASK = (
    "Complete this Python function. Answer with the whole function in one ```python block, imports and helpers that it "
    "needs included, and nothing else.\n\n```python\n{prompt}```"
)
"""What a chat model is asked."""


def load_server(url: str | None, name: str, sampling: Sampling, *, chat: bool, workers: int, timeout: float) -> Model:
    """A model behind a server: by /chat/completions or /completions."""
    server = Server(url, name, timeout=timeout)

    def one(prompt: str, seed: int) -> "str | Refused":
        options: dict[str, Any] = {"temperature": sampling.temperature}
        if sampling.temperature > 0:
            options |= {"top_p": sampling.top_p, "seed": seed}
        try:
            if chat:
                message = {"role": "user", "content": ASK.format(prompt=prompt)}
                return server.chat([message], sampling.max_new_tokens, **options)
            return server.complete(prompt, sampling.max_new_tokens, **options)
        except Refused as refused:
            return refused

    def answer(prompts: Sequence[str], seed: int) -> list[str | Refused]:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(one, prompt, seed * 100_003 + i) for i, prompt in enumerate(prompts)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    kind = "chat" if chat else "completion"
    return Model(
        f"{server.url} {name} ({kind})", sha256_json([server.url, name, kind, ASK if chat else ""]), "", answer
    )
