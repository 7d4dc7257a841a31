"""Attacks on the sandbox: each passes its tests only if it works, and outside of the sandbox it does."""

import json
import os
import subprocess
import sys
import time

import pytest

from galenic.align.rewards import jail, sandbox
from galenic.align.rewards.sandbox import require, run_tests
from galenic.runtime import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux isolates code")


def judged(code, tests="", *, seconds=2.0, memory_mb=512):
    return run_tests(code, tests, seconds=seconds, memory_mb=memory_mb).reason


@pytest.fixture(params=["landlock", "nothing can be opened"])
def both(request, monkeypatch):
    """With the kernel's Landlock, and as where it has none."""
    monkeypatch.setattr(sandbox, "_LANDLOCK", request.param == "landlock")


@pytest.mark.usefixtures("both")
def test_code_that_is_right_and_code_that_is_not():
    double = "def double(x):\n    return 2 * x\n"
    assert judged(double, "assert double(4) == 8\nassert double(-1) == -2") == "passed"
    assert judged(double, "assert double(4) == 9") == "tests"
    assert judged("def double(x: return", "pass") == "error"
    assert judged("raise ValueError", "pass") == "error"
    assert judged(double, "assert triple(4) == 12") == "tests"


@pytest.mark.usefixtures("both")
def test_what_answers_use_is_there():
    code = """
import collections, dataclasses, datetime, decimal, functools, heapq, itertools, json, math, random, re, statistics
from typing import NamedTuple
@dataclasses.dataclass(order=True)
class Dose:
    mg: float
class Point(NamedTuple):
    x: int
"""
    tests = """
assert Dose(1) < Dose(2) and Point(3).x == 3
assert datetime.datetime.strptime("2026-11-27", "%Y-%m-%d").year == 2026
assert json.loads("[1]") == [1] and re.findall("a+", "caat") == ["aa"]
assert decimal.Decimal("0.1") * 3 == decimal.Decimal("0.3") and "é".encode("latin-1") == b"\\xe9"
print("fine")
"""
    assert judged(code, tests) == "passed"


def test_modules_are_imported_as_needed_with_landlock():
    assert judged("import sqlite3, difflib, xml.dom.minidom", "assert sqlite3.sqlite_version") == "passed"


def test_the_order_of_sets_does_not_decide():
    tests = f"assert list({{'a', 'b', 'c', 'd'}}) == {_order()}"
    assert {judged("", tests) for _ in range(3)} == {"passed"}


def _order():
    code = "print(list({'a', 'b', 'c', 'd'}))"
    return subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True
    ).stdout.strip()


# Code that raises unless it gets what it wants. HOME is a folder of the user's, with a file `key`.
REACHES = {
    "reads /etc/passwd": "assert open('/etc/passwd').read()",
    "reads a key": "assert open(HOME + '/key').read()",
    "maps a key": "import mmap, os; f = os.open(HOME + '/key', 0); assert mmap.mmap(f, 0, prot=mmap.PROT_READ)[:]",
    "lists a folder": "import os; assert os.listdir(HOME)",
    "lists the root": "import os; assert os.listdir('/')",
    "reads its parent's memory": "import os; open(f'/proc/{os.getppid()}/environ', 'rb')",
    "reads its own memory's map": "assert open('/proc/self/maps').read()",
    "writes into /tmp": "import tempfile; tempfile.TemporaryFile()",
    "writes a file": "open(HOME + '/new', 'w').write('x')",
    "writes where it stands": "import os; os.chdir(HOME); open('here', 'w').write('x')",
    "writes to the shared memory": "open('/dev/shm/galenic-test-' + __import__('os').path.basename(HOME), 'w')",
    "truncates while reading": "import os; os.open(HOME + '/key', os.O_RDONLY | os.O_TRUNC)",
    "opens for both": "import os; os.open(HOME + '/key', os.O_RDWR)",
    "truncates": "import os; os.truncate(HOME + '/key', 0)",
    "removes": "import os; os.remove(HOME + '/key')",
    "renames": "import os; os.rename(HOME + '/key', HOME + '/lock')",
    "links": "import os; os.symlink('/', HOME + '/link')",
    "links hard": "import os; os.link(HOME + '/key', HOME + '/twin')",
    "makes a folder": "import os; os.mkdir(HOME + '/folder')",
    "makes a pipe with a name": "import os; os.mkfifo(HOME + '/fifo')",
    "changes rights": "import os; os.chmod(HOME + '/key', 0o777)",
    "changes times": "import os; os.utime(HOME + '/key', (0, 0))",
    "changes the owner": "import os; os.chown(HOME + '/key', os.getuid(), os.getgid())",
    "sets attributes": "import os; os.setxattr(HOME + '/key', 'user.x', b'1')",
    "forks": "import os; pid = os.fork(); os._exit(0) if not pid else os.waitpid(pid, 0)",
    "spawns": "import os, sys; os.waitpid(os.posix_spawn(sys.executable, ['p', '-c', ''], {}), 0)",
    "runs a program": "import subprocess; subprocess.run(['true'], check=True)",
    "runs a shell": "import os; assert os.system('true') == 0",
    "becomes a program": "import os; os.execv('/bin/true', ['true'])",
    "starts a thread": "import threading; t = threading.Thread(target=int); t.start(); t.join()",
    "opens a TCP socket": "import socket; socket.socket()",
    "opens a UDP socket": "import socket; socket.socket(type=socket.SOCK_DGRAM)",
    "opens a Unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "pairs sockets": "import socket; socket.socketpair()",
    "asks for a name": "import socket; socket.getaddrinfo('localhost', 80)",
    "signals its parent": "import os; os.kill(os.getppid(), 0)",
    "signals all": "import os; os.kill(-1, 0)",
    "has signals sent for it": "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "raises its limits": "import resource as r; r.setrlimit(r.RLIMIT_CORE, r.getrlimit(r.RLIMIT_CORE))",
    "raises its parent's limits": "import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_CORE)",
    "changes its priority": "import os; os.nice(0)",
    "moves to other cores": "import os; os.sched_setaffinity(0, os.sched_getaffinity(0))",
    "makes files in memory": "import os; os.memfd_create('x')",
    "shares memory": "import _posixshmem as m, os; m.shm_open('/gal', os.O_CREAT | os.O_RDWR); m.shm_unlink('/gal')",
}  # fmt: skip


