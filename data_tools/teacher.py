"""The offline teacher: composes exercises from a table of families. It is a program, not a language model.

An exercise is one step or two (`families.FAMILIES`): a function to complete, whose docstring says what to
do, states every constant and shows one to three examples; its solution; and a test on other inputs. Every
solution is executed in a sandboxed child process: the examples' results come from that run, and a second
child, with another hash seed, runs the finished text again and keeps the exercise only if its examples
and its test hold. The test's inputs are chosen so that a solution with any one constant altered fails.

Training and held-out exercises share families and argument names. They never share a function name, a
constant or a two-step composition: a hash of the name, the constant or the pair decides which split may
use it, whatever the seed. `overlaps` counts what two sets of exercises share.
"""

import contextlib
import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from data_tools.families import ADJECTIVES, ARGUMENTS, FAMILIES, NOUNS, Family
from phi1.evaluate.sandbox import Job, Server

SOURCE = "offline-teacher"
Split = Literal["train", "held-out"]
HELD_OUT_SHARE = 0.2
"""Share of names, of constants and of pairs that only held-out exercises may use."""
COMPOSED_SHARE = 0.5
"""Share of exercises with two steps."""
BATCH = 256
"""Exercises per sandboxed child."""
TIMEOUT = 120.0
"""Seconds for a child: some hundred times what it needs."""

SINGLE_FRAMES = ("{A}.", "{A}.", "Given {arg}, {a}.")
COMPOSED_FRAMES = ("{A}, then {b}.", "{A}. Then {b}.", "Given {arg}, {a}, then {b}.", "First {a}, then {b}.")
EXAMPLE_COUNTS = (1,) * 16 + (2, 2, 2, 3)
LONGEST_EXAMPLE = 32  # characters of an example's input, and of its result: keeps an exercise short
LARGEST_COUNT = 12  # of items or characters, so that an example that reaches it stays short
LONGEST_RESULT = 2000  # characters of a result in a test

_PAIRS = [(first, second) for first in FAMILIES for second in FAMILIES
          if first.gives == second.takes and first is not second]  # fmt: skip

Constant = int | str


