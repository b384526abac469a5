"""Checkpoints: whole or absent, checked before they are read, for any number of ranks.

step_N/{policy,critic}: Hugging Face folders, fp32; step_N/*.optimizer*: AdamW's moments, whole, for any ranks;
state.json: what else a run is, and the SHA-256 of every file. A folder that has such a name is whole.

Owns: the files, their order on the disk, which of them stay.
Refuses to know: what a step does.
Left out on purpose: pickles. A checkpoint is safetensors and JSON, so that loading one runs nobody's code.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from infra.dist import Ranks
from infra.log import hidden, say, sync, write
from infra.models import full_weights, gathered
from infra.watch import RANK, WORLD


def checkpoint_parts(
    trained: dict, ranks: Ranks, tokenizer, folder: Path
) -> dict[str, dict[str, Tensor]]:
    """What this rank writes of a checkpoint: file name -> whole tensors on the CPU, of weights in fp32 and of AdamW's
    moments. Tensors go round the ranks by size, so that nobody holds a whole model. Collective. Rank 0 also writes what
    makes `folder`/policy and /critic ordinary Hugging Face folders."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, each in trained.items():
        model, optimizer = each.model, each.optimizer
        # no moments before the first step: of the policy, while the critic is warmed up
        states = {
            f"{n}.{k}": x
            for n, p in model.named_parameters()
            for k, x in optimizer.state.get(p, {}).items()
        }
        moments = ((key, gathered(x)) for key, x in states.items())
        load, index = [0] * ranks.world, {}
        for prefix, tensors in (
            (f"{name}/model", full_weights(model, torch.float32)),
            (f"{name}.optimizer", moments),
        ):
            for key, tensor in tensors:
                owner = load.index(min(load))
                load[owner] += tensor.numel()
                file = (
                    prefix
                    + (f"-{owner + 1:05d}-of-{ranks.world:05d}" if ranks.world > 1 else "")
                    + ".safetensors"
                )
                if prefix.endswith("/model"):
                    index[key] = Path(file).name
                if owner == ranks.rank:
                    parts.setdefault(file, {})[key] = (
                        tensor.detach().to("cpu", copy=True).contiguous()
                    )
        if ranks.rank == 0:
            for description in filter(
                None, (model.config, tokenizer, getattr(model, "generation_config", None))
            ):
                description.save_pretrained(folder / name)
            if ranks.world > 1:
                text = json.dumps({"metadata": {}, "weight_map": index})
                (folder / name / "model.safetensors.index.json").write_text(text)
    return parts


def load_moments(folder: Path | None, trained: dict) -> None:
    """AdamW's moments from `checkpoint_parts`, sharded as the models now are, whoever wrote them."""
    if folder is None:
        return
    for name, each in trained.items():
        model, optimizer = each.model, each.optimizer
        parameters = dict(model.named_parameters())
        for file in sorted(folder.glob(f"{name}.optimizer*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():
                    (owner, moment), x = key.rsplit(".", 1), tensors.get_tensor(key)
                    p = parameters[owner]
                    if isinstance(p, DTensor) and x.dim():  # AdamW's step is a plain number
                        mesh = p.device_mesh
                        x = distribute_tensor(
                            x.to(mesh.device_type), mesh, p.placements, src_data_rank=None
                        )
                    optimizer.state[p][moment] = x.to(p.device, copy=True)


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
            bad += (
                [] if digest(folder / name) == files[name] else [f"{name} is not what was written"]
            )
        except OSError as error:
            bad.append(f"{name}: {error.strerror}")
    return bad


def find_checkpoint(
    found: list[Path], config: dict, free: set[str], gather: Callable
) -> tuple[Path | None, dict]:
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
                fix = (
                    f"give the old values, or start a new run from {path}/policy and {path}/critic"
                )
                raise ValueError(f"resume: {path} is of a run with other flags: {changed}: {fix}")
            for other in (
                damaged if RANK == 0 else ()
            ):  # not before there is a whole one: the next start is told, too
                shutil.rmtree(f"{other}.damaged", ignore_errors=True)
                other.rename(f"{other}.damaged")
            if RANK == 0 and path.name.startswith(
                "step_"
            ):  # the end may have come between a rename and this
                tidy(path.parent, config["keep_last"], config["keep_best"])
            return path, state
    if found:
        raise ValueError(
            f"resume: none of {len(found)} checkpoints beside {found[0]} is whole: the warnings say why"
        )
    return None, {"step": 0, "streaks": {}, "best": float("-inf"), "kl_coef": None}


class Saver:
    """Writes checkpoints behind the run's back: tensors are on the CPU already, so the next step may change the models.
    One at a time; what went wrong is raised by `wait` and the next `save`."""

    def __init__(self, out: str | Path, keep_last: int, keep_best: str):
        self.out, self.keep_last, self.keep_best, self.saved = (
            Path(out),
            keep_last,
            keep_best,
            time.monotonic(),
        )
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
            raise OSError(
                f"rank {RANK} does not see {aside}: --out must be a folder that all machines share"
            )
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
            raise OSError(
                text + f"newest complete checkpoint: {last}. Make room, then --resume auto"
            ) from error

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
    best = max(
        (path for path in found if values[path] is not None),
        key=lambda path: values[path],
        default=None,
    )
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
