"""PPO for language models with verifiable rewards.

    python ppo.py --model DIR --task countdown3                      # one plain process, CPU or GPU
    torchrun --nproc_per_node 4 ppo.py --model DIR --task countdown  # sharded by FSDP2
    python ppo.py --plan 4 80 ...     # will it fit on 4 GPUs of 80 GB? needs no GPU

The file reads in the order of execution: flags, checks, the batch, the formulas, one update, what
surrounds a step, the loop. `train` is the loop: seven phases, sample, reward, forward, advantage,
update, sync, report, each under a banner; the log, the metrics and the README use the same names.
What is not PPO (run folder, clocks, checkpoints, guards, signals) is behind `run`, an object of
infra/run.py that never changes a number.

Every rank holds the numbers of the whole step ((B, T) tensors, 18 MB each at 256 samples of 17k
tokens). Only model passes are split, so advantages, denominators and metrics need no collective and
cannot depend on the number of ranks.

Where to look for a change:
    a loss, a KL, an advantage       the formulas; `add_advantages` puts scores, KL and values together
    an optimizer, a schedule         `make_optimizer`, `take_step`; learning rates: phase 5 of `train`;
                                     `kl_coef`: where `train` gives it to the batch
    which answers count              `add_scores` (a verifier failed on our side), `refill`
    weights into the engine          `sync`: loads them; its canary ends a run whose engine has others
and in other files:
    which tokens count, EOS          `collate` in rollout.py
    who runs which sequence, Ulysses `plan_microbatches` in data.py; kernels.py
    metrics that end a run           infra/guards.py

Not here on purpose: Ray, asynchronous rollouts, tools, LoRA, reward models, a Trainer class: a
variant is a copy of the file (tests/ablations). The defaults follow Open-Reasoner-Zero
(arXiv:2503.24290): no KL, gamma = lambda = 1.
"""
# isort: skip_file

import sys

# Our kernels.py has the name of a Hugging Face package: say that the package is absent while
# transformers looks for it, once, here.
sys.modules["kernels"] = None
import transformers.integrations.hub_kernels  # noqa: F401

del sys.modules["kernels"]
import math
import os
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

import data
import kernels
import rewards
import rollout
from infra import dist, flops, models, watchdog
from infra.log import line, plan
from infra.models import Trained
from infra.run import Run, check_folder

# ------------------------------------------------------------------------------------------- flags
# All of them, with those of data.py and rewards.py. A size is global (over all ranks); what follows
# from others is a property, printed, never accepted.


@dataclass
class Model:
    """what is trained"""

    # Hugging Face folder or hub id of the policy, the model that is trained; the only flag that
    # must be given
    model: str = ""


@dataclass
class RunFlags:
    """where the run is kept, how long it lasts, when it is saved and evaluated"""

    # folder for metrics, samples and checkpoints; must not exist yet, but for --resume auto
    out: str = "runs/ppo"
    # any number from 0 to 999999: prompts, their order and all sampled tokens follow from it
    seed: int = 0
    # PPO steps. 0: print the memory plan, answer and score one batch, train nothing; with
    # steps 0 and eval_every 1 the model is evaluated on held-out rows, and that is all
    steps: int = 100
    # auto: go on from the newest whole checkpoint in --out, where there is one; no: a new run
    resume: Literal["no", "auto"] = "no"
    save_every: int = 0  # steps between checkpoints; 0: only the last step is saved
    save_minutes: float = 0.0  # minutes between checkpoints, besides; 0: none by the clock
    keep_last: int = 3  # how many checkpoints stay on the disk, the newest ones; 0: all
    # name of a metric of evaluations, such as eval/correct: when it is better than ever, a
    # checkpoint is saved at once, and the best one stays
    keep_best: str = ""
    # minutes after which the run saves and ends in good order, as it does on SIGTERM; 0: no limit
    max_minutes: float = 0.0
    # minutes that a phase of a step may take before every process prints where in the code it is;
    # after twice as many the run ends; 0: no limit
    stall_minutes: float = 30.0
    # steps between evaluations on held-out rows, of which there is one before the first step and
    # one after the last; 0: none
    eval_every: int = 0
    eval_rows: int = 256  # held-out rows of each task that are asked, 1 or more
    eval_samples: int = 1  # answers to each held-out row; above 1 there are pass@n and maj@n, too
    # sampling temperature in evaluations, 0 or more; 0: the likeliest token every time
    eval_temperature: float = 1.0
    # the step, from 1 on, whose operations are traced into OUT/profile, for a trace viewer; 0: none
    profile: int = 0
    wandb: str | None = None  # Weights & Biases project that gets the metrics, too; None: no W&B


@dataclass
class ModelFlags:
    """how models are loaded, split over GPUs and made to fit"""

    # folder or hub id from which the critic starts, may be a smaller model; None: that of --model
    critic_model: str | None = None
    # precision of the computations (weights are fp32): auto is bf16 on GPUs, fp32 on CPUs
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    # keep one tensor per layer and compute the rest once more in the backward pass: far less
    # memory, updates take about a third longer
    gradient_checkpointing: bool = True
    # code of the attention: varlen is the packed one of this repository, the others are those of
    # the transformers library
    attention: Literal["varlen", "sdpa", "flash_attention_2", "flex_attention"] = "varlen"
    # models that live in the machine's memory: 16 bytes less per parameter of a trained model on
    # the GPUs, slower steps; needs torchrun
    offload: tuple[Literal["policy", "critic", "reference"], ...] = ()
    # copies of the sharded models (HSDP), one per node for example; 1: one copy over all GPUs
    replicas: int = 1
    # GPUs that share each sequence (sequence parallelism, Ulysses), for answers too long for one;
    # a divisor of the number of GPUs and of attention heads; 1: none
    sp: int = 1
    # tokens that a GPU computes at once in an update, never more; with --sp 1 at least
    # max_prompt_tokens + max_new_tokens. More is faster and needs more memory
    max_tokens_per_microbatch: int = 18_000


@dataclass
class SamplingFlags:
    """how the questions are answered; numbers are for all GPUs together"""

    # what samples the answers; torch is plain PyTorch, slow, for debugging
    engine: Literal["vllm", "torch"] = "vllm"
    prompts_per_step: int = 256  # prompts of a step, a multiple of the number of GPUs
    samples_per_prompt: int = 1  # answers to each prompt; grpo and rloo need 2 or more
    # dynamic sampling (DAPO): how often in a step, 0 to 5, a batch of new prompts is asked in place
    # of those whose answers all have one reward; 0: never
    refill: int = 0
    max_new_tokens: int = 1024  # tokens of an answer at most; one that is cut gets reward 0
    # sampling temperature, above 0; the trainer's log-probs are at the same temperature
    temperature: float = 1.0
    # texts that end an answer and stay in it, besides the model's end-of-sequence tokens
    stop: tuple[str, ...] = ()
    # GPUs that share one vLLM engine (tensor parallelism); a divisor of the number of GPUs and of
    # attention heads
    tp: int = 1
    gpu_memory: float = 0.6  # part of a GPU's memory, 0 to 1, that vLLM takes while it samples


