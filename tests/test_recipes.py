"""Every dataset through a whole step, and the four reference runs, with a tiny model in the place of the real one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fixtures
import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--engine",
    "torch",
    "--steps",
    "1",
    "--prompts_per_step",
    "4",
    "--max_new_tokens",
    "8",
    "--max_prompt_tokens",
    "500",
    "--max_tokens_per_microbatch",
    "1000",
    "--eval_every",
    "1",
    "--eval_rows",
    "2",
    "--no-gradient_checkpointing",
]
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


RUNS = """import sys, json; sys.path.insert(0, sys.argv[1]); import ppo, rewards
rewards.TEST_SECONDS = 1.0
for name, flags in json.load(sys.stdin).items():
    ppo.train(ppo.parse_args(flags))
    print("that was", name, "-" * 9)
"""


EURUS = 8 + 6  # rows of math and of code


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny) -> tuple[Path, str]:
    """One training step on each of them, in one process: (where the run folders are, what was printed)."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {
        name: [*TINY, *more, "--model", tiny, "--out", f"{folder}/{name}"]
        for name, more in datasets(folder / "data").items()
    }
    env = os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache"}
    command = [sys.executable, "-c", RUNS, str(ROOT)]
    done = subprocess.run(
        command, input=json.dumps(flags), env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.parametrize(
    "name, kept, dropped",
    [
        ("eurus", EURUS, "unequal numbers"),
        ("countdown", 117, "held out"),
        ("gsm8k", 7, ""),
        ("math", 29, "held out"),
        ("code", 11, "no JSON"),
        ("gym", 0, ""),
        ("mixture", EURUS, "also in the test split"),
    ],
)
def test_every_dataset_goes_through_a_step(runs, tiny, name, kept, dropped):
    """Guards a format that is read but cannot be trained on: rows of files, ids, a step, rewards, held-out rows."""
    folder, said = runs
    report = said.partition(f"that was {name} ")[0].rpartition("that was")[2]
    config = json.loads((folder / name / "config.json").read_text())
    step = [json.loads(line) for line in open(folder / name / "metrics.jsonl")][-1]
    samples = [json.loads(line) for line in open(folder / name / "samples.jsonl")]
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


SMALL = [
    "--steps",
    "2",
    "--prompts_per_step",
    "8",
    "--minibatch_size",
    "4",
    "--max_new_tokens",
    "8",
    "--max_prompt_tokens",
    "500",
    "--max_tokens_per_microbatch",
    "1000",
    "--eval_every",
    "2",
    "--eval_rows",
    "2",
    "--no-gradient_checkpointing",
]


@pytest.mark.parametrize(
    "recipe, ranks, engine",
    [
        ("", 2, "vllm tp 1"),
        ("countdown-0.5b", 1, "vllm tp 1"),
        ("countdown-3b", 2, "vllm tp 2"),
        ("countdown-3b-instruct", 2, "vllm tp 2"),
    ],
)
def test_reference_runs(tmp_path, tiny, recipe, ranks, engine):
    """Guards the scripts: flags that ppo.py does not know, or that contradict each other; overrides that do not win."""
    data = {"": "eurus"}.get(recipe, "countdown")
    datasets(tmp_path)
    env = os.environ | {
        "BASE_MODEL": tiny,
        "DATA_DIR": str(tmp_path / data),
        "EXPERIMENT_NAME": tmp_path.name,
    }
    env |= (
        {"RECIPE": recipe} if recipe else {"N_GPUS": str(ranks)}
    )  # four of them are more than this machine has
    command = ["bash", str(ROOT / "run_4xh100.sh"), *SMALL, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"engine {engine}" in done.stdout and f"FSDP2 over {ranks} ranks" in done.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    steps = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert (
        [step["step"] for step in steps] == [0, 1, 2]
        and "eval/correct" in steps[0]
        and "eval/correct" in steps[2]
    )
    assert config["template"] == ("chat" if recipe in ("", "countdown-3b-instruct") else "base")
    assert (config["critic_lr"], config["kl_coef"], config["value_clip"]) == (1e-5, 0.001, 0.5)
    assert (
        steps[2]["policy/ref_kl"] > -1
        and (tmp_path / "run" / "checkpoints" / "step_2" / "policy").exists()
    )


def test_the_script_names_its_recipes():
    """Guards a mistyped recipe that runs another one."""
    command = ["bash", str(ROOT / "run_4xh100.sh")]
    done = subprocess.run(
        command, env=os.environ | {"RECIPE": "countdown"}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "countdown-0.5b" in done.stdout
