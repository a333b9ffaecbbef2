"""The offline teacher: composes exercises from a table of families. It is a program, not a language model.

An exercise is one step, two, or an early return and a step (`families.FAMILIES`, `families.GUARDS`): a function to
complete, whose docstring says what to do, states every constant and shows one to three examples; its solution; and a
test on other inputs. Every solution is executed in a sandboxed child process: the examples' results come from that run,
and a second child, with another hash seed, runs the finished text again and keeps the exercise only if its examples and
its test hold. The test's inputs are chosen so that a solution with any one constant altered fails, and one with another
operator wherever any of the inputs that were tried tells the two apart.

A family is drawn in inverse proportion to the lines of its shortest body, and so is one of its bodies: short ones
often, long ones seldom, in both splits alike. The first course (`COURSES`) is a part of it for a model of a few million
parameters.

Training and held-out exercises share families and argument names. They never share a function name, a
constant or a two-step composition: a hash of the name, the constant or the pair decides which split may
use it, whatever the seed. `overlaps` counts what two sets of exercises share.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import random
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from data_tools import mutants, wording
from data_tools.exercise_inputs import LARGEST_COUNT, Inputs, word
from data_tools.families import ADJECTIVES, ARGUMENTS, FAMILIES, GUARDS, NOUNS, Family, Form
from phi1.evaluate.sandbox import Job, Server

SOURCE = "offline-teacher"
Split = Literal["train", "held-out"]
CourseName = Literal["first", "whole"]
HELD_OUT_SHARE = 0.2
"""Share of names, of constants and of pairs that only held-out exercises may use."""


@dataclasses.dataclass(frozen=True)
class Course:
    """What exercises are drawn from."""

    shares: dict[str, float]
    """Of exercises with one step ("single"), with two ("pair"), and with an early return before a step ("guarded")."""
    families: tuple[Family, ...]
    plain: bool
    """Each family's first body only, in the imperative, in one layout."""


COURSES: dict[CourseName, Course] = {
    "first": Course({"single": 0.5, "pair": 0.5}, tuple(family for family in FAMILIES if family.first), plain=True),
    "whole": Course({"single": 0.22, "pair": 0.55, "guarded": 0.23}, FAMILIES, plain=False),
}
BATCH = 256
"""Exercises per sandboxed child."""
TIMEOUT = 120.0
"""Seconds for a child: some hundred times what it needs."""

EXAMPLE_COUNTS = (1,) * 16 + (2, 2, 2, 3)
LONGEST_EXAMPLE = 32  # characters of an example's input, and of its result: keeps an exercise short
LONGEST_RESULT = 2000  # characters of a result in a test

Constant = int | str


