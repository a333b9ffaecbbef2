"""What of a model's answer is the program: cut by parsing, or at stop strings.

A completion goes on where the prompt ends; a chat model's answer may be a fence, prose and a fence, the whole function
again, or a body without its indentation. `read` tries these in turn and takes the first that compiles and
defines the function (more than a stub; what stands in <think> is no answer); of it the longest prefix counts, and of
what stands around the function only what it or the test needs: a helper, a class, a constant and what fills a table
stay, a call that prints does not run. Stop strings (`cut`), as Codex was cut, lose right code
that has a comment, a helper or an `if` at column 0; both scores are reported.
"""

import ast
import dataclasses
import dis
import functools
import io
import itertools
import re
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping

from phi1.evaluate.humaneval import Problem

STOP = ("\nclass ", "\ndef ", "\n#", "\n@", "\nprint", "\nif ", "\n```")
"""Where Codex' completions were cut (Chen et al. 2021, section 3.4), and where a fence ends."""
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[^\n]*\n(.*?)(?:^[ \t]*\2|\Z)", re.MULTILINE | re.DOTALL)
THOUGHT = re.compile(r"\A(?:\s*<think>.*?</think>|.*?^</think>)", re.MULTILINE | re.DOTALL)
"""What a model thinks before its answer; drafts stand there. Its beginning may be in the server's template."""
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
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
    answer = THOUGHT.sub("", answer)[:LONGEST]
    for how, completions in _readings(problem, answer):
        found = [completion for completion in completions if completion is not None]
        if found:  # of ways to indent a body, the one that loses least
            return Reading(found[0] if how == "program" else max(found, key=lambda text: text.count("\n")), how)
    return Reading(answer, "")


def _readings(problem: Problem, answer: str) -> Iterator[tuple[str, Iterable[str | None]]]:
    """The ways to read an answer, the likeliest first, and the completions that each finds."""
    yield "completion", (_as_body(problem, answer),)
    blocks = list(itertools.islice(_blocks(answer), _BLOCKS))
    before: list[str] = []  # blocks that come before the function's, with what it may need
    for block in blocks:
        yield "fence", (_as_program(problem, "\n".join([*before, block])),)
        before += [block] * (_parsed(block)[0] is not None)
    for block in blocks:
        yield "body in a fence", _bodies(problem, block)
    begins = itertools.islice(_BEGINS.finditer(answer), _BLOCKS)
    yield "program", (_as_program(problem, answer[match.start() :]) for match in begins)
    yield "body", _bodies(problem, answer)


def _blocks(answer: str) -> Iterator[str]:
    """What stands in an answer's fences. One within a list item is indented with its text: by so much that is cut."""
    for indent, _, block in _FENCE.findall(answer):
        if block.strip():
            yield re.sub(rf"^[ \t]{{1,{len(indent)}}}", "", block, flags=re.MULTILINE) if indent else block


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
    found = _longest(problem.prompt, text)
    if found is None or not _works(found[1], problem.entry_point):
        return None
    return _needed(problem.prompt, *found, problem)


def _as_program(problem: Problem, text: str) -> str | None:
    """The longest prefix of a text that is a program with the function in it, to be appended to the prompt."""
    found = _longest("", text)
    if found is None or not _works(found[1], problem.entry_point):
        return None
    body = "" if _parsed(problem.prompt)[0] is not None else f"{_indent(problem)}pass\n"
    return f"{body}\n\n" + _needed("", *found, problem)


