"""Every dataset through a whole step; and what run_4xh100.sh makes of its recipes: the command, and with `--all` the
runs, with a tiny model in the place of the real one.
"""

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import fixtures
import launch
import pytest
from torch.distributed.run import get_args_parser
from transformers import Qwen2Config

import data
import ppo
import rewards
from verify import pool

ROOT = Path(__file__).resolve().parent.parent
TINY = """--engine torch --steps 1 --prompts_per_step 4 --max_new_tokens 8 --max_prompt_tokens 500
    --max_tokens_per_microbatch 1000 --eval_every 1 --eval_rows 2 --no-gradient_checkpointing""".split()
CODE = [
    {"question": f"Add {n}.", "inputs": ["1\n"], "outputs": [f"{1 + n}\n"], "fn_name": None}
    for n in range(12)
]
GSM8K = [
    {"question": f"What is {n} + 1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
    for n in range(9)
]
MATH = [
    {
        "problem": f"Half of {n}?",
        "solution": rf"So $\boxed{{\frac{{{n}}}{{2}}}}$.",
        "level": "Level 1",
    }
    for n in range(1, 60, 2)
]


def datasets(folder: Path) -> dict[str, list[str]]:
    """name -> the flags that say what is trained on."""
    fixtures.eurus_folder(folder / "eurus")
    countdown = [{"target": 3 + n, "nums": [1, 2, n]} for n in range(120)]
    fixtures.parquet(
        folder / "countdown" / "train-00000-of-00001.parquet", countdown, fixtures.COUNTDOWN
    )
    for split, rows in (("train", GSM8K[:7]), ("test", GSM8K[7:])):
        text = fixtures.pa.schema([("question", fixtures.TEXT), ("answer", fixtures.TEXT)])
        fixtures.parquet(folder / "gsm8k" / "main" / f"{split}-00000-of-00001.parquet", rows, text)
    fixtures.jsonl(folder / "math.jsonl", MATH)
    fixtures.jsonl(folder / "code.jsonl", [*CODE, b"no row"])
    return {
        "eurus": ["--task", "math,code", "--data", f"{folder}/eurus", "--template", "chat"],
        "countdown": ["--task", "countdown", "--data", f"{folder}/countdown"],
        "gsm8k": ["--task", "math", "--data", f"{folder}/gsm8k"],
        "math": [
            "--task",
            "math",
            "--data",
            f"{folder}/math.jsonl",
            "--prompt_column",
            "problem",
            "--answer_column",
            "solution",
        ],
        "code": ["--task", "code", "--data", f"{folder}/code.jsonl", "--template", "chat"],
        "gym": ["--task", "rg:chain_sum", "--stop", "</answer>"],
        "mixture": [
            "--task",
            "math:2,code:1,rg:leg_counting:1",
            "--data",
            f"{folder}/eurus",
            "--eval_samples",
            "2",
        ],
    }


EURUS = 8 + 6  # rows of math and of code


@pytest.fixture(scope="module")
def one_sandbox():
    """One of a kind, as starting them is most of the time here; and programs that do not end get a second."""
    pool.this_pool().close()
    pool.this_pool.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "default_workers", lambda: 1)
        patch.setattr(rewards, "TEST_SECONDS", 1.0)
        yield
    pool.this_pool().close()
    pool.this_pool.cache_clear()


