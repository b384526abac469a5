"""Faults that are really there: NaN in the numbers, ranks that hang or raise, signals, engines that
fail, full memory.

tests/faults.py plants them into toy runs. They all go in one fixture, as three rows of jobs side by
side: one process after the other, one job of torchrun after the other, and those that hang. The
tests read what they left.
"""

import argparse
import json
import os
import random
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from test_train import ROOT, TWO, metrics, numbers, start

import ppo
from infra import guards, run
from infra.checkpoint import Saver, checkpoints, damage, read_state
from infra.dist import Ranks, start_ranks
from tools import replay

STEPS = [
    "--steps",
    3,
    "--save_every",
    1,
    "--prompts_per_step",
    16,
    "--minibatch_size",
    8,
    "--lr",
    1e-3,
]
ONE_UPDATE = ["--ppo_epochs", 1, "--minibatch_size", 16]
STALL = ["--stall_minutes", 0.2, "--max_tokens_per_microbatch", 32]  # 12 s; the run ends after 24
SECRETS = {name: secrets.token_hex(16) for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET")}
IN_URLS = secrets.token_hex(16), "hf_" + secrets.token_hex(16)
AGAIN = ["--resume", "auto"]


class Job(NamedTuple):
    text: str  # what it said, all ranks
    code: int
    out: Path

    def updates(self, step: int) -> list[str]:
        """What its optimizer steps have seen in that step: model and norm, bit for bit."""
        return re.findall(f"^update {step} (.*)$", self.text, re.MULTILINE)


def again(name: str) -> list:
    return ["none", "--replay", f"{{{name}}}/bad_step_2/batch.pt"]


NANS = ["reward", "advantage", "engine-weights", "policy-gradient", "critic-gradient"]
LATE = {"policy-gradient": ":2", "critic-gradient": ":2"}  # in the second update of the step
ALONE = {  # one process; {name} is the run folder of another job
    "good": ["none"],
    "good-one": ["none", *ONE_UPDATE],
    **{name: [f"{name}:2:0{LATE.get(name, '')}"] for name in NANS},
    **{f"{name}-again": again(name) for name in NANS},
    "critic-gradient-still": ["critic-gradient:2:0", *again("critic-gradient")[1:]],
    "one-update": ["critic-gradient:2:0", *ONE_UPDATE],
    "one-update-again": again("one-update"),
    "synced-weights": ["synced-weights:2:0"],
    "synced-weights-again": ["none", "--replay", "{synced-weights}/bad_step_3/batch.pt"],
    "terminate": ["terminate:3:0"],
    "terminate-resumed": ["none", "terminate", *AGAIN],
    "interrupt": ["interrupt:2:0"],
    "interrupt-resumed": ["none", "interrupt", *AGAIN],
    "interrupt-twice": ["interrupt-twice:2:0"],
    "max-minutes": ["hours-later:2:0", "--max_minutes", 300, "--save_every", 0],
    "max-minutes-resumed": ["none", "max-minutes", *AGAIN],
    "save-minutes": ["none", "--save_minutes", 1e-6, "--save_every", 0, "--keep_last", 2],
    "engine": ["engine:2:0"],
    "engine-twice": ["engine:2:0:1+", "--save_every", 0],
    "engine-twice-resumed": ["none", "engine-twice", *AGAIN],
    "memory": ["memory:2:0"],
    "cuda-memory": ["cuda-memory:2:0"],
    "secret": ["none", "--stop", f"https://me:{IN_URLS[0]}@host/a", f"https://{IN_URLS[1]}@host/b"],
    "secret-nan": [
        "reward:2:0",
        "--stop",
        f"https://me:{IN_URLS[0]}@host/a",
        f"https://{IN_URLS[1]}@host/b",
    ],
    "secret-error": ["tell:2:0"],
}
RANKS = {  # two ranks
    "two-good": ["none"],
    "two-reward": ["reward:2:1"],
    "two-values": ["values:2:1"],
    "two-policy-gradient": ["policy-gradient:2:1:2"],
    "two-policy-gradient-again": again("two-policy-gradient"),
    "two-policy-gradient-still": ["policy-gradient:2:1", *again("two-policy-gradient")[1:]],
    "two-critic-gradient": ["critic-gradient:2:1:2"],
    "two-synced-weights": ["synced-weights:2:1"],
    "two-terminate": ["terminate:2:*"],
    "two-terminate-resumed": ["none", "two-terminate", *AGAIN],
    "two-engine": ["engine:2:1"],
    "two-engine-twice": ["engine:2:1:1+", "--save_every", 0],
    "two-raise": ["raise:2:1"],
}
HANGS = {
    "hang-sample": (2, ["hang-sample:2:1", *STALL]),
    "hang-microbatch": (2, ["hang-microbatch:2:1:2", *STALL]),
    "hang-alone": (1, ["hang-update:2:0", *STALL]),
    "hang-in-c": (1, ["hang-in-c:2:0", *STALL]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    import toy

    path = tmp_path_factory.mktemp("guards")
    toy.make_model(str(path / "model"))
    return path


def begin(folder: Path, ranks: int, jobs: dict[str, list]) -> subprocess.Popen:
    """Starts the jobs, one after the other; what job N of them says is in folder/<name of the
    first>/N.log."""
    words: list = []
    for name, (fault, *flags) in jobs.items():
        words += ["--then"] if words else []
        if flags[:1] == ["--replay"]:
            words += [
                fault,
                *(str(f).format_map({n: folder / n for n in {**ALONE, **RANKS}}) for f in flags),
            ]
            continue
        out = (
            flags.pop(0) if flags and flags[0] in jobs else name
        )  # goes on with the run of another job
        words += [fault, folder / out, "--model", folder / "model", *STEPS, *flags]
    (logs := folder / f"logs-{next(iter(jobs))}").mkdir()
    command = [sys.executable, "tests/faults.py", "jobs", str(ranks), str(logs), *map(str, words)]
    with open(logs / "all", "w") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | SECRETS, stdout=file, stderr=file
        )


def end(folder: Path, process: subprocess.Popen, jobs: dict[str, list]) -> dict[str, Job]:
    assert process.wait(timeout=600) == 0
    found, logs = {}, folder / f"logs-{next(iter(jobs))}"
    for number, name in enumerate(jobs):
        text = (logs / f"{number}.log").read_text()
        code = int(re.findall(r"^ended with (-?\d+)$", text, re.MULTILINE)[-1])
        found[name] = Job(text, code, folder / name)
    return found


@pytest.fixture(scope="module")
def ended(folder) -> dict[str, Job]:
    rows = [(ranks, {name: job}) for name, (ranks, job) in HANGS.items()]
    processes = [begin(folder, *row) for row in rows]
    deadline = time.monotonic() + 200  # what hangs does so while nobody else needs the processor
    while time.monotonic() < deadline:
        said = [folder / f"logs-{name}" / "0.log" for name in HANGS]
        if all(log.exists() and "ready after" in log.read_text() for log in said):
            break
        time.sleep(0.2)
    rows += [(1, ALONE), (2, RANKS)]
    processes += [begin(folder, *row) for row in rows[-2:]]
    kill_when_told(folder, processes[list(HANGS).index("hang-in-c")])
    found: dict[str, Job] = {}
    for process, (_, jobs) in zip(processes, rows):
        found |= end(folder, process, jobs)
    return found


def kill_when_told(folder: Path, process: subprocess.Popen) -> None:
    """A process that holds the interpreter's lock in C cannot end itself: the watch is a thread of
    Python, too."""
    log, deadline = folder / "logs-hang-in-c" / "0.log", time.monotonic() + 120
    while time.monotonic() < deadline and "in hang_in_c" not in log.read_text():
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), 9)


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


