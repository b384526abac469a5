"""PPO for language models with verifiable rewards, in one file.

    python ppo.py --model DIR --task countdown3                       # one plain process, CPU or GPU
    torchrun --nproc_per_node 4 ppo.py --model DIR --task countdown   # sharded by FSDP2

    python ppo.py --plan 4 80 ...      # will it fit on 4 GPUs of 80 GB? reads the model's configuration, needs no GPU
    python ppo.py --replay FILE        # a step that ended with a number that is not finite, once more

One step is seven phases: sample, reward, forward, advantage, update, sync, report. `train` has them top to bottom, each
under a banner; the log, the metrics and the README use the same names.

Every rank holds the numbers of the whole step ((B, T) tensors, 18 MB each at 256 samples of 17k tokens). Only model
passes are split, so advantages, denominators and metrics need no collective and cannot depend on the number of ranks.

Not here on purpose: Ray, asynchronous rollouts, tools, LoRA, reward models, a Trainer class: a variant is a copy of the
file (tests/ablations). The defaults follow Open-Reasoner-Zero (arXiv:2503.24290): no KL, gamma = lambda = 1.
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

import costs
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
class PPO:
    """the algorithm"""
    lr: float = 1e-6  # policy learning rate (AdamW)
    critic_lr: float = 5e-6  # critic learning rate
    advantage: Literal["gae", "grpo", "rloo", "reinforce++"] = "gae"  # gae: PPO; the others load no critic
    critic_warmup: int = 0  # first steps that train the critic alone
    ppo_epochs: int = 1  # passes over each batch
    critic_epochs: int = 0  # of the critic; 0: as many
    minibatch_size: int | None = None  # samples per optimizer step; default: the whole batch
    max_tokens_per_microbatch: int = 18_000  # tokens a rank runs at once; hard
    gamma: float = 1.0  # discount
    lam: float | Literal["length"] = 1.0  # GAE lambda; 1: advantage = return - value; length: 1 - 20 / tokens (VAPO)
    critic_lam: float = 1.0  # of the returns that the critic learns (decoupled GAE, VC-PPO); 1: unbiased
    loss_mean: Literal["token", "sequence", "constant"] = "token"  # of the policy: over what (loss_weights)
    clip: tuple[float, ...] = (0.2, 0.2)  # the ratio's, to [0.8, 1.2]; 0.2 0.28: clip-higher; a third number: dual clip
    value_clip: float = 0.0  # values move at most this far from the old ones; 0: no clipping
    entropy_coef: float = 0.0  # entropy bonus
    kl_coef: float = 0.0  # penalty on KL(policy || reference); 0: no reference model is loaded
    kl_in: Literal["reward-k1", "reward-k2", "reward-k3", "loss-k2", "loss-k3"] = "reward-k1"  # place and estimator
    kl_target: float | None = None  # adapt kl_coef towards this KL (arXiv:1909.08593); default: fixed
    tis_cap: float = 2.0  # truncated importance sampling between engine and trainer; 0: off


@dataclass
class Args(rewards.Rules, PPO, rollout.Sampling, data.Source, kernels.Model, Run):
    """Every knob, flat. Sizes are global; derived sizes are properties, printed, never accepted."""

    @property
    def batch_size(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def minibatch(self) -> int:
        return self.minibatch_size or self.batch_size

    @property
    def compute_dtype(self) -> torch.dtype:
        bf16 = self.dtype == "bf16" or (self.dtype == "auto" and torch.cuda.is_available())
        return torch.bfloat16 if bf16 else torch.float32


# what a resumed run may change; anything else would make it another run
FREE = {flag.name for flag in fields(Run) + fields(kernels.Model)} | {"tp", "gpu_memory", "max_tokens_per_microbatch"}
FREE -= {"seed", "model", "critic_model", "dtype", "keep_best"}


def parse_args(argv: list[str] | None = None) -> Args:
    boxes = make_dataclass("Boxes", [(c.__name__, c, field(default_factory=c)) for c in reversed(Args.__bases__)])
    parsed = tyro.cli(boxes, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True, args=argv)
    return Args(**{k: v for box in vars(parsed).values() for k, v in vars(box).items()})


def check(args: Args, world: int, only_plan: bool = False) -> list[PretrainedConfig]:
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
    heads, on = math.gcd(*(c.num_attention_heads for c in configs)), 1 if eval_only else world
    alone, group = not only_plan and "RANK" not in os.environ, args.advantage in ("grpo", "rloo")
    for ok, text in rollout.conditions(args, on, heads, group) + kernels.conditions(args, world, heads, alone):
        expect(ok, text)
    expect(0 <= args.seed < 10**6 and args.steps >= 0, f"seed={args.seed}, steps={args.steps}: use 0 to 999999")
    expect(0 <= args.profile <= args.steps, f"profile={args.profile} is none of the --steps {args.steps}")
    known = f"keep_best={args.keep_best!r} is no metric that --eval_every {args.eval_every} gives: use eval/correct"
    expect(not args.keep_best or (args.eval_every and args.keep_best.startswith("eval/")), known)
    least = {1: "max_prompt_tokens ppo_epochs minibatch eval_rows eval_samples", 0: "save_every save_minutes keep_last "
             "max_minutes stall_minutes eval_every critic_warmup critic_epochs"}  # fmt: skip
    for limit, flag in ((limit, flag) for limit, flags in least.items() for flag in flags.split()):
        expect(getattr(args, flag) >= limit, f"{flag}={getattr(args, flag)}: must be {limit} or above")
    part, whole, best = args.minibatch, args.batch_size, math.gcd(args.minibatch, args.batch_size)
    expect(part == best, f"minibatch_size={part} does not divide prompts x samples_per_prompt = {whole}: try {best}")
    expect(len(args.clip) in (2, 3) and (*args.clip, 2)[2] > 1, f"clip={args.clip}: use LOW HIGH [DUAL above 1]")
    for flag, free in {"critic_warmup": 0, "critic_epochs": 0, "critic_lam": 1.0, "lam": 1.0}.items():
        text = f"{flag}={getattr(args, flag)} needs --advantage gae: {args.advantage} has no critic"
        expect(args.advantage == "gae" or getattr(args, flag) == free, text)
    expect(args.kl_target is None or args.kl_coef > 0, "kl_target needs a kl_coef above 0 to start from")
    expect(args.eval_temperature > 0 or args.eval_samples == 1, "eval_samples > 1 needs --eval_temperature above 0")
    longest, room = args.max_prompt_tokens + args.max_new_tokens, args.max_tokens_per_microbatch * args.sp
    text = f"max_prompt_tokens + max_new_tokens = {longest} tokens, but"
    expect(eval_only or longest <= room, f"{text} max_tokens_per_microbatch x sp = {room}: raise it")
    limit = min(getattr(config, "max_position_embeddings", longest) for config in configs)
    expect(longest <= limit, f"{text} the model has {limit} positions: lower the limits")
    if (args.steps or eval_only) and not only_plan:
        runs.check_folder(Path(args.out), args.resume == "auto")
    return configs


# --------------------------------------------------------------------------------------------- the math: pure functions


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's own samples: joschu.net/blog/kl-approx.html.
    k1 is unbiased and may be negative, k2 is biased with low variance, k3 is unbiased and never negative."""
    log_ratio = logprobs - ref_logprobs
    return {"k1": log_ratio, "k2": 0.5 * log_ratio**2, "k3": torch.exp(-log_ratio) - 1 + log_ratio}[kind]


