"""The table: what each entry must hold."""

import ast
import re

from data_tools.exercise_inputs import SEES
from data_tools.families import ARGUMENTS, BY_NAME, CURRICULUM, FAMILIES, GUARDS, KINDS


def test_table_is_sound() -> None:
    assert len(FAMILIES) >= 150 and len(FAMILIES) + len(GUARDS) == len(BY_NAME)
    for family in (*FAMILIES, *GUARDS):
        assert family.takes in ARGUMENTS and family.gives in KINDS, family.name
        assert family.sees in SEES and 0 < family.weight <= 1, family.name
        assert set(family.constants) <= {"number", "larger", "count", "word"}, family.name
        letters = set("ab"[: len(family.constants)])
        codes = ["\n".join(form.lines) for form in family.forms]
        for text in (*family.phrases, *codes):
            assert {letter for letter in "ab" if f"{{{letter}}}" in text} == letters, (family.name, text)
        assert len(set(family.phrases)) == len(family.phrases) and len(set(codes)) == len(codes), family.name
        assert len({form.guards for form in family.forms}) == 1 == len({form.recursive for form in family.forms})
        assert family.verb.isidentifier() == (family in FAMILIES), family.name


def test_a_variable_hides_no_argument() -> None:
    """What a body binds is neither the function's argument nor `result`, which holds what the step before gave."""
    for family in (*FAMILIES, *GUARDS):
        for form in family.forms:
            lines = form.fill({"v": "v", "a": "'a'", "b": "'b'", "f": "f"})
            tree = ast.parse("def f(v):\n" + "".join(f"    {line}\n" for line in lines))
            bound = {
                node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }
            assert not bound & {"result", "v", *ARGUMENTS[family.takes]}, (family.name, bound)


def test_phrases_begin_with_a_verb() -> None:
    """Sentences conjugate the first word; a guard's clause always returns."""
    for guard in GUARDS:
        assert all(phrase.startswith("return ") for phrase in guard.phrases), guard.name
    for family in FAMILIES:
        for phrase in family.phrases:
            assert re.match(r"[a-z]+ ", phrase) and not phrase.endswith("."), (family.name, phrase)


def test_files_are_short() -> None:
    for path in CURRICULUM.glob("*.toml"):
        assert len(path.read_text().splitlines()) < 500, path
