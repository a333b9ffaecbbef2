"""Makes a test ready for the sandbox: compiled once here, for all programs that it judges."""

import ast
import builtins
import functools
import marshal

CODE_LINES = "test.py"
"""The file name in the compiled test's lines."""


class BrokenTest(ValueError):
    """A test that is no Python."""


@functools.lru_cache(maxsize=1024)
def prepare(test: str, preamble: str, entry_point: str, exact_types: bool) -> bytes:
    """The test as `inside/checker.py` reads it: code, the names that it uses and does not define, and what it may put
    in the place of something that the program uses.

    Raises BrokenTest.
    """
    try:
        tree = ast.parse(test, CODE_LINES)
        if exact_types:
            tree = ast.fix_missing_locations(_ExactTypes().visit(tree))
        nodes = list(ast.walk(tree))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        loads = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        stores = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        unknown = sorted(loads - stores - set(vars(builtins)) - {"candidate", entry_point, "exactly_equal"})
        places = sorted(_places(nodes))
        if any(word in test for word in ("type(", "__class__", "super()", "match ")):
            tree = ast.fix_missing_locations(_Theirs({*unknown, "candidate", entry_point}).visit(tree))
        codes = compile(preamble, "preamble.py", "exec"), compile(tree, CODE_LINES, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise BrokenTest(f"the test is not Python: {type(error).__name__}: {error}") from error
    watched = [word for word in ("seed", "environ", "warn", "log") if word in test.lower()]
    watched += ["pickle"] if "pickle" in preamble + test else []
    return marshal.dumps((*codes, unknown, entry_point, "StopIteration" in preamble + test, places, watched))


def _places(nodes: list[ast.AST]) -> set[tuple[str, str]]:
    """Modules and names in them that the test may replace: `time.sleep = …`, `patch("time.sleep")`,
    `patch.object(time, "sleep")`, `setattr(time, "sleep", …)`.
    """
    modules: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                head = alias.name.partition(".")[0]
                modules |= {alias.asname: alias.name} if alias.asname else {head: head}
        elif isinstance(node, ast.ImportFrom):
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found: set[tuple[str, str]] = set()
    for node in nodes:
        place, name = "", ""
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            place, name = _of_import(node.value, modules), node.attr
        elif isinstance(node, ast.Call) and node.args:
            first, *more = node.args
            if isinstance(first, ast.Constant) and "patch" in _dotted(node.func):
                place, _, name = str(first.value).rpartition(".")
            elif more and isinstance(more[0], ast.Constant):
                place, name = _of_import(first, modules), str(more[0].value)
        if place and (place, name) not in (("sys", "stdout"), ("sys", "stderr")):
            found.add((place, name))
    return found


def _of_import(node: ast.AST, modules: dict[str, str]) -> str:
    """The module that an expression names, "" if it names none."""
    head, _, rest = _dotted(node).partition(".")
    return f"{modules[head]}.{rest}".rstrip(".") if head in modules else ""


def _dotted(node: ast.AST) -> str:
    """`a.b.c`, of names only; else ""."""
    if isinstance(node, ast.Name):
        return node.id
    inner = _dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else ""


class _ExactTypes(ast.NodeTransformer):
    """`a == b` in a test becomes a comparison of types as well: 1 is neither True nor 1.0."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if not any(isinstance(operation, (ast.Eq, ast.NotEq)) for operation in node.ops):
            return node
        if len(node.ops) > 1:
            raise SyntaxError(f"line {node.lineno}: a chain of comparisons with == is not for exact types")
        call = ast.Call(ast.Name("exactly_equal", ast.Load()), [node.left, node.comparators[0]], [])
        result = ast.UnaryOp(ast.Not(), call) if isinstance(node.ops[0], ast.NotEq) else call
        return ast.copy_location(result, node)


class _Theirs(ast.NodeTransformer):
    """`type(x)`, `x.__class__`, `super()` and patterns in a test see through what stands for an object or class of the
    program's. names: those that the test does not define.
    """

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.first = ""  # parameter of the function that is being visited

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before, parameters = self.first, [*node.args.posonlyargs, *node.args.args]
        self.first = parameters[0].arg if parameters else before
        self.generic_visit(node)
        self.first = before
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Name) or node.keywords:
            return node
        if node.func.id == "type" and len(node.args) == 1:
            node.func.id = "type_of"
        elif node.func.id == "super" and not node.args and self.first:
            node.func.id = "super_of"
            node.args = [ast.Name("__class__", ast.Load()), ast.Name(self.first, ast.Load())]
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr != "__class__" or not isinstance(node.ctx, ast.Load):
            return node
        return ast.copy_location(ast.Call(ast.Name("type_of", ast.Load()), [node.value], []), node)

    def visit_MatchClass(self, node: ast.MatchClass) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.cls, ast.Name) and node.cls.id in self.names:
            node.cls = ast.Attribute(ast.Name("class_pattern", ast.Load()), node.cls.id, ast.Load())
        return node
