"""python tests/crash.py [WORDS] [--world 1 2] [--turn N]: kill -9 wherever it could hurt, then
--resume auto.

A run of tests/toy.py is killed at a point, goes on, is killed at a later one, and so on; at last it
is left alone. It is right when
- metrics.jsonl, samples.jsonl and the last checkpoint are, bit for bit, those of a run that was left alone;
- each start went on from the newest checkpoint that was whole, and lost at most the one that was being written;
- `latest` and `best` were never dead links, nothing half-written was left at the end, and no process.
Exit code 1 when one is not. With two ranks, rank 0, rank 1 or all (their launcher, too) are killed; who
it is at a point, N says. WORDS: only the points with one of them. All points take about five
minutes on 2 cores.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import launch
from safetensors import safe_open

# checkpoints: step_2, step_3 (the best: step_2 is deleted), step_4, step_6 (step_4 is deleted)
FLAGS = "--steps 6 --save_every 2 --keep_last 1 --keep_best eval/correct --eval_every 3 --eval_rows 8 --ppo_epochs 1 "
FLAGS = [*(FLAGS + "--prompts_per_step 32 --minibatch_size 16 --resume auto").split()]
SAVED, DIES = 3, 5  # the step whose checkpoint is hit, and the one in whose phases a run is hit

# ---------------------------------------------------------------------------------------------- the run that is killed


def die() -> None:
    """kill -9 of this process, or of all and their launcher, if this rank is meant. Never returns
    then."""
    from infra import checkpoint, watchdog

    if WHO not in ("all", str(watchdog.RANK)):
        return
    whole = [path.name for path in checkpoint.checkpoints(OUT)]
    note = {"whole": whole, "begun": BEGUN, "at": time.time()}
    aside = Path(
        f"{OUT}.killed.{watchdog.RANK}"
    )  # when all die, two may write it, and kill each other meanwhile
    aside.write_text(json.dumps(note))
    aside.replace(f"{OUT}.killed")
    others = []
    if WHO == "all" and watchdog.WORLD > 1:
        launcher = os.getppid()
        below = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        others = [launcher, *(int(pid) for pid in below if int(pid) != os.getpid())]
    for pid in (*others, os.getpid()):
        end(pid)
    time.sleep(60)  # the signal is on its way


def end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def always(*args, **more) -> bool:
    return True


def kill(
    owner: str,
    name: str,
    chosen: Callable = always,
    nth: int = 1,
    after: bool = False,
    first: Callable = None,
):
    """The nth chosen call of owner.name is where this process dies: before it, `after` it, or when
    `first` has done half of its work."""
    owner, calls = sys.modules[owner] if isinstance(owner, str) else owner, []
    original = getattr(owner, name)

    def call(*args, **more):
        calls.extend([1] if chosen(*args, **more) else [])
        hit = len(calls) == nth and chosen(*args, **more)
        if hit and first:
            first(*args)
        if hit and not after:
            die()
        result = original(*args, **more)
        if hit and after:
            die()
        return result

    setattr(owner, name, call)


def kill_method(name: str, *how, **more):
    """As `kill`, of a method of the run."""
    from infra.run import Run

    kill(Run, name, *how, **more)


def kill_phase(phase: str, end: bool, nth: int = 1, step: int = DIES):
    from infra import clock, watchdog

    original, calls = clock.timed, []

    @contextmanager
    def timed(times, name):
        calls.extend([1] if (name, watchdog.NOW.step) == (phase, step) else [])
        hit = name == phase and watchdog.NOW.step == step and len(calls) == nth
        if hit and not end:
            die()
        with original(times, name):
            yield
        if hit and end:
            die()

    clock.timed = timed


def tear(pattern: str, step: int | None = None):
    """Half of what is written to such a file, or to the one that will get its name, is there when
    the process dies."""
    from infra import log, watchdog

    pattern = pattern.replace("SAVED", f"step_{SAVED}")

    class Torn:
        def __init__(self, *how):
            self.file = open(*how)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            die()
            self.file.write(text[len(text) // 2 :])

        def __getattr__(self, name):
            return getattr(self.file, name)

    def opened(path, *how, **more):
        hit = Path(path).match(pattern) or Path(path).match(f"{pattern}.new")
        hit = hit and how in (("a",), ("w",)) and step in (None, watchdog.NOW.step)
        return Torn(path, *how) if hit else open(path, *how, **more)

    log.open = opened


def named(*names: str) -> Callable:
    """Chosen is a call whose first or last path has this name, or ends like it (*.old)."""
    names = [name.replace("SAVED", f"step_{SAVED}") for name in names]
    return lambda *args, **_: any(
        Path(x).match(name) for x in args[:2] if isinstance(x, (str, Path)) for name in names
    )


def of_saved(path, *_, **__) -> bool:
    return f"step_{SAVED}.tmp" in str(path)


def in_step(step: int, phase: str = "") -> Callable:
    from infra.watchdog import NOW

    return lambda *_, **__: NOW.step == step and phase in ("", NOW.phase)


def half_tensors(tensors: dict, file: Path, *_) -> None:
    from safetensors.torch import save

    whole = save(tensors)
    Path(file).write_bytes(whole[: len(whole) // 2])


def half_copy(source, folder) -> None:
    Path(folder, Path(source).name).write_bytes(Path(source).read_bytes()[:1000])


def half_deleted(folder, *_, **__) -> None:
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file())[:3]:
        path.unlink()


def into_saved(tensors, file, *_) -> bool:
    return of_saved(file)


def link_to_saved(name: str) -> Callable:
    """Chosen is a call that lets this link, or what will be renamed to it, point to the checkpoint
    of step SAVED."""

    def chosen(path, target, **_):
        path, target = Path(path), str(target)
        made = (
            target if path.name == name else os.readlink(path) if path.name == f"{name}.new" else ""
        )
        return made == f"step_{SAVED}"

    return chosen


def into(step: int) -> Callable:
    return lambda tensors, file, *_: f"step_{step}.tmp" in str(file)


def half_file(step: int):
    kill("safetensors.torch", "save_file", into(step), 2, first=half_tensors)


BOTH, MAIN = ["0", "1", "all"], ["0", "all"]  # who may die there, of two ranks
PHASES = ["sample", "reward", "forward", "advantage", "update", "sync", "report"]
STAGES = [
    {  # before there is a checkpoint. name: (who may die there, what makes it die)
        "engine start: before": (BOTH, lambda: kill("rollout", "make_sampler")),
        "engine start: after": (BOTH, lambda: kill("rollout", "make_sampler", after=True)),
        "setup: models are loaded": (BOTH, lambda: kill_method("open")),
        "folder: made, empty": (MAIN, lambda: kill("infra.run", "write", named("config.json"))),
        "config.json: half": (MAIN, lambda: tear("config.json")),
        "config.json: before its rename": (
            MAIN,
            lambda: kill("os", "replace", named("config.json")),
        ),
        "config.json: after, nothing else": (
            MAIN,
            lambda: kill("infra.run", "write", named("config.json"), after=True),
        ),
        "sources: half a copy": (MAIN, lambda: kill("shutil", "copy", nth=3, first=half_copy)),
        "first sync": (BOTH, lambda: kill("infra.models", "full_weights")),
        "evaluation of step 0": (BOTH, lambda: kill("rewards", "evaluation", in_step(0))),
    },
    {
        "first save: half a file": (BOTH, partial(half_file, 2)),
        "first save: before the rename": (MAIN, lambda: kill("os", "rename", named("step_2"))),
        "first save: before latest": (
            MAIN,
            lambda: kill("infra.checkpoint", "point", named("latest")),
        ),
        "evaluation of step 3": (BOTH, lambda: kill("rewards", "evaluation", in_step(3))),
    },
    {  # step_2 is there, SAVED is not whole yet
        "save: folder made": (
            BOTH,
            lambda: kill("infra.checkpoint", "checkpoint_parts", in_step(SAVED)),
        ),
        "save: policy's tensors gathered": (
            BOTH,
            lambda: kill("infra.checkpoint", "full_weights", in_step(SAVED, "save"), 2),
        ),
        "save: before the first file": (
            BOTH,
            lambda: kill("safetensors.torch", "save_file", into(SAVED)),
        ),
        "save: half a file": (BOTH, partial(half_file, SAVED)),
        "save: between files": (
            BOTH,
            lambda: kill("safetensors.torch", "save_file", into(SAVED), 2, True),
        ),
        "save: before the first fsync": (
            BOTH,
            lambda: kill("infra.checkpoint", "to_disk", of_saved),
        ),
        "save: before the manifest": (
            BOTH,
            lambda: kill("infra.checkpoint", "write", named("SAVED.tmp/rank*.json")),
        ),
        "save: half the manifest": (BOTH, lambda: tear("SAVED.tmp/rank*.json")),
        "save: manifests deleted": (
            MAIN,
            lambda: kill("os", "unlink", named("SAVED.tmp/rank*.json"), after=True),
        ),
        "save: before state.json": (
            MAIN,
            lambda: kill("infra.checkpoint", "write", named("SAVED.tmp/state.json")),
        ),
        "save: half of state.json": (MAIN, lambda: tear("SAVED.tmp/state.json")),
        "save: before the rename": (MAIN, lambda: kill("os", "rename", named("SAVED"))),
    },
    {  # SAVED is whole, or rank 0 can still make it so when rank 1 dies
        "save: after the manifest": (
            BOTH,
            lambda: kill("infra.checkpoint", "write", named("SAVED.tmp/rank*.json"), after=True),
        ),
        "save: after the rename": (MAIN, lambda: kill("os", "rename", named("SAVED"), after=True)),
        "save: before latest": (
            MAIN,
            lambda: kill("infra.checkpoint", "point", link_to_saved("latest")),
        ),
        "save: latest.new is made": (MAIN, lambda: kill("os", "replace", link_to_saved("latest"))),
        "save: between latest and best": (
            MAIN,
            lambda: kill("infra.checkpoint", "point", link_to_saved("latest"), after=True),
        ),
        "save: best.new is made": (MAIN, lambda: kill("os", "replace", link_to_saved("best"))),
        "save: between best and the deletion": (
            MAIN,
            lambda: kill("os", "rename", named("step_2.old")),
        ),
        "save: old one renamed": (
            MAIN,
            lambda: kill("os", "rename", named("step_2.old"), after=True),
        ),
        "save: old one half deleted": (
            MAIN,
            lambda: kill("shutil", "rmtree", named("step_2.old"), first=half_deleted),
        ),
    },
    {  # of a start that goes on from a checkpoint
        "resume: the checkpoint is read": (
            BOTH,
            lambda: kill("infra.checkpoint", "damage", after=True),
        ),
        "resume: moments are loaded": (
            BOTH,
            lambda: kill("infra.checkpoint", "load_moments", after=True),
        ),
        "resume: config.json half": (MAIN, lambda: tear("config.json")),
        "resume: metrics.jsonl half cut": (MAIN, lambda: tear("metrics.jsonl")),
        "resume: metrics.jsonl cut": (
            MAIN,
            lambda: kill("infra.run", "write", named("metrics.jsonl"), after=True),
        ),
        "resume: before samples.jsonl's rename": (
            MAIN,
            lambda: kill("os", "replace", named("samples.jsonl")),
        ),
        "resume: folder opened": (BOTH, lambda: kill_method("open", after=True)),
        "resume: first sync": (BOTH, lambda: kill("infra.models", "full_weights", after=True)),
        "resume: half a file of its save": (BOTH, partial(half_file, 4)),
    },
    {
        "metrics.jsonl: after, before its save": (
            BOTH,
            lambda: kill_method("warn_if_diverging", in_step(4)),
        ),
        **{f"{p}: begin": (BOTH, partial(kill_phase, p, False)) for p in PHASES},
        **{
            f"{p}: end": (BOTH, partial(kill_phase, p, True, 2 if p == "reward" else 1))
            for p in PHASES
        },
        "reward: waits for the results": (BOTH, partial(kill_phase, "reward", False, 2)),
        "update: before the policy's step": (
            BOTH,
            lambda: kill("infra.models", "optimizer_step", in_step(DIES)),
        ),
        "update: policy's, then critic's step": (
            BOTH,
            lambda: kill("infra.models", "optimizer_step", in_step(DIES), 1, True),
        ),
        "update: between minibatches": (
            BOTH,
            lambda: kill("infra.models", "optimizer_step", in_step(DIES), 2, True),
        ),
        "samples.jsonl: half a line": (MAIN, lambda: tear("samples.jsonl", DIES)),
        "metrics.jsonl: half a line": (MAIN, lambda: tear("metrics.jsonl", DIES)),
    },
    {
        "evaluation of the last step": (BOTH, lambda: kill("rewards", "evaluation", in_step(6))),
        "last save: half a file": (BOTH, partial(half_file, 6)),
        "last save: before the rename": (MAIN, lambda: kill("os", "rename", named("step_6"))),
        "last save: after the rename": (
            MAIN,
            lambda: kill("os", "rename", named("step_6"), after=True),
        ),
    },
]
POINTS = {name: point for stage in STAGES for name, point in stage.items()}


def chains(words: list[str] = ()) -> list[list[str]]:
    """Points that one run can be killed at, one start after the other, each of them in one
    chain."""
    found = [[] for _ in STAGES[3]]  # of stage 3 a run has room for one
    for number, stage in enumerate(STAGES):
        for i, name in enumerate(
            name for name in stage if not words or any(word in name for word in words)
        ):
            found[(i + 3 * number) % len(found)].append(name)
    for chain in found:  # with fewer WORDS, nothing may have been saved before a point of a resume
        resumes = [name for name in chain if name in STAGES[4]]
        if resumes and not any(name in stage for stage in STAGES[2:4] for name in chain):
            chain.insert(chain.index(resumes[0]), "sync: begin")
    return [chain for chain in found if chain]


# ------------------------------------------------------------------------------------------------------ what looks on


def launched(
    world: int, out: Path, flags: list, at: str = "", who: str = "", limit: float = 200
) -> dict:
    """One start of the run, until it has ended: how, what it said, seconds from the kill to the
    end, processes left."""
    note, log = Path(f"{out}.killed"), Path(f"{out}.said")
    note.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    script = ["tests/crash.py", "--at", at, "--who", who] if at else ["tests/toy.py"]
    job = launch.start(*script, out, *flags, ranks=world, log=log)
    deadline = time.time() + limit
    while job.code is None and time.time() < deadline:
        time.sleep(0.02)
    code = job.code
    ended = time.time()
    while (left := writers(log)) and code is not None and time.time() < ended + 20:
        time.sleep(0.05)
    for pid in left:
        end(pid)
    killed = json.loads(note.read_text()) if note.exists() else {}
    return {
        "code": code,
        "said": job.said(),
        "left": left,
        "killed": killed,
        "took": ended - killed.get("at", ended),
    }


def writers(log: Path) -> list[int]:
    """Processes whose stdout is this file, whoever their parent is by now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "fd" / "1") == str(log):
                found.append(int(folder.name))
        except OSError:  # it has ended
            pass
    return found


