"""The edits under tests/ablations: each applies to a copy of the repository, is short, leaves the
copy in the form that tests/test_structure.py asks for, runs for 3 steps as a user would start it,
and does what its prose says.

Owns: one function for each patch, of its name, with the flags of its run and the check of its
effect; most compare the first step, of two updates, with plain transformers models and the formula
of the paper (`by_hand`).
Refuses to know: whether an edit helps.
Left out on purpose: vLLM and several ranks; no patch touches what they share out.

    python tests/test_ablations.py OUT [flags of ppo.py]

is tests/toy.py with a reward that random answers get parts of.
"""

import ast
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import launch
import pytest
import toy  # before what imports ours or transformers: the path, the guard for the name `kernels`
import test_structure
import torch
from by_hand import group_by_hand, read
from planted import ROOT, copy
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import rollout

PATCHES = {path.stem: path for path in sorted((ROOT / "tests" / "ablations").glob("*.patch"))}
WIDTH = 100
LR = 1e-3  # of tests/toy.py
CRITIC_LR = 3e-3
ON_TOY = "tests/test_ablations.py"
TOY_FLAGS = [
    *["--prompts_per_step", 8, "--samples_per_prompt", 4, "--minibatch_size", 32],
    *["--ppo_epochs", 2, "--temperature", 1.0, "--entropy_coef", 0.0],
    *["--max_tokens_per_microbatch", 64],
]
ON_COUNTDOWN = "ppo.py"
SMALL = [
    *["--engine", "torch", "--prompts_per_step", 8, "--max_prompt_tokens", 128],
    *["--max_new_tokens", 8, "--max_tokens_per_microbatch", 400],
]
GRPO = ["--advantage", "grpo"]


def graded(text: str, row: dict, rules=None) -> dict:
    """The share of even digits; right from a half on."""
    reward = sum(digit in "0246" for digit in text) / max(1, len(text))
    right = reward >= 0.5
    return {"reward": reward, "correct": float(right), "status": "ok" if right else "wrong"}


# ----------------------------------------------------------------------------- patches as they are


class Hunk(NamedTuple):
    file: str
    lines: list[str]  # each begins with ' ', '+' or '-'


def hunks(patch: Path) -> list[Hunk]:
    file, found = "", []
    for line in patch.read_text().splitlines():
        if line.startswith("+++ b/"):
            file = line[6:]
        elif line.startswith("@@"):
            found.append(Hunk(file, []))
        elif found and not line.startswith("--- a/"):
            found[-1].lines.append(line)
    return found


def apply(patch: Path, folder: Path, *options: str) -> bool:
    """Does it apply to the copy in `folder`? That is no git repository, and must be no part of one:
    git apply would pass over its files without a word."""
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *options, str(patch)]
    return subprocess.run(command, cwd=folder, env=env, timeout=60).returncode == 0


def clean_copy(folder: Path) -> None:
    """Of this checkout, less the patches that its reader has applied: they are tested all the
    same."""
    copy(folder)
    for patch in PATCHES.values():
        wanted = []
        for hunk in hunks(patch):
            new = "\n".join(line[1:] for line in hunk.lines if not line.startswith("-"))
            wanted.append(f"\n{new}\n" in f"\n{(folder / hunk.file).read_text()}")
        if all(wanted):
            assert apply(patch, folder, "--reverse")


def patched_copy(name: str, folder: Path) -> None:
    clean_copy(folder)
    before = {file: (folder / file).read_text() for file, _ in hunks(PATCHES[name])}
    assert apply(PATCHES[name], folder)
    for file, text in before.items():
        assert (folder / file).read_text() != text
        ast.parse((folder / file).read_text())


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    clean_copy(folder)
    return folder


@pytest.mark.parametrize("name", PATCHES)
def test_it_is_short(name, clean):
    """Guards the promise of five lines, prose that says what to expect, and a place that cannot be
    taken for another: git apply would change the first that fits. The blank lines that the format
    wants around a function do not count."""
    prose = PATCHES[name].read_text().partition("--- a/")[0].strip()
    added = []
    for file, lines in hunks(PATCHES[name]):
        added += [line[1:] for line in lines if line.startswith("+")]
        old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        times = f"\n{(clean / file).read_text()}".count(f"\n{old}\n")
        assert times == 1, f"{name}: {times} times in {file}:\n{old}"
    assert 1 <= len([line for line in added if line.strip()]) <= 5
    assert 80 < len(prose) < 500
    assert max(map(len, prose.splitlines() + added)) <= WIDTH


