"""Inputs for the offline teacher's exercises: near their constants, so that they show what each constant does."""

import random
from collections.abc import Sequence
from typing import Any

LARGEST_COUNT = 12
"""Of items or characters, so that an example that reaches it stays short."""
SEES = ("", "negative", "repeats", "small", "digits", "powers", "years", "sums")
"""What a family may want its inputs to hold beside what its constants suggest."""


_SYLLABLES = [consonant + vowel for consonant in "bcdfgklmnprstvz" for vowel in "aeiou"]


def word(rng: random.Random, syllables: int) -> str:
    """Pronounceable lower-case letters."""
    return "".join(rng.choices(_SYLLABLES, k=syllables))


class Inputs:
    """Draws arguments of one kind for a function with these constants. Short ones are for its docstring."""

    def __init__(self, takes: str, sees: str, constants: Sequence[int | str], rng: random.Random) -> None:
        self.takes, self.sees, self.rng = takes, sees, rng
        self.integers = [c for c in constants if isinstance(c, int)]
        self.words = [c for c in constants if isinstance(c, str)]
        self.counts = [c for c in self.integers if c <= LARGEST_COUNT]
        self.longest = max(self.counts, default=6) + 3
        self._edges = [c + d for c in self.integers for d in (1, 0, -1)]

    def draw(self, *, short: bool) -> Any:
        """An argument."""
        rng, counts = self.rng, self.counts
        reaching = bool(counts) and short and rng.random() < 0.5  # a short input, but longer than the count
        size = rng.choice((2, 2, 3, 3, 4)) if short else rng.choice((0, 1, 3, 6, self.longest))
        if reaching:
            size = min(counts[0] + rng.randint(1, 2), 10)
        elif counts and not short and rng.random() < 0.5:
            size = max(0, rng.choice(counts) + rng.randint(-1, 1))
        if self.takes == "int":
            return self._edges.pop() if self._edges and not short else self._integer(small=False)
        if self.takes == "ints":
            return self._integers(size, short, reaching)
        if self.takes == "grid":
            return self._grid(size, short, reaching)
        if self.takes == "table":
            return self._table(min(size, 2) if short else size, short)
        if self.takes == "words":
            if short:
                size = min(size, 2 + (not self.words))
            drawn = [self._word(short) for _ in range(size)]
            if drawn and (not short or self.sees == "repeats"):
                drawn += rng.choices(drawn, k=1 if short else 2)
            return drawn
        return self._text(min(size, rng.choice((1, 2))) if short else size, short)

    def _integer(self, *, small: bool) -> int:
        rng, integers = self.rng, self.integers
        if self.sees == "small":
            return rng.randint(0, 2 * max(self.counts, default=3))
        if small:
            return rng.randint(0, 9)
        if self.sees == "powers":
            return rng.choice(integers) ** rng.randint(0, 3) * rng.randint(0, 7)
        if self.sees == "years":
            return rng.choice((100, 25, 4, 1)) * rng.randint(1, 30)
        if self.sees == "negative" and rng.random() < 0.5:
            return -rng.randint(1, 2 * max(integers, default=20))
        if integers and rng.random() < 0.6:
            constant, how = rng.choice(integers), rng.randrange(7)
            if how < 3:
                return constant + how - 1
            if how < 5:
                return constant * (2 if how == 3 else rng.randint(1, 4))
            return constant + (rng.randint(-9, 9) if how == 5 else -rng.choice(integers))
        return rng.randint(0, 99) if rng.random() < 0.85 else rng.randint(-60, 600)

    def _integers(self, size: int, short: bool, small: bool) -> list[int]:
        drawn = [self._integer(small=small) for _ in range(size)]
        if self.sees == "repeats" and drawn:
            few = [*self.integers, *drawn[:2]]
            return [self.rng.choice(few) for _ in range(max(size, 3))]
        if self.sees == "sums" and drawn:  # as much as an integer constant, or a little more or less
            drawn[-1] += self.rng.choice(self.integers) + self.rng.choice((-9, -1, 0, 1, 9)) - sum(drawn)
            return drawn
        return drawn if short or not drawn else drawn + self.rng.choices(drawn, k=2)

    def _grid(self, size: int, short: bool, small: bool) -> list[list[int]]:
        rng = self.rng
        columns = max(self.counts, default=3)
        rows = 2 if short else min(size, self.longest)
        lengths = [
            rng.choice((1, 2, 2, 3)) if short and not small else rng.randint(0, columns + 2) for _ in range(rows)
        ]
        if self.sees == "sums":
            return [self._integers(max(length, 1), True, small) for length in lengths]
        return [[self._integer(small=small) for _ in range(length)] for length in lengths]

    def _table(self, size: int, short: bool) -> dict[str, int]:
        keys = [self._word(short) for _ in range(size)]
        if keys and self.words and self.rng.random() < 0.5:
            keys[self.rng.randrange(size)] = self.rng.choice(self.words)
        return {key: self._integer(small=False) for key in keys}

    def _text(self, size: int, short: bool) -> str:
        rng = self.rng
        if self.counts and not short and rng.random() < 0.4:  # one word, about as long as a count
            length = rng.choice(self.counts) + rng.randint(-1, 1)
            return word(rng, length // 2 + 1)[:length]
        text = " ".join(self._word(short) for _ in range(size))
        if self.sees == "repeats":
            return "".join(c * rng.choice((1, 1, 2, 3)) for c in text[: 6 if short else 40])
        if self.sees == "digits":
            return "".join(c + rng.choice(("", str(rng.randint(0, 9)))) for c in text[: 6 if short else 40])
        return text

    def _word(self, short: bool) -> str:
        rng = self.rng
        if self.counts and rng.random() < 0.5:  # about as long as the count
            length = rng.choice(self.counts) + rng.randint(-1, 2)
            return word(rng, length // 2 + 1)[: max(1, length)]
        plain = word(rng, rng.randint(1, 2 if short else max(3, self.longest // 2 + 1)))
        if self.words and rng.random() < 0.6:
            constant = rng.choice(self.words)
            return rng.choice((constant, constant + plain, plain + constant, plain + constant + word(rng, 1)))
        return plain + rng.choice(("", "", *"nst"))