@dataclass
class PPOFlags:
    """the algorithm; the defaults are those of Open-Reasoner-Zero"""

    lr: float = 1e-6  # learning rate of the policy (AdamW), 0 or more, the same in all steps
    critic_lr: float = 5e-6  # learning rate of the critic (AdamW), 0 or more, the same in all steps
    # what an answer is compared with. gae: the critic's values (PPO); grpo, rloo: the other answers
    # to its prompt; reinforce++: all answers of the step. Without gae no critic is loaded
    advantage: Literal["gae", "grpo", "rloo", "reinforce++"] = "gae"
    critic_warmup: int = 0  # steps at the start that train the critic alone; 0: none
    ppo_epochs: int = 1  # how often a step trains on each of its answers, 1 or more
    # how often a step trains the critic on each of its answers, 1 or more; None: as often as the
    # policy
    critic_epochs: int | None = None
    # answers per optimizer step, a divisor of a step's answers; None: all, one optimizer step
    minibatch_size: int | None = None
    gamma: float = 1.0  # discount per token, 0 to 1; 1: what comes later counts in full
    # lambda of GAE, 0 to 1, for the policy. 1: advantage = return - value, unbiased; less than 1:
    # less variance, more trust in the critic
    lam: float = 1.0
    # lambda that grows with the answer, in place of --lam: 1 - 1 / (X x tokens of the answer) for
    # this X; VAPO (arXiv:2504.05118) takes X = 0.05; None: --lam
    lam_adaptive: float | None = None
    # lambda of GAE, 0 to 1, for the returns that the critic learns (VC-PPO); 1: unbiased
    critic_lam: float = 1.0
    # the policy's loss is the mean over all tokens; over sequences, of the means of each; or as if
    # every answer had --max_new_tokens tokens (constant)
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    # an update gains nothing from a probability ratio new / old below 1 - clip_low, 0 to 1
    clip_low: float = 0.2
    # ... nor from a ratio above 1 + clip_high, 0 or more; DAPO's clip-higher is 0.28
    clip_high: float = 0.2
    # above 1: a token with advantage A < 0 has at most the loss -A x this (arXiv:1912.09729);
    # None: no bound
    dual_clip: float | None = None
    # how far an update may move a value, in units of reward, 0 or more; 0: as far as it likes
    value_clip: float = 0.0
    # weight of the entropy bonus, in loss per nat, 0 or more; 0: none
    entropy_coef: float = 0.0
    # weight of the penalty on KL(policy || its start), in reward or loss per nat; 0: none, and no
    # reference model is loaded
    kl_coef: float = 0.0
    # to what the KL penalty is added: the reward of each token, or the policy's loss
    kl_in: Literal["reward", "loss"] = "reward"
    # estimate of the KL from r = log(policy / reference) of a sampled token, in nats: k1 is r, k2
    # r * r / 2, k3 exp(-r) - 1 + r
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    # KL in nats per token that --kl_coef is adapted to (arXiv:1909.08593); None: --kl_coef stays
    kl_target: float | None = None
    # truncated importance sampling: a token's loss is weighted by its probability in the trainer
    # over that in the engine, but by no more than this; 0: no weights
    tis_cap: float = 2.0


@dataclass
class Args(ModelFlags, rewards.Rules, PPOFlags, SamplingFlags, RunFlags, data.Source, Model):
    """Every knob, flat. Sizes are global; derived sizes are properties, printed, never accepted."""

    @property
    def batch_size(self):
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def minibatch(self):
        return self.minibatch_size or self.batch_size

    @property
    def eval_only(self):
        return self.steps == 0 and self.eval_every > 0

    @property
    def has_critic(self):
        return self.advantage not in ("grpo", "rloo", "reinforce++")

    @property
    def bf16(self):
        return self.dtype == "bf16" or (self.dtype == "auto" and torch.cuda.is_available())

    @property
    def compute_dtype(self):
        return torch.bfloat16 if self.bf16 else torch.float32


# What a resumed run may change; anything else would make it another run.
MAY_CHANGE = {flag.name for flag in fields(RunFlags) + fields(ModelFlags)} | {"tp", "gpu_memory"}
MAY_CHANGE -= {"seed", "model", "critic_model", "dtype", "keep_best"}


HELP = """\
PPO for language models whose answers a program can judge. On one GPU of 24 GB:
  torchrun --nproc_per_node 1 ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --task countdown \\
      --template chat --gpu_memory 0.25 --eval_every 10 --out runs/first

Will it fit? --plan N_GPUS GB says so of N_GPUS cards of GB each, and needs none:
  python ppo.py --plan 4 80 --model Qwen/Qwen2.5-3B --task countdown"""
# the boxes of --help
TITLES = {
    Model: "model",
    data.Source: "task",
    RunFlags: "run",
    SamplingFlags: "sampling",
    PPOFlags: "learning",
    rewards.Rules: "reward",
    ModelFlags: "memory and speed",
}


def parse_args(argv: list[str] | None = None) -> Args:
    """Flat flags; one box of --help for each of the classes above, in the order of TITLES."""
    boxes = []
    for i, (flags, title) in enumerate(TITLES.items()):
        titled = Annotated[flags, tyro.conf.arg(name=title)]
        boxes.append((f"box_{i}", titled, field(default_factory=flags)))
    parsed = tyro.cli(
        make_dataclass("Boxes", boxes),
        prog="ppo.py",
        description=HELP,
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
        args=argv,
    )
    values = {}
    for box in vars(parsed).values():
        values |= vars(box)
    args = Args(**values)
    if not args.model:
        sys.exit(
            "ppo.py: --model is missing: the Hugging Face folder or hub id of the model that is to "
            "be trained, as in --model Qwen/Qwen2.5-0.5B-Instruct"
        )
    return args


def require(args: Args, *rules):
    """Each rule is (flag, does it hold?, what is wrong otherwise). ValueError "FLAG=VALUE WRONG" of
    the first that does not hold."""
    for flag, holds, wrong in rules:
        if not holds:
            raise ValueError(f"{flag}={getattr(args, flag)!r}{wrong}")