@pytest.mark.parametrize("name", PATCHES)
def test_it_leaves_the_structure_as_it_is(name, tmp_path):
    """Guards a reader who applies an edit from tests that are red for its form alone."""
    patched_copy(name, tmp_path)
    test_structure.check_all(tmp_path)


# -------------------------------------------------------------------------------------------- runs


class Ran(NamedTuple):
    folder: Path  # of the patched copy
    out: Path
    said: str

    def rows(self) -> list[dict]:
        return launch.metrics(self.out)

    def samples(self) -> list[dict]:
        return launch.read_lines(self.out / "samples.jsonl")


class Tampered(NamedTuple):
    """What the copy has in the place of a text that stands there once."""

    file: str
    old: str
    new: str


class Case(NamedTuple):
    check: Callable[[Ran], None]
    script: str
    flags: list
    tampered: Tampered | None


CASES: dict[str, Case] = {}


def case(*flags, script: str = ON_TOY, tampered: Tampered | None = None) -> Callable:
    """The function below is the check of the patch of that name."""
    if script == ON_TOY:
        flags = [*TOY_FLAGS, *flags]

    def register(check: Callable) -> Callable:
        CASES[check.__name__] = Case(check, script, list(flags), tampered)
        return check

    return register


MODELS: dict[str, Path] = {}


def prepared(name: str, folder: Path) -> list:
    """Makes the copy that the case needs in `folder`. Returns the command of its run."""
    wanted = CASES[name]
    if name in PATCHES:
        patched_copy(name, folder)
    else:
        clean_copy(folder)
    if wanted.tampered:
        file, old, new = wanted.tampered
        text = (folder / file).read_text()
        assert text.count(old) == 1, wanted.tampered
        (folder / file).write_text(text.replace(old, new))
    if wanted.script == ON_TOY:
        out, model = ["run"], MODELS["toy"]
    else:
        out, model = ["--out", "run"], MODELS["tiny"]
    if name == "small_critic":
        model = MODELS["deep"]
    return [wanted.script, *out, "--model", model, "--steps", 3, *wanted.flags]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tiny) -> Callable[[str], Ran]:
    """ran(name): the run of that case, which is made when it is first asked for."""
    models = tmp_path_factory.mktemp("models")
    toy.make_model(str(models / "toy"))
    toy.make_model(str(models / "deep"), layers=8)
    MODELS.update({"toy": models / "toy", "deep": models / "deep", "tiny": Path(tiny)})

    @cache
    def of(name: str) -> Ran:
        folder = tmp_path_factory.mktemp(name)
        done = launch.run(*prepared(name, folder), cwd=folder).good()
        return Ran(folder, folder / "run", done.said)

    return of


def test_every_patch_has_a_case():
    assert {name for name in CASES if not name.startswith("plain_")} == set(PATCHES)


@pytest.mark.parametrize("name", CASES)
def test_it_runs(name, ran):
    """Guards every edit: it applies to a copy, three steps of it end well and with finite numbers,
    and its effect is what the paper's formula says."""
    result = ran(name)
    rows = result.rows()
    assert [row["step"] for row in rows if "policy/loss" in row] == [1, 2, 3]
    for row in rows:
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, (int, float)))
    CASES[name].check(result)


# ------------------------------------------------------------------------- the first step, by hand


class Answer(NamedTuple):
    prompt: list[int]
    ids: list[int]
    reward: float
    correct: bool
    finished: bool


def unchanged(weight: Tensor) -> Tensor:
    return weight


@cache
def answers(change: Callable[[Tensor], Tensor] = unchanged) -> list[Answer]:
    """Those of the run's first step, drawn once more; neighbours are to one prompt. `change`: the
    engine's weights."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS["toy"])
    rows = data.batch({"toy": toy.load_toy("train", 0, "base")}, 0, 8)
    prompts = data.encode([row["prompt"] for row in rows], tokenizer)
    sampler = rollout.TorchSampler(str(MODELS["toy"]), [tokenizer.eos_token_id], 10)
    policy = AutoModelForCausalLM.from_pretrained(MODELS["toy"])
    sampler.load((name, change(weight)) for name, weight in policy.named_parameters())
    drawn = []
    samples = sampler.sample(prompts, 4, 6, 1.0, rollout.stream(0, 0, 0))
    for i, (ids, _, finished) in enumerate(samples):
        scored = graded(tokenizer.decode(ids, skip_special_tokens=True), rows[i // 4])
        reward = scored["reward"] if finished else 0.0  # a cut answer has none
        correct = finished and scored["correct"] == 1
        drawn.append(Answer(prompts[i // 4], ids, reward, correct, finished))
    # of every kind some
    assert 0 < sum(a.correct for a in drawn) < sum(a.finished for a in drawn) < len(drawn)
    return drawn


def against_the_group(rewards: list[float]) -> list[float]:
    """GRPO's advantages, one for each answer."""
    return group_by_hand(rewards, 4, "grpo")


