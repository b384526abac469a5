"""Each CUDA path against the CPU in fp32, with the same weights and inputs. gpu.py starts the parts:

    python tools/gpu/gpu_checks.py checks         one plain process, as `python ppo.py` is
    torchrun ... tools/gpu/gpu_checks.py fsdp     one rank, FSDP2

Where both sides round to bf16 a path may err at most twice as much as PyTorch's plain way does on the
same card.
"""

import math
import tempfile
from pathlib import Path

import torch
from gpu import (
    ARGS,
    BF16,
    COMPILER,
    CUDA,
    FP32,
    HAS,
    attempt,
    check,
    distance,
    has_liger_logprobs,
    liger,
    liger_logprobs,
    shaped,
    skip,
)
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import kernels
from infra import models
from infra.dist import Ranks, start_ranks

# ----------------------------------------------------------------------------------------- part "checks": the kernels


def attention_kernel(size: int, flash: bool) -> None:
    """kernels.varlen_attention forward and backward, against torch's sdpa on each sequence alone."""
    lengths, heads, kv, scale = [1, 7, 300, 129, 64, 1, 1000, 2, 513], 12, 2, 0.1
    noise = torch.Generator().manual_seed(size)
    q, k, v, g = (
        torch.randn(sum(lengths), h, size, generator=noise).to(BF16) for h in (heads, kv, kv, heads)
    )
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()

    def packed(q, k, v):
        return kernels.varlen_attention(q, k, v, bounds.to(q.device), max(lengths), scale)

    def each(q, k, v):
        split = [x.repeat_interleave(heads // x.shape[1], 1).split(lengths) for x in (q, k, v)]
        outputs = []
        for part in zip(*split):  # (tokens, heads, size) of one sequence, three times
            rows = [x.transpose(0, 1)[None] for x in part]
            out = scaled_dot_product_attention(*rows, is_causal=True, scale=scale)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    def run(f, device: str, dtype):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = f(*inputs)
        return [out, *torch.autograd.grad(out, inputs, g.to(device, dtype))]

    kernels.HAS_FLASH_ATTN = flash
    want, plain, got = (
        run(packed, "cpu", FP32),
        run(each, ARGS.device, BF16),
        run(packed, ARGS.device, BF16),
    )
    kernels.HAS_FLASH_ATTN = HAS["flash_attn"]
    for name, w, p, found in zip(("out", "dq", "dk", "dv"), want, plain, got):
        title = f"{'flash-attn' if flash else 'torch'} varlen attention, heads of {size}: {name}"
        check(title, distance(found, w), 2 * distance(p, w))


def ragged(device: str, lengths=(9, 64, 70, 130, 33), vocab: int = 1000):
    """ids (B, T), a mask of responses, lengths."""
    noise = torch.Generator().manual_seed(3)
    ids = torch.randint(2, vocab, (len(lengths), max(lengths)), generator=noise)
    at = torch.arange(max(lengths))
    mask = (at >= 3) & (at < torch.tensor(lengths)[:, None])
    return ids.to(device), mask.to(device), list(lengths)


def leak(attention: str, training: bool) -> None:
    """One sequence of a packed row gets other tokens: the outputs of all others stay bit for bit what they were, and
    the gradient of these outputs is exactly zero on its embeddings."""
    torch.manual_seed(0)
    model = shaped(False, attention).to(ARGS.device, BF16).train(training)
    ids, mask, lengths = ragged(ARGS.device)
    other = ids.clone()
    other[2] = (ids[2] + 17) % 1000
    row_of = [kernels.pack(x, mask, lengths, range(len(lengths))) for x in (ids, other)]
    a, b = row_of[0].cu_seqlens[2:4].tolist()  # the slots of sequence 2
    changed = torch.zeros(row_of[0].ids.shape[1], dtype=torch.bool, device=ARGS.device)
    changed[a:b] = True
    backward, kept = CUDA or attention != "flex_attention", []  # flex has no backward on CPU
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: kept.append(output)
    )
    with torch.set_grad_enabled(backward):
        first, second = (kernels.packed_forward(model, p, None) for p in row_of)
    title = f"leak, {attention}, {'train' if training else 'eval'}:"
    check(
        f"{title} outputs of untouched sequences that change",
        (first != second)[~changed].sum().item(),
        0,
    )
    check(
        f"{title} outputs of the changed one that stay",
        (first == second)[changed].all(-1).sum().item(),
        0,
    )
    if backward:
        (gradient,) = torch.autograd.grad(first[~changed].square().sum(), kept[0])
        check(
            f"{title} gradient that arrives at another sequence",
            gradient[0, changed].abs().max().item(),
            0.0,
        )
        dead = (gradient[0, ~changed].abs().amax(-1) == 0).sum().item()
        check(f"{title} slots whose own gradient is lost", dead, 0)


def logprob_kernel(f, name: str, dtype, floor: float, entropy_floor: float) -> None:
    """bf16: against fp64, and the plain computation; fp32: against the specification on the CPU."""
    K, D, V = (300, 256, 151_936) if CUDA else (300, 64, 3001)
    noise = torch.Generator().manual_seed(7)
    hidden, weight = (
        torch.randn(K, D, generator=noise).to(dtype),
        torch.randn(V, D, generator=noise),
    )
    weight = (weight * 3 / D**0.5).to(dtype)
    targets, weights = torch.randint(V, (K,), generator=noise), torch.randn(2, K, generator=noise)

    def wide(hidden, weight, targets, temperature):
        logp = torch.log_softmax(hidden @ weight.T / temperature, -1)
        return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def run(f, device: str, dtype):
        h, w = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
        out = f(h, w, targets.to(device), 0.7)
        loss = sum((o * w).sum() for o, w in zip(out, weights.to(device, out[0].dtype)))
        return [x.detach() for x in (*out, *torch.autograd.grad(loss, (h, w)))]

    want = (
        run(wide, "cpu", torch.float64)
        if dtype == BF16
        else run(kernels.token_logprobs_ref, "cpu", FP32)
    )
    plain = run(kernels.token_logprobs_ref, ARGS.device, dtype) if dtype == BF16 else want
    parts = ("log-prob", "entropy", "d hidden", "d weight")
    for part, w, p, found in zip(parts, want, plain, run(f, ARGS.device, dtype)):
        limit = max(2 * distance(p, w), entropy_floor if part == "entropy" else floor)
        check(f"{name}, {str(dtype)[6:]}, vocabulary {V}: {part}", distance(found, w), limit)


def liger_patches(model_type: str) -> None:
    """Patched models against plain ones: 1e-4 in fp32; in bf16 at most twice the plain model's own error."""
    torch.manual_seed(1)
    with torch.device(ARGS.device):
        plain = shaped(False, "sdpa", model_type)
        with liger(model_type) as said:
            patched = shaped(False, "sdpa", model_type)
    if CUDA or "RMSNorm" in said:
        missing = {"LigerRMSNorm", "LigerSwiGLUMLP"} - {type(m).__name__ for m in patched.modules()}
        check(f"Liger, {model_type}: kinds of modules that are not patched", len(missing), 0)
    patched.load_state_dict(plain.state_dict())
    ids = torch.randint(1000, (1, 257), generator=torch.Generator().manual_seed(2)).to(ARGS.device)

    def run(model, dtype):
        model = model.to(dtype)
        logits = model(ids, use_cache=False).logits.float()
        gradients = torch.autograd.grad(
            torch.log_softmax(logits, -1)[0, :, 5].sum(), list(model.parameters())
        )
        return logits, torch.cat([g.float().flatten() for g in gradients])

    want, found = run(plain, FP32), run(patched, FP32)
    for part, w, f, p, g in zip(
        ("logits", "gradients"), want, found, run(plain, BF16), run(patched, BF16)
    ):
        check(f"Liger ({said}), {model_type}, fp32: {part}", distance(f, w), 1e-4)
        check(f"Liger ({said}), {model_type}, bf16: {part}", distance(g, w), 2 * distance(p, w))


def tiny_folders(folder: Path) -> dict[str, str]:
    """Two Hugging Face folders with random weights: a policy, and a critic whose head is not zero."""
    torch.manual_seed(5)
    for name in ("policy", "critic"):
        model = shaped(name == "critic", "sdpa")
        with torch.no_grad():
            for p in (
                model.parameters()
            ):  # norms and biases too: with fresh ones many faults leave the numbers alone
                p.add_(0.02 * torch.randn_like(p))
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("policy", "critic")}