def check(args: Args, world: int, only_plan: bool = False) -> list[PretrainedConfig]:
    """Every contradiction in the flags, before a weight is loaded. Returns the policy's and the
    critic's configurations. `only_plan`: for a machine that is not this one, and nothing is
    written."""
    configs = []
    for flag in ("model", "critic_model"):
        path = getattr(args, flag) or args.model
        try:
            configs.append(AutoConfig.from_pretrained(path, trust_remote_code=False))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{flag}={path!r} is no Hugging Face folder or hub id to be used: {error}"
            ) from error
    check_ranges(args)
    check_batch(args, world)
    check_lengths(args, configs)
    check_ranks(args, world, configs, alone="RANK" not in os.environ and not only_plan)
    check_algorithm(args)
    check_evaluation(args)
    if (args.steps or args.eval_only) and not only_plan:
        check_folder(Path(args.out), args.resume == "auto")
    return configs


POSITIVE = (  # or not given
    "prompts_per_step",
    "samples_per_prompt",
    "max_new_tokens",
    "max_prompt_tokens",
    "temperature",
    "tp",
    "sp",
    "replicas",
    "ppo_epochs",
    "critic_epochs",
    "minibatch",
    "lam_adaptive",
    "eval_rows",
    "eval_samples",
)
NOT_NEGATIVE = (
    "steps",
    "save_every",
    "save_minutes",
    "keep_last",
    "max_minutes",
    "stall_minutes",
    "eval_every",
    "critic_warmup",
    "profile",
)


def check_ranges(args: Args):
    for flag in POSITIVE:
        value = getattr(args, flag)
        require(args, (flag, value is None or value > 0, ": must be above 0"))
    for flag in NOT_NEGATIVE:
        require(args, (flag, getattr(args, flag) >= 0, ": must be 0 or above"))
    require(
        args,
        ("seed", 0 <= args.seed < 10**6, ": use 0 to 999999"),
        ("refill", 0 <= args.refill <= 5, ": use 0 to 5"),
        ("dual_clip", args.dual_clip is None or args.dual_clip > 1, ": must be above 1"),
    )


def check_batch(args: Args, world: int):
    if args.eval_only:
        world = 1
    even = math.ceil(args.prompts_per_step / world) * world
    best = math.gcd(args.minibatch, args.batch_size)
    several = args.samples_per_prompt > 1
    require(
        args,
        (
            "prompts_per_step",
            args.prompts_per_step == even,
            f" is no multiple of {world} ranks: use {even}",
        ),
        (
            "samples_per_prompt",
            several or args.advantage not in ("grpo", "rloo"),
            f": --advantage {args.advantage} compares answers to one prompt, use 2 or more",
        ),
        (
            "samples_per_prompt",
            several or not args.refill,
            ": --refill looks for answers that differ, use 2 or more",
        ),
        (
            "minibatch_size",
            args.minibatch == best,
            f" does not divide prompts x samples_per_prompt = {args.batch_size}: try {best}",
        ),
    )


def check_lengths(args: Args, configs: list[PretrainedConfig]):
    longest = args.max_prompt_tokens + args.max_new_tokens
    tokens = f"max_prompt_tokens + max_new_tokens = {longest} tokens, but "
    room = args.max_tokens_per_microbatch * args.sp
    if longest > room and not args.eval_only:
        raise ValueError(f"{tokens}max_tokens_per_microbatch x sp = {room}: raise it")
    limit = min(getattr(config, "max_position_embeddings", longest) for config in configs)
    if longest > limit:
        raise ValueError(f"{tokens}the model has {limit} positions: lower the limits")


def check_ranks(args: Args, world: int, configs: list[PretrainedConfig], alone: bool):
    """`alone`: not under torchrun."""
    tp = args.tp
    sp = args.sp
    node = int(os.environ.get("LOCAL_WORLD_SIZE", 1 if args.eval_only else world))
    heads = math.gcd(*(config.num_attention_heads for config in configs))
    heads_too = f" does not divide the {heads} attention heads: use a divisor of {heads}"
    require(
        args,
        ("tp", node % tp == 0, f" does not divide the {node} ranks: launch a multiple of {tp}"),
        ("tp", heads % tp == 0, heads_too),
        ("tp", tp == 1 or args.engine == "vllm", f" needs --engine vllm, not {args.engine}"),
        (
            "sp",
            world % sp == 0,
            f" does not divide the {world} ranks: launch a multiple of {sp}",
        ),
        ("sp", heads % sp == 0, heads_too),
        (
            "sp",
            sp == 1 or args.attention == "varlen",
            f" needs --attention varlen, not {args.attention}",
        ),
        (
            "replicas",
            args.replicas == 1 or (world % args.replicas == 0 and world > args.replicas),
            f" does not split {world} ranks into copies of 2 or more: use a divisor",
        ),
        ("offload", not (args.offload and alone), " needs torchrun"),
    )


def check_algorithm(args: Args):
    for flag in ("critic_warmup", "critic_epochs", "critic_lam", "lam", "lam_adaptive"):
        used = getattr(args, flag) != getattr(PPOFlags, flag)
        wrong = f" needs --advantage gae: {args.advantage} has no critic"
        require(args, (flag, args.has_critic or not used, wrong))
    require(
        args,
        (
            "lam",
            args.lam_adaptive is None or args.lam == PPOFlags.lam,
            f" and lam_adaptive={args.lam_adaptive}: give one of them",
        ),
        (
            "kl_target",
            args.kl_target is None or args.kl_coef > 0,
            " needs a --kl_coef above 0 to start from",
        ),
        (
            "kl_in",
            args.kl_in == "reward" or args.kl_estimator != "k1",
            " needs --kl_estimator k2 or k3: k1 has no useful gradient in a loss",
        ),
    )


def check_evaluation(args: Args):
    require(
        args,
        ("profile", args.profile <= args.steps, f" is none of the --steps {args.steps}"),
        (
            "keep_best",
            not args.keep_best or (args.eval_every and args.keep_best.startswith("eval/")),
            f" is no metric that --eval_every {args.eval_every} gives: use eval/correct",
        ),
        (
            "eval_samples",
            args.eval_temperature > 0 or args.eval_samples == 1,
            " above 1 needs --eval_temperature above 0",
        ),
    )


# --------------------------------------------------------------------------------------- one batch


@dataclass
class Answers:
    """Responses, those to one prompt being neighbours, and what belongs to each of them."""

    rows: list[dict]  # the row of its prompt
    samples: list[rollout.Sample]
    texts: list[str]
    scored: list[dict] = field(default_factory=list)  # what the verifier said, once it has

    def by_prompt(self, n: int) -> list["Answers"]:
        """The n answers to each prompt."""
        return [
            Answers(*(part[first : first + n] for part in vars(self).values()))
            for first in range(0, len(self.rows), n)
        ]

    def teaches(self) -> bool:
        """Are some of them rewarded differently? Those that our own machine failed on do not
        count."""
        sound = {result["reward"] for result in self.scored if result["status"] != "infra"}
        return len(sound) > 1


