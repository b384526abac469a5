"""A fork server that runs model-written programs: one forked child for each program and input,
behind several walls.

verify/pool.py starts it as `python -I -S sandbox.py` with an empty environment; nobody imports it;
standard library only.
Owns: what a hostile program can reach.
Refuses to know: expected outputs, scores, rows, and how many seconds and bytes a program gets: they
come with it (TEST_SECONDS in rewards.py, MEMORY in pool.py). It never runs a program itself.

Every child starts from the same image: the usual modules imported, no environment, no descriptors
but its input and its output (memory files: nothing blocks on a pipe, a flood ends at a size), hash
and random seeds fixed. The walls:
  rlimits     CPU, memory, output size, descriptors, threads; no core files
  uid         when started by root: an id that nothing else on the machine has, and no capabilities
  namespaces  user, pid, network, ipc, mount, uts: nothing to signal, nothing to connect to (not in
              most containers)
  landlock    files: reading below the interpreter's own folders, nothing else; no TCP, signals out,
              abstract sockets
  seccomp     about a hundred system calls are known, the rest does not exist: no fork, exec,
              sockets, ptrace, writing
and always: a session and a parent-death signal for each child, no_new_privs, no core or ptrace by
others of its uid. None of them is enough alone (tests/test_sandbox.py switches each off); seccomp
plus Landlock or namespaces is required.

Protocol, on stdin and stdout: 4 bytes of length, JSON. First a configuration {"path", "preload",
"warm_up", "off"} in, {"layers", "missing"} out. Then jobs: {"kind": "stdin" | "call", "fn_name",
"cpu", "wall", "memory", "output", "program", "input"} where the last two are byte counts of what
follows; {"status", "cpu", "wall", "output"} and as many bytes come back. "status": "ok" | "timeout"
| "memory" | "crash" | "output". Bytes of programs and outputs never enter the memory of this
process, from which all later children are forked: splice and sendfile move them.

Left out on purpose: stderr (discarded), files a program might write, packages beyond those
preloaded, cgroups (they need a set-up by root outside).
"""

import os


def ignore_fork_hooks(**hooks):
    """For threading, logging, random: this process has one thread, and wants the same random
    numbers in every child. A third of the time of a fork goes there."""


os.register_at_fork = ignore_fork_hooks  # before those modules are imported
import atexit
import builtins
import ctypes
import errno
import functools
import gc
import json
import math
import platform
import random
import re
import resource
import select
import signal
import struct
import sys
import threading
import time
from typing import NamedTuple

# Others are found when they are imported, but each child pays for the size of these.
PRELOAD = """array binascii bisect bz2 collections copy dataclasses datetime decimal encodings.ascii
encodings.latin_1 enum fractions functools heapq io itertools json lzma math operator queue random
re statistics string sys threading time typing zlib""".split()
# What programming sites import before a submitted function.
PRELUDE = """
from typing import *
from collections import *
from heapq import *
from bisect import *
from itertools import *
from functools import *
from math import *
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator
import random, re, statistics, string, sys
from builtins import *
"""
OUT_OF_MEMORY = 77  # exit status of a child whose MemoryError nobody caught
libc = ctypes.CDLL(None, use_errno=True)


def must(succeed: bool, what: str):
    if not succeed:
        raise OSError(ctypes.get_errno(), what)


def prctl(option: int, value: int) -> int:
    return libc.prctl(option, value, 0, 0, 0)


