"""The process in which an answer's code meets its tests: `sandbox.run_tests` starts it as a script.

Before any of that code runs, the process gives up, for good, whatever it could do harm with:

    no new privileges; limits of processor time, memory and descriptors; dies with its parent
    Landlock   reads the Python library and nothing else; where the kernel has none, nothing is opened at all
    seccomp    a list of what is allowed: no sockets, no processes or threads, no signals to others, no opening for
               writing, no change to any file, no other program (Linux lets no filter see uprobe and uretprobe, with
               which a process can only end itself)

It imports nothing of Galenic and sees an empty environment.
"""

import ctypes
import errno
import json
import math
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Mapping
from typing import Any

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> column of `CALLS`, and its name in `linux/audit.h`."""

CALLS = {
    # system call: number on x86-64, on ARM64 (None: it has none). What is not here fails with EPERM.
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "readv": (19, 65), "writev": (20, 66), "access": (21, None), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "dup": (32, 23), "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None),
    "setitimer": (38, 103), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "getcwd": (79, 17),
    "readlink": (89, None), "gettimeofday": (96, 169), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178), "time": (201, None), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "restart_syscall": (219, 128),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "getrandom": (318, 278),
    "statx": (332, 291), "faccessat2": (439, 439),
}  # fmt: skip
OPENING = {"open": (2, None, 1), "openat": (257, 56, 2)}
"""Allowed for reading only: the third number is the argument that holds the flags."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

LIBRARY = (
    os.path.dirname(os.__file__),
    os.path.join(sys.base_prefix, "lib"),
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
)
NEEDED = ("/etc/ld.so.cache", "/dev/null", "/dev/urandom", "/usr/share/zoneinfo")


def main() -> None:
    """Reads the request, locks itself in, runs code and tests, and tells how it went."""
    request = json.loads(sys.stdin.buffer.read())
    said = int(sys.argv[1])  # descriptor of the pipe to the parent
    secret = request["secret"]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    write, leave = os.write, os._exit  # what the code puts in their place later does not matter
    try:
        lock(request)
    except (OSError, KeyError) as error:
        write(said, f"{secret} cannot: {error}".encode())
        leave(1)
    outcome = judge(request["code"], request["tests"])
    write(said, f"{secret} {outcome}".encode())
    leave(0)


def judge(code: str, tests: str) -> str:
    """Runs code, then tests, in one module of their own.

    Returns:
        `passed`, `error` (the code failed), `tests` (a test did) or `memory`.
    """
    understand, execute = compile, exec  # the code may put others in their place, so that tests do nothing
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    space = module.__dict__
    for text, failed in ((code, "error"), (tests, "tests")):
        try:
            execute(understand(text, f"<{failed}>", "exec"), space)
        except MemoryError:
            return "memory"
        except BaseException:  # SystemExit too: leaving is not passing
            return failed
    return "passed"


# ---------------------------------------------------------------------------- locking


def lock(request: Mapping[str, Any]) -> None:
    """Gives up everything but computing.

    Args:
        request: `parent`, its process (where that is gone, so is the reason to run); `seconds` of processor time,
            rounded up to whole ones; `memory_mb` of address space; `landlock`, whether to use it where the kernel has
            it; `modules` that are loaded before, where nothing can be opened later.

    Raises:
        OSError, KeyError: it cannot be done here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    column, architecture = MACHINES[os.uname().machine]
    _call(libc.prctl, 1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != request["parent"]:
        os._exit(1)
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CPU, math.ceil(request["seconds"])),
        (resource.RLIMIT_AS, request["memory_mb"] << 20),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    _call(libc.prctl, 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    reading = request["landlock"] and confine(libc)
    if not reading:
        for name in request["modules"]:
            __import__(name)
    program = filter_program(column, architecture, reading=reading)
    instructions = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(
        struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    )
    _call(libc.prctl, 22, 2, header, 0, 0)  # PR_SET_SECCOMP, a filter
    for path, flags in ((os.devnull, os.O_WRONLY), ("/", os.O_RDONLY)):
        try:
            os.open(path, flags)
        except PermissionError:
            continue
        raise OSError(errno.ENOTSUP, f"{path} could still be opened")


def confine(libc: ctypes.CDLL) -> bool:
    """Lets only Python's library be read from now on (Landlock); False where the kernel cannot."""
    create, add, restrict, file, folder = 444, 445, 446, 1 << 2, 1 << 3
    attributes = ctypes.create_string_buffer(struct.pack("Q", file | folder), 8)
    try:
        rules = _call(libc.syscall, create, attributes, 8, 0)
    except OSError:
        return False
    for path in (*LIBRARY, *NEEDED):
        try:
            place = os.open(path, os.O_PATH)
        except FileNotFoundError:
            continue
        rights = file | folder if os.path.isdir(path) else file
        _call(
            libc.syscall, add, rules, 1, ctypes.create_string_buffer(struct.pack("=Qi", rights, place), 12), 0
        )
        os.close(place)
    _call(libc.syscall, restrict, rules, 0)
    os.close(rules)
    return True


def filter_program(column: int, architecture: int, *, reading: bool) -> bytes:
    """Writes the filter of system calls (classic BPF on `struct seccomp_data`: number, architecture, ..., arguments).

    Args:
        column: of `CALLS`.
        architecture: calls of any other kill the process.
        reading: whether files may be opened to be read.
    """
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    for numbers in CALLS.values():
        if numbers[column] is not None:
            program += [(equal, 0, 1, numbers[column]), (give, 0, 0, allow)]
    for *numbers, argument in OPENING.values() if reading else ():
        if numbers[column] is not None:
            program += [
                (equal, 0, 4, numbers[column]),
                (load, 0, 0, 16 + 8 * argument),
                (any_bit, 0, 1, WRITING),
                (give, 0, 0, refuse),
                (give, 0, 0, allow),
            ]
    program.append((give, 0, 0, refuse))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _call(function: Any, *arguments: Any) -> int:
    """Calls into the C library: whole words, buffers by their address.

    Raises:
        OSError: it failed.
    """
    words = [ctypes.addressof(one) if isinstance(one, ctypes.Array) else one for one in arguments]
    result = function(*map(ctypes.c_ulong, words))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} in call {words[:2]}")
    return result


if __name__ == "__main__":
    main()
