"""What a run leaves behind, what it says while it goes on, and how it ends.

Owns: the run folder (flags, metrics, samples, W&B; no secrets), checkpoints as files (whole or absent, checked before
they are read), the clocks of the phases (seconds, memory), and everything that happens to long
runs: signals, time limits, phases that never end, ranks that die, memory that runs out, learning that goes wrong.
Refuses to know: how a model is sharded (kernels.py gathers its tensors), and what a step does.
Left out on purpose: pickles. A checkpoint is safetensors and JSON, so that loading one runs nobody's code.
"""
import errno
import faulthandler
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))

# ---------------------------------------------------------------------------------------- where this process is, clocks

NOW = {"step": 0, "phase": "setup", "since": time.time(), "beats": 0}  # beats: phases and micro-batches begun


def enter(phase: str, step: int | None = None) -> None:
    """From here on this process is in `phase`."""
    step = NOW["step"] if step is None else step
    NOW.update({"phase": phase, "since": time.time(), "step": step, "beats": NOW["beats"] + 1})
    if Watch.limit:  # for a hang that lets no other thread of Python run, not even the watch
        signal.setitimer(signal.ITIMER_REAL, 1.5 * Watch.limit)


def counted(items: list):
    """The items; each that is begun is progress, for the watch."""
    for item in items:
        enter(NOW["phase"])
        yield item


@contextmanager
def timed(times: dict[str, float], phase: str):
    """Adds the block's seconds to times["time/<phase>"] and times["time/step"]; keeps the most memory that this process
    took in it in times["perf/peak_gb_<phase>"]. Waits for the GPU: the blame falls on the right phase."""
    enter(phase)
    start, before = time.perf_counter(), unseen()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):  # Linux: from here on VmHWM is the peak of resident memory
        Path("/proc/self/clear_refs").write_text("5")
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, f"perf/peak_gb_{phase}"
    for name in (f"time/{phase}", "time/step"):
        times[name] = times.get(name, 0.0) + seconds
    times[peak] = max(times.get(peak, 0.0), memory_peak(before))


def unseen() -> int:
    """Bytes of the card that torch's allocator does not know of (contexts, NCCL), less those of a sleeping engine, that
    it counts although they are free."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def memory_peak(before: int = 0) -> float:
    """GB (2**30) taken of the card, or on CPU by this process, at most since the phase began. `before` is what `unseen`
    said then: an engine may wake or fall asleep in between, and is counted."""
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() + max(before, unseen())) / 2**30
    lines = Path("/proc/self/status").read_text().splitlines() if os.path.exists("/proc/self/status") else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


@contextmanager
def profiled(folder: Path | None, name: str):
    """Records every operation of the block in folder/name.json.gz, for ui.perfetto.dev; on CUDA also every allocation,
    in name.pickle, for pytorch.org/memory_viz. Without a folder, nothing."""
    if not folder:
        yield
        return
    cuda = torch.cuda.is_available()
    folder.mkdir(parents=True, exist_ok=True)
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    with torch.profiler.profile(record_shapes=True, profile_memory=True) as profiler:
        yield
    profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
    if cuda:
        torch.cuda.memory._dump_snapshot(str(folder / f"{name}.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)


# --------------------------------------------------------------------------------------- the watch: hangs, ends, errors

STOP: list[tuple[str, float]] = []  # why the run is to end at the next safe point, and since when
STARTED = time.monotonic()


def _signalled(number: int, frame) -> None:
    name, now = signal.Signals(number).name, time.monotonic()
    if STOP and number == signal.SIGINT and now - STOP[-1][1] > 1:  # torchrun hands a Ctrl-C on: two in a moment
        os._exit(130)
    if not STOP:
        os.write(2, f"{name} on rank {RANK}: the run saves and ends at the next safe point\n".encode())
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
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            self.store = dist.PrefixStore(f"watch {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        self.start()

    def run(self) -> None:
        told = None
        while not self.ended.wait(min(1.0, self.limit / 8 or 1.0)):
            try:
                if (failure := self.failure()) and failure["rank"] != RANK:
                    time.sleep(0.5)  # its error first
                    self.leave(f"rank {RANK}: ended, because rank {failure['rank']} failed first: {failure['error']}")
                if self.store:
                    self.store.set(f"rank {RANK}", json.dumps(NOW | {"place": _place(), "heard": time.time()}))
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
                signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)  # prints its stack
                time.sleep(0.1)
                if RANK == 0:
                    print(hide(self.table()), file=sys.stderr, flush=True)
            if seconds > 2 * self.limit:
                self.leave(f"{text}: given up. If it needs that, raise --stall_minutes\n{self.table()}")

    def failure(self) -> dict:
        """What the first rank that failed has left in the store."""
        return json.loads(self.store.get("failed")) if self.store and self.store.check(["failed"]) else {}

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
        behind = [k for k in keys if k not in ranks or done[k] == min(done.values()) < max(done.values())]
        lines = [
            f"  {key}: step {r['step']}, {r['phase']} for {time.time() - r['since']:.0f} s, in {r['place']}"
            + (f", silent for {time.time() - r['heard']:.0f} s" if time.time() - r["heard"] > 5 else "")
            for key, r in ranks.items()
        ]
        return "\n".join([f"behind the others: {', '.join(behind) or 'no rank'}", *lines])

    def leave(self, message: str) -> None:
        """Ends this process now: what it waits for would not let it end in order."""
        print(hide(message), file=sys.stderr, flush=True)
        os._exit(1)


WAITING = " (waits for other ranks)"


def _place() -> str:
    """Where the main thread is: the innermost line of ours, the innermost of all, and whether that is a collective."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    own = [frame for frame in stack if Path(frame.filename).parent == Path(__file__).parent] or stack
    waits = any("torch/distributed" in f.filename or "torch/autograd" in f.filename for f in stack[-8:])
    inner = f" > {Path(stack[-1].filename).name}:{stack[-1].lineno}" if stack[-1] is not own[-1] else ""
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].line}{inner}" + (WAITING if waits else "")


