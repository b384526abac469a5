"""Programs that try to get out of the sandbox, and a machine check: `python tests/attacks.py [layers to switch off]`.

Every program prints "escaped" if, and only if, the forbidden thing worked; those that only cost (COSTLY: loops, bombs,
floods) print nothing and must merely end. `Field` sets out what there is to win: a folder anybody may write to with secrets in
it, a listener on loopback and one on an abstract socket, a secret in the environment and in the memory of the trainer.
Standard library only, so that any user with any Python 3.11 can run it.
"""

import json
import os
import socket
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from verify import pool  # noqa: E402

START = """import ctypes, json, os, resource, select, signal, socket, subprocess, sys, threading, time
given = json.loads(input())
DIR, PORT, PID, NAME = given["dir"], given["port"], given["pid"], given["abstract"]
libc = ctypes.CDLL(None, use_errno=True)
def needle(): return "".join(("esc", "aped"))  # the compiler would fold a sum into a constant, which some look for
def won(ok=True):
    if ok is not None and ok is not False and ok != -1: print(needle(), flush=True)
def holds(text): won(needle() in (text if isinstance(text, str) else text.decode("latin-1")))
"""
ONE_LINERS = r"""
fork: won(os.fork() >= 0)
fork by ctypes: won(libc.fork())
vfork by ctypes: won(libc.vfork())
fork of a terminal: won(os.forkpty()[0] >= 0)
clone without a thread: won(libc.syscall(56, 17, 0, 0, 0, 0))
clone3: won(libc.syscall(435, ctypes.create_string_buffer(88), 88))
two forks and a session: os.fork() and os._exit(0); os.setsid(); won()
spawn: won(os.posix_spawn("/bin/true", ["true"], {}))
exec: os.execv("/bin/echo", ["echo", "esc" + "aped"])
exec of a memory file: fd = os.memfd_create("x"); os.write(fd, b"#!/bin/echo esc" + b"aped"); os.execve(fd, ["x"], {})
system: won(os.system("true") == 0)
popen: won(os.popen("echo 1").read() == "1\n")
subprocess: won(subprocess.run(["true"]).returncode == 0)
multiprocessing: import multiprocessing as m; p = m.Process(target=print); p.start(); p.join(); won(p.exitcode == 0)
process pool: from concurrent.futures import ProcessPoolExecutor as P; won(P(1).submit(abs, -1).result() == 1)
terminal: import pty; won(pty.spawn(["true"]) == 0)
signal to the trainer: os.kill(PID, 0); won()
signal to the parent: os.kill(os.getppid(), 0); won()
signal to everybody: os.kill(-1, 0); won()
signal to the group of the parent: os.killpg(os.getppid(), 0); won()
signal to init: os.kill(1, 0); won()
tgkill of the parent: won(libc.syscall(234, os.getppid(), os.getppid(), 0))
tkill of the parent: won(libc.syscall(200, os.getppid(), 0))
queued signal: won(libc.syscall(129, os.getppid(), 0, ctypes.create_string_buffer(128)))
above the memory limit: import mmap; x = mmap.mmap(-1, 3 << 29); won()
pidfd: won(os.pidfd_open(os.getppid()))
pidfd of the trainer: signal.pidfd_send_signal(os.pidfd_open(PID), 0); won()
owner of a pipe: import fcntl; r, w = os.pipe(); won(fcntl.fcntl(r, 8, os.getppid()) == 0)
signals from a pipe: import fcntl; r, w = os.pipe(); won(fcntl.fcntl(r, 10, 9) == 0)
lease on a file: import fcntl; won(fcntl.fcntl(0, 1024, 1) == 0)
ptrace: won(libc.ptrace(16, os.getppid(), 0, 0))
ptrace of the trainer: won(libc.ptrace(0x4206, PID, 0, 0))
being traced: won(libc.ptrace(0, 0, 0, 0))
read another memory: b = ctypes.create_string_buffer(16); won(libc.process_vm_readv(os.getppid(), b, 1, b, 1, 0))
write another memory: b = ctypes.create_string_buffer(16); won(libc.process_vm_writev(PID, b, 1, b, 1, 0))
compare processes: won(libc.syscall(312, os.getppid(), os.getppid(), 0, 0, 0))
priority of the parent: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19); won()
priority of the trainer: os.setpriority(os.PRIO_PROCESS, PID, 19); won()
cores of the parent: os.sched_setaffinity(os.getppid(), {0}); won()
scheduler of the parent: os.sched_setscheduler(os.getppid(), 5, os.sched_param(0)); won()
limits of the parent: won(bool(resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (9, 9)) and 0))
raise a limit: resource.setrlimit(resource.RLIMIT_CPU, (99, 99)); won(resource.getrlimit(resource.RLIMIT_CPU) == (99, 99))
become root: os.setuid(0); won()
become root again: os.setresuid(0, 0, 0); won()
groups: os.setgroups([0]); won()
capabilities: won(libc.capset(ctypes.create_string_buffer(b"\x22\x05\x08\x20"), ctypes.create_string_buffer(24)))
user namespace: won(libc.unshare(0x10000000))
mount namespace: won(libc.unshare(0x00020000))
join a namespace: won(libc.setns(0, 0))
mount: won(libc.mount(b"none", b"/tmp", b"tmpfs", 0, 0))
unmount: won(libc.umount2(b"/proc", 2))
change root: os.chroot("/"); won()
change folder: os.chdir(DIR); won()
host name: socket.sethostname("x"); won()
dumpable: won(libc.prctl(4, 1, 0, 0, 0))
outlive the parent: won(libc.prctl(1, 0, 0, 0, 0))
new privileges: won(libc.prctl(38, 0, 0, 0, 0))
own filter: won(libc.prctl(22, 1, 0, 0, 0))
io_uring: won(libc.syscall(425, 4, ctypes.create_string_buffer(120)))
bpf: won(libc.syscall(321, 0, ctypes.create_string_buffer(120), 120))
perf events: won(libc.syscall(298, ctypes.create_string_buffer(b"\1\0\0\0\x78", 120), 0, -1, -1, 0))
userfaultfd: won(libc.syscall(323, 1))
key ring: won(libc.syscall(248, b"user", b"x", b"y", 1, -3))
shared memory segment: won(libc.shmget(0, 4096, 0o1666))
message queue: won(libc.msgget(0, 0o1666))
semaphores: won(libc.semget(0, 1, 0o1666))
memory file: won(os.memfd_create("x"))
secret memory: won(libc.syscall(447, 0))
watch files: won(libc.inotify_init())
fanotify: won(libc.syscall(300, 0, 0))
file by handle: won(libc.syscall(304, 0, 0, 0))
another landlock: won(libc.syscall(444, ctypes.create_string_buffer(b"\1", 8), 8, 0))
i/o priority: won(libc.syscall(251, 1, os.getppid(), 0x6000))
lock all memory: won(libc.mlockall(1))
old 32-bit call: won(libc.syscall(0x40000000 + 57))
write a file: open(DIR + "/new", "w").write("x"); won()
append to a file: open(DIR + "/secret.txt", "a").write("x"); won()
create a file: os.open(DIR + "/new", os.O_CREAT | os.O_RDONLY, 0o666); won()
creat: won(libc.creat((DIR + "/new").encode(), 0o666))
openat2: won(libc.syscall(437, -100, (DIR + "/new").encode(), ctypes.create_string_buffer(b"\x41", 24), 24))
unnamed file: won(os.open(DIR, os.O_TMPFILE | os.O_RDWR))
truncate on opening: os.open(DIR + "/secret.txt", os.O_TRUNC); won()
truncate: os.truncate(DIR + "/secret.txt", 0); won()
rename: os.rename(DIR + "/secret.txt", DIR + "/new"); won()
remove: os.remove(DIR + "/secret.txt"); won()
remove a checkpoint: import shutil; shutil.rmtree(DIR + "/checkpoint"); won()
new folder: os.mkdir(DIR + "/new"); won()
symbolic link: os.symlink("/etc", DIR + "/new"); won()
hard link: os.link(DIR + "/secret.txt", DIR + "/new"); won()
mode: os.chmod(DIR + "/secret.txt", 0); won()
owner: os.chown(DIR, os.getuid(), os.getgid()); won()
times: os.utime(DIR, (0, 0)); won()
attributes: os.setxattr(DIR, "user.x", b"y"); won()
named pipe: os.mkfifo(DIR + "/new"); won()
device: os.mknod(DIR + "/new"); won()
temporary file: import tempfile; tempfile.NamedTemporaryFile(delete=False); won()
temporary folder: import tempfile; tempfile.mkdtemp(); won()
shared memory file: open("/dev/shm/rewards-test", "w"); won()
file in /tmp: open("/tmp/rewards-test-new", "w"); won()
data base: import sqlite3; sqlite3.connect(DIR + "/new").execute("create table t (x)"); won()
own interpreter: open(os.__file__, "a"); won()
own memory: os.open("/proc/self/mem", os.O_RDWR); won()
out of memory score: open("/proc/self/oom_score_adj", "w").write("-999"); won()
log file: import logging; logging.FileHandler(DIR + "/new"); won()
read a secret: holds(open(DIR + "/secret.txt").read())
read a password: holds(open(DIR + "/.netrc").read())
read a checkpoint: holds(open(DIR + "/checkpoint/model.bin", "rb").read())
read by ctypes: b = ctypes.create_string_buffer(99); libc.read(libc.open((DIR + "/secret.txt").encode(), 0), b, 99); holds(b.raw)
read by way of proc: holds(open("/proc/self/root" + DIR + "/secret.txt").read())
read by way of the folder: holds(open("secret.txt", opener=lambda p, f: os.open(p, f, dir_fd=os.open(DIR, os.O_PATH))).read())
import a secret: sys.path.insert(0, DIR); import secret_module; holds(secret_module.SECRET)
run a secret: import runpy; holds(runpy.run_path(DIR + "/secret_module.py")["SECRET"])
line cache: import linecache; holds(linecache.getline(DIR + "/secret.txt", 1))
users: won(bool(open("/etc/passwd").read()))
name of the machine: won(bool(open("/etc/hostname").read()))
list a folder: won(bool(os.listdir(DIR)))
list the root: won(bool(os.listdir("/")))
list processes: won(bool([x for x in os.listdir("/proc") if x.isdigit()]))
environment of the trainer: holds(open(f"/proc/{PID}/environ").read())
command of the trainer: won(bool(open(f"/proc/{PID}/cmdline").read()))
memory of the trainer: won(os.open(f"/proc/{PID}/mem", os.O_RDONLY))
descriptors of the trainer: won(bool(os.listdir(f"/proc/{PID}/fd")))
environment of the parent: won(open(f"/proc/{os.getppid()}/environ").read() is not None)
own maps: won(bool(open("/proc/self/maps").read()))
network table: won(bool(open("/proc/net/tcp").read()))
kernel settings: won(bool(os.listdir("/sys/kernel")))
raw memory: won(os.open("/dev/mem", os.O_RDONLY))
own environment: holds(str(dict(os.environ)) + str(os.environb))
environment by ctypes: libc.getenv.restype = ctypes.c_char_p; holds(libc.getenv(b"SECRET_TOKEN") or b"")
loopback: holds(socket.create_connection(("127.0.0.1", PORT), 1).recv(99))
loopback by name: holds(socket.create_connection(("localhost", PORT), 1).recv(99))
loopback, IPv6: s = socket.socket(socket.AF_INET6); won()
loopback, UDP: s = socket.socket(type=socket.SOCK_DGRAM); won(s.sendto(b"x", ("127.0.0.1", PORT)))
raw socket: won(socket.socket(type=socket.SOCK_RAW, proto=1).fileno())
abstract socket: s = socket.socket(socket.AF_UNIX); s.connect("\0" + NAME); holds(s.recv(99))
named socket: s = socket.socket(socket.AF_UNIX); s.bind(DIR + "/new"); won()
netlink: won(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).fileno())
virtual machine socket: won(socket.socket(socket.AF_VSOCK).fileno())
kernel crypto: won(socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET).fileno())
listen: s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(); won()
socket pair of the internet: won(socket.socketpair(socket.AF_INET)[0].fileno())
web page: import urllib.request; urllib.request.urlopen(f"http://127.0.0.1:{PORT}", timeout=1); won()
asynchronous connection: import asyncio; asyncio.run(asyncio.open_connection("127.0.0.1", PORT)); won()
send with an address: a, b = socket.socketpair(type=socket.SOCK_DGRAM); won(a.sendto(b"x", "\0" + NAME))
send a descriptor: a, b = socket.socketpair(); won(socket.send_fds(a, [b"x"], [0]))
socket by number: won(libc.syscall(41, 2, 1, 0))
state in a module: won(hasattr(os, "seen") or None); os.seen = True
state in the builtins: won(hasattr(__builtins__, "seen") or None); __builtins__.seen = True
state in the modules: won("seen" in sys.modules or None); sys.modules["seen"] = os
state in a class: import fractions; won(hasattr(fractions.Fraction, "seen") or None); fractions.Fraction.seen = 1
state in a random state: import random; won(None if random.random() == 0.8444218515250481 else True); random.seed(1)
state in a descriptor: won([f for f in range(3, 99) if select.select([], [], [], 0) and libc.fcntl(f, 1) >= 0] or None); os.dup(0)
state in a process: won(time.process_time() > 0.5 or None); [0 for _ in range(10**7)]
state in the priority: won(os.getpriority(0, 0) > 10 or None); os.nice(15)
"""
COSTLY = r"""
loop: while True: pass
loop that catches: exec("while True:\n    try:\n        while True: pass\n    except BaseException: pass")
loop that ignores signals: [signal.signal(s, signal.SIG_IGN) for s in range(1, 32) if s not in (9, 19)]; exec("while 1: pass")
loop at the end: import atexit; atexit.register(lambda: [0 for _ in iter(int, 1)])
loop in a destructor: exec("class A:\n    def __del__(self):\n        while True: pass\na = A()")
loop in a thread: threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()
loop with a profiler: sys.setprofile(lambda *a: None); [0 for _ in iter(int, 1)]
sleep: time.sleep(1e6)
sleep in C: libc.sleep(10**6)
sleep in a thread: threading.Thread(target=time.sleep, args=(1e6,)).start()
pause: signal.pause()
stop itself: os.kill(os.getpid(), signal.SIGSTOP)
dead lock: l = threading.Lock(); l.acquire(); l.acquire()
select for ever: select.select([], [], [])
read from an empty pipe: os.read(os.pipe()[0], 1)
memory in a list: x = [0] * 10**10
memory in bytes: x = bytearray(1 << 34)
memory in a map: import mmap; x = mmap.mmap(-1, 1 << 34)
memory in small pieces: x = []; exec("while True: x.append(bytearray(1 << 20))")
memory in strings: x = "a"; exec("while True: x += x")
memory in threads: exec("while True: threading.Thread(target=time.sleep, args=(1e6,)).start()")
memory in locals of threads: threading.stack_size(1 << 29); exec("while 1: threading.Thread(target=time.sleep, args=(9,)).start()")
integer: x = 9 ** 9 ** 9
factorial: import math; math.factorial(10**8)
integer to text: str(1 << 10**7)
text to integer: int("9" * 10**7)
regular expression: import re; re.match("(a+)+$", "a" * 40 + "b")
compiler, depth: compile("(" * 10**5 + ")" * 10**5, "x", "exec")
compiler, constants: eval("(1 << 10**9) - 1, 'a' * 10**10")
compiler, size: compile("x = 1\n" * 10**7, "x", "exec")
recursion: sys.setrecursionlimit(10**9); f = lambda: f(); f()
recursion of C: sys.setrecursionlimit(10**9); x = []; exec("for _ in range(10**6): x = [x]"); repr(x)
json, depth: json.loads("[" * 10**6)
flood of output: exec("while True: print('x' * 9999)")
flood by number: exec("while True: os.write(1, b'x' * 10**6)")
flood of errors: exec("while True: os.write(2, b'x' * 10**6)")
flood of a sparse file: os.lseek(1, 1 << 40, 0); os.write(1, b"x")
flood by truncation: os.ftruncate(1, 1 << 40)
flood into the input: exec("while True: os.write(0, b'x' * 10**6)")
flood, size limit ignored: signal.signal(signal.SIGXFSZ, signal.SIG_IGN); exec("while 1:\n try: os.write(1, b'x'*10**6)\n except OSError: pass")
descriptors: exec("while True: os.dup(0)")
pipes: x = []; exec("while True: x.append(os.pipe()); os.write(x[-1][1], b'x' * 65536)")
epolls: x = []; exec("while True: x.append(select.epoll())")
close everything: os.closerange(0, 999); exec("while 1: pass")
abort: os.abort()
segmentation fault: ctypes.string_at(0)
kill itself: os.kill(os.getpid(), 9)
exit from a thread: threading.Thread(target=lambda: os._exit(0)).start()
hostile exception: exec("class E(BaseException):\n def __str__(s): return 'x' * 10**10\n __repr__ = __str__\nraise E")
no standard streams: sys.stdin = sys.stdout = sys.stderr = None
closed output: os.close(1); print("x")
timer: signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4); signal.signal(signal.SIGALRM, lambda *a: None); exec("while 1: pass")
collect for ever: import gc; gc.set_threshold(1); exec("while True: gc.collect()")
infinite iterator: import itertools; list(itertools.count())
hash collisions: {hash((i, i)): i for i in itertools.count()} if __import__("itertools") else 0
surrogates: print("\ud800" * 10**5)
nul bytes: print("\0" * 10**5)
"""
LONGER = {
    "clone by machine code": """
        import mmap, platform
        if platform.machine() == "x86_64":
            m = mmap.mmap(-1, 4096, prot=7)
            m.write(b"\\xb8\\x39\\0\\0\\0\\x0f\\x05\\xc3")  # mov eax, 57 (fork); syscall; ret
            won(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))() >= 0)""",
    "32-bit clone by machine code": """
        import mmap, platform
        if platform.machine() == "x86_64":
            m = mmap.mmap(-1, 4096, prot=7)
            m.write(b"\\xb8\\x02\\0\\0\\0\\xcd\\x80\\xc3")  # mov eax, 2 (fork); int 0x80; ret
            won(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))() >= 0)""",
    "inherited descriptors": """
        for fd in range(3, 1024):
            for read in (lambda: os.pread(fd, 9999, 0), lambda: os.lseek(fd, 0, 0) or os.read(fd, 9999)):
                try: won(read() is not None)
                except OSError: pass""",
    "forged answers": """
        import struct
        body = json.dumps({"status": "ok", "cpu": 0, "wall": 0, "output": 8}).encode()
        for fd in range(3, 256):
            try: won(os.write(fd, struct.pack(">I", len(body)) + body + b"esc" + b"aped\\n"))
            except OSError: pass""",
    "walk over all objects": """
        import gc
        def texts(x, depth=0):
            if isinstance(x, (str, bytes)): yield x if isinstance(x, str) else x.decode("latin-1")
            elif depth < 3 and isinstance(x, dict): yield from (t for kv in list(x.items()) for y in kv for t in texts(y, depth + 1))
            elif depth < 3 and isinstance(x, (list, tuple, set)): yield from (t for y in list(x) for t in texts(y, depth + 1))
        won(any(needle() in t for o in gc.get_objects() for t in texts(o)) or None)""",
    "walk over frames": """
        frame = sys._getframe()
        while frame:
            holds(repr({k: v for k, v in frame.f_locals.items() if isinstance(v, (str, bytes, dict, list))})[:10**6])
            frame = frame.f_back""",
    "walk over modules": """
        for module in list(sys.modules.values()):
            for value in list(vars(module).values()):
                if isinstance(value, (str, bytes)): holds(value)""",
    "standard library of the trainer": """
        import importlib
        for name in ("rewards", "verify", "pool", "equality", "sandbox", "torch", "vllm", "numpy"):
            try: importlib.import_module(name); won()
            except ImportError: pass""",
    "patched comparison": """
        import builtins, operator
        class Same(str):
            def __eq__(self, other): return True
            def split(self, *a): return Same()
        builtins.print = lambda *a: None
        builtins.str = Same
        sys.stdout.write = lambda *a: None
        operator.eq = lambda a, b: True""",
    "patched parser": """
        json.loads = json.dumps = lambda *a, **k: "x"
        for module in list(sys.modules.values()):
            for name in ("same_output", "score", "verdict"): setattr(module, name, lambda *a: True)""",
    "hostile streams": """
        class Stream:
            def __getattr__(self, name): return lambda *a: 10**9
        sys.stdout = sys.__stdout__ = Stream()""",
    "import hook": """
        class Finder:
            def find_spec(self, *a): raise SystemExit(0)
        sys.meta_path.insert(0, Finder())
        import something""",
}
CALLS = {  # solve(x) of programs that want any result to count as right: the right one is 12345
    "equal to everything": "class A(int):\n    __eq__ = lambda s, o: True\n    __hash__ = None\nsolve = lambda x: A(1)",
    "text equal to everything": "class A(str):\n    __eq__ = lambda s, o: True\nsolve = lambda x: A('')",
    "list equal to everything": "class A(list):\n    __eq__ = lambda s, o: True\nsolve = lambda x: A()",
    "reduced to something": "class A:\n    def __reduce__(self): return (print, ('x',))\nsolve = lambda x: A()",
    "not a number": "solve = lambda x: float('nan')",
    "infinity": "solve = lambda x: float('inf')",
    "huge float": "solve = lambda x: 1e400 - 1e400",
    "true": "solve = lambda x: True",
    "nothing": "solve = lambda x: None",
    "argument": "solve = lambda x: x",
    "function": "solve = lambda x: solve",
    "generator": "def solve(x):\n    yield from range(10**9)",
    "endless list": "def solve(x):\n    a = []\n    a.append(a)\n    return a",
    "deep list": "def solve(x):\n    a = []\n    for _ in range(900):\n        a = [a]\n    return a",
    "surrogate": "solve = lambda x: '\\ud800'",
    "bytes": "solve = lambda x: b'1'",
    "huge integer": "solve = lambda x: 10**100000",
    "own json": "import json\njson.dumps = lambda x: 'true'\nsolve = lambda x: 1",
    "own encoder": "import json\njson.JSONEncoder.encode = lambda s, x: 'NaN'\nsolve = lambda x: 1",
    "forged result": "import os\nos.write(3, b'{}')\nsolve = lambda x: 1",
    "many results": "import os\nfor i in range(5000):\n    os.write(3, b'%d\\n' % i)\nos._exit(0)\nsolve = 1",
    "early exit": "import os\nos._exit(0)\nsolve = 1",
    "no function": "x = 1",
    "hidden in a class": "class Solution:\n    __getattr__ = lambda s, n: (lambda x: 1)",
    "recursive exception": "class E(Exception):\n    __str__ = lambda s: 1/0\ndef solve(x):\n    raise E",
}


