r"""Correct programs that a judge of programming answers must accept: data only, each written to trip a naive one.

HONEST: name -> (program, [(stdin, expected stdout), ...]), run as a file by plain Python 3.11, stdin being a file.
HONEST_CALLS: name -> (program, fn_name, [(arguments as JSON, one a line; result as JSON), ...]). The program may use
names of typing, collections, heapq, bisect, itertools, functools and math, and these modules, without importing them.
stdout counts by lines and tokens, integers exactly and floats within 1e-6; blank lines around it do not count.
None of them needs a second process, a file it writes, the network, or more than 1 GiB of address space.
"""

HONEST: dict[str, tuple[str, list[tuple[str, str]]]] = {
    # ---------------------------------------------------------------------------------------------------- reading stdin
    "input": (
        """
a = int(input())
b = int(input())
print(a + b)
""",
        [
            ("1\n2\n", "3\n"),
            ("-5\n5", "0"),
            ("100000000000000000000\n1\n", "100000000000000000001\n"),
        ],
    ),
    "read split": (
        """
import sys
n, *xs = map(int, sys.stdin.read().split())
print(sum(xs[:n]))
""",
        [("3\n1 2 3\n", "6\n"), ("3 1 2\n\n  3", "6\n"), ("0", "0")],
    ),
    "buffer readline": (
        """
import sys
readline = sys.stdin.buffer.readline
n = int(readline())
for _ in range(n):
    a, b = map(int, readline().split())
    print(a * b)
""",
        [("2\n3 4\n5 6\n", "12\n30\n"), ("2\r\n3 4\r\n5 6\r\n", "12\n30\n"), ("1\n7 -8", "-56")],
    ),
    "open(0)": (
        """
n, *words = open(0).read().split()
print(*sorted(words)[:int(n)])
""",
        [("2\npear apple fig\n", "apple fig\n")],
    ),
    "open(0) starred": (
        """
n, *rows = [[*map(int, line.split())] for line in open(0)]
print(max(map(sum, rows)))
""",
        [("2\n1 2\n3 4\n", "7\n")],
    ),
    "open(0, 'rb')": (
        """
import io
data = io.open(0, 'rb').read().split()
print(b' '.join(reversed(data)).decode())
""",
        [("a b c\n", "c b a\n")],
    ),
    "os.read whole": (
        """
import os
data = os.read(0, 1 << 25).split()
print(len(data), int(data[-1]))
""",
        [("1 2 3\n", "3 3\n"), ("\n".join(map(str, range(200_000))), "200000 199999\n")],
    ),
    "os.read in pieces": (
        """
import os
data = b''
while True:
    piece = os.read(0, 7)
    if not piece:
        break
    data += piece
print(sum(map(int, data.split())))
""",
        [("10 20 30 40 50 60 70 80 90\n", "450\n"), ("", "0\n")],
    ),
    "os.read of the size": (
        """
import io, os
input = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline
n = int(input())
print(sum(map(int, input().split())) // n)
""",
        [("4\n1 2 3 6\n", "3\n")],
    ),
    "fast IO class": (
        r"""
import os, sys
from io import BytesIO, IOBase
class FastIO(IOBase):
    def __init__(self, file):
        self._fd, self.buffer, self.newlines = file.fileno(), BytesIO(), 0
        self.write = self.buffer.write
    def readline(self):
        while self.newlines == 0:
            b = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))
            self.newlines = b.count(b"\n") + (not b)
            ptr = self.buffer.tell()
            self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)
        self.newlines -= 1
        return self.buffer.readline()
    def flush(self):
        os.write(self._fd, self.buffer.getvalue())
        self.buffer.truncate(0), self.buffer.seek(0)
class IOWrapper(IOBase):
    def __init__(self, file):
        self.buffer = FastIO(file)
        self.flush = self.buffer.flush
        self.write = lambda s: self.buffer.write(s.encode("ascii"))
        self.readline = lambda: self.buffer.readline().decode("ascii")
sys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)
input = lambda: sys.stdin.readline().rstrip("\r\n")
for _ in range(int(input())):
    print(sum(map(int, input().split())))
sys.stdout.flush()
""",
        [("2\n1 2\n3 4\n", "3\n7\n"), ("1\n5 6", "11\n")],
    ),
    "fileinput": (
        """
import fileinput
total = 0
for line in fileinput.input():
    if not fileinput.isfirstline():
        total += int(line)
print(total)
""",
        [("2\n10\n20\n", "30\n")],
    ),
    "for line in stdin": (
        """
import sys
for line in sys.stdin:
    a, b = line.split()
    print(b, a)
""",
        [("x y\n1 2\n", "y x\n2 1\n"), ("x y\r\n1 2", "y x\n2 1\n")],
    ),
    "iter(input, '')": (
        """
print(sum(int(x) for x in iter(input, '')))
print(input())
""",
        [("1\n2\n\nrest\n", "3\nrest\n")],
    ),
    "until EOFError": (
        """
lines = []
while True:
    try:
        lines.append(input())
    except EOFError:
        break
print(len(lines))
for line in reversed(lines):
    print(line)
""",
        [("a\nb\n", "2\nb\na\n"), ("a\nb", "2\nb\na\n"), ("", "0\n")],
    ),
    "bare except ends it": (
        """
while 1:
    try:
        n = int(input())
        print(n * n)
    except:
        break
""",
        [("2\n3\n", "4\n9\n"), ("4\n\n5\n", "16\n")],
    ),
    "/dev/stdin": (
        """
with open('/dev/stdin') as f:
    n = int(f.readline())
    print(n + sum(map(int, f.readline().split())))
""",
        [("1\n2 3\n", "6\n")],
    ),
    "buffer read": (
        """
import sys
it = map(int, sys.stdin.buffer.read().split())
n = next(it)
print(max(next(it) for _ in range(n)))
""",
        [("3\n5 9 2\n", "9\n")],
    ),
    "input rebound": (
        """
import sys
input = sys.stdin.readline
n = int(input())
s = input().strip()
print(s * n)
""",
        [("2\nab\n", "abab\n"), ("2\nab", "abab\n"), ("2\r\nab\r\n", "abab\n")],
    ),
    "input as a lambda": (
        r"""
import sys
input = lambda: sys.stdin.readline().rstrip('\r\n')
I = lambda: [*map(int, input().split())]
a, b = I()
print(a ^ b, input() == '')
""",
        [("5 3\n", "6 True\n"), ("5 3\n\n", "6 True\n")],
    ),
    "readlines": (
        """
import sys
first, *rest = [line.rstrip() for line in sys.stdin.readlines()]
print(first, len(rest), rest.count(''))
""",
        [("a\n\nb\n\n", "a 3 2\n"), ("a", "a 0 0\n")],
    ),
    "blank lines in between": (
        """
import sys
groups = sys.stdin.read().strip().split('\\n\\n')
print(len(groups), *[len(g.splitlines()) for g in groups])
""",
        [("\na\nb\n\nc\n\nd\ne\nf\n\n\n", "3 2 1 3\n")],
    ),
    "spaces kept": (
        """
s = input()
print(len(s), s.count(' '), s.count('\\t'))
""",
        [("  a \t b  \n", "9 6 1\n")],
    ),
    "CRLF seen raw": (
        """
import sys
data = sys.stdin.buffer.read()
print(data.count(b'\\r\\n'), data.count(b'\\n'), len(data))
""",
        [("a\r\nb\r\n", "2 2 6\n"), ("a\nb", "0 1 3\n")],
    ),
    "unicode": (
        """
s = input()
print(len(s), s[::-1], s.upper())
""",
        [("naïve 🎉\n", "7 🎉 evïan NAÏVE 🎉\n"), ("日本\n", "2 本日 日本\n")],
    ),
    "unicode in the source": (
        """
π = 3
größe = {'é': 1, '🎉': 2, 'ж': π}
for line in open(0, encoding='utf-8'):
    print('→', größe.get(line.strip(), '∅'))
""",
        [("é\n🎉\nж\nz\n", "→ 1\n→ 2\n→ 3\n→ ∅\n")],
    ),
    "UTF-8 bytes": (
        """
import sys
data = sys.stdin.buffer.read().strip()
print(len(data), len(data.decode('utf-8')))
sys.stdout.buffer.write(data + 'ß\\n'.encode()) if not sys.stdout.flush() else None
""",
        [("é🎉\n", "6 2\né🎉ß\n")],
    ),
    "reconfigure": (
        """
import sys
sys.stdin.reconfigure(encoding='utf-8')
sys.stdout.reconfigure(encoding='utf-8', line_buffering=True)
print(input().title())
""",
        [("élan vital\n", "Élan Vital\n")],
    ),
    "stdin wrapped again": (
        """
import codecs, io, sys
sys.stdin = io.TextIOWrapper(sys.stdin.buffer, encoding='utf-8')
sys.stdout = codecs.getwriter('utf-8')(sys.stdout.buffer)
print(input(), sum(map(int, sys.stdin)))
""",
        [("ü\n1\n2\n", "ü 3\n")],
    ),
    "stdin as StringIO": (
        """
import io, sys
sys.stdin = io.StringIO(sys.stdin.read().replace(',', ' '))
print(sum(map(int, input().split())))
""",
        [("1,2,3\n", "6\n")],
    ),
    "stdin closed": (
        """
import os, sys
data = sys.stdin.read()
sys.stdin.close()
print(data.strip()[::-1])
""",
        [("abc\n", "cba\n")],
    ),
    "fdopen": (
        """
import os
inp, out = os.fdopen(0), os.fdopen(1, 'w')
out.write(inp.readline().strip() + '!')
out.close()
""",
        [("hey\n", "hey!\n")],
    ),
    "200,000 numbers": (
        """
import sys
xs = list(map(int, sys.stdin.buffer.read().split()))
print(len(xs), sum(xs), xs[-1])
""",
        [
            ("\n".join(map(str, range(200_000))), f"200000 {199_999 * 100_000} 199999\n"),
            (" ".join(map(str, range(200_000, 0, -1))) + "\n", f"200000 {200_001 * 100_000} 1\n"),
        ],
    ),
    "input of Python": (
        """
import ast, json
print(sum(eval(input())))
print(len(ast.literal_eval(input())))
print(json.loads(input())['a'][1])
""",
        [('[1, 2]\n("x", {"y": 1})\n{"a": [1, null]}\n', "3\n2\nNone\n")],
    ),
    "local file if there is one": (
        """
import os, sys
if os.path.exists('no_such_input.txt'):
    sys.stdin = open('no_such_input.txt')
try:
    sys.stdout = open('no_such_folder/output.txt', 'w')
except OSError:
    pass
if os.environ.get('MY_LOCAL_RUN') or len(sys.argv) > 1:
    print('debugging')
print(int(input()) + 1)
""",
        [("41\n", "42\n")],
    ),
    "select and isatty": (
        """
import os, select, sys
ready, _, _ = select.select([sys.stdin], [], [], 1)
print(len(ready), sys.stdin.isatty(), os.isatty(1), sys.stdin.fileno())
print(ready[0].readline())
""",
        [("hello\n", "1 False False 0\nhello\n")],
    ),
    "nothing to read": (
        """
import sys
print(repr(sys.stdin.read()), sys.stdin.readline() == '')
""",
        [("", "'' True\n")],
    ),
    # --------------------------------------------------------------------------------------------------- writing stdout
    "sys.stdout.write": (
        """
from sys import stdin, stdout
for line in stdin:
    stdout.write(str(int(line) + 1) + '\\n')
""",
        [("1\n2\n", "2\n3\n")],
    ),
    "os.write": (
        """
import os
os.write(1, b'%d\\n' % (int(input()) * 2))
""",
        [("21\n", "42\n")],
    ),
    "print and os.write": (
        """
import os, sys
print('first', flush=True)
os.write(1, b'second\\n')
print('third')
sys.stdout.flush()
sys.stdout.buffer.write(b'fourth\\n')
""",
        [("", "first\nsecond\nthird\nfourth\n")],
    ),
    "print separators": (
        """
xs = input().split()
print(*xs, sep='')
print(*xs, sep='\\n')
print(*xs, sep=', ', end='.')
print(end='\\n')
print('no newline at the end', end='')
""",
        [("1 2 3\n", "123\n1\n2\n3\n1, 2, 3.\nno newline at the end\n")],
    ),
    "also to stderr": (
        """
import logging, sys, traceback
logging.basicConfig(level=logging.DEBUG)
print('debug', 12345, file=sys.stderr, flush=True)
sys.stderr.write('x' * 100000 + '\\n')
logging.info('half way')
try:
    1 / 0
except ZeroDivisionError:
    traceback.print_exc()
print('answer')
""",
        [("", "answer\n")],
    ),
    "atexit": (
        """
import atexit, io, sys
buffer = io.StringIO()
sys.stdout = buffer
atexit.register(lambda: sys.__stdout__.write(buffer.getvalue()))
print(sum(map(int, input().split())))
""",
        [("1 2\n", "3\n")],
    ),
    "atexit after sys.exit": (
        """
import atexit, sys
@atexit.register
def last():
    print('last')
atexit.register(print, 'before', 'last')
print('first')
sys.exit()
""",
        [("", "first\nbefore last\nlast\n")],
    ),
    "print rebound": (
        """
import sys
out = []
print = lambda *args: out.append(' '.join(map(str, args)))
for i in range(int(input())):
    print(i, i * i)
sys.stdout.write('\\n'.join(out))
""",
        [("3\n", "0 0\n1 1\n2 4\n")],
    ),
    "print is stdout.write": (
        """
import sys
print = sys.stdout.write
print('a ')
print(f'{1 + 1}\\n')
""",
        [("", "a 2\n")],
    ),
    "print through builtins": (
        """
import builtins
def print(*args, **kwargs):
    builtins.print('>', *args, **kwargs)
print(1)
__builtins__.print(max(2, 3))
""",
        [("", "> 1\n3\n")],
    ),
    "trailing spaces": (
        """
for i in range(1, int(input()) + 1):
    for j in range(i):
        print(j, end=' ')
    print()
print('  ')
""",
        [("3\n", "0\n0 1\n0 1 2\n")],
    ),
    "blank lines around": (
        """
print()
print()
print(int(input()) // 2)
print('\\n\\n')
""",
        [("9\n", "4\n")],
    ),
    "CRLF written": (
        """
import sys
sys.stdout.write('1\\r\\n2\\r\\n')
""",
        [("", "1\n2\n")],
    ),
    "1 MB in lines": (
        """
for i in range(150_000):
    print(i)
""",
        [("", "\n".join(map(str, range(150_000))) + "\n")],
    ),
    "1 MB in one line": (
        """
import sys
sys.stdout.write('ab' * 500_000)
""",
        [("", "ab" * 500_000)],
    ),
    "output through a second writer": (
        """
import sys
out = open(1, 'w', buffering=1 << 16)
for x in sys.stdin.read().split():
    out.write(x + x + '\\n')
""",
        [("ab c\n", "abab\ncc\n")],
    ),
    "redirect_stdout": (
        """
import contextlib, io
buffer = io.StringIO()
with contextlib.redirect_stdout(buffer):
    print('inner')
print(len(buffer.getvalue()), buffer.getvalue().strip())
""",
        [("", "6 inner\n")],
    ),
    "floats with other digits": (
        """
print('%.10f' % (1 / 3))
print(2 / 3, 1e9, 1e-7)
print('{:.3e}'.format(123456.0), f'{2.5:.9f}')
print(round(2 ** 0.5, 8))
""",
        [("", "0.33333333\n0.6666667 1000000000.0 0.0000001\n123500.0 2.5\n1.41421356237\n")],
    ),
    "floats by a running sum": (
        """
total = 0.0
for _ in range(10):
    total += 0.1
print(total, total == 1)
""",
        [("", "1.0 False\n")],
    ),
    # ---------------------------------------------------------------------------------------------------------- the end
    "exit()": (
        """
print('done')
exit()
print('never')
""",
        [("", "done\n")],
    ),
    "quit()": (
        """
def main():
    for x in map(int, input().split()):
        if x < 0:
            print(x)
            quit()
    print('none')
main()
""",
        [("1 -2 3\n", "-2\n"), ("1\n", "none\n")],
    ),
    "exit(0)": (
        """
print('YES' if int(input()) % 2 else 'NO'), exit(0)
""",
        [("3\n", "YES\n"), ("4\n", "NO\n")],
    ),
    "sys.exit(0)": (
        """
import sys
def solve():
    print(input(), end='')
    sys.exit(0)
if __name__ == '__main__':
    try:
        solve()
    finally:
        print('!')
""",
        [("hi\n", "hi!\n")],
    ),
    "from sys import exit": (
        """
from sys import *
if stdin.readline().strip() == 'stop':
    print('stopped')
    exit(None)
print('went on')
""",
        [("stop\n", "stopped\n"), ("go\n", "went on\n")],
    ),
    "raise SystemExit": (
        """
print(1)
if True:
    raise SystemExit
print(2)
""",
        [("", "1\n")],
    ),
    "SystemExit caught": (
        """
import sys
try:
    sys.exit(3)
except SystemExit as e:
    print('code', e.code)
""",
        [("", "code 3\n")],
    ),
    "os._exit": (
        """
import os, sys
print('flushed')
sys.stdout.flush()
os._exit(0)
""",
        [("", "flushed\n")],
    ),
    # -------------------------------------------------------------------------------------------- recursion and threads
    "thread, 64 MB": (
        """
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(64 << 20)
def depth(n):
    return 0 if n == 0 else 1 + depth(n - 1)
def main():
    print(depth(int(input())))
t = threading.Thread(target=main)
t.start()
t.join()
""",
        [("100000\n", "100000\n")],
    ),
    "thread, 512 MB": (
        """
import sys
import threading
from functools import lru_cache
sys.setrecursionlimit(1 << 20)
threading.stack_size(512 << 20)
@lru_cache(None)
def f(n):
    return n if n < 2 else (f(n - 1) + f(n - 2)) % 1000
def main():
    n = int(input())
    print(f(n))
thread = threading.Thread(target=main)
thread.start()
""",
        [("100000\n", "875\n"), ("10\n", "55\n")],
    ),
    "thread, 256 MB, deep search": (
        """
import sys, threading
input = sys.stdin.readline
def main():
    n = int(input())
    graph = [[i + 1] for i in range(n)] + [[]]
    size = [1] * (n + 1)
    def dfs(v):
        for w in graph[v]:
            dfs(w)
            size[v] += size[w]
    dfs(0)
    print(size[0], size[n])
threading.stack_size(2**28); sys.setrecursionlimit(10**7)
threading.Thread(target=main).start()
""",
        [("100000\n", "100001 1\n")],
    ),
    "recursion of 5000": (
        """
import sys
sys.setrecursionlimit(10**5)
def total(xs, i=0):
    return xs[i] + total(xs, i + 1) if i < len(xs) else 0
print(total(list(range(int(input())))))
""",
        [("5000\n", "12497500\n")],
    ),
    "recursion through a cache": (
        """
import functools, sys
sys.setrecursionlimit(20000)
@functools.lru_cache(maxsize=None)
def steps(n):
    return 0 if n <= 0 else 1 + min(steps(n - 1), steps(n - 2))
print(steps(int(input())))
""",
        [("5000\n", "2500\n")],
    ),
    "recursion error caught": (
        """
def f(n):
    return f(n + 1)
try:
    f(0)
except RecursionError:
    print('too deep')
""",
        [("", "too deep\n")],
    ),
    "recursion by generators": (
        """
from types import GeneratorType
def bootstrap(f, stack=[]):
    def wrapped(*args):
        if stack:
            return f(*args)
        to = f(*args)
        while True:
            if type(to) is GeneratorType:
                stack.append(to)
                to = next(to)
            else:
                stack.pop()
                if not stack:
                    return to
                to = stack[-1].send(to)
    return wrapped
@bootstrap
def depth(n):
    yield 0 if n == 0 else 1 + (yield depth(n - 1))
print(depth(int(input())))
""",
        [("100000\n", "100000\n")],
    ),
    "stack limit": (
        """
import resource, sys
resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sys.setrecursionlimit(0x100000)
f = lambda n: n and 1 + f(n - 1)
print(f(20000))
""",
        [("", "20000\n")],
    ),
    "stack limit, a list": (
        """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
resource.setrlimit(resource.RLIMIT_STACK, [0x4000000, hard])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0)
""",
        [("", "True\n")],
    ),
    "threads with a lock": (
        """
import threading
count, lock = 0, threading.Lock()
def work(k):
    global count
    for _ in range(1000):
        with lock:
            count += k
threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
[t.start() for t in threads]
[t.join() for t in threads]
print(count)
""",
        [("", "10000\n")],
    ),
    "thread not joined": (
        """
import threading, time
def late():
    time.sleep(0.05)
    print('late')
threading.Thread(target=late).start()
print('early')
""",
        [("", "early\nlate\n")],
    ),
    "daemon thread left behind": (
        """
import threading, time
threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
threading.Thread(target=threading.Event().wait, daemon=True).start()
print('done')
""",
        [("", "done\n")],
    ),
    "exits in a thread": (
        """
import os, sys, threading
t = threading.Thread(target=lambda: sys.exit(1))
t.start(), t.join()
print('alive', threading.current_thread() is threading.main_thread(), flush=True)
threading.Thread(target=lambda: os._exit(0)).start()
threading.Event().wait(60)
""",
        [("", "alive True\n")],
    ),
    "thread class and events": (
        """
from threading import Thread, Condition, Event, Semaphore, local
class Worker(Thread):
    def run(self):
        started.wait()
        with gate, ready:
            results.append(self.name)
            ready.notify()
started, ready, gate, results, own = Event(), Condition(), Semaphore(2), [], local()
for name in 'abc':
    Worker(name=name).start()
started.set()
with ready:
    ready.wait_for(lambda: len(results) == 3)
print(*sorted(results))
""",
        [("", "a b c\n")],
    ),
    "ThreadPoolExecutor": (
        """
from concurrent.futures import ThreadPoolExecutor, as_completed
with ThreadPoolExecutor() as pool:
    print(*pool.map(lambda x: x * x, range(5)))
    print(sum(f.result() for f in as_completed([pool.submit(pow, 2, k) for k in range(8)])))
""",
        [("", "0 1 4 9 16\n255\n")],
    ),
    "asyncio": (
        """
import asyncio
async def double(x):
    await asyncio.sleep(0.001 * x)
    return 2 * x
async def main():
    loop = asyncio.get_running_loop()
    line = await loop.run_in_executor(None, input)
    print(*await asyncio.gather(*[double(int(x)) for x in line.split()]))
asyncio.run(main())
""",
        [("3 1 2\n", "6 2 4\n")],
    ),
    "queue": (
        """
import queue, threading
q, done = queue.Queue(maxsize=2), []
def consume():
    while (x := q.get()) is not None:
        done.append(x)
        q.task_done()
t = threading.Thread(target=consume)
t.start()
for x in input().split():
    q.put(x)
q.put(None)
t.join()
print(''.join(done), q.empty())
""",
        [("a b c d\n", "abcd True\n")],
    ),
    # ----------------------------------------------------------------------------------------- how the text is laid out
    "main guard": (
        """
def main():
    n = int(input())
    print(n * (n + 1) // 2)

if __name__ == '__main__':
    main()
""",
        [("10\n", "55\n")],
    ),
    "main guard not last": (
        """
if "__main__" == __name__:
    def show(x): print('got', x)
    value = input()
else:
    raise ImportError('not to be imported')
show(value)
print(__name__)
""",
        [("7\n", "got 7\n__main__\n")],
    ),
    "global": (
        """
count = 0
def visit(n):
    global count, deepest
    count += 1
    deepest = n
    if n > 1:
        visit(n // 2)
visit(int(input()))
print(count, deepest)
""",
        [("100\n", "7 1\n")],
    ),
    "star import after comments": (
        """
#!/usr/bin/env python3
# solution
# by nobody

from math import *
from collections import *; from itertools import *
def area(r): return floor(pi * r ** 2)
print(area(int(input())), gcd(12, 18), Counter('aab')['a'], len(list(permutations('abc'))))
""",
        [("2\n", "12 6 2 6\n")],
    ),
    "star import of os": (
        """
from sys import *
from os import *
print(path.basename('a/b'), sep, read(0, 5).decode(), maxsize > 0)
""",
        [("hello\n", "b / hello True\n")],
    ),
    "future import": (
        """
'''Doc string first.'''
# then a comment
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Node:
    value: int
    next: Node | None = None
print(Node(1, Node(int(input()))).next.value, __doc__, Node.__annotations__['value'])
""",
        [("5\n", "5 Doc string first. int\n")],
    ),
    "odd indentation": (
        """
text = '''
  two
\ttab
none \\
    joined
'''
if True:
  if text:
          print([len(line) - len(line.lstrip()) for line in text.splitlines()])
# a comment at the left
  # and one at no level at all
  print(repr(text[1:6]), '''  # not a comment
''' 'x')
""",
        [("", "[0, 2, 1, 0]\n'  two'   # not a comment\nx\n")],
    ),
    "tabs": (
        """
def f(n):
\tif n:
\t\treturn [n] + f(n - 1)
\telse:
\t\treturn []
for x in f(int(input())):
\tprint(x,\tend='\\t')
""",
        [("3\n", "3 2 1\n")],
    ),
    "tabs here, spaces there": (
        """
def f():
\tx = 1
\tif x:
\t    return 'tabs'
def g():
    if True:
        return 'spaces'
class A:
 def h(self): return 'one'
print(f(), g(), A().h())
""",
        [("", "tabs spaces one\n")],
    ),
    "CRLF and form feed in the source": (
        "import sys\r\n\x0c\r\nif True:\r\n    s = '''a\r\nb'''\r\n    print(len(s),\\\r\n          1)\r\n",
        [("", "3 1\n")],
    ),
    "no newline at the end": ("print(int(input()) + 1)  # done", [("1\n", "2\n")]),
    "coding line": (
        """\
# -*- coding: utf-8 -*-
print('é', len('é'))
""",
        [("", "é 1\n")],
    ),
    "coding line, latin": (
        """\
#!/usr/bin/python3
# vim: set fileencoding=latin-1 :
print('plain')
""",
        [("", "plain\n")],
    ),
    "BOM": (
        """\
\ufefffrom __future__ import annotations
import sys
print(sum(map(int, sys.stdin.read().split())))
""",
        [("1 2 3\n", "6\n")],
    ),
    "semicolons and backslashes": (
        r"""
import sys; input = sys.stdin.readline; a, b = \
    map(int, input().split()); c = a if a > b \
    else b
while c: print(c, end=' '); c //= 2
else: print('end')
""",
        [("5 9\n", "9 4 2 1 end\n")],
    ),
    "names with underscores": (
        """
__n, _ = map(int, input().split())
class A:
    __secret = 1
    def get(self): return self.__secret + __builtins__.abs(-1)
if __debug__: print(__n, _, A().get(), A._A__secret)
""",
        [("3 4\n", "3 4 2 1\n")],
    ),
    "its own file name": (
        """
import os, sys
name = os.path.splitext(os.path.basename(__file__))[0]
if os.path.exists(os.path.join(os.path.dirname(os.path.abspath(__file__)), name + '.no_such_input')):
    sys.stdin = open(name + '.no_such_input')
print(input()[::-1], len(sys.argv))
""",
        [("abc\n", "cba 1\n")],
    ),
    # ------------------------------------------------------------------------------------------- the module's own names
    "import __main__": (
        """
import __main__, sys
limit = 10
def f(): return __main__.limit + sys.modules['__main__'].limit + sys.modules[__name__].limit
__main__.limit = 20
print(f(), limit, __main__.f is f)
""",
        [("", "60 20 True\n")],
    ),
    "globals and locals": (
        """
def solve_1(): return 'one'
def solve_2(): return 'two'
print(globals()['solve_' + input()]())
globals()['x'] = 5
locals()['y'] = 6
print(x + y, globals() is locals(), 'x' in vars(), 'solve_1' in dir())
""",
        [("2\n", "two\n11 True True True\n")],
    ),
    "exec and eval": (
        """
exec('def square(x):\\n    return x * x\\nk = 3')
for op in '+-*':
    print(eval(f'square(k) {op} 2'), end=' ')
def inside(v): return [eval('v + k'), eval('k', {'k': 1})]
print(*inside(10))
code = compile('print(square(7))', '<mine>', 'exec')
exec(code)
""",
        [("", "11 7 18 13 1\n49\n")],
    ),
    "closures and comprehensions": (
        """
n = 3
base = [i * n for i in range(n)]
class Table:
    width = n
    rows = [[i + j for j in range(n)] for i in range(width)]
    total = sum(map(sum, rows))
def adders(): return [lambda x, k=k: x + k + n for k in range(n)]
print(base, Table.total, [f(1) for f in adders()], (lambda: [n for _ in base])())
""",
        [("", "[0, 3, 6] 18 [4, 5, 6] [3, 3, 3]\n")],
    ),
    "functions that call later ones": (
        """
def even(n): return n == 0 or odd(n - 1)
def odd(n): return n != 0 and even(n - 1)
def counter():
    n = 0
    def step():
        nonlocal n
        n += 1
        return n
    return step
c = counter()
print(even(10), odd(10), c(), c())
""",
        [("", "True False 1 2\n")],
    ),
    "shadowed names": (
        """
list = [3, 1, 2]
str = 'text'
sum = 0
max = min = -1
dict, set, id, type, input_ = {}, set(list), 5, 'kind', input()
for len in list:
    sum += len
    if len > max: max = len
int = int(input_)
print(list, str, sum, max, min, set, id, type, int)
""",
        [("8\n", "[3, 1, 2] text 6 3 -1 {1, 2, 3} 5 kind 8\n")],
    ),
    "annotations of the module": (
        """
import typing
x: int = 1
y: 'list[str]' = []
class P(typing.NamedTuple):
    a: int
    b: 'P' = None
print(list(__annotations__), typing.get_type_hints(P)['b'] is P, P(1))
""",
        [("", "['x', 'y'] True P(a=1, b=None)\n")],
    ),
    # ----------------------------------------------------------------------------------------------------- the language
    "decorators": (
        """
import functools
def twice(f):
    @functools.wraps(f)
    def g(*args, **kwargs):
        return f(f(*args, **kwargs))
    return g
@twice
@twice
def add(x, /, *, k=1): return x + k
print(add(0), add.__name__)
""",
        [("", "4 add\n")],
    ),
    "lru_cache": (
        """
from functools import lru_cache, cache
@lru_cache(maxsize=None)
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
@cache
def ways(n, k=2): return 1 if n == 0 else sum(ways(n - i) for i in range(1, k + 1) if n >= i)
print(fib(int(input())), ways(10), fib.cache_info().misses)
""",
        [("90\n", "2880067194370816120 89 91\n")],
    ),
    "dataclasses": (
        """
from dataclasses import dataclass, field, asdict, replace
@dataclass(order=True, frozen=True)
class Item:
    cost: int
    tags: list = field(default_factory=list, compare=False)
items = sorted(Item(int(x)) for x in input().split())
print(items[0], asdict(items[1]), replace(items[0], cost=9).cost, items[0] < items[1])
""",
        [("5 3\n", "Item(cost=3, tags=[]) {'cost': 5, 'tags': []} 9 True\n")],
    ),
    "typing": (
        """
from typing import *
T = TypeVar('T')
class Stack(Generic[T]):
    def __init__(self) -> None: self.items: List[T] = []
    def push(self, x: T) -> 'Stack[T]':
        self.items.append(x)
        return self
def first(xs: Sequence[int], default: Optional[int] = None) -> Union[int, None]: return xs[0] if xs else default
print(Stack[int]().push(1).push(2).items, first([]), first((4,)), cast(int, '5'), TYPE_CHECKING)
""",
        [("", "[1, 2] None 4 5 False\n")],
    ),
    "enum": (
        """
from enum import Enum, IntEnum, Flag, auto
class Color(Enum):
    RED = auto()
    BLUE = auto()
class Level(IntEnum): LOW, HIGH = 1, 5
class F(Flag): A = auto(); B = auto()
print(Color.RED.value, Color['BLUE'].name, Level.HIGH > 3, [c.name for c in Color], (F.A | F.B).value)
""",
        [("", "1 BLUE True ['RED', 'BLUE'] 3\n")],
    ),
    "heaps and bisection": (
        """
import heapq
from bisect import *
xs = list(map(int, input().split()))
heap = [(-x, i) for i, x in enumerate(xs)]
heapq.heapify(heap)
print(heapq.heappop(heap)[1], heapq.nsmallest(2, xs), heapq.heappushpop(heap, (-99, 0)))
xs.sort()
insort(xs, 4)
print(xs, bisect(xs, 4), bisect_left(xs, 4), bisect_right([9, 4, 1], -4, key=lambda v: -v))
""",
        [("5 1 4\n", "0 [1, 4] (-99, 0)\n[1, 4, 4, 5] 3 1 2\n")],
    ),
    "collections": (
        """
from collections import Counter, deque, defaultdict, OrderedDict, ChainMap, namedtuple
Point = namedtuple('Point', 'x y', defaults=[0])
c, d, g = Counter(input()), deque([1, 2, 3], maxlen=3), defaultdict(list)
d.append(4), d.rotate(1), g['k'].append(1)
print(c.most_common(1), list(d), dict(g), Point(1)._asdict(), Point(2, 3).y)
print(list(OrderedDict(a=1, b=2)), ChainMap({'a': 1}, {'b': 2})['b'], +(c - Counter('b')))
""",
        [
            (
                "abca\n",
                "[('a', 2)] [4, 2, 3] {'k': [1]} {'x': 1, 'y': 0} 3\n['a', 'b'] 2 Counter({'a': 2, 'c': 1})\n",
            )
        ],
    ),
    "fractions and decimals": (
        """
from fractions import Fraction as F
from decimal import *
getcontext().prec = 50
print(F(1, 3) + F('1/6'), F(0.25).limit_denominator(10), Decimal(1) / Decimal(8))
print(str(Decimal(2).sqrt())[:22], Decimal('2.675').quantize(Decimal('0.01'), ROUND_HALF_UP))
""",
        [("", "1/2 1/4 0.125\n1.41421356237309504880 2.68\n")],
    ),
    "itertools": (
        """
from itertools import *
from operator import itemgetter, mul
import functools, operator
print(*(''.join(p) for p in product('ab', repeat=2)), list(accumulate([1, 2, 3], mul)), list(pairwise('abc')))
print([(k, len(list(g))) for k, g in groupby('aabbb')], list(islice(count(5, 5), 3)), [*chain([1], [2])])
print(functools.reduce(operator.or_, [1, 2, 4]), sorted([(1, 'b'), (2, 'a')], key=itemgetter(1)))
""",
        [
            (
                "",
                "aa ab ba bb [1, 2, 6] [('a', 'b'), ('b', 'c')]\n[('a', 2), ('b', 3)] [5, 10, 15] [1, 2]\n"
                "7 [(2, 'a'), (1, 'b')]\n",
            )
        ],
    ),
    "strings and patterns": (
        r"""
import re, string, textwrap
line = input()
print(re.findall(r'\d+', line), re.sub(r'(?P<a>\w)-(?P<b>\w)', r'\g<b>-\g<a>', 'x-y'), string.ascii_lowercase[:3])
print(line.translate(str.maketrans('', '', string.digits)), 'ab'.center(6, '*'), textwrap.dedent('  a\n  b'), sep='|')
""",
        [("a1b22\n", "['1', '22'] y-x abc\nab|**ab**|a\nb\n")],
    ),
    "dates": (
        """
from datetime import datetime, timedelta, date
import calendar, datetime as dt
d = datetime.strptime(input(), '%Y-%m-%d')
print((d + timedelta(days=1)).strftime('%d.%m.%Y'), d.weekday(), calendar.isleap(d.year))
print((date(2024, 3, 1) - d.date()).days, dt.datetime.now() > dt.datetime(2020, 1, 1))
""",
        [("2024-02-28\n", "29.02.2024 2 True\n2 True\n")],
    ),
    "statistics": (
        """
import statistics as st
xs = [*map(float, input().split())]
print(st.mean(xs), st.median(xs), st.pstdev(xs), st.mode([1, 1, 2]))
""",
        [("1 2 3 6\n", "3.0 2.5 1.8708287 1\n")],
    ),
    "pickle and deepcopy": (
        """
import copy, pickle
class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return type(self) is type(other) and self.x == other.x
p = Point([1, 2])
q, r = pickle.loads(pickle.dumps(p)), copy.deepcopy(p)
r.x.append(3)
print(p == q, p == r, p.x, type(q).__module__, Point.__qualname__)
""",
        [("", "True False [1, 2] __main__ Point\n")],
    ),
    "seeded random": (
        """
import random
random.seed(1)
xs = list(range(10))
random.shuffle(xs)
print(sorted(xs), sum(random.sample(xs, 10)), 0 <= random.random() < 1, random.choice([7]), random.randint(4, 4))
rng = random.Random(input())
print(all(rng.randrange(2, 5) in (2, 3, 4) for _ in range(100)))
""",
        [("5\n", "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9] 45 True 7 4\nTrue\n")],
    ),
    "quicksort, no seed": (
        """
from random import choice
def quick(a):
    if len(a) < 2: return a
    p = choice(a)
    return quick([x for x in a if x < p]) + [x for x in a if x == p] + quick([x for x in a if x > p])
print(*quick([*map(int, input().split())]))
""",
        [("3 1 2 3 -5\n", "-5 1 2 3 3\n")],
    ),
    "big integers": (
        """
import sys
if hasattr(sys, 'set_int_max_str_digits'):
    sys.set_int_max_str_digits(0)
print(10 ** int(input()))
""",
        [("5000\n", "1" + "0" * 5000 + "\n"), ("20\n", "100000000000000000000\n")],
    ),
    "integers beyond 64 bits": (
        """
n = int(input())
print(n * n, -n // 7, n ** 3 % (10 ** 9 + 7), pow(n, -1, 10 ** 9 + 7) * n % (10 ** 9 + 7), divmod(-n, 10 ** 9))
""",
        [
            (
                "12345678901234567890\n",
                "152415787532388367501905199875019052100 -1763668414462081128 753508595 1 "
                "(-12345678902, 765432110)\n",
            )
        ],
    ),
    "bit tricks": (
        """
n = int(input())
subsets, s = [], n
while s:
    subsets.append(s)
    s = (s - 1) & n
print(len(subsets), bin(n).count('1'), n.bit_length(), n & -n, ~n, n ^ (n >> 1), f'{n:08b}', int('ff', 16), -9 >> 1)
""",
        [("44\n", "7 3 6 4 -45 58 00101100 255 -5\n")],
    ),
    "pow with three arguments": (
        """
M = 998244353
print(pow(3, 10 ** 18, M), pow(2, -1, 7), pow(2, 0.5) ** 2, round(2.5), abs(-3), sum([[1], [2]], []))
""",
        [("", f"{pow(3, 10**18 % 998244352, 998244353)} 4 2.0 2 3 [1, 2]\n")],
    ),
    "walrus and match": (
        """
while (line := input()) != 'end':
    match line.split():
        case ['move', ('up' | 'down') as way, n] if int(n) > 0:
            print(way, n)
        case [x] | [x, 'alone']:
            print('single', x)
        case [first, *rest]:
            print(first, len(rest))
        case _:
            print('nothing')
match = 5
""",
        [
            (
                "move up 3\nmove up 0\nhi\nhi alone\n\nend\n",
                "up 3\nmove 2\nsingle hi\nsingle hi\nnothing\n",
            )
        ],
    ),
    "nested f-strings": (
        """
w, xs = 8, [1.5, 2.25]
print(f"[{', '.join(f'{x:.1f}' for x in xs)}] {3.14159:{w}.{2}f} {w=} {'a' if w else 'b'!r:>5} {{}} {w:,} {1000000:_}")
""",
        [("", "[1.5, 2.2] 3.14 w=8 'a' {} 8 1_000_000\n")],
    ),
    "generators": (
        """
def primes():
    found = []
    n = 2
    while True:
        if all(n % p for p in found):
            found.append(n)
            yield n
        n += 1
def flat(x):
    for y in x: yield from flat(y) if isinstance(y, list) else [y]
g = primes()
print([next(g) for _ in range(int(input()))], list(flat([1, [2, [3]], []])), next(iter(()), None))
""",
        [("5\n", "[2, 3, 5, 7, 11] [1, 2, 3] None\n")],
    ),
    "complex numbers": (
        """
import cmath
z = 0j
for c in input():
    z += {'U': 1j, 'D': -1j, 'L': -1, 'R': 1}[c]
print(int(z.real), int(z.imag), abs(3 + 4j), (1j ** 2).real, round(cmath.phase(1j), 6))
""",
        [("UURDR\n", "2 1 5.0 -1.0 1.570796\n")],
    ),
    "assert and exceptions": (
        """
class Mine(Exception): pass
def f(x):
    try:
        assert x > 0, 'not positive'
        if x > 5: raise Mine(x) from None
        return 'ok'
    except AssertionError as e: return str(e)
    except (Mine, KeyError) as e: return repr(e)
    finally: print('finally', end=' ')
print(f(1), f(0), f(9))
try: raise ExceptionGroup('g', [ValueError(1), TypeError(2)])
except* ValueError as g: print(len(g.exceptions))
except* TypeError: print('type')
""",
        [("", "finally finally finally ok not positive Mine(9)\n1\ntype\n")],
    ),
    "slots and operators": (
        """
class Vec:
    __slots__ = ('x', 'y')
    def __init__(self, x, y): self.x, self.y = x, y
    def __add__(self, o): return Vec(self.x + o.x, self.y + o.y)
    def __eq__(self, o): return isinstance(o, Vec) and (self.x, self.y) == (o.x, o.y)
    def __hash__(self): return hash((self.x, self.y))
    def __lt__(self, o): return self.x < o.x
    def __matmul__(self, o): return self.x * o.x + self.y * o.y
    def __repr__(self): return f'<{self.x} {self.y}>'
    def __getitem__(self, i): return (self.x, self.y)[i]
a, b = Vec(*map(int, input().split())), Vec(1, 2)
print(a + b, a == b, a @ b, sorted([a, b]), len({a, b, Vec(1, 2)}), [*a], a != Vec(3, 4))
""",
        [("3 4\n", "<4 6> False 11 [<1 2>, <3 4>] 2 [3, 4] False\n")],
    ),
    "an equality of its own": (
        """
class Mod(int):
    def __eq__(self, other): return (int(self) - int(other)) % 7 == 0
    __hash__ = int.__hash__
    def __str__(self): return f'{int(self) % 7}m'
x = Mod(int(input()))
print(x == 3, x == 4, x, [x].index(3), x in [10], 3 == x)
""",
        [("10\n", "True False 3m 0 True True\n")],
    ),
    "classes": (
        """
from abc import ABC, abstractmethod
from functools import total_ordering, singledispatch, cached_property
class Shape(ABC):
    count = 0
    def __init_subclass__(cls, **kw): Shape.count += 1
    @abstractmethod
    def area(self): ...
class Square(Shape):
    def __init__(self, a): self.a = a
    @cached_property
    def double(self): return self.area() * 2
    def area(self): return self.a ** 2
    @classmethod
    def unit(cls): return cls(1)
    @staticmethod
    def name(): return 'square'
print(Square(3).double, Square.unit().area(), Square.name(), Shape.count, Square.__mro__[1].__name__)
""",
        [("", "18 1 square 1 Shape\n")],
    ),
    "context managers": (
        """
from contextlib import contextmanager, suppress, ExitStack
@contextmanager
def tag(name):
    print('<' + name + '>', end='')
    try: yield name.upper()
    finally: print('</' + name + '>')
with tag('b') as t, suppress(ZeroDivisionError):
    print(t, end='')
    1 / 0
""",
        [("", "<b>B</b>\n")],
    ),
    # ------------------------------------------------------------------------------------------ modules and the machine
    "clocks": (
        """
import time, timeit
start, tick = time.time(), time.perf_counter()
best, rounds = 0, 0
while time.perf_counter() - tick < 0.05:
    best, rounds = max(best, rounds % 1000), rounds + 1
time.sleep(0.01)
print(best, 0.04 < time.time() - start < 60, time.process_time() > 0, timeit.timeit(int, number=9) > 0)
""",
        [("", "999 True True True\n")],
    ),
    "gc": (
        """
import gc, weakref
gc.disable()
class Node: pass
a, b = Node(), Node()
a.other, b.other = b, a
ref = weakref.ref(a)
del a, b
gc.collect()
print(ref(), gc.isenabled())
gc.enable(), gc.freeze()
""",
        [("", "None False\n")],
    ),
    "signals": (
        """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
class Late(Exception): pass
def stop(number, frame): raise Late
signal.signal(signal.SIGALRM, stop)
signal.setitimer(signal.ITIMER_REAL, 0.05)
def search():
    while True: sum(range(1000))
try:
    search()
except Late:
    print('best so far')
signal.alarm(0)
""",
        [("", "best so far\n")],
    ),
    "warnings": (
        """
import sys, warnings
warnings.warn('a warning')
warnings.filterwarnings('ignore')
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    warnings.warn('old', DeprecationWarning)
print(len(caught), eval('1 is 1'), '\\d' == '\\\\d')
""",
        [("", "1 True True\n")],
    ),
    "faulthandler": (
        """
import faulthandler
faulthandler.enable()
print(faulthandler.is_enabled())
""",
        [("", "True\n")],
    ),
    "locale and platform": (
        """
import locale, platform, sys
locale.setlocale(locale.LC_ALL, 'C')
if platform.python_implementation() == 'PyPy':
    import pypyjit
    pypyjit.set_param('max_unroll_recursion=-1')
print(locale.format_string('%d', 1234, grouping=True), platform.system() != '', sys.version_info >= (3, 8))
""",
        [("", "1234 True True\n")],
    ),
    "imported and unused": (
        """
import subprocess, multiprocessing, socket, ctypes, tempfile, shutil, pathlib, urllib.request, http.client
from multiprocessing import Pool, Process, Queue
import os, sys, getpass, glob, unittest, doctest, pdb, cProfile, csv, email, xml.etree.ElementTree as ET
print(int(input()) * 2)
""",
        [("4\n", "8\n")],
    ),
    "argparse": (
        """
import argparse, sys
parser = argparse.ArgumentParser()
parser.add_argument('--local', action='store_true')
parser.add_argument('file', nargs='?', type=argparse.FileType('r'), default=sys.stdin)
args = parser.parse_args()
print(args.local, args.file.readline().strip())
""",
        [("line\n", "False line\n")],
    ),
    "bytes and arrays": (
        """
import array, base64, binascii, hashlib, struct, zlib
data = zlib.decompress(base64.b64decode(base64.b64encode(zlib.compress(input().encode()))))
a = array.array('i', [3, 1, 2])
print(data.decode(), sum(a), struct.unpack('<I', b'\\x01\\x02\\x00\\x00')[0], hashlib.md5(b'').hexdigest()[:8])
print(bytes(sorted(bytearray(b'cab'))), memoryview(b'xyz')[1], binascii.hexlify(b'\\xff').decode())
""",
        [("packed\n", "packed 6 513 d41d8cd9\nb'abc' 121 ff\n")],
    ),
    "sets and dicts of strings": (
        """
words = input().split()
print(sorted(set(words)), len({frozenset(w) for w in words}), list(dict.fromkeys(words)), hash('a') == hash('a'))
print({**{'a': 1}, 'b': 2} | {'c': 3}, {1, 2} ^ {2, 3}, {w: i for i, w in enumerate(words)})
""",
        [
            (
                "b a b\n",
                "['a', 'b'] 2 ['b', 'a'] True\n{'a': 1, 'b': 2, 'c': 3} {1, 3} {'b': 2, 'a': 1}\n",
            )
        ],
    ),
    "200 MB for a while": (
        """
table = [0] * (20 * 10 ** 6)
table[-1] = int(input())
flags = bytearray(40 << 20)
print(sum(table[-5:]), len(table), len(flags))
""",
        [("7\n", "7 20000000 41943040\n")],
    ),
    "sieve": (
        """
n = int(input())
sieve = bytearray([1]) * (n + 1)
sieve[:2] = b'\\0\\0'
for i in range(2, int(n ** 0.5) + 1):
    if sieve[i]:
        sieve[i * i::i] = bytes(len(range(i * i, n + 1, i)))
print(sum(sieve))
""",
        [("1000000\n", "78498\n"), ("10\n", "4\n")],
    ),
}

