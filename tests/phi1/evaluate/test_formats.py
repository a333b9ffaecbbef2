"""Published formats of HumanEval, MBPP and EvalPlus' versions: a right program passes, a wrong one does not."""

import gzip
import json
import pathlib
from typing import Any

import pytest

from phi1.errors import UserError
from phi1.evaluate import humaneval
from phi1.evaluate.sandbox import run_job

MBPP = {
    "task_id": 2,
    "text": "Write a function to find the shared elements from the given two lists.",
    "code": "def similar_elements(test_tup1, test_tup2):\r\n  res = tuple(set(test_tup1) & set(test_tup2))\r\n  return (res) ",
    "test_list": ["assert set(similar_elements((3, 4, 5, 6),(5, 7, 4, 10))) == set((4, 5))"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "x",
    "task_id": 20,
    "prompt": "Write a function to check if the given number is woodball or not.",
    "code": "def helper(x):\n    return x\n\ndef is_woodall(x):\n    return helper(x) == 383\n",
    "test_imports": ["import math"],
    "test_list": ["assert is_woodall(383) == True", "assert is_woodall(math.floor(254.5)) == False"],
}
PLUS = {
    "task_id": "Mbpp/2",
    "prompt": '"""\nFind the shared elements.\nassert similar_elements((3, 4), (4,)) == (4,)\n"""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "def similar_elements(a, b):\n    assert type(a) is tuple\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[3, 4, 5, 6], [5, 7, 4, 10]]],
    "plus_input": [[[], []], [[1, 1], [1]]],
    "atol": 0,
    "contract": "",
    "assertion": "assert set(similar_elements((3, 4, 5, 6),(5, 7, 4, 10))) == set((4, 5))",
}
HUMANEVAL_PLUS = {
    "task_id": "HumanEval/2",
    "prompt": 'def truncate_number(number: float) -> float:\n    """The decimal part."""\n',
    "entry_point": "truncate_number",
    "canonical_solution": "    return number - int(number)\n",
    "test": "unused",
    "base_input": [[3.5]],
    "plus_input": [[1.33], [12345.678]],
    "atol": 0,
    "contract": "",
}


def load(tmp_path: pathlib.Path, *rows: Any) -> list[humaneval.Problem]:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return humaneval.load(path)


def status(problem: humaneval.Problem, completion: str) -> str:
    return run_job(problem.job(completion, 5.0)).status


@pytest.mark.parametrize(
    "row", [MBPP, SANITIZED, PLUS, HUMANEVAL_PLUS], ids=["mbpp", "sanitized", "mbpp+", "humaneval+"]
)
def test_the_solution_passes_and_another_program_fails(row: dict[str, Any], tmp_path: pathlib.Path) -> None:
    (problem,) = load(tmp_path, row)
    assert status(problem, problem.solution) == "passed"
    wrong = "    return 0\n" if row is HUMANEVAL_PLUS else f"def {problem.entry_point}(*a):\n    return 7\n"
    assert status(problem, wrong) == "failed"


def test_mbpps_prompt_and_function(tmp_path: pathlib.Path) -> None:
    first, second = load(tmp_path, MBPP, SANITIZED)
    assert first.task_id == "Mbpp/2" and first.entry_point == "similar_elements" and second.entry_point == "is_woodall"
    assert first.prompt == f'"""\n{MBPP["text"]}\n{MBPP["test_list"][0]}\n"""\n'  # type: ignore[index]
    (tmp_path / "sanitized.json").write_text(json.dumps([SANITIZED, MBPP]))
    assert humaneval.load(tmp_path / "sanitized.json") == [second, first]


def test_the_extra_inputs_count(tmp_path: pathlib.Path) -> None:
    """A program that is right on the first input only passes HumanEval's kind of test, not the plus."""
    (problem,) = load(tmp_path, HUMANEVAL_PLUS)
    assert status(problem, "    return 0.5\n") == "failed"
    (base,) = load(tmp_path, HUMANEVAL_PLUS | {"plus_input": []})
    assert status(base, "    return 0.5\n") == "passed"
    # 12345.678 differs in the last bits: floats within 1e-6.
    assert status(problem, "    return number % 1\n") == "passed"
    assert status(problem, "    return number % 1 + 1e-4\n") == "failed"


def test_inputs_get_back_the_types_that_json_lost(tmp_path: pathlib.Path) -> None:
    row = PLUS | {
        "entry_point": "f",
        "prompt": '"""F."""\n',
        "canonical_solution": "def f(a, b, c, d):\n    return repr((a, b, c, d))\n",
        "assertion": "assert f([(1, 2), (3, 4)], {'k': (1,)}, {1}, 2j) == 0",
        "base_input": [[[[1, 2]], {"x": [5], "y": []}, [1, 1], "(1+2j)"]],
        "plus_input": [],
    }
    (problem,) = load(tmp_path, row)
    right = "def f(a, b, c, d):\n    return \"([(1, 2)], {'x': (5,), 'y': ()}, {1}, (1+2j))\"\n"
    assert status(problem, right) == "passed"


def test_any_root_of_a_polynomial_is_right(tmp_path: pathlib.Path) -> None:
    row = HUMANEVAL_PLUS | {
        "task_id": "HumanEval/32",
        "entry_point": "find_zero",
        "prompt": 'def find_zero(xs):\n    """A root."""\n',
        "atol": 1e-4,
        "canonical_solution": "    return 1.0\n",
        "base_input": [[[-1, 0, 1]]],
        "plus_input": [],
    }
    (problem,) = load(tmp_path, row)
    assert status(problem, "    return -1.0\n") == "passed" and status(problem, "    return 0.5\n") == "failed"


def test_raw_line_separators_and_surrogates_in_a_file(tmp_path: pathlib.Path) -> None:
    row = {
        "task_id": "X/0",
        "prompt": 'def f():\n    """a\u2028b\x85c\x0cd"""\n',
        "entry_point": "f",
        "test": "def check(c):\n    assert c() == 1\n",
    }
    path = tmp_path / "p.jsonl"
    path.write_text(
        json.dumps(row, ensure_ascii=False)
        + "\n"
        + json.dumps(row | {"task_id": "X/1", "prompt": "def f():\n    '\ud800'\n"})
        + "\n"
    )
    first, second = humaneval.load(path)
    assert first.prompt == row["prompt"] and status(first, "    return 1\n") == "passed"
    assert status(second, "    return 1\n") == "failed"  # half a character is no source
    (packed := tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert humaneval.load(packed) == [first, second]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"task_id": "X"}'], r"row 1: KeyError: 'prompt'"),
        (
            [json.dumps(MBPP), json.dumps(MBPP | {"task_id": 3, "test_list": ["assert other(1)"]})],
            "row 2: ValueError: no function of its code",
        ),
        ([json.dumps(MBPP | {"test_list": "assert 1"})], "test_list is no list"),
        (["[1, 2]"], "no JSON objects"),
        (['{"task_id": 1, "prompt": 2, "entry_point": "f", "test": ""}'], "task_id is int, not text"),
        ([json.dumps(MBPP), json.dumps(MBPP)], "Mbpp/2 occurs twice"),
        ([json.dumps(MBPP | {"code": "def f(:"})], "row 1: SyntaxError"),
        ([json.dumps(MBPP), "{"], "line 2 is no JSON"),
        ([json.dumps(MBPP | {"task_id": None})], "task_id is NoneType, not text"),
        ([json.dumps(MBPP | {"entry_point": 5})], "entry_point is int, not text"),
        ([json.dumps(MBPP | {"test_setup_code": ["import math"]})], "test_setup_code is list, not text"),
        ([json.dumps(SANITIZED | {"test_imports": [1]})], "test_imports is no list of texts"),
        ([json.dumps(PLUS | {"atol": "x"})], "could not convert string to float"),
    ],
)
def test_what_is_no_problem_is_named(rows: list[str], message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError, match=message):
        humaneval.load(path)