@pytest.fixture(scope="module")
def of_dataset(tmp_path_factory) -> dict[str, list[str]]:
    return datasets(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "name, kept, dropped",
    [
        ("eurus", EURUS, "unequal numbers"),
        ("countdown", 117, "held out"),
        ("gsm8k", 7, ""),
        ("math", 29, "held out"),
        ("code", 11, "no JSON"),
        # the mixture has such a task, too
        pytest.param("gym", 0, "", marks=pytest.mark.full),
        ("mixture", EURUS, "also in the test split"),
    ],
)
def test_every_dataset_goes_through_a_step(
    of_dataset, one_sandbox, tiny, tmp_path, capsys, name, kept, dropped
):
    """Guards a format that is read but cannot be trained on: rows of files, ids, a step, rewards, held-out rows."""
    out = tmp_path / "run"
    flags = [*TINY, *of_dataset[name], "--model", tiny, "--out", str(out)]
    step = ppo.train(ppo.parse_args(flags))[-1]
    report = capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    samples = launch.read_lines(out / "samples.jsonl")
    assert step["step"] == 1 and step["policy/grad_norm"] >= 0 and step["reward/infra_frac"] == 0
    assert {
        "reward/mean",
        "eval/correct",
        "critic/loss",
        "rollout/length_mean",
    } <= step.keys() and len(samples) == 4
    assert {sample["status"] for sample in samples} <= {"ok", "wrong", "no_answer", "crash"}
    first = config["first_prompt"]  # printed, and kept
    assert f"the first prompt, as it is fed: {first!r}" in report
    assert (
        first.endswith("<think>" if config["template"] == "base" else "assistant: ")
        and "[ASSESS]" not in first
    )
    training = report.partition(", test:")[0]
    assert sum(int(n) for n in re.findall(r"^  \S+ +\d+ +(\d+)", training, re.MULTILINE)) == kept
    assert dropped in training
    if name == "mixture":
        assert {
            "eval/math/pass_at_2",
            "eval/code/correct",
            "eval/rg:leg_counting/mean_at_2",
        } <= step.keys()
        assert {
            "reward/math/mean",
            "reward/code/mean",
            "reward/rg:leg_counting/correct",
        } <= step.keys()


# ------------------------------------------------------------------------------------ run_4xh100.sh

# name -> ranks, tp, template; attention heads and positions of its model, as published
RECIPES = {
    "eurus-1.5b": (4, 1, "chat", 12, 131072),
    "countdown-0.5b": (1, 1, "base", 14, 32768),
    "countdown-3b": (2, 2, "base", 16, 32768),
    "countdown-3b-instruct": (2, 2, "chat", 16, 32768),
}
SETTINGS = {
    "minibatch_size": 128,
    "critic_lr": 1e-5,
    "kl_coef": 0.001,
    "value_clip": 0.5,
    "resume": "auto",
}
SAY_ARGUMENTS = """#!/bin/sh
printf '%s\\n' "${0##*/}" "$@"
"""


def script(*flags: str, **env: str) -> subprocess.CompletedProcess:
    """run_4xh100.sh itself: a bash script, hence a process."""
    command = ["bash", str(ROOT / "run_4xh100.sh"), *flags]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture
