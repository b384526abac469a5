"""The update that ended a run with a number that is not finite, once more.

    python tools/replay.py runs/NAME/bad_step_N/batch.pt
    torchrun --nproc_per_node 4 tools/replay.py runs/NAME/bad_step_N/batch.pt   # sharded, as the run

The weights and moments beside the file are those that the failed update began with. So one update
is all there is to do, without an engine, on one process, under a debugger say. Nothing is written.
Exit code: 1 when a number is not finite this time, too; 0 when all are.

Owns: reading batch.pt, and saying what in it, or in the update, is not finite.
Refuses to know: how the batch came to be: its rewards, values and advantages are as recorded.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo  # first: the guard for the name `kernels`

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

import kernels
import rollout
from infra import checkpoint, dist
from infra.models import Trained
from infra.guards import not_finite

ALONE = {"sp": 1, "tp": 1, "replicas": 1, "offload": ()}  # flags of one process


class Replay:
    """What the updates of ppo.py ask of a run. Faults are collected and end nothing."""

    def __init__(self, ranks: dist.Ranks):
        self.ranks = ranks
        self.meter = dist.Meter()
        self.faults = []

    def progress(self, items):
        return items

    def check_finite(self, batch, update: dict | None = None, **tensors):
        for texts in dist.everywhere(not_finite(**tensors), self.ranks):
            self.faults += texts

    def say(self, text: str):
        if self.ranks.rank == 0:
            print(text, flush=True)


def main(file: Path) -> int:
    record = torch.load(file, map_location="cpu", weights_only=True)  # runs no code
    flags = record["args"]
    if "RANK" not in os.environ:
        flags |= ALONE
    args = ppo.Args(**flags)
    accelerator, ranks = dist.start_ranks(args.bf16, args.sp, args.replicas)
    run = Replay(ranks)
    run.say(f"it had ended with: {record['error']}")

    batch = record["batch"]
    tensors = {name: x.to(accelerator.device) for name, x in batch.items() if torch.is_tensor(x)}
    run.check_finite(batch, **tensors)
    if record["update"]:
        samples = [rollout.Sample(*sample) for sample in batch["samples"]]
        batch = ppo.Batch(**batch | tensors | {"samples": samples})
        do_update(record["update"], batch, args, accelerator, file.parent, run)

    for fault in run.faults or ["every number is finite"]:
        run.say(f"once more: {fault}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return int(bool(run.faults))


def do_update(
    update: dict, batch: ppo.Batch, args: ppo.Args, accelerator, folder: Path, run: Replay
):
    """`update` as ppo.take_step recorded it; `folder` has the weights and moments."""
    name, lr, chosen = update["model"], update["lr"], update["chosen"]
    model_type = AutoConfig.from_pretrained(folder / "policy").model_type
    kernels.setup(model_type, False, args.bf16, args.attention)
    trained = load(name, folder, args, accelerator)
    if name == "policy":
        ppo.update_policy(trained, lr, batch, chosen, args, run)
    else:
        ppo.update_critic(trained, lr, batch, chosen, args, run)
    norm, _ = run.meter.pairs[f"{name}/grad_norm"].tolist()
    run.say(f"update of the {name} with {len(chosen)} responses, lr {lr}: gradient norm {norm!r}")
    weights = {}
    for key, p in trained.model.named_parameters():
        weights[f"{name}'s {key}"] = p.to_local() if isinstance(p, DTensor) else p
    run.check_finite(batch, **weights)


def load(name: str, folder: Path, args: ppo.Args, accelerator) -> Trained:
    """The model and its optimizer, with its moments."""
    model = ppo.load_model(name, folder / name, args, accelerator)
    trained = Trained(model, ppo.make_optimizer(model))
    checkpoint.load_moments(folder, {name: trained})
    return trained


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