def read(out: Path) -> dict:
    """What must not depend on kills."""
    last = out / "checkpoints" / "step_6"
    state = json.loads((last / "state.json").read_text())
    return {
        "metrics.jsonl": [launch.numbers(row) for row in launch.metrics(out)],
        "samples.jsonl": launch.read_lines(out / "samples.jsonl"),
        "state.json": {k: state.get(k) for k in ("step", "best", "streaks", "kl_coef")},
        "files": sorted(state["files"]),
        "tensors": tensors(last),
        "folder": sorted(path.name for path in out.iterdir()),
        "checkpoints": sorted(path.name for path in (out / "checkpoints").iterdir()),
        "links": {name: os.readlink(out / "checkpoints" / name) for name in ("latest", "best")},
    }


def tensors(checkpoint: Path) -> dict[str, str]:
    """Digest of each tensor, in whichever file of its folder it is: that depends on the order they
    are written in."""
    found = {}
    for file in checkpoint.rglob("*.safetensors"):
        what = re.split(r"[-.]\d|\.safetensors", str(file.relative_to(checkpoint)))[0]
        with safe_open(file, "np") as opened:
            for key in opened.keys():
                found[f"{what}: {key}"] = hashlib.sha256(
                    opened.get_tensor(key).tobytes()
                ).hexdigest()[:12]
    return found


