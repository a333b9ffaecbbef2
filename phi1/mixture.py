"""Several sets of tokens read as one, mixed by weight.

Which set a sample is of is a function of its index and the weights alone, and the samples of a set come in that set's
own order (phi1/tokens.py): what a set contributes is its samples 0, 1, 2, …, as if it were trained on alone. So sample
i of the mixture is, like a set's, a pure function of (seed, i), over any number of epochs of any of them.

Of the first n samples the first set (by name) has the whole part of its share; of what is left the second has the whole
part of its share of that; and so on. In whole numbers throughout, with weights as they are written (0.8 and 0.2 are 4
and 1): in any stretch of n samples each of k sets has its share of n, give or take fewer than max(1, k - 1).

Why: among the samples that sets 1 … j - 1 leave over there are at most j - 1 more, and not fewer, than their share of n
(each set's whole part leaves less than one, and what is left over shrinks from set to set). Set j's count is so above
its share by less than (j - 1) of its part of what is left, and below it by less than 1, or, of the last set, which
takes all, by nothing. The counts of a stretch are the difference of two such.
"""

import fractions
import math
from collections.abc import Iterable, Mapping

import numpy as np

from phi1.files import sha256_json
from phi1.tokens import TokenDataset


class Mixture:
    """Sets of tokens by name, and the weight of each: its share of the samples to the others'.

    weights: positive and finite, one for each of `sets`. The order of names changes nothing.
    """

    def __init__(self, sets: Mapping[str, TokenDataset], weights: Mapping[str, float]) -> None:
        self.sets = {name: sets[name] for name in sorted(sets)}
        exact = [fractions.Fraction(repr(weights[name])) for name in self.sets]
        whole = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * whole) for weight in exact]
        self._left = [sum(self._weights[place:]) for place in range(len(exact))]
        """Weight of each set and those after it."""

    @property
    def hash(self) -> str:
        """A set's own if there is one only; else SHA-256 over names and hashes."""
        hashes = {name: dataset.hash for name, dataset in self.sets.items()}
        return sha256_json(hashes) if len(hashes) > 1 else next(iter(hashes.values()))

    def shares(self) -> dict[str, float]:
        """Each set's share of the samples, in [0, 1]."""
        return {name: weight / self._left[0] for name, weight in zip(self.sets, self._weights, strict=True)}

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples each set has."""
        found = {}
        for name, weight, left in zip(self.sets, self._weights, self._left, strict=True):
            found[name] = samples * weight // left
            samples -= found[name]
        return found

    def place(self, index: int) -> tuple[str, int]:
        """The set that sample `index` is of, and its index there."""
        before, after = self.counts(index), self.counts(index + 1)
        name = next(name for name in before if after[name] > before[name])
        return name, before[name]

    def batch(
        self, indices: Iterable[int], length: int, *, seed: int, loss_mask: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples `indices` as inputs and targets, int64 (len(indices), length), as `TokenDataset.batch` gives them.

        With loss_mask the sets that have a mask follow it, and the others count whole.
        """
        places = [self.place(index) for index in indices]
        inputs, targets = (np.empty((len(places), length), np.int64) for _ in range(2))
        for name, dataset in self.sets.items():
            rows = [row for row, (theirs, _) in enumerate(places) if theirs == name]
            if rows:
                inputs[rows], targets[rows] = dataset.batch(
                    [places[row][1] for row in rows], length, seed=seed, loss_mask=loss_mask
                )
        return inputs, targets
