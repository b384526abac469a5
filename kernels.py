"""The same numbers with less time and memory.

Owns: ranks, sharded models (FSDP2) and meters across ranks, packed rows and attention on them, sequence parallelism
(Ulysses), log-probs and entropy without logits, Liger's patches, each with a plain specification for the tests.
Refuses to know: what the numbers are for (advantages, losses, rewards).
Left out on purpose: custom Triton (torch's varlen attention and Liger are kept by people who do nothing else), and
optimizers with 8-bit states (4 GB a card in the reference run, for one more package).

This file shares its name with Hugging Face's `kernels` package: see the guard at the top of ppo.py. Keep it importable
without side effects, and never define __version__ here.
"""
# T tokens of a packed row   K response tokens among them   H heads   D head size or hidden size   V vocabulary
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from shutil import which
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.nn.functional import all_to_all_single
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import scaled_dot_product_attention

# ------------------------------------------------------------------------------- ranks, sharded models, meters, MFU


@dataclass
class Model:
    """models, precision, sharding"""
    model: str = ""  # policy: Hugging Face folder or hub id
    critic_model: str | None = None  # start of the critic, may be smaller; default: the policy's
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of compute (weights: fp32). auto: bf16 on CUDA, else fp32
    gradient_checkpointing: bool = True  # recompute activations of policy and critic: more time, far less memory
    attention: Literal["varlen", "sdpa", "flash_attention_2", "flex_attention"] = "varlen"  # others: transformers' own
    offload: tuple[Literal["policy", "critic", "reference"], ...] = ()  # live in the machine's memory, step on its CPU
    replicas: int = 1  # copies of the sharded models (HSDP): one a node, say; 1: every rank holds another shard
    sp: int = 1  # ranks that share one packed row (Ulysses); must divide the attention heads and the world


def conditions(flags: Model, world: int, heads: int, alone: bool) -> list[tuple[bool, str]]:
    """(does it hold, what to say when not) on `world` ranks, for models that all have `heads` attention heads or a
    multiple; `alone`: not under torchrun."""
    f, split = flags, flags.replicas == 1 or (world % max(1, flags.replicas) == 0 and world > flags.replicas)
    return [
        (f.sp > 0 and f.replicas > 0, f"sp={f.sp}, replicas={f.replicas}: must be above 0"),
        (world % max(1, f.sp) == 0, f"sp={f.sp} does not divide the {world} ranks: launch a multiple of {f.sp}"),
        (heads % max(1, f.sp) == 0, f"sp={f.sp} does not divide the {heads} attention heads: use a divisor of {heads}"),
        (split, f"replicas={f.replicas} does not split {world} ranks into copies of 2 or more: use a divisor"),
        (f.sp == 1 or f.attention == "varlen", f"sp={f.sp} needs --attention varlen, not {f.attention}"),
        (not (f.offload and alone), f"offload={f.offload} needs torchrun"),
    ]


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
    """(Accelerator, Ranks). Under torchrun, whatever the number of processes, models are sharded by FSDP2: over nccl on
    GPUs, over gloo on CPU; with `replicas` (HSDP) over world / replicas neighbours only: let these be a node, and only
    gradients cross the network. Without torchrun this is one plain process. Ranks wait for each other, for the longest
    answer or a disk, for `patience` minutes and ten more: the watch shall speak before a collective gives up."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, ParallelismConfig
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    precision, cuda = "bf16" if bf16 else "no", torch.cuda.is_available()
    if "RANK" not in os.environ:
        return Accelerator(cpu=not cuda, mixed_precision=precision), Ranks()
    if not cuda:
        # Accelerate ignores an FSDP plugin on CPU, silently. Under this label it takes the same path as on GPUs.
        PartialState(cpu=True, timeout=timedelta(minutes=patience + 10))
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        # Accelerate's own policy for bf16 would round outputs (log-probs, that is) and gradient sums to bf16 as well
        mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else None,
    )
    world, timeout = int(os.environ["WORLD_SIZE"]), {"timeout": timedelta(minutes=patience + 10)}
    accelerator = Accelerator(
        fsdp_plugin=plugin,
        mixed_precision=precision,
        kwargs_handlers=[InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo", **timeout)] if cuda else [],
        parallelism_config=ParallelismConfig(replicas, world // replicas) if replicas > 1 else None,
    )
    rank, rows = accelerator.process_index, range(0, world, sp)
    # new_group is collective: every rank makes every group
    groups = [dist.new_group([*range(i, i + sp)], **timeout) if sp > 1 else None for i in rows]
    return accelerator, Ranks(rank, world, rank // sp, len(rows), rank % sp, sp, groups[rank // sp])


SAFE = {"use_safetensors": True, "trust_remote_code": False}  # a model folder runs no code: no pickles, no Python files


def load_policy(path: str, accelerator, checkpointing, trained=True, attention="varlen", offload=False) -> nn.Module:
    """A causal language model in fp32 for packed rows, with a LogprobHead; sharded. trained=False: a reference."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention, **SAFE)
    model.lm_head.__class__ = LogprobHead  # same parameter, same tie to the embedding
    return shard(model.requires_grad_(trained), accelerator, checkpointing and trained, offload)


