"""The fifty problems: each reference passes its hidden test in the sandbox, each misreading fails it."""

import ast
import doctest
import json

import pytest

from phi1.evaluate import humaneval, puzzles
from phi1.evaluate.sandbox import run_many

PROBLEMS = puzzles.load()
ROWS = [json.loads(line) for line in puzzles.PATH.read_text(encoding="utf-8").split("\n") if line]


def test_references_pass_and_misreadings_fail() -> None:
    references = run_many([problem.job(problem.solution, 5.0) for problem in PROBLEMS])
    assert {p.task_id: r.detail for p, r in zip(PROBLEMS, references, strict=True) if r.status != "passed"} == {}
    pairs = [(problem, wrong) for problem, row in zip(PROBLEMS, ROWS, strict=True) for wrong in row["wrong"]]
    assert len(pairs) >= 50 and len({problem.task_id for problem, _ in pairs}) == 50
    wrong = run_many([problem.job(text, 5.0) for problem, text in pairs])
    assert {p.task_id: r.status for (p, _), r in zip(pairs, wrong, strict=True) if r.status != "failed"} == {}


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.entry_point)
def test_each_is_whole_and_its_example_holds(problem: humaneval.Problem) -> None:
    assert problem.test.count("assert candidate(") >= 4
    function = ast.parse(problem.prompt).body[0]
    docstring = ast.get_docstring(function)  # type: ignore[arg-type]
    assert docstring is not None and len(docstring.split()) >= 35  # several steps
    space: dict[str, object] = {}
    exec(problem.prompt + problem.solution, space)
    (test,) = doctest.DocTestFinder().find(space[problem.entry_point], problem.entry_point, globs=space)
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0 and test.examples
