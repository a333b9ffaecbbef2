"""Honest programs whose tests look at values and behaviour that plain data does not carry."""

# name: program, test. Each passes when program and test run in one process; see test_same_in_one_process.
HONEST = {
    "arguments changed in place": (
        """
def f(x):
    x.append(len(x))
    x.sort()
def g(d):
    d['k'] = d.pop('a')
    d['n'] = [1]
def h(s, b):
    s.discard(1)
    b[0] = 65""",
        """
def check(f):
    x = [3, 2]
    assert f(x) is None and x == [2, 2, 3]
    f(x)
    assert x == [2, 2, 3, 3]
    d = {'a': [1]}
    kept = d['a']
    g(d)
    assert d == {'k': [1], 'n': [1]} and d['k'] is kept
    s, b = {1, 2}, bytearray(b'xyz')
    h(s, b)
    assert s == {2} and b == b'Ayz'""",
    ),
    "changed in place, nested": (
        "def f(m):\n    for row in m:\n        row.reverse()\n    m[0], m[1] = m[1], m[0]",
        """
def check(f):
    m = [[1, 2], [3, 4]]
    first = m[0]
    f(m)
    assert m == [[4, 3], [2, 1]] and m[1] is first""",
    ),
    "a deque, an ordered and a default dict": (
        """
import collections
def f(q):
    q.appendleft(0)
    return q
def g(words):
    d = collections.defaultdict(list)
    for w in words:
        d[len(w)].append(w)
    return d
def h(words):
    return collections.Counter(words)""",
        """
import collections
def check(f):
    q = collections.deque([1, 2], maxlen=3)
    assert f(q) is q and q == collections.deque([0, 1, 2]) and q.maxlen == 3
    assert g(['a', 'bb', 'c']) == {1: ['a', 'c'], 2: ['bb']} and g(['a'])[7] == []
    assert h('aab').most_common(1) == [('a', 2)] and h('aab')['z'] == 0""",
    ),
    "identity": (
        "def f(x):\n    return x\ndef copied(x):\n    return list(x)\ndef pair(x):\n    return [x, x]",
        """
def check(f):
    x = [1]
    assert f(x) is x and copied(x) is not x and pair(x)[0] is pair(x)[1] and f(None) is None and f(True) is True
    y = {'x': x}
    assert f(y)['x'] is x""",
    ),
    "what is returned stays the program's": (
        "def f(x, seen=[]):\n    seen.append(x)\n    return seen",
        """
def check(f):
    a = f(1)
    b = f(2)
    assert a is b and a == [1, 2]
    a.append(7)
    assert f(3) == [1, 2, 7, 3]""",
    ),
    "a cycle": (
        "def f():\n    x = [1]\n    x.append(x)\n    return x",
        "def check(f):\n    x = f()\n    assert x[1] is x and x[0] == 1",
    ),
    "callbacks": (
        "def f(g, x):\n    return [g(v) for v in x]\ndef twice(g):\n    return lambda v: g(g(v))",
        """
def check(f):
    assert f(lambda v: v + 1, [1, 2]) == [2, 3] and f(str, [1]) == ['1'] and f(len, ['ab']) == [2]
    seen = []
    f(seen.append, [1, [2]])
    assert seen == [1, [2]]
    calls = 0
    def count(v):
        nonlocal calls
        calls += 1
        return v
    f(count, range(5))
    assert calls == 5 and twice(lambda v: v * 3)(2) == 18""",
    ),
    "callbacks that raise": (
        """
def f(g):
    try:
        return g()
    except KeyError as error:
        return error.args
def retry(g, n):
    for i in range(n):
        try:
            return g()
        except ValueError:
            if i == n - 1:
                raise""",
        """
def check(f):
    def missing():
        raise KeyError('k')
    assert f(missing) == ('k',)
    class Mine(Exception):
        pass
    def mine():
        raise Mine('x')
    try:
        f(mine)
    except Mine as error:
        assert str(error) == 'x'
    else:
        assert False
    tries = []
    def flaky():
        tries.append(1)
        if len(tries) < 3:
            raise ValueError
        return 'ok'
    assert retry(flaky, 5) == 'ok' and len(tries) == 3""",
    ),
    "functions that are returned": (
        "def f(n):\n    def add(x, *, y=0):\n        return n + x + y\n    return add\ndef counter():\n    n = 0\n"
        "    def step():\n        nonlocal n\n        n += 1\n        return n\n    return step",
        """
def check(f):
    assert f(1)(2) == 3 and f(1)(2, y=4) == 7 and callable(f(1)) and f(1).__name__ == 'add'
    step = counter()
    assert [step(), step()] == [1, 2]""",
    ),
    "a decorator": (
        """
import functools
def f(function):
    @functools.wraps(function)
    def wrapped(*args):
        wrapped.calls += 1
        return function(*args)
    wrapped.calls = 0
    return wrapped""",
        """
def check(f):
    @f
    def double(x):
        return 2 * x
    assert double(2) == 4 and double(3) == 6 and double.calls == 2""",
    ),
    "objects of the test's own class": (
        "def f(items):\n    return max(items, key=lambda i: i.size).name\ndef g(items):\n    items[0].name = 'new'\n"
        "    return sorted(items)[0].name",
        """
class Item:
    def __init__(self, name, size):
        self.name, self.size = name, size
    def __lt__(self, other):
        return self.size < other.size
def check(f):
    items = [Item('a', 2), Item('b', 1)]
    assert f(items) == 'a' and g(items) == 'b' and items[0].name == 'new'""",
    ),
    "printed": (
        "def f(x):\n    print('got', x)\n    print('more', end='')",
        """
import contextlib, io
def check(f):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        f(3)
    assert out.getvalue() == 'got 3\\nmore'
    with contextlib.redirect_stdout(io.StringIO()) as again:
        f('x')
    assert again.getvalue().splitlines()[0] == 'got x'""",
    ),
    "exceptions of subclasses": (
        """
class TooBig(ValueError):
    def __init__(self, size):
        super().__init__(f'too big: {size}')
        self.size = size
class Worse(TooBig):
    pass
def f(x):
    if x > 100:
        raise Worse(x)
    if x > 10:
        raise TooBig(x)
    return x""",
        """
def check(f):
    for kind in (ValueError, TooBig, Exception):
        try:
            f(11)
        except kind as error:
            assert str(error) == 'too big: 11' and error.size == 11 and isinstance(error, ValueError)
        else:
            assert False
    try:
        f(101)
    except TooBig as error:
        assert type(error).__name__ == 'Worse' and not isinstance(error, KeyError)
    assert f(1) == 1""",
    ),
    "builtin exceptions": (
        "def f(k):\n    return {'a': 1}[k]\ndef g(x):\n    return open(x)\ndef h(b):\n    return b.decode()\ndef "
        "leave():\n    raise SystemExit(3)",
        """
def check(f):
    try:
        f('b')
    except LookupError as error:
        assert error.args == ('b',)
    try:
        g('absent')
    except FileNotFoundError as error:
        assert error.errno == 2
    try:
        h(b'\\xff')
    except UnicodeDecodeError as error:
        assert isinstance(error, ValueError)
    try:
        leave()
    except SystemExit as error:
        assert error.code == 3""",
    ),
    "generators": (
        """
def f(n):
    for i in range(n):
        got = yield i
        if got:
            yield got * 10
def endless():
    n = 0
    while True:
        yield n
        n += 1
def closing(log):
    try:
        yield 1
    finally:
        log.append('closed')
def catching():
    while True:
        try:
            yield 'waiting'
        except ValueError as error:
            yield str(error)
def delegate():
    return (yield from iter([1, 2]))""",
        """
import itertools, types
def check(f):
    assert list(f(3)) == [0, 1, 2] and isinstance(f(1), types.GeneratorType) and next(endless()) == 0
    assert list(itertools.islice(endless(), 4)) == [0, 1, 2, 3]
    g = f(3)
    assert next(g) == 0 and g.send(5) == 50 and next(g) == 1
    log = []
    c = closing(log)
    next(c)
    c.close()
    assert log == ['closed']
    t = catching()
    next(t)
    assert t.throw(ValueError('x')) == 'x' and list(delegate()) == [1, 2]""",
    ),
    "iterators": (
        "def f(x):\n    return map(str, x)\ndef pairs(a, b):\n    return zip(a, b)\ndef keys(d):\n    return "
        "d.keys()\nclass Down:\n"
        "    def __init__(self, n):\n        self.n = n\n    def __iter__(self):\n        return self\n    def "
        "__next__(self):\n"
        "        if not self.n:\n            raise StopIteration\n        self.n -= 1\n        return self.n\ndef "
        "down(n):\n    return Down(n)",
        """
def check(f):
    assert list(f([1, 2])) == ['1', '2'] and dict(pairs('ab', [1, 2])) == {'a': 1, 'b': 2} and keys({1: 2}) == {1}
    assert list(down(3)) == [2, 1, 0] and next(iter(f([5]))) == '5'
    def letters():
        yield 'a'
        yield 'b'
    assert list(f(letters())) == ['a', 'b'] and list(f(iter([1]))) == ['1']""",
    ),
    "dates": (
        "import datetime\ndef f(y, m, d):\n    return datetime.date(y, m, d)\ndef later(t, h):\n    return t + "
        "datetime.timedelta(hours=h)",
        """
import datetime
def check(f):
    assert f(2024, 2, 29) == datetime.date(2024, 2, 29) and f(2024, 1, 1).isoformat() == '2024-01-01'
    t = datetime.datetime(2024, 1, 1, 23, tzinfo=datetime.timezone.utc)
    assert later(t, 2) == datetime.datetime(2024, 1, 2, 1, tzinfo=datetime.timezone.utc) and later(t, 1) - t == datetime.timedelta(hours=1)""",
    ),
    "a stateful class": (
        """
class Account:
    rate = 2
    def __init__(self, start=0):
        self.balance = start
    def deposit(self, x):
        if x < 0:
            raise ValueError('negative')
        self.balance += x
        return self
    @property
    def doubled(self):
        return self.balance * self.rate
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.balance = -1
    def __len__(self):
        return self.balance
    def __contains__(self, x):
        return x == self.balance
    def __call__(self, x):
        return x + self.balance
f = Account""",
        """
def check(f):
    a = f(5)
    assert a.deposit(3).balance == 8 and a.doubled == 16 and len(a) == 8 and a(1) == 9 and Account.rate == 2
    try:
        a.deposit(-1)
    except ValueError as error:
        assert str(error) == 'negative'
    with a as b:
        assert b is a
    assert a.balance == -1 and hasattr(a, 'balance') and not hasattr(a, 'other') and isinstance(a, Account)""",
    ),
    "a coroutine": (
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 1",
        "import asyncio\ndef check(f):\n    assert asyncio.run(f(1)) == 2",
    ),
    "shutil": (
        """
import os, shutil
def f(text):
    os.mkdir('d')
    with open('a', 'w') as file:
        file.write(text)
    shutil.copy('a', 'b')
    shutil.copy2('a', 'd/c')
    shutil.copytree('d', 'e')
    shutil.move('b', 'e/b')
    return sorted(os.listdir('e')), open('e/c').read()""",
        "def check(f):\n    assert f('x') == (['b', 'c'], 'x')",
    ),
    "tempfile": (
        """
import os, tempfile
def f(text):
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile('w+') as file:
        file.write(text)
        file.seek(0)
        with open(os.path.join(folder, 'a'), 'w') as other:
            other.write('b')
        return file.read(), os.listdir(folder), tempfile.mkstemp()[0] > 2""",
        "def check(f):\n    assert f('x') == ('x', ['a'], True)",
    ),
    "thread pools": (
        """
import concurrent.futures, multiprocessing.pool, threading
def f(g, x):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(g, x))
def h(x):
    with multiprocessing.pool.ThreadPool(4) as pool:
        return pool.map(abs, x)
def own(x):
    return f(lambda v: v * 2, x)""",
        """
def check(f):
    assert own([1, 2, 3]) == [2, 4, 6] and h([-1, 2]) == [1, 2] and f(lambda v: v + 1, range(20)) == list(range(1, 21))""",
    ),
    "asyncio": (
        "import asyncio\ndef f(n):\n    async def one(i):\n        await asyncio.sleep(0.001)\n        return i\n"
        "    async def all():\n        return await asyncio.gather(*map(one, range(n)))\n    return asyncio.run(all())",
        "def check(f):\n    assert f(5) == [0, 1, 2, 3, 4]",
    ),
    "surrogates": (
        "def f(x):\n    print('\\ud800', x)\n    return '\\udfff' + x",
        "def check(f):\n    assert f('a') == '\\udfffa'",
    ),
    "bools and numbers": (
        "def f(x):\n    return x > 1",
        "def check(f):\n    assert f(2) == 1 and f(0) == 0 and f(2) is True and f(2) == 1.0",
    ),
    "numbers at the edges": (
        "def f(x):\n    return x * x\ndef nan():\n    return float('nan'), float('-inf'), -0.0, 1e308, 5e-324",
        """
import math
def check(f):
    assert f(10 ** 3000) == 10 ** 6000 and f(-2 ** 63) == 2 ** 126 and f(1j) == -1 and f(0.1) == 0.1 * 0.1
    a, b, c, d, e = nan()
    assert math.isnan(a) and b == float('-inf') and math.copysign(1, c) == -1 and d == 1e308 and e == 5e-324""",
    ),
    "other values": (
        "def f(x):\n    return x\nimport uuid, pathlib\ndef more():\n    return uuid.UUID(int=5), "
        "pathlib.PurePosixPath('a/b'), range(3), ..., int, slice(1, 2)",
        """
import pathlib, uuid
def check(f):
    for x in (range(2, 8, 3), frozenset({1}), {(1, 2): {3}}, b'a', bytearray(b'b'), 'é\\u2028', (), [[[]]], int, ValueError, Ellipsis):
        assert f(x) == x and type(f(x)) is type(x)
    assert more() == (uuid.UUID(int=5), pathlib.PurePosixPath('a/b'), range(3), ..., int, slice(1, 2))""",
    ),
    "keyword arguments and defaults": (
        "def f(a, b=2, *c, d=4, **e):\n    return a, b, c, d, e",
        """
def check(f):
    assert f(1) == (1, 2, (), 4, {}) and f(1, 2, 3, d=5, z=[6]) == (1, 2, (3,), 5, {'z': [6]}) and f(*[1], **{'b': 0})[1] == 0""",
    ),
    "names of the program": (
        "LIMIT = 7\nTABLE = {'a': [1]}\ndef helper(x):\n    return x + LIMIT\ndef f(x):\n    return helper(x)",
        "def check(f):\n    assert f(1) == helper(1) == 8 and LIMIT == 7 and TABLE['a'] == [1]",
    ),
    "copies": (
        "class T:\n    def __init__(self, x):\n        self.x = x\ndef f(x):\n    return T(x)",
        """
import copy
def check(f):
    t = f([1])
    u, v = copy.copy(t), copy.deepcopy(t)
    v.x.append(2)
    assert u.x == [1] and v.x == [1, 2] and t.x == [1]""",
    ),
}
