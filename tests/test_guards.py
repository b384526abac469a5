"""Faults that are really there: NaN in the numbers, ranks that hang or raise, signals, engines that
fail, full memory.

tests/faults.py plants them into toy runs. A run is made when a test first asks for it; what it
leaves is read by several.
"""

import argparse
import json
import os
import random
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import faults
import launch
import pytest
import torch
import toy
from launch import metrics, numbers
from safetensors.torch import load_file

import ppo
from infra import guards, run
from infra.checkpoint import Saver, checkpoints, damage, read_state
from infra.dist import Ranks, start_ranks
from tools import replay

STEPS = "--steps 3 --save_every 1 --prompts_per_step 16 --minibatch_size 8 --lr 1e-3".split()
ONE_UPDATE = "--ppo_epochs 1 --minibatch_size 16".split()
# seconds that a phase may take: 12, and the run ends after 24; no phase takes so long on a busy machine
STALL = "--stall_minutes 0.2 --max_tokens_per_microbatch 32".split()
SECRETS = {name: secrets.token_hex(16) for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET")}
IN_URLS = secrets.token_hex(16), "hf_" + secrets.token_hex(16)
URLS = ["--stop", f"https://me:{IN_URLS[0]}@host/a", f"https://{IN_URLS[1]}@host/b"]

RUNS = {  # name: fault and flags. Those of two-... are on two ranks
    "good": ["none"],
    "good-one": ["none", *ONE_UPDATE],
    "reward": ["reward:2:0"],
    "advantage": ["advantage:2:0"],
    "engine-weights": ["engine-weights:2:0"],
    "critic-gradient": ["critic-gradient:2:0:2"],  # in the second update of the step
    "one-update": ["critic-gradient:2:0", *ONE_UPDATE],
    "synced-weights": ["synced-weights:2:0"],
    "interrupt": ["interrupt:2:0"],
    "interrupt-twice": ["interrupt-twice:2:0"],
    "max-minutes": ["hours-later:2:0", "--max_minutes", 300, "--save_every", 0],
    "secret-nan": ["reward:2:0", *URLS],
    "secret-error": ["tell:2:0", *URLS],
    "hang-alone": ["hang-update:2:0", *STALL],
    "hang-in-c": ["hang-in-c:2:0", *STALL],
    "two-good": ["none"],
    "two-values": ["values:2:1"],
    "two-policy-gradient": ["policy-gradient:2:1:2"],
    "two-terminate": ["terminate:2:*"],
    "two-engine": ["engine:2:1"],
    "two-engine-twice": ["engine:2:1:1+", "--save_every", 0],
    "two-raise": ["raise:2:1"],
    "two-hang-sample": ["hang-sample:2:1", *STALL],
    "two-hang-microbatch": ["hang-microbatch:2:1:2", *STALL],
}


@dataclass
class Job:
    text: str  # what it said, all ranks
    code: int
    out: Path

    def updates(self, step: int) -> list[str]:
        """What its optimizer steps have seen in that step: model and norm, bit for bit."""
        return re.findall(f"^update {step} (.*)$", self.text, re.MULTILINE)


@dataclass
class Runs:
    """Starts each of RUNS once, when it is first asked for."""

    folder: Path
    started: dict[str, launch.Job] = field(default_factory=dict)

    def start(self, name: str) -> launch.Job:
        if name not in self.started:
            self.started[name] = self.job(name, *RUNS[name])
        return self.started[name]

    def __call__(self, *names: str) -> list[Job]:
        """Side by side, when they have ended."""
        jobs = [self.start(name) for name in names]
        return [self.ended(name, job) for name, job in zip(names, jobs)]

    def go_on(self, name: str) -> Job:
        """With a run that has ended, and without its fault."""
        self(name)
        return self.ended(name, self.job(name, "none", *RUNS[name][1:], "--resume", "auto"))

    def job(self, name: str, fault: str, *flags) -> launch.Job:
        command = ["tests/faults.py", fault, self.folder / name]
        command += ["--model", self.folder / "model", *STEPS, *flags]
        env = SECRETS if name.startswith("secret") else {}
        return launch.start(*command, ranks=ranks_of(name), env=env)

    def replay(self, name: str, fault: str = "none", step: int = 2) -> Job:
        """The update that a run has failed with, once more, on as many ranks."""
        self(name)
        file = self.folder / name / f"bad_step_{step}" / "batch.pt"
        job = launch.start("tests/faults.py", fault, "--replay", file, ranks=ranks_of(name))
        return self.ended(name, job)

    def ended(self, name: str, job: launch.Job) -> Job:
        end = job.wait()
        return Job(end.said, end.code, self.folder / name)


def ranks_of(name: str) -> int:
    return 2 if name.startswith("two-") else 1


def good_of(name: str) -> str:
    return "two-good" if name.startswith("two-") else "good"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("guards")
    toy.make_model(str(path / "model"))
    return path


@pytest.fixture(scope="module")
def ended(folder) -> Iterator[Runs]:
    runs = Runs(folder)
    yield runs
    for job in runs.started.values():
        if job.process.is_alive():
            job.kill()


def here(folder: Path, out: Path, *flags, fault: str = "none") -> list[dict]:
    """A run in this process."""
    flags = ["--model", folder / "model", *STEPS, *flags]
    return faults.run(fault, str(out), *map(str, flags))


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file below."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whoever wrote them: of policy and critic, and moments."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    names = {
        file: re.sub("-.*", "", str(file.relative_to(folder))).removesuffix(".safetensors")
        for file in files
    }
    return {f"{names[file]} {k}": x for file in files for k, x in load_file(file).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def steps_saved(out: Path) -> list[str]:
    return [path.name for path in checkpoints(out)]


# ---------------------------------------------------------------------------------------------------------------- NaN

LEARNING_RATES = {"policy": 1e-3, "critic": 3e-3}


def taken_before(name: str) -> dict[str, int]:
    """Updates of step 2 that were taken before the one that failed: the second of a model, the
    policy's being first."""
    return {"policy": 2 if "critic" in name else 1, "critic": 1}


def ended_with(job: Job, step: int = 2) -> str:
    """What was wrong with the numbers of a run that has ended."""
    said = rf"^FloatingPointError: step {step}: (.*): nothing was"
    (found,) = set(re.findall(said, job.text, re.MULTILINE)) or [job.text[-2000:]]
    return found


def replayed(job: Job) -> tuple[list[str], list[float]]:
    """What a replay found that is not finite, and the gradient norms of its updates, of which there
    is at most one."""
    said = re.findall("^once more: (.*)$", job.text, re.MULTILINE)
    finite = said == ["every number is finite"]
    assert job.code == (not finite) and said, job.text[-2000:]
    norms = re.findall("gradient norm (.*)$", job.text, re.MULTILINE)
    return [] if finite else said, [float(norm) for norm in norms]


def exact(update: str) -> float:
    """The norm of `update STEP MODEL NORM`, to the last bit."""
    return float.fromhex(update.split()[-1])


NAMES = {"scores": "rewards", "old_values": "values"}  # of fields of Batch, as a run says them


def as_run_says(text: str) -> str:
    rank, _, rest = text.partition(", ")
    field, _, what = rest.partition(": ")
    return f"{rank}, {NAMES.get(field, field)}: {what}"


SAID = {  # what the message has to name
    "reward": "rank 0, rewards: 1 of 16 not finite, first at",
    "advantage": "rank 0, advantages: ",
    "engine-weights": "rank 0, engine_logprobs: ",
    "critic-gradient": "rank 0, gradient of model.embed_tokens.weight: 1 of ",
    "two-values": "rank 0, values: 1 of ",  # found on rank 1, but the batch is on all
    "two-policy-gradient": "rank 1, gradient of model.embed_tokens.weight: 1 of ",
}


@pytest.mark.parametrize("name", SAID)
def test_nan_is_caught_before_the_weights(ended, name):
    """Guards the weights against a number that is not finite, on one rank or on all: named with
    step, rank and tensor, nothing stepped, no checkpoint touched, the batch kept."""
    job, good = ended(name, good_of(name))
    assert job.code != 0 and good.code == 0
    assert SAID[name] in ended_with(job)
    (row,) = metrics(job.out)
    assert row["step"] == 1 and numbers(row) == numbers(metrics(good.out)[0])
    (checkpoint,) = checkpoints(job.out)
    assert checkpoint.name == "step_1" and not damage(checkpoint)
    before = weights(good.out / "checkpoints" / "step_1")
    assert equal(weights(job.out / "checkpoints" / "latest"), before)
    bad = job.out / "bad_step_2"
    assert read_state(bad)["step"] == 1 and not damage(bad)
    update = torch.load(bad / "batch.pt", weights_only=True)["update"]
    if "gradient" in name:  # the first update of the step had been taken, the second was not
        model, taken = name.split("-")[-2], taken_before(name)
        second = random.Random("0 1 0").sample(range(16), 16)[8:]
        assert update == {"model": model, "chosen": second, "lr": LEARNING_RATES[model]}
        assert job.updates(2) == [*good.updates(2)[: sum(taken.values())], f"{model} nan"]
        steps = {x.item() for k, x in weights(bad).items() if k.endswith(".step")}
        assert steps == {4.0 + n for n in taken.values()}
    else:
        assert update is None
        assert equal(weights(bad), before) and not job.updates(2)


@pytest.mark.parametrize("name", ["reward", "critic-gradient", "two-policy-gradient"])
def test_replay(ended, name):
    """Guards tools/replay.py: it shows the fault again when that is in what was recorded, and
    without it does exactly the update that the run would have done, sharded as it was, without an
    engine; nothing is written."""
    job, good = ended(name, good_of(name))
    before = contents(job.out)
    once_more = ended.replay(name)
    assert f"it had ended with: step 2: {ended_with(job)}: nothing was" in once_more.text
    found, norms = replayed(once_more)
    if "gradient" in name:
        missed = good.updates(2)[sum(taken_before(name).values())]
        assert not found and once_more.updates(2) == [missed]
        assert norms == [exact(missed)]
    else:  # in the data
        assert [as_run_says(text) for text in found] == ended_with(job).split("; ")
        assert not norms and not once_more.updates(2)
    assert contents(job.out) == before


def test_replay_on_one_process(ended):
    """Guards the command of the message as it stands there: a run on ranks is replayed on one
    process."""
    job, good = ended("two-policy-gradient", "two-good")
    (command,) = set(re.findall("python (tools/replay.py .*batch.pt)", job.text))
    before = contents(job.out)
    end = launch.run(*command.split())
    found, norms = replayed(Job(end.said, end.code, job.out))
    assert not found and norms == [pytest.approx(exact(good.updates(2)[2]), rel=1e-4)]
    assert contents(job.out) == before


@pytest.mark.parametrize("name", ["critic-gradient", "two-policy-gradient"])
def test_replay_begins_with_the_moments(ended, name):
    """Guards the step of the replayed update: it begins with AdamW's moments of the run, whoever
    wrote them."""
    (job,) = ended(name)
    bad, model = job.out / "bad_step_2", name.split("-")[-2]
    record = torch.load(bad / "batch.pt", weights_only=True)
    accelerator, _ = start_ranks(bf16=False, sp=1)
    args = ppo.Args(**record["args"] | {"attention": "sdpa"})  # ours needs kernels.setup
    trained = replay.load(model, bad, args, accelerator)
    names = {p: key for key, p in trained.model.named_parameters()}
    found = {
        f"{names[p]}.{k}": x
        for p, state in trained.optimizer.state.items()
        for k, x in state.items()
    }
    saved = weights(bad)
    moments = {k: x for k, x in saved.items() if k.startswith(f"{model}.optimizer ")}
    assert equal({f"{model}.optimizer {k}": x for k, x in found.items()}, moments) and moments


def test_replay_with_the_fault(ended):
    """Guards tools/replay.py against calling finite what is not: with the cause still in the code,
    on one rank, it says what the run did."""
    (job,) = ended("two-policy-gradient")
    found, norms = replayed(ended.replay("two-policy-gradient", "policy-gradient:2:1"))
    assert "; ".join(found[:4]) == ended_with(job)
    assert len(norms) == 1 and norms[0] != norms[0]


def test_replay_of_one_update(ended):
    """Guards the replay where the policy had its only update and the critic's failed: there are no
    old log-probs."""
    job, good = ended("one-update", "good-one")
    record = torch.load(job.out / "bad_step_2" / "batch.pt", weights_only=True)
    assert record["update"]["model"] == "critic" and record["batch"]["old_logprobs"] is None
    once_more = ended.replay("one-update")
    found, norms = replayed(once_more)
    assert not found and once_more.updates(2) == good.updates(2)[1:2]
    assert norms == [exact(good.updates(2)[1])]


def test_nan_in_the_new_weights_of_an_engine(ended):
    """Guards the sync: the fresh answers that prove it are not finite, and are what is kept."""
    job, good = ended("synced-weights", "good")
    assert job.code != 0 and ended_with(job, step=3).startswith("rank 0, engine_logprobs: ")
    assert steps_saved(job.out) == ["step_1"] and len(metrics(job.out)) == 1
    assert equal(weights(job.out / "bad_step_3"), weights(good.out / "checkpoints" / "step_2"))
    found, norms = replayed(ended.replay("synced-weights", step=3))
    assert "; ".join(found) == ended_with(job, step=3) and not norms


# -------------------------------------------------------------------------------------------------- hangs and errors


@pytest.fixture(scope="module", autouse=True)
def hanging(request, ended) -> None:
    """Runs that hang sleep most of the time, so they begin before the first test."""
    chosen = [item.name for item in request.session.items if item.path == request.path]
    if any("hang" in name for name in chosen):
        for name in RUNS:
            if "hang" in name:
                ended.start(name)


def told_by(job: Job, rank: int) -> str:
    return Path(f"{job.out}.rank{rank}").read_text()


def once_too_long(text: str, rank: int, phase: str = r"\w+") -> int:
    """After how many seconds the rank has told that its phase takes too long."""
    said = rf"^rank {rank}: phase {phase} of step 2 takes (\d+) s$"
    (seconds,) = re.findall(said, text, re.MULTILINE)
    return int(seconds)


@pytest.mark.parametrize("phase", ["sample", "update"])
def test_a_rank_that_hangs_is_named(ended, phase):
    """Guards the wait without a word: each rank tells its phase and its stack once, rank 0 who is
    behind and where; the job ends by itself."""
    (job,) = ended({"sample": "two-hang-sample", "update": "two-hang-microbatch"}[phase])
    waits, hangs = told_by(job, 0), told_by(job, 1)
    assert job.code == 1
    assert once_too_long(waits, 0) >= 12 and once_too_long(hangs, 1, phase) >= 12
    assert waits.count("Stack (most recent call first)") == 1
    assert hangs.count("Stack (most recent call first)") == 1
    assert re.search("faults.py.*, line .* in hang$", hangs, re.MULTILINE)
    table = waits[waits.index("behind the others:") :]
    assert table.startswith("behind the others: rank 1\n")
    line = rf"^  rank 1: step 2, {phase} for \d+ s, in .*faults.py:\d+$"
    assert re.search(line, table, re.MULTILINE)
    ends = re.findall(r"takes (\d+) s: given up.*--stall_minutes", waits + hangs)
    assert ends and all(int(seconds) >= 24 for seconds in ends)


def test_a_plain_process_that_hangs(ended):
    """Guards the same without ranks."""
    (job,) = ended("hang-alone")
    assert job.code == 1 and once_too_long(job.text, 0, "update") >= 12
    assert re.search("line .* in hang$", job.text, re.MULTILINE)
    assert re.search(r"^rank 0: phase update of step 2 takes \d+ s: given up", job.text, re.M)


def test_a_hang_in_c(ended):
    """Guards the case in which no thread of Python runs, not even the watch: faulthandler shows the
    stack from C."""
    job = ended.start("hang-in-c")
    job.until("line .* in hang_in_c$")
    assert job.process.is_alive()
    job.kill()


def test_the_first_error_is_on_top(ended):
    """Guards the search for the cause among the errors of the other ranks, which end at once."""
    (job,) = ended("two-raise")
    starts = ("rank ", "Traceback", "ValueError", "RuntimeError")
    lines = [line for line in job.text.splitlines() if line.startswith(starts)]
    assert lines[:3] == [
        "rank 1 failed first, step 2, phase forward:",
        "Traceback (most recent call last):",
        "ValueError: planted error",
    ]
    assert lines[3].startswith("rank 0: ended, because rank 1 failed first")
    assert job.code == 1 and "in fail" in job.text


# --------------------------------------------------------------------------------------------- ends that are asked for


@pytest.mark.parametrize(
    "name, signal, done", [("interrupt", "SIGINT", 2), ("two-terminate", "SIGTERM", 1)]
)
def test_signals_end_in_order(ended, name, signal, done):
    """Guards the work of a run that is told to end: saved at the next safe point, exit code 0, and
    resumed as if it had never ended."""
    job, good = ended(name, good_of(name))
    told = f"{signal}: ended after step {done} of 3; --resume auto goes on"
    assert job.code == 0 and told in job.text
    assert [row["step"] for row in metrics(job.out)] == list(range(1, done + 1))
    resumed = ended.go_on(name)
    assert resumed.code == 0 and f"steps {done} to 3" in resumed.text
    assert [numbers(row) for row in metrics(job.out)] == [numbers(row) for row in metrics(good.out)]
    last = [weights(out / "checkpoints" / "step_3") for out in (job.out, good.out)]
    assert equal(*last)


def test_ends_by_the_clock(ended):
    """Guards --max_minutes: the step is ended and saved, exit code 0."""
    job, good = ended("max-minutes", "good")
    told = "--max_minutes 300: ended after step 2 of 3; --resume auto goes on"
    assert job.code == 0 and told in job.text
    assert len(metrics(job.out)) == 2 and steps_saved(job.out) == ["step_2"]
    assert equal(*[weights(out / "checkpoints" / "step_2") for out in (job.out, good.out)])


def test_a_second_interrupt_leaves_at_once(ended):
    """Guards the user who does not want to wait."""
    (job,) = ended("interrupt-twice")
    assert job.code == 130 and not job.updates(3) and len(metrics(job.out)) == 1


def test_saves_by_the_clock_and_keeps_the_last(folder, tmp_path):
    """Guards --save_minutes and --keep_last."""
    flags = ["--save_minutes", 1e-6, "--save_every", 0, "--keep_last", 2]
    here(folder, tmp_path / "run", *flags)
    assert steps_saved(tmp_path / "run") == ["step_3", "step_2"]
    assert os.readlink(tmp_path / "run" / "checkpoints" / "latest") == "step_3"


def test_keeps_the_best(tmp_path):
    """Guards --keep_best: the best one by its metric outlives the newer ones, and the links
    follow."""
    (tmp_path / "checkpoints").mkdir()
    saver = Saver(tmp_path, keep_last=2, keep_best="eval/correct")
    values = [0.1, 0.5, 0.2, None, 0.4, 0.5, 0.3, 0.1]
    kept = []
    for step, value in enumerate(values, 1):
        final = tmp_path / "checkpoints" / f"step_{step}"
        saver.begin(final, ["policy"], lambda x: [x])
        row = {"step": step} | ({} if value is None else {"eval/correct": value})
        saver.save(
            final,
            {"policy/model.safetensors": {"x": torch.ones(2)}},
            {"step": step, "metrics": row},
        )
        saver.wait()
        kept.append(sorted(int(path.name[5:]) for path in checkpoints(tmp_path)))
        assert os.readlink(tmp_path / "checkpoints" / "latest") == f"step_{step}"
        best = max(v for v in values[:step] if v is not None)
        linked = int(os.readlink(tmp_path / "checkpoints" / "best")[5:])
        assert values[linked - 1] == best and linked in kept[-1]
    assert (
        kept[:5] == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]
        and kept[-1][-2:] == [7, 8]
        and len(kept[-1]) == 3
    )


# ------------------------------------------------------------------------------------------------- engines and memory


def test_an_engine_that_fails_once(ended):
    """Guards the second try: all ranks make new engines, and the run is as if nothing had been."""
    job, good = ended("two-engine", "two-good")
    assert job.code == 0 and job.text.count("warning: an engine failed; all are made anew") == 1
    assert [numbers(row) for row in metrics(job.out)] == [numbers(row) for row in metrics(good.out)]


def test_an_engine_that_fails_twice(ended):
    """Guards the work done when there is no third try: the last step is saved, and the rank
    named."""
    job, good = ended("two-engine-twice", "two-good")
    error = "RuntimeError: an engine failed twice on the same prompts; what was trained is saved. "
    error += "rank 1: ValueError"
    assert job.code == 1 and error in job.text
    assert steps_saved(job.out) == ["step_1"] and not damage(job.out / "checkpoints" / "step_1")
    assert equal(*[weights(out / "checkpoints" / "step_1") for out in (job.out, good.out)])


@pytest.mark.parametrize("fault, phase", [("memory", "forward"), ("cuda-memory", "update")])
def test_out_of_memory_in_the_users_words(folder, tmp_path, fault, phase):
    """Guards the message: which phase, how long the sequences were, which flag. One of the
    allocations that fail is real."""
    with pytest.raises(RuntimeError, match="can't allocate memory|CUDA out of memory") as error:
        here(folder, tmp_path / "run", fault=f"{fault}:2:0")
    found = re.search(
        rf"out of memory on rank 0 in phase {phase} of step 2; "
        r"the longest sequence had (\d+) tokens: "
        r"lower --max_tokens_per_microbatch, now 512, or",
        "".join(error.value.__notes__),
    )
    assert found and 5 <= int(found[1]) <= 10


# ------------------------------------------------------------------------------------------------- secrets and pages


def test_no_secret_is_written(ended):
    """Guards tokens and keys: of the environment, in a flag, in an error. In no file of a run, in
    no line it says."""
    jobs = ended("secret-nan", "secret-error")
    assert "FloatingPointError" in jobs[0].text and "MY_SECRET is <MY_SECRET>" in jobs[1].text
    for job in jobs:
        found = contents(job.out) | {"what it said": job.text.encode()}
        for where, what in found.items():
            for value in (*SECRETS.values(), *IN_URLS):
                assert value.encode() not in what, where
        assert "<secret>" in (job.out / "config.json").read_text()
    assert (jobs[0].out / "bad_step_2" / "batch.pt").exists()


FAKES = {  # what wandb.py is
    "absent": "raise ImportError('no module named wandb')",
    "unreachable": "class Settings:\n    def __init__(self, **_): pass\ndef init(**_): raise OSError('unreachable')",
    "dies": "class Settings:\n    def __init__(self, **_): pass\nclass Board:\n    def log(self, row, step):\n"
    "        if step == 2: raise ConnectionError('gone')\ndef init(**_): return Board()",
}


@pytest.mark.parametrize("fake", FAKES)
def test_wandb_never_stops_a_run(folder, tmp_path, monkeypatch, capsys, fake):
    """Guards the run against the page of its curves: not installed, not reached, dead at step 2.
    One warning."""
    (tmp_path / "wandb.py").write_text(FAKES[fake])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    rows = here(folder, tmp_path / "run", "--wandb", "project")
    sys.modules.pop("wandb", None)
    said = capsys.readouterr().out
    assert (
        len(rows) == 3
        and said.count("warning: W&B") == 1
        and "metrics.jsonl has everything" in said
    )


# ----------------------------------------------------------------------------------------------------- divergence


def rows_of(name: str, *values: float) -> list[dict]:
    return [{"step": step, name: value} for step, value in enumerate(values, 1)]


class Quiet(run.Run):
    """A run that writes nothing: it remembers what it would have said and saved."""

    def __init__(self):
        super().__init__(argparse.Namespace(out="nowhere", keep_last=0, keep_best=""), Ranks())
        self.told, self.kept = [], []

    def say(self, text: str) -> None:
        self.told.append(text)

    def save(self, name: str, wait: bool = False) -> None:
        self.kept.append(name)

    def told_of(self, row: dict, young: bool = False) -> list[str]:
        before = len(self.told)
        self.warn_if_diverging(row, young)
        return self.told[before:]


def test_divergence_warns_then_stops():
    """Guards against warnings at every step, and against runs that go on for days with a dead
    policy."""
    quiet = Quiet()
    told = [quiet.told_of(row) for row in rows_of("policy/approx_kl", *[0.5] * 12, 0.1, 0.5)]
    assert [step for step, found in enumerate(told, 1) if found] == [1, 10, 14]
    assert told[9][0].startswith("warning: step 10: policy/approx_kl is 0.5, 10 steps in a row: ")
    assert "stops after 20" in told[9][0] and not quiet.kept
    with pytest.raises(RuntimeError, match="policy/approx_kl is 0.5, 20 steps in a row"):
        for row in rows_of("policy/approx_kl", *[0.5] * 19):
            quiet.told_of(row)
    assert quiet.streaks["policy/approx_kl"] == 20 and quiet.kept == ["stopped_step_19"]


@pytest.mark.parametrize(
    "name, bad, good",
    [
        ("policy/approx_kl", 0.31, 0.29),
        ("policy/entropy", 0.0049, 0.0051),
        ("mismatch/logp_abs_mean", 0.11, 0.09),
        ("critic/explained_var", -0.01, 0.0),
        ("reward/std", 0.0, 0.01),
    ],
)
def test_divergence_by_name(name, bad, good):
    """Guards each of the thresholds, by sides; and a young critic, that may be wrong."""
    assert Quiet().told_of({"step": 1, name: bad}) and not Quiet().told_of({"step": 1, name: good})
    young = Quiet().told_of({"step": 1, name: bad}, young=True)
    assert bool(young) == (not name.startswith("critic/"))


def test_a_diverged_run_leaves_its_weights(folder, tmp_path, monkeypatch):
    """Guards days of work without a checkpoint, and the good checkpoints against the weights that
    went wrong."""
    monkeypatch.setattr(guards, "GUARDS", {"reward/std": (lambda x: True, 2, "so we say")})
    with pytest.raises(RuntimeError, match="so we say. Stopped"):
        here(folder, tmp_path / "run", "--save_every", 0)
    assert weights(tmp_path / "run" / "stopped_step_2")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_streaks_survive_a_resume(folder, tmp_path, monkeypatch):
    """Guards the count of bad steps in a row against starting again with every preemption."""
    monkeypatch.setitem(guards.GUARDS, "critic/value_mean", (lambda x: True, 4, "planted"))
    old = run.Run.warn_if_diverging  # without mercy for a young critic
    monkeypatch.setattr(
        run.Run, "warn_if_diverging", lambda self, row, young: old(self, row, False)
    )
    here(folder, tmp_path / "run", "--steps", 2)
    with pytest.raises(RuntimeError, match="step 4: critic/value_mean is .*, 4 steps in a row"):
        here(folder, tmp_path / "run", "--steps", 9, "--resume", "auto")


# -------------------------------------------------------------------------------------------------------- model files


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def pickled(folder: Path, model: Path, **more) -> Path:
    """The model, its weights in a pickle alone."""
    shutil.copytree(folder / "model", model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors | more, model / "pytorch_model.bin")
    return model


def test_pickled_weights_are_refused(folder, tmp_path):
    """Guards the machine against a model folder that has pickled weights alone, by the trainer and
    by vLLM; harmless ones are refused, too."""
    ran = tmp_path / "ran"
    hostile = pickled(folder, tmp_path / "hostile", x=Payload(ran))
    flags = ["--steps", 1, "--engine", "vllm"]
    job = launch.start("tests/toy.py", tmp_path / "run", "--model", hostile, *flags)
    for model in (hostile, pickled(folder, tmp_path / "harmless")):
        with pytest.raises(OSError, match="no file named model.safetensors"):
            toy.run(str(tmp_path / model.name) + ".run", "--model", str(model))
    end = job.wait()
    assert end.code == 1 and "Cannot find any model weights" in end.said, end.said[-2000:]
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["qwen2", "unheard-of"])
def test_code_of_a_model_folder_is_not_run(folder, tmp_path, kind):
    """Guards the machine against a model folder with Python files: not run, nor asked about; a
    known architecture is loaded from our own library, another is refused."""
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder / "model", model)
    (model / "evil.py").write_text(
        f"import os\nos.mkdir({str(ran)!r})\nclass C: pass\nclass M: pass\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": kind,
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (model / "config.json").write_text(json.dumps(config))
    if kind == "qwen2":
        assert len(here(tmp_path, tmp_path / "run", "--steps", 1)) == 1
    else:
        with pytest.raises(ValueError, match="trust_remote_code|is no Hugging Face folder"):
            here(tmp_path, tmp_path / "run", "--steps", 1)
    assert not ran.exists()


# ------------------------------------------------------------------------------------------------------ the real engine

COUNTDOWN = (
    "--task countdown3 --max_prompt_tokens 64 --max_new_tokens 24 --prompts_per_step 8 --steps 3 --lr 1e-3 "
    "--entropy_coef 0.1 "
    "--samples_per_prompt 2 --max_tokens_per_microbatch 400 --no-gradient_checkpointing"
).split()


def test_vllm(tmp_path, tiny):
    """Guards what the torch engine cannot show: a vLLM engine that fails on one rank can be made
    anew in the same process, on all, with the newest weights; NaN in vLLM's weights comes out as NaN
    in its log-probs, and the plain command redoes the step."""
    command = ["tests/faults.py", "engine:2:1,engine-weights:3:0", tmp_path / "run"]
    end = launch.run(*command, "--model", tiny, *COUNTDOWN, ranks=2)
    assert end.said.count("warning: an engine failed; all are made anew") == 1, end.said[-3000:]
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2], end.said[-3000:]
    assert max(row["mismatch/logp_abs_mean"] for row in rows) < 1e-4 and rows[0]["policy/grad_norm"]
    assert end.code == 1 and "FloatingPointError: step 3: rank 0, engine_logprobs: " in end.said
    end = launch.run("tools/replay.py", tmp_path / "run" / "bad_step_3" / "batch.pt")
    assert end.code == 1 and "\nonce more: rank 0, engine_logprobs: " in end.said
