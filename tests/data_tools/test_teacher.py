"""The offline teacher: every family works as its words say, and held-out means held out."""

import ast
import collections
import itertools
import random
import re
from typing import Any

import pytest

from data_tools import mutants, teacher, wording
from data_tools.families import BY_NAME, FAMILIES, GUARDS, Family, Form
from data_tools.teacher import Draft, Split, compose_steps, held_out, overlaps, write_exercises
from phi1.evaluate.sandbox import Job, run_many


@pytest.fixture(scope="module")
def train() -> list[dict[str, Any]]:
    return list(write_exercises(400, "test", "train", {}))


@pytest.fixture(scope="module")
def held() -> list[dict[str, Any]]:
    return list(write_exercises(200, "test", "held-out", {}))


def kept_of(steps: list[tuple[Family, ...]], split: Split, monkeypatch: pytest.MonkeyPatch, wanted: int) -> set[str]:
    """Writes exercises of these steps in turn until `wanted` families have been kept as the first step; their names."""
    turns = itertools.cycle(steps)
    kept: set[str] = set()
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "compose", lambda rng, split, course: compose_steps(next(turns), rng, split))
        for row in write_exercises(20 * wanted, "families", split, {}):
            kept.add(row["composition"].split("+")[0])
            if len(kept) == wanted:
                break
    return kept


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_every_family_is_kept_by_the_sandbox_in_both_splits(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = kept_of([(family,) for family in FAMILIES], split, monkeypatch, len(FAMILIES))
    assert kept == {family.name for family in FAMILIES}
    assert len(kept) >= 150


def test_every_guard_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    pairs = {
        guard: [pair for pair in teacher.COMPOSITIONS["whole", "train"]["guarded"].choices if pair[0] is guard]
        for guard in GUARDS
    }
    turns = [rng.choice(pairs[guard]) for _ in range(12) for guard in GUARDS]
    assert kept_of(turns, "train", monkeypatch, len(GUARDS)) == {guard.name for guard in GUARDS}


def test_forms_of_a_family_do_the_same() -> None:
    """Each body of each family, on the teacher's own inputs: equal results, and the input left as it was."""
    rng = random.Random(3)
    program = "import copy\nfailed = []\n"
    for family in FAMILIES:
        for _ in range(5 if len(family.forms) > 1 else 1):
            draft = compose_steps((family,), rng, "train")
            inputs = draft.inputs(rng)
            calls = [repr(inputs.draw(short=i < 3)) for i in range(10)]
            constants = dict(zip("ab", map(repr, draft.constants[0]), strict=False))
            for i, form in enumerate(family.forms):
                lines = form.fill({"v": "v", "f": f"f{i}"} | constants)
                program += f"def f{i}(v):\n" + "".join(f"    {line}\n" for line in lines)
            bodies = ", ".join(f"f{i}" for i in range(len(family.forms)))
            program += f"""
for value in [{", ".join(calls)}]:
    before = copy.deepcopy(value)
    results = {{repr(f(value)) for f in ({bodies},)}}
    if len(results) > 1 or value != before:
        failed.append(({family.name!r}, value, results))
"""
    (result,) = run_many([Job(program + "print(failed)\n")])
    assert (result.status, result.output) == ("passed", "[]\n")


def test_the_whole_of_an_introduction_is_there() -> None:
    forms = [
        ast.parse(
            "def f(v):\n" + "".join(f"    {line}\n" for line in form.fill({"v": "v", "a": "'a'", "b": "'b'", "f": "f"}))
        )
        for family in FAMILIES
        for form in family.forms
    ]
    kinds = collections.Counter(kind for tree in forms for kind in {type(node) for node in ast.walk(tree)})
    for kind in (
        ast.If,
        ast.While,
        ast.For,
        ast.AugAssign,
        ast.DictComp,
        ast.ListComp,
        ast.ClassDef,
        ast.Lambda,
        ast.IfExp,
    ):
        assert kinds[kind] >= 2, kind
    nested = [
        tree
        for tree in forms
        for loop in ast.walk(tree)
        if isinstance(loop, (ast.For, ast.While))
        and any(isinstance(node, (ast.For, ast.While)) for part in loop.body for node in ast.walk(part))
    ]
    assert len(nested) >= 5
    assert sum(form.recursive for family in FAMILIES for form in family.forms) >= 10
    assert sum(len(form.lines) > 2 for family in FAMILIES for form in family.forms) >= 100


def test_rows_are_whole_exercises(train: list[dict[str, Any]]) -> None:
    for row in train:
        assert re.match(r'def \w+\(\w+(: [\w\[\], ]+)?\)( -> [\w\[\], ]+)?:\n    """', row["prompt"])
        assert row["prompt"].endswith('    """\n')
        assert 1 <= row["prompt"].count("    >>> ") <= 3
        assert not re.search(r"[ \t]\n|\{", row["prompt"].split(">>>")[0])
        assert all(not line or line.startswith("    ") for line in row["solution"].splitlines())
        tree = ast.parse(row["prompt"] + row["solution"]).body
        assert len(tree) == 1 and isinstance(tree[0], ast.FunctionDef) and tree[0].name == row["entry_point"]
        docstring = ast.get_docstring(tree[0])
        assert docstring is not None
        described = re.sub(r">>> .*\n.*\n", "", docstring)
        for constant in row["constants"]:  # the words state what the code needs
            assert constant in described and constant in row["solution"]
        shown = re.findall(r">>> \w+\((.*)\)", row["prompt"])
        tested = re.findall(r"candidate\((.*?)\) ==", row["test"])
        assert len(tested) >= 2 and not set(shown) & set(tested)
    compositions = collections.Counter("+" in row["composition"] for row in train)
    assert 0.4 < compositions[True] / len(train) < 0.85


def test_wordings_and_layouts_vary(train: list[dict[str, Any]]) -> None:
    prompts = [row["prompt"] for row in train]
    for part in (
        '"""Given ',
        "?\n",
        "\n    Args:\n",
        "    :param ",
        "Example:",
        '"""\n    >>> ',
        ") -> ",
        "but ",
        "s the ",
    ):
        assert sum(part in prompt for prompt in prompts) >= 2, part


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


def test_the_test_notices_operators(train: list[dict[str, Any]]) -> None:
    """Mutation: `>` for `>=`, `+` for `-` and the like fail the test, but for the few that make no difference."""
    wrong = [(row, body) for row in train[:200] for body in mutants.with_other_operators(row["solution"], "_")]
    assert len(wrong) > 150
    results = run_many([Job(row["prompt"] + body, row["test"], row["entry_point"]) for row, body in wrong])
    passed = [body for (_, body), result in zip(wrong, results, strict=True) if result.status == "passed"]
    assert len(passed) < 0.12 * len(wrong), "\n".join(passed)


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
    pairs = {
        split: {steps for how in ("pair", "guarded") for steps in teacher.COMPOSITIONS["whole", split][how].choices}
        for split in ("train", "held-out")
    }
    assert not pairs["train"] & pairs["held-out"]
    every = len(pairs["train"]) + len(pairs["held-out"])
    assert every > 5000
    assert 0.15 < len(pairs["held-out"]) / every < 0.25


def test_both_splits_draw_families_alike() -> None:
    """Held-out exercises are not the easy ones: mean lines of a solution, over 3,000 drafts of each."""

    def lines(split: Split) -> float:
        rng = random.Random(0)
        return sum(teacher.compose(rng, split).solution().count("\n") for _ in range(3000)) / 3000

    assert lines("held-out") == pytest.approx(lines("train"), rel=0.05)


def test_a_seed_decides_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "BATCH", 64)
    first, again, other = (list(write_exercises(40, seed, "train", {})) for seed in ("a", "a", "b"))
    assert first == again
    assert not {row["prompt"] for row in first} & {row["prompt"] for row in other}