def watched(train):
    """`train`, which takes the flags, with a Watch beside it and signals that end the run in order. An error is told
    once, by the first rank that has one; all others end within seconds."""

    @wraps(train)
    def run(args, *more):
        before = {number: signal.signal(number, _signalled) for number in (signal.SIGTERM, signal.SIGINT)}
        STOP.clear()
        NOW.update(step=0, phase="setup", since=time.time())
        sys.excepthook = lambda *error: print(hide("".join(traceback.format_exception(*error))), file=sys.stderr)
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
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        error.add_note(f"{args.out}: what is saved is safe: make room or make it writable, then --resume auto")
    if re.search("out of memory|can't allocate memory", str(error)):  # torch's, or told by an engine that failed
        sampling = NOW["phase"] in ("setup", "sample", "sync", "report")
        fix = "--gpu_memory" if sampling else f"--max_tokens_per_microbatch, now {args.max_tokens_per_microbatch}"
        error.add_note(
            f"out of memory on rank {RANK} in phase {NOW['phase']} of step {NOW['step']}; the longest sequence had "
            f"{NOW.get('longest', 0)} tokens: lower {fix}, or --offload a model. --plan says what is needed"
        )


# ----------------------------------------------------------------------------------- guards: numbers that have gone bad

# metric: (when it warns, after how many steps in a row the run stops, what it means). Edit freely
GUARDS = {
    "policy/approx_kl": (lambda x: x > 0.3, 20, "the policy jumps: lower --lr or --ppo_epochs"),
    "policy/entropy": (lambda x: x < 0.005, 200, "the policy explores no more: lower --lr, raise --entropy_coef"),
    "mismatch/logp_abs_mean": (lambda x: x > 0.1, 20, "engine and trainer have other distributions: try --dtype fp32"),
    "critic/explained_var": (lambda x: x < 0, 200, "the critic is worse than a constant: raise --critic_warmup"),
    "reward/std": (lambda x: x == 0, 200, "all rewards are equal and teach nothing: look at the samples"),
}


def divergence(row: dict, streaks: dict[str, int], young: bool, keep: Callable) -> list[str]:
    """Warnings about a step's metrics, at the 1st, 10th, 20th ... time in a row; `streaks` counts, on all ranks alike.
    A `young` critic may be wrong. RuntimeError, and the weights aside by `keep`, when it has gone on for too long."""
    found = []
    for name, (bad, limit, meaning) in GUARDS.items():
        wrong = name in row and bad(row[name]) and not (young and name.startswith("critic/"))
        streaks[name] = streaks.get(name, 0) + 1 if wrong else 0
        text = f"step {row['step']}: {name} is {row.get(name, 0.0):.3g}, {streaks[name]} steps in a row: {meaning}"
        if streaks[name] >= limit:
            keep(aside := f"stopped_step_{row['step']}", wait=True)
            raise RuntimeError(f"{text}. Stopped, as runs.GUARDS says; the weights are in {aside}, not in checkpoints")
        if streaks[name] == 1 or (wrong and streaks[name] % 10 == 0):
            found.append(f"warning: {text} (stops after {limit})")
    return found