# ----------------------------------------------------------------------------------------- seccomp
# The calls that a program may make, with their numbers on x86_64 and on aarch64, - where there is
# none. From the kernel's syscall tables.
SYSCALLS = """
read                   0       63
write                  1       64
open                   2        -
close                  3       57
stat                   4        -
fstat                  5       80
lstat                  6        -
poll                   7        -
lseek                  8       62
mmap                   9      222
mprotect              10      226
munmap                11      215
brk                   12      214
rt_sigaction          13      134
rt_sigprocmask        14      135
rt_sigreturn          15      139
ioctl                 16       29
pread64               17       67
pwrite64              18       68
readv                 19       65
writev                20       66
access                21        -
pipe                  22        -
select                23        -
sched_yield           24      124
mremap                25      216
madvise               28      233
dup                   32       23
dup2                  33        -
pause                 34        -
nanosleep             35      101
getitimer             36      102
alarm                 37        -
setitimer             38      103
getpid                39      172
socket                41      198
sendto                44      206
recvfrom              45      207
getsockname           51      204
getpeername           52      205
socketpair            53      199
clone                 56      220
exit                  60       93
kill                  62      129
uname                 63      160
fcntl                 72       25
getcwd                79       17
readlink              89        -
gettimeofday          96      169
getrlimit             97      163
getrusage             98      165
sysinfo               99      179
times                100      153
getuid               102      174
getgid               104      176
geteuid              107      175
getegid              108      177
getppid              110      173
getpgrp              111        -
sigaltstack          131      132
setrlimit            160      164
gettid               186      178
time                 201        -
futex                202       98
sched_getaffinity    204      123
getdents64           217       61
restart_syscall      219      128
clock_gettime        228      113
clock_getres         229      114
clock_nanosleep      230      115
exit_group           231       94
epoll_wait           232        -
epoll_ctl            233       21
tgkill               234      131
openat               257       56
newfstatat           262       79
readlinkat           267       78
faccessat            269       48
pselect6             270       72
ppoll                271       73
set_robust_list      273       99
epoll_pwait          281       22
eventfd2             290       19
epoll_create1        291       20
dup3                 292       24
pipe2                293       59
prlimit64            302      261
getrandom            318      278
membarrier           324      283
statx                332      291
rseq                 334      293
faccessat2           439      439
"""
MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column above, AUDIT_ARCH_*
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF opcodes
ITSELF = 0x7E57AB1E  # no process id is that large
O_TMPFILE = 0o20000000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | O_TMPFILE
CLONE_THREAD = 0x10000
FIONBIO = 0x5421
X32_CALLS = 0x40000000


def reply(code: int) -> tuple:
    return (RETURN, 0, 0, code)


def fail(error: int) -> tuple:
    """The call does nothing and answers `error`."""
    return reply(0x00050000 | error)


ALLOW, KILL = reply(0x7FFF0000), reply(0x80000000)


def argument(i: int, half: int = 0) -> tuple:
    """Loads the low half of argument i, or its high half, 1: struct seccomp_data holds 64-bit
    arguments from byte 16."""
    return (LOAD, 0, 0, 16 + 8 * i + 4 * half)


def only(i: int, *values: int, error: int = errno.EPERM) -> list[tuple]:
    """Allow when the low half of argument i is one of `values`."""
    tests = [(EQUAL, len(values) - k, 0, value) for k, value in enumerate(values)]
    return [argument(i), *tests, fail(error), ALLOW]


def any_bit(i: int, bits: int, then: tuple, otherwise: tuple) -> list[tuple]:
    """One reply when the low half of argument i has some of `bits`, and another when none."""
    return [argument(i), (ANY_BIT, 0, 1, bits), then, otherwise]


def zero(i: int, skip: int) -> list[tuple]:
    """Goes on when argument i is 0, all of it, else leaves out the next `skip` instructions."""
    return [argument(i), (EQUAL, 0, skip + 2, 0), argument(i, 1), (EQUAL, 0, skip, 0)]


def seccomp_program(may_open: bool) -> bytes:
    """The filter as struct sock_filter[]: (code, jump if true, jump if false, operand); jumps count
    instructions forward. An unknown call answers ENOSYS, as on an old kernel, so that libraries
    fall back instead of crashing. ITSELF stands for the process id, which is known only after the
    fork; the program takes longer to write than to load."""
    column, audit = MACHINES[platform.machine()]
    refuse = fail(errno.EPERM)
    no_file = fail(errno.EACCES)
    to_read = ALLOW if may_open else no_file
    rules = {
        "clone": any_bit(0, CLONE_THREAD, ALLOW, refuse),
        "kill": only(0, ITSELF),
        "tgkill": only(0, ITSELF),
        # TIOCSTI, FIOSETOWN and the rest: not a terminal
        "ioctl": only(1, FIONBIO, error=errno.ENOTTY),
        # dup, flags. F_SETOWN would be a way to kill
        "fcntl": only(1, 0, 1, 2, 3, 4, 1030, error=errno.EINVAL),
        "socket": [refuse],
        "socketpair": only(0, 1),  # AF_UNIX: asyncio wakes itself up with one
        "sendto": [*zero(4, 1), ALLOW, refuse],  # without an address
        "setrlimit": [fail(0)],  # raising a limit "works", silently
        # without a new limit, and of itself
        "prlimit64": [*zero(2, 3), argument(0), (EQUAL, 0, 1, 0), ALLOW, fail(0)],
        "open": any_bit(1, WRITING, no_file, to_read),
        "openat": any_bit(2, WRITING, no_file, to_read),
    }
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), KILL, (LOAD, 0, 0, 0)]
    if platform.machine() == "x86_64":
        program += [(AT_LEAST, 0, 1, X32_CALLS), KILL]  # that table has other numbers
    for line in SYSCALLS.strip().splitlines():
        row = line.split()
        if row[column] != "-":
            rule = rules.get(row[0], [ALLOW])
            program += [(EQUAL, 0, len(rule), int(row[column])), *rule]
    program.append(fail(errno.ENOSYS))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def forbid_system_calls(program: bytes):
    program = program.replace(struct.pack("I", ITSELF), struct.pack("I", os.getpid()))
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    must(libc.prctl(22, 2, header, 0, 0) == 0, "seccomp")


