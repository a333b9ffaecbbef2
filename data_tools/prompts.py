"""What an LLM is asked when it writes textbooks and exercises: random topics, audiences, names and constraints.

As in the paper (section 2.2, 2.3) diversity is forced from outside, since a model asked the same thing writes
the same thing: textbooks vary by topic and audience, exercises by the function's name and by constraints
(TinyStories does so with words). What is drawn from stands in a recipe, a TOML file (recipes/synthesize.toml).
"""

import dataclasses
import functools
import json
import pathlib
import random
import sys

from data_tools.chat import Request
from phi1.errors import UserError
from phi1.files import sha256_json

RECIPE = pathlib.Path(__file__).resolve().parent.parent / "recipes" / "synthesize.toml"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Lists to draw from. A function's name is VERB_OBJECT or VERB_QUALIFIER_OBJECT."""

    topics: tuple[str, ...]
    audiences: tuple[str, ...]
    devices: tuple[str, ...]
    styles: tuple[str, ...]
    settings: tuple[str, ...]
    verbs: tuple[str, ...]
    qualifiers: tuple[str, ...]
    objects: tuple[str, ...]
    constraints: tuple[str, ...]

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the lists."""
        return sha256_json(dataclasses.asdict(self))


def load(path: pathlib.Path) -> Recipe:
    """Reads a recipe. Raises UserError if the file is absent or is none."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        lists = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--recipe {path}: cannot be read ({error}); {RECIPE} is one") from error
    names = [field.name for field in dataclasses.fields(Recipe)]
    if sorted(lists) != sorted(names):
        raise UserError(f"--recipe {path}: must have the lists {', '.join(names)}, has {', '.join(lists) or 'none'}")
    for name, values in lists.items():
        least = 2 if name == "constraints" else 1
        whole = isinstance(values, list) and all(isinstance(value, str) and value for value in values)
        if not whole or len(set(values)) != len(values) or len(values) < least:
            raise UserError(f"--recipe {path}: {name} must be a list of at least {least} different texts")
        if name in ("verbs", "qualifiers", "objects") and (bad := [v for v in values if not v.isidentifier()]):
            raise UserError(f"--recipe {path}: {name} become parts of a function's name; {bad[0]!r} cannot")
    return Recipe(**{name: tuple(values) for name, values in lists.items()})


_EXERCISE = '''def {name}({arguments}):
    """{what}

    >>> {name}({first})
    {first_result}
    >>> {name}({second})
    {second_result}
    """
{body}'''
_SHOTS = (
    ("count_long_words", "takes a list of strings; uses a for loop", _EXERCISE.format(
        name="count_long_words", arguments="words", what="Return how many words have more than five letters.",
        first="['apple', 'banana', 'cherry']", first_result="2", second="[]", second_result="0",
        body="    count = 0\n    for word in words:\n        if len(word) > 5:\n            count += 1\n    return count")),
    ("rotate_digits", "takes an integer; returns an integer", _EXERCISE.format(
        name="rotate_digits", arguments="number", what="Move the last digit of a positive number to its front.",
        first="123", first_result="312", second="7", second_result="7",
        body="    text = str(number)\n    return int(text[-1] + text[:-1])")),
)  # fmt: skip
_EXERCISE_SYSTEM = (
    "You write exercises for students of Python. Each is one function: a docstring that says precisely what it "
    "returns, with two examples as >>> lines and their results, and the code. Use only the standard library's typing, "
    "math, random, collections, datetime and itertools. Answer with the code alone."
)
_TEXTBOOK_SYSTEM = (
    "You write clear sections of textbooks about programming in Python: explanations in prose, each with runnable "
    "code in ```python blocks."
)


@dataclasses.dataclass(frozen=True)
class Seed:
    """One request, and the random choices that it came from."""

    request: Request
    topic: str
    audience: str
    number: int

    @property
    def sampling(self) -> str:
        """Sampling settings as JSON."""
        return json.dumps(self.request.sampling, sort_keys=True)


def textbook(recipe: Recipe, seed: int, number: int, *, max_tokens: int, temperature: float | None) -> Seed:
    """The `number`-th request for a textbook's section: a pure function of (recipe, seed, number)."""
    rng = random.Random(f"textbook/{seed}/{number}")
    topic, audience, device = rng.choice(recipe.topics), rng.choice(recipe.audiences), rng.choice(recipe.devices)
    style, setting = rng.choice(recipe.styles), rng.choice(recipe.settings)
    # What must be in the answer stands last: with style and setting behind it SmolLM2-135M wrote no code block in 4 of 4.
    text = (
        f"{style} Take the example from {setting}. Write a section of a Python textbook about {topic}, for {audience}. "
        f"Explain the idea in your own words, then show a complete function in a ```python block and explain it. "
        f"Include {device}."
    )
    return _seed(_TEXTBOOK_SYSTEM, (), text, topic, audience, number, max_tokens, temperature, rng)


def exercise(recipe: Recipe, seed: int, number: int, *, max_tokens: int, temperature: float | None) -> Seed:
    """The `number`-th request for an exercise: a pure function of (recipe, seed, number)."""
    rng = random.Random(f"exercise/{seed}/{number}")
    topic, audience = rng.choice(recipe.topics), rng.choice(recipe.audiences)
    qualifier = rng.choice((*recipe.qualifiers, ""))
    name = "_".join(filter(None, (rng.choice(recipe.verbs), qualifier, rng.choice(recipe.objects))))
    wishes = "; ".join(rng.sample(recipe.constraints, 2))
    text = f"Name: {name}. The function {wishes}. Topic: {topic}. For {audience}."
    return _seed(_EXERCISE_SYSTEM, _SHOTS, text, topic, audience, number, max_tokens, temperature, rng)


def _seed(
    system: str, shots: tuple[tuple[str, str, str], ...], text: str, topic: str, audience: str, number: int,
    max_tokens: int, temperature: float | None, rng: random.Random,
) -> Seed:  # fmt: skip
    messages = [{"role": "system", "content": system}]
    for name, wishes, answer in shots:
        messages.append({"role": "user", "content": f"Name: {name}. The function {wishes}."})
        messages.append({"role": "assistant", "content": f"```python\n{answer}\n```"})
    messages.append({"role": "user", "content": text})
    request = Request(messages, max_tokens=max_tokens, temperature=temperature, seed=rng.randrange(2**31))
    return Seed(request, topic, audience, number)
