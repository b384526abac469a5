"""What a user types: flags, mistakes, the memory plan, the dry run, evaluation alone.

All but one in this process.
"""

import json
import shutil
from pathlib import Path

import launch
import pytest

import ppo
from tools import plan

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"prompts_per_step": 64, "max_prompt_tokens": 32, "max_new_tokens": 128}


def train(*flags) -> list[dict]:
    return ppo.train(ppo.parse_args([str(flag) for flag in ("--engine", "torch", *flags)]))


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


def test_an_engine_stays_on_its_node(tiny, tmp_path, monkeypatch):
    """Guards --tp over the network: two nodes of one process each are not two ranks of an engine."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    args = ppo.Args(model=tiny, out=str(tmp_path / "run"), tp=2, **SIZES)
    with pytest.raises(ValueError, match="tp=2 does not divide the 1 ranks"):
        ppo.check(args, 2)


def test_dry_run(tiny, tmp_path, capsys):
    """--steps 0 loads everything, prints the plan, samples and scores one batch, and trains nothing."""
    flags = """--task countdown3 --template chat --steps 0 --max_prompt_tokens 100 --max_new_tokens 8
        --prompts_per_step 4 --kl_coef 0.1""".split()
    assert train(*flags, "--model", tiny, "--out", tmp_path / "run") == []
    said = capsys.readouterr().out
    assert "plan: 4 prompts x 1 = 4 samples a step" in said
    assert "one batch: reward" in said and "response" in said
    assert not (tmp_path / "run").exists()  # nothing in the way of the real run


@pytest.mark.parametrize("gb, verdict", [(80, "fits in 80 GB"), (0.01, "does not fit in 0.01 GB")])
def test_the_memory_plan_loads_nothing(tiny, tmp_path, capsys, gb, verdict):
    """Guards --plan: the table and the verdict, for GPUs that are not there, without a weight or a row."""
    (tmp_path / "model").mkdir()
    shutil.copy(Path(tiny) / "config.json", tmp_path / "model")
    flags = "--max_prompt_tokens 100 --max_new_tokens 100 --kl_coef 0.1 --out".split()
    plan.main(["--model", str(tmp_path / "model"), "--plan", "4", str(gb), *flags, str(tmp_path)])
    said = capsys.readouterr().out
    assert verdict in said and "on each of 4 ranks" in said and "KV cache" in said
    assert "reference weights" in said


def test_a_wrong_memory_plan_says_what_is_expected():
    """Guards --plan, which tyro does not read: the program must find it before it parses its flags."""
    ended = launch.run("ppo.py", "--plan", 4, "--model", "x")
    assert ended.code == 1 and "as in --plan 4 80" in ended.said
    assert "Traceback" not in ended.said


def test_evaluation_alone(tiny, tmp_path, capsys):
    """Guards --steps 0 with --eval_every: of a checkpoint, it says what the run itself said of it, and keeps every
    answer. And what a run leaves besides: its flags and its code."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    flags = """--task countdown3 --max_prompt_tokens 64 --max_new_tokens 8 --lr 1e-2 --eval_rows 6
        --entropy_coef 1 --eval_samples 3 --prompts_per_step 8 --eval_every 1""".split()
    train(*flags, "--model", tiny, "--steps", 1, "--out", run)
    policy = run / "checkpoints" / "step_1" / "policy"
    capsys.readouterr()
    train(*flags, "--model", policy, "--steps", 0, "--out", alone)
    assert "eval/correct" in capsys.readouterr().out
    before, after = launch.metrics(run)
    (row,) = launch.metrics(alone)
    evaluated = {key: value for key, value in after.items() if key.startswith("eval/")}
    assert {key: row[key] for key in evaluated} == evaluated
    assert "eval/pass_at_2" in row and any(row[key] != before[key] for key in evaluated)
    assert len(launch.read_lines(alone / "samples.jsonl")) == 18
    assert json.loads((run / "config.json").read_text())["entropy_coef"] == 1
    kept = {path.name for path in run.iterdir()}
    assert {f"{name}.py" for name in "ppo data rewards rollout kernels".split()} <= kept
    assert (run / "infra" / "run.py").exists()