# -------------------------------------------------------------------------- the other walls, once
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls of Landlock
READ_FILE, READ_DIR = 0b100, 0b1000
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many each version knows; later ones have 16


def restrict_files():
    """Landlock: no file but for reading modules. docs.kernel.org/userspace-api/landlock.html"""
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    must(version > 0, "landlock")
    every_right = (1 << FILE_RIGHTS.get(version, 16)) - 1
    size = 24
    if version < 6:  # no abstract sockets and signals out
        size = 16
    if version < 4:  # no bind and connect of TCP
        size = 8
    attributes = struct.pack("QQQ", every_right, 3, 3)
    ruleset = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    folders = [path for path in sys.path if path.startswith("/")]
    for path in [*folders, "/dev/null", "/usr/share/zoneinfo"]:
        if os.path.exists(path):
            allowed = READ_FILE
            if os.path.isdir(path):
                allowed |= READ_DIR
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, beneath), 0)
            os.close(beneath)
    must(ruleset >= 0 and libc.syscall(RESTRICT_SELF, ruleset, 0) == 0, "landlock")
    os.close(ruleset)


def keep_in_sight():
    """Where the interpreter lies in a folder that only root may enter, modules are found through a
    descriptor of it."""
    seen = {}
    folders = filter(os.path.isdir, dict.fromkeys(sys.path))
    for number, path in enumerate(folders, 300):  # above what children close
        os.dup2(os.open(path, os.O_PATH), number)
        seen[path] = f"/proc/self/fd/{number}"
    sys.path[:] = [seen.get(path, path) for path in sys.path]
    for module in list(sys.modules.values()):
        if hasattr(module, "__path__"):  # packages remember where their parts lie
            for path, link in seen.items():
                module.__path__ = [part.replace(path, link) for part in module.__path__]


def become_nobody():
    if os.geteuid():
        raise OSError(errno.EPERM, "started by an ordinary user")
    # below 65536: containers map no more; another one for every server on the machine
    uid = 20_000 + os.getpid() % 40_000
    keep_in_sight()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


# CLONE_NEW: USER 0x10000000, NET 0x40000000, PID 0x20000000, IPC 0x08000000, UTS 0x04000000 and
# NS (mounts) 0x00020000
NAMESPACES = 0x7C020000


def enter_namespaces():
    maps = {
        "setgroups": "deny",
        "uid_map": f"65534 {os.geteuid()} 1",
        "gid_map": f"65534 {os.getegid()} 1",
    }
    prctl(4, 1)  # dumpable, or the files below are not ours
    must(libc.unshare(NAMESPACES) == 0, "unshare")
    for name, text in maps.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    first = os.fork()  # the first process in the new pid namespace: when it dies, all in it die
    if first:
        os.closerange(0, 3)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 255)
    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def no_new_privileges():
    prctl(4, 0)  # PR_SET_DUMPABLE: no core, no ptrace, /proc/N/* belongs to root
    # PR_SET_NO_NEW_PRIVS, which Landlock and seccomp ask for
    must(prctl(38, 1) == 0, "no_new_privs")


def works(filter_program: bytes) -> bool:
    """Does this kernel take the filter? In a child of its own, since there is no way back."""
    trial = os.fork()
    if trial:
        return os.waitpid(trial, 0)[1] == 0
    try:
        forbid_system_calls(filter_program)
        os._exit(0)
    finally:
        os._exit(1)


def import_modules(config: dict) -> dict:
    """Everything that the children share. Returns why modules that the pool asked for are
    missing."""
    sys.path += config["path"]
    missing = {}
    for name in PRELOAD + config["preload"]:
        try:
            __import__(name)
        except ImportError as error:
            if name in config["preload"]:
                missing[name] = str(error)
    if not missing:
        exec(config["warm_up"], {})  # our own code
    return missing


