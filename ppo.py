"""PPO for language models with verifiable rewards, in one file.

    python ppo.py --model DIR --task countdown3                       # one plain process, CPU or GPU
    torchrun --nproc_per_node 4 ppo.py --model DIR --task countdown   # sharded by FSDP2

One step is seven phases: sample, reward, forward, advantage, update, sync, report. `train` has them top to bottom, each
under a banner; the log, the metrics and the README use the same names.

Every rank holds the numbers of the whole step ((B, T) tensors, 18 MB each at 256 samples of 17k tokens). Only model
passes are split, so advantages, denominators and metrics need no collective and cannot depend on the number of ranks.

Not here on purpose: Ray, asynchronous rollouts, tools, LoRA, reward models, a Trainer class; a variant is a copy of the
file. The defaults follow Open-Reasoner-Zero (arXiv:2503.24290): no KL, gamma = lambda = 1.
"""
# isort: skip_file
import sys

sys.modules["kernels"] = None  # our kernels.py has the name of a Hugging Face package: say that package is absent ...
import transformers.integrations.hub_kernels  # noqa: F401  ... while transformers looks for it, once, here

del sys.modules["kernels"]
import math
import os
import random
import zlib
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

import data
import kernels
import rewards
import rollout
import runs

# B sequences of the step (all ranks)   T tokens (prompt + response, right-padded)   K response tokens of a micro-batch
# Every (B, T) tensor is aligned to the token it is about:
#   logprobs[:, t] = log pi(ids[:, t] | ids[:, :t])   values[:, t] = V(ids[:, :t])   mask[:, t] = policy chose ids[:, t]
# Without a shape beside it a tensor is (B, T), or (K,) inside a micro-batch. Log-probs, entropy and KL are in nats.

# --------------------------------------------------------------------------------------------------------------- flags


@dataclass
class Run:
    """what is run and where it is kept"""
    out: str = "runs/ppo"  # run folder; must not exist unless --resume auto
    seed: int = 0  # prompts, their order and every sampled token are functions of (seed, step)
    steps: int = 100  # PPO steps; 0: print the memory plan, sample and score one batch; with --eval_every only evaluate
    plan: tuple[int, float] | None = None  # 4 80: only print the memory plan, for 4 GPUs of 80 GB; needs no GPU
    resume: Literal["no", "auto"] = "no"  # auto: go on from the newest whole checkpoint, if there is one
    save_every: int = 0  # steps between checkpoints; the last step always has one
    save_minutes: float = 0.0  # minutes between checkpoints; 0: no clock
    keep_last: int = 3  # checkpoints that stay; 0: all
    keep_best: str = ""  # a metric, eval/correct say: a better one is saved at once, and the best one stays
    max_minutes: float = 0.0  # save and end after so many, as on SIGTERM; 0: never
    stall_minutes: float = 30.0  # a phase that takes longer is told with stacks; twice as long ends the run; 0: never
    eval_every: int = 0  # steps between evaluations on held-out rows, step 0 and the last included; 0: never
    eval_rows: int = 256  # held-out rows of each task
    eval_samples: int = 1  # answers to each of them
    eval_temperature: float = 1.0  # 0: greedy
    profile: int = 0  # forward, update and sync of this step go to OUT/profile, operation by operation; 0: none
    wandb: str | None = None  # Weights & Biases project; same keys as metrics.jsonl


@dataclass
class Model:
    """models, precision, sharding"""
    model: str = ""  # policy: Hugging Face folder or hub id
    critic_model: str | None = None  # start of the critic, may be smaller; default: the policy's
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of compute (weights: fp32). auto: bf16 on CUDA, else fp32
    gradient_checkpointing: bool = True  # recompute activations of policy and critic: more time, far less memory
    attention: Literal["varlen", "sdpa", "flash_attention_2", "flex_attention"] = "varlen"  # others: transformers' own
    liger: bool = True  # Liger's RMSNorm, SwiGLU and (on Hopper, where its extra is installed) log-probs, on CUDA
    offload: tuple[Literal["policy", "critic", "reference"], ...] = ()  # live in the machine's memory, step on its CPU
    replicas: int = 1  # copies of the sharded models (HSDP): one a node, say; 1: every rank holds another shard
    sp: int = 1  # ranks that share one packed row (Ulysses); must divide the attention heads and the world


