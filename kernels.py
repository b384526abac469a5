"""The same numbers with less time and memory.

Owns: ranks, sharded models (FSDP2) and meters across ranks, packed rows and attention on them, sequence parallelism
(Ulysses), log-probs and entropy without logits, Liger's patches, each with a plain specification for the tests; and
the arithmetic of how much memory all that takes.
Refuses to know: what the numbers are for (advantages, losses, rewards).
Left out on purpose: custom Triton. torch's varlen attention and Liger are kept by people who do nothing else.

This file shares its name with Hugging Face's `kernels` package: see the guard at the top of ppo.py. Keep it importable
without side effects, and never define __version__ here.
"""
# T tokens of a packed row   K response tokens among them   H heads   D head size or hidden size   V vocabulary
import importlib.util
import os
import time
from bisect import bisect_left
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention

# --------------------------------------------------------------------------- ranks, sharded models, meters and clocks


class Ranks(NamedTuple):
    """Ranks 0..sp-1 share packed row 0, the next sp ranks row 1, and so on."""

    rank: int = 0
    world: int = 1
    row: int = 0  # rank // sp
    rows: int = 1  # world // sp
    sp_rank: int = 0
    sp: int = 1
    sp_group: dist.ProcessGroup | None = None


def start_ranks(bf16: bool, sp: int):
    """(Accelerator, Ranks). Under torchrun, whatever the number of processes, models are sharded by FSDP2: over nccl on
    GPUs, over gloo on CPU. Without torchrun this is one plain process."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, InitProcessGroupKwargs
    from torch.distributed.fsdp import MixedPrecisionPolicy

    precision = "bf16" if bf16 else "no"
    if "RANK" not in os.environ:
        return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision), Ranks()
    if not torch.cuda.is_available():
        # Accelerate ignores an FSDP plugin on CPU, silently. Under this label it takes the same path as on GPUs.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        # Accelerate's own policy for bf16 would round outputs (log-probs, that is) and gradient sums to bf16 as well
        mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else None,
    )
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # ranks wait for the longest answer, and for disks
    handlers = [patience] if torch.cuda.is_available() else []
    accelerator = Accelerator(fsdp_plugin=plugin, mixed_precision=precision, kwargs_handlers=handlers)
    rank, world, group = accelerator.process_index, accelerator.num_processes, None
    if sp > 1:  # new_group is collective: every rank makes every group
        group = [dist.new_group(list(range(first, first + sp))) for first in range(0, world, sp)][rank // sp]
    return accelerator, Ranks(rank, world, rank // sp, world // sp, rank % sp, sp, group)


def load_policy(path: str, accelerator, checkpointing: bool, trained: bool = True) -> nn.Module:
    """A causal language model in fp32 for packed rows, with a LogprobHead; sharded. trained=False: a reference."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="varlen")
    model.lm_head.__class__ = LogprobHead  # same parameter, same tie to the embedding
    return shard(model.requires_grad_(trained), accelerator, checkpointing and trained)


def load_critic(path: str, accelerator, checkpointing: bool) -> nn.Module:
    """A transformer with one number per token. A new value head starts at zero: first values are 0, not noise."""
    from transformers import AutoConfig, AutoModelForTokenClassification

    config = AutoConfig.from_pretrained(path, num_labels=1)
    config.classifier_dropout = 0.0
    model, info = AutoModelForTokenClassification.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation="varlen", output_loading_info=True
    )
    if "score.weight" in info["missing_keys"]:
        nn.init.zeros_(model.score.weight)
        nn.init.zeros_(model.score.bias)
    return shard(model, accelerator, checkpointing)


def shard(model: nn.Module, accelerator, checkpointing: bool) -> nn.Module:
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # prepare() takes no frozen model, this takes any

    model.train()  # no dropout anywhere; checkpointing acts in this mode only
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return fsdp2_prepare_model(accelerator, model) if accelerator.is_fsdp2 else accelerator.prepare_model(model)


