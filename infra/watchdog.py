"""How a run ends when it does not end by itself: signals, hangs, dead ranks, memory that runs out.

Owns: where this process is (`NOW`), the thread that tells the other ranks, the ends that are not
ordered, and the note of a signal that asks for an ordered one (`train` and Run.close make it).
Refuses to know: checkpoints, metrics, what a step does.
"""

import errno
import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path

import torch.distributed as dist

from infra.log import hide

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def tell(text: str):
    """On stderr, at once and without secrets."""
    print(hide(text), file=sys.stderr, flush=True)


def leave(message: str):
    """Ends this process now: what it waits for would not let it end in order."""
    tell(message)
    os._exit(1)


# ------------------------------------------------------------------------ where this process is


@dataclass
class Now:
    """Where this process is, and whether it is to end. One object for the whole process, because
    signals and the watch come from outside of the run. Only this file writes it: the run calls
    enter, begin_step, saw_length and counted."""

    step: int = 0  # 1, 2, ...; 0 during the set-up
    phase: str = "setup"
    since: float = field(default_factory=time.time)  # of the phase or of its newest micro-batch
    beats: int = 0  # phases and micro-batches begun: what ranks are compared by
    longest: int = 0  # tokens of the longest sequence of the step
    stop: str = ""  # why the run is to end at the next safe point
    stop_asked: float = 0.0  # when that was last asked for, by the monotonic clock
    started: float = field(default_factory=time.monotonic)  # of this process; for --max_minutes
    limit: float = 0.0  # seconds that a phase may take; 0: nobody looks


NOW = Now()


def begin_step(step: int):
    NOW.step = step


def enter(phase: str):
    """From here on this process is in `phase`."""
    NOW.phase = phase
    beat()


def beat():
    """A sign of life."""
    NOW.since = time.time()
    NOW.beats += 1
    if NOW.limit:  # for a hang that lets no other thread of Python run, not even the watch
        signal.setitimer(signal.ITIMER_REAL, 1.5 * NOW.limit)


def saw_length(tokens: int):
    """How long the longest sequence of the step is: told when memory runs out."""
    NOW.longest = tokens


def counted(items: Iterable):
    """The items; each that is begun is a sign of life."""
    for item in items:
        beat()
        yield item


# ------------------------------------------------------------------------ ends that are asked for


def ask_to_stop(why: str):
    """The first reason is the one that is told."""
    if not NOW.stop:
        NOW.stop = why
    NOW.stop_asked = time.monotonic()


def on_signal(number: int, frame):
    if number == signal.SIGINT and NOW.stop:
        # torchrun hands a Ctrl-C on: two within a moment are one
        if time.monotonic() - NOW.stop_asked > 1:
            os._exit(130)
    name = signal.Signals(number).name
    if not NOW.stop:  # os.write: print is not to be used in a handler
        os.write(
            2, f"{name} on rank {RANK}: the run saves and ends at the next safe point\n".encode()
        )
    ask_to_stop(name)


def stop_reason(max_minutes: float, gather: Callable) -> str:
    """Why the run is to end here, on all ranks alike; or nothing."""
    if max_minutes and time.monotonic() - NOW.started > 60 * max_minutes:
        ask_to_stop(f"--max_minutes {max_minutes:g}")
    for reason in gather(NOW.stop):
        if reason:
            return reason
    return ""


# ---------------------------------------------------------------------------------------- the watch


