"""Does every test fail on the fault it guards? python tests/planted.py [NAME ...]

Each bug below is planted alone, into a copy of the repository, and the named test files must notice. Exit code 1 when
one of them does not. Run this after a change to the tests, and add a line here for every bug that got through.
"""

import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import launch
import pytest

ROOT = Path(__file__).resolve().parent.parent


class Bug(NamedTuple):
    name: str
    file: str
    old: str  # stands there exactly once
    new: str
    tests: tuple[str, ...]  # each of these files must fail


MATH, ALIGNMENT, KERNELS = ("test_math.py",), ("test_alignment.py",), ("test_kernels.py",)
EXACT, CHOICES = ("test_exact.py",), ("test_choices.py",)
DATA, REWARDS, TRAIN = ("test_data.py",), ("test_rewards.py",), ("test_train.py",)
PACKING = ("test_plan_microbatches.py",)
CRASH, GUARDS = ("test_crash.py",), ("test_guards.py",)
SANDBOX, EQUALITY, SOURCES = ("test_sandbox.py",), ("test_equality.py",), ("test_sources.py",)
BUGS = [
    # the classics of PPO
    Bug(
        "advantage-sign",
        "ppo.py",
        "torch.maximum(-advantages * ratio, -advantages * clipped)",
        "torch.maximum(advantages * ratio, advantages * clipped)",
        MATH,
    ),
    Bug(
        "ratio-inverted",
        "ppo.py",
        "ratio = torch.exp(logprobs - old_logprobs)",
        "ratio = torch.exp(old_logprobs - logprobs)",
        MATH,
    ),
    Bug(
        "minimum",
        "ppo.py",
        "torch.maximum(-advantages * ratio",
        "torch.minimum(-advantages * ratio",
        MATH,
    ),
    Bug(
        "clips-swapped",
        "ppo.py",
        "ratio.clamp(1 - args.clip_low, 1 + args.clip_high)",
        "ratio.clamp(1 - args.clip_high, 1 + args.clip_low)",
        MATH,
    ),
    Bug(
        "value-minimum",
        "ppo.py",
        "torch.maximum(error, clipped_error)",
        "torch.minimum(error, clipped_error)",
        MATH,
    ),
    Bug(
        "kl-sign",
        "ppo.py",
        "log_ratio = logprobs - ref_logprobs",
        "log_ratio = ref_logprobs - logprobs",
        MATH,
    ),
    Bug("kl-controller", "ppo.py", "kl / args.kl_target - 1", "1 - kl / args.kl_target", CHOICES),
    Bug(
        "gae-no-mask", "ppo.py", "chosen = mask[:, t]", "chosen = torch.ones_like(mask[:, t])", MATH
    ),
    Bug(
        "gae-value-of-padding",
        "ppo.py",
        "next_value = torch.where(chosen, values[:, t], next_value)",
        "next_value = values[:, t]",
        MATH,
    ),
    Bug(
        "gae-in-place",
        "ppo.py",
        "advantages = torch.zeros_like(values)\n    last",
        "advantages = values\n    last",
        MATH,
    ),
    Bug(
        "returns-off-mask",
        "ppo.py",
        "batch.returns = torch.where(mask, advantages + values, 0.0)",
        "batch.returns = advantages + values",
        MATH,
    ),
    Bug("whiten-no-mask", "ppo.py", "chosen = x[mask]", "chosen = x", MATH),
    Bug(
        "meter-mean-of-means",
        "infra/dist.py",
        "torch.stack([total, torch.full_like(total, x.numel())])",
        "torch.stack([total / max(1, x.numel()), torch.ones_like(total)])",
        MATH,
    ),
    # the loop: learning runs and a step computed by hand
    Bug(
        "score-on-first-token",
        "ppo.py",
        "mask & ~nn.functional.pad(mask, (0, 1))[:, 1:]",
        "mask & ~nn.functional.pad(mask, (1, 0))[:, :-1]",
        TRAIN,
    ),
    Bug(
        "weights-never-handed-over",
        "ppo.py",
        "setup.engine.load(models.full_weights(setup.policy.model, args.compute_dtype))",
        "list(models.full_weights(setup.policy.model, args.compute_dtype))",
        TRAIN,
    ),
    Bug(
        "denominator-3x",
        "ppo.py",
        "run.ranks.world * loss_weights(mask, args.loss_mean",
        "3 * run.ranks.world * loss_weights(mask, args.loss_mean",
        CHOICES,
    ),
    Bug(
        "no-times-world",
        "ppo.py",
        "run.ranks.world * loss_weights(mask, args.loss_mean",
        "1 * loss_weights(mask, args.loss_mean",
        TRAIN,
    ),
    Bug(
        "critic-never-updated",
        "ppo.py",
        "update_critic(critic, critic_lr, batch",
        "update_critic(critic, 0.0, batch",
        TRAIN,
    ),
    Bug(
        "old-logprobs-recomputed",
        "ppo.py",
        "            old = at(batch.old_logprobs, p)\n",
        "            pass\n",
        TRAIN,
    ),
    Bug(
        "resume-forgets-kl-coef",
        "ppo.py",
        'run.carried["kl_coef"] or args.kl_coef',
        "args.kl_coef",
        TRAIN,
    ),
    Bug(
        "export-of-a-rounded-head",
        "infra/models.py",
        "            module.reshard()",
        "            pass",
        TRAIN,
    ),
    Bug(
        "nan-goes-through",
        "infra/guards.py",
        "if x is None or torch.isfinite(x).all():",
        "if True:",
        TRAIN,
    ),
    # every choice, by hand
    Bug(
        "policy-weights-even",
        "ppo.py",
        "loss_weights(mask, args.loss_mean, args.max_new_tokens)",
        'loss_weights(mask, "token", args.max_new_tokens)',
        CHOICES,
    ),
    Bug(
        "critic-weighed-as-the-policy",
        "ppo.py",
        'loss_weights(mask, "token", args.max_new_tokens)',
        "loss_weights(mask, args.loss_mean, args.max_new_tokens)",
        CHOICES,
    ),
    Bug(
        "critic-epochs-ignored",
        "ppo.py",
        "(args.critic_epochs or args.ppo_epochs) if critic",
        "args.ppo_epochs if critic",
        CHOICES,
    ),
    Bug(
        "policy-in-the-critics-epochs",
        "ppo.py",
        "if epoch < policy_epochs:",
        "if policy_epochs:",
        CHOICES,
    ),
    Bug(
        "critic-lambda-ignored",
        "ppo.py",
        "if args.lam_adaptive or args.critic_lam != args.lam:",
        "if False:",
        CHOICES,
    ),
    Bug(
        "length-lambda",
        "ppo.py",
        "(args.lam_adaptive * mask.sum(1))",
        "(2 * args.lam_adaptive * mask.sum(1))",
        CHOICES,
    ),
    Bug(
        "length-lambda-below-zero",
        "ppo.py",
        "(args.lam_adaptive * mask.sum(1)).clamp(min=1)",
        "(args.lam_adaptive * mask.sum(1))",
        CHOICES,
    ),
    Bug(
        "tis-inverted",
        "ppo.py",
        "torch.exp(old - at(batch.engine_logprobs, p))",
        "torch.exp(at(batch.engine_logprobs, p) - old)",
        CHOICES,
    ),
    Bug("tis-not-truncated", "ppo.py", ".clamp(max=args.tis_cap)", "", CHOICES),
    Bug("tis-not-off", "ppo.py", "if args.tis_cap:", "if True:", CHOICES),
    Bug("grpo-is-rloo", "ppo.py", 'if kind == "rloo":', 'if kind == "grpo":', CHOICES),
    Bug(
        "kl-rewarded",
        "ppo.py",
        "token_rewards - batch.kl_coef * mask",
        "token_rewards + batch.kl_coef * mask",
        CHOICES,
    ),
    Bug(
        "kl-controller-bound",
        "ppo.py",
        "kl / args.kl_target - 1, -0.2), 0.2)",
        "kl / args.kl_target - 1, -0.2), 0.02)",
        CHOICES,
    ),
    Bug(
        "refill-off", "ppo.py", "            if args.refill:\n", "            if False:\n", CHOICES
    ),
    Bug(
        "critic-of-nobody",
        "ppo.py",
        'return self.advantage not in ("grpo", "rloo", "reinforce++")',
        "return True",
        CHOICES,
    ),
    Bug(
        "reinforce-not-whitened",
        "ppo.py",
        "        batch.returns = torch.where(mask, advantages, 0.0)\n        batch.advantages = whiten(advantages, mask)",
        "        batch.returns = torch.where(mask, advantages, 0.0)\n        batch.advantages = advantages",
        CHOICES,
    ),
    Bug(
        "gamma-ignored",
        "ppo.py",
        "gae(token_rewards, values, mask, args.gamma, lam)",
        "gae(token_rewards, values, mask, 1.0, lam)",
        CHOICES,
    ),
    Bug(
        "entropy-sign",
        "ppo.py",
        "loss - args.entropy_coef * entropy",
        "loss + args.entropy_coef * entropy",
        CHOICES,
    ),
    Bug(
        "value-clip-ignored",
        "ppo.py",
        "at(batch.returns, p), args.value_clip",
        "at(batch.returns, p), 0.0",
        CHOICES,
    ),
    Bug(
        "value-clip-counts-rounding",
        "ppo.py",
        " & ((values - old_values).abs() > clip)",
        "",
        CHOICES,
    ),
    Bug("critic-lr", "ppo.py", "critic_lr = args.critic_lr", "critic_lr = args.lr", CHOICES),
    Bug(
        "warmup-off-by-one",
        "ppo.py",
        "step >= args.critic_warmup",
        "step > args.critic_warmup",
        CHOICES,
    ),
    Bug("adam-betas", "ppo.py", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)", CHOICES),
    Bug("gradient-not-clipped", "ppo.py", "MAX_GRAD_NORM = 1.0", "MAX_GRAD_NORM = 100.0", CHOICES),
    Bug(
        "rloo-with-itself",
        "ppo.py",
        "advantage = centred * count / others",
        "advantage = centred",
        CHOICES,
    ),
    Bug(
        "group-counts-infra",
        "ppo.py",
        "mask.any(1).view(-1, n)",
        "torch.ones_like(mask.any(1)).view(-1, n)",
        CHOICES,
    ),
    Bug(
        "sequence-mean-counts-empty",
        "ppo.py",
        "count = lengths * responses",
        "count = lengths * len(mask)",
        CHOICES,
    ),
    Bug(
        "constant-is-the-longest",
        "ppo.py",
        "count = limit * responses",
        "count = lengths.max() * responses",
        CHOICES,
    ),
    Bug("dual-clip-off", "ppo.py", "    if args.dual_clip:\n", "    if False:\n", CHOICES),
    Bug(
        "quarters-of-the-row",
        "ppo.py",
        "* 4 // mask.sum(1, keepdim=True).clamp(min=1)",
        "* 4 // mask.shape[1]",
        CHOICES,
    ),
    Bug(
        "infra-is-unlike",
        "ppo.py",
        ' if result["status"] != "infra"}\n        return len',
        "}\n        return len",
        CHOICES,
    ),
    Bug(
        "refill-keeps-the-first",
        "ppo.py",
        "    groups.sort(key=Answers.teaches, reverse=True)",
        "    pass",
        CHOICES,
    ),
    Bug(
        "records-shifted",
        "rollout.py",
        "x[b, end - len(ids) : end]",
        "x[b, end - len(ids) - 1 : end - 1]",
        CHOICES,
    ),
    Bug(
        "knob-without-a-test",
        "ppo.py",
        "    tis_cap: float = 2.0",
        "    new_knob: int = 3\n    tis_cap: float = 2.0",
        CHOICES,
    ),
    # runs that end: checkpoints, guards, engines
    Bug(
        "moments-forgotten",
        "infra/checkpoint.py",
        "each.optimizer.state[p][moment] = x.to(p.device, copy=True)",
        "pass",
        TRAIN,
    ),
    Bug(
        "later-rows-stay", "infra/run.py", 'row["step"] <= last_step', 'row["step"] < 10**9', TRAIN
    ),
    Bug(
        "checksums-unread",
        "infra/checkpoint.py",
        "digest(folder / name) != digests[name]",
        "not (folder / name).stat()",
        CRASH,
    ),
    Bug(
        "state-unsealed",
        "infra/checkpoint.py",
        '.pop("seal") == seal_of(state)',
        '.pop("seal")',
        CRASH,
    ),
    Bug("other-flags", "infra/checkpoint.py", "    if changed:\n", "    if False:\n", CRASH),
    Bug(
        "saved-in-place",
        "infra/checkpoint.py",
        "        os.rename(aside, final)\n",
        "        shutil.copytree(aside, final)\n",
        CRASH,
    ),
    Bug(
        "best-deleted",
        "infra/checkpoint.py",
        "        if path not in (*last, best):\n",
        "        if path not in last:\n",
        GUARDS,
    ),
    Bug("secrets-written", "infra/log.py", "SECRET_NAME.search(name.upper())", "False", GUARDS),
    Bug("guards-never-stop", "infra/run.py", "if streak >= limit:", "if False:", GUARDS),
    Bug(
        "new-engine-has-old-weights",
        "rollout.py",
        "                self.sampler.load(weights)\n",
        "",
        GUARDS,
    ),
    Bug(
        "pickles-are-read",
        "infra/models.py",
        '"use_safetensors": True',
        '"use_safetensors": False',
        GUARDS,
    ),
    Bug(
        "first-error-hidden",
        "infra/watchdog.py",
        '            f"{traceback.format_exc()}"\n',
        "",
        GUARDS,
    ),
    # alignment
    Bug(
        "eos-missing-from-mask",
        "rollout.py",
        "[True] * len(sample.ids)",
        "[True] * (len(sample.ids) - sample.finished) + [False] * sample.finished",
        ALIGNMENT,
    ),
    Bug(
        "mask-from-ids",
        "rollout.py",
        "[True] * len(sample.ids)",
        "[i > 1 for i in sample.ids]",
        ALIGNMENT,
    ),
    Bug(
        "sampler-drops-eos",
        "rollout.py",
        "Sample(tokens[:length], logprobs[:length], True)",
        "Sample(tokens[: length - 1], logprobs[: length - 1], True)",
        ALIGNMENT,
    ),
    Bug(
        "values-shifted",
        "kernels.py",
        "packed_forward(critic, p, sp_group)[p.keep, 0]",
        "packed_forward(critic, p, sp_group)[(p.keep + 1).clamp(max=p.ids.shape[1] - 1), 0]",
        ALIGNMENT,
    ),
    Bug(
        "index-shifted",
        "kernels.py",
        "mask.flatten()[place]).nonzero()[:, 0]\n    index = place[keep]\n",
        "mask.flatten()[place - 1]).nonzero()[:, 0]\n    index = place[keep] - 1\n",
        ALIGNMENT + KERNELS,
    ),
    Bug(
        "temperature-missing",
        "kernels.py",
        "    policy.lm_head.temperature = temperature\n",
        "",
        ALIGNMENT,
    ),
    Bug(
        "value-head-noise",
        "infra/models.py",
        'if "score.weight" in info["missing_keys"]:',
        "if False:",
        ALIGNMENT,
    ),
    Bug(
        "positions-run-on",
        "kernels.py",
        "position_ids=torch.cat(positions)[None, mine]",
        "position_ids=torch.arange(sum(fed), device=device)[None, mine]",
        KERNELS,
    ),
    Bug(
        "attention-leaks",
        "kernels.py",
        "lengths = cu_seqlens.diff().tolist()",
        "lengths = [len(q)]",
        ALIGNMENT + KERNELS,
    ),
    # kernels
    Bug(
        "attention-not-causal",
        "kernels.py",
        "is_causal=True, scale",
        "is_causal=False, scale",
        ALIGNMENT + KERNELS,
    ),
    Bug(
        "attention-scale", "kernels.py", "is_causal=True, scale=scale,", "is_causal=True,", KERNELS
    ),
    Bug(
        "temperature-missing-in-backward",
        "kernels.py",
        "of_logprob = grad_logprob[:, None] / ctx.temperature",
        "of_logprob = grad_logprob[:, None]",
        KERNELS,
    ),
    Bug(
        "entropy-gradient",
        "kernels.py",
        "both = of_logprob + of_entropy * entropy",
        "both = of_logprob + of_entropy",
        KERNELS,
    ),
    Bug(
        "hidden-gradient-of-last-piece",
        "kernels.py",
        "grad_hidden += grad",
        "grad_hidden = grad",
        KERNELS,
    ),
    Bug(
        "target-in-two-pieces",
        "kernels.py",
        "of_logprob * inside)",
        "of_logprob)",
        KERNELS,
    ),
    Bug(
        "spare-slots-trained",
        "kernels.py",
        "(predicts & mask.flatten()[place])",
        "(~predicts | mask.flatten()[place])",
        KERNELS,
    ),
    Bug(
        "all-to-all-one-way",
        "kernels.py",
        "return all_to_all(out, sp_group, split=0, joined=1)[None], None",
        "return out[None], None",
        EXACT,
    ),
    Bug(
        "kv-heads-tiled",
        "kernels.py",
        "k = k.repeat_interleave(copies, dim=1)\n        v",
        "k = k.repeat(1, copies, 1)\n        v",
        EXACT,
    ),
    Bug(
        "head-untied",
        "infra/models.py",
        "model.lm_head.__class__ = head",
        "model.lm_head.__class__ = head\n    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())",
        KERNELS,
    ),
    # data
    Bug("cache-on", "kernels.py", "use_cache=False, **where", "use_cache=None, **where", EXACT),
    Bug("offload-ignored", "infra/models.py", "    if offload:\n", "    if False:\n", EXACT),
    Bug("replicas-ignored", "infra/dist.py", "    if replicas > 1:\n", "    if False:\n", EXACT),
    Bug(
        "layers-of-the-first-model",
        "infra/models.py",
        "    plugin.transformer_cls_names_to_wrap = None",
        "    pass",
        EXACT,
    ),
    Bug("liger-without-swiglu", "kernels.py", "swiglu=True", "swiglu=False", EXACT),
    Bug(
        "head-counted-on-prompts",
        "infra/flops.py",
        "config.vocab_size * config.hidden_size * responses",
        "config.vocab_size * config.hidden_size * sum(fed)",
        KERNELS,
    ),
    Bug("peaks-add-up", "infra/clock.py", 'CLEAR.write_text("5")', "pass", KERNELS),
    Bug(
        "offload-not-planned",
        "tools/plan.py",
        "if model in self.offload and self.bf16:",
        "if model in ():",
        ("test_plan.py",),
    ),
    Bug(
        "a-main-rank-on-every-node",
        "infra/run.py",
        "self.main = ranks.rank == 0",
        'self.main = int(os.environ.get("LOCAL_RANK", 0)) == 0',
        ("test_nodes.py",),
    ),
    Bug("held-out-leak", "data.py", "repr(sorted(numbers))", "repr(numbers)", DATA),
    Bug(
        "unsolvable",
        "data.py",
        "[numbers, int(target)])",
        "[numbers, int(target) + 1])",
        DATA,
    ),
    Bug("epochs-alike", "data.py", 'f"epoch {epoch} {seed}"', 'f"epoch {seed}"', DATA),
    Bug("resume-repeats", "data.py", 'random.Random(f"epoch {epoch} {seed}")', "random", DATA),
    Bug(
        "budget-soft",
        "data.py",
        "if free >= lengths[i])\n        bins",
        "if free >= lengths[i] - 1)\n        bins",
        PACKING,
    ),
    Bug(
        "budget-soft-when-even",
        "data.py",
        "if free >= lengths[i]\n        ]",
        "if free >= lengths[i] - 1\n        ]",
        PACKING,
    ),
    Bug(
        "longest-sequence-lost",
        "data.py",
        "for i in longest_first:\n        work =",
        "for i in longest_first[1:]:\n        work =",
        PACKING,
    ),
    Bug(
        "ranks-unequal",
        "data.py",
        "[list(rank) for rank in zip(*deals)]",
        "[[indices for indices in rank if indices] for rank in zip(*deals)]",
        PACKING,
    ),
    Bug("dear-bins-to-rank-0", "data.py", "        deal.reverse()", "        pass", PACKING),
    Bug(
        "rounds-of-unlike-bins",
        "data.py",
        "bins.sort(key=lambda indices: -sum(cost(lengths[i]) for i in indices))",
        "bins.sort(key=len)",
        PACKING,
    ),
    Bug("bins-filled-unevenly", "data.py", "k = min(fits)[2]", "k = fits[0][2]", PACKING),
    Bug(
        "rounds-all-alike",
        "data.py",
        "max(0.0, load[k] + work - slowest[k // ranks])",
        "0.0",
        PACKING,
    ),
    Bug(
        "packed-as-they-come",
        "data.py",
        "key=lambda i: (-lengths[i], i)",
        "key=lambda i: i",
        PACKING,
    ),
    Bug(
        "one-round-too-many",
        "data.py",
        "rounds = max(1, math.ceil(len(packed) / ranks))",
        "rounds = 1 + max(1, math.ceil(len(packed) / ranks))",
        PACKING,
    ),
    Bug(
        "summary-without-waiting",
        "data.py",
        "waiting = sum(map(max, zip(*load)))",
        "waiting = max(map(sum, load))",
        PACKING,
    ),
    Bug(
        "chat-without-generation-prompt",
        "data.py",
        "add_generation_prompt=True",
        "add_generation_prompt=False",
        DATA + SOURCES,
    ),
    Bug("long-prompt-passes", "data.py", "len(ids) > limit:", "len(ids) > limit + 1:", SOURCES),
    Bug(
        "long-prompt-of-a-rule-passes",
        "data.py",
        "<= source.max_prompt_tokens",
        "<= source.max_prompt_tokens + 1",
        DATA,
    ),
    Bug(
        "ranks-with-other-problems",
        "data.py",
        'os.environ | {"PYTHONHASHSEED": "0"}',
        "dict(os.environ)",
        DATA,
    ),
    Bug(
        "leak-into-the-test-split",
        "data.py",
        'train.drop(train.asked, seen, "also in the test split")',
        "pass",
        SOURCES,
    ),
    Bug(
        "unequal-tests-pass",
        "data.py",
        "len(inputs) == len(outputs)",
        "inputs and outputs",
        SOURCES,
    ),
    Bug(
        "unreadable-answers-pass",
        "data.py",
        'splits[name].drop(rows["math"], bad, "answer that cannot be read by the verifier")',
        "pass",
        SOURCES,
    ),
    Bug(
        "system-prompt-kept", "data.py", 'if source.system_prompt != "keep":', "if False:", SOURCES
    ),
    Bug("template-not-in-the-cache-key", "data.py", "{source.template} ", "", ("test_cache.py",)),
    Bug(
        "weights-by-rounding-each",
        "data.py",
        "        total -= counts[name]\n        weight_left -= Fraction(weight)\n",
        "",
        ("test_batch.py",),
    ),
    Bug(
        "pass-at-k-biased",
        "rewards.py",
        "1 - comb(len(row) - count_right(row), drawn) / comb(len(row), drawn)",
        "1 - (1 - count_right(row) / len(row)) ** drawn",
        REWARDS,
    ),
    Bug(
        "majority-of-answers-alone",
        "rewards.py",
        "if right == 0 or right < max(counts, default=0):",
        "if right == 0:",
        REWARDS,
    ),
    Bug(
        "stop-text-ignored",
        "rollout.py",
        "                stop=self.stop,\n",
        "",
        ("test_engine.py",),
    ),
    Bug(
        "adam-not-planned",
        "tools/plan.py",
        'items[f"{name} Adam states"] = 8 *',
        'items[f"{name} Adam states"] = 0 *',
        ("test_plan.py",),
    ),
    # rewards
    Bug(
        "eval",
        "rewards.py",
        'tree = ast.parse(" ".join(expression.split()), mode="eval").body',
        "return Fraction(eval(expression)), sorted(map(int, __import__('re').findall('[0-9]+', expression)))",
        REWARDS,
    ),
    Bug(
        "no-length-limit", "rewards.py", "MAX_EXPRESSION = 200", "MAX_EXPRESSION = 200_000", REWARDS
    ),
    Bug(
        "digits-joined",
        "rewards.py",
        '" ".join(expression.split())',
        '"".join(expression.split())',
        REWARDS,
    ),
    Bug("newline-refused", "rewards.py", '" ".join(expression.split())', "expression", REWARDS),
    Bug(
        "floats",
        "rewards.py",
        "ast.Div: truediv",
        "ast.Div: lambda a, b: float(a) / float(b)",
        REWARDS,
    ),
    Bug(
        "numbers-as-set",
        "rewards.py",
        "sorted(used) == numbers",
        "set(used) == set(numbers)",
        REWARDS,
    ),
    Bug(
        "first-answer",
        "rewards.py",
        'before.rpartition("<answer>")',
        'before.partition("<answer>")',
        REWARDS,
    ),
    Bug("cut-is-rewarded", "rewards.py", "if finished and not finished[i]:", "if False:", REWARDS),
    # math and code
    Bug(
        "fork-allowed",
        "verify/sandbox.py",
        '"clone": any_bit(0, CLONE_THREAD, ALLOW, refuse),',
        '"clone": [ALLOW, refuse],',
        SANDBOX,
    ),
    Bug(
        "kill-anybody",
        "verify/sandbox.py",
        '"kill": only(0, ITSELF),',
        '"kill": [ALLOW],',
        SANDBOX,
    ),
    Bug(
        "any-fcntl",
        "verify/sandbox.py",
        '"fcntl": only(1, 0, 1, 2, 3, 4, 1030, error=errno.EINVAL),',
        '"fcntl": [ALLOW],',
        SANDBOX,
    ),
    Bug(
        "landlock-of-nothing",
        "verify/sandbox.py",
        "folders = [path for path in sys.path if path.starts",
        'folders = ["/"] + [path for path in sys.path if path.starts',
        SANDBOX,
    ),
    Bug(
        "descriptors-kept",
        "verify/sandbox.py",
        "    os.closerange(len(kept), 256)",
        "    pass",
        SANDBOX,
    ),
    Bug("no-memory-limit", "verify/sandbox.py", 'AS=job["memory"], ', "", SANDBOX),
    Bug(
        "exit-without-closing", "verify/sandbox.py", "    names.clear()  #", "    pass  #", SANDBOX
    ),
    Bug(
        "first-test-only",
        "rewards.py",
        'if late or (status != "ok" and rules.code_reward == "all"):',
        "if True:",
        SANDBOX,
    ),
    Bug("tolerant-integers", "rewards.py", 'if re.search("[.eE]", wanted):', "if True:", SANDBOX),
    Bug(
        "true-is-one",
        "rewards.py",
        "        return given is wanted",
        "        return given == wanted",
        SANDBOX,
    ),
    Bug(
        "reasoning-counts",
        "rewards.py",
        'return text.rpartition("</think>")[2]',
        "return text",
        EQUALITY,
    ),
    Bug(
        "box-in-a-box",
        "rewards.py",
        "            if start is not None:\n",
        "            if start is not None and begin is None:\n",
        EQUALITY,
    ),
    Bug(
        "lists-in-order",
        "verify/equality.py",
        "left.remove(found)",
        "left.remove(found) if left[0] == found else left.clear()",
        EQUALITY,
    ),
    Bug(
        "units-ignored",
        "verify/equality.py",
        "if gold_unit and answer_unit and gold_unit != answer_unit:",
        "if False:",
        EQUALITY,
    ),
    Bug(
        "hedging-allowed",
        "verify/equality.py",
        "    if hedged(tail, answer):\n",
        "    if False:\n",
        EQUALITY,
    ),
    Bug("rounding", "verify/equality.py", "numeric_precision=50", "numeric_precision=15", EQUALITY),
    Bug(
        "towers",
        "verify/equality.py",
        "(not too_big(answer) and same(gold, answer))",
        "same(gold, answer)",
        EQUALITY,
    ),
    Bug(
        "infra-scores-zero",
        "rewards.py",
        '        if result["status"] != "infra":\n            for part',
        "        if True:\n            for part",
        REWARDS,
    ),
    Bug(
        "replay-of-all-responses",
        "tools/replay.py",
        "lr, batch, chosen, args, run)\n    else",
        "lr, batch, range(len(batch.rows)), args, run)\n    else",
        GUARDS,
    ),
    Bug(
        "replay-finds-nothing",
        "tools/replay.py",
        "            self.faults += texts\n",
        "            pass\n",
        GUARDS,
    ),
    Bug(
        "replay-without-moments",
        "tools/replay.py",
        "    checkpoint.load_moments(folder, {name: trained})\n",
        "",
        GUARDS,
    ),
]