def load_critic(path: str, accelerator, checkpointing, attention="varlen", offload=False) -> nn.Module:
    """A transformer with one number per token. A new value head starts at zero: first values are 0, not noise."""
    from transformers import AutoConfig, AutoModelForTokenClassification

    config = AutoConfig.from_pretrained(path, num_labels=1, trust_remote_code=False)
    config.classifier_dropout = 0.0
    model, info = AutoModelForTokenClassification.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation=attention, output_loading_info=True, **SAFE
    )
    if "score.weight" in info["missing_keys"]:
        nn.init.zeros_(model.score.weight)
        nn.init.zeros_(model.score.bias)
    return shard(model, accelerator, checkpointing, offload)


def shard(model: nn.Module, accelerator, checkpointing: bool, offload: bool) -> nn.Module:
    """offload: this model's shards, gradients and optimizer live in the machine's memory. Each layer comes to the card
    when it is gathered, and AdamW runs on the CPU: 16 bytes a parameter less, for seconds a step at 1.5B."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # prepare() takes no frozen model, this takes any

    model.config.architectures = [type(model).__name__]  # FSDP is about to change the name
    model.train()  # no dropout anywhere; checkpointing acts in this mode only
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not accelerator.is_fsdp2:
        for p in model.parameters():  # off the mapped file: in its odd places sums are rounded in another order
            p.data = p.data.clone()
        return accelerator.prepare_model(model)
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = None  # else those of the first model, for every model
    plugin.cpu_offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    return fsdp2_prepare_model(accelerator, model)


def reshard(model: nn.Module) -> None:
    """After a forward without backward FSDP2 keeps the head gathered (0.5 GB at 1.5B), rounded to the compute dtype.
    Gives it back."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor on the device); collective. A tensor is good until the next one is asked for:
    one layer is alive at a time. A tied head comes once, as the embedding. The dtype that the model computes in is
    gathered a layer in one call, cast before it is sent; another (fp32 of a bf16 run, to be saved) tensor by tensor."""
    sent: set[str] = set()
    reshard(model)
    for prefix, unit in [(prefix, m) for prefix, m in model.named_modules() if isinstance(m, FSDPModule)]:
        if all(name in sent for name, _ in model.named_parameters() if name.startswith(prefix)):
            continue  # norm, embedding and head come together, by the name of any of them
        unit.unshard()
        whole = {name: p for name, p in model.named_parameters() if not isinstance(p, DTensor) and name not in sent}
        if same := all(p.dtype == dtype for p in whole.values()):
            yield from ((name, p.detach()) for name, p in whole.items())
            sent |= whole.keys()
        unit.reshard()
        if not same:
            break
    yield from ((name, gathered(p.detach().to(dtype))) for name, p in model.named_parameters() if name not in sent)


def gathered(x: Tensor) -> Tensor:
    """The whole of a sharded tensor, on the device (offloaded ones go there first); collective."""
    return x.to(x.device_mesh.device_type).full_tensor() if isinstance(x, DTensor) else x


def optimizer_step(model: nn.Module, optimizer, lr: float, max_norm: float) -> Tensor:
    """Clips the gradient over all ranks and steps; returns its norm before clipping, (). When that is not finite, which
    all ranks see alike, nothing is changed. (Accelerate's clip_grad_norm_ breaks for a second model.)"""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if torch.isfinite(whole):
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return whole


def suspects(model: nn.Module, norm: Tensor, meter: "Meter") -> dict[str, Tensor]:
    """When the norm, equal on all ranks, is not finite: this rank's sums of losses, shards of gradients, the norm."""
    if torch.isfinite(norm):
        return {}
    grads = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    local = {name: g.to_local() if isinstance(g, DTensor) else g for name, g in grads.items()}
    return {name: pair[0] for name, pair in meter.pairs.items()} | local | {"gradient norm": norm}


def checkpoint_parts(trained: dict, ranks: Ranks, tokenizer, folder: Path) -> dict[str, dict[str, Tensor]]:
    """What this rank writes of a checkpoint: file name -> whole tensors on the CPU, of weights in fp32 and of AdamW's
    moments. Tensors go round the ranks by size, so that nobody holds a whole model. Collective. Rank 0 also writes what
    makes `folder`/policy and /critic ordinary Hugging Face folders."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, (model, optimizer) in trained.items():
        # no moments before the first step: of the policy, while the critic is warmed up
        states = {f"{n}.{k}": x for n, p in model.named_parameters() for k, x in optimizer.state.get(p, {}).items()}
        moments = ((key, gathered(x)) for key, x in states.items())
        load, index = [0] * ranks.world, {}
        for prefix, tensors in ((f"{name}/model", full_weights(model, torch.float32)), (f"{name}.optimizer", moments)):
            for key, tensor in tensors:
                owner = load.index(min(load))
                load[owner] += tensor.numel()
                file = prefix + (f"-{owner + 1:05d}-of-{ranks.world:05d}" if ranks.world > 1 else "") + ".safetensors"
                if prefix.endswith("/model"):
                    index[key] = Path(file).name
                if owner == ranks.rank:
                    parts.setdefault(file, {})[key] = tensor.detach().to("cpu", copy=True).contiguous()
        if ranks.rank == 0:
            for description in filter(None, (model.config, tokenizer, getattr(model, "generation_config", None))):
                description.save_pretrained(folder / name)
            if ranks.world > 1:
                text = json.dumps({"metadata": {}, "weight_map": index})
                (folder / name / "model.safetensors.index.json").write_text(text)
    return parts


def load_moments(folder: Path | None, trained: dict) -> None:
    """AdamW's moments from `checkpoint_parts`, sharded as the models now are, whoever wrote them."""
    for name, (model, optimizer) in trained.items() if folder else ():
        parameters = dict(model.named_parameters())
        for file in sorted(folder.glob(f"{name}.optimizer*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():
                    (owner, moment), x = key.rsplit(".", 1), tensors.get_tensor(key)
                    p = parameters[owner]
                    if isinstance(p, DTensor) and x.dim():  # AdamW's step is a plain number
                        mesh = p.device_mesh
                        x = distribute_tensor(x.to(mesh.device_type), mesh, p.placements, src_data_rank=None)
                    optimizer.state[p][moment] = x.to(p.device, copy=True)


def share(items: list, ranks: Ranks) -> list:
    """This rank's consecutive share of a list that all ranks have."""
    return items[ranks.rank * len(items) // ranks.world : (ranks.rank + 1) * len(items) // ranks.world]


def gather(items: list, ranks: Ranks) -> list:
    """The way back: the lists of all ranks, joined in rank order, on every rank."""
    parts: list = [None] * ranks.world if ranks.world > 1 else [items]
    if ranks.world > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def everywhere(x, ranks: Ranks) -> list:
    """x of every rank, on every rank."""
    return gather([x], ranks)


class Meter:
    """Means over the tokens of all ranks: sums and counts, one reduction a step."""

    def __init__(self):
        self.pairs: dict[str, Tensor] = {}  # name -> (2,) sum and count

    def add(self, prefix: str, **values: Tensor) -> None:
        """Of any shape, masked entries left out by the caller. Does not wait for the device."""
        for name, x in values.items():
            x = x.detach().double()
            pair = torch.stack([x.sum(), torch.full_like(x.sum(), x.numel())])
            self.pairs[prefix + name] = self.pairs.get(prefix + name, 0.0) + pair

    def means(self, ranks: Ranks) -> dict[str, float]:
        # every rank has added the same names in the same order; norms of offloaded gradients are on the CPU
        table = torch.stack([pair.cpu() for pair in self.pairs.values()])
        if ranks.world > 1:
            dist.all_reduce(table)
        return {name: total / max(count, 1.0) for name, (total, count) in zip(self.pairs, table.tolist())}


# ------------------------------------------------------------------------------------------------------- packed rows


class Packed(NamedTuple):
    """One micro-batch: sequences end to end in a single row, without padding between them."""

    ids: Tensor  # (1, T) long, this rank's slice of the row when sequence-parallel
    position_ids: Tensor  # (1, T) long, restarting at 0 with every sequence
    keep: Tensor  # (K,) slots of this slice whose next token is a response token
    targets: Tensor  # (K,) long, those next tokens
    index: Tensor  # (K,) where they stand in a flattened (B, T_max) tensor
    cu_seqlens: Tensor  # (N + 1,) int32, sequence boundaries in the whole row
    max_seqlen: int


def pack(ids: Tensor, mask: Tensor, lengths: list[int], rows: list[int], sp_rank: int = 0, sp: int = 1) -> Packed:
    """Packs sequences `rows` of ids (B, T_max), each `lengths[b]` tokens long. This is the one place where outputs
    are shifted: the slot that reads token t - 1 predicts token t, so a sequence's last token is never fed, and
    whatever a model returns for `keep` belongs at `index`, which is about token t. An empty `rows` gives a row
    that keeps nothing: ranks without work still have to join FSDP's collectives."""
    device, width = ids.device, ids.shape[1]
    fed = [lengths[b] - 1 for b in rows]
    parts = [ids[b, :n] for b, n in zip(rows, fed)]
    places = [torch.arange(b * width + 1, b * width + n + 1, device=device) for b, n in zip(rows, fed)]
    spare = -sum(fed) % sp if rows else sp  # slots without a target that make T a multiple of sp
    if spare:
        parts.append(torch.zeros(spare, dtype=torch.long, device=device))
        places.append(torch.full((spare,), -1, device=device))
        fed = fed + [spare]
    row, place = torch.cat(parts), torch.cat(places)
    position = torch.cat([torch.arange(n, device=device) for n in fed])
    share = slice(sp_rank * len(row) // sp, (sp_rank + 1) * len(row) // sp)
    row, place, position = row[share], place[share], position[share]
    keep = ((place >= 0) & mask.flatten()[place.clamp(min=0)]).nonzero()[:, 0]
    index = place[keep]
    bounds = torch.tensor([0] + fed, device=device).cumsum(0).int()
    return Packed(row[None], position[None], keep, ids.flatten()[index], index, bounds, max(fed))


def unpack(parts: list[tuple[Tensor, Tensor]], like: Tensor, ranks: Ranks) -> Tensor:
    """The way back: (index, value) parts of packed rows, of all ranks -> fp32 tensor shaped as `like` (B, T_max), equal
    on every rank, 0 where nobody has a value."""
    full = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    for index, value in parts:
        full.view(-1)[index] = value.detach()
    if ranks.world > 1:
        dist.all_reduce(full)
    return full


def packed_forward(model: nn.Module, p: Packed, sp_group: dist.ProcessGroup | None, **options) -> Tensor:
    """What the model's head says of one packed row, (slots, ...). No cache and no attention mask: with either,
    transformers lets packed sequences see each other under every attention function but ours."""
    where = {"cu_seqlens": p.cu_seqlens, "max_seqlen": p.max_seqlen, "sp_group": sp_group}
    if model.config._attn_implementation.startswith("flash"):  # its names for the same; else it counts for every layer
        where |= {f"cu_seq_lens_{x}": p.cu_seqlens for x in "qk"} | {f"max_length_{x}": p.max_seqlen for x in "qk"}
    return model(input_ids=p.ids, position_ids=p.position_ids, use_cache=False, **where, **options).logits[0].float()


def policy_forward(policy: nn.Module, p: Packed, temperature: float, sp_group=None) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy at every response token of a packed row, both (K,). The policy's head is a LogprobHead."""
    policy.lm_head.targets, policy.lm_head.temperature = p.targets, temperature
    return packed_forward(policy, p, sp_group, logits_to_keep=p.keep).unbind(-1)


def critic_forward(critic: nn.Module, p: Packed, sp_group=None) -> Tensor:
    """Values at every response token of a packed row, (K,)."""
    return packed_forward(critic, p, sp_group)[p.keep, 0]


# ------------------------------------------------------------------------------------------- attention on packed rows

HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """Causal attention inside each sequence of a packed row; q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq, D).
    No (T, T) mask exists anywhere, so memory is linear in T and sequences cannot see each other."""
    if not q.is_cuda:
        return _varlen_cpu(q, k, v, cu_seqlens.tolist(), scale)
    q, k = (x.to(v.dtype) for x in (q, k))  # under autocast RoPE leaves them in fp32
    where = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    if HAS_FLASH_ATTN:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *where, softmax_scale=scale, causal=True)
    from torch.nn.attention.varlen import varlen_attn

    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # torch 2.11 has no enable_gqa
    return varlen_attn(q, k, v, *where, scale=scale, window_size=(-1, 0))


def _varlen_cpu(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], scale: float) -> Tensor:
    lengths = [b - a for a, b in pairwise(bounds)]
    parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)))  # (1, heads, tokens, D)
    # (split, not slices: the gradient of a slice is as long as the row)
    attended = [scaled_dot_product_attention(*x, is_causal=True, scale=scale, enable_gqa=True) for x in parts]
    return torch.cat(attended, dim=2)[0].transpose(0, 1)