@dataclass
class Sampling:
    """how prompts are answered"""
    engine: Literal["vllm", "torch"] = "vllm"  # torch: plain PyTorch, slow, for debugging
    prompts_per_step: int = 256  # over all ranks
    samples_per_prompt: int = 1  # answers to each prompt
    max_new_tokens: int = 1024  # response limit
    temperature: float = 1.0  # of sampling; the trainer divides its logits by the same number
    stop: tuple[str, ...] = ()  # texts that end a response and stay in it, besides every EOS id of the model
    tp: int = 1  # ranks that share one engine (tensor parallel)
    gpu_memory: float = 0.6  # share of the card for the engine while it is awake


@dataclass
class PPO:
    """the algorithm"""
    lr: float = 1e-6  # policy learning rate (AdamW)
    critic_lr: float = 5e-6  # critic learning rate
    warmup: int = 0  # optimizer steps of linear learning-rate warm-up, for both
    critic_warmup: int = 0  # first steps that train the critic alone
    ppo_epochs: int = 1  # passes over each batch
    minibatch_size: int | None = None  # samples per optimizer step; default: the whole batch
    max_tokens_per_microbatch: int = 18_000  # tokens a rank runs at once; hard
    gamma: float = 1.0  # discount
    lam: float = 1.0  # GAE lambda; 1: advantage = return - value
    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2  # 0.28 is DAPO's clip-higher
    value_clip: float = 0.0  # values move at most this far from the old ones; 0: no clipping
    entropy_coef: float = 0.0  # entropy bonus
    kl_coef: float = 0.0  # penalty on KL(policy || reference); 0: no reference model is loaded
    kl_in: Literal["reward-k1", "reward-k2", "reward-k3", "loss-k2", "loss-k3"] = "reward-k1"  # place and estimator
    kl_target: float | None = None  # adapt kl_coef towards this KL (arXiv:1909.08593); default: fixed
    tis_cap: float = 2.0  # truncated importance sampling between engine and trainer; 0: off