def whitened(rewards: list[float]) -> list[float]:
    """PPO's where all values are still 0: one for each answer, against all tokens."""
    tokens = torch.tensor([r for r, answer in zip(rewards, answers()) for _ in answer.ids])
    return ((torch.tensor(rewards) - tokens.mean()) / tokens.std(unbiased=False)).tolist()


class Tokens(NamedTuple):
    """One answer in an update, (n,) each."""

    new: Tensor
    old: Tensor
    entropy: Tensor
    advantage: float
    of: Answer


def ppo_loss(new: Tensor, t: Tokens, clip: float = 0.2) -> Tensor:
    ratio = torch.exp(new - t.old)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-t.advantage * ratio, -t.advantage * clipped)


def plain(t: Tokens) -> Tensor:
    return ppo_loss(t.new, t)


def token_mean(losses: list[Tensor], tokens: list[Tokens]) -> Tensor:
    return torch.cat(losses).mean()


def own_reward(answer: Answer) -> float:
    return answer.reward


@cache
def by_hand(
    loss=plain, mean=token_mean, reward=own_reward, advantages=against_the_group, lr: float = LR
) -> dict[str, float]:
    """Two updates of a plain transformers model on all answers at once; the means of what both
    show."""
    policy, drawn = AutoModelForCausalLM.from_pretrained(MODELS["toy"]), answers()
    optimizer = torch.optim.AdamW(policy.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    old, shown, norms = None, [], []
    good = advantages([reward(answer) for answer in drawn])
    assert any(good)
    for _ in range(2):
        new = [read(policy, answer.prompt, answer.ids) for answer in drawn]
        old = old or [logprobs.detach() for logprobs, _ in new]
        tokens = []
        for (logprobs, entropy), before, advantage, answer in zip(new, old, good, drawn):
            tokens.append(Tokens(logprobs, before, entropy, advantage, answer))
        if loss is forking:  # it looks at all tokens
            losses = forking(tokens)
        else:
            losses = [loss(t) for t in tokens]
        mean(losses, tokens).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item())
        shown.append(torch.cat(losses).mean().item())
        optimizer.step()
        optimizer.zero_grad()
    return {"policy/loss": sum(shown) / 2, "policy/grad_norm": sum(norms) / 2}


def same(row: dict, expected: dict, keys=("policy/loss", "policy/grad_norm")) -> bool:
    return all(row[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-6) for key in keys)


# ----------------------------------------------------------------------------------- their effects


@case(*GRPO)
def plain_grpo(ran: Ran) -> None:
    assert same(ran.rows()[0], by_hand())  # or the checks below would prove nothing


@case("--advantage", "reinforce++")
def plain_reinforce(ran: Ran) -> None:
    assert "critic none" in ran.said


@case("--advantage", "rloo")  # so that what is GRPO here is the edit's
def grpo_by_hand(ran: Ran) -> None:
    assert "critic none" in ran.said
    assert same(ran.rows()[0], by_hand())


@case()
def no_critic(ran: Ran) -> None:
    assert "critic none" in ran.said


@case(*GRPO, "--kl_coef", 0.5, "--kl_in", "loss", "--kl_estimator", "k3")
def kl_loss(ran: Ran) -> None:
    def loss(t: Tokens) -> Tensor:
        # the reference is the policy before its first update, and so is `old`
        k3 = torch.exp(t.old - t.new) - 1 + t.new - t.old
        return plain(t) + 0.5 * torch.exp(t.new - t.old) * k3

    assert same(ran.rows()[0], by_hand(loss))
    assert not same(ran.rows()[0], by_hand())


@case(*GRPO, "--loss_mean", "sequence", "--clip_low", 0.02, "--clip_high", 0.02)
def gspo(ran: Ran) -> None:
    def loss(t: Tokens) -> Tensor:
        return ppo_loss(t.old + (t.new - t.old).mean(), t, 0.02)

    def token_loss(t: Tokens) -> Tensor:
        return ppo_loss(t.new, t, 0.02)

    def mean(losses: list[Tensor], tokens: list[Tokens]) -> Tensor:
        return torch.stack([x.mean() for x in losses]).mean()

    assert same(ran.rows()[0], by_hand(loss, mean))
    assert not same(ran.rows()[0], by_hand(token_loss, mean))


