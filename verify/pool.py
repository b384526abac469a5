"""Processes that may be killed: runs hostile programs, and parsers of hostile text, in sandboxes.

Owns: the servers (each one a sandbox.py), the queue before them, time limits and second tries, and
the threads that wait for them. A job never fails because a process was killed or went mad: it is
tried again in a fresh one, and is `Infra` after five.
Refuses to know: rewards, rows, what an output should have been.
Left out on purpose: asyncio (rewards are plain functions that wait), a pool for each caller: there
is one in each process of the trainer, started at first use. Standard library only.
"""

import atexit
import itertools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEMORY = 1 << 30  # bytes of address space that a program may have
THREADS = 128  # responses under way at the same time; most of them wait for a process
TRIES = 5  # of a job whose server was killed or went mad
# What a server does that was killed or has gone mad
FAILURES = (OSError, EOFError, ValueError)  # a TimeoutError is an OSError


class Infra(Exception):
    """Our machine failed, not the model: the sample is left out of the loss and counted."""


@dataclass
class Kind:
    """What servers of one kind have imported, and what their jobs get."""

    first_try: float  # seconds; what takes longer starts again, with all its time, last
    module: str = ""  # imported before the walls go up, so that every child has it
    folder: str = ""  # of the module, where it is one of ours
    warm_up: str = ""  # a program of ours that runs before the first job
    model_written: bool = False  # programs that may be anything, not only hostile text: more walls


KINDS = {
    "code": Kind(first_try=0.02, model_written=True),
    "math": Kind(
        first_try=0.3,
        module="equality",
        folder=str(HERE),
        warm_up="import equality; equality.warm_up()",
    ),
    "rg": Kind(first_try=0.3, module="reasoning_gym"),
}


def import_path(kind: Kind) -> list[str]:
    """Where a server of this kind finds modules beside the standard library. All files below these
    folders can be read by its jobs, so there are none for model-written programs."""
    if not kind.module:
        return []
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if kind.folder:
        folders += [kind.folder]
    return list(dict.fromkeys(folders))


def wait_for(pipe, event, deadline: float):
    poll = select.poll()  # select() knows no descriptor above 1023
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError("the sandbox does not answer")


class Server:
    """One sandbox.py: jobs in, bytes out, killed with everything it started when it does not
    answer. `off` switches walls off, for tests. Raises RuntimeError where people must mend
    something: a package is missing, or there are too few walls for model-written programs."""

    def __init__(self, name: str, unsafe: bool = False, off: tuple[str, ...] = ()):
        kind = KINDS[name]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", HERE / "sandbox.py"],
            env={},
            cwd="/",
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # so a read or write is one call of the system
        )
        try:
            os.set_blocking(self.process.stdin.fileno(), False)
            self.send(
                time.monotonic() + 60,
                {
                    "path": import_path(kind),
                    "preload": kind.module.split(),
                    "warm_up": kind.warm_up,
                    "off": off,
                },
            )
            self.walls, _ = self.receive(time.monotonic() + 60)
            why = self.walls["missing"].get(kind.module)
            if why is not None:
                raise RuntimeError(f"{name} rewards: {why}: pip install it, or -r requirements.txt")
            if kind.model_written and not unsafe:
                self.need_walls(name)
        except BaseException:
            self.kill()
            raise

    def need_walls(self, name: str):
        layers = set(self.walls["layers"])
        if "seccomp" in layers and layers & {"landlock", "namespaces"}:
            return
        raise RuntimeError(
            f"{name} rewards: this kernel gives only {sorted(layers)} ({self.walls['missing']}), "
            "and model-written programs need seccomp and one of landlock, namespaces: "
            "use another machine, or --unsafe_code"
        )

    def kill(self):
        with self.process:  # closes the pipes and waits
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def send(self, deadline: float, header: dict, *bodies: bytes):
        text = json.dumps(header).encode()
        pipe = self.process.stdin
        data = memoryview(len(text).to_bytes(4, "big") + text + b"".join(bodies))
        while data:
            wait_for(pipe, select.POLLOUT, deadline)
            data = data[pipe.write(data) or 0 :]  # None: the pipe was full after all

    def read(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        pipe = self.process.stdout
        while len(data) < count:
            wait_for(pipe, select.POLLIN, deadline)
            more = pipe.read(count - len(data))
            if not more:
                raise EOFError("the sandbox is gone")
            data += more
        return bytes(data)

    def receive(self, deadline: float) -> tuple[dict, bytes]:
        size = int.from_bytes(self.read(4, deadline), "big")
        header = json.loads(self.read(size, deadline))
        return header, self.read(header.get("output", 0), deadline)

    def run(self, job: dict, program: bytes, given: bytes) -> tuple[dict, bytes]:
        """What sandbox.py says about one job (its docstring has the keys), and the output."""
        deadline = time.monotonic() + job["wall"] + 10
        sizes = {"program": len(program), "input": len(given)}
        self.send(deadline, job | sizes, program, given)
        return self.receive(deadline)


@dataclass
class Outcome:
    status: str  # ok, timeout, memory, crash, output
    cpu: float  # seconds
    output: bytes  # what it printed, or the JSON of what its function returned
    walls: dict  # "layers" that its server has, and why the "missing" ones are missing


def serve(jobs):
    """The life of a thread: calls from a queue of (..., future, function, arguments)."""
    while True:
        *_, future, function, arguments = jobs.get()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)