def differences(found, expected, where: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        both = [(k, found.get(k), expected.get(k)) for k in sorted({*found, *expected})]
        return [text for k, *pair in both for text in differences(*pair, f"{where}/{k}")]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        return [
            d
            for i, pair in enumerate(zip(found, expected))
            for d in differences(*pair, f"{where}[{i}]")
        ]
    return (
        [] if found == expected else [f"{where[1:]} is {str(found)[:80]}, not {str(expected)[:80]}"]
    )


def crash(
    world: int, out: Path, flags: list, chain: list[tuple[str, str]], expected: dict
) -> list[dict]:
    """Lines of the table: a run is killed at each (point, who dies) of the chain, one start after
    the other, then left alone. `wrong` of the last line is what was found at the end."""
    lines, begun = [], [0]
    for point, who in [*chain, ("", "")]:
        before = [
            int(path.name[5:]) for path in out.glob("checkpoints/step_*") if path.name[5:].isdigit()
        ]
        start = launched(world, out, flags, point, who)
        wrong, said, killed = [], start["said"], start["killed"]
        if max(begun) > max(before, default=0):
            wrong.append(f"checkpoints {begun} were begun and ended, {before} are there")
        found = re.search(r"steps (\d+) to 6", said)
        went = int(found[1]) if found else 6 if "nothing is left to do" in said else None
        if went != max(before, default=0) if found or not point else False:
            wrong.append(f"went on from {went}, not from the newest of {before}")
        if lines:
            lines[-1]["from"] = went
        for path in (out / "checkpoints" / "latest", out / "checkpoints" / "best"):
            dead = path.is_symlink() and not path.exists()
            wrong += [f"{path.name} is a dead link to {os.readlink(path)}"] if dead else []
        wrong += [f"{len(start['left'])} processes were left"] if start["left"] else []
        wrong += [f"took {start['took']:.0f} s to end"] if start["took"] > 60 else []
        if bool(start["code"]) != bool(point):
            wrong.append(f"exit code {start['code']}")
        if point and not killed:
            wrong.append("was not killed there")
        if killed:
            begun += [
                int(name[5:]) for name in killed["begun"][:-1]
            ]  # the last one may have been on its way
        if wrong:
            wrong.append(f"it said: {said.strip()[-1500:]}")
        if not point and not wrong:
            wrong = differences(read(out), expected)[:5]
        lines.append(
            {
                "point": point or "(the end)",
                "who": who,
                "from": None,
                "took": start["took"],
                "wrong": wrong,
            }
        )
    return lines


def reference(world: int, folder: Path, flags: list) -> dict:
    out = folder / f"whole{world}"
    start = launched(world, out, flags)
    assert start["code"] == 0, start["said"][-3000:]
    return read(out)


def main(words: list[str], turn: int, worlds: list[int]) -> int:
    import toy

    folder = Path(tempfile.mkdtemp(prefix="ppo-crash-"))
    toy.make_model(str(folder / "model"))
    flags, failed, runs, points, began = (
        ["--model", folder / "model", *FLAGS],
        0,
        0,
        set(),
        time.time(),
    )
    print("chain | point | ranks | killed | went on from step | s to the end | equal", flush=True)
    print("--- | --- | --- | --- | --- | --- | ---", flush=True)
    for world in worlds:  # processes at a time: two
        expected = reference(world, folder, flags)
        order = list(POINTS)
        todo = []
        for chain in chains(words):
            whos = [POINTS[name][0] if world > 1 else ["0"] for name in chain]
            turns = [(order.index(name) + turn) % len(who) for name, who in zip(chain, whos)]
            todo.append([(name, who[t]) for name, who, t in zip(chain, whos, turns)])
        with ThreadPoolExecutor(3 - world) as pool:
            made = [
                pool.submit(crash, world, folder / f"{world}.{i}", flags, c, expected)
                for i, c in enumerate(todo)
            ]
            for i, lines in enumerate(future.result() for future in made):
                equal = not any(line["wrong"] for line in lines)
                for line in lines:
                    told = (
                        f"NO: {'; '.join(line['wrong'])}"
                        if line["wrong"]
                        else "yes"
                        if equal
                        else "(see its chain)"
                    )
                    went = "" if line["from"] is None else line["from"]
                    seconds = f"{line['took']:.0f}" if line["who"] else ""
                    text = f"{world}.{i} | {line['point']} | {world} | {line['who']} | {went} | {seconds} | {told}"
                    print(text, flush=True)
                    points.add(line["point"])
                failed, runs = failed + (not equal), runs + 1
                if equal:
                    shutil.rmtree(folder / f"{world}.{i}")
    minutes = (time.time() - began) / 60
    print(
        f"\n{len(points - {'(the end)'})} points, {runs} runs, {failed} of them wrong, {minutes:.0f} minutes"
    )
    if not failed:
        shutil.rmtree(folder)
    return int(bool(failed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--at", default="")
    parser.add_argument("--who", default="")
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turn", type=int, default=0)
    parser.add_argument("rest", nargs="*")
    given, more = parser.parse_known_args()
    if not given.at:
        sys.exit(main(given.rest, given.turn, given.world))
    import toy  # noqa: I001  (first: the guard for the name `kernels`)

    import safetensors.torch  # noqa: F401

    import rewards  # noqa: F401
    import rollout  # noqa: F401
    from infra.checkpoint import Saver

    OUT, WHO, BEGUN = given.rest[0], given.who, []
    saving = Saver.save
    Saver.save = lambda self, final, *parts: (
        BEGUN.append(final.name),
        saving(self, final, *parts),
    )[1]
    POINTS[given.at][1]()
    flags = sys.argv[sys.argv.index(OUT) + 1 :]
    toy.run(OUT, *flags)
