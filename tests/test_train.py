"""Whole runs: they learn, they equal a step computed by hand, ranks and budgets do not matter, resume is exact.

Each run is its own process, as a user starts it. The task is tests/toy.py where the question is about numbers, and
Countdown with vLLM where it is about the engine.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from planted import Bug, plant

ROOT = Path(__file__).resolve().parent.parent
TOY = ["tests/toy.py"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(script: list[str], *flags) -> subprocess.Popen:
    command = [sys.executable, *map(str, (*script, *flags))]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return said


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def numbers(row: dict) -> dict:
    """A row without what depends on the clock."""
    return {
        k: v
        for k, v in row.items()
        if not k.startswith(("time/", "perf/")) and "tokens_per_s" not in k
    }


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory) -> Path:
    import toy

    path = tmp_path_factory.mktemp("toy") / "model"
    toy.make_model(str(path))
    return path


def test_it_learns(tmp_path, toy_model):
    """Guards the loop as a whole: advantage sign, ratio, EOS in the mask, score on the last token, values shifted,
    stale engine weights (canary), a critic that is never updated (explained variance), old log-probs recomputed for
    every minibatch (no clipping ever), a missing temperature (mismatch)."""
    finish(start(TOY, tmp_path / "run", "--model", toy_model))
    rows = metrics(tmp_path / "run")

    def mean(key, part):
        return sum(r[key] for r in part) / len(part)

    assert mean("reward/mean", rows[-8:]) > 0.9
    assert mean("rollout/length_mean", rows[-8:]) < 2.3
    assert max(r["critic/explained_var"] for r in rows) > 0.3
    assert mean("policy/clipfrac_high", rows[:8]) > 0
    assert max(r["mismatch/logp_abs_mean"] for r in rows) < 1e-4
    assert max(r["mismatch/canary"] for r in rows) < 1e-4


def by_hand(model_path: Path, gamma: float, lam: float, temperature: float, entropy_coef: float):
    """(policy loss, its gradient norm, critic loss, its gradient norm) of the first update, one token at a time, from
    plain transformers models and textbook formulas. Values are 0 before the first update."""
    import data
    import rollout
    import toy
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    rows = data.batch(
        {"toy": toy.load_toy("train", 0, "base")}, 0, 8
    )  # the answers of the run, drawn once more
    prompts = data.encode([row["prompt"] for row in rows], tokenizer)
    sampler = rollout.TorchSampler(str(model_path), [tokenizer.eos_token_id], 10)
    samples = sampler.sample(prompts, 1, 6, temperature, rollout.stream(0, 0, 0))
    policy = AutoModelForCausalLM.from_pretrained(model_path)
    critic = AutoModelForTokenClassification.from_pretrained(model_path, num_labels=1).eval()
    torch.nn.init.zeros_(critic.score.weight)
    torch.nn.init.zeros_(critic.score.bias)
    advantages, logps, entropies, values = [], [], [], []
    for row, prompt, (response, _, finished) in zip(rows, prompts, samples):
        reward = 0.0
        if finished:
            reward = toy.toy(tokenizer.decode(response, skip_special_tokens=True), row, None)[
                "reward"
            ]
        n = len(response)
        advantages.append(
            [reward * (gamma * lam) ** (n - 1 - t) for t in range(n)]
        )  # GAE with all values 0
        for t in range(n):
            prefix = torch.tensor([prompt + response[:t]])
            logp = torch.log_softmax(policy(prefix).logits[0, -1] / temperature, -1)
            logps.append(logp[response[t]])
            entropies.append(-(logp.exp() * logp).sum())
            values.append(critic(prefix).logits[0, -1, 0])
    flat = torch.tensor([a for part in advantages for a in part])
    assert flat.any()  # something to learn from
    logps, entropies, values = map(torch.stack, (logps, entropies, values))
    white = (flat - flat.mean()) / flat.std(unbiased=False)
    policy_loss = (-white * torch.exp(logps - logps.detach()) - entropy_coef * entropies).mean()
    critic_loss = (0.5 * (values - flat) ** 2).mean()
    norms = []
    for model, loss in ((policy, policy_loss), (critic, critic_loss)):
        loss.backward()
        norms.append(
            torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
            .norm()
            .item()
        )
    return policy_loss.item(), norms[0], critic_loss.item(), norms[1]


def test_first_step_by_hand(tmp_path, toy_model):
    """Guards what Adam hides (a wrong denominator or scale) and what lambda = 1 hides (the score on a wrong token)."""
    one = ["--steps", 1, "--prompts_per_step", 8, "--ppo_epochs", 1, "--minibatch_size", 8]
    one += ["--max_tokens_per_microbatch", 24]
    finish(
        start(
            TOY,
            tmp_path / "run",
            "--model",
            toy_model,
            *one,
            "--gamma",
            0.9,
            "--lam",
            0.8,
            "--critic_lam",
            0.8,
        )
    )
    row = metrics(tmp_path / "run")[0]
    loss, norm, critic_loss, critic_norm = by_hand(toy_model, 0.9, 0.8, 0.7, 0.01)
    assert row["policy/loss"] == pytest.approx(loss, abs=1e-5)
    assert row["policy/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert row["critic/loss"] == pytest.approx(critic_loss, rel=1e-4)
    assert row["critic/grad_norm"] == pytest.approx(critic_norm, rel=1e-4)


def test_math_and_code_together(tmp_path):
    """Guards the way of real verifiers through the loop: 20 steps on two ranks, answers in both formats learned from
    nothing but reward, hostile programs on the way, and no process left."""
    import mixture

    mixture.make_model(str(tmp_path / "model"))
    finish(start([*TWO, "tests/mixture.py"], tmp_path / "run", "--model", tmp_path / "model"))
    rows = metrics(tmp_path / "run")
    assert len(rows) == 20 and rows[0]["reward/correct"] < 0.1
    assert sum(row["reward/correct"] for row in rows[-3:]) / 3 > 0.5
    for status in ("ok", "wrong", "no_answer", "timeout", "crash", "memory"):
        assert max(row[f"reward/{status}_frac"] for row in rows) > 0, status
    assert all(row["reward/infra_frac"] == 0 for row in rows)
    statuses = {json.loads(line)["status"] for line in open(tmp_path / "run" / "samples.jsonl")}
    assert "ok" in statuses and (tmp_path / "run" / "verify" / "sandbox.py").exists()


def test_ranks_and_budgets_do_not_matter(tmp_path, toy_model):
    """Guards the one denominator, FSDP's averaging and the packing: 1 process, 2 ranks (with checkpointing), half and
    double budget, sequence-parallel ranks; three steps with everything switched on."""
    flags = [
        "--model",
        toy_model,
        "--steps",
        3,
        "--prompts_per_step",
        32,
        "--minibatch_size",
        16,
        "--kl_coef",
        0.05,
        "--kl_in",
        "loss",
        "--kl_estimator",
        "k3",
        "--value_clip",
        0.2,
        "--lam",
        0.9,
        "--seed",
        3,
        "--eval_every",
        3,
        "--eval_rows",
        7,
        "--eval_samples",
        2,
    ]
    ways = {
        "one": (TOY, ["--max_tokens_per_microbatch", 64]),
        "half": (TOY, ["--max_tokens_per_microbatch", 32]),
        "double": (TOY, ["--max_tokens_per_microbatch", 128]),
        "two": ([*TWO, *TOY], ["--max_tokens_per_microbatch", 64, "--gradient_checkpointing"]),
        "sp": ([*TWO, *TOY], ["--max_tokens_per_microbatch", 32, "--sp", 2]),
    }
    for names in (["one", "half"], ["double"], ["two"], ["sp"]):  # two processes at a time
        running = [start(ways[name][0], tmp_path / name, *flags, *ways[name][1]) for name in names]
        for run in running:
            finish(run)
    reference = metrics(tmp_path / "one")
    assert (
        len({row.get("perf/microbatches") for name in ways for row in metrics(tmp_path / name)}) > 2
    )
    keys = [
        "policy/loss",
        "policy/grad_norm",
        "critic/loss",
        "critic/grad_norm",
        "policy/ref_kl",
        "policy/entropy",
        "reward/mean",
        "critic/explained_var",
    ]
    for name in ways:
        for row, expected in zip(metrics(tmp_path / name), reference, strict=True):
            for key in (
                keys if "policy/loss" in expected else ["eval/correct"]
            ):  # (step 0 has an evaluation only)
                assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (name, key)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, toy_model):
    """Guards the weights: nothing is stepped or saved, and the batch is kept for a look."""
    nan = Bug(
        "nan",
        "ppo.py",
        "gae(token_rewards, values, mask, args.gamma, lam)",
        "gae(token_rewards * float('nan'), values, mask, args.gamma, lam)",
        (),
    )
    plant(nan, tmp_path)
    run = start([tmp_path / TOY[0]], tmp_path / "run", "--model", toy_model, "--steps", 2)
    said, _ = run.communicate(timeout=100)
    assert run.returncode != 0 and "FloatingPointError: step 1: rank 0, advantages: " in said
    kept = torch.load(tmp_path / "run" / "bad_step_1" / "batch.pt", weights_only=True)
    assert kept["update"] is None and len(kept["batch"]["samples"]) == 128
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_bf16_exports_whole_weights(tmp_path, toy_model):
    """Guards the export from FSDP2, which keeps the head gathered and rounded to bf16 after a forward alone; and the
    precision policy: bf16 only computes, weights stay fp32. Also: a resume that has nothing left to do says so."""
    import safetensors.torch

    flags = [
        "--model",
        toy_model,
        "--steps",
        1,
        "--prompts_per_step",
        32,
        "--minibatch_size",
        16,
        "--dtype",
        "bf16",
    ]
    said = finish(start([*TWO, *TOY], tmp_path / "run", *flags))
    files = sorted((tmp_path / "run" / "checkpoints" / "step_1" / "policy").glob("*.safetensors"))
    assert len(files) == 2  # each rank wrote its part
    saved = {
        name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()
    }
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    rounded = [name for name, tensor in saved.items() if tensor.equal(tensor.bfloat16().float())]
    assert not rounded, rounded
    assert (
        metrics(tmp_path / "run")[0]["mismatch/logp_abs_mean"] < 0.05 and "compute bfloat16" in said
    )
    said = finish(start(TOY, tmp_path / "run", *flags, "--resume", "auto"))
    assert "nothing is left to do" in said and len(metrics(tmp_path / "run")) == 1


def test_a_critic_of_its_own(tmp_path, toy_model):
    """Guards --critic_model, critic warm-up and the value head: a smaller critic starts at values of 0, trains while
    the policy rests, and goes on from its own checkpoint with its head."""
    import toy

    toy.make_model(str(tmp_path / "small"), layers=1)
    flags = [
        "--model",
        toy_model,
        "--steps",
        3,
        "--prompts_per_step",
        32,
        "--minibatch_size",
        16,
        "--critic_warmup",
        2,
    ]
    said = finish(
        start(
            TOY, tmp_path / "one", *flags, "--critic_model", tmp_path / "small", "--critic_lr", 1e-2
        )
    )
    first, second, third = metrics(tmp_path / "one")
    assert "policy 0.1M, critic 0.0M" in said
    assert (
        first["critic/value_min"] == first["critic/value_max"] == 0.0 != second["critic/value_max"]
    )
    assert (
        "policy/loss" not in first
        and "policy/loss" not in second
        and third["policy/lr"] > 0 == second["policy/lr"]
    )
    saved = tmp_path / "one" / "checkpoints" / "step_3" / "critic"
    finish(start(TOY, tmp_path / "two", *flags, "--critic_model", saved))
    assert metrics(tmp_path / "two")[0]["critic/value_max"] != 0.0


COUNTDOWN = [
    "ppo.py",
    "--task",
    "countdown3",
    "--max_prompt_tokens",
    64,
    "--max_new_tokens",
    24,
    "--prompts_per_step",
    8,
    "--samples_per_prompt",
    2,
    "--max_tokens_per_microbatch",
    400,
    "--no-gradient_checkpointing",
]


def test_resume_is_exact(tmp_path, tiny):
    """Guards checkpoints (both models, both optimizers, KL coefficient, schedule) and determinism: a run killed after
    step 3 and resumed from step 2 has, to the last bit, the metrics of one that was left alone."""
    flags = [
        *COUNTDOWN,
        "--model",
        tiny,
        "--steps",
        5,
        "--save_every",
        2,
        "--minibatch_size",
        8,
        "--lr",
        1e-3,
        "--critic_lr",
        1e-3,
        "--kl_coef",
        0.1,
        "--kl_target",
        0.01,
        "--entropy_coef",
        0.1,
        "--eval_every",
        5,
        "--eval_rows",
        8,
    ]
    whole = start(flags, "--out", tmp_path / "whole")
    killed = start(flags, "--out", tmp_path / "killed")
    deadline = time.time() + 200
    while time.time() < deadline:
        time.sleep(0.02)
        file = tmp_path / "killed" / "metrics.jsonl"
        if file.exists() and '"step": 3' in file.read_text():
            break
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    finish(whole)
    before = len(metrics(tmp_path / "killed"))
    assert before < len(metrics(tmp_path / "whole"))
    finish(start(flags, "--out", tmp_path / "killed", "--resume", "auto"))
    assert [numbers(r) for r in metrics(tmp_path / "killed")] == [
        numbers(r) for r in metrics(tmp_path / "whole")
    ]
    kl_coefs = [r["policy/kl_coef"] for r in metrics(tmp_path / "whole") if "policy/kl_coef" in r]
    assert len(set(kl_coefs)) > 1  # there was a KL state to lose


def test_resume_of_shards_is_exact(tmp_path, toy_model):
    """Guards the sharded state: two ranks, of unequal shares (11 tokens in the vocabulary), go on from step 2 of 4 with
    the metrics of the run that was left alone. (Once every rank came back with the shards of rank 0.)"""
    flags = [
        "--model",
        toy_model,
        "--steps",
        4,
        "--prompts_per_step",
        32,
        "--minibatch_size",
        16,
        "--save_every",
        2,
    ]
    finish(start([*TWO, *TOY], tmp_path / "run", *flags))
    whole = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_4")
    finish(start([*TWO, *TOY], tmp_path / "run", *flags, "--resume", "auto"))
    assert [numbers(row) for row in metrics(tmp_path / "run")] == [numbers(row) for row in whole]


def test_engine_follows_the_trainer(tmp_path, tiny, tiny_untied):
    """Guards the weight sync (a stale tied head shows as 1.5 and more) and the temperature: vLLM against the trainer
    after every one of 20 updates, with tied and with untied embeddings."""
    flags = [*COUNTDOWN, "--temperature", 0.7, "--steps", 20, "--lr", 3e-3]
    flags += ["--entropy_coef", 0.1]  # moves the weights without a reward
    models = {"tied": tiny, "untied": tiny_untied}
    running = [
        start(flags, "--model", model, "--out", tmp_path / name) for name, model in models.items()
    ]
    for run in running:
        finish(run)
    for name in models:
        check_agreement(metrics(tmp_path / name))


def check_agreement(rows: list[dict]) -> None:
    assert rows[-1]["policy/entropy"] != pytest.approx(
        rows[0]["policy/entropy"], rel=0.02
    )  # the weights did move
    assert max(r["mismatch/logp_abs_mean"] for r in rows) < 1e-4
    assert max(r["mismatch/canary"] for r in rows) < 1e-4
