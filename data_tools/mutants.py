"""Programs that are a little wrong: a function's body with one operator exchanged. A good test tells them from it."""

import ast
from collections.abc import Iterator
from typing import Any

_EXCHANGE: dict[type, Any] = {
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Mod: ast.FloorDiv,
    ast.FloorDiv: ast.Mod,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def with_other_operators(body: str, argument: str) -> Iterator[str]:
    """Indented bodies, each with another operator changed (`>` to `>=`, `+` to `-`, …).

    Nothing in or around a `while` is changed: that may never end.
    """
    if "while " in body:
        return
    module = ast.parse(f"def f({argument}):\n{body}")
    for node in ast.walk(module):
        if isinstance(node, ast.Compare):
            right = node.ops[0]
            if other := _EXCHANGE.get(type(right)):
                node.ops[0] = other()
                yield _body(module)
                node.ops[0] = right
        elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
            operator = node.op
            if other := _EXCHANGE.get(type(operator)):
                node.op = other()
                yield _body(module)
                node.op = operator


def _body(module: ast.Module) -> str:
    return ast.unparse(module).partition("\n")[2] + "\n"
