"""Which LLM a stage asks, and how much of it: the options that `phi1 data annotate`, `synthesize`, `rewrite` and
`decontaminate` share."""

import dataclasses
import pathlib

from data_tools.prices import PRICES, Price, is_price, price_of
from phi1.errors import UserError

_NO_EFFECT = {"no_effect": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """Which LLM, and how much of it. A stage's Config inherits these options."""

    base_url: str | None = None
    """URL of an OpenAI-compatible server, e.g. https://api.openai.com/v1 (key in OPENAI_API_KEY).
    None: the embedded server, SmolLM2-135M-Instruct on this machine, no key needed."""

    model: str | None = None
    """The model's name at that server (needed with --base-url)."""

    prices: pathlib.Path = dataclasses.field(default=PRICES, metadata=_NO_EFFECT)
    """TOML file of what models cost, by server."""

    usd_per_million_input: float | None = dataclasses.field(default=None, metadata=_NO_EFFECT)
    """Price of prompt tokens, US dollars per million, instead of --prices'."""

    usd_per_million_output: float | None = dataclasses.field(default=None, metadata=_NO_EFFECT)
    """Price of generated tokens, US dollars per million, instead of --prices'."""

    budget_usd: float | None = dataclasses.field(default=None, metadata=_NO_EFFECT)
    """Stop before the ledger's total passes this many US dollars."""

    budget_tokens: int | None = dataclasses.field(default=None, metadata=_NO_EFFECT)
    """Stop before the ledger's total passes this many tokens, prompt and generated together."""

    ledger: pathlib.Path | None = dataclasses.field(default=None, metadata=_NO_EFFECT)
    """SQLite file of all requests and answers; budgets count its total. None: for the embedded server, llm.sqlite
    beside the output folder; for another one the user's own ($XDG_DATA_HOME/phi1/llm.sqlite), of which budgets count
    what was asked for outputs in the same parent folder, or the one beside the output if that is an empty file or holds
    calls of other models than the embedded one."""

    batch: bool = dataclasses.field(default=False, metadata=_NO_EFFECT)
    """Ask through the server's Batch API: cheaper, answered within a day. What was submitted is waited for when the
    command is run again.
    """

    concurrency: int = dataclasses.field(default=32, metadata=_NO_EFFECT)
    """At most this many requests in flight."""

    timeout: float = dataclasses.field(default=180.0, metadata=_NO_EFFECT)
    """Seconds from sending a request to the last byte of its answer. The embedded server, which shares this machine
    with whatever else runs on it, gets twenty times as long.
    """

    attempts: int = dataclasses.field(default=8, metadata=_NO_EFFECT)
    """Attempts per request before it counts as failed; a rate limit's refusals are waited out and do not count."""

    patience: float = dataclasses.field(default=3600.0, metadata=_NO_EFFECT)
    """Seconds that a rate limit may hold up one request before the run stops, to be gone on with later."""

    max_failed: float = dataclasses.field(default=0.5, metadata=_NO_EFFECT)
    """Stop, unfinished, if more than this share of the requests failed (from 20 requests on, and at the end)."""

    retry_failed: bool = dataclasses.field(default=False, metadata=_NO_EFFECT)
    """Ask again what failed in an earlier run, also where the output is finished or a paid answer cannot be used."""

    llm_threads: int = dataclasses.field(default=2, metadata=_NO_EFFECT)
    """CPU threads of the embedded server."""


def priced(config: LLMConfig, server: str, model: str) -> Price:
    """What a model at a server costs: as the options say, else as --prices does. Raises UserError if a budget needs
    what neither says."""
    for name in ("usd_per_million_input", "usd_per_million_output"):
        value = getattr(config, name)
        if value is not None and not is_price(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a price, from 0 to below 1,000,000")
    price = price_of(server, model, config.prices)
    prompt, completion = price.usd_per_token or (None, None)
    if config.usd_per_million_input is not None:
        prompt = config.usd_per_million_input / 1e6
    if config.usd_per_million_output is not None:
        completion = config.usd_per_million_output / 1e6
    if prompt is not None and completion is not None:
        return dataclasses.replace(price, usd_per_token=(prompt, completion))
    if config.budget_usd is not None or prompt is not None or completion is not None:
        raise UserError(
            f"{config.prices} has no price of {model} at {server}; give --usd-per-million-input and "
            f"--usd-per-million-output"
        )
    return price
