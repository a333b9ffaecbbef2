"""What this machine has, which kernels each op takes on it and why, and what is missing."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """`phi1 doctor` has no options."""


def run(config: Config) -> None:
    """Prints the page."""
    import kernels

    print(kernels.backends())
