"""How a run ends when it does not end by itself: signals, hangs, ranks that die, memory that runs out.

Owns: where this process is (`NOW`), the thread that tells the other ranks, and the ends that are not ordered.
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
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch.distributed as dist

from infra.log import hide

RANK, WORLD = (
    int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
)

NOW = {
    "step": 0,
    "phase": "setup",
    "since": time.time(),
    "beats": 0,
}  # beats: phases and micro-batches begun


def enter(phase: str, step: int | None = None) -> None:
    """From here on this process is in `phase`."""
    step = NOW["step"] if step is None else step
    NOW.update({"phase": phase, "since": time.time(), "step": step, "beats": NOW["beats"] + 1})
    if Watch.limit:  # for a hang that lets no other thread of Python run, not even the watch
        signal.setitimer(signal.ITIMER_REAL, 1.5 * Watch.limit)


def begin_step(step: int) -> None:
    NOW["step"] = step


def saw_length(tokens: int) -> None:
    """How long the longest sequence of the step is: told when memory runs out."""
    NOW["longest"] = tokens


def counted(items: list):
    """The items; each that is begun is progress, for the watch."""
    for item in items:
        enter(NOW["phase"])
        yield item


STOP: list[tuple[str, float]] = []  # why the run is to end at the next safe point, and since when

STARTED = time.monotonic()


def _signalled(number: int, frame) -> None:
    name, now = signal.Signals(number).name, time.monotonic()
    if (
        STOP and number == signal.SIGINT and now - STOP[-1][1] > 1
    ):  # torchrun hands a Ctrl-C on: two in a moment
        os._exit(130)
    if not STOP:
        os.write(
            2, f"{name} on rank {RANK}: the run saves and ends at the next safe point\n".encode()
        )
    STOP.append((name, now))


def stop_reason(max_minutes: float, gather: Callable) -> str:
    """Why the run is to end here, on all ranks alike; or nothing."""
    if max_minutes and time.monotonic() - STARTED > 60 * max_minutes:
        STOP.append((f"--max_minutes {max_minutes:g}", time.monotonic()))
    return next(filter(None, gather(STOP[0][0] if STOP else "")), "")


class Watch(threading.Thread):
    """Tells the other ranks each second where this one is, by a store that torchrun keeps. When a phase takes longer
    than `minutes`, every rank prints its Python stacks, and rank 0 which ranks are behind. After twice that the run is
    over, before a collective gives up with less to say. When another rank has failed, this one ends at once."""

    limit = 0.0  # seconds

    def __init__(self, minutes: float):
        super().__init__(daemon=True)
        Watch.limit, self.ended, self.store = 60 * minutes, threading.Event(), None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
            )
            self.store = dist.PrefixStore(
                f"watch {os.environ['TORCHELASTIC_RESTART_COUNT']}", store
            )
        self.start()

    def run(self) -> None:
        told = None
        while not self.ended.wait(min(1.0, self.limit / 8 or 1.0)):
            try:
                if (failure := self.failure()) and failure["rank"] != RANK:
                    time.sleep(0.5)  # its error first
                    self.leave(
                        f"rank {RANK}: ended, because rank {failure['rank']} failed first: {failure['error']}"
                    )
                if self.store:
                    self.store.set(
                        f"rank {RANK}", json.dumps(NOW | {"place": _place(), "heard": time.time()})
                    )
            except RuntimeError:
                self.leave(f"rank {RANK}: ended, because torchrun is gone")
            seconds = time.time() - NOW["since"]
            if not self.limit or seconds < self.limit:
                continue
            text = f"rank {RANK}: phase {NOW['phase']} of step {NOW['step']} takes {seconds:.0f} s"
            if told != NOW["since"]:
                told = NOW["since"]
                signal.setitimer(signal.ITIMER_REAL, 0)
                print(text, file=sys.stderr, flush=True)
                signal.pthread_kill(
                    threading.main_thread().ident, signal.SIGALRM
                )  # prints its stack
                time.sleep(0.1)
                if RANK == 0:
                    print(hide(self.table()), file=sys.stderr, flush=True)
            if seconds > 2 * self.limit:
                self.leave(
                    f"{text}: given up. If it needs that, raise --stall_minutes\n{self.table()}"
                )

    def failure(self) -> dict:
        """What the first rank that failed has left in the store."""
        return (
            json.loads(self.store.get("failed"))
            if self.store and self.store.check(["failed"])
            else {}
        )

    def fail(self, error: Exception) -> None:
        """Ends this rank, with the error if it is the first that failed: interpreters that end in order would wait for
        collectives that nobody joins."""
        if failure := self.failure():  # this error comes of a collective that the other has left
            self.leave(f"rank {RANK}: ended, because rank {failure['rank']} failed first")
        text = f"rank {RANK} failed first, step {NOW['step']}, phase {NOW['phase']}:\n{traceback.format_exc()}"
        print(hide(text), file=sys.stderr, flush=True)
        if self.store:
            about = {"rank": RANK, "error": f"{type(error).__name__}: {error}"}
            self.store.compare_set("failed", "", json.dumps(about))
        os._exit(1)

    def table(self) -> str:
        """Where every rank is. Behind are those that have begun least; of equal ones, those that wait for nobody."""
        keys = [f"rank {rank}" for rank in range(WORLD)] if self.store else []
        ranks = {key: json.loads(self.store.get(key)) for key in keys if self.store.check([key])}
        done = {key: (r["beats"], r["place"].endswith(WAITING)) for key, r in ranks.items()}
        behind = [
            k for k in keys if k not in ranks or done[k] == min(done.values()) < max(done.values())
        ]
        lines = [
            f"  {key}: step {r['step']}, {r['phase']} for {time.time() - r['since']:.0f} s, in {r['place']}"
            + (
                f", silent for {time.time() - r['heard']:.0f} s"
                if time.time() - r["heard"] > 5
                else ""
            )
            for key, r in ranks.items()
        ]
        return "\n".join([f"behind the others: {', '.join(behind) or 'no rank'}", *lines])

    def leave(self, message: str) -> None:
        """Ends this process now: what it waits for would not let it end in order."""
        print(hide(message), file=sys.stderr, flush=True)
        os._exit(1)


ROOT = Path(__file__).resolve().parent.parent
OURS = {ROOT, ROOT / "infra", ROOT / "verify"}
WAITING = " (waits for other ranks)"


def _place() -> str:
    """Where the main thread is: the innermost line of ours, the innermost of all, and whether that is a collective."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    own = [frame for frame in stack if Path(frame.filename).parent in OURS] or stack
    waits = any(
        "torch/distributed" in f.filename or "torch/autograd" in f.filename for f in stack[-8:]
    )
    inner = (
        f" > {Path(stack[-1].filename).name}:{stack[-1].lineno}" if stack[-1] is not own[-1] else ""
    )
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].line}{inner}" + (
        WAITING if waits else ""
    )


