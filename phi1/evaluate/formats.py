"""Rows of published benchmarks as problems.

| format | prompt | solution | test |
|---|---|---|---|
| HumanEval | `prompt` | `canonical_solution`, a body | `test`, with `check(candidate)` |
| MBPP, as published and sanitised | `text` or `prompt`, and the asserts | `code`, a program | `test_list` |
| HumanEval+ and MBPP+ of EvalPlus | `prompt` | `canonical_solution` | `base_input`, `plus_input` and `atol` |
| their copies on Hugging Face | as above | | `test` |

EvalPlus compares with what the solution returns, floats within `atol`. JSON has no tuples, sets or complex numbers:
where EvalPlus' inputs had them, the asserts of the same row show which arguments they are, and the inputs are read back
by that pattern.
"""

import ast
import builtins
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
    return isinstance(value, float) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, float) for item in value)
    )


def _close(got, wanted, atol):
    if isinstance(wanted, (list, tuple)):
        return len(got) == len(wanted) and all(_close(one, other, atol) for one, other in zip(got, wanted))
    if isinstance(wanted, (int, float, complex)):
        return got == wanted or (got != got and wanted != wanted) or abs(got - wanted) <= atol + 1e-7 * abs(wanted)
    return got == wanted


def _pyramid(base, height):  # the height above the base's middle
    return round(base**2 + 2 * base * math.sqrt((base / 2) ** 2 + height**2))


def _digits(one, other):  # digit by digit, not of the difference
    one, other = str(one), str(other)
    width = max(len(one), len(other))
    return sum(abs(int(a) - int(b)) for a, b in zip(one.zfill(width), other.zfill(width)))


# Tasks whose words allow more than the reference's result.
_any_order = ("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
              "intersection_array", "find_dissimilar", "Diff")
_found_or_not = ("check_str", "text_match_three", "text_starta_endb")
_also_right = {{"surface_Area": _pyramid, "digit_distance_nums": _digits}}


def _right(got, wanted, arguments, atol):
    if {name!r} == "find_zero":  # any root is right
        return abs(sum(c * math.pow(got, i) for i, c in enumerate(arguments[0]))) <= max(atol, 1e-4)
    if {name!r} in _any_order:
        return set(got) == set(wanted)
    if {name!r} in _found_or_not:
        return (got if isinstance(got, bool) else got is not None) == (wanted is not None)
    if got == wanted:
        return True
    if {name!r} in _also_right and abs(got - _also_right[{name!r}](*arguments)) <= atol:
        return True
    atol = atol or (1e-6 if _floats(wanted) else 0)
    return bool(atol) and type(got) is type(wanted) and _close(got, wanted, atol)


def check(candidate):
    cases = [_read(raw, _pattern) if _pattern else raw for raw in _inputs]
    # All before the first call: a reference that fails is no fault of the program.
    expected = [_reference(*copy.deepcopy(arguments)) for arguments in cases]
    for arguments, wanted in zip(cases, expected):
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
        "task_id": _text(row, "task_id"),
        "prompt": _text(row, "prompt"),
        "entry_point": _text(row, "entry_point"),
        "test": _text(row, "test", ""),
        "solution": _text(row, "canonical_solution", ""),
    }


def _text(row: dict[str, Any], name: str, default: str | None = None) -> str:
    value = row[name] if default is None else row.get(name) or default
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}, not text")
    return value


