"""The offline teacher's table of exercise families, `curriculum/*.toml`: what one step does, in words and in Python.

A family takes a value of one kind and gives one of another; two compose where the kinds meet. A table in the files:

    [keep_above]                                           # its name
    step = "ints -> ints"                                  # the kinds
    verb = "keep"                                          # for names of functions
    say = ["keep the numbers greater than {a}", …]         # clauses that begin with a verb and state every constant
    constants = ["number"]                                 # domains of {a} and {b}: `teacher.draw_constant`
    sees = "negative"                                      # what inputs must hold: `exercise_inputs.SEES`
    code = ["return [x for x in {v} if x > {a}]", …]       # bodies that do the same; {v}: the value, {f}: the function
    first = true                                           # of the first course too: `teacher.COURSES`

A guard's code is an early return and goes on: `if not {v}:\n    return {a}`. It stands before a step, and its second
kind is what the whole function gives.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Mapping

from phi1.files import read_toml

CURRICULUM = pathlib.Path(__file__).resolve().parent / "curriculum"
KINDS = {
    "ints": ("list[int]", "a list of integers"),
    "int": ("int", "an integer"),
    "text": ("str", "a string"),
    "words": ("list[str]", "a list of strings"),
    "table": ("dict[str, int]", "a dict from strings to integers"),
    "grid": ("list[list[int]]", "a list of lists of integers"),
    "bool": ("bool", "True or False"),
}
"""Kinds of values: as an annotation, and in words. No family takes a bool."""


@dataclasses.dataclass(frozen=True)
class Form:
    """One body of a family. Its lines hold {v}, {a}, {b} and {f}."""

    lines: tuple[str, ...]

    def fill(self, fields: Mapping[str, str]) -> list[str]:
        """The lines with the fields' code."""
        return [re.sub(r"\{([vabf])\}", lambda match: fields[match[1]], line) for line in self.lines]

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Words of its code, all names among them."""
        return frozenset(re.findall(r"\w+", "\n".join(self.lines)))

    @functools.cached_property
    def guards(self) -> bool:
        """Whether it may go on after its last line."""
        return not self.lines[-1].startswith("return ")

    @functools.cached_property
    def begins(self) -> bool:
        """Whether another step may follow: a guard, or a body whose one value is returned in the last line."""
        returns = sum(line.lstrip().startswith("return ") for line in self.lines)
        return (self.guards or returns == 1) and not self.recursive

    @functools.cached_property
    def recursive(self) -> bool:
        """Whether it calls the whole function again, so that it can be no part of a longer one."""
        return any("{f}" in line for line in self.lines)


@dataclasses.dataclass(frozen=True)
class Family:
    """One step (see the module)."""

    name: str
    takes: str
    gives: str
    verb: str
    phrases: tuple[str, ...]
    forms: tuple[Form, ...]
    constants: tuple[str, ...] = ()
    sees: str = ""
    first: bool = False

    @functools.cached_property
    def weight(self) -> float:
        """How often it is drawn, relatively: one over the lines of its shortest body."""
        return 1 / min(len(form.lines) for form in self.forms)


def _load() -> tuple[dict[str, Family], str]:
    families: dict[str, Family] = {}
    digest = hashlib.sha256()
    for path in sorted(CURRICULUM.glob("*.toml")):
        digest.update(path.read_bytes())
        for name, entry in read_toml(path).items():
            if name in families:
                raise ValueError(f"{path}: a family {name} is in another file already")
            takes, gives = entry["step"].split(" -> ")
            forms = tuple(Form(tuple(code.strip("\n").splitlines())) for code in entry["code"])
            families[name] = Family(
                name,
                takes,
                gives,
                entry.get("verb", ""),
                tuple(entry["say"]),
                forms,
                tuple(entry.get("constants", ())),
                entry.get("sees", ""),
                entry.get("first", False),
            )
    return families, digest.hexdigest()


BY_NAME, HASH = _load()
FAMILIES: tuple[Family, ...] = tuple(family for family in BY_NAME.values() if not family.forms[0].guards)
GUARDS: tuple[Family, ...] = tuple(family for family in BY_NAME.values() if family.forms[0].guards)


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


ARGUMENTS: dict[str, tuple[str, ...]] = {
    "ints": ("values", "numbers", "nums", "scores", "readings", "prices", "ages", "points"),
    "int": ("number", "value", "amount", "n", "score", "level", "price", "age"),
    "text": ("text", "s", "string", "line", "name", "label", "title", "phrase"),
    "words": ("words", "names", "strings", "labels", "tags", "lines", "tokens", "items"),
    "table": ("table", "d", "mapping", "scores", "stock", "prices", "ages", "votes"),
    "grid": ("grid", "matrix", "board", "sheet", "blocks", "groups"),
}
"""Argument names by kind. They are shared by training and held-out exercises."""

ADJECTIVES: tuple[str, ...] = _split(
    "able amber basic big blue bold brief bright broad calm clean clear close cold cool daily deep dry early east "
    "easy even extra fair fast final fine first flat fresh full good grand gray great green half happy hard high "
    "hot inner known large late lazy left light local long lost loud low lucky main major minor mixed model near "
    "neat new next nice noisy north odd old open outer past plain poor prime proud pure quick quiet rare raw ready "
    "real red rich right rough round safe sharp short silent simple single slow small smart smooth soft solid south "
    "square steady still strong sunny super sweet tall thin tiny total true upper useful vast warm weak west white "
    "wide wild wise young"
)

NOUNS: tuple[str, ...] = _split(
    "apples arrows badges bands barrels baskets beacons beads bells bills birds blocks boards boats bones books "
    "boxes branches bricks bridges buckets buttons cables cakes camps cards carts cases cells chains chairs charts "
    "chips circles clients clouds coins crates cups curves deals desks dishes doors dots drums engines events farms "
    "fences films flags flames flights floors flowers forms forts frames games gardens gates gears gems gifts goals "
    "grains grids groups guests hands hills homes hooks horses hours houses islands jars jobs jumps kites knots "
    "lakes lamps leaves letters lists loads locks logs loops maps masks meals metals miles mills mines moons motors "
    "nests nodes notes oceans offers orders owls pages paints pairs papers parks paths pearls pens phones photos "
    "pilots pipes planes plans plants plates ports posts pots pumps queues races rails ranks rates records rings "
    "rivers roads robots rocks rooms roots ropes routes rows rules sails scales scenes seats seeds shapes shells "
    "ships shops signs slots songs spots stages stairs stamps stars steps stones stores storms streams streets "
    "tables tasks teams tests tickets tides tiles tools towers towns toys tracks trails trains trees trips trucks "
    "tubes tunes units vans views walls waves wells wheels winds windows wings wires woods yards zones"
)