def copy(folder: Path) -> None:
    """The code of this checkout, without its history and what runs have left."""
    for path in (*ROOT.glob("*.py"), ROOT / "ruff.toml"):
        shutil.copy(path, folder)
    for name in ("infra", "verify", "tools", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)


def plant(bug: Bug, folder: Path) -> None:
    copy(folder)
    text = (folder / bug.file).read_text()
    if text.count(bug.old) != 1:
        raise SystemExit(
            f"{bug.name}: {bug.old!r} stands {text.count(bug.old)} times in {bug.file}, not once"
        )
    (folder / bug.file).write_text(text.replace(bug.old, bug.new))


def first_failure(folder: Path, test: str) -> str | None:
    """The name of the first test that failed; None when all passed."""
    run = launch.run(
        Path(pytest.__file__).with_name("__main__.py"),
        *["-x", "-q", "-p", "no:cacheprovider", f"tests/{test}"],
        cwd=folder,
        seconds=600,
        env={"CI": ""},  # the planted text itself is not to be noticed
    )
    if run.code == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) \S+::(\w+)", run.said, re.MULTILINE)
    return found[1] if found else f"pytest ended with {run.code}: {run.said[-300:]}"


def try_bug(bug: Bug) -> list[str | None]:
    """Plants it; for each of its test files the first test that failed."""
    found = []
    for test in bug.tests:
        with tempfile.TemporaryDirectory() as folder:
            plant(bug, Path(folder))
            start = time.perf_counter()
            failure = first_failure(Path(folder), test)
        seconds = f"{time.perf_counter() - start:3.0f} s"
        what = failure or "MISSED"
        print(f"{bug.name:32} {bug.file:19} {test:24} {seconds}  {what}", flush=True)
        found.append(failure)
    return found


def main(names: list[str]) -> int:
    unknown = set(names) - {bug.name for bug in BUGS}
    if unknown:
        raise SystemExit(f"no bug {sorted(unknown)}: there are {[bug.name for bug in BUGS]}")
    chosen = [bug for bug in BUGS if not names or bug.name in names]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(try_bug, chosen))
    missed = sum(failures.count(None) for failures in found)
    print(f"{len(chosen)} bugs, {missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