def full_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor), one alive at a time; collective. A tied head comes once, as the embedding.
    Cast before gathering: half the bytes to send in bf16."""
    for module in model.modules():  # after a forward alone FSDP2 keeps the head gathered, rounded to the compute dtype
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, p in model.named_parameters():
        p = p.detach().to(dtype)
        yield name, p.full_tensor() if isinstance(p, DTensor) else p


def optimizer_step(model: nn.Module, optimizer, lr: float, max_norm: float, batch: NamedTuple, dump) -> Tensor:
    """Clips the gradient over all ranks and steps; returns its norm before clipping, (). A norm that is not finite
    stops every rank here, before this model changes, with the batch in the file `dump`."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)  # Accelerate's breaks for a second model
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not torch.isfinite(norm):
        torch.save(batch._asdict(), dump)
        raise FloatingPointError(f"{type(model).__name__}: gradient norm {norm}; not updated; the batch is in {dump}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def save_sharded(path, trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]]) -> None:
    """Every rank writes its own shards of models and optimizers."""
    dcp.save(_states(trained), checkpoint_id=path)


def load_sharded(path, trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]]) -> None:
    states = _states(trained)
    dcp.load(states, checkpoint_id=path)
    for name, pair in trained.items():
        set_state_dict(*pair, model_state_dict=states[name]["model"], optim_state_dict=states[name]["optimizer"])


def _states(trained: dict) -> dict[str, dict[str, dict]]:
    """Dictionaries all the way down: DCP pickles a tuple as one object, rank 0's, and all ranks would load that."""
    return {name: dict(zip(("model", "optimizer"), get_state_dict(*pair))) for name, pair in trained.items()}


def share(items: list, ranks: Ranks) -> list:
    """This rank's consecutive share of a list that all ranks have."""
    return items[ranks.rank * len(items) // ranks.world : (ranks.rank + 1) * len(items) // ranks.world]


def gather(items: list, ranks: Ranks) -> list:
    """The way back: the lists of all ranks, joined in rank order, on every rank."""
    parts: list = [items]
    if ranks.world > 1:
        parts = [None] * ranks.world
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


class Meter:
    """Means over the tokens of all ranks: sums and counts, one reduction a step."""

    def __init__(self):
        self.pairs: dict[str, Tensor] = {}  # name -> (2,) sum and count

    def add(self, name: str, x: Tensor) -> None:
        """x: any shape, masked entries left out by the caller. Does not wait for the device."""
        x = x.detach().double()
        pair = torch.stack([x.sum(), torch.full_like(x.sum(), x.numel())])
        self.pairs[name] = self.pairs.get(name, 0.0) + pair

    def add_all(self, prefix: str, **values: Tensor) -> None:
        for name, x in values.items():
            self.add(prefix + name, x)

    def means(self, ranks: Ranks) -> dict[str, float]:
        table = torch.stack(list(self.pairs.values()))  # every rank has added the same names in the same order
        if ranks.world > 1:
            dist.all_reduce(table)
        return {name: total / max(count, 1.0) for name, (total, count) in zip(self.pairs, table.tolist())}


@contextmanager
def timed(times: dict[str, float], phase: str):
    """Adds the block's seconds to times["time/<phase>"]. Waits for the GPU: the blame falls on the right phase."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times[f"time/{phase}"] = times.get(f"time/{phase}", 0.0) + time.perf_counter() - start


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
    that keeps nothing: ranks without work still have to join FSDP's collectives.
    """
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
    if HAS_FLASH_ATTN:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=True
        )
    from torch.nn.attention.varlen import varlen_attn

    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # torch 2.11 has no enable_gqa
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(-1, 0))


def _varlen_cpu(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], scale: float) -> Tensor:
    """Padded views of neighbours of similar length (at most a quarter of a view is padding), one sdpa call each.
    A padded slot holds some later token: causal attention keeps it from every real query, and its output is dropped."""
    out, first, count = [], 0, len(bounds) - 1
    lengths = [b - a for a, b in zip(bounds, bounds[1:])]
    while first < count:
        last, longest, total = first, 0, 0
        while last < count:
            longest, total = max(longest, lengths[last]), total + lengths[last]
            if total < 0.75 * longest * (last + 1 - first):
                break
            last += 1
        width = max(lengths[first:last])
        start = torch.tensor(bounds[first:last])[:, None]
        real = torch.arange(width) < torch.tensor(lengths[first:last])[:, None]
        slots = (start + torch.arange(width)).clamp(max=len(q) - 1)
        view = (x[slots].transpose(1, 2) for x in (q, k, v))  # (sequences, heads, width, D)
        attended = scaled_dot_product_attention(*view, is_causal=True, scale=scale, enable_gqa=True)
        out.append(attended.transpose(1, 2)[real])
        first = last
    return torch.cat(out)