def unsharded(folders: dict[str, str]) -> dict:
    """The reference: plain models on the CPU in fp32."""
    how = {"dtype": FP32, "attn_implementation": "varlen"}
    policy = AutoModelForCausalLM.from_pretrained(folders["policy"], **how)
    policy.lm_head.__class__ = kernels.LogprobHead
    critic = AutoModelForTokenClassification.from_pretrained(folders["critic"], **how)
    return {"policy": policy, "critic": critic}


def loaded(folders: dict[str, str], accelerator, checkpointing: bool, **options) -> dict:
    options |= {"accelerator": accelerator, "checkpointing": checkpointing}
    policy = models.load_policy(folders["policy"], kernels.LogprobHead, **options)
    return {"policy": policy, "critic": models.load_critic(folders["critic"], **options)}


def passes(both: dict, device: str) -> dict[str, torch.Tensor]:
    """Log-probs, entropy and values of a ragged batch, and the gradients of both models, which stay in .grad too."""
    ids, mask, lengths = ragged(device)
    weights = (
        torch.randn(3, *mask.shape, generator=torch.Generator().manual_seed(4)).to(device)
        / mask.sum()
    )
    parts: dict[str, list] = {"log-prob": [], "entropy": [], "values": []}
    for rows in ([3, 0], [], [4, 1, 2]):
        p = kernels.pack(ids, mask, lengths, rows)
        outputs = [*kernels.policy_forward(both["policy"], p, 0.7)]
        outputs.append(kernels.critic_forward(both["critic"], p))
        sum((out * w.view(-1)[p.index]).sum() for out, w in zip(outputs, weights)).backward()
        for part, out in zip(parts.values(), outputs):
            part.append((p.index, out))
    result = {name: kernels.unpack(part, mask, Ranks()) for name, part in parts.items()}
    for name, model in both.items():  # to_local: of one rank, all of it
        gradients = [getattr(p.grad, "to_local", lambda g=p.grad: g)() for p in model.parameters()]
        result[f"{name} gradient"] = torch.cat([g.float().cpu().flatten() for g in gradients])
    return result


