"""Fifty unconventional problems with hidden tests, in the spirit of the paper's section 4, whose own were not
published.

The paper had a team write problems that are unlikely to be in any training data, to be graded by GPT-4 where no test
tells understanding from recall. These ask for several steps that must be followed to the letter, of stories that no
other collection tells; they have tests, so that the grade and the tests can be compared. `puzzles.jsonl` is in
HumanEval's columns; `wrong` holds a plausible misreading, which the test must reject
(tests/phi1/evaluate/test_puzzles.py). Once published they are no longer unseen: decontaminate against them too
(--problems with this file's path).
"""

import pathlib

from phi1.evaluate import humaneval

PATH = pathlib.Path(__file__).with_name("puzzles.jsonl")


def load() -> list[humaneval.Problem]:
    """The fifty problems."""
    return humaneval.load(PATH)