@dataclass(kw_only=True)
class Batch(Answers):
    """The B responses of a step. Every rank has all of it.

    Every (B, T) tensor is aligned to the token it is about, T being prompt + response,
    right-padded:
        logprobs[:, t] = log pi(ids[:, t] | ids[:, :t])   values[:, t] = V(ids[:, :t])
        mask[:, t]: the policy chose ids[:, t]
    Log-probs, entropy and KL are in nats."""

    ids: Tensor  # (B, T) long
    # (B, T) bool; EOS included; add_scores takes out what our own machine failed to judge
    mask: Tensor
    engine_logprobs: Tensor  # (B, T) as the engine saw them
    lengths: list[int]  # B, prompt + response
    scores: Tensor | None = None  # (B,)
    old_values: Tensor | None = None  # (B, T) under the critic before the update
    # (B, T) under the policy before the update; None when one update is all there is: then
    # update_policy takes those of its own forward pass, without their gradient
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None  # (B, T) under the reference
    kl_coef: float = 0.0  # of this step
    advantages: Tensor | None = None  # (B, T)
    returns: Tensor | None = None  # (B, T) what the critic learns

    def plain(self) -> dict:
        """Tensors and plain containers, which can be read without running code."""
        return vars(self) | {
            "rows": [dict(row) for row in self.rows],
            "samples": [tuple(sample) for sample in self.samples],
        }


def make_batch(answers: Answers, device: torch.device) -> Batch:
    prompts = [row["ids"] for row in answers.rows]
    collated = rollout.collate(prompts, answers.samples, device)
    watchdog.saw_length(max(collated.lengths))
    return Batch(**vars(answers), **collated._asdict())


def add_scores(batch: Batch):
    """What the verifiers said, (B,); a sample that our own machine failed on teaches nothing."""
    device = batch.mask.device
    batch.scores = torch.tensor([result["reward"] for result in batch.scored], device=device)
    sound = torch.tensor([result["status"] != "infra" for result in batch.scored], device=device)
    if not sound.any():
        raise RuntimeError(
            f"every reward failed on our side (infra), for example {batch.scored[0]}"
        )
    batch.mask = batch.mask & sound[:, None]


def microbatches(batch: Batch, chosen: list[int], args: Args, run: Run) -> list[kernels.Packed]:
    """This rank's share of the responses `chosen`, packed under the token budget; as many
    micro-batches as on every rank. Each that is begun is a sign of life for the watch over
    hangs."""
    ranks = run.ranks
    fed = [batch.lengths[b] - 1 for b in chosen]
    planned = data.plan_microbatches(fed, args.max_tokens_per_microbatch * ranks.sp, ranks.rows)
    packed = []
    for places in planned[ranks.row]:
        rows = [chosen[i] for i in places]
        packed.append(
            kernels.pack(batch.ids, batch.mask, batch.lengths, rows, ranks.sp_rank, ranks.sp)
        )
    return run.progress(packed)


@torch.no_grad()
def compute_logprobs(model: nn.Module, batch: Batch, args: Args, run: Run) -> Tensor:
    """Of every response token under the model, (B, T) on every rank."""
    parts = [
        (p.index, kernels.policy_forward(model, p, args.temperature, run.ranks.sp_group)[0])
        for p in microbatches(batch, range(len(batch.rows)), args, run)
    ]
    models.reshard(model)
    return kernels.unpack(parts, batch.mask, run.ranks)


@torch.no_grad()
def compute_values(critic: nn.Module, batch: Batch, args: Args, run: Run) -> Tensor:
    """Of every response token, (B, T) on every rank. The critic reads prompt and response; it is
    asked, and trained, at the response tokens alone."""
    parts = [
        (p.index, kernels.critic_forward(critic, p, run.ranks.sp_group))
        for p in microbatches(batch, range(len(batch.rows)), args, run)
    ]
    models.reshard(critic)
    return kernels.unpack(parts, batch.mask, run.ranks)


# ------------------------------------------------------------------------ formulas: pure functions


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's own samples:
    joschu.net/blog/kl-approx.html. k1 is unbiased and may be negative, k2 is biased with low
    variance, k3 is unbiased and never negative."""
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    if kind == "k3":
        return torch.exp(-log_ratio) - 1 + log_ratio
    raise KeyError(kind)


def adapted_kl_coef(kl_coef: float, kl: float, args: Args) -> float:
    """arXiv:1909.08593, section 2.2: larger when the KL is above its target, by at most a fifth in
    10,000 samples."""
    error = min(max(kl / args.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * args.batch_size / 10_000)


def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    """Advantages (B, T), 0 outside the mask, arXiv:1506.02438 equation 16; lam may be (B,).
    The value after the last masked token is 0: a response is an episode, also when it was cut."""
    advantages = torch.zeros_like(values)
    last = values.new_zeros(len(values))  # (B,)
    next_value = values.new_zeros(len(values))  # (B,)
    for t in reversed(range(values.shape[1])):
        chosen = mask[:, t]
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        last = torch.where(chosen, delta + gamma * lam * last, last)
        next_value = torch.where(chosen, values[:, t], next_value)
        advantages[:, t] = torch.where(chosen, last, 0.0)
    return advantages


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the masked entries, 0 elsewhere."""
    chosen = x[mask]
    scale = torch.rsqrt(chosen.var(unbiased=False) + 1e-8)
    return torch.where(mask, (x - chosen.mean()) * scale, 0.0)


def group_advantages(token_rewards: Tensor, mask: Tensor, n: int, kind: str) -> Tensor:
    """(B, T): of whole responses, against the n to one prompt, neighbours; those without a masked
    token do not count. rloo (arXiv:2402.14740): less the mean of the others. grpo
    (arXiv:2402.03300): less the mean of all, in standard deviations."""
    total = torch.where(mask, token_rewards, 0.0).sum(1).view(-1, n)  # (prompts, n)
    counted = mask.any(1).view(-1, n)
    count = counted.sum(1, keepdim=True)
    mean = (total * counted).sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(counted, total - mean, 0.0)
    others = (count - 1).clamp(min=1)
    if kind == "rloo":
        advantage = centred * count / others
    else:
        std = (centred.square().sum(1, keepdim=True) / others).sqrt()
        advantage = centred / (std + 1e-4)
    return mask * advantage.view(-1, 1)