MBPP_ROWS = {
    "setup code": {
        "test_setup_code": "import math\nX = (5, 7)",
        "test_list": ["assert set(similar_elements((5,), X)) == {5}"],
    },
    "fields of null": {"test_setup_code": None, "challenge_test_list": None, "entry_point": None},
    "a class of the code": {
        "code": "def f(pairs):\r\n\treturn len(pairs)\r\nclass Pair(object): \r\n\tdef __init__(self, a): \r\n\t\tself.a = a",
        "test_list": ["assert f([Pair(5), Pair(15)]) == 2"],
    },
    "objects of the setup": {
        "code": "class Node:\r\n  def __init__(self, data):\r\n    self.left = None\r\ndef f(node):\r\n  return 0 if node is None else 1 + f(node.left)",
        "test_setup_code": "root = Node(1) \r\nroot.left = Node(2)",
        "test_list": ["assert (f(root)) == 2"],
    },
    "a lambda": {"code": "similar_elements = lambda a, b: tuple(set(a) & set(b))"},
    "a class as the function": {
        "code": "class similar_elements:\n    def __new__(cls, a, b):\n        return set(a) & set(b)"
    },
    "under a condition": {"code": "if True:\n    def similar_elements(a, b):\n        return set(a) & set(b)"},
    "by another name in the test": {"test_list": ["g = similar_elements\nassert set(g((1,), (1,))) == {1}"]},
    "quotes and backslashes": {"text": 'Say """x""" in C:\\new\\x and \\'},
}


