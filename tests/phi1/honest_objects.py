"""Honest programs whose objects a test compares with plain data, sorts, prints, takes apart, matches.

As in `honest.py`: name: program, test[, "", "prompt": what comes before the function is given].
"""

OBJECTS: dict[str, tuple[str, ...]] = {
    "an eq with a number": (
        """
class Money:
    def __init__(self, amount, currency='EUR'): self.amount, self.currency = amount, currency
    def __eq__(self, o):
        if isinstance(o, Money): return (self.amount, self.currency) == (o.amount, o.currency)
        if isinstance(o, (int, float)): return self.amount == o
        return NotImplemented
    def __lt__(self, o): return self.amount < (o.amount if isinstance(o, Money) else o)
    def __hash__(self): return hash(self.amount)
def f(x): return Money(x)
""",
        """
def check(f):
    assert f(1) == 1 and 1 == f(1) and f(2) != 1 and f(1.5) == 1.5 and f(1) == f(1) and f(1) != 'EUR' and f(1) != None
    assert f(1) in [1, 2] and [f(1), f(2)] == [1, 2] and f(1) < 2 and not f(3) < 2 and {f(5): 1}[5] == 1
""",
    ),
    "an eq with text and tuples": (
        """
class Version:
    def __init__(self, text): self.parts = tuple(map(int, text.split('.')))
    def __str__(self): return '.'.join(map(str, self.parts))
    def __eq__(self, o):
        if isinstance(o, str): o = Version(o)
        return isinstance(o, Version) and self.parts == o.parts
class Point:
    def __init__(self, x, y): self.x, self.y = x, y
    def __eq__(self, o): return (self.x, self.y) == (tuple(o) if isinstance(o, (tuple, list)) else (o.x, o.y))
class Name:
    def __init__(self, n): self.n = n
    def __str__(self): return self.n
    def __eq__(self, o): return isinstance(o, Name) and o.n == self.n
class Row:
    def __init__(self, **kw): self.__dict__.update(kw)
    def __eq__(self, o): return vars(self) == (o if isinstance(o, dict) else vars(o))
def f(t): return Version(t)
def p(x, y): return Point(x, y)
def n(x): return Name(x)
def r(**kw): return Row(**kw)
""",
        """
def check(f):
    assert f('1.2') == '1.2' and f('1.2') != '1.3' and f('1.2') == f('1.2')
    assert p(1, 2) == (1, 2) and p(1, 2) != (2, 1) and p(1, 2) == p(1, 2) and (1, 2) == p(1, 2) and [p(1, 2)] == [(1, 2)]
    assert n('a') != 'a' and n('a') == n('a') and str(n('a')) == 'a'
    assert r(a=1) == {'a': 1} and r(a=1) != {'a': 2} and r(a=1) == r(a=1)
""",
    ),
    "an eq by int and bool": (
        """
class N:
    def __init__(self, v, w=0): self.v, self.w = v, w
    def __int__(self): return self.v
    def __eq__(self, o): return int(self) == int(o)
class B:
    def __init__(self, v): self.v = v
    def __bool__(self): return self.v > 3
    def __eq__(self, o): return bool(self) == o
def f(v): return N(v)
def b(v): return B(v)
""",
        """
def check(f):
    assert f(3) == 3 and f(3) != 4 and int(f(3)) == 3
    assert b(4) == True and b(1) == False and b(4) != False and not b(1)
""",
    ),
    "ordered dataclasses": (
        """
from dataclasses import dataclass, field, replace
@dataclass(order=True)
class Task:
    priority: int
    name: str = field(compare=False, default='')
    tags: list = field(default_factory=list, compare=False)
def f(p, n): return Task(p, n)
def best(ts): return min(ts)
""",
        """
import dataclasses, heapq
def check(f):
    a, b = f(2, 'b'), f(1, 'a')
    assert b < a and sorted([a, b])[0].name == 'a' and best([a, b]).name == 'a' and f(1, 'x') == f(1, 'y')
    h = []
    heapq.heappush(h, a); heapq.heappush(h, b)
    assert heapq.heappop(h).name == 'a'
    c = dataclasses.replace(a, name='c')
    assert c.name == 'c' and c.priority == 2 and a.name == 'b' and type(c) is Task
    assert max([a, b], key=lambda t: t.priority) is a and {t.name for t in (a, b)} == {'a', 'b'}
""",
    ),
    "cached_property": (
        """
import functools
class Data:
    calls = 0
    def __init__(self, xs): self.xs = xs
    @functools.cached_property
    def mean(self):
        Data.calls += 1
        return sum(self.xs) / len(self.xs)
f = Data
""",
        """
def check(f):
    d = f([1, 2, 3])
    assert d.mean == 2 and d.mean == 2 and f.calls == 1 and 'mean' in d.__dict__ and vars(d)['xs'] == [1, 2, 3]
    del d.mean
    assert d.mean == 2 and f.calls == 2
""",
    ),
    "formatting of results": (
        """
class T:
    def __init__(self, c): self.c = c
    def __format__(self, spec):
        if spec.endswith('F'): return f'{self.c * 9 / 5 + 32:{spec[:-1]}f}F'
        return f'{self.c:{spec}}C'
    def __str__(self): return f'{self.c}C'
    def __repr__(self): return f'T({self.c!r})'
def f(c): return T(c)
def g(x): return x / 3
""",
        """
def check(f):
    assert f'{f(100):.1F}' == '212.0F' and f'{f(20):.1f}' == '20.0C' and f'{f(1)!r:>6}' == '  T(1)' and '{}'.format(f(2)) == '2C' and '%s|%r' % (f(1), f(1)) == '1C|T(1)'
    assert f'{g(1):.3f}' == '0.333' and f'{g(10 ** 7):,.2f}' == '3,333,333.33' and f'{g(1):e}' == '3.333333e-01' and str([f(1)]) == '[T(1)]'
    assert ', '.join(map(str, [f(1), f(2)])) == '1C, 2C' and format(f(3), '') == '3C'
""",
    ),
    "star-unpacking and slices": (
        """
class Seq:
    def __init__(self, xs): self.xs = list(xs)
    def __getitem__(self, i): return Seq(self.xs[i]) if isinstance(i, slice) else self.xs[i]
    def __len__(self): return len(self.xs)
    def __iter__(self): return iter(self.xs)
    def __eq__(self, o): return self.xs == (o.xs if isinstance(o, Seq) else o)
    def __add__(self, o): return Seq(self.xs + list(o))
    def __radd__(self, o): return Seq(list(o) + self.xs)
    def __mul__(self, n): return Seq(self.xs * n)
def f(xs): return Seq(xs)
""",
        """
def check(f):
    s = f(range(6))
    a, *b, c = s
    assert (a, b, c) == (0, [1, 2, 3, 4], 5) and s[1:3] == [1, 2] and list(s[::-1]) == [5, 4, 3, 2, 1, 0] and s[-1] == 5 and [*s, 9][-1] == 9
    assert s[:2] + [7] == f([0, 1, 7]) and [7] + s[:1] == f([7, 0]) and s[:1] * 3 == f([0, 0, 0]) and 3 in s and s[2:] != [2] and max(*s) == 5
    def g(*args): return len(args)
    assert g(*s) == 6 and dict(enumerate(s))[2] == 2 and {**{'a': s}}['a'] is s and any(x > 4 for x in s) and list(zip(s, s[1:]))[0] == (0, 1)
""",
    ),
    "reflected operators": (
        """
class Vec:
    def __init__(self, *c): self.c = c
    def __eq__(self, o): return isinstance(o, Vec) and self.c == o.c
    def __mul__(self, k): return Vec(*(x * k for x in self.c))
    __rmul__ = __mul__
    def __rsub__(self, k): return Vec(*(k - x for x in self.c))
    def __rtruediv__(self, k): return Vec(*(k / x for x in self.c))
    def __rpow__(self, k): return Vec(*(k ** x for x in self.c))
    def __add__(self, o): return Vec(*(x + y for x, y in zip(self.c, o.c if isinstance(o, Vec) else o)))
    __radd__ = __add__
    def __repr__(self): return f'Vec{self.c}'
def f(*c): return Vec(*c)
""",
        """
def check(f):
    assert 2 * f(1, 2) == f(2, 4) and 10 - f(1, 2) == f(9, 8) and 1 / f(2, 4) == f(.5, .25) and 2 ** f(1, 2) == f(2, 4) and repr(3 * f(1, 1)) == 'Vec(3, 3)'
    assert f(1, 2) + (3, 4) == f(4, 6) and (3, 4) + f(1, 2) == f(4, 6) and [3, 4] + f(1, 2) == f(4, 6)
""",
    ),
    "numbers of own": (
        """
import functools, numbers
@functools.total_ordering
class Rational:
    def __init__(self, n, d=1): self.n, self.d = n, d
    def _of(self, o): return o if isinstance(o, Rational) else Rational(o)
    def __eq__(self, o): o = self._of(o); return self.n * o.d == o.n * self.d
    def __lt__(self, o): o = self._of(o); return self.n * o.d < o.n * self.d
    def __add__(self, o): o = self._of(o); return Rational(self.n * o.d + o.n * self.d, self.d * o.d)
    __radd__ = __add__
    def __mul__(self, o): o = self._of(o); return Rational(self.n * o.n, self.d * o.d)
    def __float__(self): return self.n / self.d
    def __hash__(self): return hash(self.n / self.d)
    def __repr__(self): return f'{self.n}/{self.d}'
def f(n, d=1): return Rational(n, d)
""",
        """
import math
def check(f):
    assert f(1, 2) == 0.5 and f(1, 2) + f(1, 2) == 1 and f(4, 2) == 2 and f(1, 2) < 1 and 0 < f(1, 2) and f(1, 2) <= f(2, 4) and sum([f(1, 2), f(1, 2)]) == 1
    assert math.isclose(f(1, 3), 1 / 3) and float(f(1, 4)) == .25 and sorted([f(1), f(1, 2)])[0] == f(1, 2) and max(f(1, 3), f(1, 2)) == f(1, 2) and f(1, 2) * 2 == 1 and repr(f(1, 2)) == '1/2' and f(1, 2) in {0.5}
""",
    ),
    "containers of own": (
        """
class LRU:
    def __init__(self, n): self.n, self.d = n, {}
    def __getitem__(self, k): v = self.d.pop(k); self.d[k] = v; return v
    def __setitem__(self, k, v):
        self.d.pop(k, None)
        if len(self.d) >= self.n: del self.d[next(iter(self.d))]
        self.d[k] = v
    def __delitem__(self, k): del self.d[k]
    def __contains__(self, k): return k in self.d
    def __len__(self): return len(self.d)
    def __iter__(self): return iter(self.d)
    def __repr__(self): return f'LRU({self.d})'
    def __eq__(self, o): return self.d == (o.d if isinstance(o, LRU) else o)
    def keys(self): return self.d.keys()
f = LRU
""",
        """
def check(f):
    c = f(2)
    c['a'] = 1; c['b'] = 2
    assert c['a'] == 1
    c['c'] = 3
    assert 'b' not in c and 'a' in c and len(c) == 2 and list(c) == ['a', 'c'] and dict(c) == {'a': 1, 'c': 3} and repr(c) == "LRU({'a': 1, 'c': 3})"
    assert {**c} == {'a': 1, 'c': 3} and c == {'c': 3, 'a': 1} and c != {} and sorted(c) == ['a', 'c'] and set(c) == {'a', 'c'}
    del c['a']
    try:
        c['zz']
        assert False
    except KeyError:
        pass
    assert c and len(c) == 1 and not f(1)
    c['c'] += 5
    assert c['c'] == 8
""",
    ),
    "descriptors and dynamic attributes": (
        """
class Positive:
    def __set_name__(self, o, n): self.n = '_' + n
    def __get__(self, o, t=None): return self if o is None else getattr(o, self.n, 0)
    def __set__(self, o, v):
        if v <= 0: raise ValueError(f'{self.n[1:]} must be positive')
        setattr(o, self.n, v)
class Item:
    price = Positive()
    __slots__ = ('_price', 'extra')
    def __init__(self, p): self.price = p
class Dyn:
    def __getattr__(self, n):
        if n.startswith('get_'): return lambda: n[4:]
        raise AttributeError(f'no {n}')
    def __dir__(self): return ['get_x']
    def __delattr__(self, n): self.gone = n
f = Item
""",
        """
def check(f):
    i = f(3)
    assert i.price == 3
    try:
        i.price = -1
        assert False
    except ValueError as e:
        assert str(e) == 'price must be positive'
    try:
        i.other = 1
        assert False
    except AttributeError:
        pass
    d = Dyn()
    assert d.get_name() == 'name' and hasattr(d, 'get_x') and not hasattr(d, 'other') and getattr(d, 'zz', 5) == 5 and 'get_x' in dir(d)
    del d.foo
    assert d.gone == 'foo'
    try:
        d.nothing
        assert False
    except AttributeError as e:
        assert str(e) == 'no nothing'
    assert not hasattr(i, '__dict__')
""",
    ),
    "class and static methods": (
        """
import datetime
class P:
    n = 0
    def __init__(self, name, year): self.name, self.year = name, year; type(self).n += 1
    @classmethod
    def parse(cls, t): a, b = t.split(':'); return cls(a, int(b))
    @staticmethod
    def adult(a): return a >= 18
    @property
    def age(self): return 2024 - self.year
    def __repr__(self): return f'P({self.name!r}, {self.year})'
    def __eq__(self, o): return isinstance(o, P) and self.__dict__ == o.__dict__
class Q(P):
    def __init__(self, *a): super().__init__(*a); self.tag = 'q'
f = P.parse
""",
        """
def check(f):
    p = f('bob:2000')
    assert p == P('bob', 2000) and p.age == 24 and P.adult(18) and not p.adult(3) and P.n == 2 and repr([p]) == "[P('bob', 2000)]"
    q = Q.parse('al:1990')
    assert type(q) is Q and q.tag == 'q' and Q.n == 3 and 'n' not in vars(p) and vars(p) == {'name': 'bob', 'year': 2000} and p.__class__.__name__ == 'P' and q.__dict__['tag'] == 'q'
    assert [P, Q].index(type(q)) == 1 and {P: 1}[type(p)] == 1 and type(p) != type(q) and isinstance(q, (int, P)) and not isinstance(p, (Q, str))
    try:
        p.age = 3
        assert False
    except AttributeError:
        pass
    assert str(P) == "<class 'solution.P'>" or 'P' in str(P)
""",
    ),
    "enum flags and auto": (
        """
import enum
class Perm(enum.Flag):
    R = enum.auto(); W = enum.auto(); X = enum.auto()
class Level(enum.IntEnum):
    LOW = 1; HIGH = 5
class Day(enum.Enum):
    MON = 'm'; TUE = 't'
    @property
    def nice(self): return self.name.title()
    @classmethod
    def first(cls): return next(iter(cls))
def f(x): return Perm.R | Perm.X if x else Perm(0)
def level(n): return Level.HIGH if n > 3 else Level.LOW
def day(): return Day.TUE
""",
        """
def check(f):
    assert f(1) == Perm.R | Perm.X and Perm.W not in f(1) and Perm.R in f(1) and not f(0) and f(1) & Perm.R == Perm.R and (f(1) ^ Perm.R) is Perm.X
    assert level(9) == 5 and level(9) > level(1) and level(1) + 1 == 2 and max(level(1), level(9)) is Level.HIGH and Level(1).name == 'LOW'
    assert day().nice == 'Tue' and day() is Day.TUE and Day.first() is Day.MON and Day['MON'].value == 'm' and [d.value for d in Day] == ['m', 't'] and len(Day) == 2 and day() in Day and {Day.MON: 1}.get(Day('m')) == 1
    assert day() in (Day.MON, Day.TUE) and day() != 't' and Day.__members__['TUE'] == day()
""",
    ),
    "match statements": (
        """
from dataclasses import dataclass
@dataclass
class Point:
    x: int
    y: int
class Circle:
    def __init__(self, r): self.r = r
def f(n):
    return [Point(n, 0), Circle(n), {'k': n}, (n, 'a'), [n, n + 1, n + 2], None, n][n % 7]
""",
        """
def check(f):
    def kind(v):
        match v:
            case Point(x=0, y=y): return f'p{y}'
            case Point(a, b): return (a, b)
            case Circle(r=r) if r > 0: return f'c{r}'
            case {'k': k, **rest}: return k, rest
            case (int(n), str() as s): return s, n
            case [first, *others]: return first, others
            case None: return 'none'
            case int() | float(): return 'number'
    assert [kind(f(i)) for i in range(8)] == ['p0', 'c1', (2, {}), ('a', 3), (4, [5, 6]), 'none', 'number', (7, 0)]
""",
    ),
    "protocols and generics": (
        """
from typing import Protocol, runtime_checkable, Generic, TypeVar
T = TypeVar('T')
@runtime_checkable
class Sized2(Protocol):
    def size(self) -> int: ...
class Box(Generic[T]):
    def __init__(self, v: T): self.v = v
    def size(self) -> int: return 1
    def map(self, g): return Box(g(self.v))
def f(v): return Box[int](v)
def sized(o): return isinstance(o, Sized2)
""",
        """
def check(f):
    b = f(3)
    assert b.map(lambda x: x + 1).v == 4 and isinstance(b, Sized2) and isinstance(b, Box) and not isinstance(3, Sized2) and Box[str]('a').v == 'a'
    class Mine:
        def size(self): return 2
    assert sized(Mine()) and not sized(4) and isinstance(Mine(), Sized2)
""",
    ),
    "trees and recursion": (
        """
class TreeNode:
    def __init__(self, val=0, left=None, right=None): self.val, self.left, self.right = val, left, right
def f(values):
    if not values: return None
    nodes = [None if v is None else TreeNode(v) for v in values]
    kids = nodes[::-1]
    root = kids.pop()
    for n in nodes:
        if n:
            if kids: n.left = kids.pop()
            if kids: n.right = kids.pop()
    return root
def depth(t): return 0 if t is None else 1 + max(depth(t.left), depth(t.right))
""",
        """
def values(t): return [] if t is None else values(t.left) + [t.val] + values(t.right)
def check(f):
    t = f([2, 1, 3])
    assert values(t) == [1, 2, 3] and depth(t) == 2 and t.left.left is None and f([]) is None and depth(f([1, 2, None, 3])) == 3
    t.left.left = TreeNode(0)
    assert values(t) == [0, 1, 2, 3] and depth(t) == 3 and t.right.val == 3
""",
    ),
    "Solution class": (
        """
from typing import List
class Solution:
    def twoSum(self, nums: List[int], target: int) -> List[int]:
        seen = {}
        for i, n in enumerate(nums):
            if target - n in seen: return [seen[target - n], i]
            seen[n] = i
        return []
    def rotate(self, m: List[List[int]]) -> None:
        m[:] = [list(r) for r in zip(*m[::-1])]
f = Solution
""",
        """
def check(candidate):
    s = candidate()
    assert s.twoSum([2, 7, 11], 9) == [0, 1] and candidate().twoSum([1], 5) == []
    m = [[1, 2], [3, 4]]
    assert s.rotate(m) is None and m == [[3, 1], [4, 2]]
    assert Solution().twoSum(nums=[3, 3], target=6) == [0, 1]
""",
    ),
    "numpy results": (
        """
import numpy as np
def f(x): return np.asarray(x, dtype=float) / 2
def stats(x): return {'mean': np.mean(x), 'max': np.max(x), 'arg': int(np.argmax(x)), 'shape': np.shape(x)}
def mask(x): return np.asarray(x) > 1
class Grid:
    def __init__(self, a): self.a = np.array(a)
    def __eq__(self, o): return isinstance(o, Grid) and np.array_equal(self.a, o.a)
    def __array__(self, dtype=None, copy=None): return self.a
""",
        """
import numpy as np
def check(f):
    np.testing.assert_allclose(f([1, 2]), [.5, 1.])
    assert f([[1, 2], [3, 4]]).shape == (2, 2) and f([1]).dtype == np.float64 and stats([1, 3]) == {'mean': 2.0, 'max': 3, 'arg': 1, 'shape': (2,)}
    assert mask([0, 2]).tolist() == [False, True] and mask([2]).all() and not mask([0]).any() and (f([2, 4]) == [1, 2]).all() and np.array_equal(f([2]), np.array([1.]))
    assert isinstance(f([1]), np.ndarray) and f(np.array([1, 2]))[0] == .5 and f([1, 2])[1:].tolist() == [1.0] and np.sum(f([2, 2])) == 2 and f([2]) + 1 == 2
    assert Grid([1, 2]) == Grid([1, 2]) and Grid([1]) != Grid([2]) and Grid([1, 2]).a.sum() == 3
    try:
        np.testing.assert_array_equal(f([1]), [3])
    except AssertionError:
        pass
    else:
        assert False
""",
    ),
}
