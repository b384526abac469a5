"""The same numbers with less time and memory.

Owns: packed rows and attention on them, sequence parallelism (Ulysses), log-probs and entropy
without logits, Liger's patches, each with a plain specification for the tests.
Refuses to know: how models are loaded and sharded, and what the numbers are for (advantages,
losses, rewards).
Left out on purpose: custom Triton (torch's varlen attention and Liger are kept by people who do
nothing else).

This file shares its name with Hugging Face's `kernels` package: see the guard at the top of ppo.py.
Keep it importable without side effects, and never define __version__ here.
"""

# T tokens of a packed row, K response tokens among them, H heads, D head size or hidden size,
# V vocabulary
import importlib.util
import os
from shutil import which
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_to_all_single
from torch.nn.functional import scaled_dot_product_attention

from infra.dist import Ranks

# -------------------------------------------------------------------------------------- packed rows


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
    """Packs sequences `rows` of ids (B, T_max), each `lengths[b]` tokens long. This is the one
    place where outputs are shifted: the slot that reads token t - 1 predicts token t, so a
    sequence's last token is never fed, and whatever a model returns for `keep` belongs at `index`,
    which is about token t. An empty `rows` gives a row that keeps nothing: ranks without work still
    have to join FSDP's collectives."""
    device = ids.device
    fed = [lengths[b] - 1 for b in rows]
    # slots without a target that make T a multiple of sp: a sequence of zeros
    spare = -sum(fed) % sp if rows else sp
    if spare:
        fed.append(spare)
    positions = [torch.arange(count, device=device) for count in fed]
    # Where the token that a slot predicts stands in a flattened (B, T_max); the token that the slot
    # reads is the one before it. 0, the first token of all, is predicted nowhere: it means that the
    # slot has no target, and reads a 0.
    places = [b * ids.shape[1] + 1 + position for b, position in zip(rows, positions)]
    places.append(torch.zeros(spare, dtype=torch.long, device=device))

    size = sum(fed) // sp
    mine = slice(sp_rank * size, (sp_rank + 1) * size)
    place = torch.cat(places)[mine]
    predicts = place > 0
    keep = (predicts & mask.flatten()[place]).nonzero()[:, 0]
    index = place[keep]
    flat = ids.flatten()
    return Packed(
        ids=flat[place - 1].where(predicts, 0)[None],
        position_ids=torch.cat(positions)[None, mine],
        keep=keep,
        targets=flat[index],
        index=index,
        cu_seqlens=torch.tensor([0, *fed], device=device).cumsum(0).int(),
        max_seqlen=max(fed),
    )


def unpack(parts: list[tuple[Tensor, Tensor]], like: Tensor, ranks: Ranks) -> Tensor:
    """The way back: (index, value) parts of packed rows, of all ranks -> fp32 tensor shaped as
    `like` (B, T_max), equal on every rank, 0 where nobody has a value."""
    full = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    for index, value in parts:
        full.view(-1)[index] = value.detach()
    if ranks.world > 1:
        dist.all_reduce(full)
    return full


def packed_forward(model: nn.Module, p: Packed, sp_group, **options) -> Tensor:
    """What the model's head says of one packed row, (slots, outputs) fp32. No cache and no
    attention mask: with either, transformers lets packed sequences see each other under every
    attention function but ours."""
    where = {"cu_seqlens": p.cu_seqlens, "max_seqlen": p.max_seqlen, "sp_group": sp_group}
    if model.config._attn_implementation.startswith("flash"):
        # transformers' names for the same; without them it counts again in every layer
        where |= {"cu_seq_lens_q": p.cu_seqlens, "cu_seq_lens_k": p.cu_seqlens}
        where |= {"max_length_q": p.max_seqlen, "max_length_k": p.max_seqlen}
    out = model(input_ids=p.ids, position_ids=p.position_ids, use_cache=False, **where, **options)
    return out.logits[0].float()