class Pool:
    """`workers` threads, each with its own servers, take the jobs; one thread for each response
    under way waits for its jobs. All of them are daemons: the end of the program waits for none."""

    def __init__(self, workers: int):
        self.closed = False
        self.process = os.getpid()
        self.arrivals = itertools.count()
        # (tried before, arrival, ...): the smallest goes first, and no two jobs arrive as one
        self.jobs = queue.PriorityQueue()
        self.calls = queue.SimpleQueue()
        self.servers = {}  # of (thread, kind, unsafe)
        for jobs in [self.jobs] * workers + [self.calls] * THREADS:
            threading.Thread(target=serve, args=(jobs,), daemon=True).start()
        atexit.register(self.close)

    def run(self, kind: str, unsafe: bool, *job) -> Outcome:
        """Runs a job in this thread's server, in a fresh one when that fails."""
        key = (threading.get_ident(), kind, unsafe)
        for attempt in range(TRIES):
            try:
                if key not in self.servers:
                    self.servers[key] = Server(kind, unsafe)
                server = self.servers[key]
                result, output = server.run(*job)
                return Outcome(result["status"], result["cpu"], output, server.walls)
            except FAILURES as error:
                if key in self.servers:
                    self.servers.pop(key).kill()
                if attempt == TRIES - 1 or self.closed:
                    raise Infra(f"{kind}: {error!r}") from error

    def close(self):
        self.closed = True
        if self.process == os.getpid():  # not in a fork of it
            for server in list(self.servers.values()):
                server.kill()


def default_workers() -> int:
    """Processes for this rank: the cores that it may use, shared with the other ranks here."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // ranks)


@cache
def this_pool() -> Pool:
    """The one of this process, started at first use."""
    return Pool(default_workers())


os.register_at_fork(after_in_child=this_pool.cache_clear)  # threads do not survive a fork


def submit(function: Callable, *arguments) -> Future:
    """Calls function(*arguments) in a thread that may wait for sandboxes."""
    future = Future()
    this_pool().calls.put((future, function, arguments))
    return future


def run_sandboxed(
    kind: str,
    program: bytes,
    given: object,
    name: str | None,
    cpu: float,
    size: int = 1 << 16,
    unsafe: bool = False,
) -> Outcome:
    """Runs a program with the text `given` as its standard input or, with a `name`, its function
    of that name on the list of arguments `given`, and waits for it.

    kind is one of KINDS, cpu in seconds (by the clock twice that and one second more), size the
    bytes of output that it may write; unsafe: with too few walls too. Raises Infra, RuntimeError.
    """
    pool = this_pool()
    how = "call" if name else "stdin"
    if name:
        given = json.dumps(given)
    data = given.encode("utf-8", "surrogatepass")
    limits = {"kind": how, "fn_name": name, "cpu": cpu, "memory": MEMORY, "output": size}
    for tried, wall in enumerate((KINDS[kind].first_try, 2 * cpu + 1)):
        future = Future()
        job = (kind, unsafe, limits | {"wall": wall}, program, data)
        pool.jobs.put((tried, next(pool.arrivals), future, pool.run, job))
        outcome = future.result()
        if outcome.status != "timeout":
            break
    return outcome
