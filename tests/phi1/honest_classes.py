"""Honest programs with classes of their own, and tests that use their objects as one would in one process.

As in `honest.py`: name: program, test[, "", "prompt": what comes before the function is given]."""

CLASSES: dict[str, tuple[str, ...]] = {
    "an __eq__ and nothing else": (
        """
class P:
    def __init__(self, x): self.x = x
    def __eq__(self, o): return self.x == o.x
def f(n): return [P(i) for i in range(n)]
""",
        """
def check(f):
    assert f(3) == f(3)
    assert f(3) != f(2)
    assert f(2) == [P(0), P(1)]
    assert P(1) in f(2)
    assert f(3).index(P(2)) == 2
    assert f(3).count(P(1)) == 1
""",
    ),
    "an order": (
        """
import functools
@functools.total_ordering
class V:
    def __init__(self, s): self.p = tuple(map(int, s.split('.')))
    def __eq__(self, o): return self.p == o.p
    def __lt__(self, o): return self.p < o.p
    def __hash__(self): return hash(self.p)
    def __repr__(self): return 'V(%s)' % '.'.join(map(str, self.p))
def f(s): return V(s)
""",
        """
def check(f):
    assert f('1.2') < f('1.10') and f('1.2') <= f('1.2') and f('2') >= f('1.9') and f('3') > f('2')
    assert sorted(map(f, ['1.10', '1.2'])) == [f('1.2'), f('1.10')]
    assert str(sorted(map(f, ['1.10', '1.2']))) == '[V(1.2), V(1.10)]'
    assert {f('1'): 1}[f('1')] == 1 and len(set(map(f, ['1', '1', '2']))) == 2
    import heapq, bisect
    h = [f('3'), f('1'), f('2')]
    heapq.heapify(h)
    assert heapq.heappop(h) == f('1')
    assert bisect.bisect([f('1'), f('3')], f('2')) == 1
    assert max(f('1'), f('2'), key=lambda v: v.p) == f('2')
""",
    ),
    "a dataclass of the prompt": (
        """
from dataclasses import dataclass
@dataclass
class P:
    x: int
    y: int = 0
def f(p): return P(p.y, p.x)
""",
        """
import dataclasses
def check(f):
    assert f(P(1, 2)) == P(2, 1) and dataclasses.asdict(f(P(1,2))) == {'x': 2, 'y': 1}
""",
        "",
        "prompt",
    ),
    "enumerations of numbers, flags, strings": (
        """
import enum
class C(enum.IntEnum):
    A = 1
    B = 2
class F(enum.Flag):
    R = enum.auto()
    W = enum.auto()
class S(str, enum.Enum):
    X = 'x'
def f(): return C.B
def g(): return F.R | F.W
def s(): return S.X
def allc(): return list(C)
""",
        """
def check(f):
    assert f() == 2 and f() is C.B and f() + 1 == 3 and C(1) is C.A and C['A'] is C.A
    assert f().name == 'B' and f().value == 2
    assert F.R in g() and g() == F.R | F.W
    assert s() == 'x' and s() is S.X and s().upper() == 'X'
    assert [c.name for c in allc()] == ['A', 'B'] and [c.name for c in C] == ['A', 'B'] and len(C) == 2
    assert isinstance(f(), C) and isinstance(f(), int)
    assert sorted([C.B, C.A]) == [1, 2]
    assert {C.A: 'a'}[C.A] == 'a'
""",
    ),
    "an enumeration as a key": (
        """
from enum import Enum
class K(Enum):
    A = 'a'
    B = 'b'
def f(x): return {K(x): 1}
""",
        """
def check(f):
    assert f('a') == {K.A: 1} and K.B not in f('a') and K.A in f('a')
    assert str(K.A) == 'K.A' and repr(K.A) == "<K.A: 'a'>"
    assert K('b') is K.B
    refused = False
    try:
        K('z')
    except ValueError:
        refused = True
    assert refused
""",
    ),
    "a typed named tuple": (
        """
from typing import NamedTuple
class E(NamedTuple):
    name: str
    age: int = 3
    def up(self): return self.name.upper()
def f(n): return E(n)
""",
        """
def check(f):
    assert f('a') == E('a', 3) and f('a') == ('a', 3) and f('a').up() == 'A' and f('a')._asdict() == {'name': 'a', 'age': 3}
    n, a = f('b')
    assert (n, a) == ('b', 3) and f('a')._fields == ('name', 'age') and f('c')[0] == 'c' and repr(f('a')) == "E(name='a', age=3)"
    assert {f('a'): 1}[('a', 3)] == 1
    assert sorted([f('b'), f('a')])[0].name == 'a'
""",
    ),
    "a matrix": (
        """
class M:
    def __init__(self, rows): self.rows = [list(r) for r in rows]
    def __mul__(self, o):
        if isinstance(o, (int, float)): return M([[v*o for v in r] for r in self.rows])
        return M([[sum(a*b for a, b in zip(r, c)) for c in zip(*o.rows)] for r in self.rows])
    def __rmul__(self, k): return self * k
    def __eq__(self, o): return self.rows == o.rows
    def __getitem__(self, ij): return self.rows[ij[0]][ij[1]]
    def __setitem__(self, ij, v): self.rows[ij[0]][ij[1]] = v
    def __pow__(self, n):
        r = self
        for _ in range(n-1): r = r * self
        return r
f = M
""",
        """
def check(f):
    m = f([[1, 1], [1, 0]])
    assert (m ** 5).rows == [[8, 5], [5, 3]] and m * 2 == f([[2, 2], [2, 0]]) and (2 * m).rows == [[2, 2], [2, 0]]
    m[0, 1] = 7
    assert m[0, 1] == 7
""",
    ),
    "a linked list": (
        """
class N:
    def __init__(self, v): self.v, self.next = v, None
class L:
    def __init__(self, it=()):
        self.head = None; self.n = 0
        for v in it: self.append(v)
    def append(self, v):
        self.n += 1
        if not self.head: self.head = N(v); return
        c = self.head
        while c.next: c = c.next
        c.next = N(v)
    def __iter__(self):
        c = self.head
        while c: yield c.v; c = c.next
    def __len__(self): return self.n
    def __contains__(self, x): return any(v == x for v in self)
    def __reversed__(self): return iter(list(self)[::-1])
    def __bool__(self): return self.n > 0
f = L
""",
        """
def check(f):
    l = f([1, 2, 3])
    assert list(l) == [1, 2, 3] and len(l) == 3 and 2 in l and 5 not in l and list(reversed(l)) == [3, 2, 1]
    l.append(4)
    assert list(l)[-1] == 4 and l.head.next.v == 2 and l and not f() and sum(l) == 10 and max(l) == 4
    a, *b = l
    assert a == 1 and b == [2, 3, 4] and [*l] == [1,2,3,4] and dict(zip(l, 'abcd'))[2] == 'b' and list(enumerate(l))[0] == (0, 1)
    assert tuple(l) == (1,2,3,4) and set(l) == {1,2,3,4} and ','.join(map(str, l)) == '1,2,3,4'
""",
    ),
    "a frozen dataclass, taken apart": (
        """
from dataclasses import dataclass, field
@dataclass(frozen=True)
class P:
    x: int
    y: int = 0
    tags: tuple = ()
@dataclass
class Q:
    items: list = field(default_factory=list)
    p: P = P(0)
def f(x): return P(x, 2)
def g(): return Q([1], P(3))
""",
        """
import dataclasses
def check(f):
    assert f(1) == P(1, 2) and hash(f(1)) == hash(P(1, 2)) and len({f(1), f(1)}) == 1
    try:
        f(1).x = 3
        assert False
    except dataclasses.FrozenInstanceError:
        pass
    assert dataclasses.asdict(g()) == {'items': [1], 'p': {'x': 3, 'y': 0, 'tags': ()}}
    assert dataclasses.is_dataclass(g()) and [x.name for x in dataclasses.fields(g())] == ['items', 'p']
    assert dataclasses.astuple(f(1)) == (1, 2, ())
""",
    ),
    "all operators": (
        """
class V:
    def __init__(self, x, y): self.x, self.y = x, y
    def __add__(self, o): return V(self.x+o.x, self.y+o.y)
    def __mul__(self, k): return V(self.x*k, self.y*k) if not isinstance(k, V) else self.x*k.x+self.y*k.y
    __rmul__ = __mul__
    def __iadd__(self, o): self.x += o.x; self.y += o.y; return self
    def __eq__(self, o): return isinstance(o, V) and (self.x, self.y) == (o.x, o.y)
    def __abs__(self): return (self.x**2+self.y**2)**.5
    def __bool__(self): return bool(self.x or self.y)
    def __iter__(self): return iter((self.x, self.y))
    def __repr__(self): return f'V({self.x}, {self.y})'
    def __sub__(self, o): return self + -o
    def __neg__(self): return V(-self.x, -self.y)
    def __matmul__(self, o): return self * o
    def __getitem__(self, i): return (self.x, self.y)[i]
    def __len__(self): return 2
    def __radd__(self, o): return self if o == 0 else NotImplemented
    def __format__(self, s): return f'<{self.x:{s}}>'
def f(x, y): return V(x, y)
""",
        """
def check(f):
    a = f(1, 2)
    b = a
    a += f(1, 1)
    assert b is a and b == f(2, 3)
    assert f(1, 2) * 3 == f(3, 6) and 3 * f(1, 2) == f(3, 6) and f(1, 2) * f(3, 4) == 11 and f(1, 2) @ f(3, 4) == 11
    assert abs(f(3, 4)) == 5.0 and not f(0, 0) and f(1, 0) and tuple(f(1, 2)) == (1, 2) and list(f(1,2)) == [1, 2]
    x, y = f(5, 6)
    assert (x, y) == (5, 6) and repr(f(1, 2)) == 'V(1, 2)' and f(3, 3) - f(1, 1) == f(2, 2)
    assert sum([f(1, 1), f(2, 2)]) == f(3, 3) and f'{f(1, 2):03d}' == '<001>' and '%s' % f(1, 2) == 'V(1, 2)'
    assert f(1, 2)[0] == 1 and f(1,2)[-1] == 2 and len(f(0, 0)) == 2 and sum([f(1, 1), f(2, 2)], f(0, 0)) == f(3, 3)
    assert f(1,2) == V(1, 2) and V(1, 2) == f(1, 2)
    assert [f(1,2)] * 2 == [V(1, 2), V(1,2)]
""",
    ),
    "an __eq__ that is particular": (
        """
class S:
    def __init__(self, a): self.a = a
    def __eq__(self, o): return isinstance(o, S) and self.a == o.a
def f(a): return S(a)
""",
        """
def check(f):
    assert f(1) != None and f(1) != 1 and f(1) != 'a' and not (f(1) == 1) and f(1) not in [1, 2] and f(1) == f(1)
""",
    ),
    "a sequence by __getitem__": (
        """
class Sq:
    def __len__(self): return 5
    def __getitem__(self, i):
        if isinstance(i, slice): return [k*k for k in range(*i.indices(5))]
        if not -5 <= i < 5: raise IndexError(i)
        return (i % 5) ** 2
f = Sq
""",
        """
def check(f):
    assert list(f()) == [0, 1, 4, 9, 16] and f()[2] == 4 and f()[-1] == 16 and f()[1:3] == [1, 4] and 9 in f() and len(f()) == 5
    ended = False
    try:
        f()[9]
    except IndexError:
        ended = True
    assert ended
    assert list(reversed(f())) == [16, 9, 4, 1, 0] and [x for x in f()] == [0, 1, 4, 9, 16]
""",
    ),
    "classes derived from list, dict, int, str": (
        """
class Stack(list):
    def push(self, x): self.append(x)
    def peek(self): return self[-1]
class DD(dict):
    def __missing__(self, k): return k * 2
    def __getattr__(self, k): return self[k]
class Age(int):
    def __new__(cls, v): return super().__new__(cls, max(0, v))
    def __add__(self, o): return Age(int(self) + int(o))
class Name(str):
    def shout(self): return self.upper() + '!'
def f(x): return Stack(x)
def d(): return DD(a=1)
def a(x): return Age(x)
def n(x): return Name(x)
""",
        """
def check(f):
    s = f([1, 2])
    assert s == [1, 2] and s.peek() == 2 and len(s) == 2 and isinstance(s, list)
    s.push(5)
    assert s == [1, 2, 5] and s.peek() == 5 and s.pop() == 5 and s.peek() == 2
    s.append(9)
    assert s.peek() == 9
    x = d()
    assert x == {'a': 1} and x['a'] == 1 and x['b'] == 'bb' and x.a == 1
    x['c'] = 3
    assert x.c == 3
    assert a(-5) == 0 and a(3) + 4 == 7 and isinstance(a(1), Age)
    assert n('x').shout() == 'X!' and n('x') == 'x' and n('a') + 'b' == 'ab' and repr(n('q')) == "'q'"
    assert repr(f([1])) == '[1]' and s[0] == 1 and sorted(f([3, 1])) == [1, 3] and f([1]) + [2] == [1, 2]
""",
    ),
    "derived classes that print and store their own way": (
        """
class OneBased(list):
    def __getitem__(self, i): return super().__getitem__(i - 1)
    def __len__(self): return super().__len__() * 10
    def __repr__(self): return 'OB' + super().__repr__()
    def __contains__(self, x): return not super().__contains__(x)
class CI(dict):
    def __getitem__(self, k): return super().__getitem__(k.lower())
    def __setitem__(self, k, v): super().__setitem__(k.lower(), v)
    def __contains__(self, k): return super().__contains__(k.lower())
class Mod(int):
    def __eq__(self, o): return int(self) % 7 == int(o) % 7
    def __hash__(self): return hash(int(self) % 7)
    def __add__(self, o): return Mod((int(self) + int(o)) % 7)
def f(x): return OneBased(x)
def c():
    d = CI(); d['A'] = 1; return d
def m(x): return Mod(x)
""",
        """
def check(f):
    assert repr(f([1])) == 'OB[1]'
    d = c()
    assert d == {'a': 1}
    d['B'] = 2
    assert d['b'] == 2
    assert m(3) == m(10)
""",
    ),
    "a mutable default": (
        """
def f(x, acc=[]):
    acc.append(x)
    return acc
""",
        """
def check(f):
    assert f(1) == [1]
    assert f(2) == [1, 2]
    assert f(3, []) == [3]
    assert f.__defaults__ == ([1, 2],)
""",
    ),
    "inheritance and properties": (
        """
import abc, math
class Shape(abc.ABC):
    count = 0
    def __init__(self): Shape.count += 1
    @abc.abstractmethod
    def area(self): ...
    @classmethod
    def unit(cls): return cls(1)
    @staticmethod
    def kind(): return 'shape'
class Circle(Shape):
    def __init__(self, r): super().__init__(); self._r = r
    @property
    def r(self): return self._r
    @r.setter
    def r(self, v):
        if v < 0: raise ValueError('negative radius')
        self._r = v
    def area(self): return math.pi * self._r ** 2
f = Circle
""",
        """
import math
def check(f):
    c = f(2)
    assert abs(c.area() - 12.566370614359172) < 1e-9 and math.isclose(c.area(), 4*math.pi) and round(c.area(), 2) == 12.57
    c.r = 3
    assert c.r == 3 and isinstance(c, Shape) and issubclass(Circle, Shape) and Circle.kind() == 'shape' and Circle.unit().r == 1
    try:
        c.r = -1
        assert False
    except ValueError as e:
        assert 'negative' in str(e)
    try:
        Shape()
        assert False
    except TypeError as e:
        assert 'abstract' in str(e)
    assert Shape.count == 2 and type(c) is Circle and type(c).__name__ == 'Circle' and c.__class__.__name__ == 'Circle'
    assert Circle.__mro__[1] is Shape and Circle.__bases__ == (Shape,)
""",
    ),
    "the function is a class": (
        """
class Shape:
    sides = 4
    @classmethod
    def unit(cls):
        return cls(1)
    def __init__(self, n):
        self.n = n
    def __hash__(self):
        return self.n
    def __eq__(self, o):
        return type(o) is type(self) and o.n == self.n
f = Shape
""",
        """
def check(candidate):
    assert candidate.sides == 4 and candidate.unit() == candidate(1) and isinstance(candidate(2), candidate)
    assert type(candidate(1)) == candidate and candidate(1).__class__.__name__ == 'Shape' and {candidate(1): 2}[Shape(1)] == 2
""",
    ),
}