class _AllToAll(torch.autograd.Function):
    """Swaps a split of dimension `a` over the group for a split of dimension `b`; its gradient is the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, group, a: int, b: int) -> Tensor:
        ctx.args = group, a, b
        slabs = torch.stack(x.chunk(dist.get_world_size(group), a)).contiguous()  # one for each peer
        received = torch.empty_like(slabs)
        dist.all_to_all_single(received, slabs, group=group)
        return torch.cat(received.unbind(0), b)

    @staticmethod
    def backward(ctx, grad: Tensor):
        group, a, b = ctx.args
        return _AllToAll.apply(grad, group, b, a), None, None, None


def attention(module, query, key, value, attention_mask, scaling, cu_seqlens, max_seqlen, sp_group=None, **_):
    """transformers' attention interface; query (1, H, T, D). With a group of n ranks, Ulysses (arXiv:2309.14509): each
    rank holds T/n tokens of all heads outside attention, and all tokens of H/n heads inside it."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if sp_group is None:
        return varlen_attention(q, k, v, cu_seqlens, max_seqlen, scaling)[None], None
    n = dist.get_world_size(sp_group)
    if k.shape[1] % n:  # fewer kv heads than ranks: repeat them, each rank then holds a copy of the one it needs
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    q, k, v = (_AllToAll.apply(x, sp_group, 1, 0) for x in (q, k, v))
    out = varlen_attention(q, k, v, cu_seqlens, max_seqlen, scaling)
    return _AllToAll.apply(out, sp_group, 0, 1)[None], None


def setup(model_type: str, liger: bool, progress: bool, bf16: bool) -> dict[str, str]:
    """Before any model is made: attn_implementation="varlen" becomes known to transformers (which then builds no mask),
    Liger patches its layers, and no report comes on the value head being new. Returns what will be used for what."""
    from transformers import AttentionInterface
    from transformers.utils import logging

    if torch.cuda.is_available() and not bf16:
        raise ValueError("dtype=fp32 is for CPU: the packed attention kernels of CUDA take bf16 only, use --dtype bf16")
    logging.set_verbosity_error()
    (logging.enable_progress_bar if progress else logging.disable_progress_bar)()
    AttentionInterface.register("varlen", attention)
    inside = "flash-attn varlen" if HAS_FLASH_ATTN else "torch varlen"
    return {
        "attention": inside if torch.cuda.is_available() else "per-sequence sdpa",
        "log-probs": "chunked",
        "Liger": apply_liger(model_type) if liger else "off",
        "compute": f"{'bfloat16' if bf16 else 'float32'} on {'cuda' if torch.cuda.is_available() else 'cpu'}",
        "sharding": f"FSDP2 over {os.environ['WORLD_SIZE']} ranks" if "RANK" in os.environ else "none (one process)",
    }


# ---------------------------------------------------------------------------- log-prob and entropy without the logits


