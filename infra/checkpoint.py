"""Checkpoints: whole or absent, checked before they are read, for any number of ranks.

step_N/{policy,critic}: Hugging Face folders, fp32; step_N/*.optimizer*: AdamW's moments, whole, for
any ranks; state.json: what else a run is, and the SHA-256 of every file. A folder that has such a
name is whole.

Owns: the files, their order on the disk, which of them stay.
Refuses to know: what a step does.
Left out on purpose: pickles. A checkpoint is safetensors and JSON, so that loading one runs
nobody's code.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from infra import watchdog
from infra.dist import Ranks
from infra.log import hidden, say, to_disk, write
from infra.models import Trained, full_weights, gathered

# ------------------------------------------------------------------------------- what is written


class Shares:
    """Deals whole tensors to the ranks, each to the one that has the least so far. A rank copies
    its own to the CPU and forgets the others, so that nobody holds a whole model."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.load = [0] * ranks.world  # numbers of each rank
        self.mine: dict[str, dict[str, Tensor]] = {}  # file -> tensors

    def add(self, stem: str, key: str, tensor: Tensor) -> str:
        """The file that the tensor belongs to: STEM.safetensors, or that of its rank."""
        owner = self.load.index(min(self.load))
        self.load[owner] += tensor.numel()
        file = f"{stem}.safetensors"
        if self.ranks.world > 1:
            file = f"{stem}-{owner + 1:05d}-of-{self.ranks.world:05d}.safetensors"
        if owner == self.ranks.rank:
            tensors = self.mine.setdefault(file, {})
            tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()
        return file


def checkpoint_parts(
    trained: dict[str, Trained], ranks: Ranks, tokenizer, folder: Path
) -> dict[str, dict[str, Tensor]]:
    """What this rank writes of a checkpoint: file name -> whole tensors on the CPU, of weights in
    fp32 and of AdamW's moments. Collective. Rank 0 also writes what makes `folder`/policy and
    /critic ordinary Hugging Face folders."""
    parts = {}
    for name, each in trained.items():
        shares = Shares(ranks)
        weight_map = {}
        for key, tensor in full_weights(each.model, torch.float32):
            file = shares.add(f"{name}/model", key, tensor)
            weight_map[key] = Path(file).name
        for key, tensor in full_moments(each):
            shares.add(f"{name}.optimizer", key, tensor)
        parts |= shares.mine
        if ranks.rank == 0:
            describe(each.model, tokenizer, folder / name)
            if ranks.world > 1:
                text = json.dumps({"metadata": {}, "weight_map": weight_map})
                (folder / name / "model.safetensors.index.json").write_text(text)
    return parts


def full_moments(trained: Trained) -> Iterator[tuple[str, Tensor]]:
    """(PARAMETER.MOMENT, whole tensor) of AdamW's state; collective. There is none before the first
    step: of the policy, while the critic is warmed up."""
    for name, p in trained.model.named_parameters():
        for moment, x in trained.optimizer.state.get(p, {}).items():
            yield f"{name}.{moment}", gathered(x)


def describe(model, tokenizer, folder: Path) -> None:
    """config.json, the tokenizer's files and, where the model has one, generation_config.json."""
    model.config.save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation:
        generation.save_pretrained(folder)


