"""How alike two pieces of code are: shared word n-grams, and edit distance between their syntax trees.

The paper (section 5) names both measures and publishes neither the trees' serialisation nor the rate's formula.
Here they are pinned, because a threshold means nothing without them:

- serialisation: the preorder list of node types of a function, one symbol a node. Left out: names, constants'
  values, docstrings, comments (which a tree has none of), annotations, decorators, and Load/Store marks.
- rate: 1 - Levenshtein distance / the longer list's length.
"""

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

SERIALISATION = "preorder node types; without names, values, docstrings, annotations, decorators, contexts"
RATE = "1 - levenshtein / max(length)"

_WORD = re.compile(r"[a-z0-9]+")
_SYMBOLS: dict[type, str] = {
    kind: chr(0x100 + i)
    for i, kind in enumerate(sorted(
        (kind for kind in vars(ast).values() if isinstance(kind, type) and issubclass(kind, ast.AST)),
        key=lambda kind: kind.__name__,
    ))
}  # fmt: skip
_FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def words(text: str) -> list[str]:
    """Runs of letters and digits, lower case; everything else is a boundary."""
    return _WORD.findall(text.lower())


def ngrams(text: str, n: int) -> set[str]:
    """All runs of n words, joined by blanks."""
    found = words(text)
    return {" ".join(found[i : i + n]) for i in range(len(found) - n + 1)}


def serialise(function: ast.AST) -> str:
    """A function's tree as one character per node (see the module)."""
    out: list[str] = []
    stack: list[ast.AST] = [function]
    while stack:
        node = stack.pop()
        out.append(_SYMBOLS[type(node)])
        children: list[ast.AST] = []
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "ctx", "type_comment", "type_params", "kind"):
                continue
            items = value if isinstance(value, list) else [value]
            if name == "body" and items and _is_docstring(node, items[0]):
                items = items[1:]
            children += [item for item in items if isinstance(item, ast.AST)]
        stack += reversed(children)
    return "".join(out)


def _is_docstring(parent: ast.AST, first: ast.AST) -> bool:
    holds_one = isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module))
    return (
        holds_one
        and isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )


def functions(content: str) -> list[str] | None:
    """The serialised functions of a file or of a text's code blocks; None if there is code that does not parse,
    or no code at all."""
    blocks = [content]
    module = _parse(content)
    if module is None:
        blocks = [textwrap.dedent(block) for block in _FENCED.findall(content)]
        modules = [_parse(block) for block in blocks]
    else:
        modules = [module]
    if not modules or None in modules:
        return None
    return [serialise(node) for tree in modules if tree is not None for node in _defined(tree)]


def _defined(tree: ast.AST) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _parse(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def ast_rates(left: Sequence[str], right: Sequence[str], cutoff: float) -> "numpy.ndarray":
    """The match rate of each of `left` with each of `right`, (left, right), float32; 0 where it is below `cutoff`."""
    import numpy
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    if not left or not right:
        return numpy.zeros((len(left), len(right)), dtype=numpy.float32)
    return cdist(left, right, scorer=Levenshtein.normalized_similarity, score_cutoff=cutoff, dtype=numpy.float32)