def all_to_all(x: Tensor, group, a: int, b: int) -> Tensor:
    """Swaps a split of dimension `a` over the group for a split of dimension `b`; its gradient goes the way back."""
    slabs = torch.stack(x.chunk(dist.get_world_size(group), a)).contiguous()  # one for each peer
    return torch.cat(all_to_all_single(torch.empty_like(slabs), slabs, group=group).unbind(0), b)


def packed_attention(module, query, key, value, attention_mask, scaling, cu_seqlens, max_seqlen, sp_group=None, **_):
    """transformers' attention interface; query (1, H, T, D). With a group of n ranks, Ulysses (arXiv:2309.14509): each
    rank holds T/n tokens of all heads outside attention, and all tokens of H/n heads inside it."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if sp_group is None:
        return varlen_attention(q, k, v, cu_seqlens, max_seqlen, scaling)[None], None
    n = dist.get_world_size(sp_group)
    if k.shape[1] % n:  # fewer kv heads than ranks: repeat them, each rank then holds a copy of the one it needs
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    q, k, v = (all_to_all(x, sp_group, 1, 0) for x in (q, k, v))
    out = varlen_attention(q, k, v, cu_seqlens, max_seqlen, scaling)
    return all_to_all(out, sp_group, 0, 1)[None], None


def setup(model_type: str, progress: bool, bf16: bool, attention: str = "varlen", liger: bool = True) -> dict[str, str]:
    """Before any model is made: attn_implementation="varlen" becomes known to transformers (which then builds no mask),
    Liger patches its layers, and no report comes on the value head being new. Returns what will be used for what."""
    from transformers import AttentionInterface
    from transformers.utils import logging

    cuda = torch.cuda.is_available()
    if cuda and not bf16:
        raise ValueError("dtype=fp32 is for CPU: the packed attention kernels of CUDA take bf16 only, use --dtype bf16")
    logging.set_verbosity_error()
    (logging.enable_progress_bar if progress else logging.disable_progress_bar)()
    AttentionInterface.register("varlen", packed_attention)
    if attention == "flash_attention_2" and not HAS_FLASH_ATTN:
        raise ValueError("attention=flash_attention_2 needs the package flash-attn: install it or use varlen")
    inside = "per-sequence sdpa" if not cuda else "flash-attn varlen" if HAS_FLASH_ATTN else "torch varlen"
    return {
        "attention": inside if attention == "varlen" else f"{attention} of transformers",
        "log-probs": find_liger_logprobs() if liger else "chunked",
        "Liger": apply_liger(model_type) if liger else "off",
        "compute": f"{'bfloat16' if bf16 else 'float32'} on {'cuda' if cuda else 'cpu'}",
        "sharding": f"FSDP2 over {os.environ['WORLD_SIZE']} ranks" if "RANK" in os.environ else "none (one process)",
    }


# ---------------------------------------------------------------------------- log-prob and entropy without the logits


def token_logprobs_ref(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The specification. hidden (K, D), weight (V, D), targets (K,) -> log-prob and entropy in nats, both (K,) fp32."""
    logp = torch.log_softmax((hidden @ weight.T).float() / temperature, dim=-1)  # (K, V): the memory we do not want
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