@dataclass
class Args(rewards.Rules, PPO, Sampling, data.Source, Model, Run):
    """Every knob, flat. Sizes are global; derived sizes are properties, printed, never accepted."""

    @property
    def batch_size(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def minibatch(self) -> int:
        return self.minibatch_size or self.batch_size

    @property
    def updates_per_step(self) -> int:
        return self.ppo_epochs * (self.batch_size // self.minibatch)

    @property
    def compute_dtype(self) -> torch.dtype:
        bf16 = self.dtype == "bf16" or (self.dtype == "auto" and torch.cuda.is_available())
        return torch.bfloat16 if bf16 else torch.float32


# what a resumed run may change; anything else would make it another run
FREE = {flag.name for flag in (*fields(Run), *fields(Model))} | {"tp", "gpu_memory", "max_tokens_per_microbatch"}
FREE -= {"seed", "model", "critic_model", "dtype", "keep_best"}


def parse_args(argv: list[str] | None = None) -> Args:
    boxes = make_dataclass("Boxes", [(c.__name__, c, field(default_factory=c)) for c in reversed(Args.__bases__)])
    parsed = tyro.cli(boxes, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True, args=argv)
    return Args(**{k: v for box in vars(parsed).values() for k, v in vars(box).items()})


def check(args: Args, world: int) -> list[PretrainedConfig]:
    """Every contradiction in the flags, before a weight is loaded. Returns the policy's and critic's configurations."""

    def expect(ok, message: str) -> None:
        if not ok:
            raise ValueError(message)

    configs, eval_only = [], args.steps == 0 < args.eval_every
    for flag in ("model", "critic_model"):
        path = getattr(args, flag) or args.model
        try:
            configs.append(AutoConfig.from_pretrained(path, trust_remote_code=False))
        except (OSError, ValueError) as error:
            raise ValueError(f"{flag}={path!r} is no Hugging Face folder or hub id to be used: {error}") from error
    positive = "prompts_per_step samples_per_prompt max_prompt_tokens max_new_tokens temperature ppo_epochs "
    for flag in (positive + "minibatch tp sp replicas eval_rows eval_samples test_seconds").split():
        expect(getattr(args, flag) > 0, f"{flag}={getattr(args, flag)}: must be above 0")
    prompts, even = args.prompts_per_step, math.ceil(args.prompts_per_step / world) * world
    expect(eval_only or prompts == even, f"prompts_per_step={prompts} is no multiple of {world} ranks: use {even}")
    part, whole, best = args.minibatch, args.batch_size, math.gcd(args.minibatch, args.batch_size)
    expect(part == best, f"minibatch_size={part} does not divide prompts x samples_per_prompt = {whole}: try {best}")
    heads, node = math.gcd(*(c.num_attention_heads for c in configs)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    for flag, n, ranks in (("tp", args.tp, node), ("sp", args.sp, world)):
        expect(ranks % n == 0, f"{flag}={n} does not divide the {ranks} ranks: launch a multiple of {n}")
        expect(heads % n == 0, f"{flag}={n} does not divide the {heads} attention heads: use a divisor of {heads}")
    split = args.replicas == 1 or (world % args.replicas == 0 and world > args.replicas)
    expect(split, f"replicas={args.replicas} does not split {world} ranks into copies of 2 or more: use a divisor")
    expect(args.sp == 1 or args.attention == "varlen", f"sp={args.sp} needs --attention varlen, not {args.attention}")
    expect(not args.offload or args.plan or "RANK" in os.environ, f"offload={args.offload} needs torchrun")
    expect(0 <= args.seed < 10**6 and args.steps >= 0, f"seed={args.seed}, steps={args.steps}: use 0 to 999999")
    expect(0 <= args.profile <= args.steps, f"profile={args.profile} is none of the --steps {args.steps}")
    known = f"keep_best={args.keep_best!r} is no metric that --eval_every {args.eval_every} gives: use eval/correct"
    expect(not args.keep_best or (args.eval_every and args.keep_best.startswith("eval/")), known)
    for flag in "save_every save_minutes keep_last max_minutes stall_minutes eval_every".split():
        expect(getattr(args, flag) >= 0, f"{flag}={getattr(args, flag)}: must not be below 0")
    expect(args.kl_target is None or args.kl_coef > 0, "kl_target needs a kl_coef above 0 to start from")
    expect(args.tp == 1 or args.engine == "vllm", f"tp={args.tp} needs --engine vllm, not {args.engine}")
    expect(args.eval_temperature > 0 or args.eval_samples == 1, "eval_samples > 1 needs --eval_temperature above 0")
    longest, room = args.max_prompt_tokens + args.max_new_tokens, args.max_tokens_per_microbatch * args.sp
    text = f"max_prompt_tokens + max_new_tokens = {longest} tokens, but"
    expect(eval_only or longest <= room, f"{text} max_tokens_per_microbatch x sp = {room}: raise it")
    limit = min(getattr(config, "max_position_embeddings", longest) for config in configs)
    expect(longest <= limit, f"{text} the model has {limit} positions: lower the limits")
    if (args.steps or eval_only) and not args.plan:
        runs.check_folder(Path(args.out), args.resume == "auto")
    return configs


# --------------------------------------------------------------------------------------------- the math: pure functions


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's own samples: joschu.net/blog/kl-approx.html.
    k1 is unbiased and may be negative, k2 is biased with low variance, k3 is unbiased and never negative."""
    log_ratio = logprobs - ref_logprobs
    return {"k1": log_ratio, "k2": 0.5 * log_ratio**2, "k3": torch.exp(-log_ratio) - 1 + log_ratio}[kind]


def warmed(lr: float, update: int, warmup: int) -> float:
    """Learning rate of update 1, 2, ... with a linear warm-up; 0 before the first."""
    return lr * min(1.0, max(0, update) / max(1, warmup))


def adapt_kl_coef(kl_coef: float, kl: float, target: float, samples: int, horizon: int = 10_000) -> float:
    """arXiv:1909.08593, section 2.2: a proportional controller in log space, its error clipped to +-0.2."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * samples / horizon)


def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, arXiv:1506.02438 equation 16; everything (B, T), 0 outside the mask. The value after the
    last masked token is 0: a response is an episode, also when it was cut."""
    advantages = torch.zeros_like(values)
    last = next_value = values.new_zeros(len(values))  # (B,)
    for t in reversed(range(values.shape[1])):
        chosen = mask[:, t]
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        last = torch.where(chosen, delta + gamma * lam * last, last)
        next_value = torch.where(chosen, values[:, t], next_value)
        advantages[:, t] = torch.where(chosen, last, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the masked entries, 0 elsewhere."""
    chosen = x[mask]
    return torch.where(mask, (x - chosen.mean()) * torch.rsqrt(chosen.var(unbiased=False) + 1e-8), 0.0)


def critic_metrics(values: Tensor, returns: Tensor) -> dict[str, float]:
    """Explained variance is 1 when the critic knows every return, 0 when it is no better than a constant. Both (K,)."""
    variance, error = returns.var(unbiased=False).item(), (returns - values).var(unbiased=False).item()
    row = {f"critic/value_{name}": getattr(values, name)().item() for name in ("mean", "min", "max")}
    return row | {"critic/explained_var": 1 - error / variance if variance > 1e-8 else 0.0}


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate, arXiv:1707.06347 equation 7, per token, to be minimised; and where the lower and the
    upper clip were active."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    return loss, (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error per token, with clip > 0 the worse of plain and clipped; and where the clip was active."""
    error = (values - returns) ** 2
    if not clip:
        return 0.5 * error, torch.zeros_like(error, dtype=torch.bool)
    clipped_error = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
    return 0.5 * torch.maximum(error, clipped_error), clipped_error > error


# -------------------------------------------------------------------------------------------------------------- train


def microbatches(batch: rollout.Rollout, rows: list[int], args: Args, ranks: kernels.Ranks) -> list[kernels.Packed]:
    """This rank's share of sequences `rows`, packed under the token budget; as many micro-batches as on every rank."""
    fed, budget = [batch.lengths[b] - 1 for b in rows], args.max_tokens_per_microbatch * ranks.sp
    mine = data.plan_microbatches(fed, budget, ranks.rows)[ranks.row]
    return [kernels.pack(*batch[:2], batch.lengths, [rows[i] for i in bin], ranks.sp_rank, ranks.sp) for bin in mine]


@runs.watched
def train(args: Args, replay: dict | None = None) -> list[dict]:
    """Runs `args.steps` steps and returns the rows of metrics.jsonl (rank 0: those before a resume, too). `replay`:
    what a run left in bad_step_N/batch.pt; that step again, with the weights beside it and no engine, unwritten."""
    begun, main, bf16 = perf_counter(), int(os.environ.get("RANK", 0)) == 0, args.compute_dtype == torch.bfloat16
    say = runs.say if main else (lambda text: None)
    bar = main and sys.stderr.isatty()  # progress bars are for people, not for log files
    configs = check(args, args.plan[0] if args.plan else int(os.environ.get("WORLD_SIZE", 1)))
    if args.plan:
        say(kernels.memory_plan(asdict(args), *args.plan, cuda=True))
        return []
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    source = data.load(args, tokenizer, args.seed, args.eval_rows, bar)  # before ranks: it may fork
    first = tokenizer.decode(next(iter(source.train.values()))[0]["ids"])
    say(f"{source.report}\nthe first prompt, as it is fed: {first!r}".strip())
    accelerator, ranks = kernels.start_ranks(bf16, args.sp, args.replicas, 2 * args.stall_minutes or 120)
    everywhere = partial(kernels.everywhere, ranks=ranks)
    read = repr([(name, len(rows), rows[0]["ids"], rows[-1]["ids"]) for name, rows in source.train.items()])
    assert len(set(everywhere(read + source.report))) == 1, "ranks differ in rows: share HF_DATASETS_CACHE"
    device = accelerator.device
    made = rewards.start({row["task"] for rows in source.test.values() for row in rows}, args)
    made |= kernels.setup(configs[0].model_type, args.liger, bar, bf16, args.attention)
    config = asdict(args) | {"first_prompt": first, "rows": f"{zlib.crc32(read.encode()):08x}"}
    found = runs.checkpoints(args.out) if args.resume == "auto" else []
    found = [replay["folder"]] if replay else everywhere(found)[0]  # what rank 0 sees
    newest, state = runs.find_checkpoint(found, config, {*config} if replay else FREE, everywhere)
    start = done = kept = state["step"]  # steps that the weights have had: at first, now, and when they were last saved
    if newest and start >= args.steps and not replay:
        say(f"{newest} has all the --steps {args.steps}: nothing is left to do; ask for more")
        return []
    options = {"max_len": args.max_prompt_tokens + args.max_new_tokens, "dtype": str(args.compute_dtype)[6:]}
    options |= {name: getattr(args, name) for name in ("tp", "gpu_memory", "seed", "stop")}
    make = partial(rollout.make_sampler, args.engine, args.model, rollout.eos_ids(args.model, tokenizer), **options)
    sampler = rollout.Recorded(replay["samples"]) if replay else make()
    policy = None  # comes later: the engine measures the free memory first

    def ask(prompts: list[list[int]], n: int, limit: int, temperature: float, step: int, purpose: int) -> list:
        """n Samples for each of this rank's prompts; functions of (seed, step, purpose) and a prompt's place alone.
        When an engine fails, all ranks save, make new ones and try again, once."""
        nonlocal sampler, kept
        seed = rollout.stream(args.seed, step, purpose) + ranks.rank * len(prompts) // ranks.world * n
        for tries in (1, 2):
            samples, fault = rollout.attempt(sampler, kernels.share(prompts, ranks), n, limit, temperature, seed, bar)
            if not any(faults := everywhere(fault)):
                return samples
            if tries == 1:
                say(f"warning: an engine failed; all are made anew, with the weights of step {done}. {''.join(faults)}")
                kept = keep(f"checkpoints/step_{done}", wait=True) if done > kept else kept
                sampler = None  # its memory is needed
                sampler = make()
                sampler.load(kernels.full_weights(policy, args.compute_dtype) if policy else ())
        raise RuntimeError(f"an engine failed twice on the same prompts; step {kept} is saved. {''.join(faults)}")

    def judge(rows: list[dict], n: int, samples: list[rollout.Sample]) -> tuple:
        """All ranks' samples and texts, n for each row, and a function that waits for their results."""
        texts = [tokenizer.decode(s.ids, skip_special_tokens=True) for s in samples]
        rows = [row for row in kernels.share(rows, ranks) for _ in range(n)]
        pending = [] if replay else rewards.submit(texts, rows, [s.finished for s in samples], rules=args)
        samples, texts = zip(*kernels.gather(list(zip(samples, texts)), ranks))
        return samples, texts, lambda: kernels.gather([f.result() for f in pending], ranks) or replay["scored"]

    def evaluate() -> tuple[dict[str, float], list[dict]]:
        """Metrics and all answers on held-out rows, eval_samples to each, with the same random numbers every time."""
        k, rows = args.eval_samples, [row for rows in source.test.values() for row in rows]
        samples = ask([row["ids"] for row in rows], k, args.max_new_tokens, args.eval_temperature, 0, purpose=1)
        samples, texts, results = judge(rows, k, samples)
        rows, scored = [row for row in rows for _ in range(k)], results()
        metrics = rewards.evaluation(scored, k, [row["task"] for row in rows])
        metrics["eval/length_mean"] = sum(len(sample.ids) for sample in samples) / len(samples)
        return metrics, rollout.records(start, rows, texts, samples, scored)

    if args.steps == 0 < args.eval_every:
        metrics, answers = evaluate()
        history, log = runs.open_folder(Path(args.out), config, start, args.wandb, main)
        log({"step": start} | metrics, answers)
        say("\n".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        sampler.close()
        return history

    sampler.sleep()
    how = {"accelerator": accelerator, "attention": args.attention, "checkpointing": args.gradient_checkpointing}
    at = [newest / "policy", newest / "critic"] if newest else [args.model, args.critic_model or args.model]
    policy = kernels.load_policy(at[0], **how, offload="policy" in args.offload)
    critic = kernels.load_critic(at[1], **how, offload="critic" in args.offload)
    how |= {"trained": False, "offload": "reference" in args.offload}
    ref = kernels.load_policy(args.model, **how) if args.kl_coef else None
    kl_place, kl_kind = args.kl_in.split("-")
    adam, max_norm = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}, 1.0  # of gradients, for clipping
    models = {"policy": policy, "critic": critic, "reference": ref}
    trained = {k: (m, torch.optim.AdamW(m.parameters(), **adam)) for k, m in models.items() if m is not ref}
    kernels.load_moments(newest, trained)
    streaks, best, kl_coef = state["streaks"], state["best"], state["kl_coef"] or args.kl_coef
    saver = runs.Saver(args.out, args.keep_last, args.keep_best)
    history, log = runs.open_folder(Path(args.out), config, start, args.wandb, main and args.steps > 0 and not replay)
    say(runs.plan(args, ranks, models, made, start))
    if args.steps == 0:
        say(kernels.memory_plan(asdict(args), ranks.world, None, torch.cuda.is_available()))

    def keep(name: str, wait: bool = False) -> int:
        """A checkpoint of step `done`. What is not in it is a function of the step: prompts, seeds, learning rates."""
        final, row = Path(args.out, name), next((row for row in history[-1:] if row["step"] == done), {})
        parts = kernels.checkpoint_parts(trained, ranks, tokenizer, saver.begin(final, trained, everywhere))
        carried = {"kl_coef": kl_coef if args.kl_target else None, "streaks": streaks, "best": best}
        saver.save(final, parts, {"step": done, "metrics": row, "config": config} | carried)
        if wait:
            saver.wait()
            everywhere(None)  # rank 0 has given it its name
        return done

    def must_be_finite(recorded: dict, **tensors: Tensor | None) -> None:
        """Ends the run on all ranks when a number is not finite on one of them, before it reaches a weight. What the
        step was made of stays in bad_step_N: weights and moments as they are now, and `recorded` in batch.pt."""
        bad = [text for texts in everywhere(runs.not_finite(**tensors)) for text in texts] if tensors else []
        error = f"step {done + 1}: {'; '.join(bad[:4])}: nothing was updated with it, nothing saved over"
        if bad and not replay:
            keep(f"bad_step_{done + 1}", wait=True)
            file = Path(args.out, f"bad_step_{done + 1}", "batch.pt")
            if main:
                torch.save(recorded | {"args": runs.hidden(asdict(args)) | recorded["flags"], "error": error}, file)
            error += f". Once more, without an engine: python ppo.py --replay {file}"
        if bad:
            raise FloatingPointError(error)

    def forward(model: nn.Module, batch: rollout.Rollout) -> Tensor:
        """The critic's values, or another model's log-probs, of a whole batch: (B, T) on every rank, no gradient."""
        if replay and any(replay["taken"].values()):  # the weights are no longer those that this was computed with
            return next(replay["forward"][name].to(device) for name in models if models[name] is model)
        with torch.no_grad():
            micro, sp = microbatches(batch, range(len(batch.lengths)), args, ranks), ranks.sp_group
            answers = [kernels.critic_forward(critic, p, sp) if model is critic else
                       kernels.policy_forward(model, p, args.temperature, sp)[0] for p in runs.counted(micro)]
        kernels.reshard(model)
        return kernels.unpack([(p.index, answer) for p, answer in zip(micro, answers)], batch.mask, ranks)

    def hand_over(step: int) -> float:
        """New weights into the engine; then the canary: fresh answers, on whose log-probs the trainer must agree.
        Weights stale by many steps show as 0.2, bf16 as about 0.01. Returns the worst engine's mean |difference|."""
        sampler.load(kernels.full_weights(policy, args.compute_dtype))
        prompts = [row["ids"] for row in data.batch(source.train, step, 4 * ranks.world, args.seed, source.weights)]
        samples = ask(prompts, 1, min(64, args.max_new_tokens), args.temperature, step, purpose=2)
        samples = kernels.gather(samples, ranks)
        batch = rollout.collate(prompts, samples, device)
        recorded = rollout.record(samples, prompts_per_step=len(prompts), samples_per_prompt=1, minibatch_size=None)
        must_be_finite(recorded, engine_logprobs=batch.sampler_logprobs)
        gap = (forward(policy, batch) - batch.sampler_logprobs).abs().view(ranks.world, -1).sum(1)
        worst = (gap / batch.mask.view(ranks.world, -1).sum(1)).max().item()
        if not worst < (limit := 0.05 if bf16 else 0.001):
            text = f"canary at step {step}: log-probs differ by {worst:.4f}, allowed {limit}: "
            raise RuntimeError(text + "the engine has stale or wrong weights, or another temperature or precision")
        return worst

    canary = 0.0 if replay else hand_over(start)
    say(f"ready after {perf_counter() - begun:.0f} s; engine and trainer agree within {canary:.1e} nats a token")
    if args.eval_every and start == 0 < args.steps and not replay:
        log({"step": 0} | evaluate()[0])
        say(f"step    0/{args.steps} | eval {history[-1]['eval/correct']:.3f} of the held-out rows right")

    skip = replay["taken"] if replay else {}  # updates that the weights have had already
    begun, late, stop = perf_counter(), {}, ""
    for step in range(start, max(args.steps, start + bool(replay), 1)):
        runs.NOW["step"], times, meter = step + 1, late, kernels.Meter()  # late: what saving took after the step before
        trace = Path(args.out, "profile") if step + 1 == args.profile else None

        # ---- 1. sample: the policy answers a fresh batch of prompts
        with runs.timed(times, "sample"):
            rows = data.batch(source.train, step, args.prompts_per_step, args.seed, source.weights)
            prompts = [row["ids"] for row in rows]
            samples = ask(prompts, args.samples_per_prompt, args.max_new_tokens, args.temperature, step, purpose=0)
            sampler.sleep()

        # ---- 2. reward: text -> number, in other processes while phase 3 runs; every rank gets the whole batch
        with runs.timed(times, "reward"):
            samples, texts, results = judge(rows, args.samples_per_prompt, samples)
            rows, prompts = ([x for x in xs for _ in range(args.samples_per_prompt)] for xs in (rows, prompts))
            batch = rollout.collate(prompts, samples, device)
            runs.NOW["longest"] = max(batch.lengths)

        # ---- 3. forward: log-probs under policy and reference, values under the critic; no grad
        train_policy = step >= args.critic_warmup
        # with one update a step the old log-probs are that update's own, detached: no pass for them
        on_policy = train_policy and args.updates_per_step == 1 and not (ref and kl_place == "reward")
        with runs.timed(times, "forward"), runs.profiled(trace, f"forward_rank{ranks.rank}"):
            old_values = forward(critic, batch)
            old_logprobs = None if on_policy else forward(policy, batch)
            ref_logprobs = forward(ref, batch) if ref else None
        with runs.timed(times, "reward"):  # what is left to wait for
            scored = results()
            scores = torch.tensor([result["reward"] for result in scored], device=device)  # (B,), as `sound`
            sound = torch.tensor([result["status"] != "infra" for result in scored], device=device)
            assert sound.any(), f"step {step}: every reward failed on our side (infra), for example {scored[0]}"
            mask = batch.mask & sound[:, None]  # a sample that our own machine failed on teaches nothing
            batch = batch._replace(mask=mask)
            shown = rollout.records(step + 1, rows, texts, samples, scored)[:: -(-len(rows) // 8)]  # eight of them
        if args.steps == 0 and not replay:
            say(f"one batch: reward {scores.mean():.3f}\n" + rollout.show(shown[:2]))
            break

        # ---- 4. advantage: score on the last response token, KL penalty on every one; GAE
        with runs.timed(times, "advantage"):
            last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
            token_rewards = torch.where(last, scores[:, None], 0.0)
            if ref and kl_place == "reward":
                penalty = kl_coef * kl_estimate(old_logprobs, ref_logprobs, kl_kind)
                token_rewards = token_rewards - torch.where(mask, penalty, 0.0)
            advantages, returns = gae(token_rewards, old_values, mask, args.gamma, args.lam)
            advantages = whiten(advantages, mask)
        if stop := runs.stop_reason(args.max_minutes, everywhere):
            break  # a safe point: the weights are still those of the step before, and this one can be done again
        before = {"critic": old_values, "policy": old_logprobs, "reference": ref_logprobs}
        taken = dict.fromkeys(trained, 0)  # updates, for a replay
        recorded = rollout.record(samples, scored, taken, before)
        numbers = {"engine_logprobs": batch.sampler_logprobs, "values": old_values, "logprobs": old_logprobs}
        numbers |= {"rewards": scores, "ref_logprobs": ref_logprobs, "advantages": advantages, "returns": returns}
        must_be_finite(recorded, **numbers)

        # ---- 5. update: epochs x minibatches x micro-batches; policy, then critic
        with runs.timed(times, "update"), runs.profiled(trace, f"update_rank{ranks.rank}"):
            fresh, updates = [], 0
            for epoch in range(args.ppo_epochs):
                order = random.Random(f"{args.seed} {step} {epoch}").sample(range(args.batch_size), args.batch_size)
                for chosen in (order[i : i + args.minibatch] for i in range(0, args.batch_size, args.minibatch)):
                    micro = microbatches(batch, chosen, args, ranks)
                    # the one denominator: this update's response tokens on all ranks; times world, as FSDP averages
                    scale = ranks.world / max(1, mask[chosen].sum().item())
                    updates += 1
                    update = step * args.updates_per_step + updates
                    policy_lr = warmed(args.lr, update - args.critic_warmup * args.updates_per_step, args.warmup)
                    critic_lr = warmed(args.critic_lr, update, args.warmup)
                    if not mask[chosen].any():  # all of them failed on our side; equal on all ranks
                        continue

                    active = [k for k in trained if updates > skip.get(k, 0) and (train_policy or k == "critic")]
                    for p in runs.counted(micro) if "policy" in active else []:
                        logprobs, entropy = kernels.policy_forward(policy, p, args.temperature, ranks.sp_group)
                        old = logprobs.detach() if on_policy else old_logprobs.view(-1)[p.index]
                        advantage = advantages.view(-1)[p.index]
                        loss, low, high = policy_loss(logprobs, old, advantage, args.clip_low, args.clip_high)
                        if args.tis_cap:  # the engine sampled, not the trainer: weigh by their ratio, truncated
                            engine = batch.sampler_logprobs.view(-1)[p.index]
                            loss = loss * torch.exp(old - engine).clamp(max=args.tis_cap)
                        loss = loss - args.entropy_coef * entropy
                        if ref and kl_place == "loss":
                            reference = ref_logprobs.view(-1)[p.index]
                            loss = loss + kl_coef * kl_estimate(logprobs, reference, kl_kind)
                        (loss.sum() * scale).backward()
                        meter.add("policy/", loss=loss, entropy=entropy, clipfrac_low=low, clipfrac_high=high)
                        meter.add("policy/", approx_kl=kl_estimate(old, logprobs, "k3"))
                        fresh.append((p.index, logprobs.detach()))
                    if "policy" in active:
                        norm = kernels.optimizer_step(*trained["policy"], policy_lr, max_norm)
                        meter.add("policy/", grad_norm=norm)
                        must_be_finite(recorded, **kernels.suspects(policy, norm, meter))
                        taken["policy"] = updates

                    for p in runs.counted(micro) if "critic" in active else []:
                        values, old = kernels.critic_forward(critic, p, ranks.sp_group), old_values.view(-1)[p.index]
                        loss, clipped = value_loss(values, old, returns.view(-1)[p.index], args.value_clip)
                        (loss.sum() * scale).backward()
                        meter.add("critic/", loss=loss, clipfrac=clipped)
                    if "critic" in active:
                        norm = kernels.optimizer_step(*trained["critic"], critic_lr, max_norm)
                        meter.add("critic/", grad_norm=norm)
                        must_be_finite(recorded, **kernels.suspects(critic, norm, meter))
                        taken["critic"] = updates
            if on_policy:
                old_logprobs = kernels.unpack(fresh, mask, ranks)
        if replay:
            say(f"step {step + 1} once more: every number is finite. It had ended with: {replay['error']}")
            break
        done = step + 1

        # ---- 6. sync: the engine gets the new weights and must prove it
        with runs.timed(times, "sync"), runs.profiled(trace, f"sync_rank{ranks.rank}"):
            canary = hand_over(step + 1)

        # ---- 7. report: metrics, one line, samples, evaluation, checkpoint
        with runs.timed(times, "report"):
            row = {"step": step + 1, **rewards.summary(scored, [row["task"] for row in rows])}
            row |= rollout.summary(samples, times["time/sample"])
            row |= rollout.mismatch(old_logprobs[mask], batch.sampler_logprobs[mask], args.tis_cap)
            row |= meter.means(ranks) | {"mismatch/canary": canary, "policy/lr": policy_lr, "critic/lr": critic_lr}
            row |= critic_metrics(old_values[mask], returns[mask]) | {"reward/std": scores.std(unbiased=False).item()}
            if ref:
                kl = kl_estimate(old_logprobs, ref_logprobs, kl_kind)[mask].mean().item()
                row |= {"policy/ref_kl": kl, "policy/kl_coef": kl_coef}
                if args.kl_target:
                    kl_coef = adapt_kl_coef(kl_coef, kl, args.kl_target, args.batch_size)
            if args.eval_every and (done == args.steps or done % args.eval_every == 0):
                row |= evaluate()[0]
        fed, updated = [n - 1 for n in batch.lengths], [critic, policy] if train_policy else [critic]
        row |= times | data.plan_summary(fed, args.max_tokens_per_microbatch * args.sp, ranks.rows)
        row |= kernels.utilisation(times, updated, fed, mask.sum().item(), args.ppo_epochs, ranks)
        log(row, shown)
        say(runs.line(row, args.steps, (perf_counter() - begun) / (done - start)))
        if done % 10 == 0:
            say(rollout.show(shown[:2]))
        for warning in runs.divergence(row, streaks, step < args.critic_warmup + 50, keep):
            say(warning)
        if better := row.get(args.keep_best, -math.inf) > best:
            best = row[args.keep_best]
        late, due = {}, everywhere(saver.due(args.save_minutes))[0]  # by the clock of rank 0
        if done > kept and (better or due or (args.save_every and done % args.save_every == 0)):
            with runs.timed(late, "save"):
                kept = keep(f"checkpoints/step_{done}")
        if stop := runs.stop_reason(args.max_minutes, everywhere):
            break

    kept = keep(f"checkpoints/step_{done}") if done > kept else kept
    saver.wait()
    if stop:
        say(f"{stop}: ended after step {done} of {args.steps}; --resume auto goes on from there")
    sampler.close()
    return history


if __name__ == "__main__":
    if sys.argv[1:2] == ["--replay"]:  # FILE of a run that ended with a number that is not finite; its flags are inside
        flags, replay = rollout.load_record(Path(sys.argv[2]))
        train(Args(**flags), replay)
    else:
        train(parse_args())
