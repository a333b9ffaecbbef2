"""Honest programs tested in the usual forms: unittest, threads, asyncio, contexts, exceptions, formats.

As in `honest.py`: name: program, test[, "", "prompt": what comes before the function is given].
"""

import sys

FORMS: dict[str, tuple[str, ...]] = {
    "unittest class with setup": (
        """
class Cart:
    def __init__(self): self.items = {}
    def add(self, name, price, n=1):
        if price < 0: raise ValueError('price')
        self.items[name] = (price, n)
    def total(self): return sum(p * n for p, n in self.items.values())
f = Cart
""",
        """
import unittest
class TestCart(unittest.TestCase):
    @classmethod
    def setUpClass(cls): cls.price = 2
    def setUp(self): self.cart = Cart(); self.addCleanup(self.cart.items.clear)
    def test_total(self):
        self.cart.add('a', self.price, 3)
        self.assertEqual(self.cart.total(), 6)
        self.assertDictEqual(self.cart.items, {'a': (2, 3)})
    def test_raises(self):
        self.assertRaises(ValueError, self.cart.add, 'b', -1)
        with self.subTest(x=1):
            self.assertIn('a', {**self.cart.items, 'a': 1})
            self.assertCountEqual([1, 2], [2, 1]); self.assertIsNone(self.cart.add('c', 1)); self.assertGreater(self.cart.total(), 0)
def check(candidate):
    r = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(TestCart).run(r)
    assert r.wasSuccessful() and r.testsRun == 2, r.failures + r.errors
""",
    ),
    "sets, sorting, min, max": (
        """
def f(words): return {w.lower() for w in words}
def pairs(n): return [(i % 3, i) for i in range(n)]
def d(n): return {str(i): i * i for i in range(n)}
""",
        """
import operator, itertools, collections
def check(f):
    assert f(['A', 'b', 'a']) == {'a', 'b'} and f(['x']) | {'y'} == {'x', 'y'} and f(['x']) <= {'x', 'z'} and f([]) == set() and not f([])
    assert sorted(pairs(4), key=lambda p: (-p[0], p[1])) == [(2, 2), (1, 1), (0, 0), (0, 3)] and max(pairs(5)) == (2, 2)
    assert sorted(pairs(3), key=operator.itemgetter(1), reverse=True)[0] == (2, 2)
    assert {k: len(list(g)) for k, g in itertools.groupby(sorted(pairs(6)), key=lambda p: p[0])} == {0: 2, 1: 2, 2: 2}
    assert list(d(3).items()) == [('0', 0), ('1', 1), ('2', 4)] and d(2) | {'z': 1} == {'0': 0, '1': 1, 'z': 1} and collections.Counter(f(['a'])) == {'a': 1}
""",
    ),
    "exceptions: attributes, cause, context": (
        """
class ApiError(Exception):
    def __init__(self, status, *, body=None):
        super().__init__(f'HTTP {status}')
        self.status, self.body = status, body
class NotFound(ApiError):
    retry = False
    def __init__(self): super().__init__(404, body={'why': ['gone']})
def f(x):
    if x == 0: raise NotFound()
    try:
        return 1 / (x - 1)
    except ZeroDivisionError as e:
        raise ApiError(500) from e
def ctx():
    try:
        {}['k']
    except KeyError:
        raise ValueError('while')
def quiet():
    try:
        {}['k']
    except KeyError:
        raise ValueError('q') from None
""",
        """
def check(f):
    try:
        f(0)
        assert False
    except ApiError as e:
        assert e.status == 404 and e.body == {'why': ['gone']} and e.retry is False and type(e) is NotFound and type(e).__name__ == 'NotFound' and repr(e) == "NotFound('HTTP 404')"
    try:
        f(1)
        assert False
    except Exception as e:
        assert isinstance(e.__cause__, ZeroDivisionError) and str(e.__cause__) == 'division by zero' and e.status == 500 and not isinstance(e, NotFound)
    try:
        ctx()
    except ValueError as e:
        assert isinstance(e.__context__, KeyError) and e.__cause__ is None
    try:
        quiet()
    except ValueError as e:
        assert e.__suppress_context__ and e.__cause__ is None
    assert issubclass(NotFound, ApiError) and issubclass(ApiError, Exception) and not issubclass(ApiError, ValueError)
""",
    ),
    "json and join": (
        """
import json
def f(n): return {'n': n, 'items': [i / 2 for i in range(n)], 'none': None, 'deep': {'t': True}}
def enc(o): return json.dumps(o, sort_keys=True, indent=1, default=str)
def words(): return ['a', 'b']
""",
        """
import json, datetime
def check(f):
    assert json.loads(json.dumps(f(3))) == f(3) and json.dumps(f(0), sort_keys=True) == '{"deep": {"t": true}, "items": [], "n": 0, "none": null}'
    assert enc({'d': datetime.date(2024, 1, 2)}) == '{\\n "d": "2024-01-02"\\n}' and '-'.join(words()) == 'a-b' and ''.join(reversed(words())) == 'ba'
""",
    ),
    "Decimal contexts": (
        """
from decimal import Decimal, localcontext, getcontext, InvalidOperation
def f(a, b):
    with localcontext() as c:
        c.prec = 5
        return Decimal(a) / Decimal(b)
def g(x): return Decimal(x)
def bad(): return Decimal('x')
def prec(a, b): return Decimal(a) / Decimal(b)
""",
        """
from decimal import Decimal, localcontext, InvalidOperation, getcontext
def check(f):
    assert f(1, 3) == Decimal('0.33333') and str(f(2, 3)) == '0.66667' and g('1.10') + g('2') == Decimal('3.10') and g('NaN').is_nan() and g('1e3') == 1000
    try:
        bad()
        assert False
    except InvalidOperation:
        pass
    assert round(g('2.675'), 2) == Decimal('2.68') and g('-0') == 0 and hash(g('1')) == hash(1)
""",
    ),
    "signatures": (
        """
import functools, inspect
def f(a, b: int = 2, *args, c, **kw) -> str: return 'x'
async def co(): pass
def gen(): yield
def deco(g):
    @functools.wraps(g)
    def w(*a, **k): return g(*a, **k)
    return w
""",
        """
import inspect, typing, asyncio
def check(f):
    s = inspect.signature(f)
    assert list(s.parameters) == ['a', 'b', 'args', 'c', 'kw'] and s.parameters['b'].default == 2 and s.return_annotation is str
    assert s.parameters['c'].kind is inspect.Parameter.KEYWORD_ONLY and str(s) == '(a, b: int = 2, *args, c, **kw) -> str'
    assert inspect.iscoroutinefunction(co) and asyncio.iscoroutinefunction(co) and inspect.isgeneratorfunction(gen) and not inspect.iscoroutinefunction(f) and inspect.isfunction(f)
    def mine(x, y=1):
        "doc"
        return x
    w = deco(mine)
    assert w.__name__ == 'mine' and w.__doc__ == 'doc' and w(3) == 3 and list(inspect.signature(w).parameters) == ['x', 'y'] and w.__wrapped__ is mine
""",
    ),
    "async context managers and iterators": (
        """
import asyncio, contextlib
class Conn:
    def __init__(self): self.log = []
    async def __aenter__(self): self.log.append('open'); return self
    async def __aexit__(self, t, e, tb): self.log.append('close' if t is None else t.__name__); return t is KeyError
    async def get(self, k): await asyncio.sleep(0); return k * 2
@contextlib.asynccontextmanager
async def managed(x):
    yield x + 1
async def f(n):
    for i in range(n):
        await asyncio.sleep(0)
        yield i
async def boom(): raise ValueError('async')
async def slow(): await asyncio.sleep(5)
""",
        """
import asyncio
def check(f):
    async def main():
        async with Conn() as c:
            assert await c.get(2) == 4
        assert c.log == ['open', 'close']
        async with c:
            raise KeyError
        assert c.log[-1] == 'KeyError'
        async with managed(1) as m:
            assert m == 2
        assert [i async for i in f(3)] == [0, 1, 2]
        try:
            await boom()
            assert False
        except ValueError as e:
            assert str(e) == 'async'
        rs = await asyncio.gather(boom(), c.get(1), return_exceptions=True)
        assert isinstance(rs[0], ValueError) and rs[1] == 2
    asyncio.run(main())
""",
    ),
    "generators that return": (
        """
def f(n):
    total = 0
    while True:
        x = yield total
        if x is None: return total
        total += x
def g():
    r = yield from f(0)
    return r * 2
""",
        """
def check(f):
    gen = f(0)
    assert next(gen) == 0 and gen.send(3) == 3 and gen.send(4) == 7
    try:
        next(gen)
        assert False
    except StopIteration as e:
        assert e.value == 7
    def outer():
        r = yield from g()
        return r + 1
    o = outer(); next(o); o.send(5)
    try:
        o.send(None)
    except StopIteration as e:
        assert e.value == 11
    assert hasattr(gen, 'gi_frame') and gen.gi_frame is None
""",
    ),
    "threads, queues, locks": (
        """
import threading, queue
class Counter:
    def __init__(self): self.n = 0; self.lock = threading.Lock()
    def inc(self):
        with self.lock: self.n += 1
def f(): return Counter()
def produce(q, n):
    for i in range(n): q.put(i)
    q.put(None)
""",
        """
import threading, queue
def check(f):
    c = f()
    ts = [threading.Thread(target=lambda: [c.inc() for _ in range(20)]) for _ in range(4)]
    [t.start() for t in ts]; [t.join() for t in ts]
    assert c.n == 80 and not c.lock.locked()
    with c.lock:
        assert c.lock.locked()
""",
    ),
    "cmp_to_key, attrgetter, reduce, partial": (
        """
class S:
    def __init__(self, n, g): self.n, self.g = n, g
    def __repr__(self): return self.n
def f(xs): return [S(*x) for x in xs]
def cmp(a, b): return (a.g > b.g) - (a.g < b.g)
def add(a, b, c=0): return a + b + c
""",
        """
import functools, operator, itertools, statistics
def check(f):
    xs = f([('a', 3), ('b', 1), ('c', 2)])
    assert str(sorted(xs, key=functools.cmp_to_key(cmp))) == '[b, c, a]' and [x.n for x in sorted(xs, key=operator.attrgetter('g'))] == ['b', 'c', 'a']
    assert functools.reduce(add, [1, 2, 3]) == 6 and functools.partial(add, 1, c=5)(2) == 8 and list(map(add, [1], [2])) == [3] and list(itertools.starmap(add, [(1, 2)])) == [3]
    assert statistics.mean(x.g for x in xs) == 2 and sum(map(operator.attrgetter('g'), xs)) == 6 and max(xs, key=lambda s: s.g).n == 'a' and list(filter(lambda s: s.g > 1, xs))[0].n == 'a'
    assert {s.n: s for s in xs}['b'].g == 1 and xs.index(xs[1]) == 1 and xs[0] in xs
    xs.sort(key=lambda s: s.n, reverse=True)
    assert xs[0].n == 'c'
""",
    ),
    "sys.exit and SystemExit": (
        """
import sys
def f(code):
    print('bye')
    sys.exit(code)
""",
        """
import io, contextlib
def check(f):
    for code in (0, 2, 'message'):
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                f(code)
            assert False
        except SystemExit as e:
            assert e.code == code
        assert out.getvalue() == 'bye\\n'
""",
    ),
    "type hints and generics": (
        """
from typing import Optional, TypedDict, Callable, Iterable, Sequence
class Movie(TypedDict):
    name: str
    year: int
def f(x: Optional[int] = None) -> list[int]: return [] if x is None else [x]
def m() -> Movie: return Movie(name='a', year=1)
""",
        """
import typing
def check(f):
    assert f() == [] and f(1) == [1] and m() == {'name': 'a', 'year': 1} and m()['year'] == 1
    assert typing.get_type_hints(f)['return'] == list[int] and f.__annotations__['return'] == list[int]
    assert isinstance(f(1), Sequence) and isinstance(f(1), Iterable)
""",
    ),
    "context managers and exit stacks": (
        """
import contextlib, time
class Timer:
    def __enter__(self): self.t = 1; return self
    def __exit__(self, *e): self.err = e[0]; return False
@contextlib.contextmanager
def cd(log, x):
    log.append(('in', x))
    try:
        yield x
    finally:
        log.append(('out', x))
class Deco(contextlib.ContextDecorator):
    def __init__(self): self.n = 0
    def __enter__(self): self.n += 1; return self
    def __exit__(self, *e): return False
f = Timer
""",
        """
import contextlib
def check(f):
    with f() as t: pass
    assert t.t == 1 and t.err is None
    try:
        with t: raise IndexError('i')
    except IndexError:
        pass
    assert t.err is IndexError
    log = []
    with contextlib.ExitStack() as st:
        assert [st.enter_context(cd(log, i)) for i in range(2)] == [0, 1]
    assert log == [('in', 0), ('in', 1), ('out', 1), ('out', 0)]
    d = Deco()
    @d
    def g(x): return x
    assert g(1) == 1 and g(2) == 2 and d.n == 2
    with contextlib.suppress(ZeroDivisionError), cd(log, 'z'):
        1 / 0
    assert log[-1] == ('out', 'z')
""",
    ),
    "a test of hypothesis's kind": (
        """
import random
def f(xs): return sorted(xs, reverse=True)
""",
        """
import random
def check(f):
    rng = random.Random(5)
    for _ in range(30):
        xs = [rng.randint(-9, 9) for _ in range(rng.randint(0, 8))]
        ys = f(xs)
        assert ys == sorted(xs)[::-1] and all(a >= b for a, b in zip(ys, ys[1:])) and sorted(ys) == sorted(xs)
    random.seed(3); random.shuffle(xs); f(xs)
""",
    ),
}

if sys.version_info >= (3, 11):
    FORMS |= {
        "groups and notes of exceptions": (
            """
def f():
    e = ValueError('n'); e.add_note('hint'); raise e
def group():
    raise ExceptionGroup('many', [ValueError('a'), KeyError('b')])
""",
            """
def check(f):
    try:
        f()
    except ValueError as e:
        assert e.__notes__ == ['hint']
    try:
        group()
        assert False
    except* ValueError as eg:
        assert len(eg.exceptions) == 1
    except* KeyError as eg:
        assert eg.exceptions[0].args == ('b',)
""",
        ),
    }