@pytest.mark.parametrize("name", MBPP_ROWS)
def test_odd_rows_of_mbpp(name: str, tmp_path: pathlib.Path) -> None:
    (problem,) = load(tmp_path, MBPP | MBPP_ROWS[name])
    assert problem.entry_point in ("similar_elements", "f") and status(problem, problem.solution) == "passed"
    assert status(problem, f"{problem.solution}\n\n{problem.entry_point} = lambda *a: 'wrong'\n") == "failed"


def test_rows_without_tests_or_code_are_problems_all_the_same(tmp_path: pathlib.Path) -> None:
    untested, unsolved, broken = load(
        tmp_path,
        MBPP | {"task_id": 1, "test_list": []},
        MBPP | {"task_id": 2, "code": None},
        MBPP | {"task_id": 3, "test_list": ["assert similar_elements(1,\0"]},
    )
    assert [p.entry_point for p in (untested, unsolved, broken)] == ["similar_elements"] * 3
    assert untested.test == "" and status(unsolved, untested.solution) == "passed"
    assert status(broken, broken.solution) == "error"


def test_a_file_that_windows_wrote(tmp_path: pathlib.Path) -> None:
    (path := tmp_path / "p.jsonl").write_text("\ufeff" + json.dumps(MBPP) + "\r\n", encoding="utf-8", newline="")
    assert len(humaneval.load(path)) == 1


# What EvalPlus accepts beside the reference's result (its eval/_special_oracle.py): function, reference, input, a right
# answer, a wrong one.
ALLOWED = [
    ("similar_elements", "return (4, 5)", [[4, 5]], "[5, 4, 4]", "(4,)"),
    ("check_str", "import re\n    return re.match('a', a)", ["ab"], "True", "None"),
    ("check_str", "import re\n    return re.match('a', a)", ["b"], "None", "True"),
    ("digit_distance_nums", "return 0", [[123, 256]], "7", "8"),
    ("surface_Area", "return 0", [[3, 4]], "35", "34"),
    ("f", "return [1.5]", [1], "[1.5000001]", "(1.5000001,)"),
]


@pytest.mark.parametrize(("name", "reference", "given", "right", "wrong"), ALLOWED)
def test_answers_that_the_words_allow(
    name: str, reference: str, given: Any, right: str, wrong: str, tmp_path: pathlib.Path
) -> None:
    arguments = given[0] if name in ("digit_distance_nums", "surface_Area") else given
    head = f"def {name}({', '.join('ab'[: len(arguments)])}):\n    "
    row = PLUS | {
        "entry_point": name,
        "prompt": '"""F."""\n',
        "canonical_solution": head + reference + "\n",
        "assertion": "",
        "base_input": [arguments],
        "plus_input": [],
        "atol": 1e-6,
    }
    (problem,) = load(tmp_path, row)
    assert status(problem, f"{head}return {right}\n") == "passed"
    assert status(problem, f"{head}return {wrong}\n") == "failed"


def test_a_reference_that_fails_is_no_fault_of_the_program(tmp_path: pathlib.Path) -> None:
    (problem,) = load(tmp_path, HUMANEVAL_PLUS | {"plus_input": [[float("inf")]]})
    assert status(problem, "    return number % 1\n") == "error"
