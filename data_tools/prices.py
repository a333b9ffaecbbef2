"""What a language model costs, from a TOML file (recipes/prices.toml): server -> model -> US dollars per million
tokens."""

import dataclasses
import pathlib
import re
from typing import Any

from phi1.errors import UserError
from phi1.files import read_toml

PRICES = pathlib.Path(__file__).resolve().parent.parent / "recipes" / "prices.toml"
_DATED = re.compile(r"-(?:\d{4}-\d{2}-\d{2}|\d{4})$")  # gpt-4o-2024-08-06, gpt-4-0613


@dataclasses.dataclass(frozen=True)
class Price:
    """usd_per_token: (prompt, generated), None where the file does not know the model. batch: share of it that a
    request in a batch costs, 1 where the file does not say."""

    usd_per_token: tuple[float, float] | None
    batch: float


def price_of(server: str, model: str, path: pathlib.Path = PRICES) -> Price:
    """The price of a model (or of the model of which it is a dated version) at a server (`chat.canonical_url`). Raises
    UserError for a file that cannot be read or holds no prices."""
    try:
        servers = read_toml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--prices {path}: cannot be read ({error}); {PRICES} is one") from error
    about = servers.get(server, {})
    if not isinstance(about, dict) or not isinstance(about.get("models", {}), dict):
        raise UserError(f'--prices {path}: ["{server}"] must have `models`, as in {PRICES}')
    batch = about.get("batch", 1.0)
    if not is_price(batch) or batch > 1:
        raise UserError(f'--prices {path}: `batch` of ["{server}"] must be a share of the price, 0 to 1')
    models = about.get("models", {})
    found = models.get(model, models.get(_DATED.sub("", model)))
    if found is None:
        return Price(None, float(batch))
    if not isinstance(found, list) or len(found) != 2 or not all(map(is_price, found)):
        raise UserError(
            f"--prices {path}: {model} must be [prompt, generated], dollars per million tokens, as in {PRICES}"
        )
    return Price((found[0] / 1e6, found[1] / 1e6), float(batch))


def is_price(value: Any) -> bool:
    """Whether a value is a price, or a share of one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6
