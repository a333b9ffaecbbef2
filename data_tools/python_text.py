"""The Python functions in a text of any kind, one by one: a file, Markdown in any style, a notebook, a docstring.

A text that parses is read by its tree, and its strings and comments as texts of their own. In any other text each `def`
begins a function, whatever stands before it on its line (blanks, a quotation's `>`, a list's mark, `#`, `>>>`,
`<pre>`), and the function goes on as long as lines are indented deeper: no knowledge of fences is needed, and what
stands beside a function, a shell's commands or a line of Python 2, has no say in whether it can be read.

Lines inside a function that Python 3 cannot read are mended: Python 2's statements are translated, others become
`pass`. A function that lost a line so, or does not parse even then, is given back as text as well: it was not read in
full.
"""

import ast
import dataclasses
import html
import json
import re
import textwrap
import warnings
from collections.abc import Iterator

from data_tools.markdown import without_thought

Function = ast.FunctionDef | ast.AsyncFunctionDef

_DEF = re.compile(r"\b(?:async[ \t]+)?def[ \t]+\w+[ \t]*[(\[]")
_FENCE = re.compile(r"^[ \t>*+\-\d.]*(?:`{3,}|~{3,})[ \t]*\{?\.?([\w+#-]*)", re.MULTILINE)
_FENCE_LINE = re.compile(r"[ \t>]*(?:`{3,}|~{3,})[ \t]*[\w+#.{}-]*(?:[ \t]+\w+=[^`\n]*)?[ \t]*$")
_QUOTES = re.compile(r'"""|' + "'''")
PYTHON = {"", "python", "py", "python3", "py3", "python2", "pycon", "ipython", "ipython3", "sage"}
"""The languages of fenced blocks that hold Python."""
_MARGIN = frozenset(" .:>#|")
"""What may stand left of a function's later lines besides what stands left of its first."""
_DIGITS = frozenset("0123456789")
_DEPTH = 3  # texts in strings in texts
_STRING = 200  # lines of a string that goes on at the margin: a quotation mark that stands alone ends nowhere
_MENDED = 4  # at most every fourth line, or three
_TRIES = 40


@dataclasses.dataclass
class Found:
    """functions: in the text's order, inner ones too. unread: functions that could not be read in full. mentions:
    single lines with a `def` that are no function, as in a sentence on one. languages: of fenced blocks that nothing
    here reads.
    """

    functions: list[Function] = dataclasses.field(default_factory=list)
    unread: list[str] = dataclasses.field(default_factory=list)
    mentions: list[str] = dataclasses.field(default_factory=list)
    languages: set[str] = dataclasses.field(default_factory=set)


def find(content: str) -> Found:
    """All functions in a text."""
    found = Found()
    _read(plain(content), found, 0)
    return found


def plain(content: str) -> str:
    """The text without what an editor or an encoding leaves: byte order marks, NUL, CRLF, halves of characters."""
    text = content.encode("utf-8", "replace").decode()
    for seen, meant in (("\ufeff", ""), ("\0", ""), ("\r\n", "\n"), ("\r", "\n"), ("\xa0", " ")):
        text = text.replace(seen, meant)
    return text


def parse(code: str) -> ast.Module | None:
    """The tree of a text, None if it does not parse."""
    return _tried(code)[0]


