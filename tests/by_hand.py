"""A run of ppo.py on tests/toy.py once more: plain transformers, one sequence and one token at a time, torch's AdamW.

No packing, no masks, no (B, T) tensors, and nothing from ppo.py: flags are read from the object that is given. The
answers are drawn once more by rollout.TorchSampler, which tests/test_alignment.py holds against transformers.

`run` makes the run to be compared with. "lags" among the flags: the engine's log-probs are off by LAG, in the answers
that are learned from.
"""

import random
import statistics
from collections import defaultdict
from pathlib import Path

import toy  # first: the guard for the name `kernels`

import data
import rollout
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

OURS = ("lags", "again")  # words that are no flags of ppo.py
LAG = (0.9, 0.0, -1.1)  # by the place of a token, in turn


def gae_by_hand(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0])]
    return [
        sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:])) for i in range(len(deltas))
    ]


def group_by_hand(totals: list[float], n: int, kind: str) -> list[float]:
    """Advantages of GRPO or RLOO, one for each answer; n neighbours answer one prompt."""
    advantages = []
    for i, total in enumerate(totals):
        first = i - i % n
        group = totals[first : first + n]
        if kind == "grpo":
            advantages.append((total - statistics.mean(group)) / (statistics.stdev(group) + 1e-4))
        else:
            others = totals[first:i] + totals[i + 1 : first + n]
            advantages.append(total - statistics.mean(others))
    return advantages