def only(draft: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "compose", lambda rng, split, course: draft)


def test_a_wrong_family_does_not_get_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second child runs the finished text: a result that another process does not repeat is dropped."""
    form = Form(("return [hash({v})]",))
    family = Family("by_hash", "text", "ints", "hash", ("hash it",), (form,))
    only(Draft("hash_it", "s", (family,), (form,), ((),), "Hash it."), monkeypatch)
    counters: dict[str, int] = {}
    with pytest.raises(RuntimeError, match="short after"):
        list(write_exercises(5, "x", "train", counters, attempts=1))
    assert set(counters) <= {"dropped: an example does not hold", "dropped: repeated", "dropped: no short example"}
    assert counters["dropped: an example does not hold"] > 0


def test_a_family_that_never_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "TIMEOUT", 0.5)
    form = Form(("while True:", "    pass", "return {v}"))
    family = Family("endless", "int", "int", "spin", ("spin",), (form,))
    only(Draft("spin", "n", (family,), (form,), ((),), "Spin."), monkeypatch)
    with pytest.raises(RuntimeError, match="timed_out"):
        list(write_exercises(5, "x", "train", {}))


def test_a_value_is_named_after_what_gave_it() -> None:
    """The variable that a first step returns goes on into the second, unless that one has a variable of the name."""
    kept, totals, doubled = BY_NAME["take_until"], BY_NAME["running_totals"], BY_NAME["multiply"]
    steps = {"take_until+running_totals": (kept, totals), "take_until+take_until": (kept, kept)}
    steps |= {"multiply+running_totals": (doubled, totals)}
    bodies = {}
    for name, pair in steps.items():
        draft = Draft(
            "f", "v", pair, tuple(family.forms[0] for family in pair), tuple((5,) * len(f.constants) for f in pair), ""
        )
        bodies[name] = draft.solution()
    assert (
        "for x in kept:" in bodies["take_until+running_totals"] and "result" not in bodies["take_until+running_totals"]
    )
    assert (
        "result = kept\n" in bodies["take_until+take_until"] and "for x in result:" in bodies["take_until+take_until"]
    )
    assert "result = [x * 5 for x in v]" in bodies["multiply+running_totals"]


def test_the_first_course_is_a_part_of_the_whole():
    first = teacher.COURSES["first"]
    assert len(first.families) >= 50 and set(first.families) < set(teacher.FAMILIES)
    for split in ("train", "held-out"):
        found = teacher.COMPOSITIONS["first", split]["pair"].choices
        assert len(found) > 100 and set(found) <= set(teacher.COMPOSITIONS["whole", split]["pair"].choices)
        rng = random.Random(0)
        drafts = [teacher.compose(rng, split, "first") for _ in range(300)]
        assert 100 < sum(len(draft.steps) == 2 for draft in drafts) < 200
        assert all(draft.style == wording.PLAIN and "?" not in draft.description for draft in drafts)
        assert all(
            form is step.forms[0] for draft in drafts for form, step in zip(draft.forms, draft.steps, strict=True)
        )
    rows = list(teacher.write_exercises(20, "0", "held-out", {}, course="first"))
    assert {name for row in rows for name in row["composition"].split("+")} <= {
        family.name for family in first.families
    }