def not_finite(**tensors: Tensor | None) -> list[str]:
    """What each of the tensors that are not finite has, and where: nothing, when all are."""
    return [
        f"rank {RANK}, {name}: {int((~torch.isfinite(x)).sum())} of {x.numel()} not finite"
        + (f", first at {(~torch.isfinite(x)).nonzero()[0].tolist()}" if x.dim() else "")
        for name, x in tensors.items()
        if x is not None and not torch.isfinite(x).all()
    ]


# ------------------------------------------------------------------------------------------------------- the run folder


SECRET_NAME = re.compile("TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE|AUTH)_?KEY")
SECRET = re.compile(  # tokens of well-known places; in addresses what stands before an @, and keys
    r"\b(?:hf_|sk-|ghp_|github_pat_|xox[bp]-)\w[\w-]{15,}|(?<=://)[^/\s@\"]+(?=@)|[?&]\w*(?i:token|key)=[^&\s\"]{8,}"
)


def hide(text: str) -> str:
    """Without values of environment variables that are named like secrets, and without what looks like a token."""
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_NAME.search(name.upper()):
            text = text.replace(value, f"<{name}>").replace(json.dumps(value)[1:-1], f"<{name}>")
    return SECRET.sub("<secret>", text)


def hidden(flags: dict) -> dict:
    return json.loads(hide(json.dumps(flags)))


def say(text: str) -> None:
    print(hide(text), flush=True)


def write(path: Path, text: str) -> None:
    """All of it or, when the machine dies, what was there before."""
    aside = path.with_name(path.name + ".new")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def check_folder(out: Path, resume: bool) -> None:
    """Nothing is written over, and nothing into a folder of something else; models' have a config.json, too."""
    there = {path.name for path in out.iterdir()} - {"config.json.new"} if out.exists() else set()  # .new: killed there
    ours = "config.json" in there and '"prompts_per_step"' in (out / "config.json").read_text(errors="replace")
    if out.exists() and not (resume and (ours or not there)):
        why = "is no run folder: " if resume else "exists: go on with --resume auto, or "
        raise ValueError(f"out={str(out)!r} {why}choose another --out; nothing is written over")


def open_folder(out: Path, config: dict, start: int, project: str | None, main: bool):
    """(rows of metrics.jsonl up to step `start`, a function that adds a row there and to W&B, and samples to their
    file). Later rows are of steps that will come again. Only the `main` rank writes and knows the rows before."""
    history: list[dict] = []
    if not main:
        return history, lambda row, samples=(): history.append(row)
    kept = {"metrics.jsonl": history, "samples.jsonl": []}
    for name in kept if start else ():
        for text in open(out / name, errors="replace") if (out / name).exists() else ():
            try:
                row = json.loads(text)
                kept[name].extend([row] if row["step"] <= start else [])
            except (ValueError, TypeError, KeyError):  # torn by the end of the machine
                say(f"warning: {out / name}: a damaged line is left out: {text[:60]!r}")
    out.mkdir(parents=True, exist_ok=True)
    before = re.search(r'"wandb_id": "(\w+)"', (out / "config.json").read_text(errors="replace") if start else "")
    config = {"wandb_id": before[1] if before else os.urandom(4).hex()} | config
    write(out / "config.json", hide(json.dumps(config, indent=1)))
    for name, rows in kept.items():
        write(out / name, hide("".join(json.dumps(row) + "\n" for row in rows)))
    for path in Path(__file__).parent.glob("*.py"):
        shutil.copy(path, out)
    board = None

    def log(row: dict, samples: list[dict] = ()) -> None:
        nonlocal board
        history.append(row)
        for name, rows in (("samples.jsonl", samples), ("metrics.jsonl", [row])):
            with open(out / name, "a") as file:
                file.write(hide("".join(json.dumps(r) + "\n" for r in rows)))
                file.flush()
                os.fsync(file.fileno())
        try:
            if board:
                board.log(row, step=row["step"])
        except Exception as error:  # a page of curves is no reason to end a run
            say(f"warning: W&B has failed and is left alone from here on; metrics.jsonl has everything: {error}")
            board = None

    try:
        if project:
            wandb = __import__("wandb")
            options = {"config": hidden(config), "settings": wandb.Settings(init_timeout=30)}
            board = wandb.init(project=project, name=out.name, id=config["wandb_id"], resume="allow", **options)
    except Exception as error:
        say(f"warning: W&B did not start; metrics.jsonl has everything: {type(error).__name__}: {error}")
    return history, log