# ---------------------------------------------------------------------------------------------------------------- NaN

LEARNING_RATES = {"policy": 1e-3, "critic": 3e-3}


def taken_before(name: str) -> dict[str, int]:
    """Updates of step 2 that were taken before the one that failed: the second of a model, the
    policy's being first."""
    return {"policy": 2 if "critic" in name else 1, "critic": 1}


def ended_with(job: Job, step: int = 2) -> str:
    """What was wrong with the numbers of a run that has ended."""
    found = re.findall(
        rf"^FloatingPointError: step {step}: (.*): nothing was", job.text, re.MULTILINE
    )
    assert len(set(found)) == 1, job.text[-2000:]
    return found[0]


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
    "reward": "rewards: 1 of 16 not finite, first at",
    "advantage": "advantages: ",
    "values": "values: 1 of ",
    "engine-weights": "engine_logprobs: ",
    "policy-gradient": "gradient of model.embed_tokens.weight: 1 of ",
    "critic-gradient": "gradient of model.embed_tokens.weight: 1 of ",
}


@pytest.mark.parametrize(
    "name", [*NANS, "two-reward", "two-values", "two-policy-gradient", "two-critic-gradient"]
)
def test_nan_is_caught_before_the_weights(ended, name):
    """Guards the weights against a number that is not finite, on one rank or on all: named with
    step, rank and tensor, nothing stepped, no checkpoint touched, the batch kept."""
    job, good, fault = (
        ended[name],
        ended["two-good" if "two" in name else "good"],
        name.removeprefix("two-"),
    )
    assert job.code != 0 and good.code == 0
    rank = int(
        name in ("two-policy-gradient", "two-critic-gradient")
    )  # numbers of the batch are on all
    (error,) = set(re.findall(r"^FloatingPointError: (.*)$", job.text, re.MULTILINE))
    assert error.startswith("step 2: ") and f"rank {rank}, {SAID[fault]}" in error, error
    (row,) = metrics(job.out)
    assert row["step"] == 1 and numbers(row) == numbers(metrics(good.out)[0])
    (checkpoint,) = checkpoints(job.out)
    assert checkpoint.name == "step_1" and not damage(checkpoint)
    assert equal(
        weights(job.out / "checkpoints" / "latest"),
        before := weights(good.out / "checkpoints" / "step_1"),
    )
    bad = job.out / "bad_step_2"
    assert read_state(bad)["step"] == 1 and not damage(bad)
    update = torch.load(bad / "batch.pt", weights_only=True)["update"]
    if "gradient" in name:  # the first update of the step had been taken, the second was not
        model, taken = name.split("-")[-2], taken_before(name)
        second = random.Random("0 1 0").sample(range(16), 16)[8:]
        assert update == {"model": model, "chosen": second, "lr": LEARNING_RATES[model]}
        whole = good.updates(2)
        assert job.updates(2) == [*whole[: sum(taken.values())], f"{model} nan"]
        steps = {x.item() for k, x in weights(bad).items() if k.endswith(".step")}
        assert steps == {4.0 + n for n in taken.values()}
    else:
        assert update is None
        assert equal(weights(bad), before) and not job.updates(2)