def loss_weights(mask: Tensor, kind: str, limit: int) -> Tensor:
    """What every token's loss is multiplied with, (B, T), before all are added up. token: mean over
    the masked tokens (DAPO); sequence: mean over responses of their means (GRPO); constant: as if
    each had `limit` tokens (Dr. GRPO)."""
    lengths = mask.sum(1, keepdim=True)
    responses = (lengths > 0).sum()
    if kind == "token":
        count = lengths.sum()
    elif kind == "sequence":
        count = lengths * responses
    else:
        count = limit * responses
    return mask / count.clamp(min=1)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, args: PPOFlags
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate, arXiv:1707.06347 equation 7, per token, to be minimised; and where
    the lower and the upper clip were active. dual_clip bounds what a negative advantage costs
    (arXiv:1912.09729)."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if args.dual_clip:
        bound = torch.where(advantages < 0, -advantages * args.dual_clip, math.inf)
        loss = torch.minimum(loss, bound)
    low = (ratio < 1 - args.clip_low) & (advantages < 0)
    high = (ratio > 1 + args.clip_high) & (advantages > 0)
    return loss, low, high


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error per token, with clip > 0 the worse of plain and clipped; and where the
    clip was active."""
    error = (values - returns) ** 2
    if not clip:
        return 0.5 * error, torch.zeros_like(error, dtype=torch.bool)
    near = old_values + (values - old_values).clamp(-clip, clip)
    clipped_error = (near - returns) ** 2
    active = (clipped_error > error) & ((values - old_values).abs() > clip)
    return 0.5 * torch.maximum(error, clipped_error), active


def add_advantages(batch: Batch, args: Args):
    """The score stands on the last response token, a KL penalty on every one; then GAE, or a
    comparison within the group of answers to one prompt."""
    mask = batch.mask
    last = mask & ~nn.functional.pad(mask, (0, 1))[:, 1:]
    token_rewards = torch.where(last, batch.scores[:, None], 0.0)
    if args.kl_coef and args.kl_in == "reward":
        kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, args.kl_estimator)
        token_rewards = token_rewards - batch.kl_coef * mask * kl

    if args.advantage in ("grpo", "rloo"):
        n = args.samples_per_prompt
        batch.advantages = group_advantages(token_rewards, mask, n, args.advantage)
    elif args.advantage == "reinforce++":  # GAE without a critic: all that is still to come
        zeros = torch.zeros_like(token_rewards)
        advantages = gae(token_rewards, zeros, mask, args.gamma, args.lam)
        batch.returns = torch.where(mask, advantages, 0.0)
        batch.advantages = whiten(advantages, mask)
    elif args.advantage == "gae":
        values = batch.old_values
        lam = args.lam
        if args.lam_adaptive:
            lam = 1 - 1 / (args.lam_adaptive * mask.sum(1)).clamp(min=1)  # (B,)
        advantages = gae(token_rewards, values, mask, args.gamma, lam)
        batch.advantages = whiten(advantages, mask)
        if args.lam_adaptive or args.critic_lam != args.lam:
            advantages = gae(token_rewards, values, mask, args.gamma, args.critic_lam)
        batch.returns = torch.where(mask, advantages + values, 0.0)
    else:
        raise ValueError(
            f"advantage={args.advantage!r} has no formula: add one to add_advantages in ppo.py"
        )


# -------------------------------------------------------------------------------------- one update


def at(x: Tensor, p: kernels.Packed) -> Tensor:
    """The entries (K,) of a (B, T) tensor at the K response tokens of a micro-batch."""
    return x.view(-1)[p.index]


def only(chosen: list[int], mask: Tensor) -> Tensor:
    """The mask (B, T) of the responses `chosen` alone."""
    part = torch.zeros_like(mask)
    part[chosen] = mask[chosen]
    return part


def update_policy(
    policy: Trained, lr: float, batch: Batch, chosen: list[int], args: Args, run: Run
) -> list[tuple[Tensor, Tensor]]:
    """One optimizer step on the responses `chosen`. Returns (index, log-probs before the step) of
    its micro-batches.

    The loss of a token is weighted before anything is added up, with one set of weights for all
    ranks; times world, because FSDP averages gradients over ranks. So packing, budget and ranks
    cannot change the gradient."""
    before = []
    mask = only(chosen, batch.mask)
    weights = run.ranks.world * loss_weights(mask, args.loss_mean, args.max_new_tokens)
    for p in microbatches(batch, chosen, args, run):
        logprobs, entropy = kernels.policy_forward(
            policy.model, p, args.temperature, run.ranks.sp_group
        )
        old = logprobs.detach()
        if batch.old_logprobs is not None:
            old = at(batch.old_logprobs, p)
        loss, low, high = policy_loss(logprobs, old, at(batch.advantages, p), args)
        if args.tis_cap:  # the engine sampled, not the trainer: weigh by their ratio, truncated
            loss = loss * torch.exp(old - at(batch.engine_logprobs, p)).clamp(max=args.tis_cap)
        loss = loss - args.entropy_coef * entropy
        if args.kl_coef and args.kl_in == "loss":
            kl = kl_estimate(logprobs, at(batch.ref_logprobs, p), args.kl_estimator)
            loss = loss + batch.kl_coef * kl
        (loss * at(weights, p)).sum().backward()
        run.meter.add("policy/", loss=loss, entropy=entropy, clipfrac_low=low, clipfrac_high=high)
        run.meter.add("policy/", approx_kl=kl_estimate(old, logprobs, "k3"))
        before.append((p.index, logprobs.detach()))
    take_step("policy", policy, lr, batch, chosen, run)
    return before


def update_critic(
    critic: Trained, lr: float, batch: Batch, chosen: list[int], args: Args, run: Run
):
    """One optimizer step on the responses `chosen`; the mean is over their tokens."""
    mask = only(chosen, batch.mask)
    weights = run.ranks.world * loss_weights(mask, "token", args.max_new_tokens)
    for p in microbatches(batch, chosen, args, run):
        values = kernels.critic_forward(critic.model, p, run.ranks.sp_group)
        old = at(batch.old_values, p)
        loss, clipped = value_loss(values, old, at(batch.returns, p), args.value_clip)
        (loss * at(weights, p)).sum().backward()
        run.meter.add("critic/", loss=loss, clipfrac=clipped)
    take_step("critic", critic, lr, batch, chosen, run)


MAX_GRAD_NORM = 1.0


def take_step(name: str, trained: Trained, lr: float, batch: Batch, chosen: list[int], run: Run):
    """Clips the gradient over all ranks to MAX_GRAD_NORM and steps. A gradient that is not finite
    ends the run instead."""
    norm = models.optimizer_step(trained, lr, MAX_GRAD_NORM)
    run.meter.add(f"{name}/", grad_norm=norm)
    update = {"model": name, "chosen": list(chosen), "lr": lr}
    run.check_finite(batch, update, **models.suspects(trained.model, norm, run.meter))


# --------------------------------------------------------------------- what surrounds the algorithm


Metrics = dict[str, float]


@dataclass
class Setup:
    """What a run has, made once at its start."""

    args: Args
    configs: list[PretrainedConfig]  # of policy and critic
    tokenizer: object
    source: data.Data
    accelerator: object
    run: Run
    made: dict  # what was chosen for the user, for the log
    engine: rollout.Engine | None = None
    policy: Trained | None = None
    critic: Trained | None = None
    reference: nn.Module | None = None


def set_up(args: Args) -> Setup:
    """Everything but the engine and the models."""
    configs = check(args, int(os.environ.get("WORLD_SIZE", 1)))
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    bars = show_bars()
    # before the ranks know of each other: it may fork
    source = data.load(args, tokenizer, args.seed, args.eval_rows, bars)
    ends = [(name, len(r), r[0]["ids"], r[-1]["ids"]) for name, r in source.train.items()]
    read = repr(ends)
    first_prompt = tokenizer.decode(ends[0][2])
    accelerator, ranks = dist.start_ranks(
        args.bf16, args.sp, args.replicas, patience=2 * args.stall_minutes or 120
    )
    run = Run(args, ranks)
    run.say(f"{source.report}\nthe first prompt, as it is fed: {first_prompt!r}".strip())
    if len(set(run.everywhere(read + source.report))) > 1:
        raise RuntimeError("ranks differ in rows: share HF_DATASETS_CACHE")
    made = rewards.start({row["task"] for row in chain(*source.test.values())}, args)
    made |= kernels.setup(configs[0].model_type, bars, args.bf16, args.attention)
    rows = f"{zlib.crc32(read.encode()):08x}"
    run.find_checkpoint(asdict(args) | {"first_prompt": first_prompt, "rows": rows}, MAY_CHANGE)
    if run.main:
        from tools.plan import line_of_run

        run.say(line_of_run(*configs, args, ranks.world, torch.cuda.is_available()))
    return Setup(args, configs, tokenizer, source, accelerator, run, made)


def show_bars():
    """Progress bars are for people, not for log files."""
    return sys.stderr.isatty() and int(os.environ.get("RANK", 0)) == 0


def start_engine(setup: Setup):
    args = setup.args
    run = setup.run

    def make():
        return rollout.make_sampler(
            args.engine,
            args.model,
            rollout.eos_ids(args.model, setup.tokenizer),
            tp=args.tp,
            gpu_memory=args.gpu_memory,
            seed=args.seed,
            stop=args.stop,
            max_len=args.max_prompt_tokens + args.max_new_tokens,
            dtype="bfloat16" if args.bf16 else "float32",
        )

    def rescue(faults: str):
        """An engine has failed: saves what is trained, and returns the weights for the next one."""
        run.say(
            f"warning: an engine failed; all are made anew, with the weights of step {run.done}. "
            f"{faults}"
        )
        run.save_now(wait=True)
        if setup.policy:
            return models.full_weights(setup.policy.model, args.compute_dtype)
        return ()

    return rollout.Engine(make, rescue, run.ranks, args.seed, show_bars())


def load_models(setup: Setup):
    args = setup.args
    checkpoint = setup.run.checkpoint
    policy_path, critic_path = args.model, args.critic_model or args.model
    if checkpoint:
        policy_path, critic_path = checkpoint / "policy", checkpoint / "critic"
    policy = load_model("policy", policy_path, args, setup.accelerator)
    setup.policy = Trained(policy, make_optimizer(policy))
    trained = {"policy": setup.policy}
    if args.has_critic:
        critic = load_model("critic", critic_path, args, setup.accelerator)
        setup.critic = trained["critic"] = Trained(critic, make_optimizer(critic))
    if args.kl_coef:
        setup.reference = load_model("reference", args.model, args, setup.accelerator)
    setup.run.attach(trained, setup.tokenizer)


def load_model(name: str, path: str | Path, args: Args, accelerator) -> nn.Module:
    """The policy, the critic or the reference."""
    options = {
        "accelerator": accelerator,
        "attention": args.attention,
        "checkpointing": args.gradient_checkpointing,
        "offload": name in args.offload,
    }
    if name == "critic":
        return models.load_critic(path, **options)
    return models.load_policy(path, kernels.LogprobHead, trained=name == "policy", **options)


def make_optimizer(model: nn.Module):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def announce(setup: Setup):
    """What will be run, and what was chosen for the user; of a dry run also its memory, item by
    item."""
    args = setup.args
    run = setup.run
    critic = setup.critic.model if setup.critic else None
    named = {"policy": setup.policy.model, "critic": critic, "reference": setup.reference}
    setup.made["roofline of a rank"] = flops.roofline().text
    run.say(plan(args, run.ranks, named, setup.made, run.start))
    if args.steps == 0:
        from tools.plan import plan_of_run

        cuda = torch.cuda.is_available()
        run.say(plan_of_run(*setup.configs, args, run.ranks.world, card_gb=None, cuda=cuda))


def answer(
    setup: Setup, rows: list[dict], n: int, temperature: float, step: int, purpose: int
) -> Answers:
    """n answers to each row's prompt. They are functions of (seed, step, purpose). Purposes are
    0: of the step, 1: of an evaluation, 2: of the canary, 3 to 7: of refills."""
    prompts = [row["ids"] for row in rows]
    limit = setup.args.max_new_tokens
    samples = setup.engine.ask(prompts, n, limit, temperature, step, purpose)
    texts = [
        setup.tokenizer.decode(sample.ids, skip_special_tokens=True)
        for sample in dist.share(samples, setup.run.ranks)
    ]
    repeated = [row for row in rows for _ in range(n)]
    return Answers(repeated, samples, dist.gather(texts, setup.run.ranks))


def submit(answers: Answers, args: Args, ranks: dist.Ranks) -> list:
    """Starts the verifiers on this rank's share of the answers."""
    texts = dist.share(answers.texts, ranks)
    rows = dist.share(answers.rows, ranks)
    finished = [sample.finished for sample in dist.share(answers.samples, ranks)]
    return rewards.submit(texts, rows, finished, rules=args)