def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam) -> tuple[Tensor, Tensor]:
    """Advantages and returns, arXiv:1506.02438 equation 16; everything (B, T), 0 outside the mask; lam may be (B,).
    The value after the last masked token is 0: a response is an episode, also when it was cut."""
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


def group_advantages(token_rewards: Tensor, mask: Tensor, n: int, scale: bool) -> Tensor:
    """(B, T): of whole responses, against the n to one prompt, neighbours; those without a masked token do not count.
    RLOO (arXiv:2402.14740): less the mean of the others. scale, GRPO (arXiv:2402.03300): in standard deviations."""
    x, counted = torch.where(mask, token_rewards, 0.0).sum(1).view(-1, n), mask.any(1).view(-1, n)
    count = counted.sum(1, keepdim=True)
    centred = torch.where(counted, x - (x * counted).sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    others = (count - 1).clamp(min=1)
    std = (centred.square().sum(1, keepdim=True) / others).sqrt()
    return mask * (centred / (std + 1e-4) if scale else centred * count / others).view(-1, 1)


def loss_weights(mask: Tensor, kind: str, limit: int) -> Tensor:
    """What every token's loss is multiplied with, (B, T), before all are added up. token: mean over the masked tokens
    (DAPO); sequence: mean over responses of their means (GRPO); constant: as if each had `limit` tokens (Dr. GRPO)."""
    lengths = mask.sum(1, keepdim=True)
    responses = (lengths > 0).sum()
    count = {"token": lengths.sum(), "sequence": lengths * responses, "constant": limit * responses}[kind]
    return mask / count.clamp(min=1)


def critic_metrics(values: Tensor, returns: Tensor, mask: Tensor) -> dict[str, float]:
    """Explained variance is 1 when the critic knows every return, 0 when it is no better than a constant. Calibration:
    mean values and returns of the four quarters of each response."""
    v, r = values[mask], returns[mask]
    variance, error = r.var(unbiased=False).item(), (r - v).var(unbiased=False).item()
    row = {f"critic/value_{name}": getattr(v, name)().item() for name in ("mean", "min", "max")}
    quarter = (mask.cumsum(1) - 1) * 4 // mask.sum(1, keepdim=True).clamp(min=1)
    for q in range(4):
        if (chosen := mask & (quarter == q)).any():
            row[f"critic/value_q{q + 1}"] = values[chosen].mean().item()
            row[f"critic/return_q{q + 1}"] = returns[chosen].mean().item()
    return row | {"critic/explained_var": 1 - error / variance if variance > 1e-8 else 0.0}


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: tuple) -> tuple[Tensor, ...]:
    """PPO's clipped surrogate, arXiv:1707.06347 equation 7, per token, to be minimised; and where the lower and the
    upper clip were active. A third number in `clip` bounds what a negative advantage costs (dual: arXiv:1912.09729)."""
    clip_low, clip_high, *dual = clip
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual:
        loss = torch.minimum(loss, torch.where(advantages < 0, -advantages * dual[0], math.inf))
    return loss, (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error per token, with clip > 0 the worse of plain and clipped; and where the clip was active."""
    error = (values - returns) ** 2
    if not clip:
        return 0.5 * error, torch.zeros_like(error, dtype=torch.bool)
    clipped_error = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
    return 0.5 * torch.maximum(error, clipped_error), (clipped_error > error) & ((values - old_values).abs() > clip)


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
    configs = check(args, int(os.environ.get("WORLD_SIZE", 1)))
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
    made |= kernels.setup(configs[0].model_type, bar, bf16, args.attention)
    config = asdict(args) | {"first_prompt": first, "rows": f"{zlib.crc32(read.encode()):08x}"}
    found = runs.checkpoints(args.out) if args.resume == "auto" else []
    found = [replay["folder"]] if replay else everywhere(found)[0]  # what rank 0 sees
    newest, state = runs.find_checkpoint(found, config, {*config} if replay else FREE, everywhere)
    start = done = kept = state["step"]  # steps that the weights have had: at first, now, and when they were last saved
    if newest and start >= args.steps and not replay:
        say(f"{newest} has all the --steps {args.steps}: nothing is left to do; ask for more")
        return []
    options = {name: getattr(args, name) for name in ("tp", "gpu_memory", "seed", "stop")}
    options |= {"max_len": args.max_prompt_tokens + args.max_new_tokens, "dtype": str(args.compute_dtype)[6:]}
    make = partial(rollout.make_sampler, args.engine, args.model, rollout.eos_ids(args.model, tokenizer), **options)
    policy = None  # comes later: the engine measures the free memory first

    def rescue(faults: str):
        """An engine has failed: saves what is trained, and returns the weights for the next one."""
        nonlocal kept
        say(f"warning: an engine failed; all are made anew, with the weights of step {done}. {faults}")
        kept = keep(f"checkpoints/step_{done}", wait=True) if done > kept else kept
        return kernels.full_weights(policy, args.compute_dtype) if policy else ()

    asked = args.samples_per_prompt, args.max_new_tokens, args.temperature
    make = partial(rollout.Recorded, replay["samples"]) if replay else make
    engine = rollout.Engine(make, rescue, everywhere, args.seed, bar)

    def judge(rows: list[dict], n: int, samples: list[rollout.Sample]) -> tuple:
        """The texts of samples, n for each row, and a function that waits for their results. Ranks share the work."""
        mine, rows = kernels.share(samples, ranks), kernels.share([row for row in rows for _ in range(n)], ranks)
        texts = [tokenizer.decode(s.ids, skip_special_tokens=True) for s in mine]
        pending = [] if replay else rewards.submit(texts, rows, [s.finished for s in mine], rules=args)
        scored = lambda: kernels.gather([f.result() for f in pending], ranks) or replay["scored"]  # noqa: E731
        return kernels.gather(texts, ranks), scored

    def evaluate() -> tuple[dict[str, float], list[dict]]:
        """Metrics and all answers on held-out rows, eval_samples to each, with the same random numbers every time."""
        k, rows = args.eval_samples, [row for rows in source.test.values() for row in rows]
        samples = engine.ask([row["ids"] for row in rows], k, args.max_new_tokens, args.eval_temperature, 0, purpose=1)
        texts, results = judge(rows, k, samples)
        rows, scored = [row for row in rows for _ in range(k)], results()
        metrics = rewards.evaluation(scored, k, [row["task"] for row in rows])
        metrics["eval/length_mean"] = sum(len(sample.ids) for sample in samples) / len(samples)
        return metrics, rollout.records(start, rows, texts, samples, scored)

    def draw(step: int, more: int) -> tuple:
        """(rows, samples, texts, results) of round `more` of dynamic sampling: prompts of a batch that no step has."""
        rows = data.batch(source.train, 10**6 + 5 * step + more, args.prompts_per_step, args.seed, source.weights)
        samples = engine.ask([row["ids"] for row in rows], *asked, step, purpose=2 + more)
        return rows, samples, *judge(rows, args.samples_per_prompt, samples)

    if args.steps == 0 < args.eval_every:
        metrics, answers = evaluate()
        history, log = runs.open_folder(Path(args.out), config, start, args.wandb, main)
        log({"step": start} | metrics, answers)
        say("\n".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        engine.sampler.close()
        return history

    engine.sampler.sleep()
    how = {"accelerator": accelerator, "attention": args.attention, "checkpointing": args.gradient_checkpointing}
    at = [newest / "policy", newest / "critic"] if newest else [args.model, args.critic_model or args.model]
    policy = kernels.load_policy(at[0], **how, offload="policy" in args.offload)
    critic = kernels.load_critic(at[1], **how, offload="critic" in args.offload) if args.advantage == "gae" else None
    how |= {"trained": False, "offload": "reference" in args.offload}
    ref = kernels.load_policy(args.model, **how) if args.kl_coef else None
    kl_place, kl_kind = args.kl_in.split("-")
    penalised = ref and kl_place == "reward"
    adam, max_norm = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}, 1.0  # of gradients, for clipping
    models = {"policy": policy, "critic": critic, "reference": ref}
    trained = {k: (m, torch.optim.AdamW(m.parameters(), **adam)) for k, m in models.items() if m and m is not ref}
    kernels.load_moments(newest, trained)
    streaks, best, kl_coef = state["streaks"], state["best"], state["kl_coef"] or args.kl_coef
    saver = runs.Saver(args.out, args.keep_last, args.keep_best)
    history, log = runs.open_folder(Path(args.out), config, start, args.wandb, main and args.steps > 0 and not replay)
    say(runs.plan(args, ranks, models, made | {"roofline of a rank": costs.roofline()[1]}, start))
    if args.steps == 0:
        say(costs.plan(*configs, asdict(args), ranks.world, None, torch.cuda.is_available()))

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

    def optimize(name: str, lr: float, update: int, meter: kernels.Meter, recorded: dict) -> None:
        model, _ = trained[name]
        norm = kernels.optimizer_step(*trained[name], lr, max_norm)
        meter.add(f"{name}/", grad_norm=norm)
        must_be_finite(recorded, **kernels.suspects(model, norm, meter))
        recorded["taken"][name] = update

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
        engine.sampler.load(kernels.full_weights(policy, args.compute_dtype))
        rows = data.batch(source.train, step, 4 * ranks.world, args.seed, source.weights)
        samples = engine.ask([row["ids"] for row in rows], 1, min(64, asked[1]), args.temperature, step, purpose=2)
        batch = rollout.collate([row["ids"] for row in rows], samples, device)
        flags = {"prompts_per_step": len(rows), "samples_per_prompt": 1, "minibatch_size": None}
        must_be_finite(rollout.record(rows, samples, **flags), engine_logprobs=batch.sampler_logprobs)
        gap = (forward(policy, batch) - batch.sampler_logprobs).abs().view(ranks.world, -1).sum(1)
        worst, limit = (gap / batch.mask.view(ranks.world, -1).sum(1)).max().item(), 0.05 if bf16 else 0.001
        if not worst < limit:
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
            fresh = data.batch(source.train, step, args.prompts_per_step, args.seed, source.weights)
            prompts = replay["rows"] if replay else fresh
            samples = engine.ask([row["ids"] for row in prompts], *asked, step, purpose=0)

        # ---- 2. reward: text -> number, in other processes while phase 3 runs; every rank gets the whole batch
        with runs.timed(times, "reward"):
            texts, results = judge(prompts, args.samples_per_prompt, samples)
        with runs.timed(times, "sample"):  # more, in place of groups that are rewarded alike; then memory is given back
            if args.refill and not replay:
                drawn = prompts, samples, texts, results
                prompts, samples, texts, results = rollout.refilled(drawn, partial(draw, step), args.refill)
            engine.sampler.sleep()
        rows = [row for row in prompts for _ in range(args.samples_per_prompt)]
        batch = rollout.collate([row["ids"] for row in rows], samples, device)
        runs.NOW["longest"] = max(batch.lengths)

        # ---- 3. forward: log-probs under policy and reference, values under the critic; no grad
        train_policy = step >= args.critic_warmup
        epochs = {"policy": args.ppo_epochs * train_policy, "critic": args.critic_epochs or args.ppo_epochs}
        # with one update a step the old log-probs are that update's own, detached: no pass for them
        on_policy = train_policy and args.ppo_epochs * args.batch_size == args.minibatch and not penalised
        with runs.timed(times, "forward"), runs.profiled(trace, f"forward_rank{ranks.rank}"):
            old_values = forward(critic, batch) if critic else None
            old_logprobs = None if on_policy else forward(policy, batch)
            ref_logprobs = forward(ref, batch) if ref else None
        with runs.timed(times, "reward"):  # what is left to wait for
            scored = results()
            scores = torch.tensor([result["reward"] for result in scored], device=device)  # (B,), as `sound`
            sound = torch.tensor([result["status"] != "infra" for result in scored], device=device)
            assert sound.any(), f"step {step}: every reward failed on our side (infra), for example {scored[0]}"
            mask = batch.mask & sound[:, None]  # a sample that our own machine failed on teaches nothing
            batch, engine_logprobs = batch._replace(mask=mask), batch.sampler_logprobs
        if args.steps == 0 and not replay:
            shown = rollout.records(step, rows[:2], texts, samples, scored)
            say(f"one batch: reward {scores.mean():.3f}\n" + rollout.show(shown))
            break

        # ---- 4. advantage: score on the last response token, KL penalty on every one; GAE, or against a group
        with runs.timed(times, "advantage"):
            last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
            token_rewards = torch.where(last, scores[:, None], 0.0)
            if penalised:
                token_rewards = token_rewards - kl_coef * mask * kl_estimate(old_logprobs, ref_logprobs, kl_kind)
            if args.advantage in ("grpo", "rloo"):
                scale = args.advantage == "grpo"
                advantages, returns = group_advantages(token_rewards, mask, args.samples_per_prompt, scale), None
            else:
                values = old_values if critic else torch.zeros_like(token_rewards)  # reinforce++: all that is to come
                lam = 1 - 1 / (0.05 * mask.sum(1)).clamp(min=1) if args.lam == "length" else args.lam
                advantages, returns = gae(token_rewards, values, mask, args.gamma, lam)
                advantages = whiten(advantages, mask)
                if args.critic_lam != args.lam:
                    returns = gae(token_rewards, values, mask, args.gamma, args.critic_lam)[1]
        if stop := runs.stop_reason(args.max_minutes, everywhere):
            break  # a safe point: the weights are still those of the step before, and this one can be done again
        passed = {"critic": old_values, "policy": old_logprobs, "reference": ref_logprobs}
        recorded = rollout.record(prompts, samples, scored, dict.fromkeys(trained, 0), passed)
        numbers = {"values": old_values, "logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "returns": returns}
        must_be_finite(recorded, rewards=scores, engine_logprobs=engine_logprobs, advantages=advantages, **numbers)

        # ---- 5. update: epochs x minibatches x micro-batches; policy, then critic
        with runs.timed(times, "update"), runs.profiled(trace, f"update_rank{ranks.rank}"):
            parts, updates = [], 0
            for epoch in range(max(epochs[k] for k in trained)):
                order = random.Random(f"{args.seed} {step} {epoch}").sample(range(args.batch_size), args.batch_size)
                for chosen in (order[i : i + args.minibatch] for i in range(0, args.batch_size, args.minibatch)):
                    micro, part = microbatches(batch, chosen, args, ranks), torch.zeros_like(mask)
                    part[chosen] = mask[chosen]
                    updates += 1
                    if not part.any():  # all of them failed on our side; equal on all ranks
                        continue

                    active = [k for k in trained if updates > skip.get(k, 0) and epoch < epochs[k]]
                    # one set of denominators for this update, of all ranks; times world, as FSDP averages
                    weights, even = (ranks.world * loss_weights(part, kind, args.max_new_tokens).view(-1)
                                     for kind in (args.loss_mean, "token"))
                    for p in runs.counted(micro) if "policy" in active else []:
                        logprobs, entropy = kernels.policy_forward(policy, p, args.temperature, ranks.sp_group)
                        old = logprobs.detach() if on_policy else old_logprobs.view(-1)[p.index]
                        loss, low, high = policy_loss(logprobs, old, advantages.view(-1)[p.index], args.clip)
                        if args.tis_cap:  # the engine sampled, not the trainer: weigh by their ratio, truncated
                            loss = loss * torch.exp(old - engine_logprobs.view(-1)[p.index]).clamp(max=args.tis_cap)
                        loss = loss - args.entropy_coef * entropy
                        if ref and kl_place == "loss":
                            loss = loss + kl_coef * kl_estimate(logprobs, ref_logprobs.view(-1)[p.index], kl_kind)
                        (loss * weights[p.index]).sum().backward()
                        meter.add("policy/", loss=loss, entropy=entropy, clipfrac_low=low, clipfrac_high=high)
                        meter.add("policy/", approx_kl=kl_estimate(old, logprobs, "k3"))
                        parts.append((p.index, logprobs.detach()))
                    if "policy" in active:
                        optimize("policy", args.lr, updates, meter, recorded)

                    for p in runs.counted(micro) if "critic" in active else []:
                        values, old = kernels.critic_forward(critic, p, ranks.sp_group), old_values.view(-1)[p.index]
                        loss, clipped = value_loss(values, old, returns.view(-1)[p.index], args.value_clip)
                        (loss * even[p.index]).sum().backward()
                        meter.add("critic/", loss=loss, clipfrac=clipped)
                    if "critic" in active:
                        optimize("critic", args.critic_lr, updates, meter, recorded)
            if on_policy:
                old_logprobs = kernels.unpack(parts, mask, ranks)
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
            row |= rollout.mismatch(old_logprobs[mask], engine_logprobs[mask], args.tis_cap)
            row |= meter.means(ranks) | {"mismatch/canary": canary, "policy/lr": args.lr * train_policy}
            alike = (scores.view(-1, args.samples_per_prompt).std(1, unbiased=False) < 1e-6).float().mean().item()
            row |= {"reward/std": scores.std(unbiased=False).item(), "reward/alike_frac": alike}
            row |= critic_metrics(old_values, returns, mask) | {"critic/lr": args.critic_lr} if critic else {}
            if ref:
                kl = kl_estimate(old_logprobs, ref_logprobs, kl_kind)[mask].mean().item()
                row |= {"policy/ref_kl": kl, "policy/kl_coef": kl_coef}
                if args.kl_target:
                    kl_coef *= 1 + min(max(kl / args.kl_target - 1, -0.2), 0.2) * args.batch_size / 10_000
            if args.eval_every and (done == args.steps or done % args.eval_every == 0):
                row |= evaluate()[0]
        fed, passes = [n - 1 for n in batch.lengths], {model: epochs[k] for k, (model, _) in trained.items()}
        row |= times | data.plan_summary(fed, args.max_tokens_per_microbatch * args.sp, ranks.rows)
        row |= costs.utilisation(everywhere(times), passes, fed, mask.sum().item())
        numbers = {"advantages": advantages} | ({"values": old_values} if critic else {})
        shown = rollout.records(step + 1, rows, texts, samples, scored, 8, tokenizer.decode, **numbers)
        log(row, shown)
        say(runs.line(row, args.steps, (perf_counter() - begun) / (done - start)))
        if done % 10 == 0:
            say(rollout.show(shown[:2]))
        for warning in runs.divergence(row, streaks, step < args.critic_warmup + 50, keep):
            say(warning)
        before, best = best, max(best, row.get(args.keep_best, -math.inf))
        late, due = {}, everywhere(saver.due(args.save_minutes))[0]  # by the clock of rank 0
        if done > kept and (best > before or due or (args.save_every and done % args.save_every == 0)):
            with runs.timed(late, "save"):
                kept = keep(f"checkpoints/step_{done}")
        if stop := runs.stop_reason(args.max_minutes, everywhere):
            break

    kept = keep(f"checkpoints/step_{done}") if done > kept else kept
    saver.wait()
    if stop:
        say(f"{stop}: ended after step {done} of {args.steps}; --resume auto goes on from there")
    engine.sampler.close()
    return history


if __name__ == "__main__":
    if sys.argv[1:2] == ["--replay"]:  # FILE of a run that ended with a number that is not finite; its flags are inside
        flags, replay = rollout.load_record(Path(sys.argv[2]))
        train(Args(**flags), replay)
    elif "--plan" in sys.argv:
        gpus, gb, flags = costs.planned(sys.argv[1:])
        configs = check(args := parse_args(flags), gpus, only_plan=True)
        print(costs.plan(*configs, asdict(args), gpus, gb, cuda=True))
    else:
        train(parse_args())