@case(*GRPO)
def cispo(ran: Ran) -> None:
    def loss(t: Tokens) -> Tensor:
        return -torch.exp(t.new - t.old).detach().clamp(max=1.2) * t.advantage * t.new

    assert same(ran.rows()[0], by_hand(loss))
    assert not same(ran.rows()[0], by_hand())


@case(*GRPO)
def nll(ran: Ran) -> None:
    def mean(losses: list[Tensor], tokens: list[Tokens]) -> Tensor:
        right = torch.cat([t.new for t in tokens if t.of.correct])
        return token_mean(losses, tokens) - 0.1 * right.mean()

    assert same(ran.rows()[0], by_hand(mean=mean))
    assert not same(ran.rows()[0], by_hand())


@case(*GRPO)
def mask_truncated(ran: Ran) -> None:
    def mean(losses: list[Tensor], tokens: list[Tokens]) -> Tensor:
        return torch.cat([x for x, t in zip(losses, tokens) if t.of.finished]).mean()

    assert same(ran.rows()[0], by_hand(mean=mean))
    assert not same(ran.rows()[0], by_hand())


@case(*GRPO)
def overlong_penalty(ran: Ran) -> None:
    def reward(answer: Answer) -> float:  # 6 tokens are allowed, 1.2 of them are the buffer
        over = max(0.0, len(answer.ids) - (6 - 1.2)) / 1.2
        return answer.reward - min(1.0, over)

    row = ran.rows()[0]
    rewards = torch.tensor([reward(answer) for answer in answers()])
    assert row["reward/std"] == pytest.approx(rewards.std(unbiased=False).item(), rel=1e-5)
    assert same(row, by_hand(reward=reward))
    assert not same(row, by_hand())


@case(*GRPO, "--max_tokens_per_microbatch", 4096)
def forking_tokens(ran: Ran) -> None:
    assert same(ran.rows()[0], by_hand(forking))
    assert not same(ran.rows()[0], by_hand())


