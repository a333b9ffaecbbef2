"""Honest programs whose tests derive from their classes, hand them objects, evaluate and unpickle what they return.

As in `honest.py`: name: program, test[, "", "prompt": what comes before the function is given].
"""

DERIVED: dict[str, tuple[str, ...]] = {
    "deriving": (
        """
class Shape:
    def __init__(self, name): self.name = name
    def area(self): raise NotImplementedError
    def describe(self): return f'{self.name}: {self.area()}'
def f(shapes): return sum(s.area() for s in shapes)
""",
        """
class Square(Shape):
    def __init__(self, side):
        super().__init__('square')
        self.side = side
    def area(self): return self.side ** 2
class Cube(Square):
    faces = 6
    def area(self): return self.faces * super().area()
def check(f):
    s = Square(3)
    assert s.area() == 9 and s.describe() == 'square: 9' and isinstance(s, Shape) and isinstance(s, Square) and s.name == 'square'
    assert f([s, Square(2)]) == 13 and issubclass(Square, Shape) and type(s) is Square and Square.__name__ == 'Square'
    assert Cube(2).describe() == 'square: 24' and Cube.faces == 6 and isinstance(Cube(1), Square) and Cube.__mro__[1] is Square
    try:
        Shape('x').describe()
        assert False
    except NotImplementedError:
        pass
""",
    ),
    "deriving from an abstract class": (
        """
from abc import ABC, abstractmethod
class Handler(ABC):
    registry = []
    def __init_subclass__(cls, **kw):
        super().__init_subclass__(**kw)
        Handler.registry.append(cls.__name__)
    @abstractmethod
    def handle(self, x): ...
    @property
    @abstractmethod
    def label(self): ...
def f(h, xs): return [h.label + str(h.handle(x)) for x in xs]
""",
        """
class Double(Handler):
    def handle(self, x): return 2 * x
    @property
    def label(self): return 'd'
class Partial(Handler):
    def handle(self, x): return x
def check(f):
    assert f(Double(), [1, 2]) == ['d2', 'd4'] and Handler.registry == ['Double', 'Partial']
    try:
        Partial()
        assert False
    except TypeError as e:
        assert 'abstract' in str(e)
    @staticmethod
    def g(): pass
    class Static(Double):
        @staticmethod
        def make(): return 5
        @classmethod
        def build(cls): return cls()
    assert Static.make() == 5 and isinstance(Static.build(), Double) and Static().label == 'd'
""",
    ),
    "deriving from the candidate": (
        """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x); return self
    def __len__(self): return len(self.items)
f = Stack
""",
        """
def check(candidate):
    class Loud(candidate):
        def push(self, x):
            self.last = x
            return super().push(x * 2)
    s = Loud()
    s.push(1).push(2)
    assert s.items == [2, 4] and len(s) == 2 and s.last == 2 and isinstance(s, candidate)
    class Plain(candidate): pass
    assert len(Plain().push(3)) == 1
""",
    ),
    "deriving from an exception": (
        """
class AppError(Exception):
    def __init__(self, msg, code=1):
        super().__init__(msg)
        self.code = code
def f(g):
    try:
        return g()
    except AppError as e:
        return ('caught', str(e), e.code)
""",
        """
class Mine(AppError):
    pass
def check(f):
    def fails(): raise Mine('m', 7)
    assert f(fails) == ('caught', 'm', 7)
    def plain(): raise AppError('p')
    assert f(plain) == ('caught', 'p', 1)
    assert issubclass(Mine, AppError) and issubclass(AppError, Exception)
""",
    ),
    "deriving from a class of the prompt": (
        """
class Shape:
    kind = 'shape'
    def __init__(self, n=1): self.n = n
    def area(self): return 0
    def double(self): return 2 * self.area()
def f(shapes):
    return [(isinstance(s, Shape), s.area(), s.kind, s.n) for s in shapes]
def d(s): return s.double()
""",
        """
class Square(Shape):
    def __init__(self, a):
        super().__init__(4)
        self.a = a
    def area(self): return self.a ** 2
def check(f):
    s = Square(3)
    assert f([s, Shape()]) == [(True, 9, 'shape', 4), (True, 0, 'shape', 1)] and s.double() == 18 and d(s) == 18 and isinstance(s, Shape)
""",
        "",
        "prompt",
    ),
    "exceptions of the test": (
        """
def f(kind, message): raise kind(message)
def wrap(kind, g):
    try:
        return g()
    except kind as e:
        return f'{type(e).__name__}: {e}'
def translate(g, a, b):
    try:
        return g()
    except a as e:
        raise b(str(e)) from e
""",
        """
class Mine(Exception): pass
class Other(ValueError):
    def __init__(self, text):
        super().__init__(text)
        self.size = len(text)
def check(f):
    for kind in (Mine, Other, KeyError):
        try:
            f(kind, 'abc')
            assert False
        except kind as e:
            assert e.args == ('abc',) and type(e) is kind
    def fails(): raise Other('xy')
    assert wrap(Other, fails) == 'Other: xy' and wrap(ValueError, fails) == 'Other: xy' and wrap((Mine, Other), fails) == 'Other: xy'
    try:
        translate(fails, ValueError, Mine)
        assert False
    except Mine as e:
        assert isinstance(e.__cause__, Other) and e.__cause__.size == 2
""",
    ),
    "singletons, registries, metaclasses": (
        """
class Meta(type):
    registry = {}
    def __new__(m, name, bases, ns):
        c = super().__new__(m, name, bases, ns)
        m.registry[name] = c
        return c
    def __len__(cls): return len(cls.registry)
class Base(metaclass=Meta): pass
class A(Base): pass
class Single:
    _i = None
    def __new__(cls, *a):
        if cls._i is None: cls._i = super().__new__(cls)
        return cls._i
def f(): return Single()
""",
        """
def check(f):
    assert f() is f() and Single() is f() and Meta.registry['A'] is A and len(Base) == 2 and isinstance(A, Meta) and type(A) is Meta
    class Mine(Base): pass
    assert Meta.registry['Mine'] is Mine and len(Base) == 3 and Base.__subclasses__() == [A, Mine]
""",
    ),
    "eval of what is returned": (
        """
def f(a, b): return f'({a} + {b}) * 2'
def code(n): return f'def g(x):\\n    return x * {n}\\n'
def r(x): return repr(x)
""",
        """
def check(f):
    assert eval(f(1, 2)) == 6
    space = {}
    exec(code(3), space)
    assert space['g'](2) == 6
    assert eval(r([1, {'a': (2,)}])) == [1, {'a': (2,)}]
    for x in (1, 2):
        assert eval(f'f({x}, 1)') == f'({x} + 1) * 2'
""",
    ),
    "pickles that the program makes": (
        """
import pickle, json
class P:
    def __init__(self, x): self.x = x
    def __eq__(self, o): return isinstance(o, P) and o.x == self.x
def f(x): return pickle.dumps(x)
def obj(x): return pickle.dumps(P(x))
def load(b): return pickle.loads(b)
""",
        """
import pickle
def check(f):
    assert pickle.loads(f([1, {'a': {2}}])) == [1, {'a': {2}}]
    assert pickle.loads(obj(3)) == P(3) and pickle.loads(obj(3)).x == 3
    assert load(pickle.dumps({'k': (1, 2)})) == {'k': (1, 2)}
""",
    ),
    "pickled and copied": (
        """
import pickle
class Node:
    def __init__(self, v): self.v = v; self.kids = []
    def __eq__(self, o): return isinstance(o, Node) and self.v == o.v
def f(v): return Node(v)
def g(x): return pickle.loads(pickle.dumps(x))
""",
        """
import pickle, copy
def check(f):
    a = f(3)
    b = pickle.loads(pickle.dumps(a))
    assert b == a and b is not a and b.v == 3 and isinstance(b, Node)
    assert pickle.loads(pickle.dumps([a, 1]))[0] == a
    assert g({'a': (1, 2)}) == {'a': (1, 2)} and copy.deepcopy([a])[0] is not a
""",
    ),
    "dependency injection": (
        """
class Service:
    def __init__(self, repo, clock): self.repo, self.clock = repo, clock
    def save(self, x):
        if self.repo.exists(x): raise KeyError(x)
        self.repo.items[x] = self.clock()
        return len(self.repo.items)
f = Service
""",
        """
from unittest.mock import Mock, MagicMock
class Repo:
    def __init__(self): self.items = {}
    def exists(self, x): return x in self.items
def check(f):
    r = Repo()
    s = f(r, lambda: 42)
    assert s.save('a') == 1 and r.items == {'a': 42}
    try:
        s.save('a')
        assert False
    except KeyError as e:
        assert e.args == ('a',)
    m = MagicMock()
    m.exists.return_value = False
    m.items.__len__.return_value = 7
    assert f(m, Mock(return_value=1)).save('z') == 7
    m.exists.assert_called_once_with('z')
    m.items.__setitem__.assert_called_once_with('z', 1)
""",
    ),
    "test's queue": (
        """
def f(q, n):
    for i in range(n): q.put(i)
    q.put(None)
""",
        """
import queue
def check(f):
    q = queue.Queue()
    f(q, 3)
    assert [q.get() for _ in range(4)] == [0, 1, 2, None] and q.empty()
""",
    ),
}
