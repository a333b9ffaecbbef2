"""Namespaces of the server's own: users, processes, IPC, network and a root folder that shows what `visible` lists."""

import ctypes
import os
import signal
import stat
from collections.abc import Sequence
from typing import NamedTuple

from phi1.evaluate.inside.visible import DEVICES, Tree

JOB_FOLDER = "/job/tmp"
"""Where each job's own file system is mounted. Landlock's rule is on its parent: it skips what a mount covers."""
JOB_BYTES, JOB_FILES = 16 << 20, 4096

_NEW_PID, _NEW_USER, _NEW_MOUNT = 0x20000000, 0x10000000, 0x00020000
_NEW_OTHERS = _NEW_PID | 0x08000000 | 0x40000000 | 0x04000000 | 0x02000000  # IPC, network, UTS, cgroup
_NO_SUID, _NO_DEVICES, _NO_EXEC, _RECURSIVE, _PRIVATE, _DETACH = 2, 4, 8, 0x4000, 0x40000, 2
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # system calls; Linux 5.12 has them all
_AT_FDCWD, _EMPTY_PATH, _AT_RECURSIVE, _CLONE_TREE = -100, 0x1000, 0x8000, 1
_libc = ctypes.CDLL(None, use_errno=True)


class Namespaces(NamedTuple):
    """What holds: the kinds of namespaces, and the user and group ids of candidate and checker (None: the server's)."""

    kinds: tuple[str, ...] = ()
    candidate_id: int | None = None
    checker_id: int | None = None


def _done(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def enter(trees: Sequence[Tree]) -> Namespaces:
    """Moves this process into namespaces of its own, as far as the machine allows it.

    Each way is tried in a child first, since half of it cannot be undone. An ordinary user, and root in a
    container with CAP_SYS_ADMIN, get all; where user namespaces are forbidden, root gets the others.
    """
    for with_users in (True, False):
        pid = os.fork()
        if pid == 0:
            try:
                _enter(trees, with_users)
                go_on_in_child()
                handle = os.pidfd_open(os.getpid())
                new_process_namespace()
                child = os.fork()
                if child == 0:
                    os._exit(0)
                os.waitpid(child, 0)
                own_process_namespace(handle)
                os._exit(0)
            finally:
                os._exit(1)
        if os.waitpid(pid, 0)[1] == 0:
            reached = _enter(trees, with_users)
            go_on_in_child()
            return reached
    return Namespaces()


def go_on_in_child() -> None:
    """Goes on in a child: the first process of a new process namespace, with which all ends that runs there; one
    without the threads of this.

    This process waits for its end, without the descriptors by which others would notice that.
    """
    pid = os.fork()
    if pid:
        os.closerange(0, 2)
        os.closerange(3, 1 << 16)
        os._exit(1 if os.waitpid(pid, 0)[1] else 0)
    parent_death_signal = 1
    _done(_libc.prctl(parent_death_signal, int(signal.SIGKILL), 0, 0, 0), "parent-death signal")


def _enter(trees: Sequence[Tree], with_users: bool) -> Namespaces:
    root = os.geteuid() == 0
    kinds = ("user", "pid", "mount", "ipc", "net", "uts", "cgroup")
    if not with_users:
        first = spare_id()
        if first is None:
            raise PermissionError("neither user namespaces nor ids to spare")
        _done(_libc.unshare(_NEW_MOUNT | _NEW_OTHERS), "unshare")
        show_only(trees)
        return Namespaces(kinds[1:], first, first + 1)
    process = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    try:
        first = spare_id() if root else None
        if first is None:
            uid, gid = os.geteuid(), os.getegid()
            _done(_libc.unshare(_NEW_USER | _NEW_MOUNT | _NEW_OTHERS), "unshare")
            _write_maps(process, f"{uid} {uid} 1", f"{gid} {gid} 1", deny_groups=True)
            show_only(trees)
            return Namespaces(kinds)
        # With ids to spare even the server gives root's up: its files are shown first, by root's rights.
        os.setgroups([])
        _done(_libc.unshare(_NEW_MOUNT), "unshare")
        show_only(trees)
        ready, begin = os.pipe()
        helper = os.fork()  # only who stays outside may write a map of several ids
        if helper == 0:
            os.close(begin)
            os.read(ready, 1)
            _write_maps(process, f"0 {first} 3", f"0 {first} 3", deny_groups=False)
            os._exit(0)
        _done(_libc.unshare(_NEW_USER | _NEW_MOUNT | _NEW_OTHERS), "unshare")
        os.close(begin)
        os.close(ready)
        if os.waitpid(helper, 0)[1]:
            raise PermissionError("the user namespace's map is refused")
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        return Namespaces(kinds, 1, 2)
    finally:
        os.close(process)


def _write_maps(process: int, users: str, groups: str, *, deny_groups: bool) -> None:
    texts = [("setgroups", "deny")] if deny_groups else []
    for name, text in [*texts, ("uid_map", users), ("gid_map", groups)]:
        file = os.open(name, os.O_WRONLY, dir_fd=process)
        os.write(file, text.encode())
        os.close(file)


def spare_id() -> int | None:
    """The first of three user ids that nobody uses, different for servers of different process ids.

    None where this process may not take other ids, or has none to take.
    """
    with open("/proc/self/status") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff"))
    set_gid, set_uid = 1 << 6, 1 << 7
    if not (effective & set_gid and effective & set_uid):
        return None
    ends = []
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}") as file:
            ends.append(max(int(line.split()[0]) + int(line.split()[2]) for line in file))
    end = min(*ends, 0x7FFF0000)
    first = end - 3 * (1 + os.getpid() % ((1 << 20) if end == 0x7FFF0000 else 256))
    return first if first > 60_000 else None