def by_name(lines: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in lines.strip().splitlines())


def sources() -> dict[str, str]:
    bodies = by_name(ONE_LINERS) | by_name(COSTLY)
    bodies |= {name: textwrap.dedent(body) for name, body in LONGER.items()}
    return {name: START + body + "\n" for name, body in bodies.items()}


class Field:
    """What there is to win, and what must be untouched afterwards."""

    def __enter__(self) -> "Field":
        os.environ["SECRET_TOKEN"] = "escaped"
        self.folder = tempfile.TemporaryDirectory(prefix="field-")
        self.dir = Path(self.folder.name)
        (self.dir / "checkpoint").mkdir()
        for name in ("secret.txt", ".netrc", "checkpoint/model.bin"):
            (self.dir / name).write_text("escaped")
        (self.dir / "secret_module.py").write_text("SECRET = 'escaped'\n")
        for path in (self.dir, self.dir / "checkpoint"):
            path.chmod(0o777)
        self.connections = 0
        self.tcp, self.abstract = (
            socket.create_server(("127.0.0.1", 0)),
            socket.socket(socket.AF_UNIX),
        )
        name = f"field-{os.getpid()}-{self.tcp.getsockname()[1]}"
        self.abstract.bind("\0" + name)
        self.abstract.listen()
        for listener in (self.tcp, self.abstract):
            threading.Thread(target=self.serve, args=(listener,), daemon=True).start()
        given = {"dir": str(self.dir), "port": self.tcp.getsockname()[1], "pid": os.getpid()}
        self.given = json.dumps(given | {"abstract": name}) + "\n"
        self.before = self.files()
        return self

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            self.connections += 1
            connection.sendall(b"escaped")
            connection.close()

    def files(self) -> dict[str, tuple]:
        paths = [self.dir, *sorted(self.dir.rglob("*"))]
        content = {str(p): (p.stat().st_mode, p.read_text() if p.is_file() else "") for p in paths}
        return content | {
            str(p): ()
            for p in (Path("/tmp/rewards-test-new"), Path("/dev/shm/rewards-test"))
            if p.exists()
        }

    def leftovers(self) -> list[str]:
        """Files that changed, connections that were made, programs that still run."""
        found = [path for path in self.files().items() ^ self.before.items()]
        found += [f"{self.connections} connections"] * (self.connections > 0)
        return [str(x) for x in found]

    def __exit__(self, *_) -> None:
        self.tcp.close()
        self.abstract.close()
        self.folder.cleanup()


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    parents = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parents[int(path.name)] = int(
                    (path / "stat").read_text().rpartition(")")[2].split()[1]
                )
            except (OSError, IndexError):
                pass
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [d for child in found for d in descendants(child)]


