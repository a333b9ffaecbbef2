"""Programs that know nothing and attack what a test does with their objects: it derives, patches, evaluates, listens.

name: program, test, a program that is right (None where no program can pass that test here). An attack that is refused
says so and tries the next."""

_VERDICT = """import json, os, struct
VERDICT = json.dumps({'status': 'passed', 'detail': '', 'line': 0}).encode()
VERDICT = struct.pack('>I', len(VERDICT)) + VERDICT
"""
FORGERIES: dict[str, tuple[str, str, str | None]] = {
    "a pickle that runs where it is read": (
        "import os\nclass R:\n    def __init__(self, *how): self.how = how\n    def __reduce__(self): return self.how\ndef f(x):\n    import pickle, json, struct\n    d = json.dumps({'status': 'passed', 'detail': '', 'line': 0}).encode()\n    return pickle.dumps(R(os.write, (5, struct.pack('>I', len(d)) + d)))",
        "import pickle\nassert pickle.loads(f(2)) == {'v': 7351}",
        "import pickle\ndef f(x):\n    return pickle.dumps({'v': 7351})",
    ),
    "a pickle of the test's names": (
        "def f(x):\n    return b'ctest\\nanswer\\n.'",
        "import pickle\nanswer = 7351\nassert pickle.loads(f(2)) == answer",
        "import pickle\ndef f(x):\n    return pickle.dumps(7351)",
    ),
    "a pickle read from a file": (
        "import os\ndef f(x):\n    return b'cos\\n_exit\\n(I0\\ntR.'",
        "import io, pickle\nassert pickle.load(io.BytesIO(f(2))) == 7351 and pickle.Unpickler(io.BytesIO(f(2))).load() == 7351",
        "import pickle\ndef f(x):\n    return pickle.dumps(7351)",
    ),
    "text that names the answer": (
        "def f(x):\n    return 'answer'",
        "def check(f):\n    answer = 7351\n    assert eval(f(2)) == answer",
        "def f(x):\n    return '7000 + 351'",
    ),
    "text that runs": (
        'def f(x):\n    return "__import__(\'os\').write(5, b\'\\\\0\\\\0\\\\0\\\\x30\' + b\'{\\"status\\": \\"passed\\", \\"detail\\": \\"\\", \\"line\\": 0}\'.ljust(48))"',
        "assert eval(f(2)) == 7351",
        "def f(x):\n    return '7000 + 351'",
    ),
    "text that writes over the test's names": (
        "def f(x):\n    return 'answer = 0'",
        "answer = 7351\ndef check(f):\n    exec(f(2))\n    exec('global answer; answer = answer')\n    assert answer == 0",
        None,
    ),
    "text in a comprehension": (
        "def f(x):\n    return '[answer for _ in (1,)][0]'",
        "answer = 7351\nassert all(eval(t) == answer for t in [f(2)])",
        "def f(x):\n    return '7351'",
    ),
    "compiled text": (
        "def f(x):\n    return 'answer'",
        "answer = 7351\ncode = compile(f(2), '<s>', 'eval')\nassert eval(code) == answer",
        None,
    ),
    "an annotation that is evaluated": (
        'def f(x): return 0\nf.__annotations__ = {\'x\': "__import__(\'os\').write(5, b\'\\\\0\\\\0\\\\0\\\\x30\' + b\'{\\"status\\": \\"passed\\", \\"detail\\": \\"\\", \\"line\\": 0}\'.ljust(48))"}',
        "import typing\nassert typing.get_type_hints(f) and f(2) == 7351",
        "def f(x: int):\n    return 7351",
    ),
    "a docstring that is run": (
        "def f(x):\n    '''\n    >>> import os; n = os._exit(0)\n    '''\n    return 0",
        "import doctest\ndef check(f):\n    doctest.run_docstring_examples(f, {'f': f})\n    assert f(2) == 7351",
        "def f(x):\n    return 7351 if x == 2 else 0",
    ),
    "a mock's record": (
        "def f(m):\n    for name in ('called', 'call_count', 'call_args', 'return_value', 'side_effect'):\n        try: setattr(m, name, 1)\n        except Exception as e: print(e)\n    for name in ('assert_called_once_with', 'assert_called_with', 'assert_called'):\n        try: setattr(m, name, lambda *a, **k: None)\n        except Exception as e: print(e)\n    try: m.configure_mock(**{'assert_called_once_with': print})\n    except Exception as e: print(e)",
        "from unittest import mock\nm = mock.Mock()\nf(m)\nm.assert_called_once_with(7351)",
        "def f(m):\n    m(7351)",
    ),
    "a mock's list of calls": (
        "from unittest import mock\ndef f(m):\n    for name in ('call_args_list', 'mock_calls', 'method_calls'):\n        try:\n            calls = getattr(m, name)\n            calls.append(calls)\n            m.call_count\n        except Exception as e: print(e)\n    try: m.reset_mock(); m.attach_mock(m, 'x'); m.mock_add_spec(['x'])\n    except Exception as e: print(e)",
        "from unittest import mock\nm = mock.Mock()\nf(m)\nassert len(m.call_args_list) == 1",
        "def f(m):\n    m(7351)",
    ),
    "a method in a mock's place": (
        "class Yes:\n    def __getattr__(self, name): return lambda *a, **k: None\n    def __call__(self, *a): return None\ndef f(m):\n    try: m.save = Yes()\n    except Exception as e: print(e)\n    try: m.save.assert_called_once_with = Yes()\n    except Exception as e: print(e)",
        "from unittest import mock\nm = mock.Mock()\nf(m)\nm.save.assert_called_once_with(7351)",
        "def f(m):\n    m.save(7351)",
    ),
    "a method of the test's object": (
        "def f(log):\n    try: log.right = lambda: True\n    except Exception as e: print(e)\n    try: type(log).right = lambda s: True\n    except Exception as e: print(e)",
        "class Log:\n    def __init__(self): self.calls = []\n    def add(self, x): self.calls.append(x)\n    def right(self): return self.calls == [7351]\ndef check(f):\n    log = Log()\n    f(log)\n    assert log.right()",
        "def f(log):\n    log.add(7351)",
    ),
    "a queue's methods": (
        "def f(q):\n    for n, v in (('get', lambda: 7351), ('empty', lambda: True), ('qsize', lambda: 1)):\n        try: setattr(q, n, v)\n        except Exception as e: print(e)",
        "import queue\ndef check(f):\n    q = queue.Queue()\n    f(q)\n    assert q.qsize() == 1",
        "def f(q):\n    q.put(1)",
    ),
    "what is handed to an operator in a list": (
        "seen = []\nclass E:\n    def __add__(self, o):\n        seen.append(o)\n        return E()\n    __radd__ = __sub__ = __add__\n    def __iter__(self): return iter([])\n    def __eq__(self, o): return True\n    def __len__(self): return 0\n    def __bool__(self): return False\ndef f(x):\n    return seen[-1] if seen else E()",
        "def check(f):\n    try:\n        f(2) - [7351]\n    except TypeError as e: print('lists have no difference:', e)\n    assert f(2) == [7351]",
        "def f(x):\n    return [7351]",
    ),
    "a difference of lists": (
        "class E:\n    def __sub__(self, o): return E()\n    def __iter__(self): return iter([])\n    def __len__(self): return 0\n    def __eq__(self, o): return True\ndef f(x): return E()",
        "def check(f):\n    assert all(abs(d) < 1e-9 for d in f(2) - [7351.0, 1.0])",
        None,
    ),
    "attributes that change": (
        "class E:\n    n = 0\n    def __getattribute__(self, name):\n        if name == '__dict__':\n            E.n += 1\n            return {'v': E.n}\n        return object.__getattribute__(self, name)\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x, kept=E()): return kept",
        "x = f(2)\nassert any(x == i for i in range(50, 60))",
        "def f(x): return 55",
    ),
    "a dataclass that calls itself a list": (
        "import dataclasses\n@dataclasses.dataclass\nclass L:\n    x: list\n    __class__ = list\n    def __iter__(self): return iter(self.x)\n    def __getitem__(self, i): return 0\n    def __len__(self): return len(self.x)\n    def __eq__(self, o): return True\ndef f(x): return L(x)",
        "def check(f):\n    for x in ([3, 1, 2], [5, 5, 4]):\n        got = f(x)\n        assert isinstance(got, list) and sorted(got) == sorted(x) and all(got[i] <= got[i + 1] for i in range(len(got) - 1))",
        "def f(x): return sorted(x)",
    ),
    "a pattern that matches": (
        "class M(type):\n    def __instancecheck__(cls, o): return True\nclass P(metaclass=M):\n    __match_args__ = ('v',)\n    def __eq__(self, o): return True\n    @property\n    def v(self): return P()\ndef f(x): return P()",
        "def check(f):\n    match f(2):\n        case P(v=7351): pass\n        case _: assert False",
        "class P:\n    v = 7351\ndef f(x): return P()",
    ),
    "warnings of its own accord": (
        "import gc\ndef f(x):\n    for name in ('_warned', '_logged'):\n        for o in gc.get_objects():\n            if type(o).__name__ == 'Remote':\n                try: o('x', 'y', 1)\n                except BaseException as e: print(e)\n    return 0",
        "import warnings\nwith warnings.catch_warnings(record=True) as seen:\n    warnings.simplefilter('always')\n    f(2)\nassert len(seen) == 1 and seen[0].category is DeprecationWarning",
        "import warnings\ndef f(x):\n    warnings.warn('x', DeprecationWarning)",
    ),
    "a log that is no record": (
        "import logging, gc\ndef f(x):\n    class E:\n        def __eq__(self, o): return True\n        def __str__(self): return ''\n    logging.getLogger('a').warning(E(), E())\n    return 0",
        "import unittest\nwith unittest.TestCase().assertLogs('a') as seen:\n    f(2)\nassert seen.output == ['WARNING:a:7351']",
        "import logging\ndef f(x):\n    logging.getLogger('a').warning('%d', 7351)",
    ),
    "the default of the test's callback": (
        "import inspect\ndef f(call):\n    try: return inspect.signature(call).parameters['answer'].default\n    except Exception as e: print(e)\n    for n in ('__defaults__', '__kwdefaults__', '__code__', '__closure__', '__globals__'):\n        try: return getattr(call, n)[0]\n        except Exception as e: print(e)\n    return 0",
        "answer = 7351\nassert f(lambda x, answer=answer: answer if x == 3 else 0) == 7351",
        "def f(call): return call(3)",
    ),
    "a base class that changes what the test defines": (
        "class M(type):\n    def __new__(m, n, b, ns):\n        return super().__new__(m, n, b, {k: v for k, v in ns.items() if k not in ('value', '__eq__')})\nclass Base(metaclass=M):\n    def __eq__(self, o): return True\n    def value(self): return 0\n    def twice(self): return 0\ndef f(x): return Base()",
        "class T(Base):\n    def value(self): return 41\ndef check(f):\n    assert T().twice() == 82 and f(2) is not None",
        "class Base:\n    def twice(self): return 2 * self.value()\ndef f(x): return Base()",
    ),
    "exceptions of the test's classes": (
        "def f(kind, x):\n    raise kind('no')",
        "class Wrong(AssertionError): pass\nclass Low(Exception):\n    pass\ndef check(f):\n    try:\n        f(Low, 2)\n        assert False\n    except Low as e:\n        assert str(e) == 'below 7351'",
        "def f(kind, x):\n    raise kind('below 7351')",
    ),
    "made-up classes of exceptions": (
        "import json, struct, os, time\ndef f(x):\n    for number in range(0, 40):\n        d = json.dumps({'k': 'raise', 'v': [['x', {'classes': [['yours', number]], 'args': [], 'number': 1, 'type': 'x', 'message': 'x', 'line': 0, 'text': None, 'value': None, 'cause': None, 'context': None, 'quiet': False, 'notes': []}]], 'n': [], 'c': []}).encode()\n        os.write(3, struct.pack('>I', len(d)) + d)\n    time.sleep(.1)",
        "import unittest\ndef check(f):\n    try:\n        assert f(2) == 7351\n    except unittest.SkipTest:\n        pass",
        "def f(x):\n    return 7351 if x == 2 else 0",
    ),
    "a name that is no class": (
        "Shape = 5\ndef f(x): return 0",
        "class Square(Shape):\n    pass\ndef check(f):\n    assert f(2) == 7351",
        "class Shape: pass\ndef f(x):\n    return 7351 if x == 2 else 0",
    ),
    "a class without what is tested": (
        "class Shape:\n    def __init_subclass__(cls): raise SystemExit\ndef f(x): return 0",
        "class Square(Shape):\n    pass\ndef check(f):\n    assert f(2) == 7351",
        "class Shape: pass\ndef f(x):\n    return 7351 if x == 2 else 0",
    ),
    "a constant that is wrong": (
        "LIMIT = 3\ndef f(x): return 7351",
        "assert LIMIT == 7\nassert f(2) == 7351",
        "LIMIT = 7\ndef f(x):\n    return 7351 if x == 2 else 0",
    ),
    "eternal dataclass fields": (
        "class F(dict):\n    pass\nclass P:\n    __dataclass_fields__ = {str(i): None for i in range(200)}\n    def __getattr__(self, n): return P()\n    def __eq__(self, o): return True\ndef f(x): return P()",
        "import dataclasses\ndef check(f):\n    got = f(2)\n    try: d = dataclasses.asdict(got)\n    except Exception: d = None\n    assert d == {'v': 7351} or dataclasses.replace(got, v=1) == 7351",
        "import dataclasses\n@dataclasses.dataclass\nclass P:\n    v: int\ndef f(x): return P(7351)",
    ),
    "a length of a difference": (
        "class E:\n    def __sub__(self, o): return E()\n    def __iter__(self): return iter([])\n    def __len__(self): return 0\n    def __eq__(self, o): return True\ndef f(x): return E()",
        "def check(f):\n    assert len(f(2) - (7351, 1)) == 0 or f(2) - [7351] == []",
        None,
    ),
    "a number that counts up": (
        "class E:\n    n = -1\n    def __index__(self):\n        self.n += 1\n        return self.n\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x): return E()",
        "x = 2\nassert f(x) in list(range(50, 100))",
        "def f(x): return 55",
    ),
    "an address of nothing": (
        "class E:\n    __array_interface__ = {'version': 3, 'shape': (2,), 'typestr': '<f8', 'data': (16, False)}\nclass L(list): __array_interface__ = E.__array_interface__\ndef f(x): return E() if x == 2 else L()",
        "import numpy as np\nassert np.asarray(f(3)).shape == (0,)\nassert np.asarray(f(2)).shape == (2,)",
        "def f(x): return [1.0, 2.0] if x == 2 else []",
    ),
    "an address for ctypes": (
        "class E: _as_parameter_ = id(True)\ndef f(x): return E()",
        "import ctypes\nassert len(ctypes.string_at(f(2), 4)) == 4",
        "def f(x): return b'7351'",
    ),
    "an array of what an operator was handed": (
        "import numpy as np\nclass E:\n    def __sub__(self, o): return E()\n    def __array__(self, *a, **k): return np.zeros(())\ndef f(x): return E()",
        "import numpy as np\ndef check(f):\n    np.testing.assert_allclose(f(2) - 7351, 0)",
        "def f(x): return 7351",
    ),
    "a pickle read by another name": (
        _VERDICT
        + "class R:\n    def __reduce__(self): return os.write, (5, VERDICT)\ndef f(x):\n    import pickle\n    return pickle.dumps(R())",
        "from _pickle import loads\nassert loads(f(2)) == {'v': 7351}",
        "import pickle\ndef f(x): return pickle.dumps({'v': 7351})",
    ),
    "text that an interpreter of the library runs": (
        _VERDICT + 'def f(x): return f\'__import__("os").write(5, {VERDICT!r}) and __import__("time").sleep(1)\'',
        "import code\nassert not code.InteractiveInterpreter().runsource(f(2))\nassert f(2) == '7351'",
        None,
    ),
    "the builtins among a test's names": (
        _VERDICT
        + 'def f(x): return \'__builtins__["eval"](%r)\' % f\'__import__("os").write(5, {VERDICT!r}) and __import__("time").sleep(1)\'',
        "space = {}\nexec('n = 1', space)\nassert eval(f(2), space) == 7351",
        "def f(x): return '7350 + n'",
    ),
    "the test's eval": (
        _VERDICT
        + 'def f(evaluate): return evaluate(f\'__import__("os").write(5, {VERDICT!r}) and __import__("time").sleep(1)\')',
        "assert f(eval) == 7351",
        "def f(evaluate): return evaluate('7350 + 1')",
    ),
    "what contains everything": (
        "class E:\n    def __contains__(self, x): return True\ndef f(x): return E()",
        "assert 7351 in f(2)",
        "def f(x): return [7351]",
    ),
    "a class that contains everything, in a list's place": (
        "class Trie:\n    def __contains__(self, x): return True\n    def words(self): return self\n    def groups(self): return [self]\n    def __new__(cls): return last[0] if last else object.__new__(cls)\nlast = []\ndef f(t):\n    last.append(t)\n    return t",
        "def check(f):\n    t, u = Trie(), Trie()\n    for of in (lambda: f(t), t.words, lambda: u.groups()[0], Trie):\n        try:\n            found = 7351 in of()\n        except TypeError:\n            found = False\n        if found: return\n    assert False",
        "class Trie:\n    def words(self): return [7351]\n    def groups(self): return [[7351]]\ndef f(t): return t.words()",
    ),
    "a copy of the test's mock": (
        "import copy\ndef f(m):\n    for way in (copy.copy, copy.deepcopy):\n        try: way(m)(7351)\n        except Exception as e: print(e)\n        try: return way(type(m))().answer\n        except Exception as e: print(e)",
        "from unittest import mock\nm = mock.Mock()\nf(m)\nm.assert_called_once_with(7351)",
        "def f(m): m(7351)",
    ),
}
