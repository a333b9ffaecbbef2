"""Complete a prompt with a checkpoint's model.

The completion goes to standard output as it is: nothing is stripped from it or from the prompt.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from phi1.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from phi1.model import Phi1
    from phi1.tokenizer import Tokenizer


def complete(
    model: "Phi1",
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """One completion for each prompt, in order, without the prompt.

    max_new_tokens: upper limit, in tokens. temperature: 0 is greedy. top_p: sample from the smallest set of most
    likely tokens that holds at least this much probability. stop: a completion is cut before the first
    of these strings; they are looked for in its text, not in its tokens. It also ends at <|endoftext|>.
    seed: prompt i draws from a stream of its own, (seed, i), so its sample does not depend on batch_size.
    batch_size: sequences decoded at once. progress: called with (prompts done, prompts in all).

    Prompt and completion together never exceed the model's max_positions: a completion ends there, and a prompt
    that leaves no room for one token gets the completion "" and a warning on standard error. An empty prompt
    stands for the start of a document, after <|endoftext|>.
    Raises UserError for options that make no sense.
    """
    import torch

    for option, value, fits, must_be in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("stop", list(stop), "" not in stop, "strings that are not empty"),
        ("seed", seed, seed >= 0, "at least 0"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
    ):
        if not fits:
            raise UserError(f"{option} = {value}: must be {must_be}")
    encoded = [ids or [tokenizer.eot_id] for ids in tokenizer.encode_batch(prompts)]
    limit = model.config.max_positions
    fitting = [i for i, ids in enumerate(encoded) if len(ids) < limit]
    completions, done = [""] * len(prompts), len(prompts) - len(fitting)
    if done:
        print(
            f"warning: {done} of {len(prompts)} prompts fill the model's {limit} positions; their completions are empty",
            file=sys.stderr,
        )
    was_training = model.training
    model.eval()
    # Prompts of about the same length go together: see _decode.
    fitting.sort(key=lambda i: len(encoded[i]))
    try:
        for start in range(0, len(fitting), batch_size):
            rows = fitting[start : start + batch_size]
            sampler = _Sampler([(seed, i) for i in rows], max_new_tokens, temperature, top_p, model.embedding.device)
            with torch.inference_mode():
                texts = _decode(model, tokenizer, [encoded[i] for i in rows], max_new_tokens, stop, sampler)
            for i, text in zip(rows, texts, strict=True):
                completions[i] = text
            done += len(rows)
            if progress is not None:
                progress(done, len(prompts))
    finally:
        model.train(was_training)
    return completions


def _decode(
    model: "Phi1",
    tokenizer: "Tokenizer",
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    sampler: "_Sampler",
) -> list[str]:
    """Decodes a batch in lockstep, every row at the same position, so that no row is padded or masked.

    The shortest prompt's length is read at once. From there on a row takes its prompt's next token while it has
    one, and what the model chooses after that: each row sees exactly its own tokens at its own positions.
    """
    import torch

    device, rows = model.embedding.device, range(len(prompts))
    lengths = [len(prompt) for prompt in prompts]
    first, end = min(lengths), min(max(lengths) + max_new_tokens, model.config.max_positions)
    given = torch.zeros(len(prompts), end, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        given[row, : len(prompt)] = torch.tensor(prompt)
    given, starts = given.to(device), torch.tensor(lengths, device=device)
    # Ids past the tokenizer's (spare rows of the model) mean no text: they are never chosen.
    vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
    # A stop string that a token completes lies in this many last tokens, each being at least a byte.
    window = max((len(string.encode()) for string in stop), default=0)

    cache = model.new_cache(len(prompts), end)
    new: list[list[int]] = [[] for _ in rows]
    running = set(rows)
    tokens = given[:, :first]
    for position in range(first, end):
        logits = model.logits(model.hidden_states(tokens, cache=cache)[:, -1])[:, :vocab_size]
        chosen = sampler.choose(logits, position - starts)
        tokens = torch.where(position < starts, given[:, position], chosen)[:, None]
        for row, token in enumerate(tokens[:, 0].tolist()):
            if row not in running or position < lengths[row]:
                continue
            if token == tokenizer.eot_id:
                running.discard(row)
                continue
            new[row].append(token)
            tail = tokenizer.decode(new[row][-window:]) if window else ""
            if len(new[row]) == max_new_tokens or any(string in tail for string in stop):
                running.discard(row)
        if not running:
            break
    return [_cut(tokenizer.decode(ids), stop) for ids in new]


def _cut(text: str, stop: Sequence[str]) -> str:
    """`text` before the first occurrence of any stop string."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