def held_out(kind: Literal["name", "constant", "pair"], key: str) -> bool:
    """Whether only held-out exercises may use this name, constant or pair: a hash of it decides."""
    digest = hashlib.sha256(f"{kind}:{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


PAIRS: dict[Split, list[tuple[Family, Family]]] = {"train": [], "held-out": []}
for _pair in _PAIRS:
    PAIRS["held-out" if held_out("pair", f"{_pair[0].name}+{_pair[1].name}") else "train"].append(_pair)


@dataclasses.dataclass(frozen=True)
class Draft:
    """An exercise before it was run: what to do, not yet what comes out."""

    name: str
    argument: str
    steps: tuple[Family, ...]
    constants: tuple[tuple[Constant, ...], ...]
    description: str

    @property
    def composition(self) -> str:
        """Names of the steps, "a+b" (or "a")."""
        return "+".join(step.name for step in self.steps)

    def solution(self, constants: Sequence[Sequence[Constant]] | None = None) -> str:
        """The indented body, with other constants on request."""
        lines: list[str] = []
        value = self.argument
        for step, values in zip(self.steps, constants or self.constants, strict=True):
            fields = {"v": value} | {key: repr(c) for key, c in zip("ab", values, strict=False)}
            lines += [line.format(**fields) for line in step.setup]
            last = step is self.steps[-1]
            lines.append(f"{'return' if last else 'result ='} {step.expression.format(**fields)}")
            value = "result"
        return "".join(f"    {line}\n" for line in lines)

    def altered(self) -> Iterator[str]:
        """Bodies with one constant a little off: each must fail the exercise's test."""
        for i, values in enumerate(self.constants):
            for j, constant in enumerate(values):
                others = (constant + 1, constant - 1) if isinstance(constant, int) else (_misspelt(constant),)
                for other in others:
                    row = (*values[:j], other, *values[j + 1 :])
                    yield self.solution((*self.constants[:i], row, *self.constants[i + 1 :]))

    def prompt(self, examples: Iterable[tuple[str, str]]) -> str:
        """`def` line and docstring; examples: (input, result) as Python literals."""
        shown = "".join(f"    >>> {self.name}({value})\n    {result}\n" for value, result in examples)
        return f'def {self.name}({self.argument}):\n    """{self.description}\n\n{shown}    """\n'


def _misspelt(word: str) -> str:
    return word[:-1] + ("e" if word[-1] != "e" else "a")


def _word(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice("bcdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))


def draw_constant(domain: str, rng: random.Random, split: Split, above: int = 0) -> Constant:
    """A constant that `split` may use: "number" 3..499, "larger" (a number greater than `above`),
    "count" 3..12, "word" two to five lower-case letters."""
    while True:
        constant: Constant
        if domain == "word":
            constant = _word(rng, rng.choice((1, 1, 2))) + rng.choice(("", *"nrstlmkd"))
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
    while True:
        adjective, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
        verbs = "_and_".join(dict.fromkeys(step.verb for step in steps))
        name = rng.choice((f"{steps[0].verb}_{adjective}_{noun}", f"{verbs}_{noun}", f"{adjective}_{noun}",
                           f"{noun}_to_{steps[-1].verb}"))  # fmt: skip
        if held_out("name", name) == (split == "held-out"):
            return name


def compose(rng: random.Random, split: Split) -> Draft:
    """Draws steps, constants, names and wording."""
    steps: tuple[Family, ...]
    steps = rng.choice(PAIRS[split]) if rng.random() < COMPOSED_SHARE else (rng.choice(FAMILIES),)
    argument = rng.choice(ARGUMENTS[steps[0].takes])
    constants = tuple(_constants(step, rng, split) for step in steps)
    # No backquotes around constants: before a constant should stand what stands before it in code (LOG.md).
    clauses = [rng.choice(step.phrases).format(**{key: repr(c) for key, c in zip("ab", values, strict=False)})
               for step, values in zip(steps, constants, strict=True)]  # fmt: skip
    frame = rng.choice(SINGLE_FRAMES if len(steps) == 1 else COMPOSED_FRAMES)
    first = clauses[0]
    description = frame.format(A=first[0].upper() + first[1:], a=first, b=clauses[-1], arg=argument)
    return Draft(_name(steps, rng, split), argument, steps, constants, description)


def _integers(draft: Draft) -> list[int]:
    return [c for values in draft.constants for c in values if isinstance(c, int)]


def draw_input(draft: Draft, rng: random.Random, *, short: bool) -> Any:
    """An argument for the function, near its constants; short ones are for the docstring."""
    integers = _integers(draft)
    words = [c for values in draft.constants for c in values if isinstance(c, str)]
    counts = [c for c in integers if c <= LARGEST_COUNT]
    longest = max(counts, default=6) + 3
    reaching = bool(counts) and short and rng.random() < 0.5  # a short input, but longer than the count

    def number() -> int:
        if reaching:
            return rng.randint(0, 9)
        if integers and rng.random() < 0.6:
            constant = rng.choice(integers)
            return rng.choice((constant, constant - 1, constant + 1, constant * 2, constant * rng.randint(1, 4),
                               constant + rng.randint(-9, 9), constant - rng.choice(integers)))  # fmt: skip
        return rng.randint(0, 99) if rng.random() < 0.85 else rng.randint(-60, 600)

    def word() -> str:
        if counts and rng.random() < 0.5:  # about as long as the count
            length = rng.choice(counts) + rng.randint(-1, 2)
            return _word(rng, length // 2 + 1)[: max(1, length)]
        plain = _word(rng, rng.randint(1, 2 if short else max(3, longest // 2 + 1)))
        if words and rng.random() < 0.6:
            constant = rng.choice(words)
            return rng.choice((constant, constant + plain, plain + constant, plain + constant + _word(rng, 1)))
        return plain + rng.choice(("", "", *"nst"))

    size = rng.choice((2, 2, 3, 3, 4)) if short else rng.choice((0, 1, 3, 6, longest))
    if reaching:
        size = min(counts[0] + rng.randint(1, 2), 10)
    takes = draft.steps[0].takes
    if takes == "int":
        return number()
    if takes == "ints":
        drawn = [number() for _ in range(size)]
        return drawn if short or not drawn else drawn + rng.choices(drawn, k=2)
    if takes == "table":
        return {word(): number() for _ in range(min(size, 2) if short else size)}
    if short:
        size = min(size, rng.choice((1, 2))) if takes == "text" else min(size, 2 + (not words))
    drawn_words = [word() for _ in range(size)]
    if takes == "words":
        return drawn_words if short or not drawn_words else drawn_words + rng.choices(drawn_words, k=2)
    return " ".join(drawn_words)


_RUN_BATCH = """
import json
def outputs(argument, body, values):
    space = {}
    exec(compile("def f(" + argument + "):\\n" + body, "exercise", "exec"), space)
    results = []
    for value in values:
        try:
            results.append(repr(space["f"](value)))
        except Exception:
            results.append(None)
    return results
def run(argument, bodies, inputs):
    values = [eval(value) for value in inputs]
    results = [outputs(argument, body, values) for body in bodies]
    return results if [repr(value) for value in values] == inputs else "changes its input"
print(json.dumps([run(*job) for job in JOBS]))
"""

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
    count: int, seed: str, split: Split, counters: dict[str, int], *, attempts: int = 12
) -> Iterator[dict[str, Any]]:
    """Yields exactly `count` exercises, a pure function of (count, seed, split).

    Rows have `prompt, solution, test, entry_point, family, composition, constants, seed`. Drafts that were
    not kept are added to `counters` under the reason.
    """
    with contextlib.closing(Server()) as first, contextlib.closing(Server()) as second:
        yield from _exercises(count, seed, split, counters, attempts, first, second)


def _exercises(
    count: int, seed: str, split: Split, counters: dict[str, int], attempts: int, first: Server, second: Server
) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{seed}/{split}")
    made: set[str] = set()
    for _ in range(attempts * (count // BATCH + 1)):
        drafts = [compose(rng, split) for _ in range(BATCH)]
        shown = [[repr(draw_input(draft, rng, short=True)) for _ in range(8)] for draft in drafts]
        tried = [[repr(draw_input(draft, rng, short=False)) for _ in range(16)] for draft in drafts]
        jobs = [(draft.argument, [draft.solution(), *draft.altered()], short + long)
                for draft, short, long in zip(drafts, shown, tried, strict=True)]  # fmt: skip
        finished: list[dict[str, Any]] = []
        for draft, job, outputs in zip(drafts, jobs, _run_batch(first, _RUN_BATCH, jobs), strict=True):
            row, reason = _finish(draft, job[2], outputs, rng, seed)
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
    short = [i for i in range(8) if (out := right[i]) is not None and len(inputs[i]) <= LONGEST_EXAMPLE
             and len(out) <= LONGEST_EXAMPLE and inputs[i] not in empties]  # fmt: skip
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
    for wrong in altered:
        if any(wrong[i] != right[i] for i in tests):
            continue
        telling = next((i for i in usable if wrong[i] != right[i]), None)
        if telling is None:
            return None, "a constant that no input shows"
        tests.append(telling)
    tests += [i for i in reversed(usable) if i not in tests][: max(2, 5 - len(tests))]
    test = "def check(candidate):\n" + "".join(f"    assert candidate({inputs[i]}) == {right[i]}\n" for i in tests)
    row = {
        "prompt": draft.prompt([(inputs[i], str(right[i])) for i in chosen]),
        "solution": draft.solution(),
        "test": test,
        "entry_point": draft.name,
        "family": draft.steps[0].name,
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