@pytest.mark.parametrize("name", [*NANS, "two-policy-gradient"])
def test_replay(ended, name):
    """Guards tools/replay.py: it shows the fault again when that is in what was recorded, and
    without it does exactly the update that the run would have done, without an engine; nothing is
    written."""
    job, once_more = ended[name], ended[f"{name}-again"]
    good, error = ended["two-good" if "two" in name else "good"], ended_with(ended[name])
    assert f"it had ended with: step 2: {error}: nothing was" in once_more.text
    found, norms = replayed(once_more)
    if "gradient" in name:
        done = sum(taken_before(name).values())
        assert not found and once_more.updates(2) == good.updates(2)[done : done + 1]
        assert norms == [exact(good.updates(2)[done])]
    else:  # in the data
        assert [as_run_says(text) for text in found] == error.split("; ")
        assert not norms and not once_more.updates(2)
    assert [path.name for path in checkpoints(job.out)] == ["step_1"] and len(metrics(job.out)) == 1


def test_replay_writes_nothing(ended, tmp_path):
    """Guards what is left of a run: replays of it, in all ways, leave every file as it was."""
    bad = {name: ended[name].out / "bad_step_2" for name in ("reward", "two-policy-gradient")}
    before = {name: contents(folder.parent) for name, folder in bad.items()}
    running = {
        name: start(["tools/replay.py"], folder / "batch.pt") for name, folder in bad.items()
    }
    said = {
        name: (process.communicate(timeout=200)[0], process.returncode)
        for name, process in running.items()
    }
    assert [said[name][1] for name in bad] == [1, 0], said
    for name, folder in bad.items():
        assert contents(folder.parent) == before[name]