def policy_forward(
    policy: nn.Module, p: Packed, temperature: float, sp_group=None
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy at every response token of a packed row, both (K,), in nats. The
    policy's head is a LogprobHead."""
    policy.lm_head.targets = p.targets
    policy.lm_head.temperature = temperature
    return packed_forward(policy, p, sp_group, logits_to_keep=p.keep).unbind(-1)


def critic_forward(critic: nn.Module, p: Packed, sp_group=None) -> Tensor:
    """Values at every response token of a packed row, (K,)."""
    return packed_forward(critic, p, sp_group)[p.keep, 0]


# ------------------------------------------------------------------------- attention on packed rows

HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """Causal attention inside each sequence of a packed row; q (T, Hq, D), k and v (T, Hkv, D) ->
    (T, Hq, D). No (T, T) mask exists anywhere, so memory is linear in T and sequences cannot see
    each other."""
    if not q.is_cuda:
        return _varlen_cpu(q, k, v, cu_seqlens, scale)
    q = q.to(v.dtype)  # under autocast RoPE leaves q and k in fp32
    k = k.to(v.dtype)
    where = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    if HAS_FLASH_ATTN:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *where, softmax_scale=scale, causal=True)
    from torch.nn.attention.varlen import varlen_attn

    copies = q.shape[1] // k.shape[1]  # torch 2.11 has no enable_gqa
    k = k.repeat_interleave(copies, dim=1)
    v = v.repeat_interleave(copies, dim=1)
    return varlen_attn(q, k, v, *where, scale=scale, window_size=(-1, 0))


def _varlen_cpu(q, k, v, cu_seqlens, scale):
    lengths = cu_seqlens.diff().tolist()
    attended = []
    # split, and not slices: the gradient of a slice is as long as the row
    for sequence in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
        heads_first = [x.transpose(0, 1)[None] for x in sequence]  # (1, H, tokens, D)
        attended.append(
            scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale, enable_gqa=True)
        )
    return torch.cat(attended, dim=2)[0].transpose(0, 1)


def all_to_all(x: Tensor, group: dist.ProcessGroup, split: int, joined: int) -> Tensor:
    """Every rank cuts its x along dimension `split`, sends each peer a piece, and joins what it
    gets along `joined`; the gradient goes the way back."""
    sent = torch.stack(x.chunk(dist.get_world_size(group), split)).contiguous()
    received = all_to_all_single(torch.empty_like(sent), sent, group=group)
    return torch.cat(received.unbind(0), joined)