def _longest(before: str, text: str) -> tuple[str, ast.Module] | None:
    """The longest prefix of a text that compiles after `before`, and the tree of both. Of what nests too deeply for the
    compiler, or holds what no source may, half is tried: line by line it would take minutes."""
    lines = _lines(text)
    end = len(lines)
    for _ in range(_TRIES):
        kept = "".join(lines[:end])
        tree, error = _parsed(before + kept)
        if tree is not None:
            return kept, tree
        # An error stays whatever follows it: a shorter prefix ends before it.
        end = max(0, min(end - 1, error - 1 - before.count("\n")) if error else end // 2)
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
    """Whether the program gives the name something to do: a function that is more than a stub, or any other value."""
    found = False
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            found = not all(_idle(statement) for statement in node.body)
        elif name in _binds(node):
            found = True
    return found


def _idle(node: ast.stmt) -> bool:
    """Whether it is what stands in for a body, or before one: a docstring, an import, `pass`, `...`,
    `raise NotImplementedError`."""
    if isinstance(node, ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    idle = (ast.Pass, ast.Import, ast.ImportFrom)
    return isinstance(node, idle) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _needed(prompt: str, kept: str, tree: ast.Module, problem: Problem) -> str:
    """The completion without the statements at column 0 that neither the function nor its test needs.

    Kept are those that bind a name which is needed, and those that work on such a variable (`T.sort()`, `init()`); not
    what works on the function itself, which is an example of its use, what prints, and what asks for input.
    """
    first = prompt.count("\n") + 1  # the completion's first line
    statements = list(tree.body)
    binds = [_binds(node) for node in statements]
    reads = [_reads(node) for node in statements]
    definitions: dict[str, set[str]] = {}  # of a function or a class: what it reads, or sets
    variables: set[str] = set()
    for node, names, read_there in zip(statements, binds, reads, strict=True):
        if isinstance(node, _DEFINITIONS):
            definitions[node.name] = definitions.get(node.name, set()) | read_there | names
            variables |= names - {node.name}
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            variables |= names
    reaches = [_reached(names, definitions) for names in reads]
    kept_off = {problem.entry_point, "input"}
    works = [
        not isinstance(node, _DEFINITIONS) and not _shows(node) and not reached & kept_off
        for node, reached in zip(statements, reaches, strict=True)
    ]
    needed = {problem.entry_point} | _asked(problem.test)
    keep: set[int] = set()
    changed = True
    while changed:
        changed = False
        for place in reversed(range(len(statements))):  # what is needed stands before what needs it, mostly
            node = statements[place]
            future = isinstance(node, ast.ImportFrom) and node.module == "__future__"  # no longer at the beginning
            if place in keep or future:
                continue
            if (
                _begins(node) < first
                or binds[place] & needed
                or _sets_up(node)
                or (works[place] and reaches[place] & needed & variables)
            ):
                keep.add(place)
                needed |= reads[place]
                changed = True
    dropped: set[int] = set()
    spared: set[int] = set()
    for place, node in enumerate(statements):
        (spared if place in keep else dropped).update(range(_begins(node), (node.end_lineno or node.lineno) + 1))
    lines = _lines(kept)
    return "".join(line for number, line in enumerate(lines, first) if number in spared or number not in dropped)


def _used(node: ast.stmt) -> list[tuple[str, str]]:
    """(instruction, name) of each global name in a statement at the top, as its compiled code has them: a parameter of
    the same name is another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        top = compile(ast.Module([node], []), "answer", "exec", dont_inherit=True)
    found: list[tuple[str, str]] = []
    codes = [top]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for instruction in dis.get_instructions(code):
            name = instruction.opname
            # In a class, as in a function, what is stored without `global` is its own.
            if "GLOBAL" in name or (name.endswith("_NAME") and (code is top or not name.startswith("STORE"))):
                found.append((name, instruction.argval))
    return found


def _reads(node: ast.stmt) -> set[str]:
    """Global names that a statement reads, also within its functions."""
    return {name for instruction, name in _used(node) if instruction.startswith("LOAD")}


def _reached(names: set[str], definitions: Mapping[str, set[str]]) -> set[str]:
    """The names, and those that the functions and classes among them read or set."""
    found: set[str] = set()
    new = list(names)
    while new:
        name = new.pop()
        if name not in found:
            found.add(name)
            new += definitions.get(name, ())
    return found


@functools.lru_cache(maxsize=16)
def _asked(test: str) -> frozenset[str]:
    """Names that a test reads and does not bind: a class of which it makes objects."""
    tree, _ = _parsed(test)
    body = [] if tree is None else tree.body
    bound = {name for node in body for name in _binds(node)}
    return frozenset(name for node in body for name in _reads(node)) - bound


def _shows(node: ast.stmt) -> bool:
    """Whether a statement is for who reads or runs the answer as a script."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return isinstance(node.value.func, ast.Name) and node.value.func.id == "print"
    return isinstance(node, ast.Assert) or _is_main(node)


def _is_main(node: ast.stmt) -> bool:
    """Whether it is `if __name__ == "__main__"`."""
    return isinstance(node, ast.If) and "__main__" in {
        n.value for n in ast.walk(node.test) if isinstance(n, ast.Constant)
    }


def _begins(node: ast.stmt) -> int:
    return min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])


def _binds(node: ast.stmt) -> set[str]:
    """Names that a statement at the top binds, also by `global`, or objects that it sets an attribute or item of."""
    if isinstance(node, (ast.Expr, ast.Assert)) or _is_main(node):
        return set()
    names = {name for instruction, name in _used(node) if instruction in ("STORE_NAME", "STORE_GLOBAL")}
    if isinstance(node, _DEFINITIONS):
        return names
    for target in ast.walk(node):
        if isinstance(target, (ast.Attribute, ast.Subscript)) and isinstance(target.ctx, ast.Store):
            base: ast.expr = target
            while isinstance(base, (ast.Attribute, ast.Subscript)):
                base = base.value
            if isinstance(base, ast.Name):
                names.add(base.id)
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
