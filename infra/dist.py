"""Ranks, and numbers that all of them have.

Owns: starting the processes of a run, the mesh of ranks, lists and means over all of them.
Refuses to know: models, and what the numbers are for.
Left out on purpose: what ranks of one packed row exchange (Ulysses: `all_to_all` in
kernels.py), and reductions of advantages and losses. Every rank has the numbers of a whole step.
"""

import os
from datetime import timedelta
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy


class Ranks(NamedTuple):
    """Ranks 0..sp-1 share packed row 0, the next sp ranks row 1, and so on."""

    rank: int = 0
    world: int = 1
    row: int = 0  # rank // sp
    rows: int = 1  # world // sp
    sp_rank: int = 0
    sp: int = 1
    sp_group: dist.ProcessGroup | None = None


def start_ranks(bf16: bool, sp: int, replicas: int = 1, patience: float = 120):
    """(Accelerator, Ranks). Under torchrun, whatever the number of processes, models are sharded by
    FSDP2: over nccl on GPUs, over gloo on CPU; with `replicas` (HSDP) over world / replicas
    neighbours only: let these be a node, and only gradients cross the network. Without torchrun
    this is one plain process. Ranks wait for each other, for the longest answer or a disk, for
    `patience` minutes and ten more: the watch shall speak before a collective gives up."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    precision = "bf16" if bf16 else "no"
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return Accelerator(cpu=not cuda, mixed_precision=precision), Ranks()
    world = int(os.environ["WORLD_SIZE"])
    timeout = timedelta(minutes=patience + 10)
    handlers = []
    if cuda:
        handlers = [InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo", timeout=timeout)]
    else:
        # Accelerate ignores an FSDP plugin on CPU, silently. Under this label it takes the same
        # path as on GPUs.
        PartialState(cpu=True, timeout=timeout)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    policy = None
    if bf16:
        # Accelerate's own policy for bf16 would round outputs (log-probs, that is) and gradient
        # sums to bf16 as well
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = None
    if replicas > 1:
        mesh = ParallelismConfig(replicas, world // replicas)
    accelerator = Accelerator(
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            mixed_precision_policy=policy,
        ),
        mixed_precision=precision,
        kwargs_handlers=handlers,
        parallelism_config=mesh,
    )
    rank = accelerator.process_index
    group = None
    if sp > 1:
        group, _ = dist.new_subgroups(sp, timeout=timeout)  # the one of this rank
    return accelerator, Ranks(rank, world, rank // sp, world // sp, rank % sp, sp, group)


def share(items: list, ranks: Ranks) -> list:
    """This rank's consecutive share of a list that all ranks have."""
    first = ranks.rank * len(items) // ranks.world
    end = (ranks.rank + 1) * len(items) // ranks.world
    return items[first:end]


def gather(items: list, ranks: Ranks) -> list:
    """The way back: the lists of all ranks, joined in rank order, on every rank."""
    if ranks.world == 1:
        return list(items)
    parts = [None] * ranks.world
    dist.all_gather_object(parts, items)
    return list(chain.from_iterable(parts))


def everywhere(x, ranks: Ranks) -> list:
    """x of every rank, on every rank."""
    return gather([x], ranks)


class Meter:
    """Means over the tokens of all ranks: sums and counts, one reduction a step."""

    def __init__(self):
        self.pairs = {}  # name -> (2,) sum and count

    def add(self, prefix: str, **values: Tensor):
        """Of any shape, masked entries left out by the caller. Does not wait for the device."""
        for name, x in values.items():
            total = x.detach().double().sum()
            pair = torch.stack([total, torch.full_like(total, x.numel())])
            self.pairs[prefix + name] = self.pairs.get(prefix + name, 0.0) + pair

    def means(self, ranks: Ranks) -> dict:
        """name -> mean over all ranks, 0 of what has no entries; collective."""
        # every rank has added the same names in the same order; norms of offloaded gradients are on
        # the CPU
        table = torch.stack([pair.cpu() for pair in self.pairs.values()])
        if ranks.world > 1:
            dist.all_reduce(table)
        rows = zip(self.pairs, table.tolist())
        return {name: total / max(count, 1.0) for name, (total, count) in rows}