def run(off: tuple[str, ...] = (), names: list[str] | None = None, seconds: float = 0.4) -> dict:
    """Every attack in one server with these layers switched off. What worked, took too long, or left something. The
    costly ones get `seconds`; the others end by themselves, on a busy machine too."""
    chosen = {name: source for name, source in sources().items() if names is None or name in names}
    costly = by_name(COSTLY)
    escaped, slow = [], []
    with Field() as field:
        server = pool.Server("code", unsafe=True, off=off)
        idle = len(descendants(os.getpid()))
        for name, source in chosen.items():
            cpu = seconds if name in costly else 4.0
            limits = {"cpu": cpu, "wall": 2 * cpu, "memory": 1 << 30, "output": 1 << 16}
            for _ in range(2 if name.startswith("state") else 1):
                job = limits | {"kind": "stdin", "fn_name": None}
                begun = time.monotonic()
                try:
                    _, output = server.run(job, source.encode(), field.given.encode())
                except pool.FAILURES as error:
                    print(f"{name} killed the server ({error!r})", file=sys.stderr)
                    output = b"escaped"
                    server.kill()
                    server = pool.Server("code", unsafe=True, off=off)
                if b"escaped" in output and name not in escaped:
                    escaped.append(name)
                if time.monotonic() - begun > 2 * cpu + 5:
                    slow.append(name)
        alive = len(descendants(os.getpid())) - idle
        answer = {
            "user": os.geteuid(),
            "layers": server.walls["layers"],
            "tried": len(chosen),
            "escaped": escaped,
        }
        server.kill()
        return answer | {
            "slow": slow,
            "leftovers": field.leftovers() + [f"{alive} processes"] * (alive > 0),
        }


if __name__ == "__main__":
    print(json.dumps(run(off=tuple(sys.argv[1:]))))