def compare(title: str, got: dict, want: dict) -> None:
    """bf16 against fp32: nats a token for log-probs, relative for the rest."""
    for name, w in want.items():
        found = got[name].cpu()
        if name in ("log-prob", "entropy"):
            check(
                f"{title}: {name}, mean error in nats",
                (found - w).abs().sum().item() / (w != 0).sum().item(),
                0.02,
            )
        else:
            check(f"{title}: {name}", distance(found, w), 0.03)


def small_models(folder: Path) -> None:
    """load_policy and load_critic under bf16 autocast against the CPU in fp32; checkpointing changes nothing."""
    folders = tiny_folders(folder)
    accelerator, _ = start_ranks(bf16=True, sp=1)
    want = passes(unsharded(folders), "cpu")
    results = [
        passes(loaded(folders, accelerator, checkpointing), ARGS.device)
        for checkpointing in (False, True)
    ]
    compare("bf16 autocast against CPU fp32", results[0], want)
    for (
        name
    ) in want:  # 0 where backward is deterministic; the varlen kernel adds up its dq with atomics
        check(
            f"gradient checkpointing against none: {name}",
            distance(results[1][name], results[0][name]),
            5e-3,
        )


def part_checks() -> None:
    kernels.setup("qwen2", liger=False, progress=False, bf16=True)
    for size in (64, 128):
        for flash in [False] + [True] * (HAS["flash_attn"] and CUDA):
            attempt(
                f"attention, heads of {size}, flash-attn {flash}", attention_kernel, size, flash
            )
    if not HAS["flash_attn"]:
        skip("flash-attn varlen attention", "no flash_attn package")
    for attention in ("varlen", "sdpa", "flex_attention", "flash_attention_2"):
        for training in (True, False):
            if attention == "flash_attention_2" and not (HAS["flash_attn"] and CUDA):
                skip(f"leak, {attention}", "no flash_attn package" if CUDA else "needs a GPU")
            elif attention == "flex_attention" and not COMPILER:
                skip(f"leak, {attention}", "no C compiler for Triton")
            else:
                attempt(f"leak, {attention}, train {training}", leak, attention, training)
    attempt(
        "log-probs", logprob_kernel, kernels.token_logprobs, "chunked log-probs", FP32, 1e-4, 1e-4
    )
    attempt(
        "log-probs", logprob_kernel, kernels.token_logprobs, "chunked log-probs", BF16, 1e-6, 1e-6
    )
    if why := has_liger_logprobs():
        skip("Liger's fused scaled cross entropy", why)
    else:  # its entropy comes in bf16: 2^-8
        attempt(
            "Liger log-probs",
            logprob_kernel,
            liger_logprobs,
            "Liger's scaled cross entropy",
            BF16,
            1e-6,
            2**-8,
        )
    for model_type in ("qwen2", "qwen3", "llama"):
        if HAS["liger_kernel"] and COMPILER:
            attempt(f"Liger, {model_type}", liger_patches, model_type)
        else:
            skip(
                f"Liger, {model_type}",
                "no liger_kernel package" if COMPILER else "no C compiler for Triton",
            )
    if HAS["accelerate"]:
        with tempfile.TemporaryDirectory() as folder:
            attempt("small models in bf16", small_models, Path(folder))
    skip(
        "sequence parallelism over nccl (--sp 2)",
        "not testable on one card: nccl takes one rank a card",
    )


