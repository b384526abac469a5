"""Speed and memory at real sizes, with random weights: no download. gpu.py starts the parts, each
under torchrun with one rank, so that models are sharded by FSDP2 and compute in bf16 as in training:

    bench     the settings of the reference run: MFU, peak memory by phase, log-probs, sync
    vllm      engine and trainer on one card: sleep, wake, new weights, tokens a second
    levers    one setting changed at a time
"""

import math
import random
import statistics
import tempfile

import torch
from gpu import (
    ARGS,
    BF16,
    COMPILER,
    CUDA,
    HAS,
    attempt,
    check,
    free,
    gb,
    has_liger_logprobs,
    liger,
    liger_logprobs,
    now,
    row,
    seconds,
    shaped,
    skip,
)

import data
import kernels
import rollout
from infra import clock, flops, models
from infra.dist import Ranks, start_ranks

SHAPES = {
    "1.5B": dict(  # R1-Distill-Qwen-1.5B
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        intermediate_size=8960,
        vocab_size=151_936,
        tie_word_embeddings=False,
    ),
    "0.5B": dict(  # Qwen2.5-0.5B
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=4864,
        vocab_size=151_936,
        tie_word_embeddings=True,
    ),
}
BUDGET, MEDIAN, LONGEST, PROMPT, SAMPLES = 18_000, 3000, 16_384, 100, 64
if not CUDA:
    tiny = dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=96,
        vocab_size=500,
    )
    SHAPES = {name: tiny | {"tie_word_embeddings": name == "0.5B"} for name in SHAPES}
    BUDGET, MEDIAN, LONGEST, PROMPT = 300, 50, 273, 10
LEVERS = {
    "checkpointing": True,
    "liger": HAS["liger_kernel"] and COMPILER and CUDA,
    "attention": "varlen",
}


def workload() -> list[kernels.Packed]:
    """64 samples of a rank, response lengths log-normal with a long tail, packed under the budget as in training."""
    rng = random.Random(0)
    answers = [
        min(LONGEST, max(1, round(rng.lognormvariate(math.log(MEDIAN), 0.8))))
        for _ in range(SAMPLES)
    ]
    lengths = [PROMPT + n for n in answers]
    noise = torch.Generator().manual_seed(0)
    vocabulary, at = SHAPES["1.5B"]["vocab_size"], torch.arange(max(lengths))
    ids = torch.randint(2, vocabulary, (SAMPLES, max(lengths)), generator=noise).to(ARGS.device)
    mask = ((at >= PROMPT) & (at < torch.tensor(lengths)[:, None])).to(ARGS.device)
    plan = data.plan_microbatches([n - 1 for n in lengths], BUDGET)[0]
    return [kernels.pack(ids, mask, lengths, rows) for rows in plan]


def forward_flops(model, micro: list[kernels.Packed]) -> float:
    """Of the model, not of the machine: 2 x parameters without embedding x tokens + 2 x hidden x
    vocabulary x response tokens (policy) + 2 x layers x width of q x sum of squared lengths (causal
    attention); a backward has twice as many. What checkpointing computes again does not count."""
    fed = [n for p in micro for n in p.cu_seqlens.diff().tolist()]
    return flops.forward_flops(model, fed, sum(len(p.targets) for p in micro))


def trainee(
    size: str, critic: bool, accelerator, levers: dict, offload: bool = False
) -> models.Trained:
    """A model made on the card and sharded, and its optimizer."""
    with liger("qwen2", levers["liger"]), torch.device(ARGS.device):
        model = shaped(critic, levers["attention"], initializer_range=0.02, **SHAPES[size])
    if not critic:
        model.lm_head.__class__ = kernels.LogprobHead
    model = models.shard(model, accelerator, levers["checkpointing"], offload)
    adam = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    return models.Trained(model, torch.optim.AdamW(model.parameters(), **adam))


