"""How alike two pieces of code are: shared word n-grams, and edit distance between their syntax trees.

The paper (section 5) names both measures and publishes neither the trees' serialisation nor the rate's formula.
Here they are pinned, because a threshold means nothing without them:

- preorder: the list of a function's node types in preorder, one symbol a node. Left out: names, constants' values,
  a method's self, docstrings, comments (which a tree has none of), annotations, decorators, and Load/Store marks.
- brackets: the same with a symbol where a node's children end. Deeper differences count more.
- sorted: preorder, with the statements of each body in a fixed order: blind to which of them comes first.
- rate: 1 - Levenshtein distance / the longer list's length, compared as a fraction of integers.

The edit distance of preorder lists is never above that of the trees themselves (deleting, inserting or renaming a node
does just that to the list), so at the same threshold it misses nothing that the trees' distance finds.
"""

import ast
import bisect
import keyword
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal

Serialisation = Literal["preorder", "brackets", "sorted"]
RATE = "1 - levenshtein / max(length), in integers"
LEFT_OUT = "names, values, self, docstrings, annotations, decorators, contexts"

_WORD = re.compile(r"[a-z0-9]+")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_TAG = re.compile(r"</?[a-zA-Z][^<>\n]{0,80}>")
_SYMBOLS: dict[type, str] = {
    kind: chr(0x21 + i)
    for i, kind in enumerate(
        sorted(
            (kind for kind in vars(ast).values() if isinstance(kind, type) and issubclass(kind, ast.AST)),
            key=lambda kind: kind.__name__,
        )
    )
}
_END = chr(0x20)
_LEFT_OUT = frozenset(("annotation", "returns", "decorator_list", "ctx", "type_comment", "type_params", "kind"))
_NO_NODES = frozenset(
    ("id", "attr", "name", "arg", "n", "s", "level", "module", "asname", "simple", "is_async", "conversion")
)
_COUNTING = {
    kind: tuple(
        name
        for name in getattr(kind, "_fields", ())
        if name not in _LEFT_OUT and name not in _NO_NODES and kind is not ast.Constant
    )
    for kind in _SYMBOLS
}


def words(text: str) -> list[str]:
    """Runs of letters and digits, lower case; everything else is a boundary. Invisible characters are no boundary, and
    typographic forms of a letter are that letter."""
    if not text.isascii():
        text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    return _WORD.findall(text.lower())


def ngrams(text: str, n: int) -> set[str]:
    """All runs of n words, joined by blanks; in a text with HTML tags, those of the text without them as well."""
    found = set()
    for version in (text, _TAG.sub(" ", text)) if _TAG.search(text) else (text,):
        each = words(version)
        found |= {" ".join(each[i : i + n]) for i in range(len(each) - n + 1)}
    return found


def serialise(function: ast.AST, how: Serialisation = "preorder") -> str:
    """A function's tree as one character per node (see the module)."""
    if how == "sorted":
        return _sorted(function)
    out: list[str] = []
    stack: list[ast.AST | None] = [function]
    while stack:
        node = stack.pop()
        if node is None:
            out.append(_END)
            continue
        out.append(_SYMBOLS[type(node)])
        if how == "brackets":
            stack.append(None)
        for children in reversed(_fields(node)):
            stack += reversed(children)
    return "".join(out)


def _fields(node: ast.AST) -> list[list[ast.AST]]:
    """Of each field of the node that counts, the nodes in it."""
    found = []
    for name in _COUNTING[type(node)]:
        value = getattr(node, name, None)
        if isinstance(value, ast.AST):
            found.append([value])
        elif isinstance(value, list) and value:
            if name == "body" and _is_docstring(node, value[0]):
                value = value[1:]
            elif name == "args" and isinstance(value[0], ast.arg) and value[0].arg in ("self", "cls"):
                value = value[1:]  # a method is compared as a function
            found.append([item for item in value if isinstance(item, ast.AST)])
    return found


