"""What of an answer is run: right code in any dress scores, what follows it does not run, and nothing is cut that is
right.
"""

import dataclasses
import random
from typing import Any

import pytest

from phi1.evaluate import answers, humaneval
from phi1.evaluate.humaneval import Problem
from phi1.evaluate.sandbox import run_job

PROBLEMS = {problem.task_id: problem for problem in humaneval.load()}
TASK = PROBLEMS["HumanEval/1"]
SHORT = Problem(
    "P/0",
    'def double(x):\n    """Return x twice: double(2) is 4."""\n',
    "double",
    "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == -6\n",
)
SMALL = dataclasses.replace(SHORT, test="def check(candidate):\n    assert candidate(2) == 4\n")
BODY = "    return 2 * x\n"
WHOLE = SHORT.prompt + BODY


def passes(answer: str, problem: Problem = SHORT) -> bool:
    return run_job(problem.job(answers.read(problem, answer).completion, 5.0)).status == "passed"


@pytest.mark.parametrize(
    ("how", "answer"),
    [
        ("completion", BODY),
        ("completion", BODY + "\n# an example\nprint(double(undefined))\n"),
        ("completion", BODY + "\nassert double(1) == 3\n\nif __name__ == '__main__':\n    main()\n"),
        ("completion", "    return twice(x)\n\n# helps\ndef twice(y):\n    return FACTOR * y\n\nFACTOR = 2\n"),
        (
            "completion",
            "    return Twice(x).value\n\n@decorated\nclass Twice:\n    def __init__(self, x):\n        self.value = 2 "
            "* x\n\n"
            "def decorated(x):\n    return x\n".replace("@decorated\n", ""),
        ),
        ("completion", "    text = '''\nif a:\ndef b\n#'''\n    return 2 * x\n"),
        ("completion", "# a comment at column 0\n    return 2 * x\n"),
        ("completion", "    if x:\n# now\n        return 2 * x\n    return 0\n"),
        ("completion", BODY + "\n\ndef another(a,\n"),
        ("completion", BODY + "Explanation: it doubles.\n"),
        ("completion", BODY + "```\nThat is it.\n"),
        ("completion", WHOLE),
        ("completion", "    return 2 * x\n\ndouble = double\nsys.exit(0)\n"),
        ("fence", f"```python\n{WHOLE}```"),
        ("fence", f"```\n{WHOLE}```\n"),
        ("fence", f"Sure! Here it is:\n\n```python\n{WHOLE}```\nIt doubles `x`.\n\n```python\nprint(double(3))\n```\n"),
        ("completion", f"~~~~py\n{WHOLE}~~~~\n"),
        ("fence", f"So:\n```python\n{WHOLE}"),
        (
            "fence",
            f"```python\nfrom __future__ import annotations\nimport sys\nsys.setrecursionlimit(5000)\nimport "
            f"pandas\n{WHOLE}\ninput()\n```",
        ),
        ("fence", "First a helper:\n```python\nF = 2\n```\nThen:\n```python\ndef double(x):\n    return F * x\n```\n"),
        ("body in a fence", f"```python\n{BODY}```"),
        ("body in a fence", "```python\ny = 2 * x\nreturn y\n```"),
        ("program", f"The function is this one.\n\n{WHOLE}\nIt doubles.\n"),
        ("body", "return 2 * x\n"),
        ("body", "y = x\n    return 2 * y\n"),
        ("body", "y = x\nfor _ in range(1):\n    y += x\nreturn y"),
    ],
)
def test_right_code_scores_however_it_is_dressed(how: str, answer: str) -> None:
    assert passes(answer)
    assert answers.read(SHORT, answer).how == how


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "\n",
        "    pass\n",
        "I cannot.",
        "```python\n```",
        "    return 3 * x\n",
        "\0",
        "    '''\n",
        "def other(x):\n    return 2 * x\n",
    ],
)
def test_what_is_no_solution_fails(answer: str) -> None:
    assert not passes(answer)


TABLE = "def double(x):\n    return T[x]\n"


@pytest.mark.parametrize(
    "answer",
    [
        f"T = []\nfor i in range(9):\n    T.append(2 * i)\n\n{TABLE}",
        f"T = []\nwhile len(T) < 9:\n    T.append(2 * len(T))\n\n{TABLE}",
        f"import contextlib\nT = []\nwith contextlib.suppress(IndexError):\n    T.extend(range(0, 9, 2))\n\n{TABLE}",
        f"T = {{-3: -6}}\nT.update({{2: 4}})\n\n{TABLE}",
        f"from heapq import heapify\nT = [8, 4, 2, 6, 0]\nheapify(T)\nT.sort()\n\n{TABLE}",
        f"def init():\n    global T\n    T = range(0, 9, 2)\n\n{TABLE}\ninit()\n",
        f"T = []\ndef init():\n    T.extend(range(0, 9, 2))\n\n{TABLE}\ninit()\n",
    ],
)
def test_what_fills_a_table_stays(answer: str) -> None:
    assert passes(f"```python\n{answer}```", SMALL)


@pytest.mark.parametrize(
    "example",
    [
        "x = int(input())\nprint(double(x))\n",
        "def main():\n    x = int(input())\n    print(F * x)\n\nmain()\n",
        "y = input(F)\n",
        "print(F)\ndouble(F, F)\nassert F == 3\n",
        "class Test(unittest.TestCase):\n    pass\n\nunittest.main()\n",
        "for x in [F]:\n    print(double(x, x))\n",
        "def demo():\n    double(F, F)\n\ndemo()\nif __name__ == '__main__':\n    F()\n",
    ],
)
def test_examples_of_its_use_do_not_run(example: str) -> None:
    """Neither where a parameter has the example's name, nor where it speaks of a constant that the function needs."""
    function = "F = 2\n\ndef double(x):\n    return F * x\n"
    assert answers.read(SHORT, function + "\n" + example).completion.strip().endswith("return F * x")


