"""The offline teacher: every family works as its words say, and held-out means held out."""

import ast
import collections
import random
import re
from typing import Any

import pytest

from data_tools import teacher
from data_tools.families import ARGUMENTS, BY_NAME, FAMILIES, KINDS
from data_tools.teacher import Draft, held_out, overlaps, write_exercises
from phi1.evaluate.sandbox import Job, run_many


@pytest.fixture(scope="module")
def train() -> list[dict[str, Any]]:
    return list(write_exercises(400, "test", "train", {}))


@pytest.fixture(scope="module")
def held() -> list[dict[str, Any]]:
    return list(write_exercises(200, "test", "held-out", {}))


def test_table_is_sound() -> None:
    assert len(FAMILIES) >= 40 and len(BY_NAME) == len(FAMILIES)
    for family in FAMILIES:
        assert family.takes in ARGUMENTS and family.gives in KINDS, family.name
        letters = "ab"[: len(family.constants)]
        code = "\n".join([*family.setup, family.expression])
        for text in (*family.phrases, code):
            assert {letter for letter in "ab" if f"{{{letter}}}" in text} == set(letters), (family.name, text)
        for values in ARGUMENTS.values():  # an argument must not be hidden by a loop's variable
            assert not set(values) & set(re.findall(r"for (\w+)(?:, (\w+))? in", code)), family.name


def test_every_family_is_kept_by_the_sandbox_in_both_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "held-out"):
        families = [family for family in FAMILIES for _ in range(10)]
        random.Random(0).shuffle(families)
        singles = iter(families)
        with monkeypatch.context() as patch:
            draft = teacher.compose

            def one(rng: random.Random, split: Any, singles: Any = singles, draft: Any = draft) -> Draft:
                family = next(singles, FAMILIES[0])
                patched = draft(rng, split)
                constants = (teacher._constants(family, rng, split),)
                text = family.phrases[0].format(**{k: repr(c) for k, c in zip("ab", constants[0], strict=False)})
                return Draft(patched.name, ARGUMENTS[family.takes][0], (family,), constants, text)

            patch.setattr(teacher, "compose", one)
            rows = list(write_exercises(780, "families", split, {}))
        assert {row["composition"] for row in rows} == set(BY_NAME), set(BY_NAME) - {row["composition"] for row in rows}


def test_rows_are_whole_exercises(train: list[dict[str, Any]]) -> None:
    for row in train:
        assert re.fullmatch(r'def \w+\(\w+\):\n    """.*\n    """\n', row["prompt"], re.DOTALL)
        assert 1 <= row["prompt"].count("    >>> ") <= 3
        assert all(line.startswith("    ") for line in row["solution"].splitlines()) and row["solution"].endswith("\n")
        tree = ast.parse(row["prompt"] + row["solution"]).body
        assert len(tree) == 1 and isinstance(tree[0], ast.FunctionDef) and tree[0].name == row["entry_point"]
        docstring = ast.get_docstring(tree[0])
        assert docstring is not None
        described = docstring.split(">>>")[0]
        for constant in row["constants"]:  # the words state what the code needs
            assert constant in described and constant in row["solution"]
        shown = re.findall(r">>> \w+\((.*)\)", row["prompt"])
        tested = re.findall(r"candidate\((.*?)\) ==", row["test"])
        assert len(tested) >= 2 and not set(shown) & set(tested)
    compositions = collections.Counter("+" in row["composition"] for row in train)
    assert 0.4 < compositions[True] / len(train) < 0.85


def test_the_test_notices_each_constant(train: list[dict[str, Any]]) -> None:
    """Mutation: a solution with one constant changed fails its own exercise's test."""
    jobs = []
    for row in train[:150]:
        for constant in row["constants"]:
            other = str(int(constant) + 1) if constant.isdigit() else repr(teacher._misspelt(constant[1:-1]))
            changed = re.sub(rf"(?<![\w']){re.escape(constant)}(?![\w'])", other, row["solution"])
            assert changed != row["solution"]
            jobs.append(Job(row["prompt"] + changed, row["test"], row["entry_point"]))
    assert len(jobs) > 100
    assert {result.status for result in run_many(jobs)} == {"failed"}


def test_solutions_pass_and_empty_bodies_fail(held: list[dict[str, Any]]) -> None:
    right = [Job(row["prompt"] + row["solution"], row["test"], row["entry_point"]) for row in held]
    empty = [Job(row["prompt"] + "    return None\n", row["test"], row["entry_point"]) for row in held[:50]]
    assert {result.status for result in run_many(right)} == {"passed"}
    assert {result.status for result in run_many(empty)} == {"failed"}


def test_splits_share_nothing(train: list[dict[str, Any]], held: list[dict[str, Any]]) -> None:
    assert overlaps(train, held) == {"names": 0, "constants": 0, "compositions": 0, "prompts": 0}
    found = overlaps(train, [train[0] | {"prompt": "another"}])
    assert found["names"] == 1 and found["prompts"] == 0  # the count does count
    for row in held:
        assert held_out("name", row["entry_point"]) and all(held_out("constant", c) for c in row["constants"])
        assert "+" not in row["composition"] or held_out("pair", row["composition"])
    every = {f"{a.name}+{b.name}" for pairs in teacher.PAIRS.values() for a, b in pairs}
    assert len(every) > 500
    assert 0.15 < len(teacher.PAIRS["held-out"]) / len(every) < 0.25


def test_a_seed_decides_everything() -> None:
    first, again, other = (list(write_exercises(40, seed, "train", {})) for seed in ("a", "a", "b"))
    assert first == again
    assert not {row["prompt"] for row in first} & {row["prompt"] for row in other}


def test_a_wrong_family_does_not_get_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second child runs the finished text: a result that another process does not repeat is dropped."""
    family = teacher.Family("by_hash", "text", "ints", "hash", ("hash it",), "[hash({v})]")
    draft = Draft("hash_it", "s", (family,), ((),), "Hash it.")
    monkeypatch.setattr(teacher, "compose", lambda rng, split: draft)
    counters: dict[str, int] = {}
    with pytest.raises(RuntimeError, match="short after"):
        list(write_exercises(5, "x", "train", counters, attempts=1))
    assert set(counters) <= {"dropped: an example does not hold", "dropped: repeated", "dropped: no short example"}
    assert counters["dropped: an example does not hold"] > 0


def test_a_family_that_never_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "TIMEOUT", 0.5)
    family = teacher.Family("endless", "int", "int", "spin", ("spin",), "{v}", (), ("while True:", "    pass"))
    monkeypatch.setattr(teacher, "compose", lambda rng, split: Draft("spin", "n", (family,), ((),), "Spin."))
    with pytest.raises(RuntimeError, match="timed_out"):
        list(write_exercises(5, "x", "train", {}))
