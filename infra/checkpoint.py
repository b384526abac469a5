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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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

# file name -> whole tensors on the CPU: what one rank writes of a checkpoint
Files = dict[str, dict[str, Tensor]]

# ------------------------------------------------------------------------------- what is written


def checkpoint_parts(trained: dict, ranks: Ranks, tokenizer, folder: Path) -> Files:
    """What this rank writes of `trained`, name -> Trained. Collective. Whole tensors are dealt to
    the ranks, each to the one that has the least so far. A rank copies its own to the CPU and
    forgets the others, so that nobody holds a whole model. Rank 0 also writes what makes
    `folder`/policy and /critic ordinary Hugging Face folders."""
    mine = defaultdict(dict)
    for name, each in trained.items():
        load = [0] * ranks.world  # numbers of each rank
        weight_map = {}
        for key, tensor, stem in whole_tensors(name, each):
            owner = load.index(min(load))
            load[owner] += tensor.numel()
            file = f"{stem}.safetensors"
            if ranks.world > 1:
                file = f"{stem}-{owner + 1:05d}-of-{ranks.world:05d}.safetensors"
            if owner == ranks.rank:
                mine[file][key] = tensor.detach().to("cpu", copy=True).contiguous()
            if stem == f"{name}/model":
                weight_map[key] = Path(file).name
        if ranks.rank == 0:
            describe(each.model, tokenizer, folder / name)
            if ranks.world > 1:
                index = folder / name / "model.safetensors.index.json"
                index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return mine


def whole_tensors(name: str, trained: Trained) -> Iterator:
    """(key, tensor, stem of its file) of the weights in fp32 and, as PARAMETER.MOMENT, of AdamW's
    state; collective. There is no state before the first step: of the policy, while the critic is
    warmed up."""
    for key, tensor in full_weights(trained.model, torch.float32):
        yield key, tensor, f"{name}/model"
        del tensor  # or the last one, the head, would stay on the card beside the moments
    for key, p in trained.model.named_parameters():
        for moment, x in trained.optimizer.state.get(p, {}).items():
            yield f"{key}.{moment}", gathered(x), f"{name}.optimizer"


def describe(model, tokenizer, folder: Path):
    """config.json and, where there are a tokenizer and a generation_config.json, their files."""
    for part in (model.config, tokenizer, getattr(model, "generation_config", None)):
        if part:
            part.save_pretrained(folder)


def load_moments(folder: Path | None, trained: dict):
    """AdamW's moments from `checkpoint_parts`, whoever wrote them, sharded as models are now."""
    if folder is None:
        return
    for name, each in trained.items():
        for file in sorted(folder.glob(f"{name}.optimizer*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():
                    owner, moment = key.rsplit(".", 1)
                    p = each.model.get_parameter(owner)
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
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
        state = json.loads((folder / "state.json").read_text())
        if state.pop("seal") == seal_of(state):
            return state
    return {}


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
        parts = gather(damage(path, watchdog.RANK, watchdog.WORLD))
        bad = [text for texts in parts for text in texts]
        if bad:
            damaged.append(path)
            if watchdog.RANK == 0:
                say(f"warning: {path} is damaged: {'; '.join(bad[:5])}")
            continue
        state = read_state(path)
        refuse_other_flags(path, state["config"], hidden(config), may_change)
        if watchdog.RANK == 0:
            for other in damaged:  # not before there is a whole one: the next start is told, too
                shutil.rmtree(f"{other}.damaged", ignore_errors=True)
                other.rename(f"{other}.damaged")
            # the end may have come between a checkpoint's last name and this
            tidy(path.parent, config["keep_last"], config["keep_best"])
        return path, state
    if found:
        raise ValueError(
            f"resume: none of {len(found)} checkpoints beside {found[0]} is whole: "
            "the warnings say why"
        )
    return None, {}


def refuse_other_flags(path: Path, old: dict, new: dict, may_change: set[str]):
    changed = [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted((old | new).keys() - may_change)
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise ValueError(
            f"resume: {path} is of a run with other flags: {'; '.join(changed)}: "
            f"give the old values, or start a new run from {path}/policy and {path}/critic"
        )


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
        self.pending = None  # a Future

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

    def save(self, final: Path, parts: Files, state: dict):
        """`parts`: what this rank writes; `state`: what goes into state.json."""
        self.saved = time.monotonic()
        state = json.loads(json.dumps(state))  # as it is now
        self.pending = self.pool.submit(self._write, final, parts, state)

    def wait(self):
        if self.pending:
            self.pending.result()

    def due(self, minutes: float) -> bool:
        """Is it time, by the clock? Raises what went wrong with the last one."""
        if self.pending and self.pending.done():
            self.wait()
        return minutes > 0 and time.monotonic() - self.saved > 60 * minutes

    def _write(self, final: Path, parts: Files, state: dict):
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
            last = next(iter(checkpoints(self.out)), "none")
            raise OSError(
                f"{final} could not be written ({free:.1f} GB free there): {error}. "
                f"Nothing else was touched; the newest complete checkpoint: {last}. "
                "Make room, then --resume auto"
            ) from error

    def _finish(self, final: Path, aside: Path, state: dict):
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
        for path in aside.rglob("*"):
            name = str(path.relative_to(aside))
            if path.is_file() and name not in digests:  # configurations and tokenizers
                to_disk(path)
                digests[name] = digest(path)
        state = hidden(state | {"files": digests})
        write(aside / "state.json", json.dumps(state | {"seal": seal_of(state)}, indent=1))
        for folder, _, _ in os.walk(aside):
            to_disk(folder)
        if not final.name.startswith("step_"):  # bad_step_N, for the second time
            shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        to_disk(final.parent)
        if final.name.startswith("step_"):
            tidy(final.parent, self.keep_last, self.keep_best)


def tidy(folder: Path, keep_last: int, keep_best: str):
    """Moves the links, then deletes what is neither among the last nor the best, and what an end
    left half done."""
    found = checkpoints(folder.parent)
    point(folder / "latest", found[0].name)
    best = best_of(found, keep_best)
    if best:
        point(folder / "best", best.name)
    last = found[: keep_last or None]  # 0: all
    for path in found:
        if path not in (*last, best):
            path.rename(f"{path}.old")
    for path in (*folder.glob("step_*.old"), *folder.glob("step_*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def best_of(found: list[Path], metric: str) -> Path | None:
    """The checkpoint with the highest value, the first of equals; None, if none has the metric."""
    values = {path: read_state(path).get("metrics", {}).get(metric) for path in found}
    judged = [path for path in found if values[path] is not None]
    return max(judged, key=values.get, default=None)


def point(link: Path, target: str):
    aside = link.with_name(link.name + ".new")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)