def read(model, prompt: list[int], ids: list[int], temperature: float = 1.0):
    """Log-probs of the tokens of one answer, and the entropies of where they were drawn, (n,) each."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
    logp = torch.log_softmax(logits, -1)
    chosen = logp.gather(1, torch.tensor(ids)[:, None])[:, 0]
    return chosen, -(logp.exp() * logp).sum(-1)


def norm_of(model) -> float:
    return (
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    )


def kl_by_hand(kind: str, policy, reference):
    """Of KL(policy || reference), where the policy has sampled: floats or scalar tensors."""
    d = policy - reference
    return {"k1": lambda: d, "k2": lambda: d * d / 2, "k3": lambda: (-d).exp() - 1 + d}[kind]()


class ByHand:
    """A run, one token at a time. `lags`: the engine is the planted one."""

    def __init__(self, flags: object, model: str, lags: bool):
        self.f, self.path, self.lag = flags, model, LAG if lags else (0.0, 0.0, 0.0)
        self.tokenizer, self.kl_coef, self.bounded = (
            AutoTokenizer.from_pretrained(model),
            flags.kl_coef,
            0,
        )
        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(model) for _ in range(2)
        )
        self.critic = AutoModelForTokenClassification.from_pretrained(model, num_labels=1).eval()
        torch.nn.init.zeros_(self.critic.score.weight)
        torch.nn.init.zeros_(self.critic.score.bias)
        self.adam = {
            m: torch.optim.AdamW(m.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
            for m, lr in ((self.policy, flags.lr), (self.critic, flags.critic_lr))
        }

    def logprobs(self, model, b: int):
        return read(model, self.asked[b], self.answers[b].ids, self.f.temperature)

    def values(self, b: int):
        out = self.critic(torch.tensor([self.asked[b] + self.answers[b].ids])).logits[0, :, 0]
        return out[len(self.asked[b]) - 1 : -1].unbind()

    def targets(self) -> tuple[list[list[float]], list[list[float]]]:
        """Advantages, and what the critic learns, of every token of every response."""
        f, everyone = self.f, range(len(self.answers))
        token_rewards = [[0.0] * (len(s.ids) - 1) + [r] for s, r in zip(self.answers, self.rewards)]
        if f.kl_coef and f.kl_in == "reward":
            for b in everyone:
                for t, (x, y) in enumerate(zip(self.old[b], self.ref[b])):
                    token_rewards[b][t] -= self.kl_coef * kl_by_hand(f.kl_estimator, x, y).item()
        if f.advantage in ("grpo", "rloo"):
            totals = [sum(row) for row in token_rewards]
            good = group_by_hand(totals, f.samples_per_prompt, f.advantage)
            return [[x] * len(row) for x, row in zip(good, token_rewards)], []
        values = [
            [v.item() for v in row] if f.advantage == "gae" else [0.0] * len(row)
            for row in self.old_values
        ]
        lams = [
            max(0.0, 1 - 1 / (f.lam_adaptive * len(row))) if f.lam_adaptive else f.lam
            for row in values
        ]
        raw = [gae_by_hand(r, v, f.gamma, lam) for r, v, lam in zip(token_rewards, values, lams)]
        flat = [x for row in raw for x in row]
        mean, std = statistics.mean(flat), statistics.pstdev(flat)
        ahead = [gae_by_hand(r, v, f.gamma, f.critic_lam) for r, v in zip(token_rewards, values)]
        returns = [[a + v for a, v in zip(*both)] for both in zip(ahead, values)]
        return [[(x - mean) / std for x in row] for row in raw], returns

    def policy_loss(self, b: int, t: int, logprob, entropy, advantage: float):
        ratio, f = (logprob - self.old[b][t]).exp(), self.f
        low, high, dual = f.clip_low, f.clip_high, f.dual_clip
        limited = (
            ratio
            if 1 - low <= ratio <= 1 + high
            else torch.tensor(1 - low if ratio < 1 else 1 + high)
        )
        loss = -min(ratio * advantage, limited * advantage)
        if dual and advantage < 0 and loss > -advantage * dual:
            loss, self.bounded = torch.tensor(-advantage * dual), self.bounded + 1
        if f.tis_cap:
            loss = loss * min(
                (self.old[b][t] - self.answers[b].logprobs[t] - self.lag[t % 3]).exp().item(),
                f.tis_cap,
            )
        loss = loss - f.entropy_coef * entropy
        if f.kl_coef and f.kl_in == "loss":
            loss = loss + self.kl_coef * kl_by_hand(f.kl_estimator, logprob, self.ref[b][t])
        return loss

    def step(self, step: int, start: str) -> dict[str, float]:
        """The metrics of one step, from weights that are those of folder `start`; the weights are moved."""
        models = {"policy": self.policy, "critic": self.critic}
        self.before = {
            (m, k): p.detach().clone()
            for m, net in models.items()
            for k, p in net.named_parameters()
        }
        f, n = self.f, self.f.samples_per_prompt
        rows = data.batch({"toy": toy.load_toy("train", 0, "base")}, step, f.prompts_per_step)
        prompts = data.encode([row["prompt"] for row in rows], self.tokenizer)
        engine = rollout.TorchSampler(start, [self.tokenizer.eos_token_id], 4 + f.max_new_tokens)
        self.answers = engine.sample(
            prompts, n, f.max_new_tokens, f.temperature, rollout.stream(0, step, 0)
        )
        self.asked, rows = (
            [p for p in prompts for _ in range(n)],
            [row for row in rows for _ in range(n)],
        )
        texts = [self.tokenizer.decode(s.ids, skip_special_tokens=True) for s in self.answers]
        self.rewards = [
            toy.toy(x, row, f)["reward"] * s.finished
            for x, row, s in zip(texts, rows, self.answers)
        ]
        with torch.no_grad():
            everyone = range(len(self.answers))
            self.old, self.ref = (
                [self.logprobs(m, b)[0] for b in everyone] for m in (self.policy, self.reference)
            )
            self.old_values = [self.values(b) for b in everyone]
        self.advantages, returns = self.targets()
        sums, counts = defaultdict(float), defaultdict(int)

        def add(name, x):
            sums[name], counts[name] = sums[name] + float(x), counts[name] + 1

        def move(name, model):
            add(f"{name}/grad_norm", norm_of(model))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            self.adam[model].step()
            model.zero_grad()

        critic_epochs = (f.critic_epochs or f.ppo_epochs) * (f.advantage == "gae")
        policy_epochs = f.ppo_epochs * (step >= f.critic_warmup)
        for epoch in range(max(policy_epochs, critic_epochs)):
            order = random.Random(f"0 {step} {epoch}").sample(everyone, len(everyone))
            for at in range(0, len(order), f.minibatch):
                chosen = order[at : at + f.minibatch]
                tokens = sum(len(self.old[b]) for b in chosen)
                for b in chosen if epoch < policy_epochs else ():
                    size, limit = len(self.old[b]), f.max_new_tokens
                    share = {
                        "token": tokens,
                        "sequence": size * len(chosen),
                        "constant": limit * len(chosen),
                    }
                    per_token = [
                        self.policy_loss(b, t, x, e, self.advantages[b][t])
                        for t, (x, e) in enumerate(zip(*self.logprobs(self.policy, b)))
                    ]
                    [add("policy/loss", loss) for loss in per_token]
                    (sum(per_token) / share[f.loss_mean]).backward()
                if epoch < policy_epochs:
                    move("policy", self.policy)
                for b in chosen if epoch < critic_epochs else ():
                    per_token = []
                    for value, old, aim in zip(self.values(b), self.old_values[b], returns[b]):
                        error = (value - aim) ** 2 / 2
                        near = old + min(
                            max(value - old, torch.tensor(-f.value_clip)),
                            torch.tensor(f.value_clip),
                        )
                        far = (near - aim) ** 2 / 2
                        add("critic/clipfrac", 0 < f.value_clip < abs(value - old) and far > error)
                        per_token.append(max(error, far) if f.value_clip else error)
                    [add("critic/loss", loss) for loss in per_token]
                    (sum(per_token) / tokens).backward()
                if epoch < critic_epochs:
                    move("critic", self.critic)
        row = {name: sums[name] / counts[name] for name in sums} | {
            "reward/mean": statistics.mean(self.rewards)
        }
        if f.kl_coef:
            gaps = [
                kl_by_hand(f.kl_estimator, x, y).item()
                for b in everyone
                for x, y in zip(self.old[b], self.ref[b])
            ]
            row |= {"policy/ref_kl": statistics.mean(gaps), "policy/kl_coef": self.kl_coef}
            if f.kl_target:
                error = min(max(row["policy/ref_kl"] / f.kl_target - 1, -0.2), 0.2)
                self.kl_coef *= 1 + error * len(everyone) / 10_000
        return row

    def follow(self, start: Path) -> None:
        """Holds the weights against those of a checkpoint, and goes on from these."""
        names = {part.name for part in start.glob("*/")} & {"policy", "critic"}
        assert names == ({"policy", "critic"} if self.f.advantage == "gae" else {"policy"})
        for name in names:
            model, saved = getattr(self, name), load_file(start / name / "model.safetensors")
            for key, p in model.named_parameters():
                off, way = (
                    (x - saved[key]).abs().mean().item() for x in (p, self.before[name, key])
                )
                # softmax does not see what every key has in common: the gradient of k's bias is rounding alone
                assert off <= 2e-4 * way or key.endswith("k_proj.bias"), (name, key, off, way)
                p.data.copy_(saved[key])


def run(out: str, words: list[str]) -> None:
    """The run of ppo.py with these flags, in this process."""
    plain = rollout.TorchSampler.sample

    def late(self, prompts, n, *more):
        answers = plain(self, prompts, n, *more)
        if n == 1:  # the canary
            return answers
        return [
            s._replace(logprobs=[x + LAG[t % 3] for t, x in enumerate(s.logprobs)]) for s in answers
        ]

    if "lags" in words:
        rollout.TorchSampler.sample = late
    try:
        toy.run(out, *(word for word in words if word not in OURS))
    finally:
        rollout.TorchSampler.sample = plain
