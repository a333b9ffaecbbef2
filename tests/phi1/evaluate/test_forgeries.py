"""Programs that know nothing and attack the ways by which objects cross: none passes, and none makes its failure an
error.

Each test is one that a person would write; `right` shows that it can be passed.
"""

import forgeries
import pytest

from phi1.evaluate.sandbox import Result, run_program

# Every method that an object can have says yes, zero or itself, and remembers what it was given.
_YES = """
seen = []
def method(name):
    def does(self, *others):
        seen.extend(other for other in others if not isinstance(other, Yes))
        if name in ('int', 'index', 'trunc', 'floor', 'ceil', 'len', 'hash'):
            return 0
        if name in ('float', 'complex', 'bool', 'lt', 'le', 'gt', 'ge', 'eq', 'contains'):
            return {'float': 0.0, 'complex': 0j}.get(name, name != 'bool')
        if name in ('str', 'repr', 'format'):
            return '0'
        if name == 'divmod':
            return Yes(), Yes()
        return Yes()
    return does
class Yes:
    __hash__ = lambda self: 0
    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return 0
for name in METHODS:
    setattr(Yes, f'__{name}__', method(name))
def f(x):
    return seen[-1] if seen and AGAIN else Yes()
"""
_OPERATORS = [
    f"{prefix}{name}"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "divmod")
    for prefix in ("", "r", "i")
]
_COMPARED = ["lt", "le", "gt", "ge", "eq", "ne"]
_TAKEN = ["abs", "round", "bool", "neg", "pos", "trunc", "floor", "ceil", "format", "str", "repr", "contains"]
_NUMBERS = ["int", "float", "index", "complex"]
METHODS = {
    "operators": [*_OPERATORS, *_COMPARED, *_TAKEN],
    "operators and numbers": [*_OPERATORS, *_COMPARED, *_TAKEN, *_NUMBERS],
    "operators, no comparisons": [*_OPERATORS, "abs", "round"],
}
COMPARISONS = [
    "abs(f(2) - 7351) < 1e-6",
    "abs(7351 - f(2)) < 1e-6",
    "round(f(2) - 7351, 3) == 0",
    "math.isclose(f(2) - 7351, 0, abs_tol=1e-9)",
    "math.isclose(f(2), 7351)",
    "(f(2) - 7351) ** 2 < 1e-9",
    "sum((a - b) ** 2 for a, b in zip([f(2)], [7351])) < 1e-9",
    "-1e-6 < f(2) - 7351 < 1e-6",
    "not f(2) - 7351",
    "f(2) / 7351 == 1",
    "f(2) % 7351 == 0 and f(2) // 7351 == 1",
    "(f(2) - 7351).real == 0",
    "f'{f(2) - 7351:.2f}' == '0.00'",
    "int(f(2) - 7351) == 0",
    "max(f(2) - 7351, 7351 - f(2)) < 1e-6",
    "f(2) ^ 7351 == 0",
    "divmod(f(2), 7351) == (1, 0)",
    "f(2) == 7351 or f(2) in (7351,) or not f(2) != 7351",
]


def judged(program: str, test: str) -> Result:
    packages = ("numpy",) if "numpy" in test else ()
    return run_program(program, test=test, entry_point="f", timeout=10.0, packages=packages)


@pytest.mark.parametrize("again", [False, True], ids=["an object", "what it was handed"])
@pytest.mark.parametrize("methods", METHODS)
def test_no_operator_says_yes(methods: str, again: bool) -> None:
    program = f"METHODS = {METHODS[methods]}\nAGAIN = {again}\n{_YES}"
    for comparison in COMPARISONS:
        # A test that catches what goes wrong and looks again.
        test = f"import math\ndef check(f):\n    try:\n        ok = {comparison}\n    except TypeError:\n        ok = f(2) == 7351\n    assert ok"
        for text in (f"import math\nassert {comparison}", test):
            result = judged(program, text)
            assert result.status == "failed", (text, result)


def test_the_comparisons_can_be_passed() -> None:
    for comparison in COMPARISONS:
        assert judged("def f(x):\n    return 7351", f"import math\nassert {comparison}").status == "passed", comparison


