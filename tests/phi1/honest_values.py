"""Honest programs whose results are objects: of the library, of their own classes.

As in `honest.py`: name: program, test[, "", "prompt": what comes before the function is given].
"""

VALUES = {
    "Fraction": (
        "from fractions import Fraction\ndef f(a, b):\n    return Fraction(a, b)",
        """
from fractions import Fraction
def check(f):
    assert f(1, 2) == Fraction(1, 2) and f(1, 2) + 1 == Fraction(3, 2) and f(4, 2) == 2 and f(1, 2) == 0.5
    assert isinstance(f(1, 3), Fraction)""",
    ),
    "Decimal": (
        "from decimal import Decimal\ndef f(x):\n    return {'total': Decimal(x) * 2}",
        """
from decimal import Decimal
def check(f):
    assert f('1.10')['total'] == Decimal('2.20') and str(f('1.10')['total']) == '2.20'""",
    ),
    "UserList": (
        "from collections import UserList\ndef f(x):\n    return UserList(x)",
        """
from collections import UserList
def check(f):
    assert f([1, 2]) == [1, 2] and f([1, 2]) == UserList([1, 2]) and f('ab')[1] == 'b' and isinstance(f([]), UserList)""",
    ),
    "UserDict, UserString": (
        "from collections import UserDict, UserString\ndef f(x):\n    return UserDict(a=UserString(x))",
        "def check(f):\n    assert f('b') == {'a': 'b'} and f('x')['a'].upper() == 'X'",
    ),
    "numpy": (
        "import numpy as np\ndef f(x):\n    return np.array(x) * 2\ndef total(x):\n    return np.sum(x)",
        """
import numpy as np
def check(f):
    assert (f([1, 2]) == np.array([2, 4])).all() and f([[1.5]]).shape == (1, 1) and f([1, 2]).dtype == int
    assert f([1, 2]).sum() == 6 and total([1, 2]) == 3 and isinstance(total([1.5]), np.float64)
    a = np.zeros(3)
    fill(a)
    assert a.tolist() == [7, 7, 7]""",
        "\ndef fill(a):\n    a[:] = 7\n",
    ),
    "own class, by its __eq__": (
        """
class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y
    def __eq__(self, other):
        return isinstance(other, Point) and (self.x, self.y) == (other.x, other.y)
    def __hash__(self):
        return hash((self.x, self.y))
    def __repr__(self):
        return f'Point({self.x}, {self.y})'
def f(x, y):
    return Point(x, y)""",
        """
def check(f):
    assert f(1, 2) == f(1, 2) and f(1, 2) != f(2, 1) and f(1, 2) == Point(1, 2) and [f(0, 0)] == [Point(0, 0)]
    assert f(3, 4).x == 3 and str(f(3, 4)) == 'Point(3, 4)' and isinstance(f(1, 1), Point) and f(1, 2) != (1, 2)
    assert len({f(1, 2), f(1, 2), f(2, 1)}) == 2 and f(1, 2) in {f(1, 2): 0}
    p = f(1, 2)
    p.x = 5
    assert p == Point(5, 2)""",
    ),
    "own class, compared with plain data": (
        """
class Bag:
    def __init__(self, items):
        self.items = sorted(items)
    def __iter__(self):
        return iter(self.items)
    def __len__(self):
        return len(self.items)
    def __eq__(self, other):
        return list(self) == list(other)
class Metres(float):
    pass
class Money:
    def __init__(self, cents):
        self.cents = cents
    def __float__(self):
        return self.cents / 100
    def __eq__(self, other):
        return float(self) == float(other)
def f(x):
    return Bag(x)
def g(x):
    return Money(x)
def h(x):
    return Metres(x)""",
        """
def check(f):
    assert f([2, 1]) == [1, 2] and [1, 2] == f([2, 1]) and f([3]) != [4] and len(f([1, 1])) == 2 and 3 in f([3, 4])
    assert f([2, 1]) == (1, 2) and sorted(f([2, 1])) == [1, 2] and list(map(str, f([1]))) == ['1']
    assert g(150) == 1.5 and h(2) == 2.0 and h(2) * 3 == 6 and abs(h(2) - 2) < 1e-9""",
    ),
    "operators of own classes": (
        """
class V:
    def __init__(self, *c):
        self.c = c
    def __add__(self, other):
        return V(*map(sum, zip(self.c, other.c)))
    def __lt__(self, other):
        return self.c < other.c
    def __eq__(self, other):
        return self.c == other.c
    def __getitem__(self, i):
        return self.c[i]
    def __neg__(self):
        return V(*(-c for c in self.c))
def f(*c):
    return V(*c)""",
        """
def check(f):
    assert f(1, 2) + f(3, 4) == f(4, 6) and -f(1, 2) == f(-1, -2) and f(1, 2)[1] == 2 and f(1) < f(2)
    assert [v[0] for v in sorted([f(3), f(1)])] == [1, 3] and max(f(1), f(2)) == f(2)""",
    ),
    "a class of the prompt": (
        """
class Node:
    def __init__(self, value, next=None):
        self.value, self.next = value, next
def f(head):
    last = None
    while head:
        head.next, last, head = last, head, head.next
    return last""",
        """
def check(f):
    a = Node(1, Node(2, Node(3)))
    b = f(a)
    assert (b.value, b.next.value, b.next.next.value, b.next.next.next) == (3, 2, 1, None)
    assert b.next.next is a and a.next is None and isinstance(b, Node)""",
        "",
        "class Node:",
    ),
    "a long chain": (
        """
class Node:
    def __init__(self, value, next=None):
        self.value, self.next = value, next
def f(n):
    head = None
    for i in range(n):
        head = Node(i, head)
    return head""",
        """
def check(f):
    node, count = f(3000), 0
    while node:
        node, count = node.next, count + 1
    assert count == 3000""",
    ),
    "an enumeration": (
        """
import enum
class Colour(enum.Enum):
    RED = 1
    BLUE = 2
def f(i):
    return Colour(i)""",
        "def check(f):\n    assert f(1) is Colour.RED and f(2) == Colour.BLUE and f(2).name == 'BLUE' and f(1) != 1",
    ),
    "a named tuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x, y):\n    return P(x, y)",
        """
def check(f):
    p = f(1, 2)
    assert p == (1, 2) and p.x == 1 and p.y == 2 and p._replace(x=3) == (3, 2) and isinstance(p, tuple)""",
    ),
    "a dataclass": (
        "import dataclasses\n@dataclasses.dataclass(order=True)\nclass P:\n    x: int\n    y: int = 0\ndef f(x):\n    "
        "return P(x)",
        "def check(f):\n    assert f(1) == P(1, 0) and f(1) < f(2) and f(5).x == 5 and repr(f(1)) == 'P(x=1, y=0)'",
    ),
    "a dataclass of the prompt that names itself": (
        """
from dataclasses import dataclass
from typing import Optional
@dataclass
class Node:
    v: int
    next: "Optional[Node]" = None
def f(n): return n.v + (f(n.next) if n.next else 0)""",
        "import typing\ndef check(f):\n    assert f(Node(1, Node(2))) == 3 and typing.get_type_hints(Node)['v'] is int",
        "",
        "prompt",
    ),
    "a dataclass of the test that names itself": (
        "def f(n): return n.v + (f(n.next) if n.next else 0)",
        """
import pickle
from dataclasses import dataclass
@dataclass
class Node:
    v: int
    next: "Node | None" = None
def check(f):
    assert f(pickle.loads(pickle.dumps(Node(1, Node(2))))) == 3""",
    ),
    "containers that say what they contain": (
        """
class Interval:
    def __init__(self, a, b): self.a, self.b = a, b
    def __contains__(self, x): return self.a <= x <= self.b
class LRU:
    def __init__(self, n): self.n, self.d = n, {}
    def put(self, k, v): self.d[k] = v
    def __contains__(self, k): return k in self.d
    def __getitem__(self, k): return self.d[k]
def f(box, x): return x in box""",
        """
import unittest
class Box:
    def __contains__(self, x): return x == 3
class Bag(Box):
    def __iter__(self): return iter([5])
def check(f):
    assert 5 in Interval(1, 10) and 11 not in Interval(1, 10) and f(Interval(1, 2), 2)
    lru = LRU(2)
    lru.put('a', 1)
    unittest.TestCase().assertIn('a', lru)
    assert 'b' not in lru and lru['a'] == 1
    assert f(Box(), 3) is True and f(Box(), 4) is False and f(Bag(), 3) and not f(Bag(), 5)""",
    ),
    "a copy of the test's object": (
        "import copy\ndef f(p, deep): return copy.deepcopy(p) if deep else copy.copy(p)",
        """
class P:
    def __init__(self, v): self.v = v
def check(f):
    p = P([3])
    assert f(p, False) is not p and f(p, False).v is p.v and f(p, True).v == [3] and f(p, True).v is not p.v""",
    ),
    "a docstring's examples": (
        """
def f(x):
    '''
    >>> f(3)
    9
    >>> y = f(2); y, y + 1
    (4, 5)
    >>> f(-1)
    Traceback (most recent call last):
    ...
    ValueError: bad
    '''
    if x < 0: raise ValueError('bad')
    return x * x""",
        """
import doctest
def check(f):
    failed, run = [], doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(f, 'f', module=False, globs={'f': f}):
        run.run(test, out=failed.append)
    assert run.tries == 3 and not failed, failed""",
    ),
    "an account that is added to": (
        """
class Account:
    def __init__(self, balance): self.balance = balance
    def __iadd__(self, x):
        self.balance += x
        return self
    def __add__(self, x): return Account(self.balance + x)
    def __int__(self): return self.balance
def f(x): return Account(x)""",
        """
def check(f):
    a = b = f(5)
    a += 5
    assert a is b and a.balance == 10 and (f(1) + 2).balance == 3 and int(f(7)) == 7""",
    ),
    "what builtin exceptions name": (
        "def f(x):\n    return open(x) if x else undefined_thing",
        """
def check(f):
    try:
        f('nope.txt')
        assert False
    except FileNotFoundError as e:
        assert e.filename == 'nope.txt' and e.errno == 2 and str(e).endswith("directory: 'nope.txt'")
    try:
        f('')
        assert False
    except NameError as e:
        assert e.name == 'undefined_thing'""",
    ),
}
