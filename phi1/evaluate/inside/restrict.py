"""What a forked child does to itself before it runs anything: limits, another user, Landlock, no capabilities,
seccomp.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
from collections.abc import Sequence
from typing import NamedTuple

from phi1.evaluate.inside.visible import DEVICES, Tree

OPEN_FILES, TASKS = 64, 64
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # Landlock's system calls
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_SPECIAL = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 15  # devices, sockets, pipes, device controls
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14
_libc = ctypes.CDLL(None, use_errno=True)
# Made before the fork: a new size of buffer is a new type of ctypes', which takes a child 0.3 ms to make.
_POLLED = ctypes.create_string_buffer(8)


class Limits(NamedTuple):
    """memory: bytes of address space. cpu: seconds. file_bytes: of one file. tasks: None where the count is not our
    own.
    """

    memory: int
    cpu: int
    file_bytes: int
    tasks: int | None


class Fence(NamedTuple):
    """What the kernel holds a child to. ruleset: Landlock's descriptor, -1 without. program: a seccomp filter (None:
    without).
    """

    ruleset: int
    program: ctypes.Array[ctypes.c_char] | None
    user: int | None
    parent: int
    """A pidfd of the server."""


def landlock_version() -> int:
    """0 where the kernel has none (before Linux 5.13, or switched off)."""
    return max(0, _libc.syscall(_CREATE, None, 0, 1))


def landlock(trees: Sequence[Tree], writable: str | None) -> int:
    """A ruleset: reads only in the trees and devices, writes only below `writable`; no TCP, no signal or abstract
    socket beyond its own processes (where the version knows them). -1 without Landlock."""
    version = landlock_version()
    if not version:
        return -1
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    attributes = ctypes.create_string_buffer(struct.pack("=QQQ", everything, network, scopes), 24)
    ruleset: int = _libc.syscall(_CREATE, attributes, size, 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    rules = [(part, _READ_FILE | _READ_DIR) for tree in trees for part in tree.parts()]
    rules += [(path, _READ_FILE | _WRITE_FILE) for path in DEVICES]
    if writable is not None:
        rules.append((writable, everything & ~(_EXECUTE | _MAKE_SPECIAL)))
    for path, access in rules:
        with contextlib.suppress(FileNotFoundError):  # a dangling link
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not os.path.isdir(path):
                access &= _OF_FILES
            rule = ctypes.create_string_buffer(struct.pack("=Qi", access, handle), 12)
            result = _libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
            os.close(handle)
            if result:
                raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
    return ruleset


def keep_descriptors(fence: Fence, *kept: int) -> Fence:
    """Renumbers the kept descriptors 0, 1, 2, … and closes all others; returns the fence with its own in their new
    places.
    """
    numbers = [*kept, fence.parent, *([fence.ruleset] if fence.ruleset >= 0 else [])]
    high = [os.dup2(number, 900 + place) for place, number in enumerate(numbers)]
    for place, number in enumerate(high):
        os.dup2(number, place)
    os.closerange(len(numbers), 1 << 16)
    ruleset = len(kept) + 1 if fence.ruleset >= 0 else -1
    return fence._replace(parent=len(kept), ruleset=ruleset)


def restrict(limits: Limits, fence: Fence, folder: str) -> None:
    """Makes this process a sandboxed one. Raises OSError if something that the fence has does not hold."""
    for kind, value in (
        (resource.RLIMIT_AS, limits.memory),
        (resource.RLIMIT_CPU, limits.cpu),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NPROC, limits.tasks),
    ):
        if value is not None:
            resource.setrlimit(kind, (value, value))
    if fence.user is not None:
        os.setgroups([]) if os.getgroups() else None
        os.setresgid(fence.user, fence.user, fence.user)
        os.setresuid(fence.user, fence.user, fence.user)
    os.chdir(folder)
    no_new_privileges, parent_death_signal, dumpable, filter_calls = 38, 1, 4, 22
    _check(_libc.prctl(no_new_privileges, 1, 0, 0, 0), "no_new_privs")
    _check(_libc.prctl(parent_death_signal, int(signal.SIGKILL), 0, 0, 0), "parent-death signal")
    poll_in = 1
    struct.pack_into("ihh", _POLLED, 0, fence.parent, poll_in, 0)
    if _libc.poll(_POLLED, 1, 0):
        os._exit(1)  # the server ended before that was set
    os.close(fence.parent)
    if fence.ruleset >= 0:
        _check(_libc.syscall(_RESTRICT, fence.ruleset, 0), "landlock_restrict_self")
        os.close(fence.ruleset)
    # Root's capabilities: a version 3 header for this process, no capability.
    _check(_libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)), "capset")
    _check(_libc.prctl(dumpable, 0, 0, 0, 0), "dumpable")
    if fence.program:
        program = struct.pack("@HP", len(fence.program) // 8, ctypes.addressof(fence.program))
        _check(_libc.prctl(filter_calls, 2, program, 0, 0), "seccomp")


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), what)


def hide_this_process() -> None:
    """Nobody without root's rights can look into it or debug it."""
    _check(_libc.prctl(4, 0, 0, 0, 0), "dumpable")