def parsed(code: str) -> tuple[ast.Module | None, str | None]:
    """The tree, and None; or None, and why it does not parse, in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(code), None
        except SyntaxError as error:
            return None, f"{error.msg} (line {error.lineno})"
        except (ValueError, RecursionError, MemoryError) as error:
            return None, " ".join(str(error).split())[:100] or type(error).__name__


def programs(answer: str) -> list[str]:
    """What may be the program in a language model's answer, the likeliest first: its fenced blocks, the longest first;
    what stands between the first and the last fence, for a program with fences inside; the whole text, if it holds no
    fence.

    What a model thinks before it answers (<think>) is left out.
    """
    lines = without_thought(plain(answer)).split("\n")
    fences = [i for i, line in enumerate(lines) if _FENCE_LINE.match(line)]
    if not fences:
        return ["\n".join(lines)]
    blocks = [lines[start + 1 : end] for start, end in zip(fences, [*fences[1:], len(lines)], strict=True)][::2]
    blocks.sort(key=lambda block: -sum(map(len, block)))
    whole = lines[fences[0] + 1 : fences[-1] if len(fences) > 1 else len(lines)]
    return [textwrap.dedent("\n".join(block)) for block in [*blocks, *([whole] if whole not in blocks else [])]]


def _tried(code: str) -> tuple[ast.Module | None, int | None]:
    """The tree; or the line of what is not Python's syntax, None where that is not the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the code that is read, not of ours
        try:
            return ast.parse(code), None
        except SyntaxError as error:
            return None, error.lineno or 0
        except (ValueError, RecursionError, MemoryError):
            return None, None


def _read(text: str, found: Found, depth: int) -> None:
    if depth < _DEPTH and (strings := _json_strings(text)):  # first: most of JSON is Python, too
        for inner in strings:
            _read(inner, found, depth + 1)
        return
    if (tree := parse(text)) is not None:
        functions = _functions(tree)
        found.functions += functions
        if depth < _DEPTH and len(_DEF.findall(text)) > len(functions):
            for inner in _inner_texts(tree, text):
                _read(inner, found, depth + 1)
        return
    found.languages |= {word.lower() for word in _FENCE.findall(text)} - PYTHON - {"text", "txt"}
    _scan(text, found, depth)


