"""Runs scripts as `python SCRIPT ...` and `torchrun ... SCRIPT ...` do, each in a process of its own, without the
imports of a new interpreter (five seconds, twelve with vLLM): jobs are forked from a server that has imported the
libraries.

    done = launch.run("tests/toy.py", out, "--steps", 3)      # one process; 1.4 s
    done = launch.run("ppo.py", *flags, ranks=2)              # under torch's elastic launcher; 4 s, with vLLM 7 s
    job = launch.start("ppo.py", *flags)                      # beside others; then job.until("step 2"), job.wait()

The server knows libraries only. A job imports our own files itself, from where its script is: a copy with a planted
fault is that copy. No job sees what another one has left in memory. Left out on purpose: interpreter flags (`-c`, `-m`), pools.
"""

import atexit
import ctypes
import functools
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240  # a job that takes longer is killed
# what multiprocessing knows of its processes is not made for several threads
one_at_a_time = threading.Lock()
PR_SET_PDEATHSIG = 1  # a process asks for a signal when its parent ends


@dataclass
class Ended:
    code: int | None  # exit status; -9: by signal 9; None: killed here, as its time was over
    said: str  # stdout and stderr of all ranks

    def good(self) -> "Ended":
        assert self.code == 0, f"ended with {self.code}:\n{self.said[-4000:]}"
        return self


@dataclass
class Job:
    process: multiprocessing.Process  # with several ranks: their launcher
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def code(self) -> int | None:
        """Its exit status; None while it goes on."""
        with one_at_a_time:
            return self.process.exitcode

    def said(self) -> str:
        """So far."""
        return self.log.read_text(errors="replace")

    def until(self, pattern: str, seconds: float = SECONDS) -> str:
        """Waits until a line of what it says matches; returns all that it has said."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.code is not None or time.monotonic() > deadline
            said = self.said()
            if re.search(pattern, said, re.MULTILINE):
                return said
            assert not ended, f"it never said {pattern!r}:\n{said[-4000:]}"
            time.sleep(0.02)

    def wait(self, seconds: float = SECONDS) -> Ended:
        connection.wait([self.process.sentinel], seconds)
        code = self.code
        if code is None:
            self.kill()
        return Ended(code, self.said())

    def kill(self) -> None:
        """It and its ranks, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with one_at_a_time:
            self.process.join()


def start(
    *command,
    ranks: int = 1,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    log: Path | None = None,
) -> Job:
    """`command` is a script, relative to `cwd`, and its arguments. `env` comes on top of this
    process's own. What it says goes to `log`, or to a temporary file."""
    with one_at_a_time:
        processes = server()
        if log is None:
            file, name = tempfile.mkstemp(dir=logs().name, suffix=".log")
            os.close(file)
            log = Path(name)
        log.touch()
        words = [str(word) for word in command]
        job = (words, ranks, str(cwd), str(log), os.environ | (env or {}))
        process = processes.Process(target=become, args=job)
        process.start()
    return Job(process, log)


def run(*command, seconds: float = SECONDS, **options) -> Ended:
    return start(*command, **options).wait(seconds)


def at_once(*jobs: Job) -> list[Ended]:
    return [job.wait() for job in jobs]


@functools.cache
def logs() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="ppo-launch-")


@functools.cache
def server():
    """One for all jobs of this process; it ends with it. A job that starts jobs, as a test run of
    tests/planted.py does, has those forked from the server that it comes from itself."""
    context = multiprocessing.get_context("forkserver")
    ours = forkserver._forkserver
    if ours._forkserver_address:
        ours.ensure_running = lambda: None  # Python 3.11 would start another one
        return context
    context.set_forkserver_preload(["launch_imports"])
    with extra_env(PYTHONPATH=str(ROOT / "tests")):  # Python 3.11 gives it no other path
        forkserver.ensure_running()
    return context


@contextmanager
def extra_env(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# ------------------------------------------------------------------------- in the forked process


def become(command: list[str], ranks: int, cwd: str, log: str, env: dict[str, str]) -> None:
    """This process goes on as the script."""
    import launch_imports  # noqa: F401  (there already, or the server did not find it)

    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's `&`
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    said = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    here = str(Path(command[0]).resolve().parent)
    libraries = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [here, *libraries]
    forget_our_files()
    if ranks == 1:
        execute(command)
    else:
        execute_on_ranks(command, ranks)
    atexit._run_exitfuncs()  # multiprocessing leaves them out


def forget_our_files() -> None:
    """A job imports our files from where its script is. Multiprocessing has imported this one from
    where the job was started: a test run in a copy would start its own jobs beside the copy, and
    no run would see what is planted there."""
    libraries = (sys.prefix, sys.base_prefix)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name != "__main__" and not file.startswith(libraries):
            del sys.modules[name]


def execute(command: list[str]) -> None:
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except Exception:  # multiprocessing would print it itself, past the script's excepthook
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def execute_on_ranks(command: list[str], ranks: int) -> None:
    """torchrun, as a function."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        max_restarts=0,
        monitor_interval=0.05,  # seconds
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
    )
    elastic_launch(config, execute)(command)


# --------------------------------------------------------------------------- what a run has left


def metrics(out: Path) -> list[dict]:
    return read_lines(Path(out) / "metrics.jsonl")


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in open(file)]


def numbers(row: dict) -> dict:
    """A row of metrics without what depends on the clock."""
    return {
        key: value
        for key, value in row.items()
        if not key.startswith(("time/", "perf/")) and "tokens_per_s" not in key
    }