@pytest.mark.parametrize("name", REACHES)
@pytest.mark.usefixtures("both")
def test_nothing_is_reached(name, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret")
    before = key.stat()
    code = f"HOME = {str(tmp_path)!r}\n{REACHES[name]}"
    assert judged(code) in ("error", "stopped")
    assert judged("", f"HOME = {str(tmp_path)!r}\n{REACHES[name]}") in ("tests", "stopped")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key"]
    after = key.stat()
    assert (after.st_size, after.st_mode, after.st_mtime) == (before.st_size, before.st_mode, before.st_mtime)
    assert key.read_text() == "secret"


HARMLESS = sorted(set(REACHES) - {"signals all", "sets attributes", "writes to the shared memory"})


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMLESS)
def test_these_attacks_work_outside(name, tmp_path):
    (tmp_path / "key").write_text("secret")
    code = f"HOME = {str(tmp_path)!r}\n{REACHES[name]}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.usefixtures("both")
def test_every_other_system_call_is_refused():
    machine = jail.MACHINES[os.uname().machine][0]
    allowed = {numbers[machine] for numbers in jail.CALLS.values()}
    if sandbox._LANDLOCK:
        allowed |= {numbers[machine] for numbers in jail.OPENING.values()}
    unseen = {335, 336} if machine == 0 else set()  # uretprobe and uprobe: the kernel lets no filter see them
    code = f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
open_to_it = []
for number in (*range(600), *range(2**30, 2**30 + 600)):  # x86-64's other numbering too
    if number in {allowed | unseen!r}:
        continue
    ctypes.set_errno(0)
    if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != errno.EPERM:
        open_to_it.append(number)
"""
    assert judged(code, "assert open_to_it == []") == "passed"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="machine code of x86-64")
def test_system_calls_of_other_architectures_are_refused():
    # getpid of 32 bits (int 0x80), then return: allowed in 64 bits, and another call's number.
    code = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex(MACHINE))
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
    assert judged(code.replace("MACHINE", repr("31c0c3"))) in ("passed", "stopped")  # the means are there
    assert judged(code.replace("MACHINE", repr("b814000000cd80c3"))) == "stopped"


PRETENDS = {
    "leaves": "import os; os._exit(0)",
    "exits": "import sys; sys.exit(0)",
    "exits in a test": "def f(x):\n    raise SystemExit(0)",
    "leaves in a test": "import os\ndef f(x):\n    os._exit(0)",
    "leaves at the end": "import atexit, os; atexit.register(os._exit, 0)",
    "prints a verdict": "print('passed', flush=True)\nimport os; os._exit(0)",
    "writes verdicts everywhere": """
import os
for descriptor in range(64):
    try:
        os.write(descriptor, b'00000000000000000000000000000000 passed')
    except OSError:
        pass
os._exit(0)""",
    "puts exec away": "import builtins; builtins.exec = builtins.compile = lambda *a, **k: None",
    "puts asserts away": "import builtins; builtins.AssertionError = SystemExit",
    "catches everything": "import builtins; builtins.BaseException = ZeroDivisionError",
    "puts write away": "import os; os.write = lambda *a: None",
    "kills itself": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "aborts": "import os; os.abort()",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "falls without end": "def f(x):\n    return f(x)",
    "closes everything": "import os; os.closerange(0, 64)",
    "floods the pipe": """