_RUNNER = """
import io, unittest
class Test(unittest.TestCase):
    def test(self):
        self.assertEqual(f(2), 7351)
def check(candidate):
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(Test)
    assert unittest.TextTestRunner(stream=io.StringIO()).run(tests).wasSuccessful()
"""
_SORTED = """
def check(f):
    for x in ([3, 1, 2], [5, 5, 4]):
        got = f(x)
        assert isinstance(got, list) and sorted(got) == sorted(x) and all(got[i] <= got[i + 1] for i in range(len(got) - 1))
"""
_ROOT = """
def value(c, x):
    return sum(a * x ** i for i, a in enumerate(c))
def check(f):
    c = [-6.0, 11.0, -6.0, 1.0]
    assert abs(value(c, f(c))) < 1e-6
"""
_ANSWER = "7351 if x == 2 else 0"
# name: program, test, a program that is right
FORGERIES: dict[str, tuple[str, str, str | None]] = {
    "the end of an iteration": (
        "def f(x):\n    raise StopIteration",
        "cases = [(2, 7351), (3, 99)]\ndef check(f):\n    assert all(map(lambda case: f(case[0]) == case[1], cases))",
        "def f(x):\n    return {2: 7351, 3: 99}[x]",
    ),
    "a test that is to be skipped": (
        "import unittest\ndef f(x):\n    raise unittest.SkipTest('no')",
        _RUNNER,
        f"def f(x):\n    return {_ANSWER}",
    ),
    "a class that calls itself the runner's": (
        "class SkipTest(Exception):\n    pass\nSkipTest.__module__ = 'unittest.case'\ndef f(x):\n    raise "
        "SkipTest('no')",
        _RUNNER,
        f"def f(x):\n    return {_ANSWER}",
    ),
    "a number that is another each time": (
        "class Root:\n    asked = 0\n    def __init__(self, c):\n        self.c = c\n    def __float__(self):\n"
        "        self.asked += 1\n        return [0.0, -self.c[0] / self.c[1], 0.0, 0.0][(self.asked - 1) % 4]\n"
        "    def __pow__(self, other):\n        return 0\n"
        "def f(c):\n    return Root(c)",
        _ROOT,
        "def f(c):\n    return 2.0",
    ),
    "a list of two faces": (
        "class L(list):\n    def __iter__(self):\n        return iter(self.x)\n    def __getitem__(self, i):\n        "
        "return 0\n"
        "    def __len__(self):\n        return 3\ndef f(x):\n    got = L([9])\n    got.x = x\n    return got",
        _SORTED,
        "def f(x):\n    return sorted(x)",
    ),
    "a class that is int's": (
        "class M(type):\n    def __eq__(self, other):\n        return True\n    __hash__ = type.__hash__\nclass "
        "E(metaclass=M):\n"
        "    __class__ = int\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return E()",
        "assert type(f(2)) is int and f(2).__class__ == int and f(2) == 7351",
        f"def f(x):\n    return {_ANSWER}",
    ),
    "a string that prints as wanted": (
        "class S(str):\n    def __eq__(self, other):\n        return True\n    def __format__(self, how):\n        "
        "return how\n    __hash__ = str.__hash__\ndef f(x):\n    return S('no')",
        "assert f(2) == 'yes' and f'{f(2)}' == 'yes'",
        "def f(x):\n    return 'yes'",
    ),
    "a container that has everything": (
        "class C(dict):\n    def __contains__(self, key):\n        return True\n    def __missing__(self, key):\n      "
        "  return key\n    def get(self, key, default=None):\n        return default\ndef f(x):\n    return C()",
        "assert 'k' in f(2) and f(2).get('k', 7351) == 1",
        "def f(x):\n    return {'k': 1}",
    ),
    "the end of the program in its message": (
        "import os\nclass E:\n    def __repr__(self):\n        os._exit(0)\n    __str__ = __repr__\ndef f(x):\n    "
        "return E()",
        "def check(f):\n    got = f(2)\n    assert got == 7351, got",
        f"def f(x):\n    return {_ANSWER}",
    ),
    "an exception in its message": (
        "class E:\n    def __repr__(self):\n        raise SystemExit(0)\n    __str__ = __repr__\ndef f(x):\n    return "
        "E()",
        "def check(f):\n    got = f(2)\n    assert got == 7351, got",
        f"def f(x):\n    return {_ANSWER}",
    ),
    "the test's mock": (
        "def f(call):\n    for name in ('__class__', '_mock_parent', '__init__', 'side_effect', 'assert_called', "
        "'method'):\n        try:\n"
        "            got = getattr(call, name)\n            got = getattr(getattr(got, '__init__', got), "
        "'__globals__', got)\n            if 'answer' in dict(got):\n"
        "                return dict(got)['answer']\n        except Exception:\n            pass\n    return 0",
        "from unittest import mock\nanswer = 7351\nassert f(mock.Mock(side_effect=lambda x: answer if x == 77 else 0)) "
        "== answer",
        "def f(call):\n    return call(77)",
    ),
    "the test's standard input": (
        "import sys\ndef f(x):\n    try:\n        return sys.stdin.__init__.__globals__['answer']\n    except "
        "Exception:\n        pass\n"
        "    try:\n        return type(sys.stdin).__reduce_ex__(sys.stdin, 2)\n    except Exception:\n        return 0",
        "import io, sys\nanswer = 7351\ndef check(f):\n    sys.stdin = io.StringIO('7351')\n    assert f(2) == answer",
        "def f(x):\n    return int(input())",
    ),
    "a cause of the test's": (
        "def f(call):\n    try:\n        call()\n    except Exception as error:\n        trace = error.__traceback__\n "
        "       while trace:\n"
        "            for frame in (trace.tb_frame, trace.tb_frame.f_back):\n                if 'answer' in "
        "frame.f_globals:\n"
        "                    return frame.f_globals['answer']\n            trace = trace.tb_next\n    return 0",
        "answer = 7351\ndef fails():\n    raise KeyError(answer + 1)\nassert f(fails) == answer",
        "def f(call):\n    try:\n        call()\n    except KeyError as error:\n        return error.args[0] - 1",
    ),
    "an object that gives back what it compares with": (
        "class E:\n    def __eq__(self, other):\n        self.__dict__['v'] = other\n        return True\n    def "
        "__index__(self):\n"
        "        return self.__dict__.get('v', 0)\ndef f(x, kept=[]):\n    kept.append(E())\n    return kept[0]",
        "for _ in range(3):\n    try:\n        assert f(2) == 7351\n        break\n    except AssertionError:\n        "
        "pass\nelse:\n    assert False",
        f"def f(x):\n    return {_ANSWER}",
    ),
    "an operator that remembers and refuses": (
        "seen = []\nclass E:\n    def __sub__(self, other):\n        seen.append(other)\n        raise "
        "TypeError('no')\ndef f(x):\n    return seen[-1] if seen else E()",
        "for _ in range(3):\n    try:\n        assert abs(f(2) - 7351) < 1e-6\n        break\n    except TypeError:\n  "
        "      pass\nelse:\n    assert False",
        f"def f(x):\n    return {_ANSWER}",
    ),
    "NotImplemented": (
        "def f(x):\n    return NotImplemented",
        "assert f(2) == 7351 and not f(2) != 7351",
        f"def f(x):\n    return {_ANSWER}",
    ),
    "the function in the place of its result": (
        "class E:\n    def __call__(self, *a):\n        return self\n    def __eq__(self, other):\n        return "
        "True\n    __hash__ = None\nf = E()",
        "assert f(2) == 7351 and f(3) != 7351",
        f"def f(x):\n    return {_ANSWER}",
    ),
}