def test_a_class_that_only_the_test_uses_stays() -> None:
    """As in MBPP's tasks 601 and 927."""
    problem = Problem("P/2", '"""Add up pairs."""\n', "total", "pair = Pair(1, 2)\nassert total([pair]) == 3\n")
    pair = "class Pair:\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n\n"
    function = "def total(pairs):\n    return sum(p.a + p.b for p in pairs)\n"
    assert passes(pair + function, problem)
    unused = pair.replace("Pair", "Other")
    assert answers.read(problem, unused + function).completion.strip() == function.strip()


@pytest.mark.parametrize(
    "answer",
    [
        "1. The code:\n\n   ```python\n   def double(x):\n       return 2 * x\n   ```\n2. It doubles.\n",
        "- So:\n\t~~~\n\tdef double(x):\n\t\treturn 2 * x\n\t~~~\n",
        f"<think>\nFirst:\n```python\ndef double(x):\n    return x\n```\nWrong.\n</think>\n```python\n{WHOLE}```",
        f"First:\n```python\ndef double(x):\n    return x\n```\nWrong.\n</think>\n\n```python\n{WHOLE}```",
        f"<think>{'Hm. ' * answers.LONGEST}</think>{WHOLE}",
        *(
            f"Fill this in:\n```python\n{SHORT.prompt}    {stub}\n```\nSolution:\n```python\n{WHOLE}```"
            for stub in ("pass", "...", "raise NotImplementedError", "raise NotImplementedError('yet')")
        ),
    ],
)
def test_lists_thoughts_and_stubs(answer: str) -> None:
    assert passes(answer)


@pytest.mark.parametrize("line", ["elif x == 1:\n y = 1\n", "    elif x == 1:\n        y = 1\n", "a = b\n", "\0\n"])
def test_an_answer_is_read_in_a_bounded_time(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nests too deeply gives no line where the error is: going back line by line took 38 s."""
    tried: list[int] = []
    parsed = answers._parsed

    def counted(text: str) -> Any:
        tried.append(len(text))
        return parsed(text)

    monkeypatch.setattr(answers, "_parsed", counted)
    answers.read(SHORT, "    if x == 0:\n        y = 1\n" + line * (answers.LONGEST // len(line)))
    answers.read(SHORT, "if x == 0:\n y = 1\n" + line * (answers.LONGEST // len(line)))
    assert sum(tried) < 40 * answers.LONGEST


def test_a_prompt_without_docstring_or_with_helpers() -> None:
    bare = Problem(
        "P/1", "import math\n\ndef half(x):\n", "half", "def check(candidate):\n    assert candidate(4) == 2\n"
    )
    for answer in ("    return x / 2\n", "```python\ndef half(x):\n    return x / 2\n```", "return x / 2"):
        assert passes(answer, bare)
    task = PROBLEMS["HumanEval/32"]  # its test calls the prompt's helper
    assert passes(task.solution, task) and passes(f"```python\n{task.prompt}{task.solution}```", task)


def test_all_canonical_solutions_are_kept_as_they_are() -> None:
    for problem in PROBLEMS.values():
        assert answers.read(problem, problem.solution) == answers.Reading(problem.solution, "completion")


def test_all_canonical_solutions_are_found_in_a_fence() -> None:
    """Also where the prompt's function has an import (HumanEval/115): that is not yet a body."""
    for problem in PROBLEMS.values():
        reading = answers.read(problem, f"```python\n{problem.prompt}{problem.solution}```\n")
        assert reading.how == "fence" and problem.solution.rstrip() in reading.completion


def longest(problem: Problem, answer: str) -> str | None:
    """Prefix by prefix, the longest first."""
    lines = answer.split("\n")
    for end in range(len(lines), 0, -1):
        text = "\n".join(lines[:end]) + ("\n" if end < len(lines) else "")
        if answers._parsed(problem.prompt + text)[0] is not None:
            return text
    return None


def test_the_longest_prefix_is_the_longest() -> None:
    """Against trying all: mended, cut and shuffled solutions."""
    rng = random.Random(0)
    pieces = [
        "'''",
        '"""',
        "(",
        "]",
        ":",
        "if x",
        "\n",
        "    ",
        "try:\n",
        "def g(",
        "Here",
        "x = 1\n",
        "```\n",
        "else:\n",
        "\\\n",
    ]
    checked = 0
    for problem in list(PROBLEMS.values())[::3]:
        for _ in range(6):
            text = problem.solution + "\n\ndef g():\n    return [1,\n  2]\n"
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(text))
                text = text[:at] + rng.choice(pieces) + text[at:]
            expected = longest(problem, text)
            body = answers._as_body(problem, text)
            if expected is None:
                assert body is None
                continue
            tree = answers._parsed(problem.prompt + expected)[0]
            assert tree is not None
            if answers._works(tree, problem.entry_point):
                assert body == answers._needed(problem.prompt, expected, tree, problem)
                checked += 1
            else:
                assert body is None
    assert checked > 150


def test_cut_at_the_first_stop_string() -> None:
    assert answers.cut("    return 1\n\ndef g():\n    pass\n") == "    return 1\n"
    assert (
        answers.cut("    if x:\n        return 1\n    # why\n    return 2\nif y:\n")
        == "    if x:\n        return 1\n    # why\n    return 2"
    )
    assert answers.cut("    return 1\n```\nand so on") == "    return 1"
    assert answers.cut("  return '@'") == "  return '@'"
