"""Numbers that make no sense, told before anything is done with them."""

from typing import Any

from phi1.errors import UserError


def at_least(low: float, config: Any, *names: str) -> None:
    """UserError for an option of `config` that is set and below `low`, or not a number."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= low:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {low:g}")