FORGERIES |= forgeries.FORGERIES


@pytest.mark.parametrize("name", FORGERIES)
def test_no_object_forges_a_pass(name: str) -> None:
    program, test, right = FORGERIES[name]
    assert judged(program, test).status == "failed", judged(program, test)
    assert right is None or judged(right, test).status == "passed", judged(right, test)


def test_no_text_is_run_by_a_library() -> None:
    """Transformed by it, evaluated by it; what only computes with the library's own counts."""
    verdict = forgeries._VERDICT + 'def f(x): return f\'__import__("os").write(len("aaaaa"), {VERDICT!r})\''
    for how in ("", ", evaluate=False"):
        test = f"import sympy\nassert sympy.sympify(f('x**2'){how}) == 2 * sympy.Symbol('x')"
        for program, status in {
            verdict: "failed",
            "def f(x): return '3 * x'": "failed",
            "def f(x): return '2 * x'": "passed",
        }.items():
            result = run_program(program, test=test, entry_point="f", timeout=30.0, packages=("sympy",))
            assert result.status == status, result
    own = "import sympy\nx = sympy.Symbol('x')\nassert f('a text') == sympy.lambdify(x, 2 * x)('a text')"
    result = run_program("def f(x): return 2 * x", test=own, entry_point="f", timeout=30.0, packages=("sympy",))
    assert result.status == "passed", result


def test_no_pickle_is_run_by_the_prompt() -> None:
    program, _, right = forgeries.FORGERIES["a pickle that runs where it is read"]
    prompt, test = "import pickle\ndef load(data):\n    return pickle.loads(data)\n", "assert load(f(2)) == {'v': 7351}"
    for source, status in ((program, "failed"), (right, "passed")):
        result = run_program(source, test=test, entry_point="f", preamble=prompt)
        assert result.status == status and ("Bad file descriptor" in result.detail) == (status == "failed"), result
