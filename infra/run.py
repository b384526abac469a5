"""Everything that happens around a step of PPO and is not PPO.

A Run owns the run folder, the log, the clocks, checkpoints, and the ways in which a run ends in
order. The loop in ppo.py calls it; none of these calls changes a number.

    run.phase(name)          times a block, measures its memory, shows it to the watch over hangs, profiles it
    run.progress(items)      the items; each one that is begun is a sign of life for the watch
    run.check_finite(...)    ends the run on all ranks before a number that is not finite reaches a weight
    run.log(row, samples)    metrics.jsonl, samples.jsonl, W&B
    run.warn_if_diverging(row)  warnings about metrics that have gone bad; ends a run that learns no more
    run.save_if_due(row)     a checkpoint, if flags or the clock say so
    run.should_stop()        SIGTERM, Ctrl-C, --max_minutes: the same answer on every rank

Refuses to know: what is trained, and by which formula."""

import importlib
import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from infra import checkpoint, clock, dist, guards, watchdog
from infra.log import append, hidden, hide, say, write


class Run:
    """The services of one run. `main` is True on the one rank that speaks and writes."""

    def __init__(self, args, ranks: dist.Ranks):
        self.args = args
        self.ranks = ranks
        self.main = ranks.rank == 0
        self.everywhere = partial(dist.everywhere, ranks=ranks)
        self.out = Path(args.out)

        self.config = {}
        self.checkpoint = None  # the folder that the run goes on from
        self.start = 0  # steps that the weights had at first
        self.done = 0  # ... have had now
        self.saved = 0  # ... had when they were last saved
        self.streaks = {}  # metric -> steps in a row for which it has been bad
        self.best = -math.inf  # of --keep_best
        self.carried = {"kl_coef": None}  # what the algorithm wants back after a resume

        self.trained = {}  # name -> Trained; set by `attach`
        self.tokenizer = None
        self.saver = checkpoint.Saver(args.out, args.keep_last, args.keep_best)
        self.writes = False  # into its folder: on rank 0, once it is open
        self.board = None  # of W&B
        self.history = []  # rows of metrics.jsonl
        self.meter = dist.Meter()
        self.times = {}  # seconds of the phases
        self.times_of_next_step = {}
        self.stopped = ""  # why the run ends before its last step

    # ------------------------------------------------------------------------- set-up and end

    def find_checkpoint(self, config: dict, may_change: set[str]):
        """With --resume auto, the newest whole checkpoint of the run folder; its flags must be
        those of `config`, but for those that `may_change`."""
        self.config = config
        if self.args.resume == "no":
            return
        found = self.everywhere(checkpoint.checkpoints(self.out))[0]  # what rank 0 sees
        self.checkpoint, state = checkpoint.find_checkpoint(
            found, config, may_change, self.everywhere
        )
        if self.checkpoint:
            self.start = self.done = self.saved = state["step"]
            self.streaks = state["streaks"]
            self.best = state["best"]
            self.carried = {"kl_coef": state["kl_coef"]}

    def attach(self, trained: dict, tokenizer):
        """The models and optimizers that checkpoints are made of, as name -> models.Trained."""
        self.trained = trained
        self.tokenizer = tokenizer
        checkpoint.load_moments(self.checkpoint, trained)

    def open(self):
        """From here on the run writes into its folder: config.json, metrics.jsonl, samples.jsonl, a
        copy of the code; and the same numbers for W&B."""
        if not self.main:
            return
        samples = []
        if self.start:  # later rows are of steps that will come again
            self.history = read_rows(self.out / "metrics.jsonl", self.start)
            samples = read_rows(self.out / "samples.jsonl", self.start)
        self.out.mkdir(parents=True, exist_ok=True)
        config = {"wandb_id": wandb_id(self.out, self.start)} | self.config
        write(self.out / "config.json", hide(json.dumps(config, indent=1)))
        write(self.out / "metrics.jsonl", lines(self.history))
        write(self.out / "samples.jsonl", lines(samples))
        copy_code(self.out)
        self.board = start_wandb(self.args.wandb, self.out.name, config)
        self.writes = True

    def close(self):
        self.save_now()
        self.saver.wait()
        if self.stopped:
            self.say(
                f"{self.stopped}: ended after step {self.done} of {self.args.steps}; "
                "--resume auto goes on from there"
            )

    def say(self, text: str):
        if self.main:
            say(text)

    # ---------------------------------------------------------------------------------- phases

    def begin_step(self, step: int):
        """Step 1, 2, ...; its clocks start with what saving after the step before took."""
        watchdog.begin_step(step)
        self.meter = dist.Meter()
        self.times = self.times_of_next_step
        self.times_of_next_step = {}

    @contextmanager
    def phase(self, name: str):
        folder = None
        if watchdog.NOW.step == self.args.profile and name in ("forward", "update", "sync"):
            folder = self.out / "profile"
        file = f"{name}_rank{self.ranks.rank}"
        with clock.timed(self.times, name), clock.profiled(folder, file):
            yield

    def progress(self, items):
        return watchdog.counted(items)

    # ---------------------------------------------------------------------------------- guards

    def check_finite(self, batch, update: dict | None = None, **tensors: Tensor | None):
        """Ends the run on all ranks when one of the tensors is not finite on one of them. What the
        step was made of stays in bad_step_N: weights and moments as they are now, and in batch.pt
        `batch` and which `update` of it was tried. Collective, unless there are no tensors (which
        all ranks must know alike)."""
        if not tensors:
            return
        bad = dist.gather(guards.not_finite(**tensors), self.ranks)
        if not bad:
            return
        step = self.done + 1
        folder = self.out / f"bad_step_{step}"
        error = (
            f"step {step}: {'; '.join(bad[:4])}: nothing was updated with it, nothing saved over"
        )
        self.save(folder.name, wait=True)
        if self.main:
            record = {
                "args": hidden(asdict(self.args)),
                "error": error,
                "update": update,
                "batch": batch.plain(),
            }
            torch.save(record, folder / "batch.pt")
        raise FloatingPointError(
            f"{error}. Once more, without an engine: python tools/replay.py {folder / 'batch.pt'}"
        )

    def should_stop(self) -> bool:
        """Is this safe point the run's last? The same answer on every rank."""
        self.stopped = watchdog.stop_reason(self.args.max_minutes, self.everywhere)
        return bool(self.stopped)

    def warn_if_diverging(self, row: dict, young: bool):
        """By GUARDS: warns about a step's metrics, at the 1st, 10th, 20th ... time in a row.
        RuntimeError, and the weights aside, when it has gone on for too long. Alike on all ranks."""
        for text, streak, limit in guards.bad_metrics(row, self.streaks, young):
            if streak >= limit:
                aside = f"stopped_step_{row['step']}"
                self.save(aside, wait=True)
                raise RuntimeError(
                    f"{text}. Stopped, as GUARDS in infra/guards.py says; "
                    f"the weights are in {aside}, not in checkpoints"
                )
            if streak == 1 or streak % 10 == 0:
                self.say(f"warning: {text} (stops after {limit})")

    # -------------------------------------------------------------------- the log, checkpoints

    def log(self, row: dict, samples: list[dict] = ()):
        """On the disk when it returns: the samples first, so that a row says that its samples are
        there."""
        self.history.append(row)
        if not self.writes:
            return
        append(self.out / "samples.jsonl", lines(samples))
        append(self.out / "metrics.jsonl", lines([row]))
        try:
            if self.board:
                self.board.log(row, step=row["step"])
        except Exception as error:  # a page of curves is no reason to end a run
            say(
                "warning: W&B has failed and is left alone from here on; "
                f"metrics.jsonl has everything: {error}"
            )
            self.board = None

    def save(self, name: str, wait: bool = False):
        """A checkpoint of step `done`. What is not in it is a function of the step: prompts, seeds,
        learning rates."""
        final = self.out / name
        folder = self.saver.begin(final, self.trained, self.everywhere)
        parts = checkpoint.checkpoint_parts(self.trained, self.ranks, self.tokenizer, folder)
        rows = {row["step"]: row for row in self.history}
        state = {
            "step": self.done,
            "metrics": rows.get(self.done, {}),
            "config": self.config,
            **self.carried,
            "streaks": self.streaks,
            "best": self.best,
        }
        self.saver.save(final, parts, state)
        if wait:
            self.saver.wait()
            self.everywhere(None)  # rank 0 has given it its name

    def save_now(self, wait: bool = False):
        """A checkpoint of step `done`, if there is none yet."""
        if self.done > self.saved:
            self.save(f"checkpoints/step_{self.done}", wait)
            self.saved = self.done

    def save_if_due(self, row: dict):
        value = row.get(self.args.keep_best, -math.inf)
        better = value > self.best
        self.best = max(self.best, value)
        by_clock = self.everywhere(self.saver.due(self.args.save_minutes))[0]  # that of rank 0
        by_steps = self.args.save_every > 0 and self.done % self.args.save_every == 0
        if better or by_clock or by_steps:
            with clock.timed(self.times_of_next_step, "save"):
                self.save_now()


