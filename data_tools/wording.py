"""How the offline teacher words an exercise: sentences, and layouts of a docstring."""

import random
from collections.abc import Callable, Sequence

from data_tools.families import KINDS, Family

# A step's clauses are a and b, "keep the numbers"; A is "Keep the numbers", as "keeps the numbers", As "Keeps the
# numbers".
_ONE = {"{A}.": 6, "Given {arg}, {a}.": 4, "{As}.": 5, "What do you get if you {a}?": 2, "Can you {a}?": 2}
_TWO = {
    "{A}, then {b}.": 3,
    "{A}. Then {b}.": 3,
    "Given {arg}, {a}, then {b}.": 3,
    "First {a}, then {b}.": 3,
    "{As}, then {bs}.": 2,
    "{As} and then {bs}.": 2,
    "What do you get if you {a}, then {b}?": 1,
    "Can you {a} and then {b}?": 1,
}
# a: the early return, b: what is done otherwise.
_GUARDED = {
    "{B}, but {a}.": 3,
    "{B}. But {a}.": 3,
    "{A}, otherwise {b}.": 3,
    "{A}. Otherwise {b}.": 3,
    "{Bs}, but {as}.": 3,
    "Given {arg}, {b}, but {a}.": 2,
    "Can you {b}, but {a}?": 1,
}
"""Sentences, and how often each is drawn, relatively."""


PLAIN = ("plain", False)
"""The layout of a first course: no section, and no types."""


def description(
    rng: random.Random, steps: Sequence[Family], clauses: Sequence[str], argument: str, *, imperative: bool = False
) -> str:
    """A sentence or two that say what to do; clauses: a step's each, beginning with a verb. imperative: in that mood
    only.
    """
    frames = _GUARDED if steps[0].forms[0].guards else _ONE if len(steps) == 1 else _TWO
    if imperative:
        frames = {frame: weight for frame, weight in frames.items() if "s}" not in frame and "?" not in frame}
    frame = rng.choices(list(frames), list(frames.values()))[0]
    first, last = clauses[0], clauses[-1]
    fields = {"a": first, "b": last, "as": third_person(first), "bs": third_person(last), "arg": argument}
    return frame.format(**fields, **{key.capitalize(): _capital(fields[key]) for key in ("a", "b", "as", "bs")})


def third_person(clause: str) -> str:
    """A clause with its verb, the first word, as in "keeps the numbers"."""
    verb, _, rest = clause.partition(" ")
    if verb.endswith(("s", "x", "z", "ch", "sh")):
        verb += "es"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ies"
    else:
        verb += "s"
    return f"{verb} {rest}".rstrip()


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _plain(what: str, shown: list[str], argument: str, takes: str, gives: str) -> list[str]:
    return [what, "", *shown]


def _headed(what: str, shown: list[str], argument: str, takes: str, gives: str) -> list[str]:
    return [what, "", "Example:" if len(shown) == 2 else "Examples:", *shown]


def _examples_first(what: str, shown: list[str], argument: str, takes: str, gives: str) -> list[str]:
    return ["", *shown, "", what]


def _args_and_returns(what: str, shown: list[str], argument: str, takes: str, gives: str) -> list[str]:
    return [what, "", "Args:", f"    {argument}: {takes}", "", "Returns:", f"    {gives}", "", *shown]


def _fields(what: str, shown: list[str], argument: str, takes: str, gives: str) -> list[str]:
    return [what, "", f":param {argument}: {takes}", f":return: {gives}", "", *shown]


_LAYOUTS: dict[str, tuple[float, Callable[[str, list[str], str, str, str], list[str]]]] = {
    "plain": (0.72, _plain),
    "headed": (0.1, _headed),
    "examples first": (0.08, _examples_first),
    "args and returns": (0.05, _args_and_returns),
    "fields": (0.05, _fields),
}
ANNOTATED_SHARE = 0.15
"""Share of functions whose `def` line states types."""


def layout(rng: random.Random) -> tuple[str, bool]:
    """A layout, and whether the `def` line states types."""
    names = list(_LAYOUTS)
    name = rng.choices(names, [_LAYOUTS[name][0] for name in names])[0]
    return name, rng.random() < ANNOTATED_SHARE


def prompt(
    name: str,
    argument: str,
    kinds: tuple[str, str],
    what: str,
    style: tuple[str, bool],
    examples: Sequence[tuple[str, str]],
) -> str:
    """`def` line and docstring; kinds: taken and given; examples: (input, result) as Python literals."""
    shown = [line for value, result in examples for line in (f">>> {name}({value})", result)]
    takes, gives = (KINDS[kind] for kind in kinds)
    lines = _LAYOUTS[style[0]][1](what, shown, argument, takes[1], gives[1])
    head = f"def {name}({argument}: {takes[0]}) -> {gives[0]}:" if style[1] else f"def {name}({argument}):"
    body = "".join(f"    {line}".rstrip() + "\n" for line in lines[1:])
    return f'{head}\n    """{lines[0]}\n{body}    """\n'