def packed_attention(
    module, query, key, value, attention_mask, scaling, cu_seqlens, max_seqlen, sp_group=None, **_
):
    """transformers' attention interface; query (1, H, T, D). With a group of n ranks, Ulysses
    (arXiv:2309.14509): each rank holds T/n tokens of all heads outside attention, and all tokens of
    H/n heads inside it."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if sp_group is None:
        return varlen_attention(q, k, v, cu_seqlens, max_seqlen, scaling)[None], None
    if k.shape[1] % dist.get_world_size(sp_group):
        # fewer kv heads than ranks: with a copy for each query head, every rank gets those it needs
        copies = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(copies, dim=1)
        v = v.repeat_interleave(copies, dim=1)
    q, k, v = (all_to_all(x, sp_group, split=1, joined=0) for x in (q, k, v))  # (T, H / n, D)
    out = varlen_attention(q, k, v, cu_seqlens, max_seqlen, scaling)
    return all_to_all(out, sp_group, split=0, joined=1)[None], None


def setup(
    model_type: str, progress: bool, bf16: bool, attention: str = "varlen", liger: bool = True
) -> dict:
    """Before any model is made: attn_implementation="varlen" becomes known to transformers (which
    then builds no mask), Liger patches its layers, and no report comes on the value head being new.
    Returns what will be used for what. ValueError: this machine has no kernel for what is asked."""
    from transformers import AttentionInterface
    from transformers.utils import logging

    cuda = torch.cuda.is_available()
    if cuda and not bf16:
        raise ValueError(
            "dtype=fp32 is for CPU: the packed attention kernels of CUDA take bf16 only, "
            "use --dtype bf16"
        )
    if attention == "flash_attention_2" and not HAS_FLASH_ATTN:
        raise ValueError(
            "attention=flash_attention_2 needs the package flash-attn: install it or use varlen"
        )
    logging.set_verbosity_error()
    if progress:
        logging.enable_progress_bar()
    else:
        logging.disable_progress_bar()
    AttentionInterface.register("varlen", packed_attention)

    if attention != "varlen":
        inside = f"{attention} of transformers"
    elif not cuda:
        inside = "per-sequence sdpa"
    elif HAS_FLASH_ATTN:
        inside = "flash-attn varlen"
    else:
        inside = "torch varlen"
    sharding = "none (one process)"
    if "RANK" in os.environ:
        sharding = f"FSDP2 over {os.environ['WORLD_SIZE']} ranks"
    dtype = "bfloat16" if bf16 else "float32"
    return {
        "attention": inside,
        "log-probs": find_liger_logprobs() if liger else "chunked",
        "Liger": apply_liger(model_type) if liger else "off",
        "compute": f"{dtype} on {'cuda' if cuda else 'cpu'}",
        "sharding": sharding,
    }


# ---------------------------------------------------------- log-prob and entropy without the logits


def token_logprobs_ref(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The specification. hidden (K, D), weight (V, D), targets (K,) -> log-prob and entropy in
    nats, both (K,) fp32."""
    logits = (hidden @ weight.T).float()  # (K, V): the memory we do not want
    logp = torch.log_softmax(logits / temperature, dim=-1)
    logprob = logp.gather(-1, targets[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return logprob, entropy


class _ChunkedLogprob(torch.autograd.Function):
    """The same with at most `size` logits in a piece: some rows forward; backward, where they are
    computed again, some columns, each of which is the whole story of its row of weight's gradient
    (pieces of rows would add up V x D numbers every time). In place where it can be: passes over a
    piece are what takes the time.

    Gradients with z = logits / temperature, p = softmax(z), H the entropy:
        d logp / dz = onehot - p        d H / dz = -p (log p + H)"""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, size):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        step = max(1, size // len(weight))
        pieces = []
        targets = targets[:, None]  # (K, 1), as all numbers of a row
        for some, target in zip(hidden.split(step), targets.split(step)):
            z = (some @ weight.T).to(wide).div_(temperature)
            logp = z.log_softmax(-1)  # logsumexp - sum(p z) would cancel where p is peaked
            logprob = logp.gather(-1, target)
            logsumexp = z.gather(-1, target) - logprob
            p = torch.exp(logp, out=z)  # z is not needed any more
            pieces.append((logprob, logsumexp, -p.mul_(logp).sum(-1, keepdim=True)))
        logprob, logsumexp, entropy = map(torch.cat, zip(*pieces))
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropy)
        ctx.temperature = temperature
        ctx.size = size
        return logprob[:, 0], entropy[:, 0]

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, targets, logsumexp, entropy = ctx.saved_tensors
        of_logprob = grad_logprob[:, None] / ctx.temperature
        of_entropy = grad_entropy[:, None] / ctx.temperature
        # the gradient of a column's z is  onehot * of_logprob - p * (of_entropy * log p + both)
        both = of_logprob + of_entropy * entropy
        grad_hidden = torch.zeros_like(hidden, dtype=logsumexp.dtype)
        grad_weight = torch.empty_like(weight)
        step = max(1, ctx.size // max(1, len(hidden)))
        for first in range(0, len(weight), step):
            columns = slice(first, first + step)
            some = weight[columns]
            z = (hidden @ some.T).to(logsumexp.dtype).div_(ctx.temperature)
            grad = z.sub_(logsumexp)  # log p, in whose place the gradient is made
            p = grad.exp()
            grad.mul_(-of_entropy).sub_(both).mul_(p)
            # Targets whose column is in another piece add 0 somewhere: to choose the others, one
            # would have to wait for the device.
            column = targets - first
            inside = (column >= 0) & (column < len(some))
            grad.scatter_add_(-1, column.clamp(0, len(some) - 1), of_logprob * inside)
            grad = grad.to(hidden.dtype)
            grad_hidden += grad @ some
            grad_weight[columns] = grad.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """token_logprobs_ref with no more logits alive than three pieces of 128 MB (on CPU 16 MB: near
    its cache, and small enough for malloc to use it again), differentiable in hidden and weight.
    Liger's kernel for Hopper rounds entropies, and sums of the head's gradient, to bf16."""
    if LIGER_LOGPROB and hidden.is_cuda and hidden.dtype == torch.bfloat16 and len(targets):
        nll, entropy = LIGER_LOGPROB(hidden, weight, targets, temperature, -100, 1, True)
        return -nll, entropy.float()
    megabytes = 128 if hidden.is_cuda else 16
    size = megabytes * 2**20 // 4  # logits of a piece, 4 bytes each
    return _ChunkedLogprob.apply(hidden, weight, targets, temperature, size)


class LogprobHead(nn.Linear):
    """An lm_head that answers with (log-prob, entropy) of given targets instead of logits: (1, K,
    2) in place of (1, K, V). Being the head itself, FSDP gathers its weight (and a tied
    embedding's) at the right time."""

    targets: Tensor | None = None
    temperature = 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        if self.targets is None:
            return super().forward(hidden)
        weight = self.weight
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden = hidden.to(dtype)
            weight = weight.to(dtype)
        both = token_logprobs(hidden[0], weight, self.targets, self.temperature)
        return torch.stack(both, dim=-1)[None]


# -------------------------------------------------------------------------------------------- Liger

# Liger's fused linear + scaled cross entropy, once `find_liger_logprobs` has seen it work
LIGER_LOGPROB = None
LIGER_PATCHES = ("llama", "qwen2", "qwen3")


def find_liger_logprobs() -> str:
    """Tries Liger's log-prob kernel for Hopper (pip install "liger-kernel[cutedsl]"), forward and
    backward, against the specification: what cannot be imported, compiled or trusted must not hurt
    a run later. Says what was chosen."""
    global LIGER_LOGPROB
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "chunked"
    try:
        from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90 as sm90

        LIGER_LOGPROB = sm90.LigerFusedScaledCrossEntropySM90Function.apply
        errors = _errors_of_token_logprobs()
        assert all(error < 0.03 for error in errors), f"relative errors {errors}"
        return "Liger's kernel for Hopper"
    except Exception as error:  # a missing package, a compiler, a driver: anything
        LIGER_LOGPROB = None
        return f"chunked (Liger's kernel for Hopper: {type(error).__name__}: {str(error)[:80]})"


def _errors_of_token_logprobs() -> list[float]:
    """Relative, in norms: of log-prob, entropy and both gradients on random inputs in bf16 on
    CUDA."""
    hidden, weight = (
        torch.randn(count, 128, device="cuda").div_(8).bfloat16().requires_grad_()
        for count in (3000, 1000)
    )
    targets = torch.arange(3000, device="cuda") % 1000
    results = []
    for function in (token_logprobs_ref, token_logprobs):
        outputs = function(hidden, weight, targets, 0.7)
        gradients = torch.autograd.grad(sum(outputs).sum(), (hidden, weight))
        results.append([x.float() for x in (*outputs, *gradients)])
    return [((x - y).norm() / x.norm()).item() for x, y in zip(*results)]


def apply_liger(model_type: str) -> str:
    """Patches RMSNorm and SwiGLU of one architecture, before its models are made; RoPE stays off,
    as in the original run. Says what was done. Liger's own fused cross entropy only acts when
    labels are passed, so never in PPO: token_logprobs is what it promised."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "off (Triton kernels need a GPU)"
    if not (which("cc") or which("gcc") or which("clang")):
        return "off (Triton needs a C compiler)"
    if not importlib.util.find_spec("liger_kernel"):
        return "off (liger-kernel is not installed)"
    if model_type not in LIGER_PATCHES:
        return f"off (patches are for {', '.join(LIGER_PATCHES)}, not {model_type})"
    import liger_kernel.transformers as liger

    getattr(liger, f"apply_liger_kernel_to_{model_type}")(
        rope=False,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        rms_norm=True,
        swiglu=True,
    )
    return "RMSNorm, SwiGLU"


# -------------------------------------------------------------------------------- python kernels.py


def demo():
    """Three sequences end to end in one row: what each slot reads and predicts, and the log-prob of
    that under a random model; beside it that of plain transformers, one sequence at a time."""
    from torch.nn.utils.rnn import pad_sequence
    from transformers import Qwen2Config, Qwen2ForCausalLM

    setup("qwen2", progress=False, bf16=True, liger=False)
    sequences = [[11, 12, 13, 14], [21, 22, 23], [31, 32, 33, 34, 35]]  # the first two: the prompt
    ids = pad_sequence([torch.tensor(row) for row in sequences], batch_first=True)
    mask = (ids > 0) & (torch.arange(ids.shape[1]) >= 2)
    p = pack(ids, mask, [len(row) for row in sequences], rows=[0, 1, 2])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 40}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    alone = []
    with torch.no_grad():
        for row in map(torch.tensor, sequences):
            logp = model(row[None]).logits[0, 1:-1].log_softmax(-1)
            alone += logp.gather(1, row[2:, None])[:, 0].tolist()
        model.lm_head.__class__ = LogprobHead
        model.set_attn_implementation("varlen")
        packed = policy_forward(model, p, temperature=1.0)[0].tolist()
    predicted = dict(zip(p.keep.tolist(), zip(p.targets.tolist(), packed, alone)))
    print("slot  position  reads  predicts  log-prob  log-prob when alone")
    for slot, (token, position) in enumerate(zip(p.ids[0].tolist(), p.position_ids[0].tolist())):
        said = "{:8d}  {:8.4f}  {:8.4f}".format(*predicted[slot]) if slot in predicted else ""
        print(f"{slot:4d}  {position:8d}  {token:5d}  {said or '       -'}")
    print(f"cu_seqlens, where sequences begin and end: {p.cu_seqlens.tolist()}")


if __name__ == "__main__":
    import sys

    del sys.path[0]  # or transformers takes this file for Hugging Face's package
    demo()