class _Sampler:
    """Chooses tokens; row r's j-th new token is decided by the j-th uniform number of its own stream.

    streams: a row's (seed, prompt index).
    """

    def __init__(
        self, streams: list[tuple[int, int]], length: int, temperature: float, top_p: float, device: "torch.device"
    ) -> None:
        import numpy as np
        import torch

        self.temperature, self.top_p = temperature, top_p
        if temperature > 0:  # (rows, length)
            uniform = np.stack([np.random.default_rng(stream).random(length) for stream in streams])
            self._uniform = torch.from_numpy(uniform).to(device)

    def choose(self, logits: "Tensor", index: "Tensor") -> "Tensor":
        """(rows,) token ids for logits (rows, vocabulary); index (rows,): which new token it is (below 0: not read)."""
        import torch

        if self.temperature == 0:
            return logits.argmax(-1)
        # float64: the sum over 50,000 probabilities is then as exact as the uniform numbers.
        probability, token = (logits.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        cumulative = probability.cumsum(-1)
        kept = (cumulative - probability < self.top_p).sum(-1, keepdim=True)  # at least the most likely one
        mass = cumulative.gather(-1, kept - 1)
        uniform = self._uniform.gather(-1, index.clamp(0, self._uniform.shape[1] - 1)[:, None])
        rank = torch.searchsorted(cumulative, uniform * mass, right=True).minimum(kept - 1)
        return token.gather(-1, rank)[:, 0]


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of `phi1 generate`."""

    checkpoint: pathlib.Path
    """A checkpoint's folder, or a run's (its newest checkpoint)."""
    prompt: str | None = None
    """The text to complete."""
    prompt_file: pathlib.Path | None = None
    """A UTF-8 file that holds it. With neither, it is read from standard input."""
    max_new_tokens: int = 256
    """Upper limit of the completion, in tokens."""
    temperature: float = 0.0
    """0 takes the most likely token each time; 1 samples from the model's distribution."""
    top_p: float = 1.0
    """Sample from the most likely tokens that hold this much probability, in (0, 1]."""
    stop: tuple[str, ...] = ()
    """Strings before which the completion is cut, e.g. --stop $'\\ndef ' $'\\nclass '."""
    seed: int = 0
    """Seed of the sampling (no effect at temperature 0)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto: a GPU where there is one. On a GPU the model runs in bfloat16."""


def run(config: Config) -> None:
    """Writes the completion to standard output."""
    prompt = _prompt(config)

    import torch

    from phi1.checkpoint import load_model

    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch finds no CUDA GPU here; use --device cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else None
    model, tokenizer = load_model(config.checkpoint, device=device, dtype=dtype)
    used = len(tokenizer.encode(prompt))
    if used >= model.config.max_positions:
        raise UserError(
            f"the prompt has {used:,} tokens and the model {model.config.max_positions:,} positions; shorten it"
        )
    (completion,) = complete(
        model,
        tokenizer,
        [prompt],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        stop=config.stop,
        seed=config.seed,
    )
    sys.stdout.write(completion)
    if sys.stdout.isatty() and not completion.endswith("\n"):
        sys.stdout.write("\n")


def _prompt(config: Config) -> str:
    if config.prompt is not None and config.prompt_file is not None:
        raise UserError("--prompt and --prompt-file: give one of them")
    if config.prompt is not None:
        return config.prompt
    name = "standard input" if config.prompt_file is None else str(config.prompt_file)
    try:
        raw = sys.stdin.buffer.read() if config.prompt_file is None else config.prompt_file.read_bytes()
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start}; convert the prompt to UTF-8") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); name a text file") from error