def forking(tokens: list[Tokens]) -> list[Tensor]:
    entropies = torch.cat([t.entropy for t in tokens]).detach()
    # the last of the fifth
    limit = entropies.sort(descending=True).values[len(entropies) // 5 - 1]
    return [plain(t) * (t.entropy.detach() >= limit) * 5 for t in tokens]


MADE = "        batch = make_batch(answers, device)\n"
# as if the engine had found every token less likely by so much
SHIFT = "        batch.engine_logprobs = batch.engine_logprobs - 0.2\n"


@case(*GRPO, tampered=Tampered("ppo.py", MADE, MADE + SHIFT))
def tis_sequence(ran: Ran) -> None:
    def loss(t: Tokens) -> Tensor:
        return plain(t) * min(math.exp(0.2 * len(t.of.ids)), 2.0)

    def token_loss(t: Tokens) -> Tensor:
        return plain(t) * math.exp(0.2)

    assert same(ran.rows()[0], by_hand(loss))
    assert not same(ran.rows()[0], by_hand(token_loss))


@case("--critic_epochs", 1)
def lr_warmup(ran: Ran) -> None:
    for row in ran.rows():
        assert row["policy/lr"] == pytest.approx(LR * row["step"] / 10)
        assert row["critic/lr"] == pytest.approx(CRITIC_LR * row["step"] / 10)
    assert same(ran.rows()[0], by_hand(advantages=whitened, lr=LR / 10))
    assert not same(ran.rows()[0], by_hand(advantages=whitened))
    critic = load_file(ran.out / "checkpoints" / "step_3" / "critic" / "model.safetensors")
    # from 0 in three steps of Adam: about 3e-4 + 6e-4 + 9e-4
    assert 3e-4 < critic["score.weight"].abs().max() < 2.5e-3


@case("--critic_epochs", 1, "--critic_lr", 1e-2)
def sigmoid_critic(ran: Ran) -> None:
    first, _, last = ran.rows()
    # the first values are 0.5
    errors = torch.cat([torch.full((len(a.ids),), 0.5 - a.reward) for a in answers()])
    assert first["critic/value_min"] == first["critic/value_max"] == 0.5
    assert first["critic/loss"] == pytest.approx(0.5 * errors.square().mean().item(), rel=1e-5)
    assert 0 < last["critic/value_min"] < last["critic/value_max"] < 1


@case("--critic_lr", 0.0)
def small_critic(ran: Ran) -> None:
    assert "policy 0.3M, critic 0.1M" in ran.said
    saved = load_file(ran.out / "checkpoints" / "step_3" / "critic" / "model.safetensors")
    layers = {name: x for name, x in saved.items() if "layers." in name}
    whole = load_file(MODELS["deep"] / "model.safetensors")
    assert {name.split(".")[2] for name in layers} == {"0", "1"}
    # the policy's: the critic's rate is 0
    assert all(x.equal(whole[name]) for name, x in layers.items())
    again = ["run", "--model", MODELS["deep"], *CASES["small_critic"].flags]
    again += ["--steps", 4, "--resume", "auto"]
    said = launch.run(ON_TOY, *again, cwd=ran.folder).good().said
    # its own checkpoint is cut no further
    assert "policy 0.3M, critic 0.1M" in said and "step    4/4" in said


@case(*SMALL, "--task", "countdown3", "--stop", "a", "e", "1", "2", script=ON_COUNTDOWN)
def new_reward(ran: Ran) -> None:
    patched = module(ran.folder / "rewards.py")
    row = {"task": "countdown", "answer": {"numbers": [3, 5, 7], "target": 22}}
    right, wrong = "<think></think><answer>3*5+7</answer>", "<answer>3+5</answer>"
    one, two = patched.score([right, wrong], [row, row])
    assert one["reward"] == pytest.approx(1 - 0.004 * len(right)) and one["correct"] == 1
    assert two["reward"] == pytest.approx(0.1 - 0.004 * len(wrong))
    shown = ran.samples()
    ended = [s for s in shown if s["finished"]]
    assert len(shown) == 24 and ended
    for sample in ended:
        if sample["status"] == "no_answer":
            assert sample["reward"] == pytest.approx(-0.004 * len(sample["response"]))
    mean = sum(s["reward"] for s in shown[:8]) / 8
    assert ran.rows()[0]["reward/mean"] == pytest.approx(mean)


@case(*SMALL, "--task", "sums", "--eval_every", 3, "--eval_rows", 8, script=ON_COUNTDOWN)
def new_dataset(ran: Ran) -> None:
    patched, rewards_there = module(ran.folder / "data.py"), module(ran.folder / "rewards.py")
    train = patched.TASKS["sums"]("train", 0, "base")
    test = patched.TASKS["sums"]("test", 0, "base")
    ids = {row["id"] for row in train + test}
    assert len(ids) == len(train + test) == 10_000 and len(test) == 1_000
    texts = [f"\\boxed{{{row['answer']}}}" for row in test[:3]] + ["\\boxed{-1}"]
    scored = rewards_there.score(texts, test[:4])
    assert [result["reward"] for result in scored] == [1, 1, 1, 0]
    shown = ran.samples()
    assert shown and {s["id"] for s in shown} <= ids


FIFTH = """    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()

"""


@case(*GRPO, tampered=Tampered("rollout.py", FIFTH, ""))  # four methods make an engine
def new_engine(ran: Ran) -> None:
    def rounded(weight: Tensor) -> Tensor:
        return weight.to(torch.float16).to(torch.float32)

    sampler = module(ran.folder / "rollout.py").RoundedSampler
    assert [name for name in dir(sampler) if not name.startswith("_")] == [
        *("load", "sample", "sleep", "wake"),
    ]
    exact, engine = (AutoModelForCausalLM.from_pretrained(MODELS["toy"]) for _ in range(2))
    gaps = []
    with torch.no_grad():
        for weight in engine.parameters():
            weight.copy_(rounded(weight))
        for answer in answers(rounded):
            one, other = (read(model, answer.prompt, answer.ids)[0] for model in (exact, engine))
            gaps.append(one - other)
    gap = torch.cat(gaps).abs().mean().item()
    assert gap > 1e-5
    assert ran.rows()[0]["mismatch/logp_abs_mean"] == pytest.approx(gap, rel=0.02)


def module(file: Path):
    """A file of a copy, beside ours of that name."""
    spec = importlib.util.spec_from_file_location(f"patched_{file.stem}", file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


FLAGS_THAT_DO_IT = [("grpo_by_hand", "plain_grpo"), ("no_critic", "plain_reinforce")]


@pytest.mark.parametrize("name, flagged", FLAGS_THAT_DO_IT)
def test_it_is_what_the_flag_does(name, flagged, ran):
    """Guards the two edits that teach what --advantage does, over all three steps."""
    keys = ("policy/loss", "policy/grad_norm", "reward/mean", "rollout/length_mean")
    for row, expected in zip(ran(name).rows(), ran(flagged).rows(), strict=True):
        assert same(row, expected, keys)


if __name__ == "__main__":
    toy.toy = graded
    toy.run(*sys.argv[1:])
