"""The same numbers with less time and memory.

Owns: packed rows and attention on them, sequence parallelism (Ulysses), log-probs and entropy without logits, Liger's
patches, each with a plain specification for the tests.
Refuses to know: how models are loaded and sharded, and what the numbers are for (advantages, losses, rewards).
Left out on purpose: custom Triton (torch's varlen attention and Liger are kept by people who do nothing else).

This file shares its name with Hugging Face's `kernels` package: see the guard at the top of ppo.py. Keep it importable
without side effects, and never define __version__ here.
"""

# T tokens of a packed row   K response tokens among them   H heads   D head size or hidden size   V vocabulary
import importlib.util
import os
from itertools import pairwise
from shutil import which
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_to_all_single
from torch.nn.functional import scaled_dot_product_attention

from infra.dist import Ranks


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


def pack(
    ids: Tensor, mask: Tensor, lengths: list[int], rows: list[int], sp_rank: int = 0, sp: int = 1
) -> Packed:
    """Packs sequences `rows` of ids (B, T_max), each `lengths[b]` tokens long. This is the one place where outputs
    are shifted: the slot that reads token t - 1 predicts token t, so a sequence's last token is never fed, and
    whatever a model returns for `keep` belongs at `index`, which is about token t. An empty `rows` gives a row
    that keeps nothing: ranks without work still have to join FSDP's collectives."""
    device, width = ids.device, ids.shape[1]
    fed = [lengths[b] - 1 for b in rows]
    parts = [ids[b, :n] for b, n in zip(rows, fed)]
    places = [
        torch.arange(b * width + 1, b * width + n + 1, device=device) for b, n in zip(rows, fed)
    ]
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


def packed_forward(
    model: nn.Module, p: Packed, sp_group: dist.ProcessGroup | None, **options
) -> Tensor:
    """What the model's head says of one packed row, (slots, ...). No cache and no attention mask: with either,
    transformers lets packed sequences see each other under every attention function but ours."""
    where = {"cu_seqlens": p.cu_seqlens, "max_seqlen": p.max_seqlen, "sp_group": sp_group}
    if model.config._attn_implementation.startswith(
        "flash"
    ):  # its names for the same; else it counts for every layer
        where |= {f"cu_seq_lens_{x}": p.cu_seqlens for x in "qk"} | {
            f"max_length_{x}": p.max_seqlen for x in "qk"
        }
    return (
        model(input_ids=p.ids, position_ids=p.position_ids, use_cache=False, **where, **options)
        .logits[0]
        .float()
    )


def policy_forward(
    policy: nn.Module, p: Packed, temperature: float, sp_group=None
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy at every response token of a packed row, both (K,). The policy's head is a LogprobHead."""
    policy.lm_head.targets, policy.lm_head.temperature = p.targets, temperature
    return packed_forward(policy, p, sp_group, logits_to_keep=p.keep).unbind(-1)


def critic_forward(critic: nn.Module, p: Packed, sp_group=None) -> Tensor:
    """Values at every response token of a packed row, (K,)."""
    return packed_forward(critic, p, sp_group)[p.keep, 0]


# ------------------------------------------------------------------------------------------- attention on packed rows

HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
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

    k, v = (
        x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)
    )  # torch 2.11 has no enable_gqa
    return varlen_attn(q, k, v, *where, scale=scale, window_size=(-1, 0))


def _varlen_cpu(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], scale: float) -> Tensor:
    lengths = [b - a for a, b in pairwise(bounds)]
    parts = zip(
        *(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v))
    )  # (1, heads, tokens, D)
    # (split, not slices: the gradient of a slice is as long as the row)
    attended = [
        scaled_dot_product_attention(*x, is_causal=True, scale=scale, enable_gqa=True)
        for x in parts
    ]
    return torch.cat(attended, dim=2)[0].transpose(0, 1)


def all_to_all(x: Tensor, group, a: int, b: int) -> Tensor:
    """Swaps a split of dimension `a` over the group for a split of dimension `b`; its gradient goes the way back."""
    slabs = torch.stack(x.chunk(dist.get_world_size(group), a)).contiguous()  # one for each peer
    return torch.cat(all_to_all_single(torch.empty_like(slabs), slabs, group=group).unbind(0), b)


