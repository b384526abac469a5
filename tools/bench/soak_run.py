"""python tools/bench/soak_run.py FOLDER [STEPS [WORLD ...]] [--engine vllm]: a long run of a tiny
task, watched from outside.

Trains the toy of tests/toy.py (with vLLM: Countdown on a tiny model) for STEPS (1,000) steps on 1
process, then on 2 ranks, with checkpoints every 50 steps and evaluations every 100. Prints what
must stay flat on every rank (resident memory, open descriptors, threads, processes below it) every
100 steps, and exits with 1 when memory grew by 5 % or more after step 100, anything else grew at
all, or a process of the run is left when it has ended.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import ppo  # noqa: E402, I001  (first: the guard for the name `kernels`)

import data  # noqa: E402
import launch  # noqa: E402
import rewards  # noqa: E402
import toy  # noqa: E402
from infra import guards, run, watchdog  # noqa: E402

COUNTS = ("descriptors", "threads", "processes")
PR_SET_CHILD_SUBREAPER = 36  # prctl
TOY = [
    "--prompts_per_step",
    "16",
    "--minibatch_size",
    "8",
    "--ppo_epochs",
    "1",
    "--eval_rows",
    "16",
    "--max_tokens_per_microbatch",
    "160",
]
COUNTDOWN = [
    "--task",
    "countdown3",
    "--prompts_per_step",
    "4",
    "--samples_per_prompt",
    "2",
    "--max_prompt_tokens",
    "64",
    "--max_new_tokens",
    "16",
    "--max_tokens_per_microbatch",
    "400",
    "--no-gradient_checkpointing",
    "--eval_rows",
    "8",
]


def processes() -> dict[int, list[int]]:
    """Parent -> its children, of the whole machine, zombies too."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.name))
        except OSError:  # it has ended meanwhile
            pass
    return children


def below(pid: int) -> list[int]:
    tree, found = processes(), []
    todo = list(tree.get(pid, []))
    while todo:
        found.append(todo.pop())
        todo += tree.get(found[-1], [])
    return found


def state() -> dict[str, float]:
    """Of this process, now. Threads are the system's: those of C libraries count, too."""
    kilobytes = next(
        line for line in open("/proc/self/status") if line.startswith("VmRSS:")
    ).split()[1]
    return {
        "rss_mb": int(kilobytes) / 1024,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "processes": len(below(os.getpid())),
    }


def worker(out: str, flags: list[str]) -> None:
    """One rank: the run, with a look at the process after every step, where train asks for
    warnings."""
    data.TASKS["toy"], rewards.REWARDS["toy"] = toy.load_toy, toy.toy
    ask = run.Run.warn_if_diverging
    guards.GUARDS.clear()  # what is learnt is not the question: once the toy is solved all rewards are equal
    record = open(f"{out}.rank{watchdog.RANK}.jsonl", "w")

    def look(self, row: dict, young: bool) -> None:
        now = {"step": row["step"], **state()}
        record.write(json.dumps(now) + "\n")
        record.flush()
        if row["step"] % 100 == 0:
            print(
                f"rank {watchdog.RANK} of {watchdog.WORLD}  step {row['step']:5d}  {now['rss_mb']:7.1f} MB  "
                + "  ".join(f"{now[name]:3d} {name}" for name in COUNTS),
                file=sys.stderr,
                flush=True,
            )
        ask(self, row, young)

    run.Run.warn_if_diverging = look
    ppo.train(ppo.parse_args(["--out", out, *flags]))


def grown(rows: list[dict], young: int, limit: float) -> list[str]:
    """What grew after step `young`: means of the steps just before it against those of the last.
    Of counts the least of those steps: a save that goes on at one of the looks has a file open."""
    size = max(10, young // 5)
    first, last, found = rows[young - size : young], rows[-size:], []
    before, after = (mean(row["rss_mb"] for row in part) for part in (first, last))
    if after >= (1 + limit) * before:
        found.append(f"memory: {before:.1f} -> {after:.1f} MB")
    for name in COUNTS:
        before, after = (min(row[name] for row in part) for part in (first, last))
        if after > before:
            found.append(f"{name}: {before} -> {after}")
    return found


def soak(
    out: Path, world: int, flags: list[str], young: int, seconds: float, limit: float = 0.05
) -> tuple[list[list[dict]], list[str]]:
    """Runs it and looks at what is left. Returns what each rank recorded, a row a step, and what is
    wrong."""
    adopt = ctypes.CDLL(None).prctl
    launch.server()
    adopt(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # whoever loses its parent becomes a child of ours
    mine = set(below(os.getpid()))
    command = [Path(__file__), "--worker", out, *flags]
    ended = launch.run(*command, ranks=world, seconds=seconds, log=Path(f"{out}.said"))
    wrong = []
    deadline = time.monotonic() + 60  # for those that are about to end
    left = [pid for pid in below(os.getpid()) if pid not in mine]
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = [pid for pid in below(os.getpid()) if pid not in mine]
    for pid in left:
        wrong.append(f"process {pid} is left: {Path(f'/proc/{pid}/cmdline').read_text()!r}")
        os.kill(pid, signal.SIGKILL)
    adopt(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    if ended.code != 0:
        return [], [*wrong, f"the run ended with {ended.code}: {ended.said[-2000:]}"]
    ranks = [launch.read_lines(Path(f"{out}.rank{rank}.jsonl")) for rank in range(world)]
    for rank, rows in enumerate(ranks):
        wrong += [f"rank {rank}: {text}" for text in grown(rows, young, limit)]
    return ranks, wrong


def toy_flags(folder: Path, steps: int, model: str | None = None) -> list[str]:
    if not model:
        toy.make_model(model := str(folder / "toy"))
    return ["--model", model, *toy.FLAGS, *TOY, "--steps", str(steps)]  # the last ones win


def main(folder: Path, steps: int = 1000, *worlds: int, engine: str = "torch") -> int:
    folder.mkdir(parents=True, exist_ok=True)
    bad, young = [], min(100, steps // 3)
    if engine == "vllm":
        import conftest

        model = conftest.random_folder(folder / "tiny", tie=True)
        flags = ["--model", model, *COUNTDOWN, "--lr", "1e-3", "--steps", str(steps)]
    else:
        flags = toy_flags(folder, steps)
    flags += ["--save_every", str(young // 2), "--keep_last", "2", "--eval_every", str(young)]
    for world in worlds or (1, 2):
        ranks, wrong = soak(
            folder / f"{engine}{world}", world, flags, young, seconds=2.0 * steps + 300
        )
        for rank, rows in enumerate(ranks):
            sizes = [mean(row["rss_mb"] for row in rows[n - 10 : n]) for n in (young, len(rows))]
            print(
                f"{engine}, rank {rank} of {world}: {sizes[0]:.1f} MB at step {young}, {sizes[1]:.1f} MB at step "
                f"{len(rows)}: {sizes[1] / sizes[0] - 1:+.2%}",
                flush=True,
            )
        print(
            "\n".join(wrong) or f"{engine}, {world} ranks: nothing else grew, nothing is left",
            flush=True,
        )
        bad += wrong
    return int(bool(bad))


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        sys.exit(worker(sys.argv[2], sys.argv[3:]))
    arguments, options = (
        (sys.argv[1:-2], sys.argv[-1:]) if "--engine" in sys.argv else (sys.argv[1:], ["torch"])
    )
    sys.exit(main(Path(arguments[0]), *map(int, arguments[1:]), engine=options[0]))