# ------------------------------------------------------------------------------- part "fsdp": torchrun, one rank, FSDP2


def copied(model, dtype) -> dict[str, torch.Tensor]:
    # each is good until the next only
    return {name: x.cpu().clone() for name, x in models.full_weights(model, dtype)}


def sharded_step(title: str, folders: dict[str, str], accelerator, offload: bool) -> None:
    """Loading, passes, clipping, AdamW and full_weights under FSDP2 against plain models on the CPU in fp32."""
    plain = unsharded(folders)
    sharded = loaded(folders, accelerator, True, offload=offload)
    before = {name: copied(model, FP32) for name, model in sharded.items()}
    for name in sharded:
        given = dict(plain[name].named_parameters())
        same = given.keys() == before[name].keys() and all(
            torch.equal(before[name][key], given[key]) for key in given
        )
        check(f"{title}: {name}, weights that loading changed", 1 - same, 0)
    compare(title, passes(sharded, ARGS.device), passes(plain, "cpu"))
    for name, model in sharded.items():
        # with eps = 1 an update is nearly lr * gradient: without it, a tiny gradient's rounding decides on its sign
        adam = {"betas": (0.9, 0.95), "eps": 1.0, "weight_decay": 0.0}
        whole = torch.nn.utils.clip_grad_norm_(plain[name].parameters(), math.inf).item()
        limit = whole / 2  # so that clipping acts
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True, **adam)
        trained = models.Trained(model, optimizer)
        norm = models.optimizer_step(trained, 0.5, max_norm=limit).item()
        torch.nn.utils.clip_grad_norm_(plain[name].parameters(), limit)
        torch.optim.AdamW(plain[name].parameters(), lr=0.5, **adam).step()
        after, wanted = copied(model, FP32), dict(plain[name].named_parameters())
        moves = [
            torch.cat([(new[key] - x).flatten() for key, x in before[name].items()])
            for new in (after, wanted)
        ]
        check(f"{title}: {name}, gradient norm", abs(norm / (2 * limit) - 1), 0.02)
        check(f"{title}: {name}, change of the weights by AdamW", distance(*moves), 0.05)
        wrong = sum(
            not torch.equal(after[key].to(BF16), x) for key, x in copied(model, BF16).items()
        )
        check(f"{title}: {name}, tensors that full_weights has otherwise in bf16", wrong, 0)


def part_fsdp() -> None:
    kernels.setup("qwen2", liger=False, progress=False, bf16=True)
    accelerator, _ = start_ranks(bf16=True, sp=1)
    with tempfile.TemporaryDirectory() as folder:
        folders = tiny_folders(Path(folder))
        for title, offload in (("FSDP2", False), ("FSDP2 with offload", True)):
            attempt(title, sharded_step, title, folders, accelerator, offload)
        said = kernels.find_liger_logprobs()
        if kernels.LIGER_LOGPROB:
            attempt(said, sharded_step, f"FSDP2 with {said}", folders, accelerator, False)
        else:
            skip("FSDP2 with Liger's log-probs", said)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    {"checks": part_checks, "fsdp": part_fsdp}[ARGS.part]()
