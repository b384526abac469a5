"""Whole runs: they learn, ranks and budgets do not matter, resume is exact.

The task is tests/toy.py where the question is about numbers, and Countdown with vLLM where it is about the engine. A
step computed by hand is in tests/test_choices.py.
"""

import shutil

import launch
import mixture
import pytest
import safetensors.torch
import torch
import toy
from planted import Bug, plant


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("toy") / "model"
    toy.make_model(str(path))
    return str(path)


SMALL = ["--prompts_per_step", "32", "--minibatch_size", "16"]


def mean(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def test_it_learns(tmp_path, toy_model):
    """Guards the loop as a whole: advantage sign, ratio, EOS in the mask, score on the last token, values shifted,
    stale engine weights (canary), a critic that is never updated (explained variance), old log-probs recomputed for
    every minibatch (no clipping ever), a missing temperature (mismatch)."""
    rows = toy.run(str(tmp_path / "run"), "--model", toy_model, "--steps", "24")
    assert mean(rows[-8:], "reward/mean") > 0.9
    assert mean(rows[-8:], "rollout/length_mean") < 2.3
    assert max(row["critic/explained_var"] for row in rows) > 0.3
    assert mean(rows[:8], "policy/clipfrac_high") > 0
    assert max(row["mismatch/logp_abs_mean"] for row in rows) < 1e-4
    assert max(row["mismatch/canary"] for row in rows) < 1e-4


EVERYTHING = [
    *["--steps", "3", "--kl_coef", "0.05", "--kl_in", "loss", "--kl_estimator", "k3"],
    *["--value_clip", "0.2", "--lam", "0.9", "--seed", "3"],
    *["--eval_every", "3", "--eval_rows", "7", "--eval_samples", "2"],
]
WAYS = {  # name -> ranks, flags
    "one": (1, ["--max_tokens_per_microbatch", "64"]),
    "half": (1, ["--max_tokens_per_microbatch", "32"]),
    "two": (2, ["--max_tokens_per_microbatch", "64", "--gradient_checkpointing"]),
    "sp": (2, ["--max_tokens_per_microbatch", "32", "--sp", "2"]),
}


def test_ranks_and_budgets_do_not_matter(tmp_path, toy_model):
    """Guards the one denominator, FSDP's averaging and the packing: 1 process, half the budget, 2 ranks (with
    checkpointing), sequence-parallel ranks; three steps with everything switched on."""
    flags = ["--model", toy_model, *SMALL, *EVERYTHING]
    for name, (ranks, more) in WAYS.items():
        launch.run("tests/toy.py", tmp_path / name, *flags, *more, ranks=ranks).good()
    found = {name: launch.metrics(tmp_path / name) for name in WAYS}
    assert len({row.get("perf/microbatches") for rows in found.values() for row in rows}) > 2
    keys = """policy/loss policy/grad_norm critic/loss critic/grad_norm policy/ref_kl policy/entropy
        reward/mean critic/explained_var""".split()
    for name, rows in found.items():
        for row, expected in zip(rows, found["one"], strict=True):
            # step 0 has an evaluation only
            for key in keys if "policy/loss" in expected else ["eval/correct"]:
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
    flags = ["--model", toy_model, "--steps", "2"]
    done = launch.run("tests/toy.py", tmp_path / "run", *flags, cwd=tmp_path)
    assert done.code != 0 and "FloatingPointError: step 1: rank 0, advantages: " in done.said
    kept = torch.load(tmp_path / "run" / "bad_step_1" / "batch.pt", weights_only=True)
    assert kept["update"] is None and len(kept["batch"]["samples"]) == 128
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_bf16_exports_whole_weights(tmp_path, toy_model):
    """Guards the export from FSDP2, which keeps the head gathered and rounded to bf16 after a forward alone; and the
    precision policy: bf16 only computes, weights stay fp32."""
    out = tmp_path / "run"
    flags = ["--model", toy_model, "--steps", "1", *SMALL, "--dtype", "bf16"]
    said = launch.run("tests/toy.py", out, *flags, ranks=2).good().said
    files = sorted((out / "checkpoints" / "step_1" / "policy").glob("*.safetensors"))
    assert len(files) == 2  # each rank wrote its part
    saved = {}
    for file in files:
        saved |= safetensors.torch.load_file(file)
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    rounded = [name for name, tensor in saved.items() if tensor.equal(tensor.bfloat16().float())]
    assert not rounded, rounded
    assert launch.metrics(out)[0]["mismatch/logp_abs_mean"] < 0.05
    assert "compute bfloat16" in said


def test_a_critic_of_its_own(tmp_path, toy_model, capsys):
    """Guards --critic_model, critic warm-up and the value head: a smaller critic starts at values of 0, trains while
    the policy rests, and goes on from its own checkpoint with its head."""
    toy.make_model(str(tmp_path / "small"), layers=1)
    flags = ["--model", toy_model, *SMALL, "--critic_warmup", "2"]
    own = ["--critic_model", str(tmp_path / "small"), "--critic_lr", "1e-2"]
    first, second, third = toy.run(str(tmp_path / "one"), *flags, *own, "--steps", "3")
    assert "policy 0.1M, critic 0.0M" in capsys.readouterr().out
    assert first["critic/value_min"] == first["critic/value_max"] == 0.0
    assert second["critic/value_max"] != 0.0
    assert "policy/loss" not in first and "policy/loss" not in second
    assert third["policy/lr"] > 0 == second["policy/lr"]
    saved = tmp_path / "one" / "checkpoints" / "step_3" / "critic"
    again = toy.run(str(tmp_path / "two"), *flags, "--critic_model", str(saved), "--steps", "1")
    assert again[0]["critic/value_max"] != 0.0


def test_resume_is_exact(tmp_path, toy_model):
    """Guards checkpoints (both models, both optimizers, KL coefficient, schedule) and determinism: two ranks, of unequal
    shards (11 tokens in the vocabulary), go on from step 2 of 5 with, to the last bit, the metrics of the run that was
    left alone; its own rows from there on are gone. (Once every rank came back with the shards of rank 0.)"""
    out = tmp_path / "run"
    flags = ["--model", toy_model, *SMALL, "--steps", "5", "--save_every", "2"]
    flags += ["--kl_coef", "0.1", "--kl_target", "0.01", "--eval_every", "5", "--eval_rows", "8"]
    launch.run("tests/toy.py", out, *flags, ranks=2).good()
    whole = [launch.numbers(row) for row in launch.metrics(out)]
    for step in (4, 5):
        shutil.rmtree(out / "checkpoints" / f"step_{step}")
    said = launch.run("tests/toy.py", out, *flags, "--resume", "auto", ranks=2).good().said
    assert "steps 2 to 5" in said
    assert [launch.numbers(row) for row in launch.metrics(out)] == whole
    kl_coefs = {row["policy/kl_coef"] for row in whole if "policy/kl_coef" in row}
    assert len(kl_coefs) == 5  # there was a KL state to lose


COUNTDOWN = """--task countdown3 --max_prompt_tokens 64 --max_new_tokens 24 --prompts_per_step 8
    --samples_per_prompt 2 --max_tokens_per_microbatch 400 --no-gradient_checkpointing""".split()


def test_engine_follows_the_trainer(tmp_path, tiny, tiny_untied):
    """Guards the weight sync (a stale tied head shows as 1.5 and more) and the temperature: vLLM against the trainer
    after every update, with tied and with untied embeddings."""
    flags = [*COUNTDOWN, "--temperature", 0.7, "--steps", 4, "--lr", 1e-2]
    flags += ["--entropy_coef", 0.1]  # moves the weights without a reward
    jobs = []
    for name, model in (("tied", tiny), ("untied", tiny_untied)):
        out = tmp_path / name
        jobs.append(launch.start("ppo.py", *flags, "--model", model, "--out", out))
    for job in jobs:
        job.wait().good()
    for name in ("tied", "untied"):
        rows = launch.metrics(tmp_path / name)
        before, after = rows[0]["policy/entropy"], rows[-1]["policy/entropy"]
        assert after != pytest.approx(before, rel=0.02)  # the weights did move
        assert max(row["mismatch/logp_abs_mean"] for row in rows) < 1e-4
        assert max(row["mismatch/canary"] for row in rows) < 1e-4


@pytest.mark.parametrize("ranks, steps", [(1, 9), pytest.param(2, 20, marks=pytest.mark.full)])
def test_math_and_code_together(tmp_path, ranks, steps):
    """Guards the way of real verifiers through the loop: answers in both formats are learned from nothing but reward,
    with hostile programs on the way."""
    mixture.make_model(str(tmp_path / "model"))
    out = tmp_path / "run"
    flags = ["--model", tmp_path / "model", "--steps", steps]
    launch.run("tests/mixture.py", out, *flags, ranks=ranks).good()
    rows = launch.metrics(out)
    assert len(rows) == steps and rows[0]["reward/correct"] < 0.1
    assert mean(rows[-3:], "reward/correct") > 0.3
    for status in ("ok", "wrong", "no_answer", "timeout", "crash", "memory"):
        assert max(row[f"reward/{status}_frac"] for row in rows) > 0, status
    assert all(row["reward/infra_frac"] == 0 for row in rows)
    statuses = {sample["status"] for sample in launch.read_lines(out / "samples.jsonl")}
    assert "ok" in statuses and (out / "verify" / "sandbox.py").exists()