def packed_attention(
    module, query, key, value, attention_mask, scaling, cu_seqlens, max_seqlen, sp_group=None, **_
):
    """transformers' attention interface; query (1, H, T, D). With a group of n ranks, Ulysses (arXiv:2309.14509): each
    rank holds T/n tokens of all heads outside attention, and all tokens of H/n heads inside it."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if sp_group is None:
        return varlen_attention(q, k, v, cu_seqlens, max_seqlen, scaling)[None], None
    n = dist.get_world_size(sp_group)
    if (
        k.shape[1] % n
    ):  # fewer kv heads than ranks: repeat them, each rank then holds a copy of the one it needs
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    q, k, v = (all_to_all(x, sp_group, 1, 0) for x in (q, k, v))
    out = varlen_attention(q, k, v, cu_seqlens, max_seqlen, scaling)
    return all_to_all(out, sp_group, 0, 1)[None], None


def setup(
    model_type: str, progress: bool, bf16: bool, attention: str = "varlen", liger: bool = True
) -> dict[str, str]:
    """Before any model is made: attn_implementation="varlen" becomes known to transformers (which then builds no mask),
    Liger patches its layers, and no report comes on the value head being new. Returns what will be used for what."""
    from transformers import AttentionInterface
    from transformers.utils import logging

    cuda = torch.cuda.is_available()
    if cuda and not bf16:
        raise ValueError(
            "dtype=fp32 is for CPU: the packed attention kernels of CUDA take bf16 only, use --dtype bf16"
        )
    logging.set_verbosity_error()
    (logging.enable_progress_bar if progress else logging.disable_progress_bar)()
    AttentionInterface.register("varlen", packed_attention)
    if attention == "flash_attention_2" and not HAS_FLASH_ATTN:
        raise ValueError(
            "attention=flash_attention_2 needs the package flash-attn: install it or use varlen"
        )
    inside = (
        "per-sequence sdpa"
        if not cuda
        else "flash-attn varlen"
        if HAS_FLASH_ATTN
        else "torch varlen"
    )
    return {
        "attention": inside if attention == "varlen" else f"{attention} of transformers",
        "log-probs": find_liger_logprobs() if liger else "chunked",
        "Liger": apply_liger(model_type) if liger else "off",
        "compute": f"{'bfloat16' if bf16 else 'float32'} on {'cuda' if cuda else 'cpu'}",
        "sharding": f"FSDP2 over {os.environ['WORLD_SIZE']} ranks"
        if "RANK" in os.environ
        else "none (one process)",
    }


# ---------------------------------------------------------------------------- log-prob and entropy without the logits


def token_logprobs_ref(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The specification. hidden (K, D), weight (V, D), targets (K,) -> log-prob and entropy in nats, both (K,) fp32."""
    logp = torch.log_softmax(
        (hidden @ weight.T).float() / temperature, dim=-1
    )  # (K, V): the memory we do not want
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


class _ChunkedLogprob(torch.autograd.Function):
    """The same with at most `size` logits in a piece: some rows forward; backward, where they are computed again, some
    columns, each of which is the whole story of its row of weight's gradient (pieces of rows would add up V x D numbers
    every time). In place where it can be: passes over a piece are what takes the time.
    Gradients with z = logits / temperature: d logp / dz = onehot - p,  d entropy / dz = -p (log p + entropy)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, size):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprob, lse, entropy = (
            torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(3)
        )
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
        grad_hidden, grad_weight = (
            torch.zeros_like(hidden, dtype=lse.dtype),
            torch.empty_like(weight),
        )
        step = max(1, size // max(1, len(hidden)))
        for s in range(0, len(weight), step):
            some = weight[s : s + step]
            grad = (hidden @ some.T).to(lse.dtype).div_(temperature).sub_(lse[:, None])  # log p
            p = grad.exp()
            grad.mul_(-b[:, None]).sub_((a + b * entropy)[:, None]).mul_(p)
            here = (
                targets - s
            )  # a target's column; without `inside` the device would have to be waited for
            inside = (here >= 0) & (here < len(some))
            grad.scatter_add_(-1, here.clamp(0, len(some) - 1)[:, None], (a * inside)[:, None])
            grad = grad.to(hidden.dtype)
            grad_hidden += grad @ some
            grad_weight[s : s + step] = grad.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """token_logprobs_ref with no more logits alive than three pieces of 128 MB (on CPU 16 MB: near its cache, and small
    enough for malloc to use it again), differentiable in hidden and weight. Liger's kernel for Hopper rounds entropies,
    and sums of the head's gradient, to bf16."""
    if LIGER_LOGPROB and hidden.is_cuda and hidden.dtype == torch.bfloat16 and len(targets):
        nll, entropy = LIGER_LOGPROB(hidden, weight, targets, temperature, -100, 1, True)
        return -nll, entropy.float()
    return _ChunkedLogprob.apply(
        hidden, weight, targets, temperature, (128 if hidden.is_cuda else 16) << 18
    )


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
            hidden, weight = (
                x.to(torch.get_autocast_dtype(hidden.device.type)) for x in (hidden, weight)
            )
        return torch.stack(
            token_logprobs(hidden[0], weight, self.targets, self.temperature), dim=-1
        )[None]


# ------------------------------------------------------------------------------------------------------------- Liger

LIGER_LOGPROB = (
    None  # Liger's fused linear + scaled cross entropy, once `find_liger_logprobs` has seen it work
)


def find_liger_logprobs() -> str:
    """Tries Liger's log-prob kernel for Hopper (pip install "liger-kernel[cutedsl]"), forward and backward, against the
    specification: what cannot be imported, compiled or trusted must not hurt a run later. Says what was chosen."""
    global LIGER_LOGPROB
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        return "chunked"
    hidden, weight = (
        torch.randn(n, 128, device="cuda").div_(8).bfloat16().requires_grad_() for n in (3000, 1000)
    )
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
    patch(
        rope=False,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        rms_norm=True,
        swiglu=True,
    )
    return "RMSNorm, SwiGLU"
