"""Every choice of the algorithm against a few plain lines of the same formula.

Pure functions are compared with loops over floats. Whole runs of two steps on tests/toy.py are computed once more by
by_hand.py: plain transformers, one token at a time. The last tests are about the flags: what contradicts itself is told
with what to change, and no flag or value is without a test.
"""

import functools
import math
import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import by_hand
import launch
import ppo
import pytest
import rollout
import torch
import toy
from by_hand import ByHand, gae_by_hand
from hypothesis import given as over
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------- pure functions, against loops

SHAPES = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=4, max_size=12
)  # (prompt, response)


def ragged(shapes, *names, garbage=0.0):
    """A mask, and noise in its cells; `garbage` in all others."""
    mask = torch.zeros(len(shapes), 1 + max(a + b for a, b in shapes), dtype=torch.bool)
    for row, (prompt, response) in enumerate(shapes):
        mask[row, prompt : prompt + response] = True
    noise = torch.Generator().manual_seed(len(shapes))
    cells = (torch.randn(mask.shape, generator=noise, dtype=torch.float64) for _ in names)
    return mask, *(torch.where(mask, x, garbage) for x in cells)


def cells(x, mask) -> list[list[float]]:
    return [x[b][mask[b]].tolist() for b in range(len(mask))]


@pytest.mark.parametrize("garbage", [0.0, 1e9, math.nan])
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@over(shapes=SHAPES, n=st.sampled_from([2, 4]))
def test_group_advantages(kind, garbage, shapes, n):
    """Guards the mean of the wrong samples (the others, for RLOO; those that count, where a reward failed), a biased
    deviation, neighbours that are not a group, and numbers from outside the mask."""
    shapes = shapes[: len(shapes) // n * n]
    mask, rewards = ragged(shapes, "rewards", garbage=garbage)
    got = ppo.group_advantages(rewards, mask, n, kind)
    totals = [sum(row) if row else None for row in cells(rewards, mask)]
    for b, total in enumerate(totals):
        group = [x for x in totals[b // n * n : b // n * n + n] if x is not None]
        if total is None or len(group) == 1:
            expected = 0.0
        elif kind == "grpo":
            expected = (total - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        else:
            expected = total - (sum(group) - total) / (len(group) - 1)
        assert got[b].tolist() == pytest.approx([expected * m for m in mask[b].tolist()], abs=1e-9)


@pytest.mark.parametrize("kind", ["token", "sequence", "constant"])
@over(shapes=SHAPES)
def test_loss_weights(kind, shapes):
    """Guards the denominators: padding or responses without a token that are counted, one mean taken for another."""
    mask, loss = ragged(shapes, "loss")
    rows = [row for row in cells(loss, mask) if row]
    means = {
        "token": lambda: statistics.mean(x for row in rows for x in row),
        "sequence": lambda: statistics.mean(statistics.mean(row) for row in rows),
        "constant": lambda: statistics.mean(sum(row) / 20 for row in rows),
    }
    got = (loss * ppo.loss_weights(mask, kind, 20)).sum().item()
    assert got == pytest.approx(
        means[kind]() if rows else 0.0, rel=1e-5, abs=1e-7
    )  # (weights are fp32)


@over(shapes=SHAPES)
def test_gae_with_a_lambda_for_each_row(shapes):
    """Guards a lambda that is spread over tokens instead of rows."""
    mask, rewards, values = ragged(shapes, "rewards", "values")
    lams = torch.linspace(0, 1, len(shapes), dtype=torch.float64)
    advantages = ppo.gae(rewards, values, mask, 0.9, lams)
    for b, (r, v) in enumerate(zip(cells(rewards, mask), cells(values, mask))):
        expected = gae_by_hand(r, v, 0.9, lams[b].item())
        assert advantages[b][mask[b]].tolist() == pytest.approx(expected)
    assert (advantages[~mask] == 0).all()


NUMBER = st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3)


@over(
    st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=8), st.sampled_from([None, 1.5, 3.0])
)
def test_policy_loss_with_a_dual_clip(pairs, dual):
    """Guards a bound on the wrong side or sign of advantage, and a token that is pushed although it is bounded."""
    log_ratio = torch.tensor([a for a, _ in pairs], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([b for _, b in pairs], dtype=torch.float64)
    old = torch.full_like(advantages, -2.0)
    clip = ppo.PPOFlags(clip_low=0.2, clip_high=0.28, dual_clip=dual)
    loss, low, high = ppo.policy_loss(old + log_ratio, old, advantages, clip)
    loss.sum().backward()
    for i, (a, advantage) in enumerate(pairs):
        ratio = math.exp(a)
        objective = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
        free = 0.8 <= ratio <= 1.28 or (advantage > 0) == (ratio < 1)
        if dual and advantage < 0 and objective < dual * advantage:
            objective, free = dual * advantage, False
        assert loss[i].item() == pytest.approx(-objective)
        assert log_ratio.grad[i].item() == pytest.approx(-ratio * advantage if free else 0.0)
        assert (low[i].item(), high[i].item()) == (
            ratio < 0.8 and advantage < 0,
            ratio > 1.28 and advantage > 0,
        )


@over(shapes=SHAPES.filter(lambda shapes: any(n for _, n in shapes)))
def test_calibration_by_quarter(shapes):
    """Guards quarters of the padded row, or of prompt and response together, and values against the wrong returns."""
    mask, values, returns = ragged(shapes, "values", "returns", garbage=1e9)
    got = ppo.critic_metrics(values, returns, mask)
    for name, rows in (("value", cells(values, mask)), ("return", cells(returns, mask))):
        for q in range(4):
            part = [
                x
                for row in rows
                for i, x in enumerate(row)
                if q * len(row) <= 4 * i < (q + 1) * len(row)
            ]
            assert got.get(f"critic/{name}_q{q + 1}") == (
                pytest.approx(statistics.mean(part)) if part else None
            )
    flat_values, flat = ([x for row in cells(x, mask) for x in row] for x in (values, returns))
    error = statistics.pvariance([r - v for r, v in zip(flat, flat_values)])
    variance = statistics.pvariance(flat)
    assert got["critic/explained_var"] == pytest.approx(
        1 - error / variance if variance > 1e-8 else 0.0
    )
    assert (got["critic/value_min"], got["critic/value_max"]) == (
        min(flat_values),
        max(flat_values),
    )


@over(
    st.lists(
        st.lists(st.text("01i", min_size=2, max_size=2), min_size=3, max_size=3),
        min_size=4,
        max_size=4,
    ),
    st.integers(1, 3),
)
def test_refilled(rounds, limit):
    """Guards rounds that are asked for in vain or not at all, groups that are torn apart or put in another order, and a
    reward that failed on our side (i) taken for an unlike one. A group is two answers: 01 can teach, 00, 0i cannot."""
    asked = []

    def make(k):
        rewards = [
            {"reward": float(c == "1"), "status": "infra" if c == "i" else "ok"}
            for g in rounds[k]
            for c in g
        ]
        rows = [f"row{k}{i}" for i in range(3) for _ in range(2)]
        samples, texts = ([f"{name}{k}{i}" for i in range(6)] for name in "st")
        return ppo.Answers(rows, samples, texts, rewards)

    def draw(k):
        asked.append(k)
        return make(k)

    good, bad, last = [], [], 0
    for k in range(limit + 1):
        for i, group in enumerate(rounds[k]):
            (good if sorted(group) == ["0", "1"] else bad).append((k, i))
        last = k
        if len(good) >= 3:
            break
    chosen = (good + bad)[:3]
    got = ppo.refill(
        make(0), draw, ppo.Args(prompts_per_step=3, samples_per_prompt=2, refill=limit)
    )
    assert asked == list(range(1, last + 1))
    assert got.rows == [f"row{k}{i}" for k, i in chosen for _ in (0, 1)]
    assert got.samples == [f"s{k}{2 * i + j}" for k, i in chosen for j in (0, 1)]
    assert got.texts == [f"t{k}{2 * i + j}" for k, i in chosen for j in (0, 1)]
    assert got.scored == [make(k).scored[2 * i + j] for k, i in chosen for j in (0, 1)]


def test_records_are_aligned(monkeypatch):
    """Guards colours of a report that stand on the wrong token, and a file that a long response blows up."""
    rows = [{"id": str(b), "prompt": "", "ids": [7] * (1 + b % 3)} for b in range(6)]
    samples = [
        rollout.Sample([10 * b + t for t in range(1 + b)], [0.0] * (1 + b), True) for b in range(6)
    ]
    batch = rollout.collate([row["ids"] for row in rows], samples)
    scored, texts = [{"reward": float(b)} for b in range(6)], [f"text {b}" for b in range(6)]
    numbers = {"values": batch.ids / 3, "advantages": -batch.ids / 7}
    for most in (rollout.MOST_TOKENS, 2):
        monkeypatch.setattr(rollout, "MOST_TOKENS", most)
        out = rollout.records(
            9, rows, samples, texts, scored, 3, lambda ids: f"<{ids[0]}>", **numbers
        )
        assert [row["id"] for row in out] == ["0", "2", "4"]
        for row in out:
            b = int(row["id"])
            ids = samples[b].ids[-most:]
            assert (row["response"], row["reward"], row["tokens"]) == (
                f"text {b}",
                b,
                [f"<{i}>" for i in ids],
            )
            assert row["values"] == [round(i / 3, 4) for i in ids]
            assert row["advantages"] == [round(-i / 7, 4) for i in ids]
    assert len(rollout.records(9, rows, samples, texts, scored)) == 6


def test_samples_on_the_console_are_three_lines():
    """Guards the reader of a log: lists of tokens, values and advantages are for the file."""
    sample = {"step": 9, "id": "a", "prompt": "2=", "response": "22", "finished": True}
    sample |= {"tokens": ["2", "2"], "values": [0.5, 0.25], "advantages": [1.0, -1.0]}
    sample |= {"reward": 0.5, "status": "wrong"}
    asked, said, judged = rollout.show([sample]).splitlines()
    assert asked.split() == ["prompt", "'2='"] and said.split() == ["response", "'22'"]
    assert judged.split("judged")[1].strip() == "step 9, finished True, reward 0.5, status wrong"


# --------------------------------------------------------------------------------------------- whole runs, once by hand

BASE = (
    "--steps 2 --save_every 1 --prompts_per_step 16 --samples_per_prompt 4 --ppo_epochs 1 --minibatch_size 64 "
    "--max_tokens_per_microbatch 96 --max_prompt_tokens 4 --max_new_tokens 8 --temperature 0.7 --entropy_coef 0.01 "
    "--lr 1e-3 --critic_lr 3e-3 "
)
RUNS = {
    "decoupled": "--gamma 0.95 --lam 0.9 --critic_lam 1.0 --tis_cap 0 --dtype fp32 lags",
    "critic_epochs": "--lam 0.9 --critic_lam 0.5 --critic_epochs 3 --value_clip 0.01 --loss_mean sequence lags",
    "length": "--lam_adaptive 0.05 --max_new_tokens 40 --loss_mean constant --ppo_epochs 2 --critic_epochs 1 "
    "--minibatch_size 32 --clip_low 0.05 --clip_high 0.1 --dual_clip 1.12 --entropy_coef 0.05 --lr 3e-3",
    "warmup": "--critic_warmup 1 --lam 0.8 --critic_lam 0.8 --ppo_epochs 2 --tis_cap 1.5 lags",
    "reward-k3": "--kl_coef 0.2 --kl_in reward --kl_estimator k3 --lam 0.95 --gamma 0.9",
    "loss-k2": "--kl_coef 0.2 --kl_in loss --kl_estimator k2 --ppo_epochs 2 --clip_high 0.28",
    "grpo": "--advantage grpo --loss_mean sequence --kl_coef 0.2 --kl_in loss --kl_estimator k3",
    "rloo": "--advantage rloo --loss_mean constant --kl_coef 0.2 --kl_in reward --kl_estimator k1 --kl_target 0.12 --ppo_epochs 2 "
    "--steps 3 again",
    "reinforce++": "--advantage reinforce++ --gamma 0.9 --kl_coef 0.2 --kl_in reward --kl_estimator k2 --minibatch_size 32",
    "refill": "--advantage grpo --loss_mean sequence --kl_coef 0.2 --kl_in loss --kl_estimator k3 --refill 3 again",
}


def words_of(name: str) -> list[str]:
    return f"{BASE} {RUNS[name]}".split()


def flags_of(name: str) -> list[str]:
    return [word for word in words_of(name) if word not in by_hand.OURS]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("toy") / "model"
    toy.make_model(str(path))
    return str(path)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory) -> Callable[[str], Path]:
    """made(name): the folder of that run, which is made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def of(name: str) -> Path:
        by_hand.run(str(folder / name), ["--model", model, *words_of(name)])
        return folder / name

    return of


@pytest.mark.parametrize("name", [name for name in RUNS if name != "refill"])
def test_two_steps_by_hand(made, model, name):
    """Guards every formula where it is used: which numbers go in, over which tokens they are averaged, by what they are
    scaled, in which epochs; and AdamW, by the weights after a step."""
    out = made(name)
    metrics, samples = launch.metrics(out), launch.read_lines(out / "samples.jsonl")
    flags = ppo.parse_args(["--model", model, *flags_of(name)])
    hand = ByHand(flags, model, "lags" in words_of(name))
    for step, row in enumerate(metrics):
        start = out / "checkpoints" / f"step_{step}"
        if step:
            hand.follow(start)
        expected = hand.step(step, str(start / "policy") if step else model)
        for key, x in expected.items():
            close = (
                pytest.approx(x, rel=1e-6)
                if key == "policy/kl_coef"
                else pytest.approx(x, rel=1e-4, abs=2e-6)
            )
            assert row[key] == close, (step, key)
        names = {key for key in row if key.startswith(("policy/", "critic/"))}
        assert all(
            (f"{part}/loss" in names) == (f"{part}/loss" in expected)
            for part in ("policy", "critic")
        )
        shown = [s for s in samples if s["step"] == step + 1]
        assert len(shown) == 8
        for k, sample in enumerate(shown):
            assert sample["tokens"] == hand.tokenizer.convert_ids_to_tokens(hand.answers[8 * k].ids)
            assert sample["advantages"] == pytest.approx(hand.advantages[8 * k], abs=1e-4)
            if flags.advantage == "gae":
                assert sample["values"] == pytest.approx(
                    [v.item() for v in hand.old_values[8 * k]], abs=1e-4
                )
    hand.follow(out / "checkpoints" / f"step_{flags.steps}")
    assert step + 1 == flags.steps
    if name == "length":  # nothing of these would be seen with short responses or small steps
        assert hand.bounded > 0 and max(len(s.ids) for s in hand.answers) > 20
    if name == "critic_epochs":
        assert metrics[1]["critic/clipfrac"] > 0.01


@pytest.mark.parametrize("name", [name for name, words in RUNS.items() if "again" in words])
def test_resume_is_exact_for_each_kind(made, model, tmp_path, name):
    """Guards a checkpoint without a critic, flags that are lists or words, the adapted KL coefficient, and refilling
    that depends on more than seed and step: the last step once more, in another process, is equal to the last bit."""
    again = tmp_path / "again"
    shutil.copytree(made(name), again, symlinks=True)
    shutil.rmtree(max(Path(again, "checkpoints").glob("step_*")))
    flags = ["--model", model, *flags_of(name), "--resume", "auto"]
    done = launch.run("tests/toy.py", again, *flags).good()
    whole = [launch.numbers(row) for row in launch.metrics(made(name))]
    assert f"step {len(whole):>4}/{len(whole)}" in done.said  # or equal rows would mean nothing
    assert [launch.numbers(row) for row in launch.metrics(again)] == whole
    if name == "rloo":
        assert len({row["policy/kl_coef"] for row in whole}) == len(whole) == 3


def test_refill_on_any_number_of_ranks(made, model, tmp_path):
    """Guards refilling: more groups that can teach, as many samples; and, on two ranks, prompts that are drawn by rank,
    groups that ranks choose differently, and denominators of GRPO's means that know one rank only."""
    refilled, plain = launch.metrics(made("refill")), launch.metrics(made("grpo"))
    flags = ["--model", model, *flags_of("refill"), "--offload", "policy", "reference"]
    launch.run("tests/toy.py", tmp_path / "two", *flags, ranks=2).good()
    assert all(
        a["reward/alike_frac"] < b["reward/alike_frac"] - 0.2 for a, b in zip(refilled, plain)
    )
    keys = [
        "policy/loss",
        "policy/grad_norm",
        "policy/entropy",
        "reward/mean",
        "reward/alike_frac",
        "policy/ref_kl",
    ]
    for row, expected in zip(launch.metrics(tmp_path / "two"), refilled, strict=True):
        assert [row[key] for key in keys] == pytest.approx(
            [expected[key] for key in keys], rel=1e-4, abs=1e-6
        )
    groups = defaultdict(list)
    for sample in launch.read_lines(made("refill") / "samples.jsonl"):
        groups[sample["step"]].append(sample["id"])
    assert [len(ids) for ids in groups.values()] == [8, 8]


# -------------------------------------------------------------------------------------------------- flags themselves

CONTRADICTIONS = {
    "--advantage grpo --samples_per_prompt 1": "samples_per_prompt=1: --advantage grpo compares .*use 2 or more",
    "--advantage rloo --samples_per_prompt 1": "samples_per_prompt=1: --advantage rloo compares .*use 2 or more",
    "--advantage rloo --critic_warmup 2": "critic_warmup=2 needs --advantage gae: rloo has no critic",
    "--advantage grpo --critic_epochs 2": "critic_epochs=2 needs --advantage gae: grpo has no critic",
    "--advantage reinforce++ --critic_lam 0.9": r"critic_lam=0.9 needs --advantage gae: reinforce\+\+ has no critic",
    "--advantage grpo --lam 0.9": "lam=0.9 needs --advantage gae: grpo has no critic",
    "--advantage grpo --lam_adaptive 0.05": "lam_adaptive=0.05 needs --advantage gae: grpo has no critic",
    "--lam 0.9 --lam_adaptive 0.05": "lam=0.9 and lam_adaptive=0.05: give one of them",
    "--lam_adaptive 0": "lam_adaptive=0.0: must be above 0",
    "--refill 9": "refill=9: use 0 to 5",
    "--refill -1": "refill=-1: use 0 to 5",
    "--refill 1 --samples_per_prompt 1": "samples_per_prompt=1: --refill looks for .*use 2 or more",
    "--dual_clip 0.9": "dual_clip=0.9: must be above 1",  # it would stop every token with a negative advantage
    "--kl_coef 0.1 --kl_in loss": "kl_in='loss' needs --kl_estimator k2 or k3",
    "--critic_epochs -1": "critic_epochs=-1: must be above 0",
    "--critic_warmup -1": "critic_warmup=-1: must be 0 or above",
    "--kl_target 0.1": "kl_target=0.1 needs a --kl_coef above 0",
}


@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_contradictions(words, model):
    """Guards the user's time: what contradicts itself ends before a weight is loaded, and says what to change."""
    flags = ["--model", model, *BASE.split(), *words.split()]
    with pytest.raises(ValueError, match=CONTRADICTIONS[words]):
        ppo.check(ppo.parse_args(flags), 1)
    ppo.check(
        ppo.parse_args(flags[: -len(words.split())]), 1
    )  # without them there is nothing to say


def given(name: str) -> set[str]:
    """What tests give a flag: --name VALUE ..., "--name", VALUE, name=VALUE, "name": VALUE; as they are written."""
    gap, out = r"""["']?\s*,\s*f?["']?""", set()
    checks = (ROOT / "tools" / "gpu").glob("*.py")  # of what only a card can run
    for file in (*(ROOT / "tests").glob("*.py"), *checks):
        text = file.read_text()
        for before in (
            rf"--{name} ",
            rf"--{name}{gap}",
            rf"\b{name}=[\"']?",
            rf"[\"']{name}[\"']:\s*[\"']?",
        ):
            out |= set(re.findall(before + r"""([^\s"',)\]}]+)""", text))
        for words in re.findall(rf"--{name}((?:[\"', ]+\w+)+)", text):
            out |= set(re.findall(r"\w+", words))
        out |= {"False"} if f"--no-{name}" in text else set()
    return out


def is_number(text: str) -> bool:
    return bool(re.fullmatch(r"-?[\d_.]+(e-?\d+)?", text))


def test_every_flag_and_value_is_in_a_test():
    """Guards a knob that nobody turns: each has another value than its default somewhere, and a choice each of its
    values. (A look at the sources: that something is checked there is for their planted faults to show.)"""
    kinds, missing = get_type_hints(ppo.Args), []
    for flag in fields(ppo.Args):
        default, found = getattr(ppo.Args(), flag.name), given(flag.name)
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            others = {x for x in found if is_number(x) and float(x) != default}
        else:
            others = found - {str(default), repr(default)}
        missing += [] if others else [f"--{flag.name} {found}"]
        literals = [
            kind
            for kind in (kinds[flag.name], *get_args(kinds[flag.name]))
            if get_origin(kind) is Literal
        ]
        wanted = {value for kind in literals for value in get_args(kind)} - {default}
        missing += [f"--{flag.name} {value}" for value in wanted - found]
    assert not missing, missing