def load_moments(folder: Path | None, trained: dict[str, Trained]) -> None:
    """AdamW's moments from `checkpoint_parts`, whoever wrote them, sharded as models are now."""
    if folder is None:
        return
    for name, each in trained.items():
        parameters = dict(each.model.named_parameters())
        for file in sorted(folder.glob(f"{name}.optimizer*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():
                    owner, moment = key.rsplit(".", 1)
                    p = parameters[owner]
                    x = shard_like(p, tensors.get_tensor(key))
                    each.optimizer.state[p][moment] = x.to(p.device, copy=True)


def shard_like(p: Tensor, x: Tensor) -> Tensor:
    """A whole tensor, sharded as the parameter p is. AdamW's step, a plain number, stays whole."""
    if not isinstance(p, DTensor) or not x.dim():
        return x
    mesh = p.device_mesh
    return distribute_tensor(x.to(mesh.device_type), mesh, p.placements, src_data_rank=None)


# ----------------------------------------------------------------------------------- what is read


def checkpoints(out: str | Path) -> list[Path]:
    """Complete ones, the newest first."""
    found = {}
    for path in Path(out, "checkpoints").glob("step_*"):
        step = path.name.removeprefix("step_")
        if step.isdigit():
            found[int(step)] = path
    return [found[step] for step in sorted(found, reverse=True)]


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal_of(state: dict) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint; {} when it cannot be read, or is not as it was written."""
    try:
        state = json.loads((folder / "state.json").read_text())
        seal = state.pop("seal")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}
    if seal != seal_of(state):
        return {}
    return state


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint. Reading all of it takes time: each rank reads a
    part."""
    digests = read_state(folder).get("files", {"state.json": ""})
    bad = []
    for name in sorted(digests)[part::parts]:
        try:
            if digest(folder / name) != digests[name]:
                bad.append(f"{name} is not what was written")
        except OSError as error:
            bad.append(f"{name}: {error.strerror}")
    return bad


def find_checkpoint(
    found: list[Path], config: dict, may_change: set[str], gather: Callable
) -> tuple[Path | None, dict]:
    """The newest of `found` (the newest first) whose files are all as they were written, and its
    state. Newer, damaged ones get another name. Its flags must be those of `config`, but for those
    that `may_change`: else ValueError. `gather` joins what the ranks found."""
    damaged = []
    for path in found:
        bad = []
        for texts in gather(damage(path, watchdog.RANK, watchdog.WORLD)):
            bad += texts
        if bad:
            damaged.append(path)
            if watchdog.RANK == 0:
                say(f"warning: {path} is damaged: {'; '.join(bad[:5])}")
            continue
        state = read_state(path)
        refuse_other_flags(path, state["config"], hidden(config), may_change)
        if watchdog.RANK == 0:
            set_aside(damaged)  # not before there is a whole one: the next start is told, too
            # the end may have come between a checkpoint's last name and this
            tidy(path.parent, config["keep_last"], config["keep_best"])
        return path, state
    if found:
        raise ValueError(
            f"resume: none of {len(found)} checkpoints beside {found[0]} is whole: "
            "the warnings say why"
        )
    return None, {}


def refuse_other_flags(path: Path, old: dict, new: dict, may_change: set[str]) -> None:
    changed = []
    for name in sorted(old | new):
        if name not in may_change and old.get(name) != new.get(name):
            changed.append(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now")
    if changed:
        fix = f"give the old values, or start a new run from {path}/policy and {path}/critic"
        raise ValueError(
            f"resume: {path} is of a run with other flags: {'; '.join(changed)}: {fix}"
        )


def set_aside(damaged: list[Path]) -> None:
    for path in damaged:
        shutil.rmtree(f"{path}.damaged", ignore_errors=True)
        path.rename(f"{path}.damaged")


# --------------------------------------------------------------------------------- how it is saved


class Saver:
    """Writes checkpoints behind the run's back: tensors are on the CPU already, so the next step
    may change the models. One at a time; what went wrong is raised by `wait` and `begin`."""

    def __init__(self, out: str | Path, keep_last: int, keep_best: str):
        self.out = Path(out)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.saved = time.monotonic()  # when the last one was begun
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future | None = None

    def begin(self, final: Path, names: Iterable[str], gather: Callable) -> Path:
        """The folder beside `final` to write into, with an empty folder for each of `names`, on all
        ranks."""
        self.wait()
        aside = final.with_name(final.name + ".tmp")
        if watchdog.RANK == 0:
            shutil.rmtree(aside, ignore_errors=True)
            for name in names:
                (aside / name).mkdir(parents=True)
        gather(None)  # with replicas, tensors are gathered among neighbours only
        if not aside.is_dir():
            raise OSError(
                f"rank {watchdog.RANK} does not see {aside}: "
                "--out must be a folder that all machines share"
            )
        return aside

    def save(self, final: Path, parts: dict[str, dict[str, Tensor]], state: dict) -> None:
        """`parts`: what this rank writes, file -> tensors on the CPU; `state`: what goes into
        state.json."""
        self.saved = time.monotonic()
        state = json.loads(json.dumps(state))  # as it is now
        self.pending = self.pool.submit(self._write, final, parts, state)

    def wait(self) -> None:
        if self.pending:
            self.pending.result()

    def due(self, minutes: float) -> bool:
        """Is it time, by the clock? Raises what went wrong with the last one."""
        if self.pending and self.pending.done():
            self.pending.result()
        return minutes > 0 and time.monotonic() - self.saved > 60 * minutes

    def _write(self, final: Path, parts: dict[str, dict[str, Tensor]], state: dict) -> None:
        aside = final.with_name(final.name + ".tmp")
        digests = {}
        try:
            for name, tensors in parts.items():
                safetensors.torch.save_file(tensors, aside / name, {"format": "pt"})
                to_disk(aside / name)
                digests[name] = digest(aside / name)
            write(aside / f"rank{watchdog.RANK}.json", json.dumps(digests))
            if watchdog.RANK == 0:
                self._finish(final, aside, state)
        except Exception as error:
            free = shutil.disk_usage(self.out).free / 2**30
            for name in parts:  # not the files of the others: their errors would hide this one
                (aside / name).unlink(missing_ok=True)
            if watchdog.WORLD == 1:
                shutil.rmtree(aside, ignore_errors=True)
            last = "none"
            whole = checkpoints(self.out)
            if whole:
                last = whole[0]
            raise OSError(
                f"{final} could not be written ({free:.1f} GB free there): {error}. "
                f"Nothing else was touched; the newest complete checkpoint: {last}. "
                "Make room, then --resume auto"
            ) from error

    def _finish(self, final: Path, aside: Path, state: dict) -> None:
        """Rank 0, when all ranks have written theirs: the digests of all files, then the name."""
        manifests = [aside / f"rank{rank}.json" for rank in range(watchdog.WORLD)]
        while not all(path.exists() for path in manifests):
            if not threading.main_thread().is_alive():
                return
            time.sleep(0.02)
        digests = {}
        for path in manifests:
            digests |= json.loads(path.read_text())
            path.unlink()
        folders = [aside]
        for path in aside.rglob("*"):
            name = str(path.relative_to(aside))
            if path.is_dir():
                folders.append(path)
            elif name not in digests:  # configurations and tokenizers
                to_disk(path)
                digests[name] = digest(path)
        state = hidden(state | {"files": digests})
        text = json.dumps(state | {"seal": seal_of(state)}, indent=1)
        write(aside / "state.json", text)
        for folder in folders:
            to_disk(folder)
        if not final.name.startswith("step_"):  # bad_step_N, for the second time
            shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        to_disk(final.parent)
        if final.name.startswith("step_"):
            tidy(final.parent, self.keep_last, self.keep_best)


def tidy(folder: Path, keep_last: int, keep_best: str) -> None:
    """Moves the links, then deletes what is neither among the last nor the best, and what an end
    left half done."""
    found = checkpoints(folder.parent)
    point(folder / "latest", found[0].name)
    best = best_of(found, keep_best)
    if best:
        point(folder / "best", best.name)
    older = []
    if keep_last:
        older = found[keep_last:]
    for path in older:
        if path != best:
            os.rename(path, f"{path}.old")
    for path in (*folder.glob("step_*.old"), *folder.glob("step_*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def best_of(found: list[Path], metric: str) -> Path | None:
    """The checkpoint with the highest value, the first of equals; None, if none has the metric."""
    best = None
    highest = 0.0
    for path in found:
        value = read_state(path).get("metrics", {}).get(metric)
        if value is not None and (best is None or value > highest):
            best = path
            highest = value
    return best


def point(link: Path, target: str) -> None:
    aside = link.with_name(link.name + ".new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)