def token_logprobs_ref(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The specification. hidden (K, D), weight (V, D), targets (K,) -> log-prob and entropy in nats, both (K,) fp32."""
    logp = torch.log_softmax((hidden @ weight.T).float() / temperature, dim=-1)  # (K, V): the memory we do not want
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


class _ChunkedLogprob(torch.autograd.Function):
    """The same, a chunk of rows at a time; the backward pass computes each chunk's logits again.
    Gradients with z = logits / temperature: d logp / dz = onehot - p,  d entropy / dz = -p (log p + entropy)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprob = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        lse, entropy = torch.empty_like(logprob), torch.empty_like(logprob)
        for s in range(0, len(hidden), chunk):
            rows = slice(s, s + chunk)
            z = (hidden[rows] @ weight.T).to(wide) / temperature
            lse[rows] = z.logsumexp(-1)
            logprob[rows] = z.gather(-1, targets[rows, None])[:, 0] - lse[rows]
            z = z - lse[rows, None]  # log p; lse - sum(p z) would cancel where p is peaked
            entropy[rows] = -(z.exp() * z).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.args = temperature, chunk
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        temperature, chunk = ctx.args
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        for s in range(0, len(hidden), chunk):
            rows = slice(s, s + chunk)
            logp = (hidden[rows] @ weight.T).to(lse.dtype) / temperature - lse[rows, None]
            grad = -logp.exp() * (grad_logprob[rows, None] + grad_entropy[rows, None] * (logp + entropy[rows, None]))
            grad.scatter_add_(-1, targets[rows, None], grad_logprob[rows, None])
            grad = (grad / temperature).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """token_logprobs_ref with no more logits alive than a few chunks of 128 MB, differentiable in hidden and weight."""
    chunk = max(1, (128 << 20) // (4 * len(weight)))
    return _ChunkedLogprob.apply(hidden, weight, targets, temperature, chunk)


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


def apply_liger(model_type: str) -> str:
    """Patches RMSNorm and SwiGLU of one architecture, before its models are made; RoPE stays off, as in the original
    run. Says what was done. Liger's own fused cross entropy only acts when labels are passed, so never in PPO:
    token_logprobs is what it promised."""
    if not torch.cuda.is_available():
        return "off (Triton kernels need a GPU)"
    import liger_kernel.transformers as liger

    known = ("llama", "qwen2", "qwen3")
    if model_type not in known:
        return f"off (patches are for {', '.join(known)}, not {model_type})"
    patch = getattr(liger, f"apply_liger_kernel_to_{model_type}")
    patch(rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True)
    return "RMSNorm, SwiGLU"


# -------------------------------------------------------------------------------------------------------- memory plan


def memory_gb(ranks: Ranks) -> float:  # of this rank's card; on CPU its share of the machine
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 / ranks.world


# sizes of a model in elements: all parameters (a tied head once), those of one layer; kv: of k alone; head: of one head
Shape = namedtuple("Shape", "params layer layers hidden q kv mlp vocab head")


def model_shape(config, critic: bool) -> Shape | None:
    """Counted on the model itself, which is made without memory."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    config = type(config).from_dict(config.to_dict() | {"num_labels": 1})
    with torch.device("meta"):
        model = (AutoModelForTokenClassification if critic else AutoModelForCausalLM).from_config(config)
    first = {name.split(".layers.0.")[1]: p for name, p in model.named_parameters() if ".layers.0." in name}
    if not {"self_attn.q_proj.weight", "mlp.gate_proj.weight"} <= first.keys():
        return None  # not made of Llama's parts
    q, kv, mlp = (len(first[f"{name}_proj.weight"]) for name in ("self_attn.q", "self_attn.k", "mlp.gate"))
    counts = [sum(p.numel() for p in some) for some in (model.parameters(), first.values())]
    sizes = config.num_hidden_layers, config.hidden_size, q, kv, mlp, config.vocab_size
    return Shape(*counts, *sizes, q // config.num_attention_heads)


def memory_items(
    policy: Shape, critic: Shape, reference: Shape | None, *, ranks: int, card_gb: float, bf16: bool,
    gradient_checkpointing: bool, max_tokens_per_microbatch: int, sequences: int, longest: int, tp: int,
    gpu_memory: float, max_seqs: int, engine: str, sharded: bool, **_,
) -> tuple[dict[str, dict[str, float]], float]:
    """For each moment that can be the fullest, the bytes of what is alive on a rank; and the tokens that the KV cache
    holds. bf16 stands for CUDA, fp32 for CPU (`setup` knows no other pair), where engines do not sleep."""
    c, n = 2 if bf16 else 4, ranks if sharded else 1  # bytes of a number in compute; parts that a model is cut into
    tokens = min(max_tokens_per_microbatch, -(-sequences // ranks) * longest)
    trained, embedding = {"policy": policy, "critic": critic}, policy.vocab * policy.hidden

    key_value = 2 * c * policy.layers * max(policy.kv // tp, policy.head)  # bytes a token
    batch = min(max_seqs, -(-sequences // (ranks // tp)))
    served = weights = {"engine weights": c * policy.params / tp}
    if engine == "torch":  # a sequence has logits, log-softmax and exp in fp32, exp and its cumsum in fp64
        served = weights | {"engine in work": 28 * batch * policy.vocab, "KV cache": batch * longest * key_value}
    elif not bf16:
        served = weights = weights | {"KV cache": 256 << 20}  # kv_cache_mb of VLLMSampler
    else:  # vLLM tries a full batch of prompts and max_seqs log-probs; the KV cache gets what these leave of its share
        prompts = (16384 if card_gb >= 70 else 8192) * 3 * c * (policy.mlp // tp + policy.hidden)
        served = weights | {"engine in work": max(prompts, 4 * 4 * max_seqs * policy.vocab)}
        served |= {"KV cache": max(0.0, gpu_memory * card_gb * 2**30 - sum(served.values()))}

    # Held by the trainer at every moment. (B, T): ids 8 bytes, mask and last 1 each, 4 each for engine's and old
    # log-probs, values, rewards, advantages, returns; with a reference its log-probs and the penalty. Overhead is
    # assumed, not measured: CUDA context 0.5 GB, NCCL 0.5, workspaces and the engine's CUDA graphs 1.
    always = {"overhead": (2 << 30) * bf16, "(B, T) tensors": sequences * longest * (42 if reference else 34)}
    for name, s in trained.items():  # fp32, as are the gradients: 4 bytes, and AdamW has two states
        always |= {f"{name} weights": 4 * s.params / n, f"{name} Adam states": 8 * s.params / n}
    if reference:  # a forward leaves its head gathered, and no backward comes to give it back
        always |= {"reference weights": 4 * reference.params / n}
        always |= {"reference gathered head": c * reference.vocab * reference.hidden * sharded}
    gathered = {"policy gathered head": c * embedding * sharded}  # from the canary on
    # chunks of fp32 logits: 3 in _ChunkedLogprob.forward; 4 in its backward, 5 when there was a chunk before
    chunk, before = min(128 << 20, 4 * tokens * policy.vocab), 4 * tokens * policy.vocab >= 256 << 20
    canary = 3 * min(chunk, 4 * 4 * 64 * policy.vocab)  # of four answers, cut at 64 tokens
    moments = {"sampling": always | served | gathered | {"sync, canary": 2 * c * embedding * sharded + canary}}
    always |= {} if bf16 else weights

    for name, s in trained.items():
        # Elements a token that the backward of a layer needs, on CPU: its two norms keep input, normalised input and
        # output, attention q, k, v, output and the input of o_proj, the MLP gate, silu(gate), up and their product.
        # `ends`: the last norm and the rows for the head. `work`: gradients on top, at worst two in the MLP.
        layer, ends, work = 6 * s.hidden + 3 * s.q + 2 * s.kv + 4 * s.mlp, 4 * s.hidden, 2 * s.mlp + 2 * s.hidden
        stream = s.hidden  # between layers, all that checkpointing keeps
        if bf16:  # Liger: no normalised input, no silu(gate), in place. torch's varlen: k and v repeated, one output
            layer, ends, work = 4 * s.hidden + 4 * s.q + 3 * s.mlp, 3 * s.hidden, s.mlp + 2 * s.hidden
        if bf16 and not sharded:  # autocast instead of FSDP: fp32 between layers, a bf16 copy for every linear
            layer, stream = layer + 5 * s.hidden, 2 * s.hidden
        kept = s.layers * (stream if gradient_checkpointing else layer) + ends
        again = layer - stream if gradient_checkpointing else 0
        gradients = {f"{name} gradients": 4 * s.params / n}
        passes = always | gradients | {f"{name} activations": c * tokens * kept}
        in_layer = {f"{name} layer in backward": c * tokens * (work + again)}
        # FSDP: this layer, the next, its buffer, a gradient; two fp32 gradients on their way. Autocast: bf16 copies
        in_layer[f"{name} gathered layers"] = (4 * c + 8) * s.layer if sharded else 2 * s.params * bf16
        if name == "policy":  # the head's gradient is summed in fp32
            head = {"log-probs, head gradient": 4 * embedding + max((4 + before) * chunk, 2 * chunk + c * embedding)}
            moments["policy head"] = passes | gathered | head
            in_layer |= gathered | {"head gradient on its way": c * embedding * sharded}
        moments[f"{name} layers"] = passes | in_layer
        if not bf16:  # AdamW is fused on CUDA; here a parameter has the root of its second moment, and the quotient
            moments[f"{name} AdamW"] = always | gradients | {"AdamW in work": 8 * s.vocab * s.hidden / n}
    return moments, served["KV cache"] / key_value


def memory_plan(policy, critic, reference, **flags) -> tuple[dict[str, float], str]:
    """From Hugging Face configurations alone (reference may be None) and flags as in memory_items: GB (2**30) a rank of
    every item, with the totals "while sampling" and "while updating"; and a table with a verdict, for people."""
    given = {"policy": model_shape(policy, False), "critic": model_shape(critic, True)} | flags
    given["reference"] = model_shape(reference, False) if reference else None
    if not (given["policy"] and given["critic"]):
        return {}, f"no memory plan for {policy.model_type}: it knows dense models that are made as Llama is"
    card, ranks, tp, longest = (flags[name] for name in ("card_gb", "ranks", "tp", "longest"))

    def needs(what: str, changed: dict) -> float:
        moments = memory_items(**given | changed | ({"sharded": True} if "ranks" in changed else {}))[0]
        return max(sum(moments[m].values()) for m in moments if (m == "sampling") == (what == "sampling")) / 2**30

    def remedies(what: str) -> str:
        """Each flag that brings this total down to the card on its own, with the mildest value that does."""
        prompts = flags.get("prompts_per_step", flags["sequences"])
        size, shares = given["critic"].params, [g / 100 for g in range(round(100 * flags["gpu_memory"]), 0, -1)]
        shares = [g for g in shares if flags["bf16"] and memory_items(**given | {"gpu_memory": g})[1] >= longest]
        budgets = range(flags["max_tokens_per_microbatch"], longest - 1, -1)
        ways = {  # values from mild to strong
            "--gpu_memory at most {}": ("gpu_memory", shares),
            "--gradient_checkpointing": ("gradient_checkpointing", [True]),
            "--max_tokens_per_microbatch at most {}": ("max_tokens_per_microbatch", budgets),
            "at least {} GPUs": ("ranks", [n for n in range(ranks + 1, 513) if n % tp == prompts % n == 0]),
            "--kl_coef 0": ("reference", [None]),
            "a --critic_model of at most {.params:,} parameters": (
                "critic", [given["critic"]._replace(params=size * k // 20) for k in range(19, 0, -1)]
            ),
        }  # fmt: skip
        enough = []
        for text, (name, values) in ways.items():
            at = bisect_left(values, True, key=lambda value: needs(what, {name: value}) <= card)
            enough += [text.format(value) for value in values[at : at + 1]]
        return " or ".join(enough) or "no flag is enough alone"

    moments, kv_tokens = memory_items(**given)
    items = {name: size / 2**30 for alive in moments.values() for name, size in alive.items() if size}
    text = f"memory plan, GB on each of {ranks} ranks:\n{'':27}" + "".join(f"{moment:>15}" for moment in moments)
    for name in [*items, "total"]:
        cells = [alive.get(name, 0) if name in items else sum(alive.values()) for alive in moments.values()]
        text += f"\n  {name:25}" + "".join(f"{cell / 2**30:15.2f}" if cell else " " * 15 for cell in cells)
    totals = {what: needs(what, {}) for what in ("sampling", "updating")}
    want = min(flags["max_seqs"], -(-flags["sequences"] // (ranks // tp)))
    text += f"\nKV cache: {kv_tokens:,.0f} tokens, {kv_tokens / longest:.1f} sequences of {longest}; {want} want to run"
    text += "\n" + ", ".join(f"while {what} {gb:.1f} GB" for what, gb in totals.items())
    wrong = [f"{gb:.1f} GB while {what}: {remedies(what)}" for what, gb in totals.items() if gb > card]
    if kv_tokens < longest:
        wrong.append("the KV cache holds no sequence of full length: a larger --gpu_memory or --tp, or shorter answers")
    spare = f"fits in {card:g} GB, {card - max(totals.values()):.1f} GB to spare"
    text += "\n" + ("\n".join([f"does not fit in {card:g} GB", *wrong]) if wrong else spare)
    return items | {f"while {what}": gb for what, gb in totals.items()}, text