def set_up(config: dict):
    """Imports, then the walls that all children share. Returns {"layers": those that stand,
    "missing": why others do not}, and the filter for each child, empty without."""
    off = config["off"]
    layers = []
    missing = import_modules(config)
    libc.mallopt(-8, 1)  # M_ARENA_MAX: each thread's own arena would take 64 MB of address space
    prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    os.chdir("/")

    def raise_wall(layer: str, step):
        if layer not in off:
            try:
                step()
                layers.append(layer)
            except OSError as error:
                missing[layer] = str(error)

    raise_wall("uid", become_nobody)
    raise_wall("namespaces", enter_namespaces)
    no_new_privileges()
    raise_wall("landlock", restrict_files)
    if "rlimits" not in off:  # the rest is different for each job
        layers.append("rlimits")
        limit(NOFILE=64, CORE=0, STACK=100 << 20)
        kernel = [int(part) for part in re.findall(r"\d+", platform.release())]
        # else all processes of the user count; a namespace has its own count since Linux 5.14
        if "uid" in layers or ("namespaces" in layers and kernel >= [5, 14]):
            limit(NPROC=256)
    filter_program = b""
    if "seccomp" not in off:
        if platform.machine() in MACHINES:  # without Landlock nothing may be opened
            filter_program = seccomp_program(may_open="landlock" in layers or "open" in off)
        if filter_program and works(filter_program):
            layers.append("seccomp")
        else:
            filter_program = b""
            missing["seccomp"] = f"not on this kernel or machine ({platform.machine()})"
    return {"layers": sorted(layers), "missing": missing}, filter_program


# ----------------------------------------------------------------------------------------- one job


class Image(NamedTuple):
    """What every child starts from."""

    layers: list[str]
    filter_program: bytes  # of seccomp; empty without
    prelude: dict  # names that a submitted function finds


def limit(**limits: int):
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        largest = resource.getrlimit(which)[1] % (1 << 64)  # -1 is infinity
        soft = min(value, largest)
        hard = soft
        if name == "CPU":  # a signal first, the end a second later
            hard = min(value + 1, largest)
        resource.setrlimit(which, (soft, hard))


def slurp(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def take_descriptors(call: bool, given: int, output: int):
    """Standard input and output for a program. A function's result goes to descriptor 3, and it has
    neither. All others are closed."""
    null = 2
    kept = [null, null, null, output] if call else [given, output, null]
    for number, descriptor in enumerate(kept):
        os.dup2(descriptor, number)
    os.closerange(len(kept), 256)


def find_function(names: dict, name: str):
    """The method of class Solution, or the function of the module."""
    solution = names.get("Solution")
    if hasattr(solution, name):
        return getattr(solution(), name)
    return names[name]


def exit_status_of(code: object) -> int:
    """Of SystemExit, as Python has it."""
    if isinstance(code, int):
        return code & 255
    return 0 if code is None else 1


def flush_everything(names: dict):
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):
        if stream and not stream.closed:
            stream.flush()
    names.clear()  # closes other files on the output: what they hold is written
    if not sys.__stdout__.closed:
        sys.__stdout__.flush()