def plan(args, ranks, models: dict, made: dict[str, str], start: int) -> str:
    """The batch arithmetic, and what was chosen for the user."""
    sizes = {k: f"{sum(p.numel() for p in m.parameters()) / 1e6:.1f}M" if m else "none" for k, m in models.items()}
    made = made | {"engine": f"{args.engine} tp {args.tp}"} | sizes
    return (
        f"plan: {args.prompts_per_step} prompts x {args.samples_per_prompt} = {args.batch_size} samples a step; "
        f"{args.ppo_epochs} epochs x {args.batch_size // args.minibatch} minibatches of {args.minibatch} samples; "
        f"micro-batches <= {args.max_tokens_per_microbatch * args.sp} tokens on {ranks.rows} x {ranks.sp} ranks; "
        f"steps {start} to {args.steps}\nmade: " + ", ".join(f"{k} {v}" for k, v in made.items())
    )


def line(row: dict, steps: int, seconds_per_step: float) -> str:
    """One step for people; fixed order, so that grep works."""
    minutes, mfu = seconds_per_step * (steps - row["step"]) / 60, row["perf/mfu"]
    clip = row.get("policy/clipfrac_low", 0.0) + row.get("policy/clipfrac_high", 0.0)
    phases = " + ".join(f"{k[5:]} {v:.1f}" for k, v in row.items() if k.startswith("time/") and k != "time/step")
    return (
        f"step {row['step']:4d}/{steps} | reward {row['reward/mean']:.3f} correct {row['reward/correct']:.3f} | "
        f"len {row['rollout/length_mean']:.0f} trunc {row['rollout/truncated_frac']:.0%} | kl "
        f"{row.get('policy/approx_kl', 0):.4f} ent {row.get('policy/entropy', 0):.2f} clip {clip:.1%} "
        f"gn {row.get('policy/grad_norm', 0):.2f} ev {row.get('critic/explained_var', math.nan):.2f} gap "
        f"{row['mismatch/logp_abs_mean']:.0e} mfu {mfu:.0%} | {row['time/step']:.1f}s = {phases} | eta {minutes:.0f}m"
        + (f" | eval {row['eval/correct']:.3f}" if "eval/correct" in row else "")
    )


# ---------------------------------------------------------------------------------------------------------- checkpoints
# step_N/{policy,critic}: Hugging Face folders, fp32; step_N/*.optimizer*: AdamW's moments, whole, for any ranks;
# state.json: what else a run is, and the SHA-256 of every file. A folder that has such a name is whole.


def checkpoints(out: str | Path) -> list[Path]:
    """Complete ones, the newest first."""
    found = [path for path in Path(out, "checkpoints").glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint; {} when it cannot be read, or is not as it was written."""
    try:
        state = json.loads((folder / "state.json").read_text())
        seal = state.pop("seal")
        return state if seal == hashlib.sha256(json.dumps(state).encode()).hexdigest() else {}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint. Reading all of it takes time: each rank reads a part."""
    files, bad = read_state(folder).get("files", {"state.json": ""}), []
    for name in sorted(files)[part::parts]:
        try:
            bad += [] if digest(folder / name) == files[name] else [f"{name} is not what was written"]
        except OSError as error:
            bad.append(f"{name}: {error.strerror}")
    return bad


def find_checkpoint(found: list[Path], config: dict, free: set[str], gather: Callable) -> tuple[Path | None, dict]:
    """The newest one whose files are all as they were written, and its state. Newer, damaged ones get another name; the
    flags must be those of the run that wrote it, but for the `free` ones. `gather` joins what the ranks found."""
    damaged = []
    for path in found:
        if bad := [text for part in gather(damage(path, RANK, WORLD)) for text in part]:
            damaged.append(path)
            say(f"warning: {path} is damaged: {'; '.join(bad[:5])}") if RANK == 0 else None
        else:
            state, new = read_state(path), hidden(config)
            old = state["config"]
            names = [k for k in sorted(old | new) if k not in free and old.get(k) != new.get(k)]
            if names:
                changed = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in names)
                fix = f"give the old values, or start a new run from {path}/policy and {path}/critic"
                raise ValueError(f"resume: {path} is of a run with other flags: {changed}: {fix}")
            for other in damaged if RANK == 0 else ():  # not before there is a whole one: the next start is told, too
                shutil.rmtree(f"{other}.damaged", ignore_errors=True)
                other.rename(f"{other}.damaged")
            if RANK == 0 and path.name.startswith("step_"):  # the end may have come between a rename and this
                tidy(path.parent, config["keep_last"], config["keep_best"])
            return path, state
    if found:
        raise ValueError(f"resume: none of {len(found)} checkpoints beside {found[0]} is whole: the warnings say why")
    return None, {"step": 0, "streaks": {}, "best": float("-inf"), "kl_coef": None}