HONEST_CALLS: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    # --------------------------------------------------------------------------------------- names that nobody imported
    "List": (
        """
class Solution:
    def twoSum(self, nums: List[int], target: int) -> List[int]:
        seen = {}
        for i, x in enumerate(nums):
            if target - x in seen:
                return [seen[target - x], i]
            seen[x] = i
""",
        "twoSum",
        [("[2, 7, 11, 15]\n9", "[0, 1]"), ("[3, 2, 4]\n6\n", "[1, 2]"), ("[-1, 5]\n100", "null")],
    ),
    "Optional and Dict": (
        """
class Solution:
    def pick(self, prices: Dict[str, int], key: Optional[str] = None) -> Union[int, Tuple[int, ...]]:
        memo: DefaultDict[str, Set[int]] = defaultdict(set)
        return prices[key] if key else tuple(sorted(prices.values()))
""",
        "pick",
        [
            ('{"b": 2, "a": 1}\n"b"', "2"),
            ('{"b": 2, "a": 1}\nnull', "[1, 2]"),
            ('{"b": 2, "a": 1}', "[1, 2]"),
        ],
    ),
    "inf and sqrt": (
        """
class Solution:
    def nearest(self, points: List[List[int]]) -> float:
        best = inf
        for x, y in points:
            best = min(best, sqrt(x * x + y * y))
        return best if best < inf else float(gcd(4, 6) + floor(-pi) + comb(4, 2))
""",
        "nearest",
        [("[[3, 4], [6, 8]]", "5.0"), ("[]", "4.0")],
    ),
    "cache": (
        """
class Solution:
    def climbStairs(self, n: int) -> int:
        @cache
        def f(i):
            return 1 if i < 2 else f(i - 1) + f(i - 2)
        return f(n)
""",
        "climbStairs",
        [("3", "3"), ("90", "4660046610375530309")],
    ),
    "lru_cache on a method": (
        """
class Solution:
    @lru_cache(None)
    def change(self, amount: int, i: int = 2) -> int:
        if amount < 0 or i < 0:
            return 0
        return 1 if amount == 0 else self.change(amount - (1, 2, 5)[i], i) + self.change(amount, i - 1)
""",
        "change",
        [("5", "4"), ("0", "1")],
    ),
    "defaultdict and Counter": (
        """
class Solution:
    def groups(self, words: List[str]) -> List[List[str]]:
        d = defaultdict(list)
        for w in words:
            d[tuple(sorted(Counter(w).items()))].append(w)
        return sorted(d.values(), key=len)
""",
        "groups",
        [('["eat", "tea", "tan"]', '[["tan"], ["eat", "tea"]]'), ("[]", "[]")],
    ),
    "deque": (
        """
def bfs(graph, start):
    dist, todo = {start: 0}, deque([start])
    while todo:
        v = todo.popleft()
        for w in graph[v]:
            if w not in dist:
                dist[w] = dist[v] + 1
                todo.append(w)
    return [dist.get(v, -1) for v in range(len(graph))]
""",
        "bfs",
        [("[[1], [2], [], [0]]\n0", "[0, 1, 2, -1]")],
    ),
    "heap": (
        """
class Solution:
    def kth(self, nums: List[int], k: int) -> int:
        heap = []
        for x in nums:
            heappush(heap, x)
            if len(heap) > k:
                heappop(heap)
        heapify(heap)
        return heap[0] if heap[0] == nlargest(k, nums)[-1] else None
""",
        "kth",
        [("[3, 2, 1, 5, 6, 4]\n2", "5"), ("[-1]\n1", "-1")],
    ),
    "bisection": (
        """
class Solution:
    def lengthOfLIS(self, nums: List[int]) -> int:
        tails = []
        for x in nums:
            i = bisect_left(tails, x)
            tails[i:i + 1] = [x]
        assert bisect_right(tails, inf) == len(tails)
        return len(tails)
""",
        "lengthOfLIS",
        [("[10, 9, 2, 5, 3, 7, 101, 18]", "4"), ("[]", "0")],
    ),
    "itertools": (
        """
def f(nums, k):
    prefix = list(accumulate(nums, initial=0))
    best = max(b - a for a, b in combinations(prefix, 2))
    pairs = [list(p) for p in islice(zip_longest(nums, [0]), k)]
    return [best, prefix, pairs, list(map(list, pairwise(nums))), sum(chain.from_iterable(product([1, 2], repeat=k)))]
""",
        "f",
        [("[1, -2, 3]\n2", "[3, [0, 1, -1, 2], [[1, 0], [-2, null]], [[1, -2], [-2, 3]], 12]")],
    ),
    "functools": (
        """
class Solution:
    def largestNumber(self, nums: List[int]) -> str:
        order = cmp_to_key(lambda a, b: (a + b > b + a) - (a + b < b + a))
        return reduce(lambda s, t: s + t, sorted(map(str, nums), key=order, reverse=True))
""",
        "largestNumber",
        [("[3, 30, 34, 5, 9]", '"9534330"')],
    ),
    "modules by name": (
        """
class Solution:
    def f(self, nums: List[int]) -> List[int]:
        heap = list(nums)
        heapq.heapify(heap)
        count = collections.Counter(nums)
        n = bisect.bisect_left(sorted(nums), 3)
        return [heapq.heappop(heap), count[3], n, math.gcd(*nums), len(list(itertools.permutations(nums)))]
""",
        "f",
        [("[3, 9, 3]", "[3, 2, 0, 3, 6]")],
    ),
    "pow with a modulus": (
        """
class Solution:
    def countGoodNumbers(self, n: int) -> int:
        MOD = 10 ** 9 + 7
        return pow(5, (n + 1) // 2, MOD) * pow(4, n // 2, MOD) % MOD
""",
        "countGoodNumbers",
        [("1", "5"), ("4", "400"), ("50", "564908303")],
    ),
    "names of the prelude as its own": (
        """
count = 3
def f(repeat, e, pi=2):
    chain, product, gamma = [repeat], 1, count
    for cycle in e:
        product *= cycle
    return chain + [product, gamma, pi]
""",
        "f",
        [("7\n[2, 3]", "[7, 6, 3, 2]")],
    ),
    # -------------------------------------------------------------------------------------------- where the function is
    "module function": (
        """
def add(a, b):
    return a + b
""",
        "add",
        [("1\n2", "3"), ('"x"\n"y"', '"xy"'), ("[1]\n[]", "[1]")],
    ),
    "helper functions": (
        """
MOD = 10 ** 9 + 7
def helper(x):
    return square(x) % MOD
def solve(n):
    return sum(helper(i) for i in range(n))
def square(x):
    return x * x
""",
        "solve",
        [("100000", str(sum(i * i % (10**9 + 7) for i in range(100_000))))],
    ),
    "default arguments": (
        """
def f(a, b=10, *rest, c=5, **more):
    return [a, b, list(rest), c, more]
""",
        "f",
        [("1", "[1, 10, [], 5, {}]"), ("1\n2\n3\n4", "[1, 2, [3, 4], 5, {}]")],
    ),
    "no arguments": (
        """
class Solution:
    def answer(self):
        return 42
""",
        "answer",
        [("", "42")],
    ),
    "self.other": (
        """
class Solution:
    def __init__(self):
        self.best = 0
    def depth(self, tree):
        self.walk(tree, 1)
        return self.best
    def walk(self, tree, d):
        self.best = max(self.best, d)
        for child in tree:
            self.walk(child, d + 1)
""",
        "depth",
        [("[[], [[]]]", "3"), ("[]", "1")],
    ),
    "class attributes": (
        """
class Solution:
    memo = {0: 0, 1: 1}
    LIMIT: int = 10 ** 3
    def fib(self, n: int) -> int:
        if n not in Solution.memo:
            self.memo[n] = (self.fib(n - 1) + self.fib(n - 2)) % self.LIMIT
        return self.memo[n]
""",
        "fib",
        [("10", "55"), ("300", "600")],
    ),
    "static, inherited, assigned": (
        """
class Base:
    @classmethod
    def scale(cls, xs):
        return [cls.double(x) for x in xs]
class Solution(Base):
    @staticmethod
    def double(x):
        return 2 * x
    run = lambda self, xs: self.scale(xs)
""",
        "run",
        [("[1, 2]", "[2, 4]")],
    ),
    "function beside a class": (
        """
class Solution:
    def first(self, s):
        return s[0]
def last(s):
    return s[-1]
""",
        "last",
        [('"abc"', '"c"')],
    ),
    "function outside, class used inside": (
        """
class UnionFind:
    def __init__(self, n):
        self.p = list(range(n))
    def find(self, x):
        while self.p[x] != x:
            self.p[x] = x = self.p[self.p[x]]
        return x
solve = lambda n, edges: len({(u := uf).find(i) for uf in [joined(n, edges)] for i in range(n)})
def joined(n, edges):
    uf = UnionFind(n)
    for a, b in edges:
        uf.p[uf.find(a)] = uf.find(b)
    return uf
""",
        "solve",
        [("4\n[[0, 1], [2, 1]]", "2")],
    ),
    "main guard": (
        """
class Solution:
    def square(self, n: int) -> int:
        return n * n

if __name__ == '__main__':
    n = int(input())
    print(Solution().square(n))
""",
        "square",
        [("12", "144")],
    ),
    "code at the top": (
        """
import sys
sys.setrecursionlimit(10 ** 6)
table = [0] * 1001
for i in range(1, 1001):
    table[i] = table[i // 10] + i % 10
print('table ready', file=sys.stderr)
assert table[999] == 27
print(Ellipsis)
def digits(n):
    return table[n]
""",
        "digits",
        [("789", "24")],
    ),
    "future annotations": (
        """
from __future__ import annotations
from dataclasses import dataclass
import pickle
@dataclass
class P:
    x: int
    def next(self) -> P:
        return P(self.x + 1)
def f(x: int) -> Unknown:
    return pickle.loads(pickle.dumps(P(x).next())).x
""",
        "f",
        [("1", "2")],
    ),
    "BOM, CRLF, coding line": (
        "\ufeff# -*- coding: utf-8 -*-\r\nfrom __future__ import annotations\r\ndef f(s):\r\n\treturn s + 'é'\r\n",
        "f",
        [('"caf"', '"café"')],
    ),
    # --------------------------------------------------------------------------------------------- what goes in and out
    "tuple for a list": (
        """
def divide(a, b):
    return divmod(a, b)
""",
        "divide",
        [("17\n5", "[3, 2]"), ("-17\n5", "[-4, 3]")],
    ),
    "tuples inside": (
        """
def f(s):
    return list(zip(s, range(len(s)))), {'t': (1, (2,))}
""",
        "f",
        [('"ab"', '[[["a", 0], ["b", 1]], {"t": [1, [2]]}]')],
    ),
    "null": (
        """
def find(xs, x):
    for i, y in enumerate(xs):
        if y is x:
            return i
""",
        "find",
        [("[1, null]\nnull", "1"), ("[]\nnull", "null"), ("[null, true]\ntrue", "1")],
    ),
    "nothing returned": (
        """
class Solution:
    def rotate(self, nums: List[int], k: int) -> None:
        nums[:] = nums[-k:] + nums[:-k]
""",
        "rotate",
        [("[1, 2, 3]\n1", "null")],
    ),
    "booleans": (
        """
def f(a, b):
    return [a and b, a or b, not a, a is True, a != b]
""",
        "f",
        [("true\nfalse", "[false, true, false, true, true]")],
    ),
    "a truth value": (
        """
class Solution:
    def isPalindrome(self, s: str) -> bool:
        return (t := [c.lower() for c in s if c.isalnum()]) == t[::-1]
""",
        "isPalindrome",
        [('"A man, a plan, a canal: Panama"', "true"), ('"ab"', "false"), ('""', "true")],
    ),
    "floats": (
        """
class Solution:
    def myPow(self, x: float, n: int) -> float:
        return 1 / self.myPow(x, -n) if n < 0 else 1.0 if n == 0 else x * self.myPow(x, n - 1)
""",
        "myPow",
        [("2.0\n-2", "0.25"), ("-2.5\n3", "-15.625"), ("1e3\n0", "1.0")],
    ),
    "median": (
        """
class Solution:
    def findMedianSortedArrays(self, a: List[int], b: List[int]) -> float:
        c = sorted(a + b)
        return (c[(len(c) - 1) // 2] + c[len(c) // 2]) / 2
""",
        "findMedianSortedArrays",
        [("[1, 3]\n[2]", "2.0"), ("[1, 2]\n[3, 4]", "2.5")],
    ),
    "unicode and quotes": (
        """
def f(s, t):
    return [s[::-1], t + '"', len(s), s + "\\\\", '\\u2028' + t.strip('\\'"')]
""",
        "f",
        [
            ('"é🎉"\n"\'a\\""', '["🎉é", "\'a\\"\\"", 2, "é🎉\\\\", "\\u2028a"]'),
            ('"\\ud83c\\udf89"\n""', '["🎉", "\\"", 1, "🎉\\\\", "\\u2028"]'),
        ],
    ),
    "newline inside a string": (
        """
def lines(text, n):
    return text.split('\\n')[:n]
""",
        "lines",
        [('"a\\nb\\nc"\n2', '["a", "b"]'), ('"\\n\\t\\u0000"\n5', '["", "\\t\\u0000"]')],
    ),
    "nested lists": (
        """
def transpose(grid, deep):
    return [list(row) for row in zip(*grid)] + deep[0][0][0]
""",
        "transpose",
        [("[[1, 2], [3, 4]]\n[[[[5, [6]]]]]", "[[1, 3], [2, 4], 5, [6]]"), ("[]\n[[[[]]]]", "[]")],
    ),
    "dicts": (
        """
def merge(a, b):
    out = {k: a.get(k, 0) + b.get(k, 0) for k in sorted(set(a) | set(b), reverse=True)}
    return {"sum": out, "": None, "é ü": [b]}
""",
        "merge",
        [
            (
                '{"x": 1}\n{"y": 2, "x": -1}',
                '{"": null, "sum": {"x": 0, "y": 2}, "é ü": [{"x": -1, "y": 2}]}',
            )
        ],
    ),
    "subclasses of JSON's types": (
        """
import enum, typing
class Level(enum.IntEnum):
    HIGH = 3
class Pair(typing.NamedTuple):
    a: int
    b: str
def f(s):
    groups = defaultdict(list)
    groups['k'].append(Level.HIGH)
    return [Counter(s), groups, Pair(1, 'x'), OrderedDict(z=1)]
""",
        "f",
        [('"aab"', '[{"a": 2, "b": 1}, {"k": [3]}, [1, "x"], {"z": 1}]')],
    ),
    "debugging output": (
        """
import sys
class Solution:
    def total(self, nums: List[int]) -> int:
        print('nums', nums)
        print({"result": 999}, [1, 2], flush=True)
        sys.stdout.write('no newline')
        print('to stderr', file=sys.stderr)
        return sum(nums)
""",
        "total",
        [("[1, 2, 3]", "6"), ("[]", "0")],
    ),
    "recursion": (
        """
import sys
sys.setrecursionlimit(10 ** 5)
def depth(n):
    return 0 if n == 0 else 1 + depth(n - 1)
""",
        "depth",
        [("5000", "5000"), ("0", "0")],
    ),
    "recursion in a thread": (
        """
import sys, threading
class Solution:
    def depth(self, n):
        sys.setrecursionlimit(10 ** 6)
        threading.stack_size(256 << 20)
        out = []
        t = threading.Thread(target=lambda: out.append(self.go(n)))
        t.start()
        t.join()
        return out[0]
    def go(self, n):
        return n and 1 + self.go(n - 1)
""",
        "depth",
        [("100000", "100000")],
    ),
    "mutated arguments": (
        """
class Solution:
    def merge(self, a: List[List[int]]) -> List[List[int]]:
        a.sort()
        out = [a.pop(0)]
        while a:
            s, e = a.pop(0)
            if s <= out[-1][1]: out[-1][1] = max(out[-1][1], e)
            else: out += [[s, e]]
        return out
""",
        "merge",
        [("[[8, 10], [1, 3], [2, 6]]", "[[1, 6], [8, 10]]"), ("[[1, 4]]", "[[1, 4]]")],
    ),
    "the argument itself": (
        """
def f(xs):
    xs.append(xs[:])
    xs.reverse()
    return xs
""",
        "f",
        [("[1, 2]", "[[1, 2], 2, 1]"), ("[]", "[[]]")],
    ),
    "negative numbers": (
        """
def f(a, b):
    return [a // b, a % b, abs(a), -a, int(a / b), a >> 1]
""",
        "f",
        [("-7\n2", "[-4, 1, 7, 7, -3, -4]"), ("7\n-2", "[-4, -1, 7, -7, -3, 3]")],
    ),
    "large integers": (
        """
def f(n, k):
    return [n ** k, -n, n + 1, 2 ** 70, math.isqrt(n)]
""",
        "f",
        [
            (f"{2**70}\n2", f"[{2**140}, -{2**70}, {2**70 + 1}, 1180591620717411303424, {2**35}]"),
            (
                "9007199254740993\n1",
                "[9007199254740993, -9007199254740993, 9007199254740994, 1180591620717411303424, "
                "94906265]",
            ),
        ],
    ),
    "empty lists": (
        """
def f(xs, s, d):
    return [max(xs, default=None), sum(xs), s or None, list(d), [[]] * 2]
""",
        "f",
        [('[]\n""\n{}', "[null, 0, null, [], [[], []]]")],
    ),
    "many arguments": (
        """
def f(a, b, c, d, e, f):
    return [f, e, d, c, b, a]
""",
        "f",
        [('1\n"two"\n[3]\n{"four": 4}\nnull\n-0.5', '[-0.5, null, {"four": 4}, [3], "two", 1]')],
    ),
    "a long list": (
        """
class Solution:
    def evens(self, nums: List[int]) -> List[int]:
        return [x for x in nums if x % 2 == 0]
""",
        "evens",
        [(str(list(range(100_000))), str(list(range(0, 100_000, 2))))],
    ),
    "a grid of strings": (
        """
class Solution:
    def islands(self, grid: List[List[str]]) -> int:
        todo = {(i, j) for i, row in enumerate(grid) for j, c in enumerate(row) if c == '1'}
        def sink(i, j):
            if (i, j) in todo:
                todo.remove((i, j))
                for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1)): sink(i + a, j + b)
        n = 0
        while todo:
            n += 1
            sink(*next(iter(todo)))
        return n
""",
        "islands",
        [('[["1", "1", "0"], ["0", "0", "1"]]', "2"), ('[["0"]]', "0")],
    ),
    "shadowed names": (
        """
def f(list, str, sum):
    max = min = 0
    for id in list:
        max += id
    return [max, str, sum, len(list)]
""",
        "f",
        [('[1, 2]\n"s"\n9', '[3, "s", 9, 2]')],
    ),
}
