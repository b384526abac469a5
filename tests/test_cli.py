"""What a user types: flags, mistakes, the dry run, the programs that each file is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ppo

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"prompts_per_step": 64, "max_prompt_tokens": 32, "max_new_tokens": 128}


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=200
    )


def test_flags_are_flat_and_typed(tiny):
    args = ppo.parse_args(
        [
            "--model",
            tiny,
            "--clip_high",
            "0.28",
            "--no_gradient_checkpointing",
            "--samples_per_prompt",
            "4",
        ]
    )
    assert (args.clip_low, args.clip_high, args.gradient_checkpointing) == (0.2, 0.28, False)
    assert (args.batch_size, args.minibatch) == (1024, 1024)


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        ppo.parse_args(["--value_clpi", "0.3"])
    assert stopped.value.code != 0
    said = capsys.readouterr()
    assert "--value_clip" in said.out + said.err


@pytest.mark.parametrize(
    "flags, world, says",
    [
        ({"model": "no/such/folder"}, 1, ["no/such/folder", "Hugging Face folder"]),
        ({"critic_model": "gone"}, 1, ["critic_model='gone'"]),
        ({"prompts_per_step": 6}, 4, ["prompts_per_step=6", "4 ranks", "use 8"]),
        ({"prompts_per_step": 2}, 4, ["prompts_per_step=2", "use 4"]),
        ({"minibatch_size": 48}, 1, ["minibatch_size=48", "= 64", "try 16"]),
        ({"minibatch_size": -1}, 1, ["minibatch=-1", "above 0"]),
        ({"temperature": 0.0}, 1, ["temperature=0.0", "above 0"]),
        ({"tp": 2}, 1, ["tp=2", "1 ranks"]),
        ({"tp": 3}, 3, ["prompts_per_step=64", "3 ranks"]),
        ({"sp": 2}, 3, ["prompts_per_step=64"]),
        ({"sp": 8, "prompts_per_step": 64}, 8, ["sp=8", "4 attention heads"]),
        ({"tp": 2, "engine": "torch"}, 2, ["tp=2 needs --engine vllm"]),
        ({"max_tokens_per_microbatch": 100}, 1, ["= 160", "= 100"]),
        ({"max_new_tokens": 1000, "max_tokens_per_microbatch": 2000}, 1, ["1032", "512 positions"]),
        ({"replicas": 3}, 8, ["replicas=3", "8 ranks", "divisor"]),
        ({"replicas": 4}, 4, ["replicas=4", "4 ranks"]),
        ({"sp": 2, "attention": "sdpa"}, 2, ["sp=2", "varlen", "sdpa"]),
        ({"replicas": 0}, 1, ["replicas=0", "above 0"]),
        ({"profile": 9, "steps": 8}, 1, ["profile=9", "--steps 8"]),
        ({"offload": ("critic",)}, 1, ["offload=('critic',)", "torchrun"]),
        ({"eval_temperature": 0.0, "eval_samples": 4}, 1, ["eval_samples"]),
        ({"seed": 10**7}, 1, ["seed=10000000"]),
        ({"kl_target": 0.1}, 1, ["kl_coef above 0"]),
        ({"eval_rows": 0}, 1, ["eval_rows=0", "above 0"]),
        ({"out": str(ROOT / "tests")}, 1, ["exists", "--resume auto"]),
        ({"out": str(ROOT / "tests"), "resume": "auto"}, 1, ["no run folder"]),
        ({"keep_best": "eval/correct"}, 1, ["keep_best='eval/correct'", "--eval_every 0"]),
        ({"keep_best": "reward", "eval_every": 1}, 1, ["keep_best='reward'", "eval/correct"]),
        ({"save_every": -1}, 1, ["save_every=-1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_contradictions_stop_before_a_weight_is_loaded(tiny, tmp_path, flags, world, says):
    """Guards the messages: what was given, what is expected, what to change."""
    sizes = SIZES | {"model": tiny, "out": str(tmp_path / "run")}
    with pytest.raises(ValueError) as error:
        ppo.check(ppo.Args(**sizes | flags), world)
    for part in says:
        assert part in str(error.value), error.value


def test_good_flags_pass(tiny, tmp_path):
    ppo.check(ppo.Args(model=tiny, out=str(tmp_path / "run"), **SIZES), 2)


def test_a_long_prompt_is_an_error_with_numbers(tiny, tmp_path):
    said = run(
        "ppo.py",
        "--model",
        tiny,
        "--task",
        "countdown3",
        "--engine",
        "torch",
        "--max_prompt_tokens",
        "8",
        "--max_new_tokens",
        "8",
        "--prompts_per_step",
        "4",
        "--out",
        tmp_path / "run",
    )
    assert said.returncode != 0 and "allowed are 1 to max_prompt_tokens=8" in said.stderr


def test_dry_run(tiny, tmp_path):
    """--steps 0 loads everything, prints the plan, samples and scores one batch, and trains nothing."""
    said = run(
        "ppo.py",
        "--model",
        tiny,
        "--task",
        "countdown",
        "--template",
        "chat",
        "--engine",
        "torch",
        "--steps",
        "0",
        "--max_prompt_tokens",
        "100",
        "--max_new_tokens",
        "8",
        "--prompts_per_step",
        "4",
        "--kl_coef",
        "0.1",
        "--out",
        tmp_path / "run",
    )
    assert said.returncode == 0, said.stderr[-2000:]
    assert (
        "plan: 4 prompts x 1 = 4 samples a step" in said.stdout
        and "one batch: reward" in said.stdout
    )
    assert (
        "response" in said.stdout and not (tmp_path / "run").exists()
    )  # nothing in the way of the real run


@pytest.mark.parametrize("gb, verdict", [(80, "fits in 80 GB"), (0.01, "does not fit in 0.01 GB")])
def test_the_memory_plan_loads_nothing(tiny, tmp_path, gb, verdict):
    """Guards --plan: the table and the verdict, for GPUs that are not there, without a weight or a row."""
    (tmp_path / "model").mkdir()
    shutil.copy(Path(tiny) / "config.json", tmp_path / "model")
    said = run(
        "ppo.py",
        "--model",
        tmp_path / "model",
        "--plan",
        "4",
        gb,
        "--max_prompt_tokens",
        "100",
        "--max_new_tokens",
        "100",
        "--kl_coef",
        "0.1",
        "--out",
        tmp_path,
    )
    assert said.returncode == 0, said.stderr[-2000:]
    assert (
        verdict in said.stdout and "on each of 4 ranks" in said.stdout and "KV cache" in said.stdout
    )
    assert "reference weights" in said.stdout


def test_a_wrong_memory_plan_says_what_is_expected():
    """Guards --plan, which tyro does not read."""
    said = run("ppo.py", "--plan", "4", "--model", "x")
    assert (
        said.returncode == 1
        and "as in --plan 4 80" in said.stderr
        and "Traceback" not in said.stderr
    )


def test_evaluation_alone(tiny, tmp_path):
    """Guards --steps 0 with --eval_every: of a checkpoint, it says what the run itself said of it, and keeps every answer."""
    flags = [
        "--task",
        "countdown3",
        "--engine",
        "torch",
        "--max_prompt_tokens",
        "64",
        "--max_new_tokens",
        "8",
        "--lr",
        "1e-2",
        "--entropy_coef",
        "1",
        "--eval_rows",
        "6",
        "--eval_samples",
        "3",
        "--prompts_per_step",
        "8",
    ]
    ran = run(
        "ppo.py",
        *flags,
        "--model",
        tiny,
        "--steps",
        "1",
        "--eval_every",
        "1",
        "--out",
        tmp_path / "run",
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    policy = tmp_path / "run" / "checkpoints" / "step_1" / "policy"
    said = run(
        "ppo.py",
        *flags,
        "--model",
        policy,
        "--steps",
        "0",
        "--eval_every",
        "1",
        "--out",
        tmp_path / "eval",
    )
    assert said.returncode == 0, said.stderr[-2000:]
    before, after = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    (alone,) = [json.loads(line) for line in open(tmp_path / "eval" / "metrics.jsonl")]
    assert {key: alone[key] for key in after if key.startswith("eval/")} == {
        k: v for k, v in after.items() if "eval/" in k
    }
    assert "eval/pass_at_2" in alone and alone != before and "eval/correct" in said.stdout
    assert sum(1 for _ in open(tmp_path / "eval" / "samples.jsonl")) == 18


def test_checkpoints_are_ordinary_folders(tiny, tmp_path):
    """Guards the export: policy and critic load by from_pretrained, with the trained weights."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    said = run(
        "ppo.py",
        "--model",
        tiny,
        "--task",
        "countdown3",
        "--engine",
        "torch",
        "--steps",
        "1",
        "--lr",
        "1e-2",
        "--max_prompt_tokens",
        "64",
        "--max_new_tokens",
        "8",
        "--prompts_per_step",
        "4",
        "--kl_coef",
        "0.1",
        "--entropy_coef",
        "0.1",
        "--out",
        tmp_path / "run",
    )
    assert said.returncode == 0, said.stderr[-2000:]
    folder = tmp_path / "run" / "checkpoints" / "step_1"
    before = AutoModelForCausalLM.from_pretrained(tiny)
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    critic = AutoModelForTokenClassification.from_pretrained(folder / "critic")
    assert not any(a.equal(b) for a, b in zip(before.parameters(), policy.parameters()))
    assert policy.config.architectures == ["Qwen2ForCausalLM"] and critic.score.out_features == 1
    AutoTokenizer.from_pretrained(folder / "policy")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["kl_coef"] == 0.1
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert {f"{name}.py" for name in "ppo data rewards rollout kernels".split()} <= kept
    assert (tmp_path / "run" / "infra" / "run.py").exists()


def test_data_answers_for_itself():
    """Guards `python data.py`: rows of every task that needs no file."""
    said = run("data.py")
    assert said.returncode == 0 and len(said.stdout.splitlines()) > 4
