"""What an LLM is asked when it writes textbooks and exercises: random topics, audiences, names and constraints.

As in the paper (section 2.2, 2.3) diversity is forced from outside, since a model asked the same thing writes
the same thing: textbooks vary by topic and audience, exercises by the function's name and by constraints
(TinyStories does so with words).
"""

import dataclasses
import json
import random

from data_tools.llm import Request

TOPICS: tuple[str, ...] = (
    "variables and assignment", "integer arithmetic", "comparing values", "boolean logic", "if, elif and else",
    "for loops", "while loops", "nested loops", "the range function", "functions and return values",
    "default arguments", "recursion", "string slicing", "string methods", "formatting strings", "counting characters",
    "palindromes", "lists and indices", "list methods", "list comprehensions", "sorting with a key", "tuples",
    "dictionaries", "counting with a dictionary", "sets", "stacks and queues", "matrices as nested lists",
    "linear search", "binary search", "bubble sort", "merging sorted lists", "the greatest common divisor",
    "prime numbers", "the Fibonacci numbers", "digits of a number", "binary numbers", "rounding and division",
    "exceptions", "generators", "classes and methods", "the math module", "the collections module",
    "the itertools module", "the datetime module", "random numbers", "type hints",
)  # fmt: skip
AUDIENCES: tuple[str, ...] = (
    "children who have never programmed", "high-school students", "first-year students of computer science",
    "biologists who want to analyse data", "self-taught beginners", "economists", "engineers who know C",
    "teachers who prepare a lesson", "readers preparing for a job interview", "hobbyists who build games",
)  # fmt: skip
DEVICES: tuple[str, ...] = (
    "a common mistake and its correction", "an everyday analogy", "a step-by-step trace of a call",
    "a comparison of two ways to do it", "a short exercise with its answer", "a remark on efficiency",
    "a question that the reader should ask first", "a worked example with real numbers",
)  # fmt: skip
VERBS: tuple[str, ...] = (
    "count", "find", "sum", "filter", "merge", "reverse", "rotate", "split", "group", "compare", "convert", "remove",
    "select", "rank", "replace", "validate", "average", "expand", "compress", "alternate",
)  # fmt: skip
OBJECTS: tuple[str, ...] = (
    "vowels", "words", "numbers", "digits", "pairs", "scores", "letters", "intervals", "temperatures", "prices",
    "names", "matrix_rows", "even_numbers", "duplicates", "prefixes", "brackets", "dates", "squares", "neighbours",
    "votes", "fractions", "columns", "sentences", "peaks", "divisors",
)  # fmt: skip
CONSTRAINTS: tuple[str, ...] = (
    "takes a list of integers", "takes a string", "takes two lists", "takes a list of strings", "takes a dictionary",
    "takes an integer", "takes a string and an integer", "uses a for loop", "uses a dictionary", "uses a while loop",
    "returns a boolean", "returns a list", "returns a string", "returns an integer", "handles empty input",
    "uses a list comprehension",
)  # fmt: skip

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


def textbook(seed: int, number: int, *, max_tokens: int, temperature: float | None) -> Seed:
    """The `number`-th request for a textbook's section: a pure function of (seed, number)."""
    rng = random.Random(f"textbook/{seed}/{number}")
    topic, audience, device = rng.choice(TOPICS), rng.choice(AUDIENCES), rng.choice(DEVICES)
    text = (
        f"Write a section of a Python textbook about {topic}, for {audience}. Explain the idea in your own words, then "
        f"show a complete function in a ```python block and explain it. Include {device}."
    )
    return _seed(_TEXTBOOK_SYSTEM, (), text, topic, audience, number, max_tokens, temperature, rng)


def exercise(seed: int, number: int, *, max_tokens: int, temperature: float | None) -> Seed:
    """The `number`-th request for an exercise: a pure function of (seed, number)."""
    rng = random.Random(f"exercise/{seed}/{number}")
    topic, audience = rng.choice(TOPICS), rng.choice(AUDIENCES)
    name = f"{rng.choice(VERBS)}_{rng.choice(OBJECTS)}"
    wishes = "; ".join(rng.sample(CONSTRAINTS, 2))
    return _seed(_EXERCISE_SYSTEM, _SHOTS, f"Name: {name}. The function {wishes}. Topic: {topic}. For {audience}.",
                 topic, audience, number, max_tokens, temperature, rng)  # fmt: skip


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
