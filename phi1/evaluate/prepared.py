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
    """The test as `inside/checker.py` reads it: code, and the names that it uses and does not define.

    Raises BrokenTest.
    """
    try:
        tree = ast.parse(test, CODE_LINES)
        if exact_types:
            tree = ast.fix_missing_locations(_ExactTypes().visit(tree))
        if "type(" in test or "__class__" in test:
            tree = ast.fix_missing_locations(_TypesOfTheirs().visit(tree))
        codes = compile(preamble, "preamble.py", "exec"), compile(tree, CODE_LINES, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise BrokenTest(f"the test is not Python: {type(error).__name__}: {error}") from error
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    loads = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    stores = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    unknown = sorted(loads - stores - set(vars(builtins)) - {"candidate", entry_point, "exactly_equal", "type_of"})
    return marshal.dumps((*codes, unknown, entry_point, "StopIteration" in preamble + test))


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


class _TypesOfTheirs(ast.NodeTransformer):
    """`type(x)` and `x.__class__` in a test see through what stands for an object of the program's."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "type" and len(node.args) == 1 and not node.keywords:
            node.func.id = "type_of"
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr != "__class__" or not isinstance(node.ctx, ast.Load):
            return node
        return ast.copy_location(ast.Call(ast.Name("type_of", ast.Load()), [node.value], []), node)
