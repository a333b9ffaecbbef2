"""Sentences and layouts."""

import doctest
import random

import pytest

from data_tools import wording
from data_tools.families import BY_NAME


@pytest.mark.parametrize(
    "clause, said",
    [
        ("keep the numbers", "keeps the numbers"),
        ("multiply it by 3", "multiplies it by 3"),
        ("switch the ends", "switches the ends"),
        ("erase each 'a'", "erases each 'a'"),
        ("pay it", "pays it"),
    ],
)
def test_third_person(clause: str, said: str) -> None:
    assert wording.third_person(clause) == said


def test_a_description_says_every_clause() -> None:
    """In whatever sentence, with its verb or the verb's third person; a guard's and a step's have no order."""
    rng = random.Random(0)
    for names in (("sort",), ("sort", "total"), ("empty_ints", "total")):
        steps = [BY_NAME[name] for name in names]
        clauses = ["return 4", "add up all"][: len(names)]
        seen = set()
        for _ in range(100):
            what = wording.description(rng, steps, clauses, "values")
            seen.add(what)
            for clause in clauses:
                assert clause in what.lower() or wording.third_person(clause) in what.lower(), what
            assert what[0].isupper() and what[-1] in ".?"
        assert len(seen) >= 4


@pytest.mark.parametrize("name", list(wording._LAYOUTS))
@pytest.mark.parametrize("annotated", [False, True])
def test_a_layout_shows_examples_that_doctest_reads(name: str, annotated: bool) -> None:
    text = wording.prompt(
        "f", "words", ("words", "bool"), "Say it.", (name, annotated), [("['a']", "True"), ("[]", "False")]
    )
    space: dict[str, object] = {}
    exec(text + "    return bool(words)\n", space)
    examples = doctest.DocTestParser().get_examples(space["f"].__doc__ or "")
    assert [(example.source, example.want) for example in examples] == [
        ("f(['a'])\n", "True\n"),
        ("f([])\n", "False\n"),
    ]
    assert "Say it." in text and (("-> bool" in text) == annotated)
    assert not [line for line in text.splitlines() if line != line.rstrip()]