import os
while True:
    for descriptor in range(1, 64):
        try:
            os.write(descriptor, b'x' * 65536)
        except OSError:
            pass""",
    "asks for the request": "import os\nos.lseek(0, 0, 0)\nassert os.read(0, 99)\ndef f(x): return 2",
}


@pytest.mark.parametrize("name", PRETENDS)
def test_a_verdict_cannot_be_pretended(name):
    wrong = "def f(x):\n    return 3\n"
    assert judged(wrong + PRETENDS[name], "assert f(1) == 2") not in ("passed", "time")


def test_endless_code_is_ended():
    start = time.monotonic()
    assert (
        judged("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", seconds=1)
        == "time"
    )
    assert judged("", "while True: print('x' * 1000)", seconds=1) == "time"
    assert time.monotonic() - start < 60


def test_waiting_code_is_ended(monkeypatch):
    monkeypatch.setattr(sandbox, "_WAIT", 0.5)
    assert judged("import time; time.sleep(3600)", seconds=1) == "time"
    assert (
        judged("import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()", seconds=1)
        == "time"
    )


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(2**40)",
        "x = [0] * 10**12",
        "x = 'a' * 2**33",
        "x = []\nwhile True: x.append(bytearray(2**20))",
        "x = 9 ** 9 ** 9 ** 9",
    ],
)
def test_memory_is_limited(code):
    assert judged(code, memory_mb=128, seconds=1) in ("memory", "time")


def test_the_parent_is_out_of_reach(tmp_path):
    """An attack that kills whatever it can: were it to work, this small parent would not print."""
    attack = """
import os, signal
parent = os.getppid()
for send in (os.kill, os.killpg, lambda pid, number: signal.pidfd_send_signal(os.pidfd_open(pid), number)):
    for target in (parent, -parent):
        try:
            send(target, signal.SIGKILL)
        except (OSError, ValueError):
            pass
"""
    parent = f"""
from galenic.align.rewards import run_tests
print(run_tests({attack!r}, "pass", seconds=2, memory_mb=256).reason)
"""
    found = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, start_new_session=True
    )
    assert (found.returncode, found.stdout.strip()) == (0, "passed"), found.stderr


def test_code_dies_with_its_parent():
    parent = """
from galenic.align.rewards import run_tests
run_tests("import time; time.sleep(600)", "", seconds=500, memory_mb=256)
"""
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        children = _wait(lambda: _jailed(process.pid))
        assert children
        process.kill()
        process.wait()
        assert _wait(lambda: not any(_alive(pid) for pid in children))


def _jailed(parent):
    path = f"/proc/{parent}/task/{parent}/children"
    if not os.path.exists(path):
        pytest.skip("this kernel does not list children")
    with open(path) as file:
        return [int(pid) for pid in file.read().split()]


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().split()[2] != "Z"


def _wait(condition):
    for _ in range(200):
        if found := condition():
            return found
        time.sleep(0.05)
    return None


def test_nothing_of_ours_is_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("GALENIC_TOKEN", "secret")
    with open(tmp_path / "open", "w+") as file:
        os.set_inheritable(file.fileno(), True)
        tests = f"""
import os, sys
assert dict(os.environ) in ({{"PYTHONHASHSEED": "0"}}, {{"PYTHONHASHSEED": "0", "LC_CTYPE": "C.UTF-8"}})
assert os.getcwd() == "/" and not any("galenic" in name for name in sys.modules)
seen = []
for descriptor in range(64):
    try:
        os.fstat(descriptor)
        seen.append(descriptor)
    except OSError:
        pass
assert len(seen) <= 5 and {file.fileno()} not in seen or {file.fileno()} == int(sys.argv[1])
"""
        assert judged("", tests) == "passed"


def test_no_descriptor_and_no_process_is_left():
    before = len(os.listdir("/proc/self/fd"))
    for code in ("", "raise ValueError", "import os; os._exit(3)", "while True: pass"):
        judged(code, seconds=1)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_what_cannot_isolate_refuses(monkeypatch, tmp_path):
    broken = tmp_path / "jail.py"
    source = open(jail.__file__).read()
    broken.write_text(source.replace('"x86_64": (0', '"other": (0').replace('"aarch64"', '"another"'))
    monkeypatch.setattr(sandbox, "_JAIL", broken)
    with pytest.raises(UserError, match="cannot isolate code"):
        judged("", "pass")
    # A kernel that takes the filter and does not heed it is noticed too.
    broken.write_text(source.replace("_call(libc.prctl, 22, 2, header, 0, 0)", "header"))
    with pytest.raises(UserError, match="could still be opened"):
        judged("", "pass")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="only Linux"):
        judged("", "pass")


def test_limits_that_are_too_small_are_told():
    with pytest.raises(UserError, match="code_memory_mb 10"):
        require(seconds=1, memory_mb=10)
    require(seconds=1, memory_mb=128)


def test_odd_texts_are_errors_and_no_more():
    for text in ("\ud800", "\0", "(" * 10_000, "é = 1\nassert é == 1\n" + json.dumps("\u2028"), "\t x"):
        assert judged(text) in ("error", "passed", "stopped", "memory")


def test_filter_of_arm64_is_whole():
    """No such machine here: the program at least has its calls, its architecture, and ends in a refusal."""
    column, architecture = jail.MACHINES["aarch64"]
    program = jail.filter_program(column, architecture, reading=True)
    words = [int.from_bytes(program[place + 4 : place + 8], "little") for place in range(0, len(program), 8)]
    assert words[1] == 0xC00000B7 and words[-1] == 0x00050000 | 1 and {63, 64, 94, 56} <= set(words)