@pytest.mark.parametrize("name", ["critic-gradient", "two-policy-gradient"])
def test_replay_begins_with_the_moments(ended, name):
    """Guards the step of the replayed update: it begins with AdamW's moments of the run, whoever
    wrote them."""
    bad, model = ended[name].out / "bad_step_2", name.split("-")[-2]
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


@pytest.mark.parametrize("name", ["critic-gradient", "two-policy-gradient"])
def test_replay_with_the_fault(ended, name):
    """Guards tools/replay.py against calling finite what is not: with the cause still in the code
    it says what the run did, on as many ranks."""
    found, norms = replayed(ended[f"{name}-still"])
    assert "; ".join(found[:4]) == ended_with(ended[name])
    assert len(norms) == 1 and norms[0] != norms[0]


def test_replay_on_ranks(ended):
    """Guards the replay that is sharded as the run was: the same update, bit for bit."""
    found, norms = replayed(ended["two-policy-gradient-again"])
    assert not found and norms == [exact(ended["two-good"].updates(2)[2])]


def test_replay_of_one_update(ended):
    """Guards the replay where the policy had its only update and the critic's failed: there are no
    old log-probs."""
    job, once_more = ended["one-update"], ended["one-update-again"]
    record = torch.load(job.out / "bad_step_2" / "batch.pt", weights_only=True)
    assert record["update"]["model"] == "critic" and record["batch"]["old_logprobs"] is None
    found, norms = replayed(once_more)
    assert not found and once_more.updates(2) == ended["good-one"].updates(2)[1:2]
    assert norms == [exact(ended["good-one"].updates(2)[1])]


@pytest.mark.parametrize("name", ["synced-weights", "two-synced-weights"])
def test_nan_in_the_new_weights_of_an_engine(ended, name):
    """Guards the sync: the fresh answers that prove it are not finite, and are what is kept."""
    job, rank = ended[name], int("two" in name)
    assert job.code != 0 and re.search(
        rf"FloatingPointError: step 3: rank {0}, engine_logprobs: ", job.text
    )
    assert [path.name for path in checkpoints(job.out)] == ["step_1"] and len(metrics(job.out)) == 1
    good = ended["two-good" if rank else "good"]
    assert equal(weights(job.out / "bad_step_3"), weights(good.out / "checkpoints" / "step_2"))
    if not rank:
        found, norms = replayed(ended[f"{name}-again"])
        assert "; ".join(found) == ended_with(job, step=3) and not norms


# -------------------------------------------------------------------------------------------------- hangs and errors


@pytest.mark.parametrize("name", ["hang-sample", "hang-microbatch"])
def test_a_rank_that_hangs_is_named(ended, name):
    """Guards the wait without a word: each rank tells its phase and its stacks once, rank 0 who is
    behind and where; the job ends by itself."""
    phase, text = "sample" if name == "hang-sample" else "update", ended[name].text
    assert ended[name].code != 0
    for rank in (0, 1):
        assert (
            len(re.findall(rf"^rank {rank}: phase \w+ of step 2 takes 1\d s$", text, re.MULTILINE))
            == 1
        )
    assert f"rank 1: phase {phase} of step 2 takes" in text
    first = text.index("behind the others:")
    assert text[first:].startswith("behind the others: rank 1\n")
    assert re.search(
        rf"  rank 1: step 2, {phase} for \d+ s, in .*faults.py:\d+$", text[first:], re.M
    )
    assert text.count("Stack (most recent call first)") == 2 and re.search(
        "faults.py.*, line .* in hang$", text, re.M
    )
    assert re.search(
        rf"rank \d: phase {phase} of step 2 takes 2\d s: given up.*--stall_minutes", text
    )