def run(model, p: kernels.Packed, critic: bool, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = (
            kernels.critic_forward(model, p) if critic else kernels.policy_forward(model, p, 1.0)[0]
        )
    if backward:
        (out * torch.linspace(-1, 1, len(out), device=out.device)).mean().backward()


def speed(size: str, critic: bool, accelerator, micro: list, changed: dict) -> None:
    """Measured on two micro-batches; scaled by their floating-point operations to all of the 64 samples, with one
    AdamW step for all of them."""
    levers, some, fused = LEVERS | changed, micro[:2], kernels.LIGER_LOGPROB
    kernels.LIGER_LOGPROB = fused if levers["liger"] else None
    try:
        trained = trainee(size, critic, accelerator, levers)
        model = trained.model
        forward_s = seconds(lambda: [run(model, p, critic, False) for p in some])
        free()
        passes, steps = [], []
        for _ in range(4):  # the first warms up
            began = now()
            for p in some:
                run(model, p, critic, True)
            passes.append(now() - began)
            models.optimizer_step(trained, 1e-6, max_norm=1.0)
            steps.append(now() - began - passes[-1])
    finally:
        kernels.LIGER_LOGPROB = fused
    work, peak = forward_flops(model, micro), flops.roofline().flops
    scale, step_s = work / forward_flops(model, some), statistics.median(steps[1:])
    forward_s, update_s = forward_s * scale, statistics.median(passes[1:]) * scale + step_s
    cells = {"update MFU": 3 * work / update_s / peak, "forward MFU": work / forward_s / peak}
    cells |= {
        "update tokens/s": sum(p.ids.numel() for p in micro) / update_s,
        "peak GB": gb("max_memory_allocated"),
    }
    cells |= {"update s": update_s, "forward s": forward_s, "of it AdamW s": step_s}
    row("speed", model=size, what="critic" if critic else "policy", **levers, **cells)


def phases(
    accelerator, micro: list, title: str, naive: bool = False, offload: bool = False, **changed
) -> None:
    """Peak GB with policy and critic of 1.5B on the card. "resident": weights and AdamW's states."""
    fast = kernels.token_logprobs
    if naive:
        kernels.token_logprobs = kernels.token_logprobs_ref
    fullest, cells = max(micro, key=lambda p: p.ids.numel()), {}
    try:
        pair = []
        for critic in (False, True):
            pair.append(trainee("1.5B", critic, accelerator, LEVERS | changed, offload))
        for phase in ("warm-up", "forward", "update policy", "update critic"):
            free()
            began = now()
            for critic in {"update policy": [0], "update critic": [1]}.get(phase, [0, 1]):
                run(pair[critic].model, fullest, bool(critic), phase != "forward")
                if phase != "forward":
                    models.optimizer_step(pair[critic], 1e-6, max_norm=1.0)
                models.reshard(pair[critic].model)  # a forward alone leaves the head gathered
            cells |= {f"{phase} GB": gb("max_memory_allocated"), f"{phase} s": now() - began}
            if phase == "warm-up":
                free()
                cells = {"resident GB": gb("memory_allocated")}
        row("memory", lever=title, **cells)
    finally:
        kernels.token_logprobs = fast


def head(f, name: str) -> None:
    """Forward and backward of log-prob and entropy alone."""
    K, V, D = (18_000, 151_936, 1536) if CUDA else (300, 3001, 64)
    hidden, weight = (
        torch.randn(n, D, device=ARGS.device, dtype=BF16).div_(D**0.5).requires_grad_()
        for n in (K, V)
    )
    targets = torch.randint(V, (K,), device=ARGS.device)

    def both():
        logprob, entropy = f(hidden, weight, targets, 1.0)
        torch.autograd.grad(logprob.sum() + 0.01 * entropy.sum(), (hidden, weight))

    free()
    before = gb("memory_allocated")
    cells = {"s": seconds(both), "peak GB": gb("max_memory_allocated") - before}
    row("log-probs", name=name, size=f"{K} x {V} x {D}", **cells)


def sync(accelerator) -> None:
    """full_weights of the sharded policy in bf16, into a plain bf16 model by TorchSampler.load."""
    policy = trainee("1.5B", False, accelerator, LEVERS).model
    sampler = rollout.TorchSampler.__new__(
        rollout.TorchSampler
    )  # without __init__, which wants a folder
    with torch.device(ARGS.device):
        sampler.model = shaped(False, "sdpa", **SHAPES["1.5B"]).to(BF16)
    load_s = seconds(lambda: sampler.load(models.full_weights(policy, BF16)))
    row("sync", model="1.5B", engine="TorchSampler (a plain bf16 model)", **{"load s": load_s})


def matmul(n: int) -> float:
    a, b = (torch.randn(n, n, device=ARGS.device, dtype=BF16) for _ in range(2))
    return 10 * 2 * n**3 / seconds(lambda: [a @ b for _ in range(10)], 5)


def engine(accelerator) -> None:
    """As ppo.py does it: the engine first, asleep, then the models; wake, load, sample, sleep."""
    answer = 512 if CUDA else 16
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(ARGS.device):
            shaped(False, "sdpa", initializer_range=0.02, **SHAPES["1.5B"]).to(
                BF16
            ).save_pretrained(folder)
        free()
        began = now()
        sampler = rollout.make_sampler(
            "vllm",
            folder,
            eos_ids=[1],
            max_len=PROMPT + answer,
            max_seqs=SAMPLES,
            dtype="bfloat16",
            gpu_memory=0.4,
        )
        times = {"start s": now() - began}
    sampler.sleep()
    policy = trainee("1.5B", False, accelerator, LEVERS)
    rng = random.Random(1)
    prompts = [
        [rng.randrange(2, SHAPES["1.5B"]["vocab_size"]) for _ in range(PROMPT)]
        for _ in range(SAMPLES)
    ]
    calls = {
        "wake s": sampler.wake,
        "load s": lambda: sampler.load(models.full_weights(policy.model, BF16)),
        "sample s": lambda: sampler.sample(prompts, 1, answer, 1.0, 0),
        "sleep s": sampler.sleep,
    }
    samples: list = []
    for _ in range(2):  # the first time is longer; the second counts
        for name, call in calls.items():
            began = now()
            answers = call()
            times[name] = now() - began
            samples = answers or samples
    tokens = sum(len(sample.ids) for sample in samples)
    row(
        "sync",
        model="1.5B",
        engine="vLLM",
        **times,
        **{"sampled tokens/s": tokens / times["sample s"]},
    )
    critic = trainee("1.5B", True, accelerator, LEVERS)
    fullest = max(workload(), key=lambda p: p.ids.numel())
    peaks: dict[str, float] = {}
    for trained in (policy, critic):  # asleep: what has to fit beside it
        with clock.timed(peaks, "update"):
            run(trained.model, fullest, trained is critic, backward=True)
            models.optimizer_step(trained, 1e-6, max_norm=1.0)
    with clock.timed(peaks, "sync"):
        sampler.load(models.full_weights(policy.model, BF16))
        samples = sampler.sample(prompts, 1, answer, 1.0, 0)
    row(
        "memory beside vLLM",
        **{f"{phase} GB": peaks[f"perf/peak_gb_{phase}"] for phase in ("update", "sync")},
    )
    batch = rollout.collate(prompts, samples, ARGS.device)
    plan = data.plan_microbatches([n - 1 for n in batch.lengths], BUDGET)[0]
    micro = [kernels.pack(batch.ids, batch.mask, batch.lengths, rows) for rows in plan]
    with torch.no_grad():
        parts = [(p.index, kernels.policy_forward(policy.model, p, 1.0)[0]) for p in micro]
    gaps = (kernels.unpack(parts, batch.mask, Ranks()) - batch.engine_logprobs).abs()
    gap = gaps.sum().item() / batch.mask.sum().item()
    check("vLLM against the trainer at 1.5B: log-probs, mean error in nats", gap, 0.05)
    sampler.close()


def main(part: str) -> None:
    with liger("qwen2", False):  # takes the patches back: each model says whether it wants them
        made = kernels.setup("qwen2", liger=LEVERS["liger"], progress=False, bf16=True)
    accelerator, _ = start_ranks(bf16=True, sp=1)
    if part == "vllm":
        return attempt("vLLM beside the trainer", engine, accelerator)
    micro = workload()

    def measure(size: str, critic: bool = False, **changed) -> None:
        title = f"speed of {size} {'critic' if critic else 'policy'} {changed or ''}"
        attempt(title, speed, size, critic, accelerator, micro, changed, measure=True)

    if part == "bench":
        rate = matmul(8192 if CUDA else 256)
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 2**30 if CUDA else 0.0
        row("made", **made, GB=gigabytes, **{"a measured matmul": f"{rate / 1e12:.4g} TFLOP/s"})
        tokens, answers = sum(p.ids.numel() for p in micro), sum(len(p.targets) for p in micro)
        cells = {"micro-batches": len(micro), "tokens": tokens, "response tokens": answers}
        row("load", samples=SAMPLES, **cells, fill=tokens / BUDGET / len(micro))
        measure("1.5B")
        measure("1.5B", critic=True)
        attempt("sync", sync, accelerator, measure=True)
        levers = {
            "as in training": {},
            "no checkpointing": {"checkpointing": False},
            "offload": {"offload": True},
        }
        levers["naive log-probs"] = {"naive": True}
        for title, changed in levers.items():
            attempt(f"memory {title}", phases, accelerator, micro, title, measure=True, **changed)
        measure("0.5B")
        measure("0.5B", critic=True)
        kernels.LIGER_LOGPROB = None
        functions = {"chunked": kernels.token_logprobs, "naive": kernels.token_logprobs_ref}
        if why := has_liger_logprobs():
            skip("log-probs by Liger", why)
        else:
            functions["Liger's scaled cross entropy"] = liger_logprobs
        for name, f in functions.items():
            attempt(f"log-probs, {name}", head, f, name, measure=True)
        return
    measure("1.5B", checkpointing=False)
    measure("0.5B", checkpointing=False)
    if LEVERS["liger"]:
        measure("1.5B", liger=False)
        measure("1.5B", liger=False, checkpointing=False)
    else:
        skip("speed with Liger", "wants a GPU, a C compiler for Triton and liger_kernel")
    measure("1.5B", attention="sdpa")
    if CUDA and COMPILER:
        measure("1.5B", attention="flex_attention")
    else:
        skip(
            "speed with flex_attention",
            "no C compiler for Triton" if CUDA else "flex has no backward on CPU",
        )
    if HAS["flash_attn"] and CUDA:
        measure("1.5B", attention="flash_attention_2")
        kernels.HAS_FLASH_ATTN = False
        measure("1.5B", attention="varlen")  # so far it was flash-attn's, this is torch's
    else:
        skip("speed with flash_attention_2", "no flash_attn package")
    measure("1.5B", critic=True, checkpointing=False)


if __name__ == "__main__":
    main(ARGS.part)
    if torch.distributed.is_initialized():  # vLLM's end has done it
        torch.distributed.destroy_process_group()