def _sorted(function: ast.AST) -> str:
    """Preorder with each list of statements sorted by its own text. Iterative: code may be nested deeply."""
    done: dict[int, str] = {}
    stack: list[tuple[ast.AST, bool]] = [(function, False)]
    while stack:
        node, ready = stack.pop()
        fields = _fields(node)
        if not ready and fields:
            stack.append((node, True))
            stack += [(child, False) for children in fields for child in children]
            continue
        parts = [_SYMBOLS[type(node)]]
        for children in fields:
            texts = [done[id(child)] for child in children]
            parts += sorted(texts) if children and isinstance(children[0], ast.stmt) else texts
        done[id(node)] = "".join(parts)
    return done[id(function)]


def _is_docstring(parent: ast.AST, first: ast.AST) -> bool:
    holds_one = isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module))
    return (
        holds_one
        and isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )


_OPERATORS = [
    "**=",
    "//=",
    "<<=",
    ">>=",
    "+=",
    "-=",
    "*=",
    "/=",
    "%=",
    "@=",
    "&=",
    "|=",
    "^=",
    "<=",
    ">=",
    "==",
    "!=",
    "<>",
    ":=",
    "**",
    "//",
    "<<",
    ">>",
    "->",
]
_TOKEN = re.compile(
    r"(?P<triple>[rbfuRBFU]{0,2}(?:\"\"\"(?:.|\n)*?\"\"\"|\'\'\'(?:.|\n)*?\'\'\'))|(?P<comment>\#[^\n]*)"
    r"|(?P<string>[rbfuRBFU]{0,2}(?:\"(?:\\.|[^\"\\\n])*\"|\'(?:\\.|[^\'\\\n])*\'))|(?P<number>\d[\w.]*)|(?P<name>\w+)"
    rf"|(?P<operator>{'|'.join(map(re.escape, _OPERATORS))}|[^\s\w])"
)
_WORDS = {word: chr(0x200 + i) for i, word in enumerate([*keyword.kwlist, *_OPERATORS])}


def tokens(code: str) -> str:
    """A program's tokens as one character each: keywords and operators as they are, all names alike, all numbers, all
    strings; without comments and triple-quoted strings. For code that does not parse."""
    out = []
    for match in _TOKEN.finditer(code):
        kind, text = match.lastgroup, match.group()
        if kind == "operator":
            out.append(_WORDS.get(text, text))
        elif kind == "name":
            out.append(_WORDS.get(text, "n"))
        elif kind in ("number", "string"):
            out.append("0" if kind == "number" else "s")
    return "".join(out)


def exact(rate: float) -> Fraction:
    """The fraction that a user means by a decimal number: 0.95 is 19/20."""
    return Fraction(str(rate))


_CHUNK = 2048  # texts of about the same length: what is too long or short for them is not compared


def near_pairs(left: Sequence[str], right: Sequence[str], least: Fraction) -> Iterator[tuple[int, int, int, int]]:
    """All pairs whose match rate is at least `least`: (place in left, place in right, length - distance, length).

    left: the many (each different string is compared once). Distances that cannot be near enough are cut off,
    by a bound that no near pair passes: lengths alone give a rate, and the distance of a near pair is at most
    (1 - least) x the longest length of those that are compared together.
    """
    import numpy
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    places: dict[str, list[int]] = {}
    for i, text in enumerate(left):
        places.setdefault(text, []).append(i)
    texts = sorted(places, key=len)
    order = sorted(range(len(right)), key=lambda j: len(right[j]))
    sizes = [len(right[j]) for j in order]
    part, whole = least.numerator, least.denominator
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        low = bisect.bisect_left(sizes, math.ceil(len(chunk[0]) * least))
        high = bisect.bisect_right(sizes, len(chunk[-1]) / least) if least else len(sizes)
        if low >= high:
            continue
        longest = max(len(chunk[-1]), sizes[high - 1])
        distance = cdist(
            chunk,
            [right[j] for j in order[low:high]],
            scorer=Levenshtein.distance,
            score_cutoff=math.floor((1 - least) * longest),
            dtype=numpy.int32,
        ).astype(numpy.int64)
        longer = numpy.maximum([[len(text)] for text in chunk], sizes[low:high])
        for a, b in numpy.argwhere(distance * whole <= (whole - part) * longer).tolist():
            n = int(longer[a, b])
            for i in places[chunk[a]]:
                yield i, order[low + b], n - int(distance[a, b]), n