def show_only(trees: Sequence[Tree]) -> None:
    """Replaces this mount namespace's root by one that holds the trees and devices, read-only, and JOB_FOLDER."""
    _done(_libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None), "mount")
    shown = [(tree, _detached(tree.path)) for tree in trees]
    devices = [(path, _detached(path)) for path in DEVICES if os.path.exists(path)]
    root = next(path for path in ("/tmp", "/mnt", "/var") if os.path.isdir(path))
    mount("tmpfs", root, "size=1m,mode=755")
    for tree, handle in shown:
        _attach(handle, tree.path, root, no_devices=True)
        for name in tree.hidden:
            if os.path.isdir(os.path.join(root + tree.path, name)):
                mount("tmpfs", os.path.join(root + tree.path, name), "size=64k,mode=755")
    for path, handle in devices:
        _attach(handle, path, root, no_devices=False)
    os.makedirs(root + JOB_FOLDER)
    for path in ("/tmp", "/dev/shm"):  # where programs and libc look for a place to write
        if not os.path.exists(root + path):  # where a tree lies below it, it stays a folder, and nothing is written
            os.symlink(JOB_FOLDER, root + path)
    os.chdir(root)
    _done(_libc.pivot_root(b".", b"."), "pivot_root")
    _done(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")
    _set_attributes(_AT_FDCWD, b"/", _AT_RECURSIVE, _READ_ONLY)


_READ_ONLY, _ATTRIBUTE_NO_SUID, _ATTRIBUTE_NO_DEVICES = 1, 2, 4


def _detached(path: str) -> int:
    """A copy of the mounts at and below a path, as a descriptor: it stays while the root is built over it."""
    flags = _CLONE_TREE | os.O_CLOEXEC | _AT_RECURSIVE
    return _done(_libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags), f"open_tree {path}")


def _attach(handle: int, path: str, root: str, *, no_devices: bool) -> None:
    target = root + path
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    attributes = _READ_ONLY | _ATTRIBUTE_NO_SUID | (_ATTRIBUTE_NO_DEVICES if no_devices else 0)
    _set_attributes(handle, b"", _EMPTY_PATH | _AT_RECURSIVE, attributes)
    arguments = (handle, b"", _AT_FDCWD, os.fsencode(target), 4)  # MOVE_MOUNT_F_EMPTY_PATH
    _done(_libc.syscall(_MOVE_MOUNT, *arguments), f"move_mount {path}")
    os.close(handle)


def _set_attributes(handle: int, path: bytes, flags: int, attributes: int) -> None:
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    _done(_libc.syscall(_MOUNT_SETATTR, handle, path, flags, wanted, ctypes.sizeof(wanted)), "mount_setattr")


def mount(kind: str, path: str, options: str) -> None:
    flags = _NO_SUID | _NO_DEVICES | _NO_EXEC
    _done(_libc.mount(kind.encode(), os.fsencode(path), kind.encode(), flags, options.encode()), f"mount {path}")


def mount_job_folder(owner: int) -> None:
    """An empty file system for one job. Unmounting it frees all that is in it, however deep and whatever its modes."""
    mount("tmpfs", JOB_FOLDER, f"size={JOB_BYTES},nr_inodes={JOB_FILES},mode=700,uid={owner},gid={owner}")


def unmount_job_folder() -> None:
    _done(_libc.umount2(os.fsencode(JOB_FOLDER), _DETACH), "umount")


def new_process_namespace() -> None:
    """The next child is the first process of a new one."""
    _done(_libc.unshare(_NEW_PID), "unshare")


def own_process_namespace(self_handle: int) -> None:
    """Ends that: later children are in this process's namespace again. self_handle: a pidfd of this process."""
    _done(_libc.setns(self_handle, _NEW_PID), "setns")