def test_a_plain_process_that_hangs(ended):
    """Guards the same without ranks."""
    text = ended["hang-alone"].text
    assert ended["hang-alone"].code == 1
    assert (
        len(re.findall("^rank 0: phase update of step 2 takes 1[0-9] s$", text, re.MULTILINE)) == 1
    )
    assert re.search("line .* in hang$", text, re.MULTILINE)
    assert re.search(r"rank 0: phase update of step 2 takes \d+ s: given up", text)


def test_a_hang_in_c(ended):
    """Guards the case in which no thread of Python runs: faulthandler shows the stack from C."""
    text = ended["hang-in-c"].text
    assert ended["hang-in-c"].code == -9 and re.search("line .* in hang_in_c$", text, re.MULTILINE)


def test_the_first_error_is_on_top(ended):
    """Guards the search for the cause among the errors of the other ranks, and the wait for
    them."""
    job = ended["two-raise"]
    starts = ("rank ", "Traceback", "ValueError", "RuntimeError")
    lines = [line for line in job.text.splitlines() if line.startswith(starts)]
    assert lines[:4] == [
        "rank 1 failed first, step 2, phase forward:",
        "Traceback (most recent call last):",
        "ValueError: planted error",
        lines[3],
    ]
    assert lines[3].startswith("rank 0: ended, because rank 1 failed first")
    assert job.code != 0 and "in fail" in job.text
    raised = (job.out / "metrics.jsonl").stat().st_mtime
    log = job.out.parent / f"logs-{next(iter(RANKS))}" / f"{list(RANKS).index('two-raise')}.log"
    assert log.stat().st_mtime - raised < 60


# --------------------------------------------------------------------------------------------- ends that are asked for


@pytest.mark.parametrize("name", ["terminate", "interrupt", "max-minutes", "two-terminate"])
def test_ends_in_order(ended, name):
    """Guards the work of a run that is told to end: saved at the next safe point, exit code 0, and
    resumed as if it had never ended."""
    job, resumed = ended[name], ended[f"{name}-resumed"]
    why = {"terminate": "SIGTERM", "interrupt": "SIGINT", "max-minutes": "--max_minutes 300"}[
        name.removeprefix("two-")
    ]
    done = {"terminate": 2, "interrupt": 2, "max-minutes": 2, "two-terminate": 1}[name]
    assert (
        job.code == 0 and f"{why}: ended after step {done} of 3; --resume auto goes on" in job.text
    )
    assert resumed.code == 0 and f"steps {done} to 3" in resumed.text
    good = ended["two-good" if "two" in name else "good"]
    assert [numbers(row) for row in metrics(job.out)] == [numbers(row) for row in metrics(good.out)]
    assert equal(
        weights(job.out / "checkpoints" / "latest"), weights(good.out / "checkpoints" / "step_3")
    )


def test_a_second_interrupt_leaves_at_once(ended):
    """Guards the user who does not want to wait."""
    assert ended["interrupt-twice"].code == 130 and not ended["interrupt-twice"].updates(3)
    assert len(metrics(ended["interrupt-twice"].out)) == 1


def test_saves_by_the_clock_and_keeps_the_last(ended):
    """Guards --save_minutes and --keep_last."""
    job = ended["save-minutes"]
    assert job.code == 0 and [path.name for path in checkpoints(job.out)] == ["step_3", "step_2"]
    assert os.readlink(job.out / "checkpoints" / "latest") == "step_3"


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