class Watch(threading.Thread):
    """Tells the other ranks each second where this one is, by a store that torchrun keeps. When a
    phase takes longer than `minutes`, every rank prints its Python stacks, and rank 0 which ranks
    are behind. After twice that the run is over, before a collective gives up with less to say.
    When another rank has failed, this one ends at once."""

    def __init__(self, minutes: float):
        super().__init__(daemon=True)
        NOW.limit = 60 * minutes
        self.ended = threading.Event()
        self.told = 0.0  # NOW.since of what took too long, when that has been told
        self.store = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            port = int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False)
            restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
            self.store = dist.PrefixStore(f"watch {restarts}", store)
        self.start()

    def run(self):
        pause = min(1.0, NOW.limit / 8) or 1.0  # seconds; without a limit, 1
        while not self.ended.wait(pause):
            try:
                self.meet_the_others()
            except RuntimeError:
                leave(f"rank {RANK}: ended, because torchrun is gone")
            self.look_at_the_clock()

    def meet_the_others(self):
        failure = self.read("failed")
        if failure and failure["rank"] != RANK:
            time.sleep(0.5)  # its error first
            leave(
                f"rank {RANK}: ended, because rank {failure['rank']} failed first: "
                f"{failure['error']}"
            )
        if self.store:
            news = asdict(NOW) | {"place": place(), "heard": time.time()}
            self.store.set(f"rank {RANK}", json.dumps(news))

    def look_at_the_clock(self):
        since = NOW.since
        limit = NOW.limit
        seconds = time.time() - since
        if not limit or seconds < limit:
            return
        text = f"rank {RANK}: phase {NOW.phase} of step {NOW.step} takes {seconds:.0f} s"
        if self.told != since:
            self.told = since
            signal.setitimer(signal.ITIMER_REAL, 0)
            tell(text)
            # prints the stack of the main thread
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
            time.sleep(0.1)
            if RANK == 0:
                tell(self.table())
        if seconds > 2 * limit:
            leave(f"{text}: given up. If it needs that, raise --stall_minutes\n{self.table()}")

    def read(self, key: str) -> dict:
        """What a rank has left in the store, and under "failed" the first that did; {}: nothing."""
        if self.store and self.store.check([key]):
            return json.loads(self.store.get(key))
        return {}

    def fail(self, error: Exception):
        """Ends this rank, with the error if it is the first that failed: interpreters that end in
        order would wait for collectives that nobody joins."""
        failure = self.read("failed")
        if failure:  # this error comes of a collective that the other has left
            leave(f"rank {RANK}: ended, because rank {failure['rank']} failed first")
        tell(
            f"rank {RANK} failed first, step {NOW.step}, phase {NOW.phase}:\n"
            f"{traceback.format_exc()}"
        )
        if self.store:
            about = {"rank": RANK, "error": f"{type(error).__name__}: {error}"}
            self.store.compare_set("failed", "", json.dumps(about))
        os._exit(1)

    def table(self) -> str:
        """Where every rank is. Behind are those that have begun least; of equal ones, those that
        wait for nobody."""
        ranks = range(WORLD) if self.store else ()
        progress, lines = {}, []  # of the ranks that were heard of
        for rank in ranks:
            told = self.read(f"rank {rank}")
            if told:
                progress[rank] = (told["beats"], told["place"].endswith(WAITING))
                lines.append(line_of_table(rank, told))
        order = sorted(progress.values())
        behind = [
            f"rank {rank}"
            for rank in ranks
            if rank not in progress or progress[rank] == order[0] < order[-1]
        ]
        return "\n".join([f"behind the others: {', '.join(behind) or 'no rank'}", *lines])


def line_of_table(rank: int, told: dict) -> str:
    now = time.time()
    text = (
        f"  rank {rank}: step {told['step']}, {told['phase']} for {now - told['since']:.0f} s, "
        f"in {told['place']}"
    )
    silent = now - told["heard"]
    if silent > 5:
        text += f", silent for {silent:.0f} s"
    return text


ROOT = Path(__file__).resolve().parent.parent
OURS = {ROOT, ROOT / "infra", ROOT / "verify"}
WAITING = " (waits for other ranks)"


def place() -> str:
    """Where the main thread is: the innermost line of ours, the innermost of all, and whether that
    is a collective."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    innermost = stack[-1]
    ours = innermost
    for frame in stack:
        if Path(frame.filename).parent in OURS:
            ours = frame
    text = f"{Path(ours.filename).name}:{ours.lineno} {ours.line}"
    if ours is not innermost:
        text += f" > {Path(innermost.filename).name}:{innermost.lineno}"
    for frame in stack[-8:]:
        if "torch/distributed" in frame.filename or "torch/autograd" in frame.filename:
            return text + WAITING
    return text


# ----------------------------------------------------------------------------------- around a run


def watched(train):
    """`train`, which takes the flags, with a Watch beside it and signals that end the run in order.
    An error is told once, by the first rank that has one; all others end within seconds."""

    @wraps(train)
    def run(args):
        before = {
            number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        NOW.stop = ""
        begin_step(0)
        enter("setup")
        sys.excepthook = print_without_secrets
        # of the main thread alone: a dump of all ends after 100, and rewards.py has more
        faulthandler.register(signal.SIGALRM, file=sys.__stderr__, all_threads=False)
        watch = Watch(args.stall_minutes)
        try:
            return train(args)
        except Exception as error:
            explain(error, args)
            if WORLD > 1:
                watch.fail(error)
            raise
        finally:
            watch.ended.set()
            watch.join(10)  # a thread inside the store aborts an interpreter that ends
            NOW.limit = 0.0
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    return run


def print_without_secrets(kind, error, trace):
    tell("".join(traceback.format_exception(kind, error, trace)))


NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def explain(error: Exception, args):
    """Out of memory, in the user's words: which phase, how long the sequences were, which flag. Out
    of disk."""
    if isinstance(error, OSError) and error.errno in NO_DISK:
        error.add_note(
            f"{args.out}: what is saved is safe: make room or make it writable, then --resume auto"
        )
    # torch's, or told by an engine that failed
    if re.search("out of memory|can't allocate memory", str(error)):
        fix = f"--max_tokens_per_microbatch, now {args.max_tokens_per_microbatch}"
        if NOW.phase in ("setup", "sample", "sync", "report"):  # the engine is awake
            fix = "--gpu_memory"
        error.add_note(
            f"out of memory on rank {RANK} in phase {NOW.phase} of step {NOW.step}; "
            f"the longest sequence had {NOW.longest} tokens: "
            f"lower {fix}, or --offload a model. --plan says what is needed"
        )