def collect(pending: list, ranks: dist.Ranks) -> list[dict]:
    """Waits for the results of all ranks."""
    return dist.gather([future.result() for future in pending], ranks)


def answer_and_judge(setup: Setup, *asked, purpose: int) -> Answers:
    """`answer`, for its rows, n, temperature and step; then waits for the verdicts."""
    answers = answer(setup, *asked, purpose)
    ranks = setup.run.ranks
    answers.scored = collect(submit(answers, setup.args, ranks), ranks)
    return answers


def refill(answers: Answers, draw: Callable, args: Args) -> Answers:
    """Dynamic sampling (DAPO, arXiv:2503.14476): answers to one prompt that are all rewarded alike
    teach nothing; those to another prompt, of draw(1), draw(2) ... up to `refill` of them, take
    their place. Returns as many as before: first those that teach, each kind in the order it came."""
    groups = answers.by_prompt(args.samples_per_prompt)
    for k in range(1, args.refill + 1):
        if sum(group.teaches() for group in groups) >= args.prompts_per_step:
            break
        groups += draw(k).by_prompt(args.samples_per_prompt)
    groups.sort(key=Answers.teaches, reverse=True)  # stable: each kind stays in its order
    kept = Answers([], [], [])
    for group in groups[: args.prompts_per_step]:
        for name, part in vars(group).items():
            getattr(kept, name).extend(part)
    return kept