def command(tmp_path):
    """command(*flags, **variables): what the script would start, as (program, the words before ppo.py, the words
    behind it). On its PATH, torchrun and python say their arguments and end."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("torchrun", "python"):
        (programs / name).write_text(SAY_ARGUMENTS)
        (programs / name).chmod(0o755)

    def said(*flags: str, **env: str) -> tuple[str, list[str], list[str]]:
        done = script(*flags, PATH=f"{programs}:{os.environ['PATH']}", **env)
        assert done.returncode == 0, done.stderr
        program, *words = done.stdout.splitlines()
        at = words.index("ppo.py")
        return program, words[:at], words[at + 1 :]

    return said


def of_torchrun(words: list[str]):
    return get_args_parser().parse_args([*words, "ppo.py"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_run(tmp_path, command, recipe):
    """Guards the script: flags that ppo.py or torchrun do not know, or that contradict each other on so many ranks,
    with a model of that shape; settings that are not the published ones."""
    ranks, tp, template, heads, positions = RECIPES[recipe]
    program, launcher, flags = command(RECIPE=recipe)
    launched = of_torchrun(launcher)
    assert program == "torchrun" and launched.standalone
    assert launched.nproc_per_node == str(ranks)
    args = ppo.parse_args(flags)
    assert (args.tp, args.template, args.out) == (tp, template, f"runs/{recipe}")
    assert {name: getattr(args, name) for name in SETTINGS} == SETTINGS
    assert args.model == args.critic_model and "/" in args.model
    data.mixture(args.task)
    model = str(tmp_path / "model")
    config = Qwen2Config(num_attention_heads=heads, max_position_embeddings=positions)
    config.save_pretrained(model)
    out = str(tmp_path / "run")
    ppo.check(replace(args, model=model, critic_model=model, out=out), ranks)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_the_user_says_wins(command, recipe):
    """Guards variables that are forgotten, and flags that stand before the script's own."""
    words = "--steps 2 --critic_lr 3e-5 --kl_coef 0.5 --value_clip 0 --task countdown3 --out there"
    _, launcher, flags = command(
        *words.split(),
        RECIPE=recipe,
        N_GPUS="8",
        BASE_MODEL="policy",
        CRITIC_MODEL="critic",
        DATA_DIR="files",
        ROLLOUT_TP_SIZE="4",
    )
    args = ppo.parse_args(flags)
    assert of_torchrun(launcher).nproc_per_node == "8"
    assert (args.model, args.critic_model, args.data, args.tp) == (
        "policy",
        "critic",
        ("files",),
        4,
    )
    assert (args.steps, args.critic_lr, args.kl_coef, args.value_clip) == (2, 3e-5, 0.5, 0)
    assert (args.task, args.out) == ("countdown3", "there")


def test_the_script_starts_nodes_and_plans(command):
    """Guards several nodes, which meet at HEAD; a run folder by name; and --plan, which needs no torchrun."""
    _, launcher, flags = command(NNODES="2", HEAD="node0:29500", EXPERIMENT_NAME="mine")
    launched = of_torchrun(launcher)
    assert (launched.nnodes, launched.rdzv_endpoint) == ("2", "node0:29500")
    assert launched.rdzv_backend == "c10d" and not launched.standalone
    args = ppo.parse_args(flags)
    assert (args.task, args.out) == ("math,code", "runs/mine")  # without RECIPE: the first one
    program, before, flags = command("--plan", "4", "80")
    assert program == "python" and before == [] and flags[-3:] == ["--plan", "4", "80"]


def test_the_script_names_its_recipes():
    """Guards a mistyped recipe that runs another one."""
    done = script(RECIPE="countdown")
    assert done.returncode == 1 and "countdown-0.5b" in done.stdout


SMALL = """--steps 2 --prompts_per_step 8 --minibatch_size 4 --max_new_tokens 8 --max_prompt_tokens 500
    --max_tokens_per_microbatch 1000 --eval_every 2 --eval_rows 2 --no-gradient_checkpointing""".split()


@pytest.mark.full
@pytest.mark.parametrize("recipe", RECIPES)
def test_reference_runs(tmp_path, tiny, recipe):
    """Guards the script as a whole: bash, torchrun and ppo.py as real processes, which nothing else starts."""
    ranks, tp, template, _, _ = RECIPES[recipe]
    ranks = min(ranks, 2)  # four of them are more than this machine has
    datasets(tmp_path)
    files = tmp_path / ("eurus" if recipe == "eurus-1.5b" else "countdown")
    done = script(
        *SMALL,
        "--out",
        str(tmp_path / "run"),
        RECIPE=recipe,
        N_GPUS=str(ranks),
        BASE_MODEL=tiny,
        DATA_DIR=str(files),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"engine vllm tp {tp}" in done.stdout and f"FSDP2 over {ranks} ranks" in done.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    steps = launch.metrics(tmp_path / "run")
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert "eval/correct" in steps[0] and "eval/correct" in steps[2]
    assert config["template"] == template
    assert steps[2]["policy/ref_kl"] > -1
    assert (tmp_path / "run" / "checkpoints" / "step_2" / "policy").exists()