def _evalplus(row: dict[str, Any]) -> dict[str, str]:
    task_id, prompt, name = _text(row, "task_id"), _text(row, "prompt"), _text(row, "entry_point")
    solution = _text(row, "canonical_solution")
    inputs = [*(row["base_input"] or []), *(row.get("plus_input") or [])]
    shown = _calls(_text(row, "assertion", ""), name)
    pattern = ["list", [_pattern(argument) for argument in shown[0].args]] if shown else None
    test = _EVALPLUS.format(
        source=prompt + solution,
        name=name,
        inputs=json.dumps(inputs),
        atol=float(row.get("atol") or 0),
        pattern=json.dumps(pattern),
    )
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
    tests, code = _texts(row, "test_list"), _text(row, "code", "").replace("\r\n", "\n")
    name = _text(row, "entry_point", "") or _entry_point(code, tests)
    task_id = f"Mbpp/{row['task_id']}" if type(row["task_id"]) is int else _text(row, "task_id")
    words = _text(row, "text", "") or _text(row, "prompt")
    prompt = words if words.lstrip().startswith('"""') else _docstring([words.strip(), *tests])  # it may be one already
    setup = "\n".join(_texts(row, "test_imports")) + "\n" + _text(row, "test_setup_code", "")
    test = _text(row, "test", "") or (setup.strip() + "\n" + "\n".join(tests) + "\n" if tests else "")
    return {
        "task_id": task_id,
        "prompt": prompt,
        "entry_point": name,
        "test": test,
        "solution": code,
    }


def _texts(row: dict[str, Any], name: str) -> list[str]:
    value = row.get(name) or []
    texts = [value] if isinstance(value, str) and name != "test_list" else value
    if not isinstance(texts, list) or not all(isinstance(line, str) for line in texts):
        raise TypeError(f"{name} is no list of texts")
    return texts


def _docstring(lines: Sequence[str]) -> str:
    """As it stands wherever that is Python; else with backslashes and quotes escaped."""
    text = "".join(f"{line}\n" for line in lines)
    plain = f'"""\n{text}"""\n'
    if len(tree := _parsed(plain)) == 1 and isinstance(tree[0], ast.Expr):
        return plain
    escaped = text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return f'"""\n{escaped}"""\n'


def _parsed(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _entry_point(code: str, tests: Sequence[str]) -> str:
    """The last name that the code defines (a function rather than a class) and the tests use; without tests, or where
    they are no Python, the last function that it defines; without code, the first name that the tests call."""
    found: dict[str, bool] = {}  # name: whether it is a function
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name] = True
        elif isinstance(node, ast.ClassDef):
            found[node.name] = False
        elif isinstance(node, ast.Assign):
            found |= {
                target.id: isinstance(node.value, ast.Lambda) for target in node.targets if isinstance(target, ast.Name)
            }
    defined = sorted(found, key=lambda name: (found[name], list(found).index(name)))
    trees = [node for test in tests for statement in _parsed(test.strip()) for node in ast.walk(statement)]
    used = [node.id for node in trees if isinstance(node, ast.Name)]
    if not code.strip():
        called = [node.func.id for node in trees if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        defined, used = [name for name in called if not hasattr(builtins, name)][:1], called
    for name in reversed(defined):
        if name in used or (not used and found[name]):
            return name
    raise ValueError("no function of its code is called by its tests")


def _calls(source: str, name: str) -> list[ast.Call]:
    """The calls of a function in a source, in order."""
    nodes = [node for statement in _parsed(source.strip()) for node in ast.walk(statement)]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == name]


def rows(text: str) -> list[dict[str, Any]]:
    """The objects of a file: JSON lines, which end at a newline only, or one JSON list."""
    try:
        whole = json.loads(text)
    except ValueError:
        whole = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                whole += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from error
    found = whole if isinstance(whole, list) else [whole]
    if not all(isinstance(row, dict) for row in found):
        raise TypeError("its lines are no JSON objects")
    return found


def read(text: str, make: Callable[..., Any], where: str) -> list[Any]:
    """`make(**fields)` of each row of a file. Raises UserError, naming the row."""
    found: list[Any] = []
    place = ""
    try:
        for number, row in enumerate(rows(text), 1):
            place = f"row {number}: "
            found.append(make(**fields(row)))
        return found
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{where}: not a file of problems ({place}{type(error).__name__}: {error}); expected JSON lines with "
            "task_id, prompt, entry_point, test (HumanEval), or MBPP's or EvalPlus' columns"
        ) from error