@pytest.mark.parametrize("name", ["engine", "two-engine"])
def test_an_engine_that_fails_once(ended, name):
    """Guards the second try: all ranks make new engines, and the run is as if nothing had been."""
    job, good = ended[name], ended["two-good" if "two" in name else "good"]
    assert job.code == 0 and job.text.count("warning: an engine failed; all are made anew") == 1
    assert [numbers(row) for row in metrics(job.out)] == [numbers(row) for row in metrics(good.out)]


@pytest.mark.parametrize("name", ["engine-twice", "two-engine-twice"])
def test_an_engine_that_fails_twice(ended, name):
    """Guards the work done when there is no third try: the last step is saved, and can be gone on
    from."""
    job = ended[name]
    error = "RuntimeError: an engine failed twice on the same prompts; what was trained is saved. "
    error += f"rank {int('two' in name)}: ValueError"
    assert job.code != 0 and error in job.text
    if name == "two-engine-twice":
        assert [path.name for path in checkpoints(job.out)] == ["step_1"]
    else:
        assert (
            ended["engine-twice-resumed"].code == 0
            and "steps 1 to 3" in ended["engine-twice-resumed"].text
        )
        assert [numbers(row) for row in metrics(job.out)] == [
            numbers(row) for row in metrics(ended["good"].out)
        ]


def test_out_of_memory_in_the_users_words(ended):
    """Guards the message: which phase, how long the sequences were, which flag. The allocation that
    fails is real."""
    for name, phase in (("memory", "forward"), ("cuda-memory", "update")):
        assert ended[name].code != 0
        where = f"out of memory on rank 0 in phase {phase} of step 2; "
        found = re.search(
            where + r"the longest sequence had (\d+) tokens: "
            r"lower --max_tokens_per_microbatch, now 512, or",
            ended[name].text,
        )
        assert found and 5 <= int(found[1]) <= 10
    assert "can't allocate memory" in ended["memory"].text


# ------------------------------------------------------------------------------------------------- secrets and pages


def test_no_secret_is_written(ended):
    """Guards tokens and keys: of the environment, in a flag, in an error. In no file of a run, in
    no line it says."""
    hidden = [*SECRETS.values(), *IN_URLS]
    assert ended["secret"].code == 0 and "MY_SECRET" in ended["secret-error"].text
    for name in ("secret", "secret-nan", "secret-error"):
        files = [path for path in ended[name].out.rglob("*") if path.is_file()]
        assert any(path.name == "config.json" for path in files)
        for path in files:
            assert not any(value.encode() in path.read_bytes() for value in hidden), path
        assert not any(value in ended[name].text for value in hidden), name
    assert "<secret>" in (ended["secret"].out / "config.json").read_text()


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
    import toy

    (tmp_path / "wandb.py").write_text(FAKES[fake])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    rows = toy.run(
        str(tmp_path / "run"),
        "--model",
        str(folder / "model"),
        *map(str, STEPS),
        "--wandb",
        "project",
    )
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
    import toy

    monkeypatch.setattr(guards, "GUARDS", {"reward/std": (lambda x: True, 2, "so we say")})
    with pytest.raises(RuntimeError, match="so we say. Stopped"):
        toy.run(
            str(tmp_path / "run"),
            "--model",
            str(folder / "model"),
            *map(str, STEPS),
            "--save_every",
            "0",
        )
    assert weights(tmp_path / "run" / "stopped_step_2")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_streaks_survive_a_resume(folder, tmp_path, monkeypatch):
    """Guards the count of bad steps in a row against starting again with every preemption."""
    import toy

    monkeypatch.setitem(guards.GUARDS, "critic/value_mean", (lambda x: True, 4, "planted"))
    old = run.Run.warn_if_diverging  # without mercy for a young critic
    monkeypatch.setattr(
        run.Run, "warn_if_diverging", lambda self, row, young: old(self, row, False)
    )
    flags = ["--model", str(folder / "model"), *map(str, STEPS)]
    toy.run(str(tmp_path / "run"), *flags, "--steps", "2")
    with pytest.raises(RuntimeError, match="step 4: critic/value_mean is .*, 4 steps in a row"):
        toy.run(str(tmp_path / "run"), *flags, "--steps", "9", "--resume", "auto")


