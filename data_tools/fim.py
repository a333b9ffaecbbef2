"""Fill in the middle: documents rearranged so that a model learns to write what stands between two given parts.

"Efficient Training of Language Models to Fill in the Middle" (Bavarian et al. 2022, arXiv 2207.14255), at the level of
documents: a share of them is cut at two places into prefix, middle and suffix, whose order is

    <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle      (PSM)
    <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle      (SPM)

The places are drawn uniformly among those between characters, ends included, so that a part may be empty. Each part is
encoded by itself, as it is when a model is asked to fill in. Rearranged before shards are cut into windows, a document
loses nothing, however much longer its parts' tokens are than its own.
"""

import dataclasses

from phi1.tokens import mix


@dataclasses.dataclass(frozen=True)
class Fim:
    """Which documents are rearranged, and how: a function of the seed and a document's place."""

    sentinels: tuple[int, int, int]
    """Ids of <|fim_prefix|>, <|fim_middle|> and <|fim_suffix|> (`Tokenizer.fim_ids`)."""
    rate: float
    """Share of the documents that are rearranged, in [0, 1]."""
    spm_share: float
    """Share of those whose suffix comes first, in [0, 1]."""
    seed: int

    def arrange(self, text: str, *place: int) -> tuple[str | int, ...]:
        """The parts of a document in the order they are read in: texts, and ids of sentinels; (text,) if it stays as it
        is.

        place: the document's, numbers that no other document of the set has.
        """
        if mix(self.seed, *place, 0) >= self.rate * 2**63:
            return (text,)
        first, second = sorted(mix(self.seed, *place, which) % (len(text) + 1) for which in (1, 2))
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        before, between, after = self.sentinels
        if mix(self.seed, *place, 3) < self.spm_share * 2**63:
            return before, after, suffix, between, prefix, middle
        return before, prefix, after, suffix, between, middle