def child(job: dict, program: int, given: int, output: int, image: Image) -> int:
    """Runs one program in this process, the forked child, and returns its exit status."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    prctl(1, signal.SIGKILL)
    os.setsid()
    call = job["kind"] == "call"
    source = slurp(program)
    arguments = json.loads(slurp(os.dup(given))) if call else []
    take_descriptors(call, given, output)
    if "rlimits" in image.layers:
        limit(CPU=max(1, math.ceil(job["cpu"])), AS=job["memory"], FSIZE=job["output"])
    for number in (signal.SIGXFSZ, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    main = type(sys)("solution" if call else "__main__")
    names = main.__dict__
    if call:
        names.update(image.prelude)
    names.update(__builtins__=builtins, __name__=main.__name__, __file__="main.py")
    sys.modules["__main__"] = sys.modules[main.__name__] = main
    dumps = json.dumps  # before a program can change it
    exit_status = 0
    if image.filter_program:
        forbid_system_calls(image.filter_program)
    try:
        try:
            exec(compile(source, "main.py", "exec", dont_inherit=True), names)
            if call:
                function = find_function(names, job["fn_name"])
                result = dumps(function(*arguments)).encode()
                while result:
                    result = result[os.write(3, result) :]
        finally:
            threading._shutdown()
    except SystemExit as error:
        exit_status = exit_status_of(error.code)
    except MemoryError:
        exit_status = OUT_OF_MEMORY
    except BaseException:
        exit_status = 1
    try:
        flush_everything(names)
    except BaseException:
        exit_status = exit_status or 1
    return exit_status


def memory_file(count: int = 0) -> int:
    """A file in memory with the next `count` bytes of stdin."""
    descriptor = os.memfd_create("file", 0)
    while count:
        moved = os.splice(0, descriptor, count)
        if not moved:
            os._exit(0)
        count -= moved
    os.lseek(descriptor, 0, 0)
    return descriptor


def wait_for(pid: int, wall: float):
    """(status, usage, was it killed for its time?) of a child that has `wall` seconds."""
    deadline = time.monotonic() + wall
    timed_out = False
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return status, usage, timed_out
        left = deadline - time.monotonic()
        if left <= 0 and not timed_out:
            timed_out = True
            os.kill(pid, signal.SIGKILL)
        signal.sigtimedwait([signal.SIGCHLD], min(0.5, max(left, 0.001)))
        if select.select([0], [], [], 0)[0]:  # nobody writes during a job: the trainer is gone
            os._exit(0)


def kill_strangers():
    """In a pid namespace, whoever is left after a child; impossible under seccomp."""
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.waitpid(-1, 0)
    except (ChildProcessError, ProcessLookupError):
        pass


def outcome_of(job: dict, status: int, cpu: float, size: int) -> str:
    """Of a child that was not killed for its time; `size` is that of its output."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU or cpu > job["cpu"]:
        return "timeout"
    if code == -signal.SIGXFSZ or size >= job["output"]:
        return "output"
    if code in (-signal.SIGKILL, OUT_OF_MEMORY):
        return "memory"  # the first: the kernel's out-of-memory killer
    return "crash" if code else "ok"


def run(job: dict, image: Image):
    """Runs the program, and sends what came of it."""
    program = memory_file(job["program"])
    given = memory_file(job["input"])
    output = memory_file()
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        try:
            os._exit(child(job, program, given, output, image))
        finally:
            os._exit(1)
    os.close(program)
    os.close(given)
    status, usage, timed_out = wait_for(pid, job["wall"])
    if "namespaces" in image.layers:
        kill_strangers()
    cpu = usage.ru_utime + usage.ru_stime
    size = os.fstat(output).st_size
    result = {
        "status": "timeout" if timed_out else outcome_of(job, status, cpu, size),
        "cpu": cpu,
        "wall": time.monotonic() - start,
        "output": min(size, job["output"]),
    }
    send(result)
    send_file(output, result["output"])
    os.close(output)


# ---------------------------------------------------------------------------------------- protocol


def read(count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = os.read(0, count - len(data))
        if not more:
            os._exit(0)
        data += more
    return data


def receive() -> dict:
    return json.loads(read(int.from_bytes(read(4), "big")))


def send(message: dict):
    data = json.dumps(message).encode()
    data = struct.pack(">I", len(data)) + data
    while data:
        data = data[os.write(1, data) :]


def send_file(descriptor: int, count: int):
    sent = 0
    while sent < count:
        moved = os.sendfile(1, descriptor, sent, count - sent)
        if not moved:
            os._exit(0)
        sent += moved


def make_streams():
    """Made here, unused here: they know only a number, which is another file in each child."""
    stream = functools.partial(open, encoding="utf-8", closefd=False)
    sys.stdin = sys.__stdin__ = stream(0, "r", errors="replace")
    sys.stdout = sys.__stdout__ = stream(1, "w", errors="backslashreplace")
    sys.stderr = sys.__stderr__ = stream(2, "w", errors="backslashreplace")


def main():
    if os.environ.get("PYTHONHASHSEED") != "0":
        # the order of a set of strings is part of a program's result
        command = [sys.executable, "-S", "-s", "-P", __file__]
        os.execve(sys.executable, command, {"PYTHONHASHSEED": "0"})
    os.environ.clear()
    # as in the years that the problems come from; time is limited anyway
    sys.set_int_max_str_digits(0)
    walls, filter_program = set_up(receive())
    image = Image(walls["layers"], filter_program, prelude={})
    exec(PRELUDE, image.prelude)
    random.seed(0)
    sys.argv = ["main.py"]
    builtins.exit = builtins.quit = sys.exit
    make_streams()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    gc.collect()
    gc.freeze()  # keeps the collector of the children off the pages that they share
    send(walls)
    while True:
        run(receive(), image)


main()