def draw_more(setup: Setup, step: int, k: int) -> Answers:
    """Judged answers to the prompts of a batch that no step has: steps end below 10**6, and a step
    draws at most 5 times."""
    rows = next_prompts(setup, 10**6 + 5 * step + k)
    n = setup.args.samples_per_prompt
    return answer_and_judge(setup, rows, n, setup.args.temperature, step, purpose=2 + k)


def next_prompts(setup: Setup, step: int) -> list[dict]:
    n = setup.args.prompts_per_step
    return data.batch(setup.source.train, step, n, setup.args.seed, setup.source.weights)


def evaluate(setup: Setup) -> tuple[Metrics, Answers]:
    """Metrics and all answers on held-out rows, with the same random numbers every time."""
    n = setup.args.eval_samples
    held_out = list(chain(*setup.source.test.values()))
    answers = answer_and_judge(setup, held_out, n, setup.args.eval_temperature, 0, purpose=1)
    metrics = rewards.evaluation(answers.scored, n, [row["task"] for row in answers.rows])
    metrics["eval/length_mean"] = fmean(len(sample.ids) for sample in answers.samples)
    return metrics, answers


def sync(setup: Setup, step: int) -> float:
    """New weights into the engine; then the canary: fresh answers, on whose log-probs the trainer
    must agree. Weights stale by many steps show as 0.2, bf16 as about 0.01. Returns the worst
    engine's mean |difference|."""
    args = setup.args
    run = setup.run
    setup.engine.load(models.full_weights(setup.policy.model, args.compute_dtype))
    count = 4 * run.ranks.world
    rows = data.batch(setup.source.train, step, count, args.seed, setup.source.weights)
    prompts = [row["ids"] for row in rows]
    limit = min(64, args.max_new_tokens)
    samples = setup.engine.ask(prompts, 1, limit, args.temperature, step, purpose=2)
    batch = make_batch(Answers(rows, samples, []), setup.accelerator.device)
    run.check_finite(batch, engine_logprobs=batch.engine_logprobs)
    logprobs = compute_logprobs(setup.policy.model, batch, args, run)
    gap = (logprobs - batch.engine_logprobs).abs().view(run.ranks.world, -1).sum(1)
    tokens = batch.mask.view(run.ranks.world, -1).sum(1)
    worst = (gap / tokens).max().item()
    tolerance = 0.05 if args.bf16 else 0.001  # nats a token
    if not worst < tolerance:
        raise RuntimeError(
            f"canary at step {step}: log-probs differ by {worst:.4f}, allowed {tolerance}: "
            "the engine has stale or wrong weights, or another temperature or precision"
        )
    return worst