def _functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def _inner_texts(tree: ast.AST, text: str) -> Iterator[str]:
    """The strings and the comments of a program that hold a `def`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
            value = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            if _DEF.search(value):
                yield plain(value)
    comments = "\n".join(line if line.lstrip().startswith("#") else "" for line in text.split("\n"))
    if _DEF.search(comments):
        yield "?\n" + comments  # comments alone would parse, and hold nothing


def _json_strings(text: str) -> list[str]:
    """The strings with a `def` in a JSON text; lists of strings (a notebook's cells) are joined."""
    if text.lstrip()[:1] not in ("{", "["):
        return []
    try:
        waiting = [json.loads(text)]
    except (ValueError, RecursionError):
        return []
    found = []
    while waiting:
        value = waiting.pop()
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            value = "".join(value)
        if isinstance(value, str) and _DEF.search(value):
            found.append(plain(value))
        elif isinstance(value, (list, dict)):
            waiting += value if isinstance(value, list) else value.values()
    return found


def _scan(text: str, found: Found, depth: int) -> None:
    """Takes the functions out of a text that is no program."""
    lines = [line.expandtabs(8) for line in text.split("\n")]  # Python 2's tabs
    start = 0
    while start < len(lines):
        match = _DEF.search(lines[start])
        if match is None:
            start += 1
            continue
        rest = lines[start][match.start() :]
        if "\\n" in rest and depth < _DEPTH:  # a string's inside, as in JSON lines
            _read(_unescaped(rest), found, depth + 1)
            start += 1
            continue
        candidates = list(_candidates(lines, start, match.start()))
        code, taken = min(candidates, key=lambda candidate: candidate[1])
        trees: list[ast.Module] = []
        whole = False
        for read in (_as_it_is, _mended):
            for text_read, n in candidates:
                trees, whole = read(text_read)
                if trees:
                    code, taken = text_read, n
                    break
            if trees:
                break
        if not whole:
            (found.unread if taken > 1 else found.mentions).append(code)
        for tree in trees:
            found.functions += _functions(tree)
            for inner in _inner_texts(tree, "") if depth < _DEPTH else ():
                _read(inner, found, depth + 1)
        start += taken


def _candidates(lines: list[str], start: int, column: int) -> Iterator[tuple[str, int]]:
    """Texts that the function which begins at (start, column) may be, and how many lines each takes."""
    margin = lines[start][:column]
    beside = _MARGIN | set(margin) | (_DIGITS if _DIGITS & set(margin) else set())  # numbered lines
    first = lines[start][column:]
    if margin.endswith("`"):  # code within a sentence
        first = first.partition("`")[0]
    for place in [column] if not margin.strip() else [column, 0]:
        for trust_quotes in (True, False):  # a string may go on at the margin; or a quotation mark may stand alone
            taken = [first]
            in_string, head = _STRING * _odd_quotes(first), max(0, _opened(first))
            for line in lines[start + 1 :]:
                left, rest = line[:place], line[place:]
                deeper = not rest.strip() or rest[0] in " )]}" or head > 0
                if not ((trust_quotes and in_string > 0) or (deeper and not set(left) - beside)):
                    break
                taken.append(rest)
                if _odd_quotes(rest):
                    in_string = 0 if in_string else _STRING
                elif in_string:
                    in_string -= 1
                head = head and max(0, head + _opened(rest))
            while not taken[-1].strip() and len(taken) > 1:
                taken.pop()
            code = "\n".join(taken) + "\n"
            yield code, len(taken)
            if "&" in code and (clear := html.unescape(code)) != code:
                yield clear, len(taken)


def _unescaped(text: str) -> str:
    """A string's value from within its quotation marks, its end left on the last line."""
    for seen, meant in (("\\n", "\n"), ("\\t", "\t"), ('\\"', '"'), ("\\'", "'"), ("\\\\", "\\")):
        text = text.replace(seen, meant)
    return re.sub(r"[\"'][,}\])]*\s*\Z", "\n", text)


def _odd_quotes(line: str) -> bool:
    return len(_QUOTES.findall(line)) % 2 == 1


def _opened(line: str) -> int:
    """Parentheses that a line opens, less those that it closes."""
    return line.count("(") + line.count("[") - line.count(")") - line.count("]")


_PYTHON2 = (
    (re.compile(r"^(\s*)print\b\s*(?:>>[^,]+,)?\s*(.*?),?\s*$"), r"\1print(\2)"),
    (re.compile(r"^(\s*except\b[^:]*?),\s*(\w+)\s*:"), r"\1 as \2:"),
    (re.compile(r"^(\s*raise\s+[\w.]+)\s*,\s*(.*?)\s*$"), r"\1(\2)"),
    (re.compile(r"^(\s*)exec\s+(.*?)\s*$"), r"\1exec(\2)"),
    (re.compile(r"<>"), "!="),
    (re.compile(r"\b(\d+)[lL]\b"), r"\1"),
    (re.compile(r"\b0+(\d+)\b"), r"0o\1"),
    (re.compile(r"\b[uU][rR](?=[\"'])"), "r"),
    (re.compile(r"`([^`]+)`"), r"repr(\1)"),
)


def _as_it_is(code: str) -> tuple[list[ast.Module], bool]:
    tree = parse(code)
    return ([], False) if tree is None else ([tree], True)


def _python3(line: str) -> str:
    for pattern, replacement in _PYTHON2:
        line = pattern.sub(replacement, line)
    return line


def _mended(code: str) -> tuple[list[ast.Module], bool]:
    """Trees of a function some of whose lines Python 3 cannot read: with those lines translated, and without them;
    and whether translation was enough, so that nothing was left out."""
    lines = code.split("\n")
    python3 = [line if place == 0 else _python3(line) for place, line in enumerate(lines)]
    if (tree := parse("\n".join(python3))) is not None:
        kept = [line if line == before else "" for line, before in zip(python3, lines, strict=True)]
        return [tree, *filter(None, [parse("\n".join(kept))])], True
    without = list(lines)
    whole = True
    for _ in range(min(_TRIES, max(3, len(lines) // _MENDED))):
        tree, number = _tried("\n".join(lines))
        if tree is not None:
            return [tree, *filter(None, [parse("\n".join(without))])], whole
        place = (number or 0) - 1
        if not 0 < place < len(lines):  # not the `def` itself
            return [], False
        line = lines[place]
        changed = _python3(line)
        if changed == line:
            changed, whole = line[: len(line) - len(line.lstrip())] + "pass", False
        if changed == line:
            return [], False
        lines[place], without[place] = changed, ""
    return [], False