# --------------------------------------------------------------------------------- the run folder


def check_folder(out: Path, resume: bool):
    """Nothing is written over, and nothing into a folder of something else; models' have a
    config.json, too."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()}
    names.discard("config.json.new")  # killed while it was written
    config = out / "config.json"
    ours = config.exists() and '"prompts_per_step"' in config.read_text(errors="replace")
    if resume and (ours or not names):
        return
    why = "is no run folder: " if resume else "exists: go on with --resume auto, or "
    raise ValueError(f"out={str(out)!r} {why}choose another --out; nothing is written over")


def lines(rows: list[dict]) -> str:
    return hide("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path, last_step: int) -> list[dict]:
    """Rows of a JSONL file up to that step; lines torn by the end of the machine are told and left
    out."""
    rows = []
    if not path.exists():
        return rows
    for text in open(path, errors="replace"):
        try:
            row = json.loads(text)
            if row["step"] <= last_step:
                rows.append(row)
        except (ValueError, TypeError, KeyError):
            say(f"warning: {path}: a damaged line is left out: {text[:60]!r}")
    return rows


def copy_code(out: Path):
    """The files that made the run, so that it can be looked up what it did."""
    root = Path(__file__).resolve().parent.parent
    for folder in (".", "infra", "verify"):
        (out / folder).mkdir(exist_ok=True)
        for path in (root / folder).glob("*.py"):
            shutil.copy(path, out / folder)


def wandb_id(out: Path, start: int) -> str:
    """Of the run that is gone on with; else a new one."""
    config = out / "config.json"
    if start and config.exists():
        before = re.search(r'"wandb_id": "(\w+)"', config.read_text(errors="replace"))
        if before:
            return before[1]
    return os.urandom(4).hex()


def start_wandb(project: str | None, name: str, config: dict):
    """A W&B run, or None: also when it cannot be had, which is told."""
    if not project:
        return None
    try:
        wandb = importlib.import_module("wandb")
        return wandb.init(
            project=project,
            name=name,
            id=config["wandb_id"],
            resume="allow",
            config=hidden(config),
            settings=wandb.Settings(init_timeout=30),
        )
    except Exception as error:
        say(
            "warning: W&B did not start; metrics.jsonl has everything: "
            f"{type(error).__name__}: {error}"
        )
        return None