def evaluate_only(setup: Setup):
    run = setup.run
    metrics, answers = evaluate(setup)
    run.open()
    run.log({"step": run.start, **metrics}, rollout.records(run.start, **vars(answers)))
    run.say("\n".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    setup.engine.close()
    return run.history


def dry_run(setup: Setup):
    """--steps 0: what do the prompts, answers and rewards look like?"""
    args = setup.args
    run = setup.run
    rows = next_prompts(setup, run.start)
    n = args.samples_per_prompt
    answers = answer_and_judge(setup, rows, n, args.temperature, run.start, purpose=0)
    mean = fmean(result["reward"] for result in answers.scored)
    shown = rollout.show(rollout.records(run.start, **vars(answers))[:2])
    run.say(f"one batch: reward {mean:.3f}\n{shown}")
    setup.engine.close()
    return []


# ------------------------------------------------------------------------------------------- train


@watchdog.watched
def train(args: Args) -> list[dict]:
    """Runs `args.steps` steps and returns the rows of metrics.jsonl (rank 0: those before a resume,
    too)."""
    began = time.perf_counter()
    setup = set_up(args)
    run, device = setup.run, setup.accelerator.device
    if run.checkpoint and run.start >= args.steps:
        run.say(
            f"{run.checkpoint} has all the --steps {args.steps}: nothing is left to do; ask for more"
        )
        return []
    setup.engine = engine = start_engine(setup)  # before the models: it measures the free memory
    if args.eval_only:
        return evaluate_only(setup)

    engine.sleep()
    load_models(setup)
    policy, critic, reference = setup.policy, setup.critic, setup.reference
    # with --kl_target it moves, and a resume goes on from where it was
    kl_coef = run.carried["kl_coef"] or args.kl_coef
    if args.steps:
        run.open()
    announce(setup)
    canary = sync(setup, run.start)
    run.say(
        f"ready after {time.perf_counter() - began:.0f} s; "
        f"engine and trainer agree within {canary:.1e} nats a token"
    )
    if args.steps == 0:
        return dry_run(setup)
    if args.eval_every and run.start == 0:
        metrics = evaluate(setup)[0]
        run.log({"step": 0, **metrics})
        run.say(
            f"step    0/{args.steps} | eval {metrics['eval/correct']:.3f} "
            "of the held-out rows right"
        )
    began = time.perf_counter()

    for step in range(run.start, args.steps):
        run.begin_step(step + 1)

        # ---- 1. sample: the policy answers a fresh batch of prompts
        with run.phase("sample"):
            prompts = next_prompts(setup, step)
            n = args.samples_per_prompt
            answers = answer(setup, prompts, n, args.temperature, step, purpose=0)

        # ---- 2. reward: text -> number, in other processes while phase 3 runs
        with run.phase("reward"):
            pending = submit(answers, args, run.ranks)
        with run.phase("sample"):  # more, in place of prompts whose answers are all rewarded alike
            if args.refill:
                answers.scored = collect(pending, run.ranks)
                answers = refill(answers, partial(draw_more, setup, step), args)
            engine.sleep()  # the card's memory is the trainer's now
        batch = make_batch(answers, device)
        batch.kl_coef = kl_coef

        # ---- 3. forward: log-probs under policy and reference, values under the critic; no grad
        train_policy = step >= args.critic_warmup
        kl_in_reward = args.kl_coef and args.kl_in == "reward"
        # with one update a step the old log-probs are that update's own, detached: no pass for them
        one_update = train_policy and args.ppo_epochs * args.batch_size == args.minibatch
        one_update = one_update and not kl_in_reward
        with run.phase("forward"):
            if critic:
                batch.old_values = compute_values(critic.model, batch, args, run)
            if not one_update:
                batch.old_logprobs = compute_logprobs(policy.model, batch, args, run)
            if reference:
                batch.ref_logprobs = compute_logprobs(reference, batch, args, run)
        with run.phase("reward"):  # what is left to wait for
            if not batch.scored:
                batch.scored = collect(pending, run.ranks)
            add_scores(batch)

        # ---- 4. advantage: from the scores, the values and the KL to the reference
        with run.phase("advantage"):
            add_advantages(batch, args)
        if run.should_stop():  # a safe point: the weights are still those of the step before
            break
        run.check_finite(
            batch,
            rewards=batch.scores,
            engine_logprobs=batch.engine_logprobs,
            advantages=batch.advantages,
            values=batch.old_values,
            logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            returns=batch.returns,
        )

        # ---- 5. update: epochs x minibatches; policy, then critic
        policy_lr = args.lr
        critic_lr = args.critic_lr
        policy_epochs = args.ppo_epochs if train_policy else 0
        critic_epochs = (args.critic_epochs or args.ppo_epochs) if critic else 0
        with run.phase("update"):
            for epoch in range(max(policy_epochs, critic_epochs)):
                shuffled = random.Random(f"{args.seed} {step} {epoch}")
                order = shuffled.sample(range(args.batch_size), args.batch_size)
                for first in range(0, args.batch_size, args.minibatch):
                    chosen = order[first : first + args.minibatch]
                    if not batch.mask[chosen].any():  # our own machine failed on all of them
                        continue
                    if epoch < policy_epochs:
                        before = update_policy(policy, policy_lr, batch, chosen, args, run)
                    if epoch < critic_epochs:
                        update_critic(critic, critic_lr, batch, chosen, args, run)
            if one_update:
                batch.old_logprobs = kernels.unpack(before, batch.mask, run.ranks)
        run.done = step + 1

        # ---- 6. sync: the engine gets the new weights and must prove it
        with run.phase("sync"):
            canary = sync(setup, step + 1)

        # ---- 7. report: metrics, one line, samples, evaluation, checkpoint
        with run.phase("report"):
            row = {"step": step + 1, "mismatch/canary": canary, "policy/lr": 0.0}
            if train_policy:
                row["policy/lr"] = policy_lr
            if critic:
                row["critic/lr"] = critic_lr
            row |= batch_metrics(batch, args, run)
            if args.kl_target:
                kl_coef = adapted_kl_coef(kl_coef, row["policy/ref_kl"], args)
                run.carried["kl_coef"] = kl_coef
            if args.eval_every and (step + 1 == args.steps or (step + 1) % args.eval_every == 0):
                row |= evaluate(setup)[0]
        row |= speed_metrics(batch, {"policy": policy_epochs, "critic": critic_epochs}, setup)
        shown = batch_records(batch, step + 1, setup.tokenizer)
        run.log(row, shown)
        run.say(line(row, args.steps, (time.perf_counter() - began) / (run.done - run.start)))
        if run.done % 10 == 0:
            run.say(rollout.show(shown[:2]))
        run.warn_if_diverging(row, young=step < args.critic_warmup + 50)
        run.save_if_due(row)
        if run.should_stop():
            break

    run.close()
    engine.close()
    return run.history


# ----------------------------------------------------------------------------------------- metrics


def batch_metrics(batch: Batch, args: Args, run: Run) -> Metrics:
    """Of the rollout and its update."""
    mask = batch.mask
    row = rewards.summary(batch.scored, [row["task"] for row in batch.rows])
    row |= rollout.summary(batch.samples, run.times["time/sample"])
    row |= rollout.mismatch(batch.old_logprobs[mask], batch.engine_logprobs[mask], args.tis_cap)
    row |= run.meter.means(run.ranks)
    alike = batch.scores.view(-1, args.samples_per_prompt).std(1, unbiased=False) < 1e-6
    row["reward/std"] = batch.scores.std(unbiased=False).item()
    row["reward/alike_frac"] = alike.float().mean().item()
    if batch.old_values is not None:
        row |= critic_metrics(batch.old_values, batch.returns, mask)
    if batch.ref_logprobs is not None:
        kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, args.kl_estimator)
        row["policy/ref_kl"] = kl[mask].mean().item()
        row["policy/kl_coef"] = batch.kl_coef
    return row


def critic_metrics(values: Tensor, returns: Tensor, mask: Tensor) -> Metrics:
    """Explained variance is 1 when the critic knows every return, 0 when it is no better than a
    constant. Calibration: mean values and returns of the four quarters of each response."""
    v = values[mask]
    r = returns[mask]
    row = {
        "critic/value_mean": v.mean().item(),
        "critic/value_min": v.min().item(),
        "critic/value_max": v.max().item(),
    }
    quarter = (mask.cumsum(1) - 1) * 4 // mask.sum(1, keepdim=True).clamp(min=1)
    for q in range(4):
        chosen = mask & (quarter == q)
        if chosen.any():
            row[f"critic/value_q{q + 1}"] = values[chosen].mean().item()
            row[f"critic/return_q{q + 1}"] = returns[chosen].mean().item()
    variance = r.var(unbiased=False).item()
    error = (r - v).var(unbiased=False).item()
    row["critic/explained_var"] = 1 - error / variance if variance > 1e-8 else 0.0
    return row


def speed_metrics(batch: Batch, epochs: dict[str, int], setup: Setup) -> Metrics:
    """Seconds and memory of the phases, how full the micro-batches were, and MFU."""
    run = setup.run
    fed = [length - 1 for length in batch.lengths]
    passes = {trained.model: epochs[name] for name, trained in run.trained.items()}
    fill = data.plan_summary(
        fed, setup.args.max_tokens_per_microbatch * setup.args.sp, run.ranks.rows
    )
    times = run.everywhere(run.times)
    return run.times | fill | flops.utilisation(times, passes, fed, batch.mask.sum().item())


def batch_records(batch: Batch, step: int, tokenizer) -> list[dict]:
    """Eight responses for samples.jsonl, token by token."""
    numbers = {"advantages": batch.advantages}
    if batch.old_values is not None:
        numbers["values"] = batch.old_values
    return rollout.records(
        step,
        batch.rows,
        batch.samples,
        batch.texts,
        batch.scored,
        count=8,
        decode=tokenizer.decode,
        **numbers,
    )


if __name__ == "__main__":
    if "--plan" in sys.argv:
        from tools.plan import main

        main(sys.argv[1:])
    else:
        train(parse_args())
