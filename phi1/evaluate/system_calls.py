"""The system calls that a sandboxed process may make: an allow-list, compiled by libseccomp to a seccomp filter.

What is not named here is refused with EPERM; a call of another architecture's (int 0x80, x32) ends the process.
Left out on purpose, besides what reaches other processes, the network or the machine: System V and POSIX IPC and
keys (they outlive a process), `memfd_create` (memory that no limit counts), locks (seen outside on the interpreter's
files), every call that changes a file's times, mode or owner, `sendmsg` and addresses in `sendto` (a datagram to
a foreign socket), out-of-band data (code of the kernel that had holes), and whatever directs a signal: kill,
F_SETOWN, F_SETSIG, O_ASYNC, FIOASYNC, the parent-death signal.
"""

import contextlib
import errno
import tempfile

_FILES = """
    read write readv writev pread64 pwrite64 preadv pwritev lseek close close_range dup dup2 dup3 pipe pipe2
    open openat stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getcwd chdir fchdir
    mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat truncate ftruncate
    fsync fdatasync fallocate getdents getdents64 fadvise64 copy_file_range sendfile umask
"""
_MEMORY_AND_THREADS = """
    mmap mprotect munmap mremap madvise brk msync futex set_robust_list rseq set_tid_address exit exit_group
    gettid getpid getppid getuid geteuid getgid getegid getresuid getresgid getgroups uname sysinfo
    getrusage times getcpu sched_yield getrlimit membarrier getrandom
"""
_TIME_AND_SIGNALS = """
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time alarm setitimer getitimer pause
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall
    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2
    shutdown getsockopt getsockname getpeername
"""
ALLOWED = tuple((_FILES + _MEMORY_AND_THREADS + _TIME_AND_SIGNALS).split())
_FCNTL = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_PRCTL = (15, 16)  # PR_SET_NAME, PR_GET_NAME
_F_SETFL, _O_ASYNC = 4, 0x2000
_CLONE_THREAD, _CLONE_NEW = 0x10000, 0x7E020080  # every CLONE_NEW* flag
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE, _MSG_OOB = 1, 1, 0xF, 1


def compiled() -> bytes:
    """The filter as BPF for this machine's architecture.

    Raises ImportError without `pyseccomp`, RuntimeError without the C library libseccomp.
    """
    import pyseccomp as seccomp
    from pyseccomp import Arg

    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    with contextlib.suppress(OSError):  # before libseccomp 2.5
        # A binary tree: the kernel runs the filter for each call once when it is installed, and as a list that takes
        # 0.3 ms.
        rules.set_attr(seccomp.Attr.CTL_OPTIMIZE, 2)

    def allow(name: str, *arguments: Arg) -> None:
        number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)
        if number >= 0:  # negative: newer than the library, or not of this architecture
            rules.add_rule(seccomp.ALLOW, number, *arguments)

    for name in ALLOWED:
        allow(name)
    for call, values in (("fcntl", _FCNTL), ("ioctl", _IOCTL)):
        for value in values:
            allow(call, Arg(1, seccomp.EQ, value))
    for value in _PRCTL:
        allow("prctl", Arg(0, seccomp.EQ, value))
    allow("fcntl", Arg(1, seccomp.EQ, _F_SETFL), Arg(2, seccomp.MASKED_EQ, _O_ASYNC, 0))
    allow("clone", Arg(0, seccomp.MASKED_EQ, _CLONE_THREAD | _CLONE_NEW, _CLONE_THREAD))
    allow("sched_getaffinity", Arg(0, seccomp.EQ, 0))
    allow("prlimit64", Arg(0, seccomp.EQ, 0), Arg(2, seccomp.EQ, 0))  # reading its own limits
    allow("socketpair", Arg(0, seccomp.EQ, _AF_UNIX), Arg(1, seccomp.MASKED_EQ, _SOCK_TYPE, _SOCK_STREAM))
    allow("sendto", Arg(4, seccomp.EQ, 0), Arg(3, seccomp.MASKED_EQ, _MSG_OOB, 0))
    allow("recvfrom", Arg(3, seccomp.MASKED_EQ, _MSG_OOB, 0))
    # Its flags are behind a pointer, out of a filter's reach; libc falls back to clone on ENOSYS.
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
