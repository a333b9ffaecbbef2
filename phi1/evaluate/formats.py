"""Rows of published benchmarks as problems.

| format | prompt | solution | test |
|---|---|---|---|
| HumanEval | `prompt` | `canonical_solution`, a body | `test`, with `check(candidate)` |
| MBPP, as published and sanitised | `text` or `prompt`, and the asserts | `code`, a program | `test_list` |
| HumanEval+ and MBPP+ of EvalPlus | `prompt` | `canonical_solution` | `base_input` and `plus_input`, compared with what the solution returns, floats within `atol` |
| their copies on Hugging Face | as above | | `test` |

JSON has no tuples, sets or complex numbers: where EvalPlus' inputs had them, the asserts of the same row show which arguments
they are, and the inputs are read back by that pattern.
"""

import ast
import json
from collections.abc import Callable, Sequence
from typing import Any

from phi1.errors import UserError

_EVALPLUS = """import copy
import json
import math

_space = {{}}
exec({source!r}, _space)
_reference = _space[{name!r}]
_inputs = json.loads({inputs!r})
_pattern = json.loads({pattern!r})


def _read(value, pattern):
    kind, inner = pattern
    if kind == "complex":
        return complex(value)
    if kind == "dict" and isinstance(value, dict):
        return {{key: _read(item, inner[0]) for key, item in value.items()}} if inner else value
    if isinstance(value, list) and kind in ("list", "tuple", "set"):
        each = inner if len(inner) == len(value) else inner[:1] * len(value)
        items = [_read(item, one) for item, one in zip(value, each)] if each else value
        return {{"list": list, "tuple": tuple, "set": set}}[kind](items)
    return value


def _floats(value):
    return isinstance(value, float) or (isinstance(value, (list, tuple)) and all(isinstance(item, float) for item in value))


def _close(got, wanted, atol):
    if isinstance(wanted, (list, tuple)):
        return len(got) == len(wanted) and all(_close(one, other, atol) for one, other in zip(got, wanted))
    if isinstance(wanted, (int, float, complex)):
        return got == wanted or (got != got and wanted != wanted) or abs(got - wanted) <= atol + 1e-7 * abs(wanted)
    return got == wanted


def _right(got, wanted, arguments, atol):
    if {name!r} == "find_zero":  # any root is right
        return abs(sum(c * math.pow(got, i) for i, c in enumerate(arguments[0]))) <= max(atol, 1e-4)
    if got == wanted:
        return True
    atol = atol or (1e-6 if _floats(wanted) else 0)
    return bool(atol) and _close(got, wanted, atol)


def check(candidate):
    for raw in _inputs:
        arguments = _read(raw, _pattern) if _pattern else raw
        wanted = _reference(*copy.deepcopy(arguments))
        got = candidate(*copy.deepcopy(arguments))
        assert _right(got, wanted, arguments, {atol!r}), "another result than the reference's"
"""


def fields(row: dict[str, Any]) -> dict[str, str]:
    """`Problem`'s fields of one row. Raises KeyError, TypeError or ValueError for a row in no known format."""
    if "base_input" in row:
        return _evalplus(row)
    if "test_list" in row or "code" in row:
        return _mbpp(row)
    return {
        "task_id": _text(row, "task_id"), "prompt": _text(row, "prompt"), "entry_point": _text(row, "entry_point"),
        "test": _text(row, "test", ""), "solution": _text(row, "canonical_solution", ""),
    }  # fmt: skip


def _text(row: dict[str, Any], name: str, default: str | None = None) -> str:
    value = row[name] if default is None else row.get(name) or default
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}, not text")
    return value


def _evalplus(row: dict[str, Any]) -> dict[str, str]:
    task_id, prompt, name = _text(row, "task_id"), _text(row, "prompt"), _text(row, "entry_point")
    solution = _text(row, "canonical_solution")
    inputs = [*row["base_input"], *(row.get("plus_input") or [])]
    shown = _calls(_text(row, "assertion", ""), name)
    test = _EVALPLUS.format(
        source=prompt + solution, name=name, inputs=json.dumps(inputs), atol=float(row.get("atol") or 0),
        pattern=json.dumps(["list", [_pattern(argument) for argument in shown[0].args]] if shown else None),
    )  # fmt: skip
    return {"task_id": task_id, "prompt": prompt, "entry_point": name, "test": test, "solution": solution}


def _pattern(node: ast.expr) -> list[Any]:
    """Of an argument: ["list" | "tuple" | "set" | "dict" | "complex" | "", patterns of its elements]."""
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return [type(node).__name__.lower(), [_pattern(item) for item in node.elts]]
    if isinstance(node, ast.Dict):
        return ["dict", [_pattern(item) for item in node.values[:1]]]
    complex_part = any(isinstance(n, ast.Constant) and isinstance(n.value, complex) for n in ast.walk(node))
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
    return [called if called in ("set", "tuple", "complex") else "complex" if complex_part else "", []]


def _mbpp(row: dict[str, Any]) -> dict[str, str]:
    tests: Sequence[str] = row.get("test_list") or []
    if not isinstance(tests, list) or not all(isinstance(line, str) for line in tests):
        raise TypeError("test_list is no list of texts")
    code = _text(row, "code", "")
    name = row.get("entry_point") or _entry_point(code, tests)
    task_id = row["task_id"] if isinstance(row["task_id"], str) else f"Mbpp/{row['task_id']}"
    words = _text(row, "text", "") or _text(row, "prompt")
    prompt = f'"""\n{words.strip()}\n' + "".join(f"{line}\n" for line in tests) + '"""\n'
    if words.lstrip().startswith('"""'):
        prompt = words  # it is one already
    imports = row.get("test_imports") or []
    setup = "\n".join(imports if isinstance(imports, list) else [imports]) + "\n" + (row.get("test_setup_code") or "")
    test = _text(row, "test", "") or (setup.strip() + "\n" + "\n".join(tests) + "\n" if tests else "")
    return {
        "task_id": task_id,
        "prompt": prompt,
        "entry_point": name,
        "test": test,
        "solution": code.replace("\r\n", "\n"),
    }


def _entry_point(code: str, tests: Sequence[str]) -> str:
    """The function that the tests call and the code defines."""
    defined = [node.name for node in ast.parse(code.replace("\r\n", "\n")).body if isinstance(node, ast.FunctionDef)]
    for name in reversed(defined):
        if any(_calls(line, name) for line in tests):
            return name
    raise ValueError("no function of its code is called by its tests")


def _calls(source: str, name: str) -> list[ast.Call]:
    """The calls of a function in a source, in order."""
    try:
        tree = ast.parse(source.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [node for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name]  # fmt: skip


def rows(text: str) -> list[dict[str, Any]]:
    """The objects of a file: JSON lines, which end at a newline only, or one JSON list."""
    try:
        whole = json.loads(text)
    except ValueError:
        whole = [json.loads(line) for line in text.split("\n") if line.strip()]
    found = whole if isinstance(whole, list) else [whole]
    if not all(isinstance(row, dict) for row in found):
        raise TypeError("its lines are no JSON objects")
    return found


def read(text: str, make: Callable[..., Any], where: str) -> list[Any]:
    """`make(**fields)` of each row of a file. Raises UserError, naming the row."""
    found: list[Any] = []
    try:
        for row in rows(text):
            found.append(make(**fields(row)))
        return found
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{where}: not a file of problems (row {len(found) + 1}: {type(error).__name__}: {error}); expected JSON lines with "
            "task_id, prompt, entry_point, test (HumanEval), or MBPP's or EvalPlus' columns"
        ) from error
