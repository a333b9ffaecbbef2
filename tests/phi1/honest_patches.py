"""Honest programs whose tests patch what they use, listen to warnings and logs, and seed.

As in `honest.py`: name: program, test[, "", "prompt": what comes before the function is given].
"""

PATCHES: dict[str, tuple[str, ...]] = {
    "warnings": (
        """
import warnings
def f(x):
    if x < 0:
        warnings.warn('negative', DeprecationWarning, stacklevel=2)
        warnings.warn(UserWarning('second'))
    return abs(x)
def strict(x):
    warnings.warn('always')
    return x
""",
        """
import warnings
def check(f):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        assert f(-1) == 1
    assert len(seen) == 2 and issubclass(seen[0].category, DeprecationWarning) and 'negative' in str(seen[0].message)
    assert seen[1].category is UserWarning and str(seen[1].message) == 'second'
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f(1)
    assert not seen
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        try:
            strict(2)
            assert False
        except UserWarning as e:
            assert str(e) == 'always'
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('ignore')
        strict(2)
    assert seen == []
    import unittest
    with unittest.TestCase().assertWarns(DeprecationWarning) as c:
        f(-2)
    assert 'negative' in str(c.warning)
""",
    ),
    "warnings of own classes": (
        """
import warnings
class Old(UserWarning): pass
def f(x):
    warnings.warn(Old('old %d' % x))
    return x
""",
        """
import warnings
def check(f):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f(3)
    assert len(seen) == 1 and issubclass(seen[0].category, Old) and str(seen[0].message) == 'old 3' and issubclass(seen[0].category, UserWarning)
""",
    ),
    "assertLogs": (
        """
import logging
log = logging.getLogger('app')
def f(x):
    log.debug('d %s', x)
    log.info('start %s', x)
    if x < 0:
        log.warning('negative: %d', x)
    return abs(x)
def root(): logging.error('root error')
""",
        """
import unittest, logging
def check(f):
    t = unittest.TestCase()
    with t.assertLogs('app', level='INFO') as seen:
        assert f(-2) == 2
    assert seen.output == ['INFO:app:start -2', 'WARNING:app:negative: -2'], seen.output
    with t.assertLogs() as seen:
        root()
    assert seen.records[0].getMessage() == 'root error' and seen.records[0].levelname == 'ERROR'
    with t.assertLogs('app', 'WARNING') as seen:
        f(-1)
    assert len(seen.records) == 1 and seen.records[0].args == (-1,)
    got = []
    class H(logging.Handler):
        def emit(self, record): got.append(record.getMessage())
    h = H()
    logging.getLogger('app').addHandler(h)
    f(-3)
    logging.getLogger('app').removeHandler(h)
    assert got == ['negative: -3']
    with t.assertRaises(AssertionError):
        with t.assertLogs('app', 'ERROR'):
            f(1)
""",
    ),
    "patched input and print": (
        """
def f():
    name = input('name? ')
    n = int(input())
    for i in range(n): print(name, i, sep='-')
    return name
""",
        """
from unittest import mock
import io, contextlib
def check(f):
    with mock.patch('builtins.input', side_effect=['bob', '2']) as m, mock.patch('sys.stdout', new_callable=io.StringIO) as out:
        assert f() == 'bob'
    assert out.getvalue() == 'bob-0\\nbob-1\\n' and m.call_count == 2
    m.assert_any_call('name? ')
    with mock.patch('builtins.input', lambda *a: '1'), mock.patch('builtins.print') as p:
        f()
    p.assert_called_once_with('1', 0, sep='-')
""",
    ),
    "patched sleep and time": (
        """
import time
def f(n):
    start = time.time()
    for i in range(n): time.sleep(i)
    return time.time() - start
""",
        """
from unittest import mock
import time
def check(f):
    with mock.patch('time.sleep') as s, mock.patch('time.time', side_effect=[10, 15]):
        assert f(3) == 5
    assert s.call_count == 3 and s.call_args_list == [mock.call(0), mock.call(1), mock.call(2)]
    slept = []
    old, time.sleep = time.sleep, slept.append
    try:
        f(2)
    finally:
        time.sleep = old
    assert slept == [0, 1]
""",
    ),
    "patched random": (
        """
import random
def f(): return [random.randint(1, 6) for _ in range(3)]
def g(xs): return random.choice(xs)
""",
        """
from unittest.mock import patch
def check(f):
    with patch('random.randint', return_value=4):
        assert f() == [4, 4, 4]
    @patch('random.choice', side_effect=lambda xs: xs[-1])
    def inner(m):
        assert g([1, 2, 9]) == 9
        m.assert_called_once_with([1, 2, 9])
    inner()
    assert f() != [9, 9, 9]
""",
    ),
    "seeded": (
        """
import random
def f(n): return [random.randint(0, 10 ** 6) for _ in range(n)]
""",
        """
import random
def check(f):
    random.seed(42)
    a = f(3)
    random.seed(42)
    assert f(3) == a and a == [670487, 116739, 26225], a
    random.seed(1)
    assert f(3) != a
""",
    ),
    "seeded numpy": (
        """
import numpy as np
def f(n): return np.random.rand(n)
""",
        """
import numpy as np
def check(f):
    np.random.seed(0)
    assert np.allclose(f(2), [0.5488135, 0.71518937])
""",
    ),
    "argv and environ": (
        """
import sys, os
def f(): return sys.argv[1:], os.environ.get('MODE', 'none'), os.getenv('MODE')
""",
        """
import sys, os
from unittest import mock
def check(f):
    with mock.patch.object(sys, 'argv', ['prog', '-v', 'x']):
        assert f()[0] == ['-v', 'x']
    assert f()[1] == 'none'
    os.environ['MODE'] = 'fast'
    assert f()[1:] == ('fast', 'fast')
    del os.environ['MODE']
    with mock.patch.dict(os.environ, {'MODE': 'slow'}):
        assert f()[1] == 'slow'
    assert f()[1] == 'none'
""",
    ),
    "patched open": (
        """
def f(path):
    with open(path) as file:
        return [line.rstrip() for line in file]
def w(path, text):
    with open(path, 'w') as file:
        file.write(text)
""",
        """
from unittest.mock import patch, mock_open
def check(f):
    with patch('builtins.open', mock_open(read_data='a\\nb\\n')) as m:
        assert f('x.txt') == ['a', 'b']
    m.assert_called_once_with('x.txt')
    with patch('builtins.open', mock_open()) as m:
        w('y', 'hello')
    m().write.assert_called_once_with('hello')
""",
    ),
    "patched os": (
        """
import os
def f(folder): return sorted(n for n in os.listdir(folder) if os.path.isfile(os.path.join(folder, n)))
""",
        """
from unittest import mock
def check(f):
    with mock.patch('os.listdir', return_value=['b', 'a']), mock.patch('os.path.isfile', return_value=True):
        assert f('/x') == ['a', 'b']
""",
    ),
    "patched program's helper through its class": (
        """
import time
class Client:
    def fetch(self, url): raise OSError('no network')
    def title(self, url): return self.fetch(url).upper()
def f(): return Client()
""",
        """
from unittest import mock
def check(f):
    c = f()
    with mock.patch.object(c, 'fetch', return_value='abc') as m:
        assert c.title('u') == 'ABC'
        m.assert_called_once_with('u')
    try:
        c.title('u')
        assert False
    except OSError as e:
        assert 'network' in str(e)
    with mock.patch.object(Client, 'fetch', lambda self, url: url + '!'):
        assert Client().title('a') == 'A!'
    c.fetch = mock.MagicMock(side_effect=ValueError('x'))
    try:
        c.title('q')
        assert False
    except ValueError:
        pass
    c.fetch.assert_called_with('q')
""",
    ),
    "dates and times patched": (
        """
import datetime
def f(): return datetime.date.today().isoformat()
def age(born): return (datetime.date.today() - born).days
""",
        """
import datetime
from unittest import mock
def check(f):
    class Fixed(datetime.date):
        @classmethod
        def today(cls): return cls(2024, 2, 1)
    with mock.patch('datetime.date', Fixed):
        assert f() == '2024-02-01'
        assert age(datetime.date(2024, 1, 1)) == 31
    assert len(f()) == 10
""",
    ),
    "stdin in several ways": (
        """
import sys
def f():
    n = int(sys.stdin.readline())
    rows = [list(map(int, sys.stdin.readline().split())) for _ in range(n)]
    rest = sys.stdin.read().split()
    print(sum(map(sum, rows)), *rest)
    sys.stdout.write('done\\n')
def lines(): return [l.strip() for l in sys.stdin]
""",
        """
import io, sys
from unittest import mock
def check(f):
    with mock.patch('sys.stdin', io.StringIO('2\\n1 2\\n3 4\\nx y\\n')), mock.patch('sys.stdout', new=io.StringIO()) as out:
        f()
    assert out.getvalue() == '10 x y\\ndone\\n'
    old = sys.stdin
    sys.stdin = io.StringIO('a\\nb')
    try:
        assert lines() == ['a', 'b']
    finally:
        sys.stdin = old
""",
    ),
}
