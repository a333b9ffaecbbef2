"""What of a model's answer is the program: cut by parsing, or at stop strings.

A completion goes on where the prompt ends; a chat model's answer may be a fence, prose and a fence, the whole function
again, or a body without its indentation. `read` tries these in turn and takes the first that compiles and
defines the function; of it the longest prefix counts, and of what follows the function only what it needs: a helper,
a class or a constant stay, a call that prints does not run. Stop strings (`cut`), as Codex was cut, lose right code
that has a comment, a helper or an `if` at column 0; both scores are reported.
"""

import ast
import dataclasses
import io
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator

from phi1.evaluate.humaneval import Problem

STOP = ("\nclass ", "\ndef ", "\n#", "\n@", "\nprint", "\nif ", "\n```")
"""Where Codex' completions were cut (Chen et al. 2021, section 3.4), and where a fence ends."""
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)", re.MULTILINE | re.DOTALL)
_BEGINS = re.compile(r"^(?:import |from |def |async def |class |@)", re.MULTILINE)
LONGEST = 1 << 15
"""Characters of an answer that are looked at: a model that never stops has no function in what follows."""
_BLOCKS = 20  # of an answer, and places where a program may begin
_TRIES = 100  # prefixes that are compiled; the line of each error tells where the next ends


@dataclasses.dataclass(frozen=True)
class Reading:
    """completion: what is appended to the prompt. how: by which reading of the answer; "" if by none."""

    completion: str
    how: str


def cut(completion: str, stop: Iterable[str] = STOP) -> str:
    """The completion up to the first stop string."""
    ends = [at for word in stop if (at := completion.find(word)) >= 0]
    return completion[: min(ends)] if ends else completion


def read(problem: Problem, answer: str) -> Reading:
    """The program in an answer. Where no reading defines the function, the answer as it is, for the record."""
    answer = answer[:LONGEST]
    blocks = [block for _, block in _FENCE.findall(answer) if block.strip()][:_BLOCKS]
    readings: list[tuple[str, Iterable[str | None]]] = [("completion", (_as_body(problem, answer),))]
    before: list[str] = []  # blocks that come before the function's, with what it may need
    for block in blocks:
        readings.append(("fence", (_as_program(problem, "\n".join([*before, block])),)))
        before += [block] * (_parsed(block)[0] is not None)
    readings += [("body in a fence", _bodies(problem, block)) for block in blocks]
    readings += [
        (
            "program",
            (_as_program(problem, answer[m.start() :]) for m in itertools.islice(_BEGINS.finditer(answer), _BLOCKS)),
        )
    ]
    readings += [("body", _bodies(problem, answer))]
    for how, completions in readings:
        found = [completion for completion in completions if completion is not None]
        if found:  # of ways to indent a body, the one that loses least
            return Reading(found[0] if how == "program" else max(found, key=lambda text: text.count("\n")), how)
    return Reading(answer, "")


def _bodies(problem: Problem, text: str) -> Iterator[str | None]:
    """Text that may be a body: as it is, with its first line's indentation lost, or all of it."""
    indent = _indent(problem)
    yield _as_body(problem, text)
    yield _as_body(problem, indent + text.lstrip(" \n"))
    yield _as_body(
        problem, "".join(indent + line if line.strip() else line for line in _lines(text.strip("\n") + "\n"))
    )


def _indent(problem: Problem) -> str:
    """The indentation of the function's body in the prompt."""
    last = [line for line in problem.prompt.split("\n") if line.strip()][-1:]
    indent = re.match(r"[ \t]*", last[0]).group() if last else ""  # type: ignore[union-attr]
    return indent or "    "


def _as_body(problem: Problem, text: str) -> str | None:
    """The longest prefix of a text that goes on with the prompt's function; None if it gives it nothing to do."""
    lines = _lines(text)
    end = len(lines)
    for _ in range(_TRIES):
        kept = "".join(lines[: max(0, end)])
        tree, error = _parsed(problem.prompt + kept)
        if tree is not None:
            return (
                _needed(problem.prompt, kept, tree, problem.entry_point) if _works(tree, problem.entry_point) else None
            )
        # An error stays whatever follows it: a shorter prefix ends before it.
        end = min(end - 1, max(0, error - 1 - problem.prompt.count("\n")) if error else end - 1)
    return None