def watched(train):
    """`train`, which takes the flags, with a Watch beside it and signals that end the run in order. An error is told
    once, by the first rank that has one; all others end within seconds."""

    @wraps(train)
    def run(args, *more):
        before = {
            number: signal.signal(number, _signalled) for number in (signal.SIGTERM, signal.SIGINT)
        }
        STOP.clear()
        NOW.update(step=0, phase="setup", since=time.time())
        sys.excepthook = lambda *error: print(
            hide("".join(traceback.format_exception(*error))), file=sys.stderr
        )
        # of the main thread alone: a dump of all ends after 100, and rewards.py has more
        faulthandler.register(signal.SIGALRM, file=sys.__stderr__, all_threads=False)
        watch = Watch(args.stall_minutes)
        try:
            return train(args, *more)
        except Exception as error:
            _explain(error, args)
            if WORLD > 1:
                watch.fail(error)
            raise
        finally:
            watch.ended.set()
            watch.join(10)  # a thread inside the store aborts an interpreter that ends
            Watch.limit = 0.0
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    return run


def _explain(error: Exception, args) -> None:
    """Out of memory, in the user's words: which phase, how long the sequences were, which flag. Out of disk."""
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
    ):
        error.add_note(
            f"{args.out}: what is saved is safe: make room or make it writable, then --resume auto"
        )
    if re.search(
        "out of memory|can't allocate memory", str(error)
    ):  # torch's, or told by an engine that failed
        sampling = NOW["phase"] in ("setup", "sample", "sync", "report")
        fix = (
            "--gpu_memory"
            if sampling
            else f"--max_tokens_per_microbatch, now {args.max_tokens_per_microbatch}"
        )
        error.add_note(
            f"out of memory on rank {RANK} in phase {NOW['phase']} of step {NOW['step']}; the longest sequence had "
            f"{NOW.get('longest', 0)} tokens: lower {fix}, or --offload a model. --plan says what is needed"
        )