class _ChunkedLogprob(torch.autograd.Function):
    """The same with at most `size` logits in a piece: some rows forward; backward, where they are computed again, some
    columns, each of which is the whole story of its row of weight's gradient (pieces of rows would add up V x D numbers
    every time). In place where it can be: passes over a piece are what takes the time.
    Gradients with z = logits / temperature: d logp / dz = onehot - p,  d entropy / dz = -p (log p + entropy)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, size):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprob, lse, entropy = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(3))
        step = max(1, size // len(weight))
        for s in range(0, len(hidden), step):
            rows, target = slice(s, s + step), targets[s : s + step, None]
            z = (hidden[rows] @ weight.T).to(wide).div_(temperature)
            logp = z.log_softmax(-1)  # lse - sum(p z) would cancel where p is peaked
            logprob[rows] = logp.gather(-1, target)[:, 0]
            lse[rows] = z.gather(-1, target)[:, 0] - logprob[rows]
            entropy[rows] = -torch.exp(logp, out=z).mul_(logp).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.args = temperature, size
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        temperature, size = ctx.args
        a, b = grad_logprob / temperature, grad_entropy / temperature
        grad_hidden, grad_weight = torch.zeros_like(hidden, dtype=lse.dtype), torch.empty_like(weight)
        step = max(1, size // max(1, len(hidden)))
        for s in range(0, len(weight), step):
            some = weight[s : s + step]
            grad = (hidden @ some.T).to(lse.dtype).div_(temperature).sub_(lse[:, None])  # log p
            p = grad.exp()
            grad.mul_(-b[:, None]).sub_((a + b * entropy)[:, None]).mul_(p)
            here = targets - s  # a target's column; without `inside` the device would have to be waited for
            inside = (here >= 0) & (here < len(some))
            grad.scatter_add_(-1, here.clamp(0, len(some) - 1)[:, None], (a * inside)[:, None])
            grad = grad.to(hidden.dtype)
            grad_hidden += grad @ some
            grad_weight[s : s + step] = grad.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """token_logprobs_ref with no more logits alive than three pieces of 128 MB (on CPU 16 MB: near its cache, and small
    enough for malloc to use it again), differentiable in hidden and weight. Liger's kernel for Hopper rounds entropies,
    and sums of the head's gradient, to bf16."""
    if LIGER_LOGPROB and hidden.is_cuda and hidden.dtype == torch.bfloat16 and len(targets):
        nll, entropy = LIGER_LOGPROB(hidden, weight, targets, temperature, -100, 1, True)
        return -nll, entropy.float()
    return _ChunkedLogprob.apply(hidden, weight, targets, temperature, (128 if hidden.is_cuda else 16) << 18)