class Saver:
    """Writes checkpoints behind the run's back: tensors are on the CPU already, so the next step may change the models.
    One at a time; what went wrong is raised by `wait` and the next `save`."""

    def __init__(self, out: str | Path, keep_last: int, keep_best: str):
        self.out, self.keep_last, self.keep_best, self.saved = Path(out), keep_last, keep_best, time.monotonic()
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending = self.pool.submit(int)  # nothing yet

    def begin(self, final: Path, names: Iterable[str], gather: Callable) -> Path:
        """The folder beside `final` to write into, with an empty folder for each of `names`, on all ranks."""
        self.wait()
        aside = final.with_name(final.name + ".tmp")
        if RANK == 0:
            shutil.rmtree(aside, ignore_errors=True)
            for name in names:
                (aside / name).mkdir(parents=True)
        gather(None)  # with replicas, tensors are gathered among neighbours only
        if not aside.is_dir():
            raise OSError(f"rank {RANK} does not see {aside}: --out must be a folder that all machines share")
        return aside

    def save(self, final: Path, parts: dict[str, dict[str, Tensor]], state: dict) -> None:
        """`parts`: what this rank writes, file -> tensors on the CPU; `state`: what goes into state.json."""
        self.saved, state = time.monotonic(), json.loads(json.dumps(state))  # as it is now
        self.pending = self.pool.submit(self._write, final, parts, state)

    def wait(self) -> None:
        self.pending.result()

    def due(self, minutes: float) -> bool:
        """Is it time, by the clock? Raises what went wrong with the last one."""
        if self.pending.done():
            self.pending.result()
        return bool(minutes) and time.monotonic() - self.saved > 60 * minutes

    def _write(self, final: Path, parts: dict[str, dict[str, Tensor]], state: dict) -> None:
        from safetensors.torch import save_file

        aside, files = final.with_name(final.name + ".tmp"), {}
        try:
            for name, tensors in parts.items():
                save_file(tensors, aside / name, {"format": "pt"})
                sync(aside / name)
                files[name] = digest(aside / name)
            write(aside / f"rank{RANK}.json", json.dumps(files))
            if RANK == 0:
                self._finish(final, aside, state)
        except Exception as error:
            free = shutil.disk_usage(self.out).free / 2**30
            for name in parts:  # not the files of the others: their errors would hide this one
                (aside / name).unlink(missing_ok=True)
            if WORLD == 1:
                shutil.rmtree(aside, ignore_errors=True)
            last = next(iter(checkpoints(self.out)), "none")
            text = f"{final} could not be written ({free:.1f} GB free there): {error}. Nothing else was touched; the "
            raise OSError(text + f"newest complete checkpoint: {last}. Make room, then --resume auto") from error

    def _finish(self, final: Path, aside: Path, state: dict) -> None:
        manifests = [aside / f"rank{rank}.json" for rank in range(WORLD)]
        while not all(path.exists() for path in manifests):
            if not threading.main_thread().is_alive():
                return
            time.sleep(0.02)
        files = {}
        for path in manifests:
            files |= json.loads(path.read_text())
            path.unlink()
        for path in [p for p in aside.rglob("*") if p.is_file()]:  # configurations and tokenizers
            name = str(path.relative_to(aside))
            if name not in files:
                sync(path)
                files[name] = digest(path)
        state = hidden(state | {"files": files})
        seal = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        write(aside / "state.json", json.dumps(state | {"seal": seal}, indent=1))
        for folder in {aside, *(p for p in aside.rglob("*") if p.is_dir())}:
            sync(folder)
        if not final.name.startswith("step_"):  # bad_step_N, for the second time
            shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        sync(final.parent)
        if final.name.startswith("step_"):
            tidy(final.parent, self.keep_last, self.keep_best)


def tidy(folder: Path, keep_last: int, keep_best: str) -> None:
    """Moves the links, then deletes what is neither among the last nor the best, and what an end left half done."""
    found = checkpoints(folder.parent)
    point(folder / "latest", found[0].name)
    values = {path: read_state(path).get("metrics", {}).get(keep_best) for path in found}
    best = max((path for path in found if values[path] is not None), key=lambda path: values[path], default=None)
    if best:
        point(folder / "best", best.name)
    for path in found[keep_last or len(found) :]:
        if path != best:
            os.rename(path, f"{path}.old")
    for path in (*folder.glob("step_*.old"), *folder.glob("step_*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def point(link: Path, target: str) -> None:
    aside = link.with_name(link.name + ".new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)


def sync(path: Path) -> None:
    """To the disk, not only to the system's memory; of a folder: its names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