def held_out(kind: Literal["name", "constant", "pair"], key: str) -> bool:
    """Whether only held-out exercises may use this name, constant or pair: a hash of it decides."""
    digest = hashlib.sha256(f"{kind}:{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


class _Weighted:
    """Tuples of steps, drawn by the product of the families' weights."""

    def __init__(self, choices: Iterable[tuple[Family, ...]]) -> None:
        self.choices = list(choices)
        weights = [_product(family.weight for family in steps) for steps in self.choices]
        self._cumulative = list(itertools.accumulate(weights))

    def draw(self, rng: random.Random) -> tuple[Family, ...]:
        return rng.choices(self.choices, cum_weights=self._cumulative)[0]


def _product(numbers: Iterable[float]) -> float:
    product = 1.0
    for number in numbers:
        product *= number
    return product


def _of(split: Split, pairs: Iterable[tuple[Family, Family]]) -> _Weighted:
    return _Weighted(
        pair for pair in pairs if held_out("pair", f"{pair[0].name}+{pair[1].name}") == (split == "held-out")
    )


def _compositions(course: Course, split: Split) -> dict[str, _Weighted]:
    """What a split of a course may draw, by the keys of its shares."""
    # What sees small integers only would take its time over large ones, as a first step may give.
    second = [family for family in course.families if not family.forms[0].recursive and family.sees != "small"]
    pairs = [
        (before, after)
        for before in course.families
        for after in second
        if before.gives == after.takes and before is not after and any(form.begins for form in before.forms)
    ]
    guarded = [
        (guard, family)
        for guard in GUARDS
        for family in second
        if (guard.takes, guard.gives) == (family.takes, family.gives)
    ]
    return {
        "single": _Weighted((family,) for family in course.families),
        "pair": _of(split, pairs),
        "guarded": _of(split, guarded),
    }


COMPOSITIONS: dict[tuple[CourseName, Split], dict[str, _Weighted]] = {
    (name, split): _compositions(course, split) for name, course in COURSES.items() for split in typing.get_args(Split)
}


@dataclasses.dataclass(frozen=True)
class Draft:
    """An exercise before it was run: what to do, not yet what comes out."""

    name: str
    argument: str
    steps: tuple[Family, ...]
    forms: tuple[Form, ...]
    constants: tuple[tuple[Constant, ...], ...]
    description: str
    style: tuple[str, bool] = ("plain", False)

    @property
    def composition(self) -> str:
        """Names of the steps, "a+b" (or "a")."""
        return "+".join(step.name for step in self.steps)

    def solution(self, constants: Sequence[Sequence[Constant]] | None = None) -> str:
        """The indented body, with other constants on request."""
        lines: list[str] = []
        value = self.argument
        for number, (form, values) in enumerate(zip(self.forms, constants or self.constants, strict=True)):
            lines += form.fill({"v": value, "f": self.name} | dict(zip("ab", map(repr, values), strict=False)))
            if number + 1 < len(self.forms) and not form.guards:
                value = lines.pop().removeprefix("return ")
                if not value.isidentifier() or value in self.forms[number + 1].names:
                    lines.append(f"result = {value}")
                    value = "result"
        return "".join(f"    {line}\n" if line else "\n" for line in lines)

    def altered(self) -> Iterator[str]:
        """Bodies with one constant a little off: each must fail the exercise's test."""
        for i, values in enumerate(self.constants):
            for j, constant in enumerate(values):
                others = (constant + 1, constant - 1) if isinstance(constant, int) else (_misspelt(constant),)
                for other in others:
                    row = (*values[:j], other, *values[j + 1 :])
                    yield self.solution((*self.constants[:i], row, *self.constants[i + 1 :]))

    def prompt(self, examples: Sequence[tuple[str, str]]) -> str:
        """`def` line and docstring; examples: (input, result) as Python literals."""
        kinds = self.steps[0].takes, self.steps[-1].gives
        return wording.prompt(self.name, self.argument, kinds, self.description, self.style, examples)

    def inputs(self, rng: random.Random) -> Inputs:
        """What draws its arguments."""
        sees = self.steps[0].sees or (self.steps[-1].sees if self.forms[0].guards else "")
        return Inputs(self.steps[0].takes, sees, [c for values in self.constants for c in values], rng)


def _misspelt(text: str) -> str:
    return text[:-1] + ("e" if text[-1] != "e" else "a")


def draw_constant(domain: str, rng: random.Random, split: Split, above: int = 0) -> Constant:
    """A constant that `split` may use: "number" 3..499, "larger" (a number greater than `above`),
    "count" 3..12, "word" two to five lower-case letters."""
    while True:
        constant: Constant
        if domain == "word":
            constant = word(rng, rng.choice((1, 1, 2))) + rng.choice(("", *"nrstlmkd"))
        elif domain == "count":
            constant = rng.randint(3, LARGEST_COUNT)
        elif domain == "larger":
            constant = above + rng.randint(2, 99)
        else:
            constant = rng.choice((rng.randint(3, 9), *[rng.randint(10, 99)] * 5, rng.randint(100, 499)))
        if held_out("constant", repr(constant)) == (split == "held-out"):
            return constant


def _constants(step: Family, rng: random.Random, split: Split) -> tuple[Constant, ...]:
    values: list[Constant] = []
    while len(values) < len(step.constants):
        above = values[-1] if values and isinstance(values[-1], int) else 0
        constant = draw_constant(step.constants[len(values)], rng, split, above)
        if constant not in values:
            values.append(constant)
    return tuple(values)


def _name(steps: Sequence[Family], rng: random.Random, split: Split) -> str:
    verbs = list(dict.fromkeys(step.verb for step in steps if step.verb))  # a guard has none
    while True:
        adjective, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
        name = rng.choice(
            (
                f"{verbs[0]}_{adjective}_{noun}",
                f"{'_and_'.join(verbs)}_{noun}",
                f"{adjective}_{noun}",
                f"{noun}_to_{verbs[-1]}",
            )
        )
        if held_out("name", name) == (split == "held-out"):
            return name


def compose(rng: random.Random, split: Split, course: CourseName = "whole") -> Draft:
    """Draws steps, constants, names and wording."""
    shares = COURSES[course].shares
    how = rng.choices(list(shares), list(shares.values()))[0]
    return compose_steps(COMPOSITIONS[course, split][how].draw(rng), rng, split, plain=COURSES[course].plain)


def compose_steps(steps: tuple[Family, ...], rng: random.Random, split: Split, *, plain: bool = False) -> Draft:
    """An exercise of these steps: draws bodies, constants, names and wording. plain: see `Course`."""
    forms = []
    for step in steps:
        usable = [form for form in step.forms if form.begins or step is steps[-1]][: 1 if plain else None]
        forms.append(rng.choices(usable, [1 / len(form.lines) for form in usable])[0])
    argument = rng.choice(ARGUMENTS[steps[0].takes])
    constants = tuple(_constants(step, rng, split) for step in steps)
    # No backquotes around constants: before a constant should stand what stands before it in code (LOG.md).
    clauses = [
        rng.choice(step.phrases).format(**dict(zip("ab", map(repr, values), strict=False)))
        for step, values in zip(steps, constants, strict=True)
    ]
    what = wording.description(rng, steps, clauses, argument, imperative=plain)
    name = _name(steps, rng, split)
    layout = wording.PLAIN if plain else wording.layout(rng)
    return Draft(name, argument, steps, tuple(forms), constants, what, layout)


_RUN_BATCH = (
    f"LONGEST = {LONGEST_RESULT}"
    + """
import json
def outputs(name, argument, body, values):
    space = {}
    exec(compile("def " + name + "(" + argument + "):\\n" + body, "exercise", "exec"), space)
    results = []
    for value in values:
        try:
            result = repr(space[name](value))
            results.append(result if len(result) <= LONGEST else None)
        except Exception:
            results.append(None)
    return results
def run(name, argument, bodies, inputs):
    values = [eval(value) for value in inputs]
    results = [outputs(name, argument, body, values) for body in bodies]
    return results if [repr(value) for value in values] == inputs else "changes its input"
print(json.dumps([run(*job) for job in JOBS]))
"""
)

_CHECK_BATCH = """
import doctest, json
def holds(prompt, solution, test, name):
    space = {}
    try:
        exec(compile(prompt + solution, "exercise", "exec"), space)
        examples = doctest.DocTestParser().get_examples(space[name].__doc__)
        if not examples:
            return "no example"
        for example in examples:
            if repr(eval(example.source, space)) != example.want.rstrip("\\n"):
                return "an example does not hold"
        exec(compile(test, "test", "exec"), space)
        space["check"](space[name])
    except Exception as error:
        return type(error).__name__
    return ""
print(json.dumps([holds(*job) for job in JOBS]))
"""


def _run_batch(server: Server, program: str, jobs: Sequence[Any]) -> list[Any]:
    """Runs `program` over JSON-able `jobs` in one sandboxed child; returns what it printed, decoded.

    Raises RuntimeError if the child did not finish: the families are ours, so that is a bug in one of them.
    """
    source = f"import json\nJOBS = json.loads({json.dumps(jobs)!r})\n{program}"
    result = server.run(Job(source, timeout=TIMEOUT, memory=1 << 30, output_limit=1 << 26))
    if result.status != "passed":
        raise RuntimeError(f"offline teacher: the sandboxed batch {result.status}: {result.detail}")
    return json.loads(result.output)


def write_exercises(
    count: int, seed: str, split: Split, counters: dict[str, int], *, course: CourseName = "whole", attempts: int = 12
) -> Iterator[dict[str, Any]]:
    """Yields exactly `count` exercises, a pure function of (count, seed, split, course).

    Rows have `prompt, solution, test, entry_point, family, composition, constants, seed`. Drafts that were
    not kept are added to `counters` under the reason.
    """
    with contextlib.closing(Server()) as first, contextlib.closing(Server()) as second:
        yield from _exercises(count, seed, split, counters, course, attempts, first, second)


def _exercises(
    count: int,
    seed: str,
    split: Split,
    counters: dict[str, int],
    course: CourseName,
    attempts: int,
    first: Server,
    second: Server,
) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{seed}/{split}")
    made: set[str] = set()
    for _ in range(attempts * (count // BATCH + 1)):
        drafts = [compose(rng, split, course) for _ in range(BATCH)]
        jobs = []
        for draft in drafts:
            inputs = draft.inputs(rng)
            values = [repr(inputs.draw(short=short)) for short in (True,) * 8 + (False,) * 16]
            solution, constants = draft.solution(), list(draft.altered())
            operators = list(mutants.with_other_operators(solution, draft.argument))
            jobs.append((draft.name, draft.argument, [solution, *constants, *operators], values))
        finished: list[dict[str, Any]] = []
        for draft, job, outputs in zip(drafts, jobs, _run_batch(first, _RUN_BATCH, jobs), strict=True):
            row, reason = _finish(draft, job[3], outputs, rng, seed)
            if row is None or row["prompt"] in made:
                reason = reason or "repeated"
                counters[f"dropped: {reason}"] = counters.get(f"dropped: {reason}", 0) + 1
            else:
                made.add(row["prompt"])
                finished.append(row)
        checks = [(row["prompt"], row["solution"], row["test"], row["entry_point"]) for row in finished]
        for row, failure in zip(finished, _run_batch(second, _CHECK_BATCH, checks), strict=True):
            if failure:
                counters[f"dropped: {failure}"] = counters.get(f"dropped: {failure}", 0) + 1
                continue
            yield row
            count -= 1
            if count == 0:
                return
    raise RuntimeError(f"offline teacher: {count} exercises short after {attempts} times the drafts needed: {counters}")


def _finish(
    draft: Draft, inputs: Sequence[str], outputs: Sequence[Sequence[str | None]] | str, rng: random.Random, seed: str
) -> tuple[dict[str, Any] | None, str]:
    """Chooses the docstring's examples and the test's inputs, or gives the reason why it cannot."""
    if isinstance(outputs, str):
        return None, outputs
    right, altered = outputs[0], outputs[1:]
    empties = {"[]", "{}", "''"}
    short = [
        i
        for i in range(8)
        if (out := right[i]) is not None
        and len(inputs[i]) <= LONGEST_EXAMPLE
        and len(out) <= LONGEST_EXAMPLE
        and inputs[i] not in empties
    ]
    # A result that is empty, or the input itself, teaches little: those come last.
    short.sort(key=lambda i: (right[i] in empties) + (right[i] == inputs[i]))
    wanted = rng.choice(EXAMPLE_COUNTS)
    chosen: list[int] = []
    for i in short:
        if len(chosen) < wanted and inputs[i] not in [inputs[j] for j in chosen]:
            chosen.append(i)
    if not chosen:
        return None, "no short example"
    if right[chosen[0]] in empties:
        return None, "only empty results"
    known = {inputs[i] for i in chosen}
    usable = []
    for i, (value, result) in enumerate(zip(inputs, right, strict=True)):
        if result is not None and len(result) <= LONGEST_RESULT and value not in known:
            usable.append(i)
            known.add(value)
    if len({right[i] for i in usable}) < 2:
        return None, "always the same result"
    # Greedy: for each altered solution, a test input that tells it from the right one.
    tests: list[int] = []
    constants = len(list(draft.altered()))  # the rest are operators, some of which make no difference
    for number, wrong in enumerate(altered):
        if any(wrong[i] != right[i] for i in tests):
            continue
        telling = next((i for i in usable if wrong[i] != right[i]), None)
        if telling is not None:
            tests.append(telling)
        elif number < constants:
            return None, "a constant that no input shows"
    tests += [i for i in reversed(usable) if i not in tests][: max(2, 5 - len(tests))]
    test = "def check(candidate):\n" + "".join(f"    assert candidate({inputs[i]}) == {right[i]}\n" for i in tests)
    row = {
        "prompt": draft.prompt([(inputs[i], str(right[i])) for i in chosen]),
        "solution": draft.solution(),
        "test": test,
        "entry_point": draft.name,
        "family": draft.steps[-1].name if draft.forms[0].guards else draft.steps[0].name,
        "composition": draft.composition,
        "constants": [repr(c) for values in draft.constants for c in values],
        "seed": seed,
    }
    return row, ""


def overlaps(train: Iterable[dict[str, Any]], held: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many function names, constants and two-step compositions (and whole prompts) both sets use: all must be 0."""

    def used(rows: Iterable[dict[str, Any]]) -> dict[str, set[str]]:
        sets: dict[str, set[str]] = {"names": set(), "constants": set(), "compositions": set(), "prompts": set()}
        for row in rows:
            sets["names"].add(row["entry_point"])
            sets["constants"].update(row["constants"])
            sets["prompts"].add(row["prompt"])
            if "+" in row["composition"]:
                sets["compositions"].add(row["composition"])
        return sets

    ours, theirs = used(train), used(held)
    return {what: len(ours[what] & theirs[what]) for what in ours}
