"""A benchmark's tasks as functions and words: what decontamination compares rows with."""

import ast
import pathlib
from collections.abc import Sequence

from data_tools import python_text
from data_tools.python_text import Function
from phi1.errors import UserError
from phi1.evaluate import humaneval


def load(names: Sequence[str]) -> list[humaneval.Problem]:
    """The problems of several benchmarks, by name or path."""
    return [
        problem for name in names for problem in humaneval.load(None if name == "humaneval" else pathlib.Path(name))
    ]


def entry(problem: humaneval.Problem) -> Function:
    """The function that the problem asks for, with its canonical solution."""
    if not problem.solution:
        raise UserError(f"{problem.task_id}: has no canonical_solution, which the ast test needs")
    for text in (problem.prompt + problem.solution, problem.solution):
        for node in (python_text.parse(text) or ast.Module([], [])).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == problem.entry_point:
                return node
    raise UserError(f"{problem.task_id}: its prompt and solution do not define {problem.entry_point}")


def describe(problem: humaneval.Problem, function: Function) -> str:
    """What the problem says in words: the function's docstring, or (as in MBPP's prompts) that of the prompt."""
    prompt = python_text.parse(problem.prompt)
    return ast.get_docstring(function) or (ast.get_docstring(prompt) if prompt else None) or ""


def code(function: Function) -> str:
    """The function as text, without docstring and annotations."""
    body = function.body[ast.get_docstring(function) is not None :] or [ast.Pass()]
    lines = [f"def {function.name}({', '.join(a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg))}):"]
    for statement in body:
        lines += [f"    {line}" for line in ast.unparse(statement).split("\n")]
    return "\n".join(lines) + "\n"