# -------------------------------------------------------------------------------------------------------- model files


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("engine, hostile", [("torch", False), ("torch", True), ("vllm", True)])
def test_pickled_weights_are_refused(folder, tmp_path, engine, hostile):
    """Guards the machine against a model folder that has pickled weights alone."""
    import shutil

    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder / "model", model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors | ({"x": Payload(ran)} if hostile else {}), model / "pytorch_model.bin")
    command = [
        sys.executable,
        "tests/toy.py",
        tmp_path / "run",
        "--model",
        model,
        "--steps",
        1,
        "--engine",
        engine,
    ]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0 and not ran.exists()
    assert re.search(
        "no file named model.safetensors|Cannot find any model weights", done.stderr
    ), done.stderr[-2000:]


@pytest.mark.parametrize("kind", ["qwen2", "unheard-of"])
def test_code_of_a_model_folder_is_not_run(folder, tmp_path, kind):
    """Guards the machine against a model folder with Python files: not run, nor asked about; a
    known architecture is loaded from our own library, another is refused."""
    import shutil

    import toy

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
    flags = [str(tmp_path / "run"), "--model", str(model), *map(str, STEPS), "--steps", "1"]
    if kind == "qwen2":
        assert len(toy.run(*flags)) == 1
    else:
        with pytest.raises(ValueError, match="trust_remote_code|is no Hugging Face folder"):
            toy.run(*flags)
    assert not ran.exists()


# ------------------------------------------------------------------------------------------------------ the real engine

COUNTDOWN = [
    "--task",
    "countdown3",
    "--max_prompt_tokens",
    64,
    "--max_new_tokens",
    24,
    "--prompts_per_step",
    8,
    "--steps",
    2,
    "--samples_per_prompt",
    2,
    "--max_tokens_per_microbatch",
    400,
    "--no-gradient_checkpointing",
]


def test_vllm(tmp_path, tiny):
    """Guards what the torch engine cannot show: NaN in vLLM's weights comes out as NaN in its
    log-probs, and the plain command redoes the step; a vLLM engine that fails on one rank can be
    made anew in the same process, on all."""
    flags = list(map(str, ["--model", tiny, *COUNTDOWN]))
    commands = {
        "nan": ["tests/faults.py", "engine-weights:2:0", tmp_path / "nan", *flags],
        "good": ["-m", *TWO[1:], "tests/faults.py", "none", tmp_path / "good", *flags],
        "again": ["tools/replay.py", tmp_path / "nan" / "bad_step_2" / "batch.pt"],
        "engine": ["-m", *TWO[1:], "tests/faults.py", "engine:2:1", tmp_path / "engine", *flags],
    }
    said = {}
    for pair in (["nan", "good"], ["again", "engine"]):
        running = {name: start([], *commands[name]) for name in pair}
        said |= {
            name: (process.communicate(timeout=300)[0], process.returncode)
            for name, process in running.items()
        }
    assert (
        said["nan"][1] != 0
        and "FloatingPointError: step 2: rank 0, engine_logprobs: " in said["nan"][0]
    )
    assert said["again"][1] == 1 and "\nonce more: rank 0, engine_logprobs: " in said["again"][0]
    assert [path.name for path in checkpoints(tmp_path / "nan")] == [] and len(
        metrics(tmp_path / "nan")
    ) == 1
    assert said["engine"][1] == 0, said["engine"][0][-3000:]
    assert "warning: an engine failed; all are made anew" in said["engine"][0]
    assert [numbers(r) for r in metrics(tmp_path / "engine")] == [
        numbers(r) for r in metrics(tmp_path / "good")
    ]