def _as_program(problem: Problem, text: str) -> str | None:
    """The longest prefix of a text that is a program with the function in it, to be appended to the prompt."""
    lines = _lines(text)
    end = len(lines)
    for _ in range(_TRIES):
        kept = "".join(lines[: max(0, end)])
        tree, error = _parsed(kept)
        if tree is not None:
            if not _works(tree, problem.entry_point):
                return None
            body = "" if _parsed(problem.prompt)[0] is not None else f"{_indent(problem)}pass\n"
            return f"{body}\n\n" + _needed("", kept, tree, problem.entry_point)
        end = min(end - 1, max(0, error - 1) if error else end - 1)
    return None


def _parsed(text: str) -> tuple[ast.Module | None, int]:
    """The tree, or the line of the error (0: unknown). Compiled, too: a `return` outside a function parses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
            compile(tree, "answer", "exec", dont_inherit=True)
        return tree, 0
    except SyntaxError as error:
        return None, error.lineno or 0
    except (ValueError, RecursionError, MemoryError):
        return None, 0


def _works(tree: ast.Module, name: str) -> bool:
    """Whether the program gives the name something to do: a function with more than a docstring, or any other value."""
    found = False
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            found = len(node.body) > (ast.get_docstring(node) is not None)
        elif name in _binds(node):
            found = True
    return found


def _needed(prompt: str, kept: str, tree: ast.Module, name: str) -> str:
    """The completion without the statements at column 0 that bind nothing which the function needs."""
    first = prompt.count("\n") + 1  # the completion's first line
    needed, statements = {name}, list(tree.body)
    keep: set[int] = set()
    changed = True
    while changed:
        changed = False
        for place, node in enumerate(statements):
            future = isinstance(node, ast.ImportFrom) and node.module == "__future__"  # no longer at the beginning
            wanted = _begins(node) < first or _binds(node) & needed or _sets_up(node)
            if place not in keep and wanted and not future:
                keep.add(place)
                needed |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                changed = True
    dropped: set[int] = set()
    spared: set[int] = set()
    for place, node in enumerate(statements):
        (spared if place in keep else dropped).update(range(_begins(node), (node.end_lineno or node.lineno) + 1))
    lines = _lines(kept)
    return "".join(line for number, line in enumerate(lines, first) if number in spared or number not in dropped)


def _begins(node: ast.stmt) -> int:
    return min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])


def _binds(node: ast.stmt) -> set[str]:
    """Names that a statement at the top binds, or objects that it sets an attribute or item of."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, (ast.Expr, ast.Assert)):
        return set()
    if isinstance(node, ast.If) and "__main__" in {n.value for n in ast.walk(node.test) if isinstance(n, ast.Constant)}:
        return set()
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for target in [
        n for n in ast.walk(node) if isinstance(n, (ast.Attribute, ast.Subscript)) and isinstance(n.ctx, ast.Store)
    ]:
        base: ast.expr = target
        while isinstance(base, (ast.Attribute, ast.Subscript)):
            base = base.value
        if isinstance(base, ast.Name):
            names.add(base.id)
    if isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
        for inner in ast.walk(node):
            if isinstance(inner, ast.stmt) and inner is not node:
                names |= _binds(inner)
    return names


def _sets_up(node: ast.stmt) -> bool:
    """Whether it may bind anything (`from x import *`), or sets the interpreter up (sys.setrecursionlimit)."""
    if isinstance(node, ast.ImportFrom):
        return node.names[0].name == "*"
    call = node.value if isinstance(node, ast.Expr) else None
    function = call.func if isinstance(call, ast.Call) else None
    named = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
    return named and function.value.id == "sys" and function.attr.startswith("set")  # type: ignore[union-attr]


def _lines(text: str) -> list[str]:
    """Lines as Python counts them (not str.splitlines, which ends lines at form feeds and U+2028 too)."""
    return list(io.StringIO(text, newline=""))