class LogprobHead(nn.Linear):
    """An lm_head that answers with (log-prob, entropy) of given targets instead of logits: (1, K, 2) in place of
    (1, K, V). Being the head itself, FSDP gathers its weight (and a tied embedding's) at the right time."""

    targets: Tensor | None = None
    temperature = 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        if self.targets is None:
            return super().forward(hidden)
        weight = self.weight
        if torch.is_autocast_enabled(hidden.device.type):
            hidden, weight = (x.to(torch.get_autocast_dtype(hidden.device.type)) for x in (hidden, weight))
        return torch.stack(token_logprobs(hidden[0], weight, self.targets, self.temperature), dim=-1)[None]


# ------------------------------------------------------------------------------------------------------------- Liger

LIGER_LOGPROB = None  # Liger's fused linear + scaled cross entropy, once `find_liger_logprobs` has seen it work


def find_liger_logprobs() -> str:
    """Tries Liger's log-prob kernel for Hopper (pip install "liger-kernel[cutedsl]"), forward and backward, against the
    specification: what cannot be imported, compiled or trusted must not hurt a run later. Says what was chosen."""
    global LIGER_LOGPROB
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        return "chunked"
    hidden, weight = (torch.randn(n, 128, device="cuda").div_(8).bfloat16().requires_grad_() for n in (3000, 1000))
    targets = torch.arange(3000, device="cuda") % 1000
    try:
        from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90 as sm90

        LIGER_LOGPROB = sm90.LigerFusedScaledCrossEntropySM90Function.apply
        both = [f(hidden, weight, targets, 0.7) for f in (token_logprobs_ref, token_logprobs)]
        both = [[*out, *torch.autograd.grad(sum(out).sum(), (hidden, weight))] for out in both]
        errors = [((x - y).float().norm() / x.float().norm()).item() for x, y in zip(*both)]
        assert max(errors) < 0.03, f"relative errors {errors}"
        return "Liger's kernel for Hopper"
    except Exception as error:  # a missing package, a compiler, a driver: anything
        LIGER_LOGPROB = None
        return f"chunked (Liger's kernel for Hopper: {type(error).__name__}: {str(error)[:80]})"


def apply_liger(model_type: str) -> str:
    """Patches RMSNorm and SwiGLU of one architecture, before its models are made; RoPE stays off, as in the original
    run. Says what was done. Liger's own fused cross entropy only acts when labels are passed, so never in PPO:
    token_logprobs is what it promised."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "off (Triton kernels need a GPU)"
    if not any(map(which, ("cc", "gcc", "clang"))):
        return "off (Triton needs a C compiler)"
    if not importlib.util.find_spec("liger_kernel"):
        return "off (liger-kernel is not installed)"
    if model_type not in (known := ("llama", "qwen2", "qwen3")):
        return f"off (patches are for {', '.join(known)}, not {model_type})"
    import liger_kernel.transformers as liger

    patch = getattr(liger, f"apply_liger_kernel_to_{model_type}")
    patch(rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True)
    return "RMSNorm, SwiGLU"


if __name__ == "__main__":  # the plain way, and the fast one beside it: forward and backward
    cuda, lengths, errors = torch.cuda.is_available(), [700, 60, 240, 1, 500], []
    torch.set_default_device("cuda" if cuda else "cpu")
    (K, D, V), dtype, allowed = ((4096, 1536, 151936), torch.bfloat16, 0.03) if cuda else ((999, 64, 16000), None, 1e-4)
    head, bounds = {"targets": torch.arange(K) * 7 % V, "temperature": 0.7}, torch.tensor([0, *lengths]).cumsum(0).int()

    def padded(*qkv: Tensor) -> Tensor:
        rows = (nn.utils.rnn.pad_sequence(x.split(lengths), True).transpose(1, 2) for x in qkv)
        out = scaled_dot_product_attention(*rows, scale=0.1, is_causal=True, enable_gqa=True).transpose(1, 2)
        return torch.cat([x[:n] for x, n in zip(out, lengths)])

    kb = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # noqa: E731
    mb = lambda: torch.cuda.max_memory_allocated() / 2**20 if cuda else kb() / 1024  # noqa: E731  the most so far
    logits = {"all logits": partial(token_logprobs_ref, **head), find_liger_logprobs(): partial(token_logprobs, **head)}
    fast = {"padded sdpa": padded, "varlen": partial(varlen_attention, cu_seqlens=bounds, max_seqlen=700, scale=0.1)}
    print(f"{'':40s}    ms    MB  largest error")
    for shapes, ways in (([(K, D), (V, D)], logits), ([(1501, heads, 64) for heads in (8, 2, 2)], fast)):
        inputs, done = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes], []
        for name, f in ways.items():
            torch.cuda.reset_peak_memory_stats() if cuda else Path("/proc/self/clear_refs").write_text("5")
            begun, before = time.perf_counter(), mb()
            out = torch.stack(out) if isinstance(out := f(*inputs), tuple) else out
            done.append([out, *torch.autograd.grad(out, inputs, torch.arange(out.numel()).sin().to(out).view_as(out))])
            done[-1][-1].sum().item()  # waits for the GPU
            ms, most = 1000 * (time.perf_counter() - begun), mb() - before
            errors += [max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(done[-1], done[0]))]
            print(f"{name:40.40s}{ms:6.0f}{most:6.0f}  {errors[-1]:.1e}")
    sys.exit(f"kernels.py: errors {errors}; {allowed} is allowed" if not max(errors) <= allowed else 0)
